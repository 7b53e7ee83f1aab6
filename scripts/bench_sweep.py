"""How much a sweep saves by prefilling once: N stacks together against the same stacks one by one, in one process.

    python scripts/bench_sweep.py                     # 1k and 8k tokens, 24 stacks; minutes on two CPU cores
    python scripts/bench_sweep.py --lengths 1024 --samples 4

The model has random weights (only speed is measured): a Llama of --layers layers, hidden size --hidden, grouped-query
heads of 64. A single run is one stack by itself on the same batch of prompts: prefill, compression, decoding of the
answer. Reported per length: seconds of the sweep, of a single run (mean, least, most over the ones timed), and the cost
of the sweep in single runs. Rows carry machine, versions and commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import kvbench
from kvbench.engine import run_stacks
from kvbench.identity import commit
from kvbench.policies import H2O, KIVI, NVFP4, Full, KeyDiff, Policy, Random, SnapKV, Stack, StreamingLLM
from kvbench.tasks import Recall


def stacks() -> list[Policy]:
    """Six evictors × four quantizers: 24 stacks."""
    evictors = [Full(), Random(0.25), StreamingLLM(0.25), H2O(0.25), KeyDiff(0.25), SnapKV(0.25)]
    quantizers = [Full(), KIVI(4, residual=32), KIVI(2, residual=32), NVFP4()]
    return [Stack(tuple(p for p in (e, q) if not isinstance(p, Full))) for e in evictors for q in quantizers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 1], help="batch of prompts, per length")
    parser.add_argument("--singles", type=int, default=4, help="stacks timed one by one, spread over the 24")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/bench_sweep/rows.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    assets = Path(kvbench.__file__).parent / "assets" / "proving"
    tokenizer = AutoTokenizer.from_pretrained(assets)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=options.hidden // 64,
        num_key_value_heads=max(1, options.hidden // 256), head_dim=64, max_position_embeddings=32768,
        eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(getattr(torch, options.dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    for length, samples in zip(options.lengths, options.samples, strict=True):
        row = measure(model, tokenizer, length, samples, options.singles)
        row |= {
            "layers": options.layers, "hidden": options.hidden, "dtype": options.dtype,
            "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
            "threads": options.threads, "torch": torch.__version__, "transformers": version("transformers"),
            "kvbench": version("kvbench"), "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        print(json.dumps(row))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def measure(model: LlamaForCausalLM, tokenizer: object, length: int, samples: int, singles: int) -> dict[str, object]:
    task = Recall(length=length, needles=8, count=samples)
    chosen = stacks()
    timed = chosen[:: max(1, len(chosen) // singles)]

    def seconds(group: list[Policy]) -> float:
        start = time.perf_counter()
        run_stacks(model, tokenizer, task, group, query_aware=True, batch_size=samples)
        return time.perf_counter() - start

    seconds([Full()])  # warm-up
    # Interleaved, so that a machine that slows down slows both alike.
    single = [seconds([stack]) for stack in timed[: len(timed) // 2]]
    sweep = seconds(chosen)
    single += [seconds([stack]) for stack in timed[len(timed) // 2 :]]
    return {
        "prompt_tokens": length, "samples": samples, "stacks": len(chosen), "sweep_s": round(sweep, 3),
        "single_s": round(statistics.mean(single), 3), "single_s_min": round(min(single), 3),
        "single_s_max": round(max(single), 3), "sweep_in_single_runs": round(sweep / statistics.mean(single), 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()
