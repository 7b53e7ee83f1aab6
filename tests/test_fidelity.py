"""Known text: fidelity to the full cache, perplexity in one pass and token by token, windows of documents."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import cache_utils

from kvbench import CompressedCache
from kvbench.baselines import Baseline
from kvbench.engine import run_stacks
from kvbench.policies import H2O, KIVI, Full, KeyDiff, Quest, Stack, StreamingLLM
from kvbench.tasks import Fidelity, FidelityOf, Ppl, Recall
from kvbench.tasks.sample import bos, encode

pytest.importorskip("wonderwords", reason="the word list comes with kvbench[bench]")

BOOKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "books"
needs_books = pytest.mark.skipif(not BOOKS.is_dir(), reason=f"no books in {BOOKS}")
STACKS = [Full(), KeyDiff(budget=48), H2O(budget=0.5) | KIVI(bits=2, residual=32), Quest(budget=48, page=8)]


def test_fidelity_is_what_two_plain_forwards_say(tiny):
    """An evicted prefix is the prefix without its middle, with positions kept: StreamingLLM, from a mask."""
    model, tokenizer = tiny
    task = Fidelity(prefix=120, score_tokens=24, count=3)
    full, cut = run_stacks(
        model, tokenizer, task, [Full(), StreamingLLM(budget=0.2, sinks=4, positions="original")], batch_size=2
    )
    for sample, same, row in zip(task.samples(tokenizer), full.rows, cut.rows, strict=True):
        assert same["score"] == 1 and same["details"]["kl"] == pytest.approx(0, abs=1e-6)
        context = sample.segments(tokenizer)[0]
        target = encode(tokenizer, sample.references[0])
        ids = torch.tensor([[*context, *target]])
        prefix = len(context) - 1
        with torch.inference_mode():
            model.set_attn_implementation("eager")
            seen = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
            first = model(ids, attention_mask=seen[None, None].float().log()).logits[0, prefix:-1].log_softmax(-1)
            kept = math.ceil(0.2 * prefix)
            seen[prefix:, 4 : prefix - (kept - 4)] = False
            second = model(ids, attention_mask=seen[None, None].float().log()).logits[0, prefix:-1].log_softmax(-1)
        kl = (first.exp() * (first - second)).sum(-1)
        details = row["details"]
        assert details["bins"] == [1, 2, 4, 8, 16, len(target)] and details["n_scored"] == len(target)
        assert details["kl"] == pytest.approx(kl.mean().item(), rel=1e-3)
        assert details["kl_bins"][0] == pytest.approx(kl[0].item(), rel=1e-3)
        assert details["kl_bins"][-1] == pytest.approx(kl[16:].mean().item(), rel=1e-3)
        assert row["score"] == pytest.approx((first.argmax(-1) == second.argmax(-1)).float().mean().item())
        paid = -torch.stack([x[range(len(target)), target] for x in (first, second)]).mean(1)
        assert row["nll"] == pytest.approx(paid[1].item(), rel=1e-4)
        assert details["nll_difference"] == pytest.approx((paid[1] - paid[0]).item(), abs=1e-4)


@pytest.mark.parametrize("task", [Fidelity(100, 20, 3), FidelityOf(Recall(length=260, needles=2, count=3), tokens=12)])
def test_fidelity_is_the_same_whatever_the_batch_and_the_company(tiny, task):
    model, tokenizer = tiny
    together = run_stacks(model, tokenizer, task, STACKS, batch_size=3)
    for stack, run in zip(STACKS, together, strict=True):
        (alone,) = run_stacks(model, tokenizer, task, [stack], batch_size=1)
        for one, other in zip(run.rows, alone.rows, strict=True):
            assert one["prompt_sha256"] == other["prompt_sha256"] and one["score"] == other["score"]
            assert one["details"]["kl"] == pytest.approx(other["details"]["kl"], rel=1e-3, abs=1e-6)
            assert one["kv_bytes_final"] == other["kv_bytes_final"]


def test_a_full_cache_agrees_with_its_own_answers(tiny):
    model, tokenizer = tiny
    of = Recall(length=260, needles=2, count=2)
    full, cut = run_stacks(model, tokenizer, FidelityOf(of, tokens=12), [Full(), KeyDiff(budget=16)], query_aware=True)
    (answers,) = run_stacks(model, tokenizer, of, [Full()], query_aware=True)
    assert [r["score"] for r in full.rows] == [1, 1] and min(r["score"] for r in cut.rows) < 1
    for row, plain in zip(full.rows, answers.rows, strict=True):
        assert 1 <= row["details"]["n_scored"] <= 12
        assert row["n_prompt_tokens"] == plain["n_prompt_tokens"] and row["kv_bytes_full"] == plain["kv_bytes_full"]
    with pytest.raises(ValueError, match="of=ppl: its prompts have no answers"):
        FidelityOf(Ppl())


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no FP8 cache")
def test_baselines_are_compared_with_the_same_reference(tiny):
    model, tokenizer = tiny
    for task in (Fidelity(100, 20, 2), FidelityOf(Recall(length=260, needles=2, count=2), tokens=8)):
        (run,) = run_stacks(model, tokenizer, task, [Stack((Baseline("hf_fp8"),))], batch_size=2)
        assert all(0 < r["details"]["kl"] < 1 for r in run.rows)


def test_chunks_leave_the_full_cache_alone_and_let_policies_act(tiny):
    model, tokenizer = tiny
    once = Ppl(prefix=60, score_tokens=40, count=2)
    for chunk in (1, 7):
        fed = replace(once, chunk=chunk)
        stacks = [Full(), KeyDiff(budget=32)]
        (full, cut), (whole, _) = (run_stacks(model, tokenizer, task, stacks) for task in (fed, once))
        for a, b in zip(full.rows, whole.rows, strict=True):
            assert a["nll"] == pytest.approx(b["nll"], abs=1e-4)
        per_slot = 2 * 2 * 2 * 32 * 4 + 2 * 2 * 4  # keys and values, layers, heads, head_dim, float32; positions
        assert {r["kv_bytes_final"] for r in cut.rows} == {32 * per_slot}
        assert all(r["kv_bytes_peak"] <= (32 + chunk) * per_slot for r in cut.rows)
        assert cut.checks["fired"]


def test_a_policy_that_only_acts_later_counts_as_acting(tiny):
    model, tokenizer = tiny
    task = Ppl(prefix=20, score_tokens=40, count=2, chunk=1)
    acts, silent = run_stacks(model, tokenizer, task, [KeyDiff(budget=32), KeyDiff(budget=200)])
    assert acts.checks["fired"] and not silent.checks["fired"]


def test_stream_is_decoding(tiny):
    """One token at a time, H2O loses what it would lose while generating the same tokens."""
    model, tokenizer = tiny
    task = Ppl(prefix=50, score_tokens=30, count=1, chunk=1)
    (run,) = run_stacks(model, tokenizer, task, [H2O(budget=24)])
    (sample,) = task.samples(tokenizer)
    context, target = sample.segments(tokenizer)[0], encode(tokenizer, sample.references[0])
    cache, paid = CompressedCache(model, H2O(budget=24)), []
    with torch.inference_mode():
        model(torch.tensor([context[:-1]]), past_key_values=cache)
        for token, following in zip([context[-1], *target], target, strict=False):
            logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            paid.append(-logits.log_softmax(-1)[following].item())
    assert run.rows[0]["nll"] == pytest.approx(sum(paid) / len(paid), abs=1e-5)


def test_the_peak_is_the_most_held_after_any_chunk(tiny):
    model, tokenizer = tiny
    task, policy = Ppl(prefix=50, score_tokens=60, count=1, chunk=7), KIVI(bits=4, residual=32)
    (run,) = run_stacks(model, tokenizer, task, [policy])
    (sample,) = task.samples(tokenizer)
    context, target = sample.segments(tokenizer)[0], encode(tokenizer, sample.references[0])
    cache, fed, held = CompressedCache(model, policy), [context[-1], *target[:-1]], []
    with torch.inference_mode():
        for part in (context[:-1], *(fed[i : i + 7] for i in range(0, len(fed), 7))):
            model(torch.tensor([part]), past_key_values=cache)
            held.append(int(cache.row_nbytes()))
    assert run.rows[0]["kv_bytes_final"] == held[-1] < max(held) == run.rows[0]["kv_bytes_peak"]


def test_bits_per_byte(tiny):
    model, tokenizer = tiny
    task = Ppl(prefix=60, score_tokens=40, count=1)
    (run,) = run_stacks(model, tokenizer, task, [Full()])
    (row,), (sample,) = run.rows, task.samples(tokenizer)
    tokens, letters = sample.meta["score_tokens"], len(sample.references[0].encode())
    assert row["details"]["bits_per_byte"] == pytest.approx(row["nll"] * tokens / letters / math.log(2))


def test_windows_of_documents(tiny, tmp_path):
    _, tokenizer = tiny
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{i}é" for i in range(400)), encoding="utf-8")
    task = Ppl(prefix=120, score_tokens=30, count=4, corpus="texts", path=os.fspath(tmp_path))
    samples = task.samples(tokenizer)
    assert [s.meta["cluster"] for s in samples] == ["a.txt", "b.txt", "a.txt", "b.txt"]
    assert len({s.sample_id for s in samples}) == len({s.references for s in samples}) == 4
    assert samples[:2] == replace(task, count=2).samples(tokenizer)
    longer = replace(task, prefix=300).samples(tokenizer)
    assert [s.references for s in longer] == [s.references for s in samples], "prefix moves the beginning alone"
    for sample, more in zip(samples, longer, strict=True):
        text = (tmp_path / sample.meta["cluster"]).read_text(encoding="utf-8")
        assert sample.context + sample.references[0] in text and more.context.endswith(sample.context)
        assert sample.references[0][0] == " " and len(encode(tokenizer, sample.references[0])) <= 30
        assert 110 < len(bos(tokenizer)) + len(encode(tokenizer, sample.context)) <= 120
    assert replace(task, seed=1).samples(tokenizer)[0].references != samples[0].references
    with pytest.raises(ValueError, match=r"document a.txt: \d+ \+ 28 tokens where prefix=9000 and score_tokens=30"):
        replace(task, prefix=9000).samples(tokenizer)


def test_corpora_that_are_not_there_say_what_to_do(tiny, tmp_path, monkeypatch):
    _, tokenizer = tiny
    monkeypatch.setenv("KVBENCH_DATA", os.fspath(tmp_path))
    with pytest.raises(ValueError, match="pg19: no .*test.jsonl.*https://huggingface.co/datasets/emozilla/pg19"):
        Ppl(corpus="pg19").samples(tokenizer)
    with pytest.raises(ValueError, match="corpus='c4' is not one of generated, texts, pg19"):
        Ppl(corpus="c4")
    with pytest.raises(ValueError, match="corpus=texts needs path="):
        Ppl(corpus="texts")
    with pytest.raises(ValueError, match="chunk=0: must be a number, at least 1"):
        Ppl(chunk=0)
    (tmp_path / "wikitext2").mkdir()
    lines = ["", " = Title = \n", *(f" line {i} of it . \n" for i in range(300))]
    import json

    (tmp_path / "wikitext2" / "test.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (sample,) = Ppl(prefix=100, score_tokens=30, count=1, corpus="wikitext2").samples(tokenizer)
    assert sample.context + sample.references[0] in "".join(lines)


@needs_books
def test_books(tiny):
    _, tokenizer = tiny
    samples = Fidelity(prefix=400, score_tokens=50, count=9, corpus="texts", path=os.fspath(BOOKS)).samples(tokenizer)
    assert len({s.meta["cluster"] for s in samples}) == 8 and samples[8].meta["cluster"] == samples[0].meta["cluster"]
