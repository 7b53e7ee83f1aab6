"""KVSharer against a plain Llama in loops, and against transformers' own cache with layers that hand out others'."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from kvbench import CompressedCache, engine
from kvbench.bridge import to_press
from kvbench.engine import run_stacks
from kvbench.policies import (
    FP8,
    H2O,
    KIVI,
    LAQ,
    AdaKV,
    DuoAttention,
    Full,
    KeyDiff,
    KVSharer,
    KVzip,
    Policy,
    PyramidKV,
    Quest,
    SnapKV,
    Stack,
    StreamingLLM,
    WindowKV,
)
from kvbench.tasks import Recall

VOCAB, PAIRS = 61, ((3, 1), (2, 1))
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {**MIXED, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**MIXED, "query_pre_attn_scalar": 32},
    "gpt_oss": {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tiny(family: str = "llama", **options: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**BASE, **FAMILIES[family], **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def padded(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, VOCAB, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return ids, (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()


def feed(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is None:
        return model(ids, past_key_values=cache).logits
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits


def greedy(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor, new: int = 6, **options: Any) -> Tensor:
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False, **options
    )
    return out[:, ids.shape[1] :]


# --- Two oracles -------------------------------------------------------------------------------------------------


def plain_llama(model: PreTrainedModel, ids: list[int], reads: Mapping[int, int], visible: Callable | None = None):
    """Logits [T, V] of a Llama with one token, layer and head after the other; layer i attends to layer reads[i].

    visible(layer, head, query) -> positions that a query may look at; default: all up to its own.
    """
    config, inner = model.config, model.model
    heads, groups, dim = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads, 32
    hidden = inner.embed_tokens(torch.tensor(ids))
    turn = torch.outer(torch.arange(len(ids)).float(), inner.rotary_emb.inv_freq)
    cos, sin = turn.cos().repeat(1, 2), turn.sin().repeat(1, 2)

    def rope(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[:, dim // 2 :], x[:, : dim // 2]], 1) * sin

    held = []
    for index, layer in enumerate(inner.layers):
        x, attention = layer.input_layernorm(hidden), layer.self_attn
        q, k, v = (part(x).split(dim, 1) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        held.append(([rope(head) for head in k], v))
        keys, values = held[reads.get(index, index)]
        out = torch.zeros(len(ids), heads * dim)
        for h in range(heads):
            query = rope(q[h])
            for t in range(len(ids)):
                seen = list(range(t + 1)) if visible is None else visible(reads.get(index, index), h // groups, t)
                weights = (keys[h // groups][seen] @ query[t] / dim**0.5).softmax(0)
                out[t, h * dim : (h + 1) * dim] = weights @ values[h // groups][seen]
        hidden = hidden + attention.o_proj(out)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(inner.norm(hidden))


class Handing(DynamicCache):
    """transformers' cache, whose layers of `reads` keep nothing and hand out what an earlier one has."""

    def __init__(self, config: Any, reads: Mapping[int, int]) -> None:
        super().__init__(config=config)
        self.reads = reads

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        if layer_idx in self.reads:
            source = self.layers[self.reads[layer_idx]]
            return source.keys, source.values
        return super().update(keys, values, layer_idx, *args, **kwargs)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation("eager" if model.config.model_type in ("gpt_oss", "gemma2") else "sdpa")
    return model


def of_model(model: PreTrainedModel, pairs: tuple) -> dict[int, int]:
    """Pairs of compressed layers as pairs of the model's layers."""
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * 4
    full = [i for i, kind in enumerate(types) if kind == "full_attention"]
    return {full[i]: full[j] for i, j in pairs}


def pairs_for(family: str) -> tuple:
    return ((1, 0),) if "layer_types" in FAMILIES[family] else PAIRS


