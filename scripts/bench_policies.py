"""What each policy costs: time of signals, scoring and selection against the prefill, peak memory, and decode steps.

    python scripts/bench_policies.py            # 2k, 8k and 32k tokens; about a quarter of an hour on two CPU cores
    python scripts/bench_policies.py --quick    # a tiny model at 512 tokens: does it run?

One row per file of conf/evict and prompt length is appended to rows.jsonl as it comes; rows that are there are not
measured again. The model has random weights (only speed is measured): a Llama of few but realistic layers, so costs are
shares of a layer; options that exempt the first layers of a deep model (`skip_layers`, `dense_layers`) are set to 0.

    cost_share   = (signal_s + fork_s - full_fork_s) / prefill_s
    decode_ratio = decode_s / full_decode_s

prefill_s: an uncompressed prefill that collects nothing. signal_s: what collecting the policy's signals adds to it,
each signal timed by itself, in every layer of one and the same prefill. fork_s: `CompressedCache.fork`, which probes,
scores, selects and gathers; that of Full() is subtracted. peak_extra_bytes: the most memory that the fork held beyond
what was there before, its result included: on CUDA the allocator's counter, on a CPU the tensors alive after each torch
call (what a kernel allocates inside is not seen). decode_s: the median forward of one token. A fork that is likely to
take longer than --limit seconds, as the square of the length goes, gets a row that says so instead.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from policy_table import build
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm
from train_lookahead import new_modules
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

import kvbench
from kvbench import CompressedCache
from kvbench.cache import PolicyLayer, signals
from kvbench.corpus import document
from kvbench.identity import commit
from kvbench.policies import Full, Policy
from kvbench.probes import save_modules

LONG_S = 5.0
"""A fork that takes so long is run once: tracking its memory slows each torch call by microseconds."""
QUICK = {"lengths": [512], "repeats": [1], "hidden": 128, "heads": 4, "kv_heads": 2, "steps": 2}


class LiveBytes(TorchDispatchMode):
    """Bytes of storages that come to life inside: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._known.update(_storages((args, kwargs)))  # not seen before: they are older
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _freed(self, nbytes: int) -> None:
        self.live -= nbytes


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor))


def clock(model: LlamaForCausalLM) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def each_signal_timed(seconds: dict[str, float]) -> Iterator[None]:
    """While inside, layers collect their signals one after the other; adds up the seconds of each."""
    collect = PolicyLayer._collect

    def timed(layer: PolicyLayer, *args: Any) -> None:
        cache = layer._cache
        needs, width = cache.needs, cache.query_width
        for name in seconds:
            cache.needs, cache.query_width = {name: needs[name]}, width if name == "queries" else 0
            start = clock(cache.model)
            collect(layer, *args)
            seconds[name] += clock(cache.model) - start
        cache.needs, cache.query_width = needs, width

    PolicyLayer._collect = timed  # type: ignore[method-assign]
    try:
        yield
    finally:
        PolicyLayer._collect = collect  # type: ignore[method-assign]


def prefill(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, ids: Tensor, needs: Mapping[str, int], repeats: int
) -> tuple[CompressedCache, float, dict[str, float]]:
    """(an uncompressed cache that has read ids [1, T], seconds without any signal, seconds that each signal adds)."""
    plain: list[float] = []
    added: dict[str, list[float]] = {name: [] for name in ("attention", "moments", "queries") if name in needs}
    for _ in range(repeats):
        record = CompressedCache(model, Full(), tokenizer=tokenizer, needs=needs)
        seconds = dict.fromkeys(added, 0.0)
        start = clock(model)
        with each_signal_timed(seconds), record.deferred():
            model(ids, past_key_values=record, logits_to_keep=1)
        plain.append(clock(model) - start - sum(seconds.values()))
        for name, value in seconds.items():
            added[name].append(value)
    return record, statistics.median(plain), {name: statistics.median(values) for name, values in added.items()}


def fork(record: CompressedCache, policy: Policy, repeats: int) -> tuple[CompressedCache, float, int]:
    """(the compressed cache, median seconds, peak bytes beyond what was held before)."""
    model, on_cuda = record.model, record.model.device.type == "cuda"
    tracker = LiveBytes()
    start = clock(model)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cache = record.fork(policy)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with tracker:
            cache = record.fork(policy)
        peak = tracker.peak
    first, seconds = clock(model) - start, []
    if first > LONG_S:
        return cache, first, peak
    for _ in range(repeats):
        start = clock(model)
        cache = record.fork(policy)
        seconds.append(clock(model) - start)
    return cache, statistics.median(seconds), peak


