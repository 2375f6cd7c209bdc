"""Does your own pipeline feed this encoder what it was trained on, and does your model compute with it what it should?

This one file, `manifest.json` and `sample.safetensors` beside it are all there is to it: torch and numpy, nothing else. In a training script:

    import sys; sys.path.insert(0, "EXPORT_FOLDER")
    import check_in_target
    for line in check_in_target.check(next(iter(loader)), bev_fn=my_bev):   # [] when all is well
        print(line)

where the batch is what your loader gives (OpenPCDet's dict, mmdetection3d's `inputs`, voxels, plain (N,F) clouds) and `my_bev` takes a cloud
(N,F) float32 to your model's BEV map (C,H,W), in eval mode. Or with a batch in a file:

    python check_in_target.py --batch batch.npz [--map map.npy | --bev my_module:my_bev]

It ends with 1 and one line per finding where something differs. Take a batch of several streets without augmentation (of the validation loader),
of a car that drives: which way is forward shows in where its older sweeps were taken, and a single sweep does not tell. Left for right
leaves no trace.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import struct
import sys
from pathlib import Path
from typing import Any, Callable, Sequence  # noqa: UP035 (also runs on the Pythons that the targets need)

import numpy as np
import torch

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
THINNED = 50_000  # points of a cloud that figures are taken from
TOLERANCE = 1e-4  # of the largest value of the map: other kernels and other orders of summation stay far below


def channel_statistics(
    clouds: Any, features: Sequence[str], low: Sequence[float] | None = None, high: Sequence[float] | None = None
) -> dict[str, Any]:
    """What a set of clouds looks like, as JSON values. clouds: (N,F) array or tensor, or a list of them; features: the names of the columns;
    low, high (3): only points in between count, `inside` is their share.

    Gives {"features", "clouds", "points" (mean per cloud), "inside", "drift", "channels": {name: {"min", "max", "mean", "std", "zeros" (share),
    "distinct" (values per cloud, to 0.1 ms for times, at most THINNED), "quantiles" (at QUANTILES)}}}. drift (x, y in m/s): how the points'
    centre moves with dt. Older sweeps were taken where the car then was, so it is the car's velocity backwards, and says which way is
    forward; None where there is one sweep only, or the range does not go round the sensor."""
    rows = [_array(cloud) for cloud in (clouds if isinstance(clouds, (list, tuple)) else [clouds])]
    rows = [cloud[np.isfinite(cloud).all(1)] for cloud in rows]
    total = sum(len(cloud) for cloud in rows)
    if low is not None and high is not None:
        rows = [cloud[((cloud[:, :3] >= low) & (cloud[:, :3] < high)).all(1)] for cloud in rows]
    inside = sum(len(cloud) for cloud in rows)
    thin = [cloud[:: -(-len(cloud) // THINNED)].astype(np.float64) for cloud in rows if len(cloud)]
    channels = {}
    for i, name in enumerate(features[: rows[0].shape[1]] if inside else ()):
        values = np.concatenate([cloud[:, i] for cloud in thin])
        distinct = [len(np.unique(np.round(cloud[:, i], 4))) for cloud in thin]
        channels[name] = {
            "min": float(min(cloud[:, i].min() for cloud in rows if len(cloud))),
            "max": float(max(cloud[:, i].max() for cloud in rows if len(cloud))),
            "mean": float(values.mean()), "std": float(values.std()), "zeros": float((values == 0).mean()),
            "distinct": float(np.mean(distinct)), "quantiles": [float(q) for q in np.quantile(values, QUANTILES)],
        }  # fmt: skip
    reach = min(*(-l for l in low[:2]), *high[:2]) if low is not None and high is not None else np.inf
    drift = [_drift(cloud, list(features).index("dt"), reach) for cloud in thin] if "dt" in channels else []
    drift = [slope for slope in drift if slope is not None]
    return {"features": list(features), "clouds": len(rows), "points": total / max(len(rows), 1), "inside": inside / max(total, 1),
            "drift": np.mean(drift, 0).tolist() if drift else None, "channels": channels}  # fmt: skip


def _drift(cloud: np.ndarray, column: int, reach: float) -> np.ndarray | None:
    """(2,) from the points of a square about the sensor, since a range that ends near it cuts the older sweeps off; None where there is none."""
    cloud = cloud[(np.abs(cloud[:, :2]) < reach).all(1)]
    if reach < 10 or len(cloud) < 2:
        return None
    time = cloud[:, column] - cloud[:, column].mean()
    spread = float((time * time).mean())
    return None if spread < 1e-6 else (time[:, None] * cloud[:, :2]).mean(0) / spread


def _array(cloud: Any) -> np.ndarray:
    cloud = getattr(cloud, "tensor", cloud)  # mmdetection3d wraps its points
    out = cloud.detach().cpu().numpy() if isinstance(cloud, torch.Tensor) else np.asarray(cloud)
    if out.ndim != 2 or out.shape[1] < 3 or out.dtype.kind not in "fiu":
        raise ValueError(f"a cloud is (N, 3 or more) numbers, this is {out.dtype} of shape {out.shape}")
    return out.astype(np.float32)


def clouds_in(batch: Any, width: int) -> list[np.ndarray]:
    """The clouds (N,F) of a batch as loaders give it; width: the number of columns expected, which tells a leading batch index apart."""
    if isinstance(batch, dict):
        for outer in ("inputs", "data"):
            if isinstance(batch.get(outer), dict):
                return clouds_in(batch[outer], width)
        if "points" in batch:
            return clouds_in(batch["points"], width)
        if isinstance(batch.get("voxels"), dict):
            return clouds_in(batch["voxels"], width)
        if "voxels" in batch:
            return _unvoxelized(batch)
        raise ValueError(f"no `points` or `voxels` in the batch, only {', '.join(map(str, batch))}")
    if isinstance(batch, (list, tuple)):
        return [_array(cloud) for cloud in batch]
    points = _array(batch)
    first = points[:, 0]
    if points.shape[1] == width + 1 and len(points) and first[0] == 0 and (first == np.round(first)).all() and (np.diff(first) >= 0).all():
        return [points[first == index, 1:] for index in np.unique(first)]
    return [points]


def _unvoxelized(batch: dict[str, Any]) -> list[np.ndarray]:
    """Points out of (V,P,F) voxels, of which the first `voxel_num_points` or `num_points` are filled, by the sample in the first coordinate."""
    voxels = np.asarray(torch.as_tensor(batch["voxels"]).cpu())
    counts = next((batch[key] for key in ("voxel_num_points", "num_points") if key in batch), None)
    coords = next((batch[key] for key in ("voxel_coords", "coors") if key in batch), None)
    filled = np.abs(voxels).sum(2) > 0 if counts is None else np.arange(voxels.shape[1]) < np.asarray(torch.as_tensor(counts).cpu())[:, None]
    sample = np.zeros(len(voxels)) if coords is None else np.asarray(torch.as_tensor(coords).cpu())[:, 0]
    return [_array(voxels[sample == index][filled[sample == index]]) for index in np.unique(sample)]


def compare_inputs(theirs: Sequence[np.ndarray], expected: dict[str, Any], low: Sequence[float], high: Sequence[float]) -> list[str]:
    """One line for each way in which clouds (N,F) differ from the statistics of the pretraining data more than streets differ."""
    features = expected["features"]
    findings = []
    width = theirs[0].shape[1] if theirs else 0
    if width < len(features):
        lacking = ", ".join("time (dt)" if name == "dt" else name for name in features[width:])
        findings.append(f"{width} columns per point, expected {len(features)} ({' '.join(features)}): no {lacking} column")
    elif width > len(features):
        findings.append(f"{width} columns per point, expected {len(features)} ({' '.join(features)}): the encoder takes no more")
    found = channel_statistics(list(theirs), features[:width], low, high)
    if found["inside"] < 0.5 * expected["inside"] or not found["channels"]:
        findings.append(f"only {found['inside']:.0%} of the points lie in the encoder's range {list(low)} .. {list(high)}, "
                        f"{expected['inside']:.0%} in pretraining: another range, unit or frame")  # fmt: skip
    if not found["channels"]:
        return findings
    got, want = found["channels"], expected["channels"]
    if order := _order(got, want):
        return [*findings, f"the columns look like {' '.join(order)}, expected {' '.join(features[: len(order)])}: another feature order"]
    findings += _forward(found["drift"], expected["drift"])
    findings += _places(got, want)
    if "intensity" in got:
        findings += _intensity(got["intensity"], want["intensity"])
    if "dt" in got:
        findings += _times(got["dt"], want["dt"])
    shown = expected.get("shown") or expected["points"]  # after thinning, which is exact
    if not 0.4 < found["points"] / max(expected["points"], 1) < 2.5 and not 0.8 < found["points"] / max(shown, 1) < 1.25:
        thinned = f" ({shown:.0f} after thinning)" if shown < 0.9 * expected["points"] else ""
        findings.append(
            f"{found['points']:.0f} points per cloud, {expected['points']:.0f}{thinned} in pretraining: another sweep count or another sensor"
        )
    return findings


def _order(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    """The names that the columns seem to have, by the arrangement under which their quantiles fit best; [] where they fit as they are, or where
    no arrangement does. Which of x and y is which says `_forward`."""
    names = list(got)
    scale = {name: max(want[name]["std"], 0.05 * (want[name]["max"] - want[name]["min"]), 1e-3) for name in names}
    cost = {(a, b): float(np.abs(np.subtract(got[a]["quantiles"], want[b]["quantiles"])).mean()) / scale[b] for a in names for b in names}

    def total(order: Sequence[str]) -> float:
        return sum(min(cost[pair], 10.0) for pair in zip(names, order))

    best = list(min(itertools.permutations(names), key=total))
    moved = [(a, b) for a, b in zip(names, best) if a != b]
    if not moved or {name for pair in moved for name in pair} <= {"x", "y"}:
        return []
    as_it_is = sum(min(cost[a, a], 10.0) for a, _ in moved)
    return best if as_it_is > 2.0 and as_it_is > 4 * sum(cost[pair] for pair in moved) else []


def _forward(got: Sequence[float] | None, want: Sequence[float] | None) -> list[str]:
    """Which way the car drives, where sweeps of a moving car are in one cloud."""
    if got is None or want is None or min(np.hypot(*got), np.hypot(*want)) < 1.5:
        return []
    turn = float(np.rad2deg(np.arctan2(want[0] * got[1] - want[1] * got[0], np.dot(want, got))))
    if abs(turn) < 50:
        return []
    axes = [f"{'-' if d[i] > 0 else '+'}{'xy'[i]}" for d in (want, got) for i in [int(abs(d[1]) > abs(d[0]))]]
    hint = (
        "turn the cloud, or take the export for this frame" if abs(turn) < 130 else "the order of the sweeps, the sign of dt or the frame is another"
    )
    return [f"the car drives along {axes[1]} (by where older sweeps were taken), in pretraining along {axes[0]}: axes swapped or turned; {hint}"]


def _places(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    out = []
    for axis in ("x", "y"):
        pairs = [(channel[axis]["min"], channel[axis]["max"]) for channel in (got, want)]
        inner = [(channel[axis]["quantiles"][0], channel[axis]["quantiles"][-1]) for channel in (got, want)]
        shares = [(now[1] - now[0]) / max(before[1] - before[0], 1e-6) for now, before in (pairs, inner)]  # few far points, or a street with walls
        if max(shares) < 0.5 or min(shares) > 2:
            out.append("{} spans {:.1f} .. {:.1f} m, in pretraining {:.1f} .. {:.1f} m: another range, or axes swapped".format(axis, *sum(pairs, ())))
    shift = got["z"]["quantiles"][2] - want["z"]["quantiles"][2]
    if abs(shift) > 0.8:
        out.append(f"z lies {abs(shift):.1f} m {'higher' if shift > 0 else 'lower'} than in pretraining: another origin (sensor, axle or ground)")
    return out


def _intensity(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    if got["max"] == got["min"]:
        return [] if want["max"] == want["min"] else [f"intensity is {got['max']:.3g} everywhere, in pretraining it has {want['max']:.3g} at most"]
    if want["max"] <= 1.5 and got["max"] > 1.5:
        return [f"intensity reaches {got['max']:.0f}, expected 0..1: divide it by {255 if got['max'] <= 255 else 'its full scale'}"]
    if want["max"] > 1.5 and got["max"] <= 1.0:
        return [f"intensity stays within 0..1 (at most {got['max']:.3g}), expected 0..{255 if want['max'] <= 255 else round(want['max'])}: "
                "multiply it by 255"]  # fmt: skip
    if got["min"] < -1e-3 and want["min"] >= 0:
        return [f"intensity is as low as {got['min']:.3g}, expected none below 0"]
    return []


def _times(got: dict[str, Any], want: dict[str, Any]) -> list[str]:
    longest, expected = got["max"], want["max"]
    if got["max"] == got["min"] == 0 and expected > 0:
        return [f"no time column: dt is 0 everywhere, in pretraining it reaches {expected:.3g} s over {want['distinct']:.0f} sweeps"]
    if got["min"] < -1e-3:
        return [f"dt is negative ({got['min']:.3g} .. {got['max']:.3g}), expected seconds before the newest sweep, >= 0: turn its sign"]
    if longest > 20 * max(expected, 0.05):
        return [f"dt reaches {longest:.4g}, in pretraining {expected:.3g} s: expected seconds"]
    if not 0.75 < got["distinct"] / want["distinct"] < 1 / 0.75:
        return [f"{got['distinct']:.0f} different times per cloud, {want['distinct']:.0f} in pretraining: another sweep count"]
    if not 0.5 < (longest + 0.01) / (expected + 0.01) < 2:
        return [f"dt reaches {longest:.3g} s, in pretraining {expected:.3g} s: another spacing of the sweeps"]
    return []


def compare_maps(theirs: Any, ours: torch.Tensor, tolerance: float = TOLERANCE) -> list[str]:
    """The line that says how a BEV map differs from ours (1,C,H,W), in ours' terms; [] where it does not."""
    if isinstance(theirs, dict):
        theirs = theirs.get("spatial_features_2d", next(iter(theirs.values()), None))
    while isinstance(theirs, (list, tuple)) and theirs:
        theirs = theirs[0]
    got = torch.as_tensor(theirs).detach().float().cpu()
    got = got[0] if got.dim() == 4 else got
    want = ours[0]
    if got.shape != want.shape:
        turned = " (rows and columns exchanged)" if got.shape == want.transpose(1, 2).shape else ""
        return [f"BEV map of {tuple(got.shape)}, ours is {tuple(want.shape)}{turned}: another layer, range or voxel size"]
    limit = tolerance * max(1.0, float(want.abs().max()))
    difference = float((got - want).abs().max())
    if difference <= limit:
        return []
    ways = {
        "rows and columns exchanged": want.transpose(1, 2),
        "turned upside down (y reversed)": want.flip(1),
        "mirrored (x reversed)": want.flip(2),
    }
    for way, turned in ways.items():
        if turned.shape == got.shape and float((got - turned).abs().max()) <= limit:
            return [f"BEV map equals ours {way}"]
    share = float(((got - want).abs() > limit).float().mean())
    hint = "; is the model in eval mode, with all tensors loaded?" if share > 0.2 else "; another padding or pillar rule (hard against dynamic)?"
    return [f"BEV map differs from ours by up to {difference:.2g} (allowed {limit:.1g}) in {share:.0%} of its values{hint}"]


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The float32 tensors of a small safetensors file: an 8-byte length, a JSON header, bytes."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise ValueError(f"{path}: cut off; copy the export again")
    out = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            values = np.frombuffer(data[8 + length :][first:last], "<f4").reshape(entry["shape"])
            out[name] = torch.from_numpy(values.copy())
    return out


