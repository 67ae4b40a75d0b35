"""Fine-tuning in one process: the loss and its splits, broken files, failures that say what to change, what a run leaves behind."""
import json
import math
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_toy import FULL, losses, toy_recipe

from vlm_repro.core.runs import RunError
from vlm_repro.models.protocol import ModelError
from vlm_repro.train.checkpoints import checkpoints, last_checkpoint, remove, step_of
from vlm_repro.train.data import DataError, pool
from vlm_repro.train.export import drawn_requests
from vlm_repro.train.loop import fine_tune, report_of
from vlm_repro.train.order import Order
from vlm_repro.train.paper import merge_tuned
from vlm_repro.train.parts import NoSuchTarget
from vlm_repro.train.recipe import RecipeError, TrainError, change, load_recipe
from vlm_repro.train.setup import load_processor, load_trainable
from vlm_repro.train.tuner import NothingLeft, Tuner
from vlm_repro.train.watch import Log, read_log

FAMILY = "qwen2_vl"


def train(toy: Path, out: Path, **changes: object):
    """A silent run of the toy recipe."""
    return fine_tune(toy_recipe(toy, **changes), out, progress=False)


def test_the_loss_does_not_depend_on_how_a_batch_is_cut(toy, tmp_path):
    cuts = {"six": {"micro_batch": 6}, "three": {"micro_batch": 3}, "two": {"micro_batch": 2}, "one": {"micro_batch": 1},
            "tokens": {"micro_tokens": 150, "max_length": 150}, "padded": {"micro_batch": 4, "packing": False}}
    seen = {}
    for name, cut in cuts.items():
        train(toy, tmp_path / name, epochs=1, **cut)
        seen[name] = losses(tmp_path / name)
    for name in cuts:
        assert seen[name] == pytest.approx(seen["six"], rel=1e-5), name


def test_a_run_learns_and_leaves_everything_in_its_folder(toy, tmp_path):
    recipe = toy_recipe(toy, tuning=FULL, epochs=6, learning_rate=3e-3, report=["tensorboard"], eval_data=[{"task": "toy", "split": "val", "settings": {"data_root": str(toy / "pictures"), "n": 6}}])
    report = fine_tune(recipe, tmp_path, progress=False)
    seen = losses(tmp_path)
    assert len(seen) == report.steps == 24 and seen[-1] < seen[0] / 2
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] < seen[0]
    assert json.loads((tmp_path / "training_metrics.json").read_text())["steps"] == 24
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert list((tmp_path / "runs").glob("events*"))
    assert {"config.json", "model.safetensors", "chat_template.jinja", "generation_config.json"} <= {f.name for f in (tmp_path / "model").iterdir()}
    load_trainable(toy_recipe(toy, model=str(tmp_path / "model")))


def test_a_finished_run_is_returned_and_belongs_to_its_recipe(toy, tmp_path):
    first = train(toy, tmp_path, max_steps=2)
    assert {"adapter_model.safetensors", "adapter_config.json", "chat_template.jinja", "processor_config.json", "generation_config.json"} <= {f.name for f in Path(first.weights).iterdir()}
    assert train(toy, tmp_path, max_steps=2) == first
    with pytest.raises(RunError, match="another recipe .*batch 6 → 3"):
        train(toy, tmp_path, max_steps=2, batch=3)


def test_each_part_has_its_learning_rate_and_frozen_ones_stay(toy, tmp_path):
    before = {n: p.detach().clone() for n, p in load_trainable(toy_recipe(toy, tuning=FULL)).named_parameters()}
    train(toy, tmp_path, tuning=FULL, part_rates={"projector": 1e-9}, max_steps=2, weight_decay=0)
    after = dict(load_trainable(toy_recipe(toy, tuning=FULL, model=str(tmp_path / "model"))).named_parameters())
    moved = {n: (after[n] - p).abs().max().item() for n, p in before.items()}
    assert all(v == 0 for n, v in moved.items() if "visual.blocks" in n)
    assert all(v < 1e-7 for n, v in moved.items() if "visual.merger" in n)
    assert moved["lm_head.weight"] > 1e-4


