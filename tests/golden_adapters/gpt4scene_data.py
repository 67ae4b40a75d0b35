"""GPT4Scene, the data side: shape glue between the golden vectors and the package's functions."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_repro.gpt4scene import build_rows, build_texts, chunks
from vlm_repro.gpt4scene.score_grounding import scene_boxes

BARE = build_texts.Templates(('<description>',), ('<description>',), ('<id>',), ('<question>',), ('<situation> <question>',))


def sources_of(given: dict[str, Any]) -> build_rows.Sources:
    "The boxes of one scene named `s`, and wordings that add nothing."
    return build_rows.Sources(scene_boxes({'s': given['proposals']}, {'s': given['gt']}), BARE)


def chunk_split(given: Any, data: Path) -> list[list[int] | None]:
    return [list(part) if part else None for part in chunks.chunk_ranges(given['n'], given['num_chunks'])]


def prep_scanrefer(given: Any, data: Path) -> dict[str, Any]:
    annos = [{'scene_id': 's', 'object_id': str(given['object_id']), 'description': given['description']}]
    (row,) = build_rows.scanrefer_rows(annos, sources_of(given))
    told = list(build_rows.scanrefer_told(annos, sources_of(given)))
    answer = told[0].answer if told else None
    return {'val_obj_id': row['obj_id'], 'val_ref': row['ref_captions'], 'train_kept': bool(told), 'train_obj_id': int(answer[4:7]) if answer else None, 'train_answer': answer,
            'description_in_prompt': row['prompt']}


def prep_multi3dref(given: Any, data: Path) -> dict[str, Any]:
    annos = [{'scene_id': 's', 'object_ids': given['object_ids'], 'description': 'x', 'eval_type': given['eval_type']}]
    (row,) = build_rows.multi3dref_rows(annos, sources_of(given))
    told = list(build_rows.multi3dref_told(annos, sources_of(given)))
    return {'val_refs': row['ref_captions'], 'val_obj_id': row['obj_id'], 'train_kept': bool(told), 'train_answer': told[0].answer if told else None}


def prep_scan2cap(given: Any, data: Path) -> dict[str, Any]:
    annos = [{'scene_id': 's', 'object_id': str(i), 'description': f'object {i}'} for i in given['captioned_objects']]
    rows, told = build_rows.scan2cap_rows(annos, sources_of(given)), build_rows.scan2cap_told(annos, sources_of(given))
    return {'val': [[r['obj_id'], r['pred_id'], r['iou']] for r in rows], 'train': [[int(t.answer.split()[1]), int(t.prompt[4:7])] for t in told]}


def prep_scanqa(given: Any, data: Path) -> dict[str, Any]:
    (row,), told = build_rows.scanqa_rows([given], build_rows.Sources({}, BARE)), build_rows.scanqa_told([given], build_rows.Sources({}, BARE))
    return {'train_answers': [t.answer for t in told], 'val_refs': row['ref_captions'], 'obj_id': row['obj_id']}


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'chunk_split': chunk_split,
    'prep_scanrefer': prep_scanrefer,
    'prep_multi3dref': prep_multi3dref,
    'prep_scan2cap': prep_scan2cap,
    'prep_scanqa': prep_scanqa,
}
