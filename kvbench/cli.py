"""`kvbench`: run and sweep (a Hydra application), `kvbench leaderboard`, `kvbench compare`, `kvbench lm-eval`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.resources import files

HELP = """kvbench: stacks of KV-cache eviction and quantization, measured

  kvbench [-m] model=… task=… evict=… quant=… memory=…   run one cell, or with -m every combination of comma lists
  kvbench [-m] … dry_run=true                             list the cells and what data are missing; run nothing
  kvbench leaderboard RESULTS [--out DIR]                 rank a folder of results; writes tables, plots and a page
  kvbench compare A B RESULTS                             say whether stack A differs from stack B
  kvbench lm-eval --model kvbench --model_args …          run tasks of lm-evaluation-harness through a compressed cache

Examples
  kvbench task=niah evict=h2o quant=kivi4 memory=0.25
  kvbench -m preset=demo
  kvbench -m evict=full,streaming_llm,h2o,keydiff,snapkv quant=none,kivi4,kivi2,nvfp4 memory=0.5,0.25,0.125
  kvbench model=hub model.path=Qwen/Qwen3-0.6B model.device_map=auto
  kvbench lm-eval --model kvbench --model_args pretrained=Qwen/Qwen3-0.6B,policy="H2O(0.25)|KIVI(2)" --tasks gsm8k

Choices
"""
HINT = " (kvbench --help)"
COMMANDS = ("leaderboard", "compare", "lm-eval")
GROUPS = ("model", "task", "evict", "quant", "preset", "launcher")


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in ("leaderboard", "compare"):
        from kvbench.leaderboard import main_compare, main_leaderboard

        command = main_leaderboard if arguments[0] == "leaderboard" else main_compare
        sys.exit(command(arguments[1:]))
    if arguments and arguments[0] == "lm-eval":
        try:
            from kvbench.lm_eval import main as main_lm_eval
        except ImportError as error:
            sys.exit(f"kvbench lm-eval needs {error.name}: pip install 'kvbench[lm-eval]'")
        main_lm_eval(arguments[1:])
        return
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP + _choices())
        return
    if problem := _problem(arguments):
        sys.exit(f"kvbench: {problem}")
    if "dry_run=true" in arguments:  # needs no other process
        arguments = [a for a in arguments if not a.startswith("launcher=")]
    typed = {name.lstrip("+") for name, equals, _ in (a.partition("=") for a in arguments) if equals}
    if "preset" in typed and len(budgets := typed & {"memory", "budget"}) == 1:  # instead of what the preset has
        (other,) = {"memory", "budget"} - budgets
        arguments = [*arguments, f"{other}=null"]
    # Hydra would look for these fields in the default choices, also where a sweep is over others. Those there are none
    # of are refused where task and policies are made.
    sys.argv = [sys.argv[0], *(f"++{a}" if re.match("(task|evict|quant|sizes)[.]", a) else a for a in arguments)]
    from kvbench.sweep import application

    application()


def _problem(arguments: Sequence[str]) -> str | None:
    """What Hydra would answer with a traceback, its grammar, or the list of all there is."""
    first, *_ = arguments
    if re.fullmatch(r"[\w-]*\w", first) and not first.startswith("-"):
        return f"there is no command {first!r}{meant(first, COMMANDS, HINT)}"
    if {"-m", "--multirun"} & {*arguments} and {"-c", "--cfg"} & {*arguments}:
        return "--cfg shows one configuration: leave out -m, or list the cells of the sweep with dry_run=true"
    if any(a.startswith(("-cd", "-cn", "-cp", "--config-", "hydra.searchpath")) for a in arguments):
        return None  # more choices than ours
    for group, _, values in (a.partition("=") for a in arguments):
        for value in values.split(",") if group in GROUPS else ():
            if re.fullmatch(r"[\w-]+", value) and value not in (known := _names(group)):
                return f"{group}={value} is none of the choices{meant(value, known, HINT)}"
    return None


def meant(word: str, known: Sequence[str], hint: str = "") -> str:
    """How a message about a word that is not known ends."""
    close = get_close_matches(word, known)
    return f": did you mean {' or '.join(close)}?{hint}" if close else f"; there are {', '.join(known)}"


def _names(group: str) -> list[str]:
    found = files(f"kvbench.conf.{group}").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in found if f.name.endswith(".yaml"))


def _choices() -> str:
    return "\n".join(f"  {group:<8} {', '.join(_names(group))}" for group in GROUPS)
