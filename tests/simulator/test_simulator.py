"""The simulator: the same log from the same seed, road users that never share a place, and truths that agree with what was measured."""

from __future__ import annotations

import hashlib
import io
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sensors.errors import UsageError
from sensors.formats.images import decode
from sensors.geometry import inverse, pose_at, project, transform_points
from sensors.records import Log, RecordError
from sensors.simulator.lidar import MODELS, beams, column_times
from sensors.simulator.log import simulate
from sensors.simulator.realism import likeness
from sensors.simulator.scene import CATEGORIES, CATEGORY_INDEX, FIRST_MOVER, SKY
from sensors.simulator.shapes import MATERIAL_INDEX
from sensors.simulator.streets import Street, build_street, rect_overlap
from sensors.simulator.traffic import EGO_BOX, Traffic, drive, parked

Array = NDArray[Any]

MOVERS = [CATEGORY_INDEX[name] for name in ("car", "van", "truck", "cyclist", "pedestrian")]


def _digest(log: Log, index: int) -> str:
    sweep = log.read_sweep(log.reference_lidar, index)
    parts = (sweep.points, sweep.intensity, sweep.ring, sweep.time_ns)
    return hashlib.sha256(b"".join(np.ascontiguousarray(p).tobytes() for p in parts)).hexdigest()


@pytest.fixture(scope="module")
def log() -> Log:
    """A log with a moving ego and several movers, scanner and a front camera."""
    return simulate(0, seconds=1.0, cameras="front")


@pytest.fixture(scope="module")
def fast() -> Log:
    return simulate(2, seconds=0.5)


@pytest.fixture(scope="module")
def planned() -> list[tuple[Street, Traffic]]:
    """Streets and their traffic, not rendered."""
    return [drive(build_street(seed, 55.0), 2.5) for seed in range(20, 34)]


def test_reading_is_a_function_of_seed_and_index_alone(log: Log) -> None:
    forward = [_digest(log, i) for i in range(4)]
    fresh = pickle.loads(pickle.dumps(log))
    assert [_digest(fresh, i) for i in (3, 2, 1, 0)] == forward[::-1]
    image = log.read_image("front", 1).encoded
    assert image == simulate(0, seconds=1.0, cameras="front").read_image("front", 1).encoded
    assert _digest(simulate(1, seconds=1.0), 0) != forward[0]
    assert len(set(forward)) == 4


def test_a_log_is_what_the_records_say(log: Log) -> None:
    assert log.id == "synthetic/street-000000" and log.dataset == "synthetic" and log.licence == "CC0-1.0"
    assert log.poses is not None and log.poses.source == "log" and len(log.sweep_stamps_ns["hdl64"]) == 10
    sweep = log.read_sweep("hdl64", 5)
    assert sweep.ring is not None and sweep.time_ns is not None and not sweep.deskewed
    assert sweep.intensity.min() >= 0 and sweep.intensity.max() <= 1 and np.ptp(sweep.intensity) > 0.5
    assert 95_000 < len(sweep.points) < 133_312 and sweep.ring.max() == 63
    assert np.abs(sweep.time_ns).max() <= 50_000_000 and (np.diff(sweep.time_ns) >= 0).all()
    ahead = np.abs(np.arctan2(sweep.points[:, 1], sweep.points[:, 0])) < 0.02
    assert np.abs(sweep.time_ns[ahead]).max() < 1_000_000  # the stamp is when the scanner faces forward
    left = np.abs(np.arctan2(sweep.points[:, 1], sweep.points[:, 0]) - np.pi / 2) < 0.02
    assert np.abs(sweep.time_ns[left] + 25_000_000).max() < 1_000_000  # and it turns clockwise
    stamps, speed = log.measured_speed or (np.zeros(0), np.zeros(0))
    poses = pose_at(log.poses, stamps[2:-2])
    along = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1) / (np.diff(stamps[2:-2]) / 1e9)
    assert np.abs(along - (speed[2:-3] + speed[3:-2]) / 2).max() < 0.4


def test_every_keeps_each_kth_turn() -> None:
    every, whole = simulate(3, seconds=1.0, every=5), simulate(3, seconds=1.0)
    assert every.sweep_stamps_ns["hdl64"].shape == (2,) and every.lidars["hdl64"].rate_hz == 2.0
    assert abs(int(every.sweep_stamps_ns["hdl64"][1] - whole.sweep_stamps_ns["hdl64"][5])) <= 400_000


