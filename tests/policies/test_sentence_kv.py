"""SentenceKV against sentences kept in lists."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kvbench.policies import FP8, KIVI, KV, BudgetError, Policy, Random, SentenceKV, SnapKV, Stack, Step

HEADS, GROUP, DIM = 2, 2, 8


def ranked(keys: Tensor, sentence: list[int], asked: Tensor, sinks: int, recent: int, budget: int) -> set[int]:
    """keys [S, D] of one head, asked [D] -> slots read: sinks, recent, and sentences, the best first, until full."""
    slots = {n: [s for s, of in enumerate(sentence) if of == n] for n in set(sentence)}
    score = {n: float(torch.stack([keys[s].double() for s in of]).mean(0) @ asked.double()) for n, of in slots.items()}
    always = {s for s in range(len(keys)) if s < sinks or s >= len(keys) - recent}
    best = sorted(slots, key=lambda n: (-score[n], -n))
    return always | set([s for n in best for s in slots[n] if s not in always][: budget - sinks - recent])


def feed(policy: Policy, lengths: tuple[int, ...], later: list[int], ends: float = 0.2) -> Iterator[tuple]:
    """Forwards of random tokens, of which a share `ends` a sentence; yields what `choose` gets, then the cache."""
    rows, total = len(lengths), max(lengths) + sum(later)
    ended = torch.rand(rows, total) < ends
    table = (ended.cumsum(1) - ended.int()).int()
    none = torch.zeros(rows, HEADS, 0, DIM)
    kv, seen, prompt = KV.of(none, none), torch.zeros(rows).long(), None
    for number, amount in enumerate([max(lengths), *later]):
        real = torch.tensor(lengths if number == 0 else [max(1, amount - b) for b in range(rows)])
        valid = torch.arange(amount) >= amount - real[:, None]
        keys, queries = torch.randn(rows, HEADS, amount, DIM), torch.randn(rows, HEADS * GROUP, amount, DIM)
        position = torch.where(valid, seen[:, None] + valid.cumsum(1) - 1, -1)
        kv, seen = kv.append(keys, keys, valid, seen), seen + real
        at = kv.position.long()
        found = table[:, None].expand(-1, at.shape[1], -1).gather(2, at.clamp(min=0))
        kv = kv.with_columns(sentence=torch.where(at >= 0, found, 300))  # dead columns may hold anything
        decoding = amount == 1 and number > 0
        prompt = prompt if decoding else seen
        step = Step(0, prompt, seen, decoding, queries=queries[:, :, -8:], query_valid=valid[:, -8:])
        yield kv, queries, position, step
        kv = policy(kv, step)
        yield kv


def check(policy: Policy, selector: SentenceKV, lengths: tuple[int, ...], later: list[int], budget: int, *ends) -> int:
    """Compares every forward; returns how many steps joined the queries of a longer sentence."""
    open_sentences: list[tuple[int, list[Tensor]]] = [(-1, [])] * len(lengths)
    joined = 0
    forwards = feed(policy, lengths, later, *ends)
    for kv, queries, position, step in forwards:
        chosen = selector.choose(kv, queries, position, step)
        assert step.decoding or chosen is None
        for b in range(len(lengths)):
            live = int(kv.counts.per_head[b, 0])
            if not step.decoding or live <= budget:
                open_sentences[b] = -1, []
                assert chosen is None or chosen.allowed[b, :, :live].all()
                continue
            sentence = kv.columns["sentence"].expand(-1, HEADS, -1)[b, :, :live].tolist()
            number, asked = open_sentences[b]
            asked = [*(asked if number == sentence[0][-1] else []), queries[b, :, 0]]
            open_sentences[b] = sentence[0][-1], asked
            joined += len(asked) > 1
            mean = sum(asked) / len(asked)
            for h in range(HEADS):
                group = mean[h * GROUP : (h + 1) * GROUP].sum(0)
                keys = kv.keys.dense()[b, h, :live]
                expected = ranked(keys, sentence[h], group, selector.sinks, selector.recent, budget)
                assert set(chosen.allowed[b, h, :live].nonzero().flatten().tolist()) == expected
                assert len(expected) == budget
        next(forwards)
    return joined


TURNS = [*[1] * 12, 6, *[1] * 6]


@pytest.mark.parametrize("lengths", [(60,), (63, 41, 17)])
@pytest.mark.parametrize(("sinks", "recent", "budget"), [(4, 5, 21), (0, 1, 10), (3, 6, 9)])
def test_reads_what_the_lists_give(lengths, sinks, recent, budget):
    policy = SentenceKV(budget, sinks, recent)
    assert check(policy, policy, lengths, TURNS, budget) > 5


def test_rows_that_come_to_exceed_the_budget_later_are_as_alone():
    policy = SentenceKV(13, 2, 3)  # sentences that are long enough to be begun before, and read in part after
    assert check(policy, policy, (40, 8, 11), [1] * 20, 13, 0.1) > 10


@pytest.mark.parametrize("then", [KIVI(2, 8, 8), KIVI(2, 8, 0), FP8()], ids=["KIVI", "KIVI-0", "FP8"])
@pytest.mark.parametrize("lengths", [(50,), (50, 29)])
def test_means_are_of_the_keys_that_attention_reads(then, lengths):
    policy = SentenceKV(21, 4, 5)
    forwards = feed(Stack((policy, then)), lengths, [1] * 18)
    for number, (kv, _, _, _) in enumerate(forwards):
        if number:
            scratch = policy._means(KV(kv.keys, kv.values, kv.columns))
            torch.testing.assert_close(policy._means(kv), scratch, atol=1e-6, rtol=1e-5)
        next(forwards)


def test_means_of_sentences_that_did_not_change_are_kept():
    policy = SentenceKV(21, 4, 5)
    forwards = feed(policy, (50,), [1] * 18)
    for number, (kv, _, _, step) in enumerate(forwards):
        if number:
            side = {**kv.side, "sentence_kv.mean": torch.full_like(kv.side["sentence_kv.mean"], 77.0)}
            means = policy._means(KV(kv.keys, kv.values, kv.columns, side))
            newest = int(kv.columns["sentence"][0, 0, int(step.seen) - 1])
            assert (means[:, :, :newest] == 77.0).all() and (means[:, :, newest] != 77.0).all()
            # Each tensor is alone in its storage: that is what the bytes count.
            for tensor in (means, *kv.side.values()):
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        next(forwards)


def test_after_snapkv_sentences_are_of_what_is_left():
    selector = SentenceKV(18, 3, 4)
    policy = SnapKV(30, window=4, kernel=3) | selector
    assert policy.needs == {"queries": 4, "sentence": 1}
    assert check(policy, selector, (60, 44), [1] * 8, 18) > 5


def test_a_stack_that_evicts_while_decoding_leaves_the_current_query_only():
    selector = SentenceKV(18, 3, 4)
    forwards = feed(selector | Random(30), (60,), [1] * 5)
    for kv, queries, position, step in forwards:
        if step.decoding:
            assert not kv.side
            chosen = selector.choose(kv, queries, position, step)
            for h in range(HEADS):
                asked = queries[0, h * GROUP : (h + 1) * GROUP, 0].sum(0)
                sentence = kv.columns["sentence"][0, h].tolist()
                expected = ranked(kv.keys.dense()[0, h], sentence, asked, 3, 4, 18)
                assert set(chosen.allowed[0, h].nonzero().flatten().tolist()) == expected
        next(forwards)


@pytest.mark.parametrize("budget", [70, 77, 1.0])
def test_a_budget_for_all_reads_all_and_keeps_nothing(budget):
    policy = SentenceKV(budget, 4, 5)
    forwards = feed(policy, (60, 41), [1] * 5 if budget != 1.0 else [])
    for kv, queries, position, step in forwards:
        assert policy.choose(kv, queries, position, step) is None
        assert not next(forwards).side


def test_equal_sentences_tie_and_the_newest_win():
    keys = torch.randn(DIM).expand(1, HEADS, 40, DIM)
    kv = KV.of(keys, keys).with_columns(sentence=torch.arange(40, dtype=torch.int32)[None, None] // 8)
    now = Step(0, torch.tensor([39]), torch.tensor([40]), True)
    queries = torch.ones(1, HEADS * GROUP, 1, DIM)
    allowed = SentenceKV(17, 2, 3).choose(kv, queries, torch.tensor([[39]]), now).allowed
    # The newest sentence but its last three slots, all of the one before it is too much: the older seven.
    assert allowed[0, 0].nonzero().flatten().tolist() == [0, 1, *range(24, 31), *range(32, 40)]


def test_memory_bounds_the_bytes_read():
    prompt = 200
    keys = torch.randn(1, HEADS, prompt + 1, 16).bfloat16()
    policy = SentenceKV(memory=0.4, sinks=4, recent=5)
    kv = KV.of(keys, keys).with_columns(sentence=torch.arange(prompt + 1, dtype=torch.int32)[None, None] // 9)
    now = Step(0, torch.tensor([prompt]), torch.tensor([prompt + 1]), True)
    queries = torch.randn(1, HEADS * GROUP, 1, 16)
    held = policy(kv, Step(0, now.prompt, now.seen, True, queries=queries))
    read = policy.choose(held, queries, torch.tensor([[prompt]]), now).allowed
    used = int(read.sum()) * 64 + sum(x.numel() * x.element_size() for x in held.side.values())
    allowed = 0.4 * 2 * prompt * HEADS * 16 * 2
    assert allowed - HEADS * 64 - 8 < used <= allowed
    with pytest.raises(BudgetError, match="0.1 of the full cache of 200 tokens"):
        SentenceKV(memory=0.1, sinks=20, recent=5).slots(kv, now)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 63}, "budget=63 is too small: it must be at least 64"),
        ({"budget": 99, "sinks": -1}, "sinks must be an int of 0 or more tokens, got -1"),
        ({"budget": 99, "recent": 0}, "recent must be an int of 1 or more tokens, got 0"),
        ({"budget": 99, "recent": 0.5}, "recent must be an int of 1 or more tokens, got 0.5"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        SentenceKV(**arguments)


def test_what_is_needed_and_absent_is_named():
    keys = torch.randn(1, HEADS, 40, DIM)
    now = Step(0, torch.tensor([39]), torch.tensor([40]), True)
    with pytest.raises(KeyError, match="needs the column 'sentence'"):
        SentenceKV(21, 4, 5)(KV.of(keys, keys), now)
    kv = KV.of(keys, keys).with_columns(sentence=torch.zeros(1, 1, 40, dtype=torch.int32))
    with pytest.raises(ValueError, match="needs the last queries"):
        SentenceKV(21, 4, 5)(kv, now)
