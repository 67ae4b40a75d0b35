"""Stream-VLM through the one trainer: what is learned is said, in batches and packed, resumed, by several processes, and with its cross-attention alone."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_streams import CHANNELS, LOOKING, LORA, WORDS, Settings, examples, make, stream_recipe
from train_toy import losses

from vlm_repro.core.media import MediaError
from vlm_repro.core.records import Request
from vlm_repro.fitcoach.model import load_stream_vlm
from vlm_repro.models.inputs import VisualCounter, load_preparer
from vlm_repro.models.protocol import ModelError, load_model, tiny_checkpoint
from vlm_repro.train.assess import as_answering
from vlm_repro.train.batches import collator
from vlm_repro.train.data import pool
from vlm_repro.train.dryrun import dry_run
from vlm_repro.train.export import merge
from vlm_repro.train.loop import fine_tune
from vlm_repro.train.loss import supervised_loss, supervised_weight
from vlm_repro.train.recipe import RecipeError, change
from vlm_repro.train.render import measure_example, render_example
from vlm_repro.train.setup import load_processor, load_trainable
from vlm_repro.train.tuner import Tuner
from vlm_repro.train.watch import read_log

torch.set_num_threads(1)
HERE = Path(__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and its films."""
    root = tmp_path_factory.mktemp("streams")
    make(root / "model")
    examples(Settings(str(root / "films")), "train")
    return root


def requests(folder: Path, n: int = 6) -> list[Request]:
    return [Request(e.id, e.messages[:1], "ours") for e in examples(Settings(str(folder / "films"), n), "train")]


def wanted(folder: Path, n: int = 6) -> list[list[tuple[float, str]]]:
    """What should be said, seconds after the start of each clip."""
    out = []
    for e in examples(Settings(str(folder / "films"), n), "train"):
        start = e.messages[0]["content"][1]["start"]
        out.append([(round(p["at"] - start, 3), p["text"]) for p in e.messages[1]["content"]])
    return out


def said(model) -> list[list[tuple[float, str]]]:
    return [[(round(at, 3), text) for at, text in g.events] for g in model]


# ---- learning

@pytest.fixture(scope="module")
def taught(folder):
    """A run long enough to learn the clips by heart."""
    recipe = stream_recipe(folder, epochs=80, batch=6, micro_batch=6, log_every=5, save_every="never", learning_rate=1e-2, packing=True, **{"stream.silent": 0.1})
    return fine_tune(recipe, folder / "taught", progress=False)


def test_the_loss_falls_and_what_was_taught_is_said(folder, taught):
    assert taught.finished and losses(folder / "taught")[-1] < 0.1 * losses(folder / "taught")[0]
    model = load_model(taught.weights)
    assert said(model.generate(requests(folder), 32)) == wanted(folder)


@pytest.mark.parametrize("tuning", [LOOKING, LORA], ids=["whole", "adapters"])
def test_a_model_in_training_answers_as_a_loaded_one(folder, taught, tuning):
    recipe = stream_recipe(folder, model=taught.weights, tuning=tuning)
    model = as_answering(load_trainable(recipe).eval(), load_processor(recipe))
    assert said(model.generate(requests(folder), 32)) == wanted(folder)


def test_the_model_that_is_left_is_a_whole_folder(folder, taught):
    vlm = load_stream_vlm(taught.weights)
    before = load_stream_vlm(folder / "model")
    assert all(torch.equal(a, b) for a, b in zip(vlm.cnn.state_dict().values(), before.cnn.state_dict().values())), "the eyes are carried over"
    assert vlm.net.config.looking == before.net.config.looking and vlm.eyes == before.eyes and vlm.net.config.use_cache
    assert not torch.equal(vlm.net.model.layers[0].xattn_layer.attn_layers[0].out_fc.weight, before.net.model.layers[0].xattn_layer.attn_layers[0].out_fc.weight)


def test_under_the_published_mask_the_film_is_not_there(folder, tmp_path):
    changes = {"tuning": {"method": "full", "parts": ["language_model", "embeddings", "head"]}, "stream.blind": True}
    net, preparer = load_trainable(stream_recipe(folder)).train(), load_processor(stream_recipe(folder, **changes))
    batch = collator(preparer, net.config, False)([render_example(preparer, e) for e in examples(Settings(str(folder / "films")), "train")])
    assert "vision" not in batch
    supervised_loss(net, batch, supervised_weight(batch)).backward()
    assert all((p.grad is None) == ("xattn" in n) for n, p in net.named_parameters())
    report = fine_tune(stream_recipe(folder, **changes, epochs=1, save_every="never"), tmp_path / "blind", progress=False)
    left, right = (load_file(next(Path(d).glob("model*.safetensors"))) for d in (folder / "model", report.weights))
    assert all(torch.equal(left[n], right[n]) for n in left if "xattn" in n) and not all(torch.equal(left[n], right[n]) for n in left)


