"""SpecKV against loops: the largest weight that any row of window or draft gives to a slot."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvbench.policies import KIVI, KV, SnapKV, SpecKV, Step
from kvbench.policies.interface import Draft, Probe

WIDTH = 24


def oracle(keys: Tensor, last: Tensor, draft: Tensor, own: Tensor, kernel: int) -> list[list[float]]:
    """keys [H, S, D], last [Hq, w, D], draft queries [Hq, n, D] and keys [H, n, D] -> scores of S - w slots."""
    (heads, slots, _), window = keys.shape, last.shape[1]
    group, before = len(last) // heads, slots - window
    every = torch.cat([keys, own], 1).double()
    scores = []
    for h in range(heads):
        raw = [0.0] * before
        for g in range(h * group, (h + 1) * group):
            for i, query in enumerate(torch.cat([last, draft], 1)[g].double()):
                exps = [math.exp(0.5 * x) for x in (every[h, : before + i + 1] @ query).tolist()]
                raw = [max(old, x / sum(exps)) for old, x in zip(raw, exps[:before], strict=True)]
        scores.append([max(raw[max(0, s - kernel // 2) : s + kernel // 2 + 1]) for s in range(before)])
    return scores


def best(scores: list[float], budget: int, slots: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda s: (-scores[s], -s))
    return sorted([*order[: budget - (slots - len(scores))], *range(len(scores), slots)])


def case(*rows: tuple[int, int], group: int = 2, window: int = 4, heads: int = 2) -> tuple[KV, Step]:
    """Rows of (tokens, drafted tokens), at most 24 and 5; whatever is not real is large and must not matter."""
    batch = len(rows)
    lengths, drafted = (torch.tensor(x) for x in zip(*rows, strict=True))
    keys, queries = torch.randn(batch, heads, WIDTH, 8), 2 * torch.randn(batch, heads * group, WIDTH, 8)
    valid = torch.arange(WIDTH) >= WIDTH - lengths[:, None]
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros_like(lengths))
    kv.keys.tail.masked_fill_(~kv.counts.live()[..., None], 40.0)
    real = torch.arange(5) < drafted[:, None]
    junk = ~real[:, None, :, None]
    probe = Probe(
        (2 * torch.randn(batch, heads * group, 5, 8)).masked_fill(junk, 40.0),
        torch.randn(batch, heads, 5, 8).masked_fill(junk, 40.0), lengths[:, None] + torch.arange(5), real,
    )  # fmt: skip
    step = Step(
        0, lengths, lengths, queries=queries[:, :, WIDTH - window :], query_valid=valid[:, WIDTH - window :],
        scaling=0.5, probe=probe,
    )  # fmt: skip
    return kv, step


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(("window", "kernel"), [(1, 1), (4, 1), (4, 5), (3, 41)])
def test_scores_and_kept_slots_equal_the_definition(group, window, kernel):
    kv, step = case((24, 5), (17, 2), (24, 0), group=group, window=window)
    policy = SpecKV(9, 5, "ngram", window, kernel)
    score, kept = policy.score(kv, step), policy(kv, step).position
    assert score.dtype == torch.float32
    for b, slots in enumerate(step.seen.tolist()):
        drafted = int(step.probe.valid[b].sum())
        draft, own = step.probe.queries[b, :, :drafted], step.probe.keys[b, :, :drafted]
        expected = oracle(kv.keys.dense()[b, :, :slots], step.queries[b], draft, own, kernel)
        torch.testing.assert_close(score[b, :, : slots - window], torch.tensor(expected), atol=1e-5, rtol=1e-5)
        assert kept[b].tolist() == [best(row, 9, slots) for row in expected]


@pytest.mark.parametrize("short", [(3, 4), (7, 1), (20, 5)])
def test_a_padded_row_scores_as_alone(short):
    kv, step = case((24, 3), short)
    length, drafted = short
    keys, real = kv.keys.dense()[1:, :, :length], step.query_valid[1]
    probe = Probe(
        step.probe.queries[1:, :, :drafted], step.probe.keys[1:, :, :drafted], step.probe.position[1:, :drafted],
        step.probe.valid[1:, :drafted],
    )  # fmt: skip
    seen = step.seen[1:]
    single = replace(step, prompt=seen, seen=seen, queries=step.queries[1:][:, :, real], query_valid=None, probe=probe)
    policy, alone = SpecKV(6, 5, window=4, kernel=5), KV.of(keys, keys)
    expected = policy(alone, single).position.expand(-1, 2, -1)[0]
    assert policy(kv, step).position[1, :, : expected.shape[1]].tolist() == expected.tolist()
    score = policy.score(kv, step)[1, :, : max(0, length - 4)]
    torch.testing.assert_close(score, policy.score(alone, single)[0, :, : max(0, length - 4)], atol=1e-6, rtol=1e-5)


def test_one_window_row_and_no_draft_rank_as_snapkv_without_groups():
    """With a single row the maximum is the sum."""
    kv, step = case((24, 0), (19, 0), group=1, window=1)
    spec, snap = SpecKV(9, window=1, kernel=5), SnapKV(9, 1, 5)
    assert torch.equal(spec(kv, step).position, snap(kv, step).position)


def test_queries_beyond_the_window_do_not_vote():
    kv, step = case((24, 5), window=8)
    fewer = replace(step, queries=step.queries[:, :, -4:], query_valid=step.query_valid[:, -4:])
    assert torch.equal(SpecKV(9, window=4).score(kv, step), SpecKV(9, window=4).score(kv, fewer))


def test_equal_keys_tie_and_the_most_recent_win():
    _, step = case((24, 5))
    flat = KV.of(torch.ones(1, 2, 24, 8), torch.ones(1, 2, 24, 8))
    assert SpecKV(7, window=4, kernel=1)(flat, step).position.tolist() == [[list(range(17, 24))] * 2]


def test_when_it_acts():
    kv, step = case((24, 5))
    assert SpecKV(24, window=4)(kv, step) is kv and "position" not in kv.columns
    assert SpecKV(5, window=4)(kv, replace(step, decoding=True, probe=None)) is kv
    assert (SpecKV(9, window=4) | KIVI(2, 8, 8))(kv, step).counts.even == 9


def test_needs_a_verified_draft():
    assert SpecKV(200).needs == {"probe": Draft(32, SnapKV(200), verify=True), "queries": 32}
    assert SpecKV(memory=0.5, window=8).needs == {"probe": Draft(32, SnapKV(0.5), verify=True), "queries": 32}
    assert SpecKV(20, 4, "ngram", 8).needs == {"probe": Draft(4, "ngram", verify=True), "queries": 8}
    assert SpecKV(0.5, by="models/small").needs["probe"] == Draft(32, "models/small", verify=True)
    assert SpecKV(20, window=4).needs["probe"].by == SnapKV(20, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 31}, r"SpecKV: budget=31 is too small: it must be at least 32 \(what the policy protects\)"),
        ({"budget": 50, "draft": 0}, "SpecKV: draft must be an int of at least 1 token, got 0"),
        ({"budget": 50, "window": 0}, "SpecKV: window must be an int of at least 1 token, got 0"),
        ({"budget": 50, "by": ""}, "SpecKV: by must be 'self', 'ngram' or the path of a smaller model, got ''"),
        ({"budget": 50, "kernel": 4}, "SpecKV: kernel must be an odd int of at least 1 slot, got 4"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        SpecKV(**arguments)


def test_a_host_that_supplies_too_little_is_told():
    kv, step = case((24, 5))
    with pytest.raises(ValueError, match="needs a probe of the answer"):
        SpecKV(5, window=4)(kv, replace(step, probe=None))
    with pytest.raises(ValueError, match="needs the last queries"):
        SpecKV(5, window=4)(kv, replace(step, queries=None))
