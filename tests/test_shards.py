"""One run in several processes: dealing, shards, processes that die, launchers that die, resuming with another number of them."""
import csv
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_repro.core.generate import GenerateError, buckets, generate
from vlm_repro.core.pins import pin_model
from vlm_repro.core.processes import Processes, command, plan_for, processes, processes_for, trouble
from vlm_repro.core.records import Generation, Request, to_row
from vlm_repro.core.runs import RunError, open_run, open_shard, read_run
from vlm_repro.core.shards import deal, deepest
from vlm_repro.core.tasks import extract_run, get_task, make_settings, prepare, rescore, start
from vlm_repro.core.workers import PLAN, Plan, State, alive, load_again, read_plan, read_state, why_stop, write_state
from vlm_repro.mmwalk.world import Size, build_world
from vlm_repro.models.protocol import Lengths, load_model

torch.set_num_threads(1)
TASK = get_task('mmwalk')
LAUNCH = '''
import sys
import torch
from vlm_repro.core.generate import GenerateError, generate
from vlm_repro.core.tasks import get_task, make_settings, prepare, start
from vlm_repro.models.protocol import load_model
torch.set_num_threads(1)
task, (root, out, nproc, nnodes, meet) = get_task('mmwalk'), sys.argv[1:]
settings = make_settings(task, {'data_root': root, 'limit': 12, 'shots': 1})
run = start(task, settings, out, batch_size=2)
requests = prepare(task, settings, task.load(settings), run)
try: print(generate(load_model('tiny'), requests, run, 2, 20, nproc=int(nproc), nnodes=int(nnodes), meet=meet))
except GenerateError as e:
    print('GenerateError:', e)
    sys.exit(1)
'''


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp('world')/'w', 5, Size(test_frames=2, train_frames=2, val_frames=1, train_trajectories=1))


def _open(world, out, limit=12, shots=1):
    settings = make_settings(TASK, {'data_root': str(world), 'limit': limit, 'shots': shots})
    run = start(TASK, settings, out, batch_size=2)
    return settings, run, prepare(TASK, settings, TASK.load(settings), run)


@pytest.fixture(scope='module')
def whole(world, tmp_path_factory):
    """The answers of a run that nothing happened to, one process."""
    _, run, requests = _open(world, tmp_path_factory.mktemp('whole')/'run')
    generate(load_model('tiny'), requests, run, 2, 20, progress=False)
    run.close()
    return _lines(run.root)


def _lines(root: Path) -> list[str]:
    return sorted(line for path in root.glob('predictions*.jsonl') for line in path.read_text(encoding='utf-8').splitlines())


def _words(world, out, nproc, nnodes=1, meet=''):
    return [sys.executable, '-c', LAUNCH, *map(str, (world, out, nproc, nnodes, meet))]


def _launch(*asked):
    return subprocess.Popen(_words(*asked), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _until(true, process, seconds=240):
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.01)


def _rows(path: Path) -> int:
    return path.read_bytes().count(b'\n') if path.exists() else 0


def _parents() -> dict[int, int]:
    """Every process of this machine with its parent, read at once: between two looks a batch can be over."""
    found = {}
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try: found[int(stat.parent.name)] = int(stat.read_text().rpartition(')')[2].split()[1])
        except (FileNotFoundError, ProcessLookupError): continue
    return found


def _children(pid: int) -> list[int]:
    return [p for p, parent in _parents().items() if parent == pid]


def _below(pid: int) -> list[int]:
    parents, found = _parents(), [pid]
    for p in found: found += [q for q, parent in parents.items() if parent == p]
    return found[1:]


def _workers(pids) -> list[int]:
    """Those that do the work, and not those that watch."""
    return [p for p in pids if Path(f'/proc/{p}/cmdline').exists() and b'--work' in Path(f'/proc/{p}/cmdline').read_bytes().split(b'\0')]


def _worker(out: Path, rank: int, world: int, launcher) -> int:
    """The worker of a rank, as soon as there is one."""
    found = []
    def there():
        state = read_state(out, rank, world)
        found[:] = _workers(_children(state.supervisor)) if state else []
        return bool(found)
    _until(there, launcher)
    return found[0]


# ---- dealing

@pytest.mark.parametrize('seed', range(20))
def test_every_request_is_dealt_once_and_the_work_is_even(seed):
    rng = random.Random(seed)
    n, world = rng.randint(1, 400), rng.randint(1, 16)
    costs = [rng.lognormvariate(6, 1) for _ in range(n)]
    groups = [rng.choice(['', f'g{rng.randint(0, 9)}']) for _ in range(n)]
    parts = deal(costs, world, groups)
    loads = [sum(costs[i] for i in part) for part in parts]
    assert sorted(i for part in parts for i in part) == list(range(n)) and len(parts) == world
    assert max(loads) <= sum(costs)/world + 2*max(costs)
    assert parts == deal(costs, world, groups)


