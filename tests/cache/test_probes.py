"""Probes against a model that reads the same tokens for good; the cache that is probed does not notice."""

import copy
import gc
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from kvbench import CompressedCache
from kvbench.policies import H2O, LAQ, Full, KVzip, LookaheadKV, SnapKV, SpecKV
from kvbench.policies.interface import Draft, Repeat, SoftTokens
from kvbench.probes import (
    CUE,
    SINKS,
    Modules,
    _lookup,
    known_probe,
    load_modules,
    run_probe,
    run_repeat,
    save_modules,
    soft_probe,
)

NEEDS = {"tokens": 1, "queries": 32, "attention": 1}


def read(model, do, *lengths, seed=0):
    """A cache that has read a left-padded batch, the ids and the mask."""
    ids, mask = do.left_padded(*lengths, seed=seed)
    cache = CompressedCache(model, needs=NEEDS)
    do.feed(model, cache, ids, mask)
    return cache, ids, mask


def modules_for(model, scale: float, tokens: int = 3, rank: int = 2) -> Modules:
    """Random soft tokens, and adapters of this strength on all linears of the first layer and q, k of the second."""
    adapters = {}
    for name, layer in model.model.layers.named_modules():
        wanted = isinstance(layer, nn.Linear) and (name[0] == "0" or name.endswith(("q_proj", "k_proj")))
        if wanted:
            down, up = torch.randn(rank, layer.in_features), scale * torch.randn(layer.out_features, rank)
            adapters[f"model.layers.{name}"] = down, up
    return Modules(torch.randn(tokens, model.config.hidden_size), adapters, rank, 3.0)


def state(cache):
    """Every tensor of a cache, copied."""
    held = [*cache.tensors(), *(pair for layer in cache.policy_layers() for pair in layer.tensors())]
    return [(name, tensor.clone()) for name, tensor in held]


def assert_probes(found, expected, rows=slice(None), **tolerance):
    for a, b in zip(found, expected, strict=True):
        n = b.valid.shape[1]
        assert torch.equal(a.valid[rows, :n], b.valid) and not bool(a.valid[rows, n:].any())
        assert torch.equal(a.position[rows, :n][b.valid], b.position[b.valid])
        for name in ("queries", "keys"):
            real = b.valid[:, None, :, None]
            x, y = (v * real for v in (getattr(a, name)[rows, :, :n], getattr(b, name)))
            torch.testing.assert_close(x, y, **{"atol": 1e-4, "rtol": 1e-4, **tolerance})


SPECS = [
    Draft(5, SnapKV(12, 4)),
    Draft(5, SnapKV(12, 4), verify=True),
    Draft(5, H2O(10)),
    Draft(5, "ngram", verify=True),
    Draft(5, "small"),
    SoftTokens("soft"),
    Repeat(10, "again"),
]


@pytest.fixture
def run(tiny, tmp_path):
    """run(cache, spec): the probes or the scores of a spec; a smaller model and soft tokens are there for it."""
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [7, 8, 9], eos_token_id=None)
    tiny("llama", seed=5, num_hidden_layers=1).save_pretrained(tmp_path / "small")

    def probe(cache, spec):
        if isinstance(spec, Repeat):
            return run_repeat(cache, spec, tokenizer)
        if isinstance(spec, SoftTokens):
            save_modules(tmp_path / spec.path, modules_for(cache.model, 0.1), cache.model, {})
            spec = SoftTokens(str(tmp_path / spec.path))
        if spec == Draft(5, "small"):
            spec = Draft(5, str(tmp_path / "small"))
        return run_probe(cache, spec, tokenizer)

    return probe


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_cache_does_not_notice(family, spec, tiny, do, run):
    model = tiny(family)
    cache, _, mask = read(model, do, 30, 21)
    twin, before = cache.fork(Full()), state(cache)
    run(cache, spec)
    for (name, now), (_, then) in zip(state(cache), before, strict=True):
        assert torch.equal(now, then), name
    assert not any(module._forward_hooks for name, module in model.named_modules() if name)
    ids, mask = torch.tensor([[3, 4], [5, 6]]), torch.cat([mask, torch.ones(2, 2, dtype=torch.int64)], 1)
    assert torch.equal(do.feed(model, cache, ids, mask), do.feed(model, twin, ids, mask))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen2-mixed"])
