"""Clips by what is in them, without labels: a condition on measures of a clip, and the parts of a store that meet it.

A condition is arithmetic, comparison, `and`, `or`, `not` over the names in MEASURES, in Python's grammar; it is parsed, never run.
A measure is taken when the condition comes to it: in `speed > 5 and movers >= 3` nothing is searched for what moves where the vehicle is slow.
One that a clip does not have (brightness without a camera) is NaN, and no comparison with NaN holds.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.errors import Interrupted, UsageError, WmError, one_line
from sensors.formats.images import decode
from sensors.motion import Motion, motion_of
from sensors.rays import History, history_of
from sensors.records import Clip

Array = NDArray[Any]

LONGEST, LARGEST = 1000, 1e18  # characters of a condition, and a number in it
FAR_M = 30.0


class Moment:
    """A clip with what its measures share; each is taken once, when it is asked for."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.values: dict[str, float] = {}
        frames = (*clip.past, *clip.future)
        self.seconds: Array = np.array([(frame.stamp_ns - clip.stamp_ns) / 1e9 for frame in frames])
        self.poses: Array = np.stack([frame.world_from_ego for frame in frames])

    def value(self, name: str) -> float:
        if name not in self.values:
            self.values[name] = MEASURES[name](self)
        return self.values[name]

    @cached_property
    def history(self) -> History:
        return history_of(self.clip)

    @property
    def motion(self) -> Motion:
        return motion_of(self.history)

    @property
    def speeds(self) -> Array:
        """(F-1,) m/s between one frame and the next."""
        steps: Array = np.linalg.norm(np.diff(self.poses[:, :3, 3], axis=0), axis=1) / np.diff(self.seconds)
        return steps


def _acceleration(moment: Moment) -> float:
    middles = (moment.seconds[1:] + moment.seconds[:-1]) / 2
    return float(np.polyfit(middles, moment.speeds, 1)[0]) if len(middles) > 1 else math.nan


def _turn(moment: Moment) -> float:
    heading = moment.poses[:, :2, 0]
    yaw = np.unwrap(np.arctan2(heading[:, 1], heading[:, 0]))
    return float(np.rad2deg(abs(yaw[-1] - yaw[0])))


def _share(which: Array) -> float:
    return float(which.mean()) if len(which) else math.nan


def _brightness(moment: Moment) -> float:
    log, frame = moment.clip.log, moment.clip.past[-1]
    grey = [float(decode(log.read_image(name, index)).mean()) / 255 for name, (index, _) in sorted(frame.images.items())]
    return float(np.mean(grey)) if grey else math.nan


MEASURES: Mapping[str, Callable[[Moment], float]] = {
    # of the vehicle, over the clip's past and future: m/s; m/s², below 0 it brakes; degrees between the first heading and the last
    "speed": lambda m: float(m.speeds.mean()),
    "acceleration": _acceleration,
    "turn": _turn,
    # of what was found to move, by motion alone: how many things, the share of the newest sweep's returns on them, m/s of the fastest (0: none)
    "movers": lambda m: float(len(np.unique(m.motion.cluster[m.motion.cluster >= 0]))),
    "moving": lambda m: _share(m.motion.cluster >= 0),
    "fastest": lambda m: float(np.linalg.norm(m.motion.velocity, axis=1).max(initial=0.0)),
    # of the newest sweep, without the vehicle's own returns: how many, and the share beyond FAR_M, which says how open it is
    "returns": lambda m: float(len(m.history.points[-1])),
    "far": lambda m: _share(np.linalg.norm(m.history.points[-1], axis=1) > FAR_M),
    # of the images at t = 0: their mean, 0..1; night is dark
    "brightness": _brightness,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_ARITHMETIC: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Condition:
    """A parsed condition: its text, and the names in it in order."""

    text: str
    names: tuple[str, ...]
    tree: ast.expr = field(repr=False)

    def holds(self, measure: Callable[[str], float]) -> bool:
        """Whether it holds for the values that measure(name) gives; `and` and `or` ask for no more than they need."""
        return _true(self.tree, measure)


def condition(text: str) -> Condition:
    """UsageError for a text that is none, with what is wrong."""
    shown = one_line(text, 120)
    if len(text) > LONGEST:
        raise UsageError(f"condition of {len(text)} characters, at most {LONGEST}: {shown}")
    names: list[str] = []
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        complete = _is_condition(tree, names, shown)
    except UsageError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"{shown}: not a condition ({one_line(getattr(error, 'msg', error), 80)}); write e.g. 'speed > 5 and movers >= 3'"
        ) from error
    if not complete:
        raise UsageError(f"{shown}: a number, not a condition; compare it, e.g. 'speed > 5'")
    return Condition(text.strip(), tuple(dict.fromkeys(names)), tree)


