"""GEAR against its definition in plain loops: outliers, KIVI's codes of the rest, power iteration, stored bytes."""

from importlib.resources import files
from math import sqrt

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from kvbench.kernels.packing import unpack_planar
from kvbench.policies import GEAR, KIVI, KV, Step
from kvbench.policies.store import Counts, Packed

F32 = np.float32
Line = list[float]


def split(line: Line, count: int) -> tuple[list[int], Line]:
    """Indices of the smallest and of the largest, and the line with the mean in their place."""
    order = sorted(range(len(line)), key=lambda i: line[i])
    index = order[:count] + order[len(line) - count :]
    mean = float(F32(sum(line) / len(line)))
    return index, [mean if i in index else x for i, x in enumerate(line)]


def affine(line: Line, bits: int, size: int) -> tuple[list[int], Line, Line, Line]:
    """One line in groups of `size` -> codes, scales, zeros, decoded: KIVI's definition, one float32 at a time."""
    codes, scales, zeros, decoded, top = [], [], [], [], 2**bits - 1
    for start in range(0, len(line), size):
        xs = [F32(x) for x in line[start : start + size]]
        scale, zero = np.float16((max(xs) - min(xs)) / F32(top)), np.float16(min(xs))
        new = [0 if scale == 0 else int(min(max(np.rint((x - F32(zero)) / F32(scale)), 0), top)) for x in xs]
        codes += new
        decoded += [float(F32(c) * F32(scale) + F32(zero)) for c in new]
        scales, zeros = [*scales, float(scale)], [*zeros, float(zero)]
    return codes, scales, zeros, decoded


def matmul(a: list[Line], b: list[Line]) -> list[Line]:
    return [[sum(x * b[k][j] for k, x in enumerate(row)) for j in range(len(b[0]))] for row in a]


def transposed(a: list[Line]) -> list[Line]:
    return [list(line) for line in zip(*a, strict=True)]


def orthonormal(columns: list[Line]) -> list[Line]:
    """[n][r] by Gram and Schmidt; 0 for what depends on the columns before."""
    done = []
    for column in transposed(columns):
        rest = column
        for _ in range(2):
            for unit in done:
                along = sum(x * y for x, y in zip(unit, rest, strict=True))
                rest = [y - along * x for x, y in zip(unit, rest, strict=True)]
        norm, before = (sqrt(sum(x * x for x in line)) for line in (rest, column))
        done.append([x / norm if norm > 1e-6 * before else 0.0 for x in rest])
    return transposed(done)


def low_rank(error: list[Line], rank: int, loops: int) -> tuple[list[Line], list[Line]]:
    start = torch.rand(len(error[0]), rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = start.tolist()
    for loop in range(loops):
        last = loop == loops - 1
        factor = matmul(error, orthonormal(basis) if last else basis)
        factor = orthonormal(factor) if last else factor
        basis = matmul(transposed(error), factor)
    return factor, transposed(basis)


def halves(x: list[Line]) -> list[Line]:
    return np.array(x, dtype=np.float16).astype(float).tolist()


def stored(kv: KV, side: str) -> dict[str, Tensor]:
    prefix = f"{side}."
    return {name.removeprefix(prefix): tensor for name, tensor in kv.tensors() if name.startswith(prefix)}


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "policy, head_dim, count",
    [
        (GEAR(2, 2, 0.1, 8, 16), 32, (1, 2)),
        (GEAR(4, 1, 0.02, 16, 16, 1), 80, (1, 1)),
        (GEAR(2, 4, 0.25, 4, 12), 24, (2, 3)),
        (GEAR(2, 0, 0.2, 8, 8), 16, (1, 2)),
        (GEAR(4, 3, 0, 8, 8, 5), 16, (0, 0)),
    ],
    ids=str,
)
def test_codes_outliers_factors_and_values_are_the_definition(
    side: str, dtype: torch.dtype, policy: GEAR, head_dim: int, count: tuple[int, int]
) -> None:
    keys, chunk, size, bits = side == "keys", policy.residual, policy.group_size, policy.bits
    x = (torch.randn(1, 1, 2 * chunk, head_dim) * torch.linspace(0.1, 9, head_dim) - 2).to(dtype)
    kv = policy.encode(x, x)
    tensors, decoded = stored(kv, side), kv.decode()[0 if keys else 1][0, 0]
    codes = unpack_planar(tensors["codes"], bits)
    for at in range(2):
        tokens = slice(at * chunk, (at + 1) * chunk)
        exact = x[0, 0, tokens].double().tolist()
        lines, sparse = [], []
        for n, line in enumerate(transposed(exact) if keys else exact):
            index, rest = split(line, count[0 if keys else 1])
            expected, scales, zeros, back = affine(rest, bits, size)
            for i in index:
                back[i] = float(np.float16(line[i]))
            entry = (at, slice(None), n) if keys else at * chunk + n
            assert tensors["scale"][entry].tolist() == scales and tensors["zero"][entry].tolist() == zeros
            if index:
                assert tensors["outlier_index"][entry].tolist() == index
                assert tensors["outlier"][entry].tolist() == [back[i] for i in index]
            lines, sparse = [*lines, expected], [*sparse, back]
        lines, sparse = (transposed(lines), transposed(sparse)) if keys else (lines, sparse)
        assert codes[tokens].tolist() == lines
        error = [[p - q for p, q in zip(a, b, strict=True)] for a, b in zip(exact, sparse, strict=True)]
        if policy.rank:
            factor, basis = (halves(part) for part in low_rank(error, policy.rank, policy.loops))
            assert tensors["factor"][tokens].tolist() == factor and tensors["basis"][at].tolist() == basis
            for row, parts in zip(sparse, factor, strict=True):
                for i, part in enumerate(parts):
                    row[:] = [float(F32(y) + F32(part) * F32(b)) for y, b in zip(row, basis[i], strict=True)]
        assert decoded[tokens].tolist() == torch.tensor(sparse).to(dtype).tolist()
    if keys:
        assert tensors["place"][:, 0].tolist() == [*range(chunk)] * 2


