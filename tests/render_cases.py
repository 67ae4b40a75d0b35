"""Checkpoints and conversations on which two renderers are compared.

    python tests/render_cases.py FOLDER     writes both, for tests/independent/render_ids.py

The processors are the genuine classes at tiny size, with one tokenizer that merges as Qwen's does (tests/golden/render/tokenizer.json), so that a boundary moved by
one character shows in the ids.
"""
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from vlm_repro.models.families import FAMILIES, chatml
from vlm_repro.train.render import Example

TOKENIZER = Path(__file__).resolve().parent / "golden" / "render" / "tokenizer.json"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
INTERN = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
SYSTEM = "{% if messages and messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
LAYOUTS = {"qwen2_vl": (QWEN, SYSTEM + chatml("<|vision_start|><|image_pad|><|vision_end|>")), "internvl": (INTERN, chatml("<IMG_CONTEXT>\n"))}
LAYOUTS["qwen2_5_vl"] = LAYOUTS["qwen2_vl"]
SIZES = {"wide.png": (168, 84), "tall.png": (56, 112), "square.png": (112, 112)}

LEARNED = ["You are a helpful assistant.", "system\nuser\nassistant\n", "Which way is the harbour?\n\nThe harbour is on the left, the left of the tower.\n", "Biển báo này có ý nghĩa gì?\n\nĐáp án: B.\n",
           "How many lights are there? There are two lights.\n\n", "Frame1: \nFrame2: \n", "A. Left\nB. Right\nC. Straight on\n",
           "assistant\n\nleft\n\nright\n\n\nleft\n\n\nright"] * 3
TALKS: dict[str, tuple[str, list[tuple[str, list[str]]]]] = {  # name -> system text, turns with their images; users speak first
    "one image": ("Answer briefly.", [("Which way is the harbour?", ["wide.png"]), ("On the left.", [])]),
    "two images": ("Answer briefly.", [("How many lights are there?", ["wide.png", "tall.png"]), ("There are two lights.", [])]),
    "no image": ("Answer briefly.", [("Which way is the harbour?", []), ("Left", [])]),
    "vietnamese": ("Trả lời ngắn gọn.", [("Biển báo này có ý nghĩa gì?\nA. Left\nB. Right", ["square.png"]), ("Đáp án: B.", [])]),
    "newlines at the ends": ("Be brief.", [("\nHow many?\n\n", ["tall.png"]), ("\n\nTwo.\n", [])]),
    "blanks at the ends": ("Be brief.", [("  How many? ", []), ("  two ", [])]),
    "several turns": ("Be brief.", [("Which way?", ["wide.png"]), ("Left.\n", []), ("And the tower?", []), ("On the left", []), ("And now?", ["tall.png"]), ("Straight on.", [])]),
    "a newline before an earlier answer": ("Be brief.", [("Which way?", ["wide.png"]), ("\nLeft", []), ("And the tower?", []), ("Right.", [])]),
    "default system": ("", [("Which way?", ["square.png"]), ("Right", [])]),
}


def make_tokenizer() -> Tokenizer:
    """A byte-level tokenizer with merges over words, punctuation and newlines."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=list(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(LEARNED, trainer)
    return tokenizer


def processor(family: str) -> ProcessorMixin:
    """The processor of a family with the shared tokenizer."""
    named, template = LAYOUTS[family]
    tiny = FAMILIES[family]()[1]
    tok = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template, extra_special_tokens=named)
    more: dict[str, Any] = {"image_seq_length": tiny.image_seq_length} if family == "internvl" else {}
    return type(tiny)(image_processor=tiny.image_processor, tokenizer=tok, video_processor=tiny.video_processor, chat_template=template, **more)


def draw(folder: Path) -> None:
    """The pictures."""
    for name, size in SIZES.items(): Image.linear_gradient("L").resize(size).convert("RGB").save(folder / name)


def examples(family: str, folder: Path) -> list[Example]:
    """The conversations of a family; InternVL's template has no default system text, so that one is Qwen's only."""
    made = []
    for name, (system, turns) in TALKS.items():
        if not system and family == "internvl": continue
        messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
        for i, (text, images) in enumerate(turns):
            parts = [{"type": "image", "image": str(folder / image)} for image in images]
            messages.append({"role": ("user", "assistant")[i % 2], "content": [*parts, {"type": "text", "text": text}]})
        made.append(Example(name, messages))
    return made


def main(folder: Path) -> None:
    """Write processors, pictures and conversations."""
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder)
    for family in LAYOUTS: processor(family).save_pretrained(folder / family)
    talks = [{"family": family, "name": name, "system": system, "turns": turns} for family in LAYOUTS for name, (system, turns) in TALKS.items() if system or family != "internvl"]
    (folder / "cases.json").write_text(json.dumps(talks, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    if not TOKENIZER.exists(): make_tokenizer().save(str(TOKENIZER))
    main(Path(sys.argv[1]))
