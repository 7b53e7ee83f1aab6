"""What stands behind a score: by length, difficulty, turn, kind of question, data seed; needles, answers, fidelity."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from kvbench import stats
from kvbench.leaderboard.benchmarks import variant_of
from kvbench.leaderboard.data import Numbers, Options, Section, Stack, Table, TableRow
from kvbench.leaderboard.material import Material
from kvbench.leaderboard.words import number, percent, span, tokens
from kvbench.misses import split_misses
from kvbench.results import Cell, Sample
from kvbench.stats import Interval
from kvbench.tasks.ruler import SUBTASKS

EFFECTIVE = 0.856  # RULER's bar for an effective length: Llama 2 7B at 4,096 tokens
MOST_LENGTHS = 12

Value = Callable[[Sample], float | None]


def breakdowns(section: Section, material: Material, numbers: Numbers, options: Options) -> list[Table]:
    """The tables for which the cells carry data."""
    stacks = [s for _, members in section.groups for s in members]
    tables = [
        *_lengths(stacks, material, options),
        _longbench_v2(stacks, material, options),
        *_turns(stacks, material, options),
        _parts(stacks, material, options),
        _needles(stacks),
        _answers(stacks, material, options),
        _bytes_over_time(stacks),
        _fidelity(stacks, material, options),
        _seeds(stacks, numbers),
    ]
    return [t for t in tables if t.rows]


def _measure(
    material: Material,
    values: Mapping[str, Value],
    options: Options,
    scores: Collection[str],
    *,
    reads: Callable[[Cell], bool] = lambda cell: True,
    column: Callable[[Cell, Sample], str] | None = None,
) -> dict[str, dict[int, Interval]]:
    """Name -> stack -> macro mean of a value per sample, over the tasks whose rows carry it, with its interval.

    scores: names of those that are scores or shares, in [0, 1]
    reads: which cells count; column: what counts as the task of a sample, see `Material.run`
    """
    cells = {s.index: [c for c in s.scored if reads(c)] for s in material.stacks}
    found: dict[str, dict[int, Interval]] = {}
    for name, value in values.items():
        bounds = (0.0, 1.0) if name in scores else stats.UNBOUNDED
        runs = {i: material.run(str(i), own, value, column, bounds) for i, own in cells.items() if own}
        runs = {i: run for i, run in runs.items() if run.tasks}
        if runs:
            paired = stats.pair(list(runs.values()), keep_missing=True)
            drawn = stats.bootstrap(paired, None, options.resamples)
            of = partial(stats.score_of, paired, drawn) if name in scores else drawn.macro.interval
            found[name] = {i: of(k) for k, i in enumerate(runs)}
            for i, interval in found[name].items():
                material.stacks[i].measures[name] = interval
    return found


def _on(label: str, material: Material) -> Callable[[Cell], bool]:
    return lambda cell: material.label(cell) == label


def _cells(
    found: Mapping[str, Mapping[int, Interval]], stack: Stack, form: Mapping[str, Callable[[Interval], str]]
) -> tuple[str, ...] | None:
    """One text per measure of `form`; None for a stack that has none of them."""
    own = {name: found[name].get(stack.index) for name in form if name in found}
    if all(i is None or math.isnan(i.estimate) for i in own.values()):
        return None
    return tuple("–" if (i := own.get(name)) is None else write(i) for name, write in form.items())


def _table(title: str, text: str, head: Sequence[str], stacks: Sequence[Stack], cells: Sequence[Any]) -> Table:
    rows = tuple(TableRow(s.key, c, s) for s, c in zip(stacks, cells, strict=True) if c is not None)
    return Table(title, text, ("Stack", *head), rows)


def _in_percent(interval: Interval) -> str:
    return f"{percent(interval.estimate)} ({span(interval)})"


# -- lengths ---------------------------------------------------------------------------------------------------------

Length = tuple[float, str]  # for sorting, and its name
Grid = Mapping[Length, Mapping[str, str]]  # length -> task -> its column in the bootstrap


def _lengths(stacks: Sequence[Stack], material: Material, options: Options) -> list[Table]:
    """RULER, and benchmarks with several lengths: stacks by length; of the best of a budget also by task."""
    grids: dict[str, dict[Length, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))

    def column(cell: Cell, sample: Sample) -> str:
        family, name, length = _family(cell), cell.config.task.name, _length(cell, sample)
        grids[family][length][name] = label = f"{family} / {name} / {length[1]}"
        return label

    def has_length(cell: Cell) -> bool:
        return cell.config.task.kind == "generate" and all(_length(cell, s)[0] >= 0 for s in cell.samples)

    known = {s.index: [c for c in s.scored if has_length(c)] for s in material.stacks}
    runs = [material.run(str(i), own, lambda x: x.score, column) for i, own in known.items() if own]
    wanted = {
        f: dict(sorted(of.items()))
        for f, of in grids.items()
        if (_is_ruler(f) or len(of) > 1) and len(of) <= MOST_LENGTHS
    }
    if not wanted:
        return []
    paired = stats.pair(runs, keep_missing=True)
    drawn = stats.bootstrap(paired, None, options.resamples)
    place = {int(name): k for k, name in enumerate(paired.names)}
    tables = []
    for family, grid in sorted(wanted.items()):
        tables.append(_by_length(family, grid, paired, drawn, stacks, place))
        if len(grid) > 1 and len(set().union(*grid.values())) > 1:
            shown = [s for s in _leading(stacks) if s.index in place]
            tables += [_matrix(family, grid, paired, drawn, s, place[s.index]) for s in shown]
    return tables


def _leading(stacks: Sequence[Stack]) -> list[Stack]:
    """Those whose tasks are shown one by one: the full cache and the best of each budget."""
    return [s for s in stacks if s.is_full or s.rank == 1]


def _length(cell: Cell, sample: Sample) -> Length:
    """The requested length in tokens, or the bin of LongBench-E; below 0 where there is none."""
    bin_ = sample.meta.get("length_bucket")
    if isinstance(bin_, str) and cell.config.task.name.startswith("longbench_e"):
        digits = "".join(c if c.isdigit() else " " for c in bin_).split()
        return float(digits[0]) if digits else 0.0, bin_
    length = sample.meta.get("length")
    return (length, tokens(length)) if isinstance(length, int) and length > 0 else (-1, "")


def _family(cell: Cell) -> str:
    """Tasks that are read together: a variant of RULER, LongBench-E, or else a task for itself."""
    benchmark, variant = variant_of(cell.config.task) or ("", "")
    return variant if benchmark == "ruler" or variant.startswith("longbench_e") else cell.config.task.name


def _is_ruler(family: str) -> bool:
    return family.split("_")[0] == "ruler"


def _by_length(
    family: str,
    grid: Grid,
    paired: stats.Paired,
    drawn: stats.Bootstrap,
    stacks: Sequence[Stack],
    place: Mapping[int, int],
) -> Table:
    ruler = _is_ruler(family)
    cells: list[tuple[str, ...] | None] = []
    for stack in stacks:
        ran = [list(of.values()) for of in grid.values()] if stack.index in place else []
        own = [stats.score_of(paired, drawn, place[stack.index], tasks) for tasks in ran]
        for (_, name), interval in zip(grid, own, strict=False):
            stack.measures[f"{family} length {name}"] = interval
        scores = np.array([i.estimate for i in own])
        if not own or np.isnan(scores).all():
            cells.append(None)
            continue
        rising = np.arange(1, len(scores) + 1)
        weights = [np.ones(len(scores)), rising, rising[::-1]][: 3 if ruler else 1] if len(grid) > 1 else []
        row = [_short(i) for i in own] + [percent(float(np.average(scores, weights=w))) for w in weights]
        if ruler:
            reached = [name for (_, name), score in zip(grid, scores, strict=True) if score >= EFFECTIVE]
            row.append(reached[-1] if reached else f"< {next(iter(grid))[1]}")
        cells.append(tuple(row))
    counts = sorted({len(tasks) for tasks in grid.values()})
    tasks = f"{' or '.join(map(str, counts))} task{'' if counts == [1] else 's'}"
    text = f"Mean score in percent over {tasks} by length, with 95 % intervals. "
    head = [name for _, name in grid] + ["Mean"] * (len(grid) > 1)
    if ruler:
        head += ["Rising", "Falling"] * (len(grid) > 1) + ["Effective"]
        present = {label.split(" / ")[1].removeprefix(f"{family}_") for of in grid.values() for label in of.values()}
        text += f"Tasks: {', '.join(t for t in SUBTASKS if t in present)}. "
        if absent := [t for t in SUBTASKS if t not in present]:
            text += f"Not RULER's mean, which is over 13 tasks: {', '.join(absent)} did not run. "
        if len(grid) > 1:
            text += "Rising and falling: means with weights 1, 2, 3, … towards the long and towards the short end. "
        text += f"Effective: the longest length with at least {percent(EFFECTIVE)} (RULER's bar). "
    if len(counts) > 1:
        text += "Not every task ran at every length: columns are not comparable with each other."
    return _table(f"{family} by length", text.strip(), head, stacks, cells)


def _short(interval: Interval) -> str:
    ends = "" if math.isnan(interval.low) else f" ({percent(interval.low, 0)}–{percent(interval.high, 0)})"
    return percent(interval.estimate, 0) + ends


def _matrix(family: str, grid: Grid, paired: stats.Paired, drawn: stats.Bootstrap, stack: Stack, policy: int) -> Table:
    rows = []
    for task in sorted({name for of in grid.values() for name in of}):
        own = [stats.score_of(paired, drawn, policy, [of[task]]) if task in of else None for of in grid.values()]
        if any(i and not math.isnan(i.estimate) for i in own):
            rows.append(TableRow(task.removeprefix(f"{family}_"), tuple("–" if i is None else _short(i) for i in own)))
    return Table(
        f"{family} by task and length: {stack.key}",
        "Mean score in percent with 95 % intervals.",
        ("Task", *(name for _, name in grid)),
        tuple(rows),
    )


def _longbench_v2(stacks: Sequence[Stack], material: Material, options: Options) -> Table:
    """The columns of its leaderboard: all questions, then by difficulty, then by length."""

    def where(key: str, level: str) -> Value:
        return lambda s: s.score if s.meta.get(key) == level else None

    values: dict[str, Value] = {"overall": lambda s: s.score}
    values |= {level: where("difficulty", level) for level in ("easy", "hard")}
    values |= {level: where("length_bucket", level) for level in ("short", "medium", "long")}
    values = {f"longbench_v2 {level}": value for level, value in values.items()}

    def is_v2(cell: Cell) -> bool:
        return cell.config.task.name.startswith("longbench_v2")

    def settings(cell: Cell, sample: Sample) -> str:  # questions asked in one way are one task, also by length
        return material.label(cell).removeprefix(cell.config.task.name)

    found = _measure(material, values, options, values, reads=is_v2, column=settings)
    text = (
        "Mean score in percent over the questions of a difficulty, or of a length of the uncut text, as LongBench v2 "
        "labels them, with 95 % intervals. Guessing scores 25."
    )
    head = [name.split()[1].capitalize() for name in values]
    cells = [_cells(found, s, dict.fromkeys(values, _in_percent)) for s in stacks]
    return _table("LongBench v2 by difficulty and length", text, head, stacks, cells)


# -- turns, needles, answers, fidelity, seeds ------------------------------------------------------------------------


def _detail(name: str) -> Value:
    def value(sample: Sample) -> float | None:
        found = (sample.details or {}).get(name)
        return float(found) if isinstance(found, int | float) else None

    return value


def _turn_scores(sample: Sample) -> list[float]:
    found = (sample.details or {}).get("turn_scores")
    return found if isinstance(found, list) and len(found) > 1 else []


def _kinds(sample: Sample) -> set[str]:
    """The kinds of questions that a sample of SCBench asks, turn by turn."""
    return set(sample.meta.get("parts") or ())


def _turns(stacks: Sequence[Stack], material: Material, options: Options) -> list[Table]:
    """Stacks by turn; of the best of a budget also by task."""
    most: dict[str, int] = defaultdict(int)
    for cell in material.cells:
        label = material.label(cell)
        most[label] = max(most[label], *(len(_turn_scores(s)) for s in cell.samples))
    most = {label: n for label, n in most.items() if n}
    if not most:
        return []

    def at(turn: int) -> Value:
        return lambda s: scores[turn] if len(scores := _turn_scores(s)) > turn else None

    turns: dict[str, Value] = {f"turn {k + 1}": at(k) for k in range(max(most.values()))}
    found = _measure(material, turns, options, turns) | _drops(material, options)
    form = dict.fromkeys(found, _in_percent)
    text = (
        "Mean score in percent by turn on one compressed cache, with 95 % intervals, and the first turn minus the mean "
        "of the later ones in points. What was kept for the first question may not serve the next."
    )
    if any(len(_kinds(s)) > 1 for c in material.cells for s in c.samples):
        text += " Where turns ask different kinds of questions, that difference is not formed."
    if len(set(most.values())) > 1:
        text += " Not every task has every turn: columns are not comparable with each other."
    head = [n.capitalize() for n in form]
    tables = [_table("Score by turn", text, head, stacks, [_cells(found, s, form) for s in stacks])]
    if len(most) == 1:
        return tables
    rows: dict[int, list[TableRow]] = defaultdict(list)
    for label in most:
        values = {f"{label} {turn}": value for turn, value in turns.items()}
        found = _measure(material, values, options, values, reads=_on(label, material))
        for stack in stacks:
            if own := _cells(found, stack, dict.fromkeys(values, _short)):
                rows[stack.index].append(TableRow(label, own))
    head = ["Task", *(turn.capitalize() for turn in turns)]
    text = "Mean score in percent with 95 % intervals."
    return tables + [
        Table(f"Score by task and turn: {s.key}", text, tuple(head), tuple(rows[s.index])) for s in _leading(stacks)
    ]


def _drops(material: Material, options: Options) -> dict[str, dict[int, Interval]]:
    """The first turn minus the mean of the later ones, where all ask questions of one kind."""

    def alike(sample: Sample) -> list[float]:
        return _turn_scores(sample) if len(_kinds(sample)) < 2 else []

    def first(sample: Sample) -> float | None:
        return next(iter(alike(sample)), None)

    def later(sample: Sample) -> float | None:
        return sum(scores[1:]) / len(scores[1:]) if (scores := alike(sample)) else None

    runs = {s.index: [material.run(f"{s.index}", s.cells, value) for value in (first, later)] for s in material.stacks}
    runs = {i: own for i, own in runs.items() if own[0].tasks}
    if not runs:
        return {}
    paired = stats.pair([run for own in runs.values() for run in own], keep_missing=True)
    drawn = stats.bootstrap(paired, None, options.resamples)
    found = {i: stats.lead(paired, drawn, 2 * k, 2 * k + 1) for k, i in enumerate(runs)}
    for i, interval in found.items():
        material.stacks[i].measures["turn 1 minus later"] = interval
    return {"turn 1 minus later": found}


def _parts(stacks: Sequence[Stack], material: Material, options: Options) -> Table:
    """SCBench's mixed tasks by kind of question, each of which has a metric of its own."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for cell in material.cells:
        kinds[material.label(cell)].update(*map(_kinds, cell.samples))

    def mean_of(kind: str) -> Value:
        def value(sample: Sample) -> float | None:
            parts = sample.meta["parts"]
            scores = (sample.details or {}).get("turn_scores") or [sample.score] * len(parts)
            own = [x for x, part in zip(scores, parts, strict=True) if part == kind]
            return sum(own) / len(own) if own else None

        return value

    found: dict[str, dict[int, Interval]] = {}
    for label in (label for label, of in kinds.items() if len(of) > 1):
        values = {f"{label}: {kind}": mean_of(kind) for kind in sorted(kinds[label])}
        found |= _measure(material, values, options, values, reads=_on(label, material))
    text = (
        "Mean score in percent over a task's contexts, of each the mean over its questions of that kind, with 95 % "
        "intervals. Kinds have different metrics: columns are not comparable with each other."
    )
    form = dict.fromkeys(found, _in_percent)
    return _table("Score by kind of question", text, list(found), stacks, [_cells(found, s, form) for s in stacks])


