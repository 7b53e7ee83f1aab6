"""Eviction x quantization: do the damages add up, what does a stack gain at equal bytes, and in which proportion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvbench.stats.differences import Difference, difference_of
from kvbench.stats.exact import FEW_DISCORDANT, few_changes, rarely_changes, recovered, sign_flip_p, signs
from kvbench.stats.pairing import Paired, Run, pair
from kvbench.stats.resampling import RESAMPLES, Bootstrap, Interval, Sampled, bootstrap, percentiles


@dataclass(frozen=True)
class Interaction:
    """Damage of a stack beyond the sum of its parts: S(r,16) + S(1,b) - S(r,b) - S(1,16). Above 0 it hurts more."""

    score: Interval
    logit: Interval
    p: float  # of the score, two-sided
    doubtful: bool  # few samples depart, or fewer than 50 independent ones ran: resamples alone do not cover

    @property
    def nonadditive(self) -> bool:
        """Only when score and logit agree in sign and both exclude 0: bounded scores bend one scale alone."""
        same_sign = self.score.estimate * self.logit.estimate > 0
        return same_sign and not self.score.contains(0.0) and not self.logit.contains(0.0)


def interaction_of(paired: Paired, drawn: Bootstrap, evicted: int, quantized: int, both: int, full: int) -> Interaction:
    """The interaction contrast among four policies of one bootstrap, each of which ran on every sample.

    That no sample departs from the sum does not prove that none ever does: where few do, the interval is the score
    interval of their signs, each taken for the most that a sample can depart by, 2.
    """
    policies, signed = [evicted, quantized, both, full], np.array([1, 1, -1, -1])
    departures, few = {}, []
    for name in drawn.ranked:
        t = paired.tasks.index(name)
        scores, codes = paired.scores[t][policies], paired.clusters[t]
        departures[name] = np.bincount(codes, weights=signed @ scores) / np.bincount(codes)
        if rarely_changes(scores[:2].ravel(), scores[2:].ravel(), departures[name]):
            few.append(name)
    if sum(sum(signs(departures[name])) for name in few) >= FEW_DISCORDANT:
        few = []
    rest = [name for name in drawn.ranked if name not in few]
    parts = []
    if rest:
        parts.append((len(rest) / len(departures), drawn.over(rest, policies).contrast(dict(enumerate(signed)))))
    if few:
        mean = float(np.mean([signed @ drawn.means[name].point[policies] for name in few]))
        interval = few_changes([departures[name] / 2 for name in few], mean, 0.95, [2.0] * len(few))
        parts.append((len(few) / len(departures), interval))
    weights = dict(zip(policies, signed, strict=True))
    p = sign_flip_p(list(departures.values())) if few else drawn.macro.p_value(weights)
    shape = drawn.macro.shape(weights)
    doubtful = bool(few) or shape is None or not shape.error or shape.doubtful
    return Interaction(recovered(parts), drawn.logit.contrast(weights), p, doubtful)


def interaction(
    evicted: Run, quantized: Run, both: Run, full: Run, resamples: int = RESAMPLES, seed: int = 0
) -> Interaction:
    """The interaction contrast of eviction and quantization on the samples that all four runs share."""
    paired = pair([evicted, quantized, both, full])
    return interaction_of(paired, bootstrap(paired, resamples=resamples, seed=seed), 0, 1, 2, 3)


@dataclass(frozen=True)
class Gain:
    """Stacking gain at equal bytes: the best stack minus the best of eviction alone and quantization alone."""

    compression: float
    stack: int  # policies, chosen on one half of the samples
    pure: int
    value: Difference  # on the other half


def stacking_gain(
    paired: Paired,
    rho: Sequence[float],
    pure: Mapping[str, Sequence[int]],
    stacks: Mapping[str, Sequence[int]],
    compression: float,
    resamples: int = RESAMPLES,
) -> Gain | None:
    """G(C) = S_X(C) - max(S_E(C), S_Q(C)); None if no stack, or nothing pure, is that small.

    pure, stacks: families of policies. Each stands for itself by its measured point nearest to C from below
    (rho <= 1 / C, never interpolated). The best of each kind is chosen on one half of the samples and compared on the
    other, so that the luck of the choice is not in the gain.
    """
    candidates = [_nearest(rho, families, compression) for families in (pure, stacks)]
    if not all(candidates):
        return None
    chosen, report = paired.select(half=0), paired.select(half=1)
    if len(chosen.tasks) != len(paired.tasks) or len(report.tasks) != len(paired.tasks):
        return None  # a task of one sample cannot be halved
    score = np.mean([s.mean(1) for s in chosen.scores], axis=0)
    best_pure, best_stack = (max(c, key=lambda p: (score[p], -rho[p])) for c in candidates)
    two = report.select(policies=[best_stack, best_pure])
    return Gain(compression, best_stack, best_pure, difference_of(two, bootstrap(two, resamples=resamples), 0, 1))


def _nearest(rho: Sequence[float], families: Mapping[str, Sequence[int]], compression: float) -> list[int]:
    small = ([p for p in family if 0 < rho[p] <= 1 / compression] for family in families.values())
    return [max(family, key=lambda p: rho[p]) for family in small if family]


@dataclass(frozen=True)
class Rate:
    """Damage = a1 x + a2 x^2 + b1 y + b2 y^2 + g x y, fitted on a full grid; no damage without compression."""

    coefficients: np.ndarray  # a1, a2, b1, b2, g
    g: Interval  # score per squared octave; above 0 each makes the other's damage worse
    split: Mapping[float, Interval]  # log2 C -> share of its octaves that quantization should bring
    at_edge: frozenset[float]  # log2 C whose best share is the least or the greatest that was measured


def interaction_rate(
    scores: Sampled, kept: Sequence[float], bits: Sequence[float], full: int, policies: Sequence[int]
) -> Rate:
    """Fit the damage surface of one evictor x quantizer grid, on the data and on every resample.

    kept: share of tokens r, so x = -log2 r; bits: effective bits b per element, so y = log2(16 / b)
    policies: the whole grid, edges included; on one line of equal memory xy depends on the other terms
    """
    x = np.array([max(0.0, -math.log2(kept[p])) for p in policies])
    y = np.array([max(0.0, math.log2(16 / bits[p])) for p in policies])
    design = np.stack([x, x * x, y, y * y, x * y], axis=1)
    if np.linalg.matrix_rank(design, tol=1e-6) < 5:
        raise ValueError(
            "g is not identified: give a full grid of at least two kept shares below 1 by two quantizers, with edges"
        )
    solve = np.linalg.pinv(design)  # [5, points]

    def fit(s: np.ndarray) -> np.ndarray:
        return np.asarray((s[:, [full]] - s[:, list(policies)]) @ solve.T)

    point, draws = fit(scores.point[None])[0], fit(scores.draws)
    octaves = [u for u in (1.0, 2.0, 3.0, 4.0, 5.0) if u <= x.max() + y.max()]
    split, at_edge = {}, set()
    for u in octaves:
        on = np.linspace(max(0.0, u - x.max()), min(u, y.max()), 101)  # only where the grid was measured
        rest = u - on
        terms = np.stack([rest, rest**2, on, on**2, rest * on], axis=1)
        best = int((terms @ point).argmin())
        split[u] = percentiles(float(on[best] / u), on[(draws @ terms.T).argmin(axis=1)] / u)
        if best in (0, len(on) - 1):
            at_edge.add(u)
    return Rate(point, percentiles(float(point[4]), draws[:, 4]), split, frozenset(at_edge))
