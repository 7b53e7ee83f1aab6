"""Kitty against its definition in plain loops: boosted channels, planes, scales, and stored bytes."""

from importlib.resources import files

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from kvbench.policies import KV, Kitty, Step

F32 = np.float32


def affine(group: list[float], bits: int) -> tuple[list[int], np.float16, np.float16, list[float]]:
    """One group -> codes, scale, zero, decoded: the definition, one float32 at a time."""
    xs, top = [F32(x) for x in group], 2**bits - 1
    scale, zero = np.float16((max(xs) - min(xs)) / F32(top)), np.float16(min(xs))
    codes = [0 if scale == 0 else int(min(max(np.rint((x - F32(zero)) / F32(scale)), 0), top)) for x in xs]
    return codes, scale, zero, [float(F32(c) * F32(scale) + F32(zero)) for c in codes]


def two_bits(row: list[int]) -> list[int]:
    """Codes packed four to a byte: with n bytes, byte j holds codes j, j + n, j + 2n, j + 3n, the first lowest."""
    row = row + [0] * (-len(row) % 4)
    size = len(row) // 4
    return [sum(row[j + plane * size] << 2 * plane for plane in range(4)) for j in range(size)]


def stored(kv: KV) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in kv.tensors() if "tail" not in name}


def columns(x: Tensor) -> list[list[float]]:
    return x.float().T.tolist()


