"""lm-eval with a compressed KV cache: the model "kvbench" for EleutherAI's lm-evaluation-harness.

    kvbench lm-eval --model kvbench --model_args pretrained=MODEL,policy="H2O(0.25)|KIVI(2)" --tasks gsm8k

    from kvbench.lm_eval import KvbenchLM
    results = lm_eval.simple_evaluate(model=KvbenchLM("MODEL", policy=H2O(0.25) | KIVI(2)), tasks=["gsm8k"])

Code: https://github.com/EleutherAI/lm-evaluation-harness (0.4.13), https://doi.org/10.5281/zenodo.12608602. Tasks,
prompts, truncation, stops and metrics are lm-eval's own; what differs from its model "hf" is what the cache holds:

- Generation: each prompt is prefilled exactly but for its last token and compressed; then generation begins with that
  token, so the first generated one feels the policy.
- Likelihood: stock lm-eval runs one forward over context and continuation, which no cache policy can touch. Here the
  context is prefilled exactly but for its last token and compressed, then its last token and the continuation are fed
  in one forward (token by token where a selector chooses what each step reads). All continuations of a context share
  its prefill. With an empty context there is nothing to compress.
- Rolling likelihood (perplexity of whole documents): windows as lm-eval cuts them; each is streamed through a cache of
  its own in chunks of `stream_chunk` tokens, and the policy acts after each chunk (a share of the prompt is then one of
  what was seen so far). With 1, every token is a decode step; shares would refer to the first token, so give tokens.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from lm_eval._cli.utils import key_val_to_dict
from lm_eval.api.registry import model_registry, register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kvbench.answer import bytes_now, forward, left_pad
from kvbench.cache import CompressedCache, signals
from kvbench.engine import exact_prefill
from kvbench.parse import parse
from kvbench.policies.interface import Policy, Selector, Stack

_MADE_BY = "kvbench"  # the entry of a response cache that says whose responses it holds

# A child of lm-eval's logger, which has the handler.
log = logging.getLogger("lm_eval.kvbench")


class Scored(NamedTuple):
    """A likelihood request: `prefix` is prefilled and compressed, `held_back` fed, which should predict `labels`.

    labels: as many as are held back; -1: not scored
    """

    number: int
    prefix: tuple[int, ...]
    held_back: list[int]
    labels: list[int]

    @property
    def context(self) -> tuple[int, ...]:
        """What continuations may share: the prefix, and the token that comes next, which drafts begin with."""
        return (*self.prefix, self.held_back[0])


class KvbenchLM(HFLM):
    """lm-eval's model "hf" whose every request goes through a `CompressedCache`.

    policy: a policy, or a text such as "H2O(0.25, recent=32) | KIVI(2)" (`kvbench.parse`); default: the full cache.
    stream_chunk: tokens from one compression to the next in rolling likelihood.
    pretrained: a model object, a Hub name, a folder, or "proving", the small model that comes with kvbench.
    All other arguments are those of "hf".

    rows: of every request, in the order they were run: sha256 of the prompt's token ids, and the cache's bytes, named
    as in kvbench's result cells ("final": when the longest answer of the batch was done). Responses that come from
    `use_cache` leave none; with several processes, each has its own. `get_model_info` sums them up, so take a new
    KvbenchLM for each run.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        policy: str | Policy = "Full()",
        stream_chunk: int = 64,
        device: str | None = None,
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        if not isinstance(policy, (str, Policy)):
            raise ValueError(f'policy must be a policy or a text such as "H2O(0.25)|KIVI(2)", got {policy!r}')
        if isinstance(stream_chunk, bool) or not isinstance(stream_chunk, int) or stream_chunk < 1:
            raise ValueError(f"stream_chunk must be an int of at least 1 token, got {stream_chunk!r}")
        if str(batch_size).startswith("auto"):
            raise ValueError(f"batch_size={batch_size} knows nothing of what a cache holds: give a number")
        self.policy = parse(policy) if isinstance(policy, str) else Stack((policy,))
        self.stream_chunk = stream_chunk
        self.rows: list[dict[str, Any]] = []
        if pretrained == "proving":
            pretrained = str(files("kvbench") / "assets" / "proving")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(pretrained, device=device, batch_size=batch_size, **options)
        cache = self._new_cache(self.policy)  # says at once what cannot be hooked
        self._has_windows = any(layer.is_sliding for layer in cache.layers)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> KvbenchLM:
        """Commas inside parentheses, brackets and quotes belong to a value, as on lm-eval's command line."""
        return cls.create_from_arg_obj(key_val_to_dict(arg_string), additional_config)

    # -- generation ----------------------------------------------------------------------------------------------

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        mask = generation_kwargs["attention_mask"]
        if context.shape[1] > 1:
            cache = self._prefilled(context[:, :-1], mask[:, :-1], context[:, -1])
            begun = bytes_now(cache, self.model)
        else:
            cache, begun = self._new_cache(self.policy), None
        out = super()._model_generate(context, max_length, stop, past_key_values=cache, **generation_kwargs)
        prompts = [row[real.bool()].tolist() for row, real in zip(context, mask, strict=True)]
        self._note("generate_until", [(tuple(prompt[:-1]), prompt[-1:], []) for prompt in prompts], cache, begun)
        return out

    # -- likelihood ----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding would give it) of each (strings, context ids, continuation ids).

        The windows of `loglikelihood_rolling` come without strings.
        """
        size = override_bs or int(self.batch_size)
        streamed = bool(requests) and requests[0][0] is None
        parts = [self._cut(i, context, target, streamed) for i, (_, context, target) in enumerate(requests)]
        results: dict[int, tuple[float, bool]] = {}
        bar = tqdm(
            total=len(parts), desc="Running loglikelihood requests", disable=disable_tqdm or streamed or self.rank != 0
        )
        for batch in self._batches(parts, size):
            if batch[0].prefix:
                scores = self._score_after_context(batch, size)
            else:
                scores = self._score_from_start(batch, streamed)
            for part, result in zip(batch, scores, strict=True):
                results[part.number] = result
                if (strings := requests[part.number][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, result)
                bar.update()
        bar.close()
        return [results[i] for i in range(len(parts))]

    def _cut(self, number: int, context: list[int], target: list[int], streamed: bool) -> Scored:
        """Left truncation as stock lm-eval's; all but the context's last token is the prefix."""
        fed = (context + target)[-(self.max_length + 1) :][:-1]
        cut = 0 if streamed else len(fed) - len(target)
        held_back = fed[cut:]
        return Scored(number, tuple(fed[:cut]), held_back, [-1] * (len(held_back) - len(target)) + target)

    def _batches(self, parts: list[Scored], size: int) -> Iterator[list[Scored]]:
        """Parts of like length together, all of one context in one batch: up to `size` parts, or one context's.

        Parts without a prefix share nothing, and are not mixed with others. Sliding-window layers count pads as tokens:
        for models that have some, what is held back is equally long in all of a batch, so that no pads stand before it.
        """

        def kind(part: Scored) -> tuple[int, bool]:
            return len(part.held_back) if self._has_windows else 0, bool(part.prefix)

        groups: dict[Any, list[Scored]] = {}
        for part in parts:
            groups.setdefault((kind(part), part.context if part.prefix else part.number), []).append(part)
        batch: list[Scored] = []
        for group in sorted(groups.values(), key=lambda g: (kind(g[0]), len(g[0].prefix), len(g[0].held_back))):
            if batch and (len(batch) + len(group) > size or kind(batch[0]) != kind(group[0])):
                yield batch
                batch = []
            batch += group
        if batch:
            yield batch

    def _score_after_context(self, batch: list[Scored], size: int) -> list[tuple[float, bool]]:
        """One result per part. Parts of one context share its prefill; at most `size` are scored at once."""
        contexts = list(dict.fromkeys(part.context for part in batch))
        ids, mask = left_pad([context[:-1] for context in contexts], self.model.device)
        next_token = torch.tensor([context[-1] for context in contexts], device=self.model.device)
        compressed = self._prefilled(ids, mask, next_token)
        results = []
        for start in range(0, len(batch), size):
            parts = batch[start : start + size]
            rows = torch.tensor([contexts.index(part.context) for part in parts], device=mask.device)
            cache = compressed.copy()
            if rows.tolist() != list(range(len(contexts))):
                cache.batch_select_indices(rows)
            begun = bytes_now(cache, self.model)
            longest = max(len(part.held_back) for part in parts)
            results += self._feed(cache, mask[rows], parts, self._step(longest))
            self._note("loglikelihood", [part[1:] for part in parts], cache, begun)
        return results

    def _score_from_start(self, batch: list[Scored], streamed: bool) -> list[tuple[float, bool]]:
        """One result per part: windows of rolling likelihood, or continuations of an empty context."""
        cache = self._new_cache(self.policy if streamed else self.policy.sharing)
        longest = max(len(part.held_back) for part in batch)
        mask = torch.zeros(len(batch), 0, dtype=torch.int64, device=self.model.device)
        results = self._feed(cache, mask, batch, self._step(self.stream_chunk if streamed else longest))
        self._note("loglikelihood_rolling" if streamed else "loglikelihood", [part[1:] for part in batch], cache)
        return results

    @torch.no_grad()
    def _feed(self, cache: CompressedCache, mask: Tensor, parts: list[Scored], step: int) -> list[tuple[float, bool]]:
        """Feeds what was held back, `step` tokens of each row at a time; mask [B, T] of what the cache has seen."""
        totals, greedy = [0.0] * len(parts), [True] * len(parts)
        for start in range(0, max(len(part.held_back) for part in parts), step):
            now = slice(start, start + step)
            ids, new_mask = left_pad([part.held_back[now] for part in parts], self.model.device)
            mask = torch.cat([mask, new_mask], dim=1)
            with self._autocast():
                logits = forward(self.model, cache, ids, mask, logits=ids.shape[1])
            for i, part in enumerate(parts):
                labels = torch.tensor(part.labels[now], dtype=torch.int64, device=logits.device)
                scored = labels >= 0
                likely = logits[i, ids.shape[1] - len(labels) :][scored]
                likely = likely.log_softmax(-1, dtype=self.softmax_dtype or torch.float32)
                totals[i] += float(likely.gather(1, labels[scored][:, None]).sum())
                greedy[i] &= bool((likely.argmax(-1) == labels[scored]).all())
        return list(zip(totals, greedy, strict=True))

    def _step(self, tokens: int) -> int:
        """How many tokens to feed at once: one where a selector is at work, as it chooses at each decode step."""
        return 1 if any(isinstance(p, Selector) for p in self.policy.policies) else tokens

    # -- the cache -----------------------------------------------------------------------------------------------

    def _new_cache(self, policy: Policy) -> CompressedCache:
        return CompressedCache(self.model, policy, tokenizer=self.tokenizer)

    @torch.no_grad()
    def _prefilled(self, ids: Tensor, mask: Tensor, next_token: Tensor) -> CompressedCache:
        """Prefills ids [B, T] and compresses. next_token [B]: the token of each prompt that is held back."""
        with self._autocast():
            if self.policy.block is not None:  # the prefill itself depends on the policy
                cache = self._new_cache(self.policy)
                forward(self.model, cache, ids, mask, logits=1)
                return cache
            needs = signals([self.policy])
            record = exact_prefill(self.model, self.tokenizer, self.policy.sharing, needs, ids, mask)
            record.next_token = next_token
            return record.fork(self.policy)

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    # -- what is told --------------------------------------------------------------------------------------------

    def _note(
        self,
        kind: str,
        prompts: Sequence[tuple[tuple[int, ...], list[int], list[int]]],
        cache: CompressedCache,
        begun: list[tuple[int, int, int]] | None = None,
    ) -> None:
        """One row per prompt (prefix, held back, labels). begun: `bytes_now` at the end of a prefill, if there was."""
        ended = bytes_now(cache, self.model)
        for prompt, at_first, at_last in zip(prompts, begun or ended, ended, strict=True):
            (held, full, _), (held_final, full_final, read_final) = at_first, at_last
            self.rows.append(
                {
                    "kind": kind,
                    "prompt_sha256": hashlib.sha256(str(prompt).encode()).hexdigest(),
                    "n_prompt_tokens": len(prompt[0]) + (len(prompt[1]) if kind == "generate_until" else 0),
                    "kv_bytes_prefill_end": held,
                    "kv_bytes_full": full,
                    "kv_bytes_final": held_final,
                    "kv_bytes_full_final": full_final,
                    "kv_bytes_read_final": read_final,
                }
            )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the `config` of its results; here also the policy, and what the cache held."""
        told: dict[str, Any] = {
            "policy": str(self.policy),
            "stream_chunk": self.stream_chunk,
            "requests": len(self.rows),
        }
        if self.rows:
            totals = {name: sum(row[name] for row in self.rows) for name in self.rows[0] if name.startswith("kv_bytes")}
            told |= {
                "kv_bytes_share": totals["kv_bytes_prefill_end"] / totals["kv_bytes_full"],
                "kv_bytes_share_final": totals["kv_bytes_final"] / totals["kv_bytes_full_final"],
                "kv_bytes_read_share_final": totals["kv_bytes_read_final"] / totals["kv_bytes_full_final"],
            }
            log.info(
                "%(policy)s: %(kv_bytes_share).3f of the bytes of a 16-bit full cache at the end of the prefill, "
                "%(kv_bytes_share_final).3f at the end, over %(requests)d requests",
                told,
            )
            untouched = min(told["kv_bytes_share"], told["kv_bytes_read_share_final"]) >= self.model.dtype.itemsize / 2
            if self.policy.policies and untouched:
                log.warning("%s changed nothing: the prompts are too short for it to act", self.policy)
        return {**super().get_model_info(), "kvbench": told}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """lm-eval keys its response cache by request alone: a file that holds another policy's answers is refused."""
        responses = cache_hook.dbdict
        if responses is not None:
            model = self.pretrained if isinstance(self.pretrained, str) else self.model.name_or_path
            ours = f"{self.policy}, stream_chunk={self.stream_chunk}, {model}, {self.model.dtype}"
            theirs = responses.get(_MADE_BY, "another model than kvbench") if len(responses) else ours
            if theirs != ours:
                raise ValueError(
                    f"this response cache holds the answers of {theirs}: give each policy a path of its own, for "
                    f"example use_cache=PATH-{hashlib.sha256(ours.encode()).hexdigest()[:8]} for {ours}"
                )
            responses[_MADE_BY] = ours
        super().set_cache_hook(cache_hook)


def main(arguments: Sequence[str]) -> None:
    """`kvbench lm-eval …`: lm-eval's own command line, which knows the model "kvbench" then."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *arguments]
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:  # OSError: no data, no model or no network
        sys.exit(f"kvbench: {(str(error) or repr(error)).splitlines()[0]}")


# Releases of lm-eval after 0.4.13 find the model by its entry point, and then must not meet it twice.
if "kvbench" not in model_registry:
    register_model("kvbench")(KvbenchLM)
