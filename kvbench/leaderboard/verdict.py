"""Whether two stacks differ, in words."""

from __future__ import annotations

import difflib
import math
import statistics
from collections.abc import Sequence
from functools import partial

from kvbench import stats
from kvbench.leaderboard.benchmarks import variants_of
from kvbench.leaderboard.captions import floor_line, no_signal_line, prompts_line, setup_line
from kvbench.leaderboard.data import Options, Stack
from kvbench.leaderboard.material import Material, find, model_of, sort_cells
from kvbench.leaderboard.progress import progress
from kvbench.leaderboard.rows import bytes_ratios, floor
from kvbench.leaderboard.signal import Counted, counted
from kvbench.leaderboard.words import natural, number, percent, plain, precise, span
from kvbench.results import Cell


def compare(
    a: str,
    b: str,
    cells: Sequence[Cell],
    *,
    resamples: int = stats.RESAMPLES,
    margin: float = stats.MARGIN,
    zero: str | None = None,
    recorded: tuple[str, ...] = (),
) -> list[str]:
    """The verdict on two stacks, once per section that has both; losses below `margin` count as none.

    zero: the stack (no context, a minimal cache) whose score counts as 0 in the share of the full cache's score kept
    recorded: files with full-cache scores, which also decide where the model has signal

    Tasks count as on the leaderboard: those without signal are left out. Raises ValueError when the two cannot be
    compared.
    """
    sections = sort_cells(cells)
    in_a, in_b = _search(a, sections), _search(b, sections)
    both = [(section, x, in_b[i]) for i, (section, x) in in_a.items() if i in in_b]
    if not both:
        (first, x), (second, y) = next(iter(in_a.values())), next(iter(in_b.values()))
        if first.cells[0].config.query_aware != second.cells[0].config.query_aware:
            stats.check_pairable([first.scores[x.index], second.scores[y.index]])  # says why not
        raise ValueError(f"cannot compare {a} with {b}: {a} ran in {first.title}, {b} in {second.title}")
    options = Options(resamples, margin, zero=zero, recorded=recorded)
    return [_verdict(section, x, y, options) for section, x, (_, y) in both]


def _search(name: str, sections: Sequence[Material]) -> dict[int, tuple[Material, Stack]]:
    """Every section that has this stack, by its number."""
    found = {i: (section, s) for i, section in enumerate(sections) if (s := find(name, section.stacks))}
    if not found:
        known = sorted({s.key for section in sections for s in section.stacks})
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"no finished stack {name!r}; {hint}there are: {', '.join(known) or 'none'}")
    return found