def stored_cloud(folder: Path = Path(__file__).parent) -> torch.Tensor:
    """(N,F) float32: the cloud of this export, in your model's units and order of columns."""
    return read_safetensors(folder / "sample.safetensors")["points"]


def check(
    batch: Any = None,
    bev_fn: Callable[[torch.Tensor], Any] | None = None,
    *,
    bev_map: Any = None,
    folder: Path = Path(__file__).parent,
    tolerance: float = TOLERANCE,
) -> list[str]:
    """The findings, one line each. batch: of your loader, or None; bev_fn: cloud (N,F) to your BEV map, or bev_map: that map of `stored_cloud`."""
    manifest = json.loads((folder / "manifest.json").read_text())
    features, findings = manifest["input"]["features"], []
    if batch is not None:
        theirs = clouds_in(batch, len(features))
        expected = manifest.get("statistics")
        if expected:
            findings += compare_inputs(theirs, expected, manifest["input"]["low"], manifest["input"]["high"])
        else:
            findings.append("manifest.json has no statistics of the pretraining data: nothing but the number of columns can be compared")
            if theirs[0].shape[1] != len(features):
                findings.append(f"{theirs[0].shape[1]} columns per point, expected {len(features)} ({' '.join(features)})")
    sample = read_safetensors(folder / "sample.safetensors")
    if bev_fn is not None:
        with torch.no_grad():
            bev_map = bev_fn(sample["points"])
    if bev_map is not None:
        findings += compare_maps(bev_map, sample["map"], tolerance)
    return findings


