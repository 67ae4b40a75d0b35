"""The tiny Road Buddy checkpoint: a genuine InternVL that sees; its training parts fit together."""
import csv
import json
from collections import Counter

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from vlm_repro.core.assets import asset
from vlm_repro.models.controls import blanked, shuffled
from vlm_repro.models.protocol import load_model
from vlm_repro.models.tiny_internvl import TILE_TOKENS, build_processor, build_tiny, train_tokenizer
from vlm_repro.models.tiny_steps import coded, make_codes
from vlm_repro.roadbuddy.questions import FAMILIES, family_of
from vlm_repro.roadbuddy.tiny_data import FRAME_TOKENS, LABELS, LEFT_OUT, TRAINED, Writer, ask_shown, corpus, draw_films, draw_frames, spread
from vlm_repro.roadbuddy.tiny_sight import best_constant, hits, unseen_questions
from vlm_repro.roadbuddy.tiny_training import Recipe, answer_logits, answer_loss, draw_batch, held_out_accuracy, match_heads, train_tiny
from vlm_repro.roadbuddy.tiny_vision import see, seen_films, sight_of
from vlm_repro.roadbuddy.world import Size

FOLDER = asset("tiny/roadbuddy")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def n_images(request):
    return sum(part["type"] == "image" for part in request.messages[-1]["content"])


@pytest.fixture(scope="module")
def films():
    return draw_films(8, 3, 1)


@pytest.fixture(scope="module")
def shipped():
    return hf.AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32), hf.AutoProcessor.from_pretrained(FOLDER)


def test_it_is_a_small_genuine_internvl(shipped):
    model, processor = shipped
    assert type(model) is hf.InternVLForConditionalGeneration and model.config.text_config.model_type == "qwen2"
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 3_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6e6
    assert processor.image_seq_length == TILE_TOKENS and processor.image_processor.crop_to_patches
    card = json.loads((FOLDER / "card.json").read_text())
    assert card["licence"] and not set(card["trained_families"]) & set(LEFT_OUT)


def test_a_frame_gives_two_tiles_and_a_thumbnail(shipped):
    samples, requests = unseen_questions(seed=5, size=Size(1, 4, 1, 1))
    model = load_model("tiny", tiny="roadbuddy", dtype="float32")
    frames = n_images(requests[0])
    assert model.measure(requests[0]).n_visual == frames * FRAME_TOKENS


def test_the_shipped_weights_see():
    model = load_model("tiny", tiny="roadbuddy", dtype="float32")
    samples, requests = unseen_questions(frames="support", seed=6, size=Size(3, 8, 1, 1))
    right, moved = hits(model, requests, samples).mean(), hits(model, shuffled(requests), samples).mean()
    assert len(samples) >= 30 and right > best_constant(samples) + 0.15 and right > moved + 0.15, (right, moved)


def test_the_measured_table_says_it_sees():
    with (FOLDER / "can_see.csv").open() as table:
        rows = list(csv.DictReader(table))
    everything = [row for row in rows if row["group"] == "all"]
    assert {row["setting"] for row in everything} == {"uniform", "support"}
    for row in everything:
        assert int(row["n"]) >= 300 and float(row["lower"]) > max(float(row[name]) for name in ("constant", "blank", "shuffled"))
    assert {row["group"] for row in rows} == {"all", *TRAINED}


def test_the_left_out_families_stay_out(films):
    recipe, rng = Recipe(), np.random.default_rng(0)
    writer = Writer(train_tokenizer(corpus(films)))
    asked = Counter(family for progress in (0.0, 0.5, 0.9) for _ in range(4) for example in draw_batch(writer, films, rng, recipe, progress) for family in example.families)
    assert asked and not set(asked) & set(LEFT_OUT) and set(TRAINED) | set(LEFT_OUT) == set(FAMILIES)


def test_a_left_out_family_is_not_mastered(shipped):
    model, processor = shipped
    accuracy = held_out_accuracy(model, Writer(processor.tokenizer), draw_films(24, 11, 1), ("brake", "vehicle"), n=40, supported=True, frames=4)
    assert accuracy["brake"] < 0.8 < accuracy["vehicle"]


def test_the_eyes_see(shipped):
    model, _ = shipped
    found = sight_of(model, draw_frames(60, 91, 1), make_codes(160, Recipe().seed, len(LABELS)))
    for name in ("light:red", "light:green", "vehicle:bus", "pedestrian", "brake", "lane:left"):
        assert min(found[name]) > 0.8, (name, found[name])


