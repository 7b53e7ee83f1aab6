"""DuoAttention against positions written down, head by head."""

import json
from dataclasses import replace

import pytest
import torch

from kvbench.policies import KIVI, KV, BudgetError, DuoAttention, Random, Stack, Step, StreamingLLM

ALPHA = [[0.9, 0.1], [0.5, 0.5], [0.2, 1.0]]
ORDER = [(2, 1), (0, 0), (1, 0), (1, 1), (2, 0), (0, 1)]  # by gate, then layer, then head
LAYERS, HEADS, DIM, SINKS, RECENT = 3, 2, 8, 2, 5


@pytest.fixture
def pattern(tmp_path) -> str:
    path = tmp_path / "gates.json"
    path.write_text(json.dumps({"model": "toy", "alpha": ALPHA}))
    return str(path)


def held(tokens: int, *lengths: int, dtype: torch.dtype = torch.float32) -> KV:
    lengths = lengths or (tokens,)
    valid = torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]
    keys = torch.randn(len(lengths), HEADS, tokens, DIM, dtype=dtype)
    return KV.of(keys[:, :, :0], keys[:, :, :0]).append(
        keys, -keys, valid, torch.zeros(len(lengths), dtype=torch.int64)
    )


def step(layer: int, *prompt: int, seen: tuple[int, ...] | None = None) -> Step:
    seen = seen or prompt
    decoding = seen != prompt
    return Step(layer, torch.tensor(prompt), torch.tensor(seen), decoding, order=layer, layers=LAYERS)


def expected(full: int, seen: int, layer: int, head: int) -> list[int]:
    if (layer, head) in ORDER[:full]:
        return list(range(seen))
    return [p for p in range(seen) if p < SINKS or p >= seen - RECENT]


def positions(kv: KV, row: int) -> list[list[int]]:
    return [[p for p in x if p >= 0] for x in kv.position.expand(-1, HEADS, -1)[row].tolist()]


def full_heads(budget: int | float, tokens: int) -> int:
    """The most full heads, one at a time, whose slots fit into the budget of all heads."""
    mean = budget if isinstance(budget, int) else max(7, tokens - int(tokens * (1 - budget) + 1e-9))
    streaming = min(7, tokens)
    return max(n for n in range(7) if n * tokens + (6 - n) * streaming <= 6 * mean or tokens == streaming)


@pytest.mark.parametrize("budget", [7, 9, 10, 12, 19, 20, 25, 0.05, 0.5, 0.75, 1.0])
def test_classes_follow_from_gates_and_budget(pattern, budget):
    policy = DuoAttention(budget, pattern, SINKS, RECENT)
    for layer in range(LAYERS):
        kv = held(20, 20, 13, 6)
        kept = policy(kv, step(layer, 20, 13, 6))
        for row, n in enumerate((20, 13, 6)):
            full = full_heads(budget, n)
            assert positions(kept, row) == [expected(full, n, layer, h) for h in range(HEADS)]
        if kept is not kv:
            index = kept.position[0].long().clamp(min=0).expand(HEADS, -1)[..., None].expand(-1, -1, DIM)
            live = (kept.position[0] >= 0).expand(HEADS, -1)
            assert torch.equal(kept.keys.dense()[0][live], kv.keys.dense()[0].gather(1, index)[live])


def test_streaming_heads_slide_and_retrieval_heads_grow(pattern):
    policy = DuoAttention(12, pattern, SINKS, RECENT)
    assert full_heads(12, 20) == 2 and full_heads(12, 9) == 6
    for layer in range(LAYERS):
        kv = policy(held(20, 20, 9), step(layer, 20, 9))
        for t in range(1, 7):
            new = torch.randn(2, HEADS, 1, DIM)
            kv = kv.append(new, new, seen=torch.tensor([20, 9]) + t - 1)
            kv = policy(kv, step(layer, 20, 9, seen=(20 + t, 9 + t)))
            for row, n, full in ((0, 20 + t, 2), (1, 9 + t, 6)):
                assert positions(kv, row) == [expected(full, n, layer, h) for h in range(HEADS)]


def test_no_full_head_is_streaming_llm(pattern):
    policy, streaming = DuoAttention(7, pattern, SINKS, RECENT), StreamingLLM(7, SINKS, positions="original")
    kv = other = held(20, 20, 13)
    for t in range(4):
        now = step(0, 20, 13, seen=(20 + t, 13 + t))
        kv, other = policy(kv, now), streaming(other, now)
        assert torch.equal(kv.position.expand(-1, HEADS, -1), other.position.expand(-1, HEADS, -1))
        assert torch.equal(kv.keys.dense(), other.keys.dense())
        new = torch.randn(2, HEADS, 1, DIM)
        kv, other = (x.append(new, new, seen=torch.tensor([20 + t, 13 + t])) for x in (kv, other))


def test_a_budget_for_everything_changes_nothing(pattern):
    kv = held(20, 20, 13, dtype=torch.bfloat16)
    for budget in ({"budget": 20}, {"budget": 1.0}, {"memory": 1.0}):
        policy = DuoAttention(**budget, pattern=pattern, sinks=SINKS, recent=RECENT)
        assert all(policy(kv, step(layer, 20, 13)) is kv for layer in range(LAYERS))
        short = held(3, dtype=torch.bfloat16)
        assert policy(short, step(0, 3)) is short


