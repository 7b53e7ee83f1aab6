"""The benchmark of the kernels: a dry run, going on where it stopped, what it refuses, and tables and plots of it."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_kernels as script
import pytest
import torch
from bench_kernels import Bench, Point

from kvbench import backend
from kvbench.policies import FP8, KIVI
from kvbench.policies.fp8 import Float8
from kvbench.policies.interface import KV

pytest.importorskip("triton")
from kvbench.kernels.decode import triton as kernels
from kvbench.kernels.scores import triton as score_kernels

revision = script.revision
SOME = ["sdpa", "full", "fp8", "kivi4", "dynamic", "h2o|kivi4", "hf_quanto4"]
FP8_POINT = Point("attention", "fp8", 1, 72, 4, 2, 32)


@pytest.fixture(autouse=True, scope="module")
def _own_backend() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVBENCH_BACKEND", "torch")  # the script sets it
        patch.setattr(script, "revision", lambda commit: "a5da4a412345")
        yield


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    assert script.main(["--dry-run", "--out", str(out), "--schemes", *SOME]) == 0
    return out


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(script.arguments(["--dry-run", "--out", str(tmp_path / "rows.jsonl")]))


def test_a_dry_run_measures_every_part(dry: Path) -> None:
    rows = read(dry)
    assert {row["part"] for row in rows} == {"bandwidth", *script.PARTS}
    for row in rows:
        assert row["commit"] and row["torch"] and row["device"] and row["date"]
        if row["name"] == "hf_quanto4":
            assert row["status"] == "not available" and "optimum-quanto" in row["why"] and "ms" not in row
            continue
        assert row["status"] == "measured", row
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["backend"] == ("triton" if torch.cuda.is_available() else "interpret")
    stacked = next(row for row in rows if row["part"] == "decode" and row["name"] == "h2o|kivi4")
    assert stacked["attended_by"] == [stacked["backend"]] and stacked["cache_bytes"] > 0 and not stacked["fallbacks"]
    dynamic = next(row for row in rows if row["part"] == "decode" and row["name"] == "dynamic")
    assert dynamic["cache_bytes"] == 2 * 2 * 2 * (72 + 1) * 32 * 2  # keys and values, layers, heads, 16 bits


def test_rates_follow_from_bytes_and_time(dry: Path) -> None:
    rows = read(dry)
    bandwidth = next(row["gbs"] for row in rows if row["part"] == "bandwidth")
    found = {row["name"]: row for row in rows if row["part"] == "attention" and not row["sums"]}
    fp8, lists, queries = found["fp8"], 2, 4
    codes, newest, ends = 2 * lists * 72 * 32, 2 * lists * 32 * 2, 2 * queries * 32 * 2
    partial = 2 * 4 * (1 + 2) * queries * (32 + 1)  # one split, what is mixed twice; outputs and log-sum-exps, float32
    assert fp8["bytes"] == codes + newest + ends + partial
    assert fp8["gbs"] == pytest.approx(fp8["bytes"] / fp8["ms"] / 1e6, rel=1e-3)
    assert fp8["bandwidth_share"] == pytest.approx(fp8["gbs"] / bandwidth, rel=1e-3)
    assert fp8["bf16_gbs"] == pytest.approx(2 * codes / fp8["ms"] / 1e6, rel=1e-3)
    assert fp8["times_full"] == pytest.approx(found["full"]["ms"] / fp8["ms"], rel=1e-3)
    assert max(fp8["bytes"], found["kivi4"]["bytes"]) < found["full"]["bytes"]
    assert found["sdpa"]["by"] in found["sdpa"]["others_ms"]
    sums = next(row for row in rows if row["part"] == "attention" and row["sums"] and row["name"] == "full")
    assert sums["sums_share"] == pytest.approx(sums["ms"] / found["full"]["ms"] - 1, abs=1e-3)


def test_nothing_is_measured_twice_and_a_cut_run_goes_on(dry: Path, tmp_path: Path, capsys: Any) -> None:
    lines, out = dry.read_text().splitlines(), tmp_path / "rows.jsonl"
    gone = next(i for i, row in enumerate(map(json.loads, lines)) if row["name"] == "fp8")
    out.write_text("\n".join(lines[:gone] + lines[gone + 1 :]) + "\n")
    arguments = ["--dry-run", "--out", str(out), "--schemes", *SOME]
    assert script.main([*arguments, "--minutes", "0"]) == 0
    assert "left out, 1 points for want of time:\n  attention: 1x72 4/2x32" in capsys.readouterr().out
    assert script.main(arguments) == 0
    new = [row for row in read(out)[len(lines) - 1 :] if row["part"] != "bandwidth"]
    assert [(row["part"], row["name"]) for row in new] == [("attention", "fp8")]
    before = out.read_text()
    assert script.main(arguments) == 0
    assert out.read_text() == before


def test_rows_of_other_code_or_devices_do_not_count(dry: Path, tmp_path: Path) -> None:
    rows, out = read(dry), tmp_path / "rows.jsonl"
    rows[1]["commit"], rows[2]["device"] = "another", "another"
    out.write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = script.arguments(["--dry-run", "--out", str(out)])
    assert len(Bench(options).rows) == len(rows) - 2


def test_the_pytorch_path(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "rows.jsonl"
    assert script.main(["--dry-run", "--device", "cpu", "--out", str(out)]) == 0
    rows = read(out)
    assert all(row["backend"] == "torch" and row["threads"] == torch.get_num_threads() for row in rows)
    measured = {(row["part"], row["name"]) for row in rows if row["status"] == "measured"}
    assert {("attention", name) for name in ("sdpa", *script.SCHEMES)} <= measured
    assert "instructions_ms" not in next(row for row in rows if row["name"] == "fp8")


# -- what is wrong gets no time ------------------------------------------------------------------------------------


def refused(bench: Bench, point: Point, why: str) -> None:
    row = bench.run(point)
    assert row["status"] == "wrong" and why in row["why"] and "ms" not in row and row["part"] == point.part
    assert read(bench.out)[-1] == row
    assert bench.measured(point) is None and bench.known(point)


@pytest.mark.parametrize("fault", ["zeros", "scaled", "another head", "nan", "sums"])
def test_wrong_attention_is_refused(fault: str, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right, sums = kernels.packed_decode, fault == "sums"

    def wrong(*args: Any, **options: Any) -> Any:
        out, given = right(*args, **options)
        broken = {"zeros": out * 0, "scaled": out * 1.05, "another head": out.roll(1, 1), "nan": out / 0, "sums": out}
        return broken[fault], given.flip(-1) if sums else given

    monkeypatch.setattr(kernels, "packed_decode", wrong)
    why = "what slots received is off" if sums else "of the output (allowed"
    refused(bench, Point("attention", "full", 1, 40, 4, 2, 32, sums=sums), why)


def test_wrong_scores_and_bytes_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = score_kernels.column_sums
    monkeypatch.setattr(score_kernels, "column_sums", lambda *a, **k: right(*a, **k).flip(-1))
    refused(bench, Point("scores", "causal", 1, 32, 4, 2, 32), "column sums are off")
    gather = script.loaded("gather", bench.backend)[0]
    taken, encoded = gather.take_rows, Float8.encode
    monkeypatch.setattr(gather, "take_rows", lambda tensors, index: taken(tensors, index.flip(0)))
    refused(bench, Point("gather", "fp8", 1, 64, 4, 2, 32), "other rows")

    def wrong(*args: Any) -> Any:
        rows, groups = encoded(*args)
        return {k: x ^ (os.environ["KVBENCH_BACKEND"] != "torch") for k, x in rows.items()}, groups

    monkeypatch.setattr(Float8, "encode", wrong)
    refused(bench, Point("pack", "fp8", 1, 64, 4, 2, 32), "1 of the bytes differ")


def test_a_wrong_point_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(kernels, "packed_decode", lambda query, *args, **options: (query, None))
    arguments = ["--dry-run", "--part", "attention", "--schemes", "fp8", "--out", str(tmp_path / "rows.jsonl")]
    assert script.main(arguments) == 1
    assert "wrong: off by" in capsys.readouterr().out


def test_other_ends_of_a_point(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(error: Exception) -> dict[str, Any]:
        def measure(*args: Any) -> Any:
            raise error

        monkeypatch.setitem(script.MEASURE, "attention", measure)
        return bench.run(FP8_POINT)

    memory = ends(torch.OutOfMemoryError("tried to allocate 1 GiB\nand more"))
    assert (memory["status"], memory["why"]) == ("out of memory", "tried to allocate 1 GiB")
    assert ends(script.UnavailableError("no such thing"))["status"] == "not available"
    assert ends(KeyError("x"))["why"] == "KeyError: 'x'"


def test_what_cannot_be_asked_for(capsys: Any) -> None:
    for arguments, why in (
        (["--part", "speed"], "no speed; there are attention, scores"),
        (["--device", "cuda"], "no GPU"),
    ):
        if arguments[1] == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit):
            script.arguments(arguments)
        assert why in capsys.readouterr().err


# -- points and targets --------------------------------------------------------------------------------------------


def test_targets_come_first_and_references_before_what_is_compared() -> None:
    points = list(dict.fromkeys(script.gpu_points()))
    first = points[: 2 * (1 + len(script.SCHEMES))]
    assert {(p.part, p.batch, p.tokens) for p in first} == {("attention", 4, 32768), ("attention", 4, 131072)}
    at = {point: i for i, point in enumerate(points)}
    for point in points:
        if point.part == "attention":
            plain = {"name": "sdpa", "sums": False}
            assert (
                at[script.replace(point, **plain)] <= at[point] and at[script.replace(point, sums=False)] <= at[point]
            )
    assert {(p.query_heads, p.heads) for p in points} == {(32, 8), (64, 8), (32, 32), (16, 2)}
    assert {p.dim for p in points} == {64, 128} and {p.batch for p in points if p.part == "attention"} == {1, 4, 16, 64}


def test_targets_read_the_rows() -> None:
    def row(part: str, name: str, tokens: int = 32768, **found: Any) -> dict[str, Any]:
        point = Point(part, name, 8 if part == "decode" else 4, tokens)
        return {**script.asdict(point), "status": "measured", "bandwidth_share": 0.5, "bound_share": 0.6, **found}

    rows = [row("attention", "full", bandwidth_share=0.801), row("attention", "kivi2", times_sdpa=2.25)]
    rows += [row("attention", "full", 1024), row("scores", "causal", share=1.62)]
    rows += [row("decode", "h2o|kivi4", 131072, times_dynamic=3.0), row("decode", "h2o|kivi4", 8192, times_dynamic=9.0)]
    said = "\n".join(script.targets(rows))
    assert "full: bandwidth, at least 75 %: 80 %\n" in said
    assert "kivi2: times sdpa, at least 2.0: 2.25; or of the bound, at least 60 %: 60 %" in said
    assert "at most 170 %: 162 %" in said and "times dynamic, at least 2: 3.00" in said
    assert "times hf_quanto4, at least 5: not measured" in said


def test_bounds_by_hand(bench: Bench) -> None:
    bench.bandwidth = 4000.0  # GB/s
    bench.about |= {"multiprocessors": 132, "max_clock_mhz": 1980}
    found = script.rates(bench, Point("attention", "kivi4", 4, 32768), 200_000_000, 0.2)
    assert found["bytes_ms"] == pytest.approx(0.05) and found["gbs"] == pytest.approx(1000)
    elements = 2 * 4 * 8 * 32768 * 128
    instructions = script.INSTRUCTIONS["kivi4"] * elements / (132 * 128 * 1980e6) * 1000
    assert found["instructions_ms"] == pytest.approx(instructions)
    assert found["bound_share"] == pytest.approx(max(0.05, instructions) / 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", script.INSTRUCTIONS)
def test_instructions_are_those_of_the_compiled_loop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parent / "kernels" / "compiled.py"
    spec = importlib.util.spec_from_file_location("compiled", path)
    assert spec is not None and spec.loader is not None
    compiling = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compiled", compiling)
    spec.loader.exec_module(compiling)
    shape = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    keys, values, new = torch.randn(3, 1, 2, 256, 128, **shape)
    scheme = script.SCHEMES[name]
    kv = (KV.of(keys, values) if scheme is None else scheme.encode(keys, values)).append(new[:, :, :1], new[:, :, :1])
    recorders = {k: compiling.Recorder(getattr(kernels, k)) for k in ("split_attention", "merge_splits")}
    for k, recorder in recorders.items():
        monkeypatch.setattr(kernels, k, recorder)
    both, total = (backend.side(held, 1) for held in (kv.keys, kv.values)), kv.counts.per_head.flatten().int()
    query, at = torch.zeros(1, 8, 1, 128, **shape), torch.tensor([[256]])
    kernels.packed_decode(query, *both, at, kv.position, total, scaling=0.1, native=True)
    launch = recorders["split_attention"].launches[0]
    loops = compiling.compiled(recorders["split_attention"].kernel, capability=90, **launch).loops
    packed = min((loop for loop in loops if loop["HMMA"] or loop["HGMMA"]), key=lambda loop: loop["LDG"])
    elements = 2 * launch["constexprs"]["N"] * 128 / (32 * launch["num_warps"])
    assert sum(packed.values()) / elements == pytest.approx(script.INSTRUCTIONS[name], rel=0.1)


def test_code_that_git_does_not_know_is_named_by_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*args: Any, **options: Any) -> Any:
        raise OSError

    monkeypatch.setattr(script.subprocess, "run", no_git)
    assert revision("a5da4a412345") == "a5da4a412345"
    assert len(revision("")) == 9 and revision("")[0] == "+"


# -- tiles ---------------------------------------------------------------------------------------------------------


def sides(policy: Any, slots: int = 96) -> tuple[Any, Any]:
    kv: KV = policy.encode(*torch.randn(2, 3, 2, slots, 32))
    return backend.side(kv.keys, 0), backend.side(kv.values, 0)


def test_buckets_and_the_usual_tiles() -> None:
    query = torch.randn(3, 8, 1, 32)
    kivi, fp8 = sides(KIVI(4, 32, 0)), sides(FP8(), 65)
    assert kernels.bucket(query, *kivi) == "int4/channel32+int4/token32 d32 m16 s256 l16"
    assert kernels.bucket(query, *fp8) == "e4m38+e4m38 d32 m16 s256 l16"
    assert kernels.bucket(query, *sides(FP8(), 64)).endswith("s64 l16")
    assert kernels.bucket(query.expand(-1, -1, 8, -1), *fp8) == "e4m38+e4m38 d32 m32 s256 l16"
    assert kernels.tiles(query, *kivi).body == 32 and kernels.tiles(query, *fp8) == kernels.Tiles(64, 16, 4, 2)


def test_tuned_tiles_are_those_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kivi, fp8 = sides(KIVI(4, 32, 0)), sides(FP8())
    query = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda"), shape=(3, 8, 1, 32))
    table = {kernels.bucket(query, *side): [128, 8, 3] for side in (kivi, fp8)}
    monkeypatch.setattr(kernels, "tuned", lambda: {"A GPU, Triton 3": table})
    for name, found in (("A GPU, Triton 3", kernels.Tiles(128, 16, 8, 3)), ("Another", kernels.Tiles(64, 16, 4, 2))):
        monkeypatch.setattr(kernels, "machine", lambda device, name=name: name)
        assert kernels.tiles(query, *fp8) == found
    monkeypatch.setattr(kernels, "machine", lambda device: "A GPU, Triton 3")
    assert kernels.tiles(query, *kivi) == kernels.Tiles(32, 16, 8, 3)  # no longer than what shares scales
    query.dtype = torch.float32
    assert kernels.tiles(query, *fp8) == kernels.Tiles(64, 16, 4, 2)


def test_the_table_is_in_the_package_and_well_formed() -> None:
    for machine, table in kernels.tuned().items():
        assert ", Triton " in machine
        for found in table.values():
            assert len(found) == 3 and all(x > 0 and math.log2(x).is_integer() for x in found[:2])


def test_tuning_writes_the_table(tmp_path: Path, capsys: Any) -> None:
    table = tmp_path / "tuned.json"
    arguments = ["--dry-run", "--tune", "--table", str(table), "--out", str(tmp_path / "rows"), "--schemes", "fp8"]
    assert script.main(arguments) == 0
    found = json.loads(table.read_text())
    (name,) = found
    (key,) = found[name]
    assert key == "e4m38+e4m38 d32 m16 s256 l4"
    assert found[name][key][0] in (16, 32) and found[name][key][1:] == [4, 2]
    assert "usually" in capsys.readouterr().out


# -- the plot ------------------------------------------------------------------------------------------------------


def test_the_plot(dry: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import plot_roofline

    plot_roofline.main([str(dry), "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 10_000
    rows = read(dry)
    for row in rows:
        row["device"] = "A GPU"
        if row["part"] == "attention" and row["name"] in script.INSTRUCTIONS:
            row["instructions_ms"] = row["ms"] / 2
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    plot_roofline.main([str(tmp_path / "rows.jsonl")])
    assert (tmp_path / "roofline.png").stat().st_size > 10_000
    device, found = plot_roofline.attention_rows([*read(dry), *rows, *rows], None)
    assert device == "A GPU" and len(found) == 4  # sdpa and three formats
    with pytest.raises(SystemExit, match="no measured attention on Another"):
        plot_roofline.attention_rows(rows, "Another")
    with pytest.raises(SystemExit, match="make it: python scripts/bench_kernels.py"):
        plot_roofline.main([str(tmp_path / "none.jsonl")])
