"""H2O: heavy-hitter oracle, tokens that gathered the most attention so far (Zhang et al., NeurIPS 2023).

Paper https://arxiv.org/abs/2306.14048, official code https://github.com/FMInference/H2O
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.policies.interface import KV, Evictor, Step


@dataclass(frozen=True)
class H2O(Evictor):
    """Keeps the `recent` newest slots, and of the older ones those with the largest accumulated attention.

        score[b, h, s] = sum over all queries i so far, and query heads g of kv head h, of A[b, g, i, s]

    float32 [B, H, S]; A is the softmax over the slots that were held when query i came. The host accumulates the sums
    (needs "attention") and they ride with their slots, so evicting a token forgets its sum.

    budget: slots per head, recent included (int tokens, or float share of the prompt); memory= instead: see `Evictor`.
    recent: newest slots kept in any case: int tokens, float share of the budget in force (rounded down), or None: half
    of it. recent = budget is a plain sliding window.
    Acts: at the end of every prompt forward and at every decode step, after that forward's attention.
    Raises ValueError when constructed with a bad option or with a budget of fewer tokens than `recent`; KeyError if
    the host does not supply "attention".

    Official defaults: 4 heavy + 512 recent (class), 10 % + 10 % of the prompt (scripts, hence our half).
    Deviations. `gqa_sum`: official code has no grouped heads; here the softmaxed rows of a group are summed. `fp32`:
    official sums are in the model's dtype, where small increments vanish. `per_row`: official sums mix the rows of a
    batch. Cutting the prompt into several forwards evicts after each: a different, much weaker setting.
    """

    recent: int | float | None = None

    def __post_init__(self) -> None:
        recent = self.recent
        if recent is not None and (isinstance(recent, bool) or not isinstance(recent, (int, float))):
            raise ValueError(f"H2O: recent must be tokens (int), a share of the budget (float) or None, got {recent!r}")
        if isinstance(recent, int) and recent < 0:
            raise ValueError(f"H2O: recent must be 0 or more tokens, got {recent}")
        if isinstance(recent, float) and not 0 <= recent <= 1:
            raise ValueError(f"H2O: recent={recent} as a share must be from 0 to 1; write tokens as an int")
        super().__post_init__()

    @property
    def needs(self) -> Mapping[str, int]:
        return {"attention": 1}

    @property
    def min_slots(self) -> int:
        return max(1, self.recent) if isinstance(self.recent, int) else 1

    def score(self, kv: KV, step: Step) -> Tensor:
        return kv.column("attention").float()

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        return kv.from_newest <= self._recent(slots)[..., None]

    def _recent(self, slots: Tensor) -> Tensor:
        if self.recent is None:
            return slots // 2
        if isinstance(self.recent, int):
            return torch.full_like(slots, self.recent)
        return torch.floor(slots.double() * self.recent + 1e-6).to(slots.dtype)