# ---- batches

def parts_of_loss(folder: Path, packing: bool, **changes: object):
    recipe = stream_recipe(folder, **changes)
    net, preparer = load_trainable(recipe).train(), load_processor(recipe)
    rendered = [render_example(preparer, e) for e in examples(Settings(str(folder / "films"), 3), "train")]
    collate = collator(preparer, net.config, packing)
    whole, singles = collate(rendered), [collate([r]) for r in rendered]
    n = sum(map(supervised_weight, singles))
    assert supervised_weight(whole) == pytest.approx(n)
    def step(batches):
        net.zero_grad()
        total = 0.0
        for b in batches:
            loss = supervised_loss(net, b, n)
            loss.backward()
            total += loss.item()
        return total, {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}
    return step([whole]), step(singles)


@pytest.mark.parametrize("packing", [False, True], ids=["side by side", "packed"])
@pytest.mark.parametrize("changes", [{}, {"stream.silent": 0.25}, {"stream.sequence": "published"}], ids=["plain", "weighed", "published"])
def test_a_batch_is_its_clips_one_by_one(folder, packing, changes):
    (loss, grads), (alone, apart) = parts_of_loss(folder, packing, **changes)
    assert loss == pytest.approx(alone, abs=1e-5) and grads.keys() == apart.keys()
    assert any("xattn" in k for k in grads) and max((grads[k] - apart[k]).abs().max().item() for k in grads) < 1e-5


def test_checkpointed_activations_give_the_same_gradients(folder):
    recipe = stream_recipe(folder)
    net, preparer = load_trainable(recipe).train(), load_processor(recipe)
    batch = collator(preparer, net.config, False)([render_example(preparer, e) for e in examples(Settings(str(folder / "films"), 2), "train")])
    grads = []
    for on in (False, True):
        if on:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        net.zero_grad()
        supervised_loss(net, batch, supervised_weight(batch)).backward()
        grads.append({k: p.grad.clone() for k, p in net.named_parameters()})
    assert all(torch.allclose(grads[0][k], grads[1][k], atol=1e-6) for k in grads[0]) and grads[0]["model.layers.0.xattn_layer.attn_layers.0.out_fc.weight"].abs().sum() > 0


def test_lengths_are_known_before_a_feature_is_read(folder, monkeypatch):
    preparer, clips = load_processor(stream_recipe(folder)), examples(Settings(str(folder / "films")), "train")
    rendered = [render_example(preparer, e) for e in clips]
    monkeypatch.setattr("vlm_repro.fitcoach.films.film_of", lambda *a: pytest.fail("a feature was read"))
    found = [measure_example(preparer, e, None) for e in clips]
    assert [(x.total, x.n_visual) for x in found] == [(r.length, r.tensors["vision"].shape[1]) for r in rendered]


def test_silence_weighs_what_the_recipe_says(folder):
    clip = examples(Settings(str(folder / "films"), 1), "train")[0]
    weighs = {s: supervised_weight(render_example(load_processor(stream_recipe(folder, **{"stream.silent": s})), clip).tensors) for s in (1.0, 0.5, 0.0)}
    assert weighs[1.0] - weighs[0.5] == pytest.approx((weighs[1.0] - weighs[0.0]) / 2) and weighs[0.0] > 0


# ---- runs