def test_a_padded_row_is_probed_as_alone(family, spec, tiny, do, run):
    model = tiny(family)
    cache, ids, mask = read(model, do, 30, 21, 6)
    torch.manual_seed(1)
    together = run(cache, spec)
    for row in range(3):
        alone = CompressedCache(model, needs=NEEDS)
        do.feed(model, alone, ids[row : row + 1, mask[row] == 1])
        torch.manual_seed(1)
        found = run(alone, spec)
        if not isinstance(spec, Repeat):
            assert_probes(together, found, slice(row, row + 1))
            continue
        for scores, single in zip(together, found, strict=True):
            torch.testing.assert_close(scores[row : row + 1, :, : single.shape[2]], single, atol=1e-4, rtol=1e-4)


# -- drafts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_draft_by_the_full_cache_is_what_comes_next(family, verify, tiny, do):
    model = tiny(family)
    cache, ids, _ = read(model, do, 20)
    answer = do.greedy(model, CompressedCache(model), ids, new=6)
    truth = CompressedCache(model, needs={"queries": 6})
    do.feed(model, truth, torch.cat([ids, answer], 1))
    for probe, layer in zip(run_probe(cache, Draft(6, Full(), verify)), truth.policy_layers(), strict=True):
        torch.testing.assert_close(probe.queries, layer.queries, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(probe.keys, layer.kv.keys.dense()[:, :, -6:], atol=1e-4, rtol=1e-4)
        assert probe.position.tolist() == [list(range(20, 26))] and bool(probe.valid.all())


def test_a_verified_draft_is_read_over_the_full_cache(tiny, do):
    model = tiny()
    cache, ids, _ = read(model, do, 40)
    drafting = cache.fork(SnapKV(6, 2))
    drafted = [cache.next_token]
    for _ in range(4):
        drafted.append(do.feed(model, drafting, drafted[-1][:, None])[:, -1].argmax(-1))
    by = SnapKV(6, 2)
    verified, unverified = run_probe(cache, Draft(5, by, verify=True)), run_probe(cache, Draft(5, by))
    assert_probes(verified, known_probe(cache, torch.stack(drafted, 1)), atol=0, rtol=0)
    assert not torch.allclose(verified[1].queries, unverified[1].queries, atol=0.1)


def test_a_row_ends_its_draft_with_its_own_end_of_sequence(tiny, do):
    model = tiny()
    cache, ids, mask = read(model, do, 20, 14)
    drafted = do.greedy(model, CompressedCache(model), ids, mask, new=6)
    stop = next(t for t in drafted[0, 1:].tolist() if t not in (drafted[0, 0], *drafted[1]))
    model.generation_config.eos_token_id = [stop]
    at = drafted[0].tolist().index(stop)
    valid = run_probe(cache, Draft(6, Full()))[0].valid
    assert valid.tolist() == [[i <= at for i in range(6)], [True] * 6]
    model.generation_config.eos_token_id = [stop, int(drafted[1, 0])]
    valid = run_probe(cache, Draft(6, Full()))[0].valid
    assert valid.tolist() == [[i <= at for i in range(at + 1)], [True] + [False] * at]  # nobody goes on after that
    model.generation_config.eos_token_id = None
    tokenizer = SimpleNamespace(eos_token_id=stop)
    assert run_probe(cache, Draft(6, Full()), tokenizer)[0].valid[0].sum() == at + 1


@pytest.mark.parametrize(
    ("ids", "followed"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], [9, 8, 1, 2]),
        ([1, 2, 3, 9, 5, 3, 7, 1, 2, 3], [9, 5, 3, 7]),  # three tokens before the later single one
        ([1, 2, 9, 1, 2, 8, 4, 1, 2], [8, 4, 1, 2]),  # the latest
        ([4, 4, 4, 4], [4]),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_lookup_follows_the_longest_and_latest_occurrence(ids, followed):
    assert _lookup(torch.tensor(ids), 4).tolist() == followed


def test_ngram_drafts_the_next_token_and_what_followed_it(tiny, do):
    model = tiny()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 5, 6], [11, 12, 13, 14, 15, 16, 17, 18]])
    cache = CompressedCache(model, needs=NEEDS)
    do.feed(model, cache, ids, torch.ones_like(ids))
    cache.next_token = torch.tensor([7, 20])
    probes = run_probe(cache, Draft(4, "ngram", verify=True))
    assert probes[0].valid.tolist() == [[True] * 4, [True] + [False] * 3]
    drafted = torch.tensor([[7, 8, 9, 10], [20, 0, 0, 0]])
    assert_probes(probes, known_probe(cache, drafted, probes[0].valid), atol=0, rtol=0)


