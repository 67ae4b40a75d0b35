"""The GPT4Scene world: official files that load, pictures in four arms, answers that follow from the meshes alone."""
import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image

from vlm_repro.gpt4scene.annotations import FILES
from vlm_repro.gpt4scene.attributes import read_attributes
from vlm_repro.gpt4scene.data import load
from vlm_repro.gpt4scene.images import is_bev
from vlm_repro.gpt4scene.proposals import read_mask3d
from vlm_repro.gpt4scene.rooms import COLOURS
from vlm_repro.gpt4scene.rows import sqa_type
from vlm_repro.gpt4scene.scanalign import open_scanalign
from vlm_repro.gpt4scene.scannet import read_objects, read_scene
from vlm_repro.gpt4scene.space import boxes
from vlm_repro.gpt4scene.views import make_views
from vlm_repro.gpt4scene.world import ANNOTATION, ARMS, CLASSES, DATA, IMAGES, MARKER, SCANS, Size, build_world, list_name, training_name, view_options

SMALL = Size(train_rooms=3, val_rooms=3, frames=4, recorded=8)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("worlds") / "world", 0, SMALL)


def held(root, name):
    return json.loads((root / ANNOTATION / name).read_text(encoding="utf-8"))


class Seen:
    "A room as its scan shows it: kinds from the labels, colours from the points, places from the boxes."

    def __init__(self, folder):
        scan = read_scene(folder)
        objects = read_objects(folder, scan)
        self.boxes = boxes(scan, objects).astype(float)
        paints = {name: np.array(rgb) / np.linalg.norm(rgb) for name, rgb in COLOURS.items()}
        self.things = []
        for mask, label in zip(objects.masks, objects.labels, strict=True):
            seen = scan.mesh.colours[mask].astype(float)
            vivid = seen[np.ptp(seen, axis=1) > 60]  # neither white nor wood
            mean = np.median(vivid if len(vivid) else seen, axis=0)
            self.things.append((max(paints, key=lambda n: paints[n] @ mean), label))
        self.n = sum(label not in ("wall", "floor", "ceiling") for label in objects.labels)
        self.names = [f"{c} {k}" for c, k in self.things[: self.n]]
        self.kinds = [k for _, k in self.things[: self.n]]
        self.places = self.boxes[: self.n, :2]

    def nearest(self, i):
        far = np.linalg.norm(self.places - self.places[i], axis=1)
        far[i] = np.inf
        return int(far.argmin())


@pytest.fixture(scope="module")
def seen(root):
    return {folder.name: Seen(folder) for folder in sorted((root / SCANS).iterdir())}


def named(room, plural):
    return "bookshelf" if plural == "bookshelves" else plural[:-1]


def answer_of(room, text):
    "The answer to a question, from what the scan shows."
    rules = {
        r"What color is the (\w+)\?": lambda k: room.names[room.kinds.index(k)].split()[0],
        r"What is the (\w+) object\?": lambda c: next(n for n in room.names if n.split()[0] == c).split()[1],
        r"How many (\w+) are in the room\?": lambda k: WORDS[room.kinds.count(named(room, k))],
        r"Is there a (\w+) in the room\?": lambda k: "yes" if k in room.kinds else "no",
        r"What is next to the (\w+ \w+)\?": lambda n: room.names[room.nearest(room.names.index(n))],
        r"Can I find a (\w+ \w+) here\?": lambda n: "yes" if n in room.names else "no",
        r"Are there more (\w+) than (\w+)\?": lambda a, b: "yes" if room.kinds.count(named(room, a)) > room.kinds.count(named(room, b)) else "no",
    }
    for pattern, rule in rules.items():
        if found := re.search(pattern, text):
            return rule(*found.groups())
    return None


def situated_answer(room, text):
    here, ahead = (room.names.index(n) for n in re.search(r"standing at the (\w+ \w+) and looking at the (\w+ \w+)\.", text).groups())
    if found := re.search(r"Is the (\w+ \w+) on my left", text):
        look, to = (room.places[i] - room.places[here] for i in (ahead, room.names.index(found[1])))
        return "left" if look[0] * to[1] - look[1] * to[0] > 0 else "right"
    if "closest to me" in text:
        return room.names[room.nearest(here)]
    if "What am I looking at" in text:
        return room.kinds[ahead]
    return answer_of(room, text)


def overlap(a, b):
    low, high = np.maximum(a[:3] - a[3:] / 2, b[:3] - b[3:] / 2), np.minimum(a[:3] + a[3:] / 2, b[:3] + b[3:] / 2)
    inside = np.prod(np.clip(high - low, 0, None))
    return inside / (np.prod(a[3:]) + np.prod(b[3:]) - inside)


