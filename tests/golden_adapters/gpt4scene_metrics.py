"""GPT4Scene, the metric side: shape glue between the golden vectors and the package's functions."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from golden_adapters import ABSENT
from vlm_repro.gpt4scene import clean, rows, score_caption, score_grounding, score_qa
from vlm_repro.metrics import boxes3d, captions, meteor, ptb


def row_of(given: dict[str, Any]) -> rows.ValRow:
    "A row of a prediction file as a row of the validation file."
    asked = {'scene_id': given['scene_id'], 'prompt': '', 'ref_captions': given.get('ref_captions', []), 'obj_id': given.get('gt_id', 0), 'pred_id': given.get('pred_id', 0)}
    return rows.val_row({**asked, 'type_info': given.get('type_info', 0)})


def clean_answer(given: Any, data: Path) -> str:
    return clean.clean_answer(given)


def answer_match(given: Any, data: Path) -> tuple[int, int]:
    return clean.answer_match(given['pred'], given['refs'])


def qa_single(given: Any, data: Path) -> dict[str, Any]:
    held = {name: score_qa.qa_texts(given['pred'], given['refs'], name == 'sqa3d') for name in ('scanqa', 'sqa3d')}
    out: dict[str, Any] = {name: [float(x) for x in texts.match] for name, texts in held.items()}
    return out | {f'{name}_caption': t.prediction for name, t in held.items()} | {f'{name}_refs': t.captions for name, t in held.items()}


def _qa(given: Any, captions_too: bool, name: str) -> Any:
    try: got = score_qa.published_qa(name, [row_of(r) for r in given], [r['pred'] for r in given], captions_too)
    except (ZeroDivisionError, ValueError, KeyError) as e: return {'error': type(e).__name__}
    return {k: ABSENT if v is None else v for k, v in got.items()}


def qa_aggregate(given: Any, data: Path) -> dict[str, Any]:
    return {name: _qa(given, False, name) for name in ('scanqa', 'sqa3d')}


def qa_full(given: Any, data: Path) -> dict[str, Any]:
    return {name: _qa(given, True, name) for name in ('scanqa', 'sqa3d')}


def box3d_iou(given: Any, data: Path) -> float:
    return float(boxes3d.iou3d(given['a'], given['b']))


def scanrefer(given: Any, data: Path) -> dict[str, Any]:
    scenes = score_grounding.scene_boxes(given['proposals'], given['gt'])
    try: return score_grounding.published_scanrefer([row_of(r) for r in given['preds']], [r['pred'] for r in given['preds']], scenes, given['unique_multiple'])
    except ZeroDivisionError as e: return {'error': type(e).__name__}


def multi3dref(given: Any, data: Path) -> dict[str, float]:
    scenes = score_grounding.scene_boxes(given['proposals'], given['gt'])
    return score_grounding.published_multi3dref([row_of(r) for r in given['preds']], [r['pred'] for r in given['preds']], scenes)


def multi3dref_base_model(given: Any, data: Path) -> dict[str, float]:
    scenes = score_grounding.scene_boxes(given['proposals'], given['gt'])
    return score_grounding.published_multi3dref([row_of(r) for r in given['preds']], [r['pred'] for r in given['preds']], scenes, plain=True)


def scan2cap_gating(given: Any, data: Path) -> dict[str, Any]:
    scenes, asked, said = score_grounding.scene_boxes(given['proposals'], given['gt']), [row_of(r) for r in given['preds']], [r['pred'] for r in given['preds']]
    held = {t: score_caption.gate(asked, said, scenes, given['corpus'], t) for t in (.25, .5)}
    return {'pred_iou25': dict(held[.25].captions), 'pred_iou50': dict(held[.5].captions), 'refs': dict(held[.25].references)}


def scan2cap_full(given: Any, data: Path) -> dict[str, Any]:
    scenes, asked, said = score_grounding.scene_boxes(given['proposals'], given['gt']), [row_of(r) for r in given['preds']], [r['pred'] for r in given['preds']]
    return {k: ABSENT if v is None else v for k, v in score_caption.published_scan2cap(asked, said, scenes, given['corpus']).items()}


def unique_multiple(given: Any, data: Path) -> dict[str, dict[str, int]]:
    return score_grounding.unique_lookup(given['rows'], given['raw_to_nyu40'])


def ptb_tokenize(given: Any, data: Path) -> str:
    return ptb.tokenize([given])[0]


def ptb_tokenize_batch(given: Any, data: Path) -> dict[str, list[str]]:
    return ptb.tokenize_keyed({str(i): held for i, held in enumerate(given)}, as_published=True)


def caption_metrics(given: Any, data: Path) -> dict[str, Any]:
    said, refs = given['hyps'], given['refs']
    whole, each = captions.caption_scores(said, refs), captions.caption_statistics(said, refs)
    per = {f'Bleu_{k}': captions.bleu_score(each['bleu'], order=k).tolist() for k in range(1, 5)} | {'ROUGE_L': each['rouge_l'][:, 0].tolist(), 'CIDEr': each['cider'][:, 0].tolist()}
    if meteor.meteor_absence(): return {**whole, 'METEOR': ABSENT, 'per_item': {**per, 'METEOR': ABSENT}}
    counts = meteor.meteor_statistics(said, refs)
    return {**whole, 'METEOR': float(meteor.meteor_score(counts.sum(0))), 'per_item': {**per, 'METEOR': np.atleast_1d(meteor.meteor_score(counts)).tolist()}}


def prep_sqa_type(given: Any, data: Path) -> int:
    return rows.sqa_type(given)


def val_row(given: Any, data: Path) -> dict[str, Any]:
    images = {'s': ['a.jpg']}
    row = rows.val_row(given)
    return {'prompt': row.prompt, 'ref_captions': list(row.refs), 'scene_id': row.scene, 'image_paths': images[row.scene], 'qid': row.qid, 'obj_id': row.obj_id, 'pred_id': row.pred_id, 'type_info': row.kind}


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'clean_answer': clean_answer,
    'answer_match': answer_match,
    'qa_single': qa_single,
    'qa_aggregate': qa_aggregate,
    'qa_full': qa_full,
    'box3d_iou': box3d_iou,
    'scanrefer': scanrefer,
    'multi3dref': multi3dref,
    'multi3dref_base_model': multi3dref_base_model,
    'scan2cap_gating': scan2cap_gating,
    'scan2cap_full': scan2cap_full,
    'unique_multiple': unique_multiple,
    'ptb_tokenize': ptb_tokenize,
    'ptb_tokenize_batch': ptb_tokenize_batch,
    'caption_metrics': caption_metrics,
    'prep_sqa_type': prep_sqa_type,
    'val_row': val_row,
}
