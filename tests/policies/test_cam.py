"""CaM against loops over evicted tokens and the kept ones that follow them."""

import pytest
import torch
from torch import Tensor

from kvbench.policies import H2O, KIVI, KV, CaM, Random, Step
from kvbench.policies.store import Held


def cache(batch: int, heads: int, slots: int, dim: int = 6) -> KV:
    """Random keys and values; sums of attention spread over two decades, larger for old slots."""
    kv = KV.of(torch.randn(batch, heads, slots, dim), torch.randn(batch, heads, slots, dim))
    return kv.with_columns(attention=10 ** (2 * torch.rand(batch, heads, slots) - 2) * torch.arange(slots, 0, -1))


def step(*seen: int, decoding: bool = False, layer: int = 0) -> Step:
    return Step(layer, torch.tensor(seen), torch.tensor(seen), decoding)


def shares(kept: list[int], sums: list[float], merge: int) -> dict[int, float]:
    """p of every token that is not in `kept`."""
    p = {}
    for j in set(range(len(sums))) - set(kept):
        after = [s for s in kept if s > j][:merge]
        mean = sum(sums[s] for s in after) / len(after) if after else 0.0
        p[j] = min(1.0, sums[j] / mean) if mean else 0.0
    return p


def merged(values: Tensor, kept: list[int], given: dict[int, float], merge: int) -> Tensor:
    """values [S, D] -> [K, D]."""
    out = {s: values[s].clone() for s in kept}
    for j, amount in given.items():
        for s in [s for s in kept if s > j][:merge]:
            out[s] = out[s] + amount * values[j] / merge
    return torch.stack([out[s] for s in kept])


