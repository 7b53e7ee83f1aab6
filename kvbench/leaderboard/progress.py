"""A sign of life from loops that take long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

PATIENCE_S = 2.0  # silence before a line appears

T = TypeVar("T")


def progress(items: Sequence[T], label: str) -> Iterator[T]:
    """Iterate; after two silent seconds a line on stderr says how far the loop is."""
    start = said = time.monotonic()
    live = sys.stderr.isatty()  # a log file gets a line now and then instead of one that is rewritten
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - start > PATIENCE_S and (live or said == start or now - said > 10 * PATIENCE_S):
            print(f"{label}: {done} of {len(items)}", end="\r" if live else "\n", file=sys.stderr, flush=True)
            said = now
        yield item
    if said != start:
        print(f"{label}: {len(items)} of {len(items)}", file=sys.stderr)
