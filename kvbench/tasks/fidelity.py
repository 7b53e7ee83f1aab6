"""Fidelity without labels: how far do the predictions on a compressed cache drift from those on the full one?

At every position of a text that both read, teacher-forced: the divergence KL(full || compressed) of the distributions
of the next token, and whether the same token comes first in both. No right answers are needed, so any model and any
text will do, and a loss shows long before a score on a benchmark moves; but not all drift is damage.

The score of a sample is its top-1 agreement. Its details hold the mean divergence (`kl`), divergence and agreement by
position (`kl_bins`, `agreement_bins`, which end at the positions `bins`: 1, 2, 4, ...), and what the text costs more
in nats per token (`nll_difference`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench.tasks.ppl import Windows
from kvbench.tasks.sample import Sample, check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Fidelity(Windows):
    """On texts, generated or your own; see `Windows`."""

    kind: ClassVar[str] = "fidelity"

    score_tokens: int = 128
    name: str = "fidelity"


@dataclass(frozen=True)
class FidelityOf:
    """On the prompts of another task, and what the full cache itself answers: up to `tokens` tokens, greedily.

    of: the task, one whose answers are generated; its right answers, stops and further questions do not matter
    chunk: see `Windows`
    """

    kind: ClassVar[str] = "fidelity"

    of: Any
    tokens: int = 64
    chunk: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        check("tokens", self.tokens, 1, None)
        if self.chunk is not None:
            check("chunk", self.chunk, 1, None)
        if self.of.kind != "generate":
            raise ValueError(f"of={self.of.name}: its prompts have no answers to generate; use task=fidelity for texts")
        object.__setattr__(self, "name", self.name or f"fidelity_{self.of.name}")

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        return [
            replace(
                sample, sample_id=f"{self.name}-{self.tokens}-{sample.sample_id}", task=self.name, references=(),
                stop=(), choices=(), turns=(), then=None, max_new_tokens=self.tokens, min_new_tokens=1,
            )
            for sample in self.of.samples(tokenizer)
        ]  # fmt: skip

    def score(self, sample: Sample, prediction: str) -> float:
        raise TypeError(f"task {self.name!r} is scored by comparison with the full cache, not by generated text")
