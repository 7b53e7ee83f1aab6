"""Policies without a benchmark, and two of them without a cache of ours: see policies/README.md.

python scripts/anywhere.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvbench
from kvbench import CompressedCache
from kvbench.kernels.attention import column_sums
from kvbench.policies import H2O, KIVI, KV, KeyDiff, Policy, SnapKV, Step


def score_plain_tensors(keys: Tensor, values: Tensor, queries: Tensor) -> dict[str, KV]:
    """keys, values [B, H, S, D] and the last queries [B, Hq, w, D] of a layer -> what three policies make of it."""
    batch, _, slots, head_dim = keys.shape
    kv = KV.of(keys, values)
    seen = torch.full((batch,), slots)
    step = Step(layer=0, prompt=seen, seen=seen, queries=queries, scaling=head_dim**-0.5)
    policies: list[Policy] = [SnapKV(budget=64, window=16), KeyDiff(budget=0.25), KeyDiff(0.25) | KIVI(2, residual=32)]
    return {str(policy): policy(kv, step) for policy in policies}


def attend_and_compress(
    kv: KV, new: tuple[Tensor, Tensor, Tensor], policy: Policy, layer: int, seen: Tensor, prompt: Tensor
) -> tuple[Tensor, KV]:
    """One layer, one forward. new: queries [B, Hq, T, D], keys and values [B, H, T, D]; seen [B]: tokens before."""
    queries, keys, values = new
    batch, heads, tokens, head_dim = queries.shape
    position, scaling = seen[:, None] + torch.arange(tokens), head_dim**-0.5

    kv = kv.append(keys, values, seen=seen)
    held_keys, held_values = kv.decode()
    slot = kv.position[:, :, None]  # [B, H or 1, 1, S], -1 where a shorter list has ended
    visible = (slot >= 0) & (slot <= position[:, None, :, None])
    mask = visible.repeat_interleave(heads // visible.shape[1], dim=1)
    out = F.scaled_dot_product_attention(queries, held_keys, held_values, attn_mask=mask, enable_gqa=True)

    if "attention" in policy.needs:
        received = column_sums(queries, held_keys, position, kv.position, scaling=scaling)
        kv = kv.with_columns(attention=kv.column("attention") + received)
    came, width = torch.full_like(seen, tokens), policy.needs.get("queries", 1)
    step = Step(
        layer=layer, prompt=prompt, seen=seen + came, new=came, decoding=tokens == 1, scaling=scaling,
        queries=queries[:, :, -width:],
    )  # fmt: skip
    return out, policy(kv, step)


def own_loop(
    layers: Sequence[Sequence[Tensor]], x: Tensor, prompt: int, policy: Policy, heads: int = 4, kv_heads: int = 2
) -> tuple[Tensor, list[KV]]:
    """A model of your own: layers of (Wq, Wk, Wv, Wo), embeddings x [B, N, hidden]; the prompt, then token by token."""
    batch, length, _ = x.shape
    none = x.new_empty(batch, kv_heads, 0, layers[0][0].shape[1] // heads)
    cache = [KV.of(none, none).with_columns(attention=none[..., 0].float()) for _ in layers]
    outputs, lengths = [], torch.full((batch,), prompt)
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, length))]:
        h = x[:, start:stop]
        for i, (wq, wk, wv, wo) in enumerate(layers):
            q = (h @ wq).unflatten(2, (heads, -1)).transpose(1, 2)
            k, v = ((h @ w).unflatten(2, (kv_heads, -1)).transpose(1, 2) for w in (wk, wv))
            out, cache[i] = attend_and_compress(cache[i], (q, k, v), policy, i, torch.full((batch,), start), lengths)
            h = h + out.transpose(1, 2).flatten(2) @ wo
        outputs.append(h)
    return torch.cat(outputs, dim=1), cache


def generate(prompt: str, policy: Policy | None, new_tokens: int = 40) -> tuple[str, CompressedCache]:
    """A Hugging Face model; here the small one that comes with the clone. policy None: an uncompressed cache."""
    path = Path(kvbench.__file__).parent / "assets" / "proving"
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    cache = CompressedCache(model, policy)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        **inputs, past_key_values=cache, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens
    )
    return str(tokenizer.decode(out[0])), cache


def main() -> None:
    torch.manual_seed(0)
    keys, values, queries = torch.randn(1, 8, 512, 64), torch.randn(1, 8, 512, 64), torch.randn(1, 32, 16, 64)
    for name, kept in score_plain_tensors(keys, values, queries).items():
        print(f"{name}: {kept.counts.even} of 512 tokens in {kept.nbytes:,} of {KV.of(keys, values).nbytes:,} bytes;")
        print(f"    head 0 keeps {kept.position[0, 0, :6].tolist()} ...")

    layers = [[torch.randn(128, width) / 11 for width in (128, 64, 64, 128)] for _ in range(2)]
    policy = H2O(budget=0.4) | KIVI(bits=2, group_size=32, residual=32)
    _, cache = own_loop(layers, torch.randn(1, 200, 128), prompt=160, policy=policy)
    print(f"own loop: {cache[0].counts.even} of 200 tokens, {cache[0].nbytes:,} bytes per layer")

    _, compressed = generate("the amber otter", H2O(budget=24) | KIVI(bits=4, residual=0))
    print(compressed.report())


if __name__ == "__main__":
    main()
