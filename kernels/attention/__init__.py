"""Attention over cached slots, attention probabilities, and column sums (PyTorch reference, also the CPU path)."""

from kvbench.kernels.attention.reference import attend, attend_causal, attend_tiles, column_sums, probabilities

__all__ = ["attend", "attend_causal", "attend_tiles", "column_sums", "probabilities"]
