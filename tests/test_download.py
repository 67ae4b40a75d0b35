"""Downloads against a local server: interruption, resuming, wrong checksums, changed files, full disks, licences."""
import hashlib
import json
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from vlm_repro.core import download
from vlm_repro.core.download import DownloadError, LicenceError, RemoteFile, dataverse_files, fetch
from vlm_repro.core.jsonl import DataError
from vlm_repro.mmwalk.download import get, plan, remote_files, unpack_frames

BODY = bytes(i * 7 % 256 for i in range(300_000))


class Server:
    "Serves `files`, logs the ranges it was asked for, and does what `trouble` says to the next requests."
    def __init__(self):
        self.files, self.ranges, self.trouble, self.tag = {'/f.bin': BODY}, [], [], '"v1"'
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def do_GET(self): outer.answer(self)
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.http.server_port}'
        self.thread = Thread(target=self.http.serve_forever, kwargs={'poll_interval': .02}, daemon=True)
        self.thread.start()

    def answer(self, request):
        body, asked = self.files.get(request.path), request.headers.get('Range')
        self.ranges.append(asked)
        trouble = self.trouble.pop(0) if self.trouble else None
        if isinstance(trouble, int): return request.send_error(trouble)
        if body is None: return request.send_error(404)
        whole = len(body)
        start = int(asked.removeprefix('bytes=').rstrip('-')) if asked and request.headers.get('If-Range') in (None, self.tag) and trouble != 'no ranges' else 0
        if start >= whole: return request.send_error(416)
        request.send_response(206 if start else 200)
        if start: request.send_header('Content-Range', f'bytes {start + (trouble == "shifted")}-{whole - 1}/{whole}')
        request.send_header('ETag', self.tag)
        if trouble != 'no length': request.send_header('Content-Length', str(whole - start))
        request.end_headers()
        request.wfile.write(body[start:start + 100_000] if trouble == 'cut' else body[start:])

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


@pytest.fixture
def server():
    running = Server()
    yield running
    running.close()


def remote(server, **changes):
    return RemoteFile(**{'name': 'sub/f.bin', 'url': f'{server.url}/f.bin', 'licence': 'CC BY 4.0', 'size': len(BODY), 'checksum': f'sha256:{hashlib.sha256(BODY).hexdigest()}'} | changes)


def take(server, folder, attempts=1, **changes):
    return fetch(remote(server, **changes), folder, accept_licence=True, attempts=attempts, pause=0, show=lambda text: None)


def names(folder):
    return sorted(p.name for p in folder.rglob('*') if p.is_file())


def test_a_plain_download(server, tmp_path):
    told = []
    path = fetch(remote(server), tmp_path, accept_licence=True, progress=lambda done, total: told.append((done, total)), show=lambda text: None)
    assert path == tmp_path/'sub'/'f.bin' and path.read_bytes() == BODY and names(tmp_path) == ['f.bin']
    assert told[-1] == (len(BODY), len(BODY))


def test_the_licence_is_shown_before_anything_is_asked(server, tmp_path):
    shown = []
    with pytest.raises(LicenceError, match='CC BY 4.0.*accept_licence=True'): fetch(remote(server), tmp_path, show=shown.append)
    assert shown == ['sub/f.bin: licence: CC BY 4.0'] and not server.ranges and not names(tmp_path)


def test_an_interrupted_download_is_resumed(server, tmp_path):
    server.trouble = ['cut']
    with pytest.raises(DownloadError, match='ended at byte 100,000 of 300,000.*fetch again to continue'): take(server, tmp_path)
    assert (tmp_path/'sub'/'f.bin.part').stat().st_size == 100_000
    assert take(server, tmp_path).read_bytes() == BODY
    assert server.ranges == [None, 'bytes=100000-'] and names(tmp_path) == ['f.bin']


def test_several_attempts_in_one_call_continue(server, tmp_path):
    server.trouble = ['cut', 503, 'cut']
    assert take(server, tmp_path, attempts=4).read_bytes() == BODY
    assert server.ranges == [None, 'bytes=100000-', 'bytes=100000-', 'bytes=200000-']


