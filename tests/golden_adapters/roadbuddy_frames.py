"""Road Buddy's frames and tiles: shape glue between the golden vectors and the package's functions."""
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from vlm_repro.core.parts import open_parts
from vlm_repro.core.video import write_clip
from vlm_repro.models import tiling
from vlm_repro.roadbuddy import extract, frames, prompt

IMAGENET = {'image_mean': (.485, .456, .406), 'image_std': (.229, .224, .225)}


@cache
def processor(max_tiles: int) -> Any:
    return GotOcr2ImageProcessorPil(size={'height': 448, 'width': 448}, crop_to_patches=True, min_patches=1, max_patches=max_tiles, **IMAGENET)


def frame_index(given: Any, data: Path) -> list[int]:
    return list(frames.sample_indices(given['bound'], given['fps'], given['max_frame'], given['num_segments']))


def frame_plan(given: Any, data: Path) -> dict[str, Any]:
    window = frames.support_window(given['support_frames'], given['context_window']) if given['use_support_frames'] else None
    return {'num_segments': frames.frame_count(len(given['support_frames']), given['min_frames'], given['max_frames']), 'bound': window and list(window)}


def legacy_extractor(given: Any, data: Path) -> dict[str, Any]:
    reads = frames.legacy_reads(given['n_frames'], given['fps'], given['support_frames'], given['context_window'], given['min_frames'], given['max_frames'], given['mode'])
    return {'requested': list(reads.requested), 'frames_returned': len(reads.kept)}


def tiling_grid(given: Any, data: Path) -> dict[str, int]:
    columns, rows = tiling.tile_grid(given['width'], given['height'], 1, given['max_tiles'])
    return {'cols': columns, 'rows': rows, 'tiles': tiling.tile_count(columns, rows, given['use_thumbnail'])}


def synthetic(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([(7*x + 13*y) % 256, (3*x + 5*y) % 256, (x ^ y) % 256], -1).astype(np.uint8))


def rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(v, 5) for v in row] for row in values.tolist()]


def tiling_pixels(given: Any, data: Path) -> dict[str, Any]:
    image = synthetic(given['width'], given['height'])
    pixels = tiling.tile_pixels(image, given['max_tiles'])
    n, wide = len(pixels), torch.from_numpy(pixels)
    fed = processor(given['max_tiles'])(image, return_tensors='np')['pixel_values']
    points = [(0, 0, 0, 0), (0, 1, 10, 20), (0, 2, 447, 447), (n - 1, 0, 224, 224), (n - 1, 2, 100, 300)]
    return {'shape': list(pixels.shape), 'mean_per_tile': rounded(wide.mean((2, 3))), 'std_per_tile': rounded(wide.std((2, 3))),
            'points': [{'at': list(p), 'value': round(float(pixels[p]), 5)} for p in points]} if np.array_equal(fed, pixels) else {'differs from': type(processor(1)).__name__}


@cache
def clip(n_frames: int, fps: float, width: int, height: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix='golden-clip-'))
    return write_clip(folder/'clip.mp4', (Image.new('RGB', (width, height), (i % 256, 80, 120)) for i in range(n_frames)), fps)


def training_sample(given: Any, data: Path) -> dict[str, Any]:
    path = clip(given['n_frames'], given['fps'], given['width'], given['height'])
    plan = frames.plan_clip(path, given['support_frames'], on_decode_error='blank')
    pixels = [tiling.tile_pixels(image, 6) for image in open_parts(plan.parts(path))]
    return {'frame_indices': list(plan.indices), 'tiles_per_frame': [len(p) for p in pixels], 'pixel_shape': [sum(map(len, pixels)), *pixels[0].shape[1:]],
            'all_zero_pixels': plan.blank, 'image_markers': len(pixels), 'template': prompt.family_of(given['question'], len(pixels), 'vi'),
            'label': extract.gold_label(given['answer'])}


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'frame_index': frame_index, 'frame_plan': frame_plan, 'legacy_extractor': legacy_extractor, 'tiling_grid': tiling_grid, 'tiling_pixels': tiling_pixels,
    'training_sample': training_sample}
