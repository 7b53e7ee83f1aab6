"""What a benchmark costs: RULER's 13 tasks x 20 samples x 24 stacks on the model in the package, shared and one by one.

    python scripts/bench_ruler.py --data FOLDER            # 312 cells; an hour on two CPU cores
    python scripts/bench_ruler.py --tasks vt cwe --count 4  # a quick look, without files

FOLDER holds essays (*.txt), dev-v2.0.json and hotpot_dev_distractor_v1.json, as for `task=ruler_mini task.path=FOLDER`.
Tasks whose smallest prompts are longer than --length (the model knows few long words) take two, four or eight times as
much, past the model's context if need be: only the cost is looked at. A cell is one stack on one task. All stacks of a
task share prompts and prefills; run one by one, each cell builds its prompts and prefills for itself (the model is
loaded once in both arms). The second arm times `--singles` cells of each task, of stacks that change from task to task:
their mean stands for the rest. Reported: seconds per cell in both arms, and where the seconds of the first go: prompts
(built anew; from disk), prefill, compression, decoding (held-back tokens, answers) and, as a part of it, scoring.

One row per task, written when it is done, and one of all, with machine, versions and commit; a run that was cut off
goes on with the tasks that are missing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_sweep import stacks
from tqdm import tqdm

from kvbench.engine import run_stacks
from kvbench.identity import commit
from kvbench.policies import Full, Policy
from kvbench.prompts import prepare
from kvbench.sweep import load_model
from kvbench.tasks import Ruler
from kvbench.tasks.ruler import SUBTASKS

PARTS = ("seconds", "prompts", "prompts_from_disk", "prefill", "compress", "decode", "scoring")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(SUBTASKS), choices=list(SUBTASKS))
    parser.add_argument("--data", type=Path, help="folder with essays and questions")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--count", type=int, default=20, help="samples per task")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--singles", type=int, default=2, help="cells of each task timed one by one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/bench_ruler/rows.jsonl"))
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model("proving", "proving", options.dtype)
    about = {
        "samples": options.count, "batch_size": options.batch_size, "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": options.threads, "torch": torch.__version__, "transformers": version("transformers"),
        "kvbench": version("kvbench"), "commit": commit(),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    written = options.out.read_text(encoding="utf-8").splitlines() if options.out.exists() else []
    rows = {row["task"]: row for row in map(json.loads, written) if about.items() <= row.items()}
    path = None if options.data is None else str(options.data)
    with options.out.open("a", encoding="utf-8") as file:
        for number, name in enumerate(tqdm(options.tasks, "tasks")):
            if f"ruler_mini_{name}" in rows:
                continue
            task = fitting(tokenizer, name, options.length, options.count, path)
            row = measure(model, tokenizer, task, number, options.singles, options.batch_size) | about
            rows[task.name] = row | {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
            print(json.dumps(rows[task.name]), file=file, flush=True)
        total = summary([rows[f"ruler_mini_{name}"] for name in options.tasks]) | about
        print(json.dumps(total), file=file)
    print(json.dumps(total))


def fitting(tokenizer: Any, name: str, length: int, count: int, path: str | None) -> Ruler:
    """The task at this length, or at the first of three doublings that all its prompts fit into."""
    for doublings in range(4):
        task = Ruler(name, length=length << doublings, variant="ruler_mini", count=count, path=path)
        try:
            task.samples(tokenizer)
        except ValueError:
            if doublings == 3:
                raise
        else:
            break
    return task


def measure(model: Any, tokenizer: Any, task: Ruler, number: int, singles: int, batch_size: int) -> dict[str, Any]:
    """Both arms on the task of this number."""
    chosen = stacks()

    def alone(stack: Policy) -> float:
        started = time.perf_counter()
        prompts = prepare(task, tokenizer, True, None)
        run_stacks(model, tokenizer, task, [stack], prompts=prompts, query_aware=True, batch_size=batch_size)
        return time.perf_counter() - started

    timed = [chosen[5 * (singles * number + i) % len(chosen)] for i in range(singles)]
    run_stacks(model, tokenizer, task, [Full()], prompts=prepare(task, tokenizer, True, None)[:1])  # warm-up
    single = [alone(stack) for stack in timed[: singles // 2]]  # before and after: a slow machine slows both arms
    row = together(model, tokenizer, task, chosen, batch_size)
    single += [alone(stack) for stack in timed[singles // 2 :]]
    return row | {"cells": len(chosen), "alone": [round(seconds, 3) for seconds in single]}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    cells, single = sum(row["cells"] for row in rows), [seconds for row in rows for seconds in row["alone"]]
    parts = {name: round(sum(row[name] for row in rows), 2) for name in PARTS}
    return {
        "task": "all", "tasks": len(rows), "cells": cells, "singles": len(single),
        "cell_s": round(parts["seconds"] / cells, 3), "cell_alone_s": round(statistics.mean(single), 3),
        "cell_alone_s_min": min(single), "cell_alone_s_max": max(single),
        "times_faster": round(statistics.mean(single) * cells / parts["seconds"], 2), **parts,
    }  # fmt: skip


def together(model: Any, tokenizer: Any, task: Ruler, chosen: list[Policy], batch_size: int) -> dict[str, Any]:
    """All stacks on one task, and where the seconds go."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        prompts = prepare(task, tokenizer, True, None, Path(folder))
        built = time.perf_counter() - started
        with scoring_seconds() as scoring:
            runs = run_stacks(model, tokenizer, task, chosen, prompts=prompts, query_aware=True, batch_size=batch_size)
        seconds = time.perf_counter() - started
        again = time.perf_counter()
        prepare(task, tokenizer, True, None, Path(folder))
        from_disk = time.perf_counter() - again
    decode = [sum(row["decode_s"] for row in run.rows) for run in runs]
    compress = [run.seconds - spent for run, spent in zip(runs, decode, strict=True)]
    prefill = sum(row["prefill_s"] for row in runs[0].rows) - compress[0]
    parts = (seconds, built, from_disk, prefill, sum(compress), sum(decode), scoring[0])
    return {"task": task.name, "length": task.length} | {
        name: round(value, 3) for name, value in zip(PARTS, parts, strict=True)
    }


@contextmanager
def scoring_seconds() -> Iterator[list[float]]:
    spent, score = [0.0], Ruler.score

    def watched(self: Ruler, *arguments: Any) -> float:
        started = time.perf_counter()
        try:
            return score(self, *arguments)
        finally:
            spent[0] += time.perf_counter() - started

    Ruler.score = watched  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Ruler.score = score  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
