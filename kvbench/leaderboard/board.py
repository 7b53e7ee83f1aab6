"""From a folder of cells to a leaderboard, and from a leaderboard to its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvbench import stats
from kvbench.leaderboard.data import Leaderboard, Options
from kvbench.leaderboard.material import sort_cells
from kvbench.leaderboard.page import to_html
from kvbench.leaderboard.plots import write_plots
from kvbench.leaderboard.rows import make_section
from kvbench.leaderboard.text import print_table, to_csv, to_markdown
from kvbench.leaderboard.words import slug
from kvbench.results import ResultsError, read_cells


def build(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    resamples: int = stats.RESAMPLES,
    quiet: bool = False,
    **options: Any,
) -> Leaderboard:
    """Read the cells of `folder`, write Markdown, CSV, plots and the page to `out`, and print the table.

    `out` is `folder` unless given; further options are those of `kvbench.leaderboard.data.Options`. Raises ResultsError
    when there is nothing to read or no place to write.
    """
    board = load(folder, resamples=resamples, **options)
    out = Path(out if out is not None else folder)
    try:
        out.mkdir(parents=True, exist_ok=True)
        board.files = [
            _write(out / "leaderboard.md", to_markdown(board)),
            _write(out / "leaderboard.csv", to_csv(board)),
            _write(out / "index.html", to_html(board)),
            *write_plots(board, out),
        ]
    except OSError as error:
        raise ResultsError(f"cannot write the leaderboard to {out}: {error.strerror or error}") from error
    if not quiet:
        print_table(board)
    return board


def load(folder: str | Path, *, resamples: int = stats.RESAMPLES, **options: Any) -> Leaderboard:
    """The leaderboard of a folder of cells, without writing anything."""
    cells, problems = read_cells(folder)
    if not cells:
        raise ResultsError(f"no readable cell in {folder}: {len(problems)} bad, first {': '.join(problems[0])}")
    board = Leaderboard([], [], problems, len(cells), Options(resamples, **options))
    for material in sort_cells(cells):
        board.left_out += material.left_out
        if material.cells:
            board.sections.append(make_section(material, board.options))
    for place, section in enumerate(board.sections[1:], 2):  # the first section has the plain file names
        section.slug = f"_{place}_{slug(section.title)}"
    return board


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