def _read_batch(path: Path) -> Any:
    if path.suffix in (".npz", ".npy"):
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        return {name: found[name] for name in found.files}
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own words advise to load it without that limit
        raise ValueError(f"{path}: not a file of plain tensors and numbers; save the points with numpy.savez(PATH, points=...)") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare your loader's batch and your model's BEV map with what this encoder was trained on.")
    parser.add_argument("--batch", type=Path, help="a batch of your loader: .npz or .npy (points, or voxels with counts), or .pt")
    parser.add_argument("--map", type=Path, help="your model's BEV map of stored_cloud(): .npy or .pt")
    parser.add_argument("--bev", metavar="MODULE:FUNCTION", help="a function of yours from a cloud (N,F) to your model's BEV map; it is imported")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of the map's largest value (default: %(default)s)")
    args = parser.parse_args(argv)
    if not (args.batch or args.map or args.bev):
        parser.error("nothing to compare: give --batch, --map or --bev")
    bev = None
    if args.bev:
        sys.path.insert(0, "")
        module, _, name = args.bev.partition(":")
        bev = getattr(importlib.import_module(module), name)
    try:
        findings = check(
            _read_batch(args.batch) if args.batch else None, bev, bev_map=_read_batch(args.map) if args.map else None, tolerance=args.tolerance
        )
    except (OSError, ValueError, KeyError) as error:
        print(f"check_in_target: {error}", file=sys.stderr)
        return 1
    for line in findings:
        print(line)
    if not findings:
        print("as in pretraining")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
