"""`kvbench`: run and sweep (a Hydra application), `kvbench leaderboard`, `kvbench compare`, `kvbench lm-eval`."""

from __future__ import annotations

import sys
from importlib.resources import files

HELP = """kvbench: stacks of KV-cache eviction and quantization, measured

  kvbench [-m] model=… task=… evict=… quant=… memory=…   run one cell, or with -m every combination of comma lists
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
    from kvbench.sweep import application

    application()


def _choices() -> str:
    lines = []
    for group in ("model", "task", "evict", "quant", "preset"):
        names = sorted(
            f.name.removesuffix(".yaml") for f in files(f"kvbench.conf.{group}").iterdir() if f.name.endswith(".yaml")
        )
        lines.append(f"  {group:<7} {', '.join(names)}")
    return "\n".join(lines)
