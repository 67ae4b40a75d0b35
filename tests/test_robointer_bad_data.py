"RoboInter's data where it is damaged: what is left out is told first, an index that cannot be believed is made again, and no bad truth ends a run."
import io
import json
import random
import shutil
import zipfile

import pytest
from test_robointer_data import BOX, item, write
from typer.testing import CliRunner

from vlm_repro.cli_data import data_app
from vlm_repro.core.check import CheckReport, most_telling
from vlm_repro.core.jsonl import Problem
from vlm_repro.core.records import Sample
from vlm_repro.core.tasks import check_settings, get_task
from vlm_repro.models.protocol import load_model
from vlm_repro.robointer.check import check, copies_differ
from vlm_repro.robointer.data import load
from vlm_repro.robointer.index import build_index, open_records
from vlm_repro.robointer.records import RecordError, oddities, record_of
from vlm_repro.robointer.registry import named
from vlm_repro.robointer.task import RoboInterSettings, data_folder
from vlm_repro.train.paper import complete_run


def said(value: object) -> list[dict]:
    return [{'from': 'human', 'value': '<image>\nWhere?'}, {'from': 'gpt', 'value': json.dumps({'current_bbox': value}) if not isinstance(value, str) else value}]


BAD = [[[10, 20], [30]], [[1, 2], [3, 4], [5, 6], [7, 8]], [], 'nowhere', [[float('nan'), 1], [2, 3]], [['a', 1], [2, 3]]]


@pytest.mark.parametrize('value', BAD)
def test_a_question_without_a_true_box_is_left_out_and_named(tmp_path, value):
    write(tmp_path, 'current_box_val', [item(0), item(1, conversations=said(value), gt=value)])
    data = load(tmp_path)
    gone = [p for p in data.problems if p.dropped]
    assert len(data.samples) == 1 and len(gone) == 1 and 'record 1' in gone[0].where and 'current_box' in gone[0].where and data.identity['left_out'] == 1


def test_a_question_about_an_image_that_it_has_not_is_left_out(tmp_path):
    write(tmp_path, 'current_box_val', [item(0), item(1, images=None), item(2, images=[])])
    data = load(tmp_path)
    assert len(data.samples) == 1 and [p.label for p in data.problems if p.dropped] == ['lost_images']*2


def test_a_size_that_qwen_cannot_see_is_left_out(tmp_path):
    write(tmp_path, 'current_box_val', [item(0), {k: v for k, v in item(1, h=9, w=9).items() if k not in ('new_h', 'new_w')}])
    assert [p.label for p in load(tmp_path).problems if p.dropped] == ['bad_size']


@pytest.mark.parametrize('odd, label', [({'conversations': [{'from': ['human'], 'value': 'x'}]}, 'unknown_role'), ({'gt': '({1,2},)'}, 'bad_gt'), ({'gt': "[b'a']"}, 'bad_gt'), ({'id': True}, 'no_id')])
def test_no_field_of_a_record_ends_the_load(tmp_path, odd, label):
    write(tmp_path, 'current_box_val', [item(0), item(1, **odd)])
    data = load(tmp_path)
    assert len(data.samples) == 1 and [p.label for p in data.problems if p.dropped] == [label] and label in {p.label for p in check(tmp_path).problems}


def test_a_question_that_is_nothing_is_left_out(tmp_path):
    for asked, label in (({'question': None, 'ground_truth': 'Yes'}, 'no_question'), ({'question': 'Is it?', 'ground_truth': None}, 'no_question')):
        with pytest.raises(RecordError, match=label): record_of({'id': 'a', 'image_path': 'a.jpg', **asked})
    both = item(0, image='b.jpg')
    assert 'two_lists_of_images' in dict(oddities(both, record_of(both)))


def test_a_mixture_that_the_recipe_does_not_take_is_refused():
    settings = RoboInterSettings(recipe='tiny', mixture='droid_vla_contact_box_train')
    with pytest.raises(ValueError, match='names its own data'): check_settings(get_task('robointer'), settings)
    check_settings(get_task('robointer'), RoboInterSettings(recipe='published', mixture='droid_vla_contact_box_train'))


def test_a_bad_truth_does_not_end_a_run(tmp_path):
    shutil.copytree(data_folder(RoboInterSettings()), tmp_path/'data')
    path, = (tmp_path/'data').rglob('val/smart_resize_format/current_box.json')
    rows = json.loads(path.read_text())
    rows[0]['conversations'][1]['value'] = '{"current_bbox": [[10, 20], [30]]}'
    path.write_text(json.dumps(rows))
    settings = RoboInterSettings(data_root=str(tmp_path/'data'), tasks='current_box', limit=0, max_new_tokens=4)
    run = complete_run(get_task('robointer'), settings, load_model('tiny', tiny='robointer', dtype='float32'), tmp_path/'run')
    assert run.manifest['n'] == len(rows) - 1 and any('bad_arity' in p and 'record 0' in p for p in run.manifest['problems'])


