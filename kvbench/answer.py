"""After the compression: what was held back is fed, then the model answers, or is scored on a text.

One stack at a time, on one batch of prompts; `kvbench.engine` prefills and compresses. Three kinds of tasks:

generate    the model writes an answer, and further answers where a sample has `turns`
nll         the text that follows is known; what does each of its tokens cost?
fidelity    likewise, and next to it what the full cache predicts there: needs no right answers
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, QuantizedCache

from kvbench.baselines import full_nbytes, held_nbytes
from kvbench.cache import CompressedCache
from kvbench.corpus import rng_for
from kvbench.ledger import full_token_nbytes
from kvbench.policies.full import Full
from kvbench.tasks.sample import Sample, encode


class Task(Protocol):
    """What the engine asks of a task; see `kvbench.tasks`. A task may also have

    details(sample, prediction): further numbers, kept in the result row
    history: what stands before the further questions of a sample: "gold" answers (default), the model's "own", or
        "none": every question is asked of the cache as the context left it (multi-request)
    temperature, top_p: sample answers instead of taking the likeliest token; the same dice for all stacks
    trace: note in the row's details the mean of the bytes held, those after every so many generated tokens, and how
        the answer ran on
    chunk: feed a known text so many tokens at a time, the policy at work after each; None: in one pass
    """

    name: str
    kind: str  # "generate", "nll" or "fidelity"

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]: ...

    def score(self, sample: Sample, prediction: str) -> float: ...


@dataclass
class Run:
    """What one stack did on one task: a row per sample, checks, and why there are none, if so.

    infeasible: the stack cannot do what is asked of it; failed: an error stopped it
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    infeasible: str | None = None
    failed: str | None = None
    seconds: float = 0.0
    fallbacks: list[str] = field(default_factory=list)  # why kernels that were to run did not

    @property
    def ended(self) -> bool:
        return self.infeasible is not None or self.failed is not None

    def add(self, part: Run) -> None:
        """Takes in what another batch of the same stack gave; a sample that it repeats is replaced."""
        rows = {row["sample_id"]: row for row in (*self.rows, *part.rows)}
        self.rows = [] if part.ended else list(rows.values())
        self.infeasible = self.infeasible or part.infeasible
        self.failed = self.failed or part.failed
        fired = self.checks.get("fired", False) or part.checks.get("fired", False)  # some prompts may be too short
        self.checks = {k: self.checks.get(k, True) and v for k, v in part.checks.items()}
        if "fired" in self.checks:
            self.checks["fired"] = fired
        self.seconds += part.seconds
        self.fallbacks = sorted({*self.fallbacks, *part.fallbacks})


@dataclass(frozen=True)
class Prompt:
    """A tokenized sample: `prefix` is prefilled and compressed, `held_back` fed afterwards, `target` scored (nll).

    `kvbench.prompts.prepare` hands token ids over as arrays of four bytes each, as long prompts are many.
    needle: which tokens of the prefix hold the answer, as (begin, end)
    turns: the further questions, each from the end of the answer before it
    """

    sample: Sample
    prefix: Sequence[int]
    held_back: Sequence[int]
    target: Sequence[int]
    needle: tuple[tuple[int, int], ...] = ()
    turns: tuple[Sequence[int], ...] = ()

    @cached_property
    def sha256(self) -> str:
        then = [self.sample.then.query] if self.sample.then else []
        parts = [*map(list, (self.prefix, self.held_back, self.target, *self.turns)), *then]
        return hashlib.sha256(str(parts).encode()).hexdigest()

    def at(self, turn: int) -> Sample:
        """What is asked at a turn, 0 being the sample's own question, as a sample without turns."""
        if turn == 0:
            return self.sample
        further = self.sample.turns[turn - 1]
        return replace(
            self.sample, query=further.query, answer_prefix=further.answer_prefix, references=further.references,
            max_new_tokens=further.max_new_tokens, turns=(), meta={**self.sample.meta, "turn": turn},
        )  # fmt: skip


def further_questions(task: Task, sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], ...]:
    """`Prompt.turns` of a sample."""
    if getattr(task, "history", "gold") != "none":
        segments = (sample.turn_segments(tokenizer, turn) for turn in sample.turns)
        return tuple([*query, *answer_prefix] for query, answer_prefix in segments)
    alone = (replace(sample, context="", query=t.query, answer_prefix=t.answer_prefix) for t in sample.turns)
    return tuple([*query, *answer_prefix] for _, query, answer_prefix in (a.segments(tokenizer) for a in alone))


