"""The tables: the same rays for everyone, subsets that are what they say, a past that is withheld from everyone, nothing dropped in silence."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sensors.clips import clips_at, clips_of, frames_at
from sensors.data import Part
from sensors.errors import UsageError, WmError
from sensors.rays import hide_sector, history_of, in_sector, rays_of
from sensors.records import Box, Labels, Lidar, Log, RecordError, Sweep, Trajectory
from sensors.simulator.log import simulate
from worldmodel import evaluate as evaluation
from worldmodel import subsets
from worldmodel.evaluate import evaluate
from worldmodel.forecast import Mixture

SPEED_M_S, CAR_M_S = 6.0, 8.0
CAR_SIZE = np.array([4.0, 2.0, 1.6])
FIELDS = ["method", "subset", "log", "horizon_s", "n_clips", "rays", "missing", "l1_mean", "l1_median", "absrel", "within_02", "chamfer",
          "chamfer_near", "chamfer_trimmed", "nll", "crps", "ece", "coverage80", "width80", "l1_over_evidence_only"]  # fmt: skip
QUICK = ["copy", "reproject_nearest"]


def car_at(time_s: float) -> np.ndarray:
    """World place of the centre of a car that crosses in front of the ego, which starts at the origin and drives along x."""
    return np.array([22.0, -10 + CAR_M_S * time_s, 0.8])


def measured(time_s: float) -> np.ndarray:
    """(N,3) f32 in the LiDAR's frame, 1.7 m above the road: road, walls at y = +-12 m, a parked van, the crossing car."""
    azimuth, elevation = np.meshgrid(np.linspace(-np.pi, np.pi, 300, endpoint=False), np.deg2rad(np.linspace(-20, 4, 32)))
    d = np.stack((np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)), -1).reshape(-1, 3)
    origin = np.array([SPEED_M_S * time_s, 0, 1.7])
    with np.errstate(divide="ignore"):
        hits = [-origin[2] / d[:, 2], (12 - origin[1]) / d[:, 1], (-12 - origin[1]) / d[:, 1]]
        for centre in (car_at(time_s), np.array([15.0, 6, 0.8])):
            a, b = (centre - CAR_SIZE[[1, 0, 2]] / 2 - origin) / d, (centre + CAR_SIZE[[1, 0, 2]] / 2 - origin) / d
            enter, leave = np.minimum(a, b).max(1), np.maximum(a, b).min(1)
            hits.append(np.where((enter <= leave) & (enter > 0), enter, np.inf))
    r = np.min([np.where(h > 0, h, np.inf) for h in hits], 0)
    return (d[r < 80] * r[r < 80, None]).astype(np.float32)


def street(seconds: float = 3.05, name: str = "a", period_ns: int = 100_000_000, labels: bool = True, broken: frozenset[int] = frozenset()) -> Log:
    stamps = 10**9 + np.arange(int(seconds * 1e9 / period_ns) + 1) * period_ns
    times = (stamps - stamps[0]) / 1e9
    poses = np.tile(np.eye(4), (len(stamps), 1, 1))
    poses[:, 0, 3] = SPEED_M_S * times
    ego_from_lidar = np.eye(4)
    ego_from_lidar[2, 3] = 1.7

    def read_sweep(lidar: str, index: int) -> Sweep:
        if index in broken:
            raise RecordError(f"sweep {index}: torn")
        points = measured(times[index])
        return Sweep(lidar, int(stamps[index]), points, np.full(len(points), 0.3, np.float32))

    def open_labels() -> Labels:
        boxes = []
        for stamp, time_s, pose in zip(stamps, times, poses, strict=True):
            for track, place in (("car", car_at(time_s)), ("van", np.array([15.0, 6, 0.8]))):
                boxes.append(Box(int(stamp), track, "car", place - pose[:3, 3], CAR_SIZE, np.pi / 2))
        return Labels(tuple(boxes))

    return Log(f"test/{name}", "test", "none", "middle of the car on the road", {"top": Lidar("top", ego_from_lidar, 10.0, beams=32)}, {},
               Trajectory(stamps, poses), {"top": stamps}, {}, read_sweep, lambda camera, index: pytest.fail("no camera"),
               open_labels if labels else lambda: None)  # fmt: skip


