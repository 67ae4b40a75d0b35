"""The verdict rule, case by case: every status, every obstacle, every boundary."""
from dataclasses import replace

import pytest

from vlm_repro.report.published import (
    STATUSES,
    Cell,
    Cells,
    Eligibility,
    Published,
    load_published,
    read_published,
    short_name,
    verdict,
    verdicts,
    write_published,
)

CELL = Cell('categories', 'Qwen2-VL-7B-Instruct / normal / 0s', 'E2', 'openai:gpt-4o-mini', 'as_published', 60., '0-100', 58., 62., 814, 0, 12, 'trajectory')
ROW = Published('categories', CELL.row, 'E2', 60., '0-100', 1, 814, 'v2 test', 'Qwen2-VL-7B-Instruct', 'gpt-4o-mini', 'Table 2')
RUN = Eligibility('paper', 'v2 test', 'Qwen/Qwen2-VL-7B-Instruct', 'openai:gpt-4o-mini', 'verbatim', 'verbatim')

# p = 60.0 printed with one decimal, so r = .05; m = 1; the bounds of I are given
NUMBERS = [
    ('equal', 60., 58., 62., 'reproduced'),
    ('at m + r above', 61.05, 61., 61.1, 'reproduced'),
    ('at m + r below', 58.95, 58.9, 59., 'reproduced'),
    ('beyond m + r, I meets p + r', 61.06, 60.05, 62.1, 'close'),
    ('beyond m + r, I just misses p + r', 61.06, 60.06, 62.1, 'not reproduced'),
    ('beyond m + r, I meets p - r from below', 58., 56.05, 59.95, 'close'),
    ('beyond m + r, I just misses p - r', 58., 56.06, 59.94, 'not reproduced'),
    ('a wide I that meets p is still close', 70., 50., 90., 'close'),
    ('outside I, half as wide as 3m', 70., 67., 73., 'not reproduced'),
    ('outside I, wider than 3m', 70., 66.9, 73.1, 'cannot be judged'),
    ('within the margin, however wide I', 60.5, 40., 80., 'reproduced'),
    ('within the margin, no I', 60.5, None, None, 'reproduced'),
    ('beyond the margin, no I', 62., None, None, 'cannot be judged'),
]


@pytest.mark.parametrize(('value', 'lo', 'hi', 'status'), [case[1:] for case in NUMBERS], ids=[case[0] for case in NUMBERS])
def test_the_numbers_decide(value, lo, hi, status):
    made = verdict(replace(CELL, value=value, lo=lo, hi=hi), ROW, RUN)
    assert made.status == status
    assert f'{value:.2f}' in made.reason and '60.0' in made.reason


OBSTACLES = [
    ('the whole split', {'n': 813}, {}, {}, '813 samples of 814'),
    ('no failures', {'n': 814, 'n_failed': 1}, {}, {}, '1 of 814 samples failed'),
    ('the named split', {}, {}, {'split': 'v1 test'}, 'split is v1 test'),
    ('a part of the split by name', {}, {}, {'split': 'v2 test, 90 of 6901 questions'}, '90 of 6901'),
    ("the row's model", {}, {}, {'model': 'Qwen/Qwen2.5-VL-7B-Instruct'}, 'model is Qwen/Qwen2.5-VL-7B-Instruct'),
    ("the row's model, not what a server calls so", {}, {}, {'model': 'openai:Qwen2-VL-7B-Instruct@http://127.0.0.1:8000/v1'}, 'the model is'),
    ("the row's judge", {}, {}, {'judge': 'lexical'}, 'judge is lexical'),
    ('verbatim prompts', {}, {}, {'prompts': 'paraphrase'}, 'prompts are paraphrase'),
    ("a verbatim judge's prompt", {}, {}, {'judge_prompt': 'paraphrase'}, "judge's prompt is paraphrase"),
    ('the same unit', {'unit': '1-5'}, {}, {}, 'unit is 1-5'),
]


@pytest.mark.parametrize(('cell', 'row', 'run', 'why'), [case[1:] for case in OBSTACLES], ids=[case[0] for case in OBSTACLES])
def test_each_obstacle_alone_forbids_a_judgement(cell, row, run, why):
    made = verdict(replace(CELL, **cell), replace(ROW, **row), replace(RUN, **run))
    assert made.status == 'cannot be judged' and why in made.reason


def test_all_obstacles_are_named():
    made = verdict(replace(CELL, n=90), ROW, replace(RUN, model='tiny', judge='lexical', prompts='ours'))
    assert all(part in made.reason for part in ('90 samples of 814', 'model is tiny', 'judge is lexical', 'prompts are ours'))


def test_a_row_without_judge_or_n_asks_for_neither():
    row, run = replace(ROW, judge='', n=None), replace(RUN, judge='', judge_prompt='')
    assert verdict(replace(CELL, n=3), row, run).status == 'reproduced'


