"""A coach of films of two kinds, for tests of the trainer; as a script it is one training process."""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import transformers as hf
from train_toy import TOY, kill_at, unused

from vlm_repro.core.tasks import TASKS, Task
from vlm_repro.fitcoach.actions import add_actions
from vlm_repro.fitcoach.cross_attention import Looking
from vlm_repro.fitcoach.model import Eyes, save_stream_vlm, stream_vlm
from vlm_repro.models.tiny import learn_tokenizer
from vlm_repro.train.recipe import Recipe, load_recipe
from vlm_repro.train.render import Example

CHANNELS, RATE = 8, 4
WORDS = ("Lower your hips!", "Nice work!")
LORA = {"method": "lora", "rank": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj"]}
ALL = {"method": "full", "parts": ["projector", "language_model", "embeddings", "head"]}
LOOKING = {"method": "full", "parts": ["projector"]}


@dataclass(frozen=True)
class Settings:
    """Where the films are, and how many."""

    data_root: str = ""
    n: int = 6


def film(root: Path, i: int) -> tuple[dict, list[dict]]:
    """A film whose channel is bright for a moment, and what is said when it gets bright."""
    rng = np.random.default_rng(i)
    steps, begun = int(rng.integers(12, 20)), 1000.0 + 100 * i
    clock, maps = begun + np.arange(1, steps + 1) / RATE, rng.random((steps, CHANNELS, 7, 5), np.float32) / 4
    said = []
    for at, kind in ((3, i % 2), (8, (i + 1) % 2)):
        maps[at : at + 2, kind] = 6.0
        said.append({"type": "text", "text": WORDS[kind], "at": float(clock[at])})
    features, times = root / f"{i}_features.npy", root / f"{i}_timestamps.npy"
    if not times.exists():  # features that a test has taken away stay away
        np.save(features, maps)
        np.save(times, clock)
    return {"type": "film", "film": str(features), "clock": str(times), "start": begun, "end": float(clock[-1])}, said


def examples(settings: Settings, split: str) -> list[Example]:
    """Clips of a split, of different lengths."""
    root = Path(settings.data_root) / split
    root.mkdir(parents=True, exist_ok=True)
    out = []
    for i in range(settings.n):
        shown, said = film(root, i)
        out.append(Example(f"{split}-{i}", [{"role": "user", "content": [{"type": "text", "text": "Coach!"}, shown]}, {"role": "assistant", "content": said}]))
    return out


TASKS["streams"] = "train_streams"
task = Task(name="streams", settings=Settings, load=unused, prompt=unused, extract=unused, score=unused, cells=unused, published=unused, eligibility=unused, cluster="", unit="",
            world=unused, export=unused, examples=examples)


def make(folder: Path, seed: int = 0) -> Path:
    """A tiny model with random weights, saved."""
    tokenizer = learn_tokenizer(["Coach! Lower your hips! Nice work!"] * 20, 300, r" ?\p{L}+|\d|\s|!", ("<s>", "<|endoftext|>", "<|im_end|>"), {}, 4096)
    add_actions(tokenizer)
    config = hf.LlamaConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512)
    return save_stream_vlm(stream_vlm(config, tokenizer, Looking((0, 1), feature=CHANNELS), Eyes(1 / 16, CHANNELS), seed), folder)


def stream_recipe(folder: Path, **changes: object) -> Recipe:
    """A recipe on the films; `folder` holds `model/` and gets `films/`."""
    data = {"task": "streams", "settings": {"data_root": str(folder / "films"), **changes.pop("data", {})}}
    base = {**TOY, "model": str(folder / "model"), "data": [data], "tuning": ALL, "packing": False, "batch": 4, "micro_batch": 2, "epochs": 2, "learning_rate": 3e-3, "mask": "answer"}
    return load_recipe("mmwalk/tiny", **{**base, **changes})


def main(folder: str, out: str, changes: str = "{}", step: str = "", name: str = "") -> None:
    """Train; in the middle of `step` the signal `name` arrives."""
    import signal

    import torch

    from vlm_repro.train.loop import fine_tune

    torch.set_num_threads(1)
    if step:
        kill_at(int(step), getattr(signal, name))
    report = fine_tune(stream_recipe(Path(folder), **json.loads(changes)), out, progress=False)
    print(json.dumps({"steps": report.steps, "finished": report.finished, "resumed": report.resumed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
