"""Decode attention over packed keys and values: how packed rows are described, and what is computed, in PyTorch.

A decoded row is, for element d of row r,

    x[r, d] = unit * factor[head] * (scale(r, d) * (number(code[r, d]) - center) + zero(r, d))
              + bias[head, d] + sum of the outliers of row r in channel d

where number() is the code itself (int), a float of 8 or 4 bits (e4m3, e5m2, e2m1) or an entry of a table (lut), and the
scale belongs to a token and `width` channels ("token", "block": as an E4M3 byte), to a channel and a group of tokens
("channel") or to a channel of a head ("head"). Rows that were rotated are rotated back. Keys that are stored as before
RoPE are turned to the position p of their token, and all keys, if asked for, by a shift s of their slot:

    (x[j], x[j + R/2]) -> (x[j] cos a - x[j + R/2] sin a, x[j + R/2] cos a + x[j] sin a)      a = (p + s) * frequency[j]

Attention is that of `kvbench.kernels.attention`, which also says what `allowed` and `recent` mean. With a window w, a
query at position i sees keys at positions above i - w only.

Letters: B batch, H key-value heads, Hq = H * G query heads, T queries, S slots, D head dim, L = B * H lists of slots,
N packed rows of all lists, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbench.kernels.attention import probabilities
from kvbench.kernels.packing import decode_e2m1, decode_e4m3, decode_e5m2, unpack_planar
from kvbench.kernels.rotation import rotate


@dataclass(frozen=True)
class Format:
    """What the bytes of a packed row mean.

    kind: "dense" (rows as they are), "int", "e4m3", "e5m2", "e2m1" (two to a byte, even channel low) or "lut".
    bits: of a code; codes of 1, 2 or 4 bits are planar (`kvbench.kernels.packing.pack_planar`), of 3 bits the lower two
        and, in `high`, the upper one. center: is subtracted.
    per: what a scale belongs to: "none", "token" (scale, zero [N, D / width]), "channel" (scale, zero [N / group, D];
        row i belongs to group_of[i], or to i // group), "head" (scale [H, D]) or "block" (scale: E4M3 bytes
        [N, D / width]).
    normalized: the row of numbers is divided by its norm.
    """

    kind: str
    bits: int = 16
    per: str = "none"
    width: int = 0
    group: int = 1
    center: int = 0
    normalized: bool = False

    @property
    def dense_bits(self) -> int:
        """Bits of a code in `codes`."""
        return 2 if self.bits == 3 else self.bits


@dataclass(frozen=True)
class Coded:
    """Packed rows [N, ...] and what decodes them; see the formula above.

    table [2**bits] float32, for "lut". factor [H] float32, or None: 1. bias [H, D] float32, or None: 0. outliers:
    channels uint8 and values fp16, [N, n] each, or None. rotation(x [..., D], inverse=) -> [..., D] float32: how rows
    were rotated, linear and orthogonal, or None. frequency [R/2] float32, of keys that are stored as before RoPE.
    """

    format: Format
    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    group_of: Tensor | None = None
    table: Tensor | None = None
    factor: Tensor | None = None
    unit: float = 1.0
    bias: Tensor | None = None
    outliers: tuple[Tensor, Tensor] | None = None
    high: Tensor | None = None
    rotation: Callable[..., Tensor] | None = None
    frequency: Tensor | None = None

    @property
    def dim(self) -> int:
        """D."""
        return self.codes.shape[1] if self.format.kind == "dense" else self.codes.shape[1] * 8 // self.format.dense_bits

    def numbers(self) -> Tensor:
        """The rows before their scales: [N, D] float32."""
        kind = self.format.kind
        if kind == "dense":
            return self.codes.float()
        if kind == "e2m1":
            return decode_e2m1(self.codes)
        if kind in ("e4m3", "e5m2"):
            return (decode_e4m3 if kind == "e4m3" else decode_e5m2)(self.codes)
        codes = unpack_planar(self.codes, self.format.dense_bits)
        if self.high is not None:
            codes = codes | unpack_planar(self.high, 1) << 2
        if kind == "int":
            return codes.float() - self.format.center
        assert self.table is not None
        numbers = self.table[codes.int()]
        return numbers / numbers.norm(dim=1, keepdim=True) if self.format.normalized else numbers

    def rows(self, head: Tensor) -> Tensor:
        """Decoded rows [N, D] float32, not turned yet; head [N]: which head each belongs to."""
        x, per = self.numbers(), self.format.per
        if per in ("token", "block"):
            assert self.scale is not None
            x = x.unflatten(1, (-1, self.format.width))
            x = x * (decode_e4m3(self.scale) if per == "block" else self.scale.float())[..., None]
            x = (x if self.zero is None else x + self.zero.float()[..., None]).flatten(1)
        elif per == "channel":
            assert self.scale is not None and self.zero is not None
            of = torch.arange(len(x), device=x.device) // self.format.group
            of = of if self.group_of is None else self.group_of.long()
            x = x * self.scale.float()[of] + self.zero.float()[of]
        elif per == "head":
            assert self.scale is not None
            x = x * self.scale[head]
        x = x * self.unit
        x = x if self.factor is None else x * self.factor[head, None]
        x = x if self.bias is None else x + self.bias[head]
        if self.outliers is not None:
            x = x.scatter_add(1, self.outliers[0].long(), self.outliers[1].float())
        return x if self.rotation is None else self.rotation(x, inverse=True)


@dataclass(frozen=True)
class Side:
    """The keys or the values of all lists.

    tail [B, H, C, D]: full-precision slots. lists [L, 4] int64: a list's first packed row, its slots before that, its
    packed rows, and by how much slots after these stand further left in the tail. coded: None if nothing is packed.
    """

    tail: Tensor
    lists: Tensor
    coded: Coded | None
    most: int
    """Upper bound of the packed rows of a list."""

    def in_body(self, slots: int) -> Tensor:
        """[B, H, slots] bool: which are packed."""
        column = torch.arange(slots, device=self.tail.device)
        _, sinks, packed, _ = (x[:, None] for x in self.lists.unbind(1))
        return ((column >= sinks) & (column < sinks + packed)).unflatten(0, self.tail.shape[:2])

    def dense(self, slots: int) -> Tensor:
        """[B, H, slots, D] float32, not turned yet; columns past a list's end hold anything finite."""
        batch, heads, capacity, dim = self.tail.shape
        start, sinks, packed, shift = (x[:, None] for x in self.lists.unbind(1))
        column = torch.arange(slots, device=self.tail.device)
        in_tail = torch.where(column < sinks, column, column - shift).clamp(0, max(capacity - 1, 0))
        tail = self.tail.flatten(0, 1).float()
        if not capacity:
            tail, in_tail = tail.new_zeros(len(tail), 1, dim), in_tail * 0
        dense = tail.gather(1, in_tail[..., None].expand(-1, -1, dim))
        if self.coded is not None and len(self.coded.codes):
            owner = torch.arange(batch * heads, device=tail.device).repeat_interleave(packed[:, 0])
            head = torch.zeros(len(self.coded.codes), dtype=torch.int64, device=tail.device)
            first = start[:, 0].repeat_interleave(packed[:, 0])
            offset = torch.arange(len(owner), device=tail.device) - (packed[:, 0].cumsum(0) - packed[:, 0])[owner]
            head[first + offset] = owner % heads
            rows = self.coded.rows(head)
            body = rows[(start + column - sinks).clamp(0, len(rows) - 1).flatten()].view_as(dense)
            dense = torch.where(self.in_body(slots).flatten(0, 1)[..., None], body, dense)
        return dense.unflatten(0, (batch, heads))


