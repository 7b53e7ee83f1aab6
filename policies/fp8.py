"""FP8: 8-bit floats (E4M3FN) with one constant scale for keys and one for values.

Micikevicius et al., "FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433; as a KV-cache format in
https://github.com/vllm-project/vllm and https://github.com/NVIDIA/Model-Optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.kernels.packing import cast, decode_e4m3, divide, encode_e4m3
from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.store import Codec, Packed, Where


@dataclass(frozen=True)
class FP8(Quantizer):
    """One byte per element; every token is packed as soon as it has been attended.

    In float32, with s = key_scale (values: value_scale): code = e4m3(clamp(x / s, -448, 448)), decoded = code * s.
    Rounding is to nearest, ties to even: an error of at most |x|/16, or s * 2**-10 below s * 2**-6. Per (row, head)
    with T slots of D channels it stores codes uint8 [T, D], the bytes of E4M3FN: 8 bits per element. s is a constant of
    the policy, not stored.

    key_scale, value_scale: what a calibrated checkpoint stores as k_scale and v_scale (largest magnitude / 448), for
        all layers. Default 1 (a plain cast), as in vLLM.

    Raises ValueError for scales that are not positive numbers. Any head_dim will do.

    Deviations: values beyond 448 * s saturate by an explicit clamp (transformers' FP8 cache casts without one); the
    scale is never taken from the first tokens seen, so codes do not depend on how tokens were split into forwards.

    Example: `FP8().encode(keys, values).decode()` with keys and values [batch, kv_heads, tokens, head_dim].
    """

    key_scale: float = 1.0
    value_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, scale in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
                raise ValueError(f"FP8: {name} must be a positive number, got {scale!r}")

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        return E4M3(self.key_scale), E4M3(self.value_scale)


@dataclass(frozen=True)
class E4M3:
    """Every element on its own; the scale is common to all."""

    scale: float
    group: ClassVar[int] = 1
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"codes": encode_e4m3(divide(x.float(), self.scale))}, {}

    def decode(self, packed: Packed) -> Tensor:
        return cast(decode_e4m3(packed.rows["codes"]) * self.scale, packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim

    def group_nbytes(self, head_dim: int) -> int:
        return 0
