"""One epoch of fine-tuning, ours against the plain trainer: `python benchmarks/train.py [--rounds 5] [--out benchmarks/results/train.json]`.

Compared, on the same tiny Qwen2-VL with the full head of 151,936 rows, the same conversations, the same adapters, optimizer, schedule and number of steps (see train_data.py):
  plain    `transformers.Trainer`, batches in its own random order padded to their longest row, the model's own loss on the logits of every position
  grouped  the same with `train_sampling_strategy="group_by_length"`
  ours     `vlm_repro.train.loop.fine_tune`: packed rows, logits of the supervised positions only
First the summed loss of the whole set is computed both ways from the same weights; unless they agree to 1e-4, nothing is timed. Every epoch then runs in a process of its own, in
rounds that take turns. Seconds are of `Trainer.train` alone (`epoch_*`), which for ours includes the last checkpoint, and of everything from processor to saved adapter (`run_*`). Memory is the
largest resident size of the process; logits are what the head returns at once, before loss and gradient make copies.

`--table` writes the table of benchmarks/README.md from the results and the predictions (predictions.json), and measures nothing.
"""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from train_data import Sizes

    from vlm_repro.train.recipe import Recipe

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "pillow", "vlm_repro")
TOLERANCE = 1e-4
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")  # before torch is imported, and for the processes started here


# What is compared. -----------------------------------------------------------------------------------------------------------------------------------------------------------------------

def recipe_of(folder: Path, batch: int) -> "Recipe":
    """The recipe of both sides."""
    from vlm_repro.train.recipe import Lora, Recipe, Source
    return Recipe(
        name="skewed", model=str(folder / "model"), data=(Source("skewed", settings={"folder": str(folder)}),), tuning=Lora(rank=16, alpha=32.0), learning_rate=1e-4, batch=batch,
        micro_tokens=8192, max_length=2048, schedule="cosine", warmup=0, precision="fp32", checkpointing=False, packing=True, log_every=10, save_every="never", eval_every="never",
        workers=0, report=(), seed=0)


class Rows:
    """The conversations as the plain trainer takes them, each rendered when it is asked for."""
    def __init__(self, recipe: "Recipe"):
        from vlm_repro.train.data import source_examples
        from vlm_repro.train.setup import load_processor
        self.preparer, self.examples, self.mask = load_processor(recipe), source_examples(recipe.data[0]), recipe.mask

    def __len__(self) -> int: return len(self.examples)

    def __getitem__(self, i: int) -> dict[str, "torch.Tensor"]:
        from vlm_repro.train.render import render_example
        return dict(render_example(self.preparer, self.examples[i], self.mask).tensors)

    def lengths(self) -> list[int]:
        """Tokens of every conversation, no picture decoded."""
        from vlm_repro.models.inputs import VisualCounter
        from vlm_repro.train.render import measure_example
        counter = VisualCounter(self.preparer)
        return [measure_example(self.preparer, e, counter, self.mask).total for e in self.examples]

    def collate(self, rows: list[dict[str, "torch.Tensor"]]) -> dict[str, "torch.Tensor"]:
        """Rows padded on the right to the longest, patches of all pictures one after the other."""
        import torch
        from torch.nn.functional import pad
        fill, n = {"input_ids": self.preparer.tokenizer.pad_token_id, "labels": -100}, max(r["input_ids"].shape[1] for r in rows)
        by_token = [k for k, v in rows[0].items() if v.shape == rows[0]["input_ids"].shape]
        padded = {k: torch.cat([pad(r[k], (0, n - r[k].shape[1]), value=fill.get(k, 0)) for r in rows]) for k in by_token}
        return padded | {k: torch.cat([r[k] for r in rows]) for k in rows[0] if k not in by_token}