class Knowing:
    """A forecaster that looks at the truth, as none may, and adds an error to it."""

    arms = ("model", "evidence_only")

    def __init__(self, off_m: float = 0.0, scale_m: float = 0.05, silent: bool = False) -> None:
        self.off_m, self.scale_m, self.silent, self.asked = off_m, scale_m, silent, []

    def mixtures(self, clip, history, rays, arms):
        self.asked.append((clip, history, rays))
        out = []
        for asked in rays:
            one = np.ones((len(asked.ranges), 1), np.float32)
            out.append(Mixture(one * (not self.silent), asked.ranges[:, None] + self.off_m, one * self.scale_m))
        return {arm: out for arm in arms}


def pick(table, method, subset="all", horizon=None, log=None):
    found = [row for row in table if (row.method, row.subset, row.horizon_s, row.log) == (method, subset, horizon, log)]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def table():
    return evaluate([Part(street())], Knowing(0.1), methods=[*QUICK, "model"], rays_per_sweep=3000)


def test_rows_have_the_documented_fields_and_every_slice_once(table):
    assert list(table[0].as_json())[: len(FIELDS)] == FIELDS
    keys = [(row.method, row.subset, row.log, row.horizon_s) for row in table]
    assert len(keys) == len(set(keys))
    assert {k[0] for k in keys} == {"model", *QUICK} and {k[2] for k in keys} == {None, "test/a"}
    assert {k[3] for k in keys} == {None, 0.2, 0.4, 0.6, 0.8, 1.0}
    # past 0.8 s, future 1 s, every 0.5 s of 3 s
    assert table.clips == 3 and table.logs == 1 and table.seconds == pytest.approx(2.8) and table.poses == ("log",)
    json.dumps([row.as_json() for row in table], allow_nan=False)


def test_everyone_answers_the_same_rays(table):
    for row in table:
        assert row.rays == pick(table, "copy", row.subset, row.horizon_s, row.log).rays
    assert pick(table, "copy").rays == 3 * 5 * 3000 and pick(table, "copy", horizon=0.2).rays == 3 * 3000


def test_a_known_error_comes_out_as_itself(table):
    row = pick(table, "model", horizon=0.6)
    assert row.l1_mean == pytest.approx(0.1, abs=2e-3) and row.l1_median == pytest.approx(0.1, rel=0.02) and row.missing == 0
    assert row.within_02 == 1 and row.chamfer < 0.011 and row.chamfer_trimmed == pytest.approx(row.chamfer)
    # a Laplace of 5 cm, 10 cm off: within its 80 % interval of +-8 cm never
    assert row.coverage80 == pytest.approx(0, abs=0.01) and row.width80 == pytest.approx(2 * 0.05 * np.log(5), rel=0.02)
    assert row.nll == pytest.approx(2 + np.log(0.1), abs=0.02)
    low, high = row.intervals["l1_mean"]
    assert low <= row.l1_mean <= high


def test_means_are_of_the_horizons(table):
    for method in ("copy", "model"):
        for name in ("l1_mean", "l1_median", "chamfer", "within_02"):
            values = [getattr(pick(table, method, horizon=h), name) for h in (0.2, 0.4, 0.6, 0.8, 1.0)]
            assert getattr(pick(table, method), name) == pytest.approx(np.mean(values), rel=1e-5)