def test_one_clip_at_a_time_or_all_at_once_is_the_same_run(folder, tmp_path):
    for name, more in {"one": {"micro_batch": 1}, "all": {"micro_batch": 4}, "packed": {"micro_batch": 4, "packing": True}}.items():
        fine_tune(stream_recipe(folder, **more, **{"stream.silent": 0.3, "save_every": "never"}), tmp_path / name, progress=False)
    assert losses(tmp_path / "all") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_a_run_that_breaks_off_goes_on_bit_for_bit(folder, tmp_path, monkeypatch):
    changes = {"tuning": {**LORA, "dropout": 0.1}, "save_every": 2, "epochs": 2, "batch": 2, "micro_batch": 2}
    fine_tune(stream_recipe(folder, **changes), tmp_path / "whole", progress=False)
    turn = Tuner._turn
    def breaking(self, *args):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return turn(self, *args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tuner, "_turn", breaking)
        fine_tune(stream_recipe(folder, **changes), tmp_path / "cut", progress=False)
    report = fine_tune(stream_recipe(folder, **changes), tmp_path / "cut", progress=False)
    assert (report.resumed, report.finished) == (2, True) and losses(tmp_path / "cut") == losses(tmp_path / "whole")
    held, found = (load_file(tmp_path / d / "adapter" / "adapter_model.safetensors") for d in ("whole", "cut"))
    assert all(torch.equal(held[k], found[k]) for k in held)


def test_adapters_lie_on_queries_keys_and_values_and_merge_into_a_folder(folder, tmp_path):
    report = fine_tune(stream_recipe(folder, tuning=LORA, learning_rate=1e-2, save_every="never", epochs=3), tmp_path / "run", progress=False)
    names = load_file(Path(report.weights) / "adapter_model.safetensors")
    assert {n.split(".lora_")[0].rsplit(".", 1)[1] for n in names} == {"q_proj", "k_proj", "v_proj"} and not any("xattn" in n for n in names)
    merged = merge(report.weights, tmp_path / "merged")
    streams = [[g.token_ids for g in m.generate(requests(folder), 16)] for m in (load_model(str(folder / "model"), adapter=report.weights), load_model(str(merged)))]
    assert streams[0] == streams[1]
    vlm, base = load_stream_vlm(merged), load_stream_vlm(folder / "model")
    assert not torch.equal(vlm.net.model.layers[0].self_attn.q_proj.weight, base.net.model.layers[0].self_attn.q_proj.weight)


def test_half_precision_keeps_what_is_learned_whole(folder):
    net = load_trainable(stream_recipe(folder, tuning=LORA, precision="bf16"))
    assert {p.dtype for p in net.parameters() if p.requires_grad} == {torch.float32} and {p.dtype for n, p in net.named_parameters() if "xattn" in n} == {torch.bfloat16}
    whole = load_trainable(stream_recipe(folder, precision="bf16"))
    assert {p.dtype for p in whole.parameters()} == {torch.float32}


def test_half_precision_runs(folder, tmp_path):
    for name, tuning in {"lora": LORA, "looking": LOOKING}.items():
        report = fine_tune(stream_recipe(folder, tuning=tuning, precision="bf16", max_steps=2, save_every="never", checkpointing=True), tmp_path / name, progress=False)
        assert report.finished and np.isfinite(report.loss)


def test_alignment_trains_the_cross_attention_alone(folder, tmp_path):
    report = fine_tune(stream_recipe(folder, tuning=LOOKING, save_every="never"), tmp_path / "run", progress=False)
    before, after = (load_file(next(Path(d).glob("model*.safetensors"))) for d in (folder / "model", report.weights))
    assert before.keys() == after.keys()
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before if "xattn" in n}


def test_evaluations_choose_the_best_step(folder, tmp_path):
    val = [{"task": "streams", "split": "val", "settings": {"data_root": str(folder / "films"), "n": 2}}]
    report = fine_tune(stream_recipe(folder, eval_data=val, eval_every=1, best=True, save_every=1, epochs=3), tmp_path / "run", progress=False)
    seen = [row["eval_loss"] for row in read_log(tmp_path / "run" / "log.jsonl") if "eval_loss" in row]
    assert report.best == 1 + int(np.argmin(seen)) and report.metrics["eval_loss"] == pytest.approx(min(seen))


def test_a_model_that_sees_no_films_is_not_trained_on_them(folder):
    preparer = load_preparer(tiny_checkpoint("mmwalk"), True)
    for example in examples(Settings(str(folder / "films"), 2), "train"):
        for read in (lambda e: measure_example(preparer, e, VisualCounter(preparer)), lambda e: render_example(preparer, e)):
            with pytest.raises(MediaError, match="looks at none"):
                read(example)


# ---- bad input

