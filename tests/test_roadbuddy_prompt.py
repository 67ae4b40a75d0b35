"""Road Buddy's prompts: language, form, words, frames, and the likelihood of choices as an alternative to reading."""
import json
import unicodedata

import pytest
import torch
from PIL import Image
from roadbuddy_files import FOUR, TWO, question

from vlm_repro.core.jsonl import DataError
from vlm_repro.core.media import MediaError
from vlm_repro.core.records import MediaRef, Request
from vlm_repro.models.choices import by_likelihood, choice_ids
from vlm_repro.models.families import random_checkpoint
from vlm_repro.models.inputs import encode, tokenizer_of
from vlm_repro.models.protocol import ModelError, load_model
from vlm_repro.roadbuddy.frames import FramePlan, blank_plan, plan_frames
from vlm_repro.roadbuddy.prompt import FAMILIES, TEXTS, PromptSettings, detect_language, family_of, flat_text, question_text, read_texts, render

torch.set_num_threads(1)
ASKED = ['Biển báo này là gì?', 'Xe đi đâu?', 'Có được rẽ không?', 'Đúng hay sai']


def shown(*indices): return FramePlan(indices, None, tuple(i/30 for i in indices))


@pytest.mark.parametrize('asked', ASKED)
def test_decomposed_vietnamese_is_vietnamese_only_when_corrected(asked):
    apart = unicodedata.normalize('NFD', asked)
    assert detect_language(asked) == detect_language(apart) == detect_language(asked.upper()) == 'vi'
    assert detect_language(apart, 'as_published') == ('vi' if 'đ' in apart.lower() else 'en')


def test_other_languages():
    assert detect_language('Is the light red?') == 'en' and detect_language('Où est la gare ?') == 'vi' and detect_language('') == 'en'
    with pytest.raises(ValueError, match='detection='): detect_language('x', 'auto')


def test_every_form_is_reached_and_has_its_parts():
    reached = {family_of(asked, n, language, simple) for asked in (ASKED[0], 'Is it?') for n in (0, 1, 5) for language in ('auto', 'vi', 'en', 'fr') for simple in (False, True)}
    assert reached == set(FAMILIES) == set(TEXTS)
    for family, text in TEXTS.items():
        assert all(field in text for field in ('{question}', '{choices}', '{letters}')) and ('{n}' in text) == family.startswith('multi') and text.endswith(':')
    assert all(TEXTS[f].count('\n- ') == 5 for f in ('multi_vi', 'multi_en'))


def test_a_question_with_braces_is_left_alone():
    sample = question(0, ['A. {letters}', 'B. {n}'])
    text = question_text(sample, 3)
    assert 'A. {letters}\nB. {n}' in text and '{question}' not in text


def test_letters_that_the_instruction_names():
    four, offered = (question_text(question(0, TWO), 4, PromptSettings(letters=which)) for which in ('four', 'offered'))
    assert 'A, B, C, D' in four and 'A, B, C' not in offered and 'A, B' in offered
    assert question_text(question(0, FOUR * 2), 4, PromptSettings(letters='offered')).count('A, B, C, D') == 1


def test_render_puts_each_frame_on_its_line():
    request = render(question(0, FOUR), '/data', PromptSettings(), shown(3, 9, 15))
    images = [p for p in request.messages[0]['content'] if p['type'] == 'image']
    assert [p['frame'] for p in images] == [3, 9, 15] and {p['image'] for p in images} == {'/data/' + question(0).media[0].path}
    assert flat_text(request) == 'Frame1: <image>\nFrame2: <image>\nFrame3: <image>\n' + question_text(question(0, FOUR), 3) and request.provenance == 'paraphrase'


def test_one_frame_none_and_a_system_turn():
    one = render(question(0), '/data', PromptSettings(system='Be brief.'), shown(4))
    assert [m['role'] for m in one.messages] == ['system', 'user'] and TEXTS['single_vi'].split('{')[0] in flat_text(one)
    assert flat_text(render(question(0), '/data')) == question_text(question(0), 0)
    leaves = question(0).__class__('x', (MediaRef('../x.mp4', 'video'),), 'q', '', question(0).meta)
    with pytest.raises(MediaError): render(leaves, '/data')


def test_an_empty_picture_is_one_frame():
    request = render(question(0), '/data', PromptSettings(), blank_plan())
    images = [p for p in request.messages[0]['content'] if p['type'] == 'image']
    assert len(images) == 1 and 'frame' not in images[0] and TEXTS['single_vi'].split('{')[0] in flat_text(request)


def test_plans_with_and_without_marks_differ():
    marked, even = (plan_frames(240, 30., [2.], mode=mode) for mode in ('support', 'uniform'))
    assert len(marked.indices) == 4 and len(even.indices) == 5 and all(45 <= i <= 75 for i in marked.indices) and max(even.indices) > 150
    images = [[p['frame'] for p in render(question(0), '/data', PromptSettings(), plan).messages[0]['content'] if p['type'] == 'image'] for plan in (marked, even)]
    assert images == [list(marked.indices), list(even.indices)]


