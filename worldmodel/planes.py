"""What all past sweeps together say about the surface that a ray meets: a plane through the readings around it.

A plane is linear in inverse range over the tangent plane of the view, so the range of a ray is the constant of a weighted least-squares
fit of 1/r to the readings' offsets. Between a sweep's rings and along its noise such a fit knows more than any reading; that it is the
surface of a given reading, and not of what stands before or behind, is what reweighting sees to (Holland & Welsch, 1977).
"""

from __future__ import annotations

import torch
from torch import Tensor

CLOSE_RAD = (0.002, 0.003)  # azimuth and elevation offset at which a reading counts half
FAR_OFF = (0.04, 0.015)  # deviation, relative to the range, at which a reading counts a quarter: in the first pass and in the last
NOISE_M = 0.02
SLOPE_PRICE = 0.01


def plane_ranges(quadrants: Tensor, offsets: Tensor, cos_elevation: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The ranges (N,K) at which the planes around starting ranges (N,K) meet N rays, and their support (N,K) 0..1: the share of the readings' weight
    that lies on the plane. quadrants (N,T,4) m and offsets (N,T,4,2) rad: readings around the ray, NaN where absent; NaN where a start is.
    No gradient flows."""
    with torch.no_grad():
        r = quadrants.flatten(1)[:, None]
        there = ~r.isnan()
        u = (offsets[..., 0].flatten(1).nan_to_num(0.0) * cos_elevation[:, None] / CLOSE_RAD[0])[:, None]
        v = (offsets[..., 1].flatten(1).nan_to_num(0.0) / CLOSE_RAD[1])[:, None]
        close = there / (1 + u * u + v * v)
        # everything relative to the start, so that float32 keeps its digits
        y = start[:, :, None] / torch.where(there, r, 1.0) - 1
        level = torch.zeros_like(start)
        slope_u, slope_v = torch.zeros_like(start), torch.zeros_like(start)
        noise = NOISE_M / start
        for far in FAR_OFF:
            off = (y - level[..., None] - slope_u[..., None] * u - slope_v[..., None] * v) / (far + noise)[..., None]
            weight = close / (1 + off * off).square()
            wu, wv, wy = weight * u, weight * v, weight * y
            s, su, sv = weight.sum(2) + 1e-6, wu.sum(2), wv.sum(2)
            suu, suv, svv = (wu * u).sum(2) + SLOPE_PRICE, (wu * v).sum(2), (wv * v).sum(2) + SLOPE_PRICE
            sy, suy, svy = wy.sum(2), (wu * y).sum(2), (wv * y).sum(2)
            # normal equations of y = level + slope_u u + slope_v v, by Schur complement of the level
            a, b, c = suu - su * su / s, suv - su * sv / s, svv - sv * sv / s
            p, q = suy - su * sy / s, svy - sv * sy / s
            determinant = a * c - b * b
            slope_u, slope_v = (c * p - b * q) / determinant, (a * q - b * p) / determinant
            level = (sy - slope_u * su - slope_v * sv) / s
        support = weight.sum(2) / close.sum(2).clamp(min=1e-6)
        return start / (1 + level).clamp(0.2, 5.0), support
