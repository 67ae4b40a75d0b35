"""Reading Road Buddy's answers: strings that fooled other programs, and properties over many made-up replies."""
import itertools
import random
import unicodedata

import pytest
from roadbuddy_files import FOUR, TWO, question, reply

from vlm_repro.metrics.letters import read_likelihood, read_reply
from vlm_repro.roadbuddy.extract import EXTRACTORS, extract, extract_one, gold_label, parse_evaluate, parse_inference

STATEMENTS = ['Đáp án: {}.', 'Đáp án: {}', 'đáp án là {}', 'Đáp án đúng là {}.', 'Đáp án chính xác là {}', 'Câu trả lời: {}', 'Câu trả lời của tôi là {}', 'Câu trả lời của bạn: {}', 'Chọn {}', 'Tôi chọn {}.',
              'TÔI CHỌN {}', 'Vì đèn đỏ nên chọn {}', 'The answer is {}', 'The answer is {}.', 'Answer: {}', 'ANSWER: {}', 'answer：{}', 'The correct answer is ({})', 'Answer: **{}**', 'The answer is option {}',
              'Final answer: {}', r'So \boxed{{{}}}', r'\boxed{{\text{{{}}}}}', 'I choose {}', '{} là đáp án đúng', '{} is correct', '{} đúng vì xe dừng', 'Answer: {}\n\nBecause the car stops.']
MARKED = ['{}', '{}.', '({})', '[{}]', '**{}**', '`{}`', '"{}"', '{})', ' {} \n', '<b>{}</b>', '{}<|im_end|>', '{}\nGiải thích: xe A đi trước', 'Biển báo cấm.\n{}', '{}: xe dừng lại', 'Lựa chọn {}', 'Lựa chọn {}: đi', 'Option {}',
          'Phương án {} phù hợp', '{} vì đèn đỏ', '{}, because the light is red', 'Tôi nghĩ {} thôi', '({}) vì biển báo', 'Không phải {other} mà là {}', 'not {other} but {}', 'Xe {other} rẽ nên {}']


def fill(pattern, letter):
    other = next(c for c in 'ABCD' if c != letter)
    return pattern.replace('{other}', other).format(letter)


def forms(text):
    return [unicodedata.normalize(form, text) for form in ('NFC', 'NFD')]


@pytest.mark.parametrize('pattern', STATEMENTS + MARKED)
def test_what_is_said_is_read_in_both_forms_and_for_every_letter(pattern):
    for letter, text in ((c, t) for c in 'ABCD' for t in forms(fill(pattern, c))):
        found = read_reply(text, FOUR)
        assert (found.choice or found.status)[0] == letter, (text, found)


@pytest.mark.parametrize('pattern', ['{}', '{}.', 'đáp án: {}.', 'tôi chọn {}.', 'the answer is {}.', '({})', 'answer: {}', 'đáp án là {}', '{})'])
def test_small_letters(pattern):
    assert [read_reply(pattern.format(c), FOUR).choice for c in 'abcd'] == FOUR


@pytest.mark.parametrize('text', [
    '', '  \n', 'Đúng rồi', 'Có', 'Không', 'Được', 'Không được', 'Biển báo', 'Tôi không biết', 'I cannot determine', 'N/A', 'none', 'null', 'nan', '123', '???', 'E', 'F. Không biết', 'AB', 'BD', 'There is a vehicle ahead.',
    'A car is visible.', 'is a vehicle', 'Xe A đi trước', 'làn B', 'P.102', 'The answer is a car', 'Answer: a dog', 'The answers are unclear', 'cấm', 'của', 'ạ', 'Không phải A', 'B is wrong', 'hạng B', 'Đáp án: E', 'Đáp án không rõ',
    'Chúng ta chọn đường khác', 'Vitamin C', 'False', 'None of these', 'D1', 'B2 license'])
def test_nothing_is_guessed(text):
    for t in forms(text):
        found = read_reply(t, ['A. một', 'B. hai', 'C. ba', 'D. bốn'])
        assert (found.status, found.choice) == ('none', None), (t, found)


@pytest.mark.parametrize('text', ['A hoặc B', 'C và D', 'A, D', 'A/B', 'Đáp án: A hoặc C', 'The answer is A or B', 'A. Rẽ trái, B. Rẽ phải', 'A. x\nB. y', 'A\nB', 'Chọn A và B', 'Answer: B/D', 'Có thể A, có thể B', 'Option A or option B'])
def test_two_answers_are_ambiguous(text):
    for t in forms(text): assert read_reply(t, FOUR).status == 'ambiguous', t