def test_what_the_state_adds_is_told_with_an_interval_of_pairs():
    class Twofold(Knowing):
        """Off by a fiftieth of the range, and evidence alone by twice that."""

        def mixtures(self, clip, history, rays, arms):
            one = [np.ones((len(asked.ranges), 1), np.float32) for asked in rays]
            off = {"model": 1.02, "evidence_only": 1.04}
            return {arm: [Mixture(o, a.ranges[:, None] * off[arm], 0.05 * o) for o, a in zip(one, rays, strict=True)] for arm in arms}

    table = evaluate([Part(street())], Twofold(), methods=["copy", "model", "evidence_only"], rays_per_sweep=500)
    for row in table:
        if row.method == "model" and not row.subset.startswith("range_40"):  # beyond the farther bound answers are cut
            assert row.l1_over_evidence_only == pytest.approx(0.5, abs=0.02)
            if row.intervals:
                low, high = row.intervals["l1_over_evidence_only"]
                assert 0.48 < low <= high < 0.52
    assert pick(table, "evidence_only").l1_over_evidence_only is None
    assert pick(table, "copy").l1_over_evidence_only == pytest.approx(pick(table, "copy").l1_mean / pick(table, "evidence_only").l1_mean)


def test_point_methods_have_l1_for_crps_and_no_likelihood_without_scales(table):
    row = pick(table, "copy")
    assert row.crps == pytest.approx(row.l1_mean) and row.nll is None and row.ece is None and row.coverage80 is None and row.width80 is None


def test_scales_come_from_other_clips_and_make_a_likelihood():
    scales = evaluation.laplace_scales([Part(street(name="train"))], rays_per_sweep=500)
    assert set(scales) == set(evaluation.baselines()) and [h for h, _ in scales["copy"]] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert scales["copy"][0][1] < scales["copy"][-1][1]
    row = pick(evaluate([Part(street())], methods=["copy"], rays_per_sweep=1000, scales=scales), "copy", horizon=1.0)
    # of a Laplace distribution of scale b, E|x|/b + log(2 b), at most as much above as the bounds take away
    assert row.nll == pytest.approx(row.l1_mean / scales["copy"][-1][1] + np.log(2 * scales["copy"][-1][1]), abs=0.25)
    assert pick(evaluate([Part(street())], methods=["copy"], rays_per_sweep=100, scales={}), "copy").nll is None


def test_a_silent_model_is_missing_and_worst():
    table = evaluate([Part(street())], Knowing(silent=True), methods=["model", *QUICK], rays_per_sweep=800)
    row, copy = pick(table, "model"), pick(table, "copy")
    assert row.missing == row.rays and copy.missing == 0
    for name in ("l1_mean", "l1_median", "absrel", "chamfer", "chamfer_near", "chamfer_trimmed", "crps"):
        assert getattr(row, name) > 2 * getattr(copy, name), name
    assert row.within_02 == 0 and row.coverage80 == 0 and row.nll > 10


def clip_of(log, protocol="native", index=0):
    return evaluation.clips_to_evaluate([Part(log)], protocol)[index]


