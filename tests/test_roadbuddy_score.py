"""Road Buddy's scores, floors, tables, submissions and published files, and that its table of defects says what the code does."""
import csv
import inspect
import json
import random

import pytest
from roadbuddy_files import FOUR, TWO, question, reply

from vlm_repro.core.assets import asset
from vlm_repro.core.jsonl import DataError
from vlm_repro.core.records import Answer, to_row
from vlm_repro.core.runs import open_run
from vlm_repro.report.published import Eligibility, load_published, verdicts
from vlm_repro.roadbuddy.extract import extract
from vlm_repro.roadbuddy.score import CLUSTERS, confusion, confusion_figure, count_answers, evaluate, floors, measure, row_name, table_cells
from vlm_repro.roadbuddy.submission import letters_of, pace_of, seconds_of, shares_of, submission_csv, time_csv, with_absent
from vlm_repro.roadbuddy.task import RoadBuddySettings
from vlm_repro.roadbuddy.upstream import write_upstream
from vlm_repro.train.recipe import load_recipe

SHARED = ['A. Có', 'B. Không', 'B. Không rõ']


def scored(pairs):
    samples = [s for s, _ in pairs]
    answers = extract(samples, [reply(s, text) for s, text in pairs])
    asked = [s for s in samples for _ in range(2)]
    return samples, answers, asked, measure(asked, answers)


def by_variant(scores, variant):
    return [x.values for x in scores if x.variant == variant]


def test_right_wrong_none_and_both_readings():
    _, _, _, scores = scored([(question(0, FOUR, 1), 'B'), (question(1, FOUR, 1), 'Đáp án: C'), (question(2, FOUR, 1), 'Tôi không biết'), (question(3, FOUR, 0), '???')])
    assert by_variant(scores, 'corrected') == [(1., 0.), (0., 0.), (0., 1.), (0., 1.)]
    assert by_variant(scores, 'as_published') == [(1., 0.), (0., 0.), (1., 0.), (1., 0.)]


def test_a_shared_letter_decides_nothing_in_the_score():
    _, _, _, scores = scored([(question(0, SHARED, 1), 'B'), (question(1, SHARED, 1), 'B. Không rõ'), (question(2, SHARED, 1), 'B. Không'), (question(3, FOUR * 2, 6), 'C')])
    assert by_variant(scores, 'corrected') == [(0., 1.), (0., 0.), (1., 0.), (1., 0.)] and by_variant(scores, 'as_published') == [(1., 0.)] * 4


def test_a_failed_call_is_an_a_only_as_published():
    _, answers, _, scores = scored([(question(0, FOUR, 0), None), (question(1, FOUR, 1), None)])
    assert by_variant(scores, 'corrected') == [None, None] and by_variant(scores, 'as_published') == [(1., 0.), (0., 0.)]
    assert {x.label for x in scores} == {'media: x.mp4: cut short'}


def test_answers_of_other_questions_are_refused():
    _, answers, asked, _ = scored([(question(0), 'A'), (question(1), 'B')])
    with pytest.raises(ValueError, match='pair them by id first'): measure(asked[::-1], answers)
    with pytest.raises(ValueError): measure(asked[:3], answers)


def test_confusion_and_counts_hold_every_answer():
    rng = random.Random(0)
    samples, answers, asked, _ = scored([(question(i, FOUR, rng.randrange(4)), rng.choice(['A', 'B', 'C', 'D', 'A hoặc B', '?', None])) for i in range(80)])
    strict = [a for a in answers if a.extractor == 'strict@1']
    table, counts = confusion(samples, strict), count_answers(asked, answers)
    assert sum(sum(row.values()) for row in table.values()) == 80 and {*'ABCD', 'none', 'ambiguous', 'failed'} == set(table)
    assert {p: sum(row.values()) for p, row in table.items()} == {k: n for k, n in counts['strict@1'].items()}
    assert sum(counts['right answer'].values()) == sum(counts['evaluate@1'].values()) == 80 and counts['evaluate@1']['failed'] == 0
    figure = confusion_figure(table, 'x', 'rendered')
    assert len(figure.axes[0].texts) == 7 * 4 and figure._repr_png_().startswith(b'\x89PNG')


def test_the_strict_accuracy_is_the_confusion_diagonal():
    rng = random.Random(3)
    samples, answers, _, scores = scored([(question(i, FOUR, rng.randrange(4)), rng.choice('ABCD?')) for i in range(60)])
    table = confusion(samples, [a for a in answers if a.extractor == 'strict@1'])
    assert sum(v[0] for v in by_variant(scores, 'corrected')) == sum(table[c][c] for c in 'ABCD')
    letters = [a.value for a in answers if a.extractor == 'evaluate@1']
    assert evaluate(letters, [s.meta['gold_letter'] for s in samples])['correct'] == sum(v[0] for v in by_variant(scores, 'as_published'))


