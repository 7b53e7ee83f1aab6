"""NVFP4: 4-bit floats (E2M1) with one 8-bit float scale (E4M3) per 16 channels.

NVIDIA, "Optimizing Inference for Long Context and Large Batch Sizes with NVFP4 KV Cache", 2025,
https://developer.nvidia.com/blog/optimizing-inference-for-long-context-and-large-batch-sizes-with-nvfp4-kv-cache;
official code https://github.com/NVIDIA/Model-Optimizer (modelopt/torch/quantization/qtensor/nvfp4_tensor.py).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.kernels.packing import (
    E2M1_MAX,
    cast,
    decode_e2m1,
    decode_e4m3,
    divide,
    encode_e2m1,
    encode_e4m3,
    pack_interleaved,
)
from kvbench.policies.int_token import Rotated
from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.store import Codec, Packed, Where

_BLOCK = 16
_SMALLEST_E4M3 = 2.0**-9


@dataclass(frozen=True)
class NVFP4(Quantizer):
    """E2M1 codes in blocks of 16 channels of one token; every token is packed as soon as it has been attended.

    For a block x with largest magnitude a, in float32, with the tensor scale gs = key_scale/6 (values: value_scale/6):

        block = e4m3(clamp(a / (6 * gs), 2**-9, 448))        code = e2m1(x / (block * gs))
        decoded = code * block * gs

    a = 0 gives block = 1 and codes 0. Rounding is to nearest, ties to even; beyond 6 * 448 * gs values saturate. Per
    (row, head) with T slots of D channels it stores codes uint8 [T, D/2], the even channel in the low nibble, and
    scale uint8 [T, D/16], the bytes of E4M3FN: 4.5 bits per element. gs is a constant of the policy, not stored.

    key_scale, value_scale: what a calibrated checkpoint stores as k_scale and v_scale (largest magnitude / 448), for
        all layers. Default 1: the official `nvfp4_cast` variant, gs = 1/6, whose range is that of FP8, +-448.
    rotate: keys are rotated by a Hadamard matrix of order D (its largest power of two), and back when they are read:
        `nvfp4_rotate`.
    checkpoint: where every layer's scales come from, and, if it has any, a bias per head and channel that is subtracted
        before and added after (`nvfp4_affine`): a folder or file of safetensors as Model-Optimizer exports them
        (`layers.N. ... .k_scale`, `v_scale`, `k_bias`, `v_bias`), or a JSON file of one scale per layer, as FP8 caches
        of vLLM and SGLang read them. Layers (of the whole model) that it does not name keep key_scale and value_scale.

    Raises ValueError for scales that are not positive numbers, for a checkpoint that is missing, has no scales or is of
    a model with other heads, and for a head_dim that is not a multiple of 16.

    Deviations from the official code: the uncalibrated cast variant is the default, since a scale that does not depend
    on the data makes the codes independent of how tokens were split into forwards and batches; the scales of tiny
    blocks are clamped to 2**-9, as its storage path does (its fake quantization lets them become 0). With `rotate`, the
    official code rotates the query instead of turning keys back, which is the same product.

    Example: `NVFP4().encode(keys, values).decode()` with keys and values [batch, kv_heads, tokens, head_dim].
    """

    key_scale: float = 1.0
    value_scale: float = 1.0
    rotate: bool = False
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, scale in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
                raise ValueError(f"NVFP4: {name} must be a positive number, got {scale!r}")
        if not isinstance(self.rotate, bool):
            raise ValueError(f"NVFP4: rotate must be true or false, got {self.rotate!r}")
        if self.checkpoint is not None and not isinstance(self.checkpoint, str):
            raise ValueError(f"NVFP4: checkpoint must be the path of a folder or file, got {self.checkpoint!r}")

    def check(self, head_dim: int) -> None:
        if head_dim % _BLOCK:
            raise ValueError(f"{self}: head_dim={head_dim} is not a multiple of {_BLOCK} (channels that share a scale)")
        if self.checkpoint is not None:
            calibration(self.checkpoint)

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        layer = 0 if step is None else step.layer
        return self._codec("k", self.key_scale, self.rotate, layer), self._codec("v", self.value_scale, False, layer)

    def _codec(self, side: str, scale: float, rotate: bool, layer: int) -> Codec:
        if self.checkpoint is None:
            return Rotated(E2M1Blocks(scale)) if rotate else E2M1Blocks(scale)
        found = calibration(self.checkpoint)
        blocks = E2M1Blocks(float(found.get((layer, f"{side}_scale"), scale)))
        codec = Rotated(blocks) if rotate else blocks
        return Biased(codec, self.checkpoint, layer, f"{side}_bias") if (layer, f"{side}_bias") in found else codec


@dataclass(frozen=True)
class E2M1Blocks:
    """tensor_scale: 6 * gs, the largest decoded value of a block whose scale is 1."""

    tensor_scale: float
    group: ClassVar[int] = 1
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x = x.float().unflatten(1, (-1, _BLOCK))
        largest = x.abs().amax(2)
        scale = encode_e4m3(torch.where(largest > 0, divide(largest, self.tensor_scale).clamp(min=_SMALLEST_E4M3), 1.0))
        codes = encode_e2m1(x / self._decoded(scale)[..., None])
        codes = torch.where(largest[..., None] > 0, codes, 0)  # a block of -0 would give codes 8
        return {"codes": pack_interleaved(codes.flatten(1), 4), "scale": scale}, {}

    def decode(self, packed: Packed) -> Tensor:
        x = decode_e2m1(packed.rows["codes"])
        x.unflatten(1, (-1, _BLOCK)).mul_(self._decoded(packed.rows["scale"])[..., None])
        return cast(x, packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim // 2 + head_dim // _BLOCK

    def group_nbytes(self, head_dim: int) -> int:
        return 0

    def _decoded(self, scale: Tensor) -> Tensor:
        return decode_e4m3(scale) * (self.tensor_scale / E2M1_MAX)


@dataclass(frozen=True)
class Biased:
    """What `of` makes of rows less the bias `name` [H, D] of a layer of a checkpoint, which decoding adds again."""

    of: Codec
    checkpoint: str
    layer: int
    name: str
    group: ClassVar[int] = 1
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.of.encode(x.float() - self._bias(x, where), where)

    def decode(self, packed: Packed) -> Tensor:
        x = self.of.decode(replace(packed, dtype=torch.float32))
        return cast(x + self._bias(x, packed.where), packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return self.of.row_nbytes(head_dim)

    def group_nbytes(self, head_dim: int) -> int:
        return 0

    def _bias(self, x: Tensor, where: Where) -> Tensor:
        """[N, D] as x."""
        bias, heads = calibration(self.checkpoint)[self.layer, self.name], where.counts.shape[1]
        if bias.numel() != heads * x.shape[1]:
            raise ValueError(
                f"NVFP4: {self.checkpoint}: {self.name} of layer {self.layer} has {bias.numel()} values, but the model "
                f"has {heads} key-value heads of {x.shape[1]} channels; use a checkpoint of this model"
            )
        return bias.to(x.device).view(heads, -1)[where.head]


@lru_cache(maxsize=4)
def calibration(path: str) -> dict[tuple[int, str], Tensor]:
    """(layer, "k_scale", "v_scale", "k_bias" or "v_bias") -> float32 tensor."""
    place = Path(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] if place.is_file() else []
    if not files:
        raise ValueError(
            f"NVFP4: checkpoint={path}: no such file, or no *.safetensors in it; Model-Optimizer writes one: "
            f"python hf_ptq.py --pyt_ckpt_path MODEL --kv_cache_qformat nvfp4 --export_path {path}"
        )
    found = _from_json(place) if place.suffix == ".json" else _from_safetensors(files)
    if not found:
        raise ValueError(
            f"NVFP4: checkpoint={path}: no tensor is named layers.N. ... .k_scale, v_scale, k_bias, v_bias"
        )
    for (layer, name), tensor in found.items():
        if not bool(tensor.isfinite().all()) or (name.endswith("scale") and (tensor.numel() != 1 or tensor <= 0)):
            raise ValueError(f"NVFP4: checkpoint={path}: {name} of layer {layer} must be one positive number or a bias")
    return found


def _from_safetensors(files: list[Path]) -> dict[tuple[int, str], Tensor]:
    from safetensors import safe_open

    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if match := re.search(r"layers\.(\d+)\.(?:.*\.)?([kv]_(?:scale|bias))$", name):
                    found[int(match[1]), match[2]] = tensors.get_tensor(name).float()
    return found


def _from_json(file: Path) -> dict[tuple[int, str], Tensor]:
    """{"kv_cache": {"scaling_factor": {"0": {layer: scale}}}}; the "0" is a rank of tensor parallelism."""
    try:
        (layers,) = json.loads(file.read_text())["kv_cache"]["scaling_factor"].values()
        return {(int(i), f"{side}_scale"): torch.tensor(float(s)) for i, s in layers.items() for side in "kv"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'NVFP4: {file}: must be {{"kv_cache": {{"scaling_factor": {{"0": {{layer: scale}}}}}}}}, '
            f"of one rank ({error})"
        ) from error
