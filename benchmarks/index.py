"""A large annotation file: `python benchmarks/index.py [--datasets ENV] [--out benchmarks/results/index.json]`.

A file in the form of RoboInter-VQA is made, a million records and two gigabytes, and read by:
  ours      `robointer.index`: the offsets of all records found and kept on disk, then records read at random places
  json      `json.load`, then records taken from the list
  datasets  `datasets.load_dataset('json', ...)` where ENV is a virtual environment that has it, then rows taken at random; its cache is empty before
Each is a process of its own, for the sake of its peak memory; the times are taken within it, behind its imports. The records that each gives must be the same before anything is kept.
Peak memory is the largest resident size, mapped files included. A way that runs out of the memory or the time it is given says so in the result. The file is deleted in the end.
"""
import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import arguments, cpu_seconds, finish, hot_spots, interleaved, least, now, one_thread, peak_bytes, require, versions

one_thread()

GIGABYTE = 1 << 30
Row = dict[str, Any]


def record(rng: random.Random, words: Sequence[str], k: int) -> Row:
    """A record as `traj_qa` has them, with what a scanner has to cope with in its text; about two kilobytes."""
    gt = [[rng.randrange(308), rng.randrange(168)] for _ in range(10)]
    id = f"RH20T_cfg{k % 7}_task_{k % 210:04}_user_0066_scene_0003_cfg_0007_{k:012}"
    asked = " ".join(rng.choices(words, k=110))
    question = f"<image>\nThe task is '{asked}, {{step {k}}}'. Say \"none\" or a path such as [[x, y], ...] \\ from {gt[0]}."
    note = " ".join(rng.choices(words, k=65))
    return {"id": f"{id}#{k % 300}", "task": "traj_qa", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": json.dumps({"future_traj": gt})}],
            "images": [f"Generation/image/train/rh20t/traj_qa/{id}_{k % 300}.jpg"], "gt": gt, "h": 360, "w": 640, "new_h": 364, "new_w": 644, "raw_data": {"note": note}}


def write_file(path: Path, n: int) -> dict[str, Any]:
    """The file, record by record."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(3, 13))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as f:
        f.write("[")
        for k in range(n): f.write((",\n" if k else "") + json.dumps(record(rng, words, k)))
        f.write("]")
    return {"records": n, "bytes": path.stat().st_size}


# The ways, each in a process of its own. -----------------------------------------------------------------------------------------------------------------------------------------------

def build(file: Path, folder: Path) -> Callable[[int], Row]:
    """Ours: `folder` holds the index, which is built where it is not there."""
    from vlm_repro.robointer.index import open_records
    return open_records(file, folder).__getitem__


def load_json(file: Path, folder: Path) -> Callable[[int], Row]:
    with file.open(encoding="utf-8") as f: return json.load(f).__getitem__


def load_datasets(file: Path, folder: Path) -> Callable[[int], Row]:
    from datasets import disable_progress_bars, load_dataset
    disable_progress_bars()
    return load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder)).__getitem__


WAYS = {"ours": build, "json": load_json, "datasets": load_datasets}
IMPORTS = {"ours": "vlm_repro.robointer.index", "json": "json", "datasets": "datasets"}


def child(way: str, file: Path, folder: Path, n: int, reads: int) -> None:
    """One way: how long until it can be read, how many reads a second, and what it took; the last line is JSON."""
    __import__(IMPORTS[way])
    idle = peak_bytes()
    start, cpu = time.perf_counter(), cpu_seconds()
    try: get = WAYS[way](file, folder)
    except Exception as e:  # noqa: BLE001 - whatever a library raises when memory ends is the result
        return print(json.dumps({"failed": told(e), "after_s": time.perf_counter() - start, "peak_bytes": peak_bytes()}))
    ready, used, grown = time.perf_counter() - start, cpu_seconds() - cpu, peak_bytes()
    places = random.Random(1).choices(range(n), k=reads)
    start = time.perf_counter()
    for k in places: get(k)
    read = time.perf_counter() - start
    digest = hashlib.sha256("".join(json.dumps(get(k), sort_keys=True) for k in places[:500]).encode()).hexdigest()
    print(json.dumps({"ready_s": ready, "ready_cpu_s": used, "reads_per_s": reads / read, "peak_bytes": peak_bytes(), "peak_when_ready": grown, "imported_bytes": idle, "digest": digest}))


def told(error: BaseException) -> str:
    """An exception in words, and what caused it."""
    own = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]
    return f"{own}; because of {told(error.__cause__)}" if error.__cause__ else own


def run_child(way: str, python: str, file: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What the process said, or that it did not come to an end: a process that takes too much memory or time is ended."""
    words = [python, __file__, "--child", way, "--file", str(file), "--folder", str(folder), "--records", str(options.records), "--reads", str(options.reads)]
    process, most, ended = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), 0, time.monotonic() + options.timeout
    while process.poll() is None:
        most = max(most, resident(process.pid))
        why = f"more than {options.memory / 1e9:.0f} GB resident" if most > options.memory else f"{options.timeout:.0f} s" if time.monotonic() > ended else ""
        if why:
            process.kill()
            process.communicate()
            return {"failed": f"was ended after {why}", "peak_bytes": most}
        time.sleep(0.05)
    out, said = process.communicate()
    if process.returncode or not out.strip(): return {"failed": f"ended with {process.returncode}: {(said.strip().splitlines() or [''])[-1][:300]}", "peak_bytes": most}
    return json.loads(out.splitlines()[-1])


