"""The policy interface: a policy is one pure call, `KV -> KV`; a stack is a fold of policies and itself a policy.

Policies see tensors only, never models, modules or caches, so they can be tested with `torch.randn` and used from any
codebase. What a policy must see it declares (`needs`); whoever hosts it supplies that and owns all mutation.

Letters in shapes: B batch, H key-value heads, Hq query heads (G = Hq / H per key-value head; query head h reads
key-value head h // G), T new tokens, S slots, K kept slots, D head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import lru_cache, reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvbench.kernels import bounds
from kvbench.kernels.attention import probabilities
from kvbench.kernels.scores import column_sums
from kvbench.policies.store import Codec, Counts, Held, append_columns, take_all_columns


class BudgetError(ValueError):
    """A byte budget that no number of tokens can meet."""


@dataclass(frozen=True)
class KV:
    """Everything one layer remembers: keys, values, and columns, facts that ride with their slots.

    columns: name -> [B, H or 1, S]. "position" (int32, -1 = dead column) is left out as long as slot s holds token s,
    so an untouched cache pays nothing for it; read it through `position`. "attention" (float32) is the accumulated
    attention each slot received. Policies keep columns of their own, [B, H or 1, S] or [B, H or 1, S, X]; new slots
    start at zero.
    side: name -> [B, ...], facts that do not ride with single slots (bounds of pages, say). Evicting drops them, as it
    moves the slots they are about; their policy makes them anew.
    """

    keys: Held
    values: Held
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    side: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> KV:
        """keys, values [B, H, S, D]; slot s holds token s. Raises ValueError for other shapes."""
        _check_shapes(keys, values)
        return cls(Held.dense_from(keys), Held.dense_from(values))

    @property
    def counts(self) -> Counts:
        return self.keys.counts

    @property
    def position(self) -> Tensor:
        """Original position of each slot's token in its own row, pads not counted: [B, H or 1, S] int32, -1 = dead."""
        if "position" in self.columns:
            return self.columns["position"]
        column = torch.arange(self.counts.width, dtype=torch.int32, device=self.keys.tail.device)
        if self.counts.even is not None:
            return column.expand(self.counts.shape[0], 1, -1)
        counts = self.counts.first_head().per_head  # nothing evicted: all heads hold the same tokens
        return torch.where(column < counts[..., None], column, -1)

    @property
    def from_newest(self) -> Tensor:
        """Rank of each slot counted from the newest, which is 1: [B, H or 1, S] int64; 0 = dead."""
        live = self.position >= 0
        return live.flip(-1).cumsum(-1).flip(-1) * live

    def column(self, name: str) -> Tensor:
        if name not in self.columns:
            raise KeyError(
                f"this policy needs the column {name!r}, which its host did not supply; got {sorted(self.columns)}"
            )
        return self.columns[name]

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None = None, seen: Tensor | None = None) -> KV:
        """New tokens, keys and values [B, H, T, D]; valid [B, T] marks real ones; seen [B] real tokens seen before."""
        columns = dict(self.columns)
        batch, _, tokens, _ = keys.shape
        rank = torch.arange(tokens, device=keys.device).expand(batch, -1) if valid is None else valid.cumsum(1) - 1
        for name, old in columns.items():
            if name == "position":
                assert seen is not None, "a cache that has evicted must be told how many tokens it has seen"
                new = (seen[:, None] + rank)[:, None].to(old.dtype)
            else:
                new = old.new_zeros((batch, 1, tokens, *old.shape[3:]))
            counts = self.counts if old.shape[1] > 1 else self.counts.first_head()
            new = new.expand(-1, old.shape[1], *new.shape[2:])
            padded, grown = append_columns(old, counts, new, valid, spare=False)
            if name == "position" and grown.even is None:
                padded = torch.where(grown.live(), padded, -1)
            columns[name] = padded
        return KV(self.keys.append(keys, valid), self.values.append(values, valid), columns, self.side)

    def gather(self, indices: Tensor, counts: Counts | None = None) -> KV:
        """Keeps the slots `indices` [B, H or 1, K], ascending, -1 padded at the end: the only way to drop slots."""
        batch, heads, width, _ = self.keys.shape
        if indices.dim() != 3 or indices.shape[0] != batch or indices.shape[1] not in (1, heads):
            raise ValueError(f"indices must be [batch={batch}, kv_heads={heads} or 1, kept], got {list(indices.shape)}")
        if counts is None:
            if indices.numel() and int(indices.max()) >= width:
                raise ValueError(f"indices go up to {int(indices.max())}, but there are only {width} slots")
            counts = Counts.of((indices >= 0).sum(-1).expand(batch, heads).contiguous())
        columns = {**self.columns, "position": self.position}
        for lists in {max(column.shape[1], indices.shape[1]) for column in columns.values()}:
            some = {k: x for k, x in columns.items() if max(x.shape[1], indices.shape[1]) == lists}
            wide = [x.expand(-1, lists, *x.shape[2:]) for x in some.values()]
            columns |= zip(some, take_all_columns(wide, indices.expand(-1, lists, -1)), strict=True)
        columns["position"] = torch.where(indices >= 0, columns["position"], -1)
        return KV(self.keys.gather(indices, counts), self.values.gather(indices, counts), columns)

    def select(self, batch: Tensor) -> KV:
        """Rows of the batch, in the given order, with repetition (beam search)."""
        keys = self.keys.select(batch)
        columns = {name: column[batch, :, : keys.counts.width] for name, column in self.columns.items()}
        return KV(keys, self.values.select(batch), columns, {name: x[batch] for name, x in self.side.items()})

    def with_columns(self, **columns: Tensor) -> KV:
        """The same slots with these columns added or replaced."""
        return KV(self.keys, self.values, {**self.columns, **columns}, self.side)

    def flattened(self) -> KV:
        """The same slots with no memory for dead ones: for heads (or rows) that keep very different numbers."""
        return KV(self.keys.flattened(), self.values.flattened(), self.columns, self.side)

    def decode(self) -> tuple[Tensor, Tensor]:
        """Keys and values as attention reads them: two tensors [B, H, S, D]."""
        return self.keys.dense(), self.values.dense()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor kept alive, named: what the byte ledger adds up."""
        for side, held in (("keys", self.keys), ("values", self.values)):
            for name, tensor in held.tensors():
                yield f"{side}.{name}", tensor
        yield from self.columns.items()
        yield from self.side.items()

    @property
    def nbytes(self) -> int:
        """Bytes of every storage held: codes, scales, zero points, windows, positions, scores, spare capacity."""
        return sum(t.untyped_storage().nbytes() for _, t in self.tensors())

    def row_nbytes(self) -> Tensor:
        """[B] int64: what each batch row would hold alone: `nbytes` less spare capacity and dead columns."""
        total = self.keys.row_nbytes() + self.values.row_nbytes()
        total = total + sum(x[0].numel() * x.element_size() for x in self.side.values())
        slots = self.counts.per_head
        for name, column in self.columns.items():
            lists = slots if column.shape[1] > 1 or slots.shape[1] == 1 else slots[:, :1]
            held = lists.sum(1) * (column[0, 0, :1].numel() * column.element_size())
            if name == "position":  # a row that has lost nothing would not hold any, alone
                slot = torch.arange(column.shape[-1], device=column.device)
                held = held * ((column != slot) & (column >= 0)).flatten(1).any(1)
            total = total + held
        return total


def _check_shapes(keys: Tensor, values: Tensor) -> None:
    if keys.shape[:3] != values.shape[:3] or keys.dim() != 4 or values.dim() != 4:
        raise ValueError(
            f"keys and values must be [batch, kv_heads, tokens, head_dim], "
            f"got {list(keys.shape)} and {list(values.shape)}"
        )


@dataclass(frozen=True)
class Probe:
    """Queries of tokens that never join the cache: a draft of the answer, or learned soft tokens, after the prompt.

    queries [B, Hq, n, D] and keys [B, H, n, D], both after RoPE; position [B, n] int64; valid [B, n] bool.
    """

    queries: Tensor
    keys: Tensor
    position: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Moments:
    """Mean [B, Hq, D] and covariance [B, Hq, D, D] (float32) of a prompt's queries before RoPE."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Draft:
    """needs["probe"]: queries of up to `tokens` greedily drafted tokens of the answer.

    by: who drafts: a policy (the model itself on its cache compressed so), "ngram" (what followed the last occurrence
    of the prompt's newest tokens), or the path of a smaller model with the same tokenizer.
    verify: take the queries from a forward of the draft over the full cache, not from the drafting itself.
    """

    tokens: int
    by: Policy | str
    verify: bool = False


