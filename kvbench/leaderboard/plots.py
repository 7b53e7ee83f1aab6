"""PNG files: score against bytes, needle maps and interaction contrasts of every section."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.leaderboard.chart import MARKERS, PALETTE, Chart, Mark, Point, chart
from kvbench.leaderboard.data import FAINT, FULL, Leaderboard, Section, Stack
from kvbench.leaderboard.maps import MapWriter, write_overview
from kvbench.leaderboard.needles import heat
from kvbench.leaderboard.progress import progress
from kvbench.leaderboard.style import GAIN, GREY, GRID, INK, LOSS, SOFT, literal, new_figure, plain_axes, save
from kvbench.leaderboard.words import slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

NEEDLE_FILE = re.compile(r"niah(_\d+_[a-z0-9.-]+)?(_[a-z0-9.-]+)?\.png")  # section and stack, as written below


def write_plots(board: Leaderboard, out: Path) -> list[Path]:
    """Write all PNG files, and remove needle maps of an earlier leaderboard that are not among them."""
    draw: dict[Path, Callable[[Path], None]] = {}
    write_map = MapWriter()
    for section in board.sections:
        if drawing := chart(section):
            draw[out / f"pareto{section.slug}.png"] = partial(_pareto, drawing=drawing, section=section)
        maps = [(s, h) for _, stacks in section.groups for s in stacks if (h := heat(s))]
        for name, (stack, one) in zip(_file_names([s for s, _ in maps]), maps, strict=True):
            draw[out / f"niah{section.slug}_{name}.png"] = partial(write_map, stack=stack, heat=one)
        if len(maps) == 1:
            draw[out / f"niah{section.slug}.png"] = partial(write_map, stack=maps[0][0], heat=maps[0][1])
        elif maps:
            draw[out / f"niah{section.slug}.png"] = partial(write_overview, maps=maps)
        if section.contrasts:
            draw[out / f"interaction{section.slug}.png"] = partial(_interaction, section=section)
    for path in progress(list(draw), "plots"):
        draw[path](path)
    for old in out.glob("niah*.png"):
        if NEEDLE_FILE.fullmatch(old.name) and old not in draw:
            old.unlink()
    return list(draw)


def _file_names(stacks: Sequence[Stack]) -> list[str]:
    """The stacks' keys as parts of file names, numbered where two would share one."""
    names: list[str] = []
    for stack in stacks:
        name, copy = slug(stack.key), 1
        while name in names:
            copy += 1
            name = f"{slug(stack.key)}-{copy}"
        names.append(name)
    return names


def _pareto(path: Path, drawing: Chart, section: Section) -> None:
    figure = new_figure(10.8, 5.4)
    axes = plain_axes(figure)
    axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.set_xticks([x for x, _ in drawing.x_ticks], [text for _, text in drawing.x_ticks])
    axes.set_yticks([y for y, _ in drawing.y_ticks], [text for _, text in drawing.y_ticks])
    axes.grid(color=GRID, linewidth=0.8)
    if drawing.full_y is not None:
        axes.axhline(drawing.full_y, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    if drawing.front:
        xs, ys = zip(*drawing.front, strict=True)
        axes.step(xs, ys, where="pre", color=INK, linewidth=1.2, alpha=0.55, zorder=2)
    for point in drawing.points:
        _draw_point(axes, point)
    axes.set_xlabel(
        "measured bytes, share of the 16-bit full cache (log2; equal bytes are spread sideways)", color=SOFT
    )
    axes.set_ylabel("score kept" if section.retention else "mean score", color=SOFT)
    axes.set_title(literal(section.title), loc="left", fontsize=11, color=INK)
    handles = _legend(drawing)
    figure.legend(
        handles=handles, loc="outside right upper", frameon=False, fontsize=8.5, labelcolor="#3a3f4d",
        ncols=math.ceil(len(handles) / 26),
    )  # fmt: skip
    save(figure, path)


def _draw_point(axes: Axes, p: Point) -> None:
    strong = p.stack.frontier >= FAINT
    whisker: dict[str, Any] = {
        "color": _colour(p.mark),
        "alpha": 0.7 if strong else 0.25,
        "linewidth": 1.2,
        "zorder": 3,
    }
    axes.plot([p.x, p.x], [p.low, p.high], **whisker)
    axes.plot(p.x, p.y, markersize=7.5, alpha=1 if strong else 0.7, zorder=4, **_style(p.mark))
    if p.label:
        dx, dy, anchor = p.label
        place = {"end": "right", "middle": "center", "start": "left"}[anchor]
        axes.annotate(
            literal(p.text), (p.x, p.y), (0.72 * dx, -0.72 * dy), textcoords="offset points", ha=place,
            fontsize=8, color=INK, zorder=5,
        )  # fmt: skip


def _colour(mark: Mark) -> str:
    return PALETTE[mark.colour] if mark.colour >= 0 else INK


def _style(mark: Mark, colour: str | None = None) -> dict[str, Any]:
    colour = colour or _colour(mark)
    face, edge, width = ("white", colour, 1.3) if mark.hollow else (colour, "white", 0.8)
    marker = {"marker": MARKERS[mark.marker], "markerfacecolor": face, "markeredgecolor": edge}
    return {"linestyle": "", "markeredgewidth": width, **marker}


def _legend(drawing: Chart) -> list[Line2D]:
    plain_mark = Mark(-1, 0, False)
    handles = [_handle(plain_mark, "no eviction")] if any(p.stack.evict == FULL for p in drawing.points) else []
    handles += [_handle(mark, name) for name, mark in drawing.evictors]
    if drawing.quantizers:
        handles.append(_handle(plain_mark, "16 bit", GREY))
    return handles + [_handle(mark, name, GREY if mark.colour < 0 else None) for name, mark in drawing.quantizers]


def _handle(mark: Mark, label: str, colour: str | None = None) -> Line2D:
    from matplotlib.lines import Line2D

    label = literal(label)
    label = f" {label}" if label.startswith("_") else label  # matplotlib hides labels that start with an underscore
    return Line2D([], [], markersize=7, label=label, **_style(mark, colour))


def _interaction(path: Path, section: Section) -> None:
    ordered = sorted(section.contrasts, key=lambda c: c.value.score.estimate)
    figure = new_figure(8.2, 1.2 + 0.26 * len(ordered))
    axes = plain_axes(figure)
    axes.axvline(0, color=GREY, linewidth=0.9)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    for y, c in enumerate(ordered):
        i = c.value.score
        colour = (LOSS if i.estimate > 0 else GAIN) if c.claimed else GREY
        axes.plot([100 * i.low, 100 * i.high], [y, y], color=colour, linewidth=1.6)
        axes.plot(100 * i.estimate, y, "o", color=colour, markersize=6, markeredgecolor="white")
    axes.set_yticks(range(len(ordered)), [literal(c.stack.key) for c in ordered], fontsize=8.5)
    axes.set_xlabel("interaction, points: damage of the stack minus the sum of its parts", color=SOFT, fontsize=9)
    axes.set_title(
        "left: damages overlap      right: stacking hurts more than the sum", fontsize=9, color=SOFT, loc="left"
    )
    save(figure, path)
