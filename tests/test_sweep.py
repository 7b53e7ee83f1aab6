"""The command line from end to end on a tiny model: cells, resume, equal bytes, bad input."""

import dataclasses
import io
import json
import re
import shutil
import sys
import types
from importlib.resources import files

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from transformers import AutoModelForCausalLM

from kvbench import sweep
from kvbench.answer import Run
from kvbench.cli import main
from kvbench.identity import Identity, model_sha256
from kvbench.policies import KeyDiff
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
    tell = "infeasible: recall H2O(memory=0.002): 0.002 of the full cache"
    assert output.count(tell) == 1 and output.count("infeasible: ") == 4
    assert re.search(r"^recall × 10 stacks: \d+\.\d s; group 1 of 2$", output, re.M), (
        "a line where there is no terminal"
    )
    assert output.index("\nrecall × 1 stacks: ") < output.index(" new cells")
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
    assert output.count("infeasible: ") == 4, "named again, whether stored or new"
    listed = kvbench(*sweep, "dry_run=true")[1]
    assert re.search(r"^infeasible  recall H2O\(memory=0\.002\): 0\.002 of the full cache", listed, re.M)
    assert listed.count("there       ") == 7 and "11 cells: 11 there, 0 to run" in listed
    assert len(read_cells(tmp_path / "runs")[0]) == 11
    assert all(p.stat().st_mtime_ns == written[p] for p in written if p not in (removed, truncated))
    assert not (tmp_path / "runs" / "partial").exists()

    code, output = kvbench("leaderboard", "runs", model=False)
    assert code == 0, output
    assert {"index.html", "leaderboard.md", "leaderboard.csv", "pareto.png"} <= {
        p.name for p in (tmp_path / "runs").rglob("*")
    }


def test_a_failing_stack_is_a_failed_cell_and_tried_again(kvbench, tmp_path, monkeypatch):
    command = ["-m", "evict=keydiff,streaming_llm", "budget=64", "noise_floor=false", "out=runs", *SMALL]
    works, fails = KeyDiff.__call__, [True]

    def breaks(self, kv, step):
        if fails and any((tmp_path / "runs" / "partial").glob("*.jsonl")):  # in the second of two batches
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
        return works(self, kv, step)

    monkeypatch.setattr(KeyDiff, "__call__", breaks)
    code, output = kvbench(*command, "batch_tokens=400")
    assert code and "Traceback" not in output
    reason = "KeyDiff(budget=64): OutOfMemoryError: CUDA out of memory. Tried"
    assert f"failed: recall {reason}" in output
    assert re.search(
        r"^kvbench: cells failed: 1 \(recall KeyDiff\(budget=64\)\); tracebacks are in runs/failed", output, re.M
    )
    cells, problems = read_cells(tmp_path / "runs")
    assert not problems
    assert {(c.config.policy.stack, c.status, c.reason, len(c.samples)) for c in cells} == {
        ("KeyDiff(budget=64)", "failed", reason, 0),
        ("StreamingLLM(budget=64)", "done", None, 2),
        ("Full()", "done", None, 2),
    }
    (log,) = (tmp_path / "runs" / "failed").iterdir()
    assert log.read_text().startswith("Traceback") and "in breaks" in log.read_text()
    (partial,) = (tmp_path / "runs" / "partial").iterdir()
    (measured,) = json.loads(partial.read_text())["rows"]

    fails.clear()
    code, output = kvbench(*command, "batch_tokens=400")
    assert code == 0 and "2 of 3 cells are already there" in output and "1 new cells" in output
    cells, _ = read_cells(tmp_path / "runs")
    assert {c.status for c in cells} == {"done"}
    kept = {s.sample_id: s.decode_s for c in cells if c.config.policy.evict == "keydiff" for s in c.samples}
    assert len(kept) == 2 and kept[measured["sample_id"]] == measured["decode_s"], "what had finished is not repeated"
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"cells", "multirun.yaml"}


