"""The numbers of a section: one bootstrap, from which every row, rank and contrast is read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np

from kvbench import stats
from kvbench.leaderboard.areas import areas
from kvbench.leaderboard.benchmarks import longbench, variants_of
from kvbench.leaderboard.breakdown import breakdowns
from kvbench.leaderboard.captions import caption, notes
from kvbench.leaderboard.composition import composition, contrasts, stacking
from kvbench.leaderboard.data import Numbers, Options, Section, Stack, TaskInfo, TaskScore
from kvbench.leaderboard.material import Material, model_of
from kvbench.leaderboard.progress import progress
from kvbench.leaderboard.signal import counted
from kvbench.results import Cell, Sample, canonical
from kvbench.stats import Interval

ENDLESS = Interval(math.inf, math.inf, math.inf)  # the perplexity of tokens of probability 0


def make_section(material: Material, options: Options) -> Section:
    """Bootstrap the section once and read every number of its rows from that."""
    numbers = _bootstrap(material, options)
    aa_floor = floor(material)
    for stack in material.stacks:
        _fill(stack, numbers)
    _correct(material.stacks, numbers.signal, options)
    _rank(material.stacks, numbers, aa_floor)
    _mark_front(material.stacks, numbers)
    config = material.cells[0].config
    section = Section(
        title=material.title,
        slug="",
        model=model_of(material.cells[0]),
        query_aware=config.query_aware,
        stacks=material.stacks,
        tasks=_task_infos(material, numbers),
        variants=variants_of(c.config.task for c in material.cells),
        retention=numbers.drawn.retention is not None,
        notes=numbers.notes,
        caption=[],
        floor=aa_floor,
        contrasts=contrasts(material.stacks, numbers, options),
    )
    section.tables = [*composition(section, numbers), *longbench(section, numbers), *areas(section, numbers)]
    section.tables += stacking(section, numbers, options)
    section.tables += breakdowns(section, material, numbers, options)
    section.notes += notes(section, numbers.paired)
    section.caption = caption(section, material, options)
    return section


def _bootstrap(material: Material, options: Options) -> Numbers:
    paired = stats.pair(material.scores, keep_missing=True)
    ranked, base, chance, found = counted(material, paired, options)
    signal = bool(ranked)
    if not signal:
        ranked, found = paired.tasks, [*found, "No task has signal: the ranks below say nothing about the stacks."]
    track = partial(progress, label="bootstrap")
    drawn = stats.bootstrap(
        paired, material.full, options.resamples, track=track, ranked=ranked, zero=base, chance=chance
    )
    perplexity: dict[str, dict[int, Interval]] = {}
    if material.nlls:
        likelihoods = stats.pair(list(material.nlls.values()), keep_missing=True)
        for task, means in stats.bootstrap(likelihoods, None, options.resamples).means.items():
            perplexity[task] = {i: _exp(means.interval(k)) for k, i in enumerate(material.nlls)}
    return Numbers(paired, drawn, perplexity, material.full, signal, found)


def _exp(interval: Interval) -> Interval:
    return Interval(math.exp(interval.estimate), math.exp(interval.low), math.exp(interval.high))


def floor(material: Material) -> stats.Floor | None:
    """The A/A floor from the first two runs of the full cache on the same prompts, over the tasks that have two."""
    if material.full is None:
        return None
    by_task: dict[str, list[Cell]] = defaultdict(list)
    for cell in sorted(material.stacks[material.full].cells, key=lambda c: c.cell_id):
        by_task[canonical(cell.config.task)].append(cell)
    twice = [runs for task, runs in by_task.items() if len(runs) > 1 and task not in material.reseeded]
    if not twice:
        return None
    first, second = (material.run(f"run {k + 1}", [runs[k] for runs in twice], lambda s: s.score) for k in (0, 1))
    kinds = material.kinds
    try:
        return stats.aa_floor(first, second, [t for t in first.tasks if kinds[t] != "generate"])
    except ValueError:  # the two runs have no sample in common
        return None


def _fill(stack: Stack, numbers: Numbers) -> None:
    i, drawn = stack.index, numbers.drawn
    for task, scores in zip(numbers.paired.tasks, numbers.paired.scores, strict=True):
        if n := int(np.sum(~np.isnan(scores[i]))):
            retention = numbers.retention(i, [task]) if task in drawn.ratios else None
            perplexity = numbers.perplexity.get(task, {}).get(i)
            if task in numbers.perplexity and task in stack.failed:
                perplexity = ENDLESS
            stack.tasks[task] = TaskScore(numbers.score(i, [task]), retention, perplexity, n)
    # NaN retention: no sample in common with the full cache, which is as good as not having run.
    needed = {t: drawn.ratios[t] for t in drawn.retention_tasks} or {t: drawn.means[t] for t in drawn.ranked}
    stack.missing = tuple(t for t, means in needed.items() if math.isnan(means.point[i]))
    if not stack.missing:
        stack.headline = numbers.retention(i) if drawn.retention else numbers.score(i)
    if numbers.full is not None and i != numbers.full:
        with suppress(ValueError):  # a macro mean over fewer tasks would not be the one of the other rows
            stack.difference = stats.difference_of(numbers.paired, drawn, i, numbers.full)
    if (spread := stats.seed_spread(numbers.paired)) is not None:
        stack.seed_sd = float(spread[i])
    samples = [s for c in stack.cells for s in c.samples]
    stack.rho, stack.rho_final, stack.rho_read = bytes_ratios(samples)
    stack.kept = sum(s.kept_tokens for s in samples) / max(1, sum(s.n_prompt_tokens for s in samples))


def _correct(stacks: Sequence[Stack], signal: bool, options: Options) -> None:
    """Adjust the p values of the table's differences to the full cache for their number; without signal none is nil."""
    compared = [s for s in stacks if s.difference]
    adjusted = stats.CORRECTIONS[options.correction]([s.difference.p for s in compared if s.difference])
    for stack, p in zip(compared, adjusted, strict=True):
        stack.p_adjusted = p
        stack.lossless = signal and stack.difference is not None and stack.difference.not_worse(options.margin)


