"""GPT4Scene's scores: tokens, caption metrics, boxes, both variants, and that its table of defects says what the code does."""
import itertools
import json
import random

import numpy as np
import pytest

from vlm_repro.core.records import Answer
from vlm_repro.gpt4scene import cells, gpt_score, score_caption, score_grounding, score_qa
from vlm_repro.gpt4scene.rows import ValRow, sample_of, val_row
from vlm_repro.metrics import boxes3d, captions, meteor, ptb
from vlm_repro.report.published import load_published

CHAIR, DESK, LAMP = [0, 0, .5, .6, .6, 1], [2, 0, .4, 1.5, .8, .8], [5, 5, 1, .3, .3, 1.5]
SCENES = score_grounding.scene_boxes({'s': [CHAIR, DESK]}, {'s': [CHAIR, DESK, LAMP]})


def answers(samples, texts):
    return [Answer(s.id, t, 'ok', 'as_written@1') if t is not None else Answer(s.id, None, 'none', 'as_written@1', 'server: gone') for s, t in zip(samples, texts, strict=True)]


def by_variant(scores, metric):
    out = {}
    for x in scores:
        if x.metric == metric: out.setdefault(x.variant, []).append(x.values)
    return out


# Tokens. -------------------------------------------------------------------------------------------------------------------------------------------------------------------------------

def test_words_looked_up_and_lines_cut_whole_agree():
    rng = random.Random(0)
    words = "the a chair It's isn't there's 2 ten No. no. Mr. TV left-hand o'clock don't chair, sofa; yes! what? etc. U.S. 555 1/2 cannot gonna.".split()
    for _ in range(300):
        line = ' '.join(rng.choice(words) for _ in range(rng.randint(0, 6)))
        assert ptb._line(line) == ptb._kept(ptb.cut(line)), line


def test_a_broken_line_shifts_every_later_caption():
    for mark in '\r\x0b\x0c\u2028\u2029':
        assert ptb.tokenize_published(['a', f'b{mark}c', 'd']) == ['a', 'b', 'c']
        assert ptb.tokenize(['a', f'b{mark}c', 'd']) == ['a', 'b c', 'd'] and ptb.breaks_lines(f'b{mark}c')
    assert ptb.tokenize_published(['a\nb', 'c']) == ['a b', 'c'] and not ptb.breaks_lines('a\nb')


def test_a_stop_depends_on_the_next_caption():
    assert ptb.tokenize_published(['It is no.', '2 chairs']) == ['it is no.', '2 chairs']
    assert ptb.tokenize(['It is no.', '2 chairs']) == ['it is no', '2 chairs']


# Caption metrics. ----------------------------------------------------------------------------------------------------------------------------------------------------------------------

def longest(a, b):
    "The longest common subsequence by trying all."
    return max(n for n in range(min(len(a), len(b)) + 1) if n == 0 or set(itertools.combinations(a, n)) & set(itertools.combinations(b, n)))


def test_the_bits_find_the_longest_common_subsequence():
    rng = random.Random(1)
    for _ in range(200):
        a, b = ([rng.choice('abc') for _ in range(rng.randint(1, 6))] for _ in range(2))
        assert captions.common_length(a, b) == longest(a, b)


def test_sums_of_statistics_give_the_corpus_and_weights_stay_those_of_the_full_set():
    said, refs = ['a brown chair', 'the desk', 'two'], [['a chair'], ['a desk', 'the desk'], ['2', 'two']]
    held, weights = captions.caption_statistics(said, refs), captions.document_frequencies(refs)
    part = captions.cider(said[:2], refs[:2], weights)
    assert np.allclose(part, held['cider'][:2, 0], atol=0) and not np.allclose(part, captions.cider(said[:2], refs[:2]))
    assert captions.caption_scores(said, refs)['Bleu_2'] == float(captions.bleu_score(held['bleu'].sum(0), order=2))


