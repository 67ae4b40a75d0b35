"""RoboInter, how answers are read and scored: shape glue between the golden vectors and the package's functions."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_repro.robointer import kinds, readings


def bbox_parse(given: Any, data: Path) -> list[float]:
    return readings.published_box(given)


def traj_parse(given: Any, data: Path) -> dict[str, list[float]]:
    return {'numbers': readings.numbers_in(given['content']), 'traj': readings.published_trace(given['content'], given['remove_idx'])}


def struct_parse(given: Any, data: Path) -> dict[str, Any]:
    return {'multi': readings.published_structure(given), 'single': {key: readings.published_value(given, key) for key in ('current_bbox', 'future_traj', 'bbox')}}


def api_json(given: Any, data: Path) -> Any:
    return readings.published_api_json(given)


def robobrain_task_text(given: Any, data: Path) -> str:
    return readings.robobrain_task(given)


def planning_task_type(given: Any, data: Path) -> str:
    return kinds.planning_kind(given)[0]


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'bbox_parse': bbox_parse,
    'traj_parse': traj_parse,
    'struct_parse': struct_parse,
    'api_json': api_json,
    'robobrain_task_text': robobrain_task_text,
    'planning_task_type': planning_task_type,
}
