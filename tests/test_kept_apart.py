"""What must not be mixed, lost or written: answers of other weights, replies that were paid for, settings that cannot work, secrets."""
import hashlib
import json
import shutil
import zipfile
from datetime import datetime

import pytest
import torch
from fault_proxy import chat_server, fault_proxy
from safetensors.torch import load_file, save_file

from vlm_repro.cli import main
from vlm_repro.core.generate import GenerateError, generate
from vlm_repro.core.pins import check_shards
from vlm_repro.core.runs import RunError, open_run
from vlm_repro.core.tasks import extract_run, finish_run, get_task, make_settings, prepare, rescore, score_run, start, table_run
from vlm_repro.metrics.judge import JudgeError
from vlm_repro.mmwalk.predictions import folder_name
from vlm_repro.mmwalk.world import Size, build_world
from vlm_repro.models.protocol import load_model, tiny_checkpoint

torch.set_num_threads(1)
TASK = get_task('mmwalk')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp('world')/'w', 5, Size(test_frames=2, train_frames=2, val_frames=1, train_trajectories=1))


def go(root, out, **params):
    settings = make_settings(TASK, {'data_root': str(root), 'categories': 'E1', 'limit': 3, **params})
    run = start(TASK, settings, out)
    try:
        requests = prepare(TASK, settings, TASK.load(settings), run)
        model = load_model(settings.model)
        report = generate(model, requests, run, 4, 12, progress=False)
        extract_run(TASK, settings, run)
        score_run(TASK, settings, run)
        table_run(TASK, settings, run)
        finish_run(TASK, settings, run, model.describe())
    finally: run.close()
    return run, report