def test_groups_stay_together_where_that_costs_no_balance():
    groups = [f'scene {i//8}' for i in range(64)]
    parts = deal([100.]*64, 4, groups)
    assert all(sum(any(groups[i] == g for i in part) for part in parts) == 1 for g in set(groups))


def test_one_group_is_shared_out_all_the_same():
    assert [len(p) for p in deal([5.]*40, 4, ['shots']*40)] == [10]*4


@pytest.mark.parametrize('n, world', [(7, 7), (8, 8), (3, 3), (16, 8), (24, 8), (64, 8), (12, 2)])
def test_a_shared_beginning_costs_no_balance(n, world):
    rng = np.random.default_rng(n)
    for _ in range(20):
        costs = list(rng.normal(100, 8, n))
        shared, apart = (max(sum(costs[i] for i in p) for p in deal(costs, world, groups)) for groups in (['shots']*n, ()))
        assert shared <= 1.2*apart
    assert sorted(sum(([1.]*100 + [200.])[i] for i in p) for p in deal([1.]*100 + [200.], 2, ['shots']*101)) == [100, 200]


def test_more_processes_than_requests():
    assert sorted(map(len, deal([1., 1.], 4))) == [0, 0, 1, 1]


def test_deepest_takes_the_longest_part_that_another_has():
    assert deepest([('a', 'b', 'c'), ('a', 'b'), ('a',), ('d',)]) == ['b', 'b', 'a', '']


def test_requests_that_share_go_into_one_batch():
    todo = [(Request(str(i), [], 'ours'), 1) for i in range(12)]
    lengths = [Lengths(10, 100 - i) for i in range(12)]
    groups = ['x' if i % 3 == 0 else 'y' if i % 3 == 1 else '' for i in range(12)]
    batches = buckets(todo, lengths, 4, groups)
    assert [{groups[int(r.id)] for r, _ in b} for b in batches] == [{'x'}, {'y'}, {''}]
    assert sorted(r.id for b in batches for r, _ in b) == sorted(str(i) for i in range(12))


def test_lone_pairs_do_not_make_small_batches():
    todo = [(Request(str(i), [], 'ours'), 1) for i in range(16)]
    batches = buckets(todo, [Lengths(10, 100)]*16, 8, [f'pair {i//2}' for i in range(16)])
    assert list(map(len, batches)) == [8, 8]


# ---- how many processes

def test_a_gpu_count_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r'nproc=9: torch sees 8 GPU\(s\) on this machine; give at most 8, or device=cpu'): processes(9, 'auto', n_gpus=8)
    with pytest.raises(ValueError, match='torch sees no GPU on this machine'): processes(2, 'cuda', n_gpus=0)
    with pytest.raises(ValueError, match='leaves room for one process'): processes(2, 'cuda:1', n_gpus=4)
    for wrong in (0, -1, 1.5, True, 'two'):
        with pytest.raises(ValueError, match='give 1 or more, or auto'): processes(wrong, 'cpu')


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has GPUs')
def test_a_run_that_wants_gpus_that_are_not_there_ends_before_it_begins(world, tmp_path):
    settings = make_settings(TASK, {'data_root': str(world)})
    with pytest.raises(ValueError, match='torch sees no GPU on this machine'): start(TASK, settings, tmp_path/'run', nproc=4, device='cuda')
    assert not (tmp_path/'run').exists()


def test_auto_is_one_process_a_gpu():
    assert processes('auto', 'auto', n_gpus=8) == Processes(8, gpus=True)
    assert processes('auto', 'auto', n_gpus=0) == Processes(1)
    assert processes(3, 'auto', n_gpus=0) == Processes(3)
    assert processes(2, 'cuda', 2, 'gpu1:29500', n_gpus=8).world == 4


def test_several_machines_need_a_place_to_meet():
    with pytest.raises(ValueError, match='meet=HOST:PORT'): processes(2, 'cpu', nnodes=2)
    words = command(Processes(8, 2, 'gpu1:29500'), 'run')
    assert ' '.join(words[words.index('--nnodes'):words.index('--nnodes') + 6]) == '--nnodes 2 --rdzv-backend c10d --rdzv-endpoint gpu1:29500'