def test_a_file_that_changed_on_the_server_is_never_glued_together(server, tmp_path):
    server.trouble = ['cut']
    with pytest.raises(DownloadError): take(server, tmp_path)
    server.tag, server.files['/f.bin'] = '"v2"', BODY[::-1]
    changed = f'sha256:{hashlib.sha256(BODY[::-1]).hexdigest()}'
    assert take(server, tmp_path, checksum=changed).read_bytes() == BODY[::-1]


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    server.trouble = ['cut', 'no ranges']
    assert take(server, tmp_path, attempts=2).read_bytes() == BODY


def test_a_server_that_answers_another_range_is_refused(server, tmp_path):
    server.trouble = ['cut', 'shifted']
    with pytest.raises(DownloadError, match='from byte 100000 with byte 100001'): take(server, tmp_path, attempts=2)


def test_a_part_that_is_complete_is_only_checked(server, tmp_path):
    (tmp_path/'sub').mkdir()
    (tmp_path/'sub'/'f.bin.part').write_bytes(BODY)
    assert take(server, tmp_path).read_bytes() == BODY and not server.ranges


def test_a_part_longer_than_the_file_starts_anew(server, tmp_path):
    (tmp_path/'sub').mkdir()
    (tmp_path/'sub'/'f.bin.part').write_bytes(BODY + b'more')
    assert take(server, tmp_path, attempts=2, size=None).read_bytes() == BODY


def test_a_wrong_checksum_is_set_aside_and_the_next_fetch_is_whole(server, tmp_path):
    server.files['/f.bin'] = b'x' + BODY[1:]
    with pytest.raises(DownloadError, match='does not have the checksum.*set aside as f.bin.corrupt'): take(server, tmp_path)
    assert not (tmp_path/'sub'/'f.bin').exists() and 'f.bin.corrupt' in names(tmp_path)
    server.files['/f.bin'] = BODY
    assert take(server, tmp_path).read_bytes() == BODY and server.ranges == [None, None]


def test_a_finished_file_is_not_fetched_again_and_a_damaged_one_is(server, tmp_path):
    take(server, tmp_path)
    take(server, tmp_path)
    assert len(server.ranges) == 1
    (tmp_path/'sub'/'f.bin').write_bytes(b'damaged')
    assert take(server, tmp_path).read_bytes() == BODY and len(server.ranges) == 2


def test_md5_and_no_checksum(server, tmp_path):
    assert take(server, tmp_path/'a', checksum=f'md5:{hashlib.md5(BODY).hexdigest()}').read_bytes() == BODY
    server.trouble = ['no length']
    assert take(server, tmp_path/'b', checksum='', size=None).read_bytes() == BODY
    with pytest.raises(ValueError, match='neither sha256'): remote(server, checksum='crc32:00')


@pytest.mark.parametrize('code', [401, 403, 404])
def test_a_refusal_is_not_tried_again(server, tmp_path, code):
    server.trouble = [code]
    with pytest.raises(DownloadError, match=f'answered {code}'): take(server, tmp_path, attempts=3)
    assert len(server.ranges) == 1


def test_a_server_that_is_down(tmp_path):
    gone = RemoteFile('f.bin', 'http://127.0.0.1:9/f.bin', 'CC BY 4.0')
    with pytest.raises(DownloadError, match='fetch again to continue'): fetch(gone, tmp_path, accept_licence=True, attempts=1, show=lambda text: None)


def test_a_full_disk_is_noticed_before_the_first_byte(server, tmp_path, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda folder: usage(10, 9, 1000))
    with pytest.raises(DownloadError, match='300,000 bytes are still to come and 1,000 are free'): take(server, tmp_path)
    assert not names(tmp_path)


def test_names_and_addresses_are_checked(server, tmp_path):
    with pytest.raises(ValueError, match='leaves the folder'): take(server, tmp_path, name='../f.bin')
    with pytest.raises(ValueError, match='not an http'): remote(server, url='file:///etc/passwd')


