"""Statistics against hand-computed values, published tables, brute force and simulation."""

import itertools
import math
from functools import partial

import numpy as np
import pytest

from kvbench.stats import (
    UNBOUNDED,
    Bootstrap,
    Interval,
    Paired,
    Row,
    Run,
    Sampled,
    aa_floor,
    analytic_se,
    benjamini_hochberg,
    bootstrap,
    compression_at,
    curve_area,
    detectable_difference,
    difference,
    dominators,
    frontier_probability,
    holm,
    hypervolume,
    interaction,
    interaction_of,
    interaction_rate,
    lead,
    mcnemar,
    pair,
    pareto_front,
    percentiles,
    recovered,
    resample_weights,
    retention_of,
    rule_of_three,
    score_of,
    seed_means,
    seed_spread,
    sign_flip_p,
    stacking_gain,
    tango,
)


def run(name, query_aware=False, sha="p", clusters=None, seeds=None, bounds=(0.0, 1.0), **tasks):
    """A run from lists of scores; sample ids are positions."""
    rows = {
        t: {
            str(i): Row(float(s), f"{sha}{i}", clusters and clusters[i], seeds[i] if seeds else "")
            for i, s in enumerate(scores)
        }
        for t, scores in tasks.items()
    }
    return Run(name, query_aware, rows, bounds)


free = partial(run, bounds=UNBOUNDED)  # of values that are no scores


def exactly(point, count=5):
    """A statistic without noise: every resample is the point."""
    return Sampled(np.array(point, dtype=float), np.tile(np.array(point, dtype=float), (count, 1)))


def counts(a_only, b_only, n):
    a, b = np.zeros(n), np.zeros(n)
    a[:a_only], b[a_only : a_only + b_only] = 1, 1
    return a, b


def test_pairing_aligns_by_id_and_keeps_common_samples():
    a = Run("a", False, {"t": {"x": Row(1, "1"), "y": Row(0.5, "2")}, "only a": {"x": Row(1, "1")}})
    b = Run("b", False, {"t": {"y": Row(0, "2"), "x": Row(0.25, "1"), "z": Row(1, "3")}})
    paired = pair([a, b])
    assert paired.tasks == ("t",)
    np.testing.assert_array_equal(paired.scores[0], [[1, 0.5], [0.25, 0]])
    union = pair([a, b], keep_missing=True)
    assert union.tasks == ("t", "only a")
    np.testing.assert_array_equal(union.scores[0], [[1, 0.5, np.nan], [0.25, 0, 1]])


def test_other_prompts_and_other_query_modes_are_refused_in_one_line():
    for other, reason in ((run("b", sha="q", t=[1, 0]), "prompt_sha256"), (run("b", True, t=[1, 0]), "query-aware")):
        with pytest.raises(ValueError, match=reason) as raised:
            pair([run("a", t=[1, 0]), other])
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="no sample in common"):
        pair([run("a", t=[1]), run("b", u=[1])])


def test_weights_count_draws_and_depend_on_seed_and_task_only():
    weights = np.concatenate(list(resample_weights(7, "t", 50, seed=3)))
    assert weights.shape == (50, 7)
    np.testing.assert_array_equal(weights.sum(1), 7)
    np.testing.assert_array_equal(weights, np.concatenate(list(resample_weights(7, "t", 50, seed=3))))
    assert not np.array_equal(weights, np.concatenate(list(resample_weights(7, "u", 50, seed=3))))


def test_every_mean_equals_a_loop_over_the_same_resamples():
    rng = np.random.default_rng(0)
    data = {t: rng.random((3, n)) for t, n in (("t", 5), ("u", 8))}
    paired = pair([run(f"p{p}", **{t: s[p].tolist() for t, s in data.items()}) for p in range(3)])
    drawn = bootstrap(paired, reference=0, resamples=20, seed=1)
    macro, retention = np.zeros((20, 3)), np.zeros((20, 3))
    for task, scores in data.items():
        weights = np.concatenate(list(resample_weights(scores.shape[1], task, 20, seed=1)))
        for b, p in itertools.product(range(20), range(3)):
            picked = [i for i, w in enumerate(weights[b]) for _ in range(int(w))]
            mean = [sum(scores[q][i] for i in picked) / len(picked) for q in range(3)]
            macro[b, p] += mean[p] / 2
            retention[b, p] += mean[p] / mean[0] / 2
    np.testing.assert_allclose(drawn.macro.draws, macro)
    np.testing.assert_allclose(drawn.retention.draws, retention)
    assert drawn.macro.point[1] == pytest.approx((data["t"][1].mean() + data["u"][1].mean()) / 2)
    assert drawn.retention.point[1] == pytest.approx(
        (data["t"][1].mean() / data["t"][0].mean() + data["u"][1].mean() / data["u"][0].mean()) / 2
    )


def test_a_policy_that_misses_samples_is_compared_on_its_own_samples():
    full = run("full", t=[1, 1, 0, 0])
    half = Run("half", False, {"t": {k: Row(0.5, f"p{k}") for k in ("0", "1")}})
    drawn = bootstrap(pair([full, half], keep_missing=True), reference=0, resamples=200)
    assert drawn.retention.point[1] == pytest.approx(0.5)  # 0.5 against 1, not against 0.5
    assert drawn.means["t"].point[1] == 0.5
    assert retention_of(pair([full, half], keep_missing=True), drawn, 1, 0).estimate == pytest.approx(0.5)


def test_one_sample_gives_no_interval_and_excludes_nothing():
    drawn = bootstrap(pair([run("a", t=[1]), run("b", t=[0])]), reference=0, resamples=100)
    interval = drawn.macro.contrast({0: 1, 1: -1})
    assert interval.estimate == 1 and math.isnan(interval.low) and interval.contains(0.0)
    assert not difference(run("a", t=[0.3]), run("b", t=[0.1]), resamples=100).resolved


def test_tasks_in_which_the_reference_scores_zero_do_not_enter_retention():
    drawn = bootstrap(pair([run("full", t=[0, 0], u=[1, 1]), run("b", t=[1, 0], u=[1, 0])]), 0, resamples=50)
    assert drawn.retention_tasks == ("u",)
    assert drawn.retention.point[1] == 0.5
    assert bootstrap(pair([run("full", t=[0, 0]), run("b", t=[1, 0])]), 0, resamples=50).retention is None


