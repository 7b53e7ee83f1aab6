"""ExpectedAttention against rotation matrices written out, and against sampled queries."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvbench.kernels.rotation import rotate
from kvbench.policies import KV, ExpectedAttention, Step
from kvbench.policies.interface import Moments

DIM, SCALING = 8, 0.5
FREQUENCY = torch.tensor([1.0, 0.3, 0.02])  # the last two dims do not turn


def moments(batch: int, query_heads: int, strength: float = 1.0) -> Moments:
    mean, root = torch.randn(batch, query_heads, DIM), torch.randn(batch, query_heads, DIM, DIM)
    return Moments(2 * mean, strength * root @ root.transpose(-1, -2))


def step(found: Moments | None, *seen: int, **more) -> Step:
    at = torch.tensor(seen)
    return Step(0, at, at, scaling=SCALING, moments=found, inverse_frequency=FREQUENCY, **more)


def rotation(position: int) -> Tensor:
    """[D, D] float64: RoPE at one position."""
    matrix, half = torch.eye(DIM, dtype=torch.float64), len(FREQUENCY)
    for j, f in enumerate(FREQUENCY.tolist()):
        angle = position * f
        matrix[j, j] = matrix[j + half, j + half] = math.cos(angle)
        matrix[j, j + half], matrix[j + half, j] = -math.sin(angle), math.sin(angle)
    return matrix


def oracle(
    keys: Tensor,
    values: Tensor,
    mean: Tensor,
    covariance: Tensor,
    seen: int,
    policy: ExpectedAttention,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """keys, values [H, S, D], mean [Hq, D], covariance [Hq, D, D] -> [H, S], NaN at the sinks."""
    heads, slots, _ = keys.shape
    group = len(mean) // heads
    average = sum(rotation(seen + t) for t in range(policy.future)) / policy.future
    score = torch.full((heads, slots), math.nan, dtype=torch.float64)
    for h in range(heads):
        attention = [0.0] * slots
        for g in range(h * group, (h + 1) * group):
            m = average @ mean[g].double()
            c = average @ covariance[g].double() @ average.T if policy.covariance else torch.zeros(DIM, DIM).double()
            z = []
            for k in keys[h, policy.sinks :].double():
                logit = float(m @ k) * SCALING + float(k @ c @ k) * SCALING**2 / 2
                z.append(logit if softcap is None else softcap * math.tanh(logit / softcap))
            total = sum(map(math.exp, z)) + (0.0 if sinks is None else math.exp(float(sinks[g])))
            for s, logit in enumerate(z, policy.sinks):
                attention[s] += math.exp(logit) / total / group
        for s in range(policy.sinks, slots):
            norm = float(values[h, s].double().norm()) if policy.value_norm else 1.0
            score[h, s] = (attention[s] + (policy.epsilon if policy.value_norm else 0.0)) * norm
    return score


def best(score: Tensor, budget: int, sinks: int) -> list[int]:
    order = sorted(range(sinks, len(score)), key=lambda s: (-float(score[s]), -s))
    return sorted([*range(sinks), *order[: budget - sinks]])


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sinks": 0, "future": 1},
        {"sinks": 3, "future": 40, "epsilon": 0.0},
        {"future": 7, "covariance": False, "epsilon": 0.5},
        {"future": 7, "value_norm": False},
    ],
    ids=str,
)
def test_scores_and_kept_slots_equal_the_definition(group, options):
    keys, values = torch.randn(2, 2, 20, DIM), torch.randn(2, 2, 20, DIM)
    found, policy = moments(2, 2 * group), ExpectedAttention(9, **options)
    kv, now = KV.of(keys, values), step(found, 20, 20)
    score, kept = policy.score(kv, now), policy(kv, now)
    assert score.dtype == torch.float32
    for b in range(2):
        expected = oracle(keys[b], values[b], found.mean[b], found.covariance[b], 20, policy)
        torch.testing.assert_close(
            score[b, :, policy.sinks :].double(), expected[:, policy.sinks :], atol=1e-6, rtol=1e-4
        )
        assert kept.position[b].tolist() == [best(row, 9, policy.sinks) for row in expected]
    assert torch.equal(kept.values.dense(), values.gather(2, kept.position.long()[..., None].expand(-1, -1, -1, DIM)))


def test_the_layers_softcap_and_learned_sinks_are_used():
    keys, found, learned = torch.randn(1, 2, 20, DIM), moments(1, 4), torch.tensor([-1.0, 0.0, 1.0, 3.0])
    policy = ExpectedAttention(9, future=5)
    score = policy.score(KV.of(keys, keys), step(found, 20, softcap=2.0, sinks=learned))
    expected = oracle(keys[0], keys[0], found.mean[0], found.covariance[0], 20, policy, 2.0, learned)
    torch.testing.assert_close(score[0, :, 4:].double(), expected[:, 4:], atol=1e-6, rtol=1e-4)


def test_the_logits_are_those_of_sampled_queries():
    """log E exp(scaling q . k) over 400,000 queries, each turned to the one position to come."""
    keys, found = torch.randn(1, 1, 12, DIM), moments(1, 1, strength=0.1)
    sampled = torch.distributions.MultivariateNormal(found.mean[0, 0], found.covariance[0, 0] + 1e-6 * torch.eye(DIM))
    queries = sampled.sample((400_000,))[None, None]
    turned = rotate(queries, torch.full((1, 1, 1), 12), FREQUENCY)[0, 0]
    logits = (turned @ keys[0, 0].T * SCALING).logsumexp(0) - math.log(len(turned))
    policy = ExpectedAttention(9, sinks=0, future=1, value_norm=False)
    score = policy.score(KV.of(keys, keys), step(found, 12))[0, 0]
    torch.testing.assert_close(score.log(), logits.log_softmax(0), atol=0.02, rtol=0)


def test_without_spread_it_is_the_attention_of_the_mean_query():
    keys, found = torch.randn(1, 2, 20, DIM), moments(1, 4)
    policy = ExpectedAttention(9, sinks=0, future=1, value_norm=False)
    still = Moments(found.mean, torch.zeros_like(found.covariance))
    turned = rotate(found.mean[:, :, None], torch.full((1, 1, 1), 20), FREQUENCY)
    now = step(still, 20, softcap=3.0, sinks=torch.tensor([-1.0, 0.0, 1.0, 3.0]))
    attention = now.attention_of(KV.of(keys, keys), turned, torch.tensor([[20]]))  # [1, 4, 1, 20]
    score = policy.score(KV.of(keys, keys), now)
    torch.testing.assert_close(score, attention[:, :, 0].view(1, 2, 2, 20).mean(2))
    without = replace(policy, covariance=False).score(KV.of(keys, keys), replace(now, moments=found))
    torch.testing.assert_close(without, score)


def test_a_values_norm_counts_linearly():
    keys, values, found = torch.randn(1, 2, 20, DIM), torch.randn(1, 2, 20, DIM), moments(1, 4)
    factor = torch.rand(1, 2, 20) + 0.5
    policy = ExpectedAttention(9)
    score, scaled = (policy.score(KV.of(keys, v), step(found, 20)) for v in (values, values * factor[..., None]))
    torch.testing.assert_close(scaled, score * factor)


@pytest.mark.parametrize("pads", [1, 9, 15, 17])
def test_a_padded_row_is_scored_as_alone(pads):
    keys, values, found = torch.randn(2, 2, 20, DIM), torch.randn(2, 2, 20, DIM), moments(2, 4)
    valid = torch.arange(20) >= torch.tensor([[0], [pads]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, values, valid, torch.zeros(2, dtype=torch.int64))
    kv.keys.tail[1, :, 20 - pads :] = 1e30  # dead columns may hold anything
    kv.values.tail[1, :, 20 - pads :] = 1e30
    single = Moments(found.mean[1:], found.covariance[1:])
    policy = ExpectedAttention(6, future=9)
    alone, its_step = KV.of(keys[1:, :, pads:], values[1:, :, pads:]), step(single, 20 - pads)
    now = step(found, 20, 20 - pads)
    score, expected = policy.score(kv, now)[1:, :, : 20 - pads], policy.score(alone, its_step)
    torch.testing.assert_close(score[..., 4:], expected[..., 4:], atol=1e-6, rtol=1e-5)
    kept, kept_alone = policy(kv, now).position[1], policy(alone, its_step).position.expand(1, 2, -1)[0]
    assert kept[:, : kept_alone.shape[-1]].tolist() == kept_alone.tolist()
    assert (kept[:, kept_alone.shape[-1] :] == -1).all()


def test_after_another_evictor_the_rest_is_scored():
    keys, found, policy = torch.randn(1, 2, 20, DIM), moments(1, 4), ExpectedAttention(6)
    kept = torch.tensor([[[0, 2, 5, 6, 9, 11, 12, 17], [4, 5, 6, 7, 8, 9, 18, 19]]])
    score = policy.score(KV.of(keys, keys).gather(kept), step(found, 20))
    for h in range(2):
        sinks = int((kept[0, h] < 4).sum())
        local = replace(policy, sinks=sinks)
        part = keys[0, h : h + 1, kept[0, h]]
        mean, covariance = found.mean[0, 2 * h : 2 * h + 2], found.covariance[0, 2 * h : 2 * h + 2]
        expected = oracle(part, part, mean, covariance, 20, local)[0]
        torch.testing.assert_close(score[0, h, sinks:].double(), expected[sinks:], atol=1e-6, rtol=1e-4)


def test_equal_keys_and_values_tie_and_the_most_recent_win():
    keys = torch.randn(DIM).expand(1, 2, 30, DIM)
    kept = ExpectedAttention(10)(KV.of(keys, keys), step(moments(1, 4), 30))
    assert kept.position.tolist() == [[[0, 1, 2, 3, *range(24, 30)]] * 2]


def test_never_while_decoding():
    keys = torch.randn(1, 2, 20, DIM)
    kv, now = KV.of(keys, keys), step(moments(1, 4), 20)
    assert ExpectedAttention(5)(kv, replace(now, decoding=True)) is kv
    assert ExpectedAttention(5)(kv, now).counts.even == 5


def test_without_moments_it_says_so():
    keys = torch.randn(1, 2, 20, DIM)
    with pytest.raises(ValueError, match="needs the moments of the prompt's queries"):
        ExpectedAttention(5)(KV.of(keys, keys), step(None, 20))
    assert ExpectedAttention(9, sinks=7).needs == {"moments": 7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 3}, r"budget=3 is too small: it must be at least 4 \(what the policy protects\)"),
        ({"budget": 9, "sinks": -1}, "sinks must be an int of 0 or more tokens, got -1"),
        ({"budget": 9, "future": 0}, "future must be an int of 1 or more tokens, got 0"),
        ({"budget": 9, "future": 0.5}, "future must be an int of 1 or more tokens, got 0.5"),
        ({"budget": 9, "epsilon": -0.1}, "epsilon must be a number of at least 0, got -0.1"),
        ({"budget": 9, "epsilon": float("nan")}, "epsilon must be a number of at least 0, got nan"),
        ({"budget": 9, "covariance": 1}, "covariance must be true or false, got 1"),
        ({"budget": 9, "value_norm": None}, "value_norm must be true or false, got None"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExpectedAttention(**arguments)
