"""Eviction of whole pages: tokens that share scales leave together, so that their scales leave, too."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvbench.policies.interface import KV, Step, Wrapper


@dataclass(frozen=True)
class Paged(Wrapper):
    """Gives all tokens of a page the mean score that `base` gives them.

        score[b, h, s] = mean over the live slots j on the page of s of base score[b, h, j]            float32 [B, H, S]

    Pages are `page` tokens by original position, counted from behind the sinks of the quantizer that follows in the
    stack: with page equal to its group size they are the groups that share scales. The budget is met exactly, so one
    page may be cut, its newest tokens kept; what `base` protects stays protected.

    page: tokens. base: an evictor, e.g. SnapKV(0.25); budget, memory and block are its own.
    Acts: when its base does.
    Raises TypeError if base is no evictor; ValueError for a page of less than one token.

    Official defaults: ours; pages of 32 are KIVI's groups.
    """

    page: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.page, bool) or not isinstance(self.page, int) or self.page < 1:
            raise ValueError(f"Paged: page must be an int of at least 1 token, got {self.page!r}")

    def score(self, kv: KV, step: Step) -> Tensor:
        score, live = self.base.score(kv, step).float(), kv.position >= 0
        first = 0 if step.quantizer is None else step.quantizer.keeps[0]
        page = (kv.position.long() - first).clamp(min=-1).div(self.page, rounding_mode="floor") + 1  # 0: sinks
        page, live = (x.expand_as(score) for x in (page.masked_fill(~live, 0), live))
        pages = score.new_zeros(*score.shape[:2], int(page.max()) + 1)
        total = pages.scatter_add(2, page, score.masked_fill(~live, 0))
        count = pages.scatter_add(2, page, live.float())
        return (total / count.clamp(min=1)).gather(2, page)