def packed_decode(
    query: Tensor,
    keys: Side,
    values: Side,
    query_position: Tensor,
    key_position: Tensor,
    total: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sums: bool = False,
    valid: Tensor | None = None,
    allowed: Tensor | None = None,
    recent: int | Tensor = 0,
    window: int | None = None,
    turn: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, Hq, T, D] in the query's dtype, and, if asked for, what each slot received, [B, H, S].

    query [B, Hq, T, D], the newest T tokens, which are not packed yet; query_position [B, T]; key_position [B, H or 1,
    S], -1 = dead; total [L] int32: live slots of each list, the first ones; sinks [Hq]: learned sink logits.
    valid [B, T] bool: queries that are no pads; the others give no sums. allowed [B or 1, H or Hq or 1, S] bool, recent
    int or [B]. turn: shifts [B, H or 1, S] of all keys, and frequency [R/2] float32.
    """
    dense_keys, dense_values = _turned(keys, key_position, turn), values.dense(key_position.shape[-1])
    weights = probabilities(
        query.float(), dense_keys, query_position, key_position, scaling=scaling, softcap=softcap, sinks=sinks,
        allowed=allowed, recent=recent, window=window,
    )  # fmt: skip
    grouped = weights.unflatten(1, (dense_keys.shape[1], -1))  # [B, H, G, T, S]
    out = torch.einsum("bhgts,bhsd->bhgtd", grouped, dense_values).flatten(1, 2).to(query.dtype)
    if valid is not None:
        grouped = grouped * valid[:, None, None, :, None]
    return out, grouped.sum((2, 3)) if sums else None


def _turned(keys: Side, position: Tensor, turn: tuple[Tensor, Tensor] | None) -> Tensor:
    """Keys as queries see them, [B, H, S, D] float32."""
    slots = position.shape[-1]
    dense, shift, frequency = keys.dense(slots), torch.zeros_like(position), None
    if turn is not None:
        shift, frequency = turn
    if keys.coded is not None and keys.coded.frequency is not None:
        frequency = keys.coded.frequency
        shift = shift + position.clamp(min=0) * keys.in_body(slots)
    return dense if frequency is None else rotate(dense, shift, frequency)


def dense_coded(side: Side, packed: Tensor) -> Side:
    """A side that packs nothing, its tail read as if it were packed rows: of each list, the `packed` [L] oldest."""
    batch, heads, capacity, dim = side.tail.shape
    tail, apart = side.tail, side.tail.stride(1) // dim
    if tail.stride() != (heads * apart * dim, apart * dim, dim, 1):
        tail, apart = tail.contiguous(), capacity
    codes = tail.as_strided(((batch * heads - 1) * apart + capacity, dim), (dim, 1))  # what is between is not read
    first = torch.arange(batch * heads, device=codes.device) * apart
    none = torch.zeros_like(first)
    lists = torch.stack([first, none, packed.to(first.dtype), none], 1)
    return replace(side, tail=tail, lists=lists, coded=Coded(Format("dense"), codes), most=tail.shape[2])
