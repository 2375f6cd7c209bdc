"""What fine-tuning starts from: a run of `wm pretrain`, or an export that holds the encoder (`wm export --to torch`,
hf or features), of which nothing but the folder is used."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sensors.errors import UsageError, WmError, one_line
from sensors.files import JSON_BYTES, MANIFEST, check_folder, parse_json, read_whole
from worldmodel import checkpoint, rundir
from worldmodel.backbone import of_export
from worldmodel.config import Config, Encoder, config_of, load_config, tree_of
from worldmodel.encoders.contract import build_encoder


@dataclass(frozen=True, eq=False)
class Start:
    """config: the encoder's, and which past sweeps it saw; weights: the encoder's tensors by its own names."""

    what: str
    config: Config
    weights: dict[str, Tensor]

    def encoder(self, *, pretrained: bool) -> nn.Module:
        """The encoder with these weights, or as it is initialised. WmError where a tensor is missing, unexpected or of another shape."""
        encoder = build_encoder(self.config.encoder)
        if pretrained:
            try:
                encoder.load_state_dict(self.weights, strict=True)
            except RuntimeError as error:
                raise WmError(f"{self.what}: its tensors do not fit its configuration ({one_line(error, 200)}); write it again") from error
        return encoder


def open_start(folder: Path) -> Start:
    """The run or export in `folder`. An export's files are compared with their digests, and its weights have to give the map it stores."""
    if (folder / "config.yaml").is_file():
        stored = checkpoint.load(folder).weights
        own = {name.removeprefix("encoder."): value for name, value in stored.items() if name.startswith("encoder.")}
        return Start(one_line(folder), rundir.read_config(folder), own)
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"--from {one_line(folder)}: neither a run of `wm pretrain` (config.yaml) nor an export (manifest.json)")
    return _exported(folder)


def _exported(folder: Path) -> Start:
    what = one_line(folder)
    manifest = check_folder(folder, digests=False)  # of_export checks them
    if manifest.get("target") not in ("torch", "hf", "features"):
        raise UsageError(f"--from {what}: an export to {one_line(repr(manifest.get('target')))}; give one of `wm export --to torch`")
    tree = parse_json(read_whole(folder / "config.json", JSON_BYTES), f"{what}/config.json")
    if isinstance(tree, dict) and tree.get("build"):
        raise UsageError(f"--from {what}: an encoder of your own, {one_line(repr(tree['build']))}; give the run that it was trained in")
    encoder = of_export(folder)
    return Start(what, _config(encoder.config, manifest.get("input"), what), encoder.state_dict())


def _config(encoder: Encoder, shown: Any, what: str) -> Config:
    """The defaults with the export's encoder, and with the sweeps it saw, where the manifest says which."""
    config = dataclasses.replace(load_config(), name="export", encoder=encoder)
    shown = shown if isinstance(shown, dict) else {}
    model = {**tree_of(config)["model"], "past": 1000}  # as many as the sweeps may ask for; how many that is follows below
    for key, own in (("sweeps", "latent_sweeps"), ("joined", "join_sweeps"), ("rate_hz", "rate_hz")):
        model[own] = shown.get(key, model[own])
    config = config_of({**tree_of(config), "model": model}, f"{what}/{MANIFEST}, input")
    train = dataclasses.replace(config.train, autocast="off")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, past=max(config.model.latent_sweeps) + 1), train=train)
