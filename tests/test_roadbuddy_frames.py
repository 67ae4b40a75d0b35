"""Which frames of a clip are shown, the policies for those that cannot be had, and the pixels of their tiles: golden vectors and real files."""
import json
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

from vlm_repro.core.media import MediaError
from vlm_repro.core.parts import open_parts
from vlm_repro.core.video import video_info, write_clip
from vlm_repro.models.families import random_checkpoint
from vlm_repro.models.inputs import encode, image_settings, load_preparer
from vlm_repro.models.tiling import IMAGENET_MEAN, IMAGENET_STD, tile_pixels
from vlm_repro.roadbuddy.frames import MODES, ON_DECODE_ERROR, FramePlan, legacy_reads, plan_clip, plan_frames, settle

HERE = Path(__file__).resolve().parent
TOPICS = ('frame_index', 'frame_plan', 'legacy_extractor', 'tiling_grid', 'tiling_pixels', 'training_sample')


@pytest.mark.parametrize('topic', TOPICS)
def test_golden(topic, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    assert golden.main([str(HERE/'golden'), '--only', f'roadbuddy/{topic}']) == 0, capsys.readouterr().err


def test_a_plan_is_the_published_index_in_the_published_window():
    held = {t: json.loads((HERE/'golden'/'roadbuddy'/f'{t}.json').read_text())['cases'] for t in ('training_sample', 'legacy_extractor')}
    for case in held['training_sample']:
        given = case['input']
        plan = plan_frames(given['n_frames'], given['fps'], given['support_frames'])
        assert list(plan.indices) == case['expected']['frame_indices'] and plan.times == tuple(i/given['fps'] for i in plan.indices)
    for case in held['legacy_extractor']:
        given = case['input']
        marks = given['support_frames'] if given['mode'] == 'support' else []
        plan = plan_frames(given['n_frames'], given['fps'], marks, given['min_frames'], given['max_frames'], given['context_window'], 'legacy')
        assert len(plan.indices) == case['expected']['frames_returned']


def test_the_modes_differ_in_what_they_know_of_the_marks():
    marks = [2., 4., 6.]
    plans = {mode: plan_frames(300, 30., marks, mode=mode) for mode in MODES}
    assert {m: len(p.indices) for m, p in plans.items()} == {'support': 6, 'uniform': 5, 'no_window': 6, 'legacy': 6}
    assert plans['support'].window == (1.5, 6.5) and plans['no_window'].window is plans['uniform'].window is None
    assert plans['uniform'].indices == plan_frames(300, 30., None).indices and plans['uniform'].support == ()


@pytest.mark.parametrize('arguments, why', [({'mode': 'random'}, "frames='random' is not possible"), ({'min_frames': 7}, '1 <= min_frames <= max_frames'), ({'min_frames': 0}, '1 <= min')])
def test_wrong_settings(arguments, why):
    with pytest.raises(ValueError, match=why): plan_frames(300, 30., [], **arguments)
    with pytest.raises(ValueError, match='on_decode_error'): settle(plan_frames(300, 30., []), 300, 'ignore')


def test_the_older_extractor_breaks_its_own_limits():
    assert len(legacy_reads(240, 30., [], min_frames=4, max_frames=6).kept) == 8
    latest = legacy_reads(420, 30., [1., 3., 5., 7., 13.], min_frames=6, max_frames=12).kept
    assert len(latest) == 12 and max(latest) < 13*30


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp('clip')/'clip.mp4', (np.full((90, 160, 3), 2*i, np.uint8) for i in range(120)), gop=30)


def test_clamping_keeps_to_the_clip_and_counts(clip):
    plan = plan_clip(clip, [6.2])
    assert plan.indices == (119,)*4 and plan.n_clamped == 4 and max(plan.times) < 4
    assert len(open_parts(plan.parts(clip))) == 4
    assert plan_clip(clip, [4.0]).n_clamped == 0


def test_the_other_policies(clip):
    with pytest.raises(MediaError, match=r'clip.mp4: no frame \d+: it has 120 frames'): plan_clip(clip, [6.2], on_decode_error='raise')
    blank = plan_clip(clip, [6.2], on_decode_error='blank')
    image, = open_parts(blank.parts(clip))
    assert blank.blank and blank.indices == () and image.size == (448, 448)
    assert np.abs(tile_pixels(image, 6)).max() < .01 and len(tile_pixels(image, 6)) == 1
    for policy in ON_DECODE_ERROR: assert plan_clip(clip, [2.], on_decode_error=policy) == plan_frames(120, 30., [2.])


