"""mmWalk's annotation files: the real ones in full, and every way in which a folder can be bad."""
import json
import subprocess
import sys
import time
import zipfile
from collections import Counter

import pytest
from mmwalk_files import ASKED, HUMAN, chat, make_root, real_root, tuning, write

from vlm_repro.core.jsonl import DataError, Problem
from vlm_repro.mmwalk.annotations import (
    CATEGORIES,
    RecordError,
    chat_sample,
    extract_answer,
    extract_question,
    extract_scenario,
    frame_paths,
    internvl_record,
    question_of,
    record_of,
)
from vlm_repro.mmwalk.categories import agreement, recover_frame
from vlm_repro.mmwalk.check import check, count
from vlm_repro.mmwalk.data import ARCHIVE, TEST_FOLDER, TRAIN_FOLDER, choose, iter_train, load, parse_categories
from vlm_repro.mmwalk.predictions import folder_name, pair, prediction_file, read_predictions, write_predictions
from vlm_repro.mmwalk.release import expected_counts, release_of
from vlm_repro.mmwalk.shots import draw_shots, shots_for

GATE = json.dumps(chat('E1')).encode() + b'\n'


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path/'mmwalk')


def labels(data):
    return Counter(p.label for p in data.problems)


# the real annotations

@pytest.fixture(scope='module')
def real():
    return {split: load(real_root(), split) for split in ('test', 'train', 'val')}


def test_real_annotations_pass_the_count_check():
    start = time.process_time()
    report = check(real_root())
    seconds = time.process_time() - start
    assert report.ok, [r for r in report.rows if not r.ok]
    assert report.releases == {'train': 'v2', 'val': 'v2', 'test': 'v2', 'eval_dummy_NoInput_0s': 'v1'} and not report.problems
    assert sum(r.expected is not None for r in report.rows) > 150
    assert seconds < 60, f'checking all splits took {seconds:.0f} s'


def test_real_samples_have_unique_ids_and_official_identity(real):
    ids = [s.id for d in real.values() for s in d.samples]
    assert len(ids) == len(set(ids)) == sum(expected_counts()['v2'][s]['samples'] for s in ('test', 'train', 'val'))
    assert all(d.identity['official'] and d.watermark is None for d in real.values())


def test_real_test_records_are_written_back_byte_for_byte(real):
    for category in CATEGORIES:
        lines = [json.dumps(record_of(s), ensure_ascii=False) + '\n' for s in real['test'].samples if s.meta['category'] == category]
        assert ''.join(lines).encode() == (real_root()/TEST_FOLDER/f'{category}.jsonl').read_bytes()


def test_both_readings_of_the_question_agree_on_all_real_records(real):
    for s in real['test'].samples: assert extract_question(record_of(s)) == s.question


def test_real_train_categories_agree_with_order(real):
    agreed = agreement(real['train'].samples)
    assert min(agreed.values()) > .96
    known = sum(s.meta['category'] in CATEGORIES for s in real['train'].samples)
    assert known/len(real['train'].samples) > .98


def test_recovered_categories_are_right_where_the_truth_is_known(real):
    frames = {}
    for s in real['test'].samples: frames.setdefault((s.meta['trajectory'], s.meta['frame']), []).append(s)
    placed = [(s.meta['category'], got) for f in frames.values() for s, (got, _) in zip(f, recover_frame([s.question for s in f]))]
    wrong = sum(got not in (truth, 'unknown') for truth, got in placed)
    assert wrong/len(placed) < .002
    assert sum(got == truth for truth, got in placed)/len(placed) > .99


def test_weather_is_one_value_per_trajectory_in_the_counts(real):
    weathers = expected_counts()['weather_answer_by_trajectory']
    asked = [s for s in real['test'].samples if s.meta['category'] == 'E1' and s.gold.strip('.').lower() in set(weathers.values())]
    assert len(asked) > 700
    agree = sum(weathers[s.meta['trajectory']] == s.gold.strip('.').lower() for s in asked)
    assert agree/len(asked) > .99


def test_v1_predictions_are_refused_against_v2_gold(real):
    dummy = read_predictions(real_root()/'eval_dummy_NoInput_0s')
    assert len(dummy.samples) == sum(expected_counts()['v1']['test']['per_category'][c] for c in ('E1', 'M2'))
    assert release_of(dummy.samples) == 'v1'
    with pytest.raises(DataError, match='predictions of release v1 do not go with gold answers of release v2: v1 splits by question'):
        pair(real['test'].samples, dummy)


