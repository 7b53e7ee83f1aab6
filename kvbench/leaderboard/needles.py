"""Where needles are lost: a stack's mean score by needle depth and prompt length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvbench.leaderboard.data import Stack
from kvbench.leaderboard.words import tokens
from kvbench.misses import split_misses


@dataclass(frozen=True)
class Heat:
    """Mean score by needle depth (rows, from the start of the prompt) and prompt length (columns)."""

    lengths: list[str]
    depths: list[str]
    values: list[list[float]]


def heat(stack: Stack) -> Heat | None:
    """The needle map of a stack, or None without needle samples that record length and depth."""
    samples = [s for c in stack.cells if "niah" in c.config.task.name.lower() for s in c.samples]
    placed = [
        (float(s.meta["length"]), float(s.meta["depth"]), s.score)
        for s in samples
        if isinstance(s.meta.get("length"), int | float) and isinstance(s.meta.get("depth"), int | float)
    ]
    if not placed:
        return None
    lengths, column = bins([length for length, _, _ in placed])
    depths, row = bins([depth for _, depth, _ in placed])
    sums, counts = (np.zeros((len(depths), len(lengths))) for _ in range(2))
    for length, depth, score in placed:
        sums[row(depth), column(length)] += score
        counts[row(depth), column(length)] += 1
    with np.errstate(invalid="ignore"):
        values = (sums / counts).tolist()
    share = max(depth for _, depth, _ in placed) <= 1
    return Heat(
        list(map(tokens, lengths)),
        [f"{100 * v:.0f}%" if share else f"{v:.0f}%" for v in depths],
        values,
    )


def kept_maps(stack: Stack) -> dict[str, Heat]:
    """Share of the needle that is still in the cache, by layer (rows) and KV head (columns), where rows carry it."""
    split = split_misses(s for c in stack.cells for s in c.samples)
    maps = {"found": split.kept_if_found, "missed": split.kept_if_missed} if split else {}
    return {
        name: Heat([str(h) for h in range(len(kept[0]))], [str(layer) for layer in range(len(kept))], kept)
        for name, kept in maps.items()
        if kept
    }


def bins(values: Sequence[float], most: int = 12) -> tuple[list[float], Callable[[float], int]]:
    """The distinct values, or the centres of ten equal bins when there are too many to draw."""
    distinct = sorted(set(values))
    if len(distinct) <= most:
        return distinct, distinct.index
    edges = np.linspace(distinct[0], distinct[-1], 11)
    return ((edges[:-1] + edges[1:]) / 2).tolist(), lambda v: int(np.clip(np.searchsorted(edges, v, "right") - 1, 0, 9))
