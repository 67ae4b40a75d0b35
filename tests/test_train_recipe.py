"""Recipes: what they refuse, where values come from, and that their targets are there."""
from dataclasses import replace

import pytest
import torch
import transformers as hf
import yaml

from vlm_repro.core.assets import asset
from vlm_repro.core.tasks import TASKS
from vlm_repro.fitcoach.cross_attention import Looking, add_looking
from vlm_repro.models.checkpoint import read_config
from vlm_repro.models.families import FAMILIES
from vlm_repro.train.data import DataError, source_examples
from vlm_repro.train.kinds import kind_of
from vlm_repro.train.parts import count_parts, freeze, lora_targets
from vlm_repro.train.recipe import DEFAULT, GIVEN, Lora, RecipeError, Source, change, flat, identity, load_recipe, recipe_rows, recipes, save_recipe
from vlm_repro.train.render import get_mask
from vlm_repro.train.setup import training_arguments

NAMES = recipes()
PAPERS = {"mmwalk": {"published", "corrected", "small", "tiny"}, "roadbuddy": {"published", "lora", "full", "small", "tiny"}, "robointer": {"published", "small"},
          "gpt4scene": {"published", "small"}, "fitcoach": {"published", "segments", "full_workout", "align", "small", "tiny"}}


def tiny_net(name: str) -> torch.nn.Module:
    """The genuine architecture of a recipe's model, at tiny size."""
    recipe = load_recipe(name)
    if recipe.model == "tiny":
        folder = asset(f"tiny/{recipe.tiny}")
        return kind_of(read_config(folder)).net(folder, "float32")
    if recipe.model == "checkpoints/stream-vlm":
        return add_looking(hf.LlamaForCausalLM(hf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)), Looking((1,), 8))
    family = {"InternVL2": "internvl", "InternVL3": "internvl", "Qwen2.5": "qwen2_5_vl", "Qwen2": "qwen2_vl", "llava": "llava_onevision"}
    return FAMILIES[family[recipe.model.split("/")[1].split("-")[0]]]()[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_prints_and_survives_being_saved(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(save_recipe(recipe, tmp_path / "recipe.yaml")) == recipe
    assert all(key in repr(recipe) for key in ("tuning.", "learning_rate", "where from"))
    get_mask(recipe.mask)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_that_a_file_sets_says_where_it_comes_from(name):
    recipe = load_recipe(name)
    own = yaml.safe_load(asset(f"recipes/{name}.yaml").read_text())
    said = {key: origin for key, _, origin in recipe_rows(recipe)}
    for key in flat({k: v for k, v in own.items() if k not in ("base", "sources")}):
        assert said[key] != DEFAULT, f"{key} of {name}"
    assert all(text.startswith(("spec", "ours")) for text in own["sources"]), own["sources"]


def test_each_paper_has_its_published_and_a_small_recipe():
    for paper, variants in PAPERS.items():
        assert variants <= {name.partition("/")[2] for name in NAMES if name.startswith(f"{paper}/")}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_trains_is_there_on_the_genuine_architecture(name):
    recipe = load_recipe(name)
    if recipe.model == "tiny" and not (asset("tiny") / recipe.tiny / "config.json").exists():
        pytest.skip(f"the tiny checkpoint of {recipe.tiny} is not in this build")
    net = tiny_net(name)
    if not isinstance(recipe.tuning, Lora):
        counts = freeze(net, recipe.tuning.parts)
        assert {part for part, c in counts.items() if c.trainable} == {part for part in recipe.tuning.parts if counts[part].total}
        return
    targets = lora_targets(net, recipe.tuning.targets)
    assert targets and not any("visual" in t or "vision" in t or "projector" in t or "xattn" in t for t in targets)
    assert count_parts(net)["language_model"].total


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_becomes_arguments_that_the_installed_trainer_knows(name, tmp_path):
    here = {} if torch.cuda.is_available() else {"precision": "bf16"}
    recipe = load_recipe(name, deepspeed=None, **here)
    args = training_arguments(recipe, tmp_path, 10)
    assert (args.max_steps, args.learning_rate, args.weight_decay, args.seed) == (10, recipe.learning_rate, recipe.weight_decay, recipe.seed)
    assert (args.bf16, args.fp16, args.max_grad_norm) == (recipe.precision == "bf16", recipe.precision == "fp16", recipe.max_grad_norm)
    assert (args.eval_strategy, args.save_strategy) == ("no", "no"), "the steps of the recipe decide"
    with pytest.raises(TypeError, match="evaluation_strategy"):
        hf.TrainingArguments(output_dir=str(tmp_path), evaluation_strategy="epoch")


@pytest.mark.parametrize(("changes", "said"), [
    ({"lerning_rate": 1e-4}, "lerning_rate: unknown key; did you mean 'learning_rate'"),
    ({"tuning.rnk": 8}, "tuning.rnk: unknown key; did you mean 'rank'"),
    ({"tuning.method": "lorra"}, "tuning.method: 'lorra' is not possible; did you mean 'lora'"),
    ({"data.task": "mmwolk"}, "task: 'mmwolk' is not possible; did you mean 'mmwalk'"),
    ({"part_rates": {"visoin": 1e-5}}, "part_rates: 'visoin' is not possible; did you mean 'vision'"),
    ({"precision": "fp8"}, "precision: 'fp8' is not possible; did you mean"),
    ({"deepspeed.stage": 4}, "deepspeed.stage: 4 is not possible"),
    ({"learning_rate": "quick"}, "learning_rate: 'quick' is not a number"),
    ({"batch": 2.5}, "batch: 2.5 is not a whole number"),
    ({"batch": 0}, "batch: 0 is not possible; give 1 or more"),
    ({"packing": "yes"}, "packing: 'yes' should be true or false"),
    ({"save_every": "sometimes"}, "save_every: 'sometimes' is not possible; give a number of steps, epoch or never"),
    ({"micro_tokens": 100}, "micro_tokens: 100 is less than max_length"),
    ({"best": True}, "best: True needs something to look at; give eval_data and eval_every"),
    ({"data": []}, "data: a recipe needs at least one source"),
    ({"learning_rate": float("nan")}, "learning_rate: nan is not a finite number"),
    ({"epochs": float("inf")}, "epochs: inf is not a finite number"),
    ({"batch": float("inf")}, "batch: inf is not a finite number"),
    ({"betas": [0.9]}, "betas: (0.9,) is not possible; give two numbers"),
    ({"betas": [0.9, 1.5]}, "betas: 1.5 is not possible; give 0 or more, and less than 1"),
    ({"epsilon": -1}, "epsilon: -1.0 is not possible; give more than 0"),
    ({"warmup": 1.5}, "warmup: 1.5 is not possible; give a share below 1, or a whole number of steps"),
    ({"seed": -1}, "seed: -1 is not possible; give 0 or more"),
    ({"min_pixels": 9, "max_pixels": 8}, "min_pixels: 9 is not possible; give max_pixels (8) or less"),
    ({"tuning.dropout": 2}, "tuning.dropout: 2.0 is not possible; give 0 or more, and less than 1"),
    ({"tuning.alpha": -3}, "tuning.alpha: -3.0 is not possible; give more than 0"),
    ({"part_rates.vision": -1}, "part_rates.vision: -1.0 is not possible; give 0 or more"),
    ({"data.0.rate": 0}, "rate of mmwalk train: 0.0 is not possible; give more than 0"),
    ({"data.5.rate": 0.5}, "data.5.rate: there is no number 5; data has 1, counted from 0"),
    ({"data.0": "mmwalk"}, "data.0: name one key of a source, such as data.0.rate"),
    ({"batch.x": 3}, "batch.x: batch is "),
    ({"sources.batch": "me"}, "sources.batch: where values come from is said in a recipe file"),
])
def test_a_value_that_cannot_be_is_refused_with_what_can(changes, said):
    with pytest.raises(RecipeError) as e:
        load_recipe("mmwalk/published", **changes)
    assert said in str(e.value)


def test_a_record_made_by_hand_is_checked_as_well():
    recipe = load_recipe("mmwalk/tiny")
    for wrong in ({"learning_rate": float("nan")}, {"weight_decay": float("inf")}, {"max_grad_norm": float("nan")}, {"epochs": float("inf")}):
        with pytest.raises(RecipeError, match="is not possible"):
            replace(recipe, **wrong)


def test_one_source_of_several_is_changed_by_its_number():
    recipe = load_recipe("mmwalk/tiny", data=[{"task": "mmwalk"}, {"task": "mmwalk", "split": "val"}])
    assert [s.rate for s in change(recipe, **{"data.1.rate": 0.5}).data] == [1, 0.5]
    assert [s.rate for s in change(recipe, **{"data.rate": 0.5}).data] == [0.5, 0.5]


def test_an_unknown_recipe_is_answered_with_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'roadbuddy/published'"):
        load_recipe("roadbuddy/publishd")
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe("mine.yaml")


def test_a_file_of_ones_own_starts_from_another(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: mmwalk/published\ntuning: {rank: 4}\nlearning_rate: 5e-6\nsources: {my notes: [learning_rate]}\n")
    recipe = load_recipe(mine)
    assert (recipe.name, recipe.tuning.rank, recipe.tuning.alpha, recipe.learning_rate) == ("mine", 4, 32.0, 5e-6)
    assert (recipe.sources["learning_rate"], recipe.sources["tuning.rank"]) == ("my notes", "recipe mine")
    assert recipe.sources["tuning.alpha"] == load_recipe("mmwalk/published").sources["tuning.alpha"]


def test_a_recipe_that_leads_back_to_itself_is_refused(tmp_path):
    loop = tmp_path / "loop.yaml"
    loop.write_text(f"base: {loop}\n")
    with pytest.raises(RecipeError, match="its base leads back to itself"):
        load_recipe(loop)


def test_a_change_is_known_as_such_and_changes_the_identity():
    recipe = load_recipe("mmwalk/tiny")
    other = change(recipe, learning_rate=0.5)
    assert other.sources["learning_rate"] == GIVEN and identity(other) != identity(recipe)
    assert identity(change(recipe, report=["wandb"])) == identity(recipe)


def test_data_of_a_paper_that_is_not_here_is_refused():
    with pytest.raises(DataError, match="elsewhere: this package has the recipe of the paper, but not yet its data"):
        source_examples(Source("elsewhere"))
    assert {name.partition("/")[0] for name in NAMES} <= TASKS.keys(), "every paper with a recipe has data"
