"""Prefill once, compress many: run every stack of a sweep on the same prompts.

Keys, values and signals of an exact prefill do not depend on the policy that compresses afterwards. So each batch of
samples is prefilled once, and each stack is replayed from that record (`CompressedCache.fork`); only stacks that change
the prefill itself (`block=`) run their own, and those whose layers share have one record for all that share alike. What
is fed after the compression, the *held-back* part, is the query and the answer prefix (query-agnostic), or only the
last prompt token (query-aware): the first answer token always feels the policy.

The record of a prefill holds 2 x layers x key-value heads x head size x bytes per number for every token (Llama-3.1-8B
in bfloat16: 128 KiB, 16 GiB for 128k tokens), and 4 bytes per layer, head and token where a policy asks for accumulated
attention. It stays on the device while the stacks are replayed, one at a time, each with what it keeps. Where that is
too much, `record` chooses: "cpu" moves keys and values to the CPU's memory and brings them back for each stack, layer
by layer as it compresses (policies that compare layers or draft an answer: all at once), so the device holds no more
than the prefill itself took; "recompute" keeps nothing and prefills again for each stack. Results are the same.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kvbench.answer import (
    Prefilled,
    Prompt,
    Reference,
    Run,
    Task,
    answer,
    forward,
    full_reference,
    full_row_nbytes,
    left_pad,
)
from kvbench.baselines import Baseline, BaselineError, full_nbytes, held_nbytes, quantized_cache
from kvbench.cache import CompressedCache, signals
from kvbench.kernels.choice import watch
from kvbench.policies.full import Full
from kvbench.policies.interface import BudgetError, Evictor, Policy, Selector, Stack
from kvbench.prompts import prepare

BATCH_TOKENS = 65536
PREFILL_CHUNK = 8192
RECORDS = ("device", "cpu", "recompute")


@torch.inference_mode()
def run_stacks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    stacks: Sequence[Policy],
    *,
    prompts: Sequence[Prompt] | None = None,
    query_aware: bool = False,
    batch_size: int = 16,
    batch_tokens: int = BATCH_TOKENS,
    record: str = "device",
    prefill_chunk: int = PREFILL_CHUNK,
    finished: Sequence[Sequence[Run]] = (),
    on_finished: Callable[[int, Run], None] = lambda index, run: None,
    on_failed: Callable[[int, Exception], None] | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> list[Run]:
    """Runs every stack on every sample of the task; each batch of samples is prefilled once.

    prompts: the task's, where they are at hand (`prepare`), for the same tokenizer and `query_aware`.
    batch_size, batch_tokens: a batch has at most so many rows, and so many tokens unless it is a single row.
    record: where the prefill waits for the next stack: device, cpu or recompute; see the top of this file.
    finished: per stack, the batches an earlier, interrupted call has handed to `on_finished`; they are not repeated,
        unless their prompts were others.
    on_failed: called with what a stack raises, which ends this stack (`Run.failed`) and no other; None: nothing goes
        on. What the full cache raises is not the policy's fault and ends the call, unless it is want of memory.
    on_progress: called with the number of (batch, stack) pairs just finished; there are `batches_for` x stacks in all.
    """
    if record not in RECORDS:
        raise ValueError(f"record={record!r} is not one of {', '.join(RECORDS)}")
    if prompts is None:
        prompts = prepare(task, tokenizer, query_aware, context_limit(model.config))
    folded = [Stack((policy,)) for policy in stacks]
    runs = [Run() for _ in folded]
    asked = {p.sample.sample_id: p.sha256 for p in prompts} if any(finished) else {}
    for run, parts in zip(runs, finished or [[]] * len(stacks), strict=True):
        for part in parts:
            if all(asked.get(row["sample_id"]) == row["prompt_sha256"] for row in part.rows):
                run.add(part)
    needs = signals(folded)
    for batch in batches_for(model, task, prompts, batch_size, batch_tokens):
        names = {p.sample.sample_id for p in batch}
        open_runs = [i for i, run in enumerate(runs) if not names <= {row["sample_id"] for row in run.rows}]
        on_progress(len(runs) - len(open_runs))
        if all(runs[i].ended for i in open_runs):
            on_progress(len(open_runs))
            continue
        prefill = _Prefill(model, tokenizer, task, batch, needs, query_aware, prefill_chunk, record)
        for i in open_runs:
            if not runs[i].ended:
                try:
                    with watch() as ran:
                        part = _replay(prefill, folded[i])
                    part.fallbacks = sorted(ran.fallbacks)
                    for row in part.rows:
                        row["backend"] = "+".join(sorted(ran.attended)) or None
                except (BudgetError, BaselineError) as error:
                    part = Run(infeasible=str(error))
                except Exception as error:
                    full = all(isinstance(p, Full) for p in folded[i].policies)
                    if on_failed is None or (full and not isinstance(error, torch.OutOfMemoryError)):
                        raise
                    on_failed(i, error)
                    part = Run(failed=_reason(stacks[i], error))
                if part.failed is None:
                    on_finished(i, part)
                else:
                    _collect(model)
                runs[i].add(part)
            on_progress(1)
        prefill.free()
    order = {p.sample.sample_id: i for i, p in enumerate(prompts)}
    for run in runs:
        run.rows.sort(key=lambda row: order[row["sample_id"]])
    return runs


def context_limit(config: PreTrainedConfig) -> int | None:
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def batches_for(
    model: PreTrainedModel, task: Task, prompts: Sequence[Prompt], size: int, tokens: int
) -> list[list[Prompt]]:
    """The batches in which `run_stacks` takes these prompts.

    Sliding-window layers count pads as tokens of their window. So no pads may stand behind a prompt's first token: what
    is held back is equally long in all rows, and rows that go on after answers of different lengths run alone.
    """
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    windows = any(getattr(layer, "is_sliding", False) for layer in layers)
    if windows and (task.kind == "fidelity" or any(p.turns for p in prompts)):
        size = 1
    return batches(prompts, size, tokens, (lambda p: len(p.held_back)) if windows else (lambda p: 0))


def batches(
    prompts: Sequence[Prompt], size: int, tokens: int, alike: Callable[[Prompt], int] = lambda p: 0
) -> list[list[Prompt]]:
    """Prompts of like length together, so that rows are padded little: at most `size` rows and `tokens` tokens each.

    A prompt of more than `tokens` tokens is a batch by itself. alike: equal for all prompts of a batch.
    """
    made: list[list[Prompt]] = []
    longest = 0
    for prompt in sorted(prompts, key=lambda p: (alike(p), len(p.prefix))):
        length = len(prompt.prefix) + len(prompt.held_back) + prompt.sample.max_new_tokens
        rows, longest = len(made[-1]) + 1 if made else 1, max(longest, length)
        if not made or rows > size or rows * longest > tokens or alike(made[-1][0]) != alike(prompt):
            made.append([])
            longest = length
        made[-1].append(prompt)
    return made


class _Prefill:
    """One batch of prompts after an exact prefill, from which the stacks are replayed."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        batch: list[Prompt],
        needs: Mapping[str, int],
        query_aware: bool,
        chunk: int,
        record: str,
    ) -> None:
        self.model, self.tokenizer, self.task, self.batch = model, tokenizer, task, batch
        self.needs, self.query_aware, self.chunk = needs, query_aware, chunk
        self.ids, self.mask = left_pad([p.prefix for p in batch], model.device)
        self.recomputes, self.seconds, self._place = record == "recompute", 0.0, record
        self._records: dict[Stack, tuple[CompressedCache, float]] = {}
        made = self._run(Stack()) if not self.recomputes or task.kind == "fidelity" else None
        self.reference = None if made is None else full_reference(model, tokenizer, task, made, self.mask, batch)
        if made is not None:
            if self.recomputes:
                _free(made)
            else:
                self._keep(Stack(), made)

    def prepare(self, stack: Stack) -> None:
        """Prefills, once, for the stacks whose layers share as those of this one do."""
        if not self.recomputes and stack.sharing not in self._records:
            self._keep(stack.sharing, self._run(stack.sharing))

    def fork(self, stack: Stack) -> CompressedCache:
        """A cache with these prompts, compressed by a stack; `seconds` is what their prefill took."""
        if not self.recomputes:
            record, self.seconds = self._records[stack.sharing]
            return record.fork(stack)
        record = self._run(stack.sharing)
        try:
            return record.fork(stack)
        finally:
            _free(record)

    def free(self) -> None:
        for record, _ in self._records.values():
            _free(record)

    def _keep(self, sharing: Stack, record: CompressedCache) -> None:
        if self._place == "cpu":
            record.move("cpu")
        self._records[sharing] = record, self.seconds

    def _run(self, sharing: Stack) -> CompressedCache:
        started = _now(self.model)
        record = exact_prefill(self.model, self.tokenizer, sharing, self.needs, self.ids, self.mask, self.chunk)
        if self.query_aware or self.batch[0].target:  # what is held back begins with the prompt's own last token
            record.next_token = torch.tensor([p.held_back[0] for p in self.batch], device=self.ids.device)
        self.seconds = _now(self.model) - started
        return record


