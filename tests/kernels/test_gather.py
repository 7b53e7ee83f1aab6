"""Rows moved together after an eviction: the kernel against `index_select`, and its use by packed caches.

Without a GPU the kernel runs in Triton's interpreter (see tests/conftest.py), with one it runs on it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvbench.kernels.gather import reference, renumber
from kvbench.policies import KIVI, NVFP4, IntToken
from kvbench.policies.interface import KV

pytest.importorskip("triton")
from kvbench.kernels.gather import triton as kernels


def tensors(rows: int) -> list[Tensor]:
    """What packed caches hold per row: codes, scales, references, positions, and shapes that no word divides."""
    return [
        torch.randint(0, 255, (rows, 32), dtype=torch.uint8), torch.randn(rows, 5).half(), torch.randn(rows, 1),
        torch.randint(0, 99, (rows,), dtype=torch.int16), torch.randint(0, 99, (rows,)),
        torch.randint(0, 255, (rows, 3, 7), dtype=torch.uint8), torch.rand(rows) > 0.5,
        torch.randn(rows, 4, 4).bfloat16(), torch.randn(rows, 0), torch.randn(8, rows).half().t(),
        torch.randint(0, 255, (rows + 1, 3), dtype=torch.uint8)[1:],
    ]  # fmt: skip


@pytest.mark.parametrize(("rows", "kept"), [(50, 70), (50, 0), (3, 1), (300, 299)])
@pytest.mark.parametrize("amount", [1, 4, 11])
def test_rows_are_moved(rows: int, kept: int, amount: int, device: torch.device) -> None:
    some, index = [x.to(device) for x in tensors(rows)[:amount]], torch.randint(0, rows, (kept,), device=device)
    moved = kernels.take_rows(some, index)
    for got, wanted in zip(moved, reference.take_rows(some, index), strict=True):
        assert got.dtype == wanted.dtype and got.is_contiguous() and torch.equal(got, wanted)
        assert got.untyped_storage().nbytes() == got.numel() * got.element_size()


@pytest.mark.parametrize("rows", [0, 1, 100])
def test_groups_are_counted_anew_as_unique_does(rows: int) -> None:
    group_of = torch.randint(0, 40, (rows,)) * 2
    for got, wanted in zip(renumber(group_of, 80), group_of.unique(return_inverse=True), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("policy", [KIVI(2, 8, 8), IntToken(4), NVFP4()], ids=str)
def test_evicted_caches_are_moved_by_the_kernel(
    policy: object, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    keys, values = torch.randn(2, 2, 2, 48, 32, device=device).unbind()
    keep = torch.stack([torch.randperm(48)[:21].sort().values for _ in range(4)]).view(2, 2, 21).to(device)
    kv: KV = policy.encode(keys, values)  # type: ignore[attr-defined]
    kv = kv.with_columns(
        attention=torch.rand(2, 2, 48, device=device), page=torch.arange(48, device=device).expand(2, 1, -1)
    )
    found: list[KV] = []
    ran: list[torch.dtype] = []
    function = kernels.take_rows
    monkeypatch.setattr(
        kernels, "take_rows", lambda some, *args: ran.extend(x.dtype for x in some) or function(some, *args)
    )
    for backend in ("torch", "interpret" if device.type == "cpu" else "triton"):
        monkeypatch.setenv("KVBENCH_BACKEND", backend)
        found.append(kv.gather(keep).gather(keep[..., :9] % 21))
        assert bool(ran) == (backend != "torch")
    # Codes, and what rides with slots: scores, positions (shared by heads until they part), and other columns.
    assert {torch.uint8, torch.float32, torch.int32, torch.int64} <= set(ran)
    for name, column in found[0].columns.items():
        assert torch.equal(column, found[1].columns[name]), name
    monkeypatch.setenv("KVBENCH_BACKEND", "torch")
    for a, b in zip(*((kv.keys, kv.values) for kv in found), strict=True):
        for (name, x), (_, y) in zip(a.tensors(), b.tensors(), strict=True):
            assert torch.equal(x, y), name
        assert a.nbytes == b.nbytes


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_builds(capability: int, compiled: Callable) -> None:
    pointers = dict.fromkeys(("a", "b", "c", "d", "to_a", "to_b", "to_c", "to_d"), "*i32")
    signature = pointers | {"index": "*i64", "rows": "i32", "d": "*i16", "to_d": "*i16"}
    widths = {"A": 16, "B": 2, "C": 2, "D": 1, "A2": 16, "B2": 2, "C2": 2, "D2": 1}  # INT4 at D = 128, and a reference
    built = compiled(kernels.take_kernel, signature, widths | {"R": 128}, capability)
    assert built.shared <= 16 * 1024 and built.sass["STL"] == built.sass["I2F"] == 0
    assert sum(built.sass.values()) <= 400


@pytest.mark.gpu
def test_large_on_a_gpu(device: torch.device) -> None:
    some, index = [x.to(device) for x in tensors(2**20)], torch.randint(0, 2**20, (2**19,), device=device)
    for got, wanted in zip(kernels.take_rows(some, index), reference.take_rows(some, index), strict=True):
        assert torch.equal(got, wanted)
