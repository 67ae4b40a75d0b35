"""GPT4Scene before the model: sizes of pictures, which pictures, prompts, training conversations, their lengths, recipes."""
import json

import numpy as np
import pytest
from PIL import Image

from vlm_repro.core.jsonl import DataError
from vlm_repro.core.media import MediaError
from vlm_repro.core.parts import open_parts, part_size
from vlm_repro.core.records import Generation, MediaRef
from vlm_repro.gpt4scene.extract import extract, tidied
from vlm_repro.gpt4scene.images import ImageSettings, fewer_frames, is_bev, rounded, shown_size, sized_part, training_size, truncated_lengths
from vlm_repro.gpt4scene.lengths import PictureCounter, tally, token_lengths
from vlm_repro.gpt4scene.prompt import ZERO_SHOT, PromptSettings, read_texts, render
from vlm_repro.gpt4scene.recipes import SOURCES, differences
from vlm_repro.gpt4scene.rows import BENCHMARKS, sample_of, val_row
from vlm_repro.gpt4scene.task import Gpt4SceneSettings, prompt_settings
from vlm_repro.gpt4scene.train_data import conversations, described, find_training
from vlm_repro.gpt4scene.views import plan_frames, view_path
from vlm_repro.gpt4scene.world import list_name, training_name
from vlm_repro.gpt4scene.zero_shot import grid_of
from vlm_repro.models.inputs import VisualCounter
from vlm_repro.models.prefix import prefix_keys
from vlm_repro.models.tiny import build_processor, train_tokenizer
from vlm_repro.train.recipe import load_recipe
from vlm_repro.train.render import render_example

