"""Laplace mixtures along rays, given that the return lies within [low, high]: quantiles, distribution, log density and CRPS.

A row holds the masses p >= 0 (their sum does not matter), centres m and scales s > 0 of its components:

    F(x) = sum_i p_i L((x - m_i) / s_i),     L(u) = exp(u)/2 for u < 0, 1 - exp(-u)/2 otherwise.

Conditioned on low <= x <= high, with a = F(low), b = F(high) and Z = b - a:

    G(x) = (F(x) - a) / Z,      density f(x) / Z,      quantile G^-1(q): the x where F(x) = a + q Z.

CRPS(y) = integral over [low, high] of (G - 1[x >= y])^2. With the antiderivatives H of F and J of F^2 (both 0 at minus infinity)

    Z^2 CRPS = J(high) - J(low) - 2 a (H(y) - H(low)) - 2 b (H(high) - H(y)) + a^2 (y - low) + b^2 (high - y).

H(x) = sum_i p_i h_i,  h_i = s_i e_i / 2 for x < m_i, (x - m_i) + s_i e_i / 2 otherwise,  e_i = exp(-|x - m_i| / s_i).
J(x) = sum_ij p_i p_j K_ij with, for m_i <= m_j, d = m_j - m_i and c = s_i s_j / (s_i + s_j),

    x <= m_i:        K = c e_i e_j / 4
    x >= m_j:        K = x - (m_i + m_j + E) / 2 + (s_i e_i + s_j e_j) / 2 - c e_i e_j / 4
    between:         K = c q / 4 + s_j (e_j - q) / 2 - T / 4,   q = exp(-d / s_j),   T = (e_i e_j - q) / (1/s_j - 1/s_i),
                     T = (x - m_i) q where s_i = s_j

    E = E|X_i - X_j| = d + (s_i^3 exp(-d/s_i) - s_j^3 exp(-d/s_j)) / (s_i^2 - s_j^2),  d + (3 s + d) exp(-d/s) / 2 where s_i = s_j = s.

The closed form cancels when little of the mass lies inside: below `CLOSED_FORM` of it CRPS is integrated over the quantiles Q instead,
2 * integral over t of (1[y < Q(t)] - t)(Q(t) - y). A row with less than `LEAST_MASS` inside says nothing: NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]

NEGLIGIBLE = 1e-7  # share of the mass inside below which a component is left out of quantiles and CRPS
LEAST_MASS = 1e-10
CLOSED_FORM = 1e-2
LEVELS = 400  # of the integration over quantiles
LANES = 8
CLOSE_M = 1e-5


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _decay(u):
    """exp(-u) for u >= 0 to 1e-8 of its value, 0 from 40 on: the Taylor polynomial of degree 11 at u/64, squared six times. Unlike the
    library's exp it has no branch, so that a loop over components becomes vector code."""
    t = min(u, 40.0) * (-1 / 64)
    e = 1 + t * (1 + t * (1 / 2 + t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t * (1 / 720 + t * (1 / 5040 + t * (1 / 40320 + t * (
        1 / 362880 + t * (1 / 3628800 + t * (1 / 39916800)))))))))))  # fmt: skip
    e *= e
    e *= e
    e *= e
    e *= e
    e *= e
    e *= e
    return e if u < 40.0 else 0.0


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _f(x, count, p, m, r, term, slope):
    """F(x) and its density; p, m, r = 1/s padded with components without mass to a multiple of LANES."""
    for j in range(count):
        u = (x - m[j]) * r[j]
        e = 0.5 * p[j] * _decay(abs(u))
        term[j] = e if u < 0 else p[j] - e
        slope[j] = e * r[j]
    # eight running sums: one would wait for itself
    t0, t1, t2, t3, t4, t5, t6, t7 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for j in range(0, count, LANES):
        t0 += term[j]
        t1 += term[j + 1]
        t2 += term[j + 2]
        t3 += term[j + 3]
        t4 += slope[j]
        t5 += slope[j + 1]
        t6 += slope[j + 2]
        t7 += slope[j + 3]
        t0 += term[j + 4]
        t1 += term[j + 5]
        t2 += term[j + 6]
        t3 += term[j + 7]
        t4 += slope[j + 4]
        t5 += slope[j + 5]
        t6 += slope[j + 6]
        t7 += slope[j + 7]
    return (t0 + t1) + (t2 + t3), (t4 + t5) + (t6 + t7)