def test_a_smaller_model_drafts_and_the_model_reads(tiny, do, tmp_path):
    model, small = tiny(), tiny(seed=5, num_hidden_layers=1)
    small.save_pretrained(tmp_path)
    cache, ids, _ = read(model, do, 20)
    first = cache.next_token[:, None]
    rest = do.greedy(small, DynamicCache(), torch.cat([ids, first], 1), new=4)
    expected = known_probe(cache, torch.cat([first, rest], 1))
    assert_probes(run_probe(cache, Draft(5, str(tmp_path))), expected)
    tiny(vocab_size=70).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has a vocabulary of 70 tokens, but the model it drafts for has 61"):
        run_probe(cache, Draft(5, str(tmp_path / "other")))


# -- learned tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_soft_tokens_that_are_real_ones_and_no_adapters_read_as_tokens(family, tiny, do):
    model = tiny(family)
    cache, _, _ = read(model, do, 20, 13)
    ids = torch.tensor([4, 9, 30])
    soft = modules_for(model, 0.0)
    soft = Modules(model.get_input_embeddings()(ids).clone(), soft.adapters, soft.rank, soft.alpha)
    assert_probes(soft_probe(cache, soft), known_probe(cache, ids.expand(2, -1)), atol=1e-5, rtol=1e-5)


def test_adapters_are_those_of_a_model_with_merged_weights(tiny, do):
    model = tiny()
    cache, _, _ = read(model, do, 20)
    soft, merged = modules_for(model, 0.1), copy.deepcopy(model)
    for name, (down, up) in soft.adapters.items():
        merged.get_submodule(name).weight.data += soft.alpha / soft.rank * up @ down
    past = DynamicCache()
    for layer in cache.policy_layers():
        past.update(*layer.kv.decode(), layer.index)
    merged.set_attn_implementation("eager")
    merged(inputs_embeds=soft.tokens[None], past_key_values=past, position_ids=torch.arange(20, 23)[None])
    plain = Modules(soft.tokens, {}, soft.rank, soft.alpha)
    probes, without = soft_probe(cache, soft), soft_probe(cache, plain)
    for i, probe in enumerate(probes):
        torch.testing.assert_close(probe.keys, past.layers[i].keys[:, :, 20:], atol=1e-4, rtol=1e-4)
        assert not torch.allclose(probe.queries, without[i].queries, atol=1e-2)


def test_gradients_reach_tokens_and_adapters_through_all_layers(tiny, do):
    model = tiny(dtype=torch.float64).requires_grad_(False)
    cache, _, _ = read(model, do, 12, 9)
    soft = modules_for(model, 0.1)
    leaves = [x.double() for x in (soft.tokens, *(m for pair in soft.adapters.values() for m in pair))]
    ways = [torch.randn_like(x) for x in leaves]
    weigh = torch.randn(2, 6, 3, 32, dtype=torch.float64)

    def value(parts):
        pairs = dict(zip(soft.adapters, zip(parts[1::2], parts[2::2], strict=True), strict=True))
        probe = soft_probe(cache, Modules(parts[0], pairs, soft.rank, soft.alpha))[1]
        return (torch.cat([probe.queries, probe.keys], 1) * weigh).sum()

    with torch.enable_grad():
        live = [x.requires_grad_() for x in leaves]
        value(live).backward()
    along = sum((x.grad * way).sum() for x, way in zip(live, ways, strict=True))
    ahead, behind = (value([x.detach() + e * way for x, way in zip(live, ways, strict=True)]) for e in (1e-4, -1e-4))
    assert math.isclose(along, (ahead - behind) / 2e-4, rel_tol=1e-3)  # norms compute in float32
    assert all(bool(x.grad.any()) for x in live)


