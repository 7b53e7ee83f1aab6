"""Prepared prompts: the same from disk as built, built again when anything they depend on changes, and chat frames."""

import copy
import hashlib
import json
import logging
import sys
import tracemalloc
from dataclasses import dataclass, replace
from importlib.resources import files

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedConfig

from kvbench import prompts
from kvbench.identity import identity
from kvbench.prompts import Prompt, cache_folder, needle_tokens, prepare
from kvbench.tasks import (
    FidelityOf,
    Gsm8k,
    LongBench,
    LongBenchV2,
    Math,
    Niah,
    NiahSentence,
    Ppl,
    Recall,
    Ruler,
    Sample,
    SCBench,
    Turn,
    niah_sentence,
    source,
)
from kvbench.tasks.chat import between_turns, wants_chat
from kvbench.tasks.sample import bos, encode

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer(tiny):
    return copy.deepcopy(tiny[1])


@pytest.fixture
def built(monkeypatch):
    """Counts how often samples are really made."""
    calls = []
    for task in (Niah, Recall, Ppl):
        real = task.samples
        monkeypatch.setattr(task, "samples", lambda self, t, real=real: calls.append(self) or real(self, t))
    return calls


def test_prompts_from_disk_are_those_that_were_built(tokenizer, tmp_path, built):
    for task in (Niah(lengths=(300,), repeats=1), Recall(length=300, needles=2, count=2), Ppl(60, 20, count=2)):
        for query_aware in (False, True):
            plain = prepare(task, tokenizer, query_aware, None)
            assert prepare(task, tokenizer, query_aware, None, tmp_path) == plain
            assert prepare(task, tokenizer, query_aware, None, tmp_path) == plain
    assert len(built) == 3 * (2 + 1), "once per task, besides the plain calls: both modes share a file"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("query_aware", [False, True])
def test_a_token_takes_four_bytes(tokenizer, tmp_path, query_aware):
    """Built or read, as many bytes as numbers of 32 bits have; the ids and their hash are those of plain lists."""
    task = Recall(length=4000, needles=2, count=4)
    samples = task.samples(tokenizer)
    built = prepare(task, tokenizer, query_aware, None, tmp_path)
    tracemalloc.start()
    read = prepare(task, tokenizer, query_aware, None, tmp_path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    tokens = 0
    for prompt, again, sample in zip(built, read, samples, strict=True):
        context, *rest = sample.segments(tokenizer)
        ids = [*context, *rest[0], *rest[1]]
        cut = len(ids) - 1 if query_aware else len(context)
        assert [*prompt.prefix] == ids[:cut] and [*prompt.held_back] == ids[cut:] and again == prompt
        assert prompt.sha256 == hashlib.sha256(str([ids[:cut], ids[cut:], []]).encode()).hexdigest()
        for one in (prompt, again):
            assert sys.getsizeof(one.prefix) <= 4 * len(one.prefix) + 128
        tokens += len(ids)
    text = sum(len(sample.context) + len(sample.meta["key"]) for sample in samples)
    assert tokens > 15_000 and 4 * tokens < held - text < 5 * tokens + 40_000, (held, text, tokens)


def test_whatever_prompts_depend_on_makes_another_file(tokenizer, tmp_path, built, monkeypatch):
    task = Recall(length=300, needles=2, count=2)
    prepare(task, tokenizer, False, None, tmp_path)
    prepare(replace(task, seed=1), tokenizer, False, None, tmp_path)
    tokenizer.chat_template = TEMPLATE
    prepare(task, tokenizer, False, None, tmp_path)
    tokenizer.add_tokens(["question"])
    prepare(task, tokenizer, False, None, tmp_path)
    monkeypatch.setattr(prompts, "_code", lambda: "another version")
    prepare(task, tokenizer, False, None, tmp_path)
    assert len(built) == len(list(tmp_path.iterdir())) == 5
    prepare(task, tokenizer, False, None, tmp_path)
    assert len(built) == 5


@pytest.mark.parametrize("damage", [b"", b"PK", None])
def test_a_damaged_file_is_built_again(tokenizer, tmp_path, built, damage):
    task = Recall(length=300, needles=2, count=1)
    first = prepare(task, tokenizer, False, None, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-40] if damage is None else damage)
    assert prepare(task, tokenizer, False, None, tmp_path) == first and len(built) == 2
    assert prepare(task, tokenizer, False, None, tmp_path) == first and len(built) == 2
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_files_hold_no_pickles(tokenizer, tmp_path):
    prepare(Recall(length=300, needles=2, count=1), tokenizer, False, None, tmp_path)
    with np.load(next(tmp_path.iterdir()), allow_pickle=False) as file:
        assert all(file[name].dtype.kind in "iu" for name in file.files)
        json.loads(file["notes"].tobytes())


