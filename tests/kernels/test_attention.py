"""Attention over positioned slots against plain loops in float64."""

import math

import pytest
import torch
from torch import Tensor

from kvbench.kernels.attention import attend, attend_causal, attend_tiles, column_sums, probabilities, reference

LAYOUTS = [(1, 1, 1), (2, 1, 4), (2, 2, 2), (1, 3, 1)]  # batch, kv heads, query heads per kv head
EXTRAS = [{}, {"softcap": 3.0}, {"sinks": True}, {"softcap": 3.0, "sinks": True}]


def dense_oracle(query, keys, query_position, key_position, scaling, softcap=None, sinks=None) -> Tensor:
    """[B, Hq, T, S] float64, one logit at a time."""
    batch, query_heads, tokens, _ = query.shape
    repeats = query_heads // keys.shape[1]
    weights = torch.zeros(batch, query_heads, tokens, keys.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(query_heads):
            for i in range(tokens):
                at = key_position[b, min(h // repeats, key_position.shape[1] - 1)].tolist()
                logits = {}
                for s, position in enumerate(at):
                    if 0 <= position <= int(query_position[b, i]):
                        dot = float((query[b, h, i].double() * keys[b, h // repeats, s].double()).sum()) * scaling
                        logits[s] = dot if softcap is None else softcap * math.tanh(dot / softcap)
                total = sum(math.exp(x) for x in logits.values())
                total += math.exp(float(sinks[h])) if sinks is not None else 0.0
                for s, x in logits.items():
                    weights[b, h, i, s] = math.exp(x) / total
    return weights


def ragged(batch: int, heads: int, repeats: int, shared: bool = False, tokens: int = 5, slots: int = 9, dim: int = 8):
    """Slots at random ascending positions, ends of different length, large numbers in the dead columns."""
    query = 2 * torch.randn(batch, heads * repeats, tokens, dim)
    keys, values = 2 * torch.randn(batch, heads, slots, dim), torch.randn(batch, heads, slots, dim)
    lists = 1 if shared else heads
    position = torch.stack([torch.randperm(20)[:slots].sort().values for _ in range(batch * lists)])
    position = position.view(batch, lists, slots).int()
    for b in range(batch):
        for h in range(lists):
            position[b, h, slots - (b + h) % 3 :] = -1
    dead = (position < 0).expand(batch, heads, slots)
    keys[dead] = values[dead] = 1e4
    query_position = torch.randint(3, 20, (batch, tokens))
    return query, keys, values, query_position, position


def options(extra: dict, query_heads: int) -> dict:
    chosen = {"scaling": 0.4, **extra}
    if "sinks" in extra:
        chosen["sinks"] = torch.linspace(-1, 2, query_heads)
    return chosen


def on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["per-head", "shared"])
def test_everything_equals_the_dense_oracle(layout, extra, shared, device):
    query, keys, values, query_position, position = ragged(*layout, shared=shared)
    chosen = options(extra, query.shape[1])
    weights = dense_oracle(query, keys, query_position, position, **chosen)
    grouped = weights.unflatten(1, (layout[1], layout[2]))  # [B, H, G, T, S]
    query, keys, values, query_position, position = on(device, query, keys, values, query_position, position)
    if "sinks" in chosen:
        chosen["sinks"] = chosen["sinks"].to(device)

    rows = probabilities(query, keys, query_position, position, **chosen).cpu()
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), weights, atol=1e-5, rtol=1e-4)

    sums = column_sums(query, keys, query_position, position, **chosen).cpu()
    torch.testing.assert_close(sums.double(), grouped.sum((2, 3)), atol=1e-5, rtol=1e-4)

    out = attend(query, keys, values, query_position, position, **chosen).cpu()
    expected = (grouped @ values.cpu().double()[:, :, None]).flatten(1, 2)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)

    for tile in (2, 100):
        products = lambda q, a, b: q @ keys[:, :, a:b].transpose(2, 3), lambda w, a, b: w @ values[:, :, a:b]
        out, weights_of_tiles = attend_tiles(query, *products, keys.shape[1], tile, query_position, position, **chosen)
        torch.testing.assert_close(out.cpu().double(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(weights_of_tiles.cpu().view_as(rows), rows)


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_queries_that_see_nothing_give_zeros(extra):
    query, keys, values, query_position, position = ragged(2, 2, 2)
    query_position[0] = -1  # before everything
    position[1] = -1  # nothing held
    chosen = options(extra, 4)
    out = attend(query, keys, values, query_position, position, **chosen)
    assert torch.equal(out, torch.zeros_like(out))
    assert not probabilities(query, keys, query_position, position, **chosen).any()
    assert not column_sums(query, keys, query_position, position, **chosen).any()


def test_no_slots_at_all():
    query, empty = torch.randn(1, 2, 3, 4), torch.empty(1, 1, 0, 4)
    at, none = torch.arange(3)[None], torch.empty(1, 1, 0, dtype=torch.int32)
    assert not attend(query, empty, empty, at, none, scaling=1.0).any()
    assert column_sums(query, empty, at, none, scaling=1.0).shape == (1, 1, 0)


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("elements", [1, 100, 300])
def test_blocks_do_not_change_the_result(monkeypatch, elements, extra):
    query, keys, values, query_position, position = ragged(2, 2, 2, tokens=13)
    chosen = options(extra, 4)
    arguments = (query, keys, query_position, position)
    valid = torch.rand(2, 13) < 0.7
    whole = attend(query, keys, values, query_position, position, **chosen)
    sums = column_sums(*arguments, **chosen, query_valid=valid)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", elements)
    assert len(list(reference._blocks(query, keys))) > 2  # the patch is felt
    torch.testing.assert_close(attend(query, keys, values, query_position, position, **chosen), whole)
    torch.testing.assert_close(column_sums(*arguments, **chosen, query_valid=valid), sums)
    weights = dense_oracle(query, keys, query_position, position, **chosen) * valid[:, None, :, None]
    torch.testing.assert_close(sums.double(), weights.unflatten(1, (2, 2)).sum((2, 3)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("elements", [2**24, 40])
def test_chunks_add_up_to_one_shot_and_to_the_number_of_queries(monkeypatch, elements):
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", elements)
    query, keys = 2 * torch.randn(2, 4, 23, 8), 2 * torch.randn(2, 2, 23, 8)
    at = torch.arange(23).expand(2, -1)
    once = column_sums(query, keys, at, at[:, None].int(), scaling=0.5)
    total = torch.zeros(2, 2, 0)
    for start, stop in ((0, 10), (10, 21), (21, 22), (22, 23)):
        total = torch.cat([total, torch.zeros(2, 2, stop - start)], dim=-1)
        held = at[:, None, :stop].int()
        total += column_sums(query[:, :, start:stop], keys[:, :, :stop], at[:, start:stop], held, scaling=0.5)
    torch.testing.assert_close(total, once)
    torch.testing.assert_close(once.sum(-1), torch.full((2, 2), 23.0 * 2))  # queries x group size
    sunk = column_sums(query, keys, at, at[:, None].int(), scaling=0.5, sinks=torch.ones(4))
    assert (sunk.sum(-1) < 46).all()  # the learned sink takes its part


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_causal_path_equals_the_positioned_path(layout):
    batch, heads, repeats = layout
    query = torch.randn(batch, heads * repeats, 12, 8)
    keys, values = torch.randn(2, batch, heads, 12, 8).unbind()
    at = torch.arange(12).expand(batch, -1)
    expected = attend(query, keys, values, at, at[:, None].int(), scaling=0.3)
    torch.testing.assert_close(attend_causal(query, keys, values, scaling=0.3), expected)


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_half_precision_keeps_its_dtype_and_scores_in_float32(extra):
    query, keys, values, query_position, position = ragged(2, 2, 2)
    chosen = options(extra, 4)
    half = [x.bfloat16() for x in (query, keys, values)]
    out = attend(*half, query_position, position, **chosen)
    assert out.dtype == torch.bfloat16
    exact = attend(*(x.float() for x in half), query_position, position, **chosen)
    torch.testing.assert_close(out.float(), exact, atol=3e-2, rtol=3e-2)
    sums = column_sums(*half[:2], query_position, position, **chosen)
    assert torch.equal(sums, column_sums(*(x.float() for x in half[:2]), query_position, position, **chosen))
