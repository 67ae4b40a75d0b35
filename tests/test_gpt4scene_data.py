"""GPT4Scene's files: every odd case, every way in which a file can be bad, chunk files of the published program, and the check."""
import json
import os
import pickle
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from vlm_repro.core.jsonl import DataError
from vlm_repro.core.records import Answer
from vlm_repro.gpt4scene.annotations import CORPUS, FILES, LOOKUP
from vlm_repro.gpt4scene.attributes import OBJECTS, PROPOSALS, attributes_of, read_attributes, write_attributes
from vlm_repro.gpt4scene.build import build_validation
from vlm_repro.gpt4scene.check import check
from vlm_repro.gpt4scene.chunks import chunk_ranges, read_chunks, read_predictions, write_chunks
from vlm_repro.gpt4scene.data import LISTED, choose, load, official, parse_benchmarks
from vlm_repro.gpt4scene.download import get, plan, remote_files
from vlm_repro.gpt4scene.images import ImageSettings
from vlm_repro.gpt4scene.rows import ValRow, row_of, sample_of, val_row
from vlm_repro.gpt4scene.scanalign import INFO, OPENAI, info_entry, open_scanalign
from vlm_repro.gpt4scene.score import measure
from vlm_repro.gpt4scene.train_data import conversations, find_training
from vlm_repro.gpt4scene.truth import LABELS, REFERRED, truth

BOX = [0, 0, .5, .6, .6, 1]


def row(**more):
    return {'scene_id': 's', 'prompt': 'What is it?', 'ref_captions': ['a chair'], 'qid': 0, **more}


def write(path, held):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(held if isinstance(held, str) else json.dumps(held), encoding='utf-8')
    return path


def make_root(root, place='evaluate/annotation', **files):
    folder = root/place
    for name, n in ((OBJECTS, 3), (PROPOSALS, 2)): write_attributes(folder/name, {'s': attributes_of(['chair']*n, [BOX]*n)})
    write(folder/LISTED, {'s': ['data/images_2D/s/bev.png', 'data/images_2D/s/0.jpg']})
    write(folder/CORPUS, {'s|0': ['sos a chair eos'], 's|1': ['sos a desk eos']})
    write(folder/LOOKUP, {'s': {'0': 0, '1': 1, '2': 1}})
    for benchmark, rows in files.items(): write(folder/FILES[benchmark], rows)
    return root


def labels(data):
    return [p.label for p in data.problems]


@pytest.mark.parametrize('place', ['evaluate/annotation', 'annotation', '.'])
def test_the_folder_is_found_from_above_and_from_within(tmp_path, place):
    root = make_root(tmp_path, place, scanqa=[row()])
    assert [s.id for s in load(root, 'scanqa').samples] == [s.id for s in load(root/place, 'scanqa').samples] == ['scanqa/00000']


@pytest.mark.parametrize('place', ['data', 'data/annotation', '.'])
def test_both_layouts_of_images(tmp_path, place):
    root = make_root(tmp_path, scanqa=[row()])
    write(root/place/'images_2D/s/bev.png', '')
    data = load(root, 'scanqa')
    assert data.identity['frames'] == 'present' and data.frames == str(root/place if place != '.' else root)
    assert [m.path for m in data.samples[0].media] == ['images_2D/s/bev.png', 'images_2D/s/0.jpg']


@pytest.mark.parametrize('benchmark, change, label', [
    ('scanqa', {'scene_id': 't'}, 'missing_scene'), ('scanqa', {'scene_id': None}, 'bad_field'), ('scanqa', {'obj_id': 'x'}, 'bad_number'), ('scanqa', {'ref_captions': 'a chair'}, 'bad_field'), ('scanqa', {'obj_id': float('inf')}, 'bad_number'), ('scanqa', {'ref_captions': [3, None]}, 'bad_answer'),
    ('scanqa', {'ref_captions': []}, 'no_answer'), ('sqa3d', {'ref_captions': ['a', None]}, 'bad_answer'), ('sqa3d', {'sqa_type': 9}, 'bad_type'), ('sqa3d', {'type_info': 'what'}, 'bad_type'),
    ('multi3dref', {'ref_captions': [True], 'eval_type': 'st_w_d'}, 'no_object'),
    ('sqa3d', {'sqa_type': 'what'}, 'bad_number'), ('scanrefer', {'obj_id': 3}, 'no_object'), ('scanrefer', {'obj_id': -1}, 'no_object'), ('multi3dref', {'ref_captions': [0, 3], 'eval_type': 'mt'}, 'no_object'),
    ('multi3dref', {'ref_captions': ['0'], 'eval_type': 'mt'}, 'no_object'), ('multi3dref', {'ref_captions': [], 'eval_type': 'zt'}, 'bad_type'), ('multi3dref', {'ref_captions': [], 'eval_type': 'mt'}, 'bad_type'),
    ('scan2cap', {'pred_id': 2}, 'no_proposal'), ('scan2cap', {'obj_id': 2}, 'no_captions')])
