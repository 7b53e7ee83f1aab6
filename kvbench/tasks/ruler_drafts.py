"""The five families of RULER: each draws what is random in a prompt once and then writes it at any size.

A size counts words of essays, lines, distinct words, words or documents.
Whatever the size, the draws are the same, so a prompt does not depend on the sizes tried before.
"""

from __future__ import annotations

import math
import random
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from kvbench.corpus import document as generated
from kvbench.corpus import words as package_vocabulary
from kvbench.tasks import ruler_prompts as prompts
from kvbench.tasks import ruler_texts as texts
from kvbench.tasks.sample import draw_value

DEPTHS = [round(100 * i / 39) for i in range(40)]
Spans = list[tuple[int, int]]
T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """A prompt of some size: the segments of a sample, and where in the context stands what matters.

    spans: characters of all inserted facts or gold documents
    asked: those among them that hold the answer
    """

    context: str
    query: str
    answer_prefix: str
    references: tuple[str, ...]
    spans: Spans
    asked: Spans

    @property
    def prompt(self) -> str:
        return self.context + self.query + self.answer_prefix


@dataclass(frozen=True)
class Setup:
    """What all prompts of a task share.

    short: below 4,096 tokens, where step sizes and word counts are smaller
    shuffle: seed of the shuffles that are the same in every prompt
    example_lines: size of the example in variable tracking
    essays, questions: where the task needs them
    """

    variant: str
    length: int
    source: str
    path: str | None
    shuffle: int
    example_lines: int = 5
    essays: texts.Essays | None = None
    questions: texts.Questions | None = None

    @property
    def package(self) -> bool:
        return self.variant == "ruler_proving"

    @property
    def mini(self) -> bool:
        return self.variant != "ruler"

    @property
    def short(self) -> bool:
        return self.length < 4096

    def shuffled(self, items: Sequence[T]) -> list[T]:
        result = list(items)
        random.Random(self.shuffle).shuffle(result)
        return result


class Family(Protocol):
    """The draws of one prompt.

    gen_tokens: reserved for the answer
    least: the smallest size that can be written
    start, grid: the official search for a size that fits tries start, start + grid, ...
    step: by which the official fit shrinks a prompt that is too long
    meta: what a sample tells about its draws
    """

    gen_tokens: int
    least: int
    start: int
    grid: int
    step: int
    meta: dict[str, Any]

    def draft(self, size: int) -> Draft: ...


def joined(parts: Sequence[str], separator: str, begin: int) -> tuple[str, Spans]:
    """The parts in one text that follows `begin` characters, and where each stands."""
    spans = []
    for part in parts:
        spans.append((begin, begin + len(part)))
        begin += len(part) + len(separator)
    return separator.join(parts), spans


