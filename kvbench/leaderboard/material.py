"""Cells sorted into sections and stacks: what belongs together, what it is called, what cannot be paired."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvbench import stats
from kvbench.leaderboard.benchmarks import variant_of
from kvbench.leaderboard.data import FULL, NONE, Group, LeftOut, Stack, TaskInfo
from kvbench.leaderboard.words import natural, query_mode
from kvbench.results import Cell, Sample, canonical

STRANGE = "its prompts (prompt_sha256) are not those of the other stacks"

NOTHING = {"score": 0.0, "prediction": "", "nll": None, "details": None, "truncated": None, "needle_kept": None}


@dataclass
class Material:
    """The cells of one section, sorted into stacks that can be paired."""

    title: str
    cells: list[Cell]
    labels: dict[str, str]  # task key -> column name
    left_out: list[LeftOut]
    stacks: list[Stack] = field(default_factory=list)
    scores: list[stats.Run] = field(default_factory=list)
    nlls: dict[int, stats.Run] = field(default_factory=dict)  # of the stacks that ran on a task of kind nll

    def __post_init__(self) -> None:
        self.reseeded, self.seeded = _reseeded(self.cells), _seeded(self.cells)

    @property
    def full(self) -> int | None:
        return next((s.index for s in self.stacks if s.is_full), None)

    @property
    def kinds(self) -> dict[str, str]:
        """Column -> kind of its task."""
        return {self.label(c): c.config.task.kind for c in self.cells}

    def label(self, cell: Cell) -> str:
        return self.labels[task_key(cell)]

    def task_info(self, label: str, cells: Sequence[Cell], n: int) -> TaskInfo:
        """A task of n samples as these cells ran it, without its scores."""
        own = [c for c in cells if self.label(c) == label]
        truncated = [bool(s.meta["truncated_tokens"]) for c in own for s in c.samples if "truncated_tokens" in s.meta]
        return TaskInfo(
            label=label,
            kind=own[0].config.task.kind,
            fields=own[0].config.task.model_dump(mode="json"),
            n=n,
            seeds=tuple(sorted({data_seed(c) for c in own})),
            truncated=statistics.fmean(truncated) if truncated else None,
        )

    def run(
        self,
        name: str,
        cells: Sequence[Cell],
        value: Callable[[Sample], float | None],
        column: Callable[[Cell, Sample], str] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> stats.Run:
        """The rows of one stack. Runs with other policy seeds on the same prompts are averaged per sample.

        column: what counts as the task of a sample; the column of the leaderboard unless given
        bounds: of the value; those of scores and shares unless given
        """
        tasks: dict[str, dict[str, list[stats.Row]]] = defaultdict(lambda: defaultdict(list))
        for cell in cells:
            task, seed = task_key(cell), str(data_seed(cell))
            for s in cell.samples:
                if (number := value(s)) is not None:
                    sample = f"{s.sample_id} (seed {seed})" if task in self.reseeded else s.sample_id
                    cluster = str(s.meta["cluster"]) if "cluster" in s.meta else None
                    row = stats.Row(number, s.prompt_sha256, cluster, seed if task in self.seeded else "")
                    tasks[column(cell, s) if column else self.labels[task]][sample].append(row)
        mean = {
            task: {k: r[0]._replace(score=statistics.fmean(x.score for x in r)) for k, r in rows.items()}
            for task, rows in tasks.items()
        }
        order = dict.fromkeys([*(label for label in self.labels.values() if label in mean), *sorted(mean, key=natural)])
        return stats.Run(name, cells[0].config.query_aware, {label: mean[label] for label in order}, bounds)


def task_key(cell: Cell) -> str:
    """The same for all cells of a column: data seeds are more samples of one task."""
    fields = cell.config.task.model_dump(mode="json", exclude_unset=True)
    return canonical({k: v for k, v in fields.items() if k != "seed"})


def data_seed(cell: Cell) -> int:
    """The seed behind the prompts: the task's own, or else that of the whole run."""
    own = (cell.config.task.model_extra or {}).get("seed")
    return own if isinstance(own, int) else cell.config.seed


