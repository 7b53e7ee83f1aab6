"""Probes: forwards of tokens that never join the cache, for policies that ask what the answer will look at.

All of them read on forks of a cache that has just read its prompt, and the forks are thrown away: the cache itself
stays as it is, bit for bit. `run_probe` gives queries of drafted or learned tokens, `run_repeat` scores of a second
reading of the prompt.

Learned tokens are a folder of two files: `modules.safetensors`, the soft tokens [n, hidden] and a pair of low-rank
matrices for each adapted linear layer, and `modules.json`, which says for which model they were trained.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from kvbench.cache import CompressedCache, PolicyLayer
from kvbench.kernels.attention import probabilities
from kvbench.policies.full import Full
from kvbench.policies.interface import Draft, Probe, Repeat, SoftTokens

SHIPPED = Path(__file__).parent / "assets" / "lookahead"
NGRAM = 3
"""Longest run of newest tokens that is looked up."""
SINKS, CUE = 4, 8
"""When a chunk is read again: first tokens that share the softmax, and tokens of the chunk before that lead into it."""
BLOCK_ELEMENTS = 2**22
"""Most attention weights of a second reading held at a time."""


@torch.no_grad()
def run_probe(
    cache: CompressedCache, spec: Draft | SoftTokens, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Probe]:
    """The probe `spec` after the prompt that `cache` has just read: one per compressed layer."""
    if isinstance(spec, SoftTokens):
        return soft_probe(cache, load_modules(spec.path, cache.model))
    reader, ids, valid = _draft(cache, spec, tokenizer)
    return known_probe(cache, ids, valid) if spec.verify or reader is None else reader.probes(valid)


@torch.no_grad()
def run_repeat(cache: CompressedCache, spec: Repeat, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Tensor]:
    """Per compressed layer: the most attention each slot gets while its chunk is read again, [B, H, S] float32.

    A chunk follows the instruction and, from the second one on, the last `CUE` tokens of the chunk before. Weights are
    softmax rows over the first `SINKS` tokens, the slots of the chunk and what is being read; the maximum is over all
    tokens being read and the query heads of a group.
    """
    assert cache.token_ids is not None
    layers, rows = cache.policy_layers(), cache.token_ids
    lead = tokenizer.encode(spec.instruction, add_special_tokens=False) if tokenizer and spec.instruction else []
    lead = rows[0].new_tensor(lead)
    scores = [torch.zeros(layer.kv.keys.shape[:3], device=layer.kv.keys.tail.device) for layer in layers]
    for start in range(0, max(map(len, rows)), spec.chunk):
        stop = start + spec.chunk
        fed = [torch.cat([lead, row[max(0, start - CUE) : stop]]) if len(row) > start else row[:0] for row in rows]
        for layer, score, probe in zip(layers, scores, known_probe(cache, *_padded(fed, "right")), strict=True):
            _add_repeat(layer, score, probe, start, stop)
    return scores


def _add_repeat(layer: PolicyLayer, score: Tensor, probe: Probe, start: int, stop: int) -> None:
    """Writes the scores of the slots of tokens start..stop into `score` [B, H, S]."""
    batch, heads, _ = score.shape
    position = layer.kv.position.expand(batch, heads, -1)
    chunk = (position >= start) & (position < stop)
    read = chunk | ((position >= 0) & (position < SINKS))
    columns = read.flatten(0, 1).any(0).nonzero()[:, 0]
    own = torch.where(probe.valid, probe.position, -1)[:, None].expand(-1, heads, -1)
    key_position = torch.cat([torch.where(read, position, -1)[..., columns], own], 2)
    keys = torch.cat([layer.kv.keys.dense()[:, :, columns], probe.keys], 2)
    best = torch.zeros(batch, heads, len(columns), device=score.device)
    size = max(1, BLOCK_ELEMENTS // (batch * probe.queries.shape[1] * keys.shape[2]))
    for block in (slice(at, at + size) for at in range(0, probe.queries.shape[2], size)):
        weights = probabilities(
            probe.queries[:, :, block], keys, probe.position[:, block], key_position, **layer.geometry
        )[..., : len(columns)]
        weights = weights.masked_fill(~probe.valid[:, None, block, None], 0).unflatten(1, (heads, -1))
        best = torch.maximum(best, weights.amax((2, 3)))
    score[..., columns] = torch.where(chunk[..., columns], best, score[..., columns])


def known_probe(cache: CompressedCache, ids: Tensor, valid: Tensor | None = None) -> list[Probe]:
    """Queries of the tokens ids [B, n], read in one forward after the whole cache; valid [B, n] marks those that count.

    Where a row has fewer tokens they stand first: what follows them is read, too, but changes nothing before it. (Pads
    before them would count as tokens in the windows of sliding-window layers.)
    """
    reader = _Reader(cache.fork(Full()), cache.mask)
    reader.read(ids)
    return reader.probes(valid)


def soft_probe(cache: CompressedCache, modules: Modules) -> list[Probe]:
    """Queries of the soft tokens, read after the whole cache with the adapters on. Gradients reach the modules."""
    reader = _Reader(cache.fork(Full()), cache.mask)
    with modules.on(cache.model):
        reader.read(modules.tokens.to(cache.model.dtype).expand(len(reader.mask), -1, -1))
    return reader.probes()


class _Reader:
    """A cache to be thrown away that reads tokens and notes their queries and keys in every compressed layer."""

    def __init__(self, cache: CompressedCache, mask: Tensor | None, notes: bool = True) -> None:
        """mask [B, columns]: which of the tokens that `cache` has seen are real."""
        assert mask is not None, "the cache was not asked to note what it is fed"
        self.cache, self.mask = cache, mask
        self._noted: list[list[tuple[Tensor, Tensor]]] = []
        self._next = mask.sum(1, keepdim=True)  # [B, 1] position of the first token to be read
        for layer in cache.policy_layers() if notes else ():
            self._noted.append([])
            layer.attend = partial(_note, self._noted[-1], layer)  # type: ignore[method-assign]

    def read(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """One forward of ids [B, n] or embeddings [B, n, hidden]; pads stand left. Returns the last logits [B, V]."""
        new = self.mask.new_ones(tokens.shape[:2]) if valid is None else valid.to(self.mask.dtype)
        self.mask = torch.cat([self.mask, new], dim=1)
        position = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits = self.cache.model(
            **{"input_ids" if tokens.dim() == 2 else "inputs_embeds": tokens},
            attention_mask=self.mask, position_ids=position, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        ).logits  # fmt: skip
        return logits[:, -1]

    def probes(self, valid: Tensor | None = None) -> list[Probe]:
        """Everything read so far, none of it pads; valid [B, n] says what counts."""
        found = []
        for noted in self._noted:
            queries, keys = (torch.cat(parts, 2) for parts in zip(*noted, strict=True))
            real = torch.ones_like(queries[:, 0, :, 0], dtype=torch.bool) if valid is None else valid
            position = (self._next + torch.arange(real.shape[1], device=self._next.device)).to(queries.device)
            found.append(Probe(queries, keys, position, real.to(queries.device)))
        return found


def _note(
    noted: list[tuple[Tensor, Tensor]], layer: PolicyLayer, module: nn.Module, query: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    assert layer._pending is not None
    noted.append((query, layer._pending[0]))
    return type(layer).attend(layer, module, query, *args, **kwargs)


# -- drafts ----------------------------------------------------------------------------------------------------------


def _draft(
    cache: CompressedCache, spec: Draft, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[_Reader | None, Tensor, Tensor]:
    """(who drafted, ids [B, n], valid [B, n]).

    Whoever drafts, the first token is the one known to follow the prompt, so no row is ever without a draft. A row
    ends with its end-of-sequence token, which still counts.
    """
    assert cache.next_token is not None and cache.token_ids is not None
    first, reader = cache.next_token.to(cache.model.device), None
    if spec.by == "ngram":
        known = [torch.cat([ids, token[None]]) for ids, token in zip(cache.token_ids, first, strict=True)]
        ids, valid = _padded([torch.cat([ids[-1:], _lookup(ids, spec.tokens - 1)]) for ids in known], "right")
    else:
        if isinstance(spec.by, str):
            small = _small_model(spec.by, cache.model.device, cache.model.dtype)
            _check_vocabulary(spec.by, small, cache.model)
            prompt, real = _padded(cache.token_ids, "left")
            drafter = _Reader(CompressedCache(small), prompt.new_empty(len(prompt), 0), notes=False)
            drafter.read(prompt, real)
        else:
            drafter = reader = _Reader(cache.fork(spec.by), cache.mask)
        ids, valid = _greedy(drafter, first, spec.tokens, _stops(cache.model, tokenizer)), None
    ended = torch.isin(ids, _stops(cache.model, tokenizer).to(ids.device)).int()
    going = ended.cumsum(1) - ended == 0
    return reader, ids, going if valid is None else going & valid


def _greedy(reader: _Reader, token: Tensor, count: int, stops: Tensor) -> Tensor:
    """`token` [B] and the most likely ones after it, up to `count` or until all rows have stopped: [B, n]."""
    drafted, stopped = [], torch.zeros_like(token, dtype=torch.bool)
    while True:
        drafted.append(token)
        stopped |= torch.isin(token, stops.to(token.device))
        logits = reader.read(token[:, None])  # also after the last token: its queries are noted
        if len(drafted) == count or bool(stopped.all()):
            return torch.stack(drafted, 1)
        token = logits.argmax(-1)


def _lookup(ids: Tensor, count: int) -> Tensor:
    """Up to `count` tokens after the latest earlier occurrence of the newest tokens of ids [N], the longest found."""
    for size in range(min(NGRAM, len(ids) - 1), 0, -1):
        found = (ids[:-1].unfold(0, size, 1) == ids[-size:]).all(1).nonzero()
        if len(found):
            after = int(found[-1]) + size
            return ids[after : after + count]
    return ids[:0]


def _stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """Token ids that end a text."""
    stops = model.generation_config.eos_token_id if model.generation_config is not None else None
    every = [*(stops if isinstance(stops, list) else [stops]), tokenizer.eos_token_id if tokenizer else None]
    return torch.tensor(sorted({stop for stop in every if stop is not None}), dtype=torch.int64)


def _padded(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of ids, pads 0 on one side: [B, T], and which are real [B, T] bool."""
    real = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    ids, valid = (pad_sequence(list(x), batch_first=True, padding_side=side) for x in (rows, real))
    return ids, valid