def test_the_interval_covers_at_the_nominal_rate():
    rng, trials, hits = np.random.default_rng(7), 300, 0
    for k in range(trials):
        base = rng.normal(0.5, 0.1, (2, 40))
        a, b = base + rng.normal(0.05, 0.1, (2, 40)), base
        paired = pair([free("a", t=a[0].tolist(), u=a[1].tolist()), free("b", t=b[0].tolist(), u=b[1].tolist())])
        hits += bootstrap(paired, resamples=600, seed=k).macro.contrast({0: 1, 1: -1}).contains(0.05)
    assert 0.91 <= hits / trials <= 0.98  # 95 % and three standard errors of this simulation


def test_samples_of_one_cluster_are_drawn_together():
    scores, clusters = [1.0] * 5 + [0.0] * 5, ["x"] * 5 + ["y"] * 5
    paired = pair([run("a", t=scores, clusters=clusters)])
    values = set(bootstrap(paired, resamples=200).macro.draws[:, 0].tolist())
    assert values == {0.0, 0.5, 1.0}
    # Two clusters with sums of residuals 2.5 and -2.5: 2 / 1 * 12.5 / 100 = 0.25
    assert analytic_se([np.array(scores)], [paired.clusters[0]]) == pytest.approx(0.5)


def test_analytic_error_and_detectable_difference_by_hand():
    t, u = np.array([1.0, 0, 0, -1]), np.array([0.5, 0.5, 0, 0])
    # var(t) = 2/3, var(u) = 1/12, n = 4 each: (1/2) sqrt(1/6 + 1/48)
    assert analytic_se([t, u]) == pytest.approx(0.5 * math.sqrt(1 / 6 + 1 / 48))
    assert detectable_difference([t]) == pytest.approx(math.sqrt(7.85 * (2 / 3) / 4))
    # Paired binary scores, 5 % discordant, 500 samples: 2.8 points
    d = np.array([1.0] * 13 + [-1.0] * 12 + [0.0] * 475)
    assert 100 * detectable_difference([d]) == pytest.approx(2.8, abs=0.02)
    assert math.isnan(analytic_se([np.array([1.0])]))


@pytest.mark.parametrize(
    ("a_only", "b_only", "p"),
    [
        (5, 0, 0.0625),
        (6, 0, 0.03125),
        (6, 1, 0.125),
        (7, 1, 0.0703125),
        (9, 2, 0.0654296875),
        (10, 2, 0.03857421875),
        (4, 4, 1.0),
    ],
)
def test_mcnemar_matches_the_binomial_table(a_only, b_only, p):
    assert mcnemar(*counts(a_only, b_only, 40)).p == pytest.approx(p)
    assert mcnemar(*counts(b_only, a_only, 40)).p == pytest.approx(p)


@pytest.mark.parametrize(
    ("a_only", "b_only", "n", "low", "high"),
    [(12, 2, 50, 0.0611, 0.3447), (9, 3, 32, -0.0271, 0.3897)],  # Newcombe 1998 and Tango 1998
)
def test_the_score_interval_matches_published_values(a_only, b_only, n, low, high):
    interval = mcnemar(*counts(a_only, b_only, n)).interval
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)


def test_no_discordance_gives_the_rule_of_three():
    result = mcnemar(np.ones(60), np.ones(60))
    assert (result.p, result.bound, rule_of_three(2)) == (1.0, 0.05, 1.0)
    assert result.interval.low == pytest.approx(-result.interval.high)
    # With no discordant pair the score interval is Wilson's: z^2 / (n + z^2)
    assert result.interval.high == pytest.approx(3.8415 / 63.8415, abs=1e-4)
    assert mcnemar(np.ones(3), np.zeros(3)).interval.high == 1.0
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar(np.array([0.5]), np.array([1.0]))


def test_few_flips_are_judged_by_the_exact_test():
    a, b = (x.tolist() for x in counts(5, 0, 100))
    result = difference(run("a", t=a), run("b", t=b), resamples=2000)
    assert result.exact.p == pytest.approx(0.0625) and not result.resolved
    assert result.interval.estimate == pytest.approx(0.05)
    a, b = (x.tolist() for x in counts(30, 5, 100))
    many = difference(run("a", t=a), run("b", t=b), resamples=2000)
    assert many.exact is None and many.method == "paired bootstrap" and many.resolved


def test_the_difference_is_the_macro_mean_over_common_samples():
    a, b = run("a", t=[1, 0.5, 0], u=[1, 1]), run("b", t=[0.5, 0.5, 0.5, 1], u=[0.5, 0])
    result = difference(a, b, resamples=500)
    assert result.interval.estimate == pytest.approx((0 + 0.75) / 2)
    assert result.n == {"t": 3, "u": 2}
    assert result.tasks["u"].estimate == pytest.approx(0.75)
    swapped = difference(b, a, resamples=500)
    assert (swapped.interval.low, swapped.interval.high) == pytest.approx((-result.interval.high, -result.interval.low))


def test_the_noise_floor_is_the_flip_rate_of_binary_scores():
    floor = aa_floor(run("1", t=[1, 0, 1, 1], u=[1, 1]), run("2", t=[1, 1, 1, 1], u=[1, 0]))
    assert floor.flips == pytest.approx(2 / 6) and floor.drift is None
    assert floor.value == pytest.approx((1 / 4 + 1 / 2) / 2)
    same = aa_floor(run("1", t=[1, 0, 1]), run("2", t=[1, 0, 1]))
    assert (same.flips, same.value, same.bound) == (0, 0, 1.0)


def test_likelihoods_that_round_otherwise_are_no_flips():
    runs = run("1", t=[1, 0, 1], ppl=[0.4, 0.5]), run("2", t=[1, 0, 1], ppl=[0.401, 0.503])
    floor = aa_floor(*runs, likelihoods=["ppl"])
    assert (floor.n, floor.flips, floor.bound) == (3, 0, 1.0)
    assert floor.drift == pytest.approx(0.002) and floor.value == pytest.approx(0.001)  # over both tasks
    alone = aa_floor(*(Run(r.name, False, {"ppl": r.tasks["ppl"]}) for r in runs), likelihoods=["ppl"])
    assert alone.n == 0 and math.isnan(alone.flips) and alone.bound is None and alone.value == pytest.approx(0.002)


