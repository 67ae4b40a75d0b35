"""FitCoach's data: clocks, spans, windows, features on disk, archives; every odd case and every way in which a file can be bad."""
import json
import re
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from vlm_repro.cli_data import check_text
from vlm_repro.core.download import DownloadError
from vlm_repro.core.jsonl import DataError, Problem
from vlm_repro.core.tasks import make_settings
from vlm_repro.core.video import write_clip
from vlm_repro.fitcoach.annotations import RecordError, challenge_of, questions_of, session_of
from vlm_repro.fitcoach.archive import in_order, join, unpack_tar, verify
from vlm_repro.fitcoach.check import check, expected_counts
from vlm_repro.fitcoach.clock import clock_facts, read_clock, seconds_of, usable_frames
from vlm_repro.fitcoach.data import FOLDERS, LABELS, WATERMARK, load, load_short
from vlm_repro.fitcoach.download import get, plan
from vlm_repro.fitcoach.features import GridMeans, NetExtractor, Source, extract_all, extract_in_processes, extract_video, made_of, note_of, open_features, plan_source
from vlm_repro.fitcoach.frames import frame_pixels, is_sideways, plan_steps, resize_bilinear
from vlm_repro.fitcoach.spans import Span, spans_of
from vlm_repro.fitcoach.task import task
from vlm_repro.fitcoach.windows import MODES, kept_features, published_windows, sliding_windows

START = 1_707_431_506
COACHING = ('Nice!', 'Lower!')
RLE = [('', 20), ('First up are squats!', 40), ('', 100), ('Nice!', 30), ('', 110), ('Moving on to armcrosschest!', 40), ('', 60), ('Lower!', 20), ('', 180), ("That's the end!", 20), ('', 4)]


def record(folder, id='0006', rle=RLE, fps=23.):
    "A session in the released form, its clock written."
    texts = [t for t, n in rle for _ in range(n)]
    times = START + np.arange(len(texts))/fps
    (folder/'long_range_videos').mkdir(parents=True, exist_ok=True)
    np.save(folder/f'long_range_videos/{id}_timestamps.npy', np.rint(times*1e9).astype(np.int64))
    first = [i for i, t in enumerate(texts) if t and (not i or texts[i - 1] != t)]
    return {'long_range_video_file': f'./long_range_videos/{id}.mp4', 'video_timestamps': f'./long_range_videos/{id}_timestamps.npy', 'feedbacks': texts,
            'feedback_timestamps': [float(times[i]) + 28_800 for i in first], 'is_transition': [texts[i] not in COACHING for i in first]}


def root_with(tmp_path, *changes, split='test'):
    "A data root with one session a change."
    folder = tmp_path/FOLDERS[split]
    held = [record(folder, f'{6 + i:04d}') | change for i, change in enumerate(changes or ({},))]
    (folder/LABELS).write_text(json.dumps(held))
    return tmp_path


def labels(data):
    return Counter(p.label for p in data.problems)


# clocks

def test_the_two_clocks_meet_after_eight_hours(tmp_path):
    (sample, _) = load(root_with(tmp_path)).samples
    times = read_clock(tmp_path/FOLDERS['test']/sample.meta['clock'])
    assert float(sample.meta['start']) == times[20] and abs(json.loads(sample.meta['seconds'])[0] - times[160]) < 1e-3


def test_the_rate_of_the_header_is_never_used(tmp_path):
    write_clip(tmp_path/'0150.mp4', [np.full((36, 64, 3), k, np.uint8) for k in range(46)], 30)
    np.save(tmp_path/'0150_timestamps.npy', ((START + np.arange(46)/23)*1e9).astype(np.int64))
    steps = plan_source(Source('0150', tmp_path/'0150.mp4', tmp_path/'0150_timestamps.npy', tmp_path/'f.npy', tmp_path/'t.npy', False))
    assert abs(float(np.ptp(steps.times)) - (len(steps.times) - 1)/4) < .1


