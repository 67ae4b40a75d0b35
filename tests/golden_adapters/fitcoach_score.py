"""FitCoach, the metric side: shape glue between the golden vectors and the package's functions."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from golden_adapters import ABSENT
from golden_adapters.fitcoach_model import ACTS, VOCAB
from vlm_repro.fitcoach import actions, evaluate, match, score
from vlm_repro.metrics import meteor_nltk


def odd(x: float) -> Any:
    "A number as the vectors write it."
    return x if np.isfinite(x) else 'NaN' if np.isnan(x) else 'Infinity' if x > 0 else '-Infinity'


def temporal_matching(given: Any, data: Path) -> dict[str, Any]:
    true, said = (match.Timed(tuple(given[f'{k}_feedbacks']), tuple(given[f'{k}_timestamps'])) for k in ('gt', 'pred'))
    held = match.match(true, said)
    return {'pairs_gt_pred': [list(p) for p in held.gt_pred], 'pairs_pred_gt': [list(p) for p in held.pred_gt], 'matched_texts': [[true.texts[i], said.texts[j]] for i, j in held.gt_pred],
            'num_matched_gt': len(held.gt_pred), 'num_matched_pred': len(held.pred_gt), 'f_score': float(match.temporal_f(np.array(held.counts)))}


def temporal_fscore_corpus(given: Any, data: Path) -> dict[str, Any]:
    sides = [[match.Timed(('x',)*len(t), tuple(t)) for t in (e['gt_timestamps'], e['pred_timestamps'])] for e in given['episodes']]
    found = [match.match(*pair) for pair in sides]
    totals = np.array([m.counts for m in found]).sum(0)
    precision, recall, f = map(float, match.precision_recall_f(totals))
    met, true, hit, said = (int(x) for x in totals)
    return {'running_f': evaluate.running_f(found), 'final_f': f, 'precision': precision, 'recall': recall, 'total_num_gt_feedbacks': true, 'total_num_pred_feedbacks': said,
            'total_matched_gt_feedbacks': met, 'total_matched_pred_feedbacks': hit}


def rouge_l(given: Any, data: Path) -> float:
    return score.rouge_l(given['reference'], given['prediction'])


def meteor(given: Any, data: Path) -> Any:
    return ABSENT if meteor_nltk.meteor_nltk_absence() else meteor_nltk.meteor_pair(given['reference'], given['prediction'])


def llm_judge_parse(given: Any, data: Path) -> dict[str, Any]:
    return {'scores': [odd(x) for x in score.published_scores(given['response'])]}


def judge_template_fill(given: Any, data: Path) -> str:
    return score.fill_slots(given['template'], given['fillers'])


def evaluator_end_to_end(given: Any, data: Path) -> dict[str, Any]:
    episodes = []
    for i, item in enumerate(given['items']):
        texts, times = actions.published_feedbacks(item['output_tokens'], ACTS, lambda ids: ' '.join(VOCAB[i] for i in ids), 4)
        episodes.append(evaluate.episode_of(str(i), str(i), item['responses'], item['response_timestamps'], item['start'], match.Timed(tuple(texts), tuple(times))))
    held = evaluate.evaluate(episodes)
    shown = {k: ABSENT for k in ('METEOR Score',) if held.absent} | evaluate.printed(held)
    return {'saved_pairs': evaluate.saved_pairs(held), 'printed': shown, 'meteor': ABSENT if held.absent else held.numbers['meteor'], 'rouge_l': held.numbers['rouge_l']}


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'temporal_matching': temporal_matching,
    'temporal_fscore_corpus': temporal_fscore_corpus,
    'rouge_l': rouge_l,
    'meteor': meteor,
    'llm_judge_parse': llm_judge_parse,
    'judge_template_fill': judge_template_fill,
    'evaluator_end_to_end': evaluator_end_to_end,
}