def test_a_padded_row_is_kept_as_alone(pattern):
    kv, policy = held(20, 20, 13), DuoAttention(0.6, pattern, SINKS, RECENT)
    kv.keys.tail[1, :, 13:] = 1e30
    alone = KV.of(kv.keys.dense()[1:, :, :13], kv.values.dense()[1:, :, :13])
    for layer in range(LAYERS):
        together, single = policy(kv, step(layer, 20, 13)), policy(alone, step(layer, 13))
        assert positions(together, 1) == positions(single, 0)


def test_after_another_evictor(pattern):
    first = Random(15)(held(20), step(0, 20))
    kept = DuoAttention(12, pattern, SINKS, RECENT)(first, step(0, 20))
    before = positions(first, 0)
    assert positions(kept, 0)[0] == before[0]
    sinks = [p for p in before[1] if p < SINKS]
    assert positions(kept, 0)[1] == sinks + before[1][len(before[1]) - 7 + len(sinks) :]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_memory_gives_the_most_full_heads_whose_bytes_fit(pattern, dtype, packed):
    kvs = [held(60, dtype=dtype) for _ in range(LAYERS)]
    seen = set()
    for memory in (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0):
        allowed = 3 * int(memory * 2 * 60 * HEADS * DIM * 2)
        behind = (KIVI(bits=2, group_size=8, residual=8),) if packed else ()
        fits = -1
        for full in range(7):
            kept = []
            for layer, kv in enumerate(kvs):
                wanted = [expected(full, 60, layer, h) for h in range(HEADS)]
                index = torch.tensor([x + [-1] * (60 - len(x)) for x in wanted])[None]
                kept.append(kv if (index >= 0).all() else kv.gather(index[..., : max(map(len, wanted))]))
            kept = Stack(behind).over_layers(kept, [step(i, 60) for i in range(LAYERS)])
            fits = full if sum(int(kv.row_nbytes()) for kv in kept) <= allowed else fits
        policy = DuoAttention(memory=memory, pattern=pattern, sinks=SINKS, recent=RECENT)
        seen.add(fits)
        nbytes = 0
        for layer, kv in enumerate(kvs):
            if fits < 0:
                with pytest.raises(BudgetError):
                    Stack((policy, *behind))(kv, step(layer, 60))
                continue
            result = Stack((policy, *behind))(kv, step(layer, 60))
            nbytes += int(result.row_nbytes())
            assert positions(result, 0) == [expected(fits, 60, layer, h) for h in range(HEADS)]
            new = torch.randn(1, HEADS, 1, DIM, dtype=dtype)
            grown = result.append(new, new, seen=torch.tensor([60]))
            later = Stack((policy, *behind))(grown, step(layer, 60, seen=(61,)))
            assert positions(later, 0) == [expected(fits, 61, layer, h) for h in range(HEADS)]
        assert nbytes <= allowed
    assert len(seen) > 2


def test_a_byte_budget_below_the_streaming_heads_says_so(pattern):
    policy = DuoAttention(memory=0.1, pattern=pattern, sinks=SINKS, recent=RECENT)
    # Of 20 tokens * 2 heads * 8 dims * 2 sides * 2 bytes a tenth is 128 bytes; 7 float32 slots of 6 heads take 68 each.
    message = "0.1 of the full cache of 20 tokens is 384 bytes in 3 layers, but streaming heads alone take 2856"
    with pytest.raises(BudgetError, match=message):
        policy(held(20), step(0, 20))


def test_patterns_that_cannot_be_used(tmp_path, pattern):
    kv, now = held(20), step(0, 20)
    with pytest.raises(ValueError, match="no file .*gone.json; scripts/find_retrieval_heads.py writes it"):
        DuoAttention(400, str(tmp_path / "gone.json"))(kv, now)
    for text in ("", "{}", '{"alpha": [0.5]}', '{"alpha": [[0.5], [0.5, 1]]}', '{"alpha": [["a"]]}'):
        bad = tmp_path / f"{len(text)}.json"
        bad.write_text(text)
        with pytest.raises(ValueError, match="no table of gates, layers x key-value heads"):
            DuoAttention(400, str(bad)).check(DIM)
    with pytest.raises(ValueError, match="for 3 layers of 2 key-value heads, but the model has 4 of 2; scripts"):
        DuoAttention(9, pattern, SINKS, RECENT)(kv, replace(now, layers=4))


def test_the_official_tables_are_read_and_gates_above_one_are_one(tmp_path):
    table, same = tmp_path / "full_attention_heads.tsv", tmp_path / "gates.json"
    gates = [[1.5, 0.1], [0.5, 0.5], [-0.2, 4.0]]
    table.write_text("".join("\t".join(f"{a:.18e}" for a in row) + "\n" for row in gates))
    same.write_text(json.dumps({"alpha": [[1.0, 0.1], [0.5, 0.5], [0.0, 1.0]]}))
    assert full_heads(10, 20) == 1
    for layer in range(LAYERS):
        both = [DuoAttention(10, str(path), SINKS, RECENT)(held(20), step(layer, 20)) for path in (table, same)]
        assert positions(both[0], 0) == positions(both[1], 0)
        assert (len(positions(both[0], 0)[0]) == 20) == (layer == 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 319}, r"budget=319 is too small: it must be at least 320 \(what the policy protects\)"),
        ({"budget": 400, "sinks": -1}, "sinks must be an int of 0 or more tokens, got -1"),
        ({"budget": 400, "recent": 0}, "recent must be an int of 1 or more tokens, got 0"),
        ({"budget": 400, "pattern": 7}, "pattern must be the path of a file or 'proving', got 7"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        DuoAttention(**arguments)
