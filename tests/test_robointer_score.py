"""RoboInter's readings and scores: both variants, bad input, tables, files and boards."""
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest

from vlm_repro.core.jsonl import DataError
from vlm_repro.core.records import Generation, Sample, failed
from vlm_repro.report.published import load_published
from vlm_repro.robointer import cells, language, leaderboards, planning, readings, score_boxes, score_traces, upstream
from vlm_repro.robointer.coordinates import Frame, FrameError
from vlm_repro.robointer.extract import NotRead, coordinates_in, extract, read_letter, read_places, read_polar
from vlm_repro.robointer.kinds import KINDS, planning_kind
from vlm_repro.robointer.score import flips, measure

DROID = {'frame': 'resized', 'w': '320', 'h': '180'}
BOX = '[[60, 60], [121, 120]]'


def asked(task, gold, id='1_exterior_image_1_left#1', **meta):
    return Sample(id, (), 'Where?', gold, {'task': task, **DROID, **meta})


def scored(sample, text, source=''):
    made = [text if isinstance(text, Generation) else Generation(sample.id, text)]
    return {(s.metric, s.variant): s for s in measure([sample]*2, extract([sample], made), source)}


def test_numbers_beside_the_answer_are_not_coordinates():
    got = scored(asked('current_box', json.dumps({'current_bbox': json.loads(BOX)})), 'In 308 by 168: (60, 60), (121, 120)')
    assert got['iou', 'corrected'].values[0] == 1 and got['iou', 'as_published'].values[0] < .1
    assert coordinates_in('-4.5, 1e2') == [(-4.5, 100)] and readings.numbers_in('-4.5, 1e2') == [4.5, 1, 2]


def test_whole_numbers_lose_their_fraction_only_as_published():
    got = scored(asked('current_box', BOX), BOX)
    assert got['iou', 'corrected'].values[0] == 1 > got['iou', 'as_published'].values[0] > .9


def test_an_empty_choice_is_right_only_as_published():
    for task, gold in (('grasppose_choice', 'B'), ('contact_decide', 'Yes'), ('planning_choice', 'B')):
        got = scored(asked(task, gold), '')
        assert got['accuracy', 'as_published'].values[0] == 1 and got['accuracy', 'corrected'].values == (0, 1)
    assert scored(asked('grasppose_choice', 'B'), 'It is not B but C')['accuracy', 'as_published'].values[0] == 1


def test_the_frame_follows_from_a_name_only_as_published():
    assert score_boxes.source_by_name('RoboInter-VLM_qwenvl25_3b') == 'api'
    sample = asked('current_box', BOX)
    assert scored(sample, BOX, 'api')['iou', 'as_published'].values[0] < scored(sample, BOX)['iou', 'as_published'].values[0]
    assert scored(sample, BOX, 'api')['iou', 'corrected'].values[0] == 1


def test_a_perfect_trace_counts_only_when_corrected():
    walk = json.dumps({'future_traj': [[10 + 7*i, 100 - 5*i] for i in range(10)]})
    one, two = asked('traj', walk), asked('traj', walk, '2_exterior_image_1_left#1')
    answers = extract([one, two], [Generation(one.id, walk), Generation(two.id, json.dumps({'future_traj': [[14.5 + 7*i, 100 - 5*i] for i in range(10)]}))])
    table = cells.table_cells([one, two], measure([one, one, two, two], answers), 'x', 50)
    trace = {c.variant: c.value for c in table if c.column == 'Trace'}
    assert math.isclose(trace['as_published'], 2*trace['corrected'], rel_tol=1e-9)
    alone = cells.table_cells([one], measure([one, one], extract([one], [Generation(one.id, walk)])), 'x', 50)
    assert [c.variant for c in alone if c.column == 'Trace'] == ['corrected']


def test_the_size_of_an_image_is_the_record_s_own():
    gold, far = json.dumps({'future_traj': [[100, 100], [200, 200]]}), json.dumps({'future_traj': [[100, 110], [200, 210]]})
    got = scored(asked('traj', gold, 'RH20T_cfg1_task_1#4', w='640', h='360'), far)
    assert math.isclose(got['dtw', 'corrected'].values[0], 20*360/364, rel_tol=1e-9) and got['dtw', 'as_published'].values[0] != got['dtw', 'corrected'].values[0]


