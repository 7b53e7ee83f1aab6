"""After the compression: what was held back is fed, then the model answers, or is scored on a text.

One stack at a time, on one batch of prompts; `kvbench.engine` prefills and compresses.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, QuantizedCache

from kvbench.baselines import full_nbytes, held_nbytes
from kvbench.cache import CompressedCache
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


@dataclass(frozen=True)
class Prefilled:
    """What a batch holds once it is prefilled and compressed: per row bytes, bytes of a full cache, slots per head."""

    nbytes: list[int]
    full_nbytes: list[int]
    kept: list[float]
    prefill_seconds: float
    compress_seconds: float


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and mask [B, T]; pads are token 0, which no policy ever sees."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def forward(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor, logits: int) -> Tensor:
    """Feeds ids [B, T] (mask [B, seen + T]) and returns the last `logits` logits [B, logits, V]."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        logits_to_keep=logits,
    ).logits  # fmt: skip


def answer(
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
    ids, new_mask = left_pad([p.held_back for p in batch], model.device)
    mask = torch.cat([mask, new_mask], dim=1)
    if task.kind == "nll":
        steps = ids.split(1 if stepwise else ids.shape[1], dim=1)
        logits, until = [], mask.shape[1] - ids.shape[1]
        for part in steps:
            until += part.shape[1]
            logits.append(forward(model, cache, part, mask[:, :until], logits=part.shape[1]))
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
    logits = forward(model, cache, ids, mask, logits=1)
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
        logits = forward(model, cache, token[:, None], mask, logits=1)
    return generated, [f for f in finals if f is not None]


def _bytes_now(cache: CompressedCache | QuantizedCache, model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Per row: bytes held, bytes of the 16-bit full cache, bytes that the last forward read."""
    if isinstance(cache, QuantizedCache):
        held = held_nbytes(cache)
        return [(held, full_nbytes(cache, model), held)]
    parts = (cache.row_nbytes(), full_row_nbytes(cache), cache.row_read_nbytes())
    return list(zip(*(part.tolist() for part in parts), strict=True))


def full_row_nbytes(cache: CompressedCache) -> Tensor:
    """[B] bytes of a 16-bit cache that keeps every token of the row, full-attention layers."""
    total = torch.zeros(len(cache.policy_layers()[0].seen), dtype=torch.int64)
    for layer in cache.policy_layers():
        per_token = 2 * sum(held.shape[1] * held.shape[3] for held in (layer.kv.keys, layer.kv.values))
        total = total + layer.seen.cpu() * per_token
    return total
