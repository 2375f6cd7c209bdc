"""`wm export RUN --to hf`: a folder as a model hub takes it: `model.safetensors`, `config.json`, and a model card (`README.md`) filled from the run.

Beside them lie `encoder.py`, which loads the encoder with torch alone, the proof (`worldmodel.handover.standalone_folder`) and `manifest.json`.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from sensors.data import Part
from sensors.errors import one_line
from sensors.files import check_folder, commit_folder, parse_json, read_whole
from worldmodel.config import Encoder
from worldmodel.handover import standalone_folder
from worldmodel.rundir import curve
from worldmodel.trained import Trained

CARD, CARD_BYTES = "README.md", 1 << 22
MOST_LOGS = 20
# what the hub calls the licences that have a name there; all others are `other` with a name of their own
LICENCES = re.compile(r"cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-[234]\.[05]|apache-2\.0|mit|odbl|cdla-(sharing|permissive)-1\.0")
MEASURES = {"nll": "negative log likelihood of the range", "l1": "mean absolute range error, m", "median": "median absolute range error, m"}
TYPES = {"nll": "nll", "l1": "mae", "median": "median_absolute_error"}


def export(trained: Trained, folder: Path, about: dict[str, Any], sample: torch.Tensor, parts: Sequence[Part]) -> dict[str, Any]:
    """Write the export of a trained run's encoder to the new folder; sample (N,F) f32 is a cloud with the encoder's columns."""
    encoder, config = trained.model.encoder, trained.config.encoder
    also = {"architectures": ["Encoder"], "model_type": "pillar-encoder", "library_name": "driving-worldmodel", "torch_dtype": "float32",
            "num_features": int(encoder.channels), "cell_m": float(encoder.cell_m)}  # type: ignore[arg-type]  # fmt: skip
    files = standalone_folder.files_of(encoder, config, sample, also)
    count = sum(value.numel() for value in encoder.parameters())
    files[CARD] = card(about, config, float(encoder.cell_m), count, _effort(trained)).encode()  # type: ignore[arg-type]
    return commit_folder(folder, files, {**about, "target": "hf", "tensors": len(encoder.state_dict())})


def verify(folder: Path) -> dict[str, Any]:
    """As `--to torch` is read; and the card has to say what the manifest says: licence and metrics (`reasons` names what differs)."""
    manifest = check_folder(folder)
    report = {**standalone_folder.prove(folder), "expected": int(manifest["tensors"])}
    said, wanted = _front(folder), _front_matter(manifest)
    differ = standalone_folder.inputs_that_differ(folder, standalone_folder.config_of(folder), manifest.get("input"))
    return {
        **report,
        "reasons": [*differ, *(f"{CARD}: its {one_line(key)} is not that of the manifest" for key in wanted if said.get(key) != wanted[key])],
    }


def snippet(folder: Path) -> str:
    """What the user does next."""
    return (f"read {folder / CARD}: the licence of the data binds the weights. Then, where huggingface_hub is installed and you are logged in:\n"
            f"hf upload YOUR_NAME/YOUR_MODEL {shlex.quote(str(folder))}")  # fmt: skip


def _front(folder: Path) -> dict[str, Any]:
    text = read_whole(folder / CARD, CARD_BYTES).decode("utf-8", "replace")
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        front = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, RecursionError):
        front = None
    return front if isinstance(front, dict) else {}


def _front_matter(about: Mapping[str, Any]) -> dict[str, Any]:
    """The card's metadata, in the hub's keys."""
    text = str(about["licence"])
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
    licence = {"license": name} if LICENCES.fullmatch(name) else {"license": "other", "license_name": name or "unknown"}
    measured = [{"type": TYPES[key.removeprefix("val/").partition("_")[0]], "name": one_line(key), "value": round(float(value), 6)}
                for key, value in sorted((about.get("metrics") or {}).items()) if _is_measure(key, value)]  # fmt: skip
    results = {"task": {"type": "point-cloud-forecasting", "name": "LiDAR range forecasting"},
               "dataset": {"type": "driving-logs", "name": "clips held out of the pretraining data"}, "metrics": measured}  # fmt: skip
    index = {"metrics": sorted({row["type"] for row in measured}), "model-index": [{"name": one_line(about["run"]), "results": [results]}]}
    return {**licence, "library_name": "driving-worldmodel",
            "tags": ["lidar", "point-cloud", "autonomous-driving", "self-supervised", "world-model", "bev", "pillars"],
            **(index if measured else {})}  # fmt: skip


def _is_measure(key: str, value: Any) -> bool:
    return key.startswith("val/") and key.removeprefix("val/").partition("_")[0] in MEASURES and isinstance(value, int | float)


def _effort(trained: Trained) -> str:
    """How long it took on what, as far as the run says."""
    environment = parse_json(read_whole(trained.run / "environment.json", 1 << 26), "environment.json")
    steps, seconds = curve(trained.run, "elapsed_s")
    until = [s for step, s in zip(steps, seconds, strict=True) if step <= trained.step]
    machine = environment.get("gpu") or f"{environment.get('cores')} cores ({environment.get('cpu')})"
    return f"{trained.step} steps, {until[-1] / 60:.0f} minutes on {machine}" if until else f"{trained.step} steps on {machine}"


def _plain(text: object) -> str:
    """Text from outside for a Markdown table or sentence: one line, nothing in it is markup."""
    return re.sub(r"([\\`*_\[\]|#<>&!~])", r"\\\1", one_line(text, 200))


def _code(text: object) -> str:
    """A name from outside as a code span."""
    return f"`{one_line(text, 200).replace('`', chr(39)).replace('|', '/')}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def card(about: Mapping[str, Any], config: Encoder, cell_m: float, parameters: int, effort: str) -> str:
    """The model card: front matter and Markdown. about: what the manifest holds (run, checkpoint, objectives, licence, logs, metrics, versions)."""
    front = yaml.safe_dump(_front_matter(about), sort_keys=False, allow_unicode=True)
    box = ", ".join(f"{axis} {low:g} to {high:g} m" for axis, low, high in zip("xyz", config.low, config.high, strict=True))
    units = {"x": "m, forward", "y": "m, left", "z": "m, up", "intensity": "0 to 1", "dt": "s before the newest sweep, 0 or more"}
    if config.input_yaw_deg:
        units |= {axis: f"m, after a turn of {config.input_yaw_deg:g} degrees about z" for axis in "xy"}
    columns = _table(["column", "name", "unit"], [(i, name, units[name]) for i, name in enumerate(config.features)])
    logs = list(about["logs"])
    groups = Counter((str(row["log"]).split("/")[0], str(row["licence"]), str(row.get("poses"))) for row in logs)
    kinds = [(_code(dataset), _plain(licence), _plain(poses), count) for (dataset, licence, poses), count in sorted(groups.items())]
    digests = "\n".join(f"- {_code(row['log'])} {row.get('digest') or 'without digest'}" for row in logs[:MOST_LOGS])
    digests += f"\n- {len(logs) - MOST_LOGS} more, all named in `manifest.json`" if len(logs) > MOST_LOGS else ""
    measured = {key: value for key, value in (about.get("metrics") or {}).items() if _is_measure(key, value)}
    arms = sorted({key.removeprefix("val/").partition("_")[2] for key in measured})
    scores = [(_code(arm), *(_score(measured.get(f"val/{kind}_{arm}")) for kind in MEASURES)) for arm in arms]
    evaluation = _table(["arm", *MEASURES.values()], scores) if scores else "The run was not validated."
    objectives = ", ".join(f"{_code(name)} (weight {weight:g})" for name, weight in about["objectives"].items())
    thinned = (f" In training clouds were thinned: {config.thinning}. Whole ones give another map; `thinned` in `encoder.py` thins alike."
               if config.thinning else "")  # fmt: skip
    versions = ", ".join(f"{_plain(name)} {_plain(value)}" for name, value in about["versions"].items())
    return f"""---
{front}---

