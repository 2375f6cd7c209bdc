"""PLY, NPZ, GIF and PNG: what is written can be read by others, and says the same."""

from __future__ import annotations

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from worldmodel.drawing.animation import gif_bytes
from worldmodel.drawing.clouds import forecast_plys, npz_bytes, ply_bytes
from worldmodel.drawing.sector import certainty, sector_of, sector_picture
from worldmodel.forecast import LEVELS


def read_ply(data: bytes) -> np.ndarray:
    """A reader of its own, from the format's description."""
    head, _, body = data.partition(b"end_header\n")
    lines = head.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    count = next(int(line.split()[2]) for line in lines if line.startswith("element vertex"))
    types = {"float": "<f4", "uchar": "u1"}
    fields = [(line.split()[2], types[line.split()[1]]) for line in lines if line.startswith("property")]
    table = np.frombuffer(body, fields)
    assert len(table) == count
    return table


def test_ply_holds_points_errors_and_widths(street):
    forecast = street()
    files = forecast_plys(forecast)
    future = forecast.futures[1]
    table = read_ply(files["model_+0.40s.ply"])
    np.testing.assert_array_equal(np.stack([table["x"], table["y"], table["z"]], axis=-1), future.points(future.ranges))
    np.testing.assert_array_equal(table["error_m"], future.ranges - future.truth)
    np.testing.assert_array_equal(table["width_m"], future.quantiles[:, -1] - future.quantiles[:, 0])
    assert len(files) == 1 + 3 * len(forecast.futures)


def test_ply_leaves_out_rays_without_an_answer_and_only_those(street):
    forecast = street()
    first = forecast.futures[0]
    ranges = first.baselines["accumulate_nearest"].copy()
    ranges[:7] = np.nan
    forecast = dataclasses.replace(forecast, futures=(dataclasses.replace(first, baselines={"accumulate_nearest": ranges}),))
    assert len(read_ply(forecast_plys(forecast)["baseline_+0.20s.ply"])) == np.isfinite(ranges).sum() < len(ranges)


def test_ply_is_read_by_open3d(street, tmp_path):
    o3d = pytest.importorskip("open3d", reason="open3d has no wheel for this machine")
    (tmp_path / "a.ply").write_bytes(forecast_plys(street())["model_+0.20s.ply"])
    cloud = o3d.t.io.read_point_cloud(str(tmp_path / "a.ply"))
    assert cloud.point.positions.shape[0] == len(street().futures[0].ranges)
    assert "error_m" in cloud.point and cloud.point.colors.shape[1] == 3


def test_ply_refuses_column_names_that_would_break_the_header():
    with pytest.raises(ValueError, match="identifier"):
        ply_bytes(np.zeros((1, 3), np.float32), {"x\nend_header": np.zeros(1)})


def test_npz_round_trips_without_pickle(street, hostile):
    forecast = street(hostile, hidden=True)
    with np.load(io.BytesIO(npz_bytes(forecast)), allow_pickle=False) as read:
        assert str(read["clip"]) == hostile and str(read["poses"]) == "log"
        assert tuple(read["levels"]) == LEVELS
        np.testing.assert_array_equal(read["past_0"], forecast.past[0])
        for k, future in enumerate(forecast.futures):
            assert read["horizons_s"][k] == future.horizon_s
            for field in ("present_from_sensor", "directions", "ranges", "quantiles", "truth", "intensity", "colour", "hidden"):
                np.testing.assert_array_equal(read[f"{field}_{k}"], getattr(future, field))
            for b, name in enumerate(read["baselines"]):
                np.testing.assert_array_equal(read[f"baseline_{k}_{b}"], future.baselines[str(name)])


def test_gif_has_a_frame_per_past_sweep_and_future_instant_and_loops(street):
    forecast = street()
    data = gif_bytes(forecast)
    picture = Image.open(io.BytesIO(data))
    assert picture.n_frames == len(forecast.past) + len(forecast.futures)
    assert picture.width == 900 and picture.info["loop"] == 0
    assert len(data) <= 2_000_000
    frames = []
    for index in range(picture.n_frames):
        picture.seek(index)
        frames.append(np.asarray(picture.convert("RGB"), np.int32))
    for before, after in itertools.pairwise(frames):
        assert np.abs(before - after).max() > 60
    # where the baseline leaves the crossing car behind, its panel is hot; the model's is not
    hot = lambda panel: int(((panel[..., 0] > 200) & (panel[..., 2] < 170)).sum())  # noqa: E731
    last = frames[-1][60:350]
    assert hot(last[:, 606:]) > hot(last[:, 304:598]) + 30


def test_gif_keeps_to_a_small_limit(street):
    assert len(gif_bytes(street(), max_bytes=60_000)) < len(gif_bytes(street()))


def test_gif_of_a_forecast_without_truth_baseline_or_past(street):
    forecast = street()
    bare = [dataclasses.replace(f, truth=np.full_like(f.truth, np.nan), baselines={}) for f in forecast.futures]
    data = gif_bytes(dataclasses.replace(forecast, past=(), past_times_s=np.zeros(0), futures=tuple(bare)))
    assert Image.open(io.BytesIO(data)).n_frames == 3


def test_the_sector_picture_fades_what_is_unsure(street):
    forecast = street(hidden=True, columns=600)
    centre, width = sector_of(forecast.futures[0])
    assert abs(centre) < 0.05 and abs(np.rad2deg(width) - 60) < 5
    sure = np.asarray(Image.open(io.BytesIO(sector_picture(forecast))).convert("L"), np.int32)
    wide = [dataclasses.replace(f, quantiles=f.ranges[:, None] + np.linspace(-20, 20, len(LEVELS), dtype=np.float32)) for f in forecast.futures]
    unsure = np.asarray(Image.open(io.BytesIO(sector_picture(dataclasses.replace(forecast, futures=tuple(wide))))).convert("L"), np.int32)
    filled_in = np.s_[130:330, 560:880]
    assert sure[filled_in].mean() > unsure[filled_in].mean() + 3
    np.testing.assert_array_equal(sure[60:560, :470], unsure[60:560, :470])
    with pytest.raises(ValueError, match="hide_sector_rad"):
        sector_picture(street())


def test_certainty_falls_with_the_width_of_the_interval():
    quantiles = np.array([[5, 5, 5, 5, 5], [4, 4, 5, 6, 6], [np.nan] * 5, [0, 0, 5, 50, 50]], np.float32)
    alpha = certainty(quantiles)
    assert alpha[0] == 1 and alpha[0] > alpha[1] > alpha[3] == alpha[2] > 0
