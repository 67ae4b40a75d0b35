"""Keeping records: `python benchmarks/records.py [--out benchmarks/results/records.json]`.

Compared, for 10,000 answers of about 250 characters that arrive 8 at a time:
  ours     what `core.generate` does with a batch: `RunFolder.append` of its predictions, forced to the disk, and of its timing
  rewrite  all answers so far, as one pickle that replaces the last, forced to the disk once a batch; this is what keeping a dictionary of results in one file comes to
Both must read back as the same rows before anything is timed. Then a process that appends is ended with SIGKILL, again and again, at moments that are drawn: of what it had acknowledged nothing
may be lost, of what it had taken on at most one batch, and the folder must open and continue.

Waiting for the disk depends on who else writes to it, so the least of the rounds is taken batch by batch and summed, on both sides; `whole_rounds` is the ratio of whole rounds.
"""
import argparse
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import arguments, finish, hot_spots, interleaved, least, now, one_thread, require, versions

one_thread()

from vlm_repro.core.records import Generation, to_row  # noqa: E402
from vlm_repro.core.runs import open_run, read_run  # noqa: E402

BATCH = 8
Row = dict[str, Any]


def answers(n: int, start: int = 0) -> list[Row]:
    """Predictions of about 250 characters, as the generate stage writes them."""
    rng = random.Random(start)
    text = lambda: " ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(36))
    return [to_row(Generation(f"E1-Busstop{i % 12}-{i:06}", text(), tuple(rng.choices(range(1500), k=40)), 805, 600, 40, f"{i:016x}", f"{i:016x}", "stop")) for i in range(start, start + n)]


def batches(rows: list[Row]) -> Iterator[tuple[list[Row], Row]]:
    """A batch and its timing."""
    for start in range(0, len(rows), BATCH):
        batch = rows[start:start + BATCH]
        yield batch, {"ids": [r["id"] for r in batch], "n": len(batch), "seconds": 0.1, "n_prompt": 6440, "n_visual": 4800, "n_new": 320}


def ours(root: Path, rows: list[Row]) -> dict[str, Any]:
    """Append."""
    run, seconds = open_run(root, {"what": "a benchmark"}), []
    try:
        for batch, timing in batches(rows):
            start = time.perf_counter()
            run.append("predictions", batch)
            run.append("timings", [timing], force=False)
            seconds.append(time.perf_counter() - start)
    finally: run.close()
    return {"bytes_written": sum(f.stat().st_size for f in root.glob("*.jsonl")), "batch_s": seconds}


def rewrite(root: Path, rows: list[Row]) -> dict[str, Any]:
    """Replace everything by everything and one batch more."""
    held, written, seconds = {}, 0, []
    root.mkdir(parents=True, exist_ok=True)
    for batch, _ in batches(rows):
        start = time.perf_counter()
        held |= {r["id"]: r for r in batch}
        data = pickle.dumps(held)
        with open(root / "held.part", "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(root / "held.part", root / "held.pkl")
        written += len(data)
        seconds.append(time.perf_counter() - start)
    return {"bytes_written": written, "batch_s": seconds}


def batch_by_batch(rounds: list[dict[str, Any]], way: str) -> float:
    """Seconds of all batches, of each the least of the rounds: a disk that others use too is slow now and then, and not for the same batch every time."""
    return sum(map(min, zip(*(row[way]["batch_s"] for row in rounds))))


def compare(folder: Path, rows: list[Row]) -> dict[str, Any]:
    """Both stores hold the same rows."""
    ours(folder / "ours", rows)
    rewrite(folder / "rewrite", rows)
    mine, other = read_run(folder / "ours").rows("predictions"), pickle.loads((folder / "rewrite/held.pkl").read_bytes())
    same = mine == json.loads(json.dumps(list(other.values())))  # tuples come back as lists
    require(same and len(mine) == len(rows), "the rows that were read back")
    return {"rows": len(mine)}


# Ended without warning. ------------------------------------------------------------------------------------------------------------------------------------------------------------------

def writer(root: Path) -> None:
    """Append and say so, until somebody ends this process."""
    run = open_run(root, {"what": "a benchmark"})
    rows = answers(5_000, start=len(run.rows("predictions")) + BATCH)  # never an id that an ended process may have taken on
    print("ready", flush=True)
    for batch, timing in batches(rows):
        print("taken", *(r["id"] for r in batch), flush=True)
        run.append("predictions", batch)
        run.append("timings", [timing], force=False)
        print("kept", *(r["id"] for r in batch), flush=True)


def kill_once(root: Path, after: float) -> dict[str, Any]:
    """Start the writer, end it after so many seconds of writing, and see what is there."""
    process = subprocess.Popen([sys.executable, __file__, "--writer", str(root)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready"
    before = {r["id"] for r in read_run(root).rows("predictions")} if (root / "predictions.jsonl").exists() else set()
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    said = [line.split() for line in process.stdout.read().splitlines()]
    process.wait()
    taken, kept = ({i for word, *ids in said if word == which for i in ids} for which in ("taken", "kept"))
    run = open_run(root, {"what": "a benchmark"})  # mends a torn last line
    held = {r["id"] for r in run.rows("predictions")}
    run.close()
    return {"after_s": round(after, 4), "taken": len(taken), "acknowledged_lost": len((before | kept) - held), "taken_lost": len(taken - held), "unknown": len(held - before - taken)}


def kills(folder: Path, times: int) -> list[dict[str, Any]]:
    """The same folder, ended and continued."""
    rng = random.Random(1)
    return [kill_once(folder / "killed", rng.uniform(0.005, 0.3)) for _ in range(times)]


def parsed() -> argparse.Namespace:
    parser = arguments("Time two ways of keeping records, and end one of them without warning.", rounds=3)
    parser.add_argument("--answers", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--writer", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options, begun = parsed(), now()
    if options.writer: return writer(options.writer)
    n, times = (400, 3) if options.quick else (options.answers, options.kills)
    rows, turn = answers(n), iter(range(1_000_000))
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        equal = compare(folder / "equal", rows)
        ways = {"ours": lambda: ours(folder / f"ours{next(turn)}", rows), "rewrite": lambda: rewrite(folder / f"rewrite{next(turn)}", rows)}
        rounds = interleaved(ways, 1 if options.quick else options.rounds, "records")
        ended = kills(folder, times)
        summed = {way: batch_by_batch(rounds, way) for way in ways}
        slim = [{way: {k: v for k, v in seen.items() if k != "batch_s"} for way, seen in row.items()} for row in rounds]
        figures = {"against_rewrite": summed["rewrite"] / summed["ours"], "bytes_against_rewrite": rounds[0]["ours"]["bytes_written"] / rounds[0]["rewrite"]["bytes_written"],
                   "acknowledged_lost": max(k["acknowledged_lost"] for k in ended), "taken_lost": max(k["taken_lost"] for k in ended)}
        finish("C3", options, begun, figures, lambda: hot_spots(ways["ours"]), versions=versions(), sizes={"answers": n, "batch": BATCH, "kills": times}, equal=equal, batch_by_batch_s=summed,
               whole_rounds=least(rounds, "rewrite") / least(rounds, "ours"), rounds=slim, kills=ended)


if __name__ == "__main__":
    main()
