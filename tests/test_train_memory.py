"""What is predicted to be held, against what is held, on a processor, where every byte can be followed."""
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_toy import FULL, toy_recipe

from vlm_repro.models.checkpoint import read_config
from vlm_repro.models.families import random_checkpoint
from vlm_repro.train.batches import Collator
from vlm_repro.train.data import pool
from vlm_repro.train.feed import Feed
from vlm_repro.train.loss import supervised_loss
from vlm_repro.train.memory import Memory, predict_memory
from vlm_repro.train.order import Order
from vlm_repro.train.parts import parameter_groups
from vlm_repro.train.recipe import Recipe
from vlm_repro.train.setup import autocast_dtype, load_processor, load_trainable, part_rates


class Alive(TorchDispatchMode):
    """Bytes of the tensors made inside that are still there, and the most there were at once."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0

    def _gone(self, key: int) -> None:
        self.now -= self.known.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        storages = lambda tree: {s._cdata: s for t in tree_leaves(tree) if isinstance(t, torch.Tensor) for s in [t.untyped_storage()]}
        given = storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        for key, storage in storages(out).items():
            if key in self.known or key in given: continue
            self.known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)
        return out


@dataclass
class Held:
    """Bytes that one step held."""

    weights: int
    gradients: int
    optimizer: int
    peak: int # of forward and backward, gradients included


@pytest.fixture(scope="module", params=["qwen2_vl", "internvl"])
def folder(request, tmp_path_factory):
    """A random model of one architecture, and room for its pictures."""
    torch.set_num_threads(1)
    found = tmp_path_factory.mktemp(request.param)
    random_checkpoint(request.param, found / "model")
    return found


def step(recipe: Recipe) -> tuple[Held, int]:
    """One step as the trainer makes it, and the tokens of its first micro-batch."""
    preparer = load_processor(recipe)
    found = pool(recipe.data, preparer, recipe)
    model = load_trainable(recipe).train()
    fed = Feed(found, Order(found.groups, found.lengths, recipe), preparer, Collator(preparer, model.config, recipe.packing))[0, 0]
    if recipe.checkpointing:
        (model.get_base_model() if hasattr(model, "get_base_model") else model).activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    dtype = autocast_dtype(recipe)
    with Alive() as alive:
        with torch.autocast("cpu", dtype, enabled=dtype is not None): loss = supervised_loss(model, fed.tensors, fed.items)
        loss.backward()
    optimizer = torch.optim.AdamW(parameter_groups(model, part_rates(recipe), 0.0))
    optimizer.step()
    size = lambda tensors: sum(t.nbytes for t in tensors)
    states = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    return Held(size(model.parameters()), size(p.grad for p in model.parameters() if p.grad is not None), size(states), alive.peak), fed.tokens


def both(folder, **changes: object) -> tuple[Held, Memory]:
    """What a step held, and what was predicted of it."""
    recipe = toy_recipe(folder, **changes)
    held, tokens = step(recipe)
    return held, predict_memory(read_config(folder / "model"), recipe, tokens)


@pytest.mark.parametrize("tuning", [{}, {"tuning": FULL}], ids=["lora", "whole"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "twice"])
@pytest.mark.parametrize("examples", [1, 6])
def test_a_prediction_is_what_is_held(folder, tuning, precision, checkpointing, examples):
    held, said = both(folder, precision=precision, checkpointing=checkpointing, micro_batch=examples, **tuning)
    assert (said.weights, said.gradients, said.optimizer) == (held.weights, held.gradients, held.optimizer)
    assert 0.8 < (said.gradients + said.activations + said.logits) / held.peak < 1.6


def test_computing_activations_twice_is_predicted_to_save_what_it_saves(folder):
    (kept, said_kept), (twice, said_twice) = (both(folder, checkpointing=on, micro_batch=6) for on in (False, True))
    assert said_twice.activations < said_kept.activations and twice.peak < kept.peak
    saved = said_kept.activations - said_twice.activations
    assert 0.5 < saved / (kept.peak - twice.peak) < 2
