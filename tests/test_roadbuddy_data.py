"""Road Buddy's annotation files: every odd case, every way in which a file can be bad, the three splits and the check."""
import json
import random
import unicodedata
from collections import Counter

import pytest
from PIL import Image
from roadbuddy_files import FOUR, TWO, item, make_root, question, test_item
from typer.testing import CliRunner

from vlm_repro.cli_data import data_app
from vlm_repro.core.download import DownloadError
from vlm_repro.core.jsonl import DataError
from vlm_repro.core.video import write_clip
from vlm_repro.metrics.letters import body_of, letter_of
from vlm_repro.roadbuddy.annotations import annotation_file, choices_of, clip_of, support_of
from vlm_repro.roadbuddy.check import check, count, expected_counts
from vlm_repro.roadbuddy.data import FOLDER, OFFICIAL, WATERMARK, choose, find_file, load
from vlm_repro.roadbuddy.download import get, plan
from vlm_repro.roadbuddy.splits import GROUPS, leak_worth, leaks, split_indices, split_samples


def loaded(tmp_path, *items, **more):
    return load(make_root(tmp_path/'data', items), **more)


def labels(data):
    return Counter(p.label for p in data.problems)


# reading

def test_a_plain_item(tmp_path):
    data = loaded(tmp_path, item(1, FOUR, 2))
    (sample,) = data.samples
    assert (sample.id, sample.gold, sample.meta['gold_letter'], choices_of(sample), support_of(sample)) == ('train_0001', 'C. Đi thẳng', 'C', tuple(FOUR), (2.,))
    assert (sample.media[0].kind, sample.meta['source'], sample.meta['seconds']) == ('video', '203', '8') and not data.problems


@pytest.mark.parametrize('choices, right, label', [
    (FOUR * 2, 5, None), (['A. x', 'B. y', 'C. z', 'C. w'], 3, 'repeated_letter'), (['A. x', 'B. y', 'B. z', 'B. w'], 1, 'repeated_letter'),
    (['A. x', 'B. x', 'C. y'], 0, 'repeated_choice'), (['A. x.', 'B.y'], 1, None), (['A.  x', 'B. y'], 0, None)])
def test_odd_choices_are_kept_and_named(tmp_path, choices, right, label):
    data = loaded(tmp_path, item(1, choices, right))
    assert len(data.samples) == 1 and data.samples[0].gold == choices[right]
    assert set(labels(data)) == ({label} if label else set()) and not any(p.dropped for p in data.problems)


def test_eight_choices_are_four_twice(tmp_path):
    (sample,) = loaded(tmp_path, item(1, FOUR * 2, 6)).samples
    assert (sample.meta['letters'], sample.meta['n_choices'], sample.meta['gold_letter']) == ('ABCDABCD', '8', 'C')


def test_decomposed_text_is_composed_and_named(tmp_path):
    apart = [unicodedata.normalize('NFD', c) for c in TWO]
    data = loaded(tmp_path, item(1, TWO), item(2, apart, 1), item(3, apart, answer=TWO[0]))
    assert [choices_of(s) for s in data.samples] == [tuple(TWO)] * 3 and [s.gold for s in data.samples] == [TWO[0], TWO[1], TWO[0]]
    assert labels(data) == {'decomposed': 2}


@pytest.mark.parametrize('change, label', [
    ({'choices': None}, 'no_choices'), ({'choices': ['A. x'], 'answer': 'A. x'}, 'no_choices'), ({'choices': 'A. x'}, 'no_choices'), ({'choices': ['x', 'y'], 'answer': 'x'}, 'no_letter'),
    ({'answer': None}, 'no_answer'), ({'answer': ''}, 'no_answer'), ({'answer': 'C. Khác'}, 'answer_not_offered'), ({'answer': 3}, 'no_answer'),
    ({'question': '  '}, 'no_question'), ({'id': None}, 'no_id'), ({'video_path': None}, 'no_video_path'), ({'video_path': '../x.mp4'}, 'path_leaves_root'),
    ({'video_path': '/etc/passwd'}, 'path_leaves_root'), ({'video_path': 'train\\x.mp4'}, 'path_leaves_root'), ({'support_frames': ['2']}, 'bad_support'),
    ({'support_frames': [-1.]}, 'bad_support'), ({'support_frames': [float('nan')]}, 'bad_support'), ({'support_frames': [True]}, 'bad_support')])
