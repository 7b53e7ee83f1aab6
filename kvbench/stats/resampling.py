"""The paired stratified bootstrap: one set of resamples, from which every mean, contrast and area is read."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from kvbench.stats.pairing import Paired

RESAMPLES = 10_000
CHUNK = 4_000_000  # weights held at a time; bounds memory on long tasks
SKEWED = 0.25  # skewness of the resamples beyond which percentiles are corrected (BCa)
FEW_CLUSTERS = 10  # below, that correction is itself too uncertain

Track = Callable[[Sequence[str]], Iterable[str]]


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its interval; the ends are NaN where the data cannot give them (one sample)."""

    estimate: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """True also for unknown ends: nothing is excluded."""
        return not (self.low > value or self.high < value)


@dataclass(frozen=True)
class Sampled:
    """A statistic per policy: on the data `point` [P], and on every shared resample `draws` [B, P].

    influence [clusters, P]: by how much each cluster moves the statistic; lets skewed intervals be corrected.
    """

    point: np.ndarray
    draws: np.ndarray
    influence: np.ndarray | None = None

    def contrast(self, weights: Mapping[int, float], level: float = 0.95) -> Interval:
        """The weighted sum over policies, as {0: 1, 1: -1} for the difference of the first two."""
        index, weight = list(weights), np.array(list(weights.values()), dtype=float)
        moved = None if self.influence is None else self.influence[:, index] @ weight
        return percentiles(float(self.point[index] @ weight), self.draws[:, index] @ weight, moved, level)

    def interval(self, policy: int) -> Interval:
        return self.contrast({policy: 1.0})

    def select(self, policies: Sequence[int]) -> Sampled:
        """Some of the policies, in this order."""
        index = list(policies)
        moved = None if self.influence is None else self.influence[:, index]
        return Sampled(self.point[index], self.draws[:, index], moved)

    def p_value(self, weights: Mapping[int, float]) -> float:
        """Two-sided: twice the smaller share of resamples on either side of 0, so at least 2 / (resamples + 1)."""
        index, weight = list(weights), np.array(list(weights.values()), dtype=float)
        draws = self.draws[:, index] @ weight
        draws = draws[~np.isnan(draws)]
        sides = np.sum(draws <= 0), np.sum(draws >= 0)
        return min(1.0, 2 * (1 + min(sides)) / (len(draws) + 1)) if len(draws) else math.nan


@dataclass(frozen=True)
class Bootstrap:
    """Everything read from one set of resamples. `retention` is None without a reference policy."""

    macro: Sampled  # mean over the ranked tasks of the task's mean score
    logit: Sampled  # the same on logits of the task means, for scores squeezed against 0 or 1
    retention: Sampled | None  # mean over tasks of (mean - zero) / (reference's mean - zero), on the same samples
    ranked: tuple[str, ...]  # tasks that enter `macro` and `logit`
    retention_tasks: tuple[str, ...]  # those of them in which the reference ran and scores above the zero
    means: Mapping[str, Sampled]  # per task
    tasks: Mapping[str, tuple[Interval, ...]]  # mean score per policy
    task_retention: Mapping[str, tuple[Interval, ...]]

    def over(self, tasks: Sequence[str], policies: Sequence[int]) -> Sampled:
        """The macro mean over some of the tasks, of some of the policies, on the same resamples."""
        return _mean([self.means[t].select(policies) for t in tasks])


