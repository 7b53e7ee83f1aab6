"""LookaheadKV against loops: softmax rows of soft tokens, averaged one weight at a time."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvbench.policies import KIVI, KV, LookaheadKV, Step
from kvbench.policies.interface import Probe, SoftTokens

SOFT, WIDTH = 3, 24


def oracle(keys: Tensor, queries: Tensor, own: Tensor, kernel: int, suffix: int) -> list[list[float]]:
    """keys [H, S, D], soft queries [Hq, n, D] and keys [H, n, D] -> scores of the S - suffix slots."""
    (heads, slots, _), group = keys.shape, len(queries) // len(keys)
    every, before = torch.cat([keys, own], 1).double(), slots - suffix
    scores = []
    for h in range(heads):
        raw = [0.0] * before
        for g in range(h * group, (h + 1) * group):
            for i in range(SOFT):
                exps = [math.exp(0.5 * x) for x in (every[h, : slots + i + 1] @ queries[g, i].double()).tolist()]
                raw = [old + x / sum(exps) / SOFT / group for old, x in zip(raw, exps[:before], strict=True)]
        scores.append([max(raw[max(0, s - kernel // 2) : s + kernel // 2 + 1]) for s in range(before)])
    return scores


def best(scores: list[float], budget: int, slots: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda s: (-scores[s], -s))
    return sorted([*order[: budget - (slots - len(scores))], *range(len(scores), slots)])


def case(*lengths: int, group: int = 2, heads: int = 2) -> tuple[KV, Step]:
    """Rows of so many tokens, at most 24; whatever is not real is large and must not matter."""
    batch, seen = len(lengths), torch.tensor(lengths)
    keys = torch.randn(batch, heads, WIDTH, 8)
    valid = torch.arange(WIDTH) >= WIDTH - seen[:, None]
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros_like(seen))
    kv.keys.tail.masked_fill_(~kv.counts.live()[..., None], 40.0)
    probe = Probe(
        2 * torch.randn(batch, heads * group, SOFT, 8), torch.randn(batch, heads, SOFT, 8),
        seen[:, None] + torch.arange(SOFT), torch.ones(batch, SOFT, dtype=torch.bool),
    )  # fmt: skip
    return kv, Step(0, seen, seen, scaling=0.5, probe=probe)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(("kernel", "suffix"), [(1, 0), (5, 0), (1, 4), (7, 4), (41, 1)])
def test_scores_and_kept_slots_equal_the_definition(group, kernel, suffix):
    kv, step = case(24, 17, group=group)
    policy = LookaheadKV(9, kernel=kernel, suffix=suffix)
    score, kept = policy.score(kv, step), policy(kv, step).position
    assert score.dtype == torch.float32
    for b, slots in enumerate(step.seen.tolist()):
        keys = kv.keys.dense()[b, :, :slots]
        expected = oracle(keys, step.probe.queries[b], step.probe.keys[b], kernel, suffix)
        torch.testing.assert_close(score[b, :, : slots - suffix], torch.tensor(expected), atol=1e-5, rtol=1e-5)
        assert kept[b].tolist() == [best(row, 9, slots) for row in expected]


@pytest.mark.parametrize("policy", [LookaheadKV(6), LookaheadKV(6, kernel=5, suffix=3)], ids=str)
@pytest.mark.parametrize("length", [2, 7, 20])
def test_a_padded_row_scores_as_alone(policy, length):
    kv, step = case(24, length)
    probe, seen = step.probe, step.seen[1:]
    single = Probe(probe.queries[1:], probe.keys[1:], probe.position[1:], probe.valid[1:])
    keys = kv.keys.dense()[1:, :, :length]
    alone, now = KV.of(keys, keys), replace(step, prompt=seen, seen=seen, probe=single)
    expected = policy(alone, now).position.expand(-1, 2, -1)[0]
    assert policy(kv, step).position[1, :, : expected.shape[1]].tolist() == expected.tolist()
    score = policy.score(kv, step)[1:, :, :length]
    torch.testing.assert_close(score, policy.score(alone, now), atol=1e-6, rtol=1e-5)


def test_soft_tokens_that_do_not_count_have_no_say():
    kv, step = case(24, 17)
    probe = step.probe
    junk = Probe(
        *(torch.cat([x, torch.full_like(x[:, :, :2], 40.0)], 2) for x in (probe.queries, probe.keys)),
        torch.cat([probe.position, probe.position[:, -1:] + torch.tensor([1, 2])], 1),
        torch.cat([probe.valid, torch.zeros(2, 2, dtype=torch.bool)], 1),
    )
    policy = LookaheadKV(9)
    torch.testing.assert_close(policy.score(kv, replace(step, probe=junk)), policy.score(kv, step))


def test_equal_keys_tie_and_the_most_recent_win():
    _, step = case(24)
    flat = KV.of(torch.ones(1, 2, 24, 8), torch.ones(1, 2, 24, 8))
    assert LookaheadKV(7)(flat, step).position.tolist() == [[list(range(17, 24))] * 2]


def test_when_it_acts():
    kv, step = case(24)
    assert LookaheadKV(24)(kv, step) is kv and "position" not in kv.columns
    assert LookaheadKV(5)(kv, replace(step, decoding=True, probe=None)) is kv
    assert (LookaheadKV(9) | KIVI(2, 8, 8))(kv, step).counts.even == 9


def test_defaults_and_needs():
    assert LookaheadKV(100).needs == {"probe": SoftTokens("proving")}
    assert LookaheadKV(0.5, modules="trained/here").needs == {"probe": SoftTokens("trained/here")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 31, "suffix": 32}, r"LookaheadKV: budget=31 is too small: it must be at least 32"),
        ({"budget": 50, "suffix": -1}, "LookaheadKV: suffix must be an int of 0 or more tokens, got -1"),
        ({"budget": 50, "kernel": 2}, "LookaheadKV: kernel must be an odd int of at least 1 slot, got 2"),
        ({"budget": 50, "modules": ""}, "LookaheadKV: modules must be a trained folder or the name of one, got ''"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        LookaheadKV(**arguments)


def test_without_soft_tokens_it_says_so():
    kv, step = case(24)
    with pytest.raises(ValueError, match="needs a probe of the answer"):
        LookaheadKV(5)(kv, replace(step, probe=None))
