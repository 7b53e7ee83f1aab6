"""Needle maps as PNG files: one per stack, and one with all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvbench.leaderboard.data import Stack
from kvbench.leaderboard.needles import Heat
from kvbench.leaderboard.style import (
    GAIN,
    INK,
    LOSS,
    SOFT,
    ignore_missing_letters,
    literal,
    new_figure,
    save,
    save_pixels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

DPI = 110


class MapWriter:
    """Writes one map per file. Maps of one grid share axes and colour bar; only image and title are drawn anew."""

    def __init__(self) -> None:
        self.frames: dict[tuple[str, ...], _Frame] = {}

    def __call__(self, path: Path, stack: Stack, heat: Heat) -> None:
        grid = (*heat.lengths, "by", *heat.depths)
        if grid not in self.frames:
            self.frames[grid] = _Frame(heat)
        self.frames[grid].write(path, stack, heat)


class _Frame:
    """The drawing around a map, kept as pixels."""

    def __init__(self, heat: Heat) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = new_figure(6.2, 4.2, DPI)
        self.canvas, self.axes = FigureCanvasAgg(figure), figure.add_subplot()
        self.image = _draw(self.axes, heat, tick_size=8)
        self.title = self.axes.set_title(" ", fontsize=10.5, loc="left", color=INK)
        self.axes.set_xlabel("prompt length, tokens", color=SOFT, fontsize=8)
        self.axes.set_ylabel("needle depth", color=SOFT, fontsize=8)
        _style_bar(figure.colorbar(self.image, ax=self.axes, shrink=0.8, aspect=24, pad=0.02))
        self.canvas.draw()
        self.pixels = self.canvas.copy_from_bbox(figure.bbox)

    def write(self, path: Path, stack: Stack, heat: Heat) -> None:
        self.image.set_data(_masked(heat))
        self.title.set_text(_title(stack, heat))
        self.canvas.restore_region(self.pixels)
        with ignore_missing_letters():
            self.axes.draw_artist(self.axes.patch)  # shows where a map has no sample
            self.axes.draw_artist(self.image)
            self.axes.draw_artist(self.title)
        save_pixels(self.canvas, path)


def write_overview(path: Path, maps: Sequence[tuple[Stack, Heat]]) -> None:
    """All maps of a section in one file."""
    columns = min(len(maps), max(5, math.ceil(math.sqrt(1.3 * len(maps)))))
    rows = math.ceil(len(maps) / columns)
    figure, panels, bar_axes = _panels(rows, columns)
    for place, (axes, (stack, heat)) in enumerate(zip(panels, maps, strict=False)):
        image = _draw(axes, heat, tick_size=6.5)
        axes.set_title(_title(stack, heat), fontsize=8, loc="left", color=INK)
        if place % columns == 0:
            axes.set_ylabel("needle depth", color=SOFT, fontsize=8)
        if place + columns >= len(maps):
            axes.set_xlabel("prompt length, tokens", color=SOFT, fontsize=8)
    for axes in panels[len(maps) :]:
        axes.set_visible(False)
    _style_bar(figure.colorbar(image, cax=bar_axes))
    save(figure, path)


def _panels(rows: int, columns: int) -> tuple[Figure, list[Axes], Axes]:
    """Axes at fixed places: searching for a layout takes longer than all the drawing. Lengths are in inches."""
    width, height, left, right, bottom, top = 2.5 * columns + 0.95, 2.0 * rows + 0.4, 0.6, 0.8, 0.5, 0.3
    figure = new_figure(width, height, DPI, layout=None)
    margins = {"left": left / width, "right": 1 - right / width, "bottom": bottom / height, "top": 1 - top / height}
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={**margins, "wspace": 0.22, "hspace": 0.36})
    tall = min(height - bottom - top, 4.0)
    bar = figure.add_axes((1 - 0.65 / width, (bottom + height - top - tall) / 2 / height, 0.14 / width, tall / height))
    return figure, list(grid.flat), bar


def _draw(axes: Axes, heat: Heat, tick_size: float) -> AxesImage:
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("needle", [LOSS, "#f0b07a", "#f3f1ea", "#8db4e2", GAIN])
    image = axes.imshow(_masked(heat), cmap=ramp, vmin=0, vmax=1, aspect="auto")
    axes.set_facecolor("#e4e6eb")
    axes.set_xticks(range(len(heat.lengths)), heat.lengths, fontsize=tick_size)
    axes.set_yticks(range(len(heat.depths)), heat.depths, fontsize=tick_size)
    axes.tick_params(length=0, colors=SOFT)
    axes.spines[:].set_visible(False)
    return image


def _masked(heat: Heat) -> np.ma.MaskedArray:
    return np.ma.masked_invalid(np.array(heat.values))


def _title(stack: Stack, heat: Heat) -> str:
    return f"{literal(stack.key)[:34]}  {100 * _masked(heat).mean():.0f}%"


def _style_bar(bar: Any) -> None:
    bar.outline.set_visible(False)
    bar.set_label("score", color=SOFT, fontsize=8)
    bar.ax.tick_params(length=0, labelsize=7.5, colors=SOFT)
