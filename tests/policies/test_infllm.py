"""InfLLM against a row-by-row simulation that keeps blocks and representatives in lists."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvbench.policies import KV, BudgetError, InfLLM, Policy, Random, Step

HEADS, GROUP, DIM = 2, 2, 4


class Simulation:
    """One row. `votes` are sums of attention; a block's mean is taken when the next query cannot see it locally."""

    def __init__(self, policy: InfLLM, sinks: int, local: int, size: int, topk: int):
        self.sinks, self.local, self.size, self.topk = sinks, local, size, topk
        self.representatives = policy.representatives
        self.means: list[list[Tensor]] = []

    def outside(self, before: int) -> int:
        """Blocks that the local window of a query after `before` slots does not reach."""
        blocks = 0
        while before + 1 - (self.sinks + blocks * self.size) > self.local:
            blocks += 1
        return blocks

    def read(self, queries: Tensor, before: int, after: int) -> set[int]:
        """queries [Hq, T, D] of the forward that makes `before` slots `after`."""
        mean = [sum(of_head.double()) / len(of_head) for of_head in queries]
        relevance = {
            j: sum(float(mean[g] @ self.means[j][g // GROUP].double()) for g in range(len(queries)))
            for j in range(self.outside(before))
        }
        chosen = sorted(relevance, key=lambda j: (-relevance[j], -j))[: self.topk]
        blocks = {self.sinks + j * self.size + i for j in chosen for i in range(self.size)}
        window = range(self.sinks + self.outside(before) * self.size, after)
        return {*range(min(self.sinks, after)), *blocks, *window}

    def note(self, keys: Tensor, votes: Tensor) -> None:
        """keys [H, S, D] and votes [H, S] after a forward."""
        while len(self.means) < self.outside(keys.shape[1]):
            start = self.sinks + len(self.means) * self.size
            block = range(start, start + self.size)
            best = [sorted(block, key=lambda s: (-float(v[s]), -s))[: self.representatives] for v in votes]
            self.means.append([torch.stack([k[s] for s in of]).mean(0) for k, of in zip(keys, best, strict=True)])


def feed(policy: InfLLM, lengths: tuple[int, ...], later: list[int], first: Policy | None = None) -> Iterator[tuple]:
    """Forwards of random tokens: prompts, then `later` tokens each; yields what `choose` gets, then the cache.

    first: an evictor that runs once, after the prompt.
    """
    rows = len(lengths)
    none = torch.zeros(rows, HEADS, 0, DIM)
    kv = KV.of(none, none).with_columns(attention=none[..., 0])
    prompt = seen = torch.zeros(rows, dtype=torch.int64)
    for number, amount in enumerate([max(lengths), *later]):
        # Later turns are shorter in later rows, too.
        real = torch.tensor(lengths if number == 0 else [max(1, amount - b) for b in range(rows)])
        valid = torch.arange(amount) >= amount - real[:, None]
        keys, queries = torch.randn(rows, HEADS, amount, DIM), torch.randn(rows, HEADS * GROUP, amount, DIM)
        position = torch.where(valid, seen[:, None] + valid.cumsum(1) - 1, -1)
        kv, seen = kv.append(keys, keys, valid, seen), seen + real
        decoding = amount == 1 and number > 0
        prompt = prompt if decoding else seen
        step = Step(0, prompt, seen, decoding)
        yield kv, queries, position, step
        kv = kv.with_columns(attention=kv.columns["attention"] + torch.rand(rows, HEADS, kv.counts.width))
        if first is not None and number == 0:
            kv = first(kv, step)
        kv = policy(kv, step)
        yield kv


def check(policy: InfLLM, lengths: tuple[int, ...], later: list[int], *sizes: int) -> int:
    rows, selected = [Simulation(policy, *sizes) for _ in lengths], 0
    forwards = feed(policy, lengths, later)
    for kv, queries, position, step in forwards:
        chosen = policy.choose(kv, queries, position, step)
        for b, row in enumerate(rows):
            after, real = int(kv.counts.per_head[b, 0]), position[b] >= 0
            expected = row.read(queries[b][:, real], after - int(real.sum()), after)
            assert chosen is None or chosen.recent == 0
            allowed = torch.ones(1, after, dtype=torch.bool) if chosen is None else chosen.allowed[b, :, :after]
            assert allowed.shape[0] == 1
            assert set(allowed[0].nonzero().flatten().tolist()) == expected
            selected += len(expected) < after
        kv = next(forwards)
        for b, row in enumerate(rows):
            live = int(kv.counts.per_head[b, 0])
            row.note(kv.keys.dense()[b, :, :live], kv.columns["attention"][b, :, :live])
    return selected


TURNS = [*[1] * 9, 7, 1, 12, 1, 1]


@pytest.mark.parametrize("lengths", [(50,), (53, 31, 12)])
@pytest.mark.parametrize("representatives", [1, 3])
def test_reads_what_the_simulation_reads(lengths, representatives):
    # budget 30: 4 sinks, 12 local, and of the other 14 two blocks of 5.
    policy = InfLLM(30, sinks=4, local=12, block_size=5, representatives=representatives)
    assert check(policy, lengths, TURNS, 4, 12, 5, 2) > 10


@pytest.mark.parametrize(("budget", "local", "topk"), [(22, 14, 1), (26, 18, 1), (32, 20, 2), (35, 23, 2)])
def test_a_window_of_two_thirds_and_what_blocks_leave_over(budget, local, topk):
    policy = InfLLM(budget, sinks=2, block_size=5, representatives=2)
    assert policy._blocks(torch.tensor([[1000]]), None, Step(0, torch.tensor([9]), torch.tensor([9])))[1] == topk
    assert 2 + local + topk * 5 == budget or 2 + local + topk * 5 + 1 == budget
    assert check(policy, (60, 33), TURNS, 2, budget - 2 - topk * 5, 5, topk) > 10


def test_the_official_sizes_follow_from_the_official_budget():
    step = Step(0, torch.tensor([9]), torch.tensor([9]))
    outside, topk = InfLLM(6272)._blocks(torch.tensor([[10000]]), None, step)
    assert int(topk) == 16
    assert int(outside) == -(-(10001 - 4096 - 128) // 128)


def test_never_more_than_the_budget_is_read_while_decoding():
    policy = InfLLM(31, sinks=3, block_size=4, representatives=4)
    forwards = feed(policy, (70, 40), [1] * 20)
    for number, (kv, queries, position, step) in enumerate(forwards):
        if number:
            read = policy.choose(kv, queries, position, step).allowed & (kv.position >= 0)
            assert (read.sum(-1) <= 31).all()
            assert (read.sum(-1) >= 31 - 3).all()  # a window that starts where a block does
        next(forwards)


@pytest.mark.parametrize("budget", [75, 90, 1.0])
def test_a_budget_for_all_reads_all(budget):
    policy = InfLLM(budget, sinks=4, block_size=5)
    forwards = feed(policy, (60, 33), [1] * 9 + [5] if budget != 1.0 else [])
    for kv, queries, position, step in forwards:
        assert policy.choose(kv, queries, position, step) is None
        next(forwards)


def test_the_first_forward_reads_everything_however_long():
    forwards = feed(InfLLM(30, sinks=4, local=12, block_size=5), (90, 40), [])
    kv, queries, position, step = next(forwards)
    assert InfLLM(30, sinks=4, local=12, block_size=5).choose(kv, queries, position, step) is None


def test_a_padded_row_reads_as_alone():
    policy, last = InfLLM(30, sinks=4, local=12, block_size=5, representatives=2), None
    forwards = feed(policy, (70, 52), [1] * 12)
    alone = None
    for kv, queries, position, step in forwards:
        chosen = policy.choose(kv, queries, position, step)
        live = int(step.seen[1])
        row = KV.of(*(x.dense()[1:, :, :live] for x in (kv.keys, kv.values)))
        side = {} if alone is None else alone.side
        row = KV(row.keys, row.values, {"attention": kv.columns["attention"][1:, :, :live]}, side)
        now = Step(0, step.prompt[1:], step.seen[1:], step.decoding)
        real = position[1] >= 0
        single = policy.choose(row, queries[1:][:, :, real], position[1:][:, real], now)
        assert (chosen is None) == (single is None)
        if chosen is not None:
            assert torch.equal(chosen.allowed[1:, :, :live], single.allowed)
            last = single
        kv = next(forwards)
        row = row.with_columns(attention=kv.columns["attention"][1:, :, :live])
        alone = policy(row, now)
        assert torch.equal(
            alone.side["infllm.mean"], kv.side["infllm.mean"][1:, :, : alone.side["infllm.mean"].shape[2]]
        )
    assert last is not None


def test_a_window_that_grows_with_the_prompt_leaves_representatives_as_they_are():
    policy = InfLLM(0.5, sinks=4, block_size=5, representatives=2)
    made = [kv.side for kv in feed(policy, (60,), [1, 90, 1]) if isinstance(kv, KV)]
    blocks = [int(side["infllm.blocks"]) for side in made]
    assert blocks[0] == blocks[1] == 8 and blocks[2] == blocks[3] == 20
    assert policy._blocks(torch.tensor([[151]]), None, Step(0, torch.tensor([300]), torch.tensor([300])))[0] < 20
    again = Step(0, torch.tensor([300]), torch.tensor([300]))  # as if the prompt had grown further
    *_, kv = feed(policy, (60,), [1, 90, 1])
    held = policy(kv, again)
    assert torch.equal(held.side["infllm.mean"], kv.side["infllm.mean"]) and int(held.side["infllm.blocks"]) == 20


def test_heads_that_an_evictor_left_with_different_tokens_look_up_their_own():
    policy = InfLLM(20, sinks=2, local=8, block_size=4, representatives=2)
    forwards = feed(policy, (60,), [1, 1], first=Random(40))
    next(forwards), next(forwards)
    kv, queries, position, step = next(forwards)
    assert kv.position.shape[1] == HEADS
    allowed = policy.choose(kv, queries, position, step).allowed
    assert allowed.shape == (1, HEADS, 41)
    outside = -(-(40 + 1 - 8 - 2) // 4)
    grouped = queries[0, :, 0].view(HEADS, GROUP, DIM).sum(1)
    for h in range(HEADS):
        relevance = (kv.side["infllm.mean"][0, h, :outside] @ grouped[h]).tolist()
        chosen = sorted(range(outside), key=lambda j: -relevance[j])[:2]
        blocks = {2 + 4 * j + i for j in chosen for i in range(4)}
        assert set(allowed[0, h].nonzero().flatten().tolist()) == {0, 1, *blocks, *range(2 + outside * 4, 41)}


def test_equal_blocks_and_votes_tie_and_the_newest_win():
    policy = InfLLM(20, sinks=0, local=10, block_size=5, representatives=2)
    keys = torch.randn(DIM).expand(1, HEADS, 61, DIM)
    kv = KV.of(keys, keys).with_columns(attention=torch.ones(1, HEADS, 61))
    step = Step(0, torch.tensor([60]), torch.tensor([61]), True)
    queries = torch.randn(1, HEADS * GROUP, 1, DIM)
    read = policy.choose(kv, queries, torch.tensor([[60]]), step).allowed[0, 0]
    assert read.nonzero().flatten().tolist() == list(range(45, 61))  # the window starts at 55, then two blocks
    numbered = KV.of(torch.arange(61.0)[None, None, :, None].expand(1, 1, -1, DIM), keys[:, :1])
    made = policy(numbered.with_columns(attention=torch.ones(1, 1, 61)), step)
    assert made.side["infllm.mean"][0, 0, :, 0].tolist() == [5 * j + 3.5 for j in range(11)]  # of the last two


def test_memory_bounds_the_bytes_read():
    policy, prompt = InfLLM(memory=0.4, sinks=4, block_size=8, representatives=2), 200
    keys = torch.randn(1, HEADS, prompt, 16).bfloat16()
    kv = KV.of(keys, keys).with_columns(attention=torch.rand(1, HEADS, prompt))
    step = Step(0, torch.tensor([prompt]), torch.tensor([prompt]))
    kv = policy(kv, step).append(keys[:, :, :1], keys[:, :, :1])
    now = Step(0, torch.tensor([prompt]), torch.tensor([prompt + 1]), True)
    read = policy.choose(kv, torch.randn(1, HEADS * GROUP, 1, 16), torch.tensor([[prompt]]), now).allowed
    used = int(read.sum()) * HEADS * 16 * 2 * 2 + sum(x.numel() * x.element_size() for x in kv.side.values())
    allowed = 0.4 * 2 * prompt * HEADS * 16 * 2
    assert 0.8 * allowed < used <= allowed
    with pytest.raises(BudgetError, match="0.1 of the full cache of 200 tokens .* but 28 are needed"):
        InfLLM(memory=0.1, sinks=4, block_size=8).choose(kv, keys[:, :, :1], torch.tensor([[prompt]]), now)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 511}, "budget=511 is too small: it must be at least 512"),
        ({"budget": 999, "local": 900}, "budget=999 is too small: it must be at least 1156"),
        ({"budget": 999, "local": 100}, "local must be None or at least block_size=128 tokens, got 100"),
        ({"budget": 999, "sinks": -1}, "sinks must be an int of 0 or more, got -1"),
        ({"budget": 999, "block_size": 0}, "block_size must be an int of 1 or more, got 0"),
        ({"budget": 999, "representatives": 0}, "representatives must be an int of 1 or more, got 0"),
        ({"budget": 999, "representatives": 129}, "representatives=129 must be at most block_size=128"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        InfLLM(**arguments)


def test_without_attention_it_says_so():
    keys = torch.randn(1, HEADS, 60, DIM)
    with pytest.raises(KeyError, match="needs the column 'attention'"):
        InfLLM(30, sinks=4, local=12, block_size=5)(KV.of(keys, keys), Step(0, torch.tensor([60]), torch.tensor([60])))
