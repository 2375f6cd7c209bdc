"""What a recording consists of: the frozen records that every adapter gives and everything else reads.

Units are metres, seconds for durations and **int64 nanoseconds for instants** (one clock per log). Ego and LiDAR frames are
right-handed, x forward, y left, z up; camera frames x right, y down, z forward, pixel centres at integers. Transforms are float64
4x4 matrices named ``target_from_source``. A record checks itself when it is made and raises `RecordError` with one line: which thing,
what is wrong, what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sensors.errors import WmError

Array = NDArray[Any]

ROTATION_TOLERANCE = 1e-3
POSE_SOURCES = ("log", "gnss", "odometry", "refined")
CAMERA_MODELS = {"pinhole": 0, "brown_conrady": 5, "kannala_brandt": 4, "mei": 5}  # and how many distortion parameters each has
MAX_POINTS = 1 << 26


class RecordError(WmError, ValueError):
    """A record that cannot be right. The message is one line: the thing, what is wrong, what to do."""


def checked_array(what: str, value: object, dtype: type, shape: tuple[int | None, ...]) -> Array:
    """The value as a read-only array of that type and shape (None: any length). RecordError names `what` where it has another, or where
    integers are wanted and a cast would change the numbers."""
    given = np.asarray(value)
    if np.issubdtype(dtype, np.integer) and given.size:  # a cast would turn seconds into zeros, and wrap what is too large
        if given.dtype.kind not in "biuf" or (given.dtype.kind == "f" and not (np.isfinite(given) & (given == np.rint(given))).all()):
            raise RecordError(f"{what}: not whole numbers; stamps and times are integers of nanoseconds, convert them in the adapter")
        least, most = int(given.min()), int(given.max())
        bounds: np.iinfo[Any] = np.iinfo(dtype)
        if least < bounds.min or most > bounds.max:
            raise RecordError(f"{what}: {least}..{most} does not fit {bounds.dtype}; check its unit and where it counts from")
    array: Array = np.ascontiguousarray(given, dtype=dtype)
    if array.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, array.shape, strict=True)):
        raise RecordError(f"{what}: shape {array.shape}, expected {shape}; check the reader of this file")
    array.flags.writeable = False
    return array


def _finite(what: str, array: Array) -> Array:
    if not np.isfinite(array).all():
        raise RecordError(f"{what}: {int((~np.isfinite(array)).sum())} values are not finite; drop and count them in the adapter")
    return array


def _stamp(what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise RecordError(f"{what}: stamp {value!r} is not an integer of nanoseconds; convert it in the adapter")
    if not 0 <= int(value) < 2**62:
        raise RecordError(f"{what}: stamp {int(value)} ns is outside [0, 2^62); check its unit")
    return int(value)


def checked_transform(what: str, value: object) -> Array:
    """A rigid float64 4x4: rotation orthonormal within 1e-3 and then projected onto SO(3), last row 0 0 0 1, everything finite."""
    matrix = np.array(value, dtype=np.float64)
    if matrix.shape != (4, 4):
        raise RecordError(f"{what}: transform of shape {matrix.shape}, expected (4, 4)")
    _finite(what, matrix)
    rotation = matrix[:3, :3]
    if np.linalg.det(rotation) < 0:
        raise RecordError(f"{what}: left-handed transform (det {np.linalg.det(rotation):.3f}); flip y where the log is read")
    error = float(np.abs(rotation @ rotation.T - np.eye(3)).max())
    if error > ROTATION_TOLERANCE or not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise RecordError(f"{what}: not a rigid transform (orthonormal to {error:.1e} only); check the calibration or pose")
    u, _, vt = np.linalg.svd(rotation)
    matrix[:3, :3] = u @ vt
    matrix[3] = (0, 0, 0, 1)
    matrix.flags.writeable = False
    return matrix


def _checked_transforms(stamps_ns: Array, poses: Array) -> Array:
    """`checked_transform` of each of the poses (N,4,4), all at once: an hour has hundreds of thousands."""
    rotations = poses[:, :3, :3]
    with np.errstate(invalid="ignore", over="ignore"):
        rigid = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max((1, 2)) <= ROTATION_TOLERANCE
        sound = rigid & np.isfinite(poses).all((1, 2)) & np.isclose(poses[:, 3], (0, 0, 0, 1)).all(1)
    sound[sound] &= np.linalg.det(rotations[sound]) > 0
    for index in np.flatnonzero(~sound):
        checked_transform(f"pose at {stamps_ns[index]}", poses[index])  # says what is wrong with it
    u, _, vt = np.linalg.svd(rotations)
    checked = poses.copy()
    checked[:, :3, :3] = u @ vt
    checked[:, 3] = (0, 0, 0, 1)
    checked.flags.writeable = False
    return checked


@dataclass(frozen=True, eq=False)
class Sweep:
    """One turn of one LiDAR. points (N,3) f32 in the LiDAR's frame, intensity (N,) f32 in 0..1, ring (N,) u16 or None,
    time_ns (N,) i32 offset of each point from stamp_ns or None; stamp_ns is the instant that the points refer to."""

    lidar: str
    stamp_ns: int
    points: Array
    intensity: Array
    ring: Array | None = None
    time_ns: Array | None = None
    deskewed: bool = False

    def __post_init__(self) -> None:
        what = f"sweep of {self.lidar} at {self.stamp_ns}"
        put: Callable[[str, object], None] = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("stamp_ns", _stamp(what, self.stamp_ns))
        put("points", _finite(f"{what}, points", checked_array(f"{what}, points", self.points, np.float32, (None, 3))))
        count = len(self.points)
        if count > MAX_POINTS:
            raise RecordError(f"{what}: {count} points, more than {MAX_POINTS}; check the reader")
        intensity = _finite(f"{what}, intensity", checked_array(f"{what}, intensity", self.intensity, np.float32, (count,)))
        if count and not (intensity.min() >= 0 and intensity.max() <= 1):
            raise RecordError(f"{what}: intensity in {intensity.min():g}..{intensity.max():g}, expected 0..1; scale it in the adapter")
        put("intensity", intensity)
        if self.ring is not None:
            put("ring", checked_array(f"{what}, ring", self.ring, np.uint16, (count,)))
        if self.time_ns is not None:
            put("time_ns", checked_array(f"{what}, time_ns", self.time_ns, np.int32, (count,)))


@dataclass(frozen=True, eq=False)
class Image:
    """One exposure: the encoded bytes as recorded (JPEG or PNG), decoded on demand by `sensors.formats.images`."""

    camera: str
    stamp_ns: int
    encoded: bytes = field(repr=False)
    width: int
    height: int
    exposure_ns: int | None = None

    def __post_init__(self) -> None:
        what = f"image of {self.camera} at {self.stamp_ns}"
        object.__setattr__(self, "stamp_ns", _stamp(what, self.stamp_ns))
        if not (self.encoded[:3] == b"\xff\xd8\xff" or self.encoded[:8] == b"\x89PNG\r\n\x1a\n"):
            raise RecordError(f"{what}: {len(self.encoded)} bytes that are neither JPEG nor PNG; drop and count it in the adapter")
        if not (0 < self.width <= 1 << 14 and 0 < self.height <= 1 << 14):
            raise RecordError(f"{what}: size {self.width}x{self.height} is not within 1..16384")


@dataclass(frozen=True, eq=False)
class Lidar:
    """A LiDAR and where it sits: ego_from_lidar (4,4); rate_hz nominal; beams and beam elevations (rad) where known."""

    name: str
    ego_from_lidar: Array
    rate_hz: float
    beams: int | None = None
    elevations_rad: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ego_from_lidar", checked_transform(f"lidar {self.name}", self.ego_from_lidar))
        if not 0 < self.rate_hz <= 1000:
            raise RecordError(f"lidar {self.name}: rate {self.rate_hz} Hz is not within 0..1000")
        if self.beams is not None:
            object.__setattr__(self, "beams", int(self.beams))
        if self.elevations_rad is not None:
            what = f"lidar {self.name}, elevations"
            object.__setattr__(self, "elevations_rad", _finite(what, checked_array(what, self.elevations_rad, np.float64, (None,))))


@dataclass(frozen=True, eq=False)
class Camera:
    """A camera: ego_from_camera (4,4), K (3,3) for images of width x height pixels, distortion as its model has it
    (`sensors.geometry.project` says which parameters in which order)."""

    name: str
    ego_from_camera: Array
    k_px: Array
    width: int
    height: int
    model: str = "pinhole"
    distortion: Array = field(default_factory=lambda: np.zeros(0))
    rate_hz: float = 10.0

    def __post_init__(self) -> None:
        what = f"camera {self.name}"
        object.__setattr__(self, "ego_from_camera", checked_transform(what, self.ego_from_camera))
        k = _finite(f"{what}, K", checked_array(f"{what}, K", self.k_px, np.float64, (3, 3)))
        if k[0, 0] <= 0 or k[1, 1] <= 0 or not np.allclose(k[2], (0, 0, 1)) or k[1, 0] != 0:
            raise RecordError(f"{what}: K {k.tolist()} is not [fx s cx; 0 fy cy; 0 0 1] with positive focal lengths; is it transposed?")
        object.__setattr__(self, "k_px", k)
        distortion = checked_array(f"{what}, distortion", self.distortion, np.float64, (None,))
        object.__setattr__(self, "distortion", _finite(f"{what}, distortion", distortion))
        if self.model not in CAMERA_MODELS:
            raise RecordError(f"{what}: model {self.model!r} is not one of {', '.join(CAMERA_MODELS)}")
        if self.distortion[CAMERA_MODELS[self.model] :].any():
            raise RecordError(f"{what}: {len(self.distortion)} distortion parameters where {self.model} has {CAMERA_MODELS[self.model]}; "
                              "name the model they belong to, or undistort the images")  # fmt: skip
        if not (0 < self.width <= 1 << 14 and 0 < self.height <= 1 << 14):
            raise RecordError(f"{what}: size {self.width}x{self.height} is not within 1..16384")


@dataclass(frozen=True, eq=False)
class EgoPose:
    """Where the ego frame was at one instant: world_from_ego (4,4), and who says so (one of POSE_SOURCES)."""

    stamp_ns: int
    world_from_ego: Array
    source: str = "log"

    def __post_init__(self) -> None:
        what = f"pose at {self.stamp_ns}"
        object.__setattr__(self, "stamp_ns", _stamp(what, self.stamp_ns))
        object.__setattr__(self, "world_from_ego", checked_transform(what, self.world_from_ego))
        if self.source not in POSE_SOURCES:
            raise RecordError(f"{what}: source {self.source!r} is not one of {', '.join(POSE_SOURCES)}")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The ego poses of a log: stamps_ns (N,) i64 strictly ascending, world_from_ego (N,4,4) f64. Interpolation between them is
    `sensors.geometry.pose_at`."""

    stamps_ns: Array
    world_from_ego: Array
    source: str = "log"

    def __post_init__(self) -> None:
        stamps = checked_array("trajectory, stamps", self.stamps_ns, np.int64, (None,))
        if len(stamps) == 0:
            raise RecordError("trajectory: no poses; give None instead and the log counts as one without poses")
        if (np.diff(stamps) <= 0).any():
            at = int(stamps[1:][np.diff(stamps) <= 0][0])
            raise RecordError(f"trajectory: stamps do not ascend at {at} ns; sort and de-duplicate them in the adapter")
        _stamp("trajectory, first stamp", int(stamps[0]))
        _stamp("trajectory, last stamp", int(stamps[-1]))
        poses = checked_array("trajectory, poses", self.world_from_ego, np.float64, (len(stamps), 4, 4))
        checked = _checked_transforms(stamps, poses)
        object.__setattr__(self, "stamps_ns", stamps)
        object.__setattr__(self, "world_from_ego", checked)
        if self.source not in POSE_SOURCES:
            raise RecordError(f"trajectory: source {self.source!r} is not one of {', '.join(POSE_SOURCES)}")

    def covers(self, stamps_ns: Array, slack_s: float = 0.1) -> Array:
        """(N,) bool: which of the instants (N,) i64 lie between the first and the last pose, or at most slack_s beyond."""
        slack_ns = int(slack_s * 1e9)
        inside: Array = (stamps_ns >= self.stamps_ns[0] - slack_ns) & (stamps_ns <= self.stamps_ns[-1] + slack_ns)
        return inside