def test_a_trace_of_another_length_has_no_rmse():
    gold = json.dumps({'future_traj': [[10, 10], [20, 20], [30, 30]]})
    got = scored(asked('traj', gold), '[[10, 10], [20, 20]]')
    assert got['rmse', 'corrected'].values is None and 'length' in got['rmse', 'corrected'].label and got['rmse', 'as_published'].values[0] == 0
    point = asked('contact_point', '{"contact_point": [[1, 2], [3, 4]]}')
    assert scored(point, 'none')['fingers', 'as_published'].values[0] == 0 and scored(point, 'none')['fingers', 'corrected'].values is None


def test_weights_of_bleu_add_up_when_corrected():
    assert sum(planning.published_weights(4)[2]) == pytest.approx(.99)
    assert planning.corrected_bleu('Pick  up it', 'pick up it')['score'] == 1
    three = planning.sentence_bleu('a b x d'.split(), 'a b c d'.split(), (1/3,)*3)
    assert planning.corrected_bleu('a b x d', 'a b c d')['bleu3'] == pytest.approx(three)


def test_bleu_is_that_of_nltk():
    bleu = pytest.importorskip('nltk.translate.bleu_score', reason='nltk is not installed: the extra `metrics` brings it')
    rng = random.Random(0)
    for _ in range(100):
        said, true = ([rng.choice('abcde') for _ in range(rng.randint(1, 9))] for _ in range(2))
        for w in planning.published_weights(len(true)):
            assert planning.sentence_bleu(said, true, w) == pytest.approx(bleu.sentence_bleu([true], said, w, bleu.SmoothingFunction().method1), abs=1e-12)


def test_no_is_a_word():
    assert scored(asked('planning_decide', 'No'), 'I know nothing')['accuracy', 'as_published'].values[0] == 1
    assert scored(asked('planning_decide', 'No'), 'I know nothing')['accuracy', 'corrected'].values == (0, 1)
    assert [read_polar(t).value for t in ('No.', 'yes', 'It is: Yes', 'neither')] == ['No', 'Yes', 'Yes', None]


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match='Planning_with_Context_Task'): planning_kind('7_exterior_image')
    with pytest.raises(ValueError, match='unknown task'): extract([asked('gripper', 'A')], [Generation('1_exterior_image_1_left#1', 'A')])


def test_the_language_evaluator_scores_words_only():
    for kind in ('bbox', 'traj', 'point'): assert not language.published_language([0], [BOX], [BOX], kind).details
    assert language.published_language([0], ['a'], ['a']).averages['score'] == 1


def test_the_printed_average_has_no_cell():
    sample = asked('current_box', BOX)
    assert upstream.published_scores('qwen25', {'current_box': [{'id': sample.id, 'pred': BOX, 'gt': BOX}]}).average > .9
    assert not any('average' in c.column.lower() for c in cells.table_cells([sample], measure([sample]*2, extract([sample], [Generation(sample.id, BOX)])), 'x', 50))


@pytest.mark.parametrize(('said', 'label'), [
    ('[[0.2, 0.3], [0.4, 0.6]]', 'other_frame'), ('[[220, 570], [600, 990]]', 'other_frame'), ('[[-900, 0], [4000, 10]]', 'outside'), ('', 'empty'), ('no box', 'none'), ('[1, 2, 3]', 'bad_arity'),
    ('[1, 2, 3, 4, 5, 6]', 'bad_arity'), ('[[1.2.3, 4], [5, 6]]', 'malformed'), ('[nan, 2, 3, 4]', 'not_finite'), ('[inf, 2, 3, 4]', 'not_finite'), ('[[1, 2], [3, 4', 'malformed')])
def test_another_frame_is_said(said, label):
    got = scored(asked('current_box', BOX), said)['iou', 'corrected']
    assert got.values[0] == 0 and got.label.startswith(label)


