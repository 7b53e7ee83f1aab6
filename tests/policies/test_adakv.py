"""AdaKV against exact fractions: how many of the best scores of all heads are each head's."""

from dataclasses import dataclass
from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.kernels.attention import attend
from kvbench.policies import (
    CAOTE,
    H2O,
    KIVI,
    KV,
    TOVA,
    AdaKV,
    Evictor,
    KeyDiff,
    PyramidKV,
    Random,
    SnapKV,
    Step,
    StreamingLLM,
)


@dataclass(frozen=True)
class Given(Evictor):
    """Scores that ride with their slots; the newest `recent` slots are protected."""

    recent: int = 0

    @property
    def min_slots(self) -> int:
        return max(1, self.recent)

    def score(self, kv: KV, step: Step) -> Tensor:
        return kv.column("given")

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        return kv.from_newest <= self.recent


def of(scores: list[list[float]] | Tensor, dim: int = 4) -> KV:
    """One row whose heads have these scores."""
    given_scores = torch.as_tensor(scores, dtype=torch.float32)[None]
    keys = torch.randn(*given_scores.shape, dim)
    return KV.of(keys, torch.randn_like(keys)).with_columns(given=given_scores)


def step(*seen: int, **more) -> Step:
    return Step(0, torch.tensor(seen), torch.tensor(seen), **more)


def shares(scores: list[list[float]], budget: int, alpha: Fraction, recent: int) -> list[int]:
    """Slots of each head; scores of equally long heads, all different."""
    heads, before = len(scores), len(scores[0]) - recent
    b = budget - recent
    best = sorted(((s, h) for h, row in enumerate(scores) for s in row[:before]), reverse=True)[: heads * b]
    counts = [sum(1 for _, owner in best if owner == h) for h in range(heads)]
    least = floor(alpha * b)
    exact = [least + Fraction(n * (b - least), b) if b else Fraction(0) for n in counts]
    whole = [floor(x) for x in exact]
    ranked = [sorted(row[:before], reverse=True) + [float("-inf")] for row in scores]
    order = sorted(range(heads), key=lambda h: (whole[h] - exact[h], -ranked[h][whole[h]]))
    for h in order[: heads * b - sum(whole)]:
        whole[h] += 1
    return [recent + n for n in whole]


@st.composite
def cases(draw):
    heads, tokens = draw(st.integers(1, 5)), draw(st.integers(2, 24))
    scale = [draw(st.sampled_from([1, 5, 100])) for _ in range(heads)]
    order = draw(st.permutations(range(1, heads * tokens + 1)))
    rows = [[float(8 * scale[h] * x + h) for x in order[h * tokens : (h + 1) * tokens]] for h in range(heads)]
    recent = draw(st.integers(0, tokens - 1))
    return rows, draw(st.integers(max(1, recent), tokens)), draw(st.integers(0, 10)), recent


@settings(max_examples=25)
@given(cases())
def test_capacities_are_the_floor_and_the_share_of_the_best(case):
    scores, budget, tenths, recent = case
    kept = AdaKV(Given(budget, recent=recent), tenths / 10)(of(scores), step(len(scores[0])))
    expected = shares(scores, budget, Fraction(tenths, 10), recent)
    assert sum(expected) == len(scores) * budget
    assert kept.counts.per_head[0].tolist() == expected
    for h, row in enumerate(scores):
        before = range(len(row) - recent)
        best = sorted(before, key=lambda s: -row[s])[: expected[h] - recent]
        position = kept.position.expand(1, len(scores), -1)[0, h]
        assert position[position >= 0].tolist() == sorted([*best, *range(len(row) - recent, len(row))])


def test_an_example():
    scores = [[9.0, 8, 7, 6, 5, 4, 3, 2], [4.5, 1, 1, 1, 1, 1, 1, 1]]
    # Seven of the best eight are head 0's, and every head gets floor(0.25 * 4) = 1: 1 + 7 * 3/4 = 6.25, 1 + 3/4 = 1.75.
    assert AdaKV(Given(4), 0.25)(of(scores), step(8)).counts.per_head.tolist() == [[6, 2]]
    assert AdaKV(Given(4), 0)(of(scores), step(8)).counts.per_head.tolist() == [[7, 1]]
    assert AdaKV(Given(4), 1)(of(scores), step(8)).counts.per_head.tolist() == [[4, 4]]


def test_a_floor_of_one_is_the_base():
    keys, queries = torch.randn(2, 3, 30, 8), 2 * torch.randn(2, 6, 4, 8)
    kv, now = KV.of(keys, keys), step(30, 30, queries=queries)
    base = SnapKV(12, 4, 3)
    assert torch.equal(AdaKV(base, 1.0)(kv, now).position, base(kv, now).position)
    assert AdaKV(base, 0.0)(kv, now).counts.even is None


