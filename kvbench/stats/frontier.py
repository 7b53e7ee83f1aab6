"""Score against bytes: who dominates whom, and areas that put a whole set of stacks into one number.

rho: bytes as a share of the full cache. u = log2(1 / rho), so that u = 5 is 32-fold compression.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvbench.stats.resampling import Interval, Sampled, percentiles

U_MAX = 5.0  # fixed in advance: areas reach from no compression to 32-fold


def pareto_front(rho: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Which points no other point dominates: at most the bytes and at least the score, one of them strictly."""
    return frontier_probability(rho, np.asarray(score, dtype=float)[None]) == 1.0


def frontier_probability(rho: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Share of resamples [B, P] in which each policy is on the Pareto front; NaN where it has no score."""
    rho = np.asarray(rho, dtype=float)
    share = np.full(len(rho), np.nan)
    best = np.full(len(draws), -np.inf)  # of all policies with fewer bytes
    for bytes_ in np.unique(rho[~np.isnan(rho)]):
        same = np.flatnonzero(rho == bytes_)
        scores = np.where(np.isnan(draws[:, same]), -np.inf, draws[:, same])
        top = scores.max(axis=1)
        share[same] = ((scores > best[:, None]) & (scores == top[:, None])).mean(axis=0)
        share[same[np.isnan(draws[:, same]).all(axis=0)]] = np.nan
        best = np.maximum(best, top)
    return share


def dominators(rho: np.ndarray, scores: np.ndarray, low: Callable[[int, int], float]) -> list[int | None]:
    """Per policy, the one of the front that dominates it with confidence, or None.

    It holds at most the bytes, and the lower 95 % end of its lead in score, low(a, b), is above 0. Of several, the
    longest lead.
    """
    rho, scores = np.asarray(rho, dtype=float), np.asarray(scores, dtype=float)
    known = ~np.isnan(scores) & ~np.isnan(rho)
    front = np.flatnonzero(known)[pareto_front(rho[known], scores[known])]
    found: list[int | None] = []
    for policy in range(len(rho)):
        rivals = [int(q) for q in front if rho[q] <= rho[policy] and scores[q] > scores[policy]]
        leads = {q: low(q, policy) for q in rivals}
        sure = [q for q, value in leads.items() if value > 0]
        found.append(max(sure, key=lambda q: leads[q]) if sure else None)
    return found


def hypervolume(rho: Sequence[float], retention: Sampled, policies: Sequence[int], u_max: float = U_MAX) -> Interval:
    """The area under the staircase of measured points in (u, retention), as a share of u_max.

    At every u counts the best retention among points with at least that compression: nothing is interpolated. Points
    beyond u_max count up to there, negative retention as 0.
    """
    chosen = [p for p in policies if not math.isnan(rho[p]) and not math.isnan(retention.point[p])]
    u = np.clip(-np.log2(np.array([rho[p] for p in chosen])), 0.0, u_max)
    order = np.argsort(-u, kind="stable")
    steps = u[order] - np.append(u[order][1:], 0.0)

    def area(scores: np.ndarray) -> np.ndarray:
        best = np.maximum.accumulate(np.maximum(np.nan_to_num(scores[:, chosen]), 0.0)[:, order], axis=1)
        return np.asarray(best @ steps / u_max)

    return percentiles(float(area(retention.point[None])[0]), area(retention.draws))


@dataclass(frozen=True)
class CurveArea:
    """Mean retention along a family's curve, from no compression to `reach`."""

    value: Interval
    reach: float  # in u: u_max, or where the family ends before it

    def complete(self, u_max: float = U_MAX) -> bool:
        return self.reach >= u_max


def curve_area(
    rho: Sequence[float], retention: Sampled, policies: Sequence[int], u_max: float = U_MAX
) -> CurveArea | None:
    """Trapezoids through a one-parameter family's own points, from (0, 1); None if none of them compresses.

    A family that ends before u_max is averaged up to its own end, and says so by `reach`.
    """
    u = {p: -math.log2(rho[p]) for p in policies if rho[p] > 0 and not math.isnan(retention.point[p])}
    order = sorted((p for p in u if u[p] > 0), key=lambda p: u[p])
    if not order:
        return None
    x = np.array([0.0, *(u[p] for p in order)])
    reach = min(u_max, float(x[-1]))

    def area(scores: np.ndarray) -> np.ndarray:
        y = np.concatenate([np.ones((len(scores), 1)), scores[:, order]], axis=1)
        inside = x <= reach
        end, last = int(inside.sum()), int(inside.sum()) - 1
        total = ((y[:, 1:end] + y[:, : end - 1]) / 2) @ np.diff(x[:end])
        if x[last] < reach:  # the last trapezoid is cut at u_max
            share = (reach - x[last]) / (x[end] - x[last])
            total = total + (y[:, last] + share * (y[:, end] - y[:, last]) / 2) * (reach - x[last])
        return np.asarray(total / reach)

    return CurveArea(percentiles(float(area(retention.point[None])[0]), area(retention.draws)), reach)


@dataclass(frozen=True)
class Compression:
    """How far a family compresses at a loss of at most `tolerance`; 1 is no compression."""

    tolerance: float
    shown: float  # largest C whose retention, and also its lower 95 % end, stays within the tolerance
    interval: Interval  # of the largest C whose retention alone does, over the resamples


def compression_at(
    rho: Sequence[float],
    retention: Sampled,
    policies: Sequence[int],
    tolerance: float,
    lows: Mapping[int, float] | None = None,
) -> Compression:
    """Compression at tolerance, over measured points only.

    lows: lower 95 % ends of the policies' retention; without them those of `retention`, which know nothing of changes
        that did not occur
    """
    chosen = [p for p in policies if rho[p] > 0 and not math.isnan(retention.point[p])]
    factor = np.array([max(1.0, 1 / rho[p]) for p in chosen])
    least = 1 - tolerance - 1e-12

    def largest(scores: np.ndarray) -> np.ndarray:
        return np.asarray(np.where(scores[:, chosen] >= least, factor, 1.0).max(axis=1, initial=1.0))

    ends = [retention.interval(p).low if lows is None else lows[p] for p in chosen]
    within = [c for c, p, low in zip(factor, chosen, ends, strict=True) if min(low, retention.point[p]) >= least]
    interval = percentiles(float(largest(retention.point[None])[0]), largest(retention.draws))
    return Compression(tolerance, float(max(within, default=1.0)), interval)