def test_a_broken_clip_fails_unless_blanks_were_asked_for(clip, tmp_path):
    torn = tmp_path/'torn.mp4'
    torn.write_bytes(clip.read_bytes()[:2000])
    for policy in ('clamp', 'raise'):
        with pytest.raises(MediaError, match='torn.mp4: was cut short'): plan_clip(torn, [2.], on_decode_error=policy)
    assert plan_clip(torn, [2.], on_decode_error='blank') == FramePlan((), None, (), blank=True)
    for policy in ON_DECODE_ERROR:
        with pytest.raises(MediaError, match='no such file'): plan_clip(tmp_path/'absent.mp4', [2.], on_decode_error=policy)


def test_the_plan_shows_itself():
    shown = plan_frames(300, 30., [3.5, 7.0])._repr_html_()
    assert shown.startswith('<svg') and all(f'>{i}<' in shown for i in (106, 140, 174, 207)) and shown.count('#c0392b') == 2
    assert '4 moved into the clip' in settle(plan_frames(120, 30., [6.2]), 120)._repr_html_()


@pytest.mark.parametrize('size', [(192, 108), (500, 300), (448, 448), (854, 480)])
def test_the_other_resizer_differs_by_three_grey_levels_at_most(size):
    rng = np.random.default_rng(0)
    from PIL import Image
    image = Image.fromarray(rng.integers(0, 256, (size[1]//4, size[0]//4, 3), np.uint8)).resize(size)
    options = {'size': {'height': 448, 'width': 448}, 'crop_to_patches': True, 'min_patches': 1, 'max_patches': 6, 'image_mean': IMAGENET_MEAN, 'image_std': IMAGENET_STD}
    theirs = GotOcr2ImageProcessor(**options)(image, return_tensors='pt')['pixel_values'].numpy()
    difference = np.abs(theirs - tile_pixels(image, 6))
    assert theirs.shape == tile_pixels(image, 6).shape and difference.max() < 3.01/255/min(IMAGENET_STD) and difference.mean() < 3e-3


def test_the_manifest_names_the_resizer(tmp_path, clip):
    folder = random_checkpoint('internvl', tmp_path/'internvl')
    messages = [{'role': 'user', 'content': [*plan_clip(clip, [2.]).parts(clip), {'type': 'text', 'text': 'What is ahead?'}]}]
    seen = {}
    for backend in ('pil', 'torchvision'):
        preparer = load_preparer(folder, True, backend)
        seen[backend] = image_settings(preparer.image_processor), encode(preparer, messages).tensors['pixel_values']
    assert [s[0]['backend'] for s in seen.values()] == ['pil', 'torchvision'] and seen['pil'][0]['class'] != seen['torchvision'][0]['class']
    assert seen['pil'][1].shape == seen['torchvision'][1].shape and torch.isfinite(seen['pil'][1]).all()
    assert type(AutoImageProcessor.from_pretrained(folder, backend='pil')).__name__ == seen['pil'][0]['class']


def test_times_of_a_variable_rate_are_those_of_the_file(tmp_path):
    "20 frames at a tenth of a second, then 20 at half a second: the indices are the published ones, the times are when the frames are shown."
    times = [i*.1 if i < 20 else 2 + (i - 20)*.5 for i in range(40)]
    clip = write_clip(tmp_path/'vfr.mp4', [np.full((48, 64, 3), 6*i, np.uint8) for i in range(40)], 10., times=times)
    info = video_info(clip)
    for policy in ON_DECODE_ERROR:
        plan = plan_clip(clip, [1.], on_decode_error=policy)
        assert plan.indices == plan_frames(info.frames, info.fps, [1.]).indices and plan.seconds == info.seconds == pytest.approx(12., abs=.5)
        assert plan.times == pytest.approx([times[i] for i in plan.indices], abs=1e-3) and plan.times != pytest.approx([i/info.fps for i in plan.indices], abs=.05)