@pytest.fixture(scope="module")
def crowded() -> list[tuple[Street, Traffic]]:
    """Trunk roads, and other streets with dense traffic, not rendered."""
    streets = [street for street in (build_street(seed, 44.0) for seed in range(40, 90)) if street.density]
    return [drive(street, 2.0) for street in streets]


def _ego_outline(traffic: Traffic) -> Array:
    poses = traffic.world_from_ego
    yaw = np.arctan2(poses[:, 1, 0], poses[:, 0, 0])
    middle = poses[:, :2, 3] + (EGO_BOX[0] + EGO_BOX[3]) / 2 * np.stack((np.cos(yaw), np.sin(yaw)), 1)
    size = np.broadcast_to((EGO_BOX[3] - EGO_BOX[0], EGO_BOX[4] - EGO_BOX[1]), (len(yaw), 2))
    return np.concatenate((middle, yaw[:, None], size), 1)


@pytest.mark.parametrize("which", ("planned", "crowded"))
def test_nobody_drives_through_anybody(which: str, request: pytest.FixtureRequest) -> None:
    """At every 0.02 s: movers, ego vehicle, and all that stands there keep apart."""
    streets: list[tuple[Street, Traffic]] = request.getfixturevalue(which)
    several = 0
    for street, traffic in streets:
        outlines = [_ego_outline(traffic), *(actor.rects for actor in traffic.actors)]
        things = np.array([t.rect for t in street.things])
        for i, a in enumerate(outlines):
            for b in outlines[:i]:
                assert not rect_overlap(a, b).any()
            near = np.hypot(*(things[:, :2] - a[0, :2]).T) < 80
            assert not rect_overlap(things[near][:, None], a[None, ::2]).any()
        several += sum(float(actor.speed.max()) > 0.5 for actor in traffic.actors) >= 4
    assert several >= (len(streets) if which == "planned" else 0.9 * len(streets))  # a few stand in a jam


def test_trunk_roads_are_divided_and_nobody_is_on_the_wrong_side(crowded: list[tuple[Street, Traffic]]) -> None:
    trunks = [(street, traffic) for street, traffic in crowded if street.style == "trunk"]
    assert len(trunks) >= 6 and len({street.median for street, _ in trunks}) >= 3
    for street, traffic in trunks:
        road = street.roads[0]
        assert len(street.roads) == 1 and not street.junctions and 250 * np.abs(np.diff(road.heading)).max() <= 1.0
        assert {actor.kind for actor in traffic.actors} <= {"car", "van", "truck"}
        ego = _ego_outline(traffic)
        _, u = road.locate(ego[:, :2], 40.0)
        lanes = [road.lane_offset(1, lane) for lane in range(road.lanes)]
        assert np.abs(u[:, None] - lanes).min(1).max() < 0.4 and np.ptp(u) < 0.4  # in one lane, along it
        ways = set()
        for actor in traffic.actors:
            s, u = road.locate(np.stack((actor.x, actor.y), 1), 40.0)
            s, u, yaw = (v[(s > road.start) & (s < road.stop)] for v in (s, u, actor.yaw))
            if not len(s):
                continue
            way = 1 if np.cos(yaw[0] - np.interp(s[0], road.start + np.arange(len(road.heading)), road.heading)) > 0 else -1
            assert (way * u < -road.median / 2).all() and (np.abs(u) < road.half_width).all()
            ways.add(way)
        assert ways == {1, -1}


def test_dense_traffic_is_dense_goes_beside_the_ego_and_makes_it_brake(crowded: list[tuple[Street, Traffic]]) -> None:
    around, beside, braked, speeds = [], 0, 0, []
    for _, traffic in crowded:
        x, y, yaw, *_ = _ego_outline(traffic)[15]
        moving = [a for a in traffic.actors if a.speed[15] > 0.5 and np.hypot(a.x[15] - x, a.y[15] - y) < 60]
        around.append(len(moving))
        for a in moving:
            dx, dy = a.x[15] - x, a.y[15] - y
            along, across = np.cos(yaw) * dx + np.sin(yaw) * dy, -np.sin(yaw) * dx + np.cos(yaw) * dy
            beside += bool(abs(along) < 5 and 2.0 < abs(across) < 5 and np.cos(a.yaw[15] - yaw) > 0.9)
        braked += bool(traffic.speed[15] - traffic.speed[-15] > 1.5)
        speeds.append(float(traffic.speed[15]))
    assert sum(n >= 12 for n in around) >= len(around) / 3
    assert beside >= 3 and braked >= 3 and min(speeds) < 5 and max(speeds) > 15


