"""Build the documentation site into `_docs/`, then check its links and outputs.

nbdev stages the notebooks of `nbs/` with the API entries of what they export; the paper notebooks join them as they are committed, outputs and all.
Quarto renders where it is installed, smalldocs otherwise.
"""
import shutil
import subprocess
import sys
from pathlib import Path

from check_site import check_site
from nbdev.processors import FilterDefaults
from nbdev.quarto_render import render_quarto
from nbdev.serve import proc_nbs
from nbdev.serve_drv import exec_nb

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_docs"


def stage() -> Path:
    """Process the notebooks and the papers for rendering; the folder that holds the result."""
    folder = proc_nbs(ROOT / "nbs", n_workers=2, force=True)
    shutil.copy2(ROOT / "nbs" / "_quarto.yml", folder)
    papers = folder / "papers"
    papers.mkdir(exist_ok=True)
    for notebook in sorted((ROOT / "papers").glob("*.ipynb")):
        exec_nb(notebook, papers / notebook.name, FilterDefaults)
    return folder


def render(folder: Path) -> Path:
    """Render the staged project; the folder of its HTML."""
    built = folder / "_docs"
    shutil.rmtree(built, ignore_errors=True)
    if shutil.which("quarto"):
        render_quarto(folder, built, n_workers=2)
    else:
        subprocess.run([str(Path(sys.executable).with_name("smalldocs")), "render", "--strict", str(folder)], check=True)
    return built


def main() -> int:
    """Stage, render, move to `_docs/`, check; the number of problems, at most 1."""
    built = render(stage())
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(built, SITE)
    problems = check_site(SITE, ROOT)
    print(*problems, sep="\n")
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}/; {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
