"FitCoach from data to table: whole runs, runs that were cut off, windows, failures with a label, files of others, bad input, and that its table of defects says what the code does."
import csv
import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fitcoach_files import START, add_session, features_of, make_checkpoint

from vlm_repro.core.adopted import score_files
from vlm_repro.core.assets import asset
from vlm_repro.core.jsonl import DataError
from vlm_repro.core.records import Generation, Request, from_row
from vlm_repro.core.tasks import get_task, make_settings
from vlm_repro.fitcoach.data import FOLDERS, LABELS
from vlm_repro.fitcoach.extraction import actions_in, by_published_clock, said_in
from vlm_repro.fitcoach.feature_store import extract_split, extractor_of, features_for
from vlm_repro.fitcoach.features import Made, note_of
from vlm_repro.fitcoach.prompt import read_texts, system_text
from vlm_repro.fitcoach.task import FitCoachSettings, load_clips, render_clips
from vlm_repro.fitcoach.timeline import clip_f
from vlm_repro.models.protocol import ModelError, load_model
from vlm_repro.models.stream import StreamModel
from vlm_repro.report.published import Cell, verdicts
from vlm_repro.train.paper import complete_run

TASK = get_task('fitcoach')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    import torch
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp('fitcoach')
    make_checkpoint(home/'checkpoint')
    for id in ('0201', '0202'): add_session(home/'root', id)
    add_session(home/'root', '0203', coached=False)
    return home


@pytest.fixture
def root(place, tmp_path):
    "A root that a test may break."
    return Path(shutil.copytree(place/'root', tmp_path/'root'))


def settings_of(place, root=None, **more):
    return FitCoachSettings(**{'model': str(place/'checkpoint'), 'data_root': str(root or place/'root'), 'max_new_tokens': 4, 'meteor': False, **more})


def run_of(place, out, root=None, options=None, **more):
    settings = settings_of(place, root, **more)
    return complete_run(TASK, settings, load_model(settings.model, length=settings.length, windows=settings.windows, **(options or {})), out, 4)


def said(run): return {r['id']: from_row(Generation, r) for r in run.rows('predictions')}


@pytest.fixture(scope='module')
def run(place, tmp_path_factory): return run_of(place, tmp_path_factory.mktemp('run')/'run', bert='letters')


def test_a_run_is_whole(run):
    made = said(run)
    assert run.manifest['n'] == 4 == len(made) and not run.manifest['errors'] and run.manifest['provenance'] == {'paraphrase': 4}
    assert any(g.events for g in made.values()) and all(g.pixel_hash and g.text.startswith('<') for g in made.values())
    table = run.path('table.csv').read_text(encoding='utf-8')
    assert 'T-F' in table and 'as_published' in table and 'BERT (letter pairs@1)' in table and 'cannot be judged' in table


def test_tokens_are_read_by_two_clocks(run):
    for g in said(run).values():
        late = by_published_clock(g)
        assert [t for _, t in late] == [t for _, t in g.events] == [t for t in said_in(g.text) if t]
        if late: assert late[0][0] == pytest.approx((g.token_ids.index(actions_in(g.token_ids).answer) - 1)/4)
    read = [json.loads(r['value']) for r in run.rows('answers')]
    assert len(read) == 8 and [r['responses'] for r in read[:4]] == [r['responses'] for r in read[4:]] and all(a['timestamps'] != b['timestamps'] for a, b in zip(read[:4], read[4:]) if a['responses'])


@pytest.mark.parametrize('options', [{'run_ahead': False}, {'drafts': ['Nice work!', 'Go lower!']}])
def test_guesses_change_no_token(place, run, tmp_path, options):
    again = run_of(place, tmp_path/'run', options=options)
    assert {i: g.token_ids for i, g in said(again).items()} == {i: g.token_ids for i, g in said(run).items()}