def test_a_bad_item_is_left_out_and_named(tmp_path, change, label):
    data = loaded(tmp_path, item(1), {k: v for k, v in {**item(2), **change}.items() if v is not None}, item(3))
    assert [s.id for s in data.samples] == ['train_0001', 'train_0003']
    (problem,) = data.problems
    assert problem.label == label and problem.dropped and problem.where.startswith('train.json item 2')
    with pytest.raises(DataError, match=label): load(tmp_path/'data', strict=True)


@pytest.mark.parametrize('change, label', [
    ({'note': 1}, 'unknown_field'), ({'support_frames': [3., 1.]}, 'unsorted_support'), ({'support_frames': [1., 1.]}, 'unsorted_support'),
    ({'support_frames': [9.]}, 'late_support'), ({'video_path': 'train/videos/mine.mp4'}, 'strange_name')])
def test_an_odd_item_is_kept_and_named(tmp_path, change, label):
    data = loaded(tmp_path, item(1, **change))
    assert len(data.samples) == 1 and [(p.label, p.dropped) for p in data.problems] == [(label, False)]


def test_a_mark_at_the_very_end_is_not_odd(tmp_path):
    assert not loaded(tmp_path, item(1, support_frames=[0., 8.])).problems


def test_duplicates(tmp_path):
    data = loaded(tmp_path, item(1), item(1), item(2, question=item(1)['question'], clip=1))
    assert [s.id for s in data.samples] == ['train_0001', 'train_0002'] and [(p.label, p.dropped) for p in data.problems] == [('duplicate', True), ('repeated_question', False)]


@pytest.mark.parametrize('text, said', [
    ('{"data": [{"id": "x"', 'not JSON .* at line 1, column'), ('[1]', 'no object with a list'), ('{"data": 3}', 'no object with a list'), ('', 'not JSON'), ('{"__count__": 0, "data": []}', 'its list is empty')])
def test_a_broken_file_says_where(tmp_path, text, said):
    root = make_root(tmp_path, [item(1)])
    (root/FOLDER/'train/train.json').write_text(text)
    with pytest.raises(DataError, match=said): load(root)


def test_broken_bytes_and_a_byte_order_mark(tmp_path):
    root = make_root(tmp_path, [item(1)])
    path = root/FOLDER/'train/train.json'
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    assert len(load(root).samples) == 1
    path.write_bytes(b'{"data": ["\xff"]}')
    with pytest.raises(DataError, match='not UTF-8 .* at byte 11'): load(root)


def test_a_wrong_count_is_told(tmp_path):
    root = make_root(tmp_path, [item(1)])
    path = root/FOLDER/'train/train.json'
    path.write_text(path.read_text(encoding='utf-8').replace('"__count__": 1', '"__count__": 2'), encoding='utf-8')
    assert [str(p) for p in load(root).problems] == ['train.json: wrong_count: `__count__` is 2 and there are 1 items']


def test_the_public_test_has_no_answers_and_unofficial_ones_are_named(tmp_path):
    data = load(make_root(tmp_path, public=[test_item(1), test_item(2, answer=TWO[1])]), 'public_test')
    assert [s.gold for s in data.samples] == ['', 'B. Sai'] and labels(data) == {'unofficial_answer': 1}


# the folder

def test_the_root_is_found_from_above_and_from_within(tmp_path):
    root = make_root(tmp_path/'RoadBuddy', [item(1)], [test_item(1)])
    for start in (tmp_path, root, root/FOLDER):
        for split in ('train', 'public_test'):
            path, folder = find_file(start, split)
            assert (path.name, folder) == (f'{split}.json', root/FOLDER)


def test_the_private_set_stands_alone(tmp_path):
    (tmp_path/'private_test.json').write_text(annotation_file([test_item(1, id='testb_0001', video_path='videos/a_1.mp4')]), encoding='utf-8')
    data = load(tmp_path, 'private_test')
    assert data.frames == str(tmp_path) and data.samples[0].media[0].path == 'videos/a_1.mp4' and data.identity['frames'] == 'absent'


def test_missing_folders_and_splits_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match='data plan roadbuddy'): load(tmp_path/'nowhere')
    with pytest.raises(DataError, match=f'looked for train/train.json, {FOLDER.replace("+", ".")}'): load(tmp_path)
    with pytest.raises(ValueError, match='valid: train, public_test, private_test'): load(tmp_path, 'val')


