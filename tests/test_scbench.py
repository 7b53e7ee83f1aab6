"""SCBench: contexts with turns, metrics by hand, and what happens without the data."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kvbench.engine import run_stacks
from kvbench.policies import Full, KeyDiff
from kvbench.tasks import SCBench
from kvbench.tasks.sample import Sample
from kvbench.tasks.scbench import TASKS

QMSUM = Path(__file__).resolve().parents[2] / "shared" / "data" / "longbench" / "qmsum.jsonl"


def write(folder, task, rows):
    (folder / f"scbench_{task}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return os.fspath(folder)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few new tokens: the model of these tests only knows letters."""
    for task, (new_tokens, metric) in TASKS.items():
        monkeypatch.setitem(TASKS, task, (min(new_tokens, 12), metric))


@pytest.fixture
def pairs(tmp_path):
    """Two contexts of key-value pairs, with three questions and one."""
    rows = [
        {"id": 7, "context": '{"a": "11", "b": "22", "c": "33"}', "multi_turns": [
            {"input": f"Key: {key}", "answer": value} for key, value in (("b", "22"), ("a", "11"), ("c", "33"))]},
        {"id": 8, "context": '{"x": "99"}' * 4, "multi_turns": [{"input": "Key: x", "answer": "99"}]},
    ]  # fmt: skip
    return write(tmp_path, "kv", rows)


def test_turns_of_a_context(tiny, pairs):
    _, tokenizer = tiny
    first, second = SCBench(path=pairs, before="Look up.\n\n").samples(tokenizer)
    assert first.prompt == 'Look up.\n\n{"a": "11", "b": "22", "c": "33"}\n\nKey: b' and first.references == ("22",)
    assert [(t.query, t.references, t.max_new_tokens) for t in first.turns] == [
        ("\n\nKey: a", ("11",), 12), ("\n\nKey: c", ("33",), 12),
    ]  # fmt: skip
    assert second.turns == () and (first.sample_id, second.sample_id) == ("scbench_kv-00000-3t", "scbench_kv-00001-1t")
    (asked,) = SCBench(path=pairs, count=1, turns=2, ask="Q {input} A").samples(tokenizer)
    assert asked.query == "\n\nQ Key: b A" and len(asked.turns) == 1
    (cut,) = SCBench(path=pairs, count=1, limit=30).samples(tokenizer)
    assert cut.context.startswith('{"a"') and cut.query == "\n\nKey: b" and cut.turns == first.turns
    assert cut.meta["truncated_tokens"] > 0 == first.meta["truncated_tokens"]


def test_runs_and_scores_by_turn(tiny, pairs):
    model, tokenizer = tiny
    for history in ("gold", "own", "none"):
        task = SCBench(path=pairs, history=history)
        runs = run_stacks(model, tokenizer, task, [Full(), KeyDiff(budget=16)], batch_size=2)
        assert [len(r["details"]["turn_scores"]) for r in runs[1].rows] == [3, 1] and runs[1].checks["fired"]


@pytest.mark.parametrize(
    ("task", "said", "answer", "score"),
    [
        ("kv", 'it is "22".', "22", 1),
        ("kv", "2 2", "22", 0),
        ("prefix_suffix", "abcde", "bcd", 1),
        ("vt", "ABC and xyz", "ABC XYZ QQQ", 0.67),
        ("many_shot", "it is BLUE", ("red", "blue"), 1),
        ("qa_eng", "green", ("red", "blue"), 0),
        ("qa_chn", "他在北京。", ("北京",), 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("qa_chn", "", ("北京",), 0),
    ],
)
def test_metrics(task, said, answer, score):
    references = answer if isinstance(answer, tuple) else (answer,)
    assert SCBench(task).score(Sample("s", task, "", "", "", references, 8), said) == pytest.approx(score)


def test_summary_metric():
    pytest.importorskip("rouge_score")
    given = Sample("s", "summary", "", "", "", ("the cat sat\nit slept",), 8)
    assert SCBench("summary").score(given, "the cat sat\nit slept") == 1
    assert SCBench("summary").score(given, "the cat sat") == pytest.approx(2 * 1 * 0.6 / 1.6)


def test_variables_are_told_in_the_history_with_blanks_between(tiny, tmp_path):
    rows = [{"context": "x", "multi_turns": [{"input": "?", "answer": ["AAA", "BBB"]}]}]
    (sample,) = SCBench("vt", path=write(tmp_path, "vt", rows)).samples(tiny[1])
    assert sample.references == ("AAA BBB",)


def test_refusals(tiny, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="task='repoqa' is not one of kv, prefix_suffix, vt, "):
        SCBench("repoqa")
    with pytest.raises(ValueError, match="has no {input}"):
        SCBench(ask="Q")
    monkeypatch.setenv("KVBENCH_DATA", os.fspath(tmp_path))
    with pytest.raises(ValueError, match="https://huggingface.co/datasets/microsoft/SCBench.*scbench_vt.jsonl"):
        SCBench("vt", source="file").samples(tiny[1])


@pytest.mark.skipif(not QMSUM.is_file(), reason=f"no meetings in {QMSUM}")
def test_meetings_with_several_queries(tiny, tmp_path):
    """Real contexts that share questions, in SCBench's format."""
    contexts: dict[str, list] = {}
    for line in QMSUM.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        contexts.setdefault(row["context"][-900:], []).append({"input": row["input"], "answer": row["answers"]})
    rows = [{"context": context, "multi_turns": turns} for context, turns in contexts.items()]
    task = SCBench("qa_eng", path=write(tmp_path, "qa_eng", rows))
    samples = task.samples(tiny[1])
    assert sorted(1 + len(s.turns) for s in samples) == [1, 1, 1, 2, 2, 3]
    longest = max(samples, key=lambda s: len(s.turns))
    assert replace(task, turns=1).samples(tiny[1])[samples.index(longest)].context == longest.context
