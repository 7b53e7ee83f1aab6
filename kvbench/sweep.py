"""From Hydra configs to result cells: plan, skip what is there, run groups that share prefills, write each cell.

`run_jobs` gets one config (`kvbench …`) or all configs of a sweep (`kvbench -m …`). Cells that name the same thing (the
full cache at three byte budgets, say) are one cell.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from kvbench.answer import Prompt, Run, Task
from kvbench.engine import RECORDS, batches_for, context_limit, run_stacks
from kvbench.kernels.choice import chosen
from kvbench.policies.full import Full
from kvbench.policies.interface import Policy, Stack
from kvbench.prompts import cache_folder, prepare
from kvbench.results import ResultsError, canonical, cell_id, has_cell, write_cell

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UserError(SystemExit):
    """Something the user can put right; the message is one line. Ends the program, as Hydra would print a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(f"kvbench: {message}")


@dataclass(frozen=True)
class Plan:
    """One cell to run. `group`: cells with an equal one share prefills. prompts: where to keep prepared ones, if so."""

    config: dict[str, Any]
    policy: Policy
    task: Task
    batch_size: int
    batch_tokens: int
    record: str
    prompts: Path | None
    out: Path
    wandb: dict[str, Any]
    device_map: Any = None

    @property
    def id(self) -> str:
        return cell_id(self.config)

    @property
    def group(self) -> str:
        shared = {k: v for k, v in self.config.items() if k != "policy"}
        return canonical([shared, self.batch_size, self.batch_tokens, self.record, str(self.out), self.device_map])

    @property
    def partial(self) -> Path:
        return self.out / "partial" / f"{self.id}.jsonl"


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

    hydra.main(version_base="1.3", config_path="pkg://kvbench.conf", config_name="config")(job)()
    if jobs:
        run_jobs(jobs)


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
        groups: dict[str, list[Plan]] = {}
        for plan in plans.values():
            if not has_cell(plan.out, plan.id):
                groups.setdefault(plan.group, []).append(plan)
        ready = len(plans) - sum(map(len, groups.values()))
        if ready:
            print(f"{ready} of {len(plans)} cells are already there")
        skipped: dict[str, str] = {}
        if groups:
            new, skipped = _run_groups(list(groups.values()))
            if skipped and not new:
                raise UserError(next(iter(skipped.values())))
            _summarize(new, set(asked))
        for folder in sorted({str(p.out) for p in plans.values()}):
            print(f"next: kvbench leaderboard {folder}")
        if skipped:
            reasons = "".join(f"\n  {name}: {reason}" for name, reason in skipped.items())
            raise UserError(f"tasks skipped: {len(skipped)}{reasons}")


