"""Numbers, names and headings as a reader sees them."""

from __future__ import annotations

import math
import re
from typing import Any

from kvbench.leaderboard.data import FAINT, SOLID, Stack, TaskInfo, TaskScore
from kvbench.stats import Interval


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A number for a reader: a true minus, and a dash for what is unknown."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return (text[1:] if text.strip("-+0.") == "" and text[0] in "-+" else text).replace("-", "−")


def percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    return number(None if value is None else 100 * value, digits, sign)


def precise(value: float) -> str:
    """A share as percent or points; two digits of what is below 0.05, so that little does not read as nothing."""
    return f"{100 * value:.2g}" if 0 < 100 * value < 0.05 else percent(value)


def span(interval: Interval | None, digits: int = 1, scale: float = 100) -> str:
    """The ends of an interval, "94.1 to 98.0"; a dash where they are unknown."""
    if interval is None or math.isnan(interval.low):
        return "–"
    return f"{number(scale * interval.low, digits)} to {number(scale * interval.high, digits)}"


def tokens(count: float) -> str:
    """A number of tokens: 4k for 4,096, else as it is."""
    return f"{count / 1024:g}k" if count >= 1024 and count % 1024 == 0 else f"{count:.0f}"


def query_mode(aware: bool) -> str:
    return "query-aware" if aware else "query-agnostic"


def plain(text: Any) -> str:
    """One line without control characters, so that a name cannot move the cursor or end a table row."""
    return "".join(c if c.isprintable() else "�" for c in str(text))


def markdown(text: Any) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~$<>&])", r"\\\1", plain(text)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def slug(text: str) -> str:
    """Text as a part of a file name: lower-case letters, digits, dots and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:80] or "unnamed"


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key that puts 9 before 10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", text)]


def column(task: TaskInfo) -> str:
    """The heading of a task's column, with its unit."""
    unit = "ppl" if task.kind == "nll" else "%"
    return task.label if unit in task.label.split() else f"{task.label}, {unit}"


def cell_text(task: TaskScore | None) -> str:
    """A task's column: accuracy in percent, or perplexity."""
    if task is None:
        return "–"
    return number(task.perplexity.estimate, 2) if task.perplexity else percent(task.score.estimate)


def marks(stack: Stack) -> list[str]:
    """What a reader must know about a row beside its numbers."""
    found = []
    if stack.like_best:
        found.append("≈ best")
    if stack.frontier >= FAINT:
        found.append("front" if stack.frontier >= SOLID else "front?")
    if stack.lossless:
        found.append("lossless")
    elif stack.difference and not stack.differs:
        found.append("≈ full")
    if stack.missing:
        found.append("incomplete")
    if stack.failed:
        found.append(f"failed: {', '.join(stack.failed)}")
    return found + [f"check failed: {name}" for name in stack.failed_checks]
