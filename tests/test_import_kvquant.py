"""The importer of KVQuant's official quantizer files: what it makes of them, and that nothing in them is run."""

import json
import os
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

import import_kvquant as script
import numpy as np
import pytest
import torch

from kvbench.policies import KV, KVQuant, Step
from kvbench.policies.kvquant import artifact

LAYERS, HEADS, HEAD_DIM, TOKENS = 2, 2, 16, 40


def official(bits: int, norm: bool = False, names: str = "model.layers.{}.self_attn.{}_proj") -> dict:
    """As llama_simquant.py makes it, types and shapes included: k-means gives centroids [2**bits, 1] in any order."""
    rng, found = np.random.default_rng(5), {}
    for layer in range(LAYERS):
        for side, axis in (("k", 0), ("v", -1)):
            data = rng.standard_normal((TOKENS, HEADS * HEAD_DIM)).astype(np.float32) * 3 + 1
            upper, lower = (torch.tensor(np.percentile(data, q, axis=axis)).unsqueeze(axis) for q in (99.5, 0.5))
            centroids = rng.permutation(np.linspace(-0.9, 0.95, 2**bits))[:, None].astype(np.float32)
            q_norm = (torch.tensor(1.1), torch.tensor(-0.02)) if norm else ()
            found[names.format(layer, side)] = (upper, lower, [centroids], *q_norm)
    return found


def written(folder: Path, name: str, found: object, protocol: int = pickle.HIGHEST_PROTOCOL) -> str:
    (folder / name).write_bytes(pickle.dumps(found, protocol=protocol))
    return str(folder / name)


def convert(out: Path, *pickles: str) -> str:
    script.main([*pickles, "--heads", str(HEADS), "--out", str(out)])
    artifact.cache_clear()
    return str(out)


@pytest.mark.parametrize("names", ["model.layers.{}.self_attn.{}_proj", "transformer.blocks.{}.{}_proj"])
@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("norm", [False, True])
def test_thresholds_centroids_and_q_norm_are_those_of_the_file(tmp_path, capsys, names, protocol, norm):
    found = official(3, norm, names)
    path = convert(tmp_path / "out", written(tmp_path, "quantizers.pickle", found, protocol))
    got = artifact(path)
    assert (got.layers, got.heads, got.head_dim, got.outliers) == (LAYERS, HEADS, HEAD_DIM, 0.01)
    assert (got.bits, got.qnorm) == ((3,), norm)
    for layer in range(LAYERS):
        for side in "kv":
            upper, lower, (centroids,), *q_norm = found[names.format(layer, side)]
            prefix = f"layers.{layer}.{side}"
            if side == "k":
                assert torch.equal(got.tensors[f"{prefix}.upper"], upper.half().view(HEADS, HEAD_DIM))
                assert torch.equal(got.tensors[f"{prefix}.lower"], lower.half().view(HEADS, HEAD_DIM))
            assert got.tensors[f"{prefix}.codebook.3"].tolist() == sorted(centroids[:, 0].tolist())
            assert torch.equal(got.tensors[f"{prefix}.qnorm.3"], torch.stack(q_norm)) if norm else not q_norm
    assert json.loads((tmp_path / "out" / "kvquant.json").read_text())["imported"] == ["quantizers.pickle"]
    assert "2 layers of 2 heads, 16 channels; bits: [3]" in capsys.readouterr().out


