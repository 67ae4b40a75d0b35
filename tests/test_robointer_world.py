"The rendered RoboInter world: its files are the release's, and its answers are in the pixels."
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vlm_repro.robointer.coordinates import COPIES, Frame, agree, box_of, smart_resize, trace_of
from vlm_repro.robointer.data import TASKS, load
from vlm_repro.robointer.questions import ask, texts_of
from vlm_repro.robointer.registry import named, registry
from vlm_repro.robointer.scene import COLOURS, PHASES, contact_points, grasp_tip, gripper_box, moment, path, put, sample_episode
from vlm_repro.robointer.world import RELEASE, Size, build_world, episodes_of, world_digest

SIZE = Size(6, 4)


@pytest.fixture(scope='module')
def root(tmp_path_factory): return build_world(tmp_path_factory.mktemp('worlds')/'world', 3, SIZE, workers=1)


def test_same_seed_same_bytes(root, tmp_path):
    again = build_world(tmp_path/'again', 3, SIZE, workers=2)
    files = sorted(p.relative_to(root) for p in root.rglob('*') if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob('*') if p.is_file())
    assert all((root/f).read_bytes() == (again/f).read_bytes() for f in files)

def test_other_seed_other_episodes():
    assert not {e.name for e in episodes_of('val', 0)} & {e.name for e in episodes_of('val', 1)}
    assert world_digest(0, SIZE) != world_digest(1, SIZE)

def test_every_published_file_is_there(root):
    for n in registry().values():
        if not n.published: continue
        for copy in COPIES if n.copied else ('',): assert json.loads((root/RELEASE/n.annotations[0].format(copy=copy)).read_text()), n.name

@pytest.mark.parametrize('copy', COPIES)
def test_loader_reads_all_tasks(root, copy):
    data = load(root, 'all', copy)
    assert {s.meta['task'] for s in data.samples} == set(TASKS)
    assert not [p for p in data.problems if p.dropped or p.label == 'missing_image']
    assert data.watermark
    assert len({s.id for s in data.samples}) == len(data.samples)

def test_sizes_and_sources(root):
    data = load(root, 'current_box')
    for s in data.samples:
        size = Image.open(f'{data.frames}/{s.media[0].path}').size
        assert size == ((640, 480) if s.meta['source'] == 'rh20t' else (320, 180)) == (int(s.meta['w']), int(s.meta['h']))
        assert (int(s.meta['new_h']), int(s.meta['new_w'])) == smart_resize(size[1], size[0])
    assert Counter(s.meta['source'] for s in data.samples)['droid'] > 0

def test_copies_tell_the_same_places(root):
    for task in ('current_box', 'contact_point', 'traj'):
        held = {copy: load(root, task, copy).samples for copy in COPIES}
        for triple in zip(*held.values(), strict=True):
            places = []
            for s in triple:
                numbers = next(iter(json.loads(s.gold).values()))
                places.append(trace_of(numbers, Frame(s.meta['frame'], int(s.meta['w']), int(s.meta['h']))))
            assert agree(places[0], places[1]) and agree(places[0], places[2])

def test_oddities_of_the_release_occur(root):
    told = {p.label for p in load(root, 'all').problems}
    assert {'misspelt_role', 'gt_as_text', 'one_image_as_text', 'stale_path', 'unknown_field'} <= told

def test_task_stands_in_the_second_quotes(root):
    for s in load(root, 'current_box,final_box,traj').samples: assert s.question.split("'")[3].startswith('put the ')

def test_plans_show_eight_frames(root):
    for s in load(root, 'planning,planning_choice,planning_decide').samples: assert len(s.media) == 8

def test_box_is_where_the_colour_is(root):
    "The object that is asked about fills its box: found again in the stored file by its colour."
    data = load(root, 'current_box', 'origin_format')
    by_name, shares = {e.name: e for e in episodes_of('val', 3, SIZE)}, []
    for s in data.samples:
        episode = by_name[s.meta['record_id'].split('#')[0]]
        rgb = np.asarray(Image.open(f'{data.frames}/{s.media[0].path}').convert('RGB'), float)
        colour = np.array(COLOURS[episode.thing.colour], float)
        like = (rgb@colour)/np.linalg.norm(rgb, axis=-1)/np.linalg.norm(colour) > .985
        (x1, y1), (x2, y2) = json.loads(s.gold)['current_bbox']
        shares.append(like[int(y1):int(y2) + 1, int(x1):int(x2) + 1].sum()/like.sum())
    assert np.mean(shares) > .8, shares

@pytest.mark.parametrize('source', ['droid', 'rh20t'])
def test_rules_of_an_episode(source):
    for seed in range(30):
        e = sample_episode(np.random.default_rng(seed), source)
        grasp = moment(e, 'grasp')
        assert grasp.tip == grasp_tip(e.thing)
        assert np.allclose(path(e, 'wait')[-1], grasp.tip) and np.allclose(path(e, 'lift')[-1], moment(e, 'place').tip)
        assert np.allclose([moment(e, 'retreat').things[e.moved].x, moment(e, 'retreat').things[e.moved].y], [put(e.thing, e.target).x, put(e.thing, e.target).y])
        fingers, box = contact_points(e.thing), gripper_box(grasp.tip)
        assert all(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in fingers)
        for phase in PHASES:
            now = moment(e, phase)
            assert all(0 <= v for b in (gripper_box(now.tip), *(t.box for t in now.things)) for v in b), (seed, phase)
            assert all(b[2] <= e.width and b[3] <= 1 for b in (gripper_box(now.tip), *(t.box for t in now.things))), (seed, phase)

def test_wrong_letters_are_wrong():
    "The right letter is the only option that leads to the object."
    for seed in range(40):
        e = sample_episode(np.random.default_rng(seed), 'rh20t')
        q = ask('grounding_choice', e, np.random.default_rng(seed))
        name = q.text.removeprefix('Which box holds the ').split('?')[0]
        boxes = q.pictures[0].marks.boxes
        right = [i for i, b in enumerate(boxes) for t in e.things if t.name == name and b == t.box]
        assert ['ABCD'[i] for i in right] == [q.answer] and len(set(boxes)) == 4

def test_answer_of_a_copy_is_one_json_object():
    e = sample_episode(np.random.default_rng(1), 'droid')
    text, answer, truth = texts_of(ask('contact_box', e, np.random.default_rng(0)), e, 'resized')
    assert list(json.loads(answer)) == ['contact_bbox'] and json.loads(answer)['contact_bbox'] == truth
    assert not box_of(truth, Frame('resized', 320, 180)).inverted

def test_training_files_are_of_their_source(root):
    for name in ('droid_vla_current_box_train', 'rh20t_vla_current_box_train'):
        rows = json.loads((root/RELEASE/named(name).annotations[0].format(copy='origin_format')).read_text())
        assert rows and all(('RH20T' in r['id']) == name.startswith('rh20t') for r in rows)

def test_unknown_source():
    with pytest.raises(ValueError, match='choose one of'): sample_episode(np.random.default_rng(0), 'bridge')

def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path/'mine').write_text('x')
    with pytest.raises(FileExistsError): build_world(tmp_path, 0, SIZE)
