"""What each quantizer costs and loses: bits, reconstruction and attention error, encode and decode-attention time.

    python scripts/bench_quantizers.py            # a few minutes on two CPU cores
    python scripts/bench_quantizers.py --quick    # small shapes: does it run?

One row per file of conf/quant and kind of measurement is appended to rows.jsonl; rows that are there are not measured
again. Sinks and residual windows are switched off where a format allows that, so that every token is packed.

kind "error": keys, values and queries of one prompt of the proving model, every layer. key_error, value_error:
    |decoded - x| / |x|; output_error: |attention over decoded - attention| / |attention| of the last 64 queries.
kind "keys": the same output error on keys made to break formats: "bias", a large constant per channel before RoPE, as
    Qwen2.5 has in its first and last layers; "sinks", learned sinks in the softmax, as GPT-OSS has; "plain", neither.
kind "time": random keys and values; encode_s of the whole cache, attend_s of one query that decodes tile by tile,
    dense_fp32_s and dense_bf16_s of the same attention uncompressed, peak_bytes: the most memory alive during attend
    beyond the cache. Formats calibrated for a model are timed with its heads instead. For transformers' QuantizedCache
    (conf/quant/hf_*; those whose backend is not installed are left out) attend_s is `update` and the attention.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import torch
from bench_policies import LiveBytes
from policy_table import bits_per_element, configured
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm
from transformers import LlamaConfig

from kvbench import CompressedCache
from kvbench.baselines import Baseline, BaselineError, held_nbytes, quantized_cache
from kvbench.cache import tile_of
from kvbench.corpus import document
from kvbench.identity import commit
from kvbench.kernels.attention import attend, attend_tiles
from kvbench.kernels.rotation import rotate
from kvbench.policies import KV, Full, Mixed, Quantizer, Step
from kvbench.sweep import load_model


def packs_everything(policy: Quantizer) -> Quantizer:
    """`policy` without sinks and residual window."""
    if isinstance(policy, Mixed):
        return Mixed(*(None if part is None else packs_everything(part) for part in (policy.k, policy.v)))
    exact = replace(policy, sinks=0)
    if "residual" not in {f.name for f in fields(policy)}:
        return exact
    try:
        return replace(exact, residual=0)
    except ValueError:  # formats of whole chunks of `residual` tokens
        return exact


def step_of(order: int, tokens: int, layers: int, frequency: Tensor) -> Step:
    seen = torch.tensor([tokens])
    return Step(order, seen, seen, order=order, layers=layers, inverse_frequency=frequency)


def packed_by(policy: Quantizer, keys: Tensor, values: Tensor, attention: Tensor, step: Step) -> KV:
    """attention [B, H, T]: what formats that look at importance need; others only carry it along."""
    kv = policy(KV.of(keys, values).with_columns(attention=attention), step)
    return KV(kv.keys, kv.values)


def relative(x: Tensor, exact: Tensor) -> float:
    return float((x.float() - exact.float()).norm() / exact.float().norm())


def output_error(
    kv: KV, keys: Tensor, values: Tensor, queries: Tensor, scaling: float, sinks: Tensor | None = None
) -> float:
    """Of the last queries [1, Hq, n, D] of a prompt of keys, values [1, H, T, D]."""
    tokens, asked = keys.shape[2], queries.shape[2]
    at, slots = torch.arange(tokens - asked, tokens)[None], torch.arange(tokens).view(1, 1, -1)
    exact, got = (
        attend(queries, k.to(queries.dtype), v.to(queries.dtype), at, slots, scaling=scaling, sinks=sinks)
        for k, v in ((keys, values), kv.decode())
    )
    return relative(got, exact)


@torch.inference_mode()
def recorded(tokens: int) -> tuple[list[tuple[Tensor, Tensor, Tensor, Tensor]], Tensor, float]:
    """Per layer keys, values [1, H, T, D], the last queries [1, Hq, 64, D] and the attention that each token received
    [1, H, T]; RoPE frequencies; scaling."""
    model, tokenizer = load_model("proving", "proving", "float32")
    ids = torch.tensor([tokenizer.encode(document(7, tokens // 2), add_special_tokens=False)[:tokens]])
    cache = CompressedCache(model, Full(), needs={"queries": 64, "attention": 1, "rope": 1})
    with cache.deferred():
        model(ids, past_key_values=cache)
    layers = cache.policy_layers()
    found = [(*layer.kv.decode(), layer.queries, layer.kv.columns["attention"]) for layer in layers]
    return found, cache.frequency(0), layers[0].geometry["scaling"]  # type: ignore[return-value]


def errors(policy: Quantizer, record: Any) -> dict[str, float]:
    layers, frequency, scaling = record
    total = {"key_error": 0.0, "value_error": 0.0, "output_error": 0.0}
    for order, (keys, values, queries, attention) in enumerate(layers):
        now = step_of(order, keys.shape[2], len(layers), frequency)
        kv = packed_by(policy, keys, values, attention, now)
        decoded = kv.decode()
        total["key_error"] += relative(decoded[0], keys) / len(layers)
        total["value_error"] += relative(decoded[1], values) / len(layers)
        total["output_error"] += output_error(kv, keys, values, queries, scaling) / len(layers)
    return total


def hard_keys(policy: Quantizer, record: Any) -> dict[str, float]:
    """Output errors on the recorded keys, and on the same with what breaks formats."""
    layers, frequency, scaling = record
    generator = torch.Generator().manual_seed(0)
    total: dict[str, float] = {}
    for order, (keys, values, queries, attention) in enumerate(layers):
        tokens, dim = keys.shape[2], keys.shape[3]
        now = step_of(order, tokens, len(layers), frequency)
        # As large against the keys as that of Qwen2.5-7B: a norm of about 600 against 20, in a few pairs of channels.
        bias = torch.zeros(1, keys.shape[1], 1, dim)
        large = torch.randperm(dim // 2, generator=generator)[:3]
        size = 30 * float(keys.norm(dim=-1).mean()) / 6**0.5
        bias[..., large] = bias[..., large + dim // 2] = size
        shifted = keys + rotate(bias.expand_as(keys), torch.arange(tokens).view(1, 1, -1), frequency)
        sinks = torch.full((queries.shape[1],), 3.0)
        for name, k, sink in (("plain", keys, None), ("bias", shifted, None), ("sinks", keys, sinks)):
            lost = output_error(packed_by(policy, k, values, attention, now), k, values, queries, scaling, sink)
            total[name] = total.get(name, 0.0) + lost / len(layers)
    return total


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The fastest of so many runs, after one that does not count."""
    run()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def times(policy: Quantizer, tokens: int, heads: int, group: int, dim: int, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, heads, tokens, dim).unbind()
    query = torch.randn(1, heads * group, 1, dim)
    at, slots = torch.tensor([[tokens - 1]]), torch.arange(tokens, dtype=torch.int32).view(1, 1, -1)
    frequency = 1.0 / 10_000 ** (torch.arange(0, dim, 2) / dim)
    half = [x.bfloat16() for x in (keys, values)]
    now = step_of(0, tokens, 4, frequency)  # as many layers as what was calibrated for the proving model
    attention = torch.rand(1, heads, tokens)
    kv = packed_by(policy, *half, attention, now)
    options = {"scaling": dim**-0.5}

    def packed() -> Any:
        return attend_tiles(query, kv.keys.scores, kv.values.mix, heads, tile_of(kv), at, slots, **options)

    alive = LiveBytes()
    with alive:
        packed()
    return {
        "tokens": tokens, "heads": heads, "group": group, "head_dim": dim, "nbytes": kv.nbytes,
        "encode_s": seconds(lambda: packed_by(policy, *half, attention, now), 1),
        "attend_s": seconds(packed, repeats), "peak_bytes": alive.peak,
        "dense_fp32_s": seconds(lambda: attend(query, keys, values, at, slots, **options), repeats),
        "dense_bf16_s": seconds(lambda: attend(query.bfloat16(), *half, at, slots, **options), repeats),
    }  # fmt: skip


