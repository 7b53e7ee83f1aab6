"""From Hydra configs to result cells: plan, skip what is there, run groups that share prefills, write each cell.

`run_jobs` gets one config (`kvbench …`) or all configs of a sweep (`kvbench -m …`). Cells that name the same thing (the
full cache at three byte budgets, say) are one cell. A stack that an error stops is a failed cell, and the others go on;
the same command tries it again, from the batches it had finished.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException, InstantiationException
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from kvbench import tasks
from kvbench.answer import Prompt, Run, Task
from kvbench.cli import GROUPS, meant
from kvbench.display import Display
from kvbench.engine import PREFILL_CHUNK, RECORDS, batches_for, context_limit, run_stacks
from kvbench.identity import Identity, environment, identity
from kvbench.policies.full import Full
from kvbench.policies.interface import Policy, Stack
from kvbench.prompts import cache_folder, prepare
from kvbench.results import Cell, ResultsError, canonical, cell_id, stored_cell, write_cell

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Tokens, of the second run of the full cache: sums are ordered otherwise even for a prompt that is a batch by itself in
# both runs. No multiple of the tiles of kernels, which have powers of two rows.
SECOND_CHUNK = 1000
TASKS = tuple(name for name in tasks.__all__ if name not in ("Sample", "Turn"))  # the classes that `sizes` names


class UserError(SystemExit):
    """Something the user can put right; the message is one line. Ends the program, as Hydra would print a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"kvbench: {message}")


@dataclass(frozen=True)
class Plan:
    """One cell to run. `group`: cells with an equal one share prefills. prompts: where to keep prepared ones, if so.

    apart: how its task differs from others of the run that have the same name.
    """

    config: dict[str, Any]
    policy: Policy
    task: Task
    batch_size: int
    batch_tokens: int
    record: str
    prefill_chunk: int
    prompts: Path | None
    out: Path
    wandb: dict[str, Any]
    device_map: Any = None
    apart: str = ""

    @property
    def id(self) -> str:
        return cell_id(self.config)

    @property
    def group(self) -> str:
        shared = {k: v for k, v in self.config.items() if k != "policy"}
        return canonical([shared, self.batch_size, self.batch_tokens, self.record, str(self.out), self.device_map])

    @property
    def model(self) -> dict[str, Any]:
        return {k: v for k, v in self.config["model"].items() if k != "batch_size"}

    @property
    def material(self) -> str:
        """Cells with an equal one have the same prompts and model."""
        return canonical([self.model, self.config["task"], self.config["query_aware"]])

    @property
    def settings(self) -> dict[str, Any]:
        """What a task of one name may be run with, under the names of the command line."""
        parts = {part: self.config[part] for part in ("model", "task")}
        fields = {f"{part}.{k}": v for part, values in parts.items() for k, v in values.items()}
        told = "model.name", "model.batch_size", "task.name", "task.kind"  # by the path, or in the label
        common = {k: self.config[k] for k in ("query_aware", "seed")}
        return {**{k: v for k, v in fields.items() if k not in told}, **common}

    @property
    def task_label(self) -> str:
        return f"{self.task.name} {self.apart}".rstrip()

    @property
    def label(self) -> str:
        second = ", second run" if "batch_size" in self.config["model"] else ""
        return f"{self.task_label} {self.config['policy']['stack']}{second}"

    def ended(self, reason: str | None) -> str:
        """Which cell it is, and why it is not done."""
        return f"{self.label}: {(reason or '').removeprefix(self.config['policy']['stack'] + ': ')}"

    @property
    def partial(self) -> Path:
        return self.out / "partial" / f"{self.id}.jsonl"

    @property
    def log(self) -> Path:
        """The traceback of what stopped this cell."""
        return self.out / "failed" / f"{self.id}.log"