def test_moving_static_and_vacated_are_told_by_boxes_and_motion():
    log = street()
    clip = clip_of(log)
    history, movers = history_of(clip), subsets.Movers(log)
    assert movers.labelled(clip.stamp_ns) and not movers.labelled(log.sweep_stamps_ns["top"][-1] + 1)
    frame = clip.future[-1]
    rays = rays_of(clip, frame, None)
    masks = dict(zip(subsets.SUBSETS, subsets.subset_masks(clip, frame, history, rays, movers), strict=True))
    present_m = SPEED_M_S * (clip.stamp_ns - 10**9) / 1e9
    world = evaluation.points_of(rays, rays.ranges) + np.array([present_m, 0, 0])
    time_s = (frame.stamp_ns - 10**9) / 1e9
    on_car = (np.abs(world - car_at(time_s)) <= CAR_SIZE[[1, 0, 2]] / 2 + 0.01).all(1)
    on_van = (np.abs(world - (15, 6, 0.8)) <= CAR_SIZE[[1, 0, 2]] / 2 + 0.01).all(1)
    assert on_car.sum() > 10 and on_van.sum() > 10
    assert masks["moving"][on_car].all() and masks["static"][on_van].all()
    np.testing.assert_array_equal(masks["moving"] ^ masks["static"], masks["all"])
    # what is now seen through the place that the car has left: behind it, as seen from here
    assert masks["vacated"].sum() > 10 and not (masks["vacated"] & masks["moving"]).any()
    then = car_at((clip.stamp_ns - 10**9) / 1e9)
    for end in world[masks["vacated"]]:
        start = np.array([SPEED_M_S * time_s, 0, 1.7])
        line = start + np.linspace(0, 1, 2000)[:, None] * (end - start)
        assert (np.abs(line - then) <= CAR_SIZE[[1, 0, 2]] / 2 + 0.05).all(1).any()
    bands = np.stack([masks[name] for name in subsets.SUBSETS if name.startswith("range_")])
    assert (bands.sum(0) == 1).all() and (rays.ranges[masks["range_10_20"]] < 20).all() and (rays.ranges[masks["range_10_20"]] >= 10).all()
    # nothing was where the car is now; most of the road and of the van was seen
    assert masks["unseen"].mean() < 0.1 and masks["unseen"][on_van].mean() < 0.3 and masks["unseen"][on_car].mean() > 0.5


def test_outside_the_labelled_view_nothing_is_static_or_moving():
    log = street()
    narrow = dataclasses.replace(log, open_labels=lambda: dataclasses.replace(log.open_labels(), complete_fov_rad=0.5))
    clip = clip_of(narrow)
    rays = rays_of(clip, clip.future[0], None)
    found = subsets.subset_masks(clip, clip.future[0], history_of(clip), rays, subsets.Movers(narrow))
    masks = dict(zip(subsets.SUBSETS, found, strict=True))
    ends = rays.directions * rays.ranges[:, None]
    inside = np.abs(np.arctan2(ends[:, 1], ends[:, 0])) <= 0.5
    np.testing.assert_array_equal(masks["moving"] | masks["static"], inside)
    unlabelled = evaluate([Part(street(labels=False))], methods=["copy"], rays_per_sweep=100)
    assert {row.subset for row in unlabelled} & {"moving", "static", "vacated"} == set()


def test_a_short_track_falls_back_on_the_velocity_of_its_box():
    log = street()
    box = Box(int(log.sweep_stamps_ns["top"][10]), "new", "car", np.array([5.0, 0, 0]), CAR_SIZE, 0.0, np.array([3.0, 4.0]))
    still = dataclasses.replace(box, track="other", velocity=None)
    movers = subsets.Movers(dataclasses.replace(log, open_labels=lambda: Labels((box, still))))
    assert movers.speed(box) == 5 and movers.speed(still) == 0 and movers.moving(box.stamp_ns) == [box]


def test_a_sector_is_withheld_from_everyone_and_only_what_lies_in_it_is_scored():
    forecaster = Knowing()
    table = evaluate([Part(street())], forecaster, methods=["model", *QUICK], rays_per_sweep=2000, hidden_sector=True, seed=4)
    hidden = [call for call in forecaster.asked if len(call[2]) == 6]
    assert len(hidden) == table.clips == 3 and len(forecaster.asked) == 6
    for clip, history, rays in hidden:
        centre, width = evaluation.sector_of(clip, 4)
        assert width == pytest.approx(np.pi / 3)
        whole = history_of(clip)
        for kept, before in zip(history.points, whole.points, strict=True):
            assert not in_sector(kept, centre, width).any() and 0 < len(kept) < len(before)
        for asked in rays:
            assert in_sector(evaluation.points_of(asked, asked.ranges), centre, width).all()
    assert {row.horizon_s for row in table if row.subset == "hidden"} == {None, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0}
    # at t = 0 the last sweep knows everything; without the sector it does not
    assert pick(table, "reproject_nearest", "hidden", 0.0).l1_mean > 1 and pick(table, "model", "hidden", 0.0).l1_mean < 1e-3
    assert evaluation.sector_of(hidden[0][0], 4) != evaluation.sector_of(hidden[1][0], 4) != evaluation.sector_of(hidden[1][0], 5)


