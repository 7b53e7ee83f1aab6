"""DuoAttention: retrieval heads keep everything, streaming heads sinks and a recent window (Xiao et al., ICLR 2025).

Paper https://arxiv.org/abs/2410.10819, official code https://github.com/mit-han-lab/duo-attention
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from kvbench.policies.interface import KV, BudgetError, Evictor, Step, select


@dataclass(frozen=True)
class DuoAttention(Evictor):
    """Sorts the heads of all layers into two classes, by gates alpha in [0, 1] that were optimised once per model.

        retrieval[l, h] = (l, h) is among the n largest of alpha [layers, H]         n: as many as the budget allows
        slots[b, h]     = all if retrieval[l, h], else sinks + recent                                  int64 [B, H]

    budget: mean slots per head over all layers and heads (int tokens, or float share of the prompt); memory= instead: a
    share of the 16-bit cache's bytes. Both hold at the end of the prompt; then retrieval heads grow.
    pattern: who the retrieval heads are: a JSON file written by scripts/find_retrieval_heads.py, one of the official
    .tsv files, or the name of a model whose gates are shipped: "proving".
    sinks, recent: tokens that streaming heads keep, at their original positions.
    Acts: at the end of every prompt forward and, in streaming heads, at every decode step.
    Raises ValueError when constructed with a bad option or with a budget of fewer tokens than sinks + recent, and if
    the pattern is missing or of another model; BudgetError if a byte budget is too small for streaming heads alone.

    Official defaults: half of the heads full (a quarter without grouped heads); 64 sinks, 256 recent on LongBench, 128
    and 256 when optimising. Deviations. `budgeted`: official code names the share of full heads, here it follows from
    the budget. `ties`: official code breaks ties between gates by noise, here earlier layers and heads go first.
    `evicts_after`: official code prefills streaming heads with streaming attention; here eviction follows the forward
    (`block` comes close to it).
    """

    pattern: str = "proving"
    sinks: int = 64
    recent: int = 256

    ragged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise ValueError(f"DuoAttention: pattern must be the path of a file or 'proving', got {self.pattern!r}")
        for name, tokens, least in (("sinks", self.sinks, 0), ("recent", self.recent, 1)):
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < least:
                raise ValueError(f"DuoAttention: {name} must be an int of {least} or more tokens, got {tokens!r}")
        super().__post_init__()

    @property
    def min_slots(self) -> int:
        return self.sinks + self.recent

    def check(self, head_dim: int) -> None:
        ranks(self.pattern)

    def score(self, kv: KV, step: Step) -> Tensor:
        return kv.position.float()

    def protected(self, kv: KV, step: Step, slots: Tensor) -> Tensor:
        return kv.position < self.sinks

    def head_slots(self, score: Tensor, kv: KV, step: Step, slots: Tensor, protected: Tensor | None) -> Tensor:
        heads, rank = kv.counts.shape[1], ranks(self.pattern).to(kv.counts.device)
        if rank.shape != (step.layers, heads):
            raise ValueError(
                f"{self}: the pattern is for {rank.shape[0]} layers of {rank.shape[1]} key-value heads, "
                f"but the model has {step.layers} of {heads}; scripts/find_retrieval_heads.py makes one for it"
            )
        held = self.counted(step)  # heads of layers that hold nothing are out of the ranking
        rank = rank[held].flatten().argsort().argsort().view(len(held), heads)
        full = rank[held.index(step.order)] < self._full_heads(rank, kv, step)[:, None]
        return torch.where(full, kv.counts.width, self.min_slots)

    def __call__(self, kv: KV, step: Step) -> KV:
        # Unlike `Evictor`, which asks whether the layer as a whole is above the mean: classes differ between layers.
        score, slots = self.score(kv, step), step.prompt[:, None]
        protected = self.protected(kv, step, slots)
        slots = self.head_slots(score, kv, step, slots, protected)
        if bool((kv.counts.per_head <= slots).all()):
            return kv
        return kv.gather(*select(score, kv, slots, protected)).flattened()

    def _full_heads(self, rank: Tensor, kv: KV, step: Step) -> Tensor:
        """[B] retrieval heads in all layers. Follows from the prompt alone, so that no head changes while decoding."""
        prompt = step.prompt
        if self.memory is not None:
            per_row = {n: self._full_heads_for_bytes(n, rank, kv, step) for n in set(prompt.tolist())}
            return torch.tensor([per_row[n] for n in prompt.tolist()], device=prompt.device)
        streaming = prompt.clamp(max=self.min_slots)
        room, more = rank.numel() * (self.slots(kv, step)[:, 0] - streaming), prompt - streaming
        return torch.where(more > 0, room // more.clamp(min=1), rank.numel())

    def _full_heads_for_bytes(self, prompt: int, rank: Tensor, kv: KV, step: Step) -> int:
        layers, heads = rank.shape
        full = (rank < torch.arange(rank.numel() + 1, device=rank.device)[:, None, None]).sum(-1).cpu()  # [n, layers]
        sizes = torch.tensor([min(prompt, self.min_slots), prompt])
        # Positions are stored in all heads of a layer that evicts, and wherever an evictor came before.
        after = any(isinstance(p, Evictor) for p in step.stack[: step.at])
        stream, whole = self.head_nbytes(sizes, kv, step).tolist()
        untouched = int(self.head_nbytes(sizes[1], kv, step, evicted=after))
        nbytes = torch.where(full == heads, heads * untouched, full * whole + (heads - full) * stream).sum(1)
        allowed = self.allowed_nbytes(prompt, kv, step) * layers
        fitting = (nbytes <= allowed).nonzero()
        if not len(fitting):
            raise BudgetError(
                f"{self}: {self.memory:.4g} of the full cache of {prompt} tokens is {allowed} bytes in {layers} "
                f"layers, but streaming heads alone take {int(nbytes[0])}; use a larger memory= or fewer sinks + recent"
            )
        return int(fitting.max())


@cache
def ranks(pattern: str) -> Tensor:
    """[layers, H] int64: place of each head among all heads, that with the largest gate first."""
    shipped = Path(str(files("kvbench"))) / "assets" / "duo_attention" / "proving.json"
    path = shipped if pattern == "proving" else Path(pattern)
    if not path.is_file():
        raise ValueError(f"DuoAttention: pattern={pattern}: no file {path}; scripts/find_retrieval_heads.py writes it")
    try:
        if path.suffix == ".tsv":
            alpha = torch.tensor([[float(x) for x in line.split()] for line in path.read_text().splitlines()])
        else:
            alpha = torch.tensor(json.loads(path.read_text())["alpha"], dtype=torch.float32)
        layers, heads = alpha.shape
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"DuoAttention: {path}: no table of gates, layers x key-value heads ({error})") from error
    order = alpha.clamp(0, 1).flatten().argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view(layers, heads)