def plan_cells(config: DictConfig) -> list[Plan]:
    """The cell a config asks for, the full cache on the same prompts, and that once more (the A/A noise floor)."""
    choices = config.hydra.runtime.choices
    sizes = config.sizes.get(config.task._target_.rpartition(".")[2]) or {}
    task = hydra.utils.instantiate(config.task, **sizes)
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

    def cell(policy: Policy, names: dict[str, Any], model: dict[str, Any], batch_size: int, tokens: int) -> Plan:
        described = {"memory": None, "budget": None, **names, "stack": str(policy)}
        full = {**base, "model": {**base["model"], **model}, "policy": described}
        return Plan(full, policy, task, batch_size, tokens, config.record, prompts, Path(config.out), wandb, device_map)

    names = {"evict": choices.evict, "quant": choices.quant}
    if not isinstance(evict, Full):
        names |= {"memory": config.memory, "budget": config.budget}
        if config.block is not None:
            names["block"] = config.block
    full = {"evict": "full", "quant": "none"}
    plans = [
        cell(Stack(tuple(members)), names, {}, config.batch_size, config.batch_tokens),
        cell(Stack(()), full, {}, config.batch_size, config.batch_tokens),
    ]
    if config.noise_floor and config.batch_size > 1:
        other = max(1, config.batch_size // 2)
        plans.append(cell(Stack(()), full, {"batch_size": other}, other, max(1, config.batch_tokens // 2)))
    return plans


def make_evictor(config: DictConfig, budget: dict[str, Any]) -> Policy:
    """The policy of a file of conf/evict; a wrapper's budget is that of the evictor it wraps."""
    return hydra.utils.instantiate(config, **({"base": budget} if "base" in config else budget))


def _budget(config: DictConfig, evict: str) -> dict[str, Any]:
    if evict == "full":
        return {}
    if (config.budget is None) == (config.memory is None):
        raise UserError(
            f"evict={evict} needs one of memory= (share of bytes) or budget= (tokens or share of the prompt)"
        )
    budget = {"memory": config.memory} if config.budget is None else {"budget": config.budget}
    return budget if config.block is None else {**budget, "block": config.block}


def _run_groups(groups: list[list[Plan]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The cells of all groups, and why tasks were skipped, by their names."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    cells: list[dict[str, Any]] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    loaded: tuple[str, Any] = ("", None)
    prepared: tuple[str, list[Prompt]] = ("", [])
    skipped: dict[str, str] = {}
    with Progress(*columns) as progress, _tracker(groups[0][0].wandb) as track, Claims() as claims:
        bar = progress.add_task("sweep", total=None)
        sizes: list[int] = []
        for i, planned in enumerate(groups):
            group = claims.enter(planned)
            if not group:
                continue
            model_config = {k: v for k, v in group[0].config["model"].items() if k != "batch_size"}
            model_config["device_map"] = group[0].device_map
            if loaded[0] != canonical(model_config):
                progress.update(bar, description=f"loading {model_config['name']}")
                loaded = (canonical(model_config), load_model(**model_config))
            model, tokenizer = loaded[1]
            first, task = group[0], group[0].task
            asked = canonical([loaded[0], first.config["task"], first.config["query_aware"]])
            if prepared[0] != asked:
                progress.update(bar, description=f"prompts of {task.name}")
                limit = context_limit(model)
                try:
                    prepared = asked, prepare(task, tokenizer, first.config["query_aware"], limit, first.prompts)
                except ValueError as error:  # no data, or too long for this model: other tasks can do without
                    skipped[task.name] = str(error).splitlines()[0]
                    continue
            prompts = prepared[1]
            each = len(batches_for(model, task, prompts, first.batch_size, first.batch_tokens))
            sizes.append(each * len(group))
            later = each * sum(len(g) for g in groups[i + 1 :])
            progress.update(bar, description=f"{task.name} × {len(group)} stacks", total=sum(sizes) + later)
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            runs = _run_group(model, tokenizer, group, prompts, lambda n: progress.advance(bar, n))
            for plan, run in zip(group, runs, strict=True):
                cell = _to_cell(plan, run, started, model)
                write_cell(plan.out, cell)
                plan.partial.unlink(missing_ok=True)
                track(cell)
                cells.append(cell)
            progress.update(bar, completed=sum(sizes))
    for group in groups:
        with suppress(OSError):  # another process keeps something there
            group[0].partial.parent.rmdir()
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
        return not has_cell(plan.out, plan.id)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *error: object) -> None:
        self._locks.close()


def _run_group(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, group: list[Plan], prompts: list[Prompt], advance: Any
) -> list[Run]:
    """Runs a group, keeping finished batches on disk so that a killed sweep repeats nothing."""

    def keep(index: int, run: Run) -> None:
        path = group[index].partial
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(run)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    return run_stacks(
        model, tokenizer, group[0].task, [p.policy for p in group], prompts=prompts,
        query_aware=group[0].config["query_aware"], batch_size=group[0].batch_size,
        batch_tokens=group[0].batch_tokens, record=group[0].record,
        finished=[_read_partial(p.partial) for p in group], on_finished=keep, on_progress=advance,
    )  # fmt: skip


def _read_partial(path: Path) -> list[Run]:
    if not path.exists():
        return []
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            runs.append(Run(**json.loads(line)))
        except ValueError:
            break  # the process died while writing this line
    return runs


def load_model(
    name: str, path: str, dtype: str, device_map: Any = None, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer from the Hub, a folder, or ("proving") this package."""
    disable_progress_bar()
    source = str(files("kvbench") / "assets" / "proving") if path == "proving" else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
        model: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], device_map=device_map, revision=revision or "main"
        )
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot load model.path={path}: {reason}") from error
    if device_map is None and torch.cuda.is_available():
        model = model.to("cuda")
    return model.eval(), tokenizer


def _to_cell(plan: Plan, run: Run, started: str, model: PreTrainedModel) -> dict[str, Any]:
    status, reason = "done", None
    if run.infeasible is not None:
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
            "commit": commit(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "versions": {
                "kvbench": version("kvbench"),
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": version("transformers"),
            },
            "model_revision": getattr(model.config, "_commit_hash", None) or "",
            "device": _device(model),
            "backend": chosen(model.device),
            "fallbacks": run.fallbacks,
            "started": started,
            "seconds": run.seconds,
        },
        "samples": run.rows,
        "checks": run.checks,
    }


def commit() -> str:
    """The commit of the checkout kvbench runs from, "+" if it has changes; empty when it is installed otherwise."""
    try:
        here = Path(__file__).resolve().parent
        ask = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _device(model: PreTrainedModel) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


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


def _summarize(cells: list[dict[str, Any]], asked: set[str]) -> None:
    """What became of the new cells; a few are shown one by one."""
    for cell in cells if len(cells) <= 12 else []:
        rows, policy = cell["samples"], cell["config"]["policy"]
        if rows and cell["cell_id"] in asked:
            held, full = (sum(r[k] for r in rows) for k in ("kv_bytes_prefill_end", "kv_bytes_full"))
            score = sum(r["score"] for r in rows) / len(rows)
            task = cell["config"]["task"]["name"]
            print(f"{task}  {policy['stack']}  score {score:.3f} at {held / full:.3f} of the bytes")
    for cell in cells:
        if cell["status"] != "done":
            print(f"{cell['status']}: {cell['config']['task']['name']}: {cell['reason']}")
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