def test_keys_are_decoded_as_the_official_simulation_does(tmp_path):
    """Inliers: the nearest centroid, scaled to the channel's range; outliers: as they are."""
    found = official(4)
    policy = KVQuant(4, convert(tmp_path / "out", written(tmp_path, "q.pickle", found)))
    keys = torch.randn(1, HEADS, 8, HEAD_DIM) * 3 + 1
    keys[0, 1, 2, 5] = 40
    seen = torch.tensor([8])
    still = torch.zeros(HEAD_DIM // 2)  # RoPE of no frequency turns nothing
    got = policy(KV.of(keys, keys), Step(0, seen, seen, order=1, layers=LAYERS, inverse_frequency=still)).keys.dense()
    upper, lower, (centroids,) = found["model.layers.1.self_attn.k_proj"]
    for h in range(HEADS):
        for t in range(8):
            for d in range(HEAD_DIM):
                x, high, low = float(keys[0, h, t, d]), *(float(e[0, h * HEAD_DIM + d].half()) for e in (upper, lower))
                expected = x
                if low <= x <= high:
                    zero, radius = (high + low) / 2, (high - low) / 2
                    expected = min((c * radius + zero for c in centroids[:, 0].tolist()), key=lambda c: abs(c - x))
                elif (t, d) != (2, 5):
                    continue  # more beyond the range than this small head has slots for
                assert float(got[0, h, t, d]) == pytest.approx(expected, abs=2e-2 if expected == x else 1e-4)


def test_files_of_other_bits_become_one_folder(tmp_path, capsys):
    base, files = official(4), []
    for bits in (4, 2, 3):
        own = {name: (*base[name][:2], *entry[2:]) for name, entry in official(bits, norm=bits == 2).items()}
        files.append(written(tmp_path, f"nuq{bits}.pickle", own))
    found = artifact(convert(tmp_path / "out", *files))
    assert found.bits == (2, 3, 4) and not found.qnorm and "left out" in capsys.readouterr().out
    for bits in (2, 3, 4):
        KVQuant(bits, str(tmp_path / "out")).check(HEAD_DIM)
    with pytest.raises(ValueError, match="has codebooks of 2, 3, 4 bits, without Q-Norm; use these, or make another"):
        KVQuant(2, str(tmp_path / "out"), qnorm=True).check(HEAD_DIM)
    found = artifact(convert(tmp_path / "one", files[1]))
    KVQuant(2, str(tmp_path / "one"), qnorm=True).check(HEAD_DIM)
    with pytest.raises(ValueError, match="has codebooks of 2 bits, with Q-Norm; use these, or make another"):
        KVQuant(3, str(tmp_path / "one")).check(HEAD_DIM)
    with pytest.raises(ValueError, match="nuq4.pickle: has the bits of another file, or other thresholds; give it its"):
        convert(tmp_path / "twice", files[0], files[0])
    moved = {name: (entry[0] + 1, *entry[1:]) for name, entry in official(3).items()}
    with pytest.raises(ValueError, match="moved.pickle: has the bits of another file, or other thresholds"):
        convert(tmp_path / "moved", files[0], written(tmp_path, "moved.pickle", moved))


# --- Files that are not what they should be ----------------------------------------------------------------------


class Runs:
    """Its pickle calls `call` when it is loaded."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], tuple(self.call[1:])


class Numbers:
    """The pickle of a NumPy array with a state of one's choice."""

    def __init__(self, dtype: str, state: tuple, byteorder: str = "<") -> None:
        self.dtype, self.state, self.order = dtype, state, byteorder

    def __reduce__(self) -> tuple:
        class Kind:
            def __reduce__(_) -> tuple:  # noqa: N805
                return np.dtype, (self.dtype, False, True), (3, self.order, None, None, None, -1, -1, 0)

        version, shape, data = self.state
        return np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), (version, shape, Kind(), False, data)


def malicious(marker: Path) -> dict[str, object]:
    touch = f"touch {marker}"
    inner = pickle.dumps(Runs(os.system, touch))
    return {
        "os.system": Runs(os.system, touch),
        "builtins.eval": Runs(eval, f"__import__('os').system({touch!r})"),
        "builtins.getattr": Runs(getattr, "text", "upper"),
        "numpy.load": Runs(np.load, str(marker)),
        "torch.load": Runs(torch.load, str(marker)),
        "pickle.loads": Runs(pickle.loads, inner),
        "within a storage": Runs(torch.storage._load_from_bytes, inner),
        "object": np.array([Runs(os.system, touch)], dtype=object),
        "other state": Numbers("O8", (1, (1,), b"\x01" * 8)),
        "record": Numbers("f4,O", (1, (1,), b"\x01" * 12)),
        "beyond its data": Numbers("f8", (1, (10**6,), b"\x01" * 8)),
        "order": Numbers("f8", (1, (1,), b"\x01" * 8), byteorder="x"),
    }


