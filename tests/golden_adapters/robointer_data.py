"""RoboInter, the data side: shape glue between the golden vectors and the package's functions."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_repro.robointer import coordinates, frames, mixture, records


def smart_resize(given: Any, data: Path) -> tuple[int, int]:
    return coordinates.smart_resize(**given)


def coord_convert(given: Any, data: Path) -> dict[str, Any]:
    width, height = given['image_size']
    return {name: coordinates.published_rescale(given['data'], width, height, coordinates.SOURCES[name]).tolist() for name in ('intern', 'qwen', 'llava')}


def sampling_rate(given: Any, data: Path) -> float:
    return mixture.sampling_rate(given)


def sample_counts(given: Any, data: Path) -> dict[str, Any]:
    drawn = [[(k, int(i)) for i in mixture.draw_records(part['n'], part['rate'], 0, str(k))] for k, part in enumerate(given)]
    return {'total': sum(map(len, drawn)), 'per_dataset': list(map(len, drawn)), 'unique_ids': len({i for part in drawn for i in part})}


def frame_ref(given: Any, data: Path) -> dict[str, Any]:
    found = frames.frame_ref(given)
    return {'episode': found.episode, 'index': found.index}


def length_estimate(given: Any, data: Path) -> dict[str, int]:
    length, by_modality = records.published_lengths(given)
    return {'length': length, 'modality_length': by_modality}


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'smart_resize': smart_resize,
    'coord_convert': coord_convert,
    'sampling_rate': sampling_rate,
    'sample_counts': sample_counts,
    'frame_ref': frame_ref,
    'length_estimate': length_estimate,
}
