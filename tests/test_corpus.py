"""The text generator: a function of its seed, with facts that hold for a whole document."""

from collections import Counter, defaultdict
from itertools import islice

import pytest

from kvbench.corpus import document, pairs, rng_for, sentences, words

pytest.importorskip("wonderwords", reason="the word list comes with kvbench[bench]")


def test_words_are_disjoint_plain_and_as_many_as_asked():
    vocabulary = words()
    groups = vocabulary.nouns, vocabulary.adjectives, vocabulary.verbs
    assert [len(group) for group in groups] == [200, 100, 60]
    assert len(set().union(*groups)) == 360
    assert all(word.isalpha() and word.islower() for group in groups for word in group)


def test_a_document_is_a_function_of_its_seed():
    first = document(3, 50)
    document(4, 50)
    assert document(3, 50) == first
    assert document(3, 20) == first[: len(document(3, 20))], "a longer document continues a shorter one"
    assert document(4, 50) != first
    assert document(3, 50, "other stream") != first


def test_generators_with_different_keys_are_independent():
    draws = {rng_for(seed, name, length).random() for seed in range(4) for name in ("a", "b") for length in (1, 2)}
    assert len(draws) == 16
    assert rng_for(1, "a").random() == rng_for(1, "a").random()


def test_separators_only_stand_between_sentences():
    parts = list(islice(sentences(rng_for(0)), 60))
    assert parts[0][0].isalpha()
    assert {part[0] for part in parts[1:]} == {" ", "\n"}
    assert all(part.endswith(" .") and "  " not in part for part in parts)


def test_pairs_repeat_no_word():
    drawn = " ".join(pairs(rng_for(0), 40)).split()
    assert len(set(drawn)) == 80


def test_an_adjective_has_one_noun_per_document_but_many_across_documents():
    adjectives = set(words().adjectives)
    across = defaultdict(set)
    for seed in range(30):
        text = document(seed, 120).split()
        within = defaultdict(set)
        for word, following in zip(text, text[1:], strict=False):
            if word in adjectives:
                within[word].add(following)
                across[word].add(following)
        assert all(len(nouns) == 1 for nouns in within.values())
    assert max(map(len, across.values())) > 5


def test_members_leave_the_stage_and_come_back_much_later():
    text = document(11, 150).split()
    adjectives, places = set(words().adjectives), defaultdict(list)
    for at, word in enumerate(text):
        if word in adjectives:
            places[word].append(at)
    gaps = Counter(later - at > 300 for found in places.values() for at, later in zip(found, found[1:], strict=False))
    assert gaps[True] >= 5
