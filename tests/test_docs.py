"""README.md and the site say what the notebooks say, and the site's own checker sees what is broken."""
import ast
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from check_site import Bases, check_site, link_problems, notebooks, output_problems, read_page, squeeze
from outputs import settled, split_title
from readme import INDEX, NOTE, cell_text, readme_text

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(notebooks(ROOT).values())
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:work|tmp|root|home)/\w")
MEGABYTE = 1_000_000


def cells(path: Path) -> list[dict]:
    """The cells of a notebook."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    """The source of a cell as one string."""
    return "".join(cell["source"])


# ---------------------------------------------------------------- README


def test_readme_is_what_the_index_notebook_says():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme_text()


def test_readme_starts_with_the_title_and_says_where_it_comes_from():
    text = readme_text(INDEX)
    assert text.startswith("# vlm_repro\n") and NOTE in text


def test_readme_links_notebooks_to_their_published_pages():
    cell = {"cell_type": "markdown", "source": ["[a](core/runs.ipynb) [b](x.ipynb#part) [c](https://example.org/y.ipynb)"]}
    assert cell_text(cell, "https://docs/") == "[a](https://docs/core/runs.html) [b](https://docs/x.html#part) [c](https://example.org/y.ipynb)"


def test_readme_leaves_out_hidden_cells_and_shows_outputs():
    hidden = {"cell_type": "code", "source": ["#| hide\n", "1"], "outputs": []}
    shown = {"cell_type": "code", "source": ["1 + 1"], "outputs": [{"output_type": "execute_result", "data": {"text/plain": ["2"]}}]}
    assert cell_text(hidden, "") == ""
    assert cell_text(shown, "") == "```python\n1 + 1\n```\n\n```text\n2\n```"


def test_every_make_target_that_the_prose_names_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    prose = readme_text() + (ROOT / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", prose, flags=re.MULTILINE))
    assert named and named <= targets, f"no such target: {named - targets}"


def test_the_workflows_and_the_ci_script_run_make_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    flows = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))]
    jobs = [job for flow in flows for job in flow["jobs"].values()]
    lanes = {lane for job in jobs for lane in job.get("strategy", {}).get("matrix", {}).get("lane", [])}
    steps = [step["run"] for job in jobs for step in job["steps"] if "run" in step] + [(ROOT / ".ci" / "run").read_text().split("exec ")[-1]]
    named = {match[1] for step in steps if (match := re.match(r"make ([a-z-]+)", step))} | lanes
    assert {"test", "docs", "test-papers", "test-servers"} <= named <= targets


# ---------------------------------------------------------------- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_notebook_is_fit_to_publish(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < MEGABYTE, "a notebook stays under 1 MB with its outputs"
    assert json.loads(text)["metadata"]["kernelspec"]["name"] == "python3", "papermill and nbclient take the kernel from the notebook"
    assert not MACHINE_PATH.findall(text), "a path of the machine it was made on"
    assert not re.findall(r" at 0x[0-9a-f]{6,}>", text), "an address in memory, another one in every run"
    title = next(source(cell) for cell in cells(path) if cell["cell_type"] == "markdown")
    assert re.match(r"# \S.*\n+> \S", title), "the first markdown cell is a title and a one-line description"
    outputs = [output for cell in cells(path) for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert outputs or path == INDEX, "notebooks are committed with their outputs"


def unused_context_managers(code: str) -> list[str]:
    """The lines that call `expect_fail` without entering it: what they name is never run."""
    tree = ast.parse(re.sub(r"^[%!].*$", "pass", code, flags=re.MULTILINE))
    entered = {id(item.context_expr) for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "expect_fail"]
    return [ast.unparse(node) for node in calls if id(node) not in entered]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_lesson_that_expects_a_failure_runs_what_should_fail(path):
    code = [source(cell) for cell in cells(path) if cell["cell_type"] == "code"]
    assert [line for text in code for line in unused_context_managers(text)] == [], "write: with expect_fail(Error, 'words'): call()"


def test_the_check_for_unused_context_managers_sees_them():
    assert unused_context_managers("expect_fail(lambda: f(), ValueError)") == ["expect_fail(lambda: f(), ValueError)"]
    assert unused_context_managers("%matplotlib inline\nwith expect_fail(ValueError): f()") == []


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.is_relative_to(ROOT / "nbs")], ids=lambda path: path.relative_to(ROOT / "nbs").as_posix())
def test_a_notebook_exports_to_the_module_of_its_own_path(path):
    exports = [match[1] for cell in cells(path) if (match := re.search(r"^#\|\s*default_exp\s+(\S+)", source(cell), flags=re.MULTILINE))]
    assert exports in ([], [".".join(path.relative_to(ROOT / "nbs").with_suffix("").parts)])


def test_the_defects_page_shows_every_row_of_every_table():
    page = (ROOT / "nbs" / "defects.ipynb").read_text(encoding="utf-8")
    tables = sorted((ROOT / "vlm_repro" / "assets").glob("*/defects.csv"))
    ids = [row["id"] for table in tables for row in csv.DictReader(table.open(encoding="utf-8", newline=""))]
    assert ids and [name for name in ids if name not in page] == [], "run make nb NB=nbs/defects.ipynb"


def test_the_tests_that_the_defect_tables_name_exist():
    suite = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    tables = sorted((ROOT / "vlm_repro" / "assets").glob("*/defects.csv"))
    named = {row["test"] for table in tables for row in csv.DictReader(table.open(encoding="utf-8", newline=""))}
    names = {name for cell in named for name in re.findall(r"\btest_\w+", cell)}
    missing = [name for name in names if f"def {name}(" not in suite and not (ROOT / "tests" / f"{name}.py").exists()]
    assert names and missing == []


# ---------------------------------------------------------------- the checker


@pytest.fixture
def site(tmp_path) -> Bases:
    """A site of two pages with one link of every kind, all of them good."""
    (tmp_path / "site" / "core").mkdir(parents=True)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "there.py").touch()
    (tmp_path / "site" / "core" / "b.html").write_text('<h2 id="part">Part</h2><a href="../index.html">up</a>')
    good = ["core/b.html", "core/b.html#part", "https://site/core/b.html#part", "https://repo/blob/main/there.py#L3", "https://elsewhere/", "mailto:a@b", "#top"]
    (tmp_path / "site" / "index.html").write_text('<p id="top">' + "".join(f'<a href="{link}">x</a>' for link in good))
    return Bases(tmp_path / "site", tmp_path / "root", "https://site/", "https://repo/blob/main/")


def problems(site: Bases) -> list[str]:
    """What the checker says of the links of a site."""
    return link_problems({path.relative_to(site.site).as_posix(): read_page(path.read_text()) for path in site.site.rglob("*.html")}, site)


def test_the_checker_passes_good_links(site):
    assert problems(site) == []


@pytest.mark.parametrize("link, why", [
    ("core/c.html", "no page core/c.html"),
    ("core/b.html#other", "no anchor #other"),
    ("https://site/gone.html", "no page gone.html"),
    ("https://repo/blob/main/gone.py#L1", "no file gone.py"),
    ("#nowhere", "no anchor #nowhere"),
    ("core/", "no page core/index.html"),
])
def test_the_checker_sees_a_broken_link(site, link, why):
    page = site.site / "index.html"
    page.write_text(page.read_text() + f'<a href="{link}">x</a>')
    assert len(problems(site)) == 1 and why in problems(site)[0]


def test_the_checker_sees_a_broken_image(site):
    page = site.site / "core" / "b.html"
    page.write_text(page.read_text() + '<img src="gone.png">')
    assert "no page core/gone.png" in problems(site)[0]


def test_an_empty_site_is_a_problem(site):
    assert link_problems({}, site) == ["the site has no pages"]


def notebook(tmp_path: Path, outputs: list[dict], code: str = "table") -> Path:
    """A notebook of one code cell with these outputs."""
    path = tmp_path / "page.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": code, "outputs": outputs}]}))
    return path


HTML = {"output_type": "execute_result", "data": {"text/html": ["<table><tr><td>41.5</td><td>close</td></tr></table>"], "text/plain": ["41.5 close"]}}
PRINTED = {"output_type": "stream", "name": "stdout", "text": ["made 12 calls\n"]}
PICTURE = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo=", "text/plain": ["<Figure>"]}}
MARKDOWN = {"output_type": "execute_result", "data": {"text/markdown": ["**E1**, 41.5\n\n| a |\n|---|\n| `b` |"], "text/plain": ["<Markdown>"]}}
FRAME = {"output_type": "display_data", "data": {"text/html": ['<iframe srcdoc="a"></iframe>'], "text/plain": ["<Browser>"]}}


@pytest.mark.parametrize("output, good", [
    (HTML, "<div><table><tr><td>41.5</td> <td>close</td></tr></table></div>"),
    (PRINTED, "<pre><code>made 12\ncalls</code></pre>"),
    (PICTURE, '<img src="data:image/png;base64,iVBORw0KGgo=">'),
    (FRAME, '<iframe srcdoc="a"></iframe>'),
    (MARKDOWN, "<p><strong>E1</strong>, 41.5</p><table><tr><th>a</th></tr><tr><td><code>b</code></td></tr></table>"),
], ids=["table", "stream", "picture", "frame", "markdown"])
def test_the_checker_sees_a_page_that_lost_an_output(tmp_path, output, good):
    path = notebook(tmp_path, [output])
    assert output_problems(path, "page.html", read_page(good)) == []
    assert output_problems(path, "page.html", read_page("<pre><code>table</code></pre>"))


def test_the_checker_sees_a_notebook_without_outputs_and_one_without_a_page(tmp_path):
    assert "without outputs" in output_problems(notebook(tmp_path, []), "page.html", read_page("<p>table"))[0]
    assert "no page" in output_problems(notebook(tmp_path, [PRINTED]), "page.html", None)[0]


def test_the_checker_sees_a_lost_paragraph(tmp_path):
    path = tmp_path / "page.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "# Walks\n\n> Short.\n\nThe data are 120 walks.\n\n1. *one*\n2. two"}]}))
    assert output_problems(path, "page.html", read_page("<h1>Walks</h1><p>Short.<p>The data are 120 walks.<ol><li><em>one</em><li>two")) == []
    assert "Thedataare120walks" in output_problems(path, "page.html", read_page("<h1>Walks</h1><p>Short.<ol><li>one<li>two"))[0]


def test_prose_in_the_title_cell_gets_a_cell_of_its_own():
    assert split_title("# Walks\n\n> Short.\n\nThe data.\n\nMore.") == ("# Walks\n\n> Short.", "The data.\n\nMore.")
    assert split_title("# Walks\n\n> Short.") == ("# Walks\n\n> Short.", "")
    assert split_title("Prose without a title.") == ("Prose without a title.", "")


def test_a_progress_bar_is_shown_as_it_ended():
    def printed(text: str, name: str = "stderr") -> dict:
        return {"output_type": "stream", "name": name, "text": text}
    pieces = [printed("start\n", "stdout"), printed("\r  0%"), printed("\r 50%\r"), printed("\r100%\n"), printed("\r  \r"), HTML, printed("end\r\n")]
    assert settled(pieces) == [printed("start\n", "stdout"), printed("100%\n"), HTML, printed("end\n")]


def test_the_checker_does_not_ask_for_hidden_outputs(tmp_path):
    path = notebook(tmp_path, [PRINTED], "#| hide\nprint('made 12 calls')")
    assert output_problems(path, "page.html", read_page("<p>nothing")) == []


@pytest.mark.slow
def test_the_site_builds_and_has_the_papers_own_notebook_as_its_page():
    done = subprocess.run([sys.executable, "tools/build_docs.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert check_site(ROOT / "_docs", ROOT) == []
    for path in sorted((ROOT / "papers").glob("*.ipynb")):
        page = read_page((ROOT / "_docs" / "papers" / f"{path.stem}.html").read_text(encoding="utf-8"))
        headings = [line.lstrip("# ") for cell in cells(path) if cell["cell_type"] == "markdown" for line in source(cell).splitlines() if line.startswith("## ")]
        assert headings and all(squeeze(heading)[:20] in page.text for heading in headings)
