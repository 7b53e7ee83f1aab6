"""The engine: shared prefills change nothing, the first token feels the policy, checks and errors."""

import math

import pytest
import torch
from transformers import DynamicCache, cache_utils

from kvbench import baselines
from kvbench.baselines import Baseline, quantized_cache
from kvbench.answer import Run
from kvbench.engine import prepare, run_stacks
from kvbench.policies import FP8, H2O, KIVI, Full, KeyDiff, Random, SnapKV, Stack, StreamingLLM
from kvbench.tasks import Niah, Ppl, Recall
from kvbench.tasks.sample import Sample

STACKS = [
    Stack(()),
    StreamingLLM(budget=0.25),
    H2O(memory=0.25) | KIVI(bits=4, residual=32),
    KeyDiff(budget=64),
    SnapKV(budget=0.25, window=8) | FP8(),
]


def rows_of(runs):
    return [
        [(r["sample_id"], r["prediction"], r["kv_bytes_prefill_end"], r["kv_bytes_final"]) for r in run.rows]
        for run in runs
    ]


@pytest.mark.parametrize("query_aware", [False, True])
def test_shared_prefill_equals_single_runs_whatever_the_batch(tiny, query_aware):
    model, tokenizer = tiny
    task = Recall(length=320, needles=2, count=3)
    together = run_stacks(model, tokenizer, task, STACKS, query_aware=query_aware, batch_size=3)
    for stack, run in zip(STACKS, together, strict=True):
        (alone,) = run_stacks(model, tokenizer, task, [stack], query_aware=query_aware, batch_size=1)
        assert rows_of([alone]) == rows_of([run])
        assert run.checks == {"fired": True, "bytes_ok": True}


