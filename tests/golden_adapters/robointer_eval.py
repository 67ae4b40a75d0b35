"""RoboInter, how answers are read and scored: shape glue between the golden vectors and the package's functions."""
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_repro.robointer import kinds, language, planning, readings, score_boxes, score_traces, upstream


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


def box_score(given: Any, data: Path) -> float:
    s = given['sample']
    return score_boxes.published_box_score(s['id'], s['pred'], s['gt'], given['source'], s.get('image_size'))


def traj_score(given: Any, data: Path) -> float:
    s = given['sample']
    return score_traces.published_trace_score(s['id'], s['pred'], s['gt'], given['source'], s.get('image_size'))


def iou_pair(given: Any, data: Path) -> float:
    return score_boxes.published_iou(given['a'], given['b'])


def choice_score(given: Any, data: Path) -> int:
    return planning.published_choice(given['pred'], given['gt'])


def aggregate_intermediate(given: Any, data: Path) -> dict[str, Any]:
    found = upstream.published_scores(given['model'], given['files'])
    return {**found.tasks, 'average_score_4dp': f'{found.average:.4f}'}


def planning_bleu(given: Any, data: Path) -> dict[str, float]:
    return planning.published_bleu(given['prediction'], given['target'])


def spelled(value: Any) -> Any:
    "NaN as the vectors write it."
    return {k: spelled(v) for k, v in value.items()} if isinstance(value, dict) else 'NaN' if isinstance(value, float) and math.isnan(value) else value


def aggregate_planning(given: Any, data: Path) -> dict[str, Any]:
    found = planning.published_planning(given)
    return {**{f'n_{k}': n for k, n in found.n.items()}, 'scores': spelled({'choice': found.choice, 'decide': found.decide, 'planning': dict(found.planning)})}


def seg_metric(given: Any, data: Path) -> dict[str, float]:
    return language.seg_metric(given['pred'], given['gt'])


def traj_metric(given: Any, data: Path) -> dict[str, float]:
    return score_traces.published_trajectory(given['pred'], given['gt'])


def contact_point_metric(given: Any, data: Path) -> dict[str, float]:
    return score_traces.published_contact_point(given['pred'], given['gt'])


def action_acc(given: Any, data: Path) -> float:
    return language.action_accuracy(given['pred'], given['true'], *([given['tol']] if 'tol' in given else []))


def grasp_acc(given: Any, data: Path) -> float | None:
    return language.grasp_accuracy(given['pred'], given['gt'])


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def language_metric(given: Any, data: Path) -> dict[str, list[float]]:
    return language.language_metric(listed(given['prediction']), listed(given['target']))


def lang_eval(given: Any, data: Path) -> dict[str, Any]:
    size, pairs = given['batch_size'], given['pairs']
    lost = {i // size for i in given.get('failing_indices', ())}
    found = language.published_language(range(len(pairs)), [None if i // size in lost else p[0] for i, p in enumerate(pairs)], [p[1] for p in pairs], given['type'])
    return {'averages': found.averages, 'n_details': len(found.details), 'answers': [d.answer for d in found.details], 'detail_metrics': [dict(d.metric) for d in found.details],
            'ids': [d.id for d in found.details]}


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'bbox_parse': bbox_parse,
    'traj_parse': traj_parse,
    'struct_parse': struct_parse,
    'api_json': api_json,
    'robobrain_task_text': robobrain_task_text,
    'planning_task_type': planning_task_type,
    'box_score': box_score,
    'traj_score': traj_score,
    'iou_pair': iou_pair,
    'choice_score': choice_score,
    'aggregate_intermediate': aggregate_intermediate,
    'planning_bleu': planning_bleu,
    'aggregate_planning': aggregate_planning,
    'seg_metric': seg_metric,
    'traj_metric': traj_metric,
    'contact_point_metric': contact_point_metric,
    'action_acc': action_acc,
    'grasp_acc': grasp_acc,
    'language_metric': language_metric,
    'lang_eval': lang_eval,
}
