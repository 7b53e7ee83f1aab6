"""Q-Hitter: heavy hitters that also survive quantization (Zhang et al., MLSys 2024).

Paper https://mlsys.org/virtual/2024/poster/2642, official code https://github.com/VITA-Group/Q-Hitter
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.policies.interface import KV, Evictor, Step
from kvbench.policies.store import Codec, Counts, Packed, Plain, Where, take_columns


@dataclass(frozen=True)
class QHitter(Evictor):
    """Keeps the newest slots, the heaviest hitters, and of the rest those that are both heavy and easy to quantize.

        S[b, h, s] = accumulated attention as in `H2O`            e[b, h, s] = |k - Q(k)| + |v - Q(v)|
        score      = attention * minmax(S) + (1 - attention) * (1 - minmax(e))              float32 [B, H, S]

    minmax(x) = (x - min) / (max - min) over the live slots of a row and head, 0 if they are all equal. e is measured
    once, when a token arrives, with the codecs of the quantizer that follows in the stack, and rides with its slot
    (column "quant_error", float32). Without one Q is `bits`-bit min-max rounding of each token and head.
    Where tokens share a scale (KIVI's keys), the group is a run of tokens that arrived together; a last, incomplete one
    is filled up with the slots before it, or, if there are not enough, by repetition.

    budget: slots per head, all three parts (int tokens, or float share of the prompt); memory= instead: see `Evictor`.
    heavy, recent: shares of the budget in force (rounded down) kept by S alone and for being newest; the score decides
    on the others. attention: weight of S from 0 to 1; 1 = H2O, whatever the errors. bits: 2 to 8, or 16: no error.
    Acts: at the end of every prompt forward and at every decode step, after that forward's attention.
    Raises ValueError when constructed with a bad option; KeyError if the host does not supply "attention".

    Official defaults: 0.07 heavy + 0.08 by score + 0.05 recent of the prompt, attention 0.5, 4 bits.
    Deviations. `own_quantizer`: the error is that of the stack's quantizer, official code always takes 4-bit min-max.
    `shares`: official shares are of the prompt and add up to 20 %; ours are the same ones of any budget. `raw_error`:
    errors are stored as they are and compared at decision time within a row and head; official code normalizes each
    forward's over all heads. `one_error`: those of key and value are added before normalizing. `gqa_sum`: as in `H2O`.
    """

    heavy: float = 0.35
    recent: float = 0.25
    attention: float = 0.5
    bits: int = 4

    def __post_init__(self) -> None:
        for name in ("heavy", "recent", "attention"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(f"QHitter: {name} must be a share from 0 to 1, got {share!r}")
        if self.heavy + self.recent > 1:
            raise ValueError(f"QHitter: heavy={self.heavy} and recent={self.recent} must be at most 1 together")
        if isinstance(self.bits, bool) or self.bits not in (*range(2, 9), 16):
            raise ValueError(f"QHitter: bits must be from 2 to 8, or 16 for no error, got {self.bits!r}")
        super().__post_init__()

    @property
    def needs(self) -> Mapping[str, int]:
        return {"attention": 1}

    @property
    def slot_state_nbytes(self) -> int:
        return 8

    def observe(self, kv: KV, step: Step) -> KV:
        batch, heads, width, _ = kv.keys.shape
        old = kv.columns.get("quant_error", torch.zeros(batch, heads, width, device=kv.keys.tail.device))
        new = step.is_new(kv).expand(batch, heads, width)
        alone: Codec = Plain(torch.float32) if self.bits == 16 else MinMax(self.bits)
        keys, values = kv.decode()
        for_keys, for_values = (alone, alone) if step.quantizer is None else step.quantizer.codecs(step)
        error = _error(keys, for_keys, kv, new) + _error(values, for_values, kv, new)
        return kv.with_columns(quant_error=torch.where(new, error, old))

    def score(self, kv: KV, step: Step) -> Tensor:
        live = kv.position >= 0
        heavy, hard = _minmax(kv.column("attention").float(), live), _minmax(kv.column("quant_error"), live)
        return self.attention * heavy + (1 - self.attention) * (1 - hard)

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        recent = kv.from_newest <= _share(self.recent, slots)[..., None]  # and dead columns
        rank = kv.column("attention").float().masked_fill(recent, -torch.inf)
        order = rank.shape[-1] - 1 - rank.flip(-1).argsort(dim=-1, descending=True, stable=True)
        return recent | (order.argsort(-1) < _share(self.heavy, slots)[..., None])


@dataclass(frozen=True)
class MinMax:
    """Every token of every head on its own: codes from its least to its largest channel, all in float32."""

    bits: int
    group: ClassVar[int] = 1
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        low, high = x.float().aminmax(dim=-1, keepdim=True)
        scale = (high - low) / (2**self.bits - 1)
        codes = torch.where(scale > 0, (x - low) / scale, 0).round()
        return {"codes": codes, "scale": scale, "zero": low}, {}

    def decode(self, packed: Packed) -> Tensor:
        return packed.rows["codes"] * packed.rows["scale"] + packed.rows["zero"]

    def row_nbytes(self, head_dim: int) -> int:
        return 4 * head_dim + 8

    def group_nbytes(self, head_dim: int) -> int:
        return 0


def _error(x: Tensor, codec: Codec | None, kv: KV, new: Tensor) -> Tensor:
    """[B, H, S] float32: L2 distance of x [B, H, S, D] from its decoded codes at the slots `new`, 0 elsewhere."""
    if codec is None:
        return torch.zeros(x.shape[:3], device=x.device)
    length, came = kv.counts.per_head[..., None], new.sum(-1, keepdim=True)  # [B, H, 1]; the new ones are the last
    first = length - came + torch.arange(0, max(1, int(came.max())), codec.group, device=x.device)  # [B, H, groups]
    start = torch.minimum(first, length - codec.group).clamp(min=0)
    index = start[..., None] + torch.arange(codec.group, device=x.device)
    index = torch.minimum(index, length[..., None] - 1).clamp(min=0)  # [B, H, groups, group]
    rows = take_columns(x, index.flatten(2)).masked_fill(length[..., None] == 0, 0).flatten(0, 2)
    lists = Counts.of(torch.full(index.shape[:2], index[0, 0].numel(), device=x.device))
    at = take_columns(kv.position.expand(*x.shape[:2], -1), index.flatten(2)).flatten()
    lost = Packed.encode(codec, rows, lists, at).dense_rows().float() - rows.float()
    # Each slot takes the error it has in its own group, not in a later one that borrows it.
    target = torch.where(index >= first[..., None], index, x.shape[2]).flatten(2)
    error = x.new_zeros(*x.shape[:2], x.shape[2] + 1, dtype=torch.float32)
    return error.scatter(-1, target, lost.norm(dim=-1).view(target.shape))[..., :-1]


def _share(share: float, slots: Tensor) -> Tensor:
    return torch.floor(slots.double() * share + 1e-6).to(slots.dtype)


def _minmax(x: Tensor, live: Tensor) -> Tensor:
    low = x.masked_fill(~live, torch.inf).amin(-1, keepdim=True)
    high = x.masked_fill(~live, -torch.inf).amax(-1, keepdim=True)
    return torch.where(high > low, (x - low) / (high - low), 0)
