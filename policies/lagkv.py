"""LagKV: tokens that stand out against the range of the tokens after them (Liang et al., 2025).

Paper https://arxiv.org/abs/2504.04704, official code https://github.com/AI-Lab-China-Merchants-Bank/LagKV
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.policies.interface import KV, Evictor, Step

_EPS = 1e-8
"""Least range of a channel that counts as a range."""


@dataclass(frozen=True)
class LagKV(Evictor):
    """Cuts the tokens after the sinks into partitions of `lag` and keeps the best of each, equally many of all.

        z_s         = (x_s - min) / (max - min)       min, max [D]: per channel over the partition after that of s
        a_s         = softmax over the partition of s of std over channels of z_s
        score[b, h, s] = -rank of (a_s for x = keys) + (a_s for x = values) in its partition     float32 [B, H, S]

    Partitions go by original position, from each row's first real token. A channel without a range counts as 0. Always
    kept: the sinks, the last full partition (nothing is known yet of what comes after it) and the begun one.

    budget: slots per head, sinks and all else included (int tokens, or float share of the prompt); memory= instead: see
    `Evictor`. A budget too small for what is always kept keeps the sinks and the newest tokens, as StreamingLLM does:
    LagKV proper starts at sinks + 2 lag. sinks: first real tokens kept. lag: tokens per partition.
    Acts: at the end of every prompt forward, and after every `lag` decoded tokens, when a partition has filled: in
    between up to lag - 1 slots more than the budget are held.
    Raises ValueError when constructed with a bad option, or with a budget of at most `sinks` tokens.

    Official defaults: sinks 16, lag 1024, half of each partition (class); lag 64 or 128 (README's runs); ours are
    kvpress's 4 and 128.
    Deviations. `fixed_budget`: official code scores a partition once and keeps a fixed share, so that the cache grows
    with the text; here what is left of all partitions is ranked again and shrinks alike. `interval`: it acts the moment
    a partition is full; here all rows of a batch act together. `flat_channels`: it divides by zero there.
    """

    sinks: int = 4
    lag: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"LagKV: sinks must be an int of 0 or more tokens, got {self.sinks!r}")
        if isinstance(self.lag, bool) or not isinstance(self.lag, int) or self.lag < 1:
            raise ValueError(f"LagKV: lag must be an int of at least 1 token, got {self.lag!r}")
        super().__post_init__()

    @property
    def min_slots(self) -> int:
        return self.sinks + 1

    @property
    def interval(self) -> int:
        return self.lag

    def score(self, kv: KV, step: Step) -> Tensor:
        batch, heads = kv.counts.shape
        after = kv.position.long().expand(-1, heads, -1) - self.sinks  # [B, H, S]
        # Partition `none` takes what is in no partition; the one before it stays empty, as what follows the last.
        none = int(after.max().clamp(min=0)) // self.lag + 2
        partition = torch.where(after >= 0, after // self.lag, none)
        cell = torch.where(after >= 0, after, none * self.lag)  # its place in a table of all partitions
        total = torch.zeros((), device=after.device)
        for x in (kv.keys.dense().float(), kv.values.dense().float()):
            table = x.new_full((batch, heads, (none + 1) * self.lag), -torch.inf)
            table = table.scatter(2, cell, _spread(x, partition, none)).view(batch, heads, none + 1, self.lag)
            total = total + table.softmax(-1)
        total = total.masked_fill(table.isinf(), -1)
        # The rank that `select` would give: among equals the newest first.
        order = total.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        rank = order.argsort(-1).flip(-1)
        return -rank.flatten(2).gather(2, cell).float()

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        full = (step.seen - self.sinks) // self.lag
        last = (self.sinks + (full - 1) * self.lag)[:, None, None]
        fits = kv.from_newest <= (slots - self.sinks)[..., None]
        return (kv.position < self.sinks) | ((kv.position >= last) & fits)


def _spread(x: Tensor, partition: Tensor, none: int) -> Tensor:
    """Standard deviation over channels of x [B, H, S, D], scaled by the range of the partition after: [B, H, S]."""
    shape = (*x.shape[:2], none + 1, x.shape[3])
    own = partition[..., None].expand_as(x)
    following = (own + 1).clamp(max=none)
    low = x.new_full(shape, torch.inf).scatter_reduce(2, own, x, "amin").gather(2, following)
    high = x.new_full(shape, -torch.inf).scatter_reduce(2, own, x, "amax").gather(2, following)
    return torch.where(high - low > _EPS, (x - low) / (high - low), 0).std(-1)
