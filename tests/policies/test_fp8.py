"""FP8 against its definition in plain loops and stored bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kvbench.policies import FP8, KV, Mixed, Quantizer, Step

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


def byte(x: float, scale: float) -> int:
    """The definition, for one element in float32."""
    ratio = float(F32(x) / F32(scale))
    return min(range(127), key=lambda c: (abs(E4M3[c] - abs(ratio)), c % 2)) + 128 * (x < 0)


def in_layer(layer: int) -> Step:
    return Step(layer, torch.tensor([8]), torch.tensor([8]), order=0, layers=1)


def assert_packed_with(kv: KV, x: torch.Tensor, scales: list[tuple[float, ...]]) -> None:
    """Both sides of `kv` are x [1, H, T, D] coded with scales[side][head]."""
    for side, of_heads, decoded in zip(("keys", "values"), scales, kv.decode(), strict=True):
        codes = dict(kv.tensors())[f"{side}.codes"].view(x.shape)
        for head, scale in enumerate(of_heads):
            flat = x[0, head].flatten().tolist()
            expected = [byte(v, scale) for v in flat]
            assert codes[0, head].flatten().tolist() == expected
            back = [float(F32(E4M3[c % 128]) * F32(scale)) * (-1 if c > 127 else 1) for c in expected]
            assert decoded[0, head].flatten().tolist() == back


LAYOUTS = [
    ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),  # Model-Optimizer
    ("self_attn.k_scale", "self_attn.v_scale"),  # llm-compressor
    ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),  # llm-compressor, first releases
    ("self_attn.attn.k_scale", "self_attn.attn.v_scale"),  # as vLLM names them once loaded
]


@pytest.mark.parametrize("names", LAYOUTS, ids="|".join)
@pytest.mark.parametrize("headroom", [1.0, 1.25])
def test_scales_of_a_checkpoint_belong_to_their_layer(names: tuple[str, str], headroom: float, tmp_path: Path) -> None:
    save_file(
        {
            f"model.layers.0.{names[0]}": torch.tensor([0.5]),
            f"model.layers.0.{names[1]}": torch.tensor(0.25).bfloat16(),
            "model.layers.0.self_attn.k_proj.weight_scale": torch.tensor(9.0),
            "model.layers.0.self_attn.k_proj.input_scale": torch.tensor(9.0),
            "model.layers.0.self_attn.o_proj.output_scale": torch.tensor(9.0),
            "model.layers.0.self_attn.q_scale": torch.tensor(9.0),
        },
        tmp_path / "model-00001-of-00002.safetensors",
    )
    save_file({f"model.layers.12.{names[1]}": torch.tensor(0.1)}, tmp_path / "model-00002-of-00002.safetensors")
    policy = FP8(3.0, 4.0, checkpoint=str(tmp_path), headroom=headroom)
    x = torch.randn(1, 2, 8, 16) * torch.logspace(-4, 3, 8)[:, None]
    for layer, key, value in ((0, 0.5, 0.25), (1, 3.0, 4.0), (12, 3.0, float(F32(0.1)))):
        kv = policy.encode(x, x, in_layer(layer))
        assert_packed_with(kv, x, [(headroom * key,) * 2, (headroom * value,) * 2])
        assert kv.nbytes == FP8().encode(x, x).nbytes  # scales are parameters, not cache


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1), (1, 2, 1)])
def test_scales_per_head_follow_their_rows(shape: tuple[int, ...], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.{}_scale"
    keys, values = (0.5, 0.03), (2.0, 7.0)
    tensors = {name.format("k"): torch.tensor(keys).view(shape), name.format("v"): torch.tensor(values).view(shape)}
    save_file(tensors, tmp_path / "m.safetensors")
    policy = FP8(checkpoint=str(tmp_path / "m.safetensors"), headroom=1.25)
    x = torch.randn(1, 2, 8, 16) * 100
    kv = policy.encode(x, x)
    assert_packed_with(kv, x, [tuple(1.25 * float(F32(s)) for s in side) for side in (keys, values)])
    kept = kv.gather(torch.tensor([[[1, 6, -1], [0, 3, 7]]]))  # rows know their head
    assert torch.equal(kept.keys.dense()[:, 0, :2], kv.keys.dense()[:, 0, [1, 6]])
    assert torch.equal(kept.keys.dense()[:, 1], kv.keys.dense()[:, 1, [0, 3, 7]])
    with pytest.raises(ValueError, match="scales for 2 key-value heads, but the model has 3; use a checkpoint of this"):
        policy.encode(torch.zeros(1, 3, 4, 16), torch.zeros(1, 3, 4, 16))


def test_biases_of_a_checkpoint_are_taken_off_and_put_back(tmp_path: Path) -> None:
    bias = torch.randn(1, 2, 1, 16) * 300
    name = "model.layers.0.self_attn.{}"
    tensors = {name.format("k_proj.k_bias"): bias, name.format("k_proj.k_scale"): torch.tensor(2**-7)}
    save_file(tensors, tmp_path / "m.safetensors")
    policy = FP8(checkpoint=str(tmp_path))
    x = torch.randn(1, 2, 8, 16) + bias
    got, by_hand = policy.encode(x, x), FP8(2**-7).encode(x - bias, x)
    for (field, a), (_, b) in zip(got.tensors(), by_hand.tensors(), strict=True):
        assert torch.equal(a, b), field
    assert torch.equal(got.keys.dense(), by_hand.keys.dense() + bias)
    both = policy.encode(x.expand(3, -1, -1, -1), x.expand(3, -1, -1, -1))  # attention reads without decoding
    query, weights = torch.randn(3, 2, 4, 16), torch.rand(3, 2, 4, 5)
    torch.testing.assert_close(
        both.keys.scores(query, 1, 6), query @ both.keys.dense()[:, :, 1:6].mT, rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(
        both.keys.mix(weights, 1, 6), weights @ both.keys.dense()[:, :, 1:6], rtol=1e-4, atol=1e-3
    )
    assert (got.keys.dense() - x).norm() < 0.05 * (FP8().encode(x, x).keys.dense() - x).norm()


def test_one_scale_for_both_sides(tmp_path: Path) -> None:
    save_file({"model.layers.1.self_attn.kv_scale": torch.tensor(0.5)}, tmp_path / "m.safetensors")
    assert FP8(checkpoint=str(tmp_path)).codecs(in_layer(1)) == FP8(0.5, 0.5).codecs()
    file = tmp_path / "kv_cache_scales.json"
    file.write_text(json.dumps({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"1": 0.25}}}}))
    assert FP8(checkpoint=str(file)).codecs(in_layer(1)) == FP8(0.25, 0.25).codecs()
    assert FP8(2.0, checkpoint=str(file)).codecs(in_layer(0)) == FP8(2.0).codecs()


@pytest.mark.parametrize(
    "tensors, message",
    [
        (None, r"no such file, or no .*; make it: python scripts/calibrate_scales.py --model MODEL --text FILE --out "),
        ({"model.layers.0.self_attn.q_scale": [1.0]}, "no tensor is named"),
        ({"layers.0.self_attn.k_scale": [1.0, -1.0]}, "k_scale of layer 0 must be finite, and positive if it is a sc"),
        ({"layers.0.self_attn.kv_scale": [0.0]}, "k_scale of layer 0 must be finite, and positive if it is a scale"),
        ({"layers.7.self_attn.v_bias": [float("nan")]}, "v_bias of layer 7 must be finite"),
    ],
)
def test_checkpoints_without_usable_scales_are_refused(tensors: dict | None, message: str, tmp_path: Path) -> None:
    if tensors:
        save_file({key: torch.tensor(value) for key, value in tensors.items()}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=f"FP8: checkpoint=.*{message}"):
        FP8(checkpoint=str(tmp_path)).check(64)


@pytest.mark.parametrize("policy, limit", [(FP8(), 448.0), (FP8(format="e5m2"), 57344.0)], ids=str)
def test_headroom_keeps_what_would_saturate_and_saturation_is_counted(policy: FP8, limit: float) -> None:
    x = torch.zeros(1, 1, 2, 4)
    x[0, 0, 0] = torch.tensor([limit, 1.2 * limit, -2 * limit, limit * 0.8])
    assert policy.saturated(policy.encode(x, torch.zeros_like(x))) == (3, 0)
    roomy = FP8(format=policy.format, headroom=1.5)
    kv = roomy.encode(torch.zeros_like(x), x)
    assert roomy.saturated(kv) == (0, 1)
    assert kv.values.dense()[0, 0, 0, 1:3].tolist() == pytest.approx([1.2 * limit, -1.5 * limit], rel=1 / 8)
    assert roomy.saturated(KV.of(x, x)) == (0, 0)


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
        ({"per_token": True, "value_scale": 2.0}, "takes its scales from the tokens; leave value_scale out, got 2.0"),
        ({"per_token": True, "checkpoint": "x"}, "takes its scales from the tokens; leave checkpoint out, got 'x'"),
        ({"per_token": True, "headroom": 1.5}, "takes its scales from the tokens; leave headroom out, got 1.5"),
        ({"format": "e5m2", "checkpoint": "x"}, "scales of a checkpoint are for e4m3; leave format out, got 'e5m2'"),
        ({"checkpoint": 3}, "checkpoint must be the path of a folder or file, got 3"),
        ({"headroom": 0.9}, "headroom must be a number of at least 1, got 0.9"),
        ({"headroom": float("inf")}, "headroom must be a number of at least 1, got inf"),
    ],
)
def test_other_formats_and_two_kinds_of_scale_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"FP8: .*{message}"):
        FP8(**fields)


@pytest.mark.parametrize(
    "name, policy",
    [
        ("fp8", FP8()),
        ("fp8_token", FP8(per_token=True)),
        ("fp8_e5m2", FP8(format="e5m2")),
        ("fp8_tensor", FP8(checkpoint="proving", headroom=1.25)),
        ("fp8_head", FP8(checkpoint="proving_head", headroom=1.25)),
        ("fp8_values", Mixed(None, FP8())),
    ],
)
def test_configurations(name: str, policy: Quantizer) -> None:
    from importlib.resources import files

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = (files("kvbench.conf") / "quant" / f"{name}.yaml").read_text()
    assert instantiate(OmegaConf.create(config)) == policy
