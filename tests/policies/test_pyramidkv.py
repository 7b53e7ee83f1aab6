"""PyramidKV: capacities against fractions and largest remainders, one layer at a time; scores are those of SnapKV."""

from fractions import Fraction
from itertools import product

import pytest
import torch

from kvbench import CompressedCache
from kvbench.policies import KIVI, KV, PyramidKV, SnapKV, Stack, Step


def capacities(layers: int, budget: int, prompt: int, window: int, beta: int, official: bool) -> list[int]:
    """Slots of each layer, window included, by the definition."""
    mean = budget - window
    if layers == 1 or budget >= prompt or prompt < 2 * mean:
        return [budget] * layers
    low = mean // beta
    high = 2 * mean - low
    if high >= prompt - window:
        high = prompt - window
        low = 2 * mean - high
    if official:
        step = (high - low) // (layers - 1)
        return [high - layer * step + window for layer in range(layers)]
    ramp = [high - Fraction(layer * (high - low), layers - 1) for layer in range(layers)]
    whole = [int(x) for x in ramp]
    by_fraction = sorted(range(layers), key=lambda layer: (whole[layer] - ramp[layer], layer))
    for layer in by_fraction[: layers * mean - sum(whole)]:
        whole[layer] += 1
    return [x + window for x in whole]


def step(*prompt: int, order: int = 0, layers: int = 4, queries: torch.Tensor | None = None, **more) -> Step:
    seen = torch.tensor(prompt)
    return Step(0, seen, seen, order=order, layers=layers, queries=queries, scaling=0.5, **more)


@pytest.mark.parametrize("mode", ["exact", "official"])
@pytest.mark.parametrize(("window", "beta"), [(8, 20), (1, 1), (3, 7), (5, 1000)])
def test_capacities_equal_the_definition(mode, window, beta):
    policy = PyramidKV(100, window, beta=beta, mode=mode)
    prompts = torch.tensor([window, window + 1, 37, 129, 1000])
    for layers in (1, 2, 5, 9, 32):
        budgets = torch.tensor([*range(window, window + 30), 64, 71, 128, 299])
        spread = policy.spread(budgets[:, None], prompts, layers)
        assert spread.shape == (layers, len(budgets), len(prompts))
        for (i, budget), (j, prompt) in product(enumerate(budgets.tolist()), enumerate(prompts.tolist())):
            got = spread[:, i, j].tolist()
            assert got == capacities(layers, budget, prompt, window, beta, mode == "official"), (layers, budget, prompt)
            assert got == sorted(got, reverse=True)
            if mode == "exact":
                assert sum(got) == layers * budget
            if budget < prompt:
                assert window <= got[-1] and got[0] <= prompt


def test_official_overspending_is_the_published_code_s():
    spent = {}
    for budget in (128, 512):
        spread = PyramidKV(budget, mode="official").spread(torch.tensor([budget]), torch.tensor([10**6]), 32)
        spent[budget] = int((spread - 8).sum())
    assert spent == {128: 4016, 512: 16576}
    assert int((PyramidKV(128).spread(torch.tensor([128]), torch.tensor([10**6]), 32) - 8).sum()) == 32 * 120


def test_byte_search_may_ask_for_any_number_of_slots():
    for mode in ("exact", "official"):
        slots = torch.arange(51)
        spread = PyramidKV(40, mode=mode).spread(slots, torch.full_like(slots, 50), 6)
        assert (spread >= 0).all() and spread[:, :8].amax() < 8 and (spread[:, 50:] == 50).all()


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_each_layer_is_snapkv_with_its_capacity(pooling):
    keys, queries = torch.randn(2, 2, 60, 8), 2 * torch.randn(2, 4, 4, 8)
    valid = torch.arange(60) >= torch.tensor([[0], [22]])
    kv = KV.of(keys[:, :, :0], keys[:, :, :0]).append(keys, keys, valid, torch.zeros(2, dtype=torch.int64))
    for order in range(4):
        now = step(60, 38, order=order, queries=queries, query_valid=valid[:, -4:])
        kept = PyramidKV(16, 4, 5, pooling, beta=6)(kv, now).position
        for b, prompt in enumerate((60, 38)):
            slots = capacities(4, 16, prompt, 4, 6, False)[order]
            alone = KV.of(keys[b : b + 1, :, 60 - prompt :], keys[b : b + 1, :, 60 - prompt :])
            expected = SnapKV(slots, 4, 5, pooling)(alone, step(prompt, queries=queries[b : b + 1])).position
            assert torch.equal(kept[b, :, :slots], expected[0])
            assert (kept[b, :, slots:] == -1).all()


