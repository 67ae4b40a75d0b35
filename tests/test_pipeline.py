"""mmWalk from files to manifest on a broken copy of a small world, with the shipped checkpoint."""
import json
import shutil
from pathlib import Path

import pytest
import torch

from vlm_repro.core.generate import GenerateError, generate
from vlm_repro.core.records import Generation, from_row
from vlm_repro.core.runs import RunError
from vlm_repro.core.tasks import (
    extract_run,
    finish_run,
    generations_of,
    get_task,
    make_settings,
    prepare,
    rescore,
    score_run,
    start,
    table_run,
    verdicts_run,
)
from vlm_repro.mmwalk.world import Size, build_world
from vlm_repro.models.protocol import load_model

torch.set_num_threads(1)
TASK = get_task('mmwalk')


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp('world')/'w', 5, Size(test_frames=2, train_frames=2, val_frames=1, train_trajectories=1))


@pytest.fixture(scope='module')
def model():
    return load_model('tiny')


@pytest.fixture
def root(small, tmp_path):
    return shutil.copytree(small, tmp_path/'data')


def _settings(root, **more):
    return make_settings(TASK, {'data_root': str(root), 'categories': 'E1,E2', 'limit': 4, **more})


def _begin(root, out, **more):
    settings = _settings(root, **more)
    run = start(TASK, settings, out, batch_size=4)
    return settings, run, prepare(TASK, settings, TASK.load(settings), run)


def _end(settings, run, model):
    extract_run(TASK, settings, run)
    score_run(TASK, settings, run)
    table_run(TASK, settings, run)
    return finish_run(TASK, settings, run, model.describe())


def _image(request):
    return next(p['image'] for p in request.messages[-1]['content'] if p['type'] == 'image')


