"""Statistics against hand-computed values, published tables, brute force and simulation."""

import itertools
import math

import numpy as np
import pytest

from kvbench.stats import (
    Bootstrap,
    Interval,
    Row,
    Run,
    Sampled,
    aa_floor,
    analytic_se,
    bootstrap,
    detectable_difference,
    difference,
    frontier_probability,
    interaction,
    mcnemar,
    pair,
    pareto_front,
    percentiles,
    resample_weights,
    rule_of_three,
)


def run(name, query_aware=False, sha="p", clusters=None, **tasks):
    """A run from lists of scores; sample ids are positions."""
    rows = {
        t: {str(i): Row(s, f"{sha}{i}", clusters and clusters[i]) for i, s in enumerate(scores)}
        for t, scores in tasks.items()
    }
    return Run(name, query_aware, rows)


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
    assert drawn.tasks["t"][1].estimate == 0.5


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
        paired = pair([run("a", t=a[0].tolist(), u=a[1].tolist()), run("b", t=b[0].tolist(), u=b[1].tolist())])
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
    assert floor.flips == pytest.approx(2 / 6)
    assert floor.value == pytest.approx((1 / 4 + 1 / 2) / 2)
    same = aa_floor(run("1", t=[1, 0, 1]), run("2", t=[1, 0, 1]))
    assert (same.flips, same.value, same.bound) == (0, 0, 1.0)


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
