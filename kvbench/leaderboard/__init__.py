"""The leaderboard: score against real bytes, as a terminal table, Markdown, CSV, plots and one offline page.

    >>> from kvbench.leaderboard import build
    >>> board = build("results", "site")                   # doctest: +SKIP

A section is one model in one query mode; variants of a benchmark that are not comparable (ruler, ruler_mini) have
sections of their own; results of different sections never meet in a table. Within a section stacks
are ranked inside their budget group by retention, the mean over tasks of (task mean / task mean of the full 16-bit
cache on the same samples). Without a full-cache run the rank is on raw scores, and every output says so.
"""

from kvbench.leaderboard.board import build, load
from kvbench.leaderboard.command import main_compare, main_leaderboard
from kvbench.leaderboard.data import Leaderboard
from kvbench.leaderboard.page import to_html
from kvbench.leaderboard.plots import write_plots
from kvbench.leaderboard.text import print_table, to_csv, to_markdown
from kvbench.leaderboard.verdict import compare

__all__ = [
    "Leaderboard",
    "build",
    "compare",
    "load",
    "main_compare",
    "main_leaderboard",
    "print_table",
    "to_csv",
    "to_html",
    "to_markdown",
    "write_plots",
]