# {_plain(about["run"])}

A LiDAR encoder pretrained without labels by forecasting driving logs. It maps point clouds to a bird's-eye-view feature map and starts a
detector's or a segmenter's training. {parameters:,} parameters; modules and names are those of OpenPCDet's pillar VFE and `BaseBEVBackbone`.

## How to load

`encoder.py` of this folder needs torch alone.

```python
import torch
from encoder import load

encoder = load(".")  # this folder; an nn.Module in eval mode
cloud = 20 * torch.rand(5000, {len(config.features)}) - 10  # yours: (N,{len(config.features)}) float32, the columns below
maps = encoder([cloud])  # (1,{sum(config.upsample_widths)},H,W)
```

With the package that made it: `worldmodel.load("FOLDER", features_only=True)`. Every tensor has to arrive: `wm verify FOLDER` says so, and
`check_in_target.py` compares your own batches with what the encoder was trained on.

## Input and output

{columns}

One cloud holds the newest sweep and those before it, brought into the LiDAR's frame of the newest. Range: {box};
points outside are dropped.{thinned} Pillars of {config.voxel[0]:g} x {config.voxel[1]:g} m. The map has cells of {cell_m:g} m; rows go along y,
columns along x, both upwards from the lower end.

## Training

{objectives}. {effort}; checkpoint {_code(about["checkpoint"])}. No label was opened.

{_table(["dataset", "licence", "poses", "logs"], kinds)}

The logs, by the sha256 of their manifests in the store:

{digests}

## Evaluation

On clips held out of the pretraining data, at the end of the run: forecasts of where LiDAR returns lie, now and within the next second.
`evidence_only` is what past readings say without this encoder.

{evaluation}

This says how well the whole world model forecasts, not how well a detector that starts from this encoder will do: measure that on your own task.

## Licence, use and limits

The strictest licence among the data is **{_plain(about["licence"])}**, and the weights inherit the question. Clouds of another
sensor, intensity scale, frame or number of sweeps than the encoder saw cost quality without a warning. It is a starting point for training,
not a part that may decide anything in a vehicle.

Made with {versions}.
"""


def _score(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"
