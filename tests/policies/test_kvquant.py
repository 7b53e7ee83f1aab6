"""KVQuant against its definition in plain loops, the laws of all quantizers, artifacts, and on the proving model."""

import hashlib
import json
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from kvbench import CompressedCache
from kvbench.corpus import document
from kvbench.kernels.rotation import rotate
from kvbench.policies import FP8, KV, KVQuant, Mixed, Quantizer, Step, StreamingLLM
from kvbench.policies.kvquant import DynamicPerToken, StaticPerChannel, artifact
from kvbench.policies.store import Counts, Packed, Where

F32 = np.float32
HEADS, LAYERS = 2, 3
PROVING = str(files("kvbench") / "assets" / "proving")
FREQUENCY = 100.0 ** -(torch.arange(8) / 8)
STILL = torch.zeros(8)  # a RoPE that turns nothing


def write(folder: Path, head_dim: int = 16, outliers: float = 0.01, about: dict | None = None) -> str:
    """An artifact with random ranges and signposts."""
    generator = torch.Generator().manual_seed(head_dim)
    tensors = {}
    for i in range(LAYERS):
        middle, width = torch.randn(2, HEADS, head_dim, generator=generator)
        tensors[f"layers.{i}.k.lower"] = (middle - width.abs() - 0.5).half()
        tensors[f"layers.{i}.k.upper"] = (middle + width.abs() + 0.5).half()
        for side in "kv":
            for bits in (2, 3, 4):
                signposts = torch.rand(2**bits, generator=generator) * 2 - 1
                tensors[f"layers.{i}.{side}.codebook.{bits}"] = signposts.sort().values
                tensors[f"layers.{i}.{side}.qnorm.{bits}"] = torch.tensor([1.25, -0.0625]) + i
    folder.mkdir(parents=True, exist_ok=True)
    data = save(tensors)
    (folder / "kvquant.safetensors").write_bytes(data)
    sizes = {"layers": LAYERS, "heads": HEADS, "head_dim": head_dim, "outliers": outliers}
    known = {"format": 1, **sizes, "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "kvquant.json").write_text(json.dumps(known | (about or {})))
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("artifact") / "small")


def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (torch.randn(shape) * 2).to(dtype), (torch.randn(shape) * 3 + 1).to(dtype)


def step(kv: KV, frequency: Tensor | None = FREQUENCY, order: int = 0) -> Step:
    seen = kv.counts.per_head[:, 0]
    return Step(layer=0, prompt=seen, seen=seen, order=order, layers=LAYERS, inverse_frequency=frequency)


def encode(policy: Quantizer, keys: Tensor, values: Tensor, frequency: Tensor = FREQUENCY, order: int = 0) -> KV:
    return policy.encode(keys, values, step(KV.of(keys, values), frequency, order))


# --- The definition ----------------------------------------------------------------------------------------------


def code_of(scaled: float, signposts: list[float]) -> int:
    return min(range(len(signposts)), key=lambda i: (abs(signposts[i] - float(scaled)), i))


def planes(codes: list[int], bits: int) -> list[int]:
    per_byte = 8 // bits
    size = len(codes) // per_byte
    return [sum(codes[j + i * size] << (bits * i) for i in range(per_byte)) for j in range(size)]


def stored_codes(codes: list[int], bits: int) -> list[int]:
    return planes([c & 3 for c in codes], 2) + planes([c >> 2 for c in codes], 1) if bits == 3 else planes(codes, bits)


def sparse_row(
    xs: list[F32], scaled: list[F32], codes: list[int], table: list[F32], zero: list[F32], radius: list[F32],
    slots: list[int], used: list[bool],
) -> tuple[list[int], list[float], list[float]]:  # fmt: skip
    """Stored index and delta, and what the row decodes to: dense, then its outliers one by one."""
    decoded = [F32(F32(table[c] * r) + z) for c, r, z in zip(codes, radius, zero, strict=True)]
    delta = [np.float16(xs[d] - decoded[d]) if u else np.float16(0) for d, u in zip(slots, used, strict=True)]
    index = [d if u else 0 for d, u in zip(slots, used, strict=True)]
    out = list(decoded)
    for d, more in zip(index, delta, strict=True):
        out[d] = F32(out[d] + F32(more))
    return index, [float(x) for x in delta], [float(x) for x in out]


