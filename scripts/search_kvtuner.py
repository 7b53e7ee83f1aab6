"""Find the bits of every layer: KVTuner's search for one model, written as JSON.

    python scripts/search_kvtuner.py                     # the proving model, into kvbench/assets/kvtuner/proving.json
    python scripts/search_kvtuner.py --model Qwen/Qwen3-0.6B --text book.txt --bits 4 --out qwen.json
    kvbench quant=kvtuner quant.path=$PWD/qwen.json ...

The first half of each text is packed, then the second half is read over it. Three steps, after Li et al.,
https://arxiv.org/abs/2502.04420:

1. Each layer alone, with each of the nine (key bits, value bits): the relative error of its attention output, and how
   much the loss on the second half rises.
2. Per layer, pairs stay that no pair of as few bits beats in error. Of all assignments of these to layers, those whose
   rises of the loss have the smallest sums, with a mean of at most --bits over keys, values and layers, are candidates
   (a dynamic program finds them exactly).
3. Each candidate on all layers at once: the smallest loss wins.

The paper groups like layers and runs a genetic search on the accuracy of a benchmark instead of steps 2 and 3. A run
that was cut off goes on with --resume; the result is the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from calibration import ROOT, load, resumed, write_json
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbench import CompressedCache
from kvbench.corpus import document
from kvbench.policies import Full, KVTuner, Policy, Quantizer, Step
from kvbench.policies.store import Codec
from kvbench.tasks.sample import bos, encode

PAIRS = tuple(product((2, 4, 8), repeat=2))
Pair = tuple[int, int]


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Alone(Quantizer):
    """What `of` does, in layer `only`; all others stay in full precision."""

    of: KVTuner
    only: int

    def check(self, head_dim: int) -> None:
        self.of.check(head_dim)

    def codecs(self, step: Step | None = None) -> tuple[Codec | None, Codec | None]:
        return self.of.codecs() if step is None or step.order == self.only else (None, None)

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        return self.of.flush(tail)


def read(model: PreTrainedModel, record: CompressedCache, policy: Policy, ids: Tensor) -> tuple[float, list[Tensor]]:
    """(loss on ids [1, T] over the `record` as `policy` packs it, the attention output [1, Hq, T, D] of each layer)."""
    cache, outputs = record.fork(policy), []

    def kept(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def attend_and_keep(*args: Any, **kwargs: Any) -> Tensor:
            outputs.append(attend(*args, **kwargs))
            return outputs[-1]

        return attend_and_keep

    for layer in cache.policy_layers():
        layer.attend = kept(layer.attend)  # type: ignore[method-assign]
    logits = model(ids, past_key_values=cache, use_cache=True).logits
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item(), outputs


@torch.inference_mode()
def measure(
    model: PreTrainedModel, ids: Tensor, policies: Sequence[Policy], on_progress: Callable[[], Any]
) -> tuple[float, list[tuple[float, list[float]]]]:
    """Of one text ids [1, T]: the loss without compression; per policy, the loss and each layer's relative error."""
    half = ids.shape[1] // 2
    record = CompressedCache(model, Full())
    model(ids[:, :half], past_key_values=record, use_cache=True, logits_to_keep=1)
    full, exact = read(model, record, Full(), ids[:, half:])
    found = []
    for policy in policies:
        loss, outputs = read(model, record, policy, ids[:, half:])
        errors = [float((o - e).float().norm() / e.float().norm()) for o, e in zip(outputs, exact, strict=True)]
        found.append((loss, errors))
        on_progress()
    return full, found


# ---------------------------------------------------------------- choosing


def frontier(errors: dict[Pair, float]) -> list[Pair]:
    """Pairs that no other pair of as few bits, or fewer, beats in error; fewest bits first."""
    kept: list[Pair] = []
    for pair in sorted(errors, key=lambda pair: (sum(pair), errors[pair])):
        if not kept or errors[pair] < errors[kept[-1]]:
            kept.append(pair)
    return kept


def cheapest(costs: Sequence[dict[Pair, float]], most: float, count: int) -> list[tuple[Pair, ...]]:
    """The `count` assignments of a pair to each layer with the smallest sums of costs, at most `most` bits on average.

    costs: of the pairs each layer may take.
    """
    limit = int(2 * len(costs) * most + 1e-6)
    best: dict[int, list[tuple[float, tuple[Pair, ...]]]] = {0: [(0.0, ())]}  # bits so far -> cheapest ways to it
    for number, layer in enumerate(costs, 1):
        least = 4 * (len(costs) - number)
        grown: dict[int, list[tuple[float, tuple[Pair, ...]]]] = {}
        for (bits, ways), (pair, cost) in product(best.items(), layer.items()):
            if bits + sum(pair) + least <= limit:
                grown.setdefault(bits + sum(pair), []).extend((c + cost, (*taken, pair)) for c, taken in ways)
        best = {bits: sorted(ways)[:count] for bits, ways in grown.items()}
    return [taken for _, taken in sorted(way for ways in best.values() for way in ways)[:count]]


# ---------------------------------------------------------------- texts


