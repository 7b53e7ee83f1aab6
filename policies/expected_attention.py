"""ExpectedAttention: what the prompt's queries, moved on to the next positions, would attend to (Devoto et al., 2025).

Paper https://arxiv.org/abs/2510.00636, official code https://github.com/NVIDIA/kvpress
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.policies.interface import KV, Evictor, Step


@dataclass(frozen=True)
class ExpectedAttention(Evictor):
    """Keeps the slots that future queries, taken as Gaussian, are expected to attend to.

        R = mean RoPE rotation of the next `future` positions; m = R mean, C = R covariance R^T           per query head
        z[b, h, g, s]  = scaling m . k_s + scaling^2 / 2 k_s . C k_s         log of E exp(scaling q . k_s), q ~ N(m, C)
        a[b, h, s]     = mean over query heads g of kv head h of softmax over s of z[b, h, g, s]
        score[b, h, s] = (a[b, h, s] + epsilon) |v_s|                                        float32 [B, H, S]

    mean and covariance are those of the prompt's queries before RoPE, without its first `sinks` tokens; the softmax
    runs over the live slots that are no sinks. The layer's softcap bends z, and its learned sinks join the softmax.

    budget: slots per head, sinks included (int tokens, or float share of the prompt); memory= instead: see `Evictor`.
    sinks: first real tokens: no part of the moments, kept in any case. future: tokens. epsilon: in units of attention.
    covariance: False: the term in C is left out. value_norm: False: the score is a.
    Acts: at the end of every prompt forward, never while decoding: the cache then grows.
    Raises ValueError when constructed with a bad option or with a budget of fewer tokens than `sinks`, and if the host
    does not supply the moments.

    Official defaults: sinks 4, future 512, covariance and norms on, epsilon 0.02 (paper; code 0, its benchmark 0.01).
    Deviations. `value_norm`: as in the official code; the paper's norm is that of the value after the head's output
    projection, which policies do not see. `alone`: the official benchmark wraps it in AdaKV; here that is a wrapper.
    """

    sinks: int = 4
    future: int = 512
    epsilon: float = 0.02
    covariance: bool = True
    value_norm: bool = True

    evicts_while_decoding: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, tokens, least in (("sinks", self.sinks, 0), ("future", self.future, 1)):
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < least:
                raise ValueError(f"ExpectedAttention: {name} must be an int of {least} or more tokens, got {tokens!r}")
        number = isinstance(self.epsilon, (int, float)) and not isinstance(self.epsilon, bool)
        if not number or not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"ExpectedAttention: epsilon must be a number of at least 0, got {self.epsilon!r}")
        for name, value in (("covariance", self.covariance), ("value_norm", self.value_norm)):
            if not isinstance(value, bool):
                raise ValueError(f"ExpectedAttention: {name} must be true or false, got {value!r}")
        super().__post_init__()

    @property
    def needs(self) -> Mapping[str, int]:
        return {"moments": self.sinks}

    @property
    def min_slots(self) -> int:
        return max(1, self.sinks)

    def score(self, kv: KV, step: Step) -> Tensor:
        if step.moments is None or step.inverse_frequency is None:
            raise ValueError(
                "this policy needs the moments of the prompt's queries, "
                'which its host did not supply (needs["moments"])'
            )
        cos, sin = self._average_rotation(step.seen, step.inverse_frequency)  # [B, R/2]
        batch, heads = kv.counts.shape
        group = step.moments.mean.shape[1] // heads
        keys = kv.keys.dense().float() * step.scale(kv)
        mean = _rotate(step.moments.mean.float(), cos[:, None], sin[:, None]).unflatten(1, (heads, group))
        outside = kv.position < self.sinks  # also the dead
        expected = torch.zeros(batch, heads, keys.shape[2], device=keys.device)
        for g in range(group):  # one product [S, D] x [D, D] at a time: keys are not repeated
            z = (keys @ mean[:, :, g, :, None])[..., 0]
            if self.covariance:
                spread = step.moments.covariance.float().unflatten(1, (heads, group))[:, :, g]  # [B, H, D, D]
                for _ in "rows", "columns":
                    spread = _rotate(spread, cos[:, None, None], sin[:, None, None]).transpose(-1, -2)
                z = z + ((keys @ spread) * keys).sum(-1) / 2
            if step.softcap is not None:
                z = step.softcap * torch.tanh(z / step.softcap)
            # Not -inf: a row of nothing but sinks would become nan.
            z = z.masked_fill(outside, torch.finfo(z.dtype).min)
            total = z.logsumexp(-1, keepdim=True)
            if step.sinks is not None:
                total = torch.logaddexp(total, step.sinks.float().view(heads, group)[:, g, None])
            expected += torch.exp(z - total) / group
        if not self.value_norm:
            return expected
        return (expected + self.epsilon) * kv.values.dense().float().norm(dim=-1)

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        return kv.position < self.sinks

    def _average_rotation(self, seen: Tensor, inverse_frequency: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cosine and sine over the positions seen, seen + 1, ..., seen + future - 1: each [B, R/2]."""
        position = seen[:, None] + torch.arange(self.future, device=seen.device)
        angle = position[..., None].float() * inverse_frequency
        return angle.cos().mean(1), angle.sin().mean(1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the last dim of x [..., D]; dims j and j + R/2 of the first R form a pair; cos, sin [..., R/2]."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
