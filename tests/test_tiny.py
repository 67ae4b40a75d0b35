"""The tiny mmWalk checkpoint in the package: it loads as any checkpoint, reads any text, and sees."""
import csv
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors import safe_open

from vlm_repro.core.assets import asset
from vlm_repro.mmwalk.can_see import CATEGORIES, answer_word, can_see
from vlm_repro.mmwalk.tiny_data import LAYOUTS, TALK, Recipe, Writer, corpus, draw_bank, gather_images, lone_turns, shot_turns
from vlm_repro.mmwalk.tiny_training import answer_loss, draw_batch, look, train_tiny
from vlm_repro.models.tiny import build_tiny, train_tokenizer
from vlm_repro.models.tiny_sight import see

torch.set_num_threads(1)
FOLDER = asset("tiny/mmwalk")


@pytest.fixture(scope="module")
def processor():
    return hf.AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return hf.AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_it_is_a_genuine_qwen2_vl(processor, model):
    assert (type(model), type(processor)) == (hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLProcessor)
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 3e6
    assert model.config.text_config.max_position_embeddings >= 4096 and processor.tokenizer.padding_side == "left"
    assert not model.generation_config.do_sample


def test_weights_are_small_and_half_precision():
    assert (FOLDER / "model.safetensors").stat().st_size < 6e6
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}