def texts(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[list[int]]:
    """--documents texts of --length tokens each."""
    if args.text is None:
        count = args.length // 8  # a sentence is never shorter
        rows = [encode(tokenizer, document(args.seed + i, count, "kvtuner")) for i in range(args.documents)]
    else:
        ids = encode(tokenizer, Path(args.text).read_text(encoding="utf-8"))
        rows = [ids[i * len(ids) // args.documents :] for i in range(args.documents)]
    rows = [(bos(tokenizer) + row)[: args.length] for row in rows]
    if short := [len(row) for row in rows if len(row) < args.length]:
        raise ValueError(
            f"a text has {min(short)} tokens, fewer than --length {args.length}; "
            "use a longer --text or fewer --documents"
        )
    return rows


# ---------------------------------------------------------------- searching


def search(model: PreTrainedModel, rows: Sequence[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON to write. What was measured on a text is saved when it is done."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    state_file = args.out.with_suffix(".state")
    state = resumed(state_file, settings, args.resume, alone=[], joint=[])
    begin = time.time() - state["seconds"]
    shape = {"group_size": args.group_size, "residual": args.residual, "mode": args.mode}
    layers = [layer.index for layer in CompressedCache(model).policy_layers()]

    def run(stage: str, policies: Sequence[Policy], desc: str) -> None:
        done = state[stage]
        with tqdm(total=len(rows) * len(policies), initial=len(done) * len(policies), desc=desc) as bar:
            for row in rows[len(done) :]:
                done.append(measure(model, torch.tensor([row], device=model.device), policies, bar.update))
                state["seconds"] = time.time() - begin
                write_json(state_file, state)

    run("alone", [Alone(KVTuner(pairs=(p,), **shape), i) for i in range(len(layers)) for p in PAIRS], "each layer")
    full = mean(loss for loss, _ in state["alone"])
    rises: list[dict[Pair, float]] = []
    errors: list[dict[Pair, float]] = []
    for i in range(len(layers)):
        parts = {p: [found[i * len(PAIRS) + n] for _, found in state["alone"]] for n, p in enumerate(PAIRS)}
        rises.append({p: mean(loss for loss, _ in part) - full for p, part in parts.items()})
        errors.append({p: mean(each[i] for _, each in part) for p, part in parts.items()})
    allowed = [{p: rise[p] for p in frontier(error)} for rise, error in zip(rises, errors, strict=True)]
    candidates = cheapest(allowed, args.bits, args.candidates)
    run("joint", [KVTuner(pairs=pairs, **shape) for pairs in candidates], "candidates")
    losses = [mean(found[n][0] for _, found in state["joint"]) for n in range(len(candidates))]
    chosen = min(range(len(candidates)), key=losses.__getitem__)
    note = settings | {
        "layers": layers,
        "mean_bits": mean(b for pair in candidates[chosen] for b in pair),
        "loss_full": round(full, 6),
        "loss": round(losses[chosen], 6),
        "errors": [{f"K{k}V{v}": round(e, 6) for (k, v), e in layer.items()} for layer in errors],
        "rises": [{f"K{k}V{v}": round(e, 6) for (k, v), e in layer.items()} for layer in rises],
        "seconds": round(time.time() - begin, 1),
    }
    table = {str(i): {"nbits_key": k, "nbits_value": v} for i, (k, v) in enumerate(candidates[chosen])}
    return table | {"search": note}


def mean(numbers: Any) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


SETTINGS = (
    "model", "text", "documents", "length", "bits", "mode", "group_size", "residual", "candidates", "seed", "dtype",
)  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="proving", help="a Hub name, a folder, or proving")
    parser.add_argument("--text", help="a text to measure on (UTF-8); not for proving, which has its own")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--bits", type=float, default=3.0, help="mean over keys, values and layers, 2 to 8, at most")
    parser.add_argument("--documents", type=int, default=8, help="texts to measure on")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each text")
    parser.add_argument("--mode", choices=("kivi", "token"), default="kivi")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--residual", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=16, help="assignments measured on all layers at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="[float32 on a CPU, else bfloat16]")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state beside --out")
    args = parser.parse_args(argv)
    ours = args.model == "proving"
    if ours and args.text is not None:
        parser.error("--text: the proving model reads generated text only")
    if not ours and (args.text is None or args.out is None):
        parser.error("--text and --out are needed for models other than proving")
    if not 2 <= args.bits <= 8:
        parser.error(f"--bits must be from 2 to 8, got {args.bits:g}")
    args.out = args.out or ROOT / "kvbench" / "assets" / "kvtuner" / "proving.json"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    tokenizer, model = load(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = search(model, texts(tokenizer, args), args)
    write_json(args.out, found)
    args.out.with_suffix(".state").unlink(missing_ok=True)
    for layer, number in enumerate(found["search"]["layers"]):
        print(f"layer {number:3d}  K{found[str(layer)]['nbits_key']} V{found[str(layer)]['nbits_value']}")
    print(f"loss {found['search']['loss']:.4f}, without compression {found['search']['loss_full']:.4f}")


if __name__ == "__main__":
    main()