def dominated(p, rho, score):
    return any(
        rho[q] <= rho[p] and score[q] >= score[p] and (rho[q] < rho[p] or score[q] > score[p]) for q in range(len(rho))
    )


def test_the_front_equals_the_definition_of_dominance():
    rng = np.random.default_rng(1)
    for _ in range(50):
        rho, score = rng.integers(1, 5, 9) / 4, rng.integers(0, 5, 9) / 4  # many ties on both axes
        assert pareto_front(rho, score).tolist() == [not dominated(p, rho, score) for p in range(9)]


def test_frontier_probability_counts_resamples():
    rho, draws = np.array([0.5, 1.0]), np.array([[0.5, 0.9], [0.9, 0.9], [0.9, 0.5], [0.2, 0.3]])
    np.testing.assert_allclose(frontier_probability(rho, draws), [1.0, 0.5])
    with_nan = frontier_probability(np.array([0.5, np.nan]), np.array([[0.1, 0.2]]))
    assert with_nan[0] == 1 and math.isnan(with_nan[1])


def test_interaction_is_zero_on_additive_scores():
    rng = np.random.default_rng(2)
    full = rng.uniform(0.6, 0.9, 30)
    evict, quant = rng.uniform(0, 0.2, 30), rng.uniform(0, 0.2, 30)
    scores = {"r": full - evict, "b": full - quant, "rb": full - evict - quant, "full": full}
    result = interaction(*(run(k, t=v.tolist()) for k, v in scores.items()), resamples=500)
    assert result.score.estimate == pytest.approx(0, abs=1e-12)
    assert result.score.low == pytest.approx(0, abs=1e-12) and result.score.high == pytest.approx(0, abs=1e-12)
    assert not result.nonadditive


@pytest.mark.parametrize(("both", "sign"), [(0.2, 1), (0.68, -1)])
def test_interaction_has_the_sign_of_the_extra_damage(both, sign):
    noise = np.random.default_rng(3).normal(0, 0.05, (4, 60))
    means = {"r": 0.7, "b": 0.7, "rb": both, "full": 0.8}
    runs = [run(k, t=(m + e).clip(0, 1).tolist()) for (k, m), e in zip(means.items(), noise, strict=True)]
    result = interaction(*runs, resamples=1000)
    assert result.score.estimate == pytest.approx(0.6 - both, abs=0.05)
    assert math.copysign(1, result.score.estimate) == sign and result.nonadditive


def test_an_interaction_that_was_not_seen_is_not_excluded():
    """No sample of 100 departs from the sum: the interval is twice the score interval of no change, never [0, 0]."""
    full, evict = [1.0] * 90 + [0.0] * 10, [1.0] * 60 + [0.0] * 40
    runs = [run(k, t=v) for k, v in {"r": evict, "b": full, "rb": evict, "full": full}.items()]
    end = 2 * 3.8415 / (100 + 3.8415)
    assert interaction(*runs, resamples=200).score == Interval(
        0, pytest.approx(-end, abs=1e-4), pytest.approx(end, abs=1e-4)
    )
    graded = [
        run(r.name, t=list(v), u=np.linspace(0.3, 0.6, 100)) for r, v in zip(runs, (evict, full) * 2, strict=True)
    ]
    mixed = interaction(*graded, resamples=200).score  # u never departs, and its scores are no jumps
    assert mixed.high == pytest.approx(end / 2, abs=1e-4) and mixed.low == -mixed.high


def test_resamples_know_too_little_of_few_departures_or_few_samples():
    rng = np.random.default_rng(6)

    def doubtful(*scores):
        return interaction(*(run(f"p{k}", t=v) for k, v in enumerate(scores)), resamples=100).doubtful

    def graded(n):
        return [rng.uniform(0.3, 0.6, n) for _ in range(4)]

    def answers(count):  # of 100, of which so many depart
        return [np.arange(100) < 80, np.ones(100), np.arange(100) < 80 - count, np.ones(100)]

    assert doubtful(*graded(40)) and not doubtful(*graded(60))
    assert doubtful(*answers(0)) and doubtful(*answers(10)) and not doubtful(*answers(40))
    constant = [np.full(60, v) for v in (0.5, 0.6, 0.3, 0.9)]  # no variance: an interval without width
    assert doubtful(*constant)


def test_intervals_of_rare_departures_cover():
    """One sample in fifty departs, by 1 or by 2: percentiles alone cover too rarely, as often none is drawn."""
    rng = np.random.default_rng(5)
    covered = {"given": 0, "percentiles": 0}
    for _ in range(200):
        extra = rng.choice([0.0, 1.0, 2.0], size=60, p=[0.98, 0.01, 0.01])  # mean 0.03
        none = np.zeros(60)
        ends = [(extra > 0).astype(float), (extra == 2).astype(float), none, none]
        paired = pair([run(f"p{k}", t=v.tolist()) for k, v in enumerate(ends)])
        drawn = bootstrap(paired, resamples=200)
        weights = {0: 1.0, 1: 1.0, 2: -1.0, 3: -1.0}
        draws = drawn.macro.draws @ np.array(list(weights.values()))
        covered["percentiles"] += percentiles(0.0, draws).contains(0.03)
        covered["given"] += interaction_of(paired, drawn, 0, 1, 2, 3).score.contains(0.03)
    assert covered["given"] >= 186 and covered["percentiles"] < 180, covered


def test_saturation_alone_is_not_called_an_interaction():
    """Equal steps on the logit scale bend the raw scale: the raw contrast excludes 0, the logit one does not."""
    rng = np.random.default_rng(4)
    probability = {k: 1 / (1 + math.exp(-logit)) for k, logit in {"r": 1.0, "b": 1.0, "rb": -2.0, "full": 4.0}.items()}
    runs = [run(k, t=(rng.random(800) < p).astype(float).tolist()) for k, p in probability.items()]
    result = interaction(*runs, resamples=1000)
    assert not result.score.contains(0.0) and not result.nonadditive