@dataclass(frozen=True)
class Prefilled:
    """What a batch holds once it is prefilled and compressed: per row bytes, bytes of a full cache, slots per head."""

    nbytes: list[int]
    full_nbytes: list[int]
    kept: list[float]
    prefill_seconds: float
    compress_seconds: float


@dataclass(frozen=True)
class Reference:
    """What the full cache predicts on a batch; made once, for all stacks.

    batch: the prompts, with a target; logits [B, T, V] in the model's dtype, of the held-back tokens (left-padded)
    """

    batch: list[Prompt]
    logits: Tensor

    def row(self, i: int) -> Reference:
        """Of one prompt alone."""
        return Reference([self.batch[i]], self.logits[i : i + 1, -len(self.batch[i].held_back) :])


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


def full_reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    record: CompressedCache,
    mask: Tensor,
    batch: list[Prompt],
) -> Reference | None:
    """What stacks are compared with on a batch, for a task of kind "fidelity"; record, mask [B, T]: of the prefix.

    Prompts without a target are first continued by the full cache, greedily.
    """
    if task.kind != "fidelity":
        return None
    if not all(p.target for p in batch):
        ids, new = left_pad([p.held_back for p in batch], model.device)
        cache, seen = record.fork(Full()), torch.cat([mask, new], dim=1)
        logits = forward(model, cache, ids, seen, logits=1)
        writers, _ = _generate(model, tokenizer, task, cache, logits, seen, [p.sample for p in batch])
        batch = [
            replace(p, held_back=[*p.held_back, *writers[i].tokens[:-1]], target=writers[i].tokens)
            for i, p in enumerate(batch)
        ]
    ids, new = left_pad([p.held_back for p in batch], model.device)
    logits = forward(model, record.fork(Full()), ids, torch.cat([mask, new], dim=1), logits=ids.shape[1])
    return Reference(batch, logits)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    cache: CompressedCache | QuantizedCache,
    mask: Tensor,
    batch: list[Prompt],
    prefilled: Prefilled,
    stepwise: bool = False,
    reference: Reference | None = None,
) -> Run:
    """Feeds what was held back, then decodes or scores; mask [B, T] of the prefix.

    stepwise: a selector is at work; it chooses at each decode step, so targets are scored on single steps.
    """
    started = time.perf_counter()
    if task.kind == "generate":
        outcomes = _converse(model, tokenizer, task, cache, mask, batch)
    else:
        chunk = 1 if stepwise else getattr(task, "chunk", None)
        known = batch if reference is None else reference.batch
        outcomes = _teacher_forced(model, cache, mask, known, chunk, reference)
    finals = [outcome.pop("finals") for outcome in outcomes]
    checks = {}
    late = hasattr(task, "trace") or getattr(task, "chunk", None) is not None  # prompts may be within the budget
    if stepwise and isinstance(cache, CompressedCache):
        # What a selector chooses by is not read where it does not choose, which alone makes what is read less.
        chose = any(layer.read is not None for layer in cache.policy_layers())
        checks["fired"] = chose and any(read < held for held, _, read in finals)
    elif late and isinstance(cache, CompressedCache):
        packs = [p for p in cache.policy.policies if not isinstance(p, Full)]
        dense = cache.policy_layers()[0].kv.keys.dtype.itemsize / 2
        checks["fired"] = not packs or any(held < dense * full for held, full, _ in finals)
    decode_seconds = time.perf_counter() - started
    rows = [
        {
            "sample_id": prompt.sample.sample_id,
            "prompt_sha256": prompt.sha256,
            **outcome,
            "n_prompt_tokens": len(prompt.prefix) + (0 if prompt.target else len(prompt.held_back)),
            "kept_tokens": prefilled.kept[i],
            "kv_bytes_prefill_end": prefilled.nbytes[i],
            "kv_bytes_final": finals[i][0],
            "kv_bytes_read_final": finals[i][2],
            "kv_bytes_full": prefilled.full_nbytes[i],
            "kv_bytes_full_final": finals[i][1],
            "kv_bytes_peak": max(prefilled.nbytes[i], outcome["kv_bytes_peak"]),
            "prefill_s": (prefilled.prefill_seconds + prefilled.compress_seconds) / len(batch),
            "decode_s": decode_seconds / len(batch),
            "meta": dict(prompt.sample.meta) | {"length": prompt.sample.length},
        }
        for i, (prompt, outcome) in enumerate(zip(batch, outcomes, strict=True))
    ]
    return Run(rows, checks, seconds=prefilled.compress_seconds + decode_seconds)


