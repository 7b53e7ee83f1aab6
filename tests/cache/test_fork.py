"""Prefill once, compress many: a fork is what its policy would have made of the prompt by itself."""

import pytest
import torch

from kvbench import CompressedCache
from kvbench.policies import FP8, H2O, KIVI, Full, Random, SnapKV, Stack, StreamingLLM

NEEDS = {"attention": 1, "queries": 8}


def decode(model, cache, do, mask, tokens):
    found = []
    for token in tokens:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        found.append(do.feed(model, cache, token.expand(len(mask), 1), mask))
    return torch.cat(found, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_fork_is_a_direct_run(policy, family, tiny, do) -> None:
    model = tiny(family)
    ids, mask = do.left_padded(38, 29)
    record = CompressedCache(model, Stack((policy,)).sharing, needs=NEEDS)
    direct = CompressedCache(model, policy)
    with record.deferred():
        do.feed(model, record, ids, mask)
    do.feed(model, direct, ids, mask)
    fork = record.fork(policy)
    assert do.kept(fork) == do.kept(direct)
    assert fork.nbytes == direct.nbytes and fork.full_nbytes == direct.full_nbytes
    tokens = torch.randint(2, 60, (10,))
    assert torch.equal(decode(model, fork, do, mask, tokens), decode(model, direct, do, mask, tokens))
    assert do.kept(fork) == do.kept(direct)
    assert fork.nbytes == direct.nbytes


def test_forks_leave_each_other_alone(tiny, do) -> None:
    """All decode in turns, each other tokens; each as if it were the only one."""
    model = tiny("qwen2-mixed")
    ids, mask = do.left_padded(30, 21)
    policies = [Full(), Full(), H2O(12), SnapKV(0.5, window=8) | FP8(), KIVI(2, 8, 8), StreamingLLM(40)]
    record = CompressedCache(model, Full(), needs=NEEDS)
    do.feed(model, record, ids, mask)
    decode(model, record, do, mask, torch.tensor([4]))  # leaves spare capacity that forks must not share
    mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    forks = [*(record.fork(policy) for policy in policies), record]
    alone = [record.fork(policy) for policy in [*policies, Full()]]
    tokens = torch.randint(2, 60, (len(forks), 12))
    together = [[] for _ in forks]
    for step in range(12):
        for i, fork in enumerate(forks):
            seen = torch.cat([mask, torch.ones(2, step, dtype=torch.long)], 1)
            together[i].append(decode(model, fork, do, seen, tokens[i, step : step + 1]))
    for i, cache in enumerate(alone):
        assert torch.equal(decode(model, cache, do, mask, tokens[i]), torch.cat(together[i], 1))
        assert do.kept(cache) == do.kept(forks[i])


def test_rows_that_grow_by_turns(tiny, do) -> None:
    """A chunk that is all pads for the longest row must not be written where a fork still looks."""
    model = tiny()
    ids, mask = do.left_padded(12, 20)
    record = CompressedCache(model)
    do.feed(model, record, ids, mask)
    forks, answers = [record.fork(Full()), record.fork(Full())], []
    chunk = torch.tensor([[1, 1, 1], [0, 0, 0]])
    for i, fork in enumerate(forks):
        do.feed(model, fork, torch.full((2, 3), 5 + i), torch.cat([mask, chunk], 1))
    mask = torch.cat([mask, chunk], 1)
    for i, fork in enumerate(forks):
        alone = CompressedCache(model)
        do.feed(model, alone, torch.cat([ids[:1, 8:], torch.full((1, 3), 5 + i)], 1))
        answers.append(decode(model, fork, do, mask, torch.tensor([3])))
        wanted = do.feed(model, alone, torch.tensor([[3]]))
        torch.testing.assert_close(answers[-1][:1], wanted, rtol=1e-3, atol=1e-3)


def test_forks_of_a_compressed_cache(tiny, do) -> None:
    model, ids = tiny(), do.left_padded(40)[0]
    record = CompressedCache(model, Random(30), needs=NEEDS)
    do.feed(model, record, ids)
    before = do.kept(record)
    fork, direct = record.fork(H2O(12)), CompressedCache(model, Random(30) | H2O(12))
    do.feed(model, direct, ids)
    assert do.kept(fork) == do.kept(direct) and do.kept(record) == before