def test_a_score_that_is_no_number_is_a_failed_cell(kvbench, tmp_path, monkeypatch):
    real = sweep.run_stacks

    def run(*arguments, **options):
        runs = real(*arguments, **options)
        runs[0].rows[0]["nll"] = float("nan")
        return runs

    monkeypatch.setattr(sweep, "run_stacks", run)
    ppl = ["task=ppl", "task.prefix=200", "task.score_tokens=20", "task.count=2", "noise_floor=false"]
    code, output = kvbench("evict=keydiff", "budget=64", *ppl, "out=runs")
    assert code and "cells failed: 1 (ppl KeyDiff(budget=64))" in output and "Traceback" not in output
    cells = {c.config.policy.stack: c for c in read_cells(tmp_path / "runs")[0]}
    assert cells["Full()"].status == "done" and len(cells["Full()"].samples) == 2
    failed = cells["KeyDiff(budget=64)"]
    assert failed.status == "failed" and "nll: Input should be a finite number" in failed.reason


def test_cells_of_other_prompts_or_another_model_are_not_taken_for_the_same(
    kvbench, tiny, tiny_folder, tmp_path, monkeypatch
):
    folder, texts, cells = tmp_path / "model", tmp_path / "texts", tmp_path / "runs" / "cells"
    shutil.copytree(tiny_folder, folder)
    texts.mkdir()
    (texts / "a.txt").write_text("A text of one book, long enough. " * 40)
    load, loads = AutoModelForCausalLM.from_pretrained, []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(1) or load(*a, **k))
    command = [
        "evict=keydiff", "budget=64", "noise_floor=false", "out=runs", f"model.path={folder}", "task=ppl",
        "task.corpus=texts", f"task.path={texts}", "task.prefix=200", "task.score_tokens=20", "task.count=1",
    ]  # fmt: skip
    assert kvbench(*command)[0] == 0 and len(loads) == 1
    code, output = kvbench(*command)
    assert code == 0 and "2 of 2 cells are already there" in output and len(loads) == 1, "the model is not loaded"

    names = sorted(p.name for p in cells.iterdir())
    told = r"kvbench: ppl KeyDiff\(budget=64\) is in runs, but of {} \({} was \w{{12}}, is \w{{12}}\): give "
    before, old = (folder / "model.safetensors").read_bytes(), (texts / "a.txt").read_text()
    (texts / "a.txt").write_text("Quite another text, long enough as well. " * 40)
    code, output = kvbench(*command)
    assert code and re.search(told.format("other prompts", "prompts_sha256"), output), output
    assert all(name in output for name in names) and "Traceback" not in output
    (texts / "a.txt").write_text(old)
    (folder / "model.safetensors").write_bytes(before[:-4] + b"\0\0\0\1")
    code, output = kvbench(*command)
    assert code and re.search(told.format("another model", "model_sha256"), output), output

    for path in cells.iterdir():  # as earlier versions wrote them
        cell = json.loads(path.read_text())
        for field in dataclasses.asdict(Identity()):
            del cell["provenance"][field]
        path.write_text(json.dumps(cell))
    code, output = kvbench(*command)
    assert code == 0 and "2 of 2 cells are already there" in output
    assert len(loads) == 1
    shutil.rmtree(texts)
    shutil.rmtree(folder)
    code, output = kvbench(*command)
    assert code == 0 and "2 of 2 cells are already there" in output, "what cannot be known does not matter"


def test_the_hash_of_a_model_is_that_of_its_weights_ends(tmp_path):
    hashes = set()
    for weights in (b"a" * 3_000_000, b"a" * 2_999_999 + b"b", b"b" + b"a" * 2_999_999, b"a" * 2_999_999):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_bytes(weights)
        hashes |= {model_sha256(tmp_path)}
        (tmp_path / "notes.txt").write_text(str(len(hashes)))
        assert model_sha256(tmp_path) in hashes
    (tmp_path / "config.json").write_text("{ }")
    assert len(hashes | {model_sha256(tmp_path)}) == 5


def test_only_what_is_known_then_and_now_can_differ():
    then = {"prompts_sha256": "p", "model_sha256": "", "model_revision": "a"}
    assert Identity("p", "x", "b").differences(then) == {"model_revision": ("a", "b")}
    assert Identity("q").differences(then) == {"prompts_sha256": ("p", "q")}
    assert Identity().differences(then) == {} == Identity("p", "x", "b").differences({})


