"""RoboInter's prompts: forms, programs, provenance, the reader's own file."""
import json

import pytest

from vlm_repro.core.jsonl import DataError
from vlm_repro.core.media import MediaError
from vlm_repro.core.records import MediaRef, Sample
from vlm_repro.robointer import prompt
from vlm_repro.robointer.prompt import PromptSettings, question_text, render

EIGHT = Sample('planning/1', tuple(MediaRef(f'image/{i}.jpg') for i in range(8)), '<image>\n<image>\nWhat was done?', 'picked', {'task': 'planning'})
TRAJ = Sample('traj/1', (MediaRef('a.jpg'),), "<image>\nThe robot at 'table' is to 'pick up the cup, gently'.", '{}', {'task': 'traj'})


def text(sample, **settings):
    return render(sample, 'data', PromptSettings(**settings)).messages[0]['content'][-1]['text']


def test_every_form_and_program_has_a_text_with_the_question():
    for form in prompt.FORMS:
        for program in prompt.PROGRAMS:
            assert '{question}' in prompt.template_of(form, program)
    assert text(EIGHT) == text(EIGHT, question_type='w2p') == 'What was done?'
    assert '<ref>What was done?</ref>' in text(EIGHT, question_type='qwen_grounding')
    assert text(EIGHT, question_type='refindoor', program='internvl') == text(EIGHT, question_type='qwen_grounding')
    assert '[x1, y1, x2, y2]' in text(EIGHT, question_type='refindoor', program='robobrain')


def test_all_images_or_the_first():
    assert [len(render(EIGHT, 'data', PromptSettings(images=i)).messages[0]['content']) for i in ('all', 'first')] == [9, 2]
    assert [p['type'] for p in render(EIGHT, 'data').messages[0]['content']] == ['image']*8 + ['text']


def test_provenance_is_of_the_words_that_are_asked():
    assert question_text(EIGHT)[1] == 'verbatim'
    assert question_text(EIGHT, PromptSettings('refindoor'))[1] == 'ours'
    assert question_text(EIGHT, PromptSettings(program='robobrain'))[1] == 'verbatim'
    assert question_text(TRAJ, PromptSettings(program='robobrain'))[1] == 'ours' and 'pick up the cup"' in text(TRAJ, program='robobrain')


def test_a_question_with_braces_is_asked_as_it_is():
    odd = Sample('x', (), 'Is {question} a {word}?', '', {'task': 'planning'})
    assert text(odd) == 'Is {question} a {word}?'
    assert 'Is {question} a {word}?' in text(odd, question_type='qwen_grounding')


def test_a_file_of_the_reader(tmp_path):
    path = tmp_path/'mine.json'
    path.write_text(json.dumps({'refindoor': 'Find {question}.'}))
    assert question_text(EIGHT, PromptSettings('refindoor', texts=str(path))) == ('Find What was done?.', 'verbatim')
    with pytest.raises(DataError, match='no text for default'): text(EIGHT, texts=str(path))
    for i, wrong in enumerate(('[]', '{"w3p": "{question}"}', '{"w2p": "no place"}', '{"w2p": 3}', 'nothing')):
        bad = tmp_path/f'{i}.json'
        bad.write_text(wrong)
        with pytest.raises(DataError): prompt.read_texts(str(bad))
    with pytest.raises(DataError): prompt.read_texts(str(tmp_path/'absent.json'))


def test_wrong_settings_are_listed():
    for wrong in ({'question_type': 'grounding'}, {'program': 'gpt'}, {'images': 'last'}):
        with pytest.raises(ValueError, match='valid: '): PromptSettings(**wrong)
    with pytest.raises(ValueError, match='unknown task'): render(Sample('x', (), '', '', {'task': 'grip'}), 'data')
    with pytest.raises(MediaError): render(Sample('x', (MediaRef('../a.jpg'),), '', '', {'task': 'traj'}), 'data')
    with pytest.raises(DataError, match='in quotes'): text(Sample('x', (), 'Where?', '', {'task': 'traj'}), program='robobrain')


def test_system_and_baselines():
    assert [m['role'] for m in render(EIGHT, 'data', PromptSettings(system='Be brief.')).messages] == ['system', 'user']
    assert prompt.BASELINES['robobrain'].temperature == .7 and prompt.BASELINES['qwen'].temperature == 0 and prompt.BASELINES['internvl'].temperature == 'own'


def test_robobrain_begins_its_reply_and_nobody_else_does():
    for thinking, words in ((True, '<think>'), (False, '<think></think><answer>')):
        last = render(TRAJ, 'data', PromptSettings(program='robobrain', thinking=thinking)).messages[-1]
        assert (last['role'], last['content'][0]['text']) == ('assistant', words)
    assert {render(TRAJ, 'data', PromptSettings(program=p)).messages[-1]['role'] for p in prompt.PROGRAMS if p != 'robobrain'} == {'user'}
    with pytest.raises(ValueError, match='only robobrain'): PromptSettings(thinking=True)
