"""What a reader must know below and above a section's table."""

from __future__ import annotations

import statistics

from kvbench import stats
from kvbench.leaderboard.data import Section

FEW_SAMPLES = 20  # below, a percentile interval covers far less than it says


def notes(full: int | None, paired: stats.Paired, drawn: stats.Bootstrap) -> list[str]:
    """Warnings that stand above the table."""
    found = []
    if full is None:
        found.append(
            "No full-cache cells (evict=full, quant=none): ranked on raw scores, without retention or difference."
        )
    elif drawn.retention is None:
        found.append("The full cache scores 0 or did not run on every task: ranked on raw scores.")
    elif left := [t for t in paired.tasks if t not in drawn.retention_tasks]:
        found.append(f"Not in the headline, as the full cache scores 0 or did not run there: {', '.join(left)}.")
    if few := [t for t, scores in zip(paired.tasks, paired.scores, strict=True) if scores.shape[1] < FEW_SAMPLES]:
        found.append(f"Fewer than {FEW_SAMPLES} samples in {', '.join(few)}: intervals are too narrow to rely on.")
    return found


def caption(section: Section, resamples: int) -> list[str]:
    """How the numbers came about and how small a difference they can show."""
    counts = ", ".join(f"{t.label} {t.n}" for t in section.tasks)
    how = (
        "share of the full 16-bit cache's score that is kept, mean over tasks"
        if section.retention
        else "mean over tasks of the task's mean score"
    )
    lines = [
        f"Headline: {how}; 95 % intervals from {resamples:,} paired resamples shared by all stacks, not corrected for "
        "the number of comparisons.",
        f"Samples per task: {counts}. Bytes are measured (codes, scales, windows, indices), as a share of the 16-bit "
        "full cache of the same samples, at the end of prefill unless marked final.",
    ]
    if found := [s.detectable for s in section.stacks if s.detectable > 0]:
        lines.append(
            f"Detectable difference to the full cache (80 % power): typically {100 * statistics.median(found):.1f} "
            f"points, at worst {100 * max(found):.1f}. Smaller true differences are likely to be missed."
        )
    return [*lines, _floor_line(section.floor)]


def _floor_line(floor: stats.Floor | None) -> str:
    if floor is None:
        return "A/A floor: not measured (no second run of the full cache on the same prompts)."
    if floor.bound is not None:
        return (
            f"A/A floor: two runs of the full cache agree on all {floor.n} samples "
            f"(95 % bound of the flip rate {100 * floor.bound:.2g} %)."
        )
    return (
        f"A/A floor: two runs of the full cache differ on {100 * floor.flips:.1f} % of {floor.n} "
        f"samples; differences below {100 * floor.value:.1f} points are not resolved."
    )
