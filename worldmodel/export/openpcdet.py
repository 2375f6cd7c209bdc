"""`wm export RUN --to openpcdet`: a checkpoint that OpenPCDet's own loader takes whole, the model YAML that matches it, and the commands.

The folder: `wm_openpcdet.pth` (plain tensors under `model_state`), one YAML per detector that can carry the encoder, `GUIDE.txt`,
`check_in_target.py`, `manifest.json`, and `sample.safetensors`: `points` as their loader gives them, our `map` of them, and `norm:NAME`, the
channel means behind each norm, by which `verify` names the layer at which two maps part.
"""

from __future__ import annotations

import io
import itertools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from sensors.data import Part
from sensors.errors import UsageError, WmError, one_line
from sensors.files import check_folder, commit_folder, read_whole
from worldmodel.config import Encoder, Model
from worldmodel.encoders.contract import Clouds
from worldmodel.encoders.standalone import cells_of
from worldmodel.handover import check_in_target, real
from worldmodel.handover.checkpoints import read_tensors
from worldmodel.handover.folding import Column, as_target, folded
from worldmodel.handover.openpcdet_modules import (
    CENTERPOINT,
    ENCODER,
    EPS,
    MULTIHEAD,
    POINTPILLAR,
    WAYMO_PILLAR,
    Detector,
    Loaded,
    collated,
    load_params,
    settings_of,
)
from worldmodel.trained import Trained

CHECKPOINT, SAMPLE, GUIDE = "wm_openpcdet.pth", "sample.safetensors", "GUIDE.txt"
TOLERANCE = 1e-5
FIRST = "vfe.pfn_layers.0.linear.weight"
NAMES = {"dt": "timestamp"}  # theirs for ours; the others are called alike

KITTI, NUSCENES, WAYMO, CUSTOM = "KITTI", "nuScenes", "Waymo", "a dataset of your own"
DATASETS = {dataset: f"cfgs/dataset_configs/{name}_dataset.yaml" for dataset, name in
            ((KITTI, "kitti"), (NUSCENES, "nuscenes"), (WAYMO, "waymo"), (CUSTOM, "custom"))}  # fmt: skip
FILES = {POINTPILLAR: "wm_pointpillar.yaml", MULTIHEAD: "wm_cbgs_pp_multihead.yaml", CENTERPOINT: "wm_centerpoint_pillar.yaml",
         WAYMO_PILLAR: "wm_waymo_centerpoint_pillar.yaml"}  # fmt: skip


