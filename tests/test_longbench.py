"""LongBench: official prompts, cut and shortened where they should be, and metrics with their quirks."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvbench.engine import prepare, run_stacks
from kvbench.policies import Full, StreamingLLM
from kvbench.tasks import LongBench, LongBenchV2
from kvbench.tasks import longbench as lb
from kvbench.tasks import longbench_metrics as metrics
from kvbench.tasks import longbench_v2 as lb2
from kvbench.tasks.longbench_v2 import DIGESTS, VARIANTS, chosen_letter

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not (SHARED / "longbench").is_dir(), reason="needs ../shared/data beside the checkout")
needs_prompts = pytest.mark.skipif(not (SHARED / "prompts").is_dir(), reason="needs ../shared/data beside the checkout")
pytest.importorskip("lm_eval", reason="the prompts come with kvbench[longbench]")

ROW = {
    "input": "Who?", "context": "It was Ada.", "answers": ["Ada", "Ada L."], "length": 3, "dataset": "hotpotqa",
    "language": "en", "all_classes": None, "_id": "one",
}  # fmt: skip
# What the three few-shot tasks and the code tasks look like, written for this test.
FEW_SHOT = {
    "trec": ("Question: What is a mole ?\nType: animal\n", "Question: Who is it ?\nType:"),
    "triviaqa": ("Passage:\nA b.\nQuestion:\nC?\nAnswer:\nD\n\n\n", "Passage:\nE.\nQuestion:\nF?\nAnswer:\n"),
    "samsum": ("Dialogue: A: hi\nSummary: They greet.\n", "Dialogue: B: bye\nSummary: "),
    "lsht": ("新闻内容：\n天气。\n类别：天气\n\n", "新闻内容：\n足球。\n类别："),
}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return tiny[1]


@pytest.fixture
def chat_tokenizer(tiny_folder):
    """With a chat template, and one that begins what it encodes with BOS; the other tokenizer does not."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tiny_folder)
    loaded.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", loaded.bos_token_id)]
    )
    loaded.chat_template = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    return loaded


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data folder; nothing reaches for the network."""
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    monkeypatch.setattr("socket.socket", None)
    (tmp_path / "longbench").mkdir()
    (tmp_path / "longbench_v2").mkdir()
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def samples(folder, tokenizer, subtask, *rows, **options):
    write(folder / "longbench" / f"{subtask}{'_e' if options.get('e') else ''}.jsonl", rows)
    return LongBench(subtask, **{"max_length": 10**6, **options}).samples(tokenizer)


# -- prompts ---------------------------------------------------------------------------------------------------------


@needs_prompts
@pytest.mark.parametrize("subtask", lb.SUBTASKS)
def test_prompts_are_the_official_ones(subtask):
    official = json.loads((SHARED / "prompts" / "longbench_v1.json").read_text(encoding="utf-8"))
    assert lb.official_prompt(subtask) == (official[subtask]["prompt"], official[subtask]["max_new_tokens"])
    assert list(lb.SUBTASKS) == list(official)


def test_a_prompt_that_is_not_official_is_refused(monkeypatch):
    changed = 'doc_to_text: "Please: {{context}} {{question}}"\ngeneration_kwargs: {max_gen_toks: 3}'
    monkeypatch.setattr(lb, "lm_eval_file", lambda *parts: changed)
    with pytest.raises(ValueError, match="^LongBench vcsum: the prompt in the installed lm-eval is not the official"):
        lb.official_prompt.__wrapped__("vcsum")


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("kvbench.tasks.official.find_spec", lambda name: None)
    line = r"^tasks/longbench/qasper.yaml is read from lm-eval >= 0.4.13: pip install 'kvbench\[lm-eval\]'$"
    with pytest.raises(ValueError, match=line):
        lb.official_prompt.__wrapped__("qasper")


def test_lists_of_tasks():
    assert len(lb.SUBTASKS) == 21 and len(lb.E_SUBTASKS) == 13 and len(lb.KV_SUBTASKS) == 16
    assert {*lb.E_SUBTASKS} < {*lb.KV_SUBTASKS} < {*lb.SUBTASKS}
    chinese = {"multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh"}
    assert {*lb.SUBTASKS} - {*lb.KV_SUBTASKS} == chinese


@pytest.mark.parametrize("subtask", lb.SUBTASKS)
@pytest.mark.parametrize("style", lb.SEGMENT_STYLES)
def test_segments_are_the_filled_prompt(folder, tokenizer, subtask, style):
    context, question = FEW_SHOT.get(subtask, ("A text.\n{input}", "The {context}\n"))
    row = {**ROW, "context": context, "input": question, "all_classes": ["x"]}
    (sample,) = samples(folder, tokenizer, subtask, row, segment_style=style)
    template, new = lb.official_prompt(subtask)
    assert sample.prompt == template.format(context=context, input=question)
    assert sample.max_new_tokens == new and sample.references == ("Ada", "Ada L.")
    assert context in sample.context and context not in sample.query
    if "{input}" in template and subtask not in FEW_SHOT:
        assert question in sample.query
    cue = sample.answer_prefix
    assert re.fullmatch(r"[^\n]+[:：][ \n]?", cue), "a cue is one line that ends with a colon"


@pytest.mark.parametrize(
    ("subtask", "style", "end", "query", "cue"),
    [
        ("hotpotqa", "template", "It was Ada.", "\n\nAnswer the question based on the given", "Answer:"),
        ("hotpotqa", "kvpress", "any other words.\n\n", "Question: Who?\n", "Answer:"),
        ("gov_report", "template", "It was Ada.", "\n\nNow, write a one-page", "Summary:"),
        ("gov_report", "kvpress", "It was Ada.\n\n", "Now, write a one-page", "Summary:"),
        ("lcc", "template", "It was Ada.", "", "Next line of code:\n"),
        ("repobench-p", "kvpress", "It was Ada.", "Who?", "Next line of code:\n"),
        ("passage_count", "template", "It was Ada.", "\n\nPlease enter", "The final answer is: "),
        ("passage_retrieval_en", "kvpress", "an abstract.\n\n", "Who?\n\nPlease enter", "The answer is: "),
        ("trec", "template", "It was Ada.", "\nWho?", ""),
        ("vcsum", "kvpress", "It was Ada.\n\n", "", "会议总结："),
    ],
)
def test_where_the_prompt_is_cut(folder, tokenizer, subtask, style, end, query, cue):
    (sample,) = samples(folder, tokenizer, subtask, {**ROW, "all_classes": ["x"]}, segment_style=style)
    assert sample.context.endswith(end) and sample.query.startswith(query) and sample.answer_prefix == cue
    assert sample.query or not query


@pytest.mark.parametrize("subtask", FEW_SHOT)
def test_the_cue_of_few_shot_tasks_comes_from_the_row(folder, tokenizer, subtask):
    context, question = FEW_SHOT[subtask]
    (sample,) = samples(
        folder, tokenizer, subtask, {**ROW, "context": context, "input": question, "all_classes": ["x"]}
    )
    assert sample.context.endswith(context)
    assert sample.answer_prefix.strip() == {"trec": "Type:", "triviaqa": "Answer:", "lsht": "类别："}.get(
        subtask, "Summary:"
    )


def test_only_samsum_stops_at_a_new_line(folder, tokenizer):
    (sample,) = samples(folder, tokenizer, "samsum", ROW)
    assert sample.stop == ("\n",) and sample.min_new_tokens == 1
    (sample,) = samples(folder, tokenizer, "triviaqa", ROW)
    assert sample.stop == () and sample.min_new_tokens == 0


# -- chat ------------------------------------------------------------------------------------------------------------


def test_the_whole_prompt_is_the_message_of_a_chat(folder, chat_tokenizer):
    (sample,) = samples(folder, chat_tokenizer, "hotpotqa", ROW)
    assert sample.chat and sample.query.endswith("Question: Who?\nAnswer:") and sample.answer_prefix == ""
    ids = sum(sample.segments(chat_tokenizer), [])
    assert ids.count(chat_tokenizer.bos_token_id) == 1
    raw = lb.official_prompt("hotpotqa")[0].format(context="It was Ada.", input="Who?")
    assert chat_tokenizer.decode(ids) == f"<s>[user]{raw}[assistant]"
    (kvpress,) = samples(folder, chat_tokenizer, "hotpotqa", ROW, segment_style="kvpress")
    assert chat_tokenizer.decode(sum(kvpress.segments(chat_tokenizer), [])).endswith("Who?\n[assistant]Answer:")


@pytest.mark.parametrize("subtask", lb.SUBTASKS)
def test_six_tasks_have_no_chat_template(folder, chat_tokenizer, tokenizer, subtask):
    row = {**ROW, "all_classes": ["x"]}
    (auto,) = samples(folder, chat_tokenizer, subtask, row)
    assert auto.chat == (subtask not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))
    assert samples(folder, chat_tokenizer, subtask, row, chat="always")[0].chat
    assert not samples(folder, chat_tokenizer, subtask, row, chat="never")[0].chat
    assert not samples(folder, tokenizer, subtask, row)[0].chat, "no template, no chat"


# -- truncation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", ["auto", "never"])
@pytest.mark.parametrize("limit", [60, 61, 300, 301])
def test_middle_truncation(folder, tokenizer, chat_tokenizer, limit, chat):
    row = {**ROW, "context": "".join(chr(97 + i % 26) for i in range(500)), "answers": ["x"]}
    (sample,) = samples(folder, chat_tokenizer, "multifieldqa_en", row, max_length=limit, chat=chat)
    raw = lb.official_prompt("multifieldqa_en")[0].format(context=row["context"], input=row["input"])
    half = limit // 2
    assert sample.prompt == raw[: half - 1] + raw[-half:], "a token is a letter here; BOS is one of the first half"
    assert sample.meta["truncated_tokens"] == len(raw) + 1 - 2 * half
    if limit >= 300:
        question = "Question: Who?\nAnswer:"
        assert sample.query + sample.answer_prefix == raw[raw.index("\n\nNow, answer") :]
        assert sample.query.endswith(question if sample.chat else "Question: Who?\n")
    used = sum(map(len, sample.segments(chat_tokenizer)))
    assert used - 2 * half == (len("[user][assistant]") if sample.chat else 0)
    (plain,) = samples(folder, tokenizer, "multifieldqa_en", row, max_length=limit)
    assert plain.prompt == raw[:half] + raw[-half:]


def test_what_fits_is_left_alone(folder, chat_tokenizer):
    raw = lb.official_prompt("hotpotqa")[0].format(**ROW)
    (sample,) = samples(folder, chat_tokenizer, "hotpotqa", ROW, max_length=len(raw) + 1)
    assert sample.prompt == raw and sample.meta["truncated_tokens"] == 0
    (sample,) = samples(folder, chat_tokenizer, "hotpotqa", ROW, max_length=len(raw))
    assert sample.meta["truncated_tokens"] == 1 + len(raw) % 2


def test_truncation_where_decoding_is_not_exact(folder):
    """A tokenizer that lowers letters: the text is the decoded one, cut about where it was."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    lower = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    row = {**ROW, "context": "X" * 900}
    (sample,) = samples(folder, lower, "hotpotqa", row, max_length=600)
    raw = lb.official_prompt("hotpotqa")[0].format(context=row["context"], input="Who?").lower()
    assert sample.prompt == raw[:300] + raw[-300:]
    assert sample.answer_prefix == "answer:" and sample.query.endswith("question: who?\n")
    assert sample.context.endswith("x")


