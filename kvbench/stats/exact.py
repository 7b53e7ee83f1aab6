"""When few scores change: exact tests and score intervals, where the percentile bootstrap undercovers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from kvbench.stats.resampling import Interval

FEW_DISCORDANT = 25  # below, the percentile bootstrap undercovers and the exact test takes over


def rule_of_three(n: int) -> float:
    """95 % upper bound of a rate of which n samples show no case."""
    return min(1.0, 3 / n)


@dataclass(frozen=True)
class McNemar:
    """Exact test on the discordant pairs of two binary score lists."""

    a_only: int
    b_only: int
    n: int
    p: float
    interval: Interval  # of the difference of the two rates: Tango's score interval
    bound: float | None  # rule of three on the discordance rate when no pair is discordant


def mcnemar(a: np.ndarray, b: np.ndarray) -> McNemar:
    """Test whether a and b are right equally often, from the samples on which one is right and the other wrong."""
    from scipy.stats import binomtest

    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if not (is_binary(a) and is_binary(b)):
        raise ValueError("McNemar's test needs scores of 0 or 1")
    a_only, b_only, n = int(np.sum(a > b)), int(np.sum(a < b)), len(a)
    discordant = a_only + b_only
    p = float(binomtest(a_only, discordant, 0.5).pvalue) if discordant else 1.0
    return McNemar(a_only, b_only, n, p, tango(a_only, b_only, n), None if discordant else rule_of_three(n))


def is_binary(scores: np.ndarray) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def tango(a_only: float, b_only: float, n: float, level: float = 0.95) -> Interval:
    """Score interval of a paired difference of proportions (Tango 1998, doi:10.1002/sim.4780170802)."""
    from scipy.optimize import brentq

    estimate, z = (a_only - b_only) / n, NormalDist().inv_cdf((1 + level) / 2)

    def statistic(delta: float) -> float:
        b = (2 * n - a_only + b_only) * delta - a_only - b_only
        c = -b_only * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)  # P(only b is right) under this delta
        variance = n * (2 * q + delta * (1 - delta))
        excess = a_only - b_only - n * delta
        return excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess) if excess else 0.0

    edge = 1 - 1e-12
    low = -1.0 if estimate <= -edge else brentq(lambda d: statistic(d) - z, -edge, estimate)
    high = 1.0 if estimate >= edge else brentq(lambda d: statistic(d) + z, estimate, edge)
    return Interval(estimate, float(low), float(high))


def clopper_pearson(count: float, n: float, level: float = 0.95) -> Interval:
    """The exact interval of a proportion, covering at least `level`; scipy's `binomtest` takes whole numbers only."""
    from scipy.stats import beta

    low = float(beta.ppf((1 - level) / 2, count, n - count + 1)) if count > 0 else 0.0
    high = float(beta.ppf((1 + level) / 2, count + 1, n - count)) if count < n else 1.0
    return Interval(count / n, low, high)


def signs(values: np.ndarray) -> tuple[int, int]:
    """How many are above and how many below 0."""
    return int(np.sum(values > 1e-12)), int(np.sum(values < -1e-12))


def sign_flip_p(tasks: Sequence[np.ndarray], draws: int = 10_000) -> float:
    """Two-sided p of a macro mean difference if each difference were as likely with the other sign.

    McNemar's exact test, for any scores and several tasks: those that do not change say nothing. All sign patterns of
    up to twelve differences are counted, of more a fixed random choice.
    """
    values = np.concatenate([t / (len(tasks) * len(t)) for t in tasks])
    values = values[np.abs(values) > 1e-15]
    if len(values) <= 12:
        patterns = (np.arange(2 ** len(values))[:, None] >> np.arange(len(values))) & 1
    else:
        patterns = np.random.default_rng(len(values)).integers(0, 2, (draws, len(values)), dtype=np.int8)
        patterns[0] = 1  # the data themselves
    flipped = np.abs((2 * patterns - 1) @ values)
    return float(np.mean(flipped >= abs(values.sum()) - 1e-12))


def rarely_changes(a: np.ndarray, b: np.ndarray, per_cluster: np.ndarray) -> bool:
    """Whether a task's differences are rare jumps between scores rather than a shift of all of them.

    Scores that are never 0 or 1 (likelihoods) move all together, and a bootstrap of a few dozen of them is sound.
    """
    values = np.concatenate([a, b])
    if is_binary(values):
        return True
    jumps = bool(np.isin(values, (0.0, 1.0)).any())
    return jumps and sum(signs(per_cluster)) <= len(per_cluster) / 2


def few_changes(
    tasks: Sequence[np.ndarray], mean: float, level: float, scales: Sequence[float], side: int = 0
) -> Interval:
    """The interval of a macro mean difference when few samples of some tasks change, or few do not.

    The score interval of the signs, moved to the mean: exact for binary scores, too wide for fractions, which change
    by less than 1. Tasks of unequal size or scale count with the number of samples of one task that would vary as much
    (the effective weight of Fay and Feuer 1997 for rare events); if all are equal that is the number of all samples.

    tasks: differences per cluster. mean: over tasks, of differences times the task's scale
    side: 1 or -1 if the differences can only be above or below 0: Clopper and Pearson's interval instead of Tango's
    """
    weights = [scale / (len(tasks) * len(t)) for t, scale in zip(tasks, scales, strict=True)]
    counts, full = [signs(t) for t in tasks], sum(scales) / len(tasks)
    above, below = (sum(w * c[side] for w, c in zip(weights, counts, strict=True)) / full for side in (0, 1))
    events = [sum(c) + 1 / len(tasks) for c in counts]
    n = full * sum(w * e for w, e in zip(weights, events, strict=True))
    n /= sum(w * w * e for w, e in zip(weights, events, strict=True))
    if not side:
        sign = tango(above * n, below * n, n, level)
    else:
        sign = clopper_pearson((above + below) * n, n, level)
        sign = sign if side > 0 else Interval(-sign.estimate, -sign.high, -sign.low)
    low, high = mean - full * (sign.estimate - sign.low), mean + full * (sign.high - sign.estimate)
    return Interval(mean, float(max(-full, low)), float(min(full, high)))


def recovered(parts: list[tuple[float, Interval]]) -> Interval:
    """The interval of a weighted sum of independent estimates from their own intervals.

    MOVER (Zou and Donner 2008, doi:10.1002/sim.3095): distances to the ends add up in squares, side by side.
    """
    estimate = sum(w * i.estimate for w, i in parts)
    low = math.sqrt(sum((w * (i.estimate - i.low)) ** 2 for w, i in parts))
    high = math.sqrt(sum((w * (i.high - i.estimate)) ** 2 for w, i in parts))
    return Interval(estimate, estimate - low, estimate + high)