@dataclass(frozen=True)
class Stock:
    """The encoder of a configuration that OpenPCDet ships, as `Encoder` spells it; columns: of its points."""

    name: str
    columns: int
    padded_slots: bool
    pfn_widths: tuple[int, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    voxel: tuple[float, ...]
    max_points_per_pillar: int
    strides: tuple[int, ...] = (2, 2, 2)
    upsample_strides: tuple[float, ...] = (0.5, 1, 2)
    layers: tuple[int, ...] = (3, 5, 5)
    widths: tuple[int, ...] = (64, 128, 256)
    upsample_widths: tuple[int, ...] = (128, 128, 128)

    def fits(self, encoder: Encoder, columns: int) -> bool:
        ours = all(getattr(encoder, key) == value for key, value in vars(self).items() if key not in ("name", "columns", "max_points_per_pillar"))
        return ours and columns == self.columns and (not self.padded_slots or encoder.max_points_per_pillar == self.max_points_per_pillar)


_NUSCENES = ((-51.2, -51.2, -5.0), (51.2, 51.2, 3.0), (0.2, 0.2, 8.0))
_WAYMO = ((-74.88, -74.88, -2.0), (74.88, 74.88, 4.0), (0.32, 0.32, 6.0))
STOCKS = (
    Stock(POINTPILLAR, 4, True, (64,), (0.0, -39.68, -3.0), (69.12, 39.68, 1.0), (0.16, 0.16, 4.0), 32, upsample_strides=(1, 2, 4)),
    Stock(MULTIHEAD, 5, True, (64,), *_NUSCENES, 20),
    Stock(CENTERPOINT, 5, False, (64, 64), *_NUSCENES, 0),
    Stock(WAYMO_PILLAR, 5, True, (64, 64), *_WAYMO, 20, strides=(1, 2, 2), upsample_strides=(1, 2, 4)),
)


def dataset_of(encoder: Encoder, intensity: float | None = None) -> str:
    """Whose clouds the encoder was made for: nuScenes' LIDAR_TOP looks along y; Waymo by the range and cells of its configuration, unless an
    intensity scale is asked for; KITTI has no time column."""
    if encoder.input_yaw_deg == 90:
        return NUSCENES
    if (encoder.low, encoder.high, encoder.voxel) == _WAYMO and intensity is None:
        return WAYMO
    return CUSTOM if "dt" in encoder.features or encoder.input_yaw_deg else KITTI


def columns(encoder: Encoder, intensity: float | None) -> tuple[Column, ...]:
    """The columns of the target's points, and what each is multiplied with. intensity: full scale there, None for the dataset's own."""
    dataset = dataset_of(encoder, intensity)
    xyz = (Column("x"), Column("y"), Column("z"))
    if dataset == WAYMO:
        return (*xyz, Column("intensity", curve="tanh"), Column("elongation"))
    scale = intensity or (255.0 if dataset == NUSCENES else 1.0)
    time = (Column("dt"),) if dataset == NUSCENES or "dt" in encoder.features else ()
    return (*xyz, Column("intensity", scale), *time)


def export(trained: Trained, folder: Path, about: dict[str, Any], sample: Tensor, parts: Sequence[Part]) -> dict[str, Any]:
    """Write the export of a trained run's encoder to the new folder. sample (N,F) f32: a cloud with the encoder's columns; about["intensity"]: the
    full scale of the target's intensity, None for the dataset's own. UsageError where OpenPCDet has no modules for this encoder."""
    config, intensity = trained.config.encoder, about["intensity"]
    refuse(config)
    theirs = columns(config, intensity)
    encoder = trained.model.encoder.float().eval().cpu()
    weights = {name: value.detach().contiguous().clone() for name, value in encoder.state_dict().items()}
    weights[FIRST] = folded(weights[FIRST], config.features, theirs)
    inside = cells_of(sample, config.low, config.high, config.voxel)[0]
    if not len(inside):
        raise UsageError("no point of the cloud lies in the encoder's range: nothing would be proven; give other logs by --data")
    cloud = sample[inside]
    with torch.no_grad(), norm_means(encoder) as means:
        bev = encoder(Clouds(cloud, (len(cloud),)))
    stock = next((s.name for s in STOCKS if s.fits(config, len(theirs))), None)
    files, lines = {}, {}
    for base in bases(config, intensity):
        tree = model_yaml(base, config, trained.config.model, theirs, intensity)
        files[FILES[base]] = _written(tree, config, stock)
        lines[FILES[base]] = load_params(Detector(settings_of(tree, FILES[base])), weights).log[-1]
    checkpoint = io.BytesIO()
    torch.save({"model_state": weights, "version": f"driving-worldmodel {version('driving-worldmodel')}", "epoch": 0, "it": 0}, checkpoint)
    guide = guide_text(config, trained.config.model, dataset_of(config, intensity), stock, lines, theirs, 1 - len(inside) / len(sample))
    return commit_folder(folder, {
        CHECKPOINT: checkpoint.getvalue(), **files, GUIDE: guide.encode(), "check_in_target.py": Path(check_in_target.__file__).read_bytes(),
        SAMPLE: save_tensors({"points": as_target(cloud, config.features, theirs).contiguous(), "map": bev.contiguous(),
                              **{f"norm:{name}": value for name, value in means.items()}}),
    }, {**about, "target": "openpcdet", "tensors": len(weights), "models": lines, "stock": stock,
        "dataset": dataset_of(config, intensity)})  # fmt: skip


def refuse(config: Encoder) -> None:
    """UsageError for what OpenPCDet's modules cannot be."""
    if config.build:
        raise UsageError(
            f"the run's encoder is {one_line(config.build)}, your own: `wm export --to torch` gives its tensors back under your names, for your class"
        )
    if config.bn_eps != EPS:
        raise UsageError(f"encoder.bn_eps is {config.bn_eps:g}, in OpenPCDet it is fixed at {EPS:g}; train with --set encoder.bn_eps={EPS:g}")
    height = (config.high[2] - config.low[2]) / config.voxel[2]
    if round(height) != 1:
        raise UsageError(f"encoder.voxel: {round(height)} cells on top of each other; a pillar is one: set its z to the whole of low..high")
    if any(up > 1 and up != int(up) for up in config.upsample_strides):
        raise UsageError(f"encoder.upsample_strides {list(config.upsample_strides)}: above 1 they have to be whole numbers")
    if output_stride(config) < 1 or output_stride(config) != int(output_stride(config)):
        raise UsageError(f"the map's cell is {output_stride(config):g} pillars; the heads of OpenPCDet need a whole number of them")


def output_stride(config: Encoder) -> float:
    """Pillars along a cell of the map."""
    return config.strides[0] / config.upsample_strides[0]


def bases(config: Encoder, intensity: float | None) -> tuple[str, ...]:
    """The configurations of OpenPCDet whose heads, classes and optimisation the export is laid on."""
    dataset = dataset_of(config, intensity)
    if dataset != NUSCENES:
        return (WAYMO_PILLAR if dataset == WAYMO else POINTPILLAR,)
    one_layer_hard = config.padded_slots and len(config.pfn_widths) == 1 and output_stride(config) == 4
    return (MULTIHEAD, CENTERPOINT) if one_layer_hard else (CENTERPOINT,)


def model_yaml(base: str, config: Encoder, model: Model, theirs: Sequence[Column], intensity: float | None) -> dict[str, Any]:
    """The model YAML as plain data. It names its base at the top, for heads and optimisation, and the dataset's YAML again inside DATA_CONFIG:
    OpenPCDet does not follow a `_BASE_CONFIG_` inside a base."""
    dataset = dataset_of(config, intensity)
    names = [NAMES.get(column.name, column.name) for column in theirs]
    voxels: dict[str, Any] = {"NAME": "transform_points_to_voxels_placeholder", "VOXEL_SIZE": list(config.voxel)}
    if config.padded_slots:
        test = max(config.max_pillars, 40000) if dataset == KITTI else config.max_pillars
        voxels = {"NAME": "transform_points_to_voxels", "VOXEL_SIZE": list(config.voxel), "MAX_POINTS_PER_VOXEL": config.max_points_per_pillar,
                  "MAX_NUMBER_OF_VOXELS": {"train": config.max_pillars, "test": test}}  # fmt: skip
    data = {
        "_BASE_CONFIG_": DATASETS[dataset],
        "POINT_CLOUD_RANGE": [*config.low, *config.high],
        "POINT_FEATURE_ENCODING": {"encoding_type": "absolute_coordinates_encoding", "used_feature_list": names, "src_feature_list": [*names]},
        "DATA_PROCESSOR": [
            {"NAME": "mask_points_and_boxes_outside_range", "REMOVE_OUTSIDE_BOXES": True},
            {"NAME": "shuffle_points", "SHUFFLE_ENABLED": {"train": True, "test": not config.padded_slots}},
            voxels,
        ],
    }
    if dataset == NUSCENES:
        data["MAX_SWEEPS"] = sweeps(model)
    elif dataset != WAYMO:
        data["DATA_AUGMENTOR"] = _augmentor(dataset, len(names))
    tree: dict[str, Any] = {"_BASE_CONFIG_": base}
    classes = {KITTI: ["Car", "Pedestrian", "Cyclist"], CUSTOM: ["Vehicle", "Pedestrian", "Cyclist"]}
    if dataset in classes:
        tree["CLASS_NAMES"] = classes[dataset]
    tree["DATA_CONFIG"] = data
    tree["MODEL"] = {
        "NAME": "CenterPoint" if base in (CENTERPOINT, WAYMO_PILLAR) else "PointPillar",
        "VFE": {"NAME": "PillarVFE" if config.padded_slots else "DynPillarVFE", "WITH_DISTANCE": False, "USE_ABSLOTE_XYZ": True, "USE_NORM": True,
                "NUM_FILTERS": list(config.pfn_widths)},
        "MAP_TO_BEV": {"NAME": "PointPillarScatter", "NUM_BEV_FEATURES": config.pfn_widths[-1]},
        "BACKBONE_2D": {"NAME": "BaseBEVBackbone", "LAYER_NUMS": list(config.layers), "LAYER_STRIDES": list(config.strides),
                        "NUM_FILTERS": list(config.widths), "UPSAMPLE_STRIDES": [int(u) if u >= 1 else u for u in config.upsample_strides],
                        "NUM_UPSAMPLE_FILTERS": list(config.upsample_widths)},
    }  # fmt: skip
    stride = int(output_stride(config))
    if base in (CENTERPOINT, WAYMO_PILLAR):
        tree["MODEL"]["DENSE_HEAD"] = {"TARGET_ASSIGNER_CONFIG": {"FEATURE_MAP_STRIDE": stride}}
    elif dataset in classes:
        tree["MODEL"]["DENSE_HEAD"] = {"ANCHOR_GENERATOR_CONFIG": _anchors(classes[dataset], stride)}
    return tree


def _anchors(classes: Sequence[str], stride: int) -> list[dict[str, Any]]:
    """The anchors of kitti_models/pointpillar.yaml at another stride of the map."""
    shapes = (([3.9, 1.6, 1.56], -1.78, 0.6, 0.45), ([0.8, 0.6, 1.73], -0.6, 0.5, 0.35), ([1.76, 0.6, 1.73], -0.6, 0.5, 0.35))
    return [{"class_name": name, "anchor_sizes": [size], "anchor_rotations": [0, 1.57], "anchor_bottom_heights": [bottom], "align_center": False,
             "feature_map_stride": stride, "matched_threshold": matched, "unmatched_threshold": unmatched}
            for name, (size, bottom, matched, unmatched) in zip(classes, shapes, strict=True)]  # fmt: skip


def _augmentor(dataset: str, columns: int) -> dict[str, Any]:
    """The augmentation of the stock configuration, which naming the dataset's YAML again would replace, with objects of our columns."""
    kitti = dataset == KITTI
    car = "Car" if kitti else "Vehicle"
    prepare: dict[str, Any] = {"filter_by_min_points": [f"{name}:5" for name in (car, "Pedestrian", "Cyclist")]}
    if kitti:
        prepare["filter_by_difficulty"] = [-1]
    sampling = {
        "NAME": "gt_sampling", "USE_ROAD_PLANE": kitti, "DB_INFO_PATH": [f"{'kitti' if kitti else 'custom'}_dbinfos_train.pkl"], "PREPARE": prepare,
        "SAMPLE_GROUPS": [f"{car}:{15 if kitti else 20}", "Pedestrian:15", "Cyclist:15"], "NUM_POINT_FEATURES": columns,
        "DATABASE_WITH_FAKELIDAR": False, "REMOVE_EXTRA_WIDTH": [0.0, 0.0, 0.0], "LIMIT_WHOLE_SCENE": not kitti,
    }  # fmt: skip
    return {"DISABLE_AUG_LIST": ["placeholder"], "AUG_CONFIG_LIST": [
        sampling, {"NAME": "random_world_flip", "ALONG_AXIS_LIST": ["x"] if kitti else ["x", "y"]},
        {"NAME": "random_world_rotation", "WORLD_ROT_ANGLE": [-0.78539816, 0.78539816]},
        {"NAME": "random_world_scaling", "WORLD_SCALE_RANGE": [0.95, 1.05]},
    ]}  # fmt: skip


def _written(tree: Mapping[str, Any], config: Encoder, stock: str | None) -> bytes:
    kind = f"{'hard' if config.padded_slots else 'dynamic'} VFE, {len(config.pfn_widths)} PFN layer{'s' if len(config.pfn_widths) > 1 else ''}"
    match = f"the encoder is that of {stock}" if stock else "the encoder is that of no configuration OpenPCDet ships"
    head = f"# {kind}; {match}.\n# Paths are relative to OpenPCDet's tools/. Heads, classes and optimisation come from the base.\n"
    return (head + yaml.safe_dump(dict(tree), sort_keys=False, default_flow_style=None, width=120)).encode()


def sweeps(model: Model) -> int:
    """How many sweeps are in a cloud that the encoder sees."""
    return len(model.latent_sweeps) if model.join_sweeps else 1


def guide_text(
    config: Encoder, model: Model, dataset: str, stock: str | None, lines: Mapping[str, str], theirs: Sequence[Column], outside: float
) -> str:
    """What a user does next and what to mind, with $EXPORT for the folder."""
    out = [
        "# In OpenPCDet/tools, with its own environment; EXPORT is the folder of this file. On N GPUs: bash scripts/dist_train.sh N --cfg_file ..."
    ]
    for name, line in lines.items():
        place = next(base for base in FILES if FILES[base] == name).rpartition("/")[0]
        out += [f'cp "$EXPORT"/{name} {place}/',
                f"python train.py --cfg_file {place}/{name} --pretrained_model \"$EXPORT\"/{CHECKPOINT} --extra_tag wm_$(date +%Y%m%d_%H%M%S)",
                f"#   its log has to say: {line}",
                "#   `Not updated weight` may name global_step and dense_head.* alone: they start from scratch"]  # fmt: skip
    matched = f"The encoder is that of {stock}: that file takes the same checkpoint."
    unmatched = "The encoder is that of no configuration OpenPCDet ships: with a stock file the loader would skip, in silence, what does not fit."
    notes = [matched if stock else unmatched]
    notes.append(
        "Each --extra_tag has to be new: OpenPCDet resumes from output/.../TAG/ckpt/*.pth AFTER loading the pretrained file, and so undoes it."
    )
    if any(up < 1 for up in config.upsample_strides):
        notes.append("BaseBEVBackbone calls np.int for an upsample stride below 1: take numpy <= 1.23.5, or write int for np.int in "
                     "pcdet/models/backbones_2d/base_bev_backbone.py.")  # fmt: skip
    if config.padded_slots:
        notes.append(
            "Hard VFE: empty slots compete in the maximum, as in training. Under DynPillarVFE the same tensors load and compute something else."
        )
    else:
        notes.append("DynPillarVFE needs torch_scatter and a GPU. Under PillarVFE the same tensors load and compute something else.")
        notes.append(
            f"DynPillarVFE also takes points outside of z {config.low[2]:g} .. {config.high[2]:g} m, which pretraining left out ({outside:.0%} of the"
            " stored cloud lay outside the range): cut them off in your dataset, or pretrain with a range that holds all."
        )
    frame = {0.0: "x forward, y left, z up", 90.0: "x right, y forward, z up (nuScenes' LIDAR_TOP)"}
    axes = frame.get(config.input_yaw_deg, f"x forward, y left, z up, turned by {config.input_yaw_deg:g} degrees about z")
    notes.append(f"Points: {axes}; metres from the LiDAR. Columns: {', '.join(NAMES.get(c.name, c.name) for c in theirs)}.")
    read = [c for c in theirs[3:] if c.name in config.features]
    notes += [f"{c.name} is expected in 0..{c.scale:g}: the factor is in the first layer's weights." for c in read if c.name == "intensity"]
    if unread := [NAMES.get(c.name, c.name) for c in theirs if c.name not in config.features]:
        notes.append(f"Columns that the encoder was not trained on have weights of zero: {', '.join(unread)}.")
    spaced = [round(back / model.rate_hz, 3) for back in model.latent_sweeps]
    if sweeps(model) > 1:
        notes.append(
            f"A cloud in training held {sweeps(model)} sweeps, {', '.join(f'{s:g}' for s in spaced)} s old, and now and then the newest alone."
        )
    else:
        notes.append("A cloud in training held one sweep.")
    if config.thinning:
        notes.append(f"Training saw thinned clouds: {config.thinning}. Fed whole, the map is another one.")
    if dataset == NUSCENES:
        notes.append(f"MAX_SWEEPS is set to {sweeps(model)} accordingly; OpenPCDet's own files take 10, within 0.45 s.")
    if dataset == KITTI:
        notes.append("KITTI's loader keeps what its camera sees (FOV_POINTS_ONLY); training saw the whole turn within the range.")
    if dataset == WAYMO:
        notes.append("Waymo's points refer to the vehicle, those of pretraining to the LiDAR: z differs by the height of its mounting.")
    if dataset == CUSTOM:
        notes.append("The YAML is laid on CustomDataset: set its classes, anchors and paths to your data's; its .npy files hold the columns above.")
    notes.append("check_in_target.py beside this file compares a batch of your loader, and your model's map of the stored cloud, with ours.")
    return "\n".join([*out, "", *(f"- {note}" for note in notes)]) + "\n"


def snippet(folder: Path) -> str:
    """The guide of an export, for this folder."""
    return f"EXPORT={shlex.quote(str(folder.resolve()))}\n{read_whole(folder / GUIDE, 1 << 20).decode()}".rstrip()


def verify(folder: Path) -> dict[str, Any]:
    """Build the detector of each YAML as OpenPCDet would, load as its loader does, run the stored cloud through it.

    Gives of the encoder {"loaded", "tensors", "expected", "missing", "unexpected", "mismatched", "difference", "absolute", "largest"}, beside them
    "log" (the last line of their loader, by YAML), "reasons", and what `handover.real` gives. BadFile for a file that is not what the manifest
    says, WmError for a YAML that builds nothing."""
    manifest = check_folder(folder)
    models, trained_with = manifest.get("models"), manifest.get("input")
    if not isinstance(models, dict) or not models or not set(models) <= set(FILES.values()) or not isinstance(trained_with, dict):
        raise WmError(f"{one_line(folder)}: the manifest names no model YAML; export the run again")
    weights = read_tensors(folder / CHECKPOINT)
    sample = _sample(folder)
    report: dict[str, Any] = {"loaded": 0, "tensors": 0, "expected": int(manifest["tensors"]), "missing": [], "unexpected": [], "mismatched": [],
                              "difference": 0.0, "absolute": 0.0, "largest": 0.0, "log": {}, "reasons": []}  # fmt: skip
    trees = {name: _yaml(folder / name, one_line(folder / name)) for name in sorted(models)}
    for number, (name, tree) in enumerate(trees.items()):
        what = one_line(folder / name)
        settings = settings_of(tree, what)
        detector = Detector(settings).eval()
        loaded = load_params(detector, weights)
        found = _judged(detector, loaded, sample, trained_with, what)
        report["log"][name] = loaded.log[-1]
        if loaded.log[-1] != models[name]:
            found["reasons"].append(f"their loader would say `{loaded.log[-1]}`, at export it was `{one_line(models[name], 60)}`")
        for key in ("missing", "unexpected", "mismatched", "reasons"):
            report[key] += [row for row in found[key] if row not in report[key]]
        report["loaded"] = min(report["loaded"], found["loaded"]) if number else found["loaded"]
        report["tensors"] = max(report["tensors"], found["tensors"])
        report |= {key: max(report[key], found[key]) for key in ("difference", "absolute", "largest")}
    theirs = real.openpcdet(trees, weights, sample)
    return report | theirs | {"reasons": report["reasons"] + theirs["reasons"]}


def _yaml(path: Path, what: str) -> Any:
    try:
        return yaml.safe_load(read_whole(path, 1 << 20))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError, ValueError) as error:
        raise WmError(f"{what}: not readable as YAML ({one_line(error, 120)}); export the run again") from error


