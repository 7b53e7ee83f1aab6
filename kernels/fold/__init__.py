"""Products with packed rows that never unpack them into one tensor (PyTorch reference, also the CPU path)."""

from kvbench.kernels.fold.reference import mix_per_token, scores_per_channel, scores_per_token

__all__ = ["mix_per_token", "scores_per_channel", "scores_per_token"]
