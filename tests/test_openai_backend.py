"""The openai backend over real sockets: a small chat server behind a proxy that spoils requests."""
import asyncio
import base64
import hashlib
import io
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from fault_proxy import chat_server, fault_proxy, in_order, listen, once_each
from PIL import Image

from vlm_repro.core.media import open_image
from vlm_repro.core.records import Request
from vlm_repro.models.openai import Patience, data_url
from vlm_repro.models.protocol import Model, ModelError, load_model

KEY = 'sk-test-0123456789abcdef'


def pixels_of(part):
    raw = base64.b64decode(part['image_url']['url'].removeprefix('data:image/png;base64,'))
    return hashlib.sha256(np.asarray(Image.open(io.BytesIO(raw)).convert('RGB')).tobytes()).hexdigest()[:8]


def say(body):
    "The answer is the conversation itself: every text, and a digest of every image's pixels."
    parts = [[m['content']] if isinstance(m['content'], str) else [p['text'] if p['type'] == 'text' else pixels_of(p) for p in m['content']] for m in body['messages']]
    return json.dumps([[m['role'], *p] for m, p in zip(body['messages'], parts)])


@pytest.fixture(scope='module')
def chat(bodies):
    with chat_server(say, bodies, 5) as url: yield url


def text(id, words='hello'): return Request(id, [{'role': 'user', 'content': [{'type': 'text', 'text': f'{words} {id}'}]}], 'ours')


def expected(request):
    return json.dumps([[m['role'], *(p['text'] if p['type'] == 'text' else hashlib.sha256(np.asarray(open_image(p['image'])).tobytes()).hexdigest()[:8]
                                     for p in m['content'])] for m in request.messages])


def ask(url, requests, n=16, **options):
    return load_model(f'openai:m@{url}', **{'base_delay': 0.02, 'timeout': 20., **options}).generate(requests, n)


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)).save(tmp_path/'p.png')
    return str(tmp_path/'p.png')


def test_images_and_turns_arrive_unchanged(chat, bodies, picture):
    asked = Request('a', [{'role': 'user', 'content': [{'type': 'image', 'image': picture}, {'type': 'text', 'text': 'First?'}]},
                          {'role': 'assistant', 'content': [{'type': 'text', 'text': 'Yes.'}]},
                          {'role': 'user', 'content': [{'type': 'image', 'image': picture}, {'type': 'image', 'image': picture}, {'type': 'text', 'text': 'Second?'}]}], 'ours')
    with fault_proxy(chat, in_order()) as (url, proxy): got, = ask(url, [asked])
    assert got.text == expected(asked) and (got.n_prompt, got.n_new, got.attempt, got.finish_reason) == (11, 3, 1, 'stop')
    assert got.pixel_hash and got.prompt_hash and got.error is None
    assert bodies[-1]['temperature'] == 0 and bodies[-1]['seed'] == 0 and bodies[-1]['max_tokens'] == 16


def test_decoding_is_sent_by_name_and_own_is_not(chat, bodies):
    ask(chat, [text('a')], temperature=.7, top_p=.9, top_k=20, repetition_penalty=1., seed=5)
    assert {k: bodies[-1].get(k) for k in ('temperature', 'top_p', 'top_k', 'repetition_penalty', 'seed')} == {'temperature': .7, 'top_p': .9, 'top_k': 20, 'repetition_penalty': None, 'seed': 5}
    ask(chat, [text('a')], temperature='own', top_p='own', seed=None)
    assert not {'temperature', 'top_p', 'seed', 'continue_final_message'} & bodies[-1].keys()


def test_a_begun_reply_is_sent_to_be_written_on(chat, bodies):
    asked = text('a')
    ask(chat, [Request('a', [*asked.messages, {'role': 'assistant', 'content': [{'type': 'text', 'text': '<think>'}]}], 'ours')])
    assert bodies[-1]['messages'][-1] == {'role': 'assistant', 'content': '<think>'} and bodies[-1]['continue_final_message'] and bodies[-1]['add_generation_prompt'] is False