# -- a known text ----------------------------------------------------------------------------------------------------


def _teacher_forced(
    model: PreTrainedModel,
    cache: CompressedCache | QuantizedCache,
    mask: Tensor,
    batch: list[Prompt],
    chunk: int | None,
    reference: Reference | None,
) -> list[dict[str, Any]]:
    ids, new = left_pad([p.held_back for p in batch], model.device)
    targets, _ = left_pad([p.target for p in batch], model.device)
    mask = torch.cat([mask, new], dim=1)
    before, skipped = mask.shape[1] - ids.shape[1], ids.shape[1] - targets.shape[1]
    columns: list[list[Tensor]] = [[] for _ in batch]  # per row: [3 or 1, tokens]
    peaks = [0] * len(batch)
    for begin in range(0, ids.shape[1], chunk or ids.shape[1]):
        part = ids[:, begin : begin + (chunk or ids.shape[1])]
        end = begin + part.shape[1]
        logits = forward(model, cache, part, mask[:, : before + end], logits=part.shape[1])
        first = max(begin, skipped)
        for i in range(len(batch)):
            if first < end:
                full = None if reference is None else reference.logits[i, first:end]
                columns[i].append(
                    _compared(logits[i, first - begin :], targets[i, first - skipped : end - skipped], full)
                )
        peaks = [max(peak, held) for peak, held in zip(peaks, _held_now(cache), strict=True)]
    outcomes = []
    for prompt, parts, now, peak in zip(batch, columns, bytes_now(cache, model), peaks, strict=True):
        scored = torch.cat(parts, dim=1)[:, -len(prompt.target) :].cpu()
        outcomes.append(
            {"prediction": "", "n_generated": 0, "finals": now, "kv_bytes_peak": peak}
            | (_perplexity(scored, prompt) if reference is None else _fidelity(scored))
        )
    return outcomes


def _compared(logits: Tensor, target: Tensor, full: Tensor | None) -> Tensor:
    """[1, T]: -log p of the targets [T] by logits [T, V]; with those of the full cache [4, T]: that, -log p there,
    the divergence KL(full || this), and whether both find the same token likeliest."""
    likely = logits.float().log_softmax(-1)
    nll = -likely.gather(1, target[:, None])[:, 0]
    if full is None:
        return nll[None]
    expected = full.float().log_softmax(-1)
    divergence = (expected.exp() * (expected - likely)).sum(-1)
    agree = likely.argmax(-1) == expected.argmax(-1)
    return torch.stack([nll, -expected.gather(1, target[:, None])[:, 0], divergence, agree.float()])


def _perplexity(scored: Tensor, prompt: Prompt) -> dict[str, Any]:
    nll = scored[0].double().mean().item()
    in_bytes = len(prompt.sample.references[0].encode())
    bits = nll * len(prompt.target) / (math.log(2) * in_bytes)
    return {"score": math.exp(-nll), "nll": nll, "details": {"bits_per_byte": bits}}


def _fidelity(scored: Tensor) -> dict[str, Any]:
    """Bins end at position 1, 2, 4, ... of the scored text, and at its end."""
    nll, full_nll, divergence, agree = scored.double()
    tokens = len(nll)
    ends = [2**i for i in range(tokens.bit_length()) if 2**i < tokens] + [tokens]
    bins = [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]
    details = {
        "kl": divergence.mean().item(),
        "nll_difference": (nll - full_nll).mean().item(),
        "bins": ends,
        "kl_bins": [divergence[b].mean().item() for b in bins],
        "agreement_bins": [agree[b].mean().item() for b in bins],
        "n_scored": tokens,
    }
    return {"score": agree.mean().item(), "nll": nll.mean().item(), "details": details}


# -- answers ---------------------------------------------------------------------------------------------------------


