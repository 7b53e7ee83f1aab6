"""The one file that touches transformers: a `Cache` whose layers hold a `KV`, and the attention function that reads it.

How the two meet: attention modules call `cache.update(k, v, layer)` and hand what it returns to the registered
attention function. `PolicyLayer.update` keeps the new tokens pending and returns them tagged with itself; `_attention`
finds the layer by that tag, and the layer appends, attends, collects what the policy needs, and applies the policy.
Policies that need more than their own layer (a draft of the answer, all layers at once) are applied after the forward,
by hooks on the model, which also note the token ids.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvbench import backend
from kvbench.kernels.attention import attend, attend_causal, attend_tiles
from kvbench.kernels.rotation import rotate
from kvbench.kernels.scores import column_sums
from kvbench.ledger import Part, full_nbytes, ledger, report
from kvbench.policies.full import Full
from kvbench.policies.interface import KV, Evictor, Moments, Policy, Probe, Repeat, Selection, Selector, Stack, Step
from kvbench.policies.store import Counts, Held, take_columns

F = TypeVar("F", bound=Callable[..., Any])

NAME = "kvbench"
RECORDED = ("attention", "queries", "moments", "rope", "tokens")  # what a cache can collect for later forks
_TAG = "_kvbench_layer"
_FEW = 16  # queries of one forward that attend to packed slots tile by tile; more pay for decoding a layer at once
_TILE = 2**20  # elements a thread reads at a time: a plane of 2-bit codes is 1 MiB as float32, and stays in its cache


def _uncompiled(function: F) -> F:
    """A function that `torch.compile` leaves alone."""
    return cast(F, torch.compiler.disable(function, reason="a kvbench cache changes its shape at every step"))


@dataclass(frozen=True)
class Lent:
    """New tokens of one layer, as long as others read it, too: keys and values [B, H, T, D] at position [B, T].

    first: nothing was held before. decoding: see `Step`.
    """

    keys: Tensor
    values: Tensor
    position: Tensor
    first: bool
    decoding: bool


class Attended(NamedTuple):
    """What attention gave: out [B, Hq, T, D], and, if it is at hand, what each slot received, sums [B, H, S] float32,
    or the log-sum-exp of each query, lse [B, Hq, T] float32 (anything for pads)."""

    out: Tensor
    sums: Tensor | None = None
    lse: Tensor | None = None


class PolicyLayer(CacheLayerMixin):
    """One layer of a `CompressedCache`: layer `index` of the model, number `order` of those that policies compress."""

    is_sliding = False
    is_croppable = False  # what was evicted does not come back

    def __init__(self, index: int, order: int, cache: CompressedCache):
        super().__init__()
        self.index = index
        self.order = order
        self.last_reader: int | None = None  # order of the last layer that attends to this one's slots, too
        self._cache = cache
        self.reset()

    def reset(self) -> None:
        # None until the first forward, and only asked for afterwards.
        self.kv: KV = None  # type: ignore[assignment]
        self.seen: Tensor = None  # type: ignore[assignment]  # [B] real tokens seen
        self.prompt: Tensor = None  # type: ignore[assignment]  # [B] of them by the end of the last multi-token forward
        self.new: Tensor | None = None  # [B] of them since the policy last ran
        self.columns_seen = 0  # with pads, as transformers counts
        self.queries: Tensor | None = None  # [B, Hq, w, D], as long as the policy needs them
        self.query_valid: Tensor | None = None
        self.moments: tuple[Tensor, Tensor, Tensor] | None = None  # count, sum, sum of outer products of prompt queries
        self.read: Tensor | None = None  # [B, 4] slots the last forward read, if not all; see `row_read_nbytes`
        self.geometry: dict[str, Any] = {}
        self.lent: Lent | None = None
        self._pending: tuple[Tensor, Tensor] | None = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    @_uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keeps new keys and values [B, H, T, D] pending until the attention function of this layer is called."""
        self._cache.check_consumed()
        if self.kv is not None and key_states.shape[0] != self.kv.keys.shape[0]:
            raise ValueError(
                f"this cache holds a batch of {self.kv.keys.shape[0]}, got {key_states.shape[0]}; "
                "use a new CompressedCache or call reset()"
            )
        self._pending = (_under_autocast(key_states), _under_autocast(value_states))
        self._cache.pending_layer = self
        self.is_initialized = True
        tagged = key_states.view_as(key_states)
        setattr(tagged, _TAG, self)
        return tagged, value_states

    @_uncompiled
    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None, **geometry: Any) -> Tensor:
        """Appends the pending tokens, attends (query [B, Hq, T, D] -> same), collects signals, applies the policy."""
        assert self._pending is not None
        keys, values = self._pending
        self._pending = self._cache.pending_layer = None
        self._cache.check_module(module)
        batch, _, tokens, _ = keys.shape
        valid = self._cache.real_tokens(self.index, mask, tokens)
        if self.kv is None:
            self.kv = self._empty(keys, values)
            self.seen = torch.zeros(batch, dtype=torch.int64, device=query.device)
        decoding = tokens == 1 and self.columns_seen > 0 and not self._cache.is_deferred
        if not decoding:
            self.prompt = self.seen + (tokens if valid is None else valid.sum(1))
        self.geometry = geometry
        # A block attends to what earlier blocks left over. Layers are causal, so cutting each layer's tokens into
        # blocks gives what feeding the model block by block would.
        size = self._cache.policy.block or tokens
        order = None
        if size < tokens and valid is not None:  # blocks are of real tokens: each row's come first, its pads last
            order = (~valid).int().argsort(dim=1, stable=True)
            query, keys, values = (
                take_columns(x, order[:, None].expand(-1, x.shape[1], -1)) for x in (query, keys, values)
            )
            valid = valid.gather(1, order)
        parts = [
            self._attend(query[:, :, part], keys[:, :, part], values[:, :, part], _columns(valid, part), decoding)
            for part in (slice(start, start + size) for start in range(0, tokens, size))
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        if order is not None:
            out = take_columns(out, order.argsort(dim=1)[:, None].expand(-1, out.shape[1], -1))
        if not decoding:
            self.prompt = self.seen  # equal by now: one tensor to hold
        return out

    def _attend(
        self, query: Tensor, keys_new: Tensor, values_new: Tensor, valid: Tensor | None, decoding: bool
    ) -> Tensor:
        batch, _, tokens, _ = keys_new.shape
        first = self.columns_seen == 0
        rank = torch.arange(tokens, device=query.device)
        rank = rank.expand(batch, -1) if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
        position = self.seen[:, None] + rank
        self.kv = self.kv.append(keys_new, values_new, valid, self.seen)
        came = torch.full_like(self.seen, tokens) if valid is None else valid.sum(1)
        self.seen, self.new = self.seen + came, came if self.new is None else self.new + came
        self.columns_seen += tokens
        if "sentence" in self._cache.needs:
            self.kv = self.kv.with_columns(sentence=self._cache.sentences(self.kv.position))

        selection = self._select(query, position, valid, decoding)
        new = Lent(keys_new, values_new, position, first, decoding)
        attended = self._output(query, new, valid, selection)
        self._collect(query, position, valid, selection, decoding, attended)
        if self.last_reader is None:
            self.settle(decoding)
        else:
            self.lent = new
        return attended.out

    def _output(self, query: Tensor, new: Lent, valid: Tensor | None, selection: Selection | None) -> Attended:
        """What `_attend_held` gives; a prompt of which nothing is gone needs no masks."""
        plain = selection is None and self.geometry["softcap"] is None and self.geometry["sinks"] is None
        if plain and "position" not in self.kv.columns and (new.first or query.shape[2] > _FEW):
            return _attend_whole(query, self.kv, valid, self.geometry["scaling"])
        return self._attend_held(query, new.position, valid, selection)

    def settle(self, decoding: bool) -> None:
        """Applies the policy right after a forward's attention, unless it waits for more than this layer."""
        self.lent = None
        if not self._cache.is_deferred and (decoding or not self._cache.waits):
            self.apply(self._cache.policy(self.kv, self.step(decoding)))

    def _attend_held(
        self, query: Tensor, position: Tensor, valid: Tensor | None, selection: Selection | None
    ) -> Attended:
        """Attention to everything held."""
        kv, options = self.kv, {**self.geometry, **_narrowed(selection)}
        shift = None
        if self._cache.policy.in_cache_positions:
            shift = self._cache.in_cache_shift(kv, self.seen)
        frequency = None if shift is None else self._frequency
        turn = None if shift is None or frequency is None else (shift, frequency)
        sums = "attention" in self._cache.needs
        if query.shape[2] <= _FEW:
            done = backend.attend(kv, query, position, sums=sums, valid=valid, turn=turn, **options)
            if done is not None:
                return Attended(*done)
        if query.shape[2] > _FEW or (kv.keys.body is None and kv.values.body is None):
            keys, values = kv.decode()
            if shift is not None and frequency is not None:
                keys = rotate(keys, shift, frequency)
            return Attended(attend(query, keys, values, position, kv.position, **options))

        def turned(query: Tensor, start: int, stop: int) -> Tensor:
            assert shift is not None and frequency is not None
            return query @ rotate(kv.keys.columns(start, stop), shift[..., start:stop], frequency).transpose(2, 3)

        scores, heads = kv.keys.scores if shift is None else turned, kv.keys.shape[1]
        out, weights = attend_tiles(query, scores, kv.values.mix, heads, tile_of(kv), position, kv.position, **options)
        if valid is not None:
            weights = weights.unflatten(2, (-1, query.shape[2])) * valid[:, None, None, :, None]
            weights = weights.flatten(2, 3)
        return Attended(out, weights.sum(2))

    def _select(self, query: Tensor, position: Tensor, valid: Tensor | None, decoding: bool) -> Selection | None:
        """What a selector of the stack lets this forward read; keeps note of it."""
        self.read = None
        selectors = [(i, p) for i, p in enumerate(self._cache.policy.policies) if isinstance(p, Selector)]
        if not selectors or self._cache.is_deferred:  # a deferred prompt is read exactly
            return None
        at, selector = selectors[0]
        step = replace(self.step(decoding), stack=self._cache.policy.policies, at=at)
        asked = position if valid is None else position.masked_fill(~valid, -1)
        selection = selector.choose(self.kv, query, asked, step)
        if selection is not None:
            heads = self.kv.keys.shape[1]
            allowed = selection.allowed
            if allowed.shape[1] == query.shape[1] != heads:  # heads of a group share what they read
                allowed = allowed.unflatten(1, (heads, -1)).any(2)
            recent = selection.recent if isinstance(selection.recent, int) else selection.recent.view(-1, 1, 1)
            near = self.kv.position >= self.seen[:, None, None] - recent
            read = ((allowed | near) & (self.kv.position >= 0)).expand(-1, heads, -1)
            slot, parts = torch.arange(read.shape[-1], device=read.device), []
            for held in (self.kv.keys, self.kv.values):
                first, end = (x[..., None] for x in held.packed)
                in_body = (slot >= first) & (slot < end)
                parts += [(read & in_body).sum((1, 2)), (read & ~in_body).sum((1, 2))]
            self.read = torch.stack(parts, 1)
        return selection

    def row_read_nbytes(self) -> Tensor:
        """[B] int64: bytes of keys, values and selection metadata that the last forward read of each row."""
        if self.read is None:
            return self.kv.keys.row_nbytes() + self.kv.values.row_nbytes()
        total = sum(x[0].numel() * x.element_size() for x in self.kv.side.values()) + torch.zeros_like(self.seen)
        for i, held in enumerate((self.kv.keys, self.kv.values)):
            in_body, in_tail = self.read[:, 2 * i], self.read[:, 2 * i + 1]
            total += in_tail * (held.tail.shape[-1] * held.tail.element_size())
            if held.body is not None:
                slots = held.body.counts.per_head.sum(1).clamp(min=1)
                total += in_body * held.body.row_nbytes() // slots
        return total

    def _empty(self, keys: Tensor, values: Tensor) -> KV:
        empty, none = Counts((keys.shape[0], keys.shape[1]), keys.device, 0), slice(0)
        columns = {}
        if "attention" in self._cache.needs:
            columns["attention"] = torch.zeros(keys.shape[0], keys.shape[1], 0, device=keys.device)
        return KV(Held(keys[:, :, none].clone(), empty), Held(values[:, :, none].clone(), empty), columns)

    def _collect(
        self,
        query: Tensor,
        position: Tensor,
        valid: Tensor | None,
        selection: Selection | None,
        decoding: bool,
        attended: Attended,
    ) -> None:
        needs = self._cache.needs
        if "attention" in needs:
            new = attended.sums
            if new is None:
                keys = self.kv.keys.dense()
                if self._cache.policy.in_cache_positions:
                    shift = self._cache.in_cache_shift(self.kv, self.seen)
                    keys = keys if shift is None else rotate(keys, shift, self._frequency)
                new = column_sums(
                    query, keys, position, self.kv.position, query_valid=valid, lse=attended.lse, **self.geometry,
                    **_narrowed(selection),
                )  # fmt: skip
            self.kv = self.kv.with_columns(attention=self.kv.columns["attention"] + new)
        if "moments" in needs and not decoding:
            self._add_moments(query, position, valid)
        if width := self._cache.query_width:
            if valid is None:
                query = query[:, :, -width:]
            valid_now = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool) if valid is None else valid
            if self.queries is not None and self.query_valid is not None:
                # An earlier part of the same prompt, or the window that is kept from step to step.
                query = torch.cat([self.queries, query], dim=2)
                valid_now = torch.cat([self.query_valid, valid_now], dim=1)
            last = valid_now.int().argsort(dim=1, stable=True)[:, -width:]  # pads first, wherever they stood
            self.queries = take_columns(query, last[:, None].expand(-1, query.shape[1], -1))
            self.query_valid = valid_now.gather(1, last)

    @property
    def _frequency(self) -> Tensor:
        """Inverse RoPE frequencies [R/2], on the device of this layer."""
        return self._cache.frequency(self.index).to(self.seen.device)

    def _add_moments(self, query: Tensor, position: Tensor, valid: Tensor | None) -> None:
        """Sums over the prompt's queries, turned back to before RoPE."""
        real = position >= self._cache.needs["moments"]
        real = (real if valid is None else real & valid)[:, None, :, None]
        turned = rotate(query.float(), -position[:, None], self._frequency) * real
        parts = real.sum(2)[:, 0, 0].float(), turned.sum(2), turned.transpose(-1, -2) @ turned
        self.moments = parts if self.moments is None else tuple(a + b for a, b in zip(self.moments, parts, strict=True))

    def step(self, decoding: bool, probe: Probe | None = None) -> Step:
        """What a policy is told about this layer."""
        moments = None
        if self.moments is not None:
            count, total, outer = self.moments
            count = count.clamp(min=1)[:, None, None]
            mean = total / count
            moments = Moments(mean, outer / count[..., None] - mean[..., :, None] * mean[..., None, :])
        return Step(
            layer=self.index, prompt=self.prompt, seen=self.seen, decoding=decoding,
            new=torch.zeros_like(self.seen) if self.new is None else self.new,
            order=self.order, layers=len(self._cache.policy_layers()),
            queries=self.queries, query_valid=self.query_valid, moments=moments,
            inverse_frequency=self._frequency if self._cache.turns else None, probe=probe,
            **self.geometry,
        )  # fmt: skip

    def apply(self, kv: KV) -> None:
        """Takes over what the policy made of this layer, and forgets the signals that are not needed any more."""
        self.kv = kv
        self.new = None
        if self._cache.records:
            return
        self.moments = None
        window = self._cache.needs.get("window", 0)
        if not window:
            self.queries = self.query_valid = None
        elif self.queries is not None and self.query_valid is not None and self.queries.shape[2] > window:
            self.queries, self.query_valid = self.queries[:, :, -window:].clone(), self.query_valid[:, -window:].clone()

    def copy(self, cache: CompressedCache) -> PolicyLayer:
        """A layer of `cache` with the same slots, sharing their memory until one of the two changes them."""
        other = PolicyLayer(self.index, self.order, cache)
        vars(other).update({k: v for k, v in vars(self).items() if k != "_cache"})
        if self.kv is not None:
            other.kv = KV(self.kv.keys.sealed(), self.kv.values.sealed(), self.kv.columns, self.kv.side)
        return other

    def fork(self, cache: CompressedCache) -> PolicyLayer:
        """The same for another policy: without what it does not ask for."""
        other = self.copy(cache)
        asked = cache.policy.needs
        columns = {k: v for k, v in self.kv.columns.items() if k == "position" or k in asked}
        keys, values = (held.sealed().to(self.seen.device) for held in (self.kv.keys, self.kv.values))
        other.kv = KV(keys, values, columns)
        if "sentence" in asked:
            other.kv = other.kv.with_columns(sentence=cache.sentences(other.kv.position))
        width = max(asked.get("queries", 0), asked.get("window", 0))
        if not width:
            other.queries = other.query_valid = None
        elif self.queries is not None and self.query_valid is not None:
            other.queries, other.query_valid = self.queries[:, :, -width:], self.query_valid[:, -width:]
        if "moments" not in asked:
            other.moments = None
        return other

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor kept alive, named."""
        if self.kv is not None:
            yield from self.kv.tensors()
            for held in (self.kv.keys, self.kv.values):
                parts = (held, held.body) if held.body is not None else (held,)
                counts = (held.tail_counts, held.sinks, *(part.counts for part in parts))
                yield from (("lengths", c.ragged) for c in counts if c is not None and c.ragged is not None)
        for name in ("seen", "prompt", "new", "queries", "query_valid", "read"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor
        yield from (("moments", tensor) for tensor in self.moments or ())

    # -- what transformers calls ---------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.columns_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Only the new tokens: which slots are visible follows from their stored positions."""
        if query_length == 0:
            raise ValueError("empty prompt: a forward needs at least one token")
        return query_length, self.columns_seen

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """See `CompressedCache.crop`."""
        if self.kv is None:
            return
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns_seen - tokens_to_remove)
        if removed == 0:
            return
        self.columns_seen = max(0, self.columns_seen - removed)
        self.seen = (self.seen - removed).clamp(min=0)
        self.prompt = torch.minimum(self.prompt, self.seen)
        position = self.kv.position
        kept = ((position >= 0) & (position < self.seen[:, None, None])).sum(-1)  # slots are in order: a prefix stays
        column = torch.arange(int(kept.max()), device=position.device)
        index = torch.where(column < kept[..., None], column, -1)
        untouched = "position" not in self.kv.columns
        kv = self.kv.gather(index)
        columns = {k: v for k, v in kv.columns.items() if k != "position"} if untouched else kv.columns
        self.kv = KV(kv.keys, kv.values, columns)
        self.read = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen is not None:
            self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.kv is None:
            return
        rows = indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices
        rows = rows.to(self.seen.device)
        self.kv = self.kv.select(rows)
        self.seen, self.prompt = self.seen[rows], self.prompt[rows]
        self.new = None if self.new is None else self.new[rows]
        if self.queries is not None and self.query_valid is not None:
            self.queries, self.query_valid = self.queries[rows], self.query_valid[rows]
        if self.moments is not None:
            count, total, outer = self.moments
            self.moments = count[rows], total[rows], outer[rows]
        self.read = None if self.read is None else self.read[rows]