def bytes_ratios(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """Bytes as shares of the full cache, ratios of sums: held after prefill, at the end; read by the last step."""
    full = sum(s.kv_bytes_full_final for s in samples)
    read = [s.kv_bytes_final if s.kv_bytes_read_final is None else s.kv_bytes_read_final for s in samples]
    return (
        sum(s.kv_bytes_prefill_end for s in samples) / sum(s.kv_bytes_full for s in samples),
        sum(s.kv_bytes_final for s in samples) / full,
        sum(read) / full,
    )


def _rank(stacks: Sequence[Stack], numbers: Numbers, aa_floor: stats.Floor | None) -> None:
    noise, macro = aa_floor.value if aa_floor else 0.0, numbers.drawn.macro.point
    groups = defaultdict(list)
    for stack in stacks:
        if not stack.missing:
            groups[stack.group].append(stack)
    for group in groups.values():
        group.sort(key=lambda s: (-s.headline.estimate, s.rho, s.key))
        best = group[0]
        best.rank = 1
        for rank, stack in enumerate(group[1:], 2):
            stack.rank = rank
            lead = numbers.lead(best.index, stack.index)
            stack.like_best = lead.contains(0.0) or bool(abs(macro[best.index] - macro[stack.index]) < noise)


def _mark_front(stacks: Sequence[Stack], numbers: Numbers) -> None:
    complete = [s for s in stacks if not s.missing]
    draws = numbers.headline.draws[:, [s.index for s in complete]]
    shares = stats.frontier_probability(np.array([s.rho for s in complete]), draws)
    macro = numbers.drawn.macro.point[[s.index for s in complete]]
    above = stats.dominators(
        np.array([s.rho for s in complete]),
        macro,
        lambda a, b: numbers.difference(complete[a].index, complete[b].index).low,
    )
    for stack, share, winner in zip(complete, shares, above, strict=True):
        stack.frontier = float(share)
        stack.dominated_by = None if winner is None else complete[winner]


def _task_infos(material: Material, numbers: Numbers) -> list[TaskInfo]:
    present = {material.label(c) for c in material.cells}
    infos = []
    for label in (label for label in material.labels.values() if label in present):
        n = numbers.paired.scores[numbers.paired.tasks.index(label)].shape[1]
        full = None if numbers.full is None else numbers.score(numbers.full, [label])
        ranked, kept = label in numbers.drawn.ranked, label in numbers.drawn.retention_tasks
        infos.append(replace(material.task_info(label, material.cells, n), full=full, signal=ranked, kept=kept))
    return infos
