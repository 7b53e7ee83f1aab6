"""H2O-mask: the official simulation of H2O, which masks evicted tokens instead of dropping them.

Paper https://arxiv.org/abs/2306.14048 (Zhang et al., NeurIPS 2023), official code
https://github.com/FMInference/H2O (h2o_hf/utils_hh)
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.policies.h2o import check_recent, recent_slots
from kvbench.policies.interface import KV, Selection, Selector, Step, select


@dataclass(frozen=True)
class H2OMask(Selector):
    """After each forward, decides as H2O would what to keep; the next forward does not read the rest.

        kept[b, h]          = the `recent` newest slots and, of the older, those with the largest sums
        sum[b, h, s]        = 0 for s not kept, else what accumulated: sum over queries i, heads g, of A[b, g, i, s]
        read next [b, h, s] = kept, less the oldest slot of the recent window                      bool [B, H, S]

    A is the masked attention: the host accumulates it (needs "attention") with the selection applied. One-step lag: the
    next token takes a place in the recent window before the sums are looked at again, so the slot that it pushes out
    is unread for one step; it keeps its sum and competes with the heavy hitters after that step. Evicted slots have sum
    zero and stay unread. A prompt forward reads its own tokens freely.

    Nothing is freed: all keys and values stay in memory. Only for reproducing published numbers; use `H2O` otherwise.

    budget: slots read per head and decode step, the new token included (int tokens, or float share of the prompt);
    memory= instead: see `Selector`. recent: newest slots of them: int tokens, float share of the budget in force
    (rounded down), or None: half of it. A query always reads its own token, which counts as recent.
    Acts: chooses before every forward but the first, from sums brought up to date after every forward.
    Raises ValueError when constructed with a bad option or with a budget of fewer tokens than `recent`; KeyError if
    the host does not supply "attention".

    Official defaults: 10 % + 10 % of the prompt (hence our half).
    Deviations. `gqa_sum`, `fp32`, `per_row`: as in `H2O`. `own_token`: with recent = 0 official code hides from a query
    its own token. `strict`: official code reads one slot too many when exactly the budget is held; and before its
    commit d5962aa the lagging slot was read, one above the budget at every step.
    """

    recent: int | float | None = None

    def __post_init__(self) -> None:
        check_recent("H2OMask", self.recent)
        super().__post_init__()

    @property
    def needs(self) -> Mapping[str, int]:
        return {"attention": 1}

    @property
    def min_slots(self) -> int:
        return max(1, self.recent) if isinstance(self.recent, int) else 1

    @property
    def slot_state_nbytes(self) -> int:
        return 4 + 1  # the sum and the mask

    def __call__(self, kv: KV, step: Step) -> KV:
        slots, total = self.slots(kv, step), kv.column("attention")
        full = (kv.position >= 0).sum(-1) >= slots  # the next token will not fit
        if not bool(full.any()):
            return kv
        recent, rank = recent_slots(self.recent, slots).clamp(min=1)[..., None], kv.from_newest
        kept = chosen(*select(total, kv, slots, rank <= recent)[:1], kv.counts.width)
        lagging = full[..., None] & (rank == recent)
        return kv.with_columns(attention=total * kept, masked=~kept | lagging)

    def choose(self, kv: KV, queries: Tensor, position: Tensor, step: Step) -> Selection | None:
        return Selection(~kv.columns["masked"]) if "masked" in kv.columns else None


def chosen(indices: Tensor, width: int) -> Tensor:
    """indices [B, H, K] of `width` slots, -1 = none -> [B, H, width] bool."""
    mask = torch.zeros((*indices.shape[:2], width + 1), dtype=torch.bool, device=indices.device)
    return mask.scatter_(2, indices.masked_fill(indices < 0, width), True)[..., :width]
