"""Two runs are walked stage by stage, and the first stage at which they part is named."""
import json
from dataclasses import replace
from pathlib import Path

import pytest

from vlm_repro.report.compare import WALK, compare, differences, markdown
from vlm_repro.report.example import example_run


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp('compare') / 'runs' / 'example'
    return root, example_run(root / 'first')


def change(folder, stage, edit):
    path = folder / f'{stage}.jsonl'
    rows = [edit(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))


def test_equal_runs_part_nowhere(runs):
    root, a = runs
    found = compare(a, example_run(root / 'same'))
    assert found.first is None and [s.stage for s in found.stages] == list(WALK)
    assert all(s.n_differ == 0 for s in found.stages) and found.shared == 12
    assert 'equal at every stage' in str(found)


CASES = {
    'data': ('samples', lambda r: {**r, 'gold': r['gold'] + '!'}),
    'prompt': ('samples', lambda r: {**r, 'request': {**r['request'], 'messages': [*r['request']['messages'][:-1], {'role': 'user', 'content': [{'type': 'text', 'text': 'other'}]}]}}),
    'pixels': ('predictions', lambda r: {**r, 'pixel_hash': 'f' * 16}),
    'generate': ('predictions', lambda r: {**r, 'text': r['text'] + ' x'}),
    'extract': ('answers', lambda r: {**r, 'value': 'x', 'extractor': 'other@2'}),
    'score': ('scores', lambda r: {**r, 'values': [1.0]}),
}


@pytest.mark.parametrize('stage', CASES)
def test_each_stage_is_named_first_when_it_is_the_first(runs, stage):
    root, a = runs
    b = example_run(root / f'other-{stage}')
    change(b, *CASES[stage])
    found = compare(a, b)
    assert found.first == stage and found.parted == {stage: 12}
    at = next(s for s in found.stages if s.stage == stage)
    assert at.n_differ == 12 and len(at.examples) == 5
    assert f'part first at {stage}: 12 of 12' in str(found)


def test_template_and_wording_are_told_apart(runs):
    root, a = runs
    b = example_run(root / 'template', edit=lambda g: replace(g, prompt_hash='0' * 16))
    assert compare(a, b).stages[2].kinds == {'rendered prompt differs, messages equal': 12}


def test_the_table_alone_can_differ(runs):
    root, a = runs
    b = example_run(root / 'table')
    (b / 'table.csv').write_text((b / 'table.csv').read_text().replace('cannot be judged', 'close'))
    found = compare(a, b)
    assert found.first == 'table' and found.stages[-1].kinds == {'status differs': 6}


def test_other_data_roots_are_no_difference(tmp_path):
    a, b = (example_run(tmp_path / name / 'runs' / 'first') for name in ('one', 'two'))
    assert compare(a, b).first is None


def test_unrecorded_pixels_are_unknown_not_equal(runs):
    root, a = runs
    b = example_run(root / 'server', edit=lambda g: replace(g, pixel_hash='', token_ids=()))
    found = compare(a, b)
    pixels = found.stages[1]
    assert (pixels.n_differ, pixels.unknown) == (0, 12) and found.first is None and 'not recorded: 12' in str(found)


def test_a_failure_in_one_run_is_named_with_its_label(runs):
    root, a = runs
    b = example_run(root / 'mended', edit=lambda g: replace(g, text='yes', error=None, finish_reason='stop') if g.error else g)
    found = compare(a, b)
    assert found.stages[3].kinds == {'failed in A (timeout)': 1} and found.first == 'generate'


def test_runs_that_share_a_subset(runs):
    root, a = runs
    found = compare(a, example_run(root / 'short', n_frames=2, edit=lambda g: replace(g, text='no')))
    assert (found.first, found.first_shared, found.shared) == ('data', 'generate', 6)
    assert (len(found.only_a), len(found.only_b)) == (6, 0)
    assert 'The 6 they share part first at generate' in str(found)


def test_runs_that_share_nothing(runs):
    root, a = runs
    b = example_run(root / 'strangers')
    for stage in ('samples', 'predictions', 'answers', 'scores'): change(b, stage, lambda r: {**r, 'id': 'x' + r['id']})
    found = compare(a, b)
    assert found.shared == 0 and found.first == 'data' and 'share no sample' in str(found)


def test_the_change_of_the_mean_is_split_by_stage(runs):
    root, a = runs
    b = example_run(root / 'moved', edit=lambda g: replace(g, text='wrong') if g.text == 'yes' else g)
    found = compare(a, b)
    assert set(found.moved['judge, corrected']) == {'generate'}
    paired = found.paired['judge, corrected']
    assert found.moved['judge, corrected']['generate'] == pytest.approx(paired.diff) and paired.diff < 0 and paired.n == 11


def test_clusters_are_those_of_the_table(runs):
    root, a = runs
    found = compare(a, example_run(root / 'clustered'))
    assert found.paired['judge, as published'].n_clusters == 4


def test_settings_and_software_that_differ(runs):
    root, a = runs
    b = example_run(root / 'settings', settings={'temperature': 1})
    manifest = json.loads((b / 'manifest.json').read_text())
    manifest['software']['packages']['transformers'] = '4.0'
    (b / 'manifest.json').write_text(json.dumps(manifest))
    found = compare(a, b)
    assert found.settings == {'temperature': (None, 1)}
    assert [k for k in found.environment if not k.startswith('git.')] == ['software.packages.transformers']
    assert found.environment['software.packages.transformers'][1] == '4.0'


@pytest.mark.parametrize('lost', ['first', 'second', 'both'])
def test_a_run_without_a_manifest_is_named_and_differs_in_nothing_it_does_not_know(tmp_path, lost):
    a, b = (example_run(tmp_path/'runs'/name) for name in ('first', 'second'))
    for folder in (a, b):
        if lost in ('both', folder.name): (folder/'manifest.json').unlink()
    found = compare(a, b)
    assert found.environment == {} and [Path(name).name for name in found.incomplete] == (['first', 'second'] if lost == 'both' else [lost])
    for text in (str(found), markdown(found)): assert 'null' not in text and 'Not complete' in text and 'are not compared' in text
    json.dumps(found.to_dict())


def test_differences_of_nested_mappings():
    assert differences({'a': {'b': 1, 'c': 2}}, {'a': {'b': 1, 'c': 3}, 'd': 4}) == {'a.c': (2, 3), 'd': (None, 4)}


def test_it_can_be_shown_and_stored(runs):
    root, a = runs
    found = compare(a, example_run(root / 'shown', edit=lambda g: replace(g, text='a|b<c')))
    stored = json.loads(json.dumps(found.to_dict()))
    assert stored['first'] == 'generate' and stored['stages'][3]['stage'] == 'generate'
    assert '| generate | 12 | 12 |' in markdown(found)