@pytest.mark.parametrize("size", [(400, 225), (1600, 900)])
def test_a_panorama_costs_16_to_32_visual_tokens(processor, size):
    grid = processor.image_processor([Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"]
    assert 16 <= int(grid.prod()) // 4 <= 32


@pytest.mark.parametrize("text", ["plain words", "What’s “this”? naïve – 12.5 m", "日本語 и кириллица\n\ttabs", "🙂 emoji", "<image>\nImage-1: <image>"])
def test_any_text_comes_back(processor, text):
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_fixed_sentences_are_short(processor):
    from vlm_repro.mmwalk.questions import HINTS, record_text

    assert all(len(processor.tokenizer(record_text(category, "Is there any bench around me?")).input_ids) < 16 for category in HINTS)


def test_the_card_says_what_was_left_out():
    card = json.loads((FOLDER / "card.json").read_text())
    recipe = card["recipe"]
    assert recipe["left_out_categories"] == ["E4", "M2", "M3", "H2"] and recipe["left_out_scenarios"] == ["Plaza"]
    assert card["steps_done"] == {"see": recipe["vision_steps"], "talk": recipe["talk"]["steps"], "read": recipe["read_steps"], "focus": recipe["focus"]["steps"]}
    assert json.loads(json.dumps(asdict(Recipe()))) == recipe, "train_tiny() makes what is shipped"
    with (FOLDER / "training_log.csv").open() as log:
        rows = list(csv.DictReader(log))
    assert {row["stage"]: int(row["step"]) for row in rows} == card["steps_done"]


def measured() -> dict:
    with (FOLDER / "can_see.csv").open() as table:
        return {(row["group"], int(row["setting"].split()[1])): row for row in csv.DictReader(table)}


def test_the_measured_table_is_whole_and_honest():
    rows = measured()
    assert {(category, shots) for category in CATEGORIES for shots in (0, 3)} == set(rows)
    for key, row in rows.items():
        above = float(row["lower"]) > max(float(row[name]) for name in ("constant", "blank", "shuffled"))
        assert int(row["n"]) >= 300 and (row["sees"] == "True") == above, key


@pytest.mark.parametrize("shots", [0, 3])
def test_it_sees(shots):
    assert all(measured()[category, shots]["sees"] == "True" for category in CATEGORIES)


def test_the_shipped_weights_see():
    """A seventh of the full measurement: the same table with wider intervals, so the bare accuracies are compared."""
    for line in can_see("tiny", n=42, shots=(0,)):
        assert line.accuracy > line.constant and line.accuracy > max(line.blank, line.shuffled), line
        assert abs(line.accuracy - float(measured()[line.group, 0]["accuracy"])) < 0.2, line


@pytest.mark.papers
@pytest.mark.parametrize("shots", [0, 3])
def test_the_shipped_weights_give_the_measured_table(shots):
    """Another seed: what the table says is seen is seen there too."""
    seen = [category for category in CATEGORIES if measured().get((category, shots), {}).get("sees") == "True"]
    assert "E1" in seen
    lines = can_see("tiny", seed=78, n=301, shots=(shots,), batch=32, categories=seen)
    assert all(line.sees for line in lines), lines


@pytest.mark.papers
@pytest.mark.parametrize("views", ["single", "dog+", "drone+"])
def test_the_other_views_work_too(views):
    lines = can_see("tiny", n=105, shots=(0,), views=views, categories=("E1", "E2", "H1"))
    assert all(line.accuracy > max(line.constant, line.blank, line.shuffled) for line in lines), lines


@pytest.mark.parametrize(("category", "text", "word"), [
    ("E1", "Forward Turning Left.", "forward turning left"), ("E2", "Yes, there is a pole.", "yes"), ("E2", "I do not know", ""),
    ("E3", "There is one gate.", "1"), ("E3", "many", ""), ("H1", "The scene is of high risk because of low light.", "high"), ("H1", "risk is high", ""),
])
def test_the_decisive_word(category, text, word):
    assert answer_word(category, text) == word


@pytest.fixture(scope="module")
def bank():
    return draw_bank(8, seed=9)


def test_the_training_path_is_the_models_own(bank, model, processor):
    writer = Writer(processor.tokenizer)
    example = writer.write(shot_turns(bank, np.random.default_rng(0), LAYOUTS["normal"], TALK.shares, 3))
    images = gather_images(bank, example.images, 0)
    inputs = processor.image_processor([Image.fromarray(image.numpy()) for image in images], return_tensors="pt")
    ids, labels = torch.from_numpy(example.ids)[None], torch.from_numpy(example.labels)[None]
    with torch.inference_mode():
        tokens = model.model.visual(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
        torch.testing.assert_close(see(model.model.visual, images).flatten(0, 1), tokens, atol=2e-3, rtol=1e-3)
        own = model(input_ids=ids, mm_token_type_ids=(ids == writer.image).int(), labels=labels, **inputs).loss
        torch.testing.assert_close(answer_loss(model, writer, [example], look(model, bank, [example])), own, atol=1e-3, rtol=1e-3)


def test_the_deciding_token_is_the_one_that_decides(bank, processor):
    writer, rng = Writer(processor.tokenizer), np.random.default_rng(1)
    turns = [turn for i in range(8) for turn in lone_turns(bank, rng, LAYOUTS["single"], TALK.mix, i) if turn.category]
    words = {(turn.category, processor.tokenizer.decode([writer.encode(turn.answer)[writer.deciding(turn)]]).strip()) for turn in turns}
    assert {word for category, word in words if category == "H1"} <= {"low", "moderate", "high"}
    assert {word for category, word in words if category == "E2"} <= {"Yes", "No"}
    assert all(word.isdigit() for category, word in words if category == "M1")
    assert all(word.isdigit() or word in ("one", "two", "three", "four", "five", "six") for category, word in words if category == "E3")


def test_left_out_categories_and_scenarios_stay_out():
    recipe = Recipe()
    bank = draw_bank(12, seed=1, left_out=recipe.left_out_scenarios)
    assert "Plaza" not in {scene.scenario for scene in bank.scenes}
    rng = np.random.default_rng(0)
    for phase in (recipe.talk, recipe.focus):
        assert not set(recipe.left_out_categories) & ({*phase.mix.times} | {*phase.shares})
        texts = [turn.text for step in (0, phase.steps - 1) for turns in draw_batch(bank, rng, phase, step, 4) for turn in turns]
        assert not [text for text in texts if "What is the color" in text or "Which view" in text or "Which landmarks" in text or "Describe" in text]


def test_training_makes_a_checkpoint_that_loads(bank, tmp_path):
    two = {"steps": 2, "horizon": 2}
    recipe = Recipe(scenes=8, vision_steps=2, vision_batch=4, talk=replace(TALK, **two), read_steps=2, focus=replace(Recipe().focus, **two), batch=2)
    folder = train_tiny(tmp_path / "new", recipe, bank, bank, workers=1, every=2, checks=16)
    assert hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).config.model_type == "qwen2_vl"
    with (folder / "training_log.csv").open() as log:
        assert [row["stage"] for row in csv.DictReader(log)] == ["see", "talk", "read", "focus"]


def test_a_tokenizer_is_the_same_each_time(bank):
    first, second = (train_tokenizer(corpus(bank)) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert torch.equal(*(build_tiny(tokenizer, 3).get_input_embeddings().weight for tokenizer in (first, second)))
