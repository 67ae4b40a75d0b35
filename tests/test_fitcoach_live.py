"""FitCoach live: films that break off, clocks of every kind, and a coach that is too slow, all of them reported."""
import time

import numpy as np
import pytest
import torch
import transformers as hf

from vlm_repro.core.media import MediaError
from vlm_repro.core.video import write_clip
from vlm_repro.fitcoach.actions import Rules, add_actions
from vlm_repro.fitcoach.cross_attention import Looking
from vlm_repro.fitcoach.decode import plain_stream, stream_prompt
from vlm_repro.fitcoach.frames import plan_steps
from vlm_repro.fitcoach.live import Coach, LiveReport, coach, paced, video_frames
from vlm_repro.fitcoach.model import Eyes, stream_vlm
from vlm_repro.models.tiny import learn_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def talker():
    "The one of some models with random weights that says most of noise."
    tokenizer = learn_tokenizer(['keep your back straight', 'lower your hips'] * 20, 300, r' ?\p{L}+|\d|\s', ('<s>', '<|endoftext|>', '<|im_end|>'), {}, 4096)
    a = add_actions(tokenizer)
    config = hf.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=.4)
    noise, said = torch.rand(10, 35, 8, generator=torch.Generator().manual_seed(0))*6, []
    for seed in range(12):
        model = stream_vlm(config, tokenizer, Looking((0,), feature=8), Eyes(1/16, 8), seed)
        with torch.no_grad():
            head = model.net.lm_head.weight
            head[a.vision] *= 3
            head[a.answer] = head[a.vision] + 3*head[a.answer]
        tokens = plain_stream(model.net, stream_prompt([5], a), noise, Rules(a, 4)).tokens
        said.append((sum(t < a.vision for t in tokens), seed, model))
    return max(said, key=lambda s: s[:2])[2]


@pytest.fixture(scope='module')
def film(tmp_path_factory):
    "A file of 40 pictures."
    pictures = [np.full((64, 48, 3), 5*k, np.uint8) for k in range(40)]
    return write_clip(tmp_path_factory.mktemp('films')/'film.mp4', pictures, 20, 4)


def asked(model): return stream_prompt([5], model.actions), Rules(model.actions, 4)


def test_a_film_that_ends_before_its_clock_keeps_what_was_said(talker, film):
    whole, short = (coach(talker, video_frames(film, np.arange(n)/20), *asked(talker)) for n in (40, 50))
    assert whole.error == '' and whole.steps == 8 and whole.tokens == short.tokens
    assert short.error == 'media: film.mp4: ends behind frame 40, its clock goes on to frame 50'


def test_a_film_that_is_longer_than_its_clock_stops_there(talker, film):
    report = coach(talker, video_frames(film, np.arange(20)/20), *asked(talker))
    assert 'more frames than the 20 times' in report.error and report.steps == 4


def test_a_torn_file_and_one_without_pictures_say_so(talker, film, tmp_path):
    torn, empty, words = tmp_path/'torn.mp4', tmp_path/'empty.mp4', tmp_path/'words.mp4'
    torn.write_bytes(film.read_bytes()[:len(film.read_bytes())//2])
    empty.write_bytes(b'')
    words.write_text('no video at all')
    for path in (torn, empty, words, tmp_path/'absent.mp4'):
        report = coach(talker, video_frames(path), *asked(talker))
        assert report.error.startswith(f'media: {path.name}: breaks off behind frame 0') and report.tokens == () and report.real_time_factor == 0
    with pytest.raises(MediaError): list(video_frames(torn))


def test_a_camera_that_fails_in_the_middle_leaves_its_report(talker):
    def camera():
        yield from ((np.full((64, 48, 3), 9*k, np.uint8), k/20) for k in range(20))
        raise MediaError('camera', 'unplugged')
    told = []
    report = coach(talker, camera(), *asked(talker), say=told.append)
    assert report.error == 'media: camera: unplugged' and report.steps == 4 and told == report.feedbacks


def test_a_clock_that_stutters_gives_the_steps_of_the_plan(talker):
    rng = np.random.default_rng(3)
    times = 1_700_000_000 + np.concatenate([[0.], np.cumsum(rng.uniform(1/26, 1/15, 60) + (rng.random(60) < .1)*.3)])
    report = coach(talker, ((np.full((64, 48, 3), k, np.uint8), t) for k, t in enumerate(times)), *asked(talker))
    plan = plan_steps(times, len(times))
    assert report.steps == len(plan.times) and report.film_s == pytest.approx(times[-1] - times[0])
    assert {f.at for f in report.feedbacks} <= set(plan.times)


@pytest.mark.parametrize('times', [(0., .1, .05), (0., float('nan'))])
def test_a_clock_that_goes_back_is_refused(talker, times):
    with pytest.raises(ValueError, match='only goes forward'): coach(talker, ((np.zeros((64, 48, 3), np.uint8), t) for t in times), *asked(talker))


def test_a_slow_model_is_behind_and_its_feedback_late(talker, monkeypatch):
    "An eighth of a second a call, several calls a step, a quarter of a second a step: what is late adds up, in the account and in the latency of each feedback."
    frames = [(np.full((64, 48, 3), 6*k, np.uint8), k/16) for k in range(20)]
    quick = coach(talker, paced(frames), *asked(talker))
    at_work = Coach(talker, *asked(talker))
    read = at_work.reader.read
    monkeypatch.setattr(at_work.streams.reader, 'read', lambda pieces: time.sleep(.12) or read(pieces))
    for frame in paced(frames): at_work.take(*frame)
    slow = at_work.report
    assert slow.tokens == quick.tokens and slow.feedbacks
    assert not slow.keeps_up and slow.late_s > .5 and slow.latest_s >= slow.late_s and slow.real_time_factor > 1.2
    assert slow.latency > .5 and slow.cpu_factor < slow.real_time_factor
    assert quick.film_s == slow.film_s and quick.late_s < slow.late_s


def test_a_report_of_nothing_keeps_up(): assert LiveReport().keeps_up and LiveReport().cpu_factor == 0
