"""Token ids and labels of training conversations as LLaMA-Factory renders them: the other side of tests/test_train_independent.py.

Runs in an environment of its own, with none of this package in it:

    python tests/render_cases.py CASES                                  (in the project's environment)
    python3 -m venv ENV && ENV/bin/pip install llamafactory==0.9.5
    ENV/bin/python tests/independent/render_ids.py CASES tests/golden/render/llamafactory.json

Its templates import torchaudio, which images never need: where no build of it fits the installed torch, an empty module of that name does.

LLaMA-Factory's templates are its own, written by hand for each model, and so is its masking; only the tokenizer and the image processor are those of the checkpoint.
"""
import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
from llamafactory.data.template import get_template_and_fix_tokenizer
from transformers import AutoProcessor

TEMPLATES = {"qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_vl", "internvl": "intern_vl"}  # LLaMA-Factory has no template of its own for Qwen2.5-VL
SETTINGS = SimpleNamespace(cutoff_len=10**6, mask_history=False, train_on_prompt=False, tool_format=None, default_system=None)


def renderer(folder: Path, family: str) -> SupervisedDatasetProcessor:
    """LLaMA-Factory's supervised fine-tuning processor over a checkpoint."""
    processor = AutoProcessor.from_pretrained(folder / family)
    template = get_template_and_fix_tokenizer(processor.tokenizer, SimpleNamespace(**vars(SETTINGS), template=TEMPLATES[family]))
    return SupervisedDatasetProcessor(template, processor.tokenizer, processor, SETTINGS)


def tagged(text: str, images: list[str], family: str) -> str:
    """A user's text with an image tag for each picture in front; InternVL's template sets each on a line of its own."""
    return ("<image>\n" if family == "internvl" else "<image>") * len(images) + text


def render(maker: SupervisedDatasetProcessor, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Ids and labels of one conversation, every answer supervised."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": tagged(text, images, case["family"])} for i, (text, images) in enumerate(case["turns"])]
    pictures = [str(folder / image) for _, images in case["turns"] for image in images]
    ids, labels = maker._encode_data_example(turns[:-1], turns[-1:], case["system"] or None, None, pictures, [], [])
    return {"family": case["family"], "name": case["name"], "input_ids": ids, "labels": labels}


def main(folder: Path, out: Path) -> None:
    """Render every conversation and write the result."""
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    makers = {family: renderer(folder, family) for family in TEMPLATES}
    held = {"what": "Token ids and labels of the conversations of tests/render_cases.py by another renderer; -100 is not supervised.",
            "made_with": {name: version(name) for name in ("llamafactory", "transformers", "tokenizers")}, "templates": TEMPLATES,
            "rendered": [render(makers[case["family"]], case, folder) for case in cases]}
    out.write_text(json.dumps(held, separators=(",", ":")).replace('{"family"', '\n{"family"') + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
