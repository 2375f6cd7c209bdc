"""`wm export RUN --to mmdet3d`: a checkpoint and a child configuration for mmdetection3d 1.4's own loader.

Runs whose encoder sees one sweep with x forward leave for VoxelNet on KITTI (PointPillars), the others for CenterPoint on nuScenes. The folder:
`wm_mmdet3d.pth` = {"state_dict", "meta"}, `wm_mmdet3d.py`, `GUIDE.txt`, `check_in_target.py`, `manifest.json`, and `sample.safetensors`:
`points` as the target's loader gives them, and our `map` of them.
"""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from sensors.data import Part
from sensors.errors import UsageError, WmError, one_line
from sensors.files import check_folder, commit_folder, read_whole
from worldmodel.config import Encoder
from worldmodel.encoders.contract import Clouds
from worldmodel.handover import check_in_target, real
from worldmodel.handover.checkpoints import read_checkpoint, read_tensors
from worldmodel.handover.folding import Column, as_target, folded
from worldmodel.handover.mmdet3d_modules import BASES, NORM, Base, Detector, load_checkpoint, merged, read_config
from worldmodel.trained import Trained

WEIGHTS, CONFIG, SAMPLE, GUIDE = "wm_mmdet3d.pth", "wm_mmdet3d.py", "sample.safetensors", "GUIDE.txt"
COLUMNS = {"kitti": ("x", "y", "z", "intensity"), "centerpoint": ("x", "y", "z", "intensity", "dt")}
INTENSITY = {"kitti": 1.0, "centerpoint": 255.0}
TOLERANCE = 1e-5


def base_of(encoder: Encoder) -> str:
    """Which of `BASES` the encoder leaves for: nuScenes' clouds have a time column, and its LIDAR_TOP looks along y."""
    return "centerpoint" if "dt" in encoder.features or encoder.input_yaw_deg == 90 else "kitti"


def columns(encoder: Encoder, intensity: float | None) -> tuple[Column, ...]:
    """The columns of the target's points that the encoder reads, in the target's order; intensity: its full scale, None for the base's own."""
    kind = base_of(encoder)
    names = [name for name in COLUMNS[kind] if name in encoder.features]
    return tuple(Column(name, (intensity or INTENSITY[kind]) if name == "intensity" else 1.0) for name in names)


def refuse(encoder: Encoder) -> None:
    """UsageError for what mmdetection3d's modules cannot be."""
    if encoder.build:
        raise UsageError(
            f"the run's encoder is {one_line(encoder.build)}, your own: take model.safetensors of its checkpoint, keys `encoder.*`, unchanged"
        )
    if not encoder.padded_slots:
        raise UsageError(
            "the run was trained without padded slots, but in mmdetection3d's PillarFeatureNet empty slots compete in the maximum: about one value in"
            " a hundred of the map would differ; pretrain with --config mmdet3d_centerpoint, or --set encoder.padded_slots=true and its two caps"
        )
    if not encoder.max_points_per_pillar or not encoder.max_pillars:
        raise UsageError("encoder.max_points_per_pillar and max_pillars: mmdetection3d's hard voxels need both above 0")
    height = round((encoder.high[2] - encoder.low[2]) / encoder.voxel[2])
    if height != 1:
        raise UsageError(f"encoder.voxel: {height} cells on top of each other; a pillar is one: set its z to the whole of low..high")
    if any(up > 1 and up != int(up) for up in encoder.upsample_strides):
        raise UsageError(f"encoder.upsample_strides {list(encoder.upsample_strides)}: above 1 they have to be whole numbers")