def test_percentiles_and_contrasts_by_hand():
    draws = np.linspace(0, 1, 101)
    assert percentiles(0.5, draws) == Interval(0.5, pytest.approx(0.025), pytest.approx(0.975))
    sampled = Sampled(np.array([0.5, 0.2]), np.stack([draws, draws], axis=1))
    assert sampled.contrast({0: 1, 1: -1}) == Interval(pytest.approx(0.3), 0.0, 0.0)


def test_bootstrap_is_reproducible():
    paired = pair([run("a", t=[1, 0, 1, 0.5]), run("b", t=[0, 0, 1, 1])])
    first, second = (bootstrap(paired, resamples=100, seed=5) for _ in range(2))
    assert isinstance(first, Bootstrap)
    np.testing.assert_array_equal(first.macro.draws, second.macro.draws)


# -- coverage: an interval must contain the truth as often as it says ------------------------------------------------


def coverage(draw, truth, trials=300, resamples=300):
    """Share of simulated comparisons whose 95 % and 90 % intervals contain the truth."""
    hits = [0, 0]
    for k in range(trials):
        result = difference(*draw(), resamples=resamples, seed=k)
        hits[0] += result.interval.contains(truth)
        hits[1] += result.interval90.contains(truth)
    return hits[0] / trials, hits[1] / trials


def flips(rng, sizes, only_a, only_b):
    """Two binary runs of which one alone is right with these probabilities."""
    tasks = {"a": {}, "b": {}}
    for t, n in enumerate(sizes):
        u, base = rng.random(n), rng.random(n) < 0.8
        tasks["a"][f"t{t}"] = np.where(u < only_a, 1.0, np.where(u < only_a + only_b, 0.0, base))
        tasks["b"][f"t{t}"] = np.where(u < only_a, 0.0, np.where(u < only_a + only_b, 1.0, base))
    return [run(name, **scores) for name, scores in tasks.items()]


@pytest.mark.parametrize(
    ("sizes", "only_a", "only_b"),
    [((100,), 0.03, 0.01), ((30,) * 4, 0.03, 0.01), ((30, 60, 120), 0.03, 0.01), ((160,), 0.2, 0.1)],
    ids=["one task", "equal tasks", "unequal tasks", "many flips"],
)
def test_intervals_of_binary_scores_cover(sizes, only_a, only_b):
    """Where few samples flip a percentile bootstrap covers 74 to 92 % instead."""
    rng = np.random.default_rng(11)
    wide, narrow = coverage(
        lambda: flips(rng, sizes, only_a, only_b), only_a - only_b, resamples=300 if only_b > 0.05 else 20
    )
    assert 0.925 <= wide <= 0.99 and 0.865 <= narrow <= 0.96  # three standard errors below; discrete scores may exceed


@pytest.mark.parametrize("kind", ["clusters", "seeds"])
def test_intervals_of_grouped_samples_cover(kind):
    rng, group = (
        np.random.default_rng(5),
        np.repeat(np.arange(24 if kind == "clusters" else 3), 5 if kind == "clusters" else 20),
    )

    def draw():
        base, n = rng.uniform(0.3, 0.6, len(group)), len(group)
        shared = rng.normal(0, 0.1, 24)[group] if kind == "clusters" else np.array([-0.2, 0.0, 0.2])[group]
        names = {kind: [str(g) for g in group]}
        return free("a", t=base + 0.05 + shared + rng.normal(0, 0.1, n), **names), free("b", t=base, **names)

    wide, narrow = coverage(draw, 0.05)
    assert 0.915 <= wide <= 0.975 and 0.855 <= narrow <= 0.945


# -- coverage of differences that are no flips ------------------------------------------------------------------------


def normal(rng, shape):
    return rng.normal(0, 1, shape), 0.0


def exponential(rng, shape):
    return rng.exponential(1, shape), 1.0


def lognormal(rng, shape):
    return rng.lognormal(0, 1, shape), math.exp(0.5)


def losses(rng, shape):
    """Of a token F1: 45 % unchanged, 35 % a little, 20 % much worse."""
    u = rng.random(shape)
    much = -rng.uniform(0.2, 1, shape)
    return np.where(u < 0.45, 0.0, np.where(u < 0.8, rng.normal(0, 0.05, shape), much)), -0.12


def spikes(rng, shape):
    """Of a likelihood: all a little worse, one in ten far worse."""
    rare = (rng.random(shape) < 0.1) * rng.exponential(0.2, shape)
    return rng.normal(0.01, 0.01, shape) + rare, 0.03


