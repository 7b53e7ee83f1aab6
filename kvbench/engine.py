"""Prefill once, compress many: run every stack of a sweep on the same prompts.

Keys, values and signals of an exact prefill do not depend on the policy that compresses afterwards. So each batch of
samples is prefilled once, and each stack is replayed from that record (`CompressedCache.fork`); only stacks that change
the prefill itself (`block=`) run their own. What is fed after the compression, the *held-back* part, is the query and
the answer prefix (query-agnostic), or only the last prompt token (query-aware): the first answer token always feels the
policy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvbench.answer import Prefilled, Prompt, Run, Task, answer, forward, full_row_nbytes, left_pad
from kvbench.baselines import Baseline, BaselineError, full_nbytes, held_nbytes, quantized_cache
from kvbench.cache import CompressedCache, signals
from kvbench.policies.full import Full
from kvbench.policies.interface import BudgetError, Evictor, Policy, Selector, Stack


def prepare(
    task: Task, tokenizer: PreTrainedTokenizerBase, query_aware: bool, context_limit: int | None
) -> list[Prompt]:
    """Tokenizes the samples of a task and checks that they fit the model."""
    prompts = []
    for sample in task.samples(tokenizer):
        context, query, answer_prefix = sample.segments(tokenizer)
        if task.kind == "nll":
            target = list(tokenizer.encode(sample.references[0], add_special_tokens=False))
            tokens = [*context, *target]
            prefix, held_back = tokens[: len(context) - 1], tokens[len(context) - 1 : -1]
            new = 0
        else:
            tokens, target, new = [*context, *query, *answer_prefix], [], sample.max_new_tokens
            cut = len(tokens) - 1 if query_aware or len(context) == len(tokens) else len(context)
            prefix, held_back = tokens[:cut], tokens[cut:]
        if not prefix:
            raise ValueError(
                f"{sample.sample_id}: empty prompt: there must be tokens to compress before the held-back ones"
            )
        if context_limit is not None and len(tokens) + new > context_limit:
            raise ValueError(
                f"{sample.sample_id}: {len(tokens)} prompt tokens + {new} new ones exceed the model's context of "
                f"{context_limit}; use a smaller task.length or another model"
            )
        prompts.append(Prompt(sample, prefix, held_back, target))
    if not prompts:
        raise ValueError(f"task {task.name} has no samples")
    return prompts


@torch.inference_mode()
def run_stacks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    stacks: Sequence[Policy],
    *,
    query_aware: bool = False,
    batch_size: int = 16,
    prefill_chunk: int = 8192,
    finished: Sequence[Sequence[Run]] = (),
    on_finished: Callable[[int, Run], None] = lambda index, run: None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> list[Run]:
    """Runs every stack on every sample of the task; each batch of samples is prefilled once.

    finished: per stack, the batches an earlier, interrupted call has handed to `on_finished`; they are not repeated.
    on_progress: called with the number of (batch, stack) pairs just finished; there are `steps_of` in all.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    prompts = prepare(task, tokenizer, query_aware, limit)
    folded = [Stack((policy,)) for policy in stacks]
    runs = [Run() for _ in folded]
    for run, parts in zip(runs, finished or [[]] * len(stacks), strict=True):
        for part in parts:
            run.add(part)
    needs = signals(folded)
    for batch in _batches(prompts, batch_size):
        names = {p.sample.sample_id for p in batch}
        open_runs = [i for i, run in enumerate(runs) if not names <= {row["sample_id"] for row in run.rows}]
        on_progress(len(runs) - len(open_runs))
        if all(runs[i].infeasible for i in open_runs):
            on_progress(len(open_runs))
            continue
        started = time.perf_counter()
        ids, mask = left_pad([p.prefix for p in batch], model.device)
        record = _prefill(model, tokenizer, ids, mask, needs, prefill_chunk)
        if query_aware or task.kind == "nll":  # what is held back begins with the prompt's own last token
            record.next_token = torch.tensor([p.held_back[0] for p in batch], device=model.device)
        prefill_seconds = time.perf_counter() - started
        for i in open_runs:
            if runs[i].infeasible is None:
                try:
                    part = _replay(model, tokenizer, task, record, ids, mask, folded[i], batch, prefill_seconds)
                except (BudgetError, BaselineError) as error:
                    part = Run(infeasible=str(error))
                on_finished(i, part)
                runs[i].add(part)
            on_progress(1)
    order = {p.sample.sample_id: i for i, p in enumerate(prompts)}
    for run in runs:
        run.rows.sort(key=lambda row: order[row["sample_id"]])
    return runs