_KILLED = '''
import os, signal, sys
from vlm_repro.core.tasks import get_task
from vlm_repro.fitcoach.task import FitCoachSettings
from vlm_repro.models.protocol import load_model
from vlm_repro.models.stream import StreamModel
from vlm_repro.report.published import Cell, verdicts
from vlm_repro.train.paper import complete_run
model, root, out = sys.argv[1:]
before, answer = [], StreamModel.answer
def dying(self, prepared, n):
    before.append(1)
    if len(before) == 3: os.kill(os.getpid(), signal.SIGKILL)
    return answer(self, prepared, n)
StreamModel.answer = dying
complete_run(get_task('fitcoach'), FitCoachSettings(model=model, data_root=root, max_new_tokens=4, meteor=False, bert='letters'), load_model(model), out, 1)
'''


@pytest.mark.slow
def test_a_killed_run_goes_on(place, run, tmp_path):
    done = subprocess.run([sys.executable, '-c', _KILLED, str(place/'checkpoint'), str(place/'root'), str(tmp_path/'run')], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    kept = (tmp_path/'run'/'predictions.jsonl').read_text().splitlines()
    assert len(kept) == 2 and not (tmp_path/'run'/'manifest.json').exists()
    again = run_of(place, tmp_path/'run', bert='letters')
    assert (tmp_path/'run'/'predictions.jsonl').read_text().splitlines()[:2] == kept
    assert {i: (g.token_ids, g.events) for i, g in said(again).items()} == {i: (g.token_ids, g.events) for i, g in said(run).items()}
    assert again.path('scores.jsonl').read_text() == run.path('scores.jsonl').read_text()


@pytest.mark.parametrize('windows', ['corrected', 'as_published'])
def test_windows_of_a_workout_are_one_answer(place, tmp_path, windows):
    held = run_of(place, tmp_path/'run', mode='full_workout_sliding_window', window=10., windows=windows)
    made, bounds = said(held), {r['id']: json.loads(r['meta']['windows']) for r in held.rows('samples')}
    assert set(made) == {'0201', '0202', '0203'} and not held.manifest['errors'] and all(len(b) == 3 for b in bounds.values())
    for id, g in made.items():
        times = [t for t, _ in g.events]
        assert times == sorted(times) and (not times or times[-1] <= bounds[id][-1][1] - bounds[id][0][0])
    assert max(t for g in made.values() for t, _ in g.events) > 10 # the second window is on the clock of the first
    assert not (held.path('upstream')/'challenge_2026.json').exists() and (held.path('upstream')/'challenge_2025.json').exists()


def test_a_whole_workout_has_announcements(place, tmp_path):
    held = run_of(place, tmp_path/'run', mode='full_workout')
    gold = {r['id']: json.loads(r['gold']) for r in held.rows('samples')}
    assert not held.manifest['errors'] and 'First up are squats!' in gold['0203'] and len(gold['0201']) == 6


def test_failures_have_a_label_and_the_others_go_on(place, root, tmp_path):
    add_session(root, '0204')
    add_session(root, '0205', channels=8)
    maps = np.load(features_of(root, '0202'))
    maps[30] = np.nan
    np.save(features_of(root, '0202'), maps)
    features_of(root, '0204').unlink()
    held = run_of(place, tmp_path/'run', root, features=str(root))
    why = {i: g.error for i, g in said(held).items() if g.error}
    assert {i[:4] for i in why} == {'0202', '0204', '0205'} and all(e.startswith('media: ') for e in why.values())
    assert 'no numbers' in why['0202/0'] and 'extract them first' in why['0204/0'] and 'extract' in why['0205/0']
    assert sum(not g.error for g in said(held).values()) == 3
    rows = held.rows('scores')
    silent = {r['id']: r['values'] for r in rows if (r['metric'], r['variant']) == ('temporal', 'as_published')}
    assert silent['0204/0'][2:] == [0, 0] and len(silent) == 8 # as published a failure is silence
    assert clip_f(rows).keys() == {i for i, g in said(held).items() if not g.error}


def test_features_of_another_network_are_not_taken(place, root, tmp_path):
    path = features_of(root, '0201')
    steps = len(np.load(path, mmap_mode='r'))
    note_of(path).write_text(json.dumps(Made('another', '0123456789abcdef', (6, 7, 5), steps, 'x', steps).__dict__))
    held = run_of(place, tmp_path/'run', root, features=str(root), limit=0)
    why = {i: g.error for i, g in said(held).items() if g.error}
    assert set(why) == {'0201/0', '0201/1'} and 'features of another extractor' in why['0201/0']
    data = load_clips(settings_of(place, root))
    assert 'cache' in features_for(data, str(place/'checkpoint'), progress=False).how # what is beside the videos is not believed either


def test_a_feedback_without_end_costs_its_film_only(place, run):
    model = load_model(str(place/'checkpoint'), length='as_published')
    model = replace(model, rules=replace(model.rules, cap=3))
    data = load_clips(settings_of(place))
    made = model.generate(render_clips(data, settings_of(place)), 4)
    spoke = {i for i, g in said(run).items() if any(len(t.split()) for _, t in g.events)}
    lost = {g.id for g in made if g.error}
    assert lost and lost <= spoke and all(g.error.startswith('bad_reply: ') for g in made if g.error)


def test_a_stream_that_is_too_long_says_so(place):
    requests = render_clips(load_clips(settings_of(place, mode='full_workout')), settings_of(place, mode='full_workout'))
    made = load_model(str(place/'checkpoint'), max_model_len=60).generate(requests, 4)
    assert {g.error.split(':')[0] for g in made} == {'overflow'}


def test_files_of_the_evaluator_and_back(place, run, tmp_path):
    folder = run.path('upstream')
    pairs = json.loads((folder/'feedbacks.json').read_text())
    assert all(set(p) == {'GT', 'Pred'} for p in pairs)
    full = json.loads((folder/'corrected_full.json').read_text())
    assert {r['id'] for r in full} == set(said(run)) and sum(len(r['pred_feedbacks']) for r in full) == sum(len(g.events) for g in said(run).values())
    again = score_files('fitcoach', folder/'challenge_2026.json', tmp_path/'run', data_root=str(place/'root'), meteor=False)
    again.close()
    assert clip_f(again.rows('scores')) == clip_f(run.rows('scores'))
    with pytest.raises(ValueError, match='cannot be said'): score_files('fitcoach', folder/'challenge_2026.json', tmp_path/'other', limit=3)
    (tmp_path/'part.json').write_text(json.dumps(json.loads((folder/'challenge_2026.json').read_text())[1:]))
    with pytest.raises(DataError, match='nothing is said of 0201/0'): score_files('fitcoach', tmp_path/'part.json', tmp_path/'third', data_root=str(place/'root'))


def test_a_clock_of_another_video_is_named(place, root):
    from vlm_repro.core.video import write_clip
    for id in ('0201', '0202', '0203'): features_of(root, id).unlink()
    folder = root/FOLDERS['test']/'long_range_videos'
    for id, n in (('0201', 40), ('0202', 700)): write_clip(folder/f'{id}.mp4', [np.full((48, 64, 3), k % 250, np.uint8) for k in range(n)], 30)
    store = extract_split(root, str(place/'checkpoint'), progress=False)
    assert {x.name: x.state for x in store.made} == {'0201': 'made', '0202': 'failed', '0203': 'failed'} and '700 frames' in store.failed['0202']
    assert [x.state for x in extract_split(root, str(place/'checkpoint'), progress=False).made][0] == 'there'


def test_features_of_others_are_never_overwritten(place, root):
    before = features_of(root, '0201').read_bytes()
    store = extract_split(root, str(place/'checkpoint'), progress=False)
    assert set(store.failed) == {'0201', '0202', '0203'} and features_of(root, '0201').read_bytes() == before


def test_spans_and_time_stamps_that_differ(place, root, tmp_path):
    path = root/FOLDERS['test']/LABELS
    records = json.loads(path.read_text())
    records[0]['feedback_timestamps'].pop()
    path.write_text(json.dumps(records))
    data = load_clips(settings_of(place, root))
    assert [s.meta['video'] for s in data.samples] == ['0202', '0202'] and 'spans_differ' in {p.label for p in data.problems}


def test_a_session_without_feedback_has_no_clip_and_one_workout(place):
    assert '0203' not in {s.meta['video'] for s in load_clips(settings_of(place)).samples}
    assert '0203' in {s.id for s in load_clips(settings_of(place, mode='full_workout')).samples}
    assert 'no_feedback' in {p.label for p in load_clips(settings_of(place)).problems}


def test_the_folders_own_files_choose_the_backend(place, tmp_path):
    assert isinstance(load_model(str(place/'checkpoint')), StreamModel)
    with pytest.raises(ModelError, match='unknown model option max_pixels'): load_model(str(place/'checkpoint'), max_pixels=3)
    broken = Path(shutil.copytree(place/'checkpoint', tmp_path/'broken'))
    (broken/'cnn.safetensors').unlink()
    with pytest.raises(ModelError, match='cnn.safetensors'): load_model(str(broken))


def test_drawn_tokens_do_not_depend_on_the_batch(place):
    requests = render_clips(load_clips(settings_of(place)), settings_of(place))
    drawn = lambda asked, **more: {g.id: g.token_ids for g in load_model(str(place/'checkpoint'), temperature=1.5, **more).generate(asked, 4)}
    whole = drawn(requests)
    assert whole == {i: t for r in requests[::-1] for i, t in drawn([r]).items()} and whole != drawn(requests, seed=1)


def test_requests_that_show_no_film(place):
    model = load_model(str(place/'checkpoint'))
    text, image = {'type': 'text', 'text': 'coach'}, {'type': 'image', 'image': 'a.png'}
    made = model.generate([Request('none', [{'role': 'user', 'content': [text]}], ''), Request('image', [{'role': 'user', 'content': [text, image]}], '')], 4)
    assert 'no film' in made[0].error and 'not image' in made[1].error
    data = load_clips(settings_of(place))
    far = replace(data.samples[0], meta={**data.samples[0].meta, 'start': repr(START), 'end': repr(START + 5)})
    assert 'not on one clock' in model.generate([render_clips(replace(data, samples=(far,)), settings_of(place))[0]], 4)[0].error


@pytest.mark.parametrize('wrong, why', [({'mode': 'half'}, 'full_workout'), ({'split': 'val'}, 'competition'), ({'length': 'long'}, 'as_published'), ({'limit': -1}, '0 or more'), ({'window': 0.}, 'above 0'),
                                        ({'split': 'competition', 'mode': 'full_workout'}, 'single_exercise'), ({'model': 'openai:gpt-4o'}, 'take no stream'), ({'modes': 'all'}, 'no parameter')])
def test_wrong_settings(wrong, why):
    with pytest.raises(ValueError, match=why): make_settings(TASK, wrong)


def test_wrong_inputs_are_found_before_anything_is_asked(tmp_path):
    (tmp_path/'judge.txt').write_text('Grade.\n---\n<1>')
    for wrong, why in (({'row': 'Stream-VLM 2'}, 'Stream-VLM w/o 3D CNN'), ({'judge_texts': 'x.txt'}, 'name one'), ({'bert': 'some/encoder'}, 'give layer='), ({'texts': str(tmp_path/'none.json')}, 'no JSON file'),
                       ({'judge': 'openai:x', 'judge_texts': str(tmp_path/'judge.txt')}, 'lacks <2>')):
        with pytest.raises(ValueError, match=why): TASK.check(FitCoachSettings(**wrong))


def test_prompts_of_a_reader(tmp_path):
    (tmp_path/'texts.json').write_text(json.dumps({'single_exercise': 'Coach {exercise_name}.'}))
    assert system_text('single_exercise', 'lunges', read_texts(str(tmp_path/'texts.json'))) == 'Coach lunges.'
    (tmp_path/'odd.json').write_text(json.dumps({'one_exercise': 'x'}))
    with pytest.raises(DataError, match='own_video'): read_texts(str(tmp_path/'odd.json'))


def test_only_the_papers_counts_are_the_papers_data():
    about = {'release': 'unknown', 'n': 398, 'videos': 73, 'left_out': 0, 'asked': 398}
    assert TASK.eligibility(FitCoachSettings(), about, ['verbatim']).data == 'paper'
    assert TASK.eligibility(FitCoachSettings(), {**about, 'n': 397}, ['verbatim']).data == 'changed'
    assert TASK.eligibility(FitCoachSettings(), {**about, 'release': 'world'}, ['verbatim']).data == 'world'
    may = TASK.eligibility(FitCoachSettings(row='Stream-VLM'), {**about, 'asked': 3}, ['verbatim'])
    assert may.model == 'Stream-VLM' and may.split == 'benchmark, 3 of 398'


def test_features_lie_within_the_activation(place):
    maps = extractor_of(str(place/'checkpoint'), 'cpu')(np.random.default_rng(0).random((5, 4, 3, 224, 160), np.float32))
    assert maps.shape == (5, 6, 7, 5) and maps.min() == 0 and maps.max() <= 6 and maps.std() > 0


with asset('fitcoach/defects.csv').open(encoding='utf-8', newline='') as file: ROWS = list(csv.DictReader(file))


def test_the_table_of_defects_is_whole():
    assert list(ROWS[0]) == ['id', 'stage', 'what happens', 'switch', 'default', 'test']
    assert [r['id'] for r in ROWS] == [f'fitcoach-{i:02d}' for i in range(1, len(ROWS) + 1)] and len(ROWS) == 24
    assert {r['stage'] for r in ROWS} == {'data', 'model', 'generate', 'extract', 'score', 'training'} and all(all(r.values()) for r in ROWS)


@pytest.mark.parametrize('row', [r for r in ROWS if r['switch'].endswith(' as_published') and not r['switch'].startswith('variant')], ids=lambda r: r['id'])
def test_switches_of_a_run_are_corrected_by_default(row):
    name = row['switch'].split()[0]
    assert getattr(FitCoachSettings(), name) == 'corrected' and getattr(FitCoachSettings(**{name: 'as_published'}), name) == 'as_published'


def test_released_rows_are_the_papers():
    printed = {(p.row, p.column): p for p in TASK.published(FitCoachSettings()) if p.table == 'fine-tuned'}
    assert {c: printed['Stream-VLM', c].value for c in ('METEOR', 'ROUGE-L', 'BERT', 'LLM-Acc', 'T-F')} == {'METEOR': .127, 'ROUGE-L': .112, 'BERT': .863, 'LLM-Acc': 2.45, 'T-F': .56}
    assert len({r for r, _ in printed if r.startswith('Stream-VLM w/o')}) == 3 and printed['Stream-VLM, released code', 'BERT'].value == .862


def test_a_run_on_the_papers_data_is_judged():
    cell = Cell('fine-tuned', 'Stream-VLM', 'T-F', 'temporal', 'as_published', .565, '0-1', .53, .60, 398, 0, 73, 'video')
    about = {'release': 'unknown', 'n': 398, 'videos': 73, 'left_out': 0, 'asked': 398}
    settings = FitCoachSettings(row='Stream-VLM', judge='meta-llama/Meta-Llama-3-70B-Instruct')
    judged = lambda value, words: verdicts([replace(cell, value=value)], TASK.published(settings), TASK.eligibility(settings, about, [words]))[0]
    assert judged(.565, 'verbatim').status == 'reproduced' and judged(.59, 'verbatim').status == 'close' and judged(.565, 'paraphrase').status == 'cannot be judged'