def test_a_rotated_photograph_is_sent_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (60, 20), 'teal').save(tmp_path/'t.jpg', exif=exif)
    sent = data_url(open_image(tmp_path/'t.jpg'))
    assert Image.open(io.BytesIO(base64.b64decode(sent.partition(',')[2]))).size == (20, 60)


def test_retry_after_is_honoured(chat):
    with fault_proxy(chat, in_order('429')) as (url, proxy): got, = ask(url, [text('a')])
    waited = proxy.log[1][0] - proxy.log[0][0]
    print(f'429 with Retry-After 0.4: asked again after {waited:.2f} s')
    assert got.text == expected(text('a')) and got.attempt == 2 and 0.4 <= waited < 10


def test_retry_after_holds_for_the_others_too(chat):
    with fault_proxy(chat, in_order('429')) as (url, proxy): got = ask(url, [text(str(i)) for i in range(6)], concurrency=1)
    assert [g.attempt for g in got] == [2, 1, 1, 1, 1, 1] and proxy.log[1][0] - proxy.log[0][0] >= 0.4


def test_a_wait_beyond_the_limit_is_not_waited_for(chat):
    with fault_proxy(chat, in_order('429-long')) as (url, proxy):
        start = time.monotonic()
        got, = ask(url, [text('a')], max_delay=1.)
    assert got.error.startswith('rate_limit: ') and got.attempt == 1 and time.monotonic() - start < 60


@pytest.mark.parametrize('fault', ['500', '503-html', 'garbage', 'torn-json', 'binary', 'no-choices', 'no-text', 'reset'])
def test_what_passes_is_tried_again(fault, chat):
    with fault_proxy(chat, in_order(fault, fault)) as (url, proxy): got, = ask(url, [text('a')])
    assert (got.text, got.attempt, got.error) == (expected(text('a')), 3, None)


@pytest.mark.parametrize('fault,label', [('500', 'server'), ('503-html', 'server'), ('reset', 'server'), ('429', 'rate_limit'), ('garbage', 'bad_reply'),
                                         ('torn-json', 'bad_reply'), ('binary', 'bad_reply'), ('no-choices', 'bad_reply'), ('no-text', 'bad_reply')])
def test_what_does_not_pass_is_labelled(fault, label, chat):
    with fault_proxy(chat, lambda n, body: fault) as (url, proxy): got, = ask(url, [text('a')], max_retries=2)
    assert got.error.startswith(f'{label}: ') and got.attempt == 3 == len(proxy.log) and got.text == '' and got.finish_reason == 'error'


def test_a_hanging_server_is_a_timeout(chat):
    with fault_proxy(chat, in_order('timeout')) as (url, proxy): got, = ask(url, [text('a')], timeout=1.5)
    assert got.text == expected(text('a')) and got.attempt >= 2
    with fault_proxy(chat, lambda n, body: 'timeout', hang=20.) as (url, proxy):
        start = time.monotonic()
        got, = ask(url, [text('a')], timeout=0.3, max_retries=1)
    assert got.error.startswith('timeout: ') and got.attempt == 2 and time.monotonic() - start < 10


