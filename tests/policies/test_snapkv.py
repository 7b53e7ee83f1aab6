"""SnapKV against loops: softmax rows of the window's queries, pooled one slot at a time."""

import math

import pytest
import torch
from torch import Tensor

from kvbench.policies import KV, SnapKV, Step


def oracle(
    keys: Tensor, queries: Tensor, kernel: int, pooling: str, softcap: float | None = None, sinks: Tensor | None = None
) -> list[list[float]]:
    """keys [H, S, D], queries [Hq, w, D] of the last w tokens -> pooled scores of the S - w slots before the window."""
    (heads, slots, _), window = keys.shape, queries.shape[1]
    group, before = len(queries) // heads, slots - window
    pooled = []
    for h in range(heads):
        raw = [0.0] * before
        for g in range(h * group, (h + 1) * group):
            for i in range(window):
                logits = [0.5 * float(queries[g, i].double() @ keys[h, j].double()) for j in range(before + i + 1)]
                if softcap is not None:
                    logits = [softcap * math.tanh(x / softcap) for x in logits]
                total = sum(math.exp(x) for x in logits) + (math.exp(float(sinks[g])) if sinks is not None else 0.0)
                for j in range(before):
                    raw[j] += math.exp(logits[j]) / total / group
        near = [raw[max(0, j - kernel // 2) : j + kernel // 2 + 1] for j in range(before)]
        pooled.append([max(x) if pooling == "max" else sum(x) / kernel for x in near])
    return pooled


def best(scores: list[float], budget: int, window: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], -j))
    return sorted([*order[: budget - window], *range(len(scores), len(scores) + window)])


def sharp(batch: int, heads: int, group: int, tokens: int, window: int) -> tuple[Tensor, Tensor]:
    keys, queries = torch.randn(batch, heads, tokens, 8), 2 * torch.randn(batch, heads * group, window, 8)
    return keys, queries


def step(queries: Tensor | None, *seen: int, **more) -> Step:
    return Step(0, torch.tensor(seen), torch.tensor(seen), queries=queries, scaling=0.5, **more)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize(("window", "kernel"), [(1, 1), (4, 1), (4, 3), (5, 7), (3, 41)])
def test_scores_and_kept_slots_equal_the_definition(group, pooling, window, kernel):
    keys, queries = sharp(2, 2, group, 24, window)
    policy = SnapKV(12, window, kernel, pooling)
    kv, now = KV.of(keys, keys), step(queries, 24, 24)
    score, kept = policy.score(kv, now), policy(kv, now)
    for b in range(2):
        expected = oracle(keys[b], queries[b], kernel, pooling)
        torch.testing.assert_close(score[b, :, : 24 - window], torch.tensor(expected), atol=1e-6, rtol=1e-5)
        assert kept.position[b].tolist() == [best(row, 12, window) for row in expected]
    assert torch.equal(kept.keys.dense(), keys.gather(2, kept.position.long()[..., None].expand(-1, -1, -1, 8)))


def test_the_layers_softcap_and_learned_sinks_are_used():
    keys, queries = sharp(1, 2, 2, 20, 4)
    sinks = torch.tensor([-1.0, 0.0, 1.0, 3.0])
    score = SnapKV(8, 4, 3).score(KV.of(keys, keys), step(queries, 20, softcap=2.0, sinks=sinks))
    expected = torch.tensor(oracle(keys[0], queries[0], 3, "max", 2.0, sinks))
    torch.testing.assert_close(score[0, :, :16], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("pads", [1, 5, 17])
def test_a_padded_row_pools_as_alone(pooling, pads):
    keys, queries = sharp(2, 2, 2, 20, 4)
    valid = torch.arange(20) >= torch.tensor([[0], [pads]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    kv.keys.tail[1, :, 20 - pads :] = 50.0  # dead columns may hold anything
    real = min(4, 20 - pads)
    policy = SnapKV(6, 4, 5, pooling)
    now = step(queries, 20, 20 - pads, query_valid=valid[:, -4:])
    alone, single = KV.of(keys[1:, :, pads:], keys[1:, :, pads:]), step(queries[1:, :, 4 - real :], 20 - pads)
    before = 20 - pads - real
    expected = policy.score(alone, single)[..., :before]
    torch.testing.assert_close(policy.score(kv, now)[1:, :, :before], expected, atol=1e-6, rtol=1e-5)
    kept = policy(kv, now).position
    assert kept[1, :, : min(6, 20 - pads)].tolist() == policy(alone, single).position.expand(-1, 2, -1)[0].tolist()
    assert kept[0].tolist() == [best(row, 6, 4) for row in oracle(keys[0], queries[0], 5, pooling)]


def test_queries_beyond_the_window_do_not_vote():
    keys, queries = sharp(1, 2, 2, 20, 9)
    kv, policy = KV.of(keys, keys), SnapKV(10, 4, 3)
    assert torch.equal(policy.score(kv, step(queries, 20)), policy.score(kv, step(queries[:, :, -4:], 20)))
    assert torch.equal(policy(kv, step(queries, 20)).position, policy(kv, step(queries[:, :, -4:], 20)).position)


def test_a_short_forward_is_its_own_window():
    keys, queries = sharp(1, 2, 2, 20, 2)
    kept = SnapKV(10, 8, 3)(KV.of(keys, keys), step(queries, 20))
    assert kept.position[0].tolist() == [best(row, 10, 2) for row in oracle(keys[0], queries[0], 3, "max")]


def test_never_while_decoding():
    keys, queries = sharp(1, 2, 1, 20, 1)
    kv = KV.of(keys, keys)
    assert SnapKV(5, 1)(kv, step(queries, 20, decoding=True)) is kv
    assert SnapKV(5, 1)(kv, step(queries, 20)).counts.even == 5


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_equal_keys_tie_and_the_most_recent_win(pooling):
    keys, queries = torch.randn(8).expand(1, 2, 30, 8), torch.randn(1, 4, 4, 8)
    kept = SnapKV(10, 4, 1, pooling)(KV.of(keys, keys), step(queries, 30))
    assert kept.position.tolist() == [[list(range(20, 30))] * 2]


def test_average_counts_the_padding_and_maximum_does_not():
    keys, queries = torch.zeros(1, 1, 12, 4), torch.zeros(1, 1, 2, 4)
    average = SnapKV(5, 2, 5, "avg").score(KV.of(keys, keys), step(queries, 12))[0, 0, :10]
    flat = 1 / 11 + 1 / 12
    expected = torch.tensor([3, 4, 5, 5, 5, 5, 5, 5, 4, 3]) / 5 * flat
    torch.testing.assert_close(average, expected)
    largest = SnapKV(5, 2, 5, "max").score(KV.of(keys, keys), step(queries, 12))[0, 0, :10]
    torch.testing.assert_close(largest, torch.full((10,), flat))


def test_defaults_and_needs():
    policy = SnapKV(100)
    assert (policy.window, policy.kernel, policy.pooling, policy.needs) == (32, 7, "max", {"queries": 32})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 31}, r"budget=31 is too small: it must be at least 32 \(what the policy protects\)"),
        ({"budget": 50, "window": 0}, "window must be an int of at least 1 token, got 0"),
        ({"budget": 50, "window": 0.5}, "window must be an int of at least 1 token, got 0.5"),
        ({"budget": 50, "kernel": 4}, "kernel must be an odd int of at least 1 slot, got 4"),
        ({"budget": 50, "kernel": -1}, "kernel must be an odd int of at least 1 slot, got -1"),
        ({"budget": 50, "pooling": "mean"}, "pooling must be 'max' or 'avg', got 'mean'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        SnapKV(**arguments)


def test_without_queries_it_says_so():
    keys = torch.randn(1, 2, 40, 8)
    with pytest.raises(ValueError, match="needs the last queries"):
        SnapKV(35)(KV.of(keys, keys), step(None, 40))
