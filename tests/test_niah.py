"""Needles: the original's grid and spacing, and its sentence, scored by words and by ROUGE-1."""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from kvbench.engine import run_stacks
from kvbench.policies import Full, StreamingLLM
from kvbench.tasks import Niah, NiahSentence, niah_sentence
from kvbench.tasks.niah_sentence import content_words, official_texts
from kvbench.tasks.sample import encode

pytest.importorskip("wonderwords", reason="the word list comes with kvbench[bench]")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
# In the form of the official files, in words of this test: they need packages that are not there.
RUN = """
from nowhere import Optional
class Args:
    needle: Optional[str] = "\\nThe fastest way to Rome goes by boat at night.\\n"
    retrieval_question: Optional[str] = "What is the fastest way to Rome?"
    other: int = 1
"""
PROVIDER = """
class Provider:
    async def evaluate_model(self, prompt):
        return [{"role": "user", "content": "not this one"}]

    def generate_prompt(self, context, retrieval_question):
        return [{"role": "system", "content": "Be brief"}, {"role": "user", "content": context},
                {"role": "user", "content": f"{retrieval_question} Only from the text"}]
"""
BOOK = """
class Tester:
    def __init__(self, needle="\\nThe fastest way to Rome goes by boat.\\n", folder="x",
                 retrieval_question="The fastest way to Rome goes: ", steps=None):
        pass

    def generate_prompt(self, context):
        test_format = f"A book: <book> {context} </book>.\\nQuestion: {self.retrieval_question}\\nAnswer:"
        return test_format
"""


@pytest.fixture
def essays(tmp_path, monkeypatch):
    """The folder of some essays; beside it, files in the form of the official ones. Nothing reaches for the network."""
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    monkeypatch.setattr("socket.socket", None)
    (tmp_path / "niah").mkdir()
    for constant, code in (("NEEDLE", RUN), ("FRAME", PROVIDER), ("BOOK", BOOK)):
        official = getattr(niah_sentence, constant)
        (tmp_path / "niah" / official.name).write_text(code)
        digest = hashlib.sha256(code.encode()).hexdigest()[:12]
        monkeypatch.setattr(niah_sentence, constant, replace(official, digest=digest))
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "a.txt").write_text(" ".join(f"This is sentence {i}." for i in range(40)))
    return str(tmp_path / "essays")


# -- grids -----------------------------------------------------------------------------------------------------------


def test_grid_of_the_original():
    task = Niah(lengths="1000-16000:35", depths="linear:35")
    assert len(task.lengths) == len(task.depths) == 35
    assert task.lengths[:3] == (1000, 1441, 1882) and task.lengths[-1] == 16000
    assert task.depths[:3] == (0, 3, 6) and task.depths[-1] == 100 and all(isinstance(d, int) for d in task.depths)
    default = NiahSentence()
    assert (default.lengths, default.depths, default.repeats) == (task.lengths, task.depths, 1)


def test_sigmoid_depths_are_denser_at_the_ends_and_are_those_of_the_original():
    depths = Niah(depths="sigmoid:35").depths
    assert depths[0] == 0 and depths[-1] == 100 and list(depths) == sorted(set(depths))
    steps = [b - a for a, b in zip(depths, depths[1:], strict=False)]
    assert max(steps[:5]) < 1 and max(steps[-5:]) < 1 and max(steps) > 7
    x = 100 * 10 / 34
    assert depths[10] == pytest.approx(100 / (1 + math.exp(-0.1 * (x - 50))), abs=5e-4)
    assert [round(100 - d, 3) for d in reversed(depths)] == pytest.approx(list(depths), abs=2e-3), "symmetric"


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"lengths": "1000-16000"}, "lengths='1000-16000': give a list, or shortest-longest:count"),
        ({"lengths": "1000-2000:1"}, "lengths='1000-2000:1': give a list"),
        ({"depths": "even:5"}, "depths='even:5': give a list, linear:count or sigmoid:count"),
        ({"depths": []}, "depths is empty: give at least one"),
        ({"depths": (0, 101)}, "depths=101: must be a number, 0 to 100"),
    ],
)
def test_bad_grids_are_refused_in_one_line(fields, line):
    for task in (Niah, NiahSentence):
        with pytest.raises(ValueError, match=f"^{line}"):
            task(**fields)


