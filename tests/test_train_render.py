"""Training text is the inference prompt, the answer and the end mark, token by token; labels fall where the mask says."""
import pickle
from pathlib import Path

import pytest
import torch
from noise import noise
from PIL import Image

from vlm_repro.core.media import MediaError
from vlm_repro.models.families import FAMILIES
from vlm_repro.models.inputs import VisualCounter, encode, image_token_id, tokenizer_of
from vlm_repro.models.protocol import Lengths
from vlm_repro.train.render import IGNORED, MASKS, Dropped, Example, TemplateError, measure_example, render_example, show_mask

torch.set_num_threads(1)
TRAINED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "llava_next")
TWO_MINDS = ("{% for m in messages %}<|im_start|>{{ m.role }} {% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}\n{{ p.text }}{% endif %}{% endfor %}"
             "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(scope="module")
def processors():
    """The processor of every family, by name."""
    return {name: FAMILIES[name]()[1] for name in TRAINED}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[str]:
    """Three pictures of different shapes."""
    folder, made = tmp_path_factory.mktemp("pictures"), []
    for i, size in enumerate([(112, 56), (60, 90), (150, 150)]):
        made.append(str(folder / f"{i}.png"))
        noise(*size).save(made[-1])
    return made


def said(role: str, text: str, *images: str) -> dict:
    return {"role": role, "content": [{"type": "image", "image": i} for i in images] + [{"type": "text", "text": text}]}


def conversation(pictures: list[str]) -> Example:
    """Three exchanges, images before two of them, and answers that contain one another."""
    return Example("talk", [said("user", "Where? là đâu", pictures[0], pictures[1]), said("assistant", "Phía trước, im_end"), said("user", "And?"), said("assistant", "im_end"),
                            said("user", "Now?", pictures[2]), said("assistant", "  Phía trước, im_end \n\n and on")])


def supervised(preparer, rendered) -> list[str]:
    return [text for text, on, *_ in show_mask(preparer, rendered).pieces if on]


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("mask", MASKS)
def test_ids_are_the_inference_prompt_then_the_answer_then_the_end_mark(processors, pictures, family, mask):
    p, example = processors[family], conversation(pictures)
    prompt, made = encode(p, example.messages[:-1]), render_example(p, example, mask)
    ids, tok = made.tensors["input_ids"][0].tolist(), tokenizer_of(p)
    tail = tok("  Phía trước, im_end \n\n and on<|im_end|>" + "\n" * MASKS[mask].after, add_special_tokens=False)["input_ids"]
    assert ids == prompt.tensors["input_ids"][0].tolist() + tail
    assert made.n_visual == prompt.n_visual == ids.count(image_token_id(p)) > 0
    assert {k: v.shape[1] for k, v in made.tensors.items() if k in ("attention_mask", "labels", "mm_token_type_ids")}.items() <= dict.fromkeys(
        ("attention_mask", "labels", "mm_token_type_ids"), len(ids)).items()
    assert all(torch.equal(made.tensors[k], prompt.tensors[k]) for k in prompt.tensors if k.startswith(("pixel", "image")))


@pytest.mark.parametrize("family", TRAINED)
def test_labels_fall_where_the_mask_says(processors, pictures, family):
    p, example = processors[family], conversation(pictures)
    last, first, second = "  Phía trước, im_end \n\n and on", "Phía trước, im_end", "im_end"
    wanted = {"answer": [last + "<|im_end|>"], "answers": [a + "<|im_end|>" for a in (first, second, last)], "answer_open": [last],
              "answers_after": [a + "<|im_end|>\n" for a in (first, second, last)]}
    for mask, texts in wanted.items():
        made = render_example(p, example, mask)
        assert supervised(p, made) == texts
        ids, labels = made.tensors["input_ids"], made.tensors["labels"]
        assert torch.equal(labels[labels != IGNORED], ids[labels != IGNORED]) and made.n_supervised == int((labels != IGNORED).sum())


@pytest.mark.parametrize("family", TRAINED)
def test_visual_tokens_are_never_supervised(processors, pictures, family):
    p = processors[family]
    made = render_example(p, conversation(pictures), "sequence")
    visual = made.tensors["input_ids"] == image_token_id(p)
    assert visual.any() and (made.tensors["labels"][visual] == IGNORED).all() and (made.tensors["labels"][~visual] != IGNORED).all()


@pytest.mark.parametrize("family", TRAINED)
@pytest.mark.parametrize("mask", MASKS)
def test_the_measured_length_is_the_rendered_length(processors, pictures, family, mask):
    p, example = processors[family], conversation(pictures)
    made = render_example(p, example, mask)
    assert measure_example(p, example, VisualCounter(p), mask) == Lengths(made.length - made.n_visual, made.n_visual)


def test_a_text_model_needs_no_processor():
    tok = tokenizer_of(FAMILIES["qwen2_vl"]()[1])
    example = Example("t", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])
    made = render_example(tok, example)
    assert tok.decode(made.tensors["input_ids"][0]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>"
    assert supervised(tok, made) == ["Hello.<|im_end|>"] and made.n_visual == 0
    assert measure_example(tok, example, lambda sizes: (0, 0)).total == made.length


def test_the_head_of_the_prompt_wins_where_a_template_writes_two(processors, pictures):
    p = FAMILIES["llava_onevision"]()[1]
    p.chat_template = TWO_MINDS
    example = Example("x", [said("user", "Q", pictures[0]), said("assistant", "A")])
    made = render_example(p, example)
    prompt = encode(p, example.messages[:1]).tensors["input_ids"]
    assert torch.equal(made.tensors["input_ids"][:, :prompt.shape[1]], prompt)
    assert tokenizer_of(p).decode(made.tensors["input_ids"][0]).endswith("<|im_start|>assistant\nA<|im_end|>")


def test_a_template_that_trims_answers_is_followed(processors):
    p = FAMILIES["qwen2_vl"]()[1]
    p.chat_template = p.chat_template.replace("{{ p.text }}", "{{ p.text | trim }}")
    made = render_example(p, Example("x", [said("user", "Q"), said("assistant", " A ")]))
    assert supervised(p, made) == ["A<|im_end|>"]


def test_a_template_without_an_end_mark_gets_the_tokenizers():
    p = FAMILIES["qwen2_vl"]()[1]
    p.chat_template = "{% for m in messages %}{{ m.role }}: {% for p in m.content %}{{ p.text }}{% endfor %} {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    made = render_example(p, Example("x", [said("user", "Q"), said("assistant", "A")]))
    assert tokenizer_of(p).decode(made.tensors["input_ids"][0]) == "user: Q assistant: A<|im_end|>" and supervised(p, made) == ["A<|im_end|>"]


def test_a_template_that_rewrites_is_an_error_that_shows_it(processors):
    p = FAMILIES["qwen2_vl"]()[1]
    plain, example = p.chat_template, Example("x", [said("user", "Q"), said("assistant", "A")])
    p.chat_template = plain.replace("{{ p.text }}", "{{ p.text | upper }}")
    with pytest.raises(TemplateError, match="upper"): render_example(p, example)
    p.chat_template = "{{ messages | length }}" + plain
    with pytest.raises(TemplateError, match="rewrites earlier turns"): render_example(p, example)
    p.chat_template = plain.replace("{{ p.text }}", "{% if m.role == 'user' or loop.last and messages[-1] is sameas m %}{{ p.text }}{% else %}-{% endif %}")
    with pytest.raises(TemplateError): render_example(p, Example("y", [said("user", "Q"), said("assistant", "A"), said("user", "Q"), said("assistant", "B")]), "answers")


@pytest.mark.parametrize(("messages", "why"), [
    ([said("user", "Q")], "does not end with an assistant turn"),
    ([], "does not end with an assistant turn"),
    ([said("user", "Q"), said("assistant", " \n")], "empty answer"),
    ([said("user", "Q"), said("assistant", "see <|image_pad|>")], "control token <|image_pad|>"),
    ([said("user", "Q"), said("assistant", "stop<|im_end|>here")], "control token <|im_end|>"),
    ([said("user", "Q"), said("assistant", "look", "a.png")], "something else than text"),
])
def test_an_example_that_cannot_be_trained_on_is_dropped_with_the_reason(processors, messages, why):
    with pytest.raises(Dropped, match=why.replace("|", r"\|")) as e: render_example(processors["qwen2_vl"], Example("odd", messages))
    assert e.value.id == "odd" and why in e.value.why
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)