@pytest.mark.parametrize("pairs", [((1, 0),), ((3, 0),), PAIRS, ((3, 2), (1, 0)), ((3, 0), (2, 0), (1, 0))], ids=str)
def test_a_shared_llama_is_the_plain_loop(pairs: tuple) -> None:
    model, ids = tiny(), padded(15)[0]
    cache = CompressedCache(model, KVSharer(pairs=pairs))
    parts = [(0, 9), (9, 10), (10, 14), (14, 15)]
    found = torch.cat([feed(model, cache, ids[:, a:b]) for a, b in parts], 1)[0]
    wanted = plain_llama(model, ids[0].tolist(), dict(pairs))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(found, plain_llama(model, ids[0].tolist(), {}), atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_transformers_with_layers_handed_out(family: str) -> None:
    """Sliding-window layers are left alone: pairs are of full-attention layers only."""
    ids, mask = padded(30, 17, 1)
    theirs, ours, pairs = plain(tiny(family)), tiny(family), pairs_for(family)
    wanted = greedy(theirs, Handing(theirs.config, of_model(theirs, pairs)), ids, mask)
    assert not torch.equal(wanted, greedy(theirs, DynamicCache(config=theirs.config), ids, mask))
    cache = CompressedCache(ours, KVSharer(pairs=pairs))
    assert torch.equal(greedy(ours, cache, ids, mask), wanted)
    for layer in cache.policy_layers():
        assert torch.equal(cache.kept(layer.index), cache.kept(cache.policy_layers()[0].index))
    chunked = CompressedCache(ours, KVSharer(pairs=pairs))
    assert torch.equal(greedy(ours, chunked, ids, mask, prefill_chunk_size=7), wanted)
    if family in ("llama", "gpt_oss"):
        expected = greedy(theirs, Handing(theirs.config, of_model(theirs, pairs)), ids, mask, num_beams=3)
        assert torch.equal(greedy(ours, CompressedCache(ours, KVSharer(pairs=pairs)), ids, mask, num_beams=3), expected)


@pytest.mark.parametrize("evictor", [H2O(9), KeyDiff(9), StreamingLLM(9, positions="original")], ids=str)
def test_a_sharing_layer_reads_the_slots_its_source_kept(evictor: Policy) -> None:
    """The prompt is read whole by both layers; a decoded token by both over what the source's policy has left."""
    model, ids = tiny(num_hidden_layers=2), padded(24)[0]
    cache = CompressedCache(model, evictor | KVSharer(pairs=((1, 0),)))
    alone = CompressedCache(model, evictor)
    found = [feed(model, cache, ids[:, :20])[0, -1]]
    feed(model, alone, ids[:, :20])
    kept: list[list[list[int]]] = []
    for t in range(20, 24):
        assert torch.equal(cache.kept(0), alone.kept(0)) and torch.equal(
            cache.kept(1), cache.kept(0)
        )  # own queries only
        kept.append(cache.kept(0)[0].tolist())
        found.append(feed(model, cache, ids[:, t : t + 1])[0, 0])
        feed(model, alone, ids[:, t : t + 1])

    def visible(layer: int, head: int, query: int) -> list[int]:
        return list(range(query + 1)) if query < 20 else [*kept[query - 20][head], query]

    wanted = plain_llama(model, ids[0].tolist(), {1: 0}, visible)[19:]
    torch.testing.assert_close(torch.stack(found), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("quantizer", [KIVI(4, 8, 8), FP8()], ids=str)
def test_packed_slots_are_read_as_the_source_holds_them(quantizer: Policy) -> None:
    """Order in the stack does not matter; and what is packed of the prompt is what would be packed without sharing."""
    model, (ids, mask) = tiny(), padded(24, 31)
    sharer = KVSharer(pairs=((3, 2), (1, 0)))
    caches = [CompressedCache(model, p) for p in (quantizer | sharer, sharer | quantizer, sharer)]
    logits = [feed(model, cache, ids, mask) for cache in caches]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])
    exact = caches[2].layers[2].kv
    packed = quantizer(exact, caches[2].layers[2].step(False))
    for side in ("keys", "values"):
        assert torch.equal(getattr(packed, side).dense(), getattr(caches[0].layers[2].kv, side).dense())
        assert caches[0].layers[3].kv is caches[0].layers[2].kv
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    steps = [feed(model, cache, torch.tensor([[5], [9]]), mask) for cache in caches]
    assert torch.equal(steps[0], steps[1]) and not torch.equal(steps[0], steps[2])


