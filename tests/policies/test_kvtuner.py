"""KVTuner against its definition in plain loops: every layer at its own bits, and bytes that add up over layers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbench.policies import KIVI, KVTuner, Random, Stack, Step
from kvbench.policies.interface import KV

F32 = np.float32
NINE = tuple((k, v) for k in (2, 4, 8) for v in (2, 4, 8))


def at(policy: KVTuner, layer: int, tokens: int = 32) -> Step:
    seen = torch.tensor([tokens])
    return Step(layer, seen, seen, order=layer, layers=len(policy.bits))


def affine(group: list[float], bits: int) -> tuple[list[int], np.float16, np.float16, list[float]]:
    """One group -> codes, scale, zero, decoded: the definition, one float32 at a time."""
    xs, top = [F32(x) for x in group], 2**bits - 1
    scale, zero = np.float16((max(xs) - min(xs)) / F32(top)), np.float16(min(xs))
    codes = [0 if scale == 0 else int(min(max(np.rint((x - F32(zero)) / F32(scale)), 0), top)) for x in xs]
    return codes, scale, zero, [float(F32(c) * F32(scale) + F32(zero)) for c in codes]


def planar(codes: list[int], bits: int) -> list[int]:
    """A token's codes -> its bytes: byte j holds channels j + i * D * bits / 8 at bit bits * i."""
    planes, width = 8 // bits, len(codes) * bits // 8
    return [sum(codes[j + i * width] << (bits * i) for i in range(planes)) for j in range(width)]


