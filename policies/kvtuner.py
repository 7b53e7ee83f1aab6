"""KVTuner: every layer has its own bits for keys and for values, found once per model by a search.

Li et al., "KVTuner: Sensitivity-Aware Layer-wise Mixed Precision KV Cache Quantization for Efficient and Nearly
Lossless LLM Inference", ICML 2025, https://arxiv.org/abs/2502.04420; official code https://github.com/cmd2001/KVTuner.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from kvbench.policies.interface import Quantizer, Step
from kvbench.policies.kivi import PerChannel, PerToken
from kvbench.policies.store import Codec

Pairs = tuple[tuple[int, int], ...]
_BITS = (2, 4, 8)


@dataclass(frozen=True)
class KVTuner(Quantizer):
    """Affine min-max codes as KIVI's, of (key bits, value bits) in {2, 4, 8} x {2, 4, 8} that differ between layers.

        codes, scale and zero of a group x, for the b bits of its layer: see `KIVI`        mode "kivi" | "token"
        keys of mode "kivi":  groups of `group_size` tokens of one channel
        all other:            groups of `group_size` channels of one token

    Per (row, head) with T slots of D channels in a layer of b bits it stores codes uint8 [T, D*b/8], and fp16 scale and
    zero, [T/group_size, D] for keys per channel, else [T, D/group_size]: b + 32/group_size bits per element. Of a
    full-precision tail of n tokens the oldest floor(n/residual)*residual keys per channel are packed, and otherwise all
    tokens but the newest `residual`.

    path: a JSON file {layer: {"nbits_key": b, "nbits_value": b}}, layers numbered from 0 among those that are
        compressed, as scripts/search_kvtuner.py writes it, or the name of a model whose bits are shipped: "proving". A
        key that is no number is a note, and left out.
    pairs: instead of `path`, (key bits, value bits) of every layer.
    group_size: elements that share a scale and a zero point. residual: tokens; in mode "kivi" a multiple of group_size.
    mode: "kivi" (keys per channel) or "token" (keys per token, too).

    Raises ValueError for fields outside these sets, for a file that is missing or is no table of bits, for a model with
    another number of layers, for a head_dim that is not a multiple of group_size and of the codes in a byte, and for
    values whose scale or zero point is beyond fp16 (65504).

    Official defaults: groups of 32 and residual 32 in mode "kivi"; in mode "token" group_size = head_dim, residual 0.
    Deviations. `float_zero`: official code rounds the zero point to a multiple of the scale; here it is the minimum.
    `packed`: official code keeps every code in an int8. `window`: as KIVI's; official code re-quantizes the whole cache
    each time its window is full. `layers_only`: official code can also give each head its own bits. `json`: official
    presets are YAML files of the same table.

    Example: `KVTuner(pairs=((8, 4), (4, 2)))` for a model of two layers.
    """

    path: str | None = None
    pairs: Pairs | None = None
    group_size: int = 32
    residual: int = 32
    mode: str = "kivi"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (self.pairs is None):
            raise ValueError("KVTuner: give either path= (a JSON file, or 'proving') or pairs= (bits of every layer)")
        if self.pairs is not None:
            object.__setattr__(self, "pairs", _checked(self.pairs))
        if self.mode not in ("kivi", "token"):
            raise ValueError(f"KVTuner: mode must be 'kivi' or 'token', got {self.mode!r}")
        if not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(f"KVTuner: group_size must be a positive int, got {self.group_size!r}")
        block = self.group_size if self.mode == "kivi" else 1
        if not isinstance(self.residual, int) or self.residual < 0 or self.residual % block:
            what = f"0 or a multiple of group_size={block}" if block > 1 else "0 or more"
            raise ValueError(f"KVTuner: residual must be {what} tokens, got {self.residual!r}")

    @property
    def bits(self) -> Pairs:
        """(key bits, value bits) of every layer."""
        if self.pairs is not None:
            return self.pairs
        assert self.path is not None
        return _read(self.path)

    def check(self, head_dim: int) -> None:
        fewest = min(b for pair in self.bits for b in pair)
        for divisor, why in ((self.group_size, "group_size"), (8 // fewest, f"{fewest}-bit codes per byte")):
            if head_dim % divisor:
                raise ValueError(f"{self}: head_dim={head_dim} is not a multiple of {divisor} ({why})")

    def codecs(self, step: Step | None = None) -> tuple[Codec, Codec]:
        bits = self.bits
        if step is not None and step.layers not in (1, len(bits)):  # 1: a layer by itself, without a model
            raise ValueError(
                f"{self}: bits are given for {len(bits)} layers, but the model has {step.layers}; "
                "scripts/search_kvtuner.py finds them for it"
            )
        k, v = bits[0 if step is None else step.order]
        keys = PerChannel(k, self.group_size) if self.mode == "kivi" else PerToken(k, self.group_size)
        return keys, PerToken(v, self.group_size)

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        values = (tail - self.residual).clamp(min=0)
        block = self.residual or self.group_size
        return tail // block * block if self.mode == "kivi" else values, values


@cache
def _read(path: str) -> Pairs:
    file = Path(str(files("kvbench"))) / "assets" / "kvtuner" / "proving.json" if path == "proving" else Path(path)
    if not file.is_file():
        raise ValueError(
            f"KVTuner: path={path}: no file {file}; make it with "
            f"python scripts/search_kvtuner.py --model MODEL --text TEXT --out {file}"
        )
    try:
        found = {int(k): v for k, v in json.loads(file.read_text()).items() if k.isdecimal()}
        pairs = [(found[i]["nbits_key"], found[i]["nbits_value"]) for i in range(len(found))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"KVTuner: {file}: no table of bits, {{layer: {{nbits_key, nbits_value}}}} with layers from 0 ({error!r})"
        ) from error
    return _checked(pairs)


def _checked(pairs: Any) -> Pairs:
    """As tuples, which can be hashed."""
    try:
        found = tuple((k, v) for k, v in pairs)
    except (TypeError, ValueError):
        found = ()
    if not found or any(not isinstance(b, int) or b not in _BITS for pair in found for b in pair):
        raise ValueError(f"KVTuner: pairs must be (key bits, value bits) of every layer, each 2, 4 or 8, got {pairs!r}")
    return found
