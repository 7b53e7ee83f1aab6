"""The script that calibrates scales and biases: what it reads, what it writes, and going on where it stopped."""

import json
from importlib.resources import files
from pathlib import Path

import calibrate_scales as script
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvbench import CompressedCache
from kvbench.corpus import document
from kvbench.policies import FP8, NVFP4, Step

SIZES = "--samples 3 --tokens 50 --dtype float32"


def run(folder: Path, out: Path, *more: str) -> dict[str, Tensor]:
    script.main(["--model", str(folder), "--out", str(out), "--work", str(out / "work"), *SIZES.split(), *more])
    return load_file(out / "kv_scales.safetensors")


@pytest.fixture(scope="module")
def exact(tiny_folder: Path) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer of the run's samples, [samples, heads, tokens, head_dim] float32."""
    from transformers import AutoTokenizer

    args = script.parse(["--model", str(tiny_folder), *SIZES.split()])
    rows = script.samples(AutoTokenizer.from_pretrained(tiny_folder), args, "kv_scales")
    model, caches = AutoModelForCausalLM.from_pretrained(tiny_folder).eval(), []
    for row in rows:
        caches.append(CompressedCache(model))
        with torch.no_grad():
            model(torch.tensor([row]), past_key_values=caches[-1])
    layers = [[layer.kv for layer in cache.policy_layers()] for cache in caches]
    return [
        tuple(torch.cat([getattr(kv, side).dense() for kv in same]) for side in ("keys", "values"))
        for same in zip(*layers, strict=True)
    ]


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_scales_and_biases_are_those_of_what_the_model_read(tiny_folder, tmp_path, exact, per_head, affine, capsys):
    got = run(tiny_folder, tmp_path, *["--per-head"] * per_head, *["--affine"] * affine)
    assert len(got) == len(exact) * 2 * (1 + affine)
    for layer, both in enumerate(exact):
        for side, x in zip("kv", both, strict=True):
            name = f"model.layers.{layer}.self_attn.{side}_proj.{side}_"
            if affine:
                bias = got[f"{name}bias"]
                torch.testing.assert_close(bias, x.mean((0, 2))[None, :, None], atol=1e-6, rtol=1e-5)
                x = x - bias
            largest = x.abs().amax((0, 2, 3)) if per_head else x.abs().max()
            assert torch.equal(got[f"{name}scale"], largest / 448)
    about = json.loads((tmp_path / "kv_scales.json").read_text())
    assert (about["per_head"], about["affine"], about["calibration"]["samples"]) == (per_head, affine, 3)
    assert not list((tmp_path / "work").iterdir())
    assert "largest magnitude, v, layer by layer" in capsys.readouterr().out
    # Nothing that was read saturates, and policies take what was written.
    policy = FP8(checkpoint=str(tmp_path))
    for layer, (keys, values) in enumerate(exact):
        step = Step(layer, torch.tensor([50] * 3), torch.tensor([50] * 3), order=layer, layers=len(exact))
        decoded = policy.encode(keys, values, step).decode()
        for x, back in zip((keys, values), decoded, strict=True):
            assert float((back - x).abs().max()) <= 0.07 * float(x.abs().max())
        if not per_head:
            NVFP4(checkpoint=str(tmp_path)).encode(keys, values, step)


def test_a_run_that_was_cut_off_goes_on(tiny_folder, tmp_path, monkeypatch):
    whole, note, calls = run(tiny_folder, tmp_path / "whole", "--affine"), script.note, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return note(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "note", interrupted)
        run(tiny_folder, tmp_path / "cut", "--affine")
    with pytest.raises(ValueError, match="has other values of tokens, seed; use those, or start without --resume"):
        run(tiny_folder, tmp_path / "cut", "--resume", "--tokens", "40", "--seed", "1")
    monkeypatch.setattr(script, "note", lambda *args: calls.append(1) or note(*args))
    calls.clear()
    again = run(tiny_folder, tmp_path / "cut", "--affine", "--resume")
    assert len(calls) == 1 and all(torch.equal(again[name], x) for name, x in whole.items())


def test_texts_are_read_and_what_is_all_zero_gets_a_scale(tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(document(1, 60))
    got = run(tiny_folder, tmp_path / "text", "--text", str(text))
    assert any(not torch.equal(x, got[name]) for name, x in run(tiny_folder, tmp_path / "generated").items())
    zeros = {f"7.v.{kind}": torch.zeros(2, 4) for kind in ("mean", "min", "max")}
    name = "model.layers.7.self_attn.v_proj.v_scale"
    assert script.scales(zeros, False, True)[name].tolist() == 1
    assert script.scales(zeros, True, False)[name].tolist() == [1, 1]
    with pytest.raises(SystemExit):
        script.main(["--samples", "0"])


@pytest.mark.parametrize("name", ["nvfp4_affine", "fp8_tensor", "fp8_head"])
def test_what_ships_fits_the_proving_model(name):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    policy = instantiate(OmegaConf.create((files("kvbench.conf") / "quant" / f"{name}.yaml").read_text()))
    policy.check(64)
    x = torch.randn(1, 2, 8, 64)
    default = type(policy)().codecs()
    for layer in range(4):
        seen = torch.tensor([8])
        step = Step(layer, seen, seen, order=layer, layers=4)
        assert all(codec not in default for codec in policy.codecs(step))
        for back in policy.encode(x, x, step).decode():
            assert (back - x).norm() < 0.2 * x.norm()
