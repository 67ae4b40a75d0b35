"""Doctor: ranges, known issues, servers, keys; quick, and silent about secrets."""
import http.server
import json
import subprocess
import sys
import threading
import time

import pytest

from vlm_repro.core.doctor import (
    Check,
    Checks,
    Issue,
    applies,
    check_disk,
    check_keys,
    check_range,
    check_server,
    check_tool,
    doctor,
    known_issues,
)


def test_ranges():
    assert check_range('x', '5.1', '>=5,<6').status == 'ok'
    assert check_range('x', '4.57.3', '>=5,<6').status == 'problem' and 'pip install "x>=5,<6"' in check_range('x', '4.57.3', '>=5,<6').advice
    assert check_range('x', None, '>=5').found == 'not installed'
    assert check_range('x', None, '>=5', 'train').status == 'absent'


@pytest.mark.parametrize('package, version, threads', [
    ('transformers', '4.53.3', []), ('transformers', '4.55.0', ['40136', '39591']), ('transformers', '5.2.0', ['39591']),
    ('transformers', '5.5.4', ['45381', '39591']), ('transformers', '5.6.0', ['39591']), ('torchvision', None, ['39591']), ('torchvision', '0.29', []), ('openai', '0.28', ['742'])])
def test_known_issues_apply_to_their_ranges_only(package, version, threads):
    assert [i.link.rsplit('/', 1)[1] for i in known_issues() if i.package == package and applies(i, version)] == threads


def test_every_known_issue_has_a_thread_and_an_effect():
    for issue in known_issues():
        assert isinstance(issue, Issue) and issue.link.startswith('https://github.com/') and len(issue.effect) > 20 and issue.level in ('warning', 'info')


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        code = {'/v1/models': 200, '/closed/models': 401, '/html/models': 200}.get(self.path, 404)
        body = json.dumps({'data': [{'id': 'tiny'}, {'id': 'other'}]}) if self.path == '/v1/models' else '<html>'
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args): pass


@pytest.fixture
def url():
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_servers(url):
    assert check_server(f'{url}/v1') == Check(f'{url}/v1', 'ok', '2 models', 'tiny, other')
    assert check_server(f'{url}/closed').advice == 'asks for a key'
    assert check_server(f'{url}/nothing').found == 'answers 404'
    assert check_server(f'{url}/html').status == 'warning'
    assert check_server('localhost:8000').found == 'no address'


def test_a_server_that_is_down():
    assert check_server('http://127.0.0.1:9/v1', timeout_s=1).status == 'problem'


def test_keys_are_present_or_not_and_never_shown(monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-secret-value')
    monkeypatch.delenv('HF_TOKEN', raising=False)
    assert [c.found for c in check_keys()] == ['set', 'not set']
    assert 'secret' not in str(doctor()) and 'secret' not in doctor()._repr_markdown_()


def test_absent_tools_are_no_problem():
    assert check_tool('x', ['no-such-program-here'], 'nothing').status == 'absent'


def test_disk(tmp_path):
    assert check_disk(tmp_path).found.endswith('GB free')


def test_brief_keeps_what_is_not_in_order():
    found = Checks([Check('a', 'ok', '1'), Check('b', 'problem', '2', 'mend it'), Check('c', 'ok', '3')])
    assert [c.name for c in found.brief()] == ['2 in order', 'b'] and found.problems == [found[1]]


def test_quick_and_without_torch():
    code = 'import sys; from vlm_repro.core.doctor import doctor; doctor(); assert not {"torch", "transformers"} & set(sys.modules)'
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', code], check=True)
    assert time.perf_counter() - start < 5


def test_gpus_are_what_the_driver_says(tmp_path, monkeypatch):
    from vlm_repro.core.doctor import check_gpu
    from vlm_repro.core.manifest import gpus
    monkeypatch.setenv('PATH', str(tmp_path))
    assert gpus() == [] and check_gpu()[0].status == 'absent'
    tool = tmp_path/'nvidia-smi'
    tool.write_text('#!/bin/sh\necho "NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15"\necho "NVIDIA L4, 23034 MiB, 550.54.15"\n')
    tool.chmod(0o755)
    assert gpus() == [{'name': 'NVIDIA H100 80GB HBM3', 'memory': '81559 MiB', 'driver': '550.54.15'}, {'name': 'NVIDIA L4', 'memory': '23034 MiB', 'driver': '550.54.15'}]
    assert [c.found for c in check_gpu()] == ['NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15', 'NVIDIA L4, 23034 MiB, 550.54.15']
    tool.write_text('#!/bin/sh\necho "NVIDIA-SMI has failed because it could not communicate with the driver"\nexit 9\n')
    assert gpus() == []
