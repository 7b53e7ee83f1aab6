"""The leaderboard as text: Markdown, CSV and a table for the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvbench.leaderboard.data import Group, Leaderboard, Section, Stack, Table, TaskInfo
from kvbench.leaderboard.words import cell_text, column, markdown, marks, percent, plain, query_mode, span
from kvbench.stats import Interval

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

SHOWN = 8  # rows of a further table in the terminal


def to_markdown(board: Leaderboard) -> str:
    """Tables that any Markdown viewer shows; pictures are linked by their file names."""
    lines = ["# KV-cache leaderboard", ""]
    for section in board.sections:
        lines += _md_section(section)
    if not board.sections:
        lines += ["No finished cell yet.", ""]
    if board.left_out:
        lines += ["## Left out", "", _md_row(["Status", "Section", "Stack", "Task", "Reason"]), _md_row([":--"] * 5)]
        lines += [_md_row(map(markdown, (x.status, x.section, x.stack, x.task, x.reason))) for x in board.left_out]
        lines.append("")
    if board.problems:
        lines += ["## Unreadable files", ""] + [f"- {markdown(p.file)}: {markdown(p.reason)}" for p in board.problems]
    return "\n".join(lines).rstrip() + "\n"


def _md_section(section: Section) -> list[str]:
    lines = [f"## {markdown(section.title)}", ""]
    lines += [f"**{markdown(note)}**\n" for note in section.notes]
    lines += [f"![Score against measured bytes](pareto{section.slug}.png)", ""]
    head = ["#", "Stack", "Keeps %" if section.retention else "Score %", "95 %", "Δ points", "Δ 95 %", "Bytes %"]
    head += ["Final bytes %", "Read per step %", *map(column, section.tasks), "Notes"]
    for group, stacks in section.groups:
        lines += [f"### {markdown(group.label)}", ""]
        lines += [_md_row(map(markdown, head)), _md_row(["--:", ":--", *["--:"] * (len(head) - 3), ":--"])]
        lines += [_md_row(_md_cells(section, stack)) for stack in stacks] + [""]
    lines += [f"- {markdown(line)}" for line in section.caption] + [""]
    for table in section.tables:
        lines += _md_table(table)
    return lines + _md_tasks(section)


def _md_table(table: Table) -> list[str]:
    lines = [f"### {markdown(table.title)}", "", markdown(table.text), ""]
    if table.rows:
        lines += [_md_row(map(markdown, table.head)), _md_row([":--", *["--:"] * (len(table.head) - 1)])]
        lines += [*(_md_row(map(markdown, (row.name, *row.cells))) for row in table.rows), ""]
    return [*lines, markdown(table.note), ""] if table.note else lines


def _md_tasks(section: Section) -> list[str]:
    lines = ["### Tasks", "", _md_row(["Task", "n", "Full cache %", "95 %", "Seeds", "Chat", "Truncated %", "Ranked"])]
    lines.append(_md_row([":--", *["--:"] * 7]))
    for t in section.tasks:
        cells = [t.label, str(t.n), percent(t.full.estimate if t.full else None), span(t.full)]
        cells += [", ".join(map(str, t.seeds)), t.chat, percent(t.truncated), "yes" if t.signal else "no signal"]
        lines.append(_md_row(map(markdown, cells)))
    return [*lines, ""]


def _md_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _md_cells(section: Section, stack: Stack) -> list[str]:
    return [
        str(stack.rank or "–"),
        markdown(stack.name),
        percent(stack.headline.estimate),
        span(stack.headline),
        percent(stack.delta.estimate if stack.delta else None, sign=True),
        span(stack.delta),
        percent(stack.rho),
        percent(stack.rho_final),
        percent(stack.rho_read),
        *(cell_text(stack.tasks.get(t.label)) for t in section.tasks),
        markdown(", ".join(marks(stack))),
    ]


def to_csv(board: Leaderboard) -> str:
    """One row per stack with every number in full, then the cells without scores."""
    rows = [_csv_row(x, group, s) for x in board.sections for group, stacks in x.groups for s in stacks]
    for x in board.left_out:
        rows.append({"section": x.section, "status": x.status, "reason": x.reason, "stack": x.stack, "task": x.task})
    rows += [{"status": "unreadable", "reason": f"{p.file}: {p.reason}"} for p in board.problems]
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["section"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_csv_value, names))
    writer.writerows([_csv_value(row.get(name)) for name in names] for row in rows)
    return text.getvalue()


def _csv_row(section: Section, group: Group, s: Stack) -> dict[str, Any]:
    row = {
        "section": section.title,
        "model": section.model["name"],
        "query_mode": query_mode(section.query_aware),
        "status": "incomplete" if s.missing else "done",
        "reason": f"missing: {', '.join(s.missing)}" if s.missing else "",
        "group": group.label,
        "rank": s.rank,
        "like_best": s.like_best,
        "stack": s.key,
        "evict": s.evict,
        "quant": s.quant,
        "config": s.text,
        "headline": section.headline,
        **_csv_interval("score", s.headline),
        **_csv_interval("delta", s.delta),
        "p": s.difference.p if s.difference else None,
        "p_adjusted": s.p_adjusted,
        "worst_loss": s.difference.worst_loss if s.difference else None,
        "lossless": s.lossless if s.difference else None,
        "detectable": s.detectable,
        "rho": s.rho,
        "rho_final": s.rho_final,
        "rho_read": s.rho_read,
        "kept_share": s.kept,
        "frontier_probability": s.frontier,
        "dominated_by": s.dominated_by.key if s.dominated_by else None,
        "seed_sd": s.seed_sd,
        "failed_tasks": ", ".join(s.failed),
        "failed_checks": " ".join(s.failed_checks),
        "n": s.n,
    }
    for label, task in s.tasks.items():
        row |= _csv_interval(f"task {label}", task.score)
        if task.perplexity:
            row |= _csv_interval(f"perplexity {label}", task.perplexity)
    for name, interval in s.measures.items():
        row |= _csv_interval(name, interval)
    return row


def _csv_interval(name: str, interval: Interval | None) -> dict[str, float | None]:
    values = (interval.estimate, interval.low, interval.high) if interval else (None, None, None)
    return dict(zip((name, f"{name} low", f"{name} high"), values, strict=True))


def _csv_value(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):  # a leading sign would make a spreadsheet evaluate a name as a formula
        return "'" + plain(value) if value[:1] in ("=", "+", "-", "@") else plain(value)
    return value


def print_table(board: Leaderboard, console: Console | None = None) -> None:
    """The leaderboard in the terminal; task columns only where they fit."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    for section in board.sections:
        console.print(_table(section, console.width))
        for note in section.notes:
            console.print(Text(plain(note), style="bold yellow"))
        for line in section.caption:
            console.print(Text(plain(line), style="dim"))
        for further in section.tables:
            if further.rows:
                console.print(_further_table(further))
            else:
                console.print(Text.assemble((plain(further.title), "bold"), "\n", plain(further.text)))
            if further.note:
                console.print(Text(plain(further.note), style="dim"))
        console.print()
    if not board.sections:
        console.print("No finished cell yet.")
    if board.left_out:
        console.print(Text(f"Left out: {len(board.left_out)} cells", style="bold"))
        for x in board.left_out:
            console.print(Text(plain(f"  {x.status}: {x.stack}, {x.task}: {x.reason}")))
    for p in board.problems:
        console.print(Text(plain(f"unreadable: {p.file}: {p.reason}"), style="yellow"))


