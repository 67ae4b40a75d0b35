"""Killed and continued: `python benchmarks/resume.py [--out benchmarks/results/resume.json]`.

A run of 96 questions by a tiny Qwen2-VL is started in some number of processes and ended with SIGKILL, launcher and all, once half of the answers are on the disk; the same run is then continued by
another number of processes: two then one, one then two, two then three. Counted: answers that were on the disk and were made again (repeated), answers that are missing in the end, and answers that
differ from those of a run that nobody touched. Timed: from the loaded model to the first new answer on the disk. Nothing here has a second way to compare with; peers start from the beginning when the number of
processes is another one.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench import HERE, arguments, finish, now, one_thread, require, versions

one_thread()

CASES, NEW, BATCH = ((2, 1), (1, 2), (2, 3)), 24, 4


def lines(root: Path) -> list[dict[str, Any]]:
    """Every whole row of predictions in a run folder, whoever wrote it."""
    out = []
    for path in sorted(root.glob("predictions*.jsonl")):
        out += [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    return out


def run_here(folder: Path, root: Path, nproc: int, n: int) -> dict[str, Any]:
    """Start or continue the run in this process, or in processes that it starts; when the first new row came, counted from the loaded model."""
    import torch

    from vlm_repro.core.generate import generate
    from vlm_repro.core.records import Request, to_row
    from vlm_repro.core.runs import open_run, pin
    from vlm_repro.models.protocol import load_model
    torch.set_num_threads(1)
    held = json.loads((folder / "asked.json").read_text(encoding="utf-8"))
    requests = [Request(r["id"], r["messages"], "ours") for r in held][:n]
    model, run = load_model(str(folder / "model")), open_run(root, {"what": "a benchmark"})
    pin(run, "samples", [{"id": r.id, "request": to_row(r)} for r in requests])
    before, loaded, seen = len(lines(root)), time.perf_counter(), {}

    def watch() -> None:
        while "first_s" not in seen and not seen.get("over"):
            if len(lines(root)) > before: seen["first_s"] = time.perf_counter() - loaded
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try: report = generate(model, requests, run, BATCH, NEW, strict=True, progress=False, nproc=nproc)
    finally: seen["over"] = True
    watcher.join()
    run.close()
    in_processes = [a.first_s for a in report.accounts if a.first_s]
    return {"made": report.made, "reused": report.reused, "first_s": min(in_processes) if nproc > 1 and in_processes else seen["first_s"], "load_s": [a.load_s for a in report.accounts]}


def child(job: dict[str, Any], out: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, "--job", json.dumps(job), "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finished(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """A job run to its end; raises SystemExit with what it said if it fails."""
    process = child(job, out)
    said = process.communicate()[1]
    if process.returncode: raise SystemExit(f"{job} failed:\n{said[-4000:]}")
    return json.loads(out.read_text())


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    import psutil
    try: return [p.pid for p in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]]
    except psutil.NoSuchProcess: return []


def killed_at_half(job: dict[str, Any], root: Path, out: Path) -> int:
    """Start a job and end everything of it once half of the answers are there; how many there were."""
    process = child(job, out)
    while len(lines(root)) < job["n"] // 2:
        if process.poll() is not None: raise SystemExit(f"{job} ended before it was killed:\n{process.stderr.read()[-4000:]}")
        time.sleep(0.01)
    for pid in family(process.pid):
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: continue
    process.wait()
    return len(lines(root))


def case(folder: Path, first: int, then: int, n: int, whole: dict[str, list[int]]) -> dict[str, Any]:
    """One run, killed and continued."""
    root, out = folder / f"run{first}-{then}", folder / f"out{first}-{then}.json"
    job = {"folder": str(folder), "root": str(root), "n": n}
    there = killed_at_half({**job, "nproc": first}, root, out)
    held = {r["id"]: r for r in lines(root)}
    again = finished({**job, "nproc": then}, out)
    rows = lines(root)
    made = {}
    for r in rows: made.setdefault(r["id"], []).append(r)
    other = sum(made[i][-1]["token_ids"] != whole[i] for i in made)
    require(not other, f"{other} answers of the continued run differ from those of the untouched one")
    return {"first": first, "then": then, "there": there, "repeated": sum(len(made[i]) > 1 for i in held), "missing": n - len(made), "made": again["made"], "first_answer_s": again["first_s"], "load_s": again["load_s"]}


def parsed() -> argparse.Namespace:
    parser = arguments("Kill a run and continue it.", rounds=3)
    parser.add_argument("--shape", default="tiny", help="see shapes.py")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(folder: Path, shape: str, n: int) -> None:
    """Checkpoint, pictures and questions."""
    import shapes
    import shots
    folder.mkdir()
    shapes.build(folder / "model", shape)
    requests = shots.asked(folder / "images", n, 1, 0, shots.SIDE["tiny"])
    (folder / "asked.json").write_text(json.dumps([{"id": r.id, "messages": r.messages} for r in requests]), encoding="utf-8")


def main() -> None:
    options, begun = parsed(), now()
    if options.job:
        job = options.job
        return options.out.write_text(json.dumps(run_here(Path(job["folder"]), Path(job["root"]), job["nproc"], job["n"])), encoding="utf-8") and None
    n, cases, times = (24, CASES[:1], 1) if options.quick else (96, CASES, options.rounds)
    rounds = []
    for k in range(times):
        with tempfile.TemporaryDirectory() as held:
            folder = Path(held) / "set"
            prepare(folder, options.shape, n)
            finished({"folder": str(folder), "root": str(folder / "whole"), "n": n, "nproc": 1}, folder / "whole.json")
            whole = {r["id"]: r["token_ids"] for r in lines(folder / "whole")}
            rounds.append([case(folder, first, then, n, whole) for first, then in cases])
            for row in rounds[-1]: print(f"round {k + 1}  {row}", flush=True)
    every = [row for held in rounds for row in held]
    figures = {"repeated": max(r["repeated"] for r in every), "first_answer_s": max(min(held[c]["first_answer_s"] for held in rounds) for c in range(len(cases)))}
    require(not any(r["missing"] for r in every), "answers are missing after the run was continued")
    finish("C8", options, begun, figures, lambda: "where the time goes stands in the accounts of the run", versions=versions("torch", "transformers"),
           sizes={"questions": n, "batch": BATCH, "new_tokens": NEW, "shape": options.shape}, equal={"answers": "of every continued run and the untouched one"}, rounds=rounds)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
