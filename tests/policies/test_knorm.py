"""KNorm: the shortest keys, in all layers but the first."""

import math

import pytest
import torch
from torch import Tensor

from kvbench import CompressedCache
from kvbench.policies import KIVI, KV, BudgetError, KNorm, Stack, Step


def step(*seen: int, order: int = 2, layers: int = 4, decoding: bool = False, prompt: int | None = None) -> Step:
    real = torch.tensor(seen)
    return Step(
        0, real if prompt is None else torch.full_like(real, prompt), real, decoding, order=order, layers=layers
    )


def scattered(batch: int, heads: int, tokens: int, dim: int = 8) -> Tensor:
    return torch.randn(batch, heads, tokens, dim) * 10 ** (2 * torch.rand(batch, heads, tokens, 1) - 1)


def shortest(keys: Tensor, tokens: list[int], budget: int) -> list[int]:
    """Of `tokens` of keys [S, D] those with the smallest norms, ties to the newest."""
    norms = {j: math.sqrt(sum(x * x for x in keys[j].tolist())) for j in tokens}
    return sorted(sorted(tokens, key=lambda j: (norms[j], -j))[:budget])


def test_prompt_and_decoding_keep_the_shortest():
    keys = scattered(2, 3, 30)
    policy, kv = KNorm(8), KV.of(keys[:, :, :20], keys[:, :, :20])
    score = policy.score(kv, step(20, 20))
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, -keys[:, :, :20].square().sum(-1).sqrt())
    held = [[list(range(19)) for _ in range(3)] for _ in range(2)]
    for t in range(19, 30):
        if t > 19:
            kv = kv.append(keys[:, :, t : t + 1], keys[:, :, t : t + 1], seen=torch.tensor([t, t]))
        kv = policy(kv, step(t + 1, t + 1, decoding=t > 19))
        held = [[shortest(keys[b, h], [*held[b][h], t], 8) for h in range(3)] for b in range(2)]
        assert kv.position.tolist() == held


def test_order_of_tokens_does_not_matter_and_a_longer_key_never_gains():
    keys, order = scattered(1, 2, 25), torch.randperm(25)
    score = KNorm(5).score(KV.of(keys, keys), step(25))
    assert torch.equal(KNorm(5).score(KV.of(keys[:, :, order], keys), step(25)), score[..., order])
    rank = score.argsort(-1).argsort(-1)
    for s in range(25):
        grown = keys.clone()
        grown[:, :, s] *= 1.7
        assert (KNorm(5).score(KV.of(grown, keys), step(25)).argsort(-1).argsort(-1)[..., s] <= rank[..., s]).all()


@pytest.mark.parametrize("skip_layers", [0, 1, 2, 9])
def test_the_first_layers_never_evict(skip_layers):
    keys = scattered(1, 2, 24)
    policy = KNorm(6, skip_layers)
    for order in range(4):
        kv = policy(KV.of(keys[:, :, :20], keys[:, :, :20]), step(20, order=order))
        for t in range(20, 24):
            kv = kv.append(keys[:, :, t : t + 1], keys[:, :, t : t + 1], seen=torch.tensor([t]))
            kv = policy(kv, step(t + 1, order=order, decoding=True, prompt=20))
        assert kv.counts.even == (24 if order < skip_layers else 6)
        assert ("position" in kv.columns) == (order >= skip_layers)


