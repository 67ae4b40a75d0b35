"""Build the documentation site into `_docs/`, then check its links and outputs.

nbdev stages the notebooks of `nbs/` with the API entries of what they export; the paper notebooks join them as they are committed, outputs and all.
Quarto renders where it is installed, smalldocs otherwise.
"""
import ast
import json
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
from outputs import joined, settled, split_title

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_docs"
STAGED = ROOT / "_proc"
EXPORTS = {"export", "exports", "exporti", "exec_doc"}


def import_types(cell) -> None:
    """Make an import for type checkers a real one, so that the API entries can resolve the annotations that use it."""
    if cell.cell_type == "code" and "if TYPE_CHECKING:" in (cell.source or ""):
        cell.source = cell.source.replace("if TYPE_CHECKING:", "if True:")


def drop_output_file(cell) -> None:
    """Leave a page's file name to the notebook's: nbdev sets the same one, and smalldocs warns of the setting."""
    if cell.cell_type == "raw":
        cell.source = re.sub(r"^output-file:.*\n", "", cell.source, flags=re.MULTILINE)


def imports_of(source: str) -> str:
    """The imports at the top level of a cell, without what else it does."""
    return "\n".join(ast.unparse(node) for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom)))


class ApiEntries(exec_show_docs):
    """nbdev's maker of API entries, which runs exported cells and imports; of a lesson that also imports it runs the imports alone."""

    def __call__(self, cell) -> None:
        """Run what the entries need of one cell."""
        lesson = cell.cell_type == "code" and not cell.directives_.keys() & EXPORTS and "show_doc(" not in (cell.source or "")
        if not lesson:
            super().__call__(cell)
        elif self.nb.has_docs_ and re.search(r"^(?:import|from) ", cell.source or "", flags=re.MULTILINE):
            self.k.run_cell(imports_of(re.sub(r"^[%!].*$", "", cell.source, flags=re.MULTILINE)))


class DocsFilter(FilterDefaults):
    """nbdev's own processors, with the imports for type checkers resolved before the API entries are made."""

    def base_procs(self) -> list:
        """The processors in the order they run."""
        procs = super().base_procs()
        at = procs.index(exec_show_docs)
        procs[at:at + 1] = [import_types, ApiEntries]
        return [*procs, drop_output_file]


def prepared(notebook: dict) -> dict:
    """A notebook with its outputs settled and the prose of its title cell in a cell of its own."""
    cells: list[dict] = []
    for cell in notebook["cells"]:
        title, rest = split_title(joined(cell["source"])) if cell["cell_type"] == "markdown" and not cells[1:] else ("", "")
        settle = {"outputs": settled(cell["outputs"])} if "outputs" in cell else {}
        cells.append({**cell, **({"source": title} if rest else {}), **settle})
        if rest:
            cells.append({"cell_type": "markdown", "metadata": {}, "source": rest, "id": f"{cell.get('id', 'title')}-rest"})
    return {**notebook, "cells": cells}


def process(notebook: Path, target: Path) -> None:
    """Write one notebook as the renderer gets it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(prepared(json.loads(notebook.read_text(encoding="utf-8")))), encoding="utf-8")
    exec_nb(target, target, DocsFilter)


def stage() -> None:
    """Process the notebooks of the package and of the papers into a project that can be rendered."""
    shutil.rmtree(STAGED, ignore_errors=True)
    warnings.simplefilter("ignore")  # a warning raised while an API entry is made would be printed on its page
    for page, notebook in notebooks(ROOT).items():
        process(notebook, (STAGED / page).with_suffix(".ipynb"))
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