SCENE = 'scene0011_00'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A data root with one scene of 32 frames, larger than any limit."""
    root = tmp_path_factory.mktemp('root')
    rng = np.random.default_rng(0)
    for frame in (None, *range(32)):
        path = root/'data'/'images_2D'/view_path(SCENE, frame, True)
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (600, 600) if frame is None else (648, 484)
        Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize(size).save(path)
    names = [f'images_2D/{view_path(SCENE, frame, True)}' for frame in (None, *range(32))]
    told = [{'conversations': [{'from': 'human', 'value': '<image>'*33 + f'How many chairs? {k}'}, {'from': 'gpt', 'value': 'Four.'}], 'images': names} for k in range(5)]
    (root/'data'/training_name('mark_3D', 32)).write_text(json.dumps(told))
    return root


@pytest.fixture(scope='module')
def media():
    return tuple(MediaRef(f'images_2D/{view_path(SCENE, frame, True)}') for frame in (None, *range(32)))


@pytest.fixture(scope='module')
def processor():
    return build_processor(train_tokenizer(['How many chairs? Four.\nuser\nassistant\nsystem\n']*3), 602_112)


def ask(benchmark, media, prompt='What color is the sofa?'):
    return sample_of(benchmark, 3, val_row({'scene_id': SCENE, 'qid': 3, 'prompt': prompt, 'ref_captions': ['blue'], 'obj_id': 2}), media)


# ---- sizes

def test_an_image_is_resized_once_from_the_original(folder, media):
    path = folder/'data'/media[1].path
    part = sized_part(path, 512)
    assert part['size'] == [504, 392] and part_size(part) == (504, 392)
    assert np.array_equal(np.asarray(open_parts([part])[0]), np.asarray(Image.open(path).convert('RGB').resize((504, 392), Image.Resampling.BICUBIC)))
    assert sized_part(path, 0) == {'type': 'image', 'image': str(path)}


def test_training_shrinks_by_nearest_neighbour_and_leaves_rounding_to_the_processor(folder, media, processor):
    path = folder/'data'/media[1].path
    part = sized_part(path, 512, 'training')
    assert (part['size'], part['resample']) == ([512, 382], 'nearest')
    both = [PictureCounter(processor)((part_size(p),))[0] for p in (part, sized_part(path, 512))]
    assert both == [252, 252]
    assert 'size' not in sized_part(path, 1000, 'training')


def test_a_shape_that_evaluation_refuses_is_left_to_be_refused(tmp_path, processor):
    Image.new('RGB', (2000, 8)).save(tmp_path/'long.png')
    with pytest.raises(ValueError, match='aspect ratio'): shown_size((2000, 8), 512)
    assert 'size' not in sized_part(tmp_path/'long.png', 512)
    assert rounded(training_size((2000, 8), 512)) == (504, 28)
    with pytest.raises(MediaError, match='no such file'): open_parts([sized_part(tmp_path/'gone.png', 512)])


def test_what_llama_factory_would_cut_is_not_cut_here(folder, processor):
    asked = conversations(folder, 32, True, ImageSettings(size=512, shrink='training'))[0]
    length = next(token_lengths([asked], processor))[1].total
    assert truncated_lengths(length - 3, 3, 4096) == (4093, 3)
    from vlm_repro.train.render import Dropped
    with pytest.raises(Dropped, match='max_length 4096'): render_example(processor, asked, max_length=4096)


@pytest.mark.parametrize('bad', [{'size': 27}, {'size': -1}, {'shrink': 'half'}, {'bev': 1.5}, {'zero_shot': 'yes'}, {'texts': 'x.json'}])
def test_impossible_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))): PromptSettings(**bad)


# ---- which pictures

@pytest.mark.parametrize('n', [1, 2, 4, 8, 16, 32])
def test_frames_are_chosen_evenly_and_the_view_from_above_stays(media, n):
    kept = fewer_frames(media, n)
    assert is_bev(kept[0]) and len(kept) == n + 1 and kept[1] == media[1]
    assert list(kept[1:]) == list(media[1::32//n])


@pytest.mark.parametrize('total', [1, 5, 7, 20, 31])
def test_a_scene_with_other_numbers_of_frames_keeps_the_published_rule(media, total):
    kept = fewer_frames(media[:total + 1], 8)
    assert kept[0] == media[0] and list(kept[1:]) == [media[1 + i] for i in plan_frames(total, 8)] and len(kept) == 1 + min(total, 8)
    assert fewer_frames(media[:1], 8) == (media[0],)
    with pytest.raises(ValueError, match='0 frames'): fewer_frames(media, 0)


def test_what_the_builder_writes_is_told_apart():
    assert is_bev(MediaRef(view_path(SCENE, None, True))) and is_bev(MediaRef(view_path(SCENE, None, False)))
    assert not is_bev(MediaRef(view_path(SCENE, 30, True))) and not is_bev(MediaRef(f'images_3D/{SCENE}/000003.jpg'))
    assert [described(training_name(arm, 32)) for arm in ('mark_3D', '3D', 'mark', '')] == [(32, True, True), (32, False, True), (32, True, False), (32, False, False)]
    assert list_name('mark_3D', 32) == 'selected_images_mark_3D_val_32.json'


# ---- prompts

def test_one_user_turn_images_then_text(folder, media):
    asked = render(ask('scanqa', media), folder/'data', PromptSettings(size=128), official=True)
    (turn,) = asked.messages
    assert turn['role'] == 'user' and [p['type'] for p in turn['content']] == ['image']*33 + ['text'] and turn['content'][-1]['text'] == 'What color is the sofa?'
    assert asked.provenance == 'verbatim' and render(ask('scanqa', media), folder/'data').provenance == 'ours'


def test_all_questions_about_a_scene_begin_alike(folder, media):
    keys = {prefix_keys(render(ask(b, media, f'{b}?'), folder/'data').messages) for b in BENCHMARKS}
    assert len(keys) == 1 and len(keys.pop()) == 1


def test_a_zero_shot_prompt_explains_what_it_shows(folder, media, tmp_path):
    grid = grid_of(fewer_frames(media, 8), folder/'data', 128, tmp_path)
    assert Image.open(grid['image']).size == (4*140 + 6, 2*84 + 2)
    for benchmark in BENCHMARKS:
        system, user = render(ask(benchmark, fewer_frames(media, 8)), folder/'data', PromptSettings(zero_shot=True), grid=grid).messages
        assert 'grid of 8 frames' in system['content'][0]['text'] and 'from above' in system['content'][0]['text']
        assert [p['type'] for p in user['content']] == ['image', 'image', 'text'] and ZERO_SHOT['instructions'][benchmark] in user['content'][-1]['text']
    system, user = render(ask('scanqa', fewer_frames(media, 8)), folder/'data', PromptSettings(zero_shot=True, bev=False), grid=grid).messages
    assert 'from above' not in system['content'][0]['text'] and [p['type'] for p in user['content']] == ['image', 'text']


@pytest.mark.parametrize('bev', [True, False])
def test_a_zero_shot_prompt_speaks_of_numbers_only_where_some_are_drawn(folder, media, bev):
    grid = {'type': 'image', 'image': 'x.png'}
    for benchmark in BENCHMARKS:
        texts = {}
        for marks in (True, False):
            system, user = render(ask(benchmark, media), folder/'data', PromptSettings(zero_shot=True, bev=bev, marks=marks), grid=grid).messages
            texts[marks] = system['content'][0]['text'], user['content'][-1]['text']
        assert 'A number is drawn on every object' in texts[True][0] and texts[True][0].startswith(texts[False][0])
        assert 'number' not in texts[False][0] and 'mark' not in texts[False][1] and ('from above' in texts[False][0]) == bev


def test_the_setting_of_a_run_reaches_its_prompt():
    for marks in (True, False): assert prompt_settings(Gpt4SceneSettings(marks=marks)).marks is marks


def test_texts_of_the_reader_make_a_prompt_verbatim_where_they_are_whole(folder, media, tmp_path):
    own = tmp_path/'own.json'
    own.write_text(json.dumps({'system': 'Look at {frames} frames.', 'instructions': {'scanqa': 'Short.'}, 'examples': {'scanqa': [['Q', 'A']]}}))
    settings, grid = PromptSettings(zero_shot=True, texts=str(own)), {'type': 'image', 'image': 'x.png'}
    made = {b: render(ask(b, media), folder/'data', settings, grid=grid) for b in ('scanqa', 'sqa3d')}
    assert [m.provenance for m in made.values()] == ['verbatim', 'paraphrase']
    assert made['scanqa'].messages[0]['content'][0]['text'] == 'Look at 32 frames.' and 'Question: Q\nAnswer: A' in made['scanqa'].messages[1]['content'][-1]['text']


@pytest.mark.parametrize('content', ['', '[]', '{}', '{"instruction": {}}', '{"instructions": {"vqa": "x"}}', '{"examples": {"scanqa": ["x"]}}', '{"system": 3}'])
def test_texts_that_cannot_be_used_are_refused(tmp_path, content):
    (tmp_path/'bad.json').write_text(content)
    with pytest.raises(DataError, match='bad.json'): read_texts(str(tmp_path/'bad.json'))


def test_readings():
    sample = ask('scanqa', ())
    made = Generation(sample.id, '**Answer**: Blue.\n\nBecause.', (1,), 9, 4, 1, '', '', 'stop')
    assert [a.value for a in extract([sample], [made], ('as_written@1', 'tidied@1'))] == ['**Answer**: Blue.\n\nBecause.', 'Blue.']
    assert tidied('Yes.\n1. <OBJ004>\n2. <OBJ005>', 'multi3dref') == 'Yes. 1. <OBJ004> 2. <OBJ005>'


# ---- training

def test_conversations_have_the_pictures_of_the_setting(folder):
    told = conversations(folder, 8, True, ImageSettings(size=128, bev=False, shrink='training'), limit=2)
    user, answer = told[0].messages
    assert len(told) == 2 and [p['type'] for p in user['content']] == ['image']*8 + ['text'] and answer['content'][0]['text'] == 'Four.'
    assert {tuple(p['size']) for p in user['content'][:8]} == {(128, 95)}
    with pytest.raises(DataError, match='without marks'): find_training(folder, 32, False)


def test_lengths_are_those_of_training_and_the_headers_are_read_once(folder, processor):
    held = conversations(folder, 8, True, ImageSettings(size=128, shrink='training'))
    assert next(token_lengths(held, processor))[1].total == render_example(processor, held[0]).length
    found = tally(held, processor)
    assert len(found) == 5 and found.over(10) == 5 and found.over(100_000) == 0 and '5' in repr(found)
    sizes = ((140, 112), (504, 504))*3
    assert PictureCounter(processor)(sizes) == VisualCounter(processor)(sizes)


def test_a_picture_that_is_gone_is_counted_and_named(folder, processor, tmp_path):
    held = conversations(folder, 8, True, ImageSettings(size=128))
    other = [held[0], type(held[0])('gone', [{'role': 'user', 'content': [{'type': 'image', 'image': str(tmp_path/'gone.jpg')}]}, held[0].messages[1]])]
    found = tally(other, processor)
    assert len(found) == 1 and found.lost == {'media': 1} and 'gone' in found.first['media']


def test_recipes_part_where_their_sources_part():
    apart = {d.key: d.values for d in differences()}
    assert apart['batch'] == ('64', '16', '32', '64') and len(set(apart['tuning.parts'])) == 3 and set(apart) == {'data', 'tuning.parts', 'batch', 'deepspeed.offload'}
    assert {load_recipe(f'gpt4scene/{n}').max_length for n in SOURCES} == {32768} and {load_recipe(f'gpt4scene/{n}').deepspeed.stage for n in SOURCES} == {3}
