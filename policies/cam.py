"""CaM: cache merging, evicted values live on in the values that follow them (Zhang et al., ICML 2024).

Paper https://openreview.net/forum?id=LCTmppB165, official code https://github.com/zyxxmu/cam
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbench.policies.h2o import H2O
from kvbench.policies.interface import KV, Step
from kvbench.policies.random import Random
from kvbench.policies.store import take_columns

_MASK = 2**32 - 1


@dataclass(frozen=True)
class CaM(H2O):
    """Evicts as `H2O` does, and adds what an evicted value was worth to the `merge` kept values after it.

        N(j)     = the first `merge` kept slots younger than the evicted slot j (fewer at the end)
        p[b,h,j] = clamp(score[b,h,j] / mean over s in N(j) of score[b,h,s], 0, 1)
        m[b,h,j] = 1 with probability p, else 0 (sample=True), or p itself
        v[b,h,s] = v[b,h,s] + sum over evicted j with s in N(j) of m[b,h,j] * v[b,h,j] / merge

    score as in `H2O`; all in float32, the new values rounded once to the model's dtype. Keys stay as they are. What
    falls past the newest slot is lost, and so is what falls on slots that a quantizer holds packed: they are never
    encoded anew, so before a quantizer that packs at once nothing but the newest values takes a merge.

    budget, recent, normalize: see `H2O`. merge: slots that share an evicted value. sample: draw m, or take p.
    seed: of the draws, 0 to 2**32 - 1; a draw depends on nothing but the seed, layer, head and position.
    Acts: whenever `H2O` evicts: at the end of every prompt forward and at every decode step.
    Raises as `H2O` does.

    Official defaults: merge 32, drawn (ours too).
    Deviations. `h2o_base`: official code evicts by age (sinks + recent) and compares the attention of the newest query
    alone, with the mean over the whole recent window; here the accumulated sums over N(j) decide. `prompts`: official
    code drops a prompt's slots without merging them. `gqa_sum`, `fp32`, `per_row`: as in `H2O`.
    """

    merge: int = 32
    sample: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.merge, bool) or not isinstance(self.merge, int) or self.merge < 1:
            raise ValueError(f"CaM: merge must be an int of at least 1 slot, got {self.merge!r}")
        if not isinstance(self.sample, bool):
            raise ValueError(f"CaM: sample must be true or false, got {self.sample!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= _MASK:
            raise ValueError(f"CaM: seed must be an int from 0 to 2**32 - 1, got {self.seed!r}")
        super().__post_init__()

    def __call__(self, kv: KV, step: Step) -> KV:
        kept = super().__call__(kv, step)
        if kept is kv:
            return kv
        values = kept.values.rectangular()
        first, end = (x[..., None] for x in values.packed)
        column = torch.arange(values.tail.shape[2], device=values.tail.device).expand(*kv.counts.shape, -1)
        column = torch.where(column < first, column, column + end - first)
        arriving = take_columns(self._arriving(kv, kept, step), column.clamp(max=kept.counts.width - 1))
        tail = (values.tail.float() + arriving).to(values.dtype)
        merged = replace(values, tail=tail)
        return KV(kept.keys, merged.flattened() if kept.values.is_flat else merged, kept.columns, kept.side)

    def _arriving(self, kv: KV, kept: KV, step: Step) -> Tensor:
        """What is added to each kept value: [B, H, K, D] float32."""
        batch, heads, width, dim = kept.values.shape
        old = kv.position.expand(batch, heads, -1).contiguous()
        new = kept.position.expand(batch, heads, -1)
        count = kept.counts.per_head[..., None]
        ascending = new.masked_fill(new < 0, torch.iinfo(new.dtype).max).contiguous()
        first = torch.searchsorted(ascending, old)  # rank of the first kept slot at or after each old one
        evicted = (old >= 0) & (ascending.gather(2, first.clamp(max=width - 1)) != old)

        # Means from prefix sums, in double: a difference of float32 sums would lose small scores.
        prefix = F.pad(self.score(kept, step).double().cumsum(-1), (1, 0))
        end = torch.minimum(first + self.merge, count)
        sums = prefix.gather(2, end.clamp(max=width)) - prefix.gather(2, first.clamp(max=width))
        mean = sums / (end - first).clamp(min=1)
        share = (self.score(kv, step) / mean).nan_to_num(nan=0.0, posinf=1.0).clamp(0, 1).float()
        if self.sample:
            # Another stream than that of Random(seed=seed), which may stand in the same stack.
            draws = Random(1, seed=self.seed ^ 0x5BD1E995).score(kv, step)
            share = (draws < share).float()
        share = share.masked_fill(~evicted | (first >= count), 0)

        given = kv.values.dense().float() * share[..., None]
        started = torch.zeros((batch, heads, width, dim), device=given.device)
        started.scatter_add_(2, first.clamp(max=width - 1)[..., None].expand_as(given), given)
        lanes = started.flatten(0, 1).transpose(1, 2)  # [B*H, D, K]
        spread = F.avg_pool1d(F.pad(lanes, (self.merge - 1, 0)), self.merge, stride=1)
        return spread.transpose(1, 2).unflatten(0, (batch, heads))
