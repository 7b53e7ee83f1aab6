"""SCBench: many questions on one long context, score by turn (Li et al., ICLR 2025, arXiv:2412.10319).

Official repository: https://github.com/microsoft/MInference (scbench/), data: https://huggingface.co/datasets/microsoft/SCBench.
The finding to look for: query-aware eviction does well on the first turn and falls on later ones.

Tasks, new tokens per turn and metric as officially:
    kv, prefix_suffix   150  the value stands in the answer
    vt                   30  share of the variables that stand in the answer
    many_shot            10  an accepted answer stands in the answer, whatever its case
    qa_eng               40  as many_shot
    qa_chn               40  overlap of characters (F1), the best over the accepted answers
    summary             200  ROUGE-Lsum

Deviations: `no_instruction`: prompts are the context, a blank line and the question; the line that some tasks
officially put before the context, and the frame of a question, can be given as `before` and `ask`. `left_out`: repoqa,
choice_eng, mf and the mixed tasks, which need templates or graders of their own. `joined_answers`: in the history, the
variables of vt stand with blanks between; of several accepted answers, the first. `limit`: contexts that do not fit are
refused, unless a limit is given; then the middle of the first prompt is cut.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench.tasks.chat import wants_chat
from kvbench.tasks.longbench import middle_truncated
from kvbench.tasks.longbench_metrics import CHINESE_PUNCTUATION, overlap
from kvbench.tasks.multi_query import check_history
from kvbench.tasks.sample import Sample, Turn, check
from kvbench.tasks.source import Hub, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SCBench:
    """One task of SCBench, called `task`.

    history: "gold" answers (official default), the model's "own", or "none" (multi-request)
    before: text before the context; ask: the frame of a question, with {input} where it stands
    limit: cut the middle of contexts until the first prompt has at most so many tokens (None: refuse what is too long)
    count: the first so many contexts (None: all); turns: the first so many questions of each (None: all)
    """

    kind: ClassVar[str] = "generate"

    task: str = "kv"
    count: int | None = None
    turns: int | None = None
    history: str = "gold"
    before: str = ""
    ask: str = "{input}"
    limit: int | None = None
    chat: str = "auto"
    source: str = "auto"
    path: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is not one of {', '.join(TASKS)}")
        for field in ("count", "turns", "limit"):
            if getattr(self, field) is not None:
                check(field, getattr(self, field), 1, None)
        check_history(self.history)
        if "{input}" not in self.ask:
            raise ValueError(f"ask={self.ask!r} has no {{input}}, where the question goes")
        object.__setattr__(self, "name", self.name or f"scbench_{self.task}")

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        file = f"scbench_{self.task}.jsonl"
        remote = Hub("microsoft/SCBench", file=f"data/{file}")
        rows = load("scbench", (file,), remote, source=self.source, path=self.path)
        chat = wants_chat(self.chat, tokenizer)
        return [self._sample(tokenizer, row, i, chat) for i, row in enumerate(rows[: self.count])]

    def score(self, sample: Sample, prediction: str) -> float:
        return TASKS[self.task][1](prediction, sample.references)

    def _sample(self, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], i: int, chat: bool) -> Sample:
        new_tokens = TASKS[self.task][0]
        turns: list[Turn] = []
        for turn in row["multi_turns"][: self.turns]:
            answer = turn["answer"]
            answers = [str(a) for a in answer] if isinstance(answer, list) else [str(answer)]
            references = (" ".join(answers),) if self.task == "vt" else tuple(answers)
            # A later message of a chat begins by itself.
            line = "" if chat and turns and self.history != "none" else "\n\n"
            turns.append(Turn(line + self.ask.replace("{input}", turn["input"]), "", references, new_tokens))
        parts, gone = (self.before + (row["context"] if "context" in row else row["input"]), turns[0].query, ""), 0
        if self.limit is not None:
            parts, gone = middle_truncated(tokenizer, parts, self.limit)
        return Sample(
            sample_id=f"{self.name}-{i:05d}-{len(turns)}t",
            task=self.name,
            context=parts[0],
            query=parts[1],
            answer_prefix="",
            references=turns[0].references,
            max_new_tokens=new_tokens,
            chat=chat,
            turns=tuple(turns[1:]),
            meta={"id": str(row.get("id", i)), "index": i, "truncated_tokens": gone},
        )


def _value(prediction: str, references: Sequence[str]) -> float:
    return float(references[0] in prediction)


def _variables(prediction: str, references: Sequence[str]) -> float:
    names = references[0].lower().split()
    return round(sum(name in prediction.lower() for name in names) / len(names), 2)


def _any(prediction: str, references: Sequence[str]) -> float:
    return float(any(reference.upper() in prediction.upper() for reference in references))


def _characters(prediction: str, references: Sequence[str]) -> float:
    dropped = {*string.punctuation, *string.whitespace, *CHINESE_PUNCTUATION}
    said, *accepted = ([x for x in text.lower() if x not in dropped] for text in (prediction, *references))
    return max(overlap(said, reference) for reference in accepted)


def _summary(prediction: str, references: Sequence[str]) -> float:
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    except ImportError as error:
        raise ValueError("scbench_summary is scored by rouge-score: pip install 'kvbench[lm-eval]'") from error
    return float(RougeScorer(["rougeLsum"]).score(references[0], prediction)["rougeLsum"].fmeasure)


TASKS: dict[str, tuple[int, Callable[[str, Sequence[str]], float]]] = {
    "kv": (150, _value),
    "prefix_suffix": (150, _value),
    "vt": (30, _variables),
    "many_shot": (10, _any),
    "qa_eng": (40, _any),
    "qa_chn": (40, _characters),
    "summary": (200, _summary),
}