def test_the_check_counts_the_v1_predictions_and_says_that_they_do_not_fit():
    from vlm_repro.mmwalk.check import check
    report = check(real_root())
    rows = {r.what: r for r in report.rows if r.split == 'eval_dummy_NoInput_0s'}
    assert report.ok and report.releases['eval_dummy_NoInput_0s'] == 'v1' and report.releases['test'] == 'v2'
    v1 = expected_counts()['v1']['test']['per_category']
    assert [(rows[f'predictions of {c}'].found, rows[f'predictions of {c}'].expected) for c in ('E1', 'M2')] == [(v1[c], v1[c]) for c in ('E1', 'M2')]
    assert rows['files are the released ones'].found is True and rows['can be scored here'].found.startswith('no: they are of release v1')


def test_a_prediction_folder_that_lost_lines_fails_the_check(tmp_path):
    from vlm_repro.mmwalk.check import check_predictions
    folder = tmp_path/'eval_dummy_NoInput_0s'
    folder.mkdir()
    (folder/'M2.jsonl').write_bytes(b''.join((real_root()/folder.name/'M2.jsonl').read_bytes().splitlines(True)[:-3]))
    rows, problems, release = check_predictions(folder, 'v1')
    assert (release, problems) == ('v1', []) and {r.what for r in rows if not r.ok} == {'predictions', 'predictions of M2', 'files are the released ones'}
    (folder/'E1.jsonl').write_text('{"conversation": [')
    assert [p.label for p in check_predictions(folder, 'v1')[1]] == ['broken_line']
    assert [p.label for p in check_predictions(tmp_path, 'v1')[1]] == ['predictions']


def test_v1_predictions_pair_silently_by_position_as_published(real):
    dummy = read_predictions(real_root()/'eval_dummy_NoInput_0s')
    pairs = pair(real['test'].samples, dummy, by='position')
    gold = Counter(s.meta['category'] for s in real['test'].samples)
    assert Counter(s.meta['category'] for s, _ in pairs) == {c: min(gold[c], sum(p.meta['category'] == c for p in dummy.samples)) for c in ('E1', 'M2')}


def test_v1_and_v2_files_in_one_root_are_refused(tmp_path, real):
    for c in ('E1', 'E2'): write(tmp_path/TEST_FOLDER/f'{c}.jsonl', [record_of(s) for s in real['test'].samples if s.meta['category'] == c])
    (tmp_path/TEST_FOLDER/'M2.jsonl').write_bytes((real_root()/'eval_dummy_NoInput_0s'/'M2.jsonl').read_bytes())
    with pytest.raises(DataError, match='two releases are mixed'): load(tmp_path)


def test_shots_of_the_real_train_file(real):
    sets = shots_for(real['train'], real['test'], 3, seed=0)
    tested = {s.meta['trajectory'] for s in real['test'].samples}
    for category, shots in sets.items():
        assert [s.meta['category'] for s in shots] == [category] * 3
        assert len({s.meta['trajectory'] for s in shots}) == 3 and not tested & {s.meta['trajectory'] for s in shots}
    assert shots_for(real['train'], real['test'], 3, seed=1) != sets


def test_a_limit_spreads_over_the_real_trajectories(real):
    ten = choose(real['test'].samples, limit=10)
    assert Counter(s.meta['category'] for s in ten) == dict.fromkeys(CATEGORIES, 10)
    for c in CATEGORIES: assert len({s.meta['trajectory'] for s in ten if s.meta['category'] == c}) >= 8
    assert {s.id for s in choose(real['test'].samples, limit=5)} < {s.id for s in ten}


@pytest.mark.parametrize('kind, where, release', [('E1', 'Corner12', 'v1'), ('E1', 'Busstop12', 'v1')])
def test_the_wording_tells_v1_on_any_trajectory(kind, where, release):
    line = next(x for x in (real_root()/'eval_dummy_NoInput_0s'/f'{kind}.jsonl').read_bytes().splitlines() if where.encode() in x)
    assert release_of([chat_sample(json.loads(line))]) == release


def test_own_wording_is_of_no_release_and_an_unseen_wording_alone_tells_none():
    assert [release_of([chat_sample(chat(c, t))]) for c, t in (('E1', 'Plaza05'), ('E1', 'Corner12'), ('M3', 'Plaza05'), ('M3', 'Corner12'))] == ['unknown']*4


# good folders