def _verdict(material: Material, a: Stack, b: Stack, options: Options) -> str:
    track = partial(progress, label="bootstrap")
    paired = stats.pair([material.scores[a.index], material.scores[b.index]])
    counts = counted(material, stats.pair(material.scores, keep_missing=True), options)
    weak = [t for t in paired.tasks if t not in counts.tasks]
    signal = len(weak) < len(paired.tasks)
    drawn = stats.bootstrap(paired, None, options.resamples, track=track, ranked=counts.tasks if signal else None)
    result, aa_floor = stats.difference_of(paired, drawn, 0, 1), floor(material)
    means = (stats.score_of(paired, drawn, k) for k in (0, 1))
    scores = [f"{s.key} {percent(m.estimate)} % ({span(m)})" for s, m in zip((a, b), means, strict=True)]
    lines = [
        material.title,
        f"{_lead(a, b, result)}{_conclusion(result, aa_floor, _moved(material, paired.select(tasks=drawn.ranked)))}.",
        *([_equivalence(a, b, result, options.margin)] if signal else []),
        *_weak(material, weak, signal),
        f"Mean scores: {', '.join(scores)}.",
        *_kept(material, a, b, counts, options),
        *_tasks(material, a, b, result),
        f"Samples: {sum(result.n.values())} paired; {result.method}.",
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
    if result.doubtful:
        lines.append(
            "Fewer than 50 independent samples have graded scores: if few of all prompts differ far more than the "
            "others, such prompts may be missing here, and the interval does not cover them."
        )
    lines += [*_bytes(material, (a, b), paired.tasks), *_setup(material, (a, b), paired.tasks, result)]
    lines.append(floor_line(aa_floor))
    return "\n".join(map(plain, lines))


def _lead(a: Stack, b: Stack, result: stats.Difference) -> str:
    gap = result.interval.estimate
    if not gap:
        return f"{a.key} and {b.key} score the same"
    return f"{a.key} scores {number(abs(100 * gap))} points {'higher' if gap > 0 else 'lower'} than {b.key}"


def _conclusion(result: stats.Difference, aa_floor: stats.Floor | None, moved: str) -> str:
    if math.isnan(result.interval.low):
        return ", but a task has a single independent sample: no interval can be given, and nothing is concluded"
    interval = f"95 % interval {span(result.interval)}"
    if not result.resolved:
        return f"{', but' if result.interval.estimate else ':'} the data do not tell them apart ({interval})"
    if aa_floor and abs(result.interval.estimate) < aa_floor.value:
        return f", but that is below the A/A floor of {precise(aa_floor.value)}, so not resolved ({interval})"
    if result.interval.contains(0.0):
        return (
            f": the signs of the differences say that they do differ (p = {result.p:.2g}), but {moved}, so by how much "
            f"is open ({interval})"
        )
    return f": the difference is real ({interval})"


def _moved(material: Material, paired: stats.Paired) -> str:
    """What of few changes changed: answers, or likelihoods without any answer."""
    changes = {t: (s[0] != s[1]).any() for t, s in zip(paired.tasks, paired.scores, strict=True)}
    answers = [changed for task, changed in changes.items() if material.kinds[task] == "generate"]
    if any(answers):
        return "few answers changed"
    return "only likelihoods moved and no answer changed" if answers else "few samples changed"


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
    other = {a.key: b.key, b.key: a.key}
    if result.resolved:
        worse = a.key if result.interval.estimate < 0 else b.key
        if worse not in spared:
            return f"{worse} may lose up to {percent(losses[worse])} points against {other[worse]} ({ends})."
        return f"{worse} loses less than {points} against {other[worse]} ({ends})."
    if spared:
        return f"{spared[0]} is not worse than {other[spared[0]]} by {points} or more ({ends})."
    worst = " and ".join(f"{name} may lose up to {percent(loss)}" for name, loss in losses.items())
    return f"Equivalence within {points} is not shown: {worst} points ({ends})."


def _weak(material: Material, weak: Sequence[str], signal: bool) -> list[str]:
    """Which tasks have no signal. If none has any, all are compared: what cannot be lost is no proof of no loss."""
    if not weak:
        return []
    full = None if material.full is None else material.scores[material.full]
    means = {t: _mean(full, t) if full and t in full.tasks else None for t in weak}
    return [no_signal_line(means, "left out" if signal else "nothing is said of equivalence")]


def _kept(material: Material, a: Stack, b: Stack, counts: Counted, options: Options) -> list[str]:
    """The share of the full cache's score that each keeps, on the tasks that the full cache and both ran."""
    base, missing = counts.zero, counts.notes
    full, compressed = material.full, [s for s in (a, b) if not s.is_full]
    if full is None or not compressed:
        return missing
    order = list(dict.fromkeys([full, a.index, b.index, *([] if base is None else [base])]))
    try:
        paired = stats.pair([material.scores[i] for i in order])
    except ValueError:  # no sample in common
        return missing
    zero = None if base is None else order.index(base)
    ranked = [t for t in paired.tasks if t in counts.tasks] or None
    drawn = stats.bootstrap(paired, 0, options.resamples, ranked=ranked, zero=zero, chance=counts.chance)
    if drawn.retention is None:
        return missing
    shares = [
        f"{s.key} keeps {percent(kept.estimate)} % ({span(kept)})"
        for s in compressed
        if (kept := stats.retention_of(paired, drawn, order.index(s.index), 0))
    ]
    counted = "" if base is None else f", counting what {options.zero} scores as 0"
    losses = [
        f"{s.key} {percent(loss.estimate, sign=True)} points ({span(loss)})"
        for s in compressed
        if len(compressed) > 1 and (loss := stats.lead(paired, drawn, order.index(s.index), 0))
    ]
    against = [f"Against the full cache: {', '.join(losses)}."] if losses else []
    left = [t for t in drawn.ranked if t not in drawn.retention_tasks]
    without = f"; without {', '.join(left)}, where it scores no more than that" if left else ""
    return [*missing, *against, f"Of the full cache's score{counted} (mean over tasks{without}): {', '.join(shares)}."]


def _tasks(material: Material, a: Stack, b: Stack, result: stats.Difference) -> list[str]:
    """One line per task: both values, and the difference of the scores."""
    kinds, lines = material.kinds, []
    for task, interval in result.tasks.items():
        if kinds[task] == "nll" and task not in (*a.failed, *b.failed):
            first, second = (_mean(material.nlls[s.index], task) for s in (a, b))
            values = f"perplexity {math.exp(first):.2f} against {math.exp(second):.2f}; score exp(−NLL)"
        else:
            first, second = (_mean(material.scores[s.index], task) for s in (a, b))
            values = f"{percent(first)} % against {percent(second)} %;"
        change = f"{percent(interval.estimate, sign=True)} points ({span(interval)})"
        lines.append(f"  {task} (n = {result.n[task]}): {values} {change}")
    return lines


def _mean(run: stats.Run, task: str) -> float:
    return statistics.fmean(row.score for row in run.tasks[task].values())


def _bytes(material: Material, stacks: Sequence[Stack], tasks: Sequence[str]) -> list[str]:
    """Bytes of both on those of these tasks that both finished, as shares of the full cache and per sample."""
    finished = [t for t in tasks if not any(t in s.failed for s in stacks)]
    if not finished:
        return []
    texts = []
    for stack in stacks:
        shared = [s for c in stack.cells if material.label(c) in finished for s in c.samples]
        rho, final, _ = bytes_ratios(shared)
        held = statistics.fmean(s.kv_bytes_prefill_end for s in shared) / 1024
        shares = f"{percent(rho)} % of the full cache after prefill, {percent(final)} % at the end, "
        texts.append(f"{stack.key} {'' if stack.is_full else shares}{held:,.1f} KiB per sample")
    return [f"Bytes: {'; '.join(texts)}."]


def _setup(material: Material, stacks: Sequence[Stack], shared: Sequence[str], result: stats.Difference) -> list[str]:
    """How both ran, and what of them is not compared; shared: tasks that both ran, also those without signal."""
    cells = [c for s in stacks for c in s.cells if material.label(c) in result.n]
    tasks = [material.task_info(label, cells, n) for label, n in result.n.items()]
    first, variants = cells[0], variants_of(c.config.task for c in cells)
    given = [f"{s.key} = {s.text} ({s.group.label})" for s in stacks]
    alone = sorted({material.label(c) for s in stacks for c in s.cells} - set(shared), key=natural)
    lost = [x for x in material.left_out if x.stack in [s.key for s in stacks]]
    return [
        f"{setup_line(model_of(first), tasks, variants, first.config.query_aware)} {prompts_line(tasks)}",
        f"Stacks and budgets: {'; '.join(given)}.",
        *([f"Not compared, as only one of them ran there: {', '.join(alone)}."] if alone else []),
        *[f"{x.status[0].upper()}{x.status[1:]}: {x.stack} on {x.task}: {x.reason}" for x in lost],
    ]
