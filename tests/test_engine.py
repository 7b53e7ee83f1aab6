"""The engine: shared prefills change nothing, the first token feels the policy, checks and errors."""

import gc
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, cache_utils

from kvbench import CompressedCache, baselines, engine
from kvbench import answer as answering
from kvbench.answer import Prompt, Run
from kvbench.baselines import Baseline, quantized_cache
from kvbench.cache import PolicyLayer
from kvbench.corpus import document
from kvbench.engine import batches, batches_for, run_stacks
from kvbench.policies import (
    FP8,
    H2O,
    KIVI,
    Full,
    KeyDiff,
    KVzip,
    Quest,
    Random,
    SentenceKV,
    SnapKV,
    Stack,
    StreamingLLM,
)
from kvbench.prompts import prepare
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


class Broken(KeyDiff):
    """Raises the last of `errors`, if there is one."""

    def __call__(self, kv, step):
        if errors:
            raise errors[-1]
        return super().__call__(kv, step)


errors = []


def test_a_stack_that_an_error_stops_leaves_the_others_alone(tiny):
    model, tokenizer = tiny
    task = Recall(length=320, needles=2, count=3)
    stacks = [H2O(0.25), Broken(budget=64), SnapKV(0.25, window=8)]
    whole = run_stacks(model, tokenizer, task, [stacks[0], stacks[2]], batch_size=1)
    finished, told = [], []

    def finish(i, part):
        finished.append(i)
        if i == 1:
            errors.append(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))

    runs = run_stacks(
        model, tokenizer, task, stacks, batch_size=1, on_finished=finish,
        on_failed=lambda i, error: told.append((i, type(error))),
    )  # fmt: skip
    assert rows_of([runs[0], runs[2]]) == rows_of(whole)
    assert runs[1].rows == [] and runs[1].failed == "Broken(budget=64): OutOfMemoryError: CUDA out of memory."
    assert told == [(1, torch.OutOfMemoryError)] and finished == [0, 1, 2, 0, 2, 0, 2], (
        "fails once, in the second batch"
    )
    with pytest.raises(torch.OutOfMemoryError):
        run_stacks(model, tokenizer, task, stacks, batch_size=1)
    errors.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_stacks(model, tokenizer, task, stacks, batch_size=1, on_failed=lambda *_: None)
    errors.clear()


def test_what_stops_the_full_cache_stops_all_unless_it_is_memory(tiny, monkeypatch):
    model, tokenizer = tiny
    task, answer = Recall(length=320, needles=2, count=1), engine.answer
    for error, failed in ((torch.OutOfMemoryError("full"), True), (KeyError("no such field"), False)):

        def stopped(*arguments, error=error, **options):
            if not arguments[3].policy.policies:
                raise error
            return answer(*arguments, **options)

        monkeypatch.setattr(engine, "answer", stopped)
        arguments = model, tokenizer, task, [KeyDiff(budget=64), Stack(())]
        if failed:
            kept, full = run_stacks(*arguments, on_failed=lambda *_: None)
            assert len(kept.rows) == 1 and full.failed == "Full(): OutOfMemoryError: full"
        else:
            with pytest.raises(KeyError):
                run_stacks(*arguments, on_failed=lambda *_: None)


def test_what_a_failed_stack_held_is_free_when_the_next_begins(tiny, monkeypatch):
    model, tokenizer = tiny
    alive, left, answer = [], [], engine.answer

    def watched(*arguments, **options):
        cache = arguments[3]
        left.append(sum(held() is not None for held in alive))
        if len(left) == 1:
            alive.extend(weakref.ref(layer) for layer in cache.policy_layers())
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(*arguments, **options)

    monkeypatch.setattr(engine, "answer", watched)
    gc.collect()
    gc.disable()
    try:
        task = Recall(length=320, needles=2, count=1)
        run_stacks(model, tokenizer, task, [KeyDiff(budget=64), H2O(0.25)], on_failed=lambda *_: None)
    finally:
        gc.enable()
    assert len(alive) == 2 and left == [0, 0]


def test_finished_rows_of_other_prompts_are_not_taken(tiny):
    model, tokenizer = tiny
    task, parts = Recall(length=320, needles=2, count=4), []
    (whole,) = run_stacks(
        model, tokenizer, task, STACKS[1:2], batch_size=2, on_finished=lambda i, part: parts.append(part)
    )
    other = Run(rows=[{**row, "prompt_sha256": "0" * 64, "prediction": "?"} for row in parts[0].rows])
    repeated = []
    (again,) = run_stacks(
        model, tokenizer, task, STACKS[1:2], batch_size=2, finished=[[other, parts[1]]],
        on_finished=lambda i, part: repeated.append([row["sample_id"] for row in part.rows]),
    )  # fmt: skip
    assert rows_of([again]) == rows_of([whole])
    assert repeated == [[row["sample_id"] for row in parts[0].rows]]