def test_load_a_root(root):
    test, train, val = (load(root, split, strict=True) for split in ('test', 'train', 'val'))
    assert (len(test.samples), len(train.samples), len(val.samples)) == (18, 45, 9)
    assert Counter(s.meta['category'] for s in train.samples) == dict.fromkeys(CATEGORIES, 5)
    assert test.samples[0].media[0].path == 'Plaza05/walker/rgb/000007.png' and test.samples[0].media[3].kind == 'depth'
    assert test.frames == str(root/'QAFrames') and test.identity['frames'] == 'absent'
    assert set(test.identity['files']) == {f'{TEST_FOLDER}/{c}.jsonl' for c in CATEGORIES} and not test.identity['official']


def test_frames_may_lie_elsewhere_and_their_marker_still_watermarks(root, tmp_path):
    frames = tmp_path/'other'/'QAFrames'
    frames.mkdir(parents=True)
    assert load(root, frames=frames).watermark is None
    (tmp_path/'other'/'stand_in.json').write_text('{}')
    data = load(root, frames=frames)
    assert data.frames == str(frames) and data.identity['frames'] == 'stand-in' and 'stand-in' in data.watermark


def test_world_marker_names_the_release(root):
    (root/'world.json').write_text('{}')
    data = load(root)
    assert data.identity['release'] == 'world' and 'not the data of the paper' in data.watermark
    assert data.samples[0].meta['release'] == 'world'


def test_ids_do_not_depend_on_the_order_of_lines(root):
    before = {s.id: s.question for s in load(root).samples}
    path = root/TEST_FOLDER/'E2.jsonl'
    path.write_bytes(b'\n'.join(reversed(path.read_bytes().splitlines())))
    assert {s.id: s.question for s in load(root).samples} == before


def test_unpacked_train_file_is_read_like_the_archive(root):
    packed = load(root, 'train')
    with zipfile.ZipFile(root/TRAIN_FOLDER/ARCHIVE) as z: z.extract('train.jsonl', root/TRAIN_FOLDER)
    assert load(root, 'train').samples == packed.samples
    (root/TRAIN_FOLDER/ARCHIVE).unlink()
    assert load(root, 'train').samples == packed.samples


def test_train_is_streamed(root):
    stream = iter_train(root)
    where, sample = next(stream)
    assert (where, sample.id) == (f'{ARCHIVE}/train.jsonl:1', 'train-0')
    stream.close()


# bad folders

def test_missing_and_empty_data_folder(tmp_path):
    with pytest.raises(DataError, match='is not a folder.*data plan'): load(tmp_path/'nowhere')
    with pytest.raises(DataError, match='none of the test files.*data plan'): load(tmp_path)
    with pytest.raises(DataError, match='no train.jsonl below.*data plan'): load(tmp_path, 'train')


def test_unknown_split_lists_the_valid_ones(root):
    with pytest.raises(ValueError, match='train, val, test'): load(root, 'dev')


def test_empty_files_are_named(root):
    (root/TEST_FOLDER/'E1.jsonl').write_bytes(b'')
    data = load(root)
    assert labels(data) == {'empty_file': 1} and data.problems[0].where == 'E1.jsonl'
    for c in CATEGORIES: (root/TEST_FOLDER/f'{c}.jsonl').write_bytes(b'\n')
    with pytest.raises(DataError, match='no usable record'): load(root)


def with_images(record, n):
    "The record with its first images alone, or with the last one twice."
    *images, text = record['conversation'][0]['content']
    record['conversation'][0]['content'] = [*(images + images[-1:])[:n], text]
    return record


