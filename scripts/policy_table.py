"""Write what lists all policies: the tables in README.md, from docstrings, options, needs, bytes and recorded scores,
and policies/__init__.pyi, by which type checkers and editors know the names that policies/__init__.py finds by itself.

    python scripts/policy_table.py            # rewrite the tables between their markers, and the stub
    python scripts/policy_table.py --check    # fail if they are out of date

One row per file of conf/evict, with scores of results/evictors (`kvbench -m preset=evictors`), and per file of
conf/quant, with scores of results/quantizers (`kvbench -m preset=quantizers`).
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml

from kvbench import policies
from kvbench.baselines import Baseline
from kvbench.policies.interface import (
    Budgeted,
    Draft,
    Evictor,
    Mixed,
    Policy,
    Quantizer,
    Repeat,
    Selector,
    SoftTokens,
    Stack,
    Step,
)
from kvbench.results import ResultsError, read_cells

ROOT = Path(__file__).resolve().parents[1]
MARKERS = "<!-- {}: scripts/policy_table.py -->\n", "<!-- /{} -->\n"
MEMORY, TASKS = 0.25, ("recall", "niah", "ppl")


def build(conf: Mapping[str, Any], budget: Any = 4096) -> Policy:
    """The policy a file of conf names; a wrapper's budget is that of the evictor it wraps."""
    if "policies" in conf:
        return Stack(tuple(build(member, budget) for member in conf["policies"]))
    module, _, name = conf["_target_"].rpartition(".")
    target = getattr(importlib.import_module(module), name)
    options = {k: build(v, budget) if isinstance(v, dict) else v for k, v in conf.items() if k != "_target_"}
    return target(**options) if "base" in conf or not issubclass(target, Budgeted) else target(budget, **options)


def section(policy: Policy, begin: str, end: str) -> str:
    """The text of a class docstring from one marker to the next, on one line."""
    text = " ".join((inspect.getdoc(type(policy)) or "").split())
    found = re.search(rf"{re.escape(begin)}\s*(.*?)(?:{end}|$)", text)
    return found.group(1).strip().rstrip(".") if found else "–"


