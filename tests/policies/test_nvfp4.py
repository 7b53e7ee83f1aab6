"""NVFP4 against its definition in plain loops, every code at every scale, stored bytes, and checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvbench.kernels.packing import decode_e2m1, decode_e4m3, pack_interleaved, unpack_interleaved
from kvbench.kernels.rotation import hadamard
from kvbench.policies import KV, NVFP4, Step

F32 = np.float32
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m * 2.0**-9 if e == 0 else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8)][:127]


def nearest(x: float, values: list[float]) -> int:
    return min(range(len(values)), key=lambda c: (abs(values[c] - x), c % 2))


def block(xs: list[float], tensor_scale: float) -> tuple[list[int], int, list[float]]:
    """16 values -> codes, E4M3 byte, decoded: the definition, one float32 at a time."""
    xs = [F32(x) for x in xs]
    largest = max(abs(x) for x in xs)
    gs = F32(tensor_scale / 6)
    if largest == 0:
        return [0] * 16, E4M3.index(1.0), [0.0] * 16
    byte = nearest(min(max(float(largest / F32(tensor_scale)), 2**-9), 448.0), E4M3)
    scale = F32(E4M3[byte]) * gs
    codes = [nearest(float(abs(x) / scale), E2M1) + 8 * bool(np.signbit(x)) for x in xs]
    return codes, byte, [float(F32(E2M1[c % 8]) * scale) * (-1 if c > 7 else 1) for c in codes]


def stored(kv: KV, side: str) -> tuple[Tensor, Tensor]:
    tensors = dict(kv.tensors())
    return tensors[f"{side}.codes"], tensors[f"{side}.scale"]


@pytest.mark.parametrize("tensor_scale", [1.0, 0.03, 7.5])
@pytest.mark.parametrize("head_dim, dtype", [(64, torch.float32), (80, torch.bfloat16), (16, torch.float16)])
def test_codes_scales_and_values_are_the_definition(tensor_scale: float, head_dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(1, 1, 24, head_dim) * torch.logspace(-6, 3.5, 24)[:, None]  # from tiny blocks to saturated ones
    x[..., 3, :] = 0
    x[..., 4, :] = -0.0
    x = x.to(dtype)
    kv = NVFP4(value_scale=tensor_scale).encode(x, x)
    codes, scale = stored(kv, "values")
    assert codes.dtype == scale.dtype == torch.uint8
    decoded = kv.decode()[1][0, 0]
    assert decoded.dtype == dtype
    for t, token in enumerate(x[0, 0].float().tolist()):
        for b in range(head_dim // 16):
            expected_codes, expected_byte, expected = block(token[16 * b : 16 * b + 16], tensor_scale)
            nibbles = [n for byte in codes[t, 8 * b : 8 * b + 8].tolist() for n in (byte & 15, byte >> 4)]
            assert (nibbles, int(scale[t, b])) == (expected_codes, expected_byte)
            assert decoded[t, 16 * b : 16 * b + 16].tolist() == torch.tensor(expected).to(dtype).tolist()


@pytest.mark.parametrize("tensor_scale", [1.0, 0.0123])
def test_all_codes_at_all_scales_round_trip(tensor_scale: float) -> None:
    scales = torch.arange(1, 127, dtype=torch.uint8)  # every positive finite E4M3; block scales have no sign
    codes = torch.stack([torch.randperm(16) for _ in range(126)]).to(torch.uint8)
    x = decode_e2m1(pack_interleaved(codes, 4)) * (decode_e4m3(scales) * (tensor_scale / 6))[:, None]
    kv = NVFP4(tensor_scale, tensor_scale).encode(x[None, None], x[None, None])
    for side in ("keys", "values"):
        got, got_scale = stored(kv, side)
        assert torch.equal(got_scale[:, 0], scales)
        assert torch.equal(unpack_interleaved(got, 4), codes)
    assert all(torch.equal(got[0, 0], x) for got in kv.decode())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_bounds(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 2, 128, 64) * torch.logspace(-1, 1.5, 128)[:, None]).to(dtype)
    kv = NVFP4().encode(x, x)
    scale = (decode_e4m3(stored(kv, "keys")[1]) / 6).view(2, 2, 128, 4, 1)
    blocks = x.float().unflatten(-1, (4, 16))
    error = (kv.keys.dense().float().unflatten(-1, (4, 16)) - blocks).abs()
    slack = 1 + 2**-10
    assert bool((error <= scale * slack).all())
    assert bool((error <= 0.177 * slack * blocks.abs().amax(-1, keepdim=True)).all())


def test_requantizing_decoded_values_changes_nothing() -> None:
    """For blocks above the subnormal scales, where rounding the scale cannot move the largest code."""
    x = torch.randn(1, 2, 200, 64) * torch.logspace(-1, 1.5, 200)[:, None]
    once = NVFP4().encode(x, x)
    again = NVFP4().encode(*once.decode())
    for (name, a), (_, b) in zip(once.tensors(), again.tensors(), strict=True):
        assert torch.equal(a, b), name


def test_cast_variant_decodes_to_e4m3_and_saturates_at_448() -> None:
    x = torch.tensor([448.0, 1e4, -3e38, 15.0] + [0.0] * 12).view(1, 1, 1, 16)
    got = NVFP4().encode(x, x).decode()[0].flatten()
    assert got[:4].tolist() == pytest.approx([448, 448, -448, 0], rel=1e-6)  # gs = 1/6 is rounded


def test_checkpoint_scales_reach_their_side_only() -> None:
    x = torch.randn(1, 1, 8, 32) * 3000
    plain, scaled = NVFP4().encode(x, x), NVFP4(key_scale=1.0, value_scale=30.0).encode(x, x)
    assert torch.equal(plain.keys.dense(), scaled.keys.dense())
    assert float(plain.values.dense().abs().max()) == pytest.approx(448, rel=1e-6)
    assert (scaled.values.dense() - x).abs().max() <= 0.177 * x.abs().max()
    assert plain.nbytes == scaled.nbytes == 2 * 8 * (32 // 2 + 32 // 16)  # the tensor scale is not stored


# One token of 16 channels -> bytes of codes, then of the scale.
GOLDEN = [
    ([0.0] * 16, "000000000000000038"),
    ([-0.0] * 16, "000000000000000038"),
    ([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], "1032547698badcfe4c"),
    (
        [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0],
        "072244668faaccee4c",
    ),
    ([i / 7 for i in range(16)], "102243545566667741"),
    ([(-1) ** i * 2.0**i / 100 for i in range(16)], "808080808090b2f57a"),
    ([1e-4 * i for i in range(-8, 8)], "ccbcaa991021324401"),
    ([1000.0, -500.0, 448.0, 100.0] + [37.3] * 12, "f7371111111111117e"),
]


@pytest.mark.parametrize("x, golden", GOLDEN)
def test_stored_bytes_never_change(x: list[float], golden: str) -> None:
    token = torch.tensor(x).view(1, 1, 1, 16)
    kv = NVFP4().encode(token, token)
    for side in ("keys", "values"):
        assert b"".join(t.numpy().tobytes() for t in stored(kv, side)).hex() == golden


@pytest.mark.parametrize("field", ["key_scale", "value_scale"])
@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), None, "1"])
def test_scales_must_be_positive(field: str, scale: object) -> None:
    with pytest.raises(ValueError, match=f"NVFP4: {field} must be a positive number, got {scale!r}"):
        NVFP4(**{field: scale})


def test_head_dim_must_fill_blocks() -> None:
    with pytest.raises(ValueError, match=r"NVFP4\(\): head_dim=72 is not a multiple of 16"):
        NVFP4().check(72)
    with pytest.raises(ValueError, match="head_dim=72"):
        NVFP4().encode(torch.zeros(1, 1, 4, 72), torch.zeros(1, 1, 4, 72))
    for head_dim in (64, 80, 96, 128, 256):
        NVFP4().check(head_dim)


def in_layer(layer: int) -> Step:
    return Step(layer, torch.tensor([8]), torch.tensor([8]), order=0, layers=1)


def test_rotated_keys_come_back_unrotated_and_values_stay_as_they_are() -> None:
    keys, values = torch.randn(2, 1, 2, 8, 96)
    keys[..., 5] += 100
    plain, rotated = NVFP4().encode(keys, values), NVFP4(rotate=True).encode(keys, values)
    by_hand = NVFP4().encode(hadamard(keys), values)
    for a, b in zip(stored(rotated, "keys"), stored(by_hand, "keys"), strict=True):
        assert torch.equal(a, b)
    assert torch.allclose(rotated.keys.dense(), hadamard(by_hand.keys.dense()), atol=1e-4)
    assert torch.equal(rotated.values.dense(), plain.values.dense())
    assert rotated.nbytes == plain.nbytes


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards, as exported: layers 0 and 2 of a model with 2 key-value heads of 32 channels."""
    name = "model.layers.{}.self_attn.{}_proj.{}"
    save_file(
        {
            name.format(0, "k", "k_scale"): torch.tensor(0.5),
            name.format(0, "v", "v_scale"): torch.tensor([0.25]).bfloat16(),
            name.format(0, "k", "weight_scale"): torch.tensor(9.0),
            name.format(0, "k", "bias"): torch.full((64,), 9.0),
        },
        tmp_path / "model-00001-of-00002.safetensors",
    )
    save_file(
        {
            name.format(2, "k", "k_scale"): torch.tensor(2.0),
            name.format(2, "k", "k_bias"): torch.arange(64.0).view(1, 2, 1, 32),
            name.format(2, "v", "v_bias"): -torch.arange(64.0).view(1, 2, 1, 32),
        },
        tmp_path / "model-00002-of-00002.safetensors",
    )
    return tmp_path