@pytest.mark.parametrize('line, label', [
    (b'{"conversation": [', 'broken_line'), (b'[]\n', 'broken_line'), (b'{"a": "\xff\xfe"}\n', 'broken_line'), (b'\x00\x00\x00\n', 'broken_line'), (b'{}\n', 'bad_record'),
    (json.dumps({**chat('E1'), 'category': 'E7'}).encode(), 'unknown_category'), (json.dumps({**chat('E1'), 'category': None}).encode(), 'unknown_category'),
    (json.dumps(chat('H2')).encode(), 'wrong_category'), (json.dumps({**chat('E1'), 'difficulty': 'Hard'}).encode(), 'wrong_difficulty'),
    (json.dumps(with_images(chat('E1'), 3)).encode(), 'wrong_views'), (json.dumps(with_images(chat('E1'), 5)).encode(), 'wrong_views'),
    (GATE.replace(b'Question', b'Frage'), 'no_question'), (json.dumps(chat('E1', answer=' ')).encode(), 'no_gold'),
    (GATE.replace(b'drone/rgb/000007', b'drone/rgb/000008'), 'mixed_frames'), (GATE.replace(b'../QAFrames/', b'../../'), 'path_leaves_root'),
    (GATE.replace(b'../QAFrames/', b'/etc/'), 'path_leaves_root'), (GATE.replace(b'walker/rgb', b'cat/rgb'), 'bad_path'),
    (GATE.replace(b'../QAFrames/Plaza05', b'../QAFrames/../Plaza05'), 'path_leaves_root'), (GATE.replace(b'"../QAFrames/Plaza05/walker/rgb/000007.png"', b'7'), 'bad_record'),
])
def test_a_bad_line_is_named_by_file_and_number_and_the_rest_is_kept(root, line, label):
    path = root/TEST_FOLDER/'E1.jsonl'
    path.write_bytes(path.read_bytes() + line)
    data = load(root)
    assert [(p.label, p.where, p.dropped) for p in data.problems] == [(label, 'E1.jsonl:3', True)]
    assert len(data.samples) == 18 and data.identity['left_out'] == 1
    with pytest.raises(DataError, match=f'E1.jsonl:3: {label}'): load(root, strict=True)


def test_a_record_without_images(root):
    record = chat('E3')
    record['conversation'][0]['content'] = record['conversation'][0]['content'][-1:]
    write(root/TEST_FOLDER/'E3.jsonl', [chat('E3'), record])
    assert [(p.label, p.where) for p in load(root).problems] == [('no_images', 'E3.jsonl:2')]


def test_duplicates_count_once(root):
    write(root/TEST_FOLDER/'E3.jsonl', [chat('E3'), chat('E3', 'Cross02', 3), chat('E3', answer='another gold')])
    data = load(root)
    assert [(p.label, p.where) for p in data.problems] == [('duplicate', 'E3.jsonl:3')] and 'as E3.jsonl:1' in data.problems[0].detail and len(data.samples) == 18
    assert [s.gold for s in data.samples if s.meta['category'] == 'E3'] == ['3', '3']


def test_crlf_is_read_and_said(root):
    write(root/TEST_FOLDER/'E3.jsonl', [chat('E3'), chat('E3', 'Cross02', 3)], end='\r\n')
    data = load(root)
    assert [(p.label, p.dropped) for p in data.problems] == [('crlf', False)] and len(data.samples) == 18


def test_a_byte_order_mark_and_blank_lines_are_read(root):
    path = root/TEST_FOLDER/'E3.jsonl'
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes() + b'\n\n')
    assert not load(root, strict=True).problems


def test_files_of_no_category_and_missing_files_are_said(root):
    (root/TEST_FOLDER/'E5.jsonl').write_bytes(GATE)
    (root/TEST_FOLDER/'H2.jsonl').unlink()
    data = load(root)
    assert [(p.label, p.where, p.dropped) for p in data.problems] == [('missing_file', f'{TEST_FOLDER}/H2.jsonl', True), ('unknown_category', 'E5.jsonl', False)]


def test_an_unknown_scenario_is_kept_and_said(root):
    write(root/TEST_FOLDER/'E3.jsonl', [chat('E3'), chat('E3', 'Harbour01')])
    data = load(root)
    assert [(p.label, p.where, p.dropped) for p in data.problems] == [('unknown_scenario', 'E3.jsonl:2', False)]
    assert 'Harbour' in {s.meta['scenario'] for s in data.samples}


def test_a_damaged_archive_and_two_versions_of_train(root):
    write(root/TRAIN_FOLDER/'train.jsonl', tuning([('Mixed09', 1)]))
    with pytest.raises(DataError, match='several versions'): load(root, 'train')
    (root/TRAIN_FOLDER/'train.jsonl').unlink()
    (root/TRAIN_FOLDER/ARCHIVE).write_bytes(b'PK\x03\x04 not an archive')
    with pytest.raises(DataError, match='cannot be read as a zip archive'): load(root, 'train')


