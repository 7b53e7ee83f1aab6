"""Scores of slots in Triton.

Column sums take a second pass over queries and keys, after the log-sum-exp of every query is known, from the attention
before (`kvbench.kernels.attention.attend_causal`) or from a pass of its own:

    LSE_i = log(exp(sink) + sum_s exp(logit[i, s]))          a program per block of queries, if there is none at hand
    column_sum_s = sum_i exp(logit[i, s] - LSE_i)            a program per block of keys and key-value head

so nothing larger than queries + slots is ever written, and each sum has one writer: no atomics, the same bits on every
run. What is visible is decided by positions, as in `kvbench.kernels.attention`; blocks no part of which is visible are
not read, whatever the order of positions.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from kvbench.kernels.scores.reference import EPS, direction

_LATEST = 2**31 - 1
_ROWS = 32
_CHUNK = 512
"""Rows whose sum one program adds up."""


def column_sums(
    query: Tensor,
    keys: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_valid: Tensor | None = None,
    allowed: Tensor | None = None,
    recent: int | Tensor = 0,
    lse: Tensor | None = None,
    blocks: tuple[int, int] | None = None,
) -> Tensor:
    """See `kvbench.kernels.attention.column_sums`: [B, H, S] float32.

    lse [B, Hq, T] float32, base e: the log-sum-exp of each query, if the attention before has it. blocks: queries, keys
        at a time.
    """
    seen = _Seen(query, keys, query_position, key_position, query_valid, allowed, recent, blocks)
    options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    lse = _log_sum_exp(query, keys, seen, **options) if lse is None else lse
    (batch, heads, slots, _), tokens = keys.shape, query.shape[2]
    total = keys.new_zeros((batch, heads, slots), dtype=torch.float32)
    if total.numel() and tokens:
        with torch.cuda.device_of(query):
            column_kernel[(triton.cdiv(slots, seen.keys), batch * heads)](
                *seen.arguments(), lse.contiguous(), total, seen.first_queries(),
                **_shape(query, keys, seen, **options), num_warps=seen.warps, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
    return total


def key_norms(keys: Tensor) -> Tensor:
    """See reference.py."""
    return _cosines(keys, None)


def key_alignment(keys: Tensor, live: Tensor, unit: bool = True) -> Tensor:
    """See reference.py."""
    (batch, heads, slots, channels), keys = keys.shape, _lines(keys)
    chunks = triton.cdiv(slots, _CHUNK)
    parts = keys.new_zeros((batch, heads, chunks, channels), dtype=torch.float32)
    shown = live.expand(batch, heads, -1).to(torch.int8)
    if keys.numel():
        with torch.cuda.device_of(keys):
            sum_kernel[(chunks, batch * heads)](
                keys, shown, parts, *keys.stride()[:3], *shown.stride(), slots, HEADS=heads, D=channels,
                D2=triton.next_power_of_2(channels), R=_ROWS, CHUNK=_CHUNK, UNIT=unit, EPS=EPS, enable_fp_fusion=True,
            )  # fmt: skip
    return _cosines(keys, direction(parts.sum(2), live))


def _cosines(keys: Tensor, anchor: Tensor | None) -> Tensor:
    """Products with anchor [B, H, D] over norms; norms, if there is none."""
    (batch, heads, slots, channels), keys = keys.shape, _lines(keys)
    out = keys.new_empty((batch, heads, slots), dtype=torch.float32)
    if keys.numel():
        with torch.cuda.device_of(keys):
            cosine_kernel[(triton.cdiv(slots, _ROWS), batch * heads)](
                keys, keys if anchor is None else anchor.contiguous(), out, *keys.stride()[:3], slots,
                HEADS=heads, D=channels, D2=triton.next_power_of_2(channels), R=_ROWS,
                ANCHORED=anchor is not None, EPS=EPS, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def _lines(x: Tensor) -> Tensor:
    """Rows at any distance, each one run of memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Seen:
    """What each query sees, as the kernels take it, and which blocks of queries and keys can be passed over."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        query_position: Tensor,
        key_position: Tensor,
        query_valid: Tensor | None,
        allowed: Tensor | None,
        recent: int | Tensor,
        blocks: tuple[int, int] | None,
    ) -> None:
        batch, query_heads = query.shape[:2]
        repeats = query_heads // keys.shape[1]
        at = query_position if query_valid is None else query_position.masked_fill(~query_valid, -1)
        self.at = at.expand(batch, -1).int().contiguous()
        self.slot = key_position.expand(batch, -1, -1).int().contiguous()  # [B, H or 1, S]
        self.narrowed = allowed is not None
        self.allowed, self.recent = self.at, self.at
        if allowed is not None:
            if allowed.shape[1] not in (1, query_heads):
                allowed = allowed.repeat_interleave(repeats, 1)
            self.allowed = allowed.expand(batch, query_heads, -1).to(torch.int8).contiguous()
            self.recent = torch.as_tensor(recent, device=keys.device).int().expand(batch).contiguous()
        wide = query.element_size() * query.shape[3]  # bytes of a row
        large = (64, 128) if wide <= 256 else (64, 64) if wide <= 512 else (32, 32)
        self.queries, self.keys = large if blocks is None else blocks
        self.warps = 8 if blocks is None and wide <= 256 else 4

    def arguments(self) -> tuple[Tensor, ...]:
        return self.at, self.slot, self.allowed, self.recent

    def last_slots(self) -> Tensor:
        """[B, H or 1, blocks of queries] int32: no query of the block sees a slot from this one on."""
        tokens = self.at.shape[1]
        newest = pad(self.at, (0, -tokens % self.queries), value=-1).unflatten(1, (-1, self.queries)).amax(2)
        oldest_later = self._live().flip(2).cummin(2).values.flip(2)
        newest = newest[:, None].expand(-1, self.slot.shape[1], -1).contiguous()
        return torch.searchsorted(oldest_later.contiguous(), newest, right=True, out_int32=True)

    def first_queries(self) -> Tensor:
        """[B, H or 1, blocks of keys] int32: no query before this one sees a slot of the block."""
        slots = self.slot.shape[2]
        oldest = pad(self._live(), (0, -slots % self.keys), value=_LATEST).unflatten(2, (-1, self.keys)).amin(3)
        newest_so_far = self.at.cummax(1).values[:, None].expand(-1, self.slot.shape[1], -1).contiguous()
        return torch.searchsorted(newest_so_far, oldest, out_int32=True)

    def _live(self) -> Tensor:
        return self.slot.masked_fill(self.slot < 0, _LATEST)


def _log_sum_exp(query: Tensor, keys: Tensor, seen: _Seen, **options: Any) -> Tensor:
    """[B, Hq, T] float32, base e; -inf where a query sees nothing."""
    batch, query_heads, tokens, _ = query.shape
    lse = query.new_empty((batch, query_heads, tokens), dtype=torch.float32)
    sinks = options["sinks"]
    if lse.numel():
        with torch.cuda.device_of(query):
            lse_kernel[(triton.cdiv(tokens, seen.queries), batch * query_heads)](
                *seen.arguments(), seen.last_slots(), lse if sinks is None else sinks.float().contiguous(), lse,
                **_shape(query, keys, seen, **options), num_warps=seen.warps, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip
    return lse


def _shape(
    query: Tensor, keys: Tensor, seen: _Seen, scaling: float, softcap: float | None, sinks: Tensor | None
) -> dict[str, Any]:
    """The arguments that both kernels share."""
    query, keys = _lines(query), _lines(keys)
    compute = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(query.dtype, tl.float32)
    if query.device.type == "cpu" and compute == tl.bfloat16:  # in which the interpreter cannot compute
        compute = tl.float32
    names = "query_batch", "query_head", "query_row", "key_batch", "key_head", "key_row"
    strides = dict(zip(names, query.stride()[:3] + keys.stride()[:3], strict=True))
    return {
        "query": query, "keys": keys, **strides, "tokens": query.shape[2], "slots": keys.shape[2],
        "scaling": scaling, "softcap": softcap or 1.0, "HEADS": keys.shape[1], "G": query.shape[1] // keys.shape[1],
        "SHARED": seen.slot.shape[1] == 1, "NARROWED": seen.narrowed, "SOFTCAP": softcap is not None,
        "SINKS": sinks is not None, "D": query.shape[3], "D2": max(16, triton.next_power_of_2(query.shape[3])),
        "BQ": seen.queries, "BK": seen.keys, "COMPUTE": compute,
    }  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "slots"])  # of every prompt others
def lse_kernel(
    at, slot, allowed, recent, last, sinks, lse, query, keys, query_batch, query_head, query_row, key_batch, key_head,
    key_row, tokens, slots, scaling, softcap,
    HEADS: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr, NARROWED: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: the online log-sum-exp over blocks of keys, base 2."""
    blocks = tl.num_programs(0)
    block = blocks - 1 - tl.program_id(0)  # the longest first
    batch = tl.program_id(1) // (HEADS * G)
    head = tl.program_id(1) % (HEADS * G)
    own = (batch * HEADS + head // G) if not SHARED else batch  # whose positions
    line = (batch * (HEADS * G) + head).to(tl.int64)
    row = block * BQ + tl.arange(0, BQ)
    query += batch.to(tl.int64) * query_batch + head.to(tl.int64) * query_head
    q = _rows(query, block * BQ, query_row, tokens, D, D2, BQ, COMPUTE)
    newest = tl.load(at + batch.to(tl.int64) * tokens + row, mask=row < tokens, other=-1)
    keys += batch.to(tl.int64) * key_batch + (head // G).to(tl.int64) * key_head
    slot += own.to(tl.int64) * slots
    allowed += line * slots
    near = newest
    if NARROWED:
        near = newest - tl.load(recent + batch)
    m = tl.full([BQ], float("-inf"), tl.float32)
    total = tl.zeros([BQ], tl.float32)
    if SINKS:
        m = tl.zeros([BQ], tl.float32) + tl.load(sinks + head) * 1.4426950408889634
        total += 1.0
    for start in range(0, tl.load(last + own * blocks + block), BK):
        k = _rows(keys, start, key_row, slots, D, D2, BK, COMPUTE)
        s = _logits(q, k, newest, near, slot, allowed, start, slots, scaling, softcap, NARROWED, SOFTCAP, BK)
        higher = tl.maximum(m, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(m - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        m = higher
    found = (m + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453
    tl.store(lse + line * tokens + row, found, mask=row < tokens)


@triton.jit(do_not_specialize=["tokens", "slots"])
def column_kernel(
    at, slot, allowed, recent, lse, sums, first, query, keys, query_batch, query_head, query_row, key_batch, key_head,
    key_row, tokens, slots, scaling, softcap,
    HEADS: tl.constexpr, G: tl.constexpr, SHARED: tl.constexpr, NARROWED: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A block of keys of one head: what all queries of the group's heads give it. Blocks of early keys, which take
    longest, come first."""
    block = tl.program_id(0)
    batch = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    own = tl.program_id(1) if not SHARED else batch
    keys += batch.to(tl.int64) * key_batch + head.to(tl.int64) * key_head
    k = _rows(keys, block * BK, key_row, slots, D, D2, BK, COMPUTE)
    slot += own.to(tl.int64) * slots
    at += batch.to(tl.int64) * tokens
    begin = tl.load(first + own * tl.num_programs(0) + block) // BQ * BQ
    back = 0
    if NARROWED:
        back = tl.load(recent + batch)
    given = tl.zeros([BQ, BK], tl.float32)  # summed over queries once, at the end
    for g in range(G):
        one = query + batch.to(tl.int64) * query_batch + (head * G + g).to(tl.int64) * query_head
        line = (batch * (HEADS * G) + head * G + g).to(tl.int64)
        for start in range(begin, tokens, BQ):
            q = _rows(one, start, query_row, tokens, D, D2, BQ, COMPUTE)
            row = start + tl.arange(0, BQ)
            newest = tl.load(at + row, mask=row < tokens, other=-1)
            level = tl.load(lse + line * tokens + row, mask=row < tokens, other=0.0) * 1.4426950408889634
            level = tl.where((newest < 0) | (level == float("-inf")), 0.0, level)  # who sees nothing gives nothing
            s = _logits(
                q, k, newest, newest - back, slot, allowed + line * slots, block * BK, slots, scaling, softcap,
                NARROWED, SOFTCAP, BK,
            )  # fmt: skip
            given += tl.exp2(s - level[:, None])
    column = block * BK + tl.arange(0, BK)
    tl.store(sums + tl.program_id(1).to(tl.int64) * slots + column, tl.sum(given, 0), mask=column < slots)


@triton.jit
def _rows(
    x, start, stride, end,
    D: tl.constexpr, D2: tl.constexpr, N: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Rows start to start + N of x, zero from `end` on: [N, D2]."""
    row = tl.arange(0, N)
    channel = tl.arange(0, D2)
    x += tl.cast(start, tl.int64) * stride
    inside = (start + row < end)[:, None]
    if D2 > D:
        inside = inside & (channel < D)[None, :]
    return tl.load(x + row[:, None] * stride + channel[None, :], mask=inside, other=0.0).to(COMPUTE)


@triton.jit
def _logits(
    q, k, newest, near, slot, allowed, start, slots, scaling, softcap,
    NARROWED: tl.constexpr, SOFTCAP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BQ, BK] base-2 logits, -inf where not visible: up to `newest`; narrowed: allowed or younger than `near`."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    if SOFTCAP:  # tanh(x) = 1 - 2 / (1 + exp(2 x))
        s = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(s / softcap * 2.8853900817779268)))
    column = start + tl.arange(0, BK)
    position = tl.load(slot + column, mask=column < slots, other=-1)[None, :]
    visible = (position >= 0) & (position <= newest[:, None])
    if NARROWED:
        open_to = tl.load(allowed + column, mask=column < slots, other=0)[None, :] != 0
        visible = visible & (open_to | (position > near[:, None]))
    return tl.where(visible, s * 1.4426950408889634, float("-inf"))


@triton.jit(do_not_specialize=["slots"])
def sum_kernel(
    keys, live, parts, key_batch, key_head, key_row, live_batch, live_head, live_row, slots,
    HEADS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr, UNIT: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """The sum over a chunk of live rows, each at length 1 or as it is."""
    batch = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    keys += batch * key_batch + head * key_head
    live += batch * live_batch + head * live_head
    channel = tl.arange(0, D2)
    total = tl.zeros([D2], tl.float32)
    for start in range(tl.program_id(0) * CHUNK, tl.minimum(tl.program_id(0) * CHUNK + CHUNK, slots), R):
        row = start + tl.arange(0, R)
        there = tl.load(live + row * live_row, mask=row < slots, other=0) != 0
        k = _rows(keys, start, key_row, slots, D, D2, R, tl.float32)
        if UNIT:
            k = k / tl.maximum(tl.sqrt_rn(tl.sum(k * k, 1)), EPS)[:, None]
        total += tl.sum(tl.where(there[:, None], k, 0.0), 0)
    line = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(parts + line * D + channel, total, mask=channel < D)


@triton.jit(do_not_specialize=["slots"])
def cosine_kernel(
    keys, anchor, out, key_batch, key_head, key_row, slots,
    HEADS: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, ANCHORED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """R rows of one head: their norms, or their products with the anchor over their norms."""
    line = tl.program_id(1).to(tl.int64)
    keys += (tl.program_id(1) // HEADS).to(tl.int64) * key_batch + (tl.program_id(1) % HEADS).to(tl.int64) * key_head
    row = tl.program_id(0) * R + tl.arange(0, R)
    k = _rows(keys, tl.program_id(0) * R, key_row, slots, D, D2, R, tl.float32)
    found = tl.sqrt_rn(tl.sum(k * k, 1))
    if ANCHORED:
        channel = tl.arange(0, D2)
        toward = tl.load(anchor + line * D + channel, mask=channel < D, other=0.0)
        found = tl.sum(k * toward[None, :], 1) / tl.maximum(found, EPS)
    tl.store(out + line * slots + row, found, mask=row < slots)
