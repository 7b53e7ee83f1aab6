"""The metrics of LongBench v1, each `metric(prediction, reference) -> [0, 1]`, with the quirks of the official ones.

Bai et al., https://arxiv.org/abs/2308.14508; https://github.com/THUDM/LongBench (LongBench/metrics.py, eval.py).

Quirks that decide the third digit, and are kept:
    `rouge_l` is that of the package `rouge` 1.0.1, a union of common subsequences over sentences cut at ".", on sets of
        words; what the package cannot score (an empty answer, a sentence too long for its recursion) counts 0.
    `classification` removes from a list while it walks along it and so skips neighbours of what it removed;
        `classification_fixed` does not.
    `edit_similarity` is rounded to whole percents.
    Chinese punctuation lacks the opening half of some pairs.

Deviations.
    `edit_similarity` is that of difflib, which is what the official fuzzywuzzy (GPL, not used here) computes without
        its C extension; with the extension it is another measure.
"""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher

# First and last code points; the official list has U+300B but not its partner U+300A.
_CHINESE_RANGES = (
    "2013-2014 2018-2019 201B-201F 2026-2027 3001-3003 300B-3011 3014-301F 3030-3030 303E-303F FE4F-FE4F "
    "FF01-FF0D FF0F-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF64"
)
CHINESE_PUNCTUATION = "".join(
    chr(code)
    for first, last in (pair.split("-") for pair in _CHINESE_RANGES.split())
    for code in range(int(first, 16), int(last, 16) + 1)
)


def qa_f1(prediction: str, reference: str) -> float:
    """Overlap of words, without case, punctuation and articles."""
    return overlap(_words(prediction), _words(reference))


def qa_f1_zh(prediction: str, reference: str) -> float:
    return overlap(_words_zh(prediction), _words_zh(reference))


def rouge_l(prediction: str, reference: str) -> float:
    try:
        from rouge import Rouge
    except ImportError as error:
        raise _missing(error) from error
    try:
        (scores,) = Rouge(metrics=["rouge-l"]).get_scores([prediction], [reference])
    except (ValueError, RecursionError):
        return 0.0
    return float(scores["rouge-l"]["f"])


def rouge_l_zh(prediction: str, reference: str) -> float:
    return rouge_l(" ".join(_cut(prediction)), " ".join(_cut(reference)))


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    named = [name for name in classes if name in prediction]
    for name in named:
        if name in reference and name != reference:
            named.remove(name)  # the loop now skips the next one: the official quirk
    return 1 / len(named) if reference in named else 0.0


def classification_fixed(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """One over the classes named, not counting those that are named as a part of the reference."""
    named = [name for name in classes if name in prediction and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def count(prediction: str, reference: str) -> float:
    """The share of the numbers in the prediction that are the reference."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, reference: str) -> float:
    return count(prediction, re.findall(r"Paragraph (\d+)", reference)[0])


def retrieval_zh(prediction: str, reference: str) -> float:
    return count(prediction, re.findall(r"段落(\d+)", reference)[0])


def edit_similarity(prediction: str, reference: str) -> float:
    """Of the first line that is neither a comment nor a fence around code."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def _words(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(?:a|an|the)\b", " ", text).split()


def _words_zh(text: str) -> list[str]:
    dropped = {*string.punctuation, *CHINESE_PUNCTUATION}
    words = ("".join(letter for letter in word.lower() if letter not in dropped) for word in _cut(text))
    return [joined for joined in ("".join(word.split()) for word in words) if joined]


def overlap(prediction: Iterable[str], reference: Iterable[str]) -> float:
    """F1 of two multisets of words."""
    left, right = Counter(prediction), Counter(reference)
    same = (left & right).total()
    if not same:
        return 0.0
    precision, recall = same / left.total(), same / right.total()
    return 2 * precision * recall / (precision + recall)


def _cut(text: str) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own code, on import
            import jieba
    except ImportError as error:
        raise _missing(error) from error
    jieba.setLogLevel("WARNING")
    return list(jieba.cut(text))


def _missing(error: ImportError) -> ValueError:
    return ValueError(f"LongBench needs the package {error.name}: pip install 'kvbench[longbench]'")
