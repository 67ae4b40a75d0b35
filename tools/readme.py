"""Write README.md from nbs/index.ipynb.

It does what `nbdev-readme` does, without Quarto: hidden cells are left out, links to notebooks point at the published pages.
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
NOTE = "<!-- Written by `make readme` from nbs/index.ipynb: edit that notebook. -->"
LINK = re.compile(r"\]\((?!\w+:|#|/)([^)\s#]+)\.ipynb(#[^)]*)?\)")


def doc_url() -> str:
    """The address of the published site, from settings.ini."""
    sys.path.insert(0, str(ROOT))
    from setup import read_settings
    return read_settings(ROOT / "settings.ini")["doc_url"]


def text_of(value: str | list[str]) -> str:
    """Text that a notebook stores as one string or as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def output_text(output: dict) -> str:
    """One stored output as Markdown: Markdown as it is, anything else as its plain text in a fence."""
    data = output.get("data", {})
    if "text/markdown" in data:
        return text_of(data["text/markdown"]).strip()
    plain = text_of(output.get("text", data.get("text/plain", ""))).rstrip()
    return f"```text\n{plain}\n```" if plain else ""


def cell_text(cell: dict, base_url: str) -> str:
    """One cell as Markdown, empty when the page does not show it."""
    source = text_of(cell["source"]).strip()
    directives = re.findall(r"^#\|\s*(\w+)", source, flags=re.MULTILINE)
    if not source or {"hide", "default_exp", "export"} & set(directives):
        return ""
    if cell["cell_type"] == "markdown":
        return LINK.sub(lambda m: f"]({base_url}{m[1]}.html{m[2] or ''})", source)
    code = re.sub(r"^#\|.*\n", "", source, flags=re.MULTILINE).strip()
    return "\n\n".join(filter(None, [f"```python\n{code}\n```", *map(output_text, cell.get("outputs", []))]))


def readme_text(notebook: Path = INDEX) -> str:
    """The README made from a notebook."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    shown = [text for cell in cells if (text := cell_text(cell, doc_url()))]
    return "\n\n".join([shown[0], NOTE, *shown[1:]]) + "\n"


def write_readme() -> Path:
    """Write README.md where it differs from what the notebook says."""
    path, text = ROOT / "README.md", readme_text()
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


if __name__ == "__main__":
    print(write_readme())