@njit(nogil=True, cache=True, error_model="numpy")
def _compact(p, m, s, i, low, high, cp, cm, cr, weight):
    """The components of row i that matter between low and high, by ascending centre, with r = 1/s, padded to a multiple of LANES; weight:
    their mass inside. Number (padded), number, and the mass inside of all; 0, 0, 0 for a row that says nothing or is not finite."""
    total = 0.0
    for j in range(p.shape[1]):
        weight[j] = 0.0
        if p[i, j] == 0:
            continue
        if not (p[i, j] > 0 and p[i, j] < np.inf and abs(m[i, j]) < np.inf and s[i, j] > 0 and s[i, j] < np.inf):
            return 0, 0, 0.0
        centre, scale = m[i, j], s[i, j]
        u, v = (low - centre) / scale, (high - centre) / scale
        # by the side of the centre on which the interval lies, so that nothing cancels
        if u >= 0:
            inside = 0.5 * (_decay(u) - _decay(v))
        elif v <= 0:
            inside = 0.5 * (_decay(-v) - _decay(-u))
        else:
            inside = 1 - 0.5 * _decay(-u) - 0.5 * _decay(v)
        weight[j] = p[i, j] * inside
        total += weight[j]
    mass = 0.0
    for j in range(p.shape[1]):
        mass += p[i, j]
    if not total > LEAST_MASS * mass:
        return 0, 0, 0.0
    count = 0
    for j in range(p.shape[1]):
        if weight[j] > NEGLIGIBLE * total:
            at = count
            w, centre, share, rate = weight[j], m[i, j], p[i, j] / mass, 1 / s[i, j]
            while at > 0 and cm[at - 1] > centre:
                cp[at], cm[at], cr[at], weight[at] = cp[at - 1], cm[at - 1], cr[at - 1], weight[at - 1]
                at -= 1
            cp[at], cm[at], cr[at], weight[at] = share, centre, rate, w
            count += 1
    padded = (count + LANES - 1) // LANES * LANES
    for j in range(count, padded):
        cp[j], cm[j], cr[j] = 0.0, cm[count - 1], 1.0
    return padded, count, total / mass


@njit(nogil=True, cache=True, error_model="numpy")
def _bounds(low, high, x, has_x, p, m, s, i):
    """low and high, or, where infinite, so far out that nothing is lost."""
    if low == -np.inf or high == np.inf:
        least, most = (x, x) if has_x else (np.inf, -np.inf)
        for j in range(p.shape[1]):
            if p[i, j] > 0:
                least, most = min(least, m[i, j] - 40 * s[i, j]), max(most, m[i, j] + 40 * s[i, j])
        low, high = max(low, least), min(high, most)
    return low, high


@njit(nogil=True, cache=True, error_model="numpy")
def _solve(target, a, b, x, padded, cp, cm, cr, term, slope):
    """x between a and b where F reaches target: Newton's steps, halving instead where one would leave the bracket or is slow."""
    before = b - a
    for _ in range(200):
        value, density = _f(x, padded, cp, cm, cr, term, slope)
        if value < target:
            a = x
        else:
            b = x
        step = (target - value) / density if density > 0 else np.inf
        following = x + step
        if not (following > a and following < b) or abs(step) > 0.5 * before:
            following = 0.5 * (a + b)
        before = abs(following - x)
        x = following
        if before < CLOSE_M or b - a < CLOSE_M:
            break
    return x