def test_texts_of_the_readers_own(tmp_path):
    path = tmp_path/'mine.json'
    path.write_text(json.dumps({'multi_vi': '{n}|{question}|{choices}'}))
    own = PromptSettings(texts=str(path))
    request = render(question(0, TWO), '/data', own, shown(1, 2))
    assert request.provenance == 'verbatim' and flat_text(request).endswith(f'2|{question(0).question}|A. Đúng\nB. Sai')
    with pytest.raises(DataError, match='no text for multi_en'): question_text(question(0), 2, PromptSettings(language='en', texts=str(path)))


@pytest.mark.parametrize('text, said', [('{', 'no JSON file'), ('[]', 'the names must be among'), ('{"other": "x"}', 'the names must be among'), ('{"multi_vi": "{question}"}', 'lacks choices'), ('{"multi_vi": 3}', 'lacks text')])
def test_a_bad_file_of_texts_says_so(tmp_path, text, said):
    (tmp_path/'bad.json').write_text(text)
    with pytest.raises(DataError, match=said): read_texts(str(tmp_path/'bad.json'))
    with pytest.raises(DataError, match='no JSON file'): read_texts(str(tmp_path/'none.json'))


@pytest.mark.parametrize('field, value', [('language', 'fr'), ('simple', 2), ('detection', 'x'), ('letters', 'two')])
def test_a_wrong_setting_lists_the_right_ones(field, value):
    with pytest.raises(ValueError, match=f'{field}='): PromptSettings(**{field: value})


# likelihood of choices

@pytest.fixture(scope='module', params=['internvl', 'qwen2_vl'])
def model(request, tmp_path_factory):
    return load_model(str(random_checkpoint(request.param, tmp_path_factory.mktemp('net')/request.param)))


@pytest.fixture(scope='module')
def requests(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pictures')
    for i, size in enumerate(((96, 64), (64, 96))): Image.new('RGB', size, (60*i, 90, 40)).save(folder/f'{i}.png')
    def ask(i, text): return Request(f'r{i}', [{'role': 'user', 'content': [{'type': 'image', 'image': str(folder/f'{i}.png')}, {'type': 'text', 'text': text}]}], 'ours')
    return [ask(0, 'Which?'), ask(1, 'Which of these answers is the right one, judging by all that the picture shows?'), ask(2, 'No picture')]


def test_log_probabilities_are_those_of_a_plain_forward_pass(model, requests):
    ids = choice_ids(tokenizer_of(model.preparer), 'ABCD')
    for request in requests[:2]:
        tensors = encode(model.preparer, request.messages).tensors
        with torch.inference_mode(): row = model.net(**tensors).logits[0, -1].float().log_softmax(-1)
        (got,) = model.score_choices([request], ['ABCD'])
        assert got.choice_logprobs == pytest.approx([float(row[i]) for (i,) in ids], abs=1e-4)
        assert got.text == 'ABCD'[max(range(4), key=lambda i: got.choice_logprobs[i])] and got.n_prompt == tensors['input_ids'].shape[1]


def test_a_batch_changes_nothing_and_a_bad_image_fails_alone(model, requests):
    together = model.score_choices(requests, ['ABCD', 'AB', 'ABC'])
    alone = [model.score_choices([r], [c])[0] for r, c in zip(requests[:2], ('ABCD', 'AB'))]
    for a, b in zip(together, alone): assert a.choice_logprobs == pytest.approx(b.choice_logprobs, abs=1e-4) and a.pixel_hash == b.pixel_hash
    assert [len(g.choice_logprobs or ()) for g in together] == [4, 2, 0] and together[2].error.startswith('media')


def test_memory_that_runs_out_halves_the_batch(requests, monkeypatch):
    model = load_model('tiny', tiny='roadbuddy', share_prefixes=False)
    kind, seen = type(model.net), []
    real = kind.generate
    def short(self, *args, **kwargs):
        seen.append(len(kwargs['input_ids']))
        if len(kwargs['input_ids']) > 1: raise torch.OutOfMemoryError('no room. tried')
        return real(self, *args, **kwargs)
    monkeypatch.setattr(kind, 'generate', short)
    assert all(g.choice_logprobs for g in model.score_choices(requests[:2], ['AB', 'AB'])) and seen == [2, 1, 1]
    def never(self, *args, **kwargs): raise torch.OutOfMemoryError('no room. tried')
    monkeypatch.setattr(kind, 'generate', never)
    assert [g.error.split(':')[0] for g in model.score_choices(requests[:2], ['AB', 'AB'])] == ['oom', 'oom']


def test_choices_must_be_told_apart_by_their_tokens(model, requests):
    with pytest.raises(ModelError, match='begins'): model.score_choices(requests[:1], [['a', 'a long answer']])
    with pytest.raises(ModelError, match='no choices'): model.score_choices(requests[:1], [[]])
    with pytest.raises(ValueError): model.score_choices(requests[:2], ['AB'])


def test_a_model_that_only_chooses_is_a_model(model, requests):
    chooser = by_likelihood(model, {'r0': 'AB', 'r1': 'ABCD'})
    made = chooser.generate(requests[:2], 50)
    assert [len(g.choice_logprobs) for g in made] == [2, 4] and all(g.n_new == 1 for g in made)
    assert chooser.measure(requests[0]) == model.measure(requests[0]) and 'likeliest' in chooser.describe()['answers'] and chooser.name == model.name
    with pytest.raises(ModelError, match='use a local checkpoint'): by_likelihood(load_model('openai:m@http://127.0.0.1:1/v1'), {})