def baseline_times(name: str, tokens: int, heads: int, group: int, dim: int, repeats: int) -> dict[str, Any]:
    """A decode step of one of transformers' quantized caches: what its `update` and attention take."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, heads, tokens, dim).unbind()
    query = torch.randn(1, heads * group, 1, dim)
    config = LlamaConfig(
        hidden_size=heads * group * dim, num_attention_heads=heads * group, num_key_value_heads=heads, head_dim=dim,
        num_hidden_layers=1,
    )  # fmt: skip
    cache = quantized_cache(name, SimpleNamespace(config=config))
    start = time.perf_counter()
    cache.update(keys, values, 0)
    encode = time.perf_counter() - start

    def step() -> Any:
        k, v = cache.update(keys[:, :, :1], values[:, :, :1], 0)
        return scaled_dot_product_attention(query, k, v, enable_gqa=True)

    alive = LiveBytes()
    with alive:
        step()
    at, slots = torch.tensor([[tokens - 1]]), torch.arange(tokens, dtype=torch.int32).view(1, 1, -1)
    dense = seconds(lambda: attend(query, keys, values, at, slots, scaling=dim**-0.5), repeats)
    return {
        "tokens": tokens, "heads": heads, "group": group, "head_dim": dim, "nbytes": held_nbytes(cache),
        "encode_s": encode, "attend_s": seconds(step, min(repeats, 3)), "peak_bytes": alive.peak, "dense_fp32_s": dense,
    }  # fmt: skip


def measurements(options: argparse.Namespace) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """(file of conf/quant, kind, what measures it)."""
    record = recorded(options.prompt)
    heads, dim = record[0][0][0].shape[1], record[0][0][0].shape[3]
    for name, policy in configured("quant", "none"):
        if options.quantizers and name not in options.quantizers:
            continue
        shape = (options.heads, options.group, options.head_dim)
        if isinstance(policy, Baseline):
            yield name, "time", lambda n=name, s=shape: baseline_times(n, options.tokens, *s, options.repeats)
        if not isinstance(policy, Quantizer):
            continue
        whole = packs_everything(policy)
        bits = dict(zip(("key_bits", "value_bits"), bits_per_element(policy), strict=True))
        yield name, "error", lambda p=whole, b=bits: {**b, **errors(p, record)}
        yield name, "keys", lambda p=whole: hard_keys(p, record)
        calibrated = getattr(policy, "path", getattr(policy, "checkpoint", None)) is not None
        shape = (heads, 2, dim) if calibrated else shape
        yield name, "time", lambda p=whole, s=shape: times(p, options.tokens, *s, options.repeats)


@torch.inference_mode()
def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    settings = {
        "prompt": options.prompt, "machine": f"{platform.machine()} CPU", "threads": torch.get_num_threads(),
        "shape": [options.tokens, options.heads, options.group, options.head_dim],
    }  # fmt: skip
    path = options.out / "rows.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if settings.items() <= row.items()]
    known = {(row["quant"], row["kind"]) for row in rows}
    todo = [(name, kind, measure) for name, kind, measure in measurements(options) if (name, kind) not in known]
    for name, kind, measure in tqdm(todo, desc="quantizers", disable=None):
        try:
            found = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in measure().items()}
        except BaselineError as error:
            print(f"left out: {error}")
            continue
        rows.append({
            "quant": name, "kind": kind, **found, **settings, "torch": torch.__version__,
            "kvbench": version("kvbench"), "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        })  # fmt: skip
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    return rows


def summary(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        title="bits · errors on the proving model · output error on hard keys · decode attention against dense"
    )
    columns = ("quant", "bits K / V", "keys", "values", "output", "bias", "sinks")
    columns += ("× fp32", "attend ms", "peak MiB", "encode ms")
    for column in columns:
        table.add_column(column, justify="left" if column == "quant" else "right")
    by_kind = {(row["quant"], row["kind"]): row for row in rows}
    for name in sorted({row["quant"] for row in rows}):
        timed = by_kind[name, "time"]
        lost = ["–"] * 6  # transformers' caches are only timed
        if (name, "error") in by_kind:
            error, hard = by_kind[name, "error"], by_kind[name, "keys"]
            lost = [
                f"{error['key_bits']:.3g} / {error['value_bits']:.3g}",
                *(f"{error[k]:.3f}" for k in ("key_error", "value_error", "output_error")),
                *(f"{hard[k]:.3f}" for k in ("bias", "sinks")),
            ]
        table.add_row(
            name, *lost, f"{timed['attend_s'] / timed['dense_fp32_s']:.1f}", f"{1000 * timed['attend_s']:.0f}",
            f"{timed['peak_bytes'] / 2**20:.0f}", f"{1000 * timed['encode_s']:.0f}",
        )  # fmt: skip
    return table


def hard_keys_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: which formats survive keys with a large bias, and learned sinks."""
    lines = [
        "# Keys that break formats\n",
        "Relative error of the attention output; a format survives where it is below 0.25, or at most twice",
        "that on plain keys.\n",
        "| quant | plain keys | large bias per channel | learned sinks | survives the bias | survives sinks |",
        "|---|--:|--:|--:|---|---|",
    ]
    for row in sorted((row for row in rows if row["kind"] == "keys"), key=lambda row: row["bias"]):
        survives = ("yes" if row[k] <= max(0.25, 2 * row["plain"]) else "no" for k in ("bias", "sinks"))
        errors = (f"{row[k]:.3f}" for k in ("plain", "bias", "sinks"))
        lines.append(f"| {' | '.join((row['quant'], *errors, *survives))} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], folder: Path) -> None:
    """error.png: output error against bits, on the proving model's keys and on biased ones; time.png: decode times."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_kind = {kind: {row["quant"]: row for row in rows if row["kind"] == kind} for kind in ("error", "keys", "time")}
    error = by_kind["error"]
    figure, both = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    for axes, title, losses in (
        (both[0], "keys of the proving model", {name: row["output_error"] for name, row in error.items()}),
        (both[1], "the same with a large bias (Qwen2.5)", {name: row["bias"] for name, row in by_kind["keys"].items()}),
    ):
        for name, lost in losses.items():
            bits = (error[name]["key_bits"] + error[name]["value_bits"]) / 2
            axes.scatter([bits], [lost], s=18, color="tab:blue")
            axes.annotate(name, (bits, lost), xytext=(4, 3), textcoords="offset points", fontsize=7)
        axes.set(xlabel="bits per element, metadata included", title=title, yscale="log")
        axes.grid(alpha=0.3)
    both[0].set_ylabel("relative error of the attention output")
    figure.savefig(folder / "error.png", dpi=110)

    ratios = {name: row["attend_s"] / row["dense_fp32_s"] for name, row in by_kind["time"].items()}
    names = sorted(ratios, key=lambda name: -ratios[name])
    figure, axes = plt.subplots(figsize=(8, 0.22 * len(names) + 1), layout="constrained")
    colors = ["tab:orange" if name.startswith("hf_") else "tab:blue" for name in names]
    axes.barh(names, [ratios[name] for name in names], color=colors)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(
        xlabel="decode attention, times that over dense float32 (orange: transformers' QuantizedCache)", xscale="log"
    )
    axes.tick_params(axis="y", labelsize=8)
    figure.savefig(folder / "time.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantizers", nargs="+", help="files of conf/quant, without .yaml; default: all")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the recorded prompt")
    parser.add_argument("--tokens", type=int, default=32768, help="slots of the timed cache")
    parser.add_argument("--heads", type=int, default=8, help="key-value heads")
    parser.add_argument("--group", type=int, default=4, help="query heads per key-value head")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--out", type=Path, default=Path("results/bench_quantizers"), help="where rows.jsonl and what is made of it go"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that all runs")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(prompt=512, tokens=1024, heads=2, repeats=1)
    rows = run(options)
    Console().print(summary(rows))
    (options.out / "hard_keys.md").write_text(hard_keys_table(rows), encoding="utf-8")
    plot(rows, options.out)


if __name__ == "__main__":
    main()
