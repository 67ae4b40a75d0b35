"""What the benchmark scripts share: turns, figures, versions, what was predicted, and the one JSON line at the end.

A result is a JSON object. `figures` holds one number for every claim that `predictions.json` makes of the same id; `equal` says what was found equal before anything was timed; `rounds` holds
every single measurement. A script that is asked to write into `results/` refuses while its own predictions are not committed: what was expected has to be on record before what came.
"""
import argparse
import cProfile
import json
import os
import platform
import pstats
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, PREDICTIONS = HERE / "results", HERE / "predictions.json"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def one_thread() -> None:
    """One thread of arithmetic, here and in the processes started from here; to be called before torch or numpy is imported."""
    os.environ.update(dict.fromkeys(THREADS, "1"), TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")


# Time and memory. ----------------------------------------------------------------------------------------------------------------------------------------------------------------------

def cpu_seconds() -> float:
    """CPU seconds so far, of this process and of the children it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


@contextmanager
def timed(seen: dict[str, float]) -> Iterator[None]:
    """Wall and CPU seconds of the block, of this process and the children it waited for."""
    before, wall = cpu_seconds(), time.perf_counter()
    try: yield
    finally: seen.update(wall_s=time.perf_counter() - wall, cpu_s=cpu_seconds() - before)


def interleaved(ways: Mapping[str, Callable[[], Any]], rounds: int, say: str = "") -> list[dict[str, dict[str, float]]]:
    """Every way once a round, in turns that change their order from round to round; what a way returns as a dictionary is kept beside its seconds."""
    out = []
    for k in range(rounds):
        row = {}
        for name in (list(ways) if k % 2 == 0 else list(ways)[::-1]):
            seen: dict[str, float] = {}
            with timed(seen): got = ways[name]()
            row[name] = {**seen, **(got if isinstance(got, dict) else {}), "load": os.getloadavg()[0]}
            if say: print(f"{say}  round {k + 1}  {name:12} {row[name]['wall_s']:8.3f} s wall {row[name]['cpu_s']:8.3f} s CPU", flush=True)
        out.append(row)
    return out


def least(rounds: Sequence[Mapping[str, Mapping[str, float]]], way: str, key: str = "wall_s") -> float:
    """The smallest of one way's measurements."""
    return min(row[way][key] for row in rounds)


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# What is compared must be equal. ---------------------------------------------------------------------------------------------------------------------------------------------------------

def require(condition: bool, what: str) -> None:
    """Refuse to time what does not give the same result."""
    if not condition: raise SystemExit(f"not timed, because the results differ: {what}")


# Conditions. ---------------------------------------------------------------------------------------------------------------------------------------------------------------------------

def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = {row.partition(":")[2].strip() for row in info.read_text().splitlines() if row.startswith("model name")} if info.exists() else {platform.processor()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": sorted(names), "cpus": os.cpu_count(), "memory_gib": round(memory / 2**30, 1), "system": platform.system(), "python": platform.python_version(),
            "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(), "load": [round(x, 2) for x in os.getloadavg()]}


def versions(*packages: str) -> dict[str, str]:
    """The versions of the packages that are installed."""
    def of(package: str) -> str:
        try: return version(package)
        except PackageNotFoundError: return "absent"
    return {package: of(package) for package in ("vlm_repro", *packages)}


# Predictions, and the result. ---------------------------------------------------------------------------------------------------------------------------------------------------------

def claims_of(id: str) -> dict[str, Any]:
    """What `predictions.json` says of a row."""
    return json.loads(PREDICTIONS.read_text(encoding="utf-8"))[id]


def committed(id: str) -> str | None:
    """The commit that last touched the predictions; None in a tree without git. Raises SystemExit where this row's predictions are not in it."""
    def git(*words: str) -> str: return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True).stdout.strip()
    try: known, commit = json.loads(git("show", "HEAD:./predictions.json")), git("log", "-1", "--format=%h", "--", "predictions.json")
    except (OSError, subprocess.CalledProcessError): return None
    if known.get(id) != claims_of(id): raise SystemExit(f"commit predictions.json first: what it says of {id} has to be on record before the result")
    return commit


def arguments(what: str, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--rounds", type=int, default=rounds, help="how often every way is timed; the least counts")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: tries the script, measures nothing worth keeping")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def meets(value: float, goal: str) -> bool | None:
    """Whether a figure meets a goal such as `>= 2`; None where none is set."""
    sign, _, limit = goal.partition(" ")
    if not limit: return None
    return {">=": value >= float(limit), "<=": value <= float(limit), "<": value < float(limit)}[sign]


def missed(id: str, figures: Mapping[str, float]) -> list[str]:
    """The claims whose goal these figures do not meet."""
    return [name for name, claim in claims_of(id)["claims"].items() if meets(figures[name], claim["goal"]) is False]


def portable(word: str) -> str:
    """A word of a command line without where things lie on this machine."""
    return Path(word).name if Path(word).is_absolute() else word


def finish(id: str, options: argparse.Namespace, begun: datetime, figures: dict[str, float], profile: Callable[[], Any] | None = None, **held: Any) -> dict[str, Any]:
    """Write the result where one is wanted, with a profile where a goal is missed, and print it as one line."""
    lost = missed(id, figures)
    result = {"id": id, "what": claims_of(id)["of"], "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *map(portable, sys.argv[1:])]), "begun": begun.isoformat(timespec="seconds"),
              "quick": options.quick, "predicted_in": None if options.quick else committed(id), "machine": machine(), "figures": figures, "missed": lost, **held}
    if lost and profile and not options.quick: result["profile"] = profile()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"id": id, "figures": figures, "missed": lost}))
    return result


def now() -> datetime:
    return datetime.now(timezone.utc)


def hot_spots(call: Callable[[], Any], n: int = 15, threads: bool = False) -> list[dict[str, Any]]:
    """Where one call spends its time: the functions with the most time of their own, in threads that it starts too if asked."""
    profilers, original = [cProfile.Profile()], threading.Thread.run

    def watched(self: threading.Thread) -> None:
        profilers.append(cProfile.Profile())
        profilers[-1].runcall(original, self)

    if threads: threading.Thread.run = watched
    try: profilers[0].runcall(call)
    finally: threading.Thread.run = original
    stats = pstats.Stats(*profilers).stats
    rows = sorted(((own, total, calls, where) for where, (calls, _, own, total, _) in stats.items()), key=lambda row: -row[0])[:n]
    return [{"function": f"{Path(file).name}:{line}:{name}", "calls": calls, "own_s": round(own, 4), "total_s": round(total, 4)} for own, total, calls, (file, line, name) in rows]