class SharingLayer(PolicyLayer):
    """A layer that holds nothing: it attends, with its own queries, to what an earlier one, `source`, holds.

    The source waits with its policy until its last reader has attended. What policies see of the source's queries is
    its own alone.
    """

    def __init__(self, index: int, order: int, cache: CompressedCache, source: PolicyLayer):
        self.source = source
        source.last_reader = order  # layers are made in order
        super().__init__(index, order, cache)

    @property
    def kv(self) -> KV:  # type: ignore[override]
        return self.source.kv

    @property
    def seen(self) -> Tensor:  # type: ignore[override]
        return self.source.seen

    @property
    def prompt(self) -> Tensor:  # type: ignore[override]
        return self.source.prompt

    @property
    def new(self) -> Tensor | None:  # type: ignore[override]
        return self.source.new

    @property
    def columns_seen(self) -> int:  # type: ignore[override]
        return self.source.columns_seen

    def reset(self) -> None:
        self.queries = self.query_valid = self.moments = self.read = None
        self.geometry = {}
        self._pending = None
        self.is_initialized = False

    @_uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Leaves the layer's own keys and values alone and hands out the new ones of the source."""
        lent = self.source.lent
        assert lent is not None, "the source of a layer comes before it"
        if (lent.keys.shape, lent.values.shape, lent.keys.device) != (
            key_states.shape, value_states.shape, key_states.device,
        ):  # fmt: skip
            raise ValueError(
                f"{self._cache.policy}: layer {self.index} cannot read the keys and values of layer "
                f"{self.source.index}: the two differ in heads, head_dim or device; share others"
            )
        return super().update(lent.keys, lent.values)

    @_uncompiled
    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None, **geometry: Any) -> Tensor:
        self._pending = self._cache.pending_layer = None
        self._cache.check_module(module)
        valid = self._cache.real_tokens(self.index, mask, query.shape[2])
        lent, self.geometry = self.source.lent, geometry
        assert lent is not None
        out = self._output(query, lent, valid, self._select(query, lent.position, valid, lent.decoding)).out
        if self.order == self.source.last_reader:
            self.source.settle(lent.decoding)
        return out

    def copy(self, cache: CompressedCache) -> PolicyLayer:
        other = SharingLayer(self.index, self.order, cache, cache.layers[self.source.index])
        other.geometry, other.read, other.is_initialized = self.geometry, self.read, self.is_initialized
        return other

    fork = copy

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self.read is not None:
            yield "read", self.read

    def crop(self, tokens_to_remove: int) -> None:
        """The source has done it."""
        self.read = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """The source has done it."""
        if self.read is not None:
            self.read = self.read[indices.to(self.read.device)]


