"""A small data root in mmWalk's released layout, and the real annotations where this machine has them."""
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vlm_repro.mmwalk.annotations import CATEGORIES, chat_record, frame_paths, internvl_record
from vlm_repro.mmwalk.data import ARCHIVE, TEST_FOLDER, TRAIN_FOLDER

REAL = Path(__file__).resolve().parents[2]/'shared'/'data'/'mmwalk'
HEADER = 'Three colour images (walker, drone, dog) and one depth image are given.\nAnswer briefly.\n'
HUMAN = '<image> <image><image>\nThree views are given. <image>\nThis is depth. Question:'
ASKED = {'E1': ('What is the weather now?', 'Sunny.'), 'E2': ('Is there any bench here?', 'Yes.'), 'E3': ('How many poles are visible?', '3'),
         'E4': ('What colour is the nearest car?', 'Red.'), 'M1': ('Where is the bus stop from here?', "At your 3 o'clock."), 'M2': ('Describe the place.', 'A wide square.'),
         'M3': ('Which view shows the kerb best?', 'The dog view.'), 'H1': ('Is it safe to go on?', 'Low risk. The path is clear.'),
         'H2': ('Which landmarks would help with navigation, and why?', 'The bench, it is close.')}


def real_root() -> Path:
    "The folder with the real annotations; the test is skipped, saying so, where it is absent."
    if not REAL.is_dir(): pytest.skip(f'the released annotations are not at {REAL.parent.parent.name}/data/mmwalk beside the repository')
    return REAL


def chat(category: str, trajectory: str = 'Plaza05', frame: int = 7, **other: str) -> dict[str, Any]:
    "A test record."
    question, answer = ASKED[category]
    return chat_record(frame_paths(trajectory, frame), f'{other.get("header", HEADER)}Question: {other.get("question", question)}', other.get('answer', answer), category)


def write(path: Path, records: Iterable[Mapping[str, Any]], end: str = '\n') -> Path:
    "Records as JSON Lines with the given line end."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(''.join(json.dumps(r, ensure_ascii=False) + end for r in records).encode())
    return path


def tuning(places: Iterable[tuple[str, int]], first: int = 0) -> list[dict[str, Any]]:
    "Training records: all nine questions of every moment."
    asked = [(t, f, q, a) for t, f in places for q, a in ASKED.values()]
    return [internvl_record(first + i, frame_paths(t, f, head=''), HUMAN + q, a) for i, (t, f, q, a) in enumerate(asked)]


def make_root(root: Path, frames: Iterable[tuple[str, int]] = (('Plaza05', 7), ('Cross02', 3))) -> Path:
    "A root with nine test files and the train archive, in the released layout."
    for category in CATEGORIES: write(root/TEST_FOLDER/f'{category}.jsonl', [chat(category, t, n) for t, n in frames])
    (root/TRAIN_FOLDER).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(root/TRAIN_FOLDER/ARCHIVE, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, records in (('train.jsonl', tuning([(f'Mixed0{i}', i) for i in range(1, 6)])), ('val.jsonl', tuning([('Parking01', 4)], 900))):
            z.writestr(name, ''.join(json.dumps(r) + '\r\n' for r in records))
    return root
