"""Judging through a server: `python benchmarks/judging.py [--out benchmarks/results/judging.json]`.

A server on this machine, in a process of its own, answers every call after 50 ms. Every 500th call closes it for 50 ms, in which it answers 429 with a Retry-After; one question in a hundred gets
garbage, half of them the first time only: words without a number, a page of HTML, a reply without choices, half of a JSON text. Compared, for 5,000 answers to be judged and 8 calls in flight:
  ours     `metrics.judge.collect` with a `ModelJudge`, every reply kept in a run folder
  pool     a pool of 8 threads around the client as it comes, with its own retries; nothing is kept
The bound is calls x latency / calls in flight; what the closed door and the garbage cost is not taken off it. First the scores: where the server gave one, ours must be that score; where it gave
none, ours must be a labelled failure. `pool` must agree where the server's first reply was sound.
"""
import argparse
import asyncio
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from bench import arguments, finish, hot_spots, interleaved, least, now, one_thread, require, versions

one_thread()

LATENCY, CONCURRENCY, EVERY, CLOSED = 0.05, 8, 500, 0.05
KINDS = ("words", "html", "choiceless", "cut")


# What the server does, known to both sides. ----------------------------------------------------------------------------------------------------------------------------------------------

def score_of(i: int) -> int:
    """The score of an answer."""
    return 1 + i * 7 % 5


