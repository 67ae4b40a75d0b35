"""Execute notebooks in place, export them where they hold package code, and clean their metadata."""
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.export import nb_export

ROOT = Path(__file__).resolve().parent.parent


def settle(text: str) -> str:
    """What a terminal shows in the end: of each line that was drawn over and over, the last drawing."""
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))


def fold_progress(notebook: nbformat.NotebookNode) -> None:
    """Join the pieces of each stream and keep progress bars as they ended."""
    for cell in notebook.cells:
        outputs: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            last = outputs[-1] if outputs else None
            if last and last.output_type == output.output_type == "stream" and last.name == output.name:
                last.text += output.text
            else:
                outputs.append(output)
        for output in outputs:
            if output.output_type == "stream":
                output.text = settle(output.text)
        if cell.cell_type == "code":
            cell.outputs = outputs


def refresh(path: Path) -> None:
    """Execute one notebook where it lies, keep its new outputs, export and clean it."""
    notebook = nbformat.read(path, as_version=4)
    if path.is_relative_to(ROOT / "nbs"):
        nb_export(path, ROOT / "vlm_repro")
    # A paper's notebook runs from the top of the repository, as papermill runs it.
    folder = ROOT if path.parent == ROOT / "papers" else path.parent
    NotebookClient(notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    fold_progress(notebook)
    nbformat.write(notebook, path)
    nbdev_clean(fname=str(path))
    subprocess.run(["git", "diff", "--stat", "--", str(path)], cwd=ROOT, check=False)


def main(names: list[str]) -> int:
    """Refresh every notebook named on the command line."""
    for name in names:
        path = Path(name).resolve()
        if path.suffix != ".ipynb" or not path.is_file():
            print(f"{name}: no such notebook", file=sys.stderr)
            return 2
        refresh(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
