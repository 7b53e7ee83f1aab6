"""KIVI against its definition in plain loops, the official order of operations, and stored bytes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbench.kernels.packing import unpack_planar
from kvbench.policies import KIVI, KV, Step

F32 = np.float32


def affine(group: list[float], bits: int) -> tuple[list[int], np.float16, np.float16, list[float]]:
    """One group -> codes, scale, zero, decoded: the definition, one float32 at a time."""
    xs = [F32(x) for x in group]
    top = 2**bits - 1
    scale, zero = np.float16((max(xs) - min(xs)) / F32(top)), np.float16(min(xs))
    if scale == 0:
        codes = [0] * len(xs)
    else:
        codes = [int(min(max(np.rint((x - F32(zero)) / F32(scale)), 0), top)) for x in xs]
    return codes, scale, zero, [float(F32(c) * F32(scale) + F32(zero)) for c in codes]


def groups_of(x: Tensor, size: int, keys: bool) -> list[tuple[tuple, list[float]]]:
    """x [T, D] -> (index of the group's elements in x, their values), keys down a channel, values along a token."""
    lines, length = (x.shape[1], x.shape[0]) if keys else x.shape
    found = []
    for line in range(lines):
        for start in range(0, length, size):
            run = slice(start, start + size)
            index = (run, line) if keys else (line, run)
            found.append((index, x[index].float().tolist()))
    return found


def stored(kv: KV, side: str) -> tuple[Tensor, Tensor, Tensor]:
    """codes [N, D] one per byte, scale, zero."""
    tensors = {name: tensor for name, tensor in kv.tensors() if name.startswith(side)}
    codes = tensors[f"{side}.codes"]
    bits = kv.keys.body.codec.bits
    return unpack_planar(codes, bits), tensors[f"{side}.scale"], tensors[f"{side}.zero"]


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("group_size, head_dim", [(8, 80), (16, 96), (32, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_scales_zeros_and_values_are_the_definition(
    side: str, bits: int, group_size: int, head_dim: int, dtype: torch.dtype
) -> None:
    x = (torch.randn(1, 1, 32, head_dim) * torch.linspace(0.1, 9, head_dim) - 2).to(dtype)
    kv = KIVI(bits, group_size, 0).encode(x, x)
    codes, scale, zero = stored(kv, side)
    assert scale.dtype == zero.dtype == torch.float16
    decoded = kv.decode()[0 if side == "keys" else 1][0, 0]
    assert decoded.dtype == dtype
    if side == "keys":  # scales stand group by group as the loop meets them, channel first
        scale, zero = scale.T, zero.T
    for (index, group), s, z in zip(
        groups_of(x[0, 0], group_size, side == "keys"), scale.flatten().tolist(), zero.flatten().tolist(), strict=True
    ):
        expected_codes, expected_scale, expected_zero, expected = affine(group, bits)
        assert codes[index].tolist() == expected_codes
        assert (s, z) == (float(expected_scale), float(expected_zero))
        assert decoded[index].tolist() == torch.tensor(expected).to(dtype).tolist()


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_agree_with_the_official_order_up_to_ties(bits: int) -> None:
    """jy-yuan/KIVI: subtract min, divide by scale, clamp, round; metadata in the data's own dtype."""
    x = torch.randn(1, 1, 64, 64)
    codes, _, _ = stored(KIVI(bits, 32, 0).encode(x, x), "values")
    groups = x[0, 0].unflatten(1, (2, 32))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    exact = ((groups - low) / ((high - low) / (2**bits - 1))).clamp(0, 2**bits - 1)
    off = (codes.view_as(groups) - exact.round()).abs()
    assert off.max() <= 1
    to_tie = (exact - exact.floor() - 0.5).abs()
    assert to_tie[off > 0].max() < 0.02 if bool(off.any()) else True


@pytest.mark.parametrize("bits, group_size", [(2, 16), (2, 32), (4, 32)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1000.0])
def test_error_is_half_a_step(bits: int, group_size: int, scale: float) -> None:
    x = torch.randn(2, 2, 64, 64) * scale
    kv = KIVI(bits, group_size, 0).encode(x, x)
    for index, side in enumerate(("keys", "values")):
        _, step, zero = stored(kv, side)
        lists = x.flatten(0, 1)
        if side == "keys":
            step, zero = (t.view(4, -1, 1, 64).expand(-1, -1, group_size, -1).reshape(4, 64, 64) for t in (step, zero))
        else:
            step, zero = (t.view(4, 64, -1, 1).expand(-1, -1, -1, group_size).reshape(4, 64, 64) for t in (step, zero))
        ulp = zero.abs().float() * 2.0**-10 + 2.0**-24
        error = (kv.decode()[index].flatten(0, 1) - lists).abs()
        assert bool((error <= step.float() / 2 * (1 + 2**-10) + ulp).all())


@pytest.mark.parametrize("bits", [2, 4])
def test_representable_grids_and_constant_groups_are_exact(bits: int) -> None:
    top = 2**bits - 1
    codes = torch.randint(0, top + 1, (1, 2, 32, 32)).float()
    codes[..., 0, :] = codes[..., :, 0] = 0
    codes[..., 1, 1:] = codes[..., 1:, 1] = top
    codes[..., 1, 0] = codes[..., 0, 1] = top  # every row and column spans the whole range
    codes[..., 0, 0] = 0
    grid = codes * 0.375 - 7.25
    for got in KIVI(bits, 32, 0).encode(grid, grid).decode():
        assert torch.equal(got, grid)
    constant = torch.full((1, 1, 32, 32), -3.5)
    zeros = torch.zeros(1, 1, 32, 32)
    for x in (constant, zeros, constant.bfloat16(), zeros.half()):
        kv = KIVI(bits, 32, 0).encode(x, x)
        assert all(torch.equal(got, x) for got in kv.decode())
        for side in ("keys", "values"):
            assert not stored(kv, side)[0].any() and not stored(kv, side)[1].any()


def test_constant_group_that_fp16_cannot_hold_keeps_codes_zero() -> None:
    x = torch.full((1, 1, 32, 32), 4097.0)  # fp16 has 4096 and 4100
    kv = KIVI(2, 32, 0).encode(x, x)
    assert not stored(kv, "keys")[0].any() and kv.decode()[0].unique().tolist() == [4096.0]


def test_codes_rise_with_x() -> None:
    x = torch.randn(1, 1, 32, 32)
    codes, _, _ = stored(KIVI(4, 32, 0).encode(x, x), "keys")
    in_order = codes.gather(0, x[0, 0].argsort(0)).int()
    assert bool((in_order.diff(dim=0) >= 0).all())


@pytest.mark.parametrize("residual", [0, 32, 128])
def test_large_key_bias_costs_values_nothing_and_keys_at_most_an_ulp(residual: int) -> None:
    """Keys with a bias of hundreds (Qwen2.5) are read back within half a step and the rounding of the zero point."""
    keys, values = torch.randn(1, 1, 128, 64) + 900, torch.randn(1, 1, 128, 64)
    policy = KIVI(4, 32, residual)
    got, got_values = policy.encode(keys, values).decode()
    assert (got - keys).abs().max() < 0.25 + 0.5  # half a step of a range of 7.5, one fp16 ulp at 900
    assert torch.equal(got_values, policy.encode(values, values).decode()[1])


@pytest.mark.parametrize("policy", [KIVI(2, 8, 16), KIVI(4, 8, 8), KIVI(2, 8, 32), KIVI(2, 8, 0)], ids=str)
def test_window_lengths_for_every_prompt_and_every_step(policy: KIVI) -> None:
    """Keys keep T mod R in full precision, values the newest min(T, R); the same prefilled or decoded one by one."""
    longest = 3 * (policy.residual or policy.group_size)
    x = torch.randn(1, 2, longest, 8)
    streamed = KV.of(x[:, :, :0], x[:, :, :0])
    for tokens in range(1, longest + 1):
        seen = torch.tensor([tokens])
        new = x[:, :, tokens - 1 : tokens]
        streamed = policy(streamed.append(new, new), Step(0, seen, seen, decoding=True))
        for kv in (policy.encode(x[:, :, :tokens], x[:, :, :tokens]), streamed):
            assert kv.keys.tail_counts.even == tokens % (policy.residual or policy.group_size)
            assert kv.values.tail_counts.even == min(tokens, policy.residual)
            assert kv.counts.even == tokens
            for held in (kv.keys, kv.values):
                newest = tokens - held.tail_counts.even
                assert torch.equal(held.dense()[:, :, newest:], x[:, :, newest:tokens])
    empty = policy.encode(x[:, :, :0], x[:, :, :0])
    assert empty.counts.even == 0 and empty.nbytes == 0


# Two tokens of four channels -> bytes of keys (codes, scale, zero), then values (codes, scale, zero), groups of two.
GOLDEN = [
    (
        [[0, 0, 0, 0], [0, 0, 0, 0]],
        "000000000000000000000000000000000000000000000000000000000000000000000000",
        "00000000000000000000000000000000000000000000000000000000000000000000000000000000",
    ),
    (
        [[1.5, 1.5, -2, -2], [1.5, 1.5, -2, -2]],
        "00000000000000000000003e003e00c000c000000000000000000000003e00c0003e00c0",
        "000000000000000000000000003e003e00c000c0000000000000000000000000003e00c0003e00c0",
    ),
    (
        [[0, 3, 1, 2], [3, 0, 2, 1]],
        "cc33003c003c5535553500000000003c003ccc33003c5535003c55350000003c0000003c",
        "00ffff0066326632442c442c00000000003c003c00ffff006632442c6632442c0000003c0000003c",
    ),
    (
        [[0, 15, 7, 8], [6, 9, -1, -16]],
        "fc0300400040554100480000804800bc00cccc3c00455535003c004500000047004600cc",
        "f0ff0f00663666364438663e0000804800bc00cc00fff00f003c442c6632003c00000047004600cc",
    ),
    (
        [[0.1, -0.2, 0.3, -0.4], [0.5, -0.6, 0.7, -0.8]],
        "cc334430443044304430662ecdb8cd3466ba3333662e7733de35003866b266b6cdb866ba",
        "00ffff00d426d426d426d426662ecdb8cd3466baff00ff001f25f929b12c662e66b266b6cdb866ba",
    ),
    (
        [[900.5, 901, 899, 890], [-900, -1, 1, 7]],
        "ff00b060b35cad5c995c08e300bc003c00473ccc55310042af5c00400963f46208e3003c",
        "ffff0000815784537c535c5308e300bc003c0047f00f00ff4428cd387e5366360963f46208e3003c",
    ),
    (
        [[1e-4, 2e-4, 3e-4, -1e-4], [1e-7, 0, -1e-7, 2e-7]],
        "3fc02f025e048e0630020200000002808e863cc22f025e08010002008e068e8600000280",
        "ff0f00f07000e000500170000200000002808e86f00f00007000bf01000000008e068e8600000280",
    ),
    (
        [[65504, -65504, 60000, 1], [0.5, 2, 4, 1 / 3]],
        "f30c55755575e2741c330038fffb00445535333c5579e2740038e43cfffb003c00385535",
        "fff0000f446c446cd06bb0290038fffb00445535ff00f00f4470d06b662ed233fffb003c00385535",
    ),
]


@pytest.mark.parametrize("x, two_bits, four_bits", GOLDEN)
def test_stored_bytes_never_change(x: list, two_bits: str, four_bits: str) -> None:
    for bits, golden in ((2, two_bits), (4, four_bits)):
        kv = KIVI(bits, 2, 0).encode(torch.tensor(x)[None, None].float(), torch.tensor(x)[None, None].float())
        stored = [tensor.contiguous().view(torch.uint8) for name, tensor in kv.tensors() if "tail" not in name]
        assert torch.cat([part.flatten() for part in stored]).numpy().tobytes().hex() == golden


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 3}, "bits must be 2 or 4, got 3"),
        ({"bits": 8}, "bits must be 2 or 4, got 8"),
        ({"bits": "2"}, "bits must be 2 or 4, got '2'"),
        ({"group_size": 0}, "group_size must be a positive int, got 0"),
        ({"group_size": 32.0}, "group_size must be a positive int, got 32.0"),
        ({"residual": 100}, "residual must be 0 or a multiple of group_size=32 tokens, got 100"),
        ({"residual": -32}, "residual must be 0 or a multiple of group_size=32 tokens, got -32"),
        ({"group_size": 64, "residual": 32}, "multiple of group_size=64 tokens, got 32"),
    ],
)
def test_fields_outside_their_sets_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KIVI(**fields)


