"""The leaderboard: score against real bytes, as a terminal table, Markdown, CSV, plots and one offline page.

    >>> from kvbench.leaderboard import build
    >>> board = build("results", "site")                   # doctest: +SKIP

A section is one model in one query mode; results of different sections never meet in a table. Within a section stacks
are ranked inside their budget group by retention, the mean over tasks of (task mean / task mean of the full 16-bit
cache on the same samples). Without a full-cache run the rank is on raw scores, and every output says so.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import io
import json
import math
import re
import statistics
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvbench import stats
from kvbench.results import Cell, Problem, ResultsError, Sample, canonical, read_cells
from kvbench.stats import Interval

TEMPLATES = Path(__file__).parent / "templates"
PALETTE = (
    "#2f6fde #d9730d #14946a #cf3f7c #7c53d3 #0e93a8 #9c6428 #6f8a12 #c43c32 #4a5bb5 #b0488f #5b7f95".split()
)  # evictors in alphabetical order; the page has its own shades of them for dark mode
MARKERS = "osD^vPXph<>*"  # quantizers in alphabetical order, after "none"
FULL, NONE = "full", "none"
SOLID, FAINT = 0.9, 0.5  # frontier probability at which a point is drawn on the front
SPREAD_PX = 34  # how far stacks of equal bytes are spread sideways in the chart, by evictor
FEW_SAMPLES = 20  # below, a percentile interval covers far less than it says
PATIENCE_S = 2.0  # silence before a progress line appears


@dataclass(frozen=True, order=True)
class Group:
    """Stacks that were given the same budget; ordered from the loosest to the tightest."""

    kind: int  # 0 no budget, 1 bytes, 2 share of tokens, 3 number of tokens
    minus: float  # minus the budget, so that sorting puts the loosest first

    @property
    def label(self) -> str:
        value = -self.minus
        share = f"{100 * value:.4g}%"
        return ("no budget", f"{share} of the bytes", f"{share} of the tokens", f"{value:g} tokens")[self.kind]

    @property
    def suffix(self) -> str:
        value = f"{-self.minus:.4g}"
        return ("", f"@{value}", f"@{value}tokens", f"@{value}tokens")[self.kind]


@dataclass(frozen=True)
class TaskScore:
    score: Interval
    retention: Interval | None
    perplexity: Interval | None
    n: int


@dataclass
class Stack:
    """One row: a stack of policies over all tasks of its section."""

    name: str
    key: str  # the name with its budget, unique in the section: what `compare` takes
    evict: str
    quant: str
    text: str  # the full configuration of the stack
    group: Group
    cells: list[Cell]
    index: int  # position among the section's policies
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    headline: Interval = Interval(math.nan, math.nan, math.nan)
    delta: Interval | None = None
    detectable: float = math.nan
    rho: float = math.nan  # measured bytes / bytes of the full cache, end of prefill
    rho_final: float = math.nan
    kept: float = math.nan  # kept tokens / prompt tokens
    frontier: float = math.nan
    rank: int | None = None
    like_best: bool = False
    missing: tuple[str, ...] = ()

    @property
    def is_full(self) -> bool:
        return self.evict == FULL and self.quant == NONE

    @property
    def n(self) -> int:
        return sum(t.n for t in self.tasks.values())

    @property
    def failed_checks(self) -> list[str]:
        return sorted({name for cell in self.cells for name, value in cell.checks.items() if value is False})


@dataclass(frozen=True)
class TaskInfo:
    label: str
    kind: str
    fields: dict[str, Any]
    n: int
    seeds: tuple[int, ...]
    truncated: float | None  # share of samples with truncated prompts, where recorded
    full: Interval | None


@dataclass(frozen=True)
class Contrast:
    """An interaction contrast: does adding the quantizer to the evictor cost more than both alone?"""

    stack: Stack
    value: stats.Interaction

    @property
    def verdict(self) -> str:
        if not self.value.nonadditive:
            return "no departure from additive"
        return "stacking hurts more than the sum" if self.value.score.estimate > 0 else "damages overlap"


@dataclass
class Section:
    title: str
    slug: str
    model: dict[str, Any]
    query_aware: bool
    stacks: list[Stack]
    tasks: list[TaskInfo]
    retention: bool  # whether the headline is retention or, without a full cache, the raw score
    notes: list[str]
    caption: list[str]
    floor: stats.Floor | None
    contrasts: list[Contrast]

    @property
    def mode(self) -> str:
        return "query-aware" if self.query_aware else "query-agnostic"

    @property
    def groups(self) -> list[tuple[Group, list[Stack]]]:
        """Stacks in rank order by group; incomplete ones last."""
        grouped = defaultdict(list)
        for stack in self.stacks:
            grouped[stack.group].append(stack)
        order = {g: sorted(s, key=lambda x: (x.rank is None, x.rank or 0, x.key)) for g, s in grouped.items()}
        return sorted(order.items())

    @property
    def headline(self) -> str:
        return "retention" if self.retention else "raw score"


@dataclass(frozen=True)
class LeftOut:
    """A cell that is in no table."""

    status: str
    section: str
    stack: str
    task: str
    reason: str


@dataclass
class Leaderboard:
    sections: list[Section]
    left_out: list[LeftOut]
    problems: list[Problem]
    cells: int
    resamples: int
    files: list[Path] = field(default_factory=list)


def build(
    folder: str | Path, out: str | Path | None = None, *, resamples: int = stats.RESAMPLES, quiet: bool = False
) -> Leaderboard:
    """Read the cells of `folder`, write Markdown, CSV, plots and the page to `out`, and print the table.

    `out` is `folder` unless given. Raises ResultsError when there is nothing to read or no place to write.
    """
    board = load(folder, resamples=resamples)
    out = Path(out if out is not None else folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        board.files = [
            _write(out / "leaderboard.md", to_markdown(board)),
            _write(out / "leaderboard.csv", to_csv(board)),
            _write(out / "index.html", to_html(board)),
            *write_plots(board, out),
        ]
    except OSError as error:
        raise ResultsError(f"cannot write the leaderboard to {out}: {error.strerror or error}") from error
    if not quiet:
        print_table(board)
    return board


def load(folder: str | Path, *, resamples: int = stats.RESAMPLES) -> Leaderboard:
    """The leaderboard of a folder of cells, without writing anything."""
    cells, problems = read_cells(folder)
    if not cells:
        raise ResultsError(f"no readable cell in {folder}: {len(problems)} bad, first {': '.join(problems[0])}")
    board = Leaderboard([], [], problems, len(cells), resamples)
    for material in _sections(cells):
        board.left_out += material.left_out
        if material.cells:
            board.sections.append(_section(material, resamples))
    for number_, section in enumerate(board.sections):  # the first section has the plain file names
        section.slug = "" if number_ == 0 else f"_{number_ + 1}_{slug(section.title)}"
    return board


@dataclass
class _Material:
    """The cells of one section, sorted into stacks that can be paired."""

    title: str
    cells: list[Cell]
    labels: dict[str, str]  # canonical task -> column name
    reseeded: set[str]
    stacks: list[Stack]
    scores: list[stats.Run]
    nlls: list[stats.Run]
    left_out: list[LeftOut]

    @property
    def full(self) -> int | None:
        return next((s.index for s in self.stacks if s.is_full), None)


def _sections(cells: Sequence[Cell]) -> list[_Material]:
    """One entry per model and query mode, in alphabetical order."""
    grouped: dict[tuple[str, bool, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        grouped[cell.config.model.name, cell.config.query_aware, _identity(cell)].append(cell)
    titles = Counter(_title(group[0]) for group in grouped.values())
    found = []
    for key, group in sorted(grouped.items(), key=lambda item: item[0]):
        title = _title(group[0])
        if titles[title] > 1:  # two models of one name: tell them apart by where they were loaded from
            title += f" · {group[0].config.model.path or key[2]}"
        found.append(_sorted_out(title, group))
    return found


def _identity(cell: Cell) -> str:
    # Batch size, attention kernel and the like do not make another model: two such runs are an A/A pair.
    model = cell.config.model.model_dump()
    return canonical({k: model.get(k) for k in ("name", "path", "dtype", "revision")})


def _title(cell: Cell) -> str:
    model, mode = cell.config.model, "query-aware" if cell.config.query_aware else "query-agnostic"
    return " · ".join(filter(None, (model.name, model.dtype, mode)))


def _sorted_out(title: str, cells: list[Cell]) -> _Material:
    labels, names = _task_labels(cells), _stack_names(cells)
    done = [c for c in cells if c.status == "done"]
    strangers = _other_prompts(done)
    left_out = [
        LeftOut(status, title, names[canonical(c.config.policy)][1], labels[canonical(c.config.task)], reason)
        for status, reason, c in [
            *((c.status, c.reason or "", c) for c in cells if c.status != "done"),
            *(
                ("not comparable", "its prompts (prompt_sha256) are not those of the other stacks", c)
                for c in strangers
            ),
        ]
    ]
    done = [c for c in done if c not in strangers]
    by_stack: dict[str, list[Cell]] = defaultdict(list)
    for cell in done:
        by_stack[canonical(cell.config.policy)].append(cell)
    material = _Material(title, done, labels, _reseeded(done), [], [], [], left_out)
    for index, (policy, own) in enumerate(sorted(by_stack.items())):
        own.sort(key=lambda c: (_natural(labels[canonical(c.config.task)]), c.config.seed))
        name, key = names[policy]
        config = own[0].config.policy
        material.stacks.append(Stack(name, key, config.evict, config.quant, config.stack, _group(own[0]), own, index))
        material.scores.append(_run(key, own, labels, material.reseeded, lambda s: s.score))
        material.nlls.append(_run(key, own, labels, material.reseeded, lambda s: s.nll))
    return material


def _section(material: _Material, resamples: int) -> Section:
    """Bootstrap the section once and read every number of its rows from that."""
    stacks, full = material.stacks, material.full
    paired = stats.pair(material.scores, keep_missing=True)
    drawn = stats.bootstrap(paired, full, resamples, track=_progress("bootstrap"))
    perplexity: dict[str, tuple[Interval, ...]] = {}
    if any(run.tasks for run in material.nlls):
        likelihoods = stats.bootstrap(stats.pair(material.nlls, keep_missing=True), None, resamples)
        perplexity = {t: tuple(_exp(i) for i in row) for t, row in likelihoods.tasks.items()}
    headline = drawn.retention or drawn.macro
    floor = _floor(stacks[full].cells, material.labels, material.reseeded) if full is not None else None
    for stack in stacks:
        _fill(stack, paired, drawn, perplexity, full)
    _rank(stacks, headline, drawn.macro, floor)
    complete = [s for s in stacks if not s.missing]
    shares = stats.frontier_probability(
        np.array([s.rho for s in complete]), headline.draws[:, [s.index for s in complete]]
    )
    for stack, share in zip(complete, shares, strict=True):
        stack.frontier = float(share)
    section = Section(
        title=material.title,
        slug="",
        model=material.cells[0].config.model.model_dump(mode="json"),
        query_aware=material.cells[0].config.query_aware,
        stacks=stacks,
        tasks=_task_infos(material, paired, drawn),
        retention=drawn.retention is not None,
        notes=_notes(full, drawn, paired),
        caption=[],
        floor=floor,
        contrasts=_contrasts(stacks, paired, drawn, full),
    )
    section.caption = _caption(section, resamples)
    return section


def _task_labels(cells: Sequence[Cell]) -> dict[str, str]:
    """Canonical task config -> column name: the task's name, with the fields that tell namesakes apart."""
    configs = {canonical(c.config.task): c.config.task.model_dump(mode="json") for c in cells}
    labels = {}
    for key, config in configs.items():
        namesakes = [other for other in configs.values() if other["name"] == config["name"]]
        differing = sorted(k for k in config if len({canonical(o.get(k)) for o in namesakes}) > 1)
        labels[key] = " ".join([config["name"], *(f"{k}={config[k]}" for k in differing)])
    return dict(sorted(labels.items(), key=lambda item: _natural(item[1])))


