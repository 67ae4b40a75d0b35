"""Video files made on the spot, whole and broken: every way of reading gives the same frames, memory follows the frames asked, and every fault has a name."""
import subprocess
import sys
import textwrap
from fractions import Fraction
from pathlib import Path

import av
import decord
import numpy as np
import pytest
from PIL import Image

from vlm_repro.core.media import MediaError
from vlm_repro.core.parts import open_parts, part_size
from vlm_repro.core.video import HOWS, Run, VideoInfo, frame_times, plan_reads, read_frames, video_index, video_info, write_clip

N = 90
OURS = ('auto', 'seek', 'linear')


def drawn(n=N, size=(128, 72)):
    "Frames that move, so that a frame taken for its neighbour shows."
    w, h = size
    for i in range(n):
        a = np.zeros((h, w, 3), np.uint8)
        a[..., 0] = (np.arange(w) + 5*i) % 256
        a[..., 1] = 2*np.arange(h)[:, None] % 256
        a[10:20, (3*i) % (w - 10):(3*i) % (w - 10) + 10] = 255
        yield a


def encoded(path, codec, n=N, size=(128, 72), **options):
    "A file with whatever the encoder can do."
    with av.open(str(path), 'w') as out:
        stream = out.add_stream(codec, rate=30, options=options)
        stream.pix_fmt, (stream.width, stream.height) = 'yuv420p', size
        for a in drawn(n, size): out.mux(stream.encode(av.VideoFrame.from_ndarray(a, format='rgb24')))
        out.mux(stream.encode(None))
    return path


def in_order(path):
    "All frames, by the plainest loop there is."
    with av.open(str(path)) as container: return [f.to_ndarray(format='rgb24') for f in container.decode(video=0)]


def copied(source, path, options=None, keep=lambda i, packet: True, shift=0):
    "The packets of one file in another."
    with av.open(str(source)) as a, av.open(str(path), 'w', options=options or {}) as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for i, packet in enumerate(p for p in a.demux(video=0) if p.size):
            if not keep(i, packet): continue
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
            b.mux(packet)
    return path


def arrays(images):
    return [np.asarray(im) for im in images]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected)): assert np.array_equal(a, b), f'frame {i} of {len(got)}'


X264 = 'keyint=25:min-keyint=25:bframes=4:b-pyramid=normal:scenecut=0'
FILES = {
    'gop12.mp4': lambda p: write_clip(p, drawn(), gop=12),
    'gop60.mp4': lambda p: write_clip(p, drawn(), gop=60),
    'default.mp4': lambda p: write_clip(p, drawn()),
    'gop24.mkv': lambda p: write_clip(p, drawn(), gop=24),
    'gop24.webm': lambda p: write_clip(p, drawn(), gop=24),
    'variable.mp4': lambda p: write_clip(p, drawn(), gop=24, times=list(np.linspace(0, 2, N)**1.7)),
    'variable.mkv': lambda p: write_clip(p, drawn(), gop=24, times=list(np.linspace(0, 2, N)**1.7)),
    'open_gop.mp4': lambda p: encoded(p, 'libx264', **{'x264-params': X264 + ':open-gop=1'}),
    'open_gop.mkv': lambda p: encoded(p, 'libx264', **{'x264-params': X264 + ':open-gop=1'}),
    'refresh.mp4': lambda p: encoded(p, 'libx264', **{'x264-params': 'intra-refresh=1:keyint=30'}),
    'refresh.mkv': lambda p: encoded(p, 'libx264', **{'x264-params': 'intra-refresh=1:keyint=30'}),
    'hevc.mp4': lambda p: encoded(p, 'libx265', **{'x265-params': 'keyint=25:open-gop=1:log-level=none'}),
    'mpeg4.mp4': lambda p: encoded(p, 'mpeg4', bf='2', g='25'),
    'mpeg4.mkv': lambda p: encoded(p, 'mpeg4', bf='2', g='25'),
    'av1.mp4': lambda p: encoded(p, 'libsvtav1', preset='12', g='25'),
}