def test_the_paper_without_java_has_a_reason_and_no_number(monkeypatch):
    monkeypatch.setattr(meteor.shutil, 'which', lambda name: None)
    meteor._program.cache_clear()
    assert meteor.meteor_absence().startswith('no_java: ')
    samples = [sample_of('scanqa', 0, ValRow('s', 'q', ('a',)))]
    scores = [x for x in score_qa.measure_qa(samples, answers(samples, ['a'])) if x.metric == 'meteor']
    assert [(x.values, x.label.split(':')[0]) for x in scores] == [(None, 'no_java')]*2
    assert score_qa.published_qa('scanqa', [ValRow('s', 'q', ('a',))], ['a'])['[scanqa] METEOR'] is None


@pytest.mark.slow
@pytest.mark.skipif(bool(meteor.meteor_absence()), reason=meteor.meteor_absence())
def test_the_score_of_counts_is_what_the_program_prints():
    said, refs = ['the cat is on the mats', 'brown table', 'the', '', 'a b a c'], [['the cat sat on the mat', 'a cat on a mat'], ['brown chair'], ['the'], ['a'], ['a c b']]
    counts = meteor.meteor_statistics(said, refs)
    raw = meteor._program().ask([meteor.question(h, r) for h, r in zip(said, refs, strict=True)])
    program = meteor._program().process
    program.stdin.write(f'EVAL ||| {" ||| ".join(raw)}\n')
    program.stdin.flush()
    printed = [float(program.stdout.readline()) for _ in range(len(said) + 1)]
    assert np.allclose([*meteor.meteor_score(counts), meteor.meteor_score(counts.sum(0))], printed, atol=1e-12, rtol=0)


# Boxes. --------------------------------------------------------------------------------------------------------------------------------------------------------------------------------

def test_the_matching_is_the_best_of_all():
    rng = np.random.default_rng(0)
    for n in range(1, 7):
        cost = rng.integers(0, 4, (n, n)).astype(float)
        found = boxes3d.assign(cost)
        assert sorted(found) == list(range(n))
        assert sum(cost[i, j] for i, j in enumerate(found)) == min(sum(cost[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(n)))


def test_a_cost_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match='not finite'): boxes3d.assign(np.array([[np.nan]]))


# Both variants. ------------------------------------------------------------------------------------------------------------------------------------------------------------------------

def test_references_of_scanqa_are_cleaned_only_when_corrected():
    rows = [ValRow('s', 'q', ('2',)), ValRow('s', 'q', ('tv',)), ValRow('s', 'q', ('the chair',)), ValRow('s', 'q', ('red',))]
    for benchmark, published in (('scanqa', [(0, 0), (0, 0), (0, 1), (1, 1)]), ('sqa3d', [(1, 1)]*4)):
        samples = [sample_of(benchmark, i, r) for i, r in enumerate(rows)]
        held = by_variant(score_qa.measure_qa(samples, answers(samples, ['Two.', 'TV', 'Chair', 'Red.']), meteor=False), 'em')
        assert held == {'corrected': [(1, 1)]*4, 'as_published': published}


def test_a_failed_answer_is_an_empty_one_only_as_published():
    samples = [sample_of('scanqa', i, ValRow('s', 'q', ('a lamp',))) for i in range(3)]
    scores = score_qa.measure_qa(samples, answers(samples, ['Lamp.', None, 'Lamp.']), meteor=False)
    assert by_variant(scores, 'em') == {'corrected': [(1, 1), (1, 1), None], 'as_published': [(0, 1), (0, 0), (0, 1)]}
    assert sum(x.values is None and x.label == 'server: gone' for x in scores if x.variant == 'corrected') == 5


def test_an_answer_that_names_nothing_is_a_miss_only_when_corrected():
    samples = [sample_of('scanrefer', i, ValRow('s', 'q', (), 0, obj)) for i, obj in enumerate([0, 1, 0])]
    held = by_variant(score_grounding.measure_grounding(samples, answers(samples, ['No idea.', '<OBJ001>', '<OBJ099> or <OBJ000>']), SCENES), 'acc')
    assert held == {'corrected': [(0, 0), (1, 1), (1, 1)], 'as_published': [(1, 1)]*3}


