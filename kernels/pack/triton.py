"""Rows of keys or values -> codes and scales, in Triton: the very bytes that reference.py gives.

A program reads a few rows (or the group of rows that share scales) and writes their codes and scales; a rotation
happens in its registers. Three things keep the bytes the same on every GPU: quotients are `div_rn`, since `/` is not
rounded correctly; products and sums are not fused (`enable_fp_fusion=False`), which would skip a rounding; and 8-bit
floats are made by integer operations.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.pack.reference import Turn

_TILE = 4096
"""Elements that one program holds."""


def affine_per_channel(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.py."""
    (rows, channels), x = x.shape, x.contiguous()
    codes = x.new_empty((rows, channels * bits // 8), dtype=torch.uint8)
    scale, zero = (x.new_empty((rows // group, channels), dtype=torch.float16) for _ in range(2))
    if rows:
        with torch.cuda.device_of(x):
            channel_kernel[(rows // group,)](
                x, codes, scale, zero, D=channels, BITS=bits, GROUP=group, G2=_padded(group),
                W2=_padded(codes.shape[1]), enable_fp_fusion=False,
            )  # fmt: skip
    return codes, scale, zero


def affine_per_token(
    x: Tensor, bits: int, width: int, clip: float = 1.0, turn: Turn | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.py. A rotation needs width = D."""
    rows, channels = x.shape
    codes = x.new_empty((rows, channels * bits // 8), dtype=torch.uint8)
    scale, zero = (x.new_empty((rows, channels // width), dtype=torch.float16) for _ in range(2))
    _token_codes(x, codes, scale, zero, bits, width, clip, turn)
    return codes, scale, zero


def symmetric_per_token(x: Tensor, bits: int, clip: float = 1.0, turn: Turn | None = None) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    rows, channels = x.shape
    codes = x.new_empty((rows, channels * bits // 8), dtype=torch.uint8)
    scale = x.new_empty((rows, 1), dtype=torch.float32)
    _token_codes(x, codes, scale, None, bits, channels, clip, turn)
    return codes, scale


def float8(x: Tensor, form: str, scale: float | Tensor) -> Tensor:
    """See reference.py."""
    codes = torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)
    if isinstance(scale, Tensor):
        _float8(x, codes, scale.contiguous(), 1.0, form, READS=True, WRITES=False)
    else:
        _float8(x, codes, codes, scale, form, READS=False, WRITES=False)
    return codes


def float8_per_token(x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    codes = torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format)
    scale = x.new_empty((len(x), 1), dtype=torch.float32)
    _float8(x, codes, scale, 1.0, form, READS=False, WRITES=True)
    return codes, scale


def e2m1_blocks(x: Tensor, tensor_scale: float, turn: Turn | None = None) -> tuple[Tensor, Tensor]:
    """See reference.py."""
    (rows, channels), x = x.shape, x.contiguous()
    codes = x.new_empty((rows, channels // 2), dtype=torch.uint8)
    scale = x.new_empty((rows, channels // 16), dtype=torch.uint8)
    if rows:
        tile = _row_tile(channels)
        with torch.cuda.device_of(x):
            e2m1_kernel[(triton.cdiv(rows, tile["R"]),)](
                x, codes, scale, *_turned(x, turn), rows, tensor_scale, tensor_scale / 6.0,
                D=channels, **tile, **_turn_shape(channels, turn), enable_fp_fusion=False,
            )  # fmt: skip
    return codes, scale


def _token_codes(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, width: int, clip: float, turn: Turn | None
) -> None:
    rows, channels = x.shape
    if not rows:
        return
    x, tile = x.contiguous(), _row_tile(channels)
    with torch.cuda.device_of(x):
        token_kernel[(triton.cdiv(rows, tile["R"]),)](
            x, codes, scale, scale if zero is None else zero, *_turned(x, turn), rows, clip,
            D=channels, BITS=bits, WIDTH=width, CLIPS=clip < 1, SYMMETRIC=zero is None, W2=_padded(codes.shape[1]),
            J2=_padded(channels // width), G2=_padded(width), **tile, **_turn_shape(channels, turn),
            enable_fp_fusion=False,
        )  # fmt: skip


def _float8(x: Tensor, codes: Tensor, scale: Tensor, common: float, form: str, **switches: bool) -> None:
    rows, channels = x.shape
    if rows:
        x, tile = x.contiguous(), _row_tile(channels)
        with torch.cuda.device_of(x):
            float8_kernel[(triton.cdiv(rows, tile["R"]),)](
                x, codes, scale, rows, common, D=channels, MANTISSA={"e4m3": 3, "e5m2": 2}[form],
                **tile, **switches, enable_fp_fusion=False,
            )  # fmt: skip


def _padded(n: int) -> int:
    return int(triton.next_power_of_2(n))


def _row_tile(channels: int) -> dict[str, int]:
    return {"R": max(1, _TILE // _padded(channels)), "D2": _padded(channels)}


def _turned(x: Tensor, turn: Turn | None) -> tuple[Tensor, float]:
    """The signs (or anything), and what is multiplied after the sums."""
    block = 1 if turn is None else turn.order(x.shape[1])
    return x if turn is None or turn.signs is None else turn.signs, block**-0.5


def _turn_shape(channels: int, turn: Turn | None) -> dict[str, Any]:
    return {
        "STAGES": 0 if turn is None else turn.order(channels).bit_length() - 1,
        "SIGNS": turn is not None and turn.signs is not None,
        "TURNS": turn is not None,
    }


@triton.jit
def channel_kernel(
    x, codes, scale, zero,
    D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, G2: tl.constexpr, W2: tl.constexpr,
):  # fmt: skip
    """One group of rows, plane by plane: every channel has its own scale and zero."""
    W: tl.constexpr = D * BITS // 8
    TOP: tl.constexpr = 2**BITS - 1
    group = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, G2)
    byte = tl.arange(0, W2)
    inside = (row < GROUP)[:, None] & (byte < W)[None, :]
    at = (group * GROUP + row)[:, None]
    word = tl.zeros([G2, W2], tl.int32)
    for i in tl.static_range(8 // BITS):
        channel = i * W + byte
        part = tl.load(x + at * D + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        low = tl.min(tl.where((row < GROUP)[:, None], part, float("inf")), axis=0)
        high = tl.max(tl.where((row < GROUP)[:, None], part, float("-inf")), axis=0)
        s, z = _affine(low, high, TOP)
        tl.store(scale + group * D + channel, s, mask=byte < W)
        tl.store(zero + group * D + channel, z, mask=byte < W)
        word |= _affine_code(part, s[None, :], z[None, :], TOP) << (BITS * i)
    tl.store(codes + at * W + byte[None, :], word.to(tl.uint8), mask=inside)


@triton.jit
def token_kernel(
    x, codes, scale, zero, signs, factor, rows, clip,
    D: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, CLIPS: tl.constexpr, SYMMETRIC: tl.constexpr,
    W2: tl.constexpr, J2: tl.constexpr, G2: tl.constexpr, R: tl.constexpr, D2: tl.constexpr,
    STAGES: tl.constexpr, SIGNS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """R rows: first the scales of all their groups, then the codes, plane by plane."""
    J: tl.constexpr = D // WIDTH
    W: tl.constexpr = D * BITS // 8
    TOP: tl.constexpr = 2 ** (BITS - 1) - 1 if SYMMETRIC else 2**BITS - 1
    tl.static_assert(J == 1 or not TURNS)
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = row < rows
    start = x + row * D
    group = tl.arange(0, J2)
    if TURNS:
        turned = _hadamard(start, live, signs, factor, D, R, D2, STAGES, SIGNS)
        part = tl.reshape(turned, [R, 1, D2])
    else:
        within = tl.arange(0, G2)[None, None, :]
        inside = live[:, None, None] & ((group[None, :, None] < J) & (within < WIDTH))
        channel = group[None, :, None] * WIDTH + within
        part = tl.load(start[:, None, None] + channel, mask=inside, other=0.0).to(tl.float32)
    within = tl.arange(0, G2)[None, None, :] < WIDTH
    if SYMMETRIC:
        s = tl.max(tl.abs(part), axis=2)
        if CLIPS:
            s = s * clip
        s = tl.div_rn(s, tl.full([R, J2], TOP, tl.float32))
        z = s
    else:
        low = tl.min(tl.where(within, part, float("inf")), axis=2)
        high = tl.max(tl.where(within, part, float("-inf")), axis=2)
        least = clip * low
        most = clip * high
        if CLIPS:  # as clamping every element would
            high, low = tl.minimum(tl.maximum(high, least), most), tl.minimum(tl.maximum(low, least), most)
        s, z = _affine(low, high, TOP)
    entry = row[:, None] * J + group[None, :]
    exists = live[:, None] & (group < J)[None, :]
    tl.store(scale + entry, s, mask=exists)
    if not SYMMETRIC:
        tl.store(zero + entry, z, mask=exists)

    byte = tl.arange(0, W2)
    inside = live[:, None] & (byte < W)[None, :]
    word = tl.zeros([R, W2], tl.int32)
    for i in tl.static_range(8 // BITS):
        channel = (i * W + byte)[None, :]
        there = tl.minimum(channel, D - 1)
        if TURNS:
            part = tl.gather(turned, tl.broadcast_to(there, [R, W2]), axis=1)
        else:
            part = tl.load(start[:, None] + channel, mask=inside, other=0.0).to(tl.float32)
        if SYMMETRIC:
            ratio = tl.div_rn(part, tl.where(s == 0, float("inf"), s))
            word |= (_nearest(tl.minimum(tl.maximum(ratio, -TOP), TOP)) + TOP) << (BITS * i)
        else:
            if CLIPS:
                part = tl.minimum(tl.maximum(part, least), most)
            if J == 1:
                s_of, z_of = s, z
            else:
                of = tl.broadcast_to(there // WIDTH, [R, W2])
                s_of, z_of = tl.gather(s, of, axis=1), tl.gather(z, of, axis=1)
            word |= _affine_code(part, s_of, z_of, TOP) << (BITS * i)
    tl.store(codes + row[:, None] * W + byte[None, :], word.to(tl.uint8), mask=inside)


@triton.jit
def float8_kernel(
    x, codes, scale, rows, common,
    D: tl.constexpr, MANTISSA: tl.constexpr, R: tl.constexpr, D2: tl.constexpr, READS: tl.constexpr,
    WRITES: tl.constexpr,
):  # fmt: skip
    """R rows. scale: of every row, read or written; neither: all rows have the scale `common`."""
    LARGEST: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = row < rows
    channel = tl.arange(0, D2)
    inside = live[:, None] & (channel < D)[None, :]
    tile = tl.load(x + row[:, None] * D + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if WRITES:
        s = tl.div_rn(tl.max(tl.abs(tile), axis=1), tl.full([R], LARGEST, tl.float32))
        tl.store(scale + row, s, mask=live)
        s = tl.where(s == 0, float("inf"), s)
    elif READS:
        s = tl.load(scale + row, mask=live, other=1.0)
    else:
        s = tl.zeros([R], tl.float32) + common
    code = _float8_code(tl.div_rn(tile, tl.broadcast_to(s[:, None], [R, D2])), MANTISSA)
    tl.store(codes + row[:, None] * D + channel[None, :], code.to(tl.uint8), mask=inside)


@triton.jit
def e2m1_kernel(
    x, codes, scale, signs, factor, rows, tensor_scale, step,
    D: tl.constexpr, R: tl.constexpr, D2: tl.constexpr, STAGES: tl.constexpr, SIGNS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """R rows in blocks of 16 channels."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = row < rows
    tile = _hadamard(x + row * D, live, signs, factor, D, R, D2, STAGES, SIGNS)
    tile = tl.reshape(tile, [R, D2 // 16, 16])
    largest = tl.max(tl.abs(tile), axis=2)
    wanted = tl.maximum(tl.div_rn(largest, tl.zeros([R, D2 // 16], tl.float32) + tensor_scale), 0.001953125)
    s = _float8_code(tl.where(largest > 0, wanted, 1.0), 3)
    block = tl.arange(0, D2 // 16)
    inside = live[:, None] & (block < D // 16)[None, :]
    tl.store(scale + row[:, None] * (D // 16) + block[None, :], s.to(tl.uint8), mask=inside)
    # The bits of a positive E4M3, moved, are those of 2**-8 of its value as fp16.
    size = (s << 7).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0 * step
    ratio = tl.div_rn(tile, tl.broadcast_to(size[:, :, None], [R, D2 // 16, 16]))
    code = tl.where(largest[:, :, None] > 0, _e2m1_code(ratio), 0)
    even, odd = tl.split(tl.reshape(code, [R, D2 // 2, 2]))
    byte = tl.arange(0, D2 // 2)
    inside = live[:, None] & (byte < D // 2)[None, :]
    tl.store(codes + row[:, None] * (D // 2) + byte[None, :], (even | (odd << 4)).to(tl.uint8), mask=inside)


@triton.jit
def _hadamard(
    start, live, signs, factor,
    D: tl.constexpr, R: tl.constexpr, D2: tl.constexpr, STAGES: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    """Rows [R, D2] float32, zero beyond D, turned in blocks: sums and differences in the order of the reference."""
    channel = tl.arange(0, D2)
    x = tl.load(start[:, None] + channel[None, :], mask=live[:, None] & (channel < D)[None, :], other=0.0)
    x = x.to(tl.float32)
    if SIGNS:
        x = x * tl.load(signs + channel, mask=channel < D, other=1.0)[None, :]
    BLOCK: tl.constexpr = 2**STAGES
    for _ in tl.static_range(STAGES):
        even, odd = tl.split(tl.reshape(x, [R, D2 // 2, 2]))
        both = tl.reshape(tl.join(even + odd, even - odd), [R, D2 // BLOCK, BLOCK // 2, 2])
        x = tl.reshape(tl.permute(both, (0, 1, 3, 2)), [R, D2])
    return x * factor


@triton.jit
def _affine(low, high, TOP: tl.constexpr):
    """Scale and zero, fp16."""
    return tl.div_rn(high - low, tl.zeros_like(low) + TOP).to(tl.float16), (low + 0.0).to(tl.float16)


@triton.jit
def _affine_code(x, scale, zero, TOP: tl.constexpr):
    scale = scale.to(tl.float32)
    ratio = tl.div_rn(x - zero.to(tl.float32), tl.zeros_like(x) + tl.where(scale == 0, float("inf"), scale))
    return _nearest(tl.minimum(tl.maximum(ratio, 0.0), TOP))


@triton.jit
def _nearest(x):
    """The nearest integer of |x| < 2**22, half to even: the low bits of a sum too large for fractions."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _float8_code(x, MANTISSA: tl.constexpr):
    """E4M3 (MANTISSA 3) or E5M2 (2), saturating."""
    LARGEST: tl.constexpr = 448.0 if MANTISSA == 3 else 57344.0
    SMALLEST: tl.constexpr = 2.0**-6 if MANTISSA == 3 else 2.0**-14  # that is normal
    BIAS: tl.constexpr = 7 if MANTISSA == 3 else 15
    DROPPED: tl.constexpr = 23 - MANTISSA
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    rounded = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED
    tiny = _nearest(size * (2**MANTISSA / SMALLEST))
    code = tl.where(size >= SMALLEST, rounded - ((127 - BIAS) << MANTISSA), tiny)
    return code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def _e2m1_code(x):
    """Steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6; the sign in bit 3."""
    size = tl.minimum(tl.abs(x), 6.0)
    code = tl.minimum(_nearest(size * 2), tl.minimum(_nearest(size) + 2, _nearest(size * 0.5) + 4))
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)