@pytest.mark.parametrize(
    ("context", "official"), [(4096, 3500), (8192, 7500), (16384, 15500), (32768, 31500), (131072, 127500)]
)
def test_default_max_length_is_official(tokenizer, monkeypatch, context, official):
    monkeypatch.setattr(tokenizer, "model_max_length", context)
    assert lb.default_max_length(tokenizer) == official


@pytest.mark.parametrize("context", [512, 10**30])
def test_no_default_max_length(tokenizer, monkeypatch, context):
    monkeypatch.setattr(tokenizer, "model_max_length", context)
    with pytest.raises(
        ValueError, match=rf"^model and tokenizer tell no usable context \({context}\): set task.max_length$"
    ):
        lb.default_max_length(tokenizer)


@pytest.mark.parametrize(
    ("said", "model", "limit"), [(8192, 2048, 1500), (2048, 8192, 1500), (10**30, 2048, 1500), (2048, None, 1500)]
)
def test_prompts_are_cut_to_the_smaller_context_of_model_and_tokenizer(
    folder, tokenizer, monkeypatch, said, model, limit
):
    monkeypatch.setattr(tokenizer, "model_max_length", said)
    write(folder / "longbench" / "hotpotqa.jsonl", [{**ROW, "context": "x" * 9000}])
    (prompt,) = prepare(LongBench("hotpotqa"), tokenizer, False, model)
    assert len(prompt.prefix) + len(prompt.held_back) == limit + 1, "BOS, which this tokenizer does not count"
    assert tokenizer.model_max_length == said, "it is the caller's"


