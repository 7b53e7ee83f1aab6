"""Rows moved together after an eviction, by Triton on CUDA, by PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kvbench.kernels.choice import implementation
from kvbench.kernels.gather.reference import renumber

__all__ = ["renumber", "take_rows"]


def take_rows(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """The rows index [M] int64 of every tensor [N, ...]: [M, ...] each, of its own storage."""
    return implementation("gather", index.device).take_rows(tensors, index)