def test_an_unwritable_folder_only_costs_time(tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "kvbench"):
        assert prepare(Recall(length=300, needles=2, count=1), tokenizer, False, None, tmp_path / "file")
    assert "prompts are not kept" in caplog.text


@dataclass(frozen=True)
class FromFile:
    """A task of kvbench, as far as its module tells, with rows of a file."""

    folder: str
    name: str = "rows"
    kind = "generate"
    __module__ = "kvbench.tasks.of_this_test"

    def samples(self, tokenizer):
        rows = source.load("rows", ["rows.jsonl"], source.Hub("nobody/rows"), source="file", path=self.folder)
        turns = (Turn(" and ?", " so", ("y",), 3),)
        return [
            Sample(f"r{i}", "rows", row["text"], " q", "", ("x",), 2, turns=turns, meta={"span": (1, 2)})
            for i, row in enumerate(rows)
        ]

    def score(self, sample, prediction):
        return 0.0


def test_rows_that_change_are_read_again(tokenizer, tmp_path):
    data, kept = tmp_path / "data", tmp_path / "kept"
    data.mkdir()
    (data / "rows.jsonl").write_text('{"text": "one"}\n')

    def contexts():
        return [p.sample.context for p in prepare(FromFile(str(data)), tokenizer, False, None, kept)]

    assert contexts() == contexts() == ["one"]
    (data / "rows.jsonl").write_text('{"text": "two"}\n')
    assert contexts() == contexts() == ["two"]
    (prompt,) = prepare(FromFile(str(data)), tokenizer, False, None, kept)
    assert prompt.sample.turns == (Turn(" and ?", " so", ("y",), 3),) and prompt.sample.meta["span"] == [1, 2]
    assert [list(ids) for ids in prompt.turns] == [encode(tokenizer, " and ? so")]


def test_results_note_the_file_that_was_read(tokenizer, tmp_path):
    """By its SHA-256, whether prompts are built or kept; generated text has no such note."""
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    expected = [f"rows.jsonl sha256:{hashlib.sha256((tmp_path / 'rows.jsonl').read_bytes()).hexdigest()}"]
    for folder in (None, tmp_path / "kept", tmp_path / "kept"):
        (prompt,) = prepare(FromFile(str(tmp_path)), tokenizer, False, None, folder)
        assert prompt.sample.meta["data"] == expected
    (prompt,) = prepare(Recall(length=300, needles=2, count=1), tokenizer, False, None)
    assert "data" not in prompt.sample.meta


def test_what_is_cut_off_is_noted_of_every_task(tokenizer, tmp_path, monkeypatch):
    """0 where nothing is ever cut; what a task says itself stands; the prompt is none other for the note."""
    pytest.importorskip("lm_eval", reason="prompts come with kvbench[longbench]")
    rows = {"source": "file", "path": "pkg://assets/smoke/longbench", "count": 1}
    fits, cut = (LongBench("hotpotqa", max_length=length, **rows) for length in (9000, 700))
    whole = (Recall(length=300, needles=2, count=1), Ppl(60, 20, count=1), FidelityOf(Recall(300, 2, 1)), fits)
    for folder in (None, tmp_path, tmp_path):
        for task in whole:
            (prompt,) = prepare(task, tokenizer, False, None, folder)
            assert prompt.sample.meta["truncated_tokens"] == 0, task.name
        (prompt,) = prepare(cut, tokenizer, False, None, folder)
        assert prompt.sample.meta["truncated_tokens"] > 0
    (prompt,) = prepare(whole[0], tokenizer, False, None)
    monkeypatch.setattr(prompts, "_is_ours", lambda task: False)
    (unknown,) = prepare(whole[0], tokenizer, False, None)
    assert "truncated_tokens" not in unknown.sample.meta, "what other tasks cut is not known"
    assert identity([prompt], "owner/name", PreTrainedConfig()) == identity([unknown], "owner/name", PreTrainedConfig())