def test_fields_come_in_the_documented_order_with_the_papers_defaults() -> None:
    assert KIVI(4, 64, 128) == KIVI(bits=4, group_size=64, residual=128)
    assert KIVI() == KIVI(2, 32, 128) and str(KIVI(bits=4)) == "KIVI(bits=4)"


def test_head_dim_must_fill_groups_and_bytes() -> None:
    with pytest.raises(ValueError, match=r"KIVI\(\): head_dim=80 is not a multiple of 32 \(group_size\)"):
        KIVI().check(80)
    with pytest.raises(ValueError, match="head_dim=6 is not a multiple of 4 .2-bit codes per byte"):
        KIVI(2, 2, 0).check(6)
    for head_dim in (64, 96, 128, 256):
        KIVI().check(head_dim)
    KIVI(2, 16, 0).check(80)
    with pytest.raises(ValueError, match="head_dim=80"):
        KIVI().encode(torch.zeros(1, 1, 4, 80), torch.zeros(1, 1, 4, 80))


@pytest.mark.parametrize("top", [70000.0, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_beyond_fp16_metadata_are_named(top: float, dtype: torch.dtype) -> None:
    x = torch.zeros(1, 1, 32, 32, dtype=dtype)
    x[..., 3, 4] = -top
    with pytest.raises(
        ValueError, match=f"fp16, at most 65504; keys or values reach {float(x.abs().max()):.6g}".replace("+", r"\+")
    ):
        KIVI(2, 32, 0).encode(x, torch.zeros_like(x))


@pytest.mark.parametrize("bits", [2, 4])
def test_the_whole_range_of_fp16_stays_finite(bits: int) -> None:
    """max - min passes 65504 and the top code decodes past it: neither may become inf."""
    x = torch.zeros(1, 1, 32, 32, dtype=torch.float16)
    x[..., ::2, ::2], x[..., 1::2, 1::2] = 65504, -65504
    for got in KIVI(bits, 32, 0).encode(x, x).decode():
        assert got.dtype == torch.float16 and bool(got.isfinite().all())
        assert got.max() == 65504 and got.min() == -65504