def test_a_scanner_that_does_not_look_all_round_has_clips_with_nothing_in_the_sector():
    log = street()

    def ahead(lidar, index):
        sweep = log.read_sweep(lidar, index)
        kept = np.abs(np.arctan2(sweep.points[:, 1], sweep.points[:, 0])) < np.pi / 6
        return Sweep(lidar, sweep.stamp_ns, sweep.points[kept], sweep.intensity[kept])

    class Picky(Knowing):
        def mixtures(self, clip, history, rays, arms):
            assert all(len(asked.ranges) for asked in rays)
            return super().mixtures(clip, history, rays, arms)

    narrow = dataclasses.replace(log, read_sweep=ahead)
    table = evaluate([Part(narrow)], Picky(), methods=["model", "copy"], rays_per_sweep=500, hidden_sector=True, seed=3)
    assert pick(table, "model").n_clips == 3
    assert {row.n_clips for row in table if row.subset == "hidden"} < {0, 1, 2}


def labelled_at(rows):
    log = street()
    stamps = {int(s) for s in log.sweep_stamps_ns["top"][rows]}
    return dataclasses.replace(log, open_labels=lambda: Labels(tuple(box for box in street().open_labels().boxes if box.stamp_ns in stamps)))


def test_between_keyframes_boxes_are_where_their_track_is():
    whole, keyframes = subsets.Movers(street()), subsets.Movers(labelled_at([5, 10, 15, 25]))
    stamps = street().sweep_stamps_ns["top"].tolist()
    for row in range(5, 16):
        for true, found in zip(whole.boxes_at(stamps[row]), keyframes.boxes_at(stamps[row]), strict=True):
            assert found.track == true.track and found.stamp_ns == true.stamp_ns and found.yaw_rad == pytest.approx(true.yaw_rad)
            np.testing.assert_allclose(found.centre, true.centre, atol=1e-6)
        assert [box.track for box in keyframes.moving(stamps[row])] == ["car"]
    assert not any(keyframes.labelled(stamps[row]) for row in (4, 16, 20, 24, 26))  # beyond them, and between two that are too far apart


def test_a_mean_is_of_all_horizons_or_left_out():
    table = evaluate([Part(labelled_at([10, 20]))], methods=["copy"], rays_per_sweep=1000)
    static = [row.horizon_s for row in table if row.subset == "static" and row.log is None]
    assert static and None not in static and pick(table, "copy").l1_mean > 0


def test_hide_sector_takes_points_across_the_seam_behind():
    history = history_of(clip_of(street()))
    hidden = hide_sector(history, np.pi, 1.0)
    azimuth = np.arctan2(hidden.points[0][:, 1], hidden.points[0][:, 0])
    assert np.abs(azimuth).max() <= np.pi - 0.5 and len(hidden.intensity[0]) == len(hidden.points[0]) and hidden.memo == {}


def test_unreadable_clips_are_left_out_and_counted():
    log = street(broken=frozenset({0}))
    seen = []
    table = evaluate([Part(log)], methods=["copy"], rays_per_sweep=200, report=lambda *args: seen.append(args))
    assert table.clips == 2 and table.unreadable == 1 and pick(table, "copy").n_clips == 2
    assert seen[-1][:2] == (3, 3) and "1" in seen[-1][2] and sum(n for what, n in log.counts.items() if "left out" in what) == 1


def test_a_table_rests_on_the_clips_that_were_scored():
    torn = street(name="b", broken=frozenset(range(31)))
    table = evaluate([Part(street()), Part(torn)], methods=["copy"], rays_per_sweep=200)
    assert (table.logs, table.clips, table.unreadable, table.seconds) == (1, 3, 3, pytest.approx(2.8))


