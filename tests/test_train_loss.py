"""Packed equals unpacked, in loss and in every gradient; the loss does not know how the batch was cut; the head sees supervised positions only."""
import pickle
import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from noise import noise
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

from vlm_repro.models.families import FAMILIES
from vlm_repro.models.inputs import tokenizer_of
from vlm_repro.train.batches import Collator
from vlm_repro.train.loss import LabelError, supervised_loss, supervised_tokens
from vlm_repro.train.parts import unwrap
from vlm_repro.train.render import IGNORED, Example, Rendered, render_example

torch.set_num_threads(1)
TRAINED = ("qwen2_vl", "qwen2_5_vl", "internvl", "llava_onevision", "qwen3_vl")
ATTENTION = ("sdpa", "eager")


def said(role: str, text: str, *images: str) -> dict:
    return {"role": role, "content": [{"type": "image", "image": i} for i in images] + [{"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[Example]:
    """Five conversations of different lengths: with one image, two, none, and images in two turns."""
    folder, pictures = tmp_path_factory.mktemp("pictures"), []
    for i, size in enumerate([(112, 56), (60, 90), (150, 150), (84, 84)]):
        pictures.append(str(folder / f"{i}.png"))
        noise(*size).save(pictures[-1])
    a, b, c, d = pictures
    return [Example("one", [said("user", "Where?", a), said("assistant", "Left.")]), Example("text", [said("user", "Hi"), said("assistant", "Good day to you.")]),
            Example("two", [said("user", "How many?", b, c), said("assistant", "2")]), Example("short", [said("user", "?"), said("assistant", "!")]),
            Example("turns", [said("user", "This?", d), said("assistant", "A."), said("user", "That?", a), said("assistant", "Something else, I think.")])]


@pytest.fixture(scope="module", params=TRAINED)
def family(request, examples):
    """A genuine model at tiny size with weights large enough to tell examples apart, its processor, and the examples rendered."""
    torch.manual_seed(0)
    model, processor = FAMILIES[request.param]()
    for p in model.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=.2)
    assert model.dtype == torch.float32
    return model.train(), processor, [render_example(processor, e, "answers") for e in examples]


def items(rendered: list[Rendered]) -> int:
    return sum(r.n_supervised for r in rendered)


def step(model, batches: list[dict], n_items: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a step over several micro-batches."""
    model.zero_grad(set_to_none=True)
    loss = 0.
    for batch in batches:
        part = supervised_loss(model, batch, n_items)
        part.backward()
        loss += part.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of gradients, by the largest gradient of the model."""
    assert one.keys() == other.keys() and one
    return max((one[k] - other[k]).abs().max().item() for k in one) / max(g.abs().max().item() for g in one.values())


def plain_step(model, rendered: list[Rendered]) -> tuple[float, dict[str, torch.Tensor]]:
    """The step as the model's own loss gives it, one example at a time."""
    model.zero_grad(set_to_none=True)
    loss, n = 0., items(rendered)
    for r in rendered:
        part = model(**r.tensors, use_cache=False).loss * r.n_supervised / n
        part.backward()
        loss += part.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ATTENTION)
def test_packed_is_unpacked_in_loss_and_gradients(family, attention):
    model, processor, rendered = family
    model.set_attn_implementation(attention)
    loss, grads = plain_step(model, rendered)
    packed = Collator(processor, model.config, packing=True)(rendered)
    assert packed["input_ids"].shape == (1, sum(r.length for r in rendered)) and "attention_mask" not in packed
    packed_loss, packed_grads = step(model, [packed], items(rendered))
    assert abs(packed_loss - loss) < 1e-5 and gap(grads, packed_grads) < 1e-5
    assert any("vis" in name and g.abs().max() > 0 for name, g in packed_grads.items()), "the images take part"


def test_activations_may_be_computed_again(family):
    model, processor, rendered = family
    packed = Collator(processor, model.config, packing=True)(rendered)
    loss, grads = step(model, [packed], items(rendered))
    model.gradient_checkpointing_enable()
    try: again_loss, again_grads = step(model, [packed], items(rendered))
    finally: model.gradient_checkpointing_disable()
    assert abs(again_loss - loss) < 1e-5 and gap(grads, again_grads) < 1e-5


def test_a_collator_can_be_sent_to_another_process(family):
    model, processor, rendered = family
    collate = Collator(processor, model.config, packing=True, dummy_image=True)
    there = pickle.loads(pickle.dumps(collate))(rendered)
    assert all(torch.equal(v, there[k]) for k, v in collate(rendered).items())


def test_the_padded_form_gives_the_same(family):
    model, processor, rendered = family
    loss, grads = plain_step(model, rendered)
    padded = Collator(processor, model.config, packing=False)(rendered)
    assert padded["attention_mask"].sum(1).tolist() == [r.length for r in rendered]
    padded_loss, padded_grads = step(model, [padded], items(rendered))
    assert abs(padded_loss - loss) < 1e-5 and gap(grads, padded_grads) < 1e-5


def broken(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with positions that never begin anew."""
    positions = torch.arange(batch["input_ids"].shape[1])
    return {**batch, "position_ids": positions.expand_as(batch["position_ids"]).clone()}


def joined(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with right positions and a mask that lets every example see those before it."""
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


@pytest.mark.parametrize("spoil", [broken, joined])
def test_lost_isolation_is_seen(family, spoil):
    model, processor, rendered = family
    packed = Collator(processor, model.config, packing=True)(rendered)
    loss, grads = step(model, [packed], items(rendered))
    other_loss, other_grads = step(model, [spoil(packed)], items(rendered))
    assert abs(loss - other_loss) > 1e-3 and gap(grads, other_grads) > 1e-3


def test_a_packed_example_does_not_depend_on_its_neighbours(family):
    model, processor, rendered = family
    collate, n = Collator(processor, model.config, packing=True), items(rendered[:1])
    def first(batch: dict) -> float:
        labels = torch.full_like(batch["labels"], IGNORED)
        labels[:, :rendered[0].length] = batch["labels"][:, :rendered[0].length]
        return supervised_loss(model, {**batch, "labels": labels}, n).item()
    values = [first(collate([rendered[0], *others])) for others in ([], rendered[1:], rendered[:0:-1])]
    assert max(values) - min(values) < 1e-5


def test_the_loss_does_not_know_how_the_batch_was_cut(family):
    model, processor, rendered = family
    collate, n = Collator(processor, model.config, packing=True), items(rendered)
    splits = [[rendered], [rendered[:2], rendered[2:]], [rendered[:1], rendered[1:4], rendered[4:]], [[r] for r in rendered]]
    results = [step(model, [collate(part) for part in split], n) for split in splits]
    assert all(abs(loss - results[0][0]) < 1e-5 and gap(results[0][1], grads) < 1e-5 for loss, grads in results)
    means = [sum(supervised_loss(model, b, supervised_tokens(b["labels"])).item() for b in map(collate, split)) / len(split) for split in splits]
    assert max(means) - min(means) > 1e-3, "a mean of means would not have passed"


@pytest.mark.parametrize("packing", [True, False])
def test_a_text_only_batch_runs_the_vision_tower_with_zero_gradients(family, packing):
    model, processor, rendered = family
    text = [r for r in rendered if not r.n_visual]
    without = Collator(processor, model.config, packing)(text)
    dummy = Collator(processor, model.config, packing, dummy_image=True)(text)
    assert "pixel_values" not in without and "pixel_values" in dummy and supervised_tokens(dummy["labels"]) == items(text)
    loss, grads = step(model, [without], items(text))
    dummy_loss, dummy_grads = step(model, [dummy], items(text))
    touched = dummy_grads.keys() - grads.keys()
    assert abs(loss - dummy_loss) < 1e-5 and gap(grads, {k: dummy_grads[k] for k in grads}) < 1e-5
    assert any("vis" in name for name in touched) and not any("vis" in name for name in grads)
    assert all(not dummy_grads[k].any() for k in touched)


def test_the_blank_image_is_only_added_where_there_is_none(family):
    model, processor, rendered = family
    batch, plain = (Collator(processor, model.config, True, dummy_image=d)(rendered) for d in (True, False))
    assert all(torch.equal(batch[k], plain[k]) for k in plain) and batch.keys() == plain.keys()


class Vocabulary(TorchDispatchMode):
    """Bytes alive in tensors whose last axis is the vocabulary, the head's own weight left out, and their peak."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.size, self.head, self.alive, self.peak, self.seen = len(weight), weight.t().shape, 0, 0, set()

    def _gone(self, key: int, n: int) -> None:
        self.alive -= n
        self.seen.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if not isinstance(t, torch.Tensor) or t.dim() < 1 or t.shape[-1] != self.size or t.shape == self.head: continue
            storage = t.untyped_storage()
            if storage.data_ptr() in self.seen: continue
            self.seen.add(storage.data_ptr())
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._gone, storage.data_ptr(), storage.nbytes())
        return out


def peak_of(model, run) -> int:
    with Vocabulary(model.get_output_embeddings().weight) as measured: run().backward()
    return measured.peak


def test_logits_take_less_than_three_tenths_of_the_full_ones(family):
    model, processor, rendered = family
    batch, n = Collator(processor, model.config, packing=True)(rendered[:3]), items(rendered[:3])
    full = peak_of(model, lambda: model(**batch, use_cache=False).loss)
    ours = peak_of(model, lambda: supervised_loss(model, batch, n))
    assert batch["input_ids"].shape[1] * model.config.get_text_config().vocab_size * 4 < full
    assert 0 < ours <= .3 * full


@contextmanager
def head_shapes(model):
    """The shapes that the head gives."""
    shapes = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    yield shapes
    hook.remove()


@pytest.mark.parametrize("packing", [True, False])
def test_the_head_runs_on_supervised_positions_only(family, packing):
    model, processor, rendered = family
    batch = Collator(processor, model.config, packing)(rendered)
    with head_shapes(model) as shapes: supervised_loss(model, batch, items(rendered))
    assert [torch.Size(s[:-1]).numel() for s in shapes] == [items(rendered)]


@pytest.mark.parametrize("packing", [True, False])
def test_it_works_through_peft_and_other_wrappers(family, packing):
    import peft
    model, processor, rendered = family
    batch, n = Collator(processor, model.config, packing)(rendered), items(rendered)
    loss = supervised_loss(model, batch, n).item()
    wrapped = torch.nn.Sequential()
    wrapped.forward = lambda **kwargs: adapted(**kwargs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM"))
    try:
        wrapped.module = adapted
        assert unwrap(wrapped) is model
        with head_shapes(model) as shapes: losses = [supervised_loss(m, batch, n) for m in (adapted, wrapped)]
        assert all(abs(x.item() - loss) < 1e-5 for x in losses)
        assert {torch.Size(s[:-1]).numel() for s in shapes} == {n}
        losses[0].backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for k, p in adapted.named_parameters() if "lora_B" in k)
    finally: adapted.unload()
    for p in model.parameters(): p.requires_grad_(True)


def test_flash_attention_is_told_the_same_blocks(family):
    model, processor, rendered = family
    positions = Collator(processor, model.config, packing=True)(rendered)["position_ids"]
    plain = positions[0] if positions.dim() == 3 else positions
    assert _is_packed_sequence(plain, 1)
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(plain)
    assert starts.diff().tolist() == [r.length for r in rendered] and int(longest) == max(r.length for r in rendered)
    assert not _is_packed_sequence(plain[:, :rendered[0].length], 1)


def test_half_precision_logits_are_summed_in_float32(family):
    from vlm_repro.train.loss import summed_cross_entropy
    torch.manual_seed(0)
    logits, labels = torch.randn(100, 50).bfloat16(), torch.randint(50, (100,))
    exact = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum")
    for chunk in (1, 7, 100, 1000):
        got = summed_cross_entropy(logits, labels, chunk)
        assert got.dtype == torch.float32 and abs(got.item() - exact.item()) < 1e-3


def test_a_batch_without_labels_names_its_examples(family):
    model, processor, rendered = family
    nothing = [Rendered(r.id, {**r.tensors, "labels": torch.full_like(r.tensors["labels"], IGNORED)}, r.n_visual, 0) for r in rendered[:2]]
    for packing in (True, False):
        collate = Collator(processor, model.config, packing)
        with pytest.raises(ValueError, match="no label in this batch: one, text"): collate(nothing)
        batch = collate(rendered[:2])
        with pytest.raises(LabelError, match="show_mask"): supervised_loss(model, {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}, 1)


@pytest.mark.parametrize("packing", [True, False])
def test_a_row_that_is_too_long_is_an_error_never_cut(family, packing):
    model, processor, rendered = family
    longest = (sum if packing else max)(r.length for r in rendered)
    assert Collator(processor, model.config, packing, max_length=longest)(rendered)
    with pytest.raises(ValueError, match=f"a row of {longest} tokens > max_length {longest - 1}: one, text"):
        Collator(processor, model.config, packing, max_length=longest - 1)(rendered)


def test_the_first_label_of_each_packed_example_does_not_count(family, examples):
    model, processor, _ = family
    rendered = [render_example(processor, e, "sequence") for e in examples]
    labels = Collator(processor, model.config, packing=True)(rendered)["labels"][0]
    starts = torch.tensor([0, *(r.length for r in rendered[:-1])]).cumsum(0)
    assert (labels[starts] == IGNORED).all() and (labels != IGNORED).sum() == items(rendered)


def test_a_text_model_is_packed_as_well():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    tok = tokenizer_of(FAMILIES["qwen2_vl"]()[1])
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tok), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2))
    rendered = [render_example(tok, Example(q, [{"role": "user", "content": q}, {"role": "assistant", "content": q[::-1]}])) for q in ("abc", "Hello there", "1")]
    loss, grads = plain_step(model, rendered)
    packed_loss, packed_grads = step(model, [Collator(tok, model.config, packing=True, dummy_image=True)(rendered)], items(rendered))
    assert abs(loss - packed_loss) < 1e-5 and gap(grads, packed_grads) < 1e-5


def test_a_model_that_cannot_select_positions_gives_the_same(family):
    model, processor, rendered = family
    batch, n = Collator(processor, model.config, packing=True)(rendered), items(rendered)

    class Old(torch.nn.Module):
        def forward(self, **inputs): return model(**inputs)
    with head_shapes(model) as shapes: assert abs(supervised_loss(Old(), batch, n).item() - supervised_loss(model, batch, n).item()) < 1e-5
    assert Counter(s[:-1] for s in shapes) == Counter({(1, batch["input_ids"].shape[1]): 1, (1, n): 1})