def test_without_extras_it_is_kivi() -> None:
    keys, values = torch.randn(2, 2, 40, 32), torch.randn(2, 2, 40, 32)
    kv, kivi = GEAR(2, 0, 0, 8, 16).encode(keys, values), KIVI(2, 8, 0).encode(keys[:, :, :32], values[:, :, :32])
    for got, expected in zip(kv.decode(), kivi.decode(), strict=True):
        assert torch.equal(got[:, :, :32], expected)


@pytest.mark.parametrize("policy", [GEAR(2, 2, 0.1, 8, 16), GEAR(2, 0, 0.1, 8, 16), GEAR(2, 2, 0, 8, 16)], ids=str)
def test_parts_of_a_layer_are_read_as_the_whole(policy: GEAR) -> None:
    kv = policy.encode(torch.randn(2, 2, 40, 16), torch.randn(2, 2, 40, 16))
    for held in (kv.keys, kv.values, kv.gather(torch.arange(0, 40, 3).expand(2, 2, -1)).keys):
        for start, stop in ((0, 3), (5, 14), (3, held.counts.width)):
            assert torch.equal(held.columns(start, stop), held.dense()[:, :, start:stop])


def test_low_rank_errors_are_found_and_outliers_cost_the_others_nothing() -> None:
    smooth = torch.rand(1, 1, 32, 32)
    spiked = smooth * 100
    spiked[..., 7, 5] = 1000
    error = {}
    for name, policy in (("plain", GEAR(2, 0, 0, 32, 32)), ("sparse", GEAR(2, 0, 0.0625, 32, 32))):
        error[name] = [(got - spiked).abs().max() for got in policy.encode(spiked, spiked).decode()]
    assert min(error["plain"]) > 80 and max(error["sparse"]) < 100 / 6 + 0.1
    norms = [
        (GEAR(2, rank, 0, 32, 32).encode(smooth, smooth).decode()[0] - smooth).norm() for rank in (0, 2, 4, 8, 16, 32)
    ]
    assert all(b < a for a, b in zip(norms, norms[1:], strict=False)) and norms[-1] < norms[0] / 100


def test_power_iteration_comes_close_to_the_best_factors() -> None:
    x = torch.randn(1, 1, 64, 64)
    error = (GEAR(2, 0, 0, 64, 64).encode(x, x).decode()[1] - x)[0, 0].double()
    best = torch.linalg.svdvals(error)[4:].norm()
    got = (GEAR(2, 4, 0, 64, 64, 8).encode(x, x).decode()[1] - x).norm()
    assert best <= got * 1.001 and got < 1.03 * best


@pytest.mark.parametrize("policy", [GEAR(2, 4, 0.1, 8, 16), GEAR(4, 2, 0, 16, 32)], ids=str)
def test_constants_grids_and_errors_of_lower_rank(policy: GEAR) -> None:
    """Nothing is left for the factors, or less than their rank: they are zero then, not noise."""
    for x in (torch.full((1, 1, 32, 32), -3.5), torch.zeros(1, 1, 32, 32)):
        kv = policy.encode(x, x)
        assert all(torch.equal(got, x) for got in kv.decode())
        assert not stored(kv, "keys")["factor"].any() and not stored(kv, "values")["basis"].any()
    one_error = torch.full((1, 1, 32, 32), 1.0)
    one_error[..., ::8, :] = 0
    one_error[..., 5, :] = 0.4  # between two codes: an error of rank 1
    kv = GEAR(2, 3, 0, 8, 32).encode(one_error, one_error)
    factor = stored(kv, "keys")["factor"]
    assert factor[:, 0].any() and not factor[:, 1:].any()
    assert (kv.decode()[0] - one_error).abs().max() < 1e-3


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_list_alone_and_in_a_batch_has_the_same_bits(rows: int) -> None:
    policy = GEAR(2, 4, 0.02, 32, 64)
    for codec in policy.codecs():
        x = torch.randn(rows * 64, 64)
        together = Packed.encode(codec, x, Counts((rows, 1), x.device, 64))
        for row in range(rows):
            alone = Packed.encode(codec, x[row * 64 : (row + 1) * 64].clone(), Counts((1, 1), x.device, 64))
            one = together.select(torch.tensor([row]))
            assert all(torch.equal(one.rows[k], v) for k, v in alone.rows.items())
            assert all(torch.equal(one.groups[k], v) for k, v in alone.groups.items())
            assert torch.equal(alone.dense_rows(), together.dense_rows()[row * 64 : (row + 1) * 64])