def test_batches_after_a_torn_line_are_kept(tmp_path):
    path, now = tmp_path / "x.jsonl", {"prompts_sha256": "p", "device": "a GPU", "versions": {"torch": "2.13"}}

    def line(sample, **other):
        run = Run(rows=[{"sample_id": sample}])
        return json.dumps({**dataclasses.asdict(run), "ran_on": now | other}) + "\n"

    def ids():
        return [run.rows[0]["sample_id"] for run in sweep._finished(path, now)]

    assert ids() == []
    path.write_text(line("a") + line("b")[:40])
    assert ids() == ["a"]
    with path.open("a") as file:
        file.write(line("b") + line("c")[:40])
    assert ids() == ["a", "b"]
    path.write_text(line("a") + line("b")[:40] + line("c") + line("d"))  # as it was left earlier
    assert ids() == ["a", "d"]
    others = [line("a", prompts_sha256="q"), line("b", device="another"), line("c", versions={"torch": "2.12"})]
    path.write_text("".join(others) + line("d"))
    assert ids() == ["d"], "a cell is of one machine"


def test_the_second_run_of_the_full_cache_differs_for_prompts_that_run_alone(kvbench, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "SECOND_CHUNK", 100)
    ppl = ["task=ppl", "task.prefix=400", "task.score_tokens=20", "task.count=2", "batch_tokens=400"]
    code, output = kvbench("evict=full", *ppl, "out=runs")
    assert code == 0, output
    first, second = sorted(read_cells(tmp_path / "runs")[0], key=lambda c: -c.provenance.prefill_chunk)
    assert (first.provenance.prefill_chunk, second.provenance.prefill_chunk) == (8192, 100)
    assert [s.prompt_sha256 for s in first.samples] == [s.prompt_sha256 for s in second.samples]
    assert all(a.nll != b.nll for a, b in zip(first.samples, second.samples, strict=True))


def test_a_dry_run_lists_the_cells_and_runs_nothing(kvbench, tmp_path, monkeypatch):
    (tmp_path / "nothing").mkdir()
    sizes = [f"+sizes.Niah={{path:{tmp_path / 'nothing'}}}", "+sizes.Recall={length:320,needles:2,count:2}"]
    common = [*sizes, "budget=64", "out=runs"]
    assert kvbench("task=recall", "evict=full", *common)[0] == 0
    before = sorted((tmp_path / "runs").rglob("*"))
    monkeypatch.setattr(sweep, "load_model", lambda **_: pytest.fail("loaded a model"))
    code, output = kvbench(
        "-m", "task=recall,niah_grid", "evict=keydiff", *common, "dry_run=true", "launcher=submitit_slurm"
    )
    assert code and "Traceback" not in output
    for line in (
        "to run      recall KeyDiff(budget=64)\n",
        "there       recall Full()\n",
        "there       recall Full(), second run\n",
        "no prompts  niah_grid KeyDiff(budget=64)\n",
        "6 cells: 2 there, 4 to run; groups that share prefills: 3\n",
    ):
        assert line in output, output
    assert re.search(r"tasks skipped: 1\n  niah_grid: niah: no \S.*\.txt in \S+", output)
    assert sorted(p for p in (tmp_path / "runs").rglob("*") if p.name != "multirun.yaml") == before
    code, output = kvbench("task=recall", "evict=keydiff", *common, "dry_run=true")
    assert code == 0 and "3 cells: 2 there, 1 to run; groups that share prefills: 1" in output


def test_what_is_typed_wins_over_sizes(kvbench, tmp_path):
    sizes = "+sizes.Recall={length:320,needles:2,count:3,name:sized}"
    for typed in (["task.count=1"], ["++task.count=2", "+task.name=typed"], ["batch_size=4"]):
        code, output = kvbench("task=recall", "evict=full", *typed, sizes, "noise_floor=false", "out=runs")
        assert code == 0, output
    tasks = [cell.config.task for cell in read_cells(tmp_path / "runs")[0]]
    assert {(t.count, t.needles, t.name) for t in tasks} == {(1, 2, "sized"), (2, 2, "typed"), (3, 2, "sized")}


def test_a_field_of_all_tasks_of_a_sweep_need_not_be_one_of_the_default(kvbench, tmp_path):
    code, output = kvbench("-m", "task=gsm8k,aime24", "task.source=file", f"task.path={tmp_path}", "dry_run=true")
    assert code and "no prompts  gsm8k Full()" in output and "no prompts  aime24 Full()" in output, output
    code, output = kvbench("-m", "task=gsm8k,recall", "task.source=file", "dry_run=true")
    assert code and re.search(
        r"^kvbench: task\.source: task=recall \(Recall\) has no field source; there are length, .*"
        r"\(\+\+sizes\.<Class>\.source= sets it for a class that has it: .*Gsm8k, LongBench, .*\)\n$",
        output,
    ), output


