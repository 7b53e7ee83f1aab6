"""KIVI: 2- or 4-bit affine codes, keys per channel over tokens, values per token over channels.

Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024, https://arxiv.org/abs/2402.02750;
official code https://github.com/jy-yuan/KIVI.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvbench.kernels.decode import Coded, Format
from kvbench.kernels.fold import mix_per_token, scores_per_channel, scores_per_token
from kvbench.kernels.pack import Out, affine_per_channel, affine_per_channel_again, affine_per_token
from kvbench.kernels.packing import cast, unpack_planar
from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.store import Codec, Packed, Where


@dataclass(frozen=True)
class KIVI(Quantizer):
    """Affine min-max codes in groups of `group_size`, with the newest tokens kept in full precision.

    For a group x of `group_size` tokens of one channel (keys) or channels of one token (values), in float32:

        zero = fp16(min x)        scale = fp16((max x - min x) / (2**bits - 1))
        code = clamp(round((x - zero) / scale), 0, 2**bits - 1)        decoded = code * scale + zero

    Rounding is half to even; codes are taken against the *rounded* scale and zero, and scale = 0 (a constant group)
    gives codes 0. Per (row, head) with T slots of D channels, keys store codes uint8 [T, D*bits/8] and scale, zero fp16
    [T/group_size, D]; values store codes uint8 [T, D*bits/8] and scale, zero fp16 [T, D/group_size]: bits +
    32/group_size bits per element. Of a full-precision tail of n tokens, the oldest floor(n/residual)*residual keys are
    packed, and all values but the newest `residual`.

    bits: 2 or 4. Paper: 2.
    group_size: elements that share a scale and a zero point. Paper: 32.
    residual: tokens, a multiple of group_size; 0 packs every whole group of keys and every value at once. Paper: 128,
        and 32 for GSM8K.

    Raises ValueError for fields outside these sets, for a head_dim that is not a multiple of group_size and of
    8/bits, and for values whose scale or zero point is beyond fp16 (65504).

    Deviations from the official code: planar packing along channels for keys, too (it packs keys along tokens into
    int32; see `kvbench.kernels.packing.to_kivi_int32`); float32 arithmetic and fp16 metadata whatever the model's dtype
    (it uses the model's for both); rounding before the clamp (it clamps, then rounds: the same codes); a guard for
    constant groups (it divides by zero); any number of tokens per forward; padding never enters a group.

    Example: `KIVI(bits=2).encode(keys, values).decode()` with keys and values [batch, kv_heads, tokens, head_dim].
    """

    bits: int = 2
    group_size: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4):
            raise ValueError(f"KIVI: bits must be 2 or 4, got {self.bits!r}")
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(f"KIVI: group_size must be a positive int, got {self.group_size!r}")
        if not isinstance(self.residual, int) or self.residual < 0 or self.residual % self.group_size:
            raise ValueError(
                f"KIVI: residual must be 0 or a multiple of group_size={self.group_size} tokens, got {self.residual!r}"
            )

    def check(self, head_dim: int) -> None:
        for divisor, why in ((self.group_size, "group_size"), (8 // self.bits, f"{self.bits}-bit codes per byte")):
            if head_dim % divisor:
                raise ValueError(f"{self}: head_dim={head_dim} is not a multiple of {divisor} ({why})")

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        return PerChannel(self.bits, self.group_size), PerToken(self.bits, self.group_size)

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        block = self.residual or self.group_size
        return tail // block * block, (tail - self.residual).clamp(min=0)


@dataclass(frozen=True)
class PerChannel:
    """Keys: every channel has its own scale and zero point for `group` consecutive tokens."""

    bits: int
    group: int
    first: ClassVar[None] = None
    writes: ClassVar[bool] = True

    def encode(self, x: Tensor, where: Where, out: Out = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        codes, scale, zero = affine_per_channel(x, self.bits, self.group, out)
        return {"codes": codes}, {"scale": scale, "zero": zero}

    def again(self, packed: Packed, rows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """See `Codec`."""
        assert packed.group_of is not None
        codes, scale, zero, error = affine_per_channel_again(
            packed.rows["codes"], packed.groups["scale"], packed.groups["zero"], packed.group_of, rows, self.bits,
            self.group, packed.dtype,
        )  # fmt: skip
        return {"codes": codes}, {"scale": scale, "zero": zero}, error

    def decode(self, packed: Packed) -> Tensor:
        x = unpack_planar(packed.rows["codes"], self.bits).float()
        scale, zero = packed.groups["scale"], packed.groups["zero"]
        if packed.group_of is None:
            shared = x.view(scale.shape[0], self.group, x.shape[1])
            shared.mul_(scale[:, None]).add_(zero[:, None])
        else:
            x.mul_(packed.group_rows("scale")).add_(packed.group_rows("zero"))
        return cast(x, packed.dtype)

    def scores(self, packed: Packed, query: Tensor) -> Tensor:
        lists, _, channels = query.shape
        if packed.group_of is not None:  # after eviction, rows of a group are neighbours no more
            return query @ self.decode(packed).view(lists, -1, channels).transpose(1, 2)
        codes = packed.rows["codes"].view(lists, -1, channels * self.bits // 8)
        scale, zero = (packed.groups[k].view(lists, -1, channels) for k in ("scale", "zero"))
        return scores_per_channel(query, codes, self.bits, scale, zero)

    def coded(self, packed: Packed) -> Coded:
        form = Format("int", self.bits, "channel", group=self.group)
        scale, zero = packed.groups["scale"], packed.groups["zero"]
        return Coded(form, packed.rows["codes"], scale, zero, packed.group_of)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8

    def group_nbytes(self, head_dim: int) -> int:
        return 4 * head_dim


@dataclass(frozen=True)
class PerToken:
    """Values: every token has its own scale and zero point for `group_size` consecutive channels."""

    bits: int
    group_size: int
    group: ClassVar[int] = 1
    first: ClassVar[None] = None
    writes: ClassVar[bool] = True

    def encode(self, x: Tensor, where: Where, out: Out = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return dict(zip(_PARTS, affine_per_token(x, self.bits, self.group_size, out=out), strict=True)), {}

    def decode(self, packed: Packed) -> Tensor:
        x = unpack_planar(packed.rows["codes"], self.bits).float()
        shared = x.unflatten(1, (-1, self.group_size))
        shared.mul_(packed.rows["scale"][..., None]).add_(packed.rows["zero"][..., None])
        return cast(x, packed.dtype)

    def scores(self, packed: Packed, query: Tensor) -> Tensor:
        return scores_per_token(query, *self._parts(packed, len(query)))

    def mix(self, packed: Packed, weights: Tensor) -> Tensor:
        return mix_per_token(weights, *self._parts(packed, len(weights)))

    def _parts(self, packed: Packed, lists: int) -> tuple[Tensor, int, Tensor, Tensor]:
        codes, scale, zero = (x.unflatten(0, (lists, -1)) for x in map(packed.rows.__getitem__, _PARTS))
        return codes, self.bits, scale, zero

    def coded(self, packed: Packed) -> Coded:
        codes, scale, zero = map(packed.rows.__getitem__, _PARTS)
        return Coded(Format("int", self.bits, "token", self.group_size), codes, scale, zero)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8 + 4 * (head_dim // self.group_size)

    def group_nbytes(self, head_dim: int) -> int:
        return 0


_PARTS = ("codes", "scale", "zero")
