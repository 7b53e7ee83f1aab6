"""Turn quantizer files of the official KVQuant code into what KVQuant reads: `<out>/kvquant.safetensors` and `.json`.

    python scripts/import_kvquant.py quantizers.pickle --heads 32 --out llama
    python scripts/import_kvquant.py nuq4.pickle nuq3.pickle nuq2.pickle --heads 8 --out mistral
    kvbench quant=kvquant4 quant.path=$PWD/llama ...

https://github.com/SqueezeAILab/KVQuant (quant/llama_simquant.py --quantize --nuq) pickles a dict that maps
"model.layers.N.self_attn.k_proj" and v_proj ("transformer.blocks.N.k_proj" for DBRX) to a tuple:

    upper, lower     thresholds of outliers: of every channel for keys; of every calibration token for values, unused
    [centroids]      [2**bits, 1], in any order
    scale, offset    of Q-Norm, if it was calibrated

Files of one model and different bits become one folder; their thresholds must agree.

A pickle can run any code when it is loaded. Here nothing runs: only dicts, lists, tuples, numbers, strings, NumPy
arrays and PyTorch tensors of numbers are built, and a file that asks for anything else is refused.

Deviation. `k_norm`: models that normalize keys after k_proj (Qwen3) have other keys in the cache than those the
official code calibrates on; calibrate them with scripts/calibrate_kvquant.py.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from calibration import write_artifact
from torch import Tensor

from kvbench.policies.kvquant import BITS

_NAME = re.compile(r"(?:layers|blocks)\.(\d+)\.(?:.*\.)?([kv])_proj$")


# ---------------------------------------------------------------- reading pickles without running them


class RefusedError(ValueError):
    """A pickle that is not what it should be."""


class _Dtype:
    """Stands for a NumPy dtype: the real one would take its state from the file without checking it."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        found = np.dtype(str(self.name))
        if found.kind not in "biuf" or self.order not in ("<", ">", "|", "="):
            raise RefusedError(f"it has an array of {found} ({self.order})")
        return found.newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """Stands for a NumPy array until its state comes, for the same reason."""

    value: np.ndarray[Any, Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, columns_first, data = state
        self.value = _from_buffer(data, dtype, shape, "F" if columns_first else "C")


def _from_buffer(data: Any, dtype: _Dtype, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(data, dtype=dtype.numpy()).reshape(shape, order=order).copy()


def _storage(data: bytes) -> Any:
    """A tensor's storage is pickled as a file of its own, which PyTorch's own restricted reader takes."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


_ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): lambda *args: torch._utils._rebuild_tensor_v2(*args),
    ("torch.storage", "_load_from_bytes"): _storage,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): lambda *_: _Array() for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
    **{
        (f"numpy.{core}.multiarray", "scalar"): lambda dtype, data: _from_buffer(data, dtype, (), "C")
        for core in ("core", "_core")
    },
}


class NumbersOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise RefusedError(f"it asks for {module}.{name}")
        return _ALLOWED[module, name]


def read(file: Path) -> dict[str, Any]:
    """The dict of a quantizer file, or ValueError in one line."""
    try:
        with file.open("rb") as opened:
            found = NumbersOnly(opened).load()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    except Exception as error:
        raise ValueError(
            f"{file}: refused, nothing of it was run: a quantizer file holds numbers, arrays and tensors, but "
            f"{error if isinstance(error, RefusedError) else f'this one cannot be read ({error})'}".replace("\n", " ")
        ) from None
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{file}: must be a dict of names, as llama_simquant.py --quantize writes it")
    return found


# ---------------------------------------------------------------- what is made of it


def number(x: Any) -> Tensor:
    """Array, tensor or number -> flat float32."""
    return torch.as_tensor(x.value if isinstance(x, _Array) else x).detach().cpu().float().flatten()


def converted(file: Path, heads: int) -> tuple[int, bool, dict[str, Tensor]]:
    """(bits, whether it has Q-Norm, tensors of the artifact)."""
    quantizers, tensors = read(file), {}
    sides = {(int(m[1]), m[2]): v for k, v in quantizers.items() if (m := _NAME.search(k))}
    layers = sorted({layer for layer, _ in sides})
    if not layers or layers != list(range(len(layers))) or len(sides) != 2 * len(layers):
        raise ValueError(f"{file}: must have k_proj and v_proj of every layer from 0 on, got {sorted(sides)}")
    lengths = {len(quantizer) if isinstance(quantizer, tuple) else 0 for quantizer in sides.values()}
    if lengths not in ({3}, {5}):
        raise ValueError(
            f"{file}: every entry must be (upper, lower, [centroids]), with Q-Norm also its scale and offset, but they "
            f"have {sorted(lengths)} parts; calibrate with --nuq"
        )
    sizes = {len(number(quantizer[2][0])) for quantizer in sides.values()}
    bits = next((b for b in BITS if sizes == {2**b}), None)
    if bits is None:
        raise ValueError(f"{file}: has {sorted(sizes)} centroids; KVQuant takes 4, 8 or 16 (2, 3 or 4 bits), all alike")
    for (layer, side), (upper, lower, centroids, *norm) in sides.items():
        name = f"layers.{layer}.{side}"
        if side == "k":
            ends = number(upper), number(lower)
            if len(ends[0]) != len(ends[1]) or len(ends[0]) % heads or not bool((ends[0] >= ends[1]).all()):
                raise ValueError(
                    f"{file}: {len(ends[0])} upper and {len(ends[1])} lower thresholds of keys in layer {layer} "
                    f"are not a pair per channel of --heads {heads} key-value heads"
                )
            for end, x in zip(("upper", "lower"), ends, strict=True):
                tensors[f"{name}.{end}"] = x.half().view(heads, -1)
        tensors[f"{name}.codebook.{bits}"] = number(centroids[0]).sort().values
        if norm:
            tensors[f"{name}.qnorm.{bits}"] = torch.cat([number(x) for x in norm])
    if not all(bool(x.isfinite().all()) for x in tensors.values()):
        raise ValueError(f"{file}: has numbers that are not finite, or thresholds beyond fp16 (65504)")
    return bits, lengths == {5}, tensors


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pickles", type=Path, nargs="+", help="quantizer files of one model, each of other bits")
    parser.add_argument("--heads", type=int, required=True, help="key-value heads of the model")
    parser.add_argument("--outliers", type=float, default=0.01, help="1 - the --sparsity-threshold of its calibration")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if args.heads < 1 or not 0 <= args.outliers < 0.5:
        parser.error("--heads must be at least 1, and --outliers a share in [0, 0.5)")
    tensors: dict[str, Tensor] = {}
    bits: list[int] = []
    norms = set()
    for file in args.pickles:
        width, norm, found = converted(file, args.heads)
        shared = {name for name in found if name in tensors}
        if width in bits or any(not torch.equal(found[name], tensors[name]) for name in shared):
            raise ValueError(f"{file}: has the bits of another file, or other thresholds; give it its own --out")
        tensors |= found
        bits.append(width)
        norms.add(norm)
    if len(norms) > 1:
        tensors = {name: x for name, x in tensors.items() if ".qnorm." not in name}
        print("not all files have Q-Norm: left out")
    layers = 1 + max(int(name.split(".")[1]) for name in tensors)
    about = {
        "layers": layers,
        "heads": args.heads,
        "head_dim": tensors["layers.0.k.upper"].shape[1],
        "outliers": args.outliers,
        "bits": sorted(bits),
        "qnorm": norms == {True},
        "imported": [file.name for file in args.pickles],
    }
    write_artifact(args.out / "kvquant", tensors, about)
    print(f"{args.out}: {layers} layers of {args.heads} heads, {about['head_dim']} channels; bits: {about['bits']}")


if __name__ == "__main__":
    main()
