"""OSCAR against its definition in plain loops, and what ships."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from kvbench.policies import KV, OSCAR, IntToken, Step
from kvbench.policies.oscar import artifact

F32 = np.float32
LAYERS = 2


def write(folder: Path, head_dim: int = 16, about: dict | None = None) -> str:
    """Random orthogonal matrices."""
    generator = torch.Generator().manual_seed(head_dim)
    tensors = {
        side: torch.linalg.qr(torch.randn(LAYERS, head_dim, head_dim, generator=generator)).Q.contiguous()
        for side in "kv"
    }
    folder.mkdir(parents=True, exist_ok=True)
    data = save(tensors)
    (folder / "oscar.safetensors").write_bytes(data)
    known = {"format": 1, "layers": LAYERS, "head_dim": head_dim, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "oscar.json").write_text(json.dumps(known | (about or {})))
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("oscar") / "small")


def in_layer(order: int, tokens: int = 8) -> Step:
    seen = torch.tensor([tokens])
    return Step(order, seen, seen, order=order, layers=LAYERS)


def coded(row: list[float], clip: float, bits: int) -> tuple[list[int], float, float, list[float]]:
    """One turned row -> codes, scale, zero, decoded, one float32 at a time."""
    limit = F32(sorted(abs(x) for x in row)[min(int(clip * len(row)), len(row) - 1)])
    xs, top = [min(max(F32(x), -limit), limit) for x in row], 2**bits - 1
    scale, zero = np.float16((max(xs) - min(xs)) / F32(top)), np.float16(min(xs))
    codes = [int(min(max(np.rint((x - F32(zero)) / F32(scale)), 0), top)) if scale else 0 for x in xs]
    return codes, float(scale), float(zero), [float(F32(c) * F32(scale) + F32(zero)) for c in codes]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("clips", [(0.96, 0.92), (0.5, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_scales_and_values_are_the_definition(
    path: str, bits: int, clips: tuple[float, float], dtype: torch.dtype
) -> None:
    x = (torch.randn(1, 2, 12, 16) * torch.logspace(-2, 2, 12)[:, None]).to(dtype)
    x[..., 3, :] = 0
    kv = OSCAR(bits, path, *clips, residual=0).encode(x, x, in_layer(1))
    tensors, found = dict(kv.tensors()), artifact(path)
    for side, turn, clip, decoded in zip(("keys", "values"), (found.k[1], found.v[1]), clips, kv.decode(), strict=True):
        turned = (x.double() @ turn.double()).float().flatten(0, 2)
        for t, row in enumerate(turned.tolist()):
            codes, scale, zero, back = coded(row, clip, bits)
            packed = tensors[f"{side}.codes"][t].tolist()
            assert [byte >> bits * i & 2**bits - 1 for i in range(8 // bits) for byte in packed] == codes
            assert (float(tensors[f"{side}.scale"][t]), float(tensors[f"{side}.zero"][t])) == (scale, zero)
            expected = (torch.tensor(back).double() @ turn.double().T).to(dtype)
            torch.testing.assert_close(decoded.flatten(0, 2)[t], expected, atol=1e-5, rtol=2**-7)


def test_long_rows_have_a_scale_per_128_channels(tmp_path: Path) -> None:
    path = write(tmp_path / "wide", 256)
    x = torch.randn(1, 1, 4, 256)
    kv = OSCAR(path=path, residual=0).encode(x, x, in_layer(0, 4))
    assert dict(kv.tensors())["keys.scale"].shape == (4, 2)
    assert 8 * kv.nbytes == 2.25 * 2 * x.numel()
    assert all(8 * codec.row_nbytes(128) == 2.25 * 128 for codec in OSCAR(path=path).codecs())


def test_clipping_ends_at_the_quantile_of_magnitudes(path: str) -> None:
    """One channel of 16 beyond 0.9 * 16 = 14.4: the largest one is clipped to the next."""
    turned = torch.arange(16.0).view(1, 1, 1, 16)
    turned[..., 15] = 100
    x = turned @ artifact(path).k[0].T
    got = OSCAR(4, path, 0.9, 0.9, 0).encode(x, x, in_layer(0, 1)).keys.dense() @ artifact(path).k[0]
    assert float(got[..., 15]) == pytest.approx(14, abs=0.1) and float(got[..., 14]) == pytest.approx(14, abs=0.1)


@pytest.mark.parametrize("cuts", [[3, 20], [1, 2, 3, 4, 5], []])
def test_any_split_stores_the_same_and_the_newest_stay_exact(path: str, cuts: list[int]) -> None:
    policy, x = OSCAR(path=path, residual=8, sinks=2), torch.randn(2, 2, 30, 16)
    kv = KV.of(x[:, :, :0], x[:, :, :0])
    for start, end in zip([0, *cuts], [*cuts, 30], strict=True):
        kv = policy(kv.append(x[:, :, start:end], x[:, :, start:end]), in_layer(0, end))
    whole = policy.encode(x, x, in_layer(0, 30))
    for mine, wanted in ((kv.keys, whole.keys), (kv.values, whole.values)):
        assert mine.body is not None and wanted.body is not None
        for (name, a), (_, b) in zip(mine.body.exact.tensors(), wanted.body.tensors(), strict=True):
            assert torch.equal(a, b), name
    assert torch.equal(kv.keys.dense(), whole.keys.dense())
    exact = [0, 1, *range(22, 30)]
    assert torch.equal(kv.keys.dense()[:, :, exact], x[:, :, exact])
    kept = kv.gather(torch.tensor([[[0, 5, 9, 25]]]).expand(2, -1, -1))
    assert torch.equal(kept.values.dense(), kv.values.dense()[:, :, [0, 5, 9, 25]])


def test_products_are_those_with_decoded_rows(path: str) -> None:
    x, query, weights = torch.randn(2, 2, 20, 16), torch.randn(2, 2, 3, 16), torch.rand(2, 2, 3, 20)
    kv = OSCAR(path=path, residual=4).encode(x, x, in_layer(1, 20))
    torch.testing.assert_close(kv.keys.scores(query, 0, 20), query @ kv.keys.dense().transpose(2, 3))
    torch.testing.assert_close(kv.values.mix(weights, 0, 20), weights @ kv.values.dense())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": 3}, "bits must be 2 or 4, got 3"),
        ({"path": ""}, "path must be a calibrated folder or the name of one, got ''"),
        ({"clip_keys": 0}, r"clip_keys must be a share in \(0, 1\], got 0"),
        ({"clip_values": True}, r"clip_values must be a share in \(0, 1\], got True"),
        ({"residual": -1}, "residual must be an int of 0 or more tokens, got -1"),
    ],
)
def test_fields_outside_their_sets_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"OSCAR: {message}"):
        OSCAR(**fields)


def test_artifacts_that_are_missing_or_do_not_fit(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no rotations at path='none'; make them: python scripts/calibrate_oscar.py "):
        OSCAR(path="none").check(64)
    asked = "are for 2 layers with heads of 16 channels, but the model has {}; make some for it: python scripts/calibr"
    with pytest.raises(ValueError, match=asked.format("heads of 64 channels")):
        OSCAR(path=path).check(64)
    x = torch.randn(1, 1, 4, 16)
    with pytest.raises(ValueError, match=asked.format("1 layers")):
        OSCAR(path=path).encode(x, x)
    for name, about in {"old": {"format": 2}, "other": {"sha256": "0"}, "wide": {"head_dim": 32}}.items():
        with pytest.raises(ValueError, match="cannot be read .*; make them again: python scripts/calibrate_oscar.py"):
            artifact(write(tmp_path / name, about=about))


# --- What ships --------------------------------------------------------------------------------------------------


def exact_keys_and_values(tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of the proving model's layers, with the last 32 queries."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvbench import CompressedCache
    from kvbench.corpus import document

    folder = Path(str(files("kvbench"))) / "assets" / "proving"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder).encode(document(99, tokens // 2))[:tokens]
    cache = CompressedCache(model, needs={"queries": 32})
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache)
    return [(*layer.kv.decode(), layer.queries) for layer in cache.policy_layers()]


def test_shipped_rotations_are_orthogonal_and_better_than_a_hadamard_matrix_for_the_queries() -> None:
    found = artifact("proving")
    assert (found.layers, found.head_dim) == (4, 64)
    assert sum(file.stat().st_size for file in found.folder.iterdir()) < 2**20
    for turn in (*found.k, *found.v):
        torch.testing.assert_close(turn @ turn.T, torch.eye(64), atol=1e-5, rtol=0)
    lost = {}
    for name, policy in (
        ("oscar", OSCAR(residual=0)),
        ("hadamard", IntToken(2, rotate=True, rotate_values=True)),
        ("plain", IntToken(2)),
    ):
        lost[name] = 0.0
        for order, (keys, values, queries) in enumerate(exact_keys_and_values(512)):
            seen = torch.tensor([keys.shape[2]])
            step = Step(order, seen, seen, order=order, layers=4)
            got = policy.encode(keys, values, step).keys.dense()
            scores = [queries @ k.repeat_interleave(queries.shape[1] // k.shape[1], 1).mT for k in (keys, got)]
            lost[name] += float((scores[1] - scores[0]).norm() / scores[0].norm())
    assert lost["oscar"] < lost["hadamard"] < lost["plain"]


def test_configurations() -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = (files("kvbench.conf") / "quant" / "oscar.yaml").read_text()
    policy = instantiate(OmegaConf.create(config))
    assert policy == OSCAR(2, "proving", 0.96, 0.92, 256, sinks=64)
    policy.check(64)