def test_tasks_from_elsewhere_are_not_kept(tokenizer, tmp_path):
    class Own(FromFile):
        __module__ = "somebody.else"

        def samples(self, tokenizer):
            return [Sample("s", "own", "context", "query", "", ("x",), 1)]

    assert prepare(Own(""), tokenizer, False, None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("KVBENCH_CACHE")
    monkeypatch.setattr(prompts.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert str(cache_folder()) == "/elsewhere/kvbench"
    monkeypatch.setattr(prompts.sys, "platform", "darwin")
    assert cache_folder().parts[-3:] == ("Library", "Caches", "kvbench")


def test_needle_tokens_are_those_of_the_needle(tokenizer):
    words = AutoTokenizer.from_pretrained(files("kvbench") / "assets" / "proving")
    tokenizer.chat_template = TEMPLATE
    task = Niah(lengths=(400,), depths=(0, 50, 100), repeats=1)
    for used, chat in ((words, False), (tokenizer, False), (tokenizer, True)):
        for sample in task.samples(used):
            sample = replace(sample, chat=chat)
            context = sample.segments(used)[0]
            ((begin, end),) = needle_tokens(sample, used, len(context))
            assert used.decode(context[begin:end]).strip() == sample.meta["needle"]
    (prompt, *_) = prepare(task, words, False, None)
    assert isinstance(prompt, Prompt) and words.decode(prompt.prefix[slice(*prompt.needle[0])]).startswith(
        "note : code"
    )


# -- chat ------------------------------------------------------------------------------------------------------------

ASKED = Sample("s", "chat", " The context. ", " A question? ", "Answer:", ("x",), 3, chat=True)


def test_chat_frames_the_message_and_begins_the_reply(tokenizer):
    tokenizer.chat_template = TEMPLATE
    context, query, prefix = ASKED.segments(tokenizer)
    assert tokenizer.decode(context) == "<s>[user] The context. ", "the template cannot trim the message"
    assert tokenizer.decode(query) == " A question? [end][assistant]"
    assert tokenizer.decode(prefix) == "Answer:"
    assert [*context, *query, *prefix].count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = TEMPLATE.removeprefix("{{ bos_token }}")
    assert ASKED.segments(tokenizer) == (context, query, prefix), "a template without BOS gets one"
    assert bos(tokenizer) + encode(tokenizer, ASKED.prompt) == sum(replace(ASKED, chat=False).segments(tokenizer), [])


def test_further_turns_begin_a_new_message(tokenizer):
    tokenizer.chat_template = TEMPLATE
    turn = Turn(" And? ", "Again:", ("y",), 3)
    query, prefix = ASKED.turn_segments(tokenizer, turn)
    assert tokenizer.decode(query) == "[end][user] And? [end][assistant]" and tokenizer.decode(prefix) == "Again:"
    assert between_turns(tokenizer) == "[end][user]"
    query, _ = replace(ASKED, chat=False).turn_segments(tokenizer, turn)
    assert tokenizer.decode(query) == " And? "


# As Qwen3's: a reply without thoughts begins with empty ones.
SWITCH = (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def test_a_chat_model_answers_without_thoughts_unless_it_may(tokenizer):
    tokenizer.chat_template = TEMPLATE + SWITCH
    turn = Turn(" And? ", "Again:", ("y",), 3)
    for sample, reply in ((ASKED, "[assistant]<think></think>"), (replace(ASKED, thinking=True), "[assistant]")):
        _, query, prefix = sample.segments(tokenizer)
        assert tokenizer.decode([*query, *prefix]) == f" A question? [end]{reply}Answer:"
        query, prefix = sample.turn_segments(tokenizer, turn)
        assert tokenizer.decode([*query, *prefix]) == f"[end][user] And? [end]{reply}Again:"
    tokenizer.chat_template = TEMPLATE + SWITCH.replace("enable_thinking", "thinking")
    assert tokenizer.decode(ASKED.segments(tokenizer)[1]).endswith("<think></think>"), "the other name of the switch"
    tokenizer.chat_template = TEMPLATE
    assert replace(ASKED, thinking=True).segments(tokenizer) == ASKED.segments(tokenizer), "no switch"


@pytest.mark.parametrize("thinking", [False, True])
def test_tasks_hand_their_option_on(tokenizer, tmp_path, monkeypatch, thinking):
    """Every task that frames prompts as chats, with rows of the package; prompts are kept for each choice alone."""
    pytest.importorskip("lm_eval", reason="prompts come with kvbench[longbench]")
    texts = {"needle": "Ada hid the red key.", "question": "Who hid a key?", "frame": "{context}\n{question}"}
    monkeypatch.setattr(niah_sentence, "official_texts", lambda variant, source: texts)
    essays = tmp_path / "essays.txt"
    essays.write_text(" ".join(f"This is sentence {i}." for i in range(200)))
    tokenizer.chat_template = TEMPLATE + SWITCH
    asked = {"chat": "always", "thinking": thinking}
    smoke = {**asked, "source": "file", "path": "pkg://assets/smoke/"}

    def rows(name):
        return {**smoke, "path": smoke["path"] + name}

    for task in (
        LongBench("hotpotqa", max_length=9000, count=1, **rows("longbench")),
        LongBenchV2(count=1, **rows("longbench_v2")),
        SCBench(count=1, prompts="bare", **rows("scbench")),
        Gsm8k(count=1, **rows("gsm8k")),
        Math("aime24", **rows("aime24")),
        Niah(lengths=(500,), depths=(50,), repeats=1, **asked),
        NiahSentence(lengths=(900,), depths=(50,), path=str(essays), **asked),
        Ruler("niah_single_1", 1500, "ruler_proving", count=1, **asked),
    ):
        for _ in range(2):
            (prompt,) = prepare(task, tokenizer, False, None, tmp_path / "kept")
            assert prompt.sample.chat and prompt.sample.thinking == thinking
            said = tokenizer.decode(prompt.held_back)
            assert "[assistant]" in said and ("<think></think>" in said) != thinking, task.name
        other = replace(task, thinking=not thinking)
        assert prompts._key(other, tokenizer) != prompts._key(task, tokenizer)


def test_only_tasks_with_long_answers_let_a_model_think():
    makers = (LongBench, LongBenchV2, SCBench, Gsm8k, Niah, NiahSentence, Ruler)
    assert Math().thinking and not any(make().thinking for make in makers)


def test_prompts_do_not_change_with_the_date(tokenizer):
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y|%Y-%m-%d') }}|{{ date_string }}|" + TEMPLATE
    assert tokenizer.decode(ASKED.segments(tokenizer)[0]).startswith("<s>26 July 2024|2024-07-26|26 Jul 2024|")


def test_tokenizers_without_a_template(tokenizer):
    with pytest.raises(ValueError, match=r"has no chat template: use chat=never, or an instruction-tuned model$"):
        ASKED.segments(tokenizer)
    assert [wants_chat(mode, tokenizer) for mode in ("auto", "always", "never")] == [False, True, False]
    tokenizer.chat_template = TEMPLATE
    assert [wants_chat(mode, tokenizer) for mode in ("auto", "always", "never")] == [True, True, False]
    with pytest.raises(ValueError, match="chat='yes' is not one of auto, always, never"):
        wants_chat("yes", tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="does not print the user's message once"):
        ASKED.segments(tokenizer)
