"""Whole runs of GPT4Scene on the embedded world: one reading of a scene, kills and other numbers of processes, adopted files, training."""
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_repro.core.adopted import score_files
from vlm_repro.core.generate import generate
from vlm_repro.core.jsonl import DataError
from vlm_repro.core.runs import RunError
from vlm_repro.core.tasks import extract_run, get_task, make_settings, prepare, rescore, start
from vlm_repro.gpt4scene.images import is_bev
from vlm_repro.gpt4scene.rows import BENCHMARKS
from vlm_repro.gpt4scene.task import Gpt4SceneSettings, claim, fitting_list, load_questions, row_of_run, training_examples, training_recipe
from vlm_repro.gpt4scene.world import Size, build_world
from vlm_repro.models.protocol import load_model
from vlm_repro.report.published import load_published
from vlm_repro.train.paper import complete_run

TASK = get_task('gpt4scene')
LAUNCH = '''
import sys
import torch
from vlm_repro.core.generate import generate
from vlm_repro.core.tasks import get_task, make_settings, prepare, start
from vlm_repro.models.protocol import load_model
torch.set_num_threads(1)
task, (root, out, nproc) = get_task('gpt4scene'), sys.argv[1:]
settings = make_settings(task, {'data_root': root, 'meteor': False, 'max_new_tokens': 24})
run = start(task, settings, out, batch_size=4)
print(generate(load_model('tiny', tiny='gpt4scene'), prepare(task, settings, task.load(settings), run), run, 4, 24, nproc=int(nproc)))
'''


@pytest.fixture(scope='module')
def tiny():
    import torch
    torch.set_num_threads(1)
    return load_model('tiny', tiny='gpt4scene')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp('world')/'w', 6, Size(train_rooms=2, val_rooms=2))


def settings_of(root, **more):
    return make_settings(TASK, {'data_root': str(root), 'meteor': False, 'max_new_tokens': 24, **more})


def table_of(run):
    with run.path('table.csv').open(encoding='utf-8', newline='') as f: return list(csv.DictReader(f))


@pytest.fixture(scope='module')
def whole(root, tiny, tmp_path_factory):
    """A run that nothing happened to."""
    return complete_run(TASK, settings_of(root), tiny, tmp_path_factory.mktemp('whole')/'run', 4)


# ---- a scene is read once

def test_all_questions_of_a_scene_share_one_visual_prefix(tmp_path):
    """33 pictures a scene, all five benchmarks: each picture goes through the vision tower once."""
    root = build_world(tmp_path/'w', 7, Size(train_rooms=0, val_rooms=2, frames=32, recorded=32))
    model, settings = load_model('tiny', tiny='gpt4scene'), settings_of(root, frames=32, limit=6, max_new_tokens=8)
    run = start(TASK, settings, tmp_path/'run')
    requests = prepare(TASK, settings, load_questions(settings), run)
    generate(model, requests, run, 5, 8, progress=False)
    run.close()
    seen = model.reused()
    assert len(requests) == 30 and seen['images'] == 30*33
    assert seen['images_encoded'] == seen['pictures_opened'] == 2*33
    assert seen['tokens_read'] < seen['tokens']/4


# ---- completeness, files, tables

def test_a_whole_run_leaves_tables_and_upstreams_files(whole, root):
    asked = [json.loads(line) for line in (whole.root/'samples.jsonl').read_text(encoding='utf-8').splitlines()]
    assert {s['meta']['benchmark'] for s in asked} == set(BENCHMARKS)
    rows = table_of(whole)
    assert {r['table'] for r in rows} == set(BENCHMARKS.values()) and {r['variant'] for r in rows} == {'corrected', 'as_published'} and {r['cluster'] for r in rows} == {'scene', 'room'}
    assert {r['row'] for r in rows} == {'tiny / tuned / 8 frames / 128'} and {r['status'] for r in rows if r['cluster'] == 'scene' and r['value']} == {'cannot be judged'}
    assert {r['column'].partition('@')[0] for r in rows if not r['value']} == {'METEOR'}
    upstream = whole.path('upstream')
    for benchmark in BENCHMARKS:
        held = json.loads((upstream/f'qwenvl_{benchmark}'/'predictions_chunk_0.json').read_text())
        assert len(held) == sum(s['meta']['benchmark'] == benchmark for s in asked)
        assert list(held[0]) == ['scene_id', 'qid', 'gt_id', 'pred_id', 'prompt', 'pred', 'ref_captions', 'type_info']
    scores = json.loads((upstream/'all_evaluation_results.json').read_text())
    published = {(r['table'], r['column']): r['value'] for r in rows if r['variant'] == 'as_published' and r['cluster'] == 'scene'}
    assert 100*scores['scanqa']['[scanqa] EM1'] == pytest.approx(float(published['ScanQA', 'EM']))
    assert 100*scores['multi3dref']['[multi3dref] all F1@0.25'] == pytest.approx(float(published['Multi3DRefer', 'ALL F1@0.25']))
    assert 100*scores['scan2cap']['[scan2cap] CIDEr@0.25'] == pytest.approx(float(published['Scan2Cap', 'CIDEr@0.25']))
    assert json.loads((upstream/'config.json').read_text())['frames'] == 8


