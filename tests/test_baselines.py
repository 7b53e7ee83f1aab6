"""Transformers' quantized caches: built where their backend is installed, and really as small as they say."""

from types import SimpleNamespace

import pytest
import torch
from transformers import cache_utils
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from kvbench.baselines import BASELINES, held_nbytes, quantized_cache

INSTALLED = {
    "quanto": is_optimum_quanto_available(),
    "hqq": is_hqq_available(),
    "fp8": hasattr(cache_utils, "Fp8QuantizedLayer"),  # not in older releases of transformers
}


@pytest.mark.parametrize("name", BASELINES)
def test_bytes_after_a_prompt_and_decoding(name, tiny) -> None:
    backend, options = BASELINES[name]
    if not INSTALLED[backend]:
        pytest.skip(f"the {backend} backend is not installed")
    model, _ = tiny
    cache = quantized_cache(name, model)
    assert held_nbytes(cache) == 0
    ids = torch.randint(2, 250, (1, 256))
    with torch.no_grad():
        model(ids, past_key_values=cache)
        packed, elements = held_nbytes(cache), 2 * 2 * 2 * 256 * 32  # layers, sides, heads
        if backend == "fp8":
            assert packed == elements + 2 * 2 * 4  # a byte each, and a scale for keys and for values of each layer
        else:
            assert elements * options["nbits"] / 8 < packed < elements * (options["nbits"] / 8 + 0.25)
        model(ids[:, :1], past_key_values=cache)
    more = 2 * 2 * 2 * 32
    assert held_nbytes(cache) == packed + more * (1 if backend == "fp8" else 4)
    assert cache.get_seq_length() == 257


@pytest.mark.parametrize("name", BASELINES)
def test_a_backend_that_is_missing_is_named(name, tiny) -> None:
    backend, _ = BASELINES[name]
    if INSTALLED[backend]:
        pytest.skip(f"the {backend} backend is installed")
    with pytest.raises(ValueError, match=rf"{name}: (You need to install|Unknown) .*\(pip install "):
        quantized_cache(name, tiny[0])


def test_unknown_names_and_options_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match="no baseline named 'hf_int4'; there are: hf_quanto2, "):
        quantized_cache("hf_int4", tiny[0])
    with pytest.raises(ValueError, match=r"hf_hqq4: .*\(pip install hqq\)"):
        quantized_cache("hf_hqq4", tiny[0], nbits=5)


class Wrapped(torch.Tensor):
    """A tensor whose data is another one's, as quanto makes them."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, (4 * data.numel(),), dtype=torch.float32)

    def __init__(self, data):
        self.data_held = data

    def __tensor_flatten__(self):
        return ["data_held"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


def test_wrappers_metadata_and_views_are_counted_once() -> None:
    codes, scale, base = torch.zeros(10, dtype=torch.uint8), torch.zeros(3), torch.zeros(100)
    layers = [
        SimpleNamespace(_quantized_keys=Wrapped(codes), keys=torch.zeros(0), nbits=4),
        SimpleNamespace(_quantized_values=(codes, {"scale": scale, "shape": (1, 2)}), values=[base[:2], base[5:]]),
    ]
    assert held_nbytes(SimpleNamespace(layers=layers)) == 10 + 12 + 400
