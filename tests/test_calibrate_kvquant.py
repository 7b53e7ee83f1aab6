"""The script that calibrates KVQuant: what it notes of a model, k-means, Q-Norm, and going on where it stopped."""

import json
from functools import partial
from itertools import combinations
from pathlib import Path

import calibrate_kvquant as script
import pytest
import torch
from calibration import read
from transformers import AutoModelForCausalLM

from kvbench import CompressedCache
from kvbench.corpus import document
from kvbench.policies import KVQuant
from kvbench.policies.kvquant import artifact, nearest, normalized, token_ranges


def cost(points: list[float], weights: list[float], centres: list[float]) -> float:
    return sum(w * min((x - c) ** 2 for c in centres) for x, w in zip(points, weights, strict=True))


def best(points: list[float], weights: list[float], count: int) -> float:
    """The least cost of all partitions of the sorted points into `count` runs."""
    pairs = sorted(zip(points, weights, strict=True))
    found = []
    for cuts in combinations(range(1, len(pairs)), count - 1):
        runs = [pairs[a:b] for a, b in zip((0, *cuts), (*cuts, len(pairs)), strict=True)]
        means = [sum(x * w for x, w in run) / sum(w for _, w in run) for run in runs]
        found.append(sum(w * (x - m) ** 2 for run, m in zip(runs, means, strict=True) for x, w in run))
    return min(found)


def lloyd(points: list[float], weights: list[float], centres: list[float]) -> list[float]:
    """One iteration, element by element."""
    groups = [[] for _ in centres]
    for x, w in zip(points, weights, strict=True):
        groups[min(range(len(centres)), key=lambda i: (abs(x - centres[i]), i))].append((x, w))
    means = [sum(x * w for x, w in group) / max(sum(w for _, w in group), 1e-300) for group in groups]
    return [mean if sum(w for _, w in group) > 0 else c for mean, group, c in zip(means, groups, centres, strict=True)]


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("clusters", [False, True])
def test_kmeans_against_all_partitions(count: int, clusters: bool) -> None:
    for _ in range(10):
        places = torch.tensor([-0.9, -0.4, 0.2, 0.8])[:count] if clusters else torch.zeros(1)
        points = places[torch.arange(16) % len(places)] + (torch.rand(16) - 0.5) * (0.1 if clusters else 2)
        weights = torch.rand(16) + 0.1
        centres = script.kmeans(points, weights, count)
        mine = cost(points.tolist(), weights.tolist(), centres.tolist())
        least = best(points.tolist(), weights.tolist(), count)
        assert bool((centres.diff() > 0).all())
        assert mine <= (1.001 if clusters else 2.5) * least + 1e-9  # any end of Lloyd's iteration; the best if apart
        again = lloyd(points.tolist(), weights.tolist(), centres.tolist())
        assert again == pytest.approx(centres.tolist(), abs=1e-6)


@pytest.mark.parametrize("count", [4, 8, 16])
def test_kmeans_of_very_unequal_weights_stays_sorted_and_inside(count: int) -> None:
    points, weights = torch.rand(5000) * 2 - 1, 10.0 ** (-30 * torch.rand(5000))
    centres = script.kmeans(points, weights, count)
    assert bool((centres.diff() > 0).all()) and float(centres.abs().max()) <= 1
    assert torch.equal(centres, script.kmeans(points, weights, count))
    heavier = script.kmeans(points, (points > 0.5).float() + 1e-6, count)  # most signposts go where the weight is
    assert int((heavier > 0.5).sum()) >= count - 2
    one = script.kmeans(torch.tensor([0.25]), torch.ones(1), count)
    assert bool((one.diff() >= 0).all()) and float((one - 0.25).abs().min()) == 0
    none = script.kmeans(points, torch.zeros(5000), count)
    assert none.tolist() == pytest.approx([(2 * i + 1) / count - 1 for i in range(count)])


@pytest.mark.parametrize("count", [4, 8, 16])
def test_qnorm_restores_mean_and_deviation(count: int) -> None:
    points = (torch.randn(20_000) * 0.3 + 0.1).clamp(-1, 1)
    signposts = script.kmeans(points, torch.rand(20_000) ** 8, count)
    scale, offset = script.qnorm(points, signposts).tolist()
    rounded = signposts[nearest(points, signposts).int()]
    assert abs(rounded.std() / points.std() - 1) > 1e-3
    restored = rounded * scale + offset
    assert float((restored.mean() - points.mean()).abs()) < 1e-3
    assert float((restored.std() - points.std()).abs()) < 1e-3
    assert script.qnorm(torch.full((4,), 0.5), signposts)[0] == 1


@pytest.mark.parametrize("share", [0.0, 0.005, 0.1, 0.25])
def test_percentiles(share: float) -> None:
    x = torch.randn(201, 5)
    lower, upper = script.percentiles(x, share)
    torch.testing.assert_close(lower, torch.quantile(x, share, dim=0))
    torch.testing.assert_close(upper, torch.quantile(x, 1 - share, dim=0))


