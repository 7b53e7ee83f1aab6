"""How the keys (or the values) of one layer are held: a packed body, then a full-precision tail.

Letters used in all shape comments: B batch, H key-value heads, T new tokens, S slots, K kept slots, D head dim,
N rows of all (batch, head) pairs one after the other, g tokens that share a scale.

Each (batch row, head) has its own list of slots, oldest first. Lists may differ in length (left-padded batches,
per-head budgets). Padded views are left-aligned: slot s of a list stands in column s, columns past its end are dead.
The body is *flat* (no dead rows at all), so a ragged cache really frees its bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from kvbench.kernels import bounds
from kvbench.kernels.gather import renumber, take_rows

_log = logging.getLogger("kvbench")


@dataclass(frozen=True, eq=False)
class Counts:
    """How many slots each (row, head) holds: `even` if all hold as many, else `ragged` [B, H] int64."""

    shape: tuple[int, int]
    device: torch.device
    even: int | None
    ragged: Tensor | None = None

    @classmethod
    def of(cls, per_head: Tensor) -> Counts:
        """per_head [B, H] int64."""
        low, high = (int(x) for x in per_head.aminmax())
        shape = (per_head.shape[0], per_head.shape[1])
        return cls(shape, per_head.device, low) if low == high else cls(shape, per_head.device, None, per_head)

    @property
    def per_head(self) -> Tensor:
        """[B, H] int64."""
        return torch.full(self.shape, self.even or 0, device=self.device) if self.ragged is None else self.ragged

    @cached_property
    def width(self) -> int:
        return int(self.ragged.max()) if self.ragged is not None else self.even or 0

    @cached_property
    def total(self) -> int:
        return int(self.ragged.sum()) if self.ragged is not None else (self.even or 0) * self.shape[0] * self.shape[1]

    def live(self) -> Tensor:
        """[B, H, width] bool: which columns of a padded view hold a slot."""
        return torch.arange(self.width, device=self.device) < self.per_head[..., None]

    def starts(self) -> Tensor:
        """[B*H] first flat row of each list."""
        flat = self.per_head.flatten()
        return flat.cumsum(0) - flat

    def owners(self) -> tuple[Tensor, Tensor]:
        """Per flat row: the number of its list, and its column there, both [N] int64."""
        held = self.per_head.flatten()
        owner = torch.arange(len(held), device=self.device).repeat_interleave(held, output_size=self.total)
        return owner, torch.arange(self.total, device=self.device) - self.starts()[owner]

    def each(self, of: Callable[..., Tensor], *others: Counts) -> Counts:
        """What `of` makes of int64 lengths, element by element: on the CPU, waiting for nothing, where all are even."""
        every = (self, *others)
        if all(c.even is not None for c in every):
            return Counts(self.shape, self.device, int(of(*(torch.tensor(c.even) for c in every))))
        return Counts.of(of(*(c.per_head for c in every)))

    def plus(self, other: Counts) -> Counts:
        if self.even is not None and other.even is not None:
            return Counts(self.shape, self.device, self.even + other.even)
        return Counts.of(self.per_head + other.per_head)

    def groups(self, size: int) -> Counts:
        if self.even is not None:
            return Counts(self.shape, self.device, self.even // size)
        return Counts.of(self.per_head // size)

    def select(self, rows: Tensor) -> Counts:
        if self.even is not None:
            return Counts((len(rows), self.shape[1]), self.device, self.even)
        return Counts.of(self.per_head[rows])

    def first_head(self) -> Counts:
        """[B, 1]: for what all heads share."""
        return Counts((self.shape[0], 1), self.device, self.even, None if self.ragged is None else self.ragged[:, :1])


# Rows are moved by `index_select` on flat views: on a CPU an order of magnitude faster than masks, scatter or gather.


def flatten(padded: Tensor, counts: Counts) -> Tensor:
    """[B, H, >=width, ...] -> [N, ...]: the live columns, list after list."""
    if counts.even is not None:
        return padded[:, :, : counts.even].flatten(0, 2)
    owner, column = counts.owners()
    return padded.flatten(0, 2).index_select(0, owner * padded.shape[2] + column)


def unflatten(flat: Tensor, counts: Counts) -> Tensor:
    """[N, ...] -> [B, H, width, ...]; dead columns hold any finite value."""
    shape = (*counts.shape, counts.width, *flat.shape[1:])
    if counts.even is not None:
        return flat.reshape(shape)
    column = torch.arange(counts.width, device=flat.device)
    source = (counts.starts()[:, None] + column).clamp(max=counts.total - 1)
    return flat.index_select(0, source.flatten()).view(shape)


def interleaved(pairs: Iterable[tuple[Tensor, Tensor]], old: Counts, new: Counts) -> list[Tensor]:
    """Per pair: each list of the second [M, ...] appended to the same list of the first [N, ...]: [N + M, ...]."""
    owner, column = old.plus(new).owners()
    after = column - old.per_head.flatten()[owner]
    source = torch.where(after < 0, old.starts()[owner] + column, old.total + new.starts()[owner] + after)
    return [torch.cat(pair).index_select(0, source) for pair in pairs]


def take_columns(padded: Tensor, index: Tensor) -> Tensor:
    """[B, H, S, ...] and index [B, H, K] -> [B, H, K, ...]; -1 and indices past the end give any finite value."""
    return take_all_columns([padded], index)[0]


def take_all_columns(padded: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """`take_columns` of tensors with the same B, H and S, moved together."""
    batch, heads, columns = padded[0].shape[:3]
    if not columns:
        return [x.new_zeros(*index.shape, *x.shape[3:]) for x in padded]
    first = torch.arange(batch * heads, device=index.device).view(batch, heads, 1) * columns
    moved = take_rows([x.flatten(0, 2) for x in padded], (index.clamp(0, columns - 1) + first).flatten())
    return [x.view(*index.shape, *x.shape[1:]) for x in moved]


def _run(padded: Tensor, first: Counts, amount: Counts) -> Tensor:
    """[B, H, S, ...] -> [N, ...] flat: of each list the `amount` columns from `first` on."""
    if first.even is not None and amount.even is not None:
        return padded[:, :, first.even : first.even + amount.even].flatten(0, 2)
    column = torch.arange(amount.width, device=padded.device)
    return flatten(take_columns(padded, first.per_head[..., None] + column), amount)


def append_columns(
    padded: Tensor, counts: Counts, new: Tensor, valid: Tensor | None, spare: bool
) -> tuple[Tensor, Counts]:
    """Appends `new` [B, H, T, ...] after the last live column of each list of `padded` [B, H, >=width, ...].

    valid [B, T] bool marks real tokens (None: all real); the others are not stored. With `spare`, the buffer grows
    geometrically and later appends are written in place; the columns already there never change.
    """
    batch, heads, tokens = new.shape[:3]
    device = new.device
    if valid is None:
        grown = counts.plus(Counts((batch, heads), device, tokens))
    else:
        grown = counts.plus(Counts.of(valid.sum(1, keepdim=True).expand(batch, heads).contiguous()))
    if counts.total == 0 and valid is None:
        return owned(new), grown
    # Room past the longest list is this holder's own; room beside a shorter list may be shared: not written to.
    if grown.width > padded.shape[2] or padded.shape[2] == counts.width or _is_fixed(padded):
        capacity = grown.width + _spare(grown.width) if spare and counts.total else grown.width
        room = new.new_zeros((batch, heads, capacity, *new.shape[3:]))
        room[:, :, : counts.width] = padded[:, :, : counts.width]
        padded = room
    if counts.even is not None and valid is None:
        padded[:, :, counts.even : counts.even + tokens] = new
        return padded, grown
    real = torch.ones((batch, tokens), dtype=torch.bool, device=device) if valid is None else valid
    target = counts.per_head[..., None] + (real.cumsum(1) - 1)[:, None]  # [B, H, T]
    row, head, token = real[:, None].expand(batch, heads, tokens).nonzero(as_tuple=True)
    padded[row, head, target[row, head, token]] = new[row, head, token]
    return padded, grown


def _is_fixed(x: Tensor) -> bool:
    """Whether autograd may still read what stands in `x`, or PyTorch forbids writing to it: made in inference mode."""
    return x.requires_grad or (x.is_inference() and not torch.is_inference_mode_enabled())


def _spare(slots: int) -> int:
    """How many more a list of so many slots gets room for when it grows: a share, so that copies stay rare."""
    return max(8, slots // 16)


def owned(x: Tensor) -> Tensor:
    """`x` itself if it is contiguous and alone in its storage, else a copy: a view would keep more bytes alive."""
    alone = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if alone else x.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True, eq=False)
class Where:
    """Which head each flat row of the lists `counts` belongs to, and which token: `at` [N] int, None if not known."""

    counts: Counts
    at: Tensor | None = None

    @property
    def head(self) -> Tensor:
        """[N] int64."""
        return self.counts.owners()[0] % self.counts.shape[1]

    @property
    def position(self) -> Tensor:
        """[N] int64: original position of each row's token."""
        if self.at is None:
            raise ValueError("this format needs to know the positions of its tokens; give them to Packed.encode")
        return self.at.long()


