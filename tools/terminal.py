"""What the commands share on the terminal: tables on stdout, progress with rate and time left on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sensors.errors import one_line

Report = Callable[[int, int, str], None]


def reporter(what: str) -> Report:
    """A function of (done, total, text): one live line on a terminal, otherwise a line every ten seconds. With a total of 0 the text is a
    remark, printed at once and on a line of its own."""
    start = time.monotonic()
    state = {"last": 0.0, "width": 0}
    since: tuple[float, int] | None = None  # when and at what count the work began: a resumed command finds some done, and preparing takes time
    live = sys.stderr.isatty()

    def report(done: int, total: int, text: str = "") -> None:
        nonlocal since
        now = time.monotonic()
        if text and not total:
            print(("\r" if live else "") + f"{what}: {text}".ljust(state["width"]), file=sys.stderr, flush=True)
            return
        if since is None or done <= since[1]:
            since = (now, done)
        if done < total and now - state["last"] < (0.2 if live else 10.0):
            return
        state["last"] = now
        rate = (done - since[1]) / max(now - since[0], 1e-9)
        pace = f"{rate:.2f}/s, {(total - done) / rate:.0f} s left" if rate else "starting"
        line = f"{what}: {done}/{total}, {pace}" if done < total else f"{what}: {done} in {now - start:.1f} s"
        line = f"{line}  {text}" if text else line
        if live:
            print("\r" + line.ljust(state["width"])[:200], end="\n" if done >= total else "", file=sys.stderr, flush=True)
            state["width"] = len(line)
        else:
            print(line, file=sys.stderr, flush=True)

    return report


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout; numbers are right-aligned; a cell is text already formatted by the caller."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    width = Console().width if sys.stdout.isatty() else 200
    # a narrower console would cut cells and leave whole columns out, of which nobody would learn
    Console(width=max(width, Console(width=10_000).measure(table).maximum), soft_wrap=False).print(table)


def print_references(references: Mapping[str, int]) -> None:
    """One remark on logs that have several LiDARs: in how many of them frames are built on which. Nothing where there are none."""
    if references:
        taken = ", ".join(f"{one_line(name, 40)} in {count}" for name, count in list(references.items())[:5])
        print(f"logs with several LiDARs: frames are built on the highest of those with most sweeps ({taken}); no option chooses another, an "
              "adapter that leaves it out does")  # fmt: skip


def print_json(command: str, **fields: Any) -> None:
    """One JSON object on stdout: schema_version, command, and the fields given (no NaN: null)."""
    print(json.dumps({"schema_version": 1, "command": command, **_finite(fields)}, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