@pytest.mark.parametrize('text, letter', [
    ('(D) B, D and F are too slow', 'D'), ('Answer: D', 'D'), ('Answer: A\nLet me check.\nAnswer: C', 'C'), ('A car is visible. The answer is C.', 'C'), ('is a vehicle, so B', 'B'), ('không A mà là B', 'B'),
    ('Option A is wrong. The answer must be B', 'B'), ('I first thought A, but the answer is D', 'D'), ('The answer is a car, therefore the answer is C.', 'C'), ('Rẽ phải', 'B'), ('rẽ phải.', 'B'), ('**Rẽ phải**', 'B'),
    ('Đáp án: Rẽ phải', 'B'), ('Đáp án: B. Rẽ phải', 'B'), ('A. Rẽ trái\nB. Rẽ phải\nC. Đi thẳng\nD. Quay đầu\nĐáp án: C', 'C'), ('B. Rẽ phải\nvì biển báo', 'B'), ('Không phải C mà là D', 'D'), ('Loại A và xét tiếp, chọn B', 'B')])
def test_strings_that_fooled_other_programs(text, letter):
    for t in forms(text): assert (read_reply(t, FOUR).choice or read_reply(t, FOUR).why)[0] == letter, (t, read_reply(t, FOUR))


def test_only_offered_letters_count():
    for pattern in STATEMENTS + MARKED[:16]:
        for letter in 'CD': assert read_reply(fill(pattern, letter).replace('xe A', 'xe'), TWO).status == 'none', pattern
    assert read_reply('D', ['A. x', 'B. y', 'C. z', 'D. w', 'E. v']).choice == 'D. w' and read_reply('E', ['A. x', 'B. y', 'C. z', 'D. w', 'E. v']).choice == 'E. v'


def test_the_text_of_a_choice():
    assert [read_reply(t, TWO).choice for t in ('Sai', 'sai.', 'Đúng', 'ĐÚNG')] == ['B. Sai', 'B. Sai', 'A. Đúng', 'A. Đúng']
    assert read_reply('x', ['A. x', 'B. x']).status == 'ambiguous' and read_reply('B. x', ['A. x', 'B. x']).choice == 'B. x'


WRITTEN_OUT = ['{0}', 'Đáp án: {0}', 'Đáp án: {0}.', 'Đáp án: **{0}**', 'Đáp án đúng là {0} vì biển cấm, không phải {2}', 'First I choose {2}, but then the answer: {0}', 'The answer is ({0}).', '{0} vì xe dừng lại', 'Tôi chọn {0}',
               'Thoạt nhìn đáp án là {2}. Nhưng xe đã vượt đèn đỏ, nên đáp án là {0}', 'Lựa chọn {2} là đúng nếu đường trống. Đáp án: {0}.', 'Các lựa chọn:\n{both}\n\nĐáp án: {0}', 'Đáp án: {0}\n{both}', 'Đáp án: {1}\nCác lựa chọn: {both}']


@pytest.mark.parametrize('pair', [('Đúng', 'Sai'), ('Sai', 'Đúng'), ('Có', 'Không'), ('Không', 'Có'), ('Đúng', 'Không đúng'), ('True', 'False'), ('Right', 'Wrong'), ('Not allowed', 'Allowed')])
@pytest.mark.parametrize('pattern', WRITTEN_OUT)
def test_a_choice_that_affirms_or_denies_is_no_remark_on_its_letter(pattern, pair):
    "What is read must not depend on which of the two is said, on the dot, or on the case."
    choices = [f'{letter}. {body}' for letter, body in zip('AB', pair, strict=True)]
    for mark in ('. ', ') ', ' '):
        for k in (0, 1):
            said, other = (f'{"AB"[i]}{mark}{pair[i]}' for i in (k, 1 - k))
            for text in forms(pattern.format(said, 'AB'[k], 'AB'[1 - k], both='\n'.join(choices), other=other)): assert read_reply(text, choices).choice == choices[k], (text, read_reply(text, choices))


def test_a_remark_on_a_letter_is_still_one():
    assert read_reply('Tôi nghĩ là A vì B sai', TWO).choice == 'A. Đúng' and read_reply('A là sai. Chọn B', TWO).choice == 'B. Sai' and read_reply('Option A is wrong, so B', TWO).choice == 'B. Sai'
    assert read_reply('A. Đúng, B. Sai', TWO).status == 'ambiguous' and read_reply('Không phải A. Đúng mà là B. Sai', TWO).choice == 'B. Sai'


