"""One HTML file that plays a forecast, offline: truth, forecast and baselines as point clouds one can turn, with its own small WebGL2 viewer
(`page.js`). Nothing is fetched; the page's policy allows its own script and style by digest and nothing else."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from worldmodel.drawing import colours
from worldmodel.drawing.animation import EGO_OUTLINE, median_error, scored, seconds
from worldmodel.drawing.markup import digest, document, escaped, script_json
from worldmodel.drawing.sector import CERTAINTY_M, sector_of
from worldmodel.forecast import Forecast, RayForecast

Array = NDArray[Any]

PAGE_BYTES = 9_500_000
PAST_POINTS = 36_000
DRAWN_BASELINES = 4
NO_RANGE = 65535
WIDTH_STEP_M = 0.05


def octahedral(directions: Array) -> Array:
    """(N,2) u16 of directions (N,3): the octahedral map (Cigolle et al., "A Survey of Efficient Representations for Independent Unit Vectors",
    2014), 5e-5 rad at worst. Directions need not be unit vectors; those that are zero or not finite come out as +z."""
    d = np.asarray(directions, np.float64)
    norm = np.abs(d).sum(axis=1, keepdims=True)
    usable = np.isfinite(norm) & (norm > 0)
    d = np.where(usable, d, (0.0, 0.0, 1.0)) / np.where(usable, norm, 1.0)
    folded = (1 - np.abs(d[:, 1::-1])) * np.where(d[:, :2] >= 0, 1, -1)
    flat = np.where(d[:, 2:] < 0, folded, d[:, :2])
    return np.round((flat * 0.5 + 0.5) * 65535).astype(np.uint16)


def quantised(ranges: Array, metres: float) -> Array:
    """(N,) u16 of ranges (N,) in metres, `metres` being what 65535 stands for; not finite, negative or too long: NO_RANGE."""
    share = np.nan_to_num(np.asarray(ranges, np.float64) / metres, nan=-1.0, posinf=-1.0, neginf=-1.0)
    return np.where((share >= 0) & (share < 1), np.minimum(np.round(share * 65535), NO_RANGE - 1), NO_RANGE).astype(np.uint16)


class _Blob:
    """Bytes with arrays at offsets divisible by four."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.length = 0

    def put(self, array: Array) -> int:
        data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
        data += b"\0" * (-len(data) % 4)
        offset, self.length = self.length, self.length + len(data)
        self.parts.append(data)
        return offset


def _subset(count: int, keep: int) -> Array:
    """keep of count indices, ascending, always the same ones."""
    return np.arange(count) if count <= keep else np.sort(np.random.Generator(np.random.Philox(0)).choice(count, keep, replace=False))


def _longest(*ranges: Array) -> float:
    finite = [float(r[np.isfinite(r)].max(initial=0)) for r in ranges]
    return 1.001 * max(*finite, 1.0)


def _past_frame(blob: _Blob, cloud: Array, time_s: float) -> dict[str, Any]:
    cloud = cloud[_subset(len(cloud), PAST_POINTS)].astype(np.float64)
    ranges = np.sqrt((cloud**2).sum(axis=1))
    metres = min(_longest(ranges), 250.0)
    return {
        "future": False, "time": float(time_s), "count": len(cloud), "metres": metres, "pose": np.eye(4).ravel().tolist(),
        "direction": blob.put(octahedral(cloud)), "range": blob.put(quantised(ranges, metres)),
    }  # fmt: skip


def _future_frame(blob: _Blob, future: RayForecast, names: list[str], keep: int) -> dict[str, Any]:
    kept = _subset(len(future.ranges), keep)
    unknown = np.full(len(future.ranges), np.nan, np.float32)
    methods = [future.truth, future.ranges, *(future.baselines.get(name, unknown) for name in names)]
    metres = min(_longest(*methods), 250.0)
    width = np.nan_to_num((future.quantiles[:, -1] - future.quantiles[:, 0])[kept], nan=np.inf)
    frame = {
        "future": True, "time": float(future.horizon_s), "count": len(kept), "metres": metres,
        "pose": np.asarray(future.present_from_sensor, np.float64).ravel().tolist(),
        "direction": blob.put(octahedral(future.directions[kept])),
        "truth": blob.put(quantised(future.truth[kept], metres)), "model": blob.put(quantised(future.ranges[kept], metres)),
        "baselines": [blob.put(quantised(ranges[kept], metres)) for ranges in methods[2:]],
        "width": blob.put(np.clip(np.round(width / WIDTH_STEP_M), 0, 255).astype(np.uint8)),
        "medians": [None if np.isnan(m := median_error(future, ranges)) else m for ranges in methods],
    }  # fmt: skip
    as_byte = lambda values: np.clip(np.round(np.nan_to_num(np.asarray(values, np.float64)) * 255), 0, 255).astype(np.uint8)  # noqa: E731
    if future.intensity is not None:
        frame["intensity"] = blob.put(as_byte(future.intensity[kept]))
    if future.colour is not None or future.hidden is not None:
        rgba = np.zeros((len(kept), 4), np.uint8)
        rgba[:, :3] = 128 if future.colour is None else as_byte(future.colour[kept])
        rgba[:, 3] = 0 if future.hidden is None else 255 * future.hidden[kept].astype(np.uint8)
        frame["colour"] = blob.put(rgba)
    return frame


