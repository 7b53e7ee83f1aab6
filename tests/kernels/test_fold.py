"""Products with packed codes against the definition: decode every element with plain loops, then multiply."""

import pytest
import torch
from torch import Tensor

from kvbench.kernels.fold import mix_per_token, scores_per_channel, scores_per_token
from kvbench.kernels.packing import pack_planar

SHAPES = [(2, 64, 16), (4, 64, 16), (2, 128, 32), (4, 128, 32), (8, 64, 64), (4, 96, 96), (2, 80, 20), (4, 96, 32)]
by_shape = pytest.mark.parametrize(("bits", "channels", "width"), SHAPES)


def drawn(bits: int, channels: int, tokens: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes and packed codes of 3 lists, 5 queries and weights."""
    codes = torch.randint(0, 2**bits, (3, tokens, channels), dtype=torch.uint8)
    return codes, pack_planar(codes, bits), torch.randn(3, 5, channels), torch.rand(3, 5, tokens)


@by_shape
def test_one_scale_per_token_and_group_of_channels(bits: int, channels: int, width: int) -> None:
    codes, packed, query, weights = drawn(bits, channels)
    scale, zero = torch.randn(2, 3, 24, channels // width).half().unbind()
    rows = torch.empty(3, 24, channels, dtype=torch.float64)
    for channel in range(channels):
        group = channel // width
        rows[..., channel] = codes[..., channel].double() * scale[..., group].double() + zero[..., group].double()
    scores = scores_per_token(query, packed, bits, scale, zero)
    torch.testing.assert_close(scores.double(), query.double() @ rows.transpose(1, 2), atol=2e-4, rtol=1e-4)
    mixed = mix_per_token(weights, packed, bits, scale, zero)
    torch.testing.assert_close(mixed.double(), weights.double() @ rows, atol=2e-4, rtol=1e-4)


@by_shape
@pytest.mark.parametrize("group", [1, 8, 24])
def test_one_scale_per_channel_and_group_of_tokens(bits: int, channels: int, width: int, group: int) -> None:
    codes, packed, query, _ = drawn(bits, channels)
    scale, zero = torch.randn(2, 3, 24 // group, channels).half().unbind()
    rows = torch.empty(3, 24, channels, dtype=torch.float64)
    for token in range(24):
        entry = token // group
        rows[:, token] = codes[:, token].double() * scale[:, entry].double() + zero[:, entry].double()
    scores = scores_per_channel(query, packed, bits, scale, zero)
    torch.testing.assert_close(scores.double(), query.double() @ rows.transpose(1, 2), atol=2e-4, rtol=1e-4)
