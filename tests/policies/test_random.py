"""Random: a hash of where a token is, so the sample is uniform and the same however it was fed."""

import pytest
import torch

from kvbench.policies import KV, Random, Step


def dense(batch: int, heads: int, slots: int) -> KV:
    return KV.of(torch.randn(batch, heads, slots, 4), torch.randn(batch, heads, slots, 4))


def step(tokens: int, batch: int = 1, layer: int = 0, decoding: bool = False) -> Step:
    seen = torch.full((batch,), tokens)
    return Step(layer=layer, prompt=seen, seen=seen, decoding=decoding)


def hashed(seed: int, layer: int, head: int, position: int) -> float:
    """The definition in Python integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    state = (seed + 0x9E3779B9) % 2**32
    for part in (layer, head, position):
        state = mix(state) ^ part
    return (mix(state) >> 8) / 2**24


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize("layer", [0, 31])
def test_score_is_the_hash(seed, layer, device):
    keys = torch.randn(2, 3, 50, 4, device=device)
    score = Random(1, seed=seed).score(KV.of(keys, keys), step(50, 2, layer)).cpu()
    expected = torch.tensor([[hashed(seed, layer, h, s) for s in range(50)] for h in range(3)])
    assert torch.equal(score, expected.expand(2, -1, -1))
    shared = Random(1, seed=seed, per_head=False).score(KV.of(keys, keys), step(50, 2, layer)).cpu()
    assert torch.equal(shared, expected[None, :1].expand(2, -1, -1))


def test_uniform_over_positions_and_values():
    score = Random(1).score(dense(1, 4, 20_000), step(20_000))
    assert score.min() >= 0 and score.max() < 1
    counts = torch.stack([torch.histc(row, bins=20, min=0, max=1) for row in score[0]])
    assert ((counts - 1000).abs() < 4.5 * (1000 * 0.95) ** 0.5).all()
    assert torch.corrcoef(score[0]).fill_diagonal_(0).abs().max() < 0.03  # heads draw independently

    kv = dense(1, 4, 40)
    samples = [Random(10, seed=seed)(kv, step(40)).position.flatten() for seed in range(300)]
    kept = torch.cat(samples).bincount(minlength=40)
    assert ((kept / 1200 - 0.25).abs() < 4 * (0.25 * 0.75 / 1200) ** 0.5).all()


def test_seed_layer_and_head_each_change_the_sample():
    kv = dense(1, 2, 60)
    kept = Random(20)(kv, step(60)).position
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert not torch.equal(kept, Random(20, seed=1)(kv, step(60)).position)
    assert not torch.equal(kept, Random(20)(kv, step(60, layer=1)).position)
    assert torch.equal(kept, Random(20)(kv, step(60)).position)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("chunks", [[60], [25, 35], [30, *[1] * 30], [1] * 60], ids=["one", "two", "decode", "single"])
def test_the_sample_does_not_depend_on_the_chunking(chunks, per_head):
    keys, values = torch.randn(2, 1, 2, 60, 4).unbind()
    policy = Random(20, per_head=per_head)
    expected = policy(KV.of(keys, values), step(60))
    kv, seen = KV.of(keys[:, :, :0], values[:, :, :0]), 0
    for tokens in chunks:
        new = slice(seen, seen + tokens)
        kv = kv.append(keys[:, :, new], values[:, :, new], seen=torch.tensor([seen]))
        seen += tokens
        kv = policy(kv, step(seen, decoding=tokens == 1 and seen > 1))
    assert torch.equal(kv.position, expected.position)
    assert torch.equal(kv.keys.dense(), expected.keys.dense())


def test_shared_keeps_the_same_tokens_in_all_heads_and_one_position_per_slot():
    kv = Random(20, per_head=False)(dense(1, 3, 60), step(60))
    assert kv.position.shape == (1, 1, 20)
    assert Random(20, per_head=False).shared_over_heads and not Random(20).shared_over_heads


def test_scores_follow_their_tokens():
    kv = dense(1, 2, 30)
    order = torch.randperm(30)
    moved = KV(kv.keys, kv.values, {"position": kv.position[..., order]})
    for policy in (Random(5), Random(5, per_head=False)):
        assert torch.equal(policy.score(moved, step(30)), policy.score(kv, step(30))[..., order])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be an int from 0 to"),
        ({"seed": 2**32}, "seed must be an int from 0 to"),
        ({"seed": 1.0}, "seed must be an int from 0 to"),
        ({"seed": True}, "seed must be an int from 0 to"),
        ({"per_head": 1}, "per_head must be true or false"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Random(5, **options)