def test_configs_make_the_grids():
    hydra = pytest.importorskip("hydra")
    with hydra.initialize_config_module("kvbench.conf", version_base="1.3"):
        for name, repeats in (("niah_35", 1), ("niah_recall", 1), ("niah_rouge1", 1), ("niah_grid", 5)):
            task = hydra.utils.instantiate(hydra.compose("config", overrides=[f"task={name}"]).task)
            assert task.name == name and task.repeats == repeats
            assert (len(task.lengths), len(task.depths)) == ((20, 10) if name == "niah_grid" else (35, 35))
        overrides = ["task=niah_35", "task.depths='sigmoid:5'", "task.lengths=[900]"]
        task = hydra.utils.instantiate(hydra.compose("config", overrides=overrides).task)
        assert task.lengths == (900,) and task.depths[1] == 7.586


# -- sentences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["recall", "rouge1"])
def test_the_sentence_stands_at_its_depth_inside_the_official_frame(tiny, essays, variant):
    _, tokenizer = tiny
    task = NiahSentence(variant, lengths=(900, 1200), depths=(0, 50, 100), repeats=2, path=essays)
    samples = task.samples(tokenizer)
    assert len({s.sample_id for s in samples}) == 12 and len({s.prompt for s in samples}) > 9
    needle = {"recall": RUN, "rouge1": BOOK}[variant].split('"\\n')[1].split("\\n")[0]
    for sample in samples:
        begin, end = sample.meta["needle_span"]
        assert sample.context[begin:end] == f"\n{needle}\n" == sample.references[0]
        assert sample.context.startswith({"recall": "Be brief\n\n", "rouge1": "A book: <book> "}[variant])
        assert sample.meta["measured_depth"] == pytest.approx(sample.meta["depth"], abs=4)
        used = sum(map(len, sample.segments(tokenizer))) + sample.max_new_tokens
        assert sample.length - 25 < used <= sample.length, "another sentence would have fitted"
    end = {
        "recall": ("\n\nWhat is the fastest way to Rome? Only from the text\n", "", (), 300),
        "rouge1": (" </book>.\nQuestion: The fastest way to Rome goes: \n", "Answer:", ("\n",), 30),
    }[variant]
    assert (samples[0].query, samples[0].answer_prefix, samples[0].stop, samples[0].max_new_tokens) == end
    assert task.samples(tokenizer) == samples


def test_recall_counts_the_words_that_the_question_does_not_hold(tiny, essays):
    task = NiahSentence(lengths=(900,), depths=(50,), path=essays)
    (sample,) = task.samples(tiny[1])
    assert content_words(sample.references[0]) - content_words(sample.meta["key"]) == {"goes", "boat", "night"}
    for said, score in (("by BOAT, at night it goes!", 1), ("The fastest way to Rome", 0), ("a boat", 1 / 3), ("", 0)):
        assert task.score(sample, said) == pytest.approx(score)
    own = replace(task, needle="Kim owns 3 red kites.", question="What does Kim own?")
    (sample,) = own.samples(tiny[1])
    assert sample.references == ("Kim owns 3 red kites.",) and own.score(sample, "3 kites") == 0.5
    with pytest.raises(ValueError, match="^needle='So it is.': all its words stand in the question, or are function"):
        replace(task, needle="So it is.", question="Is it so?").samples(tiny[1])
    with pytest.raises(ValueError, match="^needle and question belong together"):
        NiahSentence(needle="x")


