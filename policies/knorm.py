"""KNorm: keep the keys of the smallest L2 norm, which attract the most attention (Devoto et al., EMNLP 2024).

Paper https://arxiv.org/abs/2406.11430, official code https://github.com/alessiodevoto/l2compress
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.kernels.scores import key_norms
from kvbench.policies.interface import KV, Evictor, Step

_FLAT = 1e-3
"""Relative range of a head's norms below which ranking them says nothing: about one rounding step of bfloat16."""


@dataclass(frozen=True)
class KNorm(Evictor):
    """Keeps the slots whose keys are shortest, in all layers but the first `skip_layers`, which keep everything.

        score[b, h, s] = -|k_s|_2                                                float32 [B, H, S]

    RoPE turns keys and leaves their norms, so it does not matter that these are rotated. Models that normalize their
    keys (key RMSNorm: Qwen3, Gemma 3) have nearly constant norms: what is kept is then little but rounding, and a
    warning says so.

    budget: slots per head of the layers that evict (int tokens, or float share of the prompt): the skipped layers come
    on top. memory= instead: see `Evictor`; it counts the skipped layers' prompts, and the others get what is left.
    skip_layers: first layers, of those the policy sees, that never evict; they grow with every token decoded.
    Acts: at the end of every prompt forward and at every decode step.
    Raises ValueError when constructed with a bad option; BudgetError if the skipped layers alone exceed `memory`.

    Official defaults: layers 0 and 1 skipped (the README's call and the paper), no token protected.
    Deviations. `fp32`: official norms are in the model's dtype, where many tie. `every_step`: official code
    compresses when its caller says so. `sorted`: it leaves the cache in order of norm.
    """

    skip_layers: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.skip_layers, bool) or not isinstance(self.skip_layers, int) or self.skip_layers < 0:
            raise ValueError(f"KNorm: skip_layers must be an int of 0 or more layers, got {self.skip_layers!r}")
        super().__post_init__()

    def spread(self, slots: Tensor, prompt: Tensor, layers: int) -> Tensor:
        slots, prompt = torch.broadcast_tensors(slots, prompt)
        skipped = min(self.skip_layers, layers)
        return torch.cat([prompt.expand(skipped, *prompt.shape), slots.expand(layers - skipped, *slots.shape)])

    def acts(self, step: Step) -> bool:
        return step.order >= self.skip_layers and super().acts(step)

    def score(self, kv: KV, step: Step) -> Tensor:
        norm = key_norms(kv.keys.dense())
        if not step.decoding:
            self._warn_if_flat(norm, kv.position >= 0)
        return -norm

    def _warn_if_flat(self, norm: Tensor, live: Tensor) -> None:
        longest = norm.masked_fill(~live, 0).amax(-1)
        shortest = norm.masked_fill(~live, torch.inf).amin(-1)
        if bool(((longest - shortest < _FLAT * longest) & (live.sum(-1) > 1)).any()):
            warnings.warn("KNorm: a head's key norms are all but equal (key RMSNorm?): it ranks rounding", stacklevel=3)
