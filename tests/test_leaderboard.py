"""The leaderboard on made-up cells whose headline numbers are known by construction or by hand."""

import ast
import csv
import hashlib
import html
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kvbench import leaderboard
from kvbench.leaderboard import build, load, main_compare, main_leaderboard
from kvbench.leaderboard.benchmarks import variant_of
from kvbench.leaderboard.chart import chart
from kvbench.leaderboard.needles import bins, heat
from kvbench.leaderboard.words import cell_text, column, number, percent, span
from kvbench.results import ResultsError, Task, cell_id, write_cell
from kvbench.tasks.longbench import KV_SUBTASKS

HOSTILE = "<script>alert(1)</script>|[red]\"'`x`{{7*7}}&\x1b[31m"
BITS = {"none": 16, "kivi4": 4.5, "kivi2": 2.5, "nvfp4": 4.5, "int8": 8.5}


def sample(i, score, *, seed=0, task="recall", rho=1.0, nll=None, meta=None):
    full = 65536
    return {
        "sample_id": f"s{i}",
        "prompt_sha256": hashlib.sha256(f"{task} {seed} {i}".encode()).hexdigest(),
        "prediction": "",
        "score": float(score),
        "nll": nll,
        "n_prompt_tokens": 512,
        "n_generated": 8,
        "kept_tokens": 512.0 * min(1.0, rho),
        "kv_bytes_prefill_end": int(rho * full),
        "kv_bytes_final": int(rho * full) + 512,
        "kv_bytes_full": full,
        "kv_bytes_full_final": full + 1024,
        "meta": meta or {},
    }


def cell(evict="full", quant="none", scores=(1, 1, 0, 1), *, task="recall", kind="generate", rho=1.0, **options):
    """A cell whose samples have these scores. `samples` overrides them; other options go to the configuration."""
    memory, budget = options.get("memory"), options.get("budget")
    inside = f"memory={memory}" if memory else f"budget={budget}" if budget else ""
    stack = options.get("stack") or " | ".join(
        p for p in (f"{evict}({inside})" if evict != "full" else "", quant if quant != "none" else "") if p
    )
    config = {
        "model": {"name": options.get("model", "tiny"), "path": "models/tiny", "dtype": "bfloat16"},
        "task": {"name": task, "kind": kind, **options.get("fields", {})},
        "policy": {"evict": evict, "quant": quant, "stack": stack or "Full()", "memory": memory, "budget": budget},
        "query_aware": options.get("query_aware", False),
        "seed": options.get("seed", 0),
    }
    config["model"] |= options.get("extra", {})
    samples = options.get("samples")
    if samples is None:
        prompt_seed = options.get("prompt_seed", 0)
        samples = [
            sample(i, s, seed=prompt_seed, task=task, rho=rho, nll=-math.log(s) if kind == "nll" else None)
            for i, s in enumerate(scores)
        ]
    status = options.get("status", "done")
    return {
        "schema": 1,
        "cell_id": cell_id(config),
        "config": config,
        "status": status,
        "reason": options.get("reason"),
        "provenance": {
            "commit": "0123abc",
            "command": "kvbench sweep preset=smoke",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "device": "cpu",
            "started": "2026-08-01T10:00:00Z",
            "seconds": 12.5,
        },
        "samples": samples if status == "done" else [],
        "checks": options.get("checks", {"fired": True, "bytes_ok": True}),
    }


def write(folder, *cells):
    for one in cells:
        write_cell(folder, one)
    return folder


