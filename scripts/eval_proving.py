"""Measure the proving model without compression and record it in `results/proving/metrics.json`.

    python scripts/eval_proving.py

Recall is exact match of the whole value under greedy decoding; it is read from one teacher-forced pass, which decides
the same question: a value is decoded exactly if and only if each of its tokens is the most likely one after the
tokens before it. Perplexity is per token of held-out documents, beside a unigram model of training documents.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvbench.corpus import document
from kvbench.tasks import Niah, Recall, Sample
from kvbench.tasks.sample import encode

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (512, 1024, 2048)
DEPTHS = (0, 25, 50, 75, 100)


@torch.no_grad()
def exact(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], batch: int = 4
) -> list[bool]:
    """Per sample: would greedy decoding give the whole reference value?"""
    right = []
    for at in tqdm(range(0, len(samples), batch), leave=False, desc=samples[0].task):
        chunk = samples[at : at + batch]
        answers = [encode(tokenizer, " " + s.references[0]) for s in chunk]
        rows = [sum(s.segments(tokenizer), []) + answer for s, answer in zip(chunk, answers, strict=True)]
        ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)  # pads stand to the right, where no earlier token sees them
        states = model.model(ids, use_cache=False).last_hidden_state
        for state, row, answer in zip(states, rows, answers, strict=True):
            guess = model.lm_head(state[len(row) - len(answer) - 1 : len(row) - 1]).argmax(-1)
            right.append(guess.tolist() == answer)
    return right


@torch.no_grad()
def nll(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Nats per predicted token of [batch, length] ids: [batch, length - 1]."""
    logits = model(ids, use_cache=False).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def perplexities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, documents: int = 32, length: int = 1024
) -> dict[str, float]:
    rows = [
        [tokenizer.bos_token_id, *encode(tokenizer, document(seed + i, length // 8, "held-out"))][:length]
        for i in range(documents)
    ]
    counts = Counter(t for i in range(300) for t in encode(tokenizer, document(seed + i, 200, "unigram")))
    total = sum(counts.values()) + len(tokenizer)
    unigram = [-math.log((counts[t] + 1) / total) for row in rows for t in row[1:]]
    each = torch.cat([nll(model, torch.tensor([row])) for row in rows])
    return {
        "model": round(each.mean().exp().item(), 3),
        "model_first_256": round(each[:, :256].mean().exp().item(), 3),
        "model_last_256": round(each[:, -256:].mean().exp().item(), 3),
        "unigram": round(math.exp(sum(unigram) / len(unigram)), 3),
        "documents": documents,
        "tokens_each": length,
    }


def evaluate(folder: Path, out: Path, seed: int = 0, count: int = 200) -> dict:
    """Measure the model in `folder` and write the metrics to `out`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.eval()
    begin, recall = time.time(), {}
    for length in LENGTHS:
        niah = Niah(lengths=(length,), depths=DEPTHS, repeats=count // len(DEPTHS), seed=seed).samples(tokenizer)
        hits = exact(model, tokenizer, niah)
        recall[f"single_{length}"] = {"exact": sum(hits) / len(hits), "n": len(hits)}
        for depth in DEPTHS:
            cell = [hit for hit, s in zip(hits, niah, strict=True) if s.meta["depth"] == depth]
            recall[f"single_{length}"][f"depth_{depth}"] = sum(cell) / len(cell)
        keyed = Recall(length=length, needles=8, count=count, seed=seed).samples(tokenizer)
        hits = exact(model, tokenizer, keyed)
        hard = [hit for hit, s in zip(hits, keyed, strict=True) if s.meta["hard"]]
        recall[f"keys8_{length}"] = {"exact": sum(hits) / len(hits), "n": len(hits)}
        recall[f"keys8_{length}"] |= {"exact_hard": sum(hard) / max(1, len(hard)), "n_hard": len(hard)}
        print({name: row["exact"] for name, row in recall.items()}, flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    training = json.loads((folder / "training.json").read_text())
    metrics = {
        "recall": recall,
        "perplexity": perplexities(model, tokenizer, seed),
        "seed": seed,
        "steps": training["steps"],
        "train_seconds": training["train_seconds"],
        "trained_length": training["trained_length"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": (folder / "model.safetensors").stat().st_size,
        "eval_seconds": round(time.time() - begin),
        "commit": commit or None,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "kvbench" / "assets" / "proving")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "proving" / "metrics.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200, help="prompts per length and task")
    args = parser.parse_args()
    print(json.dumps(evaluate(args.folder, args.out, args.seed, args.count), indent=1))


if __name__ == "__main__":
    main()