def test_films_that_cannot_be_used_are_set_aside_with_the_reason(folder, tmp_path):
    root = tmp_path / "films"
    examples(Settings(str(root)), "train")
    (root / "train" / "1_features.npy").unlink()
    np.save(root / "train" / "2_features.npy", np.zeros((3, CHANNELS + 1, 7, 5), np.float32))
    np.save(root / "train" / "2_timestamps.npy", 1200 + np.arange(1, 4) / 4)
    maps = np.load(root / "train" / "3_features.npy")
    maps[4, 0, 0, 0] = np.nan
    np.save(root / "train" / "3_features.npy", maps)
    recipe = change(stream_recipe(folder), **{"data.settings": {"data_root": str(root), "n": 6}})
    lost = {x.id: x for x in pool(recipe.data, load_processor(recipe), recipe).dropped}
    assert {k: v.kind for k, v in lost.items()} == {"train-1": "media", "train-2": "media"}
    assert "extract them first" in lost["train-1"].why
    assert "the model takes" in lost["train-2"].why
    report = fine_tune(recipe, tmp_path / "run", progress=False)
    rows = (tmp_path / "run" / "skipped.jsonl").read_text()
    assert report.skipped and "train-3" in rows and "no numbers" in rows


def test_features_of_other_eyes_are_refused(folder, tmp_path):
    clip = examples(Settings(str(folder / "films"), 1), "train")[0]
    note = Path(clip.messages[0]["content"][1]["film"]).with_suffix(".json")
    note.write_text(json.dumps({"extractor": "FitnessCNN", "digest": "0" * 16, "shape": [CHANNELS, 7, 5], "steps": 1, "clock": "", "done": 1}))
    try:
        with pytest.raises(Exception, match="another extractor"):
            measure_example(load_processor(stream_recipe(folder)), clip, None)
    finally:
        note.unlink()


@pytest.mark.parametrize(("changes", "why"), [({"mask": "sequence"}, "all that comes after the prompt"), ({"deepspeed": {"stage": 3}}, "give 2"),
                                              ({"tuning": LOOKING, "stream.blind": True}, "cannot learn")])
def test_what_a_stream_cannot_be_is_refused(folder, changes, why):
    with pytest.raises(RecipeError, match=why):
        load_processor(stream_recipe(folder, **changes))


def test_a_folder_without_eyes_is_not_whole(folder, tmp_path):
    from shutil import copytree

    copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "cnn.safetensors").unlink()
    with pytest.raises(ModelError, match="cnn.safetensors"):
        load_processor(stream_recipe(folder, model=str(tmp_path / "model")))


# ---- looking before

def test_a_dry_run_shows_the_stream_and_counts_the_cross_attention(folder):
    seen = dry_run(stream_recipe(folder, tuning=LORA))
    assert WORDS[0] in repr(seen.sample) and "<vision>×" in repr(seen.sample) and seen.step.loss > 0 and seen.parts["projector"].total > 0
    assert [row[0] for row in seen.tokens] == ["all", "text", "visual"] and seen.tokens[2][1] >= 12


def test_the_memory_of_the_released_size_is_told_without_weights(folder, tmp_path):
    from shutil import copyfile

    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
               "looking": {"layers": [6, 8, 10, 12, 14, 16, 18, 20, 22], "feature": CHANNELS, "heads": 1, "width": None}, "vocab_size": 32064}
    big = tmp_path / "big"
    big.mkdir()
    for name in ("cnn.json", "cnn.safetensors", "tokenizer.json", "tokenizer_config.json"):
        copyfile(folder / "model" / name, big / name)
    (big / "model.safetensors.index.json").write_text("{}")
    (big / "config.json").write_text(json.dumps(config))
    recipe = stream_recipe(folder, model=str(big), tuning=LORA, precision="bf16", checkpointing=False)
    seen, small = dry_run(recipe, skip_model=True), dry_run(change(recipe, checkpointing=True), skip_model=True)
    assert 12 < seen.memory.weights / 2**30 < 15 and small.memory.activations < seen.memory.activations / 5


# ---- processes

@pytest.mark.slow
@pytest.mark.parametrize("tuning", [LORA, LOOKING], ids=["adapters", "cross-attention"])
def test_two_processes_train_as_one_does(folder, tmp_path, tuning):
    changes = {"tuning": tuning, "batch": 3, "micro_batch": 1, "stream.silent": 0.5, "save_every": "never"}
    fine_tune(stream_recipe(folder, **changes), tmp_path / "one", progress=False)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE.with_name("train_streams.py")), str(folder), str(tmp_path / "two"), json.dumps(changes)]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
