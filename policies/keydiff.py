"""KeyDiff: keep the keys that differ most from the others (Park et al., NeurIPS 2025).

Paper https://arxiv.org/abs/2504.15364; no official code, reviewed port in https://github.com/NVIDIA/kvpress
"""

from dataclasses import dataclass

from torch import Tensor

from kvbench.kernels.scores import key_alignment
from kvbench.policies.interface import KV, Evictor, Step


@dataclass(frozen=True)
class KeyDiff(Evictor):
    """Keeps the slots whose keys are least aligned with the mean direction of all keys held.

        u_s = k_s / |k_s|      anchor = mean over live slots of u_s ("normalized") or of k_s ("raw")
        score[b, h, s] = -cos(k_s, anchor)                                      float32 [B, H, S]

    k_s are the keys as attention reads them: after RoPE, and dequantized where a quantizer holds them. With the
    normalized anchor the ranking is exactly that of the row sums of all pairwise cosine similarities, at linear cost.

    budget: slots per head, recent and sinks included (int tokens, or float share of the prompt); memory= instead: see
    `Evictor`. recent, sinks: newest slots and first real tokens kept in any case; recent=1 spares the token that has
    just come. anchor: "normalized" or "raw" (the paper's variant, another ranking).
    Acts: over survivors and new tokens alike, in three protocols that differ in strength: block=128 as in the paper,
    after every block of the prompt; without block, once, at the end of the prompt; at every decode step in either case.
    Raises ValueError when constructed with a bad option, or with a budget of fewer tokens than recent + sinks.

    Official defaults: no official code; paper: blocks of 128, nothing protected.
    Deviations. `one_shot`: block is None by default, as in all evictors: that sees more and holds the whole prompt
    first. kvpress's block mode is a third thing: its blocks have been computed over the uncompressed cache.
    """

    recent: int = 0
    sinks: int = 0
    anchor: str = "normalized"

    def __post_init__(self) -> None:
        for name, tokens in (("recent", self.recent), ("sinks", self.sinks)):
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
                raise ValueError(f"KeyDiff: {name} must be an int of 0 or more tokens, got {tokens!r}")
        if self.anchor not in ("normalized", "raw"):
            raise ValueError(f"KeyDiff: anchor must be 'normalized' or 'raw', got {self.anchor!r}")
        super().__post_init__()

    @property
    def min_slots(self) -> int:
        return max(1, self.recent + self.sinks)

    def score(self, kv: KV, step: Step) -> Tensor:
        return -key_alignment(kv.keys.dense(), kv.position >= 0, unit=self.anchor == "normalized")

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        return (kv.position < self.sinks) | (kv.from_newest <= self.recent)
