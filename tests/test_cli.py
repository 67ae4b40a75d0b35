"""The command line as a shell would call it: what it prints, where, and with which exit code."""
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from vlm_repro.cli import main
from vlm_repro.cli_run import check_names, join_pairs, paper_parameters, parse_pairs, parse_value, run_folder
from vlm_repro.core import assets
from vlm_repro.report.example import example_run


@pytest.fixture
def folder(tmp_path):
    return example_run(tmp_path / 'runs' / 'example' / 'first')


def call(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def wrong(capsys, *args):
    code, out, err = call(capsys, *args)
    assert code == 2 and 'Traceback' not in err and len(err.strip().splitlines()) == 1, err
    return err


# reading the command line


def test_pairs_are_joined_for_the_parser():
    assert join_pairs(['run', 'p', '-p', 'a', '1', '-p', 'b=2', '--parameter', 'c', '-3', '--out', 'x']) == ['run', 'p', '-p', 'a=1', '-p', 'b=2', '--parameter', 'c=-3', '--out', 'x']
    assert join_pairs(['-p', 'a']) == ['-p', 'a']


@pytest.mark.parametrize('text, value', [('3', 3), ('-1', -1), ('0.5', 0.5), ('1e-4', 1e-4), ('True', True), ('None', None), ('dog+', 'dog+'), ('0s', '0s'), ('', ''), ('E1,H1', 'E1,H1'),
                                         ('["E1"]', ['E1']), ('{"a": 1}', {'a': 1}), ('[odd', '[odd'), ('no', 'no')])
def test_values_are_typed_as_papermill_types_them(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_papermill_agrees_on_plain_values():
    from papermill.cli import _resolve_type
    for text in ('3', '-1', '0.5', '1e-4', 'True', 'False', 'None', 'dog+', '0s', 'no', 'E1,H1', '1_000'): assert parse_value(text) == _resolve_type(text), text


def test_a_name_without_a_value_is_refused():
    with pytest.raises(ValueError, match='write -p NAME VALUE'): parse_pairs(['shots'])


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ValueError, match="no parameter 'shot', did you mean 'shots'.* valid: model, shots"): check_names('mmwalk', ['model', 'shots'], ['shot'])


# help and start-up


def test_help_is_quick_and_imports_nothing_heavy():
    code = ('import sys; from vlm_repro.cli import main; main(["--help"]); heavy = {"torch", "transformers", "pandas", "matplotlib", "numpy", "papermill", "PIL"} & set(sys.modules); '
            'assert not heavy, heavy')
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, '-c', code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_every_command_explains_itself(capsys):
    code, out, _ = call(capsys, '--help')
    assert code == 0
    for name in ('run', 'ask', 'data', 'score', 'compare', 'doctor', 'show', 'table', 'browse', 'papers'):
        assert f'\n  {name} ' in out
        code, text, _ = call(capsys, name, '--help')
        assert code == 0 and len(text) > 100
    assert '...' not in out.split('Commands:')[1]
    for name in ('check', 'plan', 'get', 'frames'): assert 'mmwalk' in call(capsys, 'data', name, '--help')[1]


def test_version(capsys):
    import vlm_repro
    assert call(capsys, '--version')[1].strip() == f'vlm-repro {vlm_repro.__version__}'


def test_unknown_command_and_missing_arguments(capsys):
    assert call(capsys, 'runn')[0] == 2 and call(capsys, 'show', 'x')[0] == 2


# looking at a run


def test_show(capsys, folder):
    code, out, err = call(capsys, 'show', folder, 'count-812')
    assert (code, err) == (0, '') and 'gold: 2' in out and 'judge, corrected: 2' in out
    row = json.loads(call(capsys, 'show', folder, 'count-812', '--json')[1])
    assert row['sample']['gold'] == '2' and len(row['scores']) == 2


def test_show_wrong_ids(capsys, folder):
    assert 'close ones: count-81209ffd' in wrong(capsys, 'show', folder, 'count-91209ffd')
    assert '4 ids begin with' in wrong(capsys, 'show', folder, 'count')
    assert 'no settings.json' in wrong(capsys, 'show', folder.parent, 'x')


def test_traceback_on_request(folder):
    with pytest.raises(ValueError): main(['--traceback', 'show', str(folder), 'nothing'])


def test_table(capsys, folder):
    code, out, _ = call(capsys, 'table', folder)
    assert code == 0 and out.startswith('WATERMARK') and 'cannot be judged' in out
    assert 'no unit' in wrong(capsys, 'table', folder, '--unit', 'inches')
    (folder / 'table.csv').unlink()
    assert 'score the run first' in wrong(capsys, 'table', folder)


def test_compare(capsys, folder):
    code, out, _ = call(capsys, 'compare', folder, folder)
    assert code == 0 and 'equal at every stage' in out
    assert json.loads(call(capsys, 'compare', folder, folder, '--json')[1])['first'] is None
    assert 'no settings.json' in wrong(capsys, 'compare', folder, folder.parent)


def test_browse(capsys, folder):
    code, out, _ = call(capsys, 'browse', folder)
    assert code == 0 and Path(out.strip()).read_text().startswith('<!DOCTYPE html>')
    assert 'it has colour, count, exist' in wrong(capsys, 'browse', folder, '--category', 'E1')


def test_broken_line_is_named_with_its_number(capsys, folder):
    lines = (folder / 'predictions.jsonl').read_text().splitlines()
    (folder / 'predictions.jsonl').write_text('\n'.join([lines[0], '{broken', *lines[2:]]) + '\n')
    assert 'predictions.jsonl, line 2' in wrong(capsys, 'browse', folder)


def test_doctor(capsys):
    code, out, _ = call(capsys, 'doctor')
    assert code in (0, 1) and 'in order' in out and 'OPENAI_API_KEY' in out
    code, out, _ = call(capsys, 'doctor', '--server', 'http://127.0.0.1:9/v1', '--all')
    assert code == 1 and 'no answer' in out and 'numpy' in out


# a paper's notebook, executed by papermill

CELLS = [('parameters', "model = 'tiny'  # which model\nlimit: int = 2  # questions a category\nshots = 0\nout = ''  # the run's folder"),
         ('', 'from vlm_repro.report.example import example_run\nif shots == 7: raise RuntimeError("seven is too many")\nexample_run(out, n_frames=limit)')]


@pytest.fixture
def papers(tmp_path, monkeypatch):
    cells = [nbformat.v4.new_code_cell(source, metadata={'tags': [tag] if tag else []}) for tag, source in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3', 'language': 'python'}})
    (tmp_path / 'papers').mkdir()
    nbformat.write(notebook, tmp_path / 'papers' / 'mmwalk.ipynb')
    monkeypatch.setattr(assets, 'papers_root', lambda: tmp_path / 'papers')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_parameters_come_from_the_notebook(papers):
    found = paper_parameters('mmwalk')
    assert {k: p.default for k, p in found.items()} == {'model': 'tiny', 'limit': 2, 'shots': 0, 'out': ''}
    assert found['limit'].help == 'questions a category'


def test_run_executes_continues_and_reports(capsys, papers):
    code, out, err = call(capsys, 'run', 'mmwalk', '--limit', '3', '--verbose', '-q')
    assert code == 0, err
    asked = [json.loads(line) for line in next(Path('runs').rglob('samples.jsonl')).read_text(encoding='utf-8').splitlines()]
    assert all(f"{row['id']} | {row['question'].split()[0]}" in out for row in asked) and out.count(' | ') == 3*len(asked)
    made = Path(next(line for line in out.splitlines() if line.startswith('run ')).split()[1])
    assert made.parts[:2] == ('runs', 'mmwalk') and (made / 'notebook.ipynb').exists() and (made / 'report.html').exists()
    assert 'category: judge of example' in out
    assert len((made / 'samples.jsonl').read_text().splitlines()) == 9


def test_the_folder_is_named_after_the_settings(papers):
    base = {'model': 'tiny', 'limit': 2, 'shots': 0, 'out': '', 'batch_size': 4}
    assert run_folder('mmwalk', base) == run_folder('mmwalk', {**base, 'batch_size': 8, 'out': 'x'}) != run_folder('mmwalk', {**base, 'shots': 1})


def test_run_refuses_before_anything_is_loaded(capsys, papers):
    assert "did you mean 'shots'" in wrong(capsys, 'run', 'mmwalk', '-p', 'shot', '3')
    assert 'limit=-1 is not possible' in wrong(capsys, 'run', 'mmwalk', '-p', 'limit', '-1')
    assert 'there are: mmwalk' in wrong(capsys, 'run', 'nopaper')
    assert not (papers / 'runs').exists()


def test_a_failing_cell_is_one_clear_error(capsys, papers):
    code, out, err = call(capsys, 'run', 'mmwalk', '-p', 'shots', '7', '--out', 'here', '-q')
    assert code == 1 and 'RuntimeError: seven is too many' in err and 'here/notebook.ipynb' in err and 'Traceback' not in err


def test_papers_lists_parameters(capsys, papers):
    assert call(capsys, 'papers')[1].split() == ['mmwalk']
    assert 'questions a category' in call(capsys, 'papers', 'mmwalk')[1]


def test_a_real_run_is_scored_again_compared_and_shown(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ['-p', 'limit', '1', '-p', 'categories', 'E1,H1', '-p', 'shots', '1']
    code, out, err = call(capsys, 'run', 'mmwalk', *given, '-q')
    assert code == 0, err
    made = Path(next(line for line in out.splitlines() if line.startswith('run ')).split()[1])
    assert out.startswith('WATERMARK') and 'corrected' in out and 'as published' in out and 'cannot be judged' in out
    before = {name: (made / name).read_bytes() for name in ('predictions.jsonl', 'scores.jsonl', 'table.csv')}
    code, out, err = call(capsys, 'score', made)
    assert code == 0, err
    assert (made / 'manifest.json').exists() and before == {name: (made / name).read_bytes() for name in before}
    assert 'would change the answers' in wrong(capsys, 'score', made, '-p', 'shots', '0')
    assert 'equal at every stage' in call(capsys, 'compare', made, made)[1]
    assert 'lexical@1, corrected' in call(capsys, 'show', made, 'E1')[1]


# predictions of others


def test_v1_predictions_are_not_scored_on_v2_gold(capsys, tmp_path):
    from mmwalk_files import real_root
    for path, more in ((real_root()/'eval_dummy_NoInput_0s', ()), (real_root()/'eval_dummy_NoInput_0s'/'M2.jsonl', ('--root', real_root()))):
        said = wrong(capsys, 'score', path, *more, '--out', tmp_path/'run')
        assert 'predictions of release v1 do not go with gold answers of release v2: v1 splits by question' in said and not (tmp_path/'run').exists()


def test_predictions_of_others_are_scored_as_a_run(capsys, tmp_path, world):
    from vlm_repro.mmwalk.data import load
    from vlm_repro.mmwalk.predictions import write_predictions
    samples = [s for s in load(world).samples if s.meta['category'] in ('E1', 'H1')]
    theirs = tmp_path/'eval_Theirs-7B_dog+_0s'
    write_predictions(theirs, samples, {s.id: s.gold if s.meta['category'] == 'E1' else '' for s in samples})
    code, out, err = call(capsys, 'score', theirs, '--root', world, '--out', tmp_path/'run')
    assert code == 0 and 'Theirs-7B / dog+ / 0s' in out and out.startswith('judge') and 'WATERMARK' in out, err
    manifest = json.loads((tmp_path/'run'/'manifest.json').read_text())
    assert manifest['settings']['views'] == 'dog+' and manifest['settings']['categories'] == 'E1,H1' and sorted(manifest['model']['files']) == ['E1.jsonl', 'H1.jsonl']
    scores = {(row['id'], row['variant']): row['values'] for row in map(json.loads, (tmp_path/'run'/'scores.jsonl').read_text().splitlines())}
    assert {tuple(v) for (i, _), v in scores.items() if i.startswith('E1')} == {(5.,)} and {tuple(v) for (i, _), v in scores.items() if i.startswith('H1')} == {(1.,)}
    first = (tmp_path/'run'/'predictions.jsonl').read_bytes()
    assert call(capsys, 'score', theirs, '--root', world, '--out', tmp_path/'run')[0] == 0 and (tmp_path/'run'/'predictions.jsonl').read_bytes() == first
    # other answers do not slip into the same run
    write_predictions(theirs, samples, {s.id: 'Sunny.' for s in samples})
    code, _, err = call(capsys, 'score', theirs, '--root', world, '--out', tmp_path/'run')
    assert code == 2 and 'were made with another model' in err


def test_predictions_that_cannot_be_scored_say_why(capsys, tmp_path, world):
    from vlm_repro.mmwalk.data import load
    from vlm_repro.mmwalk.predictions import write_predictions
    samples = [s for s in load(world).samples if s.meta['category'] == 'E2']
    for name, why in (('eval_dummy_NoInput_0s', "'NoInput' is none of the input settings normal, single, dog+, drone+"), ('answers', '-p model … -p shots … -p views …')):
        write_predictions(tmp_path/name, samples, {s.id: s.gold for s in samples})
        assert why in wrong(capsys, 'score', tmp_path/name, '--root', world)
    assert 'cannot be said of answers that are there already' in wrong(capsys, 'score', tmp_path/'answers', '--root', world, '-p', 'limit', '3')
    assert 'holds no prediction file' in wrong(capsys, 'score', tmp_path, '--root', world)
    assert 'no such run, and no such prediction files' in wrong(capsys, 'score', tmp_path/'nothing')
    assert 'none of the test files' in wrong(capsys, 'score', tmp_path/'answers')
    assert 'reaches no model' in wrong(capsys, 'score', tmp_path/'answers', '--root', world, '-p', 'model', 'm', '-p', 'shots', '0', '-p', 'views', 'normal', '--server', 'timeout=3')
    (tmp_path/'answers'/'E2.jsonl').write_bytes(b''.join((tmp_path/'answers'/'E2.jsonl').read_bytes().splitlines(True)[1:]))
    assert '1 gold questions without prediction' in wrong(capsys, 'score', tmp_path/'answers', '--root', world, '-p', 'model', 'm', '-p', 'shots', '0', '-p', 'views', 'normal')


@pytest.mark.parametrize(('given', 'why'), [
    (('data_root', 'no/such/folder'), "data_root='no/such/folder' is no folder"), (('model', './no-such-model'), 'no checkpoint folder'), (('dtype', 'float8'), 'valid: auto, float32'),
    (('strict', 'maybe'), 'give True or False'), (('judge_prompt', 'mine.txt'), 'is for a model that judges'), (('batch_size', '0'), 'give 1 or more'),
    (('published', 'absent.csv'), 'absent.csv')])
def test_what_cannot_be_run_is_said_before_a_folder_is_made(capsys, tmp_path, monkeypatch, given, why):
    monkeypatch.chdir(tmp_path)
    assert why in wrong(capsys, 'run', 'mmwalk', '-p', *given, '--out', 'made') and not Path('made').exists()


@pytest.mark.slow
def test_how_a_server_is_asked_reaches_the_model_and_the_judge_of_a_page(capsys, tmp_path, monkeypatch, bodies):
    from fault_proxy import chat_server, fault_proxy
    monkeypatch.chdir(tmp_path)
    with chat_server(lambda body: '4', bodies) as chat, fault_proxy(chat, lambda n, body: '500' if n < 2 else None) as (url, proxy):
        given = ['-p', 'limit', '1', '-p', 'categories', 'E1,H1', '-p', 'model', f'openai:m@{url}', '-p', 'judge', f'openai:j@{url}']
        code, out, err = call(capsys, 'run', 'mmwalk', *given, '-p', 'server', 'concurrency=1,retries=2,token_field=max_completion_tokens', '-q', '--out', 'made')
    assert code == 0, err
    assert proxy.most_open == 1 and {b['model'] for b in bodies} == {'m', 'j'} and all('max_completion_tokens' in b for b in bodies)
    manifest = json.loads(Path('made/manifest.json').read_text())
    assert manifest['model']['answered_by'] == ['m-2026-01-01'] and manifest['judge']['model']['answered_by'] == ['j-2026-01-01']
    assert manifest['runtime']['server'].startswith('concurrency=1') and 'server' not in manifest['settings'] and not manifest['errors']


def test_how_a_server_is_asked_is_checked_before_anything_is_written(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ('run', 'mmwalk', '--out', 'made', '-p', 'server')
    assert 'it takes concurrency, timeout, retries, token_field' in wrong(capsys, *given, 'threads=3')
    assert 'reaches no model' in wrong(capsys, *given, 'timeout=3') and not Path('made').exists()


# data


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    from vlm_repro.mmwalk.world import Size, build_world
    return build_world(tmp_path_factory.mktemp('data') / 'world', size=Size(test_frames=1, train_frames=2, val_frames=1, train_trajectories=1))


def test_data_check(capsys, world, tmp_path):
    code, out, _ = call(capsys, 'data', 'check', 'mmwalk', '--root', world)
    assert code == 0 and out.startswith('WATERMARK') and 'passed' in out
    assert 'no such folder' in wrong(capsys, 'data', 'check', 'mmwalk', '--root', tmp_path / 'nothing')
    assert 'there are ' in (said := wrong(capsys, 'data', 'check', 'other', '--root', world)) and 'mmwalk' in said
    code, out, _ = call(capsys, 'data', 'check', 'mmwalk', '--root', tmp_path)
    assert code == 1 and 'NOT PASSED' in out


def test_data_plan(capsys, tmp_path):
    code, out, _ = call(capsys, 'data', 'plan', 'mmwalk', '--root', tmp_path)
    assert code == 0 and 'QAFrames.zip' in out and 'missing' in out


def test_data_frames_draws_what_a_run_needs(capsys, world, tmp_path):
    root = shutil.copytree(world, tmp_path / 'annotations', ignore=shutil.ignore_patterns('QAFrames'))
    code, out, err = call(capsys, 'data', 'frames', 'mmwalk', '--root', root, '-p', 'limit', '1', '-p', 'shots', '1')
    assert code == 0, err
    drawn = list((root / 'QAFrames').rglob('*.png'))
    assert len(drawn) % 4 == 0 and 4 <= len(drawn) <= 4 * 18 and f'{len(drawn)} stand-in images drawn' in out
    assert '0 stand-in images drawn' in call(capsys, 'data', 'frames', 'mmwalk', '--root', root, '-p', 'limit', '1', '-p', 'shots', '1')[1]
    assert 'has no parameter' in wrong(capsys, 'data', 'frames', 'mmwalk', '--root', root, '-p', 'shot', '1')


# asking a model


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch = pytest.importorskip('torch')
    torch.set_num_threads(1)
    from vlm_repro.models.families import random_checkpoint
    return random_checkpoint('qwen2_vl', tmp_path_factory.mktemp('model') / 'random')


def image_of(world):
    return next((world / 'QAFrames').rglob('walker/rgb/*.png'))


def test_ask(capsys, checkpoint, world):
    code, out, err = call(capsys, 'ask', checkpoint, image_of(world), 'Is there a bench?', '--max-new-tokens', '4', '--json')
    assert code == 0, err
    row = json.loads(out)
    assert row['error'] is None and row['n_new'] <= 4 and row['n_visual'] > 0 and len(row['pixel_hash']) == 16


def test_ask_wrong_words(capsys, world, tmp_path):
    assert 'at least one image' in wrong(capsys, 'ask', 'tiny', 'Is there a bench?')
    assert 'must be the question' in wrong(capsys, 'ask', 'tiny', image_of(world), image_of(world))
    assert 'no such file' in wrong(capsys, 'ask', 'tiny', tmp_path / 'no.png', 'What?')


def test_installed_as_a_program():
    if shutil.which('vlm-repro') is None: pytest.skip('the package is not installed here: pip install -e .')
    done = subprocess.run(['vlm-repro', 'papers'], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0


@pytest.mark.parametrize('paper', ['mmwalk', 'roadbuddy'])
def test_the_parameters_of_a_page_are_found(paper):
    found = paper_parameters(paper)
    assert {'model', 'data_root', 'out', 'seed', 'limit', 'batch_size', 'nproc', 'server'} <= found.keys() and all(p.help for p in found.values())


def test_the_module_runs_where_the_program_is_not_on_the_path(folder, capsys):
    here = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, '-m', 'vlm_repro.cli', 'show', str(folder), 'count-812'], capture_output=True, text=True, cwd=here)
    assert done.returncode == 0 and done.stdout == call(capsys, 'show', folder, 'count-812')[1]
    done = subprocess.run([sys.executable, '-m', 'vlm_repro.cli', 'show', str(folder/'no'), 'x'], capture_output=True, text=True, cwd=here)
    assert done.returncode == 2 and done.stderr.startswith('error: ')