def test_a_bad_row_is_left_out_and_named(tmp_path, benchmark, change, label):
    good = row(qid=1, **({'ref_captions': [0], 'eval_type': 'st_w_d'} if benchmark == 'multi3dref' else {}))
    root = make_root(tmp_path, **{benchmark: [row(**change), good]})
    data = load(root, benchmark)
    assert [s.id for s in data.samples] == [f'{benchmark}/00001'] and labels(data) == [label] and data.problems[0].dropped and data.identity['left_out'] == 1
    assert data.problems[0].where == f'{FILES[benchmark]} row 0'
    with pytest.raises(DataError, match=label): load(root, benchmark, strict=True)


@pytest.mark.parametrize('rows, label', [
    ([row(), row()], 'no_qid'), ([row(), row(qid=1), row(qid=1)], 'duplicate_qid'), ([row(ref_captions=['a\u2028chair'])], 'line_break'), ([row(ref_captions=['a\rchair'])], 'line_break'),
    ([row(ref_captions=['a\nchair'])], None), ([row(ref_captions=['a\x85chair'])], None)])
def test_an_odd_row_is_kept_and_named(tmp_path, rows, label):
    data = load(make_root(tmp_path, scanqa=rows), 'scanqa')
    assert len(data.samples) == len(rows) and labels(data) == ([label] if label else []) and not any(p.dropped for p in data.problems)


def test_defaults_of_a_row(tmp_path):
    held = val_row({'scene_id': 's', 'prompt': 'Why?'})
    assert (held.refs, held.obj_id, held.pred_id, held.kind) == ((), 0, 0, 0)
    bare = {'scene_id': 's', 'prompt': 'Why?'}
    data = load(make_root(tmp_path, scanqa=[bare, row(qid=1)]), 'scanqa')
    assert labels(data) == ['no_answer'] and [row_of(s).refs for s in data.samples] == [('a chair',)]


@pytest.mark.parametrize('benchmark', ['scanrefer', 'multi3dref', 'scan2cap'])
@pytest.mark.parametrize('empty', [False, True])
def test_a_scene_without_proposals_is_named_before_anything_is_asked(tmp_path, benchmark, empty):
    more = {'ref_captions': [0], 'eval_type': 'st_w_d'} if benchmark == 'multi3dref' else {}
    root = make_root(tmp_path, **{benchmark: [row(**more), row(qid=1, scene_id='t', **more)]})
    folder = root/'evaluate/annotation'
    write_attributes(folder/OBJECTS, {s: attributes_of(['chair']*3, [BOX]*3) for s in 'st'})
    write_attributes(folder/PROPOSALS, {'s': attributes_of(['chair'], [BOX]), **({'t': attributes_of([], [])} if empty else {})})
    for name, held in ((LISTED, ['images_2D/s/0.jpg']), (LOOKUP, {'0': 0})): write(folder/name, {s: held for s in 'st'})
    write(folder/CORPUS, {'s|0': ['sos a chair eos'], 't|0': ['sos a chair eos']})
    data = load(root, benchmark)
    assert labels(data) == ['no_proposals'] and [s.meta['scene'] for s in data.samples] == ['s']
    scores = measure(data.samples, [Answer(s.id, '<OBJ000>.', 'ok', 'as_written@1') for s in data.samples], truth(root, (benchmark,)), meteor=False)
    assert scores and all(s.label == 'ok' for s in scores if not s.metric.startswith('meteor'))


