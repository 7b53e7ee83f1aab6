"""Score against bytes: the one layout behind the PNG and the page's drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvbench import stats
from kvbench.leaderboard.data import FAINT, FULL, NONE, Section, Stack
from kvbench.leaderboard.words import plain

PALETTE = (
    "#2f6fde #d9730d #14946a #cf3f7c #7c53d3 #0e93a8 #9c6428 #6f8a12 #c43c32 #4a5bb5 #b0488f #5b7f95".split()
)  # evictors in alphabetical order; the page has its own shades of them for dark mode
MARKERS = "osD^vPXph<>*"  # quantizers in alphabetical order, after "none"; then once more, hollow
GLYPHS = 2 * len(MARKERS)
COLOURS = 1 + len(PALETTE)  # the first, for no eviction, is ink
SPREAD_PX = 34  # how far stacks of equal bytes are spread sideways, by evictor
LABEL_PLACES = (
    (-9, -9, "end"), (0, -14, "middle"), (9, -9, "start"), (-11, 4, "end"), (11, 4, "start"), (9, 18, "start"),
    (0, 22, "middle"), (-9, 18, "end"), (0, -30, "middle"),
)  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """How a stack is drawn: the colour is its evictor's, the shape its quantizer's."""

    colour: int  # index into PALETTE, -1 for ink
    marker: int  # index into MARKERS
    hollow: bool


@dataclass(frozen=True)
class Marks:
    """Marks of all stacks of a section, no two alike as long as there are enough: 13 colours by 24 shapes.

    Evictors beyond the colours take the next shapes, quantizers beyond the shapes the next colours.
    """

    evictors: tuple[str, ...]
    quantizers: tuple[str, ...]

    @classmethod
    def of(cls, section: Section) -> Marks:
        evictors, quantizers = {s.evict for s in section.stacks}, {s.quant for s in section.stacks}
        return cls((FULL, *sorted(evictors - {FULL})), (NONE, *sorted(quantizers - {NONE})))

    def __call__(self, evict: str, quant: str) -> Mark:
        lap, glyph = divmod(self.quantizers.index(quant), GLYPHS)
        lap, colour = divmod(self.evictors.index(evict) + lap * len(self.evictors), COLOURS)
        glyph = (glyph + lap * min(GLYPHS, len(self.quantizers))) % GLYPHS
        return Mark(colour - 1, glyph % len(MARKERS), glyph >= len(MARKERS))


@dataclass
class Point:
    """A stack in the chart, in pixels of the drawing area."""

    stack: Stack
    x: float
    y: float
    low: float
    high: float
    mark: Mark
    label: tuple[float, float, str] | None = None  # offset and anchor, for points on the front

    @property
    def text(self) -> str:
        name = plain(self.stack.key)
        return name if len(name) <= 32 else name[:31] + "…"


@dataclass
class Chart:
    """Headline against bytes, laid out."""

    width: int
    height: int
    points: list[Point]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    front: list[tuple[float, float]]
    full_y: float | None
    evictors: list[tuple[str, Mark]]
    quantizers: list[tuple[str, Mark]]


@dataclass(frozen=True)
class _Scale:
    """From log2 of the bytes and the headline to pixels."""

    width: int
    height: int
    left: float
    right: float
    bottom: float
    top: float
    step: float  # between two ticks of the headline

    def x(self, value: float) -> float:
        return self.width * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return self.height * (self.top - value) / (self.top - self.bottom)

    def x_ticks(self) -> list[tuple[float, str]]:
        ticks = range(math.ceil(self.left), math.floor(self.right) + 1)
        return [(self.x(t), "100%" if t == 0 else f"{100 * 2.0**t:.4g}%") for t in ticks]

    def y_ticks(self) -> list[tuple[float, str]]:
        ticks = np.arange(math.ceil(self.bottom / self.step) * self.step, self.top, self.step)
        return [(self.y(v), f"{100 * v:g}%") for v in np.round(ticks, 6).tolist()]


def chart(section: Section, width: int = 880, height: int = 400) -> Chart | None:
    """Lay the chart out; None if no stack has a headline."""
    stacks = [s for s in section.stacks if not math.isnan(s.headline.estimate) and s.rho > 0]
    if not stacks:
        return None
    scale = _scale(stacks, section.retention, width, height)
    marks = Marks.of(section)
    evictors = sorted({s.evict for s in stacks} - {FULL})
    quantizers = sorted({s.quant for s in stacks} - {NONE})
    points = _points(stacks, scale, evictors, marks)
    rho, scores = np.array([s.rho for s in stacks]), np.array([s.headline.estimate for s in stacks])
    on_front = [p for p, on in zip(points, stats.pareto_front(rho, scores), strict=True) if on]
    _place_labels(points, [p for p in on_front if not p.stack.is_full], scale)  # the full cache's line has a name
    return Chart(
        width=width,
        height=height,
        points=sorted(points, key=lambda p: p.stack.frontier >= FAINT),  # the front is drawn last, on top
        x_ticks=scale.x_ticks(),
        y_ticks=scale.y_ticks(),
        front=sorted(((p.x, p.y) for p in on_front), reverse=True),
        full_y=scale.y(1.0) if section.retention else None,
        evictors=[(e, marks(e, NONE)) for e in evictors],
        quantizers=[(q, marks(FULL, q)) for q in quantizers],
    )


def _scale(stacks: Sequence[Stack], retention: bool, width: int, height: int) -> _Scale:
    x, scores = [math.log2(s.rho) for s in stacks], [s.headline.estimate for s in stacks]
    step = _step(max(scores) - min(0.98 * max(scores), *scores))
    return _Scale(
        width=width,
        height=height,
        left=min(x) - 0.35,
        right=max(x) + 0.35,
        bottom=min(scores) - 0.5 * step,
        top=max(*scores, float(retention)) + 0.6 * step,
        step=step,
    )


def _step(extent: float) -> float:
    """A round tick step that cuts the extent into about five."""
    raw = max(extent, 0.01) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)


def _points(stacks: Sequence[Stack], scale: _Scale, evictors: Sequence[str], marks: Marks) -> list[Point]:
    points, columns = [], [scale.x(math.log2(s.rho)) for s in stacks]
    for stack, x in zip(stacks, columns, strict=True):
        h = stack.headline
        low, high = (h.estimate, h.estimate) if math.isnan(h.low) else (h.low, h.high)
        mark = marks(stack.evict, stack.quant)
        aside = 0.0  # equal bytes are the rule in a byte budget: without a shift the evictors cover each other
        if stack.evict != FULL and sum(abs(other - x) < 6 for other in columns) > 1:
            aside = SPREAD_PX * (evictors.index(stack.evict) / max(1, len(evictors) - 1) - 0.5)
        points.append(Point(stack, x + aside, scale.y(h.estimate), scale.y(low), scale.y(high), mark))
    return points


def _place_labels(points: Sequence[Point], wanted: Sequence[Point], scale: _Scale) -> None:
    """Name the front's points where the name covers neither a point nor another name."""
    taken = [(p.x - 6, p.y - 6, p.x + 6, p.y + 6) for p in points]
    for p in sorted(wanted, key=lambda p: p.x):
        w, h = 7.0 * len(p.text), 13
        for dx, dy, anchor in LABEL_PLACES:
            x = p.x + dx - {"end": w, "middle": w / 2, "start": 0}[anchor]
            box = (x, p.y + dy - h + 2, x + w, p.y + dy + 3)
            inside = box[0] >= 2 and box[2] <= scale.width - 2 and box[1] >= 2 and box[3] <= scale.height - 2
            if inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken):
                p.label = (dx, dy, anchor)
                taken.append(box)
                break