def test_identity_and_watermark(tmp_path):
    root = make_root(tmp_path, [item(1)])
    about = load(root)
    assert about.identity['official'] is False and about.identity['release'] == 'unknown' and about.watermark is None and len(about.identity['files']['train.json']) == 64
    for place in (root, root/FOLDER):
        (place/'world.json').write_text('{}')
        world = load(root)
        assert (world.watermark, world.identity['release'], world.identity['frames']) == (WATERMARK, 'world', 'world')
        (place/'world.json').unlink()


def test_a_file_is_official_by_its_hash(tmp_path, monkeypatch):
    root = make_root(tmp_path, [item(1)])
    monkeypatch.setitem(OFFICIAL, 'train', load(root).identity['files']['train.json'][:8])
    assert load(root).identity['official'] and load(root).samples[0].meta['release'] == 'official'
    report = check(root)
    assert not report.ok and any(r.what == 'samples' and (r.found, r.expected) == (1, 1490) for r in report.rows)


def test_choose_is_nested_and_keeps_the_order():
    samples = [question(n) for n in range(30)]
    small, large = (choose(samples, n, seed=3) for n in (5, 12))
    assert len(small) == 5 and {s.id for s in small} <= {s.id for s in large} and [s.id for s in large] == sorted(s.id for s in large)
    assert choose(samples) == tuple(samples) and choose(samples, 5, seed=4) != small
    assert {s.id for s in choose(samples[::-1], 5, seed=3)} == {s.id for s in small}
    with pytest.raises(ValueError, match='limit=-1'): choose(samples, -1)


def test_names_and_letters():
    assert (clip_of('videos/0a1b2c3d_0417_clip_010_0123_0131.mp4').source, clip_of('videos/0a1b2c3d_0417_clip_010_0123_0131.mp4').seconds) == ('0417', 8.)
    assert [letter_of(c) for c in ('A. x', 'b) x', ' C :x', 'Đ. x', '1. x', 'AB. x')] == ['A', 'B', 'C', '', '', ''] and body_of('A.  Cấm  rẽ. ') == 'Cấm rẽ'


# splits

def test_the_global_generator_is_left_alone():
    random.seed(7)
    before = random.getstate()
    split_samples([question(n) for n in range(20)])
    assert random.getstate() == before


