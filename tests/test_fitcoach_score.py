"""FitCoach's scores: matching in time, texts, a judge's replies, the evaluator's files and the table."""
import json
import random

import numpy as np
import pytest

from vlm_repro.core.jsonl import DataError
from vlm_repro.core.records import Answer, Sample
from vlm_repro.core.runs import open_run
from vlm_repro.fitcoach.cells import COLUMNS, TABLE, exercise_cells, row_name, table_cells
from vlm_repro.fitcoach.evaluate import challenge_records, episode_of, evaluate, full_records, in_order, measure, printed, said_of, saved_pairs, write_files
from vlm_repro.fitcoach.match import RULES, Timed, greedy, match, optimal, temporal_f
from vlm_repro.fitcoach.score import LLM_PROMPT, checked_score, fill_slots, judge_items, llm_scores, micro_mean, published_scores, rouge_l, text_scores
from vlm_repro.metrics.bertscore import LetterEncoder, Tokens, TransformerEncoder, bert_score, token_score
from vlm_repro.metrics.judge import ModelJudge, Reply, RuleJudge, collect
from vlm_repro.metrics.meteor import MeteorAbsent
from vlm_repro.metrics.meteor_nltk import meteor_nltk_absence, meteor_pair, meteor_pairs
from vlm_repro.metrics.text import grade
from vlm_repro.report.published import load_published


def timed(*times):
    return Timed(tuple(f'text {i}' for i in range(len(times))), times)


# matching

def brute(a, b, window=3.):
    "The most pairs and their least distance, by trying all."
    if not a: return 0, 0.
    found = [brute(a[1:], b, window)]
    for j, t in enumerate(b):
        if abs(a[0] - t) < window/2:
            n, cost = brute(a[1:], b[:j] + b[j + 1:], window)
            found.append((n + 1, cost + abs(a[0] - t)))
    return max(found, key=lambda v: (v[0], -v[1]))


def test_the_best_matching_is_the_best():
    rng = random.Random(0)
    for _ in range(150):
        a, b = ([rng.uniform(0, 12) for _ in range(rng.randrange(6))] for _ in range(2))
        pairs = optimal(a, b, ['x']*len(b))
        n, cost = brute(a, b)
        assert len(pairs) == n and abs(sum(abs(a[i] - b[j]) for i, j in pairs) - cost) < 1e-9
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == n >= len(greedy(sorted(a), sorted(b), ['x']*len(b)))


def test_the_window_is_open_at_its_ends():
    assert greedy([0.], [1.5], ['x']) == optimal([0.], [1.5], ['x']) == [] and greedy([0.], [1.4999], ['x']) == [(0, 0)]


def test_an_empty_prediction_counts_and_matches_nothing():
    for rule in RULES:
        held = match(timed(2.), Timed(('',), (2.,)), rule)
        assert held.gt_pred == () and held.n_pred == 1


def test_predictions_out_of_order_lose_matches_only_as_published():
    true, said = timed(2., 8., 14.), timed(14., 2., 8.)
    assert [len(match(true, s, r).gt_pred) for s, r in ((said, 'as_published'), (in_order(said), 'as_published'), (said, 'optimal'))] == [2, 3, 3]
    with pytest.raises(ValueError, match='valid: as_published, optimal'): match(true, said, 'best')


def test_f_of_nothing_is_nothing():
    assert float(temporal_f(np.zeros(4))) == 0 and evaluate([], meteor=False).numbers['T-F'] == 0 and micro_mean([]) == 0


# texts

@pytest.mark.parametrize('a, b, score', [('', '', 0), ('x', '', 0), ('Nice!', 'nice', 1), ('!!!', '!!!', 0), ('a b c d', 'a c', 2/3)])
def test_rouge(a, b, score):
    assert abs(rouge_l(a, b) - score) < 1e-12


def test_meteor_is_absent_with_a_reason_or_right():
    if why := meteor_nltk_absence():
        assert why.split(':')[0] in ('no_nltk', 'no_wordnet', 'no_punkt')
        with pytest.raises(MeteorAbsent, match=why.split(':')[0]): meteor_pair('a', 'b')
        assert text_scores([('a', 'b')])[1]['meteor'] == why
    else: assert meteor_pairs([('halt', 'stop'), ('keep keep keep going going', 'going keep')]) == pytest.approx([.5, .2127659574468085])