def test_another_prefill_chunk_orders_the_sums_of_a_lone_prompt_otherwise(tiny):
    model, tokenizer = tiny
    task = Ppl(prefix=700, score_tokens=60, count=2)
    once, again, other = (
        [row["nll"] for row in run_stacks(model, tokenizer, task, [Full()], batch_size=1, prefill_chunk=chunk)[0].rows]
        for chunk in (8192, 8192, 100)
    )
    assert once == again != other and other == pytest.approx(once, abs=1e-4)


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


@pytest.mark.parametrize("query_aware", [False, True])
def test_where_the_record_waits_changes_nothing(tiny, device, query_aware):
    model, tokenizer = tiny
    model.to(device)
    task = Recall(length=320, needles=2, count=2)
    stacks = [*STACKS, KVzip(budget=0.3)]  # KVzip reads all layers at once
    usual, *others = (
        run_stacks(model, tokenizer, task, stacks, query_aware=query_aware, batch_size=2, record=where)
        for where in ("device", "cpu", "recompute")
    )
    model.to("cpu")
    for other in others:
        assert rows_of(usual) == rows_of(other)
        assert all(run.checks == {"fired": True, "bytes_ok": True} for run in other)


@pytest.mark.parametrize(("record", "held"), [("device", 1), ("cpu", 1), ("recompute", 0)])
def test_what_is_alive_while_a_stack_answers(tiny, monkeypatch, record, held):
    """The prefill if it is kept, no matter when the garbage collector runs; never the cache of the stack before."""
    model, tokenizer = tiny
    alive, answer = [], engine.answer
    count = []

    def watched(*arguments, **options):
        cache = arguments[3]
        count.append(sum(layer() is not None for layer in alive) - len(cache.layers))
        return answer(*arguments, **options)

    def layer_of(*arguments, real=PolicyLayer.__init__):
        real(*arguments)
        alive.append(weakref.ref(arguments[0]))

    monkeypatch.setattr(engine, "answer", watched)
    monkeypatch.setattr(PolicyLayer, "__init__", layer_of)
    gc.collect()
    gc.disable()
    try:
        run_stacks(model, tokenizer, Recall(length=320, needles=2, count=2), STACKS[1:4], batch_size=1, record=record)
    finally:
        gc.enable()
    assert count == [held * len(model.model.layers)] * 6
    with pytest.raises(ValueError, match="record='disk' is not one of device, cpu, recompute"):
        run_stacks(model, tokenizer, Recall(length=320, needles=2, count=2), STACKS[:1], record="disk")


def sized(*lengths, held_back=1, new=0):
    return [
        Prompt(Sample(f"{i}-{n}", "x", "", "", "", ("x",), new), [0] * (n - held_back), [0] * held_back, [])
        for i, n in enumerate(lengths)
    ]


def lengths_of(made):
    return [[len(p.prefix) + len(p.held_back) for p in batch] for batch in made]


def test_batches_hold_a_bounded_number_of_tokens():
    assert lengths_of(batches(sized(10, 500, 10, 20, 90, 10, 30), 3, 100)) == [[10, 10, 10], [20, 30], [90], [500]]
    assert lengths_of(batches(sized(10, 10, 10, 10), 16, 40)) == [[10] * 4]
    assert lengths_of(batches(sized(10, 10, 10, 10), 16, 39)) == [[10] * 3, [10]]
    assert lengths_of(batches(sized(10, 10, new=5), 16, 29)) == [[10], [10]], "answers take room, too"
    mixed = [*sized(10, 12, held_back=2), *sized(11, 13, held_back=4)]
    assert lengths_of(batches(mixed, 4, 1000, lambda p: len(p.held_back))) == [[10, 12], [11, 13]]


def test_another_batch_size_after_an_interruption_repeats_no_row(tiny):
    model, tokenizer = tiny
    task, parts = Recall(length=320, needles=2, count=4), []
    (whole,) = run_stacks(
        model, tokenizer, task, STACKS[1:2], batch_size=3, on_finished=lambda i, part: parts.append(part)
    )
    (again,) = run_stacks(model, tokenizer, task, STACKS[1:2], batch_size=4, finished=[parts[:1]])
    assert rows_of([again]) == rows_of([whole])


