"""mmWalk's scores: rubric, judge prompt, both variants, the table, upstream's files."""
import json
from itertools import product

import numpy as np
import pytest

from vlm_repro.core.records import Answer, Generation, failed
from vlm_repro.core.runs import open_run
from vlm_repro.metrics.judge import JudgeItem, RuleJudge, flips
from vlm_repro.metrics.text import Grade, grade, normalise, numbers, overlap, token_f1
from vlm_repro.mmwalk.annotations import CATEGORIES, chat_record, chat_sample, frame_paths
from vlm_repro.mmwalk.extract import extract
from vlm_repro.mmwalk.predictions import folder_name
from vlm_repro.mmwalk.score import (
    PROMPT,
    RUBRICS,
    constant_baseline,
    items_of,
    lexical_rule,
    load_judge,
    measure,
    published_request,
    row_name,
    standardised,
    table_cells,
)
from vlm_repro.mmwalk.upstream import UpstreamError, printed, replay, summarise, write_upstream

GOLDS = {'E1': ('Sunny.', 'Night.'), 'E2': ('Yes.', 'No, there is none.'), 'E3': ('2', 'Three poles'), 'E4': ('The gate is red.', 'Wide and grey'),
         'M1': ("At 2 o'clock, about 20 meters away.", 'It is 5 m ahead.'), 'M2': ('A wide square with two benches and a gate.', 'A narrow path along a wall.'),
         'M3': ('The drone view shows more of the crossing.', 'The walker view.'), 'H1': ('High risk due to uneven ground.', 'Low risk, the path is clear.'),
         'H2': ('The bus stop at 2 meters helps, because it can be touched.', 'The red gate.')}
TRAJECTORIES = [f'{scenario}{n:02d}' for scenario, n in product(('Busstop', 'Corner', 'Plaza'), (1, 2, 3))]


def sample(category, trajectory, frame, question, gold):
    return chat_sample(chat_record(frame_paths(trajectory, frame), f'Four views.\nA hint.\nQuestion: {question}', gold, category), 'v2')


@pytest.fixture
def samples():
    "Every category in two frames of nine trajectories."
    return [sample(c, t, f, f'What about {c}?', GOLDS[c][f % 2]) for c in CATEGORIES for t in TRAJECTORIES for f in (8, 9)]


@pytest.fixture
def run(tmp_path):
    made = open_run(tmp_path/'run', {'paper': 'mmwalk'})
    yield made
    made.close()


def answered(samples, say):
    return [Answer(s.id, text, 'ok' if text else 'none', 'strip@1') for s in samples for text in [say(s)]]


# the rubric

@pytest.mark.parametrize(('category', 'gold', 'said', 'score'), [
    ('E1', 'Sunny', 'clear sky', 5), ('E1', 'Sunny', 'sunny, rainy, cloudy, foggy, night', 2), ('E1', 'Forward.', 'Moving Forward', 5), ('E1', 'Night', 'rain', 1),
    ('E1', 'Unknown.', 'Unknown', 5), ('E1', 'Unknown.', 'Sunny', 1), ('E2', 'Yes.', 'Yes, two benches.', 5), ('E2', 'No.', 'Yes.', 1), ('E2', 'No.', 'Maybe', 1),
    ('E3', '2', 'two', 5), ('E3', 'Twenty-five poles', '25', 5), ('E3', '2', '12', 1), ('E3', '2', '3', 2), ('E3', 'None', '0', 5),
    ('M1', "At 12 o'clock", 'twelve o’clock', 5), ('M1', "At 12 o'clock", "1 o'clock", 3), ('M1', "At 12 o'clock, 20 m away", '20 m', 3), ('M1', '54 meters', '540 meters', 1),
    ('H1', 'High risk due to night.', 'The scene is high-risk.', 4), ('H1', 'Low risk', 'high risk', 1), ('H1', 'moderately risky', 'Medium risk', 5),
    ('H1', 'Low risk near high walls.', 'Low risk', 4), ('H1', 'Low risk.', 'low', 5), ('H1', 'Moderate to high risk', 'high risk', 3), ('E4', 'Red', 'The gate is red', 4), ('M2', 'A wide square', '', 1), ('M2', 'A wide square', ' . ', 1)])
def test_the_rubric_of_each_category(category, gold, said, score):
    assert lexical_rule(JudgeItem('', '', gold, said, category)).score == score


