"""CAOTE against evicting one token and looking at what attention gives then."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvbench.policies import (
    CAOTE,
    H2O,
    KIVI,
    KV,
    TOVA,
    AdaKV,
    Evictor,
    KeyDiff,
    LagKV,
    PyramidKV,
    Random,
    SnapKV,
    Step,
    StreamingLLM,
)
from kvbench.policies.caote import output_change


def step(*seen: int, **more) -> Step:
    return Step(0, torch.tensor(seen), torch.tensor(seen), scaling=0.5, **more)


def change(weight: Tensor, values: Tensor, fast: bool = False) -> Tensor:
    """weight [S], values [S, D], double -> for each slot the distance between the outputs with and without it."""
    weight = weight / weight.sum()
    output, found = weight @ values, []
    for j in range(len(weight)):
        left = [i for i in range(len(weight)) if i != j]
        if fast:
            found.append(weight[j] / (1 - weight[j]) * (values.mean(0) - values[j]).norm())
        else:
            found.append((output - weight[left] / weight[left].sum() @ values[left]).norm())
    return torch.stack(found)


def sharp(*shape: int) -> Tensor:
    """Positive numbers over several decades."""
    return torch.rand(shape) * 10 ** (4 * torch.rand(shape) - 4)


@pytest.mark.parametrize("fast", [False, True])
def test_it_is_the_error_of_evicting_one_token(fast):
    weight, values = sharp(2, 3, 20).double(), torch.randn(2, 3, 20, 8).double()
    found = output_change(weight, values, torch.ones(2, 3, 20, dtype=torch.bool), fast)
    expected = torch.stack(
        [torch.stack([change(weight[b, h], values[b, h], fast) for h in range(3)]) for b in range(2)]
    )
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("recent", [0, 3])
def test_around_h2o(fast, recent):
    keys, values = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    attention = sharp(2, 3, 20)
    kv = KV.of(keys, values).with_columns(attention=attention)
    policy = CAOTE(H2O(8, recent=recent), fast)
    score, kept = policy.score(kv, step(20, 20)), policy(kv, step(20, 20))
    assert score.dtype == torch.float32
    for b in range(2):
        for h in range(3):
            expected = change(attention[b, h].double(), values[b, h].double(), fast)
            torch.testing.assert_close(score[b, h].double(), expected, atol=1e-6, rtol=1e-4)
            best = sorted(range(20 - recent), key=lambda s: -float(expected[s]))[: 8 - recent]
            assert kept.position[b, h].tolist() == sorted([*best, *range(20 - recent, 20)])
    assert torch.equal(kept.column("attention"), attention.gather(2, kept.position.long()))


def test_around_tova_heads_go_their_own_ways():
    keys, values, queries = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8), 2 * torch.randn(1, 4, 1, 8)
    kv, now = KV.of(keys, values), step(20, queries=queries)
    policy = CAOTE(TOVA(8))
    score = policy.score(kv, now)
    weight = TOVA(8).score(kv, now)[0, 0].double()
    for h in range(2):
        torch.testing.assert_close(score[0, h].double(), change(weight, values[0, h].double()), atol=1e-6, rtol=1e-4)
    kept = policy(kv, now)
    assert kept.position[0, 0].tolist() != kept.position[0, 1].tolist()
    assert (kept.position[..., -1] == 19).all()
    assert not policy.shared_over_heads
    # Once they have, a slot still gets the weight of its own token.
    new = torch.randn(1, 2, 1, 8)
    kv = kept.append(new, new, seen=torch.tensor([20]))
    score, weight = policy.score(kv, step(21, queries=queries)), TOVA(8).score(kv, step(21, queries=queries))
    for h in range(2):
        expected = change(weight[0, h].double(), kv.values.dense()[0, h].double())
        torch.testing.assert_close(score[0, h].double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("base", [SnapKV(12, 4, 3), SnapKV(12, 4, 5, "avg"), PyramidKV(12, 4, 3)], ids=str)
def test_around_snapkv_the_window_has_no_part(base):
    keys, values, queries = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8), 2 * torch.randn(1, 4, 4, 8)
    kv, now = KV.of(keys, values), step(20, queries=queries)
    weight, kept = base.score(kv, now)[0, :, :16].double(), CAOTE(base)(kv, now)
    score = CAOTE(base).score(kv, now)
    for h in range(2):
        expected = change(weight[h], values[0, h, :16].double())
        torch.testing.assert_close(score[0, h, :16].double(), expected, atol=1e-6, rtol=1e-4)
        best = sorted(range(16), key=lambda s: -float(expected[s]))[:8]
        assert kept.position[0, h].tolist() == sorted([*best, *range(16, 20)])


def test_values_decide_among_equal_weights():
    values = torch.randn(1, 1, 12, 8)
    values[0, 0, 4] *= 20
    kv = KV.of(values, values).with_columns(attention=torch.ones(1, 1, 12))
    assert 4 in CAOTE(H2O(1, recent=0))(kv, step(12)).position
    assert H2O(1, recent=0)(kv, step(12)).position.tolist() == [[[11]]]


@pytest.mark.parametrize("fast", [False, True])
def test_equal_values_tie_and_the_most_recent_win(fast):
    values = torch.randn(8).expand(1, 2, 30, 8)
    kv = KV.of(values, values).with_columns(attention=sharp(1, 2, 30))
    policy = CAOTE(H2O(9, recent=0), fast)
    assert torch.equal(policy.score(kv, step(30)), torch.zeros(1, 2, 30))
    assert policy(kv, step(30)).position.tolist() == [[list(range(21, 30))] * 2]


def test_a_value_like_the_output_is_worth_nothing():
    values, weight = torch.randn(1, 1, 10, 8).double(), torch.full((1, 1, 10), 0.1).double()
    values[0, 0, 9] = values[0, 0, :9].mean(0)
    found = output_change(weight, values, torch.ones(1, 1, 10, dtype=torch.bool))[0, 0]
    assert found[9] < 1e-12 < found[:9].min()


@pytest.mark.parametrize("rest", [1e-3, 1e-9, 1e-30, 0.0])
@pytest.mark.parametrize("fast", [False, True])
def test_a_slot_with_nearly_all_the_weight_stays(rest, fast):
    keys, values = torch.randn(1, 1, 12, 8), torch.randn(1, 1, 12, 8)
    for top in (0, 5):
        attention = torch.full((1, 1, 12), rest)
        attention[..., top] = 1
        kv = KV.of(keys, values).with_columns(attention=attention)
        policy = CAOTE(H2O(1, recent=0), fast)
        assert policy.score(kv, step(12)).isfinite().all()
        assert policy(kv, step(12)).position.tolist() == [[[top]]]
        if not fast:
            others = torch.arange(12) != top
            expected = (values[0, 0, top] - values[0, 0, others].mean(0)).norm() / (1 + 11 * rest)
            torch.testing.assert_close(policy.score(kv, step(12))[0, 0, top], expected)


def test_no_attention_at_all_is_a_tie():
    values = torch.randn(1, 1, 12, 8)
    kv = KV.of(values, values).with_columns(attention=torch.zeros(1, 1, 12))
    assert CAOTE(H2O(3, recent=0))(kv, step(12)).position.tolist() == [[[9, 10, 11]]]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("pads", [1, 9])
def test_a_padded_row_scores_as_alone(fast, pads):
    keys, values, queries = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8), 2 * torch.randn(2, 4, 4, 8)
    valid = torch.arange(20) >= torch.tensor([[0], [pads]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, values, valid, torch.zeros(2, dtype=torch.int64))
    kv = kv.with_columns(attention=sharp(2, 2, 20))
    alone = KV.of(keys[1:, :, pads:], values[1:, :, pads:])
    alone = alone.with_columns(attention=kv.columns["attention"][1:, :, : 20 - pads])
    kv.keys.tail[1, :, 20 - pads :] = kv.values.tail[1, :, 20 - pads :] = 1e4  # dead columns may hold anything
    now, single = step(20, 20 - pads, queries=queries), step(20 - pads, queries=queries[1:])
    for policy in (CAOTE(H2O(6), fast), CAOTE(SnapKV(6, 4, 3), fast), CAOTE(TOVA(6), fast)):
        expected = policy.score(alone, single)
        torch.testing.assert_close(policy.score(kv, now)[1:, :, : 20 - pads], expected, atol=1e-6, rtol=1e-4)
        assert torch.equal(policy(kv, now).position[1:, :, :6], policy(alone, single).position)


def test_the_order_of_tokens_and_of_channels_does_not_matter():
    attention, values, order = sharp(1, 2, 20), torch.randn(1, 2, 20, 8), torch.randperm(20)
    score = output_change(attention, values, torch.ones(1, 2, 20, dtype=torch.bool))
    moved = output_change(attention[..., order], values[:, :, order], torch.ones(1, 2, 20, dtype=torch.bool))
    torch.testing.assert_close(moved, score[..., order], atol=1e-6, rtol=1e-4)
    turned = values @ torch.linalg.qr(torch.randn(8, 8)).Q + torch.randn(8)
    again = output_change(7 * attention, turned, torch.ones(1, 2, 20, dtype=torch.bool))
    torch.testing.assert_close(again, score, atol=1e-5, rtol=1e-4)


def test_values_are_scored_as_attention_reads_them():
    keys, values = torch.randn(1, 2, 64, 32), torch.randn(1, 2, 64, 32)
    packed = KIVI(group_size=32, residual=0)(KV.of(keys, values), step(64)).with_columns(attention=sharp(1, 2, 64))
    read = KV.of(*packed.decode()).with_columns(attention=packed.columns["attention"])
    policy = CAOTE(H2O(20))
    assert torch.equal(policy.score(packed, step(64)), policy.score(read, step(64)))
    assert torch.equal(policy(packed, step(64)).position, policy(read, step(64)).position)


def test_the_rest_is_the_bases():
    policy = CAOTE(SnapKV(memory=0.25, window=16, block=64))
    assert (policy.memory, policy.block, policy.min_slots, policy.fast) == (0.25, 64, 16, False)
    assert policy.needs == {"queries": 16} and not policy.evicts_while_decoding
    assert CAOTE(H2O(9)).slot_state_nbytes == 4
    assert str(CAOTE(H2O(0.5), fast=True)) == "CAOTE(base=H2O(budget=0.5), fast=True)"


@dataclass(frozen=True)
class Signed(H2O):
    def score(self, kv: KV, step: Step) -> Tensor:
        return super().score(kv, step) - 1


@pytest.mark.parametrize(
    "base", [KeyDiff(0.5), Random(0.5), StreamingLLM(0.5), LagKV(0.5), AdaKV(KeyDiff(0.5)), CAOTE(H2O(0.5))], ids=str
)
def test_a_base_whose_scores_are_no_attention_is_refused(base: Evictor):
    with pytest.raises(ValueError, match=r"CAOTE: base must score by attention weights \(H2O, SnapKV, TOVA\), and "):
        CAOTE(base)


def test_bad_options():
    with pytest.raises(TypeError, match="CAOTE: base must be an evictor"):
        CAOTE(KIVI())
    with pytest.raises(ValueError, match="CAOTE: fast must be True or False, got 1"):
        CAOTE(H2O(0.5), fast=1)
    values = torch.randn(1, 1, 12, 8)
    kv = KV.of(values, values).with_columns(attention=torch.full((1, 1, 12), 0.5))
    with pytest.raises(ValueError, match="needs the last queries"):
        CAOTE(SnapKV(3, 1))(kv, step(12))
    with pytest.raises(ValueError, match=r"scores of Signed\(budget=3\) go down to -0.5; none may be below 0"):
        CAOTE(Signed(3))(kv, step(12))