def key_row(x, lower, upper, signposts, table, per_side):
    xs = [F32(v) for v in x]
    zero = [F32((F32(u) + F32(low)) / F32(2)) for u, low in zip(upper, lower, strict=True)]
    radius = [F32((F32(u) - F32(low)) / F32(2)) for u, low in zip(upper, lower, strict=True)]
    scaled = [F32((v - z) / r) for v, z, r in zip(xs, zero, radius, strict=True)]
    codes = [code_of(s, signposts) for s in scaled]
    order = sorted(range(len(xs)), key=lambda d: (scaled[d], d))
    slots = order[:per_side] + order[len(xs) - per_side :]
    used = [abs(scaled[d]) > 1 for d in slots]
    return codes, *sparse_row(xs, scaled, codes, table, zero, radius, slots, used)


def value_row(x, signposts, table, per_side, bits):
    xs = [F32(v) for v in x]
    order = sorted(range(len(xs)), key=lambda d: (xs[d], d))
    low, high = xs[order[per_side]], xs[order[len(xs) - 1 - per_side]]
    zero, radius = np.float16(F32(high + low) / F32(2)), np.float16(F32(high - low) / F32(2))
    many = len(xs)
    with np.errstate(over="ignore"):  # the constant row: everything but its zero is far outside
        scaled = [F32((v - F32(zero)) / max(F32(radius), np.finfo(F32).tiny)) for v in xs]
    slots = order[:per_side] + order[many - per_side :]
    codes = [{4: 7, 3: 3, 2: 1}[bits] if d in slots else code_of(s, signposts) for d, s in enumerate(scaled)]
    rest = sparse_row(xs, scaled, codes, table, [F32(zero)] * many, [F32(radius)] * many, slots, [True] * len(slots))
    return codes, *rest, float(zero), float(radius)


