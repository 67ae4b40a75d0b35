"""The model and the conversations of the training benchmarks: few long ones among many short, with pictures, a tenth of the tokens supervised.

A genuine Qwen2-VL at tiny size with as many rows in its head as Qwen2-VL has, and random weights large enough that a wrong position or a leak between packed conversations
changes the loss. Everything is a function of its arguments.
"""
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from vlm_repro.core.tasks import TASKS, get_task
from vlm_repro.models.tiny import build_processor, save_tiny, tiny_config, train_tokenizer
from vlm_repro.train.render import Example

WORDS = [f"{a}{b}{c}" for a in ("ba", "ke", "li", "mo", "su", "ta", "ve") for b in ("n", "r", "s", "l") for c in ("a", "do", "en", "ig", "o", "ut")]
OVERHEAD = 8  # tokens of the template around question and answer
PICTURE = 22  # tokens that a picture takes, about, marks included


@dataclass(frozen=True)
class Sizes:
    """How large model and data are."""
    examples: int = 256
    median: int = 70  # tokens of a conversation
    skew: float = 0.75  # standard deviation of the logarithm of the lengths
    shortest: int = 36
    longest: int = 384
    supervised: float = 0.1  # share of the tokens
    vocabulary: int = 151_936  # rows of the head, as in Qwen2-VL-2B
    text: int = 160  # width of the language model
    vision: int = 128  # width of the vision tower
    layers: int = 4  # of either
    seed: int = 0


def sentence(rng: np.random.Generator, n: int) -> str:
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=max(n, 1)))


def picture(rng: np.random.Generator, path: Path) -> str:
    """A coarse random pattern of a size of its own, as JPEG."""
    width, height = (int(x) for x in rng.integers(90, 131, size=2))
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
    return str(path)


def conversation(rng: np.random.Generator, length: int, sizes: Sizes, folder: Path, number: int) -> dict:
    """A question about one to four pictures, and its answer."""
    pictures = int(np.clip(length // 60, 1, 4))
    answer = max(round(length * sizes.supervised) - 1, 1)
    question = length - OVERHEAD - pictures * PICTURE - answer
    return {"id": f"c{number:04}", "images": [picture(rng, folder / f"{number:04}-{i}.jpg") for i in range(pictures)], "question": sentence(rng, question), "answer": sentence(rng, answer)}


def build(folder: Path, sizes: Sizes) -> None:
    """Write `model/`, `images/` and `conversations.json`."""
    rng, images = np.random.default_rng(sizes.seed), folder / "images"
    images.mkdir(parents=True)
    drawn = np.exp(rng.normal(np.log(sizes.median), sizes.skew, sizes.examples))
    lengths = np.clip(drawn, sizes.shortest, sizes.longest).astype(int)
    rows = [conversation(rng, int(n), sizes, images, i) for i, n in enumerate(lengths)]
    (folder / "conversations.json").write_text(json.dumps(rows), encoding="utf-8")
    tokenizer = train_tokenizer(" " + w for w in WORDS * 3)
    config = tiny_config(tokenizer, vision=sizes.vision, text=sizes.text, layers=sizes.layers)
    config.text_config.vocab_size = sizes.vocabulary
    torch.manual_seed(sizes.seed)
    model = Qwen2VLForConditionalGeneration(config)
    for p in model.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=0.15)
    save_tiny(folder / "model", model, build_processor(tokenizer), {"what": "random weights for a benchmark", **asdict(sizes)})


def conversations(folder: str | Path) -> list[dict]:
    """What `build` wrote."""
    return json.loads((Path(folder) / "conversations.json").read_text(encoding="utf-8"))


def example(row: dict) -> Example:
    """A conversation as this package trains on it."""
    user = [*({"type": "image", "image": path} for path in row["images"]), {"type": "text", "text": row["question"]}]
    return Example(row["id"], [{"role": "user", "content": user}, {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}])


@dataclass(frozen=True)
class Settings:
    """Which data."""
    folder: str = ""  # that `build` wrote


def examples(settings: Settings, split: str) -> Sequence[Example]:
    """The conversations, whatever the split."""
    return [example(row) for row in conversations(settings.folder)]


# Recipes name their data by paper; of a paper, training uses name, settings and conversations alone.
task = replace(get_task("mmwalk"), name="skewed", settings=Settings, examples=examples)
TASKS["skewed"] = __name__
