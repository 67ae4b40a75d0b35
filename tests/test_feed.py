"""Batches prepared ahead of the device: order, bounds, errors, and the same answers as without."""
import json
import threading
import time

import pytest
import torch

from vlm_repro.core.generate import answer_batches, generate
from vlm_repro.core.manifest import speed
from vlm_repro.core.peaks import PEAKS, Work, peak_shares
from vlm_repro.core.pipeline import Feed, Waits
from vlm_repro.core.records import Generation, Request
from vlm_repro.core.runs import open_run
from vlm_repro.models.protocol import Lengths

torch.set_num_threads(1)


class Halves:
    """Prepares and answers in two steps, and notes in which thread and when."""
    name = 'halves'

    def __init__(self, prepare_s=0., answer_s=0., bad=()):
        self.prepare_s, self.answer_s, self.bad, self.seen = prepare_s, answer_s, bad, []

    def describe(self): return {'device': 'cpu', 'n_parameters': 1000, 'dtype': 'float32'}
    def measure(self, request): return Lengths(int(request.id), 0)
    def generate(self, requests, n): return self.answer(self.prepare(requests), n)

    def prepare(self, requests):
        time.sleep(self.prepare_s)
        self.seen.append(('prepare', threading.current_thread().name, [r.id for r in requests]))
        if any(r.id in self.bad for r in requests): raise RuntimeError('the processor broke')
        return list(requests)

    def answer(self, prepared, n):
        time.sleep(self.answer_s)
        self.seen.append(('answer', threading.current_thread().name, [r.id for r in prepared]))
        return [Generation(r.id, f'answer {r.id}', n_prompt=int(r.id), n_new=2) for r in prepared]


class Whole:
    """The same answers by a backend that prepares nothing ahead."""
    name = 'whole'
    describe, measure = Halves.describe, Halves.measure
    def generate(self, requests, n): return Halves().generate(requests, n)


def _requests(n=12): return [Request(str(i), [], 'ours') for i in range(n)]


def _lines(run): return sorted(run.path('predictions.jsonl').read_text().splitlines())


def test_prepared_ahead_or_not_the_answers_are_the_same(tmp_path):
    lines = []
    for model in (Halves(), Whole()):
        run = open_run(tmp_path/model.name, {'seed': 0})
        report = generate(model, _requests(), run, 3, 10, progress=False)
        lines.append(_lines(run))
        assert (report.accounts[0].waits is None) == (model.name == 'whole')
        run.close()
    assert lines[0] == lines[1] and len(lines[0]) == 12


class Together(Halves):
    """Answers a batch only once the next one is prepared: without a second thread it would wait for ever."""

    def __init__(self, batches):
        super().__init__()
        self.left, self.ready = batches, threading.Semaphore(0)

    def prepare(self, requests):
        made = super().prepare(requests)
        self.ready.release()
        return made

    def answer(self, prepared, n):
        self.left -= 1
        needed = 2 if not any(what == 'answer' for what, *_ in self.seen) else 1 if self.left else 0
        for _ in range(needed): assert self.ready.acquire(timeout=60), 'the next batch was not prepared meanwhile'
        return super().answer(prepared, n)


def test_the_next_batch_is_prepared_in_another_thread_while_this_one_is_answered(tmp_path):
    model, run = Together(6), open_run(tmp_path/'run', {'seed': 0})
    assert generate(model, _requests(), run, 2, 10, progress=False).made == 12
    assert {who for what, who, _ in model.seen if what == 'prepare'} == {'prepare'}
    assert {who for what, who, _ in model.seen if what == 'answer'} == {threading.current_thread().name}
    batches = [ids for what, _, ids in model.seen if what == 'answer']
    assert batches == [ids for what, _, ids in model.seen if what == 'prepare'] and len(batches) == 6
    run.close()


def test_what_breaks_while_preparing_stops_the_run_there_and_keeps_what_came_before(tmp_path):
    run = open_run(tmp_path/'run', {'seed': 0})
    with pytest.raises(RuntimeError, match='the processor broke'): generate(Halves(bad=['3']), _requests(), run, 2, 10, progress=False)
    assert sorted(int(r['id']) for r in run.rows('predictions')) == list(range(4, 12))  # longest first: 11 … 4, then 3 with 2
    assert 'prepare' not in [t.name for t in threading.enumerate()]
    assert generate(Halves(), _requests(), run, 2, 10, progress=False).reused == 8
    run.close()


def test_a_taker_that_stops_ends_the_thread():
    with pytest.raises(KeyboardInterrupt):
        with Feed(range(1000), lambda b: b, ahead=2) as feed:
            for item in feed:
                if item.ready == 3: raise KeyboardInterrupt
    assert 'prepare' not in [t.name for t in threading.enumerate()]


@pytest.mark.parametrize('ahead', [1, 2, 5])
def test_no_more_than_asked_for_lie_prepared(ahead):
    made, most = [], 0
    with Feed(range(30), lambda b: made.append(b) or b, ahead) as feed:
        for taken, item in enumerate(feed):
            time.sleep(.002)
            most = max(most, len(made) - taken - 1)
            assert item.batch == taken
    assert most <= ahead + 1 and len(made) == 30


def test_waits_add_up_and_say_who():
    both = Waits(10., 2., 5.) + Waits(10., 0., 1.)
    assert (both.device, both.prepare) == (.1, .3)
    assert str(both) == 'the device waited for images 10 % of the time, preparing waited for the device 30 %'
    assert (Waits(0.).device, Waits(0.).prepare) == (0., 0.)


def test_the_account_of_a_call_is_kept_and_rates_come_from_it(tmp_path):
    run = open_run(tmp_path/'run', {'seed': 0})
    report = generate(Halves(.01, .01), _requests(), run, 4, 10, progress=False)
    row, = (json.loads(line) for line in run.path('launches.jsonl').read_text().splitlines())
    assert row['made'] == 12 and row['ranks'][0]['new_tokens'] == 24 and row['ranks'][0]['waits']['wall_s'] > 0
    rates = speed(run.rows('timings'), run.rows('launches'))
    assert rates['n'] == 12 and rates['samples_per_s'] == pytest.approx(12/report.seconds, rel=.05)
    assert generate(Halves(), _requests(), run, 4, 10, progress=False).made == 0 and len(run.rows('launches')) == 1
    assert all(t['prepare_s'] >= .01 and t['seconds'] >= .02 and t['steps'] == 2 for t in run.rows('timings'))
    run.close()


def test_nothing_to_do_is_no_error(tmp_path):
    run = open_run(tmp_path/'run', {'seed': 0})
    made, account = answer_batches(Halves(), [], run, 10)
    assert made == [] and account.made == 0
    run.close()


def test_share_of_a_known_peak_and_of_no_other():
    work = Work(weights=7_000_000_000, tokens=10_000, steps=100, seconds=1.)
    shares = peak_shares(work, 'NVIDIA H100 80GB HBM3')
    assert shares['arithmetic'] == pytest.approx(2*7e9*1e4/989e12) and shares['memory'] == pytest.approx(7e9*2*100/3.35e12)
    assert peak_shares(work, 'cpu') == peak_shares(work, 'NVIDIA H100 of tomorrow') == {}
    assert all(p.source and p.tflops_16 > p.tflops_32 for p in PEAKS.values())
