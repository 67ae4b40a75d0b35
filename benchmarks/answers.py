"""Answering questions about pictures: `python benchmarks/answers.py --lmms ENV [--out benchmarks/results/answers.json]`.

Compared, on a tiny Qwen2-VL with random weights, 256 questions about one picture each, of three sizes, 16 new tokens, greedy, one thread:
  lmms_N  lmms_eval 0.7.3 with `--batch_size N`, 1 being its default
  ours_N  `core.generate.generate` with batches of N, 8 being the default, every answer kept in a run folder
  loop    the processor and `generate` of transformers, one question at a time
ENV is a virtual environment with lmms_eval and the versions of other packages that it runs with:

    python3 -m venv ENV && ENV/bin/pip install lmms_eval==0.7.3 transformers==4.57.3 datasets==4.4.1 qwen-vl-utils==0.0.14 decord==0.6.0

Without `--lmms` the loop stands in for it, and no goal is looked at. The weights are the same files; where transformers 4 writes a configuration in another way than transformers 5 it is written in both. lmms_eval
passes every picture through JPEG, so the pictures are grey squares that JPEG leaves as they are. All must give the same texts before anything counts. Every run is a process of its own, in turns;
the response phase is what `generate` takes on each side, pictures and records included; the whole process, with 64 questions, is timed from outside and is no gate. Figures are of CPU seconds, which
leave out who else was busy, and what ours gains by preparing a batch while another is answered; those by the clock stand beside them.

On a GPU: `python benchmarks/answers.py --device cuda --shape qwen2-vl-7b --only ours_32`: answers and tokens a second, largest memory, share of the device's peak.
"""
import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import HERE, arguments, cpu_seconds, finish, interleaved, least, missed, now, one_thread, require, versions

one_thread()

SIZES, NEW, SYSTEM = ((112, 112), (224, 224), (448, 308)), 16, "You are a helpful assistant."


# Pictures, questions, checkpoint: files that all sides read. -----------------------------------------------------------------------------------------------------------------------------