@pytest.mark.parametrize("asked", [{"seed": -1}, {"max_clips": 0}, {"rays_per_sweep": 0}, {"methods": []}])
def test_nothing_is_evaluated_of_what_cannot_be(asked):
    with pytest.raises(UsageError, match="evaluate: "):
        evaluate([Part(street())], **{"methods": ["copy"], **asked})


@pytest.mark.parametrize(("rate_hz", "sweeps"), [(5.0, 2), (5.0013, 2), (4.99, 2), (10.0, 5), (9.65, 5), (20.0, 10), (2.0, 1)])
def test_half_a_second_is_a_whole_number_of_sweeps_whatever_the_last_digit_of_the_rate(rate_hz, sweeps):
    stamps = np.arange(40) * round(1e9 / rate_hz)
    log = dataclasses.replace(street(), lidars={"top": Lidar("top", np.eye(4), rate_hz)}, sweep_stamps_ns={"top": stamps})
    assert evaluation._stride_s(log) == pytest.approx(sweeps / rate_hz, rel=1e-3)


def test_what_moves_is_where_it_was_when_its_points_were_measured():
    """A simulated scanner takes a tenth of a second for a turn: the labels of points say what they are of."""
    log = simulate(700_013, seconds=2.0, every=2)
    clip, found = clip_of(log), np.zeros(2)
    for frame in (clip.future[0], clip.future[-1]):
        rays = rays_of(clip, frame, None)
        masks = dict(zip(subsets.SUBSETS, subsets.subset_masks(clip, frame, history_of(clip), rays, subsets.Movers(log)), strict=True))
        truly = log.open_labels().read_point_labels("hdl64", frame.sweep_index).moving[rays.index]
        found += masks["moving"][truly].sum(), truly.sum()
    assert found[1] > 500 and found[0] / found[1] > 0.99  # 0.80 by boxes at the stamp alone
    # at the very end of the poses the points stay as recorded
    known = log.poses.stamps_ns < frame.stamp_ns - 70_000_000
    short = dataclasses.replace(log, poses=Trajectory(log.poses.stamps_ns[known], log.poses.world_from_ego[known], "log"))
    assert subsets._ends(clip, frame, rays)[1].any() and not subsets._ends(dataclasses.replace(clip, log=short), frame, rays)[1].any()


def test_data_of_which_no_clip_is_readable_are_an_error_with_the_first_reason():
    with pytest.raises(WmError, match=r"none of the 3 clips is readable.*test/a@1800000000: sweep 0: torn") as raised:
        evaluate([Part(street(broken=frozenset(range(31))))], methods=["copy"], rays_per_sweep=200)
    assert raised.value.exit_code == 1


def test_a_sweep_without_a_return_in_range_costs_its_clips_and_nothing_else():
    log = street()
    empty = dataclasses.replace(log, read_sweep=lambda lidar, index: dataclasses.replace(
        log.read_sweep(lidar, index), points=log.read_sweep(lidar, index).points * (0.001 if index == 10 else 1)))  # fmt: skip
    table = evaluate([Part(empty)], methods=["reproject_nearest"], rays_per_sweep=200)
    assert table.clips + table.unreadable == 3 and table.unreadable and table.clips
    with pytest.raises(RecordError, match=r"test/a: top at 2000000000: no return between 2 and 56 m"):
        rays_of(clips_of(empty)[0], frames_at(empty, np.array([10]), "top")[0])


