"""Scores of slots: attention received, lengths and directions of keys. By Triton on CUDA, by PyTorch elsewhere.

Formulas: `kvbench.kernels.attention` for column sums, reference.py for the others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvbench.kernels.attention.reference import column_sums as _column_sums
from kvbench.kernels.choice import implementation

__all__ = ["column_sums", "key_alignment", "key_norms"]


def column_sums(query: Tensor, keys: Tensor, query_position: Tensor, key_position: Tensor, **options: Any) -> Tensor:
    """See `kvbench.kernels.attention.column_sums`."""
    sums = getattr(implementation("scores", query.device), "column_sums", _column_sums)
    return sums(query, keys, query_position, key_position, **options)


def key_norms(keys: Tensor) -> Tensor:
    """keys [B, H, S, D] -> |k_s| float32 [B, H, S]."""
    return implementation("scores", keys.device).key_norms(keys)


def key_alignment(keys: Tensor, live: Tensor, unit: bool = True) -> Tensor:
    """keys [B, H, S, D], live [B, H or 1, S] bool -> cosine of each key and the mean direction, float32 [B, H, S]."""
    return implementation("scores", keys.device).key_alignment(keys, live, unit)