def test_a_file_that_breaks_on_the_way_is_skipped_counted_and_named(toy, tmp_path):
    recipe = toy_recipe(toy, max_steps=4, data={"data_root": str(tmp_path / "pictures")}, workers=1)
    fine_tune(recipe, tmp_path / "whole", progress=False)
    torn = tmp_path / "pictures" / "train-3.jpg"
    torn.write_bytes(torn.read_bytes()[:-30])
    report = fine_tune(recipe, tmp_path / "torn", progress=False)
    skipped = [json.loads(row) for row in (tmp_path / "torn" / "skipped.jsonl").read_text().splitlines()]
    assert report.skipped == len(skipped) == 1 and (skipped[0]["id"], skipped[0]["kind"]) == ("train-3", "media")
    whole, rest = losses(tmp_path / "whole"), losses(tmp_path / "torn")
    assert [a == b for a, b in zip(whole, rest)][: skipped[0]["step"]] == [True] * skipped[0]["step"] and whole != rest


def tear(*pictures: Path) -> None:
    """Cut off the ends of pictures: their headers promise more than there is."""
    for picture in pictures:
        picture.write_bytes(picture.read_bytes()[:-30])


def alone_in_its_step(recipe) -> str:
    """The id of the example that the last step of the first epoch holds alone."""
    found = pool(recipe.data, load_processor(recipe), recipe)
    order = Order(found.groups, found.lengths, recipe)
    (last,) = order[order.per_epoch - 1].examples
    return found[last].id


@pytest.mark.parametrize("tuning", [{}, {"tuning": FULL, "weight_decay": 0.1}], ids=["adapters", "whole parts"])
def test_a_step_of_which_nothing_is_left_is_skipped_and_has_no_loss(toy, tmp_path, tuning):
    recipe = toy_recipe(toy, batch=6, epochs=2, save_every=1, keep=0, data={"data_root": str(tmp_path / "pictures"), "n": 13}, workers=1, **tuning)
    torn = alone_in_its_step(recipe)
    tear(tmp_path / "pictures" / f"{torn}.jpg")
    report = fine_tune(recipe, tmp_path / "torn", progress=False)
    rows = {row["step"]: row["loss"] for row in read_log(tmp_path / "torn" / "log.jsonl")}
    assert report.finished and report.steps == 6 and report.skipped == 2
    assert rows[3] is None and all(v > 0 for v in rows.values() if v is not None) and [rows[k] is None for k in (1, 2, 4, 5)] == [False] * 4
    held = [(tmp_path / "torn" / f"checkpoint-{k}").glob("*.safetensors") for k in (2, 3, 4)]
    two, three, four = [load_file(next(files)) for files in held]
    assert all(torch.equal(two[k], three[k]) for k in two) and any(not torch.equal(two[k], four[k]) for k in two)
    again = resumed_from(tmp_path / "torn", 2, recipe)
    assert again.resumed == 2 and again.skipped == 2
    assert {row["step"]: row["loss"] for row in read_log(tmp_path / "torn" / "log.jsonl")} == rows


def resumed_from(out: Path, step: int, recipe):
    """The run of a folder again, from an earlier checkpoint."""
    (out / "training_metrics.json").unlink()
    for folder in checkpoints(out):
        if step_of(folder) > step:
            remove(folder)
    return fine_tune(recipe, out, progress=False)


def test_a_step_without_a_loss_does_not_pull_the_mean_down(toy, tmp_path):
    recipe = toy_recipe(toy, batch=6, epochs=1, log_every=3, data={"data_root": str(tmp_path / "pictures"), "n": 13})
    tear(tmp_path / "pictures" / f"{alone_in_its_step(recipe)}.jpg")
    fine_tune(recipe, tmp_path / "mean", progress=False)
    fine_tune(change(recipe, log_every=1), tmp_path / "each", progress=False)
    first, second, none = [row["loss"] for row in read_log(tmp_path / "each" / "log.jsonl")]
    assert none is None and losses(tmp_path / "mean") == [pytest.approx((first + second) / 2)]


