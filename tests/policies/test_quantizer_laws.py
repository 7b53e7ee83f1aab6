"""Laws every quantizer keeps: how tokens were split, padded, batched, gathered or selected changes no stored bit."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.policies import (
    FP8,
    GEAR,
    KIVI,
    KV,
    NVFP4,
    Full,
    IntToken,
    Kitty,
    KVTuner,
    Mixed,
    Quantizer,
    Random,
    Step,
    TurboQuant,
)
from kvbench.policies.store import Counts, Packed, Where

SMALL = [
    KIVI(2, 8, 16),
    KIVI(4, 8, 8),
    KIVI(4, 16, 16),
    KIVI(2, 8, 0),
    NVFP4(),
    NVFP4(0.01, 0.02),
    FP8(),
    FP8(0.5, 0.25),
    KIVI(2, 8, 16, sinks=5),
    FP8(sinks=3),
    KIVI(2, 8, 0, sinks=2).keys & FP8(sinks=4).values,
    Mixed(None, NVFP4()),
    KVTuner(pairs=((8, 4),), group_size=8, residual=16),
    KVTuner(pairs=((4, 8),), group_size=8, residual=3, mode="token"),
    IntToken(4, rotate=True, rotate_values=True, block=8, residual=8),
    IntToken(8, symmetric=True),
    IntToken(4, clip=0.9),
    Kitty(0.25, 8, 4, sinks=2),
    GEAR(2, 2, 0.1, 8, 16),
    TurboQuant(4, norm_correction=True),
    TurboQuant(3, norm_correction=True, seed=None, sinks=2),
    FP8(0.5, 2.0, format="e5m2"),
    FP8(0.5, headroom=1.25),
    FP8(format="e5m2", per_token=True),
    NVFP4(rotate=True),
]
every = pytest.mark.parametrize("policy", SMALL, ids=str)


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype) * 3 + 1


def step(kv: KV) -> Step:
    seen = kv.counts.per_head[:, 0]
    return Step(layer=0, prompt=seen, seen=seen)


def empty(keys: Tensor) -> KV:
    return KV.of(keys[:, :, :0], keys[:, :, :0])


def parts(kv: KV) -> dict[str, Tensor]:
    """Everything stored, without spare capacity, dead columns and what is empty."""
    found = {}
    for side, held in (("keys", kv.keys), ("values", kv.values)):
        found[f"{side}.tail"] = held.tail[:, :, : held.tail_counts.width][held.tail_counts.live()]
        found |= {f"{side}.{n}": t for n, t in (held.body.exact.tensors() if held.body else ())}
    return {name: tensor for name, tensor in found.items() if tensor.numel()}


def assert_same(a: KV, b: KV) -> None:
    assert torch.equal(a.counts.per_head, b.counts.per_head)
    ours, theirs = parts(a), parts(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


# --- How tokens arrive -------------------------------------------------------------------------------------------


@every
@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 70), max_size=12), tokens=st.integers(1, 70))
def test_any_split_of_the_tokens_stores_the_same_bits(policy: Quantizer, cuts: list[int], tokens: int) -> None:
    keys, values = pair(2, 2, tokens, 16)
    kv = empty(keys)
    for start, end in pairwise(sorted({0, tokens, *(c for c in cuts if c < tokens)})):
        kv = kv.append(keys[:, :, start:end], values[:, :, start:end])
        kv = policy(kv, step(kv))
    assert_same(kv, policy.encode(keys, values))


@every
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=3), cut=st.integers(0, 40), decoded=st.integers(0, 20))
def test_padded_rows_store_what_they_store_alone(policy: Quantizer, lengths: list[int], cut: int, decoded: int) -> None:
    """Left-padded prompts in two chunks, then decoding; pads are nan, so one that entered a group would show."""
    rows, longest = len(lengths), max(lengths)
    keys, values = pair(rows, 2, longest + decoded, 16)
    valid = torch.arange(longest + decoded) >= longest - torch.tensor(lengths)[:, None]
    poison = ~valid[:, None, :, None]
    padded = keys.masked_fill(poison, torch.nan), values.masked_fill(poison, torch.nan)
    kv = empty(keys)
    ends = sorted({min(cut, longest), *range(longest, longest + decoded + 1)} - {0})
    for start, end in pairwise([0, *ends]):
        new = slice(start, end)
        kv = kv.append(padded[0][:, :, new], padded[1][:, :, new], valid=valid[:, new])
        kv = policy(kv, step(kv))
    for row, length in enumerate(lengths):
        alone = policy.encode(*(x[row : row + 1, :, longest - length :] for x in (keys, values)))
        assert_same(kv.select(torch.tensor([row])), alone)
    assert torch.isfinite(kv.keys.dense()).all()


@every
def test_appending_leaves_the_cache_it_came_from_alone(policy: Quantizer) -> None:
    keys, values = pair(1, 2, 60, 16)
    before = policy.encode(keys[:, :, :37], values[:, :, :37])
    copies = {name: tensor.clone() for name, tensor in parts(before).items()}
    after = before.append(keys[:, :, 37:], values[:, :, 37:])
    policy(after, step(after))
    assert all(torch.equal(tensor, copies[name]) for name, tensor in parts(before).items())


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_strides(policy: Quantizer, dtype: torch.dtype) -> None:
    """Half precision is encoded as the same numbers in float32 would be; what a tensor is a view of does not matter."""
    keys, values = pair(2, 3, 32, 32, dtype=dtype)
    kv = policy.encode(keys, values)
    assert all(x.dtype == dtype for x in kv.decode())
    in_float = policy.encode(keys.float(), values.float())
    for name, tensor in parts(kv).items():
        assert torch.equal(tensor, parts(in_float)[name].to(tensor.dtype)), name
    as_projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (keys, values)]
    inside = [torch.cat([x, x], dim=-1)[..., 32:] for x in (keys, values)]
    for strided in (as_projected, inside):
        assert not strided[0].is_contiguous()
        again = policy.encode(*strided)
        assert_same(again, kv)
        assert again.nbytes == kv.nbytes


@every
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_head_dims(policy: Quantizer, head_dim: int) -> None:
    keys, values = pair(1, 2, 16, head_dim)
    got = policy.encode(keys, values).decode()
    for x, decoded in zip((keys, values), got, strict=True):
        assert decoded.shape == x.shape
        assert (decoded - x).norm() < 0.4 * x.norm()


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_refused(policy: Quantizer, bad: float) -> None:
    for side in (i for i, codec in enumerate(policy.codecs()) if codec is not None):
        x = [torch.zeros(1, 2, 32, 16), torch.zeros(1, 2, 32, 16)]
        x[side][0, 1, 8, 5] = bad
        with pytest.raises(ValueError, match="cannot quantize keys or values with inf or nan"):
            policy.encode(*x)


@every
def test_keys_and_values_must_agree(policy: Quantizer) -> None:
    with pytest.raises(ValueError, match=r"must be \[batch, kv_heads, tokens, head_dim\], got \[1, 2, 8, 16\] and"):
        policy.encode(torch.zeros(1, 2, 8, 16), torch.zeros(1, 2, 9, 16))


@every
def test_zeros_come_back_as_zeros_and_requantizing_as_itself(policy: Quantizer) -> None:
    zeros = torch.zeros(1, 2, 32, 16)
    assert not any(x.any() for x in policy.encode(zeros, -zeros).decode())
    if isinstance(policy, GEAR | Kitty) or getattr(policy, "clip", 1) < 1:
        return  # boosted channels, outliers and factors are chosen anew; what was clipped is clipped again
    once = policy.encode(*pair(2, 2, 48, 32)).decode()
    assert all(torch.equal(a, b) for a, b in zip(policy.encode(*once).decode(), once, strict=True))


@every
def test_two_formats_in_one_cache_are_refused(policy: Quantizer) -> None:
    other = KIVI(2, 16, 0) if isinstance(policy, FP8) else FP8(3.0)
    kv = policy.encode(*pair(1, 2, 32, 16))
    more = kv.append(*pair(1, 2, 32, 16))
    codec = next(codec for codec in policy.codecs() if codec is not None)
    with pytest.raises(ValueError, match=f"slots packed as .*{type(codec).__name__}.* cannot take slots"):
        other(more, step(more))


# --- How slots leave ---------------------------------------------------------------------------------------------


def kept_at_random(counts: Tensor, width: int, ragged: bool) -> Tensor:
    """[B, H, K] ascending, -1 after the last."""
    lists = []
    for count in counts.flatten().tolist():
        amount = int(torch.randint(1, count + 1, ())) if ragged else width // 2
        lists.append(torch.randperm(count)[:amount].sort().values)
    longest = max(len(x) for x in lists)
    return torch.stack([torch.nn.functional.pad(x, (0, longest - len(x)), value=-1) for x in lists]).view(
        *counts.shape, longest
    )


def rows_of(dense: Tensor, index: Tensor) -> list[Tensor]:
    """The live rows of each list, dense [B, H, S, D] at index [B, H, K]."""
    return [dense[b, h][index[b, h][index[b, h] >= 0]] for b in range(index.shape[0]) for h in range(index.shape[1])]


@every
@pytest.mark.parametrize("ragged", [False, True])
def test_gather_keeps_codes_and_never_encodes_again(
    policy: Quantizer, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, values = pair(2, 2, 53, 16)
    kv = policy.encode(keys, values)
    with monkeypatch.context() as patch:
        patch.setattr(Packed, "encode", lambda *_: pytest.fail("gather encoded again"))
        for _ in range(3):
            index = kept_at_random(kv.counts.per_head, kv.counts.width, ragged)
            kept = kv.gather(index)
            for before, after in zip((kv.keys, kv.values), (kept.keys, kept.values), strict=True):
                expected = rows_of(before.dense(), index)
                live = [x[:n] for x, n in zip(after.dense().flatten(0, 1), kept.counts.per_head.flatten(), strict=True)]
                assert all(torch.equal(a, b) for a, b in zip(live, expected, strict=True))
                if before.body is not None and after.body is not None:
                    first, end = (x[..., None] for x in before.packed)
                    starts = before.body.counts.starts().view(2, 2, 1)
                    chosen = (starts + index - first)[(index >= first) & (index < end)]
                    for name, tensor in before.body.exact.rows.items():
                        assert torch.equal(after.body.rows[name], tensor[chosen])
            kv = kept


@every
def test_some_columns_are_decoded_as_all_are(policy: Quantizer) -> None:
    keys, values = pair(2, 2, 53, 16)
    lengths = torch.arange(53) >= torch.tensor([0, 30])[:, None]
    padded = empty(keys).append(keys, values, valid=lengths)
    even = policy.encode(keys, values)
    for kv in (even, policy(padded, step(padded)), even.gather(kept_at_random(even.counts.per_head, 53, ragged=True))):
        live = kv.counts.live()
        for held in (kv.keys, kv.values):
            whole, width = held.dense(), kv.counts.width
            for start, stop in ((0, width), (0, 1), (3, 11), (5, width - 1), (width - 1, width)):
                part = held.columns(start, stop)
                assert part.dtype == torch.float32
                assert torch.equal(part[live[..., start:stop]], whole[:, :, start:stop][live[..., start:stop]])


@every
def test_slots_packed_after_a_gather_join_those_packed_before(policy: Quantizer) -> None:
    keys, values = pair(2, 2, 90, 16)
    kv = policy.encode(keys[:, :, :40], values[:, :, :40])
    kv = kv.gather(kept_at_random(kv.counts.per_head, 40, ragged=True))
    before = [(held.packed[1], held.dense()) for held in (kv.keys, kv.values)]
    counts = kv.counts.per_head
    grown = kv.append(keys[:, :, 40:], values[:, :, 40:], seen=torch.tensor([40, 40]))
    grown = policy(grown, step(grown))
    assert torch.equal(grown.counts.per_head, counts + 50)
    for (packed, dense), held, new in zip(before, (grown.keys, grown.values), (keys, values), strict=True):
        after = held.dense()
        for b in range(2):
            for h in range(2):
                n, old = int(packed[b, h]), int(counts[b, h])
                assert torch.equal(after[b, h, :n], dense[b, h, :n])  # what was packed is untouched
                newest = min(int(held.counts.per_head[b, h] - held.packed[1][b, h]), 50)
                assert torch.equal(after[b, h, old + 50 - newest : old + 50], new[b, h, 90 - newest :])


@every
def test_gathering_everything_away_and_starting_again(policy: Quantizer) -> None:
    keys, values = pair(1, 2, 33, 16)
    kv = policy.encode(keys, values)
    newest = torch.tensor([[[32]]])
    kv = kv.gather(newest)
    assert kv.counts.even == 1 and kv.position.unique().tolist() == [32]
    kv = kv.append(keys, values, seen=torch.tensor([33]))
    kv = policy(kv, step(kv))
    assert kv.counts.even == 34 and torch.isfinite(kv.keys.dense()).all()


def test_sinks_stay_exact_and_two_sides_keep_their_own() -> None:
    keys, values = pair(2, 2, 40, 16)
    kv = (KIVI(2, 8, 16, sinks=5).keys & FP8(sinks=3).values).encode(keys, values)
    assert torch.equal(kv.keys.dense()[:, :, :5], keys[:, :, :5]) and not torch.equal(kv.keys.dense(), keys)
    assert torch.equal(kv.values.dense()[:, :, :3], values[:, :, :3])
    packed_keys = KIVI(2, 8, 16).encode(keys[:, :, 5:], values[:, :, 5:]).keys
    packed_values = FP8().encode(keys[:, :, 3:], values[:, :, 3:]).values
    assert torch.equal(kv.keys.dense()[:, :, 5:], packed_keys.dense())
    assert torch.equal(kv.values.dense()[:, :, 3:], packed_values.dense())
    kept = kv.gather(torch.tensor([[[2, 20], [30, 39]]]).expand(2, -1, -1))  # sinks may be evicted, too
    assert kept.keys.packed[0].tolist() == [[1, 0]] * 2 and torch.equal(kept.keys.dense()[:, 0, 0], keys[:, 0, 2])
    half = Mixed(None, FP8()).encode(keys, values)
    assert torch.equal(half.keys.dense(), keys) and half.keys.body is None
    assert half.nbytes == keys.nbytes + values.numel()
    for wrong in (lambda: FP8().keys & NVFP4().keys, lambda: FP8().keys & FP8()):
        with pytest.raises(TypeError, match="takes one side of keys and one of values"):
            wrong()
    for policy in (lambda: FP8(sinks=-1), lambda: KIVI(sinks=2.0)):
        with pytest.raises(ValueError, match="sinks must be an int of 0 or more tokens"):
            policy()


def fullness(kv: KV) -> float:
    body = kv.keys.body
    return body.counts.total / (len(body.groups["scale"]) * body.codec.group)


def test_compaction_encodes_sparse_lists_once_more_and_no_row_twice(caplog: pytest.LogCaptureFixture) -> None:
    keys, values = pair(2, 2, 64, 16)
    plain, policy = KIVI(2, 8, 0), KIVI(2, 8, 0, compact=0.5)
    every_third = torch.arange(0, 64, 3).expand(2, 1, -1)
    kept = plain.encode(keys, values).gather(every_third)
    assert policy(plain.encode(keys, values), step(kept)).keys.body.closed is None  # full groups are left alone
    with caplog.at_level("INFO", logger="kvbench"):
        once = policy(kept, step(kept))
    assert fullness(kept) < 0.5 < fullness(once) and once.nbytes < kept.nbytes
    assert "compacted 64 rows" in caplog.text and "relative error" in caplog.text
    # 22 rows a list: the oldest 16 as if their decoded values had come in that order, the other 6 as they were.
    old, new = kept.keys.dense(), once.keys.dense()
    fresh = plain.encode(old[:, :, :16], old[:, :, :16]).keys.dense()
    assert torch.equal(new[:, :, :16], fresh) and torch.equal(new[:, :, 16:], old[:, :, 16:])
    assert once.nbytes == sum(t.untyped_storage().nbytes() for _, t in once.tensors())
    assert once.row_nbytes().sum() == once.nbytes
    fewer = once.gather(
        torch.arange(0, 22, 5).expand(2, 1, -1)
    )  # sparse again, but only the 2 rows not yet encoded twice
    again = policy(fewer, step(fewer))
    assert torch.equal(again.keys.dense(), fewer.keys.dense())
    both = once.select(torch.tensor([1, 1]))
    assert torch.equal(both.keys.dense()[0], new[1]) and policy(both, step(both)).keys.body.closed is not None
    alone = policy(kept.select(torch.tensor([1])), step(kept.select(torch.tensor([1]))))
    assert torch.equal(alone.keys.dense()[0], new[1])
    with pytest.raises(ValueError, match="compact must be a share from 0 to 1, got 2"):
        KIVI(compact=2)


@pytest.mark.parametrize(
    "policy", [KIVI(2, 8, 0), KIVI(2, 8, 0, compact=0.5), KIVI(4, 8, 16, sinks=4), NVFP4()], ids=str
)
def test_bytes_stop_growing_however_long_slots_come_and_go(policy: Quantizer) -> None:
    """The worst case: at every step a slot drawn anew is lost, so scales outlive most of those that shared them."""
    steps, budget, held, seen = 600, 64, [], 0
    keys, values = pair(1, 2, budget + steps, 16)
    kv = empty(keys)
    for end in range(budget, budget + steps + 1):
        kv = kv.append(keys[:, :, seen:end], values[:, :, seen:end], seen=torch.tensor([seen]))
        seen = end
        kv = (Random(budget, seed=end) | policy)(kv, Step(0, torch.tensor([64]), torch.tensor([seen]), seen > 64))
        held.append(kv.nbytes)
    assert kv.counts.even == budget
    assert max(held[steps // 2 :]) <= 1.1 * max(held[: steps // 2])


def test_orphan_scales_live_as_long_as_one_member_and_are_counted() -> None:
    heads, group, head_dim = 2, 8, 16
    kv = KIVI(2, group, 0).encode(*pair(1, heads, 4 * group, head_dim))
    index = torch.tensor([[[0, 17], [8, 9]]])  # two groups of the first head, one of the second
    kept = kv.gather(index).keys.body
    assert kept.groups["scale"].shape == kept.groups["zero"].shape == (3, head_dim)
    assert kept.group_of.tolist() == [0, 1, 2, 2] and kept.group_of.dtype == torch.int16
    codes, metadata, references = 4 * head_dim * 2 // 8, 3 * head_dim * 4, 4 * 2
    assert sum(t.untyped_storage().nbytes() for _, t in kept.tensors()) == codes + metadata + references
    everything = kv.gather(torch.arange(4 * group).view(1, 1, -1)).keys
    assert torch.equal(everything.dense(), kv.keys.dense())


@every
@pytest.mark.parametrize("gathered", [False, True])
def test_select_repeats_and_reorders_rows(policy: Quantizer, gathered: bool) -> None:
    kv = policy.encode(*pair(3, 2, 43, 16))
    if gathered:
        kv = kv.gather(kept_at_random(kv.counts.per_head, 43, ragged=True))
    chosen = torch.tensor([2, 0, 0])
    picked = kv.select(chosen)
    assert torch.equal(picked.counts.per_head, kv.counts.per_head[chosen])
    assert torch.equal(picked.position, kv.position[chosen][..., : picked.position.shape[-1]])
    live = picked.counts.live()
    for before, after in zip(kv.decode(), picked.decode(), strict=True):
        assert torch.equal(after[live], before[chosen][:, :, : after.shape[2]][live])
    assert picked.nbytes == sum(t.untyped_storage().nbytes() for _, t in picked.tensors())


# --- Bytes -------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("itemsize, dtype", [(2, torch.bfloat16), (4, torch.float32)])
def test_nbytes_is_the_storages_and_the_formula(policy: Quantizer, itemsize: int, dtype: torch.dtype) -> None:
    tokens = torch.tensor([1, 7, 8, 16, 31, 32, 33, 100])
    formula = policy.slot_nbytes(tokens, 3, 32, itemsize).tolist()
    for count, expected in zip(tokens.tolist(), formula, strict=True):
        kv = policy.encode(*pair(2, 3, count, 32, dtype=dtype))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in kv.tensors() if t.numel()}
        assert kv.nbytes == sum(storages.values()) == 2 * expected


@pytest.mark.parametrize(
    "policy, bits",
    [
        (KIVI(2, 32, 0), 3.0), (KIVI(2, 64, 0), 2.5), (KIVI(2, 128, 0), 2.25),
        (KIVI(4, 32, 0), 5.0), (KIVI(4, 64, 0), 4.5), (KIVI(4, 128, 0), 4.25),
        (NVFP4(), 4.5), (FP8(), 8.0),
    ],
    ids=str,
)  # fmt: skip
def test_bits_per_element_at_128_channels(policy: Quantizer, bits: float) -> None:
    for codec in policy.codecs():
        assert 8 * (codec.row_nbytes(128) + codec.group_nbytes(128) / codec.group) == bits * 128
    keys, values = pair(1, 2, 256, 128, dtype=torch.float16)
    assert 8 * policy.encode(keys, values).nbytes == bits * (keys.numel() + values.numel())


def test_window_overhead_of_kivi_at_4096_tokens() -> None:
    """KIVI-2 with groups of 32 and a window of 128: 3.20 bits for keys on average over T, 3.41 for values."""
    tokens = torch.arange(4096, 4096 + 128)
    bits = KIVI().slot_nbytes(tokens, 8, 128, 2) * 8 / (tokens * 2 * 8 * 128)
    assert float(bits.mean()) == pytest.approx(3.30, abs=0.01)


def test_ragged_rows_hold_only_their_own_bytes() -> None:
    """A batch of lengths 40 and 8 takes the bytes of 48 packed slots, not of 80."""
    keys, values = pair(2, 1, 40, 16)
    valid = torch.arange(40) >= torch.tensor([[0], [32]])
    kv = empty(keys).append(keys, values, valid=valid)
    kv = FP8()(kv, step(kv))
    assert kv.nbytes == 2 * 48 * 16


# --- Codecs by themselves ----------------------------------------------------------------------------------------


@every
def test_codecs_state_their_bytes_and_share_by_value(policy: Quantizer) -> None:
    for mine, again in zip(policy.codecs(), replace(policy).codecs(), strict=True):
        assert mine == again and hash(mine) == hash(again)
        if mine is None:
            continue
        counts = Counts((1, 1), torch.device("cpu"), 2 * mine.group)
        rows, groups = mine.encode(torch.randn(2 * mine.group, 32), Where(counts, torch.arange(2 * mine.group)))
        assert sum(t[0].numel() * t.element_size() for t in rows.values()) == mine.row_nbytes(32)
        assert sum(t[0].numel() * t.element_size() for t in groups.values()) == mine.group_nbytes(32)
        assert all(len(t) == 2 * mine.group for t in rows.values()) and all(len(t) == 2 for t in groups.values())
        for tensor in (*rows.values(), *groups.values()):
            assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


@every
def test_rows_permuted_with_their_group_references_decode_permuted(policy: Quantizer) -> None:
    for codec in policy.codecs():
        if codec is None:
            continue
        total = 4 * codec.group
        at = torch.arange(total)
        packed = Packed.encode(codec, torch.randn(total, 32), Counts((1, 1), torch.device("cpu"), total), at)
        order = torch.randperm(total)
        assert torch.equal(packed.pick(order, packed.counts).dense_rows(), packed.dense_rows()[order])


@pytest.mark.parametrize(
    "name, policy",
    [
        ("none", Full()),
        ("kivi2", KIVI(2, 32, 32)),
        ("kivi4", KIVI(4, 32, 32)),
        ("nvfp4", NVFP4()),
        ("fp8", FP8()),
    ],
)
def test_configurations(name: str, policy: Full | Quantizer) -> None:
    from importlib.resources import files

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = (files("kvbench.conf") / "quant" / f"{name}.yaml").read_text()
    assert instantiate(OmegaConf.create(config)) == policy


# --- Reading -----------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("evicted", [False, True], ids=["all", "evicted"])
@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
def test_products_with_packed_slots_are_those_with_decoded_ones(policy: Quantizer, evicted: bool, ragged: bool) -> None:
    keys, values = pair(2, 2, 53, 16)
    valid = torch.ones(2, 53, dtype=torch.bool)
    valid[1, : 9 * ragged] = False
    kv = empty(keys).append(keys, values, valid)
    kv = policy(kv, step(kv))
    if evicted:
        kv = Random(31)(kv, step(kv))
    query, weights = torch.randn(2, 2, 3, 16), torch.rand(2, 2, 3, kv.counts.width)
    weights = weights * kv.counts.live()[:, :, None]
    k, v = (x.float() for x in kv.decode())
    v = v * kv.counts.live()[..., None]
    for start, stop in ((0, kv.counts.width), (3, 11), (7, kv.counts.width - 2), (1, 2)):
        scores, part = kv.keys.scores(query, start, stop), slice(start, stop)
        live = kv.counts.live()[:, :, None, part].expand_as(scores)
        expected = query @ k[:, :, part].transpose(2, 3)
        torch.testing.assert_close(scores[live], expected[live], atol=2e-3, rtol=1e-3)
        mixed = kv.values.mix(weights[..., part], start, stop)
        torch.testing.assert_close(mixed, weights[..., part] @ v[:, :, part], atol=2e-3, rtol=1e-3)