def test_selectors_choose_for_each_layer_by_its_own_queries() -> None:
    model, (ids, mask) = tiny(), padded(40, 31)
    cache = CompressedCache(model, Quest(16, page=4, dense_layers=0) | KVSharer(pairs=PAIRS))
    greedy(model, cache, ids, mask, new=4)
    source, reader = cache.layers[1], cache.layers[3]
    assert source.read is not None and reader.read is not None and reader.kv.side is source.kv.side
    per_layer = [layer.row_read_nbytes() for layer in cache.policy_layers()]
    assert torch.equal(torch.stack(per_layer).sum(0), cache.row_read_nbytes())
    assert all(bool((read > 0).all() and (read < source.kv.row_nbytes()).all()) for read in per_layer)


# --- Bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [Full(), KIVI(2, 8, 8), H2O(12) | KIVI(4, 8, 8)], ids=str)
def test_layers_that_share_hold_no_byte(other: Policy) -> None:
    model, (ids, mask) = tiny(), padded(30, 21)
    cache, whole = CompressedCache(model, other | KVSharer(pairs=PAIRS)), CompressedCache(model, other)
    for each in (cache, whole):
        greedy(model, each, ids, mask)
    assert {part.layer for part in cache.ledger()} == {0, 1}
    assert cache.nbytes == sum(p.nbytes for p in cache.ledger()) and 2 * cache.nbytes == whole.nbytes
    assert torch.equal(2 * cache.row_nbytes(), whole.row_nbytes())
    assert cache.full_nbytes == whole.full_nbytes
    rows = [line.split() for line in cache.report().splitlines()[2:-1]]
    assert [row[2] for row in rows[2:]] == ["of:1", "of:1"] and [row[4] for row in rows[2:]] == ["0", "0"]
    assert not any(layer.lent for layer in cache.holders())  # nothing kept from one forward to the next
    if isinstance(other, Full):  # a layer that shares reads what its source holds
        assert torch.equal(cache.row_read_nbytes(), whole.row_read_nbytes())


MEMORY = [
    SnapKV(memory=0.2, window=4),
    H2O(memory=0.2),
    PyramidKV(memory=0.2, window=4, beta=4),
    AdaKV(SnapKV(memory=0.2, window=4)),
    AdaKV(PyramidKV(memory=0.2, window=4, beta=4)),
    WindowKV(memory=0.2, window=4, review=4, layer_group=2, beta=4),
    KVzip(memory=0.2, sinks=2),
    StreamingLLM(memory=0.2, sinks=2),
]


@pytest.mark.parametrize("quantizer", [Full(), KIVI(4, 8, 0)], ids=["dense", "kivi"])
@pytest.mark.parametrize("evictor", MEMORY, ids=str)
def test_a_byte_budget_is_spent_on_the_layers_that_hold(evictor: Policy, quantizer: Policy) -> None:
    """Close to all of it is used: the slots that sharing frees go to the other layers, and never one too many."""
    model, (ids, mask) = tiny().bfloat16(), padded(120)
    share = KVSharer(pairs=((3, 1),))
    cache = CompressedCache(model, evictor | quantizer | share)
    feed(model, cache, ids, mask)
    allowed = 0.2 * cache.full_nbytes
    used = cache.row_nbytes() / allowed
    assert bool((used <= 1).all()) and bool((used > 0.94).all())
    without = CompressedCache(model, evictor | quantizer)
    feed(model, without, ids, mask)
    more, fewer = (sum(each.layers[i].kv.counts.total for i in range(3)) for each in (cache, without))
    assert more > 1.05 * fewer  # of a pyramid, the layer that shares is the smallest