def test_a_model_that_cannot_be_loaded_again_answers_here():
    class Own:
        name = 'own'
    assert processes_for(Own(), 'auto') == Processes()
    with pytest.raises(ValueError, match='own was not made by load_model'): processes_for(Own(), 2)


def test_no_more_processes_than_work():
    model = load_model('tiny', device='cpu')
    assert processes_for(model, 8, n_todo=3, batch_size=16).nproc == 3
    assert processes_for(model, 'auto', n_todo=300, batch_size=16).nproc == 1


def test_a_rank_without_a_gpu_says_so(tmp_path):
    plan = Plan('me', 1, 'here', 'tiny', {}, None, 4, 10, False, True, [[]])
    with pytest.raises(RunError, match=r'torch sees \d+ GPU\(s\) here, so there is no cuda:99'): load_again(plan, 99)


def test_processes_need_a_prepared_run(tmp_path):
    run = open_run(tmp_path/'run', {'seed': 0})
    with pytest.raises(RunError, match='samples.jsonl lacks 1 of the questions, q first'):
        plan_for(load_model('tiny'), [(Request('q', [{'role': 'user', 'content': 'Yes?'}], 'ours'), 1)], run, 4, 10, False, Processes(2))
    run.close()
    with pytest.raises(RunError, match='processes are started by the page'): read_plan(tmp_path/'run')


# ---- shards

@pytest.mark.parametrize('order', [(0, 1), (1, 0)])
def test_the_last_attempt_counts_in_whatever_file_it_is(tmp_path, order):
    run = open_run(tmp_path/'run', {'seed': 0})
    rows = [{'id': 'a', 'text': '', 'error': 'server: down', 'attempt': 1}, {'id': 'a', 'text': 'Yes.', 'error': None, 'attempt': 2}]
    for rank, row in zip(order, rows):
        shard = open_shard(run.root, rank, 2)
        shard.append('predictions', [row])
        shard.close()
    assert [r['text'] for r in run.rows('predictions')] == ['Yes.']
    run.close()


def test_an_incomplete_run_in_shards_is_not_scored_unless_told(world, tmp_path):
    settings, run, requests = _open(world, tmp_path/'run', limit=1, shots=0)
    shard = open_shard(run.root, 0, 2)
    shard.append('predictions', [to_row(Generation(requests[0].id, 'Yes.'))])
    shard.close()
    pin_model(run, {'class': 'by hand'})
    run.close()
    left = f'{len(requests) - 1} of {len(requests)} samples have no prediction yet'
    with pytest.raises(RunError, match=left): extract_run(TASK, settings, run)
    with pytest.raises(RunError, match=left): rescore(run.root, tmp_path/'scored')
    for out in (None, run.root):
        with pytest.raises(RunError, match='name another `out`'): rescore(run.root, out, partial=True)
    scored = rescore(run.root, tmp_path/'scored', partial=True)
    scored.close()
    assert [row['id'] for row in scored.rows('samples')] == [requests[0].id] and f'1 of {len(requests)} questions are answered' in scored.manifest['watermark']
    with scored.path('table.csv').open() as table: statuses = {row['reason'] for row in csv.DictReader(table)}
    assert statuses and all('a part of the questions' in s or not s for s in statuses), statuses


def test_a_folder_of_an_older_version_is_continued_and_of_a_newer_refused(tmp_path, capsys):
    open_run(tmp_path/'run', {'seed': 0}).close()
    path = tmp_path/'run'/'settings.json'
    path.write_text(json.dumps({'settings': {'seed': 0}, 'runtime': {}}))
    run = open_run(tmp_path/'run', {'seed': 0})
    run.close()
    assert 'written by an older version (format 1); continued' in capsys.readouterr().out
    assert json.loads(path.read_text())['format'] == 2
    path.write_text(json.dumps({'settings': {'seed': 0}, 'format': 99, 'version': '7.0'}))
    for use in (lambda: open_run(tmp_path/'run', {'seed': 0}), lambda: read_run(tmp_path/'run')):
        with pytest.raises(RunError, match='written by vlm_repro 7.0 in format 99.*install the newer version'): use()


def test_an_older_version_without_a_parameter_is_told_apart(tmp_path):
    open_run(tmp_path/'run', {'seed': 0}).close()
    with pytest.raises(RunError, match='it had no shots. That version can continue it'): open_run(tmp_path/'run', {'seed': 0, 'shots': 3})
    with pytest.raises(RunError, match='other settings') as other: open_run(tmp_path/'run', {'seed': 1, 'shots': 3})
    assert 'That version' not in str(other.value)


# ---- who is told what