class CompressedCache(Cache):
    """A transformers cache that a policy compresses after every forward.

        cache = CompressedCache(model, H2O(budget=0.25, recent=32) | KIVI(bits=2))
        out = model.generate(**inputs, past_key_values=cache)
        print(cache.report())

    The model's attention implementation is set to "kvbench", which behaves as "sdpa" for every other cache.
    Sliding-window layers are left alone. Raises ValueError for models that cannot be hooked, saying why.

    Works with `torch.compile(model)` and `model.compile()`: the graph breaks at each layer where tokens come in and
    where it attends, since what is held changes its shape at every step. So `fullgraph=True` cannot work; nor can
    capturing a forward in a CUDA graph, as lengths are read on the host; nor mode="reduce-overhead", which replays the
    pieces between the breaks: the first prompt's keys are held without a copy, in memory that the next replay writes.

    tokenizer: only for policies that read text (`Repeat` with an instruction, sentences).
    needs: signals to collect besides what the policy itself needs, for a later `fork`; see `signals`.
    """

    layers: list[Any]  # PolicyLayer, or what transformers holds a sliding-window layer in

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        needs: Mapping[str, int] | None = None,
    ):
        policy = Full() if policy is None else policy
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a kvbench policy such as H2O(budget=0.25) | KIVI(bits=2), got {policy!r}")
        plan = _layer_plan(model)
        self.policy = Stack((policy,))
        for i, (_, layer) in enumerate(plan):
            if not layer.is_sliding:
                self.policy.check(_head_dim(model, i))
        self.needs = dict(self.policy.needs)
        for name, amount in (needs or {}).items():
            if name not in RECORDED:
                raise ValueError(f"needs: there is no signal {name!r} to collect; there are: {', '.join(RECORDED)}")
            self.needs[name] = max(amount, self.needs.get(name, 0))
        self.query_width = max(self.needs.get("queries", 0), self.needs.get("window", 0))
        self.records = bool(needs)
        self.waits = "probe" in self.policy.needs or "all_layers" in self.policy.needs
        if self.waits and self.policy.block is not None:
            raise ValueError(f"{self.policy}: block= cannot be had with a policy that needs the whole prompt first")
        if self.policy.sharing.policies and self.policy.block is not None:
            raise ValueError(
                f"{self.policy}: block= cannot be had with layers that share; feed the prompt in pieces instead "
                "(prefill_chunk_size= of generate)"
            )
        if "sentence" in self.policy.needs and tokenizer is None:
            raise ValueError(f"{self.policy} needs to know where sentences end: give CompressedCache a tokenizer=")
        self.model = model
        self.tokenizer = tokenizer
        self.is_deferred = False
        self.pending_layer: PolicyLayer | None = None
        self._mask: tuple[Tensor | None, Tensor | None] = (None, None)
        self._rotary: dict[str, Tensor] = {}
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        self.turns = self.policy.in_cache_positions or bool({"moments", "rope"} & set(self.needs))
        if self.turns:
            self._rotary = _rotary_frequencies(model, {t: i for i, (t, x) in enumerate(plan) if not x.is_sliding})
        self._layer_types = [t for t, _ in plan]
        compressed = [i for i, (_, layer) in enumerate(plan) if not layer.is_sliding]
        orders = {index: order for order, index in enumerate(compressed)}
        self.sources = dict(self.policy.sources(len(compressed)))
        layers: list[Any] = [x for _, x in plan]
        for i in compressed:
            if (source := self.sources.get(orders[i])) is None:
                layers[i] = PolicyLayer(i, orders[i], self)
            else:
                layers[i] = SharingLayer(i, orders[i], self, layers[compressed[source]])
        super().__init__(layers=layers)
        self._forget()
        self.notes = self.waits or bool({"tokens", "sentence"} & set(self.needs))
        if self.notes:
            if model.get_output_embeddings() is None:
                raise ValueError(
                    f"{self.policy} needs to see what the model says next, but {type(model).__name__} has no "
                    "language-model head"
                )
            _watch(model, self)

    def _forget(self) -> None:
        self.token_ids: list[Tensor] | None = None  # per row, the real tokens seen
        self.mask: Tensor | None = None  # [B, columns] int64, 1 = real: what was fed, pads included
        self.next_token: Tensor | None = None  # [B] what comes after the prompt: greedy, unless the caller knows better
        self._sentence_of = torch.zeros(0, 0, dtype=torch.int32)  # [B, tokens seen]
        self._unfinished = False

    # -- measuring -----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of every storage this cache keeps alive: codes, scales, zero points, windows, positions, scores."""
        return sum(part.nbytes for part in self.ledger())

    @property
    def full_nbytes(self) -> int:
        """What a 16-bit cache that keeps every token would hold now (pads not counted)."""
        return sum(full_nbytes(layer) for layer in self.layers)

    def row_nbytes(self) -> Tensor:
        """[B] int64: bytes each batch row would hold alone in the full-attention layers, without spare capacity."""
        self._check_filled()
        return _total(layer.kv.row_nbytes() for layer in self.holders())

    def row_read_nbytes(self) -> Tensor:
        """[B] int64: bytes of keys, values and selection metadata that the last forward read of each row."""
        self._check_filled()
        return _total(layer.row_read_nbytes() for layer in self.policy_layers())

    def ledger(self) -> list[Part]:
        """Every tensor kept alive, by layer and name."""
        return ledger(self)

    def kept(self, layer: int) -> Tensor:
        """Original positions of the kept slots of a layer: [batch, kv_heads, kept] int64, ascending, -1 after the last.

        Positions count a row's real tokens, so a padded row has the positions it would have alone.
        """
        held = self.layers[layer]
        if not isinstance(held, PolicyLayer):
            raise ValueError(f"layer {layer} is a sliding-window layer, which kvbench leaves alone")
        self._check_filled()
        batch, heads, _, _ = held.kv.keys.shape
        return held.kv.position.expand(batch, heads, -1).to(torch.int64)

    def _check_filled(self) -> None:
        if any(layer.kv is None for layer in self.policy_layers()):
            raise ValueError("the cache is empty: run a forward or generate first")

    def report(self) -> str:
        """A table: layer, tokens seen, slots kept, bits per element, bytes, ratio to the 16-bit full cache."""
        return report(self)

    # -- acting --------------------------------------------------------------------------------------------------

    @contextmanager
    def deferred(self) -> Iterator[CompressedCache]:
        """Forwards inside only append and collect; the policy runs once, at the end: an exact prefill in chunks."""
        self.is_deferred = True
        try:
            yield self
        finally:
            self.is_deferred = False
        self.compress()

    def compress(self) -> None:
        """Applies the policy to every layer now."""
        layers = self.holders()
        if any(layer.kv is None for layer in layers):
            return
        spec = self.policy.needs.get("probe")
        probes: Sequence[Probe | None] = [None] * len(self.policy_layers())
        if isinstance(spec, Repeat):
            from kvbench.probes import run_repeat

            columns = run_repeat(self, spec, self.tokenizer)
            for layer in layers:
                layer.kv = layer.kv.with_columns(repeat=columns[layer.order])
        elif spec is not None:
            from kvbench.probes import run_probe

            probes = run_probe(self, spec, self.tokenizer)
        steps = [layer.step(False, probes[layer.order]) for layer in layers]
        for layer, kv in zip(layers, self.policy.over_layers([x.kv for x in layers], steps), strict=True):
            layer.apply(kv)

    def fork(self, policy: Policy, *, needs: Mapping[str, int] | None = None) -> CompressedCache:
        """A new cache with the same tokens, compressed by `policy`; this one stays as it is.

        What the new policy needs must have been collected (`needs` of the constructor); the fork goes on collecting
        its own `needs` from here. Layers share in the fork as they do here, whether `policy` says so again or not.
        """
        self._check_filled()
        other = CompressedCache(self.model, policy, tokenizer=self.tokenizer, needs=needs)
        missing = [k for k, v in signals([policy]).items() if self.needs.get(k, 0) < v]
        if missing:
            raise ValueError(
                f"cannot fork to {policy}: this cache did not collect {missing}; pass needs= when it is made"
            )
        if other.sources and other.sources != self.sources:
            raise ValueError(
                f"cannot fork to {policy}: its layers share from the first token on, which those of this cache do not; "
                "make a CompressedCache(model, policy)"
            )
        self._note_into(other)
        if "sentence" in other.needs:
            other._number_sentences()
        for i, layer in enumerate(self.layers):
            if isinstance(layer, PolicyLayer):
                other.layers[i] = forked = layer.fork(other)
                # One after the other, so that what was moved away comes back layer by layer.
                if not other.waits and not isinstance(forked, SharingLayer):
                    forked.apply(other.policy(forked.kv, forked.step(False)))
        if other.waits:
            other.compress()
        return other

    def copy(self) -> CompressedCache:
        """The same cache once more, as it is; the two share memory until one of them changes it."""
        needs = self.needs if self.records else None
        other = CompressedCache(self.model, self.policy, tokenizer=self.tokenizer, needs=needs)
        self._note_into(other)
        other._sentence_of = self._sentence_of
        for i, layer in enumerate(self.layers):
            if isinstance(layer, PolicyLayer):
                other.layers[i] = layer.copy(other)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        return self.copy()  # of the cache, not of the model it knows

    def _note_into(self, other: CompressedCache) -> None:
        """What a cache of the same tokens shares with this one, besides the layers that a policy compresses."""
        other.sources = self.sources
        other.token_ids, other.mask, other.next_token = self.token_ids, self.mask, self.next_token
        for mine, its in zip(self.layers, other.layers, strict=True):
            if not isinstance(mine, PolicyLayer):
                vars(its).update(vars(mine))  # sliding layers replace their tensors, never write into them

    def move(self, device: str) -> None:
        """Moves the full-precision keys and values elsewhere, to be forked later: forks are where this cache was."""
        for layer in self.holders():
            layer.kv = KV(layer.kv.keys.to(device), layer.kv.values.to(device), layer.kv.columns, layer.kv.side)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What is kept alive besides the layers: what was fed, for policies that read tokens."""
        yield from (("token_ids", ids) for ids in self.token_ids or ())
        for name in ("mask", "next_token", "_sentence_of"):
            if (tensor := getattr(self, name)) is not None:
                yield name.strip("_"), tensor

    def policy_layers(self) -> list[PolicyLayer]:
        return [layer for layer in self.layers if isinstance(layer, PolicyLayer)]

    def holders(self) -> list[PolicyLayer]:
        """Those of the policy layers that hold slots of their own: all but the ones that share."""
        return [layer for layer in self.policy_layers() if not isinstance(layer, SharingLayer)]

    # -- what transformers calls for all layers ------------------------------------------------------------------

    def reset(self) -> None:
        super().reset()
        self._forget()

    def crop(self, max_length: int) -> None:
        """Forgets the newest tokens: -n removes n; n > 0 (older transformers) keeps n.

        Raises ValueError where that cannot be undone: what was evicted for these tokens, or their part in what was
        collected, does not come back. So assisted decoding and prompt lookup work with quantizers and selectors only.
        """
        length = self.get_seq_length()
        removed = min(length, -max_length) if max_length <= 0 else max(0, length - max_length)
        collects = {"attention", "queries", "window", "moments"} & set(self.needs)
        if removed and (collects or any(isinstance(p, Evictor) for p in self.policy.policies)):
            raise ValueError(
                f"{self.policy}: tokens cannot be taken back (crop, assisted decoding, prompt lookup), as what was "
                "evicted or collected for them stays so; keep a copy() of the cache from before them"
            )
        super().crop(max_length)
        if self.token_ids is not None and self.mask is not None:
            seen = self.policy_layers()[0]
            self.token_ids = [ids[:n] for ids, n in zip(self.token_ids, seen.seen.tolist(), strict=True)]
            self.mask = self.mask[:, : seen.columns_seen]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.mask is not None:
            self._take_rows(torch.arange(len(self.mask)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take_rows(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def _take_rows(self, rows: Tensor) -> None:
        if self.token_ids is None or self.mask is None:
            return
        self.token_ids = [self.token_ids[i] for i in rows.tolist()]
        self.mask = self.mask[rows.to(self.mask.device)]
        if "sentence" in self.policy.needs:
            self._sentence_of = self._sentence_of[rows.to(self._sentence_of.device)]

    # -- what the hooks on the model call ------------------------------------------------------------------------

    def before_forward(self, ids: Tensor | None, attention_mask: Tensor | None) -> None:
        """Notes the ids [B, T] that are about to be fed; attention_mask [B, columns]."""
        if ids is None:
            raise ValueError(f"{self.policy} needs to see token ids: call the model with input_ids, not inputs_embeds")
        batch, tokens = ids.shape
        if self.token_ids is None or self.mask is None:
            self.token_ids = [ids.new_empty(0)] * batch
            self.mask = ids.new_empty((batch, 0))
        new = torch.ones_like(ids)
        if attention_mask is not None and attention_mask.dim() == 2:
            new = attention_mask[:, self.mask.shape[1] : self.mask.shape[1] + tokens].to(ids.dtype)
        self.mask = torch.cat([self.mask, new], dim=1)
        self.token_ids = [
            torch.cat([old, row[real.bool()]]) for old, row, real in zip(self.token_ids, ids, new, strict=True)
        ]
        if "sentence" in self.policy.needs:
            self._number_sentences()
        self._unfinished = True

    def after_forward(self, logits: Tensor) -> None:
        """Applies a policy that waits for the whole model; logits [B, T or fewer, V]."""
        self._unfinished = False
        if self.mask is not None and logits.shape[0] == len(self.mask):
            self.next_token = logits[:, -1].argmax(-1)
        layer = self.policy_layers()[0]
        prompted = bool((layer.prompt == layer.seen).all())  # else: one token was decoded, and compressed on the way
        if self.waits and prompted and not self.is_deferred:
            with torch.autocast(logits.device.type, enabled=False):
                self.compress()

    def _number_sentences(self) -> None:
        assert self.token_ids is not None and self.tokenizer is not None
        ends = _sentence_ends(self.tokenizer).to(self.model.device)
        longest = max(map(len, self.token_ids))
        numbers = torch.zeros(len(self.token_ids), longest, dtype=torch.int32, device=self.model.device)
        for row, ids in enumerate(self.token_ids):
            ended = ends[ids].int()
            numbers[row, : len(ids)] = ended.cumsum(0) - ended  # a stop still belongs to the sentence it ends
        self._sentence_of = numbers

    def sentences(self, position: Tensor) -> Tensor:
        """position [B, H or 1, S] -> the number of the sentence each token stands in, [B, H or 1, S] int32."""
        table = self._sentence_of.to(position.device)[:, None].expand(-1, position.shape[1], -1)
        return table.gather(2, position.long().clamp(min=0))

    # -- what the layers ask -------------------------------------------------------------------------------------

    def frequency(self, layer: int) -> Tensor:
        """Inverse RoPE frequencies [R/2] of a layer."""
        return self._rotary[self._layer_types[layer]]

    def check_consumed(self) -> None:
        """The tokens of the previous layer must have gone through our attention function, and our hooks have run."""
        if self.notes and not self._unfinished:
            raise ValueError(f"{self.policy} needs the model itself to be called, not a part of it such as model.model")
        if self.pending_layer is not None:
            self.pending_layer = None
            raise ValueError(
                f"this cache was made for another model, or the attention implementation of the model was changed from "
                f"{NAME!r} after it was made: make a CompressedCache(model, policy) for this model"
            )

    def check_module(self, module: nn.Module) -> None:
        if not hasattr(self, "_modules_of_model"):
            self._modules_of_model = {id(m) for m in self.model.modules()}
        if id(module) not in self._modules_of_model:
            raise ValueError(
                "this cache was made for another model: make a CompressedCache(model, policy) for this one"
            )

    def real_tokens(self, layer: int, mask: Tensor | None, tokens: int) -> Tensor | None:
        """[B, T] bool: which new tokens are real; None if all are. All layers share one mask, so it is read once."""
        if mask is None:
            return None
        if self._mask[0] is not mask:
            visible = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
            valid = visible[:, -1, -tokens:]
            if bool((valid.any(1) & ~valid[:, -1]).any()):
                raise ValueError('batches must be left-padded: set tokenizer.padding_side = "left"')
            if mask.shape[2] > 1 and not self._is_causal(visible, valid):
                raise ValueError(
                    "a kvbench cache attends causally, but this attention mask (4D, packed sequences, image tokens "
                    "that see each other) says otherwise: give a 2D attention_mask of left-padded rows"
                )
            self._mask = (mask, None if bool(valid.all()) else valid)
        real = self._mask[1]
        if layer == self.policy_layers()[-1].index:
            self._mask = (None, None)  # not kept alive between forwards
        return real

    def _is_causal(self, visible: Tensor, valid: Tensor) -> bool:
        """Whether visible [B, T, columns] is a causal mask over new tokens, of which valid [B, T] are real."""
        tokens = valid.shape[1]
        past, new = visible[..., :-tokens], visible[..., -tokens:]
        wanted = valid[:, None] & torch.ones(tokens, tokens, dtype=torch.bool, device=valid.device).tril()
        right = (new == wanted).all(-1)
        if past.shape[-1]:  # all that was seen, if columns of earlier tokens are there at all
            seen = self.policy_layers()[0].seen
            right &= past.sum(-1) == (0 if seen is None else seen[:, None])
        blank = (visible == visible[..., :1]).all(-1)  # a pad's query sees nothing, or (to avoid nan) everything
        return bool(torch.where(valid, right, blank).all())

    def in_cache_shift(self, kv: KV, seen: Tensor) -> Tensor | None:
        """By how many positions to turn keys so that they are consecutive and end at the newest token: [B, H, S]."""
        position = kv.position.long()
        length = kv.counts.per_head[:, : position.shape[1], None]
        slot = torch.arange(position.shape[-1], device=position.device)
        shift = (seen[:, None, None] - length + slot - position).masked_fill(position < 0, 0)
        return shift if bool(shift.any()) else None


def _total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of tensors of one shape, on the CPU: each device is waited for once."""
    sums: dict[torch.device, Tensor] = {}
    for part in parts:
        sums[part.device] = sums[part.device] + part if part.device in sums else part
    return torch.stack([x.cpu() for x in sums.values()]).sum(0)


