"""The script that finds retrieval heads: streaming attention, gates, texts, and going on where it stopped."""

import json
import math
from pathlib import Path

import find_retrieval_heads as script
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvbench import CompressedCache
from kvbench.corpus import document, rng_for
from kvbench.policies import DuoAttention


@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (2, 5), (9, 3), (4, 50)])
def test_streaming_attention_sees_sinks_the_recent_and_itself(monkeypatch, sinks, recent):
    monkeypatch.setattr(script, "BLOCK", 7)
    query, key, value = torch.randn(1, 4, 23, 8), torch.randn(1, 2, 23, 8), torch.randn(1, 2, 23, 8)
    out = script.streaming_attention(query, key, value, 0.5, sinks, recent)
    for h in range(4):
        for i in range(23):
            seen = [j for j in range(i + 1) if j < sinks or j >= i - recent]
            weights = [math.exp(0.5 * float(query[0, h, i] @ key[0, h // 2, j])) for j in seen]
            expected = sum(w * value[0, h // 2, j] for w, j in zip(weights, seen, strict=True)) / sum(weights)
            torch.testing.assert_close(out[0, h, i], expected, atol=1e-5, rtol=1e-5)


def test_closed_gates_are_what_the_policy_does(tiny_folder, tmp_path):
    """Gates of 0 and 1 give the logits of a DuoAttention cache that takes the prompt token by token."""
    ids, alpha = torch.randint(2, 200, (1, 40)), [[1.0, 0.0], [0.0, 1.0]]
    (tmp_path / "gates.json").write_text(json.dumps({"alpha": alpha}))
    policy = DuoAttention(24, str(tmp_path / "gates.json"), sinks=2, recent=5, block=1)  # 2 of 4 heads are full
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        expected = model(ids, past_key_values=CompressedCache(model, policy)).logits
        plain = model(ids, use_cache=False).logits
        gates = script.gated(model, sinks=2, recent=5)
        torch.testing.assert_close(model(ids, use_cache=False).logits, plain, atol=1e-4, rtol=1e-4)
        gates.on = True
        gates.alpha.copy_(torch.tensor(alpha))
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_notes_are_all_asked_for(tiny):
    tokenizer = tiny[1]
    ids, first = script.notes(tokenizer, rng_for(0, "test"), 900, 3)
    context, asked = tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:])
    assert 850 < len(ids) <= 900
    noted = {line.split(" .")[0] for line in context.split("note : code for ")[1:]}
    assert len(noted) == 3 and noted == {part.split(" .")[0] for part in asked.split("answer : code for ")[1:]}
    with pytest.raises(ValueError, match="100 tokens are too few for 3 notes"):
        script.notes(tokenizer, rng_for(0, "test"), 100, 3)


def test_passkeys_are_all_asked_for(tiny, monkeypatch):
    monkeypatch.setattr(script, "WORDS_PER_PASSKEY", 3)
    tokenizer = tiny[1]
    text = tokenizer.encode(document(1, 60), add_special_tokens=False)
    ids, first = script.passkeys(tokenizer, text, rng_for(0, "test"), 900, 2)
    context, asked = tokenizer.decode(ids[:first]), tokenizer.decode(ids[first:])
    assert len(ids) == 900
    for number in (1, 2):
        secret = context.split(f"number {number} of the archive is: ")[1].split(".")[0]
        assert asked.split(f"number {number} of the archive? It is: ")[1].split("\n")[0] == secret
    with pytest.raises(ValueError, match="100 tokens are too few for 2 passkeys"):
        script.passkeys(tokenizer, text, rng_for(0, "test"), 100, 2)


def run(folder: Path, out: Path, *more: str) -> dict:
    text = out.with_name("text.txt")
    text.write_text(document(1, 60))
    sizes = "--sinks 2 --recent 5 --min-length 250 --max-length 300 --passkeys 1 --save-every 2 --reg 5".split()
    script.main(["--model", str(folder), "--text", str(text), "--out", str(out), *sizes, *more])
    return json.loads(out.read_text())


def test_a_run_that_was_cut_off_goes_on(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "WORDS_PER_PASSKEY", 3)
    whole = run(tiny_folder, tmp_path / "gates.json", "--steps", "5")
    losses, calls = script.losses, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(*args)

    monkeypatch.setattr(script, "losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_folder, tmp_path / "again.json", "--steps", "5")
    monkeypatch.setattr(script, "losses", losses)
    with pytest.raises(ValueError, match="was made with other values of lr;"):
        run(tiny_folder, tmp_path / "again.json", "--steps", "5", "--lr", "0.1", "--resume")
    again = run(tiny_folder, tmp_path / "again.json", "--steps", "5", "--resume")
    assert again.pop("seconds") and whole.pop("seconds") and again == whole
    assert not list(tmp_path.glob("*.state")) and not list(tmp_path.glob("*.part"))
    assert whole["layers"] == [0, 1] and len(whole["alpha"]) == 2
    assert all(0 <= x < 1 for row in whole["alpha"] for x in row)
    DuoAttention(400, str(tmp_path / "gates.json")).check(32)


def test_without_a_price_all_gates_stay_open(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "WORDS_PER_PASSKEY", 3)
    assert run(tiny_folder, tmp_path / "gates.json", "--steps", "2", "--reg", "0")["alpha"] == [[1, 1]] * 2


def test_checkpointing_changes_nothing(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "WORDS_PER_PASSKEY", 3)
    plain = run(tiny_folder, tmp_path / "gates.json", "--steps", "4")["alpha"]
    assert min(map(min, plain)) < 1
    assert run(tiny_folder, tmp_path / "gates.json", "--steps", "4", "--checkpointing")["alpha"] == plain


def test_learning_rate_rises_and_falls():
    rates = [script.rate(step, 100) for step in range(100)]
    assert rates[0] == rates[1] == rates[99] == 0.1 and rates[9] == 0.5 and rates[19] == rates[80] == 1


@pytest.mark.parametrize("arguments", [["--model", "some/model"], ["--text", "book.txt"]], ids=str)
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert "--text" in capsys.readouterr().err