def test_beta_of_one_is_snapkv_and_decoding_evicts_nothing():
    keys, queries = torch.randn(1, 2, 60, 8), 2 * torch.randn(1, 4, 8, 8)
    kv = KV.of(keys, keys)
    for order in range(4):
        now = step(60, order=order, queries=queries)
        assert torch.equal(PyramidKV(20, beta=1)(kv, now).position, SnapKV(20, 8)(kv, now).position)
    assert PyramidKV(20)(kv, step(60, queries=queries, decoding=True)) is kv


@pytest.mark.parametrize("mode", ["exact", "official"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_memory_gives_the_largest_mean_whose_bytes_fit_in_all_layers_together(mode, packed):
    keys = torch.randn(1, 2, 48, 32).bfloat16()
    queries = torch.randn(1, 4, 8, 32).bfloat16()

    def held(policy: PyramidKV) -> tuple[list[int], int]:
        stack = Stack((policy, KIVI(4, residual=0))) if packed else Stack((policy,))
        kvs = [stack(KV.of(keys, keys), step(48, order=i, layers=3, queries=queries)) for i in range(3)]
        return [kv.counts.even for kv in kvs], sum(kv.nbytes for kv in kvs)

    by_mean = {n: held(PyramidKV(n, mode=mode)) for n in range(8, 49)}
    for memory in (0.15, 0.2) if packed else (0.4, 0.5):
        allowed = memory * 3 * 2 * 48 * 2 * 32 * 2
        most = max(n for n, (_, nbytes) in by_mean.items() if nbytes <= allowed)
        slots, nbytes = held(PyramidKV(memory=memory, mode=mode))
        assert slots == by_mean[most][0] and slots[0] > slots[-1] and nbytes <= allowed


def test_defaults_and_needs():
    policy = PyramidKV(100)
    assert (policy.window, policy.kernel, policy.pooling, policy.beta, policy.mode) == (8, 7, "max", 20, "exact")
    assert policy.needs == {"queries": 8} and policy.min_slots == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 7}, r"PyramidKV: budget=7 is too small: it must be at least 8 \(what the policy protects\)"),
        ({"budget": 50, "window": 0}, "window must be an int of at least 1 token, got 0"),
        ({"budget": 50, "beta": 0}, "PyramidKV: beta must be an int of at least 1, got 0"),
        ({"budget": 50, "beta": 2.5}, "PyramidKV: beta must be an int of at least 1, got 2.5"),
        ({"budget": 50, "mode": "paper"}, "PyramidKV: mode must be 'exact' or 'official', got 'paper'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        PyramidKV(**arguments)


def test_in_a_model_the_layers_share_the_budget(tiny):
    model, _ = tiny
    with torch.no_grad():
        for policy in (PyramidKV(20, beta=3), PyramidKV(memory=0.3, beta=3)):
            cache = CompressedCache(model, policy)
            model(torch.arange(100)[None], past_key_values=cache)
            low, high = (layer.kv.counts.even for layer in cache.layers)
            b = (low + high) / 2 - 8
            assert (low, high) == (8 + 2 * b - b // 3, 8 + b // 3)
            assert policy.budget in (None, b + 8)
            assert policy.memory is None or cache.nbytes <= 0.3 * 2 * 2 * 100 * 2 * 32 * 2