class Niah:
    """Needles (key: value) in noise, among other needles, or in essays; `keys` of them are drawn, `queries` asked."""

    gen_tokens = 128
    grid = 1

    def __init__(
        self, setup: Setup, rng: random.Random, index: int, haystack: str, key: str = "words", value: str = "numbers",
        keys: int = 1, values: int = 1, queries: int = 1,
    ) -> None:  # fmt: skip
        self.setup, self.types = setup, (key, value)
        keys = max(keys, queries)
        self.sentence = prompts.needle(setup.package)
        self.essays, self.text = setup.essays, None
        if haystack == "noise":
            self.text = generated(0, 5, "ruler noise") if setup.package else prompts.noise()
        self.taken: set[str] = set()
        names = [self._key(rng) for _ in range(keys)]
        facts = [(name, [self._value(rng) for _ in range(values)]) for name in names]
        needles = [(self._state(name, value), name) for name, drawn in facts for value in drawn]
        self.needles = setup.shuffled(needles)
        chosen = rng.sample(range(keys), queries)
        self.asked = [names[i] for i in chosen]
        self.references = tuple(value for i in chosen for value in facts[i][1])
        self.depths = rng.sample(DEPTHS, len(needles))
        self.place = rng.getrandbits(64)
        self.rest = random.Random(rng.getrandbits(64))  # draws further lines of a haystack of needles
        self.lines: list[str] = []
        self.words, self.unit = prompts.words("niah"), value
        if setup.package:
            self.words, self.gen_tokens = prompts.package_words(), 16 * len(self.references)
        elif len(self.references) == 1:
            self.words, self.unit = self.words.singular(), value.removesuffix("s")
        self.least = 1 if haystack == "essay" else len(needles)
        self.step = 500 if haystack == "essay" else 5 if setup.short else 25
        self.start = max(self.least, self.step)
        self.meta = {"needles": len(needles), "haystack": haystack}
        if self.essays:
            self.meta["splitter"] = self.essays.splitter

    def draft(self, size: int) -> Draft:
        before = self.words.before.format(type_needle_v=self.unit)
        if self.essays:
            parts, at = self._in_essays(self.essays.cut(size))
            text, places = joined(parts, " ", len(before))
        else:
            lines = [self.text] * size if self.text else self._distractors(size)
            at = sorted(random.Random(self.place).sample(range(size), len(self.needles)))
            at = [place + i for i, place in enumerate(at)]
            # The official code inserts from the end, so the last needle of the list stands first.
            for place, (needle, _) in zip(at, reversed(self.needles), strict=True):
                lines.insert(place, needle)
            text, places = joined(lines, "\n", len(before))
        spans = [places[i] for i in at]
        order = self.needles if self.essays else self.needles[::-1]
        asked = [span for span, (_, key) in zip(spans, order, strict=True) if key in self.asked]
        query = ", ".join(self.asked[:-1]) + ", and " + self.asked[-1] if len(self.asked) > 1 else self.asked[0]
        after, prefix = (
            part.format(type_needle_v=self.unit, query=query) for part in (self.words.after, self.words.answer_prefix)
        )
        return Draft(before + text, after, prefix, self.references, spans, asked)

    def _in_essays(self, sentences: list[str]) -> tuple[list[str], list[int]]:
        """Text and needles in turn, so that a needle before or after all text still has its blank."""
        cuts = [0, *sorted(int(len(sentences) * (depth / 100)) for depth in self.depths), len(sentences)]
        parts: list[str] = []
        for i, (needle, _) in enumerate(self.needles):
            parts += [" ".join(sentences[cuts[i] : cuts[i + 1]]), needle]
        return [*parts, " ".join(sentences[cuts[-2] :])], list(range(1, len(parts), 2))

    def _distractors(self, count: int) -> list[str]:
        while len(self.lines) < count:
            self.lines.append(self._state(self._key(self.rest), self._value(self.rest)))
        return self.lines[:count]

    def _state(self, key: str, value: str) -> str:
        return self.sentence.format(type_needle_v=self.types[1], key=key, value=value)

    def _key(self, rng: random.Random) -> str:
        """A key that no other needle of the prompt has, nor the generated text, which is made of the same words."""
        filler = (self.essays.text if self.essays else self.text or "") if self.setup.package else ""
        while True:
            if self.setup.package and self.types[0] == "words":
                vocabulary = package_vocabulary()
                key = f"{rng.choice(vocabulary.adjectives)} {rng.choice(vocabulary.nouns)}"
            else:
                key = _draw(rng, self.types[0])
            if key not in self.taken and key not in filler:
                self.taken.add(key)
                return key

    def _value(self, rng: random.Random) -> str:
        return draw_value(rng) if self.setup.package else _draw(rng, self.types[1])


def _draw(rng: random.Random, kind: str) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(texts.word_lists()['adjective'])}-{rng.choice(texts.word_lists()['noun'])}"


class Vt:
    """A chain of variables in noise, after an example of the same form."""

    gen_tokens = 30
    grid = 1
    hops = 4

    def __init__(self, setup: Setup, rng: random.Random, index: int) -> None:
        self.setup, self.words, self.noise = setup, prompts.words("vt"), prompts.noise()
        self.example = self._chain(rng, 3)
        self.chain = self._chain(rng, 5)
        self.place = rng.getrandbits(64)
        self.least = self.hops + 1
        self.start = self.step = 5 if setup.short else 10
        self.meta = {"hops": self.hops, "example_lines": setup.example_lines}

    def draft(self, size: int) -> Draft:
        example = self.example_of(self.setup.example_lines)
        opening = example.context + example.query + example.answer_prefix + " " + " ".join(example.references) + "\n\n"
        return self._written(self.chain, size, self.place, opening)

    def example_of(self, size: int) -> Draft:
        """The example with so many lines; its names stand at the same places in every prompt of a task."""
        return self._written(self.example, size, self.setup.shuffle, "")

    def _chain(self, rng: random.Random, letters: int) -> tuple[list[str], str]:
        names: list[str] = []
        while len(names) <= self.hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        return names, str(rng.randrange(10_000, 99_999))

    def _written(self, chain: tuple[list[str], str], size: int, place: int, opening: str) -> Draft:
        names, value = chain
        statements = [f"VAR {names[0]} = {value}"]
        statements += [f"VAR {name} = VAR {before} " for before, name in zip(names, names[1:], strict=False)]
        at = [p + i for i, p in enumerate(sorted(random.Random(place).sample(range(size), len(statements))))]
        lines = [self.noise] * size
        for position, statement in zip(at, statements, strict=True):
            lines.insert(position, statement)
        text, places = joined(lines, "\n", len(opening + self.words.before))
        query = self.words.after.format(query=value)
        prefix = self.words.answer_prefix.format(query=value, num_v=len(names))
        spans = [places[i] for i in at]
        return Draft(opening + self.words.before + text, query, prefix, tuple(names), spans, spans)