def picture(path: Path, size: tuple[int, int], number: int) -> None:
    """Grey squares that a round trip through JPEG leaves as they are."""
    import numpy as np
    from PIL import Image
    width, height = size
    squares = np.random.default_rng(number).integers(0, 256, (-(-height // 16), -(-width // 16)), dtype=np.uint8)
    image = Image.fromarray(squares.repeat(16, 0).repeat(16, 1)[:height, :width]).convert("RGB")
    for _ in range(20):
        held = io.BytesIO()
        image.save(held, "JPEG", quality=85)
        again = Image.open(held).convert("RGB")
        if again.tobytes() == image.tobytes(): break
        image = again
    else: raise SystemExit("JPEG keeps changing a picture")
    image.save(path)


def build(folder: Path, n: int, shape: str, device: str) -> None:
    """`model/`, `images/`, `rows.json`, and for lmms_eval `peer/` and `task/`."""
    import random

    import shapes

    from vlm_repro.robointer.leaderboards import older_checkpoint
    rng, images = random.Random(0), folder / "images"
    images.mkdir(parents=True)
    rows = []
    for i in range(n):
        picture(images / f"{i:04}.png", SIZES[i % 3], i)
        question = " ".join(rng.choices(shapes.WORDS, k=rng.randint(5, 40))) + "?"
        rows.append({"id": i, "image": str(images / f"{i:04}.png"), "question": question})
    rng.shuffle(rows)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    shapes.build(folder / "model", shape, device)
    if shape == "tiny": older_checkpoint(folder / "model", folder / "peer")
    peer_task(folder / "task", rows)


TASK = """task: squares
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: "id"
generation_kwargs:
  max_new_tokens: {new}
  temperature: 0
  do_sample: false
process_results: !function utils.results
metric_list:
  - metric: length
    aggregation: mean
    higher_is_better: true
"""
UTILS = """from PIL import Image


def visual(doc): return [Image.open(doc["image"]).convert("RGB")]


def text(doc, kwargs=None): return doc["question"]


def results(doc, results): return {"length": len(results[0])}
"""


def peer_task(folder: Path, rows: list[dict[str, Any]]) -> None:
    """The questions as a task of lmms_eval."""
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (folder / "squares.yaml").write_text(TASK.format(rows=folder / "rows.jsonl", new=NEW), encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")


# The sides, each in a process of its own, which writes its answers and the seconds of its response phase. ---------------------------------------------------------------------------------------

PEER = """import json, sys, time
from lmms_eval.models.simple.qwen2_vl import Qwen2_VL
out, limit = sys.argv.pop(1), None
whole = Qwen2_VL.generate_until
def generate_until(self, requests):
    wall, cpu = time.perf_counter(), time.process_time()
    texts = whole(self, requests)
    seen = {"response_wall_s": time.perf_counter() - wall, "response_cpu_s": time.process_time() - cpu}
    ids = [self.task_dict[r.args[4]][r.args[5]][r.args[3]]["id"] for r in requests]
    json.dump({**seen, "answers": dict(zip(ids, texts))}, open(out, "w"))
    return texts
Qwen2_VL.generate_until = generate_until
from lmms_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def lmms(env: Path, folder: Path, batch: int, limit: int, out: Path) -> list[str]:
    """Its command; only the clock around its response phase is ours."""
    model = f"pretrained={folder / 'peer'},device=cpu,device_map=cpu,system_prompt={SYSTEM}"
    limits = ["--limit", str(limit)] if limit else []
    return [str(env / "bin/python"), "-c", PEER, str(out), "--model", "qwen2_vl", "--model_args", model, "--include_path", str(folder / "task"), "--tasks", "squares",
            "--batch_size", str(batch), "--log_samples", "--output_path", str(out.parent / "lmms"), *limits]


def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}, {"role": "user", "content": [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]}]


def ours(folder: Path, rows: list[dict[str, Any]], batch: int, device: str) -> dict[str, Any]:
    """`generate`, into a run folder."""
    import shapes

    from vlm_repro.core.generate import generate
    from vlm_repro.core.records import Request
    from vlm_repro.core.runs import open_run
    from vlm_repro.models.protocol import load_model
    model = load_model(str(folder / "model"), device=device)
    asked = [Request(str(r["id"]), messages(r), "ours") for r in rows]
    with tempfile.TemporaryDirectory() as held:
        run = open_run(Path(held) / "run", {"what": "a benchmark"})
        wall, cpu = time.perf_counter(), cpu_seconds()
        report = generate(model, asked, run, batch, NEW, strict=True, progress=False)
        seen = {"response_wall_s": time.perf_counter() - wall, "response_cpu_s": cpu_seconds() - cpu}
        answers = {r["id"]: r["text"] for r in run.rows("predictions")}
        seen["device"] = shapes.device_figures(model, seen["response_wall_s"], len(answers), run.rows("timings"), dict(report.accounts[0].peak))
        run.close()
    return {**seen, "answers": answers}


def loop(folder: Path, rows: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """transformers alone, one question at a time."""
    import torch
    import transformers as hf
    from PIL import Image
    processor = hf.AutoProcessor.from_pretrained(folder / "model")
    net = hf.Qwen2VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32 if device == "cpu" else torch.bfloat16).to(device).eval()
    answers, wall, cpu = {}, time.perf_counter(), cpu_seconds()
    for r in rows:
        text = processor.apply_chat_template(messages(r), add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], images=[Image.open(r["image"]).convert("RGB")], return_tensors="pt").to(device)
        with torch.inference_mode(): ids = net.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, inputs["input_ids"].shape[1]:]
        answers[str(r["id"])] = processor.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
    return {"response_wall_s": time.perf_counter() - wall, "response_cpu_s": cpu_seconds() - cpu, "answers": answers}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """What a process of ours was started for."""
    import torch
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))[:job["limit"] or None]
    return loop(folder, rows, job["device"]) if job["way"] == "loop" else ours(folder, rows, int(job["way"].partition("_")[2]), job["device"])


def child(way: str, folder: Path, options: argparse.Namespace, limit: int = 0) -> dict[str, Any]:
    """One way in a process of its own; its answers go to a file of the folder, to be compared."""
    out = folder / f"{way}{limit}.json"
    job = {"way": way, "folder": str(folder), "limit": limit, "device": options.device}
    command = lmms(options.lmms, folder, int(way.partition("_")[2]), limit, out) if way.startswith("lmms") else [sys.executable, __file__, "--job", json.dumps(job), "--out", str(out)]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})}
    done = subprocess.run(command, capture_output=True, text=True, env={k: v for k, v in env.items() if k != "PYTHONPATH"} | {"HF_HOME": str(folder / "hub")}, cwd=folder)
    if done.returncode or not out.exists(): raise SystemExit(f"{way} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(out.read_text(encoding="utf-8"))


def compare(folder: Path, ways: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Every way once; all must give the same texts."""
    held = {way: {k: v.strip() for k, v in child(way, folder, options)["answers"].items()} for way in ways}
    other = {way: sum(texts[k] != held[ways[0]][k] for k in texts) for way, texts in held.items()}
    require(not any(other.values()) and len({len(t) for t in held.values()}) == 1, f"answers that differ from those of {ways[0]}: {other}")
    return {"answers": len(held[ways[0]]), "different_texts": len(set(held[ways[0]].values())), "that_differ": other}


def figures_of(rounds: list[dict[str, Any]], whole: list[dict[str, Any]], peer: str, kind: str = "cpu") -> dict[str, float]:
    """Ratios of least seconds, of CPU or by the clock (`wall`): the response phase of the best of ours, and whole processes."""
    best = lambda side: min(least(rounds, way, f"response_{kind}_s") for way in rounds[0] if way.startswith(side))
    total = lambda side: min(least(whole, way, f"{kind}_s") for way in whole[0] if way.startswith(side))
    first = "lmms_1" if peer == "lmms" else "loop"
    return {"against_default": least(rounds, first, f"response_{kind}_s") / best("ours"), "against_best": best(peer) / best("ours"), "whole_process_64": total(peer) / total("ours")}


def profile(n: int = 64) -> dict[str, Any]:
    """Where a whole process of ours spends its time: the slowest imports, and the response phase."""
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held) / "set"
        build(folder, n, "tiny", "cpu")
        job, out, start = {"way": "ours_32", "folder": str(folder), "limit": 0, "device": "cpu"}, folder / "out.json", time.perf_counter()
        said = subprocess.run([sys.executable, "-X", "importtime", __file__, "--job", json.dumps(job), "--out", str(out)], capture_output=True, text=True, check=True).stderr
        rows = [line.removeprefix("import time:").split("|") for line in said.splitlines() if line.startswith("import time:") and "cumulative" not in line]
        slow = sorted(rows, key=lambda row: -int(row[1]))[:15]
        return {"whole_s": time.perf_counter() - start, "response_s": json.loads(out.read_text())["response_wall_s"], "imports_ms": {name.strip(): int(total) / 1000 for _, total, name in slow}}


def recount(path: Path) -> None:
    """Figures and missed goals of a result file anew, from the seconds it holds."""
    held = json.loads(path.read_text(encoding="utf-8"))
    held["figures"], held["by_the_clock"] = (figures_of(held["rounds"], held["whole"], held["peer"], kind) for kind in ("cpu", "wall"))
    held["missed"] = missed("C1", held["figures"])
    held["profile"] = profile() if held["missed"] else "no goal was missed"
    path.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"id": "C1", "figures": held["figures"], "missed": held["missed"]}))


