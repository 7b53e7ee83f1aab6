"""What cannot work says so in one line, before it gives a wrong answer."""

from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kvbench import CompressedCache
from kvbench.policies import FP8, H2O, KIVI, LAQ, NVFP4, Full, H2OMask, KeyDiff, Quest, SnapKV, StreamingLLM


@pytest.mark.parametrize("hooked", [False, True])
def test_cache_of_another_model(hooked, tiny, do) -> None:
    model, other, ids = tiny(), tiny(seed=1), do.left_padded(12)[0]
    cache = CompressedCache(model, H2O(8))
    if hooked:
        CompressedCache(other)
    with pytest.raises(ValueError, match=r"this cache was made for another model.*make a CompressedCache\(model"):
        do.greedy(other, cache, ids)


def test_cache_of_another_model_with_the_same_config(tiny, do) -> None:
    model = tiny()
    other = type(model)(model.config).eval()
    cache = CompressedCache(model, H2O(8))
    with pytest.raises(ValueError, match="this cache was made for another model"):
        do.greedy(other, cache, do.left_padded(12)[0])


def test_hook_taken_away(tiny, do) -> None:
    model, ids = tiny(), do.left_padded(12)[0]
    cache = CompressedCache(model, H2O(8))
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="the attention implementation of the model was changed from 'kvbench'"):
        do.greedy(model, cache, ids)


def test_another_batch_size(tiny, do) -> None:
    model = tiny()
    cache = CompressedCache(model, H2O(8))
    do.feed(model, cache, do.left_padded(12, 12)[0])
    with pytest.raises(ValueError, match=r"holds a batch of 2, got 3; use a new CompressedCache or call reset\(\)"):
        do.feed(model, cache, do.left_padded(2, 2, 2)[0])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss"])
def test_right_padding(family, tiny, do) -> None:
    model = tiny(family)
    ids, mask = do.left_padded(12, 7)
    with pytest.raises(ValueError, match="batches must be left-padded"):
        do.feed(model, CompressedCache(model, H2O(8)), ids, mask.flip(1))
    with pytest.raises(ValueError, match="batches must be left-padded"):
        do.greedy(model, CompressedCache(model), ids, mask.flip(1))


def causal(ids, mask) -> torch.Tensor:
    """[B, 1, T, T] bool, as the 2D mask would be."""
    tokens = ids.shape[1]
    return (torch.ones(tokens, tokens, dtype=torch.bool).tril() & mask.bool()[:, None])[:, None]


@pytest.mark.parametrize("number", [torch.bool, torch.float32], ids=["bool", "additive"])
def test_a_4d_mask_is_causal_or_refused(number, tiny, do) -> None:
    model = tiny()
    ids, mask = do.left_padded(20, 13)
    whole = causal(ids, mask)

    def feed(visible, cache=None, tokens=ids):
        if number != torch.bool:
            visible = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        cache = CompressedCache(model) if cache is None else cache
        position = (mask.cumsum(1) - 1).clamp(min=0) if tokens is ids else mask.sum(1, keepdim=True) + torch.arange(3)
        return model(tokens, attention_mask=visible, position_ids=position, past_key_values=cache).logits

    cache = CompressedCache(model)
    torch.testing.assert_close(feed(whole, cache)[:, -1], do.feed(model, CompressedCache(model), ids, mask)[:, -1])
    packed, prefix = whole.clone(), whole.clone()
    packed[:, :, 15:, :15] = False  # two documents in a row
    prefix[:, :, 13:17, 13:17] = True  # a part that sees all of itself, as an image does
    for other in (packed, prefix):
        with pytest.raises(ValueError, match="attends causally, but this attention mask .* says otherwise"):
            feed(other)

    more = torch.cat([mask.bool()[:, None, None].expand(-1, 1, 3, -1), causal(ids[:, :3], mask[:, -3:])], -1)
    tree = more.clone()
    tree[:, :, 2, 21] = False  # the third token does not see the second
    with pytest.raises(ValueError, match="attends causally"):
        feed(tree, cache.copy(), ids[:, :3])
    less = more.clone()
    less[:, :, :, 15] = False  # a held token is not seen
    with pytest.raises(ValueError, match="attends causally"):
        feed(less, cache.copy(), ids[:, :3])
    never = CompressedCache(model)
    do.feed(model, never, ids, mask)
    wanted = do.feed(model, never, ids[:, :3], torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1))
    torch.testing.assert_close(feed(more, cache, ids[:, :3]), wanted)


def test_empty_prompt(tiny) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="empty prompt"):
        model(torch.zeros(1, 0, dtype=torch.long), past_key_values=CompressedCache(model))