def _sample(folder: Path) -> dict[str, Tensor]:
    sample = read_tensors(folder / SAMPLE)
    if not {"points", "map"} <= set(sample) or sample["points"].ndim != 2 or not len(sample["points"]) or not torch.isfinite(sample["map"]).all():
        raise WmError(f"{one_line(folder / SAMPLE)}: no cloud with a finite map; export the run again")
    if not bool(sample["map"].any()):
        raise WmError(f"{one_line(folder / SAMPLE)}: the stored map is all zero: it proves nothing; was the run trained?")
    return sample


def _judged(detector: Detector, loaded: Loaded, sample: Mapping[str, Tensor], trained_with: Mapping[str, Any], what: str) -> dict[str, Any]:
    settings = detector.settings
    own = [key for key in detector.state_dict() if key.startswith(ENCODER)]
    reasons = []
    if (settings.vfe == "PillarVFE") is not trained_with.get("padded_slots"):
        trained_as = "PillarVFE, whose empty slots compete in the maximum" if trained_with.get("padded_slots") else "DynPillarVFE, which has no slots"
        reasons.append(f"{what}: {settings.vfe} under weights trained as {trained_as}: all tensors fit and the maps differ")
    wanted = [NAMES.get(name, name) for name in trained_with.get("features", [])]
    if list(settings.used) != wanted:
        reasons.append(f"{what}: used_feature_list {', '.join(settings.used)}, the first layer reads {', '.join(wanted)}")
    said = {"low": settings.low, "high": settings.high, "voxel": settings.voxel, "max_points_per_pillar": settings.max_points}
    for key, value in said.items():
        stored = trained_with.get(key)
        if (tuple(stored) if isinstance(stored, list) else stored) != value and not (key == "max_points_per_pillar" and settings.vfe != "PillarVFE"):
            reasons.append(f"{what}: {key} {one_line(value, 60)}, in training {one_line(stored, 60)}")
    if sample["points"].shape[1] != len(settings.columns):
        raise WmError(f"{what}: {len(settings.columns)} columns in src_feature_list, {sample['points'].shape[1]} in the stored cloud")
    try:
        with torch.no_grad(), norm_means(detector) as means:
            bev = detector(collated([sample["points"]], settings))
    except RuntimeError as error:
        raise WmError(f"{what}: the model fails on the stored cloud ({one_line(error, 160)}); export the run again") from error
    if bev.shape != sample["map"].shape:
        raise WmError(f"{what}: their map is {tuple(bev.shape)}, ours {tuple(sample['map'].shape)}; range, voxel size or strides differ")
    absolute, largest = float((bev - sample["map"]).abs().max()), float(sample["map"].abs().max())
    difference = absolute / max(1.0, largest)
    left = [key for key in loaded.left if key.startswith(ENCODER) and key not in loaded.mismatched]
    if not difference <= TOLERANCE and not left and not loaded.mismatched:
        reasons += _where(detector, sample, means, what)
    return {"loaded": len(loaded.updated), "tensors": len(own), "missing": left, "unexpected": list(loaded.unknown),
            "mismatched": list(loaded.mismatched), "difference": difference, "absolute": absolute, "largest": largest,
            "reasons": reasons}  # fmt: skip


