"""The one record every benchmark produces, and the helpers that fit text to a token length."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from kvbench.corpus import sentences, words

if TYPE_CHECKING:
    import random

    from transformers import PreTrainedTokenizerBase

NUMBERS_PER_VALUE = 3
QUERY = "\nquestion : which code for {key} ?\n"
ANSWER_PREFIX = "answer : code for {key}"
NOTE = "note : code for {key} {value} ."


@dataclass(frozen=True)
class Turn:
    """A further question about the same context, asked of the cache as the turns before it left it."""

    query: str
    answer_prefix: str
    references: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Sample:
    """One prompt in three segments and what counts as right.

    The prompt is `context + query + answer_prefix`: the segments are tokenised one by one without special tokens, and
    BOS comes first where the tokenizer has one. A cache may be compressed after the context (query unseen) or after
    the whole prompt.

    sample_id: unique within a project; the same id is the same prompt, whatever else was drawn beside it
    references: accepted answers, without leading blank for "generate" tasks; the continuation for "nll" tasks
    length: requested tokens, answer included
    chat: whether context + query are the user's message to a chat model, and the answer prefix begins its reply
    min_new_tokens: so many tokens are generated before a stop counts
    turns: further questions
    meta: cluster (samples of one share a context), depth in percent (as asked for, or else as measured in tokens of the context without the needle), needle text
        and its character span in `context`, seed, ...
    """

    sample_id: str
    task: str
    context: str
    query: str
    answer_prefix: str
    references: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    length: int = 0
    chat: bool = False
    min_new_tokens: int = 0
    turns: tuple[Turn, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        return self.context + self.query + self.answer_prefix

    def segments(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
        """Token ids of context (with BOS), query and answer prefix; their concatenation is the prompt."""
        context, query, prefix = (encode(tokenizer, s) for s in (self.context, self.query, self.answer_prefix))
        return bos(tokenizer) + context, query, prefix


def bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def exact_value(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the stripped prediction starts with a whole reference value, else 0.0.

    A longer number is another value: "47 82 190" does not answer "47 82 19".
    """
    text = " ".join(prediction.split())
    return float(any(re.match(re.escape(r) + r"(?!\w)", text) for r in references))


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n in 0..most for which a monotone `fits` holds, or -1 if not even 0 does."""
    low, high = -1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def draw_value(rng: random.Random) -> str:
    return " ".join(f"{rng.randrange(100):02d}" for _ in range(NUMBERS_PER_VALUE))


def draw_keys(rng: random.Random, count: int, hard: bool, taken: str = "") -> list[str]:
    """`count` distinct adjective-noun keys that do not occur in the text `taken`.

    Hard keys come from a small grid, so that most share an adjective with one key and a noun with another.
    """
    vocabulary = words()
    side = 2
    while side * side < 1.5 * count:
        side += 1
    rows, columns = (side, side) if hard else (len(vocabulary.adjectives), len(vocabulary.nouns))
    adjectives, nouns = rng.sample(vocabulary.adjectives, rows), rng.sample(vocabulary.nouns, columns)
    if hard:
        grid = [f"{a} {n}" for a in adjectives for n in nouns]
        free = [key for key in rng.sample(grid, len(grid)) if key not in taken]
    else:
        free = [key for key in map(" ".join, zip(adjectives, nouns, strict=False)) if key not in taken]
    if len(free) < count:
        raise ValueError(f"needles={count}: at most {len(free)} distinct keys are available")
    return free[:count]


def check(field: str, value: float, least: float, most: float | None) -> None:
    """Refuse a field outside its range, in one line."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{field}={value!r}: must be a number, {allowed}")


def haystack(rng: random.Random, length: int) -> list[str]:
    """More sentences of one document than `length` tokens can hold, each with its separator in front."""
    return list(islice(sentences(rng), 8 + length // 6))


def place(text: Sequence[str], notes: Sequence[tuple[int, str]]) -> tuple[str, list[tuple[int, int]]]:
    """Join sentences, each note standing after so many of them.

    notes: (sentences before it, note), ascending. Returns the context and each note's character span in it.
    """
    if text and notes and notes[0][0] == 0:
        text = [" " + text[0], *text[1:]]
    context, spans, begin = "", [], 0
    for after, note in notes:
        context += "".join(text[begin:after])
        context += " " if context else ""
        spans.append((len(context), len(context) + len(note)))
        context, begin = context + note, after
    return context + "".join(text[begin:]), spans


def fitted(
    tokenizer: PreTrainedTokenizerBase,
    sample_id: str,
    task: str,
    length: int,
    text: Sequence[str],
    facts: Sequence[tuple[str, str]],
    shares: Sequence[float],
    asked: int,
    meta: dict[str, Any],
) -> Sample:
    """The sample with as many sentences of `text` as fit: prompt and answer have at most `length` tokens.

    facts: (key, value) pairs, noted in this order; shares: how much of the text, in [0, 1], stands before each note.
    """
    notes = [NOTE.format(key=key, value=value) for key, value in facts]
    key, value = facts[asked]
    query, prefix = QUERY.format(key=key), ANSWER_PREFIX.format(key=key)
    answer = len(encode(tokenizer, " " + value))
    fixed = len(bos(tokenizer)) + len(encode(tokenizer, query)) + len(encode(tokenizer, prefix)) + answer

    def context(count: int) -> tuple[str, list[tuple[int, int]]]:
        return place(text[:count], [(round(share * count), note) for share, note in zip(shares, notes, strict=True)])

    def tokens(count: int) -> int:
        return fixed + len(encode(tokenizer, context(count)[0]))

    count = largest(len(text), lambda n: tokens(n) <= length)
    if count < 0:
        raise ValueError(f"length={length}: {task} with {len(facts)} needles takes at least {tokens(0)} tokens")
    body, spans = context(count)
    begin, end = spans[asked]
    used, before = tokens(count), len(encode(tokenizer, body[:begin]))
    depth = round(100 * before / max(1, used - fixed - len(encode(tokenizer, body[begin:end]))), 1)
    return Sample(
        sample_id=sample_id,
        task=task,
        context=body,
        query=query,
        answer_prefix=prefix,
        references=(value,),
        max_new_tokens=answer + 2,
        stop=("\n", " ."),
        length=length,
        meta={
            "depth": depth,
            "measured_depth": depth,
            "needle": notes[asked],
            "needle_span": (begin, end),
            "spans": spans,
            "key": key,
            "tokens": used,
            "fill": used / length,
            **meta,
        },
    )
