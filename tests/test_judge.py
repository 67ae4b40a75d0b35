"""The judge: how replies are read, what is stored, and what happens when calls fail, over real sockets."""
import json

import pytest
from fault_proxy import chat_server, fault_proxy, in_order, once_each

from vlm_repro.core.records import Answer, Sample
from vlm_repro.core.runs import open_run, read_run
from vlm_repro.metrics.judge import (
    JudgeError,
    JudgeItem,
    JudgePrompt,
    ModelJudge,
    Reply,
    RuleJudge,
    collect,
    estimate,
    failed_scores,
    first_digit,
    flips,
    judge_of,
    lone_integer,
    read_prompt,
    response_text,
    scores_of,
    stored_replies,
)
from vlm_repro.metrics.text import Grade
from vlm_repro.mmwalk.score import load_judge, measure, published_request

# reading a reply

@pytest.mark.parametrize('reply', ['4', ' 4\n', '**4**', '(4)', '[4]', '4.', '"4"', "'4'", '`4`', '\t4\t', '**4**.', '__4__'])
def test_a_lone_integer_is_read(reply): assert lone_integer(reply) == first_digit(reply) == 4


@pytest.mark.parametrize('reply', [None, '', ' ', '0', '6', '10', '45', '4.5', '4.0', '-4', '4/5', '4 5', '4 out of 5', 'Score: 4', 'four', '1-5: 3', '４', '٤', '²', '4️⃣', '4!', '{"score": 4}'])
def test_anything_else_is_not_guessed_at(reply): assert lone_integer(reply) is None


@pytest.mark.parametrize(('reply', 'score'), [('10', 1), ('4.5', 4), ('-3', 3), ('0', 1), ('1-5: 3', 1), ('４', 1), ('', 1), (None, 1), ({'score': 4}, 1), (4, 1), ('9/5', 5), ('x\n2', 2)])
def test_the_published_reading_always_has_a_score(reply, score): assert first_digit(reply) == score


@pytest.mark.parametrize(('response', 'text'), [
    ({'choices': [{'message': {'content': ' 4 '}}, {'message': {'content': '2'}}]}, ' 4 '), ({'choices': [{'message': {}}]}, None), ({'choices': [{'message': {'content': None}}]}, None),
    ({'choices': [{'message': {'content': 4}}]}, None), ({'choices': None}, None), ({}, None), ([], None), ('4', None), (None, None)])
def test_a_malformed_response_has_no_text(response, text): assert response_text(response) == text


def test_both_variants_come_from_the_same_replies():
    values = {name: tuple(s.values and s.values[0] for s in scores_of('s', replies, 'm')) for name, replies in {
        'plain': [Reply('4')], 'second try': [Reply('Score: 4 of 5'), Reply('5')], 'unreadable': [Reply('10'), Reply('ten')], 'failed': [Reply(None, 'timeout: 60 s')],
        'failed, then came': [Reply(None, 'server: 500'), Reply('3')], 'never asked': []}.items()}
    assert values == {'plain': (4, 4), 'second try': (5, 4), 'unreadable': (None, 1), 'failed': (None, 1), 'failed, then came': (3, 3), 'never asked': (None, 1)}


def test_labels_tell_a_failure_from_a_bad_grade():
    corrected, published = scores_of('s', [Reply('10'), Reply('ten')], 'm')
    assert corrected.label.startswith('bad_reply') and "'ten'" in corrected.label and published.label == 'ok'
    assert {s.label for s in scores_of('s', [Reply(None, 'auth: 401')], 'm')} == {'auth: 401'} == {s.label for s in failed_scores('s', 'auth: 401', 'm')}
    assert scores_of('s', [Reply('1')], 'm')[0].label == 'ok'


# the prompt

def test_slots_are_filled_once_and_texts_stay_what_they_are():
    item = JudgeItem('s', '{gold}', '{prediction} %s \\1', '{question}{}', 'E1')
    assert JudgePrompt('', '{question}|{gold}|{prediction}|{other}', 'ours').render(item)[1] == '{gold}|{prediction} %s \\1|{question}{}|{other}'