# mmWalk

def test_get_fetches_what_the_plan_lists_and_refuses_other_content(server, tmp_path):
    server.files = {}
    row = next(r for r in plan() if r.path.endswith('mmwalk.json'))
    wanted = remote_files('questions', mirror=server.url)
    assert f'{server.url}/{row.path}' in {f.url for f in wanted} and all(f.size and f.checksum for f in wanted)
    server.files = {f'/{f.name}': b'other' for f in wanted}
    with pytest.raises(DownloadError, match='ended at byte 5 of'): get('questions', tmp_path, True, mirror=server.url, show=lambda text: None)
    server.files = {f'/{f.name}': b'x' * f.size for f in wanted}
    with pytest.raises(DownloadError, match='does not have the checksum'): get('questions', tmp_path, True, mirror=server.url, show=lambda text: None)
    assert {r.state for r in plan(tmp_path)} == {'missing'}


def dataverse(server, archive):
    files = [{'dataFile': {'id': 7, 'filename': 'README.md', 'filesize': 1, 'md5': '0' * 32}},
             {'dataFile': {'id': 8, 'filename': 'QAFrames.zip', 'filesize': len(archive), 'checksum': {'type': 'MD5', 'value': hashlib.md5(archive).hexdigest()}}}]
    told = {'data': {'latestVersion': {'license': {'name': 'CC BY 4.0', 'uri': 'http://creativecommons.org/licenses/by/4.0'}, 'files': files}}}
    server.files = {'/api/datasets/:persistentId/?persistentId=doi:10.7910/DVN/KKDXDK': json.dumps(told).encode(), '/api/access/datafile/8': archive}


def zipped(path, *entries):
    with zipfile.ZipFile(path, 'w') as z:
        for name in entries: z.writestr(name, name * 20)
    return path


@pytest.mark.parametrize('head', ['QAFrames/', ''])
def test_frames_come_from_dataverse_with_its_licence_and_checksum(server, tmp_path, head):
    image = 'Plaza05/walker/rgb/000007.png'
    dataverse(server, zipped(tmp_path/'made.zip', f'{head}{image}').read_bytes())
    shown = []
    with pytest.raises(LicenceError): get('frames', tmp_path/'root', dataverse=server.url, show=shown.append)
    assert shown == ['QAFrames.zip: licence: CC BY 4.0 http://creativecommons.org/licenses/by/4.0']
    get('frames', tmp_path/'root', True, dataverse=server.url, show=shown.append)
    assert (tmp_path/'root'/'QAFrames'/image).is_file() and not list(tmp_path.rglob('*.part'))
    assert next(r.state for r in plan(tmp_path/'root') if r.path == 'QAFrames.zip') == 'present'


def test_a_dataverse_that_does_not_answer_as_expected(server, tmp_path):
    server.files = {}
    with pytest.raises(DownloadError, match='did not answer with a dataset'): dataverse_files(server.url, 'doi:10.7910/DVN/KKDXDK')
    server.files = {'/api/datasets/:persistentId/?persistentId=doi:10.7910/DVN/KKDXDK': b'{"data": {"latestVersion": {"files": []}}}'}
    with pytest.raises(DownloadError, match='lists no QAFrames.zip'): remote_files('frames', dataverse=server.url)


def test_unpacking_continues_and_refuses_hostile_and_damaged_archives(tmp_path):
    archive = zipped(tmp_path/'QAFrames.zip', 'QAFrames/A/1.png', 'QAFrames/A/2.png')
    assert [unpack_frames(archive, tmp_path), unpack_frames(archive, tmp_path)] == [2, 0]
    (tmp_path/'QAFrames/A/2.png').write_bytes(b'half')
    assert unpack_frames(archive, tmp_path) == 1
    with pytest.raises(DataError, match='leaves the folder'): unpack_frames(zipped(tmp_path/'bad.zip', 'QAFrames/../../evil.png'), tmp_path)
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(DataError, match='is damaged'): unpack_frames(archive, tmp_path)
