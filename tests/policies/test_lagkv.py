"""LagKV against loops over partitions, and StreamingLLM where the budget leaves nothing to choose."""

import statistics

import pytest
import torch
from torch import Tensor

from kvbench import CompressedCache
from kvbench.policies import KV, LagKV, Random, Step, StreamingLLM

SINKS, LAG = 3, 8


def step(*seen: int, prompt: list[int] | None = None) -> Step:
    return Step(0, torch.tensor(prompt or seen), torch.tensor(seen), decoding=prompt is not None)


def weights(x: Tensor, own: list[int], following: list[int]) -> dict[int, float]:
    """x [S, D]: softmax over tokens `own` of the spread of their channels in the range of tokens `following`."""
    spread = {}
    for s in own:
        scaled = []
        for d in range(x.shape[1]):
            channel = [float(x[j, d]) for j in following]
            width = max(channel, default=0.0) - min(channel, default=0.0)
            scaled.append((float(x[s, d]) - min(channel)) / width if width else 0.0)
        spread[s] = statistics.stdev(scaled)
    # Single precision on purpose: tokens that are left may have next to no range, and most weights are then zero.
    shares = torch.tensor(list(spread.values())).softmax(0).tolist()
    return dict(zip(spread, shares, strict=True))


def ranks(keys: Tensor, values: Tensor, held: list[int], seen: int) -> dict[int, int]:
    """Rank, from 0, in its partition of each held token that eviction may choose."""
    parts = [[j for j in held if 0 <= j - SINKS - LAG * p < LAG] for p in range((seen - SINKS) // LAG)]
    found = {}
    for own, following in zip(parts, parts[1:], strict=False):
        by_key, by_value = weights(keys, own, following), weights(values, own, following)
        order = sorted(own, key=lambda s: (by_key[s] + by_value[s], s), reverse=True)
        found.update({s: r for r, s in enumerate(order)})
    return found


def best(keys: Tensor, values: Tensor, held: list[int], seen: int, budget: int) -> list[int]:
    rank = ranks(keys, values, held, seen)
    order = sorted(held, key=lambda s: (s >= SINKS, s in rank, rank.get(s, 0), -s))
    return sorted(order[:budget])


def kept(kv: KV) -> list[list[list[int]]]:
    batch, heads = kv.counts.shape
    return [[[j for j in head if j >= 0] for head in row] for row in kv.position.expand(batch, heads, -1).tolist()]


def padded(keys: Tensor, values: Tensor, *lengths: int) -> KV:
    valid = torch.arange(keys.shape[2]) >= keys.shape[2] - torch.tensor(lengths)[:, None]
    none = keys[:, :, :0]
    kv = KV.of(none, none).append(keys, values, valid, torch.zeros(len(lengths), dtype=torch.int64))
    for held in (kv.keys, kv.values):
        held.tail[~kv.counts.live()] = 1e3  # dead columns may hold anything
    return kv


def tokens(batch: int, amount: int) -> tuple[Tensor, Tensor]:
    """Keys and values whose channels have very different ranges."""
    scale = torch.logspace(-1, 1, 6)
    return torch.randn(batch, 2, amount, 6) * scale + 3, torch.randn(batch, 2, amount, 6) * scale.flip(0)


@pytest.mark.parametrize("budget", [20, 24, 33, 38])
def test_prompts_and_decoding_equal_the_definition(budget):
    keys, values = tokens(3, 80)
    prompt = [46, 39, 27]
    policy, kv = LagKV(budget, SINKS, LAG), padded(keys[:, :, :46], values[:, :, :46], *prompt)
    own = [(keys[b, :, 46 - n :], values[b, :, 46 - n :]) for b, n in enumerate(prompt)]  # without pads
    held = [[list(range(n))] * 2 for n in prompt]
    for t in range(46, 80):
        seen = [n + t - 46 for n in prompt]
        if t > 46:
            new = slice(t - 1, t)
            kv = kv.append(keys[:, :, new], values[:, :, new], seen=torch.tensor(seen) - 1)
            held = [[[*head, n - 1] for head in row] for row, n in zip(held, seen, strict=True)]
        kv = policy(kv, step(*seen, prompt=prompt if t > 46 else None))
        if (t - 46) % LAG == 0:
            held = [[best(own[b][0][h], own[b][1][h], held[b][h], seen[b], budget) for h in range(2)] for b in range(3)]
        assert kept(kv) == held
    for b, h in ((0, 0), (1, 1), (2, 0)):
        assert torch.equal(kv.keys.dense()[b, h, : len(held[b][h])], own[b][0][h, held[b][h]])


def test_every_partition_keeps_its_share():
    keys, values = tokens(1, SINKS + 6 * LAG + 5)
    for share in range(LAG + 1):
        budget = SINKS + 5 * share + LAG + 5
        (heads,) = kept(LagKV(budget, SINKS, LAG)(KV.of(keys, values), step(keys.shape[2])))
        for h, head in enumerate(heads):
            rank = ranks(keys[0, h], values[0, h], list(range(keys.shape[2])), keys.shape[2])
            assert set(rank) & set(head) == {s for s, r in rank.items() if r < share}
            assert len(head) == budget


@pytest.mark.parametrize(("seen", "budget"), [(80, 4), (80, 13), (80, 3 + 8 + 5), (18, 10), (12, 9), (8, 5)])
def test_a_budget_for_less_than_what_is_always_kept_is_streaming(seen, budget):
    keys, values = tokens(1, seen)
    kv = KV.of(keys, values)
    streaming = StreamingLLM(budget, SINKS)(kv, step(seen))
    assert kept(LagKV(budget, SINKS, LAG)(kv, step(seen))) == kept(streaming)


def test_it_acts_at_prompts_and_each_time_a_partition_has_filled():
    policy = LagKV(40, SINKS, LAG)
    assert policy.acts(step(20)) and policy.acts(step(17))
    assert [n for n in range(21, 50) if policy.acts(step(n, n - 7, prompt=[20, 13]))] == [28, 36, 44]


def test_flat_channels_and_equal_tokens_do_not_divide_by_zero():
    keys, values = tokens(1, 60)
    keys[..., 2], values[..., 4] = 7.0, -1.0
    score = LagKV(30, SINKS, LAG).score(KV.of(keys, values), step(60))
    assert score.isfinite().all()
    (heads,) = kept(LagKV(30, SINKS, LAG)(KV.of(keys, values), step(60)))
    assert heads == [best(keys[0, h], values[0, h], list(range(60)), 60, 30) for h in range(2)]
    same = torch.ones(1, 2, 59, 6)  # 7 whole partitions, of which 6 share 12 slots
    newest = [SINKS + LAG * p + i for p in range(6) for i in (6, 7)]
    for head in kept(LagKV(SINKS + 12 + LAG, SINKS, LAG)(KV.of(same, same), step(59)))[0]:
        assert head == [0, 1, 2, *newest, *range(51, 59)]


def test_shift_and_scale_of_a_channel_do_not_matter_but_order_does():
    keys, values = tokens(1, 60)
    policy = LagKV(30, SINKS, LAG)
    expected = policy.score(KV.of(keys, values), step(60))
    moved = keys * torch.tensor([0.5, 2, 4, 8, 1, 0.25]) + torch.tensor([1.0, 0, -3, 5, 0, 2])
    assert torch.equal(policy.score(KV.of(moved, values), step(60)), expected)
    order = torch.cat([torch.arange(SINKS), SINKS + torch.randperm(57)])
    shuffled = policy.score(KV.of(keys[:, :, order], values[:, :, order]), step(60))
    assert not torch.equal(shuffled, expected[..., order])


def test_after_another_evictor_partitions_stay_where_they_were():
    keys, values = tokens(2, 62)
    kv = padded(keys, values, 62, 50)
    first = Random(45, seed=1)(kv, step(62, 50))
    result = kept(LagKV(26, SINKS, LAG)(first, step(62, 50)))
    for b, seen in enumerate((62, 50)):
        for h in range(2):
            x, y = keys[b, h, 62 - seen :], values[b, h, 62 - seen :]
            assert result[b][h] == best(x, y, kept(first)[b][h], seen, 26)


def test_defaults_and_least_budget():
    policy = LagKV(512)
    assert (policy.sinks, policy.lag, policy.min_slots, policy.needs) == (4, 128, 5, {})
    assert LagKV(0.1).slots(None, step(20)).tolist() == [[5]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 4}, r"LagKV: budget=4 is too small: it must be at least 5 \(what the policy protects\)"),
        ({"budget": 50, "sinks": -1}, "LagKV: sinks must be an int of 0 or more tokens, got -1"),
        ({"budget": 50, "sinks": 0.5}, "LagKV: sinks must be an int of 0 or more tokens, got 0.5"),
        ({"budget": 50, "lag": 0}, "LagKV: lag must be an int of at least 1 token, got 0"),
        ({"budget": 50, "lag": 64.0}, "LagKV: lag must be an int of at least 1 token, got 64.0"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        LagKV(**arguments)


def test_in_a_model_the_cache_grows_for_one_partition_at_most(tiny):
    model, _ = tiny
    cache, sizes = CompressedCache(model, LagKV(30, SINKS, LAG)), []
    with torch.no_grad():
        for amount in (50, *[1] * 20):
            model(torch.randint(200, (2, amount)), past_key_values=cache)
            sizes.append(cache.layers[1].kv.counts.even)
    assert sizes == [30, *range(31, 38), *range(30, 38), *range(30, 35)]