def _needles(stacks: Sequence[Stack]) -> Table:
    cells: list[tuple[str, ...] | None] = []
    for stack in stacks:
        split = split_misses(s for c in stack.cells for s in c.samples)
        if split is None:
            cells.append(None)
            continue
        n = split.found + split.misses
        shares = (split.found, split.evicted, split.unread, split.found_evicted)
        cells.append((*(percent(k / n) for k in shares), str(n)))
    text = (
        "Share of prompts in percent. A needle counts as kept where at least half of the layers' heads hold at least "
        "half of its tokens at the end of the compression. Evicted: missed, and the needle is gone; not read: missed, "
        "although it is kept. The rows of the leaderboard open to the shares by layer and head."
    )
    head = ("Found", "Missed: evicted", "Missed: not read", "Found although evicted", "n")
    return _table("Where needles are missed", text, head, stacks, cells)


def _answers(stacks: Sequence[Stack], material: Material, options: Options) -> Table:
    repeated = _detail("repetition")

    def long(value: Value) -> Value:
        return lambda s: value(s) if repeated(s) is not None else None

    values: dict[str, Value] = {
        "score": lambda s: s.score,
        "score if finished": lambda s: None if s.truncated else s.score,
        "truncated answers": lambda s: None if s.truncated is None else float(s.truncated),
        "generated tokens": lambda s: float(s.n_generated),
        "repetition": repeated,
        "mean bytes": _detail("kv_bytes_mean"),
        "peak bytes": lambda s: None if s.kv_bytes_peak is None else float(s.kv_bytes_peak),
    }
    shares = [f"answer: {name}" for name in ("score", "score if finished", "truncated answers")]
    found = _measure(material, {f"answer: {name}": long(value) for name, value in values.items()}, options, shares)
    kib: Callable[[Interval], str] = lambda i: f"{i.estimate / 1024:,.1f}"  # noqa: E731
    form = {
        "answer: score": _in_percent,
        "answer: score if finished": _in_percent,
        "answer: truncated answers": _in_percent,
        "answer: generated tokens": lambda i: f"{number(i.estimate)} ({span(i, 0, 1)})",
        "answer: repetition": lambda i: percent(i.estimate),
        "answer: mean bytes": kib,
        "answer: peak bytes": kib,
    }
    text = (
        "Answers that grow the cache. Truncated: ended by the token limit, not by the model. Repetition: share of "
        "4-grams that occurred before. A damaged model rambles: cheap per step, dear per answer. In brackets 95 % "
        "intervals."
    )
    head = ("Score, %", "If finished, %", "Truncated, %", "Tokens", "Repetition, %", "Mean KiB", "Peak KiB")
    return _table("Long answers", text, head, stacks, [_cells(found, s, form) for s in stacks])


