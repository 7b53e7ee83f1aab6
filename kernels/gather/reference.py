"""Rows moved together after an eviction, in PyTorch: the reference, and the path taken on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def take_rows(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """out[m] = x[index[m]] for every x."""
    return [x.index_select(0, index) for x in tensors]


def renumber(group_of: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """group_of [M] int64, each below `groups` -> the groups that occur, ascending, and group_of counted among them.

    As `unique` with `return_inverse`, without sorting.
    """
    used = torch.zeros(groups, dtype=torch.bool, device=group_of.device).index_fill_(0, group_of, True)
    return used.nonzero()[:, 0], (used.cumsum(0) - 1)[group_of]
