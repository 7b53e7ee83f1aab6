"""Packed number formats in PyTorch: the reference every kernel is tested against, and the path taken on the CPU.

A code is an unsigned integer of `bits` bits, one per channel, given as uint8. All packing runs along the last dim (the
channels D), so that one token is one run of bytes and dropping a token never touches the bits of another.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

E4M3_MAX = 448.0
E5M2_MAX = 57344.0
E2M1_MAX = 6.0

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def pack_planar(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [..., D], each below 2**bits -> uint8 [..., D*bits/8]; bits 1, 2, 4 or 8.

    With P = 8/bits planes, byte j holds channels j + i*D/P at bits [bits*i, bits*i + bits), i = 0..P-1: unpacking is
    one shift and mask per plane, and a plane is a contiguous run of channels. Raises ValueError if D % P != 0.
    """
    planes = codes.unflatten(-1, (_per_byte(bits, codes.shape[-1]), -1))
    packed = torch.zeros_like(planes[..., 0, :], memory_format=torch.contiguous_format)
    for i in range(planes.shape[-2]):
        packed |= planes[..., i, :] << bits * i
    return packed


def unpack_planar(packed: Tensor, bits: int) -> Tensor:
    """uint8 [..., D*bits/8] -> codes uint8 [..., D]; undoes `pack_planar`."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in _shifts(bits)], dim=-1)


def pack_interleaved(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [..., D], each below 2**bits -> uint8 [..., D*bits/8]; bits 1, 2, 4 or 8.

    With P = 8/bits, byte j holds channels P*j + i at bits [bits*i, bits*i + bits): at 4 bits the even channel is the
    low nibble (NVFP4's layout). Raises ValueError if D % P != 0.
    """
    neighbours = codes.unflatten(-1, (-1, _per_byte(bits, codes.shape[-1])))
    packed = torch.zeros_like(neighbours[..., 0], memory_format=torch.contiguous_format)
    for i in range(neighbours.shape[-1]):
        packed |= neighbours[..., i] << bits * i
    return packed


def unpack_interleaved(packed: Tensor, bits: int) -> Tensor:
    """uint8 [..., D*bits/8] -> codes uint8 [..., D]; undoes `pack_interleaved`."""
    return torch.stack([(packed >> shift) & (2**bits - 1) for shift in _shifts(bits)], dim=-1).flatten(-2)


def to_kivi_int32(packed: Tensor, bits: int, keys: bool) -> Tensor:
    """Planar rows uint8 [..., T, D*bits/8] -> int32 words as jy-yuan/KIVI stores them (for export only).

    Word w holds elements w*32/bits + i at bits [bits*i, bits*i + bits), lowest first: keys along tokens after a
    transpose, [..., D, T*bits/32]; values along channels, [..., T, D*bits/32]. Raises ValueError if the last word would
    not be full.
    """
    codes = unpack_planar(packed, bits)
    if keys:
        codes = codes.transpose(-1, -2)
    if codes.shape[-1] * bits % 32:
        what = "tokens" if keys else "channels"
        raise ValueError(f"KIVI packs {32 // bits} {what} into a word; {codes.shape[-1]} do not fill whole words")
    return pack_interleaved(codes, bits).view(torch.int32)  # four bytes, lowest first: all supported machines


def from_kivi_int32(words: Tensor, bits: int, keys: bool) -> Tensor:
    """int32 words as jy-yuan/KIVI stores them -> planar rows uint8 [..., T, D*bits/8]; undoes `to_kivi_int32`."""
    codes = unpack_interleaved(words.contiguous().view(torch.uint8), bits)
    return pack_planar(codes.transpose(-1, -2) if keys else codes, bits)


def encode_e2m1(x: Tensor) -> Tensor:
    """x -> E2M1 codes, uint8 of the same shape: sign in bit 3, magnitude {0, .5, 1, 1.5, 2, 3, 4, 6} in bits 0-2.

    Rounds to nearest, ties to even, and saturates at 6. The sign of a value that rounds to zero is kept (code 8 is -0),
    as the conversion instructions of GPUs do.
    """
    x = x.float()
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    # A code counts steps: of 1/2 up to 2, of 1 up to 4, of 2 beyond. Each product is exact, and rounding a code half to
    # even is what the format asks for, since an even code ends in a zero bit.
    codes = (magnitude * 2).round_()
    torch.minimum(codes, magnitude.round().add_(2), out=codes)
    torch.minimum(codes, magnitude.mul_(0.5).round_().add_(4), out=codes)
    return codes.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(packed: Tensor) -> Tensor:
    """Interleaved E2M1 codes uint8 [..., D/2] -> float32 [..., D], exact."""
    pairs = _e2m1_pairs(packed.device).index_select(0, packed.flatten().int())
    return pairs.view(torch.float32).view(*packed.shape[:-1], 2 * packed.shape[-1])


@lru_cache(maxsize=4)
def _e2m1_pairs(device: torch.device) -> Tensor:
    """[256] what each byte decodes to: two float32 values, looked up as one 8-byte entry."""
    values = torch.tensor([*_E2M1, *(-x for x in _E2M1)], dtype=torch.float32, device=device)
    codes = unpack_interleaved(torch.arange(256, dtype=torch.uint8, device=device)[:, None], 4)
    return values[codes.int()].view(torch.float64)[:, 0]


def encode_e4m3(x: Tensor) -> Tensor:
    """x -> bytes of float8 E4M3FN, uint8 of the same shape; nearest, ties to even, saturating at +-448.

    The clamp is explicit: what the bare cast does beyond 448 (NaN or saturation) depends on the PyTorch version.
    """
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: Tensor) -> Tensor:
    """Bytes of float8 E4M3FN, uint8 -> float32 of the same shape, exact for all finite codes."""
    if codes.device.type != "cpu":
        return codes.view(torch.float8_e4m3fn).float()
    # As fp16 the same bits mean 2**-8 of the value, once the sign has made room for a wider exponent. Far faster than
    # the cast.
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    return bits.view(torch.float16).float().mul_(256)


def encode_e5m2(x: Tensor) -> Tensor:
    """x -> bytes of float8 E5M2, uint8 of the same shape; nearest, ties to even, saturating at +-57344."""
    return x.float().clamp(-E5M2_MAX, E5M2_MAX).to(torch.float8_e5m2).view(torch.uint8)


def decode_e5m2(codes: Tensor) -> Tensor:
    """Bytes of float8 E5M2, uint8 -> float32 of the same shape, exact."""
    return codes.view(torch.float8_e5m2).float()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 -> dtype, saturating: a decoded value may lie one rounding step past the largest finite float16."""
    if dtype == torch.float16:
        x = x.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return x.to(dtype)


def divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded once on every device, so that stored bytes agree: CUDA would multiply by 1 / by."""
    return x / x.new_full((), by)


def _per_byte(bits: int, channels: int) -> int:
    per_byte = len(_shifts(bits))
    if channels % per_byte:
        raise ValueError(f"{bits}-bit codes go {per_byte} to a byte; {channels} channels do not fill whole bytes")
    return per_byte


def _shifts(bits: int) -> range:
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"bits must be 1, 2, 4 or 8, got {bits}")
    return range(0, 8, bits)
