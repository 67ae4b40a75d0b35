"""RoboInter, the data side: shape glue between the golden vectors and the package's functions."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_repro.robointer import coordinates


def smart_resize(given: Any, data: Path) -> tuple[int, int]:
    return coordinates.smart_resize(**given)


def coord_convert(given: Any, data: Path) -> dict[str, Any]:
    width, height = given['image_size']
    return {name: coordinates.published_rescale(given['data'], width, height, coordinates.SOURCES[name]).tolist() for name in ('intern', 'qwen', 'llava')}


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'smart_resize': smart_resize,
    'coord_convert': coord_convert,
}
