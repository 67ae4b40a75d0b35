"""Frozen eyes look once: the losses and gradients of every epoch with pixels, no file opened twice, a limit, and what cannot be."""
from collections import Counter
from dataclasses import replace

import pytest
import torch
from noise import noise
from train_toy import FULL, losses, toy_recipe

from vlm_repro.models.families import FAMILIES
from vlm_repro.train import feed
from vlm_repro.train.batches import Collator
from vlm_repro.train.dryrun import dry_run
from vlm_repro.train.frozen import Album
from vlm_repro.train.loop import fine_tune
from vlm_repro.train.loss import supervised_loss
from vlm_repro.train.parts import freeze
from vlm_repro.train.recipe import RecipeError, load_recipe
from vlm_repro.train.render import Example, Rendered, render_example

FAMILY = "qwen2_vl"
BLIND = {"method": "full", "parts": ["language_model", "embeddings", "head"]}
RECIPE = load_recipe("roadbuddy/tiny")


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "internvl", "llava_onevision"])
def family(request, tmp_path_factory):
    """A model whose eyes are frozen, its processor, and three examples: one image, two, none."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, processor = FAMILIES[request.param]()
    freeze(model, BLIND["parts"])
    folder = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate([(112, 56), (60, 90), (84, 84)]):
        noise(*size).save(folder / f"{i}.png")

    def talk(id: str, *numbers: int) -> Example:
        shown = [{"type": "image", "image": str(folder / f"{i}.png")} for i in numbers]
        return Example(id, [{"role": "user", "content": [*shown, {"type": "text", "text": "What?"}]}, {"role": "assistant", "content": [{"type": "text", "text": f"It is {id}."}]}])

    return model.train(), processor, [render_example(processor, e) for e in (talk("one", 0), talk("two", 1, 2), talk("none"))]


def step(model: torch.nn.Module, batch: dict, n: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    model.zero_grad(set_to_none=True)
    loss = supervised_loss(model, batch, n)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [True, False])
def test_features_give_the_loss_and_the_gradients_of_pixels(family, packing):
    model, processor, rendered = family
    collate, n = Collator(processor, model.config, packing), sum(r.n_supervised for r in rendered)
    album = Album(model, RECIPE)
    seen = [album.of(i, lambda r=r: r) for i, r in enumerate(rendered)]
    assert model.training and not any(k.startswith("pixel") for r in seen for k in r.tensors)
    loss, gradients = step(model, collate(rendered), n)
    found, ours = step(model, album.ready(collate(seen)), n)
    assert found == pytest.approx(loss, abs=1e-5) and ours.keys() == gradients.keys()
    largest = max(g.abs().max().item() for g in gradients.values())
    assert max((ours[k] - g).abs().max().item() for k, g in gradients.items()) < 1e-5 * max(largest, 1)


def test_what_is_full_keeps_no_more_and_gives_the_same(family):
    model, _, rendered = family
    wide, narrow = Album(model, RECIPE), Album(model, replace(RECIPE, keep_features=0))
    first = wide.of(0, lambda: rendered[0])
    narrow.room = wide.size
    for _ in range(2):
        again = [narrow.of(i, lambda i=i: rendered[i]) for i in range(2)]
    assert list(narrow.kept) == [0] and narrow.size == wide.size > 0
    assert torch.equal(again[0].tensors["image_features"], first.tensors["image_features"]) and "image_features" in again[1].tensors


def test_half_precision_is_that_of_the_run(family):
    model, _, rendered = family
    half = Album(model, replace(RECIPE, precision="bf16")).of(0, lambda: rendered[0]).tensors["image_features"]
    whole = Album(model, RECIPE).of(0, lambda: rendered[0]).tensors["image_features"]
    assert whole.dtype == torch.float32 and not torch.equal(half.float(), whole)
    assert (half.float() - whole).abs().max() < 0.05 * whole.abs().max()


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_has_the_same_losses_and_opens_no_file_twice(toy, tmp_path, monkeypatch, packing):
    opened: Counter = Counter()

    def counted(preparer, example, *more) -> Rendered:
        opened[example.id] += 1
        return render_example(preparer, example, *more)

    fine_tune(toy_recipe(toy, packing=packing), tmp_path / "plain", progress=False)
    monkeypatch.setattr(feed, "render_example", counted)
    fine_tune(toy_recipe(toy, packing=packing, keep_features=1), tmp_path / "kept", progress=False)
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5) and len(losses(tmp_path / "kept")) == 12
    del opened["stand-in"]
    assert len(opened) == 24 and set(opened.values()) == {1}


@pytest.mark.parametrize(("changes", "said"), [
    ({"tuning": FULL}, "projector is trained"), ({"tuning": {"method": "full", "parts": ["vision", "projector"]}}, "vision and projector are trained"),
    ({"workers": 2}, "2 workers render apart from the model; give workers: 0"), ({"deepspeed": {"stage": 3}}, "ZeRO-3 holds no whole vision tower")])
def test_what_cannot_be_is_said_before_the_first_step(toy, changes, said):
    with pytest.raises(RecipeError, match=f"keep_features: {said}"):
        dry_run(toy_recipe(toy, keep_features=1, **changes))