def test_prompts_kept_for_another_context_are_not_taken(folder, tokenizer, monkeypatch, tmp_path):
    write(folder / "longbench" / "hotpotqa.jsonl", [{**ROW, "context": "x" * 9000}])
    monkeypatch.setattr(tokenizer, "model_max_length", 8192)

    def tokens(model):
        (prompt,) = prepare(LongBench("hotpotqa"), tokenizer, False, model, tmp_path / "kept")
        return len(prompt.prefix) + len(prompt.held_back)

    assert [tokens(8192), tokens(2048), tokens(8192), tokens(4096), tokens(16384)] == [7501, 1501, 7501, 3501, 7501]
    monkeypatch.setattr(tokenizer, "model_max_length", 2048)
    assert tokens(8192) == 1501
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_a_context_too_small_or_unknown_names_the_options_that_work(folder, tokenizer, monkeypatch):
    import hydra

    write(folder / "longbench" / "hotpotqa.jsonl", [ROW])
    monkeypatch.setattr(tokenizer, "model_max_length", 10**30)
    both = r" set task\.max_length \(for several tasks, or with a preset: (\+\+sizes\.LongBench\.max_length=)\)$"
    with pytest.raises(ValueError, match=both) as error:
        prepare(LongBench("hotpotqa"), tokenizer, False, None)
    option = re.search(both, str(error.value))[1]
    with pytest.raises(ValueError, match=r"use a smaller task\.max_length or another model \(.*" + re.escape(option)):
        prepare(LongBench("hotpotqa", max_length=4000), tokenizer, False, 300)
    with pytest.raises(ValueError, match=r"or use task\.source=auto \(.*\+\+sizes\.LongBench\.source="):
        prepare(LongBench("lcc", source="file"), tokenizer, False, 4096)
    with hydra.initialize_config_module("kvbench.conf", version_base="1.3"):
        for preset in (["task=longbench_lcc"], ["preset=dev"], ["preset=smoke"]):
            assert hydra.compose("config", overrides=[*preset, f"{option}3500"]).sizes.LongBench.max_length == 3500


# -- rows ------------------------------------------------------------------------------------------------------------


def test_rows_that_hold_the_prompt_are_recognised(folder, tokenizer):
    template, _ = lb.official_prompt("hotpotqa")
    before, after = template.split("{context}")
    mirrored = {k: v for k, v in ROW.items() if k != "input"} | {
        "context": before + "It was Ada." + after.split("Question")[0], "question": "Question: Who?\n",
        "answer_prefix": "Answer:",
    }  # fmt: skip
    with pytest.raises(ValueError, match="row one: its context already holds the prompt, as in mirrors made for kvp"):
        samples(folder, tokenizer, "hotpotqa", mirrored)
    with pytest.raises(ValueError, match="already holds the prompt"):
        samples(folder, tokenizer, "hotpotqa", {**ROW, "context": before + ROW["context"]})
    with pytest.raises(ValueError, match="already holds the prompt"):
        half = {**ROW, "context": before + ROW["context"]}
        samples(folder, tokenizer, "hotpotqa", half, segment_style="kvpress")
    (taken,) = samples(folder, tokenizer, "hotpotqa", mirrored, segment_style="kvpress")
    (built,) = samples(folder, tokenizer, "hotpotqa", ROW, segment_style="kvpress")
    assert (taken.context, taken.query, taken.answer_prefix) == (built.context, built.query, built.answer_prefix)