def _is_condition(node: ast.expr, names: list[str], shown: str) -> bool:
    """Whether a node is true or false (else a number); collects the names. UsageError for what has no place in a condition."""
    if isinstance(node, ast.BoolOp | ast.Compare) or (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
        parts = node.values if isinstance(node, ast.BoolOp) else [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.operand]
        wanted = not isinstance(node, ast.Compare)
        if isinstance(node, ast.Compare) and not all(type(op) in _COMPARISONS for op in node.ops):
            raise UsageError(f"{shown}: {ast.unparse(node)!r}; compare with <, <=, >, >=, == or !=")
        for part in parts:
            if _is_condition(part, names, shown) != wanted:
                kind = "a condition" if wanted else "a number"
                raise UsageError(f"{shown}: {ast.unparse(part)!r} stands where {kind} belongs")
        return True
    if isinstance(node, ast.Name):
        if node.id not in MEASURES:
            raise UsageError(f"{shown}: {node.id!r} is not one of {', '.join(MEASURES)}")
        names.append(node.id)
        return False
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and abs(node.value) <= LARGEST:  # type: ignore[arg-type,operator]
        return False
    numbers = [node.left, node.right] if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC else []
    numbers = numbers or ([node.operand] if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else [])
    if not numbers or any([_is_condition(number, names, shown) for number in numbers]):
        raise UsageError(f"{shown}: {ast.unparse(node)!r} has no place in a condition; use numbers, + - * /, comparisons, and, or, not")
    return False


def _true(node: ast.expr, measure: Callable[[str], float]) -> bool:
    if isinstance(node, ast.BoolOp):
        return (all if isinstance(node.op, ast.And) else any)(_true(part, measure) for part in node.values)
    if isinstance(node, ast.UnaryOp):
        return not _true(node.operand, measure)
    assert isinstance(node, ast.Compare)
    left = _number(node.left, measure)
    for compare, right in zip(node.ops, node.comparators, strict=True):
        value = _number(right, measure)
        if math.isnan(left) or math.isnan(value) or not _COMPARISONS[type(compare)](left, value):
            return False
        left = value
    return True


def _number(node: ast.expr, measure: Callable[[str], float]) -> float:
    if isinstance(node, ast.Name):
        return measure(node.id)
    if isinstance(node, ast.UnaryOp):
        return -_number(node.operand, measure)
    if isinstance(node, ast.BinOp):
        try:
            return _ARITHMETIC[type(node.op)](_number(node.left, measure), _number(node.right, measure))
        except (ZeroDivisionError, OverflowError):
            return math.nan
    assert isinstance(node, ast.Constant) and isinstance(node.value, int | float)
    return float(node.value)


@dataclass(frozen=True, eq=False)
class Selected:
    """A clip that meets the condition, and the measures that this took."""

    clip: Clip
    values: Mapping[str, float]


def select(clips: Iterable[Clip], wanted: Condition, unreadable: list[str]) -> Iterator[Selected | None]:
    """For each clip what is said of it where it meets the condition, else None; lines about clips that cannot be read are added to `unreadable`."""
    for clip in clips:
        moment = Moment(clip)
        try:
            found = Selected(clip, moment.values) if wanted.holds(moment.value) else None
        except Interrupted:
            raise
        except WmError as error:
            unreadable.append(one_line(error))
            found = None
        yield found


def ranges(selected: Iterable[Selected]) -> list[tuple[str, int, int]]:
    """Stretches (log id, from_ns, to_ns) that hold the clips, in order; clips of one log that overlap are in one, with whatever lies between them. A
    sweep at to_ns is not in it."""
    out: list[tuple[str, int, int]] = []
    spans = [(s.clip.log.id, s.clip.past[0].stamp_ns, (s.clip.future or s.clip.past)[-1].stamp_ns + 1) for s in selected]
    for log, first, last in sorted(spans):
        if out and out[-1][0] == log and first <= out[-1][2]:
            out[-1] = (log, out[-1][1], max(out[-1][2], last))
        else:
            out.append((log, first, last))
    return out
