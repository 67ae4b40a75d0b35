"""A task of plain coloured pictures, for tests of the trainer; as a script it is one training process."""
import json
import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm_repro.core.tasks import TASKS, Task
from vlm_repro.train.recipe import Recipe, load_recipe
from vlm_repro.train.render import Example
from vlm_repro.train.watch import read_log

FULL = {"method": "full", "parts": ["projector", "language_model", "embeddings", "head"]}
COLOURS = {"red": (200, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 200)}


@dataclass(frozen=True)
class Settings:
    """Where the pictures are, how many, and which examples have none."""

    data_root: str = ""
    n: int = 24
    text_every: int = 0


TOY = {"eval_data": [], "tuning": {"method": "lora", "rank": 16, "alpha": 32, "targets": "language_model"}, "learning_rate": 1e-3, "part_rates": {}, "batch": 6, "micro_tokens": 0,
       "micro_batch": 3, "epochs": 3, "max_steps": 0, "schedule": "cosine", "warmup": 0.1, "weight_decay": 0, "precision": "fp32", "checkpointing": False, "max_length": 1024, "packing": True,
       "max_pixels": 0, "log_every": 1, "save_every": "epoch", "eval_every": "epoch", "keep": 1, "metric": "loss", "best": False, "workers": 0, "keep_features": 0, "report": [], "seed": 0}


def picture(path: Path, colour: str, width: int) -> None:
    """Draw one picture, unless it is there; several processes may try at once."""
    if path.exists():
        return
    part = path.with_name(f".{path.stem}-{os.getpid()}.jpg")
    Image.new("RGB", (width, 56), COLOURS[colour]).save(part)
    part.replace(path)


def talk(settings: Settings, split: str, i: int) -> Example:
    """Which colour a picture has."""
    rng = random.Random(f"{split}{i}")
    colour, path = rng.choice(list(COLOURS)), Path(settings.data_root, f"{split}-{i}.jpg")
    picture(path, colour, 56 + 28 * (i % 3))
    shown = [] if settings.text_every and i % settings.text_every == 0 else [{"type": "image", "image": str(path)}]
    question = {"type": "text", "text": "Colour?" + " Say it." * (i % 4)}
    answer = {"type": "text", "text": f"It is {colour}."}
    return Example(f"{split}-{i}", [{"role": "user", "content": [*shown, question]}, {"role": "assistant", "content": [answer]}])


def examples(settings: Settings, split: str) -> list[Example]:
    """The conversations of a split; `nothing` is empty."""
    Path(settings.data_root).mkdir(parents=True, exist_ok=True)
    return [talk(settings, split, i) for i in range(0 if split == "nothing" else settings.n)]


def unused(*args: object) -> None:
    """A stage that training does not reach."""
    raise AssertionError(args)


task = Task(name="toy", settings=Settings, load=unused, prompt=unused, extract=unused, score=unused, cells=unused, published=unused, eligibility=unused, cluster="", unit="",
            world=unused, export=unused, examples=examples)
TASKS["toy"] = "train_toy"


def toy_recipe(folder: Path, **changes: object) -> Recipe:
    """A recipe on the pictures; `folder` holds `model/` and gets `pictures/`."""
    data = {"task": "toy", "settings": {"data_root": str(folder / "pictures"), **changes.pop("data", {})}}
    base = {"model": str(folder / "model"), "data": [data], **TOY}
    return load_recipe("mmwalk/tiny", **{**base, **changes})


def losses(out: Path) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in read_log(out / "log.jsonl") if "loss" in row]


def kill_at(step: int, number: int) -> None:
    """Have this process signalled in the middle of a step."""
    from vlm_repro.train.tuner import Tuner

    turn = Tuner._turn

    def killing(self: Tuner, *args: object) -> object:
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        return turn(self, *args)

    Tuner._turn = killing


def main(folder: str, out: str, changes: str = "{}", step: str = "", name: str = "") -> None:
    """Train; in the middle of `step` the signal `name` arrives."""
    import torch

    from vlm_repro.train.loop import fine_tune

    torch.set_num_threads(1)
    if step:
        kill_at(int(step), getattr(signal, name))
    report = fine_tune(toy_recipe(Path(folder), **json.loads(changes)), out, progress=False)
    print(json.dumps({"steps": report.steps, "finished": report.finished, "resumed": report.resumed}))


if __name__ == "__main__":
    main(*sys.argv[1:])
