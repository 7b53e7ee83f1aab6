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


@pytest.mark.parametrize("before", [0, 1, 20])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_causal_path_equals_the_positioned_path(layout, before, device):
    """Also in two passes, when there are slots `before` the tokens; and its log-sum-exps are those of float64."""
    batch, heads, repeats = layout
    query = 2 * torch.randn(batch, heads * repeats, 12, 8)
    keys, values = 2 * torch.randn(2, batch, heads, before + 12, 8)
    at = torch.arange(before + 12).expand(batch, -1)
    query, keys, values, at = on(device, query, keys, values, at)
    out, lse = attend_causal(query, keys, values, scaling=0.3)
    torch.testing.assert_close(out, attend(query, keys, values, at[:, before:], at[:, None].int(), scaling=0.3))
    if device.type == "cpu":  # on CUDA, the fused kernels for float32 do not group heads
        torch.testing.assert_close(lse.double(), exact_lse(query, keys, scaling=0.3), rtol=0, atol=1e-5)
    half = [x.bfloat16() for x in (query, keys, values)]
    out, lse = attend_causal(*half, scaling=0.3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, attend(*half, at[:, before:], at[:, None].int(), scaling=0.3), atol=3e-2, rtol=3e-2)
    assert (lse is None) == (device.type == "cpu")  # where it is not exact in half precision


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "before"), [(64, 0), (128, 0), (128, 777), (256, 1)])
def test_fused_log_sum_exps_on_a_gpu(dim, before, dtype, device):
    query = torch.randn(2, 8, 500, dim, device=device, dtype=dtype)
    keys, values = torch.randn(2, 2, 2, before + 500, dim, device=device, dtype=dtype)
    _, lse = attend_causal(query, keys, values, scaling=dim**-0.5)
    torch.testing.assert_close(lse.double(), exact_lse(query, keys, scaling=dim**-0.5), rtol=0, atol=1e-5)


def exact_lse(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """[B, Hq, T] float64 of the newest tokens."""
    tokens, slots = query.shape[2], keys.shape[2]
    logits = query.double() @ keys.double().repeat_interleave(query.shape[1] // keys.shape[1], 1).mT * scaling
    hidden = torch.ones(tokens, slots, dtype=torch.bool, device=query.device).triu(slots - tokens + 1)
    return logits.masked_fill(hidden, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("elements", [2**22, 1000])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sums_from_the_attention_s_own_log_sum_exps(layout, elements, monkeypatch):
    """A causal prompt, probes and a window of it; every query gives 1 per head in all."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", elements)
    batch, heads, repeats = layout
    query, keys = 2 * torch.randn(batch, heads * repeats, 40, 8), 2 * torch.randn(batch, heads, 40, 8)
    at = torch.arange(40).expand(batch, -1)
    _, lse = attend_causal(query, keys, keys, scaling=0.4)
    weights = dense_oracle(query, keys, at, at[:, None], 0.4).unflatten(1, (heads, repeats))
    for chosen in (range(40), [3, 17, 38], range(30, 40)):
        i = list(chosen)
        sums = column_sums(query[:, :, i], keys, at[:, i], at[:, None].int(), scaling=0.4, lse=lse[:, :, i])
        torch.testing.assert_close(sums.double(), weights[:, :, :, i].sum((2, 3)), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(sums.sum(-1), torch.full((batch, heads), float(len(i) * repeats)))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("extra", EXTRAS, ids=str)
def test_sums_from_any_log_sum_exps(extra, batch, monkeypatch):
    """Ragged slots, selections, sinks; what stands for pads and for queries that see nothing does not matter."""
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 300)
    query, keys, _, query_position, position = ragged(batch, 2, 2, tokens=13)
    position[0] = torch.where(position[0] < 9, -1, position[0])
    position = torch.where(position < 0, 99, position).sort(-1).values
    position = torch.where(position == 99, -1, position)
    query_position[0, 3], arguments = 2, (query, keys, query_position, position)  # sees nothing
    chosen = options(extra, 4) | {"allowed": torch.rand(batch, 4, 9) > 0.4, "recent": 2}
    valid = torch.rand(batch, 13) < 0.7
    rows = dense_rows(*arguments, **chosen)
    lse = torch.where(valid[:, None], rows.logsumexp(-1), torch.nan).float()
    torch.testing.assert_close(
        column_sums(*arguments, **chosen, query_valid=valid, lse=lse),
        column_sums(*arguments, **chosen, query_valid=valid), rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def dense_rows(query, keys, query_position, position, scaling, allowed, recent, softcap=None, sinks=None) -> Tensor:
    """[B, Hq, T, S or S + 1] float64 logits, -inf where not visible; the sink is the last."""
    logits = query.double() @ keys.double().repeat_interleave(2, 1).mT * scaling
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    slot, at = position.repeat_interleave(2, 1)[:, :, None], query_position[:, None, :, None]
    visible = (slot >= 0) & (slot <= at) & (allowed[:, :, None] | (slot > at - recent))
    logits = logits.masked_fill(~visible, -torch.inf)
    return logits if sinks is None else torch.cat([logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)


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