def _stack_names(cells: Sequence[Cell]) -> dict[str, tuple[str, str]]:
    """Canonical policy -> (name, key). Stacks that differ only in details carry the details in their name."""
    policies = {canonical(c.config.policy): c for c in cells}
    short = {}
    for key, cell in policies.items():
        policy = cell.config.policy
        parts = [p for p, absent in ((policy.evict, FULL), (policy.quant, NONE)) if p != absent]
        short[key] = " + ".join(parts) or "full cache", _group(cell).suffix
    count = Counter(short.values())
    named = {}
    for key, (name, suffix) in short.items():
        if count[name, suffix] > 1:
            name = policies[key].config.policy.stack
            named[key] = name, name
        else:
            named[key] = name, name.replace(" + ", "+") + suffix
    return named


def _group(cell: Cell) -> Group:
    policy = cell.config.policy
    if policy.memory is not None:
        return Group(1, -float(policy.memory))
    if policy.budget is not None:
        return Group(2 if isinstance(policy.budget, float) else 3, -float(policy.budget))
    return Group(0, 0.0)


def _other_prompts(cells: Sequence[Cell]) -> list[Cell]:
    """Cells whose prompts are not those of the full cache (or else of most cells) for the same task and seed."""
    votes: dict[tuple, Counter] = defaultdict(Counter)
    for cell in cells:
        weight = len(cells) if cell.config.policy.evict == FULL and cell.config.policy.quant == NONE else 1
        for s in cell.samples:
            votes[canonical(cell.config.task), cell.config.seed, s.sample_id][s.prompt_sha256] += weight
    chosen = {key: count.most_common(1)[0][0] for key, count in votes.items()}
    return [
        cell
        for cell in cells
        if any(
            chosen[canonical(cell.config.task), cell.config.seed, s.sample_id] != s.prompt_sha256 for s in cell.samples
        )
    ]