def test_odd_boxes_are_labelled_and_failures_have_no_score():
    sample = asked('current_box', BOX)
    inverted = scored(sample, '[[121, 120], [60, 60]]')['iou', 'corrected']
    assert inverted.values[0] == 1 and inverted.label.startswith('inverted')
    assert scored(sample, '[[60, 60], [60, 60]]')['iou', 'corrected'].label.startswith('empty_box')
    assert scored(sample, '[[-2, 60], [121, 120]]')['iou', 'corrected'].label.startswith('outside')
    lost = scored(sample, failed(sample.id, 'timeout', '30 s'))
    assert lost['iou', 'corrected'].values is None and lost['iou', 'as_published'].values[0] == 0
    with pytest.raises(FrameError, match='bad_gold'): scored(asked('current_box', 'nowhere'), BOX)
    with pytest.raises(FrameError, match='does not say'): scored(Sample('x', (), '', BOX, {'task': 'current_box'}), BOX)


def test_no_text_breaks_the_reader():
    rng = random.Random(1)
    for _ in range(3000):
        text = ''.join(rng.choices('[](){}<>0123456789.,-+eE: \n"\'abnif/', k=rng.randint(0, 40)))
        for task in ('current_box', 'traj', 'contact_point'):
            try: places = read_places(text, KINDS[task], Frame('pixels', 320, 180))
            except (NotRead, FrameError): continue
            assert all(math.isfinite(v) for p in places.xy for v in p)
        read_letter(text), read_polar(text), readings.published_box(text), readings.published_structure(text)


def walk_by_trying(a, b, combine):
    "The best walk by trying all, as the definition has it."
    def best(i, j):
        here = math.dist(a[i], b[j])
        if not i and not j: return here
        return combine(here, min(best(*p) for p in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if min(p) >= 0))
    return best(len(a) - 1, len(b) - 1)


def test_distances_are_what_their_definitions_say():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (rng.uniform(0, 100, (rng.integers(1, 6), 2)).tolist() for _ in range(2))
        assert score_traces.dtw(a, b) == pytest.approx(walk_by_trying(a, b, lambda x, y: x + y))
        assert score_traces.frechet(a, b) == pytest.approx(walk_by_trying(a, b, max))
        assert score_traces.hausdorff(a, b) == pytest.approx(max(max(min(math.dist(p, q) for q in y) for p in x) for x, y in ((a, b), (b, a))))
    long = [[i, 0] for i in range(2000)]
    assert score_traces.frechet(long, long) == 0


def test_answers_in_thousandths_are_found_out_over_a_run():
    rng, samples, told = random.Random(0), [], []
    for i in range(30):
        x, y, w, h = rng.randint(0, 200), rng.randint(0, 100), rng.randint(20, 100), rng.randint(20, 60)
        samples.append(asked('current_box', json.dumps([[x, y], [x + w, y + h]]), f'{i}_exterior#1'))
        told.append(Generation(samples[-1].id, json.dumps([[x*1000/308, y*1000/168], [(x + w)*1000/308, (y + h)*1000/168]])))
    written = [a for a in extract(samples, told) if a.extractor.startswith('as_written')]
    assert score_boxes.frame_fits(samples, written).suspect == 'permille'


@pytest.mark.parametrize('task, text, why', [
    ('traj', '{"contact_bbox": [[17, 60], [107, 80]]}', 'other_key'), ('contact_point', '{"final_bbox": [[17, 60], [107, 80]]}', 'other_key'), ('current_box', '{"gripper_det_bbox": [[17, 60], [107, 80]]}', 'other_key'),
    ('traj', '{"contact_contact_bbox": [[17, 60], [107, 80]]}', 'other_key'), ('current_box', '{"future_traj": [[17, 60], [107, 80]]}', 'other_key'), ('traj', '{"bbox_2d": [17, 60, 107, 80]}', 'other_key'),
    ('current_box', '```json\n[{"bbox_2d": [69, 95, 184, 167], "label": "cup"}, {"bbox_2d": [1, 2, 3, 4], "label": "pan"}]\n```', 'ambiguous'),
    ('current_box', '[[69, 95, 184], [167]]', 'bad_arity'), ('current_box', '[69%, 95%, 80%, 99%]', 'percentages'), ('current_box', '[[69, 95], [184, 167]] or [[1, 2], [3, 4]]', 'bad_arity')])
