"""Many questions about one scene: `python benchmarks/scene_prefix.py [--out benchmarks/results/scene_prefix.json]`.

GPT4Scene's prompts: a view from above and 32 frames, then one question; ten questions about each scene, scene by scene, on a tiny Qwen2-VL with random weights; 16 new tokens, greedy, one thread.
Compared:
  ours_N  `core.generate.generate` with batches of N, every answer kept in a run folder; the memories of the model start empty in every round
  plain   the processor and `generate` of transformers, one question at a time, as the published evaluation asks (there four at a time, each with all its pictures)
Token ids must be equal, all of them; a logit l of the first new token must be within 1e-4 x (1 + |l|) of that of a prompt that was read by itself; and ours must have opened and encoded the 33 pictures
of a scene once. The goal is looked at with the best N, in CPU seconds, which leave out who else was busy; the ratio by the clock stands beside it.

On a GPU: `python benchmarks/scene_prefix.py --device cuda --shape qwen2-vl-7b --side 504`: 324 visual tokens a picture, as the paper has them; in bfloat16 sums in another order may change an answer, so
the number of different answers is shown and not asserted.
"""
import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from bench import arguments, finish, hot_spots, interleaved, least, now, one_thread, require, versions

one_thread()

from shots import NEW, compare, first_logits, forget, gain, ours, plain, slim  # noqa: E402  (threads are set before torch is imported)

PICTURES, QUESTIONS = 33, 10  # of a scene
APART = 1e-4


def pictures(folder: Path, scene: int, side: int) -> list[str]:
    """The coarse random pictures of a scene."""
    import numpy as np
    from PIL import Image
    rng, out = np.random.default_rng(scene), []
    for k in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{scene}-{k:02}.png")
        out.append(str(folder / f"{scene}-{k:02}.png"))
    return out


def asked(folder: Path, scenes: int, side: int) -> list[Any]:
    """All questions about all scenes, scene by scene."""
    import random

    import shapes

    from vlm_repro.core.records import Request
    folder.mkdir()
    rng, out = random.Random(0), []
    for s in range(scenes):
        shown = [{"type": "image", "image": p} for p in pictures(folder, s, side)]
        for q in range(QUESTIONS):
            text = " ".join(rng.choices(shapes.WORDS, k=rng.randint(12, 24))) + "?"
            out.append(Request(f"s{s}.{q:02}", [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}], "ours"))
    return out


def moved(model: Any, requests: list[Any]) -> float:
    """How far shared reading moves a logit l, at most, in units of 1 + |l|, over the first questions."""
    from dataclasses import replace

    import torch
    some = requests[:4]
    alone = torch.cat([first_logits(replace(model, reader=None), [r]) for r in some]).float()
    return float(((first_logits(forget(model), some).float() - alone).abs() / (1 + alone.abs())).max())


def encoded_once(rounds: list[dict[str, Any]], scenes: int) -> dict[str, Any]:
    """What our ways opened and encoded, and read; refuses a picture that was encoded twice."""
    held = {name: seen["reused"] for row in rounds for name, seen in row.items() if name != "plain"}
    for name, reused in held.items():
        for what in ("pictures_opened", "images_encoded"): require(reused[what] == PICTURES * scenes, f"{name}: {what} {reused[what]} for {scenes} scenes of {PICTURES} pictures")
    return {name: {k: reused[k] for k in ("tokens", "tokens_read", "images", "images_encoded", "pictures_opened")} for name, reused in held.items()}


def parsed() -> argparse.Namespace:
    parser = arguments("Time many questions about one scene.", rounds=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="tiny", help="see shapes.py")
    parser.add_argument("--scenes", type=int, default=3)
    parser.add_argument("--side", type=int, default=140, help="pixels of a picture: 140 are 25 visual tokens, 504 are 324")
    parser.add_argument("--batches", type=int, nargs="*", default=[5, 10])
    return parser.parse_args()


def main() -> None:
    options, begun = parsed(), now()
    import shapes
    import torch
    import transformers as hf

    from vlm_repro.models.protocol import load_model
    torch.set_num_threads(1)
    scenes, sizes = (1, [4]) if options.quick else (options.scenes, options.batches)
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        shapes.build(folder / "model", options.shape, options.device)
        model = load_model(str(folder / "model"), device=options.device)
        require(model.reader is not None, f"beginnings are not shared: {model.describe()['shared_prefixes']}")
        processor = hf.AutoProcessor.from_pretrained(folder / "model")
        requests = asked(folder / "images", scenes, options.side)
        ways = {**{f"ours_{b}": lambda b=b: ours(model, requests, b) for b in sizes}, "plain": lambda: plain(processor, model.net, requests)}
        equal = {**compare(ways, options.device == "cpu"), "prompt_tokens": model.measure(requests[0]).total, "visual_tokens": model.measure(requests[0]).n_visual, "logits_apart": moved(model, requests)}
        require(options.device != "cpu" or equal["logits_apart"] <= APART, f"logits that are {equal['logits_apart']:.1e} apart")
        rounds = slim(interleaved(ways, 1 if options.quick else options.rounds, "scenes"))
        once, best = encoded_once(rounds, scenes), min(sizes, key=lambda b: least(rounds, f"ours_{b}", "response_wall_s"))
        clock, device = gain(rounds, "response_wall_s"), rounds[0][f"ours_{best}"]["device"]
        print(json.dumps(device))
        finish("scene_prefix", options, begun, {"cpu_s": gain(rounds), "wall_s": clock}, lambda: hot_spots(lambda: ours(model, requests, best)), versions=versions("torch", "transformers"),
               sizes={"scenes": scenes, "pictures": PICTURES, "questions": QUESTIONS, "side": options.side, "new_tokens": NEW, "shape": options.shape, "device": options.device},
               equal=equal, reused=once, device=device, rounds=rounds)


if __name__ == "__main__":
    main()