@pytest.mark.parametrize("budget", [{"memory": 0.5}, {"budget": 0.5}], ids=str)
def test_retrieval_heads_are_ranked_among_layers_that_hold(budget: dict, tmp_path: Path) -> None:
    gates = tmp_path / "gates.json"
    gates.write_text(json.dumps({"alpha": [[0.1, 0.2], [0.3, 0.9], [1.0, 1.0], [0.8, 0.0]]}))
    model, (ids, mask) = tiny().bfloat16(), padded(160, 160)
    policy = DuoAttention(pattern=str(gates), sinks=4, recent=12, **budget) | KVSharer(pairs=((2, 0),))
    cache = CompressedCache(model, policy)
    feed(model, cache, ids, mask)
    full = [(layer.kv.counts.per_head[0] == 160).tolist() for layer in cache.holders()]
    wanted = {True: [[0, 0], [1, 1], [1, 0]], False: [[0, 0], [0, 1], [1, 0]]}["memory" in budget]
    assert full == [[bool(x) for x in row] for row in wanted]


def test_selectors_pay_for_every_layer_that_reads() -> None:
    quest = Quest(memory=0.4, page=8, dense_layers=0)
    model, (ids, mask) = tiny().bfloat16(), padded(160)
    read = []
    for policy in (quest, quest | KVSharer(pairs=PAIRS)):
        cache = CompressedCache(model, policy)
        feed(model, cache, ids, mask)
        feed(model, cache, ids[:, :1], torch.cat([mask, mask[:, :1]], 1))
        read.append(cache.row_read_nbytes().tolist())
    assert read[0] == read[1]


# --- What transformers does with a cache ---------------------------------------------------------------------------


STACKS = [
    KVSharer(pairs=PAIRS),
    H2O(14) | KIVI(2, 8, 8) | KVSharer(pairs=PAIRS),
    KVSharer(pairs=((3, 0),)) | SnapKV(0.5, window=6) | FP8(),
    StreamingLLM(12) | KVSharer(pairs=((2, 1), (3, 2))),
]
every = pytest.mark.parametrize("policy", STACKS, ids=str)


def kept(cache: CompressedCache) -> list:
    return [cache.kept(i).tolist() for i in range(4)]


@every
def test_padded_rows_are_rows_alone_over_turns(policy: Policy) -> None:
    model = tiny()
    turns = [padded(*lengths, seed=seed) for seed, lengths in enumerate([(20, 31), (9, 6), (1, 5)])]

    def talk(rows: slice, strip: bool):
        cache, ids, mask, answers = CompressedCache(model, policy), torch.empty(0), torch.empty(0), []
        for new, new_mask in turns:
            new, new_mask = new[rows], new_mask[rows]
            if strip:
                new, new_mask = new[:, new_mask[0] == 1], new_mask[:, new_mask[0] == 1]
            ids = new if not len(answers) else torch.cat([ids, new], 1)
            mask = new_mask if not len(answers) else torch.cat([mask, new_mask], 1)
            answers.append(greedy(model, cache, ids, mask, new=5))
            ids, mask = torch.cat([ids, answers[-1]], 1), torch.cat([mask, torch.ones_like(answers[-1])], 1)
        return cache, torch.cat(answers, 1)

    cache, answers = talk(slice(0, 2), strip=False)
    for row in (0, 1):
        alone, answer = talk(slice(row, row + 1), strip=True)
        assert torch.equal(answer, answers[row : row + 1])
        for mine, own in zip(kept(cache), kept(alone), strict=True):
            assert [[p for p in head if p >= 0] for head in mine[row]] == [[p for p in h if p >= 0] for h in own[0]]


