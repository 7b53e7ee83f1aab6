"""The script that times policies: a quick run, going on where it stopped, and its count of live bytes."""

import json

import bench_policies as script
import pytest
import torch


def test_a_quick_run_and_going_on(tmp_path, capsys):
    arguments = ["--quick", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path), "--policies"]
    script.main([*arguments, "h2o", "duo_attention"])
    script.main([*arguments, "h2o", "duo_attention", "lookaheadkv"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in rows] == ["duo_attention", "h2o", "lookaheadkv"]  # nothing twice
    first, h2o, lookahead = rows
    for row in rows:
        assert row["tokens"] == 512 and row["commit"] == rows[0]["commit"] and row["torch"] == torch.__version__
        assert row["peak_extra_bytes"] > 0 and row["decode_ratio"] > 0 and row["held_bytes"] > 0
        cost = row["signal_s"] + row["fork_s"] - row["full_fork_s"]
        assert row["cost_s"] == pytest.approx(cost, rel=1e-3, abs=1e-6)
        assert row["cost_share"] == pytest.approx(cost / row["prefill_s"], rel=1e-3, abs=1e-6)
    assert h2o["signal_s"] == h2o["attention_s"] > 0 == first["signal_s"] == lookahead["signal_s"]
    # 128 tokens of 2 layers and 2 heads of 64: keys and values, and a position and an attention sum each.
    assert h2o["peak_extra_bytes"] > 128 * 4 * (2 * 64 * 4 + 8)
    assert (tmp_path / "cost.png").stat().st_size > 1000
    assert "duo_attention" in capsys.readouterr().out


def test_what_would_take_too_long_says_so(tmp_path):
    settings = {"policy": "kvzip", "tokens": 100, "fork_s": 2.0, "cost_s": 2.0}
    rows = {("kvzip", 100): settings, ("kvzip", 50): settings | {"tokens": 50, "fork_s": 9.0}}
    assert script.predicted(rows, "kvzip", 400) == 32 and script.predicted(rows, "h2o", 400) == 0
    assert script.predicted(rows, "kvzip", 100) == 36
    assert "would take" in script.cell({"skipped": "would take about 32 s; --limit is 30 s"})


def test_live_bytes_are_those_of_new_storages():
    old = torch.ones(1000)
    with script.LiveBytes() as tracker:
        view = old[10:].view(-1, 10)
        a = view + 1  # 3960 bytes
        b = torch.cat([a, a])  # 7920 more: the peak
        assert tracker.live == tracker.peak == 3960 + 7920
        del b
        assert tracker.live == 3960
        a.add_(1)
        c = a.T.clone()  # 3960 again
        assert tracker.live == 2 * 3960 and tracker.peak == 3 * 3960
    assert c.shape == (10, 99)


def test_bad_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--lengths", "100", "200", "--repeats", "1"])
    assert "--lengths names 2 lengths, --repeats 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no such file of conf/evict: nothing"):
        script.main(["--quick", "--out", str(tmp_path), "--policies", "nothing"])