class Cwe:
    """A numbered list in which ten words are common, after an example of the same form."""

    gen_tokens = 120
    grid = 1
    common = 10

    def __init__(self, setup: Setup, rng: random.Random, index: int) -> None:
        self.setup, self.words = setup, prompts.words("cwe")
        self.short = setup.short or setup.mini
        self.repeats = (6, 1) if self.short else (30, 3)
        self.start = self.least = self.common + 1
        self.step = 10
        pool = texts.all_words()
        self.meta = {"repeats": self.repeats}
        self.example = rng.sample(pool, 20 if self.short else 40)
        self.order = rng.sample(pool, len(pool))
        self.place = rng.getrandbits(64)

    def draft(self, size: int) -> Draft:
        words = self.order[:size] if size <= len(self.order) else self._larger()[:size]
        example = self._text(self.example, (3, 1) if self.short else (10, 3))
        answer = " ".join(f"{i}. {word}" for i, word in enumerate(self.example[: self.common], 1))
        opening = example + self.words.after + self.words.answer_prefix + " " + answer + "\n"
        context = opening + self._text(words, self.repeats)
        return Draft(context, self.words.after, self.words.answer_prefix, tuple(words[: self.common]), [], [])

    def _larger(self) -> list[str]:
        """All words of the larger list, in an order of this prompt."""
        english = texts.english_words(self.setup.source, self.setup.path)
        return random.Random(self.place).sample(english, len(english))

    def _text(self, words: list[str], repeats: tuple[int, int]) -> str:
        listed = words[: self.common] * repeats[0] + words[self.common :] * repeats[1]
        return self.words.before + " ".join(f"{i}. {word}" for i, word in enumerate(self.setup.shuffled(listed), 1))


class Fwe:
    """Coded words that follow a zeta distribution; the commonest is noise, the next three are asked for."""

    gen_tokens = 50
    alpha = 2.0
    zeta = math.pi**2 / 6

    def __init__(self, setup: Setup, rng: random.Random, index: int) -> None:
        self.setup, self.words = setup, prompts.words("fwe")
        room = setup.length - self.gen_tokens
        count = max(8, room // 50) if setup.mini else room // 50
        names: set[str] = set()
        while len(names) < count:
            names.add("".join(rng.choices(string.ascii_lowercase, k=6)))
        self.names = ["...", *setup.shuffled(sorted(names))[1:]]
        self.meta = {"words": count}
        self.least = math.ceil(self.zeta * 4**self.alpha)  # so that the fourth word stands there at all
        self.start = max(self.least, room // 6)
        self.grid = self.step = max(1, room // 32)

    def draft(self, size: int) -> Draft:
        counts = (int(size * rank**-self.alpha / self.zeta) for rank in range(1, len(self.names) + 1))
        listed = [name for name, count in zip(self.names, counts, strict=True) for _ in range(count)]
        context = self.words.before + " ".join(self.setup.shuffled(listed))
        return Draft(context, self.words.after, self.words.answer_prefix, tuple(self.names[1:4]), [], [])


class Qa:
    """A question with its documents and others around them."""

    gen_tokens = 32
    grid = 1

    def __init__(self, setup: Setup, rng: random.Random, index: int, dataset: str) -> None:
        assert setup.questions is not None
        self.setup, self.words, self.pool = setup, prompts.words("qa"), setup.questions
        if index >= len(self.pool.questions):
            raise ValueError(f"{dataset} has {len(self.pool.questions)} questions: use a smaller count")
        self.question = self.pool.questions[index]
        self.more = rng.sample(self.question.more, len(self.question.more))
        self.rest = random.Random(rng.getrandbits(64))
        self.others: list[int] = []
        self.known = {*self.question.gold, *self.question.more}
        # Questions about one paragraph are no independent draws; those of HotpotQA have their own documents.
        self.meta = {"cluster": f"{dataset}-{self.question.gold[0]}"} if dataset == "squad" else {}
        self.least = len(self.question.gold)
        self.step = 10
        self.start = max(self.least, self.step)

    def draft(self, size: int) -> Draft:
        total = len(self.pool.documents)
        if size < total:
            chosen = [*self.question.gold, *self.more][:size]
            chosen += self._others(size - len(chosen))
        else:
            chosen = [i % total for i in range(size)]
        chosen = self.setup.shuffled(chosen)
        frame = prompts.document()
        parts = [frame.format(i=i, document=self.pool.documents[n]) for i, n in enumerate(chosen, 1)]
        text, places = joined(parts, "\n\n", len(self.words.before))
        gold, holds = ([p for p, n in zip(places, chosen, strict=True) if n in group]
                       for group in (self.question.gold, self.question.holds))  # fmt: skip
        after = self.words.after.format(query=self.question.text)
        return Draft(self.words.before + text, after, self.words.answer_prefix, self.question.answers, gold, holds)

    def _others(self, count: int) -> list[int]:
        while len(self.others) < count:
            number = self.rest.randrange(len(self.pool.documents))
            if number not in self.known:
                self.known.add(number)
                self.others.append(number)
        return self.others[:count]