def test_published_figures_cut_pairs_but_not_the_denominator():
    assert evaluate(['A', 'B', 'C'], ['A', 'B'])['accuracy'] == 2/3 and evaluate([], [])['accuracy'] == 0.
    odd = evaluate(['E', 'A'], ['A', 'F'])
    assert odd['confusion_matrix']['E'] == {'A': 1} and odd['confusion_matrix']['A']['F'] == 1 and odd['per_class']['F'] == {'correct': 0, 'total': 1}


def test_floors_are_shares_of_the_same_questions():
    samples = [question(0, TWO, 1), question(1, TWO, 1), question(2, FOUR, 0), question(3, FOUR, 2)]
    got = {f.name: f.value for f in floors(samples)}
    assert got == {'uniform': 37.5, 'majority': 50., 'majority by number': 75., 'longest': 25.} and floors(samples).marks['uniform'] == {'overall': 37.5}


def test_the_table_is_the_arithmetic_it_claims():
    rng = random.Random(5)
    pairs = [(question(i, FOUR if i % 3 else TWO, rng.randrange(2), clip=i//3, drive=i//30), rng.choice(['A', 'B', '?', None, 'A'])) for i in range(240)]
    samples, _, _, scores = scored(pairs)
    cells = table_cells(samples, scores, row_name('openai:OpenGVLab/InternVL3-8B@http://x/v1'), 400)
    assert {c.row for c in cells} == {'InternVL3-8B / zero-shot'} and {c.table for c in cells} == {'validation'} and {c.cluster for c in cells} == set(CLUSTERS)
    good = [v for v in by_variant(scores, 'corrected') if v]
    for cluster, n in (('source', 8), ('clip', 80)):
        (cell,) = cells.where(column='overall', cluster=cluster, variant='corrected', metric='accuracy')
        assert (cell.n, cell.n_failed) == (len(good), 240 - len(good)) and cell.n_clusters <= n
        assert cell.value == pytest.approx(100*sum(v[0] for v in good)/len(good)) and cell.lo < cell.value < cell.hi
    (invalid,) = cells.where(metric='invalid', cluster='clip', variant='corrected')
    assert invalid.value == pytest.approx(100*sum(v[1] for v in good)/len(good)) and invalid.value > 0
    (published,) = cells.where(metric='invalid', cluster='clip', variant='as_published')
    assert published.value == 0
    assert {c.column for c in cells} == {'overall', 'invalid', 'A', 'B', '2 choices', '4 choices'}
    assert sum(c.n for c in cells.where(metric='accuracy', cluster='clip', variant='corrected') if c.column in 'AB') == len(good)


def test_row_names():
    assert row_name('OpenGVLab/InternVL3-8B-hf') == row_name('OpenGVLab/InternVL3-8B') == 'InternVL3-8B / zero-shot' and row_name('me/InternVL3-8B-hf') == 'InternVL3-8B-hf / zero-shot'
    assert row_name('tiny', 'finetuned, 5 epochs') == 'tiny / finetuned, 5 epochs' and row_name('/a/b/InternVL3-8B/') == 'InternVL3-8B / zero-shot'


# submission

def test_a_submission_names_a_letter_for_every_question_and_counts_its_guesses():
    answers = [Answer('a', 'B. Sai', 'ok', 'strict@1'), Answer('b', None, 'ambiguous', 'strict@1'), Answer('c', 'D', 'ok', 'inference@1')]
    made = letters_of(answers)
    assert (made.letters, made.guessed) == (('B', 'A', 'D'), ('b',)) and submission_csv(made.ids, made.letters) == 'id,answer\na,B\nb,A\nc,D\n'
    with pytest.raises(DataError, match='1 of 3 questions have no valid answer, b first'): letters_of(answers, None)
    said = letters_of(answers, None, {'b': 'C', 'a': 'D'})
    assert (said.letters, said.guessed) == (('B', 'C', 'D'), ())


def test_a_question_that_could_not_be_asked_has_a_row_in_its_place():
    made = letters_of([Answer(i, 'B. x', 'ok', 's') for i in 'ad'])
    whole = with_absent(made, {'e': 4, 'b': 1, 'c': 2})
    assert ''.join(whole.ids) == 'abcde' and ''.join(whole.letters) == 'BAABA' and set(whole.guessed) == set('bce') and with_absent(made, {}) == made


def test_time_against_the_rule():
    timings = [{'ids': ['a', 'b'], 'seconds': 40.}, {'ids': ['b'], 'seconds': 2.}, {'n': 3, 'seconds': 9.}]
    seconds = seconds_of(timings)
    pace = pace_of(seconds)
    assert (pace.n, pace.mean, pace.slowest, pace.late) == (2, 21., 40., ('a',)) and pace_of({}).mean == 0 and pace_of({'a': 30.}).late == ()
    late = pace_of(seconds_of([{'ids': ['a', 'b'], 'seconds': 29.}], {'a': 1.5}), shares=shares_of([{'ids': ['a', 'b'], 'seconds': 29.}], {'a': 1.5}))
    assert (late.late, late.slowest, late.share) == (('a',), 30.5, 15.25) and shares_of(timings) == {'a': 20., 'b': 2.}
    assert '15.25 s each' in late._repr_markdown_() and '30.50 s at worst; **1 beyond 30 s**, a first' in late._repr_markdown_()
    assert time_csv(letters_of([Answer('a', 'A. x', 'ok', 's'), Answer('z', 'B. x', 'ok', 's')]), seconds) == 'id,answer,time\na,A,40000\nz,B,\n'


def test_a_run_leaves_the_published_files(tmp_path):
    pairs = [(question(0, FOUR, 1), 'B'), (question(1, FOUR, 2), 'Tôi không biết'), (question(2, FOUR, 0), None)]
    samples, answers, asked, scores = scored(pairs)
    run = open_run(tmp_path/'run', {'paper': 'roadbuddy'}, {})
    run.write('answers', map(to_row, answers))
    run.append('timings', [{'ids': [s.id for s in samples], 'n': 3, 'seconds': 1.5}])
    there = write_upstream(run, asked, [Answer(**row) for row in run.rows('answers')])
    results = json.loads((there/'results.json').read_text())
    assert list(results) == ['accuracy', 'correct', 'total', 'per_class', 'confusion_matrix', 'prediction_distribution', 'ground_truth_distribution']
    assert results['correct'] == 2 == sum(v[0] for v in by_variant(scores, 'as_published'))
    assert (there/'submission.csv').read_bytes() == b'id,answer\ntrain_0000,B\ntrain_0001,B\ntrain_0002,A\n'
    assert (there/'corrected_submission.csv').read_bytes() == b'id,answer\ntrain_0000,B\ntrain_0001,A\ntrain_0002,A\n'
    assert (there/'time_submission.csv').read_text().splitlines()[1] == 'train_0000,B,1500'
    run.close()


# published table and defects

def test_expected_figures_are_never_values():
    table = load_published('roadbuddy')
    assert [p.value for p in table if p.value is not None] == [48.89] and all('never measured' in p.source for p in table if p.value is None) and len(table) == 5
    samples, _, _, scores = scored([(question(0), 'A')])
    cells = table_cells(samples, scores, row_name('InternVL3-8B')).where(cluster='source', variant='as_published', unit='0-100')
    judged = verdicts(cells, table, Eligibility('paper', 'val, by sample, seed 42', 'InternVL3-8B', '', 'verbatim'))
    assert judged[0].published is not None and judged[0].status == 'no published value'


with asset('roadbuddy/defects.csv').open(encoding='utf-8', newline='') as file: ROWS = list(csv.DictReader(file))


def test_the_table_of_defects_is_whole():
    assert list(ROWS[0]) == ['id', 'stage', 'what happens', 'switch', 'default', 'test']
    assert [r['id'] for r in ROWS] == [f'roadbuddy-{i:02d}' for i in range(1, 17)]
    assert {r['stage'] for r in ROWS} <= {'data', 'frames', 'prompt', 'generate', 'extract', 'score', 'table', 'training'} and all(r['what happens'] and r['switch'] and r['default'] and r['test'] for r in ROWS)


@pytest.mark.parametrize('row', [r for r in ROWS if '=' in r['default']], ids=lambda r: r['id'])
def test_defaults_of_switches_are_those_the_table_tells(row):
    name, _, told = row['default'].partition('=')
    assert str(inspect.signature(RoadBuddySettings).parameters[name].default) == told
    asked = row['switch'].partition('=')[2].strip('"')
    assert row['switch'].startswith(f'{name}=') and asked != told and RoadBuddySettings(**{name: asked})


def test_recipes_of_both_precisions_exist():
    assert (load_recipe('roadbuddy/published').precision, load_recipe('roadbuddy/lora').precision) == ('fp16', 'bf16')