def resident(pid: int) -> int:
    """Bytes of a process in memory; 0 where the system does not tell, or the process is gone."""
    try: return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError): return 0


# All of it. ----------------------------------------------------------------------------------------------------------------------------------------------------------------------------

def fresh(home: Path) -> Iterator[Path]:
    """Empty folders."""
    for k in range(1_000_000): yield home / f"held{k}"


def ways_of(file: Path, home: Path, options: argparse.Namespace) -> dict[str, Callable[[], Row]]:
    folders = fresh(home)
    return {"ours": lambda: run_child("ours", sys.executable, file, next(folders), options), "json": lambda: run_child("json", sys.executable, file, home, options),
            "again": lambda: run_child("ours", sys.executable, file, home / "held0", options)}


def figures_of(rounds: list[Row]) -> dict[str, float]:
    """One number for every claim."""
    top = lambda way, key: max(row[way][key] for row in rounds)
    return {"resident_mb": max(top("ours", "peak_bytes"), top("again", "peak_bytes")) / 1e6, "build_s": least(rounds, "ours", "ready_s"), "open_s": least(rounds, "again", "ready_s"),
            "reads_per_s": max(top("ours", "reads_per_s"), top("again", "reads_per_s")), "build_against_load": least(rounds, "json", "ready_s") / least(rounds, "ours", "ready_s"),
            "memory_against_load": min(row["json"]["peak_bytes"] for row in rounds) / top("ours", "peak_bytes")}


def peer(file: Path, home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`datasets`, once; with its version, or the reason why there are no numbers."""
    if not options.datasets: return {"failed": "not run: no environment that has datasets was named"}
    python = str(options.datasets / "bin/python")
    asked = [python, "-c", "from importlib.metadata import version; print(version('datasets'), version('pyarrow'))"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(("datasets", "pyarrow"), told)) | run_child("datasets", python, file, home / "datasets", options)


def parsed() -> argparse.Namespace:
    parser = arguments("Index a large annotation file, and read it at random.", rounds=3)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--memory", type=int, default=14 * GIGABYTE, help="bytes that a way may have resident")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a way may take")
    parser.add_argument("--datasets", type=Path, help="a virtual environment that has datasets")
    parser.add_argument("--place", type=Path, help="folder for the file, where the usual one for such things is too small")
    for name in ("--child", "--file", "--folder"): parser.add_argument(name, type=Path if name != "--child" else str, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options, begun = parsed(), now()
    if options.child: return child(options.child, options.file, options.folder, options.records, options.reads)
    if options.quick: options.records, options.reads = 3000, 500
    with tempfile.TemporaryDirectory(dir=options.place) as held:
        home, file = Path(held), Path(held) / "train.json"
        about = write_file(file, options.records)
        print(f"index  {about['records']:,} records, {about['bytes'] / 1e9:.2f} GB", flush=True)
        ways = ways_of(file, home, options)
        rounds = interleaved(ways, 1 if options.quick else options.rounds, "index")
        for way in ways: require(all("failed" not in row[way] for row in rounds), f"{way}: {rounds[0][way].get('failed')}")
        other = peer(file, home, options)
        digests = {row[way].pop("digest") for row in rounds for way in ways} | ({other.pop("digest")} if "digest" in other else set())
        require(len(digests) == 1, "the records that were read")
        equal = {"records_compared": min(500, options.reads), "ways": sorted([*ways, *(["datasets"] if "failed" not in other else [])]), "digest": digests.pop()}
        profile = lambda: hot_spots(lambda: build(file, home / "profiled"))
        finish("index", options, begun, figures_of(rounds), profile, versions=versions("numpy"), sizes=about | {"reads": options.reads, "memory_limit": options.memory, "timeout_s": options.timeout},
               equal=equal, peers={"datasets": other}, free_disk=os.statvfs(held).f_bavail * os.statvfs(held).f_frsize, rounds=rounds)


if __name__ == "__main__":
    main()
