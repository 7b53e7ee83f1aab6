"""What a reader must know below and above a section's table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kvbench import stats
from kvbench.leaderboard.data import NO_SIGNAL, Options, Section, TaskInfo
from kvbench.leaderboard.material import Material, find
from kvbench.leaderboard.words import number, percent, precise, query_mode

FEW_SAMPLES = 20  # below, even corrected intervals may cover far less than they say
CORRECTED = {
    "holm": "after Holm's correction for the number of stacks",
    "bh": "after Benjamini and Hochberg's correction, which bounds the share of false claims (exploration)",
    "none": "without a correction for the number of stacks",
}


def notes(section: Section, paired: stats.Paired) -> list[str]:
    """Warnings that stand above the table."""
    found = []
    full = any(s.is_full for s in section.stacks)
    if not full:
        found.append(
            "No full-cache cells (evict=full, quant=none): ranked on raw scores, without retention or difference."
        )
    elif not section.retention:
        found.append("The full cache scores 0 or did not run on every task: ranked on raw scores.")
    if weak := [t for t in section.tasks if not t.signal]:
        full_scores = {t.label: t.full.estimate if t.full else None for t in weak}
        found.append(no_signal_line(full_scores, "shown but not ranked"))
    if section.retention and (left := [t.label for t in section.tasks if t.signal and not t.kept]):
        found.append(f"Not in the headline, as the full cache scores 0 or did not run there: {', '.join(left)}.")
    if few := [t for t, scores in zip(paired.tasks, paired.scores, strict=True) if scores.shape[1] < FEW_SAMPLES]:
        found.append(f"Fewer than {FEW_SAMPLES} samples in {', '.join(few)}: intervals are too narrow to rely on.")
    return found


def no_signal_line(scores: Mapping[str, float | None], done: str) -> str:
    """Which tasks show nothing, with the full cache's score, and what was done about them."""
    named = ", ".join(f"{label} ({percent(score)} %)" for label, score in scores.items())
    return (
        f"No signal, so {done}: {named}. The lower 95 % end of the full cache's score, here or where it was recorded "
        f"before, is not more than {100 * NO_SIGNAL:g} points above chance."
    )


def caption(section: Section, material: Material, options: Options) -> list[str]:
    """How the numbers came about and how small a difference they can show."""
    ranked = [t for t in section.tasks if t.signal]
    how = (
        "share of the full 16-bit cache's score that is kept, mean over tasks"
        if section.retention
        else "mean over tasks of the task's mean score"
    )
    zero = find(options.zero, material.stacks) if options.zero else None
    if section.retention and zero:
        how += f"; what {zero.key} scores counts as 0"
    lines = [
        setup_line(section.model, section.tasks, section.variants, section.query_aware),
        f"Tasks and samples: {', '.join(f'{t.label} {t.n}' for t in ranked)}. {prompts_line(ranked)}",
        f"Headline: {how}; 95 % intervals from {options.resamples:,} paired resamples shared by all stacks, "
        "skewness-corrected t intervals where samples are few or skewed, score intervals and sign tests where few "
        "samples change.",
        "Bytes are measured (codes, scales, windows, indices), as a share of the 16-bit full cache of the same "
        "samples, at the end of prefill unless marked final. Budgets are what a stack was given: a share of those "
        "bytes, of the tokens, or a number of tokens.",
    ]
    if section.retention and not zero and (nll := [t.label for t in ranked if t.kind == "nll" and t.kept]):
        lines.append(
            f"On likelihood tasks ({', '.join(nll)}) the share kept counts from 0, which flatters bad stacks, as some "
            "text is predicted without its context: --zero STACK counts from the score of that stack."
        )
    lines += _coverage(section)
    if any(s.difference for s in section.stacks):
        lines.append(
            f"lossless: the upper 90 % end of the loss against the full cache is below {100 * options.margin:g} "
            f"point{'' if options.margin == 0.01 else 's'}. ≈ full: the data do not tell it from the full cache "
            f"{CORRECTED[options.correction]}."
        )
        lines += _resolution(section, options)
    if found := [s.detectable for s in section.stacks if s.detectable > 0]:
        lines.append(
            f"Detectable difference to the full cache (80 % power): typically {100 * statistics.median(found):.1f} "
            f"points, at worst {100 * max(found):.1f}. Smaller true differences are likely to be missed."
        )
    same = [s.difference.exact for s in section.stacks if s.difference and s.difference.exact]
    if bounds := [e.bound for e in same if e.bound is not None]:
        lines.append(
            f"{len(bounds)} stack{'' if len(bounds) == 1 else 's'} changed no sample: the rate of changes is below "
            f"{percent(max(bounds))} % (95 % bound)."
        )
    if spreads := [s.seed_sd for s in section.stacks if not math.isnan(s.seed_sd)]:
        lines.append(
            f"Between data seeds the score has a standard deviation of typically {percent(statistics.median(spreads))} "
            f"points, at worst {percent(max(spreads))}."
        )
    lines.append(floor_line(section.floor))
    return [*lines, _failures(section, material)]


