"""Quest against loops over pages, and its bounds against the products they bound."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.kernels.attention import attend
from kvbench.policies import FP8, KIVI, KV, BudgetError, Policy, Quest, Random, Stack, Step
from kvbench.policies.store import Counts

HEADS, GROUP, DIM = 2, 3, 8


def pages_read(keys: Tensor, query: Tensor, page: int, amount: int) -> set[int]:
    """keys [S, D] of one head, query [D] -> slots of the newest page and the amount - 1 others of the largest bound."""
    starts = list(range(0, len(keys), page))
    bounds = {}
    for start in starts[:-1]:
        of_page = keys[start : start + page].tolist()
        low, high = ([pick(column) for column in zip(*of_page, strict=True)] for pick in (min, max))
        bounds[start] = sum(max(q * m, q * M) for q, m, M in zip(query.tolist(), low, high, strict=True))
    best = sorted(bounds, key=lambda start: (-bounds[start], -start))[: amount - 1]
    return {s for start in [*best, starts[-1]] for s in range(start, min(start + page, len(keys)))}


def step(*seen: int, prompt: int | None = None, decoding: bool = True, order: int = 2, **more) -> Step:
    at, more = torch.tensor(seen), {"layers": 3, **more}
    return Step(0, at - 1 if prompt is None else torch.tensor([prompt] * len(seen)), at, decoding, order=order, **more)


def padded(*lengths: int, heads: int = HEADS) -> tuple[KV, Tensor, Tensor]:
    """Rows of so many tokens, pads on the left of the short ones; keys [B, H, N, D] and queries [B, Hq, 1, D]."""
    longest = max(lengths)
    keys = torch.randn(len(lengths), heads, longest, DIM) + torch.randn(1, heads, 1, DIM)
    valid = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(len(lengths), dtype=torch.int64))
    return kv, keys, torch.randn(len(lengths), heads * GROUP, 1, DIM)


def read(policy: Quest, kv: KV, queries: Tensor, now: Step) -> Tensor:
    """[B, Hq, S] bool: live slots that the queries read."""
    position = (now.seen - 1)[:, None]
    chosen = policy.choose(kv, queries, position, now)
    live = (kv.position >= 0).expand(-1, HEADS, -1).repeat_interleave(GROUP, 1)
    if chosen is None:
        return live
    assert chosen.recent == 0
    return live & chosen.allowed.repeat_interleave(queries.shape[1] // chosen.allowed.shape[1], 1)


@pytest.mark.parametrize("lengths", [(50,), (61, 44, 64)])
@pytest.mark.parametrize(("page", "budget"), [(1, 9), (4, 13), (8, 32), (16, 48)])
def test_each_query_head_reads_the_pages_of_the_definition(lengths, page, budget):
    kv, _, queries = padded(*lengths)
    policy = Quest(budget, page)
    for held in (kv, policy(kv, step(*lengths))):  # with and without bounds at hand
        got = read(policy, held, queries, step(*lengths))
        for b, length in enumerate(lengths):
            for g in range(HEADS * GROUP):
                keys = kv.keys.dense()[b, g // GROUP, :length]
                expected = pages_read(keys, queries[b, g, 0], page, budget // page)
                assert set(got[b, g].nonzero().flatten().tolist()) == expected


def test_a_group_can_choose_together():
    kv, _, queries = padded(60)
    got = Quest(24, 4, per_query_head=False).choose(kv, queries, torch.tensor([[59]]), step(60))
    assert got.allowed.shape == (1, HEADS, 60)
    bound = Quest(24, 4).upper_bound(kv, queries).view(HEADS, GROUP, 15).amax(1)
    for h in range(HEADS):
        best = sorted(range(14), key=lambda p: -float(bound[h, p]))[:5]
        expected = sorted(s for p in [*best, 14] for s in range(4 * p, 4 * p + 4))
        assert got.allowed[0, h].nonzero().flatten().tolist() == expected


def test_pages_of_one_slot_are_exact_top_k_attention():
    kv, keys, queries = padded(40)
    policy, now = Quest(7, 1), step(40)
    got = policy.choose(kv, queries, torch.tensor([[39]]), now)
    logits = queries @ keys.repeat_interleave(GROUP, 1).mT
    logits[..., 39] = torch.inf  # the query's own token
    best = logits.topk(7, -1).indices
    assert torch.equal(got.allowed, torch.zeros(1, HEADS * GROUP, 40, dtype=torch.bool).scatter(2, best[:, :, 0], True))
    out = attend(queries, keys, keys, torch.tensor([[39]]), kv.position, scaling=1.0, allowed=got.allowed)
    logits[..., 39] = (queries @ keys.repeat_interleave(GROUP, 1).mT)[..., 39]
    of_best = logits.gather(3, best).softmax(-1)
    values = keys.repeat_interleave(GROUP, 1).gather(2, best[:, :, 0, :, None].expand(-1, -1, -1, DIM))
    torch.testing.assert_close(out, of_best @ values)


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_product_exceeds_the_bound_of_its_page(page, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, HEADS, 30, DIM, generator=generator).mul(5).to(dtype)
    queries = torch.randn(2, HEADS * GROUP, 1, DIM, generator=generator).to(dtype)
    bound = Quest(1000, page).upper_bound(KV.of(keys, keys), queries)
    products = (queries.float() @ keys.float().repeat_interleave(GROUP, 1).mT)[:, :, 0]
    assert (products <= bound.repeat_interleave(page, -1)[..., :30] + 1e-4).all()
    for p in range(-(-30 // page)):  # some key reaches it, channel by channel
        part = slice(p * page, p * page + page)
        terms = queries.float().view(2, HEADS, GROUP, 1, DIM) * keys.float()[:, :, None, part]
        torch.testing.assert_close(bound[..., p], terms.amax(3).sum(-1).flatten(1, 2), atol=1e-4, rtol=1e-5)


def run(policy: Policy, lengths: tuple[int, ...], steps: int, watch) -> None:
    """Prompt, then decode steps of random tokens through `policy`; `watch(kv, step)` sees what `choose` would."""
    stack = Stack((policy,))
    kv, _, _ = padded(*lengths)
    seen = torch.tensor(lengths)
    kv = stack(kv, Step(0, seen, seen, order=2, layers=3))
    for _ in range(steps):
        new = torch.randn(len(lengths), HEADS, 1, DIM)
        kv = kv.append(new, new, seen=seen)
        seen = seen + 1
        now = Step(0, torch.tensor(lengths), seen, True, order=2, layers=3)
        watch(kv, now)
        kv = stack(kv, now)


@pytest.mark.parametrize("lengths", [(37,), (45, 20)])
@pytest.mark.parametrize(
    "then",
    [(), (KIVI(2, 4, 8),), (KIVI(2, 8, 0),), (FP8(),)],
    ids=["dense", "KIVI", "KIVI-0", "FP8"],
)
def test_bounds_are_those_of_the_keys_that_attention_reads(then, lengths):
    policy = Quest(12, 4)
    changed = []

    def watch(kv: KV, now: Step) -> None:
        query = torch.randn(len(lengths), HEADS * GROUP, 1, DIM)
        scratch = policy.upper_bound(KV(kv.keys, kv.values), query)
        assert torch.equal(policy.upper_bound(kv, query), scratch)
        changed.append(int((kv.side["quest.packed"] != 0).any()))

    run(Stack((policy, *then)), lengths, 26, watch)
    assert not then or (changed[-1] and "quest.low" not in changed)


def test_bounds_of_pages_that_did_not_change_are_kept():
    policy = Quest(12, 4)

    def watch(kv: KV, now: Step) -> None:
        poisoned = kv.side["quest.low"].clone()
        done = (int(now.seen) - 1) // 4
        poisoned[:, :, :done] = 77.0
        low, _ = policy._bounds(KV(kv.keys, kv.values, {}, {**kv.side, "quest.low": poisoned}))
        assert (low[:, :, :done] == 77.0).all() and (low[:, :, done:] != 77.0).all()

    run(policy, (37,), 9, watch)


def test_a_flat_cache_that_is_packed_later_has_new_bounds():
    """Ragged heads are held flat without any change of keys; packing changes all of them, though their number stays."""
    kv, _, _ = padded(40)
    kept = torch.full((1, HEADS, 40), -1)
    kept[0, 0], kept[0, 1, :16] = torch.arange(40), torch.arange(16)
    kv = kv.gather(kept, Counts.of(torch.tensor([[40, 16]]))).flattened()
    assert kv.keys.is_flat
    policy = Quest(12, 4)
    noted = policy(kv, step(40))
    packed = KIVI(2, 8, 0)(replace(noted, keys=kv.keys.rectangular(), values=kv.values.rectangular()), step(40))
    assert packed.keys.body.counts.per_head.tolist() == [[40, 16]]
    query = torch.randn(1, HEADS * GROUP, 1, DIM)
    scratch = policy.upper_bound(KV(packed.keys, packed.values, packed.columns), query)
    assert torch.equal(policy.upper_bound(packed, query), scratch)
    assert not torch.equal(scratch, policy.upper_bound(kv, query))
    got = read(policy, packed, query, step(40))
    for g in range(HEADS * GROUP):
        keys = packed.keys.dense()[0, g // GROUP, : [40, 16][g // GROUP]]
        assert set(got[0, g].nonzero().flatten().tolist()) == pages_read(keys, query[0, g, 0], 4, 3)


def test_a_padded_row_reads_as_alone():
    kv, keys, queries = padded(60, 38)
    kv.keys.tail[1, :, 38:] = 1e3  # dead columns may hold anything
    policy, now = Quest(16, 4), step(60, 38)
    got = read(policy, policy(kv, now), queries, now)
    alone = KV.of(keys[1:, :, -38:], keys[1:, :, -38:])
    bound = policy.upper_bound(kv, queries)[1:, :, :10]  # of the last page, too: 2 of its 4 slots are live
    torch.testing.assert_close(bound, policy.upper_bound(alone, queries[1:]))
    assert torch.equal(got[1:, :, :38], read(policy, alone, queries[1:], step(38)))
    assert not got[1:, :, 38:].any()
    one = policy(kv, now).select(torch.tensor([1]))  # a beam keeps its bounds
    assert torch.equal(read(policy, one, queries[1:], step(38))[..., :38], got[1:, :, :38])


def test_equal_pages_tie_and_the_newest_win():
    keys, queries = torch.randn(DIM).expand(1, HEADS, 40, DIM), torch.randn(1, HEADS * GROUP, 1, DIM)
    got = read(Quest(12, 4), KV.of(keys, keys), queries, step(40))
    assert torch.equal(got, (torch.arange(40) >= 28).expand(1, HEADS * GROUP, -1))


@pytest.mark.parametrize("budget", [50, 53, 1.0])
def test_a_budget_for_all_reads_all_and_keeps_no_bounds(budget):
    kv, _, queries = padded(50, 47)
    policy, now = Quest(budget), step(50, 47, prompt=50)
    assert policy.choose(kv, queries, torch.tensor([[49], [46]]), now) is None
    assert policy(kv, now) is kv
    short = Quest(48)  # one row fits, if not in whole pages; the other does not
    got = read(short, kv, queries, now)
    assert got[1].sum(-1).tolist() == [47] * HEADS * GROUP
    assert (got[0].sum(-1) <= 48).all()


def test_prompts_and_dense_layers_read_everything():
    kv, _, queries = padded(80)
    many = torch.randn(1, HEADS * GROUP, 5, DIM)
    assert Quest(48).choose(kv, many, torch.arange(75, 80)[None], step(80, decoding=False)) is None
    for order in (0, 1):
        now = step(80, order=order, layers=4)
        assert Quest(48).choose(kv, queries, torch.tensor([[79]]), now) is None
        assert Quest(48)(kv, now) is kv
    now = step(80, order=0)
    assert Quest(48, dense_layers=0).choose(kv, queries, torch.tensor([[79]]), now) is not None
    assert Quest(48).spread(torch.tensor([48]), torch.tensor([80]), 4).tolist() == [[80], [80], [48], [48]]


def test_after_an_evictor_pages_are_of_what_is_left():
    policy = Random(30) | Quest(12, 4)
    kv, _, queries = padded(60, 45)
    kv = policy(kv, step(60, 45, decoding=False))
    assert kv.counts.even == 30
    got = read(Quest(12, 4), kv, queries, step(60, 45))
    for b in range(2):
        for g in range(HEADS * GROUP):
            expected = pages_read(kv.keys.dense()[b, g // GROUP], queries[b, g, 0], 4, 3)
            assert set(got[b, g].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("then", [(), (KIVI(4, 8, 8),)], ids=["dense", "KIVI"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("memory", [0.6, 0.9])
def test_memory_bounds_the_bytes_read_in_all_layers(memory, shared, then):
    policy, prompt, layers = Quest(memory=memory, page=4, per_query_head=not shared), 120, 6
    kv, _, queries = padded(prompt)
    kv = KV.of(kv.keys.dense().bfloat16(), kv.values.dense().bfloat16())
    stack = Stack((policy, *then))
    total, slots = 0, []
    for order in range(layers):
        now = step(prompt, prompt=prompt, order=order, layers=layers, stack=stack.policies)
        held = stack(kv, now)
        chosen = policy.choose(held, queries, torch.tensor([[prompt - 1]]), now)
        slot = held.row_nbytes() - sum(x.numel() * x.element_size() for x in held.side.values())
        part = 1.0 if chosen is None else chosen.allowed.view(HEADS, -1, prompt).any(1).float().mean()
        total += float(slot * part) + sum(x.numel() * x.element_size() for x in held.side.values())
        slots.append(int(policy.slots(held, now)))
    allowed = memory * layers * 2 * prompt * HEADS * DIM * 2
    assert slots[:2] == [prompt] * 2
    if not then:
        assert total <= allowed
        assert total > 0.85 * allowed or not shared
        more = slots[2] + 1
        bounds = (prompt // 4 + 1) * 2 * DIM * 2 + 8
        assert HEADS * (2 * prompt * 32 + 4 * (more * 32 + bounds)) > allowed
    else:
        assert slots[2] == prompt or total <= allowed


def test_a_byte_budget_counts_each_row_and_says_what_is_missing():
    policy = Quest(memory=0.9, page=4, dense_layers=0)
    both = policy.slots(padded(200, 80)[0], step(201, 81))
    assert both.flatten().tolist() == [int(policy.slots(padded(n)[0], step(n + 1))) for n in (200, 80)]
    message = r"Quest\(memory=0.2, page=4\): 0.2 of the full cache of 60 tokens .* room for 0 slots .* 12 are needed"
    with pytest.raises(BudgetError, match=message):
        Quest(memory=0.2, page=4).slots(padded(60)[0], step(61, layers=4))
    assert int(Quest(memory=1.0).slots(KV.of(*torch.randn(2, 1, 2, 30, 8).bfloat16()), step(30, prompt=30))) == 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 47}, "budget=47 is too small: it must be at least 48"),
        ({"budget": 50, "page": 0}, "page must be an int of 1 or more, got 0"),
        ({"budget": 50, "dense_layers": -1}, "dense_layers must be an int of 0 or more, got -1"),
        ({"budget": 50, "per_query_head": 1}, "per_query_head must be True or False, got 1"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        Quest(**arguments)
