"""LookaheadKV: what learned tokens, trained to look where the answer will look, attend to (Samsung, ICLR 2026).

Paper https://arxiv.org/abs/2603.10899, official code https://github.com/SamsungLabs/LookaheadKV (named there, not read)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kvbench.policies.interface import KV, Evictor, SoftTokens, Step


@dataclass(frozen=True)
class LookaheadKV(Evictor):
    """Keeps the slots that n learned soft tokens, read after the prompt, attend to the most.

        raw[b, h, s]   = mean over query heads g of kv head h and over soft tokens i, of A[b, g, i, s]
        score[b, h, s] = max over s' with |s' - s| <= kernel // 2 of raw[b, h, s']           float32 [B, H, S]

    A is the float32 softmax over all slots and the soft tokens up to i. Low-rank adapters of the model's linear layers
    are on while the soft tokens are read, and only then; keys, values and logits of the prompt are those of the model
    itself. `scripts/train_lookahead.py` trains tokens and adapters for a model, so that their attention matches that
    of the model's own answers.

    budget: slots per head, suffix included (int tokens, or float share of the prompt); memory= instead: see `Evictor`.
    modules: a trained folder, or the name of one that ships with kvbench. kernel: slots pooled, odd; 1 = no pooling.
    suffix: newest slots kept in any case, and left out of the pool.
    Acts: at the end of every prompt forward, never while decoding: the cache then grows.
    Raises ValueError when constructed with a bad option or with a budget of fewer tokens than `suffix`, and if the
    host does not supply the soft tokens or they were trained for another model.

    Official defaults: 32 soft tokens, adapters of rank 8 and alpha 32, both fixed by training. kernel 1 and suffix 0
    are ours, as the paper does not say whether it pools or protects; kernel 7 and suffix 32 match SnapKV.
    Deviations. `gqa_mean`: how a group of query heads votes is not said either; here by its mean. `fp32`, `sorted`: as
    in SnapKV.
    """

    modules: str = "proving"
    kernel: int = 1
    suffix: int = 0

    evicts_while_decoding: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.modules, str) or not self.modules:
            raise ValueError(f"LookaheadKV: modules must be a trained folder or the name of one, got {self.modules!r}")
        if isinstance(self.kernel, bool) or not isinstance(self.kernel, int) or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"LookaheadKV: kernel must be an odd int of at least 1 slot, got {self.kernel!r}")
        if isinstance(self.suffix, bool) or not isinstance(self.suffix, int) or self.suffix < 0:
            raise ValueError(f"LookaheadKV: suffix must be an int of 0 or more tokens, got {self.suffix!r}")
        super().__post_init__()

    @property
    def needs(self) -> Mapping[str, Any]:
        return {"probe": SoftTokens(self.modules)}

    @property
    def min_slots(self) -> int:
        return max(1, self.suffix)

    def score(self, kv: KV, step: Step) -> Tensor:
        rows = step.probe_attention(kv)  # [B, Hq, n, S]
        assert step.probe is not None  # step.probe_attention has raised
        read = rows.sum(2) / step.probe.valid.sum(1).clamp(min=1)[:, None, None]
        raw = read.unflatten(1, (kv.counts.shape[1], -1)).mean(2).masked_fill(self._in_suffix(kv), -torch.inf)
        return F.max_pool1d(raw, self.kernel, stride=1, padding=self.kernel // 2)

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        return self._in_suffix(kv)

    def _in_suffix(self, kv: KV) -> Tensor:
        """[B, H or 1, S] bool: the newest slots, and the dead columns after them."""
        return kv.from_newest <= self.suffix
