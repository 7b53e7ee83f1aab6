"""The bridge to kvpress: against presses of our own, and, where kvpress is installed, against kvpress itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvbench import CompressedCache
from kvbench.bridge import PressEvictor, to_press
from kvbench.policies import (
    KIVI,
    KV,
    ExpectedAttention,
    Full,
    H2OPrefill,
    KeyDiff,
    KNorm,
    LagKV,
    Policy,
    PyramidKV,
    Quest,
    SnapKV,
    Step,
    StreamingLLM,
)


class NormPress:
    """As kvpress's KnormPress, but it needs at least one slot, and says what it was given."""

    def __init__(self, compression_ratio: float = 0.0) -> None:
        self.compression_ratio = compression_ratio
        self.given: list[tuple[Any, ...]] = []

    def score(self, module: Any, hidden: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Tensor:
        kept = int(keys.shape[2] * (1 - self.compression_ratio))
        self.given.append((keys.shape[1:3], kept))
        assert keys.abs().max() < 30, "dead columns are not to be seen"
        return -keys.norm(dim=-1)


class NosyPress(NormPress):
    reads = "hidden_states"

    def score(self, module: Any, hidden: Any, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any) -> Tensor:
        return {"hidden_states": lambda: hidden.shape, "the forward's arguments": lambda: kwargs["x"]}[self.reads]()


def layer(*lengths: int, heads: int = 2) -> tuple[KV, Step]:
    width, seen = max(lengths), torch.tensor(lengths)
    keys, values = torch.randn(2, len(lengths), heads, width, 8)
    valid = torch.arange(width) >= width - seen[:, None]
    none = keys[:, :, :0]
    kv = KV.of(none, none).append(keys, values, valid, torch.zeros_like(seen))
    kv.keys.tail.masked_fill_(~kv.counts.live()[..., None], 40.0)
    return kv, Step(0, seen, seen)


def test_a_press_scores_each_row_by_itself():
    kv, step = layer(40, 29)
    press = NormPress()
    kept = PressEvictor(0.25, press=press)(kv, step)
    assert press.given == [((2, 40), 10), ((2, 29), 8)] and press.compression_ratio == 0
    for b, (n, slots) in enumerate([(40, 10), (29, 8)]):
        smallest = kv.keys.dense()[b, :, :n].norm(dim=-1).argsort(dim=-1)[:, :slots].sort(-1).values
        assert torch.equal(kept.position[b, :, :slots].long(), smallest)


def test_heads_that_hold_different_numbers_are_scored_one_by_one():
    kv, step = layer(30)
    index = torch.stack([torch.arange(30), torch.cat([torch.arange(12), torch.full((18,), -1)])])[None]
    press = NormPress()
    kept = PressEvictor(6, press=press)(kv.gather(index), step)
    assert press.given == [((1, 30), 6), ((1, 12), 6)] and kept.counts.even == 6


def test_budget_of_the_press_and_stacks():
    policy = PressEvictor(press=NormPress(0.75))
    assert policy.budget == 0.25 and hash(policy) == hash(PressEvictor(0.25, press=NormPress()))
    kv, step = layer(64)
    assert (policy | KIVI(2, 8, 8))(kv, step).counts.even == 16
    assert PressEvictor(64, press=NormPress())(kv, step) is kv
    with pytest.raises(ValueError, match="budget=2.0 as a share must be above 0 and at most 1"):
        PressEvictor(2.0, press=NormPress())


def test_presses_that_tensors_cannot_serve():
    kv, step = layer(40)
    for reads in ("hidden_states", "the forward's arguments"):
        press = NosyPress()
        press.reads = reads
        with pytest.raises(TypeError, match=f"NosyPress reads {reads}, which a policy does not see"):
            PressEvictor(10, press=press)(kv, step)
    with pytest.raises(TypeError, match="press must be a kvpress ScorerPress such as KnormPress"):
        PressEvictor(10, press=SimpleNamespace(compression_ratio=0.5))


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (Quest(64), "it selects, but drops nothing"),
        (StreamingLLM(64), 'positions="original" does not'),
        (KeyDiff(64, block=16), "it takes prompts in blocks"),
    ],
    ids=str,
)
def test_policies_that_kvpress_cannot_host(policy, why):
    with pytest.raises(TypeError, match=f"cannot be a press: .*{why}"):
        to_press(policy | KIVI())


# -- with kvpress ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kvpress() -> Any:
    return pytest.importorskip("kvpress", reason="kvpress is not installed (it pins an older transformers)")


@pytest.mark.parametrize("name", ["KnormPress", "KeyDiffPress", "LagKVPress", "CURPress", "StreamingLLMPress"])
def test_a_press_keeps_what_it_keeps_in_kvpress(name, kvpress):
    kv, step = layer(400)
    keys, values = kv.decode()
    press = getattr(kvpress, name)(compression_ratio=0.375)
    kept_keys, _ = press.compress(SimpleNamespace(head_dim=8), torch.zeros(1, 400, 4), keys, values, None, {})
    kept = PressEvictor(press=press)(kv, step)
    assert kept.counts.even == kept_keys.shape[2] == 250
    assert torch.equal(*(x.norm(dim=-1).sort(-1).values for x in (kept.decode()[0], kept_keys)))  # in other order


@pytest.mark.parametrize(
    ("name", "ours"),
    [("KnormPress", KNorm(250, skip_layers=0)), ("KeyDiffPress", KeyDiff(250)), ("LagKVPress", LagKV(250))],
)
def test_the_same_method_on_both_sides(name, ours, kvpress):
    kv, step = layer(400)
    theirs = PressEvictor(250, press=getattr(kvpress, name)())
    assert torch.equal(theirs(kv, step).position, ours(kv, step).position)


def test_a_press_of_kvpress_that_reads_hidden_states(kvpress):
    for name in ("SnapKVPress", "TOVAPress", "ExpectedAttentionPress", "ObservedAttentionPress", "LeverageScorePress"):
        with pytest.raises(TypeError, match=f"{name} reads "):
            PressEvictor(100, press=getattr(kvpress, name)())(*layer(400))
    with pytest.raises(TypeError, match="press must be a kvpress ScorerPress"):
        PressEvictor(100, press=kvpress.AdaKVPress(kvpress.KnormPress()))


@pytest.mark.parametrize(
    "policy",
    [
        SnapKV(0.4, window=8, kernel=3),
        KeyDiff(0.4),
        H2OPrefill(0.4),
        ExpectedAttention(0.4),
        PyramidKV(40, window=8),
        SnapKV(60, window=8) | KIVI(2, 32, 0),
        Full(),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_policy_does_in_kvpress_what_it_does_here(policy: Policy, tiny, kvpress):
    model, _ = tiny
    ids = torch.randint(2, 200, (2, 100))
    ours, theirs = CompressedCache(model, policy), DynamicCache()
    model(ids, past_key_values=ours)
    with to_press(policy)(model):
        model(ids, past_key_values=theirs)
        for i, held in enumerate(theirs.layers):
            for mine, its in zip(ours.layers[i].kv.decode(), (held.keys, held.values), strict=True):
                torch.testing.assert_close(its, mine, atol=1e-4, rtol=1e-4)
        slots = {held.keys.shape[2] for held in theirs.layers}
        if len(slots) == 1:
            token, at = torch.full((2, 1), 7), torch.full((2, 1), 100)
            logits = [model(token, position_ids=at, past_key_values=cache).logits for cache in (ours, theirs)]
            torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)
            assert {held.keys.shape[2] for held in theirs.layers} == {n + 1 for n in slots}  # the step drops nothing
