"""Scores of slots: the kernels against the PyTorch reference, for whatever is visible.

Without a GPU the kernels run in Triton's interpreter (see tests/conftest.py), with one they run on it.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.kernels import scores
from kvbench.kernels.attention import attend_causal
from kvbench.kernels.attention import column_sums as expected_sums
from kvbench.kernels.scores import reference
from kvbench.policies import H2O, KeyDiff
from kvbench.policies.interface import KV, Step

triton = pytest.importorskip("triton")
from kvbench.kernels.scores import triton as kernels  # noqa: E402

BLOCKS = (16, 16)
HALF, FULL, BRAIN = torch.float16, torch.float32, torch.bfloat16


class Case:
    """Queries of the newest tokens, and keys at positions that need not be consecutive."""

    def __init__(
        self, batch: int, heads: int, group: int, tokens: int, slots: int, channels: int, dtype: torch.dtype = FULL,
        shared: bool = True, pads: bool = False, dead: int = 0, device: Any = "cpu",
    ) -> None:  # fmt: skip
        self.query = torch.randn(batch, heads * group, tokens, channels).to(device, dtype)
        self.keys = (2 * torch.randn(batch, slots, heads, channels)).to(device, dtype).transpose(1, 2)
        ahead = torch.randint(0, 3 if not shared else 1, (batch, 1 if shared else heads, slots))
        self.slot = (torch.arange(slots) + ahead.cumsum(-1)).to(device)
        newest = int(self.slot.max()) if slots else tokens
        self.slot[0, :, slots - dead :] = -1
        self.at = (newest - tokens + 1 + torch.arange(tokens)).clamp(min=0).expand(batch, -1).to(device)
        self.options: dict[str, Any] = {"scaling": channels**-0.5}
        if pads:
            self.options["query_valid"] = (torch.rand(batch, tokens) > 0.4).to(device)

    def check(self, **options: Any) -> Tensor:
        options = self.options | options
        got = kernels.column_sums(self.query, self.keys, self.at, self.slot, **{"blocks": BLOCKS} | options)
        options.pop("blocks", None)
        wanted = expected_sums(self.query.float(), self.keys.float(), self.at, self.slot, **options)
        assert got.dtype == FULL
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        return got


@pytest.mark.parametrize("dtype", [HALF, FULL, BRAIN])
@pytest.mark.parametrize(
    "shape",
    [(1, 2, 3, 33, 33, 64), (2, 1, 4, 17, 40, 80), (1, 1, 8, 1, 50, 96), (1, 2, 1, 48, 15, 16), (1, 1, 1, 0, 5, 16)],
)
def test_column_sums(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    case = Case(*shape, dtype=dtype, device=device)
    assert case.check().sum() == pytest.approx(shape[1] * shape[2] * ((case.at >= 0).sum().item()), rel=1e-5)


def test_positions_of_heads_padding_and_dead_columns(device: torch.device) -> None:
    Case(2, 2, 2, 20, 47, 32, HALF, shared=False, pads=True, dead=9, device=device).check()
    Case(2, 2, 2, 20, 47, 32, shared=False, dead=47, device=device).check()  # a row that holds nothing


def test_blocks_of_any_size_give_the_same(device: torch.device) -> None:
    case = Case(1, 2, 2, 70, 90, 64, HALF, device=device)
    one = case.check(blocks=None)
    for blocks in ((16, 32), (64, 16)):
        torch.testing.assert_close(case.check(blocks=blocks), one, rtol=1e-5, atol=1e-5)


def test_softcap_and_learned_sinks(device: torch.device) -> None:
    case, sinks = Case(1, 2, 2, 20, 40, 64, HALF, pads=True, device=device), torch.randn(4).to(device)
    case.check(softcap=5.0)
    case.check(sinks=sinks)
    case.check(softcap=2.0, sinks=sinks)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_windows_and_selections(heads: int, device: torch.device) -> None:
    case = Case(2, 2, 2, 20, 47, 32, pads=True, device=device)
    allowed = (torch.rand(2, heads, 47) > 0.7).to(device)
    case.check(allowed=allowed, recent=3)
    case.check(allowed=allowed, recent=torch.tensor([0, 7], device=device))
    case.check(allowed=torch.zeros_like(allowed), recent=4)  # a sliding window


def test_probes_and_a_log_sum_exp_at_hand(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A subset of the queries, whose log-sum-exps some other kernel has stored."""
    case = Case(1, 2, 2, 40, 40, 32, HALF, device=device)
    found, real = [], kernels._log_sum_exp
    monkeypatch.setattr(kernels, "_log_sum_exp", lambda *args, **more: found.append(real(*args, **more)) or found[-1])
    case.check()
    (lse,) = found
    logits = (case.query.double().view(1, 2, 80, 32) @ case.keys.double().transpose(2, 3)).view(1, 4, 40, 40) * 32**-0.5
    logits = logits.masked_fill(case.slot[:, :, None] > case.at[:, None, :, None], -torch.inf)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    probes = torch.tensor([3, 21, 22, 39], device=device)
    case.query, case.at = case.query[:, :, probes], case.at[:, probes]
    assert torch.equal(case.check(), kernels.column_sums(
        case.query, case.keys, case.at, case.slot, **case.options, lse=lse[:, :, probes], blocks=BLOCKS
    ))  # fmt: skip