def test_an_incomplete_run_is_not_scored(root, tiny, tmp_path):
    settings = settings_of(root, limit=2)
    run = start(TASK, settings, tmp_path/'run')
    requests = prepare(TASK, settings, load_questions(settings), run)
    generate(tiny, requests[:3], run, 3, 8, progress=False)
    with pytest.raises(RunError, match='7 of 10 samples have no prediction yet'): extract_run(TASK, settings, run)
    run.close()


def test_chunk_files_are_scored_as_a_run(whole, root, tmp_path):
    again = score_files('gpt4scene', whole.path('upstream'), tmp_path/'run', data_root=str(root), meteor=False, model='tiny')
    again.close()
    keep = ('table', 'column', 'variant', 'cluster', 'value', 'lo', 'hi', 'n')
    assert [[r[k] for k in keep] for r in table_of(again)] == [[r[k] for k in keep] for r in table_of(whole)]
    other = build_world(tmp_path/'other', 8, Size(train_rooms=0, val_rooms=2))
    with pytest.raises(DataError, match='another run, or of another release'): score_files('gpt4scene', whole.path('upstream'), tmp_path/'no', data_root=str(other))


def test_a_folder_without_a_benchmark_is_refused_until_it_is_named(whole, root, tmp_path):
    """A process that failed at once leaves no folder; the rest must not look like a whole run."""
    files = tmp_path/'my_model'
    shutil.copytree(whole.path('upstream'), files)
    shutil.rmtree(files/'qwenvl_scan2cap')
    asked = {'data_root': str(root), 'meteor': False}
    with pytest.raises(DataError, match='my_model has no qwenvl_scan2cap: 4 of 5 benchmarks are there.*benchmark=scanqa,sqa3d,scanrefer,multi3dref'): score_files('gpt4scene', files, tmp_path/'no', **asked)
    with pytest.raises(DataError, match='0 of 1 benchmarks'): score_files('gpt4scene', files, tmp_path/'no', benchmark='scan2cap', **asked)
    assert not (tmp_path/'no').exists()
    some = score_files('gpt4scene', files, tmp_path/'some', benchmark='scanqa,sqa3d', **asked)
    one = score_files('gpt4scene', files/'qwenvl_scanqa', tmp_path/'one', **asked)
    for run, tables in ((some, {'ScanQA', 'SQA3D'}), (one, {'ScanQA'})):
        run.close()
        assert {r['table'] for r in table_of(run)} == tables
        kept = {(r['table'], r['column'], r['variant'], r['cluster']): r['value'] for r in table_of(run)}
        assert kept == {k: r['value'] for r in table_of(whole) if (k := (r['table'], r['column'], r['variant'], r['cluster']))[0] in tables}


def test_scoring_again_reads_the_same_answers(whole, tmp_path):
    again = rescore(whole.root, tmp_path/'again', plain_ids=True)
    again.close()
    keep = {(r['table'], r['column'], r['variant']): r['value'] for r in table_of(whole) if r['cluster'] == 'scene'}
    now = {(r['table'], r['column'], r['variant']): r['value'] for r in table_of(again) if r['cluster'] == 'scene'}
    assert keep.keys() == now.keys() and {k for k in keep if keep[k] != now[k]} <= {k for k in keep if k[0] == 'Multi3DRefer'}
    with pytest.raises(ValueError, match='would change the answers'): rescore(whole.root, tmp_path/'no', frames=4)


# ---- arms

