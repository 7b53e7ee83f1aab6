"""StreamingLLM keeps [0, sinks) and the newest rest, whatever the keys are."""

import pytest
import torch

from kvbench.policies import KV, Step, StreamingLLM


def step(*seen: int, decoding: bool = False, prompt: tuple[int, ...] | None = None) -> Step:
    return Step(layer=0, prompt=torch.tensor(prompt or seen), seen=torch.tensor(seen), decoding=decoding)


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("budget", [4, 5, 17, 29])
def test_kept_positions(budget, sinks):
    keys = torch.randn(2, 3, 30, 4)
    kv = StreamingLLM(budget, sinks=sinks)(KV.of(keys, 2 * keys), step(30, 30))
    expected = [*range(sinks), *range(30 - (budget - sinks), 30)]
    assert kv.position.tolist() == [[expected]] * 2  # one list for all heads
    assert torch.equal(kv.keys.dense(), keys[:, :, expected])
    assert torch.equal(kv.values.dense(), 2 * keys[:, :, expected])


def test_decoding_slides_the_window():
    keys = torch.randn(1, 2, 40, 4)
    policy = StreamingLLM(0.5, sinks=2)
    kv = policy(KV.of(keys[:, :, :20], keys[:, :, :20]), step(20))
    for t in range(20, 40):
        kv = kv.append(keys[:, :, t : t + 1], keys[:, :, t : t + 1], seen=torch.tensor([t]))
        kv = policy(kv, step(t + 1, decoding=True, prompt=(20,)))
        assert kv.position[0, 0].tolist() == [0, 1, *range(t - 7, t + 1)]


def test_sinks_are_the_first_real_tokens_of_a_padded_row():
    keys = torch.randn(2, 2, 12, 4)
    valid = torch.arange(12) >= torch.tensor([[0], [5]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    kv = StreamingLLM(6, sinks=2)(kv, step(12, 7))
    assert kv.position[:, 0].tolist() == [[0, 1, 8, 9, 10, 11], [0, 1, 3, 4, 5, 6]]
    assert torch.equal(kv.keys.dense()[1], keys[1][:, [5, 6, 8, 9, 10, 11]])
    short = StreamingLLM(9, sinks=2)(KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid), step(12, 7))
    assert short.position[:, 0].tolist() == [[0, 1, 5, 6, 7, 8, 9, 10, 11], [*range(7), -1, -1]]


def test_positions_and_defaults():
    assert StreamingLLM(8).in_cache_positions and not StreamingLLM(8, positions="original").in_cache_positions
    assert StreamingLLM(8).shared_over_heads and StreamingLLM(8).needs == {}
    assert StreamingLLM(8).sinks == 4
    assert str(StreamingLLM(8, 2)) == "StreamingLLM(budget=8, sinks=2)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 3}, r"budget=3 is too small: it must be at least 4 \(what the policy protects\)"),
        ({"budget": 9, "sinks": -1}, "sinks must be an int of 0 or more tokens, got -1"),
        ({"budget": 9, "sinks": 0.5}, "sinks must be an int of 0 or more tokens, got 0.5"),
        ({"budget": 9, "positions": "rope"}, "positions must be 'in_cache' or 'original', got 'rope'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        StreamingLLM(**arguments)