def decode(cache: CompressedCache, ids: Tensor) -> float:
    """Median seconds of forwards of one token, the first left out: it copies what is shared; ids [1, steps + 1]."""
    seconds = []
    for token in ids.split(1, dim=1):
        start = clock(cache.model)
        cache.model(token, past_key_values=cache)
        seconds.append(clock(cache.model) - start)
    return statistics.median(seconds[1:])


def measure(
    record: CompressedCache, policy: Policy, prefilled: Mapping[str, Any], added: Mapping[str, float],
    next_ids: Tensor, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    cache, fork_s, peak = fork(record, policy, repeats)
    row = dict(prefilled)
    row["signal_s"] = sum(added[name] for name in signals([policy]) if name in added)
    row["fork_s"] = fork_s
    row["cost_s"] = row["signal_s"] + fork_s - row["full_fork_s"]
    row["cost_share"] = row["cost_s"] / row["prefill_s"]
    row["peak_extra_bytes"], row["held_bytes"], row["full_bytes"] = peak, cache.nbytes, cache.full_nbytes
    row["decode_s"] = decode(cache, next_ids)
    row["decode_ratio"] = row["decode_s"] / row["full_decode_s"]
    return row


def policies(names: Sequence[str] | None, budget: float, model: LlamaForCausalLM, folder: Path) -> dict[str, Policy]:
    """Name of a file of conf/evict -> its policy, with random gates and modules where it needs trained ones."""
    config = model.config
    gates = folder / "gates.json"
    gates.write_text(json.dumps({"alpha": torch.rand(config.num_hidden_layers, config.num_key_value_heads).tolist()}))
    save_modules(folder / "lookahead", new_modules(model, tokens=32, rank=8, alpha=32, seed=0), model, {})
    made = {}
    for file in sorted(files("kvbench.conf.evict").iterdir(), key=lambda f: f.name):
        name = file.name.removesuffix(".yaml")
        if name == file.name or name == "full" or (names and name not in names):
            continue
        policy = build(yaml.safe_load(file.read_text()), budget)
        ours = {"pattern": str(gates), "modules": str(folder / "lookahead"), "skip_layers": 0, "dense_layers": 0}
        made[name] = replace(policy, **{f.name: ours[f.name] for f in fields(policy) if f.name in ours})  # type: ignore[arg-type, type-var]
    if unknown := set(names or ()) - set(made):
        raise SystemExit(f"no such file of conf/evict: {', '.join(sorted(unknown))}")
    return made


def random_model(options: argparse.Namespace, vocabulary: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.kv_heads,
        head_dim=options.head_dim, max_position_embeddings=2 * max(options.lengths), eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval().to(getattr(torch, options.dtype))
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def run(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Measures what rows.jsonl lacks; returns the rows of these settings, the latest of each policy and length."""
    tokenizer = AutoTokenizer.from_pretrained(Path(kvbench.__file__).parent / "assets" / "proving")
    model = random_model(options, len(tokenizer))
    chosen = policies(options.policies, options.budget, model, folder)
    settings = {
        "budget": options.budget, "layers": options.layers, "hidden": options.hidden, "heads": options.heads,
        "kv_heads": options.kv_heads, "head_dim": options.head_dim, "dtype": options.dtype,
        "machine": torch.cuda.get_device_name() if model.device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": options.threads,
    }  # fmt: skip
    path = options.out / "rows.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = [row for row in map(json.loads, lines) if settings.items() <= row.items()]
    rows = {(row["policy"], row["tokens"]): row for row in known}

    def add(name: str, length: int, what: Mapping[str, Any]) -> None:
        call = str(chosen[name]).replace(f"{folder}/", "")  # random gates and modules, which nobody will find again
        row: dict[str, Any] = {"policy": name, "call": call, "tokens": length, **settings}
        row |= {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in what.items()} | {
            "torch": torch.__version__, "transformers": version("transformers"), "kvbench": version("kvbench"),
            "commit": commit(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        rows[name, length] = row
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    bar = tqdm(total=len(chosen) * len(options.lengths), desc="policies", disable=None)
    for length, repeats in zip(options.lengths, options.repeats, strict=True):
        todo = []
        for name in chosen:
            if "cost_s" not in rows.get((name, length), {}):
                likely = predicted(rows, name, length)
                if likely <= options.limit:
                    todo.append(name)
                    continue
                if (name, length) not in rows:
                    add(name, length, {"skipped": f"would take about {likely:.0f} s; --limit is {options.limit:g} s"})
            bar.update()
        if not todo:
            continue
        bar.set_postfix_str(f"prefill of {length} tokens")
        tokens = tokenizer.encode(document(1, length // 4), add_special_tokens=False)
        ids = torch.tensor([tokens[:length]], device=model.device)
        assert ids.shape[1] == length
        next_ids = ids[:, : options.steps + 1]
        model(ids[:, :64])  # warm-up
        record, prefill_s, added = prefill(model, tokenizer, ids, signals([chosen[name] for name in todo]), repeats)
        full, full_fork_s, _ = fork(record, Full(), repeats)
        prefilled = {
            "repeats": repeats, "steps": options.steps, "prefill_s": prefill_s,
            **{f"{name}_s": seconds for name, seconds in added.items()},
            "full_fork_s": full_fork_s, "full_decode_s": decode(full, next_ids),
        }  # fmt: skip
        del full
        for name in todo:
            bar.set_postfix_str(f"{name}, {length} tokens")
            try:
                add(name, length, measure(record, chosen[name], prefilled, added, next_ids, repeats))
            except (ValueError, RuntimeError) as error:  # a model that does not suit the policy; out of memory
                add(name, length, {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
            bar.update()
    bar.close()
    return [rows[name, length] for name in chosen for length in options.lengths]


def predicted(rows: Mapping[tuple[str, int], Mapping[str, Any]], name: str, length: int) -> float:
    """Seconds a fork is likely to take, from the longest shorter prompt: no policy grows faster than the square."""
    shorter = [row for (n, tokens), row in rows.items() if n == name and tokens < length and "fork_s" in row]
    last = max(shorter, key=lambda row: row["tokens"], default=None)
    return 0.0 if last is None else last["fork_s"] * (length / last["tokens"]) ** 2


def summary(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="cost of a policy: share of the prefill · peak extra memory · decode step against uncompressed")
    table.add_column("policy")
    lengths = sorted({row["tokens"] for row in rows})
    for length in lengths:
        table.add_column(f"{length:,} tokens", justify="right")
    by_key = {(row["policy"], row["tokens"]): row for row in rows}
    for name in dict.fromkeys(row["policy"] for row in rows):
        table.add_row(name, *(cell(by_key[name, length]) for length in lengths))
    return table


def cell(row: Mapping[str, Any]) -> str:
    if "skipped" in row:
        return f"– ({row['skipped'].split(';')[0][:40]})"
    return f"{100 * row['cost_share']:.3g} % · {row['peak_extra_bytes'] / 2**20:,.0f} MiB · {row['decode_ratio']:.2f}"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A dot per policy and length: cost as a share of the prefill, the cheapest policy on top."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = [row for row in rows if "cost_share" in row]
    lengths = sorted({row["tokens"] for row in measured})
    largest = {row["policy"]: row["cost_share"] for row in sorted(measured, key=lambda row: row["tokens"])}
    names = sorted(largest, key=lambda name: largest[name], reverse=True)
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.24 * len(names)), layout="constrained")
    for length, color in zip(
        lengths, plt.colormaps["viridis"](torch.linspace(0, 0.85, len(lengths)).numpy()), strict=True
    ):
        shown = [row for row in measured if row["tokens"] == length]
        # A cost below the noise of the clock, which may come out negative, stands at the left edge.
        share = [100 * max(row["cost_share"], 1e-5) for row in shown]
        axes.scatter(share, [names.index(row["policy"]) for row in shown], color=[color], label=f"{length:,} tokens")
    axes.axvline(100, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="signals + scoring + selection, % of the prefill", ylim=(-0.7, len(names) - 0.3))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.grid(axis="both", alpha=0.3)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", help="files of conf/evict, without .yaml; default: all")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], help="tokens of the prompts")
    parser.add_argument("--repeats", type=int, nargs="+", default=[3, 1, 1], help="of each timing, per length")
    parser.add_argument("--steps", type=int, default=5, help="decode steps timed")
    parser.add_argument("--limit", type=float, default=30, help="seconds; a fork likely to take longer is left out")
    parser.add_argument("--budget", type=float, default=0.25, help="share of the prompt that is kept")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32, help="query heads")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results/bench_policies"), help="rows.jsonl and cost.png")
    parser.add_argument("--quick", action="store_true", help="a tiny model at 512 tokens, to see that all runs")
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK)
    if len(options.lengths) != len(options.repeats):
        parser.error(f"--lengths names {len(options.lengths)} lengths, --repeats {len(options.repeats)}")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = run(options, Path(folder))
    Console().print(summary(rows))
    plot(rows, options.out / "cost.png")


if __name__ == "__main__":
    main()
