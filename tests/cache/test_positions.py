"""Keys turned to positions inside the cache, against an oracle that stores keys before RoPE."""

import pytest
import torch
import torch.nn.functional as F

from kvbench import CompressedCache
from kvbench.kernels.rotation import rotate
from kvbench.policies import NVFP4, StreamingLLM


class Oracle:
    """A Llama with StreamingLLM as published: keys are stored without RoPE and get it by their slot, at every step."""

    def __init__(self, model, budget: int, sinks: int):
        self.model, self.budget, self.sinks = model.model, budget, sinks
        self.head = model.lm_head
        self.held = [None] * len(self.model.layers)

    def feed(self, ids):
        x = self.model.embed_tokens(ids)
        for i, layer in enumerate(self.model.layers):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                p(h).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if self.held[i] is not None:
                k, v = torch.cat([self.held[i][0], k], 2), torch.cat([self.held[i][1], v], 2)
            slots, new = k.shape[2], q.shape[2]
            slot = torch.arange(slots).view(1, 1, -1)
            frequency = self.model.rotary_emb.inv_freq
            turned = rotate(k, slot, frequency).repeat_interleave(2, 1)
            q = rotate(q, slot[..., -new:], frequency)
            visible = torch.ones(new, slots, dtype=torch.bool).tril(slots - new)
            mixed = F.scaled_dot_product_attention(q, turned, v.repeat_interleave(2, 1), attn_mask=visible)
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if slots > self.budget:
                k, v = (torch.cat([t[:, :, : self.sinks], t[:, :, self.sinks - self.budget :]], 2) for t in (k, v))
            self.held[i] = (k, v)
        return self.head(self.model.norm(x))


@pytest.mark.parametrize("prompt", [40, 9])
def test_turning_stored_keys_is_storing_unturned_keys(prompt, tiny, do) -> None:
    model = tiny(initializer_range=0.1)  # sharper attention multiplies the rounding of the angles
    cache, oracle = CompressedCache(model, StreamingLLM(16, sinks=3)), Oracle(model, 16, 3)
    ids, _ = do.left_padded(100)
    cuts = [0, prompt, *range(prompt + 1, 90), 97, 100]  # a prompt, single tokens, then two more turns
    for start, end in zip(cuts, cuts[1:], strict=False):
        found, wanted = do.feed(model, cache, ids[:, start:end]), oracle.feed(ids[:, start:end])
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    original = CompressedCache(model, StreamingLLM(16, sinks=3, positions="original"))
    do.feed(model, original, ids[:, :99])
    assert (do.feed(model, original, ids[:, 99:]) - wanted[:, -1:]).abs().max() > 1e-3 * wanted.abs().max()


def test_text_may_outgrow_the_trained_context(tiny, do) -> None:
    """Far beyond any position the prompt had, the answer is what a short text of the kept tokens would give."""
    model = tiny(num_hidden_layers=1)
    ids, _ = do.left_padded(3000)
    cache, short = CompressedCache(model, StreamingLLM(20, sinks=4)), CompressedCache(model)
    do.feed(model, cache, ids[:, :2999])
    do.feed(model, short, torch.cat([ids[:, :4], ids[:, 2983:2999]], 1))
    token = ids[:, 2999:]
    torch.testing.assert_close(do.feed(model, cache, token), do.feed(model, short, token), rtol=1e-2, atol=1e-2)


def test_packed_keys_are_turned_too(tiny, do) -> None:
    model = tiny(num_hidden_layers=1)
    ids, _ = do.left_padded(40)
    cache, dense = CompressedCache(model, StreamingLLM(16) | NVFP4()), CompressedCache(model, StreamingLLM(16))
    for other in (cache, dense):
        do.feed(model, other, ids)
    held = dense.layers[0].kv
    held.keys.tail.copy_(cache.layers[0].kv.keys.dense())
    held.values.tail.copy_(cache.layers[0].kv.values.dense())
    token = torch.tensor([[5]])
    got, expected = do.feed(model, cache, token), do.feed(model, dense, token)  # one tile by tile, one at once
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_rotate() -> None:
    x, frequency = torch.randn(2, 3, 5, 16), torch.rand(6)
    assert torch.equal(rotate(x, torch.zeros(2, 1, 5), frequency), x)
    shift = torch.randint(-50, 50, (2, 3, 5))
    torch.testing.assert_close(rotate(rotate(x, shift, frequency), -shift, frequency), x)
    assert torch.equal(rotate(x, shift, frequency)[..., 12:], x[..., 12:])
