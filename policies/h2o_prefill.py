"""H2O-prefill: accumulated attention of the whole prompt, cut once at its end (KVCache-Factory's form of H2O).

Paper https://arxiv.org/abs/2306.14048 (Zhang et al., NeurIPS 2023), code https://github.com/Zefan-Cai/KVCache-Factory
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.policies.interface import KV, Evictor, Step


@dataclass(frozen=True)
class H2OPrefill(Evictor):
    """Keeps the `window` newest slots, and of the older ones those with the largest accumulated attention, once.

        score[b, h, s] = sum over all queries i so far, and query heads g of kv head h, of A[b, g, i, s]

    float32 [B, H, S], no pooling. What LongBench tables of SnapKV and its successors call H2O: unlike `H2O` it has seen
    the whole prompt before it drops anything, and its window is small.

    budget: slots per head, window included (int tokens, or float share of the prompt); memory= instead: see `Evictor`.
    window: newest slots kept in any case (tokens).
    Acts: at the end of every prompt forward, never while decoding: the cache then grows.
    Raises ValueError when constructed with a bad option or with a budget of fewer tokens than `window`; KeyError if the
    host does not supply "attention".

    Official defaults: window 8 (LongBench script, ours too); class: 64.
    Deviations. `gqa_sum`: official code repeats keys to all query heads, or takes the mean of a group; a sum ranks as a
    mean does. `fp32`: official weights are rounded to the model's dtype. A later prompt forward also counts the
    attention that survivors received while decoding: official code cuts only the first.
    """

    window: int = 8

    evicts_while_decoding: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 0:
            raise ValueError(f"H2OPrefill: window must be an int of 0 or more tokens, got {self.window!r}")
        super().__post_init__()

    @property
    def needs(self) -> Mapping[str, int]:
        return {"attention": 1}

    @property
    def min_slots(self) -> int:
        return max(1, self.window)

    def score(self, kv: KV, step: Step) -> Tensor:
        return kv.column("attention").float()

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        return kv.from_newest <= self.window