@lru_cache(maxsize=2)
def _small_model(path: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return model.eval().to(device)


def _check_vocabulary(path: str, small: PreTrainedModel, model: PreTrainedModel) -> None:
    sizes = [x.config.get_text_config(decoder=True).vocab_size for x in (small, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the drafting model {path} has a vocabulary of {sizes[0]} tokens, but the model it drafts for has "
            f"{sizes[1]}; both must use the same tokenizer"
        )


# -- learned tokens --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Modules:
    """Soft tokens [n, hidden] and adapters: name of a linear layer -> (down [r, in], up [out, r])."""

    tokens: Tensor
    adapters: Mapping[str, tuple[Tensor, Tensor]]
    rank: int
    alpha: float

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """While inside, each adapted layer adds alpha / rank * up(down(x)) to what it gives."""

        def add(module: nn.Module, args: tuple[Tensor], out: Tensor, down: Tensor, up: Tensor) -> Tensor:
            x = args[0]
            return out + (x @ down.to(x.dtype).T @ up.to(x.dtype).T) * (self.alpha / self.rank)

        handles = [
            model.get_submodule(name).register_forward_hook(partial(add, down=down, up=up))
            for name, (down, up) in self.adapters.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """What must agree between the model that modules were trained for and the one they are used with."""
    config = model.config.get_text_config(decoder=True)
    return {
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
    }


def save_modules(folder: Path, modules: Modules, model: PreTrainedModel, training: Mapping[str, Any]) -> None:
    """Writes bf16 weights, then the JSON that vouches for them; each file appears at once or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"tokens": modules.tokens}
    for name, (down, up) in modules.adapters.items():
        tensors |= {f"{name}.down": down, f"{name}.up": up}
    weights, part = folder / "modules.safetensors", folder / "modules.part"
    part.write_bytes(save({k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in tensors.items()}))
    about = {
        "format": 1,
        "model": fingerprint(model),
        "tokens": len(modules.tokens),
        "rank": modules.rank,
        "alpha": modules.alpha,
        "linears": list(modules.adapters),
        "sha256": hashlib.sha256(part.read_bytes()).hexdigest(),
        "training": dict(training),
    }
    os.replace(part, weights)
    part.write_text(json.dumps(about, indent=1) + "\n")
    os.replace(part, folder / "modules.json")


def load_modules(path: str, model: PreTrainedModel) -> Modules:
    """The modules at `path`, a folder or the name of shipped ones, on the model's device and in its dtype."""
    folder = next((f for f in (Path(path), SHIPPED / path) if (f / "modules.json").is_file()), None)
    if folder is None:
        shipped = sorted(f.parent.name for f in SHIPPED.glob("*/modules.json"))
        raise ValueError(
            f"no lookahead modules at {path!r}: give a folder that scripts/train_lookahead.py wrote, or one of the "
            f"shipped ones: {', '.join(shipped) or 'none yet'}"
        )
    about, tensors = _read_modules(folder, (folder / "modules.json").stat().st_mtime_ns)
    if about["model"] != fingerprint(model):
        raise ValueError(
            f"the lookahead modules in {folder} were trained for a model with {_words(about['model'])}, "
            f"but this one has {_words(fingerprint(model))}"
        )
    adapters = {}
    for name in about["linears"]:
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        down, up = tensors[f"{name}.down"], tensors[f"{name}.up"]
        if not isinstance(linear, nn.Linear) or linear.weight.shape != (up.shape[0], down.shape[1]):
            raise ValueError(
                f"the lookahead modules in {folder} adapt {name} [{up.shape[0]}, {down.shape[1]}], "
                "which this model does not have"
            )
        adapters[name] = tuple(x.to(linear.weight.device, model.dtype) for x in (down, up))
    tokens = tensors["tokens"].to(model.device, model.dtype)
    return Modules(tokens, adapters, about["rank"], about["alpha"])  # type: ignore[arg-type]


@lru_cache(maxsize=4)
def _read_modules(folder: Path, stamp: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Both files, checked against each other. `stamp`: a folder that was trained anew is read anew."""
    about, weights = json.loads((folder / "modules.json").read_text()), folder / "modules.safetensors"
    fields: dict[str, Any] = {
        "format": int, "model": dict, "tokens": int, "rank": int, "alpha": (int, float), "linears": list,
        "sha256": str, "training": dict,
    }  # fmt: skip
    wrong = [
        name for name, kind in fields.items()
        if not isinstance(about, dict) or not isinstance(about.get(name), kind) or isinstance(about[name], bool)
    ]  # fmt: skip
    if wrong:
        raise ValueError(f"{folder / 'modules.json'}: missing or of the wrong type: {', '.join(wrong)}")
    if about["format"] != 1 or about["rank"] < 1:
        raise ValueError(f"{folder / 'modules.json'}: format must be 1 and rank at least 1")
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != about["sha256"]:
        raise ValueError(f"{weights} is not the file that modules.json describes: train the modules again")
    tensors, hidden, rank = load_file(weights), about["model"].get("hidden_size"), about["rank"]
    shapes = {"tokens": lambda s: s == (about["tokens"], hidden)}
    for name in about["linears"]:
        shapes[f"{name}.down"] = lambda s: len(s) == 2 and s[0] == rank
        shapes[f"{name}.up"] = lambda s: len(s) == 2 and s[1] == rank
    bad = [name for name in {*shapes, *tensors} if name not in shapes or name not in tensors]
    bad += [name for name, fits in shapes.items() if name in tensors and not fits(tuple(tensors[name].shape))]
    if bad:
        raise ValueError(f"{weights}: missing, unknown or of the wrong shape: {', '.join(sorted(bad))}")
    return about, tensors


def _words(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in numbers.items())