def test_rows_keep_their_names_and_number_where_names_are_missing(folder, tokenizer):
    rows = [{**ROW, "_id": str(i), "length": length} for i, length in enumerate((3999, 4000, 8000))]
    got = samples(folder, tokenizer, "qasper", *rows, e=True)
    assert [s.sample_id for s in got] == [f"longbench_e_qasper-{i}" for i in range(3)]
    assert [s.meta["length_bucket"] for s in got] == ["0-4k", "4-8k", "8k+"]
    assert len({s.meta["cluster"] for s in got}) == 1, "one context"
    assert samples(folder, tokenizer, "qasper", *rows, e=True, count=2) == got[:2]
    same = samples(folder, tokenizer, "qasper", ROW, ROW)
    assert [s.sample_id for s in same] == ["longbench_qasper-00000", "longbench_qasper-00001"]


def test_a_row_that_lacks_something_is_named(folder, tokenizer):
    with pytest.raises(ValueError, match="^longbench_trec row one: lacks all_classes; see the official data.zip$"):
        samples(folder, tokenizer, "trec", ROW)
    with pytest.raises(ValueError, match="^longbench_qmsum row one: lacks answers, length;"):
        samples(folder, tokenizer, "qmsum", {"_id": "one", "context": "a", "input": "b"})
    with pytest.raises(
        ValueError, match=r"^longbench: no lcc.jsonl or data/lcc.jsonl or data.zip in .*; store http.* as .*data.zip,"
    ):
        LongBench("lcc", source="file").samples(tokenizer)


@needs_data
@pytest.mark.parametrize(
    ("subtask", "count", "clusters"),
    [("hotpotqa", 10, 10), ("multifieldqa_zh", 5, 4), ("passage_count", 5, 5), ("qmsum", 10, 6)],
)
def test_rows_in_the_official_schema(tokenizer, monkeypatch, subtask, count, clusters):
    monkeypatch.setenv("KVBENCH_DATA", str(SHARED))
    rows = [json.loads(line) for line in (SHARED / "longbench" / f"{subtask}.jsonl").read_text("utf-8").splitlines()]
    official = json.loads((SHARED / "prompts" / "longbench_v1.json").read_text(encoding="utf-8"))[subtask]
    task = LongBench(subtask, max_length=10**6, source="file")
    got = task.samples(tokenizer)
    assert len(got) == count and len({s.meta["cluster"] for s in got}) == clusters
    for sample, row in zip(got, rows, strict=True):
        assert sample.prompt == official["prompt"].format(**row)
        assert sample.sample_id == f"longbench_{subtask}-{row['_id']}"
        assert task.score(sample, row["answers"][-1]) == pytest.approx(1)
        assert task.score(sample, "") == 0
    short = replace(task, max_length=700, count=2)
    prompts = prepare(short, tokenizer, query_aware=False, context_limit=1300)
    for prompt in prompts:  # a token is a byte here; half a letter at the cut becomes another, of three bytes
        used = len(prompt.prefix) + len(prompt.held_back)
        assert used == 701 or (subtask == "multifieldqa_zh" and 701 <= used <= 709)


# -- metrics ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "prediction", "reference", "score"),
    [
        ("qa_f1", "The Ada, Lovelace!", "ada lovelace", 1.0),
        ("qa_f1", "ada ada byron", "ada lovelace", 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("qa_f1", "ada ada", "ada ada king", 0.8),
        ("qa_f1", "x-y", "xy", 1.0),
        ("qa_f1", "theory another", "ory nother", 0.0),
        ("qa_f1", "the", "the", 0.0),
        ("qa_f1", "", "ada", 0.0),
        ("rouge_l", "", "a b", 0.0),
        ("rouge_l", "...", "a b", 0.0),
        ("rouge_l", "a b c", "a b c", 1.0),
        ("rouge_l", "a b c d", "a c x", 2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3)),
        ("rouge_l", "a a a", "a", 1.0),  # sets of words
        ("rouge_l", "c d. a b", "a b. c d", 1.0),  # sentence by sentence
        ("rouge_l", "c d a b", "a b c d", 0.5),
        ("count", "There are 8 of 10, so 8", "8", 2 / 3),
        ("count", "18", "8", 0.0),
        ("count", "none", "8", 0.0),
        ("count", "", "8", 0.0),
        ("retrieval", "Paragraph 12", "Paragraph 12", 1.0),
        ("retrieval", "Paragraph 12 or 3", "Paragraph 12", 0.5),
        ("retrieval", "", "Paragraph 12", 0.0),
        ("retrieval_zh", "段落4", "段落4", 1.0),
        ("retrieval_zh", "4和5", "段落4", 0.5),
        ("edit_similarity", "\n\nabcd\nrest", "abcd", 1.0),
        ("edit_similarity", "```python\n# x\nab // c\nabxd", "abcd", 0.75),
        ("edit_similarity", "abc", "ab", 0.8),
        ("edit_similarity", "ab", "abcd e", 0.5),
        ("edit_similarity", "ab", "abcde", 0.57),  # 4/7, in whole percents
        ("edit_similarity", "# only\n", "abcd", 0.0),
        ("edit_similarity", "", "abcd", 0.0),
    ],
)
def test_metrics_by_hand(metric, prediction, reference, score):
    if metric == "rouge_l":
        pytest.importorskip("rouge")
    assert getattr(metrics, metric)(prediction, reference) == pytest.approx(score, abs=1e-6)


def test_edit_similarity_takes_the_first_line_even_if_blank():
    assert metrics.edit_similarity("# a\n\nabcd", "abcd") == 0.0


