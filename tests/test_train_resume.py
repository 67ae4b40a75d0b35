"""A run that is killed or stopped at a step goes on with the same data, dropout, optimizer and losses."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_toy
from safetensors.torch import load_file
from train_toy import FULL, main, toy_recipe

from vlm_repro.core.runs import RunError
from vlm_repro.train.checkpoints import last_checkpoint, remove, step_of
from vlm_repro.train.loop import fine_tune
from vlm_repro.train.render import Example
from vlm_repro.train.watch import read_log

FAMILY = "internvl"
LORA = {"tuning.dropout": 0.2, "save_every": 3, "workers": 1}


def history(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and learning rate of every step."""
    return [(row["step"], row["loss"], row["learning_rate"]) for row in read_log(out / "log.jsonl") if "loss" in row]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """What a run ended with."""
    return load_file(next(f for name in ("adapter", "model") for f in (out / name).glob("*model.safetensors")))


def killed(toy: Path, out: Path, changes: dict, step: int, name: str) -> subprocess.CompletedProcess:
    """A training process that gets a signal in the middle of a step."""
    words = [sys.executable, str(Path(__file__).with_name("train_toy.py")), str(toy), str(out), json.dumps(changes), str(step), name]
    return subprocess.run(words, capture_output=True, text=True)


def same(a: Path, b: Path) -> None:
    """Losses and weights of two runs are the same."""
    left, right = history(a), history(b)
    assert [step for step, *_ in right] == list(range(1, len(left) + 1))
    assert [x for _, *rest in right for x in rest] == pytest.approx([x for _, *rest in left for x in rest], abs=1e-6)
    held, found = weights(a), weights(b)
    assert held.keys() == found.keys() and max((held[k].float() - found[k].float()).abs().max().item() for k in held) < 1e-6


@pytest.mark.parametrize(("step", "left"), [(5, 3), pytest.param(10, 9, marks=pytest.mark.slow)], ids=["second epoch", "third epoch"])
def test_a_killed_run_repeats_the_losses(toy, tmp_path, step, left):
    fine_tune(toy_recipe(toy, **LORA), tmp_path / "whole", progress=False)
    assert killed(toy, tmp_path / "cut", LORA, step, "SIGKILL").returncode == -9
    assert step_of(last_checkpoint(tmp_path / "cut")) == left
    report = fine_tune(toy_recipe(toy, **LORA), tmp_path / "cut", progress=False)
    assert (report.resumed, report.steps, report.finished) == (left, 12, True)
    same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_a_stopped_run_saves_its_step_and_ends_without_an_error(toy, tmp_path):
    fine_tune(toy_recipe(toy, **LORA), tmp_path / "whole", progress=False)
    ended = killed(toy, tmp_path / "cut", LORA, 4, "SIGTERM")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == {"steps": 5, "finished": False, "resumed": 0}
    assert not (tmp_path / "cut" / "adapter").exists() and step_of(last_checkpoint(tmp_path / "cut")) == 5
    assert fine_tune(toy_recipe(toy, **LORA), tmp_path / "cut", progress=False).resumed == 5
    same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("more", [{"tuning": FULL, "part_rates": {"projector": 1e-4}}, {"keep_features": 1}], ids=["whole parts", "kept features"])
def test_other_ways_resume_as_exactly(toy, tmp_path, monkeypatch, more):
    from vlm_repro.train.tuner import Tuner

    changes = {"save_every": 3, **more}
    fine_tune(toy_recipe(toy, **changes), tmp_path / "whole", progress=False)
    for step in (4, 9):
        with monkeypatch.context() as m:
            m.setattr(Tuner, "_turn", Tuner._turn)
            main(str(toy), str(tmp_path / "cut"), json.dumps(changes), str(step), "SIGTERM")
    fine_tune(toy_recipe(toy, **changes), tmp_path / "cut", progress=False)
    same(tmp_path / "whole", tmp_path / "cut")


def test_other_data_under_the_same_folder_is_noticed(toy, tmp_path, monkeypatch):
    recipe = toy_recipe(toy, max_steps=2, save_every=1, keep=0, data={"data_root": str(tmp_path / "pictures"), "n": 8})
    out, said = tmp_path / "run", "started on other data than data.0 of its recipe holds now: "
    first = fine_tune(recipe, out, progress=False)
    assert fine_tune(recipe, out, progress=False) == first
    asked = train_toy.talk
    with monkeypatch.context() as m:
        m.setattr(train_toy, "talk", lambda *args: with_answer(asked(*args), "It is grey."))
        with pytest.raises(RunError, match=said + r"8 changed \(such as train-0\). Put the data back"):
            fine_tune(recipe, out, progress=False)
    (out / "training_metrics.json").unlink()
    remove(out / "checkpoint-2")
    picture = tmp_path / "pictures" / "train-3.jpg"
    held = picture.read_bytes()
    picture.write_bytes(held + b"more")
    with pytest.raises(RunError, match=said + r"1 changed \(such as train-3\)"):
        fine_tune(recipe, out, progress=False)
    picture.write_bytes(held)
    assert fine_tune(recipe, out, progress=False).resumed == 1 and weights(out)
    assert fine_tune(recipe, out, resume=False, progress=False).loss == first.loss


def with_answer(example: Example, text: str) -> Example:
    """The example with another answer."""
    return Example(example.id, [*example.messages[:-1], {"role": "assistant", "content": [{"type": "text", "text": text}]}])


def test_a_run_can_be_started_anew(toy, tmp_path):
    first = fine_tune(toy_recipe(toy, max_steps=2, save_every=1, keep=0), tmp_path, progress=False)
    (tmp_path / "checkpoint-2" / "old").touch()
    again = fine_tune(toy_recipe(toy, max_steps=2, save_every="epoch", keep=0), tmp_path / "other", progress=False)
    assert again.loss == first.loss
    again = fine_tune(toy_recipe(toy, max_steps=2, save_every=1, keep=0), tmp_path, resume=False, progress=False)
    assert (again.resumed, again.loss) == (0, first.loss) and len(history(tmp_path)) == 2
    assert not (tmp_path / "checkpoint-2" / "old").exists()
