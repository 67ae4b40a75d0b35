"""The shipped tiny Stream-VLM: what its table says, that it sees on a small world it never met, and that lessons are what inference will ask."""
import csv
import json

import numpy as np
import pytest
import torch

from vlm_repro.core.assets import asset
from vlm_repro.fitcoach.can_see import can_see, controls, counts_of, hits_of, in_rhythm, seen_files
from vlm_repro.fitcoach.coach import sample_workout
from vlm_repro.fitcoach.figure import EXERCISES
from vlm_repro.fitcoach.match import Timed, temporal_f
from vlm_repro.fitcoach.model import Eyes, load_stream_vlm
from vlm_repro.fitcoach.prompt import system_text
from vlm_repro.fitcoach.tiny_data import HELD_OUT, TRAINED, Coached, coach_tokenizer, coached, question_of, seen, tasks_of, texts_of
from vlm_repro.fitcoach.tiny_training import Recipe, build_coach, lessons_of, speak_steps
from vlm_repro.fitcoach.tiny_vision import JUST, KINDS, NAMES, DrawnFilm, Heads, maps_of, sample_film, see_loss, truth_of
from vlm_repro.fitcoach.windows import MODES
from vlm_repro.fitcoach.world import Size, build_world, plan
from vlm_repro.models.protocol import tiny_checkpoint
from vlm_repro.train.render import IGNORED

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def shipped(): return load_stream_vlm(tiny_checkpoint('fitcoach'))


@pytest.fixture(scope='module')
def session(): return seen(Eyes(.05, 16).build(), next(iter(plan(3, Size(0, 1, 0, exercises=TRAINED, train_exercises=6, train_seconds=(4., 5.))))))


def test_table_beside_the_weights():
    with asset('tiny/fitcoach/can_see.csv').open(newline='') as f: rows = list(csv.DictReader(f))
    assert {'moments of feedback, T-F', 'names of exercises'} <= {r['group'] for r in rows}
    for r in rows:
        if r['setting'].endswith('corrected clock'): assert float(r['lower']) > max(float(r[k]) for k in ('constant', 'blank', 'shuffled')) and int(r['clusters']) >= 20
    assert max(int(r['n']) for r in rows) >= 300


def test_card_and_size(shipped):
    folder = tiny_checkpoint('fitcoach')
    card = json.loads((folder/'card.json').read_text())
    assert tuple(card['left_out_exercises']) == HELD_OUT and set(card['trained_exercises']) == set(TRAINED) and set(HELD_OUT) | set(TRAINED) == set(EXERCISES)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 6e6
    assert shipped.net.config.looking and shipped.eyes.width == shipped.net.config.looking['feature'] and type(shipped.net).__name__ == 'LlamaForCausalLM'


def test_it_sees_moments_words_and_names(shipped):
    held = [seen(shipped.cnn, r) for r in list(plan(1234, Size(2, 0, 0, (7., 8.), TRAINED)))]
    shown = controls(held)
    f = {k: float(temporal_f(sum(counts_of(coached(shipped, h), lambda c: c.said) for h in (v if k == 'true' else v[:1])))) for k, v in shown.items()}
    assert f['true'] > .7 and f['true'] > max(f['blank'], f['shuffled']) + .15
    named = [hit for h in held[:1] for c in coached(shipped, h, MODES[2]) for hit, t in zip(hits_of(c, lambda c: c.said), c.true.texts) if t.startswith(('First up', 'Moving on'))]
    assert len(named) == 6 and np.mean(named) > .5


@pytest.mark.slow
def test_decoded_videos_give_the_same(shipped, tmp_path):
    size = Size(3, 0, 0, (8., 10.), TRAINED)
    held = seen_files(shipped.cnn, shipped.eyes.width, build_world(tmp_path/'world', 1234, size))
    f = {k: float(temporal_f(sum(counts_of(coached(shipped, h), lambda c: c.said) for h in v))) for k, v in controls(held).items()}
    assert f['true'] > .7 and f['true'] > max(f['blank'], f['shuffled']) + .15


def test_words_are_whole_and_the_left_out_exercise_is_in_no_text():
    tokenizer = coach_tokenizer()
    for text in texts_of():
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert not any(name in text for name in HELD_OUT)
    assert len(tokenizer('<vision><answer><answer/>').input_ids) == 3


