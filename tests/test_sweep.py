"""The command line from end to end on a tiny model: cells, resume, equal bytes, bad input."""

import json
import re
import sys
import types
from importlib.resources import files

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from kvbench.cli import main
from kvbench.results import read_cells
from kvbench.sweep import make_evictor
from kvbench.tasks import Recall

SMALL = ["task.length=320", "task.needles=2", "task.count=2", "batch_size=2"]


@pytest.fixture
def kvbench(tiny_folder, tmp_path, monkeypatch, capfd):
    """Runs the command in an empty folder and returns (exit code, output)."""

    def run(*arguments, model=True):
        given = {a.split("=")[0] for a in arguments}
        tiny = {"model": "hub", "model.path": tiny_folder, "model.dtype": "float32"} if model else {}
        chosen = [f"{k}={v}" for k, v in tiny.items() if k not in given]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "argv", ["kvbench", *arguments, *chosen])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code)
        GlobalHydra.instance().clear()
        out, err = capfd.readouterr()
        return code, out + err

    return run


def test_sweep_at_equal_bytes_resumes_and_reports_what_cannot_be_met(kvbench, tmp_path):
    sweep = ["-m", "evict=full,h2o,streaming_llm", "quant=none,kivi4", "memory=0.25,0.002", "out=runs", *SMALL]
    code, output = kvbench(*sweep)
    assert code == 0, output
    cells, problems = read_cells(tmp_path / "runs")
    assert not problems
    by_stack = {(c.config.policy.stack, c.config.model.model_dump().get("batch_size")): c for c in cells}
    # full, full again (noise floor), kivi4, and 2 evictors x 2 quantizers x 2 budgets
    assert len(cells) == len(by_stack) == 3 + 8
    infeasible = [c for c in cells if c.status == "infeasible"]
    assert len(infeasible) == 4 and all("use a larger memory=" in c.reason for c in infeasible)
    assert "infeasible: recall" in output
    for cell in cells:
        if cell.status == "done" and cell.config.policy.memory:
            held, full = (sum(getattr(s, k) for s in cell.samples) for k in ("kv_bytes_prefill_end", "kv_bytes_full"))
            assert 0.8 * cell.config.policy.memory < held / full <= cell.config.policy.memory

    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs" / "cells").iterdir()}
    removed = next(p for p in written if json.loads(p.read_text())["status"] == "done")
    removed.unlink()
    truncated = next(p for p in written if p != removed)
    truncated.write_text(truncated.read_text()[:50])
    code, output = kvbench(*sweep)
    assert code == 0 and "9 of 11 cells are already there" in output
    assert len(read_cells(tmp_path / "runs")[0]) == 11
    assert all(p.stat().st_mtime_ns == written[p] for p in written if p not in (removed, truncated))
    assert not (tmp_path / "runs" / "partial").exists()

    code, output = kvbench("leaderboard", "runs", model=False)
    assert code == 0, output
    assert {"index.html", "leaderboard.md", "leaderboard.csv", "pareto.png"} <= {
        p.name for p in (tmp_path / "runs").rglob("*")
    }


def test_prompts_are_built_once(kvbench, tmp_path, monkeypatch):
    built, samples = [], Recall.samples
    monkeypatch.setattr(Recall, "samples", lambda self, tokenizer: built.append(self) or samples(self, tokenizer))
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "kept"))
    sweep = ["-m", "evict=keydiff", "quant=none,fp8", "budget=64", *SMALL]
    for folder, more, times in (
        ("one", [], 1),
        ("two", [], 1),
        ("three", ["prompt_cache=false"], 2),
        ("four", ["record=recompute", "batch_tokens=400"], 2),
    ):
        code, output = kvbench(*sweep, *more, f"out={folder}")
        assert code == 0, output
        assert len(built) == times, "once for all stacks and the noise floor"
    assert len(list((tmp_path / "kept").iterdir())) == 1
    rows = [
        {
            (c.cell_id, s.sample_id): (s.prompt_sha256, s.prediction, s.kv_bytes_final, s.needle_kept)
            for c in read_cells(tmp_path / folder)[0]
            for s in c.samples
        }
        for folder in ("one", "two", "three", "four")
    ]
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert all(needle for *_, needle in rows[0].values())


