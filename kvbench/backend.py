"""Attention to packed slots by the kernels of `kvbench.kernels.decode`, where `kvbench.kernels.choice` chooses them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from kvbench.kernels.choice import chosen, loaded
from kvbench.kernels.decode import Coded, Format, Side, dense_coded
from kvbench.policies.interface import KV
from kvbench.policies.store import Held, Plain

_log = logging.getLogger("kvbench")
_said: set[str] = set()

last: str | None = None
"""The backend that attended to packed slots last; None: none has."""


def attend(
    kv: KV,
    query: Tensor,
    position: Tensor,
    *,
    sums: bool,
    valid: Tensor | None = None,
    unless: str | None = None,
    **geometry: Any,
) -> tuple[Tensor, Tensor | None] | None:
    """Attention of the newest tokens to all that is held, by a kernel; None: PyTorch has to do it.

    query [B, Hq, T, D], position and valid [B, T]; output as query, and, with `sums`, what each slot received,
    [B, H, S]. unless: why no kernel can run, if that is known. Says once why one that was to run cannot.
    """
    global last
    name = chosen(query.device)
    if name == "torch":
        last = name
        return None
    kernels, why = loaded("decode", name)
    why = why or unless
    if kernels is not None and why is None:
        keys, values = side(kv.keys, query.shape[2]), side(kv.values, query.shape[2])
        why = kernels.reason(query, keys, values)
    if kernels is None or why is not None:
        if why not in _said:
            _said.add(str(why))
            _log.warning("attention to packed slots runs in PyTorch, not in %s: %s", name, why)
        last = "torch"
        return None
    last = name
    total = kv.counts.per_head.flatten().int()
    found: tuple[Tensor, Tensor | None] = kernels.packed_decode(
        query, keys, values, position, kv.position, total, sums=sums, valid=valid, **geometry
    )
    return found


def side(held: Held, tokens: int) -> Side:
    """What the kernels read of keys or values; the newest `tokens` slots are in full precision."""
    counts, body, tail = held.tail_counts, held.body, held.tail
    if tail.is_contiguous():
        tail = tail.view(-1).view(tail.shape)  # dims of one element may have had any stride
    if body is None or not body.counts.total:
        bare = Side(tail, torch.empty(0), None, 0)
        return dense_coded(bare, (counts.per_head.flatten() - tokens).clamp(min=0))
    packed = body.counts.per_head.flatten()
    sinks = torch.zeros_like(packed) if held.sinks is None else held.sinks.per_head.flatten()
    lists = torch.stack([body.counts.starts(), sinks, packed, packed], 1)
    coded: Coded | None = None
    if isinstance(body.codec, Plain):
        coded = Coded(Format("dense"), body.rows["plain"])
    elif hasattr(body.codec, "coded"):
        coded = body.codec.coded(body)
    return Side(tail, lists, coded, body.counts.width)
