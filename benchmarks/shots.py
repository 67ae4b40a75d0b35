"""Few-shot prompts: `python benchmarks/shots.py [--out benchmarks/results/shots.json]`.

Two layouts, four pictures a query and a shot, on a tiny Qwen2-VL with random weights; 16 new tokens, greedy, one thread:
  mmWalk's  as the paper asks: each of nine categories has three shots of its own and asks once about each frame, so that a frame's pictures come back in every category (the test set asks 9.3 questions
            a frame), here of 7 frames, 63 queries; after three shots, or after none
  apart     64 queries, no frame asked about twice, all after the same three shots
Compared:
  ours_N  `core.generate.generate` with batches of N, every answer kept in a run folder; the memories of the model start empty in every round
  plain   the processor and `generate` of transformers, one query at a time
Token ids must be equal, all of them, and a logit l of the first new token must be within 1e-5 x (1 + |l|) of that of a prompt that was read by itself. The goals are looked at with the best N, in
CPU seconds, which leave out who else was busy; the ratios by the clock stand beside them.

On a GPU: `python benchmarks/shots.py --device cuda --shape qwen2-vl-7b --queries 256`: answers and tokens a second, largest memory, share of the device's peak; in bfloat16 sums in another order may change
an answer, so their number is shown and not asserted.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import arguments, finish, hot_spots, interleaved, least, now, one_thread, require, versions

one_thread()

SIDE, VIEWS, NEW = {"tiny": 168, "other": 756}, 4, 16
LAYOUTS = {"3 shots": (7, 9, 3), "0 shots": (7, 9, 0), "3 shots, apart": (64, 1, 3)}  # frames, categories, shots of each category
FIRST = "3 shots"


def pictures(folder: Path, names: list[str], side: int) -> dict[str, list[str]]:
    """Four coarse random pictures for each name."""
    import numpy as np
    from PIL import Image
    folder.mkdir()
    out = {}
    for k, name in enumerate(names):
        rng, out[name] = np.random.default_rng(k), []
        for v in range(VIEWS):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{name}-{v}.png")
            out[name].append(str(folder / f"{name}-{v}.png"))
    return out


def asked(folder: Path, frames: int, categories: int, shots: int, side: int) -> list[Any]:
    """The conversations: the shots of a category with their answers, then the query about a frame; every category asks about every frame."""
    import random

    import shapes

    from vlm_repro.core.records import Request
    rng, held = random.Random(0), pictures(folder, [f"s{c}.{i}" for c in range(categories) for i in range(shots)] + [f"q{i}" for i in range(frames)], side)
    words = lambda n: " ".join(rng.choices(shapes.WORDS, k=n))
    user = lambda name: {"role": "user", "content": [*({"type": "image", "image": p} for p in held[name]), {"type": "text", "text": words(rng.randint(12, 24)) + "?"}]}
    said = lambda: {"role": "assistant", "content": [{"type": "text", "text": words(6)}]}
    before = [[m for i in range(shots) for m in (user(f"s{c}.{i}"), said())] for c in range(categories)]
    return [Request(f"q{c}.{i:03}", [*before[c], user(f"q{i}")], "ours") for c in range(categories) for i in range(frames)]


def forget(model: Any) -> Any:
    """The model with empty memories."""
    from dataclasses import replace

    from vlm_repro.models.sharing import Reader
    return replace(model, reader=Reader(model.net, model.decoding, 2**30))

def ours(model: Any, requests: list[Any], batch: int) -> dict[str, Any]:
    """`generate`, into a run folder."""
    import shapes

    from vlm_repro.core.generate import generate
    from vlm_repro.core.runs import open_run
    fresh = forget(model)
    with tempfile.TemporaryDirectory() as held:
        run, start = open_run(Path(held) / "run", {"what": "a benchmark"}), time.perf_counter()
        report = generate(fresh, requests, run, batch, NEW, strict=True, progress=False)
        seconds = time.perf_counter() - start
        ids = {r["id"]: r["token_ids"] for r in run.rows("predictions")}
        device = shapes.device_figures(fresh, seconds, len(ids), run.rows("timings"), dict(report.accounts[0].peak))
        run.close()
    return {"response_wall_s": seconds, "device": device, "reused": fresh.reused(), "ids": ids}


def plain(processor: Any, net: Any, requests: list[Any]) -> dict[str, Any]:
    """One query at a time, everything from the beginning."""
    import torch
    from PIL import Image
    start, ids = time.perf_counter(), {}
    for r in requests:
        shown = [Image.open(p["image"]).convert("RGB") for m in r.messages for p in m["content"] if p["type"] == "image"]
        text = processor.apply_chat_template(r.messages, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=shown, return_tensors="pt").to(net.device)
        with torch.inference_mode(): out = net.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        ids[r.id] = out[0, inputs["input_ids"].shape[1]:].tolist()
    return {"response_wall_s": time.perf_counter() - start, "ids": ids}


def first_logits(model: Any, requests: list[Any]) -> Any:
    """The logits of the first new token."""
    import torch

    from vlm_repro.models.transformers import inputs_of
    items = model.prepare(requests).items
    with torch.inference_mode():
        if model.reader is None: return model.net.generate(**inputs_of(model, items), max_new_tokens=1, output_logits=True, return_dict_in_generate=True).logits[0].cpu()
        _, order, filled = model.reader.read(items)
        return filled.logits[torch.tensor(order).argsort()].cpu()


def apart(model: Any, requests: list[Any]) -> dict[str, float]:
    """How far shared reading moves a logit l, at most, in units of 1 + |l|, over the first eight queries; and how far a plain batch of them does, padding being all that differs."""
    from dataclasses import replace

    import torch
    alone = replace(model, reader=None)
    single = torch.cat([first_logits(alone, [r]) for r in requests[:8]])
    def moved(other: Any) -> float: return float(((first_logits(other, requests[:8]).float() - single.float()).abs() / (1 + single.float().abs())).max())
    return {"logits_apart": moved(forget(model)), "in_a_plain_batch": moved(alone)}


def compare(ways: dict[str, Any], exact: bool) -> dict[str, Any]:
    """Every way once; the same token ids from all."""
    held = {name: way()["ids"] for name, way in ways.items()}
    other = {name: sum(ids[k] != held["plain"][k] for k in ids) for name, ids in held.items()}
    require(not exact or not any(other.values()), f"answers that differ from the plain ones: {other}")
    return {"answers": len(held["plain"]), "different_answers": len({tuple(v) for v in held["plain"].values()}), "that_differ": other, "new_tokens": sum(map(len, held["plain"].values()))}


def slim(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{way: {k: v for k, v in seen.items() if k != "ids"} for way, seen in row.items()} for row in rounds]


def gain(rounds: list[dict[str, Any]], seconds: str = "cpu_s") -> float:
    """The plain way ÷ the best of ours, in CPU seconds of the one thread or by the clock (`response_wall_s`)."""
    return least(rounds, "plain", seconds) / min(least(rounds, name, seconds) for name in rounds[0] if name != "plain")


def parsed() -> argparse.Namespace:
    parser = arguments("Time few-shot prompts.", rounds=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="tiny", help="see shapes.py")
    parser.add_argument("--queries", type=int, default=64, help="of the layout without a frame asked about twice")
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 16, 32])
    return parser.parse_args()


def main() -> None:
    options, begun = parsed(), now()
    import shapes
    import torch
    import transformers as hf

    from vlm_repro.models.protocol import load_model
    torch.set_num_threads(1)
    sizes = [4] if options.quick else options.batches
    exact = options.device == "cpu"
    with tempfile.TemporaryDirectory() as held:
        folder, rounds, equal = Path(held), {}, {}
        shapes.build(folder / "model", options.shape, options.device)
        model = load_model(str(folder / "model"), device=options.device)
        require(model.reader is not None, f"beginnings are not shared: {model.describe()['shared_prefixes']}")
        processor = hf.AutoProcessor.from_pretrained(folder / "model")
        for name, (frames, categories, shots) in LAYOUTS.items():
            frames, categories = (2, min(categories, 2)) if options.quick else (options.queries if categories == 1 else frames, categories)
            requests = asked(folder / f"images {name}", frames, categories, shots, SIDE.get(options.shape, SIDE["other"]))
            ways = {**{f"ours_{b}": lambda b=b, r=requests: ours(model, r, b) for b in sizes}, "plain": lambda r=requests: plain(processor, model.net, r)}
            equal[name] = {**compare(ways, exact), "prompt_tokens": model.measure(requests[0]).total, **apart(model, requests)}
            rounds[name] = slim(interleaved(ways, 1 if options.quick else options.rounds, name))
            if name == FIRST: best, three = min(sizes, key=lambda b: least(rounds[FIRST], f"ours_{b}", "response_wall_s")), requests
        figures = {"at_3_shots": gain(rounds[FIRST]), "at_0_shots": gain(rounds["0 shots"]), "at_3_shots_apart": gain(rounds["3 shots, apart"]), "logits_apart": max(e["logits_apart"] for e in equal.values())}
        clock = {name: gain(r, "response_wall_s") for name, r in rounds.items()}
        device = {k: r[0][f"ours_{sizes[-1]}"]["device"] for k, r in rounds.items()}
        print(json.dumps(device))
        finish("C2", options, begun, figures, lambda: hot_spots(lambda: ours(model, three, best)), versions=versions("torch", "transformers"),
               sizes={"layouts": LAYOUTS, "views": VIEWS, "new_tokens": NEW, "shape": options.shape, "device": options.device}, equal=equal, by_the_clock=clock, device=device, rounds=rounds)


if __name__ == "__main__":
    main()