def application() -> None:
    """The Hydra application behind `kvbench`.

    Hydra's own launcher calls the task once per job of a sweep, here in this process: the jobs are only collected, then
    run together, so that they share prefills. Other launchers (joblib, submitit) run each job by itself elsewhere; no
    cell is run by two of them.
    """
    jobs: list[DictConfig] = []

    def job(config: DictConfig) -> None:
        OmegaConf.set_struct(config, False)
        config.hydra = HydraConfig.get()
        if config.hydra.launcher._target_.endswith(".BasicLauncher"):
            jobs.append(config)
        else:
            run_jobs([config])

    with _one_line_refusals(), _composed_once():
        hydra.main(version_base="1.3", config_path="pkg://kvbench.conf", config_name="config")(job)()
    if jobs:
        run_jobs(jobs)


@contextmanager
def _composed_once() -> Iterator[None]:
    """Hydra composes all configs of a sweep to see whether it can, and again to launch them: spares the first time.

    Its own launcher, which only collects them here, needs no such check.
    """
    hydras: Any = Sweeper
    usual = hydras.validate_batch_is_legal

    def elsewhere(sweeper: Any, batch: Any) -> None:
        if type(sweeper.launcher).__name__ != "BasicLauncher":
            usual(sweeper, batch)

    hydras.validate_batch_is_legal = elsewhere
    try:
        yield
    finally:
        hydras.validate_batch_is_legal = usual


@contextmanager
def _one_line_refusals() -> Iterator[None]:
    """What Hydra refuses is said in one line, where Hydra itself prints several; HYDRA_FULL_ERROR=1: its traceback."""
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises, and does not print
    try:
        yield
    except CompactHydraException as error:
        raise UserError(_refusal(error)) from error
    finally:
        del os.environ["HYDRA_FULL_ERROR"]


def _refusal(error: CompactHydraException) -> str:
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        top = () if "." in str(cause.full_key) else GROUPS
        known = [str(key) for key in (*cause.parent_node, *top) if not str(key).startswith("_")]
        return f"there is no option {cause.full_key}{meant(str(cause.key), known) if known else ''}"
    more = str(cause).splitlines()[:1] if isinstance(cause, OmegaConfBaseException) else []
    return " ".join([*str(error).split(), *more])


def run_jobs(configs: Sequence[DictConfig]) -> None:
    """Runs the cells these configs name, and the full-cache cells they are compared with."""
    with _one_line_errors():
        plans: dict[str, Plan] = {}
        asked = []
        for config in configs:
            needed = plan_cells(config)
            asked.append(needed[0].id)
            for plan in needed:
                plans.setdefault(plan.id, plan)
        plans = _told_apart(plans)
        stored = {p.id: cell for p in plans.values() if (cell := stored_cell(p.out, p.id))}
        dry = any(config.dry_run for config in configs)
        looks = _look([plan for plan in plans.values() if dry or plan.id in stored])
        _refuse_others([plan for plan in plans.values() if plan.id in stored], stored, looks)
        if dry:
            _list(list(plans.values()), stored, looks)
            return
        groups: dict[str, list[Plan]] = {}
        for plan in plans.values():
            if plan.id not in stored:
                groups.setdefault(plan.group, []).append(plan)
        if stored:
            print(f"{len(stored)} of {len(plans)} cells are already there")
            for plan, cell in ((plans[i], cell) for i, cell in stored.items() if cell.status != "done"):
                print(f"{cell.status}: {plan.ended(cell.reason)}")
        skipped: dict[str, str] = {}
        failed: list[Plan] = []
        if groups:
            new, skipped = _run_groups(list(groups.values()))
            if skipped and not new:
                raise UserError(_skipped(skipped) if len(skipped) > 1 else next(iter(skipped.values())))
            _summarize(new, [plans[i] for i in dict.fromkeys(asked)])
            failed = [plans[c["cell_id"]] for c in new if c["status"] == "failed" and not c["samples"]]
        for folder in sorted({str(p.out) for p in plans.values()}):
            print(f"next: kvbench leaderboard {folder}")
        ends = [_skipped(skipped)] if skipped else []
        if failed:
            names = "; ".join(plan.label for plan in failed)
            logs = "".join(f"tracebacks are in {p.log.parent}; " for p in failed[:1] if p.log.parent.exists())
            ends.append(f"cells failed: {len(failed)} ({names}); {logs}the same command tries them again")
        if ends:
            raise UserError("\n".join(ends))


