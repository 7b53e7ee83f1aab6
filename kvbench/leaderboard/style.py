"""What all PNG files share: colours, an empty figure, and how it is saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kvbench.leaderboard.words import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

INK, SOFT, GREY, LINE, GRID = "#1d2130", "#5b6070", "#8a8f9c", "#b8bcc6", "#eceef2"
LOSS, GAIN = "#c8541b", "#245fb8"


def new_figure(
    width: float, height: float, dpi: int = 160, layout: Literal["constrained"] | None = "constrained"
) -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    return Figure(figsize=(width, height), dpi=dpi, layout=layout, facecolor="white")


def plain_axes(figure: Figure) -> Axes:
    """The only axes of a figure, without a box around them."""
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.tick_params(colors=SOFT, labelsize=9)
    axes.set_axisbelow(True)
    return axes


def literal(text: str) -> str:
    return plain(text).replace("$", r"\$")  # matplotlib would read formulas


def save(figure: Figure, path: Path) -> None:
    """Draw the figure once, where `savefig` draws it twice, and write it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with ignore_missing_letters():
        canvas.draw()
    save_pixels(canvas, path)


def save_pixels(canvas: FigureCanvasAgg, path: Path) -> None:
    from matplotlib.image import imsave

    unstamped: Any = {"Software": None}  # same results, same file; the stubs know no None
    imsave(path, np.asarray(canvas.buffer_rgba()), format="png", dpi=canvas.figure.dpi, metadata=unstamped)


@contextmanager
def ignore_missing_letters() -> Iterator[None]:
    """A letter that the font lacks is drawn as a box, and that will do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
