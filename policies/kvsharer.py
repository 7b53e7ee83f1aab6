"""KVSharer: some layers hold no keys and values and read those of an earlier, unlike layer.

Yang et al., "KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing", 2024,
https://arxiv.org/abs/2410.18517; official code https://github.com/yangyifei729/KVSharer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from kvbench.policies.interface import KV, Policy, Step

Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class KVSharer(Policy):
    """Layer i of a pair (i, j), j < i, attends with its own queries to what layer j holds, and holds nothing itself.

        out_i = softmax(Q_i K_j^T * scaling) V_j        Q_i [B, Hq, T, D]; K_j, V_j [B, H, S, D] with layer j's slots

    K_j and V_j are those layer j itself attended to in this forward: with its new tokens, before anything is evicted or
    packed. In prefill and decoding alike, so even the prompt is read otherwise than by the model. A layer that shares
    takes no bytes; a byte budget (memory=) of an evictor in the stack is spent on the others. Stacks with any evictor
    and any quantizer, in any order: `H2O(0.25) | KIVI(2) | KVSharer("proving")`; they act on layer j alone, by the
    queries of layer j alone, and layer i reads what is left. Selectors choose for each layer by its own queries.

    path: a JSON file of pairs as scripts/search_kvsharer.py writes it, or the name of a model whose pairs are shipped:
        "proving".
    pairs: instead of `path`, (layer that shares, earlier layer that it reads). Layers are numbered from 0 among those
        that are compressed: sliding-window layers are left alone. A source that shares itself passes on what it reads:
        ((3, 2), (2, 0)) is ((3, 0), (2, 0)).
    layers: how many layers share: the first of the pairs, which a search lists in the order it took them; None: all.

    Raises ValueError for a layer that is given a source after it, or two; for more layers than there are pairs; for a
    file that is missing or holds no pairs; for a model with another number of layers than the pairs are for, or whose
    layers of a pair have other heads or stand on other devices; and with block=: feed such prompts in pieces.

    Official defaults: 4 of 32 layers in the example (the paper: a quarter), similarity above 0.5 in the search.
    Deviations. `threshold`: the proving model's pair was searched with 0.95, as one of four layers weighs more. `json`:
    official code prints the map {layer: layer it reads} and takes it as an argument. `stacked`: official code neither
    evicts nor quantizes. As there, the keys and values a layer does not use are still computed.

    Example: `KVSharer(pairs=((3, 1),))`
    """

    path: str | None = None
    pairs: Pairs | None = None
    layers: int | None = None

    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.path is None) == (self.pairs is None):
            raise ValueError(
                "KVSharer: give either path= (a JSON file, or 'proving') or pairs= ((layer, layer it reads), ...)"
            )
        if self.layers is not None and (not _is_count(self.layers) or self.layers < 1):
            raise ValueError(f"KVSharer: layers must be an int of at least 1, or None, got {self.layers!r}")
        if self.pairs is not None:
            object.__setattr__(self, "pairs", _checked(self.pairs, "pairs"))
            self._first(self.pairs)

    def sources(self, layers: int) -> Mapping[int, int]:
        if layers == 1:  # a layer by itself, without a model
            return {}
        if self.path is not None:
            made_for, pairs = _read(self.path)
            if made_for != layers:
                raise ValueError(
                    f"{self}: pairs are given for {made_for} layers, but the model has {layers}; "
                    "scripts/search_kvsharer.py finds them for it"
                )
        else:
            assert self.pairs is not None
            pairs = self.pairs
        found = dict(self._first(pairs))
        if max(found) >= layers:
            raise ValueError(
                f"{self}: there is no layer {max(found)}: the model has layers 0 to {layers - 1} that can share"
            )
        for layer in sorted(found):  # sources are done before
            found[layer] = found.get(found[layer], found[layer])
        return found

    def __call__(self, kv: KV, step: Step) -> KV:
        return kv

    def _first(self, pairs: Pairs) -> Pairs:
        if self.layers is not None and self.layers > len(pairs):
            raise ValueError(f"KVSharer: layers={self.layers}, but there are only {len(pairs)} pairs")
        return pairs[: self.layers]


@cache
def _read(path: str) -> tuple[int, Pairs]:
    """(layers of the model, pairs in the order they were found)."""
    file = Path(str(files("kvbench"))) / "assets" / "kvsharer" / "proving.json" if path == "proving" else Path(path)
    if not file.is_file():
        raise ValueError(
            f"KVSharer: path={path}: no file {file}; make it with "
            f"python scripts/search_kvsharer.py --model MODEL --text TEXT --out {file}"
        )
    try:
        found = json.loads(file.read_text())
        layers, pairs = found["layers"], found["pairs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"KVSharer: {file}: no {{layers, pairs}} in JSON ({error!r})") from error
    pairs = _checked(pairs, f"{file}: pairs")
    if not _is_count(layers) or max(layer for layer, _ in pairs) >= layers:
        raise ValueError(f"KVSharer: {file}: layers must be an int above every layer of a pair, got {layers!r}")
    return layers, pairs


def _checked(pairs: Any, what: str) -> Pairs:
    """As tuples, which can be hashed."""
    try:
        found = tuple((layer, source) for layer, source in pairs)
    except (TypeError, ValueError):
        found = ()
    if not found or not all(_is_count(number) for pair in found for number in pair):
        raise ValueError(f"KVSharer: {what} must be (layer, earlier layer it reads), ints from 0, got {pairs!r}")
    met = set()
    for layer, source in found:
        if source >= layer:
            raise ValueError(f"KVSharer: {what}: layer {layer} cannot read layer {source}: a source must come before")
        if layer in met:
            raise ValueError(f"KVSharer: {what}: layer {layer} is given two sources; one is allowed")
        met.add(layer)
    return found


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
