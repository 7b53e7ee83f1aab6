"""Prompts in chunks, several turns on one cache, long decoding: positions stay true, budgets hold at every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from kvbench import CompressedCache
from kvbench.policies import FP8, H2O, KIVI, NVFP4, Evictor, Full, KeyDiff, Policy, Random, SnapKV, StreamingLLM


@dataclass(frozen=True)
class Spy(Policy):
    """Changes nothing; notes how many slots were there when it was called."""

    widths: list[int] = field(default_factory=list, hash=False)

    def __call__(self, kv, step):
        self.widths.append(kv.counts.width)
        return kv


def first_evictor(policy) -> Evictor | None:
    return next((p for p in policy.policies if isinstance(p, Evictor)), None)


@pytest.mark.parametrize("cuts", [(7, 20, 33), (5, 39)], ids=["chunks", "one token last"])
def test_deferred_chunks_are_one_shot(policy, cuts, tiny, do) -> None:
    model = tiny()
    ids, mask = do.left_padded(40, 29)
    once, chunked = CompressedCache(model, policy), CompressedCache(model, policy)
    do.feed(model, once, ids, mask)
    with chunked.deferred() as inside:
        assert inside is chunked
        for start, end in zip((0, *cuts), (*cuts, 40), strict=True):
            do.feed(model, chunked, ids[:, start:end], mask[:, :end])
    assert do.kept(chunked) == do.kept(once)
    assert torch.equal(chunked.row_nbytes(), once.row_nbytes())
    token, mask = torch.tensor([[5], [9]]), torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    for step in range(3):
        logits = [do.feed(model, cache, token, mask[:, : 41 + step]) for cache in (once, chunked)]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


def test_chunks_bound_the_slots(policy, tiny, do) -> None:
    model = tiny()
    ids, mask = do.left_padded(48, 37)
    spy = Spy()
    cache = CompressedCache(model, spy | policy)
    evictor = first_evictor(cache.policy)
    for end in range(8, 49, 8):
        do.feed(model, cache, ids[:, end - 8 : end], mask[:, :end])
        if evictor is not None:
            layer = cache.layers[1]
            step_prompt = torch.stack([end - (mask[:, :48] == 0).sum(1), layer.seen]).amax(0)
            if isinstance(evictor.budget, float):
                budget = (step_prompt * evictor.budget).ceil().clamp(min=evictor.min_slots) + 1
            else:
                budget = torch.full((2,), evictor.budget + 1)  # Ragged: one more in the second head
            assert bool((layer.kv.counts.per_head.amax(1) <= budget).all())
            assert max(spy.widths) <= int(budget.max()) + 8
    if not any(hasattr(p, "codecs") for p in cache.policy.policies):
        do.assert_true_positions(cache, model, [ids[0], ids[1, 11:]])


def test_generate_can_cut_the_prompt(tiny, do) -> None:
    model = tiny()
    ids, mask = do.left_padded(40, 29)
    wanted = do.greedy(model, CompressedCache(model), ids, mask)
    spy = Spy()
    for policy in (Full(), spy | StreamingLLM(12)):
        cache = CompressedCache(model, policy)
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, do_sample=False, prefill_chunk_size=9
        )
        if policy == Full():
            assert torch.equal(out[:, 40:], wanted)
    assert max(spy.widths) == 12 + 9


def test_turns(policy, tiny, do) -> None:
    """Three turns, the second and third padded in the middle: each row as if alone, positions true."""
    model = tiny(seed=1)
    turns = [do.left_padded(*lengths, seed=seed) for seed, lengths in enumerate([(20, 31), (17, 6), (1, 12)])]

    def talk(rows: slice, strip: bool):
        cache, ids, mask, answers = CompressedCache(model, policy), None, None, []
        for new, new_mask in turns:
            new, new_mask = new[rows], new_mask[rows]
            if strip:
                new, new_mask = new[:, new_mask[0] == 1], new_mask[:, new_mask[0] == 1]
            ids = new if ids is None else torch.cat([ids, new], 1)
            mask = new_mask if mask is None else torch.cat([mask, new_mask], 1)
            answers.append(do.greedy(model, cache, ids, mask, new=6))
            ids, mask = torch.cat([ids, answers[-1]], 1), torch.cat([mask, torch.ones_like(answers[-1])], 1)
        return cache, torch.cat(answers, 1), [row[m == 1][:-1] for row, m in zip(ids, mask, strict=True)]

    cache, answers, tokens = talk(slice(0, 2), strip=False)
    if not any(hasattr(p, "codecs") for p in cache.policy.policies):
        do.assert_true_positions(cache, model, tokens)
    for row in (0, 1):
        alone, answer, _ = talk(slice(row, row + 1), strip=True)
        assert torch.equal(answer, answers[row : row + 1])
        assert do.kept(alone)[1][0] == do.kept(cache)[1][row]
    evictor = first_evictor(cache.policy)
    if evictor is None:
        assert cache.kept(0).shape[2] == max(map(len, tokens))
    elif isinstance(evictor.budget, int) and evictor.evicts_while_decoding:
        assert cache.layers[0].kv.counts.width <= evictor.budget + 1


@pytest.mark.parametrize(
    "policy",
    [Random(16), StreamingLLM(16), H2O(0.5), KeyDiff(0.5), H2O(16) | KIVI(2, 8, 8), NVFP4() | H2O(16)],
    ids=str,
)
def test_budget_holds_for_200_steps(policy, tiny, do) -> None:
    model = tiny(num_hidden_layers=1)
    ids, _ = do.left_padded(32)
    spy = Spy()
    cache = CompressedCache(model, policy | spy)
    token = do.feed(model, cache, ids)[:, -1:].argmax(-1)
    tokens, sizes = [ids], []
    for step in range(200):
        tokens.append(token)
        token = do.feed(model, cache, token)[:, -1:].argmax(-1)
        sizes.append(cache.nbytes)
        position = cache.kept(0)
        assert position.shape == (1, 2, 16) and bool((position.diff() > 0).all())
        assert position.max() == 32 + step or isinstance(policy, (Random, KeyDiff))
    assert set(spy.widths) == {16}
    assert max(sizes[100:]) <= 1.1 * max(sizes[:100])  # windows and shared scales make it waver
    if isinstance(policy, Evictor):
        do.assert_true_positions(cache, model, [torch.cat(tokens, 1)[0]])


def test_snapkv_leaves_decoded_tokens(tiny, do) -> None:
    model = tiny()
    cache = CompressedCache(model, SnapKV(16, window=8))
    do.greedy(model, cache, *do.left_padded(40), new=9)
    assert cache.kept(0).shape[2] == 16 + 8
    assert cache.kept(0)[0, 0, -16:].tolist() == list(range(32, 48))


@pytest.mark.parametrize("residual", [0, 16])
def test_kivi_flushes_in_time(residual, tiny, do) -> None:
    """Keys leave the tail in whole blocks, values one by one, row by row."""
    model = tiny()
    ids, mask = do.left_padded(20, 35)
    cache = CompressedCache(model, KIVI(2, 8, residual))
    do.feed(model, cache, ids, mask)
    block = residual or 8
    for step in range(40):
        for layer in cache.layers:
            seen = torch.tensor([[20], [35]]) + step
            assert torch.equal(layer.kv.keys.tail_counts.per_head, (seen % block).expand(2, 2))
            assert torch.equal(layer.kv.values.tail_counts.per_head, seen.clamp(max=residual).expand(2, 2))
            assert torch.equal(layer.kv.counts.per_head, seen.expand(2, 2))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        do.feed(model, cache, torch.tensor([[3 + step % 50], [7]]), mask)


def packed_by_position(cache: CompressedCache) -> dict[tuple, bytes]:
    """(side, layer, row, head, position) -> codes and scales of every packed token."""
    found = {}
    for layer in cache.policy_layers():
        for side in ("keys", "values"):
            body = getattr(layer.kv, side).body
            if body is None:
                continue
            body = body.exact
            group = body._explicit() if body.groups else torch.zeros(body.counts.total, dtype=torch.long)
            lists = [(row, head) for row in range(body.counts.shape[0]) for head in range(body.counts.shape[1])]
            start = 0
            for (row, head), count in zip(lists, body.counts.per_head.flatten().tolist(), strict=True):
                for i, position in enumerate(cache.kept(layer.index)[row, head, :count].tolist()):
                    parts = [t[start + i] for t in body.rows.values()] + [
                        t[group[start + i]] for t in body.groups.values()
                    ]
                    found[side, layer.index, row, head, position] = b"".join(p.numpy().tobytes() for p in parts)
                start += count
    return found


@pytest.mark.parametrize("policy", [H2O(24) | KIVI(2, 8, 8), KIVI(2, 8, 8) | H2O(24), FP8() | Random(24)], ids=str)
def test_packed_tokens_are_never_packed_again(policy, tiny, do) -> None:
    model = tiny()
    ids, mask = do.left_padded(40, 29)
    cache = CompressedCache(model, policy)
    do.feed(model, cache, ids, mask)
    before, common = packed_by_position(cache), 0
    for _ in range(24):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        do.feed(model, cache, torch.tensor([[3], [7]]), mask)
        after = packed_by_position(cache)
        assert all(after[place] == before[place] for place in after.keys() & before.keys())
        common += len(after.keys() & before.keys())
        before = after
    assert common > 1000


def test_quantizer_before_evictor_keeps_the_codes(tiny, do) -> None:
    model = tiny()
    ids, mask = do.left_padded(40, 29)
    for quantizer in (KIVI(2, 8, 8), NVFP4(), FP8()):
        plain, stacked = CompressedCache(model, quantizer), CompressedCache(model, quantizer | H2O(0.5))
        do.feed(model, plain, ids, mask)
        do.feed(model, stacked, ids, mask)
        every, some = packed_by_position(plain), packed_by_position(stacked)
        # Later layers see the prompt through the same exact attention: all of them agree.
        assert len(some) >= 200 and some.items() <= every.items() and len(some) < len(every)


def test_two_evictors_act_one_after_the_other(tiny, do) -> None:
    model = tiny(num_hidden_layers=1)
    ids, _ = do.left_padded(40)
    first, both = (
        CompressedCache(model, Random(24)),
        CompressedCache(model, Random(24) | StreamingLLM(10, 2, "original")),
    )
    do.feed(model, first, ids)
    do.feed(model, both, ids)
    for outer, inner in zip(do.kept(first)[0][0], do.kept(both)[0][0], strict=True):
        assert len(outer) == 24 and len(inner) == 10
        sinks = [p for p in outer if p < 2]
        assert inner == sinks + [p for p in outer if p >= 2][len(sinks) - 10 :]