def clustered(rng, shape):
    trials, n = shape
    own = rng.exponential(1, (trials, n // 2)).repeat(2, axis=1)
    return own + rng.normal(0, 0.3, shape), 1.0


def stratified(rng, shape):
    seed = np.arange(shape[1]) % 2
    return rng.exponential(1, shape) + 3 * seed, 2.5


def covered(law, n, trials=500):
    """Share of simulated 95 % intervals of a paired difference that contain the truth; each trial is a policy."""
    differences, truth = law(np.random.default_rng(9), (trials, n))
    index = np.arange(n)
    paired = Paired(
        ("zero", *map(str, range(trials))),
        ("t",),
        (np.vstack([np.zeros(n), differences]),),
        (index // 2 if law is clustered else index,),
        (index % 2 if law is stratified else 0 * index,),
        (("0", "1") if law is stratified else ("",),),
        UNBOUNDED,
    )
    drawn = bootstrap(paired, resamples=400)
    return np.mean([lead(paired, drawn, k, 0).contains(truth) for k in range(1, trials + 1)])


@pytest.mark.parametrize("n", [50, 100, 500])
@pytest.mark.parametrize("law", [normal, exponential, lognormal, losses, spikes, clustered, stratified])
def test_from_fifty_samples_on_intervals_cover(law, n):
    """Stated: 93 to 98 %; two standard errors of the simulation are 2 points."""
    assert 0.92 <= covered(law, 2 * n if law is clustered else n) <= 0.99


@pytest.mark.parametrize("law", [normal, exponential, lognormal, losses, clustered, stratified])
def test_twenty_samples_cover_unless_large_changes_are_rare(law):
    assert 0.905 <= covered(law, 40 if law is clustered else 20) <= 0.995


def test_rare_large_changes_are_not_covered_by_few_samples_and_that_is_said():
    assert 0.7 <= covered(spikes, 20) <= 0.85 < 0.92 < covered(spikes, 50)
    rng = np.random.default_rng(0)
    few, many = (difference(run("a", t=rng.normal(0.5, 0.1, n)), run("b", t=[0.4] * n), 100) for n in (49, 50))
    assert few.doubtful and not many.doubtful
    flips_only = difference(run("a", t=[1] * 20), run("b", t=[1] * 18 + [0] * 2), 100)
    assert not flips_only.doubtful  # a score interval knows of changes that did not occur


def test_bca_and_percentiles_cover_less():
    """Why the specification's BCa is not used: spikes, 50 samples."""
    from scipy.stats import bootstrap as scipy_bootstrap

    differences, truth = spikes(np.random.default_rng(9), (300, 50))
    for method, most in (("percentile", 0.88), ("BCa", 0.91)):
        found = scipy_bootstrap(
            (differences,), np.mean, axis=1, n_resamples=400, method=method, rng=np.random.default_rng(1)
        ).confidence_interval
        assert np.mean((found.low <= truth) & (truth <= found.high)) < most
    assert covered(spikes, 50) > 0.92


def test_without_skewness_the_interval_is_students():
    from scipy.stats import ttest_1samp

    values = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]) + 1
    macro = bootstrap(pair([free("a", t=values)]), resamples=50).macro
    theirs = ttest_1samp(values, 0)
    ours, ends = macro.interval(0), theirs.confidence_interval()
    assert (ours.low, ours.high) == pytest.approx((ends.low, ends.high))
    assert macro.p_value({0: 1}) == pytest.approx(theirs.pvalue)
    assert macro.shape({0: 1}).freedom == pytest.approx(6)


def test_the_skewed_interval_is_near_the_bootstrap_t():
    """What it approximates: quantiles of (resampled mean - mean) / resampled error, by brute force."""
    rng = np.random.default_rng(0)
    values = rng.lognormal(0, 0.7, 40)
    picked = values[rng.integers(40, size=(20_000, 40))]
    t = (picked.mean(1) - values.mean()) / picked.std(1)
    low, high = values.mean() - np.percentile(t, [97.5, 2.5]) * values.std()
    ours = bootstrap(pair([free("a", t=values)]), resamples=50).macro.interval(0)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=0.04)
    assert high - values.mean() > 1.3 * (values.mean() - low)  # skewed to the right, as the values


def test_p_value_and_interval_agree():
    rng = np.random.default_rng(6)
    for _ in range(60):
        sampled = bootstrap(pair([free("a", t=rng.exponential(1, 15) - 0.6)]), resamples=50).macro
        assert (sampled.p_value({0: 1}) < 0.05) == (not sampled.interval(0).contains(0.0))


def test_freedom_and_error_over_tasks_of_unequal_size():
    """Welch and Satterthwaite by hand."""
    rng = np.random.default_rng(2)
    t, u = rng.normal(0, 1, 8), rng.normal(0, 3, 30)
    shape = bootstrap(pair([free("a", t=t, u=u)]), resamples=20).macro.shape({0: 1})
    v, w = t.var(ddof=1) / 8 / 4, u.var(ddof=1) / 30 / 4
    assert shape.error == pytest.approx(math.sqrt(v + w)) and shape.error == pytest.approx(analytic_se([t, u]))
    assert shape.freedom == pytest.approx((v + w) ** 2 / (v**2 / 7 + w**2 / 29))


# -- single scores and retention ---------------------------------------------------------------------------------------


def test_all_right_is_no_proof_of_perfection():
    from scipy.stats import binomtest

    paired = pair([run("a", t=[1] * 30), run("b", t=[0] * 30), run("c", t=[1] * 28 + [0] * 2)])
    drawn = bootstrap(paired, resamples=200)
    a, b, c = (score_of(paired, drawn, k) for k in range(3))
    bound = 1 - 0.025 ** (1 / 30)
    assert (a.estimate, a.low, a.high) == pytest.approx((1, 1 - bound, 1))
    assert (b.estimate, b.low, b.high) == pytest.approx((0, 0, bound))
    theirs = binomtest(28, 30).proportion_ci(method="exact")
    assert (c.low, c.high) == pytest.approx((theirs.low, theirs.high))


def test_all_lost_is_no_proof_of_nothing_kept():
    """Thirty answers, all right with one stack and all wrong with the other: the loss is not surely complete."""
    result = difference(run("a", t=[0] * 30), run("b", t=[1] * 30), resamples=100)
    assert result.interval.high == pytest.approx(tango(0, 30, 30).high) and -0.8 < result.interval.high < -0.7
    assert result.interval.low == -1 and result.resolved
    one = difference(run("a", t=[0]), run("b", t=[1]), resamples=100)
    assert one.interval.contains(0.0) and not one.resolved


@pytest.mark.parametrize(("n", "p"), [(20, 0.95), (50, 0.98), (50, 0.9), (200, 0.99), (30, 0.5)])
def test_intervals_of_single_scores_cover(n, p):
    scores = (np.random.default_rng(3).random((600, n)) < p).astype(float)
    paired = pair([run(str(k), t=row) for k, row in enumerate(scores)])
    drawn = bootstrap(paired, resamples=300)
    assert 0.92 <= np.mean([score_of(paired, drawn, k).contains(p) for k in range(600)]) <= 1  # exact: 95 % or more


@pytest.mark.parametrize(("n", "loss"), [(30, 0.03), (100, 0.03), (100, 0.3)])
def test_intervals_of_retention_cover(n, loss):
    """Two tasks of which the full cache answers 90 and 60 %; the stack loses right answers at a rate."""
    rng, hits = np.random.default_rng(4), []
    for k in range(150):
        full = {t: (rng.random(n) < p).astype(float) for t, p in (("t", 0.9), ("u", 0.6))}
        runs = [run("full", **full), run("a", **{t: s * (rng.random(n) >= loss) for t, s in full.items()})]
        paired = pair(runs)
        drawn = bootstrap(paired, 0, 200, seed=k)
        hits.append(retention_of(paired, drawn, 1, 0).contains(1 - loss))
    assert 0.9 <= np.mean(hits) <= 1.0


