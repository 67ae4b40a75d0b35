"""Qwen2.5-VL with experts: equal to the dense model at first, equal in both forms, saved, loaded, trained by two processes."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_toy import FULL, losses, toy_recipe

from vlm_repro.models.checkpoint import read_config
from vlm_repro.models.families import FAMILIES, random_checkpoint
from vlm_repro.models.qwen25_moe import FORMS, MoeBlock, Qwen2_5_VLMoeForConditionalGeneration, Qwen2_5_VLMoeTextConfig, add_experts, has_experts, load_balance
from vlm_repro.models.transformers import load_net
from vlm_repro.train.loop import fine_tune

SMALL = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A random dense checkpoint."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("dense")
    random_checkpoint("qwen2_5_vl", folder)
    return folder


def asked() -> torch.Tensor:
    return torch.randint(20, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def opened(model, value=0.7, form="dense"):
    """Give the experts a share."""
    for layer in model.model.language_model.layers:
        if hasattr(layer, "moe_block"):
            layer.experts_scaler.data.fill_(value)
            layer.moe_block.form = form
    return model


@torch.no_grad()
def test_zero_gates_leave_the_logits(dense):
    own = load_net(dense, True, "float32", "cpu")
    moe = add_experts(dense, "float32", **SMALL).eval()
    assert (moe(asked()).logits - own(asked()).logits).abs().max() <= 1e-6
    assert (opened(moe)(asked()).logits - own(asked()).logits).abs().max() > 1e-4


@torch.no_grad()
def test_with_pictures_too(dense):
    own, (_, processor) = load_net(dense, True, "float32", "cpu"), FAMILIES["qwen2_5_vl"]()
    from PIL import Image
    chat = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}], add_generation_prompt=True)
    batch = processor(text=[chat], images=[Image.new("RGB", (112, 84), (200, 40, 90))], return_tensors="pt")
    assert (add_experts(dense, "float32", **SMALL).eval()(**batch).logits - own(**batch).logits).abs().max() <= 1e-6


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("norm", [True, 0.01, False])
def test_dense_and_sparse_say_the_same(k, norm):
    torch.manual_seed(k)
    block = MoeBlock(Qwen2_5_VLMoeTextConfig(num_experts=4, num_experts_per_tok=k, moe_intermediate_size=24, norm_topk_prob=norm, hidden_size=32, num_attention_heads=2, num_key_value_heads=2)).double()
    x, out, grads = torch.randn(3, 7, 32, dtype=torch.float64), {}, {}
    for form in FORMS:
        block.form = form
        block.zero_grad()
        out[form] = block(x)
        out[form].pow(2).sum().backward()
        grads[form] = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in block.parameters()])
    assert torch.allclose(out["dense"], out["sparse"], atol=1e-12) and torch.allclose(grads["dense"], grads["sparse"], atol=1e-9)


@torch.no_grad()
def test_saved_and_loaded(dense, tmp_path):
    moe = opened(add_experts(dense, "float32", **SMALL, decoder_sparse_step=2)).eval()
    moe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2_5_vl_moe"
    again = load_net(tmp_path, True, "float32", "cpu")
    assert type(again) is Qwen2_5_VLMoeForConditionalGeneration and torch.equal(again(asked()).logits, moe(asked()).logits)
    assert [hasattr(layer, "moe_block") for layer in again.model.language_model.layers] == [has_experts(again.config.text_config, i) for i in range(2)] == [False, True]


def test_loads_in_a_fresh_process(dense, tmp_path):
    add_experts(dense, "float32", **SMALL).save_pretrained(tmp_path)
    told = "from pathlib import Path; from vlm_repro.models.transformers import load_net; import sys; print(type(load_net(Path(sys.argv[1]), True, 'float32', 'cpu')).__name__)"
    done = subprocess.run([sys.executable, "-c", told, str(tmp_path)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.stdout.strip().endswith("Qwen2_5_VLMoeForConditionalGeneration"), done.stderr[-2000:]


def test_share_that_is_not_learned_is_one(dense):
    fixed = add_experts(dense, "float32", **SMALL, adaptive_gate=False)
    scaler = fixed.model.language_model.layers[0].experts_scaler
    assert scaler.item() == 1.0 and not scaler.requires_grad


def test_balance_is_a_switch(dense):
    moe, ids = add_experts(dense, "float32", **SMALL), asked()
    plain = moe(ids, labels=ids).loss
    text = moe.config.text_config
    text.output_router_logits, text.router_aux_loss_coef = True, 0.5
    assert moe(ids, labels=ids).loss.item() == pytest.approx(plain.item() + 0.5 * load_balance(moe.router_logits, 2).item(), rel=1e-5)
    assert 2.0 - 1e-5 <= load_balance([torch.eye(4) * 40], 2).item() < 4.0


def gradients(dense, reentrant: bool | None, form: str) -> dict[str, torch.Tensor]:
    "Of every router and expert, after one step with the balance; None for no checkpointing."
    torch.manual_seed(0)
    moe = opened(add_experts(dense, "float32", **SMALL, output_router_logits=True, router_aux_loss_coef=0.5), form=form).train()
    if reentrant is not None:
        moe.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        moe.enable_input_require_grads()
    moe(asked(), labels=asked(), use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in moe.named_parameters() if "moe_block" in n and p.grad is not None}


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_keeps_the_gradient_of_the_balance(dense, form):
    plain, again = gradients(dense, None, form), gradients(dense, False, form)
    routers = [n for n in plain if n.endswith("gate.weight")]
    assert plain.keys() == again.keys() and all(torch.allclose(plain[n], again[n], atol=1e-7) for n in plain)
    assert len(routers) == 2 and all(plain[n].abs().max() > 0 for n in routers)


def test_checkpointing_that_would_lose_the_balance_is_refused(dense):
    with pytest.raises(ValueError, match="use_reentrant"): gradients(dense, True, "dense")


def test_the_balance_moves_the_routers_by_itself(dense):
    moe = opened(add_experts(dense, "float32", **SMALL, output_router_logits=True, router_aux_loss_coef=0.5)).train()
    moe.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    moe.enable_input_require_grads()
    moe(asked(), labels=asked(), use_cache=False)
    moe.balance().backward()
    assert all(layer.moe_block.gate.weight.grad.abs().max() > 0 for layer in moe.model.language_model.layers)


def test_padding_does_not_count():
    logits = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    kept = [part[mask.flatten() > 0] for part in logits]
    assert load_balance(logits, 2, mask).item() == pytest.approx(load_balance(kept, 2).item(), rel=1e-5)


@pytest.mark.parametrize("wrong, said", [({"n_experts": 3}, "no field n_experts"), ({"num_experts_per_tok": 9}, "give 1 to 4"), ({"moe_form": "packed"}, "valid: dense, sparse")])
def test_wrong_options(dense, wrong, said):
    with pytest.raises(ValueError, match=said):
        add_experts(dense, **{**SMALL, **wrong})


def test_other_models_are_refused(tmp_path):
    random_checkpoint("qwen2_vl", tmp_path)
    with pytest.raises(ValueError, match="not a dense qwen2_5_vl"):
        add_experts(tmp_path)


@pytest.fixture
def toy_moe(dense, tmp_path) -> Path:
    """A toy folder whose model has experts, the balance switched on."""
    random_checkpoint("qwen2_5_vl", tmp_path / "model")
    add_experts(dense, "float32", **SMALL, output_router_logits=True).save_pretrained(tmp_path / "model")
    return tmp_path


WHAT = {"tuning": FULL, "epochs": 1, "data": {"n": 12}, "micro_batch": 2, "micro_tokens": 0}


@pytest.mark.slow
def test_a_step_moves_the_share(toy_moe):
    fine_tune(toy_recipe(toy_moe, **WHAT), toy_moe / "one", progress=False)
    found = load_net(toy_moe / "one" / "model", True, "float32", "cpu")
    assert read_config(toy_moe / "one" / "model").model_type == "qwen2_5_vl_moe"
    assert all(layer.experts_scaler.item() != 0 for layer in found.model.language_model.layers)


@pytest.mark.slow
def test_zero_3_on_two_processes(toy_moe):
    fine_tune(toy_recipe(toy_moe, **WHAT), toy_moe / "one", progress=False)
    what = json.dumps({**WHAT, "deepspeed": {"stage": 3}})
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(Path(__file__).with_name("train_toy.py")), str(toy_moe), str(toy_moe / "two"), what]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(toy_moe / "two") == pytest.approx(losses(toy_moe / "one"), rel=1e-3) and losses(toy_moe / "two")
    found, held = (load_net(toy_moe / name / "model", True, "float32", "cpu") for name in ("two", "one"))
    assert max((a - b).abs().max().item() for a, b in zip(found.parameters(), held.parameters(), strict=True)) < 1e-3