@pytest.mark.parametrize("chosen", [range(40), range(32, 40), [3, 17, 38]], ids=["all", "window", "probes"])
def test_the_attention_s_own_log_sum_exps(chosen: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that PyTorch's fused attention returns: the sums are the only second pass."""
    dtype = FULL if device.type == "cpu" else HALF
    query, keys = (2 * torch.randn(2, heads, 40, 32, device=device, dtype=dtype) for heads in (4, 2))
    at, i = torch.arange(40, device=device).expand(2, -1), list(chosen)
    lse = attend_causal(query, keys, keys, scaling=0.2)[1]
    assert lse is not None
    valid = torch.rand(2, len(i), device=device) > 0.3
    lse = lse[:, :, i].masked_fill(~valid[:, None], torch.nan)
    monkeypatch.setattr(kernels, "_log_sum_exp", None)
    got = kernels.column_sums(
        query[:, :, i], keys, at[:, i], at[:, None], scaling=0.2, query_valid=valid, lse=lse, blocks=BLOCKS
    )
    logits = query.double() @ keys.double().repeat_interleave(2, 1).mT * 0.2
    logits = logits.masked_fill(torch.ones(40, 40, dtype=torch.bool, device=device).triu(1), -torch.inf)
    weights = logits.softmax(-1)[:, :, i] * valid[:, None, :, None]
    torch.testing.assert_close(got.double(), weights.unflatten(1, (2, 2)).sum((2, 3)), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.sum(-1), 2.0 * valid.sum(1)[:, None].expand(-1, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(8))
def test_any_positions(seed: int, device: torch.device) -> None:
    """Queries and slots in any order: nothing visible is passed over."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tokens, slots = draw.randint(1, 40), draw.randint(1, 60)
    case = Case(1, 2, draw.randint(1, 3), tokens, slots, 16, shared=draw.choice([False, True]), device=device)
    case.at = torch.randint(-1, 60, (1, tokens), device=device)
    case.slot = torch.randint(-1, 60, case.slot.shape, device=device).sort(-1).values
    dead = torch.rand(case.slot.shape, device=device) > 0.8
    case.slot = case.slot.masked_fill(dead, -1)
    got = kernels.column_sums(case.query, case.keys, case.at, case.slot, **case.options, blocks=BLOCKS)
    order = case.slot.masked_fill(case.slot < 0, 99).argsort(-1).expand(1, 2, -1)  # the reference wants slots in order
    keys = case.keys.gather(2, order[..., None].expand(-1, -1, -1, 16))
    slot = case.slot.expand(1, 2, -1).gather(2, order)
    wanted = expected_sums(case.query, keys, case.at, slot, **case.options)
    torch.testing.assert_close(got.gather(2, order), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [16, 80, 128])
def test_lengths_and_directions_of_keys(channels: int, device: torch.device) -> None:
    keys = torch.randn(2, 70, 3, channels).to(device, HALF).transpose(1, 2)
    keys[0, 0, 3] = 0
    torch.testing.assert_close(kernels.key_norms(keys), reference.key_norms(keys))
    for live in (torch.rand(2, 1, 70) > 0.3, torch.rand(2, 3, 70) > 0.9, torch.zeros(2, 1, 70, dtype=torch.bool)):
        for unit in (True, False):
            wanted = reference.key_alignment(keys, live.to(device), unit)
            torch.testing.assert_close(kernels.key_alignment(keys, live.to(device), unit), wanted, rtol=1e-5, atol=1e-6)
    assert kernels.key_norms(keys[:, :, :0]).shape == (2, 3, 0)


def test_backends_give_the_same_scores(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    keys, query = torch.randn(1, 2, 40, 32, device=device), torch.randn(1, 4, 40, 32, device=device)
    kv, at = KV.of(keys, keys), torch.arange(40, device=device)[None]
    ran, found = [], []
    for name in ("column_sums", "key_alignment"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, f=function, **options: ran.append(f) or f(*args, **options))
    for backend in ("torch", "interpret" if device.type == "cpu" else "triton"):
        monkeypatch.setenv("KVBENCH_BACKEND", backend)
        sums = scores.column_sums(query, keys, at, at[:, None], scaling=0.2)
        found.append((sums, KeyDiff(budget=8).score(kv, Step.__new__(Step))))
        assert len(ran) == (0 if backend == "torch" else 2)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_cache_collects_attention_by_the_kernels(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvbench import CompressedCache

    model, tokens = tiny[0], torch.randint(2, 200, (1, 24))
    kept = []
    for backend in ("torch", "interpret"):
        monkeypatch.setenv("KVBENCH_BACKEND", backend)
        cache = CompressedCache(model, H2O(budget=12))
        with torch.no_grad():
            model(tokens, past_key_values=cache)
        kept.append([layer.kv.position for layer in cache.layers])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


SHAPE = {
    "HEADS": 8, "G": 4, "SHARED": True, "NARROWED": False, "SOFTCAP": False, "SINKS": False, "D": 128, "D2": 128,
    "BQ": 64, "BK": 128, "query_batch": 2**25, "query_head": 128, "query_row": 4096, "key_batch": 2**23,
    "key_head": 128, "key_row": 1024,
}  # fmt: skip
SIGNATURE = {
    **dict.fromkeys(("at", "slot", "recent", "last", "first"), "*i32"), **dict.fromkeys(("allowed", "live"), "*i8"),
    **dict.fromkeys(("sinks", "lse", "sums", "parts", "anchor", "out"), "*fp32"),
    **dict.fromkeys(("scaling", "softcap"), "fp32"),
    **dict.fromkeys(("tokens", "slots", "live_batch", "live_head", "live_row"), "i32"),
}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["lse_kernel", "column_kernel"])
def test_builds(kernel: str, capability: int, compiling: Any) -> None:
    signature = SIGNATURE | {"query": "*bf16", "keys": "*bf16"}
    shape = SHAPE | {"COMPUTE": triton.language.bfloat16}
    built = compiling.compiled(getattr(kernels, kernel), signature, shape, capability, num_warps=8)
    assert built.shared <= compiling.MOST_SHARED[capability] // 2  # two programs at a time
    assert built.sass["STL"] <= (20 if capability == 100 else 0)  # tiles are chosen for sm_90
    assert built.loops and all(loop["I2F"] == loop["F2I"] == 0 for loop in built.loops)
    logits = 64 * 128 // 256  # of each thread, each block
    assert sum(built.loops[0].values()) <= (50 if capability == 100 else 24) * logits


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_other_shapes_fit(capability: int, compiling: Any) -> None:
    wide = SHAPE | {"D": 256, "D2": 256, "BK": 64, "COMPUTE": triton.language.bfloat16, "SOFTCAP": True}
    signature = SIGNATURE | {"query": "*bf16", "keys": "*bf16"}
    built = compiling.compiled(kernels.column_kernel, signature, wide | {"NARROWED": True}, capability)
    assert built.shared <= compiling.MOST_SHARED[capability]
    padded = SHAPE | {"D": 96, "SINKS": True, "NARROWED": True, "SHARED": False, "COMPUTE": triton.language.float16}
    signature |= {"query": "*fp16", "keys": "*fp16"}
    built = compiling.compiled(kernels.lse_kernel, signature, padded, capability, num_warps=8)
    assert built.shared <= compiling.MOST_SHARED[capability]
    assert built.loops and all(loop["I2F"] == loop["F2I"] == 0 for loop in built.loops)
    rows = {"HEADS": 8, "key_batch": 2**23, "key_head": 128, "key_row": 1024, "D": 128, "D2": 128, "R": 32, "EPS": 1e-8}
    for kernel, more in (
        (kernels.sum_kernel, {"CHUNK": 512, "UNIT": True}),
        (kernels.cosine_kernel, {"ANCHORED": True}),
    ):
        built = compiling.compiled(kernel, signature, rows | more, capability)
        assert built.shared <= 16 * 1024 and built.sass["STL"] == built.sass["I2F"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
@pytest.mark.parametrize("channels", [64, 96, 128, 256])
def test_large_on_a_gpu(channels: int, dtype: torch.dtype, device: torch.device) -> None:
    case = Case(2, 2, 4, 1000, 1500, channels, dtype, pads=True, dead=77, device=device)
    got = kernels.column_sums(case.query, case.keys, case.at, case.slot, **case.options)
    wanted = expected_sums(case.query.float(), case.keys.float(), case.at, case.slot, **case.options)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    again = kernels.column_sums(case.query, case.keys, case.at, case.slot, **case.options)
    assert torch.equal(got, again)
