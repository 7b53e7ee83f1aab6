"""Decode attention over packed keys and values: the kernels.

What is computed stands in `reference.py`. Work is split along slots: a program handles one list and `SPLIT` packed
slots, or, the last one of each list, all that is not packed on both sides (sinks, recent slots, slots whose key is
packed but not their value). With logits z in powers of two, each split s gives

    lse_s = log2 sum_j 2**z_j        o_s = sum_j 2**(z_j - lse_s) v_j        out = sum_s 2**(lse_s - lse) o_s

Codes are never unpacked in memory. Two neighbouring bytes are spread into the halves of a 32-bit word; a mask and an OR
then turn one field of both bytes into two 16-bit floats 1 + code * 2**e, from which 1 is subtracted. The exponent e
differs from plane to plane: it goes to the query, or to the output. Scales of tokens multiply logits and
probabilities, not rows; scales of channels multiply rows, as queries are padded to 16 and rows are not.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.kernels.decode.reference import Coded, Format, Side
from kvbench.kernels.rotation import hadamard

SPLIT = 1024
"""Slots of a split: fixed, so that results do not depend on the batch."""
FEW = 8
"""Most queries per head."""

# -- rows ----------------------------------------------------------------------------------------------------------
# P is the `Plan` of a side. Rows are numbered within their list.


@triton.jit
def _channels(plane: tl.constexpr, chunk: tl.constexpr, P: tl.constexpr):
    """[kp] channels of a plane of a chunk."""
    k = chunk * P.cw + tl.arange(0, P.kp)
    if P.kind == "e2m1":
        return 2 * k + plane
    else:
        return plane * (P.dim // P.planes) + k


@triton.jit
def _bytes(codes, rows, live, chunk: tl.constexpr, P: tl.constexpr):
    """A chunk of rows [N]: [N, kp / 2] uint32, each two bytes: bits 0-7 and 16-23; what is between them is noise.

    Formats that the GPU converts itself: [N, kp] uint8.
    """
    if P.native:
        k = tl.arange(0, P.kp)
        return tl.load(codes + rows[:, None] * P.row + k[None, :], live[:, None] & (k < P.cw)[None, :], 0)
    else:
        word = tl.arange(0, P.kp // 2)
        mask = live[:, None]
        if P.cw != P.kp:
            mask = mask & (word < P.cw // 2)[None, :]
        at = rows[:, None] * P.row + (chunk * (P.cw // 2) + word)[None, :]
        x = tl.load(codes + at, mask, 0).to(tl.uint32)
        return x | (x << 8)


@triton.jit
def _float(bits, dtype: tl.constexpr):
    """Bits of a float of `dtype`, uint32 -> the float."""
    if dtype.primitive_bitwidth == 32:
        return bits.to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _widened(x, exponent: tl.constexpr, mantissa: tl.constexpr, dtype: tl.constexpr, pairs: tl.constexpr):
    """Small floats (sign, exponent, mantissa) in the low bits of x, or of its halves, as bits of `dtype`.

    Their exponents keep their values, so that what results is smaller by a power of two.
    """
    sign: tl.constexpr = dtype.primitive_bitwidth - 1
    shift: tl.constexpr = dtype.fp_mantissa_width - mantissa
    size: tl.constexpr = exponent + mantissa
    both: tl.constexpr = 0x10001 if pairs else 1
    magnitude = (x << shift) & ((((1 << size) - 1) << shift) * both)
    return magnitude | ((x << (sign - size)) & ((1 << sign) * both))


@triton.jit
def _fields(x, table, plane: tl.constexpr, P: tl.constexpr):
    """A plane of spread bytes [N, kp / 2]: numbers - center, times the plane's unit, [N, kp]."""
    mask: tl.constexpr = (1 << P.bits) - 1
    field = x >> (P.bits * plane)
    if P.kind == "lut":
        low, high = tl.load(table + (field & mask)).to(P.dtype), tl.load(table + ((field >> 16) & mask)).to(P.dtype)
    elif P.kind == "int" and P.mantissa == 0:  # by way of float32: 2**23 + code
        low = _float((field & mask) | 0x4B000000, tl.float32) - (8388608.0 + P.center)
        high = _float(((field >> 16) & mask) | 0x4B000000, tl.float32) - (8388608.0 + P.center)
        low, high = low.to(P.dtype), high.to(P.dtype)
    elif P.kind == "int":
        if P.bits * (plane + 1) <= P.mantissa:  # the field fits where it is
            pair = (x & ((mask << (P.bits * plane)) * 0x10001)) | P.one * 0x10001
        else:
            pair = (field & (mask * 0x10001)) | P.one * 0x10001
        low, high = _float(pair & 0xFFFF, P.dtype), _float(pair >> 16, P.dtype)
    elif P.dtype.primitive_bitwidth == 32:
        low = _float(_widened(field & mask, P.exponent, P.bits - 1 - P.exponent, P.dtype, False), P.dtype)
        high = _float(_widened((field >> 16) & mask, P.exponent, P.bits - 1 - P.exponent, P.dtype, False), P.dtype)
    else:
        pair = _widened(field, P.exponent, P.bits - 1 - P.exponent, P.dtype, True)
        low, high = _float(pair & 0xFFFF, P.dtype), _float(pair >> 16, P.dtype)
    number = tl.reshape(tl.join(low, high), (x.shape[0], P.kp))
    if P.kind == "int" and P.mantissa > 0:
        number = number - P.offsets[plane]
    elif P.raise_by != 1.0:
        number = number * P.raise_by
    return number


