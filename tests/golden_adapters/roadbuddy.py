"""Road Buddy: shape glue between the golden vectors and the package's functions."""
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from golden_adapters.roadbuddy_frames import ADAPTERS as FRAMES
from vlm_repro.core.records import Sample
from vlm_repro.roadbuddy import extract, prompt, score, splits, submission


def answer_parse(given: Any, data: Path) -> dict[str, str]:
    return {'inference': extract.parse_inference(given), 'evaluate': extract.parse_evaluate(given)}


def gold_label(given: Any, data: Path) -> str:
    return extract.gold_label(given)


def prompt_choice(given: Any, data: Path) -> dict[str, Any]:
    asked, n = given['question'], given['num_frames']
    family = prompt.family_of(asked, n, given['language'], given['simple'], 'as_published')
    sample = Sample('x', (), asked, '', {'choices': json.dumps(given['choices']), 'letters': 'ABCD'})
    settings = prompt.PromptSettings(given['language'] if given['language'] in ('auto', 'vi', 'en') else 'en', given['simple'], 'as_published')
    text = prompt.question_text(sample, n, settings)
    return {'detected': prompt.detect_language(asked, 'as_published'), 'template': family, 'choices_joined_by_newline': '\n'.join(given['choices']) in text}


def split(given: Any, data: Path) -> dict[str, Any]:
    train, val = splits.split_indices(given['n'], given['train_fraction'], given['seed'])
    digests = {f'sha256_{name}': hashlib.sha256(','.join(map(str, part)).encode()).hexdigest() for name, part in (('train', train), ('val', val))}
    whole = {'train': train, 'val': val} if given['n'] <= 50 else {}
    return {'n_train': len(train), 'n_val': len(val), 'train_head': train[:10], 'val_head': val[:10], **digests, **whole}


def metrics(given: Any, data: Path) -> dict[str, Any]:
    return score.evaluate(given['predictions'], given['labels'])


def submission_csv(given: Any, data: Path) -> str:
    return submission.submission_csv(given['ids'], given['answers'])


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'answer_parse': answer_parse,
    'gold_label': gold_label,
    'prompt_choice': prompt_choice,
    'split': split,
    'metrics': metrics,
    'submission_csv': submission_csv,
    **FRAMES,
}