def _spoil(path, how):
    data = path.read_bytes()
    if how == 'missing': path.unlink()
    if how == 'truncated': path.write_bytes(data[:len(data)//2])
    if how == 'no image': path.write_text('<html>not found</html>')


@pytest.mark.parametrize('how', ['missing', 'truncated', 'no image'])
def test_a_bad_image_is_labelled_counted_and_the_run_goes_on(root, tmp_path, model, how):
    settings, run, requests = _begin(root, tmp_path/'run')
    path = Path(_image(requests[0]))
    _spoil(path, how)
    hit = {r.id for r in requests if str(path) in json.dumps(r.messages)}
    report = generate(model, requests, run, 4, 16, progress=False)
    assert report.errors == {'media': len(hit)} and report.made == len(requests) - len(hit)
    for g in generations_of(run):
        assert bool(g.error) == (g.id in hit)
        if g.error: assert g.text == '' and path.name in g.error
    manifest = _end(settings, run, model)
    assert manifest['errors'] == {'media': len(hit)}
    failed = [row for row in run.rows('scores') if row['variant'] == 'corrected' and row['values'] is None]
    assert {row['id'] for row in failed} == hit
    run.close()


def test_a_mended_image_is_asked_again(root, tmp_path, model):
    settings, run, requests = _begin(root, tmp_path/'run')
    path = Path(_image(requests[0]))
    data = path.read_bytes()
    path.unlink()
    first = generate(model, requests, run, 4, 16, progress=False)
    path.write_bytes(data)
    second = generate(model, requests, run, 4, 16, progress=False)
    assert second.made == first.errors['media'] and second.reused == first.made and not second.errors
    assert max(g.attempt for g in generations_of(run)) == 2
    run.close()


def test_strict_stops_and_keeps_what_was_answered(root, tmp_path, model):
    settings, run, requests = _begin(root, tmp_path/'run')
    Path(_image(requests[0])).unlink()
    with pytest.raises(GenerateError, match='media: .*no such file'): generate(model, requests, run, 1, 16, strict=True, progress=False)
    kept = [from_row(Generation, row) for row in run.rows('predictions')]
    assert sum(bool(g.error) for g in kept) == 1
    with pytest.raises(RunError, match='have no prediction yet'): generations_of(run)
    run.close()


def test_overflow_is_labelled_and_counted(root, tmp_path):
    short = load_model('tiny', max_model_len=300)
    settings, run, requests = _begin(root, tmp_path/'run', shots=1)
    report = generate(short, requests, run, 4, 16, progress=False)
    assert report.errors == {'overflow': len(requests)} and '> 300' in generations_of(run)[0].error
    run.close()


def test_batch_size_and_order_change_nothing(root, tmp_path, model):
    made = {}
    for size in (1, 3, 8):
        settings, run, requests = _begin(root, tmp_path/f'run{size}', shots=1)
        generate(model, requests, run, size, 16, progress=False)
        made[size] = sorted(run.path('predictions.jsonl').read_text().splitlines())
        run.close()
    assert made[1] == made[3] == made[8]


def test_other_data_under_the_same_path_is_refused(root, tmp_path):
    settings, run, requests = _begin(root, tmp_path/'run')
    run.close()
    file = root/'test_data_chat'/'E1.jsonl'
    text = file.read_text(encoding='utf-8')
    asked = {s['gold'] for s in run.rows('samples') if s['meta']['category'] == 'E1'}
    for gold in asked: text = text.replace(json.dumps(gold, ensure_ascii=False), '"Snowy."')
    file.write_text(text, encoding='utf-8')
    with pytest.raises(RunError, match='started on other samples'): _begin(root, tmp_path/'run')


def test_world_is_watermarked_and_never_judged(root, tmp_path, model):
    filled = tmp_path/'mine.csv'
    filled.write_text('table,row,column,value,split,model,judge\ncategories,tiny / normal / 0s,E1,50.0,world test,tiny,lexical\n')
    settings, run, requests = _begin(root, tmp_path/'run', published=str(filled))
    generate(model, requests, run, 8, 16, progress=False)
    manifest = _end(settings, run, model)
    cells = table_run(TASK, settings, run)
    assert manifest['watermark']
    judged = [v for v in verdicts_run(TASK, settings, run, cells) if v.cell]
    assert judged and {v.status for v in judged} == {'cannot be judged'}
    run.close()


def test_scoring_anew_keeps_the_answers_and_refuses_to_change_them(root, tmp_path, model):
    settings, run, requests = _begin(root, tmp_path/'run')
    generate(model, requests, run, 8, 16, progress=False)
    manifest = _end(settings, run, model)
    run.close()
    with pytest.raises(ValueError, match='shots would change the answers'): rescore(tmp_path/'run', tmp_path/'other', shots=3)
    again = rescore(tmp_path/'run', tmp_path/'again', published='')
    assert again.manifest['answers_digest'] == manifest['answers_digest'] and again.manifest['rescored_from'] == manifest['answers_digest']
    assert again.rows('scores') == run.rows('scores')
    again.close()


def test_the_papers_own_files_are_written(root, tmp_path, model):
    settings, run, requests = _begin(root, tmp_path/'run')
    generate(model, requests, run, 8, 16, progress=False)
    _end(settings, run, model)
    folder = run.path('upstream')
    summary = json.loads((folder/'gpt_evaluation_summary.json').read_text())
    assert [c['category'] for c in summary['per_category']] == ['E1', 'E2']
    assert {p.name for p in (folder/'eval_tiny_normal_0s').iterdir()} == {'E1.jsonl', 'E2.jsonl'}
    lines = (folder/'gpt_scored_samples.jsonl').read_text().splitlines()
    assert list(json.loads(lines[0])) == ['category', 'scenario', 'question', 'gt_answer', 'pred_answer', 'score']
    run.close()


def test_a_shot_never_comes_from_a_tested_trajectory(root):
    settings = _settings(root, shots=2)
    data = TASK.load(settings)
    tested = set(data.identity['trajectories'])
    for request in TASK.prompt(data, settings):
        *shots, _ = [m for m in request.messages if m['role'] == 'user']
        shown = {p['image'].split('QAFrames/')[1].split('/')[0] for m in shots for p in m['content'] if p['type'] == 'image'}
        assert len(shots) == 2 and not shown & tested


def test_one_fixed_set_of_shots_a_category(root):
    settings = _settings(root, shots=2)
    data = TASK.load(settings)
    seen = {}
    for sample, request in zip(data.samples, TASK.prompt(data, settings), strict=True):
        seen.setdefault(sample.meta['category'], set()).add(json.dumps(request.messages[:-1]))
    assert {k: len(v) for k, v in seen.items()} == {'E1': 1, 'E2': 1}
    other = TASK.prompt(data, _settings(root, shots=2, seed=1))
    assert json.dumps(other[0].messages[:-1]) not in seen['E1']