@pytest.mark.parametrize('category', CATEGORIES)
def test_a_gold_answer_earns_five_and_silence_one(category):
    for gold in GOLDS[category]:
        assert lexical_rule(JudgeItem('', '', gold, gold.upper() + ' ', category)).score == 5
        assert lexical_rule(JudgeItem('', '', gold, '', category)).score == 1


def test_every_grade_is_an_integer_from_one_to_five_with_a_reason():
    texts = [g for golds in GOLDS.values() for g in golds] + ['', '???', '3', 'yes no', "13 o'clock and 0 m", '路口', 'x' * 3000]
    for category, gold, said in product(CATEGORIES, texts, texts):
        made = lexical_rule(JudgeItem('', '', gold, said, category))
        assert made.score in (1, 2, 3, 4, 5) and isinstance(made.score, int) and made.why


def test_overlap_is_symmetric_and_bounded():
    rng, words = np.random.default_rng(0), 'wide square two bench gate red wall path pole near'.split()
    for _ in range(200):
        a, b = (' '.join(rng.choice(words, rng.integers(1, 8))) for _ in 'ab')
        assert token_f1(a, b) == token_f1(b, a) and 0 <= token_f1(a, b) <= 1 and token_f1(a, a) == 1


def test_text_is_read_alike_however_it_is_written():
    assert normalise('It’s 2.5m – “OK”') == normalise("it's 2.5 M, 'ok'")
    assert numbers('one hundred and 12 or thirty-one, 1.5') == [1, 12, 31, 1.5]
    assert grade('Red', 'red', overlap) == Grade(5, 'same words')


# the prompt and the judge

def test_the_request_holds_the_three_lines_and_no_category():
    item = JudgeItem('x', 'Where is {gold}?', '100 % {prediction}', 'Predicted Answer: 5', 'H1')
    request = published_request(item)
    system, user = (m['content'] for m in request['messages'])
    assert user.splitlines()[:4] == ['Question: Where is {gold}?', 'Correct Answer: 100 % {prediction}', 'Predicted Answer: Predicted Answer: 5', '']
    assert len(user.splitlines()) == 5 and 'H1' not in system + user
    assert (request['model'], request['temperature']) == ('gpt-4o-mini', 0)
    assert all(f'{n} =' in system for n in range(1, 6))


def test_the_papers_own_prompt_comes_from_a_file(tmp_path):
    (tmp_path/'p.txt').write_text('System.\r\n---\r\nQ {question}\nG {gold}\nP {prediction}\n', newline='')
    judge = load_judge('openai:gpt-4o-mini', tmp_path/'p.txt')
    assert (judge.provenance, judge.prompt.system) == ('verbatim', 'System.')
    assert judge.key(JudgeItem('', 'q', 'g', 'p')) != load_judge('openai:gpt-4o-mini').key(JudgeItem('', 'q', 'g', 'p'))
    assert (PROMPT.provenance, load_judge('lexical').provenance) == ('paraphrase', 'ours')


# scoring

def test_perfect_and_silent_runs_are_the_ends_of_the_scale(samples, run, tmp_path):
    best = measure(samples, answered(samples, lambda s: s.gold), load_judge('lexical'), run)
    assert {c.value for c in table_cells(samples, best, 'r').where(unit='0-100')} == {100}
    other = open_run(tmp_path/'silent', {'paper': 'mmwalk'})
    worst = measure(samples, answered(samples, lambda s: None), load_judge('lexical'), other)
    other.close()
    assert {c.value for c in table_cells(samples, worst, 'r').where(unit='0-100')} == {0}


def test_a_failed_generation_is_counted_and_only_the_published_variant_scores_it(samples, run):
    texts = extract([failed(s.id, 'media', 'walker/rgb: truncated') if n % 10 == 0 else Generation(s.id, s.gold) for n, s in enumerate(samples)])
    scores, lost = measure(samples, texts, load_judge('lexical'), run), len(samples[::10])
    assert [f.id for f in flips(scores)] == [s.id for s in samples[::10]]
    cells = table_cells(samples, scores, 'r').where(column='overall', unit='0-100', cluster='frame')
    corrected, published = cells.where(variant='corrected')[0], cells.where(variant='as_published')[0]
    assert (corrected.value, corrected.n, corrected.n_failed) == (100, len(samples) - lost, lost)
    assert (published.n, published.n_failed) == (len(samples), lost) and published.value == pytest.approx(100 * (1 - lost / len(samples)))