def test_files_that_are_all_broken_end_the_run_each_time(toy, tmp_path):
    recipe = toy_recipe(toy, batch=2, max_steps=3, save_every=1, data={"data_root": str(tmp_path / "pictures"), "n": 4})
    fine_tune(recipe, tmp_path / "whole", progress=False)
    tear(*(tmp_path / "pictures").iterdir())
    for _ in range(3):
        with pytest.raises(NothingLeft, match="step 1: nothing could be read since the start"):
            fine_tune(recipe, tmp_path / "torn", progress=False)
    assert not (tmp_path / "torn" / "adapter").exists()


def test_an_evaluation_leaves_out_what_cannot_be_read(toy, tmp_path):
    look = {"task": "toy", "split": "val", "settings": {"data_root": str(tmp_path / "pictures"), "n": 4}}
    recipe = toy_recipe(toy, epochs=2, eval_every=2, best=True, patience=2, eval_data=[look])
    fine_tune(recipe, tmp_path / "whole", progress=False)
    pictures = sorted((tmp_path / "pictures").glob("val-*.jpg"))
    tear(*pictures[:3])
    some = fine_tune(recipe, tmp_path / "some", progress=False)
    assert some.metrics["eval_skipped"] == 3 and some.metrics["eval_loss"] > 0 and some.unseen.startswith("3 media (such as val-")
    named = [json.loads(row) for row in (tmp_path / "some" / "skipped.jsonl").read_text().splitlines()]
    assert sorted((row["id"], row["during"], row["step"]) for row in named) == [(f"val-{i}", "evaluation", 2) for i in range(3)] and some.skipped == 0
    tear(pictures[3])
    none = fine_tune(recipe, tmp_path / "none", progress=False)
    assert none.metrics == {"eval_loss": None, "eval_skipped": 4} and none.best is None and none.steps == none.of and "none: no example could be read" in repr(none)
    assert json.loads((tmp_path / "none" / "eval_results.json").read_text()) == none.metrics and report_of(tmp_path / "none") == none
    pictures[0].write_bytes(b"")
    assert set_aside_in(fine_tune(recipe, tmp_path / "gone", progress=False).unseen) == 4


def set_aside_in(said: str) -> int:
    """How many examples a sentence of `set_aside` speaks of."""
    return sum(int(kind.split()[0]) for kind in said.split("; "))


def test_examples_that_are_too_long_are_dropped_and_counted(toy, tmp_path):
    report = train(toy, tmp_path, max_length=50, max_steps=2)
    assert "too long" in report.dropped
    with pytest.raises(DataError, match="none of its 24 examples can be used"):
        train(toy, tmp_path / "none", max_length=20)


def test_an_empty_split_is_refused_before_weights_are_read(toy, tmp_path):
    recipe = toy_recipe(toy, **{"data": {}})
    empty = load_recipe("mmwalk/tiny", model=recipe.model, data=[{"task": "toy", "split": "nothing", "settings": {"data_root": str(toy / "pictures")}}])
    with pytest.raises(DataError, match="its split 'nothing' has no examples"):
        fine_tune(empty, tmp_path, progress=False)


def test_targets_that_match_nothing_are_an_error_with_real_names(toy, tmp_path):
    with pytest.raises(NoSuchTarget, match="q_proj"):
        train(toy, tmp_path, **{"tuning.targets": ["wqkv"]})


def test_a_loss_that_is_no_number_names_the_rate(toy, tmp_path):
    with pytest.raises(TrainError, match=r"step \d+: the loss is no longer a number. Change learning_rate \(now 1e\+30\)"):
        train(toy, tmp_path, tuning=FULL, learning_rate=1e30, warmup=0, max_grad_norm=0, epochs=4)


