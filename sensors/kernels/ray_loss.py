"""Negative log likelihood of hazards along rays, and its gradient, in one pass.

A ray asks S positions in order of range; the hazard h_s = sigmoid(x_s) is the chance of stopping at s having come so far. It returned at k:
loss = sum_(s<k) softplus(x_s) + softplus(-x_k), or came past all of them (k = S): sum_s softplus(x_s). The gradient is sigmoid(x_s) before k,
sigmoid(x_k) - 1 at k, and zero beyond, where nothing is read. The live logits of many rays are laid end to end with the sign of bin k
turned, so that one long vector loop does for all: rows of their own are too short for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import float32, int32, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

Array = NDArray[Any]

ROWS = 32
LANES = 16
LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts, the first exact in a few bits
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
LN2 = np.float32(0.6931471805599453)


@intrinsic
def _float_of_bits(typingctx, bits):
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(args[0], ir.FloatType())


@njit(nogil=True, cache=True, error_model="numpy")
def _exp_of_negative(y):
    """exp(y) for -87 <= y <= 0, to 1e-7 of itself."""
    k = int32(y * LOG2_E - float32(0.5))
    n = float32(k)
    f = (y - n * LN2_HIGH) - n * LN2_LOW
    p = float32(1.3981999e-3)
    p = p * f + float32(8.3334519e-3)
    p = p * f + float32(4.1665796e-2)
    p = p * f + float32(1.6666666e-1)
    p = p * f + float32(0.5)
    p = p * f * f + f + float32(1)
    return p * _float_of_bits(int32((k + int32(127)) << int32(23)))


@njit(nogil=True, cache=True, error_model="numpy")
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1: the atanh series, halved above 1 + e = sqrt 2, where it would need more terms."""
    large = e > float32(0.41421356)
    above = (e - float32(1)) * float32(0.5) if large else e
    s = above / (float32(2) + above)
    q = s * s
    series = s * float32(2) * (float32(1) + q * (float32(1 / 3) + q * (float32(1 / 5) + q * (float32(1 / 7) + q * float32(1 / 9)))))
    return series + LN2 if large else series


@njit(nogil=True, cache=True, error_model="numpy")
def _hazard_loss(logits, bins, loss, gradient):
    n_rays, n_bins = logits.shape
    room = ROWS * (n_bins + LANES) + 64
    x, value, slope = np.empty(room, np.float32), np.empty(room, np.float32), np.empty(room, np.float32)
    zero, one = float32(0), float32(1)
    for start in range(0, n_rays, ROWS):
        rows = min(ROWS, n_rays - start)
        at = 0
        for r in range(rows):
            k = bins[start + r]
            live = min(k + 1, n_bins)
            for s in range(live):
                x[at + s] = logits[start + r, s]
            if 0 <= k < n_bins:
                x[at + k] = -x[at + k]
            at += live
        # the loop wants whole vectors, and the copies back read up to one beyond the last row
        padded = (at + 63) // 64 * 64
        x[at:padded] = float32(-100)
        for i in range(padded):
            v = x[i]
            is_number = v == v
            away = max(-abs(v if is_number else zero), float32(-87))
            e = _exp_of_negative(away)
            big = v > zero
            soft = (v if big else zero) + _log1p(e)
            rising = (one if big else e) / (one + e)
            value[i] = soft if is_number else v
            slope[i] = rising if is_number else v
        at = 0
        for r in range(rows):
            k = bins[start + r]
            live = min(k + 1, n_bins)
            total = 0.0
            for s in range(live):
                total += value[at + s]
            loss[start + r] = total
            for s in range(live):
                gradient[start + r, s] = slope[at + s]
            gradient[start + r, max(live, 0) :] = zero
            if 0 <= k < n_bins:
                gradient[start + r, k] = -gradient[start + r, k]
            at += max(live, 0)


def hazard_loss(logits: Array, bins: Array) -> tuple[Array, Array]:
    """Loss (R,) f32 of each ray and the gradient (R, S) f32 of that loss with respect to its logits (R, S) f32. bins (R,) int: the position
    it returned at, 0 .. S - 1; S when it came past all of them; -1 for a ray nothing is known of (loss and gradient 0). NaN logits that
    count give NaN. ValueError for other types, shapes, or bins."""
    if not isinstance(logits, np.ndarray) or logits.dtype != np.float32 or logits.ndim != 2 or logits.shape[1] < 1:
        found = f"{logits.dtype} {logits.shape}" if isinstance(logits, np.ndarray) else type(logits).__name__
        raise ValueError(f"hazard_loss: logits are {found}; give float32 (R, S)")
    if not isinstance(bins, np.ndarray) or bins.dtype.kind not in "iu" or bins.shape != logits.shape[:1]:
        found = f"{bins.dtype} {bins.shape}" if isinstance(bins, np.ndarray) else type(bins).__name__
        raise ValueError(f"hazard_loss: bins are {found}; give integers ({len(logits)},)")
    if len(bins) and not (int(bins.min()) >= -1 and int(bins.max()) <= logits.shape[1]):
        raise ValueError(f"hazard_loss: bins of {bins.min()} .. {bins.max()}; give -1 .. {logits.shape[1]}")
    loss, gradient = np.empty(len(logits), np.float32), np.empty(logits.shape, np.float32)
    _hazard_loss(np.ascontiguousarray(logits), np.ascontiguousarray(bins, np.int64), loss, gradient)
    return loss, gradient