def expected(x: Tensor, bits: int, size: int, per_channel: bool) -> tuple[list, list, list, list]:
    """x [T, D] -> bytes [T][D*bits/8], scale and zero as they are stored, decoded [T][D]."""
    tokens, channels = x.shape
    codes, decoded = np.zeros((tokens, channels), int), np.zeros((tokens, channels), F32)
    shape = (tokens // size, channels) if per_channel else (tokens, channels // size)
    scale, zero = np.zeros(shape, np.float16), np.zeros(shape, np.float16)
    for a in range(shape[0]):
        for b in range(shape[1]):
            where = [(a * size + i, b) if per_channel else (a, b * size + i) for i in range(size)]
            found = affine([float(x[w]) for w in where], bits)
            scale[a, b], zero[a, b] = found[1], found[2]
            for w, code, value in zip(where, found[0], found[3], strict=True):
                codes[w], decoded[w] = code, value
    packed = [planar([int(c) for c in row], bits) for row in codes]
    return packed, scale.tolist(), zero.tolist(), decoded.tolist()


@pytest.mark.parametrize("mode", ["kivi", "token"])
@pytest.mark.parametrize("layer", range(9))
def test_codes_scales_zeros_bytes_and_values_are_the_definition(mode: str, layer: int) -> None:
    policy = KVTuner(pairs=NINE, group_size=8, residual=0, mode=mode)
    keys, values = (torch.randn(16, 16) * torch.linspace(0.1, 9, 16) - 2 for _ in range(2))
    kv = policy.encode(keys[None, None], values[None, None], at(policy, layer))
    stored = dict(kv.tensors())
    for side, x, bits, per_channel, got in zip(
        ("keys", "values"), (keys, values), NINE[layer], (mode == "kivi", False), kv.decode(), strict=True
    ):
        codes, scale, zero, decoded = expected(x, bits, 8, per_channel)
        assert stored[f"{side}.codes"].dtype == torch.uint8 and stored[f"{side}.codes"].tolist() == codes
        assert stored[f"{side}.scale"].tolist() == scale and stored[f"{side}.zero"].tolist() == zero
        assert got[0, 0].tolist() == decoded


def test_what_kivi_knows_is_kivi() -> None:
    x = torch.randn(2, 1, 2, 70, 32)
    for layer, pair in enumerate(NINE):
        ours = KVTuner(pairs=NINE, group_size=16, residual=32).encode(*x, at(KVTuner(pairs=NINE), layer)).decode()
        for side, bits in enumerate(pair):
            if bits < 8:
                assert torch.equal(ours[side], KIVI(bits, 16, 32).encode(*x).decode()[side])


@pytest.mark.parametrize("mode", ["kivi", "token"])
def test_grids_and_constant_groups_are_exact_at_eight_bits(mode: str) -> None:
    codes = torch.randint(0, 256, (32, 32)).float()
    index = torch.arange(32)
    codes[index, index], codes[index, (index + 1) % 32] = 0, 255  # every row and column spans the whole range
    grid = (codes * 0.25 - 16)[None, None]
    policy = KVTuner(pairs=((8, 8),), group_size=32, residual=0, mode=mode)
    assert all(torch.equal(got, grid) for got in policy.encode(grid, grid).decode())
    for constant in (torch.full((1, 1, 32, 32), -3.5), torch.zeros(1, 1, 32, 32)):
        assert all(torch.equal(got, constant) for got in policy.encode(constant, constant).decode())


def test_more_bits_err_less() -> None:
    x = torch.randn(1, 2, 64, 32)
    errors = []
    for bits in (2, 4, 8):
        got = KVTuner(pairs=((bits, bits),), residual=0).encode(x, x).decode()
        errors.append([float((g - x).norm() / x.norm()) for g in got])
    assert all(a > 3 * b > 30 * c for a, b, c in zip(*errors, strict=True))


@pytest.mark.parametrize("mode, residual, keys_left", [("kivi", 16, 5), ("token", 16, 16), ("token", 3, 3)])
def test_windows(mode: str, residual: int, keys_left: int) -> None:
    x = torch.randn(1, 1, 37, 8)
    kv = KVTuner(pairs=((4, 8),), group_size=8, residual=residual, mode=mode).encode(x, x)
    assert kv.keys.tail_counts.even == keys_left and kv.values.tail_counts.even == residual
    assert torch.equal(kv.keys.dense()[:, :, -keys_left:], x[:, :, -keys_left:])


# --- Bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(9))
@pytest.mark.parametrize("mode", ["kivi", "token"])
def test_bits_per_element(mode: str, layer: int) -> None:
    """b + 32 / group_size: 9, 5 and 3 bits in groups of 32."""
    policy = KVTuner(pairs=NINE, residual=0, mode=mode)
    x = torch.randn(1, 2, 64, 128, dtype=torch.float16)
    kv = policy.encode(x, x, at(policy, layer))
    for side, bits in zip((kv.keys, kv.values), NINE[layer], strict=True):
        assert 8 * side.nbytes == (bits + 1) * x.numel()
    assert kv.nbytes == int(policy.slot_nbytes(torch.tensor(64), 2, 128, 2, at(policy, layer)))


def test_a_byte_budget_is_spent_over_all_layers_as_the_formula_says() -> None:
    policy = Stack((Random(memory=0.1), KVTuner(pairs=((8, 8), (2, 2), (4, 2)), group_size=8, residual=0)))
    keys, values = torch.randn(2, 1, 2, 640, 32).half()
    held, slots = 0, set()
    for layer in range(3):
        seen = torch.tensor([640])
        kv = policy(KV.of(keys, values), Step(layer, seen, seen, order=layer, layers=3))
        held += kv.nbytes
        slots.add(kv.counts.even)
    allowed = 0.1 * 3 * 2 * keys.nbytes
    assert len(slots) == 1 and 0.9 * allowed < held
    quantizer, most = policy.policies[1], slots.pop()

    def total(count: int) -> int:
        rows = [int(quantizer.slot_nbytes(torch.tensor(count), 2, 32, 2, at(quantizer, i))) for i in range(3)]
        return sum(rows) + 3 * 2 * 4 * count  # and positions

    assert total(most) <= allowed < total(most + 1)


# --- Where the bits come from ------------------------------------------------------------------------------------


def table(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_bits_are_read_from_json(tmp_path: Path) -> None:
    rows = {str(i): {"nbits_key": k, "nbits_value": v} for i, (k, v) in enumerate(NINE)}
    path = table(tmp_path / "nine.json", {"search": {"seconds": 1}, **dict(reversed(rows.items()))})
    policy = KVTuner(path)
    assert policy.bits == NINE and str(policy) == f"KVTuner(path={path!r})"
    x = torch.randn(1, 1, 64, 32)
    for layer in range(9):
        by_hand = KVTuner(pairs=NINE)
        for a, b in zip(*(p.encode(x, x, at(p, layer)).decode() for p in (policy, by_hand)), strict=True):
            assert torch.equal(a, b)


def test_the_proving_model_has_its_bits() -> None:
    bits = KVTuner("proving").bits
    assert len(bits) == 4 and sum(map(sum, bits)) / 8 <= 3
    KVTuner("proving").check(64)


@pytest.mark.parametrize(
    "content", [[1, 2], {}, {"1": {"nbits_key": 2, "nbits_value": 2}}, {"0": {"nbits_key": 2}}, {"0": 4}, "x"], ids=str
)
def test_other_files_are_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(ValueError, match=r"KVTuner: .*(no table of bits, \{layer|pairs must be \(key bits)"):
        KVTuner(table(tmp_path / "bad.json", content)).check(64)


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(ValueError, match="no table of bits"):
        KVTuner(str(tmp_path / "no.json")).check(64)
    with pytest.raises(ValueError, match=r"no file .*gone.json; make it with python scripts/search_kvtuner.py"):
        KVTuner(str(tmp_path / "gone.json")).check(64)
    policy, x = KVTuner(pairs=((2, 2), (4, 4))), torch.zeros(1, 1, 32, 32)
    with pytest.raises(ValueError, match="bits are given for 2 layers, but the model has 3; scripts/search_kvtuner"):
        policy.encode(x, x, Step(0, torch.tensor([32]), torch.tensor([32]), layers=3))
    with pytest.raises(ValueError, match=r"head_dim=80 is not a multiple of 32 \(group_size\)"):
        policy.check(80)
    with pytest.raises(ValueError, match="head_dim=6 is not a multiple of 4 .2-bit codes per byte"):
        KVTuner(pairs=((8, 2),), group_size=2, residual=0).check(6)
    KVTuner(pairs=((8, 8),), group_size=2, residual=0).check(6)
    with pytest.raises(ValueError, match="fp16, at most 65504"):
        KVTuner(pairs=((8, 8),), residual=0).encode(x + 70000, x)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "give either path="),
        ({"path": "proving", "pairs": ((2, 2),)}, "give either path="),
        ({"pairs": ()}, r"pairs must be \(key bits, value bits\) of every layer, each 2, 4 or 8, got \(\)"),
        ({"pairs": ((2, 3),)}, r"each 2, 4 or 8, got \(\(2, 3\),\)"),
        ({"pairs": ((2.0, 2),)}, "each 2, 4 or 8"),
        ({"pairs": (4, 4)}, "each 2, 4 or 8"),
        ({"pairs": ((4, 4),), "mode": "channel"}, "mode must be 'kivi' or 'token', got 'channel'"),
        ({"pairs": ((4, 4),), "group_size": 0}, "group_size must be a positive int, got 0"),
        ({"pairs": ((4, 4),), "residual": 40}, "residual must be 0 or a multiple of group_size=32 tokens, got 40"),
        ({"pairs": ((4, 4),), "residual": -1, "mode": "token"}, "residual must be 0 or more tokens, got -1"),
    ],
)
def test_fields_outside_their_sets_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVTuner(**fields)


def test_configuration() -> None:
    from importlib.resources import files

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = OmegaConf.create((files("kvbench.conf") / "quant" / "kvtuner.yaml").read_text())
    assert instantiate(config) == KVTuner("proving")
    config.path, config.pairs = None, [[8, 4], [2, 2]]
    assert instantiate(config) == KVTuner(pairs=((8, 4), (2, 2))) and hash(instantiate(config))
