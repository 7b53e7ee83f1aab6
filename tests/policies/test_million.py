"""MILLION against its definition in plain loops, the laws of quantizers, and codebooks that do not fit."""

import hashlib
import json
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save
from torch import Tensor

from kvbench import CompressedCache
from kvbench.policies import KV, MILLION, Step
from kvbench.policies import million as module

SIZES = [(8, 4, 16), (16, 8, 64), (8, 8, 80), (4, 12, 8)]


def write(folder: Path, subspaces: int, bits: int, number: int, head_dim: int, **about: object) -> dict[str, Tensor]:
    shape = number, subspaces, 2**bits, head_dim // subspaces
    tensors = {side: torch.randn(shape).half() for side in ("keys", "values")}
    data, name = save(tensors), f"{subspaces}x{bits}"
    found = {"format": 1, "layers": number, "head_dim": head_dim}
    found["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / f"{name}.safetensors").write_bytes(data)
    (folder / f"{name}.json").write_text(json.dumps(found | about))
    return tensors


def rows(kv: KV, side: str) -> Tensor:
    rows: Tensor = getattr(kv, side).body.exact.rows["codes"]
    return rows


def packed(codes: list[int], bits: int) -> list[int]:
    """With n bytes of 4-bit codes, byte j holds codes j and j + n; of 12 bits come the lower 8 first, then the 4."""
    if bits == 12:
        return [code % 256 for code in codes] + packed([code // 256 for code in codes], 4)
    if bits == 8:
        return codes
    half = len(codes) // 2
    return [low + 16 * high for low, high in zip(codes[:half], codes[half:], strict=True)]


@pytest.mark.parametrize("subspaces, bits, head_dim", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_values_are_the_definition(
    subspaces: int, bits: int, head_dim: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    books, x = write(tmp_path, subspaces, bits, 2, head_dim), torch.randn(1, 1, 3, head_dim).to(dtype)
    values, width, seen = (x * 2).to(dtype), head_dim // subspaces, torch.tensor([3])
    policy = MILLION(subspaces, bits, str(tmp_path), 0)
    for order in range(2):
        kv = policy.encode(x, values, Step(0, seen, seen, order=order, layers=2))
        for side, exact, decoded in zip(("keys", "values"), (x, values), kv.decode(), strict=True):
            book = books[side][order].float().numpy()
            for t, token in enumerate(exact[0, 0].float().numpy()):
                codes, expected = [], []
                for m in range(subspaces):
                    part = token[m * width : (m + 1) * width]
                    far = sum((book[m][:, i] - part[i]) ** 2 for i in range(width)).tolist()
                    codes.append(far.index(min(far)))
                    expected += book[m][codes[-1]].tolist()
                assert rows(kv, side)[t].tolist() == packed(codes, bits)
                assert decoded[0, 0, t].tolist() == torch.tensor(expected).to(dtype).tolist()


def test_centroids_come_back_as_themselves_and_ties_go_to_the_lower_number(tmp_path: Path) -> None:
    books = write(tmp_path, 8, 8, 1, 32)
    policy, chosen = MILLION(8, 8, str(tmp_path), 0), torch.randint(256, (20, 8))
    exact = {side: book[0][torch.arange(8), chosen].flatten(1)[None, None].float() for side, book in books.items()}
    kv = policy.encode(exact["keys"], exact["values"])
    assert all(torch.equal(a, b) for a, b in zip(kv.decode(), exact.values(), strict=True))
    assert all(torch.equal(rows(kv, side).long(), chosen) for side in exact)
    assert module.nearest(torch.zeros(1, 1, 2), torch.tensor([[[2.0, 0], [0, 1], [-1, 0], [1, 0]]])).tolist() == [[1]]


def test_large_inputs_are_cut_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, book = torch.randn(37, 4, 2), torch.randn(4, 16, 2)
    whole = module.nearest(x, book)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 200)
    assert torch.equal(module.nearest(x, book), whole)


# --- Laws ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[(8, 4, 0), (8, 8, 6), (4, 12, 5)], ids=str)
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> MILLION:
    """For heads of 16 channels."""
    subspaces, bits, residual = request.param
    write(tmp_path, subspaces, bits, 1, 16)
    return MILLION(subspaces, bits, str(tmp_path), residual, sinks=2)


def same(a: KV, b: KV) -> bool:
    pairs = zip(a.decode(), b.decode(), strict=True)
    codes = all(torch.equal(rows(a, side), rows(b, side)) for side in ("keys", "values"))
    return codes and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("cuts", [[1, 2, 3, 17], [8, 30], list(range(1, 43))], ids=len)
def test_any_split_and_any_batch_give_the_same_bits(policy: MILLION, cuts: list[int]) -> None:
    keys, values = torch.randn(3, 2, 43, 16), torch.randn(3, 2, 43, 16)
    kv, whole = KV.of(keys[:, :, :0], values[:, :, :0]), policy.encode(keys, values)
    for start, end in pairwise([0, *cuts, 43]):
        seen = torch.full((3,), end)
        kv = policy(kv.append(keys[:, :, start:end], values[:, :, start:end]), Step(0, seen, seen))
    assert same(kv, whole)
    assert kv.keys.tail_counts.even == kv.values.tail_counts.even == 2 + 41 % max(policy.residual, 1)
    for row in range(3):
        alone = policy.encode(keys[row : row + 1], values[row : row + 1])
        assert same(whole.select(torch.tensor([row])), alone)


def test_rows_gather_freely(policy: MILLION) -> None:
    kv = policy.encode(torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16))
    index = torch.tensor([[[0, 3, 9, 20, 39], [1, 2, 3, 38, -1]]])
    kept = kv.gather(index)
    for before, after in zip(kv.decode(), kept.decode(), strict=True):
        assert torch.equal(after[0, 0], before[0, 0, index[0, 0]])
        assert torch.equal(after[0, 1, :4], before[0, 1, index[0, 1, :4]])
    assert kept.nbytes == sum(t.untyped_storage().nbytes() for _, t in kept.tensors())


@pytest.mark.parametrize(
    "subspaces, bits, head_dim, element", [(64, 8, 128, 4.0), (32, 12, 128, 3.0), (32, 8, 64, 4.0)]
)
def test_bits_per_element(subspaces: int, bits: int, head_dim: int, element: float) -> None:
    for codec in MILLION(subspaces, bits).codecs():
        assert 8 * codec.row_nbytes(head_dim) / head_dim == element and codec.group_nbytes(head_dim) == 0
        assert codec == MILLION(subspaces, bits).codecs()[codec.side == "values"] and hash(codec) == hash(
            replace(codec)
        )


# --- What does not fit -----------------------------------------------------------------------------------------------


def test_missing_or_broken_codebooks_name_the_command(tmp_path: Path) -> None:
    folder = str(tmp_path)
    make = f"python scripts/calibrate_million.py --model MODEL --text FILE --subspaces 8 --bits 4 --out {folder}"
    with pytest.raises(ValueError, match=f"no codebooks for subspaces=8 and bits=4 at path={folder!r}; make.*{make}"):
        MILLION(8, 4, folder).check(16)
    write(tmp_path, 8, 4, 1, 16, sha256="0")
    with pytest.raises(ValueError, match=f"cannot be read .they are not of one run.; make them again: {make}"):
        MILLION(8, 4, folder).check(16)
    write(tmp_path, 8, 4, 1, 16, layers=2)
    with pytest.raises(ValueError, match=r"keys and values must be \[2, 8, 16, 2\]"):
        MILLION(8, 4, folder).check(16)
    (tmp_path / "8x4.json").write_text("[]")
    with pytest.raises(ValueError, match="cannot be read"):
        MILLION(8, 4, folder).check(16)


def test_models_of_another_shape_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 8, 4, 3, 16)
    policy, seen = MILLION(8, 4, str(tmp_path)), torch.tensor([1])
    with pytest.raises(ValueError, match="is for 3 layers with heads of 16 channels, but the model has heads of 32"):
        policy.check(32)
    with pytest.raises(ValueError, match="but the model has 2 layers; make one for it: python scripts/calibrate_mill"):
        policy.codecs(Step(0, seen, seen, layers=2))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"subspaces": 7}, "subspaces must be an even int of 2 or more, got 7"),
        ({"subspaces": 0}, "got 0"),
        ({"subspaces": True}, "got True"),
        ({"subspaces": 8.0}, "got 8.0"),
        ({"bits": 6}, "bits must be 4, 8 or 12, got 6"),
        ({"path": ""}, "path must be a calibrated folder or the name of one, got ''"),
        ({"residual": -1}, "residual must be an int of 0 or more tokens, got -1"),
    ],
)
def test_fields_outside_their_sets_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MILLION(**fields)


