"""Endless, seeded English-like text with facts that last a whole document.

Every document has a cast: adjective-noun pairs that stay together to the end, each with a habitual verb and a place of
its own. A few members hold the stage for a paragraph and then leave, perhaps for a thousand tokens. So whoever still
remembers the beginning can predict the noun after "the amber", and whoever evicted it cannot.

Words come from the `wonderwords` package; a document is a function of its seed and nothing else.

    >>> from kvbench.corpus import document
    >>> document(7, count=3) == document(7, count=3)
    True
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np

NOUNS, ADJECTIVES, VERBS = 200, 100, 60
STARTERS = ("the", "then the", "later the", "in time the", "at dawn the", "at dusk the")
# CRC-32 of words that read badly at random: rude, sad, rare, or also used by the sentences themselves.
UNFIT = frozenset(
    "008d4b3e 0162e3bd 02430b07 0408cf09 0479e21d 0493f67b 04ed05b6 04f0225d 050d8c43 055d4c79 05aa9253 05cc0f29 "
    "062cba21 062fc8de 0649e8c4 06e5365e 0707121c 07295669 082a0fea 08875cac 08aa5a05 0a24e471 0a33f1d3 0a594e84 "
    "0afecc06 0b433e5f 0c7c50da 0c870272 0cd65b57 0d0e6544 0d64339a 0def0fcb 0f18d676 0f5311a0 0f581114 104ac33f "
    "1065c923 121bfef9 127985e9 1356d22c 13908fd8 13a13810 14141f78 15291baa 1661bd31 17a6acbd 18821ac5 19488716 "
    "1cf35681 1e788eca 1ea23c98 210b54fe 213a35da 2229f58e 256649c4 25cbfc4f 2762428f 27c59d1a 2efab7cb 31ad7669 "
    "3409d41c 372a6dc3 374cf009 3b94d2d0 3bc4bcd9 3dd1359b 3ee2ba1e 44095356 48414553 6f949845".split()
)


@dataclass(frozen=True)
class Words:
    """The vocabulary of every document: disjoint, lowercase, four to six letters."""

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...]
    verbs: tuple[str, ...]


@cache
def words() -> Words:
    """Choose by checksum, so that a new release of the word list moves few words."""
    from wonderwords import RandomWord, is_profanity

    source = RandomWord()
    taken: set[str] = set()
    chosen = []
    for category, count in (("adjective", ADJECTIVES), ("verb", VERBS), ("noun", NOUNS)):
        found = source.filter(include_categories=[category], word_min_length=4, word_max_length=6, regex="[a-z]+")
        fit = sorted({w for w in found if w not in taken and not is_profanity(w)}, key=_checksum)
        fit = [w for w in fit if f"{_checksum(w):08x}" not in UNFIT]
        chosen.append(tuple(fit[:count]))
        taken.update(chosen[-1])
    adjectives, verbs, nouns = chosen
    return Words(nouns, adjectives, verbs)


def _checksum(word: str) -> int:
    return zlib.crc32(word.encode())


def rng_for(*key: int | str) -> random.Random:
    """An independent generator for a key of integers and names: `rng_for(seed, "recall", 1024, 3)`."""
    entropy = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    state = np.random.SeedSequence(entropy).generate_state(4, np.uint64)
    return random.Random(int.from_bytes(state.tobytes(), "little"))


def pairs(rng: random.Random, count: int) -> list[str]:
    """`count` adjective-noun pairs in which no adjective and no noun occurs twice."""
    vocabulary = words()
    adjectives, nouns = rng.sample(vocabulary.adjectives, count), rng.sample(vocabulary.nouns, count)
    return [f"{a} {n}" for a, n in zip(adjectives, nouns, strict=True)]


@dataclass(frozen=True)
class Member:
    name: str
    place: str
    verb: str


def sentences(rng: random.Random) -> Iterator[str]:
    """Sentences of one endless document, each with the separator that precedes it: "", a blank, or a new line.

    "".join(islice(sentences(rng), n)) is a document of n sentences.
    """
    size = rng.randint(10, 18)
    names, verbs = pairs(rng, 2 * size), words().verbs
    cast = [Member(n, p, rng.choice(verbs)) for n, p in zip(names[:size], names[size:], strict=True)]
    separator = ""
    while True:
        stage = rng.sample(cast, 4)
        for _ in range(rng.randint(5, 9)):
            yield separator + _sentence(rng, stage)
            separator = " "
        separator = "\n"


def _sentence(rng: random.Random, stage: Sequence[Member]) -> str:
    one, two = rng.sample(stage, 2)
    verb = one.verb if rng.random() < 0.8 else rng.choice(words().verbs)
    form = rng.choice(
        (
            "{start} {one} will {verb} the {two} .",
            "{start} {one} will {verb} near the {place} .",
            "{start} {one} and the {two} {verb} by the {place} .",
            "{start} {one} must {verb} the {two} near the {place} .",
            "{start} {place} is home to the {one} .",
            "{start} {two} and the {one} will {verb} .",
        )
    )
    return form.format(start=rng.choice(STARTERS), one=one.name, two=two.name, verb=verb, place=one.place)


def document(seed: int, count: int = 80, stream: str = "document") -> str:
    """One document of `count` sentences; `stream` keeps training, test and other uses apart."""
    return "".join(islice(sentences(rng_for(seed, stream)), count))