def test_other_weights_in_the_same_folder_are_refused(world, tmp_path):
    folder = shutil.copytree(tiny_checkpoint(), tmp_path/'model')
    _, first = go(world, tmp_path/'run', model=str(folder))
    _, again = go(world, tmp_path/'run', model=str(folder))
    assert first.made == again.reused == 3 and again.made == 0
    weights = load_file(folder/'model.safetensors')
    save_file({k: v*.5 for k, v in weights.items()}, folder/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(RunError, match='3 answers were made with another model') as e: go(world, tmp_path/'run', model=str(folder))
    assert '"weights": "sha256:' in str(e.value)


def test_other_images_under_the_same_path_are_refused(world, tmp_path):
    root = shutil.copytree(world, tmp_path/'data')
    run, _ = go(root, tmp_path/'run')
    image = next(p['image'] for p in run.rows('samples')[0]['request']['messages'][-1]['content'] if p['type'] == 'image')
    with open(image, 'ab') as f: f.write(b'\0')
    with pytest.raises(RunError, match='of its 3 answers were made from other files'): go(root, tmp_path/'run')


def test_a_world_whose_marker_is_gone_is_other_data(world, tmp_path):
    root = shutil.copytree(world, tmp_path/'data')
    run, _ = go(root, tmp_path/'run')
    (root/'world.json').unlink()
    with pytest.raises(RunError, match='another data set|started on other samples'): go(root, tmp_path/'run')
    assert json.loads(run.path('data.json').read_text())['watermark']


@pytest.fixture
def judge():
    calls = []
    with chat_server(lambda body: '4', calls) as url: yield f'openai:judge@{url}', calls


def test_scoring_anew_pays_for_no_reply_twice(world, tmp_path, judge):
    spec, calls = judge
    go(world, tmp_path/'run')
    rescore(tmp_path/'run', tmp_path/'judged', judge=spec).close()
    made = len(calls)
    rescore(tmp_path/'run', tmp_path/'judged', judge=spec).close()
    assert made and len(calls) == made
    about = json.loads((tmp_path/'judged'/'manifest.json').read_text())['judge']
    assert about['judge'] == spec and about['model']['answered_by'] == ['judge-2026-01-01'] and about['prompt']['digest']
    assert json.loads((tmp_path/'run'/'manifest.json').read_text())['judge'] == {'judge': 'lexical@1', 'kind': 'rule'}


def test_scoring_needs_answers_and_no_manifest(world, tmp_path):
    run, _ = go(world, tmp_path/'run')
    (tmp_path/'run'/'manifest.json').unlink()
    again = rescore(tmp_path/'run', tmp_path/'again')
    again.close()
    assert again.manifest['model']['class'] == 'Qwen2VLForConditionalGeneration'


def test_scoring_does_not_replace_another_runs_answers(world, tmp_path):
    go(world, tmp_path/'run')
    go(world, tmp_path/'other')
    path = tmp_path/'other'/'predictions.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(''.join(json.dumps({**r, 'text': 'Else.'}) + '\n' for r in rows))
    with pytest.raises(RunError, match='holds 3 answers'): rescore(tmp_path/'run', tmp_path/'other')


@pytest.mark.parametrize('params', [{'judge_prompt': 'absent.txt', 'judge': 'openai:x@http://127.0.0.1:9/v1'}, {'published': 'absent.csv'}, {'layout': 'training'},
                                    {'judge_prompt': 'mine.txt'}])
def test_what_scoring_would_stumble_over_stops_the_start(params, tmp_path):
    settings = make_settings(TASK, params)
    with pytest.raises((ValueError, FileNotFoundError)): start(TASK, settings, tmp_path/'run')
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('judge', ['openai:gpt-4o-mini', 'gpt-4o-mini', './absent'])
def test_a_judge_that_cannot_be_had_stops_before_generation(judge, world, tmp_path, monkeypatch):
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    with pytest.raises(ValueError, match='needs a key|no checkpoint folder'): go(world, tmp_path/'run', judge=judge)
    assert not (tmp_path/'run'/'predictions.jsonl').exists()


@pytest.mark.parametrize('name', ['model', 'judge'])
@pytest.mark.parametrize('spec', ['openai:x@http://user:SECRETPW@127.0.0.1:9/v1', 'openai:x@http://127.0.0.1:9/v1?api_key=SECRETPW', 'openai:x@user:SECRETPW@host'])
def test_a_secret_reaches_no_file(name, spec, tmp_path, capsys):
    assert main(['run', 'mmwalk', '-p', name, spec, '--out', str(tmp_path/'run'), '-q']) == 2
    shown = capsys.readouterr()
    assert 'SECRETPW' not in shown.err + shown.out and not [p for p in tmp_path.rglob('*') if p.is_file()]


@pytest.mark.parametrize('given', [{'limit': 1.5}, {'seed': 'abc'}, {'seed': -1}, {'max_new_tokens': 2.5}, {'shots': 'three'}, {'shots': 1.0}, {'keep_depth': 'no'}, {'model': None}])
def test_a_value_of_another_type_is_refused(given):
    with pytest.raises(ValueError, match=f'{next(iter(given))}='): make_settings(TASK, given)


@pytest.mark.parametrize('runtime', [{'batch_size': 0}, {'batch_size': 1.5}, {'nproc': 'two'}])
def test_a_batch_of_nothing_is_refused(runtime, tmp_path):
    with pytest.raises(ValueError, match='is not possible; give 1 or more'): start(TASK, make_settings(TASK, {}), tmp_path/'run', **runtime)


def test_a_full_disk_is_an_error_of_one_line(tmp_path, monkeypatch, capsys):
    import papermill
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(papermill, 'execute_notebook', full)
    assert main(['run', 'mmwalk', '--out', str(tmp_path/'run'), '-q']) == 1
    assert 'No space left on device' in capsys.readouterr().err


def test_predictions_of_a_named_server_are_named_after_the_model():
    assert folder_name('openai:Qwen/Qwen2-VL@http://127.0.0.1:8000/v1', 'dog+', 3) == 'eval_Qwen2-VL_dog+_3s'


@pytest.mark.parametrize('given', [{'adapter': 'mine'}, {'dtype': 'float16'}, {'max_pixels': 1000}])
def test_what_cannot_reach_a_server_is_refused(given):
    with pytest.raises(ValueError, match='cannot reach a model behind a server'): make_settings(TASK, {'model': 'openai:x@http://127.0.0.1:9/v1', **given})


def test_a_server_that_is_down_stops_the_run(world, tmp_path):
    from vlm_repro.core.generate import GenerateError
    settings = make_settings(TASK, {'data_root': str(world), 'model': 'openai:x@http://127.0.0.1:9/v1'})
    run = start(TASK, settings, tmp_path/'run')
    requests = prepare(TASK, settings, TASK.load(settings), run)
    with pytest.raises(GenerateError, match='3 batches in a row failed'):
        generate(load_model(settings.model, max_retries=0, timeout=2.), requests, run, 2, 12, progress=False)
    assert len(run.rows('predictions')) == 6 < len(requests)
    run.close()


def test_the_manifest_says_when_and_on_what_and_where_shots_came_from(world, tmp_path):
    run, _ = go(world, tmp_path/'run', shots=1)
    first = run.manifest
    archive = next((world/'finetune_related').glob('*.zip'))
    assert first['data']['train_files'] == {archive.relative_to(world).as_posix(): hashlib.sha256(archive.read_bytes()).hexdigest()}
    assert first['machine']['cpus'] >= 1 and isinstance(first['machine']['gpus'], list)
    assert datetime.fromisoformat(first['started']) <= datetime.fromisoformat(first['finished']) and first['started'].endswith('+00:00')
    run, _ = go(world, tmp_path/'run', shots=1)
    assert run.manifest['started'] == first['started'] and run.manifest['answers_digest'] == first['answers_digest']
    run, _ = go(world, tmp_path/'plain')
    assert 'train_files' not in run.manifest['data']


def test_a_changed_train_file_is_another_data_set(world, tmp_path):
    root = shutil.copytree(world, tmp_path/'data')
    go(root, tmp_path/'run', shots=1)
    archive = next((root/'finetune_related').glob('*.zip'))
    with zipfile.ZipFile(archive, 'a') as z: z.writestr('note.txt', 'a file more')
    with pytest.raises(RunError, match='3 answers were made with another data set'): go(root, tmp_path/'run', shots=1)


def test_how_a_server_is_asked_reaches_the_judge_and_is_no_setting(world, tmp_path, bodies):
    go(world, tmp_path/'run')
    with chat_server(lambda body: '3', bodies) as url:
        rescore(tmp_path/'run', tmp_path/'judged', server='concurrency=2,timeout=7,retries=1,token_field=max_completion_tokens', judge=f'openai:judge@{url}').close()
    assert bodies and all('max_completion_tokens' in b and 'max_tokens' not in b for b in bodies)
    manifest = json.loads((tmp_path/'judged'/'manifest.json').read_text())
    about = manifest['judge']['model']
    assert (about['concurrency'], about['timeout'], about['max_retries']) == (2, 7., 1) and 'server' not in manifest['settings']
    for server, why in (('concurrency=none', 'give a whole number'), ('concurrency', 'give a whole number'), ('key=secret', 'it takes concurrency'), ('token_field=tokens', 'valid: max_tokens')):
        with pytest.raises(ValueError, match=why): rescore(tmp_path/'run', tmp_path/'other', server=server, judge='openai:judge@http://127.0.0.1:9/v1')
    assert not (tmp_path/'other').exists()


def test_a_run_judged_by_nobody_is_not_complete(world, tmp_path):
    go(world, tmp_path/'run')
    with fault_proxy('http://127.0.0.1:9/v1', lambda n, body: '401') as (url, proxy):
        with pytest.raises(JudgeError, match='answered nobody: auth'): rescore(tmp_path/'run', tmp_path/'judged', judge=f'openai:judge@{url}')
        assert not (tmp_path/'judged'/'manifest.json').exists() and (tmp_path/'judged'/'predictions.jsonl').exists()
        assert main(['score', str(tmp_path/'run'), '--judge', f'openai:judge@{url}', '--out', str(tmp_path/'judged')]) == 1


@pytest.mark.parametrize('given', [{'model': 'openai:m', 'dtype': 'float32'}, {'model': 'openai:m', 'max_pixels': 100352}, {'model': 'openai:m', 'adapter': 'mine'}])
def test_what_a_server_would_ignore_is_refused(given):
    with pytest.raises(ValueError, match='cannot reach a model behind a server'): make_settings(TASK, given)


def test_road_buddy_refuses_tiles_for_a_server():
    with pytest.raises(ValueError, match='max_tiles=12 cannot reach'): make_settings(get_task('roadbuddy'), {'model': 'openai:m', 'max_tiles': 12})
    assert make_settings(get_task('roadbuddy'), {'model': 'openai:m', 'max_tiles': 6}).max_tiles == 6


def test_a_model_the_server_has_not_stops_the_run_at_the_first_batch(world, tmp_path):
    with fault_proxy('http://127.0.0.1:9/v1', lambda n, body: '404') as (url, proxy):
        with pytest.raises(GenerateError, match=r'not_found: .*is the name of the model right, and the address\?.*run again to continue'): go(world, tmp_path/'run', model=f'openai:m@{url}', limit=10)
    assert len(proxy.log) <= 8


def test_a_missing_category_is_a_missing_file_and_no_record(world, tmp_path):
    from vlm_repro.mmwalk.data import load
    root = shutil.copytree(world, tmp_path/'data')
    (root/'test_data_chat'/'M3.jsonl').unlink()
    data = load(root)
    assert [p.label for p in data.problems] == ['missing_file'] and data.identity['left_out'] == 0 and not data.identity['official']


def test_a_shard_of_another_run_is_refused_by_its_name(tmp_path):
    run = open_run(tmp_path/"run", {"paper": "demo"})
    run.append("predictions", [{"id": "a", "text": "Yes.", "error": None, "prompt_hash": "11"}])
    check_shards(run, ["a"])
    shard = tmp_path/"run"/"predictions-1of2.jsonl"
    shard.write_text(json.dumps({"id": "z", "text": "No.", "error": None, "prompt_hash": "22"}) + "\n")
    with pytest.raises(RunError, match=r"predictions-1of2.jsonl: it answers 'z'"): check_shards(run, ["a"])
    shard.write_text(json.dumps({"id": "a", "text": "No.", "error": None, "prompt_hash": "22"}) + "\n")
    with pytest.raises(RunError, match="answered from another prompt than in predictions.jsonl"): check_shards(run, ["a"])
    shard.write_text(json.dumps({"id": "a", "text": "", "error": "oom: no memory", "prompt_hash": ""}) + "\n")
    check_shards(run, ["a"])
    run.close()
