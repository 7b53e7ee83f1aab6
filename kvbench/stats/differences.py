"""Whether two stacks differ: intervals, detectable differences, equivalence, corrections, noise and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvbench.stats.exact import (
    FEW_DISCORDANT,
    McNemar,
    few_changes,
    is_binary,
    mcnemar,
    rarely_changes,
    recovered,
    rule_of_three,
    sign_flip_p,
    signs,
)
from kvbench.stats.pairing import Paired, Run, pair
from kvbench.stats.resampling import RESAMPLES, Bootstrap, Interval, Sampled, Track, bootstrap

POWER = 7.85  # (z(0.975) + z(0.80)) squared: two-sided 5 %, power 80 %
MARGIN = 0.01  # a loss below this is called none, if the 90 % interval shows it


def analytic_se(
    differences: Sequence[np.ndarray],
    clusters: Sequence[np.ndarray] | None = None,
    strata: Sequence[np.ndarray] | None = None,
) -> float:
    """Standard error of the macro mean: (1/T) sqrt(sum of var_t / n_t). NaN if a task has fewer than two samples."""
    codes = clusters or [np.arange(len(d)) for d in differences]
    layers = strata or [np.zeros(len(d), dtype=int) for d in differences]
    return math.sqrt(sum(map(_variance_of_mean, differences, codes, layers))) / len(differences)


def _variance_of_mean(values: np.ndarray, codes: np.ndarray, strata: np.ndarray) -> float:
    total = 0.0
    for stratum in np.unique(strata):
        own, within = values[strata == stratum], np.unique(codes[strata == stratum], return_inverse=True)[1]
        sums = np.bincount(within, weights=own - np.mean(own))
        if len(sums) < 2:
            return math.nan
        total += float(len(sums) / (len(sums) - 1) * (sums @ sums))
    return total / len(values) ** 2


def detectable_difference(
    differences: Sequence[np.ndarray],
    clusters: Sequence[np.ndarray] | None = None,
    strata: Sequence[np.ndarray] | None = None,
) -> float:
    """The smallest true difference this design finds with power 80 % at two-sided 5 %.

    sqrt(7.85 var / n) for one task. 0 when no sample differs: then only `rule_of_three` says something.
    """
    return math.sqrt(POWER) * analytic_se(differences, clusters, strata)


@dataclass(frozen=True)
class Difference:
    """A minus B in macro mean score, on common samples."""

    a: str
    b: str
    interval: Interval
    interval90: Interval  # for claims of equivalence, which are one-sided tests at 5 %
    p: float  # two-sided
    se: float  # as the samples vary; 0 where none of them changes
    detectable: float  # smallest true difference found with power 80 % at two-sided 5 %
    n: Mapping[str, int]
    tasks: Mapping[str, Interval]
    exact: McNemar | None  # set when scores are binary and few pairs are discordant
    sign_test: bool  # whether p comes from the signs of the differences, as few samples of some task change
    method: str

    @property
    def resolved(self) -> bool:
        """Whether the data tell A and B apart. A sign test can, where changes that did not occur widen the interval."""
        return self.p < 0.05 and (self.sign_test or not self.interval.contains(0.0))

    @property
    def worst_loss(self) -> float:
        """Upper end of the 90 % interval of B - A: how much A may lose against B."""
        return -self.interval90.low

    def not_worse(self, margin: float = MARGIN) -> bool:
        """Non-inferiority: the data exclude that A loses `margin` or more against B."""
        return self.worst_loss < margin

    def equivalent(self, margin: float = MARGIN) -> bool:
        """Both one-sided tests: neither loses `margin` or more."""
        return self.not_worse(margin) and self.interval90.high < margin


def difference(a: Run, b: Run, resamples: int = RESAMPLES, seed: int = 0, track: Track = iter) -> Difference:
    """Compare two runs on their common samples. Raises ValueError when they cannot be paired."""
    paired = pair([a, b])
    return difference_of(paired, bootstrap(paired, resamples=resamples, seed=seed, track=track), 0, 1)


def difference_of(paired: Paired, drawn: Bootstrap, a: int, b: int) -> Difference:
    """Compare two policies of one bootstrap on its ranked tasks; each must have run on a sample of every one."""
    tasks = {name: _Task(paired, paired.tasks.index(name), a, b) for name in drawn.ranked}
    few = [t for t in tasks if tasks[t].rare]
    if sum(sum(signs(tasks[t].per_cluster)) for t in few) >= FEW_DISCORDANT:
        few = []
    rest = [t for t in tasks if t not in few]
    by_level = {}
    for level in (0.95, 0.9):
        parts = [(len(few) / len(tasks), _few([tasks[t] for t in few], level))] if few else []
        if rest:
            parts.append((len(rest) / len(tasks), drawn.over(rest, [a, b]).contrast({0: 1, 1: -1}, level)))
        by_level[level] = parts[0][1] if len(parts) == 1 else recovered(parts)
    exact, equal = None, len({len(t.delta) for t in tasks.values()}) == 1
    scores = np.concatenate([[t.a, t.b] for t in tasks.values()], axis=1)
    independent = all(t.independent for t in tasks.values())
    if independent and is_binary(scores) and np.sum(scores[0] != scores[1]) < FEW_DISCORDANT:
        exact = mcnemar(*scores)
    if not few:
        p, method = drawn.macro.p_value({a: 1, b: -1}), "paired bootstrap"
    elif exact and equal:  # equal tasks: the pooled difference is the macro difference
        p, method = exact.p, "score interval, exact McNemar test"
    else:
        p = sign_flip_p([t.per_cluster for t in tasks.values()])
        method = f"score interval where few samples change ({', '.join(few)})"
        method += f"{', paired bootstrap elsewhere' if rest else ''}, sign test"
    ends = by_level[0.95]
    deltas, codes, strata = ([getattr(t, k) for t in tasks.values()] for k in ("delta", "codes", "strata"))
    return Difference(
        a=paired.names[a],
        b=paired.names[b],
        interval=ends,
        interval90=by_level[0.9],
        p=p,
        se=analytic_se(deltas, codes, strata),
        # Changes that happened not to occur have no variance: there the width of the score interval counts.
        detectable=(ends.high - ends.low) / 2 * math.sqrt(POWER) / 1.96
        if few
        else detectable_difference(deltas, codes, strata),
        n={name: len(t.delta) for name, t in tasks.items()},
        tasks={name: _task_interval(drawn.means[name], t, a, b) for name, t in tasks.items()},
        exact=exact,
        sign_test=bool(few),
        method=method,
    )


class _Task:
    """Two policies on the samples of a task that both ran."""

    def __init__(self, paired: Paired, t: int, a: int, b: int) -> None:
        shared = ~np.isnan(paired.scores[t][a] - paired.scores[t][b])
        if not shared.any():
            raise ValueError(f"{paired.names[a]} and {paired.names[b]} have no sample of {paired.tasks[t]} in common")
        self.a, self.b = paired.scores[t][a][shared], paired.scores[t][b][shared]
        self.delta = self.a - self.b
        self.codes = np.unique(paired.clusters[t][shared], return_inverse=True)[1]
        self.strata = paired.strata[t][shared]
        self.per_cluster = np.bincount(self.codes, weights=self.delta) / np.bincount(self.codes)
        self.rare = rarely_changes(self.a, self.b, self.per_cluster)

    @property
    def independent(self) -> bool:
        return len(self.per_cluster) == len(self.delta)


def _few(tasks: Sequence[_Task], level: float) -> Interval:
    mean = float(np.mean([t.delta.mean() for t in tasks]))
    return few_changes([t.per_cluster for t in tasks], mean, level)


def _task_interval(means: Sampled, task: _Task, a: int, b: int) -> Interval:
    if task.rare and sum(signs(task.per_cluster)) < FEW_DISCORDANT:
        return _few([task], 0.95)
    return means.contrast({a: 1, b: -1})


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values that keep the chance of any false claim in the family below the level (Holm 1979)."""
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    adjusted, highest = [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, (len(order) - rank) * p[i])
        adjusted[i] = min(1.0, highest)
    return adjusted


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Adjusted p values that keep the expected share of false claims among the claims below the level."""
    from scipy.stats import false_discovery_control

    known = [i for i in range(len(p)) if not math.isnan(p[i])]
    adjusted = [math.nan] * len(p)
    if known:
        for i, value in zip(known, false_discovery_control([p[i] for i in known]), strict=True):
            adjusted[i] = float(value)
    return adjusted


CORRECTIONS: dict[str, Callable[[Sequence[float]], list[float]]] = {
    "holm": holm,
    "bh": benjamini_hochberg,
    "none": list,
}


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


def seed_means(paired: Paired) -> dict[str, np.ndarray]:
    """Macro mean score per data seed and policy [P], over the tasks that have every seed; empty with fewer than two."""
    seeds = sorted({name for names in paired.strata_names for name in names} - {""})
    tasks = [t for t, names in enumerate(paired.strata_names) if set(names) == set(seeds)]
    if len(seeds) < 2 or not tasks:
        return {}
    found = {}
    for seed in seeds:
        own = [paired.scores[t][:, paired.strata[t] == paired.strata_names[t].index(seed)] for t in tasks]
        found[seed] = np.mean([scores.mean(1) for scores in own], axis=0)
    return found


def seed_spread(paired: Paired) -> np.ndarray | None:
    """Standard deviation of the score between data seeds, per policy [P]; None with fewer than two seeds."""
    means = seed_means(paired)
    return np.std(list(means.values()), axis=0, ddof=1) if means else None
