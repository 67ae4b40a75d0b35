"""What of a notebook's cells a page shows: progress bars as they ended, titles apart from what follows them."""
import re

TITLE = re.compile(r"\A(# [^\n]+\n+(?:>[^\n]*\n*)*)", re.DOTALL)


def joined(value: str | list[str]) -> str:
    """Text that a notebook stores as one string or as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def as_printed(text: str) -> str:
    """Text after its carriage returns have moved the printer back to the start of a line."""
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n")]
    return "\n".join(line.rstrip() for line in lines)


def settled(outputs: list[dict]) -> list[dict]:
    """Outputs with neighbouring pieces of one stream joined, progress bars at their last state and empty streams left out."""
    out: list[dict] = []
    for output in outputs:
        before = out[-1] if out else {}
        if output["output_type"] == "stream" and before.get("name") == output["name"]:
            out[-1] = {**before, "text": joined(before["text"]) + joined(output["text"])}
        else:
            out.append(output)
    printed = [{**o, "text": as_printed(joined(o["text"]))} if o["output_type"] == "stream" else o for o in out]
    return [o for o in printed if o["output_type"] != "stream" or o["text"].strip()]


def split_title(source: str) -> tuple[str, str]:
    """A title with its description, and the prose of the same cell that follows; nbdev would drop the latter from the page."""
    found = TITLE.match(source)
    return (found[1].rstrip(), source[found.end():].strip()) if found else (source, "")
