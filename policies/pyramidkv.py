"""PyramidKV: SnapKV's scores, with more slots in the lower layers and fewer in the upper ones (Cai et al., 2024).

Paper https://arxiv.org/abs/2406.02069, official code https://github.com/Zefan-Cai/KVCache-Factory
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keeps in layer l the last `window` slots and the c[l] older ones that `SnapKV` scores highest.

        b = budget - window      top = min(2 b - b // beta, prompt - window)      bottom = 2 b - top
        c[l] = top - l (top - bottom) / (layers - 1)                       mean over layers: b, in whole slots

    If the prompt is shorter than 2 b, or there is one layer, all layers get b.

    budget: mean over layers of the slots per head, window included (int tokens, or float share of the prompt);
    memory= instead: see `Evictor`. window, kernel, pooling: see `SnapKV`.
    beta: how steep: the last layer gets b / beta slots besides its window; 1 = as SnapKV.
    mode: "exact": c is rounded so that the layers keep layers * budget together. "official": the step from layer to
    layer is rounded down, so that they keep more than that, though never more bytes than memory= allows.
    Acts: at the end of every prompt forward, never while decoding: the cache then grows.
    Raises ValueError when constructed with a bad option or with a budget of fewer tokens than `window`, and if the
    host does not supply the last queries.

    Official defaults: window 8, kernel 7, max, beta 20 (LongBench, ours too); class: 64, 5, avg.
    Deviations. `exact`: the official rounding overspends (in 32 layers 4.6 % of what follows the window at a budget of
    128, near twofold at 24); "official" restores it. `gqa_mean`, `fp32`, `sorted`: as in `SnapKV`.
    """

    window: int = 8
    beta: int = 20
    mode: str = "exact"

    def __post_init__(self) -> None:
        if isinstance(self.beta, bool) or not isinstance(self.beta, int) or self.beta < 1:
            raise ValueError(f"PyramidKV: beta must be an int of at least 1, got {self.beta!r}")
        if self.mode not in ("exact", "official"):
            raise ValueError(f"PyramidKV: mode must be 'exact' or 'official', got {self.mode!r}")
        super().__post_init__()

    def spread(self, slots: Tensor, prompt: Tensor, layers: int) -> Tensor:
        slots, prompt = torch.broadcast_tensors(slots, prompt)
        mean = slots - self.window
        top = torch.minimum(2 * mean - mean // self.beta, prompt - self.window)
        drop, steps = 2 * (top - mean), max(1, layers - 1)
        layer = torch.arange(layers, device=slots.device).view(-1, *[1] * slots.dim())
        if self.mode == "official":
            ramp = top - layer * (drop // steps)
        else:
            # Layers l and layers - 1 - l average `mean`: rounded to the nearest, halves up below the middle and down
            # above it, they still do. These are the largest remainders.
            upper = (2 * layer >= layers).long()
            ramp = (2 * (top * steps - layer * drop) + steps - upper) // (2 * steps)
        uniform = (slots >= prompt) | (prompt < 2 * mean) | (mean < 0) | (layers == 1)
        return torch.where(uniform, slots, ramp + self.window)
