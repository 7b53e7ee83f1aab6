"""InfLLM: initial tokens, a local window, and blocks looked up by representative keys (Xiao et al., NeurIPS 2024).

Paper https://arxiv.org/abs/2402.04617, official code https://github.com/thunlp/InfLLM
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbench.policies.interface import KV, Selection, Selector, Step
from kvbench.policies.quest import top


@dataclass(frozen=True)
class InfLLM(Selector):
    """Reads the first `sinks` slots, the `local` newest, and of the blocks between them the most relevant.

        mean[b, h, j]   = mean of the `representatives` keys of block j that have received the most attention
        relevance[b, j] = sum over query heads g of (mean over the forward's queries i of q[b, g, i]) . mean[b, g//G, j]
        read[b]         = sinks, the topk blocks of the largest relevance, local window, and the forward's own tokens

    float32; mean [B, H, blocks, D] in the model's dtype stands in `KV.side`: made when a block leaves the local window,
    from the attention accumulated by then (needs "attention"), it stays as it is. All heads of a layer read the same
    blocks, ties go to the newer; once an evictor has left heads with different tokens, each key-value head looks up its
    own. Blocks are counted from the sinks on; the local window starts where a block does, so that none is cut.

    budget: slots read per head and step (int tokens, or float share of the prompt), less the tokens of a forward but
    the first. memory: instead, a share of the bytes of the prompt's 16-bit full cache read per step, `mean` included.
    sinks, block_size: tokens. local: most tokens in the local window, or None: two thirds of the budget beyond the
    sinks, and what blocks leave over. The rest is for topk blocks, as many as it has room for. representatives: keys
    per block.
    Acts: at decode steps and at multi-token forwards after the first (later chunks of a prompt, later turns).
    Raises ValueError when constructed with a bad option, or with a budget that has no room for a block; KeyError if the
    host does not supply "attention".

    Official defaults: sinks 128, local 4096, 16 blocks of 128, 4 representatives (a budget of 6272 gives these).
    Deviations. `positions`: official code puts all that is retrieved at one distance, and looks it up by keys before
    RoPE; here keys have their original positions. `all_queries`: official code votes for representatives with the
    queries that had them in their local window, here with all so far. `gqa_sum`: official code has each query head
    vote for its own. `forward`: official code cuts prompts into chunks of 512, looks up blocks for each, and slides the
    window along; here a forward is one chunk, and the first reads everything. `whole_window`: official code reads what
    is between the last block and the window on top of it. Nothing is offloaded.
    """

    sinks: int = 128
    local: int | None = None
    block_size: int = 128
    representatives: int = 4

    def __post_init__(self) -> None:
        for name, value, least in (
            ("sinks", self.sinks, 0),
            ("block_size", self.block_size, 1),
            ("representatives", self.representatives, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"InfLLM: {name} must be an int of {least} or more, got {value!r}")
        if self.representatives > self.block_size:
            raise ValueError(
                f"InfLLM: representatives={self.representatives} must be at most block_size={self.block_size}"
            )
        local = self.local
        if local is not None and (isinstance(local, bool) or not isinstance(local, int) or local < self.block_size):
            raise ValueError(
                f"InfLLM: local must be None or at least block_size={self.block_size} tokens, got {local!r}"
            )
        super().__post_init__()

    @property
    def needs(self) -> Mapping[str, int]:
        return {"attention": 1}

    @property
    def min_slots(self) -> int:
        return self.sinks + (3 * self.block_size if self.local is None else self.local + self.block_size)

    def metadata_nbytes(self, kv: KV, step: Step) -> Tensor:
        means = step.prompt // self.block_size * (kv.keys.shape[-1] * kv.keys.dtype.itemsize)
        return means + 4  # and the number of blocks

    def __call__(self, kv: KV, step: Step) -> KV:
        held = kv.counts.per_head[:, : kv.position.shape[1]]
        blocks, _ = self._blocks(held, kv, step)
        if "infllm.blocks" in kv.side:  # a window that grew with the prompt gives none back
            blocks = torch.maximum(blocks, kv.side["infllm.blocks"])
        if not bool(blocks.any()):
            return kv
        side = {"infllm.mean": self._means(kv, blocks), "infllm.blocks": blocks.int()}
        return replace(kv, side={**kv.side, **side})

    def choose(self, kv: KV, queries: Tensor, position: Tensor, step: Step) -> Selection | None:
        real = position >= 0  # [B, T]
        before = kv.counts.per_head[:, : kv.position.shape[1]] - real.sum(1, keepdim=True)
        blocks, topk = self._blocks(before, kv, step)
        if bool((blocks <= topk).all()):
            return None
        heads, width = kv.keys.shape[1], kv.counts.width
        means = self._means(kv, blocks).float()  # [B, H, N, D]
        query = (queries.float() * real[:, None, :, None]).sum(2)  # which ranks as the mean does
        query = query.unflatten(1, (heads, -1)).sum(2)
        relevance = (means @ query[..., None]).squeeze(-1)  # [B, H, N]
        if blocks.shape[1] == 1:
            relevance = relevance.sum(1, keepdim=True)
        absent = torch.arange(means.shape[2], device=means.device) >= blocks[..., None]
        chosen = top(relevance.masked_fill(absent, -torch.inf), topk) & ~absent  # [B, 1 or H, N]

        slot = torch.arange(width, device=means.device)
        block = (slot - self.sinks) // self.block_size  # below 0 for sinks
        inside = chosen.gather(2, block.clamp(0, means.shape[2] - 1).expand(*blocks.shape, -1))
        return Selection((block < 0) | (block >= blocks[..., None]) | inside)

    def _blocks(self, before: Tensor, kv: KV, step: Step) -> tuple[Tensor, Tensor]:
        """Blocks before the local window of a query that comes after `before` [B, 1 or H] slots; blocks to read."""
        rest = self.slots(kv, step) - self.sinks
        topk = (rest // 3 if self.local is None else rest - self.local) // self.block_size
        local = rest - topk * self.block_size if self.local is None else torch.full_like(rest, self.local)
        out = before + 1 - local - self.sinks  # slots outside, rounded up to whole blocks: all of these are complete
        return (-(-out // self.block_size)).clamp(min=0), topk.clamp(min=0)

    def _means(self, kv: KV, blocks: Tensor) -> Tensor:
        """[B, H, N, D] of the first `blocks` [B, 1 or H] blocks: those known, and the others from what is held now.

        What stands after a list's last block has no meaning.
        """
        batch, heads, _, dim = kv.keys.shape
        total = int(blocks.max())
        means = kv.keys.tail.new_zeros(batch, heads, total, dim)
        known = torch.zeros_like(blocks)
        if "infllm.mean" in kv.side:
            known, old = kv.side["infllm.blocks"].long(), kv.side["infllm.mean"][:, :, :total]
            means[:, :, : old.shape[2]] = old
        first = int(known.min())
        if first >= total:
            return means
        part = slice(self.sinks + first * self.block_size, self.sinks + total * self.block_size)
        keys = kv.keys.dense()[:, :, part].float().unflatten(2, (-1, self.block_size))  # [B, H, n, block, D]
        attention = kv.column("attention")[:, :, part].expand(-1, heads, -1).unflatten(2, (-1, self.block_size))
        voted = top(attention, torch.full_like(attention[..., 0], self.representatives))
        fresh = (keys * voted[..., None]).sum(3) / self.representatives
        new = torch.arange(first, total, device=known.device) >= known[..., None]
        means[:, :, first:] = torch.where(new[..., None], fresh.to(means.dtype), means[:, :, first:])
        return means
