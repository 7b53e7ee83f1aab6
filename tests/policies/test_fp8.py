"""FP8 against its definition in plain loops and stored bytes."""

import numpy as np
import pytest
import torch

from kvbench.policies import FP8

F32 = np.float32
E4M3 = [m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127]
E5M2 = [m * 2.0**-16 if e == 0 else (4 + m) * 2.0 ** (e - 17) for e in range(31) for m in range(4)]


@pytest.mark.parametrize("scale", [1.0, 0.03, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_and_values_are_the_definition(scale: float, dtype: torch.dtype) -> None:
    x = (torch.randn(1, 1, 12, 16) * torch.logspace(-5, 3.5, 12)[:, None]).to(dtype)
    kv = FP8(key_scale=scale).encode(x, x)
    codes = dict(kv.tensors())["keys.codes"]
    assert codes.dtype == torch.uint8 and kv.keys.dense().dtype == dtype
    decoded = kv.keys.dense().flatten().tolist()
    for value, code, got in zip(x.flatten().float().tolist(), codes.flatten().tolist(), decoded, strict=True):
        ratio = float(F32(value) / F32(scale))
        expected = min(range(127), key=lambda c: (abs(E4M3[c] - abs(ratio)), c % 2))
        assert code == expected + 128 * (value < 0)
        magnitude = float(F32(E4M3[expected]) * F32(scale))
        assert got == float(torch.tensor(-magnitude if value < 0 else magnitude).to(dtype))


@pytest.mark.parametrize("format, grid", [("e4m3", E4M3), ("e5m2", E5M2)])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_formats_and_scales_per_token_are_the_definition(
    format: str, grid: list[float], per_token: bool, dtype: torch.dtype
) -> None:
    x = (torch.randn(1, 1, 14, 16) * torch.logspace(-7, 6, 14)[:, None]).to(dtype)
    x[..., 5, :] = 0
    kv = FP8(format=format, per_token=per_token).encode(x, x)
    for side, decoded in zip(("keys", "values"), kv.decode(), strict=True):
        tensors = {name.split(".")[1]: t for name, t in kv.tensors() if name.startswith(side)}
        assert per_token == ("scale" in tensors) and decoded.dtype == dtype
        for t, row in enumerate(x[0, 0].float().tolist()):
            scale = F32(max(abs(F32(v)) for v in row)) / F32(grid[-1]) if per_token else F32(1)
            if per_token:
                assert tensors["scale"].dtype == torch.float32 and float(tensors["scale"][t]) == float(scale)
            for d, value in enumerate(row):
                ratio = min(abs(float(F32(value) / scale)), grid[-1]) if scale else 0.0
                code = min(range(len(grid)), key=lambda c: (abs(grid[c] - ratio), c % 2))
                assert int(tensors["codes"][t, d]) == code + 128 * (value < 0)
                expected = float(torch.tensor(float(F32(grid[code]) * scale)).to(dtype))
                assert float(decoded[0, 0, t, d]) == (-expected if value < 0 else expected)


def test_scales_per_token_cost_a_float_each_and_nothing_saturates() -> None:
    x = torch.randn(1, 2, 32, 128) * torch.logspace(-8, 8, 32)[:, None]
    policy = FP8(per_token=True)
    kv = policy.encode(x, x)
    assert 8 * kv.nbytes == 8.25 * 2 * x.numel()
    for got in kv.decode():
        assert bool(((got - x).abs() <= (x.abs() / 16).clamp(min=x.abs().amax(-1, keepdim=True) * 2**-19)).all())


def test_e5m2_has_the_range_of_fp16_at_an_eighth_of_error() -> None:
    x = torch.randn(1, 1, 64, 64) * torch.logspace(-7, 4, 64)[:, None]
    got = FP8(format="e5m2").encode(x, x).keys.dense()
    assert bool(((got - x).abs() <= (x.abs() / 8).clamp(min=2**-17)).all())
    x = torch.tensor([57344.0, 65504.0, -3e38, 0.0]).view(1, 1, 1, 4)
    keys, values = FP8(value_scale=2.0, format="e5m2").encode(x, x).decode()
    assert keys.flatten().tolist() == [57344, 57344, -57344, 0]
    assert values.flatten().tolist() == [57344, 65536, -114688, 0]


def test_error_bound() -> None:
    x = torch.randn(1, 1, 64, 64) * torch.logspace(-5, 2, 64)[:, None]
    got = FP8().encode(x, x).decode()[0]
    assert bool(((got - x).abs() <= (x.abs() / 16).clamp(min=2**-10)).all())


def test_saturates_at_448_times_the_scale() -> None:
    x = torch.tensor([448.0, 465.0, 1e6, -3e38]).view(1, 1, 1, 4)
    keys, values = FP8(value_scale=2.0).encode(x, x).decode()
    assert keys.flatten().tolist() == [448, 448, 448, -448]
    assert values.flatten().tolist() == [448, 480, 896, -896]


def test_requantizing_decoded_values_changes_nothing() -> None:
    for policy in (FP8(), FP8(0.37, 12.5)):
        x = torch.randn(1, 2, 64, 64) * 10
        once = policy.encode(x, x)
        again = policy.encode(*once.decode())
        for (name, a), (_, b) in zip(once.tensors(), again.tensors(), strict=True):
            assert torch.equal(a, b), name


GOLDEN = [
    ([0.0, -0.0, 1.0, -1.0], "008038b8"),
    ([448.0, -448.0, 449.0, -1e30], "7efe7efe"),
    ([2.0**-9, 2.0**-10, 3 * 2.0**-10, -(2.0**-6)], "01000288"),
    ([1.0625, 1.1875, -1.0625, -1.1875], "383ab8ba"),
    ([0.1, 0.2, 0.3, 0.4], "1d252a2d"),
    ([3.14159, 2.71828, -1.41421, 0.57722], "4543bb31"),
    ([100.0, 17.0, 19.0, 250.0], "6c585a78"),
    ([1e-4, -1e-3, 1e-2, -7e-2], "00810599"),
]


@pytest.mark.parametrize("x, golden", GOLDEN)
def test_stored_bytes_never_change(x: list[float], golden: str) -> None:
    token = torch.tensor(x).view(1, 1, 1, 4)
    tensors = dict(FP8().encode(token, token).tensors())
    for side in ("keys", "values"):
        assert tensors[f"{side}.codes"].numpy().tobytes().hex() == golden


@pytest.mark.parametrize("field", ["key_scale", "value_scale"])
@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), None, "1"])
def test_scales_must_be_positive(field: str, scale: object) -> None:
    with pytest.raises(ValueError, match=f"FP8: {field} must be a positive number, got {scale!r}"):
        FP8(**{field: scale})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"format": "e3m4"}, r"format must be one of \['e4m3', 'e5m2'\], got 'e3m4'"),
        ({"per_token": 1}, "per_token must be true or false, got 1"),
        ({"per_token": True, "value_scale": 2.0}, "leave key_scale and value_scale at 1, got 1.0 and 2.0"),
    ],
)
def test_other_formats_and_two_kinds_of_scale_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"FP8: .*{message}"):
        FP8(**fields)


@pytest.mark.parametrize(
    "name, policy", [("fp8", FP8()), ("fp8_token", FP8(per_token=True)), ("fp8_e5m2", FP8(format="e5m2"))]
)
def test_configurations(name: str, policy: FP8) -> None:
    from importlib.resources import files

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = (files("kvbench.conf") / "quant" / f"{name}.yaml").read_text()
    assert instantiate(OmegaConf.create(config)) == policy
