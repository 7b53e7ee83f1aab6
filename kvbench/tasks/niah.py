"""Needle in a haystack: one code, noted at a chosen depth of a text of chosen length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvbench.corpus import rng_for
from kvbench.tasks.sample import Sample, check, draw_keys, draw_value, exact_value, fitted, haystack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Niah:
    """The grid lengths x depths x repeats, in this order.

    lengths: tokens of prompt and answer together
    depths: place of the needle in percent of the haystack's sentences; 0 is the very beginning, 100 the very end
    repeats: prompts per cell; each has its own haystack, key and value
    seed: data seed; a prompt is a function of (seed, name, length, depth and repeat), whatever else is in the grid
    """

    kind: ClassVar[str] = "generate"

    lengths: tuple[int, ...] = (512, 1024, 2048)
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    repeats: int = 5
    seed: int = 0
    name: str = "niah"

    def __post_init__(self) -> None:
        for field in ("lengths", "depths"):
            if not getattr(self, field):
                raise ValueError(f"{field} is empty: give at least one")
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for length in self.lengths:
            check("lengths", length, 1, None)
        for depth in self.depths:
            check("depths", depth, 0, 100)
        check("repeats", self.repeats, 1, 10_000)
        check("seed", self.seed, 0, None)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        grid = [(n, d, r) for n in self.lengths for d in self.depths for r in range(self.repeats)]
        return [self._sample(tokenizer, *cell) for cell in grid]

    def score(self, sample: Sample, prediction: str) -> float:
        return exact_value(prediction, sample.references)

    def _sample(self, tokenizer: PreTrainedTokenizerBase, length: int, depth: float, repeat: int) -> Sample:
        rng = rng_for(self.seed, self.name, length, round(depth * 100) * 10_000 + repeat)
        text = haystack(rng, length)
        (key,) = draw_keys(rng, 1, hard=False, taken="".join(text))
        return fitted(
            tokenizer,
            sample_id=f"{self.name}-{length}-d{depth:g}-s{self.seed}-{repeat:05d}",
            task=self.name,
            length=length,
            text=text,
            facts=[(key, draw_value(rng))],
            shares=[depth / 100],
            asked=0,
            meta={"needles": 1, "depth": depth, "seed": self.seed, "index": repeat},
        )
