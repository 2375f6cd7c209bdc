"""A moving picture of a forecast: what was seen, then truth, forecast and best baseline side by side, all in the ego frame of t = 0, so that
what stands still in the world stands still in the picture and what moves is seen to move."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sensors.geometry import yaw_of
from worldmodel.drawing import colours
from worldmodel.drawing.render import Viewpoint, polyline, render
from worldmodel.forecast import Forecast, RayForecast

Array = NDArray[Any]

WIDTH, GAP, HEAD, FOOT = 900, 6, 34, 46
PANEL_HEIGHT = 322
GIF_BYTES = 2_000_000
GRID = (30, 37, 52)
# outline of the vehicle drawn at the sensor: length ahead and behind, half width, metres
EGO_OUTLINE = np.array([(2.6, 0.9), (2.6, -0.9), (-1.9, -0.9), (-1.9, 0.9), (2.6, 0.9)])


def seconds(value: float) -> str:
    """A horizon as captions have it: +0.6 s, -0.4 s, 0.0 s."""
    return f"{value:+.1f} s" if abs(value) > 0.05 else "0.0 s"


def scored(future: RayForecast, ranges: Array) -> Array:
    """Absolute range errors (S,) in metres of the rays with a truth and an answer; where part of the past was withheld, of the hidden rays."""
    error = np.abs(ranges - future.truth)
    kept = np.isfinite(error) if future.hidden is None else np.isfinite(error) & future.hidden
    return error[kept]


def median_error(future: RayForecast, ranges: Array) -> float:
    """Median of the `scored` errors in metres; NaN without any."""
    error = scored(future, ranges)
    return float(np.median(error)) if len(error) else float("nan")


def font(size: int) -> Any:
    return ImageFont.load_default(size)


def fit(draw: ImageDraw.ImageDraw, text: str, face: Any, width: float) -> str:
    """text, its middle left out where it is wider than width."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if draw.textlength(text, face) <= width:
        return text
    keep = len(text)
    while keep > 2 and draw.textlength(text[: (keep + 1) // 2] + "..." + text[len(text) - keep // 2 :], face) > width:
        keep -= 1
    return text[: (keep + 1) // 2] + "..." + text[len(text) - keep // 2 :]


def stage(viewpoint: Viewpoint, ground_z: float, ego: Array | None, width: int, height: int) -> Image.Image:
    """The empty scene: circles every 10 m and the vehicle's outline where the sensor is: `ego` (4,4), present_from_sensor, or None."""
    scale = 2
    picture = Image.new("RGB", (width * scale, height * scale), colours.BACKGROUND)
    draw = ImageDraw.Draw(picture)
    turn = np.linspace(0, 2 * np.pi, 181)
    for radius in (10, 20, 30, 40, 50):
        circle = np.stack([radius * np.cos(turn), radius * np.sin(turn), np.full_like(turn, ground_z)], axis=-1)
        for part in polyline(circle, viewpoint, width * scale, height * scale):
            draw.line(part, fill=GRID, width=scale)
    if ego is None:
        return picture.resize((width, height), Image.Resampling.BOX)
    heading = yaw_of(ego)
    c, s = np.cos(heading), np.sin(heading)
    outline = EGO_OUTLINE @ np.array([[c, s], [-s, c]]) + ego[:2, 3]
    for part in polyline(np.column_stack([outline, np.full(len(outline), ground_z + 0.1)]), viewpoint, width * scale, height * scale):
        draw.line(part, fill=colours.ACCENT, width=2 * scale, joint="curve")
    return picture.resize((width, height), Image.Resampling.BOX)


def viewpoint_of(forecast: Forecast) -> tuple[Viewpoint, float]:
    """Where to look from, and the height of the ground: behind and above the vehicle, what lies ahead in the middle."""
    ground_z = colours.ground_of(forecast.past)
    return Viewpoint(target=(7.0, 0.0, ground_z), distance_m=46.0, elevation_rad=float(np.deg2rad(38)), field_rad=float(np.deg2rad(40))), ground_z


def _timeline(draw: ImageDraw.ImageDraw, times: Sequence[float], now: float, left: float, right: float, y: float) -> None:
    low, high = min(times), max(times)
    place = lambda t: left + (right - left) * (t - low) / max(high - low, 1e-9)  # noqa: E731
    draw.line([(left, y), (right, y)], fill=(52, 62, 84), width=2)
    for t in times:
        x, on = place(t), t <= now + 1e-6
        colour = (colours.ACCENT if t > 1e-6 else (150, 190, 220)) if on else (52, 62, 84)
        radius = 5 if abs(t - now) < 1e-6 else 3
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    face = font(11)
    for t in (low, 0.0, high):
        text = "now" if abs(t) < 1e-6 else seconds(t)
        draw.text((place(t), y + 8), text, font=face, fill=colours.FAINT, anchor="ma")


def _legend(picture: Image.Image, draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
    face = font(11)
    for anchors, span, text in ((colours.HEIGHT, colours.HEIGHT_SPAN_M, "height"), (colours.ERROR, colours.ERROR_SPAN_M, "error")):
        bar = colours.ramp(np.linspace(*span, 84), anchors, *span).astype(np.uint8)
        picture.paste(Image.fromarray(np.repeat(bar[None], 7, axis=0)), (x, y - 3))
        draw.text((x, y + 8), f"{text} {max(span[0], 0):g}", font=face, fill=colours.FAINT)
        draw.text((x + 84, y + 8), f"{span[1]:g} m", font=face, fill=colours.FAINT, anchor="ra")
        x += 100


def faded(tint: Array) -> Array:
    """Colours (N,3) of what is past: half way to a cool grey."""
    return 0.45 * tint + 0.55 * np.array((96.0, 112.0, 140.0), np.float32)


def shaded_top(panel: Array, rows: int = 64) -> Array:
    """A panel (H,W,3) u8 that goes dark towards its upper edge, where the captions stand."""
    share = np.ones(len(panel))
    share[:rows] = 0.15 + 0.85 * np.linspace(0, 1, rows) ** 1.5
    return (panel * share[:, None, None] + np.array(colours.BACKGROUND) * (1 - share)[:, None, None]).astype(np.uint8)


def _palette(count: int) -> Image.Image:
    """A fixed palette of at most `count` colours: the ramps, whole and darkened towards the background, and greys for text. Fixed, so that
    no frame flickers against another and no caption loses its ramp."""
    background = np.array(colours.BACKGROUND, np.float32)
    even = lambda anchors, n: colours.ramp(np.linspace(0, 1, n), anchors, 0, 1)  # noqa: E731
    share = count / 240
    height, error = even(colours.HEIGHT, int(22 * share) + 2), even(colours.ERROR, int(14 * share) + 2)
    between = 0.5 * (even(colours.HEIGHT, int(8 * share)) + error[0])
    greys = background + (np.array(colours.TEXT) - background) * np.linspace(0, 1, int(20 * share) + 2)[:, None]
    dim = faded(even(colours.HEIGHT, int(14 * share) + 1))
    dark = [background + (tint - background) * s for s in (0.75, 0.5, 0.25) for tint in (height, error)] + [background + (dim - background) * 0.45]
    table = np.concatenate([greys, np.array([colours.ACCENT]), height, error, between, dim, *dark])
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.clip(np.round(table[:256]), 0, 255).astype(np.uint8).tobytes())
    return palette


def frames_of(forecast: Forecast) -> tuple[list[Image.Image], list[int]]:
    """Pictures (RGB, 900 px wide) and how long each stays, in ms: past sweeps first, faded and older ones fainter; then per future instant
    truth, model and best baseline, points blue by height and hot where they are wrong."""
    viewpoint, ground_z = viewpoint_of(forecast)
    panel = (WIDTH - 2 * GAP) // 3
    baseline = forecast.best_baseline
    times = [*map(float, forecast.past_times_s), *(f.horizon_s for f in forecast.futures)]
    title, small, big = font(15), font(12), font(17)

    def compose(panels: Sequence[Array], heads: Sequence[tuple[str, str]], now: float, what: str) -> Image.Image:
        picture = Image.new("RGB", (WIDTH, HEAD + PANEL_HEIGHT + FOOT), colours.BACKGROUND)
        draw = ImageDraw.Draw(picture)
        draw.text((12, 9), what, font=title, fill=colours.TEXT)
        room = WIDTH - 36 - draw.textlength(what, title)
        draw.text((WIDTH - 12, 11), fit(draw, forecast.clip, small, room), font=small, fill=colours.FAINT, anchor="ra")
        for column, (image, (name, figure)) in enumerate(zip(panels, heads, strict=True)):
            x = column * (panel + GAP)
            picture.paste(Image.fromarray(shaded_top(image)), (x, HEAD))
            draw.text((x + 12, HEAD + 8), fit(draw, name, big, panel - 24), font=big, fill=colours.TEXT)
            draw.text((x + 12, HEAD + 29), figure, font=small, fill=colours.FAINT)
            if column:
                draw.line([(x - GAP // 2 - 1, HEAD), (x - GAP // 2 - 1, HEAD + PANEL_HEIGHT)], fill=(30, 37, 52), width=1)
        _timeline(draw, times, now, 30, WIDTH - 250, HEAD + PANEL_HEIGHT + 14)
        _legend(picture, draw, WIDTH - 200, HEAD + PANEL_HEIGHT + 14)
        return picture

    pictures, stay_ms = [], []
    for index, now in enumerate(map(float, forecast.past_times_s)):
        # what came before stays as a faint trace, so that what moved is seen to have moved
        shown = [thinned(cloud, 40_000 if i == index else 12_000) for i, cloud in enumerate(forecast.past[: index + 1])]
        opacity = np.concatenate([np.full(len(cloud), 0.9 if i == index else 0.14, np.float32) for i, cloud in enumerate(shown)])
        points = np.concatenate(shown)
        scene = np.asarray(stage(viewpoint, ground_z, np.eye(4) if abs(now) < 1e-6 else None, WIDTH, PANEL_HEIGHT))
        cloud = render(points, faded(colours.by_height(points, ground_z)), viewpoint, WIDTH, PANEL_HEIGHT, opacity, 0.09, scene)
        pictures.append(compose([cloud], [("observed", "what every method is given")], now, f"past  {seconds(now)}" if now < -0.05 else "now"))
        stay_ms.append(240 if now < -0.05 else 700)
    for future in forecast.futures:
        scene = np.asarray(stage(viewpoint, ground_z, future.present_from_sensor, panel, PANEL_HEIGHT))
        panels, heads = [], []
        for name, ranges in (("truth", future.truth), ("model", future.ranges), (baseline, future.baselines.get(baseline))):
            if ranges is None:
                ranges = np.full(len(future.truth), np.nan, np.float32)
            points = future.points(ranges)
            tint = colours.tinted(colours.by_height(points, ground_z), ranges - future.truth)
            panels.append(render(points, tint, viewpoint, panel, PANEL_HEIGHT, None, 0.1, scene))
            error = median_error(future, ranges)
            figure = f"median error {100 * error:.0f} cm" if np.isfinite(error) else "no answer"
            if name == "truth":
                figure = f"{np.isfinite(ranges).sum():,} rays, their directions given"
            elif name == baseline:
                figure = f"best baseline, {figure}"
            heads.append((name.replace("_", " "), figure))
        pictures.append(compose(panels, heads, future.horizon_s, f"forecast  {seconds(future.horizon_s)}"))
        stay_ms.append(520)
    if stay_ms:
        stay_ms[-1] = 1600
    return pictures, stay_ms


def thinned(points: Array, count: int) -> Array:
    return points[:: max(1, -(-len(points) // count))]


def gif_bytes(forecast: Forecast, max_bytes: int = GIF_BYTES) -> bytes:
    """A GIF that loops, one frame per past sweep and future instant, at most max_bytes: fewer colours and then fewer pixels where it would
    be larger."""
    pictures, stay_ms = frames_of(forecast)
    data = b""
    for colour_count, share in ((240, 1.0), (80, 1.0), (80, 0.75), (48, 0.5)):
        scaled = [p if share == 1 else p.resize((int(p.width * share), int(p.height * share)), Image.Resampling.LANCZOS) for p in pictures]
        palette = _palette(colour_count)
        indexed = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in scaled]
        file = io.BytesIO()
        indexed[0].save(file, "GIF", save_all=True, append_images=indexed[1:], duration=stay_ms, loop=0, optimize=False, disposal=1)
        data = file.getvalue()
        if len(data) <= max_bytes:
            break
    return data