def test_bertscore_of_known_vectors():
    a, b = Tokens(np.eye(3)[:2], np.ones(2)), Tokens(np.eye(3), np.array([1., 1., 0.]))
    assert token_score(a, b) == (1, 1, 1) and token_score(b, Tokens(np.eye(3)[:1], np.ones(1))) == (.5, 1, pytest.approx(2/3)) and token_score(a, Tokens(np.zeros((1, 3)), np.zeros(1))) == (0, 0, 0)
    assert bert_score(['squat lower', ''], ['squat lower', 'x'], LetterEncoder()) == [pytest.approx(1), 0] and bert_score([], [], LetterEncoder()) == []
    with pytest.raises(ValueError, match='1 predictions and 0'): bert_score(['a'], [], LetterEncoder())
    with pytest.raises(ValueError, match='give layer='): TransformerEncoder('my-encoder')


@pytest.mark.slow
def test_bertscore_of_a_real_encoder(tmp_path):
    hf, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')
    torch.set_num_threads(1)
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'keep', 'going', 'lower', 'your', 'hips']
    (tmp_path/'vocab.txt').write_text('\n'.join(words))
    hf.BertTokenizerFast(str(tmp_path/'vocab.txt')).save_pretrained(tmp_path)
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)).save_pretrained(tmp_path)
    encoder = TransformerEncoder(str(tmp_path), layer=1, batch_size=2)
    texts = ['keep going', 'lower your hips', 'going', '']
    held = encoder(texts)
    assert [t.counts.sum() for t in held] == [2, 3, 1, 0] and [len(t.vectors) for t in held] == [4, 5, 3, 2]
    alone = TransformerEncoder(str(tmp_path), layer=1, batch_size=1)(texts)
    assert all(np.allclose(a.vectors, b.vectors, atol=1e-5) for a, b in zip(held, alone))
    assert bert_score(['keep going', ''], ['keep going', 'hips'], encoder) == [pytest.approx(1, abs=1e-5), 0]
    with pytest.raises(ValueError, match='a model of 2 layers'): TransformerEncoder(str(tmp_path), layer=9)(['keep'])


# a judge

@pytest.mark.parametrize('reply, published, corrected', [
    ("{'score': 4}", [4.], 4.), ('4', [], 4.), ("{'score': 0}", [0.], None), ("{'score': True}", [1.], None), ("{'score': 'nan'}", 'nan', None), ("Sure! {'score': 2}. Bye", [2.], 2.),
    ("{'score': 3} {'score': 4}", [], None), ("{'score': '5'}", [5.], None), ('{score: 5}', [], None), ('', [], None)])
def test_replies_of_a_judge(reply, published, corrected):
    got = published_scores(reply)
    assert (got == published or str(got[0]) == published) and checked_score(reply) == corrected


def test_failures_of_a_judge_are_counted_and_named():
    corrected, published = llm_scores('0006/0', [Reply('5'), Reply('{}'), Reply(None, 'timeout: 60 s'), Reply("{'score': 3}")])
    assert corrected.values == (8, 2, 2) and corrected.label.startswith('bad_reply') and published.values == (3, 1, 3)
    assert llm_scores('a', [])[0].values == (0, 0, 0) and llm_scores('a', [])[0].label == 'ok' and llm_scores('a', [Reply(None, 'oom: x')])[0].label == 'oom: x'


def test_slots_are_filled_one_after_the_other_only_as_published():
    assert fill_slots('<1>|<2>', ['<2>', 'x']) == 'x|x'
    (item,) = judge_items('a', [('{prediction}', 'x')])
    assert 'True feedback: {prediction}\n' in LLM_PROMPT.render(item)[1] and ModelJudge('openai:any', LLM_PROMPT).provenance == 'ours'


def test_a_judge_of_the_package_grades_pairs(tmp_path):
    run = open_run(tmp_path, {'a': 1}, {})
    judge, items = RuleJudge('lexical@1', lambda i: grade(i.gold, i.prediction)), judge_items('0006/0', [('Keep going!', 'keep going'), ('Lower', 'Faster')])
    stored = collect(judge, items, run)
    assert llm_scores('0006/0', [stored[judge.key(i)][-1] for i in items])[0].values == (6, 2, 0)


# the evaluator

@pytest.fixture
def episodes():
    return [episode_of('0006/0', '0006', ['Nice!', 'Lower!'], [1002., 1008.], 1000., Timed(('Good!', 'Lower!', 'x'), (2.2, 7.9, 20.))), episode_of('0089', '0089', [], [], 0., Timed((), ()))]


