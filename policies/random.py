"""Random eviction: the baseline every scorer has to beat.

The score of a slot is a hash of where it is, not a draw from a generator, so it is the same in every forward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.policies.interface import KV, Evictor, Step

_MASK = 2**32 - 1


@dataclass(frozen=True)
class Random(Evictor):
    """Keeps the `budget` slots with the highest pseudo-random scores.

        score[b, h, s] = hash(seed, layer, h, position[b, h, s]) / 2**24        uniform in [0, 1), float32 [B, H, S]

    The score depends on nothing else: not on how the prompt was cut into forwards, the other rows, or the device. What
    is kept after any number of steps is therefore one uniform sample of all tokens seen, and it can be repeated.

    budget: slots per head (int tokens, or float share of the prompt); memory= instead: see `Evictor`.
    seed: 0 to 2**32 - 1. per_head: every head draws for itself; False: all heads of a layer keep the same tokens.
    Acts: at the end of every prompt forward and at every decode step. Protects nothing.
    Raises ValueError when constructed with a bad option.
    """

    seed: int = 0
    per_head: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= _MASK:
            raise ValueError(f"Random: seed must be an int from 0 to 2**32 - 1, got {self.seed!r}")
        if not isinstance(self.per_head, bool):
            raise ValueError(f"Random: per_head must be true or false, got {self.per_head!r}")
        super().__post_init__()

    @property
    def shared_over_heads(self) -> bool:
        return not self.per_head

    def score(self, kv: KV, step: Step) -> Tensor:
        position = kv.position.long()
        heads = torch.arange(kv.keys.shape[1] if self.per_head else 1, device=position.device)[:, None]
        # The offset keeps (0, 0, 0, 0) from hashing to 0, which would make one token the worst of every cache.
        state = torch.full_like(heads[:1], (self.seed + 0x9E3779B9) & _MASK)
        for part in (step.layer, heads, position):
            state = _mix(state) ^ part
        return (_mix(state) >> 8).float() / 2**24  # 24 bits: what float32 holds exactly


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers held in int64 (lowbias32): every output bit depends on every input bit."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * -0x7B935975 & _MASK  # 0x846CA68B - 2**32: the product stays inside int64
    return x ^ (x >> 16)
