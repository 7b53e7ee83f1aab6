"""Kitty: 2-bit keys per channel, of which the largest channels of each page get 4 bits, and 2-bit values per token.

Xia et al., "Kitty: Accurate and Efficient 2-bit KV Cache Quantization with Dynamic Channel-wise Precision Boost",
MLSys 2026. Paper https://arxiv.org/abs/2511.18643, official code https://github.com/Summer-Summer/Kitty
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbench.kernels import bounds
from kvbench.kernels.packing import cast, pack_planar, unpack_planar
from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.kivi import PerToken
from kvbench.policies.store import Codec, Packed, Where

_MOST_BOOSTED = 255
"""The index of a page is uint8, and one more value says that a channel is not boosted."""


@dataclass(frozen=True)
class Kitty(Quantizer):
    """Affine min-max codes; in each page of keys, n = floor(boosted * D) channels are stored with 4 bits instead of 2.

    For one channel x of a page of `page` keys, in float32, with bits = 4 if its mean |x| is among the n largest of the
    page (of equals, the first channel wins), else 2:

        zero = fp16(min x)        scale = fp16((max x - min x) / (2**bits - 1))
        code = clamp(round((x - zero) / scale), 0, 2**bits - 1)        decoded = code * scale + zero

    Rounding is half to even, and scale = 0 (a constant channel) gives codes 0. The two lower bits of all channels form
    a dense plane, the two upper bits of boosted channels a packed one, whose column i is the channel of rank i. Values
    are 2-bit codes of the same formula, over the D channels of a token. Per (row, head) with T slots of D channels,
    keys store low uint8 [T, D/4], high uint8 [T, n/4] (rounded up), and per page index uint8 [T/page, D] (each
    channel's column in `high`, n: not boosted), scale and zero fp16 [T/page, D]: 2 + 2n/D + 40/page bits per element,
    2.8125 for a quarter of 128 channels. Values store codes uint8 [T, D/4], scale and zero fp16 [T, 1]: 2 + 32/D bits,
    2.25 at D = 128. Of a full-precision tail, whole pages of keys are packed at once, and of values whole pages among
    those older than the newest `residual`.

    boosted: share of the channels. page: tokens of keys that share scales. residual: newest values in full precision.
    Official defaults: 0.25, 128, 128 and 32 sinks; the simulation for accuracy has 0.2.

    Raises ValueError for a share that is not between 0 and 1, for a page or residual that is not a count of tokens, for
    a head_dim that is not a multiple of 4 or whose n is not in 1..255, and for a scale or zero point beyond fp16.

    Deviations. `planar`: codes are packed along channels for keys, too (official code packs keys along tokens), so that
    a token can leave. `rounded_scale`: codes are taken against the rounded scale and zero (there against those before
    rounding). `constant`: scale 0 for constant groups (there at least 1e-6). `half_even`: ties go to the even code
    (there up). `fp32`: whatever the model's dtype (there the model's).

    Example: `Kitty().encode(keys, values).decode()` with keys and values [batch, kv_heads, tokens, head_dim].
    """

    boosted: float = 0.25
    page: int = 128
    residual: int = 128
    sinks: int = field(default=32, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.boosted, bool) or not isinstance(self.boosted, (int, float)) or not 0 < self.boosted < 1:
            raise ValueError(f"Kitty: boosted must be a share of the channels between 0 and 1, got {self.boosted!r}")
        for name, tokens, least in (("page", self.page, 1), ("residual", self.residual, 0)):
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < least:
                raise ValueError(f"Kitty: {name} must be an int of {least} or more tokens, got {tokens!r}")

    def check(self, head_dim: int) -> None:
        if head_dim % 4:
            raise ValueError(f"{self}: head_dim={head_dim} is not a multiple of 4 (2-bit codes per byte)")
        count = _count(self.boosted, head_dim)
        if not 1 <= count <= _MOST_BOOSTED:
            raise ValueError(
                f"{self}: boosted={self.boosted} of head_dim={head_dim} is {count} channels; "
                f"it must be 1 to {_MOST_BOOSTED}"
            )

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        return BoostedChannels(self.boosted, self.page), WholeToken()

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        return tail // self.page * self.page, (tail - self.residual).clamp(min=0) // self.page * self.page


@dataclass(frozen=True)
class BoostedChannels:
    """Keys: every channel of a page has its own scale and zero point, and 2 bits or 4.

    Decode attention runs in PyTorch: where the upper bits of a channel stand depends on the page, and a kernel would
    have to gather them byte by byte.
    """

    boosted: float
    group: int
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x = x.float().unflatten(0, (x.shape[0] // self.group, self.group))
        count = _count(self.boosted, x.shape[2])
        # In float64 the sums do not depend on the order of the summands, so that neither does the ranking.
        magnitude = x.abs().sum(1, dtype=torch.float64)
        chosen = magnitude.argsort(dim=1, descending=True, stable=True)[:, :count]
        rank = torch.arange(count, dtype=torch.uint8, device=x.device).expand_as(chosen)
        index = torch.full_like(magnitude, count, dtype=torch.uint8).scatter_(1, chosen, rank)
        top = torch.where(index < count, 15.0, 3.0)
        low, high = x.aminmax(dim=1)
        scale, zero = ((high - low) / top).half(), low.half()
        bounds.half("Kitty stores scale and zero point as fp16, at most 65504; keys reach", lambda: x, scale, zero)
        step = scale.float().masked_fill(scale == 0, torch.inf)[:, None]  # constant groups: codes 0
        codes = (x - zero.float()[:, None]).div_(step).round_().clamp_(min=0)
        codes = torch.minimum(codes, top[:, None]).to(torch.uint8)
        upper = (codes >> 2).gather(2, chosen[:, None].expand(-1, self.group, -1)).flatten(0, 1)
        rows = {
            "low": pack_planar((codes & 3).flatten(0, 1), 2),
            "high": pack_planar(F.pad(upper, (0, -count % 4)), 2),
        }
        return rows, {"index": index, "scale": scale, "zero": zero}

    def decode(self, packed: Packed) -> Tensor:
        upper = F.pad(unpack_planar(packed.rows["high"], 2), (0, 1))  # channels that are not boosted read a zero
        upper = upper.gather(1, packed.group_rows("index").long())
        x = (unpack_planar(packed.rows["low"], 2) | (upper << 2)).float()
        return cast(x.mul_(packed.group_rows("scale")).add_(packed.group_rows("zero")), packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim // 4 + -(-_count(self.boosted, head_dim) // 4)

    def group_nbytes(self, head_dim: int) -> int:
        return 5 * head_dim


@dataclass(frozen=True)
class WholeToken:
    """Values: 2-bit codes with one scale and zero point for all channels of a token."""

    group: ClassVar[int] = 1
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return PerToken(2, x.shape[1]).encode(x, where)

    def decode(self, packed: Packed) -> Tensor:
        return PerToken(2, 4 * packed.rows["codes"].shape[1]).decode(packed)

    def row_nbytes(self, head_dim: int) -> int:
        return PerToken(2, head_dim).row_nbytes(head_dim)

    def group_nbytes(self, head_dim: int) -> int:
        return 0


def _count(boosted: float, head_dim: int) -> int:
    """Boosted channels; the small term keeps a share such as 0.3 of 10 channels from losing one to rounding."""
    return int(boosted * head_dim + 1e-6)
