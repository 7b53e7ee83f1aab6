"""LazyEviction against loops that keep every slot's activations one query at a time, through 300 generated tokens."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvbench.policies import KV, LazyEviction, Random, Step

SCALING = 0.5


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x - max(logits)) for x in logits)
    return [math.exp(x - max(logits)) / total for x in logits]


class Oracle:
    """One head: position -> [last activation, largest gap]."""

    def __init__(self, keys: Tensor, queries: Tensor, policy: LazyEviction):
        self.keys, self.queries, self.policy = keys.double(), SCALING * queries.double(), policy  # [T, D], [G, T, D]
        self.held: dict[int, list[int]] = {}

    def see(self, start: int, stop: int) -> None:
        first = max(start, stop - self.policy.window)
        self.held |= {p: [max(p, first - 1), 0] for p in range(start, stop)}
        for t in range(first, stop):
            visible = [p for p in self.held if p <= t]
            for row in [softmax((q @ self.keys[visible].T).tolist()) for q in self.queries[:, t]]:
                for p, x in zip(visible, row, strict=True):
                    if x > self.policy.alpha:
                        last, gap = self.held[p]
                        self.held[p] = [t, max(gap, t - last)]

    def score(self, p: int, now: int) -> float:
        last, gap = self.held[p]
        if gap == 0:
            return 2.0 * 0.5 if last == now else 0.0
        return 2 / (1 + math.exp((now - last) / gap)) + 2 / (1 + math.exp(1 / gap))

    def check_and_keep(self, kept: list[int], now: int) -> None:
        """`kept` are the newest and the best of the others; float32 may tell scores apart only by so much."""
        old = sorted(self.held)[: -self.policy.window]
        stay = [p for p in kept if p in old]
        assert kept == stay + sorted(self.held)[-self.policy.window :]
        assert len(kept) == self.policy.budget
        lost = [(self.score(p, now), p) for p in old if p not in stay]
        for score, p in [(self.score(p, now), p) for p in stay]:
            assert all(score > x - 1e-6 for x, _ in lost)
            assert all(p > q for x, q in lost if x == score)
        self.held = {p: self.held[p] for p in kept}


def text(batch: int, heads: int, group: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys [B, H, T, 8] and queries [B, H * G, T, 8] that come back to old topics from time to time."""
    topics = 2 * torch.randn(batch, heads, 10, 8)
    topic = torch.randint(10, (batch, heads, tokens))[..., None].expand(-1, -1, -1, 8)
    keys = topics.gather(2, topic) + torch.randn(batch, heads, tokens, 8)
    asked = torch.randint(10, (batch, heads * group, tokens))[..., None].expand(-1, -1, -1, 8)
    return keys, topics.repeat_interleave(group, 1).gather(2, asked) + torch.randn(batch, heads * group, tokens, 8)


class Host:
    """Appends and gives the last queries of each forward; pads are on the left."""

    def __init__(self, policy: LazyEviction, keys: Tensor, queries: Tensor, pads: list[int]):
        self.policy, self.keys, self.queries, self.pads, self.at = policy, keys, queries, torch.tensor(pads), 0
        self.kv = KV.of(keys[:, :, :0], keys[:, :, :0])
        self.seen = self.prompt = torch.zeros(len(pads), dtype=torch.int64)

    def before(self, amount: int) -> tuple[KV, Step]:
        start, self.at = self.at, self.at + amount
        valid = torch.arange(self.at) >= self.pads[:, None]
        keys = self.keys[:, :, start : self.at]
        kv = self.kv.append(keys, keys, valid[:, start:], self.seen)
        new = valid[:, start:].sum(1)
        self.seen = self.seen + new
        decoding = amount == 1 and start > 0
        self.prompt = self.prompt if decoding else self.seen
        last = slice(max(start, self.at - self.policy.needs["queries"]), self.at)
        return kv, Step(
            0, self.prompt, self.seen, decoding, new, scaling=SCALING,
            queries=self.queries[:, :, last], query_valid=valid[:, last],
        )  # fmt: skip

    def forward(self, amount: int) -> KV:
        self.kv = self.policy(*self.before(amount))
        return self.kv


@pytest.mark.parametrize(("group", "alpha", "chunks"), [(1, 0.02, [40]), (2, 0.05, [31, 3, 6])])
def test_three_hundred_generated_tokens_equal_the_definition(group, alpha, chunks):
    keys, queries = text(1, 2, group, 340)
    policy = LazyEviction(30, window=10, alpha=alpha)
    host = Host(policy, keys, queries, [0])
    heads = [Oracle(keys[0, h], queries[0, h * group : (h + 1) * group], policy) for h in range(2)]
    for step, amount in enumerate([*chunks, *[1] * 300]):
        kv = host.forward(amount)
        generated = max(0, step + 1 - len(chunks))
        acts = generated % 10 == 0
        for h, head in enumerate(heads):
            head.see(host.at - amount, host.at)
            position = kv.position.expand(1, 2, -1)[0, h].tolist()
            if acts and len(head.held) > 30:
                head.check_and_keep(position, host.at - 1)
            assert position == sorted(head.held)
            if acts or generated % 10 == 9:
                facts = torch.tensor([head.held[p] for p in position])
                assert torch.equal(kv.column("last_activation")[0, h].long(), facts[:, 0])
                assert torch.equal(kv.column("largest_gap")[0, h].long(), facts[:, 1])
        assert generated == 0 or kv.counts.even == 30 + generated % 10
    assert facts[:, 1].unique().numel() > 5  # the text does come back
    assert kv.column("largest_gap").dtype == kv.column("last_activation").dtype == torch.int32