class Codec(Protocol):
    """A numeric format on flat rows. `group` consecutive rows share the `groups` entries (1: no sharing).

    first: None, or this format depends on positions, and a list that lost nothing begins with the token of this
    position (those before it are sinks).

    Two methods are optional, for formats whose rows need not be decoded to be attended to. In both, the lists L of
    `packed` are equally long, n rows each, and all is float32:
        scores(packed, query [L, M, D]) -> [L, M, n], the products of queries and decoded rows;
        mix(packed, weights [L, M, n]) -> [L, M, D], the weighted sums of decoded rows.

    again(packed, rows [M]) (optional) -> per-row and per-group tensors of these rows, decoded and encoded once more in
    whole groups, and [2] float32: the sums of squares of what that changed, and of what was decoded. Without it,
    `Packed.compact` does the same step by step.
    writes (a bool, optional): whether `encode` also takes, as `out`, what to write to instead of making tensors: per
    name [L, n, ...] (per group [L, n / group, ...]), and refuses inf and nan itself (`kvbench.kernels.bounds`).
    """

    @property
    def group(self) -> int: ...

    @property
    def first(self) -> int | None: ...

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """x [N, D] (N divisible by `group`) -> per-row tensors [N, ...] and per-group tensors [N / group, ...]."""
        ...

    def decode(self, packed: Packed) -> Tensor:
        """The rows [N, D] of `packed` in its dtype."""
        ...

    def row_nbytes(self, head_dim: int) -> int:
        """Exact bytes of the per-row tensors of one row."""
        ...

    def group_nbytes(self, head_dim: int) -> int:
        """Exact bytes of the per-group tensors of one group."""
        ...