def model_of(encoder: Encoder, base: Base) -> dict[str, Any]:
    """The `model` of the target's configuration that has our encoder: every key of the base's that depends on it."""
    prefix, box, voxel = base.prefix, [*encoder.low, *encoder.high], list(encoder.voxel)
    nx, ny = encoder.grid
    norm = {"type": "BN", "eps": encoder.bn_eps, "momentum": encoder.bn_momentum}
    width = sum(encoder.upsample_widths)
    tree: dict[str, Any] = {
        "data_preprocessor": {"voxel_layer": {"max_num_points": encoder.max_points_per_pillar, "point_cloud_range": box, "voxel_size": voxel}},
        f"{prefix}voxel_encoder": {"in_channels": len(encoder.features), "feat_channels": list(encoder.pfn_widths), "voxel_size": voxel,
                                   "point_cloud_range": box, "norm_cfg": norm | {"type": "BN1d"}, "legacy": False},
        f"{prefix}middle_encoder": {"in_channels": encoder.pfn_widths[-1], "output_shape": [ny, nx]},
        f"{prefix}backbone": {"in_channels": encoder.pfn_widths[-1], "out_channels": list(encoder.widths), "layer_nums": list(encoder.layers),
                              "layer_strides": list(encoder.strides), "norm_cfg": norm},
        f"{prefix}neck": {"in_channels": list(encoder.widths), "out_channels": list(encoder.upsample_widths),
                          "upsample_strides": [int(s) if s >= 1 else s for s in encoder.upsample_strides], "norm_cfg": norm},
    }  # fmt: skip
    caps = base.model["data_preprocessor"]["voxel_layer"]["max_voxels"]
    if encoder.max_pillars != caps[0]:
        tree["data_preprocessor"]["voxel_layer"]["max_voxels"] = (encoder.max_pillars, max(encoder.max_pillars, caps[1]))
    if prefix:
        factor = round(encoder.strides[0] / encoder.upsample_strides[0])
        tree["pts_bbox_head"] = {"in_channels": width, "bbox_coder": {"pc_range": box[:2], "voxel_size": voxel[:2], "out_size_factor": factor}}
        tree["train_cfg"] = {"pts": {"grid_size": [nx, ny, 1], "voxel_size": voxel, "out_size_factor": factor, "point_cloud_range": box}}
        tree["test_cfg"] = {"pts": {"pc_range": box[:2], "voxel_size": voxel[:2], "out_size_factor": factor}}
    else:
        ranges = [[*box[:2], r[2], *box[3:5], r[5]] for r in base.model["bbox_head"]["anchor_generator"]["ranges"]]
        tree["bbox_head"] = {"in_channels": width, "feat_channels": width, "anchor_generator": {"ranges": ranges}}
    return tree