def test_the_answer_to_another_question_is_none(task, text, why):
    sample = asked(task, json.dumps({KINDS[task].key: [[69, 95], [184, 160]]}))
    answer = extract([sample], [Generation(sample.id, text)])[-1]
    assert answer.value is None and why in answer.error and answer.status == ('ambiguous' if why == 'ambiguous' else 'none')


@pytest.mark.parametrize('task, text', [
    ('current_box', '{"current_bbox": [[69, 95], [184, 160]], "final_bbox": [[1, 2], [3, 4]]}'), ('current_box', '{"bbox_2d": [69, 95, 184, 160], "label": "cup"}'), ('current_box', 'x1=69 y1=95 x2=184 y2=160'),
    ('current_box', '{"x1": 69, "y1": 95, "x2": 184, "y2": 160}'), ('current_box', '{"answer": {"current_bbox": [[69, 95], [184, 160]]}}'), ('contact_point', '{"points": [[69, 95], [184, 160]]}'),
    ('traj', '{"trajectory": [[69, 95], [184, 160]]}'), ('current_box', '{"bbox_2d": [69, 95, 184, 160]} and again {"bbox_2d": [69, 95, 184, 160]}'), ('current_box', '{"coordinates": [[69, 95], [184, 160]]}')])
def test_other_words_for_the_same_places_are_read(task, text):
    sample = asked(task, json.dumps({KINDS[task].key: [[69, 95], [184, 160]]}))
    assert json.loads(extract([sample], [Generation(sample.id, text)])[-1].value) == [[69, 95], [184, 160]]


def test_our_files_give_the_published_scorer_our_published_numbers():
    sample = asked('traj', json.dumps({'future_traj': [[100, 200], [150, 250]]}), 'RH20T_cfg7#1', w='640', h='360', new_w='644', new_h='364')
    told = Generation(sample.id, '[[110, 210], [160, 240]]')
    ours = next(x for x in measure([sample]*2, extract([sample], [told])) if (x.metric, x.variant) == ('dtw', 'as_published'))
    assert upstream.published_scores('qwen25', {'traj': upstream.details_of([sample], [told])}).tasks['traj']['mean_dtw'] == pytest.approx(ours.values[0], abs=1e-8)


def test_flips_are_what_differs():
    sample = asked('contact_decide', 'Yes')
    assert [c.id for c in flips(list(scored(sample, '').values()))] == [sample.id] and not flips(list(scored(sample, 'Yes').values()))


def test_files_of_answers_go_and_come_back(tmp_path):
    samples = [asked('current_box', BOX), asked('contact_decide', 'Yes', record_id='as released')]
    made = [Generation(samples[0].id, BOX), Generation(samples[1].id, 'Ja 是')]
    upstream.write_details(tmp_path, samples, made)
    assert 'image_size' not in upstream.read_folder(tmp_path)['current_box'][0]
    upstream.write_details(tmp_path, samples, made, sizes=True)
    found = upstream.read_folder(tmp_path)
    assert found['contact_decide'][0]['id'] == 'as released' and found['contact_decide'][0]['pred'] == 'Ja 是' and found['current_box'][0]['image_size'] == [320, 180]
    (tmp_path/'eval_details_gripper.json').write_text('[]')
    with pytest.raises(DataError, match='no task is called'): upstream.read_folder(tmp_path)


def test_the_published_tables_and_their_columns():
    table = load_published('robointer')
    columns = {c.name for k in KINDS.values() for c in cells.columns_of(k)}
    assert {p.column for p in table if p.table == cells.TABLE} <= columns
    assert {p.column for p in table if p.table == leaderboards.TABLE} == {*leaderboards.BOARDS, *leaderboards.NO_SCORER}
    assert {(p.row, p.column): p.value for p in table}['RoboInter-Qwen-7B', 'RoboRefIt'] == 85.6
    assert set(cells.CHECKPOINTS.values()) <= {p.row for p in table}


