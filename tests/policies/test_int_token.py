"""IntToken against its definition in plain loops, rotations written out as matrices, and stored bytes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbench.kernels.rotation import hadamard
from kvbench.policies import FP8, KV, IntToken, Step

F32 = np.float32


def affine(row: list[float], bits: int) -> tuple[list[int], tuple[float, float], list[float]]:
    """One token -> codes, (scale, zero), decoded: the definition, one float32 at a time."""
    xs, top = [F32(x) for x in row], 2**bits - 1
    scale, zero = np.float16((max(xs) - min(xs)) / F32(top)), np.float16(min(xs))
    codes = [int(min(max(np.rint((x - F32(zero)) / F32(scale)), 0), top)) if scale else 0 for x in xs]
    return codes, (float(scale), float(zero)), [float(F32(c) * F32(scale) + F32(zero)) for c in codes]


def symmetric(row: list[float], bits: int) -> tuple[list[int], tuple[float], list[float]]:
    xs, top = [F32(x) for x in row], 2 ** (bits - 1) - 1
    scale = F32(max(abs(x) for x in xs)) / F32(top)
    codes = [int(min(max(np.rint(x / scale), -top), top)) if scale else 0 for x in xs]
    return [c + top for c in codes], (float(scale),), [float(F32(c) * scale) for c in codes]


def unpacked(packed: Tensor, bits: int) -> list[int]:
    """Byte j holds channels j, j + D*bits/8, ..., lowest bits first."""
    return [byte >> bits * i & 2**bits - 1 for i in range(8 // bits) for byte in packed.tolist()]


def stored(kv: KV, side: str) -> dict[str, Tensor]:
    return {name.split(".")[1]: t for name, t in kv.tensors() if name.startswith(side) and t.numel()}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("without_zero", [False, True])
@pytest.mark.parametrize("head_dim, dtype", [(64, torch.float32), (80, torch.bfloat16), (20, torch.float16)])
def test_codes_scales_zeros_and_values_are_the_definition(
    bits: int, without_zero: bool, head_dim: int, dtype: torch.dtype
) -> None:
    x = torch.randn(1, 1, 24, head_dim) * torch.logspace(-3, 2, 24)[:, None] - 2
    x[..., 3, :] = 0
    x[..., 4, :] = -1.5
    x = x.to(dtype)
    kv = IntToken(bits, symmetric=without_zero).encode(x, x)
    for side, decoded in zip(("keys", "values"), kv.decode(), strict=True):
        tensors = stored(kv, side)
        assert decoded.dtype == dtype
        assert tensors["scale"].dtype == (torch.float32 if without_zero else torch.float16)
        for t, row in enumerate(x[0, 0].float().tolist()):
            codes, metadata, expected = (symmetric if without_zero else affine)(row, bits)
            assert unpacked(tensors["codes"][t], bits) == codes
            assert tuple(float(tensors[name][t]) for name in ("scale", "zero") if name in tensors) == metadata
            assert decoded[0, 0, t].tolist() == torch.tensor(expected).to(dtype).tolist()


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("head_dim", [96, 128])
@pytest.mark.parametrize("without_zero", [False, True])
def test_rotated_rows_are_stored_and_read_back_unrotated(block: int | None, head_dim: int, without_zero: bool) -> None:
    """H[i, j] = (-1)**(bits that i and j share) / sqrt(order), block by block."""
    order = block or {96: 32, 128: 128}[head_dim]
    h = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)]) / order**0.5
    matrix = torch.block_diag(*[h] * (head_dim // order)).double()
    x = torch.randn(1, 1, 16, head_dim) * torch.linspace(0.1, 5, head_dim)
    policy = IntToken(4, rotate=True, rotate_values=True, block=block, symmetric=without_zero)
    kv = policy.encode(x, x)
    turned = hadamard(x, block)  # tested by itself; the bits it gives are those that are encoded
    assert torch.allclose(turned.double(), x.double() @ matrix, atol=1e-4)
    for side, decoded in zip(("keys", "values"), kv.decode(), strict=True):
        tensors = stored(kv, side)
        for t, row in enumerate(turned[0, 0].tolist()):
            codes, _, expected = (symmetric if without_zero else affine)(row, 4)
            assert unpacked(tensors["codes"][t], 4) == codes
            back = torch.tensor(expected, dtype=torch.float64) @ matrix.T
            assert torch.allclose(decoded[0, 0, t].double(), back, atol=1e-4)


def test_each_side_is_rotated_by_its_own_switch() -> None:
    keys, values = torch.randn(2, 1, 2, 8, 64)
    plain = IntToken(4).encode(keys, values)
    both = IntToken(4, rotate=True, rotate_values=True).encode(keys, values)
    keys_only = IntToken(4, rotate=True).encode(keys, values)
    assert torch.equal(keys_only.keys.dense(), both.keys.dense())
    assert torch.equal(keys_only.values.dense(), plain.values.dense())
    assert not torch.equal(both.keys.dense(), plain.keys.dense())
    assert not torch.equal(both.values.dense(), plain.values.dense())
    assert plain.nbytes == both.nbytes


def test_rotation_spreads_an_outlier_channel() -> None:
    """The reason for it: one channel of 50 among unit ones costs the others their bits, unless it is spread."""
    x = torch.randn(1, 1, 64, 128)
    x[..., 7] += 50
    errors = [
        float((policy.encode(x, x).keys.dense() - x)[..., :7].norm())
        for policy in (IntToken(4), IntToken(4, rotate=True), IntToken(4, rotate=True, block=16))
    ]
    assert errors[1] < 0.5 * errors[0] and errors[1] < errors[2] < errors[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_half_a_step_of_error_and_grids_are_exact(bits: int) -> None:
    x = torch.randn(2, 2, 32, 64) * 10
    kv = IntToken(bits).encode(x, x)
    scale, zero = (stored(kv, "keys")[name].float().view(2, 2, 32, 1) for name in ("scale", "zero"))
    assert bool(((kv.keys.dense() - x).abs() <= scale / 2 * (1 + 2**-10) + zero.abs() * 2**-10).all())
    scale = stored(IntToken(bits, symmetric=True).encode(x, x), "keys")["scale"].view(2, 2, 32, 1)
    got = IntToken(bits, symmetric=True).encode(x, x).keys.dense()
    assert bool(((got - x).abs() <= scale / 2 * (1 + 2**-10)).all())
    top = 2**bits - 1
    grid = torch.randint(0, top + 1, (1, 1, 16, 64)).float()
    grid[..., 0], grid[..., 1] = 0, top
    for exact in (grid * 0.375 - 7.25, torch.full((1, 1, 4, 64), -3.5)):
        assert all(torch.equal(got, exact) for got in IntToken(bits).encode(exact, exact).decode())
    half = 2 ** (bits - 1) - 1
    grid = torch.randint(-half, half + 1, (1, 1, 16, 64)).float()
    grid[..., 0] = -half
    got = IntToken(bits, symmetric=True).encode(grid * 0.25, grid * 0.25).keys.dense()
    assert torch.equal(got, grid * 0.25)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("without_zero", [False, True])
def test_clipped_ranges_are_the_definition(bits: int, without_zero: bool) -> None:
    clip = F32(0.9)
    x = torch.randn(1, 1, 24, 64) * torch.logspace(-3, 2, 24)[:, None]
    x[..., 3, :] = 0
    x[..., 4, :] = x[..., 4, :].abs() + 1  # of one sign: only the far end is clipped
    kv = IntToken(bits, symmetric=without_zero, clip=0.9).encode(x, x)
    tensors = stored(kv, "keys")
    for t, row in enumerate(x[0, 0].tolist()):
        low, high = (clip * F32(end) for end in (min(row), max(row)))
        if without_zero:
            high = max(-low, high)
            low = -high
        codes, metadata, expected = (symmetric if without_zero else affine)(
            [float(min(max(F32(v), low), high)) for v in row], bits
        )
        assert unpacked(tensors["codes"][t], bits) == codes
        assert tuple(float(tensors[name][t]) for name in ("scale", "zero") if name in tensors) == metadata
        assert kv.keys.dense()[0, 0, t].tolist() == expected


def test_clipping_helps_rotated_rows_at_two_bits() -> None:
    x = torch.randn(1, 1, 512, 128)
    whole, clipped = ((IntToken(2, rotate=True, clip=clip).encode(x, x).keys.dense() - x).norm() for clip in (1.0, 0.8))
    assert clipped < 0.95 * whole


@pytest.mark.parametrize("rotate", [False, True])
def test_the_newest_tokens_stay_in_full_precision(rotate: bool) -> None:
    policy = IntToken(4, rotate=rotate, residual=8)
    x = torch.randn(1, 2, 21, 16)
    streamed = KV.of(x[:, :, :0], x[:, :, :0])
    for tokens in range(1, 22):
        seen = torch.tensor([tokens])
        new = x[:, :, tokens - 1 : tokens]
        streamed = policy(streamed.append(new, new), Step(0, seen, seen, decoding=True))
        for kv in (streamed, policy.encode(x[:, :, :tokens], x[:, :, :tokens])):
            for held in (kv.keys, kv.values):
                assert held.tail_counts.even == min(tokens, 8)
                assert torch.equal(held.dense()[:, :, -8:], x[:, :, max(tokens - 8, 0) : tokens])
    assert torch.equal(streamed.keys.dense(), kv.keys.dense())


@pytest.mark.parametrize("rotate", [False, True])
def test_every_row_has_the_same_bits_alone_and_with_others(rotate: bool) -> None:
    x = torch.randn(1, 1, 100, 128)
    together = stored(IntToken(8, rotate=rotate).encode(x, x), "keys")
    for t in range(100):
        alone = stored(IntToken(8, rotate=rotate).encode(x[:, :, t : t + 1], x[:, :, t : t + 1]), "keys")
        assert all(torch.equal(alone[name][0], together[name][t]) for name in together)


@pytest.mark.parametrize(
    "policy, bits",
    [
        (IntToken(4), 4.25), (IntToken(4, rotate=True), 4.25), (IntToken(8), 8.25), (IntToken(2), 2.25),
        (IntToken(8, symmetric=True), 8.25), (IntToken(2, rotate=True, rotate_values=True), 2.25),
    ],
    ids=str,
)  # fmt: skip
def test_bits_per_element_at_128_channels(policy: IntToken, bits: float) -> None:
    x = torch.randn(1, 2, 32, 128).half()
    assert 8 * policy.encode(x, x).nbytes == bits * 2 * x.numel()
    assert all(8 * codec.row_nbytes(128) == bits * 128 for codec in policy.codecs())


# Two tokens of four channels -> bytes of codes, scale, zero; symmetric: of codes and scale.
GOLDEN = [
    ([[0, 0, 0, 0], [0, 0, 0, 0]], "00000000" + "00000000" + "00000000", "77777777" + "00000000" * 2),
    ([[0, 15, 7, 8], [-7, 7, 0, 3]], "708f80bf" + "003c773b" + "000000c7", "a7be70ae" + "922409400000803f"),
]  # fmt: skip


@pytest.mark.parametrize("x, with_zero, without", GOLDEN)
def test_stored_bytes_never_change(x: list, with_zero: str, without: str) -> None:
    token = torch.tensor(x, dtype=torch.float32)[None, None]
    for policy, golden in ((IntToken(4), with_zero), (IntToken(4, symmetric=True), without)):
        tensors = stored(policy.encode(token, token), "keys").values()
        assert b"".join(t.numpy().tobytes() for t in tensors).hex() == golden


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 3}, "bits must be 8, 4 or 2, got 3"),
        ({"bits": "4"}, "bits must be 8, 4 or 2, got '4'"),
        ({"rotate": 1}, "rotate must be true or false, got 1"),
        ({"rotate_values": "keys"}, "rotate_values must be true or false, got 'keys'"),
        ({"symmetric": None}, "symmetric must be true or false, got None"),
        ({"block": 24}, "block must be a power of two of at least 2, or None, got 24"),
        ({"block": 1}, "block must be a power of two of at least 2, or None, got 1"),
        ({"block": 16.0}, "block must be a power of two of at least 2, or None, got 16.0"),
        ({"residual": -1}, "residual must be an int of 0 or more tokens, got -1"),
        ({"clip": 0}, r"clip must be a share in \(0, 1\], got 0"),
        ({"clip": 1.1}, r"clip must be a share in \(0, 1\], got 1.1"),
        ({"clip": True}, r"clip must be a share in \(0, 1\], got True"),
        ({"residual": True}, "residual must be an int of 0 or more tokens, got True"),
    ],
)
def test_fields_outside_their_sets_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"IntToken: {message}"):
        IntToken(**fields)


def test_head_dim_must_fill_bytes_and_blocks() -> None:
    with pytest.raises(ValueError, match=r"IntToken\(.*\): head_dim=6 is not a multiple of 4 .2-bit codes per byte"):
        IntToken(2).check(6)
    with pytest.raises(ValueError, match=r"head_dim=80 is not a multiple of 32 \(block\)"):
        IntToken(4, rotate_values=True, block=32).check(80)
    IntToken(4, block=32).check(80)  # nothing is rotated
    IntToken(4, rotate=True).check(80)
    with pytest.raises(ValueError, match="head_dim=80"):
        IntToken(4, rotate=True, block=32).encode(torch.zeros(1, 1, 4, 80), torch.zeros(1, 1, 4, 80))


def test_values_beyond_fp16_metadata_are_named_and_fit_without_a_zero_point() -> None:
    x = torch.zeros(1, 1, 4, 32)
    x[..., 3] = -70000
    with pytest.raises(ValueError, match="stored as fp16, at most 65504; keys or values reach 70000"):
        IntToken(4).encode(x, x)
    assert torch.equal(IntToken(4, symmetric=True).encode(x, x).keys.dense(), x)


@pytest.mark.parametrize("policy", [IntToken(8), IntToken(8, rotate=True, symmetric=True)], ids=str)
def test_the_whole_range_of_fp16_stays_finite(policy: IntToken) -> None:
    x = torch.full((1, 1, 4, 32), 65504.0, dtype=torch.float16)
    x[..., ::2] = -65504
    got = policy.encode(x, x).keys.dense()
    assert bool(got.isfinite().all()) and got.max() >= 65000 and got.min() <= -65000


def test_mixes_with_another_format() -> None:
    keys, values = torch.randn(2, 1, 2, 8, 64)
    kv = (FP8().keys & IntToken(4).values).encode(keys, values)  # as in vLLM's turboquant_k8v4
    assert torch.equal(kv.values.dense(), IntToken(4).encode(keys, values).values.dense())
    assert kv.nbytes == 2 * 8 * (64 + 64 // 2 + 4)


@pytest.mark.parametrize(
    "name, policy",
    [
        ("int8", IntToken(8, symmetric=True)),
        ("int4", IntToken(4)),
        ("int4_hadamard", IntToken(4, rotate=True)),
        ("int2_hadamard", IntToken(2, rotate=True, rotate_values=True)),
        ("int4_quarot", IntToken(4, rotate=True, rotate_values=True, clip=0.95)),
    ],
)
def test_configurations(name: str, policy: IntToken) -> None:
    from importlib.resources import files

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = (files("kvbench.conf") / "quant" / f"{name}.yaml").read_text()
    assert instantiate(OmegaConf.create(config)) == policy
