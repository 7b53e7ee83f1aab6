"""H2O against a simulation with explicit sets of kept tokens and dense attention rows."""

import math

import pytest
import torch
from torch import Tensor

from kvbench.kernels.attention import column_sums
from kvbench.policies import H2O, KV, Step

SCALING = 0.6


def softmax_row(query: Tensor, keys: Tensor, visible: list[int]) -> dict[int, float]:
    logits = {j: SCALING * sum(a * b for a, b in zip(query.tolist(), keys[j].tolist(), strict=True)) for j in visible}
    top = max(logits.values())
    total = sum(math.exp(x - top) for x in logits.values())
    return {j: math.exp(x - top) / total for j, x in logits.items()}


class Simulation:
    """One row, kept as {position: accumulated attention} per kv head."""

    def __init__(self, keys: Tensor, queries: Tensor) -> None:
        self.keys, self.queries = keys, queries  # [H, S, D], [Hq, S, D]
        self.held: list[dict[int, float]] = [{} for _ in keys]

    def forward(self, start: int, stop: int, budget: int, recent: int) -> None:
        group = len(self.queries) // len(self.keys)
        for h, held in enumerate(self.held):
            held.update(dict.fromkeys(range(start, stop), 0.0))
            for i in range(start, stop):
                for g in range(group):
                    visible = [j for j in held if j <= i]
                    for j, p in softmax_row(self.queries[h * group + g, i], self.keys[h], visible).items():
                        held[j] += p
            if len(held) > budget:
                newest = sorted(held)[len(held) - recent :]
                older = sorted(set(held) - set(newest), key=lambda j: (-held[j], -j))
                kept = sorted([*older[: budget - recent], *newest])
                self.held[h] = {j: held[j] for j in kept}


def append(kv: KV, keys: Tensor, queries: Tensor, start: int, stop: int) -> KV:
    """What a host does before the policy: new slots, then their attention added to the column."""
    batch = keys.shape[0]
    kv = kv.append(keys[:, :, start:stop], keys[:, :, start:stop], seen=torch.full((batch,), start))
    at = torch.arange(start, stop).expand(batch, -1)
    new = column_sums(queries[:, :, start:stop], kv.keys.dense(), at, kv.position, scaling=SCALING)
    return KV(kv.keys, kv.values, {**kv.columns, "attention": kv.column("attention") + new})


def empty(keys: Tensor) -> KV:
    none = keys[:, :, :0]
    return KV(KV.of(none, none).keys, KV.of(none, none).values, {"attention": none[..., 0].float()})


def step(seen: int, batch: int, prompt: int, decoding: bool) -> Step:
    return Step(0, torch.full((batch,), prompt), torch.full((batch,), seen), decoding)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("recent", [None, 0, 3, 8, 0.25])
def test_prefill_chunk_and_decode_equal_the_simulation(group, recent):
    keys, queries = 2 * torch.randn(2, 2, 30, 6), 2 * torch.randn(2, 2 * group, 30, 6)
    policy = H2O(8, recent=recent)
    window = {None: 4, 0.25: 2}.get(recent, recent)
    rows = [Simulation(keys[b], queries[b]) for b in range(2)]
    kv, seen = empty(keys), 0
    for tokens in (14, 6, *[1] * 10):
        kv = append(kv, keys, queries, seen, seen + tokens)
        for row in rows:
            row.forward(seen, seen + tokens, 8, window)
        seen += tokens
        kv = policy(kv, step(seen, 2, 20, decoding=tokens == 1))
        assert kv.position.tolist() == [[list(held) for held in row.held] for row in rows]
        sums = torch.tensor([[list(held.values()) for held in row.held] for row in rows])
        torch.testing.assert_close(kv.column("attention"), sums, atol=1e-4, rtol=1e-4)


def test_without_eviction_chunks_equal_one_shot_and_the_mass_is_conserved():
    keys, queries = 2 * torch.randn(1, 2, 24, 6), 2 * torch.randn(1, 8, 24, 6)
    once = append(empty(keys), keys, queries, 0, 24).column("attention")
    kv, seen = empty(keys), 0
    for tokens in (9, 13, 1, 1):
        kv = H2O(24)(append(kv, keys, queries, seen, seen + tokens), step(seen + tokens, 1, 24, tokens == 1))
        seen += tokens
    torch.testing.assert_close(kv.column("attention"), once)
    torch.testing.assert_close(once.sum(-1), torch.full((1, 2), 24.0 * 4))