@every
def test_deferred_chunks_reset_and_forks(policy: Policy) -> None:
    model, (ids, mask) = tiny(), padded(40, 29)
    sharing = Stack((policy,)).sharing
    cache = CompressedCache(model, policy)
    record = CompressedCache(model, sharing, needs={"attention": 1, "queries": 8})
    with record.deferred():
        for start, end in ((0, 7), (7, 20), (20, 40)):
            feed(model, record, ids[:, start:end], mask[:, :end])
    first = feed(model, cache, ids, mask)
    wanted = greedy(model, CompressedCache(model, policy), ids, mask)
    if not any("window" in p.needs for p in cache.policy.policies):
        forks = [record.fork(policy), record.fork(policy)]
        for fork in forks:
            assert kept(fork) == kept(cache) and fork.full_nbytes == cache.full_nbytes
            assert torch.equal(fork.row_nbytes(), cache.row_nbytes())
        token, more = first[:, -1:].argmax(-1), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        steps = [feed(model, each, token, more) for each in (cache, *forks)]
        for step in steps[1:]:
            torch.testing.assert_close(step, steps[0], rtol=1e-3, atol=1e-3)
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    assert torch.equal(greedy(model, cache, ids, mask), wanted)


@every
def test_rows_move_once(policy: Policy) -> None:
    model, (ids, mask) = tiny(), padded(33, 20, 26)
    before = CompressedCache(model, policy)
    feed(model, before, ids, mask)
    token, mask = torch.tensor([[5], [9], [30]]), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    wanted = feed(model, before.copy(), token, mask)
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        moved = before.copy()
        change(moved)
        found = feed(model, moved, token[rows], mask[rows])
        torch.testing.assert_close(found, wanted[rows], rtol=1e-3, atol=1e-3)
        assert {part.layer for part in moved.ledger()}.isdisjoint(moved.sources)


@pytest.mark.parametrize("policy", [STACKS[0], KIVI(2, 8, 8) | KVSharer(pairs=PAIRS)], ids=str)
def test_crop_is_as_if_it_had_never_been(policy: Policy) -> None:
    model, (ids, mask) = tiny(), padded(33, 26)
    cache = CompressedCache(model, policy)
    feed(model, cache, ids, mask)
    before = kept(cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 29 and all(layer.seen.tolist() == [29, 22] for layer in cache.layers)
    ends = (29, 22)
    for was, now in zip(before, kept(cache), strict=True):
        for row, end in enumerate(ends):
            assert [[p for p in h if 0 <= p < end] for h in was[row]] == [[p for p in h if p >= 0] for h in now[row]]
    if policy == STACKS[0]:
        never = CompressedCache(model, policy)
        feed(model, never, ids[:, :29], mask[:, :29])
        token, mask = torch.tensor([[5], [9]]), torch.cat([mask[:, :29], torch.ones(2, 1, dtype=torch.long)], 1)
        found, wanted = feed(model, cache, token, mask), feed(model, never, token, mask)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [LAQ(12), KVzip(0.5, sinks=2)], ids=str)
def test_probes_read_as_the_shared_model_does(policy: Policy) -> None:
    """Drafts and second readings are made on forks that share as the cache does: padded rows as alone."""
    model, (ids, mask) = tiny(), padded(36, 27)
    stack = policy | KVSharer(pairs=PAIRS)
    cache = CompressedCache(model, stack)
    tokens = greedy(model, cache, ids, mask, new=4)
    for row in (0, 1):
        own, all_real = ids[row : row + 1, mask[row] == 1], mask[row : row + 1, mask[row] == 1]
        assert torch.equal(greedy(model, CompressedCache(model, stack), own, all_real, new=4), tokens[row : row + 1])


