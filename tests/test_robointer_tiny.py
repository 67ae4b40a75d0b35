"The shipped tiny Qwen2.5-VL: what its table says, that it sees, and that training data are what the model will meet."
import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_repro.core.assets import asset
from vlm_repro.models.protocol import load_model, tiny_checkpoint
from vlm_repro.robointer.can_see import TASKS, can_see, constant_overlap, mean_boxes, overlap
from vlm_repro.robointer.data import load
from vlm_repro.robointer.prompt import render_all
from vlm_repro.robointer.tiny_data import GRIDS, LABELS, PIXELS, Writer, asked_about, draw_views, positions
from vlm_repro.robointer.tiny_vision import see
from vlm_repro.robointer.world import Size, default_world


@pytest.fixture(scope='module')
def model():
    torch.set_num_threads(1)
    return load_model('tiny', tiny='robointer', dtype='float32')


def test_table_beside_the_weights():
    with asset('tiny/robointer/can_see.csv').open(newline='') as f: rows = list(csv.DictReader(f))
    assert [r['group'] for r in rows] == ['all', *TASKS]
    for r in rows:
        assert int(r['clusters']) >= 100 and r['sees'] == 'True'
        assert float(r['lower']) > max(float(r[k]) for k in ('constant', 'blank', 'shuffled'))

def test_card_tells_what_was_left_out():
    card = json.loads((tiny_checkpoint('robointer')/'card.json').read_text())
    assert 'contact_box' in card['left_out_tasks'] and set(TASKS) <= set(card['trained_tasks'])

def test_it_is_the_papers_architecture(model):
    about = model.describe()
    assert 'Qwen2_5_VLForConditionalGeneration' in str(about)

@pytest.mark.slow
def test_it_sees():
    lines = can_see(size=Size(14, 2))
    assert lines[0].sees and lines[0].lower > .2

def test_constant_box_is_no_sight():
    samples = load(default_world(), ','.join(TASKS)).samples
    assert 0 < constant_overlap(samples, mean_boxes(samples)) < .15

def test_unread_answers_overlap_nothing():
    sample = load(default_world(), 'current_box').samples[0]
    assert overlap(sample, sample.gold) == 1 and overlap(sample, 'no idea') == 0

def test_wrong_task():
    with pytest.raises(ValueError, match='asks for no box'): can_see(tasks=('traj',))

def test_eyes_of_training_are_those_of_the_model(model):
    "The rectangular pass over pixels gives the visual tokens that the processor and the model give of the stored file."
    data = load(default_world(), 'current_box')
    for sample in data.samples[:4]:
        prepared = model.preparer.image_processor(images=[Image.open(f'{data.frames}/{sample.media[0].path}')], return_tensors='pt')
        with torch.no_grad(): own = model.net.model.visual(prepared['pixel_values'].float(), grid_thw=prepared['image_grid_thw']).pooler_output
        rows, columns = GRIDS[sample.meta['source']]
        assert own.shape[0] == rows*columns and tuple(prepared['image_grid_thw'][0][1:] * 14) == PIXELS[sample.meta['source']]

def test_positions_are_those_of_the_model(model):
    view = draw_views(1, 3)[0]
    writer = Writer(model.preparer.tokenizer)
    asked = asked_about(view, np.random.default_rng(0), 2, 0.)
    ids = writer.write(view, asked, newline=True).ids
    rows, columns = GRIDS[view.episode.source]
    own, _ = model.net.model.get_rope_index(torch.from_numpy(ids)[None], torch.from_numpy((ids == writer.image).astype(int))[None], image_grid_thw=torch.tensor([[1, 2*rows, 2*columns]]))
    assert torch.equal(own[:, 0], torch.from_numpy(positions(ids == writer.image, (rows, columns))))

def test_training_text_is_what_the_template_gives(model):
    data = load(default_world(), 'gripper_det')
    request = render_all(data.samples[:1], data.frames)[0]
    text = request.messages[0]['content'][-1]['text']
    writer = Writer(model.preparer.tokenizer)
    view = draw_views(2, 3)[data.samples[0].meta['source'] == 'rh20t']
    ids = writer.write(view, [(text, data.samples[0].gold)], newline=False).ids
    shown = model.show(request)
    assert writer.tokenizer.decode(ids).replace('<|image_pad|>', '').startswith(shown.replace('<|image_pad|>', ''))

def test_token_truth(model):
    view = draw_views(1, 9)[0]
    assert view.truth[:, :len(LABELS)].sum() == len(view.episode.things) + 1
    with torch.no_grad(): tokens = see(model.net.model.visual, torch.from_numpy(view.pixels.copy()[None]))
    assert tokens.shape[1] == len(view.truth)