@pytest.mark.parametrize("family", TRAINED)
def test_nothing_is_ever_cut(processors, pictures, family):
    p, example = processors[family], conversation(pictures)
    full = render_example(p, example)
    assert render_example(p, example, max_length=full.length).length == full.length
    for limit in (full.length - 1, full.n_visual, 20, 1):
        with pytest.raises(Dropped, match=f"{full.length} tokens .* max_length {limit}"): render_example(p, example, max_length=limit)


@pytest.mark.parametrize(("family", "token"), [("qwen2_vl", "<|image_pad|>"), ("qwen2_5_vl", "<|image_pad|>"), ("llava_onevision", "<image>")])
def test_a_placeholder_quoted_in_a_question_stays_text(processors, pictures, family, token):
    p = processors[family]
    example = Example("x", [said("user", f"What does {token} mean?", pictures[0]), said("assistant", "An image."), said("user", "Sure?"), said("assistant", "Yes.")])
    made = render_example(p, example, "answers")
    assert made.n_visual == encode(p, [said("user", "What?", pictures[0])]).n_visual
    assert supervised(p, made) == ["An image.<|im_end|>", "Yes.<|im_end|>"]


def test_what_the_processor_refuses_is_dropped_with_its_reason(processors, tmp_path: Path):
    Image.new("RGB", (600, 2)).save(tmp_path / "strip.png")
    with pytest.raises(Dropped, match="the processor refuses it: .*aspect ratio"):
        render_example(processors["qwen2_vl"], Example("x", [said("user", "Q", str(tmp_path / "strip.png")), said("assistant", "A")]))


def test_an_image_that_is_missing_is_a_media_error(processors, tmp_path: Path):
    with pytest.raises(MediaError, match="no such file"): render_example(processors["qwen2_vl"], Example("x", [said("user", "Q", str(tmp_path / "no.png")), said("assistant", "A")]))


def test_an_unknown_mask_lists_those_there_are(processors):
    with pytest.raises(ValueError, match="answers_after"): render_example(processors["qwen2_vl"], Example("x", [said("user", "Q"), said("assistant", "A")]), "all")


def test_the_view_escapes_and_counts(processors, pictures):
    p = processors["qwen2_vl"]
    made = render_example(p, Example("<b>", [said("user", "1 < 2", pictures[0]), said("assistant", "a & b")]))
    view = show_mask(p, made)
    assert f"⟨{made.n_visual} visual⟩" in str(view) and "⟦a & b<|im_end|>⟧" in str(view)
    assert "<b>&lt;b&gt;</b>" in view._repr_html_() and "a &amp; b&lt;|im_end|&gt;" in view._repr_html_()
    assert sum(n for *_, n in view.pieces) == made.length
