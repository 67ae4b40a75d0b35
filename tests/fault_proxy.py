"""A real HTTP proxy on 127.0.0.1 that spoils some of the requests on their way to a chat server."""
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS: dict[str, tuple[int, dict[str, str], bytes]] = {
    '401': (401, {}, b'{"error": {"message": "Incorrect API key provided", "code": "invalid_api_key"}}'),
    '429': (429, {'Retry-After': '0.4'}, b'{"error": {"message": "Rate limit reached", "code": "rate_limit_exceeded"}}'),
    '429-long': (429, {'Retry-After': '3600'}, b'{"error": {"message": "Rate limit reached"}}'),
    'quota': (429, {}, b'{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'),
    '500': (500, {}, b'{"error": {"message": "The server had an error"}}'),
    '503-html': (503, {'Content-Type': 'text/html'}, b'<html>Service Unavailable</html>'),
    'too-long': (400, {}, b'{"error": {"message": "This model\'s maximum context length is 4096 tokens", "code": "context_length_exceeded"}}'),
    '404': (404, {}, b'{"error": {"message": "The model does not exist"}}'),
    'garbage': (200, {'Content-Type': 'text/html'}, b'<html><body>Welcome to the hotel WiFi</body></html>'),
    'torn-json': (200, {}, b'{"id": "1", "choices": [{"mess'),
    'binary': (200, {}, bytes(range(128, 256))),
    'no-choices': (200, {}, b'{"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": []}'),
    'no-text': (200, {}, b'{"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [{"index": 0, "finish_reason": "content_filter",'
                         b' "message": {"role": "assistant", "content": null}}]}'),
}


class Proxy:
    "Counts what passes; `script(n, body)` names the fault of the n-th request, or None to let it through."
    def __init__(self, upstream: str, script: Callable[[int, bytes], str | None], hang: float):
        self.upstream, self.script, self.hang = urlsplit(upstream), script, hang
        self.lock, self.log, self.open, self.most_open = threading.Lock(), [], 0, 0
        self.keys: set[str | None] = set()

    def take(self, body: bytes, key: str | None) -> str | None:
        with self.lock:
            fault = self.script(len(self.log), body)
            self.log.append((time.monotonic(), fault))
            self.keys.add(key)
            return fault

    def forward(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.upstream.netloc, timeout=120)
        connection.request('POST', path, body, {'Content-Type': 'application/json'})
        reply = connection.getresponse()
        out = reply.status, {'Content-Type': reply.headers.get('Content-Type', 'application/json')}, reply.read()
        connection.close()
        return out

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers['Content-Length']))
        fault = self.take(body, handler.headers.get('Authorization'))
        if fault in ('timeout', 'reset'):
            if fault == 'timeout': time.sleep(self.hang)
            handler.close_connection = True
            return
        status, headers, out = FAULTS[fault] if fault else self.forward(handler.path, body)
        handler.send_response(status)
        for k, v in {'Content-Type': 'application/json', **headers, 'Content-Length': str(len(out))}.items(): handler.send_header(k, v)
        handler.end_headers()
        handler.wfile.write(out)

    def count(self, fault: str | None) -> int: return sum(f == fault for _, f in self.log)


@contextmanager
def listen(handle: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    "An HTTP server on a free port; gives its base URL."
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass

        def do_POST(self):
            try: handle(self)
            except (BrokenPipeError, ConnectionResetError): self.close_connection = True

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield f'http://127.0.0.1:{server.server_port}/v1'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def fault_proxy(upstream: str, script: Callable[[int, bytes], str | None], hang: float = 2.0) -> Iterator[tuple[str, Proxy]]:
    "A proxy in front of `upstream`; gives its base URL and its counts."
    proxy = Proxy(upstream, script, hang)

    def handle(handler: BaseHTTPRequestHandler) -> None:
        with proxy.lock:
            proxy.open += 1
            proxy.most_open = max(proxy.most_open, proxy.open)
        try: proxy.handle(handler)
        finally:
            with proxy.lock: proxy.open -= 1
    with listen(handle) as url: yield url, proxy


def once_each(rotation: tuple[str | None, ...]) -> Callable[[int, bytes], str | None]:
    "The first time a request body is seen it gets the next fault of the rotation; after that it passes."
    seen: set[bytes] = set()

    def script(n: int, body: bytes) -> str | None:
        if body in seen: return None
        seen.add(body)
        return rotation[(len(seen) - 1) % len(rotation)]
    return script


def in_order(*faults: str | None) -> Callable[[int, bytes], str | None]:
    "The n-th request gets the n-th fault; those after the last one pass."
    return lambda n, body: faults[n] if n < len(faults) else None


def completion(body: dict, text: str, finish_reason: str = 'stop') -> bytes:
    "A chat completion as a server sends it."
    return json.dumps({'id': '1', 'object': 'chat.completion', 'created': 0, 'model': body['model'] + '-2026-01-01',
                       'choices': [{'index': 0, 'message': {'role': 'assistant', 'content': text}, 'finish_reason': finish_reason}],
                       'usage': {'prompt_tokens': 11, 'completion_tokens': 3, 'total_tokens': 14}}).encode()


@contextmanager
def chat_server(say: Callable[[dict], str], bodies: list[dict], shortest: int = 0) -> Iterator[str]:
    "A chat server that answers what `say` makes of a request, and keeps the requests; an answer limited to fewer tokens than `shortest` is cut off."
    def handle(handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers['Content-Length'])))
        bodies.append(body)
        out = completion(body, say(body), 'length' if body.get('max_tokens', shortest) < shortest else 'stop')
        handler.send_response(200)
        handler.send_header('Content-Type', 'application/json')
        handler.send_header('Content-Length', str(len(out)))
        handler.end_headers()
        handler.wfile.write(out)
    with listen(handle) as url: yield url
