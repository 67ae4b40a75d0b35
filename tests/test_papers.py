"""The paper notebooks as users run them: through papermill, in other settings, killed and run again."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT/'papers'/'mmwalk.ipynb'
ROADBUDDY = ROOT/'papers'/'roadbuddy.ipynb'
GPT4SCENE = ROOT/'papers'/'gpt4scene.ipynb'
ROBOINTER = ROOT/'papers'/'robointer.ipynb'
FITCOACH = ROOT/'papers'/'fitcoach.ipynb'
FULL = [(shots, views) for shots in (0, 1, 3) for views in ('normal', 'single', 'dog+', 'drone+')]


def _command(out: Path, notebook: Path = NOTEBOOK, **params) -> list[str]:
    given = [x for k, v in {'out': str(out), **params}.items() for x in ('-p', k, str(v))]
    return [sys.executable, '-m', 'papermill', str(notebook), str(out/'notebook.ipynb'), '--log-output', '--no-progress-bar', *given]


def _run(out: Path, **params) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(_command(out, **params), capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out/'manifest.json').read_text())


def _predictions(out: Path) -> list[str]:
    return sorted((out/'predictions.jsonl').read_text(encoding='utf-8').splitlines())


@pytest.mark.parametrize('shots, views', [(3, 'normal'), (1, 'dog+')])
def test_short(tmp_path, shots, views):
    manifest = _run(tmp_path, shots=shots, views=views, limit=2, categories='E1,H1')
    assert manifest['n'] == 4 and not manifest['errors'] and manifest['watermark']
    assert manifest['settings']['views'] == views and manifest['provenance'] == {'ours': 4}
    table = (tmp_path/'table.csv').read_text(encoding='utf-8')
    assert 'cannot be judged' in table and 'as_published' in table


@pytest.mark.parametrize('read', ['text', 'likelihood'])
def test_roadbuddy_short(tmp_path, read):
    manifest = _run(tmp_path, notebook=ROADBUDDY, recipe='', limit=6, split_by='source', read=read)
    assert manifest['n'] == 6 and not manifest['errors'] and manifest['watermark']
    name = 'submission.csv' if read == 'text' else 'corrected_submission.csv'  # a likelihood has no published reading
    assert (tmp_path/'upstream'/name).read_text(encoding='utf-8').startswith('id,answer\n')
    assert 'cannot be judged' in (tmp_path/'table.csv').read_text(encoding='utf-8')


def test_gpt4scene_short(tmp_path):
    manifest = _run(tmp_path, notebook=GPT4SCENE, limit=2, ablation=0, meteor=False, max_new_tokens=24)
    assert manifest['n'] == 10 and not manifest['errors'] and manifest['watermark']
    assert 'cannot be judged' in (tmp_path/'table.csv').read_text(encoding='utf-8')
    page = (tmp_path/'notebook.ipynb').read_text(encoding='utf-8')
    assert page.count('image/png') >= 2 and 'the data are not the paper' in page  # a room in three dimensions and what is shown of it; every cell with its verdict
    assert (tmp_path/'upstream'/'qwenvl_scanqa'/'predictions_chunk_0.json').exists()


def test_robointer_short(tmp_path):
    manifest = _run(tmp_path, notebook=ROBOINTER, recipe='', tasks='current_box,traj,planning_decide', limit=2)
    assert manifest['n'] == 6 and not manifest['errors'] and manifest['watermark']
    assert 'cannot be judged' in (tmp_path/'table.csv').read_text(encoding='utf-8')
    assert (tmp_path/'notebook.ipynb').read_text(encoding='utf-8').count('image/jpeg') >= 3  # gallery, film strip, what was said
    assert (tmp_path/'upstream'/'logs'/'tiny_traj.log').exists() and (tmp_path/'upstream'/'eval_details_current_box.json').exists()


@pytest.mark.slow
def test_fitcoach_short(tmp_path):
    from fitcoach_files import add_session, make_checkpoint
    checkpoint = make_checkpoint(tmp_path/'checkpoint')
    for id in ('0201', '0202'): add_session(tmp_path/'root', id)
    manifest = _run(tmp_path/'run', notebook=FITCOACH, recipe='', model=checkpoint, data_root=tmp_path/'root', meteor=False, max_new_tokens=6)
    assert manifest['n'] == 4 and not manifest['errors'] and manifest['provenance'] == {'paraphrase': 4}
    page = (tmp_path/'run'/'notebook.ipynb').read_text(encoding='utf-8')
    assert page.count('image/png') >= 2 and 'full_workout_sliding_window' in page and 'extract them' in page  # two time lines, three modes, failures by name
    assert {'feedbacks.json', 'corrected_full.json', 'challenge_2026.json'} <= {p.name for p in (tmp_path/'run'/'upstream').iterdir()}


@pytest.mark.papers
def test_fitcoach_training_adds_the_exercise_that_was_left_out(tmp_path):
    from vlm_repro.fitcoach.timeline import clip_hits
    from vlm_repro.models.protocol import tiny_checkpoint
    manifest = _run(tmp_path, notebook=FITCOACH)
    assert not manifest['errors'] and manifest['watermark']
    new = set(json.loads((tiny_checkpoint('fitcoach')/'card.json').read_text())['left_out_exercises'])
    asked = {r['id'] for r in map(json.loads, (tmp_path/'samples.jsonl').read_text(encoding='utf-8').splitlines()) if r['meta']['exercise'] in new}
    before, after = ({i: v for i, v in clip_hits(json.loads((folder/'upstream'/'corrected_full.json').read_text())).items() if i in asked} for folder in (tmp_path/'before', tmp_path))
    assert asked and sum(after.values()) > sum(before.values())


@pytest.mark.papers
def test_robointer_training_adds_the_box_at_contact(tmp_path):
    _run(tmp_path, notebook=ROBOINTER, tasks='contact_box')
    before, after = (_column(folder/'scores.jsonl') for folder in (tmp_path/'before', tmp_path))
    assert sum(after.values())/len(after) > sum(before.values())/len(before) + .1


@pytest.mark.papers
def test_gpt4scene_marks_are_what_finds_objects(tmp_path):
    _run(tmp_path, notebook=GPT4SCENE, benchmark='scanrefer,scanqa', ablation=30, limit=2, meteor=False, max_new_tokens=24)
    found = {}
    for arm in (tmp_path/'ablation').iterdir():
        scores = [json.loads(line) for line in (arm/'scores.jsonl').read_text(encoding='utf-8').splitlines()]
        hits = [r['values'][0] for r in scores if r['metric'] == 'acc' and r['variant'] == 'corrected' and r['values']]
        found[arm.name] = sum(hits)/len(hits)
    marked = {name: share for name, share in found.items() if 'marks' in name}
    assert len(found) == 8 and max(marked.values()) > max(share for name, share in found.items() if name not in marked) + .15, found


def _column(path: Path, variant: str = 'corrected') -> dict[str, float]:
    rows = (json.loads(line) for line in path.read_text(encoding='utf-8').splitlines())
    return {r['id']: r['values'][0] for r in rows if r['variant'] == variant and r['values']}


@pytest.mark.papers
def test_mmwalk_finetuned_helps_where_it_was_taught(tmp_path):
    manifest = _run(tmp_path, shots='finetuned', categories='M2')
    before, after = (_column(folder/'scores.jsonl') for folder in (tmp_path/'before', tmp_path))
    assert not manifest['errors'] and before.keys() == after.keys()
    assert sum(after.values())/len(after) > sum(before.values())/len(before) + .5  # grades from 1 to 5
    assert (tmp_path/'training'/'training_metrics.json').exists()


@pytest.mark.papers
def test_roadbuddy_finetuned_learns_a_kind_it_was_not_taught(tmp_path):
    from vlm_repro.models.protocol import load_model
    from vlm_repro.roadbuddy.questions import family_of
    _run(tmp_path, notebook=ROADBUDDY, merged=True)
    assert load_model(str(tmp_path/'merged')).describe()['n_parameters'] == load_model('tiny', tiny='roadbuddy').describe()['n_parameters']
    assert 'give the same answer to 8 of 8 requests' in (tmp_path/'notebook.ipynb').read_text(encoding='utf-8')
    asked = {r['id']: family_of(r['question']) for r in map(json.loads, (tmp_path/'samples.jsonl').read_text(encoding='utf-8').splitlines())}
    before, after = ({i: v for i, v in _column(folder/'scores.jsonl', 'corrected').items() if asked[i] == 'colour'} for folder in (tmp_path/'before', tmp_path))
    assert len(before) >= 8 and sum(after.values()) > sum(before.values())


@pytest.mark.papers
@pytest.mark.parametrize('shots, views', FULL)
def test_every_setting(tmp_path, shots, views):
    manifest = _run(tmp_path, shots=shots, views=views, limit=6)
    assert manifest['n'] == 54 and not manifest['errors']
    visual = {json.loads(line)['n_visual'] for line in _predictions(tmp_path)}
    images = {'normal': 4, 'single': 2, 'dog+': 3, 'drone+': 3}[views]*(shots + 1)
    assert len(visual) == 1 and visual.pop() % images == 0


def _children(pid: int) -> list[int]:
    listed = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True).stdout.split()
    return [int(p) for p in listed]


@pytest.mark.papers
def test_killed_with_its_kernel_and_run_again(tmp_path):
    whole, cut = tmp_path/'whole', tmp_path/'cut'
    params = {'shots': 1, 'limit': 8, 'batch_size': 4}
    _run(whole, **params)
    cut.mkdir()
    victim = subprocess.Popen(_command(cut, **params), cwd=cut, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path = cut/'predictions.jsonl'
    while victim.poll() is None and not (path.exists() and path.read_bytes().count(b'\n') >= 8): time.sleep(.02)
    assert victim.poll() is None, 'the run ended before it could be killed'
    for pid in [*_children(victim.pid), victim.pid]: os.kill(pid, signal.SIGKILL)
    victim.wait()
    survived = path.read_bytes()
    assert 8 <= survived.count(b'\n') < 72 and not (cut/'manifest.json').exists()
    _run(cut, **params)
    assert path.read_bytes().startswith(survived[:survived.rfind(b'\n') + 1])
    assert _predictions(cut) == _predictions(whole)


def _small_world(folder: Path) -> Path:
    from vlm_repro.mmwalk.world import Size, build_world
    return build_world(folder, 3, Size(test_frames=1, train_frames=1, val_frames=1, train_trajectories=1))


def test_a_missing_first_image_does_not_stop_the_page(tmp_path):
    root = _small_world(tmp_path/'data')
    first = json.loads((root/'test_data_chat'/'E1.jsonl').read_text(encoding='utf-8').splitlines()[0])['conversation'][0]['content'][0]['image']
    (root/first.removeprefix('../')).unlink()
    manifest = _run(tmp_path/'run', data_root=root, categories='E1')
    assert manifest['errors']['media'] >= 1 and manifest['n'] > manifest['errors']['media']


def test_a_run_in_which_every_sample_failed_still_has_its_page(tmp_path):
    root = _small_world(tmp_path/'data')
    for image in (root/'QAFrames').rglob('*.png'): image.write_bytes(image.read_bytes()[:60])
    manifest = _run(tmp_path/'run', data_root=root, categories='E1')
    assert manifest['errors']['media'] == manifest['n'] > 0
    assert 'every one of them failed' in (tmp_path/'run'/'figures'/'scenarios.svg').read_text(encoding='utf-8')


def test_wrong_value_is_named(tmp_path):
    done = subprocess.run(_command(tmp_path, views='top'), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "views='top' is unknown; valid ones are normal, single, dog+, drone+" in done.stderr


def test_help_names_every_parameter():
    done = subprocess.run([sys.executable, '-m', 'papermill', '--help-notebook', str(NOTEBOOK)], capture_output=True, text=True)
    for name in ('model', 'data_root', 'out', 'seed', 'limit', 'batch_size', 'nproc', 'shots', 'views', 'judge'):
        assert f'{name}: ' in done.stdout, f'{name} is not explained'


@pytest.mark.papers
def test_real_annotations_with_stand_in_frames(tmp_path):
    data = ROOT.parent/'shared'/'data'/'mmwalk'
    if not data.exists(): pytest.skip(f'the real annotations are not at {data.relative_to(ROOT.parent)}')
    root = tmp_path/'data'
    root.mkdir()
    for part in ('test_data_chat', 'finetune_related'): os.symlink(data/part, root/part)
    frames = [sys.executable, '-c', 'from vlm_repro.cli import main; raise SystemExit(main())', 'data', 'frames', 'mmwalk', '--root', str(root), '-p', 'shots', '3', '-p', 'limit', '10']
    subprocess.run(frames, check=True, capture_output=True)
    manifest = _run(tmp_path/'run', data_root=root, shots=3, limit=10)
    assert manifest['n'] == 90 and not manifest['errors']
    assert manifest['data']['release'] == 'v2' and 'stand-in' in manifest['watermark']
