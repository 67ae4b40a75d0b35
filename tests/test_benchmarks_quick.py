"""Every benchmark script at its smallest size: the results are equal, every claim gets its figure, and the committed results are those of committed predictions."""
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PREDICTIONS = json.loads((ROOT / "benchmarks/predictions.json").read_text(encoding="utf-8"))
RESULTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))}
COMMITTED = {name: held for name, held in RESULTS.items() if "id" in held}
QUICK = {"bootstrap": "C10", "records": "C3", "judging": "C9", "index": "index"}
SLOW = {"answers": "C1", "shots": "C2", "video": "C4", "resume": "C8", "scene_prefix": "scene_prefix", "captions": "captions"}
ANNOTATIONS = ROOT.parent / "shared" / "data" / "mmwalk"


def quick(script: str, tmp_path: Path, *more: str) -> dict:
    """What a script writes when it is only tried."""
    out = tmp_path / f"{script}.json"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(ROOT / f"benchmarks/{script}.py"), "--quick", "--out", str(out), *more], capture_output=True, text=True, env=env, timeout=800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    held = json.loads(out.read_text(encoding="utf-8"))
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == {"id": held["id"], "figures": held["figures"], "missed": held["missed"]}
    return held


def check(held: dict, id: str) -> None:
    """A result holds a finite figure for every claim, and says under which conditions."""
    assert held["id"] == id and set(held["figures"]) == set(PREDICTIONS[id]["claims"])
    assert all(math.isfinite(v) for v in held["figures"].values())
    assert held["versions"]["vlm_repro"] and held["machine"]["cpus"] and held["equal"] and held["command"].startswith("python benchmarks/")


@pytest.mark.parametrize("script", QUICK)
def test_a_script_at_its_smallest(script, tmp_path):
    held = quick(script, tmp_path)
    check(held, QUICK[script])
    assert held["quick"] and "profile" not in held


@pytest.mark.slow
@pytest.mark.parametrize("script", SLOW)
def test_a_script_with_models_or_films_at_its_smallest(script, tmp_path):
    if script == "captions":
        pytest.importorskip("pycocoevalcap", reason="pycocoevalcap, which is compared with, is not installed: the extra `metrics` brings it")
        if not shutil.which("java"): pytest.skip("the tokenizer that is compared with is a Java program, and no `java` was found")
    if script == "video":
        held = quick(script, tmp_path, "--films", "mp4 60")
        assert held["rows"][0]["seconds"]["ours"] > 0 and held["memory_bytes"]["ours"]["long"] > 0
        assert held["figures"]["worst_against_best"] > 0  # the figure against OpenCV is there where OpenCV is
    else: check(quick(script, tmp_path), SLOW[script])


@pytest.mark.slow
def test_the_start_is_timed_on_the_released_annotations(tmp_path):
    if not ANNOTATIONS.is_dir(): pytest.skip("the released annotations are not beside the repository")
    held = quick("startup", tmp_path)
    check(held, "C7")
    assert held["equal"]["heavy"] == {"help": [], "check": []}


def test_nothing_is_lost_that_was_acknowledged(tmp_path):
    held = quick("records", tmp_path)
    assert held["figures"]["acknowledged_lost"] == 0 and held["figures"]["taken_lost"] <= held["sizes"]["batch"] and len(held["kills"]) == held["sizes"]["kills"]


@pytest.mark.parametrize("name", COMMITTED)
def test_a_committed_result_was_predicted_before_and_is_whole(name):
    held = COMMITTED[name]
    check(held, held["id"])
    assert not held["quick"] and held["predicted_in"], "a result of the small sizes, or without a committed prediction"
    for claim in held["missed"]: assert "profile" in held, f"{claim} misses its goal, so the file needs a profile"
    assert not [word for word in held["command"].split() if word.startswith("/")], "where things lie on a machine is nobody's affair"


def test_the_goals_of_the_committed_results_are_looked_at_anew(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench
    assert COMMITTED
    for held in COMMITTED.values(): assert bench.missed(held["id"], held["figures"]) == held["missed"]


def test_every_row_has_a_claim_with_a_reason():
    rows = {id: row for id, row in PREDICTIONS.items() if id != "train"}
    assert {"C1", "C2", "C3", "C4", "C7", "C8", "C9", "C10"} <= set(rows)
    for row in rows.values():
        for claim in row["claims"].values(): assert claim["low"] <= claim["predicted"] <= claim["high"] and len(claim["why"]) > 20


def test_results_that_differ_are_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench
    with pytest.raises(SystemExit, match="not timed, because the results differ"): bench.require(False, "one and one is three")
    assert bench.meets(1.0, "< 1") is False and bench.meets(2.0, ">= 2") is True and bench.meets(5, "") is None
