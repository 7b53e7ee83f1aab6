"""One cell of a sweep is one JSON file: what ran, where, and the score and bytes of every sample.

A cell is (model, task, stack, seed). Its name is a hash of its configuration, so a repeated sweep finds what it has,
and it is written in one step, so a killed sweep leaves whole cells only.

    >>> from kvbench.results import read_cells
    >>> cells, problems = read_cells("results")            # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SCHEMA = 1

Bytes = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Duration = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class ResultsError(Exception):
    """A folder of results cannot be read or written; the message is one line for the user."""


class _Record(BaseModel):
    # Unknown fields stay: a newer writer may measure more than this reader knows.
    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)


class Model(_Record):
    name: str
    path: str = ""
    dtype: str = ""


class Task(_Record):
    name: str
    kind: Literal["generate", "nll", "fidelity"]


class Policy(_Record):
    evict: str
    quant: str
    stack: str
    memory: int | float | None = None  # share of the bytes of the 16-bit full cache
    budget: int | float | None = None  # tokens (int) or share of the prompt (float)


class Config(_Record):
    model: Model
    task: Task
    policy: Policy
    query_aware: bool
    seed: int


class Provenance(_Record):
    commit: str = ""
    command: str = ""
    versions: dict[str, str] = {}
    # What was run on, see kvbench.identity; "" where it does not apply, and in older cells.
    model_revision: str = ""  # the commit that was loaded from the Hub
    model_sha256: str = ""  # of a local folder
    prompts_sha256: str = ""
    prefill_chunk: int | None = None  # tokens; None in older cells
    device: str = ""
    backend: str = ""  # that was to run on the device, see kvbench.kernels.choice; "" in older cells
    fallbacks: list[str] = []  # why it did not run where it did not
    started: str = ""
    seconds: Duration = 0.0


class Sample(_Record):
    sample_id: str
    prompt_sha256: str
    prediction: str = ""
    score: Annotated[float, Field(ge=0, le=1)]  # higher is better; exp(-mean NLL) for tasks of kind "nll"
    nll: Finite | None = None
    n_prompt_tokens: Annotated[int, Field(ge=0)]
    n_generated: Annotated[int, Field(ge=0)]
    kept_tokens: Duration  # mean over layers and heads, end of prefill
    kv_bytes_prefill_end: Bytes
    kv_bytes_final: Bytes
    kv_bytes_read_final: Bytes | None = (
        None  # keys, values and metadata the last step read; less than held for selectors
    )
    kv_bytes_full: Annotated[int, Field(gt=0)]  # 16-bit full cache, end of prefill
    kv_bytes_full_final: Annotated[int, Field(gt=0)]
    # The most held after any forward, from the end of prefill to the end of the answer. Older cells: the most at looks
    # every so many tokens (`trace` of the task, else 16), which may be less.
    kv_bytes_peak: Bytes | None = None
    # CUDA only: the most memory that was allocated from the compression to the end of the answer of the sample's batch,
    # above what was there before (weights, the prefill that all stacks share).
    peak_bytes: Bytes | None = None
    truncated: bool | None = None  # max_new_tokens were generated, and none of the stops; None for kind "nll"
    # [layers][kv heads]: share of the needle's tokens whose slots are kept at the end of the compression, layers with
    # full attention only; see kvbench.misses. None where the prompt has no needle.
    needle_kept: list[list[Share]] | None = None
    # What attended in decode steps: "torch", "triton" or "interpret"; "torch+triton" where layers or steps differed;
    # None where there were none, and in older cells.
    backend: str | None = None
    details: dict[str, Any] | None = None  # what the task measures besides the score
    prefill_s: Duration = 0.0
    decode_s: Duration = 0.0
    meta: dict[str, Any] = {}


class Cell(_Record):
    schema_version: Literal[1] = Field(alias="schema")
    cell_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    config: Config
    status: Literal["done", "infeasible", "failed"]
    reason: str | None = None
    provenance: Provenance = Provenance()
    samples: list[Sample] = []
    checks: dict[str, Any] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Cell:
        if self.cell_id != (expected := cell_id(self.config)):
            raise ValueError(f"cell_id {self.cell_id} does not belong to this config (expected {expected})")
        if self.status == "done" and not self.samples:
            raise ValueError("status is done, but there are no samples")
        if self.status != "done" and not self.reason:
            raise ValueError(f"status is {self.status}, but no reason is given")
        if len({s.sample_id for s in self.samples}) < len(self.samples):
            raise ValueError("a sample_id occurs twice")
        if self.config.task.kind == "nll" and any(s.nll is None for s in self.samples):
            raise ValueError("a task of kind nll needs the nll of every sample")
        return self


class Problem(NamedTuple):
    """A cell file that could not be used, and why."""

    file: str
    reason: str


def canonical(value: Any) -> str:
    """JSON text with sorted keys and no blanks. 1 and 1.0 differ, as budgets of one token and of everything do."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=True)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def cell_id(config: Mapping[str, Any] | Config) -> str:
    """The name of the cell with this configuration: 16 hex digits."""
    value = config if isinstance(config, BaseModel) else dict(config)
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def write_cell(folder: str | Path, cell: Cell | Mapping[str, Any]) -> Path:
    """Write `<folder>/cells/<cell_id>.json` whole or not at all; a cell of the same name is replaced.

    Raises ValueError on a cell that does not fit the schema, ResultsError when it cannot be stored.
    """
    if not isinstance(cell, Cell):
        try:
            cell = Cell.model_validate(cell)
        except ValidationError as error:
            raise ValueError(f"not a valid cell: {_first(error)}") from None
    cells = Path(folder) / "cells"
    path = cells / f"{cell.cell_id}.json"
    temporary = cells / f".{cell.cell_id}.{os.getpid()}.tmp"  # same folder: a rename never crosses file systems
    try:
        cells.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(cell.model_dump_json(by_alias=True, exclude_unset=True))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise ResultsError(
            f"cannot write cell {cell.cell_id} to {cells}: {error.strerror or error}. Finished cells there are kept; "
            "free space or fix access, then run the same command again: it continues where it stopped."
        ) from error
    except BaseException:  # an interrupt between two writes must not leave a stray file either
        _remove(temporary)
        raise
    return path


