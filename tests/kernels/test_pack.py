"""Quantize and pack: the kernels store the very bytes of the PyTorch reference, whatever the rows.

Without a GPU the kernels run in Triton's interpreter (see tests/conftest.py), with one they run on it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.kernels import choice, pack
from kvbench.kernels.pack import Turn, reference
from kvbench.kernels.packing import decode_e2m1, decode_e4m3, decode_e5m2
from kvbench.policies import FP8, KIVI, NVFP4, IntToken

pytest.importorskip("triton")
from kvbench.kernels.pack import triton as kernels

HALF = torch.float16
TURNS = {"plain": None, "whole": Turn(), "blocks": Turn(16), "signs": Turn(None, torch.tensor([1.0, -1, -1, 1] * 32))}


def drawn(rows: int, channels: int, dtype: torch.dtype = HALF) -> Tensor:
    """Channels of very different sizes, with rows of one value, of zeros of both signs, and with one huge element."""
    x = torch.randn(rows, channels) * torch.randn(channels).exp()
    special = [torch.zeros(channels), torch.full((channels,), -0.7), torch.tensor([0.0, -0.0]).repeat(channels // 2)]
    for row, values in zip(range(1, rows), special, strict=False):
        x[row] = values
    if rows > 4:
        x[4, 3] = 3e4
    return x.to(dtype)


def same(function: str, x: Tensor, device: torch.device, *args: Any) -> None:
    """Both implementations of `function` give the same bytes."""
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    if moved and isinstance(moved[-1], Turn) and moved[-1].signs is not None:
        moved[-1] = moved[-1]._replace(signs=moved[-1].signs.to(device))
    got, expected = getattr(kernels, function)(x.to(device), *moved), getattr(reference, function)(x, *args)
    for mine, wanted in zip(*((r,) if isinstance(r, Tensor) else r for r in (got, expected)), strict=True):
        assert mine.dtype == wanted.dtype and mine.shape == wanted.shape
        assert mine.cpu().contiguous().numpy().tobytes() == wanted.contiguous().numpy().tobytes()


@pytest.mark.parametrize(
    ("bits", "group", "groups", "channels", "dtype"),
    [(2, 32, 3, 64, HALF), (4, 32, 1, 96, torch.bfloat16), (2, 24, 2, 80, torch.float32), (8, 1, 7, 64, HALF),
     (4, 16, 0, 64, HALF)],
)  # fmt: skip
def test_scales_per_channel(
    bits: int, group: int, groups: int, channels: int, dtype: torch.dtype, device: torch.device
) -> None:
    same("affine_per_channel", drawn(group * groups, channels, dtype), device, bits, group)


@pytest.mark.parametrize(
    ("bits", "width", "channels", "dtype"),
    [(2, 32, 128, HALF), (4, 32, 96, torch.bfloat16), (2, 32, 96, torch.float32), (2, 20, 80, HALF), (4, 64, 64, HALF)],
)
def test_scales_per_token_and_group_of_channels(
    bits: int, width: int, channels: int, dtype: torch.dtype, device: torch.device
) -> None:
    for rows in (0, 1, 37):
        same("affine_per_token", drawn(rows, channels, dtype), device, bits, width)


@pytest.mark.parametrize("turn", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize(("bits", "clip"), [(8, 1.0), (4, 0.95), (2, 1.0)])
def test_one_scale_per_token(bits: int, clip: float, turn: Turn | None, device: torch.device) -> None:
    x = drawn(35, 128)
    same("affine_per_token", x, device, bits, 128, clip, turn)
    same("symmetric_per_token", x, device, bits, clip, turn)


@pytest.mark.parametrize("channels", [80, 96])
def test_rotated_rows_that_do_not_fill_a_power_of_two(channels: int, device: torch.device) -> None:
    for block in (None, 16):
        same("affine_per_token", drawn(9, channels), device, 4, channels, 0.9, Turn(block))
        same("e2m1_blocks", drawn(9, channels), device, 0.7, Turn(block))


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_8_bit_floats(form: str, device: torch.device) -> None:
    x = drawn(37, 80)
    same("float8", x, device, form, 0.37)
    same("float8", x, device, form, torch.rand(37, 1) + 0.1)
    same("float8_per_token", x, device, form)
    same("float8_per_token", drawn(3, 64, torch.bfloat16), device, form)


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_every_8_bit_float_and_what_lies_between(form: str, device: torch.device) -> None:
    decode = {"e4m3": decode_e4m3, "e5m2": decode_e5m2}[form]
    finite = decode(torch.arange(256, dtype=torch.uint8))
    finite = finite[finite.isfinite()].unique()
    between = (finite[1:] + finite[:-1]) / 2  # ties
    around = [between.nextafter(torch.tensor(s * torch.inf)) for s in (-1, 1)]
    beyond = torch.tensor([500.0, -500, 6e4, -6e4, 1e30, -1e30, 1e-30, 0, -0.0])
    x = torch.cat([finite, between, *around, beyond])
    same("float8", torch.nn.functional.pad(x, (0, -len(x) % 64)).view(-1, 64), device, form, 1.0)


@pytest.mark.parametrize("tensor_scale", [1.0, 0.013, 40.0])
@pytest.mark.parametrize("turn", ["plain", "whole", "signs"])
def test_4_bit_floats_in_blocks(tensor_scale: float, turn: str, device: torch.device) -> None:
    for rows, dtype in ((0, HALF), (1, torch.float32), (35, torch.bfloat16)):
        same("e2m1_blocks", drawn(rows, 128, dtype), device, tensor_scale, TURNS[turn])


def test_every_4_bit_float_and_what_lies_between(device: torch.device) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.cat([decode_e2m1(torch.arange(16, dtype=torch.uint8)[:, None]).flatten(), ties, -ties])
    x = torch.cat([x, *(x.nextafter(torch.tensor(s * torch.inf)) for s in (-1, 1))])
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 15)).view(-1, 15)
    x = torch.nn.functional.pad(blocks, (1, 0), value=6.0)  # the largest of a block, which makes its scale 1
    assert reference.e2m1_blocks(x, 6.0)[1].unique().tolist() == [0x38]
    same("e2m1_blocks", x, device, 6.0)


@settings(max_examples=12)
@given(st.data())
def test_any_rows(data: st.DataObject) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    bits, rows = data.draw(st.sampled_from([2, 4, 8])), data.draw(st.integers(1, 40))
    channels = data.draw(st.sampled_from([16, 48, 64, 80, 128]))
    x = drawn(rows, channels, data.draw(st.sampled_from([HALF, torch.bfloat16, torch.float32])))
    x = x * data.draw(st.sampled_from([1e-6, 1.0, 2.0]))
    width = data.draw(st.sampled_from([w for w in (16, 20, 24, 32, channels) if channels % w == 0]))
    same("affine_per_token", x, device, bits, width)
    same("affine_per_channel", x, device, bits, data.draw(st.sampled_from([g for g in range(1, 41) if rows % g == 0])))
    same("symmetric_per_token", x, device, bits, data.draw(st.sampled_from([1.0, 0.8])), data.draw(st.sampled_from(
        [None, Turn(), Turn(8)])))  # fmt: skip
    same("float8_per_token", x, device, data.draw(st.sampled_from(["e4m3", "e5m2"])))
    same("e2m1_blocks", x, device, data.draw(st.floats(0.01, 10.0)), data.draw(st.sampled_from([None, Turn()])))


POLICIES: Sequence[Any] = [
    KIVI(2, 16, 16), KIVI(4, 8, 8), IntToken(4), IntToken(8, rotate=True), IntToken(2, clip=0.9),
    IntToken(4, symmetric=True, rotate=True, block=16), FP8(), FP8(per_token=True), FP8(format="e5m2", key_scale=0.5),
    FP8(checkpoint="proving_head"), NVFP4(), NVFP4(rotate=True),
]  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_policies_are_packed_by_the_kernels(policy: Any, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    keys, values = (torch.randn(1, 2, 33, 32, device=device, dtype=HALF) for _ in range(2))
    monkeypatch.setenv("KVBENCH_BACKEND", "torch")
    expected = policy.encode(keys, values)
    monkeypatch.setenv("KVBENCH_BACKEND", "interpret" if device.type == "cpu" else "triton")
    ran = []
    for name in pack.__all__:
        function = getattr(kernels, name, None)
        if callable(function) and name != "Turn":
            spy: Callable = lambda *args, f=function: ran.append(f) or f(*args)  # noqa: E731
            monkeypatch.setattr(kernels, name, spy)
    got = policy.encode(keys, values)
    assert len(ran) == 2
    for mine, wanted in ((got.keys, expected.keys), (got.values, expected.values)):
        for (name, a), (_, b) in zip(mine.tensors(), wanted.tensors(), strict=True):
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), name


def test_scales_beyond_fp16_are_refused(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv("KVBENCH_BACKEND", "interpret" if device.type == "cpu" else "triton")
    x = torch.full((4, 32), -7e4, device=device)
    for function, size in ((pack.affine_per_channel, 4), (pack.affine_per_token, 32)):
        with pytest.raises(ValueError, match="stored as fp16.* reach 70000"), pytest.warns() as _:  # numpy's overflow
            function(x, 4, size)


def test_why_pytorch_runs_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("KVBENCH_BACKEND", "triton")
    monkeypatch.setattr(choice, "_said", set())
    with caplog.at_level(logging.WARNING, logger="kvbench"):
        for _ in range(2):
            pack.float8(torch.ones(2, 32), "e4m3", 1.0)
    assert len(caplog.messages) == 1 and "tensors are on cpu" in caplog.messages[0]
    monkeypatch.setenv("KVBENCH_BACKEND", "cuda")
    with pytest.raises(ValueError, match="must be one of torch, triton, interpret, got 'cuda'"):
        pack.float8(torch.ones(2, 32), "e4m3", 1.0)


SIGNATURE = {
    "x": "*bf16", "codes": "*u8", "scale": "*fp16", "zero": "*fp16", "signs": "*fp32", "factor": "fp32", "rows": "i32",
    "clip": "fp32", "common": "fp32", "tensor_scale": "fp32", "step": "fp32",
}  # fmt: skip
ROWS = {"D": 128, "R": 32, "D2": 128}
TURNED = {"STAGES": 7, "SIGNS": False, "TURNS": True}
STRAIGHT = {"STAGES": 0, "SIGNS": False, "TURNS": False}
INT4 = {"BITS": 4, "WIDTH": 128, "CLIPS": False, "SYMMETRIC": False, "W2": 64, "J2": 1, "G2": 128}
KIVI2 = {"BITS": 2, "WIDTH": 32, "CLIPS": False, "SYMMETRIC": False, "W2": 32, "J2": 4, "G2": 32}
BUILDS = {  # kernel, constants, type of scale, instructions per element
    "keys of KIVI 2": ("channel_kernel", {"D": 128, "BITS": 2, "GROUP": 32, "G2": 32, "W2": 32}, "*fp16", 85),
    "values of KIVI 2": ("token_kernel", ROWS | KIVI2 | STRAIGHT, "*fp16", 85),
    "INT4, rotated": ("token_kernel", ROWS | INT4 | TURNED, "*fp16", 130),
    "FP8 per token": ("float8_kernel", ROWS | {"MANTISSA": 3, "READS": False, "WRITES": True}, "*fp32", 45),
    "NVFP4": ("e2m1_kernel", ROWS | STRAIGHT, "*u8", 100),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", BUILDS)
def test_builds(name: str, capability: int, compiled: Callable) -> None:
    kernel, constants, scale, most = BUILDS[name]
    built = compiled(getattr(kernels, kernel), SIGNATURE | {"scale": scale}, constants, capability)
    assert built.shared <= 32 * 1024
    assert built.sass["I2F"] == built.sass["F2I"] == built.sass["STL"] == 0
    elements = (32 if kernel != "channel_kernel" else constants["GROUP"]) * constants["D"] // 128  # of each thread
    assert sum(built.sass.values()) <= most * elements
    assert built.sass["LDG"] <= elements // 2  # several elements at a time


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, torch.float32])
def test_large_on_a_gpu(dtype: torch.dtype, device: torch.device) -> None:
    x = drawn(32 * 500, 128, dtype)
    same("affine_per_channel", x, device, 2, 32)
    same("affine_per_token", x, device, 2, 32)
    for turn in TURNS.values():
        same("affine_per_token", x, device, 4, 128, 0.95, turn)
        same("symmetric_per_token", x, device, 8, 1.0, turn)
        same("e2m1_blocks", x, device, 0.9, turn)
    same("float8_per_token", x, device, "e4m3")
