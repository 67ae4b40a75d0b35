"""FitCoach, the data side: shape glue between the golden vectors and the package's functions."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from golden_adapters import ABSENT
from vlm_repro.fitcoach import annotations, clock, frames, spans, windows

FOLDER = 'QEVD-FIT-COACH-Benchmark'


def texts_of(rle: list[list[Any]]) -> list[str]:
    "A text a frame."
    return [text for text, n in rle for _ in range(n)]


def raw_of(given: Any) -> np.ndarray:
    "A clock in nanoseconds."
    if isinstance(given, list): return np.array(given, np.int64)
    return given['start'] + given['step']*np.arange(given['n'], dtype=np.int64)


def session_of(given: dict[str, Any]) -> tuple[annotations.Session, np.ndarray]:
    "A record with its clock in seconds."
    record = {k: given[k] for k in ('long_range_video_file', 'video_timestamps', 'feedback_timestamps', 'is_transition')} | {'feedbacks': texts_of(given['feedbacks_rle'])}
    return annotations.session_of(record, close_last=False), clock.seconds_of(raw_of(given['frame_clock_ns']))


def frame_timestamps(given: Any, data: Path) -> list[float]:
    return clock.seconds_of(np.array(given['raw'], given['dtype'])).tolist()


def feedback_spans(given: Any, data: Path) -> list[list[Any]]:
    found = spans.spans_of(texts_of(given['feedbacks_rle']), close_last=False)
    spans.check_counts(found, [('time stamps', given['num_timestamps'])])
    return [[s.text, s.first, s.last] for s in found]


def dataset_rows(given: Any, data: Path) -> dict[str, Any]:
    session, times = session_of(given)
    out = {mode: [{**row, 'system_sha256': ABSENT} for row in annotations.published_rows(session, times, mode, FOLDER)] for mode in ('single_exercise', 'full_workout')}
    for row in out['full_workout']: row['exercise_list_in_prompt'] = annotations.exercise_list(spans.exercises(session.spans))
    return out


def sliding_windows(given: Any, data: Path) -> dict[str, Any]:
    session, times = session_of(given)
    found = [annotations.segment_row(c) for c in windows.published_windows(session.spans, times, given['window_s'])]
    return {'segments': found, 'system_sha256': ABSENT, 'num_responses': len(session.spans)}


def episode_slice(given: Any, data: Path) -> dict[str, list[int]]:
    return {'kept_indices': windows.kept_features(np.array(given['timestamps'], float), given['start'], given['end']).tolist()}


def frame_sampling(given: Any, data: Path) -> dict[str, Any]:
    steps = frames.plan_steps(clock.seconds_of(raw_of(given['frame_clock_ns'])), given['num_decodable_frames'])
    return {'feature_timestamps': steps.times.tolist(), 'frame_groups_of_4_fed_to_network': steps.fed.tolist(), 'num_features_saved': len(steps.times)}


def frame_geometry(given: Any, data: Path) -> dict[str, list[int]]:
    h, w = given['height'], given['width']
    square = frames.turned(np.ones((h, w, 1), np.uint8))
    rows, columns = (np.flatnonzero(square[..., 0].any(axis)) for axis in (1, 0))
    return {'crop_y0_y1_x0_x1': list(frames.crop_box(h, w)), 'resize_keep_aspect_w_h': list(frames.fit_within(h, w)[::-1]), 'downscaled_h_w': list(frames.at_most(h, w, given['max_length'])),
            'rotated_h_w': list(square.shape[:2]), 'rotated_content_y0_y1_x0_x1': [int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1]}


def frame_pixels(given: Any, data: Path) -> dict[str, Any]:
    y, x, c = np.mgrid[:given['height'], :given['width'], :3]
    bgr = ((3*x + 5*y + 70*c + x*y//7) % 256).astype(np.uint8)
    seen = frames.step_pixels([bgr[..., ::-1]], given['rotate'])
    at = ([0, 0, 0], [1, 111, 80], [2, 223, 159], [0, 50, 140], [2, 200, 3], [1, 10, 77])
    return {'shape': list(seen.shape), 'channel_means': seen[0].astype(np.float64).mean((1, 2)).tolist(), 'samples_c_y_x_value': [[*p, float(seen[0][tuple(p)])] for p in at]}


ADAPTERS: dict[str, Callable[[Any, Path], Any]] = {
    'frame_timestamps': frame_timestamps,
    'feedback_spans': feedback_spans,
    'dataset_rows': dataset_rows,
    'sliding_windows': sliding_windows,
    'episode_slice': episode_slice,
    'frame_sampling': frame_sampling,
    'frame_geometry': frame_geometry,
    'frame_pixels': frame_pixels,
}