def test_boards_say_what_they_cannot_do(tmp_path):
    with pytest.raises(ValueError, match='NameError'): leaderboards.boards_of(['RoboVQA'])
    with pytest.raises(leaderboards.BoardsError, match='no virtual environment'): leaderboards.check_environment(tmp_path)
    with pytest.raises(leaderboards.BoardsError, match='no folder of a checkpoint'): leaderboards.family_of(tmp_path)


TASK = """task: squares
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: "id"
generation_kwargs:
  max_new_tokens: 4
  temperature: 0
  do_sample: false
process_results: !function utils.results
metric_list:
  - metric: length
    aggregation: mean
    higher_is_better: true
"""
UTILS = """from PIL import Image


def visual(doc): return [Image.open(doc["image"]).convert("RGB")]


def text(doc, kwargs=None): return doc["question"]


def results(doc, results): return {"length": len(results[0])}
"""


@pytest.mark.parametrize('held', ['{"results": {"mme": null, "pope": 3}, "n-samples": {"pope": 7, "mme": {"effective": "x"}}}', '{"results": {"pope": {"pope_f1_score,none": NaN}}}'])
def test_a_result_file_with_holes_leaves_empty_cells(tmp_path, held):
    (tmp_path/'a_results.json').write_text(held)
    found = leaderboards.read_results(tmp_path/'a_results.json')
    assert all(c.value is None and c.n == 0 for c in leaderboards.results_cells(found, 'x'))


def test_a_result_file_is_shown_beside_the_published_numbers(tmp_path):
    from typer.testing import CliRunner

    from vlm_repro.cli_boards import boards_app
    path = tmp_path/'a_results.json'
    path.write_text(json.dumps({'results': {'pope': {'pope_f1_score,none': .793}}, 'n-samples': {'pope': {'original': 9000, 'effective': 5}}}))
    told = CliRunner().invoke(boards_app, ['read', str(path), '--as', 'Qwen/Qwen2.5-VL-3B-Instruct', '--out', str(tmp_path/'t.csv')])
    assert told.exit_code == 0 and '79.30' in told.output and '85.9' in told.output and 'only 5 of 9,000' in told.output and 'cannot be judged' in (tmp_path/'t.csv').read_text()
    path.write_text('{"results": ')
    assert 'a_results.json: not JSON' in str(CliRunner().invoke(boards_app, ['read', str(path)]).exception)
    with pytest.raises(leaderboards.BoardsError, match='fetch it first'): leaderboards.family_of('Qwen/Qwen2.5-VL-3B-Instruct')


@pytest.mark.slow
def test_boards_run_on_a_checkpoint_of_ours(tmp_path, monkeypatch):
    env = os.environ.get('VLM_REPRO_LMMS_ENV', '')
    if not env: pytest.skip('no environment of lmms-eval is given: make one with `vlm-repro leaderboards setup ENV` and name it in VLM_REPRO_LMMS_ENV')
    from PIL import Image

    from vlm_repro.models.protocol import tiny_checkpoint
    for i in range(3): Image.new('RGB', (56, 56), (60*i, 90, 120)).save(tmp_path/f'{i}.png')
    (tmp_path/'task').mkdir()
    rows = tmp_path/'task'/'rows.jsonl'
    rows.write_text(''.join(json.dumps({'id': i, 'image': str(tmp_path/f'{i}.png'), 'question': 'What is it?'}) + '\n' for i in range(3)))
    (tmp_path/'task'/'squares.yaml').write_text(TASK.format(rows=rows))
    (tmp_path/'task'/'utils.py').write_text(UTILS)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    board = leaderboards.Board('Squares', 'squares', ('length',), 1., 'characters')
    found = leaderboards.run_boards(Path(env), tiny_checkpoint(), [board], tmp_path/'out', device='cpu', batch=2, include=str(tmp_path/'task'))
    assert len(found) == 1 and found[0].n == 3 and found[0].value > 0
