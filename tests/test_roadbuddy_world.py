"""The Road Buddy world: official format, clips that decode, gold that follows from the pictures, safe building."""
import hashlib
import json
import re
import unicodedata
from collections import Counter

import av
import numpy as np
import pytest

from vlm_repro.roadbuddy.data import load
from vlm_repro.roadbuddy.questions import FAMILIES, LIGHT_WORDS, SIGN_WORDS, ask, ask_some, family_of
from vlm_repro.roadbuddy.render import SIZE, draw_frame
from vlm_repro.roadbuddy.scene import SIGNS, Clip, sample_clip, sample_drive
from vlm_repro.roadbuddy.world import FOLDER, FPS, GOLD, MARKER, ODDITIES, Size, build_world, plan

SMALL = Size(2, 5, 1, 3)
NAME = re.compile(r"(train|public_test)/videos/[0-9a-f]{8}_(\d{3})_clip_\d{3}_(\d{4})_(\d{4})_[YN]\.mp4")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("worlds") / "world", 0, SMALL, workers=1)


def entries(root, split):
    return json.loads((root / FOLDER / split / f"{split}.json").read_text(encoding="utf-8"))


def test_the_files_have_the_official_shape(root):
    for split, prefix in (("train", "train"), ("public_test", "testa")):
        text = (root / FOLDER / split / f"{split}.json").read_bytes()
        assert not text.startswith(b"\xef\xbb\xbf") and b"\n    " in text
        content = entries(root, split)
        assert list(content) == ["__count__", "data"] and content["__count__"] == len(content["data"])
        for number, entry in enumerate(content["data"], start=1):
            gold = ["answer", "support_frames"] if split == "train" else []
            assert list(entry) == ["id", "question", "choices", *gold, "video_path", "_unused_"]
            assert entry["id"] == f"{prefix}_{number:04d}" and NAME.fullmatch(entry["video_path"]) and re.fullmatch(r"[0-9a-f]{32}@\d+", entry["_unused_"])
            assert unicodedata.is_normalized("NFC", json.dumps(entry, ensure_ascii=False))
            assert all(re.match(r"[A-H]\.", choice) for choice in entry["choices"])
            if gold:
                assert entry["answer"] in entry["choices"] and entry["support_frames"]
                start, end = (int(part) for part in NAME.fullmatch(entry["video_path"]).groups()[2:])
                assert all(0 <= mark <= end - start for mark in entry["support_frames"])
            assert (root / FOLDER / entry["video_path"]).is_file()


def test_the_loader_reads_every_split_whole(root):
    for split in ("train", "public_test"):
        data = load(root, split)
        assert len(data.samples) == entries(root, split)["__count__"] and data.watermark
        assert not [problem for problem in data.problems if problem.dropped]
    drives = [{sample.meta["source"] for sample in load(root, split).samples} for split in ("train", "public_test")]
    assert not drives[0] & drives[1]


def test_the_public_answers_are_kept_aside(root):
    gold = json.loads((root / GOLD).read_text())
    public = entries(root, "public_test")["data"]
    assert {entry["id"] for entry in public} <= set(gold)
    assert all(gold[entry["id"]] in entry["choices"] for entry in public)
    assert all(gold[entry["id"]] == entry["answer"] for entry in entries(root, "train")["data"])


def test_clips_are_h264_of_the_length_their_names_say(root):
    for path in sorted((root / FOLDER).rglob("*.mp4")):
        start, end = (int(part) for part in re.search(r"_(\d{4})_(\d{4})_", path.name).groups())
        with av.open(str(path)) as film:
            stream = film.streams.video[0]
            frames = sum(1 for _ in film.decode(stream))
            assert (stream.codec_context.name, stream.width, stream.height, float(stream.average_rate)) == ("h264", *SIZE, FPS)
        assert frames == (end - start) * FPS and path.stat().st_size < 110_000


def test_decoded_frames_show_what_was_drawn(root):
    stretch = next(plan(0, SMALL))
    with av.open(str(root / FOLDER / stretch.path)) as film:
        decoded = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    for k in (0, 13, 31):
        own, other = (np.abs(decoded[k].astype(float) - draw_frame(clip, k / FPS).rgb).mean() for clip in (stretch.clip, sample_clip(np.random.default_rng(0), sample_drive(np.random.default_rng(9)))))
        assert own < 12 < other


def pixels_of(clip: Clip, second: float) -> Counter:
    picture = draw_frame(clip, second)
    counts = np.bincount(picture.things.ravel(), minlength=len(picture.names))
    return Counter({name: int(n) for names, n in zip(picture.names, counts, strict=True) for name in names})


def test_the_support_frames_show_the_answer():
    rng, seen = np.random.default_rng(3), Counter()
    for _ in range(150):
        clip = sample_clip(rng, sample_drive(rng))
        for family in FAMILIES:
            question = ask(family, clip, rng)
            if question is None or not question.shows:
                continue
            shown = max(pixels_of(clip, min(mark, clip.seconds))[question.shows] for mark in question.support)
            seen[family, shown > 60] += 1
    for family in {family for family, _ in seen}:
        assert seen[family, True] > 12 * seen[family, False], (family, seen)


