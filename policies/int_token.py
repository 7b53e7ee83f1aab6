"""INT8, INT4 and INT2 with one scale per token and head, after a Hadamard rotation or not.

Jia et al., "SAW-INT4: System-Aware 4-Bit KV-Cache Quantization for Real-World LLM Serving", 2026,
https://arxiv.org/abs/2604.19157, official code https://github.com/togethercomputer/saw-int4; Ashkboos et al., "QuaRot:
Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024, https://arxiv.org/abs/2404.00456, official code
https://github.com/spcl/QuaRot; `int8_per_token_head` of https://github.com/vllm-project/vllm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.kernels.decode import Coded, Format
from kvbench.kernels.fold import mix_per_token, scores_per_token
from kvbench.kernels.pack import Out, Turn, affine_per_token, symmetric_per_token
from kvbench.kernels.packing import cast, unpack_planar
from kvbench.kernels.rotation import hadamard
from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.kivi import PerToken
from kvbench.policies.store import Codec, Packed, Where, mix, scores


@dataclass(frozen=True)
class IntToken(Quantizer):
    """Integer codes with one scale for the D channels of one token of one head.

    With y = x, or y = H x if rotated, H an orthonormal block-diagonal Hadamard matrix, in float32:

        zero = fp16(min y), scale = fp16((max y - min y) / (2**bits - 1)):  code = clamp(round((y - zero) / scale))
        symmetric: scale = max |y| / m, m = 2**(bits - 1) - 1:              code = clamp(round(y / scale), -m, m)

    Decoded: code * scale (+ zero), rotated back, so that attention reads keys and values as the model made them.
    Rounding is half to even; scale = 0 (a constant token) gives codes 0. Per (row, head) with T slots it stores codes
    uint8 [T, D*bits/8] (symmetric: code + m) and scale, zero fp16 [T, 1]; symmetric: scale fp32 [T, 1]. Either way bits
    + 32/D bits per element: 4.25 for INT4 and 8.25 for INT8 at D = 128.

    bits: 8, 4 or 2. SAW-INT4: 4.
    rotate: rotate keys. rotate_values: rotate values. SAW-INT4: keys only.
    block: order of the Hadamard blocks, a power of two that divides D; None: the largest. SAW-INT4: 16 in its recipes,
        64 and 128 to be tried per model; QuaRot: all of D.
    symmetric: no zero point, as in vLLM's int8_per_token_head.
    clip: share in (0, 1] of the range that codes span: elements of y beyond clip * min y or clip * max y (symmetric:
        +-clip * max |y|) are set to it first. QuaRot: 0.95 for INT4; others: 1.
    residual: so many newest tokens stay in full precision. None of the official codes has such a window: 0.

    Raises ValueError for fields outside these sets, for a head_dim that does not fill bytes or blocks, and, unless
    symmetric, for values whose scale or zero point is beyond fp16 (65504).

    Deviations. `zero_point`: fp16, the exact minimum (vLLM's INT4 rounds it to an integer code). `small_scales`: no
    lower bound of 1e-6 (vLLM); constant tokens are exact instead, unless clipped. `clip_within`: a token all of whose y
    have one sign is clipped at its far end only (QuaRot also moves the near end towards zero). `rounding`: half to even
    (vLLM's INT8 truncates).

    Example: `IntToken(bits=4, rotate=True).encode(keys, values).decode()`, each [batch, kv_heads, tokens, head_dim].
    """

    bits: int = 4
    rotate: bool = False
    rotate_values: bool = False
    block: int | None = None
    symmetric: bool = False
    residual: int = 0
    clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (8, 4, 2):
            raise ValueError(f"IntToken: bits must be 8, 4 or 2, got {self.bits!r}")
        for name in ("rotate", "rotate_values", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"IntToken: {name} must be true or false, got {getattr(self, name)!r}")
        if self.block is not None and (not isinstance(self.block, int) or self.block < 2 or self.block.bit_count() > 1):
            raise ValueError(f"IntToken: block must be a power of two of at least 2, or None, got {self.block!r}")
        if isinstance(self.residual, bool) or not isinstance(self.residual, int) or self.residual < 0:
            raise ValueError(f"IntToken: residual must be an int of 0 or more tokens, got {self.residual!r}")
        if isinstance(self.clip, bool) or not isinstance(self.clip, (int, float)) or not 0 < self.clip <= 1:
            raise ValueError(f"IntToken: clip must be a share in (0, 1], got {self.clip!r}")

    def check(self, head_dim: int) -> None:
        if head_dim % (8 // self.bits):
            raise ValueError(
                f"{self}: head_dim={head_dim} is not a multiple of {8 // self.bits} ({self.bits}-bit codes per byte)"
            )
        if (self.rotate or self.rotate_values) and head_dim % (self.block or 1):
            raise ValueError(f"{self}: head_dim={head_dim} is not a multiple of {self.block} (block)")

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        codec = (Symmetric if self.symmetric else Asymmetric)(self.bits, self.clip)
        rotated = Rotated(codec, self.block)
        return rotated if self.rotate else codec, rotated if self.rotate_values else codec

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        older = (tail - self.residual).clamp(min=0)
        return older, older


@dataclass(frozen=True)
class Asymmetric:
    """The affine code that KIVI gives values, in one group per token."""

    bits: int
    clip: float = 1.0
    group: ClassVar[int] = 1
    first: ClassVar[None] = None
    writes: ClassVar[bool] = True

    def encode(self, x: Tensor, where: Where, out: Out = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.encode_turned(x, where, None, out)

    def encode_turned(
        self, x: Tensor, where: Where, turn: Turn | None, out: Out = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        codes, scale, zero = affine_per_token(x, self.bits, x.shape[1], self.clip, turn, out)
        return {"codes": codes, "scale": scale, "zero": zero}, {}

    def decode(self, packed: Packed) -> Tensor:
        return self._format(packed).decode(packed)

    def scores(self, packed: Packed, query: Tensor) -> Tensor:
        return self._format(packed).scores(packed, query)

    def mix(self, packed: Packed, weights: Tensor) -> Tensor:
        return self._format(packed).mix(packed, weights)

    def coded(self, packed: Packed) -> Coded:
        return self._format(packed).coded(packed)

    def _format(self, packed: Packed) -> PerToken:
        return PerToken(self.bits, packed.rows["codes"].shape[1] * 8 // self.bits)

    def row_nbytes(self, head_dim: int) -> int:
        return PerToken(self.bits, head_dim).row_nbytes(head_dim)

    def group_nbytes(self, head_dim: int) -> int:
        return 0


@dataclass(frozen=True)
class Symmetric:
    """Codes of both signs around zero, stored with an offset, and a float32 scale."""

    bits: int
    clip: float = 1.0
    group: ClassVar[int] = 1
    first: ClassVar[None] = None
    writes: ClassVar[bool] = True

    @property
    def top(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def encode(self, x: Tensor, where: Where, out: Out = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.encode_turned(x, where, None, out)

    def encode_turned(
        self, x: Tensor, where: Where, turn: Turn | None, out: Out = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        codes, scale = symmetric_per_token(x, self.bits, self.clip, turn, out)
        return {"codes": codes, "scale": scale}, {}

    def decode(self, packed: Packed) -> Tensor:
        x = unpack_planar(packed.rows["codes"], self.bits).float()
        return cast(x.sub_(self.top).mul_(packed.rows["scale"]), packed.dtype)

    def scores(self, packed: Packed, query: Tensor) -> Tensor:
        return scores_per_token(query, *self._parts(packed, len(query)))

    def mix(self, packed: Packed, weights: Tensor) -> Tensor:
        return mix_per_token(weights, *self._parts(packed, len(weights)))

    def _parts(self, packed: Packed, lists: int) -> tuple[Tensor, int, Tensor, Tensor]:
        codes, scale = (packed.rows[k].unflatten(0, (lists, -1)) for k in ("codes", "scale"))
        return codes, self.bits, scale, scale * -self.top

    def coded(self, packed: Packed) -> Coded:
        codes, scale = packed.rows["codes"], packed.rows["scale"]
        return Coded(Format("int", self.bits, "token", codes.shape[1] * 8 // self.bits, center=self.top), codes, scale)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8 + 4

    def group_nbytes(self, head_dim: int) -> int:
        return 0


@dataclass(frozen=True)
class Rotated:
    """What `of` makes of rows turned by a Hadamard matrix; decoding turns them back.

    block: see `kvbench.kernels.rotation.hadamard`. seed: of the signs of a random rotation; None: no signs.
    """

    of: Codec
    block: int | None = None
    seed: int | None = None

    @property
    def group(self) -> int:
        return self.of.group

    @property
    def first(self) -> int | None:
        return self.of.first

    @property
    def writes(self) -> bool:
        return hasattr(self.of, "encode_turned")

    def encode(self, x: Tensor, where: Where, out: Out = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        turn = Turn(self.block, self._signs(x))
        if hasattr(self.of, "encode_turned"):
            found: tuple[dict[str, Tensor], dict[str, Tensor]] = self.of.encode_turned(x, where, turn, out)
            return found
        return self.of.encode(turn(x), where)

    def decode(self, packed: Packed) -> Tensor:
        x = self.of.decode(replace(packed, dtype=torch.float32))
        return cast(hadamard(x, self.block, self._signs(x), inverse=True), packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return self.of.row_nbytes(head_dim)

    def group_nbytes(self, head_dim: int) -> int:
        return self.of.group_nbytes(head_dim)

    def scores(self, packed: Packed, query: Tensor) -> Tensor:
        """Products do not change when both sides are turned: queries are few, and rows stay as they are."""
        return scores(replace(packed, codec=self.of), hadamard(query, self.block, self._signs(query)))

    def mix(self, packed: Packed, weights: Tensor) -> Tensor:
        out = mix(replace(packed, codec=self.of), weights)
        return hadamard(out, self.block, self._signs(out), inverse=True)

    def coded(self, packed: Packed) -> Coded | None:
        """None: what it is made of is in no format that kernels read."""
        inner = self.of.coded(packed) if hasattr(self.of, "coded") else None
        if inner is None:
            return None
        signs = None if self.seed is None else random_signs(self.seed, inner.dim, inner.codes.device)
        return replace(inner, rotation=partial(hadamard, block=self.block, signs=signs))

    def _signs(self, x: Tensor) -> Tensor | None:
        return None if self.seed is None else random_signs(self.seed, x.shape[-1], x.device)


@lru_cache(maxsize=16)
def random_signs(seed: int, channels: int, device: torch.device) -> Tensor:
    """[channels] of +-1, float32: the same on every device."""
    signs = torch.randint(0, 2, (channels,), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return signs.float().to(device)
