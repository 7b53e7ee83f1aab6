"""Prefill once, compress many: run every stack of a sweep on the same prompts.

Keys, values and signals of an exact prefill do not depend on the policy that compresses afterwards. So each batch of
samples is prefilled once, and each stack is replayed from that record (`CompressedCache.fork`); only stacks that change
the prefill itself (`block=`) run their own. What is fed after the compression, the *held-back* part, is the query and
the answer prefix (query-agnostic), or only the last prompt token (query-aware): the first answer token always feels the
policy.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, QuantizedCache

from kvbench.baselines import Baseline, BaselineError, full_nbytes, held_nbytes, quantized_cache
from kvbench.cache import CompressedCache, signals
from kvbench.policies.full import Full
from kvbench.policies.interface import BudgetError, Evictor, Policy, Selector, Stack
from kvbench.tasks.sample import Sample


class Task(Protocol):
    """What the engine asks of a task; see `kvbench.tasks`."""

    name: str
    kind: str  # "generate" or "nll"

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]: ...

    def score(self, sample: Sample, prediction: str) -> float: ...


@dataclass
class Run:
    """What one stack did on one task: a row per sample, checks, and why it could not run, if it could not."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    infeasible: str | None = None
    seconds: float = 0.0

    def add(self, part: Run) -> None:
        """Takes in what another batch of the same stack gave."""
        self.rows = [] if part.infeasible else [*self.rows, *part.rows]
        self.infeasible = self.infeasible or part.infeasible
        self.checks = {k: self.checks.get(k, True) and v for k, v in part.checks.items()}
        self.seconds += part.seconds


@dataclass(frozen=True)
class Prompt:
    """A tokenized sample: `prefix` is prefilled and compressed, `held_back` fed afterwards, `target` scored (nll)."""

    sample: Sample
    prefix: list[int]
    held_back: list[int]
    target: list[int]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(str([self.prefix, self.held_back, self.target]).encode()).hexdigest()


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
        ids, mask = _left_pad([p.prefix for p in batch], model.device)
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


def _left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and mask [B, T]; pads are token 0, which no policy ever sees."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _forward(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor, logits: int) -> Tensor:
    """Feeds ids [B, T] (mask [B, seen + T]) and returns the last `logits` logits [B, logits, V]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=logits,
    ).logits  # fmt: skip


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
            _forward(model, record, ids[:, start : start + chunk], mask[:, : start + chunk], logits=1)
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
        _forward(model, cache, prefix, mask, logits=1)
    compress_seconds = time.perf_counter() - started
    held, full = cache.row_nbytes(), _full_row_nbytes(cache)
    kept = torch.stack([layer.kv.counts.per_head.float().mean(1).cpu() for layer in cache.policy_layers()]).mean(0)
    prefilled = Prefilled(held.tolist(), full.tolist(), kept.tolist(), prefill_seconds, compress_seconds)
    checks = _checks(stack, cache, held, full)
    selects = any(isinstance(p, Selector) for p in stack.policies)
    run = _answer(model, tokenizer, task, cache, mask, batch, prefilled, stepwise=selects)
    run.checks = checks | run.checks
    return run


def _run_baseline(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, baseline: Baseline, prompt: Prompt
) -> Run:
    """One of transformers' own caches, which prefills by itself, on one sample."""
    started = time.perf_counter()
    ids, mask = _left_pad([prompt.prefix], model.device)
    cache = quantized_cache(baseline.name, model)
    _forward(model, cache, ids, mask, logits=1)
    held, full = held_nbytes(cache), full_nbytes(cache, model)
    prefilled = Prefilled([held], [full], [float(len(prompt.prefix))], time.perf_counter() - started, 0.0)
    run = _answer(model, tokenizer, task, cache, mask, [prompt], prefilled)
    run.checks = {"fired": held < full, "bytes_ok": True}
    return run


