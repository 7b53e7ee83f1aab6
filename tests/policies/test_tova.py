"""TOVA against sets of kept tokens, one softmax row per query head, added up in loops."""

import math

import pytest
import torch
from torch import Tensor

from kvbench import CompressedCache
from kvbench.policies import KV, TOVA, Random, SnapKV, Step


def row(query: Tensor, keys: Tensor, held: list[int], softcap: float | None = None, sink: float | None = None) -> dict:
    """Softmax of one query [D] over the held tokens of keys [S, D]: {token: weight}."""
    logits = {j: 0.5 * float(query.double() @ keys[j].double()) for j in held}
    if softcap is not None:
        logits = {j: softcap * math.tanh(x / softcap) for j, x in logits.items()}
    total = sum(math.exp(x) for x in logits.values()) + (0 if sink is None else math.exp(sink))
    return {j: math.exp(x) / total for j, x in logits.items()}


def mean_rows(queries: Tensor, keys: Tensor, held: list[list[int]], **more) -> dict[int, float]:
    """queries [Hq, D] of one token, keys [H, S, D], the tokens held by each head -> {token: mean over query heads}."""
    group = len(queries) // len(keys)
    total: dict[int, float] = {}
    for g, query in enumerate(queries):
        sinks = {"sink": float(more["sinks"][g])} if "sinks" in more else {}
        for j, p in row(query, keys[g // group], held[g // group], more.get("softcap"), **sinks).items():
            total[j] = total.get(j, 0.0) + p / len(queries)
    return total


def best(scores: dict[int, float], budget: int, protect_last: bool) -> list[int]:
    order = sorted(scores, key=lambda j: (protect_last and j == max(scores), scores[j], j), reverse=True)
    return sorted(order[:budget])


def step(queries: Tensor | None, *seen: int, **more) -> Step:
    return Step(0, torch.tensor(seen), torch.tensor(seen), queries=queries, scaling=0.5, **more)


def sharp(batch: int, heads: int, group: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, heads, tokens, 8), 2 * torch.randn(batch, heads * group, tokens, 8)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("protect_last", [True, False])
def test_prompt_and_decoding_equal_the_definition(group, protect_last):
    keys, queries = sharp(2, 2, group, 30)
    keys[0, :, 21:25] = -queries[0, ::group, 21:25]  # tokens that do not look at themselves
    policy, held = TOVA(7, protect_last), [list(range(20)) for _ in range(2)]
    kv, newest_dropped = KV.of(keys[:, :, :20], keys[:, :, :20]), 0
    for t in range(19, 30):
        if t > 19:
            kv = kv.append(keys[:, :, t : t + 1], keys[:, :, t : t + 1], seen=torch.full((2,), t))
            held = [[*tokens, t] for tokens in held]
        now = step(queries[:, :, t : t + 1], t + 1, t + 1, decoding=t > 19)
        expected = [mean_rows(queries[b, :, t], keys[b], [held[b]] * 2) for b in range(2)]
        score = policy.score(kv, now)
        assert score.shape[1] == 1 and score.dtype == torch.float32
        for b in range(2):
            torch.testing.assert_close(score[b, 0], torch.tensor([expected[b][j] for j in held[b]]))
        kv, held = policy(kv, now), [best(scores, 7, protect_last) for scores in expected]
        assert kv.position.tolist() == [[tokens] for tokens in held]
        newest_dropped += sum(t not in tokens for tokens in held)
    assert bool(newest_dropped) != protect_last
    index = kv.position.long()[..., None].expand(-1, 2, -1, 8)
    assert torch.equal(kv.keys.dense(), keys.gather(2, index))


def test_the_layers_softcap_and_learned_sinks_are_used():
    keys, queries = sharp(1, 2, 2, 20)
    more = {"softcap": 2.0, "sinks": torch.tensor([-1.0, 0.0, 1.0, 3.0])}
    score = TOVA(8).score(KV.of(keys, keys), step(queries[:, :, -1:], 20, **more))
    expected = mean_rows(queries[0, :, -1], keys[0], [list(range(20))] * 2, **more)
    torch.testing.assert_close(score[0, 0], torch.tensor([expected[j] for j in range(20)]))


def test_only_the_last_query_votes():
    keys, queries = sharp(1, 2, 2, 20)
    kv = KV.of(keys, keys)
    torch.testing.assert_close(TOVA(5).score(kv, step(queries, 20)), TOVA(5).score(kv, step(queries[:, :, -1:], 20)))


def test_the_mean_over_heads_of_snapkv_with_one_query_and_no_pooling():
    keys, queries = sharp(1, 3, 2, 20)
    kv, now = KV.of(keys, keys), step(queries[:, :, -1:], 20)
    heads = SnapKV(5, 1, 1).score(kv, now)[..., :19]  # its window of one is not scored
    torch.testing.assert_close(TOVA(5).score(kv, now)[..., :19], heads.mean(1, keepdim=True))


@pytest.mark.parametrize("pads", [1, 6, 17])
def test_a_padded_row_is_as_alone(pads):
    keys, queries = sharp(2, 2, 2, 20)
    valid = torch.arange(20) >= torch.tensor([[0], [pads]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    kv.keys.tail[1, :, 20 - pads :] = 50.0  # dead columns may hold anything
    kept = TOVA(6)(kv, step(queries[:, :, -1:], 20, 20 - pads, query_valid=valid[:, -1:])).position
    real = range(20 - pads)
    scores = mean_rows(queries[1, :, -1], keys[1, :, pads:], [list(real)] * 2)
    expected = best(scores, 6, True)
    assert kept[1, 0].tolist() == expected + [-1] * (6 - len(expected))
    assert kept[0, 0].tolist() == best(mean_rows(queries[0, :, -1], keys[0], [list(range(20))] * 2), 6, True)


def test_heads_that_hold_other_tokens_are_added_up_by_token():
    keys, queries = sharp(2, 2, 2, 24)
    lengths = [24, 19]
    valid = torch.arange(24) >= 24 - torch.tensor(lengths)[:, None]
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    now = step(queries[:, :, -1:], *lengths, query_valid=valid[:, -1:])
    first = Random(21, seed=3)(kv, now)
    kept = TOVA(9, protect_last=False)(first, now).position
    for b, length in enumerate(lengths):
        held = [[j for j in head if j >= 0] for head in first.position.expand(2, 2, -1)[b].tolist()]
        scores = mean_rows(queries[b, :, -1], keys[b, :, 24 - length :], held)
        assert kept[b].tolist() == [best({j: scores[j] for j in head}, 9, False) for head in held]


def test_equal_keys_tie_and_the_most_recent_win():
    keys, queries = torch.randn(8).expand(1, 2, 30, 8), torch.randn(1, 4, 1, 8)
    assert TOVA(10)(KV.of(keys, keys), step(queries, 30)).position.tolist() == [[list(range(20, 30))]]


def test_memory_counts_positions_once_for_all_heads():
    keys, queries = (x.bfloat16() for x in sharp(1, 4, 1, 60))
    kv, now = KV.of(keys, keys), step(queries[:, :, -1:], 60)
    sizes = {n: TOVA(n)(kv, now).nbytes for n in range(1, 60)}
    assert sizes[10] == 10 * (4 * 2 * 8 * 2 + 4)  # heads, sides, dims, bytes; a position
    for memory in (0.1, 0.5, 0.8):
        fits = max(n for n, size in sizes.items() if size <= memory * 60 * 4 * 2 * 8 * 2)
        assert TOVA(memory=memory)(kv, now).counts.even == fits


def test_bad_options_and_no_queries():
    with pytest.raises(ValueError, match="TOVA: protect_last must be True or False, got 4"):
        TOVA(8, 4)
    with pytest.raises(ValueError, match="needs the last queries"):
        TOVA(5)(KV.of(*(torch.randn(1, 2, 9, 8),) * 2), step(None, 9))


@pytest.mark.parametrize("block", [None, 7])
def test_in_a_model_a_padded_row_answers_as_alone(tiny, block):
    model, _ = tiny
    ids = torch.randint(2, 200, (2, 40))
    mask = (torch.arange(40) >= torch.tensor([[0], [14]])).long()  # two whole blocks of pads
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = CompressedCache(model, TOVA(12, block=block))
    both = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
    single = CompressedCache(model, TOVA(12, block=block))
    alone = model.generate(ids[1:, 14:], past_key_values=single, **settings)
    assert both[1, 40:].tolist() == alone[0, 26:].tolist()
    for layer, other in zip(cache.layers, single.layers, strict=True):
        assert torch.equal(layer.kv.position[1:], other.kv.position)