def test_samples_and_answers_must_belong_together(samples, run):
    answers = answered(samples, lambda s: s.gold)
    with pytest.raises(ValueError, match='pair them by id'): measure(samples, answers[::-1], load_judge('lexical'), run)
    with pytest.raises(ValueError): items_of(samples, answers[:-1])


def test_equal_answers_are_judged_once_and_never_again(samples, run):
    asked = []
    judge = RuleJudge('counting@1', lambda item: (asked.append(item.id), lexical_rule(item))[1])
    answers = answered(samples, lambda s: 'Yes.')
    first = measure(samples, answers, judge, run)
    stored = run.path('judge.jsonl').read_bytes()
    assert len(asked) == len({(s.question, s.gold, s.meta['category']) for s in samples}) < len(samples)
    assert measure(samples, answers, judge, run) == first
    assert len(asked) == len(stored.splitlines()) and run.path('judge.jsonl').read_bytes() == stored


# the table

def test_the_table_is_the_arithmetic_it_claims(samples, run):
    rng = np.random.default_rng(0)
    said = {s.id: str(rng.choice([s.gold, 'Yes.', 'red', '2'])) for s in samples}
    samples = [s for n, s in enumerate(samples) if s.meta['category'] != 'H2' or n % 3 == 0]
    scores = measure(samples, answered(samples, lambda s: said[s.id]), load_judge('lexical'), run)
    value = {s.id: s.values[0] for s in scores if s.variant == 'corrected'}
    cells = table_cells(samples, scores, 'r').where(variant='corrected', cluster='trajectory', unit='1-5')
    by_place = {(c.table, c.column): c for c in cells}
    means = [np.mean([value[s.id] for s in samples if s.meta['category'] == c]) for c in CATEGORIES]
    assert by_place['categories', 'overall'].value == pytest.approx(np.mean(list(value.values())))
    assert by_place['categories', 'macro'].value == pytest.approx(np.mean(means)) != pytest.approx(by_place['categories', 'overall'].value)
    assert by_place['scenarios', 'Plaza'].value == pytest.approx(np.mean([value[s.id] for s in samples if s.meta['scenario'] == 'Plaza']))
    for table in ('scenarios', 'difficulty'):
        assert sum(c.n for c in cells if c.table == table) == len(samples)
    assert sum(by_place['categories', c].n for c in CATEGORIES) == len(samples)


def test_both_scales_and_both_clusters_are_there(samples, run):
    scores = measure(samples, answered(samples, lambda s: GOLDS[s.meta['category']][0]), load_judge('lexical'), run)
    cells = table_cells(samples, scores, 'r')
    for c in cells.where(unit='0-100'):
        raw = cells.where(table=c.table, column=c.column, variant=c.variant, cluster=c.cluster, unit='1-5')[0]
        assert c.value == pytest.approx(standardised(raw.value)) and (c.n, c.n_clusters) == (raw.n, raw.n_clusters)
        assert (c.lo is None) == (raw.lo is None) == (c.n_clusters < 6) and (c.lo is None or c.lo == pytest.approx(standardised(raw.lo)))
    overall = {c.cluster: c.n_clusters for c in cells.where(column='overall', unit='1-5', variant='corrected')}
    assert overall == {'trajectory': 9, 'frame': 18}
    assert cells.where(table='scenarios', column='Plaza', unit='1-5', cluster='trajectory')[0].n_clusters == 3


def test_walks_that_differ_as_wholes_are_told_by_the_wider_interval(samples, run):
    scores = measure(samples, answered(samples, lambda s: s.gold if s.meta['trajectory'] in TRAJECTORIES[:5] else None), load_judge('lexical'), run)
    width = {c.cluster: c.hi - c.lo for c in table_cells(samples, scores, 'r').where(column='overall', unit='0-100', variant='corrected')}
    assert width['trajectory'] > 1.3 * width['frame']


@pytest.mark.parametrize(('args', 'name'), [
    (('Qwen/Qwen2-VL-7B-Instruct', 'normal', 0), 'Qwen2-VL-7B-Instruct / normal / 0s'), (('openai:gpt-4o@http://127.0.0.1:1/v1', 'dog+', 3), 'gpt-4o / dog+ / 3s'),
    (('InternVL2-8B', 'normal', 0, True), 'InternVL2-8B / normal / finetuned')])
