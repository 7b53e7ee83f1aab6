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
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from calibrate_kvquant import samples
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvbench import CompressedCache
from kvbench.kernels.rotation import hadamard
from kvbench.policies.oscar import SHIPPED

ROOT = Path(__file__).resolve().parents[1]


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
    settings, file = {name: str(getattr(args, name)) for name in SETTINGS}, args.work / "noted.safetensors"
    found: dict[str, Tensor] = {}
    done = 0
    if args.resume and file.exists():
        with safe_open(file, "pt") as noted:
            old = noted.metadata()
            changed = [name for name in SETTINGS if old.get(name) != settings[name]]
            if changed:
                raise ValueError(f"{file} has other values of {', '.join(changed)}; use those, or leave out --resume")
            found, done = {name: noted.get_tensor(name) for name in noted.keys()}, int(old["done"])  # noqa: SIM118
    args.work.mkdir(parents=True, exist_ok=True)
    rows = samples(tokenizer, args, "oscar")
    for turn in tqdm(range(done, 2 * len(rows)), "samples, twice", initial=done, total=2 * len(rows), mininterval=5):
        new = note(model, rows[turn % len(rows)], found, values=turn >= len(rows))
        found |= {name: found[name] + x if name in found else x for name, x in new.items()}
        part = file.with_suffix(".part")
        save_file(found, part, metadata=settings | {"done": str(turn + 1)})
        os.replace(part, file)
    return found


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

SETTINGS = ("model", "text", "samples", "tokens", "seed", "dtype")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="proving", help="a Hub name, a folder, or proving")
    parser.add_argument("--text", type=Path, nargs="+", help="texts (UTF-8); default: generated by kvbench.corpus")
    parser.add_argument("--out", type=Path, help="folder to write; default: kvbench/assets/oscar/<name of model>")
    parser.add_argument("--work", type=Path, help="what is done so far; default: build/oscar/<name of model>")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1000, help="of each sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="[float32 on a CPU, else bfloat16]")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --work")
    args = parser.parse_args(argv)
    if min(args.samples, args.tokens) < 1:
        parser.error("--samples and --tokens must be at least 1")
    name = Path(args.model).name
    args.out, args.work = args.out or SHIPPED / name, args.work or Path("build/oscar") / name
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args, begin = parse(argv), time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    source = ROOT / "kvbench" / "assets" / "proving" if args.model == "proving" else args.model
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype)).to(device).eval()
    found = collect(model, tokenizer, args)
    size = found["0.qq"].shape[1]
    if size.bit_count() > 1:
        raise ValueError(f"OSCAR reverses the bits of channel numbers: head_dim={size} must be a power of two")
    tensors = rotations(found)
    data = save(tensors)
    about = {
        "format": 1,
        "layers": len(tensors["k"]),
        "head_dim": size,
        "sha256": hashlib.sha256(data).hexdigest(),
        "calibration": {
            "model": Path(args.model).name if Path(args.model).exists() else args.model,
            "text": [path.name for path in args.text] if args.text else "kvbench.corpus",
            **{name: getattr(args, name) for name in SETTINGS[2:]},
            "seconds": round(time.time() - begin),
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    part = args.out / "oscar.part"
    for name, content in (
        ("oscar.safetensors", data),
        ("oscar.json", (json.dumps(about, indent=1) + "\n").encode()),
    ):
        part.write_bytes(content)
        os.replace(part, args.out / name)
    (args.work / "noted.safetensors").unlink()
    print(f"{args.out}: {len(data):,} bytes, {about['layers']} layers, {about['calibration']['seconds']} s")


if __name__ == "__main__":
    main()