# --- The engine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query_aware", [False, True])
def test_the_engine_prefills_once_for_all_that_share_alike(tiny_pair, query_aware: bool, monkeypatch) -> None:
    model, tokenizer = tiny_pair
    task = Recall(length=320, needles=2, count=2)
    share = KVSharer(pairs=((1, 0),))
    stacks = [Full(), share, H2O(memory=0.25) | KIVI(4, residual=32) | share, share | SnapKV(0.25, window=8)]
    prefills = []
    monkeypatch.setattr(
        engine._Prefill,
        "_run",
        lambda self, which, run=engine._Prefill._run: (prefills.append(which), run(self, which))[1],
    )
    together = run_stacks(model, tokenizer, task, stacks, query_aware=query_aware, batch_size=3)
    assert prefills == [Stack(), Stack((share,))]
    for stack, run in zip(stacks, together, strict=True):
        assert run.checks == {"fired": True, "bytes_ok": True}
        (alone,) = run_stacks(model, tokenizer, task, [stack], query_aware=query_aware, batch_size=1)
        for a, b in zip(run.rows, alone.rows, strict=True):
            assert [a[k] for k in ("sample_id", "prediction", "kv_bytes_prefill_end", "kv_bytes_final")] == [
                b[k] for k in ("sample_id", "prediction", "kv_bytes_prefill_end", "kv_bytes_final")
            ]
    full, shared = (run.rows for run in together[:2])
    assert all(2 * b["kv_bytes_prefill_end"] == a["kv_bytes_prefill_end"] for a, b in zip(full, shared, strict=True))
    assert [r["kv_bytes_full"] for r in full] == [r["kv_bytes_full"] for r in shared]


@pytest.fixture
def tiny_pair(request: pytest.FixtureRequest) -> tuple:
    return request.getfixturevalue("tiny")


# --- What cannot be ------------------------------------------------------------------------------------------------


def test_sources_follow_chains_as_official_code_does() -> None:
    """Layers in order; one whose source shares gets what that one reads."""
    assert KVSharer(pairs=((3, 2), (2, 0), (5, 3))).sources(6) == {2: 0, 3: 0, 5: 0}
    assert KVSharer(pairs=((3, 2), (2, 0), (5, 3)), layers=1).sources(6) == {3: 2}
    assert KVSharer(pairs=((3, 2),)).sources(1) == {}  # a layer by itself
    assert Stack((H2O(8), KVSharer(pairs=((3, 2),)))).sources(4) == {3: 2}
    assert (H2O(8) | KVSharer(pairs=((3, 2),)) | FP8()).sharing == Stack((KVSharer(pairs=((3, 2),)),))


def test_the_proving_model_has_its_pairs() -> None:
    assert KVSharer("proving").sources(4) == {3: 1}
    assert str(KVSharer("proving", layers=1)) == "KVSharer(path='proving', layers=1)"
    with pytest.raises(ValueError, match="layers=2, but there are only 1 pairs"):
        KVSharer("proving", layers=2).sources(4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "give either path="),
        ({"path": "proving", "pairs": ((1, 0),)}, "give either path="),
        ({"pairs": ()}, r"pairs must be \(layer, earlier layer it reads\), ints from 0, got \(\)"),
        ({"pairs": ((1, True),)}, "ints from 0"),
        ({"pairs": ((1, -1),)}, "ints from 0"),
        ({"pairs": (1, 0)}, "ints from 0"),
        ({"pairs": ((1, 2),)}, "layer 1 cannot read layer 2: a source must come before"),
        ({"pairs": ((1, 1),)}, "layer 1 cannot read layer 1"),
        ({"pairs": ((2, 0), (2, 1))}, "layer 2 is given two sources; one is allowed"),
        ({"pairs": ((2, 0),), "layers": 0}, "layers must be an int of at least 1, or None, got 0"),
        ({"pairs": ((2, 0),), "layers": 2}, "layers=2, but there are only 1 pairs"),
    ],
)
def test_fields_that_make_no_sense(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"KVSharer: .*{message}"):
        KVSharer(**fields)