def parsed() -> argparse.Namespace:
    parser = arguments("Time answers to questions about pictures.", rounds=3)
    parser.add_argument("--lmms", type=Path, help="a virtual environment with lmms_eval")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", default="tiny", help="see shapes.py")
    parser.add_argument("--only", nargs="*", default=[], help="these ways alone, with no figure and no goal")
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 16, 32], help="batch sizes beside 1 for lmms_eval")
    parser.add_argument("--recount", action="store_true", help="measure nothing; figures of the file --out anew, from its seconds")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def slim(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{way: {k: v for k, v in seen.items() if k != "answers"} for way, seen in row.items()} for row in rounds]


def main() -> None:
    options, begun = parsed(), now()
    if options.recount: return recount(options.out)
    if options.job: return options.out.write_text(json.dumps(run_job(options.job)), encoding="utf-8") and None
    n, short = (9, 6) if options.quick else (256, 64)
    sizes = [2] if options.quick else options.batches
    peer = "lmms" if options.lmms else "loop"
    ways = options.only or [*([f"lmms_{b}" for b in [1, *sizes]] if options.lmms else []), *(f"ours_{b}" for b in sizes), *([] if options.lmms else ["loop"])]
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held) / "set"
        build(folder, n, options.shape, options.device)
        equal = compare(folder, ways, options)
        rounds = slim(interleaved({w: lambda w=w: child(w, folder, options) for w in ways}, 1 if options.quick else options.rounds, f"{n} questions"))
        if options.only:
            print(json.dumps({"id": "C1", "device": {w: rounds[0][w].get("device") for w in ways}, "seconds": {w: least(rounds, w, "response_wall_s") for w in ways}}))
            return options.out and options.out.write_text(json.dumps({"id": "C1", "only": ways, "shape": options.shape, "equal": equal, "rounds": rounds}, indent=1) + "\n", encoding="utf-8") and None
        fast = [w for w in ways if w in ("loop", f"lmms_{sizes[-1]}", f"ours_{sizes[-1]}")]
        whole = slim(interleaved({w: lambda w=w: child(w, folder, options, short) for w in fast}, 1 if options.quick else options.rounds, f"{short} questions"))
    finish("C1", options, begun, figures_of(rounds, whole, peer), profile, versions=versions("torch", "transformers") | peer_versions(options.lmms),
           sizes={"questions": n, "pictures": SIZES, "new_tokens": NEW, "whole_process": short, "shape": options.shape}, equal=equal, peer=peer, rounds=rounds,
           whole=whole, by_the_clock=figures_of(rounds, whole, peer, "wall"))


def peer_versions(env: Path | None) -> dict[str, str]:
    """What stands in the other environment."""
    if not env: return {}
    code = "import importlib.metadata as m, json; print(json.dumps({p: m.version(p) for p in ('lmms_eval', 'transformers', 'torch', 'datasets', 'qwen-vl-utils')}))"
    return {f"lmms_eval: {k}": v for k, v in json.loads(subprocess.run([str(env / "bin/python"), "-c", code], capture_output=True, text=True, check=True).stdout).items()}


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