def test_scales_and_biases_of_a_checkpoint_belong_to_their_layer(checkpoint: Path) -> None:
    keys, values = torch.randn(2, 3, 2, 8, 32)
    policy = NVFP4(3.0, 4.0, checkpoint=str(checkpoint))
    for layer, plain in ((0, NVFP4(0.5, 0.25)), (1, NVFP4(3.0, 4.0))):
        got, expected = policy.encode(keys, values, in_layer(layer)), plain.encode(keys, values)
        for (name, a), (_, b) in zip(got.tensors(), expected.tensors(), strict=True):
            assert torch.equal(a, b), name
        assert all(torch.equal(a, b) for a, b in zip(got.decode(), expected.decode(), strict=True))
    bias = torch.arange(64.0).view(1, 2, 1, 32)
    got, expected = policy.encode(keys, values, in_layer(2)), NVFP4(2.0, 4.0).encode(keys - bias, values + bias)
    for (name, a), (_, b) in zip(got.tensors(), expected.tensors(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(got.keys.dense(), expected.keys.dense() + bias)
    assert torch.equal(got.values.dense(), expected.values.dense() - bias)
    assert got.nbytes == NVFP4().encode(keys, values).nbytes  # biases are parameters, not cache
    kept = got.gather(torch.tensor([[[1, 6, -1], [0, 3, 7]]]).expand(3, -1, -1))  # rows know their head
    assert torch.equal(kept.keys.dense()[:, 0, :2], got.keys.dense()[:, 0, [1, 6]])
    assert torch.equal(kept.keys.dense()[:, 1], got.keys.dense()[:, 1, [0, 3, 7]])


def test_a_bias_costs_nothing_once_it_is_known(checkpoint: Path) -> None:
    """Keys around a large bias per channel (Qwen2.5): the affine variant codes only what moves."""
    keys = torch.randn(1, 2, 64, 32) + torch.arange(64.0).view(1, 2, 1, 32)
    affine, plain = (
        policy.encode(keys, keys, in_layer(2)).keys.dense() for policy in (NVFP4(checkpoint=str(checkpoint)), NVFP4())
    )
    assert (affine - keys).norm() < 0.1 * (plain - keys).norm()
    rotated = NVFP4(rotate=True, checkpoint=str(checkpoint)).encode(keys, keys, in_layer(2)).keys.dense()
    assert (rotated - keys).norm() < 0.1 * (plain - keys).norm()


def test_one_scale_per_layer_from_json(tmp_path: Path) -> None:
    file = tmp_path / "kv_cache_scales.json"
    file.write_text(json.dumps({"kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": {"0": 0.5, "1": 2}}}}))
    policy = NVFP4(checkpoint=str(file))
    assert policy.codecs() == NVFP4(0.5, 0.5).codecs() and policy.codecs(in_layer(1)) == NVFP4(2.0, 2.0).codecs()
    assert policy.codecs(in_layer(2)) == NVFP4().codecs()


