"""The FitCoach world: official files that the loader reads, clocks of the right kind, feedback that follows from the movements, figures inside what the network sees."""
import json

import numpy as np
import pytest

from vlm_repro.core.video import read_frames, video_info
from vlm_repro.fitcoach.annotations import SHORT_FILES
from vlm_repro.fitcoach.clock import OFFSET, read_clock
from vlm_repro.fitcoach.coach import GOODBYE, NOTICED, QUICK, SLOW, TEMPO, kinds_of, sample_names, sample_workout
from vlm_repro.fitcoach.data import FOLDERS, LABELS, MARKER, SHORT_FOLDER, load, load_short
from vlm_repro.fitcoach.figure import EXERCISES, HEIGHT, INNER, Look, Rep, draw_figure, joints_of, pose, pose_at, sample_look
from vlm_repro.fitcoach.frames import LAST_SIDEWAYS, SHAPE, frame_pixels, is_sideways, plan_steps
from vlm_repro.fitcoach.tiny_data import HELD_OUT, TRAINED
from vlm_repro.fitcoach.windows import MODES
from vlm_repro.fitcoach.world import VIDEOS, Size, build_world, plan, plan_short, record_of, world_digest

SMALL = Size(3, 1, 2, (3., 4.), train_seconds=(3., 4.))


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp('worlds')/'world', 5, SMALL, workers=1)


def records(root, split): return json.loads((root/FOLDERS[split]/LABELS).read_text(encoding='utf-8'))


def test_records_have_the_official_fields_and_units(root):
    for split, n in (('test', 3), ('train', 1)):
        held = records(root, split)
        assert len(held) == n
        for r in held:
            assert set(r) == {'long_range_video_file', 'video_timestamps', 'feedbacks', 'feedback_timestamps', 'is_transition'}
            raw = np.load(root/FOLDERS[split]/r['video_timestamps'])
            assert raw.dtype == np.int64 and len(raw) == len(r['feedbacks']) == video_info(root/FOLDERS[split]/r['long_range_video_file']).frames
            assert 0 <= r['feedback_timestamps'][0] - (raw[0]/1e9 + OFFSET) < 10
            assert sum(r['is_transition']) == (7 if split == 'test' else 4) and r['is_transition'][0] and r['is_transition'][-1] and r['feedbacks'][-1] == ''


@pytest.mark.parametrize('mode', MODES)
def test_the_loader_reads_every_mode(root, mode):
    for split, expected in (('test', {'no_feedback'}), ('train', {'odd_blanks', 'odd_exercises'})):
        data = load(root, split, mode)
        assert data.watermark and {p.label for p in data.problems} <= expected and not any(p.dropped for p in data.problems)
        assert {s.meta['video'] for s in data.samples} == {r.id for r in plan(5, SMALL) if r.split == split and (mode != 'single_exercise' or any(not e.transition for e in r.workout.events))}


def test_texts_stand_at_the_frames_of_their_moment(root):
    for r in plan(5, SMALL):
        record = record_of(r, 0.)
        shown = [(i, t) for i, t in enumerate(record['feedbacks']) if t and (not i or record['feedbacks'][i - 1] != t)]
        assert len(shown) == len(r.workout.events)
        for (i, _), e in zip(shown, r.workout.events):
            assert r.times[i - 1] < e.at <= r.times[i]


def test_one_session_lies_on_its_side_and_one_is_silent():
    held = list(plan(3, Size(5, 2, 0)))
    assert [int(r.id) <= LAST_SIDEWAYS for r in held] == [True] + [False]*6
    assert [all(e.transition for e in r.workout.events) for r in held] == [False, False, True] + [False]*4
    assert not any(is_sideways(f'{r.id}.mp4') for r in plan(3, Size(2, 0, 0, sideways=False)))


def test_the_exercise_that_is_new_to_the_tiny_checkpoint_is_in_every_session_and_changes_no_world_without_it():
    held = list(plan(3))
    assert sum(r.split == 'test' and any(not e.transition for e in r.workout.events) for r in held) >= 6 and sum(r.split == 'train' for r in held) >= 6
    assert all(HELD_OUT[0] in r.workout.exercises and len(set(r.workout.exercises)) == (6 if r.split == 'test' else 3) for r in held)
    other = plan(3, Size(2, 2, 0, exercises=TRAINED, train_exercises=6)), plan(3, Size(2, 2, 0, exercises=TRAINED, always='', train_exercises=6))
    assert all(a.workout == b.workout and len(a.workout.exercises) == 6 and HELD_OUT[0] not in a.workout.exercises for a, b in zip(*other, strict=True))


def test_the_deltoid_stretch_goes_by_its_other_name_in_the_files(root):
    names = {name for split in ('test', 'train') for s in load(root, split).samples for name in json.loads(s.meta['exercises'])}
    texts = {t for split in ('test', 'train') for r in records(root, split) for t in r['feedbacks']}
    assert 'deltoid stretch' in names and any('armcrosschest' in t for t in texts) and not any('deltoid' in t for t in texts)


def test_short_clips_have_three_files_and_a_video_each(root):
    kinds = {(c.exercise.name, c.kind) for c in plan_short(5, Size(short=34))}
    assert kinds == {(name, k) for name, e in EXERCISES.items() for k in kinds_of(e)} and len(kinds) == 32
    for name in SHORT_FILES:
        clips, problems = load_short(root, name)
        assert len(clips) == 2 and not problems
    assert all(video_info(root/SHORT_FOLDER/c.video).frames == len(read_clock(root/SHORT_FOLDER/c.video.replace('.mp4', '_timestamps.npy'))) for c in clips)