def plain(recipe: "Recipe", out: Path, grouped: bool = False) -> None:
    """`Trainer` as it comes."""
    from torch.utils.data import Sampler
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_pt_utils import LengthGroupedSampler

    from vlm_repro.train.setup import load_trainable
    rows = Rows(recipe)
    args = TrainingArguments(
        output_dir=str(out), num_train_epochs=1, per_device_train_batch_size=recipe.batch, learning_rate=recipe.learning_rate, lr_scheduler_type=recipe.schedule, warmup_steps=0,
        weight_decay=recipe.weight_decay, max_grad_norm=recipe.max_grad_norm, seed=recipe.seed, use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=recipe.log_every,
        save_strategy="no", remove_unused_columns=False)

    class Grouped(Trainer):
        """What `group_by_length` selects, given the lengths; the trainer itself would decode every picture once more to learn them."""
        def _get_train_sampler(self, *_: Any) -> Sampler: return LengthGroupedSampler(recipe.batch, lengths=rows.lengths())

    trainer = (Grouped if grouped else Trainer)(load_trainable(recipe), args, data_collator=rows.collate, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(out / "adapter"))


def ours(recipe: "Recipe", out: Path) -> None:
    """This package."""
    from vlm_repro.train.loop import fine_tune
    fine_tune(recipe, out, progress=False)


WAYS: dict[str, Callable[["Recipe", Path], None]] = {"plain": plain, "grouped": lambda recipe, out: plain(recipe, out, grouped=True), "ours": ours}


# Equal losses, before anything is timed. ------------------------------------------------------------------------------------------------------------------------------------------------

def plain_sums(model: "torch.nn.Module", recipe: "Recipe") -> tuple[float, int, list[int]]:
    """Summed loss by the model's own loss on padded pairs, supervised tokens, and the length of every conversation."""
    rows, total, items, lengths = Rows(recipe), 0.0, 0, []
    for start in range(0, len(rows), 2):
        batch = rows.collate([rows[i] for i in range(start, min(start + 2, len(rows)))])
        n = int((batch["labels"][:, 1:] != -100).sum())
        total, items = total + model(**batch, use_cache=False).loss.item() * n, items + n
        lengths += batch["attention_mask"].sum(1).tolist()
    return total, items, lengths


def continued(positions: "torch.Tensor") -> "torch.Tensor":
    """Position ids whose count of text does not begin anew with each conversation, which is how a model finds where one ends."""
    import torch
    return torch.cat([torch.arange(positions.shape[-1]).expand_as(positions[:1]), positions[1:]])


def our_sums(model: "torch.nn.Module", recipe: "Recipe", isolated: bool = True) -> tuple[float, int]:
    """Summed loss by this package over its own epoch, and supervised tokens; `isolated=False` lets packed conversations see each other, which must show."""
    from vlm_repro.train.batches import Collator
    from vlm_repro.train.data import pool
    from vlm_repro.train.feed import Feed, loader
    from vlm_repro.train.loss import supervised_loss
    from vlm_repro.train.order import Order
    from vlm_repro.train.setup import load_processor
    preparer = load_processor(recipe)
    found, total, items = pool(recipe.data, preparer, recipe), 0.0, 0
    feed = Feed(found, Order(found.groups, found.lengths, recipe), preparer, Collator(preparer, model.config, recipe.packing))
    for fed in loader(feed, 0, 0):
        if not isolated: fed.tensors["position_ids"] = continued(fed.tensors["position_ids"])
        total, items = total + supervised_loss(model, fed.tensors, 1).item(), items + fed.items
    return total, items


