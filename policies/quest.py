"""Quest: read only the pages whose keys could matter to the current query (Tang et al., ICML 2024).

Paper https://arxiv.org/abs/2406.10774, official code https://github.com/mit-han-lab/Quest
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbench.policies.interface import KV, Selection, Selector, Step
from kvbench.policies.store import take_columns

LEAST_PAGES = 3


@dataclass(frozen=True)
class Quest(Selector):
    """While decoding, reads the pages of `page` slots with the largest upper bound of q . k over their keys.

        low[b, h, p], high[b, h, p] = min, max over live slots s of page p of k[b, h, s], per channel
        U[b, g, p]  = sum over channels d of max(q_d low_d, q_d high_d)    >= q . k_s for every s in p
        read[b, g]  = the newest page and, of the others, those with the largest U: budget // page in all

    U float32 [B, Hq, pages]; low and high [B, H, pages, D] in the model's dtype stand in `KV.side`, and all of them are
    read at every step. k are the keys as attention reads them, after RoPE: when a quantizer packs keys, which changes
    them, the bounds of their pages are taken anew, so that U stays a bound. Ties go to the newer page.

    budget: slots read per query head (int tokens, or float share of the prompt), in whole pages; all of them, bounds
    unread, if no more are held. memory: instead, a share of the bytes of the prompt's 16-bit full cache read per step,
    with the bounds of the prompt's pages, and with dense layers counted in full; the query heads of a group are counted
    as choosing different pages, so that each gets a part.
    page: slots per page. dense_layers: first layers (of those compressed) that read everything, on top of `budget`.
    per_query_head: each query head chooses; False: key-value heads do, by the largest U of their group.
    Acts: at decode steps; prompts, and later turns of several tokens, read everything.
    Raises ValueError when constructed with a bad option, or with a budget of fewer than 3 pages; BudgetError if a byte
    budget has no room for 3 pages.

    Official defaults: page 16, 2 dense layers, budgets of 512 to 4096 tokens, at least 3 pages, each query head for
    itself: ours too. Deviations. `newest_page`: the official PyTorch path lets it compete, the kernels include it, as
    here. `fits`: official code leaves a page out where the budget holds all tokens, but not in whole pages.
    """

    page: int = 16
    dense_layers: int = 2
    per_query_head: bool = True

    def __post_init__(self) -> None:
        for name, value, least in (("page", self.page, 1), ("dense_layers", self.dense_layers, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Quest: {name} must be an int of {least} or more, got {value!r}")
        if not isinstance(self.per_query_head, bool):
            raise ValueError(f"Quest: per_query_head must be True or False, got {self.per_query_head!r}")
        super().__post_init__()

    @property
    def min_slots(self) -> int:
        return LEAST_PAGES * self.page

    def spread(self, slots: Tensor, prompt: Tensor, layers: int) -> Tensor:
        dense = min(self.dense_layers, layers)
        slots = slots.expand(layers, *slots.shape)
        return torch.cat([torch.maximum(slots[:dense], prompt), slots[dense:]])

    def metadata_nbytes(self, kv: KV, step: Step) -> Tensor:
        # One more page than the prompt fills: the decoded token may open it.
        bounds = (step.prompt // self.page + 1) * (2 * kv.keys.shape[-1] * kv.keys.dtype.itemsize)
        return bounds + 2 * 4  # and what `progress` notes

    def __call__(self, kv: KV, step: Step) -> KV:
        if step.order < self.dense_layers or self._fits(kv, step):
            return kv
        low, high = self._bounds(kv)
        return replace(kv, side={**kv.side, "quest.low": low, "quest.high": high, **progress(kv, "quest")})

    def choose(self, kv: KV, queries: Tensor, position: Tensor, step: Step) -> Selection | None:
        if not step.decoding or step.order < self.dense_layers or self._fits(kv, step):
            return None
        batch, heads, width, dim = kv.keys.shape
        group = queries.shape[1] // heads
        slots, held = self.slots(kv, step), kv.counts.per_head
        pages = -(-held // self.page)  # [B, H]
        sharers = group if self.memory is not None and self.per_query_head else 1
        amount = torch.where(held <= slots, pages, (slots // self.page // sharers).clamp(min=1))

        bound = self.upper_bound(kv, queries)
        if not self.per_query_head:
            bound = bound.unflatten(1, (heads, group)).amax(2)
        repeats = bound.shape[1] // heads
        page = torch.arange(bound.shape[-1], device=bound.device)
        last = pages.repeat_interleave(repeats, 1)[..., None] - 1
        bound = bound.masked_fill(page == last, torch.inf).masked_fill(page > last, -torch.inf)
        chosen = top(bound, amount.repeat_interleave(repeats, 1))
        return Selection(chosen.repeat_interleave(self.page, -1)[..., :width])

    def upper_bound(self, kv: KV, queries: Tensor) -> Tensor:
        """U of queries [B, Hq, 1, D]: [B, Hq, pages] float32."""
        low, high = self._bounds(kv)
        grouped = queries[:, :, 0].float().unflatten(1, (kv.keys.shape[1], -1))  # [B, H, G, D]
        bound = grouped.clamp(min=0) @ high.float().mT + grouped.clamp(max=0) @ low.float().mT
        return bound.flatten(1, 2)

    def _fits(self, kv: KV, step: Step) -> bool:
        return bool((kv.counts.per_head <= self.slots(kv, step)).all())

    def _bounds(self, kv: KV) -> tuple[Tensor, Tensor]:
        """low and high [B, H, pages, D], zero past a list's last page; only what has changed is computed."""
        batch, heads, width, dim = kv.keys.shape
        held, pages = kv.counts.per_head, -(-width // self.page)
        first = settled(kv, "quest") // self.page  # [B, H]
        span = int((-(-held // self.page) - first).max())
        first = first.clamp(max=pages - span)  # a short list's window of pages may reach back: nothing changes there
        changed = first[..., None] + torch.arange(span, device=held.device)  # [B, H, span]
        slot = changed[..., None] * self.page + torch.arange(self.page, device=held.device)
        live = (slot < held[..., None, None])[..., None]  # [B, H, span, page, 1]
        keys = take_columns(kv.keys.dense(), slot.flatten(2).clamp(max=width - 1)).unflatten(2, (span, self.page))
        dead = ~live.any(3)
        fresh = {
            "quest.low": keys.masked_fill(~live, torch.inf).amin(3).masked_fill(dead, 0),
            "quest.high": keys.masked_fill(~live, -torch.inf).amax(3).masked_fill(dead, 0),
        }
        bounds = []
        for name, new in fresh.items():
            whole = new.new_zeros(batch, heads, pages, dim)
            if name in kv.side:
                old = kv.side[name][:, :, :pages]
                whole[:, :, : old.shape[2]] = old
            bounds.append(whole.scatter_(2, changed[..., None].expand(-1, -1, -1, dim), new))
        return bounds[0], bounds[1]


# -- what selectors share --------------------------------------------------------------------------------------------


def top(score: Tensor, amount: Tensor) -> Tensor:
    """The `amount` [...] highest of score [..., N], ties to the newest: [..., N] bool."""
    width = score.shape[-1]
    order = width - 1 - score.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    taken = torch.arange(width, device=score.device) < amount[..., None]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, taken.expand_as(order))


def settled(kv: KV, name: str) -> Tensor:
    """How many of its oldest slots each list still holds as they were at `progress`: [B, H] int64."""
    if f"{name}.covered" not in kv.side:
        return torch.zeros_like(kv.counts.per_head)
    covered, packed = kv.side[f"{name}.covered"].long(), kv.side[f"{name}.packed"].long()
    return torch.where(_packed(kv) == packed, covered, packed)  # packing changes what is packed, and nothing else


def progress(kv: KV, name: str) -> dict[str, Tensor]:
    """Side tensors that tell `settled` later which slots are held now, and which of them packed: [B, H] int32."""
    return {f"{name}.covered": kv.counts.per_head.int(), f"{name}.packed": _packed(kv).int()}


def _packed(kv: KV) -> Tensor:
    first, end = kv.keys.packed
    return torch.zeros_like(first) if kv.keys.is_flat else end - first
