"""The table of evictors in README.md is what the code says."""

import subprocess
import sys
from pathlib import Path

import policy_table
import pytest

from kvbench.results import cell_id, write_cell

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_is_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "policy_table.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def write(folder, task, quant, score, held, full):
    config = {
        "model": {"name": "tiny"},
        "task": {"name": task, "kind": "generate"},
        "policy": {"evict": "full", "quant": quant, "stack": quant},
        "query_aware": True,
        "seed": 0,
    }
    sample = {
        "sample_id": "0", "prompt_sha256": task, "score": score, "n_prompt_tokens": 9, "n_generated": 1,
        "kept_tokens": 9, "kv_bytes_prefill_end": held, "kv_bytes_final": held, "kv_bytes_full": full,
        "kv_bytes_full_final": full,
    }  # fmt: skip
    cell = {"schema": 1, "cell_id": cell_id(config), "config": config, "status": "done", "samples": [sample]}
    write_cell(folder, {**cell, "provenance": {}, "checks": {}})


def test_scores_are_averaged_over_tasks_and_bytes_are_a_ratio_of_sums(tmp_path):
    for task, full, score, held in (("recall", 1000, 1.0, 200), ("niah", 3000, 0.5, 1200), ("ppl", 6000, 0.75, 3000)):
        write(tmp_path, task, "none", 1.0, full, full)
        write(tmp_path, task, "q", score, held, full)
    score, held = policy_table.kept_scores(tmp_path)["full", "q", None, None]
    assert score == pytest.approx((1 + 0.5 + 0.75) / 3)
    assert held == pytest.approx(4400 / 10000)  # not the mean of 20, 40 and 50 %