def steps_of(samples: int, stacks: int, batch_size: int) -> int:
    return math.ceil(samples / batch_size) * stacks


def _batches(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Prompts of like length together, so that rows are padded little."""
    ordered = sorted(prompts, key=lambda p: len(p.prefix))
    return (ordered[i : i + size] for i in range(0, len(ordered), size))


def _prefill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    mask: Tensor,
    needs: Mapping[str, int],
    chunk: int,
) -> CompressedCache:
    """An exact, uncompressed prefill of ids [B, T] that records the signals `needs`, in chunks."""
    record = CompressedCache(model, Full(), tokenizer=tokenizer, needs=needs)
    with record.deferred():
        for start in range(0, ids.shape[1], chunk):
            forward(model, record, ids[:, start : start + chunk], mask[:, : start + chunk], logits=1)
    return record


def _replay(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    record: CompressedCache,
    prefix: Tensor,
    mask: Tensor,
    stack: Stack,
    batch: list[Prompt],
    prefill_seconds: float,
) -> Run:
    """One stack on one prefilled batch; prefix, mask [B, T]."""
    baseline = next((p for p in stack.policies if isinstance(p, Baseline)), None)
    if baseline is not None:
        if len(stack.policies) > 1:
            raise BaselineError(f"{baseline.name} packs by itself: it cannot be stacked with {stack.policies[0]}")
        run = Run()
        for prompt in batch:  # pads would enter its groups
            run.add(_run_baseline(model, tokenizer, task, baseline, prompt))
        return run
    started = time.perf_counter()
    if stack.block is None:
        cache = record.fork(stack)
    else:
        cache, prefill_seconds = CompressedCache(model, stack, tokenizer=tokenizer), 0.0
        forward(model, cache, prefix, mask, logits=1)
    compress_seconds = time.perf_counter() - started
    held, full = cache.row_nbytes(), full_row_nbytes(cache)
    kept = torch.stack([layer.kv.counts.per_head.float().mean(1).cpu() for layer in cache.policy_layers()]).mean(0)
    prefilled = Prefilled(held.tolist(), full.tolist(), kept.tolist(), prefill_seconds, compress_seconds)
    checks = _checks(stack, cache, held, full)
    selects = any(isinstance(p, Selector) for p in stack.policies)
    run = answer(model, tokenizer, task, cache, mask, batch, prefilled, stepwise=selects)
    run.checks = checks | run.checks
    return run


def _run_baseline(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, baseline: Baseline, prompt: Prompt
) -> Run:
    """One of transformers' own caches, which prefills by itself, on one sample."""
    started = time.perf_counter()
    ids, mask = left_pad([prompt.prefix], model.device)
    cache = quantized_cache(baseline.name, model)
    forward(model, cache, ids, mask, logits=1)
    held, full = held_nbytes(cache), full_nbytes(cache, model)
    prefilled = Prefilled([held], [full], [float(len(prompt.prefix))], time.perf_counter() - started, 0.0)
    run = answer(model, tokenizer, task, cache, mask, [prompt], prefilled)
    run.checks = {"fired": held < full, "bytes_ok": True}
    return run


def _checks(stack: Stack, cache: CompressedCache, held: Tensor, full: Tensor) -> dict[str, bool]:
    """Whether the policy did something, and whether the measured bytes and slots respect its budget."""
    dense = full * (cache.policy_layers()[0].kv.keys.dtype.itemsize / 2)
    asked = [p for p in stack.policies if not isinstance(p, (Full, Selector))]
    fired = not asked or bool((held < dense).all())
    evictors = [p for p in asked if isinstance(p, Evictor)]
    bytes_ok = all(bool((held <= p.memory * full).all()) for p in evictors if p.memory is not None)
    layers = cache.policy_layers()
    kept = torch.stack([layer.kv.counts.per_head.sum(1) for layer in layers]).sum(0)
    for evictor in (p for p in evictors if p.memory is None):
        slots = [evictor.slots(layer.kv, layer.step(False)) for layer in layers]
        heads = layers[0].kv.counts.shape[1]
        bytes_ok &= bool((kept <= torch.stack([s.expand(-1, heads).sum(1) for s in slots]).sum(0)).all())
    return {"fired": fired, "bytes_ok": bytes_ok}