def sweep(folder, n=60, memories=(0.5, 0.25, 0.125, 0.0625), evictors=None, seed=0):
    """A plausible grid: four tasks, seven evictors, three quantizers, with shared sample difficulty."""
    rng = np.random.default_rng(seed)
    skill = {
        "h2o": 0.8,
        "snapkv": 1.0,
        "tova": 0.7,
        "knorm": 0.25,
        "keydiff": 0.9,
        "streaming_llm": 0.45,
        "random": 0.1,
    }
    tasks = {"recall": 0.0, "niah": 0.6, "multi_query": -0.4}
    ease = {t: rng.logistic(size=n) for t in (*tasks, "ppl")}
    lengths, depths = (512, 1024, 2048), (0, 0.25, 0.5, 0.75, 1)

    def scores(task, loss, lift=2.5):
        return (ease[task] + lift + tasks[task] - loss + 0.3 * rng.logistic(size=n) > 0).astype(float)

    def add(evict, quant, loss, rho, kept=1.0, **options):
        for task in tasks:
            got = scores(task, loss)
            metas = (
                [{"length": lengths[i % 3], "depth": depths[i // 3 % 5]} for i in range(n)]
                if task == "niah"
                else [{}] * n
            )
            rows = [sample(i, s, task=task, rho=rho, meta=m) for i, (s, m) in enumerate(zip(got, metas, strict=True))]
            rows = [{**r, "kept_tokens": 512.0 * kept} for r in rows]
            write(folder, cell(evict, quant, task=task, samples=rows, fields={"length": 1024, "n": n}, **options))
        nll = 2.1 + 0.1 * ease["ppl"] + 0.12 * loss
        rows = [sample(i, math.exp(-v), task="ppl", rho=rho, nll=float(v)) for i, v in enumerate(nll)]
        rows = [{**r, "kept_tokens": 512.0 * kept} for r in rows]
        write(folder, cell(evict, quant, task="ppl", kind="nll", samples=rows, fields={"window": 256}, **options))

    damage = {"none": 0.0, "kivi4": 0.05, "kivi2": 0.5, "nvfp4": 0.12}
    for quant, extra in damage.items():
        add("full", quant, extra, BITS[quant] / 16)
    add("full", "none", 0.0, 1.0, seed=1)  # the A/A run
    for evict, good in list(skill.items())[:evictors]:
        for memory in memories:
            for quant, extra in damage.items():
                share = memory * 16 / BITS[quant]
                if share < 1:
                    loss = extra + (1.5 - good) * 0.45 * -math.log2(share)
                    add(evict, quant, loss, memory * 0.99, share, memory=memory)
        for quant, extra in damage.items():  # the factorial part: equal tokens, so contrasts can be formed
            loss = extra + (1.5 - good) * 0.9 + 0.8 * (evict == "knorm" and extra > 0.3)
            add(evict, quant, loss, 0.25 * BITS[quant] / 16, 0.25, budget=0.25)
    reason = "budget of 32 tokens is smaller than the protected window of 64"
    write(
        folder,
        cell("snapkv", "none", memory=0.03125, status="infeasible", reason=reason, fields={"length": 1024, "n": n}),
    )
    return folder


def the_only_section(folder):
    board = load(folder, resamples=300)
    (section,) = board.sections
    return board, section, {s.key: s for s in section.stacks}


class Page(HTMLParser):
    """The tags and the visible text of a page, read by an independent parser."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.values = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.values += [f"{k}={v}" for k, v in attributes]

    def handle_data(self, data):
        self.words.append(data)


def test_headline_difference_and_bytes_by_hand(tmp_path):
    write(
        tmp_path,
        cell(scores=[1, 1, 1, 0]),
        cell(scores=[0.5, 0.5, 0.5, 0.5], task="qa"),
        cell("h2o", scores=[1, 0, 1, 0], memory=0.5, rho=0.5),
        cell("h2o", scores=[0.5, 0.25, 0.5, 0.25], memory=0.5, rho=0.25, task="qa"),
    )
    _, section, stacks = the_only_section(tmp_path)
    h2o = stacks["h2o@0.5"]
    assert h2o.headline.estimate == pytest.approx((2 / 3 + 0.75) / 2)  # retention per task, then the mean
    assert h2o.headline.low <= h2o.headline.estimate <= h2o.headline.high
    assert h2o.delta.estimate == pytest.approx(-(0.25 + 0.125) / 2)
    assert h2o.rho == pytest.approx(0.375)  # ratio of sums over both tasks
    assert h2o.rho_final == pytest.approx((4 * (32768 + 512) + 4 * (16384 + 512)) / (8 * (65536 + 1024)))
    assert stacks["full cache"].headline.estimate == 1.0
    assert section.retention
    assert section.notes == ["Fewer than 20 samples in qa, recall: intervals are too narrow to rely on."]
    assert [(g.label, [s.key for s in rows]) for g, rows in section.groups] == [
        ("no budget", ["full cache"]),
        ("50% of the bytes", ["h2o@0.5"]),
    ]


def test_rank_is_within_a_budget_and_ties_with_the_best_are_marked(tmp_path):
    rng = np.random.default_rng(0)
    base = (rng.random(200) < 0.9).astype(float)
    slightly, badly = base.copy(), base.copy()
    slightly[np.flatnonzero(base)[:2]] = 0
    slightly[np.flatnonzero(base == 0)[:2]] = 1
    badly[np.flatnonzero(base)[:80]] = 0
    write(tmp_path, cell(scores=base))
    for name, scores in (("a", base), ("b", slightly), ("c", badly)):
        write(tmp_path, cell(name, scores=scores, memory=0.25, rho=0.25))
    write(tmp_path, cell("c", scores=badly, memory=0.125, rho=0.125))
    _, _, stacks = the_only_section(tmp_path)
    assert [stacks[f"{x}@0.25"].rank for x in "abc"] == [1, 2, 3]
    assert [stacks[f"{x}@0.25"].like_best for x in "abc"] == [False, True, False]
    assert stacks["c@0.125"].rank == 1
    assert stacks["c@0.25"].frontier == 0 and stacks["c@0.125"].frontier == 1


def test_differences_below_the_noise_floor_are_not_resolved(tmp_path):
    full = [1.0] * 50 + [0.0] * 50
    again = [1.0] * 40 + [0.0] * 10 + [1.0] * 10 + [0.0] * 40  # 20 % flips
    near = [1.0] * 42 + [0.0] * 58  # 8 points below, and every one of 8 discordant pairs against it
    write(tmp_path, cell(scores=full), cell(scores=again, seed=1))
    write(tmp_path, cell("a", scores=full, memory=0.5), cell("b", scores=near, memory=0.5))
    _, section, stacks = the_only_section(tmp_path)
    assert section.floor.flips == pytest.approx(0.2)
    assert any("20.0 % of 100" in line for line in section.caption)
    assert stacks["b@0.5"].like_best


def test_perplexity_is_shown_and_its_score_is_ranked(tmp_path):
    write(
        tmp_path,
        cell(scores=[0.5, 0.25], task="ppl", kind="nll"),
        cell("a", scores=[0.5, 0.125], task="ppl", kind="nll"),
    )
    _, section, stacks = the_only_section(tmp_path)
    assert stacks["full cache"].tasks["ppl"].perplexity.estimate == pytest.approx(math.sqrt(2 * 4))
    assert stacks["a"].tasks["ppl"].perplexity.estimate == pytest.approx(math.sqrt(2 * 8))
    assert stacks["a"].headline.estimate == pytest.approx(0.3125 / 0.375)
    assert column(section.tasks[0]) == "ppl"


def test_without_a_full_cache_the_rank_is_on_raw_scores(tmp_path, capsys):
    write(tmp_path, cell("a", scores=[1, 0.5, 0.5]), cell("b", scores=[1, 1, 0.5]))
    board = build(tmp_path, tmp_path / "out", resamples=200)
    (section,) = board.sections
    assert [s.key for _, rows in section.groups for s in rows] == ["b", "a"]
    assert section.stacks[0].headline.estimate == pytest.approx(2 / 3) and section.stacks[0].delta is None
    assert sum("No full-cache cells" in note for note in section.notes) == 1
    said = capsys.readouterr().out
    assert "No full-cache cells" in said and "score %" in said
    for name in ("leaderboard.md", "index.html"):
        assert "No full" in (tmp_path / "out" / name).read_text().replace("\\", "")


def test_modes_and_models_never_meet(tmp_path):
    write(tmp_path, cell(), cell(query_aware=True), cell(model="other"), cell(extra={"path": "models/elsewhere"}))
    board = build(tmp_path, tmp_path / "out", resamples=100, quiet=True)
    assert [s.title for s in board.sections] == [
        "other · bfloat16 · query-agnostic",
        "tiny · bfloat16 · query-agnostic · models/elsewhere",
        "tiny · bfloat16 · query-agnostic · models/tiny",
        "tiny · bfloat16 · query-aware",
    ]
    assert all(len(s.stacks) == 1 for s in board.sections)
    assert len([p for p in board.files if p.name.startswith("pareto")]) == 4
    assert len(set(board.files)) == len(board.files) and all(p.exists() for p in board.files)


def test_batch_size_does_not_make_a_model_but_an_aa_pair(tmp_path):
    write(tmp_path, cell(scores=[1, 1, 0, 1]), cell(scores=[1, 1, 1, 1], extra={"batch_size": 4}))
    _, section, stacks = the_only_section(tmp_path)
    assert section.floor.flips == 0.25
    assert stacks["full cache"].tasks["recall"].score.estimate == pytest.approx((3 + 0.5) / 4)


def test_infeasible_and_failed_cells_are_listed_with_their_reason(tmp_path, capsys):
    write(tmp_path, cell(), cell("h2o", memory=0.01, status="infeasible", reason="budget below the protected window"))
    write(tmp_path, cell("h2o", memory=0.5, status="failed", reason="out of memory"))
    board = build(tmp_path, resamples=100)
    assert {(x.status, x.stack, x.reason) for x in board.left_out} == {
        ("infeasible", "h2o@0.01", "budget below the protected window"),
        ("failed", "h2o@0.5", "out of memory"),
    }
    for text in (
        capsys.readouterr().out,
        *((tmp_path / n).read_text() for n in ("leaderboard.md", "leaderboard.csv", "index.html")),
    ):
        assert "budget below the protected window" in " ".join(text.split()) and "out of memory" in text


def test_only_infeasible_cells_still_make_a_page(tmp_path, capsys):
    write(tmp_path, cell("h2o", memory=0.01, status="infeasible", reason="too small"))
    assert main_leaderboard([str(tmp_path)]) == 0
    assert "No finished cell yet" in capsys.readouterr().out
    assert "too small" in (tmp_path / "index.html").read_text()


def test_a_stack_that_misses_a_task_is_shown_unranked(tmp_path):
    write(tmp_path, cell(), cell(task="qa"), cell("a"), cell("b"), cell("b", task="qa"))
    board, section, stacks = the_only_section(tmp_path)
    assert stacks["a"].rank is None and stacks["a"].missing == ("qa",) and math.isnan(stacks["a"].headline.estimate)
    assert stacks["b"].rank is not None
    assert "incomplete" in leaderboard.to_markdown(board) and "missing: qa" in leaderboard.to_csv(board)


def test_an_error_scores_zero_on_the_samples_of_the_others(tmp_path, capsys):
    """Or else who fails where it is hard would lead. What cannot be run at all (infeasible) has no score."""
    easy, hard = [1.0] * 20, [1.0] * 10 + [0.5] * 10
    lost = {"status": "failed", "reason": "out of memory"}
    for task, scores in (("easy", easy), ("hard", hard)):
        write(tmp_path, cell(task=task, scores=scores), cell("steady", task=task, scores=[0.9 * s for s in scores]))
        write(tmp_path, cell(quant="q", task=task, scores=scores, rho=0.25))
    write(tmp_path, cell("fails", task="easy", scores=easy, rho=0.5), cell("fails", task="hard", **lost))
    write(tmp_path, cell("fails", "q", task="easy", scores=easy, rho=0.5), cell("fails", "q", task="hard", **lost))
    write(tmp_path, cell("cannot", task="easy"), cell("cannot", task="hard", status="infeasible", reason="too small"))
    write(tmp_path, cell("never", task="easy", **lost), cell("never", task="hard", **lost))
    for stack in (("full", "none"), ("steady", "none"), ("full", "q"), ("fails", "q")):
        rho = 0.5 if stack[0] == "fails" else 1.0
        write(tmp_path, cell(*stack, task="text", kind="nll", scores=[0.2] * 20, rho=rho))
    write(tmp_path, cell("fails", task="text", kind="nll", scores=[], **lost))
    board, section, stacks = the_only_section(tmp_path)
    assert stacks["fails"].failed == ("hard", "text") and not stacks["fails"].missing
    assert stacks["fails"].tasks["hard"].score.estimate == 0 and stacks["fails"].tasks["hard"].n == 20
    assert stacks["fails"].headline.estimate == pytest.approx(1 / 3)  # of easy, hard and text
    assert stacks["fails"].delta.estimate == pytest.approx((1 - 1 + 0 - 0.75 + 0 - 0.2) / 3)
    assert stacks["fails"].rank > stacks["steady"].rank
    assert stacks["fails"].rho == pytest.approx(0.5) and len(stacks["fails"].cells) == 1  # of what has bytes
    assert cell_text(stacks["fails"].tasks["text"]) == "∞" and cell_text(stacks["fails"].tasks["hard"]) == "0.0"
    assert stacks["cannot"].rank is None and stacks["cannot"].missing == ("hard", "text") and "never" not in stacks
    assert not section.contrasts  # a crash says nothing of how damages add up
    statuses = {(x.stack, x.task): x.status for x in board.left_out}
    assert statuses["fails", "hard"] == "failed, scores 0" and statuses["cannot", "hard"] == "infeasible"
    assert statuses["never", "hard"] == "failed"
    assert "its samples score 0 and have no bytes (3 here)" in " ".join(section.caption)
    assert "failed: hard, text" in leaderboard.to_markdown(board) and "failed: hard, text" in leaderboard.to_html(board)
    assert main_compare(["steady", "fails", str(tmp_path), "--resamples", "200"]) == 0
    said = capsys.readouterr().out
    assert "Failed, scores 0: fails on hard: out of memory" in said and "hard (n = 20): 67.5 % against 0.0 %" in said
    assert "fails 50.0 % of the full cache" in said  # on easy, which both finished


def test_one_sample_tasks_work_and_claim_nothing(tmp_path):
    write(tmp_path, cell(scores=[1]), cell("a", scores=[1], memory=0.5), cell("b", scores=[0], memory=0.5))
    board = build(tmp_path, resamples=100, quiet=True)
    stacks = {s.key: s for s in board.sections[0].stacks}
    assert stacks["b@0.5"].headline.estimate == 0 and stacks["b@0.5"].headline.high > 1
    assert stacks["b@0.5"].rank == 2 and stacks["b@0.5"].like_best and not stacks["b@0.5"].differs
    assert "nan" not in (tmp_path / "leaderboard.md").read_text()
    assert "nan" not in Page((tmp_path / "index.html").read_text().split("<script>")[0]).words


def test_cells_on_other_prompts_are_left_out_not_paired(tmp_path):
    write(tmp_path, cell(), cell("a"), cell("b", prompt_seed=5))
    board, section, stacks = the_only_section(tmp_path)
    assert set(stacks) == {"full cache", "a"}
    assert [(x.stack, x.status) for x in board.left_out] == [("b", "not comparable")]
    assert "prompt_sha256" in board.left_out[0].reason


def test_data_seeds_are_more_samples_and_policy_seeds_are_averaged(tmp_path):
    write(tmp_path, cell(scores=[1, 1]), cell(scores=[1, 0], seed=1, prompt_seed=1))
    write(tmp_path, cell("a", scores=[1, 0]), cell("a", scores=[0, 0], seed=1, prompt_seed=1))
    _, _, stacks = the_only_section(tmp_path)
    assert stacks["a"].n == 4 and stacks["a"].headline.estimate == pytest.approx(1 / 3)
    again = tmp_path / "policy seeds"
    write(again, cell(scores=[1, 1]), cell("random", scores=[1, 0]), cell("random", scores=[0, 0], seed=1))
    _, _, stacks = the_only_section(again)
    assert stacks["random"].n == 2 and stacks["random"].headline.estimate == pytest.approx(0.25)


def test_a_failed_check_is_visible(tmp_path):
    write(tmp_path, cell(), cell("a", checks={"fired": False, "bytes_ok": True}))
    board, _, _ = the_only_section(tmp_path)
    assert "check failed: fired" in leaderboard.to_html(board)
    assert "check failed: fired" in leaderboard.to_markdown(board).replace("\\", "")


def test_interaction_needs_equal_kept_tokens(tmp_path):
    rng = np.random.default_rng(0)
    scores = {("full", "none"): 0.9, ("full", "q"): 0.8, ("h2o", "none"): 0.8, ("h2o", "q"): 0.4}
    for (evict, quant), mean in scores.items():
        rows = [
            {**sample(i, v), "kept_tokens": 512 if evict == "full" else 128}
            for i, v in enumerate(rng.normal(mean, 0.02, 30).clip(0, 1))
        ]
        write(tmp_path, cell(evict, quant, samples=rows, budget=None if evict == "full" else 128))
    rows = [{**sample(i, 0.5), "kept_tokens": 300} for i in range(30)]
    write(tmp_path, cell("h2o", "q", samples=rows, memory=0.25))
    _, section, _ = the_only_section(tmp_path)
    (contrast,) = section.contrasts
    assert contrast.stack.key == "h2o+q@128tokens"
    assert contrast.value.score.estimate == pytest.approx(0.3, abs=0.03)
    assert contrast.verdict == "stacking hurts more than the sum"
    board = load(tmp_path, resamples=200)
    for text in (leaderboard.to_markdown(board), html.unescape(leaderboard.to_html(board))):
        assert (
            "Intervals on logits come from the resamples, which know nothing of departures that did not occur." in text
        )
    (logit,) = (c.value.logit for c in board.sections[0].contrasts)
    ends = f"{number(logit.estimate, 2, True)} | {number(logit.low, 2)} to {number(logit.high, 2)} | stacking hurts"
    assert ends in leaderboard.to_markdown(board)


def table_of(section, title):
    """The rows of a further table, by name."""
    table = next(t for t in section.tables if t.title == title)
    return table, {row.name: dict(zip(table.head[1:], row.cells, strict=True)) for row in table.rows}


def test_seeds_of_a_task_are_one_column_and_its_strata(tmp_path):
    for seed, high in ((0, 1.0), (1, 0.5), (2, 0.0)):
        rows = [sample(f"{i}-s{seed}", 1, seed=seed) for i in range(4)]
        damaged = [{**r, "score": high} for r in rows]
        write(tmp_path, cell(samples=rows, seed=seed, fields={"seed": seed}))
        write(tmp_path, cell("a", samples=damaged, seed=seed, fields={"seed": seed}))
    board, section, stacks = the_only_section(tmp_path)
    assert [(t.label, t.n, t.seeds) for t in section.tasks] == [("recall", 12, (0, 1, 2))]
    a = stacks["a"]
    assert a.headline.estimate == 0.5 and a.headline.low == a.headline.high  # seeds are drawn apart
    assert a.seed_sd == pytest.approx(0.5) and stacks["full cache"].seed_sd == 0
    _, rows = table_of(section, "Between data seeds")
    assert rows["a"] == {"Seed 0": "100.0", "Seed 1": "50.0", "Seed 2": "0.0", "SD": "50.0"}
    assert any("Between data seeds" in line and "at worst 50.0" in line for line in section.caption)
    assert section.floor is None  # other prompts are no second run


def test_a_task_seed_that_keeps_the_prompts_is_no_stratum(tmp_path):
    """Sampled decoding: three draws of the answer to the same prompts are averaged per sample."""
    for seed in range(3):
        write(tmp_path, cell(scores=[1, 1, 1, 1], seed=seed, fields={"seed": seed}))
        write(tmp_path, cell("a", scores=[1, 0, 1, float(seed == 0)], seed=seed, fields={"seed": seed}))
    _, section, stacks = the_only_section(tmp_path)
    assert stacks["a"].n == 4 and stacks["a"].headline.estimate == pytest.approx((1 + 0 + 1 + 1 / 3) / 4)
    assert math.isnan(stacks["a"].seed_sd) and stacks["a"].headline.low < stacks["a"].headline.high


def test_a_task_without_signal_is_not_ranked(tmp_path):
    good, weak = [1.0] * 30, [1.0] * 2 + [0.0] * 28
    write(tmp_path, cell(scores=good), cell(scores=weak, task="qa"))
    write(tmp_path, cell("a", scores=good), cell("a", scores=[0.0] * 30, task="qa"))
    write(tmp_path, cell("b", scores=[1.0] * 20 + [0.0] * 10))  # did not run on qa, which does not count
    board, section, stacks = the_only_section(tmp_path)
    assert {t.label: t.signal for t in section.tasks} == {"qa": False, "recall": True}
    assert stacks["a"].headline.estimate == 1 and stacks["a"].delta.estimate == 0
    assert stacks["b"].rank is not None and not stacks["b"].missing
    assert any("No signal, so shown but not ranked: qa (6.7 %)" in note for note in section.notes)
    assert "no signal" in leaderboard.to_html(board) and "no signal" in leaderboard.to_markdown(board)


def test_if_no_task_has_signal_the_table_says_so(tmp_path, capsys):
    write(tmp_path, cell(scores=[1] + [0] * 799), cell("a", scores=[1] + [0] * 799))
    _, section, stacks = the_only_section(tmp_path)
    assert any("No task has signal" in note for note in section.notes)
    assert stacks["a"].delta.low > -0.01 and not stacks["a"].lossless  # nothing was there to be lost
    assert main_compare(["a", "full", str(tmp_path), "--resamples", "50"]) == 0
    said = capsys.readouterr().out
    assert "No signal, so nothing is said of equivalence: recall (0.1 %)." in said and "quivalent" not in said


def test_compare_counts_the_tasks_that_the_leaderboard_ranks(tmp_path, capsys):
    """Nine tasks that the full cache cannot do would make a loss of 40 points one of 4, and 4 are no more than 5."""
    write(tmp_path, cell(scores=[1] * 100), cell("a", scores=[1] * 60 + [0] * 40, rho=0.25))
    for k in range(9):
        write(tmp_path, cell(scores=[0] * 100, task=f"noise{k}"), cell("a", scores=[0] * 100, task=f"noise{k}"))
    (section,) = load(tmp_path, resamples=500).sections
    difference = next(s.difference for s in section.stacks if s.key == "a")
    assert main_compare(["a", "full", str(tmp_path), "--resamples", "500", "--margin", "5"]) == 0
    said = capsys.readouterr().out
    assert difference.interval.estimate == pytest.approx(-0.4)
    assert f"true differences of {percent(difference.detectable)} points or more" in said
    assert (
        f"40.0 points lower than full cache: the difference is real (95 % interval {span(difference.interval)})" in said
    )
    assert "quivalent" not in said
    left = [line for line in said.splitlines() if "noise" in line]
    assert len(left) == 1 and left[0].startswith("No signal, so left out: noise0 (0.0 %), noise1 (0.0 %), ")
    assert "not more than 5 points above chance" in left[0] and "Samples: 100 paired" in said


def test_likelihoods_need_no_signal(tmp_path):
    write(
        tmp_path, cell(scores=[0.02] * 5, task="ppl", kind="nll"), cell("a", scores=[0.01] * 5, task="ppl", kind="nll")
    )
    _, section, stacks = the_only_section(tmp_path)
    assert section.tasks[0].signal and stacks["a"].headline.estimate == pytest.approx(0.5)


def test_retention_counts_from_a_zero_or_from_chance(tmp_path):
    write(tmp_path, cell(scores=[1] * 30), cell("a", scores=[1] * 15 + [0] * 15))
    write(tmp_path, cell("tiny", scores=[1] * 6 + [0] * 24, budget=4))
    by_stack = {s.key: s for s in load(tmp_path, resamples=100, zero="tiny@4tokens").sections[0].stacks}
    assert by_stack["a"].headline.estimate == pytest.approx((0.5 - 0.2) / 0.8)
    assert by_stack["tiny@4tokens"].headline.estimate == 0
    other = load(tmp_path, resamples=100, zero="gone").sections[0]
    assert any("No stack gone here" in note for note in other.notes)
    choices = tmp_path / "choices"
    write(
        choices,
        cell(scores=[1] * 30, task="longbench_v2_x"),
        cell("a", scores=[1] * 15 + [0] * 15, task="longbench_v2_x"),
    )
    _, _, stacks = the_only_section(choices)
    assert stacks["a"].headline.estimate == pytest.approx((0.5 - 0.25) / 0.75)


@pytest.mark.parametrize(
    ("task", "guess", "signal"),
    [
        ("longbench_v2", 0.25, False),
        ("scbench_choice_eng", 0.25, False),
        ("scbench_many_shot", 0.165, False),
        ("scbench_kv", 0.165, True),  # a value that cannot be guessed
    ],
)
def test_guessing_is_no_signal(tmp_path, task, guess, signal):
    write(tmp_path, cell(scores=np.arange(400) < 400 * guess, task=task))
    write(tmp_path, cell(scores=[1] * 400))  # a task with signal, so that the other can be left out
    _, section, _ = the_only_section(tmp_path)
    assert {t.label: t.signal for t in section.tasks} == {"recall": True, task: signal}


def test_lossless_needs_many_samples(tmp_path):
    for name, n in (("few", 30), ("many", 400)):
        write(
            tmp_path / name,
            cell(scores=[1] * n),
            cell("a", scores=[1] * n),
            cell("b", scores=[0] * 60 + [1] * (n - 60)),
        )
    _, section, stacks = the_only_section(tmp_path / "many")
    assert stacks["a"].lossless and not stacks["b"].lossless and stacks["b"].differs
    assert stacks["b"].p_adjusted == pytest.approx(2 * stacks["b"].difference.p)  # Holm over two
    _, _, stacks = the_only_section(tmp_path / "few")
    assert not stacks["a"].lossless and not stacks["a"].differs
    board = load(tmp_path / "many", resamples=100, margin=0.005, correction="bh")
    assert not any(s.lossless for s in board.sections[0].stacks)
    assert any("exploration" in line for line in board.sections[0].caption)


def test_a_stack_that_is_surely_beaten_names_its_better(tmp_path):
    write(tmp_path, cell(scores=[1] * 60), cell("a", scores=[1] * 55 + [0] * 5, memory=0.25, rho=0.25))
    write(tmp_path, cell("b", scores=[1] * 20 + [0] * 40, memory=0.5, rho=0.5))
    board, _, stacks = the_only_section(tmp_path)
    assert stacks["b@0.5"].dominated_by is stacks["a@0.25"] and stacks["a@0.25"].dominated_by is None
    assert "Surely beaten by" in leaderboard.to_html(board) and ",a@0.25," in leaderboard.to_csv(board)


def test_a_full_grid_gives_rates_gains_and_areas(tmp_path):
    rng = np.random.default_rng(0)
    ease = rng.uniform(-0.02, 0.02, 40)
    kept, bits = {1: 1.0, 2: 0.5, 4: 0.25}, {"none": 16, "q8": 8, "q4": 4}
    for r, share in kept.items():
        for quant, b in bits.items():
            x, y = math.log2(r), math.log2(16 / b)
            score = 0.95 - 0.05 * x - 0.02 * y - 0.03 * x * y + ease
            rows = [{**sample(i, s, rho=share * b / 16), "kept_tokens": 512 * share} for i, s in enumerate(score)]
            evict, budget = ("full", None) if r == 1 else ("h2o", share)
            write(tmp_path, cell(evict, quant, samples=rows, budget=budget))
    board, section, _ = the_only_section(tmp_path)
    table, rates = table_of(section, "How does the damage grow when both are turned up?")
    assert rates["h2o"]["Grid"] == "2 × 2" and rates["h2o"]["g, points"] == "+3.00"
    assert rates["h2o"]["95 %"] == "–"  # of 40 samples, and departures without any spread
    split = rates["h2o"]["Best share of quantization"]
    assert split == "2×: 100 %*, 4×: 100 %*, 8×: 67 %*, 16×: 50 %*"  # a bit costs less than a token, up to q4
    assert "know nothing of departures that did not occur" in table.text and "marked * stands at the edge" in table.text
    table, gains = table_of(section, "What does stacking gain at equal bytes?")
    assert gains["4×"]["Its bytes, %"] == gains["4×"]["The stack's bytes, %"] == "25.0 (4.0×)"
    assert table.note == "No row where nothing so small was measured: 8× (no method alone), 16× (no method alone), " + (
        "32× (no method alone and no stack)."
    )
    assert html.escape(table.note, quote=False) in leaderboard.to_html(board)
    assert table.note in leaderboard.to_markdown(board).replace("\\", "")
    assert gains["4×"]["Best alone"] == "q4" and gains["4×"]["Best stack"] == "h2o+q8@50%tokens"
    assert (
        gains["4×"]["Reading"] == "one method alone wins" and float(gains["4×"]["Gain, points"].replace("−", "-")) < 0
    )
    _, kinds = table_of(section, "What each kind of compression reaches")
    assert list(kinds) == ["Eviction alone", "Quantization alone", "Both, stacked", "All of them"]
    full = 0.95 + ease.mean()
    best = [(1, full - 0.02), (1, full - 0.04)]  # q8 and q4, one octave each
    assert kinds["Quantization alone"]["Hypervolume, %"] == f"{100 * sum(w * s / full for w, s in best) / 5:.1f}"
    table, curves = table_of(section, "Curves over budgets")
    assert set(curves) == {"h2o", "h2o + q8", "h2o + q4"} and curves["h2o"]["Up to"] == "4× *"
    area = ((1 + (full - 0.05) / full) / 2 + (full - 0.05 + full - 0.1) / full / 2) / 2
    assert curves["h2o"]["Area, %"] == f"{100 * area:.1f}"
    assert table.title in leaderboard.to_html(board) and table.title in leaderboard.to_markdown(board)


def test_the_rate_has_an_interval_where_resamples_know_enough(tmp_path):
    rng, n = np.random.default_rng(1), 100
    for evict, share in (("full", 1.0), ("h2o", 0.5), ("h2o", 0.25)):
        for quant, bits in (("none", 16), ("q8", 8), ("q4", 4)):
            x, y = -math.log2(share), math.log2(16 / bits)
            score = 0.9 - 0.03 * (x * x + y * y) - 0.02 * x * y + rng.uniform(-0.02, 0.02, n)
            rows = [{**sample(i, s, rho=share * bits / 16), "kept_tokens": 512 * share} for i, s in enumerate(score)]
            write(tmp_path, cell(evict, quant, samples=rows, budget=None if share == 1 else share))
    _, section, _ = the_only_section(tmp_path)
    _, rates = table_of(section, "How does the damage grow when both are turned up?")
    low, high = (float(end.replace("−", "-")) for end in rates["h2o"]["95 %"].split(" to "))
    assert low < 2 < high < 3
    assert re.match(r"2×: \d+ % \(\d+ to \d+\), 4×: ", rates["h2o"]["Best share of quantization"])  # inside: no *


GAINS = "What does stacking gain at equal bytes?"


def gains_of(folder, **options):
    section = load(folder, resamples=300, **options).sections[0]
    return {row.name: row.cells[-1] for table in section.tables if table.title == GAINS for row in table.rows}


def test_a_winner_holds_no_more_bytes(tmp_path):
    rng = np.random.default_rng(0)

    def add(evict, quant, rho, mean, **options):
        write(tmp_path, cell(evict, quant, scores=mean + rng.uniform(-0.02, 0.02, 80), rho=rho, **options))

    add("full", "none", 1.0, 0.95)
    add("full", "q", 0.4, 0.9)
    add("h2o", "none", 0.25, 0.6, memory=0.25)
    add("h2o", "q", 0.25, 0.8, memory=0.25)
    assert gains_of(tmp_path) == {"2×": "unlike bytes: the better one holds 60 % more", "4×": "stacking wins"}
    add("full", "q2", 0.2, 0.9)  # the better one holds less
    assert gains_of(tmp_path)["4×"] == "one method alone wins"


def test_gains_are_corrected_for_the_number_of_rows(tmp_path):
    """One pair serves two compressions, and of thirteen wrong answers six are in the reported half: p = 2/64, twice."""
    base = np.ones(120)
    scores = np.where(np.arange(120) < 13, 0.0, 1.0)
    write(tmp_path, cell(scores=base), cell("full", "q", scores=scores, rho=0.25))
    write(tmp_path, cell("h2o", "q", scores=base, rho=0.25, memory=0.25))
    assert set(gains_of(tmp_path)) == {"2×", "4×"}
    assert set(gains_of(tmp_path).values()) == {"not resolved"}
    assert set(gains_of(tmp_path, correction="none").values()) == {"stacking wins"}


def test_a_gain_of_unknown_size_is_still_a_gain(tmp_path):
    """No answer changes, and all likelihoods do: that stands after the correction, and its size is open."""
    nll = np.linspace(0.3, 0.5, 40)
    for stack, loss in ((("full", "none"), 0.0), (("full", "q"), 0.003), (("h2o", "q"), 0.001)):
        options = {} if stack == ("full", "none") else {"rho": 0.25}
        write(tmp_path, cell(*stack, scores=[1] * 40, **options))
        write(tmp_path, cell(*stack, task="ppl", kind="nll", scores=nll - loss, **options))
    assert gains_of(tmp_path)["4×"] == "stacking wins, by how much is open"


def test_why_there_are_no_contrasts(tmp_path, capsys):
    def add(folder, evict, quant, kept, **options):
        rows = [{**sample(i, 1, rho=kept), "kept_tokens": 512 * kept} for i in range(30)]
        write(folder, cell(evict, quant, samples=rows, **options))

    title = "Do eviction and quantization compose?"
    for evict, quant, kept, options in (
        ("full", "none", 1, {}), ("full", "q", 1, {}), ("h2o", "none", 0.25, {"memory": 0.25}),
    ):  # fmt: skip
        add(tmp_path, evict, quant, kept, **options)
    board, section, _ = the_only_section(tmp_path)
    assert title not in leaderboard.to_markdown(board) + leaderboard.to_html(board)  # no stack of both kinds
    add(tmp_path, "h2o", "q", 0.9, memory=0.25)
    board = build(tmp_path, tmp_path / "out", resamples=100)
    said = (
        "No contrast can be formed: given the same bytes, stacks kept more tokens than their evictor alone. A sweep "
        "with budget= (shares of the tokens) gives it."
    )
    texts = capsys.readouterr().out, leaderboard.to_markdown(board).replace("\\", ""), leaderboard.to_html(board)
    for text in (" ".join(text.split()) for text in texts):
        assert title in text and said in text
    other = tmp_path / "other"
    add(other, "full", "none", 1)
    add(other, "h2o", "q", 0.5, memory=0.25)
    _, section, _ = the_only_section(other)
    table, rows = table_of(section, title)
    assert not rows and "its evictor alone at the same kept tokens and its quantizer alone" in table.text


def test_contrasts_are_shown_in_the_terminal_too(tmp_path, capsys):
    for evict, quant, kept in (("full", "none", 1), ("full", "q", 1), ("h2o", "none", 0.5), ("h2o", "q", 0.5)):
        rows = [{**sample(i, 1), "kept_tokens": 512 * kept} for i in range(30)]
        write(tmp_path, cell(evict, quant, samples=rows, budget=None if evict == "full" else 0.5))
    build(tmp_path, tmp_path / "out", resamples=100)
    said = capsys.readouterr().out
    assert "Do eviction and quantization compose?" in said and "no departure" in said


def test_shares_and_numbers_of_tokens_have_names_of_their_own(tmp_path, capsys):
    write(tmp_path, cell(scores=[1] * 20), cell("a", scores=[0] * 20, budget=0.5))
    for k, budget in enumerate((1, 1.0, 16384)):
        write(tmp_path, cell("a", scores=[1] * (k + 1) + [0] * (19 - k), budget=budget))
    _, _, stacks = the_only_section(tmp_path)
    assert set(stacks) == {"full cache", "a@50%tokens", "a@100%tokens", "a@1tokens", "a@16384tokens"}
    for key, score in (("a@50%tokens", "0.0"), ("a@1tokens", "5.0"), ("a@100%tokens", "10.0")):
        assert main_compare([key, "full", str(tmp_path), "--resamples", "50"]) == 0
        assert f"Mean scores: {key} {score} %" in capsys.readouterr().out


def test_the_floor_tells_flips_from_rounding(tmp_path):
    nll = np.linspace(0.3, 0.5, 24)

    def line(folder, *again):
        write(tmp_path / folder, cell(scores=[1] * 30), cell(scores=nll, task="ppl", kind="nll"))
        write(tmp_path / folder, *again)
        return the_only_section(tmp_path / folder)[1].caption[-2]

    rounded = cell(scores=nll + 1e-5, task="ppl", kind="nll", seed=1)
    agree = "A/A floor: two runs of the full cache agree on all 30 samples with generated answers (95 % bound of the "
    agree += "flip rate 10 %)"
    assert line("answers", cell(scores=[1] * 30, seed=1)) == f"{agree}."
    assert line("both", cell(scores=[1] * 30, seed=1), cell(scores=nll, task="ppl", kind="nll", seed=1)) == (
        f"{agree} and in the scores of likelihood tasks."
    )
    assert line("rounding", cell(scores=[1] * 30, seed=1), rounded) == (
        f"{agree} and differ by 0.001 points (mean |difference|) in the scores of likelihood tasks; differences below "
        "0.0005 points are not resolved."
    )
    assert line("only", rounded).startswith("A/A floor: two runs of the full cache differ by 0.001 points (mean |")
    assert "differ on 10.0 % of 30 samples with generated answers and differ by 0.001 points" in line(
        "flips", cell(scores=[0] * 3 + [1] * 27, seed=1), rounded
    )
    drift = cell(scores=np.linspace(0.8, 1.0, 20), task="drift", kind="fidelity")
    more = cell(scores=np.linspace(0.79, 0.99, 20), task="drift", kind="fidelity", seed=1)
    assert f"{agree} and differ by 1.0 points" in line("fidelity", drift, more, cell(scores=[1] * 30, seed=1))


def test_likelihoods_kept_count_from_zero_and_that_is_said(tmp_path):
    write(tmp_path, cell(scores=[1] * 30), cell("tiny", scores=[0] * 30, budget=4))
    said = "--zero STACK counts from the score of that stack"
    assert said not in " ".join(the_only_section(tmp_path)[1].caption)  # answers can all be wrong
    for stack, likelihood in (({"evict": "full"}, 0.4), ({"evict": "tiny", "budget": 4}, 0.1)):
        write(tmp_path, cell(**stack, scores=[likelihood] * 30, task="ppl", kind="nll"))
    captions = {
        zero: " ".join(load(tmp_path, resamples=100, zero=zero).sections[0].caption)
        for zero in (None, "tiny@4tokens", "gone")
    }
    assert "On likelihood tasks (ppl) the share kept counts from 0" in captions[None] and said in captions[None]
    assert said not in captions["tiny@4tokens"] and "what tiny@4tokens scores counts as 0" in captions["tiny@4tokens"]
    assert said in captions["gone"] and "gone scores" not in captions["gone"]


def test_the_order_of_a_stack_is_compared_at_equal_bytes(tmp_path):
    write(tmp_path, cell(scores=[1] * 40))
    write(tmp_path, cell("a", "q", scores=[1] * 36 + [0] * 4, stack="A(1) | Q(4)", rho=0.25))
    write(tmp_path, cell("a", "q", scores=[1] * 12 + [0] * 28, stack="Q(4) | A(1)", rho=0.25))
    _, section, _ = the_only_section(tmp_path)
    _, rows = table_of(section, "Does the order matter?")
    assert rows["A(1) | Q(4)"]["Difference, points"] == "+60.0" and rows["A(1) | Q(4)"]["Reading"] == "order matters"


def ruler(name, length, scores, evict="full", variant="ruler_mini", **options):
    fields = {"variant": variant, "subtask": name, "length": length, "chat": "never"}
    rows = [
        sample(f"{name}{length}-{i}", s, task=f"{name}{length}", meta={"length": length}) for i, s in enumerate(scores)
    ]
    return cell(evict, task=f"{variant}_{name}", samples=rows, fields=fields, **options)


def test_ruler_by_length_and_by_task(tmp_path):
    share = {("vt", 512): 1.0, ("vt", 1024): 0.9, ("cwe", 512): 0.9, ("cwe", 1024): 0.5}
    for (name, length), mean in share.items():
        write(tmp_path, ruler(name, length, [mean - 0.1, min(1.0, mean + 0.1)] * 10))
        write(tmp_path, ruler(name, length, [mean / 2] * 20, "h2o", memory=0.5))
    board, section, stacks = the_only_section(tmp_path)
    table, rows = table_of(section, "ruler_mini by length")
    assert table.head == ("Stack", "512", "1k", "Mean", "Rising", "Falling", "Effective")
    low, high = (0.95 + 0.9) / 2, 0.7  # means of the two tasks; vt has 0.9 and 1.0 at 512
    assert rows["full cache"]["512"].startswith(f"{100 * low:.0f} (") and rows["full cache"]["1k"].startswith("70 (")
    assert rows["full cache"]["Rising"] == f"{100 * (low + 2 * high) / 3:.1f}"
    assert rows["full cache"]["Falling"] == f"{100 * (2 * low + high) / 3:.1f}"
    assert rows["full cache"]["Effective"] == "512" and rows["h2o@0.5"]["Effective"] == "< 512"
    _, tasks = table_of(section, "ruler_mini by task and length: h2o@0.5")
    assert tasks["vt"] == {"512": "50 (50–50)", "1k": "45 (45–45)"}
    assert tasks["cwe"] == {"512": "45 (45–45)", "1k": "25 (25–25)"}
    assert stacks["full cache"].measures["ruler_mini length 1k"].estimate == pytest.approx(high)
    assert "ruler_mini length 1k" in leaderboard.to_csv(board)


def test_variants_never_meet_in_a_table(tmp_path):
    for variant in ("ruler", "ruler_mini"):
        write(tmp_path, ruler("vt", 512, [1] * 20, variant=variant))
        write(tmp_path, ruler("vt", 512, [0] * 20, "h2o", variant, memory=0.5))
    write(tmp_path, cell(scores=[1] * 20), cell("h2o", scores=[1] * 20, memory=0.5))
    board = load(tmp_path, resamples=100)
    assert [s.title.split(" · ")[2:] for s in board.sections] == [
        ["query-agnostic"], ["query-agnostic", "ruler"], ["query-agnostic", "ruler ruler_mini"]
    ]  # fmt: skip
    assert [[t.label for t in s.tasks] for s in board.sections] == [["recall"], ["ruler_vt"], ["ruler_mini_vt"]]
    assert "variants: ruler_mini;" in board.sections[2].caption[0] and "variants" not in board.sections[0].caption[0]
    alone = write(tmp_path / "alone", ruler("vt", 512, [1] * 20), cell(scores=[1] * 20))
    assert len(load(alone, resamples=100).sections) == 1  # one variant may stand beside other benchmarks


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("ruler_vt", {"variant": "ruler"}, ("ruler", "ruler")),
        ("ruler_mini_vt", {}, ("ruler", "ruler_mini")),
        ("ruler_vt", {}, ("ruler", "ruler")),
        ("longbench_hotpotqa", {}, ("longbench", "longbench")),
        ("longbench_kvpress_lcc", {}, ("longbench", "longbench_kvpress")),
        ("longbench_e_lcc", {}, ("longbench", "longbench_e")),
        ("longbench_v2_no_context", {"variant": "0shot_no_context"}, ("longbench_v2", "0shot_no_context")),
        ("longbench_v2_letters", {"variant": "0shot", "letters": True}, ("longbench_v2", "0shot_letters")),
        ("rulers", {}, None),
        ("niah", {"variant": "x"}, None),
    ],
)
def test_the_variant_of_a_task(name, fields, expected):
    assert variant_of(Task.model_validate({"name": name, "kind": "generate", **fields})) == expected


def test_longbench_is_reported_as_in_papers(tmp_path):
    """The plain mean over 16 tasks, and over 15; tasks of other languages do not count; no rank decides."""
    shares = dict(zip(KV_SUBTASKS, np.linspace(0.2, 0.8, 16), strict=True)) | {"passage_count": 0.0, "dureader": 1.0}
    for subtask, share in shares.items():
        task = f"longbench_{subtask}"
        write(tmp_path, cell(scores=[share] * 20, task=task))
        write(tmp_path, cell("h2o", scores=[share / 2] * 20, task=task, memory=0.5))
    board, section, stacks = the_only_section(tmp_path)
    table, rows = table_of(section, "longbench headline")
    own = [v for k, v in shares.items() if k != "dureader"]
    assert rows["full cache"]["Mean of 16"] == f"{100 * sum(own) / 16:.2f}"
    assert rows["full cache"]["Mean of 15, without passage_count"] == f"{100 * sum(own) / 15:.2f}"
    assert rows["h2o@0.5"]["Mean of 16"] == f"{50 * sum(own) / 16:.2f}"
    assert (
        all(subtask in table.text for subtask in KV_SUBTASKS)
        and "Not in the mean, as in papers: dureader" in table.text
    )
    assert "did not run" not in table.text
    assert not next(t for t in section.tasks if t.label == "longbench_passage_count").signal  # and yet in the mean
    (tmp_path / "few").mkdir()
    for subtask in ("trec", "lcc"):
        write(tmp_path / "few", cell(scores=[0.5] * 20, task=f"longbench_{subtask}"))
    _, section, _ = the_only_section(tmp_path / "few")
    table, rows = table_of(section, "longbench headline")
    assert list(rows["full cache"]) == ["Mean of 2", "95 %"] and "narrativeqa, qasper" in table.text


def test_rulers_mean_names_its_tasks_also_at_one_length(tmp_path):
    for name in ("niah_single_1", "vt"):
        write(tmp_path, ruler(name, 4096, [1.0] * 15 + [0.6] * 5, variant="ruler"))
    _, section, _ = the_only_section(tmp_path)
    table, rows = table_of(section, "ruler by length")
    assert rows["full cache"]["4k"].startswith("90 (") and rows["full cache"]["Effective"] == "4k"
    assert list(rows["full cache"]) == ["4k", "Effective"]
    assert "Tasks: niah_single_1, vt." in table.text and "niah_multivalue, niah_multiquery, cwe" in table.text


def test_recorded_scores_decide_where_a_model_has_signal(tmp_path, capsys):
    rows = [{"task": "ruler_mini_vt", "length": 512, "n": 20, "score": 0.05}]
    rows += [{"task": "ruler_mini_cwe", "length": 512, "n": 20, "score": 0.9}]
    rows += [{"task": "ruler_mini_fwe", "length": 512, "n": 0, "score": None, "reason": "too short"}]
    file = tmp_path / "recorded.json"
    file.write_text(json.dumps({"model": "tiny", "rows": rows}))
    for name in ("vt", "cwe", "fwe"):
        write(tmp_path, ruler(name, 512, [1, 1, 1, 0]), ruler(name, 512, [1, 1, 0, 0], "h2o", memory=0.5))
        write(tmp_path, ruler(name, 512, [1, 1, 0, 0], "h2o", memory=0.5, model="other"))
    board = load(tmp_path, resamples=100, recorded=(str(file),))
    other, tiny = board.sections
    assert {t.label: t.signal for t in tiny.tasks} == {
        "ruler_mini_cwe": True,
        "ruler_mini_fwe": True,
        "ruler_mini_vt": False,
    }
    assert any("shown but not ranked: ruler_mini_vt" in note for note in tiny.notes)
    assert all(t.signal for t in other.tasks)  # another model, of which nothing is recorded
    assert main_leaderboard([str(tmp_path), "--resamples", "50", "--signal", str(file)]) == 0
    assert main_compare(["h2o@0.5", "full", str(tmp_path), "--resamples", "50", "--signal", str(file)]) == 0
    said = capsys.readouterr().out
    assert "No signal, so left out: ruler_mini_vt (75.0 %)." in said and "Samples: 8 paired" in said
    for text in ("{}", "[]", "no"):
        file.write_text(text)
        with pytest.raises(ResultsError, match="holds no recorded scores"):
            load(tmp_path, resamples=50, recorded=(str(file),))
    with pytest.raises(ResultsError, match="cannot read"):
        load(tmp_path, resamples=50, recorded=(str(tmp_path / "gone"),))


def test_longbench_v2_as_its_leaderboard_gives_it(tmp_path):
    """Overall is over questions, not over lengths: also where the lengths ran as tasks of their own."""

    def questions(length, scores):
        return [
            sample(
                f"{length}{i}", s, task="v2", meta={"difficulty": "easy" if i % 4 else "hard", "length_bucket": length}
            )
            for i, s in enumerate(scores)
        ]

    short, long = questions("short", [1, 1, 1, 0] * 4), questions("long", [0, 1, 0, 0])
    apart = tmp_path / "apart"
    write(tmp_path, cell(samples=short + long, task="longbench_v2"), cell(samples=questions("short", [1]), task="niah"))
    write(apart, cell(samples=short, task="longbench_v2_short"), cell(samples=long, task="longbench_v2_long"))
    for folder in (tmp_path, apart):
        _, section, stacks = the_only_section(folder)
        _, table = table_of(section, "LongBench v2 by difficulty and length")
        # hard: the first of every four; right are 4 of them in short, 0 in long; easy: 8 of 12, 1 of 3
        assert {k: v.split()[0] for k, v in table["full cache"].items()} == {
            "Overall": "65.0", "Easy": "60.0", "Hard": "80.0", "Short": "75.0", "Medium": "–", "Long": "25.0"
        }  # fmt: skip
        assert not any("by length" in t.title for t in section.tables)
        assert stacks["full cache"].measures["longbench_v2 hard"].low == pytest.approx(0.2836, abs=1e-4)


def test_longbench_e_by_bin_and_task(tmp_path):
    scores = {"lcc": {"0-4k": 1.0, "4-8k": 0.5, "8k+": 0.3}, "trec": {"0-4k": 0.4, "4-8k": 0.3}}
    for name, bins_of in scores.items():
        rows = [
            sample(f"{bin_}{i}", s, task=name, meta={"length_bucket": bin_})
            for bin_, s in bins_of.items()
            for i in range(20)
        ]
        write(tmp_path, cell(samples=rows, task=f"longbench_e_{name}"))
    _, section, _ = the_only_section(tmp_path)
    table, rows = table_of(section, "longbench_e by length")
    assert table.head == ("Stack", "0-4k", "4-8k", "8k+", "Mean") and "Not every task ran" in table.text
    assert [v.split()[0] for v in rows["full cache"].values()] == ["70", "40", "30", "46.7"]
    _, rows = table_of(section, "longbench_e by task and length: full cache")
    assert rows["lcc"] == {"0-4k": "100 (83–100)", "4-8k": "50 (50–50)", "8k+": "30 (30–30)"}
    assert rows["trec"] == {"0-4k": "40 (40–40)", "4-8k": "30 (30–30)", "8k+": "–"}


def test_an_unchanged_stack_may_still_have_lost_something(tmp_path):
    """Thirty unchanged answers: retention has an interval, and no compression is certified as free of loss."""
    write(tmp_path, cell(scores=[1] * 30), cell("a", scores=[1] * 30, memory=0.25, rho=0.25))
    board, section, stacks = the_only_section(tmp_path)
    a = stacks["a@0.25"]
    assert a.headline.estimate == 1 and a.headline.low == pytest.approx(1 - 3.8415 / 33.8415, abs=1e-4)
    assert stacks["full cache"].headline.low == 1  # by definition
    assert a.tasks["recall"].score.low == pytest.approx(0.025 ** (1 / 30))
    _, kinds = table_of(section, "What each kind of compression reaches")
    assert kinds["Eviction alone"]["At 5 % loss"].startswith("1.0×")
    many = tmp_path / "many"
    write(many, cell(scores=[1] * 500), cell("a", scores=[1] * 500, memory=0.25, rho=0.25))
    _, section, _ = the_only_section(many)
    _, kinds = table_of(section, "What each kind of compression reaches")
    assert kinds["Eviction alone"]["At 5 % loss"].startswith("4.0×")


def test_few_graded_scores_are_pointed_out(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for folder, n in (("few", 30), ("many", 60)):
        base = rng.uniform(0.3, 0.6, n)
        write(tmp_path / folder, cell(scores=base), cell("a", scores=base - rng.uniform(0, 0.1, n)))
        _, section, _ = the_only_section(tmp_path / folder)
        said = any("fewer than 50 independent samples" in line for line in section.caption)
        main_compare(["a", "full", str(tmp_path / folder), "--resamples", "100"])
        assert said == (n < 50) == ("Fewer than 50 independent samples" in capsys.readouterr().out)


def test_compare_counts_from_a_zero(tmp_path, capsys):
    write(tmp_path, cell(scores=[1] * 30), cell("a", scores=[1] * 15 + [0] * 15))
    write(tmp_path, cell("tiny", scores=[1] * 6 + [0] * 24, budget=4))
    assert main_compare(["a", "full", str(tmp_path), "--resamples", "100", "--zero", "tiny@4tokens"]) == 0
    assert "counting what tiny@4tokens scores as 0 (mean over tasks): a keeps 37.5 %" in capsys.readouterr().out
    assert main_compare(["a", "full", str(tmp_path), "--resamples", "100", "--zero", "gone"]) == 0
    said = capsys.readouterr().out
    assert "No stack gone here" in said and "a keeps 50.0 %" in said


def test_score_by_turn(tmp_path):
    def turns(*scores):
        return [{**sample(i, np.mean(scores)), "details": {"turn_scores": list(scores)}} for i in range(20)]

    write(tmp_path, cell(samples=turns(1, 1, 1)), cell("h2o", samples=turns(1, 0.5, 0), memory=0.5))
    _, section, stacks = the_only_section(tmp_path)
    _, rows = table_of(section, "Score by turn")
    assert [rows["h2o@0.5"][k].split()[0] for k in ("Turn 1", "Turn 2", "Turn 3")] == ["100.0", "50.0", "0.0"]
    assert rows["h2o@0.5"]["Turn 1 minus later"].startswith("75.0")
    unchanged = stacks["full cache"].measures["turn 1 minus later"]
    end = 3.8415 / (20 + 3.8415)  # twenty contexts without a drop do not prove that there is none
    assert unchanged.estimate == 0 and unchanged.high == pytest.approx(end, abs=1e-4) == -unchanged.low


def test_score_by_task_and_turn_and_by_kind_of_question(tmp_path):
    """A mixed task of SCBench asks for a summary and a passkey in turn; kv asks three questions of one kind."""
    kinds = ["summary", "passkey", "summary", "passkey"]

    def rows(scores, parts):
        return [
            {**sample(i, np.mean(scores), meta={"parts": parts}), "details": {"turn_scores": scores}} for i in range(20)
        ]

    def one_stack(mixed, kv, *stack, **options):
        write(tmp_path, cell(*stack, samples=rows(mixed, kinds), task="scbench_summary_with_needles", **options))
        write(tmp_path, cell(*stack, samples=rows(kv, ["kv"] * 3), task="scbench_kv", **options))

    one_stack([0.3, 1, 0.4, 1], [1, 1, 1])
    one_stack([0.2, 0.5, 0.4, 0], [1, 0.4, 0.2], "h2o", memory=0.5)
    board, section, stacks = the_only_section(tmp_path)
    table, turns = table_of(section, "Score by turn")
    assert [v.split()[0] for v in turns["h2o@0.5"].values()] == ["60.0", "45.0", "30.0", "0.0", "70.0"]
    assert "that difference is not formed" in table.text and "Not every task has every turn" in table.text
    _, by_task = table_of(section, "Score by task and turn: h2o@0.5")
    assert [v.split()[0] for v in by_task["scbench_kv"].values()] == ["100", "40", "20", "–"]
    assert [v.split()[0] for v in by_task["scbench_summary_with_needles"].values()] == ["20", "50", "40", "0"]
    _, by_kind = table_of(section, "Score by kind of question")
    name = "scbench_summary_with_needles"
    assert {k: v.split()[0] for k, v in by_kind["h2o@0.5"].items()} == {
        f"{name}: passkey": "25.0",
        f"{name}: summary": "30.0",
    }
    assert stacks["full cache"].measures[f"{name}: summary"].estimate == pytest.approx(0.35)
    page = leaderboard.to_html(board)
    assert "Score by kind of question" in page and "Score by task and turn: full cache" in page


def test_missed_needles_are_evicted_or_not_read(tmp_path):
    gone, there = [[0.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 1.0]]
    rows = [{**sample(i, i < 6), "needle_kept": there if i < 8 else gone} for i in range(10)]
    write(tmp_path, cell(samples=[{**r, "needle_kept": there, "score": 1.0} for r in rows]))
    write(tmp_path, cell("h2o", samples=rows, memory=0.5))
    board, section, _ = the_only_section(tmp_path)
    _, table = table_of(section, "Where needles are missed")
    assert table["h2o@0.5"] == {
        "Found": "60.0",
        "Missed: evicted": "20.0",
        "Missed: not read": "20.0",
        "Found although evicted": "0.0",
        "n": "10",
    }
    page = leaderboard.to_html(board)
    assert "Needle kept, % (rows: layers, columns: KV heads)" in page and "of the needles missed" in page


def test_long_answers_and_their_bytes(tmp_path):
    def answers(cut, trace):
        details = {"repetition": 0.25, "kv_bytes_mean": 2048.0, "kv_bytes_trace": trace}
        return [
            {**sample(i, i % 2), "truncated": i < cut, "n_generated": 40, "kv_bytes_peak": 4096, "details": details}
            for i in range(20)
        ]

    write(tmp_path, cell(samples=answers(0, [1024] * 5), fields={"trace": 16}))
    write(tmp_path, cell("h2o", samples=answers(10, [1024, 2048]), fields={"trace": 16}, memory=0.5))
    _, section, _ = the_only_section(tmp_path)
    _, rows = table_of(section, "Long answers")
    assert (
        rows["h2o@0.5"]["Truncated, %"].startswith("50.0 (")
        and rows["full cache"]["Truncated, %"] == "0.0 (0.0 to 16.8)"  # 1 - 0.025^(1/20)
    )
    assert rows["h2o@0.5"]["Mean KiB"] == "2.0" and rows["h2o@0.5"]["Peak KiB"] == "4.0"
    assert rows["h2o@0.5"]["Tokens"].startswith("40.0") and rows["h2o@0.5"]["Repetition, %"] == "25.0"
    _, held = table_of(section, "Bytes over the answer")
    assert held["full cache"] == {"0": "1.0", "16": "1.0", "32": "1.0", "64": "1.0"}
    assert held["h2o@0.5"] == {"0": "1.0", "16": "2.0", "32": "–", "64": "–"}


def test_fidelity_has_its_own_columns(tmp_path):
    def rows(agree, kl):
        details = {"kl": kl, "nll_difference": kl / 2, "kl_bins": [kl / 10, kl, 2 * kl]}
        return [{**sample(i, agree, nll=2.0), "details": details} for i in range(20)]

    write(tmp_path, cell(kind="fidelity", task="fidelity", samples=rows(1.0, 0.0)))
    write(tmp_path, cell("h2o", kind="fidelity", task="fidelity", samples=rows(0.75, 0.2), memory=0.5))
    _, section, stacks = the_only_section(tmp_path)
    _, table = table_of(section, "Fidelity to the full cache")
    assert [v.split()[0] for v in table["h2o@0.5"].values()] == ["75.0", "0.2000", "0.0200", "0.4000", "0.1000"]
    assert stacks["h2o@0.5"].tasks["fidelity"].perplexity is None and column(section.tasks[0]) == "fidelity, %"


def test_every_table_says_how_it_was_made(tmp_path):
    cut = [sample(i, 1, meta={"truncated_tokens": 3 * (i < 5)}) for i in range(20)]
    write(tmp_path, cell(samples=cut, fields={"chat": "always"}, extra={"revision": "abc"}))
    write(tmp_path, cell("h2o", samples=cut, fields={"chat": "always"}, extra={"revision": "abc"}, memory=0.5))
    failed = {"status": "failed", "reason": "out of memory", "extra": {"revision": "abc"}, "fields": {"chat": "always"}}
    write(tmp_path, cell("a", **failed))
    board, section, _ = the_only_section(tmp_path)
    said = " ".join(section.caption)
    for part in (
        "Model: tiny", "revision abc", "tokenizer", "query-agnostic", "chat template: always", "recall 20",
        "Data seed: 0", "Prompts truncated: recall 25.0 %", "Budgets are", "A/A floor", "Failures: 1 cell", "lossless",
    ):  # fmt: skip
        assert part in said, part
    assert all(line in html.unescape(leaderboard.to_html(board)) for line in section.caption)


def test_no_two_stacks_look_alike_in_the_chart(tmp_path):
    for count, make in ((30, lambda k: cell("full", f"q{k:02d}", rho=0.5)), (40, lambda k: cell(f"e{k:02d}", rho=0.5))):
        folder = tmp_path / str(count)
        write(folder, cell(), *(make(k) for k in range(count)))
        _, section, _ = the_only_section(folder)
        points = chart(section).points
        assert len({p.mark for p in points}) == len(points) == count + 1
    names = [chr(97 + k) for k in range(6)]
    grid = tmp_path / "grid"
    write(grid, *(cell(e, q) for e in ("full", *names) for q in ("none", *names)))
    _, section, _ = the_only_section(grid)
    assert len({p.mark for p in chart(section).points}) == 49


def test_needle_maps_average_by_length_and_depth(tmp_path):
    grid = [(512, 0.0, 1), (512, 0.0, 0), (512, 1.0, 1), (1024, 0.0, 0)]
    rows = [sample(i, v, task="niah", meta={"length": n, "depth": d}) for i, (n, d, v) in enumerate(grid)]
    write(tmp_path, cell(task="niah", samples=rows), cell("h2o", "kivi4", task="niah", samples=rows, memory=0.25))
    board = build(tmp_path, resamples=100, quiet=True)
    one = heat(board.sections[0].stacks[0])
    assert (one.lengths, one.depths) == (["512", "1k"], ["0%", "100%"])
    assert one.values[0] == [0.5, 0] and one.values[1][0] == 1 and math.isnan(one.values[1][1])
    assert {p.name for p in board.files if p.suffix == ".png"} == {
        "pareto.png", "niah.png", "niah_full-cache.png", "niah_h2o-kivi4-0.25.png"
    }  # fmt: skip
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_needle_maps_of_an_earlier_leaderboard_are_removed(tmp_path):
    rows = [sample(i, i % 2, task="niah", meta={"length": 512, "depth": i / 4}) for i in range(4)]
    write(tmp_path, cell(task="niah", samples=rows))
    stale = ["niah_gone-0.5.png", "niah_2_tiny-bfloat16_gone.png"]
    kept = ["niah_MINE.png", "niah-notes.png", "my_niah_x.png", "niah_gone.txt"]
    for name in (*stale, *kept):
        (tmp_path / name).write_text("")
    build(tmp_path, resamples=100, quiet=True)
    left = {p.name for p in tmp_path.iterdir()}
    assert {*kept, "niah.png", "niah_full-cache.png"} <= left and not left & set(stale)


def test_many_depths_are_binned():
    edges, index = bins([i / 100 for i in range(101)])
    assert len(edges) == 10 and index(0.0) == 0 and index(1.0) == 9 and index(0.55) == 5


def test_hostile_names_are_shown_as_text_everywhere(tmp_path, capsys):
    options = {"task": HOSTILE, "fields": {HOSTILE: HOSTILE}, "model": HOSTILE, "checks": {HOSTILE: False}}
    write(tmp_path, cell(**options), cell(HOSTILE, HOSTILE, stack=HOSTILE, memory=0.5, **options))
    write(tmp_path, cell("=cmd()", "none", **options))
    write(tmp_path, cell("x", HOSTILE, status="failed", reason=HOSTILE, **options))
    build(tmp_path, resamples=100)
    said = capsys.readouterr().out
    assert "\x1b[31m" not in said and "[red]" in "".join(said.split())

    page = Page(text := (tmp_path / "index.html").read_text())
    assert page.tags.count("script") == 1 and text.count("<script>") == 1
    assert any("<script>alert(1)</script>|[red]" in word for word in page.words)
    assert not any(value.startswith("on") and "=alert" in value for value in page.values)
    assert "{{7*7}}" in text and "\x1b" not in text

    for table in re.findall(r"(?:^\|.*\n)+", (tmp_path / "leaderboard.md").read_text(), re.MULTILINE):
        assert "<script>" not in table
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1  # no name adds a column

    table = list(csv.DictReader((tmp_path / "leaderboard.csv").read_text().splitlines()))
    assert all(None not in row for row in table)
    assert "'=cmd()" in {row["evict"] for row in table}


def test_the_page_needs_nothing_from_outside(tmp_path):
    write(tmp_path, cell(), cell("h2o", memory=0.5, rho=0.5))
    build(tmp_path, resamples=100, quiet=True)
    text = (tmp_path / "index.html").read_text()
    assert not re.search(r"(src|href)=[\"'](?!#)", text) and "http://" not in text and "https://" not in text
    assert "url(#" in text and "@import" not in text
    page = Page(text)
    assert page.tags.count("tr") > 4 and "svg" in page.tags
    ids = [v[3:] for v in page.values if v.startswith("id=")]
    assert len(ids) == len(set(ids))
    for value in page.values:
        if value.startswith(("href=#", "aria-controls=", "aria-labelledby=")):
            assert value.split("=")[1].lstrip("#") in ids


def test_the_same_results_give_the_same_files(tmp_path):
    write(tmp_path, cell(), cell("h2o", memory=0.5, rho=0.5))
    one, two = (build(tmp_path, tmp_path / n, resamples=100, quiet=True) for n in "ab")
    for first, second in zip(one.files, two.files, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_damaged_files_are_reported_beside_the_table(tmp_path, capsys):
    write(tmp_path, cell(), cell("a"))
    (tmp_path / "cells" / "0000000000000000.json").write_text('{"schema": 1, "cell')
    assert main_leaderboard([str(tmp_path), "--out", str(tmp_path / "site"), "--resamples", "100"]) == 0
    assert "unreadable: 0000000000000000.json" in capsys.readouterr().out
    assert "0000000000000000.json" in (tmp_path / "site" / "index.html").read_text()


def test_a_whole_sweep(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kvbench.leaderboard.progress.PATIENCE_S", 0.0)
    sweep(tmp_path, n=12, memories=(0.25,), evictors=2)
    monkeypatch.setattr("kvbench.leaderboard.board.write_plots", lambda board, out: [])  # tested above, and slow
    board = build(tmp_path, resamples=200)
    (section,) = board.sections
    assert len(section.stacks) == 4 + 2 * 3 + 2 * 4  # kivi2 would keep more than all tokens at this memory
    assert {t.label for t in section.tasks} == {"recall", "niah", "multi_query", "ppl"}
    assert section.floor.n == 36 and len(section.contrasts) == 6
    captured = capsys.readouterr()
    assert "bootstrap: 4 of 4" in captured.err and "Detectable difference" in captured.out
    assert all(line in html.unescape(leaderboard.to_html(board)) for line in section.caption)
    table = list(csv.DictReader((tmp_path / "leaderboard.csv").read_text().splitlines()))
    assert len(table) == len(section.stacks) + len(board.left_out)


@pytest.mark.parametrize("command", [main_leaderboard, lambda a: main_compare(["a", "b", *a])])
def test_errors_are_one_line_with_exit_code_one(tmp_path, capsys, command):
    assert command([str(tmp_path / "nowhere")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: no results in") and err.count("\n") == 1
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "x.json").write_text("{")
    assert command([str(tmp_path)]) == 1


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    write(tmp_path, cell())
    (tmp_path / "file").write_text("")
    assert main_leaderboard([str(tmp_path), "--out", str(tmp_path / "file"), "--resamples", "50"]) == 1
    assert "cannot write the leaderboard" in capsys.readouterr().err


def test_compare_says_what_the_data_allow(tmp_path, capsys):
    good, bad = [1.0] * 90 + [0.0] * 10, [1.0] * 50 + [0.0] * 50
    write(
        tmp_path, cell(scores=good), cell("h2o", "kivi4", scores=bad, memory=0.25, rho=0.25), cell("same", scores=good)
    )
    assert main_compare(["full", "h2o+kivi4@0.25", str(tmp_path), "--resamples", "500"]) == 0
    said = capsys.readouterr().out
    assert "full cache scores 40.0 points higher than h2o+kivi4@0.25" in said and "difference is real" in said
    assert "100 paired;" in said and "finds true differences of" in said
    assert "h2o+kivi4@0.25 25.0 % of the full cache after prefill" in said and "full cache 64.0 KiB per sample" in said
    assert "recall (n = 100): 90.0 % against 50.0 %; +40.0 points" in said
    assert "h2o+kivi4@0.25 keeps 55.6 % (" in said and "h2o+kivi4@0.25 may lose up to" in said
    assert main_compare(["H2O + KIVI4", "FULL", str(tmp_path), "--resamples", "500"]) == 0
    assert "40.0 points lower than full cache" in capsys.readouterr().out
    assert main_compare(["same", "full", str(tmp_path), "--resamples", "500"]) == 0
    said = capsys.readouterr().out
    assert "score the same" in said and "do not tell them apart" in said and "below 3.0 %" in said


def test_compare_says_how_both_ran(tmp_path, capsys):
    """All that a reader of the verdict needs, in a few lines: what is told of tables is told of two stacks."""

    def ran(evict, score, cut=0, **options):
        rows = [sample(i, score(i), task="vt", meta={"truncated_tokens": 9 * (i < cut)}) for i in range(20)]
        fields = {"variant": "ruler_mini", "chat": "always", "seed": 3}
        options = {"fields": fields, "extra": {"revision": "abc"}, **options}
        write(tmp_path, cell(evict, samples=rows, task="ruler_mini_vt", **options))

    ran("full", lambda i: 1.0)
    ran("full", lambda i: float(i > 0), seed=1)  # the A/A run
    ran("a", lambda i: float(i < 15), cut=5, memory=0.5)
    ran("b", lambda i: float(i < 5), cut=5, budget=64)
    write(tmp_path, cell("a", task="qa", memory=0.5, extra={"revision": "abc"}))
    lost = {"status": "failed", "reason": "out of memory", "extra": {"revision": "abc"}}
    write(tmp_path, cell("b", task="niah", budget=64, **lost), cell("c", task="niah", **lost))
    assert main_compare(["a@0.5", "b@64tokens", str(tmp_path), "--resamples", "200"]) == 0
    said = capsys.readouterr().out
    for part in (
        "Mean scores: a@0.5 75.0 % (50.9 to 91.3), b@64tokens 25.0 % (8.7 to 49.1).",  # Clopper and Pearson's
        "Against the full cache: a@0.5 −22.5 points (", "b@64tokens −72.5 points (",  # full: 1, 39 of 40
        "Model: tiny (revision abc, dtype bfloat16, path models/tiny); tokenizer: the model's; variants: ruler_mini; "
        "query-agnostic; chat template: always. Data seed: 3. Prompts truncated: ruler_mini_vt 25.0 %.",
        "Stacks and budgets: a@0.5 = a(memory=0.5) (50% of the bytes); b@64tokens = b(budget=64) (64 tokens).",
        "Not compared, as only one of them ran there: qa.", "Failed: b@64tokens on niah: out of memory",
        "A/A floor: two runs of the full cache differ on 5.0 % of 20 samples",
    ):  # fmt: skip
        assert part in said, part
    assert "c on niah" not in said
    assert main_compare(["a@0.5", "full", str(tmp_path), "--resamples", "200"]) == 0
    assert "Against the full cache" not in capsys.readouterr().out  # that is the verdict itself


def test_compare_uses_the_exact_test_when_few_samples_flip(tmp_path, capsys):
    write(tmp_path, cell(scores=[1] * 50), cell("a", scores=[0] * 5 + [1] * 45))
    assert main_compare(["a", "full", str(tmp_path), "--resamples", "500"]) == 0
    said = capsys.readouterr().out
    assert "McNemar p = 0.0625" in said and "do not tell them apart" in said


def test_compare_says_what_is_shown_about_equivalence(tmp_path, capsys):
    write(tmp_path, cell(scores=[1] * 398 + [0] * 2), cell("same", scores=[1] * 398 + [0] * 2))
    write(tmp_path, cell("worse", scores=[0] * 40 + [1] * 358 + [0] * 2), cell("other", scores=[1] * 400))
    for a, b, options, said in (
        ("same", "full", [], "They are equivalent within 1 point (90 % interval"),
        ("same", "full", ["--margin", "0.5"], "Equivalence within 0.5 points is not shown"),
        ("full", "worse", [], "worse may lose up to 12."),
        ("other", "full", [], "other is not worse than full cache by 1 point or more"),
        ("worse", "full", ["--margin", "20"], "equivalent within 20 points"),
    ):
        assert main_compare([a, b, str(tmp_path), "--resamples", "300", *options]) == 0
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main_compare(["same", "full", str(tmp_path), "--margin", "0"])


def test_compare_tells_a_difference_from_its_size(tmp_path, capsys):
    """All likelihoods fall a little, and no answer changes: a difference, but of unknown size."""
    nll = [0.4 - 0.001 * k for k in range(24)]
    write(tmp_path, cell(scores=[1] * 30), cell(scores=nll, task="ppl", kind="nll"))
    write(tmp_path, cell("a", scores=[1] * 30), cell("a", scores=[v - 0.003 for v in nll], task="ppl", kind="nll"))
    assert main_compare(["a", "full", str(tmp_path), "--resamples", "300"]) == 0
    said = capsys.readouterr().out
    assert "the signs of the differences say that they do differ" in said
    assert "but only likelihoods moved and no answer changed, so by how much is open" in said
    write(tmp_path, cell(scores=[0] * 30, task="noise"), cell("a", scores=[1] + [0] * 29, task="noise"))  # not ranked
    assert main_compare(["a", "full", str(tmp_path), "--resamples", "300"]) == 0
    assert "no answer changed" in capsys.readouterr().out
    write(tmp_path, cell("b", scores=[0] + [1] * 29))
    write(tmp_path, cell("b", scores=[v - 0.003 for v in nll], task="ppl", kind="nll"))
    assert main_compare(["b", "full", str(tmp_path), "--resamples", "300"]) == 0
    assert "few answers changed" in capsys.readouterr().out


def test_compare_refuses_what_is_not_comparable(tmp_path, capsys):
    write(tmp_path, cell(), cell("a"), cell("b", query_aware=True), cell("c", model="other"), cell("d", task="qa"))
    for names, reason in (
        (["a", "b"], "query-aware"),
        (["a", "c"], "ran in"),
        (["a", "d"], "no sample in common"),
        (["a", "full cach"], "did you mean full cache?"),
        (["a", "zzz"], "there are: a, b, c, d, full cache"),
    ):
        assert main_compare([*names, str(tmp_path), "--resamples", "50"]) == 1
        err = capsys.readouterr().err
        assert reason in err and err.count("\n") == 1


def test_an_ambiguous_name_lists_its_meanings(tmp_path, capsys):
    write(
        tmp_path,
        cell(),
        cell("a", memory=0.5),
        cell("a", memory=0.25),
        cell("b", stack="b(x=1)"),
        cell("b", stack="b(x=2)"),
    )
    assert main_compare(["a", "full", str(tmp_path)]) == 1
    assert "ambiguous: a@0.25, a@0.5" in capsys.readouterr().err
    assert main_compare(["b(x=1)", "B(X=2)", str(tmp_path), "--resamples", "50"]) == 0


def test_plotting_is_imported_only_where_it_is_used():
    for path in Path(leaderboard.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {n.name for x in tree.body if isinstance(x, ast.Import) for n in x.names}
        names |= {x.module for x in tree.body if isinstance(x, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & {"matplotlib", "plotly", "rich", "jinja2", "scipy"}, path


if __name__ == "__main__":  # a folder to look at: python tests/test_leaderboard.py FOLDER
    print(sweep(sys.argv[1]))
