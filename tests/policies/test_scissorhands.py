"""Scissorhands against a simulation that keeps a list of 0 and 1 per token."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvbench.policies import KIVI, KV, Random, Scissorhands, Step

SCALING = 0.6


class Simulation:
    """One kv head: {position: [whether important to the last queries, newest last]}."""

    def __init__(self, keys: Tensor, queries: Tensor, window: int) -> None:
        self.keys, self.queries, self.window = keys.double(), queries.double(), window  # [S, D], [G, S, D]
        self.held: dict[int, list[int]] = {}

    def forward(self, start: int, stop: int) -> None:
        for j in range(start, stop):
            self.held[j] = []
        for i in range(max(start, stop - self.window), stop):
            seen = [j for j in self.held if j <= i]
            mean = dict.fromkeys(seen, 0.0)
            for query in self.queries[:, i]:
                weights = {j: math.exp(SCALING * float(query @ self.keys[j])) for j in seen}
                for j in seen:
                    mean[j] += weights[j] / sum(weights.values()) / len(self.queries)
            for j in self.held:
                self.held[j] = [*self.held[j], int(j <= i and mean[j] * len(seen) >= 1 - 1e-5)][-self.window :]

    def cut(self, slots: int, recent: int) -> None:
        newest = sorted(self.held)[len(self.held) - recent :]
        older = sorted(set(self.held) - set(newest), key=lambda j: (-sum(self.held[j]), -j))
        self.held = {j: self.held[j] for j in sorted([*older[: slots - recent], *newest])}


def empty(keys: Tensor) -> KV:
    return KV.of(keys[:, :, :0], keys[:, :, :0])


def forward(kv: KV, keys: Tensor, queries: Tensor, start: int, stop: int, window: int, prompt: int) -> tuple[KV, Step]:
    """What a host hands over: new slots, and the last queries of this forward."""
    seen, new = torch.full((len(keys),), stop), torch.full((len(keys),), stop - start)
    kv = kv.append(keys[:, :, start:stop], keys[:, :, start:stop], seen=torch.full((len(keys),), start))
    step = Step(
        0, torch.full_like(seen, prompt), seen, start > 0 and stop - start == 1, new=new,
        queries=queries[:, :, max(start, stop - window) : stop], scaling=SCALING,
    )  # fmt: skip
    return kv, step


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("window", "recent", "drop", "after"), [(8, 2, 0.5, 6), (24, 0, 0.0, 12), (40, 5, 0.9, 5)])
def test_histories_and_kept_slots_equal_the_simulation(group, window, recent, drop, after):
    keys, queries = 1.5 * torch.randn(2, 2, 60, 6), 2 * torch.randn(2, 2 * group, 60, 6)
    policy = Scissorhands(12, window, recent, drop)
    rows = [[Simulation(keys[b, h], queries[b, h * group : (h + 1) * group], window) for h in range(2)] for b in (0, 1)]
    kv, seen, sizes = empty(keys), 0, []
    for tokens in (30, 5, *[1] * 16):
        kv, step = forward(kv, keys, queries, seen, seen + tokens, window, seen + tokens if tokens > 1 else 35)
        kv = policy(kv, step)
        for row in rows:
            for one in row:
                one.forward(seen, seen + tokens)
                if len(one.held) > 12:
                    one.cut(after if tokens == 1 else 12, recent)
        seen += tokens
        sizes.append(kv.counts.even)
        assert kv.position.tolist() == [[list(one.held) for one in row] for row in rows]
        count = [[[float(sum(bits)) for bits in one.held.values()] for one in row] for row in rows]
        assert policy.score(kv, step).tolist() == count
    assert sizes == [12, 12, *[min(12, after + t % (13 - after)) for t in range(16)]]


@pytest.mark.parametrize("tokens", [7, 33, 100])
def test_flat_attention_counts_for_every_token_that_was_seen(tokens):
    keys = torch.zeros(1, 2, tokens, 4)
    queries = 30 * torch.randn(1, 4, tokens, 4)
    policy = Scissorhands(tokens, 16, recent=0)
    kv = policy(*forward(empty(keys), keys, queries, 0, tokens, 16, tokens))
    expected = [float(min(16, tokens - s)) for s in range(tokens)]
    assert policy.score(kv, None).tolist() == [[expected] * 2]  # queries before it did not see a token


def test_counts_never_exceed_the_window_and_old_queries_are_forgotten():
    keys, queries = torch.zeros(1, 1, 60, 2), torch.zeros(1, 1, 60, 2)
    keys[0, 0, 0, 0] = keys[0, 0, 1, 1] = 10.0
    queries[0, 0, :40, 0] = queries[0, 0, 40:, 1] = 10.0  # first all look at token 0, then at token 1
    policy, kv, counts = Scissorhands(60, 16), empty(keys), []
    for t in range(60):
        kv = policy(*forward(kv, keys, queries, t, t + 1, 16, 1))
        counts.append(policy.score(kv, None)[0, 0, :2].tolist())
    assert counts[39] == [16.0, 0.0] and counts[47] == [8.0, 8.0] and counts[59] == [0.0, 16.0]


def test_a_window_of_queries_from_elsewhere_is_counted_once():
    keys, queries = torch.randn(1, 2, 30, 6), 2 * torch.randn(1, 4, 30, 6)
    policy = Scissorhands(30, 16)
    kv, step = forward(empty(keys), keys, queries, 0, 29, 16, 29)
    kv, step = forward(policy(kv, step), keys, queries, 29, 30, 16, 29)
    changed = Random(20)(kv, step)  # the same old queries would now see other shares
    more = replace(step, queries=queries[:, :, -24:])
    assert torch.equal(policy(kv, more).column("history"), policy(kv, step).column("history"))
    assert torch.equal(policy(changed, more).column("history"), policy(changed, step).column("history"))


def test_rows_that_brought_fewer_tokens_count_fewer_queries():
    keys, queries = torch.randn(2, 2, 30, 6), 2 * torch.randn(2, 4, 24, 6)
    policy, seen = Scissorhands(30, 16), torch.tensor([30, 30])
    both = Step(0, seen, seen, queries=queries, new=torch.tensor([5, 2]))
    for b, new in enumerate((5, 2)):
        alone = Step(0, seen[:1], seen[:1], queries=queries[b : b + 1], new=torch.tensor([new]))
        expected = policy(KV.of(keys[b : b + 1], keys[b : b + 1]), alone).column("history")
        assert torch.equal(policy(KV.of(keys, keys), both).column("history")[b : b + 1], expected)
        assert 0 < policy.score(policy(KV.of(keys, keys), both), both)[b].max() <= new


def test_a_padded_row_is_kept_as_alone_and_keeps_its_history():
    keys, queries = torch.randn(2, 2, 40, 6), 2 * torch.randn(2, 4, 40, 6)
    valid = torch.arange(40) >= torch.tensor([[0], [11]])
    policy = Scissorhands(14, 16, 3)
    kv = empty(keys).append(keys[:, :, :30], keys[:, :, :30], valid[:, :30], torch.zeros(2, dtype=torch.int64))
    kv.keys.tail[1, :, 19:] = 50.0
    seen = torch.tensor([30, 19])
    step = Step(0, seen, seen, queries=queries[:, :, 14:30], query_valid=valid[:, 14:30], scaling=SCALING, new=seen)
    kv = policy(kv, step)
    own_keys, own_queries = keys[1:, :, 11:], queries[1:, :, 11:]
    alone = policy(*forward(empty(own_keys), own_keys, own_queries, 0, 19, 16, 19))
    one = torch.ones(2, dtype=torch.int64)
    for t in range(30, 40):
        kv = kv.append(keys[:, :, t : t + 1], keys[:, :, t : t + 1], seen=seen)
        seen = seen + 1
        kv = policy(
            kv, Step(0, torch.tensor([30, 19]), seen, True, queries=queries[:, :, t : t + 1], scaling=SCALING, new=one)
        )
        alone = policy(*forward(alone, own_keys, own_queries, t - 11, t - 10, 16, 19))
        assert torch.equal(kv.position[1:], alone.position)
        assert torch.equal(kv.column("history")[1:], alone.column("history"))


def test_rows_with_room_lose_nothing_beside_rows_without():
    keys, queries = torch.randn(2, 1, 20, 6), torch.randn(2, 1, 1, 6)
    valid = torch.arange(20) >= torch.tensor([[0], [11]])
    kv = empty(keys).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    seen = torch.tensor([20, 9])
    kept = Scissorhands(19, 8, 2)(kv, Step(0, seen, seen, True, queries=queries, new=torch.ones_like(seen)))
    assert kept.counts.per_head.tolist() == [[10], [9]]


def test_ties_go_to_the_most_recent_and_the_recent_window_stays():
    keys = torch.zeros(1, 1, 20, 4)
    kv, step = forward(empty(keys), keys, keys, 0, 20, 8, 20)
    # Tokens 0 to 12 were important to all 8 queries, each later one to fewer.
    assert Scissorhands(8, 8, 3)(kv, step).position[0, 0].tolist() == [8, 9, 10, 11, 12, 17, 18, 19]


def test_bytes_are_what_it_says_and_it_works_before_a_quantizer():
    keys, queries = torch.randn(1, 2, 80, 32), torch.randn(1, 4, 80, 32)
    policy = Scissorhands(memory=0.5, window=64)
    kv = policy(*forward(empty(keys), keys, queries, 0, 80, 64, 80))
    assert policy.slot_state_nbytes == 8 and kv.column("history").dtype == torch.uint8
    slots = kv.counts.even
    # Float32 keys and values, 8 bytes of history and 4 of position, of half of a 16-bit cache.
    assert kv.nbytes == slots * 2 * (2 * 32 * 4 + 8 + 4) <= 80 * 2 * 2 * 32 < (slots + 1) * 2 * (2 * 32 * 4 + 8 + 4)
    stack, kv = Scissorhands(40, 16) | KIVI(bits=4, residual=32), empty(keys)
    for start, stop in ((0, 60), *((t, t + 1) for t in range(60, 64))):
        kv = stack(*forward(kv, keys, queries, start, stop, 16, 60))
    assert kv.counts.even == 23


def test_without_queries_it_says_so():
    keys = torch.randn(1, 2, 40, 8)
    with pytest.raises(ValueError, match="needs the last queries"):
        Scissorhands(35)(KV.of(keys, keys), Step(0, torch.tensor([40]), torch.tensor([40])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 9}, r"budget=9 is too small: it must be at least 10 \(what the policy protects\)"),
        ({"budget": 50, "window": 12}, r"window must be a multiple of 8 queries \(one bit each\), at least 8, got 12"),
        ({"budget": 50, "window": 0}, "window must be a multiple of 8 .* got 0"),
        ({"budget": 50, "recent": -1}, "recent must be an int of 0 or more tokens, got -1"),
        ({"budget": 50, "drop": 1.0}, "drop must be a share of the budget from 0 to below 1, got 1.0"),
        ({"budget": 50, "drop": "half"}, "drop must be a share of the budget from 0 to below 1, got 'half'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scissorhands(**arguments)


def test_defaults_and_needs():
    policy = Scissorhands(100)
    assert (policy.window, policy.recent, policy.drop, policy.needs) == (400, 10, 0.5, {"queries": 400})
