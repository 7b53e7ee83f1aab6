"""KeyDiff against the pairwise similarities it stands for."""

import math

import pytest
import torch
from torch import Tensor

from kvbench.policies import KV, KeyDiff, Step


def step(*seen: int, decoding: bool = False) -> Step:
    return Step(layer=0, prompt=torch.tensor(seen), seen=torch.tensor(seen), decoding=decoding)


def clustered(heads: int, tokens: int, dim: int = 8) -> Tensor:
    """[1, H, S, D] keys around a common direction, norms spread over two decades."""
    keys = torch.randn(1, heads, tokens, dim) + 2 * torch.randn(1, heads, 1, dim)
    return keys * 10 ** (2 * torch.rand(1, heads, tokens, 1) - 1)


def cosine(a: Tensor, b: Tensor) -> float:
    dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    lengths = [math.sqrt(sum(x * x for x in v.tolist())) for v in (a, b)]
    return dot / (max(lengths[0], 1e-8) * max(lengths[1], 1e-8))


def best(scores: list[float], budget: int, sinks: int = 0, recent: int = 0) -> list[int]:
    """Kept slots by the definition: protected ones, then the highest scores, ties to the newest."""
    last = len(scores)
    protected = {s for s in range(last) if s < sinks or s >= last - recent}
    others = sorted((s for s in range(last) if s not in protected), key=lambda s: (-scores[s], -s))
    return sorted([*protected, *others[: budget - len(protected)]])


@pytest.mark.parametrize("budget", [1, 7, 18])
@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (1, 0), (0, 1)])
def test_anchor_is_the_row_sum_of_pairwise_similarities(budget, sinks, recent):
    keys = clustered(3, 19)
    policy = KeyDiff(budget, recent, sinks)
    score = policy.score(KV.of(keys, keys), step(19))
    assert score.dtype == torch.float32
    kept = policy(KV.of(keys, keys), step(19)).position
    for h in range(3):
        sums = [-sum(cosine(keys[0, h, i], keys[0, h, j]) for j in range(19)) for i in range(19)]
        assert score[0, h].argsort().tolist() == sorted(range(19), key=sums.__getitem__)
        assert kept[0, h].tolist() == best(sums, budget, sinks, recent)


def test_raw_anchor_is_the_mean_key_and_another_ranking():
    keys = clustered(2, 25)
    raw = KeyDiff(9, anchor="raw").score(KV.of(keys, keys), step(25))
    for h in range(2):
        mean = torch.stack([sum(keys[0, h, :, d].tolist()) / 25 * torch.ones(()) for d in range(8)])
        expected = torch.tensor([-cosine(keys[0, h, s], mean) for s in range(25)])
        torch.testing.assert_close(raw[0, h], expected, atol=1e-5, rtol=1e-5)
    normalized = KeyDiff(9).score(KV.of(keys, keys), step(25))
    assert not torch.equal(raw.argsort(), normalized.argsort())


def test_neither_scale_nor_rotation_nor_order_of_the_keys_matters():
    keys = clustered(2, 20)
    score = KeyDiff(5).score(KV.of(keys, keys), step(20))
    scaled = keys * torch.logspace(-2, 2, 20)[:, None]
    torch.testing.assert_close(KeyDiff(5).score(KV.of(scaled, keys), step(20)), score, atol=1e-5, rtol=1e-4)
    rotated = keys @ torch.linalg.qr(torch.randn(8, 8)).Q
    torch.testing.assert_close(KeyDiff(5).score(KV.of(rotated, keys), step(20)), score, atol=1e-5, rtol=1e-4)
    order = torch.randperm(20)
    moved = KeyDiff(5).score(KV.of(keys[:, :, order], keys), step(20))
    torch.testing.assert_close(moved, score[..., order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("anchor", ["normalized", "raw"])
@pytest.mark.parametrize("dim", [4, 33, 64])
def test_equal_keys_tie_and_the_most_recent_win(anchor, dim):
    keys = torch.randn(dim).expand(1, 2, 77, dim)
    kv = KeyDiff(10, sinks=3, anchor=anchor)(KV.of(keys, keys), step(77))
    assert kv.position.tolist() == [[[0, 1, 2, *range(70, 77)]] * 2]
    zeros = torch.zeros(1, 1, 9, dim)
    assert KeyDiff(4, anchor=anchor)(KV.of(zeros, zeros), step(9)).position.tolist() == [[[5, 6, 7, 8]]]


@pytest.mark.parametrize("anchor", ["normalized", "raw"])
def test_dead_columns_and_pads_are_no_part_of_the_mean(anchor):
    keys = torch.cat([clustered(2, 16), clustered(2, 16)])
    valid = torch.arange(16) >= torch.tensor([[0], [6]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    kv.keys.tail[1, :, 10:] = 1e4
    alone = KV.of(keys[1:, :, 6:], keys[1:, :, 6:])
    policy = KeyDiff(5, recent=1, anchor=anchor)
    expected = policy.score(alone, step(10))
    torch.testing.assert_close(policy.score(kv, step(16, 10))[1:, :, :10], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(policy(kv, step(16, 10)).position[1:], policy(alone, step(10)).position)


def test_decoding_ranks_survivors_and_the_new_token_together():
    keys = clustered(2, 30)
    policy = KeyDiff(8)
    kv = policy(KV.of(keys[:, :, :20], keys[:, :, :20]), step(20))
    held = [list(row) for row in kv.position[0].tolist()]
    for t in range(20, 30):
        kv = kv.append(keys[:, :, t : t + 1], keys[:, :, t : t + 1], seen=torch.tensor([t]))
        kv = policy(kv, step(t + 1, decoding=True))
        for h in range(2):
            held[h].append(t)
            sums = [-sum(cosine(keys[0, h, i], keys[0, h, j]) for j in held[h]) for i in held[h]]
            held[h] = [held[h][s] for s in best(sums, 8)]
        assert kv.position[0].tolist() == held
    assert torch.equal(kv.keys.dense(), keys.gather(2, kv.position.long()[..., None].expand(-1, -1, -1, 8)))


@pytest.mark.parametrize("recent", [0, 1])
@pytest.mark.parametrize("block", [1, 5, 13, 64])
def test_blocks_rank_survivors_and_the_block_against_the_anchor_of_both(block, recent):
    keys = clustered(2, 40)
    policy, kv = KeyDiff(9, recent, sinks=1), KV.of(keys[:, :, :0], keys[:, :, :0])
    held: list[list[int]] = [[], []]
    for start in range(0, 40, block):
        stop = min(start + block, 40)
        kv = kv.append(keys[:, :, start:stop], keys[:, :, start:stop], seen=torch.tensor([start]))
        kv = policy(kv, step(stop))
        for h in range(2):
            held[h].extend(range(start, stop))
            if len(held[h]) > 9:
                sums = [-sum(cosine(keys[0, h, i], keys[0, h, j]) for j in held[h]) for i in held[h]]
                held[h] = [held[h][s] for s in best(sums, 9, 1, recent)]
        assert kv.position.expand(1, 2, -1)[0].tolist() == held
    assert (kv.position.tolist() == policy(KV.of(keys, keys), step(40)).position.tolist()) == (block == 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 5, "recent": 4, "sinks": 2}, "budget=5 is too small: it must be at least 6"),
        ({"budget": 5, "recent": -1}, "recent must be an int of 0 or more tokens, got -1"),
        ({"budget": 5, "sinks": 0.1}, "sinks must be an int of 0 or more tokens, got 0.1"),
        ({"budget": 5, "anchor": "mean"}, "anchor must be 'normalized' or 'raw', got 'mean'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        KeyDiff(**arguments)