def test_nobody_waits_for_a_worker_whose_folder_changed_hands(tmp_path):
    (tmp_path/'.writer').write_text('A')
    plan = Plan('A', os.getpid(), socket.gethostname(), 'tiny', {}, None, 4, 10, False, False, [[]])
    assert why_stop(tmp_path, plan, os.getppid()) == ''
    assert 'the process that started this one is gone' in why_stop(tmp_path, plan, os.getppid() + 1)
    gone = subprocess.Popen(['true'])
    time.sleep(.3)
    assert not alive(gone.pid)  # ended, though nobody has waited for it
    assert 'which waited for the answers, is gone' in why_stop(tmp_path, replace(plan, launcher=gone.pid), os.getppid())
    gone.wait()
    (tmp_path/'.writer').write_text('B')
    assert why_stop(tmp_path, plan, os.getppid()) == 'the folder is in other hands (B)'


def test_trouble_names_rank_sample_and_what_it_said(tmp_path):
    done = State('w', 0, 3, 1, 'h', 'done', done=4, of=4)
    killed = State('w', 1, 3, 1, 'h', 'ended', ('q7', 'q8'), 2, 4, 'died (signal 9)')
    silent = State('w', 2, 3, 1, 'h', 'working', ('q9',), 0, 4)
    text = trouble([done, killed, silent], 6, ['[rank 2] RunError: cannot write (No space left on device)'])
    assert '2 of 3 processes did not finish; 6 answers are missing, run again to make them' in text
    assert 'rank 1 died (signal 9) at q7 and 1 more of its batch, after 2 of its 4 answers' in text
    assert 'rank 2 left no word at q9' in text and 'No space left on device' in text
    assert trouble([done], 0, []) == ''
    assert 'rank 0 never started' in trouble([None], 4, ['torchrun: no'])
    write_state(tmp_path, killed)
    assert read_state(tmp_path, 1, 3) == replace(killed, at=['q7', 'q8'], said=[])


# ---- processes that die

