"""Misses are split by whether the needle survived the compression."""

import pytest

from kvbench.misses import is_kept, split_misses
from kvbench.results import Sample

GONE, HALF, HERE = [[0.0, 0.1], [0.0, 0.0]], [[1.0, 0.0], [0.5, 0.4]], [[1.0, 1.0], [1.0, 0.0]]


def sample(name, score, kept):
    return Sample(
        sample_id=name, prompt_sha256="0", score=score, n_prompt_tokens=9, n_generated=1, kept_tokens=3,
        kv_bytes_prefill_end=1, kv_bytes_final=1, kv_bytes_full=2, kv_bytes_full_final=2, needle_kept=kept,
    )  # fmt: skip


def test_a_needle_is_kept_where_half_of_the_heads_hold_half_of_it():
    assert [is_kept(kept) for kept in (GONE, HALF, HERE)] == [False, True, True]
    assert not is_kept(HERE, share=0.8)


def test_split_by_hand():
    rows = [
        sample("a", 1.0, HERE), sample("b", 1.0, GONE), sample("c", 0.0, GONE), sample("d", 0.0, HERE),
        sample("e", 0.0, GONE), sample("f", 0.0, None),
    ]  # fmt: skip
    split = split_misses(rows)
    assert (split.found, split.found_evicted, split.evicted, split.unread, split.misses) == (2, 1, 2, 1, 3)
    assert split.kept_if_found == [[0.5, 0.55], [0.5, 0.0]]
    assert split.kept_if_missed[0] == pytest.approx([1 / 3, 1.2 / 3])
    assert split_misses(rows[:1]).kept_if_missed is None
    assert split_misses(rows[5:]) is None
