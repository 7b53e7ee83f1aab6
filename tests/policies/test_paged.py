"""Paged against loops over pages, and what it is for: scales that leave with their tokens."""

import pytest
import torch

from kvbench.policies import KIVI, KV, KeyDiff, Paged, Random, Step, StreamingLLM


def step(seen: int, rows: int = 1, **options) -> Step:
    now = torch.full((rows,), seen)
    return Step(0, now, now, **options)


@pytest.mark.parametrize("page, sinks", [(4, 0), (5, 3), (1, 0), (100, 0)])
def test_every_token_has_the_mean_score_of_its_page(page: int, sinks: int) -> None:
    keys, values = torch.randn(2, 1, 2, 23, 8).unbind()
    kv = KV.of(keys, values).gather(
        torch.tensor([[[0, 1, 2, 5, 6, 7, 11, 12, 20, 22], [3, 4, 5, 6, 7, 8, 9, 21, 22, -1]]])
    )
    base = Random(9, seed=4)
    policy = Paged(base, page)
    stack = (policy, KIVI(2, 4, 0, sinks=sinks)) if sinks else (policy,)
    now = step(23, stack=stack)
    got, plain = policy.score(kv, now), base.score(kv, now)
    for h in range(2):
        positions = kv.position[0, h].tolist()
        for s, p in enumerate(positions):
            if p >= 0:
                same = [j for j, q in enumerate(positions) if q >= 0 and (q - sinks) // page == (p - sinks) // page]
                if p < sinks:
                    same = [j for j, q in enumerate(positions) if 0 <= q < sinks]
                assert float(got[0, h, s]) == pytest.approx(sum(float(plain[0, h, j]) for j in same) / len(same))


def test_whole_pages_stay_and_one_is_cut_at_the_budget() -> None:
    keys, values = torch.randn(2, 1, 1, 64, 8).unbind()
    policy = Paged(KeyDiff(20), 8)
    kept = policy(KV.of(keys, values), step(64)).position[0, 0].tolist()
    score = policy.score(KV.of(keys, values), step(64))[0, 0]
    best = sorted(range(8), key=lambda page: -float(score[8 * page]))
    expected = {8 * page + i for page in best[:2] for i in range(8)} | {8 * best[2] + i for i in range(4, 8)}
    assert set(kept) == expected


def test_scales_leave_with_their_pages() -> None:
    keys, values = torch.randn(2, 2, 2, 256, 16).unbind()
    packed = KIVI(2, 8, 0).encode(keys, values)
    now = step(256, 2)
    apart, together = Random(64)(packed, now), Paged(Random(64), 8)(packed, now)
    assert len(together.keys.body.groups["scale"]) == 4 * 8  # as few as hold 64 tokens
    assert len(apart.keys.body.groups["scale"]) > 4 * 25 and together.nbytes < apart.nbytes


def test_what_is_protected_stays_and_options_are_checked() -> None:
    keys, values = torch.randn(2, 1, 1, 40, 8).unbind()
    kept = Paged(StreamingLLM(12, sinks=3), 8)(KV.of(keys, values), step(40)).position[0, 0].tolist()
    assert kept[:3] == [0, 1, 2] and kept[3:] == list(range(31, 40))
    with pytest.raises(ValueError, match="Paged: page must be an int of at least 1 token, got 0"):
        Paged(Random(4), 0)
    with pytest.raises(TypeError, match="base must be an evictor"):
        Paged(KIVI())
