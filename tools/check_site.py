"""Check a built site: every link inside it leads somewhere, every page made from a notebook shows that notebook's prose and outputs."""
import json
import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import yaml
from outputs import joined, settled

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = {"hide", "export", "exporti", "default_exp"}
PICTURES = ("image/svg+xml", "image/png", "image/jpeg", "image/gif")
DRAWN = ("img", "svg", "iframe", "canvas", "video")
SNIPPET = 60  # characters of an output that have to be found on its page


@dataclass
class Page:
    """What one HTML page links to, which anchors it has, and what it shows."""

    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    text: str = ""
    pictures: int = 0


class Reader(HTMLParser):
    """Collect a page's links, anchors, pictures and text."""

    def __init__(self) -> None:
        super().__init__()
        self.page, self.parts, self.silent = Page(), [], 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag links to and is called."""
        given = dict(attrs)
        self.silent += tag in ("script", "style")
        self.page.anchors |= {value for key in ("id", "name") if (value := given.get(key))}
        self.page.links += [value for key in ("href", "src") if (value := given.get(key)) and tag not in ("base",)]
        self.page.pictures += tag in DRAWN

    def handle_endtag(self, tag: str) -> None:
        """Leave a script or style."""
        self.silent -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        """Keep the text a reader sees."""
        if not self.silent:
            self.parts.append(data)


def read_page(html: str) -> Page:
    """Parse one page."""
    reader = Reader()
    reader.feed(html)
    reader.page.text = squeeze("".join(reader.parts))
    return reader.page


def squeeze(text: str) -> str:
    """The letters and digits of a text: a page may wrap it otherwise, and drops the marks of Markdown."""
    return re.sub(r"[\W_]+", "", text)


def plain(html: str) -> str:
    """The letters and digits of a piece of HTML."""
    return read_page(html).text


# ---------------------------------------------------------------- links


@dataclass(frozen=True)
class Bases:
    """The addresses under which the site and the repository are published, and where both lie here."""

    site: Path
    root: Path
    site_url: str
    blob_url: str


def broken(link: str, name: str, pages: dict[str, Page], bases: Bases) -> str | None:
    """Why a link of page `name` leads nowhere, or None."""
    if link.startswith(bases.site_url):
        link = "/" + link.removeprefix(bases.site_url)
    elif link.startswith(bases.blob_url):
        path = unquote(urldefrag(link.removeprefix(bases.blob_url))[0])
        return None if (bases.root / path).exists() else f"no file {path} in the repository"
    if urlsplit(link).scheme or link.startswith("//"):
        return None
    target, anchor = urldefrag(urljoin(f"/{name}", link))
    path = unquote(urlsplit(target).path).lstrip("/")
    path = path + "index.html" if path == "" or path.endswith("/") else path
    if not (bases.site / path).is_file():
        return f"no page {path}"
    if anchor and path in pages and unquote(anchor) not in pages[path].anchors:
        return f"no anchor #{anchor} on {path}"
    return None


def link_problems(pages: dict[str, Page], bases: Bases) -> list[str]:
    """One line for each link that leads nowhere, and one for a site with no page at all."""
    found = {
        f"{name}: broken link {link}: {why}"
        for name, page in pages.items()
        for link in page.links
        if (why := broken(link, name, pages, bases))
    }
    return sorted(found) if pages else ["the site has no pages"]


# ---------------------------------------------------------------- outputs


def shown_cells(notebook: dict, kind: str) -> list[dict]:
    """The cells of one kind that a notebook's page shows."""
    def directives(cell: dict) -> set[str]:
        return set(re.findall(r"^#\|\s*([\w-]+)", joined(cell["source"]), flags=re.MULTILINE))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == kind]
    return [cell for cell in cells if joined(cell["source"]).strip() and not directives(cell) & (HIDDEN | {"output", "include"})]


