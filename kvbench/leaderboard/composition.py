"""Do eviction and quantization compose: contrasts, gains at equal bytes, interaction rates, and effects of order."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from kvbench import stats
from kvbench.leaderboard.areas import families
from kvbench.leaderboard.data import FULL, NONE, Contrast, Numbers, Options, Section, Stack, Table, TableRow
from kvbench.leaderboard.words import number, percent, span

COMPRESSIONS = (2.0, 4.0, 8.0, 16.0, 32.0)


def contrasts(stacks: Sequence[Stack], numbers: Numbers, options: Options) -> list[Contrast]:
    """Each stack with both parts, against its evictor alone at the same kept tokens and its quantizer alone."""
    complete = everywhere(stacks, numbers)
    if numbers.full is None or stacks[numbers.full] not in complete:
        return []
    found = []
    for stack in complete:
        if parts := _parts(stack, complete):
            one = parts[0].index, parts[1].index, stack.index, numbers.full
            found.append((stack, stats.interaction_of(numbers.paired, numbers.drawn, *one)))
    adjusted = stats.CORRECTIONS[options.correction]([value.p for _, value in found])
    made = [Contrast(stack, value, p) for (stack, value), p in zip(found, adjusted, strict=True)]
    return sorted(made, key=lambda c: (not c.claimed, -abs(c.value.score.estimate)))


def stacking(section: Section, numbers: Numbers, options: Options) -> list[Table]:
    """Tables on stacks of both kinds; those for which the section has no data are left out."""
    complete = everywhere(section.stacks, numbers)
    tables = [
        _gains(complete, numbers, options),
        _rates(complete, numbers),
        _orders(complete, numbers),
    ]
    return [t for t in tables if t.rows]


def everywhere(stacks: Sequence[Stack], numbers: Numbers) -> list[Stack]:
    """Stacks that ran on every sample of the ranked tasks; a score of 0 after an error says nothing of composition."""
    paired = numbers.paired
    scores = [s for t, s in zip(paired.tasks, paired.scores, strict=True) if t in numbers.drawn.ranked]
    return [s for s in stacks if not s.failed and not any(np.isnan(x[s.index]).any() for x in scores)]


def _parts(stack: Stack, stacks: Sequence[Stack]) -> tuple[Stack, Stack] | None:
    """The evictor alone at the same kept tokens (as measured), and the quantizer alone; None unless both are there."""
    if stack.evict == FULL or stack.quant == NONE:
        return None
    near = [s for s in stacks if s.evict == stack.evict and s.quant == NONE]
    near = [s for s in near if math.isclose(s.kept, stack.kept, rel_tol=0.01)]
    evicted = [s for s in near if stack.text.startswith(s.text)] or near
    quantized = [s for s in stacks if s.evict == FULL and s.quant == stack.quant]
    return (evicted[0], quantized[0]) if len(evicted) == 1 and len(quantized) == 1 else None


def _gains(stacks: Sequence[Stack], numbers: Numbers, options: Options) -> Table:
    rho = [math.nan] * len(numbers.paired.names)
    for stack in stacks:
        rho[stack.index] = stack.rho
    pure: dict[str, list[int]] = {}
    both: dict[str, list[int]] = {}
    for (evict, quant, details), members in families(stacks).items():
        if evict != FULL or quant != NONE:
            kind = both if evict != FULL and quant != NONE else pure
            kind[f"{evict} {quant} {details}"] = [s.index for s in members]
    names = {s.index: s for s in stacks}
    ranked = numbers.paired.select(tasks=numbers.drawn.ranked)
    rows = []
    for compression in COMPRESSIONS:
        gain = stats.stacking_gain(ranked, rho, pure, both, compression, options.resamples)
        if gain:
            value = gain.value
            if not value.resolved:
                reading = "not resolved"
            else:
                reading = "stacking wins" if value.interval.estimate > 0 else "one method alone wins"
                reading += ", by how much is open" if value.interval.contains(0.0) else ""
            cells = (
                names[gain.pure].key, names[gain.stack].key, percent(value.interval.estimate, sign=True),
                span(value.interval), percent(value.detectable), reading,
            )  # fmt: skip
            rows.append(TableRow(f"{compression:g}×", cells, names[gain.stack]))
    return Table(
        "What does stacking gain at equal bytes?",
        "The best stack of an evictor and a quantizer against the best of either alone, at no more than 1/C of the "
        "bytes, in points of the mean score. Both are chosen on one half of the samples and compared on the other, so "
        "that the luck of the choice is not in the gain. Nothing is interpolated: each family stands at its measured "
        "point nearest to C.",
        ("C", "Best alone", "Best stack", "Gain, points", "95 %", "Detectable", "Reading"),
        tuple(rows),
    )


def _rates(stacks: Sequence[Stack], numbers: Numbers) -> Table:
    rows: list[TableRow] = []
    by_evictor: dict[str, list[tuple[Stack, Stack, Stack]]] = defaultdict(list)
    for stack in stacks:
        if parts := _parts(stack, stacks):
            by_evictor[stack.evict].append((stack, *parts))
    for evict, grid in sorted(by_evictor.items()):
        rate = _rate(grid, numbers)
        if rate:
            split = ", ".join(f"{2**u:g}×: {percent(i.estimate, 0)} % ({span(i, 0)})" for u, i in rate.split.items())
            size = len({e.index for _, e, _ in grid}), len({q.index for _, _, q in grid})
            cells = (f"{size[0]} × {size[1]}", number(100 * rate.g.estimate, 2, True), span(rate.g, 2), split)
            rows.append(TableRow(evict, cells, grid[0][1]))
    return Table(
        "How does the damage grow when both are turned up?",
        "Damage = a1 x + a2 x² + b1 y + b2 y² + g x y, fitted on a full grid of kept tokens (x octaves fewer) and bits "
        "(y octaves fewer). Above 0, g says by how many points per squared octave each makes the other's damage worse. "
        "The split is the share of a compression's octaves that quantization should bring, within the measured grid.",
        ("Evictor", "Grid", "g, points", "95 %", "Best share of quantization"),
        tuple(rows),
    )


def _rate(grid: Sequence[tuple[Stack, Stack, Stack]], numbers: Numbers) -> stats.Rate | None:
    evicted = {e.index: e for _, e, _ in grid}
    quantized = {q.index: q for _, _, q in grid}
    corners = {(e.index, q.index) for _, e, q in grid}
    if numbers.full is None or len(corners) != len(grid) or len(grid) != len(evicted) * len(quantized):
        return None
    kept, bits = [1.0] * len(numbers.paired.names), [16.0] * len(numbers.paired.names)
    for stack, e, q in grid:
        kept[stack.index] = kept[e.index] = e.kept
        bits[stack.index] = bits[q.index] = 16 * q.rho
    policies = [*evicted, *quantized, *(s.index for s, _, _ in grid)]
    try:
        return stats.interaction_rate(numbers.drawn.macro, kept, bits, numbers.full, policies)
    except ValueError:  # too small a grid
        return None


def _orders(stacks: Sequence[Stack], numbers: Numbers) -> Table:
    rows = []
    for first in stacks:
        members = first.text.split(" | ")
        for second in stacks:
            swapped = first.index < second.index and len(members) == 2 and second.text.split(" | ") == members[::-1]
            if swapped and math.isclose(first.rho, second.rho, rel_tol=0.01):
                value = stats.difference_of(numbers.paired, numbers.drawn, first.index, second.index)
                reading = "order matters" if value.resolved else "not resolved"
                cells = (second.text, percent(value.interval.estimate, sign=True), span(value.interval), reading)
                rows.append(TableRow(first.text, cells, first))
    return Table(
        "Does the order matter?",
        "Mean score of the order on the left minus that of the other, in points, at equal bytes.",
        ("Order", "Against", "Difference, points", "95 %", "Reading"),
        tuple(rows),
    )
