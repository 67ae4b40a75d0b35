"""Scenes become pictures: frames, top view and marks agree with the mesh, and broken files are named."""
import json
import struct
import tracemalloc
import zlib
from dataclasses import replace

import numpy as np
import pytest
import trimesh
from PIL import Image

from vlm_repro.core.jsonl import DataError
from vlm_repro.gpt4scene.marks import Mark, MarkStyle, draw_marks, mask_mark
from vlm_repro.gpt4scene.own import fuse_depth, read_folder, write_folder, write_masks
from vlm_repro.gpt4scene.proposals import class_names, read_mask3d, scene_attributes
from vlm_repro.gpt4scene.render import Caster, ceiling_height, pinhole, project, scaled, top_view
from vlm_repro.gpt4scene.rooms import SHADING, Piece, Room, looking, room_mesh, room_scene, sample_room
from vlm_repro.gpt4scene.scannet import read_objects, read_scene, write_scan
from vlm_repro.gpt4scene.sens import SensHeader, read_sens, write_sens
from vlm_repro.gpt4scene.space import Instances, Mesh, Scene, SceneError, boxes, check_camera, on_mesh, points_mesh, read_mesh, write_mesh
from vlm_repro.gpt4scene.views import ViewOptions, composite, image_list, make_views, plan_frames, save_views, with_poses

OPTIONS = ViewOptions(6, None, 196, MarkStyle(14), MarkStyle(15), shading=SHADING, least_share=.004, inside=True, cast=140)
SHELL = ("wall", "floor", "ceiling")


@pytest.fixture(scope="module")
def made():
    return room_scene("scene0007_00", sample_room(np.random.default_rng(7)), np.random.default_rng(7), 12)


@pytest.fixture(scope="module")
def views(made):
    return make_views(*made, OPTIONS)


