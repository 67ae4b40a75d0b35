"""RoboInter's data: coordinates, the index, records, registry, mixtures, archives, frames, and what is said of bad ones."""
import io
import json
import multiprocessing
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_repro.core.jsonl import DataError, Problem
from vlm_repro.core.media import MediaError
from vlm_repro.robointer import index
from vlm_repro.robointer.check import check
from vlm_repro.robointer.coordinates import COPIES, KINDS, Box, Frame, FrameError, agree, box_of, frame_doubt, iou, published_rescale, trace_of
from vlm_repro.robointer.data import load
from vlm_repro.robointer.examples import training_examples
from vlm_repro.robointer.frames import frame_file, frame_ref, read_frame, write_episode
from vlm_repro.robointer.index import build_index, open_records
from vlm_repro.robointer.mixture import draw_records, parse_mixture
from vlm_repro.robointer.records import RecordError, record_of
from vlm_repro.robointer.registry import annotation_file, find_image, image_places, named, registry
from vlm_repro.robointer.scan import ScanError, State, scan_array
from vlm_repro.robointer.unpack import archives, unpack

DROID, RH20T = Frame('pixels', 320, 180), Frame('pixels', 640, 480)
BOX = {'origin_format': [[72, 102], [192, 179]], 'llava_format': [[.22, .57], [.60, .99]], 'smart_resize_format': [[69, 95], [184, 167]]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))


def item(k: int = 4711, box: Any = None, **other: Any) -> dict[str, Any]:
    "A record of Generation; `other` replaces fields, and None removes them."
    box = BOX['smart_resize_format'] if box is None else box
    said = [{'from': 'human', 'value': '<image>\nWhere is the cup?'}, {'from': 'gpt', 'value': json.dumps({'current_bbox': box})}]
    held = {'id': f'{k}_exterior_image_1_left#3', 'task': 'current_box_qa', 'conversations': said, 'images': [f'Generation/image/val/current_box/{k}.jpg'], 'gt': box,
            'h': 180, 'w': 320, 'new_h': 168, 'new_w': 308, **other}
    return {key: v for key, v in held.items() if v is not None}


def write(root: Path, name: str, items: list[Any], copy: str = 'smart_resize_format') -> Path:
    "The annotation file of a data set."
    place = root/named(name).annotations[0].format(copy=copy)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(items), encoding='utf-8')
    return place


# ---------------------------------------------------------------- coordinates


@pytest.mark.parametrize('frame', [DROID, RH20T], ids=['droid', 'rh20t'])
def test_a_place_keeps_every_digit_through_all_frames(frame):
    box = Box(((7.25, 11.5), (100.125, 93.75)), frame)
    there = box
    for kind in (*KINDS, 'pixels'): there = there.to(kind)
    assert np.allclose(there.array(), box.array(), rtol=1e-12)
    assert box.to('permille').xyxy[2] == pytest.approx(100.125/frame.width*1000)


def test_boxes_of_two_frames_or_two_images_are_never_compared():
    box = Box(((1, 2), (3, 4)), DROID)
    for other in (box.to('unit'), Box(box.xy, RH20T)):
        with pytest.raises(FrameError, match='two_frames'): iou(box, other)


def test_the_published_example_is_one_box_in_three_copies():
    held = {COPIES[copy]: box_of(box, DROID.of(COPIES[copy])) for copy, box in BOX.items()}
    assert all(agree(a, b) for a in held.values() for b in held.values())
    assert not agree(held['pixels'], box_of(BOX['smart_resize_format'], DROID))


@pytest.mark.parametrize('value, label', [([[1, 2]], 'bad_arity'), ([1, 2, 3], 'bad_arity'), ([1, 2, 3, 4, 5, 6], 'bad_arity'), ([], 'bad_arity'), ([1, 2, 3, float('nan')], 'not_finite'),
                                          ([1, 2, 3, float('inf')], 'not_finite'), ([1, 2, 3, '4'], 'not_a_number'), (None, 'not_a_list'), ([1, 2, None, 4], 'not_a_number')])
def test_what_is_no_box_has_a_label(value, label):
    with pytest.raises(FrameError) as e: box_of(value, DROID)
    assert e.value.label == label and pickle.loads(pickle.dumps(e.value)).label == label


def test_inverted_empty_and_outside_boxes_say_so():
    assert box_of([9, 9, 1, 1], DROID).inverted and not box_of([9, 9, 1, 1], DROID).ordered().inverted
    assert box_of([5, 5, 5, 9], DROID).empty and iou(box_of([5, 5, 5, 9], DROID), box_of([5, 5, 5, 9], DROID)) == 0
    assert box_of([-1, 0, 5, 5], DROID).outside and not box_of([0, 0, 320, 180], DROID).outside