def test_a_refused_key_stops_everything(chat, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    with fault_proxy(chat, lambda n, body: '401') as (url, proxy): got = ask(url, [text(str(i)) for i in range(20)], concurrency=2)
    assert all(g.error.startswith('auth: ') and 'OPENAI_API_KEY' in g.error for g in got)
    assert len(proxy.log) <= 2 and proxy.keys == {f'Bearer {KEY}'}
    assert sum(g.attempt == 0 for g in got) >= 18


@pytest.mark.parametrize('fault,label', [('quota', 'rate_limit'), ('too-long', 'overflow'), ('404', 'not_found')])
def test_what_trying_cannot_mend_is_asked_once(fault, label, chat):
    with fault_proxy(chat, lambda n, body: fault) as (url, proxy): got, = ask(url, [text('a')])
    assert got.error.startswith(f'{label}: ') and len(proxy.log) == 1


def test_one_failure_does_not_touch_the_others(chat, picture, tmp_path):
    (tmp_path/'torn.png').write_bytes(b'\x89PNG\r\n')
    broken = Request('torn', [{'role': 'user', 'content': [{'type': 'image', 'image': str(tmp_path/'torn.png')}, {'type': 'text', 'text': '?'}]}], 'ours')
    asked = [text('a'), broken, text('b')]
    with fault_proxy(chat, lambda n, body: '500' if b'hello b' in body else None) as (url, proxy): got = ask(url, asked, max_retries=1)
    assert [g.id for g in got] == ['a', 'torn', 'b'] and got[0].text == expected(asked[0])
    assert got[1].error.startswith('media: ') and 'torn.png' in got[1].error and got[2].error.startswith('server: ')
    assert len(proxy.log) == 3


def test_sixty_requests_through_every_fault(chat):
    asked = [text(f'item {i}') for i in range(60)]
    rotation = ('429', None, '500', None, 'timeout', 'garbage', None, 'torn-json', 'reset', None)
    with fault_proxy(chat, once_each(rotation), hang=3.) as (url, proxy): got = ask(url, asked, timeout=2., concurrency=6)
    print(f'{len(asked)} requests, {len(proxy.log)} calls, attempts {sorted({g.attempt for g in got})}, {proxy.most_open} open at most')
    assert [g.text for g in got] == [expected(r) for r in asked]
    assert len(proxy.log) == sum(g.attempt for g in got) >= 60 + 36


def test_concurrency_is_bounded(chat):
    with fault_proxy(chat, once_each(('timeout',)), hang=0.3) as (url, proxy): ask(url, [text(str(i)) for i in range(12)], concurrency=3)
    assert 2 <= proxy.most_open <= 4


def test_it_works_inside_a_running_loop(chat):
    async def cell(): return ask(chat, [text('a')])
    assert asyncio.run(cell())[0].text == expected(text('a'))


def test_an_interrupt_ends_the_requests(chat):
    # a process started in the background of a shell ignores the signal, and Python then raises nothing
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try: _interrupted(chat)
    finally: signal.signal(signal.SIGINT, before)


def _interrupted(chat):
    with fault_proxy(chat, lambda n, body: 'timeout', hang=20.) as (url, proxy):
        threading.Timer(1., os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt): ask(url, [text(str(i)) for i in range(4)], timeout=30.)
    assert time.monotonic() - start < 10 and not [t for t in threading.enumerate() if 'run_forever' in t.name]


def test_the_key_appears_nowhere(chat, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    model = load_model(f'openai:m@{chat}')
    with fault_proxy(chat, lambda n, body: '401') as (url, proxy): refused, = ask(url, [text('a')])
    record = json.dumps(model.describe()) + repr(model) + repr(refused)
    assert KEY not in record and KEY[3:12] not in record
    assert isinstance(model, Model) and json.loads(json.dumps(model.describe()))['key'] is True


@pytest.mark.parametrize('url', ['http://user:secret@127.0.0.1:9/v1', 'http://127.0.0.1:9/v1?api-key=secret'])
def test_a_secret_in_the_address_is_refused(url):
    with pytest.raises(ModelError, match='OPENAI_API_KEY'): load_model(f'openai:m@{url}')


def test_the_server_tells_its_name(chat):
    model = load_model(f'openai:m@{chat}')
    cut, = model.generate([text('a')], 4)
    assert cut.finish_reason == 'length' and model.describe()['answered_by'] == ['m-2026-01-01']


def test_the_environment_does_not_move_the_server(chat, monkeypatch):
    monkeypatch.setenv('OPENAI_BASE_URL', chat)
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    assert load_model('openai:gpt-4o').describe()['server'] == 'api.openai.com'
    monkeypatch.delenv('OPENAI_API_KEY')
    with pytest.raises(ModelError, match='OPENAI_API_KEY'): load_model('openai:gpt-4o')


@pytest.mark.parametrize('options', [{'top_q': 1}, {'top_p': 2}, {'temperature': 'hot'}, {'token_field': 'limit'}, {'detail': 'huge'}, {'concurrency': 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ModelError): load_model('openai:m@http://127.0.0.1:9/v1', **options)


def test_lengths_are_estimated(picture):
    asked = Request('a', [{'role': 'user', 'content': [{'type': 'image', 'image': picture}, {'type': 'text', 'text': 'x'*40}]}], 'ours')
    lengths = load_model('openai:m@http://127.0.0.1:9/v1').measure(asked)
    assert (lengths.n_text, lengths.n_visual) == (10, 6)


def test_pauses_double_and_end():
    from vlm_repro.models.openai import Fault
    patience = Patience(3, 1., 3.)
    assert [patience.delay(n, Fault('server', '', True), 1.) for n in (1, 2, 3, 4)] == [1., 2., 3., None]


def reply(handler, content, finish='stop', usage=None):
    body = {'id': '1', 'object': 'chat.completion', 'created': 0, 'model': 'm', 'choices': [{'index': 0, 'message': {'role': 'assistant', 'content': content}, 'finish_reason': finish}],
            'usage': usage or {'prompt_tokens': 11, 'completion_tokens': 3, 'total_tokens': 14}}
    out = json.dumps(body).encode()
    handler.rfile.read(int(handler.headers['Content-Length']))
    handler.send_response(200)
    handler.send_header('Content-Type', 'application/json')
    handler.send_header('Content-Length', str(len(out)))
    handler.end_headers()
    handler.wfile.write(out)


@pytest.mark.parametrize('content,finish,usage,expect', [
    ([{'type': 'text', 'text': 'Sun'}, {'type': 'text', 'text': 'ny.'}], 'stop', None, 'Sunny.'),
    ('sun \ud83d', 'stop', None, 'sun �'),
    ('Sunny.', 'stop', {'prompt_tokens': None, 'completion_tokens': None}, 'Sunny.'),
    ('', 'content_filter', None, 'bad_reply: '), ([], 'stop', None, 'bad_reply: ')])
def test_odd_replies_are_read_or_labelled_and_can_be_kept(content, finish, usage, expect, tmp_path):
    from vlm_repro.core.generate import generate
    from vlm_repro.core.runs import open_run
    with listen(lambda handler: reply(handler, content, finish, usage)) as url:
        run = open_run(tmp_path/'run', {})
        generate(load_model(f'openai:m@{url}', base_delay=.02, max_retries=1), [text('a')], run, progress=False)
        row, = run.rows('predictions')
        run.close()
    assert (row['error'] or row['text']).startswith(expect) and row['attempt'] == (1 if row['text'] else 2)


@pytest.mark.parametrize('message', [
    'The decoder prompt (length 9216) is longer than the maximum model length of 8192.', 'The request input length 9216 exceeds session_len 8192',
    "The input (9216 tokens) is longer than the model's context length (8192 tokens).", "This model's maximum context length is 8192 tokens."])
def test_overflow_is_known_in_every_servers_words(message):
    import httpx
    import openai

    from vlm_repro.models.openai import fault_of
    request = httpx.Request('POST', 'http://h/v1')
    error = openai.BadRequestError(message, response=httpx.Response(400, request=request), body=None)
    assert fault_of(error, 'h').label == 'overflow'


@pytest.mark.parametrize('wait', ['3600', 'inf'])
def test_one_wait_that_is_not_waited_for_holds_nobody_up(wait):
    first = []
    def handle(handler):
        if first: return reply(handler, 'Sunny.')
        first.append(1)
        handler.rfile.read(int(handler.headers['Content-Length']))
        handler.send_response(429)
        handler.send_header('Retry-After', wait)
        handler.send_header('Content-Length', '0')
        handler.end_headers()
    with listen(handle) as url:
        start = time.monotonic()
        got = ask(url, [text(str(i)) for i in range(4)], concurrency=1)
    assert [bool(g.error) for g in got] == [True, False, False, False] and time.monotonic() - start < 30


def test_a_model_the_server_has_not_is_asked_for_once(chat):
    with fault_proxy(chat, lambda n, body: '404') as (url, proxy): got = ask(url, [text(str(i)) for i in range(12)], concurrency=2)
    assert len(proxy.log) <= 2 and all(g.error.startswith('not_found: ') and 'name of the model' in g.error for g in got)
