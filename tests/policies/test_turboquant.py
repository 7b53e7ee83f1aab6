"""TurboQuant against its definition in plain loops; its codebooks against the conditions of Lloyd and Max."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbench.policies import KV, IntToken, Step, TurboQuant
from kvbench.policies.int_token import random_signs
from kvbench.policies.turboquant import _CENTROIDS

F32 = np.float32
POSITIVE = {
    1: [0.7979],
    2: [0.4528, 1.5104],
    3: [0.2451, 0.7560, 1.3439, 2.1519],
    4: [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
}
ERROR = {1: 0.3634, 2: 0.1175, 3: 0.0345, 4: 0.0095}
every_bits = pytest.mark.parametrize("bits", [1, 2, 3, 4])


def stored(kv: KV, side: str) -> dict[str, Tensor]:
    return {name.split(".")[1]: t for name, t in kv.tensors() if name.startswith(side) and t.numel()}


def codes_of(tensors: dict[str, Tensor], t: int, bits: int) -> list[int]:
    """Byte j holds channels j, j + D*bits/8, ..., lowest bits first; 3 bits: the lower two, and apart the upper one."""

    def plane(name: str, width: int) -> list[int]:
        return [byte >> width * i & 2**width - 1 for i in range(8 // width) for byte in tensors[name][t].tolist()]

    if bits != 3:
        return plane("codes", bits)
    return [low + 4 * high for low, high in zip(plane("codes", 2), plane("high", 1), strict=True)]


def rotation(head_dim: int, seed: int | None) -> np.ndarray:
    """y = x @ R: signs first, then blocks of the Hadamard matrix."""
    order = head_dim & -head_dim
    block = np.array([[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)]) / math.sqrt(order)
    signs = np.ones(head_dim) if seed is None else random_signs(seed, head_dim, torch.device("cpu")).double().numpy()
    return signs[:, None] * np.kron(np.eye(head_dim // order), block)


# --- Codebooks ---------------------------------------------------------------------------------------------------


def density(t: float) -> float:
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def mass(low: float, high: float) -> float:
    return (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2


@every_bits
def test_codebooks_are_lloyd_max_for_the_normal_distribution(bits: int) -> None:
    """Every centroid is the mean of what is nearer to it than to others; the error is the one that is published."""
    centroids = _CENTROIDS[bits]
    assert [round(c, 4) for c in centroids] == pytest.approx(POSITIVE[bits], abs=1.5e-4)
    edges = [0.0, *((a + b) / 2 for a, b in zip(centroids, centroids[1:], strict=False)), math.inf]
    explained = 0.0
    for c, low, high in zip(centroids, edges, edges[1:], strict=False):
        mean = (density(low) - density(high)) / mass(low, high)
        assert c == pytest.approx(mean, abs=2e-6)
        explained += 2 * c * c * mass(low, high)
    assert 1 - explained == pytest.approx(ERROR[bits], abs=1e-4)


@every_bits
def test_relative_error_is_the_published_one(bits: int) -> None:
    x = torch.randn(1, 1, 2000, 128) * torch.logspace(-2, 2, 2000)[:, None]
    x[..., :1000, 3] *= 20  # an outlier channel, which the rotation spreads
    got = TurboQuant(bits).encode(x, x).keys.dense()
    error = ((got - x).square().sum(-1) / x.square().sum(-1)).flatten()
    assert float(error[1000:].mean()) == pytest.approx(ERROR[bits], rel=0.05)
    assert float(error[:1000].mean()) < 3 * ERROR[bits]


# --- Rows --------------------------------------------------------------------------------------------------------


@every_bits
@pytest.mark.parametrize("norm_correction", [False, True])
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("head_dim, dtype", [(64, torch.float32), (80, torch.bfloat16)])
def test_norms_codes_and_values_are_the_definition(
    bits: int, norm_correction: bool, seed: int | None, head_dim: int, dtype: torch.dtype
) -> None:
    x = (torch.randn(1, 1, 12, head_dim) * torch.logspace(-3, 2, 12)[:, None]).to(dtype)
    x[..., 3, :] = 0
    r = rotation(head_dim, seed)
    codebook = [-c for c in reversed(POSITIVE[bits])] + POSITIVE[bits]
    kv = TurboQuant(bits, norm_correction, seed).encode(x, x)
    for side, decoded in zip(("keys", "values"), kv.decode(), strict=True):
        tensors = stored(kv, side)
        assert decoded.dtype == dtype and tensors["norm"].dtype == torch.float16
        for t, row in enumerate(x[0, 0].double().numpy()):
            norm = math.sqrt(float((row**2).sum()))
            assert float(tensors["norm"][t]) == pytest.approx(norm, rel=2**-10, abs=1e-7)
            y = (row @ r) / (norm or 1) * math.sqrt(head_dim)
            codes = codes_of(tensors, t, bits)
            expected = []
            for value, code in zip(y, codes, strict=True):
                by_distance = sorted(range(2**bits), key=lambda c: abs(codebook[c] - value))
                near_tie = abs(abs(codebook[by_distance[0]] - value) - abs(codebook[by_distance[1]] - value)) < 1e-3
                assert code == by_distance[0] or (near_tie and code == by_distance[1])
                expected.append(codebook[code])
            length = math.sqrt(sum(c * c for c in expected)) if norm_correction else math.sqrt(head_dim)
            back = np.array(expected) * float(tensors["norm"][t]) / length @ r.T
            tolerance = (2e-2 if dtype == torch.bfloat16 else 5e-4) * norm
            assert np.abs(decoded[0, 0, t].double().numpy() - back).max() <= tolerance


@every_bits
def test_norm_correction_restores_the_norm_and_nothing_else(bits: int) -> None:
    x = torch.randn(1, 2, 50, 128) * 7
    plain, corrected = TurboQuant(bits).encode(x, x), TurboQuant(bits, norm_correction=True).encode(x, x)
    for name, tensor in stored(plain, "keys").items():
        assert torch.equal(tensor, stored(corrected, "keys")[name])
    norm = stored(plain, "keys")["norm"].view(1, 2, 50).float()
    assert torch.allclose(corrected.keys.dense().norm(dim=-1), norm, rtol=1e-5)
    assert not torch.allclose(plain.keys.dense().norm(dim=-1), norm, rtol=1e-3)


@every_bits
@pytest.mark.parametrize("norm_correction", [False, True])
def test_decoded_rows_get_the_same_codes_again_and_shrink_without_correction(bits: int, norm_correction: bool) -> None:
    x = torch.randn(1, 2, 50, 128) * 3
    policy = TurboQuant(bits, norm_correction)
    once = policy.encode(x, x)
    before, after = stored(once, "keys"), stored(policy.encode(*once.decode()), "keys")
    for name in before.keys() - {"norm"}:
        assert torch.equal(before[name], after[name])
    if norm_correction:
        assert torch.equal(before["norm"], after["norm"])
    else:  # by the share of the power that the codebook explains
        shrunk = (after["norm"].float() / before["norm"].float()).square().mean()
        assert float(shrunk) == pytest.approx(1 - ERROR[bits], rel=0.01)


def test_signs_depend_on_the_seed_alone() -> None:
    x = torch.randn(1, 2, 8, 64)
    codes = [stored(TurboQuant(seed=seed).encode(x, x), "keys")["codes"] for seed in (0, 1, None, 0)]
    assert torch.equal(codes[0], codes[3])
    assert not torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert random_signs(0, 8, torch.device("cpu")).tolist() == [-1, 1, 1, -1, 1, 1, 1, 1]


def test_every_row_has_the_same_bits_alone_and_with_others() -> None:
    x = torch.randn(1, 1, 100, 128)
    together = stored(TurboQuant(4).encode(x, x), "keys")
    for t in range(100):
        alone = stored(TurboQuant(4).encode(x[:, :, t : t + 1], x[:, :, t : t + 1]), "keys")
        assert all(torch.equal(alone[name][0], together[name][t]) for name in together)


def test_first_and_last_layers_stay_as_they_are() -> None:
    policy, x, seen = TurboQuant(boundary=2), torch.randn(1, 1, 8, 16), torch.tensor([8])
    packed = []
    for order in range(6):
        step = Step(order, seen, seen, order=order, layers=6)
        kv = policy.encode(x, x, step)
        packed.append(kv.keys.body is not None)
        assert int(policy.slot_nbytes(seen, 1, 16, 4, step)) == kv.nbytes
    assert packed == [False, False, True, True, False, False]


@every_bits
def test_bits_per_element(bits: int) -> None:
    x = torch.randn(1, 2, 32, 128)
    assert 8 * TurboQuant(bits).encode(x, x).nbytes == (bits + 0.125) * 2 * x.numel()


def test_presets_of_vllm_are_mixtures() -> None:
    x = torch.randn(1, 1, 1, 128)
    for bits, nbytes in ((4, 134), (3, 118)):  # vLLM rounds its slots up to 136 and 120 bytes
        assert (TurboQuant(bits, norm_correction=True).keys & IntToken(4).values).encode(x, x).nbytes == nbytes


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 5}, "bits must be 1, 2, 3 or 4, got 5"),
        ({"bits": True}, "bits must be 1, 2, 3 or 4, got True"),
        ({"norm_correction": "nc"}, "norm_correction must be true or false, got 'nc'"),
        ({"seed": 1.5}, "seed must be an int, or None for no signs, got 1.5"),
        ({"seed": False}, "seed must be an int, or None for no signs, got False"),
        ({"boundary": -1}, "boundary must be an int of 0 or more layers, got -1"),
        ({"boundary": True}, "boundary must be an int of 0 or more layers, got True"),
    ],
)
def test_fields_outside_their_sets_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"TurboQuant: {message}"):
        TurboQuant(**fields)


def test_head_dim_must_fill_bytes() -> None:
    for bits, per_byte in ((1, 8), (2, 4), (3, 8), (4, 2)):
        TurboQuant(bits).check(per_byte)
        with pytest.raises(ValueError, match=f"head_dim={per_byte + 1} is not a multiple of {per_byte}, to fill bytes"):
            TurboQuant(bits).check(per_byte + 1)


def test_norms_beyond_fp16_are_named() -> None:
    x = torch.full((1, 1, 4, 64), 10000.0)
    with pytest.raises(ValueError, match="stores norms of rows as fp16, at most 65504; keys or values reach 80000"):
        TurboQuant().encode(x, x)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_configurations(bits: int) -> None:
    from importlib.resources import files

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = (files("kvbench.conf") / "quant" / f"turboquant{bits}.yaml").read_text()
    assert instantiate(OmegaConf.create(config)) == TurboQuant(bits, norm_correction=True)
