"""Decode attention that reads packed keys and values: what describes them, and the reference in PyTorch.

The kernels stand in `kvbench.kernels.decode.triton`, which only what uses them imports.
"""

from kvbench.kernels.decode.reference import Coded, Format, Side, dense_coded, packed_decode

__all__ = ["Coded", "Format", "Side", "dense_coded", "packed_decode"]