def test_spread_broadcasts():
    slots, prompt = torch.tensor([3, 50]), torch.tensor([[40], [60]])
    spread = KNorm(5).spread(slots, prompt, 3)
    assert spread.tolist() == [[[40, 40], [60, 60]]] * 2 + [[[3, 50]] * 2]
    assert KNorm(5).spread(slots, prompt, 1).tolist() == [[[40, 40], [60, 60]]]
    assert KNorm(0.25).slots(None, step(40, 60, order=1)).tolist() == [[40], [60]]
    assert KNorm(0.25).slots(None, step(40, 60, order=2)).tolist() == [[10], [15]]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_memory_counts_the_layers_that_keep_everything(packed):
    keys = scattered(1, 2, 48, 32).bfloat16()
    full = 4 * 2 * 48 * 2 * 32 * 2  # layers, sides, tokens, heads, dims, bytes

    def held(policy: KNorm) -> tuple[int, int]:
        stack = Stack((policy, KIVI(4, residual=0))) if packed else Stack((policy,))
        kvs = [stack(KV.of(keys, keys), step(48, order=i)) for i in range(4)]
        assert [kv.counts.even for kv in kvs[:2]] == [48, 48]
        assert kvs[2].counts.even == kvs[3].counts.even
        return kvs[3].counts.even, sum(kv.nbytes for kv in kvs)

    for memory in (0.3, 0.37) if packed else (0.6, 0.83):
        slots, nbytes = held(KNorm(memory=memory))
        assert slots < 48 and nbytes <= memory * full
        assert all(held(KNorm(more))[1] > memory * full for more in range(slots + 1, 49))


def test_memory_below_what_the_skipped_layers_hold_is_refused():
    keys = scattered(1, 2, 40).bfloat16()
    with pytest.raises(BudgetError, match=r"KNorm\(memory=0.4\): .* room for 0 slots, but 1 are needed"):
        KNorm(memory=0.4)(KV.of(keys, keys), step(40))
    assert KNorm(memory=0.4, skip_layers=1)(KV.of(keys, keys), step(40)).counts.even < 0.25 * 40


def test_a_padded_row_is_as_alone():
    keys = scattered(2, 2, 20)
    valid = torch.arange(20) >= torch.tensor([[0], [6]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    kv.keys.tail[1, :, 14:] = 0.0  # the shortest, but dead
    kept = KNorm(5)(kv, step(20, 14)).position
    alone = [shortest(keys[1, h, 6:], list(range(14)), 5) for h in range(2)]
    assert kept[1].tolist() == alone
    assert KNorm(5)(KV.of(keys[1:, :, 6:], keys[1:, :, 6:]), step(14)).position[0].tolist() == alone


def test_constant_norms_tie_to_the_most_recent_with_a_warning():
    keys = torch.nn.functional.normalize(torch.randn(1, 2, 20, 8), dim=-1)
    with pytest.warns(UserWarning, match="key norms are all but equal"):
        KNorm(5)(KV.of(keys, keys), step(20))
    same = torch.randn(8).expand(1, 2, 20, 8)
    with pytest.warns(UserWarning, match="key norms are all but equal"):
        assert KNorm(5)(KV.of(same, same), step(20)).position.tolist() == [[list(range(15, 20))] * 2]
    valid = torch.arange(20) >= torch.tensor([[0], [6]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).select(torch.tensor([0, 0]))
    kv = kv.append(torch.cat([scattered(1, 2, 20), keys]), keys.expand(2, -1, -1, -1), valid, torch.zeros(2).long())
    kv.keys.tail[1, :, 14:] = 0.0
    with pytest.warns(UserWarning, match="key norms are all but equal"):  # dead columns do not make them vary
        KNorm(5)(kv, step(20, 14))


def test_no_warning_for_norms_that_vary_nor_for_a_lone_token():
    keys = torch.nn.functional.normalize(torch.randn(2, 1, 20, 8), dim=-1) * torch.linspace(1, 1.01, 20)[:, None]
    valid = torch.arange(20) >= torch.tensor([[0], [19]])  # one token: its norm equals itself
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    assert KNorm(5)(kv, step(20, 1)).counts.per_head.tolist() == [[5], [1]]  # warnings are errors here


@pytest.mark.parametrize("skip_layers", [-1, 0.5, True])
def test_bad_options(skip_layers):
    with pytest.raises(ValueError, match=f"KNorm: skip_layers must be an int of 0 or more layers, got {skip_layers}"):
        KNorm(8, skip_layers)


def test_in_a_model_the_first_layer_keeps_growing(tiny):
    model, _ = tiny
    cache = CompressedCache(model, KNorm(10, skip_layers=1))
    model.generate(torch.arange(30)[None], past_key_values=cache, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert [layer.kv.counts.even for layer in cache.layers] == [34, 10]