def _told_apart(plans: Mapping[str, Plan]) -> dict[str, Plan]:
    """The same plans; where tasks of one name differ, they say how."""
    values: dict[tuple[str, str], set[str]] = {}
    for plan in plans.values():
        for setting, value in plan.settings.items():
            values.setdefault((plan.task.name, setting), set()).add(canonical(value))

    def apart(plan: Plan) -> str:
        differ = {k: v for k, v in plan.settings.items() if len(values[plan.task.name, k]) > 1}
        if differ.get("task.seed") == plan.config["seed"]:  # as always, unless it is given by itself
            del differ["task.seed"]
        return " ".join(f"{k}={v}" for k, v in differ.items())

    return {name: dataclasses.replace(plan, apart=apart(plan)) for name, plan in plans.items()}


def _skipped(reasons: Mapping[str, str]) -> str:
    return f"tasks skipped: {len(reasons)}" + "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())


@dataclass(frozen=True)
class Look:
    """What a task and a model are now, without loading the model. missing: why there are no prompts, if so."""

    identity: Identity
    missing: str | None = None


def _look(plans: Sequence[Plan]) -> dict[str, Look]:
    """By `Plan.material`; prompts come from where prepared ones are kept, or are kept there now."""
    if not plans:
        return {}
    looks: dict[str, Look] = {}
    loaded: tuple[str, Any] = ("", None)
    todo = {plan.material: plan for plan in plans}
    with Display(transient=True) as display:
        for material, plan in todo.items():
            display.step(f"prompts of {plan.task_label}", len(todo))
            path, revision = plan.model["path"], plan.model.get("revision")
            try:
                if loaded[0] != canonical(plan.model):
                    with _loading(path):
                        source = {"pretrained_model_name_or_path": _source(path), "revision": revision or "main"}
                        loaded = canonical(plan.model), (
                            AutoTokenizer.from_pretrained(**source), AutoConfig.from_pretrained(**source)
                        )  # fmt: skip
                tokenizer, config = loaded[1]
                prompts = prepare(plan.task, tokenizer, plan.config["query_aware"], context_limit(config), plan.prompts)
                looks[material] = Look(identity(prompts, _source(path), config))
            except (ValueError, UserError) as error:
                looks[material] = Look(Identity(), str(error).removeprefix("kvbench: ").splitlines()[0])
            display.advance(1)
    return looks


def _refuse_others(plans: Sequence[Plan], stored: Mapping[str, Cell], looks: Mapping[str, Look]) -> None:
    """Cells bear the names of data and model: what has changed under the same name must not pass for the same."""
    noted = {p.id: stored[p.id].provenance.model_dump() for p in plans}
    found = {p.id: differ for p in plans if (differ := looks[p.material].identity.differences(noted[p.id]))}
    if not found:
        return
    plan = next(p for p in plans if p.id in found)
    field, (then, now) = next(iter(found[plan.id].items()))
    names = ", ".join(f"{name}.json" for name in list(found)[:20]) + (", …" if len(found) > 20 else "")
    raise UserError(
        f"{plan.label} is in {plan.out}, but of {'other prompts' if field == 'prompts_sha256' else 'another model'} "
        f"({field} was {then[:12]}, is {now[:12]}): give another out=, or delete from {plan.out / 'cells'}: {names}"
    )


