"""Paired statistics: every comparison is on the same prompts, and every contrast shares one set of resamples.

The estimand is the macro mean: within a task the mean over samples, then the mean over tasks. Intervals are 95 %
percentiles of a stratified bootstrap that draws sample ids (or clusters of samples that share a context) once per task
and uses that draw for all policies.

    >>> run = lambda name, scores: Run(name, False, {"t": {str(i): Row(s, "sha") for i, s in enumerate(scores)}})
    >>> difference(run("a", [1, 1, 0, 1]), run("b", [1, 0, 0, 1])).interval.estimate
    0.25
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
POWER = 7.85  # (z(0.975) + z(0.80)) squared: two-sided 5 %, power 80 %
FEW_DISCORDANT = 25  # below, the percentile bootstrap undercovers and the exact test takes over
CHUNK = 4_000_000  # weights held at a time; bounds memory on long tasks

Track = Callable[[Sequence[str]], Iterable[str]]


class Row(NamedTuple):
    """One sample's score. Rows pair by sample id, never across prompts; samples of a cluster are drawn together."""

    score: float
    sha: str
    cluster: str | None = None


@dataclass(frozen=True)
class Run:
    """The scores of one stack: task name -> sample id -> row."""

    name: str
    query_aware: bool
    tasks: Mapping[str, Mapping[str, Row]]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % ends; the ends are NaN where the data cannot give them (one sample)."""

    estimate: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """True also for unknown ends: nothing is excluded."""
        return not (self.low > value or self.high < value)


@dataclass(frozen=True)
class Paired:
    """Scores on shared samples: for each task an array [policies, samples], NaN where a policy did not run."""

    names: tuple[str, ...]
    tasks: tuple[str, ...]
    scores: tuple[np.ndarray, ...]
    clusters: tuple[np.ndarray, ...]  # per task [samples], integers from 0


def pair(runs: Sequence[Run], *, keep_missing: bool = False) -> Paired:
    """Align runs on their common tasks and samples, or with `keep_missing` on all of them.

    Raises ValueError when two runs differ in query mode or in the prompt behind a sample id, or share nothing.
    """
    check_pairable(runs)
    shared = {t: None for run in runs for t in run.tasks if keep_missing or all(t in r.tasks for r in runs)}
    tasks, scores, clusters = [], [], []
    for task in shared:
        rows = [run.tasks.get(task, {}) for run in runs]
        ids = set.union(*map(set, rows)) if keep_missing else set.intersection(*map(set, rows))
        if not ids:
            continue
        order = sorted(ids)
        tasks.append(task)
        scores.append(np.array([[r[i].score if i in r else np.nan for i in order] for r in rows], dtype=float))
        first = [next(r[i] for r in rows if i in r) for i in order]
        labels = [i if row.cluster is None else f"cluster {row.cluster}" for i, row in zip(order, first, strict=True)]
        clusters.append(np.unique(labels, return_inverse=True)[1])
    if not tasks:
        raise ValueError(f"cannot compare {' and '.join(r.name for r in runs)}: they have no sample in common")
    return Paired(tuple(r.name for r in runs), tuple(tasks), tuple(scores), tuple(clusters))


def check_pairable(runs: Sequence[Run]) -> None:
    """Raise ValueError unless all runs have one query mode and one prompt per sample id."""
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for run in runs:
        if run.query_aware != runs[0].query_aware:
            raise ValueError(
                f"cannot pair {runs[0].name} with {run.name}: one is query-aware, the other query-agnostic; "
                "compare runs of one query mode"
            )
        for task, rows in run.tasks.items():
            for sample, row in rows.items():
                sha, name = seen.setdefault((task, sample), (row.sha, run.name))
                if sha != row.sha:
                    raise ValueError(
                        f"cannot pair {name} with {run.name}: prompt_sha256 of sample {sample} in task {task} differs; "
                        "run both on the same prompts"
                    )


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


@dataclass(frozen=True)
class Sampled:
    """A statistic per policy: on the data `point` [P], and on every shared resample `draws` [B, P]."""

    point: np.ndarray
    draws: np.ndarray

    def contrast(self, weights: Mapping[int, float]) -> Interval:
        """The weighted sum over policies, as {0: 1, 1: -1} for the difference of the first two."""
        index, weight = list(weights), np.array(list(weights.values()), dtype=float)
        return percentiles(float(self.point[index] @ weight), self.draws[:, index] @ weight)

    def interval(self, policy: int) -> Interval:
        return self.contrast({policy: 1.0})


@dataclass(frozen=True)
class Bootstrap:
    """Everything read from one set of resamples. `retention` is None without a reference policy."""

    macro: Sampled  # mean over tasks of the task's mean score
    logit: Sampled  # the same on logits of the task means, for scores squeezed against 0 or 1
    retention: Sampled | None  # mean over tasks of task mean / reference's mean on the same samples
    retention_tasks: tuple[str, ...]  # tasks in which the reference ran and scores above 0
    tasks: Mapping[str, tuple[Interval, ...]]  # mean score per policy
    task_retention: Mapping[str, tuple[Interval, ...]]


def bootstrap(
    paired: Paired, reference: int | None = None, resamples: int = RESAMPLES, seed: int = 0, track: Track = iter
) -> Bootstrap:
    """Resample every task once for all policies; `track` wraps the loop over tasks, for a progress line.

    A policy that misses a task has NaN in every mean over tasks, and NaN ends where a task has a single cluster.
    """
    policies = len(paired.names)
    macro, logit, kept = ([np.zeros(policies), np.zeros((resamples, policies))] for _ in range(3))
    retention_tasks, task_intervals, task_retention = [], {}, {}
    for task in track(paired.tasks):
        t = paired.tasks.index(task)
        scores, codes = paired.scores[t], paired.clusters[t]
        ran = ~np.isnan(scores)
        known = np.where(ran, scores, 0.0)
        clusters = int(codes.max()) + 1
        stacked = [known, ran.astype(float)]
        if reference is not None:
            shared = ran & ran[reference]
            stacked += [np.where(shared, known[reference], 0.0), np.where(shared, known, 0.0)]
        sums = np.zeros((clusters, policies * len(stacked)))
        np.add.at(sums, codes, np.concatenate(stacked).T)
        draws = np.concatenate([w @ sums for w in resample_weights(clusters, task, resamples, seed)])
        too_few = np.array([len(np.unique(codes[row])) < 2 for row in ran])
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = [np.split(x, len(stacked), axis=-1) for x in (sums.sum(0), draws)]
            means = [total / count for total, count, *_ in parts]
            means[1][:, too_few] = np.nan
            logits = [_logit(m, ran.sum(1)) for m in means]
            task_intervals[task] = tuple(percentiles(means[0][p], means[1][:, p]) for p in range(policies))
            for total, new in ((macro, means), (logit, logits)):
                total[0] += new[0] / len(paired.tasks)
                total[1] += new[1] / len(paired.tasks)
            if reference is not None and parts[0][2][reference] > 0:
                ratios = [own / full for _, _, full, own in parts]
                ratios = [np.where(np.isfinite(r), r, np.nan) for r in ratios]
                ratios[1][:, too_few] = np.nan
                retention_tasks.append(task)
                task_retention[task] = tuple(percentiles(ratios[0][p], ratios[1][:, p]) for p in range(policies))
                kept[0] += ratios[0]
                kept[1] += ratios[1]
    count = len(retention_tasks)
    return Bootstrap(
        macro=Sampled(*macro),
        logit=Sampled(*logit),
        retention=Sampled(kept[0] / count, kept[1] / count) if count else None,
        retention_tasks=tuple(retention_tasks),
        tasks=task_intervals,
        task_retention=task_retention,
    )


def percentiles(estimate: float, draws: np.ndarray) -> Interval:
    """The estimate with the 2.5 % and 97.5 % percentiles of its resamples."""
    draws = draws[~np.isnan(draws)]
    low, high = np.percentile(draws, (2.5, 97.5)) if len(draws) else (math.nan, math.nan)
    return Interval(float(estimate), float(low), float(high))


def _logit(mean: np.ndarray, n: np.ndarray) -> np.ndarray:
    shrunk = (n * mean + 0.5) / (n + 1)
    return np.log(shrunk / (1 - shrunk))


def analytic_se(differences: Sequence[np.ndarray], clusters: Sequence[np.ndarray] | None = None) -> float:
    """Standard error of the macro mean: (1/T) sqrt(sum of var_t / n_t). NaN if a task has fewer than two samples."""
    codes = clusters or [np.arange(len(d)) for d in differences]
    return math.sqrt(sum(map(_variance_of_mean, differences, codes))) / len(differences)


def _variance_of_mean(values: np.ndarray, codes: np.ndarray) -> float:
    sums = np.bincount(codes, weights=values - np.mean(values))
    if len(sums) < 2:
        return math.nan
    return float(len(sums) / (len(sums) - 1) * (sums @ sums) / len(values) ** 2)


def detectable_difference(differences: Sequence[np.ndarray], clusters: Sequence[np.ndarray] | None = None) -> float:
    """The smallest true difference this design finds with power 80 % at two-sided 5 %.

    sqrt(7.85 var / n) for one task. 0 when no sample differs: then only `rule_of_three` says something.
    """
    return math.sqrt(POWER) * analytic_se(differences, clusters)


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
    return McNemar(a_only, b_only, n, p, _tango(a_only, b_only, n), None if discordant else rule_of_three(n))


def is_binary(scores: np.ndarray) -> bool:
    return bool(np.isin(scores, (0.0, 1.0)).all())


def _tango(a_only: int, b_only: int, n: int) -> Interval:
    """Score interval of a paired difference of proportions (Tango 1998, doi:10.1002/sim.4780170802)."""
    from scipy.optimize import brentq

    estimate, z = (a_only - b_only) / n, 1.959964

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


@dataclass(frozen=True)
class Difference:
    """A minus B in macro mean score, on common samples."""

    a: str
    b: str
    interval: Interval
    se: float
    detectable: float
    n: Mapping[str, int]
    tasks: Mapping[str, Interval]
    exact: McNemar | None  # set when scores are binary and few pairs are discordant; it then decides
    method: str

    @property
    def resolved(self) -> bool:
        """Whether the data tell A and B apart."""
        return not self.interval.contains(0.0) and (self.exact is None or self.exact.p < 0.05)


def difference(a: Run, b: Run, resamples: int = RESAMPLES, seed: int = 0, track: Track = iter) -> Difference:
    """Compare two runs on their common samples. Raises ValueError when they cannot be paired."""
    paired = pair([a, b])
    drawn = bootstrap(paired, resamples=resamples, seed=seed, track=track)
    deltas = [s[0] - s[1] for s in paired.scores]
    tasks = {t: _task_difference(paired, i, resamples, seed) for i, t in enumerate(paired.tasks)}
    interval, method, exact = drawn.macro.contrast({0: 1, 1: -1}), "paired bootstrap", None
    independent = all(len(np.unique(c)) == len(c) for c in paired.clusters)
    pooled = np.concatenate(paired.scores, axis=1)
    if independent and is_binary(pooled) and np.sum(pooled[0] != pooled[1]) < FEW_DISCORDANT:
        exact = mcnemar(*pooled)
        if len({len(d) for d in deltas}) == 1:  # equal tasks: the pooled difference is the macro difference
            interval, method = exact.interval, "score interval, exact McNemar test"
    return Difference(
        a=a.name,
        b=b.name,
        interval=interval,
        se=analytic_se(deltas, paired.clusters),
        detectable=detectable_difference(deltas, paired.clusters),
        n={t: len(d) for t, d in zip(paired.tasks, deltas, strict=True)},
        tasks=tasks,
        exact=exact,
        method=method,
    )


def _task_difference(paired: Paired, t: int, resamples: int, seed: int) -> Interval:
    one = Paired(paired.names, paired.tasks[t : t + 1], paired.scores[t : t + 1], paired.clusters[t : t + 1])
    return bootstrap(one, resamples=resamples, seed=seed).macro.contrast({0: 1, 1: -1})


@dataclass(frozen=True)
class Floor:
    """What two runs of one stack disagree by; smaller differences between stacks are not resolved."""

    n: int
    flips: float  # share of samples whose score changes
    value: float  # macro mean of the absolute change: the flip rate of binary scores
    bound: float | None  # rule of three when nothing changes


def aa_floor(first: Run, second: Run) -> Floor:
    """The noise floor from two runs of the same stack on the same prompts."""
    paired = pair([first, second])
    changes = [np.abs(s[0] - s[1]) for s in paired.scores]
    n, flips = sum(map(len, changes)), sum(int(np.sum(c > 1e-9)) for c in changes)
    return Floor(n, flips / n, float(np.mean([c.mean() for c in changes])), None if flips else rule_of_three(n))


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


@dataclass(frozen=True)
class Interaction:
    """Damage of a stack beyond the sum of its parts: S(r,16) + S(1,b) - S(r,b) - S(1,16). Above 0 it hurts more."""

    score: Interval
    logit: Interval

    @property
    def nonadditive(self) -> bool:
        """Only when score and logit agree in sign and both exclude 0: bounded scores bend one scale alone."""
        same_sign = self.score.estimate * self.logit.estimate > 0
        return same_sign and not self.score.contains(0.0) and not self.logit.contains(0.0)


def interaction_of(drawn: Bootstrap, evicted: int, quantized: int, both: int, full: int) -> Interaction:
    """The interaction contrast among four policies of one bootstrap."""
    weights = {evicted: 1, quantized: 1, both: -1, full: -1}
    return Interaction(drawn.macro.contrast(weights), drawn.logit.contrast(weights))


def interaction(
    evicted: Run, quantized: Run, both: Run, full: Run, resamples: int = RESAMPLES, seed: int = 0
) -> Interaction:
    """The interaction contrast of eviction and quantization on the samples that all four runs share."""
    return interaction_of(bootstrap(pair([evicted, quantized, both, full]), resamples=resamples, seed=seed), 0, 1, 2, 3)
