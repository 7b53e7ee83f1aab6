"""What a leaderboard is made of: sections of stacks in budget groups, and the cells without scores."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvbench import stats
from kvbench.results import Cell, Problem
from kvbench.stats import Interval

FULL, NONE = "full", "none"
SOLID, FAINT = 0.9, 0.5  # frontier probability at which a point is drawn on the front
NO_SIGNAL = 0.05  # a task counts only if the full cache is surely so far above chance
# Score of guessing, by the beginning of a task's name; 0 elsewhere. The questions of many_shot have about six choices.
CHANCE = {"longbench_v2": 0.25, "scbench_choice_eng": 0.25, "scbench_many_shot": 1 / 6}


@dataclass(frozen=True)
class Options:
    """How a leaderboard is computed."""

    resamples: int = stats.RESAMPLES
    margin: float = stats.MARGIN  # a loss below it counts as none
    correction: str = "holm"  # over the differences of a table: holm, bh (exploration) or none
    zero: str | None = None  # the stack that scores 0 in retention: no context, or a minimal cache
    recorded: tuple[str, ...] = ()  # files with full-cache scores, which also decide where a model has signal


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
        value = -self.minus
        return ("", f"@{value:.4g}", f"@{100 * value:.4g}%tokens", f"@{value:g}tokens")[self.kind]


@dataclass(frozen=True)
class TaskScore:
    """A stack on one task."""

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
    difference: stats.Difference | None = None  # to the full cache
    p_adjusted: float = math.nan  # of that difference, corrected over the table
    lossless: bool = False  # the loss against the full cache is surely below the margin
    rho: float = math.nan  # measured bytes / bytes of the full cache, end of prefill
    rho_final: float = math.nan
    rho_read: float = math.nan  # bytes the last step read / bytes of the full cache then; less than held for selectors
    kept: float = math.nan  # kept tokens / prompt tokens
    frontier: float = math.nan
    rank: int | None = None
    like_best: bool = False
    dominated_by: Stack | None = None  # surely: it has at most the bytes and a higher score
    seed_sd: float = math.nan  # of the score between data seeds
    measures: dict[str, Interval] = field(default_factory=dict)  # what else its tasks measure; see `measures`
    missing: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()  # tasks where an error stopped it
    zeros: list[Cell] = field(default_factory=list)  # these: samples of other stacks with score 0, without bytes

    @property
    def delta(self) -> Interval | None:
        return self.difference.interval if self.difference else None

    @property
    def detectable(self) -> float:
        return self.difference.detectable if self.difference else math.nan

    @property
    def differs(self) -> bool:
        """Whether the difference to the full cache stands after correction for the number of comparisons."""
        return self.difference is not None and self.difference.resolved and self.p_adjusted < 0.05

    @property
    def is_full(self) -> bool:
        return self.evict == FULL and self.quant == NONE

    @property
    def n(self) -> int:
        return sum(t.n for t in self.tasks.values())

    @property
    def scored(self) -> list[Cell]:
        """All cells whose scores count."""
        return [*self.cells, *self.zeros]

    @property
    def failed_checks(self) -> list[str]:
        return sorted({name for cell in self.cells for name, value in cell.checks.items() if value is False})


@dataclass(frozen=True)
class TaskInfo:
    """A task of a section, whatever the stack."""

    label: str
    kind: str
    fields: dict[str, Any]
    n: int
    seeds: tuple[int, ...]
    truncated: float | None  # share of samples with truncated prompts, where recorded
    full: Interval | None = None
    signal: bool = True  # whether the full cache is surely above chance; if not, the task does not count
    kept: bool = True  # whether it is in the headline: the full cache ran there and scores above the floor

    @property
    def chat(self) -> str:
        return str(self.fields.get("chat", "never"))


@dataclass(frozen=True)
class Contrast:
    """An interaction contrast: does adding the quantizer to the evictor cost more than both alone?"""

    stack: Stack
    value: stats.Interaction
    p_adjusted: float

    @property
    def claimed(self) -> bool:
        return self.value.nonadditive and self.p_adjusted < 0.05

    @property
    def verdict(self) -> str:
        if not self.claimed:
            return "no departure shown"
        return "stacking hurts more than the sum" if self.value.score.estimate > 0 else "damages overlap"


@dataclass(frozen=True)
class TableRow:
    """A row of a `Table`; `stack` gives it the mark of the chart."""

    name: str
    cells: tuple[str, ...]
    stack: Stack | None = None


@dataclass(frozen=True)
class Table:
    """A further table of a section, the same on the page, in Markdown and in the terminal."""

    title: str
    text: str  # how to read it
    head: tuple[str, ...]  # of the names, then of the cells
    rows: tuple[TableRow, ...]  # without any, the text alone is shown
    note: str = ""  # below the rows


@dataclass
class Section:
    """One model in one query mode."""

    title: str
    slug: str  # part of its file names
    model: dict[str, Any]
    query_aware: bool
    stacks: list[Stack]
    tasks: list[TaskInfo]
    variants: list[str]  # of the benchmarks that have several
    retention: bool  # whether the headline is retention or, without a full cache, the raw score
    notes: list[str]
    caption: list[str]
    floor: stats.Floor | None
    contrasts: list[Contrast]
    tables: list[Table] = field(default_factory=list)

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
class Numbers:
    """What is read from a section's one set of resamples."""

    paired: stats.Paired
    drawn: stats.Bootstrap
    perplexity: Mapping[str, Mapping[int, Interval]]
    full: int | None  # the policy that all others are compared to
    signal: bool  # whether any task has signal; if none has, all are ranked, and no loss is called none
    notes: list[str]

    @property
    def headline(self) -> stats.Sampled:
        return self.drawn.retention or self.drawn.macro

    def score(self, policy: int, tasks: Sequence[str] | None = None) -> Interval:
        return stats.score_of(self.paired, self.drawn, policy, tasks)

    def retention(self, policy: int, tasks: Sequence[str] | None = None) -> Interval:
        assert self.full is not None
        return stats.retention_of(self.paired, self.drawn, policy, self.full, tasks)

    def lead(self, a: int, b: int) -> Interval:
        """Of the headline of a over that of b."""
        return stats.lead(self.paired, self.drawn, a, b, retention=self.drawn.retention is not None)

    def difference(self, a: int, b: int) -> Interval:
        """Of the mean scores."""
        return stats.lead(self.paired, self.drawn, a, b)


@dataclass(frozen=True)
class LeftOut:
    """A cell that did not finish or cannot be compared; in no table, unless its samples score 0 there."""

    status: str
    section: str
    stack: str
    task: str
    reason: str


@dataclass
class Leaderboard:
    """All sections of a folder of results."""

    sections: list[Section]
    left_out: list[LeftOut]
    problems: list[Problem]
    cells: int
    options: Options
    files: list[Path] = field(default_factory=list)