@pytest.mark.parametrize('change, label', [
    (lambda r: {**r, 'image': []}, 'no_images'), (lambda r: {**r, 'image': r['image'][:3]}, 'wrong_views'), (lambda r: {**r, 'image': r['image'][::-1]}, 'wrong_views'),
    (lambda r: json.loads(json.dumps(r).replace('<image>', '', 1)), 'image_tags'), (lambda r: {k: v for k, v in r.items() if k != 'id'}, 'bad_record'),
    (lambda r: {**r, 'conversations': r['conversations'][::-1]}, 'bad_record'), (lambda r: {**r, 'image': 'one.png'}, 'bad_record'),
    (lambda r: {**r, 'image': ['../../x/walker/rgb/000001.png'] * 4}, 'path_leaves_root'),
])
def test_bad_training_records(tmp_path, change, label):
    first, second = tuning([('Mixed01', 1)])[:2]
    write(tmp_path/'train.jsonl', [first, change(second)])
    assert [(p.label, p.where) for p in load(tmp_path, 'train').problems] == [(label, 'train.jsonl:2')]


def test_training_question_asked_twice_under_two_ids(tmp_path):
    records = tuning([('Mixed01', 1)]) + tuning([('Mixed01', 1)], first=50)[:1]
    write(tmp_path/'train.jsonl', records)
    assert labels(load(tmp_path, 'train')) == {'duplicate': 1}


def test_check_counts_missing_images(root):
    for path in frame_paths('Plaza05', 7, head=''):
        file = root/'QAFrames'/path
        file.parent.mkdir(parents=True)
        file.write_bytes(b'no image')
    report = check(root)
    missing = [p for p in report.problems if p.label == 'missing_image']
    assert not report.ok and len(missing) == 4 * 7
    assert 'not an image file' in next(r.found for r in report.rows if r.what.startswith('depth'))
    assert 'NOT PASSED' in report._repr_markdown_()


def test_count_of_the_small_root(root):
    counted = count(load(root).samples)
    assert counted['samples'] == 18 and counted['frames'] == 2 and counted['difficulty'] == {'Easy': 8, 'Middle': 6, 'Hard': 4}
    assert counted['trajectories']['Plaza05'] == {'samples': 9, 'frames': 1}


# extraction, choice and shots

@pytest.mark.parametrize('record', [{}, {'conversation': []}, {'conversation': [{'content': 'text'}, {'content': []}]}, {'conversation': [{'content': [{'type': 'text'}]}, {}]}])
def test_extraction_of_malformed_records_raises_its_own_error(record):
    with pytest.raises(RecordError): extract_question(record)
    with pytest.raises(RecordError): extract_answer(record)


def test_what_stands_after_the_match_is_not_read():
    content = [{'type': 'image', 'image': '../QAFrames/Plaza05/x.png'}, {'type': 'text', 'text': 'Question: q'}, {'type': 'text'}, {'type': 'image', 'image': None}]
    record = {'conversation': [{'content': content}]}
    assert (extract_question(record), extract_scenario(record)) == ('q', 'Plaza')
    with pytest.raises(RecordError): extract_scenario({'conversation': [{'content': content[::-1]}]})


def test_the_two_readings_part_where_the_defect_list_says():
    text = 'A question: see below.\nQuestion: Is it\nsafe?'
    assert (extract_question({'conversation': [{'content': [{'type': 'text', 'text': text}]}]}), question_of(text)) == ('see below.', 'Is it\nsafe?')


def test_settings_of_the_choice_are_checked(root):
    samples = load(root).samples
    assert parse_categories('H1,E1') == ('E1', 'H1') and parse_categories('all') == CATEGORIES
    for bad in ('E5', 'E1,', '', []):
        with pytest.raises(ValueError, match='E1, E2, E3, E4, M1, M2, M3, H1, H2'): parse_categories(bad)
    with pytest.raises(ValueError, match='limit 0'): choose(samples, limit=0)
    with pytest.raises(ValueError, match='spread, first'): choose(samples, order='last')


def test_choice_ignores_the_order_of_the_files(root):
    samples = [chat_sample(chat('E2', t, n)) for t, size in (('Plaza05', 40), ('Cross02', 10), ('Mixed11', 1)) for n in range(size)]
    chosen = {s.id for s in choose(samples, limit=10)}
    assert {s.id for s in choose(samples[::-1], limit=10)} == chosen
    assert {s.id for s in choose(samples, limit=10, seed=1)} != chosen


def test_shots_leave_out_test_trajectories_and_refuse_too_few(root):
    train, test = load(root, 'train'), load(root)
    sets = shots_for(train, test, 3)
    assert set(sets) == set(CATEGORIES)
    with pytest.raises(DataError, match='5 training questions'): draw_shots(train.samples, 'E1', 6)
    assert len(draw_shots(train.samples, 'E1', 2, exclude={'Mixed01', 'Mixed02', 'Mixed03'})) == 2