def test_what_is_left_out_is_shown_before_what_is_odd():
    odd = [Problem('stale_path', f'a record {i}', 'x', False) for i in range(300)]
    report = CheckReport((), (*odd, Problem('missing_image', 'a record 3', 'gone', False), *(Problem('broken_file', f'f{i}', 'cut') for i in range(30))), {}, None)
    assert [p.label for p in most_telling(report.problems)] == ['broken_file']*20 + ['stale_path', 'missing_image']
    text = report._repr_markdown_()
    assert text.index('f0') < text.index('stale_path: ') and 'stale_path 300' in text and '309 more' in text and '30 of them left out' in text


def test_the_check_sees_odd_boxes_sizes_and_copies(tmp_path):
    for copy in ('origin_format', 'llava_format', 'smart_resize_format'):
        write(tmp_path, 'current_box_val', [item(k, BOX[copy]) for k in range(4)], copy)
    assert not {'copies_differ', 'inverted_box', 'empty_box', 'other_resize', 'bad_arity'} & {p.label for p in check(tmp_path).problems}
    turned, flat = BOX['origin_format'][::-1], [BOX['origin_format'][0]]*2
    rows = [item(0, BOX['origin_format']), item(1, turned), item(2, flat), item(3, [[1, 2], [3]])]
    rows[0] |= {'new_w': 1000, 'new_h': 1000}
    write(tmp_path, 'current_box_val', rows, 'origin_format')
    report = check(tmp_path)
    labels = {p.label: p for p in report.problems}
    assert {'copies_differ', 'inverted_box', 'empty_box', 'other_resize', 'bad_arity'} <= labels.keys() and labels['bad_arity'].dropped
    assert all('origin_format' in labels[k].where for k in ('inverted_box', 'empty_box', 'other_resize', 'bad_arity'))
    assert next(r.found for r in report.rows if r.what == 'usable' and 'origin' in r.split).startswith('3 of 4')
    write(tmp_path, 'current_box_val', [item(0, BOX['llava_format'])], 'llava_format')
    assert 'records' in copies_differ(tmp_path, named('current_box_val'), ('origin_format', 'llava_format'))[0].detail


