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

        sum[b, h, s]   = sum over all queries i so far, and query heads g of kv head h, of A[b, g, i, s]
        score[b, h, s] = sum[b, h, s]                                    normalize="none"
                       = sum[b, h, s] / (seen[b] - position[b, h, s])    normalize="by_visible_queries"

    float32 [B, H, S]; A is the softmax over the slots that were held when query i came. The host accumulates the sums
    (needs "attention") and they ride with their slots, so evicting a token forgets its sum. seen - position is how many
    queries could see the slot, its own included: early tokens lose the advantage of having been seen by more.

    budget: slots per head, recent included (int tokens, or float share of the prompt); memory= instead: see `Evictor`.
    recent: newest slots kept in any case: int tokens, float share of the budget in force (rounded down), or None: half
    of it. recent = budget is a plain sliding window.
    normalize: "none" (paper) or "by_visible_queries" (kvpress's ObservedAttention). Dividing by a token's age, as
    awslabs/keys_values can, is the same thing here: it differs there because prompt queries leave no sums.
    Acts: at the end of every prompt forward and at every decode step, after that forward's attention.
    Raises ValueError when constructed with a bad option or with a budget of fewer tokens than `recent`; KeyError if
    the host does not supply "attention".

    Official defaults: 4 heavy + 512 recent (class), 10 % + 10 % of the prompt (scripts, hence our half).
    Deviations. `gqa_sum`: official code has no grouped heads; here the softmaxed rows of a group are summed. `fp32`:
    official sums are in the model's dtype, where small increments vanish. `per_row`: official sums mix the rows of a
    batch. Cutting the prompt into several forwards evicts after each: a different, much weaker setting.
    """

    recent: int | float | None = None
    normalize: str = "none"

    def __post_init__(self) -> None:
        check_recent(type(self).__name__, self.recent)
        if self.normalize not in ("none", "by_visible_queries"):
            raise ValueError(
                f"{type(self).__name__}: normalize must be 'none' or 'by_visible_queries', got {self.normalize!r}"
            )
        super().__post_init__()

    @property
    def needs(self) -> Mapping[str, int]:
        return {"attention": 1}

    @property
    def min_slots(self) -> int:
        return max(1, self.recent) if isinstance(self.recent, int) else 1

    def score(self, kv: KV, step: Step) -> Tensor:
        total = kv.column("attention").float()
        return total if self.normalize == "none" else total / (step.seen[:, None, None] - kv.position)

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        return kv.from_newest <= recent_slots(self.recent, slots)[..., None]


def check_recent(name: str, recent: int | float | None) -> None:
    """Raises ValueError if `recent` is not what the policy `name` can take."""
    if recent is not None and (isinstance(recent, bool) or not isinstance(recent, (int, float))):
        raise ValueError(f"{name}: recent must be tokens (int), a share of the budget (float) or None, got {recent!r}")
    if isinstance(recent, int) and recent < 0:
        raise ValueError(f"{name}: recent must be 0 or more tokens, got {recent}")
    if isinstance(recent, float) and not 0 <= recent <= 1:
        raise ValueError(f"{name}: recent={recent} as a share must be from 0 to 1; write tokens as an int")


def recent_slots(recent: int | float | None, slots: Tensor) -> Tensor:
    """Slots of the recent window if the budget in force is `slots` (int64 of any shape)."""
    if recent is None:
        return slots // 2
    if isinstance(recent, int):
        return torch.full_like(slots, recent)
    return torch.floor(slots.double() * recent + 1e-6).to(slots.dtype)
