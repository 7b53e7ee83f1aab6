"""Whole curves in one number: areas, hypervolumes and compression at tolerance."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence

from kvbench import stats
from kvbench.leaderboard.data import FULL, NONE, Numbers, Section, Stack, Table, TableRow
from kvbench.leaderboard.words import number, percent, span

TOLERANCES = (0.01, 0.05)
BUDGET = re.compile(r"\b(memory|budget)=[^,)]+(, )?")


def families(stacks: Sequence[Stack]) -> dict[tuple[str, str, str], list[Stack]]:
    """Stacks that differ in their budget only: (evictor, quantizer, other settings) -> from loose to tight."""
    found: dict[tuple[str, str, str], list[Stack]] = defaultdict(list)
    for stack in sorted(stacks, key=lambda s: -s.rho):
        found[stack.evict, stack.quant, BUDGET.sub("", stack.text)].append(stack)
    return dict(found)


def areas(section: Section, numbers: Numbers) -> list[Table]:
    """Tables by family and by kind of stack; none without retention."""
    retention = numbers.drawn.retention
    stacks = [s for s in section.stacks if not s.missing and s.rho > 0]
    if retention is None or not stacks:
        return []
    rho = [math.nan] * len(retention.point)
    for stack in stacks:
        rho[stack.index] = stack.rho
    tables = [_kinds(stacks, rho, retention), _curves(stacks, rho, retention)]
    return [t for t in tables if t.rows]


def _kinds(stacks: Sequence[Stack], rho: Sequence[float], retention: stats.Sampled) -> Table:
    kinds = {
        "Eviction alone": [s for s in stacks if s.evict != FULL and s.quant == NONE],
        "Quantization alone": [s for s in stacks if s.evict == FULL and s.quant != NONE],
        "Both, stacked": [s for s in stacks if s.evict != FULL and s.quant != NONE],
    }
    kinds = {name: members for name, members in kinds.items() if members}
    if len(kinds) > 1:
        kinds["All of them"] = [s for members in kinds.values() for s in members]
    rows = []
    for name, members in kinds.items():
        policies = [s.index for s in members]
        area = stats.hypervolume(rho, retention, policies)
        tolerated = _tolerated(rho, retention, members)
        rows.append(TableRow(name, (str(len(members)), percent(area.estimate), span(area), *tolerated)))
    return Table(
        "What each kind of compression reaches",
        f"Hypervolume: mean over compressions up to {2**stats.U_MAX:g}× (in octaves) of the best score kept by a "
        "measured stack at that compression or more, in percent; nothing is interpolated. At a loss: the largest "
        "compression that surely stays within it (the lower 95 % end of the score kept does), and the largest that "
        "does so as measured, with its interval. Intervals of hypervolumes and of measured compressions are "
        "percentiles of the resamples, which know nothing of changes that did not occur. A set of many stacks reaches "
        "more by luck than a set of few.",
        ("Kind", "Stacks", "Hypervolume, %", "95 %", *(f"At {100 * t:g} % loss" for t in TOLERANCES)),
        tuple(rows),
    )


def _curves(stacks: Sequence[Stack], rho: Sequence[float], retention: stats.Sampled) -> Table:
    rows = []
    for (evict, quant, _), members in families(stacks).items():
        policies = [s.index for s in members]
        area = stats.curve_area(rho, retention, policies) if len(members) > 1 else None
        if evict != FULL and area:
            name = evict if quant == NONE else f"{evict} + {quant}"
            end = f"{2**area.reach:.3g}×" + ("" if area.complete() else " *")
            cells = (str(len(members)), percent(area.value.estimate), span(area.value), end)
            row = TableRow(name, (*cells, *_tolerated(rho, retention, members)), members[0])
            rows.append(((-round(area.reach, 1), -area.value.estimate), row))
    return Table(
        "Curves over budgets",
        "Area: mean score kept along the family's own points, from no compression to where the curve ends (or to "
        f"{2**stats.U_MAX:g}×), in octaves and percent. Curves marked * end early: compare areas of equal reach only.",
        ("Family", "Budgets", "Area, %", "95 %", "Up to", *(f"At {100 * t:g} % loss" for t in TOLERANCES)),
        tuple(row for _, row in sorted(rows, key=lambda pair: pair[0])),
    )


def _tolerated(rho: Sequence[float], retention: stats.Sampled, members: Sequence[Stack]) -> list[str]:
    lows = {s.index: s.headline.low for s in members}
    found = (stats.compression_at(rho, retention, list(lows), t, lows) for t in TOLERANCES)
    return [
        f"{number(c.shown)}× sure, {number(c.interval.estimate)}× measured ({span(c.interval, scale=1)})" for c in found
    ]