def _reseeded(cells: Sequence[Cell]) -> set[str]:
    """Tasks whose seed changes the prompts: there a sample is known by its id and seed together."""
    shas: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cell in cells:
        for s in cell.samples:
            shas[canonical(cell.config.task), s.sample_id].add(s.prompt_sha256)
    return {task for (task, _), found in shas.items() if len(found) > 1}


def _run(
    name: str, cells: Sequence[Cell], labels: dict, reseeded: set[str], value: Callable[[Sample], float | None]
) -> stats.Run:
    """The rows of one stack. Runs with other policy seeds on the same prompts are averaged per sample."""
    tasks: dict[str, dict[str, list[stats.Row]]] = defaultdict(lambda: defaultdict(list))
    for cell in cells:
        task = canonical(cell.config.task)
        for s in cell.samples:
            if (number := value(s)) is not None:
                sample = f"{s.sample_id} (seed {cell.config.seed})" if task in reseeded else s.sample_id
                cluster = str(s.meta["cluster"]) if "cluster" in s.meta else None
                tasks[labels[task]][sample].append(stats.Row(number, s.prompt_sha256, cluster))
    mean = {
        task: {k: r[0]._replace(score=statistics.fmean(x.score for x in r)) for k, r in rows.items()}
        for task, rows in tasks.items()
    }
    ordered = {label: mean[label] for label in labels.values() if label in mean}
    return stats.Run(name, cells[0].config.query_aware, ordered)


def _task_infos(material: _Material, paired: stats.Paired, drawn: stats.Bootstrap) -> list[TaskInfo]:
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
                n=paired.scores[paired.tasks.index(label)].shape[1],
                seeds=tuple(sorted({c.config.seed for c in own})),
                truncated=statistics.fmean(truncated) if truncated else None,
                full=drawn.tasks[label][material.full] if material.full is not None else None,
            )
        )
    return infos


def _fill(
    stack: Stack, paired: stats.Paired, drawn: stats.Bootstrap, perplexity: dict[str, tuple[Interval, ...]],
    full: int | None,
) -> None:  # fmt: skip
    i = stack.index
    for task, scores in zip(paired.tasks, paired.scores, strict=True):
        if n := int(np.sum(~np.isnan(scores[i]))):
            retention = drawn.task_retention[task][i] if task in drawn.task_retention else None
            ppl = perplexity[task][i] if task in perplexity else None
            stack.tasks[task] = TaskScore(drawn.tasks[task][i], retention, ppl, n)
    # NaN retention: no sample in common with the full cache, which is as good as not having run.
    needed = drawn.task_retention or drawn.tasks
    stack.missing = tuple(t for t, intervals in needed.items() if math.isnan(intervals[i].estimate))
    if not stack.missing:
        stack.headline = (drawn.retention or drawn.macro).interval(i)
    if full is not None and i != full:
        _compare_to_full(stack, paired, drawn, full)
    samples = [s for c in stack.cells for s in c.samples]
    stack.rho, stack.rho_final = _bytes_ratios(samples)
    stack.kept = sum(s.kept_tokens for s in samples) / max(1, sum(s.n_prompt_tokens for s in samples))


def _compare_to_full(stack: Stack, paired: stats.Paired, drawn: stats.Bootstrap, full: int) -> None:
    deltas, clusters = [], []
    for scores, codes in zip(paired.scores, paired.clusters, strict=True):
        delta = scores[stack.index] - scores[full]
        shared = ~np.isnan(delta)
        if not shared.any():
            return  # a macro mean over fewer tasks would not be the one of the other rows
        deltas.append(delta[shared])
        clusters.append(np.unique(codes[shared], return_inverse=True)[1])
    stack.delta = drawn.macro.contrast({stack.index: 1, full: -1})
    stack.detectable = stats.detectable_difference(deltas, clusters)


def _bytes_ratios(samples: Sequence[Sample]) -> tuple[float, float]:
    """Ratios of sums, at the end of prefill and at the end of the answer."""
    return (
        sum(s.kv_bytes_prefill_end for s in samples) / sum(s.kv_bytes_full for s in samples),
        sum(s.kv_bytes_final for s in samples) / sum(s.kv_bytes_full_final for s in samples),
    )


def _rank(stacks: Sequence[Stack], headline: stats.Sampled, macro: stats.Sampled, floor: stats.Floor | None) -> None:
    groups = defaultdict(list)
    for stack in stacks:
        if not stack.missing:
            groups[stack.group].append(stack)
    for group in groups.values():
        group.sort(key=lambda s: (-s.headline.estimate, s.rho, s.key))
        best = group[0]
        for rank, stack in enumerate(group, 1):
            stack.rank = rank
            if stack is not best:
                noise = floor.value if floor else 0.0
                gap = abs(macro.point[best.index] - macro.point[stack.index])
                stack.like_best = headline.contrast({best.index: 1, stack.index: -1}).contains(0.0) or gap < noise


def _floor(cells: Sequence[Cell], labels: dict, reseeded: set[str]) -> stats.Floor | None:
    """The A/A floor from the first two runs of the full cache on the same prompts, over the tasks that have two."""
    by_task = defaultdict(list)
    for cell in sorted(cells, key=lambda c: c.cell_id):
        by_task[canonical(cell.config.task)].append(cell)
    twice = [pair for task, pair in by_task.items() if len(pair) > 1 and task not in reseeded]
    if not twice:
        return None
    first, second = (_run(f"run {k + 1}", [p[k] for p in twice], labels, set(), lambda s: s.score) for k in (0, 1))
    try:
        return stats.aa_floor(first, second)
    except ValueError:  # the two runs have no sample in common
        return None