def test_chinese_metrics():
    pytest.importorskip("jieba"), pytest.importorskip("rouge")
    assert metrics.qa_f1_zh("增长了3.6%。", "增长了3.6%") == 1.0
    assert metrics.qa_f1_zh("北京，上海", "上海") == pytest.approx(2 / 3)
    assert metrics.qa_f1_zh("。！", "上海") == metrics.qa_f1_zh("", "上海") == 0.0
    assert metrics.qa_f1_zh("ABC", "abc") == 1.0
    assert metrics.rouge_l_zh("北京 上海", "北京 上海") == pytest.approx(1)
    assert (
        metrics.rouge_l_zh("上海很大", "上海很小") == pytest.approx(0.5)
        or 0 < metrics.rouge_l_zh("上海很大", "上海很小") < 1
    )
    assert metrics.rouge_l_zh("", "上海") == 0.0


def test_rouge_that_runs_out_of_recursion_counts_nothing():
    pytest.importorskip("rouge")
    words = " ".join(f"w{i}" for i in range(1100))
    assert metrics.rouge_l(words, "w0") == 0.0
    assert metrics.rouge_l(words.replace("w500", "w500."), "w0") > 0


def test_the_classification_quirk_and_its_repair():
    classes = ["man", "human", "wo", "woman", "x"]
    # Named: man, wo, woman. Without the parts of "woman" it stands alone; the walk removes "man" and then skips "wo".
    assert metrics.classification("a woman", "woman", ["man", "wo", "woman"]) == 1 / 2
    assert metrics.classification_fixed("a woman", "woman", ["man", "wo", "woman"]) == 1
    # Three parts: the first and the third go, the second stays.
    assert metrics.classification("a woman", "woman", ["man", "wo", "oma", "woman"]) == 1 / 2
    assert metrics.classification_fixed("woman or x", "woman", classes) == 1 / 2
    for score in (metrics.classification, metrics.classification_fixed):
        assert score("x", "woman", classes) == score("", "woman", classes) == 0
        assert score("woman", "human", classes) == 0
        assert score("x", "x", classes) == 1
        assert score("x human", "x", classes) == 1 / 3, "man is no part of x"


@pytest.mark.parametrize(("subtask", "score"), [("triviaqa", 1.0), ("hotpotqa", 2 / 3)])
def test_only_few_shot_answers_are_cut_to_their_first_line(folder, tokenizer, subtask, score):
    (sample,) = samples(folder, tokenizer, subtask, ROW)
    task = LongBench(subtask)
    assert task.score(sample, "\n\nAda\nByron") == pytest.approx(score)
    assert task.score(sample, "Ada L") == 1.0, "the best reference counts"
    assert task.score(sample, "") == 0.0 and task.details(sample, "Ada") == {}
    if subtask == "triviaqa":
        assert task.score(sample, " \nAda") == 0.0, "only new lines are removed in front"


def test_classification_uses_the_classes_of_the_row(folder, tokenizer):
    row = {**ROW, "answers": ["woman"], "all_classes": ["man", "wo", "woman"]}
    (sample,) = samples(folder, tokenizer, "trec", row)
    task = LongBench("trec")
    assert task.score(sample, "\na woman\nman") == 1 / 2
    assert task.details(sample, "\na woman\nman") == {"classification_fixed": 1.0}


def test_zh_punctuation_is_that_of_lm_eval():
    text = lb.lm_eval_file("longbench", "metrics.py")
    listed = re.search(r'cn_punctuation = "(.*)"', text)[1]
    assert set(metrics.CHINESE_PUNCTUATION) | {"."} == set(listed)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: LongBench("hotpot"), "subtask='hotpot' is not one of narrativeqa, qasper,"),
        (lambda: LongBench("narrativeqa", e=True), "subtask='narrativeqa' is not one of qasper, multifieldqa_en,"),
        (lambda: LongBench(chat="yes"), "chat='yes' is not one of auto, always, never"),
        (lambda: LongBench(segment_style="x"), "segment_style='x' is not one of template, kvpress"),
        (lambda: LongBench(source="x"), "source='x' is not one of auto, file, hub, hub@<revision>"),
        (lambda: LongBench(source="file@x"), "source='file@x' is not one of auto, file, hub, hub@<revision>"),
        (lambda: LongBenchV2(source="hub@"), "source='hub@' is not one of auto, file, hub, hub@<revision>"),
        (lambda: LongBench(max_length=1), "max_length=1: must be a number, at least 2"),
        (lambda: LongBench(count=0), "count=0: must be a number, at least 1"),
        (lambda: LongBenchV2(variant="cot"), "variant='cot' is not one of 0shot, 0shot_no_context"),
        (lambda: LongBenchV2(variant="0shot_rag"), "retrieved=None: say how many chunks for variant=0shot_rag"),
        (lambda: LongBenchV2(retrieved=4), "retrieved=4: say how many chunks for variant=0shot_rag, and only for it"),
        (lambda: LongBenchV2("0shot_cot", letters=True), "letters=true reads the choice at once"),
        (lambda: LongBenchV2(length="tiny"), "length='tiny' is not one of None, short, medium, long"),
        (lambda: LongBenchV2(temperature=-1), "temperature=-1: must be a number, 0 to 2"),
        (lambda: LongBenchV2(seed=-1), "seed=-1: must be a number, at least 0"),
    ],
)
def test_bad_fields_are_refused_in_one_line(make, line):
    with pytest.raises(ValueError, match=f"^{re.escape(line)}"):
        make()