@dataclass(frozen=True, eq=False)
class Box:
    """A labelled object at one instant, in the ego frame of that instant: centre (3,) m, size (l, w, h) m, yaw rad about z,
    velocity (2,) m/s in the world, its axes turned into the ego frame, or None; points inside or None."""

    stamp_ns: int
    track: str
    category: str
    centre: Array
    size: Array
    yaw_rad: float
    velocity: Array | None = None
    points_inside: int | None = None

    def __post_init__(self) -> None:
        what = f"box {self.track} at {self.stamp_ns}"
        for name in ("track", "category"):
            if not isinstance(value := getattr(self, name), str):
                raise RecordError(f"{what}: {name} {value!r} is a {type(value).__name__}, expected a str; write str(...) in the adapter")
        object.__setattr__(self, "stamp_ns", _stamp(what, self.stamp_ns))
        object.__setattr__(self, "centre", _finite(what, checked_array(what, self.centre, np.float64, (3,))))
        object.__setattr__(self, "size", _finite(what, checked_array(what, self.size, np.float64, (3,))))
        if (self.size <= 0).any() or not np.isfinite(self.yaw_rad):
            raise RecordError(f"{what}: size {self.size.tolist()}, yaw {self.yaw_rad}; sizes are positive and (l, w, h)")
        if self.velocity is not None:
            object.__setattr__(self, "velocity", checked_array(what, self.velocity, np.float64, (2,)))


