"""Draws what scripts/bench_kernels.py measured: attention to packed slots against what bytes and instructions allow.

    python scripts/plot_roofline.py                  # results/bench_kernels/rows.jsonl -> roofline.png beside it

One panel per shape (batch x slots, query / key-value heads x head dim), of the newest rows of one device. Across: bytes
that a format takes for a token of a head, keys and values together. Up: bytes that a bf16 cache would take, per time:
what is as fast as bf16 could be at best stands at the bandwidth.

    line    the byte bound, bandwidth * bf16 bytes / bytes            dash    the instruction bound, where known
    dot     achieved                                                  dotted  the fastest attention of others over bf16
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

SHAPE = ("batch", "tokens", "query_heads", "heads", "dim")
MOST = 6
"""Panels."""


def attention_rows(rows: list[dict[str, Any]], device: str | None) -> tuple[str, list[dict[str, Any]]]:
    """The device (None: that of most rows) and, for each shape and format, its newest measured row without sums."""
    rows = [r for r in rows if r["part"] == "attention" and r["status"] == "measured" and not r["sums"]]
    rows = [r for r in rows if device in (None, r["device"])]
    if not rows:
        raise SystemExit(f"plot_roofline: no measured attention{f' on {device}' if device else ''} among these rows")
    device = Counter(r["device"] for r in rows).most_common(1)[0][0]
    newest = {(*(r[k] for k in SHAPE), r["name"]): r for r in rows if r["device"] == device}
    return device, list(newest.values())


def panels(rows: list[dict[str, Any]]) -> list[tuple[tuple[int, ...], dict[str, dict[str, Any]]]]:
    """(shape, {format: row}) of the shapes with most formats, of these the largest, in order of size."""
    shapes: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        shapes.setdefault(tuple(row[k] for k in SHAPE), {})[row["name"]] = row

    def size(item: tuple[tuple[int, ...], Any]) -> int:
        batch, tokens, _, heads, dim = item[0]
        return batch * tokens * heads * dim

    best = sorted(shapes.items(), key=lambda item: (len(item[1]), size(item)), reverse=True)[:MOST]
    return sorted(best, key=size)


def draw(device: str, rows: list[dict[str, Any]], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = panels(rows)
    across = min(3, len(shapes))
    down = -(-len(shapes) // across)
    figure, grid = plt.subplots(down, across, figsize=(5.2 * across, 4.4 * down), squeeze=False, layout="constrained")
    for axes, (shape, named) in zip(grid.flat, shapes, strict=False):
        panel(axes, shape, named)
    for axes in list(grid.flat)[len(shapes) :]:
        axes.set_visible(False)
    for line in grid:
        line[0].set_ylabel("GB/s of a bf16 cache")
    for axes in grid[-1]:
        axes.set_xlabel("bytes per token and head, keys and values")
    about = rows[-1]
    threads = f", {about['threads']} threads" if "threads" in about else ""
    figure.suptitle(f"Decode attention on {device}{threads} ({about['dtype']}, commit {about['commit']})")
    figure.savefig(path, dpi=110)


def panel(axes: Any, shape: tuple[int, ...], named: dict[str, dict[str, Any]]) -> None:
    batch, tokens, query_heads, heads, dim = shape
    slots, dense = batch * heads * tokens, 4 * dim
    formats = {name: row for name, row in named.items() if name != "sdpa"}
    taken = {name: row["bytes"] / slots for name, row in formats.items()}
    if formats:
        bandwidth = next(row["gbs"] / row["bandwidth_share"] for row in formats.values())
        ends = [0.85 * min(taken.values()), 1.2 * max(taken.values())]
        axes.plot(ends, [bandwidth * dense / x for x in ends], color="black", linewidth=1, label="byte bound")
    for i, (name, row) in enumerate(formats.items()):
        color = f"C{i}"
        axes.scatter([taken[name]], [row["bf16_gbs"]], color=color, s=28, zorder=3)
        axes.annotate(name, (taken[name], row["bf16_gbs"]), xytext=(5, -3), textcoords="offset points", fontsize=8)
        if "instructions_ms" in row:
            bound = dense * slots / row["instructions_ms"] / 1e6
            axes.scatter([taken[name]], [bound], color=color, marker="_", s=160, linewidth=2)
    if "sdpa" in named:
        label = f"best of others: {named['sdpa']['by']}"
        axes.axhline(named["sdpa"]["bf16_gbs"], color="gray", linestyle=":", label=label)
    axes.set(xscale="log", yscale="log", title=f"{batch} x {tokens} slots, {query_heads}/{heads} heads x {dim}")
    axes.legend(fontsize=7, loc="upper right")
    axes.grid(alpha=0.3, which="both")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path("results/bench_kernels/rows.jsonl")
    parser.add_argument("rows", type=Path, nargs="?", default=default, help=f"default: {default}")
    parser.add_argument("--device", help="as the rows name it; default: that of most rows")
    parser.add_argument("--out", type=Path, help="default: roofline.png beside the rows")
    options = parser.parse_args(argv)
    if not options.rows.is_file():
        raise SystemExit(f"plot_roofline: no {options.rows}; make it: python scripts/bench_kernels.py")
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    out = options.out or options.rows.with_name("roofline.png")
    draw(*attention_rows(rows, options.device), out)
    print(f"drawn: {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
