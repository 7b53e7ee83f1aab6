"""Attention over slots that carry positions.

A slot is visible to a query when it is live (position >= 0) and not younger than the query:

    visible[i, s] = 0 <= key_position[s] <= query_position[i]
    logit[i, s]   = softcap(scaling * q_i . k_s)                     softcap(x) = c * tanh(x / c), if the model has one
    p[i, s]       = exp(logit[i, s] - LSE_i)                         LSE_i includes the learned sink logit, if any
    out_i         = sum_s p[i, s] v_s                                column_sum_s = sum_i p[i, s]

A selection narrows what is visible further: to slots that are `allowed`, or of the `recent` newest positions up to the
query's.

Everything works on blocks of queries, so no matrix of queries x slots is ever held whole.

Letters: B batch, H key-value heads, Hq = H * G query heads, T queries, S slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

BLOCK_ELEMENTS = 2**22
"""Most logits held at a time on a CPU (16 MiB in float32: they stay in cache); 16 times as many on other devices."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    allowed: Tensor | None = None,
    recent: int | Tensor = 0,
) -> Tensor:
    """Attention output [B, Hq, T, D] in the query's dtype.

    query [B, Hq, T, D]; keys, values [B, H, S, D]; query_position [B, T]; key_position [B, H or 1, S], -1 = dead;
    sinks [Hq] learned sink logits; allowed [B, H or Hq or 1, S] bool. A query that sees no slot gets zeros.
    """
    out = torch.empty_like(query)
    for block in _blocks(query, keys):
        visible = _visible(query[:, :, block], keys.shape[1], query_position[:, block], key_position, allowed, recent)
        if softcap is None and sinks is None:
            out[:, :, block] = _sdpa(query[:, :, block], keys, values, visible, scaling)
        else:
            weights = _weights(query[:, :, block], keys, visible, scaling, softcap, sinks)
            mixed = weights.to(values.dtype) @ values  # [B, H, G*T, D]
            out[:, :, block] = mixed.view_as(out[:, :, block])
    return out


def attend_tiles(
    query: Tensor,
    scores: Callable[[Tensor, int, int], Tensor],
    mix: Callable[[Tensor, int, int], Tensor],
    heads: int,
    tile: int,
    query_position: Tensor,
    key_position: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    allowed: Tensor | None = None,
    recent: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:
    """As `attend`, for a few queries and packed slots: output, and attention rows [B, H, G*T, S] float32.

    heads: H. For slots a to b, at most `tile` at a time, all float32: scores(q [B, H, M, D], a, b) -> [B, H, M, b - a]
    multiplies queries and keys, mix(w [B, H, M, b - a], a, b) -> [B, H, M, D] sums weighted values.
    """
    slots = key_position.shape[-1]
    ends = [(start, min(start + tile, slots)) for start in range(0, slots, tile)]
    scaled = _group(query, heads).float() * scaling
    logits = [scores(scaled, a, b) for a, b in ends]
    visible = _visible(query, heads, query_position, key_position, allowed, recent)
    raw = logits[0] if len(ends) == 1 else torch.cat(logits, -1)
    weights = _normalized(_capped(raw, softcap), visible, query, sinks)
    out = sum(mix(weights[..., a:b], a, b) for a, b in ends)
    assert isinstance(out, Tensor)
    return out.to(query.dtype).view_as(query), weights


def attend_causal(query: Tensor, keys: Tensor, values: Tensor, *, scaling: float) -> tuple[Tensor, Tensor | None]:
    """Plain causal attention of the newest tokens to all S slots, themselves the last T: fused kernels without a mask.

    Output [B, Hq, T, D], and LSE [B, Hq, T] float32 as the fused kernel has it; None where it has none, or on the CPU
    none that is exact: in half precision its exponentials are wrong by 6e-5. With slots before the new tokens there are
    two passes, over those and over the tokens themselves:

        LSE_i = log(exp(LSE1_i) + exp(LSE2_i))          out_i = exp(LSE1_i - LSE_i) out1_i + exp(LSE2_i - LSE_i) out2_i
    """
    before = keys.shape[2] - query.shape[2]
    found = _fused(query, keys[:, :, before:], values[:, :, before:], True, scaling)
    earlier = _fused(query, keys[:, :, :before], values[:, :, :before], False, scaling) if before else None
    if found is None or (before and earlier is None):
        if before:
            at = torch.arange(keys.shape[2], device=query.device).expand(query.shape[0], -1)
            return attend(query, keys, values, at[:, before:], at[:, None], scaling=scaling), None
        grouped = query.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped
        ), None
    out, lse = found
    if earlier is not None:
        whole = torch.logaddexp(lse, earlier[1])
        out = out * (lse - whole).exp()[..., None] + earlier[0] * (earlier[1] - whole).exp()[..., None]
        out, lse = out.to(query.dtype), whole
    return out, None if query.device.type == "cpu" and query.element_size() < 4 else lse


