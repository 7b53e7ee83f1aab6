"""Q-Hitter against loops: errors token by token, then the newest, the heaviest, and the best of both kinds."""

import math

import pytest
import torch
from torch import Tensor

from kvbench.policies import FP8, H2O, KIVI, KV, NVFP4, QHitter, Quantizer, Stack, Step


def step(*seen: int, new: int | None = None, stack: Stack | None = None, **more) -> Step:
    came = None if new is None else torch.full((len(seen),), new)
    stacked = () if stack is None else stack.policies
    return Step(0, torch.tensor(seen), torch.tensor(seen), new=came, stack=stacked, **more)


def sharp(*shape: int) -> Tensor:
    """Positive numbers over several decades."""
    return torch.rand(shape) * 10 ** (3 * torch.rand(shape) - 3)


def uneven(*shape: int) -> Tensor:
    """Tokens of very different sizes, some with all channels of one sign."""
    return torch.randn(shape) * sharp(*shape[:-1])[..., None] + (torch.rand(shape[:-1]) > 0.5)[..., None]


def rounding(token: list[float], bits: int) -> float:
    low, high = min(token), max(token)
    scale = (high - low) / (2**bits - 1)
    return math.sqrt(sum((x - low - round((x - low) / scale) * scale) ** 2 for x in token))