def test_what_is_decoded_is_what_was_drawn(root):
    for r in plan(5, SMALL):
        path = root/FOLDERS[r.split]/VIDEOS/f'{r.id}.mp4'
        steps = plan_steps(r.times, len(r.times))
        i = int(steps.groups[len(steps.groups)//2, -1])
        seen = frame_pixels(np.asarray(read_frames(path, [i])[0]), is_sideways(str(path))).transpose(1, 2, 0)
        drawn = np.asarray(draw_figure(*pose_at(r.workout.reps, r.times[i]), r.workout.look, INNER))/255
        assert drawn.shape == (*SHAPE, 3) and np.abs(seen - drawn)[:, 18:-18].mean() < .03
        assert (seen[:, :16].max() < .1) == r.sideways


def test_a_sideways_session_is_drawn_as_an_upright_one_with_black_beside_it(root):
    r = next(iter(plan(5, SMALL)))
    info = video_info(root/FOLDERS['test']/VIDEOS/f'{r.id}.mp4')
    assert r.sideways and (info.width, info.height) == (224, 126)


@pytest.mark.parametrize('name', EXERCISES)
def test_figures_stay_inside_the_crop_and_mistakes_show(name):
    e, rng = EXERCISES[name], np.random.default_rng(0)
    plain = Look((9, 9, 9), (9, 9, 9), (255,)*3, (255,)*3, (255,)*3, window=500)
    for kind in ('', *e.mistakes):
        for amount in (0., .5, 1.):
            for _ in range(4):
                l = sample_look(rng)
                image = np.asarray(draw_figure(pose(e, amount, mistake=kind), e.yaw, Look(**{**plain.__dict__, 'yaw': l.yaw, 'scale': l.scale, 'shift': l.shift}), INNER))
                body = np.argwhere(image.max(2) > 150)
                assert body[:, 0].min() > 4 and body[:, 0].max() < HEIGHT - 4 and 55 < np.ptp(body, 0).max()
                assert (body[:, 1].min() > 0 and body[:, 1].max() < INNER - 1) or (name == 'side bends' and amount)
    well, wrong = (np.asarray(draw_figure(pose(e, 1., mistake=k), e.yaw, width=INNER), int) for k in ('', next(iter(e.mistakes))))
    assert (np.abs(well - wrong).max(2) > 40).sum() > 250


@pytest.mark.parametrize('seed', range(6))
def test_the_coach_says_what_is_done(seed):
    rng = np.random.default_rng(seed)
    w = sample_workout(rng, sample_names(rng))
    assert len(w.exercises) == len(set(w.exercises)) == 6 and w.events[-1].text == GOODBYE
    dones = {round(r.done + NOTICED, 6): r for r in w.reps}
    count, current = 0, None
    for e in w.events[:-1]:
        if e.transition: current, count, last = e.text, 0, None; continue
        rep = dones[round(e.at, 6)]
        assert current.endswith(f'{rep.exercise.name}!')
        if rep.kind in rep.exercise.mistakes: assert e.text in (rep.exercise.mistakes[rep.kind].text, rep.exercise.mistakes[rep.kind].again)
        elif rep.kind in TEMPO: assert e.text in TEMPO[rep.kind] and rep.exercise.period
        elif rep.exercise.period: assert e.text in rep.exercise.praise
        else: assert e.text == str(count := count + 1)
        if rep.exercise.period: assert rep.kind != last
        last = rep.kind


def test_a_mistake_changes_the_body_and_not_only_its_name():
    heads = {k: joints_of(pose(EXERCISES['squats'], 1., mistake=k))['head'][1] for k in ('', 'shallow')}
    hands = {k: joints_of(pose(EXERCISES['jumping jacks'], 1., mistake=k))['l_hand'][1] for k in ('', 'low arms')}
    assert heads['shallow'] > heads[''] + .15 and hands[''] > hands['low arms'] + .2
    reps = [r for seed in range(4) for r in sample_workout(np.random.default_rng(seed), ['squats', 'lunges'], (60., 61.)).reps if r.exercise.name == 'squats']
    quick, well, slow = (np.mean([r.done - r.begin for r in reps if r.kind == k]) for k in (QUICK, '', SLOW))
    assert quick < .7*well < .7*.7*slow


def test_a_world_is_the_same_every_time_and_never_mistaken_for_another(root, tmp_path):
    again = build_world(tmp_path/'again', 5, SMALL, workers=2)
    files = sorted(p.relative_to(root) for p in root.rglob('*') if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob('*') if p.is_file()) and all((root/f).read_bytes() == (again/f).read_bytes() for f in files)
    assert json.loads((root/MARKER).read_text())['digest'] == world_digest(5, SMALL) != world_digest(5, Size(3, 1, 2, (3., 5.), train_seconds=(3., 4.)))
    (tmp_path/'other').mkdir()
    (tmp_path/'other'/'file').write_text('x')
    with pytest.raises(FileExistsError): build_world(tmp_path/'other', 5, SMALL)


def test_poses_between_exercises_are_continuous():
    reps = [Rep(EXERCISES['squats'], 0., 1., 0., 1.), Rep(EXERCISES['push-ups'], 2.9, 1., 1., 1.)]
    times = np.arange(0, 6, .01)
    tracks = [{n: pose_at(reps, t)[0].get(n, 0.) for n in ('pitch', 'l_flex', 'l_hip', 'l_elbow')} for t in times]
    assert max(abs(b[n] - a[n]) for a, b in zip(tracks, tracks[1:]) for n in a) < 4