def _contrasts(
    stacks: Sequence[Stack], paired: stats.Paired, drawn: stats.Bootstrap, full: int | None
) -> list[Contrast]:
    """Each stack with both parts, against its evictor alone at the same kept tokens and its quantizer alone."""
    complete = [s for s in stacks if not any(np.isnan(scores[s.index]).any() for scores in paired.scores)]
    found = []
    for stack in complete:
        if full is None or stacks[full] not in complete or stack.evict == FULL or stack.quant == NONE:
            continue
        near = [s for s in complete if s.evict == stack.evict and s.quant == NONE]
        near = [s for s in near if math.isclose(s.kept, stack.kept, rel_tol=0.01)]  # same r, as measured
        own_text = [s for s in near if stack.text.startswith(s.text)]
        evicted = own_text or near
        quantized = [s for s in complete if s.evict == FULL and s.quant == stack.quant]
        if len(evicted) == 1 and len(quantized) == 1:
            value = stats.interaction_of(drawn, evicted[0].index, quantized[0].index, stack.index, full)
            found.append(Contrast(stack, value))
    return sorted(found, key=lambda c: (not c.value.nonadditive, -abs(c.value.score.estimate)))


def _notes(full: int | None, drawn: stats.Bootstrap, paired: stats.Paired) -> list[str]:
    notes = []
    if full is None:
        notes.append(
            "No full-cache cells (evict=full, quant=none): ranked on raw scores, without retention or difference."
        )
    elif drawn.retention is None:
        notes.append("The full cache scores 0 or did not run on every task: ranked on raw scores.")
    elif left := [t for t in paired.tasks if t not in drawn.retention_tasks]:
        notes.append(f"Not in the headline, as the full cache scores 0 or did not run there: {', '.join(left)}.")
    if few := [t for t, scores in zip(paired.tasks, paired.scores, strict=True) if scores.shape[1] < FEW_SAMPLES]:
        notes.append(f"Fewer than {FEW_SAMPLES} samples in {', '.join(few)}: intervals are too narrow to rely on.")
    return notes


def _caption(section: Section, resamples: int) -> list[str]:
    counts = ", ".join(f"{t.label} {t.n}" for t in section.tasks)
    how = (
        "share of the full 16-bit cache's score that is kept, mean over tasks"
        if section.retention
        else "mean over tasks of the task's mean score"
    )
    lines = [
        f"Headline: {how}; 95 % intervals from {resamples:,} paired resamples shared by all stacks, not corrected for "
        "the number of comparisons.",
        f"Samples per task: {counts}. Bytes are measured (codes, scales, windows, indices), as a share of the 16-bit "
        "full cache of the same samples, at the end of prefill unless marked final.",
    ]
    found = [s.detectable for s in section.stacks if s.detectable > 0]
    if found:
        typical, worst = statistics.median(found), max(found)
        lines.append(
            f"Detectable difference to the full cache (80 % power): typically {100 * typical:.1f} points, "
            f"at worst {100 * worst:.1f}. Smaller true differences are likely to be missed."
        )
    if section.floor is None:
        lines.append("A/A floor: not measured (no second run of the full cache on the same prompts).")
    elif section.floor.bound is not None:
        lines.append(
            f"A/A floor: two runs of the full cache agree on all {section.floor.n} samples "
            f"(95 % bound of the flip rate {100 * section.floor.bound:.2g} %)."
        )
    else:
        lines.append(
            f"A/A floor: two runs of the full cache differ on {100 * section.floor.flips:.1f} % of {section.floor.n} "
            f"samples; differences below {100 * section.floor.value:.1f} points are not resolved."
        )
    return lines


def _exp(interval: Interval) -> Interval:
    return Interval(math.exp(interval.estimate), math.exp(interval.low), math.exp(interval.high))


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number for a reader: a true minus, and a dash for what is unknown."""
    if value is None or math.isnan(value):
        return "–"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return (text[1:] if text.strip("-+0.") == "" and text[0] in "-+" else text).replace("-", "−")


def percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    return number(None if value is None else 100 * value, digits, sign)


def span(interval: Interval | None, digits: int = 1, scale: float = 100) -> str:
    """The ends of an interval, "94.1 to 98.0"; a dash where they are unknown."""
    if interval is None or math.isnan(interval.low):
        return "–"
    return f"{number(scale * interval.low, digits)} to {number(scale * interval.high, digits)}"


def plain(text: Any) -> str:
    """One line without control characters, so that a name cannot move the cursor or end a table row."""
    return "".join(c if c.isprintable() else "�" for c in str(text))


def markdown(text: Any) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~$<>&])", r"\\\1", plain(text)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80] or "unnamed"


def _natural(text: str) -> list:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", text)]


def column(task: TaskInfo) -> str:
    """The heading of a task's column, with its unit."""
    unit = "ppl" if task.kind == "nll" else "%"
    return task.label if unit in task.label.split() else f"{task.label}, {unit}"


def cell_text(task: TaskScore | None) -> str:
    """A task's column: accuracy in percent, or perplexity."""
    if task is None:
        return "–"
    return number(task.perplexity.estimate, 2) if task.perplexity else percent(task.score.estimate)


def marks(stack: Stack) -> list[str]:
    """What a reader must know about a row beside its numbers."""
    found = []
    if stack.like_best:
        found.append("≈ best")
    if stack.frontier >= FAINT:
        found.append("front" if stack.frontier >= SOLID else "front?")
    if stack.missing:
        found.append("incomplete")
    return found + [f"check failed: {name}" for name in stack.failed_checks]


def to_markdown(board: Leaderboard) -> str:
    lines = ["# KV-cache leaderboard", ""]
    for section in board.sections:
        lines += [f"## {markdown(section.title)}", ""]
        lines += [f"**{markdown(note)}**\n" for note in section.notes]
        lines += [f"![Score against measured bytes](pareto{section.slug}.png)", ""]
        head = ["#", "Stack", "Keeps %" if section.retention else "Score %", "95 %", "Δ points", "Δ 95 %", "Bytes %"]
        head += ["Final bytes %", *map(column, section.tasks), "Notes"]
        for group, stacks in section.groups:
            lines += [f"### {markdown(group.label)}", ""]
            lines += [_md_row(map(markdown, head)), _md_row(["--:", ":--", *["--:"] * (len(head) - 3), ":--"])]
            lines += [_md_row(_md_cells(section, stack)) for stack in stacks] + [""]
        lines += [f"- {markdown(line)}" for line in section.caption] + [""]
        if section.contrasts:
            lines += ["### Do eviction and quantization compose?", ""]
            lines += [_md_row(["Stack", "Interaction, points", "95 %", "Reading"])]
            lines += [_md_row([":--", "--:", "--:", ":--"])]
            for c in section.contrasts:
                row = [c.stack.key, percent(c.value.score.estimate, sign=True), span(c.value.score), c.verdict]
                lines.append(_md_row(map(markdown, row)))
            lines.append("")
    if not board.sections:
        lines += ["No finished cell yet.", ""]
    if board.left_out:
        lines += ["## Left out", "", _md_row(["Status", "Section", "Stack", "Task", "Reason"]), _md_row([":--"] * 5)]
        lines += [_md_row(map(markdown, (x.status, x.section, x.stack, x.task, x.reason))) for x in board.left_out]
        lines.append("")
    if board.problems:
        lines += ["## Unreadable files", ""] + [f"- {markdown(p.file)}: {markdown(p.reason)}" for p in board.problems]
    return "\n".join(lines).rstrip() + "\n"


