"""The benchmark of training runs at a miniature size: equal losses, every figure there, and a table made from them alone."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MINIATURE = ["examples=8", "layers=1", "text=32", "vision=32", "vocabulary=2000", "longest=120"]


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> dict:
    """The results of one round of both ways in one process."""
    out = tmp_path_factory.mktemp("benchmark") / "train.json"
    command = [sys.executable, str(ROOT / "benchmarks/train.py"), "--rounds", "1", "--batch", "4", "--together", "--ways", "plain", "ours", "--size", *MINIATURE, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train
    return train


def test_the_losses_are_equal_and_the_check_would_see_a_leak(held):
    equal = held["equal"]
    assert equal["same_tokens"] and equal["relative"] < equal["tolerance"]
    assert abs(equal["without_isolation"] - equal["plain"]) / equal["plain"] > 10 * equal["tolerance"], "packed conversations that see each other must not pass"


def test_every_figure_is_there(held):
    assert held["data"]["examples"] == 8 and held["versions"]["transformers"] and held["machine"]["cpus"] and held["command"].startswith("python benchmarks/train.py")
    for way in ("plain", "ours"):
        seen = held["rounds"][0][way]
        assert seen["steps"] == 2 and seen["epoch_cpu_s"] > 0 and seen["run_wall_s"] >= seen["epoch_wall_s"] and seen["peak_bytes"] > 1e8 and len(seen["load_before"]) == 3


def test_the_head_sees_supervised_positions_and_no_position_is_padding(held):
    plain, ours, data = held["rounds"][0]["plain"], held["rounds"][0]["ours"], held["data"]
    assert ours["head_positions"] == data["supervised"] and ours["positions"] == data["tokens"]
    assert plain["head_positions"] == plain["positions"] > data["tokens"]
    assert held["ratios"]["plain"]["logits_bytes"]["median"] == ours["logits_bytes"] / plain["logits_bytes"] < 0.3


def test_the_table_is_made_from_results_and_predictions(held, script):
    claims = json.loads((ROOT / "benchmarks/predictions.json").read_text())["train"]["claims"]
    rows = script.table(held, claims).splitlines()
    assert len([r for r in rows if r.startswith("|")]) == len(claims) + 2
    logits = next(r for r in rows if "logits" in r).split("|")
    assert logits[-2].strip() == "yes" and logits[-3].strip() == "<= 0.3"


def test_the_page_shows_the_committed_results(script):
    results, page = ROOT / "benchmarks/results/train.json", (ROOT / "benchmarks/README.md").read_text()
    claims = json.loads((ROOT / "benchmarks/predictions.json").read_text())["train"]["claims"]
    assert script.table(json.loads(results.read_text()), claims) in page
