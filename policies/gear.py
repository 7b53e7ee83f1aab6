"""GEAR: KIVI's codes, plus a low-rank approximation of what they lose, plus the largest and smallest entries as such.

Kang et al., "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM", 2024.
Paper https://arxiv.org/abs/2403.05527, official code https://github.com/opengear-project/GEAR
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.kernels import bounds
from kvbench.kernels.packing import cast
from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.kivi import PerChannel, PerToken
from kvbench.policies.store import Codec, Packed, Where

_LARGEST_CHUNK = 256
"""Indices within a chunk, and of channels, are uint8."""


@dataclass(frozen=True)
class GEAR(Quantizer):
    """X = Q + S + L in chunks of `residual` tokens of one head: codes, sparse outliers, low-rank factors of the rest.

        S: of each channel (keys) or token (values), with n entries, the k smallest and the k largest, as they are
        Q: KIVI's codes of X, whose outliers were replaced by the mean of the n entries
        L = A @ B, of rank r, of E = X - decoded(Q + S):
            P = start [D, r]; `loops` times: P = orthonormal(P) (last time only); A = E @ P;
            A = orthonormal(A) (last time only); P = E^T @ A;  then B = P^T
        decoded = (x of S where there is one, else decoded(Q)) + A @ B

    k = round(outliers * n / 2), at least 1 if outliers > 0. `start` is uniform in [0, 1), the same in every chunk;
    `orthonormal` is that of Gram and Schmidt, with 0 for columns that depend on those before. Factors are taken in
    float64, all else in float32. With T slots, chunks of R, D channels and groups of g, a (row, head) stores codes
    uint8 [T, D*bits/8], factor A fp16 [T, r], basis B fp16 [T/R, r, D], and for keys: place uint8 [T, 1] (of a token in
    its chunk), scale, zero fp16 [T/R, R/g, D], outlier fp16 and outlier_index uint8 [T/R, 2k, D]; for values: scale,
    zero fp16 [T, D/g], outlier fp16 and outlier_index uint8 [T, 2k]. Bits per element of what is packed:

        keys: bits + 32/g + 16 r (1/D + 1/R) + 48 k/R + 8/D        values: bits + 32/g + 16 r (1/D + 1/R) + 48 k/D

    Whole chunks of the full-precision tail are packed, keys and values alike.

    bits: 2 or 4. rank: r; 0: no L. outliers: share of entries in S; 0: none. group_size: g, elements that share a scale
    and a zero point. residual: R, a multiple of group_size, at most 256. loops: power iterations.
    Official settings: 2 bits, rank 4 for the prompt and 2 later, 0.02, groups of 64, buffers of 64 tokens, 3 loops.

    Raises ValueError for fields outside these sets, for a head_dim that is not a multiple of group_size and of 8/bits,
    is smaller than rank or more than 256, and for values whose scale, zero point or outlier is beyond fp16 (65504).

    Deviations. `chunks`: the prompt, too, is factored in chunks, with one rank (official code factors it as a whole),
    so that codes do not depend on how tokens were split into forwards; 128 tokens by default, to share B among more.
    `start`: seeded (there drawn anew each time). `per_head`: k is a share of one head's channels or of a chunk's tokens
    (there of all heads' channels, for both). `levels`: 2**bits - 1 (there bits**2 - 1 in places: the same at 2, not at
    4). `kivi`: the deviations of `KIVI`.

    Example: `GEAR(bits=2).encode(keys, values).decode()` with keys and values [batch, kv_heads, tokens, head_dim].
    """

    bits: int = 2
    rank: int = 4
    outliers: float = 0.02
    group_size: int = 64
    residual: int = 128
    loops: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4):
            raise ValueError(f"GEAR: bits must be 2 or 4, got {self.bits!r}")
        for name, least in (("rank", 0), ("group_size", 2), ("loops", 1)):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"GEAR: {name} must be an int of {least} or more, got {number!r}")
        if isinstance(self.outliers, bool) or not isinstance(self.outliers, (int, float)) or not 0 <= self.outliers < 1:
            raise ValueError(f"GEAR: outliers must be a share of the entries from 0 to below 1, got {self.outliers!r}")
        if not isinstance(self.residual, int) or self.residual not in range(
            self.group_size, _LARGEST_CHUNK + 1, self.group_size
        ):
            raise ValueError(
                f"GEAR: residual must be a multiple of group_size={self.group_size} tokens and at most "
                f"{_LARGEST_CHUNK}, got {self.residual!r}"
            )
        if self.rank > self.residual:
            raise ValueError(f"GEAR: rank must be at most residual={self.residual}, got {self.rank}")

    def check(self, head_dim: int) -> None:
        for divisor, why in ((self.group_size, "group_size"), (8 // self.bits, f"{self.bits}-bit codes per byte")):
            if head_dim % divisor:
                raise ValueError(f"{self}: head_dim={head_dim} is not a multiple of {divisor} ({why})")
        if not self.rank <= head_dim <= _LARGEST_CHUNK:
            raise ValueError(f"{self}: head_dim={head_dim} is not from rank={self.rank} to {_LARGEST_CHUNK}")

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        options = self.bits, self.rank, self.outliers, self.group_size, self.residual, self.loops
        return GEARKeys(*options), GEARValues(*options)

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        whole = tail // self.residual * self.residual
        return whole, whole


@dataclass(frozen=True)
class _Chunk:
    """Decode attention runs in PyTorch: no kernel adds the low-rank factors of a chunk."""

    bits: int
    rank: int
    outliers: float
    group_size: int
    group: int
    loops: int
    first: ClassVar[None] = None

    def _add_low_rank(self, x: Tensor, packed: Packed) -> Tensor:
        """x [N, D] + A @ B, one product at a time: sums then do not depend on which rows stand beside."""
        if self.rank:
            factor, basis = packed.rows["factor"].float(), packed.group_rows("basis")
            for i in range(self.rank):
                x += factor[:, i : i + 1] * basis[:, i]
        return cast(x, packed.dtype)

    def _low_rank(self, x: Tensor, decoded: Tensor) -> tuple[Tensor, Tensor]:
        """A [N, r] and B [N / group, r, D], fp16, of what `decoded` [N, D] lacks."""
        error = (x.double() - decoded.double()).unflatten(0, (-1, self.group))
        basis = _start(x.shape[1], self.rank).to(x.device).expand(len(error), -1, -1)
        for left in reversed(range(self.loops)):
            factor = error @ (basis if left else _orthonormal(basis))
            factor = factor if left else _orthonormal(factor)
            basis = error.mT @ factor
        return factor.flatten(0, 1).half(), cast(basis.mT, torch.float16).contiguous()


@dataclass(frozen=True)
class GEARKeys(_Chunk):
    """Scales and outliers per channel."""

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x = x.float()
        outlier, index, rest = _split(x.unflatten(0, (-1, self.group)), self.outliers)
        place = torch.arange(self.group, dtype=torch.uint8, device=x.device).repeat(len(outlier))[:, None]
        rows, groups = PerChannel(self.bits, self.group_size).encode(rest.flatten(0, 1), where)
        rows["place"] = place
        groups = {k: v.unflatten(0, (len(outlier), -1)) for k, v in groups.items()}
        if self.outliers:
            groups |= {"outlier": outlier, "outlier_index": index}
        if self.rank:
            packed = Packed(self, where.counts, rows, groups, None, torch.float32)
            rows["factor"], groups["basis"] = self._low_rank(x, self._sparse(packed))
        return rows, groups

    def decode(self, packed: Packed) -> Tensor:
        return self._add_low_rank(self._sparse(packed), packed)

    def _sparse(self, packed: Packed) -> Tensor:
        """Q + S, [N, D] float32."""
        place, group_of = packed.rows["place"], packed.group_of
        if group_of is not None:
            group_of = group_of.long() * (self.group // self.group_size) + place[:, 0] // self.group_size
        shared = {name: packed.groups[name].flatten(0, 1) for name in ("scale", "zero")}
        codes = replace(packed, groups=shared, group_of=group_of, dtype=torch.float32)
        x = PerChannel(self.bits, self.group_size).decode(codes)
        if self.outliers:
            outlier, index = packed.group_rows("outlier"), packed.group_rows("outlier_index")
            for i in range(outlier.shape[1]):
                x = torch.where(index[:, i] == place, outlier[:, i].float(), x)
        return x

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8 + 2 * self.rank + 1

    def group_nbytes(self, head_dim: int) -> int:
        affine, sparse = 4 * (self.group // self.group_size), 3 * 2 * _count(self.outliers, self.group)
        return head_dim * (affine + sparse + 2 * self.rank)


@dataclass(frozen=True)
class GEARValues(_Chunk):
    """Scales and outliers per token."""

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x = x.float()
        outlier, index, rest = _split(x, self.outliers)
        rows, groups = PerToken(self.bits, self.group_size).encode(rest, where)
        if self.outliers:
            rows |= {"outlier": outlier, "outlier_index": index}
        if self.rank:
            packed = Packed(self, where.counts, rows, groups, None, torch.float32)
            rows["factor"], groups["basis"] = self._low_rank(x, self._sparse(packed))
        return rows, groups

    def decode(self, packed: Packed) -> Tensor:
        return self._add_low_rank(self._sparse(packed), packed)

    def _sparse(self, packed: Packed) -> Tensor:
        """Q + S, [N, D] float32."""
        x = PerToken(self.bits, self.group_size).decode(replace(packed, dtype=torch.float32))
        if self.outliers:
            x.scatter_(1, packed.rows["outlier_index"].long(), packed.rows["outlier"].float())
        return x

    def row_nbytes(self, head_dim: int) -> int:
        affine, sparse = 4 * (head_dim // self.group_size), 3 * 2 * _count(self.outliers, head_dim)
        return head_dim * self.bits // 8 + affine + sparse + 2 * self.rank

    def group_nbytes(self, head_dim: int) -> int:
        return 2 * self.rank * head_dim


def _count(outliers: float, entries: int) -> int:
    """How many of the smallest, and as many of the largest, are outliers."""
    return min(max(round(outliers * entries / 2), 1), entries // 2) if outliers else 0


def _split(x: Tensor, outliers: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [G, n, ...] -> outliers fp16 and their indices uint8 [G, 2k, ...], and x with the mean in their place."""
    count = _count(outliers, x.shape[1])
    order = x.argsort(dim=1, stable=True)
    index = torch.cat([order[:, :count], order[:, x.shape[1] - count :]], 1)
    outlier = x.gather(1, index).half()
    bounds.half("GEAR stores outliers as fp16, at most 65504; keys or values reach", lambda: x, outlier)
    mean = x.mean(1, keepdim=True, dtype=torch.float64).float()
    return outlier, index.to(torch.uint8), x.scatter(1, index, mean.expand(index.shape))


def _start(channels: int, rank: int) -> Tensor:
    """[D, r] float64."""
    return torch.rand(channels, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _orthonormal(columns: Tensor) -> Tensor:
    """[G, n, r] -> the same span, by Gram and Schmidt; 0 for a column that depends on those before it."""
    done: list[Tensor] = []
    for column in columns.unbind(2):
        rest = column
        for _ in range(2):  # a second pass takes out what rounding has left
            for unit in done:
                rest = rest - (unit * rest).sum(1, keepdim=True) * unit
        norm = rest.norm(dim=1, keepdim=True)
        done.append(torch.where(norm > 1e-6 * column.norm(dim=1, keepdim=True), rest / norm, 0))
    return torch.stack(done, 2)
