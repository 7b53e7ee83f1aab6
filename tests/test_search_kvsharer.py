"""The script that finds layers to share: what it measures, whom it takes, and going on where it stopped."""

import argparse
import json
import random
from pathlib import Path

import pytest
import search_kvsharer as script
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from kvbench.corpus import document
from kvbench.policies import Full, KVSharer


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """Four layers of the tiny model's shape, as `from_pretrained` reads them."""
    model, tokenizer = tiny
    torch.manual_seed(1)
    deep = LlamaForCausalLM(
        LlamaConfig(**{**model.config.to_dict(), "num_hidden_layers": 4, "initializer_range": 0.05})
    )
    where = tmp_path_factory.mktemp("deep")
    deep.eval().save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def test_distances_are_those_of_mean_keys_and_values(folder) -> None:
    model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.randint(2, 250, (11, 9))
    held = script.mean_held(model, ids)
    caches = []
    for row in ids:
        caches.append(DynamicCache(config=model.config))
        with torch.no_grad():
            model(row[None], past_key_values=caches[-1])
    for order, sides in enumerate(held):
        for side, mean in zip(("keys", "values"), sides, strict=True):
            wanted = torch.stack([getattr(cache.layers[order], side)[0] for cache in caches]).mean(0)
            torch.testing.assert_close(mean, wanted, atol=1e-4, rtol=1e-4)
    by_hand = {}
    for i in range(4):
        for j in range(i):
            far = []
            for a, b in zip(held[i], held[j], strict=True):
                rows = [((a[h, t] - b[h, t]) ** 2).sum() ** 0.5 for h in range(2) for t in range(9)]
                far.append(float(sum(rows)) / 18)
            by_hand[i, j] = sum(far) / 2
    found = script.distances(held)
    assert [pair[1:] for pair in found] == sorted(by_hand, key=by_hand.__getitem__, reverse=True)
    assert all(distance == pytest.approx(by_hand[i, j], rel=1e-4) for distance, i, j in found)
    odd = (torch.zeros(1, 9, 32), torch.zeros(1, 9, 32))
    assert {pair[1:] for pair in script.distances([*held[:2], odd])} == {(1, 0)}  # other heads: never a pair


def test_last_hidden_is_what_the_output_layer_gets(folder) -> None:
    model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.randint(2, 250, (9, 12))
    wanted = []
    with torch.no_grad():
        for row in ids:
            wanted.append(model.model(row[None], use_cache=False).last_hidden_state[0].flatten())
    full = script.last_hidden(model, Full(), ids)
    torch.testing.assert_close(full, torch.stack(wanted), atol=1e-4, rtol=1e-4)
    shared = script.last_hidden(model, KVSharer(pairs=((2, 1),)), ids)
    assert shared.shape == full.shape and (shared - full).abs().max() > 0.01


def official(ranked: list, threshold: float, wanted: int, similarity) -> dict[int, int]:
    """The notebook's loop on a map of all layers."""
    layers = 1 + max(i for _, i, _ in ranked)
    current, shared = {i: i for i in range(layers)}, []
    for _, layer, source in ranked:
        if layer in shared:
            continue
        tried = {**current, layer: source}
        resolved: dict[int, int] = {}
        for key, value in tried.items():
            resolved[key] = value if key == value else resolved[value]
        if similarity(resolved) > threshold:
            current = resolved
            shared.append(layer)
        if len(shared) >= wanted:
            break
    return {key: value for key, value in current.items() if key != value}


class Row:
    def __init__(self, index: int) -> None:
        self.index = index


@pytest.mark.parametrize("seed", range(12))
def test_whom_the_search_takes_is_whom_the_official_loop_takes(seed: int, monkeypatch, tmp_path) -> None:
    rng, layers = random.Random(seed), 7
    ranked = [(rng.random(), i, j) for i in range(layers) for j in range(i)]
    ranked.sort(reverse=True)
    drawn: dict[tuple, float] = {}

    def similarity(shared: dict[int, int]) -> float:
        key = tuple(sorted((k, v) for k, v in shared.items() if k != v))
        return drawn.setdefault(key, random.Random(f"{seed} {key}").random())

    def hidden(model, policy, ids) -> torch.Tensor:
        like = 1.0 if policy == Full() else similarity(policy.sources(layers))
        return torch.tensor([[like, (1 - like**2) ** 0.5]] * 2)

    class Cache:
        def __init__(self, model) -> None:
            pass

        def policy_layers(self) -> list[Row]:
            return [Row(i) for i in range(layers)]

    monkeypatch.setattr(script, "CompressedCache", Cache)
    monkeypatch.setattr(script, "mean_held", lambda model, ids: None)
    monkeypatch.setattr(script, "distances", lambda held: ranked)
    monkeypatch.setattr(script, "last_hidden", hidden)
    args = script.parse(["--model", "x", "--out", str(tmp_path / "x.json"), "--layers", "3", "--threshold", "0.6"])
    found = script.search(argparse.Namespace(device="cpu"), [[1, 2]], args)
    shared = KVSharer(pairs=tuple(map(tuple, found["pairs"]))).sources(layers)
    assert shared == official(ranked, 0.6, 3, similarity) and len(found["pairs"]) <= 3
    taken = [each["pair"] for each in found["search"]["tried"] if each["taken"]]
    assert taken == found["pairs"]


def run(folder: Path, out: Path, *more: str) -> dict:
    text = out.with_name("text.txt")
    text.write_text(document(1, 60))
    sizes = "--samples 3 --tokens 24 --layers 2".split()
    script.main(["--model", str(folder), "--text", str(text), "--out", str(out), *sizes, *more])
    return json.loads(out.read_text())


def test_a_run_that_was_cut_off_goes_on(folder, tmp_path, monkeypatch, capsys) -> None:
    whole = run(folder, tmp_path / "pairs.json")
    hidden = script.last_hidden
    for stop, more in ((1, []), (2, ["--resume"]), (3, ["--resume"])):  # before any pair, at the first, at the second
        calls = []

        def interrupted(*args, calls=calls, stop=stop):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return hidden(*args)

        monkeypatch.setattr(script, "last_hidden", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "again.json", *more)
    monkeypatch.setattr(script, "last_hidden", hidden)
    with pytest.raises(ValueError, match="was made with other values of threshold;"):
        run(folder, tmp_path / "again.json", "--threshold", "0.1", "--resume")
    again = run(folder, tmp_path / "again.json", "--resume")
    for found in (whole, again):
        assert found["search"].pop("seconds") >= 0
    assert again == whole and "taken" in capsys.readouterr().out
    assert whole["layers"] == 4 and whole["search"]["model"] == folder.name and whole["search"]["text"] == ["text.txt"]
    assert not list(tmp_path.glob("*.state")) and not list(tmp_path.glob("*.part"))
    assert len(KVSharer(str(tmp_path / "again.json")).sources(4)) == 2


def test_when_no_pair_is_like_enough(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="no pair of layers keeps a similarity above --threshold 1; use a lower one"):
        run(folder, tmp_path / "pairs.json", "--threshold", "1")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "some/model"], "--out is needed for models other than proving"),
        (["--layers", "0"], "--samples, --tokens and --layers must be at least 1"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err


def test_a_text_that_is_too_short_is_named(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="fewer than --tokens 50000"):
        run(folder, tmp_path / "pairs.json", "--tokens", "50000")
