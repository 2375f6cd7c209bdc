"""Pinhole cameras: where they sit, when they are triggered, and the pictures they take of a scene (sun, sky, textures by place)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensors.errors import UsageError
from sensors.geometry import from_rotation_translation, rotation_z
from sensors.records import Camera
from sensors.simulator.scene import CATEGORY_INDEX, Hits, Scene
from sensors.simulator.shapes import MATERIAL_INDEX, MATERIALS

Array = NDArray[Any]

# camera axes (x right, y down, z forward) in a frame that looks forward (x forward, y left, z up)
FORWARD_FROM_CAMERA = np.array(((0.0, 0.0, 1.0), (-1.0, 0.0, 0.0), (0.0, -1.0, 0.0)))

# name: width, height, focal length, yaw (deg, to the left), place in the ego frame. The first is KITTI's colour camera at a third of its
# size, the others nuScenes' at a quarter.
CAMERAS: dict[str, tuple[int, int, float, float, tuple[float, float, float]]] = {
    "front": (416, 128, 241.7, 0.0, (1.08, -0.32, 0.72)),
    "cam_front": (400, 225, 316.0, 0.0, (1.70, 0.0, 0.60)),
    "cam_front_left": (400, 225, 316.0, 55.0, (1.52, 0.49, 0.58)),
    "cam_front_right": (400, 225, 316.0, -55.0, (1.52, -0.49, 0.58)),
    "cam_back": (400, 225, 202.0, 180.0, (0.03, 0.0, 0.62)),
    "cam_back_left": (400, 225, 316.0, 110.0, (1.04, 0.48, 0.63)),
    "cam_back_right": (400, 225, 316.0, -110.0, (1.04, -0.48, 0.63)),
}
SETS = {"none": (), "front": ("front",), "six": tuple(name for name in CAMERAS if name != "front")}
_RGB = np.array([m.rgb for m in MATERIALS.values()], np.float32)


def chosen(cameras: str | Sequence[str]) -> tuple[str, ...]:
    """Names of single cameras from a set's name or from names."""
    names = SETS.get(cameras, (cameras,)) if isinstance(cameras, str) else tuple(cameras)
    names = tuple(n for name in names for n in (SETS[name] if name in SETS and name not in CAMERAS else (name,)))
    for name in names:
        if name not in CAMERAS:
            raise UsageError(f"simulator: camera {name!r} is not one of {', '.join((*SETS, *CAMERAS))}")
    return tuple(dict.fromkeys(names))


def build(name: str, rate_hz: float) -> Camera:
    width, height, focal, yaw_deg, place = CAMERAS[name]
    k = np.array(((focal, 0, (width - 1) / 2), (0, focal, (height - 1) / 2), (0, 0, 1.0)))
    rotation = rotation_z(np.radians(yaw_deg))[:3, :3] @ FORWARD_FROM_CAMERA
    return Camera(name, from_rotation_translation(rotation, np.array(place)), k, width, height, rate_hz=rate_hz)


def trigger_ns(camera: Camera, ego_from_lidar: Array, period_ns: int) -> int:
    """Nanoseconds from the middle of the scanner's turn to when it passes the camera's viewing direction (it turns clockwise); that
    is when the camera is exposed."""
    forward = ego_from_lidar[:3, :3].T @ camera.ego_from_camera[:3, 2]
    return round(-np.arctan2(forward[1], forward[0]) / (2 * np.pi) * period_ns * 0.999)


def encode(picture: Array) -> bytes:
    """JPEG bytes of (H,W,3) u8."""
    from PIL import Image as Pillow

    out = io.BytesIO()
    Pillow.fromarray(picture).save(out, "JPEG", quality=88)
    return out.getvalue()


def render(scene: Scene, camera: Camera, world_from_camera: Array, time_s: float) -> tuple[Array, Array, Array]:
    """Picture (H,W,3) u8, depth along z (H,W) f32 (infinite: sky) and category (H,W) u8 of one instant, through pixel centres."""
    u, v = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    k = camera.k_px
    rays = np.stack(((u - k[0, 2]) / k[0, 0], (v - k[1, 2]) / k[1, 1], np.ones(u.shape)), -1).reshape(-1, 3)
    length = np.linalg.norm(rays, axis=1)
    directions = ((rays / length[:, None]) @ world_from_camera[:3, :3].T).astype(np.float32)
    origins = np.broadcast_to(world_from_camera[:3, 3].astype(np.float32), directions.shape)
    hits = scene.cast(origins, directions, np.full(len(directions), time_s))
    picture = _shade(scene, hits, origins, directions, time_s)
    shape = (camera.height, camera.width)
    depth = (hits.range_m / length).astype(np.float32).reshape(shape)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8).reshape(*shape, 3), depth, hits.category.reshape(shape)


