"""Calibrate KVQuant for a model: ranges of its keys, signposts and Q-Norm, `kvbench/assets/kvquant/<name>/`.

    python scripts/calibrate_kvquant.py                                             # the proving model
    python scripts/calibrate_kvquant.py --resume                                    # from the samples done, in --work
    python scripts/calibrate_kvquant.py --model Qwen/Qwen3-0.6B --text wiki.txt --out qwen
    python scripts/calibrate_kvquant.py --model Qwen/Qwen3-0.6B --text hub:roneneldan/TinyStories
    kvbench quant=kvquant3 quant.path=$PWD/qwen ...

The model reads sample after sample; the keys before RoPE and the values of every layer are noted with the gradient that
the language-modelling loss has at them. The squares of these (Fisher information) weigh the elements in the k-means
that finds the signposts; a key's range is a pair of percentiles of its channel. The recipe is that of Hooper et al.,
https://arxiv.org/abs/2401.18079, whose settings are the defaults for models other than ours.

A run that was cut off goes on with --resume; the result is the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from calibration import begin, clear, folders, load, options, samples, store, write
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.masking_utils import sdpa_mask

from kvbench import CompressedCache
from kvbench.cache import NAME as HOST
from kvbench.kernels.rotation import rotate
from kvbench.policies.kvquant import BITS, SHIPPED, nearest, normalized, slots_per_side, token_ranges

NAME = "kvbench_noted"
ITERATIONS = 50


# ---------------------------------------------------------------- what the model reads


class Notes:
    """Registers an attention function that notes the keys (as cached, after RoPE) and values [1, H, T, D] it is given.

    layers: those that policies compress, in order; frequency: of their RoPE.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        cache = CompressedCache(model, needs={"rope": 1})
        self.layers = [layer.index for layer in cache.policy_layers()]
        self.frequency = [cache.frequency(i) for i in self.layers]
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._attend = AttentionInterface()[HOST]
        AttentionInterface.register(NAME, self._note)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
        model.requires_grad_(False)
        model.enable_input_require_grads()  # gradients of activations, not of weights

    def _note(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module.layer_idx in self.layers:
            self.seen[module.layer_idx] = (key, value)
        return self._attend(module, query, key, value, *args, **kwargs)

    def of(self, model: PreTrainedModel, ids: Sequence[int]) -> dict[str, Tensor]:
        """One forward and backward: "i.k.x" keys before RoPE and "i.k.g" gradients there, v alike, each [T, H, D]."""
        row = torch.tensor([ids], device=model.device)
        loss = model(input_ids=row, labels=row, use_cache=False).loss
        sides = [
            (f"{i}.{side}", x) for i, n in enumerate(self.layers) for side, x in zip("kv", self.seen[n], strict=True)
        ]
        grads = torch.autograd.grad(loss, [x for _, x in sides])
        self.seen.clear()
        back, found = -torch.arange(len(ids), device=model.device)[None, None], {}
        for (name, x), grad in zip(sides, grads, strict=True):
            for kind, tensor in (("x", x.detach()), ("g", grad)):
                if name.endswith("k"):  # turning is orthogonal: gradients turn with the keys
                    order = int(name.split(".")[0])
                    tensor = rotate(tensor.float(), back, self.frequency[order]).to(tensor.dtype)
                found[f"{name}.{kind}"] = tensor[0].transpose(0, 1).contiguous().cpu()
        return found


def collect(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> tuple[int, int, int]:
    """Notes every sample into a file of --work that is not there yet; returns (layers, heads, head_dim)."""
    rows, notes = samples(tokenizer, args, "kvquant"), Notes(model)
    begin(args)
    for i, row in enumerate(tqdm(rows, "samples", mininterval=5)):
        target = sample_file(args.work, i)
        if not target.exists():
            store(target, notes.of(model, row))
    with safe_open(sample_file(args.work, 0), "pt") as noted:
        _, heads, head_dim = noted.get_slice("0.k.x").get_shape()
    return len(notes.layers), heads, head_dim


def sample_file(work: Path, number: int) -> Path:
    return work / f"sample_{number:04d}.safetensors"


def noted(args: argparse.Namespace, name: str) -> Tensor:
    """One tensor of all samples, float32 [samples, T, H, D]."""
    found = []
    for i in range(args.samples):
        with safe_open(sample_file(args.work, i), "pt") as file:
            found.append(file.get_tensor(name).float())
    return torch.stack(found)


# ---------------------------------------------------------------- what is made of it


def percentiles(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """x [N, D] -> (lower, upper) [D]: the `share` and 1 - `share` quantiles, between neighbours by interpolation."""
    ordered, place = x.sort(dim=0).values, share * (len(x) - 1)
    below, weight = int(place), place - int(place)
    above = min(below + 1, len(x) - 1)
    lower = torch.lerp(ordered[below], ordered[above], weight)
    return lower, torch.lerp(ordered[-1 - below], ordered[-1 - above], weight)


def kmeans(points: Tensor, weights: Tensor, count: int) -> Tensor:
    """Weighted k-means of numbers [N] in [-1, 1]: `count` ascending centres, float32.

    Lloyd's iteration from two starts, an even grid and quantiles of the weight; the better end counts. Sorted once,
    clusters are runs, whose sums are differences of running sums. A centre without weight stays where it is.
    """
    order = points.argsort()
    x, w = points[order].double(), weights[order].double()
    zero = x.new_zeros(1)
    mass, moment = torch.cat([zero, w.cumsum(0)]), torch.cat([zero, (w * x).cumsum(0)])
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    by_weight = x[torch.searchsorted(mass[1:], middles * mass[-1]).clamp(max=len(x) - 1)]
    ends = []
    for centres in (2 * middles - 1, by_weight):
        for _ in range(ITERATIONS):
            cuts = torch.searchsorted(x, (centres[1:] + centres[:-1]) / 2, right=True)
            edges = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(x))])
            first, last = x[edges[:-1].clamp(max=len(x) - 1)], x[(edges[1:] - 1).clamp(min=0)]
            size, total = mass[edges].diff(), moment[edges].diff()
            mean = (total / size).clamp(first, last)  # running sums of very unequal weights lose digits
            moved = torch.where((size > 0) & (edges.diff() > 0), mean, centres)
            if torch.equal(moved, centres):
                break
            centres = moved
        cost = float((w * (x - centres[nearest(x, centres).int()]).square()).sum())
        ends.append((cost, centres))
    return min(ends, key=lambda end: end[0])[1].float()