@pytest.mark.parametrize(('more', 'pictures'), [({'bev': False}, 8), ({'frames': 2}, 3), ({'marks': False}, 9), ({'marks': False, 'bev': False, 'frames': 4}, 4), ({'zero_shot': True}, 2), ({'zero_shot': True, 'bev': False}, 1)])
def test_every_arm_can_be_asked(root, tiny, tmp_path, more, pictures):
    run = complete_run(TASK, settings_of(root, limit=1, max_new_tokens=4, **more), tiny, tmp_path/'run', 5)
    row = json.loads((run.root/'samples.jsonl').read_text(encoding='utf-8').splitlines()[0])
    content = row['request']['messages'][-1]['content']
    assert sum(p['type'] == 'image' for p in content) == pictures and not run.manifest['errors']
    if more.get('marks') is False: assert not any('frames_mark' in p['image'] or 'with_text' in p['image'] for p in content if p['type'] == 'image')


def test_a_list_that_does_not_exist_is_named(root, tmp_path):
    with pytest.raises(DataError, match='5 frames with marks'): load_questions(settings_of(root, frames=5))
    with pytest.raises(DataError, match='there is none'): fitting_list([], Gpt4SceneSettings())
    sample = load_questions(settings_of(root, bev=False, limit=1)).samples[0]
    assert not any(map(is_bev, sample.media))


def test_a_list_named_by_hand_may_not_contradict_the_marks(root):
    from vlm_repro.gpt4scene.truth import annotation_folder
    bare, marked = 'selected_images_3D_val_8.json', 'selected_images_mark_3D_val_8.json'
    assert all((annotation_folder(root)/name).is_file() for name in (bare, marked))
    with pytest.raises(DataError, match='with numbers and marks=False; set marks to True'): load_questions(settings_of(root, listed=marked, marks=False))
    with pytest.raises(DataError, match='without numbers and marks=True; set marks to False'): load_questions(settings_of(root, listed=bare))
    assert load_questions(settings_of(root, listed=bare, marks=False, limit=1)).identity['list'] == bare


def shortened(root, **kept):
    """The world's list with fewer pictures of some scenes; a slice for each."""
    path = next(root.rglob('selected_images_mark_3D_val_8.json'))
    listed = json.loads(path.read_text())
    scenes = sorted(listed)
    path.write_text(json.dumps({scene: [p for i, p in enumerate(listed[scene]) if i in kept.get(f'scene_{k}', range(99))] for k, scene in enumerate(scenes)}))
    return scenes


def test_a_scene_with_few_frames_is_asked_with_those_it_has(tmp_path, tiny):
    root = build_world(tmp_path/'w', 9, Size(train_rooms=0, val_rooms=2))
    short, other = shortened(root, scene_0=range(6))
    data = load_questions(settings_of(root))
    assert {s.meta['scene']: len(s.media) for s in data.samples} == {short: 6, other: 9}
    assert [(p.label, p.dropped) for p in data.problems] == [('few_frames', False)] and short in data.problems[0].where and '5 frames, others have 8; 5 of them are shown' in str(data.problems[0])
    assert data.identity['left_out'] == 0 and {len(s.media) for s in load_questions(settings_of(root, frames=2)).samples} == {3}
    run = complete_run(TASK, settings_of(root, limit=4, max_new_tokens=4), tiny, tmp_path/'run', 5)
    assert {row['error'] for row in run.rows('predictions')} == {None}


@pytest.mark.parametrize(('kept', 'label'), [(range(1), 'few_frames'), (range(1, 9), 'no_view')])
def test_a_scene_without_pictures_is_left_out_and_said(tmp_path, kept, label):
    root = build_world(tmp_path/'w', 9, Size(train_rooms=0, val_rooms=2))
    gone, other = shortened(root, scene_0=kept)
    data = load_questions(settings_of(root))
    assert {s.meta['scene'] for s in data.samples} == {other} and [(p.label, p.dropped) for p in data.problems] == [(label, True)]
    assert data.identity['left_out'] == data.identity['n'] - data.identity['asked'] > 0
    assert 'questions' in claim(settings_of(root), data.identity, ['ours']).split


def test_a_list_without_the_pictures_asked_for_is_refused_as_a_whole(tmp_path):
    root = build_world(tmp_path/'w', 9, Size(train_rooms=0, val_rooms=2))
    shortened(root, scene_0=range(6), scene_1=range(6))
    with pytest.raises(DataError, match='8 frames cannot be chosen evenly out of 5'): load_questions(settings_of(root))
    shortened(root, scene_0=range(1, 9), scene_1=range(1, 9))
    with pytest.raises(DataError, match='has no view from above; set bev to False'): load_questions(settings_of(root, frames=5, listed='selected_images_mark_3D_val_8.json'))