def exact_prefill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sharing: Stack,
    needs: Mapping[str, int],
    ids: Tensor,
    mask: Tensor,
    chunk: int = PREFILL_CHUNK,
) -> CompressedCache:
    """Ids [B, T] in chunks, exact but for layers that share, and uncompressed; the signals `needs` are recorded."""
    record = CompressedCache(model, sharing, tokenizer=tokenizer, needs=needs)
    with record.deferred():
        for start in range(0, ids.shape[1], chunk):
            end = start + chunk
            forward(model, record, ids[:, start:end], mask[:, :end], logits=1)
    return record


def _replay(prefill: _Prefill, stack: Stack) -> Run:
    """One stack on one prefilled batch."""
    model, tokenizer, task, batch = prefill.model, prefill.tokenizer, prefill.task, prefill.batch
    baseline = next((p for p in stack.policies if isinstance(p, Baseline)), None)
    if baseline is not None:
        if len(stack.policies) > 1:
            raise BaselineError(f"{baseline.name} packs by itself: it cannot be stacked with {stack.policies[0]}")
        run = Run()
        for i, prompt in enumerate(batch):  # pads would enter its groups
            reference = None if prefill.reference is None else prefill.reference.row(i)
            run.add(_run_baseline(model, tokenizer, task, baseline, prompt, reference))
        return run
    if stack.block is None:
        prefill.prepare(stack)
    gpus = _gpus(model)
    before = sum(map(torch.cuda.memory_allocated, gpus))
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    started = _now(model)
    if stack.block is None:
        cache = prefill.fork(stack)
        prefill_seconds = prefill.seconds
    else:
        cache, prefill_seconds = CompressedCache(model, stack, tokenizer=tokenizer), 0.0
        forward(model, cache, prefill.ids, prefill.mask, logits=1)
    compress_seconds = _now(model) - started
    if prefill.recomputes and stack.block is None:
        compress_seconds -= prefill_seconds
    held, full = cache.row_nbytes(), full_row_nbytes(cache)
    kept = torch.stack([layer.kv.counts.per_head.float().mean(1).cpu() for layer in cache.policy_layers()]).mean(0)
    prefilled = Prefilled(held.tolist(), full.tolist(), kept.tolist(), prefill_seconds, compress_seconds)
    checks = _checks(stack, cache, held, full)
    needles = _needles_kept(cache, batch)
    selects = any(isinstance(p, Selector) for p in stack.policies)
    run = answer(model, tokenizer, task, cache, prefill.mask, batch, prefilled, selects, prefill.reference)
    for row, needle in zip(run.rows, needles, strict=True):
        row["needle_kept"] = needle
        if gpus:
            row["peak_bytes"] = sum(map(torch.cuda.max_memory_allocated, gpus)) - before
    run.checks = checks | run.checks
    _free(cache)
    return run


