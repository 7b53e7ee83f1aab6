"""Whether two stacks differ, in words."""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Sequence
from functools import partial

from kvbench import stats
from kvbench.leaderboard.data import Stack
from kvbench.leaderboard.material import Material, find, sort_cells
from kvbench.leaderboard.progress import progress
from kvbench.leaderboard.rows import bytes_ratios, floor
from kvbench.leaderboard.words import number, percent, plain, span
from kvbench.results import Cell


def compare(
    a: str, b: str, cells: Sequence[Cell], *, resamples: int = stats.RESAMPLES, margin: float = stats.MARGIN
) -> list[str]:
    """The verdict on two stacks, once per section that has both; losses below `margin` count as none.

    Raises ValueError when they cannot be compared.
    """
    sections = sort_cells(cells)
    in_a, in_b = _search(a, sections), _search(b, sections)
    both = [(section, x, in_b[i]) for i, (section, x) in in_a.items() if i in in_b]
    if not both:
        (first, x), (second, y) = next(iter(in_a.values())), next(iter(in_b.values()))
        if first.cells[0].config.query_aware != second.cells[0].config.query_aware:
            stats.check_pairable([first.scores[x.index], second.scores[y.index]])  # says why not
        raise ValueError(f"cannot compare {a} with {b}: {a} ran in {first.title}, {b} in {second.title}")
    return [_verdict(section, x, y, resamples, margin) for section, x, (_, y) in both]


def _search(name: str, sections: Sequence[Material]) -> dict[int, tuple[Material, Stack]]:
    """Every section that has this stack, by its number."""
    found = {i: (section, s) for i, section in enumerate(sections) if (s := find(name, section.stacks))}
    if not found:
        known = sorted({s.key for section in sections for s in section.stacks})
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"no finished stack {name!r}; {hint}there are: {', '.join(known) or 'none'}")
    return found


def _verdict(material: Material, a: Stack, b: Stack, resamples: int, margin: float) -> str:
    track = partial(progress, label="bootstrap")
    result = stats.difference(material.scores[a.index], material.scores[b.index], resamples, track=track)
    tasks = ", ".join(f"{t} {k}" for t, k in result.n.items())
    lines = [
        material.title,
        f"{_lead(a, b, result)}: {_conclusion(result, floor(material))}.",
        _equivalence(a, b, result, margin),
        f"Samples: {sum(result.n.values())} paired ({tasks}); {result.method}.",
    ]
    if result.exact and result.exact.bound is not None:
        lines.append(
            f"No sample differs; the rate at which they differ is below {percent(result.exact.bound)} % (95 % bound)."
        )
    elif result.exact:
        e = result.exact
        lines.append(f"Only {a.key} right: {e.a_only}, only {b.key} right: {e.b_only}; exact McNemar p = {e.p:.3g}.")
    if result.detectable > 0:
        lines.append(
            f"This design finds true differences of {percent(result.detectable)} points or more (80 % power); smaller "
            "ones it is likely to miss."
        )
    if len(result.tasks) > 1:
        lines += [f"  {t}: {percent(i.estimate, sign=True)} points ({span(i)})" for t, i in result.tasks.items()]
    lines += [_bytes_line(material, stack, result) for stack in (a, b)]
    return "\n".join(map(plain, lines))


def _lead(a: Stack, b: Stack, result: stats.Difference) -> str:
    gap = result.interval.estimate
    if not gap:
        return f"{a.key} and {b.key} score the same"
    return f"{a.key} scores {number(abs(100 * gap))} points {'higher' if gap > 0 else 'lower'} than {b.key}"


def _conclusion(result: stats.Difference, aa_floor: stats.Floor | None) -> str:
    if math.isnan(result.interval.low):
        return "no interval can be given (a task has a single independent sample), so nothing is concluded"
    interval = f"95 % interval {span(result.interval)}"
    if not result.resolved:
        return f"{interval}, so the data do not tell them apart"
    if aa_floor and abs(result.interval.estimate) < aa_floor.value:
        return f"{interval}, but below the A/A floor of {percent(aa_floor.value)}, so not resolved"
    if result.interval.contains(0.0):
        return (
            f"{interval}, wide because few answers changed; the signs of the differences say that they do differ "
            f"(p = {result.p:.2g})"
        )
    return f"{interval}, so the difference is real at this confidence"


def _equivalence(a: Stack, b: Stack, result: stats.Difference, margin: float) -> str:
    """Which claims of "no loss" the 90 % interval carries, in words."""
    points = f"{number(100 * margin, 2).rstrip('0').rstrip('.')} point{'' if margin == 0.01 else 's'}"
    if math.isnan(result.interval90.low):
        return f"Whether they are equivalent within {points} cannot be said."
    ends = f"90 % interval of the difference {span(result.interval90, 2)}"
    if result.equivalent(margin):
        return f"They are equivalent within {points} ({ends})."
    losses = {a.key: result.worst_loss, b.key: result.interval90.high}
    spared = [name for name, loss in losses.items() if loss < margin]
    if spared:
        other = b.key if spared == [a.key] else a.key
        return f"{spared[0]} is not worse than {other} by {points} or more ({ends})."
    worst = " and ".join(f"{name} may lose up to {percent(loss)}" for name, loss in losses.items())
    return f"Equivalence within {points} is not shown: {worst} points ({ends})."


def _bytes_line(material: Material, stack: Stack, result: stats.Difference) -> str:
    shared = [s for c in stack.cells if material.label(c) in result.n for s in c.samples]
    rho, final, _ = bytes_ratios(shared)
    mean = statistics.fmean(s.kv_bytes_prefill_end for s in shared)
    return (
        f"Bytes of {stack.key}: {percent(rho)} % of the full cache after prefill, {percent(final)} % at the end "
        f"({mean / 1024:,.1f} KiB per sample)."
    )