def test_numbers_of_another_frame_are_found_out():
    assert 'they fit unit' in frame_doubt(box_of(BOX['llava_format'], DROID.of('resized')))
    assert 'they fit permille' in frame_doubt(box_of([225, 566, 600, 994], DROID.of('resized')))
    assert 'pixels' in frame_doubt(box_of([310, 10, 319, 20], DROID.of('resized')))
    assert frame_doubt(trace_of([], DROID)) == ''
    with pytest.raises(FrameError, match='bad_size'): Frame('unit', 0, 180)
    with pytest.raises(ValueError, match='valid: pixels'): Frame('llava', 320, 180)


def test_whole_numbers_lose_their_fractions_only_as_published():
    assert published_rescale([69, 95], 320, 180, 'resized').tolist() == [[71, 101]]
    assert published_rescale([69, 95], 320, 180, 'resized', truncate=False)[0, 0] == pytest.approx(69*320/308)
    assert published_rescale([5, 6], 320, 180, None).tolist() == [[5, 6]]


# ---------------------------------------------------------------- scanner and index


def rubbish(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(6 if depth < 3 else 3)
    if kind < 2: return ''.join(rng.choices('ab\\"{}[],: \n\u20ac|\x7f', k=rng.randrange(12)))
    if kind == 2: return rng.choice([1.5, -3, True, None])
    if kind < 5: return [rubbish(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rubbish(rng, 9) if rng.random() < .1 else str(k): rubbish(rng, depth + 1) for k in range(rng.randrange(4))}


def test_records_are_those_of_json_whatever_the_block(tmp_path, monkeypatch):
    rng = random.Random(7)
    for k in range(60):
        held = json.loads(json.dumps([{'x': rubbish(rng)} for _ in range(rng.randrange(6))]))  # keys are texts
        path = tmp_path/f'{k}.json'
        path.write_bytes((b'\xef\xbb\xbf' if k % 5 == 0 else b'') + b' \n'*(k % 3) + json.dumps(held, ensure_ascii=k % 2 == 0, indent=rng.choice([None, 2])).encode() + b'\n'*(k % 2))
        monkeypatch.setattr(index, 'BLOCK', rng.randrange(3, 60))  # a byte order mark is looked for in the first block
        assert list(open_records(path, tmp_path/'index')) == held


def test_json_lines_by_their_ending(tmp_path):
    (tmp_path/'a.jsonl').write_bytes(b'{"a": 1}\r\n\n   \n{"a": 2}\nbroken\n{"a": 3}')
    held = list(open_records(tmp_path/'a.jsonl', tmp_path/'index'))
    assert [h.label if isinstance(h, Problem) else h['a'] for h in held] == [1, 2, 'broken_line', 3]


@pytest.mark.parametrize('text, why', [('{"a": 1}', 'not with the bracket'), ('[{}{}]', '0 commas'), ('[{},]', '1 commas'), ('[,{}]', '1 commas'), ('[{}, "x"]', 'between records'), ('[{}] []', 'behind the end'),
                                       ('', 'no whole record'), ('[', 'no whole record'), ('[{"id": "a"}, {"id": "b"', r'number 0 \(a\)')])
def test_a_file_that_is_no_array_of_objects_says_where(tmp_path, text, why):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(DataError, match=why): build_index(tmp_path/'a.json', tmp_path/'index')


def test_a_scan_error_tells_the_byte():
    with pytest.raises(ScanError) as e: scan_array(np.frombuffer(b'[{"a": 1}, 7]', np.uint8), State())
    assert e.value.at == 11


def test_an_index_that_was_killed_goes_on_and_ends_the_same(tmp_path):
    rows = [item(k, bulk='{"}'*1000) for k in range(2000)]
    (tmp_path/'a.json').write_text(json.dumps(rows))
    code = ('import sys, time; from pathlib import Path; from vlm_repro.robointer import index; index.BLOCK, index.SAVE = 1 << 16, 1 << 20\n'
            'def slow(done, total): time.sleep(.005); print(done, flush=True)\n'
            'index.build_index(Path(sys.argv[1]), Path(sys.argv[2]), slow)')
    process = subprocess.Popen([sys.executable, '-c', code, str(tmp_path/'a.json'), str(tmp_path/'index')], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) > 4_000_000: break
    process.send_signal(signal.SIGKILL)
    process.wait()
    told = []
    build_index(tmp_path/'a.json', tmp_path/'index', lambda done, total: told.append(done))
    assert told[0] > 2_500_000, 'started from the beginning'
    records = open_records(tmp_path/'a.json', tmp_path/'index')
    assert len(records) == 2000 and all(records[k] == rows[k] for k in (0, 1, 999, 1999, -1))


def _id(records: Any, k: int, out: Any) -> None: out.put(records[k]['id'])


def test_records_are_read_in_other_processes_too(tmp_path):
    (tmp_path/'a.json').write_text(json.dumps([item(k) for k in range(50)]))
    records = open_records(tmp_path/'a.json', tmp_path/'index')
    assert records[7]['id'].startswith('7_')
    queue = multiprocessing.get_context('fork').Queue()
    process = multiprocessing.get_context('fork').Process(target=_id, args=(records, 31, queue))
    process.start()
    assert queue.get(timeout=30).startswith('31_') and records[8]['id'].startswith('8_')
    process.join()


def test_a_file_that_changed_gets_another_index_and_one_that_shrank_is_noticed(tmp_path):
    path = tmp_path/'a.json'
    path.write_text(json.dumps([item(k) for k in range(9)]))
    records = open_records(path, tmp_path/'index')
    time.sleep(.02)
    path.write_text('[{}]')
    assert len(open_records(path, tmp_path/'index')) == 1
    with pytest.raises(DataError, match='has changed'): records[8]


# ---------------------------------------------------------------- records, files, samples


@pytest.mark.parametrize('change, label', [({'conversations': [{'from': 'robot', 'value': 'x'}]}, 'unknown_role'), ({'conversations': None}, 'no_conversation'), ({'conversations': []}, 'no_question'),
                                           ({'conversations': [7]}, 'bad_turn'), ({'conversations': [{'from': 'human', 'value': None}]}, 'bad_turn'), ({'id': None}, 'no_id'), ({'w': '320'}, 'bad_size'),
                                           ({'w': 0}, 'bad_size'), ({'images': ['../x.jpg']}, 'path_leaves_root'), ({'images': [None]}, 'bad_images'), ({'images': ['']}, 'bad_images')])
def test_a_record_that_cannot_be_used_has_a_label(change, label):
    with pytest.raises(RecordError) as e: record_of(item(**change))
    assert e.value.label == label


def test_odd_records_are_used_and_told(tmp_path):
    said = item()['conversations']
    odd = [item(1, conversations=[{**said[0], 'from': 'huamn'}, said[1]]), item(2, gt=str(BOX['smart_resize_format'])), item(3, images='/mnt/old/Generation/image/val/current_box/3.jpg'), item(4, raw_data={'x': 'y'*100_000}),
           item(5, h=None, w=None), item(6, conversations=[said[1], *said]), item(7, images=None, image='Generation/image/val/current_box/7.jpg'), item(7), {'id': 'bad', 'conversations': []}]
    write(tmp_path, 'current_box_val', odd)
    data = load(tmp_path)
    labels = {p.label for p in data.problems}
    assert {'misspelt_role', 'gt_as_text', 'stale_path', 'unknown_field', 'no_size', 'leading_turn', 'readme_schema', 'missing_image', 'no_question'} <= labels
    assert len(data.samples) == 8 and len({s.id for s in data.samples}) == 8 and data.identity['left_out'] == 1
    assert all(s.question == '<image>\nWhere is the cup?' and json.loads(s.gold) == {'current_bbox': BOX['smart_resize_format']} for s in data.samples)
    assert {s.media[0].path for s in data.samples} == {f'Generation/image/val/current_box/{k}.jpg' for k in range(1, 8)}
    assert not any('y'*100 in str(s) for s in data.samples)


def test_every_copy_knows_its_frame_and_none_is_the_default_of_another(tmp_path):
    for copy, box in BOX.items(): write(tmp_path, 'current_box_val', [item(box=box)], copy)
    assert [load(tmp_path, copy=copy).samples[0].meta['frame'] for copy in COPIES] == list(COPIES.values())
    with pytest.raises(ValueError, match='valid: origin_format'): load(tmp_path, copy='llava')
    with pytest.raises(DataError, match='no annotations below'): load(tmp_path, 'contact_box')
    with pytest.raises(ValueError, match='did you mean'): load(tmp_path, 'curent_box')
    with pytest.raises(DataError, match='no Generation'): load(tmp_path/'Generation/meta')


def test_images_are_found_in_three_places_and_the_doubled_one_is_not_asked_twice(tmp_path):
    cups = named('droid_vla_current_box_train')
    (tmp_path/cups.images).mkdir(parents=True)
    (tmp_path/cups.images/'a.jpg').write_bytes(b'')
    assert find_image(tmp_path, cups, 'other/a.jpg') == f'{cups.images}/a.jpg' == find_image(tmp_path, cups, 'a.jpg')
    assert find_image(tmp_path, cups, 'b.jpg') is None
    places = list(image_places(cups, 'EP#3'))
    assert len(places) == len(set(places)) and 'EP#3.jpg' in places


def test_the_registry_names_every_data_set_once_and_the_two_trajectories_are_not_exchanged():
    train = [n for n in registry().values() if n.split == 'train']
    assert len(train) == 30 and len({n.annotations[0] for n in train}) == 30
    for source in ('rh20t', 'droid'):
        assert named(f'{source}_vla_traj_qa_train').annotations[0].endswith('traj_qa_wo_init_pos.json')
        assert named(f'{source}_vla_traj_init_point_qa_train').images.endswith('traj_init_point_qa')
    with pytest.raises(ValueError, match='stands for nothing'): named('all')


def test_the_plan_file_is_found_where_it_is_published_and_where_it_is_registered(tmp_path):
    plans = named('manipvqa_train')
    for place in (plans.registered, plans.annotations[0]):
        (tmp_path/place).parent.mkdir(parents=True)
        (tmp_path/place).write_text('[]')
        assert annotation_file(tmp_path, plans, 'llava_format') == tmp_path/place


# ---------------------------------------------------------------- mixtures and conversations


def test_a_draw_is_the_same_everywhere_and_another_for_another_seed():
    a = draw_records(1000, .29, 3, 'x')
    assert len(a) == 290 and (a == draw_records(1000, .29, 3, 'x')).all() and (np.diff(a) > 0).all()
    assert set(a) != set(draw_records(1000, .29, 4, 'x')) and set(a) != set(draw_records(1000, .29, 3, 'y'))
    assert set(a) <= set(draw_records(1000, .5, 3, 'x'))


@pytest.mark.parametrize('text, why', [('droid_vla_box_train', 'did you mean'), ('', 'names no data set'), ('manipvqa_train%6.5', 'no data set is named'), ('manipvqa_train%5,manipvqa_train', 'twice')])
def test_a_bad_mixture_says_what_is_wrong(text, why):
    with pytest.raises(ValueError, match=why): parse_mixture(text)


def test_conversations_are_read_lazily_and_what_cannot_be_trained_on_is_set_aside(tmp_path):
    from vlm_repro.train.render import Dropped, read_turn
    said = item()['conversations']
    rows = [item(0), item(1, conversations=[{**said[0], 'from': 'huamn'}, said[1]]), item(2, conversations=said[:1]), item(3, images=['a.jpg', 'b.jpg']), 7]
    write(tmp_path, 'droid_vla_current_box_train', rows[:4])
    found = training_examples(tmp_path, 'droid_vla_current_box_train')
    assert [m['role'] for m in found[1].messages] == ['user', 'assistant'] and found[1].messages[0]['content'][0]['type'] == 'image'
    assert 'no_answer' in found[2].id and 'tag_count' in found[3].id
    with pytest.raises(Dropped, match='empty answer'): read_turn(_Plain(), found[2], 1)
    assert pickle.loads(pickle.dumps(found))[0] == found[0] and len({e.id for e in found}) == 4
    with pytest.raises(DataError, match='between records'): (write(tmp_path, 'droid_vla_final_box_train', rows), training_examples(tmp_path, 'droid_vla_final_box_train'))


class _Plain:
    "As much of a tokenizer as an empty answer needs."
    added_tokens_decoder: dict = {}


def test_what_was_never_published_is_left_out_and_what_is_missing_is_an_error(tmp_path):
    write(tmp_path, 'droid_vla_current_box_train', [item()])
    found = training_examples(tmp_path, 'droid_vla_current_box_train,droid_traj_lang_sub_choice_qa_train')
    assert found.left_out == ('droid_traj_lang_sub_choice_qa_train',) and len(found) == 1
    with pytest.raises(DataError, match='droid_vla_final_box_train: no annotations'): training_examples(tmp_path, 'droid_vla_current_box_train,droid_vla_final_box_train')


# ---------------------------------------------------------------- archives and databases


def test_pieces_are_joined_in_order_and_nothing_leaves_the_folder(tmp_path):
    place = tmp_path/'Task_planning/image/train/manipvqa'
    place.mkdir(parents=True)
    held = io.BytesIO()
    with zipfile.ZipFile(held, 'w') as z:
        for k in range(30): z.writestr(f'task_planning/{k}.jpg', random.Random(k).randbytes(900))
        z.writestr('../../up.jpg', b'x')
        z.writestr('/abs.jpg', b'x')
    data = held.getvalue()
    for k in range(11): (place/f'task_planning.zip.{k + 1}').write_bytes(data[k*len(data)//11:(k + 1)*len(data)//11])
    out, problems = unpack(tmp_path, workers=2)
    assert out[0].written == 30 and (place/'task_planning/29.jpg').read_bytes() == random.Random(29).randbytes(900)
    assert sorted(p.label for p in problems) == ['path_leaves_root']*2 and not list(tmp_path.rglob('up.jpg')) and not Path('/abs.jpg').exists()
    (place/'task_planning.zip.11').unlink()
    assert unpack(tmp_path)[1][0].label == 'bad_archive'
    (place/'task_planning.zip.4').unlink()
    with pytest.raises(DataError, match='piece 4'): archives(tmp_path)


def test_a_file_that_is_damaged_within_an_archive_is_named_and_the_others_are_written(tmp_path):
    place = tmp_path/'Generation/image/val'
    place.mkdir(parents=True)
    with zipfile.ZipFile(place/'a.zip', 'w') as z:
        for k in range(3): z.writestr(f'a/{k}.jpg', bytes([k + 65])*500)
    data = bytearray((place/'a.zip').read_bytes())
    data[data.index(b'B'*100)] = 0
    (place/'a.zip').write_bytes(data)
    out, problems = unpack(tmp_path)
    assert (out[0].written, [p.label for p in problems]) == (2, ['bad_file']) and not (place/'a/1.jpg').exists() and (place/'a/2.jpg').exists()


def test_frames_come_out_of_a_database_as_they_went_in(tmp_path):
    pytest.importorskip('lmdb')
    out = io.BytesIO()
    Image.new('RGB', (64, 36), (200, 30, 20)).save(out, 'JPEG')
    write_episode(tmp_path/'7_exterior_image_1_left', {'primary_image': [out.getvalue()]*2, 'wrist_image': [out.getvalue()]})
    ref = frame_ref('x/7_exterior_image_1_left#1')
    assert frame_file(tmp_path, ref, folder=tmp_path/'files').read_bytes() == out.getvalue()
    assert read_frame(tmp_path, ref, published=True).getpixel((3, 3))[2] > 150 > read_frame(tmp_path, ref).getpixel((3, 3))[2]
    for text, why in (('7_exterior_image_1_left#2', 'has 2 frames'), ('RH20T_cfg1#0', 'no episode'), ('kitchen#0', 'neither')):
        with pytest.raises(MediaError, match=why): read_frame(tmp_path, frame_ref(text))
    write(tmp_path, 'current_box_val', [item(7, images=['7_exterior_image_1_left#1'])])
    data = load(tmp_path, episodes=tmp_path)
    assert data.identity['missing_images'] == 0 and (tmp_path/data.samples[0].media[0].path).read_bytes() == out.getvalue()
    assert 'give the folder of episodes' in str(next(p for p in load(tmp_path).problems if p.label == 'missing_image'))


# ---------------------------------------------------------------- the check


def test_the_check_finds_files_images_and_coordinates_that_are_not_what_they_should_be(tmp_path):
    write(tmp_path, 'current_box_val', [item(1, BOX['origin_format']), item(2, BOX['origin_format'], gt=BOX['smart_resize_format'])], 'llava_format')
    write(tmp_path, 'contact_decide_val', [item(3)]).write_text('[{"id": "a"}, {"id"')
    picture = tmp_path/'Generation/image/val/current_box/1.jpg'
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b'')
    report = check(tmp_path)
    labels = {p.label for p in report.problems}
    assert not report.ok and {'other_frame', 'gt_differs', 'missing_image', 'broken_file', 'absent', 'never_published'} <= labels
    assert any(r.what == 'paths' and r.found.startswith('2 of 2') for r in report.rows) and any(r.what == 'images' and r.found == '1 of 2 found' for r in report.rows)
    assert next(r for r in report.rows if r.what == 'records').expected == 2000
    (tmp_path/'world.json').write_text('{}')
    assert next(r for r in check(tmp_path).rows if r.what == 'records').expected is None