def test_what_does_not_fit_the_model_is_named() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"there is no layer 4: the model has layers 0 to 3 that can share"):
        CompressedCache(model, KVSharer(pairs=((4, 0),)))
    with pytest.raises(ValueError, match=r"no layer 3: the model has layers 0 to 1"):  # two slide
        CompressedCache(tiny("gpt_oss"), KVSharer(pairs=((3, 1),)))
    with pytest.raises(ValueError, match="stack at most one policy that shares layers"):
        CompressedCache(model, KVSharer(pairs=((1, 0),)) | KVSharer(pairs=((3, 2),)))
    with pytest.raises(ValueError, match="block= cannot be had with layers that share; feed the prompt in pieces"):
        CompressedCache(model, KeyDiff(12, block=8) | KVSharer(pairs=((1, 0),)))
    with pytest.raises(
        ValueError, match="pairs are given for 4 layers, but the model has 3; scripts/search_kvsharer.py"
    ):
        CompressedCache(tiny(num_hidden_layers=3), KVSharer("proving"))
    with pytest.raises(TypeError, match="cannot be a press: its layers share"):
        to_press(H2O(8) | KVSharer(pairs=((1, 0),)))


def test_layers_with_other_heads_cannot_share() -> None:
    model, ids = tiny(), padded(9)[0]
    attention = model.model.layers[3].self_attn
    for name in ("k_proj", "v_proj"):
        wide = torch.nn.Linear(64, 4 * 32, bias=False)
        setattr(attention, name, wide)
    attention.num_key_value_groups = 1
    with pytest.raises(ValueError, match="layer 3 cannot read the keys and values of layer 1: the two differ in heads"):
        feed(model, CompressedCache(model, KVSharer(pairs=((3, 1),))), ids)


def test_forks_of_a_cache_that_does_not_share() -> None:
    model, ids = tiny(), padded(20)[0]
    record, shared = CompressedCache(model), CompressedCache(model, KVSharer(pairs=((3, 1),)))
    for cache in (record, shared):
        feed(model, cache, ids)
    for cache in (record, shared):
        with pytest.raises(
            ValueError, match="share from the first token on, which those of this cache do not; make a Com"
        ):
            cache.fork(KVSharer(pairs=((3, 2),)))
    assert shared.fork(Full()).sources == {3: 1} and shared.fork(FP8()).layers[3].source.index == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "no {layers, pairs} in JSON"),
        ("[]", "no {layers, pairs} in JSON"),
        ('{"layers": 4}', "no {layers, pairs} in JSON"),
        ('{"layers": 4, "pairs": []}', "pairs must be (layer, earlier layer it reads)"),
        ('{"layers": 4, "pairs": [[1, 2]]}', "layer 1 cannot read layer 2"),
        ('{"layers": 4, "pairs": [[4, 2]]}', "layers must be an int above every layer of a pair, got 4"),
        ('{"layers": "4", "pairs": [[3, 2]]}', "layers must be an int above every layer of a pair, got '4'"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "pairs.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        KVSharer(str(file)).sources(4)


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    where = tmp_path / "gone.json"
    wanted = f"no file {where}; make it with python scripts/search_kvsharer.py --model MODEL --text TEXT --out {where}"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        KVSharer(str(where)).sources(4)


def test_configuration() -> None:
    from importlib.resources import files

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    folder = files("kvbench.conf") / "quant"
    alone, stacked = (
        OmegaConf.create((folder / f"{name}.yaml").read_text()) for name in ("kvsharer", "kvsharer_kivi4")
    )
    assert instantiate(alone) == KVSharer("proving")
    assert instantiate(stacked) == KIVI(4, residual=32) | KVSharer("proving") and hash(instantiate(stacked))
    alone.path, alone.pairs, alone.layers = None, [[3, 1]], None
    assert instantiate(alone) == KVSharer(pairs=((3, 1),))
