"""The script that times a whole benchmark: a short run, and going on where it stopped."""

import json

import bench_ruler as script
import pytest

from kvbench.policies import H2O, Full


def test_a_short_run_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "stacks", lambda: [Full(), H2O(budget=0.25)])
    out = tmp_path / "rows.jsonl"
    options = ["--length", "512", "--count", "1", "--out", str(out), "--tasks"]
    script.main([*options, "fwe"])
    capsys.readouterr()
    script.main([*options, "fwe", "vt"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["task"] for row in rows] == ["ruler_mini_fwe", "all", "ruler_mini_vt", "all"]
    assert rows[2]["length"] > 512  # nothing of it fits the length that was asked for
    for row in (rows[0], rows[2]):
        assert row["cells"] == 2 and len(row["alone"]) == 2 and min(row["alone"]) > 0
        assert row["prompts"] + row["prefill"] + row["compress"] + row["decode"] == pytest.approx(
            row["seconds"], rel=0.3
        )
    total = json.loads(capsys.readouterr().out)
    assert total == rows[3] and total["cells"] == 4
    assert total["times_faster"] == pytest.approx(
        sum(sum(r["alone"]) for r in (rows[0], rows[2])) / total["seconds"], 0.01
    )