@pytest.mark.parametrize('held, words', [
    (np.array([[1., 2.]]), 'one number a frame'), (np.array([]), 'one number a frame'), (np.array(['a']), 'one number a frame'),
    (np.array([START*1e9, np.nan]), 'time of frame 1 is nan'), (np.array([START*1e9, START*1e9 - 5e8]), 'frame 1 is 500000000'), (np.array([float(START), START + 1.]), 'not nanoseconds since 1970 but seconds'),
    (np.array([START, START + 1])*10**3, 'but milliseconds'), (np.array([START, START + 1])*10**6, 'but microseconds'), (np.full(3, START*10**9), 'stands still')])
def test_what_is_no_clock_is_refused(tmp_path, held, words):
    np.save(tmp_path/'0006_timestamps.npy', held)
    with pytest.raises(DataError, match=words): read_clock(tmp_path/'0006_timestamps.npy')


def test_a_missing_or_pickled_clock_is_refused(tmp_path):
    with pytest.raises(DataError, match='no such clock'): read_clock(tmp_path/'0006_timestamps.npy')
    np.save(tmp_path/'p.npy', np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match='not an .npy file of numbers'): read_clock(tmp_path/'p.npy')
    with pytest.raises(ValueError, match='valid: nanoseconds, seconds'): read_clock(tmp_path/'p.npy', 'hours')


def test_a_clock_of_another_video_is_refused():
    with pytest.raises(DataError, match='belongs to another video'): usable_frames(100, 101, '0006')
    assert usable_frames(101, 100, '0006')[1].label == 'short_video' and usable_frames(100, 100, '0006')[1] is None


def test_facts_of_a_clock():
    facts = clock_facts(seconds_of(np.array([0, 4e7, 4e7, 2e8])))
    assert facts.frames == 4 and facts.repeated == 1 and abs(facts.longest - .16) < 1e-9 and abs(facts.fps - 15) < 1e-6
    assert clock_facts(np.array([5.])).fps == 0


# frames

def test_a_video_too_short_for_a_step_has_none():
    assert len(plan_steps(np.arange(3)/25, 3).groups) == 0 and len(plan_steps(np.zeros(0), 0).times) == 0


def test_who_was_filmed_sideways():
    assert [is_sideways(f'{n:04d}.mp4') for n in (1, 145, 146, 214)] == [True, True, False, False]
    with pytest.raises(DataError, match='upright=True'): is_sideways('squats.mp4')


def test_pixels_of_a_turned_frame():
    image = np.zeros((360, 640, 3), np.uint8)
    image[:, :40] = 255
    assert frame_pixels(image).shape == frame_pixels(image, True).shape == (3, 224, 160) and frame_pixels(image, True).max() == 1
    assert (resize_bilinear(image, 360, 640) == image).all()


# spans and windows

@pytest.mark.parametrize('texts, kept', [([], 0), ([''], 0), (['a'], 1), (['a', 'a', 'b'], 2), (['a', '', 'a'], 2)])
def test_spans(texts, kept):
    assert len(spans_of(texts)) == kept


def test_a_silent_window_moves_nothing():
    times = np.arange(1000)/10
    spans = [Span('a', 5, 9), Span('b', 650, 660), Span('c', 900, 910)]
    assert [c.texts for c in sliding_windows(spans, times, 20)] == [('a',), (), (), ('b',), ('c',)]
    assert [c.texts for c in published_windows(spans, times, 20)] == [('a',), ('b',), ('c',)]
    with pytest.raises(DataError, match='no rate'): sliding_windows(spans, np.zeros(1000))
    with pytest.raises(DataError, match='no frame'): sliding_windows(spans, times, .01)


def test_windows_cover_the_workout_and_share_no_feedback():
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(50, 900))
        times, first = np.cumsum(rng.uniform(.03, .06, n)), np.sort(rng.choice(n - 3, int(rng.integers(0, 12)), replace=False))
        clips = sliding_windows([Span(str(i), int(f), int(f) + 2, float(times[f])) for i, f in enumerate(first)], times, float(rng.uniform(2, 20)))
        assert clips[0].start == times[0] and clips[-1].end == times[-1] and [t for c in clips for t in c.texts] == [str(i) for i in range(len(first))]
        assert all(a.end == b.start for a, b in zip(clips, clips[1:]))


def test_features_of_a_clip_at_its_bounds():
    assert kept_features(np.arange(5.), 1., 3.).tolist() == [2, 3] and kept_features(np.arange(5.), 1., None).tolist() == [2, 3, 4] and len(kept_features(np.arange(5.), None, 2.)) == 5


