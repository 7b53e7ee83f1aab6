"""What generate does with a cache besides greedy decoding: beams, samples, rollback; and the number formats."""

import copy

import pytest
import torch
from transformers import DynamicCache

from kvbench import CompressedCache
from kvbench.policies import FP8, H2O, KIVI, LAQ, NVFP4, Full, KeyDiff, Quantizer, Quest, SnapKV, StreamingLLM

DECODING = [
    Full(),
    H2O(12),
    StreamingLLM(10),
    SnapKV(0.5, window=6) | FP8(),
    H2O(14) | KIVI(2, 8, 8),
    NVFP4() | KeyDiff(12),
]


def logprobs(model, cache, do, ids, mask, answer) -> torch.Tensor:
    """Log-probability of each answer token, fed one by one into a fresh cache [B, T]."""
    found = []
    for step in range(answer.shape[1]):
        logits = do.feed(model, cache, ids if step == 0 else answer[:, step - 1 : step], mask)
        found.append(logits[:, -1].log_softmax(-1).gather(1, answer[:, step : step + 1]))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return torch.cat(found, 1)


@pytest.mark.parametrize("policy", DECODING, ids=str)
def test_beams(policy, tiny, do) -> None:
    """The winning beams have the probability they have when fed alone; with Full they are DynamicCache's."""
    model = tiny(seed=2, initializer_range=0.2)
    ids, mask = do.left_padded(24, 17)

    def search(cache):
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, num_beams=3, num_return_sequences=2,
            length_penalty=0.0, do_sample=False, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip

    cache = CompressedCache(model, policy)
    found = search(cache)
    assert cache.kept(0).shape[0] == 6
    assert len({tuple(row.tolist()) for row in found.sequences}) > 2
    assert found.beam_indices.diff().ne(0).any()  # beams changed places
    answer = found.sequences[:, 24:]
    alone = CompressedCache(model, policy)
    rows = torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(
        logprobs(model, alone, do, ids[rows], mask[rows], answer).sum(1), found.sequences_scores, rtol=1e-3, atol=1e-3
    )
    if policy == Full():
        wanted = search(DynamicCache(config=model.config))
        assert torch.equal(found.sequences, wanted.sequences)


@pytest.mark.parametrize("policy", DECODING, ids=str)
def test_samples(policy, tiny, do) -> None:
    model = tiny(seed=2, initializer_range=0.2)
    ids, mask = do.left_padded(24, 17)

    def sample(cache):
        torch.manual_seed(3)
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=True, num_return_sequences=3
        )

    cache = CompressedCache(model, policy)
    found = sample(cache)
    assert found.shape == (6, 32) and len({tuple(row.tolist()) for row in found}) == 6
    if policy == Full():
        assert torch.equal(found, sample(DynamicCache(config=model.config)))
    alone, rows = CompressedCache(model, policy), torch.tensor([0, 0, 0, 1, 1, 1])
    logprobs(model, alone, do, ids[rows], mask[rows], found[:, 24:])
    assert do.kept(alone) == do.kept(cache)


def test_prompt_lookup_and_assistant(tiny, do) -> None:
    model, assistant = tiny(seed=2), tiny(seed=3, num_hidden_layers=1)
    ids = torch.arange(2, 12).repeat(3)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(ids, past_key_values=DynamicCache(config=model.config), **options)
    for extra in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
        cache = CompressedCache(model)
        assert torch.equal(model.generate(ids, past_key_values=cache, **extra, **options), wanted)
        assert cache.kept(0).shape[2] == wanted.shape[1] - 1
        with pytest.raises(ValueError, match="tokens cannot be taken back .crop, assisted decoding, prompt lookup."):
            model.generate(ids, past_key_values=CompressedCache(model, H2O(12) | KIVI(2, 8, 8)), **extra, **options)


def test_reset(policy, tiny, do) -> None:
    model = tiny()
    ids, mask = do.left_padded(30, 21)
    cache = CompressedCache(model, policy)
    wanted = do.greedy(model, cache, ids, mask, new=5), do.kept(cache)
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    other = do.left_padded(9, 14, 3, seed=4)  # another batch size
    do.greedy(model, cache, *other, new=3)
    cache.reset()
    found = do.greedy(model, cache, ids, mask, new=5), do.kept(cache)
    assert torch.equal(found[0], wanted[0]) and found[1] == wanted[1]