def test_each_task_has_its_config():
    yaml = pytest.importorskip("yaml")
    folder = Path(__file__).resolve().parents[1] / "conf" / "task"
    for base, subtasks in (("longbench", lb.SUBTASKS), ("longbench_e", lb.E_SUBTASKS)):
        for subtask in subtasks:
            config = yaml.safe_load((folder / f"{base}_{subtask}.yaml").read_text(encoding="utf-8"))
            assert config == {"defaults": [base, "_self_"], "subtask": subtask}
    v2 = {"longbench_v2", "longbench_v2_cot", "longbench_v2_letters", "longbench_v2_no_context"}
    others = {"longbench_e", *v2, *(f"longbench_e_{subtask}" for subtask in lb.E_SUBTASKS)}
    assert {p.stem for p in folder.glob("longbench_*.yaml")} - others == {f"longbench_{x}" for x in lb.SUBTASKS}


def test_configs_make_the_tasks():
    hydra = pytest.importorskip("hydra")
    with hydra.initialize_config_module("kvbench.conf", version_base="1.3"):
        for overrides, name in (
            (["task=longbench_e_repobench-p"], "longbench_e_repobench-p"),
            (["task=longbench", "task.subtask=2wikimqa", "task.segment_style=kvpress"], "longbench_kvpress_2wikimqa"),
            (["task=longbench_v2", "task.length=short"], "longbench_v2_short"),
            (["task=longbench_v2_no_context", "task.letters=true"], "longbench_v2_no_context_letters"),
            (["task=longbench_v2_cot", "task.length=long"], "longbench_v2_long_cot"),
            (["task=longbench_v2_letters"], "longbench_v2_letters"),
            (["task=longbench_v2", "task.variant=0shot_rag", "task.retrieved=16"], "longbench_v2_rag16"),
        ):
            assert hydra.utils.instantiate(hydra.compose("config", overrides=overrides).task).name == name


@pytest.mark.parametrize("query_aware", [False, True])
def test_it_runs_on_a_model(folder, tiny, query_aware):
    model, tokenizer = tiny
    row = {
        **ROW,
        "context": "Question: a b ?\nType: x\n" * 40,
        "input": "Question: c ?\nType:",
        "all_classes": ["x", "y"],
    }
    write(folder / "longbench" / "trec.jsonl", [{**row, "_id": i, "answers": ["x"]} for i in "pq"])
    task = LongBench("trec", max_length=600)
    full, small = run_stacks(model, tokenizer, task, [Full(), StreamingLLM(64)], query_aware=query_aware)
    assert [r["sample_id"] for r in small.rows] == ["longbench_trec-p", "longbench_trec-q"]
    for run in (full, small):
        for result in run.rows:
            assert result["n_prompt_tokens"] == 601 and result["n_generated"] <= 64
            assert set(result["details"]) == {"classification_fixed"}
            assert result["meta"]["truncated_tokens"] > 0
    assert small.rows[0]["kv_bytes_prefill_end"] < full.rows[0]["kv_bytes_prefill_end"]
    assert small.rows[0]["prompt_sha256"] == full.rows[0]["prompt_sha256"]


# -- version 2 -------------------------------------------------------------------------------------------------------

V2_ROW = {
    "_id": "q1", "domain": "d", "sub_domain": "s", "difficulty": "easy", "length": "short", "question": " Who? \n",
    "choice_A": "Ada ", "choice_B": "Bob", "choice_C": "Cy", "choice_D": "Di", "answer": "A",
    "context": " It was $Q$ Ada. ",
}  # fmt: skip


@pytest.fixture
def v2(folder):
    """Rows, and the official prompts."""
    if not (SHARED / "prompts").is_dir():
        pytest.skip("needs ../shared/data beside the checkout")
    prompts = json.loads((SHARED / "prompts" / "longbench_v2.json").read_text(encoding="utf-8"))
    (folder / "longbench_v2" / "prompts").mkdir()
    for name, text in prompts.items():
        (folder / "longbench_v2" / "prompts" / f"{name}.txt").write_text(text, encoding="utf-8")
    rows = [V2_ROW, {**V2_ROW, "_id": "q2", "length": "long", "difficulty": "hard", "answer": "C"}]
    (folder / "longbench_v2" / "data.json").write_text(json.dumps(rows))
    return prompts


def filled(prompt, row):
    marks = {"$DOC$": "context", "$Q$": "question"} | {f"$C_{x}$": f"choice_{x}" for x in "ABCD"}
    return re.sub("|".join(map(re.escape, marks)), lambda m: row[marks[m[0]]].strip(), prompt)


def test_v2_prompts(v2, tokenizer):
    first, second = LongBenchV2().samples(tokenizer)
    assert first.prompt == filled(v2["0shot"], V2_ROW)
    assert first.context.endswith("<text>\nIt was $Q$ Ada.") and first.answer_prefix == ""
    assert first.max_new_tokens == 128 and first.references == ("A",) and second.references == ("C",)
    assert (second.meta["difficulty"], second.meta["length_bucket"]) == ("hard", "long")
    assert [s.sample_id for s in LongBenchV2(length="long").samples(tokenizer)] == ["longbench_v2_long-q2"]
    assert LongBenchV2(count=1).samples(tokenizer) == [first]
    (alone, _) = LongBenchV2("0shot_no_context").samples(tokenizer)
    assert alone.prompt == filled(v2["0shot_no_context"], V2_ROW) and alone.context.endswith("(D) Di\n\n")


def test_v2_needs_neither_file_nor_network_for_the_prompt_of_0shot(v2, folder, monkeypatch):
    (folder / "longbench_v2" / "prompts" / "0shot.txt").unlink()
    assert lb2.official_prompt("0shot", "file") == v2["0shot"]
    monkeypatch.setattr(lb2, "lm_eval_file", lambda *parts: 'doc_to_text: "Read {{context}} Answer:"')
    with pytest.raises(ValueError, match="^LongBench v2: 0shot.txt is not the official prompt, which is at https://"):
        lb2.official_prompt("0shot", "file")