def test_an_index_that_cannot_be_believed_is_made_again(tmp_path):
    path = tmp_path/'a.json'
    path.write_text(json.dumps([{'id': str(i), 'x': 'y'*50} for i in range(500)]))
    for damage in ('half', 'ragged', 'gone', 'head', 'longer', 'other'):
        head = build_index(path, tmp_path/'index')
        offsets = head.with_suffix('.offsets')
        whole = offsets.read_bytes()
        if damage == 'half': offsets.write_bytes(whole[:len(whole)//2])
        if damage == 'ragged': offsets.write_bytes(whole[:-3])
        if damage == 'gone': offsets.unlink()
        if damage == 'head': head.write_text('{"file": {')
        if damage == 'longer': offsets.write_bytes(whole + whole[:16])
        if damage == 'other': head.write_text('[]')
        records = open_records(path, tmp_path/'index')
        assert len(records) == 500 and records[499]['id'] == '499' and offsets.read_bytes() == whole, damage


def test_a_half_made_index_without_its_offsets_begins_again(tmp_path):
    path = tmp_path/'a.json'
    path.write_text(json.dumps([{'id': str(i)} for i in range(100)]))
    head = build_index(path, tmp_path/'index')
    held = json.loads(head.read_text())
    held['state'] |= {'at': 300, 'records': 20}
    head.write_text(json.dumps(held))
    head.with_suffix('.offsets').unlink()
    assert [r['id'] for r in open_records(path, tmp_path/'index')] == [str(i) for i in range(100)]


# ---------------------------------------------------------------- archives from the command line


def release(root, n=12):
    "A release with a whole archive and one in four pieces."
    whole, cut = root/'Generation/image/val', root/'Task_planning/image/train/manipvqa'
    for place in (whole, cut): place.mkdir(parents=True)
    with zipfile.ZipFile(whole/'a.zip', 'w') as z:
        for k in range(n): z.writestr(f'a/{k}.jpg', random.Random(k).randbytes(900))
    held = io.BytesIO()
    with zipfile.ZipFile(held, 'w') as z:
        for k in range(n): z.writestr(f'task_planning/{k}.jpg', random.Random(k).randbytes(900))
    data = held.getvalue()
    for k in range(4): (cut/f'task_planning.zip.{k:03}').write_bytes(data[k*len(data)//4:(k + 1)*len(data)//4])
    return cut


def call(*args):
    result = CliRunner().invoke(data_app, list(args))
    return result.exit_code, result.output + str(result.exception or '')


def test_archives_are_unpacked_by_a_command_that_goes_on_where_it_was(tmp_path):
    release(tmp_path)
    code, told = call('unpack', 'robointer', '--root', str(tmp_path), '--part', 'Generation')
    assert code == 0 and 'everything is unpacked' in told and not list(tmp_path.rglob('task_planning'))
    (tmp_path/'Generation/image/val/a/3.jpg').unlink()
    code, told = call('unpack', 'robointer', '--root', str(tmp_path), '--workers', '2')
    assert code == 0 and len(list(tmp_path.rglob('*.jpg'))) == 24
    assert [line.split()[-1] for line in told.splitlines() if '.zip' in line and 'B/s' not in line] == ['1', '12']


def test_a_piece_that_is_missing_is_named_once(tmp_path):
    cut = release(tmp_path)
    (cut/'task_planning.zip.000').unlink()
    code, told = call('unpack', 'robointer', '--root', str(tmp_path))
    assert code == 1 and '1 problem(s)' in told and 'first piece' in told and len(list(tmp_path.rglob('*.jpg'))) == 12


def test_a_damaged_archive_says_so_in_few_lines_and_leaves_nothing_half_written(tmp_path):
    cut = release(tmp_path, 40)
    path = cut/'task_planning.zip.001'
    path.write_bytes(bytes(len(path.read_bytes())))
    code, told = call('unpack', 'robointer', '--root', str(tmp_path))
    assert code == 1 and 'more files: a piece in the middle' in told and told.count('cannot be unpacked') == 3 and not list(tmp_path.rglob('*.part'))


def test_a_paper_without_archives_has_no_such_command(tmp_path):
    assert 'no such command for mmwalk' in call('unpack', 'mmwalk', '--root', str(tmp_path))[1]
    assert 'no zip archives' in call('unpack', 'robointer', '--root', str(release(tmp_path/'a').parents[3]), '--part', 'Understanding')[1]


def test_the_check_command_tells_what_is_left_out_first(tmp_path):
    write(tmp_path, 'current_box_val', [*(item(k, images=f'Generation/image/val/current_box/{k}.jpg') for k in range(30)), item(99, conversations=said([[1, 2], [3]]))])
    code, told = call('check', 'robointer', '--root', str(tmp_path))
    lines = told.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith('  '))
    assert code == 1 and 'bad_arity' in lines[first] and 'left out or broken' in lines[first - 1]
    assert len(call('check', 'robointer', '--root', str(tmp_path), '--all')[1]) >= len(told)


# ---------------------------------------------------------------- what the page draws


def test_pictures_and_copies_that_are_not_there_stop_no_page(tmp_path):
    import matplotlib
    matplotlib.use('Agg')
    from vlm_repro.robointer.figures import film_strip, gallery, in_all_frames
    write(tmp_path, 'current_box_val', [item(0), item(1, conversations=[said('x')[0], {'from': 'gpt', 'value': '[[69, 95], [184, 167]]'}])])
    data = load(tmp_path)
    bare = Sample(data.samples[0].id, (), data.samples[0].question, data.samples[0].gold, data.samples[0].meta)
    words = [[t.get_text() for t in axes.texts] for axes in gallery([*data.samples, bare], data).axes]
    assert words[:3] == [['no picture']]*3 and [t.get_text() for t in film_strip(data.samples[0], data).axes[0].texts] == ['no picture']
    one = in_all_frames({'smart_resize_format': data.samples[0]})
    assert one.count('\n') == 3 and 'another place' not in one
    write(tmp_path, 'current_box_val', [item(0, [[1, 2], [30, 40]])], 'origin_format')
    both = in_all_frames({'smart_resize_format': data.samples[0], 'origin_format': load(tmp_path, copy='origin_format').samples[0]})
    assert 'origin_format: another place than smart_resize_format has' in both


# ---------------------------------------------------------------- training


def test_a_record_that_cannot_be_read_costs_itself_not_the_run(tmp_path):
    from vlm_repro.models.families import FAMILIES
    from vlm_repro.robointer.examples import training_examples
    from vlm_repro.train.data import marks_of, measure_source
    from vlm_repro.train.recipe import Source, load_recipe
    rows = [item(k, images=None, conversations=[{'from': 'human', 'value': 'Where?'}, {'from': 'gpt', 'value': 'There.'}]) for k in range(3)]
    path = write(tmp_path, 'droid_vla_current_box_train', rows)
    found = training_examples(tmp_path, 'droid_vla_current_box_train')
    path.write_bytes(path.read_bytes()[:-150])
    measured = measure_source(Source('robointer'), found, FAMILIES['qwen2_vl']()[1], load_recipe('robointer/tiny'))
    assert list(measured.lengths) == [0, 1] and [(x.id, x.kind) for x in measured.dropped] == [('example 2', 'unusable')] and 'has changed since it was indexed' in measured.dropped[0].why
    assert [i for i, _ in marks_of(found)][2] == 'example 2'