@pytest.mark.parametrize("name", malicious(Path("never")))
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_that_would_run_something_are_refused_in_one_line(tmp_path, name, protocol):
    marker = tmp_path / "ran"
    hidden = malicious(marker)[name]
    file = written(tmp_path, "q.pickle", {"model.layers.0.self_attn.k_proj": (hidden,)}, protocol)
    with pytest.raises(ValueError, match="q.pickle: refused, nothing of it was run: a quantizer file holds") as refused:
        script.main([file, "--heads", "2", "--out", str(tmp_path / "out")])
    assert not marker.exists() and not (tmp_path / "out").exists()
    assert "\n" not in str(refused.value)


def test_the_test_above_would_notice_a_loader_that_runs_them(tmp_path):
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(malicious(marker)["os.system"]))
    assert marker.exists()


def test_only_what_numbers_need_can_be_named():
    """No name that is allowed is a function that reads files, code or attributes."""
    assert {f"{module}.{name}" for module, name in script._ALLOWED} == {
        "numpy.ndarray", "numpy.dtype", "collections.OrderedDict", "torch._utils._rebuild_tensor_v2",
        "torch.storage._load_from_bytes",
        *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in (
            "multiarray._reconstruct", "numeric._frombuffer", "multiarray.scalar"
        )),
    }  # fmt: skip
    asked = {
        arg.replace(" ", ".")
        for opcode, arg, _ in pickletools.genops(pickle.dumps(official(2, norm=True), protocol=2))
        if opcode.name == "GLOBAL"
    }
    assert asked <= {f"{module}.{name}" for module, name in script._ALLOWED} | {"_codecs.encode"}  # bytes, protocol 2


def entries(**parts: object) -> dict:
    """`official(2)` with some parts of every entry replaced: upper, lower, centroids."""
    order = ("upper", "lower", "centroids")
    return {
        name: tuple(parts.get(part, x) for part, x in zip(order, entry, strict=True))
        for name, entry in official(2).items()
    }


@pytest.mark.parametrize(
    "found, message",
    [
        ([1, 2], "must be a dict of names, as llama_simquant.py --quantize writes it"),
        ({}, "must have k_proj and v_proj of every layer from 0 on, got []"),
        ({"model.layers.1.self_attn.k_proj": ()}, "must have k_proj and v_proj of every layer from 0 on"),
        ({k: v[:2] for k, v in official(2).items()}, "calibrate with --nuq"),
        (OrderedDict((k, list(v)) for k, v in official(2).items()), "calibrate with --nuq"),
        (entries(centroids=[np.zeros((32, 1))]), "has [32] centroids; KVQuant takes 4, 8 or 16"),
        (entries(upper=torch.zeros(1, 31), lower=torch.zeros(1, 31)), "31 upper and 31 lower thresholds of keys in l"),
        (entries(upper=torch.zeros(1, 32), lower=torch.ones(1, 32)), "are not a pair per channel of --heads 2 key-va"),
        (entries(upper=torch.full((1, 32), 1e6)), "has numbers that are not finite, or thresholds beyond fp16"),
    ],
)  # fmt: skip
def test_files_without_usable_quantizers_are_refused(tmp_path, found, message):
    file = written(tmp_path, "q.pickle", found)
    with pytest.raises(ValueError) as refused:
        convert(tmp_path / "out", file)
    assert message in str(refused.value) and str(refused.value).startswith(file)


def test_files_that_are_no_pickles_and_bad_arguments(tmp_path, capsys):
    (tmp_path / "text").write_text("quantizers")
    with pytest.raises(ValueError, match="refused, nothing of it was run.*this one cannot be read"):
        convert(tmp_path / "out", str(tmp_path / "text"))
    with pytest.raises(ValueError, match="none: cannot be read"):
        convert(tmp_path / "out", str(tmp_path / "none"))
    for more in (["--heads", "0"], ["--heads", "2", "--outliers", "0.5"]):
        with pytest.raises(SystemExit):
            script.main(["x", "--out", "y", *more])
        assert "--heads must be at least 1" in capsys.readouterr().err