@dataclass(frozen=True)
class Plain:
    """The codec that changes nothing: rows as they are, but flat, without memory for dead ones."""

    dtype: torch.dtype
    group: ClassVar[int] = 1
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"plain": x}, {}

    def decode(self, packed: Packed) -> Tensor:
        return packed.rows["plain"].to(packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim * self.dtype.itemsize

    def group_nbytes(self, head_dim: int) -> int:
        return 0


@dataclass(frozen=True)
class Packed:
    """Rows held in a codec's format, flat over all (batch, head) lists.

    group_of [N]: each row's group; None: row i belongs to group i // group. at [N]: each row's position, where the
    codec asks for it; None: those of a list are consecutive from `codec.first` on. closed [groups] bool: which groups
    `compact` has made; None: none.
    spare: so many rows at the end of each list are room for what is appended, and so are the groups that they would
    make (at the end of each list's, or, if rows refer to groups, of all): appending writes there, in place, and what
    is held never changes. Only for lists that are equally long; others are flat and exact, and appending copies them.
    """

    codec: Codec
    counts: Counts
    rows: dict[str, Tensor]
    groups: dict[str, Tensor]
    group_of: Tensor | None
    dtype: torch.dtype
    at: Tensor | None = None
    closed: Tensor | None = None
    spare: int = 0

    @classmethod
    def encode(cls, codec: Codec, x: Tensor, counts: Counts, at: Tensor | None = None) -> Packed:
        """x [N, D] flat rows of the lists `counts` (each a multiple of `codec.group`), of tokens at [N]."""
        if not getattr(codec, "writes", False):
            bounds.finite(x)
        rows, groups = codec.encode(x, Where(counts, at))
        return cls(codec, counts, rows, groups, None, x.dtype, _implied(at, counts, codec))

    @property
    def where(self) -> Where:
        return Where(self.counts, self.positions())

    @property
    def exact(self) -> Packed:
        """The same rows without spare ones, as codecs read them: a view if there is one list, else a copy."""
        return self if not self.spare else self._part(0, self.counts.width)

    @property
    def roomy(self) -> Packed:
        """The same tensors, spare rows counted as rows: for readers of memory, who know how many are in use."""
        if not self.spare:
            return self
        counts = Counts(self.counts.shape, self.counts.device, self.counts.width + self.spare)
        return replace(self, counts=counts, spare=0)

    def positions(self) -> Tensor | None:
        """[N] int64 if the codec asks for positions."""
        if self.codec.first is None or self.at is not None:
            return None if self.at is None else self._used(self.at)
        return _after(self.counts, 0, self.codec)

    def group_rows(self, name: str) -> Tensor:
        """[N, ...]: the per-group tensor `name`, one entry per row."""
        return self.groups[name].index_select(0, self._explicit())

    def dense_rows(self) -> Tensor:
        """[N, D] in the dtype that was encoded."""
        return self.codec.decode(self.exact)

    def columns(self, start: int, stop: int) -> Tensor:
        """[B, H, stop - start, D] float32: these columns of every list, all of them equally long."""
        part, skip = self._cut(start, stop)
        return unflatten(part.dense_rows(), part.counts)[:, :, skip : skip + stop - start]

    def scores(self, query: Tensor, start: int, stop: int) -> Tensor:
        """query [B, H, M, D] float32 times these columns of every list: [B, H, M, stop - start]."""
        part, skip = self._cut(start, stop)
        found = scores(part, query.flatten(0, 1)).unflatten(0, self.counts.shape)
        return found[..., skip : skip + stop - start]

    def mix(self, weights: Tensor, start: int, stop: int) -> Tensor:
        """These columns of every list, weighted by [B, H, M, stop - start] float32 and summed: [B, H, M, D]."""
        part, skip = self._cut(start, stop)
        length = part.counts.width
        if length != stop - start:
            weights = torch.nn.functional.pad(weights, (skip, length - skip - (stop - start)))
        return mix(part, weights.flatten(0, 1)).unflatten(0, self.counts.shape)

    def _cut(self, start: int, stop: int) -> tuple[Packed, int]:
        """At least these columns of every list, all of them equally long, in whole groups, to be read as float32; how
        many come before `start`."""
        size, length = self._size, self.counts.even or 0
        first = start // size * size
        part = self._part(first, min(length, -(-stop // size) * size))
        return replace(part, dtype=torch.float32), start - first

    def _part(self, first: int, last: int) -> Packed:
        """Columns first to last of every list, all of them equally long, in whole groups, without spare rows."""
        counts, size = Counts(self.counts.shape, self.counts.device, last - first), self._size

        def cut(x: Tensor, per: int = 1) -> Tensor:
            return self._by_list(x)[:, first // per : last // per].flatten(0, 1)

        at = None if self.at is None else cut(self.at)
        if at is None and self.codec.first is not None and first:
            at = _after(counts, first, self.codec)
        groups, closed = self.groups, self.closed
        if self.group_of is None:
            groups = {k: cut(v, size) for k, v in groups.items()}
            closed = None if closed is None else cut(closed, size)
        elif self.spare:
            groups = {k: v[: self._group_total()] for k, v in groups.items()}
            closed = None if closed is None else closed[: self._group_total()]
        return replace(
            self, counts=counts, rows={k: cut(v) for k, v in self.rows.items()}, groups=groups, at=at, closed=closed,
            group_of=None if self.group_of is None else cut(self.group_of), spare=0,
        )  # fmt: skip

    def _by_list(self, x: Tensor) -> Tensor:
        """[N, ...] -> [L, n, ...] of lists that are equally long."""
        lists = self.counts.shape[0] * self.counts.shape[1]
        return x.unflatten(0, (lists, len(x) // lists))

    @property
    def _size(self) -> int:
        """Rows that stand together."""
        return self.codec.group if self.groups and self.group_of is None else 1

    def some(self, flat: Tensor) -> Tensor:
        """[..., D] float32: the rows `flat` [...] (flat indices)."""
        index = flat.flatten()
        place, at = self._place(index), self.positions()
        counts = Counts(self.counts.shape, self.counts.device, flat[0, 0].numel())
        rows = {k: v.index_select(0, place) for k, v in self.rows.items()}
        group_of = None
        if self.groups:
            group_of = place // self.codec.group if self.group_of is None else self.group_of.index_select(0, place)
        at = None if at is None else at.index_select(0, index)
        part = replace(self, counts=counts, rows=rows, group_of=group_of, at=at, dtype=torch.float32, spare=0)
        return part.dense_rows().view(*flat.shape, -1)

    def append(self, codec: Codec, x: Tensor, counts: Counts, at: Tensor | None = None) -> Packed:
        """Encodes as `encode` does, and appends each of the lists `counts` to the same list here, as `extend` does."""
        if not (getattr(codec, "writes", False) and self._grows_in_place(codec, counts)):
            return self.extend(Packed.encode(codec, x, counts, at))
        opened, new = self._opened(counts, at)
        encode: Any = codec.encode
        encode(x, Where(counts, at), new)
        return opened

    def extend(self, other: Packed) -> Packed:
        """Appends each list of `other`, fresh from `encode`, to the same list here: codes and scales are copied, never
        recomputed. In place, into spare rows, where all lists are equally long."""
        if not self._grows_in_place(other.codec, other.counts):
            return self.exact._interleaved(other)
        opened, new = self._opened(other.counts, other.positions())
        for name, x in (*other.rows.items(), *other.groups.items()):
            new[name].copy_(x.view(new[name].shape))
        return opened

    def _grows_in_place(self, codec: Codec, new: Counts) -> bool:
        if self.codec != codec:
            raise ValueError(f"slots packed as {self.codec} cannot take slots packed as {codec}; use one quantizer")
        return self.counts.even is not None and new.even is not None

    def _opened(self, new: Counts, at: Tensor | None) -> tuple[Packed, dict[str, Tensor]]:
        """With the lists `new` of tokens at [M] after those here, and what is still to be filled: views of what is
        held, per row [L, n, ...], per group [L, n / group, ...]."""
        start, tokens, size = self.counts.width, new.width, self.codec.group
        opened, stop = self, start + tokens
        at = None if self.codec.first is None else at
        if at is not None and self.at is None and not torch.equal(at.long(), _after(new, start, self.codec)):
            opened = replace(self, at=_after(self.roomy.counts, 0, self.codec).int())
        if tokens > self.spare or any(map(_is_fixed, self.rows.values())):
            opened = opened._with_spare(tokens)
        parts = {name: opened._by_list(x)[:, start:stop] for name, x in opened.rows.items()}
        if opened.at is not None and at is not None:
            opened._by_list(opened.at)[:, start:stop] = self._by_list(at)
        if self.groups and self.group_of is None:
            parts |= {k: opened._by_list(v)[:, start // size : stop // size] for k, v in opened.groups.items()}
        elif opened.group_of is not None:
            first, last = self._group_total(), self._group_total() + new.total // size
            group_of = opened.group_of.int() if last > _SHORT else opened.group_of
            group = first + torch.arange(new.total, device=new.device) // size
            opened._by_list(group_of)[:, start:stop] = self._by_list(group)
            opened = replace(opened, group_of=group_of)
            parts |= {k: self._by_list(v[first:last]) for k, v in opened.groups.items()}
        counts = Counts(self.counts.shape, self.counts.device, stop)
        return replace(opened, counts=counts, spare=opened.spare - tokens), parts

    def _with_spare(self, tokens: int) -> Packed:
        """With spare rows for so many tokens of every list, and then some, in whole groups."""
        size, lists = self.codec.group, self.counts.shape[0] * self.counts.shape[1]
        more = max(tokens - self.spare, 0) + -(-_spare(self.counts.width + tokens) // size) * size

        def grown(x: Tensor, lists: int, more: int) -> Tensor:
            old = x.unflatten(0, (lists, len(x) // lists))
            room = x.new_zeros((lists, old.shape[1] + more, *x.shape[1:]))
            room[:, : old.shape[1]] = old
            return room.flatten(0, 1)

        per_group = (lists, more // size) if self.group_of is None else (1, lists * more // size)
        return replace(
            self, spare=self.spare + more, rows={k: grown(v, lists, more) for k, v in self.rows.items()},
            groups={k: grown(v, *per_group) for k, v in self.groups.items()},
            group_of=None if self.group_of is None else grown(self.group_of, lists, more),
            at=None if self.at is None else grown(self.at, lists, more),
            closed=None if self.closed is None else grown(self.closed, *per_group),
        )  # fmt: skip

    def _interleaved(self, other: Packed) -> Packed:
        """`extend`, copying all."""
        counts = self.counts.plus(other.counts)
        pairs = [(v, other.rows[k]) for k, v in self.rows.items()]
        whole = self.group_of is None
        if not whole:
            pairs.append((self._explicit(), other._explicit() + self._group_total()))
        mine, theirs = self.positions(), other.positions()
        if mine is not None and theirs is not None:
            pairs.append((mine.long(), theirs.long()))
        moved = interleaved(pairs, self.counts, other.counts)
        at = None if mine is None else _implied(moved.pop(), counts, self.codec)
        group_of = None if whole else _narrow(moved.pop(), self._group_total() + other._group_total())
        if whole:
            sizes = self.counts.groups(self.codec.group), other.counts.groups(self.codec.group)
            shared = interleaved([(v, other.groups[k]) for k, v in self.groups.items()], *sizes)
        else:
            shared = [torch.cat([v, other.groups[k]]) for k, v in self.groups.items()]
        rows, groups = dict(zip(self.rows, moved, strict=True)), dict(zip(self.groups, shared, strict=True))
        closed = None if self.closed is None else torch.cat([self.closed, other._closed()])
        return replace(self, counts=counts, rows=rows, groups=groups, group_of=group_of, at=at, closed=closed)

    def pick(self, flat: Tensor, counts: Counts) -> Packed:
        """Keeps the rows `flat` [M] (flat indices), which then form the lists `counts`.

        Rows keep their codes and their own group's scale (no decode, no re-encode): a group's scale lives as long as
        one member does, and the rows then carry a group reference, which is counted.
        """
        place = self._place(flat)
        others = [x for x in (self.group_of, self.at) if x is not None]
        moved = take_rows([*self.rows.values(), *others], place)
        rows, at = dict(zip(self.rows, moved, strict=False)), None
        if self.codec.first is not None:
            at = _after(self.counts, 0, self.codec)[flat] if self.at is None else moved[-1]
        picked = replace(self, counts=counts, rows=rows, at=_implied(at, counts, self.codec), spare=0)
        if not self.groups:
            return picked
        return picked._refer(place // self.codec.group if self.group_of is None else moved[len(rows)].long())

    def select(self, batch: Tensor) -> Packed:
        """Rows of the batch, in the given order, with repetition."""
        if self.spare:
            return self.exact.select(batch)
        counts = self.counts.select(batch)
        rows = {k: _select(v, self.counts, batch) for k, v in self.rows.items()}
        taken = replace(
            self, counts=counts, rows=rows, at=None if self.at is None else _select(self.at, self.counts, batch)
        )
        if not self.groups:
            return taken
        if self.group_of is None:
            lists = self.counts.groups(self.codec.group)
            return replace(taken, groups={k: _select(v, lists, batch) for k, v in self.groups.items()})
        return taken._refer(_select(self.group_of, self.counts, batch).long())

    def compact(self, below: float) -> Packed:
        """Encodes rows again in whole groups, in lists whose groups have lost more than 1 - `below` of their rows.

        Costs a second rounding, which is logged, and frees scales. No row is encoded again twice; what does not fill a
        group stays as it is.
        """
        size, lists = self.codec.group, self.counts.shape[0] * self.counts.shape[1]
        if size == 1 or self.group_of is None or not self.counts.total:
            return self
        if self.spare:
            exact = self.exact
            done = exact.compact(below)
            return self if done is exact else done
        group_of, closed, (owner, _) = self._explicit(), self._closed(), self.counts.owners()
        open_row = ~closed[group_of]
        list_of_group = owner.new_zeros(len(closed)).scatter(0, group_of, owner)
        rows = owner[open_row].bincount(minlength=lists)
        room = list_of_group[~closed].bincount(minlength=lists) * size
        whole = torch.where(rows < below * room, rows // size * size, 0)
        rank = open_row.cumsum(0) - 1 - (rows.cumsum(0) - rows)[owner]
        chosen = (open_row & (rank < whole[owner])).nonzero()[:, 0]
        if not len(chosen):
            return self
        if hasattr(self.codec, "again"):
            new_rows, new_groups, error = self.codec.again(self, chosen)
        else:
            before = self.pick(chosen, Counts.of(whole.view(self.counts.shape)))
            x = before.dense_rows()
            again = Packed.encode(self.codec, x, before.counts, before.positions())
            new_rows, new_groups, decoded = again.rows, again.groups, x.float()
            error = torch.stack([(again.dense_rows().float() - decoded).square().sum(), decoded.square().sum()])
        freed = group_of[chosen].unique().numel() - len(chosen) // size
        lost = float((error[0] / error[1]).sqrt())
        _log.info("compacted %d rows, %d groups freed, relative error %.3g", len(chosen), freed, lost)
        return replace(
            self,
            rows={k: v.index_copy(0, chosen, new_rows[k]) for k, v in self.rows.items()},
            groups={k: torch.cat([v, new_groups[k]]) for k, v in self.groups.items()},
            closed=torch.cat([closed, torch.ones_like(closed[: len(chosen) // size])]),
        )._refer(group_of.index_copy(0, chosen, len(closed) + torch.arange(len(chosen), device=chosen.device) // size))

    def _refer(self, group_of: Tensor) -> Packed:
        """Rows refer to the groups group_of [N]; those to which none refers are dropped."""
        used, group_of = renumber(group_of, self._group_total())
        groups = {k: v[used] for k, v in self.groups.items()}
        closed = None if self.closed is None else self.closed[used]
        references = None if _in_whole_groups(group_of, self.codec.group) else _narrow(group_of, len(used))
        return replace(self, groups=groups, group_of=references, closed=closed)

    def _closed(self) -> Tensor:
        """[groups] bool."""
        if self.closed is not None:
            return self.closed
        return torch.zeros(self._group_total(), dtype=torch.bool, device=self.counts.device)

    def _place(self, flat: Tensor) -> Tensor:
        """Where the rows `flat` (flat indices) stand, as spare ones count."""
        return flat + flat // self.counts.width * self.spare if self.spare else flat

    def _used(self, x: Tensor) -> Tensor:
        """[N, ...]: a per-row tensor without its spare rows."""
        return self._by_list(x)[:, : self.counts.width].flatten(0, 1) if self.spare else x

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.rows.items()
        yield from self.groups.items()
        if self.group_of is not None:
            yield "group_of", self.group_of
        if self.at is not None:
            yield "at", self.at
        if self.closed is not None:
            yield "closed", self.closed

    def row_nbytes(self) -> Tensor:
        """[B] int64: bytes of the rows, and of the groups they refer to, of each batch row, as if it were alone.

        Raises ValueError if a GPU has found since that something could not be stored."""
        bounds.settle(self.counts.device)
        slots = self.counts.per_head.sum(1)
        total = slots * sum(_entry_nbytes(t) for t in (*self.rows.values(), *([] if self.at is None else [self.at])))
        if not self.groups:
            return total
        if self.group_of is None:
            used = slots // self.codec.group
        else:
            parts = self._used(self.group_of).split(slots.tolist())
            used = slots.new_tensor([part.unique().numel() for part in parts])
            referring = slots.new_tensor([not _in_whole_groups(part, self.codec.group) for part in parts])
            total += slots * referring * self.group_of.element_size()
        shared = [*self.groups.values(), *([] if self.closed is None else [self.closed])]
        return total + used * sum(_entry_nbytes(t) for t in shared)

    def _group_total(self) -> int:
        lists = self.counts.shape[0] * self.counts.shape[1]
        return len(next(iter(self.groups.values()))) - lists * self.spare // self.codec.group

    def _explicit(self) -> Tensor:
        if self.group_of is not None:
            return self._used(self.group_of).long()
        return torch.arange(self.counts.total, device=self.counts.device) // self.codec.group


def scores(packed: Packed, query: Tensor) -> Tensor:
    """query [L, M, D] times all rows of the equally long lists: [L, M, n] float32."""
    if hasattr(packed.codec, "scores"):
        return packed.codec.scores(packed, query)
    return query @ packed.dense_rows().view(query.shape[0], -1, query.shape[2]).transpose(1, 2)


def mix(packed: Packed, weights: Tensor) -> Tensor:
    """All rows of the equally long lists, weighted by [L, M, n] and summed: [L, M, D] float32."""
    if hasattr(packed.codec, "mix"):
        return packed.codec.mix(packed, weights)
    rows = packed.dense_rows()
    return weights @ rows.view(weights.shape[0], -1, rows.shape[1])


_SHORT = 2**15
"""Groups that int16 can name."""


def _narrow(group_of: Tensor, groups: int) -> Tensor:
    """The smallest integer type that can name every group: the references are part of the bytes."""
    return group_of.to(torch.int16 if groups <= _SHORT else torch.int32)


def _after(counts: Counts, start: int, codec: Codec) -> Tensor:
    """[N] int64: positions of the rows of lists that come after `start` rows and have lost nothing."""
    return counts.owners()[1] + start + (codec.first or 0)


def _in_whole_groups(group_of: Tensor, size: int) -> bool:
    """Whether rows [N] stand group after group, `size` of each: then nothing need say which group a row refers to."""
    if len(group_of) % size:
        return False
    return torch.equal(group_of.long(), group_of[:1] + torch.arange(len(group_of), device=group_of.device) // size)


def _implied(at: Tensor | None, counts: Counts, codec: Codec) -> Tensor | None:
    """Positions [N] as they are stored: not at all if they follow from `codec.first`."""
    if at is None or codec.first is None or torch.equal(at.long(), _after(counts, 0, codec)):
        return None
    return at.int()


def _entry_nbytes(flat: Tensor) -> int:
    """Bytes of one entry of [N, ...]."""
    return flat[0].numel() * flat.element_size() if len(flat) else 0


def _select(flat: Tensor, counts: Counts, batch: Tensor) -> Tensor:
    return flatten(unflatten(flat, counts)[batch], counts.select(batch))


@dataclass(frozen=True)
class Held:
    """Keys or values of one layer: sinks (full precision), `body` (packed), recent slots (full precision), in order.

    tail [B, H, capacity, D] holds both what is full precision: the sinks of each list, then its recent slots.
    tail_counts: how many these are together; sinks: how many of them come before the body (None: none).
    """

    tail: Tensor
    tail_counts: Counts
    body: Packed | None = None
    sinks: Counts | None = None
    counts: Counts = field(init=False)

    def __post_init__(self) -> None:
        total = self.tail_counts if self.body is None else self.body.counts.plus(self.tail_counts)
        object.__setattr__(self, "counts", total)

    @classmethod
    def dense_from(cls, x: Tensor) -> Held:
        """x [B, H, S, D], every slot live."""
        return cls(owned(x), Counts((x.shape[0], x.shape[1]), x.device, x.shape[2]))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, S, D) of the padded dense view."""
        return (*self.tail.shape[:2], self.counts.width, self.tail.shape[3])

    @property
    def dtype(self) -> torch.dtype:
        return self.tail.dtype

    @property
    def packed(self) -> tuple[Tensor, Tensor]:
        """[B, H] int64: first slot of the body in each list, and the slot after its last."""
        none = torch.zeros(self.counts.shape, dtype=torch.int64, device=self.tail.device)
        first = none if self.sinks is None else self.sinks.per_head
        return first, first + (none if self.body is None else self.body.counts.per_head)

    def dense(self) -> Tensor:
        """[B, H, S, D] in the model's dtype, left-aligned; dead columns hold any finite value."""
        if self.body is None:
            return self.tail[:, :, : self.tail_counts.width]
        rows, packed, capacity = self.body.dense_rows(), self.body.counts, self.tail.shape[2]
        if self._sinks_and_packed is not None:
            sinks = self._sinks_and_packed[0]
            before, after = self.tail[:, :, :sinks], self.tail[:, :, sinks : self.tail_counts.width]
            return torch.cat([before, unflatten(rows, packed), after], dim=2)
        column = torch.arange(self.counts.width, device=rows.device)
        first, end = (x.flatten()[:, None] for x in self.packed)
        owner = torch.arange(len(first), device=rows.device)[:, None]
        in_tail = packed.total + owner * capacity + torch.where(column < first, column, column - (end - first))
        in_body = packed.starts()[:, None] + column - first
        both = torch.cat([rows, self.tail.flatten(0, 2)])
        source = torch.where((column < first) | (column >= end), in_tail, in_body).clamp(max=len(both) - 1)
        return both.index_select(0, source.flatten()).view(self.shape)

    def columns(self, start: int, stop: int) -> Tensor:
        """[B, H, stop - start, D] float32: some columns of `dense`, decoded by themselves."""
        if self.body is None:
            return self.tail[:, :, start:stop].float()
        if start == 0 and stop == self.counts.width:
            return self.dense().float()
        if self._sinks_and_packed is None:
            column = torch.arange(start, stop, device=self.tail.device)
            first, end = (x[..., None] for x in self.packed)
            starts = self.body.counts.starts().view(*self.counts.shape, 1)
            flat = (starts + column - first).clamp(0, self.body.counts.total - 1)
            exact = take_columns(self.tail, torch.where(column < first, column, column - (end - first))).float()
            return torch.where(((column >= first) & (column < end))[..., None], self.body.some(flat), exact)
        parts = [
            self.body.columns(a, b) if packed else self.tail[:, :, a:b].float()
            for packed, a, b in self._sections(start, stop)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def scores(self, query: Tensor, start: int, stop: int) -> Tensor:
        """query [B, H, M, D] float32 times these columns: [B, H, M, stop - start]."""
        if self.body is None or self._sinks_and_packed is None:
            return query @ self.columns(start, stop).transpose(2, 3)
        parts = [
            self.body.scores(query, a, b) if packed else query @ self.tail[:, :, a:b].float().transpose(2, 3)
            for packed, a, b in self._sections(start, stop)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)

    def mix(self, weights: Tensor, start: int, stop: int) -> Tensor:
        """These columns, weighted by [B, H, M, stop - start] float32 and summed: [B, H, M, D]."""
        if self.body is None or self._sinks_and_packed is None:
            return weights @ self.columns(start, stop)
        out = weights.new_zeros(*weights.shape[:3], self.tail.shape[3])
        for packed, a, b in self._sections(start, stop):
            part, weights = weights[..., : b - a], weights[..., b - a :]
            out += self.body.mix(part, a, b) if packed else part @ self.tail[:, :, a:b].float()
        return out

    @property
    def _sinks_and_packed(self) -> tuple[int, int] | None:
        """How many slots every list has before its body, and in it; None if lists differ."""
        sinks = 0 if self.sinks is None else self.sinks.even
        packed = 0 if self.body is None else self.body.counts.even
        return None if sinks is None or packed is None or self.tail_counts.even is None else (sinks, packed)

    def _sections(self, start: int, stop: int) -> Iterator[tuple[bool, int, int]]:
        """Columns start to stop of lists that do not differ: whether packed, and their columns of body or tail."""
        assert self._sinks_and_packed is not None
        sinks, packed = self._sinks_and_packed
        bounds = ((False, 0, sinks, 0), (True, sinks, sinks + packed, sinks), (False, sinks + packed, stop, packed))
        for in_body, first, end, shift in bounds:
            if max(start, first) < min(stop, end):
                yield in_body, max(start, first) - shift, min(stop, end) - shift

    def append(self, x: Tensor, valid: Tensor | None = None) -> Held:
        """x [B, H, T, D] joins the tail; `valid` [B, T] marks real tokens (None: all)."""
        tail, counts = append_columns(self.tail, self.tail_counts, x, valid, spare=True)
        return replace(self, tail=tail, tail_counts=counts)

    def gather(self, index: Tensor, counts: Counts) -> Held:
        """Keeps the slots `index` [B, H, K], ascending, -1 after the last; `counts` says how many each list keeps."""
        index = index.expand(*self.tail.shape[:2], -1)
        if self.body is None:
            return Held(take_columns(self.tail, index), counts)
        first, end = (x[..., None] for x in self.packed)
        in_body = (index >= first) & (index < end)
        body_counts = Counts.of(in_body.sum(-1))
        starts = self.body.counts.starts().view(*index.shape[:2], 1)
        body = self.body.pick((index - first + starts)[in_body], body_counts)
        # The others, moved to the left over the body's share of `index`, are the tail's slots.
        sinks = ((index >= 0) & (index < first)).sum(-1, keepdim=True)
        left = counts.per_head - body_counts.per_head
        column = torch.arange(int(left.max()), device=index.device).expand(*index.shape[:2], -1)
        column = torch.where(column < sinks, column, column + body_counts.per_head[..., None])
        kept = index.gather(2, column.clamp(max=max(index.shape[-1] - 1, 0)))
        tail = take_columns(self.tail, torch.where(kept < first, kept, kept - (end - first)))
        if not body_counts.total:
            return Held(tail, Counts.of(left))
        return Held(tail, Counts.of(left), body, None if self.sinks is None else Counts.of(sinks[..., 0]))

    def pack(self, codec: Codec, amount: Counts, sinks: Counts | None = None, position: Tensor | None = None) -> Held:
        """Encodes by `codec` the oldest `amount` `unpacked` slots of each list after its `sinks` first ones.

        sinks must be what is held before a list's body, if it has one. position [B, H, S] of all slots, for codecs
        that ask for it. Where all lists are equally long, nothing here waits for a GPU, but for codecs that ask for
        positions; and the body grows in place. How long lists are is known to the host alone, so that a CUDA graph
        that is played again packs to the same place: capture kernels, not steps of a cache.
        """
        if amount.total == 0:
            return self
        if self.is_flat:
            return self.rectangular().pack(codec, amount, sinks, position)
        before = sinks or amount.each(torch.zeros_like)
        start = before if self.body is None else before.plus(self.body.counts)
        at = None
        if codec.first is not None and position is not None:
            at = _run(position.expand(*self.counts.shape, -1), start, amount)
        x = _run(self.tail, before, amount)
        left = self.tail_counts.each(torch.sub, amount)
        if before.even is not None and amount.even is not None and left.even is not None:
            kept = [self.tail[:, :, : before.even], self.tail[:, :, before.even + amount.even : self.tail_counts.even]]
            tail = torch.cat(kept, dim=2)
        else:
            column = torch.arange(left.width, device=x.device)
            first = before.per_head[..., None]
            tail = take_columns(self.tail, torch.where(column < first, column, column + amount.per_head[..., None]))
        if self.body is None:
            return Held(tail, left, Packed.encode(codec, x, amount, at), sinks)
        return Held(tail, left, self.body.append(codec, x, amount, at), sinks)

    def compact(self, below: float) -> Held:
        """See `Packed.compact`."""
        return self if self.body is None else replace(self, body=self.body.compact(below))

    def first_tokens(self, amount: int, position: Tensor) -> Counts | None:
        """How many slots to keep before the body as sinks, which are tokens before position `amount`.

        position [B, H or 1, S]. None: no sinks are asked for.
        """
        if not amount:
            return None
        known = None
        if self.body is not None and not self.is_flat:
            known = self.sinks or self.body.counts.each(torch.zeros_like)
            if self.body.counts.even:
                return known
        first = ((position >= 0) & (position < amount)).sum(-1).expand(self.counts.shape)
        if known is not None and self.body is not None:
            first = torch.where(self.body.counts.per_head == 0, first, known.per_head)
        return Counts.of(first)

    @property
    def is_flat(self) -> bool:
        """Whether the body is full precision, only without dead rows."""
        return self.body is not None and isinstance(self.body.codec, Plain)

    @property
    def unpacked(self) -> Counts:
        """Slots in full precision."""
        return self.counts if self.is_flat else self.tail_counts

    def flattened(self) -> Held:
        """The same slots, full-precision ones flat if a rectangle would waste more than a twentieth of its bytes."""
        wasted = self.tail_counts.width * self.tail.shape[0] * self.tail.shape[1] - self.tail_counts.total
        if 20 * wasted <= self.tail_counts.total or not (self.body is None or self.is_flat):
            return self
        x, counts = flatten(self.dense(), self.counts), self.counts
        none = Counts(counts.shape, counts.device, 0)
        body = Packed(Plain(x.dtype), counts, {"plain": owned(x)}, {}, None, x.dtype)
        return Held(self.tail[:, :, :0].clone(), none, body)

    def rectangular(self) -> Held:
        """Undoes `flattened`."""
        return Held(self.dense(), self.counts) if self.is_flat else self

    def select(self, batch: Tensor) -> Held:
        """Rows of the batch, in the given order, with repetition (beam search)."""
        body = None if self.body is None else self.body.select(batch)
        sinks = None if self.sinks is None else self.sinks.select(batch)
        return Held(self.tail[batch], self.tail_counts.select(batch), body, sinks)

    def sealed(self) -> Held:
        """The same slots without spare capacity, so that two holders can append without seeing each other."""
        body = None if self.body is None else self.body.exact
        return replace(self, tail=self.tail[:, :, : self.tail_counts.width], body=body)

    def to(self, device: torch.device | str) -> Held:
        """The same slots, what is full precision on another device; only good for being moved back."""
        return replace(self, tail=self.tail.to(device))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self.body is not None:
            yield from self.body.tensors()
        yield "tail", self.tail

    @property
    def nbytes(self) -> int:
        """Bytes of the storages held, spare capacity included."""
        return sum(t.untyped_storage().nbytes() for _, t in self.tensors())

    def row_nbytes(self) -> Tensor:
        """[B] int64: bytes each batch row would hold alone, without spare capacity and dead columns."""
        total = self.tail_counts.per_head.sum(1) * (self.tail.shape[-1] * self.tail.element_size())
        return total if self.body is None else total + self.body.row_nbytes()
