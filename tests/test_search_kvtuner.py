"""The script that finds the bits of every layer: what it measures, what it chooses, and going on where it stopped."""

import itertools
import json
import random
from pathlib import Path

import pytest
import search_kvtuner as script
import torch

from kvbench.corpus import document
from kvbench.policies import KVTuner


def bits(assignment) -> int:
    return sum(map(sum, assignment))


def test_frontier_drops_what_as_few_bits_beat() -> None:
    rng = random.Random(0)
    for _ in range(50):
        errors = {pair: rng.randrange(6) / 10 for pair in script.PAIRS}
        kept = script.frontier(errors)
        for pair in script.PAIRS:
            beaten = [q for q in kept if sum(q) <= sum(pair) and errors[q] <= errors[pair]]
            assert beaten and (pair not in kept or beaten == [pair])


@pytest.mark.parametrize("most", [2, 2.5, 3, 4.25, 8])
def test_cheapest_is_what_trying_all_gives(most: float) -> None:
    rng = random.Random(1)
    costs = [{pair: rng.random() for pair in rng.sample(script.PAIRS, 5) + [(2, 2)]} for _ in range(3)]
    every = [a for a in itertools.product(*costs) if bits(a) <= 6 * most]
    every.sort(key=lambda a: sum(cost[pair] for cost, pair in zip(costs, a, strict=True)))
    assert script.cheapest(costs, most, 7) == every[:7]


def test_alone_packs_one_layer_and_the_loss_is_that_of_the_second_half(tiny) -> None:
    model, _ = tiny
    shape = {"group_size": 8, "residual": 0}
    policies = [script.Alone(KVTuner(pairs=((b, b),), **shape), layer) for layer in (0, 1) for b in (2, 8)]
    ids, calls = torch.randint(2, 250, (1, 96)), []
    full, found = script.measure(model, ids, policies, lambda: calls.append(1))
    with torch.inference_mode():
        logits = model(ids).logits[0, 48:-1]
    assert full == pytest.approx(float(torch.nn.functional.cross_entropy(logits, ids[0, 49:])), abs=1e-5)
    (two, eight), (later_two, later_eight) = found[:2], found[2:]
    assert two[1][0] > 10 * eight[1][0] > 0 and two[1][1] > 0 and len(calls) == 4
    assert later_two[1][0] < 1e-6 and later_two[1][1] > 10 * later_eight[1][1] > 0
    assert two[0] != full != later_two[0]


def run(folder: Path, out: Path, *more: str) -> dict:
    text = out.with_name("text.txt")
    text.write_text(document(1, 60))
    sizes = "--documents 3 --length 128 --group-size 8 --residual 8 --candidates 3".split()
    script.main(["--model", str(folder), "--text", str(text), "--out", str(out), *sizes, *more])
    return json.loads(out.read_text())


def test_a_run_that_was_cut_off_goes_on(tiny_folder, tmp_path, monkeypatch, capsys) -> None:
    whole = run(tiny_folder, tmp_path / "bits.json")
    measure = script.measure
    for stop, more in ((2, []), (4, ["--resume"])):  # at the second text of either stage
        calls = []

        def interrupted(*args, calls=calls, stop=stop):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return measure(*args)

        monkeypatch.setattr(script, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_folder, tmp_path / "again.json", *more)
    monkeypatch.setattr(script, "measure", measure)
    with pytest.raises(ValueError, match="was made with other values of bits;"):
        run(tiny_folder, tmp_path / "again.json", "--bits", "4", "--resume")
    again = run(tiny_folder, tmp_path / "again.json", "--resume")
    for found in (whole, again):
        assert found["search"].pop("seconds")
    assert again == whole and "layer   0  K" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.state")) and not list(tmp_path.glob("*.part"))
    found = KVTuner(str(tmp_path / "again.json")).bits
    assert len(found) == 2 and bits(found) <= 12 and whole["search"]["mean_bits"] == bits(found) / 4


def test_with_bits_to_spare_nothing_is_lost(tiny_folder, tmp_path, capsys) -> None:
    search = run(tiny_folder, tmp_path / "bits.json", "--bits", "8", "--mode", "token")["search"]
    assert search["loss"] <= search["loss_full"] + 0.01 and search["mode"] == "token"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "some/model"], "--text and --out"),
        (["--text", "book.txt"], "generated text only"),
        (["--bits", "9"], "--bits must be from 2 to 8, got 9"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err


def test_a_text_that_is_too_short_is_named(tiny_folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="fewer than --length 5000; use a longer --text"):
        run(tiny_folder, tmp_path / "bits.json", "--length", "5000")
