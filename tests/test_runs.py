"""The run folder under attack: killed writers, full disks, torn lines, other settings, other data."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vlm_repro.core.runs import RunError, open_run, pin, read_run

SETTINGS = {'paper': 'demo', 'seed': 0}

SLOW_RUN = '''
import sys, time
from pathlib import Path
from vlm_repro.core.generate import generate
from vlm_repro.core.records import Generation, Request
from vlm_repro.core.runs import open_run
from vlm_repro.models.protocol import Lengths

class Echo:
    name = 'echo'
    def describe(self): return {}
    def measure(self, r): return Lengths(int(r.id), 0)
    def generate(self, rs, max_new_tokens):
        time.sleep(float(sys.argv[2]))
        with open(sys.argv[3], 'a') as f: f.writelines(r.id + '\\n' for r in rs)
        return [Generation(r.id, f'answer {r.id}') for r in rs]

run = open_run(sys.argv[1], {'paper': 'demo', 'seed': 0})
requests = [Request(str(i), [], 'ours') for i in range(40)]
report = generate(Echo(), requests, run, batch_size=4, progress=False)
print(report.made, report.reused)
'''


def _script(tmp_path: Path, seconds: float) -> list[str]:
    return [sys.executable, '-c', SLOW_RUN, str(tmp_path/'run'), str(seconds), str(tmp_path/'calls')]


def test_sigkill_loses_at_most_the_batch_in_flight(tmp_path):
    path = tmp_path/'run'/'predictions.jsonl'
    victim = subprocess.Popen(_script(tmp_path, .05))
    while not (path.exists() and path.read_bytes().count(b'\n') >= 8): time.sleep(.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    survived = path.read_bytes()
    calls = (tmp_path/'calls').read_text().split()
    assert len(calls) - survived.count(b'\n') in (0, 4)
    with open(path, 'ab') as f: f.write(b'{"id": "torn", "te')
    done = subprocess.run(_script(tmp_path, 0), capture_output=True, text=True, check=True)
    assert path.read_bytes().startswith(survived)
    rows = read_run(tmp_path/'run').rows('predictions')
    assert sorted(r['id'] for r in rows) == sorted(map(str, range(40)))
    missing = 40 - survived.count(b'\n')
    assert done.stdout.split() == [str(missing), str(40 - missing)]
    assert len((tmp_path/'calls').read_text().split()) == len(calls) + missing


def test_interrupted_equals_uninterrupted(tmp_path):
    (tmp_path/'a').mkdir()
    (tmp_path/'b').mkdir()
    subprocess.run(_script(tmp_path/'a', 0), check=True, capture_output=True)
    victim = subprocess.Popen(_script(tmp_path/'b', .05))
    time.sleep(1.)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    subprocess.run(_script(tmp_path/'b', 0), check=True, capture_output=True)
    lines = [sorted((tmp_path/x/'run'/'predictions.jsonl').read_text().splitlines()) for x in 'ab']
    assert lines[0] == lines[1]


def test_two_writers(tmp_path):
    script = 'import sys, time; from vlm_repro.core.runs import open_run; run = open_run(sys.argv[1], {"paper": "demo", "seed": 0}); print("in", flush=True); time.sleep(60)'
    other = subprocess.Popen([sys.executable, '-c', script, str(tmp_path/'run')], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == 'in'
        with pytest.raises(RunError, match=f'process {other.pid} on .* is writing here'): open_run(tmp_path/'run', SETTINGS, wait_s=.2)
    finally:
        other.kill()
        other.wait()
    open_run(tmp_path/'run', SETTINGS, wait_s=5).close()


def test_disk_full_keeps_every_whole_row(tmp_path):
    script = textwrap.dedent('''
        import resource, signal, sys
        from vlm_repro.core.runs import RunError, open_run
        run = open_run(sys.argv[1], {"paper": "demo", "seed": 0})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            for i in range(1000): run.append("predictions", [{"id": str(i), "text": "x"*90}])
        except RunError as e: print(e)
    ''')
    said = subprocess.run([sys.executable, '-c', script, str(tmp_path/'run')], capture_output=True, text=True, check=True).stdout
    assert 'cannot write' in said and 'run again to continue' in said
    data = (tmp_path/'run'/'predictions.jsonl').read_bytes()
    assert data.endswith(b'}\n') and 0 < len(data) <= 3000
    assert [r['id'] for r in read_run(tmp_path/'run').rows('predictions')] == [str(i) for i in range(data.count(b'\n'))]


def test_broken_line_names_file_and_line(tmp_path):
    run = open_run(tmp_path/'run', SETTINGS)
    run.append('predictions', [{'id': 'a'}])
    run.close()
    with open(run.path('predictions.jsonl'), 'a') as f: f.write('not json\n{"id": "b"}\n')
    with pytest.raises(RunError, match=r'predictions\.jsonl, line 2: not JSON'): read_run(tmp_path/'run').rows('predictions')


def test_shards_read_as_one(tmp_path):
    run = open_run(tmp_path/'run', SETTINGS)
    run.append('predictions', [{'id': 'a', 'text': 'old'}])
    (tmp_path/'run'/'predictions-1.jsonl').write_text(json.dumps({'id': 'b', 'text': 'x'}) + '\n' + json.dumps({'id': 'a', 'text': 'new'}) + '\n')
    assert {r['id']: r['text'] for r in run.rows('predictions')} == {'a': 'new', 'b': 'x'}
    run.close()


def test_other_settings_are_refused_with_the_difference(tmp_path):
    open_run(tmp_path/'run', SETTINGS).close()
    with pytest.raises(RunError, match=r'(?s)other settings.*-  "seed": 0.*\+  "seed": 1'): open_run(tmp_path/'run', {**SETTINGS, 'seed': 1})
    open_run(tmp_path/'run', SETTINGS, {'batch_size': 99}).close()


def test_readers_cannot_write(tmp_path):
    open_run(tmp_path/'run', SETTINGS).close()
    with pytest.raises(RunError, match='opened for reading'): read_run(tmp_path/'run').append('scores', [{'id': 'a'}])
    with pytest.raises(RunError, match='no run folder'): read_run(tmp_path)


def test_manifest_never_outlives_what_it_describes(tmp_path):
    run = open_run(tmp_path/'run', SETTINGS)
    run.finish({'n': 0})
    pin(run, 'samples', [{'id': 'a', 'gold': 'x'}])
    assert not run.complete
    with pytest.raises(RunError, match='not complete'): run.manifest
    run.close()


@pytest.mark.parametrize('text, why', [('{"settings": {', 'not JSON'), ('[]', 'holds no settings'), ('{}', 'holds no settings'), ('{"settings": 3}', 'holds no settings')])
def test_broken_settings_are_an_error_and_leave_no_lock(tmp_path, text, why):
    (path := tmp_path/'settings.json').write_text(text)
    for opened in (lambda: open_run(tmp_path, SETTINGS, wait_s=.1), lambda: read_run(tmp_path)):
        with pytest.raises(RunError, match=why): opened()
    path.unlink()
    open_run(tmp_path, SETTINGS, wait_s=.1).close()
