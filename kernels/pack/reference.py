"""Rows of keys or values -> codes and scales, in PyTorch: the reference, and the path taken on the CPU.

Letters: N rows (one token of one head each), D channels, g rows that share a scale. All arithmetic is in float32 on the
rows as given, turned by `turn` first if there is one. Every quotient is rounded once, by a true division, and every
code half to even, so that all backends store the same bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvbench.kernels.packing.reference import (
    E2M1_MAX,
    E4M3_MAX,
    E5M2_MAX,
    decode_e4m3,
    divide,
    encode_e2m1,
    encode_e4m3,
    encode_e5m2,
    pack_interleaved,
    pack_planar,
)
from kvbench.kernels.rotation.reference import hadamard

E2M1_BLOCK = 16
"""Channels that share an E4M3 scale."""
_SMALLEST_E4M3 = 2.0**-9
_FLOAT8 = {"e4m3": (E4M3_MAX, encode_e4m3), "e5m2": (E5M2_MAX, encode_e5m2)}


class Turn(NamedTuple):
    """A Hadamard rotation; block and signs as in `kvbench.kernels.rotation.hadamard`."""

    block: int | None = None
    signs: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return hadamard(x, self.block, self.signs)

    def order(self, channels: int) -> int:
        """Of the blocks, for D = channels."""
        return channels & -channels if self.block is None else self.block


def affine_per_channel(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], N a multiple of `group` -> planar codes uint8 [N, D*bits/8], scale and zero fp16 [N/g, D].

    For the `group` rows of a channel:

        zero = fp16(min x)    scale = fp16((max x - min x) / (2**bits - 1))
        code = clamp(round((x - zero) / scale), 0, 2**bits - 1), 0 where scale = 0
    """
    codes, scale, zero = _affine(x.unflatten(0, (x.shape[0] // group, group)), bits, dim=1)
    return pack_planar(codes.flatten(0, 1), bits), scale, zero


def affine_per_token(
    x: Tensor, bits: int, width: int, clip: float = 1.0, turn: Turn | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D] -> planar codes uint8 [N, D*bits/8], scale and zero fp16 [N, D/width]: as above, for `width` channels
    of a row, clamped to clip * [min x, max x] first if clip < 1."""
    x = (x if turn is None else turn(x)).unflatten(1, (-1, width))
    if clip < 1:
        low, high = x.float().aminmax(dim=2, keepdim=True)
        x = x.float().clamp(clip * low, clip * high)
    codes, scale, zero = _affine(x, bits, dim=2)
    return pack_planar(codes.flatten(1), bits), scale, zero


def symmetric_per_token(x: Tensor, bits: int, clip: float = 1.0, turn: Turn | None = None) -> tuple[Tensor, Tensor]:
    """x [N, D] -> planar codes uint8 [N, D*bits/8], scale float32 [N, 1]. With m = 2**(bits - 1) - 1:

    scale = clip * max |x| / m    code = clamp(round(x / scale), -m, m) + m, m where scale = 0
    """
    x = x.float() if turn is None else turn(x)
    top = 2 ** (bits - 1) - 1
    scale = divide(x.abs().amax(1, keepdim=True) * clip, top)
    codes = (x / scale.masked_fill(scale == 0, torch.inf)).round_().clamp_(-top, top).add_(top)
    return pack_planar(codes.to(torch.uint8), bits), scale


def float8(x: Tensor, form: str, scale: float | Tensor) -> Tensor:
    """x [N, D], scale a number or float32 [N, 1] -> codes of x / scale, uint8 [N, D]; form: "e4m3" or "e5m2"."""
    encode = _FLOAT8[form][1]
    return encode(x.float() / scale if isinstance(scale, Tensor) else divide(x.float(), scale))


def float8_per_token(x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """x [N, D] -> codes uint8 [N, D], scale float32 [N, 1] = max |x| / largest; a row of zeros has codes 0."""
    largest, encode = _FLOAT8[form]
    x = x.float()
    scale = divide(x.abs().amax(1, keepdim=True), largest)
    return encode(x / scale.masked_fill(scale == 0, torch.inf)), scale


def e2m1_blocks(x: Tensor, tensor_scale: float, turn: Turn | None = None) -> tuple[Tensor, Tensor]:
    """x [N, D], D a multiple of 16 -> interleaved E2M1 codes uint8 [N, D/2], E4M3 scales uint8 [N, D/16].

    For the 16 channels of a block, a = max |x|:

        scale = e4m3(clamp(a / tensor_scale, 2**-9, 448))    code = e2m1(x / (scale * tensor_scale / 6))

    a = 0 gives scale 1 and codes 0.
    """
    x = (x.float() if turn is None else turn(x)).unflatten(1, (-1, E2M1_BLOCK))
    largest = x.abs().amax(2)
    scale = encode_e4m3(torch.where(largest > 0, divide(largest, tensor_scale).clamp(min=_SMALLEST_E4M3), 1.0))
    codes = encode_e2m1(x / (decode_e4m3(scale) * (tensor_scale / E2M1_MAX))[..., None])
    codes = torch.where(largest[..., None] > 0, codes, 0)  # a block of -0 would give codes 8
    return pack_interleaved(codes.flatten(1), 4), scale


def _affine(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups along `dim` -> codes uint8 like x, scale and zero fp16 without `dim`."""
    x = x.float()
    top = 2**bits - 1
    low, high = x.aminmax(dim=dim, keepdim=True)
    scale, zero = divide(high - low, top).half(), (low + 0.0).half()  # never -0: which zero is the least is not defined
    step = scale.float().masked_fill(scale == 0, torch.inf)  # constant groups: codes 0
    codes = (x - zero.float()).div_(step).round_().clamp_(0, top).to(torch.uint8)
    return codes, scale.squeeze(dim), zero.squeeze(dim)