@pytest.mark.parametrize('name', FILES)
def test_every_way_gives_the_same_frames(name, tmp_path):
    path = FILES[name](tmp_path/name)
    expected = in_order(path)
    assert len(expected) == N == video_info(path).frames
    rng = np.random.default_rng(0)
    asked = [[*range(N)], [N - 1], [0], [70, 3, 3, 41, 70, 26], *(rng.choice(N, 5, replace=False).tolist() for _ in range(12))]
    for how in OURS:
        for wanted in asked: assert_same(arrays(read_frames(path, wanted, how)), [expected[i] for i in wanted])


@pytest.mark.parametrize('name', ['gop12.mp4', 'gop60.mp4', 'gop24.mkv', 'gop24.webm', 'variable.mp4'])
def test_the_frames_and_the_rate_are_those_of_decord(name, tmp_path):
    path = FILES[name](tmp_path/name)
    theirs, info = decord.VideoReader(str(path), num_threads=1), video_info(path)
    assert (info.frames, info.fps) == (len(theirs), theirs.get_avg_fps())
    wanted = [0, 13, 14, 50, 51, N - 1]
    assert_same(arrays(read_frames(path, wanted)), list(theirs.get_batch(wanted).asnumpy()))
    assert_same(arrays(read_frames(path, wanted, 'decord')), arrays(read_frames(path, wanted)))
    starts = theirs.get_frame_timestamp(list(range(N)))[:, 0]
    assert np.allclose(frame_times(path), starts - starts[0], atol=2e-3)


@pytest.mark.parametrize('size', [(320, 180), (640, 360), (854, 480)])
@pytest.mark.parametrize('colours', [{}, {'colorspace': 'bt709', 'color_primaries': 'bt709', 'color_trc': 'bt709'}])
def test_colours_are_those_of_decord(size, colours, tmp_path):
    path = encoded(tmp_path/'tagged.mp4', 'libx264', 4, size, **colours)
    assert_same(arrays(read_frames(path, [0, 3])), list(decord.VideoReader(str(path)).get_batch([0, 3]).asnumpy()))


