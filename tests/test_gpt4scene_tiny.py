"""The tiny GPT4Scene checkpoint: a genuine Qwen2-VL that sees; its training parts fit together."""
import csv
import json

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from vlm_repro.core.assets import asset
from vlm_repro.gpt4scene.can_see import SETTINGS, best_constant, sights
from vlm_repro.gpt4scene.rows import BENCHMARKS, sample_of, val_row
from vlm_repro.gpt4scene.score_grounding import scene_boxes
from vlm_repro.gpt4scene.tiny_data import GRID, LABELS, NUMBERED, PLAIN, UNITS, Shown, Writer, corpus, draw_bank, positions, turns_about
from vlm_repro.gpt4scene.tiny_training import Recipe, answer_logits, answer_loss, code_eyes, draw_batch, match_heads, real_eyes, train_tiny
from vlm_repro.gpt4scene.tiny_vision import sight_of
from vlm_repro.gpt4scene.truth import Truth
from vlm_repro.gpt4scene.world import Size
from vlm_repro.models.protocol import load_model
from vlm_repro.models.tiny import build_tiny, train_tokenizer
from vlm_repro.models.tiny_sight import see
from vlm_repro.models.tiny_steps import make_codes

FOLDER = asset('tiny/gpt4scene')


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def bank():
    return draw_bank(3, 903)


@pytest.fixture(scope='module')
def shipped():
    return hf.AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32), hf.AutoProcessor.from_pretrained(FOLDER)


def test_it_is_a_small_genuine_qwen2_vl(shipped):
    model, processor = shipped
    assert type(model) is hf.Qwen2VLForConditionalGeneration
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 3_000_000
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 6e6
    assert json.loads((FOLDER/'card.json').read_text())['licence']
    assert [len(processor.tokenizer(t).input_ids) for t in ('<OBJ007>', ' red chair')] == [1, 1]


def test_the_measured_table_says_it_sees():
    with (FOLDER/'can_see.csv').open() as table: rows = list(csv.DictReader(table))
    assert {row['setting'] for row in rows} == set(SETTINGS)
    whole = [row for row in rows if row['setting'] == '8 frames, marks, BEV']
    assert [row['group'] for row in whole] == list(BENCHMARKS.values())
    for row in whole: assert int(row['n']) >= 300 and float(row['lower']) > max(float(row[name]) for name in ('constant', 'blank', 'shuffled')), row


def test_the_shipped_weights_see_in_rooms_they_never_saw():
    found = {line.group: line for line in sights(load_model('tiny', tiny='gpt4scene', dtype='float32'), seed=5, size=Size(train_rooms=0, val_rooms=8), limit=40)}
    assert list(found) == list(BENCHMARKS.values())
    for name in ('ScanQA', 'ScanRefer', 'Multi3DRefer', 'Scan2Cap'): assert found[name].accuracy > max(found[name].constant, found[name].blank), found[name]
    assert found['ScanRefer'].accuracy > found['ScanRefer'].shuffled + .1, found['ScanRefer']


def test_the_eyes_read_numbers_and_colours(shipped):
    found = sight_of(shipped[0], draw_bank(6, 904), make_codes(160, Recipe().seed, len(LABELS)))
    assert min(found[name][0] for name in ('number', 'colour')) > .7 and min(precision for _, precision in found.values()) > .25, found


def test_what_training_feeds_is_what_the_model_is_fed(shipped, bank):
    model, processor = shipped
    writer, shown = Writer(processor.tokenizer), Shown(0, (0, 4))
    example = writer.write(shown, turns_about(bank.rooms[0], np.random.default_rng(1), 3))
    pictures = [Image.fromarray(bank.bev[0, 1]), *(Image.fromarray(bank.frames[0, 1, i]) for i in shown.frames)]
    inputs = processor.image_processor(pictures, return_tensors='pt')
    ids = torch.from_numpy(example.ids)[None]
    with torch.inference_mode():
        own = torch.cat([see(model.model.visual, torch.from_numpy(np.array(p)[None]))[0] for p in pictures])
        assert torch.allclose(own, model.model.visual(inputs['pixel_values'], inputs['image_grid_thw']).pooler_output, atol=1e-4)
        logits, labels, _ = answer_logits(model, writer, [example], bank, real_eyes(model))
        expected = model(input_ids=ids, mm_token_type_ids=(ids == writer.image).int(), **inputs).logits[0]
        target = torch.from_numpy(example.labels)[1:] >= 0
    torch.testing.assert_close(logits, expected[:-1][target], atol=1e-3, rtol=1e-3)
    assert torch.equal(labels, ids[0, 1:][target])