def test_plans_of_one_task_are_told_apart(kvbench, tmp_path):
    common = ["evict=keydiff", "budget=64", "noise_floor=false", "dry_run=true", "out=runs"]
    lengths = [a for a in SMALL if "length" not in a]
    code, output = kvbench("-m", "task.length=320,5000", "seed=0,1", *common, *lengths)
    assert code
    for line in (
        "to run      recall task.length=320 seed=0 KeyDiff(budget=64)\n",
        "to run      recall task.length=320 seed=1 Full()\n",
        "no prompts  recall task.length=5000 seed=1 KeyDiff(budget=64)\n",
    ):
        assert line in output, output
    assert "tasks skipped: 2\n  recall task.length=5000 seed=0: " in output
    assert "\n  recall task.length=5000 seed=1: " in output
    code, output = kvbench("-m", "task.seed=4,5", "query_aware=false,true", *common, *SMALL)
    assert code == 0 and "to run      recall task.seed=4 query_aware=True KeyDiff(budget=64)\n" in output, output
    assert "to run      recall KeyDiff(budget=64)\n" in kvbench("seed=1", *common, *SMALL)[1]


def test_every_reason_is_given_when_no_task_can_be_had(kvbench, tmp_path):
    data = ["task.source=file", f"task.path={tmp_path}"]
    code, output = kvbench("-m", "task=gsm8k,aime24", *data, "noise_floor=false", "out=none")
    assert code and re.search(r"tasks skipped: 2\n  gsm8k: .+\n  aime24: .+\n", output), output
    code, output = kvbench("task=gsm8k", *data, "noise_floor=false", "out=none")
    assert code and re.search(r"^kvbench: gsm8k: no ", output, re.M), output


def test_a_budget_that_is_typed_takes_the_place_of_the_presets(kvbench):
    common = ["preset=smoke", "task=recall", "evict=keydiff", "quant=none", "noise_floor=false", "dry_run=true"]
    for typed, stack in ((["budget=64"], "budget=64"), (["memory=0.5"], "memory=0.5"), ([], "memory=0.25")):
        code, output = kvbench("-m", *common, *typed)
        assert code == 0 and f"recall KeyDiff({stack})" in output and "2 cells" in output, output


def test_a_dry_run_says_what_it_prepares_as_it_does(kvbench, monkeypatch):
    said, prepare = [], sweep.prepare
    monkeypatch.setattr(sweep.Display, "say", lambda self, line: said.append(line))
    monkeypatch.setattr(sweep, "prepare", lambda task, *rest: said.append(f"made {task.name}") or prepare(task, *rest))
    sizes = ["+sizes.Niah={lengths:[300],repeats:1}", "+sizes.Recall={length:320,needles:2,count:2}"]
    code, output = kvbench("-m", "task=recall,niah", "evict=full", *sizes, "dry_run=true")
    assert code == 0 and said == ["prompts of recall", "made recall", "prompts of niah", "made niah"], output


def test_a_terminal_has_a_bar_and_lines_that_stay(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("kvbench.display.get_console", lambda: console)
    with sweep.Display() as display:
        display.step("recall × 2 stacks", 2)
        display.log("only in a log")
        display.say("failed: recall H2O: [what] 1 " + "long " * 30)
        display.advance(2)
    shown = screen.getvalue()
    assert "only in a log" not in shown and "failed: recall H2O: [what] 1 " + "long " * 30 in shown
    assert re.search(r"recall × 2 stacks .*2/2", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown))


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
    assert re.search(r"tasks skipped: 1\n  niah_grid: niah: no \S.*\.txt in \S+", output), output
    assert "Traceback" not in output
    cells, _ = read_cells(tmp_path / "partly")
    assert [(c.config.task.name, len(c.samples)) for c in cells] == [("recall", 2)]


