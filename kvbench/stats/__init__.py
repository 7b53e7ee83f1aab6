"""Paired statistics: every comparison is on the same prompts, and every contrast shares one set of resamples.

The estimand is the macro mean: within a task the mean over samples, then the mean over tasks. A stratified bootstrap
draws sample ids (or clusters of samples that share a context) once per task and data seed and uses that draw for all
policies. Intervals are its 95 % percentiles where those cover; `kvbench.stats.resampling` says which others are used.

    >>> run = lambda name, scores: Run(name, False, {"t": {str(i): Row(s, "sha") for i, s in enumerate(scores)}})
    >>> difference(run("a", [1, 1, 0, 1]), run("b", [1, 0, 0, 1])).interval.estimate
    0.25
"""

from kvbench.stats.differences import (
    CORRECTIONS,
    MARGIN,
    Difference,
    Floor,
    aa_floor,
    analytic_se,
    benjamini_hochberg,
    detectable_difference,
    difference,
    difference_of,
    holm,
    lead,
    retention_of,
    score_of,
    seed_means,
    seed_spread,
)
from kvbench.stats.exact import (
    FEW_DISCORDANT,
    McNemar,
    is_binary,
    mcnemar,
    recovered,
    rule_of_three,
    sign_flip_p,
    tango,
)
from kvbench.stats.frontier import (
    U_MAX,
    Compression,
    CurveArea,
    compression_at,
    curve_area,
    dominators,
    frontier_probability,
    hypervolume,
    pareto_front,
)
from kvbench.stats.pairing import UNBOUNDED, Paired, Row, Run, check_pairable, pair
from kvbench.stats.resampling import (
    RESAMPLES,
    Bootstrap,
    Influence,
    Interval,
    Sampled,
    Shape,
    bootstrap,
    percentiles,
    resample_weights,
)
from kvbench.stats.stacking import (
    Gain,
    Interaction,
    Rate,
    interaction,
    interaction_of,
    interaction_rate,
    stacking_gain,
)

__all__ = [
    "CORRECTIONS",
    "FEW_DISCORDANT",
    "MARGIN",
    "RESAMPLES",
    "UNBOUNDED",
    "U_MAX",
    "Bootstrap",
    "Compression",
    "CurveArea",
    "Difference",
    "Floor",
    "Gain",
    "Influence",
    "Interaction",
    "Interval",
    "McNemar",
    "Paired",
    "Rate",
    "Row",
    "Run",
    "Sampled",
    "Shape",
    "aa_floor",
    "analytic_se",
    "benjamini_hochberg",
    "bootstrap",
    "check_pairable",
    "compression_at",
    "curve_area",
    "detectable_difference",
    "difference",
    "difference_of",
    "dominators",
    "frontier_probability",
    "holm",
    "hypervolume",
    "interaction",
    "interaction_of",
    "interaction_rate",
    "is_binary",
    "lead",
    "mcnemar",
    "pair",
    "pareto_front",
    "percentiles",
    "recovered",
    "resample_weights",
    "retention_of",
    "rule_of_three",
    "score_of",
    "seed_means",
    "seed_spread",
    "sign_flip_p",
    "stacking_gain",
    "tango",
]