def tile_of(kv: KV) -> int:
    """How many slots of every list are read at a time."""
    # Lists of different lengths are gathered row by row unless they are decoded whole: only large ones are cut.
    elements = torch.get_num_threads() * (_TILE if kv.counts.even is not None else 4 * _TILE)
    return max(elements // (kv.counts.shape[0] * kv.counts.shape[1] * kv.keys.shape[3]), 1)


def _columns(valid: Tensor | None, part: slice) -> Tensor | None:
    return None if valid is None else valid[:, part]


def _narrowed(selection: Selection | None) -> dict[str, Any]:
    """The arguments by which the attention kernels narrow what is visible."""
    return {} if selection is None else {"allowed": selection.allowed, "recent": selection.recent}


def _attend_whole(query: Tensor, kv: KV, valid: Tensor | None, scaling: float) -> Attended:
    """Causal attention of the newest tokens to all that came before. Rows of different lengths run alone, without pads:
    no mask, no T x T matrix."""
    keys, values = kv.decode()
    if valid is None and kv.counts.even is not None:
        out, lse = attend_causal(query, keys, values, scaling=scaling)
        return Attended(out, lse=lse)
    out, whole = torch.zeros_like(query), True
    level = query.new_zeros(query.shape[:3], dtype=torch.float32)
    for row, slots in enumerate(kv.counts.per_head[:, 0].tolist()):
        real = torch.arange(query.shape[2], device=query.device)
        real = real if valid is None else real[valid[row]]
        if len(real):
            held = slice(row, row + 1), slice(None), slice(slots)
            found, lse = attend_causal(query[row : row + 1, :, real], keys[held], values[held], scaling=scaling)
            out[row, :, real] = found[0]
            if whole := lse is not None:
                level[row, :, real] = lse[0].to(level.dtype)
    return Attended(out, lse=level if whole else None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls: [B, Hq, T, D] in, [B, T, Hq, D] out."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: PolicyLayer | None = getattr(key, _TAG, None)
    if layer is not None:
        query = _under_autocast(query)
        with torch.autocast(query.device.type, enabled=False):  # what follows chooses its own number formats
            out = layer.attend(module, query, attention_mask, scaling=scaling, softcap=softcap, sinks=s_aux)
        return out.transpose(1, 2).contiguous(), None
    # Any other cache, no cache, or a layer left alone.
    if attention_mask is not None and attention_mask.shape[-2] < query.shape[-2]:
        causal = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        attention_mask = attention_mask & causal
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return _attend_masked(query, key, value, attention_mask, scaling, softcap, s_aux), None


def _under_autocast(x: Tensor) -> Tensor:
    """`x` as attention would get it."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Sliding-window layers of models with softcap or learned sinks, which the fused kernel does not know."""
    tokens, slots = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(tokens, slots, dtype=torch.bool, device=query.device).tril(slots - tokens)
    groups = query.shape[1] // key.shape[1]
    logits = query.float() @ key.repeat_interleave(groups, 1).float().transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(query.shape[0], -1, tokens, 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(-1)[..., :slots].to(value.dtype)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous()


@_uncompiled
def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """A causal mask over the new tokens alone shrinks to their padding, [B, 1, 1, T]; any other is what sdpa gets."""
    plain = mask_function is causal_mask_function and local_size is None and not kwargs.get("use_vmap", False)
    if not plain or q_length != kv_length:
        return sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, **kwargs,
        )  # fmt: skip
    if attention_mask is None:
        return None
    new = attention_mask[:, kv_offset : kv_offset + kv_length]
    if new.shape[1] < kv_length:  # transformers treats what the mask does not cover as pads
        new = torch.nn.functional.pad(new, (0, kv_length - new.shape[1]))
    return None if bool(new.all()) else new[:, None, None].bool()


def signals(policies: Sequence[Policy]) -> dict[str, int]:
    """What an exact prefill must collect, so that it can be forked to each of these policies."""
    collected: dict[str, int] = {}
    for policy in policies:
        for name, amount in policy.needs.items():
            if name in ("probe", "sentence"):  # made by the fork itself, from the token ids
                name, amount = "tokens", 1
            elif name == "window":
                name = "queries"
            elif name in ("all_layers", "rope"):
                continue
            collected[name] = max(amount, collected.get(name, 0))
    return collected


def _watch(model: PreTrainedModel, cache: CompressedCache) -> None:
    """Tells `cache` of the forwards that feed it, as long as it lives."""
    watched = weakref.ref(cache)

    names = list(inspect.signature(model.forward).parameters)

    def given(args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(names, args, strict=False)) | kwargs

    # A cache may die while PyTorch goes through the hooks of a forward, which then calls these once more, but has
    # forgotten that they take keyword arguments: hence the defaults.

    @_uncompiled
    def before(module: nn.Module, args: tuple, kwargs: Any = None) -> None:
        if (fed := watched()) is None:
            return
        arguments = given(args, kwargs)
        if id(fed) == id(arguments.get("past_key_values")):
            fed.before_forward(arguments.get("input_ids"), arguments.get("attention_mask"))

    @_uncompiled
    def after(module: nn.Module, args: tuple, kwargs: Any, output: Any = None) -> None:
        if (fed := watched()) is None or id(fed) != id(given(args, kwargs).get("past_key_values")):
            return
        if not hasattr(output, "logits"):
            raise ValueError(f"{fed.policy} needs to see the logits: leave return_dict=False out")
        fed.after_forward(output.logits)

    for handle in (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ):
        weakref.finalize(cache, handle.remove)


@lru_cache(maxsize=4)
def _sentence_ends(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[vocabulary] bool: tokens that end a sentence."""
    texts = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([any(mark in (text or "") for mark in ".!?\n\u010a\u3002\uff01\uff1f") for text in texts])


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _layer_plan(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """(layer type, what transformers would hold it in) per layer; raises for what cannot be hooked."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; kvbench hooks decoder-only models")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"{name} uses multi-head latent attention: its cache holds latents, not keys and values per head"
        )
    if not getattr(model, "_supports_attention_backend", False) or not hasattr(config, "num_attention_heads"):
        raise ValueError(
            f"{name} does not call transformers' attention interface (state-space, linear or custom attention), "
            "so there is nothing to hook"
        )
    layers: list[Any] = DynamicCache(config=config).layers
    for i, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"{name}: layer {i} is cached by {type(layer).__name__}; only attention layers with keys and values of "
                "their own can be hooked"
            )
    if all(layer.is_sliding for layer in layers):
        raise ValueError(
            f"{name}: every layer is sliding-window attention, already bounded; there is nothing to compress"
        )
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    return list(zip(types, layers, strict=True))


