"""InternVL's published label rule, lengths and sampler, where the golden vectors do not reach."""
import pytest

from vlm_repro.mmwalk.sft import IGNORED, accumulation_steps, even_chunks, expand_tags, published_accumulation, published_labels, published_lengths, published_order, published_text


def by_character(text: str) -> list[int]:
    return [1, *map(ord, text)]


def test_the_text_has_no_newline_behind_the_end_marks():
    head, tail = published_text("S", " Q\n", "\tA ")
    assert head + tail == "<|im_start|>system\nS<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\nA<|im_end|>"


def test_each_tag_takes_the_tiles_of_its_own_image():
    assert expand_tags("<image>-<image>", [1, 2], 2) == "<img><IMG_CONTEXT><IMG_CONTEXT></img>-<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    assert expand_tags("<image>-<image>", [1], 1) == "<img><IMG_CONTEXT></img>-<image>"


def test_counts_that_disagree_mask_every_label():
    def joining(text: str) -> list[int]: return by_character(text.replace("\nA", "*"))
    parts = published_text("S", "Q", "A")
    made = published_labels(joining, *parts, max_length=400, pad_id=2)
    assert made.mismatch and set(made.labels) == {IGNORED}
    whole = published_labels(by_character, *parts, max_length=400, pad_id=2)
    assert not whole.mismatch and [chr(i) for i in whole.labels if i != IGNORED] == list("A<|im_end|>")
    assert not published_labels(joining, *parts, max_length=20, pad_id=2).mismatch, "a sample that was cut is not checked"


def test_filling_is_masked_and_not_attended():
    made = published_labels(by_character, *published_text("S", "Q", "A"), max_length=200, pad_id=2, fill=True)
    assert len(made.input_ids) == 200 and sum(made.attention_mask) == made.input_ids.index(2)
    assert all(label == IGNORED for label, on in zip(made.labels, made.attention_mask) if not on)


def test_the_first_of_each_number_of_characters_counts_without_images():
    counts = {"aa": 2, "bb": 5, "ccc": 3, "cc": 1, "ddd": 9}
    assert published_lengths(list(counts), counts.get) == [2, 2 + 1792, 3, 2 + 1792, 3 + 1792]
    assert published_lengths(["a", "b"], len, per_tile=10, max_tiles=1, thumbnail=False) == [1, 11]


@pytest.mark.parametrize("n", [1, 16, 50, 64])
def test_an_epoch_holds_every_sample_once_in_an_order_of_its_seed(n):
    lengths = [(i * 37) % 101 + 5 for i in range(n)]
    orders = [published_order(lengths, 4, 4, seed) for seed in (0, 0, 1)]
    assert sorted(orders[0]) == list(range(n)) and orders[0] == orders[1] and (orders[0] != orders[2]) == (n > 16)


def test_micro_batches_of_an_update_are_alike():
    lengths = [(i * 37) % 101 + 5 for i in range(64)]
    order = published_order(lengths, 4, 4, 0)
    sums = [sum(lengths[i] for i in order[k:k + 4]) for k in range(0, 64, 4)]
    unsorted = [sum(lengths[i:i + 4]) for i in range(0, 64, 4)]
    spread = [max(s[k:k + 4]) - min(s[k:k + 4]) for s in (sums, unsorted) for k in range(0, 16, 4)]
    assert sum(spread[:4]) < sum(spread[4:]) / 2
    assert [len(c) for c in even_chunks(range(7), lengths, 3)] == [3, 2, 2]


def test_accumulation_is_exact_or_an_error():
    assert [published_accumulation(g) for g in (1, 2, 3, 4, 5, 8)] == [4, 2, 1, 1, 0, 0]
    assert [accumulation_steps(16, 4, g) for g in (1, 2, 4)] == [4, 2, 1]
    for gpus in (3, 5, 8):
        with pytest.raises(ValueError, match=f"no multiple of {gpus} processes x 4 samples"): accumulation_steps(16, 4, gpus)
