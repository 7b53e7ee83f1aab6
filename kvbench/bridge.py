"""Both ways between kvbench and NVIDIA's kvpress: a press as an evictor, a policy as a press.

    CompressedCache(model, PressEvictor(0.25, press=KeyDiffPress()) | KIVI(bits=4))
    with to_press(SnapKV(0.25))(model): model(ids, past_key_values=DynamicCache())

Only `to_press` imports kvpress, when it is called.

Not every press can be an evictor: policies see tensors, presses their attention module and its hidden states as well.
Those that score by keys and values alone work: KnormPress, KeyDiffPress, LagKVPress, CURPress, RandomPress and
StreamingLLMPress. Those that read more (SnapKVPress, TOVAPress, ExpectedAttentionPress, ObservedAttentionPress,
LeverageScorePress, ...) raise TypeError when they score; presses without scores (AdaKVPress and other wrappers,
ThinKPress, ...) when they are given. kvbench has most of them itself.
"""

from __future__ import annotations

import sys
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kvbench.kernels.scores import column_sums
from kvbench.policies.interface import KV, Evictor, Moments, Policy, Selector, Stack, Step


class _Absent:
    """What kvpress would hand to a press and tensors alone do not give."""

    def __init__(self, press: Any, name: str) -> None:
        self._message = f"{type(press).__name__} reads {name}, which a policy does not see; kvbench.bridge names others"

    def __getattr__(self, name: str) -> Any:
        raise TypeError(self._message)

    def __getitem__(self, key: Any) -> Any:
        raise TypeError(self._message)


@dataclass(frozen=True)
class PressEvictor(Evictor):
    """Keeps the slots that a kvpress ScorerPress gives the highest scores, [B, H, S] in its dtype.

    budget: as for every evictor; if neither it nor memory= is given, 1 - compression_ratio of the press. When the press
    scores, its compression_ratio is the one that stands for the budget in force. Rows of a batch, and heads that hold
    different numbers of slots, are scored one by one.
    Acts: at the end of every prompt forward, as kvpress does, never while decoding: the cache then grows.
    Raises TypeError if `press` has no scores, or reads more than keys and values.
    Deviations. `rounding`: kvpress rounds the number of kept slots down, a share of the prompt here rounds up.
    """

    press: Any = field(kw_only=True, hash=False)

    evicts_while_decoding: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not callable(getattr(self.press, "score", None)):
            raise TypeError(f"PressEvictor: press must be a kvpress ScorerPress such as KnormPress(), got {self.press}")
        if self.budget is None and self.memory is None:
            object.__setattr__(self, "budget", 1.0 - self.press.compression_ratio)
        super().__post_init__()

    def score(self, kv: KV, step: Step) -> Tensor:
        press, (keys, values) = copy(self.press), kv.decode()
        module, states, attentions, more = (
            _Absent(press, name) for name in ("the module", "hidden_states", "attentions", "the forward's arguments")
        )
        score = torch.zeros(keys.shape[:3], device=keys.device)
        for b, (held, slots) in enumerate(zip(kv.counts.per_head.tolist(), self.slots(kv, step).tolist(), strict=True)):
            alike = len(set(held)) == 1
            for heads, n in [(slice(None), held[0])] if alike else [(slice(h, h + 1), n) for h, n in enumerate(held)]:
                if n:
                    part = slice(b, b + 1), heads, slice(n)
                    press.compression_ratio = max(0.0, 1 - (slots[0] + 0.5) / n)  # int(n * (1 - ratio)) is slots[0]
                    scored = press.score(module, states, keys[part], values[part], attentions, more)
                    score[part] = scored.to(score.dtype)
        return score


def to_press(policy: Policy) -> Any:
    """A kvpress BasePress that compresses each layer by `policy` at the end of the prompt.

    Queries, attention sums and moments are recomputed from the hidden states. What quantizers of a stack pack is
    decoded again, as kvpress's caches hold plain tensors. Raises TypeError for policies that kvpress cannot host.
    """
    stack = Stack((policy,))
    for p in stack.policies:
        unmet = {"probe", "sentence", "all_layers"} & set(p.needs)
        why = f"it needs {', '.join(sorted(unmet))}" if unmet else "it selects, but drops nothing"
        why = "its heads keep different numbers of slots" if getattr(p, "ragged", False) else why
        why = "it takes prompts in blocks" if p.block else why
        why = "its layers share what one of them holds" if p.shares else why
        why = 'it moves keys to other positions; positions="original" does not' if p.in_cache_positions else why
        alone = not (p.block or p.shares or p.in_cache_positions)
        if unmet or isinstance(p, Selector) or getattr(p, "ragged", False) or not alone:
            raise TypeError(f"{p} cannot be a press: {why}")
    return _press_class()(stack)


@cache
def _press_class() -> type:
    kvpress, utils = import_module("kvpress"), import_module("kvpress.utils")

    class PolicyPress(kvpress.BasePress):  # type: ignore[name-defined]
        def __init__(self, policy: Stack) -> None:
            self.policy = policy

        def forward_hook(self, module: nn.Module, input: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if "cache_position" not in kwargs:  # newer transformers pass none, and kvpress tells prompts by it
                held = kwargs["past_key_values"].get_seq_length(module.layer_idx)
                kwargs = {**kwargs, "cache_position": torch.arange(held)}
            return super().forward_hook(module, input, kwargs, output)

        def compress(
            self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: Any, kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            needs, kv, tokens = self.policy.needs, KV.of(keys, values), keys.shape[2]
            seen = torch.full(keys.shape[:1], tokens, device=keys.device)
            width, more = max(needs.get("queries", 0), needs.get("window", 0)), dict[str, Any]()
            if asked := tokens if {"attention", "moments"} & set(needs) else width:
                before = utils.get_prerope_query_states(module, hidden_states[:, -asked:])
                rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
                queries, _ = rotate(before, before, *(x[:, -asked:] for x in kwargs["position_embeddings"]))
                more["queries"] = queries[:, :, -width:] if width else None
                if "attention" in needs:
                    at = torch.arange(tokens, device=keys.device).expand(len(seen), -1)
                    sums = column_sums(queries, keys, at, kv.position, scaling=module.scaling)
                    kv = kv.with_columns(attention=sums)
                if "moments" in needs:
                    real = before[:, :, needs["moments"] :].float()
                    centred = real - real.mean(2, keepdim=True)
                    more["moments"] = Moments(real.mean(2), centred.mT @ centred / real.shape[2])
                    more["inverse_frequency"] = module.rotary_emb.inv_freq
            layers = module.config.num_hidden_layers
            step = Step(
                layer=module.layer_idx, prompt=seen, seen=seen, order=module.layer_idx, layers=layers,
                scaling=module.scaling, **more,
            )  # fmt: skip
            return self.policy(kv, step).decode()

    return PolicyPress
