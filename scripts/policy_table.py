"""Write the table of evictors in README.md from the code: docstrings, options, needs, and the recorded scores.

    python scripts/policy_table.py            # rewrite the table between its two markers
    python scripts/policy_table.py --check    # fail if it is out of date

One row per file of conf/evict. Scores are those of results/evictors (`kvbench -m preset=evictors`).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

import kvbench.policies
from kvbench.policies.interface import Budgeted, Draft, Evictor, Policy, Repeat, Selector, SoftTokens
from kvbench.results import ResultsError, read_cells

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- evictors: scripts/policy_table.py -->\n", "<!-- /evictors -->\n"
MEMORY, TASKS = 0.25, ("recall", "niah")


def build(conf: Mapping[str, Any], budget: Any = 4096) -> Policy:
    """The policy a file of conf/evict names; a wrapper's budget is that of the evictor it wraps."""
    target = getattr(kvbench.policies, conf["_target_"].rpartition(".")[2])
    options = {k: build(v, budget) if k == "base" else v for k, v in conf.items() if k != "_target_"}
    return target(**options) if "base" in conf or not issubclass(target, Budgeted) else target(budget, **options)


def section(policy: Policy, begin: str, end: str) -> str:
    """The text of a class docstring from one marker to the next, on one line."""
    text = " ".join((inspect.getdoc(type(policy)) or "").split())
    found = re.search(rf"{re.escape(begin)}\s*(.*?)(?:{end}|$)", text)
    return found.group(1).strip().rstrip(".") if found else "–"


def source(policy: Policy) -> str:
    """Links to paper and code, from the module's docstring."""
    text = importlib.import_module(type(policy).__module__).__doc__ or ""
    links = [
        ("paper", r"Paper (https?://\S+?)[,.;]?(?:\s|$)"),
        ("code", r"official code (https?://\S+?)[,.;]?(?:\s|$)"),
    ]
    return " ".join(f"[{name}]({m.group(1)})" for name, pattern in links if (m := re.search(pattern, text))) or "–"


def sees(policy: Policy) -> str:
    words = []
    for name, amount in policy.needs.items():
        match name, amount:
            case "probe", Draft(tokens, _, verify):
                words.append(f"{tokens} drafted tokens" + (", verified" if verify else ""))
            case "probe", SoftTokens():
                words.append("learned soft tokens")
            case "probe", Repeat():
                words.append("a pass that repeats the prompt")
            case "attention", _:
                words.append("attention sums of all queries")
            case "queries", _:
                words.append(f"last {amount} queries" if amount > 1 else "last query")
            case "window", _:
                words.append(f"last {amount} queries, kept from step to step")
            case "moments", _:
                words.append("mean and covariance of the queries")
            case "sentence", _:
                words.append("where sentences end")
    return ", ".join(words) or "keys, values, positions"


def per_head(policy: Policy) -> str:
    if isinstance(policy, Evictor) and policy.ragged:
        return "yes, uneven"
    return "no" if isinstance(policy, Budgeted) and policy.shared_over_heads else "yes"


def deviations(policy: Policy) -> str:
    text = section(policy, "Deviations.", r"$^")
    return ", ".join(dict.fromkeys(re.findall(r"`([a-z_0-9]+)`(?:, `[a-z_0-9]+`)*:", text + ":"))) or "–"


def scores(folder: Path) -> dict[str, str]:
    """File name -> score kept at a quarter of the bytes, as a share of the full cache's, mean of the tasks."""
    try:
        cells, _ = read_cells(folder)
    except ResultsError:
        return {}
    means: dict[tuple[str, str], float] = {}
    for cell in cells:
        policy, extra = cell.config.policy, cell.config.model.model_extra or {}
        if cell.config.task.name not in TASKS or policy.quant != "none" or "batch_size" in extra:
            continue
        if policy.memory == MEMORY or policy.evict == "full":
            mean = sum(s.score for s in cell.samples) / len(cell.samples) if cell.samples else float("nan")
            means[policy.evict, cell.config.task.name] = mean
    shown = {}
    for name in {evict for evict, _ in means}:
        ran = [t for t in TASKS if (name, t) in means and ("full", t) in means]
        kept = sum(means[name, t] / means["full", t] for t in ran) / max(1, len(ran))
        only = f" ({ran[0]} only)" if len(ran) == 1 else ""
        shown[name] = f"{100 * kept:.0f} %{only}" if kept == kept and ran else "too few bytes"
    return shown


def table() -> str:
    shown = scores(ROOT / "results" / "evictors")
    lines = [
        "| `evict=` | policy | sees | acts | per head | state | kept at 25 % | official defaults | deviations |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for file in sorted((f for f in files("kvbench.conf.evict").iterdir()), key=lambda f: f.name):
        if not file.name.endswith(".yaml") or file.name == "full.yaml":
            continue
        name = file.name.removesuffix(".yaml")
        policy = build(yaml.safe_load(file.read_text()))
        state = policy.slot_state_nbytes if isinstance(policy, Budgeted) else 0
        cells = [
            f"`{name}`",
            f"`{type(policy).__name__}` {source(policy)}",
            sees(policy),
            "selects: " * isinstance(policy, Selector) + section(policy, "Acts:", r" (?:Raises|Official defaults)"),
            per_head(policy),
            f"{state} B" if state else "–",
            shown.get(name, "–"),
            section(policy, "Official defaults:", r"\.? Deviations\."),
            deviations(policy),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the table is up to date")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    new = before + BEGIN + table() + END + rest.split(END)[1]
    if args.check:
        sys.exit(0 if new == text else "README.md: the table is out of date; run python scripts/policy_table.py")
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