@dataclass(frozen=True)
class SoftTokens:
    """needs["probe"]: queries of learned tokens, with adapters that are on for them alone; path: a trained folder."""

    path: str


@dataclass(frozen=True)
class Repeat:
    """needs["probe"]: the model reads its context again, `chunk` tokens at a time, each after `instruction`.

    Gives the column "repeat" [B, H, S]: the most attention that any of these queries paid to a slot.
    """

    chunk: int
    instruction: str


@dataclass(frozen=True)
class Step:
    """What just happened to one layer; read-only.

    prompt: [B] int64 real tokens up to the end of the last multi-token forward: what a budget share refers to.
    seen: [B] int64 real tokens seen. decoding: this forward brought one token after a prompt.
    new: [B] int64 real tokens since the policy last ran (None: all that were seen).
    order, layers: this is number `order` of the `layers` layers that the policy compresses (`layer`: of all layers).
    queries: [B, Hq, w, D] the last w queries after RoPE (None unless `needs["queries"]` or `needs["window"]`), of which
    `query_valid` [B, w] are real. scaling (None: head_dim ** -0.5; read it through `scale`), softcap, sinks [Hq]: the
    layer's attention, so that scores use the model's own. moments, probe: see `Policy.needs`. inverse_frequency [R/2]:
    of the RoPE, which turns the first R dims in halves (supplied with moments, and for `needs["rope"]`). stack: the
    stack being applied; at: which policy of it.
    """

    layer: int
    prompt: Tensor
    seen: Tensor
    decoding: bool = False
    new: Tensor | None = None
    order: int = 0
    layers: int = 1
    queries: Tensor | None = None
    query_valid: Tensor | None = None
    scaling: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    moments: Moments | None = None
    inverse_frequency: Tensor | None = None
    probe: Probe | None = None
    stack: tuple[Policy, ...] = ()
    at: int = 0

    @property
    def quantizer(self) -> Quantizer | None:
        """The quantizer that follows in the stack."""
        return next((p for p in self.stack[self.at + 1 :] if isinstance(p, Quantizer)), None)

    @property
    def holders(self) -> list[int]:
        """Numbers (`order`) of the layers that hold slots of their own; see `Policy.sources`."""
        shared = Stack(self.stack).sources(self.layers)
        return [order for order in range(self.layers) if order not in shared]

    def scale(self, kv: KV) -> float:
        """By what the layer multiplies the products of queries and keys."""
        return kv.keys.shape[-1] ** -0.5 if self.scaling is None else self.scaling

    def is_new(self, kv: KV) -> Tensor:
        """[B, H or 1, S] bool: slots whose tokens came since the policy last ran."""
        new = self.seen if self.new is None else self.new
        return kv.position >= (self.seen - new)[:, None, None]

    def last_queries(self, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The last `width` queries (None: all there are): [B, Hq, w, D], position [B, w], which are real [B, w].

        Another policy of the stack may have asked for more.
        """
        if self.queries is None:
            raise ValueError('this policy needs the last queries, which its host did not supply (needs["queries"])')
        there = self.queries.shape[2]
        width = there if width is None else min(width, there)
        position = self.seen[:, None] - width + torch.arange(width, device=self.seen.device)
        valid = torch.ones_like(position, dtype=torch.bool)
        if self.query_valid is not None:
            valid = self.query_valid[:, there - width :]
        return self.queries[:, :, there - width :], position, valid

    def attention(self, kv: KV, width: int | None = None) -> Tensor:
        """Attention of `last_queries` over all slots: [B, Hq, w, S] float32, zero for queries that are pads."""
        return self.attention_of(kv, *self.last_queries(width))

    def attention_of(self, kv: KV, queries: Tensor, position: Tensor, valid: Tensor | None = None) -> Tensor:
        """As `attention`, of any queries [B, Hq, w, D] at position [B, w], of which valid [B, w] are real."""
        weights = probabilities(
            queries, kv.keys.dense(), position, kv.position,
            scaling=self.scale(kv), softcap=self.softcap, sinks=self.sinks,
        )  # fmt: skip
        return weights if valid is None else weights * valid[:, None, :, None]

    def votes_of(self, kv: KV, queries: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        """`attention_of` summed over queries, and the mean of a group's heads: [B, H, S] float32. Keeps no rows."""
        sums = column_sums(
            queries, kv.keys.dense(), position, kv.position, query_valid=valid,
            scaling=self.scale(kv), softcap=self.softcap, sinks=self.sinks,
        )  # fmt: skip
        return sums / (queries.shape[1] // sums.shape[1])

    def probe_attention(self, kv: KV) -> Tensor:
        """Attention of the probe's queries over all slots: [B, Hq, n, S] float32, zero for those that are not valid.

        The softmax also runs over the probe's own tokens up to each query, whose share is not returned.
        """
        if self.probe is None:
            raise ValueError('this policy needs a probe of the answer, which its host did not supply (needs["probe"])')
        probe, heads = self.probe, kv.keys.shape[1]
        own = torch.where(probe.valid, probe.position, -1)[:, None].expand(-1, heads, -1)
        weights = probabilities(
            probe.queries, torch.cat([kv.keys.dense(), probe.keys], 2), probe.position,
            torch.cat([kv.position.expand(-1, heads, -1), own], 2),
            scaling=self.scale(kv), softcap=self.softcap, sinks=self.sinks,
        )  # fmt: skip
        return weights[..., : kv.counts.width] * probe.valid[:, None, :, None]


SIGNALS = ("attention", "queries", "window", "moments", "rope", "probe", "sentence", "all_layers")
"""What a policy may need; see `Policy.needs`."""


class Policy(ABC):
    """One pure call `KV -> KV`. Subclasses are frozen dataclasses: compared, hashed, printed and swept."""

    shares: ClassVar[bool] = False
    """Whether `sources` may name layers, so that not even a prompt is read as without this policy."""

    @property
    def needs(self) -> Mapping[str, Any]:
        """What the host must supply.

        "attention": 1: the column "attention", accumulated column sums. "queries": w: the last w queries of the last
        forward. "window": w: the last w queries, kept from forward to forward. "moments": n: moments of all queries but
        the first n. "rope": 1: `Step.inverse_frequency`. "probe": a `Draft`, `SoftTokens` or `Repeat`, run after every
        multi-token forward. "sentence": 1: the column "sentence", the number of the sentence each token stands in.
        "all_layers": 1: the host calls `over_layers` once the whole model has run, not each layer's policy right after
        its attention.
        """
        return {}

    @property
    def in_cache_positions(self) -> bool:
        """Whether attention sees slots at consecutive positions (StreamingLLM) instead of their original ones."""
        return False

    @property
    def block(self) -> int | None:
        """If set, prompts are taken in blocks of so many tokens, each attended and compressed before the next."""
        return None

    def sources(self, layers: int) -> Mapping[int, int]:
        """Layer -> the earlier one whose slots it attends to, holding none itself; of `layers`, numbered by `order`.

        No layer that holds nothing is a source. Such layers are attended by the host; policies never see them. Raises
        ValueError for layers that there are not.
        """
        return {}

    def check(self, head_dim: int) -> None:  # noqa: B027 (most policies accept any head)
        """Raises ValueError if heads of this size cannot be handled."""

    @abstractmethod
    def __call__(self, kv: KV, step: Step) -> KV: ...

    def over_layers(self, kvs: Sequence[KV], steps: Sequence[Step]) -> list[KV]:
        """All layers at once, in order; for policies that compare layers."""
        return [self(kv, step) for kv, step in zip(kvs, steps, strict=True)]

    def __or__(self, other: Policy) -> Stack:
        return Stack((*_members(self), *_members(other)))

    def __str__(self) -> str:
        """The call that makes this policy, fields at their default left out."""
        shown = [
            f"{f.name}={getattr(self, f.name)!s}"
            if isinstance(getattr(self, f.name), Policy)
            else f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)  # type: ignore[arg-type]
            if f.init and (f.default is MISSING or getattr(self, f.name) != f.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def _members(policy: Policy) -> tuple[Policy, ...]:
    if not isinstance(policy, Policy):
        raise TypeError(f"only policies stack with |, got {policy!r}")
    return getattr(policy, "policies", (policy,))


@dataclass(frozen=True)
class Stack(Policy):
    """Policies applied one after the other. `Stack(())` does nothing."""

    policies: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(m for p in self.policies for m in _members(p)))

    @property
    def needs(self) -> Mapping[str, Any]:
        needs: dict[str, Any] = {}
        for policy in self.policies:
            for name, amount in policy.needs.items():
                if name not in SIGNALS:
                    raise ValueError(f"{policy} needs {name!r}, which no host knows; there are: {', '.join(SIGNALS)}")
                if name == "probe" and needs.get(name, amount) != amount:
                    raise ValueError(f"{self} asks for two different probes; stack at most one policy that needs one")
                needs[name] = amount if name == "probe" else max(amount, needs.get(name, 0))
        return needs

    @property
    def in_cache_positions(self) -> bool:
        return any(p.in_cache_positions for p in self.policies)

    @property
    def block(self) -> int | None:
        return min((p.block for p in self.policies if p.block is not None), default=None)

    @property
    def sharing(self) -> Stack:
        """The members that share layers: they act from the first token on, all others on what is held."""
        return Stack(tuple(p for p in self.policies if p.shares))

    def sources(self, layers: int) -> Mapping[int, int]:
        found = [p.sources(layers) for p in self.policies if p.shares]
        if len(found) > 1:
            raise ValueError(f"{self}: stack at most one policy that shares layers")
        return found[0] if found else {}

    def check(self, head_dim: int) -> None:
        if sum(isinstance(p, Selector) for p in self.policies) > 1:
            raise ValueError(f"{self}: stack at most one policy that selects what is read")
        for policy in self.policies:
            policy.check(head_dim)

    def __call__(self, kv: KV, step: Step) -> KV:
        return reduce(lambda kv, i: self.policies[i](kv, self._at(step, i)), range(len(self.policies)), kv)

    def over_layers(self, kvs: Sequence[KV], steps: Sequence[Step]) -> list[KV]:
        held = list(kvs)
        for i, policy in enumerate(self.policies):
            held = policy.over_layers(held, [self._at(step, i) for step in steps])
        return held

    def _at(self, step: Step, i: int) -> Step:
        return replace(step, stack=self.policies, at=i)

    def __str__(self) -> str:
        return " | ".join(map(str, self.policies)) or "Full()"


@dataclass(frozen=True)
class Budgeted(Policy):
    """What evictors and selectors share: how many slots their budget stands for.

    budget: slots per head, sinks and recent window included: an int is tokens, a float in (0, 1] a share of the
    prompt. memory: instead of `budget`, a share in (0, 1] of the bytes of the 16-bit full cache; the number of tokens
    follows from the exact bytes per slot of whatever quantizer follows in the stack. A share never gives fewer slots
    than the policy protects.
    """

    budget: int | float | None = None
    memory: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.budget is None) == (self.memory is None):
            raise ValueError(f"{name}: give either budget= (tokens or share of the prompt) or memory= (share of bytes)")
        share = self.memory if self.budget is None else self.budget
        what = "memory" if self.budget is None else "budget"
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise ValueError(f"{name}: {what} must be a number, got {share!r}")
        if isinstance(share, float) or what == "memory":
            if not 0 < share <= 1:
                hint = "; write tokens as an int" if what == "budget" and share > 1 else ""
                raise ValueError(f"{name}: {what}={share} as a share must be above 0 and at most 1{hint}")
        elif share < max(1, self.min_slots):
            least = (
                f"at least {self.min_slots} (what the policy protects)" if self.min_slots > 1 else "at least 1 token"
            )
            raise ValueError(f"{name}: budget={share} is too small: it must be {least}")

    @property
    def min_slots(self) -> int:
        """Slots the policy always protects: sinks + recent window."""
        return 1

    @property
    def shared_over_heads(self) -> bool:
        """Whether all heads of a layer keep the same slots, so that positions are stored once."""
        return False

    @property
    def slot_state_nbytes(self) -> int:
        """Bytes of the columns, besides positions, that a slot of one head carries for this policy."""
        return 4 if "attention" in self.needs else 0

    def spread(self, slots: Tensor, prompt: Tensor, layers: int) -> Tensor:
        """Slots per head of each layer if the mean over layers is to be `slots`.

        slots [...] int64; prompt, which it broadcasts with: tokens there are to choose from -> [layers, ...]. Default:
        the same in all layers.
        """
        return slots.expand(layers, *slots.shape)

    def slots(self, kv: KV, step: Step) -> Tensor:
        """The budget in force in this layer, slots per head: [B, 1] int64."""
        if isinstance(self.budget, int):
            mean = torch.full_like(step.prompt, self.budget)
        elif self.budget is not None:
            # In double: float32 is off by a token on some lengths (41 % of 100 tokens would keep 42).
            mean = step.prompt - torch.floor(step.prompt.double() * (1 - self.budget) + 1e-6).to(torch.int64)
            mean = mean.clamp(min=self.min_slots)
        else:
            rows = zip(step.prompt.tolist(), self.metadata_nbytes(kv, step).tolist(), strict=True)
            most = [self._slots_for_bytes(prompt, kv, step, metadata) for prompt, metadata in rows]
            mean = torch.tensor(most, device=step.prompt.device)
        return self.spread(mean, step.prompt, step.layers)[step.order][:, None]

    def head_nbytes(self, slots: Tensor, kv: KV, step: Step, *, evicted: Tensor | bool = True) -> Tensor:
        """Exact bytes that `slots` (any int64 tensor) slots of one head take, with this policy's and the stack's state.

        evicted: whether positions must be stored, as they are once anything has been evicted.
        """
        _, heads, _, head_dim = kv.keys.shape
        itemsize = kv.keys.dtype.itemsize
        if any(isinstance(p, Quantizer) for p in step.stack[: step.at]):
            raise BudgetError(f"{self}: a byte budget needs the evictor before the quantizer in the stack")
        quantizer = step.quantizer
        held = slots * (2 * head_dim * itemsize)
        if quantizer is not None:
            held = quantizer.slot_nbytes(slots, 1, head_dim, itemsize, step, evicted=evicted)
        stack = step.stack or (self,)
        state = 4 * any("attention" in p.needs for p in stack)
        state += sum(p.slot_state_nbytes - 4 * ("attention" in p.needs) for p in stack if isinstance(p, Budgeted))
        # All heads' positions are one column when they keep the same slots; then a head pays its part of it.
        position = slots * 4 * evicted
        return held + slots * state + (-(-position // heads) if self.shared_over_heads else position)

    def counted(self, step: Step) -> list[int]:
        """Numbers of the layers whose bytes `memory` is a share of, and is spent on: those that hold slots."""
        return step.holders

    def allowed_nbytes(self, prompt: int, kv: KV, step: Step) -> int:
        """Bytes of one row that `memory` of the full cache allows, per layer that is `counted`."""
        _, heads, _, head_dim = kv.keys.shape
        assert self.memory is not None
        return int(self.memory * 2 * prompt * heads * head_dim * 2 * (step.layers / len(self.counted(step))))

    def metadata_nbytes(self, kv: KV, step: Step) -> Tensor:
        """[B] int64: bytes per head that a budget in bytes pays besides slots, unless the whole prompt fits."""
        return torch.zeros_like(step.prompt)

    def _slots_for_bytes(self, prompt: int, kv: KV, step: Step, metadata: int = 0) -> int:
        """The most slots, as a mean over layers, whose exact bytes fit into `memory` of the full cache of a prompt."""
        _, heads, _, head_dim = kv.keys.shape
        return _most_slots(
            self, prompt, metadata, heads, head_dim, kv.keys.dtype, step.stack, step.at, step.layers, step.decoding
        )


@lru_cache(maxsize=4096)
def _most_slots(
    policy: Budgeted,
    prompt: int,
    metadata: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    stack: tuple[Policy, ...],
    at: int,
    layers: int,
    decoding: bool,
) -> int:
    """Asked in every layer and decode step, always with the same few answers. Raises BudgetError."""
    kv = KV.of(*(torch.empty(1, heads, 0, head_dim, dtype=dtype) for _ in range(2)))
    length = torch.tensor([prompt])
    slots = torch.arange(prompt + 1)
    whole = Step(0, length, length, layers=layers, stack=stack)
    counted, allowed = policy.counted(whole), policy.allowed_nbytes(prompt, kv, whole)
    spread = policy.spread(slots, torch.full_like(slots, prompt), layers).clamp(max=prompt)
    total = torch.zeros_like(slots)
    for order in counted:
        step = Step(order, length, length, decoding, order=order, layers=layers, stack=stack, at=at)
        # Positions are stored as soon as something is evicted, which at the latest the first decoded token causes.
        held = policy.head_nbytes(slots, kv, step, evicted=(slots < prompt) | decoding) + metadata * (slots < prompt)
        total += heads * held[spread[order]]
    fitting = (total <= allowed * len(counted)).nonzero()
    most = int(fitting.max()) if len(fitting) else 0
    if most < min(policy.min_slots, prompt):
        besides = f" besides {heads * metadata} bytes to choose them by" if metadata else ""
        raise BudgetError(
            f"{policy}: {policy.memory:.4g} of the full cache of {prompt} tokens is {allowed} bytes per layer, "
            f"room for {most} slots{besides}, but {policy.min_slots} are needed; use a larger memory= or fewer bits"
        )
    return max(most, policy.min_slots)


@dataclass(frozen=True)
class Evictor(Budgeted):
    """A scorer plus the one shared selection. Subclasses give `score` and, if they need to, `protected`.

    block: take prompts in blocks of so many tokens, each attended and then cut to the budget, so that no more than
    budget + block slots are ever held. None: attend the whole prompt first.
    """

    block: int | None = field(default=None, kw_only=True)

    evicts_while_decoding: ClassVar[bool] = True
    ragged: ClassVar[bool] = False
    """Whether heads may keep different numbers of slots, given by `head_slots`; the budget is then their mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None and (isinstance(self.block, bool) or self.block < 1):
            raise ValueError(f"{type(self).__name__}: block must be an int of at least 1 token, got {self.block!r}")

    @abstractmethod
    def score(self, kv: KV, step: Step) -> Tensor:
        """[B, H or 1, S] float32, higher = keep; values at dead columns do not matter."""

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor | None:
        """[B, H or 1, S] bool: slots kept whatever their score; slots [B, 1] is the budget in force."""
        return None

    def head_slots(self, score: Tensor, kv: KV, step: Step, slots: Tensor, protected: Tensor | None) -> Tensor:
        """[B, 1 or H] int64: slots of each head, if the mean over heads is to be slots [B, 1]."""
        return slots

    def observe(self, kv: KV, step: Step) -> KV:
        """Called after every forward, before anything is evicted: keeps the policy's own columns up to date."""
        return kv

    @property
    def interval(self) -> int:
        """Decoded tokens from one eviction to the next; in between, up to interval - 1 slots above the budget stay."""
        return 1

    def acts(self, step: Step) -> bool:
        """Whether this is a moment for evicting."""
        if not step.decoding or self.interval == 1:
            return self.evicts_while_decoding or not step.decoding
        return self.evicts_while_decoding and int((step.seen - step.prompt).amax()) % self.interval == 0

    def __call__(self, kv: KV, step: Step) -> KV:
        kv = self.observe(kv, step)
        if not self.acts(step):
            return kv
        slots, held = self.slots(kv, step), kv.counts.per_head
        if bool((held.sum(1, keepdim=True) <= slots * held.shape[1] if self.ragged else held <= slots).all()):
            return kv
        score, protected = self.score(kv, step), self.protected(kv, step, slots)
        kept = kv.gather(*select(score, kv, self.head_slots(score, kv, step, slots, protected), protected))
        return kept.flattened() if self.ragged else kept


@dataclass(frozen=True)
class Wrapper(Evictor):
    """An evictor that changes how another one, `base`, scores or spreads; its budget is that of `base`."""

    budget: int | float | None = field(init=False, default=None, repr=False)
    memory: float | None = field(init=False, default=None, repr=False)
    block: int | None = field(init=False, default=None, repr=False)
    base: Evictor

    def __post_init__(self) -> None:
        if not isinstance(self.base, Evictor):
            raise TypeError(f"{type(self).__name__}: base must be an evictor such as SnapKV(0.25), got {self.base!r}")
        for name in ("budget", "memory", "block", "evicts_while_decoding", "ragged"):
            object.__setattr__(self, name, getattr(self.base, name))

    @property
    def needs(self) -> Mapping[str, Any]:
        return self.base.needs

    @property
    def min_slots(self) -> int:
        return self.base.min_slots

    @property
    def shared_over_heads(self) -> bool:
        return self.base.shared_over_heads

    @property
    def slot_state_nbytes(self) -> int:
        return self.base.slot_state_nbytes

    def spread(self, slots: Tensor, prompt: Tensor, layers: int) -> Tensor:
        return self.base.spread(slots, prompt, layers)

    def score(self, kv: KV, step: Step) -> Tensor:
        return self.base.score(kv, step)

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor | None:
        return self.base.protected(kv, step, slots)

    def head_slots(self, score: Tensor, kv: KV, step: Step, slots: Tensor, protected: Tensor | None) -> Tensor:
        return self.base.head_slots(score, kv, step, slots, protected)

    def observe(self, kv: KV, step: Step) -> KV:
        return self.base.observe(kv, step)

    @property
    def interval(self) -> int:
        return self.base.interval

    def acts(self, step: Step) -> bool:
        return self.base.acts(step)


@dataclass(frozen=True)
class Selection:
    """Which slots a forward reads: `allowed` [B, H or Hq or 1, S] bool, and those of the `recent` newest positions.

    recent: int or [B] int64, counted from each query's own position, which is the first.
    """

    allowed: Tensor
    recent: int | Tensor = 0


@dataclass(frozen=True)
class Selector(Budgeted):
    """Drops nothing; chooses at each forward which slots take part. Bytes held stay, bytes read per step fall.

    budget: slots read per head and step; memory: instead, a share of the 16-bit full cache's bytes read per step, those
    read to choose by (`metadata_nbytes`) included.
    """

    def head_nbytes(self, slots: Tensor, kv: KV, step: Step, *, evicted: Tensor | bool = True) -> Tensor:
        """Exact bytes of keys and values that reading `slots` (any int64 tensor) slots of one head takes."""
        head_dim, itemsize = kv.keys.shape[-1], kv.keys.dtype.itemsize
        quantizer = next((p for p in step.stack if isinstance(p, Quantizer)), None)
        if quantizer is None:
            return slots * (2 * head_dim * itemsize)
        return quantizer.slot_nbytes(slots, 1, head_dim, itemsize, step)

    def counted(self, step: Step) -> list[int]:
        return list(range(step.layers))  # all of them read

    def __call__(self, kv: KV, step: Step) -> KV:
        """Called after every forward: keeps what `choose` reads (`KV.side`) up to date."""
        return kv

    @abstractmethod
    def choose(self, kv: KV, queries: Tensor, position: Tensor, step: Step) -> Selection | None:
        """Called before the attention of a forward with queries [B, Hq, T, D] at position [B, T] (-1: a pad).

        `kv` already holds the forward's own tokens. None: read everything.
        """


def select(score: Tensor, kv: KV, slots: Tensor, protected: Tensor | None = None) -> tuple[Tensor, Counts]:
    """The one selection: `protected` slots, then the highest scores, ties to the most recent.

    score [B, H or 1, S]; slots [B, 1] or [B, H]; -> indices [B, H or 1, K] ascending, -1 after the last. Raises
    ValueError for scores of another shape, which could be taken for other rows' or heads'.
    """
    batch, heads, width, _ = kv.keys.shape
    if score.shape not in ((batch, heads, width), (batch, 1, width)):
        raise ValueError(
            f"a score must be [batch={batch}, kv_heads={heads} or 1, slots={width}], got {list(score.shape)}"
        )
    live = kv.position >= 0
    score = score.float().clamp(min=torch.finfo(torch.float32).min)  # -inf is what dead columns get
    if protected is not None:
        score = score.masked_fill(protected, torch.inf)
    score = score.masked_fill(~live, -torch.inf)
    # A stable descending sort of the reversed columns: among equal scores the newer slot comes first.
    order = width - 1 - score.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.minimum(slots, live.sum(-1))  # [B, H or 1]
    counts = Counts.of(kept.expand(batch, heads).contiguous())
    order = order[..., : counts.width]
    dead = torch.arange(counts.width, device=score.device) >= kept[..., None]
    lists = max(order.shape[1], kept.shape[1])
    order = order.expand(-1, lists, -1).masked_fill(dead, width).sort(dim=-1).values
    return order.masked_fill(order == width, -1), counts


@dataclass(frozen=True)
class Quantizer(Policy):
    """Holds older slots packed. Subclasses name a codec for keys and one for values, and how much of a tail to pack.

    New tokens always arrive in the full-precision tail and are attended there first; this policy runs after attention.

    sinks: so many first tokens stay in full precision. `q.keys & r.values` takes keys as `q` does and values as `r`.
    compact: where tokens share scales, lists whose groups have lost more than 1 - compact of their tokens to eviction
    are encoded once more in whole groups; 0: never, a scale then lives as long as one of its tokens.
    """

    sinks: int = field(default=0, kw_only=True)
    compact: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise ValueError(f"{type(self).__name__}: sinks must be an int of 0 or more tokens, got {self.sinks!r}")
        if isinstance(self.compact, bool) or not isinstance(self.compact, (int, float)) or not 0 <= self.compact <= 1:
            raise ValueError(f"{type(self).__name__}: compact must be a share from 0 to 1, got {self.compact!r}")

    @abstractmethod
    def codecs(self, step: Step | None = None) -> tuple[Codec | None, Codec | None]:
        """(keys, values) in the layer of `step`; None: full precision."""

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        """How many of `tail` (any int tensor of tail lengths) to pack now: (keys, values). Default: all of them."""
        return tail, tail

    @property
    def keeps(self) -> tuple[int, int]:
        """First tokens that stay in full precision: (keys, values)."""
        return self.sinks, self.sinks

    @property
    def compacts(self) -> tuple[float, float]:
        """`compact` of (keys, values)."""
        return self.compact, self.compact

    @property
    def keys(self) -> Side:
        return Side(self, 0)

    @property
    def values(self) -> Side:
        return Side(self, 1)

    def __call__(self, kv: KV, step: Step) -> KV:
        self.check(kv.keys.shape[-1])
        if step.order == 0:  # once per forward, about those before
            bounds.settle(kv.keys.tail.device)
        position = kv.position
        sides = []
        for i, (held, codec, keep) in enumerate(zip((kv.keys, kv.values), self.codecs(step), self.keeps, strict=True)):
            if codec is not None:
                sinks = held.first_tokens(keep, position)
                tail = held.unpacked if sinks is None else held.unpacked.each(torch.sub, sinks)
                amount = tail.each(lambda lengths, side=i: self.flush(lengths)[side])
                held = held.pack(codec, amount, sinks, position)
                if self.compacts[i]:
                    held = held.compact(self.compacts[i])
            sides.append(held)
        return KV(sides[0], sides[1], kv.columns, kv.side)

    def encode(self, keys: Tensor, values: Tensor, step: Step | None = None) -> KV:
        """keys, values [B, H, T, D] -> packed; see `KV.decode`, `KV.nbytes`, `KV.gather`.

        step: only for formats that depend on the layer (artifacts, RoPE frequencies).
        """
        _check_shapes(keys, values)
        seen = torch.full((keys.shape[0],), keys.shape[2], device=keys.device)
        kv = self(KV.of(keys, values), Step(layer=0, prompt=seen, seen=seen) if step is None else step)
        bounds.settle(keys.device)
        return kv

    def slot_nbytes(
        self,
        slots: Tensor,
        heads: int,
        head_dim: int,
        itemsize: int,
        step: Step | None = None,
        *,
        evicted: Tensor | bool = False,
    ) -> Tensor:
        """Exact bytes of keys and values of one row of the layer of `step`, once `slots` (int tensor) are packed.

        evicted: whether slots were lost, after which formats that depend on positions must store them.
        """
        total = torch.zeros_like(slots)
        for i, (codec, keep) in enumerate(zip(self.codecs(step), self.keeps, strict=True)):
            body = packed = torch.zeros_like(slots)
            if codec is not None:
                packed = self.flush(slots - slots.clamp(max=keep))[i]
                body = packed * codec.row_nbytes(head_dim) + packed // codec.group * codec.group_nbytes(head_dim)
                body = body + packed * (4 * (codec.first is not None) * evicted)
            total += heads * (body + (slots - packed) * head_dim * itemsize)
        return total


@dataclass(frozen=True)
class Side:
    """The keys (index 0) or the values (1) of a quantizer; None: left in full precision. Two of them make a `Mixed`."""

    of: Quantizer | None
    index: int

    def __and__(self, other: Side) -> Mixed:
        if not isinstance(other, Side) or {self.index, other.index} != {0, 1}:
            raise TypeError(f"& takes one side of keys and one of values, as KIVI(2).keys & FP8().values; got {other}")
        first, second = sorted((self, other), key=lambda side: side.index)
        return Mixed(first.of, second.of)


@dataclass(frozen=True)
class Mixed(Quantizer):
    """Keys as one quantizer stores them, values as another; None: in full precision. `KIVI(4).keys & FP8().values`.

    Each side keeps its own sinks and residual window.
    """

    k: Quantizer | None = None
    v: Quantizer | None = None
    sinks: int = field(init=False, default=0, repr=False)
    compact: float = field(init=False, default=0.0, repr=False)

    def __post_init__(self) -> None:
        for name, part in (("k", self.k), ("v", self.v)):
            if part is not None and not isinstance(part, Quantizer):
                raise TypeError(f"Mixed: {name} must be a quantizer such as KIVI(2), or None, got {part!r}")

    @property
    def needs(self) -> Mapping[str, Any]:
        return {} if self._parts == (None, None) else Stack(tuple(p for p in self._parts if p is not None)).needs

    @property
    def _parts(self) -> tuple[Quantizer | None, Quantizer | None]:
        return self.k, self.v

    @property
    def keeps(self) -> tuple[int, int]:
        sides = [0 if part is None else part.keeps[i] for i, part in enumerate(self._parts)]
        return sides[0], sides[1]

    @property
    def compacts(self) -> tuple[float, float]:
        sides = [0.0 if part is None else part.compacts[i] for i, part in enumerate(self._parts)]
        return sides[0], sides[1]

    def check(self, head_dim: int) -> None:
        for part in self._parts:
            if part is not None:
                part.check(head_dim)

    def codecs(self, step: Step | None = None) -> tuple[Codec | None, Codec | None]:
        sides = [None if part is None else part.codecs(step)[i] for i, part in enumerate(self._parts)]
        return sides[0], sides[1]

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        sides = [tail if part is None else part.flush(tail)[i] for i, part in enumerate(self._parts)]
        return sides[0], sides[1]