@pytest.mark.parametrize('mode', MODES)
def test_lessons_end_where_inference_ends(session, mode):
    model = build_coach()
    for task in tasks_of(model, session, mode):
        assert max(task.lesson.steps) == len(task.film) - 1 and task.lesson.ids[:1] == (model.tokenizer.bos_token_id,)
        said = [t for t, y in zip(task.lesson.ids, task.lesson.labels) if y != IGNORED]
        assert sum(t == model.actions.vision for t in said) == len(task.film) - 1
        begin = model.prompt_ids(system_text(mode, 'x' if mode == MODES[0] else ['x']))[:12]
        assert list(task.lesson.ids[:12]) == begin


def test_windows_carry_the_window_before_them(session):
    model = build_coach()
    first, second = tasks_of(model, session, MODES[2], 10.)[:2]
    prompt = [i for i, y in zip(first.lesson.ids, first.lesson.labels) if y == IGNORED]
    assert second.lesson.ids[len(prompt) - 1:][:len(first.lesson.ids) - len(prompt)] == first.lesson.ids[len(prompt):]


def test_questions_are_asked_inside_an_exercise(session):
    model = build_coach()
    for k in range(5):
        task = question_of(model, session, np.random.default_rng(k))
        answer = model.tokenizer.decode([t for t, y in zip(task.lesson.ids, task.lesson.labels) if y != IGNORED])
        name = answer.split('<answer>')[1].removesuffix('<answer/>')
        assert name in TRAINED and answer.rstrip().endswith('<answer/>')


def test_truth_follows_the_repetitions():
    film = sample_film(np.random.default_rng(1), seconds=(6., 7.))
    truth, times = truth_of(film.workout, film.steps.times), film.steps.times
    for rep in film.workout.reps:
        if rep.exercise.name == 'waving': continue
        just = (times - rep.done > JUST[0]) & (times - rep.done < JUST[1])
        assert just.any() and truth.moments[just, 1].all()
        later = [r for r in film.workout.reps if r.done > rep.done]
        alone = just & (times < (later[0].done if later else np.inf))
        assert {KINDS[k] for k in truth.kind[alone]} <= {(rep.exercise.name, rep.kind)}
    assert {NAMES[i] for i in truth.exercise if i != IGNORED} == {*film.workout.exercises, 'waving'}


def test_streamed_maps_do_not_depend_on_the_piece():
    net, film = Eyes(.05, 16).build(), sample_film(np.random.default_rng(2), seconds=(2., 3.), n=2)
    film = DrawnFilm(film.workout, film.clock[:150])
    assert torch.allclose(maps_of(net, film, 1), maps_of(net, film, 8), atol=1e-4)


def test_a_step_of_either_stage_learns(session):
    model = build_coach(Recipe(width=16))
    lessons = lessons_of(model, [session])
    losses = [r['loss'] for r in speak_steps(model, {'question': lessons['question']}, {'question': 1.}, 0, 6, 3e-3, 1.)]
    assert losses[-1] < losses[0]
    heads, film = Heads(16), sample_film(np.random.default_rng(2), seconds=(2., 3.), n=2)
    truth = truth_of(film.workout, film.steps.times[:4])
    parts = see_loss(heads(torch.rand(4, 16, 7, 5)), truth)
    assert all(torch.isfinite(v) for v in parts.values())


def test_constants_and_hits():
    clip = Coached(Timed(('a', 'b'), (2., 6.)), Timed(('a', 'x'), (2.4, 5.)), Timed(('b',), (6.,)))
    assert hits_of(clip, lambda c: c.said).tolist() == [1., 0.] and hits_of(clip, lambda c: c.published).tolist() == [0., 1.]
    assert counts_of([in_rhythm(clip, 2., 7.)], lambda c: c.said).tolist() == [2., 2., 2., 3.]


def test_idle_sessions_ask_for_silence():
    workout = sample_workout(np.random.default_rng(0), list(TRAINED)[:6], (5., 6.), idle=True)
    film = DrawnFilm(workout, np.arange(0, workout.seconds, .04))
    truth = truth_of(workout, film.steps.times)
    assert (truth.kind != IGNORED).sum() < .25*len(film)


@pytest.mark.papers
def test_the_table_can_be_measured_again():
    lines = can_see()
    with asset('tiny/fitcoach/can_see.csv').open(newline='') as f: rows = list(csv.DictReader(f))
    assert all(line.sees for line in lines) and [line.setting for line in lines] == [r['setting'] for r in rows]
    assert all(abs(line.accuracy - float(r['accuracy'])) < .03 for line, r in zip(lines, rows))
