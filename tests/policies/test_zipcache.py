"""ZipCache against its definition in plain loops: who is important, both classes' codes, and bytes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbench import CompressedCache
from kvbench.kernels.packing import unpack_planar
from kvbench.policies import FP8, KIVI, KV, SnapKV, Stack, Step, ZipCache

F32 = np.float32
SMALL = ZipCache(ratio=0.6, interval=10)


def held(keys: Tensor, values: Tensor, attention: Tensor | None = None) -> KV:
    attention = torch.rand(keys.shape[:3]) if attention is None else attention
    return KV.of(keys, values).with_columns(attention=attention)


def step(kv: KV, seen: int | None = None) -> Step:
    tokens = torch.full((kv.counts.shape[0],), kv.counts.width if seen is None else seen)
    return Step(0, tokens, tokens)


def affine(group: list[float], bits: int) -> list[float]:
    """One group -> decoded: the definition, one float32 at a time."""
    xs, top = [F32(x) for x in group], 2**bits - 1
    scale, zero = np.float16((max(xs) - min(xs)) / F32(top)), np.float16(min(xs))
    codes = [0 if scale == 0 else int(min(max(np.rint((x - F32(zero)) / F32(scale)), 0), top)) for x in xs]
    return [float(F32(c) * F32(scale) + F32(zero)) for c in codes]


def important(attention: list[float], seen: int, amount: int, count: int) -> list[int]:
    """The `count` of the `amount` oldest slots that queries read the most on average, ties to the older."""
    mean = [float(F32(a) / F32(seen - s)) for s, a in enumerate(attention[:amount])]
    return sorted(sorted(range(amount), key=lambda s: (-mean[s], s))[:count])


def expected(x: Tensor, chosen: list[int], policy: ZipCache, is_key: bool) -> Tensor:
    """x [amount, D] -> what is read back."""
    out = torch.empty_like(x)
    others = [s for s in range(len(x)) if s not in chosen]
    few = policy.interval - policy.important
    for slots, bits, size in ((chosen, policy.high, policy.important), (others, policy.low, few)):
        for start in range(0, len(slots), size):
            members = slots[start : start + size]
            if is_key:
                for d in range(x.shape[1]):
                    out[members, d] = torch.tensor(affine(x[members, d].tolist(), bits))
                continue
            scale = [np.float16(np.sqrt(F32(x[members, d].abs().max()))) or np.float16(1) for d in range(x.shape[1])]
            for s in members:
                decoded = affine([float(F32(v) / F32(c)) for v, c in zip(x[s].tolist(), scale, strict=True)], bits)
                out[s] = torch.tensor([float(F32(y) * F32(c)) for y, c in zip(decoded, scale, strict=True)])
    return out


@pytest.mark.parametrize(
    "policy",
    [SMALL, ZipCache(8, 4, 0.25, 8), ZipCache(8, 2, 0.5, 7), ZipCache(4, 2, 0.1, 4)],
    ids=str,
)
def test_classes_codes_and_values_are_the_definition(policy: ZipCache) -> None:
    keys, values = torch.randn(2, 2, 25, 8) * 3, torch.randn(2, 2, 25, 8) + 1
    values[:, :, :, 3] = 0
    kv = held(keys, values)
    kv.columns["attention"][0, 0, 3:6] = 0.5 * torch.tensor([22, 21, 20])  # ties
    got = policy(kv, step(kv))
    amount = 25 // policy.interval * policy.interval
    for b in range(2):
        for h in range(2):
            count = amount // policy.interval * policy.important
            chosen = important(kv.columns["attention"][b, h].tolist(), 25, amount, count)
            for side, x, is_key in zip(got.decode(), (keys, values), (True, False), strict=True):
                assert side[b, h, :amount].tolist() == expected(x[b, h, :amount], chosen, policy, is_key).tolist()
                assert torch.equal(side[b, h, amount:], x[b, h, amount:])
    body = got.keys.body
    assert body.rows["important"].sum() == 4 * (amount // policy.interval * policy.important)
    codes = dict(body.tensors())
    assert codes["high.codes"].shape[1] == policy.high and codes["low.codes"].shape[1] == policy.low
    assert int(unpack_planar(codes["low.codes"], policy.low).max()) == 2**policy.low - 1


def test_important_tokens_err_less() -> None:
    x = torch.randn(1, 1, 100, 32)
    attention = torch.zeros(1, 1, 100)
    attention[..., ::2] = 1
    kv = held(x, x, attention)
    for got in ZipCache(ratio=0.5)(kv, step(kv)).decode():
        even, odd = ((got - x)[0, 0, first::2].norm() for first in (0, 1))
        assert 3 * even < odd


def test_old_tokens_gain_nothing_from_having_been_read_more_often() -> None:
    """Accumulated sums favour old tokens; means do not."""
    x = torch.randn(1, 1, 10, 8)
    queries = torch.arange(10, 0, -1).float()
    mean = torch.tensor([1.0] * 4 + [2.0] * 6)
    kv = held(x, x, (mean * queries).view(1, 1, 10))
    assert (
        ZipCache(ratio=0.6, interval=10)(kv, step(kv)).keys.body.rows["important"].tolist() == [False] * 4 + [True] * 6
    )


def test_blocks_join_while_decoding_and_classes_stay() -> None:
    keys, values = torch.randn(2, 1, 2, 47, 16)
    kv = SMALL(held(keys[:, :, :25], values[:, :, :25]), step(held(keys[:, :, :25], values[:, :, :25])))
    before = [x[:, :, :20] for x in kv.decode()]
    for token in range(25, 47):
        kv = kv.append(keys[:, :, token : token + 1], values[:, :, token : token + 1])
        kv = kv.with_columns(attention=kv.columns["attention"] + torch.rand(1, 2, token + 1))
        kv = SMALL(kv, step(kv))
        packed = (token + 1) // 10 * 10
        assert kv.keys.body.counts.even == kv.values.body.counts.even == packed
        assert kv.keys.body.high.counts.even == packed * 6 // 10
    for now, then, x in zip(kv.decode(), before, (keys, values), strict=True):
        assert torch.equal(now[:, :, :20], then) and torch.equal(now[:, :, 40:], x[:, :, 40:])
        assert (now - x).norm() < 0.3 * x.norm()


def test_sinks_stay_exact() -> None:
    keys, values = torch.randn(2, 2, 2, 34, 16)
    kv = held(keys, values)
    got = ZipCache(interval=10, sinks=3)(kv, step(kv))
    for dense, x in zip(got.decode(), (keys, values), strict=True):
        assert torch.equal(dense[:, :, :3], x[:, :, :3]) and torch.equal(dense[:, :, 33:], x[:, :, 33:])
        assert not torch.equal(dense[:, :, 3:33], x[:, :, 3:33])
    without = held(keys[:, :, 3:], values[:, :, 3:], kv.columns["attention"][:, :, 3:])
    alone = ZipCache(interval=10)(without, step(without))
    assert all(torch.equal(a[:, :, 3:], b) for a, b in zip(got.decode(), alone.decode(), strict=True))


# --- How slots leave, and bytes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_gather_select_and_parts_read_what_the_whole_reads(ragged: bool) -> None:
    kv = held(*torch.randn(2, 3, 2, 57, 16))
    kv = SMALL(kv, step(kv))
    for _ in range(3):
        whole = kv.decode()
        index = torch.full((3, 2, 40), -1)
        for b in range(3):
            for h in range(2):
                count = int(kv.counts.per_head[b, h])
                kept = torch.randperm(count)[: count // 2 + (b - h if ragged else 0)].sort().values
                index[b, h, : len(kept)] = kept
        kv = kv.gather(index)
        for before, after, side in zip(whole, kv.decode(), (kv.keys, kv.values), strict=True):
            for b in range(3):
                for h in range(2):
                    kept = index[b, h][index[b, h] >= 0]
                    assert torch.equal(after[b, h, : len(kept)], before[b, h, kept])
            live = kv.counts.live()[:, :, 1:5]
            assert torch.equal(side.columns(1, 5)[live], after[:, :, 1:5][live])
            assert side.row_nbytes().sum() <= side.nbytes
        rows = torch.tensor([2, 0, 0])
        picked = kv.select(rows)
        for a, b in zip(picked.decode(), kv.decode(), strict=True):
            live = picked.counts.live()
            assert torch.equal(a[live], b[rows][:, :, : a.shape[2]][live])
    more = kv.append(*torch.randn(2, 3, 2, 30, 16), seen=torch.tensor([57] * 3))
    more = SMALL(more, step(more, 87))
    assert torch.equal(more.counts.per_head, kv.counts.per_head + 30)
    for before, after, side in zip(kv.decode(), more.decode(), (kv.keys, kv.values), strict=True):
        for b in range(3):
            for h in range(2):
                packed = int(side.packed[1][b, h])
                assert torch.equal(after[b, h, :packed], before[b, h, :packed])


def test_compaction_frees_scales_within_a_class() -> None:
    kv = held(*torch.randn(2, 1, 2, 60, 16))
    kept = SMALL(kv, step(kv)).gather(torch.arange(0, 60, 3).expand(1, 2, -1))
    again = ZipCache(interval=10, compact=0.9)(kept, step(kept, 60))
    assert again.nbytes < kept.nbytes
    assert torch.equal(again.keys.body.rows["important"], kept.keys.body.rows["important"])
    for before, after in zip(kept.decode(), again.decode(), strict=True):
        assert 0 < (before - after).norm() < 0.5 * before.norm()


def test_everything_may_go() -> None:
    kv = held(*torch.randn(2, 1, 2, 20, 16))
    kv = SMALL(kv, step(kv)).gather(torch.full((1, 2, 1), -1))
    assert kv.counts.even == 0
    kv = kv.append(*torch.randn(2, 1, 2, 20, 16), seen=torch.tensor([20]))
    kv = SMALL(kv, step(kv, 40))
    assert kv.keys.body.counts.even == 20 and bool(kv.keys.dense().isfinite().all())


@pytest.mark.parametrize("policy", [ZipCache(), SMALL, ZipCache(8, 2, 0.5, 16, sinks=3)], ids=str)
def test_nbytes_is_the_storages_and_the_formula(policy: ZipCache) -> None:
    for tokens in (1, 10, 99, 100, 219):
        kv = held(*torch.randn(2, 2, 3, tokens, 32).half())
        got = policy(kv, step(kv))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in got.tensors() if t.numel()}
        column = 4 * 2 * 3 * tokens  # the accumulated attention
        formula = 2 * int(policy.slot_nbytes(torch.tensor(tokens), 3, 32, 2))
        assert got.nbytes == sum(storages.values()) == formula + column
        assert int(got.row_nbytes().sum()) == formula + column


def test_bits_per_element() -> None:
    kv = held(*torch.randn(2, 1, 2, 400, 128).half())
    got = ZipCache()(kv, step(kv))
    elements = 2 * 400 * 128
    assert 8 * got.keys.nbytes / elements == pytest.approx(0.6 * 4 + 0.4 * 2 + 2 * 32 / 100 + 8 / 128)
    assert 8 * got.values.nbytes / elements == pytest.approx(0.6 * 4 + 0.4 * 2 + 32 / 128 + 2 * 16 / 100 + 8 / 128)


# --- In a model --------------------------------------------------------------------------------------------------


def test_the_model_sees_the_classes_its_attention_made(tiny) -> None:
    model, _ = tiny
    ids = torch.randint(2, 250, (1, 60))
    cache = CompressedCache(model, SMALL)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model.set_attn_implementation("eager")
        weights = model(ids, output_attentions=True).attentions
    for layer, attention in zip(cache.policy_layers(), weights, strict=True):
        received = attention[0].unflatten(0, (2, 2)).sum((1, 2))  # [H, S]
        mean = received / torch.arange(60, 0, -1)
        for h in range(2):
            flags = layer.kv.keys.body.rows["important"].view(2, 60)[h]
            assert mean[h][flags].min() >= mean[h][~flags].max() - 1e-5
    part = sum(p.nbytes for p in cache.ledger() if p.name.startswith(("keys", "values")))
    assert part < 0.55 * cache.full_nbytes  # blocks of 10 carry many scales


def test_padded_rows_are_what_they_are_alone_and_it_stacks(tiny) -> None:
    model, _ = tiny
    ids = torch.randint(2, 250, (2, 50))
    mask = torch.ones(2, 50, dtype=torch.int64)
    mask[0, :13] = 0
    for policy in (SMALL, Stack((SnapKV(24, window=4, kernel=1), SMALL))):
        both = CompressedCache(model, policy)
        alone = CompressedCache(model, policy)
        with torch.no_grad():
            position = (mask.cumsum(1) - 1).clamp(min=0)
            model(ids, attention_mask=mask, position_ids=position, past_key_values=both)
            model(ids[:1, 13:], past_key_values=alone)
        for a, b in zip(both.policy_layers(), alone.policy_layers(), strict=True):
            for x, y in zip(a.kv.select(torch.tensor([0])).decode(), b.kv.decode(), strict=True):
                torch.testing.assert_close(x[:, :, : y.shape[2]], y, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, past_key_values=CompressedCache(model, SMALL), max_new_tokens=25,
                             do_sample=False, pad_token_id=0)  # fmt: skip
    assert out.shape[1] <= 75


# --- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"high": 2}, "bits must be 2, 4 or 8 with high > low, got 2 and 2"),
        ({"high": 4, "low": 4}, "got 4 and 4"),
        ({"low": 3}, "got 4 and 3"),
        ({"interval": 1}, "interval must be an int of 2 or more tokens, got 1"),
        ({"interval": 50.0}, "interval must be an int"),
        ({"ratio": 0}, "ratio must be a share above 0 and below 1, got 0"),
        ({"ratio": 1.0}, "ratio must be a share"),
        ({"ratio": 0.95, "interval": 10}, "leaves a class empty; use a larger interval"),
    ],
)
def test_fields_outside_their_sets_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZipCache(**fields)


def test_what_cannot_be_packed_is_named() -> None:
    x = torch.zeros(1, 1, 100, 6)
    with pytest.raises(ValueError, match=r"ZipCache\(\): head_dim=6 is not a multiple of 4 .2-bit codes per byte"):
        ZipCache()(held(x, x), step(held(x, x)))
    x = torch.zeros(1, 1, 100, 8)
    with pytest.raises(KeyError, match="needs the column 'attention'"):
        ZipCache().encode(x, x)
    mixed, kv = ZipCache().keys & FP8().values, held(x, x)
    with pytest.raises(ValueError, match="by their attention, which only the policy by itself sees"):
        mixed(kv, step(kv))
    packed = KIVI(2, 8, 0)(kv, step(kv)).append(*torch.zeros(2, 1, 1, 104, 8))
    with pytest.raises(ValueError, match="cannot take slots packed as"):
        ZipCache()(packed, step(packed))
    x[..., 7, 5] = math.nan
    with pytest.raises(ValueError, match="inf or nan"):
        ZipCache()(held(x, x), step(held(x, x)))


def test_zeros_come_back_as_zeros() -> None:
    x = torch.zeros(1, 1, 100, 8)
    assert not any(got.any() for got in ZipCache()(held(x, x), step(held(x, x))).decode())


def test_configuration() -> None:
    from importlib.resources import files

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.create((files("kvbench.conf") / "quant" / "zipcache.yaml").read_text())
    assert instantiate(config) == ZipCache()