@njit(nogil=True, cache=True, error_model="numpy")
def _row_quantiles(low, high, levels, padded, count, cp, cm, cr, weight, term, slope, out):
    start, _ = _f(low, padded, cp, cm, cr, term, slope)
    end, _ = _f(high, padded, cp, cm, cr, term, slope)
    total = 0.0
    for j in range(count):
        total += weight[j]
    left, at, passed = low, 0, 0.0
    for q in range(levels.shape[0]):
        if not (levels[q] > 0):
            out[q] = low
            continue
        if levels[q] >= 1:
            out[q] = high
            continue
        while at < count - 1 and passed + weight[at] < levels[q] * total:
            passed += weight[at]
            at += 1
        guess = min(max(cm[at], left), high)
        out[q] = _solve(start + levels[q] * (end - start), left, high, guess, padded, cp, cm, cr, term, slope)
        left = max(left, out[q] - 2 * CLOSE_M)


@njit(nogil=True, cache=True, error_model="numpy")
def _quantiles(p, m, s, levels, low, high, out):
    width = p.shape[1] + LANES
    cp, cm, cr, weight, term, slope = np.empty(width), np.empty(width), np.empty(width), np.empty(width), np.empty(width), np.empty(width)
    for i in range(p.shape[0]):
        a, b = _bounds(low, high, 0.0, False, p, m, s, i)
        padded, count, _ = _compact(p, m, s, i, a, b, cp, cm, cr, weight)
        if count == 0:
            out[i] = np.nan
        else:
            _row_quantiles(a, b, levels, padded, count, cp, cm, cr, weight, term, slope, out[i])


@njit(nogil=True, cache=True, error_model="numpy")
def _cdf(p, m, s, x, low, high, out):
    width = p.shape[1] + LANES
    cp, cm, cr, weight, term, slope = np.empty(width), np.empty(width), np.empty(width), np.empty(width), np.empty(width), np.empty(width)
    for i in range(p.shape[0]):
        a, b = _bounds(low, high, x[i], True, p, m, s, i)
        padded, count, _ = _compact(p, m, s, i, a, b, cp, cm, cr, weight)
        if count == 0 or np.isnan(x[i]):
            out[i] = np.nan
            continue
        start, _ = _f(a, padded, cp, cm, cr, term, slope)
        end, _ = _f(b, padded, cp, cm, cr, term, slope)
        here, _ = _f(min(max(x[i], a), b), padded, cp, cm, cr, term, slope)
        out[i] = min(max((here - start) / (end - start), 0.0), 1.0)


@njit(nogil=True, cache=True, error_model="numpy")
def _log_density(p, m, s, x, low, high, out):
    width = p.shape[1] + LANES
    cp, cm, cr, weight = np.empty(width), np.empty(width), np.empty(width), np.empty(width)
    for i in range(p.shape[0]):
        a, b = _bounds(low, high, x[i], True, p, m, s, i)
        _, count, inside = _compact(p, m, s, i, a, b, cp, cm, cr, weight)
        if count == 0 or np.isnan(x[i]):
            out[i] = np.nan
            continue
        if x[i] < a or x[i] > b:
            out[i] = -np.inf
            continue
        # all components: far from every centre the density is that of a wide one with next to no mass
        best, mass = -np.inf, 0.0
        for j in range(p.shape[1]):
            mass += p[i, j]
            cp[j] = np.log(p[i, j] / (2 * s[i, j])) - abs(x[i] - m[i, j]) / s[i, j] if p[i, j] > 0 else -np.inf
            best = max(best, cp[j])
        total = 0.0
        for j in range(p.shape[1]):
            total += np.exp(cp[j] - best)
        out[i] = best + np.log(total) - np.log(inside * mass)


