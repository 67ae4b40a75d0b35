"""The mmWalk world: official format, gold that follows from the pictures, safe building, stand-in frames."""
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_repro.mmwalk.annotations import CATEGORIES, frame_paths
from vlm_repro.mmwalk.data import load
from vlm_repro.mmwalk.questions import ask_all
from vlm_repro.mmwalk.render import LABELS, draw_view
from vlm_repro.mmwalk.scene import ACTIONS, HAZARDS, LANDMARKS, SCENARIOS, WEATHERS, risk_level, sample_scene
from vlm_repro.mmwalk.world import ARCHIVE, MARKER, STAND_IN, Size, build_world, plan, render_frames, trajectory_weathers, world_frames

SMALL = Size(test_frames=2, train_frames=2, val_frames=1, train_trajectories=1)
NAME = re.compile(r"^(Busstop|Corner|Cross|Gasstation|Mixed|Parking|Plaza)\d{2}[ABC]?$")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("worlds") / "world", 0, SMALL)


def tuning(root):
    """Raw bytes of train and val."""
    with zipfile.ZipFile(root / "finetune_related" / ARCHIVE) as archive:
        assert archive.namelist() == ["train.jsonl", "val.jsonl"]
        return {name.split(".")[0]: archive.read(name) for name in archive.namelist()}


def test_test_records_have_the_official_shape(root):
    for category in CATEGORIES:
        data = (root / "test_data_chat" / f"{category}.jsonl").read_bytes()
        assert data.endswith(b"\n") and b"\r" not in data
        keys = []
        for line in data.decode().splitlines():
            record = json.loads(line)
            assert list(record) == ["conversation", "difficulty", "category"] and record["category"] == category
            assert record["difficulty"] == {"E": "Easy", "M": "Middle", "H": "Hard"}[category[0]]
            user, assistant = record["conversation"]
            assert [list(item) for item in user["content"]] == [["type", "image"]] * 4 + [["type", "text"]]
            paths = [item["image"] for item in user["content"][:4]]
            _, _, trajectory, _, _, frame = paths[0].split("/")
            assert paths == frame_paths(trajectory, frame.split(".")[0]) and NAME.match(trajectory)
            common, hint, question = user["content"][4]["text"].split("\n")
            assert question.startswith("Question: ") and question.count("Question:") == 1 and hint and common
            gold = assistant["content"][0]["text"]
            assert gold and gold == gold.strip()
            keys.append((trajectory, frame))
        assert keys == sorted(keys)


def test_tuning_records_have_the_official_shape(root):
    ids = []
    for data in tuning(root).values():
        assert data.endswith(b"\r\n") and data.count(b"\n") == data.count(b"\r\n")
        for line in data.decode().split("\r\n")[:-1]:
            record = json.loads(line)
            assert list(record) == ["id", "image", "conversations"]
            human, gpt = record["conversations"]
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            assert human["value"].startswith("<image> <image><image>\n") and human["value"].count("<image>") == 4 and human["value"].count("\n") == 2
            assert re.search(r"Question:\S", human["value"]) and not record["image"][0].startswith("..")
            ids.append(record["id"])
    assert len(set(ids)) == len(ids)
    assert len(set(range(max(ids) + 1)) - set(ids)) > 0, "test frames leave gaps in the ids"


def test_the_loader_reads_every_split_whole(root):
    splits = {split: load(root, split) for split in ("test", "train", "val")}
    marker = json.loads((root / MARKER).read_text())
    for split, data in splits.items():
        assert len(data.samples) == marker["questions"][split] and not [p for p in data.problems if p.dropped]
        assert data.watermark
    trajectories = {split: {sample.meta["trajectory"] for sample in data.samples} for split, data in splits.items()}
    assert not trajectories["test"] & trajectories["train"] and not trajectories["test"] & trajectories["val"] and not trajectories["train"] & trajectories["val"]
    assert {sample.meta["scenario"] for sample in splits["test"].samples} == set(SCENARIOS)
    assert "Cross" not in {sample.meta["scenario"] for sample in splits["val"].samples}
    truth = [question.category for frame in world_frames(0, SMALL) if frame.split == "train" for question in frame.questions]
    assert [sample.meta["category"] for sample in splits["train"].samples] == truth
    assert all((root / "QAFrames" / ref.path).is_file() for sample in splits["test"].samples for ref in sample.media)


def test_the_default_world_is_large_and_odd_enough():
    frames = list(world_frames())
    counts = Counter(question.category for frame in frames if frame.split == "test" for question in frame.questions)
    assert min(counts.values()) >= 40, counts
    sizes = Counter(len(frame.questions) for frame in frames)
    assert {8, 9, 10} <= set(sizes) and sizes[9] == max(sizes.values())
    golds = [(question.category, question.gold) for frame in frames for question in frame.questions]
    assert ("E1", "Forward.") in golds, "a gold that the hint does not list"
    assert any(category == "E2" and gold.startswith("Yes, ") for category, gold in golds)
    assert any("’" in gold for _, gold in golds)
    assert {walk.weather for walk in plan() if walk.split == "test"} == set(WEATHERS)


def test_building_twice_gives_the_same_bytes_and_another_seed_does_not(root, tmp_path):
    def digests(folder):
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}

    again = build_world(tmp_path / "again", 0, SMALL)
    assert digests(again) == digests(root)
    assert digests(build_world(tmp_path / "other", 1, SMALL)) != digests(root)


