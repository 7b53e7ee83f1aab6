"""The leaderboard as one HTML page that needs nothing else: styles, script and drawings are inside."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbench.leaderboard.chart import Mark, Marks, chart
from kvbench.leaderboard.data import FAINT, SOLID, Leaderboard, Section
from kvbench.leaderboard.needles import heat, kept_maps
from kvbench.leaderboard.words import cell_text, column, number, percent, plain

TEMPLATES = Path(__file__).parents[1] / "templates"


def to_html(board: Leaderboard) -> str:
    """The text of the page; everything that comes from the results is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, plain=plain, pretty=_pretty)
    cells = [cell for section in board.sections for stack in section.stacks for cell in stack.cells]
    return environment.get_template("leaderboard.html.j2").render(
        board=board,
        charts=[chart(section) for section in board.sections],
        marks=[Marks.of(section) for section in board.sections],
        plain_mark=Mark(-1, 0, False),
        heat=heat,
        kept_maps=kept_maps,
        cell_text=cell_text,
        column=column,
        isnan=math.isnan,
        scale=_scale,
        solid=SOLID,
        faint=FAINT,
        stacks=sum(len(section.stacks) for section in board.sections),
        samples=sum(len(cell.samples) for cell in cells),
        newest=max((cell.provenance.started for cell in cells), default=""),
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _scale(section: Section) -> Callable[[float], float]:
    """Where a headline stands on the small axis of its table cell, 0 to 100."""
    known = [s.headline for s in section.stacks if not math.isnan(s.headline.estimate)]
    values = [v for i in known for v in (i.estimate, i.low, i.high) if not math.isnan(v)] + [1.0] * section.retention
    low, high = min(values, default=0.0), max(values, default=1.0)
    return lambda v: round(100 * (v - low) / (high - low), 2) if high > low else 50.0