def read_cells(folder: str | Path) -> tuple[list[Cell], list[Problem]]:
    """All usable cells in order of their names, and the files that are not usable with the reason."""
    cells = Path(folder) / "cells"
    if not cells.is_dir():
        raise ResultsError(f"no results in {folder}: there is no folder {cells}; run a sweep into it first")
    paths = sorted(cells.glob("*.json"))
    if not paths:
        raise ResultsError(f"no results in {folder}: {cells} holds no *.json file; run a sweep into it first")
    found = [_read(path) for path in paths]
    return [x for x in found if isinstance(x, Cell)], [x for x in found if isinstance(x, Problem)]


def stored_cell(folder: str | Path, cell_id: str) -> Cell | None:
    """This cell, if it is stored and readable, so that a sweep may skip it.

    One that was stopped by an error (failed, without samples) does not count: it is to be tried again.
    """
    path = Path(folder) / "cells" / f"{cell_id}.json"
    cell = _read(path) if path.is_file() else None
    return cell if isinstance(cell, Cell) and (cell.status != "failed" or cell.samples) else None


def _read(path: Path) -> Cell | Problem:
    try:
        data = json.loads(path.read_bytes())
        if isinstance(data, dict) and data.get("schema") != SCHEMA:
            return Problem(path.name, f"schema {data.get('schema')!r}, this version reads {SCHEMA}")
        cell = Cell.model_validate(data)
    except OSError as error:
        return Problem(path.name, f"cannot be read: {error.strerror or error}")
    except ValidationError as error:
        return Problem(path.name, _first(error))
    except (ValueError, RecursionError) as error:
        return Problem(path.name, f"truncated or not JSON: {error}")
    if path.stem != cell.cell_id:
        return Problem(path.name, f"holds cell {cell.cell_id}")
    return cell


def _first(error: ValidationError) -> str:
    first, *others = error.errors(include_url=False, include_input=False)
    where = ".".join(map(str, first["loc"]))
    more = f" (and {len(others)} more)" if others else ""
    return f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}{more}"


def _remove(path: Path) -> None:
    with suppress(OSError):  # nothing more can be done on a broken disk, and the first error is the one to report
        path.unlink(missing_ok=True)