@pytest.mark.parametrize("preset", ["smoke", "dev", "paper"])
def test_presets_name_tasks_and_fields_that_exist(preset):
    config = OmegaConf.create(files("kvbench.conf.preset").joinpath(f"{preset}.yaml").read_text())
    used = set()
    for name in config.hydra.sweeper.params.task.replace(" ", "").split(","):
        with initialize_config_module("kvbench.conf", version_base="1.3"):
            task = OmegaConf.merge({"seed": 0}, OmegaConf.to_container(compose(f"task/{name}"))).task
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
        (["evict=nothing"], "evict=nothing is none of the choices; there are .*streaming_llm"),
        (["quant=kivi"], r"^kvbench: quant=kivi is none of the choices: did you mean kivi[24] or kivi[24]\?"),
        (["-m", "evict=full,h2", "quant=none"], "evict=h2 is none of the choices: did you mean h2o"),
        (["preset=smokes"], "preset=smokes is none of the choices: did you mean smoke?"),
        (["launcher=joblab"], "launcher=joblab is none of the choices: did you mean joblib?"),
        (["-m", "preset=dev", "--cfg", "job"], "dry_run=true"),
        (["evict=h2o", "memory=0"], "must be above 0 and at most 1"),
        (["evict=h2o", "budget=1.5"], "above 0 and at most 1; write tokens as an int"),
        (["evict=h2o", "budget=-3"], "too small"),
        (["evict=h2o"], "needs one of memory="),
        (["evict=h2o", "memory=0.5", "budget=64"], "^kvbench: evict=h2o takes only one of memory= .* or budget="),
        (["evict=h2o", "budget=64", "evict.recen=0.5"], r"unexpected keyword argument 'recen'"),
        (["memmory=0.25"], r"^kvbench: there is no option memmory: did you mean memory\?\n$"),
        (["+memmory=0.25"], r"^kvbench: there is no option memmory: did you mean memory\?\n$"),
        (["memory.x=1"], r"^kvbench: there is no option memory\.x\n$"),
        (["++prest=smoke"], r"^kvbench: there is no option prest: did you mean preset"),
        (["wandb.mod=online"], r"^kvbench: there is no option wandb\.mod: did you mean mode\?\n$"),
        (
            ["++sizes.Recal.length=256"],
            r"^kvbench: sizes\.Recal: there is no class of tasks Recal: did you mean Recall",
        ),
        (["+sizes={Nia:{repeats:1}}"], r"^kvbench: sizes\.Nia: .*did you mean Niah\?"),
        (["sizes.Recall.lenth=256"], r"^kvbench: sizes\.Recall\.lenth: .*\(Recall\) .*did you mean length\?\n$"),
        (["task.lenth=256"], r"^kvbench: task\.lenth: task=recall \(Recall\) has no .*did you mean length\?\n$"),
        (["evict=h2o,snapkv", "memory=0.5"], "^kvbench: Ambiguous value .*add --multirun to your command line\n$"),
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


def test_a_model_of_the_hub_is_named(kvbench):
    code, output = kvbench("model=hub", "task=recall", "dry_run=true", model=False)
    assert code and output == "kvbench: model=hub needs model.path=OWNER/NAME (on the Hub) or model.path=FOLDER\n"


def test_options_of_a_preset_and_of_other_configs_are_known(kvbench, tmp_path):
    common = ["evict=full", "noise_floor=false", "dry_run=true", "out=runs", *SMALL]
    code, output = kvbench("-m", "preset=paper", "task=recall", "++ruler_length=512", *common)
    assert code == 0, output
    code, output = kvbench("--config-dir", str(tmp_path), "+own=1", "+sizes.Own.length=${own}", *common)
    assert code == 0, output


def test_help_lists_the_choices(kvbench):
    code, output = kvbench("--help", model=False)
    assert code == 0 and "snapkv" in output and "nvfp4" in output and "demo" in output and "submitit_slurm" in output


def test_a_command_misspelt_is_told_the_right_one(kvbench):
    code, output = kvbench("compar", "a", "b", model=False)
    assert code and output == "kvbench: there is no command 'compar': did you mean compare? (kvbench --help)\n"


@pytest.mark.parametrize("group", ["preset", "launcher"])
def test_groups_without_a_choice_refuse_what_is_none(group):
    with initialize_config_module("kvbench.conf", version_base="1.3"):
        assert compose("config")
        with pytest.raises(MissingConfigException, match=f"Could not find '{group}/smokes'"):
            compose("config", [f"{group}=smokes"])


def test_every_yaml_makes_its_policy_or_task():
    for group in ("evict", "quant", "task"):
        for file in files(f"kvbench.conf.{group}").iterdir():
            if not file.name.endswith(".yaml"):
                continue
            config = OmegaConf.create({"seed": 0, "node": OmegaConf.create(file.read_text())}).node
            budget = {"budget": 0.5} if group == "evict" and file.name != "full.yaml" else {}
            made = make_evictor(config, budget) if group == "evict" else instantiate(config)
            assert made is not None