def test_the_loader_takes_every_row_of_every_arm(root):
    total = sum(len(held(root, name)) for name in FILES.values())
    for arm, (_, bev) in ARMS.items():
        data = load(root, "all", list_name(arm, 4), strict=True)
        assert len(data.samples) == total and not data.problems and data.watermark
        assert all(len(s.media) == 4 + bev and is_bev(s.media[0]) == bev for s in data.samples)
    for name in FILES.values():
        assert [row["qid"] for row in held(root, name)] == list(range(len(held(root, name))))


def test_answers_to_questions_follow_from_the_scan(root, seen):
    checked = 0
    for task, answer in (("scanqa", answer_of), ("sqa3d", situated_answer)):
        for row in held(root, FILES[task]):
            wanted = answer(seen[row["scene_id"]], row["prompt"])
            assert wanted is not None, row["prompt"]
            digits = {w: str(n) for n, w in enumerate(WORDS)}
            assert wanted in row["ref_captions"] or digits.get(wanted) in row["ref_captions"], row
            checked += 1
    assert checked > 40
    assert all(row["sqa_type"] == sqa_type(row["prompt"].split(". ", 1)[1]) for row in held(root, FILES["sqa3d"]))


def meant(room, text):
    "The objects that a description is true of."
    text = re.search(r'"(.+)"', text)[1]
    if found := re.search(r"these are (\w+)", text):
        return {i for i, k in enumerate(room.kinds) if k == named(room, found[1])}
    if found := re.search(r"the objects are (\w+)", text):
        return {i for i, n in enumerate(room.names) if n.split()[0] == found[1]}
    if found := re.search(r"the only (\w+) in", text):
        return {i for i, k in enumerate(room.kinds) if k == found[1]}
    if found := re.match(r"the (\w+) is (\w+)", text):
        return {i for i, n in enumerate(room.names) if n == f"{found[2]} {found[1]}"}
    found = re.search(r"(?:this is|there is) a (\w+ \w+)", text)
    return {i for i, n in enumerate(room.names) if n == found[1]}


def test_descriptions_are_true_of_their_objects_and_of_no_other(root, seen):
    for row in held(root, FILES["scanrefer"]):
        assert meant(seen[row["scene_id"]], row["prompt"]) == {row["obj_id"]}
    kinds = set()
    for row in held(root, FILES["multi3dref"]):
        room, kind = seen[row["scene_id"]], row["eval_type"]
        targets = meant(room, row["prompt"])
        assert targets == set(row["ref_captions"])
        assert {0: kind.startswith("zt"), 1: kind.startswith("st")}.get(len(targets), kind == "mt")
        if kind.startswith("st"):
            assert (room.kinds.count(room.kinds[min(targets)]) > 1) == (kind == "st_w_d")
        if kind.startswith("zt"):
            assert any(k in row["prompt"] for k in room.kinds) == (kind == "zt_w_d")
        kinds.add(kind)
    assert kinds == {"zt_w_d", "zt_wo_d", "st_w_d", "st_wo_d", "mt"}
    lookup = held(root, "scanrefer_unique_multiple_lookup.json")
    for scene, room in seen.items():
        assert {int(i): v for i, v in lookup[scene].items()} == {i: int(room.kinds.count(k) > 1) for i, k in enumerate(room.kinds)}


def test_boxes_are_those_of_the_scan_and_proposals_meet_them_mostly(root, seen):
    true, found = (read_attributes(root / ANNOTATION / name) for name in ("scannet_val_attributes.pt", "scannet_mask3d_val_attributes.pt"))
    best = []
    for scene, room in seen.items():
        assert np.allclose(true[scene].boxes, room.boxes, atol=1e-4) and list(true[scene].names[: room.n]) == room.kinds
        folder = root / SCANS / scene
        scan = read_scene(folder)
        proposals = read_mask3d(folder / "mask3d" / f"{scene}.txt", len(scan.mesh.points), CLASSES)
        assert np.allclose(boxes(scan, proposals), found[scene].boxes, atol=1e-4) and proposals.labels == found[scene].names
        assert len(found[scene].boxes) == room.n + SMALL.false
        best += [max(overlap(p, t) for p in found[scene].boxes) for t in room.boxes[: room.n]]
    assert .6 <= np.mean(np.array(best) >= .5) <= 1 and min(best) < .95
    for row in held(root, FILES["scanrefer"]):
        named_id = int(re.fullmatch(r"<OBJ(\d{3})>\.", row["ref_captions"][0])[1])
        target = seen[row["scene_id"]].boxes[row["obj_id"]]
        assert named_id == np.argmax([overlap(p, target) for p in found[row["scene_id"]].boxes])
    for row in held(root, FILES["scan2cap"]):
        meets = overlap(found[row["scene_id"]].boxes[row["pred_id"]], seen[row["scene_id"]].boxes[row["obj_id"]])
        assert np.isclose(meets, row["iou"], atol=1e-3) and f"<OBJ{row['pred_id']:03d}>" in row["prompt"]