def _fused(query: Tensor, keys: Tensor, values: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor] | None:
    """Output and LSE of the kernel that `scaled_dot_product_attention` would choose, if that returns both."""
    operators, grouped = torch.ops.aten, query.shape[1] != keys.shape[1]
    chosen = torch._fused_sdp_choice(query, keys, values, None, 0.0, causal, scale=scaling, enable_gqa=grouped)
    if chosen == SDPBackend.FLASH_ATTENTION.value and query.device.type == "cpu":
        found = operators._scaled_dot_product_flash_attention_for_cpu(query, keys, values, 0.0, causal, scale=scaling)
    elif chosen == SDPBackend.FLASH_ATTENTION.value and query.shape[3] % 8 == 0:
        found = operators._scaled_dot_product_flash_attention(query, keys, values, 0.0, causal, scale=scaling)
    elif chosen == SDPBackend.CUDNN_ATTENTION.value:
        found = operators._scaled_dot_product_cudnn_attention(
            query, keys, values, None, True, 0.0, causal, scale=scaling
        )
    else:
        return None
    return found[0], found[1].reshape(query.shape[:3])


def probabilities(
    query: Tensor,
    keys: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    allowed: Tensor | None = None,
    recent: int | Tensor = 0,
    window: int | None = None,
) -> Tensor:
    """The attention rows themselves, [B, Hq, T, S] float32: for a handful of queries (an observation window).

    allowed, recent: as in `attend`. window: queries see none but so many of the newest positions, their own among them.
    """
    visible = _visible(query, keys.shape[1], query_position, key_position, allowed, recent, window)
    weights = _weights(query, keys, visible, scaling, softcap, sinks)
    return weights.view(*query.shape[:3], keys.shape[2])


