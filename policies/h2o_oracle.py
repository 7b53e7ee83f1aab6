"""H2O-oracle: heavy hitters by the attention of the whole sequence, future queries included.

Paper https://arxiv.org/abs/2306.14048 (Zhang et al., NeurIPS 2023), official code
https://github.com/FMInference/H2O (h2o_hf/utils_lm_eval/modify_llama.py)
"""

from dataclasses import dataclass

from torch import Tensor

from kvbench.kernels.scores import column_sums
from kvbench.policies.h2o import check_recent, recent_slots
from kvbench.policies.h2o_mask import chosen
from kvbench.policies.interface import KV, Selection, Selector, Step, select


@dataclass(frozen=True)
class H2OOracle(Selector):
    """Each query reads the heavy hitters of its whole forward, as far as it may see them, and a local band.

        sum[b, h, s] = sum over all queries i of this forward, and query heads g of kv head h, of A[b, g, i, s]
        query i reads s <= i with s among the heavy = budget - recent largest sums, or s > i - recent

    sum float32 [B, H, S]; A is the plain causal softmax. Not causal: which slots the early queries read depends on
    later ones, so nothing like it can generate text. It is behind the published lm-eval numbers of H2O.

    Nothing is freed, and the sums cost a pass over all keys. Only for reproducing published numbers; use `H2O`
    otherwise.

    budget: most slots read per head and query (int tokens, or float share of the prompt); memory= instead: see
    `Selector`. recent: newest slots of them, the query's own always included: int tokens, float share of the budget in
    force (rounded down), or None: half of it.
    Acts: before the attention of every forward.
    Raises ValueError when constructed with a bad option or with a budget of fewer tokens than `recent`.

    Official defaults: 10 % + 10 % of the sequence (hence our half).
    Deviations. `gqa_sum`: official code has no grouped heads; here a group sums, and reads the same slots. `fp32`:
    official sums are in the model's dtype. `band`: official bands hold recent + 1 slots; ours hold recent, so that no
    query reads more than the budget. `decoding`: official code has none; here a decode step's heavy hitters are those
    of its own query. The official scripts for other models than Llama use a greedy causal simulation instead.
    """

    recent: int | float | None = None

    def __post_init__(self) -> None:
        check_recent("H2OOracle", self.recent)
        super().__post_init__()

    @property
    def min_slots(self) -> int:
        return max(1, self.recent) if isinstance(self.recent, int) else 1

    def choose(self, kv: KV, queries: Tensor, position: Tensor, step: Step) -> Selection | None:
        slots, held = self.slots(kv, step), (kv.position >= 0).sum(-1)
        fits = held <= slots
        if bool(fits.all()):
            return None
        recent = recent_slots(self.recent, slots).clamp(min=1)
        total = column_sums(
            queries, kv.keys.dense(), position, kv.position,
            scaling=step.scale(kv), softcap=step.softcap, sinks=step.sinks,
        )  # fmt: skip
        heavy = chosen(*select(total, kv, slots - recent)[:1], kv.counts.width)
        return Selection(heavy | fits[..., None], recent[:, 0])