def test_v2_prompt_is_that_of_lm_eval_up_to_the_form_of_the_answer(v2):
    import yaml

    shared = yaml.load(lb.lm_eval_file("longbench2", "_longbench_common_yaml"), Loader=yaml.BaseLoader)["doc_to_text"]
    ours = v2["0shot"].replace("$DOC$", "{{context}}").replace("$Q$", "{{question.strip()}}")
    for i, letter in enumerate("ABCD"):
        ours = ours.replace(f"$C_{letter}$", f"{{{{choices[{i}]}}}}")
    assert ours.partition("\n\nFormat")[0] == shared.removesuffix("\n\nAnswer:")


def test_v2_is_a_chat_where_there_is_a_template(v2, chat_tokenizer):
    sample = LongBenchV2().samples(chat_tokenizer)[0]
    text = chat_tokenizer.decode(sum(sample.segments(chat_tokenizer), []))
    assert sample.chat and text == f"<s>[user]{filled(v2['0shot'], V2_ROW)}[assistant]"


@pytest.mark.parametrize("limit", [300, 301])
def test_v2_truncation(v2, folder, chat_tokenizer, limit):
    row = {**V2_ROW, "context": "x" * 400}
    (folder / "longbench_v2" / "data.json").write_text(json.dumps([row]))
    (sample,) = LongBenchV2(max_length=limit).samples(chat_tokenizer)
    raw = filled(v2["0shot"], row)
    assert sample.prompt == raw[: limit // 2 - 1] + raw[-(limit - limit // 2) :]
    assert sample.meta["truncated_tokens"] == len(raw) + 1 - limit


@pytest.mark.parametrize(("context", "limit"), [(10**30, 120_000), (131_072, 120_000), (2048, 1500)])
def test_v2_default_max_length(v2, folder, tokenizer, monkeypatch, context, limit):
    (folder / "longbench_v2" / "data.json").write_text(json.dumps([{**V2_ROW, "context": "x" * 130_000}]))
    monkeypatch.setattr(tokenizer, "model_max_length", context)
    (sample,) = LongBenchV2().samples(tokenizer)
    assert len(sample.prompt) == limit


def test_v2_refuses_other_prompts_and_rows(v2, folder, tokenizer):
    (folder / "longbench_v2" / "data.json").write_text(json.dumps([{**V2_ROW, "answer": None}]))
    with pytest.raises(ValueError, match="^longbench_v2 row q1: lacks answer; see THUDM/LongBench-v2 on the Hub$"):
        LongBenchV2().samples(tokenizer)
    wrapped = {**V2_ROW, "context": v2["0shot"].replace("$DOC$", "It was Ada.")}
    (folder / "longbench_v2" / "data.json").write_text(json.dumps([wrapped]))
    with pytest.raises(ValueError, match="^longbench_v2 row q1: its context already holds the prompt, as in mirrors"):
        LongBenchV2().samples(tokenizer)
    prompt, task = folder / "longbench_v2" / "prompts" / "0shot_cot.txt", LongBenchV2("0shot_cot", source="file")
    (folder / "longbench_v2" / "data.json").write_text(json.dumps([V2_ROW]))
    prompt.write_text("$DOC$ $Q$?")
    with pytest.raises(ValueError, match="^LongBench v2: 0shot_cot.txt is not the official prompt, which is at http"):
        task.samples(tokenizer)
    prompt.unlink()
    with pytest.raises(ValueError, match="store https://raw.githubusercontent.com/THUDM/LongBench/.*/0shot_cot.txt as"):
        task.samples(tokenizer)
    assert set(VARIANTS) < set(v2)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is C**", "C"),
        ("The correct answer is *(D)*", "D"),
        ("The correct answer is A or so. The correct answer is (B)", "B"),
        ("the correct answer is (B)", None),
        ("The correct answer is (E)", None),
        ("B", None),
        ("", None),
    ],
)
def test_v2_answers(v2, tokenizer, answer, letter):
    assert chosen_letter(answer) == letter
    sample = replace(LongBenchV2().samples(tokenizer)[0], references=("B",))
    assert LongBenchV2().score(sample, answer) == float(letter == "B")
    assert LongBenchV2().details(sample, answer) == {"compensated": 0.25 if letter is None else float(letter == "B")}


def test_v2_letters_are_chosen_by_likelihood_on_the_compressed_cache(v2, folder, tiny):
    """Against the log-probabilities of a plain forward; a cache of four tokens gives others."""
    model, tokenizer = tiny
    task = LongBenchV2(letters=True)
    (folder / "longbench_v2" / "data.json").write_text(json.dumps([{**V2_ROW, "context": "So it was. " * 20}]))
    (sample,) = task.samples(tokenizer)
    assert sample.prompt.endswith('here)".\n\nThe correct answer is (') and sample.max_new_tokens == 1
    assert task.name == "longbench_v2_letters" and sample.choices == ("A", "B", "C", "D")
    full, harsh = run_stacks(model, tokenizer, task, [Full(), StreamingLLM(budget=4)])
    ids = torch.tensor([sum(sample.segments(tokenizer), [])])
    expected = model(ids).logits[0, -1].log_softmax(-1)[sample.choice_tokens(tokenizer)].tolist()
    (row,) = full.rows
    assert row["details"]["choice_logp"] == pytest.approx(expected, abs=1e-4)
    assert row["prediction"] == "ABCD"[expected.index(max(expected))] and row["truncated"] is False
    assert row["score"] == float(row["prediction"] == "A") == row["details"]["compensated"]
    assert harsh.rows[0]["details"]["choice_logp"] != pytest.approx(expected, abs=1e-2)
    assert [task.score(sample, said) for said in ("A", " A", "B", "The correct answer is (A)")] == [1, 1, 0, 0]