def source(policy: Policy) -> str:
    """Links to paper and code, from the module's docstring; of evictors' code only what is official."""
    text = importlib.import_module(type(policy).__module__).__doc__ or ""
    code = "official code " if isinstance(policy, Budgeted) else ""
    links = [
        ("paper", r"(https?://(?:arxiv|openreview|mlsys|dl\.acm)\.\S+?)[,.;)]?(?:\s|$)"),
        ("code", code + r"(https?://github\.com/\S+?)[,.;)]?(?:\s|$)"),
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


def kept_scores(folder: Path) -> dict[tuple[str, str, float | None, float | None], tuple[float, float]]:
    """(evict, quant, memory, budget) -> score kept, as a share of the full cache's; bytes, as a share of its bytes.

    The mean of the tasks' shares, and the ratio of the sums of their bytes. nan where a byte budget cannot be met.
    """
    try:
        cells, _ = read_cells(folder)
    except ResultsError:
        return {}
    means: dict[Any, float] = {}
    held: dict[Any, tuple[int, int]] = {}
    for cell in cells:
        policy, extra = cell.config.policy, cell.config.model.model_extra or {}
        if cell.config.task.name not in TASKS or "batch_size" in extra:
            continue
        key = policy.evict, policy.quant, policy.memory, policy.budget, cell.config.task.name
        n = len(cell.samples)
        means[key] = sum(s.score for s in cell.samples) / n if n else float("nan")
        held[key] = sum(s.kv_bytes_prefill_end for s in cell.samples), sum(s.kv_bytes_full for s in cell.samples)
    shown = {}
    for name in {key[:4] for key in means}:
        ran = [(*name, t) for t in TASKS if (*name, t) in means]
        if len(ran) == len(TASKS):
            score = sum(means[key] / means["full", "none", None, None, key[4]] for key in ran) / len(ran)
            own, full = (sum(held[key][k] for key in ran) for k in (0, 1))
            shown[name] = score, own / full if score == score else float("nan")
    return shown


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def evictor_score(name: str, kept: Mapping[Any, tuple[float, float]]) -> str:
    nan = float("nan")
    at_bytes = kept.get((name, "none", MEMORY, None), (nan, nan))[0]
    if at_bytes == at_bytes:
        return percent(at_bytes)
    at_tokens = kept.get((name, "none", None, MEMORY), (nan, nan))[0]
    return f"{percent(at_tokens)} (tokens)" if at_tokens == at_tokens else "–"


def evictors() -> Iterator[str]:
    kept = kept_scores(ROOT / "results" / "evictors")
    yield "| `evict=` | policy | sees | acts | per head | state | kept at 25 % | official defaults | deviations |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, policy in configured("evict", "full"):
        state = policy.slot_state_nbytes if isinstance(policy, Budgeted) else 0
        yield row(
            f"`{name}`",
            f"`{type(policy).__name__}` {source(policy)}",
            sees(policy),
            "selects: " * isinstance(policy, Selector) + section(policy, "Acts:", r" (?:Raises|Official defaults)"),
            per_head(policy),
            f"{state} B" if state else "–",
            evictor_score(name, kept),
            section(policy, "Official defaults:", r"\.? Deviations\."),
            deviations(policy),
        )


def quantizers() -> Iterator[str]:
    kept = kept_scores(ROOT / "results" / "quantizers")
    yield "| `quant=` | policy | bits K / V | full precision | calibration | alone | SnapKV, 12.5 % | deviations |"
    yield "|---|---|---|---|---|---|---|---|"
    nan = float("nan"), float("nan")
    for name, policy in configured("quant", "none"):
        alone, stacked = kept.get(("full", name, None, None), nan), kept.get(("snapkv", name, 0.125, None), nan)
        if not isinstance(policy, Baseline):
            members = Stack((policy,)).policies
            bits = " / ".join(f"{bits:.4g}" for bits in bits_per_element(policy))
            parts = [[f(p) for p in members] for f in (windows, calibration)]
            told = [next((cell for cell in cells if cell != "–"), "–") for cells in parts]
            what = f"`{policy}` " + " ".join(map(source, members)), bits, *told
        else:
            what = f"transformers' `QuantizedCache`: {name.removeprefix('hf_')}", "–", "–", "–"
        yield row(
            f"`{name}`",
            *what,
            f"{percent(alone[0])} at {percent(alone[1])}" if alone[0] == alone[0] else "–",
            percent(stacked[0]) if stacked[0] == stacked[0] else "–",
            ", ".join(cell for p in Stack((policy,)).policies if (cell := deviations(p)) != "–") or "–",
        )


def bits_per_element(policy: Policy, layers: int = 4) -> list[float]:
    """Of keys and of values, metadata included, mean over layers, at head_dim 128 or as calibrated."""
    stack = Stack((policy,))
    quantizer: Any = next((p for p in stack.policies if isinstance(p, Quantizer)), Mixed())
    head_dim = 64 if hasattr(quantizer, "path") else 128
    total = [0.0, 0.0]
    none = torch.zeros(1, dtype=torch.int64)
    for order in Step(0, none, none, layers=layers, stack=stack.policies).holders:
        for i, codec in enumerate(quantizer.codecs(Step(order, none, none, order=order, layers=layers))):
            nbytes = 2 * head_dim
            if codec is not None:
                nbytes = codec.row_nbytes(head_dim) + codec.group_nbytes(head_dim) / codec.group
            total[i] += 8 * nbytes / head_dim / layers
    return total


def windows(policy: Policy) -> str:
    """First tokens and residual window that stay in full precision."""
    if not isinstance(policy, Quantizer):
        return "–"
    residual = getattr(policy, "residual", 0)
    sinks = max(policy.keeps)
    parts = [f"{sinks} sink{'s' * (sinks > 1)}"] * bool(sinks) + [f"last {residual}"] * bool(residual)
    return ", ".join(parts) or "–"


def calibration(policy: Policy) -> str:
    if getattr(policy, "path", getattr(policy, "checkpoint", None)) is None:
        return "–"
    module = importlib.import_module(type(policy).__module__).__doc__ or ""
    found = re.search(r"scripts/\w+\.py", f"{module} {inspect.getdoc(type(policy))}")
    return f"`{found.group()}`" if found else "–"


def configured(group: str, without: str) -> Iterator[tuple[str, Policy]]:
    """(file name, policy) of a folder of kvbench.conf."""
    for file in sorted(files(f"kvbench.conf.{group}").iterdir(), key=lambda f: f.name):
        name = file.name.removesuffix(".yaml")
        if name not in (file.name, without):
            yield name, build(yaml.safe_load(file.read_text()))


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def stub() -> str:
    """The text of policies/__init__.pyi."""
    found = sorted((cls.__module__, name) for name, cls in policies.POLICIES.items())
    framework = sorted(set(policies.__all__) - set(policies.POLICIES) - {"POLICIES"})
    lines = ["# Written by scripts/policy_table.py."]
    lines += [f"from {module} import {name} as {name}" for module, name in found]
    lines += [f"from {Policy.__module__} import {name} as {name}" for name in framework]
    head, first, *rest = lines
    return "\n".join([head, "", *sorted([first, *rest], key=str.lower), "", "POLICIES: dict[str, type[Policy]]", ""])


def tables(text: str) -> str:
    """README's text with its tables anew."""
    for name, lines in (("evictors", evictors()), ("quantizers", quantizers())):
        begin, end = (marker.format(name) for marker in MARKERS)
        before, rest = text.split(begin)
        text = before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether all is up to date")
    args = parser.parse_args()
    readme, types = ROOT / "README.md", ROOT / "policies" / "__init__.pyi"
    before = {path: path.read_text(encoding="utf-8") if path.exists() else "" for path in (readme, types)}
    after = {readme: tables(before[readme]), types: stub()}
    stale = [path for path in after if after[path] != before[path]]
    if args.check:
        names = " and ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"out of date: {names}; run python scripts/policy_table.py" if stale else 0)
    for path in stale:
        path.write_text(after[path], encoding="utf-8")


if __name__ == "__main__":
    main()
