"""Build the documentation site into `_docs/`, then check its links and outputs.

nbdev stages the notebooks of `nbs/` with the API entries of what they export; the paper notebooks join them as they are committed, outputs and all.
Quarto renders where it is installed, smalldocs otherwise.
"""
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from check_site import check_site, notebooks
from nbdev.processors import FilterDefaults, exec_show_docs
from nbdev.quarto_render import render_quarto
from nbdev.serve_drv import exec_nb

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_docs"
STAGED = ROOT / "_proc"


def import_types(cell) -> None:
    """Make an import for type checkers a real one, so that the API entries can resolve the annotations that use it."""
    if cell.cell_type == "code" and "if TYPE_CHECKING:" in (cell.source or ""):
        cell.source = cell.source.replace("if TYPE_CHECKING:", "if True:")


def drop_output_file(cell) -> None:
    """Leave a page's file name to the notebook's: nbdev sets the same one, and smalldocs warns of the setting."""
    if cell.cell_type == "raw":
        cell.source = re.sub(r"^output-file:.*\n", "", cell.source, flags=re.MULTILINE)


class DocsFilter(FilterDefaults):
    """nbdev's own processors, with the imports for type checkers resolved before the API entries are made."""

    def base_procs(self) -> list:
        """The processors in the order they run."""
        procs = super().base_procs()
        procs.insert(procs.index(exec_show_docs), import_types)
        return [*procs, drop_output_file]


def stage() -> None:
    """Process the notebooks of the package and of the papers into a project that can be rendered."""
    shutil.rmtree(STAGED, ignore_errors=True)
    warnings.simplefilter("ignore")  # a warning raised while an API entry is made would be printed on its page
    for page, notebook in notebooks(ROOT).items():
        target = (STAGED / page).with_suffix(".ipynb")
        target.parent.mkdir(parents=True, exist_ok=True)
        exec_nb(notebook, target, DocsFilter)
    for name in ("_quarto.yml", "styles.css"):
        shutil.copy2(ROOT / "nbs" / name, STAGED)


def render() -> Path:
    """Render the staged project; the folder of its HTML."""
    built = STAGED / "_docs"
    if shutil.which("quarto"):
        render_quarto(STAGED, built, n_workers=2)
    else:
        subprocess.run([str(Path(sys.executable).with_name("smalldocs")), "render", "--strict", str(STAGED)], check=True)
    return built


def main() -> int:
    """Stage, render, move to `_docs/`, check; 1 when there is a problem."""
    stage()
    built = render()
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(built, SITE)
    problems = check_site(SITE, ROOT)
    print(*problems, sep="\n")
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}/; {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
