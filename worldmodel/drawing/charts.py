"""Charts and tables as markup: SVG without scripts and style attributes, so that the strictest policy lets them through. Text takes the page's
colour; every label is escaped here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from worldmodel.drawing.markup import Markup, escaped

# told apart in lightness as well as in hue, on white and on black
COLOURS = ("#1f8fd6", "#e8833a", "#2fa57f", "#c2549d", "#8a7bd8", "#a58a2e", "#d2504f", "#6f8695")
WIDTH, HEIGHT = 528, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 40
MAX_POINTS = 400


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= count)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Exponents of 1, 2 and 5 times the powers of ten between 10^low and 10^high, or of the powers alone where that would be too many."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    fine = [d + math.log10(m) for d in decades for m in (1, 2, 5) if low <= d + math.log10(m) <= high]
    return fine if 2 <= len(fine) <= 7 else [float(d) for d in decades if low <= d <= high] if len(fine) > 7 else ticks(low, high)


def number(value: float) -> str:
    """A figure as axes and tables have it: three digits, thousands as k, no trailing zeros; - where it is not finite."""
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 1e4:
        return f"{value / 1000:.3g}k" if abs(value) < 1e6 else f"{value:.2e}"
    return f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 11, faint: bool = True) -> str:
    opacity = ' fill-opacity="0.65"' if faint else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="currentColor"{opacity}>{escaped(text, 80)}</text>'


def _svg(width: int, height: int, parts: Sequence[str], what: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{escaped(what)}" '
        f'font-family="system-ui, sans-serif">{"".join(parts)}</svg>'
    )


def _legend(names: Sequence[str], width: int, y: float) -> tuple[list[str], int]:
    """The names with their colours, in as many rows as they need, and the height these take."""
    parts, x, row = [], float(LEFT), 0
    for index, name in enumerate(names):
        room = 24 + 6.4 * min(len(name), 40)
        if x + room > width and x > LEFT:
            x, row = float(LEFT), row + 1
        parts.append(f'<rect x="{x:.1f}" y="{y + 18 * row - 8:.1f}" width="12" height="8" rx="2" fill="{COLOURS[index % len(COLOURS)]}"/>')
        parts.append(_text(x + 17, y + 18 * row, name, "start", faint=False))
        x += room
    return parts, 18 * (row + 1)


def line_chart(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str, *, log_y: bool = False) -> Markup:
    """Curves by name, each x ascending and y of equal length. A y that is not finite (or, on a log axis, not positive) is a gap. Long curves
    are thinned to MAX_POINTS."""
    scale = (lambda v: math.log10(v)) if log_y else (lambda v: v)
    usable = lambda x, y: math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)  # noqa: E731
    points = {name: [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)] for name, (xs, ys) in series.items()}
    known = [(x, scale(y)) for curve in points.values() for x, y in curve if usable(x, y)]
    if not known:
        return _svg(WIDTH, 60, [_text(WIDTH / 2, 34, f"{y_label}: no finite value")], y_label)
    x_low, x_high = min(x for x, _ in known), max(x for x, _ in known)
    y_low, y_high = min(y for _, y in known), max(y for _, y in known)
    pad = 0.06 * (y_high - y_low) or 0.5 * abs(y_high) or 0.5
    y_low, y_high = y_low - pad, y_high + pad
    x_of = lambda x: LEFT + (WIDTH - LEFT - RIGHT) * (x - x_low) / max(x_high - x_low, 1e-12)  # noqa: E731
    y_of = lambda y: HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_low) / (y_high - y_low)  # noqa: E731
    parts = []
    for tick in (log_ticks if log_y else ticks)(y_low, y_high):
        parts.append(f'<path d="M{LEFT} {y_of(tick):.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-opacity="0.13"/>')
        parts.append(_text(LEFT - 7, y_of(tick) + 4, number(10**tick if log_y else tick), "end"))
    parts += [_text(x_of(tick), HEIGHT - BOTTOM + 16, number(tick)) for tick in ticks(x_low, x_high, 6)]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label))
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f'<g transform="translate(13 {middle:.0f}) rotate(-90)">{_text(0, 0, y_label)}</g>')
    for index, curve in enumerate(points.values()):
        every = max(1, -(-len(curve) // MAX_POINTS))
        path, pen = [], "M"
        for i, (x, y) in enumerate(curve):
            if not usable(x, y):
                pen = "M"
            elif i % every == 0 or i == len(curve) - 1 or pen == "M":
                path.append(f"{pen}{x_of(x):.1f} {y_of(scale(y)):.1f}")
                pen = "L"
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<path d="{"".join(path)}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round" stroke-linecap="round"/>')
        if len(curve) <= 12:
            parts += [f'<circle cx="{x_of(x):.1f}" cy="{y_of(scale(y)):.1f}" r="3" fill="{colour}"/>' for x, y in curve if usable(x, y)]
    legend, height = _legend(list(points), WIDTH, HEIGHT + 12)
    return _svg(WIDTH, HEIGHT + 6 + height, parts + legend, f"{y_label} over {x_label}")


def bar_chart(rows: Sequence[tuple[str, Mapping[str, float]]], unit: str = "") -> Markup:
    """Horizontal bars: a group per row (label, value by series name). Bars start at zero; a value that is not finite has none and says -."""
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    finite = [v for _, values in rows for v in values.values() if math.isfinite(v)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    left, right, thick = 150, 64, 14
    x_of = lambda v: left + (WIDTH - left - right) * (v - low) / max(high - low, 1e-12)  # noqa: E731
    parts, y = [], float(TOP)
    for label, values in rows:
        parts.append(_text(left - 9, y + thick * max(len(values), 1) / 2 + 4, label, "end", faint=False))
        for name, value in values.items():
            if math.isfinite(value):
                start, end = sorted((x_of(0), x_of(value)))
                colour = COLOURS[names.index(name) % len(COLOURS)]
                parts.append(f'<rect x="{start:.1f}" y="{y:.1f}" width="{max(end - start, 0.5):.1f}" height="{thick - 2}" rx="2" fill="{colour}"/>')
            parts.append(_text((x_of(max(value, 0)) if math.isfinite(value) else x_of(0)) + 5, y + 10, f"{number(value)} {unit}".rstrip(), "start"))
            y += thick
        y += 9
    if len(names) < 2:
        return _svg(WIDTH, int(y) + 4, parts, unit or "bars")
    legend, height = _legend(names, WIDTH, y + 10)
    return _svg(WIDTH, int(y) + 8 + height, parts + legend, unit or "bars")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", lowest: Sequence[int] = ()) -> Markup:
    """A table: floats by `number`, everything else as text. lowest: columns whose lowest finite figure is marked."""
    best = {}
    for column in lowest:
        figures = [float(row[column]) for row in rows if isinstance(row[column], int | float) and math.isfinite(float(row[column]))]  # type: ignore[arg-type]
        if figures:
            best[column] = min(figures)
    lines = []
    for row in rows:
        cells = []
        for column, value in enumerate(row):
            text = number(value) if isinstance(value, float) else escaped(value)
            marked = column in best and isinstance(value, int | float) and float(value) == best[column]
            cells.append(f"<th scope=row>{text}</th>" if column == 0 else f'<td class="best">{text}</td>' if marked else f"<td>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th scope=col>{escaped(column)}</th>" for column in columns)
    top = f"<caption>{escaped(caption)}</caption>" if caption else ""
    return Markup(f'<div class="numbers"><table>{top}<thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>')
