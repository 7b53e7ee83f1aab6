"""R-KV: what the newest queries attend to, less what other keys repeat (Cai et al., NeurIPS 2025).

Paper https://arxiv.org/abs/2505.24133, official code https://github.com/Zefan-Cai/R-KV
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbench.policies.interface import KV, Evictor, Step

_EPS = 1e-8
_SIMILAR = 0.5
"""Cosine above which two keys say the same."""
_BLOCK_ELEMENTS = 2**20
"""Most similarities held at a time."""
_LOWEST = torch.finfo(torch.float32).min  # -inf would make a softmax over nothing nan


@dataclass(frozen=True)
class RKV(Evictor):
    """Keeps the last `window` slots, and of those before the ones that matter and that no newer key repeats.

        z[b, h, i, s] = max over query heads g of kv head h of scaling * q_gi . k_s, softcapped if the layer is
        importance    = max pool over `kernel` slots of: mean over window queries i of softmax over s of z
        redundancy    = softmax over s of: mean over slots r of c[r, s]
        score         = mix_lambda * importance - (1 - mix_lambda) * redundancy             float32 [B, H, S]

    The softmax of importance runs over the slots before the window alone, without the window and any learned sink.
    c[r, s] is the cosine of keys r and s, zero for r = s and, in every row r, for the
    newest s with a cosine above 0.5: of a group of alike keys the newest is not held redundant. It is taken over all
    live slots, a block of rows at a time.

    budget: slots per head, window included (int tokens, or float share of the prompt); memory= instead: see `Evictor`.
    window: newest queries that vote, and newest slots kept in any case. kernel: slots pooled, odd; 1 = no pooling.
    interval: generated tokens from one eviction to the next; in between the cache grows by up to interval - 1 slots.
    mix_lambda: weight of importance, 0 to 1. official: also zero the first column of rows without a similar key, as the
    official code does for want of a match.
    Acts: at the end of every prompt forward, and while decoding after every `interval` generated tokens.
    Raises ValueError when constructed with a bad option or with a budget of fewer tokens than `window`, and if the
    host does not supply the last queries.

    Official defaults: window 8, kernel 7, interval 128, mix_lambda 0.1 (paper and README, ours); 0.07 (class).
    Deviations. `fp32`: official importance is rounded to the model's dtype. `every_row`: official similarity is that of
    the first row of the batch, or whole N x N. `sorted`: kept slots stay in order, and ties go to the most recent.
    """

    window: int = 8
    kernel: int = 7
    interval: int = 128
    mix_lambda: float = 0.1
    official: bool = False

    def __post_init__(self) -> None:
        for name, tokens in (("window", self.window), ("interval", self.interval)):
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
                raise ValueError(f"RKV: {name} must be an int of at least 1 token, got {tokens!r}")
        if isinstance(self.kernel, bool) or not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"RKV: kernel must be an odd int of at least 1 slot, got {self.kernel!r}")
        weight = self.mix_lambda
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
            raise ValueError(f"RKV: mix_lambda must be a number from 0 to 1, got {weight!r}")
        if not isinstance(self.official, bool):
            raise ValueError(f"RKV: official must be true or false, got {self.official!r}")
        super().__post_init__()

    @property
    def needs(self) -> Mapping[str, int]:
        return {"window": self.window}

    @property
    def min_slots(self) -> int:
        return self.window

    def score(self, kv: KV, step: Step) -> Tensor:
        repeated = redundancy(kv, zero_unmatched=self.official)
        return self.mix_lambda * self._importance(kv, step) - (1 - self.mix_lambda) * repeated

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        return kv.from_newest <= self.window

    def _importance(self, kv: KV, step: Step) -> Tensor:
        queries, _, _ = step.last_queries(self.window)
        heads, width = kv.keys.shape[1], queries.shape[2]
        grouped = queries.float().unflatten(1, (heads, -1)).flatten(2, 3)  # [B, H, G*w, D]
        logits = grouped @ kv.keys.dense().float().transpose(-1, -2) * step.scale(kv)
        if step.softcap is not None:
            logits = step.softcap * torch.tanh(logits / step.softcap)
        outside = kv.from_newest <= self.window  # the window, and dead columns
        logits = logits.unflatten(2, (-1, width)).amax(2).masked_fill(outside[:, :, None], _LOWEST)
        # Queries that are pads do no harm: a row has them only as long as all its slots are in the window.
        mean = logits.softmax(-1).mean(2)
        # Zero is what a maximum of weights ignores.
        return F.max_pool1d(mean.masked_fill(outside, 0), self.kernel, stride=1, padding=self.kernel // 2)


def redundancy(kv: KV, *, zero_unmatched: bool = False) -> Tensor:
    """How much the other keys of its head repeat each key: [B, H, S] float32, sums to 1 over live slots; see `RKV`."""
    batch, heads, width, _ = kv.keys.shape
    keys = kv.keys.dense().float()
    live = (kv.position >= 0).expand(batch, heads, -1)
    unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=_EPS) * live[..., None]
    column = torch.arange(width, device=keys.device)
    # In double the sums do not depend on the order of the rows, so alike keys tie.
    total = torch.zeros((batch, heads, width), dtype=torch.float64, device=keys.device)
    size = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * width))
    for rows in column.split(size):
        cosine = unit[:, :, rows] @ unit.transpose(-1, -2)
        cosine.masked_fill_(column == rows[:, None], 0)
        newest = torch.where(cosine > _SIMILAR, column, -1).amax(-1, keepdim=True)
        if zero_unmatched:
            newest = newest.clamp(min=0)
        total += cosine.masked_fill_(column == newest, 0).sum(2, dtype=torch.float64)
    mean = total / live.sum(-1, keepdim=True).clamp(min=1)
    return mean.float().masked_fill(~live, _LOWEST).softmax(-1)