def test_memory_that_runs_out_names_what_to_lower(toy, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        torch.empty(2**62, dtype=torch.uint8)

    monkeypatch.setattr(Tuner, "_turn", full)
    with pytest.raises(TrainError, match=r"out of memory. Lower micro_batch \(now 3\), max_pixels"):
        train(toy, tmp_path)


def test_half_precision_needs_a_gpu(toy, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RecipeError, match="precision: fp16 needs a GPU"):
        train(toy, tmp_path, precision="fp16")


def test_bf16_and_checkpointing_give_about_the_same_losses(toy, tmp_path):
    train(toy, tmp_path / "plain", epochs=1)
    train(toy, tmp_path / "checkpointed", epochs=1, checkpointing=True)
    train(toy, tmp_path / "half", epochs=1, precision="bf16")
    plain = losses(tmp_path / "plain")
    assert losses(tmp_path / "checkpointed") == pytest.approx(plain, rel=1e-5)
    assert losses(tmp_path / "half") == pytest.approx(plain, rel=0.03) and losses(tmp_path / "half") != plain


def test_the_attention_of_the_recipe_is_used_and_changes_no_loss(toy, tmp_path):
    for attention in ("sdpa", "eager"):
        train(toy, tmp_path / attention, epochs=1, attention=attention)
        assert load_trainable(toy_recipe(toy, attention=attention)).config._attn_implementation == attention
    assert losses(tmp_path / "eager") == pytest.approx(losses(tmp_path / "sdpa"), rel=1e-5)


def test_flash_attention_that_is_not_there_is_said_before_the_first_step(toy, tmp_path):
    if find_spec("flash_attn"):
        pytest.skip("flash attention is installed here")
    with pytest.raises(ModelError, match="FlashAttention2 .*installed"):
        train(toy, tmp_path, attention="flash_attention_2")


def test_checkpoints_are_kept_as_told_and_the_best_one_stays(toy, tmp_path):
    look = [{"task": "toy", "split": "val", "settings": {"data_root": str(toy / "pictures"), "n": 6}}]
    report = train(toy, tmp_path, save_every=2, eval_every=2, keep=1, best=True, eval_data=look, learning_rate=0.3, schedule="constant", warmup=0, tuning=FULL)
    seen = {row["step"]: row["eval_loss"] for row in read_log(tmp_path / "log.jsonl") if "eval_loss" in row}
    assert report.best == min(seen, key=seen.get) and report.metrics["eval_loss"] == min(seen.values())
    assert {int(f.name.split("-")[1]) for f in checkpoints(tmp_path)} == {12, report.best}


def test_training_stops_when_nothing_gets_better(toy, tmp_path):
    look = [{"task": "toy", "split": "val", "settings": {"data_root": str(toy / "pictures"), "n": 6}}]
    report = train(toy, tmp_path, eval_every=1, patience=2, eval_data=look, learning_rate=1.0, schedule="constant", warmup=0, tuning=FULL, epochs=20)
    assert report.steps < report.of and report.finished


DISK = """
import resource, sys
sys.path.insert(0, {tests!r})
import train_toy
from pathlib import Path
from vlm_repro.train.tuner import Tuner
write = Tuner._write
def limited(self, part):
    if self.state.global_step == 8: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    write(self, part)
Tuner._write = limited
train_toy.main({folder!r}, {out!r}, '{{"save_every": 4}}')
"""


def test_a_full_disk_costs_only_the_checkpoint_that_was_being_written(toy, tmp_path):
    script = DISK.format(tests=str(Path(__file__).parent), folder=str(toy), out=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode and "checkpoint-8 could not be written" in ended.stderr and "checkpoint-4 is whole and will be continued from" in ended.stderr
    assert last_checkpoint(tmp_path).name == "checkpoint-4" and not list(tmp_path.glob(".checkpoint*"))
    assert train(toy, tmp_path, save_every=4).resumed == 4
    assert all(map(math.isfinite, losses(tmp_path))) and len(losses(tmp_path)) == 12
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


FULL_AT_THE_END = """
import resource, sys
sys.path.insert(0, {tests!r})
import train_toy
from vlm_repro.train import loop
export = loop.{where}
def limited(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))
    return export(*args)
loop.{where} = limited
train_toy.main({folder!r}, {out!r}, {changes!r})
"""


@pytest.mark.parametrize(("where", "room", "left", "changes"), [
    ("_export", 30_000, "adapter", {}), pytest.param("_complete", 10, "adapter", {}, marks=pytest.mark.slow),
    pytest.param("_export", 30_000, "model", {"tuning": FULL}, marks=pytest.mark.slow), ("_write_metrics", 50, "training_metrics.json", {})])
def test_a_full_disk_at_the_end_leaves_nothing_half_and_the_same_call_ends_the_run(toy, tmp_path, where, room, left, changes):
    changes = {"max_steps": 2, "save_every": 1, **changes}
    script = FULL_AT_THE_END.format(tests=str(Path(__file__).parent), folder=str(toy), out=str(tmp_path), where=where, room=room, changes=json.dumps(changes))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = ended.stderr.splitlines()[-1]
    assert ended.returncode and f"{left} could not be written (" in said and "checkpoint-2 is whole and will be continued from. Free some space" in said
    assert not (tmp_path / left).exists() and not list(tmp_path.glob(".*.part"))
    report = train(toy, tmp_path, **changes)
    assert (report.resumed, report.steps, report.finished) == (2, 2, True) and math.isfinite(report.loss)
    load_trainable(toy_recipe(toy, **({"model": report.weights} if left == "model" else {})))


def test_a_disk_that_is_full_between_checkpoints_is_said_as_such(toy, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Log, "add", full)
    with pytest.raises(TrainError, match=r"step 0: no room on the disk. Free some, or lower keep \(now 1\)"):
        train(toy, tmp_path)


def test_a_half_written_checkpoint_is_not_continued_from(toy, tmp_path):
    train(toy, tmp_path, save_every=4, keep=0)
    (tmp_path / "training_metrics.json").unlink()
    for step in (8, 12):
        torn = tmp_path / f"checkpoint-{step}" / "optimizer.pt"
        torn.write_bytes(torn.read_bytes()[:-10])
    before = losses(tmp_path)
    assert train(toy, tmp_path, save_every=4, keep=0).resumed == 4
    assert losses(tmp_path) == pytest.approx(before, abs=1e-6)


def test_a_checkpoint_of_another_model_is_refused(toy, tmp_path):
    train(toy, tmp_path, max_steps=2)
    (tmp_path / "training_metrics.json").unlink()
    (tmp_path / "recipe.yaml").unlink()
    with pytest.raises(TrainError, match="checkpoint-2 does not fit the model of this recipe"):
        train(toy, tmp_path, max_steps=3, **{"tuning.rank": 4})


def test_merged_weights_answer_as_the_adapter_does_and_are_taken_as_they_are(toy, tmp_path):
    report = train(toy, tmp_path / "run", max_steps=2, learning_rate=0.1)
    asked = drawn_requests(tmp_path / "asked")
    assert merge_tuned(report, tmp_path / "merged", asked, 4).ok
    written = (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns
    assert len(merge_tuned(report, tmp_path / "merged", asked, 4, n=2).merged) == 2
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.slow
def test_the_metric_of_the_paper_is_measured_between_steps_and_chooses(tmp_path):
    few = {"data.settings.limit": 12, "eval_data.settings.limit": 6}
    recipe = load_recipe("roadbuddy/tiny", epochs=1, max_steps=2, batch=6, eval_every=1, save_every=1, keep=0, metric="accuracy", best=True, report=[], **few)
    report = fine_tune(recipe, tmp_path, progress=False)
    seen = {row["step"]: row["eval_accuracy"] for row in read_log(tmp_path / "log.jsonl") if "eval_accuracy" in row}
    assert set(seen) == {1, 2} and all(v * 6 == pytest.approx(round(v * 6)) for v in seen.values())
    assert report.best == max(seen, key=lambda k: (seen[k], -k)) and report.metrics["eval_accuracy"] == max(seen.values())
    answers = [json.loads(row) for row in (tmp_path / "eval" / "step-2" / "0-roadbuddy-0" / "predictions.jsonl").read_text().splitlines()]
    assert len(answers) == 6 and not any(a["error"] for a in answers)
    with pytest.raises(RecipeError, match="did you mean 'accuracy'"):
        fine_tune(load_recipe("roadbuddy/tiny", epochs=1, max_steps=1, batch=6, eval_every=1, metric="acuracy", report=[], **few), tmp_path / "odd", progress=False)
    assert not read_log(tmp_path / "odd" / "log.jsonl"), "known before the first step"