def test_positions_are_those_of_the_model(shipped, bank):
    writer, shown = Writer(shipped[1].tokenizer), Shown(0, tuple(range(8)))
    example = writer.write(shown, turns_about(bank.rooms[0], np.random.default_rng(1), 2))
    ids = torch.from_numpy(example.ids)[None]
    expected, _ = shipped[0].model.get_rope_index(ids, mm_token_type_ids=(ids == writer.image).int(), image_grid_thw=torch.tensor([[1, 2*r, 2*c] for r, c in shown.grids]))
    assert np.array_equal(expected[:, 0].numpy(), positions(example.ids == writer.image, shown.grids))


def test_labels_lie_where_numbers_stand(bank):
    assert bank.bev_labels.shape[1] == GRID['bev'][0]*GRID['bev'][1] and bank.frame_labels.shape[2] == GRID['frame'][0]*GRID['frame'][1]
    for room, labels in zip(bank.rooms, bank.bev_labels, strict=True):
        shown = {i for i in NUMBERED if labels[:, i].any()}
        assert len(shown) == len(room.sources.scenes[room.name].proposals)
    assert not np.array_equal(bank.bev[:, 0], bank.bev[:, 1])


def test_pictures_without_numbers_are_asked_questions_only(bank):
    asked = [task for room in bank.rooms for task, *_ in turns_about(room, np.random.default_rng(0), 100, marked=False)]
    assert asked and set(asked) == set(PLAIN)
    assert {task for room in bank.rooms for task, *_ in turns_about(room, np.random.default_rng(0), 100)} == set(BENCHMARKS)


def test_a_word_looks_at_what_it_names(bank):
    "Before any training, the first head brings back the number of the object that a word names."
    tokenizer = train_tokenizer(corpus(bank.rooms), 1024, UNITS)
    model, writer, codes = build_tiny(tokenizer, 0, theta=1e6), Writer(tokenizer), make_codes(160, 0, len(LABELS))
    match_heads(model, writer, codes, 0)
    layer, piece = model.model.language_model.layers[0], bank.rooms[0].room.pieces[0]
    word, first = (model.get_input_embeddings().weight[writer.encode(t)[0]] for t in (f' {piece.name}', '<|im_start|>'))
    shown = code_eyes(codes, 0.)(bank, Shown(0, ()))
    rows = layer.input_layernorm(torch.cat([first[None], shown, word[None]]))
    q, k = (proj(rows)[:, :layer.self_attn.head_dim] for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    looked = (q[-1] @ k.T/layer.self_attn.head_dim**.5)[:-1].argmax()
    names = [LABELS[i] for i in np.flatnonzero(bank.bev_labels[0, int(looked) - 1])]
    assert f'kind:{piece.kind}' in names and f'colour:{piece.colour}' in names


def test_a_miniature_run_learns_and_leaves_a_checkpoint(bank, tmp_path):
    small = Recipe(rooms=3, see_steps=3, read_steps=6, join_steps=2, rooms_a_step=2, questions=2)
    out = train_tiny(tmp_path/'out', small, bank, bank, every=3)
    with (out/'training_log.csv').open() as log: rows = list(csv.DictReader(log))
    assert [row['stage'] for row in rows] == ['see', 'read', 'read', 'join'] and float(rows[2]['loss']) < float(rows[1]['loss'])
    assert load_model(str(out)).describe()['class'] == 'Qwen2VLForConditionalGeneration'


def test_a_loss_is_that_of_its_examples(bank):
    tokenizer = train_tokenizer(corpus(bank.rooms), 1024, UNITS)
    model, writer, eyes = build_tiny(tokenizer, 0, theta=1e6), Writer(tokenizer), code_eyes(make_codes(160, 0, len(LABELS)), 0.)
    torch.manual_seed(0)
    examples = draw_batch(writer, bank, np.random.default_rng(0), Recipe(rooms_a_step=2), .9)
    logits, labels, weights = answer_logits(model, writer, examples, bank, eyes)
    assert len(labels) == sum(int((e.labels[1:] >= 0).sum()) for e in examples) and answer_loss(logits, labels, weights).item() > 0


def test_the_best_constant_answer_is_found():
    held = Truth(scene_boxes({'s': [[0, 0, 0, 1, 1, 1], [5, 0, 0, 1, 1, 1]]}, {'s': [[0, 0, 0, 1, 1, 1], [5, 0, 0, 1, 1, 1]]}))
    rows = [sample_of('scanrefer', i, val_row({'scene_id': 's', 'prompt': '?', 'obj_id': o})) for i, o in enumerate((1, 1, 0))]
    assert best_constant(rows, held) == pytest.approx(2/3)
    words = [sample_of('scanqa', i, val_row({'scene_id': 's', 'prompt': '?', 'ref_captions': [a]})) for i, a in enumerate(('yes', 'no', 'yes', 'yes'))]
    assert best_constant(words, held) == .75
