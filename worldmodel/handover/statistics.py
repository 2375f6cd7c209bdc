"""What the input of a run looked like, for those who will feed its encoder: figures that `check_in_target.py` compares theirs with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sensors.clips import clips_of
from sensors.data import Part, open_data
from sensors.errors import WmError
from sensors.files import read_json
from sensors.rays import history_of
from worldmodel.batches import COLUMNS, joined, past_clouds
from worldmodel.handover.check_in_target import channel_statistics
from worldmodel.trained import Trained

MOST_LOGS, CLIPS_A_LOG = 6, 1


def data_statistics(
    trained: Trained, parts: Sequence[Part], features: Sequence[str] | None = None, scale: Mapping[str, float] | None = None
) -> dict[str, Any] | None:
    """`channel_statistics` of what the encoder of a run is shown, over a few clips of the data it was trained on where that can still be read
    unchanged, else of `parts`; None where there is neither.

    features: the columns in the target's order (default: the encoder's; one that the log does not have is 0); scale: a column's unit in the
    target, as a factor (``{"intensity": 255.0}``). Adds `logs`, the ids of those seen, `of`: "pretraining" or "export", and
    `shown`: the mean number of points that the encoder was shown, after thinning."""
    encoder = trained.config.encoder
    features = tuple(features or encoder.features)
    m = trained.config.model
    config = dataclasses.replace(trained.config, encoder=dataclasses.replace(encoder, max_points=0))  # how many there are, not how many we take
    of, source = "pretraining", _trained_on(trained)
    if not source:
        of, source = "export", list(parts)
    clouds, logs, shown = [], [], []
    for part in [source[i] for i in np.unique(np.linspace(0, len(source) - 1, MOST_LOGS).astype(int))] if source else []:
        clips = clips_of(part.log, past=m.past, future=m.future, rate_hz=m.rate_hz, from_ns=part.from_ns, to_ns=part.to_ns)
        for clip in [clips[i] for i in np.unique(np.linspace(0, len(clips) - 1, CLIPS_A_LOG).astype(int))] if clips else []:
            history = history_of(clip)
            rows = joined(past_clouds(clip, history, config), config)[0]
            shown.append(len(joined(past_clouds(clip, history, trained.config), trained.config)[0]))
            columns = [rows[:, COLUMNS.index(name)] if name in COLUMNS else np.zeros(len(rows), np.float32) for name in features]
            clouds.append(np.stack([column * (scale or {}).get(name, 1.0) for name, column in zip(features, columns, strict=True)], 1))
            logs.append(part.log.id)
    if not clouds:
        return None
    return {**channel_statistics(clouds, features, encoder.low, encoder.high), "shown": float(np.mean(shown)), "of": of, "logs": sorted(set(logs))}


def _trained_on(trained: Trained) -> list[Part]:
    """The run's own data, as far as it is still where it was and what it was."""
    try:
        paths = read_json(trained.run / "data.json")["data"]
        digests = {row["digest"] for row in read_json(trained.run / "environment.json")["logs"]}
        return [part for path in paths for part in open_data(path) if part.digest in digests]
    except (WmError, OSError, KeyError, TypeError):
        return []