def test_about_a_fifth_of_the_streets_are_trunk_roads_and_some_others_are_crowded() -> None:
    streets = [build_street(seed, 5.0) for seed in range(40)]
    trunk = sum(street.style == "trunk" for street in streets)
    assert 3 <= trunk <= 15 and 1 <= sum(street.density is not None for street in streets) - trunk <= 10


def test_rectangles_overlap_where_a_fine_grid_of_points_says_so() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = (np.concatenate((rng.uniform(-2.5, 2.5, 2), [rng.uniform(-4, 4)], rng.uniform(0.5, 4, 2))) for _ in range(2))
        gx, gy = np.meshgrid(np.linspace(-0.5, 0.5, 60) * a[3], np.linspace(-0.5, 0.5, 60) * a[4])
        x, y = a[0] + np.cos(a[2]) * gx - np.sin(a[2]) * gy - b[0], a[1] + np.sin(a[2]) * gx + np.cos(a[2]) * gy - b[1]
        inside = (np.abs(np.cos(b[2]) * x + np.sin(b[2]) * y) <= b[3] / 2) & (np.abs(-np.sin(b[2]) * x + np.cos(b[2]) * y) <= b[4] / 2)
        if inside.any():
            assert rect_overlap(a, b)
        elif rect_overlap(a, b):  # then only by less than the grid's step
            assert not rect_overlap(a, b, -0.15)


def test_streets_differ_in_kind_and_motion(planned: list[tuple[Street, Traffic]]) -> None:
    assert len({street.style for street, _ in planned}) >= 3
    starts = [float(traffic.speed[0]) for _, traffic in planned]
    assert min(starts) < 3 and max(starts) > 9
    assert sum(float(np.ptp(traffic.speed)) > 2.0 for _, traffic in planned) >= 3  # brakes or pulls away
    kinds = {actor.kind for _, traffic in planned for actor in traffic.actors}
    assert kinds == {"car", "van", "truck", "cyclist", "pedestrian"}
    crossing = 0
    for _, traffic in planned:
        ego = traffic.world_from_ego
        for actor in traffic.actors:
            inside = inverse(ego) @ np.stack((actor.x, actor.y, actor.z, np.ones(len(actor.x))), 1)[..., None]
            side = inside[(inside[:, 0, 0] > 3) & (inside[:, 0, 0] < 60), 1, 0]
            crossing += len(side) > 0 and side.min() < -1.5 and side.max() > 1.5
    assert crossing >= 3


def test_deskewing_by_the_true_motion_gives_what_a_standing_scanner_would_see(fast: Log) -> None:
    sweep = fast.read_sweep("hdl64", 2)
    labels = fast.open_labels()
    assert labels is not None and fast.poses is not None and sweep.time_ns is not None
    truth = labels.read_point_labels("hdl64", 2)
    assert truth is not None
    scanner = fast.lidars["hdl64"].ego_from_lidar
    simulation = fast.read_sweep.__self__  # type: ignore[attr-defined]
    still = np.flatnonzero(np.isin(truth.category, [CATEGORY_INDEX[n] for n in ("pole", "clutter", "fence", "car")]) & ~truth.moving)
    assert len(still) > 300
    world_at_own = pose_at(fast.poses, sweep.stamp_ns + sweep.time_ns[still].astype(np.int64)) @ scanner
    world_at_stamp = (pose_at(fast.poses, sweep.stamp_ns) @ scanner)[0]
    points = sweep.points[still].astype(np.float64)
    moved = np.einsum("nij,nj->ni", world_at_own[:, :3, :3], points) + world_at_own[:, :3, 3]
    skewed = points @ world_at_stamp[:3, :3].T + world_at_stamp[:3, 3]

    def met(places: Array) -> float:
        """Share of places at which a ray from the standing scanner ends, within 0.1 m (thin things tell: past them it goes on)."""
        direction = places - world_at_stamp[:3, 3]
        length = np.linalg.norm(direction, axis=1)
        hits = simulation.scene.cast(
            np.repeat(world_at_stamp[None, :3, 3], len(places), 0).astype(np.float32),
            (direction / length[:, None]).astype(np.float32),
            np.full(len(places), float(simulation._seconds(sweep.stamp_ns))),
        )
        return float((np.abs(hits.range_m - length) < 0.1).mean())

    assert met(moved) > 0.8
    assert met(skewed) < 0.75 * met(moved)


