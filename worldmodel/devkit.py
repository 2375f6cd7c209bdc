"""Scores of nuScenes' own development kit, an extra: `pip install driving-worldmodel[nuscenes]`."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import warnings
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from sensors.errors import UsageError, WmError, one_line
from sensors.formats.detections import CLASSES

CONFIG = "detection_cvpr_2019"
SPLIT = "tested"


class Devkit:
    """The kit with the tables of one version loaded. UsageError where it is not installed, WmError where it refuses the tables."""

    def __init__(self, tables: Path) -> None:
        """tables: the folder VERSION/."""
        try:
            with _quiet():
                from nuscenes.eval.detection import evaluate
                from nuscenes.nuscenes import NuScenes
        except ImportError as error:
            raise UsageError(
                f"nuscenes-devkit is not there ({one_line(error, 80)}); pip install driving-worldmodel[nuscenes], or leave out --tables"
            ) from error
        self._evaluate = evaluate
        try:
            with _quiet():
                self.tables = NuScenes(tables.name, str(tables.parent), verbose=False)
        except (AssertionError, KeyError, ValueError, OSError) as error:
            raise WmError(f"{one_line(tables)}: nuscenes-devkit does not open it ({one_line(repr(error), 160)})") from error

    def score(self, results: Path, scenes: Set[str]) -> dict[str, Any]:
        """The detection evaluation of a results file on the named scenes, each of whose samples it has to hold.

        {"mAP", "NDS", "AP": {class: mean over distances}, "errors": {...}, "classes": those that the truth has within range}."""
        from nuscenes.eval.common.config import config_factory

        if not any(json.loads(results.read_bytes())["results"].values()):  # the kit does not take a file without any box: AP 0, errors 1
            return {"mAP": 0.0, "NDS": 0.0, "AP": dict.fromkeys(CLASSES, 0.0), "errors": {}, "classes": []}
        root, version = self.tables.dataroot, self.tables.version
        with tempfile.TemporaryDirectory() as scratch, _quiet():
            # the kit reads splits of one's own from a file beside the tables; nothing is written there
            (Path(scratch) / version).mkdir()
            (Path(scratch) / version / "splits.json").write_text(json.dumps({SPLIT: sorted(scenes)}))
            self.tables.dataroot = scratch
            try:
                judge = self._evaluate.DetectionEval(
                    self.tables, config_factory(CONFIG), str(results), SPLIT, str(Path(scratch) / "out"), verbose=False
                )
                metrics = judge.evaluate()[0].serialize()
            except Exception as error:  # it raises whatever comes
                raise WmError(f"{one_line(results)}: nuscenes-devkit refuses it ({one_line(repr(error), 160)})") from error
            finally:
                self.tables.dataroot = root
        there = sorted({box.detection_name for box in judge.gt_boxes.all})
        return {"mAP": metrics["mean_ap"], "NDS": metrics["nd_score"], "AP": metrics["mean_dist_aps"], "errors": metrics["tp_errors"],
                "classes": there}  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The kit warns of its own dependencies and prints progress."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