def sort_cells(cells: Sequence[Cell]) -> list[Material]:
    """One entry per model, query mode and variant of a benchmark, in alphabetical order."""
    grouped: dict[tuple[str, bool, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        grouped[cell.config.model.name, cell.config.query_aware, _identity(cell)].append(cell)
    titles = Counter(_title(group[0]) for group in grouped.values())
    found = []
    for key, group in sorted(grouped.items(), key=lambda item: item[0]):
        title = _title(group[0])
        if titles[title] > 1:  # two models of one name: tell them apart by where they were loaded from
            title += f" · {group[0].config.model.path or key[2]}"
        for variant, own in _by_variant(group).items():
            found.append(_sort_section(title + (f" · {variant}" if variant else ""), own))
    return found


def _by_variant(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Where a benchmark ran in several variants, which are not comparable, each has a section; "" has the rest."""
    known = {cell.cell_id: variant_of(cell.config.task) for cell in cells}
    several = Counter(benchmark for benchmark, _ in set(filter(None, known.values())))
    found: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        variant = known[cell.cell_id]
        found[" ".join(dict.fromkeys(variant)) if variant and several[variant[0]] > 1 else ""].append(cell)
    return dict(sorted(found.items()))


def find(name: str, stacks: Sequence[Stack]) -> Stack | None:
    """The stack with this key, configuration or name; raises ValueError when it could be several."""
    wanted = name.strip().lower()
    if wanted == FULL:
        return next((s for s in stacks if s.is_full), None)
    exact = [s for s in stacks if wanted in (s.key.lower(), s.text.lower())]
    hits = exact or [s for s in stacks if wanted in (s.name.lower(), s.name.lower().replace(" + ", "+"))]
    if len(hits) > 1:
        raise ValueError(f"{name!r} is ambiguous: {', '.join(s.key for s in hits)}")
    return hits[0] if hits else None


def _is_full(cell: Cell) -> bool:
    return cell.config.policy.evict == FULL and cell.config.policy.quant == NONE


def _identity(cell: Cell) -> str:
    # Batch size, attention kernel and the like do not make another model: two such runs are an A/A pair.
    return canonical({k: v for k, v in model_of(cell).items() if k in ("name", "path", "dtype", "revision")})


def model_of(cell: Cell) -> dict[str, Any]:
    """The model's part of the config, with the commit that was loaded where that is known."""
    model = cell.config.model.model_dump(mode="json")
    return model | {"revision": cell.provenance.model_revision or model.get("revision")}


def _title(cell: Cell) -> str:
    model = cell.config.model
    return " · ".join(filter(None, (model.name, model.dtype, query_mode(cell.config.query_aware))))


def _sort_section(title: str, cells: list[Cell]) -> Material:
    labels, names = _task_labels(cells), _stack_names(cells)
    usable, strangers = _split_by_prompts([c for c in cells if c.status == "done"])
    by_stack: dict[str, list[Cell]] = defaultdict(list)
    for cell in usable:
        by_stack[canonical(cell.config.policy)].append(cell)
    zeros = _zeros(cells, usable, by_stack)
    unusable = [
        (c, f"{c.status}, scores 0" if c.cell_id in zeros else c.status, c.reason or "")
        for c in cells
        if c.status != "done"
    ]
    left_out = [
        LeftOut(status, title, names[canonical(c.config.policy)][1], labels[task_key(c)], reason)
        for c, status, reason in [*unusable, *((c, "not comparable", STRANGE) for c in strangers)]
    ]
    material = Material(title, usable, labels, left_out)
    for index, (policy, own) in enumerate(sorted(by_stack.items())):
        own.sort(key=lambda c: (natural(material.label(c)), data_seed(c), c.config.seed))
        name, key = names[policy]
        config = own[0].config.policy
        stack = Stack(name, key, config.evict, config.quant, config.stack, _group(own[0]), own, index)
        stack.zeros = [c for c in zeros.values() if canonical(c.config.policy) == policy]
        stack.failed = tuple(sorted({material.label(c) for c in stack.zeros}, key=natural))
        material.stacks.append(stack)
        material.scores.append(material.run(key, stack.scored, lambda s: s.score))
        likelihoods = [c for c in own if c.config.task.kind == "nll"]
        if likelihoods:
            material.nlls[index] = material.run(key, likelihoods, lambda s: s.nll, bounds=stats.UNBOUNDED)
    return material


def _zeros(cells: Sequence[Cell], usable: Sequence[Cell], finished: Collection[str]) -> dict[str, Cell]:
    """By their names, the cells that an error stopped, each with the samples that other stacks ran there, scored 0.

    Leaving them out would favour who fails where it is hard. Not the full cache's, as nothing could be compared with
    it then, nor those of stacks that finished nothing (`finished` has the policies of the others) and so have no bytes.
    """
    prompts = {(canonical(c.config.task), c.config.seed): c.samples for c in usable}
    return {
        c.cell_id: c.model_copy(update={"samples": [s.model_copy(update=NOTHING) for s in samples]})
        for c in cells
        if c.status == "failed" and not c.samples and not _is_full(c) and canonical(c.config.policy) in finished
        if (samples := prompts.get((canonical(c.config.task), c.config.seed)))
    }


def _task_labels(cells: Sequence[Cell]) -> dict[str, str]:
    """Task key -> column name: the task's name, with the fields that tell namesakes apart."""
    configs = {task_key(c): c.config.task.model_dump(mode="json", exclude={"seed"}) for c in cells}
    labels = {}
    for key, config in configs.items():
        namesakes = [other for other in configs.values() if other["name"] == config["name"]]
        differing = sorted(k for k in config if len({canonical(o.get(k)) for o in namesakes}) > 1)
        labels[key] = " ".join([config["name"], *(f"{k}={config[k]}" for k in differing)])
    return dict(sorted(labels.items(), key=lambda item: natural(item[1])))


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


def _split_by_prompts(cells: Sequence[Cell]) -> tuple[list[Cell], list[Cell]]:
    """Cells on the prompts of the full cache (or else of most cells) for the same task and seed, and the others."""
    votes: dict[tuple[str, int, str], Counter[str]] = defaultdict(Counter)
    for cell in cells:
        task, seed = canonical(cell.config.task), cell.config.seed
        weight = len(cells) if _is_full(cell) else 1
        for s in cell.samples:
            votes[task, seed, s.sample_id][s.prompt_sha256] += weight
    chosen = {key: count.most_common(1)[0][0] for key, count in votes.items()}
    usable: list[Cell] = []
    strangers: list[Cell] = []
    for cell in cells:
        task, seed = canonical(cell.config.task), cell.config.seed
        same = all(chosen[task, seed, s.sample_id] == s.prompt_sha256 for s in cell.samples)
        (usable if same else strangers).append(cell)
    return usable, strangers


def _reseeded(cells: Sequence[Cell]) -> set[str]:
    """Tasks whose seed changes the prompts behind an id: there a sample is known by its id and seed together."""
    shas: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cell in cells:
        task = task_key(cell)
        for s in cell.samples:
            shas[task, s.sample_id].add(s.prompt_sha256)
    return {task for (task, _), found in shas.items() if len(found) > 1}


def _seeded(cells: Sequence[Cell]) -> set[str]:
    """Tasks with several data seeds: no prompt of one seed is among those of another."""
    seeds: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for cell in cells:
        for s in cell.samples:
            seeds[task_key(cell)][s.prompt_sha256].add(data_seed(cell))
    apart = {task: of for task, of in seeds.items() if all(len(found) == 1 for found in of.values())}
    return {task for task, of in apart.items() if len(set.union(*of.values())) > 1}