def _head_dim(model: PreTrainedModel, layer: int) -> int:
    config = model.config.get_text_config(decoder=True).per_layer_config[layer]
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary_frequencies(model: PreTrainedModel, layers: Mapping[str, int]) -> dict[str, Tensor]:
    """Inverse RoPE frequencies [R/2] per layer type, of which `layers` names one; proven on the model's own code."""
    rotary: Any = next(
        (m for m in model.modules() if hasattr(m, "inv_freq") or hasattr(m, "full_attention_inv_freq")), None
    )
    apply = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None) if rotary is not None else None
    if rotary is None or apply is None:
        raise ValueError(f'{type(model).__name__} has no RoPE that kvbench can turn; use positions="original"')
    pairs = "k" in inspect.signature(apply).parameters  # most models turn queries and keys in one call
    found = {}
    for layer_type, layer in layers.items():
        frequency = getattr(rotary, f"{layer_type}_inv_freq", None)
        frequency = (rotary.inv_freq if frequency is None else frequency).float()
        extra = {"layer_type": layer_type} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
        probe = torch.randn(1, 1, 1, _head_dim(model, layer), device=frequency.device)
        turned = []
        for position in (3, 20):
            cos, sin = rotary(probe, torch.tensor([[position]], device=frequency.device), **extra)
            try:
                turned.append(apply(probe, probe, cos, sin)[0] if pairs else apply(probe, cos, sin))
            except (RuntimeError, TypeError):  # it gets a part of the head only, or is called otherwise
                break
        shift = torch.full((1, 1, 1), 17, device=frequency.device)
        if len(turned) < 2 or not torch.allclose(rotate(turned[0], shift, frequency), turned[1], atol=1e-4):
            raise ValueError(
                f'the RoPE of {type(model).__name__} cannot be turned after the fact; use positions="original"'
            )
        found[layer_type] = frequency
    return found
