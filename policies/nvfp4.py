"""NVFP4: 4-bit floats (E2M1) with one 8-bit float scale (E4M3) per 16 channels.

NVIDIA, "Optimizing Inference for Long Context and Large Batch Sizes with NVFP4 KV Cache", 2025,
https://developer.nvidia.com/blog/optimizing-inference-for-long-context-and-large-batch-sizes-with-nvfp4-kv-cache;
official code https://github.com/NVIDIA/Model-Optimizer (modelopt/torch/quantization/qtensor/nvfp4_tensor.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.kernels.decode import Coded, Format
from kvbench.kernels.pack import E2M1_BLOCK as _BLOCK
from kvbench.kernels.pack import Out, Turn, e2m1_blocks
from kvbench.kernels.packing import E2M1_MAX, cast, decode_e2m1, decode_e4m3
from kvbench.policies.checkpoint import Biased, calibration
from kvbench.policies.int_token import Rotated
from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.store import Codec, Packed, Where


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
        before and added after (`nvfp4_affine`); see `kvbench.policies.checkpoint`. What scripts/calibrate_scales.py
        wrote, what Model-Optimizer exports, or a shipped one: "proving" (scales), "proving_affine" (with biases).
        Layers (of the whole model) that it does not name keep key_scale and value_scale.

    Raises ValueError for scales that are not positive numbers, for a checkpoint that is missing, has no scales, scales
    per head, or is of a model with other heads, and for a head_dim that is not a multiple of 16.

    Official default: a tensor scale calibrated on text (`nvfp4`). Deviations. `cast`: the default here is the
    uncalibrated `nvfp4_cast`; either way the scale is no function of the tokens, so codes do not depend on how they
    were split into forwards and batches. `small_scales`: block scales are clamped to 2**-9, as its storage path does
    (its fake quantization lets them become 0).

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
            for (layer, name), tensor in calibration("NVFP4", self.checkpoint).items():
                if name.endswith("scale") and tensor.numel() > 1:
                    raise ValueError(
                        f"NVFP4: checkpoint={self.checkpoint}: {name} of layer {layer} must be one number, got "
                        f"{tensor.numel()}; scales per head are for FP8"
                    )

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        layer = 0 if step is None else step.layer
        return self._codec("k", self.key_scale, self.rotate, layer), self._codec("v", self.value_scale, False, layer)

    def _codec(self, side: str, scale: float, rotate: bool, layer: int) -> Codec:
        found = {} if self.checkpoint is None else calibration("NVFP4", self.checkpoint)
        blocks = E2M1Blocks(float(found.get((layer, f"{side}_scale"), scale)))
        codec = Rotated(blocks) if rotate else blocks
        if self.checkpoint is None or (layer, f"{side}_bias") not in found:
            return codec
        return Biased(codec, "NVFP4", self.checkpoint, layer, f"{side}_bias")


@dataclass(frozen=True)
class E2M1Blocks:
    """tensor_scale: 6 * gs, the largest decoded value of a block whose scale is 1."""

    tensor_scale: float
    group: ClassVar[int] = 1
    first: ClassVar[None] = None
    writes: ClassVar[bool] = True

    def encode(self, x: Tensor, where: Where, out: Out = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.encode_turned(x, where, None, out)

    def encode_turned(
        self, x: Tensor, where: Where, turn: Turn | None, out: Out = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        codes, scale = e2m1_blocks(x, self.tensor_scale, turn, out)
        return {"codes": codes, "scale": scale}, {}

    def decode(self, packed: Packed) -> Tensor:
        x = decode_e2m1(packed.rows["codes"])
        x.unflatten(1, (-1, _BLOCK)).mul_(self._decoded(packed.rows["scale"])[..., None])
        return cast(x, packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim // 2 + head_dim // _BLOCK

    def group_nbytes(self, head_dim: int) -> int:
        return 0

    def coded(self, packed: Packed) -> Coded:
        unit = self.tensor_scale / E2M1_MAX
        return Coded(Format("e2m1", 4, "block", _BLOCK), packed.rows["codes"], packed.rows["scale"], unit=unit)

    def _decoded(self, scale: Tensor) -> Tensor:
        return decode_e4m3(scale) * (self.tensor_scale / E2M1_MAX)