def test_names_of_scanrefer_that_are_none_are_refused(tmp_path):
    root = make_root(tmp_path, scanrefer=[row()])
    folder = root/'evaluate/annotation'
    (folder/LOOKUP).unlink()
    columns = ['id', 'raw_category', 'category', 'count', 'nyu40id', 'eigen13id', 'nyuClass', 'nyu40class']
    write(folder/LABELS, '\t'.join(columns) + '\n' + '\t'.join(['1', 'chair', '', '', '', '', '', 'chair']) + '\n')
    described = write(folder/REFERRED[0], [{'scene_id': 's', 'object_id': '0', 'object_name': None}])
    with pytest.raises(DataError, match='row 0: no texts as scene_id and object_name'): load(root, 'scanrefer')
    write(described, [{'scene_id': 's', 'object_id': '0', 'object_name': 'chair'}])
    assert truth(root, ('scanrefer',)).lookup == {'s': {'0': 0}}
    write(described, [{'scene_id': 's', 'object_id': i, 'object_name': 'chair'} for i in '01'])
    os.utime(described, ns=(1, 1))
    assert truth(root, ('scanrefer',)).lookup == {'s': {'0': 1, '1': 1}}


def fit(benchmark, n, scenes):
    return [sample_of(benchmark, i, ValRow(f'scene{i % scenes:04d}_00', 'q', ('a',), i, i//scenes)) for i in range(n)]


def test_scan2cap_is_the_papers_by_its_captions():
    rows, corpus = fit('scan2cap', 2007, 141), {f'scene{i % 141:04d}_00|{i}': ('a',) for i in range(2068)}
    assert official('scan2cap', rows, corpus=corpus)
    assert not official('scan2cap', rows, corpus=dict(list(corpus.items())[:1500])) and not official('scan2cap', fit('scan2cap', 200, 20), corpus=corpus) and not official('scan2cap', rows, corpus={})
    assert official('sqa3d', fit('sqa3d', 3261, 65)) and not official('sqa3d', fit('sqa3d', 3260, 65))


@pytest.mark.parametrize('text, said', [('[{"scene_id": "s"', 'not JSON .* at line 1'), ('{}', 'a list was expected'), ('[]', 'its list is empty'), ('[1]', 'bad_record')])
def test_a_broken_file_says_where(tmp_path, text, said):
    with pytest.raises(DataError, match=said): load(make_root(tmp_path, scanqa=text), 'scanqa')


def test_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match='data plan gpt4scene'): load(tmp_path, 'scanqa')
    root = make_root(tmp_path, scanqa=[row()], scanrefer=[row()])
    with pytest.raises(DataError, match='has no sqa3d_val.json'): load(root)
    with pytest.raises(ValueError, match='valid ones are scanqa'): load(root, 'vqa')
    (root/'evaluate/annotation'/PROPOSALS).unlink()
    assert load(root, 'scanqa').samples
    with pytest.raises(DataError, match='which scanrefer is scored with'): load(root, 'scanrefer')
    (root/'evaluate/annotation'/LISTED).unlink()
    with pytest.raises(DataError, match='no single list of images'): load(root, 'scanqa')
    assert parse_benchmarks('scan2cap,scanqa') == ('scanqa', 'scan2cap')


@pytest.mark.parametrize('body', [b'', b'PK\x03\x04', pickle.dumps({'s': object()}, protocol=2)])
def test_a_broken_attribute_file_is_named(tmp_path, body):
    (tmp_path/OBJECTS).write_bytes(body)
    with pytest.raises(DataError, match=OBJECTS): read_attributes(tmp_path/OBJECTS)


def test_more_names_than_boxes(tmp_path):
    write_attributes(tmp_path/PROPOSALS, {'s': attributes_of(['chair']*120, [BOX]*120, cap=100)})
    held = read_attributes(tmp_path/PROPOSALS)['s']
    assert (len(held.names), len(held.boxes)) == (120, 100)


def test_a_larger_choice_holds_the_smaller(tmp_path):
    samples = load(make_root(tmp_path, scanqa=[row(qid=i) for i in range(9)]), 'scanqa').samples
    assert {s.id for s in choose(samples, 3)} < {s.id for s in choose(samples, 5)} and choose(samples) == samples


# training

def told(n, style=0, **more):
    turns = [('human', '<image>'*n + 'What is it?'), ('gpt', 'A chair.')]
    if style: return {'messages': [{'role': r, 'content': t} for r, t in zip(('user', 'assistant'), (t for _, t in turns))], 'images': [f'images_2D/s/{k}.png' for k in range(n)], **more}
    return {'conversations': [{'from': r, 'value': t} for r, t in turns], 'images': [f'images_2D/s/{k}.png' for k in range(n)], **more}


@pytest.mark.parametrize('style', [0, 1])
@pytest.mark.parametrize('listed', [False, True])
def test_both_styles_of_keys(tmp_path, style, listed):
    path = write(tmp_path/'train.json', [told(2, style), told(2, style)])
    if listed: write(tmp_path/INFO, {'mine': info_entry('train.json', OPENAI) if style else info_entry('train.json')})
    held = open_scanalign(path)
    assert len(held) == 2 and [p['type'] for p in held[1].messages[0]['content']] == ['image', 'image', 'text'] and held[0].id == 'train/000000'
    assert pickle.loads(pickle.dumps(held))[1].messages == held[1].messages


def test_orders_are_skipped_and_counts_stop(tmp_path):
    turned = told(1)
    turned['conversations'] = turned['conversations'][::-1]
    held = open_scanalign(write(tmp_path/'train.json', [told(1), turned, told(1)]))
    assert [e.id for e in held] == ['train/000000', 'train/000002'] and [p.label for p in held.problems] == ['bad_order'] and 'row 1' in held.problems[0].where
    with pytest.raises(DataError, match='train.json row 1: image_count: 2 <image> for 1 images'): open_scanalign(write(tmp_path/'train.json', [told(1), told(2, images=['a'])]))


@pytest.mark.parametrize('text, said', [('[{"a"', 'not JSON'), ('[]', 'its list is empty'), ('[{"a": 1}]', 'neither `conversations`'), ('', 'the end of the file'), ('['*100_000, 'nested too deeply')])
def test_a_broken_training_file(tmp_path, text, said):
    with pytest.raises(DataError, match=said): open_scanalign(write(tmp_path/'train.json', text))


def test_a_training_file_that_changed_is_noticed(tmp_path):
    path = write(tmp_path/'train.json', [told(1), told(1)])
    held = open_scanalign(path)
    write(path, [told(1)])
    with pytest.raises(DataError, match='train.json row 1'): held[1]


def test_the_view_from_above_is_there_or_the_file_is_refused(tmp_path):
    names = [f'sharegpt_data_chat_scene_{name}.json' for name in ('4_images', '4_images_3D', '8_images_3D_mark')]
    for name in names:
        pictures = [f'images_2D/s/{k}.png' for k in range(int(name.split('_')[4]))] + (['images_2D/s/s_bev.png'] if '3D' in name else [])
        write(tmp_path/'data'/name, [{**told(len(pictures)), 'images': pictures}])
        for p in pictures: write(tmp_path/'data'/p, '')
    found = {(marks, bev): conversations(tmp_path, 4, marks, ImageSettings(bev=bev)) for marks in (True, False) for bev in (True, False)}
    assert {key: held.source.path.name for key, held in found.items()} == {(True, True): names[2], (True, False): names[2], (False, True): names[1], (False, False): names[0]}
    assert {key: sum(p['type'] == 'image' for p in held[0].messages[0]['content']) for key, held in found.items()} == {(True, True): 5, (True, False): 4, (False, True): 5, (False, False): 4}
    assert find_training(tmp_path/'evaluate/annotation', 4, True) == tmp_path/'data'/names[2]
    (tmp_path/'data'/names[1]).unlink()
    with pytest.raises(DataError, match='4 frames without marks and with the view from above'): conversations(tmp_path, 4, False)
    write(tmp_path/'data'/names[1], [told(4)])
    with pytest.raises(ValueError, match='no view from above; set bev to False'): conversations(tmp_path, 4, False)[0]


# chunks

def asked(tmp_path, n=10):
    return load(make_root(tmp_path, scanqa=[row(qid=i, prompt=f'What is {i}?') for i in range(n)]), 'scanqa').samples


def test_chunks_there_and_back(tmp_path):
    samples = asked(tmp_path)
    texts = {s.id: f'It is {i}.' for i, s in enumerate(samples)}
    for n in (4, 1, 16):
        write_chunks(tmp_path/'out', samples, texts, n)
        found = read_predictions(tmp_path/'out', samples)
        assert found.texts == texts and found.name == 'out' and len(found.files) == n
    (first,) = [json.loads((tmp_path/'out/qwenvl_scanqa/predictions_chunk_15.json').read_text())[0]]
    assert first == {'scene_id': 's', 'qid': 0, 'gt_id': 0, 'pred_id': 0, 'prompt': 'What is 0?', 'pred': 'It is 0.', 'ref_captions': ['a chair'], 'type_info': 0}
    assert chunk_ranges(10, 4) == [(0, 2), (2, 4), (4, 6), (6, 10)]


def test_sets_that_are_not_whole_are_refused(tmp_path):
    samples = asked(tmp_path)
    texts = {s.id: 'x' for s in samples}
    four, two = (write_chunks(tmp_path/name, samples, texts, n) for name, n in (('four', 4), ('two', 2)))
    folder = four[0].parent
    for path in two: (folder/path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match='different numbers of processes'): read_chunks(folder, samples)
    assert read_chunks(folder, samples, 2) == texts
    two[1].write_text(json.dumps(json.loads(two[1].read_text())[:2]))
    with pytest.raises(DataError, match='3 of 10 rows have no prediction, first scanqa/00007'): read_chunks(two[0].parent, samples)
    two[1].write_text('[{"scene_id": "s"')
    with pytest.raises(DataError, match='predictions_chunk_1.json: not JSON'): read_chunks(two[0].parent, samples)
    two[1].write_text('[{"scene_id": "s"}]')
    with pytest.raises(DataError, match='predictions_chunk_1.json row 0'): read_chunks(two[0].parent, samples)
    for odd in ({'scene_id': ['s']}, {'gt_id': 1e400}, {'prompt': None}, {'pred': 3}):
        two[1].write_text(json.dumps([{'scene_id': 's', 'prompt': 'q', 'pred': 'x', **odd}]))
        with pytest.raises(DataError, match='predictions_chunk_1.json row 0'): read_chunks(two[0].parent, samples)
    two[0].unlink()
    with pytest.raises(DataError, match='predictions_chunk_0.json is missing'): read_chunks(two[0].parent, samples)


def test_shards_of_another_run_are_refused(tmp_path):
    samples = asked(tmp_path)
    write_chunks(tmp_path/'out', samples, {s.id: 'x' for s in samples}, 2)
    with pytest.raises(DataError, match='4 of 10 predictions belong to no row'): read_predictions(tmp_path/'out', samples[:6])
    with pytest.raises(DataError, match='has none of qwenvl_scanqa'): read_predictions(tmp_path, samples)


# the folder and its parts

def test_the_check_counts_and_names(tmp_path):
    root = make_root(tmp_path, scanqa=[row(), row(qid=1, scene_id='t')], multi3dref='[')
    write(root/'data/sharegpt_data_1.json', [told(1)])
    report = check(root)
    assert not report.ok and report.releases['scanqa'] == 'unknown' and report.releases['multi3dref'] == 'unusable' and report.releases['scanrefer'] == 'absent'
    assert {p.label for p in report.problems if p.dropped} == {'missing_scene', 'unusable'}
    assert {('scanqa', 'rows', 1, 4675), ('train', 'skipped for their order', 0, None)} <= {(r.split, r.what, r.found, r.expected) for r in report.rows}


def test_the_check_takes_one_of_several_lists(tmp_path):
    root = make_root(tmp_path, scanqa=[row(), row(qid=1, scene_id='t')])
    folder = root/'evaluate/annotation'
    (folder/LISTED).unlink()
    for name, scenes in (('mark_val_4', 's'), ('mark_3D_val_4', 'st'), ('val_4', 'st')): write(folder/f'selected_images_{name}.json', {s: ['images_2D/s/0.jpg'] for s in scenes})
    write(folder/'selected_images_broken_val_4.json', '[')
    report = check(root)
    assert {('scanqa', 'rows', 2), ('images', 'list that rows are looked up in', 'selected_images_mark_3D_val_4.json')} <= {(r.split, r.what, r.found) for r in report.rows}
    assert [(p.label, p.where) for p in report.problems if p.dropped] == [('unusable', 'selected_images_broken_val_4.json')]


# raw datasets

def raw_root(tmp_path, **files):
    folder, raw = make_root(tmp_path)/'evaluate/annotation', tmp_path/'raw'
    names = {'scanrefer': 'ScanRefer_filtered_val.json', 'scanqa': 'ScanQA_v1.0_val.json', 'multi3dref': 'multi3drefer_val.json'}
    for name, held in files.items(): write(raw/names[name], held)
    write(raw/LABELS, '\t'.join(['id', 'raw_category', 'category', 'count', 'nyu40id', 'eigen13id', 'nyuClass', 'nyu40class']) + '\n')
    return raw, folder


REFERS = {'scene_id': 's', 'object_id': '1', 'object_name': 'chair', 'ann_id': '0', 'description': 'this is a chair.', 'token': ['this', 'is']}


@pytest.mark.parametrize('change, rows, corpus, groups, first', [
    ({}, 2, 2, 1, None), ({'object_id': 'x'}, 1, 1, 1, 'no_object'), ({'description': None}, 1, 1, 1, 'bad_record'), ({'object_name': None}, 2, 2, 1, 'bad_record'), ({'object_id': [1]}, 1, 1, 1, 'bad_record'),
    ({'token': [1, 2]}, 2, 1, 1, 'bad_record'), ({'token': None}, 2, 2, 1, None)])
def test_a_bad_description_is_named_wherever_it_is_used(tmp_path, change, rows, corpus, groups, first):
    raw, folder = raw_root(tmp_path, scanrefer=[REFERS, {**REFERS, **change}])
    built = build_validation(raw, folder)
    assert [p.label for p in built.problems if p.label != 'absent'][:1] == ([first] if first else [])
    assert built.counts[FILES['scanrefer']] == rows and built.counts[LOOKUP] == groups
    assert sum(map(len, json.loads((folder/CORPUS).read_text()).values())) == corpus
    assert len(set(built.problems)) == len(built.problems)


@pytest.mark.parametrize('change, label', [({'object_ids': ['x']}, 'bad_record'), ({'object_ids': '12'}, 'bad_record'), ({'object_ids': {'1': 0}}, 'bad_record'), ({'answers': []}, 'no_answer'), ({'answers': [3]}, 'bad_record')])
def test_a_bad_question_is_named_and_the_rest_can_be_loaded(tmp_path, change, label):
    good = {'scene_id': 's', 'question': 'What is it?', 'answers': ['a chair'], 'object_ids': [1]}
    raw, folder = raw_root(tmp_path, scanqa=[{**good, **change}, good])
    built = build_validation(raw, folder)
    assert [p.label for p in built.problems if p.label != 'absent'] == [label] and built.counts[FILES['scanqa']] == 1
    assert not load(tmp_path, 'scanqa').problems


def test_a_description_of_several_needs_its_type(tmp_path):
    good = {'scene_id': 's', 'object_ids': [1], 'description': 'the chair.', 'eval_type': 'st_w_d'}
    raw, folder = raw_root(tmp_path, multi3dref=[{k: v for k, v in good.items() if k != 'eval_type'}, good])
    built = build_validation(raw, folder)
    assert [(p.label, p.where) for p in built.problems if p.label != 'absent'] == [('bad_record', 'Multi3DRefer annotation 0')] and len(load(tmp_path, 'multi3dref').samples) == 1


class Hub(BaseHTTPRequestHandler):
    "A repository of one file, told on two pages."
    def do_GET(self):
        tree = '/api/datasets/alexzyqi/GPT4Scene-Val-Annotation/tree/main?recursive=true'
        body = {tree: b'[{"type": "directory", "path": "x"}]', tree + '&page=2': b'[{"type": "file", "path": "scanqa_val.json", "size": 2}]',
                '/datasets/alexzyqi/GPT4Scene-Val-Annotation/resolve/main/scanqa_val.json': b'[]'}.get(self.path)
        self.send_response(200 if body else 404)
        if self.path == tree: self.send_header('Link', f'<http://127.0.0.1:{self.server.server_port}{tree}&page=2>; rel="next"')
        self.send_header('Content-Length', str(len(body or b'')))
        self.end_headers()
        self.wfile.write(body or b'')

    def log_message(self, *args): pass


def test_a_part_is_fetched_after_its_terms(tmp_path):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    mirror, shown = f'http://127.0.0.1:{server.server_port}', []
    try:
        with pytest.raises(RuntimeError, match='accept_licence'): get('questions', tmp_path, mirror=mirror, show=shown.append)
        assert len(shown) == 1 and not list(tmp_path.iterdir())
        assert get('questions', tmp_path, True, mirror, show=shown.append) == [tmp_path/'evaluate/annotation/scanqa_val.json']
        with pytest.raises(RuntimeError, match='did not answer with a list of files'): remote_files('training', mirror)
    finally:
        server.shutdown()
        server.server_close()
    assert [r.state for r in plan(tmp_path)][:2] == ['differs', 'missing']