@pytest.mark.parametrize(
    "name, tensors, message",
    [
        (
            "missing",
            None,
            "no such file, or no .*; make it: python scripts/calibrate_scales.py --model MODEL --text FI",
        ),
        ("m.safetensors", {"model.norm.weight": [1.0]}, "no tensor is named"),
        ("m.safetensors", {"layers.0.k_proj.k_scale": [0.0]}, "k_scale of layer 0 must be finite, and positive"),
        ("m.safetensors", {"layers.0.k_proj.k_scale": [1.0, 2.0]}, "k_scale of layer 0 must be one number, got 2; "),
        ("m.safetensors", {"layers.3.v_proj.v_bias": [float("nan")]}, "v_bias of layer 3 must be"),
        ("m.json", {"kv_cache": {}}, 'must be {"kv_cache": {"scaling_factor": .*, of one rank'),
        ("m.json", {"kv_cache": {"scaling_factor": {"0": {}, "1": {}}}}, "of one rank"),
        ("m.json", {"kv_cache": {"scaling_factor": {"0": {"0": "high"}}}}, "of one rank"),
    ],
)
def test_checkpoints_without_usable_scales_are_refused(
    name: str, tensors: dict | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if name.endswith("json"):
        file.write_text(json.dumps(tensors))
    elif tensors:
        save_file({key: torch.tensor(value) for key, value in tensors.items()}, file)
    with pytest.raises(ValueError, match=f"NVFP4: .*{message}"):
        NVFP4(checkpoint=str(file)).check(64)


def test_checkpoints_of_other_models_and_other_types_are_refused(checkpoint: Path) -> None:
    x = torch.zeros(1, 4, 8, 32)
    with pytest.raises(ValueError, match="k_bias of layer 2 has 64 values, but the model has 4 key-value heads of 32"):
        NVFP4(checkpoint=str(checkpoint)).encode(x, x, in_layer(2))
    with pytest.raises(ValueError, match="NVFP4: rotate must be true or false, got 'keys'"):
        NVFP4(rotate="keys")
    with pytest.raises(ValueError, match="NVFP4: checkpoint must be the path of a folder or file, got 1"):
        NVFP4(checkpoint=1)


@pytest.mark.parametrize(
    "name, policy",
    [
        ("nvfp4", NVFP4()),
        ("nvfp4_rotate", NVFP4(rotate=True)),
        ("nvfp4_affine", NVFP4(checkpoint="proving_affine")),
    ],
)
def test_configurations(name: str, policy: NVFP4) -> None:
    from importlib.resources import files

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = (files("kvbench.conf") / "quant" / f"{name}.yaml").read_text()
    assert instantiate(OmegaConf.create(config)) == policy
