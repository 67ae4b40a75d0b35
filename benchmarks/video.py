"""Reading frames of a video: `python benchmarks/video.py [--out benchmarks/results/video.json]`.

Compared, for 8, 32 and 64 evenly spread frames of films of 640x360: H.264 in mp4 with a key frame every 12, 60 and 250 frames, the same in mkv, at a variable rate and turned by a quarter of a
circle, and VP9 in webm:
  ours       `core.video.read_frames`, which opens the file and finds its frames anew each time
  pyav       decode everything to the last wanted frame, convert the wanted ones
  pyav_seek  for each frame by itself, jump to the key frame before it and run on
  cv2        a seek loop, `VideoCapture.set(CAP_PROP_POS_FRAMES, i)` and `read` for each frame
  decord     `VideoReader.get_batch`
  torchcodec `VideoDecoder.get_frames_at`, exact
All decode in one thread. Every frame carries its number in black and white squares: before anything is timed, the numbers read back from ours must be those asked for, upright, and its arrays equal
to PyAV's. Another reader that returns other frames of a film is named, with how many, and not timed on that film; one that leaves the picture lying is turned upright in its time. Readers that are not
installed are left out: `pip install opencv-python-headless torchcodec` beside the package has them all (torchcodec needs FFmpeg's libraries). CPU seconds of one process, the least of
interleaved rounds. Memory is the largest resident size of a process that reads 32 frames of a film, and of one ten times as long.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import arguments, finish, hot_spots, interleaved, least, now, one_thread, peak_bytes, require, versions

one_thread()

import av  # noqa: E402
import decord  # noqa: E402
import numpy as np  # noqa: E402

import vlm_repro.core.video as core_video  # noqa: E402
from vlm_repro.core.video import read_frames, write_clip  # noqa: E402

COUNTS, CELL, BITS = (8, 32, 64), 16, 16
GATED = ("mp4 60", 8)  # the film and number of frames that the goal against OpenCV is about
Frames = list[Any]  # arrays; ours are images, which is what the processors of models take


# Films whose frames say their number. ------------------------------------------------------------------------------------------------------------------------------------------------------

def scene(n: int, width: int = 640, height: int = 360) -> Iterator[np.ndarray]:
    """A pan over a coarse texture, with something moving, and the number of the frame in squares along the top."""
    base = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8 + 200, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    for i in range(n):
        a = base[:, (2 * i) % 1500:(2 * i) % 1500 + width].copy()
        a[100:140, (3 * i) % (width - 40):(3 * i) % (width - 40) + 40] = (255, 0, 0)
        bits = np.array([255 * (i >> b & 1) for b in range(BITS)], np.uint8)
        a[:CELL, :CELL * BITS] = bits.repeat(CELL)[None, :, None]
        yield a


def number(frame: np.ndarray) -> int:
    """The number that a frame shows."""
    row = frame[CELL // 4:3 * CELL // 4, :CELL * BITS].mean((0, 2)).reshape(BITS, CELL)[:, CELL // 4:3 * CELL // 4].mean(1)
    return sum(1 << b for b in range(BITS) if row[b] > 127)


def films(folder: Path, n: int, chosen: list[str]) -> dict[str, Path]:
    """The films, by name."""
    rate = np.cumsum(np.random.default_rng(1).choice([1, 2, 3], n)) / 60
    made: dict[str, dict[str, Any]] = {"mp4 12": {"gop": 12}, "mp4 60": {"gop": 60}, "mp4 250": {"gop": 250}, "webm 60": {"gop": 60}, "mkv 60": {"gop": 60},
                                       "variable rate 60": {"gop": 60, "times": (rate - rate[0]).tolist()}, "turned 60": {"gop": 60, "turn": 90}}
    out = {}
    for name in chosen or made:
        suffix = name.split()[0] if name.split()[0] in ("webm", "mkv") else "mp4"
        pictures = (np.rot90(a).copy() for a in scene(n)) if name.startswith("turned") else scene(n)
        out[name] = write_clip(folder / f"{name.replace(' ', '-')}.{suffix}", pictures, **made[name])
    return out


# The readers. ----------------------------------------------------------------------------------------------------------------------------------------------------------------------------

def ours(path: Path, wanted: list[int]) -> Frames:
    core_video._KNOWN.clear()  # a file that was never seen
    return read_frames(path, wanted)


def pyav(path: Path, wanted: list[int]) -> Frames:
    kept, last, out = set(wanted), wanted[-1], []
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        for i, frame in enumerate(container.decode(video=0)):
            if i in kept: out.append(frame.to_ndarray(format="rgb24"))
            if i == last: break
    return out


def pyav_seek(path: Path, wanted: list[int]) -> Frames:
    out = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for i in wanted:
            at = round(i / stream.average_rate / stream.time_base)
            container.seek(at, stream=stream)
            found = next((f for f in container.decode(stream) if f.pts >= at - 1), None)
            if found is not None: out.append(found.to_ndarray(format="rgb24"))
    return out


def cv2_seek(path: Path, wanted: list[int]) -> Frames:
    import cv2
    cv2.setNumThreads(1)
    film, out = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1]), []
    for i in wanted:
        film.set(cv2.CAP_PROP_POS_FRAMES, i)
        good, frame = film.read()
        if good: out.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    film.release()
    return out


def by_decord(path: Path, wanted: list[int]) -> Frames:
    return list(decord.VideoReader(str(path), num_threads=1).get_batch(wanted).asnumpy())


def by_torchcodec(path: Path, wanted: list[int]) -> Frames:
    from torchcodec.decoders import VideoDecoder
    return list(VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1).get_frames_at(wanted).data.numpy())


READERS: dict[str, Callable[[Path, list[int]], Frames]] = {"ours": ours, "pyav": pyav, "pyav_seek": pyav_seek, "decord": by_decord}
MORE = {"cv2": cv2_seek, "torchcodec": by_torchcodec}


def readers() -> dict[str, Callable[[Path, list[int]], Frames]]:
    return READERS | {name: way for name, way in MORE.items() if find_spec(name)}


def upright(way: Callable[[Path, list[int]], Frames]) -> Callable[[Path, list[int]], Frames]:
    """A reader that leaves the picture lying, and what has to be done with its frames."""
    return lambda path, wanted: [np.ascontiguousarray(np.rot90(np.asarray(a), -1)) for a in way(path, wanted)]


# Equal, then timed. ----------------------------------------------------------------------------------------------------------------------------------------------------------------------

def astray(way: Callable[[Path, list[int]], Frames], path: Path, wanted: list[int]) -> int:
    """How many of the frames asked for did not come."""
    try: got = [number(np.asarray(a)) for a in way(path, wanted)]
    except (RuntimeError, ValueError, IndexError, OSError) as error: return print(f"{path.name}: {type(error).__name__}: {str(error)[:200]}") or len(wanted)
    return sum(a != b for a, b in zip(got, wanted)) + abs(len(got) - len(wanted))


def sound_ways(name: str, path: Path, wanted: list[int]) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """The readers that return the frames of a film, as calls, and how many frames the others miss."""
    held = {}
    lies = name.startswith("turned")
    for reader, way in readers().items():
        plain, turned = astray(way, path, wanted), astray(upright(way), path, wanted) if lies else len(wanted)
        held[reader] = (upright(way), turned) if turned < plain else (way, plain)
    mine, exact = ours(path, wanted), held["pyav"][0](path, wanted)
    require(held["ours"][0] is ours and not held["ours"][1], f"{name}: ours misses {held['ours'][1]} of {len(wanted)} frames")
    require(all(np.array_equal(np.asarray(a), b) for a, b in zip(mine, exact)), f"{name}: ours and PyAV have other arrays")
    return {r: (lambda w=w: len(w(path, wanted))) for r, (w, lost) in held.items() if not lost}, {r: lost for r, (_, lost) in held.items() if lost}


def spread(n: int, count: int) -> list[int]:
    return [(2 * k + 1) * n // (2 * count) for k in range(count)]


def measure(made: dict[str, Path], n: int, counts: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """One row for every film and number of frames."""
    rows = []
    for name, path in made.items():
        for count in counts:
            ways, other = sound_ways(name, path, spread(n, count))
            held = interleaved(ways, rounds)
            seconds = {way: round(least(held, way, "cpu_s"), 4) for way in ways}
            rows.append({"film": name, "n": count, "seconds": seconds, "other_frames": other, "against_best": seconds["ours"] / min(v for k, v in seconds.items() if k != "ours")})
            print(f"{name:17} {count:2}  " + "  ".join(f"{k} {v * 1000:7.1f}" for k, v in seconds.items()) + (f"  other frames: {other}" if other else ""), flush=True)
    return rows


def memory(folder: Path, n: int) -> dict[str, Any]:
    """The largest resident size of a process that reads 32 frames, by reader and length of the film."""
    lengths = {"short": n, "long": 10 * n}
    made = {k: write_clip(folder / f"{k}.mp4", scene(v), gop=60) for k, v in lengths.items()}

    def peak(reader: str, k: str) -> int:
        done = subprocess.run([sys.executable, __file__, "--read", reader, str(made[k]), str(lengths[k])], capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])
    return {"frames": lengths, **{r: {k: peak(r, k) for k in lengths} for r in readers()}}


def parsed() -> argparse.Namespace:
    parser = arguments("Time readers of video frames.", rounds=5)
    parser.add_argument("--frames", type=int, default=900, help="length of a film")
    parser.add_argument("--films", nargs="*", default=[], help="these films alone")
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options, begun = parsed(), now()
    if options.read:
        readers()[options.read[0]](Path(options.read[1]), spread(int(options.read[2]), 32))
        return print(peak_bytes())
    n, counts = (130, (8,)) if options.quick else (options.frames, COUNTS)
    with tempfile.TemporaryDirectory() as held:
        made = films(Path(held), n, options.films)
        rows = measure(made, n, counts, 1 if options.quick else options.rounds)
        sizes = memory(Path(held), n // 2)
        against = {(r["film"], r["n"]): r["seconds"].get("cv2", float("nan")) / r["seconds"]["ours"] for r in rows}
        figures = {"worst_against_best": max(r["against_best"] for r in rows), "cv2_at_8_every_60": against.get(GATED, float("nan")), "memory_ten_times_as_long": sizes["ours"]["long"] / sizes["ours"]["short"]}
        profile = lambda: {r["film"] + f", {r['n']} frames": hot_spots(lambda r=r: ours(made[r["film"]], spread(n, r["n"]))) for r in rows if r["against_best"] > 1.1 or (r["film"], r["n"]) == GATED}
        finish("C4", options, begun, figures, profile, versions=versions("av", "decord2", "opencv-python-headless", "torchcodec", "numpy"),
               sizes={"frames": n, "size": [640, 360], "counts": list(counts)}, equal={"numbers": "of every frame of ours", "arrays": "ours and PyAV"}, rows=rows, memory_bytes=sizes)


if __name__ == "__main__":
    main()
