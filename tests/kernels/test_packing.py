"""Packing and number formats against oracles written from their definitions, one bit and one value at a time."""

import math
import struct

import pytest
import torch
from torch import Tensor

from kvbench.kernels.packing import (
    cast,
    decode_e2m1,
    decode_e4m3,
    decode_e5m2,
    divide,
    encode_e2m1,
    encode_e4m3,
    encode_e5m2,
    from_kivi_int32,
    pack_interleaved,
    pack_planar,
    to_kivi_int32,
    unpack_interleaved,
    unpack_planar,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def random_codes(*shape: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8)


def planar_by_bits(codes: list[int], bits: int) -> list[int]:
    width = len(codes) * bits // 8
    packed = [0] * width
    for channel, code in enumerate(codes):
        plane, byte = divmod(channel, width)
        for bit in range(bits):
            packed[byte] |= (code >> bit & 1) << (plane * bits + bit)
    return packed


def interleaved_by_bits(codes: list[int], bits: int) -> list[int]:
    packed = [0] * (len(codes) * bits // 8)
    for position in range(len(codes) * bits):
        packed[position // 8] |= (codes[position // bits] >> position % bits & 1) << position % 8
    return packed


PACKINGS = {
    "planar": (pack_planar, unpack_planar, planar_by_bits),
    "interleaved": (pack_interleaved, unpack_interleaved, interleaved_by_bits),
}


@pytest.mark.parametrize("layout", PACKINGS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("rows, channels", [(0, 64), (1, 8), (3, 24), (7, 80)])
def test_packing_is_the_definition_bit_by_bit(layout: str, bits: int, rows: int, channels: int) -> None:
    pack, unpack, oracle = PACKINGS[layout]
    codes = random_codes(rows, channels, bits=bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, channels * bits // 8)
    assert packed.untyped_storage().nbytes() == packed.numel()
    assert packed.tolist() == [oracle(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("layout", PACKINGS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_byte_survives_unpacking_and_packing(layout: str, bits: int) -> None:
    pack, unpack, _ = PACKINGS[layout]
    packed = torch.arange(256, dtype=torch.uint8).view(32, 8)
    assert torch.equal(pack(unpack(packed, bits), bits), packed)


@pytest.mark.parametrize("layout", PACKINGS)
def test_packing_reads_strided_inputs_and_any_leading_shape(layout: str) -> None:
    pack, unpack, _ = PACKINGS[layout]
    codes = random_codes(16, 2, 3, bits=2).transpose(0, 2)  # [3, 2, 16]
    packed = pack(codes, 2)
    assert packed.is_contiguous() and torch.equal(packed, pack(codes.contiguous(), 2))
    assert torch.equal(unpack(packed.mT.contiguous().mT, 2), codes)


@pytest.mark.parametrize("layout", PACKINGS)
def test_packing_rejects_other_bits_and_part_bytes(layout: str) -> None:
    pack, unpack, _ = PACKINGS[layout]
    with pytest.raises(ValueError, match="bits must be 1, 2, 4 or 8, got 3"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="bits must be 1, 2, 4 or 8, got 16"):
        unpack(torch.zeros(1, 8, dtype=torch.uint8), 16)
    with pytest.raises(ValueError, match="2-bit codes go 4 to a byte; 6 channels do not fill"):
        pack(torch.zeros(1, 6, dtype=torch.uint8), 2)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("keys", [True, False])
def test_kivi_words_are_the_definition(bits: int, keys: bool) -> None:
    codes = random_codes(2, 32, 48, bits=bits)
    codes[..., -1] = codes[:, -1] = 2**bits - 1  # the top bits of the last words, where int32 has its sign
    words = to_kivi_int32(pack_planar(codes, bits), bits, keys=keys)
    assert words.dtype == torch.int32
    lines = codes.mT if keys else codes
    assert words.shape == (*lines.shape[:2], lines.shape[2] * bits // 32)
    per_word = 32 // bits
    for line, packed in zip(lines.flatten(0, 1).tolist(), words.flatten(0, 1).tolist(), strict=True):
        for w, word in enumerate(packed):
            value = sum(code << bits * i for i, code in enumerate(line[w * per_word : (w + 1) * per_word]))
            assert word == struct.unpack("<i", struct.pack("<I", value))[0]
    assert torch.equal(from_kivi_int32(words, bits, keys=keys), pack_planar(codes, bits))


def test_kivi_words_must_be_full() -> None:
    packed = torch.zeros(24, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="packs 16 tokens into a word; 24 do not fill"):
        to_kivi_int32(packed, 2, keys=True)
    with pytest.raises(ValueError, match="packs 16 channels into a word; 24 do not fill"):
        to_kivi_int32(packed[:, :6], 2, keys=False)


@pytest.mark.parametrize(
    "magnitude, rounded",
    [
        (0.0, 0.0), (0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0),
        (5.0000005, 6.0), (6.0, 6.0), (7.5, 6.0), (1e30, 6.0),
    ],
)  # fmt: skip
def test_e2m1_ties_go_to_the_even_code_and_large_values_saturate(magnitude: float, rounded: float) -> None:
    for sign in (1, -1):
        code = int(encode_e2m1(torch.tensor(sign * magnitude)))
        assert code == E2M1.index(rounded) + (8 if math.copysign(1, sign * magnitude) < 0 else 0)
        assert decode_e2m1(torch.tensor([code << 4 | code], dtype=torch.uint8)).tolist() == [sign * rounded] * 2


def test_e2m1_is_the_nearest_magnitude() -> None:
    midpoints = torch.tensor([(a + b) / 2 for a, b in zip(E2M1, E2M1[1:], strict=False)])
    inf = torch.full_like(midpoints, math.inf)
    around = torch.cat([midpoints, midpoints.nextafter(inf), midpoints.nextafter(-inf), torch.rand(500) * 7])
    x = torch.cat([around, -around])
    for value, code in zip(x.tolist(), encode_e2m1(x).tolist(), strict=True):
        best = min(range(8), key=lambda c: (abs(E2M1[c] - abs(value)), c % 2))
        assert code == best + 8 * (value < 0)


def test_e2m1_codes_round_trip() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = decode_e2m1(pack_interleaved(codes, 4))
    assert values.tolist() == [*E2M1, *(-v for v in E2M1)] and values.dtype == torch.float32
    assert torch.equal(encode_e2m1(values), codes)  # with the sign of -0


def e4m3_value(code: int) -> float:
    """Sign, four exponent bits with bias 7, three mantissa bits; exponent 0 is subnormal."""
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if code & 128 else magnitude


POSITIVE_E4M3 = [e4m3_value(code) for code in range(127)]


def test_e4m3_decodes_all_254_finite_codes_and_back() -> None:
    codes = torch.tensor([c for c in range(256) if c & 127 != 127], dtype=torch.uint8)
    values = decode_e4m3(codes)
    assert values.tolist() == [e4m3_value(c) for c in codes.tolist()]
    assert torch.equal(encode_e4m3(values), codes)
    assert max(POSITIVE_E4M3) == 448


def test_e4m3_is_the_nearest_value_with_ties_to_even_codes() -> None:
    midpoints = torch.tensor([(a + b) / 2 for a, b in zip(POSITIVE_E4M3, POSITIVE_E4M3[1:], strict=False)])
    inf = torch.full_like(midpoints, math.inf)
    around = torch.cat([midpoints, midpoints.nextafter(inf), midpoints.nextafter(-inf), torch.randn(200).abs() * 50])
    x = torch.cat([around, -around])
    for value, code in zip(x.tolist(), encode_e4m3(x).tolist(), strict=True):
        best = min(range(127), key=lambda c: (abs(POSITIVE_E4M3[c] - abs(value)), c % 2))
        assert code == best + 128 * (value < 0)


def test_e4m3_agrees_with_the_integer_recipe_of_the_kernels() -> None:
    x = torch.randn(32768) * torch.exp2(torch.randint(-12, 10, (32768,)).float())
    magnitude = x.abs().clamp(max=448)
    bits = magnitude.view(torch.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    subnormal = (magnitude * 512).round().int()
    recipe = torch.where(magnitude >= 2**-6, normal, subnormal) | (x < 0).int() << 7
    assert torch.equal(encode_e4m3(x).int(), recipe)


@pytest.mark.parametrize("value", [448.0, 464.0, 464.1, 1e6, 3e38])
def test_e4m3_saturates(value: float) -> None:
    assert decode_e4m3(encode_e4m3(torch.tensor([value, -value]))).tolist() == [448, -448]


def e5m2_value(code: int) -> float:
    """Sign, five exponent bits with bias 15, two mantissa bits; exponent 0 is subnormal."""
    exponent, mantissa = code >> 2 & 31, code & 3
    magnitude = mantissa * 2.0**-16 if exponent == 0 else (4 + mantissa) * 2.0 ** (exponent - 17)
    return -magnitude if code & 128 else magnitude


POSITIVE_E5M2 = [e5m2_value(code) for code in range(124)]


def test_e5m2_decodes_all_248_finite_codes_and_back() -> None:
    codes = torch.tensor([*range(124), *range(128, 252)], dtype=torch.uint8)
    values = decode_e5m2(codes)
    assert values.tolist() == [e5m2_value(c) for c in codes.tolist()]
    assert torch.equal(encode_e5m2(values), codes)
    assert max(POSITIVE_E5M2) == 57344


def test_e5m2_is_the_nearest_value_with_ties_to_even_codes_and_saturates() -> None:
    midpoints = torch.tensor([(a + b) / 2 for a, b in zip(POSITIVE_E5M2, POSITIVE_E5M2[1:], strict=False)])
    x = torch.cat([midpoints, -midpoints, torch.randn(200) * 100, torch.tensor([6e4, 7e4, -1e6])])
    for value, code in zip(x.tolist(), encode_e5m2(x).tolist(), strict=True):
        best = min(range(124), key=lambda c: (abs(POSITIVE_E5M2[c] - abs(value)), c % 2))
        assert code == best + 128 * (value < 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_formats_read_half_precision_exactly(dtype: torch.dtype) -> None:
    x = (torch.randn(1000) * 3).to(dtype)
    assert torch.equal(encode_e4m3(x), encode_e4m3(x.float()))
    assert torch.equal(encode_e5m2(x), encode_e5m2(x.float()))
    assert torch.equal(encode_e2m1(x), encode_e2m1(x.float()))


def test_cast_saturates_where_rounding_would_overflow() -> None:
    x = torch.tensor([65536.0, -65536.0, 1.0])
    assert cast(x, torch.float16).tolist() == [65504, -65504, 1]
    assert cast(x, torch.bfloat16).tolist() == [65536, -65536, 1]
    assert cast(x, torch.float32) is x


def test_divide_is_division(device: torch.device) -> None:
    x = torch.randn(1000)
    assert torch.equal(divide(x.to(device), 3).cpu(), x / torch.full_like(x, 3))
