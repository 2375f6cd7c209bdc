"""The page of `wm check`: per log what its stamps, poses and payloads say, with the pictures by which a person sees whether to trust it."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.alignment.deskew import deskew
from sensors.alignment.survey import Survey, cloud_in_ego, pair_indices
from sensors.alignment.timing import Timing
from sensors.clips import nearest_index
from sensors.errors import WmError
from sensors.formats.images import decode
from sensors.geometry import inverse, pose_at, project, transform_points
from sensors.records import Log, RecordError, Trajectory
from worldmodel.drawing import colours
from worldmodel.drawing.bev import cloud_image
from worldmodel.drawing.charts import COLOURS, line_chart, number, table, ticks
from worldmodel.drawing.markup import Markup, escaped
from worldmodel.drawing.report import Section, picture, report_page

Array = NDArray[Any]

MAX_CAMERAS, MAX_SENSORS, MAX_LINES, MAX_ROWS = 6, 24, 40, 300
PICTURE_WIDTH, IMAGE_WIDTH, REACH_M, OVERLAY_CELL_M = 362, 554, 40.0, 0.16
# of a sweep over an image: fewer points than there are, so that the image stays visible
MAX_DRAWN = 7000
PATH_POINTS = 1500
WARN, GOOD = "#d2504f", "#2fa57f"
EARLIER, LATER = (60, 150, 255), (255, 150, 50)


@dataclass(frozen=True, eq=False)
class Checked:
    """A log with its reports; survey is None for those of which only the stamps were looked at."""

    log: Log
    timing: Timing
    survey: Survey | None

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.timing.warnings + (self.survey.warnings if self.survey is not None else ())


def check_page(source: str, checked: Sequence[Checked], problems: Sequence[str], *, not_opened: int = 0, notes: Sequence[str] = ()) -> str:
    """The page for the logs of a source. problems: lines about what could not be opened or is damaged; notes: what was done besides."""
    detailed = [one for one in checked if one.survey is not None]
    bad = sum(bool(one.warnings) for one in checked)
    verdict = "nothing to object to" if not bad and not problems else f"{bad} of {len(checked)} logs with warnings, {len(problems)} problems"
    sections = [Section("Overview", list(notes), [_overview(checked), _lines(problems, "Problems") if problems else _verdict(verdict, not bad)])]
    if len(detailed) < len(checked):
        left = f"{len(checked) - len(detailed)} logs were looked at by their stamps and poses only; --log ID shows one in full."
        sections.append(Section("What was left out", [left]))
    if not_opened:
        sections.append(Section("Not opened", [f"{not_opened} further logs were not opened."]))
    sections += [_log_section(one) for one in detailed]
    return report_page(f"Check of {source}", verdict, sections)


def _verdict(text: str, good: bool) -> Markup:
    width = 44 + round(7.3 * min(len(text), 60))
    dot = f'<circle cx="17" cy="15" r="6" fill="{GOOD if good else WARN}"/>'
    return _svg(width, 30, [dot, _label(32, 19.5, text, size=13)], text)


def _lines(lines: Sequence[str], title: str) -> Markup:
    """Lines of text as a list, the first MAX_LINES of them."""
    shown = "".join(f"<li>{escaped(line, 1000)}</li>" for line in lines[:MAX_LINES])
    more = f"<li>and {len(lines) - MAX_LINES} more</li>" if len(lines) > MAX_LINES else ""
    return Markup(f"<div><b>{escaped(title)}</b><ul>{shown}{more}</ul></div>")


def _overview(checked: Sequence[Checked]) -> Markup:
    rows = []
    for one in checked[:MAX_ROWS]:
        poses, pairs = one.timing.poses, one.survey.pairs if one.survey is not None else ()
        moved = float(np.median([p.moved_m for p in pairs if p.registered])) if any(p.registered for p in pairs) else math.nan
        rows.append((
            one.log.id, f"{one.timing.duration_s:.1f}", sum(s.count for s in one.timing.sensors if s.kind == "lidar"),
            sum(s.count for s in one.timing.sensors if s.kind == "camera"), poses.source if poses is not None else "none",
            f"{poses.distance_m:.0f}" if poses is not None else "-", f"{moved:.2f}" if math.isfinite(moved) else "-", len(one.warnings),
        ))  # fmt: skip
    caption = "poses off: how far registration moves sweeps that are 1 s apart, median"
    if len(checked) > MAX_ROWS:
        caption += f"; {len(checked) - MAX_ROWS} further logs are not listed"
    return table(("log", "seconds", "sweeps", "images", "poses", "way, m", "poses off, m", "warnings"), rows, caption)


def _log_section(one: Checked) -> Section:
    log, timing, survey = one.log, one.timing, one.survey
    assert survey is not None
    prose = [
        f"Licence {log.licence}. Ego frame: {log.ego_frame}. Stamps are {log.stamps}; {timing.duration_s:.1f} s; reference LiDAR {timing.reference}.",
        *log.notes[:5],
    ]
    parts: list[Markup] = []
    if one.warnings:
        parts.append(_lines(one.warnings, "Warnings"))
    else:
        parts.append(_verdict("stamps, poses and sampled sweeps are in order", True))
    if +log.counts:
        rows = [(what, count) for what, count in sorted((+log.counts).items())[:MAX_LINES]]
        parts.append(table(("missing, dropped or mended", "count"), rows))
    parts.append(_sensor_table(timing, survey))
    parts.append(_timelines(log, timing))
    parts += _pictures(log, timing)
    parts += _charts(log, timing, survey)
    return Section(log.id, prose, parts)


def _sensor_table(timing: Timing, survey: Survey) -> Markup:
    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e3:.1f}"

    def plain(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    rows = []
    for s in timing.sensors[:MAX_SENSORS]:
        samples = survey.sweeps.get(s.name)
        points = f"{np.median(samples.points):.0f}" if samples is not None and len(samples.points) else "-"
        rows.append((s.name, s.kind, s.count, plain(s.rate_hz), ms(s.median_step_s), ms(s.max_step_s), s.gaps_total, s.missing,
                     plain(s.skew_median_ms), plain(s.skew_max_ms), s.unmatched, points))  # fmt: skip
    if timing.poses is not None:
        p = timing.poses
        rows.append((f"poses ({p.source})", "pose", p.count, "-", ms(p.median_step_s), ms(p.max_step_s), "-", "-", "-", "-", "-", "-"))
    columns = ("sensor", "kind", "items", "Hz", "step, ms", "longest", "gaps", "missing", "skew, ms", "largest", "unmatched", "points")
    left = len(timing.sensors) - MAX_SENSORS
    return table(columns, rows, f"skew: against the nearest sweep of the reference LiDAR{f'; {left} further sensors not listed' if left > 0 else ''}")


def _svg(width: int, height: int, parts: Sequence[str], what: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escaped(what)}" '
        f'font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )


def _label(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="currentColor" fill-opacity="0.8">{escaped(text, 60)}</text>'
    )


def _timelines(log: Log, timing: Timing) -> Markup:
    """A row per sensor over time: how full each stretch is, and its gaps in red."""
    width, left, right, row_height = 1136, 170, 16, 24
    rows: list[tuple[str, Array, float]] = []
    for s in timing.sensors[:MAX_SENSORS]:
        stamps = log.sweep_stamps_ns[s.name] if s.kind == "lidar" else log.image_stamps_ns[s.name]
        rows.append((s.name, stamps, s.median_step_s or 1 / s.nominal_hz))
    if log.poses is not None and timing.poses is not None:
        rows.append((f"poses ({log.poses.source})", log.poses.stamps_ns, timing.poses.median_step_s or 0.1))
    if log.measured_speed is not None:
        known = np.asarray(log.measured_speed[0])
        rows.append(("measured speed", known, float(np.median(np.diff(known))) / 1e9 if len(known) > 1 else 0.1))
    ends = [int(t) for _, stamps, _ in rows if len(stamps) for t in (stamps[0], stamps[-1])]
    if not ends:
        return _svg(width, 40, [_label(20, 25, "no items")], "timelines")
    start, end = min(ends), max(max(ends), min(ends) + 1)
    seconds = (end - start) / 1e9
    columns = width - left - right
    x_of = lambda t: left + columns * t / max(seconds, 1e-9)  # noqa: E731
    parts = []
    for tick in ticks(0, seconds, 10):
        parts.append(f'<path d="M{x_of(tick):.1f} 8V{14 + row_height * len(rows)}" stroke="currentColor" stroke-opacity="0.12"/>')
        parts.append(_label(x_of(tick), 30 + row_height * len(rows), f"{number(tick)} s", "middle", 11))
    for row, (name, stamps, period) in enumerate(rows):
        y = 12 + row * row_height
        parts.append(_label(left - 10, y + 13, name, "end"))
        if not len(stamps):
            parts.append(_label(left + 4, y + 13, "no items"))
            continue
        at = (stamps - start) / 1e9
        step = np.diff(at)
        breaks = np.flatnonzero(step > 1.5 * period)
        begins, stops = np.concatenate(([0], breaks + 1)), np.concatenate((breaks, [len(at) - 1]))
        colour = COLOURS[row % len(COLOURS)]
        # stretches without a gap as bars, single items as ticks where they can be told apart
        for a, b in _bounded(begins, stops):
            x0, x1 = x_of(at[a]), x_of(min(at[b] + 0.9 * period, seconds))
            opacity = 0.45 if columns / max(len(at), 1) >= 3 else 0.8
            parts.append(
                f'<rect x="{x0:.1f}" y="{y + 3}" width="{max(x1 - x0, 1.2):.1f}" height="13" rx="2" fill="{colour}" fill-opacity="{opacity}"/>'
            )
        for i in breaks[np.sort(np.argsort(-step[breaks])[:200])]:
            x0, x1 = x_of(at[i] + 0.9 * period), x_of(at[i + 1])
            parts.append(f'<rect x="{x0:.1f}" y="{y + 8}" width="{max(x1 - x0, 2):.1f}" height="3" fill="{WARN}"/>')
        if columns / max(len(at), 1) >= 3:
            path = "".join(f"M{x_of(t):.1f} {y + 3}v13" for t in at)
            parts.append(f'<path d="{path}" stroke="{colour}" stroke-width="1.4"/>')
    return _svg(width, 40 + row_height * len(rows), parts, "when each sensor has items")


def _bounded(begins: Array, stops: Array, most: int = 400) -> list[tuple[int, int]]:
    """Stretches (begin, stop), neighbours joined where there are more than `most`."""
    group = -(-len(begins) // most)
    return [(int(begins[i]), int(stops[min(i + group, len(stops)) - 1])) for i in range(0, len(begins), group)]


def _path(trajectory: Trajectory) -> Markup:
    """The way from above, x east or forward at the start; equal scales; where it starts and where it ends."""
    size, margin = PICTURE_WIDTH, 34
    place = trajectory.world_from_ego[:, :2, 3]
    place = place[:: -(-len(place) // PATH_POINTS)]
    low, high = place.min(0), place.max(0)
    extent = max(float((high - low).max()), 5.0)
    middle = 0.5 * (low + high)
    scale = (size - 2 * margin) / extent
    x = size / 2 + (place[:, 0] - middle[0]) * scale
    y = size / 2 - (place[:, 1] - middle[1]) * scale
    line = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))
    bar = next((t for t in (500.0, 200.0, 100.0, 50.0, 20.0, 10.0, 5.0, 2.0) if t * scale < 0.4 * size), 1.0)
    parts = [
        f'<path d="{line}" fill="none" stroke="{COLOURS[0]}" stroke-width="3" stroke-linejoin="round" stroke-linecap="round"/>',
        f'<circle cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="5" fill="{GOOD}"/>', f'<circle cx="{x[-1]:.1f}" cy="{y[-1]:.1f}" r="5" fill="{COLOURS[1]}"/>',
        _label(12, 20, f"way from above ({trajectory.source} poses)"),
        f'<path d="M16 {size - 16}h{bar * scale:.1f}" stroke="currentColor" stroke-width="2"/>', _label(16, size - 22, f"{bar:g} m", size=11),
        f'<circle cx="{size - 120}" cy="{size - 18}" r="4" fill="{GOOD}"/>', _label(size - 110, size - 14, "start", size=11),
        f'<circle cx="{size - 60}" cy="{size - 18}" r="4" fill="{COLOURS[1]}"/>', _label(size - 50, size - 14, "end", size=11),
    ]  # fmt: skip
    return _svg(size, size, parts, "the way from above")


def _png(image: Array) -> bytes:
    from PIL import Image as Pillow

    out = io.BytesIO()
    Pillow.fromarray(image).save(out, "PNG", optimize=True)
    return out.getvalue()


def overlay_image(earlier: Array, later: Array, reach_m: float = REACH_M, cell_m: float = OVERLAY_CELL_M) -> Array:
    """(n,n,3) u8 from above, x up: cells of the cloud `earlier` (N,3) blue, of `later` (M,3) orange, of both nearly white; what is low left out, so
    that walls and cars are compared."""
    n = round(2 * reach_m / cell_m)
    ground = colours.ground_of((earlier.astype(np.float32),))
    filled = []
    for cloud in (earlier, later):
        cloud = cloud[(cloud[:, 2] > ground + 0.8) & (cloud[:, 2] < ground + 4)]
        row, column = np.floor((reach_m - cloud[:, 0]) / cell_m), np.floor((reach_m - cloud[:, 1]) / cell_m)
        inside = (row >= 0) & (row < n) & (column >= 0) & (column < n)
        filled.append(np.bincount((row[inside] * n + column[inside]).astype(np.int64), minlength=n * n) > 0)
    image = np.empty((n * n, 3), np.uint8)
    image[:] = colours.BACKGROUND
    image[filled[0]], image[filled[1]] = EARLIER, LATER
    image[filled[0] & filled[1]] = (250, 245, 235)
    return image.reshape(n, n, 3)


def _pictures(log: Log, timing: Timing) -> list[Markup]:
    parts = []
    if timing.reference is not None and len(log.sweep_stamps_ns[timing.reference]):
        index = len(log.sweep_stamps_ns[timing.reference]) // 2
        try:
            cloud = cloud_in_ego(log, timing.reference, index)
            caption = f"{timing.reference}, sweep {index}: {2 * REACH_M:.0f} m, forward is up"
            parts.append(picture(_png(cloud_image(cloud, REACH_M, 0.2)), caption, width=PICTURE_WIDTH))
        except WmError as error:
            parts.append(_lines([str(error)], "No picture of the sweep"))
    if log.poses is not None:
        parts.append(_overlay(log))
        parts.append(_path(log.poses))
    for camera in sorted(log.cameras)[:MAX_CAMERAS]:
        parts.append(_projection(log, camera))
    if len(log.cameras) > MAX_CAMERAS:
        parts.append(_lines([f"{len(log.cameras) - MAX_CAMERAS} further cameras are not shown"], "Cameras"))
    return parts


def _overlay(log: Log) -> Markup:
    pairs = pair_indices(log)
    if not pairs or log.poses is None:
        return _lines(["no two sweeps 1 s apart with poses"], "No overlay")
    earlier, later = pairs[len(pairs) // 2]
    lidar = log.reference_lidar
    try:
        first, second = cloud_in_ego(log, lidar, earlier), cloud_in_ego(log, lidar, later)
        poses = pose_at(log.poses, log.sweep_stamps_ns[lidar][[earlier, later]])
    except WmError as error:
        return _lines([str(error)], "No overlay")
    image = overlay_image(first, transform_points(inverse(poses[0]) @ poses[1], second))
    return picture(_png(image), f"sweeps {earlier} blue, {later} orange: white where poses agree", width=PICTURE_WIDTH)


def _projection(log: Log, camera: str) -> Markup:
    """An image of the camera with the nearest sweep of the reference LiDAR over it, by distance."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    record, stamps = log.cameras[camera], log.image_stamps_ns[camera]
    if not len(stamps):
        return _lines(["no images"], camera)
    index = len(stamps) // 2
    try:
        image = log.read_image(camera, index)
        pixels = decode(image)
        # twice as large as shown, for sharp screens
        width = 2 * IMAGE_WIDTH
        height = max(1, round(record.height * width / record.width))
        shown = Pillow.fromarray(pixels).resize((width, height), Pillow.Resampling.BICUBIC)
        caption = f"{camera}, image {index}"
        if log.lidars and len(log.sweep_stamps_ns[log.reference_lidar]):
            uv, depth, skew_ms, posed = _projected(log, camera, image.stamp_ns)
            draw = ImageDraw.Draw(shown)
            anchors = colours.ERROR[::-1] + colours.HEIGHT[::-1][:4]
            every = max(1, -(-len(uv) // MAX_DRAWN))
            uv, depth = uv[::every], depth[::every]
            tint = colours.ramp(np.log(np.maximum(depth, 1.0)), anchors, np.log(3), np.log(60)).astype(int)
            ratio = np.array([width / record.width, height / record.height])
            for (u, v), colour in zip((uv + 0.5) * ratio - 0.5, tint.tolist(), strict=True):
                draw.ellipse((u - 1.6, v - 1.6, u + 1.6, v + 1.6), fill=tuple(colour))
            when = f"{abs(skew_ms):.1f} ms {'later' if skew_ms > 0 else 'earlier'}{'' if posed else ', no poses'}"
            caption += f" and {log.reference_lidar} ({when}), coloured by distance"
    except WmError as error:
        return _lines([str(error)], f"No picture of {camera}")
    out = io.BytesIO()
    shown.save(out, "JPEG", quality=80)
    return picture(out.getvalue(), caption, width=IMAGE_WIDTH)


def _projected(log: Log, camera: str, stamp_ns: int) -> tuple[Array, Array, float, bool]:
    """Pixels (N,2) and depths (N,) of the sweep of the reference LiDAR nearest to the image, how much later it is in ms, and whether poses
    brought it to the image's instant (each point, where points have times)."""
    record, lidar = log.cameras[camera], log.reference_lidar
    stamps = log.sweep_stamps_ns[lidar]
    at = int(nearest_index(stamps, np.array([stamp_ns]))[0])
    sweep, ego_from_lidar = log.read_sweep(lidar, at), log.lidars[lidar].ego_from_lidar
    points, posed = sweep.points.astype(np.float64), False
    if log.poses is not None:
        with suppress(RecordError):  # the poses do not reach here: drawn without them, and the caption says so
            if sweep.time_ns is not None and not sweep.deskewed:
                points = deskew(points, sweep.time_ns, ego_from_lidar, log.poses, sweep.stamp_ns, stamp_ns)[0].astype(np.float64)
            else:
                poses = pose_at(log.poses, np.array([stamp_ns, stamps[at]])) @ ego_from_lidar
                points = transform_points(inverse(poses[0]) @ poses[1], points)
            posed = True
    points = transform_points(ego_from_lidar, points)
    uv, depth, seen = project(record, transform_points(inverse(record.ego_from_camera), points))
    return uv[seen], depth[seen], float(stamps[at] - stamp_ns) / 1e6, posed


def _charts(log: Log, timing: Timing, survey: Survey) -> list[Markup]:
    starts = [s.first_ns for s in timing.sensors if s.first_ns is not None]
    if not starts:
        return []
    start = min(starts)
    seconds = lambda stamps: ((np.asarray(stamps) - start) / 1e9).tolist()  # noqa: E731
    parts = []
    poses = timing.poses
    if poses is not None and len(poses.speed_ns):
        speeds = {f"poses ({poses.source})": (seconds(poses.speed_ns), poses.speed_mps.tolist())}
        if np.isfinite(poses.measured_mps).any():
            speeds["measured"] = (seconds(poses.speed_ns), poses.measured_mps.tolist())
        parts.append(line_chart(speeds, "time, s", "speed, m/s"))
        if np.isfinite(poses.measured_mps).any():
            parts.append(
                line_chart({"poses minus measured": (seconds(poses.speed_ns), poses.speed_error_mps.tolist())}, "time, s", "speed error, m/s")
            )
    known = [pair for pair in survey.pairs if pair.registered]
    if known:
        when = seconds([pair.from_ns for pair in known])
        distance = {"as the poses join them": (when, [p.median_m for p in known]), "after registration": (when, [p.registered_m for p in known])}
        parts.append(line_chart(distance, "time, s", "sweeps 1 s apart, median m"))
        parts.append(line_chart({"registration moves it by": (when, [p.moved_m for p in known])}, "time, s", "pose error over 1 s, m"))
    steps, skews = {}, {}
    for s in timing.sensors[:8]:
        stamps = log.sweep_stamps_ns[s.name] if s.kind == "lidar" else log.image_stamps_ns[s.name]
        if len(stamps) > 1:
            steps[s.name] = (seconds(stamps[1:]), (np.diff(stamps) / 1e6).tolist())
        if s.name != timing.reference and len(stamps) and timing.reference is not None and len(log.sweep_stamps_ns[timing.reference]):
            reference = log.sweep_stamps_ns[timing.reference]
            skews[s.name] = (seconds(reference), ((stamps[nearest_index(stamps, reference)] - reference) / 1e6).tolist())
    if steps:
        parts.append(line_chart(steps, "time, s", "time between items, ms"))
    if skews:
        parts.append(line_chart(skews, "time, s", "skew to the LiDAR, ms"))
    points = {name: (seconds(s.stamps_ns), s.points.tolist()) for name, s in list(survey.sweeps.items())[:8] if len(s.points)}
    if points:
        parts.append(line_chart(points, "time, s", "points per sweep"))
    return parts
