"""TurboQuant: a norm and Lloyd-Max codes of the randomly rotated direction, 1 to 4 bits per channel.

Zandieh et al., "TurboQuant: Online Vector Quantization with Near-optimal Distortion Rate", ICLR 2026,
https://arxiv.org/abs/2504.19874; no official code; as a KV-cache format in https://github.com/vllm-project/vllm.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.kernels.decode import Coded, Format
from kvbench.kernels.pack import Out, Turn, table_per_token
from kvbench.kernels.packing import unpack_planar
from kvbench.policies.int_token import Rotated
from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.store import Codec, Packed, Where

# Positive halves of the codebooks that minimise the mean squared error of a standard normal variable (Lloyd-Max).
_CENTROIDS = {
    1: (0.797885,),
    2: (0.452780, 1.510418),
    3: (0.245094, 0.756005, 1.343909, 2.151946),
    4: (0.128395, 0.388048, 0.656759, 0.942340, 1.256231, 1.618046, 2.069017, 2.732590),
}


@dataclass(frozen=True)
class TurboQuant(Quantizer):
    """The nearest of 2**bits fixed centroids for every channel of the rotated unit vector; nothing is calibrated.

    For a row x of D channels, in float32, with R = H diag(signs), H the orthonormal Hadamard matrix:

        norm = ||R x||        y = sqrt(D) * R x / norm        code = index of the centroid nearest to y
        decoded = R^T (fp16(norm) / sqrt(D) * centroid[code])           norm_correction: ||centroid[code]|| for sqrt(D)

    The centroids are the Lloyd-Max codebook of N(0, 1), symmetric and ascending; a y halfway between two goes to the
    upper. Per (row, head) with T slots it stores norm fp16 [T, 1] and codes uint8 [T, D*bits/8]; 3-bit codes as their
    lower two bits, codes uint8 [T, D/4], and their upper bit, high uint8 [T, D/8]: bits + 16/D bits per element.

    bits: 1 to 4. vLLM: 3 or 4.
    norm_correction: decoded rows have the norm that is stored ("nc"); else they are shorter, as is optimal for the
        squared error. vLLM: true.
    seed: of the signs, the same for all layers, heads and tokens; None: no signs, as in later versions of vLLM.
    boundary: so many first and so many last layers stay in full precision. Paper: 0; vLLM: 2.

    Raises ValueError for fields outside these sets, for a head_dim whose codes do not fill bytes, and for rows whose
    norm is beyond fp16 (65504).

    Deviations. `hadamard`: the paper rotates by a random orthogonal matrix; a signed Hadamard matrix (vLLM) does as
    well, in blocks of the largest power of two that divides D. `gaussian`: codebooks of the normal distribution, which
    the paper's Beta distribution of a rotated coordinate approaches. `mse`: the paper's variant for inner products adds
    one bit of the residual's sign (QJL); vLLM and others left it out. `values`: vLLM's presets code values by min-max:
    `TurboQuant(4, norm_correction=True).keys & IntToken(4).values` is its turboquant_4bit_nc.

    Example: `TurboQuant(bits=4).encode(keys, values).decode()`, each [batch, kv_heads, tokens, head_dim].
    """

    bits: int = 4
    norm_correction: bool = False
    seed: int | None = 0
    boundary: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.bits, bool) or self.bits not in _CENTROIDS:
            raise ValueError(f"TurboQuant: bits must be 1, 2, 3 or 4, got {self.bits!r}")
        if not isinstance(self.norm_correction, bool):
            raise ValueError(f"TurboQuant: norm_correction must be true or false, got {self.norm_correction!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise ValueError(f"TurboQuant: seed must be an int, or None for no signs, got {self.seed!r}")
        if isinstance(self.boundary, bool) or not isinstance(self.boundary, int) or self.boundary < 0:
            raise ValueError(f"TurboQuant: boundary must be an int of 0 or more layers, got {self.boundary!r}")

    def check(self, head_dim: int) -> None:
        per_byte = {1: 8, 2: 4, 3: 8, 4: 2}[self.bits]
        if head_dim % per_byte:
            raise ValueError(
                f"{self}: head_dim={head_dim} is not a multiple of {per_byte}, to fill bytes with {self.bits}-bit codes"
            )

    def codecs(self, step: Step | None = None) -> tuple[Codec | None, Codec | None]:
        if step is not None and min(step.order, step.layers - 1 - step.order) < self.boundary:
            return None, None
        codec = Rotated(LloydMax(self.bits, self.norm_correction), seed=self.seed)
        return codec, codec


@dataclass(frozen=True)
class LloydMax:
    """The norm of each row, and its channels as if the unit vector's were normal variables of variance 1/D."""

    bits: int
    norm_correction: bool
    group: ClassVar[int] = 1
    first: ClassVar[None] = None
    writes: ClassVar[bool] = True

    def encode(self, x: Tensor, where: Where, out: Out = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.encode_turned(x, where, None, out)

    def encode_turned(
        self, x: Tensor, where: Where, turn: Turn | None, out: Out = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        found = table_per_token(x, _codebook(self.bits, x.device), self.bits, turn, out)
        return dict(zip(("norm", "codes", "high"), found, strict=False)), {}

    def decode(self, packed: Packed) -> Tensor:
        rows, _ = self._rows(packed)
        length = _norm(rows) if self.norm_correction else rows.shape[1] ** 0.5
        return _by_byte(rows, self.bits, back=True).mul_(packed.rows["norm"].float() / length)

    def scores(self, packed: Packed, query: Tensor) -> Tensor:
        rows, factor = self._rows(packed)
        product = _by_byte(query, self.bits) @ rows.view(len(query), -1, rows.shape[1]).transpose(1, 2)
        return product.mul_(factor.view(len(query), 1, -1))

    def mix(self, packed: Packed, weights: Tensor) -> Tensor:
        rows, factor = self._rows(packed)
        weights = weights * factor.view(len(weights), 1, -1)
        return _by_byte(weights @ rows.view(len(weights), -1, rows.shape[1]), self.bits, back=True)

    def coded(self, packed: Packed) -> Coded:
        codes = packed.rows["codes"]
        channels, table = codes.shape[1] * 8 // (2 if self.bits == 3 else self.bits), _codebook(self.bits, codes.device)
        unit = 1.0 if self.norm_correction else channels**-0.5
        form = Format("lut", self.bits, "token", channels, normalized=self.norm_correction)
        return Coded(form, codes, packed.rows["norm"], table=table, unit=unit, high=packed.rows.get("high"))

    def _rows(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Centroids [N, D], channels `_by_byte`, and what to multiply each row by, [N, 1]."""
        codes = packed.rows["codes"]
        if self.bits in _PER_ENTRY:
            rows = _bytes(self.bits, codes.device).index_select(0, codes.flatten().int())
            rows = rows.view(torch.float32).view(len(codes), -1)
        else:
            codes = unpack_planar(codes, min(self.bits, 2))
            codes = codes | unpack_planar(packed.rows["high"], 1) << 2 if self.bits == 3 else codes
            rows = _codebook(self.bits, codes.device).index_select(0, codes.flatten().int()).view(codes.shape)
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True) if self.norm_correction else rows.shape[1] ** 0.5
        return rows, packed.rows["norm"].float() / length

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8 + 2

    def group_nbytes(self, head_dim: int) -> int:
        return 0


_PER_ENTRY = {2: torch.complex128, 4: torch.float64}  # as wide as the float32 centroids of one byte


@lru_cache(maxsize=8)
def _bytes(bits: int, device: torch.device) -> Tensor:
    """[256] the centroids of all codes in each byte, looked up as one entry."""
    codes = unpack_planar(torch.arange(256, dtype=torch.uint8, device=device)[:, None], bits)
    return _codebook(bits, device)[codes.int()].view(_PER_ENTRY[bits])[:, 0]


def _by_byte(x: Tensor, bits: int, back: bool = False) -> Tensor:
    """[..., D] with channels in the order in which `_bytes` gives them, which share a byte side by side; or back."""
    if bits not in _PER_ENTRY:
        return x
    per_byte = 8 // bits
    return x.unflatten(-1, (-1, per_byte) if back else (per_byte, -1)).transpose(-1, -2).flatten(-2)


def _norm(x: Tensor) -> Tensor:
    """[N, D] -> [N, 1]; summed in float64, so that the order of summation, which depends on N, does not show."""
    return x.double().square().sum(1, keepdim=True).sqrt().float()


@lru_cache(maxsize=16)
def _codebook(bits: int, device: torch.device) -> Tensor:
    """[2**bits] float32, ascending."""
    positive = _CENTROIDS[bits]
    return torch.tensor([*(-c for c in reversed(positive)), *positive], dtype=torch.float32, device=device)
