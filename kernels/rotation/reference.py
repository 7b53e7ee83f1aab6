"""Rotations of heads in PyTorch: the reference, and the path taken on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, shift: Tensor, inverse_frequency: Tensor) -> Tensor:
    """Turns RoPE'd x [B, H, S, D] by `shift` [B, H or 1, S] positions; inverse_frequency [R/2], the first R dims turn.

    Half-split layout: dims j and j + R/2 form a pair. Angles in float32; shift 0 returns the same values.
    """
    half = len(inverse_frequency)
    angle = shift[..., None].float() * inverse_frequency.to(x.device)
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1)


def hadamard(x: Tensor, block: int | None = None, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """x [..., D] times a block-diagonal orthonormal Hadamard matrix: [..., D] float32.

    block: order of the blocks, a power of two that divides D (default: the largest). signs [D] of +-1: the channels are
    multiplied by them first, which makes the rotation a random one. The Hadamard matrix is symmetric and its own
    inverse; with signs, `inverse` undoes what was done. Raises ValueError for a block that does not fit.
    """
    channels = x.shape[-1]
    block = channels & -channels if block is None else block
    if block < 1 or block & (block - 1) or channels % block:
        raise ValueError(f"a Hadamard block must be a power of two that divides head_dim={channels}, got {block}")
    x = x.float()
    if signs is not None and not inverse:
        x = x * signs
    # Sums and differences of neighbours, log2(block) times. Unlike a matrix product, whose order of summation depends
    # on the number of rows, this gives a row the same bits on every device, whatever it is encoded with.
    lines = x.reshape(-1, block).T.contiguous()
    for _ in range(block.bit_length() - 1):
        even, odd = lines[::2], lines[1::2]
        lines = torch.cat([even + odd, even - odd])
    x = (lines.T.contiguous() * block**-0.5).view(x.shape)
    return x * signs if signs is not None and inverse else x