def test_full_cache_generates_what_transformers_does(tiny):
    model, tokenizer = tiny
    task = Niah(lengths=(200,), depths=(0, 50), repeats=1)
    (run,) = run_stacks(model, tokenizer, task, [Full()])
    for sample, row in zip(task.samples(tokenizer), run.rows, strict=True):
        ids = torch.tensor([[token for segment in sample.segments(tokenizer) for token in segment]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=sample.max_new_tokens, do_sample=False,
            past_key_values=DynamicCache(),
        )  # fmt: skip
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert expected.startswith(row["prediction"])
        assert row["kv_bytes_full"] == (ids.shape[1] - len(prepare(task, tokenizer, False, None)[0].held_back)) * 512


def test_nll_is_that_of_a_plain_forward(tiny):
    model, tokenizer = tiny
    task = Ppl(prefix=150, score_tokens=40, count=2)
    (run,) = run_stacks(model, tokenizer, task, [Full()], batch_size=2)
    for sample, row in zip(task.samples(tokenizer), run.rows, strict=True):
        context = sample.segments(tokenizer)[0]
        target = tokenizer.encode(sample.references[0], add_special_tokens=False)
        logits = model(torch.tensor([[*context, *target]])).logits[0, len(context) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(target)).item()
        assert row["nll"] == pytest.approx(expected, abs=1e-4)
        assert row["score"] == pytest.approx(math.exp(-expected), rel=1e-3)


@pytest.mark.parametrize("query_aware", [False, True])
def test_first_token_feels_the_policy(tiny, query_aware):
    """A cache of one slot leaves only what was held back: if prefill logits leaked, the first tokens would agree."""
    model, tokenizer = tiny
    task = Recall(length=320, needles=2, count=8)
    full, harsh = run_stacks(model, tokenizer, task, [Full(), StreamingLLM(budget=1, sinks=0)], query_aware=query_aware)
    first = [[row["prediction"][:1] for row in run.rows] for run in (full, harsh)]
    assert first[0] != first[1]


def test_byte_budget_that_cannot_be_met_says_so_and_spares_the_rest(tiny):
    model, tokenizer = tiny
    task = Recall(length=320, needles=2, count=2)
    runs = run_stacks(model, tokenizer, task, [H2O(memory=0.001), Full()])
    assert "room for 0 slots" in runs[0].infeasible and not runs[0].rows
    assert len(runs[1].rows) == 2


def test_silent_policies_and_wrong_bytes_are_noticed(tiny):
    model, tokenizer = tiny
    task = Recall(length=320, needles=2, count=1)

    class Keeper(Random):
        """Claims a budget and keeps everything."""

        def __call__(self, kv, step):
            return kv

    silent, unpacked = run_stacks(model, tokenizer, task, [Keeper(budget=32), KIVI(residual=512)])
    assert silent.checks == {"fired": False, "bytes_ok": False}
    assert unpacked.checks["fired"] is False


def test_finished_batches_are_not_repeated(tiny):
    model, tokenizer = tiny
    task = Recall(length=320, needles=2, count=4)
    parts: dict[int, list[Run]] = {0: [], 1: []}
    whole = run_stacks(
        model, tokenizer, task, STACKS[1:3], batch_size=2, on_finished=lambda i, part: parts[i].append(part)
    )
    model_calls = []
    hook = model.register_forward_hook(lambda *_: model_calls.append(1))
    again = run_stacks(
        model, tokenizer, task, STACKS[1:3], batch_size=2, finished=[parts[0], parts[1]],
        on_finished=lambda *_: pytest.fail("repeated a finished batch"),
    )  # fmt: skip
    hook.remove()
    assert not model_calls and rows_of(again) == rows_of(whole)


def test_prompts_that_do_not_fit_or_are_empty(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match=r"exceed the model's context of 1024"):
        run_stacks(model, tokenizer, Recall(length=1200, needles=2, count=1), [Full()])

    class Empty:
        name, kind = "empty", "generate"

        def samples(self, tokenizer):
            return [Sample("s", "empty", "", "", "", ("x",), 1)]

    with pytest.raises(ValueError, match="empty prompt"):
        run_stacks(model, tokenizer, Empty(), [Full()])


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no FP8 cache")
def test_caches_of_transformers_run_as_baselines(tiny):
    model, tokenizer = tiny
    tasks = Niah(lengths=(200, 260), depths=(0, 50), repeats=1), Ppl(prefix=150, score_tokens=40, count=2)
    for task in tasks:
        stacks = [Stack((Baseline("hf_fp8"),)), Stack((SnapKV(0.5, window=8), Baseline("hf_fp8")))]
        alone, stacked = run_stacks(model, tokenizer, task, stacks, batch_size=3)
        assert alone.checks == {"fired": True, "bytes_ok": True} and alone.infeasible is None
        assert not stacked.rows and "hf_fp8 packs by itself: it cannot be stacked with SnapKV" in stacked.infeasible
        prompts = {p.sample.sample_id: p for p in prepare(task, tokenizer, False, None)}
        for row in alone.rows:
            prompt = prompts[row["sample_id"]]
            assert row["kv_bytes_full"] == len(prompt.prefix) * 512
            assert 0.5 * row["kv_bytes_full"] < row["kv_bytes_prefill_end"] < 0.51 * row["kv_bytes_full"]
            if task.kind == "nll":
                continue
            cache = quantized_cache("hf_fp8", model)
            with torch.no_grad():
                model(torch.tensor([prompt.prefix]), past_key_values=cache)
                ids = torch.tensor([[*prompt.prefix, *prompt.held_back]])
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False,
                    max_new_tokens=prompt.sample.max_new_tokens,
                )  # fmt: skip
            expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            assert expected.startswith(row["prediction"]) and row["kv_bytes_final"] > row["kv_bytes_prefill_end"]


def test_a_baseline_whose_backend_is_missing_says_so(tiny, monkeypatch):
    model, tokenizer = tiny

    def missing(*_, **__):
        raise ImportError("You need to install optimum-quanto")

    monkeypatch.setattr(baselines, "QuantizedCache", missing)
    task = Niah(lengths=(200,), depths=(0,), repeats=1)
    (run,) = run_stacks(model, tokenizer, task, [Stack((Baseline("hf_quanto4"),))])
    assert run.infeasible == "hf_quanto4: You need to install optimum-quanto (pip install optimum-quanto)"
    with pytest.raises(ValueError, match="no baseline named 'hf_int3'; there are: hf_quanto2, "):
        Baseline("hf_int3")
