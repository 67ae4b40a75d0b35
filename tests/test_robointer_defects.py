"RoboInter's table of defects: every row names a test that there is, and what the training script is said to do is what its switches do."
import ast
import csv
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from vlm_repro.models.families import FAMILIES
from vlm_repro.robointer.mixture import draw_records, published_epoch
from vlm_repro.robointer.switches import SCRIPT, apply_switches, published_name
from vlm_repro.train.parts import freeze
from vlm_repro.train.recipe import load_recipe
from vlm_repro.train.setup import deepspeed_file

torch.set_num_threads(1)


def test_every_row_names_a_test_that_there_is():
    known = {node.name for path in Path(__file__).parent.glob('test_*.py') for node in ast.parse(path.read_text(encoding='utf-8')).body if isinstance(node, ast.FunctionDef)}
    rows = list(csv.DictReader((files('vlm_repro')/'assets'/'robointer'/'defects.csv').read_text('utf-8').splitlines()))
    assert len({r['id'] for r in rows}) == len(rows) == 27 and all(all(r.values()) for r in rows)
    assert {r['test'] for r in rows} <= known
    assert {r['stage'] for r in rows} == {'data', 'prompt', 'generate', 'extract', 'score', 'train', 'model'}


def test_the_script_trains_next_to_nothing_and_the_recipe_the_language_model():
    net = FAMILIES['qwen2_5_vl']()[0]
    assert all(published_name(n).startswith('lm_head') for n in apply_switches(net, SCRIPT))
    net.requires_grad_(True)
    freeze(net, load_recipe('robointer/published').tuning.parts)
    trained = [published_name(n) for n, p in net.named_parameters() if p.requires_grad]
    assert any(n.startswith('model.layers') for n in trained) and not any(n.startswith('visual') for n in trained)


def test_script_and_paper_are_two_recipes():
    found = [(r.learning_rate, r.batch) for r in map(load_recipe, ('robointer/published', 'robointer/paper'))]
    assert found == [(5e-6, 64), (3e-6, 128)]


def test_processes_of_the_released_run_see_some_records_twice():
    seen = published_epoch(400, .5, range(8))
    assert seen.max() > 1 and (seen == 0).sum() > 400 - 200 and seen.sum() == 200
    assert len(np.unique(draw_records(400, .5, 0, 'x'))) == 200


def test_deepspeed_clips_and_schedules_as_the_recipe_says():
    made = deepspeed_file(load_recipe('robointer/published'))
    assert made['gradient_clipping'] == 'auto' and 'scheduler' not in made and 'gather_16bit_weights_on_model_save' not in made['zero_optimization']
    assert json.loads(json.dumps(made))['zero_optimization']['stage'] == 3 and load_recipe('robointer/published').max_grad_norm == 1