def test_what_training_feeds_is_what_the_model_is_fed(shipped, films):
    model, processor = shipped
    frames = draw_frames(4, 5, 1)
    pixels = processor.image_processor([Image.fromarray(p) for p in frames.pixels], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        own = model.model.get_image_features(pixels).pooler_output.view(4, FRAME_TOKENS, -1)
        assert (own - see(model, frames.pixels)).abs().mean() < 0.02
        writer, rng = Writer(processor.tokenizer), np.random.default_rng(0)
        seconds = spread(films[0].clip, 4)
        example = writer.write(0, seconds, ask_shown(films[0], rng, seconds)[:3])
        tokens = seen_films(model, films[0], seconds)
        logits, labels, weights = answer_logits(model, writer, [example], films, lambda film, moments: tokens)
        ids = torch.from_numpy(example.ids)[None]
        embedded = model.get_input_embeddings()(ids).masked_scatter((ids == writer.image)[..., None], tokens.flatten(0, 1))
        loss = model(inputs_embeds=embedded, labels=torch.from_numpy(example.labels)[None]).loss
        torch.testing.assert_close(answer_loss(logits, labels, torch.ones_like(weights)), loss, atol=1e-3, rtol=1e-3)


def test_codes_come_apart():
    codes = make_codes(160, 1, len(LABELS))
    shown = torch.zeros(len(LABELS))
    shown[[2, 7, 20]] = 1
    assert (coded(shown, codes) @ codes[1:].T > 0.5).nonzero().flatten().tolist() == [2, 7, 20]


def test_matching_heads_find_what_a_phrase_names(films):
    tokenizer = train_tokenizer(corpus(films))
    model, writer, codes = build_tiny(tokenizer, 0), Writer(tokenizer), make_codes(160, 0, len(LABELS))
    match_heads(model, writer, codes, 0)
    attention = model.model.language_model.layers[0].self_attn
    word = model.get_input_embeddings().weight[writer.encode("Đèn đỏ")[0]]
    shown = torch.eye(len(LABELS))
    normed = torch.nn.functional.rms_norm
    keys = attention.k_proj(normed(coded(shown, codes), (160,)))
    query = attention.q_proj(normed(word, (160,)))
    head = LABELS.index("light:red") % 2
    products = keys[:, head * 32 : head * 32 + 32] @ query[head * 32 : head * 32 + 32]
    assert int(products.argmax()) == LABELS.index("light:red") and products.sort().values[-1] > 3 * products.sort().values[-2]


def test_training_makes_a_checkpoint_that_loads(films, tmp_path):
    recipe = Recipe(see_steps=2, read_steps=2, join_steps=1, clips=2, questions=2)
    folder = train_tiny(tmp_path / "new", recipe, draw_frames(16, 1, 1), films, workers=1, every=2, checks=1)
    assert hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).config.model_type == "internvl"
    with (folder / "training_log.csv").open() as log:
        assert [row["stage"] for row in csv.DictReader(log)] == ["see", "read", "join"]
    train_tiny(tmp_path / "more", recipe, None, films, workers=1, every=2, checks=1, eyes=folder)
    eyes = [hf.AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype=torch.float32).model.vision_tower.state_dict() for name in ("new", "more")]
    assert all(torch.equal(eyes[0][key], eyes[1][key]) for key in eyes[0])


def test_a_tokenizer_is_the_same_each_time(films):
    first, second = (train_tokenizer(corpus(films)) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert torch.equal(*(build_tiny(tokenizer, 3).get_input_embeddings().weight for tokenizer in (first, second)))
    assert build_processor(first).image_processor.max_patches == 6


def test_shuffled_and_blank_requests_keep_the_words(tmp_path):
    samples, requests = unseen_questions(seed=5, size=Size(1, 4, 1, 1))
    for request, other, grey in zip(requests, shuffled(requests), (blanked(request, tmp_path) for request in requests), strict=True):
        words = [[part["text"] for part in one.messages[-1]["content"] if part["type"] == "text"] for one in (request, other, grey)]
        assert words[0] == words[1] == words[2] and n_images(request) == n_images(other) == n_images(grey)
    assert all(family_of(sample.question) in TRAINED for sample in samples)
