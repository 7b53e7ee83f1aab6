"""FP8: 8-bit floats (E4M3 or E5M2) with one constant scale for keys and one for values, or one per token and head.

Micikevicius et al., "FP8 Formats for Deep Learning", 2022, https://arxiv.org/abs/2209.05433; as a KV-cache format in
https://github.com/vllm-project/vllm and https://github.com/NVIDIA/Model-Optimizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.kernels.packing import (
    E4M3_MAX,
    E5M2_MAX,
    cast,
    decode_e4m3,
    decode_e5m2,
    divide,
    encode_e4m3,
    encode_e5m2,
)
from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.store import Codec, Packed, Where

_FORMATS = {"e4m3": (E4M3_MAX, encode_e4m3, decode_e4m3), "e5m2": (E5M2_MAX, encode_e5m2, decode_e5m2)}


@dataclass(frozen=True)
class FP8(Quantizer):
    """One byte per element; every token is packed as soon as it has been attended.

    In float32, with s = key_scale (values: value_scale): code = e4m3(clamp(x / s, -448, 448)), decoded = code * s.
    Rounding is to nearest, ties to even: an error of at most |x|/16, or s * 2**-10 below s * 2**-6. Per (row, head)
    with T slots of D channels it stores codes uint8 [T, D], the bytes of E4M3FN: 8 bits per element. s is a constant of
    the policy, not stored.

    key_scale, value_scale: what a calibrated checkpoint stores as k_scale and v_scale (largest magnitude / 448), for
        all layers. What is larger than anything calibrated on saturates: take headroom, say 1.25 times the scale; it
        costs no precision but at the smallest values. Default 1 (a plain cast), as in vLLM.
    format: "e4m3", or "e5m2": saturates at 57344, errors of at most |x|/8, or s * 2**-17 below s * 2**-14.
    per_token: s = max |x| / 448 (57344) over the D channels of each token and head, stored as scale fp32 [T, 1]: 8 +
        32/D bits per element (fp8_per_token_head of vLLM). Nothing saturates; key_scale and value_scale stay 1.

    Raises ValueError for scales that are not positive numbers, for another format, and for per_token with constant
    scales. Any head_dim will do.

    Deviations: values beyond 448 * s saturate by an explicit clamp (transformers' FP8 cache casts without one); a
    constant scale is never taken from the first tokens seen, so codes do not depend on how tokens were split into
    forwards; scales per token have no lower bound (vLLM: 1e-6), a token of zeros has scale 0 and codes of zeros.

    Example: `FP8().encode(keys, values).decode()` with keys and values [batch, kv_heads, tokens, head_dim].
    """

    key_scale: float = 1.0
    value_scale: float = 1.0
    format: str = "e4m3"
    per_token: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, scale in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
                raise ValueError(f"FP8: {name} must be a positive number, got {scale!r}")
        if self.format not in _FORMATS:
            raise ValueError(f"FP8: format must be one of {sorted(_FORMATS)}, got {self.format!r}")
        if not isinstance(self.per_token, bool):
            raise ValueError(f"FP8: per_token must be true or false, got {self.per_token!r}")
        if self.per_token and (self.key_scale, self.value_scale) != (1, 1):
            raise ValueError(
                f"FP8: per_token takes its scales from the tokens; leave key_scale and value_scale at 1, "
                f"got {self.key_scale} and {self.value_scale}"
            )

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        if self.per_token:
            return Float8(self.format), Float8(self.format)
        return Float8(self.format, self.key_scale), Float8(self.format, self.value_scale)


@dataclass(frozen=True)
class Float8:
    """Every element on its own. scale: common to all; None: every token has its own."""

    format: str
    scale: float | None = None
    group: ClassVar[int] = 1
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        largest, encode, _ = _FORMATS[self.format]
        x = x.float()
        if self.scale is not None:
            return {"codes": encode(divide(x, self.scale))}, {}
        scale = divide(x.abs().amax(1, keepdim=True), largest)
        return {"codes": encode(x / scale.masked_fill(scale == 0, torch.inf)), "scale": scale}, {}

    def decode(self, packed: Packed) -> Tensor:
        decode = _FORMATS[self.format][2]
        scale = packed.rows["scale"] if self.scale is None else self.scale
        return cast(decode(packed.rows["codes"]) * scale, packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim + 4 * (self.scale is None)

    def group_nbytes(self, head_dim: int) -> int:
        return 0