class Mixed:
    """Questions of very different length; every answer has eight tokens."""

    name, kind = "mixed", "generate"

    def samples(self, tokenizer):
        return [
            Sample(f"s{i}", "mixed", document(i, count=4), " why ?" * (1 + 5 * i), " so", ("x",), 8, min_new_tokens=8)
            for i in range(4)
        ]

    def score(self, sample, prediction):
        return 0.0


class Uneven(Mixed):
    """The first prompt is within a budget of 100 tokens, the others are not."""

    def samples(self, tokenizer):
        return [replace(s, context=letters * (3 if i == 0 else 20)) for i, s in enumerate(super().samples(tokenizer))]


letters = "to be. or "


def test_the_size_of_a_batch_does_not_decide_whether_a_policy_acts(tiny):
    model, tokenizer = tiny
    acting, silent = ([KeyDiff(n), Quest(n, page=8, dense_layers=0), SentenceKV(n)] for n in (100, 400))
    for size in (1, 4):
        runs = run_stacks(model, tokenizer, Uneven(), [*acting, *silent], batch_size=size)
        assert [run.checks["fired"] for run in runs] == [True] * len(acting) + [False] * len(silent)
        assert all(run.checks["bytes_ok"] for run in runs)


def test_parts_of_a_run_are_joined():
    run = Run()
    run.add(
        Run([{"sample_id": "a"}, {"sample_id": "b"}], {"fired": False, "bytes_ok": False}, seconds=1, fallbacks=["y"])
    )
    run.add(Run([{"sample_id": "b", "again": 1}], {"fired": True, "bytes_ok": True}, seconds=2, fallbacks=["y", "x"]))
    assert run.rows == [{"sample_id": "a"}, {"sample_id": "b", "again": 1}]
    assert run.checks == {"fired": True, "bytes_ok": False}
    assert run.seconds == 3 and run.fallbacks == ["x", "y"] and not run.ended
    run.add(Run([{"sample_id": "c"}], {"fired": False, "bytes_ok": True}))
    assert run.checks == {"fired": True, "bytes_ok": False}
    run.add(Run(infeasible="no room"))
    assert run.rows == [] and run.infeasible == "no room"


