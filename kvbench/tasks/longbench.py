"""LongBench v1, 21 tasks, and LongBench-E, 13 of them balanced by length.

Bai et al., https://arxiv.org/abs/2308.14508; https://github.com/THUDM/LongBench (folder LongBench).

Prompts are the official ones: read from the installed lm-eval package, whose copies lost a blank or an empty line in
six tasks, repaired, and refused if they are still not the official text. A prompt longer than `max_length` tokens loses
its middle, before any chat template. Six tasks never get a chat template; elsewhere the whole prompt is the user's
message.

Deviations.
    Context, query and answer prefix are tokenised one by one (`kvbench.tasks.Sample`), so that a cache can be
        compressed between them; the official code tokenises the prompt as a whole. The text is the same.
    Each row is scored with its own classes; the official code applies those of the last row to all.
    The tokenizer's own chat template is used; the official code has a hand-written one per model.
    Where a row has no `_id`, or rows share one, the row's number stands for it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench.tasks import longbench_metrics as metrics
from kvbench.tasks.chat import MODES, wants_chat
from kvbench.tasks.official import lm_eval_file
from kvbench.tasks.sample import Sample, check, encode
from kvbench.tasks.source import Hub, check_source, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Metric, and the beginning of the SHA-256 of the official prompt with its {context} and {input}.
SUBTASKS = {
    "narrativeqa": ("qa_f1", "aada7ed24b06"),
    "qasper": ("qa_f1", "0fbdd123fe7f"),
    "multifieldqa_en": ("qa_f1", "20b4666a2de8"),
    "multifieldqa_zh": ("qa_f1_zh", "344b3a4e557c"),
    "hotpotqa": ("qa_f1", "9ec4ae308865"),
    "2wikimqa": ("qa_f1", "9ec4ae308865"),
    "musique": ("qa_f1", "9ec4ae308865"),
    "dureader": ("rouge_l_zh", "ae53329f51b1"),
    "gov_report": ("rouge_l", "91c25d585b18"),
    "qmsum": ("rouge_l", "dca23b678fe0"),
    "multi_news": ("rouge_l", "2af3f28c40b9"),
    "vcsum": ("rouge_l_zh", "3e5d8241bc9b"),
    "trec": ("classification", "0eff8bebdba9"),
    "triviaqa": ("qa_f1", "00a802e6377e"),
    "samsum": ("rouge_l", "a68d88423490"),
    "lsht": ("classification", "f3edabdf7fae"),
    "passage_count": ("count", "986550b6c610"),
    "passage_retrieval_en": ("retrieval", "39b96b7fa52b"),
    "passage_retrieval_zh": ("retrieval_zh", "c1e2346e245e"),
    "lcc": ("edit_similarity", "6a1f24cf0bb8"),
    "repobench-p": ("edit_similarity", "ee9ec182ea5f"),
}
E_SUBTASKS = tuple(
    "qasper multifieldqa_en hotpotqa 2wikimqa gov_report multi_news trec triviaqa samsum passage_count "
    "passage_retrieval_en lcc repobench-p".split()
)
# The tasks whose unweighted mean papers on KV caches report. passage_count is near zero for most models and adds noise,
# so papers also give the mean of the other 15.
KV_SUBTASKS = tuple(
    "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique gov_report qmsum multi_news trec triviaqa samsum "
    "passage_count passage_retrieval_en lcc repobench-p".split()
)
FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")  # only the first line of an answer counts
NO_CHAT = (*FEW_SHOT, "lcc", "repobench-p")
LENGTH_BUCKETS = ("0-4k", "4-8k", "8k+")
REVISION = "f72191f71cd6fcd0da8a54f0915078efda579449"
SEGMENT_STYLES = ("template", "kvpress")


@dataclass(frozen=True)
class LongBench:
    """One task of LongBench, `subtask`; the score of a sample is the best over its references.

    e: its part of LongBench-E; report by meta["length_bucket"]
    max_length: tokens of the raw prompt, BOS included; the official values for contexts of 4k, 8k, 16k and 32k tokens
        are 3,500, 7,500, 15,500 and 31,500, and None is the like of it for the context of the model or the tokenizer,
        whichever is smaller
    count: how many rows, from the first; None is all
    chat: auto (a chat template where the tokenizer has one, never in the six tasks) | always | never
    thinking: whether a chat model may think first (`kvbench.tasks.chat`): the official numbers of new tokens leave no
        room for it
    segment_style: what is context, and so seen by a query-agnostic policy. "template": all up to the end of the row's
        context. "kvpress": also the instruction that follows it; the answer prefix begins the reply of a chat model
    source, path: see `kvbench.tasks.source`; <subtask>.jsonl or the official data.zip
    """

    kind: ClassVar[str] = "generate"

    subtask: str = "hotpotqa"
    e: bool = False
    max_length: int | None = None
    count: int | None = None
    chat: str = "auto"
    thinking: bool = False
    segment_style: str = "template"
    source: str = "auto"
    path: str | None = None

    def __post_init__(self) -> None:
        allowed = E_SUBTASKS if self.e else tuple(SUBTASKS)
        for field, values in (("subtask", allowed), ("chat", MODES), ("segment_style", SEGMENT_STYLES)):
            if getattr(self, field) not in values:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(values)}")
        for field, least in (("max_length", 2), ("count", 1)):
            if getattr(self, field) is not None:
                check(field, getattr(self, field), least, None)
        check_source(self.source)

    @property
    def name(self) -> str:
        style = "" if self.segment_style == "template" else f"_{self.segment_style}"
        return f"longbench{'_e' if self.e else ''}{style}_{self.subtask}"

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        file = f"{self.subtask}{'_e' if self.e else ''}.jsonl"
        names = (file, f"data/{file}", f"data.zip/data/{file}")
        hub = Hub("THUDM/LongBench", file.removesuffix(".jsonl"), revision=REVISION, file=f"data.zip/data/{file}")
        rows = load("longbench", names, hub, source=self.source, path=self.path)
        limit = self.max_length if self.max_length is not None else default_max_length(tokenizer)
        return [self._sample(tokenizer, row, row_id, limit) for row_id, row in identified(rows)[: self.count]]

    def score(self, sample: Sample, prediction: str) -> float:
        return self._best(SUBTASKS[self.subtask][0], sample, prediction)

    def details(self, sample: Sample, prediction: str) -> dict[str, float]:
        if SUBTASKS[self.subtask][0] != "classification":
            return {}
        return {"classification_fixed": self._best("classification_fixed", sample, prediction)}

    def _best(self, metric: str, sample: Sample, prediction: str) -> float:
        if self.subtask in FEW_SHOT:
            prediction = prediction.lstrip("\n").split("\n")[0]
        extra = (sample.meta["classes"],) if metric.startswith("classification") else ()
        return max((getattr(metrics, metric)(prediction, r, *extra) for r in sample.references), default=0.0)

    def _sample(self, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], row_id: str, limit: int) -> Sample:
        template, max_new_tokens = official_prompt(self.subtask)
        classes = ["all_classes"] if SUBTASKS[self.subtask][0] == "classification" else []
        asks = ["question", "answer_prefix"] if "question" in row else ["input"]
        needed = ["context", *asks, "answers", "length", *classes]
        missing = [key for key in needed if row.get(key) is None]
        if missing:
            raise ValueError(f"{self.name} row {row_id}: lacks {', '.join(missing)}; see the official data.zip")
        if "question" in row or is_wrapped(row["context"], template):
            if self.segment_style != "kvpress" or "question" not in row:
                raise ValueError(
                    f"{self.name} row {row_id}: its context already holds the prompt, as in mirrors made for kvpress: "
                    "use the official data.zip, or task.segment_style=kvpress to take such rows as they are"
                )
            parts = row["context"], row["question"], row["answer_prefix"]
        else:
            parts = split(template, row["context"], row["input"], self.segment_style)
        (context, query, prefix), dropped = middle_truncated(tokenizer, parts, limit)
        chat = wants_chat(self.chat, tokenizer) and (self.chat == "always" or self.subtask not in NO_CHAT)
        if chat and self.segment_style == "template":
            query, prefix = query + prefix, ""
        meta = {
            "row_length": row["length"],
            "length_bucket": length_bucket(row["length"]),
            "truncated_tokens": dropped,
            "cluster": digest(row["context"])[:16],
        }
        if classes:
            meta["classes"] = list(row["all_classes"])
        return Sample(
            sample_id=f"{self.name}-{row_id}",
            task=self.name,
            context=context,
            query=query,
            answer_prefix=prefix,
            references=tuple(row["answers"]),
            max_new_tokens=max_new_tokens,
            min_new_tokens=1 if self.subtask == "samsum" else 0,
            stop=("\n",) if self.subtask == "samsum" else (),
            chat=chat,
            thinking=self.thinking,
            meta=meta,
        )


@cache
def official_prompt(subtask: str) -> tuple[str, int]:
    """The prompt of a task, with {context} and {input}, and how many tokens are generated."""
    import yaml

    config = yaml.load(lm_eval_file("longbench", f"{subtask}.yaml"), Loader=yaml.BaseLoader)  # it ignores !function
    prompt = config["doc_to_text"].replace("{{context}}", "{context}").replace("{{question}}", "{input}")
    if subtask in ("triviaqa", "samsum"):
        prompt = re.sub(r"\{context}\n+\{input}", "{context}\n\n{input}", prompt)
    for ending, subtasks in ((" ", ("passage_count", "passage_retrieval_en")), ("\n", ("lcc", "repobench-p"))):
        if subtask in subtasks:
            prompt = prompt.rstrip() + ending
    if not digest(prompt).startswith(SUBTASKS[subtask][1]):
        raise ValueError(
            f"LongBench {subtask}: the prompt in the installed lm-eval is not the official one; use 0.4.13"
        )
    return prompt, int(config["generation_kwargs"]["max_gen_toks"])


def split(template: str, context: str, question: str, style: str) -> tuple[str, str, str]:
    """Context, query and answer prefix; the prefix is the cue in the last line, such as "Answer:"."""
    before, after = template.split("{context}")
    shared = ""  # what follows the context and is the same for all questions
    if style == "kvpress":
        shared = after.partition("{input}")[0]
        if "{input}" in after:
            shared = shared[: shared.rfind("\n") + 1]
        else:
            shared = after[: len(after) - len(after.lstrip("\n"))]
    rest = after[len(shared) :]
    fixed = rest.rpartition("{input}")[2]  # in few-shot tasks the row's own input ends with the cue
    cue = _cue(fixed or question)
    rest = rest.replace("{input}", question)
    return before + context + shared, rest[: len(rest) - len(cue)], cue


def _cue(text: str) -> str:
    """The last line that is not blank, with the white space after it, if it ends with a colon."""
    line = text[text.rstrip().rfind("\n") + 1 :]
    return line if line.rstrip().endswith((":", "：")) else ""


def is_wrapped(context: str, template: str) -> bool:
    """Whether a row's context already begins with the template's instruction."""
    return context.lstrip().startswith(template.split("\n")[0].strip())


def middle_truncated(
    tokenizer: PreTrainedTokenizerBase, parts: tuple[str, str, str], limit: int, at_once: bool = False
) -> tuple[tuple[str, str, str], int]:
    """The prompt without its middle, cut where it was, and how many tokens are gone.

    Its first and last limit // 2 tokens are kept and decoded one by one. at_once: they are decoded together, and where
    `limit` is odd one more of the last is kept, as in LongBench v2.
    """
    ids = list(tokenizer("".join(parts), verbose=False).input_ids)
    if len(ids) <= limit:
        return parts, 0
    first, last = ids[: limit // 2], ids[-((limit + at_once) // 2) :]
    kept = [first + last] if at_once else [first, last]
    text = "".join(str(tokenizer.decode(part, skip_special_tokens=True)) for part in kept)
    return recut(tokenizer, text, parts), len(ids) - len(first) - len(last)


def recut(tokenizer: PreTrainedTokenizerBase, text: str, parts: tuple[str, str, str]) -> tuple[str, str, str]:
    """Cuts a shortened prompt where it was cut before: exactly if query and prefix survived letter by letter.

    Where decoding changed them, or the cut goes through them, they get as many of the last letters as they have tokens
    in the text's own tokens.
    """
    _, query, prefix = parts
    lengths = [len(query), len(prefix)]
    if not text.endswith(query + prefix):
        ids = tokenizer.encode(text, add_special_tokens=False)
        tokens = [len(encode(tokenizer, part)) for part in (query + prefix, prefix)]
        tails = [len(str(tokenizer.decode(ids[max(0, len(ids) - n) :], skip_special_tokens=True))) for n in tokens]
        lengths = [tails[0] - tails[1], tails[1]]
    end = len(text) - lengths[1]
    begin = max(0, end - lengths[0])
    return text[:begin], text[begin:end], text[end:]


def default_max_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """1,000 tokens for each 1,024 of the context, less 500: the official values, and room for chat and answer."""
    limit = 1000 * (int(tokenizer.model_max_length) // 1024) - 500
    if limit < 2 or tokenizer.model_max_length > 10**9:
        raise ValueError(
            f"model and tokenizer tell no usable context ({tokenizer.model_max_length}): set task.max_length"
        )
    return limit


def identified(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Each row with its `_id`, or with its number where one has none or two share one."""
    ids = [str(row.get("_id", "")) for row in rows]
    if not all(ids) or len(set(ids)) < len(ids):
        ids = [f"{i:05d}" for i in range(len(rows))]
    return list(zip(ids, rows, strict=True))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def length_bucket(length: int) -> str:
    """The bin of LongBench-E, by the row's length in words, or Chinese characters."""
    return LENGTH_BUCKETS[0 if length < 4000 else 1 if length < 8000 else 2]