# what is checked first, when several things hold at once
ORDER = [
    ('no cell, no published cell', None, None, {}, 'not run'),
    ('no cell, in a world', None, ROW, {'data': 'world'}, 'not run'),
    ('nothing scored', replace(CELL, value=None, lo=None, hi=None, n=0, n_failed=814), ROW, {}, 'not run'),
    ('a world, an equal number', CELL, ROW, {'data': 'world'}, 'cannot be judged'),
    ('a world, no published value', CELL, replace(ROW, value=None), {'data': 'world'}, 'cannot be judged'),
    ('a world, no published cell', CELL, None, {'data': 'world'}, 'cannot be judged'),
    ('stand-in frames', CELL, ROW, {'data': 'stand-in'}, 'cannot be judged'),
    ('no published cell', CELL, None, {}, 'no published value'),
    ('no published value and another judge', CELL, replace(ROW, value=None), {'judge': 'lexical'}, 'no published value'),
    ('an obstacle and an equal number', CELL, ROW, {'prompts': 'ours'}, 'cannot be judged'),
]


@pytest.mark.parametrize(('cell', 'row', 'run', 'status'), [case[1:] for case in ORDER], ids=[case[0] for case in ORDER])
def test_the_checks_come_in_order(cell, row, run, status):
    assert verdict(cell, row, replace(RUN, **run)).status == status


def test_the_tables_reach_every_status():
    assert {case[-1] for case in NUMBERS} | {case[-1] for case in ORDER} == set(STATUSES)


@pytest.mark.parametrize(('decimals', 'value', 'status'), [(2, 61.005, 'reproduced'), (2, 61.006, 'not reproduced'), (0, 61.5, 'reproduced'), (0, 61.51, 'not reproduced')])
def test_rounding_of_the_published_value_counts(decimals, value, status):
    assert verdict(replace(CELL, value=value, lo=value - .1, hi=value + .1), replace(ROW, decimals=decimals), RUN).status == status


def test_the_margin_is_the_callers():
    cell = replace(CELL, value=62., lo=61.9, hi=62.1)
    assert [verdict(cell, ROW, RUN, margin=m).status for m in (1., 2.)] == ['not reproduced', 'reproduced']


@pytest.mark.parametrize('spec', ['openai:gpt-4o-mini', 'gpt-4o-mini', 'GPT-4o-mini'])
def test_names_are_compared_whole(spec):
    assert short_name(spec) == 'gpt-4o-mini' != short_name('openai:gpt-4o')


def test_a_whole_table_pairs_counts_and_refuses_doubles():
    other = replace(ROW, column='E1', n=868)
    made = verdicts([CELL, replace(CELL, column='macro')], [ROW, other], RUN)
    assert made.counts == {'reproduced': 1, 'no published value': 1, 'not run': 1}
    assert made._repr_markdown_().count('\n| Qwen') == 2
    with pytest.raises(ValueError, match='more than one cell'): verdicts([CELL, replace(CELL, variant='corrected')], [ROW], RUN)


def test_the_packaged_table_is_whole_and_empty():
    table = load_published('mmwalk')
    assert all(p.value is None and p.model and p.judge == 'gpt-4o-mini' and p.n for p in table)
    assert len({p.key for p in table}) == len(table)
    rows = {p.row for p in table}
    assert {p.column for p in table if p.table == 'categories'} == {'E1', 'E2', 'E3', 'E4', 'M1', 'M2', 'M3', 'H1', 'H2', 'overall'}
    assert len({p.column for p in table if p.table == 'scenarios'}) == 7 and len(table) == 17 * len(rows)
    by_column = {p.column: p.n for p in table if p.row == min(rows)}
    assert sum(n for c, n in by_column.items() if c[1:].isdigit()) == by_column['overall'] == sum(p.n for p in table if p.row == min(rows) and p.table == 'scenarios')


def test_a_reader_fills_in_and_adds_cells(tmp_path):
    first = load_published('mmwalk')[0]
    mine = tmp_path/'mine.csv'
    mine.write_bytes(f'\ufefftable,row,column,value,decimals,source\r\ncategories,{first.row},E1,61.2,1,Table 2\r\nextra,mine,E1,50,,\r\n'.encode())
    table = {p.key: p for p in load_published('mmwalk', mine)}
    filled, added = table[first.key], table['extra', 'mine', 'E1']
    assert (filled.value, filled.decimals, filled.source, filled.n, filled.judge) == (61.2, 1, 'Table 2', first.n, first.judge)
    assert (added.value, added.n, added.source) == (50, None, f'{mine}, line 3')


@pytest.mark.parametrize(('text', 'why'), [
    ('table,row,column,value\na,b,c,high\n', 'line 2.*high'), ('table,row,column,value\na,,c,1\n', 'line 2: row is empty'), ('table,row,colour\na,b,c\n', 'unknown column colour')])
def test_a_broken_table_names_the_line(tmp_path, text, why):
    (tmp_path/'t.csv').write_text(text)
    with pytest.raises(ValueError, match=why): read_published(tmp_path/'t.csv')


def test_a_table_survives_being_written(tmp_path):
    table = load_published('mmwalk')
    assert read_published(write_published(table, tmp_path/'t.csv')) == table
    with pytest.raises(ValueError, match="no published table for 'nothing'"): load_published('nothing')


def test_cells_show_failures_and_escape_bars():
    shown = Cells([replace(CELL, n=812, n_failed=2, row='a|b'), replace(CELL, column='H1', row='a|b', lo=None, hi=None)])._repr_markdown_()
    assert '| E2 | 60.00 [58.00, 62.00] | 812 | 2 | 12 |' in shown and '60.00 (no interval)' in shown
    assert Cells()._repr_markdown_() == 'No cells.'