@pytest.mark.parametrize("policy", [H2O, "H2O(0.5)", 0.5, [Full()]], ids=str)
def test_not_a_policy(policy, tiny) -> None:
    with pytest.raises(TypeError, match=r"policy must be a kvbench policy such as H2O\(budget=0.25\)"):
        CompressedCache(tiny(), policy)


SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
       "first_k_dense_replace": 2, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    "model_type, options, why",
    [
        ("deepseek_v3", {**SMALL, **MLA}, "DeepseekV3ForCausalLM uses multi-head latent attention"),
        (
            "mamba",
            {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
            "MambaForCausalLM does not",
        ),
        ("t5", {"vocab_size": 61, "d_model": 32, "num_layers": 1, "d_kv": 8, "d_ff": 32}, "is an encoder-decoder"),
        (
            "mistral",
            {**SMALL, "num_key_value_heads": 2, "sliding_window": 8},
            "every layer is sliding-window attention",
        ),
    ],
)
def test_models_without_keys_and_values_to_compress(model_type, options, why) -> None:
    auto = AutoModelForSeq2SeqLM if model_type == "t5" else AutoModelForCausalLM
    model = auto.from_config(AutoConfig.for_model(model_type, **options))
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=why):
        CompressedCache(model, H2O(8))
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("policy, why", [(KIVI(), "32"), (H2O(8) | NVFP4(), "16"), (KIVI(2, 3, 0), "3")], ids=str)
def test_head_dim_a_quantizer_cannot_divide(policy, why, tiny) -> None:
    with pytest.raises(ValueError, match=f"head_dim=20 is not a multiple of {why}"):
        CompressedCache(tiny(head_dim=20), policy)
    CompressedCache(tiny(head_dim=20), FP8())


def test_asking_too_early(tiny) -> None:
    cache = CompressedCache(tiny())
    with pytest.raises(ValueError, match="the cache is empty: run a forward or generate first"):
        cache.kept(0)
    with pytest.raises(ValueError, match="the cache is empty: run a forward or generate first"):
        cache.fork(H2O(8))
    for measure in (cache.row_nbytes, cache.row_read_nbytes):
        with pytest.raises(ValueError, match="the cache is empty: run a forward or generate first"):
            measure()
    assert cache.full_nbytes == 0 and "total" in cache.report()


def test_unknown_signals(tiny) -> None:
    @dataclass(frozen=True)
    class Typo(KeyDiff):
        @property
        def needs(self):
            return {"querys": 8}

    with pytest.raises(
        ValueError, match=r"Typo\(budget=8\) needs 'querys', which no host knows; there are: attention, "
    ):
        CompressedCache(tiny(), Typo(8))
    with pytest.raises(ValueError, match="there is no signal 'querys' to collect; there are: attention, queries, "):
        CompressedCache(tiny(), needs={"querys": 8})


def test_two_selectors(tiny) -> None:
    with pytest.raises(ValueError, match="stack at most one policy that selects what is read"):
        CompressedCache(tiny(), Quest(24, page=8) | H2OMask(12))


def test_policies_that_read_what_the_model_says(tiny, do) -> None:
    model, policy = tiny(), LAQ(12, draft_window=4)
    ids, _ = do.left_padded(20)
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        CompressedCache(model.model, policy)
    with pytest.raises(ValueError, match="leave return_dict=False out"):
        model(ids, return_dict=False, past_key_values=CompressedCache(model, policy))
    named, placed = CompressedCache(model, policy), CompressedCache(model, policy)
    model(ids, past_key_values=named)
    model(ids, None, None, placed)
    assert do.kept(placed) == do.kept(named) and named.kept(0).shape[2] == 12


def test_fork_without_signals(tiny, do) -> None:
    model = tiny()
    cache = CompressedCache(model, needs={"queries": 8})
    do.feed(model, cache, do.left_padded(20)[0])
    for policy, missing in ((H2O(8), "attention"), (SnapKV(20, window=16), "queries")):
        with pytest.raises(ValueError, match=rf"cannot fork to .*did not collect \['{missing}'\]; pass needs="):
            cache.fork(policy)
    cache.fork(SnapKV(10, window=8))


def test_rope_that_cannot_be_turned(tiny) -> None:
    model = tiny("gpt_neox", hidden_size=64, intermediate_size=64)
    CompressedCache(model, StreamingLLM(8, positions="original"))
    del model.gpt_neox.rotary_emb
    with pytest.raises(ValueError, match=r'has no RoPE that kvbench can turn; use positions="original"'):
        CompressedCache(model, StreamingLLM(8))
    phi = tiny("phi", hidden_size=64, intermediate_size=64, partial_rotary_factor=0.5)
    with pytest.raises(ValueError, match=r'PhiForCausalLM cannot be turned after the fact; use positions="original"'):
        CompressedCache(phi, StreamingLLM(8))
