"""Two processes on one machine: the losses of one process, whoever splits what, and weights that load."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_toy import FULL, TOY, losses, toy_recipe

from vlm_repro.models.transformers import add_adapter, load_net
from vlm_repro.train.checkpoints import last_checkpoint
from vlm_repro.train.data import pool
from vlm_repro.train.loop import fine_tune
from vlm_repro.train.order import Order
from vlm_repro.train.setup import load_processor
from vlm_repro.train.watch import read_log

FAMILY = "qwen2_vl"
TEXT = {"n": 26, "text_every": 2}
KINDS = {"lora": {}, "whole": {"tuning": FULL}}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def alone(toy) -> None:
    """The runs of one process, beside the model."""
    for name, kind in KINDS.items():
        fine_tune(toy_recipe(toy, **changes(kind)), toy / name, progress=False)


def changes(kind: dict, **more: object) -> dict:
    """What differs from the toy recipe."""
    return {**kind, "data": TEXT, "micro_batch": 2, "epochs": 1, "save_every": 2, **more}


def two(toy: Path, out: Path, what: dict, *more: str) -> subprocess.CompletedProcess:
    """Two processes under torchrun."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(Path(__file__).with_name("train_toy.py")), str(toy), str(out), json.dumps(what), *more]
    return subprocess.run(words, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", [None, 2, 3], ids=["no DeepSpeed", "ZeRO-2", "ZeRO-3"])
def test_two_processes_have_the_losses_of_one(toy, tmp_path, stage, kind):
    done = two(toy, tmp_path, changes(KINDS[kind], **({"deepspeed": {"stage": stage}} if stage else {})))
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path) == pytest.approx(losses(toy / kind), rel=1e-4) and len(losses(tmp_path)) == 5
    loads_as_that_of_one(toy, tmp_path, kind)


def loads_as_that_of_one(toy: Path, out: Path, kind: str) -> None:
    """The saved weights load, and are those of one process."""
    if kind == "lora":
        found, held = (add_adapter(load_net(toy / "model", True, "float32", "cpu"), place / "adapter") for place in (out, toy / kind))
    else:
        found, held = (load_net(place / "model", True, "float32", "cpu") for place in (out, toy / kind))
    pairs = zip(found.named_parameters(), held.parameters(), strict=True)
    assert max((a - b).abs().max().item() for (_, a), b in pairs) < 1e-3
    trained = {n for n, p in found.named_parameters() if "lora" in n} if kind == "lora" else {"lm_head.weight"}
    base = dict(load_net(toy / "model", True, "float32", "cpu").named_parameters())
    assert trained and all(n not in base or not torch.equal(dict(found.named_parameters())[n], base[n]) for n in trained)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_processes_that_are_stopped_go_on_as_if_nothing_was(toy, tmp_path, stage):
    what = changes({}, deepspeed={"stage": stage})
    stopped = two(toy, tmp_path, what, "2", "SIGTERM")
    assert stopped.returncode == 0, stopped.stderr[-3000:]
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    assert two(toy, tmp_path, what).returncode == 0
    assert losses(tmp_path) == pytest.approx(losses(toy / "lora"), rel=1e-4) and len(losses(tmp_path)) == 5


@pytest.mark.parametrize("stage", [None, 2, 3], ids=["no DeepSpeed", "ZeRO-2", "ZeRO-3"])
def test_a_step_of_which_nothing_can_be_read_is_skipped_by_both(toy, tmp_path, stage):
    what = changes({}, data={"n": 13, "data_root": str(tmp_path / "pictures")}, epochs=2, micro_batch=1, tuning={**TOY["tuning"], "dropout": 0.0})
    recipe = toy_recipe(toy, **what)
    found = pool(recipe.data, load_processor(recipe), recipe)
    order = Order(found.groups, found.lengths, recipe)
    (last,) = order[order.per_epoch - 1].examples
    torn = tmp_path / "pictures" / f"{found[last].id}.jpg"
    torn.write_bytes(torn.read_bytes()[:-30])
    fine_tune(recipe, tmp_path / "one", progress=False)
    done = two(toy, tmp_path / "two", {**what, **({"deepspeed": {"stage": stage}} if stage else {})})
    assert done.returncode == 0, done.stderr[-3000:]
    one, both = ([(row["loss"], row["learning_rate"]) for row in read_log(tmp_path / name / "log.jsonl")] for name in ("one", "two"))
    assert [loss is None for loss, _ in one] == [loss is None for loss, _ in both] and both[2][0] is None
    assert [x for row in both for x in row if x is not None] == pytest.approx([x for row in one for x in row if x is not None], rel=1e-4)
    assert len((tmp_path / "two" / "skipped.jsonl").read_text().splitlines()) == 2