@pytest.mark.parametrize("pads", [3, 28, 36])
def test_a_padded_row_is_kept_as_alone(pads):
    keys, queries = text(2, 2, 2, 80)
    policy = LazyEviction(16, window=8, alpha=0.02)
    both, alone = Host(policy, keys, queries, [0, pads]), Host(policy, keys[1:, :, pads:], queries[1:, :, pads:], [0])
    for amount in (40, *[1] * 40):
        kv, step = both.before(amount)
        if amount == 40:
            kv.keys.tail[~kv.counts.live()] = 1e3  # dead columns may hold anything
        both.kv = policy(kv, step)
        single = alone.forward(amount - pads if amount > 1 else 1)
        expected = single.position.expand(1, 2, -1)[0]
        width = expected.shape[1]
        position = both.kv.position.expand(2, 2, -1)[1]
        assert torch.equal(position[:, :width], expected) and (position[:, width:] == -1).all()
        for name in ("last_activation", "largest_gap"):
            assert torch.equal(both.kv.column(name)[1, :, :width], single.column(name)[0])


def scored(last: list[int], gap: list[int], now: int) -> Tensor:
    zeros = torch.zeros(1, 1, len(last), 4)
    kv = KV.of(zeros, zeros).with_columns(
        last_activation=torch.tensor([[last]], dtype=torch.int32), largest_gap=torch.tensor([[gap]], dtype=torch.int32)
    )
    return LazyEviction(40).score(kv, Step(0, torch.tensor([now + 1]), torch.tensor([now + 1])))[0, 0]


def test_scores_by_hand():
    score = scored([90, 90, 100, 50, 90], [10, 5, 20, 10, 0], 100)
    expected = [(10, 10), (10, 5), (0, 20), (50, 10)]
    by_hand = [2 / (1 + math.exp(waiting / gap)) + 2 / (1 + math.exp(1 / gap)) for waiting, gap in expected]
    torch.testing.assert_close(score, torch.tensor([*by_hand, 0.0]))


def test_of_equal_gaps_the_one_that_waits_longer_goes_first():
    score = scored(list(range(60, 101)), [7] * 41, 100)
    assert (score.diff() >= 0).all() and (score.diff()[-20:] > 0).all()


def test_more_queries_than_asked_for_do_not_count():
    keys, queries = text(1, 2, 2, 60)
    policy = LazyEviction(20, window=8, alpha=0.02)
    plain, wide = Host(policy, keys, queries, [0]), Host(policy, keys, queries, [0])
    for amount in (40, *[1] * 15):
        plain.forward(amount)
        kv, step = wide.before(amount)
        last = slice(wide.at - 20, wide.at)
        wide.kv = policy(
            kv, replace(step, queries=queries[:, :, last], query_valid=torch.ones(1, 20, dtype=torch.bool))
        )
        for name in ("last_activation", "largest_gap"):
            assert torch.equal(plain.kv.column(name), wide.kv.column(name))


def test_all_equal_keys_keep_the_most_recent():
    keys = torch.randn(8).expand(1, 2, 60, 8)
    host = Host(LazyEviction(20, window=5, alpha=0.5), keys, torch.randn(1, 4, 60, 8), [0])
    assert host.forward(50).position.tolist() == [[list(range(30, 50))] * 2]


def test_after_another_evictor():
    keys, queries = text(1, 2, 2, 60)
    policy = LazyEviction(20, window=6, alpha=0.02)
    kv, step = Host(policy, keys, queries, [0]).before(60)
    first = Random(40)(kv, step)
    kept = policy(first, step).position[0]
    for h, held in enumerate(first.position[0].tolist()):
        assert set(kept[h].tolist()) <= set(held) and kept[h, -6:].tolist() == held[-6:]


def test_a_byte_budget_counts_both_columns():
    keys, queries = text(1, 2, 2, 60)
    kept = Host(LazyEviction(memory=0.5, window=4), keys.bfloat16(), queries.bfloat16(), [0]).forward(60)
    slot = 2 * (2 * 8 * 2 + 4 + 8)  # keys and values, position, last activation and largest gap
    assert kept.counts.even == 60 * 2 * 2 * 8 * 2 // 2 // slot
    assert kept.nbytes == kept.counts.even * slot


def test_defaults():
    policy = LazyEviction(100)
    assert (policy.window, policy.alpha, policy.needs) == (27, 0.0005, {"queries": 27})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 26}, r"budget=26 is too small: it must be at least 27 \(what the policy protects\)"),
        ({"budget": 50, "window": 0}, "LazyEviction: window must be an int of at least 1 token, got 0"),
        ({"budget": 50, "alpha": 1}, "LazyEviction: alpha must be a number from 0 to less than 1, got 1"),
        ({"budget": 50, "alpha": None}, "LazyEviction: alpha must be a number from 0 to less than 1, got None"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        LazyEviction(**arguments)


def test_without_queries_it_says_so():
    keys = torch.randn(1, 2, 40, 8)
    with pytest.raises(ValueError, match="needs the last queries"):
        LazyEviction(35)(KV.of(keys, keys), Step(0, torch.tensor([40]), torch.tensor([40])))
