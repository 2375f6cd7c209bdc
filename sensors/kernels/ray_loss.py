"""Losses along rays and their gradients, each in one pass.

*Hazards.* A ray asks S positions in order of range; the hazard h_s = sigmoid(x_s) is the chance of stopping at s having come so far. It returned
at k: loss = sum_(s<k) softplus(x_s) + softplus(-x_k), or came past all of them (k = S): sum_s softplus(x_s). The gradient is sigmoid(x_s) before k,
sigmoid(x_k) - 1 at k, and zero beyond, where nothing is read. The live logits of many rays are laid end to end with the sign of bin k
turned, so that one long vector loop does for all: rows of their own are too short for it.

*CRPS* of a mixture of Laplace distributions with masses p_i (normalised), centres m_i and scales s_i, at the truth y:

    sum_i p_i (d_i + s_i exp(-d_i / s_i)) - 1/2 sum_ij p_i p_j (g + (3 s + g) exp(-g / s) / 2),     d_i = |m_i - y|, g = |m_i - m_j|,

with s = (s_i + s_j) / 2: exact where the two scales are equal, and smooth where they nearly are (`sensors.kernels.mixture.crps` is exact for all).
Positions with next to no mass are left out. Each asks all others in one vector loop, and the gradient comes from the same pass.
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
FAR = np.float32(40)  # scales apart from which exp(-u) is nothing: as a denormal number it would cost a hundred times as much
NEGLIGIBLE = 1e-6  # share of the largest mass below which a component is left out of a CRPS


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


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _away(a, padded, p, m, s):
    """Of component a and all others: sum_b p_b pair_ab, and its derivatives by m_a and, halved, by the mean of both scales."""
    pairs, farther, wider = float32(0), float32(0), float32(0)
    half, one, three_halves = float32(0.5), float32(1), float32(1.5)
    for b in range(padded):
        gap, mean = m[a] - m[b], half * (s[a] + s[b])
        apart = abs(gap) / mean
        u = min(apart, FAR)
        e = _exp_of_negative(-u)
        rise = one - e - half * u * e
        pairs += p[b] * mean * (apart + half * (float32(3) + u) * e)
        farther += p[b] * (rise if gap > 0 else -rise)
        wider += p[b] * half * e * (three_halves + u * (three_halves + half * u))
    return pairs, farther, wider


@njit(nogil=True, cache=True, error_model="numpy")
def _crps_loss(log_mass, centre, scale, truth, loss, of_mass, of_centre, of_scale):
    width = log_mass.shape[1]
    kept, by_mass = np.empty(width, np.int64), np.empty(width)
    p, m, s = np.empty(width + LANES, np.float32), np.empty(width + LANES, np.float32), np.empty(width + LANES, np.float32)
    for i in range(len(truth)):
        largest, total, count = log_mass[i].max(), 0.0, 0
        for k in range(width):
            share = np.exp(log_mass[i, k] - largest)
            if not share < NEGLIGIBLE:
                kept[count], p[count], m[count], s[count] = k, share, centre[i, k], scale[i, k]
                total += share
                count += 1
        padded = (count + LANES - 1) // LANES * LANES
        p[:count] /= float32(total)
        p[count:padded], m[count:padded], s[count:padded] = 0, 0, 1
        of_mass[i], of_centre[i], of_scale[i] = 0, 0, 0
        value = mean = 0.0
        for a in range(count):
            pairs, farther, wider = _away(a, padded, p, m, s)
            d = m[a] - truth[i]
            u = abs(d) / s[a]
            e = np.exp(-u)
            near = s[a] * (u + e)
            value += p[a] * (near - 0.5 * pairs)
            by_mass[a] = near - pairs
            mean += p[a] * by_mass[a]
            of_centre[i, kept[a]] = p[a] * (np.sign(d) * (1 - e) - farther)
            of_scale[i, kept[a]] = p[a] * (e * (1 + u) - wider)
        for a in range(count):
            of_mass[i, kept[a]] = p[a] * (by_mass[a] - mean)
        loss[i] = value


def crps_loss(log_mass: Array, centre: Array, scale: Array, truth: Array) -> tuple[Array, Array, Array, Array]:
    """CRPS (R,) f32 in the units of truth (R,) f32 of mixtures with log_mass (up to a constant), centre and scale (R,P) f32, and its gradients (R,P)
    f32 with respect to these three. NaN where the truth or a component that counts is. ValueError for other types or shapes."""
    columns = (log_mass, centre, scale)
    if any(c.dtype != np.float32 or c.ndim != 2 or c.shape != log_mass.shape or not c.shape[1] for c in columns):
        raise ValueError(f"crps_loss: log_mass, centre, scale are {', '.join(f'{c.dtype} {c.shape}' for c in columns)}; give float32 (R, P)")
    if truth.dtype != np.float32 or truth.shape != log_mass.shape[:1]:
        raise ValueError(f"crps_loss: truth is {truth.dtype} {truth.shape}; give float32 ({len(log_mass)},)")
    loss = np.empty(len(truth), np.float32)
    of_mass, of_centre, of_scale = (np.empty(log_mass.shape, np.float32) for _ in columns)
    _crps_loss(*map(np.ascontiguousarray, columns), np.ascontiguousarray(truth), loss, of_mass, of_centre, of_scale)
    return loss, of_mass, of_centre, of_scale
