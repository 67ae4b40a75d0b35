"""mmWalk's prompts: input settings, shots, layouts, where their words come from."""
import json

import pytest
from mmwalk_files import HEADER, chat, make_root, real_root

from vlm_repro.core.media import MediaError
from vlm_repro.core.records import MediaRef, digest
from vlm_repro.mmwalk.annotations import RecordError, chat_sample
from vlm_repro.mmwalk.data import load
from vlm_repro.mmwalk.predictions import predicted_record
from vlm_repro.mmwalk.prompt import (
    LAYOUTS,
    VIEWS,
    PromptSettings,
    in_test_form,
    record_messages,
    record_prompt,
    render,
    rewrite_text,
    select_media,
    tagged_content,
    user_content,
    views_sentence,
)
from vlm_repro.mmwalk.shots import shots_for

FRAMES = '/data/QAFrames'


@pytest.fixture
def sample():
    return chat_sample(chat('H1'))


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path/'mmwalk')


def images(turn):
    return [p['image'].removeprefix(FRAMES + '/') for p in turn['content'] if p['type'] == 'image']


@pytest.mark.parametrize('views, kept', [
    ('normal', ['walker/rgb', 'drone/rgb', 'dog/rgb', 'walker/depth']), ('single', ['walker/rgb', 'walker/depth']),
    ('dog+', ['walker/rgb', 'dog/rgb', 'walker/depth']), ('drone+', ['walker/rgb', 'drone/rgb', 'walker/depth'])])
def test_views_keep_the_order_of_the_record(sample, views, kept):
    assert [m.name for m in select_media(sample.media, views)] == kept
    assert [m.name for m in select_media(sample.media, views, keep_depth=False)] == kept[:-1]
    assert [m.name for m in select_media(sample.media[::-1], views)] == kept[::-1]


def test_a_setting_that_keeps_nothing_is_an_error(sample):
    with pytest.raises(RecordError, match='views=single.*leave none of drone/rgb'): select_media([MediaRef('x', 'image', 'drone/rgb')], 'single')


@pytest.mark.parametrize('name, value', [('views', 'Normal'), ('layout', 'vllm'), ('depth_mode', 'raw'), ('keep_depth', 'yes'), ('rewrite_hint', None)])
def test_unknown_settings_list_the_valid_ones(name, value):
    valid = {'views': VIEWS, 'layout': LAYOUTS, 'depth_mode': ('compat', 'clip')}.get(name, ('True', 'False'))
    with pytest.raises(ValueError, match=name) as caught: PromptSettings(**{name: value})
    assert all(str(v) in str(caught.value) for v in valid)


def test_the_released_text_is_shown_unchanged_and_absolute_paths_are_below_the_frames(sample):
    request = render(sample, FRAMES, PromptSettings(depth_mode='clip'))
    (turn,) = request.messages
    assert turn['content'][-1] == {'type': 'text', 'text': sample.meta['text']} and request.id == sample.id
    assert images(turn) == [m.path for m in sample.media]
    assert [p.get('depth_mode') for p in turn['content']] == [None, None, None, 'clip', None]


def test_a_path_that_leaves_the_frames_is_refused(sample):
    from dataclasses import replace
    with pytest.raises(MediaError, match='leaves the data root'): render(replace(sample, media=(MediaRef('../secret.png', 'image', 'walker/rgb'),)), FRAMES)


def test_rewriting_names_the_images_given_and_nothing_else_changes(sample):
    media = select_media(sample.media, 'drone+')
    text = render(sample, FRAMES, PromptSettings(views='drone+', rewrite_hint=True)).messages[-1]['content'][-1]['text']
    assert text == views_sentence(media) + '\n' + sample.meta['text'].split('\n', 1)[1]
    assert 'dog' not in text and "3 images: the walker's view, the drone's view and the walker's depth map" in text
    assert rewrite_text('Question: alone?', media[:1]) == "One moment of a walk is shown in 1 image: the walker's view.\nQuestion: alone?"


def test_shots_are_earlier_turns_in_the_form_of_the_question(root):
    test, train = load(root), load(root, 'train')
    sets = shots_for(train, test, 3)
    question = next(s for s in test.samples if s.meta['category'] == 'M2')
    request = render(question, test.frames, PromptSettings(views='dog+'), sets['M2'])
    assert [m['role'] for m in request.messages] == ['user', 'assistant'] * 3 + ['user']
    for shot, user, answer in zip(sets['M2'], request.messages[::2], request.messages[1::2]):
        assert user['content'][-1]['text'] == f'{HEADER}Question: {shot.question}' and '<image>' not in user['content'][-1]['text']
        assert answer['content'] == [{'type': 'text', 'text': shot.gold}] and len(user['content']) == 4
    assert render(question, test.frames, PromptSettings(views='dog+')).messages == request.messages[-1:]