def prepare(folder: Path, sizes: "Sizes", batch: int) -> dict[str, Any]:
    """Build model and data, and compare the losses."""
    import torch
    from train_data import build

    from vlm_repro.train.setup import load_trainable
    build(folder, sizes)
    recipe = recipe_of(folder, batch)
    model = load_trainable(recipe).eval()
    with torch.no_grad():
        (a, n_a, lengths), (b, n_b), (c, _) = plain_sums(model, recipe), our_sums(model, recipe), our_sums(model, recipe, isolated=False)
    lengths.sort()
    return {"data": {"examples": len(lengths), "tokens": sum(lengths), "supervised": n_a, "shortest": lengths[0], "median": median(lengths), "longest": lengths[-1]},
            "equal": {"plain": a, "ours": b, "relative": abs(a - b) / abs(a), "same_tokens": n_a == n_b, "without_isolation": c, "tolerance": TOLERANCE},
            "parameters": {"all": sum(p.numel() for p in model.parameters()), "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}}


# One epoch, watched. --------------------------------------------------------------------------------------------------------------------------------------------------------------------

def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    status = Path("/proc/self/status")
    held = [row.split()[1] for row in status.read_text().splitlines() if row.startswith("VmHWM")] if status.exists() else []
    return int(held[0]) * 1024 if held else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Times `Trainer.train`, and counts the positions that the model computes and the bytes that its head returns."""
    from transformers import Trainer

    from vlm_repro.train.parts import unwrap
    seen: dict[str, Any] = {"positions": 0, "logits_bytes": 0, "head_positions": 0}
    original = Trainer.train

    def count_positions(_: Any, __: Any, named: dict[str, Any]) -> None: seen["positions"] += named["input_ids"].numel()

    def count_logits(_: Any, __: Any, logits: "torch.Tensor") -> None:
        seen["head_positions"] += logits.numel() // logits.shape[-1]
        seen["logits_bytes"] = max(seen["logits_bytes"], logits.numel() * logits.element_size())

    def train(self: Trainer, *args: Any, **named: Any) -> Any:
        net = unwrap(self.model)
        net.register_forward_pre_hook(count_positions, with_kwargs=True)
        net.lm_head.register_forward_hook(count_logits)
        seen["before_bytes"] = peak_bytes()
        wall, cpu = time.perf_counter(), time.process_time()
        out = original(self, *args, **named)
        seen.update(epoch_cpu_s=time.process_time() - cpu, epoch_wall_s=time.perf_counter() - wall, steps=self.state.global_step)
        return out

    Trainer.train = train
    try: yield seen
    finally: Trainer.train = original


def epoch(way: str, folder: Path, batch: int) -> dict[str, Any]:
    """One way, in this process."""
    with tempfile.TemporaryDirectory() as out, watched() as seen:
        wall, cpu, load = time.perf_counter(), time.process_time(), os.getloadavg()
        WAYS[way](recipe_of(folder, batch), Path(out))
        seen.update(run_cpu_s=time.process_time() - cpu, run_wall_s=time.perf_counter() - wall, peak_bytes=peak_bytes(), load_before=load, load_after=os.getloadavg())
    return seen


# Rounds, and what they show. ------------------------------------------------------------------------------------------------------------------------------------------------------------

def child(job: dict[str, Any]) -> dict[str, Any]:
    """A job in a process of its own, which inherits no memory from this one; raises SystemExit with what it said if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        done = subprocess.run([sys.executable, __file__, "--job", json.dumps(job), "--out", str(answer)], capture_output=True, text=True)
        if done.returncode: raise SystemExit(f"{job} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads(answer.read_text())


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """What `child` asks for."""
    from train_data import Sizes
    folder = Path(job["folder"])
    if job["do"] == "prepare": return prepare(folder, Sizes(**job["sizes"]), job["batch"])
    return epoch(job["do"], folder, job["batch"])


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def ratios(rounds: list[dict[str, Any]], base: str) -> dict[str, dict[str, float]]:
    """Ours ÷ another way, round by round: speed, memory."""
    speed = {f"supervised_per_{kind}_s": [r[base][f"epoch_{kind}_s"] / r["ours"][f"epoch_{kind}_s"] for r in rounds] for kind in ("cpu", "wall")}
    whole = {f"run_supervised_per_{kind}_s": [r[base][f"run_{kind}_s"] / r["ours"][f"run_{kind}_s"] for r in rounds] for kind in ("cpu", "wall")}
    size = {name: [r["ours"][key] / r[base][key] for r in rounds] for name, key in (("logits_bytes", "logits_bytes"), ("peak_rss", "peak_bytes"))}
    return {k: spread(v) for k, v in (speed | whole | size).items()}


def summary(rounds: list[dict[str, Any]], ways: list[str], data: dict[str, Any]) -> dict[str, Any]:
    """Least, middle and most of every figure of every way."""
    out = {}
    for way in ways:
        cells = {k: spread([r[way][k] for r in rounds]) for k in ("epoch_cpu_s", "epoch_wall_s", "run_cpu_s", "run_wall_s", "peak_bytes", "logits_bytes")}
        cells |= {f"supervised_per_{kind}_s": spread([data["supervised"] / r[way][f"epoch_{kind}_s"] for r in rounds]) for kind in ("cpu", "wall")}
        out[way] = cells | {"padding": spread([1 - data["tokens"] / r[way]["positions"] for r in rounds])}
    return out


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = {row.partition(":")[2].strip() for row in info.read_text().splitlines() if row.startswith("model name")} if info.exists() else {platform.processor()}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": sorted(names), "cpus": os.cpu_count(), "threads": 1, "memory_gib": round(memory / 2**30, 1), "system": platform.system(), "python": platform.python_version()}


def check(known: dict[str, Any]) -> None:
    """Refuse to time what does not compute the same."""
    equal = known["equal"]
    print(f"summed loss {equal['plain']:.4f} plain, {equal['ours']:.4f} ours, {equal['relative']:.1e} apart; {equal['without_isolation']:.4f} if packed conversations saw each other", flush=True)
    if equal["relative"] > TOLERANCE or not equal["same_tokens"]: raise SystemExit("the losses differ, so times mean nothing")


def one_round(k: int, ways: list[str], job: dict[str, Any], work: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Every way once, in turns that change their order from round to round."""
    row = {}
    for way in (ways if k % 2 == 0 else ways[::-1]):
        row[way] = work({"do": way, **job})
        print(f"round {k + 1}  {way:8}{row[way]['epoch_cpu_s']:8.1f} s CPU {row[way]['epoch_wall_s']:8.1f} s wall  {row[way]['peak_bytes'] / 2**30:5.2f} GiB  "
              f"load {row[way]['load_before'][0]:.1f}", flush=True)
    return row


def measure(sizes: "Sizes", batch: int, rounds: int, ways: list[str], work: Callable[[dict[str, Any]], dict[str, Any]] = child) -> Iterator[dict[str, Any]]:
    """Check, then time; the result so far after every round."""
    begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory() as held:
        job, done = {"folder": str(Path(held) / "set"), "batch": batch}, []
        known = work({"do": "prepare", "sizes": asdict(sizes), **job})
        check(known)
        for k in range(rounds):
            done.append(one_round(k, ways, job, work))
            yield {"what": "one epoch of fine-tuning: the plain trainer, and ours", "command": "python benchmarks/" + " ".join([Path(__file__).name, *sys.argv[1:]]), "begun": begun,
                   "machine": machine(), "versions": {p: version(p) for p in PACKAGES}, "sizes": asdict(sizes), "batch": batch, **known, "summary": summary(done, ways, known["data"]),
                   "ratios": {base: ratios(done, base) for base in ways if base != "ours"}, "rounds": done}


# The table. -----------------------------------------------------------------------------------------------------------------------------------------------------------------------------

FIGURES = {"supervised_per_cpu_s": "supervised tokens per CPU second", "supervised_per_wall_s": "supervised tokens per second", "logits_bytes": "logits at once, MiB", "peak_rss": "largest resident size, MiB",
           "padding": "positions that are padding, %"}
SHOWN: dict[str, tuple[str, float]] = {"logits_bytes": ("logits_bytes", 2**-20), "peak_rss": ("peak_bytes", 2**-20), "padding": ("padding", 100)}


def meets(value: float, goal: str) -> str:
    sign, _, limit = goal.partition(" ")
    if not limit: return ""
    return "yes" if {">=": value >= float(limit), "<=": value <= float(limit), "<": value < float(limit)}[sign] else "no"


def row_of(name: str, claim: dict[str, Any], held: dict[str, Any]) -> list[str]:
    """One line of the table."""
    key, scale = SHOWN.get(name, (name, 1))
    cells = [f"{held['summary'][way][key]['median'] * scale:,.{1 if scale == 1 or scale == 100 else 0}f}" for way in held["summary"]]
    found = held["summary"]["ours"]["padding"] if name == "padding" else held["ratios"]["plain"][name]
    ratio = "" if name == "padding" else f"{found['median']:.2g} ({found['min']:.2g}–{found['max']:.2g})"
    said = f"{claim['predicted']:g} ({claim['low']:g}–{claim['high']:g})"
    inside = "" if claim["low"] <= found["median"] <= claim["high"] else ", missed"
    return [FIGURES[name], *cells, ratio, said + inside, claim["goal"], meets(found["median"], claim["goal"])]


def table(held: dict[str, Any], claims: dict[str, Any]) -> str:
    """The results as Markdown."""
    ways, data, equal = list(held["summary"]), held["data"], held["equal"]
    head = ["", *ways, "ours ÷ plain", "predicted", "goal", "met"]
    rows = [row_of(name, claim, held) for name, claim in claims.items()]
    loads = [row[way]["load_before"][0] for row in held["rounds"] for way in row]
    about = (f"{data['examples']} conversations, {data['tokens']:,} tokens, {data['supervised']:,} supervised; {held['batch']} a step; {held['sizes']['vocabulary']:,} rows in the head. "
             f"Summed losses {equal['relative']:.1e} apart before the first round. {held['begun'][:10]}, {', '.join(held['machine']['cpu'])}, {held['machine']['threads']} thread, "
             f"load average {min(loads):.1f} to {max(loads):.1f}; torch {held['versions']['torch']}, transformers {held['versions']['transformers']}. {len(held['rounds'])} of the "
             f"rounds that the command asks for were run; median (least–most).")
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows), "", about, "", f"    {held['command']}"])


def put(page: Path, mark: str, text: str) -> None:
    """Put a text between its marks in a page."""
    before, rest = page.read_text(encoding="utf-8").split(f"<!-- {mark} -->", 1)
    page.write_text(f"{before}<!-- {mark} -->\n{text}\n<!-- /{mark} -->{rest.split(f'<!-- /{mark} -->', 1)[1]}", encoding="utf-8")


def write_table(results: Path, page: Path) -> str:
    """Put the table into the README."""
    claims = json.loads((HERE / "predictions.json").read_text(encoding="utf-8"))["train"]["claims"]
    text = table(json.loads(results.read_text(encoding="utf-8")), claims)
    put(page, "train", text)
    return text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one epoch of fine-tuning, ours against the plain trainer.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="conversations of a step")
    parser.add_argument("--ways", nargs="+", choices=("plain", "grouped", "ours"), default=["plain", "grouped", "ours"])
    parser.add_argument("--size", nargs="*", default=[], metavar="NAME=VALUE", help="what differs from the sizes in train_data.py")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--together", action="store_true", help="everything in this one process: quick, to try the script; memory then says nothing")
    parser.add_argument("--table", action="store_true", help="write the table of benchmarks/README.md from benchmarks/results/train.json")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def sizes_of(given: list[str]) -> "Sizes":
    from train_data import Sizes
    known = {f.name: type(f.default) for f in fields(Sizes)}
    pairs = [item.partition("=")[::2] for item in given]
    return replace(Sizes(), **{name: known[name](value) for name, value in pairs})


def main() -> None:
    options = arguments()
    if options.table: return print(write_table(HERE / "results" / "train.json", HERE / "README.md"))
    if options.job: return options.out.write_text(json.dumps(run_job(options.job)), encoding="utf-8") and None
    for result in measure(sizes_of(options.size), options.batch, options.rounds, options.ways, run_job if options.together else child):
        if options.out: options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["ratios"]))


if __name__ == "__main__":
    main()