def test_captions_are_true_and_in_the_corpus(root, seen):
    corpus = held(root, "scan2cap_val_corpus.json")
    assert len(corpus) == sum(room.n for room in seen.values())
    for key, captions in corpus.items():
        scene, number = key.split("|")
        room = seen[scene]
        near = room.names[room.nearest(int(number))]
        assert len(captions) == 3 and all(c.startswith("sos ") and c.endswith(" eos") for c in captions)
        for c in captions:
            colour, kind = room.names[int(number)].split()
            assert colour in c and kind in c and c.endswith(f"{near}. eos")


def test_training_speaks_of_proposals_in_all_arms(root):
    answers = {}
    for arm, (marked, bev) in ARMS.items():
        rows = json.loads((root / DATA / training_name(arm, 4)).read_text())
        records = open_scanalign(root / DATA / training_name(arm, 4))
        assert len(records) == len(rows) > 60
        for row in rows:
            human, reply = row["conversations"]
            assert human["value"].count("<image>") == len(row["images"]) == 4 + bev
            assert all((root / DATA / p).is_file() for p in row["images"])
            assert all((("mark" in p) or ("with_text" in p)) == marked for p in row["images"])
            assert reply["value"].endswith(".") and (reply["value"][0].isupper() or reply["value"][:-1].isdecimal()) or reply["value"].startswith("<OBJ")
        answers[arm] = [row["conversations"][1]["value"] for row in rows]
    assert len({tuple(a) for a in answers.values()}) == 1
    texts = answers["mark_3D"]
    assert any(t == "No." for t in texts) and any(re.fullmatch(r"Yes\. <OBJ\d{3}> and <OBJ\d{3}>\.", t) for t in texts) and any(re.fullmatch(r"This is a \w+ \w+\. It is next to the \w+ \w+\.", t) for t in texts)
    train = {p.split("/")[1] for row in rows for p in row["images"]}
    assert not train & set(held(root, list_name("mark_3D", 4)))


def test_arms_differ_in_the_numbers_alone(root):
    with_marks, without = (held(root, list_name(arm, 4)) for arm in ("mark_3D", "3D"))
    for scene in with_marks:
        for a, b in zip(with_marks[scene], without[scene], strict=True):
            one, other = (np.asarray(Image.open(root / p), int) for p in (a, b))
            changed = (np.abs(one - other).max(-1) > 40).mean()
            assert one.shape == other.shape and 0 < changed < .25
        assert held(root, list_name("mark", 4))[scene] == with_marks[scene][1:]


def test_the_kept_scan_gives_the_pictures_again(root):
    scene, paths = next(iter(held(root, list_name("mark_3D", 4)).items()))
    folder = root / SCANS / scene
    scan = read_scene(folder)
    proposals = read_mask3d(folder / "mask3d" / f"{scene}.txt", len(scan.mesh.points), CLASSES)
    views = make_views(scan, proposals, view_options(SMALL))
    for path, view in zip(paths, (views.bev, *views.frames), strict=True):
        gap = np.abs(np.asarray(view.marked(), int) - np.asarray(Image.open(root / path), int))
        assert gap.mean() < 5, path


def test_a_world_is_the_same_everywhere_and_another_with_another_seed(root, tmp_path):
    one, two = Size(1, 1, 2, 2), Size(1, 1, 2, 2)
    digests = []
    for name, seed, size in (("a", 5, one), ("b", 5, two), ("c", 6, one)):
        made = build_world(tmp_path / name, seed, size)
        files = sorted(p for p in made.rglob("*") if p.is_file() and p.suffix != ".pt")
        digests.append(hashlib.sha256(b"".join(p.relative_to(made).as_posix().encode() + p.read_bytes() for p in files)).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(FileExistsError):
        build_world(tmp_path / "a", 6, one)
    with pytest.raises(ValueError, match="are to be shown"):
        Size(frames=32)
    assert (root / MARKER).is_file() and len(list((root / IMAGES).iterdir())) == 6


def test_more_frames_and_more_furniture_can_be_asked_for(tmp_path):
    made = build_world(tmp_path / "large", 1, Size(0, 1, 32, 40, least=9, most=10, false=3))
    paths = next(iter(held(made, list_name("mark_3D", 32)).values()))
    assert len(paths) == 33
    found = next(iter(read_attributes(made / ANNOTATION / "scannet_mask3d_val_attributes.pt").values()))
    assert len(found.boxes) >= 12  # marks with two digits
    assert len(load(made, "all", strict=True).samples) > 40