def test_equal_heads_get_equal_slots_even_if_all_scores_tie():
    row = torch.randn(20)
    assert AdaKV(Given(7))(of(row.expand(3, 20)), step(20)).counts.even == 7
    kept = AdaKV(Given(7))(of(torch.zeros(3, 20)), step(20))
    assert kept.position.tolist() == [[list(range(13, 20))] * 3]


def test_equal_scores_of_different_heads_count_for_the_most_recent():
    scores = [[9.0, 0, 0, -1, -1], [8.0, -1, -1, 0, 0]]
    assert AdaKV(Given(2), 0)(of(scores), step(5)).counts.per_head.tolist() == [[1, 3]]


def test_scores_of_any_sign_and_size():
    scores = torch.randn(3, 25)
    expected = AdaKV(Given(9))(of(scores), step(25)).position
    for other in (scores - 100, scores * 1e30, -1 / (scores + 10)):
        assert torch.equal(AdaKV(Given(9))(of(other), step(25)).position, expected)
    keys = torch.randn(1, 3, 25, 8) + 2 * torch.randn(1, 3, 1, 8)
    base, kv = KeyDiff(9, recent=2), KV.of(keys, keys)
    kept = AdaKV(base)(kv, step(25))
    score = base.score(kv, step(25))[0]
    assert kept.counts.per_head[0].tolist() == shares(score.tolist(), 9, Fraction(1, 5), 2)
    for h in range(3):
        position = kept.position[0, h][kept.position[0, h] >= 0].tolist()
        best = score[h, :23].argsort(descending=True)[: len(position) - 2].tolist()
        assert position == sorted([*best, 23, 24])


def test_heads_may_change_places():
    scores, order = torch.randint(0, 40, (4, 30)).float(), [2, 0, 3, 1]
    kept, moved = (AdaKV(Given(9))(of(x), step(30)) for x in (scores, scores[order]))
    assert torch.equal(kept.position[:, order], moved.position)


def test_a_padded_row_keeps_as_alone_and_a_short_row_everything():
    keys, queries = torch.randn(3, 2, 30, 8), 3 * torch.randn(3, 4, 4, 8)
    pads = [0, 7, 22]
    valid = torch.arange(30) >= torch.tensor(pads)[:, None]
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(3, dtype=torch.int64))
    kv.keys.tail[~kv.counts.live()] = 50.0  # dead columns may hold anything
    policy = AdaKV(SnapKV(11, 4, 3))
    kept = policy(kv, step(30, 23, 8, queries=queries, query_valid=valid[:, -4:]))
    for b, n in enumerate(pads):
        alone = KV.of(keys[b : b + 1, :, n:], keys[b : b + 1, :, n:])
        expected = policy(alone, step(30 - n, queries=queries[b : b + 1]))
        assert kept.counts.per_head[b].tolist() == expected.counts.per_head[0].tolist()
        width = expected.counts.width
        assert torch.equal(kept.position[b, :, :width], expected.position.expand(1, 2, -1)[0])


def test_while_decoding_the_lowest_scores_of_all_heads_go_but_no_head_falls_below_the_floor():
    """Head 0 falls silent: it gives one slot after the other to head 1, down to floor(0.3 * 10) + the newest."""
    scores = torch.rand(2, 60) + torch.tensor([[1.0], [0.0]])
    kv, policy = of(scores[:, :30]), AdaKV(Given(11, recent=1), 0.3)
    kv = policy(kv, step(30))
    held = [sorted(row[row >= 0].tolist()) for row in kv.position[0]]
    assert len(held[0]) > len(held[1]) and sum(map(len, held)) == 22
    for t in range(30, 60):
        scores[:, t] = torch.tensor([-t, t])
        new = torch.randn(1, 2, 1, 4)
        kv = kv.append(new, new, seen=torch.tensor([t]))
        kv = kv.with_columns(given=torch.where(kv.position == t, scores[None, :, t, None], kv.columns["given"]))
        kv = policy(kv, step(t + 1, decoding=True))
        for h in range(2):
            held[h].append(t)
        for _ in range(2):
            open_ = [(scores[h, s], s, h) for h in range(2) if len(held[h]) > 4 for s in held[h][:-1]]
            _, s, h = min(open_)
            held[h].remove(s)
        assert [row[row >= 0].tolist() for row in kv.position[0]] == held
    assert [len(x) for x in held] == [4, 18]


def test_what_a_short_head_cannot_use_goes_to_the_best_slots_of_the_others():
    scores = torch.rand(3, 20) - 1
    scores[0] += 5
    scores[1, :3] += 2
    scores[2, :13] += 2
    kv = AdaKV(Given(12), 0.0)(of(scores), step(20))
    assert kv.counts.per_head.tolist() == [[20, 3, 13]]
    new = torch.randn(1, 3, 2, 4)
    kv = kv.append(new, new, seen=torch.tensor([20]))  # with score 0
    again = AdaKV(Given(12), 1.0)(kv, step(22))
    assert again.counts.per_head.tolist() == [[19, 5, 12]]