@pytest.mark.parametrize(('text', 'why'), [('no line', 'found 1 part'), ('a\n---\nb\n---\nc', 'found 3 part'), ('a\n---\n{question} {gold}', 'lacks {prediction}')])
def test_a_prompt_file_says_what_it_lacks(tmp_path, text, why):
    (tmp_path/'p.txt').write_text(text)
    with pytest.raises(ValueError, match=why): read_prompt(tmp_path/'p.txt')


# a judge over HTTP: it replies with what the predicted answer, after `say `, tells it to

def told(body): return body['messages'][1]['content'].split('Predicted Answer: ')[1].split('\n')[0].removeprefix('say ')


@pytest.fixture(scope='module')
def server(bodies):
    with chat_server(told, bodies) as url: yield url


@pytest.fixture
def run(tmp_path):
    made = open_run(tmp_path/'run', {'paper': 'mmwalk'})
    yield made
    made.close()


def asked(n): return [Sample(f's{i}', (), f'Question {i}?', 'Yes.', {'category': 'E2'}) for i in range(n)]


def answers(samples, say): return [Answer(s.id, say(i), 'ok', 'strip@1') for i, s in enumerate(samples)]


def judge_at(url, **options): return load_judge(f'openai:judge@{url}', base_delay=.02, **{'timeout': 5., **options})


def corrected(scores): return {s.id: s.values and s.values[0] for s in scores if s.variant == 'corrected'}


def test_the_request_on_the_wire_is_the_published_one(server, bodies, run):
    samples = asked(1)
    measure(samples, answers(samples, lambda i: 'say 4'), judge_at(server), run)
    sent, want = bodies[-1], published_request(JudgeItem('', 'Question 0?', 'Yes.', 'say 4'), model='judge')
    assert sent['messages'] == want['messages'] and sent['temperature'] == 0 and sent.keys() - want.keys() == {'max_tokens'}


def test_faults_change_no_score(server, tmp_path):
    samples = asked(60)
    said = answers(samples, lambda i: f'say {1 + i % 5}')
    rotation = (None, '429', '500', 'garbage', 'torn-json', 'reset', 'no-choices')
    run = open_run(tmp_path/'run', {'paper': 'mmwalk'})
    with fault_proxy(server, once_each(rotation)) as (url, proxy):
        judge = judge_at(url, concurrency=8)
        scores = measure(samples, said, judge, run)
        assert len(proxy.log) > 60 and proxy.count('429') and proxy.most_open > 1
        before, stored = len(proxy.log), run.path('judge.jsonl').read_bytes()
        assert measure(samples, said, judge, run) == scores and len(proxy.log) == before
    run.close()
    assert corrected(scores) == {s.id: 1 + i % 5 for i, s in enumerate(samples)} and not flips(scores)
    # with the server gone and nothing loaded, the stored replies give the same table
    again = open_run(tmp_path/'run', {'paper': 'mmwalk'})
    assert measure(samples, said, judge_at(url), again) == scores and again.path('judge.jsonl').read_bytes() == stored
    again.close()


def test_a_judge_that_times_out_is_a_failure_and_not_a_score(server, run):
    samples = asked(3)
    with fault_proxy(server, lambda n, body: 'timeout' if b'Question 1?' in body else None, hang=3.) as (url, _):
        scores = measure(samples, answers(samples, lambda i: 'say 5'), judge_at(url, timeout=1.5, max_retries=0), run)
    assert corrected(scores) == {'s0': 5, 's1': None, 's2': 5}
    flipped = flips(scores)
    assert [(f.id, f.as_published) for f in flipped] == [('s1', 1)] and flipped[0].label.startswith('timeout')
    assert '1 timeout' in flipped._repr_markdown_()