def test_rouge1_is_the_f1_of_stemmed_words(tiny, essays):
    pytest.importorskip("rouge_score")
    task = NiahSentence("rouge1", lengths=(900,), depths=(50,), path=essays)
    (sample,) = task.samples(tiny[1])  # 9 words: the fastest way to rome goes by boat
    assert task.score(sample, "The fastest way to Rome goes by boat.") == 1
    assert task.score(sample, " by boats") == pytest.approx(2 * 1 * (2 / 8) / (1 + 2 / 8))
    assert task.score(sample, "") == task.score(sample, "no") == 0


def test_sentences_run_and_their_misses_are_split(tiny, essays):
    model, tokenizer = tiny
    task = NiahSentence("rouge1", lengths=(600,), depths=(0, 100), path=essays)
    full, newest = run_stacks(model, tokenizer, task, [Full(), StreamingLLM(budget=100, sinks=0)])
    assert all(row["needle_kept"] == [[1.0] * 2] * 2 for row in full.rows)
    assert [row["needle_kept"][0][0] for row in newest.rows] == [0.0, 1.0]


def test_chat_models_get_one_message_and_books_never_do(tiny_folder, essays):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = "[{{ messages[0].content }}]"
    (sample,) = NiahSentence(lengths=(900,), depths=(50,), path=essays).samples(tokenizer)
    assert sample.chat and tokenizer.decode(sum(sample.segments(tokenizer), [])).endswith("Only from the text\n]")
    (sample,) = NiahSentence("rouge1", lengths=(900,), depths=(50,), path=essays).samples(tokenizer)
    assert not sample.chat


def test_files_that_are_not_the_official_ones_are_refused(tiny, essays, tmp_path):
    (tmp_path / "niah" / "run.py").write_text("needle = 'x'")
    with pytest.raises(ValueError, match="^niah: run.py is not the official file, which is at https://raw.*/7b90d28"):
        NiahSentence(path=essays).samples(tiny[1])
    (tmp_path / "niah" / "run_needle_in_haystack.py").unlink()
    with pytest.raises(
        ValueError, match="^niah: no run_needle_in_haystack.py in .*; store https://raw.*KVCache-Factory"
    ):
        NiahSentence("rouge1", path=essays, source="file").samples(tiny[1])


@pytest.mark.skipif(not (SHARED / "prompts").is_dir(), reason="needs ../shared/data beside the checkout")
def test_the_frame_is_put_together_from_the_official_strings(essays, tmp_path, monkeypatch):
    """The strings of the original, in files of its form, come out as they went in."""
    official = json.loads((SHARED / "prompts" / "niah.json").read_text(encoding="utf-8"))["niah"]
    run = f"needle = {official['needle']!r}\nretrieval_question = {official['question']!r}"
    asked = "{retrieval_question}" + official["question_suffix"]
    provider = f"def generate_prompt():\n    return [{{'content': {official['system']!r}}}, {{'content': f{asked!r}}}]"
    for constant, code in (("NEEDLE", run), ("FRAME", provider)):
        (tmp_path / "niah" / getattr(niah_sentence, constant).name).write_text(code)
        monkeypatch.setattr(niah_sentence, constant, replace(getattr(niah_sentence, constant), digest=""))
    texts = official_texts("recall", "file")
    assert (texts["needle"], texts["question"]) == (official["needle"], official["question"])
    assert texts["frame"] == f"{official['system']}\n\n{{context}}\n\n{{question}}{official['question_suffix']}\n"


def test_spans_are_of_the_whole_context(tiny, essays):
    _, tokenizer = tiny
    (sample,) = NiahSentence("rouge1", lengths=(900,), depths=(50,), path=essays).samples(tokenizer)
    for name in ("spans", "needle_spans"):
        ((begin, end),) = sample.meta[name]
        assert sample.context[begin:end] == sample.references[0]
    assert len(encode(tokenizer, sample.context)) < 900