def concentrated(heads: int, tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Keys and 4 queries: head 0 attends everywhere, the others to a few slots."""
    keys = torch.randn(1, heads, tokens, dim)
    sharpness = torch.tensor([0.05, *[4.0] * (heads - 1)]).view(1, heads, 1, 1)
    return keys, torch.randn(1, heads, 4, dim) * sharpness


def test_ragged_heads_free_their_bytes():
    keys, queries = concentrated(4, 400, 64)
    kv, now = KV.of(keys, keys), step(400, queries=queries, scaling=0.5)
    even, ragged = SnapKV(100, 4, 1)(kv, now), AdaKV(SnapKV(100, 4, 1))(kv, now)
    longest = ragged.counts.width
    assert longest > 1.5 * 100
    assert int(ragged.row_nbytes()) == int(even.row_nbytes()) == 4 * 100 * (2 * 64 * 4 + 4)
    dead_positions = 4 * (4 * longest - 400)
    assert ragged.nbytes == even.nbytes + dead_positions
    assert ragged.nbytes < 0.7 * SnapKV(longest, 4, 1)(kv, now).nbytes


def test_ragged_attention_is_masked_attention():
    keys, queries = concentrated(4, 90, 16)
    values, asked = torch.randn_like(keys), torch.randn(1, 4, 3, 16)
    kv, now = KV.of(keys, values), step(90, queries=queries, scaling=0.5)
    kept = AdaKV(SnapKV(30, 4, 3))(kv, now)
    assert kept.counts.even is None
    position, at = kept.position, torch.tensor([[90, 91, 92]])
    ragged = attend(asked, *kept.decode(), at, position, scaling=0.5)
    slot = torch.arange(90, dtype=torch.int32).expand(1, 4, -1)
    masked = torch.where((slot[..., None] == position[:, :, None]).any(-1), slot, -1)
    torch.testing.assert_close(ragged, attend(asked, keys, values, at, masked, scaling=0.5))


@pytest.mark.parametrize("memory", [0.08, 0.1, 0.15])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_of_a_ragged_packed_layer_fit_and_are_used(memory, dtype):
    keys, queries = (x.to(dtype) for x in concentrated(4, 400, 32))
    stack = AdaKV(SnapKV(memory=memory, window=4, kernel=1)) | KIVI(residual=32)
    kept = stack(KV.of(keys, keys), step(400, queries=queries, scaling=0.5))
    assert kept.counts.even is None
    allowed = memory * 400 * 4 * 2 * 32 * 2
    assert 0.9 * allowed < int(kept.row_nbytes()) <= allowed


def test_bytes_fit_over_layers_that_get_unequal_shares():
    total, slots = 0, []
    stack = AdaKV(PyramidKV(memory=0.1, window=4, kernel=1, beta=4)) | KIVI(residual=32)
    for i in range(3):
        keys, queries = concentrated(4, 1500, 32)
        kept = stack(KV.of(keys, keys), step(1500, queries=queries, scaling=0.5, order=i, layers=3))
        total += int(kept.row_nbytes())
        slots.append(kept.counts.total)
    assert slots[0] > 1.3 * slots[1] > 1.6 * slots[2]
    allowed = 0.1 * 3 * 1500 * 4 * 2 * 32 * 2
    assert 0.97 * allowed < total <= allowed


def test_the_budget_is_that_of_the_base():
    policy = AdaKV(SnapKV(0.25, block=128))
    assert (policy.budget, policy.block, policy.min_slots, policy.floor) == (0.25, 128, 32, 0.2)
    assert policy.ragged and not SnapKV(0.25).ragged
    assert str(policy) == "AdaKV(base=SnapKV(budget=0.25, block=128))"
    assert str(policy | KIVI()) == f"{policy} | KIVI()"


@pytest.mark.parametrize("base", [StreamingLLM(0.5), TOVA(0.5), Random(0.5, per_head=False)], ids=str)
def test_a_base_without_scores_per_head_is_refused(base):
    with pytest.raises(ValueError, match=r"AdaKV: base must score each head by itself, but .* keeps the same"):
        AdaKV(base)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, "0.2", True, float("nan")])
def test_bad_floors(alpha):
    with pytest.raises(ValueError, match="AdaKV: floor must be a share of the budget from 0 to 1, got"):
        AdaKV(SnapKV(0.5), alpha)


def test_around_another_wrapper():
    keys, values = torch.randn(2, 1, 3, 30, 8)
    kv = KV.of(keys, values).with_columns(attention=torch.rand(1, 3, 30) ** 4)
    inside, outside = AdaKV(CAOTE(H2O(10))), CAOTE(AdaKV(H2O(10)))
    assert torch.equal(inside(kv, step(30)).position, outside(kv, step(30)).position)
    assert int(inside(kv, step(30)).counts.total) == 30