@pytest.mark.parametrize(('fault', 'label'), [('401', 'auth'), ('404', 'not_found')])
def test_a_judge_that_refuses_stops_the_run_and_a_later_one_completes_it(server, run, fault, label):
    samples, open_door = asked(80), {'valid': False}
    said = answers(samples, lambda i: 'say 3')
    with fault_proxy(server, lambda n, body: None if open_door['valid'] else fault) as (url, proxy):
        with pytest.raises(JudgeError, match=f'answered nobody: {label}: '): measure(samples, said, judge_at(url, concurrency=1), run, batch_size=8)
        assert len(proxy.log) == 1 and len(run.rows('judge')) == 8
        open_door['valid'] = True
        assert set(corrected(measure(samples, said, judge_at(url), run)).values()) == {3} and len(proxy.log) == 81


def test_a_key_that_is_refused_halfway_loses_no_reply(server, run):
    samples, refused = asked(20), {'from': 10}
    said = answers(samples, lambda i: 'say 3')
    with fault_proxy(server, lambda n, body: '401' if n >= refused['from'] else None) as (url, proxy):
        with pytest.raises(JudgeError): measure(samples, said, judge_at(url, concurrency=1), run, batch_size=5)
        assert sum(row['reply'] == '3' for row in run.rows('judge')) == 10
        refused['from'] = 99
        assert set(corrected(measure(samples, said, judge_at(url), run)).values()) == {3} and len(proxy.log) == 21


@pytest.mark.parametrize('n', [3, 40])
def test_a_judge_that_reaches_nobody_ends_in_no_table(server, run, n):
    samples = asked(n)
    with fault_proxy(server, lambda n, body: '500') as (url, proxy):
        with pytest.raises(JudgeError, match='answered nobody: server: '):
            measure(samples, answers(samples, lambda i: 'say 3'), judge_at(url, max_retries=0, concurrency=8), run, batch_size=8)
    assert (len(proxy.log) == 6 if n == 3 else 24 <= len(proxy.log) <= 40) and {row['error'].split(':')[0] for row in run.rows('judge')} == {'server'}


def test_who_replied_is_kept_with_the_replies(server, run):
    samples = asked(2)
    said = answers(samples, lambda i: 'say 4')
    judge = judge_at(server)
    measure(samples, said, judge, run)
    kept = judge_of(run)
    assert kept['model']['answered_by'] == ['judge-2026-01-01'] and kept['decoding'] == {'temperature': 0, 'max_new_tokens': 64}
    assert kept['prompt']['provenance'] == 'paraphrase' and len(kept['prompt']['digest']) == 16
    # a judge that is not loaded, because every reply is stored, knows nothing of its own and takes nothing away
    measure(samples, said, judge_at(server), run)
    assert judge_of(run) == kept
    measure(samples, said, load_judge('lexical'), run)
    assert judge_of(run) == {'judge': 'lexical@1', 'kind': 'rule'}


def test_an_unreadable_reply_is_asked_for_once_more_and_then_given_up(server, bodies, run):
    samples = asked(2)
    said = answers(samples, lambda i: ('say 4', 'say 4.5')[i])
    before = len(bodies)
    judge = judge_at(server)
    scores = measure(samples, said, judge, run)
    assert len(bodies) - before == 3 and corrected(scores) == {'s0': 4, 's1': None}
    assert [(f.id, f.as_published, f.label.split(':')[0]) for f in flips(scores)] == [('s1', 4, 'bad_reply')]
    assert measure(samples, said, judge, run) == scores and len(bodies) - before == 3
    attempts = [(row['sample'], row['attempt'], row['reply']) for row in run.rows('judge')]
    assert sorted(attempts) == [('s0', 1, '4'), ('s1', 1, '4.5'), ('s1', 2, '4.5')]