def test_provenance(root):
    from dataclasses import replace
    test, train = load(root), load(root, 'train')
    own = test.samples[0]
    paper = replace(own, meta={**own.meta, 'release': 'v2'})
    said = lambda s, shots=(), **settings: render(s, FRAMES, PromptSettings(**settings), shots).provenance
    assert said(own) == said(replace(own, meta={**own.meta, 'release': 'world'})) == 'ours'
    assert said(paper) == said(paper, views='single') == said(paper, keep_depth=False) == 'verbatim'
    assert said(paper, train.samples[:1]) == said(paper, rewrite_hint=True) == 'ours'
    assert said(paper, layout='lmdeploy<=0.10') == said(paper, layout='lmdeploy>=0.11') == 'paraphrase'


def test_lmdeploy_layouts_number_the_images_and_place_them(sample):
    before, after = (render(sample, FRAMES, PromptSettings(layout=f'lmdeploy{v}')).messages[0]['content'] for v in ('<=0.10', '>=0.11'))
    prompt = ''.join(f'Image-{i}: <image>\n' for i in range(1, 5)) + sample.meta['text']
    assert [p['type'] for p in before] == ['image'] * 4 + ['text'] and before[-1]['text'] == '\n' + prompt
    assert [p['type'] for p in after] == ['text'] + ['image', 'text'] * 4 and after[0]['text'] == prompt
    with pytest.raises(ValueError, match='hf, lmdeploy<=0.10'): user_content([], 'x', 'lmdeploy')


def test_training_layout_puts_images_at_their_tags(root):
    shown = load(root, 'train').samples[0]
    (turn,) = render(shown, FRAMES, PromptSettings(layout='training')).messages
    assert images(turn) == [m.path for m in shown.media]
    assert ''.join('<image>' if p['type'] == 'image' else p['text'] for p in turn['content']) == shown.meta['text']
    with pytest.raises(RecordError, match='2 <image> tags for 1 images'): tagged_content([{'type': 'image'}], '<image><image>')


def test_training_and_test_layouts_are_not_mixed_up(root, sample):
    shown = load(root, 'train').samples[0]
    for bad in (lambda: render(shown, FRAMES), lambda: render(sample, FRAMES, PromptSettings(layout='training')),
                lambda: render(shown, FRAMES, PromptSettings(layout='training', views='single')), lambda: render(shown, FRAMES, PromptSettings(layout='training'), [shown])):
        with pytest.raises(ValueError): bad()
    assert in_test_form(shown, sample.meta['text']).meta['text'] == f'{HEADER}Question: {shown.question}'


def test_a_literal_tag_in_a_test_question_stays_text():
    tagged = chat_sample(chat('E2', question='Is <image> one of them?'))
    assert render(tagged, FRAMES).messages[0]['content'][-1]['text'].endswith('Is <image> one of them?')


def test_raw_records_of_odd_shapes():
    record = {'conversation': [{'role': 'user', 'content': [{'type': 'text', 'text': ' a '}, {'type': 'image', 'image': 'x'}, {'type': 'text', 'text': 'b'}]},
                               {'role': 'assistant', 'content': 'gold'}], 'kept': {'a': [1]}}
    before = json.dumps(record)
    assert record_messages(record)[0]['content'] == [{'type': 'image', 'image': 'x'}, {'type': 'text', 'text': ' a '}]
    assert record_prompt(record) == ('Image-1: <image>\na', ['x'])
    assert predicted_record(record, ' y ', strip=True)['conversation'][1]['content'] == [{'type': 'text', 'text': 'y'}]
    assert predicted_record(record, 'y')['kept'] == record['kept'] and json.dumps(record) == before
    with pytest.raises(RecordError, match='no text item'): record_prompt({'conversation': [{'content': []}]})


def test_real_prompts_are_verbatim_and_stable():
    data = load(real_root())
    requests = [render(s, FRAMES) for s in data.samples]
    assert {r.provenance for r in requests} == {'verbatim'}
    assert all(r.messages[0]['content'][-1]['text'] == s.meta['text'] and len(r.messages[0]['content']) == 5 for r, s in zip(requests, data.samples))
    assert len({digest(r.messages) for r in requests}) == len(requests)
