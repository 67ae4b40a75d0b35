"""Our training ids and labels are those of another renderer: LLaMA-Factory's own templates and masking (tests/independent/render_ids.py)."""
import json

import pytest
from render_cases import LAYOUTS, SPECIALS, TALKS, TOKENIZER, draw, examples, processor

from vlm_repro.models.inputs import encode
from vlm_repro.train.render import IGNORED, render_example

HELD = json.loads((TOKENIZER.parent / "llamafactory.json").read_text(encoding="utf-8"))
END = SPECIALS.index("<|im_end|>")
APART = "a newline before an earlier answer"
RENDERED = {(row["family"], row["name"]): row for row in HELD["rendered"]}


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> dict:
    """Every conversation as we render it, under the mask that supervises what LLaMA-Factory does."""
    folder = tmp_path_factory.mktemp("cases")
    draw(folder)
    made = {}
    for family in LAYOUTS:
        p = processor(family)
        made |= {(family, e.id): {mask: render_example(p, e, mask) for mask in ("answers_after", "answers", "answer")} for e in examples(family, folder)}
    return made


def test_both_rendered_the_same_conversations(ours):
    assert ours.keys() == RENDERED.keys() and len(RENDERED) == 3 * len(TALKS) - 1
    assert HELD["made_with"]["llamafactory"] and {family for family, _ in RENDERED} == {"qwen2_vl", "qwen2_5_vl", "internvl"}


@pytest.mark.parametrize("case", [c for c in RENDERED if c[1] != APART], ids="-".join)
def test_ids_and_labels_are_those_of_the_other_renderer(ours, case):
    made, other = ours[case]["answers_after"].tensors, RENDERED[case]
    assert made["input_ids"][0].tolist() == other["input_ids"]
    assert made["labels"][0].tolist() == other["labels"]


@pytest.mark.parametrize("case", [c for c in RENDERED if c[1] != APART], ids="-".join)
def test_our_default_ends_at_the_end_mark_one_newline_earlier(ours, case):
    other = RENDERED[case]
    ids, marks = other["input_ids"][:-1], other["input_ids"].count(END)
    labels = [label if a == label and before != END else IGNORED for before, a, label in zip([0, *ids], ids, other["labels"])]
    made = ours[case]["answers"].tensors
    assert made["input_ids"][0].tolist() == ids and made["labels"][0].tolist() == labels
    assert sum(a != b for a, b in zip(labels, other["labels"])) == len(TALKS[case[1]][1]) // 2 - 1 < marks
    last = ours[case]["answer"].tensors["labels"][0].tolist()
    start = len(ids) - [i == END for i in ids[-2::-1]].index(True)
    assert ours[case]["answer"].tensors["input_ids"][0].tolist() == ids and last == [IGNORED] * (start - 1) + labels[start - 1:]


@pytest.mark.parametrize("family", LAYOUTS)
def test_where_the_two_differ_ours_is_the_inference_prompt(ours, tmp_path, family):
    """LLaMA-Factory joins turns that it has tokenised apart; a processor tokenises the prompt as one text, where the newline of the head and that of an answer are one token."""
    draw(tmp_path)
    p = processor(family)
    example = next(e for e in examples(family, tmp_path) if e.id == APART)
    prompt = encode(p, example.messages[:-1]).tensors["input_ids"][0].tolist()
    made, other = ours[family, APART]["answers"].tensors, RENDERED[family, APART]["input_ids"]
    ids, labels = made["input_ids"][0].tolist(), made["labels"][0].tolist()
    assert ids[:len(prompt)] == prompt != other[:len(prompt)] and p.tokenizer.decode(ids) == p.tokenizer.decode(other[:-1])
    double = p.tokenizer.convert_tokens_to_ids("ĊĊ")
    assert double in ids and labels[ids.index(double)] == IGNORED, "no answer can begin with a token that holds the head's end"


def test_the_tokenizer_merges_across_the_boundary_that_the_cases_probe():
    tok = processor("qwen2_vl").tokenizer
    apart = sum((tok(t, add_special_tokens=False)["input_ids"] for t in ("assistant\n", "\n\nTwo.\n")), [])
    assert tok("assistant\n\n\nTwo.\n", add_special_tokens=False)["input_ids"] != apart