def _changes(wanted: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """What of `wanted` the base does not say already. A norm is replaced whole: laid on a base that leaves it out, a part would have no type."""
    out = {}
    for key, value in wanted.items():
        if key == "norm_cfg":
            if value != NORM | {"type": value["type"]}:
                out[key] = value
        elif isinstance(value, Mapping):
            if inner := _changes(value, base.get(key, {})):
                out[key] = inner
        elif key not in base or base[key] != value:
            out[key] = value
    return out


def _code(value: Any, indent: int) -> str:
    if isinstance(value, Mapping):
        inside = ",\n".join(f"{' ' * (indent + 4)}{key}={_code(item, indent + 4)}" for key, item in value.items())
        return f"dict(\n{inside})"
    return repr(value)


def child_config(encoder: Encoder, base: Base) -> str:
    """The child configuration: only what differs from the base, which stands in the same folder of mmdetection3d's `configs/`."""
    folder, _, name = base.path.partition("/")
    changes = _changes(model_of(encoder, base), base.model)
    lines = [f"# Its place is configs/{folder}/ of mmdetection3d 1.4. Heads, classes, data and schedule come from the base.",
             f"_base_ = './{name}'", f"load_from = '{WEIGHTS}'"]  # fmt: skip
    if changes:
        lines.append(f"model = {_code(changes, 0)}")
    return "\n".join(lines) + "\n"


def guide_text(encoder: Encoder, kind: str, theirs: Sequence[Column]) -> str:
    """What a user does next and what to mind, with $EXPORT for the folder."""
    base = BASES[kind]
    place = f"configs/{base.path.partition('/')[0]}/{CONFIG}"
    notes = [
        f"The log may list `missing keys` that begin with {base.prefix}bbox_head: the head starts from scratch. mmengine never fails: whatever else"
        " it lists (missing, unexpected, size mismatch) did not arrive.",
        "load_from is the way. SECOND overwrites an `init_cfg` that is given to it. With --resume, or a work dir that is resumed, load_from is not"
        " an initialisation: take a fresh --work-dir.",
        "Versions: mmdetection3d 1.4 wants mmcv >=2.0.0rc4,<2.2, mmdet >=3.0,<3.3, mmengine >=0.7.1,<1; in practice torch <= 2.1, Python <= 3.11.",
        "voxel_encoder.legacy=False is part of it: with legacy=True, the default of PillarFeatureNet, offsets overwrite the absolute xyz.",
        "Empty slots compete in the maximum, as in training. DynamicPillarFeatureNet has other names and other numerics.",
    ]
    names = [c.name for c in theirs]
    if names != list(COLUMNS[kind]):
        every = COLUMNS["centerpoint"]
        notes.append(f"The encoder reads {', '.join(names)}: set use_dim={[every.index(n) for n in names]} in every loader and in db_sampler.")
    notes += [f"Intensity is expected in 0..{c.scale:g}: the factor is in the first layer's weights." for c in theirs if c.name == "intensity"]
    frame = {0.0: "x forward, y left", 90.0: "x right, y forward (nuScenes' LIDAR_TOP)"}
    axes = frame.get(encoder.input_yaw_deg, f"x forward, y left, turned by {encoder.input_yaw_deg:g} degrees about z")
    notes.append(f"Points: {axes}, z up; metres from the LiDAR. dt: seconds before the newest sweep.")
    if kind == "centerpoint" and encoder.input_yaw_deg != 90:
        notes.append("nuScenes' points come with x to the right: this export fits data whose x points forward; or pretrain with input_yaw_deg=90.")
    if [*encoder.low, *encoder.high] != base.model["data_preprocessor"]["voxel_layer"]["point_cloud_range"]:
        notes.append("The range is not the base's. mmengine does not merge lists: give PointsRangeFilter and ObjectRangeFilter of your pipelines the"
                     " range of the configuration, and check the head's anchors or post_center_range.")  # fmt: skip
    notes.append("check_in_target.py beside this file compares a batch of your loader, and your model's map of the stored cloud, with ours.")
    commands = [
        "# In mmdetection3d 1.4, with its own environment; EXPORT is the folder of this file.",
        f'cp "$EXPORT"/{CONFIG} {place}',
        f'python tools/train.py {place} --work-dir work_dirs/wm_$(date +%Y%m%d_%H%M%S) --cfg-options load_from="$EXPORT"/{WEIGHTS}',
    ]
    return "\n".join([*commands, "", *(f"- {note}" for note in notes)]) + "\n"


def renamed(weights: Mapping[str, Tensor], encoder: Encoder, base: Base) -> dict[str, Tensor]:
    """Our state_dict under the target's names: indices in a block one lower, and where the target has Conv2d for a lift by 1, its kernel."""
    conv_for_one = base.model[f"{base.prefix}neck"].get("use_conv_for_no_stride", False)
    out = {}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        if part == "vfe":
            out[f"{base.prefix}voxel_encoder.{rest}"] = value
            continue
        kind, block, layer, field = rest.split(".")
        if kind == "blocks":
            out[f"{base.prefix}backbone.blocks.{block}.{int(layer) - 1}.{field}"] = value
        else:
            if layer == "0" and encoder.upsample_strides[int(block)] == 1 and conv_for_one:
                value = value.transpose(0, 1)
            out[f"{base.prefix}neck.deblocks.{block}.{layer}.{field}"] = value
    return {name: value.detach().cpu().contiguous().clone() for name, value in out.items()}


def export(trained: Trained, folder: Path, about: dict[str, Any], sample: Tensor, parts: Sequence[Part]) -> dict[str, Any]:
    """Write the export of a trained run's encoder to the new folder. sample (N,F) f32: a cloud with the encoder's columns; about["intensity"]: the
    full scale of the target's intensity, None for the base's own. UsageError where mmdetection3d has no modules for this encoder."""
    config = trained.config.encoder
    refuse(config)
    kind = base_of(config)
    base, theirs = BASES[kind], columns(config, about["intensity"])
    encoder = trained.model.encoder.float().eval().cpu()
    with torch.no_grad():
        bev = encoder(Clouds(sample, (len(sample),)))
    weights = renamed(encoder.state_dict(), config, base)
    first = f"{base.prefix}voxel_encoder.pfn_layers.0.linear.weight"
    weights[first] = folded(weights[first], config.features, theirs)
    checkpoint = io.BytesIO()
    torch.save({"state_dict": weights, "meta": {}}, checkpoint)
    return commit_folder(folder, {
        WEIGHTS: checkpoint.getvalue(), CONFIG: child_config(config, base).encode(), GUIDE: guide_text(config, kind, theirs).encode(),
        "check_in_target.py": Path(check_in_target.__file__).read_bytes(),
        SAMPLE: save_tensors({"points": as_target(sample, config.features, theirs).contiguous(), "map": bev.contiguous()}),
    }, {**about, "target": "mmdet3d", "tensors": len(weights), "base": kind, "detector": "CenterPoint" if base.prefix else "VoxelNet"})  # fmt: skip


def snippet(folder: Path) -> str:
    """The guide of an export, for this folder."""
    return f"EXPORT={shlex.quote(str(folder.resolve()))}\n{read_whole(folder / GUIDE, 1 << 20).decode()}".rstrip()


def _sample(folder: Path) -> dict[str, Tensor]:
    sample = read_tensors(folder / SAMPLE)
    if not {"points", "map"} <= set(sample) or sample["points"].ndim != 2 or not torch.isfinite(sample["map"]).all() or not sample["map"].any():
        raise WmError(f"{one_line(folder / SAMPLE)}: no cloud with a finite map that is not empty; export the run again")
    return sample


def verify(folder: Path) -> dict[str, Any]:
    """Lay the child configuration on its base, build what mmdetection3d would build, load as mmengine would, run the stored cloud, compare.

    Gives {"loaded", "tensors", "expected", "missing", "unexpected", "mismatched", "difference", "absolute", "largest", "reasons"} and what
    `handover.real` gives. difference is the absolute one over the map's largest value where that is above 1 (float32 rounds in proportion). WmError
    where nothing can be built."""
    manifest = check_folder(folder)
    kind = manifest.get("base")
    if kind not in BASES:
        raise WmError(f"{one_line(folder)}: base {one_line(repr(kind), 40)} is not one of {', '.join(BASES)}; made by another version?")
    base = BASES[kind]
    child = read_config(read_whole(folder / CONFIG, 1 << 20).decode("utf-8", "replace"))
    if child.get("_base_") != f"./{base.path.partition('/')[2]}" or child.get("load_from") != WEIGHTS:
        raise WmError(f"{one_line(folder / CONFIG)}: _base_ or load_from is not what this export is made for; export the run again")
    model = merged(base.model, child.get("model", {}))
    detector = Detector(model, base.prefix).eval()
    checkpoint = read_checkpoint(folder / WEIGHTS)
    loaded = load_checkpoint(detector, {checkpoint.wrapper: checkpoint.tensors} if checkpoint.wrapper else checkpoint.tensors)
    sample = _sample(folder)
    try:
        with torch.no_grad():
            bev = detector(sample["points"])
    except RuntimeError as error:
        raise WmError(f"{one_line(folder)}: the model fails on the stored cloud ({one_line(error, 160)}); export the run again") from error
    if bev.shape != sample["map"].shape:
        raise WmError(f"{one_line(folder)}: mmdetection3d's map is {tuple(bev.shape)}, ours {tuple(sample['map'].shape)}; export the run again")
    absolute, largest = float((bev - sample["map"]).abs().max()), float(sample["map"].abs().max())
    difference, reasons = absolute / max(1.0, largest), []
    if detector.part("voxel_encoder").legacy:
        reasons.append(f"{base.prefix}voxel_encoder.legacy is True: offsets overwrite the absolute xyz that the first layer reads; set legacy=False")
    elif not difference <= TOLERANCE and len(loaded.loaded) == len(detector.state_dict()):
        reasons.append("every tensor has the name and shape of one of theirs, and the maps differ: the values of some are others than we wrote")
    theirs = real.mmdet3d(model, base.prefix, checkpoint.tensors, sample)
    return {"loaded": len(loaded.loaded), "tensors": len(detector.state_dict()), "expected": int(manifest["tensors"]), "missing": loaded.missing,
            "unexpected": loaded.unexpected, "mismatched": loaded.mismatched, "difference": difference, "absolute": absolute,
            "largest": largest, **theirs, "reasons": reasons + theirs["reasons"]}  # fmt: skip