def body(cache, layer: int, side: str, row: int) -> list[torch.Tensor]:
    """Codes and scales of the packed tokens of a row, in order."""
    held = getattr(cache.layers[layer].kv, side).body
    if held is None:
        return []
    held = held.exact
    ends = held.counts.per_head.sum(1).cumsum(0).tolist()
    part = slice(([0, *ends])[row], ends[row])
    group = held._explicit()[part] if held.groups else None
    return [t[part] for t in held.rows.values()] + [t[group] for t in held.groups.values()]


@pytest.mark.parametrize(
    "change, rows",
    [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "mask", "repeat"],
)
def test_rows_move_as_a_whole(change, rows, policy, tiny, do) -> None:
    model = tiny()
    ids, mask = do.left_padded(33, 20, 26)
    caches = [CompressedCache(model, policy), CompressedCache(model, policy)]
    for cache in caches:
        do.feed(model, cache, ids, mask)
    stays, moved = caches
    change(moved)
    for layer in range(2):
        assert moved.layers[layer].seen.tolist() == [[33, 20, 26][row] for row in rows]
        for place, row in enumerate(rows):
            assert do.kept(moved)[layer][place] == do.kept(stays)[layer][row]
            for side in ("keys", "values"):
                pairs = zip(body(moved, layer, side, place), body(stays, layer, side, row), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
    token, mask = torch.tensor([[5], [9], [30]]), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    wanted = do.feed(model, stays, token, mask)[rows]
    torch.testing.assert_close(do.feed(model, moved, token[rows], mask[rows]), wanted, rtol=1e-3, atol=1e-3)
    assert do.kept(moved) == [[layer[row] for row in rows] for layer in do.kept(stays)]


@pytest.mark.parametrize("amount", [-4, 29], ids=["remove 4", "keep 29"])
def test_crop(amount, policy, tiny, do) -> None:
    model = tiny()
    ids, mask = do.left_padded(33, 26)
    cache, never = CompressedCache(model, policy), CompressedCache(model)
    do.feed(model, cache, ids, mask)
    before = do.kept(cache)
    if not do.can_crop(cache):
        with pytest.raises(ValueError, match=r"tokens cannot be taken back .*keep a copy\(\) of the cache"):
            cache.crop(amount)
        assert do.kept(cache) == before
        return
    cache.crop(amount)
    assert cache.get_seq_length() == 29 and cache.layers[0].seen.tolist() == [29, 22]
    ends = (29, 22)
    wanted = [[[[p for p in h if p < end] for h in row] for row, end in zip(l, ends, strict=True)] for l in before]  # noqa: E741
    assert do.kept(cache) == wanted
    do.feed(model, never, ids[:, :29], mask[:, :29])
    token, mask = torch.tensor([[5], [9]]), torch.cat([mask[:, :29], torch.ones(2, 1, dtype=torch.long)], 1)
    found, wanted = do.feed(model, cache, token, mask), do.feed(model, never, token, mask)
    if policy == Full():
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    if not any(isinstance(p, Quantizer) for p in cache.policy.policies):
        do.assert_true_positions(
            cache, model, [torch.cat([ids[r, ids.shape[1] - n : 29], token[r]]) for r, n in ((0, 33), (1, 26))]
        )


def test_crop_to_nothing_and_back(policy, tiny, do) -> None:
    model = tiny()
    cache = CompressedCache(model, policy)
    cache.crop(-3)  # empty: nothing to do
    if not do.can_crop(cache):
        return
    do.feed(model, cache, do.left_padded(20)[0])
    cache.crop(-20)
    assert cache.kept(0).shape == (1, 2, 0) and cache.get_seq_length() == 0
    tokens = do.greedy(model, cache, do.left_padded(25, seed=1)[0])
    assert torch.equal(tokens, do.greedy(model, CompressedCache(model, policy), do.left_padded(25, seed=1)[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_number_formats(dtype, policy, tiny, do) -> None:
    model, exact = tiny(dtype=dtype, initializer_range=0.15), tiny(initializer_range=0.15)
    ids, mask = do.left_padded(30, 21)
    cache, wide = CompressedCache(model, policy), CompressedCache(exact, policy)
    found, wanted = do.feed(model, cache, ids, mask), do.feed(exact, wide, ids, mask)
    assert found.dtype == dtype and cache.layers[0].kv.keys.dense().dtype == dtype
    assert cache.kept(1).dtype == torch.int64
    if "attention" in cache.needs:
        assert cache.layers[0].kv.columns["attention"].dtype == torch.float32
    coarse = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float32: 1e-6}[dtype] * float(wanted.abs().max())
    assert (found - wanted)[mask == 1].abs().max() <= coarse
    tokens = do.greedy(model, cache, torch.cat([ids, ids[:, :3]], 1), torch.cat([mask, mask[:, -3:]], 1), new=5)
    assert tokens.shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_dynamic_cache(dtype, tiny, do) -> None:
    model, ids = tiny(dtype=dtype), do.left_padded(40)[0]
    ours, theirs = CompressedCache(model), DynamicCache(config=model.config)
    for start, end in ((0, 30), *((i, i + 1) for i in range(30, 40))):
        found, wanted = (do.feed(model, cache, ids[:, start:end]) for cache in (ours, theirs))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))
    assert torch.equal(ours.layers[0].kv.keys.dense(), theirs.layers[0].keys)


def test_autocast(policy, tiny, do) -> None:
    model, (ids, mask) = tiny(initializer_range=0.15), do.left_padded(24, 15)
    rows = [(ids, mask), *((ids[i : i + 1, -n:], None) for i, n in enumerate((24, 15)))]

    def talk(cache, ids, mask):
        logits = [do.feed(model, cache, ids, mask)[:, -1:]]
        for step in range(1, 4):
            more = None if mask is None else torch.cat([mask, torch.ones(2, step, dtype=torch.long)], 1)
            logits.append(do.feed(model, cache, torch.full_like(ids[:, :1], 5), more))
        return torch.cat(logits, 1)

    exact = talk(CompressedCache(model, policy), *rows[0])
    with torch.autocast("cpu", torch.bfloat16):
        found, *alone = (talk(CompressedCache(model, policy), *row) for row in rows)
    assert found.dtype == torch.bfloat16
    steps = 4 if policy in (Full(), StreamingLLM(11)) else 1  # what others keep or round hangs on the last bits
    for other in (torch.cat(alone), exact):
        most = 0.1 * float(exact.abs().max())
        torch.testing.assert_close(found[:, :steps].float(), other[:, :steps].float(), rtol=0, atol=most)


@pytest.mark.parametrize("policy", [Full(), H2O(12), KIVI(4, 8, 16), KIVI(4, 8, 16) | KeyDiff(12)], ids=str)
def test_what_inference_mode_made_is_not_written_to_outside(policy, tiny, do) -> None:
    model = tiny()
    ids, mask = do.left_padded(24, 15)
    caches = CompressedCache(model, policy), CompressedCache(model, policy)
    for cache, mode in zip(caches, (torch.inference_mode, torch.no_grad), strict=True):
        with mode():
            do.greedy(model, cache, ids, mask, new=20)
    mask = torch.cat([mask, torch.ones(2, 20, dtype=torch.long)], 1)
    for token in torch.tensor([[5], [9], [3]]).repeat(6, 1):
        found, wanted = (do.feed(model, cache, token.expand(2, 1), mask) for cache in caches)
        torch.testing.assert_close(found, wanted)


def test_gradients_reach_a_prompt_through_the_cache(tiny, do) -> None:
    model, (ids, _) = tiny(), do.left_padded(12)
    grads = []
    for cache in (CompressedCache(model), DynamicCache(config=model.config)):
        model.zero_grad()
        with torch.enable_grad():
            logits = [model(ids[:, :8], past_key_values=cache).logits[:, -1:]]
            logits += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 12)]
            torch.cat(logits, 1).logsumexp(-1).sum().backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", [Full(), H2O(14) | KIVI(2, 8, 8), LAQ(12, draft_window=4)], ids=str)
def test_deepcopy_is_a_copy_that_knows_the_same_model(policy, tiny, do) -> None:
    model, (ids, mask) = tiny(), do.left_padded(24, 15)
    empty = copy.deepcopy(CompressedCache(model, policy))
    do.feed(model, empty, ids, mask)
    copied = copy.deepcopy(empty)
    assert copied.model is model and do.kept(copied) == do.kept(empty)
    token, mask = torch.tensor([[5], [9]]), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    assert torch.equal(do.feed(model, copied, token, mask), do.feed(model, empty, token, mask))


def test_bytes_read_move_with_their_rows(tiny, do) -> None:
    model, (ids, mask) = tiny(), do.left_padded(40, 17, 30)
    cache = CompressedCache(model, Quest(12, page=4))
    do.feed(model, cache, ids, mask)
    do.feed(model, cache, ids[:, :1], torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1))
    before = cache.row_read_nbytes()
    assert len(set(before.tolist())) > 1
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(cache.row_read_nbytes(), before[[2, 0, 1]])
    cache.batch_select_indices(torch.tensor([1]))
    assert torch.equal(cache.row_read_nbytes(), before[[0]])
