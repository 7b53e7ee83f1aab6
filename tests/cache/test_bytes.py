"""The byte ledger counts what is alive, to the byte; byte budgets hold; no matrix of tokens x tokens ever exists."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedConfig

from kvbench import CompressedCache
from kvbench.kernels.attention import reference
from kvbench.policies import FP8, H2O, KIVI, NVFP4, BudgetError, Full, KeyDiff, Random, SnapKV, StreamingLLM

LEAVES = (str, bytes, int, float, type, nn.Module, PreTrainedConfig, torch.device, torch.dtype,
          ModuleType, FunctionType, BuiltinFunctionType, MethodType)  # fmt: skip
LENGTHS = {"seen", "prompt", "lengths"}  # int64, one or a few per row, whatever the length of the text


def storages(root: object, left_out: set[int]) -> dict[int, int]:
    """address -> bytes of every tensor storage that can be reached from `root`, the given ones left out."""
    found: dict[int, int] = {}
    met: dict[int, object] = {}
    todo = [root]
    while todo:
        item = todo.pop()
        if id(item) in met or item is None or isinstance(item, LEAVES):
            continue
        met[id(item)] = item
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in left_out:
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, Mapping):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            todo += item
        todo += vars(item).values() if hasattr(item, "__dict__") else []
        todo += [getattr(item, slot, None) for slot in getattr(type(item), "__slots__", ())]
    return found


def reachable(cache) -> int:
    of_model = {t.untyped_storage().data_ptr() for t in (*cache.model.parameters(), *cache.model.buffers())}
    return sum(storages(cache, of_model).values())


def assert_report(cache) -> None:
    lines = cache.report().splitlines()
    assert lines[0] == str(cache.policy) and len(lines) == len(cache.layers) + 3
    number = lambda text: int(text.replace(",", ""))  # noqa: E731
    cells = [line.split() for line in lines[2:]]
    assert sum(number(row[4]) for row in cells[:-1]) == number(cells[-1][1]) == cache.nbytes
    assert sum(number(row[5]) for row in cells[:-1]) == number(cells[-1][2]) == cache.full_nbytes
    assert cells[-1][3] == f"{cache.nbytes / cache.full_nbytes:.3f}"


@pytest.mark.parametrize("lengths", [(33,), (33, 20)], ids=["single", "padded"])
def test_every_reachable_byte_is_counted(policy, lengths, tiny, do) -> None:
    model = tiny()
    cache = CompressedCache(model, policy)
    assert cache.nbytes == reachable(cache) == 0
    ids, mask = do.left_padded(*lengths)
    do.feed(model, cache, ids, mask)
    assert cache.nbytes == reachable(cache) > 0
    cache.reset()
    do.greedy(model, cache, ids, mask, new=12)
    assert cache.nbytes == reachable(cache) == sum(part.nbytes for part in cache.ledger())
    assert_report(cache)
    cache.reorder_cache(torch.zeros(len(ids), dtype=torch.long))
    assert cache.nbytes == reachable(cache)
    if do.can_crop(cache):
        cache.crop(-4)
        assert cache.nbytes == reachable(cache)
    cache.reset()
    gc.collect()
    assert cache.nbytes == reachable(cache) == 0


def test_bytes_of_every_family(family, tiny, do) -> None:
    model = tiny(family)
    for policy in (StreamingLLM(9), H2O(9) | KIVI(2, 8, 8)):
        cache = CompressedCache(model, policy)
        do.greedy(model, cache, *do.left_padded(20, 31))
        assert cache.nbytes == reachable(cache)
        assert_report(cache)


def test_bytes_of_a_deferred_prompt_and_of_records(tiny, do) -> None:
    model = tiny()
    ids, mask = do.left_padded(40, 31)
    for options in ({}, {"needs": {"attention": 1, "queries": 8}}):
        cache = CompressedCache(model, SnapKV(0.5, window=8), **options)
        with cache.deferred():
            do.feed(model, cache, ids[:, :20], mask[:, :20])
            assert cache.nbytes == reachable(cache)
            assert {"queries", "query_valid"} <= {part.name for part in cache.ledger()}
        assert cache.nbytes == reachable(cache)
        assert ("queries" in {part.name for part in cache.ledger()}) == bool(options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_full_bytes_are_dynamic_cache_in_16_bits(family, dtype, tiny, do) -> None:
    model, ids = tiny(family, dtype=dtype), do.left_padded(30, 30)[0]
    cache, full, theirs = CompressedCache(model, H2O(8)), CompressedCache(model), DynamicCache(config=model.config)
    for past in (cache, full, theirs):
        do.greedy(model, past, ids, new=6)
    wanted = sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in theirs.layers)
    assert cache.full_nbytes == full.full_nbytes == wanted
    padded = CompressedCache(model)
    do.feed(model, padded, *do.left_padded(30, 13))
    if not any(padded.is_sliding):
        assert padded.full_nbytes == wanted // 70 * 43  # real tokens only


def test_full_holds_what_dynamic_cache_holds(tiny, do) -> None:
    model, ids = tiny(dtype=torch.bfloat16), do.left_padded(30, 30)[0]
    cache = CompressedCache(model)
    do.feed(model, cache, ids)
    assert sum(part.nbytes for part in cache.ledger() if part.name not in LENGTHS) == cache.full_nbytes
    assert {part.name for part in cache.ledger()} == {"keys.tail", "values.tail", "seen"}


@pytest.mark.parametrize("share", [0.15, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_byte_budgets_hold(share, dtype, tiny, do) -> None:
    """Measured bytes of every layer stay within the share of the 16-bit full cache, but for int64 lengths."""
    model = tiny(dtype=dtype)
    evictors = (Random(memory=share), StreamingLLM(memory=share), H2O(memory=share), KeyDiff(memory=share))
    quantizers = (Full(), KIVI(2, 16, 16), KIVI(4, 8, 0), NVFP4(), FP8())
    ids, _ = do.left_padded(150, 150)
    record = CompressedCache(model, needs={"attention": 1})
    do.feed(model, record, ids)
    for evictor in evictors:
        for quantizer in quantizers:
            stack = evictor | quantizer
            cache = record.fork(stack)
            held = [sum(p.nbytes for p in cache.ledger() if p.layer == i and p.name not in LENGTHS) for i in (0, 1)]
            allowed, slots = share * cache.full_nbytes / 2, cache.kept(0).shape[2]
            assert max(held) <= allowed, stack
            # One more slot would not fit (fewer only where a whole group must be packed to make room).
            if slots < 150 and not isinstance(quantizer, KIVI):
                assert max(held) * (slots + 1) / slots > allowed, stack


def test_byte_budget_of_padded_rows(tiny, do) -> None:
    model = tiny(dtype=torch.bfloat16)
    ids, mask = do.left_padded(120, 77)
    for policy in (H2O(memory=0.3), KeyDiff(memory=0.3) | NVFP4(), Random(memory=0.2) | KIVI(2, 16, 16)):
        cache = CompressedCache(model, policy)
        do.feed(model, cache, ids, mask)
        full = torch.tensor([120, 77]) * 2 * 2 * 2 * 32 * 2
        assert bool((cache.row_nbytes() <= 0.3 * full).all())


def test_byte_budget_nobody_can_meet(tiny, do) -> None:
    model = tiny()
    cache = CompressedCache(model, SnapKV(memory=0.1, window=32))
    with pytest.raises(BudgetError, match=r"room for 3 slots, but 32 are needed; use a larger memory="):
        do.feed(model, cache, do.left_padded(64)[0])


@dataclass
class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""

    numel: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.untyped_storage().nbytes() // item.element_size())
        return out


@pytest.mark.parametrize("policy", [H2O(0.25) | NVFP4(), SnapKV(256) | KIVI(), StreamingLLM(128)], ids=str)
@pytest.mark.parametrize("lengths", [(2048,), (2048, 1500)], ids=["single", "padded"])
def test_no_square_matrix(policy, lengths, tiny, do, monkeypatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 2**20)
    model = tiny(num_hidden_layers=1)
    ids, mask = do.left_padded(*lengths)
    cache = CompressedCache(model, policy)
    with Largest() as prefill:
        do.feed(model, cache, ids, mask)
    assert prefill.numel <= 2**20  # 2048 x 2048 x 4 heads are 2**24
    turn = torch.cat([mask, torch.ones(len(ids), 600, dtype=torch.long)], 1)
    with Largest() as second:
        do.feed(model, cache, ids[:, :600], turn)
    assert second.numel <= 2**20 < 600 * 600 * 4


def test_row_that_fits_pays_for_no_positions_beside_one_that_does_not(tiny):
    """The short row keeps everything, and alone it would store no positions."""
    model = tiny("llama", dtype=torch.bfloat16)
    policy = SnapKV(budget=40, window=4)
    rows = [torch.randint(2, 40, (1, n)) for n in (60, 33)]
    alone = []
    for ids in rows:
        cache = CompressedCache(model, policy)
        model(ids, past_key_values=cache)
        alone.append(int(cache.row_nbytes()))
    batch = torch.zeros(2, 60, dtype=torch.long)
    batch[0], batch[1, 27:] = rows[0][0], rows[1][0]
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :27] = 0
    cache = CompressedCache(model, policy)
    model(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    assert cache.row_nbytes().tolist() == alone
