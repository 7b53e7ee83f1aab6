"""Tiny random models of every family, padded batches, and the policies that all cache tests run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kvbench import CompressedCache
from kvbench.policies import FP8, H2O, KIVI, NVFP4, Evictor, Full, KeyDiff, KVSharer, Random, SnapKV, StreamingLLM

VOCAB = 61

# A large initializer_range makes attention sharp: a wrong slot or position changes the answer.
BASE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096, "initializer_range": 0.4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-mixed": ("qwen2", {"use_sliding_window": True, **MIXED}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "ministral-mixed": ("ministral", MIXED),
    "gemma2": ("gemma2", {**MIXED, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**MIXED, "query_pre_attn_scalar": 32}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "olmo2": ("olmo2", {}),
    "gemma3n": (
        "gemma3n_text",
        {
            **MIXED,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "intermediate_size": [64, 64],
            "activation_sparsity_pattern": [0.0, 0.0],
            "altup_num_inputs": 2,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            **MIXED,
            "global_head_dim": 64,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
        },
    ),
    "gpt-oss": ("gpt_oss", {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1}),
}


@dataclass(frozen=True)
class Ragged(Evictor):
    """A toy with other budgets per head: head h keeps h tokens more. Keeps the newest, and every third before them."""

    def slots(self, kv, step):
        return super().slots(kv, step) + torch.arange(kv.keys.shape[1], device=step.prompt.device)

    def score(self, kv, step):
        return kv.position.float() + 1000 * (kv.position % 3 == 0)


small_kivi = KIVI(bits=2, group_size=8, residual=8)
POLICIES = [
    Full(),
    Random(0.5),
    StreamingLLM(11),
    StreamingLLM(0.4, sinks=2, positions="original"),
    H2O(0.4),
    H2O(12, recent=3),
    KeyDiff(0.5, recent=2),
    SnapKV(0.5, window=8, kernel=3),
    SnapKV(14, window=6, kernel=5, pooling="avg"),
    Ragged(9),
    small_kivi,
    KIVI(bits=4, group_size=16, residual=0),
    NVFP4(),
    FP8(),
    H2O(0.6) | small_kivi,
    StreamingLLM(13) | NVFP4(),
    SnapKV(0.7, window=8, kernel=3) | FP8(),
    Ragged(20) | small_kivi,
    Random(0.8) | H2O(12),
    small_kivi | H2O(12),
    NVFP4() | KeyDiff(0.5),
    H2O(0.6) | small_kivi | KVSharer(pairs=((1, 0),)),
]


@pytest.fixture(params=POLICIES, ids=str)
def policy(request: pytest.FixtureRequest):
    return request.param


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def _model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    model_type, special = FAMILIES.get(family, (family, {}))
    config = AutoConfig.for_model(model_type, **{**BASE, **special, **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and sinks, which start at a constant
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval().to(dtype)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    """tiny(family, seed=, dtype=, **config options): the same random weights for the same arguments."""
    return _model


def left_padded(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens [B, longest] and their mask; pads are random tokens, too: nothing may read them."""
    ids = torch.randint(2, VOCAB, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return ids, mask


def greedy(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor | None = None, new: int = 10) -> Tensor:
    """The new tokens [B, new]."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new, do_sample=False)
    return out[:, ids.shape[1] :]


def feed(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """One forward of new tokens `ids` [B, T] -> logits [B, T, V]. `mask` [B, seen + T] covers everything so far."""
    if mask is None:
        return model(ids, past_key_values=cache).logits
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits


def kept(cache: CompressedCache) -> list[list[list[list[int]]]]:
    """Kept positions by layer, row, head, without the -1 at the end."""
    layers = [layer.index for layer in cache.policy_layers()]
    return [[[[p for p in head if p >= 0] for head in row] for row in cache.kept(i).tolist()] for i in layers]


def assert_true_positions(cache: CompressedCache, model: PreTrainedModel, tokens: list[Tensor]) -> None:
    """The keys of layer 0, which depend on token and position alone, are those of the positions `kept` names.

    tokens: per row, the real tokens seen.
    """
    assert cache.layers[0].seen.tolist() == [len(row) for row in tokens]
    held, positions = cache.layers[0].kv.keys.dense(), cache.kept(0)
    for row, ids in enumerate(tokens):
        full = CompressedCache(model)
        feed(model, full, ids[None])
        for head, position in enumerate(positions[row]):
            position = position[position >= 0]
            assert bool((position.diff() > 0).all())
            torch.testing.assert_close(
                held[row, head, : len(position)],
                full.layers[0].kv.keys.dense()[0, head, position],
                atol=1e-4,
                rtol=1e-4,
            )


@pytest.fixture
def do() -> SimpleNamespace:
    """The helpers above."""

    def can_crop(cache: CompressedCache) -> bool:
        return "attention" not in cache.needs and not any(isinstance(p, Evictor) for p in cache.policy.policies)

    return SimpleNamespace(
        left_padded=left_padded, greedy=greedy, feed=feed, kept=kept, assert_true_positions=assert_true_positions,
        can_crop=can_crop,
    )  # fmt: skip
