"""ZipCache: tokens that attention reads get more bits than the rest, and nothing is evicted (He et al., NeurIPS 2024).

Paper https://arxiv.org/abs/2405.14256, official code https://github.com/ThisisBillhe/ZipCache
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbench.kernels.packing import cast
from kvbench.policies.interface import KV, Quantizer, Step
from kvbench.policies.kivi import PerChannel, PerToken
from kvbench.policies.store import Codec, Counts, Held, Packed, Plain, Where, flatten, take_columns


@dataclass(frozen=True)
class ZipCache(Quantizer):
    """Splits each block of `interval` tokens of a head into two classes, by normalised attention, and packs both.

        saliency[s] = sum over queries i >= s of A[i, s] / number of these queries            float32, per head
        important   = the ratio * (tokens packed at a time) slots of the largest saliency, ties to the older
        keys:   affine min-max codes of b bits per channel, over the tokens of one class of one block
        values: y = v / c, c[d] = fp16(sqrt(max |v[d]|)) over these tokens; affine min-max codes of y per token

    b = `high` for important tokens, else `low`; scale and zero are those of `KIVI`, and c = 1 where a channel is zero.
    Of a full-precision tail of n tokens the oldest floor(n/interval)*interval are packed, and keep their class. With
    n_h = interval - n_l important tokens in a block, n_l = floor((1 - ratio) * interval), each class stores codes uint8
    [n, D*b/8] and, for keys, scale and zero fp16 [2, D]; for values scale and zero fp16 [n, 2] and c fp16 [D]. Every
    slot of keys and of values stores its class in a byte. At the defaults and D = 128 that is 3.90 bits per element of
    keys and 3.83 of values.

    high, low: bits, 2, 4 or 8, high > low. ratio: share of important tokens, in (0, 1). interval: tokens.

    Raises ValueError for fields outside these sets or a ratio that leaves one class without tokens, for a head_dim that
    low-bit codes do not fill whole bytes of, and for values whose scale or zero point is beyond fp16 (65504); KeyError
    without the column "attention".

    Official defaults: 4 and 2 bits, 60 % important, every 100 tokens. Deviations. `all_queries`: official code takes a
    tenth of the prompt's queries (the newest and random ones), and when decoding the newest query alone, not divided;
    here every query counts. `blocks`: official code packs a whole prompt at once, its last tokens too, with one range
    for each channel of keys over the class; here ranges are those of a block. `never_again`: official code decodes and
    re-encodes all tokens every `interval` tokens; here codes stay. `per_head`: official code takes the range of a
    token's values over all heads. `channel_scale`: official code takes c over both classes.

    Example: `ZipCache()`, or `SnapKV(0.5) | ZipCache(ratio=0.4)`.
    """

    high: int = 4
    low: int = 2
    ratio: float = 0.6
    interval: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.high not in (4, 8) or self.low not in (2, 4) or self.low >= self.high:
            raise ValueError(f"ZipCache: bits must be 2, 4 or 8 with high > low, got {self.high!r} and {self.low!r}")
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 2:
            raise ValueError(f"ZipCache: interval must be an int of 2 or more tokens, got {self.interval!r}")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 < self.ratio < 1:
            raise ValueError(f"ZipCache: ratio must be a share above 0 and below 1, got {self.ratio!r}")
        if not 0 < self.important < self.interval:
            raise ValueError(
                f"ZipCache: ratio={self.ratio} of {self.interval} tokens leaves a class empty; use a larger interval"
            )

    @property
    def important(self) -> int:
        """Important tokens of a block."""
        return self.interval - int((1 - self.ratio) * self.interval + 1e-6)

    @property
    def needs(self) -> Mapping[str, Any]:
        return {"attention": 1}

    def check(self, head_dim: int) -> None:
        if head_dim % (8 // self.low):
            raise ValueError(
                f"{self}: head_dim={head_dim} is not a multiple of {8 // self.low} ({self.low}-bit codes per byte)"
            )

    def codecs(self, step: Step | None = None) -> tuple[Classes, Classes]:
        many, few = self.important, self.interval - self.important
        keys = Classes(PerChannel(self.high, many), PerChannel(self.low, few))
        return keys, Classes(ChannelSeparable(self.high, many), ChannelSeparable(self.low, few))

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        whole = tail // self.interval * self.interval
        return whole, whole

    def __call__(self, kv: KV, step: Step) -> KV:
        self.check(kv.keys.shape[-1])
        queries = (step.seen[:, None, None] - kv.position).clamp(min=1)
        saliency = kv.column("attention") / queries
        sides = [
            self._pack(held, codec, saliency, kv.position)
            for held, codec in zip((kv.keys, kv.values), self.codecs(step), strict=True)
        ]
        if self.compact:
            sides = [held.compact(self.compact) for held in sides]
        return KV(sides[0], sides[1], kv.columns, kv.side)

    def _pack(self, held: Held, codec: Classes, saliency: Tensor, position: Tensor) -> Held:
        held = held.rectangular()
        sinks = held.first_tokens(self.sinks, position)
        before = sinks or held.unpacked.each(torch.zeros_like)
        packing = held.unpacked.each(lambda tail, sinks: self.flush(tail - sinks)[0], before)
        cut = Held(held.tail, held.tail_counts).pack(Plain(held.dtype), packing, sinks)  # splits the tail, no more
        amount = packing.per_head
        if cut.body is None:
            return held
        x, moved = cut.body.rows["plain"], cut.body.counts
        first, end = held.packed
        column = torch.arange(moved.width, device=x.device)
        slot = torch.where(first == end, before.per_head, end)[..., None] + column
        score = take_columns(saliency.expand(*moved.shape, -1), slot)
        score = score.masked_fill(column >= amount[..., None], -torch.inf)
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        important = flatten(rank < (amount // self.interval * self.important)[..., None], moved)
        body: Packed = TwoClasses.split(codec, x, moved, important)
        return replace(cut, body=body if held.body is None else held.body.extend(body))


@dataclass(frozen=True)
class ChannelSeparable:
    """Values: channels are divided by a scale that `group` consecutive tokens share, then quantized per token."""

    bits: int
    group: int
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        x = x.float().unflatten(0, (-1, self.group))
        channel = x.abs().amax(1).sqrt().half()
        channel = torch.where(channel > 0, channel, 1.0).half()
        rows, _ = PerToken(self.bits, x.shape[-1]).encode((x / channel.float()[:, None]).flatten(0, 1), where)
        return rows, {"channel": channel}

    def decode(self, packed: Packed) -> Tensor:
        head_dim = packed.groups["channel"].shape[1]
        x = PerToken(self.bits, head_dim).decode(replace(packed, dtype=torch.float32))
        if packed.group_of is None:
            x.view(-1, self.group, head_dim).mul_(packed.groups["channel"][:, None])
        else:
            x.mul_(packed.group_rows("channel"))
        return cast(x, packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim * self.bits // 8 + 4

    def group_nbytes(self, head_dim: int) -> int:
        return 2 * head_dim


@dataclass(frozen=True)
class Classes:
    """The formats of important and of other tokens. A group is a block: so many tokens of each as make their groups.

    Decode attention runs in PyTorch: the rows of a list lie in two bodies, and kernels read one.
    """

    important: Codec
    others: Codec
    first: ClassVar[None] = None

    @property
    def group(self) -> int:
        return self.important.group + self.others.group

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        raise ValueError("ZipCache packs tokens by their attention, which only the policy by itself sees; use no `&`")

    def decode(self, packed: Packed) -> Tensor:
        return packed.dense_rows()

    def row_nbytes(self, head_dim: int) -> int:
        return 1

    def group_nbytes(self, head_dim: int) -> int:
        return sum(c.group * c.row_nbytes(head_dim) + c.group_nbytes(head_dim) for c in (self.important, self.others))


@dataclass(frozen=True)
class TwoClasses(Packed):
    """Rows in two bodies: rows["important"] [N] bool says in which; each body holds its rows in the order of slots."""

    high: Packed = field(kw_only=True)
    low: Packed = field(kw_only=True)

    @classmethod
    def split(cls, codec: Classes, x: Tensor, counts: Counts, important: Tensor) -> TwoClasses:
        """x [N, D] flat rows of the lists `counts`; important [N] bool."""
        of = _class_counts(counts, important)
        high = Packed.encode(codec.important, x[important], of)
        low = Packed.encode(codec.others, x[~important], _without(counts, of))
        return cls(codec, counts, {"important": important}, {}, None, x.dtype, high=high, low=low)

    @property
    def _row(self) -> Tensor:
        """[N] int64: each row's place in its body."""
        important = self._important
        return torch.where(important, important.cumsum(0), (~important).cumsum(0)) - 1

    @property
    def _important(self) -> Tensor:
        return self._used(self.rows["important"])

    @property
    def exact(self) -> TwoClasses:
        return self._with(super().exact, self.high.exact, self.low.exact)

    def dense_rows(self) -> Tensor:
        source = self._row + torch.where(self._important, 0, self.high.counts.total)
        return torch.cat([self.high.dense_rows(), self.low.dense_rows()]).index_select(0, source)

    def _cut(self, start: int, stop: int) -> tuple[Packed, int]:
        column = torch.arange(start, stop, device=self.counts.device)
        return self._exactly(self.counts.starts()[:, None] + column, stop - start), 0

    def some(self, flat: Tensor) -> Tensor:
        return self._exactly(flat, flat[0, 0].numel()).dense_rows().view(*flat.shape, -1)

    def _exactly(self, flat: Tensor, each: int) -> TwoClasses:
        """The rows `flat` (flat indices, `each` of every list), to be read as float32."""
        part = self.pick(flat.flatten(), Counts(self.counts.shape, self.counts.device, each))
        high, low = (replace(body, dtype=torch.float32) for body in (part.high, part.low))
        return replace(part, high=high, low=low, dtype=torch.float32)

    def extend(self, other: Packed) -> TwoClasses:
        assert isinstance(other, TwoClasses)
        grown = super().extend(other)
        return self._with(grown, self.high.extend(other.high), self.low.extend(other.low))

    def pick(self, flat: Tensor, counts: Counts) -> TwoClasses:
        important, row = self._important[flat], self._row[flat]
        of = _class_counts(counts, important)
        high, low = self.high.pick(row[important], of), self.low.pick(row[~important], _without(counts, of))
        return self._with(super().pick(flat, counts), high, low)

    def select(self, batch: Tensor) -> TwoClasses:
        return self._with(super().select(batch), self.high.select(batch), self.low.select(batch))

    def compact(self, below: float) -> TwoClasses:
        return self._with(self, self.high.compact(below), self.low.compact(below))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().tensors()
        for name, body in (("high", self.high), ("low", self.low)):
            yield from ((f"{name}.{part}", tensor) for part, tensor in body.tensors())
            if body.counts.ragged is not None:
                yield f"{name}.lengths", body.counts.ragged

    def row_nbytes(self) -> Tensor:
        return super().row_nbytes() + self.high.row_nbytes() + self.low.row_nbytes()

    def _with(self, flags: Packed, high: Packed, low: Packed) -> TwoClasses:
        return replace(self, counts=flags.counts, rows=flags.rows, spare=flags.spare, high=high, low=low)


def _class_counts(counts: Counts, important: Tensor) -> Counts:
    """How many of each list's rows are important."""
    owner, _ = counts.owners()
    lists = counts.shape[0] * counts.shape[1]
    return Counts.of(torch.bincount(owner[important], minlength=lists).view(counts.shape))


def _without(counts: Counts, of: Counts) -> Counts:
    return Counts.of(counts.per_head - of.per_head)