def _free(cache: CompressedCache) -> None:
    """Lets go of what a cache holds at once: it and its layers know each other, so it would wait for the collector."""
    cache.layers.clear()


def _reason(policy: Policy, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{policy}: {type(error).__name__}" + (f": {lines[0]}" if lines else "")


def _collect(model: PreTrainedModel) -> None:
    """Frees what the traceback of an error held: caches, whose layers know each other, and the device's memory."""
    gc.collect()
    if _gpus(model):
        torch.cuda.empty_cache()


def _needles_kept(cache: CompressedCache, batch: list[Prompt]) -> list[list[list[float]] | None]:
    """Per row: the share of the needle's tokens whose slots are kept, [layers][heads]; None without a needle."""
    if not any(p.needle for p in batch):
        return [None] * len(batch)
    device = cache.policy_layers()[0].seen.device
    table = torch.zeros(len(batch), max(len(p.prefix) for p in batch), device=device)
    for row, prompt in enumerate(batch):
        for begin, end in prompt.needle:
            table[row, begin:end] = 1
    layers = []
    for layer in cache.policy_layers():
        position = cache.kept(layer.index).to(device)
        held = table[:, None].expand(-1, position.shape[1], -1).gather(2, position.clamp(min=0)) * (position >= 0)
        layers.append(held.sum(2) / table.sum(1)[:, None])
    shares = torch.stack(layers, 1).tolist()
    return [
        [[round(share, 2) for share in heads] for heads in of_row] if prompt.needle else None
        for prompt, of_row in zip(batch, shares, strict=True)
    ]


def _now(model: PreTrainedModel) -> float:
    """The clock, once the devices have done what they were given."""
    for gpu in _gpus(model):
        torch.cuda.synchronize(gpu)
    return time.perf_counter()


def _gpus(model: PreTrainedModel) -> set[torch.device]:
    """Those that the model's weights are on."""
    return {weight.device for weight in model.parameters() if weight.device.type == "cuda"}


def _run_baseline(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    baseline: Baseline,
    prompt: Prompt,
    reference: Reference | None,
) -> Run:
    """One of transformers' own caches, which prefills by itself, on one sample."""
    started = _now(model)
    ids, mask = left_pad([prompt.prefix], model.device)
    cache = quantized_cache(baseline.name, model)
    forward(model, cache, ids, mask, logits=1)
    held, full = held_nbytes(cache), full_nbytes(cache, model)
    prefilled = Prefilled([held], [full], [float(len(prompt.prefix))], _now(model) - started, 0.0)
    run = answer(model, tokenizer, task, cache, mask, [prompt], prefilled, reference=reference)
    run.checks = {"fired": held < full, "bytes_ok": True}
    return run


def _checks(stack: Stack, cache: CompressedCache, held: Tensor, full: Tensor) -> dict[str, bool]:
    """Whether the policy did something to any row, and whether the bytes and slots of all respect its budget.

    Any: a prompt may be within the budget, and what is said of a task must not depend on the prompts of a batch.
    """
    dense = full * (cache.policy_layers()[0].kv.keys.dtype.itemsize / 2)
    asked = [p for p in stack.policies if not isinstance(p, (Full, Selector))]
    fired = not asked or bool((held < dense).any())
    evictors = [p for p in asked if isinstance(p, Evictor)]
    bytes_ok = all(bool((held <= p.memory * full).all()) for p in evictors if p.memory is not None)
    layers = cache.holders()
    kept = torch.stack([layer.kv.counts.per_head.sum(1).cpu() for layer in layers]).sum(0)
    for evictor in (p for p in evictors if p.memory is None):
        slots = [evictor.slots(layer.kv, layer.step(False)).cpu() for layer in layers]
        heads = layers[0].kv.counts.shape[1]
        bytes_ok &= bool((kept <= torch.stack([s.expand(-1, heads).sum(1) for s in slots]).sum(0)).all())
    return {"fired": fired, "bytes_ok": bytes_ok}