@njit(nogil=True, cache=True, error_model="numpy")
def _one_integral(x, count, p, m, r):
    """H(x)."""
    total = 0.0
    for j in range(count):
        d = x - m[j]
        total += p[j] * (max(d, 0.0) + 0.5 / r[j] * _decay(abs(d) * r[j]))
    return total


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _pairs_apart(count, p, m, r, term):
    """sum_ij p_i p_j E|X_i - X_j| / 2."""
    total = 0.0
    for i in range(count):
        a, half = 1 / r[i], 0.0
        for j in range(i):
            b = 1 / r[j]
            d = m[i] - m[j]
            ea, eb = _decay(d * r[i]), _decay(d * r[j])
            c, gap = 0.5 * (a + b), a - b
            alike = abs(gap) < 1e-3 * c
            equal = 0.5 * (3 * c + d) * 0.5 * (ea + eb)
            unequal = (a * a * a * ea - b * b * b * eb) / (1.0 if alike else gap * 2 * c)
            term[j] = p[j] * (d + (equal if alike else unequal))
        for j in range(i):
            half += term[j]
        total += p[i] * (half + p[i] * 0.75 * a)
    return total


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _square_beyond(x, count, p, m, r, term):
    """sum_ij p_i p_j c e_i e_j / 4 at x, all centres on one side of it."""
    total = 0.0
    for i in range(count):
        term[i] = p[i] * _decay(abs(x - m[i]) * r[i])
    for i in range(count):
        if term[i] < 1e-9:
            continue
        part = 0.5 * term[i] / r[i] * 0.5
        for j in range(i):
            part += term[j] / (r[i] + r[j])
        total += 0.5 * term[i] * part
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _square(x, count, p, m, r):
    """J(x) by pairs, wherever the centres lie."""
    total = 0.0
    for j in range(count):
        sj = 1 / r[j]
        ej = np.exp(-abs(x - m[j]) * r[j])
        for i in range(j + 1):
            si = 1 / r[i]
            ei = np.exp(-abs(x - m[i]) * r[i])
            d = m[j] - m[i]
            c = si * sj / (si + sj)
            alike = abs(si - sj) < 1e-4 * (si + sj)
            s = 0.5 * (si + sj)
            if x <= m[i]:
                k = 0.25 * c * ei * ej
            elif x >= m[j]:
                if alike:
                    apart = d + 0.5 * (3 * s + d) * np.exp(-d / s)
                else:
                    apart = d + (si * si * si * np.exp(-d * r[i]) - sj * sj * sj * np.exp(-d * r[j])) / (si * si - sj * sj)
                k = x - 0.5 * (m[i] + m[j] + apart) + 0.5 * (si * ei + sj * ej) - 0.25 * c * ei * ej
            else:
                q = np.exp(-d * r[j])
                t = (x - m[i]) * np.exp(-d / s) if alike else (ei * ej - q) / (r[j] - r[i])
                k = 0.25 * c * q + 0.5 * sj * (ej - q) - 0.25 * t
            total += (1.0 if i == j else 2.0) * p[i] * p[j] * k
    return total


@njit(nogil=True, cache=True, error_model="numpy")
def _crps(p, m, s, x, low, high, out):
    width = p.shape[1] + LANES
    cp, cm, cr, weight, term, slope = np.empty(width), np.empty(width), np.empty(width), np.empty(width), np.empty(width), np.empty(width)
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    inner = np.empty(LEVELS)
    for i in range(p.shape[0]):
        a, b = _bounds(low, high, x[i], True, p, m, s, i)
        padded, count, inside = _compact(p, m, s, i, a, b, cp, cm, cr, weight)
        if count == 0 or np.isnan(x[i]):
            out[i] = np.nan
            continue
        y = min(max(x[i], a), b)
        # outside the bounds G is 0 or 1, so that a truth there adds its distance to them
        beyond = abs(x[i] - y)
        if inside < CLOSED_FORM:
            _row_quantiles(a, b, levels, padded, count, cp, cm, cr, weight, term, slope, inner)
            total = 0.0
            for q in range(LEVELS):
                total += ((1.0 if y < inner[q] else 0.0) - levels[q]) * (inner[q] - y)
            out[i] = 2 * total / LEVELS + beyond
            continue
        at_low, _ = _f(a, padded, cp, cm, cr, term, slope)
        at_high, _ = _f(b, padded, cp, cm, cr, term, slope)
        h_low, h_high, h_y = _one_integral(a, count, cp, cm, cr), _one_integral(b, count, cp, cm, cr), _one_integral(y, count, cp, cm, cr)
        if cm[0] >= a and cm[count - 1] <= b:
            mass, mean, tail = 0.0, 0.0, 0.0
            for j in range(count):
                mass += cp[j]
                mean += cp[j] * cm[j]
                tail += cp[j] / cr[j] * _decay((b - cm[j]) * cr[j])
            upper = mass * (mass * b - mean + tail) - _pairs_apart(count, cp, cm, cr, term) - _square_beyond(b, count, cp, cm, cr, term)
            squares = upper - _square_beyond(a, count, cp, cm, cr, term)
        else:
            squares = _square(b, count, cp, cm, cr) - _square(a, count, cp, cm, cr)
        z = at_high - at_low
        total = squares - 2 * at_low * (h_y - h_low) - 2 * at_high * (h_high - h_y) + at_low * at_low * (y - a) + at_high * at_high * (b - y)
        out[i] = max(total / (z * z), 0.0) + beyond


