"""TokenSelect against votes counted in loops, and a memory of the last vote."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvbench.policies import KIVI, KV, BudgetError, Policy, Random, Step, TokenSelect

HEADS, GROUP, DIM = 2, 3, 4


def voted(keys: Tensor, query: Tensor, candidates: range, amount: int) -> set[int]:
    """keys [H, S, D], query [Hq, D] -> the slots of the range with the most votes."""
    votes = dict.fromkeys(candidates, 0.0)
    for g in range(len(query)):
        logits = {s: float(query[g].double() @ keys[g // (len(query) // len(keys)), s].double()) for s in candidates}
        total = sum(math.exp(x) for x in logits.values())
        for s in candidates:
            votes[s] += math.exp(logits[s]) / total
    return set(sorted(candidates, key=lambda s: (-votes[s], -s))[:amount])


def feed(policy: Policy, lengths: tuple[int, ...], later: list[int], turn: float = 1.0) -> Iterator[tuple]:
    """Forwards of random tokens: prompts, then `later` tokens each; yields what `choose` gets, then the cache.

    turn: how much of a query is new; the rest is the one before.
    """
    rows = len(lengths)
    none = torch.zeros(rows, HEADS, 0, DIM)
    kv, seen, prompt = KV.of(none, none), torch.zeros(rows).long(), None
    last = torch.randn(rows, HEADS * GROUP, 1, DIM)
    for number, amount in enumerate([max(lengths), *later]):
        real = torch.tensor(lengths if number == 0 else [max(1, amount - b) for b in range(rows)])
        valid = torch.arange(amount) >= amount - real[:, None]
        keys, queries = torch.randn(rows, HEADS, amount, DIM), torch.randn(rows, HEADS * GROUP, amount, DIM)
        queries = (1 - turn) * last + turn * queries
        last = queries[:, :, -1:]
        position = torch.where(valid, seen[:, None] + valid.cumsum(1) - 1, -1)
        kv, seen = kv.append(keys, keys, valid, seen), seen + real
        decoding = amount == 1 and number > 0
        prompt = prompt if decoding else seen
        step = Step(0, prompt, seen, decoding, queries=last, query_valid=valid[:, -1:])
        yield kv, queries, position, step
        kv = policy(kv, step)
        yield kv


class Simulation:
    """One row: the query that last voted, and its slots."""

    def __init__(self, sinks: int, local: int, amount: int, reuse: float):
        self.sinks, self.local, self.amount, self.reuse = sinks, local, amount, reuse
        self.last: tuple[Tensor, set[int]] | None = None
        self.reused = 0

    def read(self, keys: Tensor, queries: Tensor, decoding: bool) -> set[int]:
        after, tokens = keys.shape[1], queries.shape[1]
        before = after - tokens
        candidates = range(self.sinks, max(self.sinks, before + 1 - self.local))
        if len(candidates) <= self.amount:
            self.last = None
            return set(range(after))
        query = queries.mean(1)
        if self.last is not None and decoding and self.cosine(query, self.last[0]) > self.reuse:
            self.reused += 1
        else:
            self.last = query, voted(keys, query, candidates, self.amount)
        slots = self.last[1]
        if not decoding:
            self.last = None
        return slots | (set(range(after)) - set(candidates))

    @staticmethod
    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a.flatten() @ b.flatten() / (a.norm() * b.norm()))


def check(policy: TokenSelect, lengths: tuple[int, ...], later: list[int], *sizes: int, turn: float = 1.0) -> int:
    rows = [Simulation(*sizes, policy.reuse) for _ in lengths]
    forwards = feed(policy, lengths, later, turn)
    for kv, queries, position, step in forwards:
        chosen = policy.choose(kv, queries, position, step)
        for b, row in enumerate(rows):
            live, real = int(kv.counts.per_head[b, 0]), position[b] >= 0
            expected = row.read(kv.keys.dense()[b, :, :live], queries[b][:, real], step.decoding)
            allowed = torch.ones(1, live, dtype=torch.bool) if chosen is None else chosen.allowed[b, :, :live]
            assert allowed.shape[0] == 1 and (chosen is None or chosen.recent == 0)
            assert set(allowed[0].nonzero().flatten().tolist()) == expected
        next(forwards)
    return sum(row.reused for row in rows)


TURNS = [*[1] * 9, 7, 1, 1, 12, *[1] * 5]


@pytest.mark.parametrize("lengths", [(40,), (44, 27, 9)])
@pytest.mark.parametrize(("turn", "reuse"), [(1.0, 0.9), (0.3, 0.9), (0.3, 0.5), (0.05, 0.9), (1.0, -1.0)])
def test_reads_what_the_simulation_reads(lengths, turn, reuse):
    # budget 20: 3 sinks, 5 local, 12 voted for.
    reused = check(TokenSelect(20, sinks=3, local=5, reuse=reuse), lengths, TURNS, 3, 5, 12, turn=turn)
    assert reused > 10 if turn < 0.1 or reuse < 0 else reused < 40


def test_rows_that_come_to_exceed_the_budget_later_are_as_alone():
    reused = check(TokenSelect(20, sinks=3, local=5), (40, 14, 18), [1] * 14, 3, 5, 12, turn=0.1)
    assert reused > 10


@pytest.mark.parametrize("reuse", [1, 1.0, 2.0])
def test_a_threshold_that_no_cosine_exceeds_is_no_reuse(reuse):
    policy = TokenSelect(20, 3, 5, reuse)
    assert policy.needs == {} and TokenSelect(20, 3, 5).needs == {"queries": 1}
    assert check(policy, (40, 25), TURNS, 3, 5, 12, turn=0.05) == 0
    kv, *_, step = list(feed(policy, (40,), [1]))[2]
    assert policy(kv, step) is kv


def test_a_fifth_of_the_budget_is_local():
    assert check(TokenSelect(28, sinks=3), (50, 31), TURNS, 3, 5, 20) == 0
    before = torch.tensor([[5000]])
    keys = torch.zeros(1, 1, 5001, 1)
    now = Step(0, torch.tensor([9]), torch.tensor([9]))
    candidates, amount = TokenSelect(2688)._candidates(before, KV.of(keys, keys), now)
    assert (int(amount), int(candidates.sum())) == (2048, 5001 - 512 - 128)


@pytest.mark.parametrize("budget", [60, 77, 1.0])
def test_a_budget_for_all_reads_all_and_keeps_nothing(budget):
    policy = TokenSelect(budget, sinks=3, local=5)
    forwards = feed(policy, (50, 33), [1] * 4 + [6] if budget != 1.0 else [])
    for kv, queries, position, step in forwards:
        assert policy.choose(kv, queries, position, step) is None
        assert not next(forwards).side


def test_what_is_kept_is_the_last_vote_and_its_query():
    policy = TokenSelect(20, sinks=3, local=5, reuse=0.99)
    *_, (kv, queries, position, step), after = feed(policy, (40, 30), [1, 1])
    query, slots = (after.side[f"token_select.{name}"] for name in ("query", "slots"))
    assert torch.equal(query, queries[:, :, 0])
    allowed = policy.choose(kv, queries, position, step).allowed
    for b, live in enumerate((42, 32)):
        chosen = set(allowed[b, 0, 3 : live - 5].nonzero().flatten().add(3).tolist())
        assert slots[b, 0].tolist() == sorted(chosen) and len(chosen) == 12
    for tensor in (query, slots):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4


def test_dead_columns_do_not_vote():
    policy = TokenSelect(20, sinks=3, local=5)
    forwards = feed(policy, (40, 30), [1])
    next(forwards), next(forwards)
    kv, queries, position, step = next(forwards)
    before = policy.choose(kv, queries, position, step).allowed
    kv.keys.tail[1, :, 31:] = 1e3
    assert torch.equal(policy.choose(kv, queries, position, step).allowed[..., :31], before[..., :31])


def test_heads_that_an_evictor_left_with_different_tokens_vote_for_their_own():
    keys, queries = torch.randn(1, HEADS, 60, DIM), torch.randn(1, HEADS * GROUP, 1, DIM)
    kv = Random(40)(KV.of(keys, keys), Step(0, torch.tensor([60]), torch.tensor([60])))
    now = Step(0, torch.tensor([60]), torch.tensor([60]), True, queries=queries)
    policy = TokenSelect(20, sinks=3, local=5)
    allowed = policy.choose(kv, queries, torch.tensor([[59]]), now).allowed
    for h in range(HEADS):
        own = kv.keys.dense()[0, h : h + 1]
        expected = voted(own, queries[0, h * GROUP : (h + 1) * GROUP, 0], range(3, 35), 12) | {0, 1, 2, *range(35, 40)}
        assert set(allowed[0, h].nonzero().flatten().tolist()) == expected
    again = policy.choose(policy(kv, now), queries, torch.tensor([[59]]), now).allowed
    assert torch.equal(again, allowed)


def test_equal_keys_tie_and_the_newest_win():
    keys = torch.randn(DIM).expand(1, HEADS, 40, DIM)
    now = Step(0, torch.tensor([39]), torch.tensor([40]), True)
    allowed = (
        TokenSelect(20, sinks=3, local=5)
        .choose(KV.of(keys, keys), torch.randn(1, HEADS * GROUP, 1, DIM), torch.tensor([[39]]), now)
        .allowed
    )
    assert allowed[0, 0].nonzero().flatten().tolist() == [0, 1, 2, *range(23, 40)]


@pytest.mark.parametrize("then", [None, KIVI(2, 4, 4)])
def test_memory_counts_the_keys_that_vote(then):
    prompt = 100
    keys = torch.randn(1, HEADS, prompt, 16).bfloat16()
    policy, full = TokenSelect(memory=0.7, sinks=3, local=5), 2 * 100 * HEADS * 16 * 2
    stack = (policy,) if then is None else (policy, then)
    now = Step(0, torch.tensor([prompt]), torch.tensor([prompt + 1]), True, stack=stack)
    slots = int(policy.slots(KV.of(keys, keys), now))
    if then is None:
        assert full // 2 + HEADS * slots * 64 <= 0.7 * full < full // 2 + HEADS * (slots + 1) * 64
        with pytest.raises(BudgetError, match="room for 0 slots besides 6400 bytes to choose them by"):
            TokenSelect(memory=0.5, sinks=3, local=5).slots(KV.of(keys, keys), now)
    else:
        held = then(KV.of(keys, keys), now)
        assert held.row_nbytes() <= 0.7 * full and slots == prompt  # all of it fits, and nothing votes
        few = TokenSelect(memory=0.5, sinks=3, local=5)
        assert 8 <= int(few.slots(held, now)) < prompt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 132}, "budget=132 is too small: it must be at least 133"),
        ({"budget": 132, "local": 10}, "budget=132 is too small: it must be at least 138"),
        ({"budget": 999, "sinks": -1}, "sinks must be an int of 0 or more tokens, got -1"),
        ({"budget": 999, "local": 0}, "local must be None or an int of at least 1 token, got 0"),
        ({"budget": 999, "reuse": None}, "reuse must be a cosine, a number, got None"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenSelect(**arguments)


def test_without_queries_it_says_so():
    keys = torch.randn(1, HEADS, 40, DIM)
    with pytest.raises(ValueError, match="needs the last queries"):
        TokenSelect(20, 3, 5)(KV.of(keys, keys), Step(0, torch.tensor([39]), torch.tensor([40]), True))
