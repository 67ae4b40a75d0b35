"""GPT4Scene, sizes of pictures and lengths of prompts: shape glue between the golden vectors and the package's functions."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_repro.gpt4scene import images


def height_width(size: tuple[int, int]) -> list[int]:
    return [size[1], size[0]]


def image_resize(given: Any, data: Path) -> dict[str, Any]:
    size, limit = (given['width'], given['height']), given['resolution']
    target, first = images.capped(size, limit), images.training_size(size, limit)
    final = images.rounded(first)
    out = {'infer_target_hw': height_width(target), 'train_first_hw': height_width(first), 'train_final_hw': height_width(final), 'train_tokens': images.visual_tokens(final)}
    try: shown = images.shown_size(size, limit)
    except ValueError as e: return {**out, 'infer_final_hw': {'error': type(e).__name__}, 'infer_tokens': None}
    return {**out, 'infer_final_hw': height_width(shown), 'infer_tokens': images.visual_tokens(shown)}


def truncate_lengths(given: Any, data: Path) -> tuple[int, int]:
    return images.truncated_lengths(given['source_len'], given['target_len'], given['cutoff_len'])


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {'image_resize': image_resize, 'truncate_lengths': truncate_lengths}
