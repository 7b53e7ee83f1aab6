"""The script that calibrates MILLION: k-means, what it reads, and going on where it stopped."""

import json
from pathlib import Path

import calibrate_million as script
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvbench import CompressedCache
from kvbench.corpus import document
from kvbench.policies import MILLION


def lloyd(x: list[list[float]], centroids: list[list[float]], iterations: int) -> list[list[float]]:
    for _ in range(iterations):
        far = [[sum((a - b) ** 2 for a, b in zip(row, c, strict=True)) for c in centroids] for row in x]
        mine = [row.index(min(row)) for row in far]
        worst = sorted(range(len(x)), key=lambda i: -min(far[i]))
        moved = []
        for c in range(len(centroids)):
            members = [row for row, owner in zip(x, mine, strict=True) if owner == c]
            moved.append([sum(line) / len(members) for line in zip(*members, strict=True)] if members else None)
        centroids = [x[worst.pop(0)] if c is None else c for c in moved]
    return centroids


@pytest.mark.parametrize("block", [2**22, 40])
def test_kmeans_is_lloyds_iteration(block, monkeypatch):
    monkeypatch.setattr(script, "BLOCK_ELEMENTS", block)
    x = torch.randn(60, 2)
    x[:30] = x[0]  # equal rows: most centroids start on the same point, and all but one of these are empty
    start = x[torch.randperm(60, generator=torch.Generator().manual_seed(3))[:8]]
    for iterations in (1, 3):
        got = script.kmeans(x, 8, iterations, torch.Generator().manual_seed(3))
        torch.testing.assert_close(got, torch.tensor(lloyd(x.tolist(), start.tolist(), iterations)))
    code, distance = script.assign(x, got)
    torch.testing.assert_close(distance, (x - got[code]).square().sum(1), atol=1e-5, rtol=1e-4)


def test_kmeans_ends_where_every_centroid_is_the_mean_of_its_rows():
    x = torch.randn(200, 3)
    got = script.kmeans(x, 5, 1000, torch.Generator().manual_seed(0))
    owner = torch.cdist(x, got).argmin(1)
    torch.testing.assert_close(got, torch.stack([x[owner == c].mean(0) for c in range(5)]))


def test_rows_are_the_models_keys_and_values(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    ids = (torch.randperm(200)[:40] + 2).tolist()
    cache = CompressedCache(model)
    with torch.no_grad():
        model(torch.tensor([ids]), past_key_values=cache)
    found = script.note(model, ids, 50, seed=1)
    assert sorted(found) == ["0.keys", "0.values", "1.keys", "1.values"]
    for order, layer in enumerate(cache.policy_layers()):
        for side, held in (("keys", layer.kv.keys), ("values", layer.kv.values)):
            rows = held.dense().flatten(0, 2)
            same = (found[f"{order}.{side}"][:, None] == rows).all(2)
            assert same.shape == (50, 80) and same.any(1).all() and same.sum(0).max() == 1


SIZES = "--subspaces 16 --bits 4 --samples 3 --tokens 100 --vectors 300 --iterations 5 --dtype float32"


def run(folder: Path, out: Path, *more: str) -> tuple[dict, dict]:
    script.main(["--model", str(folder), "--out", str(out), "--work", str(out / "work"), *SIZES.split(), *more])
    return json.loads((out / "16x4.json").read_text()), load_file(out / "16x4.safetensors")


def test_a_run_that_was_cut_off_goes_on(tiny_folder, tmp_path, monkeypatch, capsys):
    whole, books = run(tiny_folder, tmp_path / "whole")
    assert whole["layers"] == 2 and whole["head_dim"] == 32 and books["keys"].shape == (2, 16, 16, 2)
    assert all(0 < x < 0.2 for side in whole["lost"].values() for x in side)
    policy = MILLION(16, 4, str(tmp_path / "whole"), 0)
    policy.check(32)
    for name, after in (("note", 2), ("fit", 1)):
        original, calls = getattr(script, name), []

        def interrupted(*args, original=original, calls=calls, after=after):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(script, name, interrupted)
            run(tiny_folder, tmp_path / name)
        with pytest.raises(ValueError, match="has other values of bits, vectors; use those, or start without --resume"):
            run(tiny_folder, tmp_path / name, "--resume", "--bits", "8", "--vectors", "299")
        again, same = run(tiny_folder, tmp_path / name, "--resume")
        assert all(torch.equal(same[side], books[side]) for side in books)
        again["calibration"].pop("seconds"), whole["calibration"].pop("seconds", None)
        assert again == whole
    left = [file for file in tmp_path.rglob("*") if file.parent.name == "work" or file.suffix == ".part"]
    assert not left  # what --work held is cleared
    assert "energy lost, values" in capsys.readouterr().out


def test_texts_are_read(tiny_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(document(1, 60))
    about, books = run(tiny_folder, tmp_path / "text", "--text", str(text))
    assert about["calibration"]["text"] == ["text.txt"]
    assert not torch.equal(books["keys"], run(tiny_folder, tmp_path / "generated")[1]["keys"])
    text.write_text("too short")
    with pytest.raises(ValueError, match="the texts have 9 tokens, fewer than --tokens 100"):
        run(tiny_folder, tmp_path / "text", "--text", str(text))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--subspaces", "6"], "--subspaces 6 does not divide the 32 channels of a head"),
        (["--vectors", "15"], "15 rows are too few for 16 centroids; use more --samples or --tokens"),
    ],
)
def test_sizes_that_do_not_fit_the_model(tiny_folder, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_folder, tmp_path, *more)


@pytest.mark.parametrize("arguments", [["--subspaces", "7"], ["--bits", "5"], ["--samples", "0"]], ids=str)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert arguments[0] in capsys.readouterr().err