@pytest.mark.parametrize(
    "boosted, head_dim, page", [(0.25, 64, 8), (0.125, 80, 5), (0.25, 96, 6), (0.25, 128, 5), (0.5, 256, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_bytes_and_decoded_values_are_the_definition(
    boosted: float, head_dim: int, page: int, dtype: torch.dtype
) -> None:
    keys = (torch.randn(1, 1, 2 * page, head_dim) * torch.rand(head_dim) * 5 - 1).to(dtype)
    values = (torch.randn(1, 1, 2 * page, head_dim) + 2).to(dtype)
    kv = Kitty(boosted, page, 0, sinks=0).encode(keys, values)
    tensors, count = stored(kv), int(boosted * head_dim)
    for at in range(2):
        tokens = slice(at * page, (at + 1) * page)
        channels = columns(keys[0, 0, tokens])
        size = [sum(abs(x) for x in channel) / page for channel in channels]
        ranked = sorted(range(head_dim), key=lambda c: -size[c])[:count]
        low, high = [[0] * head_dim for _ in range(page)], [[0] * count for _ in range(page)]
        for c, channel in enumerate(channels):
            codes, scale, zero, decoded = affine(channel, 4 if c in ranked else 2)
            assert tensors["keys.index"][at, c] == (ranked.index(c) if c in ranked else count)
            assert (tensors["keys.scale"][at, c], tensors["keys.zero"][at, c]) == (float(scale), float(zero))
            assert kv.decode()[0][0, 0, tokens, c].tolist() == torch.tensor(decoded).to(dtype).tolist()
            for t, code in enumerate(codes):
                low[t][c] = code % 4
                if c in ranked:
                    high[t][ranked.index(c)] = code // 4
        assert tensors["keys.low"][tokens].tolist() == [two_bits(row) for row in low]
        assert tensors["keys.high"][tokens].tolist() == [two_bits(row) for row in high]
    for t, token in enumerate(values[0, 0].float().tolist()):
        codes, scale, zero, decoded = affine(token, 2)
        assert tensors["values.codes"][t].tolist() == two_bits(codes)
        assert (tensors["values.scale"][t].item(), tensors["values.zero"][t].item()) == (float(scale), float(zero))
        assert kv.decode()[1][0, 0, t].tolist() == torch.tensor(decoded).to(dtype).tolist()


def test_of_equal_channels_the_first_are_boosted() -> None:
    keys = torch.randn(1, 1, 8, 1).expand(-1, -1, -1, 16)
    index = stored(Kitty(0.25, 8, 0, sinks=0).encode(keys, keys))["keys.index"]
    assert index.tolist() == [[0, 1, 2, 3] + [4] * 12]


def test_pages_choose_their_channels_by_magnitude_and_not_by_spread() -> None:
    keys = torch.randn(1, 1, 16, 16) * 0.1
    keys[..., :8, 3] += 9  # large and almost constant
    keys[..., 8:, 5] -= 9
    index = stored(Kitty(1 / 16, 8, 0, sinks=0).encode(keys, keys))["keys.index"]
    assert index.argmin(1).tolist() == [3, 5]


def test_boosted_channels_have_a_fifth_of_the_step() -> None:
    keys = torch.rand(1, 1, 128, 64)
    keys[..., :16] = keys[..., :16] * 3 + 1
    error = (Kitty(sinks=0, residual=0).encode(keys, keys).decode()[0] - keys).abs().amax((0, 1, 2))
    assert (error[:16] <= 3 / 15 / 2 * 1.01).all() and (error[:16] > 3 / 15 / 2 * 0.9).all()
    assert (error[16:] <= 1 / 3 / 2 * 1.01).all() and (error[16:] > 1 / 3 / 2 * 0.9).all()


def test_representable_grids_and_constants_are_exact() -> None:
    codes = torch.randint(0, 4, (1, 1, 16, 16)).float()
    codes[..., :4] = torch.randint(0, 16, (1, 1, 16, 4)).float()
    codes[:, :, ::8], codes[:, :, 1::8], codes[:, :, 1::8, :4] = 0, 3, 15
    keys = codes * 0.25 + 8
    keys[..., :4] += 100  # boosted
    values = torch.randint(0, 4, (1, 1, 16, 16)).float() * 0.5 - 1
    values[..., 0], values[..., 1] = -1, 0.5
    got = Kitty(0.25, 8, 0, sinks=0).encode(keys, values).decode()
    assert torch.equal(got[0], keys) and torch.equal(got[1], values)
    constant = torch.full((1, 1, 16, 16), -3.5)
    kv = Kitty(0.25, 8, 0, sinks=0).encode(constant, constant)
    assert all(torch.equal(x, constant) for x in kv.decode())
    assert not any(stored(kv)[name].any() for name in ("keys.low", "keys.high", "keys.scale", "values.codes"))


def test_windows_for_every_prompt_and_every_step() -> None:
    """Keys keep (T - sinks) mod page; values the newest `residual` and what fills no page before those."""
    page, residual, sinks = 8, 12, 3
    policy, x = Kitty(0.25, page, residual, sinks=sinks), torch.randn(1, 2, 60, 16)
    streamed = KV.of(x[:, :, :0], x[:, :, :0])
    for tokens in range(1, 61):
        new, seen = x[:, :, tokens - 1 : tokens], torch.tensor([tokens])
        streamed = policy(streamed.append(new, new), Step(0, seen, seen, decoding=True))
        after = max(tokens - sinks, 0)
        for kv in (streamed, policy.encode(x[:, :, :tokens], x[:, :, :tokens])):
            for held, packed in ((kv.keys, after // page * page), (kv.values, max(after - residual, 0) // page * page)):
                assert held.tail_counts.even == tokens - packed
                dense = held.dense()
                assert torch.equal(dense[:, :, :sinks], x[:, :, : min(sinks, tokens)])
                assert torch.equal(dense[:, :, sinks + packed :], x[:, :, sinks + packed : tokens])


def test_parts_of_a_layer_are_read_as_the_whole() -> None:
    kv = Kitty(0.25, 8, 4, sinks=2).encode(torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16))
    for held in (kv.keys, kv.values, kv.gather(torch.arange(0, 40, 3).expand(2, 2, -1)).keys):
        for start, stop in ((0, 3), (5, 14), (3, held.counts.width)):
            assert torch.equal(held.columns(start, stop), held.dense()[:, :, start:stop])


@pytest.mark.parametrize("boosted, bits", [(0.25, 2.8125), (0.125, 2.5625)])
def test_bits_per_element(boosted: float, bits: float) -> None:
    keys, values = Kitty(boosted).codecs()
    assert 8 * (keys.row_nbytes(128) + keys.group_nbytes(128) / 128) / 128 == bits
    assert 8 * values.row_nbytes(128) / 128 == 2.25 and values.group_nbytes(128) == 0
    x = torch.randn(1, 2, 256, 128, dtype=torch.float16)
    kv = Kitty(boosted, residual=0, sinks=0).encode(x, x)
    assert 8 * kv.nbytes == x.numel() * (bits + 2.25)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"boosted": 0}, "boosted must be a share of the channels between 0 and 1, got 0"),
        ({"boosted": 1.0}, "between 0 and 1, got 1.0"),
        ({"boosted": "0.25"}, "between 0 and 1, got '0.25'"),
        ({"page": 0}, "page must be an int of 1 or more tokens, got 0"),
        ({"page": 8.0}, "page must be an int of 1 or more tokens, got 8.0"),
        ({"residual": -1}, "residual must be an int of 0 or more tokens, got -1"),
        ({"residual": True}, "residual must be an int of 0 or more tokens, got True"),
        ({"sinks": -1}, "sinks must be an int of 0 or more tokens"),
    ],
)
def test_fields_outside_their_sets_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Kitty(**fields)


def test_head_dims() -> None:
    for head_dim in (64, 80, 96, 128, 256):
        Kitty().check(head_dim)
    with pytest.raises(ValueError, match="head_dim=66 is not a multiple of 4"):
        Kitty().check(66)
    with pytest.raises(ValueError, match="boosted=0.01 of head_dim=64 is 0 channels; it must be 1 to 255"):
        Kitty(0.01).check(64)
    with pytest.raises(ValueError, match="is 384 channels"):
        Kitty(0.75).encode(torch.zeros(1, 1, 4, 512), torch.zeros(1, 1, 4, 512))


def test_keys_beyond_fp16_metadata_are_named() -> None:
    x = torch.zeros(1, 1, 8, 16)
    x[..., 3, 4] = -70000
    with pytest.raises(ValueError, match="Kitty stores scale and zero point as fp16, at most 65504; keys reach 70000"):
        Kitty(0.25, 8, 0, sinks=0).encode(x, torch.zeros_like(x))


def test_configuration() -> None:
    config = (files("kvbench.conf") / "quant" / "kitty.yaml").read_text()
    assert instantiate(OmegaConf.create(config)) == Kitty() == Kitty(0.25, 128, 128, sinks=32)
