"""Shared beginnings of prompts: found, encoded once, and without a trace in the answers."""
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_repro.core.records import Request
from vlm_repro.models.choices import by_likelihood
from vlm_repro.models.families import random_checkpoint
from vlm_repro.models.prefix import prefix_keys
from vlm_repro.models.protocol import Prepared, Staged, load_model

torch.set_num_threads(1)
SIZES = ((120, 90), (60, 110), (90, 90), (150, 60), (70, 70), (56, 84))


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp('families'), {}

    def get(family):
        if family not in made: made[family] = random_checkpoint(family, root/family)
        return made[family]
    return get


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp('pictures')
    for i, (w, h) in enumerate(SIZES):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(root/f'{i}.png')
    return [str(root/f'{i}.png') for i in range(len(SIZES))]


def user(text, *images): return {'role': 'user', 'content': [{'type': 'image', 'image': i} for i in images] + [{'type': 'text', 'text': text}]}


def said(text): return {'role': 'assistant', 'content': [{'type': 'text', 'text': text}]}


def request(id, *messages): return Request(id, list(messages), 'ours')


def test_the_two_halves_are_generate(folders, pictures, tmp_path):
    model = load_model(str(folders('qwen2_vl')), max_model_len=200)
    asked = [request('a', user('What is this?', pictures[0])), request('torn', user('And this?', str(tmp_path/'none.png'))),
             request('long', user('Tell me everything. '*20, pictures[1])), request('b', user('Is the sky blue?'))]
    ready = model.prepare(asked)
    assert isinstance(model, Staged) and isinstance(ready, Prepared) and len(ready) == 4
    whole = model.generate(asked, 4)
    assert model.answer(ready, 4) == whole
    assert [g.id for g in whole] == ['a', 'torn', 'long', 'b']
    assert [(g.error or 'ok').split(':')[0] for g in whole] == ['ok', 'media', 'overflow', 'ok']
    assert (model.answer(model.prepare([]), 4), model.answer(ready, 300)[0].error.split(':')[0]) == ([], 'overflow')


def test_the_first_half_runs_beside_the_second(folders, pictures):
    model = load_model(str(folders('qwen2_vl')))
    batches = [[request(f'{i}{j}', user(f'What is {i}?'*(1 + i % 3), pictures[(i + j) % 6])) for j in range(2)] for i in range(6)]
    expected = [model.generate(b, 3) for b in batches]
    ready = {}
    thread = threading.Thread(target=lambda: ready.update((i, model.prepare(b)) for i, b in enumerate(batches)))
    thread.start()
    while thread.is_alive(): assert model.generate(batches[0], 3) == expected[0]
    assert [model.answer(ready[i], 3) for i in range(6)] == expected


def test_a_chooser_has_halves_too(folders, pictures):
    chooser = by_likelihood(load_model(str(folders('internvl'))), {'a': ['A', 'B'], 'b': ['A', 'B', 'C']})
    asked = [request('a', user('A or B?', pictures[0])), request('b', user('A, B or C?', pictures[0]))]
    assert isinstance(chooser, Staged)
    assert chooser.answer(chooser.prepare(asked), 1) == chooser.generate(asked, 1)
    assert chooser.prefix_keys(asked[0]) == chooser.prefix_keys(asked[1]) != ()


def test_keys_name_what_two_conversations_begin_with():
    shots = [user('Raining?', 'wet.png'), said('Yes'), user('Raining?', 'dry.png'), said('No')]
    one, two = prefix_keys([*shots, user('A bench?', 'park.png')]), prefix_keys([*shots, user('A tree?', 'park.png')])
    assert one == two and len(one) == len(set(one)) == 5
    assert prefix_keys([*shots[:2], user('A tree?', 'park.png')])[:2] == one[:2]
    assert prefix_keys([*shots, user('A tree?', 'street.png')])[:4] == one[:4]
    assert prefix_keys([*shots, user('A tree?', 'street.png')])[4] != one[4]
    assert prefix_keys([*shots, user('A tree?')]) == one[:4]
    assert prefix_keys([{'role': 'system', 'content': 'Be brief.'}, *shots, user('A bench?', 'park.png')])[0] != one[0]


def test_keys_tell_frames_depth_modes_and_wordings_apart():
    def key(**part): return prefix_keys([{'role': 'user', 'content': [{'type': 'text', 'text': 'Frame1:'}, {'type': 'image', 'image': 'v.mp4', **part}, {'type': 'text', 'text': '?'}]}])
    assert len({key(), key(frame=1), key(frame=2), key(depth_mode='clip')}) == 4
    assert prefix_keys([user('Is it blue?')]) == prefix_keys([{'role': 'user', 'content': 'Is it blue?'}]) == ()