def test_repeats_and_numbers_out_of_range():
    samples = [sample_of('multi3dref', i, ValRow('s', 'q', refs, 0, 0, 0, kind)) for i, (refs, kind) in enumerate([((0,), 'st_w_d'), ((), 'zt_w_d'), ((0, 1), 'mt')])]
    held = by_variant(score_grounding.measure_grounding(samples, answers(samples, ['<OBJ000> <OBJ000>', '<OBJ050>', '<OBJ001>, <OBJ000>, <OBJ077>']), SCENES), 'f1')
    assert held == {'corrected': [(1, 1), (0, 0), (.8, .8)], 'as_published': [(2/3, 2/3), (1, 1), (1, 1)]}


def test_object_numbers_in_other_scripts():
    assert score_grounding.named_ids('<OBJ٠٠١> <OBJ0012>') == [1] and score_grounding.named_ids('<OBJ٠٠١>', False) == []


def test_an_unknown_target_type_is_named():
    with pytest.raises(KeyError, match="target type 'zt'; there are zt_wo_d"): score_grounding.multi_f1(ValRow('s', 'q', (), kind='zt'), 'No.', SCENES['s'])


def test_only_described_objects_are_counted():
    rows = [{'scene_id': 's', 'object_id': '3', 'object_name': 'office_chair'}]
    assert score_grounding.unique_lookup(rows, {'office chair': 'chair'}) == {'s': {'3': 0}}
    assert score_grounding.unique_lookup(rows + [{'scene_id': 's', 'object_id': '4', 'object_name': 'stool'}], {'office chair': 'chair', 'stool': 'chair'}) == {'s': {'3': 1, '4': 1}}


def test_absent_types_and_empty_groups():
    rows = [ValRow('s', 'q', ('red',), kind=0)]
    published = score_qa.published_qa('sqa3d', rows, ['Red.'], False)
    assert published['[sqa3d] EM_type0'] == 1/(1 + 1e-10) and published['[sqa3d] EM_type3'] == 0
    samples = [sample_of('sqa3d', 0, rows[0])]
    made = cells.table_cells(samples, score_qa.measure_qa(samples, answers(samples, ['Red.']), meteor=False), 'row', n_resamples=10)
    assert [c.value for c in made.where(column='EM what', cluster='scene')] == [100, 100*(1/(1 + 1e-10))] and not made.where(column='EM can')
    with pytest.raises(ZeroDivisionError): score_grounding.published_scanrefer([ValRow('s', 'q')], ['<OBJ000>'], SCENES, {'s': {'0': 0}})


CORPUS = {'s|0': ['sos a brown chair eos'], 's|1': ['sos a desk eos'], 's|2': ['sos a lamp eos']}


def test_sos_and_eos_earn_nothing_when_corrected():
    samples = [sample_of('scan2cap', i, ValRow('s', 'q', (), 0, i, 1 - i)) for i in (0, 1)]
    held = by_variant(score_caption.measure_scan2cap(samples, answers(samples, ['A brown chair.', 'A desk.']), SCENES, CORPUS, meteor=False), 'rouge_l@0.50')
    assert held['corrected'] == [(0.,)]*3 and all(v[0] > 0 for v in held['as_published'])


def test_a_replaced_row_is_labelled():
    samples = [sample_of('scan2cap', i, ValRow('s', 'q', (), 0, 0, 0)) for i in (0, 1)]
    scores = [x for x in score_caption.measure_scan2cap(samples, answers(samples, ['Old.', 'A brown chair.']), SCENES, CORPUS, meteor=False) if x.metric == 'rouge_l@0.25' and x.variant == 'corrected']
    assert {x.id: (x.values, x.label.split(':')[0]) for x in scores} == {'scan2cap/00001': ((1.,), 'ok'), 's|1': ((0.,), 'ok'), 's|2': ((0.,), 'ok'), 'scan2cap/00000': (None, 'duplicate')}