def _empty_table(title: str) -> RichTable:
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    return Table(
        title=Text(plain(title), style="bold"), title_justify="left", header_style="dim", box=SIMPLE, pad_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip


def _further_table(further: Table) -> RichTable:
    from rich.text import Text

    table = _empty_table(further.title)
    for name in further.head:
        table.add_column(Text(name), justify="left" if name == further.head[0] else "right", overflow="fold")
    for row in further.rows[:SHOWN]:
        table.add_row(Text(plain(row.name)), *(Text(plain(cell)) for cell in row.cells))
    if len(further.rows) > SHOWN:
        table.add_row(Text(f"… {len(further.rows) - SHOWN} more in leaderboard.md", style="dim"))
    return table


def _table(section: Section, width: int) -> RichTable:
    from rich.text import Text

    table = _empty_table(section.title)
    shown = section.tasks if width >= 88 + sum(len(column(t)) + 1 for t in section.tasks) else []
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("stack", overflow="fold", min_width=18)
    for name in ("keeps %" if section.retention else "score %", "95 %", "Δ points", "bytes %"):
        table.add_column(name, justify="right", no_wrap=True)
    for task in shown:
        table.add_column(Text(plain(column(task))), justify="right")
    table.add_column("")
    for group, stacks in section.groups:
        table.add_section()
        table.add_row("", Text(group.label, style="bold underline"))
        for stack in stacks:
            _add_row(table, stack, shown)
    return table


def _add_row(table: RichTable, stack: Stack, shown: Iterable[TaskInfo]) -> None:
    from rich.text import Text

    table.add_row(
        str(stack.rank or "–"),
        Text(plain(stack.name), style="bold green" if stack.rank == 1 else ""),
        percent(stack.headline.estimate),
        Text(span(stack.headline), style="dim"),
        percent(stack.delta.estimate if stack.delta else None, sign=True),
        percent(stack.rho),
        *(cell_text(stack.tasks.get(t.label)) for t in shown),
        Text(plain(", ".join(marks(stack))), style="red" if stack.failed or stack.failed_checks else "dim"),
    )