@dataclass(frozen=True)
class Prefilled:
    """What a batch holds once it is prefilled and compressed: per row bytes, bytes of a full cache, slots per head."""

    nbytes: list[int]
    full_nbytes: list[int]
    kept: list[float]
    prefill_seconds: float
    compress_seconds: float


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    cache: CompressedCache | QuantizedCache,
    mask: Tensor,
    batch: list[Prompt],
    prefilled: Prefilled,
    stepwise: bool = False,
) -> Run:
    """Feeds what was held back, then decodes or scores; mask [B, T] of the prefix.

    stepwise: a selector is at work; it chooses at each decode step, so targets are scored on single steps.
    """
    started = time.perf_counter()
    ids, new_mask = _left_pad([p.held_back for p in batch], model.device)
    mask = torch.cat([mask, new_mask], dim=1)
    if task.kind == "nll":
        steps = ids.split(1 if stepwise else ids.shape[1], dim=1)
        logits, until = [], mask.shape[1] - ids.shape[1]
        for part in steps:
            until += part.shape[1]
            logits.append(_forward(model, cache, part, mask[:, :until], logits=part.shape[1]))
        likely = torch.cat(logits, dim=1).float().log_softmax(-1)
        outcomes = [_score_target(row[-len(p.target) :], p.target) for row, p in zip(likely, batch, strict=True)]
        finals = _bytes_now(cache, model)
    else:
        tokens, finals = _generate(model, tokenizer, cache, ids, mask, batch)
        outcomes = []
        for prompt, generated in zip(batch, tokens, strict=True):
            text = str(tokenizer.decode(generated, skip_special_tokens=True))
            outcomes.append(
                {
                    "prediction": text,
                    "score": task.score(prompt.sample, text),
                    "nll": None,
                    "n_generated": len(generated),
                }
            )
    checks = {"fired": all(read < held for held, _, read in finals)} if stepwise else {}
    decode_seconds = time.perf_counter() - started
    rows = [
        {
            "sample_id": prompt.sample.sample_id,
            "prompt_sha256": prompt.sha256,
            **outcome,
            "n_prompt_tokens": len(prompt.prefix) + (0 if task.kind == "nll" else len(prompt.held_back)),
            "kept_tokens": prefilled.kept[i],
            "kv_bytes_prefill_end": prefilled.nbytes[i],
            "kv_bytes_final": finals[i][0],
            "kv_bytes_read_final": finals[i][2],
            "kv_bytes_full": prefilled.full_nbytes[i],
            "kv_bytes_full_final": finals[i][1],
            "prefill_s": (prefilled.prefill_seconds + prefilled.compress_seconds) / len(batch),
            "decode_s": decode_seconds / len(batch),
            "meta": dict(prompt.sample.meta) | {"length": prompt.sample.length},
        }
        for i, (prompt, outcome) in enumerate(zip(batch, outcomes, strict=True))
    ]
    return Run(rows, checks, seconds=prefilled.compress_seconds + decode_seconds)


def _score_target(log_probabilities: Tensor, target: list[int]) -> dict[str, Any]:
    nll = -log_probabilities.gather(1, torch.tensor(target, device=log_probabilities.device)[:, None]).mean().item()
    return {"prediction": "", "score": math.exp(-nll), "nll": nll, "n_generated": 0}


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: CompressedCache | QuantizedCache,
    ids: Tensor,
    mask: Tensor,
    batch: list[Prompt],
) -> tuple[list[list[int]], list[tuple[int, int, int]]]:
    """Greedy decoding of the whole batch. Returns per row the tokens before a stop, and `_bytes_now` then."""
    stops = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])}
    generated: list[list[int]] = [[] for _ in batch]
    finals: list[tuple[int, int, int] | None] = [None] * len(batch)
    longest = max(p.sample.max_new_tokens for p in batch)
    logits = _forward(model, cache, ids, mask, logits=1)
    for step in range(longest):
        token = logits[:, -1].argmax(-1)
        just_done = []
        for i, (prompt, chosen) in enumerate(zip(batch, token.tolist(), strict=True)):
            if finals[i] is not None:
                continue
            if chosen not in stops:
                generated[i].append(chosen)
            text = tokenizer.decode(generated[i]) if prompt.sample.stop else ""
            full = len(generated[i]) >= prompt.sample.max_new_tokens
            if chosen in stops or full or any(stop in text for stop in prompt.sample.stop):
                just_done.append(i)
        if just_done:
            now = _bytes_now(cache, model)
            for i in just_done:
                finals[i] = now[i]
        if all(f is not None for f in finals) or step == longest - 1:
            break
        mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=1)
        logits = _forward(model, cache, token[:, None], mask, logits=1)
    return generated, [f for f in finals if f is not None]


def _bytes_now(cache: CompressedCache | QuantizedCache, model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Per row: bytes held, bytes of the 16-bit full cache, bytes that the last forward read."""
    if isinstance(cache, QuantizedCache):
        held = held_nbytes(cache)
        return [(held, full_nbytes(cache, model), held)]
    parts = (cache.row_nbytes(), _full_row_nbytes(cache), cache.row_read_nbytes())
    return list(zip(*(part.tolist() for part in parts), strict=True))


def _full_row_nbytes(cache: CompressedCache) -> Tensor:
    """[B] bytes of a 16-bit cache that keeps every token of the row, full-attention layers."""
    total = torch.zeros(len(cache.policy_layers()[0].seen), dtype=torch.int64)
    for layer in cache.policy_layers():
        per_token = 2 * sum(held.shape[1] * held.shape[3] for held in (layer.kv.keys, layer.kv.values))
        total = total + layer.seen.cpu() * per_token
    return total


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