@dataclass(frozen=True, eq=False)
class PointLabels:
    """Labels of the points of one sweep, in its order: category (N,) u8 (index into Labels.categories, 255 unknown),
    instance (N,) i32 (0 = none), moving (N,) bool."""

    stamp_ns: int
    category: Array
    instance: Array
    moving: Array

    def __post_init__(self) -> None:
        what = f"point labels at {self.stamp_ns}"
        object.__setattr__(self, "stamp_ns", _stamp(what, self.stamp_ns))
        count = len(self.category)
        object.__setattr__(self, "category", checked_array(what, self.category, np.uint8, (count,)))
        object.__setattr__(self, "instance", checked_array(what, self.instance, np.int32, (count,)))
        object.__setattr__(self, "moving", checked_array(what, self.moving, np.bool_, (count,)))


@dataclass(frozen=True, eq=False)
class Labels:
    """Everything a person or simulator knows about a log. Opened only through `Log.open_labels`, never in pretraining.

    complete_fov_rad: half-angle about the ego x axis within which *all* objects are boxed (pi: everywhere, as in the simulator).
    read_point_labels(lidar, index), and what only a simulator can tell: read_camera_truth(camera, index), depth (H,W) f32 in metres along
    the camera's z (infinite: sky) with category (H,W) u8 (255: sky); read_missing_rays(lidar, index), (M,3) f32 unit directions, each in the
    LiDAR's frame of its own time, of the rays that met nothing within reach. None where there is no such truth."""

    boxes: tuple[Box, ...]
    categories: tuple[str, ...] = ()
    complete_fov_rad: float = np.pi
    read_point_labels: Callable[[str, int], PointLabels | None] = lambda lidar, index: None
    read_camera_truth: Callable[[str, int], tuple[Array, Array] | None] = lambda camera, index: None
    read_missing_rays: Callable[[str, int], Array | None] = lambda lidar, index: None

    def __post_init__(self) -> None:
        for name, kind in (("boxes", Box), ("categories", str)):
            values = getattr(self, name)
            if not isinstance(values, tuple | list):
                raise RecordError(f"labels, {name}: a {type(values).__name__}, expected a tuple")
            for value in values:
                if not isinstance(value, kind):
                    raise RecordError(f"labels, {name}: holds a {type(value).__name__} where each is a {kind.__name__}")
            object.__setattr__(self, name, tuple(values))