@pytest.mark.parametrize("record", ["device", "recompute"])
def test_rows_share_the_seconds_of_their_batch(tiny, monkeypatch, record):
    """A clock that only work moves: 32 s a prefill, 8 s a compression, 1 s a step, of which Mixed takes 8."""
    model, tokenizer = tiny
    clock = SimpleNamespace(now=0.0)

    def taking(seconds, work):
        def timed(*arguments, **options):
            clock.now += seconds
            return work(*arguments, **options)

        return timed

    monkeypatch.setattr(engine, "_now", lambda model: clock.now)
    monkeypatch.setattr(answering, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(engine, "forward", taking(32, engine.forward))
    monkeypatch.setattr(CompressedCache, "fork", taking(8, CompressedCache.fork))
    monkeypatch.setattr(answering, "forward", taking(1, answering.forward))
    stacks = [Full(), KeyDiff(budget=64), StreamingLLM(0.5, block=64)]
    if hasattr(cache_utils, "Fp8QuantizedLayer"):
        stacks.append(Stack((Baseline("hf_fp8"),)))  # each row prefills and answers alone
    runs = run_stacks(model, tokenizer, Mixed(), stacks, batch_size=4, record=record)
    shared = (32 + 8) / 4, 8 / 4
    expected = [shared, shared, (32 / 4, 8 / 4), (32, 8)]
    for run, seconds in zip(runs, expected, strict=False):
        assert {(row["prefill_s"], row["decode_s"]) for row in run.rows} == {seconds}
    assert [run.seconds for run in runs] == [8 + 8, 8 + 8, 32 + 8, 4 * 8][: len(runs)]


def test_rows_of_a_batch_answer_as_alone_with_sliding_windows(tiny, monkeypatch):
    _, tokenizer = tiny
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, layer_types=["sliding_attention", "full_attention"], sliding_window=16,
        initializer_range=0.4, query_pre_attn_scalar=32, tie_word_embeddings=False, max_position_embeddings=4096,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    stacks = [Full(), SnapKV(0.5, window=8)]
    alone, together = (run_stacks(model, tokenizer, Mixed(), stacks, batch_size=size) for size in (1, 4))
    assert rows_of(alone) == rows_of(together)
    assert len({row["prediction"] for row in alone[0].rows}) > 2
    monkeypatch.setattr(engine, "batches_for", lambda model, task, *arguments: batches(*arguments))
    assert rows_of(run_stacks(model, tokenizer, Mixed(), stacks, batch_size=4)) != rows_of(alone), "pads count"
    prompts = prepare(Mixed(), tokenizer, False, None)
    assert len(batches_for(model, Mixed(), prompts, 4, 10**6)) == 4
    assert len(batches_for(tiny[0], Mixed(), prompts, 4, 10**6)) == 1, "models without windows batch them all"


def test_rows_say_how_much_of_the_needle_is_kept(tiny):
    model, tokenizer = tiny
    task = Niah(lengths=(300,), depths=(0, 50, 100), repeats=1)
    full, newest = run_stacks(model, tokenizer, task, [Full(), StreamingLLM(budget=100, sinks=0)], batch_size=3)
    assert all(row["needle_kept"] == [[1.0] * 2] * 2 for row in full.rows)
    for sample, row in zip(task.samples(tokenizer), newest.rows, strict=True):
        begin, end = sample.meta["needle_span"]  # a token is a byte, and one BOS stands before them
        first_kept = 1 + len(sample.context.encode()) - 100
        share = round((end - max(begin, first_kept - 1)) / (end - begin), 2) if end + 1 > first_kept else 0.0
        assert row["needle_kept"] == [[pytest.approx(share, abs=0.011)] * 2] * 2
    assert [row["needle_kept"][0][0] for row in newest.rows][::2] == [0.0, 1.0]
    (plain,) = run_stacks(model, tokenizer, Mixed(), [Full()])
    assert all(row["needle_kept"] is None for row in plain.rows)


def test_truncated_answers_and_details_are_in_the_row(tiny):
    model, tokenizer = tiny

    class Told(Mixed):
        def details(self, sample, prediction):
            return {"letters": len(prediction)}

    (run,) = run_stacks(model, tokenizer, Told(), [Full()])
    assert all(row["n_generated"] == 8 and row["truncated"] for row in run.rows)
    assert all(row["details"]["letters"] == len(row["prediction"]) for row in run.rows)
    (plain,) = run_stacks(model, tokenizer, Mixed(), [Full()])
    assert all("details" not in row for row in plain.rows)


def held(record):
    """Bytes of all tensors that a record keeps alive, the model's weights aside, by device."""
    found, seen, todo = {}, set(), [record]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, type | torch.nn.Module):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.device.type, thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, list | tuple):
            todo += thing
        else:
            todo += vars(thing).values() if hasattr(thing, "__dict__") else []
            todo += [getattr(thing, name, None) for name in getattr(thing, "__slots__", ())]
    return {kind: sum(n for where, n in found.values() if where == kind) for kind, _ in found.values()}


@pytest.mark.parametrize("where", [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("record", ["device", "cpu", "recompute"])
@pytest.mark.parametrize("signal", [False, True])
def test_the_record_of_a_prompt_takes_the_documented_bytes(tiny, monkeypatch, where, record, signal):
    """2 x layers x heads x head size x bytes per number for every token, 4 bytes per layer, head and token for
    accumulated attention, and little besides; on the device only if it is to wait there."""
    model, tokenizer = tiny
    model.to(where)
    kept, sizes, answer, keep = [], [], engine.answer, engine._Prefill._keep

    def watched(*arguments, **options):
        sizes.append(held(kept[-1]) if kept else {})
        return answer(*arguments, **options)

    monkeypatch.setattr(engine, "answer", watched)
    monkeypatch.setattr(engine._Prefill, "_keep", lambda self, *given: (kept.append(given[1]), keep(self, *given)))
    task = Recall(length=640, needles=2, count=1)
    stacks = [H2O(budget=0.25) if signal else KeyDiff(budget=64), StreamingLLM(budget=64)]
    (row, _) = (run.rows[0] for run in run_stacks(model, tokenizer, task, stacks, record=record))
    model.to("cpu")
    tokens = row["kv_bytes_full"] // 512
    keys_and_values, attention = tokens * 2 * 2 * 2 * 32 * 4, tokens * 2 * 2 * 4 * signal
    for size in sizes:
        if record == "recompute":
            assert size == {}
        else:
            assert keys_and_values + attention <= sum(size.values()) <= keys_and_values + attention + 256
            assert size.get("cuda", 0) == 0 or record == "device" or size["cuda"] <= attention + 256
    assert len(sizes) == 2
