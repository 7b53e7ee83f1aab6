"""Many questions on one compressed context: does what was kept for the first serve the others?

Eviction that has seen the first question (query-aware) can look perfect on it and fall on all others, which a benchmark
of one question per context does not show. The idea is that of SCBench (Li et al., 2024, arXiv:2412.10319,
https://github.com/microsoft/MInference, scbench/); the text is kvbench's own, see `kvbench.tasks.Recall`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from kvbench.corpus import rng_for
from kvbench.tasks.recall import Recall
from kvbench.tasks.sample import ANSWER_PREFIX, QUERY, Sample, Turn, check, encode, exact_value

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HISTORIES = ("gold", "own", "none")


@dataclass(frozen=True)
class MultiQuery:
    """Contexts with `needles` noted codes, of which `queries` different ones are asked for, one after the other.

    Sample i is that of `Recall` by this name, with further questions about other keys, in an order drawn beside it.
    length: tokens of the context, the first question and its answer; the other turns come on top
    history: what stands before a further question: the "gold" answers, the model's "own", or "none" (multi-request:
        every question is asked of the cache as the context left it)
    """

    kind: ClassVar[str] = "generate"

    length: int = 1024
    needles: int = 8
    queries: int = 4
    count: int = 32
    hard: float = 0.25
    history: str = "gold"
    seed: int = 0
    name: str = "multi_query"

    def __post_init__(self) -> None:
        check("needles", self.needles, 1, 64)
        check("queries", self.queries, 1, self.needles)
        check_history(self.history)
        self._recall()

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        return [self._with_turns(tokenizer, sample) for sample in self._recall().samples(tokenizer)]

    def score(self, sample: Sample, prediction: str) -> float:
        return exact_value(prediction, sample.references)

    def _recall(self) -> Recall:
        return Recall(self.length, self.needles, self.count, self.hard, self.seed, self.name)

    def _with_turns(self, tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Sample:
        facts = dict(note_of(sample.context[begin:end]) for begin, end in sample.meta["spans"])
        others = sorted(facts.keys() - {sample.meta["key"]})
        rng = rng_for(self.seed, self.name, "turns", self.length, sample.meta["index"])
        closing = "" if self.history == "none" else " ."  # of the answer before
        turns = tuple(
            Turn(
                closing + QUERY.format(key=key),
                ANSWER_PREFIX.format(key=key),
                (facts[key],),
                len(encode(tokenizer, " " + facts[key])) + 2,
            )
            for key in rng.sample(others, self.queries - 1)
        )
        return replace(
            sample,
            sample_id=f"{sample.sample_id}-{self.queries}q",
            turns=turns,
            meta={**sample.meta, "queries": self.queries},
        )


def note_of(note: str) -> tuple[str, str]:
    """(key, value) of a note as `kvbench.tasks.sample.NOTE` writes it."""
    adjective, noun, *value = note.split()[4:-1]
    return f"{adjective} {noun}", " ".join(value)


def check_history(history: str) -> None:
    if history not in HISTORIES:
        raise ValueError(f"history={history!r} is not one of {', '.join(HISTORIES)}")