def best(attention: list[float], error: list[float], budget: int, heavy: int, recent: int, weight: float) -> list[int]:
    slots = len(attention)
    kept = list(range(slots - recent, slots))
    older = sorted(range(slots - recent), key=lambda s: (-attention[s], -s))
    kept += older[:heavy]

    def normal(x: list[float]) -> list[float]:
        return [(v - min(x)) / (max(x) - min(x)) for v in x]

    a, e = normal(attention), normal(error)
    rest = sorted(older[heavy:], key=lambda s: -(weight * a[s] + (1 - weight) * (1 - e[s])))
    return sorted([*kept, *rest[: budget - len(kept)]])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_without_a_quantizer_the_error_is_that_of_min_max_rounding(bits):
    keys, values = uneven(2, 2, 15, 8), uneven(2, 2, 15, 8)
    keys[0, 0, 3] = 0.5  # a constant token loses nothing
    values[0, 0, 3] = -2
    kv = KV.of(keys, values).with_columns(attention=sharp(2, 2, 15))
    error = QHitter(10, bits=bits).observe(kv, step(15, 15)).column("quant_error")
    assert error.dtype == torch.float32 and error[0, 0, 3] == 0
    for b, h, s in ((b, h, s) for b in range(2) for h in range(2) for s in range(15) if (b, h, s) != (0, 0, 3)):
        expected = rounding(keys[b, h, s].tolist(), bits) + rounding(values[b, h, s].tolist(), bits)
        assert float(error[b, h, s]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def lost(quantizer: Quantizer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """L2 error of each token of keys and of values, all of them packed together."""
    decoded = quantizer.encode(keys, values).decode()
    return tuple((x.float() - y.float()).norm(dim=-1) for x, y in zip(decoded, (keys, values), strict=True))


@pytest.mark.parametrize("quantizer", [FP8(), NVFP4(), KIVI(residual=0), KIVI(4, residual=64)], ids=str)
@pytest.mark.parametrize("tokens", [64, 70, 9])
def test_the_error_is_that_of_the_quantizer_that_follows(quantizer, tokens):
    policy = QHitter(tokens)
    stack = policy | quantizer
    keys, values = uneven(2, 2, tokens, 32).bfloat16(), uneven(2, 2, tokens, 32).bfloat16()
    kv = KV.of(keys, values).with_columns(attention=sharp(2, 2, tokens))
    kv = policy.observe(kv, step(tokens, tokens, stack=stack))
    found = kv.column("quant_error")
    assert torch.equal(policy.observe(kv, step(tokens, tokens, new=0, stack=stack)).column("quant_error"), found)
    at_once = KIVI(quantizer.bits, residual=0) if isinstance(quantizer, KIVI) else quantizer
    of_keys, of_values = lost(at_once, keys, values)
    if isinstance(quantizer, KIVI) and tokens % 32:
        # Keys beyond the last whole group share a scale with the 32 - 6 before them, or with copies of the last one.
        last = (
            keys[:, :, -32:] if tokens > 32 else torch.cat([keys, keys[:, :, -1:].expand(-1, -1, 32 - tokens, -1)], 2)
        )
        whole = tokens // 32 * 32
        end = lost(at_once, last, last)[0]
        of_keys[:, :, whole:] = end[:, :, whole - tokens :] if tokens > 32 else end[:, :, :tokens]
    torch.testing.assert_close(found, of_keys + of_values)


@pytest.mark.parametrize("quantizer", [NVFP4(), KIVI(residual=0)], ids=str)
def test_an_error_is_measured_once_and_rides_with_its_slot(quantizer):
    policy = QHitter(40)
    stack = policy | quantizer
    keys, values = uneven(1, 2, 50, 32), uneven(1, 2, 50, 32)
    kv = KV.of(keys[:, :, :40], values[:, :, :40]).with_columns(attention=sharp(1, 2, 40))
    kv = stack(kv, step(40, new=40))
    known = kv.column("quant_error")
    for t in range(40, 50):
        kv = kv.append(keys[:, :, t : t + 1], values[:, :, t : t + 1], seen=torch.tensor([t]))
        kv = kv.with_columns(attention=kv.columns["attention"] + sharp(*kv.columns["attention"].shape))
        held = torch.cat([kv.decode()[0][:, :, -32:-1], keys[:, :, t : t + 1]], 2)
        of_keys = lost(quantizer, held, held)[0][:, :, -1:]
        of_values = lost(quantizer, *(values[:, :, t : t + 1].expand(-1, -1, 32, -1),) * 2)[1][:, :, -1:]
        before, kv = kv, stack(kv, step(t + 1, new=1, decoding=True))
        known = torch.cat([known, of_keys + of_values], 2)
        old = before.position.expand(1, 2, -1)
        rides = torch.stack([torch.isin(old[0, h], kv.position[0, h]) for h in range(2)])[None]
        known = known[rides].view(1, 2, 40)
        torch.testing.assert_close(kv.column("quant_error"), known)


@pytest.mark.parametrize(
    ("heavy", "recent", "weight"), [(0.35, 0.25, 0.5), (0.0, 0.0, 0.3), (0.5, 0.5, 0.5), (0.2, 0.0, 0.0), (0, 0.6, 0.9)]
)
@pytest.mark.parametrize("budget", [1, 7, 20])
def test_kept_slots_equal_the_definition(heavy, recent, weight, budget):
    keys, values, attention = uneven(2, 2, 30, 8), uneven(2, 2, 30, 8), sharp(2, 2, 30)
    policy = QHitter(budget, heavy, recent, weight)
    kept = policy(KV.of(keys, values).with_columns(attention=attention), step(30, 30))
    for b in range(2):
        for h in range(2):
            error = [
                rounding(keys[b, h, s].tolist(), 4) + rounding(values[b, h, s].tolist(), 4) for s in range(30)
            ]  # fmt: skip
            sizes = math.floor(heavy * budget + 1e-6), math.floor(recent * budget + 1e-6)
            expected = best(attention[b, h].tolist(), error, budget, *sizes, weight)
            assert kept.position[b, h].tolist() == expected
    assert torch.equal(kept.column("attention"), attention.gather(2, kept.position.long()))


@pytest.mark.parametrize("heavy", [0.0, 0.35])
def test_with_all_the_weight_on_attention_it_is_h2o(heavy):
    keys, attention = uneven(3, 2, 60, 16), sharp(3, 2, 60)
    kv = KV.of(keys, keys).with_columns(attention=attention)
    expected = H2O(20, recent=0.25)(kv, step(60, 60, 60)).position
    assert torch.equal(QHitter(20, heavy, attention=1)(kv, step(60, 60, 60)).position, expected)
    assert not torch.equal(QHitter(20, heavy)(kv, step(60, 60, 60)).position, expected)


def test_16_bits_lose_nothing():
    keys, attention = uneven(1, 2, 30, 16), sharp(1, 2, 30)
    kv = KV.of(keys, keys).with_columns(attention=attention)
    kept = QHitter(10, bits=16)(kv, step(30))
    assert (kept.column("quant_error") == 0).all()
    assert torch.equal(kept.position, H2O(10, recent=0.25)(kv, step(30)).position)


def test_a_larger_error_never_raises_a_rank():
    keys, attention, error = uneven(1, 1, 25, 8), sharp(1, 1, 25), sharp(1, 1, 25)
    kv, policy = KV.of(keys, keys).with_columns(attention=attention, quant_error=error), QHitter(10)
    for s in range(25):
        ranks = []
        for factor in (0.0, 0.5, 1.0, 2.0, 1e3):
            changed = error.clone()
            changed[..., s] *= factor
            score = policy.score(kv.with_columns(quant_error=changed), step(25))[0, 0]
            ranks.append(int((score > score[s]).sum()))
        assert ranks == sorted(ranks)


def test_equal_tokens_tie_and_the_most_recent_win():
    keys = torch.randn(8).expand(1, 2, 30, 8)
    kv = KV.of(keys, keys).with_columns(attention=torch.ones(1, 2, 30))
    assert QHitter(10)(kv, step(30)).position.tolist() == [[list(range(20, 30))] * 2]


@pytest.mark.parametrize("quantizer", [None, FP8(), KIVI(residual=0)], ids=str)
@pytest.mark.parametrize("pads", [1, 31, 60])
def test_a_padded_row_is_as_alone(quantizer, pads):
    keys, values, attention = uneven(2, 2, 70, 32), uneven(2, 2, 70, 32), sharp(2, 2, 70)
    valid = torch.arange(70) >= torch.tensor([[0], [pads]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, values, valid, torch.zeros(2, dtype=torch.int64))
    kv = kv.with_columns(attention=attention)
    kv.keys.tail[1, :, 70 - pads :] = kv.values.tail[1, :, 70 - pads :] = 1e4  # dead columns may hold anything
    policy = QHitter(8)
    stack = Stack((policy,) if quantizer is None else (policy, quantizer))
    alone = KV.of(keys[1:, :, pads:], values[1:, :, pads:]).with_columns(attention=attention[1:, :, : 70 - pads])
    now, single = step(70, 70 - pads, stack=stack), step(70 - pads, stack=stack)
    expected = policy.observe(alone, single)
    found = policy.observe(kv, now)
    real = 70 - pads
    torch.testing.assert_close(found.column("quant_error")[1:, :, :real], expected.column("quant_error"))
    torch.testing.assert_close(policy.score(found, now)[1:, :, :real], policy.score(expected, single))
    assert torch.equal(policy(kv, now).position[1:, :, :8], policy(alone, single).position)


def test_a_row_of_which_nothing_has_come_yet():
    keys, valid = uneven(2, 2, 20, 32), torch.tensor([[True] * 20, [False] * 20])
    policy, none = QHitter(8), torch.zeros(2, dtype=torch.int64)
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, none).with_columns(attention=sharp(2, 2, 20))
    kv.keys.tail[1] = 1e30
    stack = policy | KIVI(residual=0)
    kept = stack(kv, Step(0, torch.tensor([20, 0]), torch.tensor([20, 0]), new=torch.tensor([20, 0])))
    assert kept.counts.per_head.tolist() == [[8, 8], [0, 0]]


def test_state_counts_in_a_byte_budget():
    assert QHitter(10).slot_state_nbytes == 8
    keys = uneven(1, 2, 100, 32).bfloat16()
    kv = KV.of(keys, keys).with_columns(attention=sharp(1, 2, 100))
    policy = QHitter(memory=0.3)
    allowed = 0.3 * 100 * 2 * 2 * 32 * 2
    kept = policy(kv, step(100))
    assert kept.nbytes <= allowed < kept.nbytes + 2 * (2 * 32 * 2 + 4 + 8)
    kept = (policy | NVFP4())(kv, step(100))
    assert kept.nbytes <= allowed < kept.nbytes + 2 * (2 * 18 + 4 + 8)


def test_defaults_are_the_official_proportions():
    policy = QHitter(100)
    assert policy.needs == {"attention": 1}
    official = (0.07, 0.05, 0.08)
    ours = (policy.heavy, policy.recent, 1 - policy.heavy - policy.recent)
    assert ours == pytest.approx([x / sum(official) for x in official])
    assert (policy.attention, policy.bits) == (0.5, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heavy": -0.1}, "heavy must be a share from 0 to 1, got -0.1"),
        ({"recent": 1.5}, "recent must be a share from 0 to 1, got 1.5"),
        ({"attention": True}, "attention must be a share from 0 to 1, got True"),
        ({"heavy": 0.7, "recent": 0.4}, "heavy=0.7 and recent=0.4 must be at most 1 together"),
        ({"bits": 1}, "bits must be from 2 to 8, or 16 for no error, got 1"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=f"QHitter: {message}"):
        QHitter(10, **arguments)


def test_without_attention_it_says_so():
    keys = torch.randn(1, 2, 20, 8)
    with pytest.raises(KeyError, match="needs the column 'attention'"):
        QHitter(10)(KV.of(keys, keys), step(20))