def test_movers_are_seen_where_they_were_when_the_ray_left(log: Log) -> None:
    """Points on a mover, moved into its own frame at their own times, lie in its box; at the stamp's pose alone the fast ones do not."""
    labels = log.open_labels()
    assert labels is not None and log.poses is not None
    simulation = log.read_sweep.__self__  # type: ignore[attr-defined]
    checked = 0
    for index in (1, 5, 8):
        sweep, truth = log.read_sweep("hdl64", index), labels.read_point_labels("hdl64", index)
        assert truth is not None and sweep.time_ns is not None and len(truth.category) == len(sweep.points)
        own = sweep.stamp_ns + sweep.time_ns.astype(np.int64)
        world = pose_at(log.poses, own) @ log.lidars["hdl64"].ego_from_lidar
        places = np.einsum("nij,nj->ni", world[:, :3, :3], sweep.points.astype(np.float64)) + world[:, :3, 3]
        for number, actor in enumerate(simulation.traffic.actors):
            mine = np.flatnonzero(truth.instance == FIRST_MOVER + number)
            if len(mine) < 20:
                continue
            x, y, z, yaw, _, speed = actor.at(simulation._seconds(own[mine]))
            d = places[mine] - np.stack((x, y, z), 1)
            along, across = np.cos(yaw) * d[:, 0] + np.sin(yaw) * d[:, 1], -np.sin(yaw) * d[:, 0] + np.cos(yaw) * d[:, 1]
            size = np.array(actor.size)
            assert (np.abs(along) < size[0] / 2 + 0.15).mean() > 0.99 and (np.abs(across) < size[1] / 2 + 0.15).mean() > 0.99
            assert (truth.category[mine] == CATEGORY_INDEX[actor.kind]).all()
            assert (truth.moving[mine] == (float(actor.at(simulation._seconds(sweep.stamp_ns))[5]) > 0.2)).all()
            checked += bool(speed.max() > 1.0)
    assert checked >= 3


def test_points_called_a_car_lie_in_a_box_of_that_sweep_and_nothing_else_does(log: Log) -> None:
    labels = log.open_labels()
    assert labels is not None and labels.categories == CATEGORIES and labels.complete_fov_rad == pytest.approx(np.pi)
    sweep, truth = log.read_sweep("hdl64", 4), labels.read_point_labels("hdl64", 4)
    assert truth is not None
    assert {b.stamp_ns for b in labels.boxes} == set(log.sweep_stamps_ns["hdl64"].tolist())
    points = transform_points(log.lidars["hdl64"].ego_from_lidar, sweep.points).astype(np.float64)
    grown, core = np.zeros(len(points), bool), np.zeros(len(points), bool)
    fastest = 0.0
    for box in labels.boxes:
        if box.stamp_ns != sweep.stamp_ns:
            continue
        assert box.velocity is not None and box.category in CATEGORIES
        fastest = max(fastest, float(np.hypot(*box.velocity)))
        slack = 0.3 + 0.05 * (float(np.hypot(*box.velocity)) + 10)  # neither the points nor the boxes are deskewed here
        d = points - box.centre
        c, s = np.cos(box.yaw_rad), np.sin(box.yaw_rad)
        local = np.abs(np.stack((c * d[:, 0] + s * d[:, 1], -s * d[:, 0] + c * d[:, 1], d[:, 2]), 1))
        grown |= (local < box.size / 2 + (slack, slack, 0.3)).all(1)
        if np.hypot(*box.velocity) == 0.0:
            core |= (local < box.size / 2 - (0.8, 0.35, 0.3)).all(1)
    on_vehicle = np.isin(truth.category, MOVERS)
    assert on_vehicle.sum() > 500 and grown[on_vehicle].mean() > 0.995
    assert fastest > 2.0
    assert np.isin(truth.category[core], MOVERS).all()
    low = np.array(log.ego_box[:3])
    high = np.array(log.ego_box[3:])
    assert not ((points > low) & (points < high)).all(1).any()


def test_velocities_are_how_the_boxes_move(log: Log) -> None:
    labels = log.open_labels()
    assert labels is not None and log.poses is not None
    tracks: dict[str, list[tuple[int, Array, Array]]] = {}
    for box in labels.boxes:
        pose = pose_at(log.poses, box.stamp_ns)[0]
        assert box.velocity is not None
        place = pose[:3, :3] @ box.centre + pose[:3, 3]
        tracks.setdefault(box.track, []).append((box.stamp_ns, place, pose[:2, :2] @ box.velocity))
    moved = 0
    for rows in tracks.values():
        for (t0, p0, v0), (t1, p1, v1) in pairwise(rows):
            speed = (p1 - p0)[:2] / ((t1 - t0) / 1e9)
            assert np.abs(speed - (v0 + v1) / 2).max() < 0.25
            moved += bool(np.hypot(*speed) > 1)
    assert moved > 20


