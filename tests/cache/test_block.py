"""Block prefill: each layer attends to and compresses its prompt block by block."""

from dataclasses import dataclass, field

import pytest
import torch

from kvbench import CompressedCache
from kvbench.policies import H2O, KIVI, KV, TOVA, Full, KeyDiff, Policy, SnapKV, Step
from kvbench.policies.laq import LAQ


@dataclass(frozen=True)
class Spy(Policy):
    """Notes how many slots are held when the policy is called."""

    widths: list[int] = field(default_factory=list, compare=False)

    def __call__(self, kv: KV, step: Step) -> KV:
        self.widths.append(kv.counts.width)
        return kv


EVICTORS = [KeyDiff(14, block=8), H2O(14, recent=4, block=8), TOVA(14, block=8), KeyDiff(0.4, block=8) | KIVI(4, 16, 0)]


@pytest.mark.parametrize("policy", EVICTORS, ids=str)
def test_a_padded_row_is_taken_in_the_blocks_it_has_alone(policy, tiny, do) -> None:
    model, (ids, mask) = tiny(), do.left_padded(41, 30)
    cache = CompressedCache(model, policy)
    together = do.greedy(model, cache, ids, mask)
    for row in range(2):
        alone = CompressedCache(model, policy)
        assert torch.equal(do.greedy(model, alone, ids[row : row + 1, mask[row] == 1]), together[row : row + 1])
        assert do.kept(alone)[1][0] == do.kept(cache)[1][row]


@pytest.mark.parametrize("evictor", [KeyDiff, TOVA])
def test_blocks_are_what_feeding_block_by_block_gives_and_bound_the_memory(evictor, tiny, do) -> None:
    model, ids = tiny(), do.left_padded(45)[0]
    spy = Spy()
    blocks, pieces = CompressedCache(model, spy | evictor(14, block=8)), CompressedCache(model, evictor(14))
    logits = do.feed(model, blocks, ids)
    fed = [do.feed(model, pieces, part) for part in ids.split(8, dim=1)]
    assert max(spy.widths) == 14 + 8
    assert do.kept(blocks) == do.kept(pieces)
    torch.testing.assert_close(logits, torch.cat(fed, 1), atol=1e-4, rtol=1e-4)


def test_a_block_for_everything_is_no_block(tiny, do) -> None:
    model, (ids, mask) = tiny(), do.left_padded(41, 30)
    assert torch.equal(
        do.greedy(model, CompressedCache(model, SnapKV(12, 4, block=41)), ids, mask),
        do.greedy(model, CompressedCache(model, SnapKV(12, 4)), ids, mask),
    )
    everything = CompressedCache(model, KeyDiff(41, block=8))
    torch.testing.assert_close(
        do.feed(model, everything, ids, mask)[mask == 1],
        do.feed(model, CompressedCache(model, Full()), ids, mask)[mask == 1],
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip


def test_what_needs_the_whole_prompt_cannot_have_blocks(tiny) -> None:
    with pytest.raises(ValueError, match="block= cannot be had with a policy that needs the whole prompt"):
        CompressedCache(tiny(), LAQ(12, block=8))
    with pytest.raises(ValueError, match="block must be an int of at least 1 token, got 0"):
        KeyDiff(12, block=0)
