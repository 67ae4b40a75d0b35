"""Cold start: `python benchmarks/startup.py [--root DATA] [--out benchmarks/results/startup.json]`.

Whole processes, in turns:
  floor    the interpreter that does nothing
  help     `vlm-repro --help`
  check    `vlm-repro data check mmwalk --root DATA`: DATA is the folder with the released annotations (train, val and test of mmWalk), by default `shared/data/mmwalk` beside the repository
  torch    `import torch`, which the first two must do without
What `check` prints must begin with `passed`. Wall seconds, the least of the rounds, are what a user waits; CPU seconds stand beside them.
"""
import argparse
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import HERE, arguments, finish, interleaved, least, now, one_thread, require, versions

one_thread()

DATA = HERE.parent.parent / "shared" / "data" / "mmwalk"
PROGRAM = Path(sysconfig.get_path("scripts")) / "vlm-repro"
HEAVY = ("torch", "transformers", "pandas", "matplotlib")


def command_of(*words: str) -> list[str]:
    """The installed program where there is one, else the module behind it."""
    return [str(PROGRAM), *words] if PROGRAM.is_file() else [sys.executable, "-c", "import sys; from vlm_repro.cli import main; sys.exit(main())", *words]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def loaded_by(words: list[str]) -> list[str]:
    """Which heavy packages a command imports."""
    code = f"import sys\nfrom vlm_repro.cli import main\nmain({words!r})\nprint('loaded', *(m for m in {HEAVY!r} if m in sys.modules))"
    return run([sys.executable, "-c", code]).splitlines()[-1].split()[1:]


def profile(words: list[str]) -> dict[str, Any]:
    """The slowest imports and functions of a command."""
    def imports() -> list[str]:
        said = subprocess.run([sys.executable, "-X", "importtime", "-c", f"from vlm_repro.cli import main; main({words!r})"], capture_output=True, text=True).stderr
        rows = [line.removeprefix("import time:").split("|") for line in said.splitlines() if line.startswith("import time:") and "self" not in line]
        return [f"{int(total) / 1000:.1f} ms {name.strip()}" for _, total, name in sorted(rows, key=lambda row: -int(row[1]))[:15]]

    def calls() -> list[dict[str, Any]]:
        code = f"import json, sys; sys.path.insert(0, {str(HERE)!r}); from bench import hot_spots; from vlm_repro.cli import main; print(json.dumps(hot_spots(lambda: main({words!r}))))"
        import json
        return json.loads(run([sys.executable, "-c", code]).splitlines()[-1])
    return {"imports": imports(), "functions": calls()}


def ways_of(root: Path | None) -> dict[str, Callable[[], Any]]:
    ways = {"floor": lambda: run([sys.executable, "-c", "pass"]), "help": lambda: run(command_of("--help")), "torch": lambda: run([sys.executable, "-c", "import torch"])}
    return ways | ({"check": lambda: run(command_of("data", "check", "mmwalk", "--root", str(root)))} if root else {})


def parsed() -> argparse.Namespace:
    parser = arguments("Time the start of the command line.", rounds=9)
    parser.add_argument("--root", type=Path, default=DATA, help="the released annotations of mmWalk")
    return parser.parse_args()


def main() -> None:
    options, begun = parsed(), now()
    words = ["data", "check", "mmwalk", "--root", str(options.root)]
    said = run(command_of(*words))
    require(said.startswith("passed"), f"`data check` says: {said.splitlines()[0]}")
    heavy = {"help": loaded_by(["--help"]), "check": loaded_by(words)}
    require(not any(heavy.values()), f"heavy packages are loaded: {heavy}")
    rounds = interleaved(ways_of(options.root), 1 if options.quick else options.rounds, "start")
    figures = {"help_s": least(rounds, "help"), "check_s": least(rounds, "check"), "help_against_torch": least(rounds, "torch") / least(rounds, "help")}
    finish("C7", options, begun, figures, lambda: {"help": profile(["--help"]), "check": profile(words)}, versions=versions("typer", "torch"),
           equal={"check": said.splitlines()[0], "heavy": heavy}, rounds=rounds)


if __name__ == "__main__":
    main()