def test_modules_come_back_as_they_were_saved(tiny, tmp_path):
    model = tiny(dtype=torch.bfloat16)
    soft = modules_for(model, 0.1)
    save_modules(tmp_path, soft, model, {"steps": 3})
    found = load_modules(str(tmp_path), model)
    assert torch.equal(found.tokens, soft.tokens.bfloat16()) and (found.rank, found.alpha) == (2, 3.0)
    assert list(found.adapters) == list(soft.adapters)
    for name, pair in soft.adapters.items():
        assert all(torch.equal(a, b.bfloat16()) for a, b in zip(found.adapters[name], pair, strict=True))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["modules.json", "modules.safetensors"]
    again = modules_for(model, 0.2)
    save_modules(tmp_path, again, model, {})
    assert torch.equal(load_modules(str(tmp_path), model).tokens, again.tokens.bfloat16())


def test_modules_that_do_not_fit_are_refused(tiny, tmp_path):
    model = tiny()
    save_modules(tmp_path, modules_for(model, 0.1), model, {})
    with pytest.raises(ValueError, match="trained for a model with hidden_size 64, layers 2, heads 4, kv_heads 2, but"):
        load_modules(str(tmp_path), tiny(num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"adapt model.layers.0.mlp.gate_proj \[64, 64\], which this model does not"):
        load_modules(str(tmp_path), tiny(intermediate_size=96))
    with pytest.raises(ValueError, match="no lookahead modules at 'nowhere': give a folder that"):
        load_modules("nowhere", model)
    about = json.loads((tmp_path / "modules.json").read_text())
    for wrong, message in (
        ({"rank": "2"}, "missing or of the wrong type: rank"),
        ({"alpha": True}, "missing or of the wrong type: alpha"),
        ({"format": 2}, "format must be 1"),
        ({"sha256": "0"}, "is not the file that modules.json describes"),
        ({"tokens": 4}, "missing, unknown or of the wrong shape: tokens"),
        ({"linears": about["linears"][1:]}, "missing, unknown or of the wrong shape: model.layers.0.self_attn.q_proj"),
    ):
        (tmp_path / "modules.json").write_text(json.dumps({**about, **wrong}))
        with pytest.raises(ValueError, match=message):
            load_modules(str(tmp_path), model)


# -- a second reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [10, 25, 4])
def test_repeat_is_the_largest_weight_of_the_definition(chunk, softcap, tiny, do, run):
    model = tiny("gemma2", attn_logit_softcapping=softcap, layer_types=["full_attention"] * 2) if softcap else tiny()
    cache, ids, _ = read(model, do, 25)
    scores = run(cache, Repeat(chunk, "again"))
    for start in range(0, 25, chunk):
        stop = min(start + chunk, 25)
        block = torch.cat([torch.tensor([7, 8, 9]), ids[0, max(0, start - CUE) : start], ids[0, start:stop]])
        truth = CompressedCache(model, needs={"queries": len(block)})
        do.feed(model, truth, ids)
        do.feed(model, truth, block[None])
        for layer, score in zip(truth.policy_layers(), scores, strict=True):
            keys, queries = layer.kv.keys.dense()[0].double(), layer.queries[0, :, -len(block) :].double()
            slots = [s for s in range(25) if s < SINKS or start <= s < stop]
            best = torch.zeros(2, 25, dtype=torch.float64)
            for g in range(4):
                for i in range(len(block)):
                    sees = [*slots, *range(25, 25 + i + 1)]
                    logits = keys[g // 2, sees] @ queries[g, i] * layer.geometry["scaling"]
                    weights = (softcap * (logits / softcap).tanh() if softcap else logits).softmax(0)
                    best[g // 2, slots] = torch.maximum(best[g // 2, slots], weights[: len(slots)])
            torch.testing.assert_close(score[0, :, start:stop], best[:, start:stop].float(), atol=1e-4, rtol=1e-3)
    assert all(bool(((s >= 0) & (s <= 1)).all()) for s in scores)


def test_repeat_without_tokenizer_or_instruction_reads_the_bare_chunk(tiny, do):
    cache, _, _ = read(tiny(), do, 20)
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [7])
    bare = run_repeat(cache, Repeat(10, "again"))
    assert all(map(torch.equal, bare, run_repeat(cache, Repeat(10, ""), tokenizer)))
    assert not any(map(torch.equal, bare, run_repeat(cache, Repeat(10, "again"), tokenizer)))


def test_blocks_of_queries_change_nothing(tiny, do, monkeypatch):
    cache, _, _ = read(tiny(), do, 20, 13)
    whole = run_repeat(cache, Repeat(8, ""))
    monkeypatch.setattr("kvbench.probes.BLOCK_ELEMENTS", 500)
    for a, b in zip(whole, run_repeat(cache, Repeat(8, "")), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# -- the policies in a model -----------------------------------------------------------------------------------------


@pytest.fixture(params=["laq", "laq_pp", "speckv", "ngram", "lookaheadkv", "kvzip"])
def build(request, tiny, tmp_path):
    """build(budget): a policy that needs a probe."""
    save_modules(tmp_path, modules_for(tiny(), 0.1), tiny(), {})
    return {
        "laq": lambda budget: LAQ(budget, 4, kernel=3),
        "laq_pp": lambda budget: LAQ(budget, 4, 5, kernel=3),
        "speckv": lambda budget: SpecKV(budget, 4, window=5, kernel=3),
        "ngram": lambda budget: SpecKV(budget, 4, "ngram", 5, 3),
        "lookaheadkv": lambda budget: LookaheadKV(budget, modules=str(tmp_path)),
        "kvzip": lambda budget: KVzip(budget, chunk=10),
    }[request.param]


def test_a_batch_is_its_rows_alone_and_a_fork_a_direct_run(build, tiny, do):
    model, policy = tiny(), build(12)
    ids, mask = do.left_padded(31, 44, 9)
    cache, record = CompressedCache(model, policy), read(model, do, 31, 44, 9)[0]
    tokens = do.greedy(model, cache, ids, mask, new=8)
    first = CompressedCache(model, policy)
    do.feed(model, first, ids, mask)
    assert do.kept(first) == do.kept(record.fork(policy)) and do.kept(first) != do.kept(record)
    for row in range(3):
        alone = CompressedCache(model, policy)
        assert torch.equal(do.greedy(model, alone, ids[row : row + 1, mask[row] == 1], new=8), tokens[row : row + 1])


def test_a_budget_for_everything_changes_nothing(build, tiny, do):
    model = tiny()
    ids, mask = do.left_padded(31, 20)
    full, cache = CompressedCache(model), CompressedCache(model, build(40))
    assert torch.equal(do.feed(model, full, ids, mask), do.feed(model, cache, ids, mask))
    for token in torch.randint(2, 60, (6,)):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        fed = token.expand(2, 1)
        assert torch.equal(do.feed(model, full, fed, mask), do.feed(model, cache, fed, mask))
    assert all("position" not in layer.kv.columns for layer in cache.policy_layers())


@pytest.mark.parametrize("register", ["register_forward_pre_hook", "register_forward_hook"])
def test_a_cache_may_die_while_another_is_fed(register, tiny, do):
    """PyTorch then calls the hooks of the dead one without keyword arguments."""
    model, policy = tiny(), LAQ(12, draft_window=4)
    caches = []

    def kill(*args):
        del caches[1:]
        gc.collect()

    handle = getattr(model, register)(kill)  # comes before those of the caches
    caches += [CompressedCache(model, policy) for _ in range(3)]
    do.feed(model, caches[0], do.left_padded(20)[0])
    handle.remove()
    assert len(caches) == 1 and caches[0].kept(0).shape[2] == 12
