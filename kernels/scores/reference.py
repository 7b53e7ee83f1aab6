"""Scores of slots in PyTorch: the reference, and the path taken on the CPU. For column sums it stands in
`kvbench.kernels.attention.reference`."""

from __future__ import annotations

from torch import Tensor

EPS = 1e-8
"""Least norm, as in torch.nn.functional.cosine_similarity."""


def key_norms(keys: Tensor) -> Tensor:
    """keys [B, H, S, D] -> |k_s| float32 [B, H, S]."""
    return keys.float().norm(dim=-1)


def key_alignment(keys: Tensor, live: Tensor, unit: bool = True) -> Tensor:
    """keys [B, H, S, D], live [B, H or 1, S] bool -> cos(k_s, anchor) float32 [B, H, S].

    anchor: the mean over live slots of k_s / |k_s|, or of k_s itself if not `unit`.
    """
    keys = keys.float()
    units = keys / keys.norm(dim=-1, keepdim=True).clamp(min=EPS)
    total = ((units if unit else keys) * live[..., None]).sum(2)
    return (units * direction(total, live)[:, :, None]).sum(-1)


def direction(total: Tensor, live: Tensor) -> Tensor:
    """Sums [B, H, D] over the slots `live` [B, H or 1, S] -> their means, at length 1."""
    mean = total / live.sum(2).clamp(min=1)[..., None]
    return mean / mean.norm(dim=-1, keepdim=True).clamp(min=EPS)