@pytest.mark.parametrize('n', [0, 1, 2, 3, 10, 57])
@pytest.mark.parametrize('by', list(GROUPS))
def test_a_split_holds_every_sample_once(by, n):
    samples = [question(i, clip=i//3, drive=i//9) for i in range(n)]
    parts = split_samples(samples, by)
    assert sorted(s.id for part in parts.values() for s in part) == sorted(s.id for s in samples)
    groups = [{GROUPS[by](s) for s in part} for part in parts.values()]
    assert not groups[0] & groups[1]
    if len(groups[0] | groups[1]) > 1: assert parts['train'] and parts['val']


def _answers(gained_on_seen: float, gained_elsewhere: float) -> tuple[dict, dict, dict, set]:
    """Scores before and after on sixty clips of two questions, half of them trained on, and which gained what."""
    rng = random.Random(0)
    clip = {f'q{i}': f'clip{i//2:02}' for i in range(120)}
    known = {f'clip{i:02}' for i in range(30)}
    before = {i: float(rng.random() < .4) for i in clip}
    after = {i: max(v, float(rng.random() < (gained_on_seen if clip[i] in known else gained_elsewhere))) for i, v in before.items()}
    return before, after, clip, known


def test_a_leak_is_worth_what_is_gained_more_on_clips_that_were_trained_on():
    before, after, clip, known = _answers(.8, .1)
    *_, gain = leak_worth(before, after, clip, known)
    means = [sum(after[i] - before[i] for i in clip if (clip[i] in known) == seen)/60 for seen in (True, False)]
    assert (gain.seen.value, gain.new.value, gain.more.value) == pytest.approx((*means, means[0] - means[1])) and gain.more.lo > 0
    assert (gain.seen.n, gain.seen.n_clusters, gain.new.n_clusters) == (60, 30, 30)
    order = dict(reversed(list(after.items())))
    assert leak_worth(before, order, clip, known)[-1] == gain, 'the order of questions does not matter'


def test_an_equal_gain_everywhere_is_no_leak():
    before, after, clip, known = _answers(.5, .5)
    assert leak_worth(before, after, clip, known)[-1].more.lo < 0 < leak_worth(before, after, clip, known)[-1].more.hi


def test_without_one_kind_of_clip_nothing_is_compared():
    before, after, clip, known = _answers(.5, .5)
    for trained_on in ((), set(clip.values())):
        worth = leak_worth(before, after, clip, trained_on)
        assert [c.more.value for c in worth] == [None]*3 and 'one of the two has no questions' in repr(worth)
    assert len(leak_worth(None, after, clip, known)) == 1


def test_only_the_published_split_leaks_clips():
    drives = random.Random(0).choices(range(12), k=100)
    samples = [question(i, clip=i//3, drive=drives[i//3]) for i in range(300)]
    by = {x.by: x for x in leaks(samples)}
    assert by['sample'].questions[0] > 40 and by['video'].questions[0] == by['source'].questions[0] == 0
    assert by['video'].drives[0] > 0 and by['source'].drives[0] == 0
    assert all(abs(x.train - 240) <= 30 and x.train + x.val == 300 for x in by.values())


def test_shares_and_names_of_splits():
    assert split_indices(5, 1.)[1] == [] and split_indices(5, 0.)[0] == []
    with pytest.raises(ValueError, match='fraction=1.5'): split_indices(5, 1.5)
    with pytest.raises(ValueError, match='valid: sample, video, source'): split_samples([], 'drive')


# the check and the plan

def test_check_counts_and_opens_every_clip(tmp_path):
    items = [item(n, FOUR, n % 4, clip=n//2, drive=200 + n//4) for n in range(8)]
    root = make_root(tmp_path, items, [test_item(1)])
    for path in {i['video_path'] for i in items} | {test_item(1)['video_path']}:
        write_clip(root/FOLDER/path, [Image.new('RGB', (32, 18))] * 80, 10)
    report = check(root)
    assert report.ok and report.releases == {'train': 'unknown', 'public_test': 'unknown', 'private_test': 'absent'}
    found = {(r.split, r.what): r.found for r in report.rows}
    assert found['train', 'samples'] == 8 and found['train', 'clips'] == 4 and found['train', 'drives'] == 2 and found['train', 'length fits the name'] == '4 of 4'
    assert found['train', 'answers'] == 'A: 2, B: 2, C: 2, D: 2' and found['train', 'size and rate'] == '32x18, 10 frames/s (4)'
    (root/FOLDER/items[0]['video_path']).write_bytes(b'')
    (root/FOLDER/items[2]['video_path']).unlink()
    report = check(root)
    assert not report.ok and Counter(p.label for p in report.problems if p.dropped) == {'bad_video': 1, 'missing_video': 1}


def test_check_without_clips_or_without_train(tmp_path):
    report = check(make_root(tmp_path/'a', [item(1)]))
    assert report.ok and any('absent' in str(r.found) for r in report.rows if r.what == 'videos')
    assert not check(make_root(tmp_path/'b', public=[test_item(1)])).ok


def test_expected_counts_add_up():
    for split, counts in expected_counts().items():
        assert sum(counts['choices'].values()) == counts['samples'], split
    train = expected_counts()['train']
    assert sum(train['answers'].values()) == sum(train['support marks'].values()) == train['samples']
    assert len(split_indices(train['samples'])[1]) == train['leak of the published split']['questions'][1]
    assert set(count([question(1)])) == set(train)


def test_the_plan_fetches_nothing(tmp_path):
    rows = plan(make_root(tmp_path, [item(1)]))
    assert [r.state for r in rows if r.path == 'train/train.json'] == ['differs'] and all(r.licence for r in rows)
    told = []
    with pytest.raises(DownloadError, match='not fetched by this program'): get('questions', tmp_path, accept_licence=True, show=told.append)
    assert 'forbid' in told[0] and json.dumps(told)


def test_the_commands_check_plan_and_refuse_to_fetch(tmp_path):
    root = str(make_root(tmp_path, [item(1), item(2, answer='C. Khác')]))
    checked, planned, got, drawn = (CliRunner().invoke(data_app, [name, 'roadbuddy', '--root', root]) for name in ('check', 'plan', 'get', 'frames'))
    assert checked.exit_code == 1 and 'NOT PASSED' in checked.output and 'answer_not_offered' in checked.output
    assert planned.exit_code == 0 and 'train/train.json' in planned.output and 'differs' in planned.output
    assert isinstance(got.exception, DownloadError) and 'forbid' in got.output
    assert isinstance(drawn.exception, ValueError) and 'no such command for roadbuddy' in str(drawn.exception)