def qnorm(points: Tensor, signposts: Tensor) -> Tensor:
    """[scale, offset] that give the rounded points the mean and the standard deviation of the points."""
    rounded, points = signposts.double()[nearest(points, signposts).int()], points.double()
    spread = rounded.std(correction=0)
    scale = points.std(correction=0) / spread if spread > 0 else spread.new_ones(())
    return torch.stack([scale, points.mean() - rounded.mean() * scale]).float()


def fit(args: argparse.Namespace, order: int, side: str) -> dict[str, Tensor]:
    """The tensors of the artifact for the keys or the values of one layer."""
    name, found = f"layers.{order}.{side}", {}
    x, fisher = noted(args, f"{order}.{side}.x"), noted(args, f"{order}.{side}.g").square_()
    if side == "k":
        bounds = [percentiles(x[:, :, h].flatten(0, 1), args.outliers / 2) for h in range(x.shape[2])]
        lower, upper = (torch.stack(bound).half() for bound in zip(*bounds, strict=True))  # [H, D]
        found = {f"{name}.lower": lower, f"{name}.upper": upper}
        scaled = normalized(x, (upper.float() + lower.float()) / 2, (upper.float() - lower.float()) / 2)
    else:
        rows = x.flatten(0, 2)
        scaled = normalized(rows, *token_ranges(rows, slots_per_side(x.shape[3], args.outliers))).view_as(x)
    inside = scaled.abs() <= 1
    inside[:, : args.sinks] = False
    points, weights = scaled[inside], fisher[inside]
    if len(points) > args.points:
        drawn = torch.randint(len(points), (args.points,), generator=torch.Generator().manual_seed(args.seed))
        points, weights = points[drawn], weights[drawn]
    for bits in BITS:
        found[f"{name}.codebook.{bits}"] = signposts = kmeans(points, weights, 2**bits)
        found[f"{name}.qnorm.{bits}"] = qnorm(points, signposts)
    return found


# ---------------------------------------------------------------- the run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "kvquant")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, help="of each sample [2048; proving: 1024]")
    parser.add_argument("--outliers", type=float, default=0.01, help="share of elements left out of the ranges")
    parser.add_argument("--sinks", type=int, default=1, help="first tokens of each sample that signposts do not serve")
    parser.add_argument("--points", type=int, default=1_000_000, help="elements that k-means sees, at most")
    args = parser.parse_args(argv)
    if not 0 <= args.outliers < 0.5:
        parser.error(f"--outliers must be a share in [0, 0.5), got {args.outliers}")
    if args.tokens is None:
        args.tokens = 1024 if args.model == "proving" else 2048
    if not 0 <= args.sinks < args.tokens - 1 or args.samples < 1 or args.points < 1:
        parser.error("--samples and --points must be at least 1, --tokens more than --sinks")
    folders(args, "kvquant", SHIPPED)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args, began = parse(argv), time.time()
    tokenizer, model = load(args)
    layers, heads, head_dim = collect(model, tokenizer, args)
    tensors: dict[str, Tensor] = {}
    for order in tqdm(range(layers), "layers", mininterval=5):
        tensors |= fit(args, order, "k") | fit(args, order, "v")
    about = {"layers": layers, "heads": heads, "head_dim": head_dim, "outliers": args.outliers}
    names = ("samples", "tokens", "sinks", "points", "seed", "dtype")
    size = write(args.out / "kvquant", tensors, about, args, names, began)
    clear(args.work)
    print(f"{args.out}: {size:,} bytes, {layers} layers, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