def test_a_missing_picture_fails_its_scene_and_no_other(tmp_path, tiny):
    root = build_world(tmp_path/'w', 9, Size(train_rooms=0, val_rooms=2))
    settings = settings_of(root, limit=4, max_new_tokens=4)
    data = load_questions(settings)
    scene = data.samples[0].meta['scene']
    (Path(data.frames)/data.samples[0].media[3].path).unlink()
    run = complete_run(TASK, settings, tiny, tmp_path/'run', 5)
    errors = {row['id']: row['error'] for row in run.rows('predictions')}
    mine = {s.id for s in data.samples if s.meta['scene'] == scene}
    assert mine and {i for i, e in errors.items() if e} == mine and all('media: ' in errors[i] for i in mine)


# ---- what a run may claim

def test_rows_are_those_of_the_published_table():
    known = {p.row for p in load_published('gpt4scene')}
    released = {'model': 'alexzyqi/GPT4Scene-qwen2vl_full_sft_mark_32_3D_img512', 'frames': 32, 'size': 512}
    assert row_of_run(Gpt4SceneSettings(**released)) in known
    for marks, bev in ((True, True), (True, False), (False, True), (False, False)): assert row_of_run(Gpt4SceneSettings(model='Qwen/Qwen2-VL-7B-Instruct', recipe='published', marks=marks, bev=bev)) in known
    assert row_of_run(Gpt4SceneSettings(model='openai:gpt-4o@http://x/v1', zero_shot=True)) in known
    told = claim(Gpt4SceneSettings(**released), {'frames': 'present', 'official': True, 'split': 'val', 'asked': 10, 'n': 10}, ['verbatim'])
    assert (told.data, told.split, told.prompts) == ('paper', 'val', 'verbatim')
    assert claim(Gpt4SceneSettings(), {'frames': 'world', 'official': False, 'split': 'val', 'asked': 3, 'n': 10}, ['ours']).split == 'val, 3 of 10 questions'


# ---- training

def test_training_conversations_end_with_the_files_answer(root):
    told = training_examples(settings_of(root), 'train')
    assert len(told) > 20 and [m['role'] for m in told[0].messages] == ['user', 'assistant']
    assert [p['type'] for p in told[0].messages[0]['content']] == ['image']*9 + ['text'] and told[0].messages[1]['content'][0]['text'].endswith('.')
    with pytest.raises(ValueError, match='zero_shot'): training_examples(settings_of(root, zero_shot=True), 'train')
    recipe = training_recipe(settings_of(root, recipe='tiny', bev=False))
    assert recipe.data[0].settings['bev'] is False and recipe.data[0].settings['data_root'] == str(root)


@pytest.mark.slow
def test_a_tuned_run(root, tmp_path):
    from vlm_repro.train.loop import fine_tune
    from vlm_repro.train.paper import tuned_model
    from vlm_repro.train.recipe import change
    recipe = change(training_recipe(settings_of(root, recipe='tiny')), max_steps=2, batch=4)
    trained = fine_tune(recipe, tmp_path/'training')
    run = complete_run(TASK, settings_of(root, limit=1, recipe='tiny'), tuned_model(recipe, trained), tmp_path/'run', 5)
    assert trained.steps == 2 and not run.manifest['errors']


# ---- kills

def _launch(*words): return subprocess.Popen([sys.executable, '-c', LAUNCH, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def _answers(out): return sorted(line for path in out.glob('predictions*.jsonl') for line in path.read_text(encoding='utf-8').splitlines())


@pytest.mark.slow
def test_two_processes_killed_and_continued_with_one_give_the_scores_of_a_whole_run(root, whole, tiny, tmp_path):
    out = tmp_path/'run'
    launcher = _launch(root, out, 2)
    end = time.monotonic() + 240
    while len(_answers(out)) < 8:
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.01)
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    survived = len(_answers(out))
    assert 8 <= survived < len(_answers(whole.root)) and not (out/'manifest.json').exists()
    time.sleep(2)  # workers watch the process that started them
    run = complete_run(TASK, settings_of(root), tiny, out, 4)
    assert len(_answers(out)) == len(_answers(whole.root)) and len({json.loads(line)['id'] for line in _answers(out)}) == len(_answers(out))
    said = {r.root: {row['id']: row['text'] for row in r.rows('predictions')} for r in (run, whole)}
    assert said[run.root] == said[whole.root]
    assert table_of(run) == table_of(whole)