class _Writer:
    """What one row writes at one turn."""

    def __init__(self, task: Task, sample: Sample, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> None:
        self.sample = sample
        self.tokens: list[int] = []  # without the end of text
        self.unfed: list[int] = []  # those that the cache has not seen when the answer is done
        self.done = self.truncated = False
        self.held: list[int] = []  # bytes, after each step
        self.now = (0, 0, 0)  # `bytes_now` when the answer was done
        self.likelihoods: list[float] = []  # log p of each choice
        self._choices = sample.choice_tokens(tokenizer)
        self._tokenizer, self._ends = tokenizer, ends
        self._temperature, self._top_p = getattr(task, "temperature", 0.0), getattr(task, "top_p", 1.0)
        self._dice = rng_for(getattr(task, "seed", 0), sample.sample_id, sample.query, "dice")
        # What may not come before min_new_tokens: the end, and the tokens that a stop text ends with.
        self._banned = [*ends, *(encode(tokenizer, stop)[-1] for stop in sample.stop)]
        self._window = 8 + max(map(len, sample.stop), default=0)  # tokens at the end that can hold a new stop

    def choose(self, logits: Tensor) -> int:
        """The next token, by its logits [V]."""
        if len(self.tokens) < self.sample.min_new_tokens:
            logits = logits.index_fill(0, torch.tensor(self._banned, device=logits.device), -math.inf)
        if self._choices:
            likely = logits.float().log_softmax(-1)[self._choices]
            self.likelihoods = likely.tolist()
            return self._choices[int(likely.argmax())]
        if not self._temperature:
            return int(logits.argmax())
        likely, order = (logits.float() / self._temperature).softmax(-1).sort(descending=True, stable=True)
        total = likely.cumsum(0)
        nucleus = int((total - likely < self._top_p).sum())
        thrown = self._dice.random() * total[nucleus - 1]
        return int(order[min(int((total <= thrown).sum()), nucleus - 1)])

    def take(self, token: int) -> bool:
        """Adds a token and tells whether the answer is done."""
        sample = self.sample
        if token in self._ends:
            self.done = True
            return True
        self.tokens.append(token)
        recent = self.tokens[max(sample.min_new_tokens, len(self.tokens) - self._window) :] if sample.stop else []
        stopped = bool(recent) and any(stop in self._tokenizer.decode(recent) for stop in sample.stop)
        full = len(self.tokens) >= sample.max_new_tokens and not stopped
        self.truncated = full and not self._choices
        self.done = stopped or full
        if full:
            self.unfed = [token]  # else it completes a stop, which is no part of the history
        return self.done

    @property
    def text(self) -> str:
        """The answer, up to the first stop."""
        text = str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
        least = self._tokenizer.decode(self.tokens[: self.sample.min_new_tokens], skip_special_tokens=True)
        found = (text.find(stop, len(least)) for stop in self.sample.stop)
        return text[: min((at for at in found if at >= 0), default=len(text))]


def _converse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    cache: CompressedCache | QuantizedCache,
    mask: Tensor,
    batch: list[Prompt],
) -> list[dict[str, Any]]:
    """One answer per turn and row. Where a row has no question left it is fed pads, which change nothing."""
    history = getattr(task, "history", "gold")
    rounds = 1 + max(len(p.turns) for p in batch)
    feed = [p.held_back for p in batch]
    answers: list[list[_Writer]] = [[] for _ in batch]
    for turn in range(rounds):
        last = turn + 1 == rounds
        line = _copied(cache) if history == "none" and not last else cache
        ids, new = left_pad(feed, model.device)
        seen = torch.cat([mask, new], dim=1)
        logits = forward(model, line, ids, seen, logits=1)
        if history == "gold" and not last:
            line, mask = _copied(cache), seen
        asked = [p.at(turn) if turn <= len(p.turns) else None for p in batch]
        writers, seen = _generate(model, tokenizer, task, line, logits, seen, asked)
        if history == "own":
            mask = seen
        feed = []
        for i, prompt in enumerate(batch):
            question = prompt.turns[turn] if turn < len(prompt.turns) else None
            if i in writers:
                answers[i].append(writers[i])
            if question is None:
                feed.append([])
            else:
                said = {"gold": _gold(writers[i].sample, tokenizer), "own": writers[i].unfed, "none": []}[history]
                feed.append([*said, *question])
    return [_outcome(task, row, _second_call(model, tokenizer, task, row[0])) for row in answers]


def _second_call(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, first: _Writer
) -> _Writer | None:
    """What is said to `Sample.then`, if there is one."""
    if (sample := first.sample.second_call(first.text)) is None:
        return None
    ids, mask = left_pad([[token for part in sample.segments(tokenizer) for token in part]], model.device)
    cache = CompressedCache(model, Full())
    logits = forward(model, cache, ids, mask, logits=1)
    return _generate(model, tokenizer, task, cache, logits, mask, [sample])[0][0]


