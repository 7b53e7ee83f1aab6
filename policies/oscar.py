"""OSCAR: 2-bit codes per token after rotations that are calibrated on what attention asks for.

Zhou et al., "OSCAR: Offline Spectral Covariance-Aware Rotation for 2-bit KV Cache Quantization", 2026,
https://arxiv.org/abs/2605.17757; official code https://github.com/FutureMLS-Lab/OSCAR.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.kernels.decode import Coded
from kvbench.kernels.packing import cast
from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.kivi import PerToken
from kvbench.policies.store import Codec, Packed, Where, mix, scores

SHIPPED = Path(str(files("kvbench"))) / "assets" / "oscar"


@dataclass(frozen=True)
class OSCAR(Quantizer):
    """Affine codes of y = x R, clipped, with one scale for up to 128 channels of one token of one head.

    R [D, D] is orthogonal, one for the keys (after RoPE) and one for the values of a layer, from
    `scripts/calibrate_oscar.py`: the eigenvectors of the covariance of the queries (keys), or of the values weighted by
    how much the queries ask for their keys (values), then a Hadamard matrix, then an order of the channels. In float32,
    with a the |y| in ascending order:

        t = a[floor(clip * D)]        y' = clamp(y, -t, t)
        zero = fp16(min y')           scale = fp16((max y' - min y') / (2**bits - 1))
        code = clamp(round((y' - zero) / scale), 0, 2**bits - 1)        decoded = (code * scale + zero) R^T

    Rounding is half to even; scale = 0 gives codes 0. Per (row, head) with T slots of D channels it stores codes uint8
    [T, D*bits/8] and scale, zero fp16 [T, ceil(D/128)]: 2.25 bits per element at D = 128. Rotations are constants of
    the model, not stored in the cache.

    bits: 2 or 4. path: a folder that the script wrote, or the name of a shipped one: "proving".
    clip_keys, clip_values: shares in (0, 1] of a row's channels that are not clipped, by magnitude.
    residual: so many newest tokens stay in full precision.

    Raises ValueError for fields outside these sets, for a path without an artifact or one of a model with other layers
    or another head_dim (always a power of two), and for values beyond fp16 (65504).

    Official defaults: 2 bits, clips 0.96 and 0.92, 64 sinks, a window of 256 tokens, rotations from 30,000 tokens.
    Deviations. `fp16_metadata`: scale and zero (official code: fp32, +0.25 bits at 128 channels). `rounding`: half to
    even, against the rounded scale (there half up). `fp32`: arithmetic in float32 and rotations in float64, rounded
    (there bf16). `absorbed`: values are turned back after they are summed, not by the weights that follow.

    Example: `CompressedCache(model, OSCAR(path="qwen", sinks=64))`.
    """

    bits: int = 2
    path: str = "proving"
    clip_keys: float = 0.96
    clip_values: float = 0.92
    residual: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits not in (2, 4):
            raise ValueError(f"OSCAR: bits must be 2 or 4, got {self.bits!r}")
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"OSCAR: path must be a calibrated folder or the name of one, got {self.path!r}")
        for name in ("clip_keys", "clip_values"):
            clip = getattr(self, name)
            if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0 < clip <= 1:
                raise ValueError(f"OSCAR: {name} must be a share in (0, 1], got {clip!r}")
        if isinstance(self.residual, bool) or not isinstance(self.residual, int) or self.residual < 0:
            raise ValueError(f"OSCAR: residual must be an int of 0 or more tokens, got {self.residual!r}")

    def check(self, head_dim: int) -> None:
        found = artifact(self.path)
        if head_dim != found.head_dim:
            raise ValueError(found.misfit(f"heads of {head_dim} channels"))

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        order = 0
        if step is not None:
            order, found = step.order, artifact(self.path)
            if step.layers != found.layers:
                raise ValueError(found.misfit(f"{step.layers} layers"))
        return (
            TurnedPerToken(self.path, order, "k", self.bits, self.clip_keys),
            TurnedPerToken(self.path, order, "v", self.bits, self.clip_values),
        )

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        older = (tail - self.residual).clamp(min=0)
        return older, older


@dataclass(frozen=True)
class TurnedPerToken:
    """order: of the layer; side: "k" or "v"."""

    path: str
    order: int
    side: str
    bits: int
    clip: float
    group: ClassVar[int] = 1
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        y = self._turned(x)
        last = min(int(self.clip * x.shape[1]), x.shape[1] - 1)
        limit = y.abs().sort(dim=1).values[:, last, None]
        return self._format(x.shape[1]).encode(y.clamp(-limit, limit), where)

    def decode(self, packed: Packed) -> Tensor:
        y = self._format_of(packed).decode(replace(packed, dtype=torch.float32))
        return cast(self._turned(y, inverse=True), packed.dtype)

    def scores(self, packed: Packed, query: Tensor) -> Tensor:
        """Products do not change when both sides are turned."""
        return scores(replace(packed, codec=self._format_of(packed)), self._turned(query))

    def mix(self, packed: Packed, weights: Tensor) -> Tensor:
        return self._turned(mix(replace(packed, codec=self._format_of(packed)), weights), inverse=True)

    def coded(self, packed: Packed) -> Coded:
        form = self._format_of(packed)
        return replace(form.coded(replace(packed, codec=form)), rotation=self._turned)

    def row_nbytes(self, head_dim: int) -> int:
        return self._format(head_dim).row_nbytes(head_dim)

    def group_nbytes(self, head_dim: int) -> int:
        return 0

    def _format(self, head_dim: int) -> PerToken:
        return PerToken(self.bits, min(head_dim, 128))

    def _format_of(self, packed: Packed) -> PerToken:
        return self._format(packed.rows["codes"].shape[1] * 8 // self.bits)

    def _turned(self, x: Tensor, inverse: bool = False) -> Tensor:
        """[..., D] float32; in float64 meanwhile: the order of summation, which depends on the rows, does not show."""
        turn = rotation(self.path, self.order, self.side, x.device)
        return (x.double() @ (turn.T if inverse else turn)).float()


# ---------------------------------------------------------------- rotations


@dataclass(frozen=True, eq=False)
class Artifact:
    """What scripts/calibrate_oscar.py writes: oscar.json vouches for oscar.safetensors, with the tensors k and v,
    float32 [layers, D, D]; rows are multiplied from the left."""

    folder: Path
    k: Tensor
    v: Tensor

    @property
    def layers(self) -> int:
        return self.k.shape[0]

    @property
    def head_dim(self) -> int:
        return self.k.shape[1]

    def misfit(self, model: str) -> str:
        return (
            f"OSCAR: the rotations in {self.folder} are for {self.layers} layers with heads of {self.head_dim} "
            f"channels, but the model has {model}; make some for it: {command('FOLDER')}"
        )


def command(folder: str) -> str:
    return f"python scripts/calibrate_oscar.py --model MODEL --text FILE --out {folder}"


@cache
def artifact(path: str) -> Artifact:
    """Both files at `path`, a folder or the name of a shipped one, checked against each other."""
    from safetensors.torch import load

    folder = next((f for f in (Path(path), SHIPPED / path) if (f / "oscar.json").is_file()), None)
    if folder is None:
        raise ValueError(f"OSCAR: no rotations at path={path!r}; make them: {command(path)}")
    weights = folder / "oscar.safetensors"
    try:
        about, data = json.loads((folder / "oscar.json").read_text()), weights.read_bytes()
        if about["format"] != 1 or about["sha256"] != hashlib.sha256(data).hexdigest():
            raise ValueError("they are not of one run")
        tensors, shape = load(data), (about["layers"], about["head_dim"], about["head_dim"])
        if {side: tuple(x.shape) for side, x in tensors.items()} != {"k": shape, "v": shape}:
            raise ValueError(f"k and v must be {list(shape)}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"OSCAR: {weights} and oscar.json cannot be read ({error}); make them again: {command(str(folder))}"
        ) from error
    return Artifact(folder, tensors["k"], tensors["v"])


@cache
def rotation(path: str, order: int, side: str, device: torch.device) -> Tensor:
    """[D, D] float64 of layer number `order`."""
    found = artifact(path)
    return (found.k if side == "k" else found.v)[order].to(device).double()