def test_the_light_is_what_the_answer_says():
    rng = np.random.default_rng(4)
    for _ in range(200):
        clip = sample_clip(rng, sample_drive(rng))
        question = ask("light", clip, rng)
        shown = {name for name in pixels_of(clip, question.support[0]) if name.startswith("light:")}
        expected = {f"light:{colour}" for colour, words in LIGHT_WORDS.items() if words == question.answer[3:]} - {"light:none"}
        assert shown == expected, (clip, question)
        moments = {"ở đầu": 0.0, "ở cuối": clip.seconds - 0.05}
        for words, second in moments.items():
            if words in question.text and clip.light:
                assert clip.light.at(second) == clip.light.at(question.support[0])


def test_a_sign_question_has_one_right_choice():
    rng = np.random.default_rng(5)
    for _ in range(200):
        clip = sample_clip(rng, sample_drive(rng))
        question = ask("sign", clip, rng)
        if question:
            offered = {kind for kind, words in SIGN_WORDS.items() if words in {choice[3:] for choice in question.choices}}
            assert len(offered) == 4 and len(offered & set(clip.kinds)) == 1


def test_some_answers_need_the_right_frames():
    rng, missed = np.random.default_rng(6), Counter()
    for _ in range(200):
        clip = sample_clip(rng, sample_drive(rng))
        question = ask("sign", clip, rng)
        if question:
            uniform = [(k + 0.5) * clip.seconds / 5 for k in range(5)]
            missed[max(pixels_of(clip, t)[question.shows] for t in uniform) < 300] += 1
    assert 0.03 < missed[True] / sum(missed.values()) < 0.6, missed


def test_letters_are_spread_as_in_the_real_file():
    rng = np.random.default_rng(7)
    letters = Counter((len(q.choices), "ABCD"[q.gold]) for _ in range(1500) for q in ask_some(sample_clip(rng, sample_drive(rng)), rng))
    four = sum(n for (size, _), n in letters.items() if size == 4)
    assert abs(letters[4, "A"] / four - 0.317) < 0.04 and abs(letters[4, "D"] / four - 0.145) < 0.03
    assert 0.4 < letters[2, "A"] / (letters[2, "A"] + letters[2, "B"]) < 0.6


def test_the_default_world_is_large_and_odd_enough():
    stretches = list(plan())
    families = Counter(question.family for stretch in stretches for question in stretch.questions)
    assert set(families) == set(FAMILIES) and sum(families.values()) > 300
    assert {kind for stretch in stretches for kind in stretch.clip.kinds} == set(SIGNS)
    sizes = Counter(len(stretch.questions) for stretch in stretches)
    assert sizes.most_common(1)[0][0] == 2 and max(sizes) > 4
    assert all(family_of(question.text) == question.family for stretch in stretches for question in stretch.questions)
    fours = sum(len(question.choices) == 4 for stretch in stretches for question in stretch.questions if stretch.split == "train")
    assert fours > 7 * len(ODDITIES), "every oddity finds its item"


def test_every_oddity_comes_up(tmp_path):
    content = [entry for entry in json.loads((build_world(tmp_path / "odd", 0, Size(6, 8, 1, 1), workers=1) / FOLDER / "train/train.json").read_text())["data"]]
    letters = [[choice[0] for choice in entry["choices"]] for entry in content]
    bodies = [[choice[2:].strip() for choice in entry["choices"]] for entry in content]
    assert any(len(entry["choices"]) == 8 for entry in content)
    assert any(len(set(own)) < len(own) == 4 for own in letters)
    assert any(re.match(r"[A-D]\.\S", choice) for entry in content for choice in entry["choices"])
    assert any(re.match(r"[A-D]\.  ", choice) for entry in content for choice in entry["choices"])
    assert any(len(set(own)) < len(own) == 4 for own in bodies)
    assert any(choice.endswith(".") for own in bodies for choice in own)
    assert any(sorted(entry["support_frames"]) != entry["support_frames"] or len(set(entry["support_frames"])) < len(entry["support_frames"]) for entry in content)
    assert any(not entry["question"].endswith("?") for entry in content)
    assert len({(entry["question"], entry["video_path"]) for entry in content}) < len(content)


def test_building_twice_gives_the_same_bytes_and_another_seed_does_not(root, tmp_path):
    def digests(folder):
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}

    assert digests(build_world(tmp_path / "again", 0, SMALL, workers=2)) == digests(root)
    assert digests(build_world(tmp_path / "other", 1, Size(1, 1, 1, 1), workers=1)) != digests(root)


def test_a_folder_with_other_files_is_left_alone(root, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="other files"):
        build_world(tmp_path / "mine")
    before = (root / MARKER).stat().st_mtime_ns
    assert build_world(root, 0, SMALL) == root and (root / MARKER).stat().st_mtime_ns == before
