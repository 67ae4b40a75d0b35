"""Print the result table of a finished run, and where its report is."""
import sys
from pathlib import Path

from vlm_repro.cli_run import closing


def main(folder: str) -> int:
    """Print what `vlm-repro run` prints at its end; 1 when the run did not finish."""
    if not Path(folder, "manifest.json").is_file():
        print(f"{folder}: no manifest.json, so this run did not finish; run it again and it goes on where it stopped", file=sys.stderr)
        return 1
    print(closing(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
