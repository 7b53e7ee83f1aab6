"""NVFP4 against its definition in plain loops, every code at every scale, and stored bytes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbench.kernels.packing import decode_e2m1, decode_e4m3, pack_interleaved, unpack_interleaved
from kvbench.policies import KV, NVFP4

F32 = np.float32
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127]


def nearest(x: float, values: list[float]) -> int:
    return min(range(len(values)), key=lambda c: (abs(values[c] - x), c % 2))


def block(xs: list[float], tensor_scale: float) -> tuple[list[int], int, list[float]]:
    """16 values -> codes, E4M3 byte, decoded: the definition, one float32 at a time."""
    xs = [F32(x) for x in xs]
    largest = max(abs(x) for x in xs)
    gs = F32(tensor_scale / 6)
    if largest == 0:
        return [0] * 16, E4M3.index(1.0), [0.0] * 16
    byte = nearest(min(max(float(largest / F32(tensor_scale)), 2**-9), 448.0), E4M3)
    scale = F32(E4M3[byte]) * gs
    codes = [nearest(float(abs(x) / scale), E2M1) + 8 * bool(np.signbit(x)) for x in xs]
    return codes, byte, [float(F32(E2M1[c % 8]) * scale) * (-1 if c > 7 else 1) for c in codes]


def stored(kv: KV, side: str) -> tuple[Tensor, Tensor]:
    tensors = dict(kv.tensors())
    return tensors[f"{side}.codes"], tensors[f"{side}.scale"]


@pytest.mark.parametrize("tensor_scale", [1.0, 0.03, 7.5])
@pytest.mark.parametrize("head_dim, dtype", [(64, torch.float32), (80, torch.bfloat16), (16, torch.float16)])
def test_codes_scales_and_values_are_the_definition(tensor_scale: float, head_dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 24, head_dim) * torch.logspace(-6, 3.5, 24)[:, None]  # from tiny blocks to saturated ones
    x[..., 3, :] = 0
    x[..., 4, :] = -0.0
    x = x.to(dtype)
    kv = NVFP4(value_scale=tensor_scale).encode(x, x)
    codes, scale = stored(kv, "values")
    assert codes.dtype == scale.dtype == torch.uint8
    decoded = kv.decode()[1][0, 0]
    assert decoded.dtype == dtype
    for t, token in enumerate(x[0, 0].float().tolist()):
        for b in range(head_dim // 16):
            expected_codes, expected_byte, expected = block(token[16 * b : 16 * b + 16], tensor_scale)
            nibbles = [n for byte in codes[t, 8 * b : 8 * b + 8].tolist() for n in (byte & 15, byte >> 4)]
            assert (nibbles, int(scale[t, b])) == (expected_codes, expected_byte)
            assert decoded[t, 16 * b : 16 * b + 16].tolist() == torch.tensor(expected).to(dtype).tolist()


@pytest.mark.parametrize("tensor_scale", [1.0, 0.0123])
def test_all_codes_at_all_scales_round_trip(tensor_scale: float) -> None:
    scales = torch.arange(1, 127, dtype=torch.uint8)  # every positive finite E4M3; block scales have no sign
    codes = torch.stack([torch.randperm(16) for _ in range(126)]).to(torch.uint8)
    x = decode_e2m1(pack_interleaved(codes, 4)) * (decode_e4m3(scales) * (tensor_scale / 6))[:, None]
    kv = NVFP4(tensor_scale, tensor_scale).encode(x[None, None], x[None, None])
    for side in ("keys", "values"):
        got, got_scale = stored(kv, side)
        assert torch.equal(got_scale[:, 0], scales)
        assert torch.equal(unpack_interleaved(got, 4), codes)
    assert all(torch.equal(got[0, 0], x) for got in kv.decode())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_bounds(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 2, 128, 64) * torch.logspace(-1, 1.5, 128)[:, None]).to(dtype)
    kv = NVFP4().encode(x, x)
    scale = (decode_e4m3(stored(kv, "keys")[1]) / 6).view(2, 2, 128, 4, 1)
    blocks = x.float().unflatten(-1, (4, 16))
    error = (kv.keys.dense().float().unflatten(-1, (4, 16)) - blocks).abs()
    slack = 1 + 2**-10
    assert bool((error <= scale * slack).all())
    assert bool((error <= 0.177 * slack * blocks.abs().amax(-1, keepdim=True)).all())


def test_requantizing_decoded_values_changes_nothing() -> None:
    """For blocks above the subnormal scales, where rounding the scale cannot move the largest code."""
    x = torch.randn(1, 2, 200, 64) * torch.logspace(-1, 1.5, 200)[:, None]
    once = NVFP4().encode(x, x)
    again = NVFP4().encode(*once.decode())
    for (name, a), (_, b) in zip(once.tensors(), again.tensors(), strict=True):
        assert torch.equal(a, b), name


def test_cast_variant_decodes_to_e4m3_and_saturates_at_448() -> None:
    x = torch.tensor([448.0, 1e4, -3e38, 15.0] + [0.0] * 12).view(1, 1, 1, 16)
    got = NVFP4().encode(x, x).decode()[0].flatten()
    assert got[:4].tolist() == pytest.approx([448, 448, -448, 0], rel=1e-6)  # gs = 1/6 is rounded


def test_checkpoint_scales_reach_their_side_only() -> None:
    x = torch.randn(1, 1, 8, 32) * 3000
    plain, scaled = NVFP4().encode(x, x), NVFP4(key_scale=1.0, value_scale=30.0).encode(x, x)
    assert torch.equal(plain.keys.dense(), scaled.keys.dense())
    assert float(plain.values.dense().abs().max()) == pytest.approx(448, rel=1e-6)
    assert (scaled.values.dense() - x).abs().max() <= 0.177 * x.abs().max()
    assert plain.nbytes == scaled.nbytes == 2 * 8 * (32 // 2 + 32 // 16)  # the tensor scale is not stored


# One token of 16 channels -> bytes of codes, then of the scale.
GOLDEN = [
    ([0.0] * 16, "000000000000000038"),
    ([-0.0] * 16, "000000000000000038"),
    ([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], "1032547698badcfe4c"),
    (
        [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0],
        "072244668faaccee4c",
    ),
    ([i / 7 for i in range(16)], "102243545566667741"),
    ([(-1) ** i * 2.0**i / 100 for i in range(16)], "808080808090b2f57a"),
    ([1e-4 * i for i in range(-8, 8)], "ccbcaa991021324401"),
    ([1000.0, -500.0, 448.0, 100.0] + [37.3] * 12, "f7371111111111117e"),
]


@pytest.mark.parametrize("x, golden", GOLDEN)
def test_stored_bytes_never_change(x: list[float], golden: str) -> None:
    token = torch.tensor(x).view(1, 1, 1, 16)
    kv = NVFP4().encode(token, token)
    for side in ("keys", "values"):
        assert b"".join(t.numpy().tobytes() for t in stored(kv, side)).hex() == golden


@pytest.mark.parametrize("field", ["key_scale", "value_scale"])
@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), None, "1"])
def test_scales_must_be_positive(field: str, scale: object) -> None:
    with pytest.raises(ValueError, match=f"NVFP4: {field} must be a positive number, got {scale!r}"):
        NVFP4(**{field: scale})


def test_head_dim_must_fill_blocks() -> None:
    with pytest.raises(ValueError, match=r"NVFP4\(\): head_dim=72 is not a multiple of 16"):
        NVFP4().check(72)
    with pytest.raises(ValueError, match="head_dim=72"):
        NVFP4().encode(torch.zeros(1, 1, 4, 72), torch.zeros(1, 1, 4, 72))
    for head_dim in (64, 80, 96, 128, 256):
        NVFP4().check(head_dim)