def test_a_stopped_run_makes_exactly_the_missing_calls(server, run):
    samples = asked(40)
    items = [JudgeItem(s.id, s.question, s.gold, f'say {1 + i % 5}', 'E2') for i, s in enumerate(samples)]
    with fault_proxy(server, in_order()) as (url, proxy):
        judge = judge_at(url)
        collect(judge, items[:25], run, batch_size=10)
        assert estimate(judge, items, run).calls == 15
        with run.path('judge.jsonl').open('ab') as f: f.write(b'{"id": "torn')
        run.close()
        again = open_run(run.root, {'paper': 'mmwalk'})
        collect(judge, items, again, batch_size=10)
        assert len(proxy.log) == 40 and len(stored_replies(again)) == 40
        again.close()


# the store and the estimate

def test_the_estimate_counts_distinct_calls_and_tokens(run):
    judge = load_judge('openai:gpt-4o-mini')
    items = [JudgeItem(f's{i}', 'Is there a bench?', 'Yes.', ('yes', 'no')[i % 2]) for i in range(10)]
    made = estimate(judge, items, run)
    assert (made.items, made.distinct, made.stored, made.calls) == (10, 2, 0, 2)
    characters = sum(len(t) for i in items[:2] for t in judge.prompt.render(i))
    assert made.prompt_tokens == pytest.approx(characters / 4, rel=.2)
    assert '10 answers, 2 distinct; 0 stored, 2 calls to make' in str(made)


@pytest.mark.parametrize('change', [{'question': 'x'}, {'gold': 'x'}, {'prediction': 'x'}])
def test_the_key_holds_what_the_judge_sees(change):
    item = JudgeItem('s', 'q', 'g', 'p', 'E1')
    other = JudgeItem('t', **{'question': 'q', 'gold': 'g', 'prediction': 'p', **change}, group='E1')
    for judge in (load_judge('openai:gpt-4o-mini'), load_judge('lexical')): assert judge.key(item) != judge.key(other)


def test_the_key_holds_the_judge_and_not_the_sample():
    item, twin = JudgeItem('s', 'q', 'g', 'p', 'E1'), JudgeItem('t', 'q', 'g', 'p', 'H1')
    prompt = JudgePrompt('a', '{question}{gold}{prediction}', 'ours')
    assert ModelJudge('m', prompt).key(item) == ModelJudge('m', prompt).key(twin)
    assert len({ModelJudge('m', prompt).key(item), ModelJudge('n', prompt).key(item), ModelJudge('m', JudgePrompt('b', prompt.user, 'ours')).key(item),
                ModelJudge('m', prompt, max_new_tokens=8).key(item)}) == 4
    assert load_judge('lexical').key(item) != load_judge('lexical').key(twin)


def test_rule_judges_take_the_same_road(run):
    judge = RuleJudge('constant@1', lambda item: Grade(2, 'because'))
    replies = collect(judge, [JudgeItem('s', 'q', 'g', 'p')], run)
    row, = read_run(run.root).rows('judge')
    assert (row['reply'], row['why'], row['judge'], row['attempt']) == ('2', 'because', 'constant@1', 1)
    assert stored_replies(run) == replies


def test_a_secret_is_never_stored(server, run, monkeypatch):
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-secret-1234567890')
    samples = asked(2)
    judge = judge_at(server)
    measure(samples, answers(samples, lambda i: 'say 4'), judge, run)
    assert 'sk-secret' not in run.path('judge.jsonl').read_text() + json.dumps(judge.describe())


def test_a_local_checkpoint_can_judge_and_its_babble_is_no_score(tmp_path, run):
    torch = pytest.importorskip('torch', reason='torch is not installed')
    from vlm_repro.models.families import random_checkpoint
    torch.set_num_threads(1)
    samples = asked(3)
    judge = load_judge(str(random_checkpoint('qwen2_vl', tmp_path/'judge')))
    judge.max_new_tokens = 4
    scores = measure(samples, answers(samples, lambda i: 'yes'), judge, run)
    rows = run.rows('judge')
    assert all(row['error'] is None and row['n_prompt'] > 50 and row['n_new'] for row in rows)
    assert corrected(scores) == {s.id: lone_integer(next(r['reply'] for r in rows if r['sample'] == s.id)) for s in samples}
