"""Every model family: our attention is the model's own, for our cache and for any other."""

import pytest
import torch
from transformers import DynamicCache

from kvbench import CompressedCache
from kvbench.policies import H2O, StreamingLLM

EAGER = {"gpt-oss", "gemma2"}  # learned sinks and softcap, which the fused kernel does not know


def generate(model, cache, ids, mask):
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=10, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def assert_same(found, wanted) -> None:
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-3, atol=1e-4 * float(wanted[1].abs().max()))


@pytest.mark.parametrize("lengths", [(17,), (13, 24, 1)], ids=["single", "padded"])
def test_full_is_dynamic_cache(family, tiny, do, lengths) -> None:
    ids, mask = do.left_padded(*lengths)
    plain, hooked = tiny(family), tiny(family)
    plain.set_attn_implementation("eager" if family in EAGER else "sdpa")
    wanted_cache = DynamicCache(config=plain.config)
    wanted = generate(plain, wanted_cache, ids, mask)

    cache = CompressedCache(hooked)
    assert hooked.config._attn_implementation == "kvbench"
    assert_same(generate(hooked, cache, ids, mask), wanted)
    assert_same(generate(hooked, DynamicCache(config=plain.config), ids, mask), wanted)
    out = hooked.generate(ids, attention_mask=mask, use_cache=False, max_new_tokens=10, do_sample=False)
    assert torch.equal(out[:, ids.shape[1] :], wanted[0])

    for ours, theirs in zip(cache.layers, wanted_cache.layers, strict=True):
        assert ours.is_sliding == theirs.is_sliding
        if theirs.is_sliding:
            assert type(ours) is type(theirs)
            torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-3, atol=1e-3)


def test_no_mask_and_plain_forward(family, tiny, do) -> None:
    ids, _ = do.left_padded(20, 20)
    plain, hooked = tiny(family), tiny(family)
    plain.set_attn_implementation("eager" if family in EAGER else "sdpa")
    wanted, theirs = [], DynamicCache(config=plain.config)
    found, ours = [], CompressedCache(hooked)
    for start, end in ((0, 9), (9, 10), (10, 17), (17, 20)):
        wanted.append(plain(ids[:, start:end], past_key_values=theirs).logits)
        found.append(hooked(ids[:, start:end], past_key_values=ours).logits)
    wanted, found = torch.cat(wanted, 1), torch.cat(found, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_policy_acts_on_full_layers_only(family, tiny, do) -> None:
    ids, mask = do.left_padded(18, 24)
    model = tiny(family)
    full, cache = CompressedCache(model), CompressedCache(model, H2O(6))
    do.greedy(model, full, ids, mask, new=1)
    do.greedy(model, cache, ids, mask, new=1)
    for i, layer in enumerate(cache.layers):
        if layer.is_sliding:
            assert torch.equal(layer.keys, full.layers[i].keys)
            with pytest.raises(ValueError, match="sliding-window layer"):
                cache.kept(i)
        else:
            assert cache.kept(i).shape == (2, 2, 6)


def test_streaming_turns_the_keys_of_every_family(family, tiny, do) -> None:
    ids, mask = do.left_padded(18, 24)
    model = tiny(family)
    cache = CompressedCache(model, StreamingLLM(8))
    tokens = do.greedy(model, cache, ids, mask)
    for row in (0, 1):
        alone = CompressedCache(model, StreamingLLM(8))
        assert torch.equal(do.greedy(model, alone, ids[row : row + 1, mask[row] == 1]), tokens[row : row + 1])


def test_streaming_with_room_is_full_to_the_bit(family, tiny, do) -> None:
    ids, mask = do.left_padded(18, 24)
    model = tiny(family)
    wanted = generate(model, CompressedCache(model), ids, mask)
    found = generate(model, CompressedCache(model, StreamingLLM(100)), ids, mask)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
