"""Calibrate OSCAR for a model: rotations of its keys and values, `kvbench/assets/oscar/<name>/`.

    python scripts/calibrate_oscar.py                                               # the proving model
    python scripts/calibrate_oscar.py --resume                                      # from what is done, in --work
    python scripts/calibrate_oscar.py --model Qwen/Qwen3-0.6B --text wiki.txt --out qwen
    kvbench quant=oscar quant.path=$PWD/qwen ...

The model reads the samples twice, in each layer with Q [G*n, D] the queries (after RoPE) of the G heads that read a
key-value head h, K and V [n, D] its keys and values, C_h = Q^T Q / (G*n) over all samples, and w_t = k_t^T C_h k_t:

    keys: mean over h of C_h        values: mean over h of V^T diag(w) V / sum w

The eigenvectors U of either are turned into U H P: H the Hadamard matrix of order D, P the order of channels in which
channel br(i) is the one of the i-th largest eigenvalue, br reversing the bits of a number. That is the recipe of
https://github.com/FutureMLS-Lab/OSCAR (rotation/compute_kv_rotation.py, `qqt_sst`, `r_h_pbr`) with its 30,000 tokens.

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
from kvbench.kernels.rotation import hadamard
from kvbench.policies.oscar import SHIPPED

# ---------------------------------------------------------------- what the model reads


@torch.no_grad()
def note(model: PreTrainedModel, ids: Sequence[int], before: dict[str, Tensor], values: bool) -> dict[str, Tensor]:
    """Sums over the tokens `ids` of layer number i: "i.qq" [H, D, D] and "i.n" [H]; with `values` (then `before` has
    these sums over all samples) "i.vv" [H, D, D] and "i.w" [H], float64."""
    cache, found = CompressedCache(model, needs={"queries": len(ids)}), {}
    model(torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True)
    for i, layer in enumerate(cache.policy_layers()):
        k, v = (held.dense()[0].cpu().double() for held in (layer.kv.keys, layer.kv.values))
        if values:
            asked = before[f"{i}.qq"] / before[f"{i}.n"][:, None, None]
            weight = ((k @ asked) * k).sum(2)
            found |= {f"{i}.vv": (v * weight[..., None]).transpose(1, 2) @ v, f"{i}.w": weight.sum(1)}
        else:
            q = layer.queries[0].cpu().double().unflatten(0, (len(k), -1)).flatten(1, 2)
            found |= {f"{i}.qq": q.transpose(1, 2) @ q, f"{i}.n": torch.full((len(k),), float(q.shape[1])).double()}
    return found


def collect(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, Tensor]:
    """The sums over all samples; what --work holds is written after each."""
    rows = samples(tokenizer, args, "oscar")

    def add(found: dict[str, Tensor], turn: int) -> dict[str, Tensor]:
        new = note(model, rows[turn % len(rows)], found, values=turn >= len(rows))
        return found | {name: found[name] + x if name in found else x for name, x in new.items()}

    return totals(args, 2 * len(rows), add)  # the model reads them twice


# ---------------------------------------------------------------- what is made of it


def rotation(covariance: Tensor) -> Tensor:
    """[D, D] symmetric float64 -> U H P, float32."""
    size, (values, vectors) = len(covariance), torch.linalg.eigh(covariance)
    bits = size.bit_length() - 1
    reverse = [int(f"{i:0{bits}b}"[::-1], 2) for i in range(size)]
    order = torch.empty(size, dtype=torch.int64)
    order[reverse] = values.argsort(descending=True)
    return hadamard(vectors.float())[:, order].contiguous()


def rotations(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors k and v of the artifact, [layers, D, D]."""
    layers = sum(name.endswith(".qq") for name in found)
    sides = {"k": ("qq", "n"), "v": ("vv", "w")}
    return {
        side: torch.stack(
            [rotation((found[f"{i}.{total}"] / found[f"{i}.{n}"][:, None, None]).mean(0)) for i in range(layers)]
        )
        for side, (total, n) in sides.items()
    }


# ---------------------------------------------------------------- the run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = options(__doc__, "oscar")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1000, help="of each sample")
    args = parser.parse_args(argv)
    if min(args.samples, args.tokens) < 1:
        parser.error("--samples and --tokens must be at least 1")
    folders(args, "oscar", SHIPPED)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args, began = parse(argv), time.time()
    tokenizer, model = load(args)
    found = collect(model, tokenizer, args)
    size = found["0.qq"].shape[1]
    if size.bit_count() > 1:
        raise ValueError(f"OSCAR reverses the bits of channel numbers: head_dim={size} must be a power of two")
    tensors = rotations(found)
    about = {"layers": len(tensors["k"]), "head_dim": size}
    nbytes = write(args.out / "oscar", tensors, about, args, SETTINGS[2:], began)
    (args.work / "noted.safetensors").unlink()
    print(f"{args.out}: {nbytes:,} bytes, {about['layers']} layers, {time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
