"""Calibrate MILLION for a model: codebooks of its keys and values by k-means, `<out>/<subspaces>x<bits>.safetensors`.

    python scripts/calibrate_million.py --vectors 16384            # the proving model, as shipped; --subspaces 16, too
    python scripts/calibrate_million.py --vectors 16384 --resume   # from what is done, in --work
    python scripts/calibrate_million.py --model Qwen/Qwen3-0.6B --text wiki.txt --subspaces 64 --out qwen
    kvbench quant=million quant.subspaces=64 quant.path=$PWD/qwen ...

The model reads sample after sample, of which random rows (one head's keys or values at one token) are noted in every
layer. Each subspace of each side of each layer then gets its centroids by Lloyd's iteration from random rows. That is
the recipe of Wang et al., https://arxiv.org/abs/2504.03661, with their 256 rows per centroid and 25 iterations.

A run that was cut off goes on with --resume; the result is the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from calibration import begin, clear, folders, load, options, samples, store, write
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbench import CompressedCache
from kvbench.policies.million import BITS, SHIPPED

SIDES = ("keys", "values")
BLOCK_ELEMENTS = 2**22
"""Most distances held at a time."""


# ---------------------------------------------------------------- what the model reads


@torch.no_grad()
def note(model: PreTrainedModel, ids: Sequence[int], count: int, seed: int) -> dict[str, Tensor]:
    """Up to `count` random rows of the keys and of the values of every layer that policies compress, [n, D] each."""
    cache = CompressedCache(model)
    model(torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    found, generator = {}, torch.Generator().manual_seed(seed)
    for order, layer in enumerate(cache.policy_layers()):
        for side, held in zip(SIDES, (layer.kv.keys, layer.kv.values), strict=True):
            rows = held.dense().flatten(0, 2)
            chosen = torch.randperm(len(rows), generator=generator)[:count]
            found[f"{order}.{side}"] = rows[chosen.to(rows.device)].cpu().contiguous()
    return found


def collect(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> None:
    """Notes every sample into a file of --work that is not there yet."""
    begin(args, NOTED)
    for i, row in enumerate(tqdm(samples(tokenizer, args, "million"), "samples", mininterval=5)):
        target = args.work / f"sample_{i:04d}.safetensors"
        if not target.exists():
            store(target, note(model, row, -(-args.vectors // args.samples), i))


# ---------------------------------------------------------------- what is made of it


def assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, d] -> the number of the nearest of centroids [C, d], and its squared distance, both [N]."""
    size, found = centroids.square().sum(1), []
    for block in x.split(max(1, BLOCK_ELEMENTS // len(centroids))):
        distance, code = torch.addmm(size, block, centroids.T, alpha=-2).min(1)
        found.append((code, (distance + block.square().sum(1)).clamp(min=0)))
    codes, distances = zip(*found, strict=True)
    return torch.cat(codes), torch.cat(distances)


def kmeans(x: Tensor, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's iteration on x [N, d] from random rows: [count, d]. A centroid without rows moves to the worst one."""
    centroids = x[torch.randperm(len(x), generator=generator)[:count]]
    for _ in range(iterations):
        code, distance = assign(x, centroids)
        size = code.bincount(minlength=count)
        moved = torch.zeros_like(centroids).index_add_(0, code, x) / size.clamp(min=1)[:, None]
        empty = (size == 0).nonzero()[:, 0]
        moved[empty] = x[distance.argsort(descending=True, stable=True)[: len(empty)]]
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def fit(args: argparse.Namespace, order: int) -> dict[str, Tensor]:
    """Of one layer: the codebooks fp16 [M, 2**bits, d] of keys and values, and the share of energy that each loses."""
    found: dict[str, Tensor] = {}
    for side in SIDES:
        rows = []
        for file in sorted(args.work.glob("sample_*.safetensors")):
            with safe_open(file, "pt") as noted:
                rows.append(noted.get_tensor(f"{order}.{side}").float())
        x = torch.cat(rows)[: args.vectors]
        if x.shape[1] % args.subspaces:
            raise ValueError(f"--subspaces {args.subspaces} does not divide the {x.shape[1]} channels of a head")
        if len(x) < 2**args.bits:
            raise ValueError(f"{len(x)} rows are too few for {2**args.bits} centroids; use more --samples or --tokens")
        generator, books, lost = torch.Generator().manual_seed(args.seed), [], 0.0
        for part in x.unflatten(1, (args.subspaces, -1)).unbind(1):
            book = kmeans(part.contiguous(), 2**args.bits, args.iterations, generator).half()
            books.append(book)
            lost += float(assign(part, book.float())[1].sum())
        found |= {side: torch.stack(books), f"{side}.lost": torch.tensor(lost / float(x.square().sum()))}
    return found


# ---------------------------------------------------------------- the run

NOTED = ("model", "text", "subspaces", "bits", "samples", "tokens", "vectors", "iterations", "seed", "dtype")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "million")
    parser.add_argument("--subspaces", type=int, default=32)
    parser.add_argument("--bits", type=int, choices=BITS, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=1024, help="of each sample")
    parser.add_argument("--vectors", type=int, help="rows that k-means sees, at most [256 per centroid]")
    parser.add_argument("--iterations", type=int, default=25)
    args = parser.parse_args(argv)
    args.vectors = 256 * 2**args.bits if args.vectors is None else args.vectors
    if min(args.samples, args.tokens, args.vectors, args.iterations) < 1 or args.subspaces < 2 or args.subspaces % 2:
        parser.error("--samples, --tokens, --vectors and --iterations must be at least 1, --subspaces even")
    folders(args, "million", SHIPPED)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args, began = parse(argv), time.time()
    tokenizer, model = load(args)
    collect(model, tokenizer, args)
    layers = []
    for order in tqdm(range(len(CompressedCache(model).policy_layers())), "layers", mininterval=5):
        target = args.work / f"layer_{order:04d}.safetensors"
        if not target.exists():
            store(target, fit(args, order))
        layers.append(load_file(target))
    tensors = {side: torch.stack([layer[side] for layer in layers]) for side in SIDES}
    lost = {side: [round(float(layer[f"{side}.lost"]), 6) for layer in layers] for side in SIDES}
    about = {"layers": len(layers), "head_dim": args.subspaces * tensors["keys"].shape[3], "lost": lost}
    file = args.out / f"{args.subspaces}x{args.bits}"
    size = write(file, tensors, about, args, NOTED[2:], began)
    clear(args.work)
    print(f"{file}: {size:,} bytes")
    for side, shares in lost.items():
        print(f"energy lost, {side}, layer by layer: " + "  ".join(f"{x:.4f}" for x in shares))


if __name__ == "__main__":
    main()
