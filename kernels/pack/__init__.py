"""Quantize and pack: rows of keys or values -> codes and scales, by Triton on CUDA, by PyTorch elsewhere.

Formulas and layouts: reference.py. Both store the same bytes.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from kvbench.kernels.choice import implementation
from kvbench.kernels.pack.reference import E2M1_BLOCK, Turn

__all__ = [
    "E2M1_BLOCK",
    "Turn",
    "affine_per_channel",
    "affine_per_token",
    "e2m1_blocks",
    "float8",
    "float8_per_token",
    "symmetric_per_token",
]


def affine_per_channel(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D] -> codes uint8 [N, D*bits/8], scale and zero fp16 [N/group, D]. Raises ValueError beyond fp16."""
    return _finite(x, *_on(x).affine_per_channel(x, bits, group))


def affine_per_token(
    x: Tensor, bits: int, width: int, clip: float = 1.0, turn: Turn | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D] -> codes uint8 [N, D*bits/8], scale and zero fp16 [N, D/width]. Raises ValueError beyond fp16."""
    return _finite(x, *_on(x).affine_per_token(x, bits, width, clip, turn))


def symmetric_per_token(x: Tensor, bits: int, clip: float = 1.0, turn: Turn | None = None) -> tuple[Tensor, Tensor]:
    """x [N, D] -> codes uint8 [N, D*bits/8], scale float32 [N, 1]."""
    return _on(x).symmetric_per_token(x, bits, clip, turn)


def float8(x: Tensor, form: str, scale: float | Tensor) -> Tensor:
    """x [N, D], scale a number or float32 [N, 1] -> codes of x / scale, uint8 [N, D]; form: "e4m3" or "e5m2"."""
    return _on(x).float8(x, form, scale)


def float8_per_token(x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """x [N, D] -> codes uint8 [N, D], scale float32 [N, 1]."""
    return _on(x).float8_per_token(x, form)


def e2m1_blocks(x: Tensor, tensor_scale: float, turn: Turn | None = None) -> tuple[Tensor, Tensor]:
    """x [N, D] -> interleaved E2M1 codes uint8 [N, D/2], E4M3 scales uint8 [N, D/16]."""
    return _on(x).e2m1_blocks(x, tensor_scale, turn)


def _on(x: Tensor) -> ModuleType:
    return implementation("pack", x.device)


def _finite(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not bool((scale.isfinite() & zero.isfinite()).all()):
        raise ValueError(
            f"scale and zero point are stored as fp16, at most 65504; keys or values reach {float(x.abs().max()):.6g}"
        )
    return codes, scale, zero