@pytest.mark.parametrize("merge", [1, 3, 8, 50])
@pytest.mark.parametrize(("budget", "recent"), [(12, None), (7, 0), (9, 9), (23, 3)])
@pytest.mark.parametrize("normalize", ["none", "by_visible_queries"])
def test_expected_merges_equal_the_definition(merge, budget, recent, normalize):
    kv = cache(2, 2, 24)
    kept = CaM(budget, recent, normalize, merge=merge, sample=False)(kv, step(24, 24))
    assert torch.equal(kept.position, H2O(budget, recent, normalize)(kv, step(24, 24)).position)
    for b in range(2):
        for h in range(2):
            sums, slots = kv.column("attention")[b, h].tolist(), kept.position[b, h].tolist()
            if normalize != "none":
                sums = [total / (24 - s) for s, total in enumerate(sums)]
            p = shares(slots, sums, merge)
            expected = merged(kv.values.dense()[b, h], slots, p, merge)
            torch.testing.assert_close(kept.values.dense()[b, h], expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(
        kept.keys.dense(), kv.keys.dense().gather(2, kept.position.long()[..., None].expand(-1, -1, -1, 6))
    )


def test_draws_are_all_or_nothing_with_the_right_frequency_and_can_be_repeated():
    heads = 2000
    kv = KV.of(torch.ones(1, heads, 6, 1), torch.zeros(1, heads, 6, 1))
    values = kv.values.tail.clone()
    values[:, :, 1] = 4.0
    sums = torch.tensor([5.0, 0.3, 1.0, 1.0, 1.0, 1.0]).expand(1, heads, 6)  # token 1 goes, p = 0.3
    kv = KV(kv.keys, Held.dense_from(values), {"attention": sums})
    policy = CaM(5, recent=4, merge=2, seed=3)
    out = policy(kv, step(6)).values.dense()[0, :, :, 0]  # [heads, 5]: tokens 0, 2, 3, 4, 5
    assert out.unique(dim=0).tolist() == [[0.0] * 5, [0.0, 2.0, 2.0, 0.0, 0.0]]
    drawn = out[:, 1] > 0
    assert abs(float(drawn.float().mean()) - 0.3) < 0.04
    assert torch.equal(policy(kv, step(6)).values.dense()[0, :, :, 0], out)
    for other in (CaM(5, 4, merge=2, seed=4)(kv, step(6)), policy(kv, step(6, layer=1))):
        assert not torch.equal(other.values.dense()[0, :, :, 0], out)
    # Not the draws of a Random in the same stack.
    kept_by_random = Random(1, seed=3).score(kv, step(6))[0, :, 1] < 0.3
    assert not torch.equal(kept_by_random, drawn)


def test_certain_merges_are_always_drawn():
    kv = cache(1, 2, 30)
    kv = kv.with_columns(attention=torch.arange(30.0, 0, -1).expand(1, 2, 30))  # p = 1 for all that go
    always, expected = CaM(10, 10, merge=4)(kv, step(30)), CaM(10, 10, merge=4, sample=False)(kv, step(30))
    assert torch.equal(always.values.dense(), expected.values.dense())
    torch.testing.assert_close(
        always.values.dense()[0, 0, 0], kv.values.dense()[0, 0, :21].sum(0) / 4 + 0.75 * kv.values.dense()[0, 0, 20]
    )


def test_while_decoding_values_gather_what_left_before_them():
    keys, values = torch.randn(1, 1, 40, 4), torch.randn(1, 1, 40, 4)
    policy, kv = CaM(8, recent=4, merge=3, sample=False), KV.of(keys[:, :, :8], values[:, :, :8])
    kv = kv.with_columns(attention=torch.rand(1, 1, 8))
    held, sums = {s: values[0, 0, s] for s in range(8)}, dict(enumerate(kv.column("attention")[0, 0].tolist()))
    for t in range(8, 40):
        kv = kv.append(keys[:, :, t : t + 1], values[:, :, t : t + 1], seen=torch.tensor([t]))
        received = torch.rand(1, 1, 9)
        kv = policy(kv.with_columns(attention=kv.column("attention") + received), step(t + 1, decoding=True))
        held[t], sums[t] = values[0, 0, t], 0.0
        for s, more in zip(held, received[0, 0].tolist(), strict=True):
            sums[s] += more
        gone = min(sorted(held)[:-4], key=lambda s: sums[s])
        after = [s for s in held if s > gone][:3]
        amount = min(1.0, sums[gone] / (sum(sums[s] for s in after) / 3))
        for s in after:
            held[s] = held[s] + amount * held[gone] / 3
        del held[gone], sums[gone]
        assert kv.position[0, 0].tolist() == list(held)
        torch.testing.assert_close(kv.values.dense()[0, 0], torch.stack(list(held.values())), atol=1e-4, rtol=1e-4)


def test_a_padded_row_is_merged_as_alone_and_a_row_with_room_stays():
    kv = cache(3, 2, 24)
    valid = torch.arange(24) >= torch.tensor([[0], [7], [16]])
    keys, values, sums = kv.keys.dense(), kv.values.dense(), kv.column("attention")
    none, zero = keys[:, :, :0], torch.zeros(3, dtype=torch.int64)
    padded = KV.of(none, none).append(keys, values, valid, zero)
    left = torch.full_like(sums, 1e6)
    for b, pads in enumerate((0, 7, 16)):
        left[b, :, : 24 - pads] = sums[b, :, pads:]
    padded = padded.with_columns(attention=left)
    padded.values.tail[~padded.counts.live()] = 1e3
    policy = CaM(10, merge=5)
    kept = policy(padded, step(24, 17, 8))
    for b, pads in enumerate((0, 7, 16)):
        alone = KV.of(keys[b : b + 1, :, pads:], values[b : b + 1, :, pads:]).with_columns(
            attention=sums[b : b + 1, :, pads:]
        )
        alone = policy(alone, step(24 - pads))
        width = min(10, 24 - pads)
        assert kept.position.expand(3, 2, -1)[b, :, :width].tolist() == alone.position.expand(1, 2, -1)[0].tolist()
        torch.testing.assert_close(kept.values.dense()[b, :, :width], alone.values.dense()[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(kept.values.dense()[2, :, :8], values[2, :, 16:])


def test_packed_values_take_no_merge_and_are_not_encoded_anew():
    keys, values = torch.randn(1, 2, 80, 32), torch.randn(1, 2, 80, 32)
    kv = KV.of(keys, values).with_columns(attention=torch.rand(1, 2, 80))
    packed = KIVI(bits=4, residual=32)(kv, step(80))  # values: 48 packed, 32 not
    before = packed.values.dense()
    kept = CaM(60, recent=20, merge=8, sample=False)(packed, step(80))
    body = kept.values.body.counts.per_head
    assert (body < 48).all() and (body > 28).all()
    for h in range(2):
        slots = kept.position[0, h].tolist()
        p = shares(slots, packed.column("attention")[0, h].tolist(), 8)
        expected = merged(before[0, h], slots, p, 8)
        expected[: body[0, h]] = before[0, h, slots[: body[0, h]]]
        torch.testing.assert_close(kept.values.dense()[0, h], expected, atol=1e-5, rtol=1e-5)
        assert not torch.equal(expected[body[0, h] :], before[0, h, slots[body[0, h] :]])


def test_values_that_another_evictor_left_flat():
    kv = cache(2, 2, 40)
    counts = torch.tensor([[40, 10], [24, 38]])
    index = torch.arange(40).expand(2, 2, -1)
    ragged = kv.gather(torch.where(index < counts[..., None], index, -1)).flattened()
    assert ragged.values.is_flat
    policy = CaM(20, merge=4, sample=False)
    kept, plain = (
        policy(ragged, step(40, 40)),
        policy(kv.gather(torch.where(index < counts[..., None], index, -1)), step(40, 40)),
    )
    live = kept.position >= 0
    assert torch.equal(kept.position, plain.position)
    assert torch.equal(kept.values.dense()[live], plain.values.dense()[live])
    assert kept.values.is_flat and kept.nbytes < plain.nbytes


def test_inputs_are_left_alone_rounding_is_once_and_nothing_evicted_changes_nothing():
    kv = cache(1, 2, 30)
    kv = KV(Held.dense_from(kv.keys.tail.bfloat16()), Held.dense_from(kv.values.tail.bfloat16()), kv.columns)
    values = kv.values.tail.clone()
    kept = CaM(12, merge=6, sample=False)(kv, step(30))
    assert torch.equal(kv.values.tail, values) and kept.values.dtype == torch.bfloat16
    wide = KV(kv.keys, Held.dense_from(values.float()), kv.columns)
    expected = CaM(12, merge=6, sample=False)(wide, step(30)).values.dense()
    assert torch.equal(kept.values.dense(), expected.bfloat16())
    assert kept.nbytes == sum(t.numel() * t.element_size() for _, t in kept.tensors())
    assert CaM(30)(kv, step(30)) is kv


def test_tokens_without_attention_give_nothing():
    kv = cache(1, 1, 10).with_columns(attention=torch.zeros(1, 1, 10))
    kept = CaM(4, sample=False)(kv, step(10))
    assert torch.equal(kept.values.dense(), kv.values.dense()[:, :, 6:])


def test_defaults():
    assert (CaM(9).merge, CaM(9).sample, CaM(9).seed, CaM(9).needs) == (32, True, 0, {"attention": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 5, "recent": 6}, "CaM: budget=5 is too small: it must be at least 6"),
        ({"budget": 5, "recent": -1}, "CaM: recent must be 0 or more tokens, got -1"),
        ({"budget": 5, "merge": 0}, "CaM: merge must be an int of at least 1 slot, got 0"),
        ({"budget": 5, "sample": 1}, "CaM: sample must be true or false, got 1"),
        ({"budget": 5, "seed": -1}, r"CaM: seed must be an int from 0 to 2\*\*32 - 1, got -1"),
        ({"budget": 5, "normalize": 0}, "CaM: normalize must be 'none' or 'by_visible_queries', got 0"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        CaM(**arguments)