def _noise(x: Array, y: Array, size: float) -> Array:
    """A value of 0..1 per square of `size`, without pattern."""
    i, j = np.floor(x / size).astype(np.int64), np.floor(y / size).astype(np.int64)
    mixed = (i * 73856093) ^ (j * 19349663)
    mixed = (mixed ^ (mixed >> 13)) * 1274126177
    return ((mixed ^ (mixed >> 16)) & 0xFFFF).astype(np.float32) / 65535


def _shade(scene: Scene, hits: Hits, origins: Array, directions: Array, time_s: float) -> Array:
    """(N,3) f32 colours: the sun with its shadows, light from the sky, haze with distance."""
    bearing, high = scene.street.sun
    sun = np.array((np.cos(bearing) * np.cos(high), np.sin(bearing) * np.cos(high), np.sin(high)), np.float32)
    warm = np.array((1.0, 0.97 - 0.06 * scene.street.warm, 0.92 - 0.16 * scene.street.warm), np.float32)
    up = np.clip(directions[:, 2:], 0, 1)
    sky = (1 - up) ** 3 * np.array((0.86, 0.89, 0.93), np.float32) + (1 - (1 - up) ** 3) * np.array((0.38, 0.58, 0.86), np.float32)
    sky = sky + (np.clip(directions @ sun, 0, 1)[:, None] ** 90) * 0.8
    there = np.isfinite(hits.range_m)
    colour = _RGB[hits.material].copy()
    own = np.isin(hits.material, [MATERIAL_INDEX[m] for m in ("wall", "paint", "cloth")])
    colour[own] = scene.rgb[hits.item[own]]
    colour *= _texture(scene, hits)[:, None]
    glass = there & (hits.material == MATERIAL_INDEX["glass"])
    bounced = directions[glass, 2] - 2 * np.einsum("ij,ij->i", directions[glass], hits.normal[glass]) * hits.normal[glass, 2]
    colour[glass] += np.clip(bounced, 0, 1)[:, None] * 0.35
    facing = np.clip(hits.normal @ sun, 0, 1)
    leafy = hits.material == MATERIAL_INDEX["leaves"]
    facing = np.where(leafy, 0.35 + 0.5 * facing, facing)
    lit = np.flatnonzero(there & (facing > 0))
    shadow = np.zeros(len(directions), bool)
    if len(lit):
        place = origins[lit] + directions[lit] * hits.range_m[lit, None] + hits.normal[lit] * 0.02
        shadow[lit] = scene.shaded(place, sun, time_s)
    light = 0.42 + 0.18 * np.clip(hits.normal[:, 2], 0, 1)
    shine = (facing * ~shadow * 0.75)[:, None] * warm
    seen = colour * (light[:, None] * np.array((0.92, 0.97, 1.05), np.float32) + shine)
    haze = 1 - np.exp(-np.where(there, hits.range_m, 0) / 350)
    seen = seen * (1 - haze[:, None]) + np.array((0.80, 0.84, 0.89), np.float32) * haze[:, None]
    return np.asarray(np.where(there[:, None], seen, sky))


def _texture(scene: Scene, hits: Hits) -> Array:
    """Brightness (N,) around 1 by place: grain of asphalt and grass, bricks, slabs. It fades with distance, as a lens would have it."""
    x, y = hits.place[:, 0], hits.place[:, 1]
    out = np.ones(len(x), np.float32)
    near = np.exp(-np.where(np.isfinite(hits.range_m), hits.range_m, 0) / 25)
    asphalt, grass = hits.material == MATERIAL_INDEX["asphalt"], hits.material == MATERIAL_INDEX["grass"]
    out += asphalt * (0.25 * (_noise(x, y, 0.08) - 0.5) * near + 0.22 * (_noise(x, y, 3.1) - 0.5))
    out += grass * (0.5 * (_noise(x, y, 0.12) - 0.5) * near + 0.3 * (_noise(x, y, 1.7) - 0.5))
    pavement = hits.material == MATERIAL_INDEX["pavement"]
    slab = (np.mod(x, 0.8) < 0.04) | (np.mod(y, 0.8) < 0.04)
    out -= pavement * slab * 0.35 * near
    leaves = hits.material == MATERIAL_INDEX["leaves"]
    out += leaves * 0.7 * (_noise(x + hits.place[:, 2], y, 0.15) - 0.5)
    walls = np.flatnonzero((hits.material == MATERIAL_INDEX["wall"]) & (hits.category == CATEGORY_INDEX["building"]))
    if len(walls):
        along, height, number = scene.on_wall(hits.item[walls], hits.normal[walls], hits.place[walls])
        brick = number % 3 == 0
        course = np.floor(height / 0.09)
        mortar = (np.mod(height, 0.09) < 0.015) | (np.mod(along + 0.12 * np.mod(course, 2), 0.24) < 0.015)
        stones = 0.22 * (_noise(along * 4, course, 1.0) - 0.5) + 0.25 * mortar * near[walls]
        out[walls] += np.where(brick, stones, 0.08 * (_noise(along, height, 0.5) - 0.5))
        out[walls] -= 0.12 * (height < 0.5)
    return out
