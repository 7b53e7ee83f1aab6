"""Transformers' own quantized caches, as baselines: built by name, and measured by every tensor they keep alive.

They are not KIVI, whatever their documentation says: a prompt is packed whole, keys per token by default, and with
"quanto" and "hqq" everything held is decoded and packed again each time a window of 128 tokens is full.

    >>> from kvbench.baselines import held_nbytes, quantized_cache
    >>> cache = quantized_cache("hf_fp8", model)
    >>> model.generate(ids, past_key_values=cache)
    >>> held_nbytes(cache)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import QuantizedCache

from kvbench.policies.interface import KV, Policy, Step

BASELINES: Mapping[str, tuple[str, dict[str, int]]] = {
    "hf_quanto2": ("quanto", {"nbits": 2}),
    "hf_quanto4": ("quanto", {"nbits": 4}),
    # HQQ counts axes otherwise: its 1 is per token, as quanto's 0; its own 0 mixes heads and distant tokens.
    "hf_hqq2": ("hqq", {"nbits": 2, "axis_key": 1, "axis_value": 1}),
    "hf_hqq4": ("hqq", {"nbits": 4, "axis_key": 1, "axis_value": 1}),
    "hf_fp8": ("fp8", {}),
}
_INSTALL = {"quanto": "pip install optimum-quanto", "hqq": "pip install hqq", "fp8": "pip install -U transformers"}


class BaselineError(ValueError):
    """A baseline that cannot be had here, or not in this place."""


@dataclass(frozen=True)
class Baseline(Policy):
    """Stands for one of transformers' caches in a sweep. It packs by itself, so nothing can be stacked with it."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in BASELINES:
            raise ValueError(f"no baseline named {self.name!r}; there are: {', '.join(BASELINES)}")

    def __call__(self, kv: KV, step: Step) -> KV:
        raise BaselineError(f"{self} is a cache of transformers, not a policy: it cannot be stacked or hooked")


def quantized_cache(name: str, model: PreTrainedModel, **options: int) -> QuantizedCache:
    """A fresh cache for `model`. options: those of transformers' QuantizedCache, such as q_group_size, over defaults.

    Raises ValueError for an unknown name, BaselineError for a backend that is not installed or refuses the options.
    """
    if name not in BASELINES:
        raise ValueError(f"no baseline named {name!r}; there are: {', '.join(BASELINES)}")
    backend, defaults = BASELINES[name]
    try:
        return QuantizedCache(backend, model.config, **{**defaults, **options})
    except (ImportError, ValueError) as error:
        raise BaselineError(f"{name}: {' '.join(str(error).split())} ({_INSTALL[backend]})") from error


def full_nbytes(cache: QuantizedCache, model: PreTrainedModel) -> int:
    """What a 16-bit cache of the tokens seen so far would hold."""
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return cache.get_seq_length() * len(cache.layers) * 2 * config.num_key_value_heads * head_dim * 2


def held_nbytes(cache: QuantizedCache) -> int:
    """Bytes of every storage that the layers keep alive: codes, scales, zero points, windows."""
    storages = {}
    for layer in cache.layers:
        for tensor in _tensors(vars(layer)):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(held: Any) -> Iterator[Tensor]:
    """What is really stored: quanto's tensors are wrappers around others, HQQ's come with a dict of metadata."""
    if isinstance(held, Tensor):
        if hasattr(held, "__tensor_flatten__"):
            for name in held.__tensor_flatten__()[0]:
                yield from _tensors(getattr(held, name))
        else:
            yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, (list, tuple)):
        for value in held:
            yield from _tensors(value)
