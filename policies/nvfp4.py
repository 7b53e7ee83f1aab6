"""NVFP4: 4-bit floats (E2M1) with one 8-bit float scale (E4M3) per 16 channels.

NVIDIA, "Optimizing Inference for Long Context and Large Batch Sizes with NVFP4 KV Cache", 2025,
https://developer.nvidia.com/blog/optimizing-inference-for-long-context-and-large-batch-sizes-with-nvfp4-kv-cache;
official code https://github.com/NVIDIA/Model-Optimizer (modelopt/torch/quantization/qtensor/nvfp4_tensor.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
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

    Raises ValueError for scales that are not positive numbers and for a head_dim that is not a multiple of 16.

    Deviations from the official code: the uncalibrated cast variant is the default, since a scale that does not depend
    on the data makes the codes independent of how tokens were split into forwards and batches; the scales of tiny
    blocks are clamped to 2**-9, as its storage path does (its fake quantization lets them become 0).

    Example: `NVFP4().encode(keys, values).decode()` with keys and values [batch, kv_heads, tokens, head_dim].
    """

    key_scale: float = 1.0
    value_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, scale in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
                raise ValueError(f"NVFP4: {name} must be a positive number, got {scale!r}")

    def check(self, head_dim: int) -> None:
        if head_dim % _BLOCK:
            raise ValueError(f"{self}: head_dim={head_dim} is not a multiple of {_BLOCK} (channels that share a scale)")

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        return E2M1Blocks(self.key_scale), E2M1Blocks(self.value_scale)


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
        x.view(x.shape[0], -1, _BLOCK).mul_(self._decoded(packed.rows["scale"])[..., None])
        return cast(x, packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim // 2 + head_dim // _BLOCK

    def group_nbytes(self, head_dim: int) -> int:
        return 0

    def _decoded(self, scale: Tensor) -> Tensor:
        return decode_e4m3(scale) * (self.tensor_scale / E2M1_MAX)
