"""Score a model with the full cache on RULER by task and length: where it has signal, policies can be ranked on it.

    python scripts/eval_ruler.py                                      # the proving model, ruler_proving
    python scripts/eval_ruler.py --variant ruler_mini --path data/ruler --model HuggingFaceTB/SmolLM2-135M-Instruct

Writes one row for each task and length to --out, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import transformers

from kvbench.engine import run_stacks
from kvbench.identity import commit
from kvbench.policies.full import Full
from kvbench.sweep import DTYPES, load_model
from kvbench.tasks.ruler import SUBTASKS, VARIANTS, Ruler

ROOT = Path(__file__).resolve().parents[1]


def row(model, tokenizer, task: Ruler, batch_size: int) -> dict:
    """Mean score and share of perfect answers of one task, or why it cannot be run at this length."""
    cell = {"task": task.name, "length": task.length}
    begin = time.time()
    try:
        (run,) = run_stacks(model, tokenizer, task, [Full()], batch_size=batch_size)
    except ValueError as error:  # the length is too short for the task, or too long for the model
        return cell | {"n": 0, "score": None, "reason": str(error)}
    scores = [r["score"] for r in run.rows]
    return cell | {
        "n": len(scores),
        "score": round(sum(scores) / len(scores), 4),
        "perfect": sum(s == 1 for s in scores),
        "prompt_tokens": round(sum(r["n_prompt_tokens"] for r in run.rows) / len(scores), 1),
        "seconds": round(time.time() - begin, 1),
    }


def table(rows: list[dict]) -> str:
    """Markdown: a line for each task, a column for each length; a dash where the prompt does not fit."""
    lengths, tasks = (list(dict.fromkeys(r[key] for r in rows)) for key in ("length", "task"))
    scores = {(r["task"], r["length"]): "–" if r["score"] is None else f"{r['score']:.2f}" for r in rows}
    lines = [["task", *map(str, lengths)], ["---"] * (1 + len(lengths))]
    lines += [[task, *(scores.get((task, n), "") for n in lengths)] for task in tasks]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="proving", help="Hub name or folder; the model in the package by default")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--variant", default="ruler_proving", choices=VARIANTS)
    parser.add_argument("--subtasks", nargs="+", choices=SUBTASKS, help="all of the variant by default")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048])
    parser.add_argument("--count", type=int, default=20, help="prompts for each task and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", help="folder with essays and question files, see kvbench/tasks/ruler.py")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--out", type=Path, help="results/proving/<variant>.json by default")
    args = parser.parse_args()
    out = args.out or ROOT / "results" / "proving" / f"{args.variant}.json"
    names = args.subtasks or [s for s in SUBTASKS if args.variant != "ruler_proving" or s.startswith("niah_")]
    model, tokenizer = load_model(args.model, args.model, args.dtype)
    rows = []
    for name in names:
        for length in args.lengths:
            task = Ruler(name, length, args.variant, count=args.count, seed=args.seed, path=args.path)
            rows.append(row(model, tokenizer, task, args.batch_size))
            print(rows[-1], flush=True)
    record = {
        "model": args.model,
        "dtype": args.dtype,
        "policy": "full",
        "variant": args.variant,
        "seed": args.seed,
        "haystack": "generated" if args.variant == "ruler_proving" else args.path and Path(args.path).name,
        "commit": commit() or None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