def test_a_clock_that_jumps_by_years_is_stepped_over_and_changes_no_clip():
    log = street(6.0)
    stamps = log.sweep_stamps_ns["top"]
    years_ns = 1_790_000_000 * 10**9
    jumped = np.where(np.arange(len(stamps)) < 3, stamps, stamps + years_ns)
    moved = dataclasses.replace(log, sweep_stamps_ns={"top": jumped}, poses=Trajectory(jumped, log.poses.world_from_ego))
    whole = [clip.stamp_ns for clip in clips_of(log, every_s=0.1) if clip.past[0].sweep_index > 3]  # sweep 3 lies at the gap of the poses
    assert whole and [clip.stamp_ns - years_ns for clip in clips_of(moved, every_s=0.1)] == whole


def test_clips_at_given_instants_and_none_twice():
    log = street()
    stamps = log.sweep_stamps_ns["top"]
    at = np.array([stamps[3], stamps[9], stamps[12] + 30_000_000, stamps[12] + 40_000_000, stamps[29]])
    assert [clip.stamp_ns for clip in clips_of(log, at_ns=at)] == [stamps[9], stamps[12]]  # the others have no past or no future
    close = [clip.stamp_ns for clip in clips_of(log, every_s=0.03)]
    assert close == [clip.stamp_ns for clip in clips_of(log, every_s=0.1)] and len(set(close)) == len(close)


def test_a_scanner_whose_sweeps_lie_beside_the_instants_loses_no_clips():
    log = street(5.0, period_ns=80_000_000)  # 0.2 s are two and a half of its sweeps
    rng = np.random.default_rng(0)
    shaken = log.sweep_stamps_ns["top"] + rng.normal(0, 2e6, len(log.sweep_stamps_ns["top"])).astype(np.int64)
    lidar = dataclasses.replace(log.lidars["top"], rate_hz=12.5)
    real = dataclasses.replace(log, lidars={"top": lidar}, sweep_stamps_ns={"top": shaken}, poses=Trajectory(shaken, log.poses.world_from_ego))
    clips = clips_of(real, every_s=0.1)
    assert len(clips) > 30
    assert [len(c.past) for c in clips_at(real, np.array([c.stamp_ns for c in clips]))] == [5] * len(clips)  # labelled frames lose no past either


def test_logs_are_rows_of_their_own_and_the_total_is_over_all_of_them():
    parts = [Part(street(name="a")), Part(street(2.0, name="b"))]
    table = evaluate(parts, methods=["copy"], rays_per_sweep=500)
    a, b, both = (pick(table, "copy", log=log, horizon=0.2) for log in ("test/a", "test/b", None))
    assert (a.n_clips, b.n_clips, both.n_clips) == (3, 1, 4) and both.rays == a.rays + b.rays and table.logs == 2
    assert both.l1_mean == pytest.approx((a.l1_mean * a.rays + b.l1_mean * b.rays) / both.rays, rel=1e-5)
    assert b.intervals == {} and a.intervals["chamfer"][0] <= a.chamfer <= a.intervals["chamfer"][1]
    # one log cut in two is one log, and no clip counts twice
    halves = [Part(parts[0].log), Part(parts[0].log, from_ns=10**9)]
    assert evaluate(halves, methods=["copy"], rays_per_sweep=500)[0] == evaluate(parts[:1], methods=["copy"], rays_per_sweep=500)[0]


def test_t0_is_every_fifth_sweep_of_a_scanner_that_is_a_little_slow():
    log = street(5.0, period_ns=103_600_000)
    stamps = log.sweep_stamps_ns["top"].tolist()
    rows = [stamps.index(clip.stamp_ns) for clip in evaluation.clips_to_evaluate([Part(log)])]
    assert rows[0] == 8 and set(np.diff(rows)) == {5} and rows[-1] + 10 < len(stamps) <= rows[-1] + 15


