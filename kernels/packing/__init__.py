"""Packed number formats: integer codes in planar and interleaved bytes, E2M1, E4M3 (PyTorch reference)."""

from kvbench.kernels.packing.reference import (
    E2M1_MAX,
    E4M3_MAX,
    cast,
    decode_e2m1,
    decode_e4m3,
    divide,
    encode_e2m1,
    encode_e4m3,
    from_kivi_int32,
    pack_interleaved,
    pack_planar,
    to_kivi_int32,
    unpack_interleaved,
    unpack_planar,
)

__all__ = [
    "E2M1_MAX",
    "E4M3_MAX",
    "cast",
    "decode_e2m1",
    "decode_e4m3",
    "divide",
    "encode_e2m1",
    "encode_e4m3",
    "from_kivi_int32",
    "pack_interleaved",
    "pack_planar",
    "to_kivi_int32",
    "unpack_interleaved",
    "unpack_planar",
]