def _bytes_over_time(stacks: Sequence[Stack]) -> Table:
    traces: dict[int, dict[int, list[float]]] = {}
    for stack in stacks:
        seen: dict[int, list[float]] = defaultdict(list)
        for cell in stack.cells:
            every = (cell.config.task.model_extra or {}).get("trace")
            for sample in cell.samples:
                trace = (sample.details or {}).get("kv_bytes_trace")
                if isinstance(every, int) and isinstance(trace, list):
                    for k, held in enumerate(trace):
                        seen[k * every].append(held)
        if seen:
            traces[stack.index] = seen
    steps = sorted({step for of in traces.values() for step in of})
    shown = [s for i, s in enumerate(steps) if i == 0 or i & (i - 1) == 0]  # the first, then at doubling distances
    cells = [
        tuple(f"{np.mean(own[n]) / 1024:,.1f}" if n in own else "–" for n in shown)
        if (own := traces.get(s.index))
        else None
        for s in stacks
    ]
    text = "Mean KiB held after so many generated tokens, over the answers that are that long."
    return _table("Bytes over the answer", text, [tokens(n) for n in shown], stacks, cells)


def _fidelity(stacks: Sequence[Stack], material: Material, options: Options) -> Table:
    divergence = _detail("kl")

    def bin_at(k: int) -> Value:
        return lambda s: bins[k] if (bins := (s.details or {}).get("kl_bins")) else None

    values: dict[str, Value] = {
        "fidelity: top-1": lambda s: s.score if divergence(s) is not None else None,
        "fidelity: KL": divergence,
        "fidelity: KL, first token": bin_at(0),
        "fidelity: KL, last tokens": bin_at(-1),
        "fidelity: NLL difference": _detail("nll_difference"),
    }
    found = _measure(material, values, options, ["fidelity: top-1"])
    form: dict[str, Callable[[Interval], str]] = {"fidelity: top-1": _in_percent}
    form |= {n: (lambda i: f"{number(i.estimate, 4)} ({span(i, 4, 1)})") for n in list(values)[1:]}
    text = (
        "Against the full cache's next-token distributions on the same text, without labels: how often the same token "
        "is likeliest, and the divergence KL(full || stack) in nats, overall, at the first scored token and in the "
        "last bin of positions; NLL difference in nats per token. In brackets 95 % intervals."
    )
    head = ("Top-1, %", "KL", "KL, first token", "KL, last tokens", "Δ NLL")
    return _table("Fidelity to the full cache", text, head, stacks, [_cells(found, s, form) for s in stacks])


def _seeds(stacks: Sequence[Stack], numbers: Numbers) -> Table:
    means = stats.seed_means(numbers.paired.select(tasks=numbers.drawn.ranked))
    cells = [
        (*(percent(float(m[s.index])) for m in means.values()), percent(s.seed_sd))
        if means and not math.isnan(s.seed_sd)
        else None
        for s in stacks
    ]
    text = (
        "Mean score in percent per data seed, which draws other prompts, and its standard deviation in points. Seeds "
        "are strata of the bootstrap: the intervals above are about these seeds' pool of prompts."
    )
    return _table("Between data seeds", text, [*(f"Seed {s}" for s in means), "SD"], stacks, cells)
