"""The numbers of a section: one bootstrap, from which every row, rank and contrast is read."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from kvbench import stats
from kvbench.leaderboard.captions import caption, notes
from kvbench.leaderboard.data import FULL, NONE, Contrast, Section, Stack, TaskInfo, TaskScore
from kvbench.leaderboard.material import Material
from kvbench.leaderboard.progress import progress
from kvbench.results import Cell, Sample, canonical
from kvbench.stats import Interval


@dataclass(frozen=True)
class _Numbers:
    paired: stats.Paired
    drawn: stats.Bootstrap
    perplexity: Mapping[str, tuple[Interval, ...]]
    full: int | None  # the policy that all others are compared to

    @property
    def headline(self) -> stats.Sampled:
        return self.drawn.retention or self.drawn.macro


def make_section(material: Material, resamples: int) -> Section:
    """Bootstrap the section once and read every number of its rows from that."""
    numbers = _bootstrap(material, resamples)
    aa_floor = floor(material)
    for stack in material.stacks:
        _fill(stack, numbers)
    _rank(material.stacks, numbers, aa_floor)
    _mark_front(material.stacks, numbers)
    config = material.cells[0].config
    section = Section(
        title=material.title,
        slug="",
        model=config.model.model_dump(mode="json"),
        query_aware=config.query_aware,
        stacks=material.stacks,
        tasks=_task_infos(material, numbers),
        retention=numbers.drawn.retention is not None,
        notes=notes(numbers.full, numbers.paired, numbers.drawn),
        caption=[],
        floor=aa_floor,
        contrasts=_contrasts(material.stacks, numbers),
    )
    section.caption = caption(section, resamples)
    return section


def _bootstrap(material: Material, resamples: int) -> _Numbers:
    paired = stats.pair(material.scores, keep_missing=True)
    drawn = stats.bootstrap(paired, material.full, resamples, track=partial(progress, label="bootstrap"))
    perplexity: dict[str, tuple[Interval, ...]] = {}
    if any(run.tasks for run in material.nlls):
        likelihoods = stats.bootstrap(stats.pair(material.nlls, keep_missing=True), None, resamples)
        perplexity = {t: tuple(map(_exp, row)) for t, row in likelihoods.tasks.items()}
    return _Numbers(paired, drawn, perplexity, material.full)


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
    try:
        return stats.aa_floor(first, second)
    except ValueError:  # the two runs have no sample in common
        return None


def _fill(stack: Stack, numbers: _Numbers) -> None:
    i, drawn = stack.index, numbers.drawn
    for task, scores in zip(numbers.paired.tasks, numbers.paired.scores, strict=True):
        if n := int(np.sum(~np.isnan(scores[i]))):
            retention = drawn.task_retention[task][i] if task in drawn.task_retention else None
            perplexity = numbers.perplexity[task][i] if task in numbers.perplexity else None
            stack.tasks[task] = TaskScore(drawn.tasks[task][i], retention, perplexity, n)
    # NaN retention: no sample in common with the full cache, which is as good as not having run.
    needed = drawn.task_retention or drawn.tasks
    stack.missing = tuple(t for t, intervals in needed.items() if math.isnan(intervals[i].estimate))
    if not stack.missing:
        stack.headline = numbers.headline.interval(i)
    if numbers.full is not None and i != numbers.full:
        _compare_to_full(stack, numbers, numbers.full)
    samples = [s for c in stack.cells for s in c.samples]
    stack.rho, stack.rho_final, stack.rho_read = bytes_ratios(samples)
    stack.kept = sum(s.kept_tokens for s in samples) / max(1, sum(s.n_prompt_tokens for s in samples))


def _compare_to_full(stack: Stack, numbers: _Numbers, full: int) -> None:
    deltas, clusters = [], []
    for scores, codes in zip(numbers.paired.scores, numbers.paired.clusters, strict=True):
        delta = scores[stack.index] - scores[full]
        shared = ~np.isnan(delta)
        if not shared.any():
            return  # a macro mean over fewer tasks would not be the one of the other rows
        deltas.append(delta[shared])
        clusters.append(np.unique(codes[shared], return_inverse=True)[1])
    stack.delta = numbers.drawn.macro.contrast({stack.index: 1, full: -1})
    stack.detectable = stats.detectable_difference(deltas, clusters)


def bytes_ratios(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """Bytes as shares of the full cache, ratios of sums: held after prefill, at the end; read by the last step."""
    full = sum(s.kv_bytes_full_final for s in samples)
    read = [s.kv_bytes_final if s.kv_bytes_read_final is None else s.kv_bytes_read_final for s in samples]
    return (
        sum(s.kv_bytes_prefill_end for s in samples) / sum(s.kv_bytes_full for s in samples),
        sum(s.kv_bytes_final for s in samples) / full,
        sum(read) / full,
    )


def _rank(stacks: Sequence[Stack], numbers: _Numbers, aa_floor: stats.Floor | None) -> None:
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
            lead = numbers.headline.contrast({best.index: 1, stack.index: -1})
            stack.like_best = lead.contains(0.0) or bool(abs(macro[best.index] - macro[stack.index]) < noise)


def _mark_front(stacks: Sequence[Stack], numbers: _Numbers) -> None:
    complete = [s for s in stacks if not s.missing]
    draws = numbers.headline.draws[:, [s.index for s in complete]]
    shares = stats.frontier_probability(np.array([s.rho for s in complete]), draws)
    for stack, share in zip(complete, shares, strict=True):
        stack.frontier = float(share)


def _task_infos(material: Material, numbers: _Numbers) -> list[TaskInfo]:
    infos = []
    for key, label in material.labels.items():
        own = [c for c in material.cells if canonical(c.config.task) == key]
        if not own:
            continue
        truncated = [bool(s.meta["truncated_tokens"]) for c in own for s in c.samples if "truncated_tokens" in s.meta]
        infos.append(
            TaskInfo(
                label=label,
                kind=own[0].config.task.kind,
                fields=own[0].config.task.model_dump(mode="json"),
                n=numbers.paired.scores[numbers.paired.tasks.index(label)].shape[1],
                seeds=tuple(sorted({c.config.seed for c in own})),
                truncated=statistics.fmean(truncated) if truncated else None,
                full=None if numbers.full is None else numbers.drawn.tasks[label][numbers.full],
            )
        )
    return infos


def _contrasts(stacks: Sequence[Stack], numbers: _Numbers) -> list[Contrast]:
    """Each stack with both parts, against its evictor alone at the same kept tokens and its quantizer alone."""
    complete = [s for s in stacks if not any(np.isnan(scores[s.index]).any() for scores in numbers.paired.scores)]
    if numbers.full is None or stacks[numbers.full] not in complete:
        return []
    found = []
    for stack in complete:
        if stack.evict == FULL or stack.quant == NONE:
            continue
        near = [s for s in complete if s.evict == stack.evict and s.quant == NONE]
        near = [s for s in near if math.isclose(s.kept, stack.kept, rel_tol=0.01)]  # same r, as measured
        evicted = [s for s in near if stack.text.startswith(s.text)] or near
        quantized = [s for s in complete if s.evict == FULL and s.quant == stack.quant]
        if len(evicted) == 1 and len(quantized) == 1:
            parts = evicted[0].index, quantized[0].index, stack.index, numbers.full
            found.append(Contrast(stack, stats.interaction_of(numbers.drawn, *parts)))
    return sorted(found, key=lambda c: (not c.value.nonadditive, -abs(c.value.score.estimate)))