def setup_line(model: Mapping[str, Any], tasks: Sequence[TaskInfo], variants: Sequence[str], query_aware: bool) -> str:
    own = "of this package" if model.get("path") == "proving" else "not recorded"
    extra = [f"revision {model.get('revision') or own}"]
    extra += [f"{k} {model[k]}" for k in ("dtype", "path") if model.get(k)]
    tokenizer = model.get("tokenizer") or "the model's"
    chats = sorted({t.chat for t in tasks})
    named = f"variants: {', '.join(variants)}; " if variants else ""
    return (
        f"Model: {model['name']} ({', '.join(extra)}); tokenizer: {tokenizer}; {named}{query_mode(query_aware)}; chat "
        f"template: {', '.join(chats)}."
    )


def prompts_line(tasks: Sequence[TaskInfo]) -> str:
    """Which seeds the prompts were drawn by, and which of them were cut."""
    seeds = sorted({s for t in tasks for s in t.seeds})
    return f"Data seed{'' if len(seeds) == 1 else 's'}: {', '.join(map(str, seeds))}. {_truncation(tasks)}"


def _truncation(tasks: Sequence[TaskInfo]) -> str:
    known = [(t.label, t.truncated) for t in tasks if t.truncated is not None]
    cut = [f"{label} {percent(share)} %" for label, share in known if share]
    if cut:
        return f"Prompts truncated: {', '.join(cut)}."
    return "No prompt was truncated." if len(known) == len(tasks) else "Truncation is not recorded for every task."


def _coverage(section: Section) -> list[str]:
    """Where intervals may cover less than they say."""
    doubtful = [s for s in section.stacks if s.difference and s.difference.doubtful]
    if not doubtful:
        return []
    return [
        f"{len(doubtful)} of the differences to the full cache rest on fewer than 50 independent samples with graded "
        "scores: their intervals cover 92 to 99 %, but 78 to 93 % if one sample in ten differs far more than the "
        "others (simulated), because such samples may not have been drawn."
    ]


def _resolution(section: Section, options: Options) -> list[str]:
    """Whether the resamples can resolve anything after the correction."""
    count = sum(s.difference is not None for s in section.stacks)
    least = 2 * count / (options.resamples + 1)
    if options.correction != "holm" or least <= 0.05:
        return []
    return [
        f"With {count} stacks and {options.resamples:,} resamples the smallest adjusted p is {number(least, 2)}: raise "
        "--resamples to resolve differences."
    ]


def _failures(section: Section, material: Material) -> str:
    count = len(material.left_out)
    if not count:
        return "Failures: none."
    zeros = sum(len(s.failed) for s in section.stacks)
    scored = "Where an error stopped a stack that finished other tasks, its samples score 0 and have no bytes"
    return (
        f"Failures: {count} cell{'' if count == 1 else 's'} failed, infeasible or not comparable, listed under Left out"
        f"{f'. {scored} ({zeros} here)' if zeros else ''}; a stack without a score on a ranked task is not ranked."
    )


def floor_line(floor: stats.Floor | None) -> str:
    if floor is None:
        return "A/A floor: not measured (no second run of the full cache on the same prompts)."
    found = []
    if floor.bound is not None:
        bound = f"(95 % bound of the flip rate {100 * floor.bound:.2g} %)"
        found.append(f"agree on all {floor.n} samples with generated answers {bound}")
    elif floor.n:
        found.append(f"differ on {precise(floor.flips)} % of {floor.n} samples with generated answers")
    if floor.drift is not None:
        agree = "" if floor.bound is not None else "agree "  # said before
        by = f"differ by {precise(floor.drift)} points (mean |difference|) " if floor.drift else agree
        found.append(f"{by}in the scores of likelihood tasks")
    least = f"; differences below {precise(floor.value)} points are not resolved" if floor.value else ""
    return f"A/A floor: two runs of the full cache {' and '.join(found)}{least}."
