"""Long answers: prompts and grading as lm-evaluation-harness has them, sampling, eviction while decoding, traces."""

import copy
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvbench import CompressedCache
from kvbench.answer import Prefilled, _Writer, answer, forward, left_pad, repetition
from kvbench.engine import run_stacks
from kvbench.policies import H2O, KIVI, RKV, Full, KeyDiff, Stack, StreamingLLM
from kvbench.prompts import prepare
from kvbench.tasks import Gsm8k, Math, Recite
from kvbench.tasks.sample import Sample

pytest.importorskip("wonderwords", reason="the word list comes with kvbench[bench]")
pytest.importorskip("lm_eval", reason="prompts and grading are read from lm-eval")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no GSM8K in {DATA}")


@pytest.fixture
def problems(tmp_path):
    """A folder with hand-made problems."""
    rows = [
        {"question": f"What is {i} + {i}?", "answer": f"It is {i} + {i} = {2 * i}.\n#### {2 * i:,}"} for i in range(9)
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return os.fspath(tmp_path)


def test_gsm8k_prompt(tiny, problems):
    _, tokenizer = tiny
    samples = Gsm8k(path=problems, shots=2, count=3).samples(tokenizer)
    assert samples[2].prompt == (
        "Question: What is 0 + 0?\nAnswer: It is 0 + 0 = 0.\n#### 0\n\n"
        "Question: What is 1 + 1?\nAnswer: It is 1 + 1 = 2.\n#### 2\n\n"
        "Question: What is 2 + 2?\nAnswer:"
    )
    assert len({s.context for s in samples}) == 1 and samples[2].answer_prefix == "Answer:"
    assert "Question:" in samples[2].stop and samples[2].references == ("4",)
    bare = Gsm8k(path=problems, shots=0, count=1).samples(tokenizer)[0]
    assert bare.prompt == "Question: What is 0 + 0?\nAnswer:" and bare.context
    chain = Gsm8k(variant="gsm8k_cot", path=problems, shots=8, count=1).samples(tokenizer)[0]
    assert chain.context.count("Q: ") == chain.context.count("\nA: ") == 8 and chain.query == "Q: What is 0 + 0?\n"
    assert chain.context.count("The answer is") == 8 and chain.stop[0] == "Q:"


@pytest.mark.parametrize(
    ("said", "flexible", "strict"),
    [
        (" 1000 + 234 = 1,234.\n#### 1,234", 1, 1),
        (" so it is 1,234.", 1, 0),
        (" so it is $1,234", 1, 0),
        (" #### 1234\nand 5 more", 0, 1),
        (" #### 1234.", 1, 1),
        (" 1,235", 0, 0),
        (" none", 0, 0),
        ("", 0, 0),
    ],
)
def test_gsm8k_extraction(said, flexible, strict):
    sample = Sample("id", "gsm8k", "", "", "", ("1234",), 8)
    assert Gsm8k().score(sample, said) == flexible and Gsm8k().details(sample, said) == {"strict": strict}


def test_gsm8k_grading_is_that_of_lm_eval():
    """On odd texts: the same filters and the same metric, called in the package itself."""
    pytest.importorskip("evaluate")
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    from kvbench.tasks.long_decode import _lm_eval_settings

    for variant in ("gsm8k", "gsm8k_cot"):
        settings = _lm_eval_settings(f"gsm8k/{variant.replace('_', '-')}.yaml")
        options = {k: settings["metric_list"][0][k] for k in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
        texts = [
            "$3.50",
            "The answer is 18.",
            "#### 18",
            "#### -18.",
            "18.0",
            "a 1 b -18",
            "18 %",
            "1 8",
            "(18)",
            "#### $18",
        ]
        for text in texts:
            for gold in ("18", "-18", "3.50"):
                sample, task = Sample("id", variant, "", "", "", (gold,), 8), Gsm8k(variant=variant)
                ours = {
                    "flexible-extract": task.score(sample, text),
                    "strict-match": task.details(sample, text)["strict"],
                }
                for rule in settings["filter_list"]:
                    first = dict(rule["filter"][0])
                    first.pop("function")
                    kept = RegexFilter(**first).apply([[text]], [{}])
                    (kept,) = list(kept)
                    theirs = exact_match_hf_evaluate([kept[0]], [f"x\n#### {gold}"], **options)["exact_match"]
                    assert ours[rule["name"]] == theirs, (text, gold, rule["name"])


@needs_data
def test_gsm8k_data(tiny):
    _, tokenizer = tiny
    samples = Gsm8k(path=os.fspath(DATA), shots=5).samples(tokenizer)
    assert len(samples) == 100 and samples[0].references == ("18",) and samples[2].references == ("70000",)
    assert all(float(s.references[0]) == float(s.references[0]) for s in samples)
    golds = [json.loads(line)["answer"] for line in (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    task = Gsm8k()
    for sample, gold in zip(samples, golds, strict=True):
        assert task.score(sample, " " + gold) == 1 and task.details(sample, " " + gold) == {"strict": 1}
    assert sum(task.score(s, " " + golds[i - 1]) for i, s in enumerate(samples)) < 20


@pytest.mark.parametrize(
    ("said", "right", "score"),
    [
        (r"so $x = \boxed{\dfrac{1}{2}}$.", r"\frac{1}{2}", 1),
        (r"\boxed{3} or rather \boxed{4}", "4", 1),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"\left( 3, \frac{\pi}{2} \right)", 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{{1}", "1", 0),
        ("it is $k = 7$ then", "7", 1),
        ("7", "7", 1),
        ("it is 7", "7", 0),
        ("", "7", 0),
    ],
)
def test_boxed_answers(said, right, score):
    assert Math().score(Sample("id", "math500", "", "", "", (right,), 8), said) == score


def test_draws_of_a_problem_are_samples_of_one_cluster(tiny, tmp_path):
    model, tokenizer = tiny
    rows = [{"Problem": f"What is {i} squared?", "Answer": i * i} for i in range(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = Math("aime24", max_new_tokens=12, temperature=0.9, top_p=0.95, draws=3, path=os.fspath(tmp_path), trace=4)
    samples = task.samples(tokenizer)
    assert (
        len(samples) == 9
        and len({s.sample_id for s in samples}) == 9
        and len({s.meta["cluster"] for s in samples}) == 3
    )
    assert samples[4].prompt == "Question: What is 1 squared?\nAnswer:" and samples[4].references == ("1",)
    (asked,) = replace(task, draws=1, count=1, instruction=" Think.").samples(tokenizer)
    assert asked.prompt == "Question: What is 0 squared? Think.\nAnswer:"
    first, again = (run_stacks(model, tokenizer, task, [Full()], batch_size=size)[0].rows for size in (9, 2))
    assert [r["prediction"] for r in first] == [r["prediction"] for r in again], "dice do not depend on the batch"
    assert len({r["prediction"] for r in first[:3]}) > 1, "draws differ"
    (other,) = run_stacks(model, tokenizer, replace(task, seed=1), [Full()])
    assert [r["prediction"] for r in other.rows] != [r["prediction"] for r in first]
    with pytest.raises(ValueError, match="draws=4 are all alike at temperature=0"):
        Math(draws=4)
    with pytest.raises(ValueError, match="problems='aime26' is not one of math500, aime24, aime25"):
        Math("aime26")
    with pytest.raises(ValueError, match="top_p=0: must be a number, 0.01 to 1"):
        Math(top_p=0)


def _written(task, sample, tokenizer, text):
    """What is taken down of a text that a model would write."""
    writer = _Writer(task, sample, tokenizer, set())
    for token in tokenizer.encode(text, add_special_tokens=False):
        if writer.take(token):
            break
    return writer.text


def test_in_a_chat_only_the_end_of_the_reply_ends_an_answer(tiny, problems, tmp_path):
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    sums = tmp_path / "sums"
    sums.mkdir()
    (sums / "test.jsonl").write_text(json.dumps({"problem": "What is 1+1?", "answer": "2"}))
    thought = " Again. Problem: 1+1.\n\nQuestion: how? It is \\boxed{2}"
    for name in ("math500", "aime25"):
        task = Math(name, path=os.fspath(sums))
        (sample,) = task.samples(tokenizer)
        assert sample.chat and sample.stop == () and task.score(sample, _written(task, sample, tokenizer, thought)) == 1
    base = Math(path=os.fspath(sums), chat="never")
    (sample,) = base.samples(tokenizer)
    assert "Problem:" in sample.stop and _written(base, sample, tokenizer, thought) == " Again. "
    task = Gsm8k(path=problems, shots=0, count=1, chat="always")
    (sample,) = task.samples(tokenizer)
    reply = "Question: what is asked? 0 + 0.\n\nThe answer is 0"
    assert sample.stop == () and task.score(sample, _written(task, sample, tokenizer, reply)) == 1


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_examples_and_problems_come_in_the_same_kinds_of_files(tiny, problems, tmp_path, kind):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    expected = Gsm8k(path=problems, shots=2, count=2).samples(tiny[1])
    (tmp_path / kind).mkdir()
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (Path(problems) / f"{split}.jsonl").read_text().splitlines()]
        file = tmp_path / kind / f"{split}.{kind}"
        if kind == "parquet":
            parquet.write_table(arrow.Table.from_pylist(rows), file)
        else:
            file.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows))
    assert Gsm8k(path=os.fspath(tmp_path / kind), shots=2, count=2).samples(tiny[1]) == expected


def test_missing_problems_say_what_to_do(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KVBENCH_DATA", os.fspath(tmp_path))
    for task in (Math("aime25", source="file"), Gsm8k(source="file", shots=0)):
        with pytest.raises(
            ValueError, match="datasets/(math-ai/aime25|openai/gsm8k)/resolve/.*/test.*test.(jsonl|parquet),"
        ):
            task.samples(tiny[1])


class Dice:
    """A task that samples."""

    seed, temperature, top_p = 0, 1.0, 1.0

    def __init__(self, **fields):
        vars(self).update(fields)


def drawn(tokenizer, logits, task, times=4000):
    counts = torch.zeros(len(logits))
    writer = _Writer(task, Sample("s", "x", "", "", "", (), 8), tokenizer, set())
    for _ in range(times):
        counts[writer.choose(logits)] += 1
    return counts / times


def test_sampling_follows_temperature_and_nucleus(tiny):
    _, tokenizer = tiny
    likely = torch.tensor([0.1, 0.45, 0.05, 0.4])
    torch.testing.assert_close(drawn(tokenizer, likely.log(), Dice()), likely, atol=0.03, rtol=0)
    sharp = (likely.log() / 0.5).softmax(0)
    torch.testing.assert_close(drawn(tokenizer, likely.log(), Dice(temperature=0.5)), sharp, atol=0.03, rtol=0)
    cut = torch.tensor([0, 0.45, 0, 0.4]) / 0.85  # 0.45 + 0.4 is the smallest set with at least 0.6
    torch.testing.assert_close(drawn(tokenizer, likely.log(), Dice(top_p=0.6)), cut, atol=0.03, rtol=0)
    assert drawn(tokenizer, likely.log(), Dice(top_p=0.01), 50)[1] == 1
    assert drawn(tokenizer, likely.log(), Dice(temperature=0.0), 50)[1] == 1


def test_nothing_ends_before_min_new_tokens(tiny):
    _, tokenizer = tiny
    given = Sample("s", "x", "", "", "", (), 8, stop=("\n",), min_new_tokens=2)
    writer = _Writer(Dice(temperature=0.0), given, tokenizer, {1})
    newline, a, b = (tokenizer.encode(x, add_special_tokens=False)[0] for x in ("\n", "a", "b"))
    logits = torch.zeros(258)
    logits[[newline, 1, a, b]] = torch.tensor([9.0, 8, 7, 6])
    assert writer.choose(logits) == a and not writer.take(a)
    assert writer.choose(logits) == a and not writer.take(b)
    assert writer.choose(logits) == newline and writer.take(newline)
    assert writer.text == "ab" and not writer.truncated and not writer.unfed


def test_a_stop_of_many_tokens_is_found_late_in_a_long_answer(tiny):
    _, tokenizer = tiny
    given = Sample("s", "x", "", "", "", (), 900, stop=("Question:", "zz"))
    writer = _Writer(Dice(temperature=0.0), given, tokenizer, {1})
    ids = tokenizer.encode("é" * 200 + "Question:", add_special_tokens=False)
    done = [writer.take(token) for token in ids]
    assert done.index(True) == len(ids) - 1 and writer.text == "é" * 200


def test_repetition():
    assert repetition([1, 2, 3]) == repetition([]) == 0
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([1] * 7) == pytest.approx(3 / 4)
    assert repetition([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)


def test_budgets_act_while_decoding(tiny):
    """Prompts are below the budget; bytes grow to it and stay there, however the batch is cut."""
    model, tokenizer = tiny
    task = Recite(period=16, rounds=1, count=3, trace=16)
    per_slot = 2 * 2 * 2 * 32 * 4 + 2 * 2 * 4  # keys and values, layers, heads, head_dim, float32; positions
    stacks = [Full(), KeyDiff(budget=170), H2O(budget=170) | KIVI(bits=4, residual=32), KeyDiff(budget=600)]
    full, cut, packed, never = run_stacks(model, tokenizer, task, stacks, batch_size=3)
    assert cut.checks["fired"] and cut.checks["bytes_ok"] and packed.checks["fired"] and not never.checks["fired"]
    for row, free in zip(cut.rows, full.rows, strict=True):
        trace = row["details"]["kv_bytes_trace"]
        tokens = [row["n_prompt_tokens"] + 16 * i for i in range(len(trace))]
        assert row["n_prompt_tokens"] < 170 < tokens[-1]
        assert trace == [n * (per_slot - 16) if n <= 170 else 170 * per_slot for n in tokens]
        assert row["kv_bytes_peak"] == 170 * per_slot >= row["details"]["kv_bytes_mean"] > row["kv_bytes_prefill_end"]
        assert free["kv_bytes_peak"] == free["kv_bytes_final"] > row["kv_bytes_peak"]
        assert len(trace) == math.ceil(row["n_generated"] / 16)
    for one, other in zip((cut, packed), run_stacks(model, tokenizer, task, stacks[1:3], batch_size=1), strict=True):
        assert [r["prediction"] for r in one.rows] == [r["prediction"] for r in other.rows]
        assert [r["details"]["repetition"] for r in one.rows] == [r["details"]["repetition"] for r in other.rows]


def test_bytes_are_looked_at_after_every_step(tiny):
    """The window of a quantizer and the turns of an evictor fill and empty between the steps of a trace."""
    model, tokenizer = tiny
    stacks = [KIVI(bits=4, residual=32), RKV(budget=64, window=8, interval=24)]
    each, sparse = (
        run_stacks(model, tokenizer, Recite(period=16, rounds=1, count=1, trace=every), stacks) for every in (1, 32)
    )
    for one, other in zip(each, sparse, strict=True):
        (row,), (again,) = one.rows, other.rows
        steps, trace = row["details"]["kv_bytes_trace"], again["details"]["kv_bytes_trace"]
        assert len(steps) == row["n_generated"] and steps[-1] == row["kv_bytes_final"] and trace == steps[::32]
        assert row["kv_bytes_peak"] == again["kv_bytes_peak"] == max(row["kv_bytes_prefill_end"], *steps) > max(trace)
        mean = sum(steps) / len(steps)
        assert row["details"]["kv_bytes_mean"] == again["details"]["kv_bytes_mean"] == mean


def test_what_is_held_before_the_answer_counts_for_the_peak(tiny):
    model, tokenizer = tiny
    (prompt,) = prepare(Recite(period=16, rounds=1, count=1), tokenizer, False, None)
    ids, mask = left_pad([prompt.prefix], model.device)
    for most in (1, 10**9):
        cache = CompressedCache(model, Full())
        with torch.inference_mode():
            forward(model, cache, ids, mask, 1)
            prefilled = Prefilled([most], [most], [1.0], 0.0, 0.0)
            (row,) = answer(model, tokenizer, Recite(), cache, mask, [prompt], prefilled).rows
        assert row["kv_bytes_peak"] == max(most, row["kv_bytes_final"])


def test_gsm8k_runs_end_to_end(tiny, problems):
    model, tokenizer = tiny
    task = Gsm8k(path=problems, shots=2, count=3, max_new_tokens=40, trace=8)
    (run,) = run_stacks(model, tokenizer, task, [StreamingLLM(budget=64)])
    for row in run.rows:
        assert row["truncated"] is (row["n_generated"] == 40) and {"strict", "repetition", "kv_bytes_trace"} <= set(
            row["details"]
        )


def test_the_shipped_model_recites_what_its_cache_still_holds():
    from kvbench.sweep import load_model

    model, tokenizer = load_model("proving", "proving", "float32")
    task = Recite(period=64, rounds=1, count=3)
    stacks = [Full(), StreamingLLM(budget=100), StreamingLLM(budget=48), Stack((KIVI(bits=4, residual=32),))]
    full, wide, narrow, packed = run_stacks(model, tokenizer, task, stacks)
    mean = lambda run: sum(r["score"] for r in run.rows) / len(run.rows)  # noqa: E731
    assert mean(full) == mean(wide) == 1 and mean(packed) > 0.9 and mean(narrow) < 0.7
    (sample,) = replace(task, count=1).samples(tokenizer)
    words = sample.references[0].split()
    assert len(words) == 64 and task.score(sample, " ".join([*words[:16], "x", *words[17:]])) == 0.25
    assert task.details(sample, " ".join([*words[:16], "x", *words[17:]])) == {"right": 63 / 64}
