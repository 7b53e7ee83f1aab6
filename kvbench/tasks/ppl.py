"""Perplexity behind a compressed prefix: what does the text cost once its beginning is only remembered in part?"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

from kvbench.corpus import rng_for, sentences
from kvbench.tasks.sample import Sample, bos, check, encode, largest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Ppl:
    """`count` documents: the first `prefix` tokens are the context, about `score_tokens` more are scored in one pass.

    The continuation is `references[0]`; tokenised by itself it follows the context. Both are cut between words, so
    they are exact where every word is a token and a little shorter elsewhere.
    seed: data seed; document i is a function of (seed, name, prefix + score_tokens, i)
    """

    kind: ClassVar[str] = "nll"

    prefix: int = 1024
    score_tokens: int = 256
    count: int = 16
    seed: int = 0
    name: str = "ppl"

    def __post_init__(self) -> None:
        check("prefix", self.prefix, 2, None)
        check("score_tokens", self.score_tokens, 1, None)
        check("count", self.count, 1, None)
        check("seed", self.seed, 0, None)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        return [self._sample(tokenizer, i) for i in range(self.count)]

    def score(self, sample: Sample, prediction: str) -> float:
        raise TypeError(f"task {self.name!r} is scored by the likelihood of its references, not by generated text")

    def _sample(self, tokenizer: PreTrainedTokenizerBase, i: int) -> Sample:
        length = self.prefix + self.score_tokens
        text = "".join(islice(sentences(rng_for(self.seed, self.name, length, i)), 8 + length // 4))
        context = _first(tokenizer, text, self.prefix - len(bos(tokenizer)))
        continuation = _first(tokenizer, text[len(context) :], self.score_tokens)
        return Sample(
            sample_id=f"{self.name}-{self.prefix}+{self.score_tokens}-s{self.seed}-{i:05d}",
            task=self.name,
            context=context,
            query="",
            answer_prefix="",
            references=(continuation,),
            max_new_tokens=0,
            length=length,
            meta={
                "prefix_tokens": len(bos(tokenizer)) + len(encode(tokenizer, context)),
                "score_tokens": len(encode(tokenizer, continuation)),
                "seed": self.seed,
                "index": i,
            },
        )


def _first(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> str:
    """The longest beginning of `text` that ends before a blank or a new line and has at most so many tokens."""
    text = text[: 12 * tokens + 64]
    cuts = [0, *(i for i, letter in enumerate(text) if letter in " \n" and i)]
    return text[: cuts[max(0, largest(len(cuts) - 1, lambda n: len(encode(tokenizer, text[: cuts[n]])) <= tokens))]]