def test_files_of_the_evaluation(episodes, tmp_path):
    held = evaluate(episodes, LetterEncoder(), meteor=False)
    pairs, full = write_files(held, tmp_path)
    assert json.loads(pairs.read_text()) == saved_pairs(held) == [{'GT': 'Nice!', 'Pred': 'Good!'}, {'GT': 'Lower!', 'Pred': 'Lower!'}]
    told = json.loads(full.read_text())
    assert told == json.loads(json.dumps(full_records(held))) and told[0]['pred_feedbacks'][2] == 'x' and told[0]['pairs'] == [[0, 0], [1, 1]] and told[1]['feedbacks'] == []
    assert printed(held).keys() == {'Rouge-L Score', 'BERT Score', 'Temporal F-Score'} and challenge_records(episodes)[0]['pred_feedback_timestamps'][0] == 1002.2


def test_a_video_without_feedback_changes_no_number(episodes):
    assert evaluate(episodes, meteor=False).numbers == evaluate(episodes[:1], meteor=False).numbers


@pytest.mark.parametrize('texts, seconds, said, words', [(['a'], [], Timed((), ()), '1 feedbacks and 0 times'), ([], [], Timed(('a',), ()), '1 predictions and 0 times'), ([], [], Timed(('a',), (float('nan'),)), 'not finite')])
def test_episodes_that_cannot_be(texts, seconds, said, words):
    with pytest.raises(DataError, match=words): episode_of('a', 'a', texts, seconds, 0., said)


def test_an_answer_in_another_form_is_refused():
    with pytest.raises(DataError, match='not JSON'): said_of(Answer('a', 'Nice!', 'ok', 'x@1'))


# the table

def run_of(n=8):
    samples = [Sample(f'{v:04d}/{k}', (), 'squats', json.dumps(['Nice!', 'Lower!']), {'video': f'{v:04d}', 'exercise': ('squats', 'pushups')[k], 'start': '0.0', 'seconds': '[2.0, 8.0]'}) for v in range(n) for k in range(2)]
    answers = [Answer(s.id, json.dumps({'responses': ['Nice!', 'Lower!'], 'timestamps': [2., 8. + (i % 4)]}), 'ok', 'feature_clock@1') for i, s in enumerate(samples)]
    return samples, answers


def test_cells_are_counted_over_feedbacks_and_clustered_by_video():
    samples, answers = run_of()
    scores = [x for v in ('corrected', 'as_published') for x in measure(samples, answers, v, LetterEncoder(), meteor=False)]
    cells = table_cells(samples, scores, row_name(), 100)
    f = cells.where(column='T-F', variant='corrected')[0]
    assert f.value == pytest.approx(.75) and f.n == 16 and f.n_clusters == 8 and f.cluster == 'video' and f.lo <= f.value <= f.hi
    assert cells.where(column='matched feedbacks', variant='corrected')[0].value == 24 and cells.where(column='METEOR')[0].value is None
    assert cells.where(column='ROUGE-L', variant='as_published')[0].value == pytest.approx(1) and {c.row for c in exercise_cells(samples, scores, 50)} == {'squats', 'pushups'}


def test_a_failed_call_is_silence_only_as_published():
    samples, answers = run_of()
    answers[0] = Answer(samples[0].id, None, 'none', 'feature_clock@1', 'oom: 40 GB')
    scores = [x for v in ('corrected', 'as_published') for x in measure(samples, answers, v, meteor=False)]
    held = {c.variant: c for c in table_cells(samples, scores, row_name(), 50).where(column='T-R')}
    assert (held['corrected'].n, held['as_published'].n) == (15, 16) and held['corrected'].n_failed == held['as_published'].n_failed == 1 and held['corrected'].value > held['as_published'].value


def test_without_a_pair_there_is_no_text_score():
    samples, answers = run_of()
    silent = [Answer(a.id, json.dumps({'responses': [], 'timestamps': []}), 'ok', a.extractor) for a in answers]
    cells = table_cells(samples, measure(samples, silent, 'corrected', meteor=False), row_name(), 50)
    assert cells.where(column='ROUGE-L')[0].value is None and cells.where(column='T-F')[0].value == 0


def test_the_published_table():
    held = load_published('fitcoach')
    known = {p.key: p for p in held}
    assert len(known) == len(held) and {p.column for p in held} <= {c.name for c in COLUMNS}
    main = {k[2]: p.value for k, p in known.items() if k[:2] == (TABLE, row_name())}
    assert main == {'METEOR': .127, 'ROUGE-L': .112, 'BERT': .863, 'LLM-Acc': 2.45, 'T-F': .56}
    assert {k[1] for k in known if k[1].startswith('Stream-VLM w/o')} == {f'Stream-VLM w/o {x}' for x in ('3D CNN', 'pre-training', 'action tokens')}
    assert row_name('openai:x/Coach@http://h', 'full_workout') == 'Coach / full_workout'