def _md_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _md_cells(section: Section, stack: Stack) -> list[str]:
    return [
        str(stack.rank or "–"),
        markdown(stack.name),
        percent(stack.headline.estimate),
        span(stack.headline),
        percent(stack.delta.estimate if stack.delta else None, sign=True),
        span(stack.delta),
        percent(stack.rho),
        percent(stack.rho_final),
        *(cell_text(stack.tasks.get(t.label)) for t in section.tasks),
        markdown(", ".join(marks(stack))),
    ]


def to_csv(board: Leaderboard) -> str:
    """One row per stack with every number in full, then the cells that are in no table."""
    rows = []
    for section in board.sections:
        for group, stacks in section.groups:
            for s in stacks:
                rows.append(
                    {
                        "section": section.title,
                        "model": section.model["name"],
                        "query_mode": section.mode,
                        "status": "incomplete" if s.missing else "done",
                        "reason": f"missing: {', '.join(s.missing)}" if s.missing else "",
                        "group": group.label,
                        "rank": s.rank,
                        "like_best": s.like_best,
                        "stack": s.key,
                        "evict": s.evict,
                        "quant": s.quant,
                        "config": s.text,
                        "headline": section.headline,
                        **_columns("score", s.headline),
                        **_columns("delta", s.delta),
                        "detectable": s.detectable,
                        "rho": s.rho,
                        "rho_final": s.rho_final,
                        "kept_share": s.kept,
                        "frontier_probability": s.frontier,
                        "failed_checks": " ".join(s.failed_checks),
                        "n": s.n,
                    }
                )
                for label, task in s.tasks.items():
                    rows[-1] |= _columns(f"task {label}", task.score)
                    if task.perplexity:
                        rows[-1] |= _columns(f"perplexity {label}", task.perplexity)
    for x in board.left_out:
        rows.append({"section": x.section, "status": x.status, "reason": x.reason, "stack": x.stack, "task": x.task})
    for p in board.problems:
        rows.append({"status": "unreadable", "reason": f"{p.file}: {p.reason}"})
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["section"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_csv_value, names))
    writer.writerows([_csv_value(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def _columns(name: str, interval: Interval | None) -> dict[str, float | None]:
    values = (interval.estimate, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip((name, f"{name} low", f"{name} high"), values, strict=True))


def _csv_value(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):  # a leading sign would make a spreadsheet evaluate a name as a formula
        return "'" + plain(value) if value[:1] in ("=", "+", "-", "@") else plain(value)
    return value


def print_table(board: Leaderboard, console: Any = None) -> None:
    """The leaderboard in the terminal; task columns only where they fit."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    for section in board.sections:
        title = Text(plain(section.title), style="bold")
        table = Table(
            title=title, title_justify="left", header_style="dim", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0)
        )
        shown = section.tasks if console.width >= 88 + sum(len(column(t)) + 1 for t in section.tasks) else []
        table.add_column("#", justify="right", no_wrap=True)
        table.add_column("stack", overflow="fold", min_width=18)
        for name in ("keeps %" if section.retention else "score %", "95 %", "Δ points", "bytes %"):
            table.add_column(name, justify="right", no_wrap=True)
        for task in shown:
            table.add_column(Text(plain(column(task))), justify="right")
        table.add_column("")
        for group, stacks in section.groups:
            table.add_section()
            table.add_row("", Text(group.label, style="bold underline"))
            for s in stacks:
                best = s.rank == 1
                table.add_row(
                    str(s.rank or "–"),
                    Text(plain(s.name), style="bold green" if best else ""),
                    percent(s.headline.estimate),
                    Text(span(s.headline), style="dim"),
                    percent(s.delta.estimate if s.delta else None, sign=True),
                    percent(s.rho),
                    *(cell_text(s.tasks.get(t.label)) for t in shown),
                    Text(plain(", ".join(marks(s))), style="red" if s.failed_checks else "dim"),
                )
        console.print(table)
        for note in section.notes:
            console.print(Text(plain(note), style="bold yellow"))
        for line in section.caption:
            console.print(Text(plain(line), style="dim"))
        console.print()
    if not board.sections:
        console.print("No finished cell yet.")
    if board.left_out:
        console.print(Text(f"Left out: {len(board.left_out)} cells", style="bold"))
        for x in board.left_out:
            console.print(Text(plain(f"  {x.status}: {x.stack}, {x.task}: {x.reason}")))
    for p in board.problems:
        console.print(Text(plain(f"unreadable: {p.file}: {p.reason}"), style="yellow"))


@dataclass
class Point:
    """A stack in the chart, in pixels of the drawing area."""

    stack: Stack
    x: float
    y: float
    low: float
    high: float
    colour: int  # index into PALETTE, -1 for no eviction
    marker: int
    label: tuple[float, float, str] | None = None  # offset and anchor, for points on the front

    @property
    def text(self) -> str:
        name = plain(self.stack.key)
        return name if len(name) <= 32 else name[:31] + "…"


@dataclass
class Chart:
    """Headline against bytes: the one layout behind the PNG and the page's drawing."""

    width: int
    height: int
    points: list[Point]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    front: list[tuple[float, float]]
    full_y: float | None
    evictors: list[tuple[str, int]]
    quantizers: list[tuple[str, int]]


def chart(section: Section, width: int = 880, height: int = 400) -> Chart | None:
    """Lay the chart out; None if no stack has a headline."""
    stacks = [s for s in section.stacks if not math.isnan(s.headline.estimate) and s.rho > 0]
    if not stacks:
        return None
    evictors = sorted({s.evict for s in stacks} - {FULL})
    quantizers = sorted({s.quant for s in stacks} - {NONE})
    x = [math.log2(s.rho) for s in stacks]
    left, right = min(x) - 0.35, max(x) + 0.35
    scores = [s.headline.estimate for s in stacks]
    step = _step(max(scores) - min(0.98 * max(scores), *scores))
    bottom, top = min(scores) - 0.5 * step, max(*scores, section.retention) + 0.6 * step

    def at_y(value: float) -> float:
        return height * (top - value) / (top - bottom)

    def at_x(value: float) -> float:
        return width * (value - left) / (right - left)

    points = []
    for stack, u in zip(stacks, x, strict=True):
        h = stack.headline
        ends = (h.estimate, h.estimate) if math.isnan(h.low) else (h.low, h.high)
        colour = evictors.index(stack.evict) % len(PALETTE) if stack.evict != FULL else -1
        marker = quantizers.index(stack.quant) % (len(MARKERS) - 1) + 1 if stack.quant != NONE else 0
        aside = 0.0  # equal bytes are the rule in a byte budget: without a shift the evictors cover each other
        if stack.evict != FULL and sum(abs(at_x(v) - at_x(u)) < 6 for v in x) > 1:
            aside = SPREAD_PX * (evictors.index(stack.evict) / max(1, len(evictors) - 1) - 0.5)
        points.append(Point(stack, at_x(u) + aside, at_y(h.estimate), at_y(ends[0]), at_y(ends[1]), colour, marker))
    on_front = stats.pareto_front(np.array([s.rho for s in stacks]), np.array(scores))
    front = sorted(((p.x, p.y) for p, on in zip(points, on_front, strict=True) if on), reverse=True)
    named = [p for p, on in zip(points, on_front, strict=True) if on and not p.stack.is_full]  # its line has a name
    _place_labels(points, named, width, height)
    ticks = np.arange(math.ceil(left), math.floor(right) + 1)
    return Chart(
        width=width,
        height=height,
        points=sorted(points, key=lambda p: p.stack.frontier >= FAINT),  # the front is drawn last, on top
        x_ticks=[(at_x(t), "100%" if t == 0 else f"{100 * 2.0**t:.4g}%") for t in ticks],
        y_ticks=[
            (at_y(v), f"{100 * v:g}%") for v in np.round(np.arange(math.ceil(bottom / step) * step, top, step), 6)
        ],
        front=front,
        full_y=at_y(1.0) if section.retention else None,
        evictors=[(e, i % len(PALETTE)) for i, e in enumerate(evictors)],
        quantizers=[(q, i % (len(MARKERS) - 1) + 1) for i, q in enumerate(quantizers)],
    )


def _step(extent: float) -> float:
    """A round tick step that cuts the extent into about five."""
    raw = max(extent, 0.01) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)


def _place_labels(points: Sequence[Point], wanted: Sequence[Point], width: int, height: int) -> None:
    """Name the front's points where the name covers neither a point nor another name."""
    taken = [(p.x - 6, p.y - 6, p.x + 6, p.y + 6) for p in points]
    for p in sorted(wanted, key=lambda p: p.x):
        w, h = 7.0 * len(p.text), 13
        for dx, dy, anchor in ((-9, -9, "end"), (0, -14, "middle"), (9, -9, "start"), (-11, 4, "end"), (11, 4, "start"),
                               (9, 18, "start"), (0, 22, "middle"), (-9, 18, "end"), (0, -30, "middle")):  # fmt: skip
            x0 = p.x + dx - {"end": w, "middle": w / 2, "start": 0}[anchor]
            box = (x0, p.y + dy - h + 2, x0 + w, p.y + dy + 3)
            if box[0] < 2 or box[2] > width - 2 or box[1] < 2 or box[3] > height - 2:
                continue
            if not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                p.label = (dx, dy, anchor)
                taken.append(box)
                break


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
    lengths, column = _bins([length for length, _, _ in placed])
    depths, row = _bins([depth for _, depth, _ in placed])
    sums, counts = (np.zeros((len(depths), len(lengths))) for _ in range(2))
    for length, depth, score in placed:
        sums[row(depth), column(length)] += score
        counts[row(depth), column(length)] += 1
    share = max(depth for _, depth, _ in placed) <= 1
    with np.errstate(invalid="ignore"):
        values = (sums / counts).tolist()
    return Heat(
        [f"{v / 1024:g}k" if v >= 1024 and v % 1024 == 0 else f"{v:.0f}" for v in lengths],
        [f"{100 * v:.0f}%" if share else f"{v:.0f}%" for v in depths],
        values,
    )


def _bins(values: Sequence[float], most: int = 12) -> tuple[list[float], Callable[[float], int]]:
    """The distinct values, or the centres of ten equal bins when there are too many to draw."""
    distinct = sorted(set(values))
    if len(distinct) <= most:
        return distinct, distinct.index
    edges = np.linspace(distinct[0], distinct[-1], 11)
    return ((edges[:-1] + edges[1:]) / 2).tolist(), lambda v: int(np.clip(np.searchsorted(edges, v, "right") - 1, 0, 9))


def write_plots(board: Leaderboard, out: Path) -> list[Path]:
    """All PNG files: the Pareto chart, needle maps and interaction contrasts of every section."""
    jobs: list[tuple[Path, Callable[[Path], None]]] = []
    for section in board.sections:
        if drawing := chart(section):
            jobs.append((out / f"pareto{section.slug}.png", lambda p, c=drawing, s=section: _pareto_png(p, c, s)))
        maps = [(s, h) for _, stacks in section.groups for s in stacks if (h := heat(s))]
        taken = Counter()
        for stack, one in maps:
            name = slug(stack.key)
            taken[name] += 1
            name += f"-{taken[name]}" if taken[name] > 1 else ""
            jobs.append((out / f"niah{section.slug}_{name}.png", lambda p, m=[(stack, one)]: _heat_png(p, m)))
        if maps:
            jobs.append((out / f"niah{section.slug}.png", lambda p, m=maps: _heat_png(p, m)))
        if section.contrasts:
            jobs.append((out / f"interaction{section.slug}.png", lambda p, s=section: _interaction_png(p, s)))
    for path, draw in _progress("plots")(jobs):
        draw(path)
    return [path for path, _ in jobs]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b8bcc6")
    axes.tick_params(colors="#5b6070", labelsize=9)
    axes.set_axisbelow(True)


def _literal(text: str) -> str:
    return plain(text).replace("$", r"\$")  # matplotlib would read formulas


def _pareto_png(path: Path, drawing: Chart, section: Section) -> None:
    figure = _figure(10.8, 5.4)
    axes = figure.add_subplot()
    _style(axes)
    axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.set_xticks(*map(list, zip(*drawing.x_ticks, strict=True))) if drawing.x_ticks else axes.set_xticks([])
    axes.set_yticks(*map(list, zip(*drawing.y_ticks, strict=True)))
    axes.grid(color="#eceef2", linewidth=0.8)
    if drawing.full_y is not None:
        axes.axhline(drawing.full_y, color="#8a8f9c", linewidth=0.9, linestyle=(0, (4, 3)))
    if drawing.front:
        xs, ys = zip(*drawing.front, strict=True)
        axes.step(xs, ys, where="pre", color="#1d2130", linewidth=1.2, alpha=0.55, zorder=2)
    for p in drawing.points:
        colour = PALETTE[p.colour] if p.colour >= 0 else "#1d2130"
        strong = p.stack.frontier >= FAINT
        axes.plot([p.x, p.x], [p.low, p.high], color=colour, alpha=0.7 if strong else 0.25, linewidth=1.2, zorder=3)
        axes.plot(
            p.x, p.y, MARKERS[p.marker], color=colour, markersize=7.5, markeredgecolor="white", markeredgewidth=0.8,
            alpha=1 if strong else 0.7, zorder=4,
        )  # fmt: skip
        if p.label:
            dx, dy, anchor = p.label
            place = {"end": "right", "middle": "center", "start": "left"}[anchor]
            axes.annotate(
                _literal(p.text), (p.x, p.y), (0.72 * dx, -0.72 * dy), textcoords="offset points", ha=place,
                fontsize=8, color="#1d2130", zorder=5,
            )  # fmt: skip
    axes.set_xlabel(
        "measured bytes, share of the 16-bit full cache (log2; equal bytes are spread sideways)", color="#5b6070"
    )
    axes.set_ylabel("score kept" if section.retention else "mean score", color="#5b6070")
    axes.set_title(_literal(section.title), loc="left", fontsize=11, color="#1d2130")
    handles = [_handle("o", "#1d2130", "no eviction")] if any(p.colour < 0 for p in drawing.points) else []
    handles += [_handle("o", PALETTE[c], name) for name, c in drawing.evictors]
    handles += [_handle(MARKERS[m], "#8a8f9c", name) for name, m in drawing.quantizers]
    if drawing.quantizers:
        handles.insert(len(handles) - len(drawing.quantizers), _handle("o", "#8a8f9c", "16 bit"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=8.5, labelcolor="#3a3f4d")
    _save(figure, path)


def _handle(marker: str, colour: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    label = _literal(label)
    label = f" {label}" if label.startswith("_") else label  # matplotlib hides labels that start with an underscore
    return Line2D([], [], linestyle="", marker=marker, color=colour, markersize=7, markeredgecolor="white", label=label)


def _heat_png(path: Path, maps: Sequence[tuple[Stack, Heat]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("needle", ["#c8541b", "#f0b07a", "#f3f1ea", "#8db4e2", "#245fb8"])
    single, columns = len(maps) == 1, min(len(maps), max(5, math.ceil(math.sqrt(1.3 * len(maps)))))
    rows = math.ceil(len(maps) / columns)
    figure = _figure(*((6.2, 4.2) if single else (2.5 * columns + 0.9, 2.0 * rows + 0.4)))
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for axes in grid.flat[len(maps) :]:
        axes.set_visible(False)
    for number_, (axes, (stack, one)) in enumerate(zip(grid.flat, maps, strict=False)):
        values = np.ma.masked_invalid(np.array(one.values))
        image = axes.imshow(values, cmap=ramp, vmin=0, vmax=1, aspect="auto")
        axes.set_facecolor("#e4e6eb")
        axes.set_xticks(range(len(one.lengths)), one.lengths, fontsize=8 if single else 6.5)
        axes.set_yticks(range(len(one.depths)), one.depths, fontsize=8 if single else 6.5)
        axes.tick_params(length=0, colors="#5b6070")
        axes.spines[:].set_visible(False)
        title = f"{_literal(stack.key)[:34]}  {100 * values.mean():.0f}%"
        axes.set_title(title, fontsize=10.5 if single else 8, loc="left", color="#1d2130")
        if single or number_ % columns == 0:
            axes.set_ylabel("needle depth", color="#5b6070", fontsize=8)
        if single or number_ + columns >= len(maps):
            axes.set_xlabel("prompt length, tokens", color="#5b6070", fontsize=8)
    bar = figure.colorbar(image, ax=grid, shrink=0.8 if single else min(1.0, 3 / rows), aspect=24, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("score", color="#5b6070", fontsize=8)
    bar.ax.tick_params(length=0, labelsize=7.5, colors="#5b6070")
    _save(figure, path)


def _interaction_png(path: Path, section: Section) -> None:
    ordered = sorted(section.contrasts, key=lambda c: c.value.score.estimate)
    figure = _figure(8.2, 1.2 + 0.26 * len(ordered))
    axes = figure.add_subplot()
    _style(axes)
    axes.axvline(0, color="#8a8f9c", linewidth=0.9)
    axes.grid(axis="x", color="#eceef2", linewidth=0.8)
    for y, c in enumerate(ordered):
        i = c.value.score
        colour = ("#c8541b" if i.estimate > 0 else "#245fb8") if c.value.nonadditive else "#8a8f9c"
        axes.plot([100 * i.low, 100 * i.high], [y, y], color=colour, linewidth=1.6)
        axes.plot(100 * i.estimate, y, "o", color=colour, markersize=6, markeredgecolor="white")
    axes.set_yticks(range(len(ordered)), [_literal(c.stack.key) for c in ordered], fontsize=8.5)
    axes.set_xlabel("interaction, points: damage of the stack minus the sum of its parts", color="#5b6070", fontsize=9)
    axes.set_title(
        "left: damages overlap      right: stacking hurts more than the sum", fontsize=9, color="#5b6070", loc="left"
    )
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter the font lacks is drawn as a box, and that will do
        figure.savefig(path, dpi=160, metadata={"Software": None})  # unstamped: same results, same file


def to_html(board: Leaderboard) -> str:
    """One page that needs nothing else: styles, script and drawings are inside, and every text is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, span=span, plain=plain, pretty=_pretty)
    cells = [cell for section in board.sections for stack in section.stacks for cell in stack.cells]
    return environment.get_template("leaderboard.html.j2").render(
        board=board,
        charts=[chart(section) for section in board.sections],
        heat=heat,
        marks=marks,
        cell_text=cell_text,
        column=column,
        isnan=math.isnan,
        scale=_scale,
        solid=SOLID,
        faint=FAINT,
        stacks=sum(len(section.stacks) for section in board.sections),
        samples=sum(len(cell.samples) for cell in cells),
        newest=max((cell.provenance.started for cell in cells), default=""),
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _scale(section: Section) -> Callable[[float], float]:
    """Where a headline stands on the small axis of its table cell, 0 to 100."""
    known = [s.headline for s in section.stacks if not math.isnan(s.headline.estimate)]
    values = [v for i in known for v in (i.estimate, i.low, i.high) if not math.isnan(v)] + [1.0] * section.retention
    low, high = min(values, default=0.0), max(values, default=1.0)
    return lambda v: round(100 * (v - low) / (high - low), 2) if high > low else 50.0


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _progress(label: str) -> Callable[[Sequence], Iterator]:
    """Wrap a loop: after two silent seconds a line on stderr says how far it is."""

    def track(items: Sequence) -> Iterator:
        start = said = time.monotonic()
        live = sys.stderr.isatty()  # a log file gets a line now and then instead of one that is rewritten
        for done, item in enumerate(items):
            now = time.monotonic()
            if now - start > PATIENCE_S and (live or said == start or now - said > 10 * PATIENCE_S):
                print(f"{label}: {done} of {len(items)}", end="\r" if live else "\n", file=sys.stderr, flush=True)
                said = now
            yield item
        if said != start:
            print(f"{label}: {len(items)} of {len(items)}", file=sys.stderr)

    return track


def main_leaderboard(argv: Sequence[str] | None = None) -> int:
    """`kvbench leaderboard RESULTS [--out DIR]`"""
    parser = argparse.ArgumentParser(prog="kvbench leaderboard", description="Build the leaderboard of recorded runs.")
    parser.add_argument("results", help="folder with cells/*.json")
    parser.add_argument("--out", help="where to write; default: the results folder")
    parser.add_argument("--resamples", type=_positive, default=stats.RESAMPLES, help="bootstrap resamples")
    args = parser.parse_args(argv)
    try:
        board = build(args.results, args.out, resamples=args.resamples)
    except (ResultsError, ValueError) as error:
        return _fail(error)
    print(f"wrote {board.files[2]} and {len(board.files) - 1} more files")
    return 0


def main_compare(argv: Sequence[str] | None = None) -> int:
    """`kvbench compare A B RESULTS`"""
    parser = argparse.ArgumentParser(
        prog="kvbench compare", description="Say whether two stacks differ, and by how much."
    )
    parser.add_argument("a", help="a stack as the leaderboard names it, such as h2o+kivi4@0.25")
    parser.add_argument("b", help='the other one; "full" is the uncompressed cache')
    parser.add_argument("results", help="folder with cells/*.json")
    parser.add_argument("--resamples", type=_positive, default=stats.RESAMPLES, help="bootstrap resamples")
    args = parser.parse_args(argv)
    try:
        cells, problems = read_cells(args.results)
        verdicts = compare(args.a, args.b, cells, resamples=args.resamples)
    except (ResultsError, ValueError) as error:
        return _fail(error)
    print("\n\n".join(verdicts))
    for problem in problems:
        print(f"not used: {plain(problem.file)}: {plain(problem.reason)}", file=sys.stderr)
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _fail(error: Exception) -> int:
    print(f"error: {plain(error)}", file=sys.stderr)
    return 1


def compare(a: str, b: str, cells: Sequence[Cell], *, resamples: int = stats.RESAMPLES) -> list[str]:
    """The verdict on two stacks, once per section that has both. Raises ValueError when they cannot be compared."""
    sections = _sections(cells)
    found = [(m, _find(a, m.stacks), _find(b, m.stacks)) for m in sections]
    for name, hits in ((a, [x for _, x, _ in found]), (b, [y for _, _, y in found])):
        if not any(hits):
            known = sorted({s.key for m in sections for s in m.stacks})
            close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ValueError(f"no finished stack {name!r}; {hint}there are: {', '.join(known) or 'none'}")
    both = [(m, x, y) for m, x, y in found if x and y]
    if not both:
        (first, x), (second, y) = (next((m, hit[i]) for m, *hit in found if hit[i]) for i in (0, 1))
        if first.cells[0].config.query_aware != second.cells[0].config.query_aware:
            stats.pair([first.scores[x.index], second.scores[y.index]])  # says why not
        raise ValueError(f"cannot compare {a} with {b}: {a} ran in {first.title}, {b} in {second.title}")
    return [_verdict(m, x, y, resamples) for m, x, y in both]


def _find(name: str, stacks: Sequence[Stack]) -> Stack | None:
    wanted = name.strip().lower()
    if wanted == FULL:
        return next((s for s in stacks if s.is_full), None)
    exact = [s for s in stacks if wanted in (s.key.lower(), s.text.lower())]
    hits = exact or [s for s in stacks if wanted in (s.name.lower(), s.name.lower().replace(" + ", "+"))]
    if len(hits) > 1:
        raise ValueError(f"{name!r} is ambiguous: {', '.join(s.key for s in hits)}")
    return hits[0] if hits else None


def _verdict(material: _Material, a: Stack, b: Stack, resamples: int) -> str:
    result = stats.difference(
        material.scores[a.index], material.scores[b.index], resamples, track=_progress("bootstrap")
    )
    floor = None
    if material.full is not None:
        floor = _floor(material.stacks[material.full].cells, material.labels, material.reseeded)
    gap, n = result.interval.estimate, sum(result.n.values())
    side = "higher" if gap > 0 else "lower"
    lead = (
        f"{a.key} scores {number(abs(100 * gap))} points {side} than {b.key}"
        if gap
        else f"{a.key} and {b.key} score the same"
    )
    if math.isnan(result.interval.low):
        end = "no interval can be given (a task has a single independent sample), so nothing is concluded"
    elif not result.resolved:
        end = f"95 % interval {span(result.interval)}, so the data do not tell them apart"
    elif floor and abs(gap) < floor.value:
        end = (
            f"95 % interval {span(result.interval)}, but below the A/A floor of {percent(floor.value)}, so not resolved"
        )
    else:
        end = f"95 % interval {span(result.interval)}, so the difference is real at this confidence"
    lines = [material.title, f"{lead}: {end}."]
    tasks = ", ".join(f"{t} {k}" for t, k in result.n.items())
    lines.append(f"Samples: {n} paired ({tasks}); {result.method}.")
    if result.exact and result.exact.bound is not None:
        lines.append(
            f"No sample differs; the rate at which they differ is below {percent(result.exact.bound)} % (95 % bound)."
        )
    elif result.exact:
        e = result.exact
        lines.append(f"Only {a.key} right: {e.a_only}, only {b.key} right: {e.b_only}; exact McNemar p = {e.p:.3g}.")
    if result.detectable > 0:
        lines.append(f"This design finds true differences of {percent(result.detectable)} points or more (80 % power).")
    if len(result.tasks) > 1:
        lines += [f"  {t}: {percent(i.estimate, sign=True)} points ({span(i)})" for t, i in result.tasks.items()]
    for stack in (a, b):
        shared = [s for c in stack.cells if material.labels[canonical(c.config.task)] in result.n for s in c.samples]
        rho, final = _bytes_ratios(shared)
        mean = statistics.fmean(s.kv_bytes_prefill_end for s in shared)
        lines.append(
            f"Bytes of {stack.key}: {percent(rho)} % of the full cache after prefill, {percent(final)} % at the end "
            f"({mean / 1024:,.1f} KiB per sample)."
        )
    return "\n".join(plain(line) for line in lines)
