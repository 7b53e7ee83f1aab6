"""StreamingLLM: attention sinks plus a sliding window (Xiao et al., ICLR 2024).

Paper https://arxiv.org/abs/2309.17453, official code https://github.com/mit-han-lab/streaming-llm
"""

from dataclasses import dataclass

from torch import Tensor

from kvbench.policies.interface import KV, Evictor, Step


@dataclass(frozen=True)
class StreamingLLM(Evictor):
    """Keeps the first `sinks` tokens and the most recent others, the same in all heads and layers.

        kept = [0, sinks) and the last budget - sinks positions        score = position, float32 [B, 1, S]

    budget: slots per head, sinks included (int tokens, or float share of the prompt); memory= instead: see `Evictor`.
    sinks: first real tokens of the row, pads not counted. Official: 4 (1 in eval_long_ppl.py).
    positions: "in_cache" as in the paper: attention sees the kept tokens at positions 0, 1, 2, ... without gaps, so
    text may outgrow the trained context; the host rotates the keys when it reads them. "original": tokens keep
    their positions.
    Acts: at the end of every prompt forward and at every decode step.
    Raises ValueError when constructed with a bad option, or with a budget of fewer tokens than `sinks`.

    Official defaults: 4 sinks + 512 recent (class), 4 + 2000 (demo); here the budget is always named.
    Deviations. `evicts_after`: official code can also trim before a turn so that it fits; here eviction follows the
    forward, and a forward may hold budget + its own tokens.
    """

    sinks: int = 4
    positions: str = "in_cache"

    def __post_init__(self) -> None:
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"StreamingLLM: sinks must be an int of 0 or more tokens, got {self.sinks!r}")
        if self.positions not in ("in_cache", "original"):
            raise ValueError(f"StreamingLLM: positions must be 'in_cache' or 'original', got {self.positions!r}")
        super().__post_init__()

    @property
    def min_slots(self) -> int:
        return max(1, self.sinks)

    @property
    def shared_over_heads(self) -> bool:
        return True

    @property
    def in_cache_positions(self) -> bool:
        return self.positions == "in_cache"

    def score(self, kv: KV, step: Step) -> Tensor:
        return kv.position.float()

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        return kv.position < self.sinks
