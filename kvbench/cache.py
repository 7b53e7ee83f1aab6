"""The one file that touches transformers: a `Cache` whose layers hold a `KV`, and the attention function that reads it.

How the two meet: attention modules call `cache.update(k, v, layer)` and hand what it returns to the registered
attention function. `PolicyLayer.update` keeps the new tokens pending and returns them tagged with itself; `_attention`
finds the layer by that tag, and the layer appends, attends, collects what the policy needs, and applies the policy.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kvbench.kernels.attention import attend, attend_causal, column_sums
from kvbench.ledger import Part, full_nbytes, ledger, report
from kvbench.policies.full import Full
from kvbench.policies.interface import KV, Policy, Stack, Step
from kvbench.policies.store import Counts, Held, take_columns

NAME = "kvbench"
_TAG = "_kvbench_layer"


class PolicyLayer(CacheLayerMixin):
    """One layer of a `CompressedCache`."""

    is_sliding = False
    is_croppable = False  # what was evicted does not come back

    def __init__(self, index: int, cache: CompressedCache):
        super().__init__()
        self.index = index
        self._cache = cache
        self.reset()

    def reset(self) -> None:
        # None until the first forward, and only asked for afterwards.
        self.kv: KV = None  # type: ignore[assignment]
        self.seen: Tensor = None  # type: ignore[assignment]  # [B] real tokens seen
        self.prompt: Tensor = None  # type: ignore[assignment]  # [B] of them by the end of the last multi-token forward
        self.columns_seen = 0  # with pads, as transformers counts
        self.queries: Tensor | None = None  # [B, Hq, w, D], only until the policy has run
        self.query_valid: Tensor | None = None
        self.geometry: dict[str, Any] = {}
        self._pending: tuple[Tensor, Tensor] | None = None
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keeps new keys and values [B, H, T, D] pending until the attention function of this layer is called."""
        self._cache.check_consumed()
        if self.kv is not None and key_states.shape[0] != self.kv.keys.shape[0]:
            raise ValueError(
                f"this cache holds a batch of {self.kv.keys.shape[0]}, got {key_states.shape[0]}; "
                "use a new CompressedCache or call reset()"
            )
        self._pending = (key_states, value_states)
        self._cache.pending_layer = self
        self.is_initialized = True
        tagged = key_states.view_as(key_states)
        setattr(tagged, _TAG, self)
        return tagged, value_states

    def attend(self, module: nn.Module, query: Tensor, mask: Tensor | None, **geometry: Any) -> Tensor:
        """Appends the pending tokens, attends (query [B, Hq, T, D] -> same), collects signals, applies the policy."""
        assert self._pending is not None
        keys_new, values_new = self._pending
        self._pending = self._cache.pending_layer = None
        self._cache.check_module(module)
        batch, heads, tokens, _ = keys_new.shape
        valid = self._cache.real_tokens(self.index, mask, tokens)
        if self.kv is None:
            self.kv = self._empty(keys_new, values_new)
            self.seen = torch.zeros(batch, dtype=torch.int64, device=query.device)
        first = self.columns_seen == 0
        rank = torch.arange(tokens, device=query.device)
        rank = rank.expand(batch, -1) if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
        query_position = self.seen[:, None] + rank
        self.kv = self.kv.append(keys_new, values_new, valid, self.seen)
        self.seen = self.seen + (tokens if valid is None else valid.sum(1))
        self.columns_seen += tokens
        decoding = tokens == 1 and not first and not self._cache.is_deferred
        if not decoding:
            self.prompt = self.seen
        self.geometry = geometry

        if first and geometry["softcap"] is None and geometry["sinks"] is None:
            out = _attend_prompt(query, keys_new, values_new, valid, geometry["scaling"])
            keys = self.kv.keys.dense() if self._cache.needs else None
        else:
            keys, values = self.kv.decode()
            if self._cache.policy.in_cache_positions:
                keys = self._cache.to_in_cache_positions(self.index, keys, self.kv, self.seen)
            out = attend(query, keys, values, query_position, self.kv.position, **geometry)
        self._collect(query, keys, query_position, valid)
        if not self._cache.is_deferred:
            self.compress(decoding)
        return out

    def _empty(self, keys: Tensor, values: Tensor) -> KV:
        empty, none = Counts((keys.shape[0], keys.shape[1]), keys.device, 0), slice(0)
        columns = {}
        if "attention" in self._cache.needs:
            columns["attention"] = torch.zeros(keys.shape[0], keys.shape[1], 0, device=keys.device)
        return KV(Held(keys[:, :, none].clone(), empty), Held(values[:, :, none].clone(), empty), columns)

    def _collect(self, query: Tensor, keys: Tensor | None, query_position: Tensor, valid: Tensor | None) -> None:
        needs = self._cache.needs
        if "attention" in needs:
            assert keys is not None
            new = column_sums(query, keys, query_position, self.kv.position, query_valid=valid, **self.geometry)
            columns = {**self.kv.columns, "attention": self.kv.columns["attention"] + new}
            self.kv = KV(self.kv.keys, self.kv.values, columns)
        if "queries" in needs:
            if valid is None:
                valid = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool, device=query.device)
            if (
                self.queries is not None and self.query_valid is not None
            ):  # an earlier chunk of the same, deferred prompt
                query = torch.cat([self.queries, query], dim=2)
                valid = torch.cat([self.query_valid, valid], dim=1)
            last = valid.int().argsort(dim=1, stable=True)[:, -needs["queries"] :]  # pads first, wherever they stood
            self.queries = take_columns(query, last[:, None].expand(-1, query.shape[1], -1))
            self.query_valid = valid.gather(1, last)

    def compress(self, decoding: bool = False) -> None:
        """Applies the policy to what is held."""
        step = Step(
            layer=self.index, prompt=self.prompt, seen=self.seen, decoding=decoding,
            queries=self.queries, query_valid=self.query_valid, **self.geometry,
        )  # fmt: skip
        self.kv = self._cache.policy(self.kv, step)
        if not self._cache.records:
            self.queries = self.query_valid = None

    def fork(self, cache: CompressedCache) -> PolicyLayer:
        """A layer of `cache` with the same tokens, sharing their memory until one of the two changes them."""
        other = PolicyLayer(self.index, cache)
        vars(other).update({k: v for k, v in vars(self).items() if k != "_cache"})
        columns = {k: v for k, v in self.kv.columns.items() if k == "position" or k in cache.needs}
        other.kv = KV(self.kv.keys.sealed(), self.kv.values.sealed(), columns)
        if "queries" not in cache.needs:
            other.queries = other.query_valid = None
        elif self.queries is not None and self.query_valid is not None:
            other.queries = self.queries[:, :, -cache.needs["queries"] :]
            other.query_valid = self.query_valid[:, -cache.needs["queries"] :]
        return other

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor kept alive, named."""
        if self.kv is not None:
            yield from self.kv.tensors()
            for held in (self.kv.keys, self.kv.values):
                parts = (held, held.body) if held.body is not None else (held,)
                counts = (held.tail_counts, *(part.counts for part in parts))
                yield from (("lengths", c.ragged) for c in counts if c.ragged is not None)
        for name in ("seen", "prompt", "queries", "query_valid"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor

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
        """Forgets the newest tokens: -n removes n; n > 0 (older transformers) keeps n. Evicted slots stay gone."""
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


class CompressedCache(Cache):
    """A transformers cache that a policy compresses after every forward.

        cache = CompressedCache(model, H2O(budget=0.25, recent=32) | KIVI(bits=2))
        out = model.generate(**inputs, past_key_values=cache)
        print(cache.report())

    The model's attention implementation is set to "kvbench", which behaves as "sdpa" for every other cache.
    Sliding-window layers are left alone. Raises ValueError for models that cannot be hooked, saying why.

    needs: signals to collect besides what the policy itself needs, for a later `fork`.
    """

    layers: list[Any]  # PolicyLayer, or what transformers holds a sliding-window layer in

    def __init__(self, model: PreTrainedModel, policy: Policy | None = None, *, needs: Mapping[str, int] | None = None):
        policy = Full() if policy is None else policy
        if not isinstance(policy, Policy):
            raise TypeError(f"policy must be a kvbench policy such as H2O(budget=0.25) | KIVI(bits=2), got {policy!r}")
        plan = _layer_plan(model)
        self.policy = Stack((policy,))
        self.policy.check(_head_dim(model))
        self.needs = {**self.policy.needs, **{k: max(v, self.policy.needs.get(k, 0)) for k, v in (needs or {}).items()}}
        self.records = bool(needs)
        self.model = model
        self.is_deferred = False
        self.pending_layer: PolicyLayer | None = None
        self._mask: tuple[Tensor | None, Tensor | None] = (None, None)
        self._rotary: dict[str, Tensor] = {}
        if model.config._attn_implementation != NAME:
            model.set_attn_implementation(NAME)
        if self.policy.in_cache_positions:
            self._rotary = _rotary_frequencies(model, {t for t, layer in plan if not layer.is_sliding})
        self._layer_types = [t for t, _ in plan]
        super().__init__(layers=[x if x.is_sliding else PolicyLayer(i, self) for i, (_, x) in enumerate(plan)])

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
        return torch.stack([layer.kv.row_nbytes().cpu() for layer in self.policy_layers()]).sum(0)

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
        if held.kv is None:
            raise ValueError("the cache is empty: run a forward or generate first")
        batch, heads, _, _ = held.kv.keys.shape
        return held.kv.position.expand(batch, heads, -1).to(torch.int64)

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
        for layer in self.policy_layers():
            if layer.kv is not None:
                layer.compress()

    def fork(self, policy: Policy) -> CompressedCache:
        """A new cache with the same tokens, compressed by `policy`; this one stays as it is.

        `needs` of the new policy must have been collected (see `needs` of the constructor).
        """
        if any(layer.kv is None for layer in self.policy_layers()):
            raise ValueError("the cache is empty: run a forward or generate first")
        other = CompressedCache(self.model, policy)
        missing = [k for k, v in other.needs.items() if self.needs.get(k, 0) < v]
        if missing:
            raise ValueError(
                f"cannot fork to {policy}: this cache did not collect {missing}; pass needs= when it is made"
            )
        for i, layer in enumerate(self.layers):
            if isinstance(layer, PolicyLayer):
                other.layers[i] = layer.fork(other)
            else:
                vars(other.layers[i]).update(vars(layer))  # sliding layers replace their tensors, never write into them
        other.compress()
        return other

    def policy_layers(self) -> list[PolicyLayer]:
        return [layer for layer in self.layers if isinstance(layer, PolicyLayer)]

    # -- what the layers ask -------------------------------------------------------------------------------------

    def check_consumed(self) -> None:
        """The tokens of the previous layer must have gone through our attention function."""
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
            row = mask[:, 0, -1, -tokens:]
            valid = row if row.dtype == torch.bool else row >= 0
            if bool((valid.any(1) & ~valid[:, -1]).any()):
                raise ValueError('batches must be left-padded: set tokenizer.padding_side = "left"')
            self._mask = (mask, None if bool(valid.all()) else valid)
        real = self._mask[1]
        if layer == self.policy_layers()[-1].index:
            self._mask = (None, None)  # not kept alive between forwards
        return real

    def to_in_cache_positions(self, layer: int, keys: Tensor, kv: KV, seen: Tensor) -> Tensor:
        """keys [B, H, S, D] rotated from their original to consecutive positions that end at the newest token."""
        position = kv.position.long()
        length = kv.counts.per_head[:, : position.shape[1], None]
        slot = torch.arange(position.shape[-1], device=keys.device)
        shift = (seen[:, None, None] - length + slot - position).masked_fill(position < 0, 0)
        if not bool(shift.any()):
            return keys
        return rotate(keys, shift, self._rotary[self._layer_types[layer]])


def rotate(x: Tensor, shift: Tensor, inverse_frequency: Tensor) -> Tensor:
    """Turns RoPE'd x [B, H, S, D] by `shift` [B, H or 1, S] positions; inverse_frequency [R/2], the first R dims turn.

    Half-split layout: dims j and j + R/2 form a pair. Angles in float32; shift 0 returns the same values.
    """
    half = len(inverse_frequency)
    angle = shift[..., None].float() * inverse_frequency.to(x.device)
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
    return torch.cat([turned, rest], dim=-1)


def _attend_prompt(query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float) -> Tensor:
    """Causal attention of a prompt on itself. Padded rows run alone, without pads: no mask, no T x T matrix."""
    if valid is None:
        return attend_causal(query, keys, values, scaling=scaling)
    out = torch.zeros_like(query)
    for row, real in enumerate(valid):
        part = slice(row, row + 1), slice(None), real
        out[part] = attend_causal(query[part], keys[part], values[part], scaling=scaling)
    return out


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls: [B, Hq, T, D] in, [B, T, Hq, D] out."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: PolicyLayer | None = getattr(key, _TAG, None)
    if layer is not None:
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
                f"{name}: layer {i} is cached by {type(layer).__name__}; "
                "only attention layers with keys and values can be hooked"
            )
    if all(layer.is_sliding for layer in layers):
        raise ValueError(
            f"{name}: every layer is sliding-window attention, already bounded; there is nothing to compress"
        )
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    return list(zip(types, layers, strict=True))


def _head_dim(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary_frequencies(model: PreTrainedModel, layer_types: set[str]) -> dict[str, Tensor]:
    """Inverse RoPE frequencies [R/2] per layer type, proven on the model's own rotary code."""
    rotary: Any = next(
        (m for m in model.modules() if hasattr(m, "inv_freq") or hasattr(m, "full_attention_inv_freq")), None
    )
    apply = getattr(sys.modules[type(rotary).__module__], "apply_rotary_pos_emb", None) if rotary is not None else None
    if rotary is None or apply is None:
        raise ValueError(f'{type(model).__name__} has no RoPE that kvbench can turn; use positions="original"')
    found = {}
    for layer_type in layer_types:
        frequency = getattr(rotary, f"{layer_type}_inv_freq", None)
        frequency = (rotary.inv_freq if frequency is None else frequency).float()
        extra = {"layer_type": layer_type} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
        probe = torch.randn(1, 1, 1, _head_dim(model), device=frequency.device)
        turned = []
        for position in (3, 20):
            cos, sin = rotary(probe, torch.tensor([[position]], device=frequency.device), **extra)
            turned.append(apply(probe, probe, cos, sin)[0])
        shift = torch.full((1, 1, 1), 17, device=frequency.device)
        if not torch.allclose(rotate(turned[0], shift, frequency), turned[1], atol=1e-4):
            raise ValueError(
                f'the RoPE of {type(model).__name__} cannot be turned after the fact; use positions="original"'
            )
        found[layer_type] = frequency
    return found
