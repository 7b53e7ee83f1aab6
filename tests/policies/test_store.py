"""How packed bodies grow: in place, in rooms of their own, whatever happened to them before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench import backend
from kvbench.policies import FP8, KIVI, NVFP4, IntToken, Kitty, Quantizer, TurboQuant
from kvbench.policies import store as module
from kvbench.policies.interface import KV, Step
from kvbench.policies.store import Counts, Held, Packed, Where

POLICIES = [
    KIVI(2, 8, 0), KIVI(4, 4, 0), FP8(), FP8(per_token=True), NVFP4(rotate=True), IntToken(4, symmetric=True),
    TurboQuant(3), Kitty(0.25, 8, 0, sinks=0), KIVI(2, 8, 0, sinks=3),
]  # fmt: skip
every = pytest.mark.parametrize("policy", POLICIES, ids=str)


def grown(policy: Quantizer, kv: KV, tokens: int, seen: int) -> tuple[KV, Tensor]:
    """`kv` with so many random tokens more, one at a time, packed as they come; and their keys."""
    batch, heads, _, dim = kv.keys.shape
    new = torch.randn(2, batch, heads, tokens, dim)
    for i in range(tokens):
        at = torch.full((batch,), seen + i)
        kv = kv.append(new[0][:, :, i : i + 1], new[1][:, :, i : i + 1], seen=at)
        kv = policy(kv, Step(0, at, at + 1, decoding=True))
    return kv, new[0]


def stored(held: Held) -> dict[str, Tensor]:
    return dict(held.body.tensors()) if held.body is not None else {}


@every
@pytest.mark.parametrize("evicted", [False, True], ids=["all", "evicted"])
def test_bodies_grow_in_place(policy: Quantizer, evicted: bool) -> None:
    """256 tokens one by one: storages move a few times, what is held never changes, and spare rows stay few."""
    kv = policy.encode(*torch.randn(2, 2, 3, 64, 16))
    if evicted:
        kv = kv.gather(torch.arange(0, 64, 2).expand(2, 3, -1))
    group = kv.keys.body.codec.group  # type: ignore[union-attr]
    places: dict[str, set[int]] = {}
    for step in range(256):
        before = kv.keys.dense()[:, :, : int(kv.keys.packed[1].min())]
        kv, _ = grown(policy, kv, 1, 64 + step)
        body = kv.keys.body
        assert body is not None and torch.equal(kv.keys.dense()[:, :, : before.shape[2]], before)
        for name, tensor in stored(kv.keys).items():
            places.setdefault(name, set()).add(tensor.untyped_storage().data_ptr())
        assert body.spare <= max(8, body.counts.width // 16) + group
        assert all(len(x) == 6 * (body.counts.width + body.spare) for x in body.rows.values())
        assert kv.nbytes == sum(t.untyped_storage().nbytes() for _, t in kv.tensors())
    assert places and all(len(found) <= 24 for found in places.values())
    exact = Held(kv.keys.tail, kv.keys.tail_counts, kv.keys.body.exact, kv.keys.sinks)  # type: ignore[union-attr]
    assert torch.equal(exact.dense(), kv.keys.dense()) and torch.equal(exact.row_nbytes(), kv.keys.row_nbytes())
    assert exact.nbytes <= kv.keys.nbytes < 1.2 * exact.nbytes + 6 * 16 * 16


@every
def test_spare_rows_are_nobody_elses(policy: Quantizer) -> None:
    """Holders of the same slots append, by turns: each keeps the old ones and gets its own."""
    kv, _ = grown(policy, policy.encode(*torch.randn(2, 1, 2, 32, 16)), 8, 32)
    assert kv.values.body is not None and kv.values.body.spare
    old, packed = kv.keys.dense(), int(kv.keys.packed[1].min())
    holders = [kv, *(KV(kv.keys.sealed(), kv.values.sealed(), kv.columns) for _ in range(2))]
    own: list[list[Tensor]] = [[], [], []]
    for step in range(0, 16, 2):
        for i, holder in enumerate(holders):
            holders[i], new = grown(policy, holder, 2, 40 + step)
            own[i].append(new)
    for holder, parts in zip(holders, own, strict=True):
        assert torch.equal(holder.keys.dense()[:, :, :packed], old[:, :, :packed])
        if not policy.keeps[0]:  # else groups reach from one part into the next
            fresh = policy.encode(*[torch.cat(parts, 2)] * 2).keys.dense()
            assert torch.equal(holder.keys.dense()[:, :, 40:], fresh)


def test_lists_of_different_lengths_stay_exact() -> None:
    kv = FP8().encode(*torch.randn(2, 1, 2, 9, 16)).gather(torch.tensor([[[0, 3, 5], [1, 2, -1]]]))
    for step in range(20):
        kv, _ = grown(FP8(), kv, 1, 9 + step)
        assert kv.keys.body is not None and kv.keys.body.spare == 0 and kv.keys.body.counts.total == 5 + 2 * (step + 1)


def test_references_widen_when_there_are_too_many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHORT", 40)
    policy = KIVI(2, 4, 0)
    kv = policy.encode(*torch.randn(2, 1, 2, 64, 16)).gather(torch.arange(0, 64, 3).expand(1, 2, -1))
    before = kv.keys.dense()
    types = []
    for step in range(40):
        kv, _ = grown(policy, kv, 1, 64 + step)
        body = kv.keys.body
        assert body is not None and body.group_of is not None
        assert (body.group_of.dtype == torch.int32) == (body._group_total() > 40)
        assert int(body.exact.group_of.max()) == body._group_total() - 1  # type: ignore[union-attr]
        types.append(body.group_of.dtype)
    assert set(types) == {torch.int16, torch.int32} and torch.equal(kv.keys.dense()[:, :, :22], before)


@dataclass(frozen=True)
class Placed:
    """Adds its position to every row, and takes it off again."""

    group: ClassVar[int] = 1
    first: int = 2

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"x": x + where.position[:, None]}, {}

    def decode(self, packed: Packed) -> Tensor:
        return packed.rows["x"] - packed.where.position[:, None]


@pytest.mark.parametrize("gap", [False, True])
def test_positions_are_stored_from_where_they_do_not_follow(gap: bool) -> None:
    codec: Any = Placed()
    counts, more = (Counts((1, 2), torch.device("cpu"), n) for n in (5, 3))
    x, old = torch.randint(0, 9, (10, 4)).float(), torch.arange(2, 7).repeat(2)
    packed = Packed.encode(codec, x, counts, old)
    assert packed.at is None
    for step in range(6):
        at = (torch.arange(3) + 7 + 3 * step + gap * (step >= 3)).repeat(2)
        packed = packed.append(codec, torch.zeros(6, 4), more, at)
        assert (packed.at is None) == (not gap or step < 3)
    rows = packed.dense_rows().view(2, -1, 4)
    assert torch.equal(rows[:, :5], x.view(2, 5, 4)) and not rows[:, 5:].any()
    expected = [*range(2, 16), *range(16 + gap, 25 + gap)]
    assert packed.positions().view(2, -1).tolist() == [expected] * 2  # type: ignore[union-attr]
    picked = packed.pick(torch.tensor([0, 22, 23, 45]), Counts((1, 2), torch.device("cpu"), 2))
    assert picked.positions().tolist() == [2, 24 + gap] * 2  # type: ignore[union-attr]


@settings(max_examples=25)
@given(st.data())
def test_whatever_happens_slots_keep_their_values(data: st.DataObject) -> None:
    """Appends, evictions, reordered rows and compactions in any order, against lists of decoded rows."""
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    policy = data.draw(st.sampled_from([KIVI(2, 4, 0), FP8(per_token=True), TurboQuant(2)]))
    new = torch.randn(2, 2, 2, 16, 8)
    kv, seen = policy.encode(*new), 16
    expected = list(kv.keys.dense().flatten(0, 1))
    for _ in range(data.draw(st.integers(1, 8))):
        what = data.draw(st.sampled_from(["append", "append", "evict", "evict unevenly", "select", "seal"]))
        if what == "append":
            tokens = 4 * data.draw(st.integers(1, 4))
            new = torch.randn(2, 2, 2, tokens, 8)
            kv = policy(
                kv.append(*new, seen=torch.tensor([seen] * 2)),
                Step(0, torch.tensor([16] * 2), torch.tensor([seen + tokens] * 2)),
            )
            fresh = policy.encode(*new).keys.dense().flatten(0, 1)
            expected, seen = [torch.cat(pair) for pair in zip(expected, fresh, strict=True)], seen + tokens
        elif what == "select":
            kv = kv.select(torch.tensor([1, 0]))
            expected = expected[2:] + expected[:2]
        elif what == "seal":
            kv = KV(kv.keys.sealed(), kv.values.sealed(), kv.columns)
        else:
            least = min(map(len, expected))
            amounts = (
                [least // 2 + 1] * 4 if what == "evict" else [1 + int(torch.randint(len(x), ())) for x in expected]
            )
            chosen = [torch.randperm(len(x))[:n].sort().values for x, n in zip(expected, amounts, strict=True)]
            index = torch.full((4, max(amounts)), -1)
            for row, kept in zip(index, chosen, strict=True):
                row[: len(kept)] = kept
            kv = kv.gather(index.view(2, 2, -1))
            expected = [x[kept] for x, kept in zip(expected, chosen, strict=True)]
        dense, width = kv.keys.dense().flatten(0, 1), kv.counts.width
        start = data.draw(st.integers(0, width - 1))
        part = kv.keys.columns(start, width).flatten(0, 1)
        read = backend.side(kv.keys, 0).dense(width).flatten(0, 1) if hasattr(kv.keys.body.codec, "coded") else dense  # type: ignore[union-attr]
        for x, some, seen_by_kernels, wanted in zip(dense, part, read, expected, strict=True):
            assert torch.equal(x[: len(wanted)], wanted)
            assert torch.equal(some[: max(len(wanted) - start, 0)], wanted[start:])
            torch.testing.assert_close(seen_by_kernels[: len(wanted)], wanted)
        assert kv.nbytes == sum(t.untyped_storage().nbytes() for _, t in kv.tensors())
        compacted = kv.keys.compact(0.0)  # nothing is sparse enough
        assert torch.equal(compacted.dense(), kv.keys.dense())