def garbage_of(i: int) -> str:
    """What is wrong with the first reply to an answer; empty for nothing."""
    return KINDS[i // 100 % 4] if i % 100 == 7 else ""


def hopeless(i: int) -> bool:
    """Whether every reply to an answer is garbage."""
    return bool(garbage_of(i)) and i // 400 % 2 == 0


class Talk(asyncio.Protocol):
    """One connection of HTTP/1.1."""
    asked: Counter[int] = Counter()
    calls, closed_until = 0, 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None: self.transport, self.held = transport, b""

    def data_received(self, data: bytes) -> None:
        self.held += data
        while b"\r\n\r\n" in self.held:
            head, _, rest = self.held.partition(b"\r\n\r\n")
            length = int(re.search(rb"content-length: *(\d+)", head, re.I)[1])
            if len(rest) < length: return
            self.held = rest[length:]
            self.answer(rest[:length])

    def answer(self, body: bytes) -> None:
        loop, cls = asyncio.get_running_loop(), type(self)
        cls.calls += 1
        if cls.calls % EVERY == 0: cls.closed_until = loop.time() + CLOSED
        if loop.time() < cls.closed_until: return self.send(b'{"error": {"message": "slow down", "type": "rate_limit"}}', "429 Too Many Requests", f"Retry-After: {CLOSED}\r\n")
        i = int(re.search(rb"answer number (\d+)", body)[1])
        cls.asked[i] += 1
        loop.call_later(LATENCY, self.send, reply(i, cls.asked[i]))

    def send(self, body: bytes, status: str = "200 OK", more: str = "") -> None:
        self.transport.write(f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{more}\r\n".encode() + body)


def reply(i: int, attempt: int) -> bytes:
    """The body of a reply with status 200."""
    wrong = garbage_of(i) if attempt == 1 or hopeless(i) else ""
    if wrong == "html": return b"<html><body>Welcome to the gateway</body></html>"
    text = "I would say that it is rather good." if wrong == "words" else str(score_of(i))
    choices = [] if wrong == "choiceless" else [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]
    whole = json.dumps({"id": f"c{i}", "object": "chat.completion", "created": 1, "model": "judge", "choices": choices, "usage": {"prompt_tokens": 90, "completion_tokens": 1, "total_tokens": 91}}).encode()
    return whole[:len(whole) // 2] if wrong == "cut" else whole


async def serve() -> None:
    """Until standard input ends; the port is printed first."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Talk, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


@contextmanager
def served() -> Iterator[str]:
    """The address of a fresh server."""
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try: yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.stdin.close()
        process.wait(10)


# Both clients. -------------------------------------------------------------------------------------------------------------------------------------------------------------------------

SYSTEM, USER = "You judge answers. Reply with one integer from 1 to 5 and nothing else.", "Question: {question}\nGold answer: {gold}\nAnswer: {prediction}"


def items_of(n: int) -> list[Any]:
    from vlm_repro.metrics.judge import JudgeItem
    return [JudgeItem(f"s{i:05}", "Is there a bench to sit on near the bus stop, and which way is it from the walker?", "Yes, two metres to the left.", f"This is answer number {i}.") for i in range(n)]


def ours(url: str, n: int, concurrency: int) -> dict[str, Any]:
    """Scores by `collect`: id to value, and labels of what failed."""
    from vlm_repro.metrics.judge import JudgePrompt, ModelJudge, collect, scores_of
    judge = ModelJudge(f"openai:judge@{url}", JudgePrompt(SYSTEM, USER, "ours"), options={"concurrency": concurrency})
    from vlm_repro.core.runs import open_run
    items = items_of(n)
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(folder, {"what": "a benchmark"})
        held = collect(judge, items, run)
        run.close()
    scores = [scores_of(item.id, held.get(judge.key(item), ()), "judge")[0] for item in items]
    return {"scores": {int(s.id[1:]): (s.values[0] if s.values else None, s.label) for s in scores}}


def pool(url: str, n: int, concurrency: int) -> dict[str, Any]:
    """Scores by the client as it comes, one thread a call in flight."""
    import openai

    from vlm_repro.metrics.judge import JudgePrompt, lone_integer
    prompt = JudgePrompt(SYSTEM, USER, "ours")

    def ask(client: openai.OpenAI, item: Any) -> int | None:
        system, user = prompt.render(item)
        try: got = client.chat.completions.create(model="judge", temperature=0, seed=0, max_tokens=64, messages=[{"role": "system", "content": system}, {"role": "user", "content": user}])
        except (openai.OpenAIError, ValueError): return None
        return lone_integer(got.choices[0].message.content) if getattr(got, "choices", None) else None

    with openai.OpenAI(api_key="none", base_url=url, max_retries=5) as client, ThreadPoolExecutor(concurrency) as threads:
        return {"scores": {i: (value, "") for i, value in enumerate(threads.map(lambda item: ask(client, item), items_of(n)))}}


def run(way: Any, n: int, concurrency: int) -> dict[str, Any]:
    """One way against a fresh server; what it found beside its own seconds."""
    import time
    with served() as url:
        start = time.perf_counter()
        found = way(url, n, concurrency)
        return {"seconds": time.perf_counter() - start, **faults(found["scores"], n)}


def faults(scores: dict[int, tuple[float | None, str]], n: int) -> dict[str, int]:
    """What is wrong with a set of scores."""
    got = [scores.get(i, (None, "")) for i in range(n)]
    sound = [i for i in range(n) if not garbage_of(i)]
    return {"wrong": sum(v is not None and (hopeless(i) or v != score_of(i)) for i, (v, _) in enumerate(got)),
            "unlabelled": sum(v is None and label.split(":")[0] in ("", "ok") for v, label in got),
            "given_up": sum(got[i][0] is None and not hopeless(i) for i in range(n)), "sound_lost": sum(got[i][0] is None for i in sound)}


def compare(n: int) -> dict[str, Any]:
    """Ours has every score that there was and says where there was none."""
    mine, other = run(ours, n, CONCURRENCY), run(pool, n, CONCURRENCY)
    require(not (mine["wrong"] or mine["unlabelled"] or mine["given_up"]), f"ours: {mine}")
    require(not (other["wrong"] or other["sound_lost"]), f"pool: {other}")
    return {"calls": n, "ours": mine, "pool": other}


def profile(n: int) -> dict[str, Any]:
    """The cost of a call on this side, which is what stands between the figure and the bound."""
    with served() as url: return {"calls": n, "functions": hot_spots(lambda: ours(url, n, CONCURRENCY), threads=True)}


def parsed() -> argparse.Namespace:
    parser = arguments("Time a judge behind a server.", rounds=2)
    parser.add_argument("--calls", type=int, default=5_000)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options, begun = parsed(), now()
    if options.serve: return asyncio.run(serve())
    n = 208 if options.quick else options.calls
    equal = compare(min(n, 1000))
    ways = {"ours": lambda: run(ours, n, CONCURRENCY), "pool": lambda: run(pool, n, CONCURRENCY), "ours_at_32": lambda: run(ours, n, 32)}
    if options.quick: del ways["ours_at_32"]
    rounds = interleaved(ways, 1 if options.quick else options.rounds, "judge")
    bound = n * LATENCY / CONCURRENCY
    seen = [row["ours"] for row in rounds]
    figures = {"share_of_bound": bound / least(rounds, "ours", "seconds"), "silent_failures": max(r["wrong"] + r["unlabelled"] for r in seen), "given_up": max(r["given_up"] for r in seen),
               "against_pool": least(rounds, "pool", "seconds") / least(rounds, "ours", "seconds")}
    finish("C9", options, begun, figures, lambda: profile(1000), versions=versions("openai", "httpx"), equal=equal, rounds=rounds,
           sizes={"calls": n, "latency_s": LATENCY, "in_flight": CONCURRENCY, "closed_every": EVERY, "closed_s": CLOSED, "bound_s": bound})


if __name__ == "__main__":
    main()