def test_frames_are_chosen_by_the_published_rule():
    for total in (1, 5, 33, 100, 1513):
        for n in (1, 8, 32):
            wanted = [((i - 1) * total) // n + 1 for i in range(1, n + 1)]
            assert plan_frames(total, n) == sorted({w - 1 for w in wanted})
    assert len(plan_frames(5578, 32)) == 32
    for bad in ((0, 8), (8, 0)):
        with pytest.raises(ValueError):
            plan_frames(*bad)


def test_a_frame_without_a_pose_gives_way_and_this_is_said():
    posed = np.array([False, True, True, False, True])
    frames, notes = with_poses([0, 2, 4], posed, "s")
    assert frames == [1, 2, 4] and notes == ["s: frame 0 has no pose, frame 1 stands in for it"]
    with pytest.raises(SceneError, match="none of its 4 frames"):
        with_poses([0], np.zeros(4, bool), "s")
    lost = np.ones(300, bool)
    lost[100:160] = False
    frames, notes = with_poses(plan_frames(300, 32), lost, "s")
    assert len(frames) == 32 and lost[frames].all() and len(notes) == 7  # a stretch without poses costs no frame
    frames, notes = with_poses([0, 1, 2], np.array([True, False, False]), "s")
    assert frames == [0] and all("left out" in n for n in notes)


def test_rays_and_projection_are_inverse(made):
    scene, _ = made
    rays = pinhole(scene.poses[3], scene.intrinsics, (140, 112))
    hits = Caster(scene.mesh)(rays)
    at = rays.origins[::9, ::7] + rays.directions[::9, ::7] * hits.depth[::9, ::7, None]
    pixels, depth = project(at.reshape(-1, 3), scene.poses[3], scene.intrinsics)
    y, x = np.mgrid[0:112:9, 0:140:7]
    assert np.allclose(pixels, np.stack([x.ravel() + .5, y.ravel() + .5], -1), atol=1e-3)
    assert np.allclose(depth, hits.depth[::9, ::7].ravel(), atol=1e-4)


def test_a_ray_meets_what_a_test_of_every_triangle_finds(made):
    scene, _ = made
    rays = pinhole(scene.poses[0], scene.intrinsics, (140, 112))
    hits = Caster(scene.mesh)(rays)
    a, b, c = (scene.mesh.points[scene.mesh.faces[:, i]] for i in range(3))
    for y, x in ((50, 70), (90, 20), (20, 100), (100, 130)):  # Möller and Trumbore's test against every triangle
        origin, way = rays.origins[y, x], rays.directions[y, x]
        p = np.cross(way, c - a)
        scale = np.einsum("nk,nk->n", b - a, p)
        with np.errstate(divide="ignore", invalid="ignore"):
            u = np.einsum("nk,nk->n", origin - a, p) / scale
            q = np.cross(origin - a, b - a)
            v, t = q @ way / scale, np.einsum("nk,nk->n", c - a, q) / scale
        met = (np.abs(scale) > 1e-12) & (u >= -1e-9) & (v >= -1e-9) & (u + v <= 1 + 1e-9) & (t > 1e-6)
        assert np.isclose(t[met].min(), hits.depth[y, x], atol=1e-3)


def test_marks_lie_on_their_instance(made, views):
    scene, things = made
    assert sum(len(v.marks) for v in views.frames) >= 12
    for view in views.frames:
        rays = pinhole(scene.poses[view.frame], scene.intrinsics, view.image.size)
        depth = Caster(scene.mesh)(rays).depth
        for mark in view.marks:
            x, y = int(mark.x), int(mark.y)
            point = rays.origins[y, x] + rays.directions[y, x] * depth[y, x]
            gap = np.linalg.norm(scene.mesh.points[things.masks[mark.number]] - point, axis=1).min()
            others = min(np.linalg.norm(scene.mesh.points[m] - point, axis=1).min() for i, m in enumerate(things.masks) if i != mark.number and len(m))
            assert gap < .2 and gap < others + .2, (view.frame, mark)


def test_one_number_means_one_instance_everywhere(made, views):
    scene, things = made
    aligned = scene.aligned().mesh.points
    top = top_view(scene.aligned().mesh, 196, ceiling_height(scene.aligned().mesh))
    real = [i for i, label in enumerate(things.labels) if label not in SHELL]
    assert [m.number for m in views.bev.marks] == real
    for mark in views.bev.marks:
        pixels = top.pixels(aligned[things.masks[mark.number]])
        assert np.allclose((mark.x, mark.y), (pixels.min(0) + pixels.max(0)) / 2)
    for view in views.frames:
        numbers = [m.number for m in view.marks]
        assert numbers == sorted(set(numbers)) and set(numbers) <= set(real)
        for mark in view.marks:  # the pixel has the colour of the instance's own points
            pixel = np.asarray(view.image, float)[int(mark.y), int(mark.x)]
            own = np.unique(scene.mesh.colours[things.masks[mark.number]], axis=0).astype(float)
            cosine = (own @ pixel) / (np.linalg.norm(own, axis=1) * np.linalg.norm(pixel) + 1e-9)
            assert cosine.max() > .98, (view.frame, mark)


def screened(wall_between):
    pieces = (Piece("cabinet", "blue", 1.2, 0, 3), Piece("table", "red", -1.2, 0, 0))
    mesh, owner = room_mesh(Room(4.4, 4.4, pieces))
    parts = [np.flatnonzero(owner == i) for i in (0, 1)]
    if wall_between:
        screen = trimesh.creation.box((.1, 3.6, 2.4)).apply_translation((0, 0, 1.2))
        faces = np.concatenate([mesh.faces, np.asarray(screen.faces) + len(mesh.points)])
        mesh = Mesh(np.concatenate([mesh.points, screen.vertices]), faces, np.concatenate([mesh.colours, np.full((8, 3), 90, np.uint8)]))
    pose = looking((-2.1, .2, 1.5), (1, 0, .4))
    inner = np.array([[70., 0, 80], [0, 70, 60], [0, 0, 1]])
    image = Image.fromarray(Caster(mesh)(pinhole(pose, inner, (160, 120))).rgb)
    return Scene("s", mesh, [image], pose[None], inner), Instances(tuple(parts), ("cabinet", "table"))


def test_what_is_hidden_has_no_mark_unless_asked_for():
    options = replace(OPTIONS, n=1, bev_size=0)
    numbers = lambda scene, things, o: [m.number for m in make_views(scene, things, o).frames[0].marks]
    assert numbers(*screened(False), options) == [0, 1]
    assert numbers(*screened(True), options) == [1]
    assert numbers(*screened(True), replace(options, occlusion=False)) == [0, 1]


def test_without_the_occlusion_test_no_mark_is_lost():
    scene, things = room_scene("s", sample_room(np.random.default_rng(3)), np.random.default_rng(1), 4, (320, 240))
    shares = []
    for occlusion in (True, False):
        found = make_views(scene, things, ViewOptions(4, None, 0, occlusion=occlusion)).frames
        shares.append({(v.frame, m.number): m.share for v in found for m in v.marks})
    assert len(shares[0]) > 12 and all(shares[1].get(key, 0) >= share for key, share in shares[0].items())


def test_masks_of_another_mesh_are_refused(made):
    with pytest.raises(SceneError, match="of another mesh"):
        make_views(made[0], Instances((np.array([10**7]),), ("x",)), OPTIONS)


def test_filters_leave_marks_out(made, views):
    kinds = {made[1].labels[m.number] for m in views.bev.marks}
    one = sorted(kinds)[0]
    without = make_views(*made, replace(OPTIONS, skip=frozenset({*SHELL, one})))
    assert {made[1].labels[m.number] for v in (without.bev, *without.frames) for m in v.marks} <= kinds - {one}
    large = make_views(*made, replace(OPTIONS, least_share=.05))
    assert all(m.share >= .05 for v in large.frames for m in v.marks)
    assert sum(len(v.marks) for v in large.frames) < sum(len(v.marks) for v in views.frames)


def test_numbers_of_classes_are_named_before_they_are_filtered(tmp_path, made):
    """Mask3D writes numbers: without names no wall is left out, and this is said; with the table of labels the filter works."""
    scene, things = made
    numbers = {name: 10 * k + 1 for k, name in enumerate(dict.fromkeys(things.labels))}
    listed = write_masks(tmp_path / "s.txt", things, len(scene.mesh.points), {k: name for name, k in numbers.items()})
    table = tmp_path / "scannetv2-labels.combined.tsv"
    table.write_text("id\traw_category\tnyu40id\tnyu40class\n" + "".join(f"{k}\t{name}\t40\totherprop\n" for name, k in numbers.items()))
    bare, named = (read_mask3d(listed, len(scene.mesh.points), names) for names in (None, class_names(table)))
    assert bare.labels[-3:] == tuple(f"class {numbers[name]}" for name in SHELL) and named.labels == things.labels
    shown = [make_views(scene, found, replace(OPTIONS, n=1)) for found in (bare, named)]
    shell = set(range(len(things.labels) - 3, len(things.labels)))
    assert shell <= {m.number for m in shown[0].bev.marks} and not shell & {m.number for v in (shown[1].bev, *shown[1].frames) for m in v.marks}
    assert [f"{len(things.labels)} of {len(things.labels)} instances have the number of a class" in "".join(v.notes) for v in shown] == [True, False]
    assert not any("number of a class" in n for n in make_views(scene, bare, replace(OPTIONS, n=1, skip=frozenset())).notes)
    assert set(class_names(table, "nyu40id").values()) == {"otherprop"}
    with pytest.raises(ValueError, match="valid: id, nyu40id"):
        class_names(table, "nyu")
    with pytest.raises(DataError, match="no such file"):
        class_names(tmp_path / "gone.tsv")


def test_the_ceiling_is_gone_from_the_top_view(made):
    scene, things = made
    pictures = {}
    for name, labels in (("named", things.labels), ("found", ("",) * len(things.labels))):
        pictures[name] = np.asarray(make_views(scene, Instances(things.masks, labels), replace(OPTIONS, n=1)).bev.image, int)
    assert np.abs(pictures["named"] - pictures["found"]).mean() < 1
    kept = np.asarray(make_views(scene, things, replace(OPTIONS, n=1, ceiling=None)).bev.image, int)
    spread = lambda a: np.ptp(a, axis=-1).max()  # colourfulness: a ceiling is white
    assert spread(kept) < 20 and spread(pictures["named"]) > 100
    mesh = scene.aligned().mesh
    assert np.isclose(ceiling_height(mesh), mesh.points[:, 2].max(), atol=.01)
    low = Mesh(mesh.points, mesh.faces[(mesh.points[mesh.faces][:, :, 2] < 1.8).all(1)], mesh.colours)
    assert ceiling_height(low) is None


def test_a_corner_called_ceiling_does_not_save_the_rest_of_it(made):
    scene, things = made
    top = things.labels.index("ceiling")
    corner = replace(things, masks=(*things.masks[:top], things.masks[top][:30], *things.masks[top + 1:]))
    whole, part = (np.asarray(make_views(scene, found, replace(OPTIONS, n=1)).bev.image, int) for found in (things, corner))
    assert np.abs(whole - part).mean() < 1


def cloud_room(high=2.5):
    grid = np.linspace(0, 4, 81)
    level = lambda z: np.stack([*(a.ravel() for a in np.meshgrid(grid, grid)), np.full(81**2, z)], -1)
    side = np.stack([*(a.ravel() for a in np.meshgrid(grid, np.linspace(0, high, 51))), np.zeros(81 * 51)], -1)
    walls = [side[:, [0, 2, 1]], side[:, [0, 2, 1]] + (0, 4, 0), side[:, [2, 0, 1]], side[:, [2, 0, 1]] + (4, 0, 0)]
    box = np.stack([a.ravel() for a in np.meshgrid(np.linspace(1, 2, 21), np.linspace(1, 2, 21), np.linspace(0, .6, 13))], -1)
    parts = [level(0), level(high), *walls, box]
    paint = [(0, 200, 0), (200, 0, 0), *[(120, 120, 120)] * 4, (0, 0, 200)]
    return parts, np.repeat(paint, [len(p) for p in parts], 0)


def test_the_ceiling_of_a_cloud_is_gone_and_its_boxes_are_those_of_its_points():
    parts, colours = cloud_room()
    points = np.concatenate(parts)
    mesh, rows = points_mesh(points, colours, .03)
    assert np.isclose(ceiling_height(mesh), 2.47)
    open_above, _ = points_mesh(np.concatenate([parts[0], *parts[2:]]), np.delete(colours, np.arange(81**2, 2 * 81**2), 0), .03)
    assert ceiling_height(open_above) is None  # walls are none
    scene = Scene("s", mesh, [Image.new("RGB", (64, 48))], np.eye(4)[None], np.array([[50, 0, 32], [0, 50, 24], [0, 0, 1.]]), rows=rows)
    box = on_mesh(scene, Instances((np.arange(len(points) - len(parts[-1]), len(points)),), ("box",)))
    views = make_views(scene, box, ViewOptions(1, bev_size=64))
    picture = np.asarray(views.bev.image)
    share = lambda colour: (picture == colour).all(-1).mean()
    assert share((0, 200, 0)) > .3 and share((0, 0, 200)) > .02 and not share((200, 0, 0))  # floor and box, no ceiling
    assert np.allclose(boxes(scene, box), [[1.5, 1.5, .3, 1, 1, .6]], atol=1e-6)
    assert np.allclose(scene_attributes(scene, box).boxes, boxes(scene, box))  # those that are on the mesh stay as they are
    flat = on_mesh(scene, Instances((np.arange(9),), ("rug",)))
    assert any("0 (rug) is flat" in n for n in make_views(scene, flat, ViewOptions(1, bev_size=0)).notes)


def test_an_own_folder_of_depth_images_has_no_ceiling_in_its_top_view(tmp_path):
    inner, size = np.array([[40., 0, 50], [0, 40, 50], [0, 0, 1]]), (100, 100)
    shell = trimesh.creation.box((4, 4, 2.6))
    red = trimesh.creation.box((1, 1, .8)).apply_translation((1, 0, -.9))
    mesh = Mesh(np.concatenate([shell.vertices, red.vertices]), np.concatenate([shell.faces, np.asarray(red.faces) + 8]), np.repeat([[230, 230, 230], [220, 30, 30]], 8, 0).astype(np.uint8))
    caster, poses = Caster(mesh), np.stack([looking((-1., 0, 0), (-1 + np.cos(a), np.sin(a), h)) for a in np.linspace(0, 6, 9) for h in (-.8, .8)])
    seen = [caster(pinhole(p, inner, size)) for p in poses]
    scene = Scene("own", mesh, [Image.fromarray(h.rgb) for h in seen], poses, inner)
    back = read_folder(write_folder(tmp_path / "own", scene, lambda i: seen[i].depth))
    assert abs(ceiling_height(back.mesh) - 1.3) < .1
    picture = np.asarray(make_views(back, Instances((), ()), ViewOptions(1, None, 100)).bev.image, int)
    assert (picture[..., 0] - picture[..., 1] > 100).sum() > 200


def test_frames_keep_their_size_unless_told(made):
    small = make_views(*made, replace(OPTIONS, n=1, frame_size=(70, 56), bev_size=0)).frames[0]
    full = make_views(*made, replace(OPTIONS, n=1, bev_size=0)).frames[0]
    assert small.image.size == (70, 56) and full.image.size == (140, 112)
    assert np.allclose([(m.x * 2, m.y * 2) for m in small.marks], [(m.x, m.y) for m in full.marks])
    assert np.allclose(scaled(np.eye(3), (100, 50), (50, 25)), np.diag([.5, .5, 1]))


def test_marks_look_as_told():
    page = Image.new("RGB", (120, 80), (10, 120, 10))
    style = MarkStyle(30, (255, 255, 0), (0, 0, 200))
    one = np.asarray(draw_marks(page, [Mark(17, 60, 40, .1)], style))
    assert (one == (255, 255, 0)).all(-1).any() and (one == (0, 0, 200)).all(-1).any()
    assert (one[:5] == (10, 120, 10)).all() and (np.asarray(page) == (10, 120, 10)).all()
    larger = np.asarray(draw_marks(page, [Mark(17, 60, 40, .1)], replace(style, size=50)))
    changed = lambda a: (a != (10, 120, 10)).any(-1).sum()
    assert changed(larger) > 1.5 * changed(one)
    rim = np.asarray(draw_marks(page, [Mark(17, 60, 40, .1)], MarkStyle(30, (255, 255, 0), None, (200, 0, 0))))
    assert (rim == (200, 0, 0)).all(-1).any() and changed(rim) < changed(one)
    corner = np.asarray(draw_marks(page, [Mark(3, 119, 1, .1)], style))
    assert (corner[:40, 80:] != (10, 120, 10)).any()
    mask = np.zeros((10, 10), bool)
    mask[2:4, 6:9] = True
    mark = mask_mark(5, mask)
    assert (mark.x, mark.y, mark.share) == (7.5, 3., .06)


def test_pictures_are_written_in_both_arms(tmp_path, views):
    save_views(tmp_path, views)
    for bev in (True, False):
        lists = [image_list(views, marked, bev) for marked in (True, False)]
        assert len(lists[0]) == len(lists[1]) == 6 + bev and not set(lists[0]) & set(lists[1])
        assert all((tmp_path / p).is_file() for paths in lists for p in paths)
    assert "3D" in image_list(views)[0] and image_list(views, bev=False) == image_list(views)[1:]
    grid = composite([v.marked() for v in views.frames])
    assert grid.size == (4 * 140 + 6, 2 * 112 + 2)


def test_a_recording_comes_back(tmp_path, made):
    scene, _ = made
    camera = np.eye(4)
    camera[:3, :3] = scene.intrinsics
    poses = scene.poses.copy()
    poses[5] = -np.inf
    depths = [np.full((56, 70), 1 + .25 * i) for i in range(12)]
    header = SensHeader("demo", camera, camera, (140, 112), (70, 56), "png")
    sens = read_sens(write_sens(tmp_path / "a.sens", header, zip(poses, scene.frames, depths, strict=True)))
    assert len(sens) == 12 and not sens.problem and sens.header.sensor == "demo"
    assert np.isnan(sens.poses[5]).all() and np.allclose(np.delete(sens.poses, 5, 0), np.delete(poses, 5, 0), atol=1e-6)
    assert all(np.array_equal(sens.colour(i), scene.frames[i]) for i in (0, 5, 11))
    assert np.allclose(sens.depth(11), depths[11])


def test_a_recording_is_read_in_the_memory_of_one_frame(tmp_path):
    image, depth = Image.new("RGB", (320, 240), (9, 99, 199)), np.ones((240, 320))
    header = SensHeader("big", np.eye(4), np.eye(4), (320, 240), (320, 240), "raw", "raw")
    path = write_sens(tmp_path / "big.sens", header, ((np.eye(4), image, depth) for _ in range(60)))
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    sens = read_sens(path)
    assert sens.colour(59).getpixel((3, 3)) == (9, 99, 199) and sens.depth(30)[0, 0] == 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6


def test_frames_of_a_recording_stay_within_their_size(tmp_path):
    header = SensHeader("demo", np.eye(4), np.eye(4), (48, 32), (48, 32))
    path = write_sens(tmp_path / "a.sens", header, [(np.eye(4), Image.new("RGB", (48, 32)), np.ones((32, 48)))])
    at, colour, depth = read_sens(path).places[0]
    bomb, whole = zlib.compress(bytes(3 * 10**7)), path.read_bytes()
    path.write_bytes(whole[: at - 8] + struct.pack("<Q", len(bomb)) + whole[at : at + colour] + bomb + whole[at + colour + depth :])
    tracemalloc.start()
    with pytest.raises(SceneError, match="depth of frame 0"):
        read_sens(path).depth(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    path = write_sens(path, header, [(np.eye(4), Image.new("RGB", (24, 16)), np.ones((32, 48)))])
    with pytest.raises(SceneError, match="24x16, its header says 48x32"):
        read_sens(path).colour(0)


@pytest.fixture(scope="module")
def scan_folder(tmp_path_factory, made):
    scene, things = made
    folder = tmp_path_factory.mktemp("scans") / "scene0007_00"
    return write_scan(folder, scene, things, lambda i: np.full((56, 70), 2.), (70, 56))


def test_a_scan_comes_back_and_gives_the_same_marks(made, scan_folder):
    scene, things = made
    scan = read_scene(scan_folder)
    objects = read_objects(scan_folder, scan)
    assert objects.labels == things.labels and all(np.array_equal(a, b) for a, b in zip(objects.masks, things.masks, strict=True))
    assert np.allclose(boxes(scan, objects), boxes(scene, things), atol=1e-4)
    ours, theirs = make_views(*made, OPTIONS), make_views(scan, objects, OPTIONS)
    for a, b in zip((ours.bev, *ours.frames), (theirs.bev, *theirs.frames), strict=True):
        assert [m.number for m in a.marks] == [m.number for m in b.marks]
        assert np.abs(np.asarray(a.image, int) - np.asarray(b.image, int)).mean() < 4  # JPEG within the recording


@pytest.mark.parametrize("name", ["scene0007_00.sens", "scene0007_00_vh_clean_2.ply"])
def test_a_file_cut_anywhere_is_refused_by_its_name(scan_folder, name):
    path = scan_folder / name
    whole = path.read_bytes()
    ends = [0, 3, 30, 200, 700, *np.linspace(1000, len(whole) - 40, 9).astype(int), len(whole) - 9]
    try:
        for end in ends:
            path.write_bytes(whole[:end])
            with pytest.raises(SceneError, match=name.replace(".", r"\.")):
                read_scene(scan_folder)
    finally:
        path.write_bytes(whole)
    read_scene(scan_folder)


def test_what_is_whole_of_a_cut_recording_can_be_used(scan_folder):
    path = scan_folder / "scene0007_00.sens"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: len(whole) * 2 // 3])
        scan = read_scene(scan_folder, partial=True)
    finally:
        path.write_bytes(whole)
    assert 0 < len(scan.poses) < 12 and len(scan.frames) == len(scan.poses)
    assert "ends within frame" in make_views(scan, read_objects(scan_folder, scan), OPTIONS).notes[0]


@pytest.fixture()
def unpacked(tmp_path, made, scan_folder):
    """The scan as ScanNet's program unpacks it."""
    scene, _ = made
    folder = write_folder(tmp_path / "scene0007_00", replace(scene, poses=scene.poses[:2]), lambda i: np.full((112, 140), 2.))
    for file in scan_folder.iterdir():
        if file.suffix != ".sens":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_an_unpacked_scan_is_the_same_by_any_path(unpacked, made, monkeypatch):
    monkeypatch.chdir(unpacked.parent)
    for path in (unpacked, "scene0007_00", "./scene0007_00/../scene0007_00"):
        scan = read_scene(path)
        assert len(scan.mesh.points) == len(made[0].mesh.points) and len(read_objects(path, scan).masks) == len(made[1].masks)
    monkeypatch.chdir(unpacked)
    assert read_scene(".").name == "scene0007_00" and read_folder(".").name == "scene0007_00"
    (unpacked / "scene0007_00_vh_clean_2.ply").unlink()
    with pytest.raises(SceneError, match="scene0007_00_vh_clean_2.ply: no such file"):
        read_scene(unpacked)


def test_a_camera_of_another_size_of_picture_is_refused(unpacked):
    for path in (unpacked / "color").iterdir():
        Image.open(path).resize((70, 56)).save(path)
    with pytest.raises(SceneError, match="intrinsics.txt: the inner parameters have their middle at .* but frames are 70x56"):
        read_scene(unpacked)
    check_camera(np.array([[900., 0, 700], [0, 900, 300], [0, 0, 1]]), (1000, 600), "a part of a picture")


@pytest.mark.parametrize(("change", "message"), [
    (dict(objectId=-3), "objectId is -3"), (dict(objectId=1), "object 1 twice"), (dict(objectId="x"), "objectId is 'x'"), (dict(objectId=None), "objectId is None"),
    (dict(objectId=10**9), "objectId is 1000000000"), (dict(segments=None), "segments of object 0"), (dict(segments=["1"]), "segments of object 0")])
def test_an_aggregation_that_is_wrong_is_named(unpacked, change, message):
    scan, path = read_scene(unpacked), unpacked / "scene0007_00.aggregation.json"
    held = json.loads(path.read_text())
    held["segGroups"][0].update(change)
    path.write_text(json.dumps(held))
    with pytest.raises(SceneError, match=f"scene0007_00.aggregation.json.* {message}"):
        read_objects(unpacked, scan)


def test_the_aggregation_of_the_finer_mesh_is_not_taken(unpacked):
    scan, path = read_scene(unpacked), unpacked / "scene0007_00.aggregation.json"
    whole = path.read_text()
    path.write_text(whole.replace("_vh_clean_2.0.010000", "_vh_clean"))
    with pytest.raises(SceneError, match="not of those in scene0007_00_vh_clean_2"):
        read_objects(unpacked, scan)
    path.rename(unpacked / "scene0007_00_vh_clean.aggregation.json")
    with pytest.raises(SceneError, match="finer mesh"):
        read_objects(unpacked, scan)


def test_a_mesh_with_points_that_are_no_numbers_is_refused(tmp_path, made):
    mesh = made[0].mesh
    points = mesh.points.copy()
    points[5] = np.nan
    with pytest.raises(SceneError, match="a.ply: 1 of .* row 5"):
        read_mesh(write_mesh(tmp_path / "a.ply", replace(mesh, points=points)))


def test_depth_that_is_no_depth_is_named(tmp_path, made):
    scene = replace(made[0], poses=made[0].poses[:2])
    folder = write_folder(tmp_path / "own", scene, lambda i: np.full((56, 70), 2.))
    for spoil, message in ((lambda p: p.write_bytes(b"xx"), "000001.png cannot be read"), (Image.new("RGB", (70, 56)).save, "kind RGB"), (Image.new("L", (70, 56)).save, "kind L")):
        spoil(folder / "depth" / "000001.png")
        with pytest.raises(SceneError, match=message):
            read_folder(folder)


def test_instances_without_volume_are_named(made):
    scene, _ = made
    flat = np.flatnonzero(scene.aligned().mesh.points[:, 2] == 0)[:20]
    odd = Instances((np.arange(0), flat), ("lamp", "rug"))
    assert not boxes(scene, odd)[0].any()
    views = make_views(scene, odd, replace(OPTIONS, n=1))
    assert [m.number for m in views.bev.marks] == [1]
    assert any("0 (lamp) has no points" in n for n in views.notes) and any("1 (rug) is flat" in n for n in views.notes)


def test_points_serve_like_a_mesh(tmp_path):
    rng = np.random.default_rng(0)
    points, colours = rng.uniform(size=(50, 3)), rng.integers(0, 255, (50, 3)).astype(np.uint8)
    mesh, rows = read_mesh(write_mesh(tmp_path / "dots.ply", Mesh(points, np.zeros((0, 3), int), colours)))
    assert len(mesh.faces) == 400 and np.array_equal(mesh.colours, colours[rows])
    scene = Scene("s", mesh, [], np.full((1, 4, 4), np.nan), np.eye(3), rows=rows)
    placed = on_mesh(scene, Instances((np.array([7, 9]),), ("ball",)))
    assert np.allclose(boxes(scene, placed)[0, :3], points[[7, 9]].mean(0), atol=1e-4) and np.allclose(boxes(scene, placed)[0, 3:], np.ptp(points[[7, 9]], axis=0), atol=1e-4) and set(rows[placed.masks[0]]) == {7, 9}


def test_depth_images_are_put_together():
    depth = np.full((40, 50), 2.)
    image = Image.new("RGB", (50, 40), (200, 10, 10))
    inner = np.array([[40., 0, 25], [0, 40, 20], [0, 0, 1]])
    moved = np.eye(4)
    moved[0, 3] = .5
    points, colours = fuse_depth([(np.eye(4), depth, image), (moved, depth, image)], inner, .05)
    assert np.allclose(points[:, 2], 2) and (colours == (200, 10, 10)).all()
    assert np.isclose(np.ptp(points[:, 0]), 3., atol=.06)  # 2.5 m seen by each, half a metre apart
    assert len(np.unique(np.floor(points / .05), axis=0)) >= len(points) - 2
    assert len(points_mesh(points, colours)[0].faces) == 8 * len(points)


def test_an_own_folder_is_read_and_what_is_wrong_is_named(tmp_path, made):
    scene, _ = made
    few = replace(scene, poses=scene.poses[:3])
    folder = write_folder(tmp_path / "mine", few)
    back = read_folder(folder)
    assert len(back.frames) == 3 and np.allclose(back.poses, few.poses) and np.allclose(back.axis_alignment, few.axis_alignment)
    for name, text, message in (("pose/000001.txt", "a b", "could not convert"), ("pose/000001.txt", "2 0 0 0 0 2 0 0 0 0 2 0 0 0 0 1", "no pose"), ("intrinsics.txt", "1 2", "holds 2 numbers instead of 9 or 16")):
        kept = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(SceneError, match=message):
            read_folder(folder)
        (folder / name).write_text(kept)
    (folder / "pose/000001.txt").write_text("inf " * 16)
    assert read_folder(folder).posed().tolist() == [True, False, True]
