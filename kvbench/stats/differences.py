"""Whether two stacks differ: intervals, detectable differences, equivalence, corrections, noise and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
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
from kvbench.stats.resampling import RESAMPLES, Bootstrap, Interval, Track, bootstrap

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
    doubtful: bool  # whether the intervals may cover less than they say: see `Shape.doubtful`

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
    tasks = [_Task(paired, name, a, b) for name in drawn.ranked]
    few, rest = _few_and_rest(tasks)
    ends, inner = (_macro(tasks, drawn, {a: 1, b: -1}, level) for level in (0.95, 0.9))
    exact, equal = None, len({len(t.delta) for t in tasks}) == 1
    scores = np.concatenate([[t.a, t.b] for t in tasks], axis=1)
    independent = all(t.independent for t in tasks)
    if independent and is_binary(scores) and np.sum(scores[0] != scores[1]) < FEW_DISCORDANT:
        exact = mcnemar(*scores)
    left = drawn.over([t.name for t in rest], [a, b]).shape({0: 1, 1: -1}) if rest else None
    elsewhere = "skewness-corrected t interval" if left and left.corrects else "paired bootstrap"
    if not few:
        p, method = drawn.macro.p_value({a: 1, b: -1}), elsewhere
    elif exact and equal:  # equal tasks: the pooled difference is the macro difference
        p, method = exact.p, "score interval, exact McNemar test"
    else:
        p = sign_flip_p([t.per_cluster for t in tasks])
        method = f"score interval where few samples change, or few do not ({', '.join(t.name for t in few)})"
        method += f"{f', {elsewhere} elsewhere' if rest else ''}, sign test"
    deltas, codes, strata = ([getattr(t, k) for t in tasks] for k in ("delta", "codes", "strata"))
    return Difference(
        a=paired.names[a],
        b=paired.names[b],
        interval=ends,
        interval90=inner,
        p=p,
        se=analytic_se(deltas, codes, strata),
        # Changes that happened not to occur have no variance: there the width of the score interval counts.
        detectable=(ends.high - ends.low) / 2 * math.sqrt(POWER) / 1.96
        if few
        else detectable_difference(deltas, codes, strata),
        n={t.name: len(t.delta) for t in tasks},
        tasks={t.name: _macro([t], drawn, {a: 1, b: -1}) for t in tasks},
        exact=exact,
        sign_test=bool(few),
        method=method,
        doubtful=left is not None and left.doubtful,
    )


def score_of(paired: Paired, drawn: Bootstrap, policy: int, tasks: Sequence[str] | None = None) -> Interval:
    """The macro mean score of one policy, over the ranked tasks or some of all.

    Thirty right answers out of thirty are no proof of all being right: where few scores differ from 0, or from 1, the
    interval is Clopper and Pearson's of how many do.
    """
    names = list(drawn.ranked if tasks is None else tasks)
    if any(np.isnan(drawn.means[name].point[policy]) for name in names):
        return Interval(math.nan, math.nan, math.nan)
    return _macro([_Task(paired, name, policy, None) for name in names], drawn, {policy: 1}).within(*paired.bounds)


def retention_of(
    paired: Paired, drawn: Bootstrap, policy: int, reference: int, tasks: Sequence[str] | None = None
) -> Interval:
    """Mean over tasks of a policy's share of the reference's score; exactly 1 for the reference itself."""
    if policy == reference:
        return Interval(1.0, 1.0, 1.0)
    found = lead(paired, drawn, policy, reference, tasks, retention=True)
    return Interval(1 + found.estimate, 1 + found.low, 1 + found.high)


def lead(
    paired: Paired, drawn: Bootstrap, a: int, b: int, tasks: Sequence[str] | None = None, *, retention: bool = False
) -> Interval:
    """Macro mean score (or retention) of a minus that of b, with a score interval where few samples change.

    There the reference's score, by which retention divides, is taken as known.
    """
    names = (drawn.retention_tasks if retention else drawn.ranked) if tasks is None else tasks
    if any(np.isnan((drawn.ratios if retention else drawn.means)[name].point[[a, b]]).any() for name in names):
        return Interval(math.nan, math.nan, math.nan)
    scales = [1 / drawn.ranges[name][a] if retention else 1.0 for name in names]
    found = [_Task(paired, name, a, b, scale) for name, scale in zip(names, scales, strict=True)]
    return _macro(found, drawn, {a: 1, b: -1}, retention=retention)


class _Task:
    """Two policies on the samples of a task that both ran, or one and the nearer end of its scores, 0 or 1."""

    def __init__(self, paired: Paired, name: str, a: int, b: int | None, scale: float = 1.0) -> None:
        t = paired.tasks.index(name)
        own = paired.scores[t][a]
        nearer = float(np.nanmean(own) > 0.5) if b is None else 0.0
        other = np.full_like(own, nearer) if b is None else paired.scores[t][b]
        shared = ~np.isnan(own - other)
        if b is not None and not shared.any():
            raise ValueError(f"{paired.names[a]} and {paired.names[b]} have no sample of {name} in common")
        self.name, self.scale = name, scale
        self.a, self.b = own[shared], other[shared]
        self.delta = self.a - self.b
        self.codes = np.unique(paired.clusters[t][shared], return_inverse=True)[1]
        self.strata = paired.strata[t][shared]
        self.per_cluster = np.bincount(self.codes, weights=self.delta) / np.bincount(self.codes)
        self.value = nearer + scale * float(self.delta.mean())
        # What most samples show, no change or all of it; a score can only depart to one side from its end.
        self.usual = float(np.round(self.delta.mean())) if b is not None else 0.0
        self.side = int(1 - 2 * nearer) if b is None else 0
        self.departures = self.per_cluster - self.usual
        self.rare = rarely_changes(self.a, self.b, self.departures)

    @property
    def independent(self) -> bool:
        return len(self.per_cluster) == len(self.delta)


def _few_and_rest(tasks: Sequence[_Task]) -> tuple[list[_Task], list[_Task]]:
    few = [t for t in tasks if t.rare]
    if sum(sum(signs(t.departures)) for t in few) >= FEW_DISCORDANT:
        few = []
    return few, [t for t in tasks if t not in few]


def _macro(
    tasks: Sequence[_Task],
    drawn: Bootstrap,
    weights: Mapping[int, float],
    level: float = 0.95,
    *,
    retention: bool = False,
) -> Interval:
    """The mean over tasks of a weighted sum of policies: score intervals where few samples change, else resamples."""
    few, rest = _few_and_rest(tasks)
    parts = []
    if rest:
        means = drawn.over([t.name for t in rest], list(weights), retention=retention)
        parts.append((len(rest) / len(tasks), means.contrast(dict(enumerate(weights.values())), level)))
    for kind in dict.fromkeys((t.usual, t.side) for t in few):
        own = [t for t in few if (t.usual, t.side) == kind]
        mean, scales = float(np.mean([t.value for t in own])), [t.scale for t in own]
        interval = few_changes([t.per_cluster for t in own], mean, level, scales, own[0].side)
        parts.append((len(own) / len(tasks), interval))
    return parts[0][1] if len(parts) == 1 else recovered(parts)


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

    value: float  # macro mean of the absolute change: the flip rate of binary scores
    n: int  # samples with answers, which flip; rounding moves likelihoods without that
    flips: float  # share of these whose score changes; NaN without any
    bound: float | None  # rule of three when none of them does
    drift: float | None  # macro mean of the absolute change over the tasks of likelihoods; None without such


def aa_floor(first: Run, second: Run, likelihoods: Collection[str] = ()) -> Floor:
    """The noise floor from two runs of the same stack on the same prompts. likelihoods: tasks without answers."""
    paired = pair([first, second])
    changes = {t: np.abs(s[0] - s[1]) for t, s in zip(paired.tasks, paired.scores, strict=True)}
    means = {t: float(c.mean()) for t, c in changes.items()}
    answers = [change for t, c in changes.items() if t not in likelihoods for change in c]
    drifts = [mean for t, mean in means.items() if t in likelihoods]
    n, flips = len(answers), sum(change > 1e-9 for change in answers)
    return Floor(
        value=float(np.mean(list(means.values()))),
        n=n,
        flips=flips / n if n else math.nan,
        bound=rule_of_three(n) if n and not flips else None,
        drift=float(np.mean(drifts)) if drifts else None,
    )


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
