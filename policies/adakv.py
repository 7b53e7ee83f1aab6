"""AdaKV: one budget for all heads of a layer, spread by where the best scores are (Feng et al., NeurIPS 2025).

Paper https://arxiv.org/abs/2407.11550, official code https://github.com/FFY0/AdaKV
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbench.policies.interface import KV, Step, Wrapper


@dataclass(frozen=True)
class AdaKV(Wrapper):
    """Lets the heads of a layer keep different numbers of slots; within a head, `base` scores and protects as ever.

    Of R slots to give, b = R / H per head, besides those that `base` protects in every head:

        count[b, h] = how many of the R best scores of all heads together are head h's
        slots[b, h] = protected[b, h] + f + count[b, h] * (1 - f / b)        f = floor(floor * b)      int64 [B, H]

    Fractions are rounded by largest remainder, so that the slots of a layer sum to H times the budget. Equal scores
    count for the most recent slot first. Bytes are freed for real: heads are held flat, without dead rows.

    base: an evictor with scores per head, e.g. SnapKV(0.25); budget, memory and block are its own. floor: share of the
    budget that every head gets, from 0 to 1; 1 = the same in all heads.
    Acts: when its base does. At a decode step the slots to drop are those with the lowest scores of all heads, as long
    as their head keeps f.
    Raises TypeError if base is no evictor; ValueError when constructed with a bad floor, or with a base that keeps the
    same slots in all heads (StreamingLLM, TOVA).

    Official defaults: floor 0.2, around SnapKV with window 32, kernel 7, max.
    Deviations. `exact`: official sums may be off by rounding. `unscaled`: official code can first multiply each head's
    scores by the share of its mass that its b best hold; here they are compared as they are. `decode`: official code
    never evicts while decoding; spreading anew from what earlier steps left would pull the heads together. `bytes`:
    with memory= and a quantizer, heads are counted with their own groups and windows, and all lowered until they fit.
    """

    floor: float = 0.2

    ragged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ragged", True)
        if isinstance(self.floor, bool) or not isinstance(self.floor, (int, float)) or not 0 <= self.floor <= 1:
            raise ValueError(f"AdaKV: floor must be a share of the budget from 0 to 1, got {self.floor!r}")
        if self.base.shared_over_heads:
            raise ValueError(f"AdaKV: base must score each head by itself, but {self.base} keeps the same in all heads")

    def head_slots(self, score: Tensor, kv: KV, step: Step, slots: Tensor, protected: Tensor | None) -> Tensor:
        heads = kv.keys.shape[1]
        live = (kv.position >= 0).expand(-1, heads, -1)
        shield = torch.zeros_like(live) if protected is None else live & protected
        reserved, room = shield.sum(-1), (live & ~shield).sum(-1)
        ranked = _places(score, kv, live & ~shield).sort(-1).values

        def split(mean: Tensor) -> Tensor:
            return reserved + self._allot(mean * heads - reserved.sum(1, keepdim=True), ranked, room, step.decoding)

        if self.memory is None or step.quantizer is None:
            return split(slots)
        # Groups and windows make a head's bytes no linear function of its slots: a split can take more than equal heads
        # do, which fit. The mean is lowered until it does not.
        limit = self._limit(kv, step)
        fitting, mean = slots.expand(-1, heads), slots
        low, high = torch.full_like(slots, self.min_slots - 1), slots + 1
        while bool((high - low > 1).any()):
            tried = split(mean)
            fits = self.head_nbytes(tried, kv, step).sum(1, keepdim=True) <= limit
            fitting = torch.where(fits, tried, fitting)
            low, high = torch.where(fits, mean, low), torch.where(fits, high, mean)
            mean = torch.minimum((low + high + 1) // 2, slots)
        return fitting

    def _allot(self, total: Tensor, ranked: Tensor, room: Tensor, decoding: bool) -> Tensor:
        """[B, H]: how many of `room` [B, H] slots each head keeps; they sum to total [B, 1], or to all there are.

        ranked [B, H, S]: the places of a head's slots in the order of all heads, ascending.
        """
        heads = room.shape[1]
        total = torch.minimum(total, room.sum(1, keepdim=True)).clamp(min=0)
        floor = torch.floor(total.double() * self.floor / heads + 1e-6).to(torch.int64)
        sure = floor
        if not decoding:
            shared = total - heads * floor
            count = (ranked < total[..., None]).sum(-1)
            whole, remainder = count * shared // total.clamp(min=1), count * shared % total.clamp(min=1)
            # Equal remainders: the head whose next slot is the better one.
            following = F.pad(ranked, (0, 1), value=ranked[0].numel()).gather(-1, (floor + whole)[..., None])[..., 0]
            turn = (remainder * (ranked[0].numel() + 1) - following).argsort(dim=-1, descending=True, stable=True)
            more = torch.arange(heads, device=turn.device) < shared - whole.sum(1, keepdim=True)
            sure = floor + whole + torch.zeros_like(whole).scatter(1, turn, more.long())
        sure = torch.minimum(sure, room)
        left = total - sure.sum(1, keepdim=True)
        if not bool(left.any()):
            return sure
        # What heads with fewer slots than that leave over, and all of a decode step's: to the best slots not yet in.
        end = ranked[0].numel()
        others = ranked.masked_fill(torch.arange(ranked.shape[-1], device=ranked.device) < sure[..., None], end)
        first_out = F.pad(others.flatten(1).sort(-1).values, (0, 1), value=end).gather(1, left)
        return sure + (others < first_out[..., None]).sum(-1)

    def _limit(self, kv: KV, step: Step) -> Tensor:
        """[B, 1] bytes that this layer may take: what is allowed, more or less where `base` gives layers unequally."""
        limits = []
        for prompt in step.prompt.tolist():
            mean, most = torch.tensor(self._slots_for_bytes(prompt, kv, step)), torch.tensor(prompt)
            planned = self.head_nbytes(self.spread(mean, most, step.layers).clamp(max=prompt), kv, step)
            held = self.counted(step)
            extra = int(planned[step.order]) - int(planned[held].sum()) // len(held)
            limits.append(self.allowed_nbytes(prompt, kv, step) + extra * kv.keys.shape[1])
        return torch.tensor(limits, device=step.prompt.device)[:, None]


def _places(score: Tensor, kv: KV, free: Tensor) -> Tensor:
    """[B, H, S] int64: place of each slot in one order of all heads' slots, 0 = best; slots not `free` come last."""
    position = kv.position.expand_as(free).flatten(1)
    key = score.float().clamp(min=torch.finfo(torch.float32).min).expand_as(free).masked_fill(~free, -torch.inf)
    newest = position.argsort(dim=-1, descending=True, stable=True)
    order = newest.gather(1, key.flatten(1).gather(1, newest).argsort(dim=-1, descending=True, stable=True))
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place).view_as(free)
