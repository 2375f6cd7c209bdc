"""Configuration: one complete file of defaults, a short overlay by name, `key=value` overrides; types are checked, unknown keys refused.

The defaults stand in ``configs/default.yaml`` alone. What a run was made with is written back complete, as ``config.yaml`` of its folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from sensors.errors import UsageError, one_line

MAX_CELLS = 1 << 24
# What a number may be, both ends included; of a list or of weights, each. The ends keep out what cannot be, not what is unwise.
BOUNDS: dict[tuple[float, float], str] = {
    (0, 1): "encoder.bn_momentum train.hidden_share train.evidence_share train.positions_share train.newest_share train.sweep_drop train.point_drop "
            "train.freeze_bn_at",
    (0, 0.99): "train.scale train.validation",
    (0, 180): "train.pose_error_deg",
    (0, 999): "model.latent_sweeps",
    (0, 1e9): "objectives encoder.max_points_per_pillar encoder.max_pillars encoder.max_points encoder.layers train.seconds train.dense_clips "
              "train.prior_clips train.weight_decay train.warmup train.crps_weight train.pose_error_m train.cache_gb",
    (0, 2**63 - 1): "seed",
    (1, 1000): "model.past model.future",
    (1, 1024): "train.threads",
    (1, 1e9): "encoder.strides encoder.widths encoder.upsample_widths model.channels model.dynamics_width model.head_width "
              "model.head_bins model.head_latent_width train.steps train.clips train.rays train.prior_rays train.stored_rays train.instants "
              "train.validate_every train.save_every",
    (2, 1e9): "encoder.pfn_widths",
    (0.01, 100): "encoder.upsample_strides",
    (1e-9, 1e9): "encoder.voxel encoder.bn_eps train.lr train.clip_norm",
    (0.001, 1000): "model.rate_hz",
    (0.001, 1e9): "train.every_s",
    (-360, 360): "encoder.input_yaw_deg",
    (-1e6, 1e6): "encoder.low encoder.high",
}  # fmt: skip
BOUNDS_OF = {key: bounds for bounds, keys in BOUNDS.items() for key in keys.split()}


def _within_bounds(record: Any, path: str) -> None:
    """UsageError for a number of the record (whose keys stand under `path`) that cannot be, and for a list without entries."""
    for key, value in vars(record).items():
        if path + key not in BOUNDS_OF:
            continue
        least, most = BOUNDS_OF[path + key]
        if isinstance(value, tuple) and not value:
            raise UsageError(f"{path}{key}: an empty list; give one number at least")
        each = {f"{path}{key}.{name}": number for name, number in value.items()} if isinstance(value, dict) else {path + key: value}
        for shown, numbers in each.items():
            for number in numbers if isinstance(numbers, tuple) else (numbers,):
                if not least <= number <= most:
                    raise UsageError(f"{one_line(shown)}: {one_line(number, 40)}; give a number from {least:g} to {most:g}")


@dataclass(frozen=True)
class Encoder:
    """The pillar encoder, named and counted as OpenPCDet's PillarVFE and BaseBEVBackbone are. low, high (3) and voxel (3) in metres, in the
    LiDAR's frame, turned by input_yaw_deg first (90: x right, y forward, as nuScenes' LIDAR_TOP has it). features: what a point carries, of
    x y z intensity dt. padded_slots: the hard VFE's rule, in which empty slots compete in the
    maximum; max_points_per_pillar and max_pillars are its caps (0: none). max_points: the newest
    sweep is thinned to so many, older ones to half (0: not)."""

    build: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    voxel: tuple[float, ...]
    features: tuple[str, ...]
    input_yaw_deg: float
    pfn_widths: tuple[int, ...]
    padded_slots: bool
    max_points_per_pillar: int
    max_pillars: int
    max_points: int
    layers: tuple[int, ...]
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    upsample_strides: tuple[float, ...]
    upsample_widths: tuple[int, ...]
    bn_eps: float
    bn_momentum: float

    def __post_init__(self) -> None:
        _within_bounds(self, "encoder.")
        if self.padded_slots and min(self.max_points_per_pillar, self.max_pillars) < 1:
            raise UsageError("encoder.padded_slots: give encoder.max_points_per_pillar and encoder.max_pillars too, above 0")
        if not len(self.layers) == len(self.strides) == len(self.widths) == len(self.upsample_strides) == len(self.upsample_widths):
            raise UsageError("encoder: layers, strides, widths, upsample_strides and upsample_widths are one entry a block each")
        if not len(self.low) == len(self.high) == len(self.voxel) == 3 or any(high <= low for low, high in zip(self.low, self.high, strict=True)):
            raise UsageError("encoder: low, high and voxel are (x, y, z) with high above low")
        if sorted(self.features[3:]) not in ([], ["dt"], ["intensity"], ["dt", "intensity"]) or self.features[:3] != ("x", "y", "z"):
            raise UsageError(f"encoder.features: {one_line(list(self.features))}; x, y, z come first, then any of intensity, dt")
        if min(self.grid) < 1:
            raise UsageError(f"encoder: {self.grid[0]}x{self.grid[1]} pillars; lower voxel or widen low..high")
        if self.grid[0] * self.grid[1] > MAX_CELLS:
            raise UsageError(f"encoder: {self.grid[0]}x{self.grid[1]} pillars, more than {MAX_CELLS}; raise voxel or narrow low..high")
        if any(width % 2 for width in self.pfn_widths[:-1]):
            raise UsageError(f"encoder.pfn_widths: {list(self.pfn_widths)}; all but the last are even")

    @property
    def thinning(self) -> str | None:
        """How sweeps are thinned before the encoder sees them (`worldmodel.batches.thinned`), in words; None where they are not."""
        if not self.max_points:
            return None
        return f"the newest sweep to {self.max_points} points, older ones to half of that, drawn with a weight of their distance up to 15 m"

    def check_maps(self) -> None:
        """UsageError where the blocks of the pillar encoder would give maps of several sizes."""
        (nx, ny), sizes = self.grid, set()
        for stride, up in zip(self.strides, self.upsample_strides, strict=True):
            nx, ny, down = -(-nx // stride), -(-ny // stride), round(1 / up)
            sizes.add((nx * int(up), ny * int(up)) if up >= 1 else (nx // down, ny // down))
        if len(sizes) > 1:
            shown = " and ".join(f"{nx}x{ny}" for nx, ny in sorted(sizes)[:2])
            raise UsageError(f"encoder: strides and upsample_strides make maps of {shown} cells; the blocks have to give one size")
        cell_m = self.voxel[0] * self.strides[0] / self.upsample_strides[0]
        span = tuple(round((self.high[axis] - self.low[axis]) / cell_m) for axis in (0, 1))
        if self.voxel[0] != self.voxel[1] or sizes != {span}:
            raise UsageError(f"encoder.voxel: {list(self.voxel[:2])} from low to high; pillars have to be square, and their number along x and y a "
                             "multiple of the stride")  # fmt: skip

    @property
    def grid(self) -> tuple[int, int]:
        """Pillars along x and along y."""
        return round((self.high[0] - self.low[0]) / self.voxel[0]), round((self.high[1] - self.low[1]) / self.voxel[1])


@dataclass(frozen=True)
class Model:
    """past, future: frames of a clip at rate_hz. latent_sweeps: which past sweeps the encoder sees (0 = the newest, 1 = the one before ...), in
    one cloud with join_sweeps (the feature `dt` tells them apart), else each by itself. channels: of the state. head_*: see
    `worldmodel.heads.rays.RayHead`."""

    past: int
    future: int
    rate_hz: float
    latent_sweeps: tuple[int, ...]
    join_sweeps: bool
    channels: int
    dynamics_width: int
    head_width: int
    head_bins: int
    head_latent_width: int

    def __post_init__(self) -> None:
        _within_bounds(self, "model.")
        for name in ("channels", "dynamics_width"):
            if getattr(self, name) % 4:
                raise UsageError(f"model.{name}: {getattr(self, name)}; give a multiple of 4, its norm has that many groups")
        if (oldest := max(self.latent_sweeps)) >= self.past:
            raise UsageError(f"model.latent_sweeps: {oldest}, where model.past is {self.past}; give numbers below that, 0 is the newest sweep")
        if self.latent_sweeps[0] != 0 or list(self.latent_sweeps) != sorted(set(self.latent_sweeps)):
            raise UsageError(f"model.latent_sweeps: {one_line(list(self.latent_sweeps), 60)}; give each once, from 0, the newest, on")


@dataclass(frozen=True)
class Train:
    """clips: per step; dense_clips: more of them, encoded for the dense objectives alone; prior_clips: more, for the prior alone. rays,
    prior_rays: read with the state and without it, per clip and instant; stored_rays: drawn once per clip and instant, of which each visit takes
    some; instants: future frames asked about per clip, beside the present. every_s: spacing of the clips' t = 0. hidden_share: of the clips get a
    region hidden; evidence_share: of the rays with state keep their evidence, positions_share: keep where its readings lie and of which sweep
    they are; newest_share: of the clips show the encoder the newest sweep alone; sweep_drop: chance that a ray loses the evidence of one past sweep.
    pose_error_m, pose_error_deg: largest deviation of the errors that a clip's poses are given. validation: share of the clips held out, whole
    logs where there are several. cache_gb: memory for prepared clips. seconds: stop after so much wall time, which the learning rate then follows
    (0: by steps alone). autocast: auto, bf16 or off; channels_last: auto, on or off."""

    steps: int
    seconds: float
    clips: int
    dense_clips: int
    prior_clips: int
    rays: int
    prior_rays: int
    stored_rays: int
    instants: int
    every_s: float
    lr: float
    weight_decay: float
    clip_norm: float
    warmup: int
    crps_weight: float
    hidden_share: float
    evidence_share: float
    positions_share: float
    newest_share: float
    sweep_drop: float
    rotate: bool
    flip: bool
    scale: float
    point_drop: float
    pose_error_m: float
    pose_error_deg: float
    validation: float
    validate_every: int
    save_every: int
    freeze_bn_at: float
    cache_gb: float
    threads: int
    autocast: str
    channels_last: str

    def __post_init__(self) -> None:
        _within_bounds(self, "train.")


@dataclass(frozen=True)
class Config:
    name: str
    seed: int
    encoder: Encoder
    model: Model
    train: Train
    objectives: dict[str, float]

    def __post_init__(self) -> None:
        _within_bounds(self, "")


def overlays() -> list[str]:
    """Names that `--config` takes."""
    folder = importlib.resources.files("worldmodel.configs")
    return sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_config(name: str = "default", overrides: Sequence[str] = ()) -> Config:
    """The defaults, under the overlay `name` (one of `overlays()`, or the path of a YAML file), under `key.sub=value` overrides."""
    folder = importlib.resources.files("worldmodel.configs")
    tree = parse_tree((folder / "default.yaml").read_bytes(), "default.yaml")
    if name in overlays():
        over = parse_tree((folder / f"{name}.yaml").read_bytes(), f"{name}.yaml")
    elif Path(name).is_file():
        over = parse_tree(Path(name).read_bytes(), one_line(name))
    else:
        near = difflib.get_close_matches(name, overlays(), 1)
        raise UsageError(f"config {one_line(name)!r}: neither a file nor one of {', '.join(overlays())}{_hint(near)}")
    tree = _merged(tree, {"name": Path(name).stem, **over}, "", name)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {one_line(override)!r}: give key.sub=value")
        nested: Any = _scalar(value, key)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        tree = _merged(tree, nested, "", f"--set {one_line(override)}")
    return config_of(tree, name)


def config_of(tree: Mapping[str, Any], source: str) -> Config:
    """The typed configuration of a complete tree; UsageError names the key that is wrong."""
    return _typed(Config, tree, "", source)  # type: ignore[no-any-return]


def encoder_of(tree: Mapping[str, Any], source: str) -> Encoder:
    """The typed configuration of an encoder alone, as an export holds it; UsageError names the key that is wrong."""
    return _typed(Encoder, tree, "", source)  # type: ignore[no-any-return]


def tree_of(config: Config) -> dict[str, Any]:
    """The configuration as plain data: what `config.yaml` of a run holds."""
    return _plain(dataclasses.asdict(config))  # type: ignore[no-any-return]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def parse_tree(text: bytes, source: str) -> dict[str, Any]:
    """The keys and values of a configuration's YAML; UsageError where it is none."""
    if len(text) > 1 << 20:
        raise UsageError(f"{source}: larger than 1 MiB; it is no configuration")
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or a number that cannot be
        raise UsageError(f"{source}: not readable as YAML ({one_line(error, 120)})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UsageError(f"{source}: expected keys with values at the top")
    return tree


def _scalar(text: str, key: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--set {one_line(key)}: {one_line(text)!r} is not readable as a value") from error


def _hint(near: list[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""


def _merged(base: Mapping[str, Any], over: Mapping[str, Any], path: str, source: str) -> dict[str, Any]:
    """`over` laid on `base`, key by key; objectives may be new ones."""
    out = dict(base)
    for key, value in over.items():
        here = f"{path}{key}"
        if not isinstance(key, str):
            raise UsageError(f"{source}: {one_line(here)} is no key of the configuration")
        if key not in base and path != "objectives.":
            raise UsageError(f"{source}: {one_line(here)} is no key of the configuration{_hint(difflib.get_close_matches(key, list(base), 1))}")
        if isinstance(base.get(key), Mapping):
            if not isinstance(value, Mapping):
                raise UsageError(f"{source}: {one_line(here)} has keys of its own")
            out[key] = _merged(base[key], value, f"{here}.", source)
        else:
            out[key] = value
    return out


def _typed(kind: Any, value: Any, path: str, source: str) -> Any:
    shown = path.rstrip(".") or "configuration"
    wrong = UsageError(f"{source}: {shown} is {one_line(repr(value), 80)}, expected {getattr(kind, '__name__', kind)}")
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise wrong
        hints = get_type_hints(kind)
        if missing := sorted(set(hints) - set(value)):
            raise UsageError(f"{source}: {path}{missing[0]} is missing")
        if unknown := sorted(str(key) for key in value if key not in hints):
            near = difflib.get_close_matches(unknown[0], list(hints), 1)
            raise UsageError(f"{source}: {one_line(path + unknown[0])} is no key of the configuration{_hint(near)}")
        fields = {key: _typed(hint, value[key], f"{path}{key}.", source) for key, hint in hints.items()}
        try:
            return kind(**fields)  # type: ignore[operator]
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise wrong
        return tuple(_typed(get_args(kind)[0], item, path, source) for item in value)
    if get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise wrong
        return {str(k): _typed(get_args(kind)[1], v, f"{path}{k}.", source) for k, v in value.items()}
    if kind is str and isinstance(value, bool):
        value = "on" if value else "off"  # YAML 1.1 reads on and off as truth values
    if kind is float and isinstance(value, str):
        try:
            value = float(value)  # YAML 1.1 reads 1e-3 as text
        except ValueError:
            raise wrong from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) > 1 << 64:  # it may not fit
            raise wrong
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    if kind is float and value != value:
        raise wrong
    return value
