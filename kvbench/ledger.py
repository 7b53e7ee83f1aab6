"""The byte ledger: every tensor a cache keeps alive, where it is and what it is for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from kvbench.cache import CompressedCache
    from kvbench.policies.interface import KV


@dataclass(frozen=True)
class Part:
    """One tensor of one layer (0: of the whole cache, too). nbytes: its storage, spare capacity included."""

    layer: int
    name: str
    nbytes: int


def ledger(cache: CompressedCache) -> list[Part]:
    """One part per live storage; a storage shared by two names or layers is counted once, where it is met first."""
    parts, met = [], set()
    held = [(i, name, tensor) for i, layer in enumerate(cache.layers) for name, tensor in _tensors(layer)]
    for i, name, tensor in [*held, *((0, name, tensor) for name, tensor in cache.tensors())]:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in met:
            met.add(storage.data_ptr())
            parts.append(Part(i, name, storage.nbytes()))
    return parts


def full_nbytes(layer: Any) -> int:
    """What 16-bit keys and values of every real token this layer has seen (sliding-window layers: holds) would take."""
    kv = getattr(layer, "kv", None)
    if kv is not None:
        return full_token_nbytes(kv) * int(layer.seen.sum())
    return sum(2 * t.numel() for t in (layer.keys, layer.values) if t is not None)


def full_token_nbytes(kv: KV) -> int:
    """What 16-bit keys and values of one token take in one layer."""
    return 2 * sum(held.shape[1] * held.shape[3] for held in (kv.keys, kv.values))


def report(cache: CompressedCache) -> str:
    """A table of what each layer holds; sliding-window layers are listed but hold their own, uncompressed window."""
    rows = [("layer", "seen", "kept", "bits/element", "bytes", "full 16-bit", "ratio")]
    held = [0] * len(cache.layers)
    for part in cache.ledger():
        held[part.layer] += part.nbytes
    for i, layer in enumerate(cache.layers):
        kv = getattr(layer, "kv", None)
        seen, kept, bits = "-", "window" if layer.is_sliding else "-", "-"
        if kv is not None:
            (batch, heads), slots = kv.counts.shape, kv.counts.total
            seen, kept = f"{float(layer.seen.float().mean()):.0f}", f"{slots / batch / heads:.0f}"
            bits = f"{8 * held[i] / (slots * (kv.keys.shape[3] + kv.values.shape[3])):.2f}" if slots else "-"
            if (source := getattr(layer, "source", None)) is not None:
                kept = f"of:{source.index}"
        rows.append((str(i), seen, kept, bits, *_bytes(held[i], full_nbytes(layer))))
    rows.append(("total", "", "", "", *_bytes(cache.nbytes, cache.full_nbytes)))
    return "\n".join(
        [str(cache.policy), *("{:>6} {:>8} {:>8} {:>13} {:>13} {:>13} {:>7}".format(*row) for row in rows)]
    )


def _bytes(held: int, full: int) -> tuple[str, str, str]:
    return f"{held:,}", f"{full:,}", f"{held / full:.3f}" if full else "-"


def _tensors(layer: Any) -> Iterable[tuple[str, Tensor]]:
    if hasattr(layer, "tensors"):
        return layer.tensors()
    return [(name, value) for name, value in vars(layer).items() if isinstance(value, Tensor)]