def _gold(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The right answer, as it stands in the history of the next question."""
    blank = " " if sample.answer_prefix and not sample.answer_prefix[-1].isspace() else ""
    return encode(tokenizer, blank + sample.references[0])


def _copied(cache: CompressedCache | QuantizedCache) -> CompressedCache | QuantizedCache:
    return cache.copy() if isinstance(cache, CompressedCache) else copy.deepcopy(cache)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    cache: CompressedCache | QuantizedCache,
    logits: Tensor,
    mask: Tensor,
    samples: Sequence[Sample | None],
) -> tuple[dict[int, _Writer], Tensor]:
    """Decodes the answers to all samples, of which logits [B, 1, V] are those of the first token.

    Rows that are done are fed pads. Returns the writers by row, and the mask [B, T] of what the cache has seen.
    """
    eos = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}
    writers = {i: _Writer(task, s, tokenizer, ends) for i, s in enumerate(samples) if s is not None}
    open_rows = list(writers)
    while open_rows:
        chosen, before = torch.zeros(len(samples), 1, dtype=torch.int64), open_rows
        for i in open_rows:
            chosen[i] = writers[i].choose(logits[i, -1])
        open_rows = [i for i in before if not writers[i].take(int(chosen[i]))]
        held = _held_now(cache)
        for i in before:
            writers[i].held.append(held[i])
        if len(open_rows) < len(before):
            now = bytes_now(cache, model)
            for i in before:
                writers[i].now = now[i]
        if open_rows:
            new = torch.zeros(len(samples), 1, dtype=mask.dtype)
            new[open_rows] = 1
            mask = torch.cat([mask, new.to(mask.device)], dim=1)
            logits = forward(model, cache, chosen.to(mask.device), mask, logits=1)
    return writers, mask


def _outcome(task: Task, row: list[_Writer], second: _Writer | None) -> dict[str, Any]:
    """What a row has written, at all its turns, and how good it is; of a second call, only that answer counts."""
    scored = row if second is None else [second]
    texts = [writer.text for writer in scored]
    scores = [task.score(writer.sample, text) for writer, text in zip(scored, texts, strict=True)]
    tokens = [token for writer in row for token in writer.tokens]
    held = [nbytes for writer in row for nbytes in writer.held]
    details: dict[str, Any] = {}
    if hasattr(task, "details"):
        details |= task.details(scored[0].sample, texts[0])
    if second is not None:
        details["first_answer"] = row[0].text
    if likelihoods := scored[0].likelihoods:
        details["choice_logp"] = likelihoods
    if hasattr(task, "history"):
        details |= {"turn_scores": scores, "turn_predictions": texts}
    if hasattr(task, "trace"):
        trace = [nbytes for writer in row for nbytes in writer.held[:: task.trace]]
        details |= {"repetition": repetition(tokens), "kv_bytes_mean": sum(held) / len(held), "kv_bytes_trace": trace}
    return {
        "prediction": texts[0],
        "score": sum(scores) / len(scores),
        "nll": None,
        "n_generated": len(tokens) + (0 if second is None else len(second.tokens)),
        "truncated": any(writer.truncated for writer in row),
        "finals": row[-1].now,
        "kv_bytes_peak": max(held),
        **({"details": details} if details else {}),
    }


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams that occurred before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _held_now(cache: CompressedCache | QuantizedCache) -> list[int]:
    """Per row: bytes held. Looked at after every step; waits once for each device."""
    return [held_nbytes(cache)] if isinstance(cache, QuantizedCache) else cache.row_nbytes().tolist()


def bytes_now(cache: CompressedCache | QuantizedCache, model: PreTrainedModel) -> list[tuple[int, int, int]]:
    """Per row: bytes held, bytes of the 16-bit full cache, bytes that the last forward read."""
    if isinstance(cache, QuantizedCache):
        held = held_nbytes(cache)
        return [(held, full_nbytes(cache, model), held)]
    parts = (cache.row_nbytes(), full_row_nbytes(cache), cache.row_read_nbytes())
    return list(zip(*(part.tolist() for part in parts), strict=True))


def full_row_nbytes(cache: CompressedCache) -> Tensor:
    """[B] bytes of a 16-bit cache that keeps every token of the row, full-attention layers."""
    return torch.stack([layer.seen.cpu() * full_token_nbytes(layer.kv) for layer in cache.policy_layers()]).sum(0)
