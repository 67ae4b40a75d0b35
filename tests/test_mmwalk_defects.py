"""The table of upstream defects says what the code does."""
import csv
import inspect
import re

import pytest

from vlm_repro.core.assets import asset
from vlm_repro.mmwalk import annotations, data, extract, predictions, prompt
from vlm_repro.mmwalk.task import MmwalkSettings

with asset('mmwalk/defects.csv').open(encoding='utf-8', newline='') as file: ROWS = list(csv.DictReader(file))
FUNCTIONS = {'read_predictions': predictions.read_predictions, 'pair': predictions.pair, 'extract_question': annotations.extract_question, 'extract': extract.extract,
             'render': prompt.PromptSettings, 'load': data.load}


def test_the_table_is_whole():
    assert list(ROWS[0]) == ['id', 'stage', 'what happens', 'switch', 'default', 'test']
    assert len({r['id'] for r in ROWS}) == len(ROWS) == 26
    assert {r['stage'] for r in ROWS} <= {'data', 'prompt', 'generate', 'extract', 'score', 'table', 'training'}
    assert all(r['what happens'] and r['default'] for r in ROWS)
    assert all(r['test'] for r in ROWS)


@pytest.mark.parametrize('row', [r for r in ROWS if '=' in r['default']], ids=lambda r: r['id'])
def test_defaults_are_those_the_table_tells(row):
    name, _, told = row['default'].partition('=')
    called = re.match(r'(\w+)\(', row['switch'])
    holder = FUNCTIONS[called.group(1)] if called else MmwalkSettings
    parameter = inspect.signature(holder).parameters[name]
    assert str(parameter.default) == told
    assert re.search(rf'\b{name}=', row['switch']), f'{row["id"]}: the switch does not set {name}'
