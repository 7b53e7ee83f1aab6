"""KVzip against lists of (score, position) sorted in Python, and bytes counted on the result."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvbench.policies import KIVI, KV, BudgetError, KVzip, Random, Stack, Step
from kvbench.policies.interface import Repeat

HEADS, DIM = 2, 8


def held(tokens: int, *lengths: int, layers: int = 3, levels: int = 0, dtype: torch.dtype = torch.float32) -> list[KV]:
    """Layers of left-padded rows with the column "repeat"; levels: so many distinct scores only, for ties."""
    kvs = []
    lengths = lengths or (tokens,)
    valid = torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]
    for _ in range(layers):
        keys = torch.randn(len(lengths), HEADS, tokens, DIM, dtype=dtype)
        empty = KV.of(keys[:, :, :0], keys[:, :, :0])
        kv = empty.append(keys, -keys, valid, torch.zeros(len(lengths), dtype=torch.int64))
        score = torch.rand(len(lengths), HEADS, tokens) ** torch.randint(1, 9, (1, HEADS, 1))
        score = (score * levels).floor() / levels if levels else score
        kvs.append(kv.with_columns(repeat=torch.where(kv.position >= 0, score, 9.0)))
    return kvs


def steps(kvs: list[KV], *seen: int, decoding: bool = False) -> list[Step]:
    at = torch.tensor(seen)
    return [Step(i, at, at, decoding, order=i, layers=len(kvs)) for i in range(len(kvs))]


def lists(kvs: list[KV], row: int) -> dict[tuple[int, int], list[tuple[float, int]]]:
    """(layer, head) -> [(score, position), ...] of one row."""
    found = {}
    for layer, kv in enumerate(kvs):
        for h in range(HEADS):
            score, position = kv.column("repeat")[row, h].tolist(), kv.position.expand(-1, HEADS, -1)[row, h].tolist()
            found[layer, h] = [(s, p) for s, p in zip(score, position, strict=True) if p >= 0]
    return found


def protected(pairs: list[tuple[float, int]], sinks: int) -> set[int]:
    return {p for _, p in pairs if p < sinks} or {max(pairs)[1]}


def by_pair(found: dict, total: int, sinks: int) -> dict:
    """The protected slots and the best others of all heads: ties to the most recent, then to earlier layers, heads."""
    kept = {at: protected(pairs, sinks) for at, pairs in found.items()}
    rest = [(-s, -p, at) for at, pairs in found.items() for s, p in pairs if p not in kept[at]]
    for _, p, at in sorted(rest)[: total - sum(map(len, kept.values()))]:
        kept[at].add(-p)
    return {at: sorted(x) for at, x in kept.items()}


def by_head(found: dict, total: int, sinks: int) -> dict:
    kept = {at: protected(pairs, sinks) for at, pairs in found.items()}
    rank = {at: max((s for s, p in pairs if p not in kept[at]), default=-1) for at, pairs in found.items()}
    for at in sorted(found, key=lambda at: (-rank[at], at)):
        more = {**kept, at: {p for _, p in found[at]}}
        if sum(map(len, more.values())) > total:
            break
        kept = more
    return {at: sorted(x) for at, x in kept.items()}


def positions(kvs: list[KV], row: int) -> dict:
    kept = [kv.position.expand(-1, HEADS, -1)[row] for kv in kvs]
    return {(i, h): [p for p in x[h].tolist() if p >= 0] for i, x in enumerate(kept) for h in range(HEADS)}


@pytest.mark.parametrize("budget", [4, 7, 16, 23, 0.3, 0.61])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("level", ["pair", "head", "pair_uniform"])
@pytest.mark.parametrize("levels", [0, 4], ids=["distinct", "ties"])
def test_kept_slots_equal_the_definition(budget, sinks, level, levels):
    kvs, lengths = held(24, 24, 17, 3, levels=levels), (24, 17, 3)
    found = [lists(kvs, b) for b in range(3)]
    kept = KVzip(budget, level, sinks=sinks).over_layers(kvs, steps(kvs, *lengths))
    for b, n in enumerate(lengths):
        share = n - int(n * (1 - budget) + 1e-9) if isinstance(budget, float) else budget
        mean = max(sinks, 1, share)
        total = min(mean, n) * len(found[b])
        if level == "pair_uniform":
            expected = {at: by_pair({at: pairs}, min(mean, n), sinks)[at] for at, pairs in found[b].items()}
        else:
            expected = (by_pair if level == "pair" else by_head)(found[b], total, sinks)
        assert positions(kept, b) == expected
        if level == "pair":
            assert sum(map(len, expected.values())) == total
    for kv, old in zip(kept, kvs, strict=True):
        assert "repeat" not in kv.columns and "repeat" in old.columns
        index = kv.position.long().clamp(min=0).expand(-1, HEADS, -1)  # row 0 has no pads: its slots are its positions
        live = (kv.position[0] >= 0).expand(HEADS, -1)
        for now, before in ((kv.keys, old.keys), (kv.values, old.values)):
            expected = before.dense()[0].gather(1, index[0, ..., None].expand(-1, -1, DIM))
            assert torch.equal(now.dense()[0][live], expected[live])


@pytest.mark.parametrize("level", ["pair", "head", "pair_uniform"])
def test_a_padded_row_is_kept_as_alone(level):
    kvs = held(20, 20, 13)
    for kv in kvs:
        kv.keys.tail[1, :, 13:] = 1e30
    alone = [KV.of(kv.keys.dense()[1:, :, :13], kv.values.dense()[1:, :, :13]) for kv in kvs]
    alone = [x.with_columns(repeat=kv.column("repeat")[1:, :, :13]) for x, kv in zip(alone, kvs, strict=True)]
    policy = KVzip(0.4, level, sinks=2)
    together = positions(policy.over_layers(kvs, steps(kvs, 20, 13)), 1)
    assert together == positions(policy.over_layers(alone, steps(alone, 13)), 0)


def test_after_another_evictor_that_left_heads_uneven():
    kvs, policy = held(24, 24, 17, levels=5), KVzip(7, sinks=2)
    now = steps(kvs, 24, 17)
    first = [Random(11 - 2 * i)(kv, step) for i, (kv, step) in enumerate(zip(kvs, now, strict=True))]
    for level, expected in (("pair", by_pair), ("head", by_head)):
        kept = replace(policy, level=level).over_layers(first, now)
        for b in range(2):
            assert positions(kept, b) == expected(lists(first, b), 7 * 6, 2)
        again = replace(policy, budget=5, level=level)
        put = [kv.with_columns(repeat=torch.rand(2, HEADS, kv.counts.width)) for kv in kept]
        twice = again.over_layers(put, now)
        assert positions(twice, 1) == expected(lists(put, 1), 5 * 6, 2)


def test_one_layer_alone_ranks_its_own_heads():
    kvs, policy = held(20, layers=1, levels=6), KVzip(8)
    now = steps(kvs, 20)
    assert positions([policy(kvs[0], now[0])], 0) == by_pair(lists(kvs, 0), 16, 4)


def test_equal_scores_tie_and_the_most_recent_win():
    kvs = [kv.with_columns(repeat=torch.zeros(1, HEADS, 20)) for kv in held(20)]
    kept = KVzip(6, sinks=2).over_layers(kvs, steps(kvs, 20))
    assert set(map(tuple, positions(kept, 0).values())) == {(0, 1, 16, 17, 18, 19)}


@pytest.mark.parametrize("level", ["pair", "head", "pair_uniform"])
def test_a_budget_for_everything_changes_nothing_but_the_column(level):
    kvs = held(20, 20, 13, dtype=torch.bfloat16)
    for policy in (KVzip(20, level), KVzip(1.0, level), KVzip(memory=1.0, level=level)):
        for kv, old in zip(policy.over_layers(kvs, steps(kvs, 20, 13)), kvs, strict=True):
            assert kv.keys is old.keys and kv.values is old.values and not kv.columns


def test_never_while_decoding():
    kvs = held(20)
    bare = [KV(kv.keys, kv.values) for kv in kvs]
    for kv, old in zip(KVzip(5).over_layers(bare, steps(bare, 20, decoding=True)), bare, strict=True):
        assert kv is old
    assert sum(kv.counts.total for kv in KVzip(5).over_layers(kvs, steps(kvs, 20))) == 5 * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("level", ["pair", "head"])
def test_memory_gives_a_total_whose_bytes_fit_and_with_one_slot_more_would_not(level, dtype):
    kvs = held(24, 24, 15, dtype=dtype)
    rule = by_pair if level == "pair" else by_head
    for memory in (0.4, 0.7, 0.97):
        kept = KVzip(memory=memory, level=level, sinks=2).over_layers(kvs, steps(kvs, 24, 15))
        nbytes = torch.stack([kv.row_nbytes() for kv in kept]).sum(0)
        for b, n in enumerate((24, 15)):
            found, allowed = lists(kvs, b), 3 * int(memory * 2 * n * HEADS * DIM * 2)
            wanted = [rule(found, total, 2) for total in range(2 * 6, 6 * n + 1)]
            fits = [sum(row_bytes(kvs[i], b, x, i) for i in range(3)) <= allowed for x in wanted]
            assert positions(kept, b) in [
                x for i, x in enumerate(wanted) if fits[i] and fits[i : i + 2] != [True, True]
            ]
            assert nbytes[b] <= allowed


def row_bytes(kv: KV, row: int, wanted: dict, layer: int) -> int:
    """Bytes of one row of a layer that keeps the wanted slots: keys, values, and positions if any was lost."""
    slots = sum(len(wanted[layer, h]) for h in range(HEADS))
    lost = slots < int(kv.counts.per_head[row].sum())
    return slots * (2 * DIM * kv.keys.dtype.itemsize + 4 * lost)


@pytest.mark.parametrize("level", ["pair", "head", "pair_uniform"])
@pytest.mark.parametrize("memory", [0.25, 0.5, 0.8])
def test_bytes_fit_with_a_quantizer_behind(level, memory):
    kvs = held(120, 120, 77, dtype=torch.bfloat16)
    stack = Stack((KVzip(memory=memory, level=level), KIVI(bits=4, group_size=8, residual=8)))
    kept = stack.over_layers(kvs, steps(kvs, 120, 77))
    full = 3 * 2 * torch.tensor([120, 77]) * HEADS * DIM * 2
    nbytes = torch.stack([kv.row_nbytes() for kv in kept]).sum(0)
    assert (nbytes <= memory * full).all() and (nbytes > 0.6 * memory * full).all()


def test_a_byte_budget_that_cannot_be_met_says_so():
    kvs = held(20)
    # Of 20 tokens * 2 heads * 8 dims * 2 sides * 2 bytes a tenth is 128 bytes; 4 float32 slots of 6 heads take 68 each.
    message = "0.1 of the full cache of 20 tokens is 384 bytes in 3 layers, but what is protected takes 1632"
    with pytest.raises(BudgetError, match=message):
        KVzip(memory=0.1).over_layers(kvs, steps(kvs, 20))


def test_without_the_column_it_says_so():
    kvs = [KV(kv.keys, kv.values) for kv in held(20)]
    with pytest.raises(KeyError, match="needs the column 'repeat'"):
        KVzip(5).over_layers(kvs, steps(kvs, 20))


def test_needs_and_ragged():
    policy = KVzip(0.3, chunk=7, instruction="Again.")
    assert policy.needs == {"probe": Repeat(7, "Again."), "all_layers": 1}
    assert [KVzip(0.3, level).ragged for level in ("pair", "pair_uniform", "head")] == [True, False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 3}, r"budget=3 is too small: it must be at least 4 \(what the policy protects\)"),
        ({"budget": 9, "level": "layer"}, "level must be one of pair, pair_uniform, head, got 'layer'"),
        ({"budget": 9, "chunk": 0}, "chunk must be an int of at least 1 token, got 0"),
        ({"budget": 9, "instruction": None}, "instruction must be a text, got None"),
        ({"budget": 9, "sinks": True}, "sinks must be an int of 0 or more tokens, got True"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        KVzip(**arguments)


def logits(query: Tensor, kv: KV, allowed: Tensor) -> Tensor:
    keys, values = kv.decode()
    weights = (query @ keys.transpose(-1, -2)).masked_fill(~allowed[:, :, None], -torch.inf).softmax(-1)
    return weights @ values


def test_evicted_reads_as_masked():
    kvs, query = held(24), torch.randn(1, HEADS, 1, DIM)
    kept = KVzip(6).over_layers(kvs, steps(kvs, 24))
    for kv, old, shares in zip(kept, kvs, [positions([kv], 0) for kv in kept], strict=True):
        allowed = torch.tensor([[[s in shares[0, h] for s in range(24)] for h in range(HEADS)]])
        torch.testing.assert_close(logits(query, kv, kv.counts.live()), logits(query, old, allowed))