def as_written(folder: str, side: str, bits: int, qnorm: bool, order: int) -> tuple[list[float], list[F32]]:
    tensors = artifact(folder).tensors
    signposts = tensors[f"layers.{order}.{side}.codebook.{bits}"].tolist()
    scale, offset = tensors[f"layers.{order}.{side}.qnorm.{bits}"].tolist() if qnorm else (1.0, 0.0)
    return signposts, [F32(F32(F32(c) * F32(scale)) + F32(offset)) for c in signposts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim, outliers, per_side", [(16, 0.01, 1), (64, 0.1, 4), (24, 0, 0)])
@pytest.mark.parametrize("bits, qnorm, order", [(2, True, 1), (3, False, 2), (4, False, 0)])
def test_stored_and_decoded_are_the_definition(
    tmp_path: Path,
    bits: int,
    qnorm: bool,
    order: int,
    head_dim: int,
    outliers: float,
    per_side: int,
    dtype: torch.dtype,
) -> None:
    folder = write(tmp_path / "a", head_dim, outliers)
    keys, values = pair(1, HEADS, 12, head_dim, dtype=dtype)
    keys[0, 0, 3] *= 10  # more outliers than slots
    values[0, 1, 5], values[0, 1, 6, 1:] = 1.5, -2.0  # a constant row, and one with many ties
    kv = encode(KVQuant(bits, folder, outliers, qnorm), keys, values, torch.zeros(head_dim // 2), order)
    names = {"codes"} | ({"delta", "index"} if per_side else set()) | ({"high"} if bits == 3 else set())
    assert set(kv.keys.body.rows) == names and set(kv.values.body.rows) == names | {"zero", "radius"}
    decoded, tensors = kv.decode(), artifact(folder).tensors
    for h in range(HEADS):
        bounds = [tensors[f"layers.{order}.k.{name}"][h].tolist() for name in ("lower", "upper")]
        for t in range(12):
            row = h * 12 + t
            found = {name: x[row].tolist() for name, x in kv.keys.body.rows.items()}
            x = keys[0, h, t].float().tolist()
            codes, index, delta, out = key_row(x, *bounds, *as_written(folder, "k", bits, qnorm, order), per_side)
            assert found["codes"] + found.get("high", []) == stored_codes(codes, bits)
            assert found.get("index", []) == index and found.get("delta", []) == delta
            assert decoded[0][0, h, t].tolist() == torch.tensor(out).to(dtype).tolist()
            found = {name: x[row].tolist() for name, x in kv.values.body.rows.items()}
            x = values[0, h, t].float().tolist()
            written = as_written(folder, "v", bits, qnorm, order)
            codes, index, delta, out, zero, radius = value_row(x, *written, per_side, bits)
            assert found["codes"] + found.get("high", []) == stored_codes(codes, bits)
            assert (found["zero"], found["radius"]) == (zero, radius)
            assert found.get("index", []) == index and found.get("delta", []) == delta
            assert decoded[1][0, h, t].tolist() == torch.tensor(out).to(dtype).tolist()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_inliers_are_off_by_at_most_half_a_gap_and_outliers_hardly(path: str, bits: int) -> None:
    keys, values = pair(1, HEADS, 50, 16)
    kv = encode(KVQuant(bits, path), keys, values, STILL)
    tensors = artifact(path).tensors
    lower, upper = (tensors[f"layers.0.k.{name}"].float()[None, :, None] for name in ("lower", "upper"))
    value_radius = kv.values.body.rows["radius"].float().view(1, HEADS, 50, 1)
    for side, x, radius in (("k", keys, (upper - lower) / 2), ("v", values, value_radius)):
        held = kv.keys if side == "k" else kv.values
        signposts = tensors[f"layers.0.{side}.codebook.{bits}"]
        edges = torch.cat([-2 - signposts[:1], signposts, 2 - signposts[-1:]])  # up to the bounds is half a gap, too
        error, index = (held.dense() - x).abs(), held.body.rows["index"].view(1, HEADS, 50, 2).long()
        sparse = torch.zeros_like(x, dtype=torch.bool)
        sparse.scatter_(3, index, held.body.rows["delta"].view_as(index) != 0)
        inside = ((x >= lower) & (x <= upper) if side == "k" else torch.ones_like(sparse)) & ~sparse
        bound = edges.diff().max() / 2 * radius * (1 + 2**-9) + 2**-10  # fp16 range of values
        assert bool((error <= bound)[inside].all()) and sparse.any()
        assert bool((error <= 2**-10 * (1 + x.abs() + radius))[sparse].all())


def test_ties_take_the_lower_signpost_and_an_empty_range_keeps_everything_sparse(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = Path(write(tmp_path / "a", 8))
    tensors = load_file(folder / "kvquant.safetensors")
    tensors["layers.0.k.codebook.2"] = torch.tensor([-1.0, -0.5, 0.25, 1.0])
    for name, bound in (("lower", -2.0), ("upper", 2.0)):
        tensors[f"layers.0.k.{name}"] = torch.full((HEADS, 8), bound).half()
        tensors[f"layers.0.k.{name}"][:, 7] = 3.0
    data = save(tensors)
    (folder / "kvquant.safetensors").write_bytes(data)
    about = json.loads((folder / "kvquant.json").read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}
    (folder / "kvquant.json").write_text(json.dumps(about))
    x = torch.tensor([-1.5, -0.25, 1.25, 2.0, -2.0, -0.249, 0.5, 3.0]).expand(1, HEADS, 1, 8).contiguous()
    got = encode(KVQuant(2, str(folder)), x, x, torch.zeros(4)).keys.dense()[0, 0, 0]
    assert got.tolist() == [-2.0, -1.0, 0.5, 2.0, -2.0, 0.5, 0.5, 3.0]
    x[..., 7] = 3.5
    assert float(encode(KVQuant(2, str(folder)), x, x, torch.zeros(4)).keys.dense()[0, 0, 0, 7]) == 3.5


def test_keys_are_packed_before_rope(path: str) -> None:
    """What is stored of a turned key is what is stored of it unturned, and it is turned again when read."""
    keys, values = pair(1, HEADS, 40, 16)
    turned = rotate(keys, torch.arange(40)[None, None], FREQUENCY)
    plain, roped = encode(KVQuant(4, path), keys, values, STILL), encode(KVQuant(4, path), turned, values)
    different = plain.keys.body.rows["codes"] != roped.keys.body.rows["codes"]
    assert different.float().mean() < 0.01  # turning there and back rounds
    expected = rotate(plain.keys.dense(), torch.arange(40)[None, None], FREQUENCY)
    assert ((roped.keys.dense() - expected).abs() > 1e-4).float().mean() < 0.01
    assert not torch.allclose(roped.keys.dense(), plain.keys.dense(), atol=0.1)


def test_layers_and_heads_have_their_own_ranges(path: str) -> None:
    keys, values = pair(1, 1, 10, 16)
    both = [x.expand(1, HEADS, 10, 16).contiguous() for x in (keys, values)]
    by_layer = [encode(KVQuant(3, path), *both, order=order) for order in range(LAYERS)]
    codes = [kv.keys.body.rows["codes"].view(HEADS, 10, -1) for kv in by_layer]
    assert not torch.equal(codes[0][0], codes[0][1]) and not torch.equal(codes[0], codes[1])
    values = by_layer[1].values.dense()
    assert torch.equal(values[:, 0], values[:, 1]) and not torch.equal(values, by_layer[0].values.dense())


# --- The laws ----------------------------------------------------------------------------------------------------

POLICIES = [
    lambda path: KVQuant(4, path),
    lambda path: KVQuant(3, path, sinks=5),
    lambda path: KVQuant(2, path, qnorm=True, sinks=1),
    lambda path: KVQuant(2, path, sinks=2).keys & FP8().values,
    lambda path: Mixed(None, KVQuant(3, path)),
]
every = pytest.mark.parametrize("make", POLICIES, ids=["4", "3-sinks", "2-qnorm", "keys", "values"])
slow_fixture = [HealthCheck.function_scoped_fixture]


def parts(kv: KV) -> dict[str, Tensor]:
    """Everything stored, without spare capacity, dead columns and what is empty."""
    found = {}
    for side, held in (("keys", kv.keys), ("values", kv.values)):
        found[f"{side}.tail"] = held.tail[:, :, : held.tail_counts.width][held.tail_counts.live()]
        found |= {f"{side}.{n}": t for n, t in (held.body.exact.tensors() if held.body else ())}
    return {name: tensor for name, tensor in found.items() if tensor.numel()}


def assert_same(a: KV, b: KV) -> None:
    ours, theirs = parts(a), parts(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@every
@settings(max_examples=15, suppress_health_check=slow_fixture)
@given(cuts=st.lists(st.integers(0, 50), max_size=8), tokens=st.integers(1, 50))
def test_any_split_of_the_tokens_stores_the_same_bits(make, path: str, cuts: list[int], tokens: int) -> None:
    policy, (keys, values) = make(path), pair(2, HEADS, tokens, 16)
    kv = KV.of(keys[:, :, :0], values[:, :, :0])
    for start, end in pairwise(sorted({0, tokens, *(c for c in cuts if c < tokens)})):
        kv = kv.append(keys[:, :, start:end], values[:, :, start:end])
        kv = policy(kv, step(kv))
    assert_same(kv, encode(policy, keys, values))


@every
@settings(max_examples=10, suppress_health_check=slow_fixture)
@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=3), cut=st.integers(0, 30), decoded=st.integers(0, 5))
def test_left_padded_rows_store_what_they_store_alone(
    make, path: str, lengths: list[int], cut: int, decoded: int
) -> None:
    policy, longest = make(path), max(lengths)
    keys, values = pair(len(lengths), HEADS, longest + decoded, 16)
    valid = torch.arange(longest + decoded) >= longest - torch.tensor(lengths)[:, None]
    poison = ~valid[:, None, :, None]
    padded = keys.masked_fill(poison, torch.nan), values.masked_fill(poison, torch.nan)
    kv = KV.of(keys[:, :, :0], values[:, :, :0])
    for start, end in pairwise([0, *sorted({min(cut, longest), *range(longest, longest + decoded + 1)} - {0})]):
        new = slice(start, end)
        kv = kv.append(padded[0][:, :, new], padded[1][:, :, new], valid=valid[:, new])
        kv = policy(kv, step(kv))
    for row, length in enumerate(lengths):
        alone = encode(policy, *(x[row : row + 1, :, longest - length :] for x in (keys, values)))
        assert_same(kv.select(torch.tensor([row])), alone)


@every
def test_gather_moves_rows_with_their_positions(make, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged, again and again; what is appended and packed later joins with the positions it has."""
    policy, (keys, values) = make(path), pair(2, HEADS, 60, 16)
    kv = encode(policy, keys[:, :, :40], values[:, :, :40])
    full = encode(policy, keys, values).decode()
    for keep in (30, 12):
        chosen = [torch.randperm(int(kv.counts.per_head.min()))[: keep - i].sort().values for i in range(2 * HEADS)]
        index = torch.stack([torch.nn.functional.pad(x, (0, keep - len(x)), value=-1) for x in chosen])
        with monkeypatch.context() as patch:
            patch.setattr(Packed, "encode", lambda *_: pytest.fail("gather encoded again"))
            kv = kv.gather(index.view(2, HEADS, keep))
    kv = kv.append(keys[:, :, 40:], values[:, :, 40:], seen=torch.tensor([40, 40]))
    kv = policy(kv, step(kv))
    position = kv.position.expand(2, HEADS, -1).long()
    for held, exact in zip((kv.keys, kv.values), full, strict=True):
        for b, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
            live = position[b, h][position[b, h] >= 0]
            assert torch.equal(held.dense()[b, h, : len(live)], exact[b, h, live])


def test_positions_are_stored_only_where_they_do_not_follow(path: str) -> None:
    policy = KVQuant(4, path, sinks=3)
    kv = encode(policy, *pair(1, HEADS, 20, 16))
    codec = kv.keys.body.codec
    assert codec.first == 3 and kv.keys.body.at is None and kv.values.body.codec.first is None
    assert kv.gather(torch.arange(15)[None, None]).keys.body.at is None
    kept = kv.gather(torch.tensor([[[0, 4, 9, 19]]])).keys.body
    assert kept.at.tolist() == [4, 9, 19] * HEADS and kept.at.dtype == torch.int32
    body = kv.keys.body
    explicit = replace(body, at=body.counts.owners()[1].int() + 3)
    assert torch.equal(explicit.dense_rows(), body.dense_rows())
    assert not torch.equal(replace(body, at=explicit.at + 1).dense_rows(), body.dense_rows())
    with pytest.raises(ValueError, match="needs to know the positions of its tokens"):
        codec.encode(torch.randn(2 * HEADS, 16), Where(Counts((1, HEADS), torch.device("cpu"), 2)))


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_strides_and_selection(make, path: str, dtype: torch.dtype) -> None:
    policy, (keys, values) = make(path), pair(3, HEADS, 20, 16, dtype=dtype)
    kv = encode(policy, keys, values)
    assert all(x.dtype == dtype for x in kv.decode())
    in_float = parts(encode(policy, keys.float(), values.float()))
    assert all(torch.equal(x, in_float[name].to(x.dtype)) for name, x in parts(kv).items())
    strided = [torch.cat([x, x], dim=-1)[..., 16:] for x in (keys, values)]
    assert_same(encode(policy, *strided), kv)
    chosen = torch.tensor([2, 0, 0])
    assert all(torch.equal(a, b[chosen]) for a, b in zip(kv.select(chosen).decode(), kv.decode(), strict=True))


# --- Bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("head_dim, outliers, per_side", [(64, 0.01, 1), (128, 0.01, 1), (256, 0.01, 2), (128, 0, 0)])
def test_bits_per_element(tmp_path: Path, bits: int, head_dim: int, outliers: float, per_side: int) -> None:
    """2 * per_side slots of 24 bits; at 128 channels and 1 %, 0.055 and 0.295 more than the shares of the paper."""
    policy = KVQuant(bits, write(tmp_path / "a", head_dim, outliers), outliers)
    keys, values = pair(1, HEADS, 10, head_dim, dtype=torch.float16)
    kv, sparse = encode(policy, keys, values, torch.zeros(head_dim // 2)), 2 * per_side * 24 / head_dim
    for held, expected in ((kv.keys, bits + sparse), (kv.values, bits + sparse + 32 / head_dim)):
        assert 8 * held.nbytes == expected * keys.numel()
        assert 8 * held.body.codec.row_nbytes(head_dim) == expected * head_dim
        for tensor in held.body.rows.values():
            assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    if (head_dim, outliers) == (128, 0.01):
        assert [8 * c.row_nbytes(128) / 128 for c in policy.codecs()] == [bits + 0.375, bits + 0.625]


@every
def test_nbytes_is_the_formula(make, path: str) -> None:
    policy, tokens = make(path), torch.tensor([1, 2, 5, 33])
    formula = policy.slot_nbytes(tokens, HEADS, 16, 4).tolist()
    for count, expected in zip(tokens.tolist(), formula, strict=True):
        assert encode(policy, *pair(2, HEADS, count, 16)).nbytes == 2 * expected


def test_codecs_are_equal_by_value(path: str) -> None:
    kv = KV.of(*pair(1, HEADS, 4, 16))
    for order in range(2):
        mine, again = (KVQuant(3, path, sinks=2).codecs(step(kv, FREQUENCY.clone(), order)) for _ in range(2))
        assert mine == again and hash(mine) == hash(again)
        assert mine == (
            StaticPerChannel(path, order, 3, 0.01, False, 2), DynamicPerToken(path, order, 3, 0.01, False)
        )  # fmt: skip
    assert KVQuant(3, path).codecs(step(kv))[0] != KVQuant(3, path).codecs(step(kv, order=1))[0]


# --- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 5}, "bits must be 2, 3 or 4, got 5"),
        ({"path": ""}, "path must be a calibrated folder or the name of one, got ''"),
        ({"path": None}, "path must be a calibrated folder or the name of one, got None"),
        ({"outliers": 0.5}, r"outliers must be a share in \[0, 0.5\), got 0.5"),
        ({"outliers": -0.1}, r"outliers must be a share in \[0, 0.5\), got -0.1"),
        ({"outliers": "1%"}, r"outliers must be a share in \[0, 0.5\), got '1%'"),
        ({"qnorm": 1}, "qnorm must be True or False, got 1"),
        ({"sinks": -1}, "sinks must be an int of 0 or more tokens, got -1"),
    ],
    ids=str,
)
def test_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"KVQuant: {message}"):
        KVQuant(**options)


def test_artifacts_that_are_missing_or_do_not_fit(path: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="nothing calibrated at path='none'; make it: python scripts/calibrate_kvquant"
    ):
        KVQuant(path="none").check(64)
    keys, values = pair(1, HEADS, 4, 16)
    asked = (
        "is for 3 layers of 2 key-value heads of 16 channels, but the model has {}; make one for it: python scripts/"
    )
    with pytest.raises(ValueError, match=asked.format("heads of 64 channels")):
        KVQuant(path=path).check(64)
    with pytest.raises(ValueError, match=asked.format("1 layers")):
        KVQuant(path=path).encode(keys, values)
    with pytest.raises(ValueError, match=asked.format("4 key-value heads")):
        encode(KVQuant(path=path), *pair(1, 4, 4, 16))
    for head_dim in (20, 264):
        with pytest.raises(ValueError, match=f"a multiple of 8 and at most 256 .8-bit indices., got {head_dim}"):
            KVQuant(path=path).check(head_dim)
    with pytest.raises(ValueError, match="was calibrated with outliers=0.01; use that, or make .* --outliers 0.02"):
        encode(KVQuant(path=path, outliers=0.02), keys, values)
    with pytest.raises(ValueError, match="give it a Step with inverse_frequency"):
        KVQuant(path=path)(KV.of(keys, values), step(KV.of(keys, values), None))
    with pytest.raises(ValueError, match="at most 65504; they reach 1e.06"):
        encode(KVQuant(path=path), keys, values * 0 + torch.arange(16) % 3 * 1e6)
    for name, about in {"old": {"format": 2}, "other": {"sha256": "0"}, "wide": {"head_dim": 32}}.items():
        with pytest.raises(ValueError, match="cannot be read .*; make them again: python scripts/calibrate_kvquant.py"):
            artifact(write(tmp_path / name, about=about))


# --- What ships --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, bits, qnorm", [("kvquant4", 4, False), ("kvquant3", 3, False), ("kvquant2", 2, True)])
def test_configurations(name: str, bits: int, qnorm: bool) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    config = (files("kvbench.conf") / "quant" / f"{name}.yaml").read_text()
    policy = instantiate(OmegaConf.create(config))
    assert policy == KVQuant(bits, "proving", 0.01, qnorm, sinks=1)
    policy.check(64)


def test_shipped_signposts_are_sorted_and_in_range() -> None:
    found = artifact("proving")
    assert (found.layers, found.heads, found.head_dim) == (4, 2, 64)
    assert sum(file.stat().st_size for file in found.folder.iterdir()) < 2**20
    for name, x in found.tensors.items():
        if "codebook" in name:
            assert bool((x.diff() > 0).all()) and float(x.abs().max()) <= 1
        if "qnorm" in name:
            assert 0.8 < float(x[0]) < 1.2 and abs(float(x[1])) < 0.1
        if "upper" in name:
            assert bool((x > found.tensors[name.replace("upper", "lower")]).all())


@pytest.fixture(scope="module")
def proving() -> tuple:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return (
        AutoModelForCausalLM.from_pretrained(PROVING, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(PROVING, padding_side="left"),
    )


def relative_errors(cache: CompressedCache, exact: CompressedCache) -> list[tuple[float, float]]:
    """Of keys and values, per layer, over the slots that `cache` kept."""
    found = []
    for mine, theirs in zip(cache.layers, exact.layers, strict=True):
        position = mine.kv.position.expand(*mine.kv.counts.shape, -1).long()
        live, errors = position >= 0, []
        for a, b in zip(mine.kv.decode(), theirs.kv.decode(), strict=True):
            b = b.gather(2, position.clamp(min=0)[..., None].expand(-1, -1, -1, b.shape[3]))
            errors.append(float((a - b)[live].norm() / b[live].norm()))
        found.append(tuple(errors))
    return found


@pytest.mark.parametrize("bits, most", [(4, 0.11), (3, 0.2), (2, 0.4)])
def test_decoded_keys_of_the_proving_model_are_close(proving: tuple, bits: int, most: float) -> None:
    model, tokenizer = proving
    texts = [document(1000, 12), document(1001, 8)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    exact, cache = CompressedCache(model), CompressedCache(model, KVQuant(bits, qnorm=bits == 2, sinks=1))
    for held in (exact, cache):
        out = model.generate(
            **batch, past_key_values=held, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
        )
    assert out.shape[1] == batch.input_ids.shape[1] + 5
    position = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    exact, cache = CompressedCache(model), CompressedCache(model, KVQuant(bits, qnorm=bits == 2, sinks=1))
    with torch.no_grad():
        for held in (exact, cache):
            model(**batch, position_ids=position, past_key_values=held)
    errors = relative_errors(cache, exact)
    assert max(max(pair) for pair in errors) < most and min(min(pair) for pair in errors) > 0.01
    assert all(layer.kv.keys.body.at is None for layer in cache.layers)
    assert all(layer.kv.keys.packed[0].unique().tolist() == [1] for layer in cache.layers)


def test_behind_an_evictor_keys_keep_their_positions(proving: tuple) -> None:
    model, tokenizer = proving
    ids = tokenizer(document(1002, 12), return_tensors="pt").input_ids
    exact = CompressedCache(model)
    cache = CompressedCache(model, StreamingLLM(budget=40, sinks=4) | KVQuant(4, sinks=1))
    with torch.no_grad():
        for held in (exact, cache):
            for part in (ids[:, :-3], *ids[:, -3:].split(1, dim=1)):
                model(part, past_key_values=held)
    assert cache.layers[0].kv.counts.even == 40 and cache.layers[0].kv.keys.body.at is not None
    assert max(max(pair) for pair in relative_errors(cache, exact)[:1]) < 0.11  # the first layer's input is exact


@pytest.mark.parametrize("memory", [0.125, 0.25])
def test_a_byte_budget_counts_the_positions_that_eviction_makes_explicit(proving: tuple, memory: float) -> None:
    model, tokenizer = proving
    ids = torch.tensor([tokenizer.encode(document(5, 400), add_special_tokens=False)[:900]])
    cache = CompressedCache(model, StreamingLLM(memory=memory) | KVQuant(3, sinks=1))
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    held, slots = int(cache.row_nbytes()), cache.layers[0].kv.counts.even
    assert held <= memory * 4 * 2 * 2 * 900 * 64 * 2 < held * (slots + 4) / slots