# records

@pytest.mark.parametrize('change, label', [
    ({'feedback_timestamps': [1.]}, 'spans_differ'), ({'is_transition': [True]}, 'spans_differ'), ({'feedbacks': 'x'}, 'no_feedbacks'), ({'feedbacks': [1]}, 'bad_feedbacks'),
    ({'feedback_timestamps': [None]*5}, 'bad_feedback_timestamps'), ({'is_transition': [1]*5}, 'bad_is_transition'), ({'video_timestamps': '/etc/x.npy'}, 'path_leaves_root'),
    ({'long_range_video_file': ''}, 'no_long_range_video_file'), ({'video_timestamps': './nowhere.npy'}, 'bad_clock'), ({'long_range_video_file': './long_range_videos/0006.mp4'}, 'duplicate')])
def test_records_that_contradict_themselves_are_left_out_and_named(tmp_path, change, label):
    data = load(root_with(tmp_path, {}, change))
    assert {s.meta['video'] for s in data.samples} == {'0006'} and labels(data)[label] == 1 and data.identity['left_out'] == 1
    with pytest.raises(DataError, match=label): load(tmp_path, strict=True)


@pytest.mark.parametrize('move, why', [(lambda t: t + 28_800*10**9, '8.0 h. before'), (lambda t: t//10**3, 'microseconds'), (lambda t: t*0 + t[0], 'stands still'), (lambda t: t + 4*10**9, '4.00 s')])
def test_a_session_whose_clock_was_moved_is_left_out_and_named(tmp_path, move, why):
    root = root_with(tmp_path, {}, {})
    path = root/FOLDERS['test']/'long_range_videos/0007_timestamps.npy'
    np.save(path, move(np.load(path)))
    for mode in MODES:
        data = load(root, mode=mode)
        (left,) = [p for p in data.problems if p.dropped]
        assert {s.meta['video'] for s in data.samples} == {'0006'} and left.label == 'bad_clock' and re.search(why, left.detail) and data.identity['left_out'] == 1


def test_time_stamps_that_were_moved_leave_their_session_out(tmp_path):
    held = record(tmp_path/FOLDERS['test'], '0007')['feedback_timestamps']
    data = load(root_with(tmp_path, {}, {'feedback_timestamps': [t - 28_800 for t in held]}))
    assert {s.meta['video'] for s in data.samples} == {'0006'} and labels(data)['bad_clock'] == 1
    data = load(root_with(tmp_path, {}, {'feedback_timestamps': [held[0] - 28_800, *held[1:]]}))
    assert {s.meta['video'] for s in data.samples} == {'0006', '0007'} and labels(data)['far_timestamps'] == 1


@pytest.mark.parametrize('window', [float('nan'), float('inf'), 0., -1.])
def test_a_window_that_is_no_time_is_refused(tmp_path, window):
    with pytest.raises(ValueError, match='give seconds above 0'): load(root_with(tmp_path), mode='full_workout_sliding_window', window=window)
    with pytest.raises(ValueError, match='window='): make_settings(task, {'mode': 'full_workout_sliding_window', 'window': window})


def test_a_feedback_beyond_the_clock_is_refused(tmp_path):
    root = root_with(tmp_path)
    np.save(root/FOLDERS['test']/'long_range_videos/0006_timestamps.npy', ((START + np.arange(100)/23)*1e9).astype(np.int64))
    with pytest.raises(DataError, match='not of one video'): load(root)


def test_odd_sessions_are_used_and_named(tmp_path):
    folder = tmp_path/FOLDERS['test']
    silent = [(t if t not in COACHING else '', n) for t, n in RLE]
    held = [record(folder, '0006', [(t + ' ' if t == 'Nice!' else t, n) for t, n in RLE[:-1]]) | {'is_transition': [True, False, True, False, True]}, record(folder, '0089', silent)]
    held[0]['feedback_timestamps'][1] += 3
    (folder/LABELS).write_text(json.dumps(held))
    data = load(tmp_path)
    assert labels(data) == {'odd_blanks': 1, 'odd_exercises': 2, 'open_at_end': 1, 'far_timestamps': 1, 'no_feedback': 1} and not any(p.dropped for p in data.problems)
    assert [s.gold for s in data.samples] == ['["Nice! "]', '["Lower!"]'] and data.samples[1].question == 'deltoid stretch'


def test_modes(tmp_path):
    root = root_with(tmp_path)
    (whole,), (slid,) = load(root, mode='full_workout').samples, load(root, mode='full_workout_sliding_window', window=10).samples
    assert whole.id == slid.id == '0006' and len(json.loads(whole.gold)) == 5 and slid.gold == whole.gold and slid.meta['seconds'] == whole.meta['seconds']
    windows = json.loads(slid.meta['windows'])
    assert len(windows) > 1 and windows[0][0] == float(whole.meta['start']) and windows[-1][1] == float(whole.meta['end'])
    assert [end for _, end in windows[:-1]] == [start for start, _ in windows[1:]]
    with pytest.raises(ValueError, match='mode'): load(root, mode='both')


def test_blanks_in_an_announcement_are_no_part_of_the_exercise(tmp_path):
    folder = tmp_path/FOLDERS['train']
    odd = [({'First up are squats!': 'First  up are squats!  '}.get(t, t), n) for t, n in RLE]
    held = record(folder, '0300', odd) | {'is_transition': [True, False, True, False, True]}
    (folder/LABELS).write_text(json.dumps([held]))
    data = load(tmp_path, 'train')
    assert data.samples[0].question == data.samples[0].meta['exercise'] == json.loads(data.samples[0].meta['exercises'])[0] == 'squats'


def test_an_unknown_split_is_not_the_training_one(tmp_path):
    root = root_with(tmp_path, split='train')
    with pytest.raises(ValueError, match='valid: test, train, competition'): load(root, 'val')
    with pytest.raises(DataError, match='QEVD-FIT-COACH-Benchmark'): load(root, 'test')
    assert len(load(root, 'train').samples) == 2


@pytest.mark.parametrize('text, words', [('[', 'not JSON'), ('{}', 'a list was expected'), ('[]', 'its list is empty'), ('\udcff', 'not UTF-8')])
def test_a_file_that_is_none(tmp_path, text, words):
    root = root_with(tmp_path)
    (root/FOLDERS['test']/LABELS).write_text(text, errors='surrogateescape')
    with pytest.raises(DataError, match=words): load(root)


def test_the_competition_has_seconds_and_no_labels(tmp_path):
    folder = tmp_path/FOLDERS['competition']
    (folder/'long_range_videos').mkdir(parents=True)
    np.save(folder/'long_range_videos/0300_timestamps.npy', np.arange(600)/10)
    held = {'long_range_video_file': './long_range_videos/0300.mp4', 'video_timestamps': './long_range_videos/0300_timestamps.npy', 'exercises': ['squats', 'pushups'],
            'exercise_start_timestamps': [0., 30.], 'exercise_end_timestamps': [30., 31.]}
    (folder/'private.json').write_text(json.dumps([held]))
    data = load(tmp_path, 'competition')
    assert [(s.question, s.gold, s.meta['end']) for s in data.samples] == [('squats', '[]', '30.0'), ('pushups', '[]', '59.9')]
    with pytest.raises(RecordError, match='bounds_differ'): challenge_of({**held, 'exercises': ['squats']})
    (folder/'private.json').write_text(json.dumps([held, {**held, 'exercise_start_timestamps': [900., 930.], 'exercise_end_timestamps': [930., 960.]}]))
    assert labels(load(tmp_path, 'competition')) == {'bad_clock': 1}


def test_short_clips(tmp_path):
    (tmp_path/'questions.json').write_text(json.dumps([{'video_path': './1.mp4', 'split': 'train', 'high_level': {'query': ['a'], 'response': ['b'], 'query_type': ['c']}}, {'video_path': './2.mp4', 'split': 'dev'}, 3]))
    clips, odd = load_short(tmp_path, 'questions.json')
    assert clips[0].answers == ('b',) and [p.label for p in odd] == ['bad_split', 'bad_record']
    with pytest.raises(RecordError, match='1 questions, 0 answers'): questions_of({'video_path': './1.mp4', 'split': 'train', 'fine_grain': {'query': ['a'], 'response': [], 'query_type': ['c']}})
    with pytest.raises(DataError, match='no fine_grained_labels.json'): load_short(tmp_path, 'fine_grained_labels.json')


def test_a_world_is_watermarked(tmp_path):
    root = root_with(tmp_path)
    (root/'world.json').write_text('{}')
    assert load(root).watermark == WATERMARK and load(root).identity['release'] == 'world'


# features

class Remembers(GridMeans):
    "Mixes each step with the three before, so that an error of resuming shows."
    name, memory = 'remembers', 3

    def reset(self):
        self.before = np.zeros((3, 6, 7, 5), np.float32)

    def __call__(self, pixels):
        now = np.repeat(pixels.reshape(len(pixels), 4, 3, 7, 32, 5, 32).mean((1, 4, 6)), 2, 1)
        held = np.concatenate([self.before, now])
        self.before = held[-3:]
        return held[3:] + .5*held[2:-1] + .25*held[1:-2] + .125*held[:-3]


@pytest.fixture(scope='module')
def film(tmp_path_factory):
    home = tmp_path_factory.mktemp('film')
    y, x = np.mgrid[:36, :64]
    write_clip(home/'0150.mp4', [np.stack([(x*3 + 5*k) % 256, (y*5 + k) % 256, (x + 9*k) % 256], -1).astype(np.uint8) for k in range(80)], 30)
    np.save(home/'0150_timestamps.npy', ((START + np.arange(80)/24)*1e9).astype(np.int64))
    return home


def source(film, out, name='0150'):
    return Source(name, film/'0150.mp4', film/'0150_timestamps.npy', out/f'{name}_features.npy', out/f'{name}_timestamps.npy', False)


@pytest.mark.parametrize('stop', [1, 3, 6])
def test_an_interrupted_extraction_goes_on_and_gives_the_same_features(film, tmp_path, stop):
    class Switched(Remembers):
        calls = 0

        def __call__(self, pixels):
            self.calls += 1
            if self.calls > stop: raise KeyboardInterrupt
            return super().__call__(pixels)
    whole, cut = source(film, tmp_path/'a'), source(film, tmp_path/'b')
    extract_video(whole, Remembers(), 100)
    with pytest.raises(KeyboardInterrupt): extract_video(cut, Switched(), 2)
    assert made_of(cut.features).done == 2*(stop - 1)
    with pytest.raises(DataError, match='steps are extracted'): open_features(cut.features, whole.times)
    told = []
    extract_video(cut, Remembers(), 2, lambda *x: told.append(x))
    assert np.array_equal(np.load(whole.features), np.load(cut.features)) and told[0][1] == 2*stop and told[-1][1] == told[-1][2]


def test_features_are_mapped_and_a_clip_reads_its_own(film, tmp_path):
    held = source(film, tmp_path)
    made = extract_video(held, GridMeans())
    features = open_features(held.features, held.times, (6, 7, 5), made.digest)
    assert isinstance(features.maps, np.memmap) and features.take(np.array([2, 3])).shape == (2, 6, 7, 5) and features.take(np.array([], int)).shape == (0, 6, 7, 5)


def test_features_of_another_extractor_are_refused_and_made_anew(film, tmp_path):
    held = source(film, tmp_path)
    extract_video(held, GridMeans())
    with pytest.raises(DataError, match='another extractor'): open_features(held.features, held.times, (1280, 7, 5))
    with pytest.raises(DataError, match='mean nothing to it'): open_features(held.features, held.times, (6, 7, 5), 'f'*16)
    other = GridMeans()
    other.digest = 'f'*16
    assert [x.state for x in extract_all([held], GridMeans())] == ['there'] and [x.state for x in extract_all([held], other)] == ['made'] and made_of(held.features).digest == 'f'*16


def test_bad_features_are_named(film, tmp_path):
    held = source(film, tmp_path)
    extract_video(held, GridMeans())
    with pytest.raises(DataError, match='extract them first'): open_features(tmp_path/'0151_features.npy', held.times)
    maps = np.load(held.features)
    np.save(tmp_path/'nan_features.npy', np.where(np.arange(len(maps)).reshape(-1, 1, 1, 1) == 1, np.nan, maps))
    with pytest.raises(DataError, match='step 1 of the features holds NaN'): open_features(tmp_path/'nan_features.npy', held.times).take(np.arange(3))
    np.save(tmp_path/'s.npy', np.load(held.times)[:-1])
    with pytest.raises(DataError, match='features and .* times'): open_features(held.features, tmp_path/'s.npy')
    held.features.write_bytes(held.features.read_bytes()[:200])
    with pytest.raises(DataError, match='not an .npy file of numbers'): open_features(held.features, held.times)
    note_of(held.features).write_text('{')
    with pytest.raises(DataError, match='not JSON'): made_of(held.features)


def test_an_extractor_that_gives_no_numbers_is_stopped(film, tmp_path):
    class Broken(GridMeans):
        def __call__(self, pixels): return super().__call__(pixels)*np.nan
    assert 'gives NaN' in [x for x in extract_all([source(film, tmp_path)], Broken())][0].detail


def test_bad_videos_do_not_stop_the_others(film, tmp_path):
    good, lost = source(film, tmp_path), replace(source(film, tmp_path, '0151'), video=film/'0151.mp4')
    np.save(tmp_path/'short.npy', ((START + np.arange(20)/24)*1e9).astype(np.int64))
    longer = replace(source(film, tmp_path, '0152'), clock=tmp_path/'short.npy')
    found = list(extract_all([lost, longer, good], GridMeans()))
    assert [x.state for x in found] == ['failed', 'failed', 'made'] and 'belongs to another video' in found[1].detail


@pytest.mark.slow
def test_the_real_network_goes_on_where_it_stopped(film, tmp_path):
    torch = pytest.importorskip('torch')
    from vlm_repro.fitcoach.cnn import FitnessCNN, narrow
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = FitnessCNN(narrow(1/16), 12)
    whole, cut = source(film, tmp_path/'a'), source(film, tmp_path/'b')
    made = extract_video(whole, NetExtractor(net, (12, 7, 5)), 5)
    extract_video(cut, NetExtractor(net, (12, 7, 5)), 4)
    maps = np.load(cut.features, mmap_mode='r+')
    maps[12:] = 0
    maps.flush()
    note_of(cut.features).write_text(json.dumps({**json.loads(note_of(cut.features).read_text()), 'done': 12}))
    assert extract_video(cut, NetExtractor(net, (12, 7, 5)), 7) == made
    held = [np.load(s.features) for s in (whole, cut)]
    assert np.abs(held[0] - held[1]).max() < 1e-5 and held[0][12:].std() > 0 and NetExtractor(FitnessCNN(narrow(1/16), 12), (12, 7, 5)).digest != made.digest


@pytest.mark.slow
def test_several_processes_share_the_videos(film, tmp_path):
    sources = [source(film, tmp_path, f'{150 + i:04d}') for i in range(4)]
    told = []
    found = extract_in_processes(sources, 'vlm_repro.fitcoach.features:GridMeans', nproc=2, progress=lambda *x: told.append(x))
    assert [x.name for x in found] == [s.name for s in sources] and all(x.state in ('made', 'there') for x in found)
    assert len({np.load(s.features).tobytes() for s in sources}) == 1 and told[-1] == (4*13, 4)


def test_a_factory_must_be_named():
    with pytest.raises(ValueError, match='module:name'): extract_in_processes([], 'GridMeans')


# archives

@pytest.fixture
def parts(tmp_path):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path/'whole', 'w') as z:
        for k in range(12): z.writestr(f'data/{k}', rng.bytes(700))
    data = (tmp_path/'whole').read_bytes()
    size = -(-len(data)//6)
    found = [tmp_path/f'state_dict.pth.tar.{k:02d}' for k in range(6)]
    for k, path in enumerate(found): path.write_bytes(data[k*size:(k + 1)*size])
    return found


def test_six_parts_are_joined(parts, tmp_path):
    assert verify(parts) == 'zip' and join(in_order(parts[::-1]), tmp_path/'out/whole').read_bytes() == (tmp_path/'whole').read_bytes()
    with pytest.raises(DataError, match='one is missing'): in_order(parts[:3] + parts[4:])


@pytest.mark.parametrize('k', range(6))
def test_a_corrupt_part_is_named(parts, tmp_path, k):
    held = bytearray(parts[k].read_bytes())
    held[len(held)//2] ^= 255
    parts[k].write_bytes(held)
    with pytest.raises(DataError, match='state_dict.pth.tar.') as e: join(parts, tmp_path/'out')
    assert parts[k].name in str(e.value) and not (tmp_path/'out').exists()


@pytest.mark.parametrize('k', range(6))
def test_a_corrupt_part_of_a_tar_is_named(parts, tmp_path, k):
    with tarfile.open(tmp_path/'whole.tar', 'w', format=tarfile.GNU_FORMAT) as tar: tar.add(tmp_path/'whole', 'state_dict.pth')
    data = (tmp_path/'whole.tar').read_bytes()
    data = data[:data.rindex(b'PK') + 600]
    size = -(-len(data)//6)
    for i, path in enumerate(parts): path.write_bytes(data[i*size:(i + 1)*size])
    assert verify(parts) == 'tar'
    held = bytearray(parts[k].read_bytes())
    held[len(held)//2:len(held)//2 + 60] = bytes(60)
    parts[k].write_bytes(held)
    with pytest.raises(DataError, match=parts[k].name): verify(parts)


def test_a_tar_of_files_without_checksums_says_so(tmp_path):
    (tmp_path/'label2int.json').write_text('{"localized": {}}')
    with tarfile.open(tmp_path/'m.tar', 'w') as tar: tar.add(tmp_path/'label2int.json', 'label2int.json')
    assert verify([tmp_path/'m.tar']) == 'tar, by its headers'


def test_a_joined_file_of_the_right_size_and_other_bytes_is_not_kept(parts, tmp_path):
    good = (tmp_path/'whole').read_bytes()
    (tmp_path/'out').write_bytes(b'0'*len(good))
    assert join(parts, tmp_path/'out').read_bytes() == good
    before = (tmp_path/'out').stat().st_mtime_ns
    assert join(parts, tmp_path/'out').stat().st_mtime_ns == before
    with pytest.raises(DataError, match='another checksum'): join(parts, tmp_path/'out', {parts[0].name: 'sha256:' + '0'*64})


def test_cut_missing_and_swapped_parts(parts):
    with pytest.raises(DataError, match='parts are not in order'): verify([parts[1], parts[0], *parts[2:]])
    with pytest.raises(DataError, match='no such part'): verify([*parts[:5], parts[5].with_name('x.06')])
    parts[5].write_bytes(parts[5].read_bytes()[:-30])
    with pytest.raises(DataError, match='state_dict.pth.tar.05'): verify(parts)
    parts[2].write_bytes(b'')
    with pytest.raises(DataError, match='an empty part'): verify(parts)


def test_an_archive_that_is_none(tmp_path):
    (tmp_path/'m.tar.gz').write_bytes(b'<html>' + b' '*600)
    with pytest.raises(DataError, match='damaged'): unpack_tar(tmp_path/'m.tar.gz', tmp_path/'x')
    with pytest.raises(DataError, match='neither a zip nor a tar'): verify([tmp_path/'m.tar.gz'])
    with pytest.raises(DataError, match='no such archive'): unpack_tar(tmp_path/'n.tar.gz', tmp_path/'x')


# the folder

def test_check_compares_with_the_release(tmp_path):
    report = check(root_with(tmp_path))
    found = {r.what: (r.found, r.expected) for r in report.rows}
    assert not report.ok and found['videos'] == (1, 74) and found['clips'] == (2, 398) and found['features'][0].startswith('0 of 1') and 'absent' in found['videos on disk'][0]
    assert 'NOT PASSED' in check_text(report) and expected_counts()['test']['spans'] == 518 + 1993


def test_the_plan_and_what_is_not_fetched(tmp_path):
    assert {r.state for r in plan(tmp_path)} == {'missing'} and len(plan()) == 6
    told = []
    with pytest.raises(DownloadError, match='in a browser'): get('benchmark', tmp_path, show=told.append)
    assert len(told) == 1


def test_a_problem_reads_as_a_sentence(tmp_path):
    (problem,) = [p for p in load(root_with(tmp_path, {}, {'is_transition': []})).problems if p.dropped]
    assert isinstance(problem, Problem) and '5 feedbacks and 0 marks' in str(problem)
    with pytest.raises(RecordError): session_of({})
