"""The same epoch by other programs: `python benchmarks/train_peers.py --llamafactory ENV --swift ENV [--out benchmarks/results/train_peers.json]`.

ENV is a virtual environment with that program in it and nothing of this package:

    python3 -m venv lf && lf/bin/pip install llamafactory==0.9.5
    python3 -m venv sw && sw/bin/pip install ms-swift==4.6.0 qwen_vl_utils

Model, conversations, adapters, batch, learning rate, precision and number of epochs are those of train.py; order, packing, optimizer details and which template tokens are supervised are each
program's own, so no equality is asserted, and nothing here is a gate. Figures are of whole processes, start-up included: CPU seconds of the process and its children, wall seconds, largest
resident size; `epoch_wall_s` is what each program itself reports for its training loop. A program that does not run leaves the end of what it said.

`--table` writes the second table of benchmarks/README.md from the results.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import train  # sets the number of threads

HERE, LEARNING_RATE, RANK, ALPHA = Path(__file__).resolve().parent, 1e-4, 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def sharegpt(folder: Path) -> list[dict[str, Any]]:
    """The conversations in the form that both programs read."""
    from train_data import conversations
    return [{"messages": [{"role": "user", "content": "<image>" * len(c["images"]) + c["question"]}, {"role": "assistant", "content": c["answer"]}], "images": c["images"]} for c in conversations(folder)]


def llamafactory(env: Path, folder: Path, out: Path, batch: int) -> list[str]:
    """Its data and configuration files, and the command."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    (out / "skewed.json").write_text(json.dumps(sharegpt(folder)))
    (out / "dataset_info.json").write_text(json.dumps({"skewed": {"file_name": "skewed.json", "formatting": "sharegpt", "columns": {"messages": "messages", "images": "images"}, "tags": tags}}))
    config = {
        "model_name_or_path": str(folder / "model"), "template": "qwen2_vl", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_target": ",".join(TARGETS),
        "dataset": "skewed", "dataset_dir": str(out), "cutoff_len": 2048, "output_dir": str(out / "run"), "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1,
        "learning_rate": LEARNING_RATE, "num_train_epochs": 1, "lr_scheduler_type": "cosine", "bf16": False, "disable_gradient_checkpointing": True, "save_strategy": "no", "report_to": "none",
        "logging_steps": 10, "use_cpu": True, "dataloader_num_workers": 0, "preprocessing_num_workers": 1, "infer_dtype": "float32"}
    (out / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return [str(env / "bin/llamafactory-cli"), "train", str(out / "config.yaml")]


def swift(env: Path, folder: Path, out: Path, batch: int) -> list[str]:
    """Its data file, and the command."""
    (out / "skewed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sharegpt(folder)))
    named = {
        "model": folder / "model", "model_type": "qwen2_vl", "template": "qwen2_vl", "dataset": out / "skewed.jsonl", "tuner_type": "lora", "torch_dtype": "float32", "lora_rank": RANK,
        "lora_alpha": ALPHA, "freeze_vit": "true", "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "learning_rate": LEARNING_RATE, "num_train_epochs": 1,
        "max_length": 2048, "gradient_checkpointing": "false", "vit_gradient_checkpointing": "false", "save_strategy": "no", "eval_strategy": "no", "split_dataset_ratio": 0, "logging_steps": 10, "use_cpu": "true",
        "report_to": "none", "output_dir": out / "run", "dataloader_num_workers": 0, "dataset_num_proc": 1, "bf16": "false", "fp16": "false", "load_from_cache_file": "false"}
    return [str(env / "bin/swift"), "sft", *(str(x) for k, v in named.items() for x in (f"--{k}", v)), "--target_modules", *TARGETS]


def ours(env: Path, folder: Path, out: Path, batch: int) -> list[str]:
    """`fine_tune`, in a process of its own."""
    return [sys.executable, str(HERE / "train.py"), "--job", json.dumps({"do": "ours", "folder": str(folder), "batch": batch}), "--out", str(out / "answer.json")]


PEERS: dict[str, Callable[[Path, Path, Path, int], list[str]]] = {"ours": ours, "llamafactory": llamafactory, "swift": swift}


def reported(out: Path, said: str) -> float | None:
    """Seconds of the training loop, as the program says."""
    if (out / "answer.json").exists(): return json.loads((out / "answer.json").read_text())["epoch_wall_s"]
    found = re.findall(r"train_runtime\W+([\d:.]+)", said)
    return sum(float(part) * 60**k for k, part in enumerate(reversed(found[-1].rstrip(".").split(":")))) if found else None


def clean(said: str) -> str:
    """The end of an output, without the folders of this machine."""
    lines = [row.rsplit("\r", 1)[-1] for row in said.splitlines()]
    return "\n".join(re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", ".../", row) for row in lines[-12:])


def run(name: str, env: Path, folder: Path, batch: int, limit: float) -> dict[str, Any]:
    """One program, once."""
    with tempfile.TemporaryDirectory() as held:
        out = Path(held)
        command = PEERS[name](env, folder, out, batch)
        env_vars = {**os.environ, "HF_HOME": str(out / "cache"), "MODELSCOPE_CACHE": str(out / "cache"), "HF_DATASETS_OFFLINE": "1", "DISABLE_VERSION_CHECK": "1", "USE_MODELSCOPE_HUB": "0", "USE_HF": "1"}
        load, begun = os.getloadavg(), time.perf_counter()
        with open(out / "said.txt", "w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env_vars, cwd=out)
            usage = waited(process, begun + limit)
        text = (out / "said.txt").read_text(errors="replace")
        seen = {"wall_s": time.perf_counter() - begun, "load_before": load, "exit": process.returncode}
        if process.returncode or usage is None: return {**seen, "stopped_by": clean(text) or f"no end within {limit:.0f} s"}
        return {**seen, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024, "epoch_wall_s": reported(out, text)}


def waited(process: subprocess.Popen, until: float) -> Any:
    """What a process used; None, and its end, if it is not done in time."""
    while time.perf_counter() < until:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage
        time.sleep(0.1)
    process.kill()
    process.wait()
    return None


def versions_in(env: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of packages in another environment."""
    code = "import sys, json\nfrom importlib.metadata import version\nprint(json.dumps({p: version(p) for p in sys.argv[1:]}))"
    return json.loads(subprocess.run([str(env / "bin/python"), "-c", code, *packages], capture_output=True, text=True, check=True).stdout)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every program that an environment was named for, in rounds."""
    from train_data import build
    sizes, here = train.sizes_of(options.size), Path(sys.prefix)
    envs = {"ours": here, **{name: getattr(options, name).absolute() for name in ("llamafactory", "swift") if getattr(options, name)}}
    names = {"ours": "vlm_repro", "llamafactory": "llamafactory", "swift": "ms_swift"}
    held: dict[str, Any] = {
        "what": "the same epoch by other programs; whole processes", "command": " ".join(["python benchmarks/train_peers.py", *(f"--{n} ENV" for n in envs if n != "ours"), *(["--size", *options.size] if options.size else [])]),
        "begun": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": train.machine(), "sizes": asdict(sizes), "batch": options.batch,
        "versions": {n: versions_in(e, (names[n], "torch", "transformers", "peft", "accelerate")) for n, e in envs.items()}, "rounds": []}
    with tempfile.TemporaryDirectory() as data:
        folder = Path(data) / "set"
        build(folder, sizes)
        for k in range(options.rounds):
            row: dict[str, Any] = {}
            held["rounds"].append(row)
            for name in (list(envs) if k % 2 == 0 else list(envs)[::-1]):
                row[name] = run(name, envs[name], folder, options.batch, options.limit)
                print(f"round {k + 1}  {name:13}", json.dumps(row[name])[:3000], flush=True)
                if options.out: options.out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    return held


def table(held: dict[str, Any]) -> str:
    """The results as Markdown."""
    def cell(name: str, key: str, scale: float = 1, digits: int = 1) -> str:
        found = [r[name][key] * scale for r in held["rounds"] if r.get(name, {}).get(key) is not None]
        return f"{median(found):,.{digits}f}" if found else "–"
    rows = [[f"{name} {held['versions'][name][p]}", held["versions"][name]["transformers"], cell(name, "cpu_s"), cell(name, "wall_s"), cell(name, "epoch_wall_s"), cell(name, "peak_bytes", 2**-20, 0)]
            for name, p in (("ours", "vlm_repro"), ("llamafactory", "llamafactory"), ("swift", "ms_swift")) if name in held["versions"]]
    head = ["", "transformers", "CPU s", "wall s", "of it training, as reported", "largest resident size, MiB"]
    line = lambda cells: "| " + " | ".join(cells) + " |"
    stopped = [f"\n{name} did not run to its end; what it said is in the results." for name in held["versions"] if any("stopped_by" in r.get(name, {}) for r in held["rounds"])]
    loads = [r[n]["load_before"][0] for r in held["rounds"] for n in r if "load_before" in r[n]]
    about = f"{held['sizes']['examples']} conversations, {held['batch']} a step; {held['begun'][:10]}, load average {min(loads):.1f} to {max(loads):.1f}, rounds: {len(held['rounds'])}."
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows), *stopped, "", about, "", f"    {held['command']}"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the epoch of train.py in other programs.")
    parser.add_argument("--llamafactory", type=Path, help="an environment with llamafactory")
    parser.add_argument("--swift", type=Path, help="an environment with ms-swift")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--limit", type=float, default=900, help="seconds after which a program is ended")
    parser.add_argument("--size", nargs="*", default=[], metavar="NAME=VALUE", help="what differs from the sizes in train_data.py")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--table", action="store_true", help="write the table of benchmarks/README.md from benchmarks/results/train_peers.json")
    options = parser.parse_args()
    if not options.table: return measure(options) and None
    page, text = HERE / "README.md", table(json.loads((HERE / "results" / "train_peers.json").read_text(encoding="utf-8")))
    train.put(page, "peers", text)
    print(text)


if __name__ == "__main__":
    main()