def _ramp_rows() -> Array:
    rows = [colours.ramp(np.linspace(0, 1, 256), anchors, 0, 1) for anchors in (colours.HEIGHT, colours.ERROR, colours.INTENSITY, colours.LATENT)]
    return np.concatenate([np.round(np.stack(rows)), np.full((4, 256, 1), 255)], axis=-1).astype(np.uint8)


def _gradient(anchors: tuple[tuple[int, int, int], ...]) -> str:
    return "linear-gradient(90deg," + ",".join(f"rgb{anchor}".replace(" ", "") for anchor in anchors) + ")"


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").strip()


def _style() -> str:
    clear = f"linear-gradient(90deg,rgb{colours.HEIGHT[3]},rgb{colours.BACKGROUND})"
    bars = {"height": _gradient(colours.HEIGHT), "error": _gradient(colours.ERROR), "intensity": _gradient(colours.INTENSITY), "certainty": clear}
    return _asset("page.css") + "".join(f"\n.ramp-{name} {{ background: {value}; }}" for name, value in bars.items())


def policy_digests() -> tuple[str, str]:
    """The digests of a page's script and style: what a page that embeds one by srcdoc has to allow as well."""
    return digest(_asset("page.js")), digest(_style())


def _numbers(forecast: Forecast, names: list[str]) -> str:
    """The table of errors: a row per method, a column per horizon, the best median of a column marked."""
    rows: list[tuple[str, list[tuple[float, float]]]] = []
    for name in ("model", *names):
        cells = []
        for future in forecast.futures:
            ranges = future.ranges if name == "model" else future.baselines.get(name)
            error = scored(future, ranges) if ranges is not None else np.zeros(0)
            cells.append((float(np.median(error)), float(error.mean())) if len(error) else (float("nan"), float("nan")))
        rows.append((name, cells))
    lines = []
    for name, cells in rows:
        marks = []
        for column, (median, mean) in enumerate(cells):
            others = [other[column][0] for _, other in rows if np.isfinite(other[column][0])]
            best = ' class="best"' if others and median == min(others) else ""
            marks.append(f"<td{best}>{median:.3f} / {mean:.2f}</td>" if np.isfinite(median) else "<td>-</td>")
        lines.append(f"<tr><th scope=row>{escaped(name)}</th>{''.join(marks)}</tr>")
    over = "the rays into the withheld sector" if any(sector_of(f) for f in forecast.futures) else "all rays"
    head = "".join(f"<th scope=col>{seconds(f.horizon_s)}</th>" for f in forecast.futures)
    return (
        f"<table><caption>Absolute range error in metres, median / mean over {over}; the lowest median is marked</caption>"
        f"<thead><tr><th scope=col>method</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )


def _ordered(forecast: Forecast) -> tuple[list[str], list[str]]:
    """The baselines, the best one first and then by mean error; and those of them that are drawn."""

    def error(name: str) -> float:
        known = np.concatenate([scored(f, f.baselines[name]) for f in forecast.futures if name in f.baselines])
        return float(known.mean()) if len(known) else np.inf

    names = {name for future in forecast.futures for name in future.baselines}
    every = sorted(names, key=lambda name: (name != forecast.best_baseline, error(name), name))
    return every, every[:DRAWN_BASELINES]


def _buttons(name: str, what: str, items: list[tuple[str, str]]) -> str:
    marks = ""
    for value, text in items:
        marks += f'<button type="button" value="{value}" aria-pressed="{"false" if marks else "true"}">{text}</button>'
    return f'<div class="choice" id="{name}" role="group" aria-label="{what}">{marks}</div>'


def forecast_page(forecast: Forecast, max_bytes: int = PAGE_BYTES) -> str:
    """The page, at most max_bytes long: where the rays of all instants do not fit, a fixed random share of them is drawn and the caption says
    so. `document.body.dataset.ready` is "1" once the first picture is drawn."""
    every, names = _ordered(forecast)
    blob = _Blob()
    ramps = blob.put(_ramp_rows())
    frames = [_past_frame(blob, cloud, time) for cloud, time in zip(forecast.past, forecast.past_times_s, strict=True)]
    per_ray = 4 + 2 * (2 + len(names)) + 1 + 1 + 4
    rays = max((len(f.ranges) for f in forecast.futures), default=0)
    room = 0.75 * max_bytes - 60_000 - blob.length
    keep = max(1, min(rays, int(room / max(1, per_ray * len(forecast.futures)))))
    frames += [_future_frame(blob, future, names, keep) for future in forecast.futures]
    has = lambda field: any(getattr(f, field) is not None for f in forecast.futures)  # noqa: E731
    modes = [("0", "Error"), ("1", "Height")]
    modes += [("2", "Intensity")] if has("intensity") else []
    modes += [("3", "Colour")] if has("colour") else []
    modes += [("4", "Certainty")]
    data = {
        "frames": frames, "ramps": ramps, "best": 0, "methods": 2 + len(names), "sectors": has("hidden"), "certainty": CERTAINTY_M,
        "ground": colours.ground_of(forecast.past),
        "heightSpan": colours.HEIGHT_SPAN_M, "errorSpan": colours.ERROR_SPAN_M, "outline": EGO_OUTLINE.tolist(),
        "background": [c / 255 for c in colours.BACKGROUND], "blob": base64.b64encode(b"".join(blob.parts)).decode(),
    }  # fmt: skip
    drawn = f"{rays:,} rays an instant" if keep >= rays else f"{keep:,} of {rays:,} rays an instant are drawn, so that the page stays small"
    options = "".join(f"<option>{escaped(name)}</option>" for name in names)
    captions = (
        ("seen", "observed", "what every method is given"),
        ("truth", "truth", "what the sensor saw"),
        ("model", "model", ""),
        ("baseline", "", ""),
    )
    labels = "".join(f'<div class="label" id="label-{key}" hidden><b>{name}</b><span>{line}</span></div>' for key, name, line in captions)
    panels = [("all", "Side by side"), ("truth", "Truth"), ("model", "Model"), *([("baseline", "Baseline")] if names else [])]
    low, high = colours.HEIGHT_SPAN_M
    body = f"""<header>
<h1>{escaped(forecast.clip)}</h1>
<p>Run {escaped(forecast.run)} · poses: {escaped(forecast.poses)} · {drawn}</p>
</header>
<div id="stage">
<canvas id="view" tabindex="0" aria-label="Point clouds of the forecast; drag to turn, shift-drag to move, wheel to zoom"></canvas>{labels}
<div id="message" hidden>This browser offers no WebGL2, so that the clouds cannot be drawn. The numbers below are whole.</div></div>
<section class="bar">
<button type="button" id="play">Play</button>
<div class="time"><input type="range" id="time" min="0" max="{max(len(frames) - 1, 0)}" step="1" value="0" aria-label="Instant">
<output id="now"></output></div>
</section>
<section class="bar">
{_buttons("panels", "Panels", panels)}
{_buttons("mode", "Colours", modes)}
<label>Baseline <select id="baseline">{options}</select></label>
<label>Points <input type="range" id="size" min="0.4" max="3" step="0.1" value="1"></label>
<label><input type="checkbox" id="trace" checked> trace of the past</label>
<button type="button" id="home">Reset</button>
</section>
<section class="legend">
<span data-mode="014"><i class="ramp-height"></i>height {max(low, 0):g} to {high:g} m over the ground</span>
<span data-mode="0"><i class="ramp-error"></i>range error {colours.ERROR_SPAN_M[0]:g} to {colours.ERROR_SPAN_M[1]:g} m</span>
<span data-mode="2" hidden><i class="ramp-intensity"></i>intensity 0 to 1, forecast by the model</span>
<span data-mode="3" hidden>colour, forecast by the model</span>
<span data-mode="4" hidden><i class="ramp-certainty"></i>model: 80 % interval 0 to {3 * CERTAINTY_M:g} m wide</span>
</section>
<section class="numbers">{_numbers(forecast, every)}</section>
<footer><p>Everything stands in the vehicle's frame at t = 0 (now): what stands still in the world stands still here. Rings every 10 m.
That a ray returns, and its direction, is given; how far it goes is forecast. Drag to turn, shift-drag or two fingers to move, wheel or pinch to
zoom, space to play.</p></footer>"""
    return document(f"Forecast {forecast.clip}", body, _style(), [_asset("page.js")], script_json(data))