def test_normalized_by_the_queries_that_could_see_each_slot():
    keys, queries = 2 * torch.randn(1, 2, 30, 6), 2 * torch.randn(1, 4, 30, 6)
    policy, row = H2O(8, recent=3, normalize="by_visible_queries"), Simulation(keys[0], queries[0])
    kv, seen, differs = empty(keys), 0, False
    for tokens in (14, 6, *[1] * 10):
        kv = append(kv, keys, queries, seen, seen + tokens)
        row.forward(seen, seen + tokens, 30, 3)  # a budget for all: attends and adds up, evicts nothing
        seen += tokens
        plain = H2O(8, recent=3)(kv, step(seen, 1, 20, tokens == 1)).position
        kv = policy(kv, step(seen, 1, 20, tokens == 1))
        for h, held in enumerate(row.held):
            newest = sorted(held)[len(held) - 3 :]
            mean = {j: total / len([i for i in range(seen) if i >= j]) for j, total in held.items()}
            older = sorted(set(held) - set(newest), key=lambda j: (-mean[j], -j))
            row.held[h] = {j: held[j] for j in sorted([*older[:5], *newest])}
        assert kv.position[0].tolist() == [list(held) for held in row.held]
        differs |= not torch.equal(plain, kv.position)
    assert differs


def test_flat_attention_normalized_does_not_favour_early_tokens():
    keys = torch.zeros(1, 1, 40, 4)
    kv = append(empty(keys), keys, keys, 0, 40)
    assert H2O(10, recent=2)(kv, step(40, 1, 40, False)).position[0, 0].tolist() == [*range(8), 38, 39]
    # Mean share: of 1/1 ... 1/40 for token 0, of 1/s ... 1/40 for token s: still early, but flatter.
    score = H2O(10, normalize="by_visible_queries").score(kv, step(40, 1, 40, False))[0, 0]
    expected = torch.tensor([sum(1 / n for n in range(s + 1, 41)) / (40 - s) for s in range(40)])
    torch.testing.assert_close(score, expected)


def test_recent_equal_to_the_budget_is_a_sliding_window():
    keys, queries = torch.randn(1, 2, 20, 6), torch.randn(1, 2, 20, 6)
    for policy in (H2O(6, recent=6), H2O(6, recent=1.0)):
        kv = policy(append(empty(keys), keys, queries, 0, 20), step(20, 1, 20, False))
        assert kv.position.tolist() == [[[14, 15, 16, 17, 18, 19]] * 2]


def test_ties_go_to_the_most_recent_and_the_column_stays_float32():
    kv = KV.of(torch.randn(1, 2, 12, 4).bfloat16(), torch.randn(1, 2, 12, 4).bfloat16())
    flat = KV(kv.keys, kv.values, {"attention": torch.ones(1, 2, 12)})
    kept = H2O(5, recent=2)(flat, step(12, 1, 12, False))
    assert kept.position.tolist() == [[[7, 8, 9, 10, 11]] * 2]
    assert kept.column("attention").dtype == torch.float32
    # 1 + 2**-12 is 1 in bfloat16: the score must not be rounded to the keys' dtype.
    flat.columns["attention"][..., 3] += 2**-12
    assert 3 in H2O(5, recent=2)(flat, step(12, 1, 12, False)).position[0, 0].tolist()


def test_window_share_follows_each_rows_budget():
    kv = KV.of(torch.randn(2, 1, 40, 4), torch.randn(2, 1, 40, 4))
    kv = KV(kv.keys, kv.values, {"attention": torch.arange(40.0).flip(0).expand(2, 1, -1).clone()})
    seen = torch.tensor([40, 20])  # the second row's prompt was half as long: half the budget
    kept = H2O(0.5, recent=0.3)(kv, Step(0, seen, torch.tensor([40, 40]), False)).position
    assert kept[0, 0].tolist() == [*range(14), *range(34, 40)]
    assert kept[1, 0].tolist() == [*range(7), *range(37, 40), *[-1] * 10]


@pytest.mark.parametrize(("budget", "recent"), [(1, 0), (2, 1), (5, 2), (8, 4)])
def test_the_default_window_is_half_of_the_budget_rounded_down(budget, recent):
    kv = KV.of(torch.randn(1, 1, 20, 4), torch.randn(1, 1, 20, 4))
    kv = KV(kv.keys, kv.values, {"attention": torch.arange(20.0).flip(0)[None, None]})
    kept = H2O(budget)(kv, step(20, 1, 20, False)).position[0, 0].tolist()
    assert kept == [*range(budget - recent), *range(20 - recent, 20)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 5, "recent": 6}, r"H2O: budget=5 is too small: it must be at least 6 \(what the policy protects\)"),
        ({"budget": 5, "recent": -1}, "recent must be 0 or more tokens, got -1"),
        ({"budget": 5, "recent": 1.5}, "recent=1.5 as a share must be from 0 to 1; write tokens as an int"),
        ({"budget": 5, "recent": "half"}, "recent must be tokens .* or None, got 'half'"),
        ({"budget": 5, "recent": True}, "recent must be tokens .* or None, got True"),
        ({"budget": 5, "normalize": "mean"}, "H2O: normalize must be 'none' or 'by_visible_queries', got 'mean'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        H2O(**arguments)


def test_a_share_never_goes_below_the_window():
    assert H2O(0.1, recent=8).slots(None, step(20, 1, 20, False)).tolist() == [[8]]
    assert H2O(0.1).needs == {"attention": 1}