def test_choices_of_several_tokens_are_refused(v2, tokenizer):
    sample = replace(LongBenchV2(letters=True).samples(tokenizer)[0], choices=("A", "BB"))
    with pytest.raises(ValueError, match="^longbench_v2_letters-q1: the choices A, BB must be one token each$"):
        sample.choice_tokens(tokenizer)


def test_v2_letters_begin_the_reply_of_a_chat_model(v2, chat_tokenizer):
    sample = LongBenchV2(letters=True).samples(chat_tokenizer)[0]
    text = chat_tokenizer.decode(sum(sample.segments(chat_tokenizer), []))
    assert text.endswith('here)".[assistant]The correct answer is (')


def test_v2_thinks_first_and_is_asked_for_the_choice_without_the_text(v2, folder, tiny, chat_tokenizer):
    model, tokenizer = tiny
    task = LongBenchV2("0shot_cot", temperature=0)
    first, _ = task.samples(tokenizer)
    assert first.prompt == filled(v2["0shot_cot"], V2_ROW) and first.max_new_tokens == 1024
    second = first.second_call(" I think $Q$.\n")
    assert second.prompt == filled(v2["0shot_cot_ans"], V2_ROW).replace("$COT$", "I think $Q$.")
    assert "Ada." not in second.prompt and second.max_new_tokens == 128 and second.then is None
    chat = task.samples(chat_tokenizer)[0].second_call("x")
    assert chat_tokenizer.decode(sum(chat.segments(chat_tokenizer), [])).startswith("<s>[user]Please read")

    class Short(LongBenchV2):
        def samples(self, tokenizer):
            return [
                replace(s, max_new_tokens=9 + i, then=replace(s.then, max_new_tokens=7))
                for i, s in enumerate(super().samples(tokenizer))
            ]

    short = Short("0shot_cot", temperature=0, max_length=500)
    stacks = [Full(), StreamingLLM(budget=16)]
    together, alone = (run_stacks(model, tokenizer, short, stacks, batch_size=size) for size in (2, 1))
    for run, single in zip(together, alone, strict=True):
        for sample, row, other in zip(short.samples(tokenizer), run.rows, single.rows, strict=True):
            thought = row["details"]["first_answer"]
            prompt = torch.tensor([sum(sample.second_call(thought).segments(tokenizer), [])])
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, do_sample=False)
            new = out[0, prompt.shape[1] :]
            assert row["prediction"] == tokenizer.decode(new, skip_special_tokens=True) == other["prediction"]
            assert row["score"] == 0 and row["details"]["compensated"] == 0.25
            assert row["n_generated"] <= sample.max_new_tokens + 7 and "turn_scores" not in row["details"]
    assert together[0].rows[0]["details"]["first_answer"] != together[1].rows[0]["details"]["first_answer"]


def test_v2_second_call_is_in_the_hash_and_survives_the_disk(v2, tokenizer, tmp_path):
    task = LongBenchV2("0shot_cot")
    made, kept = (prepare_v2(task, tokenizer, folder=tmp_path / "kept") for _ in range(2))
    assert [p.sample for p in made] == [p.sample for p in kept] and kept[0].sample.then is not None
    other = replace(made[0], sample=replace(made[0].sample, then=None))
    assert other.sha256 != made[0].sha256 == kept[0].sha256
    letters = prepare_v2(LongBenchV2(letters=True), tokenizer, folder=tmp_path / "kept")
    assert prepare_v2(LongBenchV2(letters=True), tokenizer, folder=tmp_path / "kept")[0].sample == letters[0].sample


def prepare_v2(task, tokenizer, **options):
    return prepare(task, tokenizer, query_aware=False, context_limit=None, **options)


def test_v2_retrieved_chunks_stand_in_the_order_of_the_text(v2, folder, tokenizer):
    found = [{"content": text, "c_idx": at} for text, at in (("third ", 30), ("first", 2), ("unused", 1))]
    rows = [{**V2_ROW, "retrieved_context": found}]
    (folder / "longbench_v2" / "data.json").write_text(json.dumps(rows))
    (sample,) = LongBenchV2("0shot_rag", retrieved=2).samples(tokenizer)
    text = "Retrieved chunk 1: first\n\nRetrieved chunk 2: third"
    assert sample.prompt == filled(v2["0shot_rag"], {**V2_ROW, "context": text})
    assert sample.sample_id == "longbench_v2_rag2-q1" and sample.max_new_tokens == 128
    (folder / "longbench_v2" / "data.json").write_text(json.dumps([V2_ROW]))
    with pytest.raises(ValueError, match="^longbench_v2_rag2 row q1: needs retrieved_context, .* set task.path$"):
        LongBenchV2("0shot_rag", retrieved=2).samples(tokenizer)


def test_v2_prompts_are_pinned_by_their_hash(v2):
    for name, beginning in DIGESTS.items():
        assert lb.digest(v2[name]).startswith(beginning)


def test_too_long_a_prompt_names_the_field_that_helps(folder, v2, tokenizer):
    write(folder / "longbench" / "hotpotqa.jsonl", [{**ROW, "context": "x" * 900}])
    for task in (LongBench("hotpotqa", max_length=10**6), LongBenchV2(max_length=10**6)):
        with pytest.raises(ValueError, match=r"context of 300; use a smaller task.max_length or another model \("):
            prepare(task, tokenizer, query_aware=False, context_limit=300)