def test_what_stands_in_front_hides_what_is_behind(log: Log) -> None:
    """No ray goes through a parked car: a return beyond a box that the ray enters deeply belongs to nothing."""
    simulation = log.read_sweep.__self__  # type: ignore[attr-defined]
    scene = simulation.scene
    thing = next(t for t in parked(simulation.street) if t.kind == "car" and any(t is s for s in scene.things))
    z = float(scene.base[scene.things.index(thing)])
    for angle in np.linspace(0, 2 * np.pi, 13):
        direction = np.array((np.cos(angle), np.sin(angle), 0.0), np.float32)
        middle = np.array((thing.x, thing.y, z + 0.6), np.float32)
        reach = float(np.hypot(thing.length, thing.width) / 2)
        hits = scene.cast((middle - direction * (reach + 0.3))[None], direction[None], np.zeros(1))
        assert hits.range_m[0] < reach + 0.3  # before its middle


def test_the_scanner_looks_through_windows_and_not_through_doors(log: Log) -> None:
    """Rays at a slant through parked cars: by the height of the windows a good part of them ends behind the first pane, by that of the doors
    none does; what passed a pane comes back weaker."""
    scene = log.read_sweep.__self__.scene  # type: ignore[attr-defined]
    cars = [t for t in parked(log.read_sweep.__self__.street) if t.kind == "car" and any(t is s for s in scene.things)][:12]  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    went: dict[str, list[float]] = {"door": [], "window": []}
    for thing in cars:
        base = float(scene.base[scene.things.index(thing)])
        heading = thing.yaw + np.radians(rng.uniform(30, 60, 100) * rng.choice((-1, 1), 100) + 180 * rng.integers(0, 2, 100))
        directions = np.stack((np.cos(heading), np.sin(heading), np.zeros(100)), 1).astype(np.float32)
        for part, height in (("door", 0.4), ("window", 0.75)):
            middle = np.array((thing.x, thing.y, base + height * thing.height))
            origins = middle - directions * 3.0
            first = scene.cast(origins, directions, np.zeros(100))
            last, light = scene.cast_through(origins, directions, np.zeros(100), np.random.default_rng(1))
            at = first.range_m < 3.0
            passed = last.range_m > first.range_m + 0.005
            assert (passed == (light < 1)).all() and (light > 0).all()
            np.testing.assert_array_equal(last.range_m[~passed], first.range_m[~passed])
            assert (first.material[passed] == MATERIAL_INDEX["glass"]).all()
            went[part] += passed[at].tolist()
    assert len(went["door"]) > 200 and len(went["window"]) > 200
    assert np.mean(went["door"]) == 0.0
    assert 0.3 < np.mean(went["window"]) < 0.95


def test_camera_truth_agrees_with_the_scanner(log: Log) -> None:
    """LiDAR points projected into the picture have the depth and the class that the camera's truth says, but for edges."""
    labels = log.open_labels()
    assert labels is not None and log.poses is not None
    sweep, truth = log.read_sweep("hdl64", 3), labels.read_point_labels("hdl64", 3)
    seen = labels.read_camera_truth("front", 3)
    assert seen is not None and truth is not None and sweep.time_ns is not None
    depth, category = seen
    camera, stamp = log.cameras["front"], int(log.image_stamps_ns["front"][3])
    assert depth.shape == category.shape == (camera.height, camera.width) and abs(stamp - sweep.stamp_ns) < 500_000
    world = pose_at(log.poses, sweep.stamp_ns + sweep.time_ns.astype(np.int64)) @ log.lidars["hdl64"].ego_from_lidar
    places = np.einsum("nij,nj->ni", world[:, :3, :3], sweep.points.astype(np.float64)) + world[:, :3, 3]
    pixels, z, ok = project(camera, transform_points(inverse(pose_at(log.poses, stamp)[0] @ camera.ego_from_camera), places))
    assert ok.sum() > 5000
    column, row = np.round(pixels[ok]).astype(int).T
    solid = np.isin(truth.category[ok], [CATEGORY_INDEX[n] for n in ("road", "building", "sidewalk", "car", "van")])
    relative = np.abs(depth[row, column] - z[ok]) / z[ok]
    assert np.median(relative[solid]) < 0.02 and (relative[solid] < 0.1).mean() > 0.85
    assert (category[row, column] == truth.category[ok])[solid].mean() > 0.85
    assert ((category == SKY) == ~np.isfinite(depth)).all() and 0 < (category == SKY).mean() < 0.6
    picture = decode(log.read_image("front", 3))
    assert picture.shape == (camera.height, camera.width, 3) and picture.std() > 25
    sky = picture[category == SKY].astype(int)
    assert (sky[:, 2] - sky[:, 0]).mean() > 10  # blue