def column_sums(
    query: Tensor,
    keys: Tensor,
    query_position: Tensor,
    key_position: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    query_valid: Tensor | None = None,
    allowed: Tensor | None = None,
    recent: int | Tensor = 0,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention each slot receives, summed over queries and over the query heads of its group: [B, H, S] float32.

    query_valid [B, T] bool leaves out pads; allowed, recent: as in `attend`. lse [B, Hq, T] float32: LSE of each query,
    as the attention before has it (`attend_causal`), so that no softmax is computed again. The queries may be any of
    those that attended: a window of the last, or probes. Memory is O(S * block), never O(T * S).
    """
    batch, heads, slots, _ = keys.shape
    total = torch.zeros((batch, heads, slots), dtype=torch.float32, device=keys.device)
    if query_valid is not None and batch > 1 and query.device.type == "cpu":  # rows without their pads and dead columns
        for row in range(batch):
            real, live = query_valid[row], int((key_position[row] >= 0).sum(-1).amax())
            at = slice(row, row + 1)
            total[at, :, :live] = column_sums(
                query[at, :, real], keys[at, :, :live], query_position[at, real], key_position[at, :, :live],
                scaling=scaling, softcap=softcap, sinks=sinks,
                allowed=None if allowed is None else (allowed if len(allowed) == 1 else allowed[at])[..., :live],
                recent=recent if isinstance(recent, int) else recent[at],
                lse=None if lse is None else lse[at, :, real],
            )  # fmt: skip
        return total
    if lse is not None:  # who sees nothing, or is a pad, gives nothing
        silent = lse == -torch.inf if query_valid is None else (lse == -torch.inf) | ~query_valid[:, None]
        lse = lse.masked_fill(silent, torch.inf)
    for block in _blocks(query, keys):
        part, position = query[:, :, block], query_position[:, block]
        # Slots are in order: those up to the oldest query of the block are visible to all of them, unless narrowed, and
        # those after the newest to none.
        reach = int((key_position <= position.amax()).sum(-1).amax())
        clear = int(((key_position >= 0) & (key_position <= position.amin())).sum(-1).amin()) if allowed is None else 0
        open_to = None if allowed is None else allowed[..., :reach]
        visible = _visible(part, heads, position, key_position[..., clear:reach], open_to, recent)
        logits = _logits(part, keys[:, :, :reach], scaling, softcap)
        if lse is None:
            weights = _normalized(logits, visible, part, sinks)
        else:
            logits[..., clear:].masked_fill_(~visible, -torch.inf)
            weights = logits.sub_(_group(lse[:, :, block, None], heads)).exp_()
        if query_valid is not None and lse is None:
            weights = weights.view(*part.shape[:3], reach) * query_valid[:, None, block, None]
            weights = weights.view(batch, heads, -1, reach)
        total[..., :reach] += weights.sum(2)
    return total


def _blocks(query: Tensor, keys: Tensor) -> Iterator[slice]:
    """Slices of the queries whose logits fit into the block."""
    tokens = query.shape[2]
    most = BLOCK_ELEMENTS if query.device.type == "cpu" else 16 * BLOCK_ELEMENTS
    size = max(1, most // max(1, query.shape[0] * query.shape[1] * keys.shape[2]))
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def _group(query: Tensor, heads: int) -> Tensor:
    """[B, Hq, T, D] -> [B, H, G*T, D]: the query heads of a group become rows of one matrix, keys are not repeated."""
    batch, query_heads, tokens, dim = query.shape
    return query.reshape(batch, heads, query_heads // heads * tokens, dim)


def _visible(
    query: Tensor,
    heads: int,
    query_position: Tensor,
    key_position: Tensor,
    allowed: Tensor | None = None,
    recent: int | Tensor = 0,
    window: int | None = None,
) -> Tensor:
    """[B, H or 1, G*T, S] bool."""
    query_heads = query.shape[1]
    repeats = query_heads // heads
    at, slot = query_position[:, None, :, None], key_position[:, :, None]
    visible = (slot >= 0) & (slot <= at)  # [B, H or 1, T, S]
    if window is not None:
        visible &= slot > at - window
    if allowed is None:
        return visible.repeat(1, 1, repeats, 1) if repeats > 1 else visible
    near = slot > at - (recent if isinstance(recent, int) else recent.view(-1, 1, 1, 1))
    if allowed.shape[1] == query_heads != heads:
        by_group = allowed.unflatten(1, (heads, repeats))[:, :, :, None]  # [B, H, G, 1, S]
        return (visible[:, :, None] & (by_group | near[:, :, None])).flatten(2, 3)
    return (visible & (allowed[:, :, None] | near)).repeat(1, 1, repeats, 1)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float) -> Tensor:
    heads = keys.shape[1]
    grouped = _group(query, heads)
    blind = ~visible.any(-1, keepdim=True)
    # A row without any visible slot would be 0/0: let it see everything, then zero it.
    mask = (visible | blind).expand(-1, heads, -1, -1)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return out.masked_fill(blind, 0).view_as(query)


def _weights(
    query: Tensor,
    keys: Tensor,
    visible: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """[B, H, G*T, S] float32."""
    return _normalized(_logits(query, keys, scaling, softcap), visible, query, sinks)


def _logits(query: Tensor, keys: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """[B, H, G*T, S] float32, of all slots."""
    return _capped((_group(query, keys.shape[1]).float() * scaling) @ keys.float().transpose(-1, -2), softcap)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _normalized(logits: Tensor, visible: Tensor, query: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of logits [B, H, G*T, S] float32 over what is visible and the learned sinks; writes into them.

    visible: of the last slots; those before are visible to all.
    """
    clear = logits.shape[-1] - visible.shape[-1]
    logits[..., clear:].masked_fill_(~visible, -torch.inf)
    if sinks is not None:
        batch, heads, rows, slots = logits.shape
        sink = sinks.float().view(1, heads, -1, 1).expand(batch, -1, -1, query.shape[2]).reshape(batch, heads, rows, 1)
        return torch.cat([logits, sink], dim=-1).softmax(-1)[..., :slots]
    weights = logits.softmax(-1)
    # Where nothing is visible, softmax would be 0 / 0.
    return weights if clear else weights.masked_fill_(~visible.any(-1, keepdim=True), 0)
