"""A small data root in Road Buddy's layout, with questions of our own."""
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_repro.core.records import Generation, Sample
from vlm_repro.roadbuddy.annotations import annotation_file, sample_of
from vlm_repro.roadbuddy.data import FOLDER

TWO, FOUR = ['A. Đúng', 'B. Sai'], ['A. Rẽ trái', 'B. Rẽ phải', 'C. Đi thẳng', 'D. Quay đầu']


def clip_name(clip: int, drive: int = 203, split: str = 'train', seconds: int = 8) -> str:
    "A clip's path as the challenge names clips."
    return f'{split}/videos/{clip:08x}_{drive:03d}_clip_001_0010_{10 + seconds:04d}_Y.mp4'


def item(n: int, choices: Iterable[str] = TWO, right: int = 0, clip: int | None = None, drive: int = 203, **other: Any) -> dict[str, Any]:
    "A training item; `other` replaces fields, and None removes them."
    choices = list(choices)
    held = {'id': f'train_{n:04d}', 'question': f'Biển báo {n} có cấm rẽ trái không?', 'choices': choices, 'answer': choices[right], 'support_frames': [2.0],
            'video_path': clip_name(n if clip is None else clip, drive), '_unused_': 'x@1', **other}
    return {k: v for k, v in held.items() if v is not None}


def test_item(n: int, **other: Any) -> dict[str, Any]:
    "An item of the public test: no answer, no marks."
    return item(n, **{'id': f'testa_{n:04d}', 'answer': None, 'support_frames': None, 'video_path': clip_name(n, 401, 'public_test'), **other})


test_item.__test__ = False


def make_root(root: Path, train: Iterable[Mapping[str, Any]] = (), public: Iterable[Mapping[str, Any]] = ()) -> Path:
    "A folder in the challenge's layout; without clips."
    for split, items in (('train', list(train)), ('public_test', list(public))):
        if not items: continue
        (root/FOLDER/split).mkdir(parents=True, exist_ok=True)
        (root/FOLDER/split/f'{split}.json').write_text(annotation_file(items), encoding='utf-8')
    return root


def question(n: int = 0, choices: Iterable[str] = FOUR, right: int = 0, clip: int | None = None, drive: int = 203) -> Sample:
    "One loaded question."
    return sample_of(item(n, choices, right, clip, drive), 'train')


def reply(sample: Sample, text: str | None, **other: Any) -> Generation:
    "What a model wrote; None for a call that failed."
    return Generation(sample.id, text, **other) if text is not None else Generation(sample.id, '', error='media: x.mp4: cut short', finish_reason='error')