def opening(markdown: str) -> str:
    """The first letters of a piece of Markdown, up to the first link, tag or formula."""
    marks = re.sub(r"^ *(?:```.*|~~~.*|[-*+]|\d+[.)])(?:\s|$)", "", markdown, flags=re.MULTILINE)  # of code blocks and lists
    return squeeze(re.split(r"[\[<\\$]", marks)[0])[:SNIPPET]


def paragraphs(notebook: dict) -> list[str]:
    """The opening of every paragraph of a notebook's prose."""
    sources = [joined(cell["source"]) for cell in shown_cells(notebook, "markdown")]
    return [text for source in sources for part in re.split(r"\n\s*\n", source) if (text := opening(part))]


def drawn_in(output: dict) -> int:
    """How many pictures and frames a page that shows this output has to have for it."""
    data = output.get("data", {})
    if "text/html" in data:
        return read_page(joined(data["text/html"])).pictures
    return int(any(kind in data for kind in PICTURES))


def text_in(output: dict) -> str:
    """The start of the text that a page which shows this output has to hold, empty for a picture."""
    data = output.get("data", {})
    if "text/html" in data:
        return plain(joined(data["text/html"]))[:SNIPPET]
    if any(kind in data for kind in PICTURES):
        return ""
    if "text/markdown" in data:
        text = re.sub(r"^\s*table:", "", joined(data["text/markdown"]), flags=re.IGNORECASE)  # Pandoc's mark of a caption
        return opening(text)
    return squeeze(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", joined(output.get("text", data.get("text/plain", "")))))[:SNIPPET]


def output_problem(output: dict, page: Page) -> str | None:
    """Why one stored output is missing from its page, or None."""
    if output["output_type"] == "error":
        return f"an error was stored: {output.get('ename')}"
    return None if text_in(output) in page.text else f"an output is missing: {text_in(output)}"


def output_problems(notebook: Path, name: str, page: Page | None) -> list[str]:
    """One line for each output of a notebook that its page lacks, or one for a notebook without any."""
    if page is None:
        return [f"{name}: no page was made from {notebook.name}"]
    content = json.loads(notebook.read_text(encoding="utf-8"))
    cells = shown_cells(content, "code")
    outputs = [output for cell in cells for output in settled(cell.get("outputs", []))]
    lost = [f"{name}: a paragraph is missing: {text}" for text in paragraphs(content) if text not in page.text]
    if cells and not outputs:
        return [*lost, f"{name}: {notebook.name} was committed without outputs"]
    drawn = sum(map(drawn_in, outputs))
    few = [f"{name}: it has {page.pictures} pictures and frames, its outputs have {drawn}"] if page.pictures < drawn else []
    return lost + few + [f"{name}: {why}" for output in outputs if (why := output_problem(output, page))]


def notebooks(root: Path) -> dict[str, Path]:
    """The notebooks that pages are made from, by the page's path in the site."""
    found = {path.relative_to(root / "nbs"): path for path in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    found |= {path.relative_to(root): path for path in (root / "papers").glob("*.ipynb")}
    return {name.with_suffix(".html").as_posix(): path for name, path in sorted(found.items())}


def check_site(site: Path, root: Path = ROOT) -> list[str]:
    """Every problem of the site built into `site`, one line each."""
    website = yaml.safe_load((root / "nbs" / "_quarto.yml").read_text(encoding="utf-8"))["website"]
    blob = f"{website['repo-url'].rstrip('/')}/blob/{website['repo-branch']}/"
    paths = {path.relative_to(site).as_posix(): path for path in sorted(site.rglob("*.html"))}
    pages = {name: read_page(path.read_text(encoding="utf-8")) for name, path in paths.items()}
    bases = Bases(site, root, website["site-url"], blob)
    local = [f"{name}: names a folder of this machine, {root}" for name, path in paths.items() if str(root) in path.read_text(encoding="utf-8")]
    missing = [line for name, path in notebooks(root).items() for line in output_problems(path, name, pages.get(name))]
    return link_problems(pages, bases) + local + missing


if __name__ == "__main__":
    lines = check_site(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "_docs")
    print(*lines, sep="\n")
    sys.exit(1 if lines else 0)