def _list(plans: Sequence[Plan], stored: Mapping[str, Cell], looks: Mapping[str, Look]) -> None:
    """What a sweep would do, cell by cell."""
    for plan in plans:
        cell, missing = stored.get(plan.id), looks[plan.material].missing
        if cell is not None and cell.status != "done":
            print(f"{cell.status:<10}  {plan.ended(cell.reason)}")
        else:
            print(f"{'there' if cell else 'to run' if missing is None else 'no prompts':<10}  {plan.label}")
    to_run = [p for p in plans if p.id not in stored]
    without = {p.task_label: reason for p in to_run if (reason := looks[p.material].missing) is not None}
    groups = len({plan.group for plan in to_run})
    print(f"{len(plans)} cells: {len(stored)} there, {len(to_run)} to run; groups that share prefills: {groups}")
    if without:
        raise UserError(_skipped(without))


def plan_cells(config: DictConfig) -> list[Plan]:
    """The cell a config asks for, the full cache on the same prompts, and that once more (the A/A noise floor)."""
    choices = config.hydra.runtime.choices
    task = _make_task(config)
    if OmegaConf.is_missing(config.model, "path"):
        raise UserError(f"model={choices.model} needs model.path=OWNER/NAME (on the Hub) or model.path=FOLDER")
    evict = make_evictor(config.evict, _budget(config, choices.evict))
    quant = hydra.utils.instantiate(config.quant)
    members = [p for p in (evict, quant) if not isinstance(p, Full)]
    if config.model.dtype not in DTYPES:
        raise UserError(f"model.dtype={config.model.dtype} is not one of {', '.join(DTYPES)}")
    for name in ("batch_size", "batch_tokens"):
        if config[name] < 1:
            raise UserError(f"{name}={config[name]} must be at least 1")
    if config.record not in RECORDS:
        raise UserError(f"record={config.record} is not one of {', '.join(RECORDS)}")
    fields = dataclasses.asdict(task)
    model = cast(dict[str, Any], OmegaConf.to_container(config.model, resolve=True))
    device_map = model.pop("device_map", None)  # where a model lies makes it no other
    base = {
        "model": {k: v for k, v in model.items() if k != "revision" or v is not None},
        "task": json.loads(json.dumps({"name": task.name, "kind": task.kind, **fields})),
        "query_aware": bool(config.query_aware),
        "seed": int(config.seed),
    }
    wandb, prompts = dict(config.wandb), cache_folder() if config.prompt_cache else None

    def cell(policy: Policy, names: dict[str, Any], second: bool = False) -> Plan:
        described = {"memory": None, "budget": None, **names, "stack": str(policy)}
        size, tokens, chunk = config.batch_size, config.batch_tokens, PREFILL_CHUNK
        if second:
            size, tokens, chunk = max(1, size // 2), max(1, tokens // 2), SECOND_CHUNK
        made = {**base["model"], "batch_size": size} if second else base["model"]
        full = {**base, "model": made, "policy": described}
        out = Path(config.out)
        return Plan(full, policy, task, size, tokens, config.record, chunk, prompts, out, wandb, device_map)

    names = {"evict": choices.evict, "quant": choices.quant}
    if not isinstance(evict, Full):
        names |= {"memory": config.memory, "budget": config.budget}
        if config.block is not None:
            names["block"] = config.block
    full = {"evict": "full", "quant": "none"}
    plans = [cell(Stack(tuple(members)), names), cell(Stack(()), full)]
    if config.noise_floor and config.batch_size > 1:
        plans.append(cell(Stack(()), full, second=True))
    return plans


def _make_task(config: DictConfig) -> Any:
    """The task, with its class's `sizes` where the command line does not set the field itself."""
    kind, name = config.task._target_.rpartition(".")[2], config.hydra.runtime.choices.task
    given = [(override, override.lstrip("+~").partition("=")[0].split(".")) for override in config.hydra.overrides.task]
    _refuse_unknown(config, [key[0] for override, key in given if override.startswith("+")], kind)
    typed = {key[1] for _, key in given if key[0] == "task" and key[1:]}
    sizes = {k: v for k, v in (config.sizes.get(kind) or {}).items() if k not in typed}
    try:
        return hydra.utils.instantiate(config.task, **sizes)
    except InstantiationException as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        known = [*inspect.signature(hydra.utils.get_class(config.task._target_)).parameters]
        for field in (str(k) for k in (*sizes, *config.task) if k not in known and not k.startswith("_")):
            where = f"sizes.{kind}.{field}" if field in sizes else f"task.{field}"
            others = [other for other in TASKS if field in inspect.signature(getattr(tasks, other)).parameters]
            advice = (
                f" (++sizes.<Class>.{field}= sets it for a class that has it: {', '.join(others)})" if others else ""
            )
            raise UserError(
                f"{where}: task={name} ({kind}) has no field {field}{meant(field, known)}{advice}"
            ) from error
        raise


def _refuse_unknown(config: DictConfig, added: Sequence[str], kind: str) -> None:
    """Misspelt names that Hydra takes: options added with + or ++, and classes of `sizes`."""
    if {source.provider for source in config.hydra.runtime.config_sources} - {"hydra", "main", "schema"}:
        return  # configs from elsewhere may have options and tasks of their own
    known = _options(config.hydra.runtime.choices.preset)
    for option in added:
        if option not in known:
            raise UserError(f"there is no option {option}{meant(option, known)}")
    for other in map(str, config.sizes):
        if other not in (kind, *TASKS):
            raise UserError(f"sizes.{other}: there is no class of tasks {other}{meant(other, TASKS)}")


@lru_cache
def _options(preset: str | None) -> tuple[str, ...]:
    """What stands at the top of the command line, with those of a preset."""
    names = ("config", f"preset/{preset}") if preset else ("config",)
    ours = [OmegaConf.create(files("kvbench.conf").joinpath(f"{name}.yaml").read_text()) for name in names]
    return tuple(sorted({*GROUPS, *(str(key) for own in ours for key in own)} - {"defaults"}))


def make_evictor(config: DictConfig, budget: dict[str, Any]) -> Policy:
    """The policy of a file of conf/evict; a wrapper's budget is that of the evictor it wraps."""
    return hydra.utils.instantiate(config, **({"base": budget} if "base" in config else budget))


def _budget(config: DictConfig, evict: str) -> dict[str, Any]:
    if evict == "full":
        return {}
    if (config.budget is None) == (config.memory is None):
        asks = "needs one of" if config.budget is None else "takes only one of"
        raise UserError(f"evict={evict} {asks} memory= (share of bytes) or budget= (tokens or share of the prompt)")
    budget = {"memory": config.memory} if config.budget is None else {"budget": config.budget}
    return budget if config.block is None else {**budget, "block": config.block}


def _run_groups(groups: list[list[Plan]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The cells of all groups, and why tasks were skipped, by their labels."""
    cells: list[dict[str, Any]] = []
    loaded: tuple[str, Any] = ("", None)
    prepared: tuple[str, list[Prompt]] = ("", [])
    skipped: dict[str, str] = {}
    with Display() as display, _tracker(groups[0][0].wandb) as track, Claims() as claims:
        sizes: list[int] = []
        for i, planned in enumerate(groups):
            group = claims.enter(planned)
            if not group:
                continue
            model_config = {**group[0].model, "device_map": group[0].device_map}
            if loaded[0] != canonical(model_config):
                display.step(f"loading {model_config['name']}")
                loaded = (canonical(model_config), load_model(**model_config))
            model, tokenizer = loaded[1]
            first, task = group[0], group[0].task
            if prepared[0] != first.material:
                display.step(f"prompts of {first.task_label}")
                limit = context_limit(model.config)
                try:
                    made = prepare(task, tokenizer, first.config["query_aware"], limit, first.prompts)
                    prepared = first.material, made
                except ValueError as error:  # no data, or too long for this model: other tasks can do without
                    skipped[first.task_label] = str(error).splitlines()[0]
                    continue
            prompts = prepared[1]
            each = len(batches_for(model, task, prompts, first.batch_size, first.batch_tokens))
            sizes.append(each * len(group))
            later = each * sum(len(g) for g in groups[i + 1 :])
            what = f"{first.task_label} × {len(group)} stacks"
            display.show(what, sum(sizes) + later)
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            begin = time.perf_counter()
            read = identity(prompts, _source(first.model["path"]), model.config)
            ran_on = {**environment(model), **dataclasses.asdict(read)}
            runs = _run_group(model, tokenizer, group, prompts, ran_on, display.advance)
            for plan, run in zip(group, runs, strict=True):
                cell = _store(plan, run, _to_cell(plan, run, started, ran_on))
                if cell["status"] != "done":
                    display.say(f"{cell['status']}: {plan.ended(cell['reason'])}")
                track(cell)
                cells.append(cell)
            display.complete(sum(sizes))
            display.log(f"{what}: {time.perf_counter() - begin:.1f} s; group {i + 1} of {len(groups)}")
    for group in groups:
        for folder in (group[0].partial.parent, group[0].log.parent):
            with suppress(OSError):  # another process keeps something there, or a cell has failed
                folder.rmdir()
    if claims.elsewhere:
        print(f"{claims.elsewhere} cells are left to another process that is running them")
    return cells, skipped


class Claims:
    """The cells of one group that this process runs, and no other: each is a file lock, which dies with its process."""

    def __init__(self) -> None:
        self.elsewhere = 0
        self._locks = ExitStack()

    def enter(self, group: list[Plan]) -> list[Plan]:
        """Gives up the group before, and returns what of this one is neither done nor being run elsewhere."""
        self._locks.close()
        return [plan for plan in group if self._claim(plan)]

    def _claim(self, plan: Plan) -> bool:
        path = plan.partial.with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            self.elsewhere += 1
            return False
        self._locks.callback(lock.release)
        self._locks.callback(path.unlink, missing_ok=True)  # while it is still ours: who waits will find the cell
        return stored_cell(plan.out, plan.id) is None

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *error: object) -> None:
        self._locks.close()


def _run_group(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    group: list[Plan],
    prompts: list[Prompt],
    ran_on: dict[str, Any],
    advance: Any,
) -> list[Run]:
    """Runs a group, keeping finished batches on disk so that a killed sweep repeats nothing."""

    def keep(index: int, run: Run) -> None:
        path = group[index].partial
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**dataclasses.asdict(run), "ran_on": ran_on}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def log(index: int, error: Exception) -> None:
        path = group[index].log
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")

    first = group[0]
    return run_stacks(
        model, tokenizer, first.task, [p.policy for p in group], prompts=prompts,
        query_aware=first.config["query_aware"], batch_size=first.batch_size, batch_tokens=first.batch_tokens,
        record=first.record, prefill_chunk=first.prefill_chunk,
        finished=[_finished(p.partial, ran_on) for p in group], on_finished=keep, on_failed=log, on_progress=advance,
    )  # fmt: skip


def _finished(path: Path, ran_on: Mapping[str, Any]) -> list[Run]:
    """The batches that were run so; others run again, as a cell is of one commit and device.

    What a dying process left of a line is cut off, as more will follow.
    """
    if not path.exists():
        return []
    kept = path.read_bytes()
    whole = kept.rfind(b"\n") + 1
    if whole < len(kept):
        os.truncate(path, whole)
    runs = []
    for line in kept[:whole].splitlines():
        with suppress(ValueError):  # two lines in one, which earlier versions could leave
            part = json.loads(line)
            if part.pop("ran_on", None) == ran_on:
                runs.append(Run(**part))
    return runs


def _source(path: str) -> str:
    """What transformers loads: a folder, or a name on the Hub."""
    return str(files("kvbench") / "assets" / "proving") if path == "proving" else path


@contextmanager
def _loading(path: str) -> Iterator[None]:
    disable_progress_bar()
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot load model.path={path}: {str(error).strip().splitlines()[0]}") from error


def load_model(
    name: str, path: str, dtype: str, device_map: Any = None, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from the Hub, a folder, or ("proving") this package."""
    with _loading(path):
        tokenizer = AutoTokenizer.from_pretrained(_source(path), revision=revision or "main")
        model: Any = AutoModelForCausalLM.from_pretrained(
            _source(path), dtype=DTYPES[dtype], device_map=device_map, revision=revision or "main"
        )
    if device_map is None and torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval(), tokenizer


def _store(plan: Plan, run: Run, cell: dict[str, Any]) -> dict[str, Any]:
    """Writes a cell, as failed where it does not fit the schema (a perplexity that is not a number, say)."""
    try:
        write_cell(plan.out, cell)
    except ValueError as error:
        cell = {**cell, "status": "failed", "reason": f"{plan.policy}: {error}", "samples": [], "checks": {}}
        write_cell(plan.out, cell)
    if run.failed is None:  # a cell that an error stopped goes on from its finished batches
        plan.partial.unlink(missing_ok=True)
        plan.log.unlink(missing_ok=True)
    return cell


def _to_cell(plan: Plan, run: Run, started: str, ran_on: Mapping[str, Any]) -> dict[str, Any]:
    status, reason = "done", None
    if run.failed is not None:
        status, reason = "failed", run.failed
    elif run.infeasible is not None:
        status, reason = "infeasible", run.infeasible
    elif not run.checks.get("fired", True):
        status, reason = "failed", f"{plan.policy} changed nothing: the prompts are too short for it to act"
    elif not run.checks.get("bytes_ok", True):
        status, reason = "failed", f"{plan.policy} does not hold the bytes or slots its budget asks for"
    return {
        "schema": 1,
        "cell_id": plan.id,
        "config": plan.config,
        "status": status,
        "reason": reason,
        "provenance": {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            **ran_on,
            "prefill_chunk": plan.prefill_chunk,
            "fallbacks": run.fallbacks,
            "started": started,
            "seconds": run.seconds,
        },
        "samples": run.rows,
        "checks": run.checks,
    }


@contextmanager
def _tracker(config: dict[str, Any]) -> Iterator[Any]:
    """A function that logs a finished cell to wandb, or does nothing."""
    if config["mode"] == "disabled":
        yield lambda cell: None
        return
    if config["mode"] not in ("online", "offline"):
        raise UserError(f"wandb.mode={config['mode']} is not one of disabled, online, offline")
    try:
        import wandb
    except ImportError as error:
        raise UserError("wandb.mode asks for wandb, which is not installed: pip install 'kvbench[wandb]'") from error
    with wandb.init(project=config["project"], mode=config["mode"]) as run:

        def log(cell: dict[str, Any]) -> None:
            rows = cell["samples"]
            name = f"{cell['config']['task']['name']}/{cell['config']['policy']['stack']}"
            if rows:
                held, full = (sum(r[k] for r in rows) for k in ("kv_bytes_prefill_end", "kv_bytes_full"))
                run.log(
                    {f"{name}/score": sum(r["score"] for r in rows) / len(rows), f"{name}/bytes_ratio": held / full}
                )

        yield log


def _summarize(cells: list[dict[str, Any]], asked: Sequence[Plan]) -> None:
    """What became of the new cells; the scores of a few are shown one by one."""
    new = {cell["cell_id"]: cell["samples"] for cell in cells if len(cells) <= 12}
    for plan, rows in ((plan, rows) for plan in asked if (rows := new.get(plan.id))):
        held, full = (sum(r[k] for r in rows) for k in ("kv_bytes_prefill_end", "kv_bytes_full"))
        score = sum(r["score"] for r in rows) / len(rows)
        print(f"{plan.label}  score {score:.3f} at {held / full:.3f} of the bytes")
    print(f"{sum(c['status'] == 'done' for c in cells)} new cells")


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns what a user can put right into one line; anything else keeps its traceback."""
    try:
        yield
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise UserError(str(cause).splitlines()[0]) from error
    except (ValueError, ResultsError, OmegaConfBaseException) as error:
        raise UserError(str(error).splitlines()[0]) from error
    except OSError as error:
        raise UserError(f"{error.strerror or error}: {error.filename or ''}; finished cells are kept") from error