@pytest.mark.parametrize('degrees', [90, 180, 270])
def test_a_turned_film_stands_upright(degrees, tmp_path):
    plain, turned = write_clip(tmp_path/'plain.mp4', drawn(20)), write_clip(tmp_path/'turned.mp4', drawn(20), turn=degrees)
    got, info = arrays(read_frames(turned, [0, 7])), video_info(turned)
    assert_same(got, [np.rot90(a, -degrees//90) for a in arrays(read_frames(plain, [0, 7]))])
    assert (info.height, info.width) == got[0].shape[:2]
    assert_same(got, list(decord.VideoReader(str(turned)).get_batch([0, 7]).asnumpy()))


@pytest.mark.parametrize('matrix, op', [((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT), ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM)])
def test_a_mirrored_film_is_turned_back(matrix, op, tmp_path):
    plain, path = write_clip(tmp_path/'plain.mp4', drawn(5)), tmp_path/'mirrored.mp4'
    held = bytearray(plain.read_bytes())
    place = held.index(b'tkhd') + 44
    a, b, c, d = (v*65536 for v in matrix)
    held[place:place + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], '>i4').tobytes()
    path.write_bytes(held)
    assert_same(arrays(read_frames(path, [2])), arrays(im.transpose(op) for im in read_frames(plain, [2])))


def test_a_film_turned_askew_is_refused(tmp_path):
    with pytest.raises(MediaError, match='askew.mp4: is turned by no quarter of a circle'): video_info(write_clip(tmp_path/'askew.mp4', drawn(5), turn=30))


def test_frames_that_are_never_shown_have_no_index(tmp_path):
    whole = write_clip(tmp_path/'whole.mp4', drawn(), gop=30)
    ticks = video_index(whole).pts[35]
    trimmed = copied(whole, tmp_path/'trimmed.mp4', keep=lambda i, p: p.pts >= video_index(whole).pts[30], shift=int(ticks))
    expected = in_order(trimmed)
    assert video_info(trimmed).frames == len(expected) < N - 30
    for how in OURS: assert_same(arrays(read_frames(trimmed, [0, 1, 20, len(expected) - 1], how)), [expected[i] for i in (0, 1, 20, len(expected) - 1)])


@pytest.fixture(scope='module')
def fast(tmp_path_factory):
    "A clip whose index stands at the front, and its frames."
    folder = tmp_path_factory.mktemp('fast')
    path = copied(write_clip(folder/'whole.mp4', drawn(), gop=24), folder/'fast.mp4', {'movflags': 'faststart'})
    return path, in_order(path)


@pytest.mark.parametrize('share', [.35, .6, .9])
def test_a_truncated_file_gives_the_frames_that_exist(fast, share, tmp_path):
    path, expected = tmp_path/'cut.mp4', fast[1]
    held = fast[0].read_bytes()
    path.write_bytes(held[:int(len(held)*share)])
    info = video_info(path)
    assert 0 < info.frames < N and info.frames + info.missing == N
    for how in OURS: assert_same(arrays(read_frames(path, range(info.frames), how)), expected[:info.frames])
    with pytest.raises(MediaError, match=rf'cut.mp4: no frame {info.frames}: it has {info.frames} frames.* {info.missing} more are missing'): read_frames(path, [0, info.frames])


@pytest.mark.parametrize('suffix', ['.mkv', '.webm'])
@pytest.mark.parametrize('share', [.3, .55, .8])
def test_truncated_matroska(suffix, share, tmp_path):
    whole, path = write_clip(tmp_path/f'whole{suffix}', drawn(), gop=24), tmp_path/f'cut{suffix}'
    expected, held = in_order(whole), whole.read_bytes()
    path.write_bytes(held[:int(len(held)*share)])
    info = video_info(path)
    assert 0 < info.frames < N and abs(info.frames + info.missing - N) <= 1
    for how in OURS: assert_same(arrays(read_frames(path, range(info.frames), how)), expected[:info.frames])
    with pytest.raises(MediaError, match=f'no frame {info.frames}'): read_frames(path, [info.frames])


def test_a_hole_in_the_middle_costs_the_frames_that_lean_on_it(fast, tmp_path):
    path, expected = tmp_path/'hole.mp4', fast[1]
    held, packets = bytearray(fast[0].read_bytes()), []
    with av.open(str(fast[0])) as container: packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    start = packets[30][0]
    held[start:start + packets[30][1]] = b'\x55'*packets[30][1]
    path.write_bytes(held)
    for how in OURS:
        assert_same(arrays(read_frames(path, [*range(24), *range(50, N)], how)), expected[:24] + expected[50:])
        with pytest.raises(MediaError, match=r'hole.mp4: frame 3\d cannot be decoded \(1 of the 2 asked for\): the file is damaged'): read_frames(path, [2, 36], how)


def audio(path):
    with av.open(str(path), 'w') as out:
        stream = out.add_stream('aac', rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), format='fltp', layout='mono')
        frame.sample_rate = 16_000
        for part in (stream.encode(frame), stream.encode(None)): out.mux(part)


def no_packets(path):
    held = copied(write_clip(path.with_name('whole.mp4'), drawn(5)), path.with_name('parts.mp4'), {'movflags': 'empty_moov+frag_keyframe'}).read_bytes()
    path.write_bytes(held[:held.index(b'moof') - 4])


BROKEN = {
    'absent.mp4': (lambda p: None, 'no such file; check data_root'),
    'folder.mp4': (lambda p: p.mkdir(), 'is a folder, not a video'),
    'empty.mp4': (lambda p: p.write_bytes(b''), r'is empty \(0 bytes\)'),
    'page.mp4': (lambda p: p.write_text('<html>404</html>'), 'not a video file'),
    'still.mp4': (lambda p: Image.new('RGB', (8, 8)).save(p, 'PNG'), 'not a video file'),
    'list.mp4': (lambda p: p.write_text('#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n'), 'not a video file'),
    'noise.webm': (lambda p: p.write_bytes(bytes(range(256))*40), 'not a video file'),
    'sound.mp4': (audio, 'holds sound but no video'),
    'hollow.mp4': (no_packets, 'has a video stream without frames'),
}


@pytest.mark.parametrize('name', BROKEN)
@pytest.mark.parametrize('reader', [lambda p: read_frames(p, [0]), video_info, frame_times, lambda p: read_frames(p, [0], 'decord')])
def test_a_fault_names_the_file(name, reader, tmp_path):
    make, why = BROKEN[name]
    make(tmp_path/name)
    with pytest.raises(MediaError, match=why) as caught: reader(tmp_path/name)
    assert str(tmp_path/name) in str(caught.value)


def test_an_index_at_the_end_that_is_cut_off(tmp_path):
    held = write_clip(tmp_path/'whole.mp4', drawn(20)).read_bytes()
    for k in (len(held)//2, len(held) - 700):
        (tmp_path/f'{k}.mp4').write_bytes(held[:k])
        with pytest.raises(MediaError, match='was cut short: its index, at the end of the file'): read_frames(tmp_path/f'{k}.mp4', [0])


@pytest.mark.parametrize('wanted', [[N], [-1], [0, 10**9]])
def test_an_index_outside_is_an_error(wanted, tmp_path):
    with pytest.raises(MediaError, match=rf'no frame {wanted[-1]}: it has {N} frames, 0 to {N - 1}'): read_frames(write_clip(tmp_path/'a.mp4', drawn()), wanted)


def test_wrong_arguments(tmp_path):
    path = write_clip(tmp_path/'a.mp4', drawn(4))
    with pytest.raises(ValueError, match='unknown how'): read_frames(path, [0], 'opencv')
    with pytest.raises(TypeError): read_frames(path, [.5])
    assert read_frames(path, []) == []
    assert read_frames(str(path), np.array([1]))[0].mode == 'RGB'


def test_the_index_is_read_again_when_the_file_changes(tmp_path):
    path = write_clip(tmp_path/'a.mp4', drawn(12))
    assert video_info(path).frames == 12
    write_clip(path, drawn(20))
    assert video_info(path) == VideoInfo(20, 30., 128, 72, 20/30)


def test_numbers_of_an_uneven_rate(tmp_path):
    info = video_info(write_clip(tmp_path/'ntsc.mp4', drawn(30), fps=30_000/1001))
    assert info.fps == 30_000/1001 and info.seconds == pytest.approx(30*1001/30_000)


def brute_force(wanted, keys, seek_cost):
    "The least cost over every choice of jumps."
    best = {0: 0.}
    for i in wanted:
        key = max(k for k in keys if k <= i)
        ahead = {at: cost + i + 1 - at for at, cost in best.items()}
        least = min([*ahead.values(), *(cost + seek_cost + i + 1 - key for cost in best.values())])
        best = {i + 1: least}
    return min(best.values())


@pytest.mark.parametrize('seed', range(20))
def test_no_plan_is_cheaper(seed):
    rng = np.random.default_rng(seed)
    keys = [0, *np.sort(rng.choice(np.arange(1, 200), 8, replace=False)).tolist()]
    wanted = np.sort(rng.choice(200, 9, replace=False)).tolist()
    for cost in (0., 3., 8., 40., 1e9):
        runs = plan_reads(wanted, keys, cost)
        assert [i for r in runs for i in r.wanted] == wanted and all(r.start == 0 or r.start in keys for r in runs)
        assert sum(r.n_decoded for r in runs) + cost*sum(r.start > 0 for r in runs) == pytest.approx(brute_force(wanted, keys, cost))


def test_a_plan_without_jumps_is_one_run():
    assert plan_reads([5, 90, 200], [0, 60, 120], float('inf')) == (Run(0, (5, 90, 200)),)


RSS = """
    import resource, sys
    from vlm_repro.core.video import read_frames, video_info
    path, how, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
    read_frames(path, [0], how)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    frames = video_info(path).frames
    kept = read_frames(path, [frames*(2*k + 1)//(2*n) for k in range(n)], how)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, kept[0].width*kept[0].height*3*n//1024)
"""


@pytest.fixture(scope='module')
def long(tmp_path_factory):
    "Four thousand frames: half a gigabyte, decoded."
    still = [np.roll(a, k, 1) for k, a in enumerate(drawn(10, (256, 160)))]
    return write_clip(tmp_path_factory.mktemp('long')/'long.mkv', (still[i//40 % 10] for i in range(4000)), gop=250)


@pytest.mark.parametrize('how', OURS)
def test_memory_follows_the_frames_asked(long, how):
    grown, asked = map(int, subprocess.run([sys.executable, '-c', textwrap.dedent(RSS), str(long), how, '16'], capture_output=True, text=True, check=True).stdout.split())
    assert 4000*256*160*3//1024 > 400_000, 'the whole film would be this large'
    assert grown < asked + 24_000


def test_importing_is_light():
    code = 'import sys, vlm_repro.core.video, vlm_repro.core.parts; print([m for m in ("torch", "decord", "av", "transformers", "matplotlib") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_torch_computes_after_decord_was_imported():
    code = 'import decord, torch; print((torch.ones(64, 64) @ torch.ones(64, 64)).sum().item()); print("nvblas" in open("/proc/self/maps").read())'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ['262144.0', 'False']), done.stderr


def test_the_same_frames_give_the_same_file(tmp_path):
    assert len({write_clip(tmp_path/f'{k}.mp4', drawn(40, (160, 90)), gop=12).read_bytes() for k in range(4)}) == 1


@pytest.mark.parametrize('frames, why', [
    ([np.zeros((4, 4), np.uint8)], 'must be RGB'), ([np.zeros((4, 4, 3))], 'must be RGB'), ([np.zeros((5, 4, 3), np.uint8)], 'must be even'),
    ([np.zeros((4, 4, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)], 'must have one size'), ([], 'no frames to write')])
def test_what_cannot_be_written(frames, why, tmp_path):
    with pytest.raises(ValueError, match=why): write_clip(tmp_path/'a.mp4', frames)
    assert not list(tmp_path.iterdir())


def test_parts_read_each_video_once(tmp_path, monkeypatch):
    from vlm_repro.core import parts as module
    a, b = write_clip(tmp_path/'a.mp4', drawn(30)), write_clip(tmp_path/'b.mp4', drawn(30, (64, 96)))
    Image.new('RGB', (10, 6), 'red').save(tmp_path/'c.png')
    asked = [{'image': str(a), 'frame': 20}, {'image': str(tmp_path/'c.png')}, {'image': str(b), 'frame': 1}, {'image': str(a), 'frame': 0}, {'image': str(a), 'frame': 20}]
    calls = []
    monkeypatch.setattr(module, 'read_frames', lambda path, indices: calls.append((Path(path).name, tuple(indices))) or read_frames(path, indices))
    for workers in (1, 3):
        calls.clear()
        got = open_parts(asked, workers)
        assert sorted(calls) == [('a.mp4', (20, 0, 20)), ('b.mp4', (1,))]
        assert_same(arrays(got), arrays([*read_frames(a, [20]), Image.new('RGB', (10, 6), 'red'), *read_frames(b, [1]), *read_frames(a, [0, 20])]))
    assert [part_size(p) for p in asked] == [im.size for im in got]
    assert set(HOWS) == {*OURS, 'decord'} and Fraction(video_info(a).fps) == 30
