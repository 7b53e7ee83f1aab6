"""H2O-prefill against dense attention rows summed one by one."""

import math

import pytest
import torch
from torch import Tensor

from kvbench.kernels.attention import column_sums
from kvbench.policies import KV, H2OPrefill, Step

SCALING = 0.6


def sums(keys: Tensor, queries: Tensor) -> list[list[float]]:
    """keys [H, S, D], queries [Hq, S, D] -> attention each slot received, of all queries of its group."""
    (heads, slots, _), group = keys.shape, len(queries) // len(keys)
    total = [[0.0] * slots for _ in range(heads)]
    for g in range(len(queries)):
        for i in range(slots):
            logits = [SCALING * float(queries[g, i] @ keys[g // group, j]) for j in range(i + 1)]
            top = max(logits)
            norm = sum(math.exp(x - top) for x in logits)
            for j, x in enumerate(logits):
                total[g // group][j] += math.exp(x - top) / norm
    return total


def prompt(keys: Tensor, queries: Tensor, valid: Tensor | None = None) -> tuple[KV, Step]:
    """What a host hands over after a prompt."""
    batch, _, tokens, _ = keys.shape
    none, zero = keys[:, :, :0], torch.zeros(batch, dtype=torch.int64)
    real = torch.ones(batch, tokens, dtype=torch.bool) if valid is None else valid
    kv = KV.of(none, none).append(keys, keys, valid, zero)
    at = (real.cumsum(1) - 1).clamp(min=0)
    total = column_sums(queries, kv.keys.dense(), at, kv.position, scaling=SCALING, query_valid=real)
    return kv.with_columns(attention=total), Step(0, real.sum(1), real.sum(1))


def best(total: list[float], budget: int, window: int) -> list[int]:
    older = sorted(range(len(total) - window), key=lambda j: (-total[j], -j))
    return sorted([*older[: budget - window], *range(len(total) - window, len(total))])


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("window", [0, 1, 4, 9])
def test_kept_slots_equal_the_definition(group, window):
    keys, queries = 2 * torch.randn(2, 2, 22, 6), 2 * torch.randn(2, 2 * group, 22, 6)
    kept = H2OPrefill(9, window)(*prompt(keys, queries))
    for b in range(2):
        assert kept.position[b].tolist() == [best(total, 9, window) for total in sums(keys[b], queries[b])]
    assert torch.equal(kept.keys.dense(), keys.gather(2, kept.position.long()[..., None].expand(-1, -1, -1, 6)))


def test_a_padded_row_is_kept_as_alone():
    keys, queries = 2 * torch.randn(2, 2, 22, 6), 2 * torch.randn(2, 4, 22, 6)
    valid = torch.arange(22) >= torch.tensor([[0], [7]])
    kept = H2OPrefill(9, 3)(*prompt(keys, queries, valid)).position
    alone = H2OPrefill(9, 3)(*prompt(keys[1:, :, 7:], queries[1:, :, 7:])).position
    assert torch.equal(kept[1:], alone)


def test_never_while_decoding_but_again_after_a_later_prompt():
    kv = KV.of(torch.randn(1, 1, 30, 4), torch.randn(1, 1, 30, 4))
    kv = kv.with_columns(attention=torch.arange(30.0).flip(0)[None, None])
    now = Step(0, torch.tensor([30]), torch.tensor([30]), decoding=True)
    assert H2OPrefill(10)(kv, now) is kv
    kept = H2OPrefill(10)(kv, Step(0, torch.tensor([30]), torch.tensor([30])))
    assert kept.position[0, 0].tolist() == [0, 1, *range(22, 30)]


def test_ties_go_to_the_most_recent():
    kv = KV.of(torch.randn(1, 2, 30, 4), torch.randn(1, 2, 30, 4)).with_columns(attention=torch.ones(1, 2, 30))
    kept = H2OPrefill(12, 2)(kv, Step(0, torch.tensor([30]), torch.tensor([30])))
    assert kept.position.tolist() == [[list(range(18, 30))] * 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 7}, r"budget=7 is too small: it must be at least 8 \(what the policy protects\)"),
        ({"budget": 9, "window": -1}, "window must be an int of 0 or more tokens, got -1"),
        ({"budget": 9, "window": 0.5}, "window must be an int of 0 or more tokens, got 0.5"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        H2OPrefill(**arguments)