def test_gold_follows_from_what_is_drawn():
    rng = np.random.default_rng(3)
    for _ in range(25):
        scene = sample_scene(rng)
        view = draw_view(scene, "walker")
        shown = {number: int((view.instances == number).sum()) for number in range(1, len(scene.objects) + 1)}
        assert min(shown.values()) > 150, (scene, shown)
        labels = {LABELS[i] for i in np.unique(view.labels)}
        assert {placed.kind for placed in scene.objects} == labels & set(LANDMARKS)
        assert {f"hazard:{name}" for name in scene.hazards} >= {label for label in labels if label.startswith("hazard:")}
        for number, placed in enumerate(scene.objects, start=1):
            ys, xs = np.nonzero(view.instances == number)
            assert abs((xs.mean() + 0.5) / 400 * 360 - 180 - placed.bearing) < 16
            assert np.allclose(view.depth[ys, xs], placed.metres)


def test_every_hazard_shows_in_the_walkers_view():
    rng = np.random.default_rng(4)
    seen = Counter()
    for _ in range(120):
        scene = sample_scene(rng)
        labels = np.bincount(draw_view(scene, "walker").labels.ravel(), minlength=len(LABELS))
        for name in scene.hazards:
            seen[name, labels[LABELS.index(f"hazard:{name}")] > 60] += 1
    assert all(seen[name, True] > 9 * seen[name, False] for name in HAZARDS), seen


def test_risk_covers_the_rule():
    assert risk_level("sunny", []) == "low" and risk_level("rainy", []) == "low"
    assert risk_level("sunny", ["narrow path"]) == risk_level("cloudy", ["uneven road"]) == "moderate"
    assert risk_level("foggy", ["uneven road"]) == risk_level("sunny", ["barrier", "high obstacle"]) == "high"


def test_the_best_constant_answer_is_far_from_the_ceiling():
    rng = np.random.default_rng(5)
    golds = Counter((q.category, q.gold.split(" because")[0].split(",")[0]) for _ in range(500) for q in ask_all(sample_scene(rng), rng))
    totals = Counter()
    for (category, _), n in golds.items():
        totals[category] += n
    for category in ("E1", "E2", "E3", "H1"):
        assert max(n for (c, _), n in golds.items() if c == category) / totals[category] < 0.55
    assert len({gold for category, gold in golds if category == "E1"}) >= len(WEATHERS) + len(ACTIONS)


def test_depth_is_written_as_the_paper_writes_it(root):
    path = next(root.glob("QAFrames/*/walker/depth/*.png"))
    with Image.open(path) as image:
        assert image.mode.startswith("I;16") and image.size == (400, 225)
        depth = np.asarray(image)
    assert depth[0, 0] == 59392 and 256 < depth[-1, 0] < 3 * 256


def test_a_folder_with_other_files_is_left_alone(root, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="other files"):
        build_world(tmp_path / "mine")
    before = (root / MARKER).stat().st_mtime_ns
    assert build_world(root, 0, SMALL) == root and (root / MARKER).stat().st_mtime_ns == before


BUILD = "import sys; from vlm_repro.mmwalk.world import build_world, Size; build_world(sys.argv[1], 0, Size(2, 2, 1, 1))"


def start_build(target):
    return subprocess.Popen([sys.executable, "-c", BUILD, str(target)], stderr=subprocess.PIPE)


def test_two_processes_build_one_world(tmp_path, root):
    builds = [start_build(tmp_path / "shared") for _ in range(2)]
    for build in builds:
        _, errors = build.communicate(timeout=300)
        assert build.returncode == 0, errors.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
    assert len(list((tmp_path / "shared").rglob("*.png"))) == len(list(root.rglob("*.png")))


def test_a_killed_build_leaves_no_world(tmp_path):
    build = start_build(tmp_path / "killed")
    deadline = time.time() + 120
    while not list(tmp_path.glob(".killed-*/QAFrames/*/*/*/*.png")) and time.time() < deadline:
        time.sleep(0.02)
    build.send_signal(signal.SIGKILL)
    build.communicate(timeout=60)
    assert not (tmp_path / "killed").exists()
    assert (build_world(tmp_path / "killed", 0, SMALL) / MARKER).is_file()


def test_stand_in_frames_are_resumable_and_marked(tmp_path):
    wanted = frame_paths("Corner09A", 856, head="") + frame_paths("Corner09A", 860, head="")
    assert render_frames(tmp_path, wanted[:3], {"Corner09A": "night"}) == 3
    first = tmp_path / "QAFrames" / wanted[0]
    before = (first.stat().st_mtime_ns, first.read_bytes())
    assert render_frames(tmp_path, wanted, {"Corner09A": "night"}) == 5
    assert (first.stat().st_mtime_ns, first.read_bytes()) == before
    assert (tmp_path / STAND_IN).is_file() and not list(tmp_path.rglob(".part-*"))
    pictures = [np.asarray(Image.open(tmp_path / "QAFrames" / path)) for path in wanted if "rgb" in path]
    assert pictures[0][0].mean() < 60, "a night sky"
    assert not np.array_equal(pictures[0], pictures[3])


def test_stand_in_frames_refuse_real_images_and_odd_paths(tmp_path):
    (tmp_path / "QAFrames" / "Busstop01").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="look like real images"):
        render_frames(tmp_path, frame_paths("Busstop01", 1, head=""))
    for odd in ("../etc/passwd", "Busstop01/walker/rgb/1.png", "Busstop01/cat/rgb/000001.png", "Busstop01/dog/depth/000001.png"):
        with pytest.raises(ValueError, match="no image path"):
            render_frames(tmp_path / "fresh", [odd])


def test_weather_of_a_trajectory_comes_from_its_answers(root):
    weathers = trajectory_weathers(load(root).samples)
    assert weathers == {walk.name: walk.weather for walk in plan(0, SMALL) if walk.split == "test"}


def test_images_are_whole_png_files(root):
    for path in sorted(root.rglob("*.png"))[:40]:
        with Image.open(io.BytesIO(Path(path).read_bytes())) as image:
            image.load()
