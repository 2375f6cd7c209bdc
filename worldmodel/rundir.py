"""The run folder: `config.yaml` as resolved, `environment.json`, `metrics.jsonl`, TensorBoard events, `checkpoints/`, pictures."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from sensors.data import Part
from sensors.errors import UsageError, one_line
from sensors.files import BadFile, make_folder, read_json, read_whole, write_file, write_json
from worldmodel.config import Config, config_of, parse_tree, tree_of

PACKAGES = ("driving-worldmodel", "torch", "numpy", "numba", "open3d-cpu", "open3d", "opencv-python", "safetensors", "pyarrow")
SAME = ("log", "from_ns", "to_ns", "weight", "digest")  # what a part of the data is known by


def create(run: Path, config: Config, parts: Sequence[Part]) -> None:
    """A new run folder with what is known before the first step."""
    if (run / "config.yaml").exists():
        raise UsageError(f"{one_line(run)}: holds a run already; give another folder, or --resume it")
    make_folder(run)
    write_file(run / "config.yaml", yaml.safe_dump(tree_of(config), sort_keys=False).encode())
    write_json(run / "environment.json", environment(parts))


def check_same_data(run: Path, parts: Sequence[Part]) -> None:
    """UsageError where the parts are not those that the run began with: other logs would be held out, some of them trained on before."""
    both = read_json(run / "environment.json")["logs"], _rows(parts)
    began, now = ([[row.get(key) for key in SAME] for row in logs] for logs in both)
    if began != now:
        raise UsageError(f"{one_line(run)}: began with other data ({_difference(began, now)}), so other logs would be held out; give the same, "
                         "or begin a new run")  # fmt: skip


def _difference(began: list[list[Any]], now: list[list[Any]]) -> str:
    if len(began) != len(now):
        return f"{len(began)} parts then, {len(now)} now"
    first = next(row for row, other in zip(now, began, strict=True) if row != other)
    return f"{one_line(first[0])} is not as it was"


def read_config(run: Path) -> Config:
    path = run / "config.yaml"
    if not path.is_file():
        raise UsageError(f"{one_line(run)}: no config.yaml; is it a run folder?")
    what = one_line(path)
    try:
        return config_of(parse_tree(read_whole(path, 1 << 20), what), what)
    except UsageError as error:
        raise BadFile(f"{error}; damaged, or of another version of this program: restore it, or train the run again") from error


def environment(parts: Sequence[Part]) -> dict[str, Any]:
    """Versions, machine, command, and of the data: logs, licences, pose sources, digests."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0], "versions": versions, "machine": platform.machine(), "cpu": _cpu(), "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "command": [one_line(a) for a in sys.argv],
            "git": _git(), "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "licence": strictest([p.log.licence for p in parts]), "logs": _rows(parts)}  # fmt: skip


def _rows(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [{"log": p.log.id, "licence": p.log.licence, "poses": p.log.poses.source if p.log.poses else None,
             "from_ns": p.from_ns, "to_ns": p.to_ns, "weight": p.weight, "digest": p.digest} for p in parts]  # fmt: skip


def strictest(licences: Sequence[str]) -> str:
    """The licence that binds hardest among those of the data: non-commercial and share-alike terms outweigh attribution, and that none. A
    licence of other words, such as a company's own, may forbid anything: all of these are named, beside the hardest of the others."""
    known, own = {}, set()
    for text in licences:
        words = set(re.split(r"[^A-Z0-9]+", text.upper().replace("NON-COMMERCIAL", "NC").replace("NONCOMMERCIAL", "NC")))
        rank = ("NC" in words, "SA" in words, bool({"BY", "MIT", "APACHE", "BSD"} & words))
        if any(rank) or {"CC0", "PUBLIC"} & words:
            known[text] = rank
        else:
            own.add(text)
    hardest = max(known, key=lambda text: (known[text], text), default=None)
    if own and hardest is not None and not any(known[hardest][:2]):
        hardest = None  # what asks for a name, or for nothing, adds nothing to what may forbid anything
    return "; ".join([*sorted(own), *([hardest] if hardest is not None else [])]) or "none"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.processor())
    except OSError:
        return platform.processor()


def _git() -> str | None:
    try:
        out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip() or None


class Journal:
    """`metrics.jsonl` and TensorBoard events of a run. On a resume both are cut back to the step it starts from."""

    def __init__(self, run: Path, first: int, *, enabled: bool = True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.path = run / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if line["step"] <= first] if first else []
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = open(self.path, "a")  # noqa: SIM115
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=first + 1 if first else None)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self.file.close()
            self.board.close()  # type: ignore[no-untyped-call]

    def write(self, step: int, elapsed_s: float, scalars: Mapping[str, float]) -> None:
        if not self.enabled:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self.file.write(json.dumps({"step": step, "elapsed_s": round(elapsed_s, 2), **finite}, allow_nan=False) + "\n")
        for name, value in finite.items():
            if value is not None:
                self.board.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def pictures(self, step: int, pictures: Mapping[str, NDArray[Any]]) -> None:
        """Images (H,W,3) u8 and clouds (N,3) f32, by tag."""
        if not self.enabled:
            return
        for tag, picture in pictures.items():
            if picture.ndim == 3:
                self.board.add_image(tag, picture, step, dataformats="HWC")  # type: ignore[no-untyped-call]
            else:
                self.board.add_mesh(tag, torch.from_numpy(np.ascontiguousarray(picture[None], np.float32)), global_step=step)  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        if self.enabled:
            self.file.flush()
            self.board.flush()  # type: ignore[no-untyped-call]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a torn last line is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def curve(run: Path, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one scalar of `metrics.jsonl`."""
    points = [(line["step"], line[name]) for line in _lines(run / "metrics.jsonl") if isinstance(line.get(name), int | float)]
    return [p[0] for p in points], [float(p[1]) for p in points]