def test_missing_rays_have_nothing_on_them(log: Log) -> None:
    labels = log.open_labels()
    assert labels is not None
    missing = labels.read_missing_rays("hdl64", 2)
    assert missing is not None and missing.dtype == np.float32 and len(missing) > 50
    assert np.abs(np.linalg.norm(missing, axis=1) - 1).max() < 1e-5
    assert (missing[:, 2] > np.sin(np.radians(-8))).all()  # the ground ends those that look down
    sweep = log.read_sweep("hdl64", 2)
    seen = {tuple(row) for row in np.round(sweep.points / np.linalg.norm(sweep.points, axis=1, keepdims=True), 5).tolist()}
    assert not seen & {tuple(row) for row in np.round(missing, 5).tolist()}


def test_six_cameras_are_triggered_as_the_scanner_passes_them() -> None:
    log = simulate(4, seconds=0.3, lidar="hdl32", cameras="six")
    assert len(log.cameras) == 6 and log.lidars["hdl32"].beams == 32
    sweep = log.read_sweep("hdl32", 1)
    assert sweep.ring is not None and sweep.ring.max() == 31 and 20_000 < len(sweep.points) < 34_720
    assert abs(int(log.image_stamps_ns["cam_front"][1] - sweep.stamp_ns)) < 1_000_000
    assert int(sweep.stamp_ns - log.image_stamps_ns["cam_front_left"][1]) == pytest.approx(55 / 360 * 1e8, rel=0.02)
    image = log.read_image("cam_back", 1)
    assert decode(image).shape == (225, 400, 3)
    with pytest.raises(RecordError, match="no image 3 of cam_back"):
        log.read_image("cam_back", 3)
    with pytest.raises(RecordError, match="no sweep 0 of hdl64"):
        log.read_sweep("hdl64", 0)


@pytest.mark.parametrize(
    "wrong", ({"lidar": "vlp16"}, {"cameras": "rear"}, {"seconds": 0.0}, {"every": 0}, {"rate_hz": 0.1}), ids=lambda w: next(iter(w))
)
def test_what_makes_no_sense_is_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"^simulator: [^\n]+$"):
        simulate(0, **wrong)


def test_beams_turn_clockwise_from_the_rear_and_face_forward_in_the_middle() -> None:
    model = MODELS["hdl64"]()
    directions, times = beams(model, 0.5), column_times(model, 100_000_000)
    assert np.abs(np.linalg.norm(directions, axis=-1) - 1).max() < 1e-9
    azimuth = np.unwrap(np.arctan2(directions[:, 5, 1], directions[:, 5, 0]))
    assert (np.diff(azimuth) < 0).all() and abs(azimuth[0] - azimuth[-1]) == pytest.approx(2 * np.pi, rel=1e-3)
    assert abs(azimuth[np.argmin(np.abs(times))]) < 2e-3 and times[0] == -times[-1]


def test_a_street_measures_like_one() -> None:
    """Loose bounds around what KITTI's residential drives measure (docs/SIMULATOR.md has the figures)."""
    rows = [likeness(simulate(seed, seconds=0.3), every=2) for seed in (70, 71, 72, 73)]
    assert 108_000 < np.mean([row.points for row in rows]) < 125_000
    assert 0.40 < np.mean([row.ground for row in rows]) < 0.68
    assert 6.0 < np.mean([row.range_quantiles_m[1] for row in rows]) < 13.0
    assert 0.003 < np.mean([row.moving for row in rows]) < 0.2
    assert 0.18 < np.mean([row.through for row in rows]) < 0.45  # with windows that nothing passes .15; drive 0005 .32


def test_pictures_are_plain_jpeg(log: Log) -> None:
    from PIL import Image as Pillow

    with Pillow.open(io.BytesIO(log.read_image("front", 0).encoded)) as picture:
        assert picture.format == "JPEG" and picture.size == (416, 128)