def test_rows_are_named_as_published(args, name):
    assert row_name(*args) == name


# baselines

def test_the_constant_answer_is_the_best_of_all_golds_and_chance_is_below_it(samples):
    rng = np.random.default_rng(1)
    skewed = [sample('E2', TRAJECTORIES[n % 9], n, 'Is there a bench?', 'Yes.' if rng.random() < .7 else 'No.') for n in range(200)]
    share = np.mean([s.gold == 'Yes.' for s in skewed])
    made = constant_baseline(skewed)[0]
    assert made.answer == 'Yes.' and made.constant == pytest.approx(1 + 4 * share)
    assert made.chance == pytest.approx(1 + 4 * (share ** 2 + (1 - share) ** 2))
    every = constant_baseline(samples)
    assert [b.category for b in every] == list(CATEGORIES) and all(b.constant >= b.chance for b in every)
    assert constant_baseline(samples, seed=0) == every


# upstream's files

def test_upstreams_files_hold_what_its_own_evaluation_would_write(samples, run):
    answers = answered(samples[:-1], lambda s: GOLDS[s.meta['category']][0])
    answers.append(Answer(samples[-1].id, None, 'none', 'strip@1', 'media: truncated'))
    scores = measure(samples, answers, load_judge('lexical'), run)
    folder = write_upstream(run, samples, answers, scores, folder_name('tiny', 'normal', 3))
    lines = [json.loads(line) for line in (folder/'gpt_scored_samples.jsonl').read_text('utf-8').splitlines()]
    published = {s.id: int(s.values[0]) for s in scores if s.variant == 'as_published'}
    assert [line['score'] for line in lines] == [published[s.id] for s in samples] and lines[-1]['score'] == 1
    gold = {c: [s.meta['trajectory'] for s in samples if s.meta['category'] == c] for c in CATEGORIES}
    replies = {f'{c}_tiny.jsonl': [str(line['score']) for line in lines if line['category'] == c] for c in CATEGORIES}
    assert json.loads((folder/'gpt_evaluation_summary.json').read_text()) == replay(gold, replies).summary
    records = [json.loads(line) for line in (folder/'eval_tiny_normal_3s'/'E2.jsonl').read_text('utf-8').splitlines()]
    assert [r['conversation'][1]['content'][0]['text'] for r in records] == ['Yes.'] * 18
    assert list(records[0]) == ['conversation', 'difficulty', 'category']


def test_the_headline_of_the_table_is_upstreams(samples, run):
    answers = answered(samples, lambda s: GOLDS[s.meta['category']][0])
    scores = measure(samples, answers, load_judge('lexical'), run)
    write_upstream(run, samples, answers, scores, 'eval_tiny_normal_0s')
    summary = json.loads((run.path('upstream')/'gpt_evaluation_summary.json').read_text())
    cells = table_cells(samples, scores, 'r').where(variant='as_published', unit='0-100', cluster='frame')
    assert summary['overall_score_standardized'] == pytest.approx(cells.where(column='overall')[0].value, abs=1e-12)
    for x in summary['per_category']: assert x['standardized_score'] == pytest.approx(cells.where(column=x['category'])[0].value, abs=1e-12)
    for x in summary['per_scenario']: assert x['standardized_score'] == pytest.approx(cells.where(column=x['scenario'])[0].value, abs=1e-12)


@pytest.mark.parametrize(('gold', 'replies', 'why'), [
    ({'E1': ['Plaza10']}, {'E1.jsonl': ['5']}, 'nothing to summarise'), ({'E1': ['Plaza10']}, {'E1_m.jsonl': []}, 'no line in common'),
    ({'E1': []}, {'E1_m.jsonl': ['5']}, 'no line in common'), ({}, {'E1_m.jsonl': ['5']}, 'no ground truth')])
def test_where_upstream_crashes_we_say_why(gold, replies, why):
    with pytest.raises(UpstreamError, match=why): replay(gold, replies)


def test_figures_are_printed_from_the_binary_float():
    assert printed(summarise([('E1', 'Plaza', s) for s in [1] * 7 + [2]]))[0] == ('E1', '1.12', '3.12')


def test_rubrics_exist_only_for_known_categories():
    assert set(RUBRICS) <= set(CATEGORIES)
