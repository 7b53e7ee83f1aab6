"""CAOTE: attention scores reweighted by how much the attention output would change (Goel et al., arXiv 2025).

Paper https://arxiv.org/abs/2504.14051; no official code
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.policies.h2o import H2O
from kvbench.policies.interface import KV, Evictor, Step, Wrapper
from kvbench.policies.snapkv import SnapKV
from kvbench.policies.tova import TOVA


@dataclass(frozen=True)
class CAOTE(Wrapper):
    """Keeps the slots without which the attention output would change the most; `base` says what attends to what.

        h[b, h, s] = score of base, divided by its sum over live slots        o = sum over s of h_s v_s
        score[b, h, s] = h_s / (1 - h_s) |o - v_s|                                        float32 [B, H, S]

    This is the distance that o moves when slot s alone is evicted and the others share its weight. v are the values as
    attention reads them: dequantized where a quantizer holds them. What `base` protects stays protected.

    base: H2O, TOVA, SnapKV or a subclass, whose scores are attention weights, e.g. H2O(0.25); budget, memory and block
    are its own. SnapKV scores no slot of its window: those are left out of h and o. fast: FastCAOTE, with the plain
    mean of all live values in place of o.
    Acts: when its base does.
    Raises TypeError if base is no evictor; ValueError when constructed with a base whose scores are no attention
    weights or with a bad option, and when scores are negative.

    Official defaults: no official code; paper: both variants, around H2O, TOVA and SnapKV, in blocks of 128.
    Deviations. `group`: h of a kv head is what base makes of its group's query heads (the mean, or a multiple of it).
    `stable`: a slot with more than half of the weight is measured against the output without it, which is the same
    number, but no difference of nearly equal ones. `token_sets`: around TOVA, heads may keep different tokens.
    """

    fast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.fast, bool):
            raise ValueError(f"CAOTE: fast must be True or False, got {self.fast!r}")
        if not isinstance(self._scorer, (H2O, SnapKV, TOVA)):
            raise ValueError(
                f"CAOTE: base must score by attention weights (H2O, SnapKV, TOVA), and {self.base} does not"
            )

    @property
    def _scorer(self) -> Evictor:
        """Whose scores they are: around AdaKV and the like, that of the policy inside."""
        scorer = self.base
        while isinstance(scorer, Wrapper) and type(scorer).score is Wrapper.score:
            scorer = scorer.base
        return scorer

    @property
    def shared_over_heads(self) -> bool:
        return False

    def score(self, kv: KV, step: Step) -> Tensor:
        weight = self.base.score(kv, step).float()
        values = kv.values.dense().float()
        live = (kv.position >= 0).expand(values.shape[:3])
        scored = live
        if isinstance(self._scorer, SnapKV):
            scored = live & ~self._scorer.protected(kv, step, self.slots(kv, step))
        weight = torch.where(scored, weight, 0)
        if bool((weight < 0).any()):
            raise ValueError(f"CAOTE: scores of {self.base} go down to {float(weight.min()):.4g}; none may be below 0")
        return output_change(weight, values, live, self.fast)


def output_change(weight: Tensor, values: Tensor, live: Tensor, fast: bool = False) -> Tensor:
    """How far the weighted mean of values moves when one slot is left out: [B, H, S] in the dtype given.

    weight [B, H, S] >= 0, any scale, zero where dead; values [B, H, S, D]; live [B, H, S] bool. fast: see `CAOTE`.
    """
    info = torch.finfo(weight.dtype)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=info.tiny)
    values = values - values[:, :, :1]  # only differences count; equal values so give exactly 0 and tie
    share = weight / (1 - weight).clamp(min=info.eps)
    if fast:
        return share * (_mean(live, values) - values).norm(dim=-1)
    change = share * (_mean(weight, values) - values).norm(dim=-1)
    top = weight.argmax(-1, keepdim=True)
    others = weight.scatter(-1, top, 0)
    others = torch.where((others > 0).any(-1, keepdim=True), others, live.scatter(-1, top, False).to(weight.dtype))
    moved = (_mean(others, values) - values.gather(2, top[..., None].expand(-1, -1, -1, values.shape[-1]))).norm(dim=-1)
    return change.scatter(-1, top, weight.gather(-1, top) * moved)


def _mean(weight: Tensor, values: Tensor) -> Tensor:
    """[B, H, 1, D]: mean of values weighted by weight [B, H, S], 0 if there is no weight."""
    weight = weight.to(values.dtype)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    return weight[:, :, None] @ values