def test_unknown_categories_are_never_shots(tmp_path):
    records = [internvl_record(i, frame_paths('Mixed01', 1, head=''), HUMAN + q, 'x') for i, q in enumerate(['Go on.', ASKED['H1'][0], ASKED['E1'][0]])]
    write(tmp_path/'train.jsonl', records)
    samples = load(tmp_path, 'train').samples
    assert [s.meta['category'] for s in samples].count('unknown') == 2
    assert sum(len([s for s in samples if s.meta['category'] == c]) for c in CATEGORIES) == 1


# prediction folders

def test_predictions_round_trip(root, tmp_path):
    gold = load(root).samples
    folder = tmp_path/folder_name('org/Model-7B', 'drone+', 3)
    assert folder.name == 'eval_Model-7B_drone+_3s'
    write_predictions(folder, gold, {s.id: f' {s.id}\n' for s in gold})
    pairs = pair(gold, read_predictions(folder))
    assert [answer for _, answer in pairs] == [s.id for s in gold]


def test_missing_answers_are_an_error_unless_named(root, tmp_path):
    gold = load(root).samples
    with pytest.raises(DataError, match='17 of 18 samples have no answer'): write_predictions(tmp_path/'p', gold, {gold[0].id: 'x'})
    write_predictions(tmp_path/'p', gold, {gold[0].id: 'x'}, missing='')
    assert [a for _, a in pair(gold, read_predictions(tmp_path/'p'))][:2] == ['x', '']


def test_mismatched_predictions_are_refused_by_key_and_cut_by_position(root, tmp_path):
    gold = load(root).samples
    write_predictions(tmp_path/'p', gold[1:], {s.id: 'x' for s in gold})
    with pytest.raises(DataError, match='1 gold questions without prediction'): pair(gold, read_predictions(tmp_path/'p'))
    assert len(pair(gold, read_predictions(tmp_path/'p'), by='position')) == 17
    with pytest.raises(ValueError, match='key, position'): pair(gold, read_predictions(tmp_path/'p'), by='line')


def test_a_category_without_a_file_is_missing_not_a_mismatch(root, tmp_path):
    gold = load(root).samples
    write_predictions(tmp_path/'p', [s for s in gold if s.meta['category'] != 'M3'], {s.id: 'x' for s in gold})
    read = read_predictions(tmp_path/'p')
    assert read.missing == ('M3',) and len(pair(gold, read)) == 16


def test_a_broken_prediction_line_is_not_passed_over(root, tmp_path):
    gold = load(root).samples
    write_predictions(tmp_path/'p', gold, {s.id: 'x' for s in gold})
    with (tmp_path/'p'/'E1.jsonl').open('a') as f: f.write('{"conv')
    read = read_predictions(tmp_path/'p')
    assert [type(p) for p in read.problems] == [Problem] and read.problems[0].where == 'E1.jsonl:3'
    with pytest.raises(DataError, match='E1.jsonl:3'): pair(gold, read)


def test_lookup_of_prediction_files():
    assert prediction_file(['E1_b.jsonl', 'E1_a.jsonl'], 'E1', legacy_lookup=True) == 'E1_b.jsonl'
    assert prediction_file(['E1.jsonl'], 'E1', legacy_lookup=True) is None and prediction_file(['E1.jsonl'], 'E1') == 'E1.jsonl'
    assert prediction_file(['E1_gpt.json', 'E12.jsonl', 'E1.jsonl.part'], 'E1') is None
    with pytest.raises(DataError, match='E1.jsonl, E1_m.jsonl'): prediction_file(['E1_m.jsonl', 'E1.jsonl'], 'E1')


def test_a_copy_of_the_process_sees_what_this_one_sees(root):
    "Train looked at in a copied process, as the command line does where it may: the same report."
    code = ('import sys; from pathlib import Path; from vlm_repro.mmwalk import check\n'
            'root = Path(sys.argv[1])\n'
            'assert check._can_fork() == (len(check.os.sched_getaffinity(0)) > 1)\n'
            'one, two = (check._look_at_all(root, None, fork) for fork in (False, True))\n'
            'assert one == two and len(one[0]) == 3 and all(s.rows for s in one[0]), one\n')
    done = subprocess.run([sys.executable, '-c', code, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