def test_wandb_gets_a_row_per_cell_when_asked(kvbench, monkeypatch):
    logged, started = [], {}

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def log(self, row):
            logged.append(row)

    def init(**options):
        started.update(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    code, output = kvbench(
        "evict=keydiff", "budget=64", "wandb.mode=offline", "noise_floor=false", "out=logged", *SMALL
    )
    assert code == 0, output
    assert started["mode"] == "offline" and started["project"] == "kvbench"
    names = {key for row in logged for key in row}
    assert {"recall/KeyDiff(budget=64)/score", "recall/Full()/bytes_ratio"} <= names

    monkeypatch.setitem(sys.modules, "wandb", None)
    code, output = kvbench("evict=keydiff", "budget=32", "wandb.mode=offline", "out=logged", *SMALL)
    assert code and "pip install 'kvbench[wandb]'" in output


def test_a_task_that_cannot_be_had_is_skipped(kvbench, tmp_path):
    (tmp_path / "nothing").mkdir()
    sizes = [f"+sizes.Niah={{path:{tmp_path / 'nothing'}}}", "+sizes.Recall={length:320,needles:2,count:2}"]
    code, output = kvbench("-m", "task=niah_grid,recall", *sizes, "noise_floor=false", "out=partly")
    assert code
    assert re.search(r"tasks skipped: 1\n  niah_grid: niah: no \*.txt in \S+", output), output
    assert "Traceback" not in output
    cells, _ = read_cells(tmp_path / "partly")
    assert [(c.config.task.name, len(c.samples)) for c in cells] == [("recall", 2)]


@pytest.mark.parametrize("preset", ["smoke", "dev", "paper"])
def test_presets_name_tasks_and_fields_that_exist(preset):
    config = OmegaConf.create(files("kvbench.conf.preset").joinpath(f"{preset}.yaml").read_text())
    used = set()
    for name in config.hydra.sweeper.params.task.replace(" ", "").split(","):
        with initialize_config_module("kvbench.conf", version_base="1.3"):
            task = compose("config", [f"task={name}", f"preset={preset}"]).task
        kind = task._target_.rpartition(".")[2]
        sizes = {k: v for k, v in config.sizes.get(kind, {}).items() if v != "${ruler_length}"}
        assert instantiate(task, **sizes) is not None
        used.add(kind)
    assert set(config.sizes) <= used


def test_single_run(kvbench, tmp_path):
    code, output = kvbench("evict=keydiff", "budget=64", "out=one", *SMALL)
    assert code == 0 and "score" in output, output
    assert {c.config.policy.stack for c in read_cells(tmp_path / "one")[0]} == {"KeyDiff(budget=64)", "Full()"}


def test_a_model_is_loaded_as_asked_and_its_commit_noted(kvbench, tmp_path, monkeypatch):
    load, asked = AutoModelForCausalLM.from_pretrained, []

    def from_the_hub(source, *, revision, device_map, **options):
        asked.append((revision, device_map))
        model = load(source, **options)
        model.config._commit_hash = "0123abc"
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_the_hub)
    code, output = kvbench(
        "evict=snapkv", "memory=0.5", "model.revision=v1", "model.device_map={lm_head: 0}", "out=one", *SMALL
    )
    assert code == 0, output
    cells, _ = read_cells(tmp_path / "one")
    assert asked == [("v1", {"lm_head": 0})]
    assert {cell.provenance.model_revision for cell in cells} == {"0123abc"}
    code, output = kvbench("evict=snapkv", "memory=0.5", "model.device_map=auto", "out=one", *SMALL)
    assert code == 0 and asked[1] == ("main", "auto"), output
    assert len(read_cells(tmp_path / "one")[0]) == 2 * len(cells)  # of the newest revision; devices make no other cell


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evict=nothing"], "streaming_llm"),
        (["quant=int3"], "kivi2"),
        (["evict=h2o", "memory=0"], "must be above 0 and at most 1"),
        (["evict=h2o", "budget=1.5"], "above 0 and at most 1; write tokens as an int"),
        (["evict=h2o", "budget=-3"], "too small"),
        (["evict=h2o"], "needs one of memory="),
        (["evict=streaming_llm", "budget=3"], "at least 4"),
        (["quant=kivi4", "quant.bits=3"], "2 or 4|2, 4"),
        (["quant=kivi4", "quant.group_size=24", "quant.residual=24"], "head_dim"),
        (["task.length=5000"], "context of 1024"),
        (["model.dtype=int8"], "is not one of float32"),
        (["batch_size=0"], "at least 1"),
        (["batch_tokens=0"], "batch_tokens=0 must be at least 1"),
        (["record=disk"], "record=disk is not one of device, cpu, recompute"),
        (["model.path=/no/such/folder"], "cannot load model.path=/no/such/folder"),
        (["wandb.mode=loud"], "is not one of disabled, online, offline"),
        (["out=/proc/nowhere"], "/proc/nowhere"),
    ],
)
def test_bad_input_gets_one_clear_line(kvbench, arguments, message):
    small = [a for a in SMALL if a.split("=")[0] not in {x.split("=")[0] for x in arguments}]
    code, output = kvbench(*small, "out=bad", "noise_floor=false", *arguments)
    assert code != 0
    assert "Traceback" not in output
    assert re.search(message, output), output


def test_help_lists_the_choices(kvbench):
    code, output = kvbench("--help", model=False)
    assert code == 0 and "snapkv" in output and "nvfp4" in output and "demo" in output


def test_every_yaml_makes_its_policy_or_task():
    for group in ("evict", "quant", "task"):
        for file in files(f"kvbench.conf.{group}").iterdir():
            if not file.name.endswith(".yaml"):
                continue
            config = OmegaConf.create({"seed": 0, "node": OmegaConf.create(file.read_text())}).node
            budget = {"budget": 0.5} if group == "evict" and file.name != "full.yaml" else {}
            made = make_evictor(config, budget) if group == "evict" else instantiate(config)
            assert made is not None