def test_a_shared_letter_decides_nothing():
    shared = ['A. Có', 'B. Không', 'B. Không rõ', 'B. Một phần']
    assert read_reply('B', shared).status == read_reply('Đáp án: B', shared).status == 'ambiguous'
    assert [read_reply(t, shared).choice for t in ('B. Không rõ', 'Không rõ', 'Đáp án: B. Không rõ', 'A')] == [shared[2]] * 3 + [shared[0]]
    assert read_reply('B', FOUR * 2).choice == FOUR[1]
    assert [read_reply(t, shared).letter for t in ('B', 'Đáp án: B', 'A', 'A hoặc B', 'E')] == ['B', 'B', None, None, None]


def test_published_parsers_always_find_a_letter():
    rng = random.Random(0)
    words = [*'ABCDabcd', 'Đáp án:', 'chọn', 'xe', 'không', 'được', '\n', '.', ',', 'answer', 'đỏ', '答案', 'là', '(', ')', '1', '']
    for _ in range(3000):
        text = ' '.join(rng.choices(words, k=rng.randrange(8)))
        assert parse_evaluate(text) in tuple('ABCD') and parse_inference(text) in tuple('ABCD')
    assert parse_inference('答案B') == 'B' and parse_inference('D是对的') == 'D'


def test_strict_reading_is_total_and_never_leaves_the_choices():
    rng = random.Random(1)
    words = [*'ABCDEa', 'Đáp án:', 'chọn', 'xe', 'không phải', 'hoặc', 'và', '\n', '.', ',', 'answer is', 'sai', 'Option', '(', ')', '**', r'\boxed{', '}', 'là', 'mà là', '<b>', 'N/A', *FOUR]
    seen = set()
    for _ in range(4000):
        text, choices = ' '.join(rng.choices(words, k=rng.randrange(7))), rng.choice([TWO, FOUR, FOUR * 2, ['A. x', 'B. y', 'B. z']])
        found = read_reply(text, choices)
        seen.add(found.status)
        assert found.status in ('ok', 'none', 'ambiguous') and (found.choice in choices) == (found.status == 'ok')
        assert read_reply(unicodedata.normalize('NFD', text), [unicodedata.normalize('NFD', c) for c in choices]) == found
    assert seen == {'ok', 'none', 'ambiguous'}


def test_the_order_of_choices_does_not_matter():
    for text, order in itertools.product(('B', 'Đáp án: C', 'Rẽ trái', 'A hoặc D', 'x'), itertools.permutations(FOUR)): assert read_reply(text, order) == read_reply(text, FOUR)


def test_a_long_reply_is_read_quickly():
    import time
    start = time.process_time()
    for text in ('đáp án ' * 4000, 'A ' * 8000, 'answer is the correct ' * 2000, '(' * 20000, ' ' * 50000 + 'B', 'không ' * 8000 + 'A', 'answer' + ' ' * 50000 + '?', '\n' * 50000 + '?', 'answer\n' * 9000, '*' * 50000, '[(' * 20000, 'A)' * 9000): read_reply(text, FOUR)
    assert time.process_time() - start < 10


def test_gold_letters():
    assert [gold_label(c) for c in FOUR] == list('ABCD') and gold_label('AB. x') == gold_label('') == 'A'


def test_likelihood():
    assert read_likelihood((-3., -1., -2., -9.), FOUR).choice == FOUR[1] and read_likelihood((-1., -1., -2., -2.), FOUR).status == 'ambiguous'
    assert [read_likelihood(p, ['A. a', 'B. b', 'B. c']).letter for p in ((-2., -1., -1.), (-1., -1., -1.))] == ['B', None]
    assert read_likelihood((-1., -2., -3., -4.) * 2, FOUR * 2).choice == FOUR[0] and read_likelihood(None, FOUR).status == 'none'
    with pytest.raises(ValueError, match='3 log-probabilities for 4 choices'): read_likelihood((-1., -2., -3.), FOUR)


def test_every_text_is_read_by_every_extractor_in_order():
    samples = [question(n, FOUR) for n in range(3)]
    made = [reply(samples[0], 'B'), reply(samples[1], 'Tôi không biết'), reply(samples[2], None)]
    answers = extract(samples, made)
    assert [(a.id, a.extractor) for a in answers] == [(s.id, e) for s in samples for e in ('evaluate@1', 'strict@1')]
    assert [a.value for a in answers] == ['B', 'B. Rẽ phải', 'B', None, 'A', None]
    assert [a.error and a.error.split(':')[0] for a in answers] == [None, None, None, 'none', 'media', 'media']
    assert extract_one(reply(samples[0], '', choice_logprobs=(-1., -.5, -3., -2.)), samples[0], 'likelihood@1').value == FOUR[1]
    with pytest.raises(ValueError, match='valid: '): extract(samples, made, ['strict'])
    with pytest.raises(ValueError, match='pair them by id'): extract(samples[::-1], made)
    assert all(name.endswith('@1') for name in EXTRACTORS)
