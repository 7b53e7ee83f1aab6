"""Tasks: the same prompt whatever else is drawn, needles where they are said to be, nothing longer than asked."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from kvbench import tasks
from kvbench.tasks import Niah, Ppl, Recall, Sample
from kvbench.tasks.sample import bos, check, encode, exact_value, largest, place, values_found

pytest.importorskip("wonderwords", reason="the word list comes with kvbench[bench]")

ASSET = Path(__file__).resolve().parents[1] / "kvbench" / "assets" / "proving"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ASSET)


def tokens(tokenizer, sample):
    answer = encode(tokenizer, " " + sample.references[0])
    return sum(map(len, sample.segments(tokenizer))) + len(answer)


def test_samples_do_not_depend_on_what_else_is_drawn(tokenizer):
    few, many = Recall(length=256, count=2), Recall(length=256, count=6)
    assert few.samples(tokenizer) == many.samples(tokenizer)[:2] == few.samples(tokenizer)
    grid = {s.sample_id: s for s in Niah(lengths=(256, 384), depths=(0, 50, 100), repeats=2).samples(tokenizer)}
    alone = Niah(lengths=(384,), depths=(50,), repeats=1).samples(tokenizer)
    assert [grid[s.sample_id] for s in alone] == alone
    assert Ppl(64, 32, count=1).samples(tokenizer) == Ppl(64, 32, count=3).samples(tokenizer)[:1]


def test_samples_differ_between_indices_seeds_and_names(tokenizer):
    base = Recall(length=256, count=4)
    prompts = [
        s.prompt for task in (base, replace(base, seed=1), replace(base, name="x")) for s in task.samples(tokenizer)
    ]
    assert len(set(prompts)) == 12
    grid = Niah(lengths=(256,), depths=(0, 50), repeats=3).samples(tokenizer)
    assert len({s.references for s in grid}) == len({s.sample_id for s in grid}) == 6


@pytest.mark.parametrize("hard", [0, 1], ids=["plain", "hard"])
@pytest.mark.parametrize("needles", [1, 8, 32])
def test_recall_notes_each_key_once_and_asks_for_one(tokenizer, needles, hard):
    for sample in Recall(length=768, needles=needles, hard=hard, count=4).samples(tokenizer):
        notes = re.findall(r"note : code for (\w+ \w+) ((?:\d\d ?){3})", sample.context)
        keys = [key for key, _ in notes]
        assert len(keys) == len(set(keys)) == needles
        assert all(sample.context.count(key) == 1 for key in keys), "filler must not mention a key"
        assert sample.references == (dict(notes)[sample.meta["key"]].strip(),)
        assert sample.query + sample.answer_prefix == (
            f"\nquestion : which code for {sample.meta['key']} ?\nanswer : code for {sample.meta['key']}"
        )
        assert sample.meta["hard"] == bool(hard)
        if needles > 1:
            shared = len({word for key in keys for word in key.split()}) < 2 * needles
            assert shared == bool(hard)


def test_needle_stands_once_where_it_is_recorded(tokenizer):
    task = Niah(lengths=(512,), depths=(0, 33, 66, 100), repeats=2)
    for sample in [*task.samples(tokenizer), *Recall(length=512, count=4).samples(tokenizer)]:
        begin, end = sample.meta["needle_span"]
        assert sample.context[begin:end] == sample.meta["needle"]
        assert sample.context.count(sample.meta["needle"]) == 1
        rest = len(encode(tokenizer, sample.context)) - len(encode(tokenizer, sample.meta["needle"]))
        measured = 100 * len(encode(tokenizer, sample.context[:begin])) / rest
        assert measured == pytest.approx(sample.meta["measured_depth"], abs=1)
        assert measured == pytest.approx(sample.meta["depth"], abs=4)
    first, last = task.samples(tokenizer)[0], task.samples(tokenizer)[-1]
    assert first.meta["needle_span"][0] == 0
    assert last.meta["needle_span"][1] == len(last.context)


@pytest.mark.parametrize("length", [200, 511, 1024])
def test_prompts_fill_their_length_and_never_exceed_it(tokenizer, length):
    for sample in [
        *Recall(length=length, count=3).samples(tokenizer),
        *Niah(lengths=(length,), depths=(0, 50, 100), repeats=1).samples(tokenizer),
    ]:
        used = tokens(tokenizer, sample)
        assert used == sample.meta["tokens"] and sample.meta["fill"] == used / length
        assert length - 20 < used <= length, "another sentence would have fitted"


def test_segments_are_the_prompt(tokenizer):
    (sample,) = Recall(length=256, count=1).samples(tokenizer)
    segments = sample.segments(tokenizer)
    assert sum(segments, []) == tokenizer(sample.prompt).input_ids, "cutting into segments changes no token"
    assert sum(segments, []).count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(sum(segments, []), skip_special_tokens=True) == sample.prompt


def test_too_short_a_length_names_the_smallest(tokenizer):
    with pytest.raises(ValueError, match=r"length=60: recall with 8 needles takes at least \d+ tokens") as error:
        Recall(length=60).samples(tokenizer)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    with pytest.raises(ValueError, match="takes at least"):
        Recall(length=least - 1, count=1).samples(tokenizer)


def test_ppl_splits_one_document(tokenizer):
    for sample in Ppl(prefix=200, score_tokens=50, count=3).samples(tokenizer):
        (continuation,) = sample.references
        assert len(bos(tokenizer)) + len(encode(tokenizer, sample.context)) == sample.meta["prefix_tokens"] == 200
        assert len(encode(tokenizer, continuation)) == sample.meta["score_tokens"] == 50
        whole = encode(tokenizer, sample.context + continuation)
        assert whole == encode(tokenizer, sample.context) + encode(tokenizer, continuation)
    with pytest.raises(TypeError, match="likelihood"):
        Ppl().score(sample, "text")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: Recall(needles=0), "needles=0: must be a number, 1 to 64"),
        (lambda: Recall(needles=65), "needles=65: must be a number, 1 to 64"),
        (lambda: Recall(length=0), "length=0: must be a number, at least 1"),
        (lambda: Recall(hard=1.5), "hard=1.5: must be a number, 0 to 1"),
        (lambda: Recall(seed=-1), "seed=-1: must be a number, at least 0"),
        (lambda: Recall(count="3"), "count='3': must be a number, at least 1"),
        (lambda: Niah(depths=(101,)), "depths=101: must be a number, 0 to 100"),
        (lambda: Niah(lengths=()), "lengths is empty: give at least one"),
        (lambda: Niah(repeats=0), "repeats=0: must be a number, 1 to 10000"),
        (lambda: Niah(needles=0), "needles=0: must be a number, 1 to 100"),
        (lambda: Niah(value="name"), "value='name' is not one of code, passkey, number, word, uuid"),
        (lambda: Niah(haystack="hay"), "haystack='hay' is not one of generated, essays"),
        (lambda: Ppl(prefix=1), "prefix=1: must be a number, at least 2"),
        (lambda: Ppl(score_tokens=0), "score_tokens=0: must be a number, at least 1"),
    ],
)
def test_bad_fields_are_refused_in_one_line(make, line):
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        make()


def test_check_takes_the_bounds_themselves():
    check("x", 0, 0, 1)
    check("x", 1, 0, 1)
    with pytest.raises(ValueError, match="x=True"):
        check("x", True, 0, 1)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (" 47 82 19", 1.0),
        ("\n47  82 19 .\nquestion", 1.0),
        (" 47 82 19. The", 1.0),
        (" 47 82 190", 0.0),
        (" 47 82", 0.0),
        (" 82 19 47", 0.0),
        (" code 47 82 19", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_whole_value_at_the_start_counts(prediction, score):
    assert exact_value(prediction, ("47 82 19",)) == score
    assert values_found(prediction, ("47 82 19",)) == float(score or prediction == " code 47 82 19")
    sample = Sample("id", "recall", "", "", "", ("47 82 19",), 5)
    assert Recall().score(sample, prediction) == Niah().score(sample, prediction) == score


def test_several_needles_stand_in_even_steps_behind_the_first(tokenizer):
    task = Niah(lengths=(800,), depths=(40,), repeats=2, needles=3)
    for sample in task.samples(tokenizer):
        assert len(set(sample.references)) == 3 and tokens_of_answers(tokenizer, sample) <= 800
        begins = [sample.context[:begin].count(" .") for begin, _ in sample.meta["needle_spans"]]
        total = sample.context.count(" .") - 3
        assert [b - i for i, b in enumerate(begins)] == [round(share * total) for share in (0.4, 0.6, 0.8)]
        for (begin, end), value in zip(sample.meta["needle_spans"], sample.references, strict=True):
            assert sample.context[begin:end] == f"note : code for {sample.meta['key']} {value} ."
        first, second, third = sample.references
        assert task.score(sample, f" {third} . {first}") == pytest.approx(2 / 3)
        assert task.score(sample, second + "0") == 0


def tokens_of_answers(tokenizer, sample):
    return sum(map(len, sample.segments(tokenizer))) + sum(len(encode(tokenizer, " " + r)) for r in sample.references)


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ("passkey", r"\d{5}"),
        ("number", r"\d{7}"),
        ("word", r"[a-z]+ [a-z]+"),
        ("uuid", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
    ],
)
def test_needles_in_text_files(tokenizer, tmp_path, value, form):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"This is sentence {i} of {name}.\n" for i in range(30)))
    task = Niah(lengths=(600,), depths=(0, 30, 100), repeats=2, value=value, haystack="essays", path=str(tmp_path))
    samples = task.samples(tokenizer)
    for sample in samples:
        (answer,) = sample.references
        assert re.fullmatch(form, answer)
        assert tokens_of_answers(tokenizer, sample) <= 600
        begin, end = sample.meta["needle_span"]
        assert sample.context[begin:end] == f"The code for {sample.meta['key']} is {answer}."
        rest = sample.context[:begin] + sample.context[end:].removeprefix(" ")
        assert re.fullmatch(r"(This is sentence \d+ of [ab]\. ?)+", rest), "whole sentences around the needle"
        assert task.score(sample, f" {answer.upper()}.") == 1 and task.score(sample, answer[:-1]) == 0
    assert len({s.context[:40] for s in samples}) > 3, "each prompt begins elsewhere"
    assert task.samples(tokenizer) == samples


def test_needles_in_books(tokenizer):
    books = Path(__file__).resolve().parents[2] / "shared" / "data" / "books"
    if not books.is_dir():
        pytest.skip("no texts: ../shared/data/books")
    task = Niah(lengths=(2000,), depths=(50,), repeats=1, value="number", haystack="essays", path=str(books))
    (sample,) = task.samples(tokenizer)
    assert 1900 < sample.meta["tokens"] <= 2000 and sample.meta["measured_depth"] == pytest.approx(50, abs=6)


def test_largest_finds_the_edge_with_few_questions():
    asked = []
    assert largest(1000, lambda n: asked.append(n) or n <= 613, guess=612) == 613
    assert len(asked) <= 6
    for guess in (-3, 0, 300, 613, 617, 900, 2000):
        assert largest(1000, lambda n: n <= 613, guess) == 613
        assert largest(5, lambda n: False, guess) == -1 and largest(5, lambda n: True, guess) == 5
    asked.clear()
    assert largest(1000, lambda n: asked.append(n) or n <= 613) == 613
    assert len(asked) <= 11
    assert largest(5, lambda n: False) == -1
    assert largest(5, lambda n: True) == 5


def test_place_joins_with_single_blanks():
    text = ["a .", " b .", "\nc ."]
    assert place(text, [(0, "X"), (2, "Y")]) == ("X a . b . Y\nc .", [(0, 1), (10, 11)])
    assert place(text, [(0, "X"), (0, "Y")])[0] == "X Y a . b .\nc ."
    assert place(text, [(3, "X")])[0] == "a . b .\nc . X"
    assert place([], [(0, "X")])[0] == "X"


def test_tokenizer_keeps_words_whole_and_any_text(tokenizer):
    from kvbench.corpus import words

    vocabulary = words()
    whole = [*vocabulary.nouns, *vocabulary.adjectives, *vocabulary.verbs, *(f"{i:02d}" for i in range(100))]
    assert all(len(encode(tokenizer, f" {word}")) == 1 for word in whole)
    other = "Überraschung: naïve 漢字 🙂 <b>\t2026"
    assert tokenizer.decode(encode(tokenizer, other)) == other
    assert len(tokenizer) <= 1536


def test_shipped_model_recalls(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(ASSET).eval()
    task, scores = Recall(length=1024, needles=8, count=16, seed=1), []
    for sample in task.samples(tokenizer):
        ids = torch.tensor([sum(sample.segments(tokenizer), [])])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=sample.max_new_tokens, do_sample=False
        )
        scores.append(task.score(sample, tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)))
    assert sum(scores) / len(scores) >= 0.8


def test_every_field_of_a_task_can_be_set_on_the_command_line():
    """Hydra overrides only what a file names; `name` is for two tasks of one class in a folder of results."""
    yaml = pytest.importorskip("yaml")
    seen = set()
    for file in sorted((Path(__file__).resolve().parents[1] / "conf" / "task").glob("*.yaml")):
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "_target_" not in config:
            assert config["defaults"][1] == "_self_", f"{file.name} builds on a file that names the task"
            continue
        task = getattr(tasks, config["_target_"].removeprefix("kvbench.tasks."))
        seen.add(task)
        missing = {f.name for f in fields(task) if f.init} - {*config} - {"name"}
        assert not missing, f"{file.name} lacks {missing}"
    assert {task.__name__ for task in seen} == {*tasks.__all__} - {"Sample", "Turn"}
