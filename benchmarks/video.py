"""Reading frames of a video: `python benchmarks/video.py [--frames 900] [--rounds 3] [--out benchmarks/results/video.json]`.

Compared, on H.264 files of 640x360 with a key frame every 12, 60 and 250 frames, for 8, 32 and 64 evenly spread frames:
  auto     our reader, by its cost model
  plain    decode everything to the last wanted frame, convert the wanted ones
  seek     for each frame by itself, jump to the key frame before it and run on
  decord   `VideoReader(num_threads=1).get_batch`
All four must give the same arrays before anything is timed. CPU seconds of one process, the least of interleaved rounds. The last line is JSON.

Predicted before the first run: at 8 frames and a key frame every 60, `auto` takes at most half the time of `plain`; at 64 frames at most 0.8 of it at every spacing, because frames to
which no other refers are not decoded; `auto` is nowhere more than 1.1 times the best of the others; memory is not measured here (tests/test_video.py does).
"""
import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import av
import decord
import numpy as np

from vlm_repro.core.video import read_frames, video_index, write_clip

GOPS, COUNTS = (12, 60, 250), (8, 32, 64)


def scene(n: int, width: int = 640, height: int = 360) -> Iterator[np.ndarray]:
    "A pan over a coarse texture, with something moving."
    base = np.random.default_rng(0).integers(0, 255, (height//8, width//8 + 200, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    for i in range(n):
        a = base[:, (2*i) % 1500:(2*i) % 1500 + width].copy()
        a[100:140, (3*i) % (width - 40):(3*i) % (width - 40) + 40] = (255, 0, 0)
        yield a


def ours(path: Path, wanted: list[int]) -> list[np.ndarray]:
    video_index.__globals__['_index'].cache_clear()
    return [np.asarray(im) for im in read_frames(path, wanted)]


def plain(path: Path, wanted: list[int]) -> list[np.ndarray]:
    kept, last = set(wanted), wanted[-1]
    out = []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for i, frame in enumerate(container.decode(video=0)):
            if i in kept: out.append(frame.to_ndarray(format='rgb24'))
            if i == last: return out
    return out


def seek(path: Path, wanted: list[int]) -> list[np.ndarray]:
    out = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        tick = round(1/(stream.average_rate*stream.time_base))
        for i in wanted:
            container.seek(i*tick, stream=stream)
            out.append(next(f for f in container.decode(stream) if f.pts >= i*tick).to_ndarray(format='rgb24'))
    return out


def by_decord(path: Path, wanted: list[int]) -> list[np.ndarray]:
    return list(decord.VideoReader(str(path), num_threads=1).get_batch(wanted).asnumpy())


WAYS: dict[str, Callable[[Path, list[int]], list[np.ndarray]]] = {'auto': ours, 'plain': plain, 'seek': seek, 'decord': by_decord}


def measure(path: Path, wanted: list[int], rounds: int) -> dict[str, float]:
    "CPU seconds of each way, after checking that they agree."
    expected = plain(path, wanted)
    for name, way in WAYS.items():
        got = way(path, wanted)
        if len(got) != len(wanted) or not all(map(np.array_equal, got, expected)): raise SystemExit(f'{name} gives other frames of {path.name} for {wanted}')
    best = dict.fromkeys(WAYS, float('inf'))
    for _ in range(rounds):
        for name, way in WAYS.items():
            start = time.process_time()
            way(path, wanted)
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description='Time four ways of reading frames.')
    parser.add_argument('--frames', type=int, default=900, help='length of the film')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--out', type=Path, help='JSON file to write')
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for gop in GOPS:
            path = write_clip(Path(folder)/f'gop{gop}.mp4', scene(options.frames), gop=gop)
            for count in COUNTS:
                wanted = [(2*k + 1)*options.frames//(2*count) for k in range(count)]
                seconds = measure(path, wanted, options.rounds)
                rows.append({'gop': gop, 'n': count, **{k: round(v, 4) for k, v in seconds.items()}})
                print(f'gop {gop:3} n {count:2}  ' + '  '.join(f'{k} {v*1000:7.1f} ms' for k, v in seconds.items()), flush=True)
    result = {'what': 'CPU seconds, least of the rounds', 'film': {'frames': options.frames, 'size': [640, 360]}, 'rounds': options.rounds, 'rows': rows, 'cpus': os.cpu_count(),
              'python': platform.python_version(), **{p: version(p) for p in ('av', 'decord2', 'numpy')}}
    if options.out: options.out.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
    print(json.dumps(result))


if __name__ == '__main__':
    main()