def _rows(p: Array, m: Array, s: Array, low: float, high: float) -> tuple[Array, Array, Array]:
    rows = tuple(np.ascontiguousarray(a, np.float64) for a in (p, m, s))
    if rows[0].ndim != 2 or any(a.shape != rows[0].shape for a in rows) or not low < high:
        raise ValueError(f"mixture: p {rows[0].shape}, m {rows[1].shape}, s {rows[2].shape} are (R, P) alike, and low {low} is below high {high}")
    return rows[0], rows[1], rows[2]


def _at(x: Array, count: int) -> Array:
    x = np.ascontiguousarray(x, np.float64)
    if x.shape != (count,):
        raise ValueError(f"mixture: x of shape {x.shape}, expected ({count},)")
    return x


def quantiles(p: Array, m: Array, s: Array, levels: Array, low: float = -np.inf, high: float = np.inf) -> Array:
    """(R,Q) f64, to 0.1 mm: the quantiles at ascending levels (Q,) of each row's distribution, given that x lies within low..high. p, m, s
    (R,P). NaN for a row without mass there."""
    wanted = np.asarray(levels, np.float64)
    if wanted.ndim != 1 or (np.diff(wanted) < 0).any():
        raise ValueError(f"mixture: levels {levels} do not ascend")
    rows = _rows(p, m, s, low, high)
    out = np.empty((len(rows[0]), len(wanted)))
    _quantiles(*rows, wanted, float(low), float(high), out)
    return out


def cdf(p: Array, m: Array, s: Array, x: Array, low: float = -np.inf, high: float = np.inf) -> Array:
    """(R,) f64: G(x) of each row at its x (R,), given low..high. NaN for a row without mass there."""
    rows = _rows(p, m, s, low, high)
    out = np.empty(len(rows[0]))
    _cdf(*rows, _at(x, len(out)), float(low), float(high), out)
    return out


def log_density(p: Array, m: Array, s: Array, x: Array, low: float = -np.inf, high: float = np.inf) -> Array:
    """(R,) f64, nats: log of the density of each row at its x (R,), given low..high; -inf outside. NaN for a row without mass there."""
    rows = _rows(p, m, s, low, high)
    out = np.empty(len(rows[0]))
    _log_density(*rows, _at(x, len(out)), float(low), float(high), out)
    return out


def crps(p: Array, m: Array, s: Array, x: Array, low: float = -np.inf, high: float = np.inf) -> Array:
    """(R,) f64, metres: the integral of (G(t) - [t >= x])^2 dt of each row at its x (R,), given low..high; for a point forecast the
    distance to it. NaN for a row without mass there."""
    rows = _rows(p, m, s, low, high)
    out = np.empty(len(rows[0]))
    _crps(*rows, _at(x, len(out)), float(low), float(high), out)
    return out
