"""Attention products with affine codes, plane by plane: scales go to the small side of each product where they can.

A decoded row is k = code * scale + zero. Codes are packed in planes (`kvbench.kernels.packing.pack_planar`): plane i is
a run of channels, and masking it in place leaves code * 2**(bits*i), a power of two that is folded in as well.

    per channel, group of tokens c:   q . k_t = q . (scale_c * code_t) + q . zero_c
    per token, channels in groups j:  q . k_t = sum_j scale_tj (q_j . code_tj) + zero_tj sum(q_j)
                                      out_j   = sum_t (w_t scale_tj) code_tj + w_t zero_tj

Letters: L lists, n tokens of each list, M queries, D channels, g tokens of a group, J groups of channels of a token.
Everything is float32. More lists and tokens than fit into the processor's cache are better given in several calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor


def scores_per_channel(query: Tensor, codes: Tensor, bits: int, scale: Tensor, zero: Tensor) -> Tensor:
    """query [L, M, D], codes uint8 [L, n, D*bits/8], scale and zero [L, n/g, D] -> [L, M, n]."""
    lists, tokens = codes.shape[:2]
    total = (query @ zero.float().transpose(1, 2)).repeat_interleave(tokens // zero.shape[1], 2)
    scale = scale.float()[:, :, None]
    for plane, weight, part in _chunks(codes, bits, query.shape[-1]):
        # Scaling the query would leave one small product per group, which takes longer.
        plane.view(lists, scale.shape[1], -1, plane.shape[-1]).mul_(scale[..., part])
        total.baddbmm_(query[..., part], plane.transpose(1, 2), alpha=weight)
    return total


def scores_per_token(query: Tensor, codes: Tensor, bits: int, scale: Tensor, zero: Tensor) -> Tensor:
    """query [L, M, D], codes uint8 [L, n, D*bits/8], scale and zero [L, n, J] -> [L, M, n]."""
    channels, width = query.shape[-1], query.shape[-1] // scale.shape[-1]
    scale, zero = (x.float().transpose(1, 2).contiguous() for x in (scale, zero))  # [L, J, n]
    total = query.unflatten(-1, (-1, width)).sum(-1) @ zero
    if scale.shape[1] == 1:  # one group: scaled once, after the sum over planes
        product = total.new_zeros(total.shape)
        for plane, weight, part in _chunks(codes, bits, channels):
            product.baddbmm_(query[..., part], plane.transpose(1, 2), alpha=weight)
        return total.addcmul_(product, scale)
    for plane, weight, part in _chunks(codes, bits, width):
        total.addcmul_(query[..., part] @ plane.transpose(1, 2), scale[:, part.start // width, None], value=weight)
    return total


def mix_per_token(weights: Tensor, codes: Tensor, bits: int, scale: Tensor, zero: Tensor) -> Tensor:
    """weights [L, M, n], codes uint8 [L, n, D*bits/8], scale and zero [L, n, J] -> [L, M, D]."""
    channels = codes.shape[-1] * 8 // bits
    width = channels // scale.shape[-1]
    total = (weights @ zero.float()).repeat_interleave(width, -1)
    scale = scale.float().transpose(1, 2).contiguous()[:, :, None]  # [L, J, 1, n]
    for plane, weight, part in _chunks(codes, bits, width):
        total[..., part] += (weights * scale[:, part.start // width]) @ plane * weight
    return total


def _chunks(codes: Tensor, bits: int, width: int) -> Iterator[tuple[Tensor, float, slice]]:
    """Runs of channels inside one plane and one group of `width` channels: float codes * 2**(bits*i), 2**(-bits*i), and
    which channels they are. Codes are the caller's until the next ones are asked for."""
    channels = codes.shape[-1]
    size = gcd(channels, width)
    masked, plane = torch.empty_like(codes), torch.empty(codes.shape, device=codes.device)  # fresh memory costs more
    for i in range(8 // bits):
        plane.copy_(codes if bits == 8 else torch.bitwise_and(codes, (2**bits - 1) << bits * i, out=masked))
        for start in range(0, channels, size):
            first = channels * i + start
            yield plane[..., start : start + size], 2.0 ** (-bits * i), slice(first, first + size)
