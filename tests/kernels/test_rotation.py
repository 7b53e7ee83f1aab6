"""Hadamard rotations against the matrix written out bit by bit; RoPE is tested on models in tests/cache."""

import pytest
import torch

from kvbench.kernels.rotation import hadamard


def matrix(order: int) -> torch.Tensor:
    """Entry (i, j) is -1 to the number of bits that i and j share, over the root of the order."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(order)] for i in range(order)]
    return torch.tensor(signs, dtype=torch.float64) / order**0.5


@pytest.mark.parametrize(
    "channels, block", [(64, None), (128, None), (80, None), (96, None), (96, 16), (256, 64), (5, None)]
)
def test_blocks_of_the_matrix_act_on_their_own_channels(channels: int, block: int | None) -> None:
    order = block or next(2**k for k in range(10, -1, -1) if channels % 2**k == 0)
    x = torch.randn(3, 7, channels)
    expected = torch.cat([part.double() @ matrix(order) for part in x.split(order, -1)], -1)
    assert torch.allclose(hadamard(x, block).double(), expected, atol=1e-5)
    assert torch.allclose(hadamard(hadamard(x, block), block), x, atol=1e-5)


def test_dot_products_are_kept_and_signs_are_undone() -> None:
    q, k = torch.randn(2, 5, 128)
    signs = torch.randn(128).sign()
    assert torch.allclose((hadamard(q, signs=signs) * hadamard(k, signs=signs)).sum(-1), (q * k).sum(-1), atol=1e-4)
    assert not torch.allclose((q * hadamard(k, signs=signs)).sum(-1), (q * k).sum(-1), atol=0.1)
    assert torch.allclose(hadamard(hadamard(k, signs=signs), signs=signs, inverse=True), k, atol=1e-5)
    assert torch.equal(hadamard(k.bfloat16()), hadamard(k.bfloat16().float()))


def test_a_row_gets_the_same_bits_however_many_there_are() -> None:
    x = torch.randn(300, 128)
    together = hadamard(x)
    for rows in (1, 2, 17, 64):
        assert torch.equal(hadamard(x[:rows]), together[:rows])


@pytest.mark.parametrize("block", [0, 3, 32, 128])
def test_blocks_that_do_not_fit_are_refused(block: int) -> None:
    with pytest.raises(ValueError, match=f"must be a power of two that divides head_dim=80, got {block}"):
        hadamard(torch.zeros(80), block)
