"""WindowKV against loops over review windows, query heads and queries."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvbench.policies import KV, Random, Step, WindowKV

SCALING = 0.5


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x - max(logits)) for x in logits)
    return [math.exp(x - max(logits)) / total for x in logits]


def oracle(keys: Tensor, queries: Tensor, policy: WindowKV) -> list[float]:
    """keys [H, S, D], queries [Hq, w, D] of the last w tokens -> score of each slot before the window."""
    before, group = keys.shape[1] - queries.shape[1], len(queries) // len(keys)
    raw = [[0.0] * before for _ in queries]
    for g, row in enumerate(raw):
        for i, q in enumerate(queries[g]):
            weights = softmax((SCALING * q.double() @ keys[g // group, : before + i + 1].double().T).tolist())
            row[:] = [a + b for a, b in zip(row, weights, strict=False)]
    scores: list[float] = []
    for start in range(0, before, policy.review):
        values = []
        for row in raw:
            part = sorted(row[start : min(start + policy.review, before)], reverse=True)
            values += part[: policy.review // 2] if policy.strategy == "max" else part
        scores += [sum(values) / len(values)] * (min(start + policy.review, before) - start)
    return scores


def best(scores: list[float], budget: int, window: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], -j))
    return sorted([*order[: budget - window], *range(len(scores), len(scores) + window)])


def sharp(batch: int, heads: int, group: int, tokens: int, window: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads, tokens, 8), 2 * torch.randn(batch, heads * group, window, 8)


def step(queries: Tensor | None, *seen: int, **more) -> Step:
    return Step(0, torch.tensor(seen), torch.tensor(seen), queries=queries, scaling=SCALING, **more)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("strategy", ["max", "average"])
@pytest.mark.parametrize(("tokens", "window", "review"), [(44, 4, 8), (46, 5, 4), (45, 4, 7)])
def test_scores_and_kept_slots_equal_the_definition(group, strategy, tokens, window, review):
    keys, queries = sharp(2, 2, group, tokens, window)
    policy = WindowKV(24, window, review, strategy)
    kv, now = KV.of(keys, keys), step(queries, tokens, tokens)
    score, kept = policy.score(kv, now), policy(kv, now)
    assert kept.position.shape == (2, 1, 24)  # one list for all heads
    for b in range(2):
        expected = oracle(keys[b], queries[b], policy)
        torch.testing.assert_close(score[b, 0, : tokens - window], torch.tensor(expected), atol=1e-6, rtol=1e-5)
        assert kept.position[b, 0].tolist() == best(expected, 24, window)
    assert torch.equal(kept.keys.dense(), keys.gather(2, kept.position.long()[..., None].expand(-1, 2, -1, 8)))


def test_windows_are_kept_whole_but_for_the_newest_slots_of_the_last():
    keys, queries = sharp(1, 2, 2, 68, 4)
    kept = WindowKV(4 + 3 * 8 + 5, 4)(KV.of(keys, keys), step(queries, 68)).position[0, 0, :-4]
    parts = {n: kept[kept // 8 == n].tolist() for n in (kept // 8).unique().tolist()}
    whole = [n for n, part in parts.items() if len(part) == 8]
    (cut,) = parts.keys() - whole
    assert len(whole) == 3 and parts[cut] == list(range(8 * cut + 3, 8 * cut + 8))


@pytest.mark.parametrize("strategy", ["max", "average"])
@pytest.mark.parametrize("pads", [1, 9, 41])
def test_a_padded_row_is_scored_as_alone(strategy, pads):
    keys, queries = sharp(2, 2, 2, 44, 4)
    valid = torch.arange(44) >= torch.tensor([[0], [pads]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    kv.keys.tail[1, :, 44 - pads :] = 50.0  # dead columns may hold anything
    policy, real = WindowKV(16, 4, strategy=strategy), min(4, 44 - pads)
    now = step(queries, 44, 44 - pads, query_valid=valid[:, -4:])
    alone, single = KV.of(keys[1:, :, pads:], keys[1:, :, pads:]), step(queries[1:, :, 4 - real :], 44 - pads)
    before = 44 - pads - real
    expected = policy.score(alone, single)[..., :before]
    torch.testing.assert_close(policy.score(kv, now)[1:, :, :before], expected, atol=1e-6, rtol=1e-5)
    kept = policy(kv, now).position
    assert kept[1, 0, : min(16, 44 - pads)].tolist() == policy(alone, single).position[0, 0].tolist()
    assert kept[0, 0].tolist() == best(oracle(keys[0], queries[0], policy), 16, 4)


def layers(count: int, tokens: int, window: int, **more) -> tuple[list[KV], list[Step]]:
    kvs, steps = [], []
    for i in range(count):
        keys, queries = sharp(1, 2, 2, tokens, window)
        kvs.append(KV.of(keys, keys))
        steps.append(replace(step(queries, tokens, **more), layer=i, order=i, layers=count))
    return kvs, steps


def test_the_first_layer_of_a_group_scores_for_all():
    kvs, steps = layers(7, 60, 4)
    policy = WindowKV(24, 4, layer_group=3, beta=3)
    kept = policy.over_layers(kvs, steps)
    for i, kv in enumerate(kept):
        first = min(i // 3, 1) * 3  # the layer left over is in the last group
        queries = steps[first].queries
        assert queries is not None
        expected = best(oracle(kvs[first].keys.dense()[0], queries[0], policy), 24, 4)
        assert kv.position.tolist() == [[expected]]
        assert torch.equal(kv.keys.dense(), kvs[i].keys.dense()[:, :, expected])
    alone = replace(policy, layer_group=1, beta=1).over_layers(kvs, steps)
    assert len({str(kv.position.tolist()) for kv in alone}) > 4


def test_a_group_shares_windows_where_its_layers_hold_different_slots():
    kvs, steps = layers(2, 60, 4)
    kvs = [Random(40)(kv, step) for kv, step in zip(kvs, steps, strict=True)]
    policy = WindowKV(20, 4, layer_group=2, beta=2)
    raw, values = steps[0].attention(kvs[0])[0].sum(1).tolist(), {}
    for g, row in enumerate(raw):  # query head g reads the list of key-value head g // 2
        own: dict[int, list[float]] = {}
        for p, x in zip(kvs[0].position[0, g // 2, :-4].tolist(), row, strict=False):
            own.setdefault(p // 8, []).append(x)
        for n, part in own.items():
            values.setdefault(n, []).extend(sorted(part, reverse=True)[:4])
    by_window = {n: sum(part) / len(part) for n, part in values.items()}
    kept = policy.over_layers(kvs, steps)[1].position[0]
    for h, held in enumerate(kvs[1].position[0].tolist()):
        scores = [by_window.get(p // 8, 0.0) for p in held[:-4]]
        assert kept[h].tolist() == [held[s] for s in best(scores, 20, 4)]


def test_nothing_happens_within_the_budget_nor_while_decoding():
    kvs, steps = layers(4, 30, 4)
    policy = WindowKV(30, 4, layer_group=2, beta=2)
    assert all(a is b for a, b in zip(policy.over_layers(kvs, steps), kvs, strict=True))
    policy = WindowKV(20, 4, layer_group=2, beta=2)
    decoding = [replace(s, decoding=True, queries=None) for s in steps]
    assert all(a is b for a, b in zip(policy.over_layers(kvs, decoding), kvs, strict=True))


@pytest.mark.parametrize("count", [1, 4, 8, 15, 16, 24, 32, 37])
@pytest.mark.parametrize("group", [1, 8])
def test_budgets_fall_by_equal_steps_and_add_up(count, group):
    policy = WindowKV(100, 20, layer_group=group, beta=14)
    slots, prompt = torch.tensor([20, 21, 100, 500, 990, 1000]), torch.tensor(1000)
    spread = policy.spread(slots, prompt, count)
    groups = max(1, count // group)
    assert spread.shape == (count, 6)
    assert (spread.sum(0) <= slots * count).all() and (spread.sum(0) > (slots - 1) * count).all()
    if count % group == 0 or groups == 1:
        assert torch.equal(spread.sum(0), slots * count)
        assert (spread <= 1000).all()
    assert (spread >= 20).all()
    by_group = spread[::group][:groups]
    assert all(torch.equal(spread[i], by_group[min(i // group, groups - 1)]) for i in range(count))
    falls = -by_group.diff(dim=0)
    assert (falls >= 0).all() and (groups < 2 or (falls.amax(0) - falls.amin(0) <= 2).all())
    if groups > 1 and count % group == 0:
        assert by_group[-1, 2] == 100 - int(80 * (1 - group / 14) + 1e-6)
        assert by_group[0, 4] == 1000  # a steeper fall would give the first group more than there is


def test_the_bytes_of_all_layers_fit():
    kvs, steps = layers(24, 200, 4)
    steps = [replace(s, stack=(policy := WindowKV(memory=0.5, window=4),)) for s in steps]
    kvs = [KV.of(kv.keys.dense().bfloat16(), kv.keys.dense().bfloat16()) for kv in kvs]
    kept = policy.over_layers(kvs, steps)
    full = sum(kv.nbytes for kv in kvs)
    assert 0.49 * full < sum(kv.nbytes for kv in kept) <= 0.5 * full
    assert kept[0].counts.even > kept[8].counts.even > kept[16].counts.even


def test_equal_keys_tie_and_the_most_recent_win():
    keys, queries = torch.randn(8).expand(1, 2, 68, 8), torch.randn(1, 4, 4, 8)
    for strategy in ("max", "average"):
        kept = WindowKV(20, 4, strategy=strategy)(KV.of(keys, keys), step(queries, 68))
        assert kept.position.tolist() == [[list(range(48, 68))]]


def test_queries_beyond_the_window_do_not_vote():
    keys, queries = sharp(1, 2, 2, 60, 9)
    kv, policy = KV.of(keys, keys), WindowKV(24, 4)
    assert torch.equal(policy(kv, step(queries, 60)).position, policy(kv, step(queries[:, :, -4:], 60)).position)


def test_defaults_and_needs():
    policy = WindowKV(100)
    assert (policy.window, policy.review, policy.strategy, policy.layer_group, policy.beta) == (32, 8, "max", 8, 14)
    assert policy.needs == {"queries": 32, "all_layers": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 31}, r"budget=31 is too small: it must be at least 32 \(what the policy protects\)"),
        ({"budget": 50, "window": 0}, "WindowKV: window must be an int of at least 1 token, got 0"),
        ({"budget": 50, "review": 1}, "WindowKV: review must be an int of at least 2 tokens, got 1"),
        ({"budget": 50, "layer_group": 0.5}, "WindowKV: layer_group must be an int of at least 1 layer, got 0.5"),
        ({"budget": 50, "strategy": "mean"}, "WindowKV: strategy must be 'max' or 'average', got 'mean'"),
        ({"budget": 50, "beta": 7}, "WindowKV: beta must be a number of at least layer_group=8, got 7"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        WindowKV(**arguments)


def test_without_queries_it_says_so():
    keys = torch.randn(1, 2, 40, 8)
    with pytest.raises(ValueError, match="needs the last queries"):
        WindowKV(35)(KV.of(keys, keys), step(None, 40))
