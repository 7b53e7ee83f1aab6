"""LongBench v2: 503 questions with four choices about texts of 8k to 2M words.

Bai et al., https://arxiv.org/abs/2412.15204; https://github.com/THUDM/LongBench.

The answer is the letter in the sentence that the prompt asks for, else it is wrong. Chance is 25 %; with 503 questions
the 95 % interval of a score is about ±4.4 points. Report it overall, by meta["difficulty"] (easy, hard) and by
meta["length_bucket"] (short, medium, long), to one decimal. Without the text ("0shot_no_context") it measures what the
model knew before.

Deviations.
    The variants with a chain of thought, with retrieval, and by the likelihood of the letters are not offered.
    Answers are drawn from kvbench's dice instead of a server's.
    Context and query are tokenised one by one; see `kvbench.tasks.longbench`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench.tasks.chat import MODES, wants_chat
from kvbench.tasks.longbench import default_max_length, digest, identified, is_wrapped, middle_truncated
from kvbench.tasks.sample import Sample, check
from kvbench.tasks.source import SOURCES, Hub, Url, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The prompts, by the beginning of their SHA-256.
VARIANTS = {"0shot": "68a162252bc9", "0shot_no_context": "125fb44183af"}
PROMPTS = "https://raw.githubusercontent.com/THUDM/LongBench/2e00731f8d0bff23dc4325161044d0ed8af94c1e/prompts"
LENGTHS = ("short", "medium", "long")
MAX_LENGTH = 120_000
KEYS = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer", "difficulty", "length")


@dataclass(frozen=True)
class LongBenchV2:
    """All questions, or those about texts of one `length`: short (up to 32k words) | medium (up to 128k) | long.

    variant: 0shot | 0shot_no_context; the prompt is prompts/<variant>.txt in the folder of the data, or is fetched from
        the official repository
    max_length: tokens of the raw prompt, BOS included, by cutting out its middle; None is the official 120,000, or what
        the tokenizer's `model_max_length` has room for
    count: how many questions, from the first; None is all
    temperature: of the answer's tokens; 0 always takes the likeliest. seed: of the dice
    """

    kind: ClassVar[str] = "generate"

    variant: str = "0shot"
    length: str | None = None
    max_length: int | None = None
    count: int | None = None
    chat: str = "auto"
    temperature: float = 0.1
    seed: int = 0
    source: str = "auto"
    path: str | None = None

    def __post_init__(self) -> None:
        choices = (("variant", VARIANTS), ("length", (None, *LENGTHS)), ("chat", MODES), ("source", SOURCES))
        for field, values in choices:
            if getattr(self, field) not in values:
                raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(map(str, values))}")
        for field, least in (("max_length", 2), ("count", 1)):
            if getattr(self, field) is not None:
                check(field, getattr(self, field), least, None)
        check("temperature", self.temperature, 0, 2)
        check("seed", self.seed, 0, None)

    @property
    def name(self) -> str:
        return "_".join(("longbench_v2", *([self.length] if self.length else []), *self.variant.split("_")[1:]))

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        hub = Hub("THUDM/LongBench-v2", split="train")
        rows = load(
            "longbench_v2", ("data.json", "data.jsonl", "data.parquet"), hub, source=self.source, path=self.path
        )
        rows = [row for row in rows if self.length in (None, row.get("length"))]
        limit = self.max_length
        if limit is None:
            unknown = tokenizer.model_max_length > 10**9
            limit = MAX_LENGTH if unknown else min(MAX_LENGTH, default_max_length(tokenizer))
        template = official_prompt(self.variant, self.source)
        return [self._sample(tokenizer, template, row, row_id, limit) for row_id, row in identified(rows)[: self.count]]

    def score(self, sample: Sample, prediction: str) -> float:
        return float(chosen_letter(prediction) in sample.references)

    def details(self, sample: Sample, prediction: str) -> dict[str, float]:
        """The score where an answer without a choice counts as a guess."""
        guess = chosen_letter(prediction) is None
        return {"compensated": 0.25 if guess else self.score(sample, prediction)}

    def _sample(
        self, tokenizer: PreTrainedTokenizerBase, template: str, row: Mapping[str, Any], row_id: str, limit: int
    ) -> Sample:
        missing = [key for key in KEYS if row.get(key) is None]
        if missing:
            raise ValueError(f"{self.name} row {row_id}: lacks {', '.join(missing)}; see THUDM/LongBench-v2 on the Hub")
        if is_wrapped(row["context"], template):
            raise ValueError(
                f"{self.name} row {row_id}: its context already holds the prompt, as in mirrors made for kvpress: use "
                "THUDM/LongBench-v2"
            )
        before, document, rest = template.rpartition("$DOC$")
        for mark in ("Q", "C_A", "C_B", "C_C", "C_D"):
            key = "question" if mark == "Q" else mark.replace("C_", "choice_")
            rest = rest.replace(f"${mark}$", row[key].strip())
        if document:
            context, query = before + row["context"].strip(), rest
        else:  # the question and its choices are what can be compressed
            head, gap, query = rest.rpartition("\n\n")
            context = head + gap
        (context, query, _), dropped = middle_truncated(tokenizer, (context, query, ""), limit, at_once=True)
        return Sample(
            sample_id=f"{self.name}-{row_id}",
            task=self.name,
            context=context,
            query=query,
            answer_prefix="",
            references=(row["answer"],),
            max_new_tokens=128,
            chat=wants_chat(self.chat, tokenizer),
            meta={
                "difficulty": row["difficulty"],
                "length_bucket": row["length"],
                "domain": row.get("domain"),
                "sub_domain": row.get("sub_domain"),
                "truncated_tokens": dropped,
                "cluster": digest(row["context"])[:16],
            },
        )


def official_prompt(variant: str, source: str) -> str:
    """The prompt, with $DOC$, $Q$ and $C_A$ to $C_D$."""
    file = f"{variant}.txt"
    (row,) = load("longbench_v2", (f"prompts/{file}", file), Url(f"{PROMPTS}/{file}"), source=source)
    if not digest(row["text"]).startswith(VARIANTS[variant]):
        raise ValueError(f"LongBench v2: {file} is not the official prompt, which is at {PROMPTS}/{file}")
    return str(row["text"])


def chosen_letter(answer: str) -> str | None:
    answer = answer.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", answer) or re.search(
        r"The correct answer is ([A-D])", answer
    )
    return found[1] if found else None