def test_notes_are_keys_before_rope_values_and_gradients(tiny_folder: Path) -> None:
    """As the linear layers give them, and their gradients as autograd gives them there."""
    ids, outputs = torch.randint(2, 200, (1, 40)), {}
    model = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()

    def keep(name: str, module: torch.nn.Module, args: tuple, out: torch.Tensor) -> None:
        outputs[name] = out

    handles = [
        getattr(layer.self_attn, f"{side}_proj").register_forward_hook(partial(keep, f"{i}.{side}"))
        for i, layer in enumerate(model.model.layers)
        for side in "kv"
    ]
    gradients = torch.autograd.grad(model(ids, labels=ids).loss, list(outputs.values()))
    expected = {}
    for (name, x), gradient in zip(outputs.items(), gradients, strict=True):
        expected |= {f"{name}.{kind}": t[0].detach().unflatten(1, (2, 32)) for kind, t in (("x", x), ("g", gradient))}
    for handle in handles:
        handle.remove()
    found = script.Notes(model).of(model, ids[0].tolist())
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], atol=1e-5, rtol=1e-3)
    assert all(float(found[f"{i}.k.g"].abs().max()) > 1e-4 for i in range(2))


def run(folder: Path, out: Path, *more: str) -> None:
    sizes = ["--samples", "3", "--tokens", "60", "--work", str(out.with_name(f"{out.name}-work"))]
    script.main(["--model", str(folder), "--out", str(out), *sizes, *more])


def test_an_artifact_is_what_its_samples_say(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    noted, fit = {}, script.fit

    def noting(args, order, side):
        noted[order, side] = [script.noted(args, f"{order}.{side}.{kind}") for kind in "xg"]
        return fit(args, order, side)

    monkeypatch.setattr(script, "fit", noting)
    run(tiny_folder, tmp_path / "out", "--sinks", "2", "--outliers", "0.1")
    found = artifact(str(tmp_path / "out"))
    assert (found.layers, found.heads, found.head_dim, found.outliers) == (2, 2, 32, 0.1)
    assert not list((tmp_path / "out-work").iterdir()) and not list((tmp_path / "out").glob("*.part"))
    for (order, side), (x, gradient) in noted.items():
        assert x.shape == gradient.shape == (3, 60, 2, 32)
        name = f"layers.{order}.{side}"
        if side == "k":
            upper = torch.quantile(x.flatten(0, 1), 0.95, dim=0)
            lower = torch.quantile(x.flatten(0, 1), 0.05, dim=0)
            torch.testing.assert_close(found.tensors[f"{name}.upper"], upper.half(), atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(found.tensors[f"{name}.lower"], lower.half(), atol=1e-3, rtol=1e-3)
            upper, lower = (found.tensors[f"{name}.{end}"].float() for end in ("upper", "lower"))
            scaled = normalized(x, (upper + lower) / 2, (upper - lower) / 2)
        else:  # int(0.05 * 32) + 1 = 2 outliers at each end
            scaled = normalized(x.flatten(0, 2), *token_ranges(x.flatten(0, 2), 2)).view_as(x)
        inside = (scaled.abs() <= 1) & (torch.arange(60) >= 2)[:, None, None]
        for bits in (2, 3, 4):
            signposts = found.tensors[f"{name}.codebook.{bits}"]
            assert bool((signposts.diff() > 0).all()) and float(signposts.abs().max()) <= 1
            points, weights = scaled[inside], gradient[inside].square()
            torch.testing.assert_close(signposts, script.kmeans(points, weights, 2**bits), atol=1e-4, rtol=1e-4)
            scale, offset = found.tensors[f"{name}.qnorm.{bits}"].tolist()
            restored = signposts[nearest(points, signposts).int()] * scale + offset
            assert float((restored.mean() - points.mean()).abs()) < 1e-3
            assert float((restored.std() - points.std()).abs()) < 1e-3
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    cache = CompressedCache(model, KVQuant(4, str(tmp_path / "out"), 0.1))
    model(torch.randint(2, 200, (1, 30)), past_key_values=cache)
    assert cache.layers[1].kv.keys.body.counts.even == 30


def test_a_run_that_was_cut_off_goes_on(tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text(document(1, 20))
    options = ["--text", str(text), "--points", "500"]
    run(tiny_folder, tmp_path / "whole", *options)
    of, calls = script.Notes.of, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return of(*args)

    monkeypatch.setattr(script.Notes, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, tmp_path / "again", *options)
    with pytest.raises(ValueError, match="has other values of seed; use those, or start without --resume"):
        run(tiny_folder, tmp_path / "again", *options, "--seed", "1", "--resume")
    run(tiny_folder, tmp_path / "again", *options, "--resume")
    assert len(calls) == 4  # the first sample was not read again
    about = [json.loads((tmp_path / name / "kvquant.json").read_text()) for name in ("whole", "again")]
    assert all(x["calibration"].pop("seconds") >= 0 for x in about) and about[0] == about[1]
    assert about[0]["calibration"]["text"] == ["text.txt"]
    run(tiny_folder, tmp_path / "again", *options)
    assert len(calls) == 7
    with pytest.raises(ValueError, match="tokens, fewer than --tokens 60"):
        text.write_text("short")
        run(tiny_folder, tmp_path / "again", *options)


@pytest.mark.parametrize(
    "arguments", [["--outliers", "0.5"], ["--samples", "0"], ["--tokens", "2", "--sinks", "1"]], ids=str
)
def test_bad_arguments(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        script.parse(arguments)
    assert "--" in capsys.readouterr().err


def test_texts_come_from_files_and_data_sets(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("one\ntwo")
    assert read(str(tmp_path / "plain.txt"), 3) == "one\ntwo"
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(9)))
    assert read(f"hub:{folder}", 12) == "row 0\nrow 1\nrow 2"
    (folder / "train.jsonl").write_text(json.dumps({"words": "row"}) + "\n")
    with pytest.raises(ValueError, match="has no column named text; its columns are: words"):
        read(f"hub:{folder}", 12)