def test_boxes_that_are_not_there_are_named():
    with pytest.raises(KeyError, match='no boxes of t'): score_caption.proposal_overlap(ValRow('t', 'q'), SCENES)
    with pytest.raises(IndexError, match='no proposal 9'): score_caption.proposal_overlap(ValRow('s', 'q', pred_id=9), SCENES)
    with pytest.raises(KeyError, match='no captions in the corpus'): score_caption.gate([ValRow('s', 'q', obj_id=2)], [''], SCENES, {}, .5)


# Tables. -------------------------------------------------------------------------------------------------------------------------------------------------------------------------------

def test_the_table_reduces_to_the_published_dictionary():
    rng = random.Random(3)
    said = [rng.choice(['Two.', 'A brown chair.', 'left', 'No.']) for _ in range(40)]
    rows = [ValRow(f'scene{i % 8:04d}_00', 'q', tuple(rng.sample(['2', 'two', 'brown chair', 'left', 'no', 'the TV'], 2)), kind=i % 5) for i in range(40)]
    for benchmark in ('scanqa', 'sqa3d'):
        samples = [sample_of(benchmark, i, r) for i, r in enumerate(rows)]
        made = cells.table_cells(samples, score_qa.measure_qa(samples, answers(samples, said), meteor=False), 'row', n_resamples=20).where(variant='as_published', cluster='scene')
        want = score_qa.published_qa(benchmark, rows, said, meteor=False)
        names = {'EM': 'EM1', 'EM-R': 'EM1_refined', 'B-1': 'Bleu_1', 'B-4': 'Bleu_4', 'ROUGE-L': 'ROUGE_L', 'CIDEr': 'CIDEr'}
        for column, key in names.items(): assert made.where(column=column)[0].value == pytest.approx(100*want[f'[{benchmark}] {key}'], abs=1e-9)
        assert all(c.lo <= c.value <= c.hi for c in made if c.value is not None) and made.where(column='CIDEr')[0].n_clusters == 8


def test_points_of_the_gpt_score():
    held = {(p.row.rsplit(' / ', 1)[1], p.column): p.value for p in load_published('gpt4scene') if p.table == 'GPT score'}
    for row in ('untuned', 'tuned'):
        counts = [held[row, k] for k in ('win', 'tie', 'lose')]
        assert sum(counts) == 1000 and gpt_score.points(counts, lose=0) == held[row, 'points'] != gpt_score.points(counts)


def test_either_order_of_a_pair_gives_the_same_outcome():
    samples = [sample_of('scanqa', i, ValRow('s', 'q', ('lamp',))) for i in range(12)]
    assert len({gpt_score.swapped(s.id) for s in samples}) == 2
    for s, item in zip(samples, gpt_score.pair_items(samples, ['lamp']*12, ['sofa']*12), strict=True):
        reply = gpt_score.Reply(str(gpt_score.match_rule(item).score))
        assert gpt_score._outcome(s.id, [reply], 'judge') == ((1., 0., 0.), 'ok')
    assert gpt_score._outcome('x', [gpt_score.Reply('5')], 'judge')[0] is None


def test_published_rows_are_those_that_a_run_can_have():
    table = load_published('gpt4scene')
    held = {p.table: {q.column for q in table if q.table == p.table} for p in table}
    for key, name in cells.BENCHMARKS.items():
        known = {c.name for c in cells.columns_of(key)}
        assert {c for c in held[name] if 'v4 Table' not in c} <= known
    assert {p.value for p in table if p.row == cells.row_name(frames=8, size=128, bev=False) and p.table == 'ScanQA'} == {42.3, 87.1}


def test_a_row_keeps_what_scoring_needs():
    row = val_row({'scene_id': 's', 'prompt': 'p', 'ref_captions': ['ä', 3], 'obj_id': '4', 'eval_type': 'mt'})
    sample = sample_of('multi3dref', 7, row)
    assert score_grounding.row_of(sample) == ValRow('s', 'p', ('ä', 3), '0', 4, 0, 'mt') and json.loads(sample.gold) == ['ä', 3]
