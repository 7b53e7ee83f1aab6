"""What a benchmark costs: RULER's 13 tasks x 20 samples x 24 stacks on the model in the package, shared and one by one.

    python scripts/bench_ruler.py --data FOLDER            # about 300 cells; an hour on two CPU cores
    python scripts/bench_ruler.py --tasks vt cwe --count 4  # a quick look, without files

FOLDER holds essays (*.txt), dev-v2.0.json and hotpot_dev_distractor_v1.json, as for `task=ruler_mini task.path=FOLDER`.
Tasks whose smallest prompt is longer than --length (the model knows few long words) take twice or four times as much.
A cell is one stack on one task. All stacks of a task share prompts and prefills; run one by one, each cell builds its
prompts and prefills for itself (models are loaded once in both arms). The second arm times `--singles` cells, spread
over tasks and stacks, not all of them: their mean stands for the rest. Reported: seconds per cell in both arms, and
where the seconds of the first go: prompts (built anew; from disk), prefill, compression, decoding (held-back tokens,
answers) and, as a part of it, scoring. Rows carry machine, versions and commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_sweep import stacks
from tqdm import tqdm

from kvbench.engine import context_limit, run_stacks
from kvbench.policies import Policy
from kvbench.prompts import prepare
from kvbench.sweep import commit, load_model
from kvbench.tasks import Ruler
from kvbench.tasks.ruler import SUBTASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(SUBTASKS), choices=list(SUBTASKS))
    parser.add_argument("--data", type=Path, help="folder with essays and questions")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--count", type=int, default=20, help="samples per task")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--singles", type=int, default=26, help="cells timed one by one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/bench_ruler/rows.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model("proving", "proving", options.dtype)
    path = None if options.data is None else str(options.data)
    tasks = [fitting(tokenizer, name, options.length, options.count, path) for name in options.tasks]
    row = measure(model, tokenizer, tasks, options.singles, options.batch_size) | {
        "length": options.length, "samples": options.count, "batch_size": options.batch_size, "dtype": options.dtype,
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": options.threads, "torch": torch.__version__, "transformers": version("transformers"),
        "kvbench": version("kvbench"), "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    print(json.dumps(row))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def fitting(tokenizer: Any, name: str, length: int, count: int, path: str | None) -> Ruler:
    """The task at this length, or at the first of two doublings that it fits into."""
    for doublings in range(3):
        one = Ruler(name, length=length << doublings, variant="ruler_mini", count=1, path=path)
        try:
            one.samples(tokenizer)
        except ValueError:
            if doublings == 2:
                raise
        else:
            break
    return replace(one, count=count)


def measure(model: Any, tokenizer: Any, tasks: list[Ruler], singles: int, batch_size: int) -> dict[str, object]:
    chosen = stacks()
    limit = context_limit(model)
    cells = [(task, stack) for task in tasks for stack in chosen]
    # The second arm's cells: as many of each task, and from task to task other stacks.
    timed = [(tasks[i % len(tasks)], chosen[(5 * i) % len(chosen)]) for i in range(min(singles, len(cells)))]

    def alone(task: Ruler, stack: Policy) -> float:
        started = time.perf_counter()
        prompts = prepare(task, tokenizer, True, limit)
        run_stacks(model, tokenizer, task, [stack], prompts=prompts, query_aware=True, batch_size=batch_size)
        return time.perf_counter() - started

    alone(tasks[0], chosen[0])  # warm-up
    rows, single = [], []
    with tempfile.TemporaryDirectory() as folder:
        for task in tqdm(tasks, "tasks"):
            # Interleaved: a slow machine slows both.
            single += [alone(task, stack) for of, stack in timed if of is task]
            rows.append(together(model, tokenizer, task, chosen, limit, batch_size, Path(folder)))
    total = sum(row["seconds"] for row in rows)
    parts = {part: round(sum(row[part] for row in rows), 2) for part in rows[0] if part not in ("task", "length")}
    return {
        "tasks": len(tasks), "stacks": len(chosen), "cells": len(cells), "singles": len(single),
        "cell_s": round(total / len(cells), 3), "cell_alone_s": round(statistics.mean(single), 3),
        "cell_alone_s_min": round(min(single), 3), "cell_alone_s_max": round(max(single), 3),
        "times_faster": round(statistics.mean(single) * len(cells) / total, 2), **parts, "by_task": rows,
    }  # fmt: skip


def together(
    model: Any, tokenizer: Any, task: Ruler, chosen: list[Policy], limit: int | None, batch_size: int, folder: Path
) -> dict[str, Any]:
    """All stacks on one task, and where the seconds go."""
    started = time.perf_counter()
    prompts = prepare(task, tokenizer, True, limit, folder)
    built = time.perf_counter() - started
    with scoring_seconds() as scoring:
        runs = run_stacks(model, tokenizer, task, chosen, prompts=prompts, query_aware=True, batch_size=batch_size)
    seconds = time.perf_counter() - started
    again = time.perf_counter()
    prepare(task, tokenizer, True, limit, folder)
    from_disk = time.perf_counter() - again
    decode = [sum(row["decode_s"] for row in run.rows) for run in runs]
    compress = [run.seconds - spent for run, spent in zip(runs, decode, strict=True)]
    prefill = sum(row["prefill_s"] for row in runs[0].rows) - compress[0]
    parts = {
        "seconds": seconds, "prompts": built, "prompts_from_disk": from_disk, "prefill": prefill,
        "compress": sum(compress), "decode": sum(decode), "scoring": scoring[0],
    }  # fmt: skip
    return {"task": task.name, "length": task.length, **{name: round(value, 3) for name, value in parts.items()}}


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
