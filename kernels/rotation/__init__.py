"""Rotations of heads: RoPE turned after the fact, and block-wise Hadamard matrices (PyTorch reference)."""

from kvbench.kernels.rotation.reference import hadamard, rotate

__all__ = ["hadamard", "rotate"]
