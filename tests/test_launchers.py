"""Sweeps in several processes, through Hydra's launchers: nothing is lost, and nothing is run twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kvbench.results import read_cells

TASK = ["task=recall", "task.length=256", "task.needles=2", "task.count=10", "batch_size=2", "memory=0.5"]
TASK += ["++sizes.Recall.count=1"]  # what is typed wins, also in a job that runs elsewhere


def command(out: Path, *launcher: str) -> list[str]:
    kvbench = str(Path(sys.executable).with_name("kvbench"))
    return [kvbench, "-m", *launcher, "evict=streaming_llm,keydiff", *TASK, f"out={out}"]


def environment(out: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "KVBENCH_CACHE": str(out.parent / "cache")}


def stacks(out: Path) -> list[str]:
    cells, problems = read_cells(out)
    assert not problems and not [cell.reason for cell in cells if cell.status != "done"]
    assert {len(cell.samples) for cell in cells} == {10}
    return sorted(cell.config.policy.stack for cell in cells)


ALL = ["Full()", "Full()", "KeyDiff(memory=0.5)", "StreamingLLM(memory=0.5)"]  # the full cache twice: the noise floor


@pytest.mark.slow
def test_joblib_runs_every_cell_once(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    out = tmp_path / "out"
    done = subprocess.run(command(out, "launcher=joblib"), capture_output=True, text=True, env=environment(out))
    assert done.returncode == 0, done.stderr
    assert stacks(out) == ALL
    assert sum(map(int, re.findall(r"(\d+) new cells", done.stdout))) == 4


def test_a_sweep_of_two_processes_of_which_one_is_killed_resumes(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    out = tmp_path / "out"
    sweep = subprocess.Popen(
        command(out, "launcher=submitit_local"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(out)
    )
    killed = None
    while killed is None:
        assert sweep.poll() is None, sweep.communicate()[0].decode()
        started = [path for path in out.glob("partial/*.jsonl") if path.stat().st_size]
        killed = next((pid for path in started if (pid := owner(path.with_suffix(".lock"), sweep.pid))), None)
        time.sleep(0.02)
    os.kill(killed, signal.SIGKILL)
    assert sweep.wait(300) != 0  # what is left of the sweep goes on, and then tells of the loss
    sweep.communicate()
    kept = {path.stem: [json.loads(x) for x in path.read_text().splitlines()] for path in out.glob("partial/*.jsonl")}
    assert kept, "the process was killed in the middle of a cell"

    again = subprocess.run(command(out), capture_output=True, text=True, env=environment(out))
    assert again.returncode == 0, again.stderr
    assert stacks(out) == ALL and not (out / "partial").exists()
    logs = again.stdout + "".join(path.read_text() for path in out.glob(".submitit/*/*_log.out"))
    assert sum(map(int, re.findall(r"(\d+) new cells", logs))) == 4
    for cell, parts in kept.items():  # what the killed process had measured stands in the cell as it was
        rows = {r["sample_id"]: r for r in json.loads((out / "cells" / f"{cell}.json").read_text())["samples"]}
        measured = [row for part in parts for row in part["rows"]]
        assert measured and all(rows[row["sample_id"]]["decode_s"] == row["decode_s"] for row in measured)


def owner(lock: Path, root: int) -> int | None:
    """The process below `root` that holds this lock."""
    for process in psutil.Process(root).children(recursive=True):
        try:
            if any(Path(opened.path) == lock for opened in process.open_files()):
                return process.pid
        except psutil.Error:  # it has just ended
            continue
    return None