@contextmanager
def norm_means(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """While inside: collects the mean (C,) of what each norm of the encoder gives, by its name, in the order in which they are reached."""
    means: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            means[name] = output.double().mean([i for i in range(output.ndim) if i != 1]).float()

        return hook

    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    handles = [m.register_forward_hook(keep(name)) for name, m in module.named_modules() if isinstance(m, norms) and name.startswith(ENCODER)]
    try:
        yield means
    finally:
        for handle in handles:
            handle.remove()


def _parted(stored: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> list[str]:
    """The norms behind which the channel means are not the stored ones, first reached first."""
    return [name for name, value in means.items() if (other := stored.get(f"norm:{name}")) is not None
            and (other.shape != value.shape or not torch.allclose(other, value, rtol=1e-4, atol=TOLERANCE))]  # fmt: skip


def _where(detector: Detector, sample: Mapping[str, Tensor], means: Mapping[str, Tensor], what: str) -> list[str]:
    """Why two maps differ although every tensor fits: another order or scale of columns if one explains it, else the first norm that differs."""
    parted = _parted(sample, means)
    if not parted:
        return [f"{what}: behind the last norms"]
    if parted[0] != "vfe.pfn_layers.0.norm":
        return [f"{what}: equal shapes, other numbers: the maps part at {parted[0]} or the layer before it"]
    points, count = sample["points"], sample["points"].shape[1]
    columns = detector.settings.columns
    tries: list[tuple[str, Tensor]] = []
    for order in itertools.islice(itertools.permutations(range(3, count)), 1, 24):
        tries.append((f"the columns come as {', '.join(columns[i] for i in (0, 1, 2, *order))}", points[:, [0, 1, 2, *order]]))
    for at in range(3, count):
        for factor in (255.0, 1 / 255.0):
            scale = torch.ones(count)
            scale[at] = factor
            tries.append((f"{columns[at]} is multiplied by {'255' if factor > 1 else '1/255'}", points * scale))
    for words, changed in tries:
        with torch.no_grad(), norm_means(detector) as found:
            detector.vfe(collated([changed], detector.settings))
        if not _parted(sample, found):
            return [f"{what}: the maps agree when {words}: the first layer is folded for another input"]
    return [f"{what}: equal shapes, other numbers: the maps part at the first layer, {FIRST} or its norm"]
