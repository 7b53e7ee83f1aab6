"""H2O-oracle against dense attention: column sums over all queries, then what each query may read."""

import math

import pytest
import torch
from torch import Tensor

from kvbench.policies import KV, H2OOracle, Step
from kvbench.policies.interface import Selection

SCALING = 0.6


def heavy_hitters(keys: Tensor, queries: Tensor, first: int, count: int) -> list[int]:
    """keys [S, D], queries [G, T, D] at positions first, first + 1, ... of one kv head."""
    total = [0.0] * len(keys)
    for query in queries:
        for t, q in enumerate(query):
            logits = [SCALING * float(q @ k) for k in keys[: first + t + 1]]
            top = max(logits)
            norm = sum(math.exp(x - top) for x in logits)
            for j, x in enumerate(logits):
                total[j] += math.exp(x - top) / norm
    return sorted(range(len(keys)), key=lambda j: (-total[j], -j))[:count]


def reads(selection: Selection, position: int) -> Tensor:
    """[B, H, S] bool: what the query at this position reads (slot s holds token s)."""
    slot = torch.arange(selection.allowed.shape[-1])
    return (selection.allowed | (slot > position - selection.recent.view(-1, 1, 1))) & (slot <= position)


def step(*seen: int, decoding: bool = False) -> Step:
    return Step(0, torch.tensor(seen), torch.tensor(seen), decoding, scaling=SCALING)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("recent", "band"), [(None, 4), (0, 1), (3, 3), (0.75, 6), (8, 8)])
@pytest.mark.parametrize("first", [0, 9])
def test_every_query_reads_heavy_hitters_and_a_band(group, recent, band, first):
    keys, queries = 2 * torch.randn(2, 2, 20, 6), 2 * torch.randn(2, 2 * group, 20 - first, 6)
    position = torch.arange(first, 20).expand(2, -1)
    selection = H2OOracle(8, recent=recent).choose(KV.of(keys, keys), queries, position, step(20, 20))
    for b in range(2):
        for h in range(2):
            heavy = heavy_hitters(keys[b, h], queries[b, h * group : (h + 1) * group], first, 8 - band)
            for i in range(first, 20):
                expected = {j for j in range(i + 1) if j in heavy or j > i - band}
                assert set(reads(selection, i)[b, h].nonzero().flatten().tolist()) == expected
                assert len(expected) <= 8


def test_later_queries_decide_what_earlier_ones_read():
    keys, queries = torch.zeros(1, 1, 10, 1), torch.zeros(1, 1, 10, 1)
    keys[0, 0, 3], queries[0, 0, 9] = 20.0, 20.0
    kv, position = KV.of(keys, keys), torch.arange(10)[None]
    assert 3 in reads(H2OOracle(3, recent=1).choose(kv, queries, position, step(10)), 5)[0, 0].nonzero()
    queries[0, 0, 9] = -20.0
    assert 3 not in reads(H2OOracle(3, recent=1).choose(kv, queries, position, step(10)), 5)[0, 0].nonzero()


def test_a_decode_step_reads_its_own_heavy_hitters():
    keys, queries = 2 * torch.randn(1, 2, 20, 6), 2 * torch.randn(1, 4, 1, 6)
    selection = H2OOracle(6, recent=2).choose(KV.of(keys, keys), queries, torch.tensor([[19]]), step(20, decoding=True))
    for h in range(2):
        expected = {18, 19, *heavy_hitters(keys[0, h], queries[0, 2 * h : 2 * h + 2], 19, 4)}
        assert set(reads(selection, 19)[0, h].nonzero().flatten().tolist()) == expected


def test_a_padded_row_chooses_as_alone():
    keys, queries = 2 * torch.randn(2, 2, 20, 6), 2 * torch.randn(2, 4, 20, 6)
    valid = torch.arange(20) >= torch.tensor([[0], [7]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    kv.keys.tail[1, :, 13:] = 50.0
    position = torch.where(valid, valid.cumsum(1) - 1, -1)
    chosen = H2OOracle(6).choose(kv, queries, position, step(20, 13))
    one = KV.of(keys[1:, :, 7:], keys[1:, :, 7:])
    alone = H2OOracle(6).choose(one, queries[1:, :, 7:], torch.arange(13)[None], step(13))
    assert torch.equal(chosen.allowed[1, :, :13], alone.allowed[0])
    assert chosen.recent.tolist() == [3, 3] and alone.recent.tolist() == [3]


def test_rows_may_have_windows_of_different_sizes():
    keys = torch.randn(2, 1, 20, 6)
    valid = torch.arange(20) >= torch.tensor([[0], [8]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    position = torch.where(valid, valid.cumsum(1) - 1, -1)
    selection = H2OOracle(0.5).choose(kv, keys, position, step(20, 12))
    assert selection.allowed.sum(-1).tolist() == [[5], [3]] and selection.recent.tolist() == [5, 3]


def test_ties_go_to_the_most_recent_and_a_full_budget_reads_everything():
    keys = torch.ones(1, 2, 12, 4)
    kv, position = KV.of(keys, keys), torch.arange(12)[None]
    assert H2OOracle(12).choose(kv, keys, position, step(12)) is None
    allowed = H2OOracle(5, recent=2).choose(kv, keys[:, :, -1:], position[:, -1:], step(12, decoding=True)).allowed
    assert allowed.nonzero()[:, 2].tolist() == [9, 10, 11] * 2


def test_rows_with_room_read_everything_beside_rows_without():
    keys = torch.randn(2, 1, 20, 6)
    valid = torch.arange(20) >= torch.tensor([[0], [12]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    selection = H2OOracle(10).choose(kv, keys, torch.where(valid, valid.cumsum(1) - 1, -1), step(20, 8))
    assert selection.allowed[1, 0, :8].all() and selection.allowed[0].sum() == 5


def test_bad_options():
    with pytest.raises(ValueError, match="H2OOracle: budget=5 is too small: it must be at least 6"):
        H2OOracle(5, recent=6)
    with pytest.raises(ValueError, match="H2OOracle: recent must be 0 or more tokens, got -1"):
        H2OOracle(5, recent=-1)