def test_unchanged_answers_leave_retention_uncertain():
    paired = pair([run("full", t=[1] * 30 + [0] * 30), run("a", t=[1] * 30 + [0] * 30)])
    drawn = bootstrap(paired, 0, 200)
    kept = retention_of(paired, drawn, 1, 0)
    assert kept.estimate == 1 and kept.low == pytest.approx(1 + 2 * tango(0, 0, 60).low)  # half of the prompts score
    assert retention_of(paired, drawn, 0, 0) == Interval(1.0, 1.0, 1.0)
    assert compression_at([1, 0.25], drawn.retention, [1], 0.01).shown == 4
    assert compression_at([1, 0.25], drawn.retention, [1], 0.01, {1: kept.low}).shown == 1


LOPSIDED = [f"c{k}" for k in [0] * 60 + list(range(1, 30))]  # one cluster of 60 samples and 29 of one


def lopsided(kind, scale=0.9):
    """a is better in the large cluster, b in eight small ones: a t interval reaches to 2.5 times the scale."""
    scores = {"a": [1] * 60 + [0] * 8 + [1] * 21, "b": [0] * 60 + [1] * 8 + [1] * 21}
    return [kind(k, clusters=LOPSIDED, t=[0.05 + scale * x for x in v]) for k, v in scores.items()]


def test_no_interval_reaches_beyond_what_scores_can_be():
    result = difference(*lopsided(run), resamples=200)
    assert result.interval.high == result.interval90.high == result.tasks["t"].high == 1
    assert -1 < result.interval.low < result.interval.estimate == pytest.approx(0.9 * 52 / 89)
    paired = pair(lopsided(run))
    drawn = bootstrap(paired, resamples=200)
    single = drawn.macro.interval(1)  # b: 29 of 89, skewed
    assert 0 <= single.low < single.estimate < single.high <= 1
    assert drawn.logit.bounds == UNBOUNDED


def test_values_without_bounds_are_not_clipped():
    """Perplexities ten times as far apart: the interval of scores, unclipped, ten times as wide."""
    one, ten = (difference(*lopsided(free, scale), resamples=200).interval for scale in (1, 10))
    assert one.high > 2 and ten.high == pytest.approx(10 * one.high)
    paired = pair([free("a", t=[300.0, 2.0, 3.0, 2.0])])
    assert bootstrap(paired, resamples=50).macro.interval(0).high > 300


def test_four_scores_depart_by_two_at_most():
    """An interaction contrast lies in -2 to 2."""
    a, b = lopsided(run)
    result = interaction(a, a, b, b, resamples=200).score
    assert result.high == 2 and result.estimate == pytest.approx(1.8 * 52 / 89)


def test_scores_out_of_bounds_are_refused():
    with pytest.raises(ValueError, match="scores of t are not in 0 to 1; give Run their true bounds"):
        pair([run("a", t=[0.5, 1.5])])
    assert pair([run("a", t=[1]), free("b", t=[7])]).bounds == UNBOUNDED


def test_unknown_ends_stay_unknown_within_bounds():
    ends = Interval(0.5, math.nan, math.nan).within(0, 1)
    assert math.isnan(ends.low) and math.isnan(ends.high)
    assert Interval(0.5, -0.2, 1.3).within(0, 1) == Interval(0.5, 0, 1)


def test_p_values_are_uniform_without_a_difference():
    rng, p = np.random.default_rng(8), []
    for k in range(200):
        base = rng.uniform(0.2, 0.8, 60)
        p.append(difference(free("a", t=base + rng.normal(0, 0.1, 60)), free("b", t=base), 400, seed=k).p)
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.10
    assert 0.4 <= np.mean(p) <= 0.6


# -- equivalence, few changes, corrections ---------------------------------------------------------------------------


def test_no_loss_is_shown_by_many_samples_and_not_by_few():
    few, many = (difference(run("a", t=[1] * n), run("b", t=[1] * n), resamples=200) for n in (50, 400))
    assert few.interval.estimate == many.interval.estimate == 0
    assert not few.not_worse(0.01) and many.not_worse(0.01) and many.equivalent(0.01)
    # No change in n: the 90 % score interval ends at z^2 / (n + z^2) with z = 1.645
    assert many.worst_loss == pytest.approx(2.7055 / 402.7055, abs=1e-4)
    better = difference(run("a", t=np.full(60, 0.9)), run("b", t=np.linspace(0.3, 0.5, 60)), resamples=200)
    assert better.not_worse(0.01) and not better.equivalent(0.01)


def test_a_task_that_never_changes_still_widens_the_interval():
    """Thirty samples without a flip do not prove the absence of flips, whatever a second task says."""
    losses = np.linspace(0.002, 0.004, 24)
    a = run("a", quiet=[1] * 30, nll=0.4 - losses)
    b = run("b", quiet=[1] * 30, nll=[0.4] * 24)
    result = difference(a, b, resamples=500)
    assert result.interval.estimate == pytest.approx(-losses.mean() / 2)
    quiet = tango(0, 0, 30).high / 2
    assert result.interval.high == pytest.approx(result.interval.estimate + quiet, abs=1e-3)
    assert result.interval.contains(0.0) and result.sign_test
    assert result.p < 0.001 and result.resolved  # all 24 likelihoods fell: that is a difference of unknown size
    assert "quiet" in result.method and not result.not_worse(0.01)


def test_unequal_tasks_count_like_one_task_that_varies_as_much():
    """All flips in the small task weigh more than as many in the large one."""
    small = difference(run("a", s=[0] * 3 + [1] * 17, l=[1] * 200), run("b", s=[1] * 20, l=[1] * 200), resamples=100)
    large = difference(run("a", s=[1] * 20, l=[0] * 3 + [1] * 197), run("b", s=[1] * 20, l=[1] * 200), resamples=100)
    assert small.interval.estimate == pytest.approx(-0.075) and large.interval.estimate == pytest.approx(-0.0075)
    assert small.interval.low < -0.15 and small.p == large.p == pytest.approx(0.25)


