"""Scenes become pictures: frames, top view and marks agree with the mesh, and broken files are named."""
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import trimesh
from PIL import Image

from vlm_repro.gpt4scene.marks import Mark, MarkStyle, draw_marks, mask_mark
from vlm_repro.gpt4scene.own import fuse_depth, read_folder, write_folder
from vlm_repro.gpt4scene.render import Caster, ceiling_height, pinhole, project, scaled, top_view
from vlm_repro.gpt4scene.rooms import SHADING, Piece, Room, looking, room_mesh, room_scene, sample_room
from vlm_repro.gpt4scene.scannet import read_objects, read_scene, write_scan
from vlm_repro.gpt4scene.sens import SensHeader, read_sens, write_sens
from vlm_repro.gpt4scene.space import Instances, Mesh, Scene, SceneError, boxes, on_mesh, points_mesh, read_mesh, write_mesh
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


def test_filters_leave_marks_out(made, views):
    kinds = {made[1].labels[m.number] for m in views.bev.marks}
    one = sorted(kinds)[0]
    without = make_views(*made, replace(OPTIONS, skip=frozenset({*SHELL, one})))
    assert {made[1].labels[m.number] for v in (without.bev, *without.frames) for m in v.marks} <= kinds - {one}
    large = make_views(*made, replace(OPTIONS, least_share=.05))
    assert all(m.share >= .05 for v in large.frames for m in v.marks)
    assert sum(len(v.marks) for v in large.frames) < sum(len(v.marks) for v in views.frames)


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
    assert np.allclose(boxes(scene, placed)[0, :3], points[[7, 9]].mean(0), atol=1e-4) and set(rows[placed.masks[0]]) == {7, 9}


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