def test_native3_asks_three_seconds_ahead_and_max_clips_spreads():
    clips = evaluation.clips_to_evaluate([Part(street(6.0))], "native3")
    assert [round((f.stamp_ns - clips[0].stamp_ns) / 1e9, 3) for f in clips[0].future] == [0.6, 1.2, 1.8, 2.4, 3.0]
    table = evaluate([Part(street(6.0))], methods=["copy"], protocol="native3", rays_per_sweep=100, max_clips=2)
    assert {row.horizon_s for row in table} == {None, 0.6, 1.2, 1.8, 2.4, 3.0} and table.clips == 2
    spread = evaluation.clips_to_evaluate([Part(street(6.0))], "native", 3)
    whole = evaluation.clips_to_evaluate([Part(street(6.0))], "native")
    assert [c.id for c in spread] == [whole[0].id, whole[(len(whole) - 1) // 2].id, whole[-1].id]


def test_what_cannot_be_evaluated_says_so():
    parts = [Part(street())]
    for call, words in ((lambda: evaluate(parts, methods=["copi"]), "method"), (lambda: evaluate(parts, protocol="4doc"), "protocol"),
                        (lambda: evaluate([Part(street(1.0))]), "no clip"), (lambda: evaluate([]), "no clip")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            call()


def test_the_same_seed_gives_the_same_table_and_another_one_other_rays():
    first, second, other = (evaluate([Part(street())], methods=["copy"], rays_per_sweep=300, seed=seed) for seed in (0, 0, 1))
    assert list(first) == list(second) and pick(first, "copy").l1_mean != pick(other, "copy").l1_mean


def test_the_command_prints_tables_and_json(tmp_path, capsys):
    from sensors.store.writer import write_log
    from worldmodel.tools.cli import main

    write_log(tmp_path / "store", street(2.5))
    common = ["evaluate", "none", "--data", str(tmp_path / "store"), "--methods", "copy,reproject_nearest", "--max-clips", "1"]
    assert main([*common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 1 and found["command"] == "evaluate" and found["protocol"] == "native" and found["run"] is None
    assert found["clips"] == 1 and list(found["rows"][0])[: len(FIELDS)] == FIELDS
    assert main([*common, "--per-log"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("reproject_nearest") == 4 and "Logs: 1; clips: 1" in printed and "poses: log" in printed and "moving" in printed
    assert main([*common[:2], "--data", str(tmp_path / "store"), "--methods", "nobody"]) == 2
    assert main(["evaluate", str(tmp_path / "no-run"), "--data", str(tmp_path / "store")]) == 2
    assert "nobody" in (errors := capsys.readouterr().err) and "no such run folder" in errors


LOGS = os.environ.get("WM_TEST_LOGS")
DRIVE = Path(LOGS or "") / "2011_09_26" / "2011_09_26_drive_0001_sync"


@pytest.mark.skipif(not LOGS or not DRIVE.is_dir(), reason="WM_TEST_LOGS holds no KITTI drive 2011_09_26_drive_0001_sync")
def test_kitti_drive_0001_gives_the_figures_computed_independently():
    """L1 mean, L1 median, share within 0.2 m at 0.2 and 1.0 s, over the drive's 12 clips."""
    from sensors.adapters import kitti_raw

    log = next(kitti_raw.open_logs(DRIVE, {}))
    table = evaluate([Part(log)], methods=["copy", "reproject_nearest", "accumulate_nearest"], rays_per_sweep=4096)
    assert table.clips == 12
    expected = {"copy": ((1.00, 0.089, 0.67), (1.45, 0.216, 0.49)), "reproject_nearest": ((0.49, 0.083, 0.74), (0.91, 0.159, 0.56)),
                "accumulate_nearest": ((0.48, 0.070, 0.81), (0.82, 0.129, 0.63))}  # fmt: skip
    for method, by_horizon in expected.items():
        for horizon, (mean, median, within) in zip((0.2, 1.0), by_horizon, strict=True):
            row = pick(table, method, horizon=horizon)
            assert row.l1_mean == pytest.approx(mean, rel=0.06) and row.l1_median == pytest.approx(median, rel=0.08)
            assert row.within_02 == pytest.approx(within, abs=0.015)