def test_recovered_interval_by_hand():
    one, two = Interval(0.1, 0.0, 0.3), Interval(0.2, 0.1, 0.3)
    combined = recovered([(0.5, one), (0.5, two)])
    assert combined.estimate == pytest.approx(0.15)
    assert combined.low == pytest.approx(0.15 - math.hypot(0.05, 0.05))
    assert combined.high == pytest.approx(0.15 + math.hypot(0.1, 0.05))
    assert recovered([(1.0, one)]) == Interval(0.1, pytest.approx(0.0), pytest.approx(0.3))


@pytest.mark.parametrize(("above", "below"), [(5, 0), (6, 1), (9, 2), (10, 2), (4, 4), (14, 3)])
def test_the_sign_test_of_binary_scores_is_mcnemar(above, below):
    a, b = counts(above, below, 40)
    exact = mcnemar(a, b).p
    assert sign_flip_p([a - b]) == pytest.approx(exact, abs=0 if above + below <= 12 else 0.01)


def test_holm_and_benjamini_hochberg_by_hand():
    p = [0.01, 0.04, math.nan, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, math.nan, 0.06, 0.02], nan_ok=True)
    assert benjamini_hochberg(p) == pytest.approx([0.02, 0.04, math.nan, 0.04, 0.02], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == [] and math.isnan(benjamini_hochberg([math.nan])[0])


def test_holm_keeps_false_claims_rare():
    rng, wrong = np.random.default_rng(2), {"holm": 0, "none": 0}
    for _ in range(400):
        p = rng.random(20).tolist()
        wrong["holm"] += min(holm(p)) < 0.05
        wrong["none"] += min(p) < 0.05
    assert wrong["holm"] / 400 < 0.09 < wrong["none"] / 400


def test_retention_counts_from_the_zero():
    runs = [
        run("full", t=[1, 1, 0.5, 0.5]),
        run("a", t=[0.75, 0.75, 0.5, 0.5]),
        run("none", t=[0.25, 0.25, 0.25, 0.25]),
    ]
    drawn = bootstrap(pair(runs), 0, 200, zero=2)
    assert drawn.retention.point.tolist() == pytest.approx([1, (0.625 - 0.25) / 0.5, 0])
    chance = bootstrap(pair(runs[:2]), 0, 200, chance={"t": 0.25})
    assert chance.retention.point[1] == pytest.approx(drawn.retention.point[1])
    np.testing.assert_allclose(chance.retention.draws[:, 1], drawn.retention.draws[:, 1])
    assert bootstrap(pair(runs[:2]), 0, 50, chance={"t": 0.75}).retention is None  # the full cache only guesses


def test_only_ranked_tasks_enter_the_means():
    paired = pair([run("full", t=[1, 1], u=[0, 0]), run("a", t=[1, 0], u=[1, 1])])
    drawn = bootstrap(paired, 0, 50, ranked=["t"])
    assert drawn.macro.point.tolist() == [1, 0.5] and drawn.ranked == ("t",) and set(drawn.means) == {"t", "u"}


# -- data seeds ------------------------------------------------------------------------------------------------------


def test_seeds_are_strata_and_their_spread_is_reported():
    seeds = ["0", "0", "1", "1", "2", "2"]
    paired = pair([run("a", seeds=seeds, t=[0, 0, 0.5, 0.5, 1, 1]), run("b", seeds=seeds, t=[0.5] * 6)])
    drawn = bootstrap(paired, resamples=100)
    np.testing.assert_allclose(drawn.macro.draws, 0.5)  # all variation is between seeds, none within
    means = seed_means(paired)
    assert {s: m.tolist() for s, m in means.items()} == {"0": [0, 0.5], "1": [0.5, 0.5], "2": [1, 0.5]}
    assert seed_spread(paired).tolist() == pytest.approx([0.5, 0])
    assert seed_spread(pair([run("a", t=[1, 0])])) is None
    # One sample per seed has no spread within: the seeds are then one pool
    lone = pair([run("a", seeds=["0", "1", "2"], t=[0, 0.5, 1])])
    assert len(set(bootstrap(lone, resamples=100).macro.draws[:, 0])) > 1


def test_halves_split_clusters_and_cover_everything():
    clusters = [str(i // 3) for i in range(30)]
    paired = pair([free("a", clusters=clusters, t=range(30), u=range(30))])
    halves = [paired.select(half=h) for h in (0, 1)]
    for t in range(2):
        values = [set(h.scores[t][0]) for h in halves]
        assert values[0] | values[1] == set(range(30)) and not values[0] & values[1]
        assert all({v // 3 * 3 + k for k in range(3)} <= values[0] for v in values[0])
    part = paired.select(policies=[0], tasks=["u"])
    assert part.tasks == ("u",) and part.scores[0].shape == (1, 30)


# -- areas -----------------------------------------------------------------------------------------------------------


def test_hypervolume_on_a_hand_made_frontier():
    rho = [0.5, 0.25, 0.25, 0.0625, 1.0]
    # u = 1, 2, 2, 4, 0; best of those with at least u: (0, 1]: 0.9, (1, 2]: 0.8, (2, 4]: 0.5, beyond: 0
    retention = exactly([0.9, 0.8, 0.3, 0.5, 1.0])
    area = hypervolume(rho, retention, range(5), u_max=5)
    assert area.estimate == pytest.approx((0.9 + 0.8 + 2 * 0.5) / 5) and area.low == pytest.approx(area.high)
    assert hypervolume(rho, retention, [3], u_max=5).estimate == pytest.approx(4 * 0.5 / 5)
    assert hypervolume(rho, retention, [3], u_max=2).estimate == pytest.approx(0.5)  # u_max cuts
    assert hypervolume([0.5], exactly([-0.2]), [0]).estimate == 0  # negative retention counts as 0
    assert hypervolume([math.nan, 2.0], exactly([1, 1]), [0, 1]).estimate == 0  # more bytes than the full cache
    better = hypervolume(rho, exactly([0.9, 0.8, 0.95, 0.5, 1.0]), range(5), u_max=5)
    assert better.estimate == pytest.approx((2 * 0.95 + 2 * 0.5) / 5)


def test_curve_area_by_hand():
    retention = exactly([1.0, 0.8, 0.4])
    area = curve_area([0.5, 0.25, 0.0625], retention, [0, 1, 2], u_max=5)
    # u: 0, 1, 2, 4 with 1, 1, 0.8, 0.4, up to its own end at u = 4
    assert area.value.estimate == pytest.approx((1 + 0.9 + 2 * 0.6) / 4) and area.reach == 4 and not area.complete(5)
    cut = curve_area([0.5, 0.25, 0.0625], retention, [2, 0, 1], u_max=3)
    assert cut.value.estimate == pytest.approx((1 + 0.9 + (0.8 + 0.6) / 2) / 3) and cut.complete(3)
    assert curve_area([1.0, 2.0], exactly([1, 1]), [0, 1]) is None
    assert curve_area([0.5], exactly([0.6]), [0], u_max=1).value.estimate == pytest.approx(0.8)


def test_compression_at_a_tolerance_needs_the_lower_end_too():
    rng = np.random.default_rng(0)
    point = np.array([1.0, 0.995, 0.97, 0.5])
    noise = np.array([0.0, 0.001, 0.05, 0.0])
    retention = Sampled(point, point + noise * rng.normal(size=(4000, 4)))
    rho = [0.5, 0.25, 0.125, 0.0625]
    one, five = (compression_at(rho, retention, range(4), t) for t in (0.01, 0.05))
    assert (one.shown, one.interval.estimate) == (4, 4)
    assert (five.shown, five.interval.estimate) == (4, 8) and (five.interval.low, five.interval.high) == (4, 8)
    assert compression_at(rho, retention, [3], 0.05).shown == 1  # nothing holds: no compression


def test_confident_dominance_needs_bytes_and_score():
    rho, scores = np.array([0.25, 0.5, 0.5, 1.0]), np.array([0.9, 0.5, 0.89, 0.95])
    assert dominators(rho, scores, lambda a, b: scores[a] - scores[b] - 0.05) == [None, 0, None, None]
    assert dominators(rho, scores, lambda a, b: scores[a] - scores[b] - 0.5) == [None] * 4


# -- stacking --------------------------------------------------------------------------------------------------------


def test_the_gain_is_reported_on_the_other_half():
    """With pure noise the best of many looks good on the half that chose it, and not on the other."""
    rng, gains, chosen = np.random.default_rng(4), [], []
    for _ in range(60):
        noise = {f"x{k}": rng.normal(0.5, 0.2, 40) for k in range(8)}
        paired = pair([free("pure", t=rng.normal(0.5, 0.2, 40)), *(free(k, t=v) for k, v in noise.items())])
        gain = stacking_gain(paired, [0.25] * 9, {"p": [0]}, {str(k): [k] for k in range(1, 9)}, 4, resamples=50)
        gains.append(gain.value.interval.estimate)
        half = paired.select(half=0)
        chosen.append(half.scores[0][gain.stack].mean() - half.scores[0][0].mean())
    assert abs(np.mean(gains)) < 0.03 < np.mean(chosen)


def test_gains_take_the_nearest_measured_point_and_nothing_larger():
    scores = {"e50": 0.9, "e20": 0.8, "e10": 0.95, "q": 0.99, "x25": 0.85, "x30": 1.0}
    paired = pair([free(k, t=[v - 0.01, v + 0.01] * 10) for k, v in scores.items()])
    rho = [0.5, 0.2, 0.1, 0.26, 0.25, 0.3]
    gain = stacking_gain(paired, rho, {"e": [0, 1, 2], "q": [3]}, {"x": [4, 5]}, 4, resamples=50)
    assert (gain.pure, gain.stack) == (1, 4)  # of e the point at 20 %; q and x30 are too large
    assert gain.value.interval.estimate == pytest.approx(0.05)
    assert stacking_gain(paired, rho, {"e": [0]}, {"x": [4]}, 4, resamples=50) is None
    lone = pair([free(k, t=[v]) for k, v in scores.items()])
    assert stacking_gain(lone, rho, {"e": [1]}, {"x": [4]}, 4, resamples=50) is None  # one sample has no halves


GRID = [(1.0, 16.0), *((r, 16.0) for r in (0.5, 0.25)), *((1.0, b) for b in (8.0, 4.0))]
GRID += [(r, b) for r in (0.5, 0.25) for b in (8.0, 4.0)]


@pytest.mark.parametrize("g", [0.0, 0.02, -0.01])
def test_the_interaction_rate_is_recovered(g):
    def damage(r, b):
        x, y = -math.log2(r), math.log2(16 / b)
        return 0.05 * x + 0.01 * x * x + 0.01 * y + 0.02 * y * y + g * x * y

    scores = exactly([0.9 - damage(r, b) for r, b in GRID])
    rate = interaction_rate(scores, [r for r, _ in GRID], [b for _, b in GRID], 0, range(1, len(GRID)))
    np.testing.assert_allclose(rate.coefficients, [0.05, 0.01, 0.01, 0.02, g], atol=1e-9)
    assert rate.g.estimate == pytest.approx(g, abs=1e-9)
    # On the slice x + y = 2: minimise over y by brute force
    y = np.linspace(0, 2, 2001)
    total = 0.05 * (2 - y) + 0.01 * (2 - y) ** 2 + 0.01 * y + 0.02 * y**2 + g * (2 - y) * y
    assert rate.split[2.0].estimate == pytest.approx(y[total.argmin()] / 2, abs=0.011)
    assert set(rate.split) == {1.0, 2.0, 3.0, 4.0}
    least, most = np.maximum(0, np.arange(1, 5) - 2) / np.arange(1, 5), np.minimum(2 / np.arange(1, 5), 1)
    shares = np.array([rate.split[u].estimate for u in (1.0, 2.0, 3.0, 4.0)])
    assert rate.at_edge == {1.0 + i for i in np.flatnonzero(np.isclose(shares, least) | np.isclose(shares, most))}
    assert 4.0 in rate.at_edge  # a corner of the grid: nothing to choose from


def test_the_interaction_rate_needs_a_grid():
    line = [(1.0, 16.0), (0.5, 4.0), (0.25, 8.0), (0.125, 16.0), (1.0, 2.0)]
    with pytest.raises(ValueError, match="not identified"):
        interaction_rate(exactly([1] * 5), [r for r, _ in line], [b for _, b in line], 0, range(1, 5))