def test_chunks_are_packed_whole_and_the_rest_stays() -> None:
    policy, x = GEAR(2, 2, 0.02, 8, 16, sinks=2), torch.randn(1, 2, 60, 16)
    streamed = KV.of(x[:, :, :0], x[:, :, :0])
    for tokens in range(1, 61):
        new, seen = x[:, :, tokens - 1 : tokens], torch.tensor([tokens])
        streamed = policy(streamed.append(new, new), Step(0, seen, seen, decoding=True))
        for held in (streamed.keys, streamed.values):
            assert held.tail_counts.even == tokens - max(tokens - 2, 0) // 16 * 16
            assert torch.equal(held.dense()[:, :, :2], x[:, :, : min(2, tokens)])


@pytest.mark.parametrize(
    "policy, keys, values",
    [
        (GEAR(2), 2 + 0.5 + 0.5 + 0.5 + 48 / 128 + 1 / 16, 2 + 0.5 + 0.5 + 0.5 + 48 / 128),
        (GEAR(4), 4 + 0.5 + 0.5 + 0.5 + 48 / 128 + 1 / 16, 4 + 0.5 + 0.5 + 0.5 + 48 / 128),
        (GEAR(2, 2, 0.05, 128, 256), 2 + 0.25 + 0.25 + 0.125 + 288 / 256 + 1 / 16, 2 + 0.25 + 0.25 + 0.125 + 144 / 128),
        (GEAR(2, 0, 0, 32, 32), 3 + 1 / 16, 3),
    ],
    ids=str,
)
def test_bits_per_element(policy: GEAR, keys: float, values: float) -> None:
    for codec, bits in zip(policy.codecs(), (keys, values), strict=True):
        assert 8 * (codec.row_nbytes(128) + codec.group_nbytes(128) / codec.group) / 128 == bits
    x = torch.randn(1, 2, 256, 128, dtype=torch.float16)
    assert 8 * policy.encode(x, x).nbytes == x.numel() * (keys + values)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 3}, "bits must be 2 or 4, got 3"),
        ({"rank": -1}, "rank must be an int of 0 or more, got -1"),
        ({"rank": True}, "rank must be an int of 0 or more, got True"),
        ({"rank": 129}, "rank must be at most residual=128, got 129"),
        ({"loops": 0}, "loops must be an int of 1 or more, got 0"),
        ({"group_size": 1}, "group_size must be an int of 2 or more, got 1"),
        ({"outliers": 1}, "outliers must be a share of the entries from 0 to below 1, got 1"),
        ({"outliers": "0.02"}, "from 0 to below 1, got '0.02'"),
        ({"residual": 100}, "residual must be a multiple of group_size=64 tokens and at most 256, got 100"),
        ({"residual": 512}, "at most 256, got 512"),
        ({"residual": 0}, "at most 256, got 0"),
        ({"residual": 64.0}, "at most 256, got 64.0"),
    ],
)
def test_fields_outside_their_sets_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GEAR(**fields)


def test_head_dims() -> None:
    for head_dim in (64, 128, 256):
        GEAR().check(head_dim)
    for head_dim, message in (
        (96, r"GEAR\(\): head_dim=96 is not a multiple of 64 \(group_size\)"),
        (320, "head_dim=320 is not from rank=4 to 256"),
    ):
        with pytest.raises(ValueError, match=message):
            GEAR().check(head_dim)
    with pytest.raises(ValueError, match="head_dim=6 is not a multiple of 4 .2-bit codes per byte"):
        GEAR(group_size=2, residual=4).check(6)
    with pytest.raises(ValueError, match="head_dim=8 is not from rank=16"):
        GEAR(rank=16, group_size=8, residual=16).check(8)


def test_outliers_beyond_fp16_are_named() -> None:
    x = torch.zeros(1, 1, 16, 16)
    x[..., 3, 4] = 70000
    with pytest.raises(ValueError, match="GEAR stores outliers as fp16, at most 65504; keys or values reach 70000"):
        GEAR(2, 2, 0.1, 8, 16).encode(torch.zeros_like(x), x)


@pytest.mark.parametrize("bits", [2, 4])
def test_configuration(bits: int) -> None:
    config = (files("kvbench.conf") / "quant" / f"gear{bits}.yaml").read_text()
    assert instantiate(OmegaConf.create(config)) == GEAR(bits) == GEAR(bits, 4, 0.02, 64, 128, 3)
