"""Calibrate scales of the keys and values of a model for FP8 and NVFP4, `kvbench/assets/kv_scales/<name>/`.

    python scripts/calibrate_scales.py                      # the proving model, as shipped: FP8, NVFP4
    python scripts/calibrate_scales.py --per-head           # a scale per key-value head: FP8
    python scripts/calibrate_scales.py --affine             # with biases: FP8, NVFP4
    python scripts/calibrate_scales.py --affine --resume    # from the samples done, in --work
    python scripts/calibrate_scales.py --model Qwen/Qwen2.5-7B-Instruct --text wiki.txt --affine --out qwen
    kvbench quant=nvfp4_affine quant.checkpoint=$PWD/qwen ...

The model reads sample after sample. In every layer that policies compress, the largest magnitude of the keys (after
RoPE) and that of the values, divided by 448, are the scales. With --affine the mean of every channel of every head is
the bias, and the largest magnitude is that of what is left without it, as in `nvfp4_affine` and `fp8_affine` of
https://github.com/NVIDIA/Model-Optimizer (modelopt/torch/quantization/calib/bias.py), whose tensor names and shapes are
used: the folder is what it would export of the cache. Deviation. `final_bias`: what is left is taken without the bias
that is written (there without the running mean of that moment).

A run that was cut off goes on with --resume; the result is the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from calibration import SETTINGS, folders, load, options, samples, totals, write
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbench import CompressedCache
from kvbench.kernels.packing import E4M3_MAX
from kvbench.policies.checkpoint import SHIPPED

# ---------------------------------------------------------------- what the model reads


@torch.no_grad()
def note(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, Tensor]:
    """Over the tokens `ids`: "N.k.mean", "N.k.min" and "N.k.max" of layer N, and those of v, each float32 [H, D]."""
    cache = CompressedCache(model)
    model(torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    found = {}
    for layer in cache.policy_layers():
        for side, held in (("k", layer.kv.keys), ("v", layer.kv.values)):
            x, name = held.dense()[0].float(), f"{layer.index}.{side}"
            low, high = x.aminmax(dim=1)
            found |= {f"{name}.mean": x.mean(1).cpu(), f"{name}.min": low.cpu(), f"{name}.max": high.cpu()}
    return found


def merged(old: dict[str, Tensor], new: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Those of `count` samples of equal length and those of one more."""
    how = {
        "mean": lambda a, b: (a * count + b) / (count + 1),
        "min": torch.minimum,
        "max": torch.maximum,
    }
    return {name: how[name.rpartition(".")[2]](x, new[name]) for name, x in old.items()} if old else new


def collect(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, Tensor]:
    """Notes every sample that --work does not hold yet; what it holds is written after each."""
    rows = samples(tokenizer, args, "kv_scales")
    return totals(args, len(rows), lambda found, turn: merged(found, note(model, rows[turn]), turn))


# ---------------------------------------------------------------- what is made of it


def scales(found: dict[str, Tensor], per_head: bool, affine: bool) -> dict[str, Tensor]:
    """The tensors of the checkpoint: k_scale and v_scale [] (per_head: [H]), k_bias and v_bias [1, H, 1, D]."""
    tensors = {}
    for name in (key.removesuffix(".mean") for key in found if key.endswith(".mean")):
        layer, side = name.split(".")
        prefix = f"model.layers.{layer}.self_attn.{side}_proj.{side}_"
        bias = found[f"{name}.mean"] if affine else torch.zeros(())
        largest = torch.maximum(found[f"{name}.max"] - bias, bias - found[f"{name}.min"]).amax(1)
        largest = largest if per_head else largest.amax()
        tensors[f"{prefix}scale"] = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
        if affine:
            tensors[f"{prefix}bias"] = bias[None, :, None].contiguous()
    return tensors


# ---------------------------------------------------------------- the run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "kv_scales")
    parser.add_argument("--per-head", action="store_true", help="a scale per key-value head (for FP8)")
    parser.add_argument("--affine", action="store_true", help="a bias per key-value head and channel")
    parser.add_argument("--samples", type=int, help="[512; proving: 32]")
    parser.add_argument("--tokens", type=int, help="of each sample [2048; proving: 1024]")
    args = parser.parse_args(argv)
    own = args.model == "proving"
    args.samples = args.samples if args.samples is not None else 32 if own else 512
    args.tokens = args.tokens if args.tokens is not None else 1024 if own else 2048
    if min(args.samples, args.tokens) < 1:
        parser.error("--samples and --tokens must be at least 1")
    folders(args, "kv_scales", SHIPPED, "_head" * args.per_head + "_affine" * args.affine)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args, began = parse(argv), time.time()
    tokenizer, model = load(args)
    tensors = scales(collect(model, tokenizer, args), args.per_head, args.affine)
    about = {"per_head": args.per_head, "affine": args.affine}
    size = write(args.out / "kv_scales", tensors, about, args, SETTINGS[2:], began)
    (args.work / "noted.safetensors").unlink()
    print(f"{args.out}: {size:,} bytes")
    for side in "kv":
        largest = [float(x.max()) * E4M3_MAX for name, x in tensors.items() if name.endswith(f"{side}_scale")]
        print(f"largest magnitude, {side}, layer by layer: " + "  ".join(f"{x:.4g}" for x in largest))


if __name__ == "__main__":
    main()