@triton.jit
def _numbers(x, table, plane: tl.constexpr, P: tl.constexpr):
    """A plane of what `_bytes` gives: [N, kp]."""
    if P.kind == "e4m3" and P.native:
        return x.to(tl.float8e4nv, bitcast=True).to(P.dtype)
    elif P.kind == "e5m2" and P.native:
        return x.to(tl.float8e5, bitcast=True).to(P.dtype)
    else:
        return _fields(x, table, plane, P)


@triton.jit
def _blocks(number, scale, rows, live, chunk: tl.constexpr, P: tl.constexpr):
    """Every second number of the channels of a chunk, times the E4M3 scale of its block of 16 and a constant."""
    block = tl.arange(0, P.kp // 8)
    mask = live[:, None]
    if P.cw != P.kp:
        mask = mask & (block < P.cw // 8)[None, :]
    at = rows[:, None] * P.groups + (chunk * (P.cw // 8) + block)[None, :]
    x = tl.load(scale + at, mask, 0).to(tl.uint32)
    # Exact: a number of 2 significant bits, a scale of 4, and powers of two that leave the product in range.
    s = _float(_widened(x, 4, 3, tl.float32, False), tl.float32) * 2.0**120
    s = (s * P.block_unit).to(P.dtype)
    shared = tl.reshape(number, (number.shape[0], P.kp // 8, 8)) * s[:, :, None]
    return tl.reshape(shared, (number.shape[0], P.kp))


@triton.jit
def _norms(rows, live, codes, table, P: tl.constexpr):
    """[N] float32: norms of rows of numbers."""
    planes: tl.constexpr = P.planes
    chunks: tl.constexpr = P.chunks
    total = tl.full([rows.shape[0]], 0.0, tl.float32)
    for c in tl.static_range(chunks):
        x = _bytes(codes, rows, live, c, P)
        for i in tl.static_range(planes):
            number = tl.where((tl.arange(0, P.kp) < P.cw)[None, :], _numbers(x, table, i, P).to(tl.float32), 0.0)
            total += tl.sum(number * number, 1)
    return tl.sqrt(tl.maximum(total, 1e-30))


@triton.jit
def _queries(q, row, used, P: tl.constexpr):
    """Queries [M, kp] of each plane of each chunk, divided by the plane's unit (all times the first one), and sums [M].

    The sums are without units.
    """
    planes: tl.constexpr = P.planes
    chunks: tl.constexpr = P.chunks
    parts = ()
    sums = ()
    for c in tl.static_range(chunks):
        for i in tl.static_range(planes):
            at = row[:, None] * P.dim + _channels(i, c, P)[None, :]
            x = tl.load(q + at, used[:, None] & (tl.arange(0, P.kp) < P.cw)[None, :], 0.0)
            parts = parts + ((x * (P.units[0] / P.units[i])).to(P.dtype),)
            sums = sums + (tl.sum(x.to(tl.float32), 1),)
    return parts, sums


@triton.jit
def _dense(codes, rows, live, P: tl.constexpr):
    """Rows that are not coded: [N, kp]."""
    d = tl.arange(0, P.kp)
    return tl.load(codes + rows[:, None] * P.row + d[None, :], live[:, None] & (d < P.cw)[None, :], 0.0).to(P.dtype)


@triton.jit
def _scores(q, q_sums, rows, live, codes, scale, zero, group_of, table, gather: tl.constexpr, P: tl.constexpr):
    """Queries times packed rows [N]: [M, N] float32. Unless gather, the rows are of one group."""
    planes: tl.constexpr = P.planes
    chunks: tl.constexpr = P.chunks
    S = tl.full([q[0].shape[0], rows.shape[0]], 0.0, tl.float32)
    if P.kind == "dense":
        return tl.dot(q[0], tl.trans(_dense(codes, rows, live, P)), S, input_precision="ieee")
    else:
        if P.per == "channel":
            if not gather:
                group = (tl.min(rows, 0) // P.group) * P.dim
            elif group_of is None:
                group = (rows // P.group) * P.dim
            else:
                group = tl.load(group_of + rows, live, 0).to(tl.int32) * P.dim
        q_sum = tl.full([q[0].shape[0]], 0.0, tl.float32)
        for c in tl.static_range(chunks):
            x = _bytes(codes, rows, live, c, P)
            for i in tl.static_range(planes):
                k = _numbers(x, table, i, P)
                if P.per == "channel":
                    d = _channels(i, c, P)
                    inside = tl.arange(0, P.kp) < P.cw
                    if gather:
                        mask = live[:, None] & inside[None, :]
                        s = tl.load(scale + group[:, None] + d[None, :], mask, 0.0).to(P.dtype)
                        z = tl.load(zero + group[:, None] + d[None, :], mask, 0.0).to(P.dtype)
                        k = k * s + z * P.units[i]
                    else:
                        s = tl.load(scale + group + d, inside, 0.0).to(P.dtype)
                        z = tl.load(zero + group + d, inside, 0.0).to(P.dtype) * P.units[i]
                        k = k * s[None, :] + z[None, :]
                elif P.per == "block":
                    k = _blocks(k, scale, rows, live, c, P)
                if P.per == "token" and P.groups > 1:
                    at = rows * P.groups + (i * (P.dim // P.planes) + c * P.cw) // P.width
                    part = tl.dot(q[c * planes + i], tl.trans(k), input_precision="ieee")
                    S += part * tl.load(scale + at, live, 0.0).to(tl.float32)[None, :]
                    if zero is not None:
                        z = tl.load(zero + at, live, 0.0).to(tl.float32) * P.units[0]
                        S += q_sums[c * planes + i][:, None] * z[None, :]
                else:
                    S = tl.dot(q[c * planes + i], tl.trans(k), S, input_precision="ieee")
                    q_sum += q_sums[c * planes + i]
        S = S * (1.0 / P.units[0])
        if P.per == "token" and P.groups == 1:
            s = tl.load(scale + rows, live, 0.0).to(tl.float32)
            if P.normalized:
                s = s / _norms(rows, live, codes, table, P)
            S = S * s[None, :]
            if zero is not None:
                S += q_sum[:, None] * tl.load(zero + rows, live, 0.0).to(tl.float32)[None, :]
        return S


@triton.jit
def _mix(p, alpha, acc, bias, rows, live, codes, scale, zero, table, P: tl.constexpr):
    """acc * alpha + p [M, N] times packed rows [N], for each plane of each chunk, [M, kp]; the same for zeros, in bias.

    The planes still have their units.
    """
    planes: tl.constexpr = P.planes
    chunks: tl.constexpr = P.chunks
    new = ()
    if P.kind == "dense":
        old = acc[0] * alpha[:, None]
        new = new + (tl.dot(p.to(P.dtype), _dense(codes, rows, live, P), old, input_precision="ieee"),)
    else:
        if zero is not None:
            j = tl.arange(0, 16)
            z = tl.load(zero + rows[:, None] * P.groups + j[None, :], live[:, None] & (j < P.groups)[None, :], 0.0)
            bias = tl.dot(p.to(P.dtype), z.to(P.dtype), bias * alpha[:, None], input_precision="ieee")
        if P.normalized:
            norm = _norms(rows, live, codes, table, P)
        for c in tl.static_range(chunks):
            x = _bytes(codes, rows, live, c, P)
            for i in tl.static_range(planes):
                v = _numbers(x, table, i, P)
                weights = p
                if P.per == "block":
                    v = _blocks(v, scale, rows, live, c, P)
                elif P.per == "token":
                    at = rows * P.groups + (i * (P.dim // P.planes) + c * P.cw) // P.width
                    s = tl.load(scale + at, live, 0.0).to(tl.float32)
                    if P.normalized:
                        s = s / norm
                    weights = p * s[None, :]
                old = acc[c * planes + i] * alpha[:, None]
                new = new + (tl.dot(weights.to(P.dtype), v, old, input_precision="ieee"),)
    return new, bias


@triton.jit
def _first_scale(start, group_of, P: tl.constexpr):
    """Where the scales of the list begin whose first row is `start`."""
    if P.per == "channel":
        if group_of is None:
            return start // P.group * P.dim
        else:
            return start * 0
    else:
        return start * P.groups


@triton.jit
def _zeros(M: tl.constexpr, P: tl.constexpr):
    """[M, kp] for each plane of each chunk."""
    count: tl.constexpr = P.planes * P.chunks
    parts = ()
    for _ in tl.static_range(count):
        parts = parts + (tl.full([M, P.kp], 0.0, tl.float32),)
    return parts


# -- splits --------------------------------------------------------------------------------------------------------


@triton.jit
def _softmax(S, top, total, seen):
    """One step of the online softmax in base 2 over logits [M, N]: probabilities, new top and total, and old / new."""
    S = tl.where(seen, S, float("-inf"))
    highest = tl.maximum(top, tl.max(S, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # nothing seen yet: no inf - inf
    p = tl.exp2(S - base[:, None])
    alpha = tl.exp2(top - base)
    return p, highest, total * alpha + tl.sum(p, 1), alpha


@triton.jit
def _logits(S, scaling, softcap, capped: tl.constexpr):
    """Products -> logits in base 2."""
    if capped:
        x = S * (scaling / softcap)
        return softcap * (1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)) * 1.4426950408889634  # tanh
    else:
        return S * (scaling * 1.4426950408889634)


@triton.jit
def _body(k_sinks, k_packed, v_sinks, v_packed, N: tl.constexpr, aligned: tl.constexpr):
    """First slot that is packed on both sides (aligned: from where on tiles of keys are of one group), and the end."""
    if aligned:
        first = k_sinks + (tl.maximum(v_sinks - k_sinks, 0) + N - 1) // N * N
    else:
        first = tl.maximum(k_sinks, v_sinks)
    return first, tl.maximum(tl.minimum(k_sinks + k_packed, v_sinks + v_packed), first)


@triton.jit
def split_attention(
    q, k_q, q_position, k_position, total, out, lse, probs, tops,
    k_lists, k_codes, k_scale, k_zero, k_group_of, k_table, k_factor, k_tail, k_unit,
    v_lists, v_codes, v_scale, v_zero, v_table, v_factor, v_tail, v_unit,
    heads, slots, n_tops, body_tops, position_batch, position_head,
    k_tail_batch, k_tail_head, v_tail_batch, v_tail_head, scaling, softcap,
    G: tl.constexpr, T: tl.constexpr, M: tl.constexpr, N: tl.constexpr, MIXED_N: tl.constexpr, LENGTH: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, GATHER: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Grid (splits + 1, L): out [L, splits + 2, G * T, D] float32 (the last but one and last: packed and unpacked share
    of what is mixed), lse [L, splits + 1, G * T]; if given, probs [L, G * T, slots] relative to 2**tops [L, n_tops,
    G * T] of their tile."""
    split, splits = tl.program_id(0), tl.num_programs(0) - 1
    at = tl.program_id(1).to(tl.int64)
    batch, head = at // heads, at % heads
    m = tl.arange(0, M)
    used = m < G * T
    row = at * (G * T) + m

    k_start, k_sinks = tl.load(k_lists + 4 * at), tl.load(k_lists + 4 * at + 1).to(tl.int32)
    k_packed, k_shift = tl.load(k_lists + 4 * at + 2).to(tl.int32), tl.load(k_lists + 4 * at + 3).to(tl.int32)
    v_start, v_sinks = tl.load(v_lists + 4 * at), tl.load(v_lists + 4 * at + 1).to(tl.int32)
    v_packed, v_shift = tl.load(v_lists + 4 * at + 2).to(tl.int32), tl.load(v_lists + 4 * at + 3).to(tl.int32)
    # From a list's first row on, offsets fit into 32 bits.
    k_codes += k_start * K.row
    v_codes += v_start * V.row
    k_scales, v_scales = _first_scale(k_start, k_group_of, K), _first_scale(v_start, None, V)
    if k_group_of is not None:
        k_group_of += k_start
    if k_scale is not None:
        k_scale += k_scales
    if k_zero is not None:
        k_zero += k_scales
    if v_scale is not None:
        v_scale += v_scales
    if v_zero is not None:
        v_zero += v_scales
    k_factor_of, v_factor_of = k_unit, v_unit
    if k_factor is not None:
        k_factor_of = k_factor_of * tl.load(k_factor + head)
    if v_factor is not None:
        v_factor_of = v_factor_of * tl.load(v_factor + head)
    live_slots = tl.load(total + at)
    first, last = _body(k_sinks, k_packed, v_sinks, v_packed, N, K.per == "channel" and not GATHER)

    top = tl.full([M], float("-inf"), tl.float32)
    norm = tl.full([M], 0.0, tl.float32)
    acc = _zeros(M, V)
    bias = tl.full([M, 16], 0.0, tl.float32)
    qs, q_sums = _queries(k_q, row, used, K)
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    entry = (at * (splits + 2) + split) * (G * T) + m

    if split < splits:
        begin = first + split * LENGTH
        end = tl.minimum(begin + LENGTH, last)
        for tile in range(0, end - begin, N):
            slot = begin + tile + tl.arange(0, N)
            live = slot < end
            S = _scores(
                qs, q_sums, slot - k_sinks, live, k_codes, k_scale, k_zero, k_group_of, k_table, GATHER, K
            )  # fmt: skip
            S = _logits(S * k_factor_of, scaling, softcap, CAPPED)
            p, top, norm, alpha = _softmax(S, top, norm, live[None, :])
            acc, bias = _mix(p, alpha, acc, bias, slot - v_sinks, live, v_codes, v_scale, v_zero, v_table, V)
            if probs is not None:
                where = (row * slots)[:, None] + slot[None, :]
                tl.store(probs + where, p.to(probs.dtype.element_ty), used[:, None] & live[None, :])
                number = at * n_tops + split * (LENGTH // N) + tile // N
                tl.store(tops + number * (G * T) + m, top, used)
    else:
        q_all = tl.load(q + row[:, None] * D + d[None, :], used[:, None] & inside, 0.0).to(V.dtype)
        asked = tl.load(q_position + batch * T + m % T, used, -1)
        acc_tail = tl.full([M, DP], 0.0, tl.float32)
        k_tail += batch * k_tail_batch + head * k_tail_head
        v_tail += batch * v_tail_batch + head * v_tail_head
        k_position += batch * position_batch + head * position_head
        mixed = first + live_slots - last
        for step in range(0, mixed, MIXED_N):
            slot = step + tl.arange(0, MIXED_N)
            slot = tl.where(slot < first, slot, slot + (last - first))
            live = slot < live_slots
            k_row, v_row = slot - k_sinks, slot - v_sinks
            k_in, v_in = (k_row >= 0) & (k_row < k_packed) & live, (v_row >= 0) & (v_row < v_packed) & live
            S = _scores(qs, q_sums, k_row, k_in, k_codes, k_scale, k_zero, k_group_of, k_table, True, K)
            k_at = tl.where(slot < k_sinks, slot, slot - k_shift) * D
            k = tl.load(k_tail + k_at[:, None] + d[None, :], (live & (k_in == 0))[:, None] & inside, 0.0).to(V.dtype)
            S_tail = tl.dot(q_all, tl.trans(k), input_precision="ieee")
            S = _logits(tl.where(k_in[None, :], S * k_factor_of, S_tail), scaling, softcap, CAPPED)
            when = tl.load(k_position + slot, live, -1)
            seen = (when >= 0)[None, :] & (when[None, :] <= asked[:, None]) & live[None, :]
            p, top, norm, alpha = _softmax(S, top, norm, seen)
            p_in = tl.where(v_in[None, :], p, 0.0)
            acc, bias = _mix(p_in, alpha, acc, bias, v_row, v_in, v_codes, v_scale, v_zero, v_table, V)
            v_at = tl.where(slot < v_sinks, slot, slot - v_shift) * D
            v = tl.load(v_tail + v_at[:, None] + d[None, :], (live & (v_in == 0))[:, None] & inside, 0.0).to(V.dtype)
            acc_tail = tl.dot(p.to(V.dtype), v, acc_tail * alpha[:, None], input_precision="ieee")
            if probs is not None:
                where = (row * slots)[:, None] + slot[None, :]
                tl.store(probs + where, p.to(probs.dtype.element_ty), used[:, None] & live[None, :])
                tl.store(tops + (at * n_tops + body_tops + step // MIXED_N) * (G * T) + m, top, used)
        share = acc_tail / tl.where(norm > 0, norm, 1.0)[:, None]
        tl.store(out + (entry + G * T)[:, None] * D + d[None, :], share, used[:, None] & inside)

    divisor = v_factor_of / tl.where(norm > 0, norm, 1.0)
    planes: tl.constexpr = V.planes
    chunks: tl.constexpr = V.chunks
    for c in tl.static_range(chunks):
        for i in tl.static_range(planes):
            mean = acc[c * planes + i] * (1.0 / V.units[i])
            channel = _channels(i, c, V)
            if v_zero is not None:
                j = (i * (D // planes) + c * V.cw) // V.width
                mean += tl.sum(tl.where(tl.arange(0, 16)[None, :] == j, bias, 0.0), 1)[:, None]
            fits = used[:, None] & (tl.arange(0, V.kp) < V.cw)[None, :]
            tl.store(out + entry[:, None] * D + channel[None, :], mean * divisor[:, None], fits)
    found = tl.where(norm > 0, top + tl.log2(tl.where(norm > 0, norm, 1.0)), float("-inf"))
    tl.store(lse + (at * (splits + 1) + split) * (G * T) + m, found, used)


@triton.jit
def merge_splits(
    parts, lse, sinks, out, packed_out, whole, heads, splits, D: tl.constexpr, G: tl.constexpr, T: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """Grid (L * G * T): out [L * G * T, D], whole [L * G * T] the merged lse. With packed_out, which then gets what is
    packed, out gets only what is not."""
    row = tl.program_id(0).to(tl.int64)
    at, m_row = row // (G * T), row % (G * T)
    d = tl.arange(0, DP)
    top = float("-inf")
    sink = float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + (at % heads) * G + m_row // T).to(tl.float32) * 1.4426950408889634
        top = sink
    for s in range(0, splits + 1):
        top = tl.maximum(top, tl.load(lse + (at * (splits + 1) + s) * (G * T) + m_row))
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = 0.0
    if sinks is not None:
        weight = tl.exp2(sink - base)
    acc = tl.full([DP], 0.0, tl.float32)
    for s in range(0, splits + 1):
        w = tl.exp2(tl.load(lse + (at * (splits + 1) + s) * (G * T) + m_row) - base)
        weight += w
        part = (at * (splits + 2) + s) * (G * T) + m_row
        acc += w * tl.load(parts + part * D + d, tl.where(d < D, w, 0.0) > 0, 0.0)
    w = tl.exp2(tl.load(lse + (at * (splits + 1) + splits) * (G * T) + m_row) - base)
    part = (at * (splits + 2) + splits + 1) * (G * T) + m_row
    tail = w * tl.load(parts + part * D + d, tl.where(d < D, w, 0.0) > 0, 0.0)
    total = tl.where(weight > 0, weight, 1.0)
    if packed_out is not None:
        tl.store(packed_out + row * D + d, acc / total, d < D)
        acc = tail
    else:
        acc += tail
    tl.store(out + row * D + d, (acc / total).to(out.dtype.element_ty), d < D)
    tl.store(whole + row, tl.where(weight > 0, base + tl.log2(total), float("inf")))


@triton.jit
def _sum_tile(probs, tops, whole, sums, at, slot, live, tile, slots, R: tl.constexpr, M: tl.constexpr):
    row = tl.arange(0, M)
    both = (row < R)[:, None] & live[None, :]
    filled = tl.where(row < R, tl.max(live.to(tl.int32), 0), 0) > 0
    scale = tl.exp2(tl.load(tops + tile * R + row, filled, 0.0) - tl.load(whole + at * R + row, filled, 0.0))
    p = tl.load(probs + (at * R + row)[:, None] * slots + slot[None, :], both, 0.0).to(tl.float32)
    tl.store(sums + at * slots + slot, tl.sum(p * scale[:, None], 0), live)


@triton.jit
def sum_probabilities(
    probs, tops, whole, total, k_lists, v_lists, sums, slots, n_tops, body_tops, R: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, MIXED_N: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, L): sums [L, slots] of what `split_attention` left in probs and tops. R = G * T."""
    tile = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64)
    k_sinks, k_packed = tl.load(k_lists + 4 * at + 1), tl.load(k_lists + 4 * at + 2)
    v_sinks, v_packed = tl.load(v_lists + 4 * at + 1), tl.load(v_lists + 4 * at + 2)
    live_slots = tl.load(total + at).to(tl.int64)
    first, last = _body(k_sinks, k_packed, v_sinks, v_packed, N, ALIGNED)
    if tile < body_tops:
        body = first + tile * N + tl.arange(0, N)
        _sum_tile(probs, tops, whole, sums, at, body, body < last, at * n_tops + tile, slots, R, M)
    else:
        mixed = (tile - body_tops) * MIXED_N + tl.arange(0, MIXED_N)
        mixed = tl.where(mixed < first, mixed, mixed + (last - first))
        _sum_tile(probs, tops, whole, sums, at, mixed, mixed < live_slots, at * n_tops + tile, slots, R, M)


# -- launching -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Constants of one side.

    Rows are cut into `chunks` of bytes, and these into `planes` of `cw` channels that share their scale per token,
    padded to `kp`. dim: D. dtype: in which is multiplied. row: entries from one row to the next. groups: scales of a
    row. units: what the numbers of each plane are multiplied by. Of int codes: mantissa, bits of `dtype` that they may
    take (0: none; they are converted); one, the bits of 1.0; offsets, per plane, 1.0 and the center. Of small floats:
    exponent, its bits; raise_by, what makes up for the exponents of bfloat16 and float32, which are too small for sums;
    block_unit, what scales of blocks are multiplied by, for the same end; native, the GPU converts them itself.
    """

    kind: str
    bits: int
    per: str
    width: int
    group: int
    center: int
    normalized: bool
    dim: int
    dtype: tl.dtype
    row: int
    cw: int
    kp: int
    planes: int = 1
    chunks: int = 1
    groups: int = 1
    units: tuple[float, ...] = (1.0,)
    mantissa: int = 0
    one: int = 0
    offsets: tuple[float, ...] = ()
    exponent: int = 0
    raise_by: float = 1.0
    block_unit: float = 1.0
    native: bool = False


def plan(form: Format, dim: int, dtype: torch.dtype, native: bool = False) -> Plan:
    """How rows of a format are read when queries are of `dtype`. native: the GPU can convert floats of 8 bits."""
    shared = (form.kind, form.bits, form.per, form.width or dim, form.group, form.center, form.normalized, dim)
    if form.kind == "dense":
        return Plan(*shared, _TYPES[dtype], dim, dim, _padded(dim))
    planes, half = 8 // form.bits, dtype == torch.float16
    cw = dim // planes
    if form.per == "token":
        cw = gcd(cw, form.width)
    groups = dim // form.width if form.per in ("token", "block") else 1
    made = Plan(
        *shared,
        _TYPES[dtype],
        dim // planes // 2,
        cw,
        _padded(cw),
        planes,
        dim // planes // cw,
        groups,
        (1.0,) * planes,
    )
    if form.kind == "int":
        mantissa = {torch.float16: 10, torch.bfloat16: 7}.get(dtype, 0)
        if form.bits > mantissa:
            return made
        fits = [form.bits * (i + 1) <= mantissa for i in range(planes)]
        units = tuple(2.0 ** (form.bits * i * fits[i] - mantissa) for i in range(planes))
        offsets = tuple(1.0 + form.center * unit for unit in units)
        return replace(made, mantissa=mantissa, one=0x3C00 if half else 0x3F80, units=units, offsets=offsets)
    if form.kind == "e2m1":  # fp16: 2**-14 of a number times 2**7 of a scale; others: 2**-126 times 2**118
        return replace(
            made, exponent=2, units=(2.0**-7 if half else 2.0**-8,) * planes, block_unit=2.0**7 if half else 2.0**118
        )
    if form.kind in ("e4m3", "e5m2") and native:
        return replace(made, native=True, row=dim)
    if form.kind == "e4m3":
        return replace(made, exponent=4, units=(2.0**-8 if half else 1.0,), raise_by=1.0 if half else 2.0**120)
    if form.kind == "e5m2":
        return replace(made, exponent=5, raise_by=1.0 if half else 2.0**112)
    return made


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


class Tiles(NamedTuple):
    """Slots of a tile, of packed slots and of mixed ones; warps and stages of the loop over tiles."""

    body: int
    mixed: int
    warps: int
    stages: int


def _gathers(keys: Side) -> bool:
    """Whether rows of one tile may have different scales per channel."""
    assert keys.coded is not None
    form = keys.coded.format
    return form.per == "channel" and (keys.coded.group_of is not None or form.group % 16 != 0)


def tiles(keys: Side, dim: int) -> Tiles:
    assert keys.coded is not None
    form, body = keys.coded.format, 64
    if form.per == "channel" and not _gathers(keys):
        body = min(128, form.group & -form.group)
    return Tiles(body, 16, 4, 2)


def reason(query: Tensor, keys: Side, values: Side) -> str | None:
    """Why `packed_decode` cannot run; None: it can."""
    interpreted, dim = _interpreted(), query.shape[-1]
    if query.device.type != ("cpu" if interpreted else "cuda"):
        return f"the {'interpreter runs on the CPU' if interpreted else 'kernels need a GPU'}, not {query.device}"
    if query.dtype not in _TYPES or (interpreted and query.dtype == torch.bfloat16):
        return f"no kernel computes in {query.dtype}"
    if query.shape[2] > FEW:
        return f"{query.shape[2]} queries per head; the kernel takes {FEW}"
    if dim > 256 or dim % 16:
        return f"head_dim={dim} is not a multiple of 16 up to 256"
    for name, side in (("keys", keys), ("values", values)):
        if side.coded is None:
            return f"{name} are in a format that no kernel reads"
        form = side.coded.format
        if side.tail.stride(3) != 1 or side.tail.stride(2) != dim:
            return f"{name} do not lie one slot after the other"
        if form.kind != "dense" and plan(form, dim, query.dtype).cw % 2:
            return f"{form.bits}-bit codes of {name} make odd runs of bytes, head_dim={dim}, width={form.width}"
        if name == "values" and form.per == "channel":
            return "values with scales per channel are not supported"
        if form.per == "token" and dim // form.width > 16:
            return f"more than 16 scales per token of {name}"
    return None


def _interpreted() -> bool:
    return not isinstance(split_attention, triton.JITFunction)


def packed_decode(
    query: Tensor,
    keys: Side,
    values: Side,
    query_position: Tensor,
    key_position: Tensor,
    total: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sums: bool = False,
    valid: Tensor | None = None,
    split: int = SPLIT,
    chosen: Tiles | None = None,
    native: bool | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As in `reference.py`, for what `reason` has nothing against. split: slots of a split, a power of two.
    native: let the GPU convert floats of 8 bits itself; None: where it can.
    """
    assert keys.coded is not None and values.coded is not None
    batch, query_heads, tokens, dim = query.shape
    heads, slots = keys.tail.shape[1], key_position.shape[-1]
    group, lists = query_heads // heads, batch * heads
    rows, device = group * tokens, query.device
    chosen = chosen or tiles(keys, dim)
    chosen = chosen._replace(body=min(chosen.body, split))
    splits = triton.cdiv(min(keys.most, values.most), split)
    query = query.contiguous()
    parts = torch.empty(lists, splits + 2, rows, dim, dtype=torch.float32, device=device)
    lse = torch.empty(lists, splits + 1, rows, dtype=torch.float32, device=device)
    body_tops = triton.cdiv(min(keys.most, values.most), chosen.body)
    n_tops = body_tops + triton.cdiv(slots, chosen.mixed)
    probs = tops = None
    if sums:
        kept = torch.float32 if query.dtype == torch.float32 else torch.float16
        probs = torch.empty(lists, rows, slots, dtype=kept, device=device)
        tops = torch.empty(lists, n_tops, rows, dtype=torch.float32, device=device)
    if key_position.stride(2) != 1:
        key_position = key_position.contiguous()
    if native is None:
        native = query.is_cuda and torch.cuda.get_device_capability(device) >= (8, 9)
    plans = [plan(side.coded.format, dim, query.dtype, native) for side in (keys, values) if side.coded is not None]
    arguments: dict[str, Any] = {}
    for name, side, made in zip("kv", (keys, values), plans, strict=True):
        coded = side.coded
        assert coded is not None
        arguments |= {
            f"{name}_lists": side.lists, f"{name}_codes": _words(coded, made), f"{name}_scale": coded.scale,
            f"{name}_zero": coded.zero, f"{name}_table": coded.table, f"{name}_factor": coded.factor,
            f"{name}_tail": side.tail, f"{name}_unit": coded.unit, f"{name}_tail_batch": side.tail.stride(0),
            f"{name}_tail_head": side.tail.stride(1), f"{name}_group_of": coded.group_of,
        }  # fmt: skip
    del arguments["v_group_of"]
    rows_padded, gathers = _padded(rows), _gathers(keys)
    split_attention[(splits + 1, lists)](
        query, _turned(query, keys.coded), query_position.contiguous(), key_position, total, parts, lse, probs, tops,
        heads=heads, slots=slots, n_tops=n_tops, body_tops=body_tops, position_batch=key_position.stride(0),
        position_head=key_position.stride(1) if key_position.shape[1] > 1 else 0, scaling=scaling,
        softcap=softcap or 0.0, G=group, T=tokens, M=rows_padded, N=chosen.body, MIXED_N=chosen.mixed,
        LENGTH=split, D=dim, DP=_padded(dim), CAPPED=softcap is not None, GATHER=gathers, K=plans[0], V=plans[1],
        num_warps=chosen.warps, num_stages=chosen.stages, **arguments,
    )  # fmt: skip
    out = torch.empty_like(query, dtype=query.dtype if values.coded.rotation is None else torch.float32)
    packed_out = None if values.coded.rotation is None else torch.empty_like(out)
    whole = torch.empty(lists * rows, dtype=torch.float32, device=device)
    merge_splits[(lists * rows,)](
        parts, lse, sinks, out, packed_out, whole, heads, splits, D=dim, G=group, T=tokens, DP=_padded(dim)
    )
    if packed_out is not None and values.coded.rotation is not None:
        out = (out + hadamard(packed_out, *values.coded.rotation, inverse=True)).to(query.dtype)
    if not sums:
        return out, None
    if valid is not None:
        pads = ~valid[:, None, None].expand(batch, heads, group, tokens).reshape(-1)
        whole = whole.masked_fill(pads, torch.inf)
    received = torch.zeros(batch, heads, slots, dtype=torch.float32, device=device)
    sum_probabilities[(n_tops, lists)](
        probs, tops, whole, total, keys.lists, values.lists, received, slots, n_tops, body_tops,
        R=rows, M=rows_padded, N=chosen.body, MIXED_N=chosen.mixed, ALIGNED=plans[0].per == "channel" and not gathers,
    )  # fmt: skip
    return out, received


def _words(coded: Coded, made: Plan) -> Tensor:
    """Codes as the kernels load them: two bytes at a time, unless each is converted by itself."""
    return coded.codes if made.kind == "dense" or made.native else coded.codes.view(torch.uint16)


def _turned(query: Tensor, coded: Coded) -> Tensor:
    if coded.rotation is None:
        return query
    return hadamard(query, *coded.rotation).to(query.dtype)


_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
