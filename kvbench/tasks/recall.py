"""Key-value recall: several codes are noted in filler text, one is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvbench.corpus import rng_for
from kvbench.tasks.sample import Sample, check, draw_keys, draw_value, exact_value, fitted, haystack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Recall:
    """Prompts of at most `length` tokens, answer included, with `needles` notes spread over the text.

    length: tokens of prompt and answer together
    needles: notes in each prompt; their keys are distinct
    count: how many prompts
    hard: share of the prompts in which keys share their adjective or noun with other keys
    seed: data seed; prompt i is a function of (seed, name, length, i), `needles` and `hard`
    """

    kind: ClassVar[str] = "generate"

    length: int = 1024
    needles: int = 8
    count: int = 64
    hard: float = 0.25
    seed: int = 0
    name: str = "recall"

    def __post_init__(self) -> None:
        check("length", self.length, 1, None)
        check("needles", self.needles, 1, 64)
        check("count", self.count, 1, None)
        check("hard", self.hard, 0, 1)
        check("seed", self.seed, 0, None)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        return [self._sample(tokenizer, i) for i in range(self.count)]

    def score(self, sample: Sample, prediction: str) -> float:
        return exact_value(prediction, sample.references)

    def _sample(self, tokenizer: PreTrainedTokenizerBase, i: int) -> Sample:
        rng = rng_for(self.seed, self.name, self.length, i)
        hard = rng.random() < self.hard
        text = haystack(rng, self.length)
        facts = [(key, draw_value(rng)) for key in draw_keys(rng, self.needles, hard, "".join(text))]
        shares = [(n + rng.random()) / self.needles for n in range(self.needles)]
        asked = rng.randrange(self.needles)
        return fitted(
            tokenizer,
            sample_id=f"{self.name}-{self.length}-{self.needles}n-s{self.seed}-{i:05d}",
            task=self.name,
            length=self.length,
            text=text,
            facts=facts,
            shares=shares,
            asked=[asked],
            meta={"needles": self.needles, "hard": hard, "seed": self.seed, "index": i},
        )
