"""Was the needle evicted, or kept and not read?

Result rows of prompts with a needle carry `needle_kept` [layers][kv heads]: the share of the needle's tokens whose
slots are still there at the end of the compression (`kvbench.results.Sample`). A needle counts as *kept* where at least
half of the layers' heads hold at least half of it; a miss is then either *evicted* or *unread*: kept, but not answered.
Merged slots count as the token whose position they carry; what eviction during decoding drops is not in it.

    >>> from kvbench.misses import split_misses
    >>> split = split_misses(cell.samples)                                          # doctest: +SKIP
    >>> split.evicted, split.unread, split.kept_if_missed[layer][head]              # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvbench.results import Sample

Map = list[list[float]]  # [layers][heads]


@dataclass(frozen=True)
class MissSplit:
    """Counts of prompts with a needle, and how much of it was kept on average, by layer and head.

    found + evicted + unread are all of them; `found_evicted` of the found were answered although the needle was gone.
    A map is None where no prompt belongs to it. Where `kept_if_found` is high and `kept_if_missed` low, the needle is
    read.
    """

    found: int
    found_evicted: int
    evicted: int
    unread: int
    kept_if_found: Map | None
    kept_if_missed: Map | None

    @property
    def misses(self) -> int:
        return self.evicted + self.unread


def is_kept(needle_kept: Map, share: float = 0.5) -> bool:
    """Whether at least `share` of the layers' heads hold at least `share` of the needle."""
    heads = [kept for layer in needle_kept for kept in layer]
    return sum(kept >= share for kept in heads) >= share * len(heads)


def split_misses(samples: Iterable[Sample], found_from: float = 0.5) -> MissSplit | None:
    """None without needles. found_from: the least score of a prompt whose needle counts as found."""
    needles = [(s.score >= found_from, s.needle_kept) for s in samples if s.needle_kept]
    if not needles:
        return None
    found, missed = ([kept for was_found, kept in needles if was_found is asked] for asked in (True, False))
    unread = sum(map(is_kept, missed))
    return MissSplit(
        len(found), len(found) - sum(map(is_kept, found)), len(missed) - unread, unread, _mean(found), _mean(missed)
    )


def _mean(maps: list[Map]) -> Map | None:
    if not maps:
        return None
    return [[sum(heads) / len(maps) for heads in zip(*layers, strict=True)] for layers in zip(*maps, strict=True)]
