"""A still picture of what a forecast fills in: a sector that was withheld from all input, as opaque as the forecast is sure."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from worldmodel.drawing import colours
from worldmodel.drawing.animation import (
    FOOT,
    GAP,
    HEAD,
    PANEL_HEIGHT,
    WIDTH,
    faded,
    fit,
    font,
    median_error,
    seconds,
    shaded_top,
    stage,
    thinned,
    viewpoint_of,
)
from worldmodel.drawing.render import polyline, render
from worldmodel.forecast import Forecast, RayForecast

Array = NDArray[Any]

# width of the 80 % interval at which a point's opacity is e^-1
CERTAINTY_M = 2.0
REACH_M = 32.0


def azimuths(points: Array) -> Array:
    """(N,) rad about the ego frame's z axis."""
    return np.arctan2(points[:, 1], points[:, 0])


def sector_of(future: RayForecast) -> tuple[float, float] | None:
    """Centre and width in rad of the hidden rays' ends, about the ego frame of t = 0; None without hidden rays."""
    if future.hidden is None or not future.hidden.any():
        return None
    ends = future.points(np.where(np.isfinite(future.truth), future.truth, future.ranges))[future.hidden]
    azimuth = azimuths(ends[np.isfinite(ends).all(axis=1)])
    if not len(azimuth):
        return None
    centre = float(np.angle(np.exp(1j * azimuth).mean()))
    away = np.angle(np.exp(1j * (azimuth - centre)))
    return centre + 0.5 * float(away.min() + away.max()), float(away.max() - away.min())


def certainty(quantiles: Array) -> Array:
    """Opacity (R,) f32 in 0.05..1 from quantiles (R,L) in metres, lowest first, highest last: 1 where the interval has no width, e^-1 where
    it is CERTAINTY_M wide."""
    width = np.nan_to_num(quantiles[:, -1] - quantiles[:, 0], nan=np.inf)
    return np.clip(np.exp(-np.maximum(width, 0) / CERTAINTY_M), 0.05, 1).astype(np.float32)


def sector_picture(forecast: Forecast, scale: float = 1.6) -> bytes:
    """PNG of the first future instant with hidden rays: what was given, what the forecast fills in (opacity: how narrow its 80 % interval
    is), and the truth. ValueError where no ray is hidden."""
    future = next((f for f in forecast.futures if sector_of(f) is not None), None)
    sector = None if future is None else sector_of(future)
    if future is None or sector is None:
        raise ValueError("sector_picture: no ray of the forecast is hidden; make it with hide_sector_rad")
    centre, spread = sector
    px = lambda value: round(value * scale)  # noqa: E731
    panel, height, head, foot = px(298), px(PANEL_HEIGHT), px(HEAD), px(FOOT)
    viewpoint, ground_z = viewpoint_of(forecast)
    scene = stage(viewpoint, ground_z, future.present_from_sensor, panel, height)
    wedge = REACH_M * np.exp(1j * (centre + np.linspace(-spread / 2, spread / 2, 41)))
    outline = np.array([(0.0, 0.0), *zip(wedge.real, wedge.imag, strict=True), (0.0, 0.0)])
    for part in polyline(np.column_stack([outline, np.full(len(outline), ground_z)]), viewpoint, panel, height):
        ImageDraw.Draw(scene).line(part, fill=colours.ACCENT, width=max(1, px(1)))
    seen = thinned(forecast.past[-1], 60_000) if len(forecast.past) else np.zeros((0, 3), np.float32)
    seen = seen[np.abs(np.angle(np.exp(1j * (azimuths(seen) - centre)))) > spread / 2]
    hidden = np.asarray(future.hidden, bool)

    def shown(ranges: Array, opacity: Array) -> Array:
        points = future.points(ranges)
        tint = colours.by_height(points, ground_z)
        tint[~hidden] = 0.6 * faded(tint[~hidden])
        return render(points, tint, viewpoint, panel, height, np.where(hidden, opacity, 1).astype(np.float32), 0.11, np.asarray(scene))

    given = render(seen, 0.6 * faded(colours.by_height(seen, ground_z)), viewpoint, panel, height, None, 0.09, np.asarray(scene))
    filled, truth = shown(future.ranges, certainty(future.quantiles)), shown(future.truth, np.ones(len(hidden), np.float32))
    widths = (future.quantiles[:, -1] - future.quantiles[:, 0])[hidden]
    picture = Image.new("RGB", (px(WIDTH), head + height + foot), colours.BACKGROUND)
    draw = ImageDraw.Draw(picture)
    title, big, small = font(px(15)), font(px(17)), font(px(12))
    what = f"{np.rad2deg(spread):.0f} degrees withheld,  {seconds(future.horizon_s)}"
    draw.text((px(12), px(9)), what, font=title, fill=colours.TEXT)
    room = px(WIDTH - 36) - draw.textlength(what, title)
    draw.text((px(WIDTH - 12), px(11)), fit(draw, forecast.clip, small, room), font=small, fill=colours.FAINT, anchor="ra")
    error = median_error(future, future.ranges)
    figure = f"median error there {100 * error:.0f} cm" if np.isfinite(error) else "no truth there"
    panels = ((given, "given", "last sweep"), (filled, "filled in", figure), (truth, "truth", "never shown to the model"))
    for column, (image, name, line) in enumerate(panels):
        x = column * (panel + px(GAP) // 2)
        picture.paste(Image.fromarray(shaded_top(image, px(64))), (x, head))
        draw.text((x + px(12), head + px(8)), name, font=big, fill=colours.TEXT)
        draw.text((x + px(12), head + px(29)), line, font=small, fill=colours.FAINT)
    y, bar = head + height + px(12), px(180)
    share = np.exp(-np.linspace(0, 3 * CERTAINTY_M, bar) / CERTAINTY_M)[:, None]
    strip = np.array(colours.BACKGROUND) * (1 - share) + np.array(colours.HEIGHT[3]) * share
    picture.paste(Image.fromarray(np.repeat(strip.astype(np.uint8)[None], px(8), axis=0)), (px(12), y))
    draw.text((px(12), y + px(12)), "sure", font=small, fill=colours.FAINT)
    draw.text((px(12) + bar, y + px(12)), f"80 % interval {3 * CERTAINTY_M:.0f} m wide", font=small, fill=colours.FAINT, anchor="ra")
    width = f"80 % interval in the sector: {float(np.median(widths)):.1f} m wide (median)"
    draw.text((px(WIDTH - 12), y + px(12)), width, font=small, fill=colours.FAINT, anchor="ra")
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()