@pytest.mark.slow
def test_killed_launcher_then_killed_rank_then_alone(world, whole, tmp_path):
    out = tmp_path/'run'
    launcher = _launch(world, out, 3)
    _until(lambda: sum(_rows(out/f'predictions-{r}of3.jsonl') for r in range(3)) >= 2, launcher)
    everybody = _below(launcher.pid)
    for pid in _workers(everybody): os.kill(pid, signal.SIGSTOP)  # in the middle of a batch, however long the others take to notice
    assert len(everybody) >= 3  # torchrun, a supervisor and its worker at least
    launcher.kill()
    launcher.wait()
    kept = {p.name: p.read_bytes() for p in out.glob('predictions-*.jsonl')}
    end = time.monotonic() + 20
    while any(map(alive, everybody)) and time.monotonic() < end: time.sleep(.05)
    assert not [p for p in everybody if alive(p)], 'workers outlived the process that waited for them'
    for rank in range(3): open_shard(out, rank, 3, wait_s=0).close()
    after_kill = len(_lines(out))
    assert 2 <= after_kill < len(whole)

    launcher = _launch(world, out, 2)
    worker = _worker(out, 1, 2, launcher)
    _until(lambda: _rows(out/'predictions-1of2.jsonl') >= 2, launcher)
    os.kill(worker, signal.SIGKILL)
    said = launcher.communicate()[0]
    assert launcher.returncode == 1 and 'GenerateError: 1 of 2 processes did not finish' in said
    assert f'{after_kill} of {len(whole)} answers reused' in said
    state = read_state(out, 1, 2)
    assert f'rank 1 died (signal 9) at {state.at[0]}' in said and state.at[0] in {json.loads(line)['id'] for line in whole}
    part = len(json.loads((out/PLAN).read_text())['parts'][0])
    assert _rows(out/'predictions-0of2.jsonl') == part, 'the other process did not finish'
    assert json.loads((out/'launches.jsonl').read_text().splitlines()[-1])['trouble'] in said

    done = subprocess.run(_words(world, out, 1), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, data in kept.items(): assert (out/name).read_bytes().startswith(data[:data.rfind(b'\n') + 1])
    ids = [json.loads(line)['id'] for line in _lines(out)]
    assert len(ids) == len(set(ids)) == len(whole), 'an answer was made twice'
    assert _lines(out) == whole


@pytest.mark.slow
def test_a_killed_supervisor_does_not_stop_the_others(world, whole, tmp_path):
    out = tmp_path/'run'
    launcher = _launch(world, out, 2)
    worker = _worker(out, 0, 2, launcher)
    victim = read_state(out, 0, 2).supervisor
    _until(lambda: _rows(out/'predictions-0of2.jsonl') >= 2, launcher)
    os.kill(victim, signal.SIGKILL)
    said = launcher.communicate()[0]
    assert launcher.returncode == 1 and 'rank 0 left no word at ' in said
    assert not alive(worker)
    assert _rows(out/'predictions-1of2.jsonl') == len(json.loads((out/PLAN).read_text())['parts'][1])
    done = subprocess.run(_words(world, out, 3), capture_output=True, text=True)
    assert done.returncode == 0 and _lines(out) == whole


@pytest.fixture
def tiny_disk(tmp_path):
    """A folder with room for one page; None where nothing can be mounted."""
    disk = tmp_path/'disk'
    disk.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4k', 'none', str(disk)], capture_output=True).returncode == 0
    yield disk if mounted else None
    if mounted: subprocess.run(['umount', '-l', str(disk)], check=True)


def _fill_up(out, launcher):
    """Without a disk of its own, the file of one rank may not grow."""
    worker = _worker(out, 1, 2, launcher)
    resource.prlimit(worker, resource.RLIMIT_FSIZE, (4096, 4096))


@pytest.mark.slow
def test_a_full_disk_on_one_rank(world, whole, tmp_path, tiny_disk):
    out = tmp_path/'run'
    shard = out/'predictions-1of2.jsonl'
    if tiny_disk:
        out.mkdir()
        (tiny_disk/'shard').touch()
        shard.symlink_to(tiny_disk/'shard')
    launcher = _launch(world, out, 2)
    if not tiny_disk: _fill_up(out, launcher)
    said = launcher.communicate()[0]
    assert launcher.returncode == 1 and 'rank 1 stopped (exit code 1) at ' in said, said
    assert 'cannot write' in said and ('No space left on device' in said or 'File too large' in said)
    assert _rows(out/'predictions-0of2.jsonl') == len(json.loads((out/PLAN).read_text())['parts'][0])
    kept = shard.read_bytes()
    assert kept.endswith(b'}\n') and 0 < len(kept) <= 4096
    shard.unlink()
    shard.write_bytes(kept)
    done = subprocess.run(_words(world, out, 1), capture_output=True, text=True)
    assert done.returncode == 0 and _lines(out) == whole, done.stdout


@pytest.mark.slow
def test_two_machines_meet_and_share_the_work(world, whole, tmp_path):
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        meet = f'127.0.0.1:{s.getsockname()[1]}'
    out = tmp_path/'run'
    first = _launch(world, out, 1, 2, meet)
    _until((out/PLAN).exists, first)
    second = subprocess.run(command(Processes(1, 2, meet), out), capture_output=True, text=True, timeout=300)
    said = first.communicate(timeout=300)[0]
    assert first.returncode == 0 and second.returncode == 0, said + second.stderr
    assert all(_rows(out/f'predictions-{r}of2.jsonl') for r in range(2)) and _lines(out) == whole
    assert f'--nnodes 2 --rdzv-backend c10d --rdzv-endpoint {meet}' in said


@pytest.mark.slow
def test_strict_stops_all_at_the_first_failure(world, tmp_path):
    root = shutil.copytree(world, tmp_path/'data')
    _, run, requests = _open(root, tmp_path/'run', limit=2, shots=0)
    for r in requests[:6]: Path(next(p['image'] for p in r.messages[-1]['content'] if p['type'] == 'image')).write_bytes(b'no image')
    with pytest.raises(GenerateError, match='strict=True stops at the first failure'): generate(load_model('tiny'), requests, run, 2, 20, strict=True, progress=False, nproc=2)
    assert not any(alive(s.supervisor) for s in (read_state(run.root, r, 2) for r in range(2)))
    run.close()


@pytest.mark.slow
def test_letters_by_likelihood_in_two_processes(tmp_path):
    from vlm_repro.models.choices import by_likelihood
    task = get_task('roadbuddy')
    settings = make_settings(task, {'limit': 6, 'recipe': '', 'read': 'likelihood'})
    found = []
    for nproc in (1, 2):
        run = start(task, settings, tmp_path/str(nproc), batch_size=2)
        data = task.load(settings)
        model = by_likelihood(load_model('tiny', tiny='roadbuddy'), {s.id: s.meta['letters'] for s in data.samples})
        report = generate(model, prepare(task, settings, data, run), run, 2, 10, progress=False, nproc=nproc)
        found.append({r['id']: (r['text'], r['token_ids']) for r in run.rows('predictions')})
        assert [a.rank for a in report.accounts] == list(range(nproc)) and 'rank' in asdict(report.accounts[0])
        run.close()
    assert found[0] == found[1] and len(found[0]) == 6