# --- What ships ----------------------------------------------------------------------------------------------------


def test_configuration() -> None:
    config = (files("kvbench.conf") / "quant" / "million.yaml").read_text()
    assert instantiate(OmegaConf.create(config)) == MILLION() == MILLION(32, 8, "proving", 128)


def test_shipped_codebooks_fit_the_proving_model_and_are_small() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kvbench.corpus import document

    folder = files("kvbench") / "assets" / "proving"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(document(1, 60))[:300]])
    plain = CompressedCache(model)
    with torch.no_grad():
        model(ids, past_key_values=plain)
    lost = {}
    for subspaces in (32, 16):
        cache = CompressedCache(model, MILLION(subspaces, residual=0))
        with torch.no_grad():
            model(ids, past_key_values=cache)
        for layer, exact in zip(cache.policy_layers(), plain.policy_layers(), strict=True):
            assert layer.kv.nbytes == 2 * 2 * 300 * subspaces
            for got, wanted in zip(layer.kv.decode(), exact.kv.decode(), strict=True):
                share = (got - wanted.float()).square().sum() / wanted.float().square().sum()
                lost[subspaces] = max(lost.get(subspaces, 0), float(share))
    assert lost[32] < 0.03 and lost[32] < lost[16] < 0.2
    assert sum(file.stat().st_size for file in (module.SHIPPED / "proving").iterdir()) <= 2**20
