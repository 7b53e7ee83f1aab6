"""Measure LookaheadKV against SnapKV and LAQ and record it in `results/lookahead/metrics.json`.

    python scripts/eval_lookahead.py

On held-out prompts, per budget of C tokens: which share of the C tokens that the model's real answer attends to the
most is kept (recall), and which share of that attention goes to what is kept (mass); averages over layers, heads and
prompts. Then task scores on key-value recall, with the question in sight and without.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from train_lookahead import KINDS, PROVING, ROOT, answers, own_prompts, padded, prefilled
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from kvbench.engine import run_stacks
from kvbench.policies import LAQ, Full, LookaheadKV, Policy, SnapKV
from kvbench.probes import known_probe
from kvbench.tasks import Recall

BUDGETS = (64, 128, 256)


def stacks(budget: int, modules: str) -> dict[str, Policy]:
    return {"LookaheadKV": LookaheadKV(budget, modules=modules), "SnapKV": SnapKV(budget), "LAQ": LAQ(budget)}


@torch.no_grad()
def agreement(model: PreTrainedModel, batch: Sequence[dict], modules: str) -> dict[tuple[str, int], Tensor]:
    """(policy, budget) -> [2]: recall and mass, averaged over layers, heads and the prompts of the batch."""
    record = prefilled(model, [r["prompt"] for r in batch])
    ids, real = padded([r["response"] for r in batch], "right", model.device)
    layers, found = record.policy_layers(), {}
    wanted = []  # per layer [B, H, S]: what the real answer looks at
    for layer, probe in zip(layers, known_probe(record, ids, real.bool()), strict=True):
        read = layer.step(False, probe).probe_attention(layer.kv).sum(2)
        wanted.append(read.unflatten(1, (layer.kv.counts.shape[1], -1)).mean(2))
    for budget in BUDGETS:
        for name, policy in stacks(budget, modules).items():
            fork, parts = record.fork(policy), []
            for layer, read in zip(layers, wanted, strict=True):
                kept = torch.zeros(*read.shape[:2], read.shape[2] + 1)
                position = fork.kept(layer.index)
                kept = kept.scatter(2, position.masked_fill(position < 0, read.shape[2]), 1)[..., :-1]
                best = torch.zeros_like(read).scatter(2, read.topk(min(budget, read.shape[2])).indices, 1)
                parts.append(torch.stack([(kept * best).sum() / best.sum(), (kept * read).sum() / read.sum()]))
            found[name, budget] = torch.stack(parts).mean(0)
    return found


def evaluate(folder: str, modules: str, out: Path, seed: int, count: int, length: int) -> dict:
    dtype = "float32" if Path(folder).resolve() == PROVING else "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer, begin = AutoTokenizer.from_pretrained(folder), time.time()
    records = list(own_prompts(tokenizer, count, seed, [length]))
    with tempfile.TemporaryDirectory() as work:
        samples = answers(model, tokenizer, records, Path(work) / "answers.jsonl", 8)
    names = stacks(BUDGETS[0], modules)
    attention: dict = {}
    for kind in KINDS:
        same = [s for s in samples if s["kind"] == kind]
        parts = [agreement(model, same[i : i + 4], modules) for i in tqdm(range(0, len(same), 4), kind)]
        attention[kind] = {
            name: {
                str(budget): dict(
                    zip(("recall", "mass"), torch.stack([p[name, budget] for p in parts]).mean(0).tolist(), strict=True)
                )
                for budget in BUDGETS
            }
            for name in names
        }
    task = Recall(length=length, needles=8, count=count, seed=seed)
    every = {("Full", 0): Full()} | {(name, c): p for c in BUDGETS for name, p in stacks(c, modules).items()}
    scores: dict = {}
    for query_aware in (True, False):
        with tqdm(desc="recall, query " + ("seen" if query_aware else "unseen")) as bar:
            runs = run_stacks(
                model, tokenizer, task, list(every.values()), query_aware=query_aware, on_progress=bar.update
            )
        for (name, budget), run in zip(every, runs, strict=True):
            row = scores.setdefault("query seen" if query_aware else "query unseen", {}).setdefault(name, {})
            row[str(budget)] = sum(r["score"] for r in run.rows) / len(run.rows)
    metrics = {
        "attention": attention,
        "recall_task": scores,
        "model": Path(folder).name,
        "modules": Path(modules).name,
        "length": length,
        "count": count,
        "seed": seed,
        "eval_seconds": round(time.time() - begin),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PROVING))
    parser.add_argument("--modules", default="proving", help="trained folder, or the name of a shipped one")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "lookahead" / "metrics.json")
    parser.add_argument("--seed", type=int, default=1, help="another one than in training")
    parser.add_argument("--count", type=int, default=96, help="prompts in all, and prompts of the task")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt")
    args = parser.parse_args()
    print(json.dumps(evaluate(args.model, args.modules, args.out, args.seed, args.count, args.length), indent=1))


if __name__ == "__main__":
    main()
