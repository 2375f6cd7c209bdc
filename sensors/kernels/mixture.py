"""Laplace mixtures along rays: cumulative distribution, quantiles and CRPS, one ray at a time, skipping components without mass.

A row holds the masses p (summing to 1), centres m and scales s of its components.
F(x) = sum_i p_i L((x - m_i) / s_i),  L(u) = exp(u)/2 for u < 0, 1 - exp(-u)/2 otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]

NEGLIGIBLE = 1e-6


@njit(nogil=True, cache=True, error_model="numpy")
def _compact(p, m, s, i, cp, cm, cs):
    """Components of row i with mass, side by side; their number and their lowest and highest sensible position."""
    count = 0
    low, high = np.inf, -np.inf
    for j in range(p.shape[1]):
        if p[i, j] > NEGLIGIBLE:
            cp[count], cm[count], cs[count] = p[i, j], m[i, j], s[i, j]
            low = min(low, cm[count] - 16 * cs[count])
            high = max(high, cm[count] + 16 * cs[count])
            count += 1
    total = 0.0
    for j in range(count):
        total += cp[j]
    for j in range(count):
        cp[j] /= total
    return count, low, high


@njit(nogil=True, cache=True, error_model="numpy")
def _f(x, count, cp, cm, cs):
    total = 0.0
    for j in range(count):
        u = (x - cm[j]) / cs[j]
        total += cp[j] * (0.5 * np.exp(u) if u < 0 else 1 - 0.5 * np.exp(-u))
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _quantiles(p, m, s, levels, out):
    cp, cm, cs = np.empty(p.shape[1]), np.empty(p.shape[1]), np.empty(p.shape[1])
    for i in range(p.shape[0]):
        count, low, high = _compact(p, m, s, i, cp, cm, cs)
        for q in range(levels.shape[0]):
            if count == 0:
                out[i, q] = np.nan
                continue
            a, b = low, high
            while b - a > 1e-4:
                middle = 0.5 * (a + b)
                if _f(middle, count, cp, cm, cs) < levels[q]:
                    a = middle
                else:
                    b = middle
            out[i, q] = 0.5 * (a + b)


@njit(nogil=True, cache=True, error_model="numpy")
def _cdf(p, m, s, x, out):
    cp, cm, cs = np.empty(p.shape[1]), np.empty(p.shape[1]), np.empty(p.shape[1])
    for i in range(p.shape[0]):
        count, _, _ = _compact(p, m, s, i, cp, cm, cs)
        out[i] = _f(x[i], count, cp, cm, cs) if count else np.nan


@njit(nogil=True, cache=True, error_model="numpy")
def _crps(p, m, s, x, out):
    cp, cm, cs = np.empty(p.shape[1]), np.empty(p.shape[1]), np.empty(p.shape[1])
    for i in range(p.shape[0]):
        count, _, _ = _compact(p, m, s, i, cp, cm, cs)
        if count == 0:
            out[i] = np.nan
            continue
        to_truth, spread = 0.0, 0.0
        for j in range(count):
            d = abs(cm[j] - x[i])
            to_truth += cp[j] * (d + cs[j] * np.exp(-d / cs[j]))
            spread += cp[j] * cp[j] * 1.5 * cs[j]
            for k in range(j):
                d = abs(cm[j] - cm[k])
                a, b = cs[j], cs[k]
                if abs(a - b) < 1e-3 * (a + b):
                    c = 0.5 * (a + b)
                    e = d + 0.5 * (3 * c + d) * np.exp(-d / c)
                else:
                    e = d + (a * a * a * np.exp(-d / a) - b * b * b * np.exp(-d / b)) / (a * a - b * b)
                spread += 2 * cp[j] * cp[k] * e
        out[i] = to_truth - 0.5 * spread


def _rows(*arrays: Array) -> tuple[Array, ...]:
    return tuple(np.ascontiguousarray(a, np.float64) for a in arrays)


def quantiles(p: Array, m: Array, s: Array, levels: Array) -> Array:
    """(R,Q) f64: where F reaches each of the levels (Q,), to 0.1 mm, by bisection; p, m, s (R,P). NaN for a row without mass."""
    out = np.empty((len(p), len(levels)))
    _quantiles(*_rows(p, m, s, np.asarray(levels)), out)
    return out


def cdf(p: Array, m: Array, s: Array, x: Array) -> Array:
    """(R,) f64: F(x) of each row at its x (R,)."""
    out = np.empty(len(p))
    _cdf(*_rows(p, m, s, x), out)
    return out


def crps(p: Array, m: Array, s: Array, x: Array) -> Array:
    """(R,) f64: integral of (F(t) - [t >= x])^2 dt, in closed form: E|X - x| - E|X - X'| / 2 with, for two Laplace components at distance d,
    E|X - X'| = d + (a^3 exp(-d/a) - b^3 exp(-d/b)) / (a^2 - b^2), and d + (3 a + d) exp(-d/a) / 2 where a = b."""
    out = np.empty(len(p))
    _crps(*_rows(p, m, s, x), out)
    return out