def reference_of(lidars: Mapping[str, Lidar], sweeps: Mapping[str, int]) -> str:
    """The LiDAR that frames are built on: of those that have most sweeps, give or take a tenth, the one mounted highest, which sees all around;
    of equals the first by name."""
    most = max(sweeps[name] for name in lidars)
    return min((name for name in lidars if sweeps[name] >= 0.9 * most), key=lambda name: (-float(lidars[name].ego_from_lidar[2, 3]), name))


def no_labels() -> Labels | None:
    """What a log without labels has for `open_labels`: by name, so that the log can be pickled."""
    return None


@dataclass(frozen=True, eq=False)
class Log:
    """One recording, with lazy access to its payloads; adapters, the simulator and the store all give this.

    sweep_stamps_ns / image_stamps_ns: per sensor the strictly ascending int64 stamps of what exists; ``read_sweep(lidar, i)`` and
    ``read_image(camera, i)`` read the i-th of them and raise `RecordError` when it turns out unreadable. poses is None for a log without
    them. stamps is ``recorded``, or ``assumed`` where a nominal rate had to stand in. counts says what was missing, dropped or mended
    (dropping happens on reading too, so it grows). ego_box is (xmin, ymin, zmin, xmax, ymax, zmax) of the vehicle in its ego frame.
    intensity_scale: what the source's full scale was (1 or 255), so that an export can undo it. files: what the log was read from.
    measured_speed: forward speed of the ego by another sensor than the one that gave the poses (wheels, an inertial unit's velocity), as
    stamps (N,) i64 and m/s (N,): what poses are checked against, or None.
    """

    id: str
    dataset: str
    licence: str
    ego_frame: str
    lidars: Mapping[str, Lidar]
    cameras: Mapping[str, Camera]
    poses: Trajectory | None
    sweep_stamps_ns: Mapping[str, Array]
    image_stamps_ns: Mapping[str, Array]
    read_sweep: Callable[[str, int], Sweep]
    read_image: Callable[[str, int], Image]
    open_labels: Callable[[], Labels | None] = no_labels
    stamps: str = "recorded"
    measured_speed: tuple[Array, Array] | None = None
    intensity_scale: float = 1.0
    ego_box: tuple[float, float, float, float, float, float] = (-1.5, -1.2, -0.5, 3.5, 1.2, 2.0)
    files: tuple[Path, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.id or self.id != self.id.strip() or self.id.count("/") != 1 or any(part in ("", ".", "..") for part in self.id.split("/")):
            raise RecordError(f"log {self.id!r}: an id is dataset/native-name with both parts given")
        if not self.id.isprintable() or "\\" in self.id:
            raise RecordError(f"log {self.id!r}: the id holds control characters or a backslash; rename the recording")
        if self.stamps not in ("recorded", "assumed"):
            raise RecordError(f"log {self.id}: stamps is {self.stamps!r}, not recorded or assumed")
        if both := sorted(set(self.lidars) & set(self.cameras)):
            raise RecordError(f"log {self.id}: {both[0]!r} is the name of a LiDAR and of a camera; rename one in the adapter")
        if self.measured_speed is not None and len(self.measured_speed[0]) != len(self.measured_speed[1]):
            known, values = map(len, self.measured_speed)
            raise RecordError(f"log {self.id}: {known} stamps and {values} values of the measured speed; give one each in the adapter")
        for kind, sensors, by_sensor in (("lidar", self.lidars, self.sweep_stamps_ns), ("camera", self.cameras, self.image_stamps_ns)):
            if set(sensors) != set(by_sensor):
                raise RecordError(f"log {self.id}: stamps are given for {kind}s {sorted(by_sensor)}, sensors are {sorted(sensors)}")
            checked = {}
            for name, stamps in by_sensor.items():
                stamps = checked_array(f"log {self.id}, {kind} {name}", stamps, np.int64, (None,))
                for end in stamps[[0, -1]].tolist() if len(stamps) else ():
                    _stamp(f"log {self.id}, {kind} {name}", end)
                if (np.diff(stamps) <= 0).any():
                    at = int(stamps[1:][np.diff(stamps) <= 0][0])
                    raise RecordError(f"log {self.id}, {kind} {name}: stamps do not ascend at {at} ns; order and de-duplicate them in the adapter")
                checked[name] = stamps
            object.__setattr__(self, "sweep_stamps_ns" if kind == "lidar" else "image_stamps_ns", checked)

    @property
    def reference_lidar(self) -> str:
        """The LiDAR that frames are built on, see `reference_of`."""
        if not self.lidars:
            raise RecordError(f"log {self.id}: no LiDAR; frames need one")
        return reference_of(self.lidars, {name: len(self.sweep_stamps_ns[name]) for name in self.lidars})


Item = TypeVar("Item", Sweep, Image)


def announced(log: Log, kind: type[Item], sensor: str, index: int, item: object) -> Item:
    """What a reader of the log gave for the index-th item of a sensor. RecordError where it is not that item: readers raise what they cannot read."""
    what = f"log {log.id}, {sensor}: item {index}"
    if not isinstance(item, kind):
        raise RecordError(f"{what} was read as a {type(item).__name__} where a {kind.__name__} belongs; raise RecordError for what is unreadable")
    stamp = int((log.sweep_stamps_ns if kind is Sweep else log.image_stamps_ns)[sensor][index])
    if item.stamp_ns != stamp:
        raise RecordError(f"{what} has stamp {item.stamp_ns}, announced was {stamp}")
    return item


def labels_of(log: Log, opened: Callable[[], object]) -> Labels | None:
    """What opening the log's labels gave. RecordError where that is something else."""
    labels = opened()
    if not isinstance(labels, Labels | None):
        raise RecordError(f"log {log.id}: open_labels gave a {type(labels).__name__}; give Labels(boxes=...), or None where there are none")
    return labels


def boxes_astray(labels: Labels, stamps_ns: Array) -> int:
    """How many boxes lie at none of the instants (N,) i64: labels are looked up by the stamp of a sweep."""
    return int((~np.isin(np.array([box.stamp_ns for box in labels.boxes], np.int64), stamps_ns)).sum())


@dataclass(frozen=True, eq=False)
class Frame:
    """What the sensors saw around one nominal instant: the reference LiDAR's sweep index, other sensors' nearest items with their
    skew_ns (their stamp minus stamp_ns), and the pose at stamp_ns."""

    stamp_ns: int
    sweep_index: int
    world_from_ego: Array
    other_sweeps: Mapping[str, tuple[int, int]]
    images: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of one log cut by time: past (oldest first, the last one is t = 0) and future. Never crosses a gap of the log or the
    range it was drawn from. dt_s are the true times of future frames relative to t = 0."""

    log: Log = field(repr=False)
    lidar: str
    past: tuple[Frame, ...]
    future: tuple[Frame, ...]

    @property
    def id(self) -> str:
        return f"{self.log.id}@{self.past[-1].stamp_ns}"

    @property
    def stamp_ns(self) -> int:
        return self.past[-1].stamp_ns
