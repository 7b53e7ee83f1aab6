"""The script that calibrates OSCAR: its covariances, its rotations, and going on where it stopped."""

from pathlib import Path

import calibrate_oscar as script
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvbench import CompressedCache
from kvbench.corpus import document
from kvbench.policies import OSCAR

SIZES = "--samples 3 --tokens 50 --dtype float32"


def run(folder: Path, out: Path, *more: str) -> dict[str, Tensor]:
    script.main(["--model", str(folder), "--out", str(out), "--work", str(out / "work"), *SIZES.split(), *more])
    return load_file(out / "oscar.safetensors")


def expected(covariance: Tensor) -> Tensor:
    """U H P, factor by factor; the columns of U are only given up to their signs, so |.| of products is compared."""
    size = len(covariance)
    h = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]).double() / size**0.5
    values, vectors = torch.linalg.eigh(covariance)
    order = [0] * size
    for rank, channel in enumerate(sorted(range(size), key=lambda i: -float(values[i]))):
        order[sum((rank >> b & 1) << size.bit_length() - 2 - b for b in range(size.bit_length() - 1))] = channel
    return (vectors @ h)[:, order].float()


def test_rotations_are_eigenvectors_then_hadamard_then_bit_reversal():
    x = torch.randn(40, 8).double() * torch.logspace(-1, 1, 8)
    covariance = x.T @ x
    got = script.rotation(covariance)
    torch.testing.assert_close(got, expected(covariance), atol=1e-5, rtol=0)
    torch.testing.assert_close(got @ got.T, torch.eye(8), atol=1e-5, rtol=0)


def test_covariances_are_those_of_what_the_model_read(tiny_folder, tmp_path):
    got = run(tiny_folder, tmp_path)
    args = script.parse(["--model", str(tiny_folder), *SIZES.split()])
    model, rows = AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), []
    for row in script.samples(AutoTokenizer.from_pretrained(tiny_folder), args, "oscar"):
        cache = CompressedCache(model, needs={"queries": 50})
        with torch.no_grad():
            model(torch.tensor([row]), past_key_values=cache)
        rows.append([(layer.queries[0], *(x[0] for x in layer.kv.decode())) for layer in cache.policy_layers()])
    for i, same in enumerate(zip(*rows, strict=True)):
        queries, keys, values = (torch.cat([part[j] for part in same], 1).double() for j in range(3))
        of_keys = of_values = 0
        for h in range(len(keys)):
            group = len(queries) // len(keys)
            q = queries[h * group : (h + 1) * group].flatten(0, 1)
            asked = q.T @ q / len(q)
            weight = torch.stack([k @ asked @ k for k in keys[h]])
            of_keys = of_keys + asked / len(keys)
            of_values = of_values + sum(
                w * torch.outer(v, v) for w, v in zip(weight / weight.sum(), values[h], strict=True)
            ) / len(keys)
        torch.testing.assert_close(got["k"][i].abs(), expected(of_keys).abs(), atol=2e-3, rtol=0)
        torch.testing.assert_close(got["v"][i].abs(), expected(of_values).abs(), atol=2e-3, rtol=0)
    OSCAR(path=str(tmp_path)).check(got["k"].shape[1])
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("after", [1, 4])
def test_a_run_that_was_cut_off_goes_on(tiny_folder, tmp_path, monkeypatch, after):
    whole, note, calls = run(tiny_folder, tmp_path / "whole"), script.note, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return note(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "note", interrupted)
        run(tiny_folder, tmp_path / "cut")
    with pytest.raises(ValueError, match="has other values of tokens, seed; use those, or start without --resume"):
        run(tiny_folder, tmp_path / "cut", "--resume", "--tokens", "40", "--seed", "1")
    monkeypatch.setattr(script, "note", lambda *args, **kwargs: calls.append(1) or note(*args, **kwargs))
    calls.clear()
    again = run(tiny_folder, tmp_path / "cut", "--resume")
    assert len(calls) == 6 - after and all(torch.equal(again[side], whole[side]) for side in "kv")


def test_texts_are_read_and_sizes_checked(tiny_folder, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(document(1, 60))
    got = run(tiny_folder, tmp_path / "text", "--text", str(text))
    assert not torch.equal(got["k"], run(tiny_folder, tmp_path / "generated")["k"])
    with pytest.raises(SystemExit):
        script.main(["--samples", "0"])
    monkeypatch.setattr(script, "collect", lambda *args: {"0.qq": torch.zeros(1, 48, 48)})
    with pytest.raises(ValueError, match="head_dim=48 must be a power of two"):
        run(tiny_folder, tmp_path / "odd")
