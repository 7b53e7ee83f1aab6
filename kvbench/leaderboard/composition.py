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
from kvbench.stats import Interval

COMPRESSIONS = (2.0, 4.0, 8.0, 16.0, 32.0)
LIKE_BYTES = 1.05  # what a winner may hold of the loser's bytes


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


def composition(section: Section, numbers: Numbers) -> list[Table]:
    """The table of the contrasts, or why there are none; nothing without stacks of both kinds."""
    both = [s for s in section.stacks if s.evict != FULL and s.quant != NONE]
    if not both:
        return []
    rows = []
    for c in section.contrasts:
        score, logit = c.value.score, c.value.logit
        cells = percent(score.estimate, sign=True), span(score), number(logit.estimate, 2, True), span(logit, 2, 1)
        rows.append(TableRow(c.stack.key, (*cells, c.verdict), c.stack))
    text = (
        "Damage of the stack minus the damage of its evictor alone (same kept tokens) and of its quantizer alone, in "
        "points. Above 0 stacking hurts more than the sum; below 0 the damages overlap. A departure is claimed only if "
        "scores and logits agree, both intervals exclude 0, and it stands after correction for the number of stacks. "
        "Where few samples depart, the interval is a score interval: none departing is no proof of none. Intervals on "
        "logits come from the resamples, which know nothing of departures that did not occur."
    )
    head = "Stack", "Interaction, points", "95 %", "On logits", "95 % on logits", "Reading"
    why = text if rows else _without_contrasts(both, section.stacks, numbers)
    return [Table("Do eviction and quantization compose?", why, head, tuple(rows))]


def _without_contrasts(both: Sequence[Stack], stacks: Sequence[Stack], numbers: Numbers) -> str:
    alone = [(s, e) for s in both for e in stacks if (e.evict, e.quant, e.group) == (s.evict, NONE, s.group)]
    if numbers.full is not None and any(s.group.kind == 1 and s.kept > 1.01 * e.kept for s, e in alone):
        return (
            "No contrast can be formed: given the same bytes, stacks kept more tokens than their evictor alone. A "
            "sweep with budget= (shares of the tokens) gives it."
        )
    return (
        "No contrast can be formed: it takes the full cache, a stack, its evictor alone at the same kept tokens and "
        "its quantizer alone, all on every sample of the ranked tasks."
    )


def stacking(section: Section, numbers: Numbers, options: Options) -> list[Table]:
    """Further tables on stacks of both kinds; those for which the section has no data are left out."""
    complete = everywhere(section.stacks, numbers)
    sound = [c.stack.index for c in section.contrasts if not c.value.doubtful]
    tables = [
        _gains(complete, numbers, options),
        _rates(complete, numbers, sound),
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
    found = (stats.stacking_gain(ranked, rho, pure, both, c, options.resamples) for c in COMPRESSIONS)
    gains = [gain for gain in found if gain]
    adjusted = stats.CORRECTIONS[options.correction]([gain.value.p for gain in gains])
    rows = []
    for gain, p in zip(gains, adjusted, strict=True):
        value, alone, stack = gain.value, names[gain.pure], names[gain.stack]
        cells = (
            alone.key, _held(alone), stack.key, _held(stack), percent(value.interval.estimate, sign=True),
            span(value.interval), percent(value.detectable), _reading(value, p, stack, alone),
        )  # fmt: skip
        rows.append(TableRow(f"{gain.compression:g}×", cells, stack))
    least = {
        name: min(rho[p] for family in families.values() for p in family)
        for name, families in (("method alone", pure), ("stack", both))
        if families
    }
    absent = [c for c in COMPRESSIONS if c not in {gain.compression for gain in gains}]
    why = [f"{c:g}× (no {' and no '.join(name for name, held in least.items() if held > 1 / c)})" for c in absent]
    return Table(
        "What does stacking gain at equal bytes?",
        "The best stack of an evictor and a quantizer against the best of either alone, at no more than 1/C of the "
        "bytes, in points of the mean score. Both are chosen on one half of the samples and compared on the other, so "
        "that the luck of the choice is not in the gain. Nothing is interpolated: each family stands at its measured "
        "point nearest to C, so the two may hold unlike bytes. A winner is named only if it holds no more than "
        f"{100 * (LIKE_BYTES - 1):.0f} % more bytes than the other and the gain stands after correction for the number "
        "of rows.",
        (
            "C", "Best alone", "Its bytes, %", "Best stack", "The stack's bytes, %", "Gain, points", "95 %",
            "Detectable", "Reading",
        ),
        tuple(rows),
        f"No row where nothing so small was measured: {', '.join(why)}." if why else "",
    )  # fmt: skip


def _held(stack: Stack) -> str:
    return f"{percent(stack.rho)} ({number(1 / stack.rho)}×)"


def _reading(value: stats.Difference, p_adjusted: float, stack: Stack, alone: Stack) -> str:
    if not (value.resolved and p_adjusted < 0.05):
        return "not resolved"
    stacked = value.interval.estimate > 0
    ratio = stack.rho / alone.rho if stacked else alone.rho / stack.rho
    if ratio > LIKE_BYTES:
        return f"unlike bytes: the better one holds {percent(ratio - 1, 0)} % more"
    won = "stacking wins" if stacked else "one method alone wins"
    return f"{won}, by how much is open" if value.interval.contains(0.0) else won


def _rates(stacks: Sequence[Stack], numbers: Numbers, sound: Sequence[int]) -> Table:
    """sound: stacks on whose contrasts resamples know enough for an interval."""
    rows: list[TableRow] = []
    by_evictor: dict[str, list[tuple[Stack, Stack, Stack]]] = defaultdict(list)
    for stack in stacks:
        if parts := _parts(stack, stacks):
            by_evictor[stack.evict].append((stack, *parts))
    for evict, grid in sorted(by_evictor.items()):
        rate = _rate(grid, numbers)
        if rate:
            sure = all(s.index in sound for s, _, _ in grid)
            split = ", ".join(_split(u, i, sure, u in rate.at_edge) for u, i in rate.split.items())
            size = len({e.index for _, e, _ in grid}), len({q.index for _, _, q in grid})
            ends = span(rate.g if sure else None, 2)
            cells = (f"{size[0]} × {size[1]}", number(100 * rate.g.estimate, 2, True), ends, split)
            rows.append(TableRow(evict, cells, grid[0][1]))
    return Table(
        "How does the damage grow when both are turned up?",
        "Damage = a1 x + a2 x² + b1 y + b2 y² + g x y, fitted on a full grid of kept tokens (x octaves fewer) and bits "
        "(y octaves fewer). Above 0, g says by how many points per squared octave each makes the other's damage worse. "
        "The split is the share of a compression's octaves that quantization should bring; one marked * stands at the "
        "edge of the measured grid, and unless that is 0 or 100 % the best may lie beyond it. Intervals are "
        "percentiles of the resamples, which know nothing of departures that did not occur; none is given where at "
        "some point of the grid few samples depart from the sum of the damages, or fewer than 50 independent ones were "
        "scored.",
        ("Evictor", "Grid", "g, points", "95 %", "Best share of quantization"),
        tuple(rows),
    )


def _split(octaves: float, share: Interval, sure: bool, at_edge: bool) -> str:
    text = f"{2**octaves:g}×: {percent(share.estimate, 0)} %{'*' if at_edge else ''}"
    return f"{text} ({span(share, 0)})" if sure else text


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
