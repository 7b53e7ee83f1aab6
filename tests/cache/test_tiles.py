"""Decoding reads packed slots tile by tile: never a whole layer at once, and with the same result."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from kvbench import CompressedCache
from kvbench import cache as host
from kvbench.policies import GEAR, H2O, KIVI, NVFP4, AdaKV, Kitty, Policy, SnapKV, StreamingLLM, ZipCache
from kvbench.policies.store import Held

STACKS = [
    KIVI(2, 8, 8),
    KIVI(4, 8, 16, sinks=3).keys & NVFP4(sinks=2).values,
    H2O(40) | KIVI(2, 8, 8),
    StreamingLLM(30) | NVFP4(),
    AdaKV(SnapKV(24, window=4)) | NVFP4(),
    Kitty(0.25, 8, 4, sinks=2),
    GEAR(2, 2, 0.1, 8, 16),
    ZipCache(interval=10),
]


@pytest.mark.parametrize("policy", STACKS, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
@pytest.mark.parametrize("shorter", [45, 70], ids=["ragged", "even"])
def test_tiles_give_what_a_decoded_layer_gives(
    policy: Policy, family: str, shorter: int, tiny: Callable, do: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family)
    ids, mask = do.left_padded(70, shorter)

    def logits(slots: int, few: int) -> torch.Tensor:
        monkeypatch.setattr(host, "tile_of", lambda kv: slots)
        monkeypatch.setattr(host, "_FEW", few)
        cache = CompressedCache(model, policy)
        steps = [(0, 60), *((i, i + 1) for i in range(60, 70))]
        return torch.stack([do.feed(model, cache, ids[:, a:b], mask[:, :b])[:, -1] for a, b in steps])

    whole = logits(1000, 0)
    with monkeypatch.context() as patch:
        patch.setattr(Held, "dense", _only_prompts(Held.dense))
        tiles = logits(7, 16)
    torch.testing.assert_close(tiles, whole, atol=1e-3, rtol=1e-3)


def _only_prompts(dense):
    def checked(held: Held) -> torch.Tensor:
        assert held.body is None or held.body.codec.__class__.__name__ == "Plain", "decoded a whole packed layer"
        return dense(held)

    return checked
