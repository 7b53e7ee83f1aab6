"""Decode attention compiled for GPUs that need not be there: memory, registers, and instructions per element."""

from types import ModuleType
from typing import Any

import pytest
import torch

from kvbench import backend
from kvbench.policies import FP8, KIVI, NVFP4, IntToken, Quantizer
from kvbench.policies.interface import KV

pytest.importorskip("triton")
from kvbench.kernels.decode import triton as kernels

DIM, SLOTS = 128, 256
KERNELS = ("split_attention", "merge_splits", "sum_probabilities")


@pytest.fixture
def launched(compiling: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What each kernel is launched with, for 4 query heads per key-value head: {name: arguments of `compiled`}."""

    def launched(quantizer: Quantizer | None, dtype: torch.dtype, evicted: bool, native: bool) -> dict[str, Any]:
        keys, values = torch.randn(2, 1, 2, SLOTS, DIM, dtype=dtype)
        kv = KV.of(keys, values) if quantizer is None else quantizer.encode(keys, values)
        if evicted:
            kv = kv.gather(torch.arange(0, SLOTS, 2).expand(1, 2, -1))
        kv = kv.append(*torch.zeros(2, 1, 2, 1, DIM, dtype=dtype), None, torch.tensor([SLOTS]))
        query, total = torch.zeros(1, 8, 1, DIM, dtype=dtype), kv.counts.per_head.flatten().int()
        sides = [backend.side(held, 1) for held in (kv.keys, kv.values)]
        recorders = {name: compiling.Recorder(getattr(kernels, name)) for name in KERNELS}
        with monkeypatch.context() as patch:
            for name, recorder in recorders.items():
                patch.setattr(kernels, name, recorder)
            kernels.packed_decode(
                query, *sides, torch.tensor([[SLOTS]]), kv.position, total, scaling=0.1, sums=True, native=native
            )
        return {name: recorder.launches[0] for name, recorder in recorders.items()}

    return launched


@pytest.mark.parametrize(
    ("quantizer", "dtype", "capability", "evicted", "most"),
    [
        (None, torch.bfloat16, 90, False, 3.6),
        (KIVI(2, 32, 0), torch.float16, 90, False, 8.5),
        (KIVI(4, 32, 0), torch.float16, 90, True, 7.8),
        (IntToken(4), torch.bfloat16, 100, False, 7.0),
        (FP8(), torch.float16, 90, False, 5.2),
        (NVFP4(), torch.float16, 80, False, 8.9),
    ],
    ids=str,
)
def test_attention_fits_and_stays_within_its_instructions(
    quantizer: Quantizer | None, dtype: torch.dtype, capability: int, evicted: bool, most: float, launched: Any,
    compiled: Any, compiling: ModuleType,
) -> None:  # fmt: skip
    """most: instructions per element of keys and values in the loop over packed slots, a tenth above what was seen."""
    launch = launched(quantizer, dtype, evicted, native=capability >= 89)["split_attention"]
    built = compiled(kernels.split_attention, capability=capability, **launch)
    assert built.shared <= compiling.MOST_SHARED[capability]
    packed = min((loop for loop in built.loops if loop["HMMA"]), key=lambda loop: loop["LDG"])
    assert not packed["STL"] and not packed["LDL"]
    assert not any(packed[name] for name in packed if name.startswith("I2F"))
    elements = 2 * launch["constexprs"]["N"] * DIM / (32 * launch["num_warps"])
    assert sum(packed.values()) / elements <= most, packed


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_small_kernels_build(capability: int, launched: Any, compiled: Any) -> None:
    launches = launched(IntToken(4), torch.bfloat16, False, native=False)
    for name in KERNELS[1:]:
        assert compiled(getattr(kernels, name), capability=capability, **launches[name]).registers <= 64