def resample_weights(clusters: int, task: str, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each cluster is drawn in each resample, in blocks [some resamples, clusters].

    A function of (seed, task, clusters) alone, which is what makes all contrasts share one resample matrix.
    """
    rng = np.random.default_rng([seed, zlib.crc32(task.encode())])
    block = max(1, CHUNK // clusters)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(clusters, size=(rows, clusters)) + clusters * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters).astype(float)


def bootstrap(
    paired: Paired,
    reference: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    track: Track = iter,
    *,
    ranked: Collection[str] | None = None,
    zero: int | None = None,
    chance: Mapping[str, float] | None = None,
) -> Bootstrap:
    """Resample every task once for all policies; `track` wraps the loop over tasks, for a progress line.

    ranked: tasks that enter the means over tasks; all unless given
    zero, chance: what scores 0 in retention: a policy (no context, or a minimal cache), or else a score per task

    A policy that misses a task has NaN in every mean over tasks, and NaN ends where a task has a single cluster.
    Resamples of every task mean are held: 8 bytes x tasks x resamples x policies.
    """
    ranked = [t for t in paired.tasks if ranked is None or t in ranked]
    means, logits, ratios = {}, {}, {}
    for task in track(paired.tasks):
        t = paired.tasks.index(task)
        sums = _Sums(paired, t, reference, zero)
        draws = sums.resampled(task, resamples, seed)
        too_few = np.array([len(np.unique(paired.clusters[t][row])) < 2 for row in sums.ran])
        with np.errstate(divide="ignore", invalid="ignore"):
            means[task] = _task_mean(sums, draws, too_few)
            logits[task] = _task_logit(means[task], sums.ran.sum(1))
            base = (chance or {}).get(task, 0.0)
            ratio = None if reference is None else _task_retention(sums, draws, too_few, reference, base)
        if ratio is not None:
            ratios[task] = ratio
    kept = [t for t in ranked if t in ratios]
    return Bootstrap(
        macro=_mean([means[t] for t in ranked]),
        logit=_mean([logits[t] for t in ranked]),
        retention=_mean([ratios[t] for t in kept]) if kept else None,
        ranked=tuple(ranked),
        retention_tasks=tuple(kept),
        means=means,
        tasks={t: _intervals(m) for t, m in means.items()},
        task_retention={t: _intervals(r) for t, r in ratios.items()},
    )


class _Sums:
    """Per cluster, the sums whose ratios are the statistics of one task: [clusters, quantities, policies].

    Quantities: score, count; and on the samples shared with reference and zero: theirs, own, zero's score, count.
    """

    def __init__(self, paired: Paired, t: int, reference: int | None, zero: int | None) -> None:
        scores, codes = paired.scores[t], paired.clusters[t]
        self.ran = ~np.isnan(scores)
        known = np.where(self.ran, scores, 0.0)
        quantities = [known, self.ran.astype(float)]
        if reference is not None:
            shared = self.ran & self.ran[reference] & (True if zero is None else self.ran[zero])
            base = np.zeros_like(known) if zero is None else np.where(shared, known[zero], 0.0)
            quantities += [np.where(shared, known[reference], 0.0), np.where(shared, known, 0.0), base, shared]
        self.sums = np.zeros((int(codes.max()) + 1, len(quantities), len(scores)))
        np.add.at(self.sums, codes, np.stack(quantities).transpose(2, 0, 1))
        first = np.unique(codes, return_index=True)[1]
        self.strata = paired.strata[t][first]  # of each cluster, ascending
        self.names = paired.strata_names[t]

    def resampled(self, task: str, resamples: int, seed: int) -> np.ndarray:
        """[resamples, quantities, policies]; each stratum's clusters are drawn among themselves."""
        total = np.zeros((resamples, *self.sums.shape[1:]))
        for stratum in np.unique(self.strata):
            own = self.sums[self.strata == stratum]
            name = f"{task} {self.names[stratum]}" if len(self.names) > 1 else task
            flat = own.reshape(len(own), -1)
            done = 0
            for weights in resample_weights(len(own), name, resamples, seed):
                total[done : done + len(weights)] += (weights @ flat).reshape(len(weights), *own.shape[1:])
                done += len(weights)
        return total

    def centred(self, influence: np.ndarray) -> np.ndarray:
        """Influence [clusters, P] of a design that draws within strata: only departures from their means count."""
        influence = np.nan_to_num(influence)
        for stratum in np.unique(self.strata):
            own = self.strata == stratum
            influence[own] -= influence[own].mean(0)
        return influence


def _task_mean(sums: _Sums, draws: np.ndarray, too_few: np.ndarray) -> Sampled:
    total, count = sums.sums[:, 0], sums.sums[:, 1]
    point = total.sum(0) / count.sum(0)
    resampled = draws[:, 0] / draws[:, 1]
    resampled[:, too_few] = np.nan
    return Sampled(point, resampled, sums.centred((total - point * count) / count.sum(0)))


def _task_logit(mean: Sampled, n: np.ndarray) -> Sampled:
    def shrunk(p: np.ndarray) -> np.ndarray:
        return np.asarray((n * p + 0.5) / (n + 1))

    near = shrunk(mean.point)
    slope = n / (n + 1) / (near * (1 - near))
    point, draws = (np.log(shrunk(p) / (1 - shrunk(p))) for p in (mean.point, mean.draws))
    return Sampled(point, draws, None if mean.influence is None else mean.influence * np.nan_to_num(slope))


def _task_retention(
    sums: _Sums, draws: np.ndarray, too_few: np.ndarray, reference: int, chance: float
) -> Sampled | None:
    """None where the reference does not score above the zero."""
    full, own, base, count = (sums.sums[:, k] for k in range(2, 6))
    base = base + chance * count
    gain, range_ = (own - base).sum(0), (full - base).sum(0)
    if not range_[reference] > 0:
        return None
    point = np.where(range_ != 0, gain / range_, np.nan)
    many = draws[:, 4] + chance * draws[:, 5]
    resampled = (draws[:, 3] - many) / (draws[:, 2] - many)
    resampled = np.where(np.isfinite(resampled), resampled, np.nan)
    resampled[:, too_few] = np.nan
    return Sampled(point, resampled, sums.centred((own - base - point * (full - base)) / range_))


def _mean(tasks: Sequence[Sampled]) -> Sampled:
    point = sum(t.point / len(tasks) for t in tasks)
    draws = sum(t.draws / len(tasks) for t in tasks)
    influence = np.concatenate([t.influence / len(tasks) for t in tasks if t.influence is not None])
    return Sampled(np.asarray(point), np.asarray(draws), influence)


def _intervals(sampled: Sampled) -> tuple[Interval, ...]:
    return tuple(map(sampled.interval, range(len(sampled.point))))


def percentiles(
    estimate: float, draws: np.ndarray, influence: np.ndarray | None = None, level: float = 0.95
) -> Interval:
    """The estimate with the percentiles of its resamples, bias-corrected and accelerated (BCa) where they are skewed.

    influence [clusters]: see `Sampled`; without it the percentiles stay as they are.
    """
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return Interval(float(estimate), math.nan, math.nan)
    shares = np.array([(1 - level) / 2, (1 + level) / 2])
    if influence is not None and np.sum(influence != 0) >= FEW_CLUSTERS and abs(skewness(draws)) > SKEWED:
        shares = _bca_shares(estimate, draws, influence, shares)
    low, high = np.percentile(draws, 100 * shares)
    return Interval(float(estimate), float(low), float(high))


def skewness(draws: np.ndarray) -> float:
    """Third standardized moment; 0 for constant draws."""
    off = draws - draws.mean()
    spread = float((off @ off) / len(off))
    return float((off * off) @ off) / len(off) / spread**1.5 if spread > 1e-24 else 0.0


def _bca_shares(estimate: float, draws: np.ndarray, influence: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Efron 1987, doi:10.1080/01621459.1987.10478410: shifts for median bias and for a standard error that moves."""
    normal = NormalDist()
    below = (np.sum(draws < estimate) + 0.5 * np.sum(draws == estimate)) / len(draws)
    bias = normal.inv_cdf(min(max(float(below), 1 / len(draws)), 1 - 1 / len(draws)))
    squares = float(influence @ influence)
    acceleration = float((influence**2) @ influence) / (6 * squares**1.5) if squares > 0 else 0.0
    z = [bias + normal.inv_cdf(float(share)) for share in shares]
    return np.array([normal.cdf(bias + x / (1 - acceleration * x)) for x in z])
