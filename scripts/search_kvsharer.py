"""Find layers that can share keys and values: KVSharer's search for one model, written as JSON.

    python scripts/search_kvsharer.py --threshold 0.95     # the proving model, as shipped
    python scripts/search_kvsharer.py --model Qwen/Qwen3-0.6B --text book.txt --layers 7 --out qwen.json
    python scripts/search_kvsharer.py --model Qwen/Qwen3-0.6B --text book.txt --layers 7 --out qwen.json --resume
    kvbench quant=kvsharer quant.path=$PWD/qwen.json quant.layers=null ...

Two steps, after Yang et al., https://arxiv.org/abs/2410.18517, and the notebook of their code:

1. Keys and values as cached, each averaged over the samples. The distance of two layers is the Euclidean distance of
   their vectors, averaged over heads and tokens, and then over keys and values. Pairs are tried from the most unlike.
2. A pair is taken if the later layer does not share yet and the model that shares it, too, still gives last hidden
   states like the full model's: a cosine similarity, mean over samples, above --threshold. It ends when --layers
   layers share, or no pair is left. With few layers, each weighs more: the official threshold of 0.5 lets layer 1 of
   the proving model read layer 0 (0.88), after which it recalls nothing.

A run that was cut off goes on with --resume; the result is the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from calibration import ROOT, load, resumed, samples, write_json
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvbench import CompressedCache
from kvbench.policies import Full, KVSharer, Policy

ROWS = 8
"""Samples the model reads at a time."""
SETTINGS = ("model", "text", "samples", "tokens", "threshold", "layers", "seed", "dtype")


@torch.inference_mode()
def mean_held(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per layer that policies compress: keys and values [H, T, D] float32, mean over the samples ids [N, T]."""
    total: list[list[Tensor]] = []
    for part in tqdm(ids.split(ROWS), "keys and values", mininterval=5):
        cache = CompressedCache(model)
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        for order, layer in enumerate(cache.policy_layers()):
            sides = [x.float().sum(0).cpu() for x in layer.kv.decode()]
            total[order : order + 1] = [
                [a + b for a, b in zip(total[order], sides, strict=True)] if order < len(total) else sides
            ]
    return [(keys / len(ids), values / len(ids)) for keys, values in total]


def distances(held: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[float, int, int]]:
    """(distance, later layer, earlier layer), the most unlike first; only of layers alike in heads and head_dim."""
    found = []
    for i, j in combinations(reversed(range(len(held))), 2):
        sides = list(zip(held[i], held[j], strict=True))
        if all(a.shape == b.shape for a, b in sides):
            found.append((sum(float((a - b).norm(dim=-1).mean()) for a, b in sides) / 2, i, j))
    return sorted(found, key=lambda pair: (-pair[0], pair[1:]))


@torch.inference_mode()
def last_hidden(model: PreTrainedModel, policy: Policy, ids: Tensor) -> Tensor:
    """What the model, its cache held by `policy`, gives to its output layer: [N, T * hidden] float32."""
    found = []
    for part in ids.split(ROWS):
        out = model(
            part, past_key_values=CompressedCache(model, policy), use_cache=True, output_hidden_states=True,
            logits_to_keep=1,
        )  # fmt: skip
        found.append(out.hidden_states[-1].float().flatten(1).cpu())
    return torch.cat(found)


def search(model: PreTrainedModel, rows: Sequence[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """The JSON to write. What has been tried is saved after every pair."""
    settings = {name: getattr(args, name) for name in SETTINGS} | {
        "model": Path(args.model).name if Path(args.model).exists() else args.model,
        "text": [path.name for path in args.text] if args.text else "kvbench.corpus",
    }
    state_file = args.out.with_suffix(".state")
    state = resumed(state_file, settings, args.resume, ranked=None, tried=[])
    begin, ids = time.time() - state["seconds"], torch.tensor(rows, device=model.device)
    layers = [layer.index for layer in CompressedCache(model).policy_layers()]
    if len(layers) < 2:
        raise ValueError(f"{args.model} has {len(layers)} full-attention layer; sharing takes at least two")
    wanted = args.layers or max(1, len(layers) // 4)

    def save() -> None:
        state["seconds"] = time.time() - begin
        write_json(state_file, state)

    if state["ranked"] is None:
        state["ranked"] = distances(mean_held(model, ids))
        save()
    full, tried = last_hidden(model, Full(), ids), state["tried"]
    taken = [tuple(each["pair"]) for each in tried if each["taken"]]
    with tqdm(state["ranked"], "pairs", initial=len(tried), mininterval=5) as bar:
        for distance, layer, source in state["ranked"][len(tried) :]:
            if len(taken) >= wanted:
                break
            similarity = None
            if layer not in dict(taken):
                shared = last_hidden(model, KVSharer(pairs=(*taken, (layer, source))), ids)
                similarity = float(torch.cosine_similarity(full, shared).mean())
                if similarity > args.threshold:
                    taken.append((layer, source))
            tried.append(
                {
                    "pair": [layer, source],
                    "distance": distance,
                    "similarity": similarity,
                    "taken": taken[-1:] == [(layer, source)],
                }
            )
            bar.update()
            save()
    if not taken:
        raise ValueError(f"no pair of layers keeps a similarity above --threshold {args.threshold:g}; use a lower one")
    note = settings | {
        "model_layers": layers,
        "tried": [{k: round(v, 6) if isinstance(v, float) else v for k, v in each.items()} for each in tried],
        "seconds": round(time.time() - begin, 1),
    }
    return {"layers": len(layers), "pairs": [list(pair) for pair in taken], "search": note}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="proving", help="a Hub name, a folder, or proving")
    parser.add_argument("--text", type=Path, nargs="+", help="texts (UTF-8); default: generated by kvbench.corpus")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--layers", type=int, help="layers that are to share [a quarter of those compressed]")
    parser.add_argument("--threshold", type=float, default=0.5, help="least similarity of the last hidden states")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64, help="of each sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="[float32 on a CPU, else bfloat16]")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state beside --out")
    args = parser.parse_args(argv)
    if args.model != "proving" and args.out is None:
        parser.error("--out is needed for models other than proving")
    if min(args.samples, args.tokens, 1 if args.layers is None else args.layers) < 1:
        parser.error("--samples, --tokens and --layers must be at least 1")
    args.out = args.out or ROOT / "kvbench" / "assets" / "kvsharer" / "proving.json"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    tokenizer, model = load(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    found = search(model, samples(tokenizer, args, "kvsharer"), args)
    write_json(args.out, found)
    args.out.with_suffix(".state").unlink(missing_ok=True)
    for each in found["search"]["tried"]:
        layer, read = each["pair"]
        like = "shares already" if each["similarity"] is None else f"similarity {each['similarity']:.4f}"
        print(f"layer {layer} reads {read}  distance {each['distance']:.3f}  {like}" + "  taken" * each["taken"])


if __name__ == "__main__":
    main()
