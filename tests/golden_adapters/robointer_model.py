"""RoboInter, models and training: shape glue between the golden vectors and the package's functions."""
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_repro.models import qwen25_moe, tiling
from vlm_repro.robointer import records, switches

TOKENS = re.compile(r"<\|[a-z_]+\|>|\n|[A-Za-z0-9_]+|\S|[ \t]+")
SYSTEM = 10  # tokens of what the default system turn says


class Layer(nn.Module):
    """A decoder layer of the toy model."""

    def __init__(self, moe: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.input_layernorm = nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.LayerNorm(2)
        if moe:
            self.moe_block = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2, bias=False)]), "gate": nn.Linear(2, 2, bias=False)})
            self.mlp_gate, self.experts_scaler = nn.Linear(2, 1, bias=False), nn.Parameter(torch.zeros(1))


def toy(moe: bool, tied: bool = False) -> nn.Module:
    """The toy model that the golden vectors describe."""
    model = nn.Module()
    block = nn.ModuleDict({"attn": nn.Linear(2, 2), "norm1": nn.LayerNorm(2)})
    model.visual = nn.ModuleDict({"patch_embed": nn.Linear(2, 2, bias=False), "blocks": nn.ModuleList([block]), "merger": nn.Linear(2, 2)})
    model.model = nn.ModuleDict({"embed_tokens": nn.Embedding(3, 2), "layers": nn.ModuleList([Layer(moe), Layer(False)]), "norm": nn.LayerNorm(2)})
    model.lm_head = nn.Linear(2, 3, bias=False)
    if tied:
        model.lm_head.weight = model.model["embed_tokens"].weight
    return model


def freeze_switches(given: Any, data: Path) -> dict[str, Any]:
    told = {k: v for k, v in given.items() if k.startswith("tune_")}
    return {"trainable": switches.apply_switches(toy(given["moe"], given["tied_head"]), switches.Switches(**told))}


def optimizer_groups(given: Any, data: Path) -> list[dict[str, Any]]:
    model = toy(given["moe"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(given["frozen_prefixes"])))
    rates = {k: given[k] for k in ("learning_rate", "mm_projector_lr", "vision_tower_lr", "weight_decay")}
    return [{"lr": g["lr"], "weight_decay": g["weight_decay"], "params": sorted(g["names"])} for g in switches.published_groups(model, **rates)]


def moe_block(given: Any, data: Path) -> dict[str, Any]:
    config = qwen25_moe.Qwen2_5_VLMoeTextConfig(
        num_experts=given["num_experts"], num_experts_per_tok=given["top_k"], moe_intermediate_size=given["moe_intermediate"], norm_topk_prob=given["norm_topk_prob"], hidden_size=given["hidden"],
        num_attention_heads=1, num_key_value_heads=1)
    block = qwen25_moe.block_of(config, given["gate"], given["experts"])
    out: dict[str, Any] = {}
    with torch.no_grad():
        for name, form in (("dense_v2", "dense"), ("sparse_v1", "sparse")):
            block.form = form
            out[name] = block(torch.tensor(given["x"], dtype=torch.float64)).flatten(0, -2).tolist()
        out["router_logits"] = block.logits.tolist()
        out["aux_loss"] = qwen25_moe.load_balance([block.logits], given["top_k"]).item()
        if "attention_mask" in given:
            out["aux_loss_masked"] = qwen25_moe.load_balance([block.logits], given["top_k"], torch.tensor(given["attention_mask"])).item()
    return out


def internvl_tiling(given: Any, data: Path) -> dict[str, Any]:
    columns, rows = tiling.tile_grid(given["w"], given["h"], 1, given.get("max_num", 12))
    return {"grid": [columns, rows], "n_tiles": tiling.tile_count(columns, rows, given.get("use_thumbnail", True))}


def label_mask(given: Any, data: Path) -> dict[str, Any]:
    turns = [(t.role, t.text) for t in records.turns_of(given)]
    counts, pads, at = iter(given["visual_token_counts"]), [], SYSTEM + 5
    sizes = [("system", SYSTEM + 5)]
    for role, text in turns:
        n = 3
        for piece in re.split(r"(<image>|<video>)", text):
            if piece in ("<image>", "<video>"):
                k = next(counts)
                pads.append([at + n + 1, at + n + 1 + k])
                n += k + 2
            else:
                n += len(TOKENS.findall(piece))
        sizes.append((role, n + 2))
        at += n + 2
    return {"length": sum(n for _, n in sizes), "supervised": [list(s) for s in switches.supervised_spans(sizes)], "visual_pads": pads}


def collate(given: Any, data: Path) -> dict[str, Any]:
    ends = switches.flattened(given["lengths"])
    ids = [list(range(a + 1, b + 1)) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2:] for row in ids]
    places = [list(range(len(row))) for row in ids]
    if given["flatten"]:
        return {"input_ids": [sum(ids, [])], "labels": [sum(labels, [])], "attention_mask": ends, "position_ids": [[sum(places, [])]] * 3}
    longest = given["model_max_length"]
    held = {"input_ids": switches.padded(ids, 0, longest), "labels": switches.padded(labels, -100, longest), "position_ids": [switches.padded(places, 1, longest)] * 3}
    return {**held, "attention_mask": [[int(i != 0) for i in row] for row in held["input_ids"]]}


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    "moe_block": moe_block, "freeze_switches": freeze_switches, "optimizer_groups": optimizer_groups, "internvl_tiling": internvl_tiling, "label_mask": label_mask, "collate": collate}
