"""MILLION: product quantization, every few channels of a token are the number of a learned centroid (DAC 2025).

Wang et al., "MILLION: Mastering Long-Context LLM Inference Via Outlier-Immunized KV Product Quantization".
Paper https://arxiv.org/abs/2504.03661, official code https://github.com/ZongwuWang/MILLION
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.kernels.packing import cast, pack_planar, unpack_planar
from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.store import Codec, Packed, Where

SHIPPED = Path(str(files("kvbench"))) / "assets" / "million"
BITS = (4, 8, 12)
_BLOCK_ELEMENTS = 2**22
"""Most distances held at a time."""


@dataclass(frozen=True)
class MILLION(Quantizer):
    """Cuts the D channels of a token into M subspaces of d = D/M and stores the number of the nearest centroid of each.

        code[t, m] = argmin over c of sum over i of (x[t, m*d + i] - codebook[m, c, i])**2, ties to the lower c
        decoded[t, m*d : (m + 1)*d] = codebook[m, code[t, m]]

    The codebooks, fp16 [M, 2**bits, d], one of keys (after RoPE) and one of values in every layer, are the centroids
    that `scripts/calibrate_million.py` finds by k-means for a model. Arithmetic is in float32. Per (row, head) with T
    slots it stores codes uint8 [T, M*bits/8], planar; those of 12 bits as their 8 lower bits, then the upper 4:
    bits * M / D bits per element. Codebooks are constants of the model, not stored in the cache. Of a full-precision
    tail of n tokens, the oldest floor(n / residual) * residual are packed.

    subspaces: M, an even number. bits: 4, 8 or 12.
    path: a folder that the script wrote, or the name of a shipped one: "proving", which has 32 and 16 subspaces of 8
    bits. residual: tokens; 0 packs every token at once.

    Raises ValueError for fields outside these sets, and where `path` has no codebooks for these subspaces and bits, or
    those of a model with other layers or another head_dim.

    Official settings: M = 64 and 8 bits at D = 128 (4 bits per element; here 32 at D = 64), or 32 and 12 bits (3 bits);
    a window of D tokens. Deviations. `per_layer`: every layer has codebooks of its own (official code: one for all
    layers); its heads share them, as there. `window`: the newest T mod residual tokens stay in full precision (there a
    prompt is packed whole), so that codes do not depend on how tokens were split into forwards. `dense`: attention
    reads decoded rows (there tables of products with the centroids: the same up to rounding).

    Example: `CompressedCache(model, MILLION(64, 8, "qwen"))`.
    """

    subspaces: int = 32
    bits: int = 8
    path: str = "proving"
    residual: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.subspaces, int) or self.subspaces < 2 or self.subspaces % 2:
            raise ValueError(f"MILLION: subspaces must be an even int of 2 or more, got {self.subspaces!r}")
        if self.bits not in BITS:
            raise ValueError(f"MILLION: bits must be 4, 8 or 12, got {self.bits!r}")
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"MILLION: path must be a calibrated folder or the name of one, got {self.path!r}")
        if isinstance(self.residual, bool) or not isinstance(self.residual, int) or self.residual < 0:
            raise ValueError(f"MILLION: residual must be an int of 0 or more tokens, got {self.residual!r}")

    def check(self, head_dim: int) -> None:
        found = artifact(self.path, self.subspaces, self.bits)
        if head_dim != found.head_dim:
            raise ValueError(found.misfit(f"heads of {head_dim} channels"))

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        order = 0
        if step is not None:
            order, found = step.order, artifact(self.path, self.subspaces, self.bits)
            if step.layers != found.layers:
                raise ValueError(found.misfit(f"{step.layers} layers"))
        shared = (self.path, self.subspaces, self.bits, order)
        return ProductCodes(*shared, "keys"), ProductCodes(*shared, "values")

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        block = max(self.residual, 1)
        return tail // block * block, tail // block * block


@dataclass(frozen=True)
class ProductCodes:
    """order: of the layer; side: "keys" or "values".

    Decode attention runs in PyTorch: no kernel looks up several channels at once.
    """

    path: str
    subspaces: int
    bits: int
    order: int
    side: str
    group: ClassVar[int] = 1
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        codes = nearest(x.float().unflatten(1, (self.subspaces, -1)), self._codebook(x.device))
        packed = pack_planar((codes & 255).to(torch.uint8), min(self.bits, 8))
        if self.bits > 8:
            packed = torch.cat([packed, pack_planar((codes >> 8).to(torch.uint8), self.bits - 8)], 1)
        return {"codes": packed}, {}

    def decode(self, packed: Packed) -> Tensor:
        codes, lower = packed.rows["codes"], self.subspaces * min(self.bits, 8) // 8
        number = unpack_planar(codes[:, :lower], min(self.bits, 8)).int()
        if self.bits > 8:
            number |= unpack_planar(codes[:, lower:], self.bits - 8).int() << 8
        codebook = self._codebook(codes.device)
        first = torch.arange(self.subspaces, device=codes.device, dtype=torch.int32) * codebook.shape[1]
        rows = codebook.flatten(0, 1).index_select(0, (number + first).flatten())
        return cast(rows.view(len(codes), -1), packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return self.subspaces * self.bits // 8

    def group_nbytes(self, head_dim: int) -> int:
        return 0

    def _codebook(self, device: torch.device) -> Tensor:
        return codebook(self.path, self.subspaces, self.bits, self.order, self.side, device)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """x [N, M, d] and codebook [M, C, d], float32 -> [N, M] int64.

    Element by element, not as a matrix product, whose rounding could depend on how many rows there are.
    """
    found = []
    for block in x.split(max(1, _BLOCK_ELEMENTS // codebook[..., 0].numel())):
        distance = block.new_zeros(len(block), *codebook.shape[:2])
        for i in range(x.shape[2]):
            distance += (block[..., i, None] - codebook[..., i]).square_()
        found.append(distance.argmin(2))
    return torch.cat(found)


# ---------------------------------------------------------------- codebooks


@dataclass(frozen=True, eq=False)
class Artifact:
    """keys, values: fp16 [layers, M, 2**bits, d], from the file `<M>x<bits>.safetensors` of a folder."""

    file: Path
    keys: Tensor
    values: Tensor

    @property
    def layers(self) -> int:
        return self.keys.shape[0]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[1] * self.keys.shape[3]

    def misfit(self, model: str) -> str:
        subspaces, bits = (int(x) for x in self.file.stem.split("x"))
        return (
            f"MILLION: {self.file} is for {self.layers} layers with heads of {self.head_dim} channels, but the model "
            f"has {model}; make one for it: {command('FOLDER', subspaces, bits)}"
        )


def command(folder: str, subspaces: int, bits: int) -> str:
    sizes = f"--subspaces {subspaces} --bits {bits}"
    return f"python scripts/calibrate_million.py --model MODEL --text FILE {sizes} --out {folder}"


@cache
def artifact(path: str, subspaces: int, bits: int) -> Artifact:
    """The codebooks at `path`, a folder or the name of a shipped one, checked against the JSON beside them."""
    from safetensors.torch import load

    name, make = f"{subspaces}x{bits}", command(path, subspaces, bits)
    folder = next((f for f in (Path(path), SHIPPED / path) if (f / f"{name}.json").is_file()), None)
    if folder is None:
        raise ValueError(
            f"MILLION: no codebooks for subspaces={subspaces} and bits={bits} at path={path!r}; make them: {make}"
        )
    file = folder / f"{name}.safetensors"
    try:
        about, data = json.loads(file.with_suffix(".json").read_text()), file.read_bytes()
        if about["format"] != 1 or about["sha256"] != hashlib.sha256(data).hexdigest():
            raise ValueError("they are not of one run")
        tensors = load(data)
        shape = (about["layers"], subspaces, 2**bits, about["head_dim"] // subspaces)
        if {side: tuple(x.shape) for side, x in tensors.items()} != {"keys": shape, "values": shape}:
            raise ValueError(f"keys and values must be {list(shape)}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"MILLION: {file} and its JSON cannot be read ({error}); make them again: {make}") from error
    return Artifact(file, tensors["keys"], tensors["values"])


@cache
def codebook(path: str, subspaces: int, bits: int, order: int, side: str, device: torch.device) -> Tensor:
    """[M, 2**bits, d] float32 of layer number `order`."""
    found = artifact(path, subspaces, bits)
    return (found.keys if side == "keys" else found.values)[order].to(device).float()
