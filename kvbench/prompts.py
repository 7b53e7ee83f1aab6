"""From a task to token ids, once: built when first asked for, then kept on disk.

A file of the folder holds the tokenized samples of one task for one tokenizer. Its name is a hash of all they depend
on: the task's class and fields, the contents of files that a field names, the tokenizer, how much context it and the
model have, the code of `kvbench.tasks` and the versions of the packages that it builds with. Rows that come through
`kvbench.tasks.source` are written down with it, and must still be the same. So a file is never out of date, only
unused: delete the folder whenever you like. Tasks from outside kvbench are built anew each time, as their code cannot
be followed.

A token takes four bytes in memory as on disk, where a list of Python's numbers takes 36: 500 prompts of 128k tokens
take 260 MB.

The folder is $KVBENCH_CACHE, or else kvbench in the user's cache folder (~/.cache on Linux).
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import os
import platform
import re
import sys
import zipfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from kvbench.answer import Prompt, Task, further_questions
from kvbench.tasks.chat import chat_frame
from kvbench.tasks.sample import Sample, Turn, encode
from kvbench.tasks.source import Read, noted

_log = logging.getLogger("kvbench")
_BUILDERS = ("transformers", "tokenizers", "numpy", "wonderwords", "nltk", "lm_eval", "datasets", "jieba")


def cache_folder() -> Path:
    """Where prepared prompts are kept."""
    if given := os.environ.get("KVBENCH_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        home = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        home = "~/Library/Caches"
    else:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "kvbench"


def prepare(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    query_aware: bool,
    context_limit: int | None,
    folder: Path | None = None,
) -> list[Prompt]:
    """The tokenized samples of a task, each checked to fit the model. folder: where to keep them; None: nowhere.

    context_limit: of the model; tasks that cut prompts to the context are told the smaller of it and the tokenizer's.
    """
    with _options_named(task):
        return _prepare(task, _limited(tokenizer, context_limit), query_aware, context_limit, folder)


def _limited(tokenizer: PreTrainedTokenizerBase, context_limit: int | None) -> PreTrainedTokenizerBase:
    if context_limit is None or context_limit >= tokenizer.model_max_length:
        return tokenizer
    limited = copy.copy(tokenizer)
    limited.model_max_length = context_limit
    return limited


@contextmanager
def _options_named(task: Task) -> Iterator[None]:
    """Errors that advise to set task.<field> also say what to write where `task.` cannot: for several tasks at once."""
    try:
        yield
    except ValueError as error:
        named = dict.fromkeys(re.findall(r"\btask\.([a-z_]+(?:\.[a-z_]+)*)", str(error)))
        if not named:
            raise
        options = " or ".join(f"++sizes.{type(task).__name__}.{field}=" for field in named)
        raise ValueError(f"{error} (for several tasks, or with a preset: {options})") from error


def _prepare(
    task: Task, tokenizer: PreTrainedTokenizerBase, query_aware: bool, context_limit: int | None, folder: Path | None
) -> list[Prompt]:
    if query_aware and getattr(task, "history", None) == "none":
        raise ValueError(f"task {task.name}: history=none asks one cache of the context alone: use query_aware=false")
    prompts = []
    for made in _tokenized(task, tokenizer, folder):
        context = made.context
        if task.kind != "generate" and made.target:  # a known text: its first token follows from the context's last
            tokens, new = context + made.target, 0
            prefix, held_back = tokens[: len(context) - 1], tokens[len(context) - 1 : -1]
        else:
            tokens, new = context + made.query + made.answer_prefix, made.sample.max_new_tokens
            cut = len(tokens) - 1 if query_aware or len(context) == len(tokens) else len(context)
            prefix, held_back = tokens[:cut], tokens[cut:]
            new += sum(map(len, made.turns)) + sum(turn.max_new_tokens for turn in made.sample.turns)
        name = made.sample.sample_id
        if not prefix:
            raise ValueError(f"{name}: empty prompt: there must be tokens to compress before the held-back ones")
        if context_limit is not None and len(tokens) + new > context_limit:
            raise ValueError(
                f"{name}: {len(tokens)} prompt tokens + {new} new ones exceed the model's context of {context_limit}; "
                f"use a smaller task.{_length_field(task)} or another model"
            )
        spans = zip(made.needle[::2], made.needle[1::2], strict=True)
        needle = tuple((begin, min(end, len(prefix))) for begin, end in spans if begin < len(prefix))
        prompts.append(Prompt(made.sample, prefix, held_back, made.target, needle, made.turns))
    if not prompts:
        raise ValueError(f"task {task.name} has no samples")
    return prompts


def _length_field(task: Task) -> str:
    """The field of a task that makes its prompts shorter; `length` may also be the name of a bin (LongBench v2)."""
    if (inner := getattr(task, "of", None)) is not None:
        return f"of.{_length_field(inner)}"
    names = "max_length", "limit", "length", "lengths", "prefix", "period", "shots"
    return next((name for name in names if hasattr(task, name)), "max_new_tokens")


@dataclass(frozen=True)
class Tokenized:
    """A sample's token ids before they are cut for one mode; needle: begin, end, begin, end, ..."""

    sample: Sample
    context: array[int]
    query: array[int]
    answer_prefix: array[int]
    target: array[int]
    needle: array[int]
    turns: tuple[array[int], ...]

    @property
    def pieces(self) -> list[array[int]]:
        return [self.context, self.query, self.answer_prefix, self.target, self.needle, *self.turns]

    @classmethod
    def of(cls, sample: Sample, pieces: Sequence[array[int]]) -> Tokenized:
        context, query, answer_prefix, target, needle, *turns = pieces
        return cls(sample, context, query, answer_prefix, target, needle, tuple(turns))


def _tokenized(task: Task, tokenizer: PreTrainedTokenizerBase, folder: Path | None) -> list[Tokenized]:
    key = None if folder is None else _key(task, tokenizer)
    if folder is None or key is None:
        return _build(task, tokenizer)[0]
    path = folder / f"{key}.npz"
    kept = _read(path)
    if kept is None:
        kept, reads = _build(task, tokenizer)
        _write(path, kept, reads)
    return kept


def _build(task: Task, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Tokenized], list[Read]]:
    """The samples, each with a note in meta["data"] of what was read for them all, and in meta["truncated_tokens"]."""
    built = []
    with noted() as reads:
        samples = task.samples(tokenizer)
    # Tasks of kvbench that cut prompts say how much; what others do is not known.
    whole = {"truncated_tokens": 0} if _is_ours(task) else {}
    data = {"data": sorted({read.origin for read in reads})} if reads else {}
    for sample in (replace(sample, meta={**whole, **sample.meta, **data}) for sample in samples):
        segments = sample.segments(tokenizer)
        sample.choice_tokens(tokenizer)  # refuses what this tokenizer cuts
        known = sample.references[0] if task.kind != "generate" and sample.references else ""
        target = encode(tokenizer, known)
        needle = [at for span in needle_tokens(sample, tokenizer, len(segments[0])) for at in span]
        lists = [*segments, target, needle, *further_questions(task, sample, tokenizer)]
        pieces = [array("i", ids) for ids in lists]
        # Through JSON, so that a sample is the same whether or not it was kept.
        built.append(Tokenized.of(_sample(json.loads(json.dumps(asdict(sample)))), pieces))
    return built, reads


def _is_ours(task: Task) -> bool:
    return type(task).__module__.startswith("kvbench.tasks.")


def needle_tokens(sample: Sample, tokenizer: PreTrainedTokenizerBase, context_tokens: int) -> list[tuple[int, int]]:
    """Which of a prompt's tokens hold what is asked for, as (begin, end); none where its meta does not say."""
    spans = sample.meta.get("needle_spans") or [sample.meta[k] for k in ("needle_span",) if k in sample.meta]
    if not spans or not tokenizer.is_fast:
        return []
    before = chat_frame(tokenizer, sample.thinking)[0] if sample.chat else ""
    text = tokenizer(before + sample.context, add_special_tokens=False, return_offsets_mapping=True)
    shift = context_tokens - len(text.input_ids)  # a BOS in front
    found = []
    for begin, end in ((a + len(before), b + len(before)) for a, b in spans):
        inside = [i for i, (a, b) in enumerate(text["offset_mapping"]) if a < end and b > begin]
        if inside:
            found.append((inside[0] + shift, inside[-1] + 1 + shift))
    return found


# -- on disk ---------------------------------------------------------------------------------------------------------


def _key(task: Task, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A hash of what the task's prompts depend on, or None where that cannot be known."""
    kind, backend = type(task), getattr(tokenizer, "backend_tokenizer", None)
    if not _is_ours(task) or not is_dataclass(task) or backend is None:
        return None
    values = {f.name: getattr(task, f.name) for f in fields(task)}
    named = {name: _contents(Path(value)) for name, value in values.items() if isinstance(value, str | Path) and value}
    return _hash(
        [kind.__module__, kind.__qualname__, {k: str(v) for k, v in values.items()}, named],
        [type(tokenizer).__name__, backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map],
        tokenizer.model_max_length,
        _code(),
    )


@lru_cache
def _code() -> str:
    """A hash of the code that builds prompts."""
    here = Path(__file__).resolve().parent
    sources = [Path(__file__), here / "corpus.py", *sorted((here / "tasks").rglob("*.py"))]
    # NLTK's data, if installed, find sentences; asked without importing NLTK, which takes seconds.
    roots = [*os.environ.get("NLTK_DATA", "").split(os.pathsep), "~", sys.prefix]
    roots += [f"{home}/{part}" for home in (sys.prefix, "/usr", "/usr/local") for part in ("share", "lib")]
    punkt = [str(p) for root in filter(None, roots) for p in _punkt_below(Path(root).expanduser())]
    code = [hashlib.sha256(p.read_bytes()).hexdigest() for p in sources]
    return _hash(code, [_version(p) for p in _BUILDERS], punkt)


def _punkt_below(root: Path) -> list[Path]:
    return [p for folder in (root, root / "nltk_data") for p in sorted(folder.glob("tokenizers/punkt_tab*"))]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _contents(path: Path) -> str:
    """A hash of a file, or of the names and contents of all files in a folder; empty if there is no such thing."""
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        parts = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    except OSError:
        return ""
    return _hash([(str(p.relative_to(path)), _contents(p)) for p in parts]) if parts else ""


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _write(path: Path, kept: list[Tokenized], reads: list[Read]) -> None:
    """All ids in one array, everything else as JSON; whole or not at all."""
    notes = {"samples": [asdict(made.sample) for made in kept], "reads": [[read, read.identity()] for read in reads]}
    pieces = [np.array(piece, dtype=np.int32) for made in kept for piece in made.pieces]
    file = io.BytesIO()
    np.savez_compressed(
        file,
        ids=np.concatenate(pieces) if pieces else np.zeros(0, np.int32),
        lengths=np.array([len(x) for x in pieces], dtype=np.int64),
        notes=np.frombuffer(json.dumps(notes).encode(), np.uint8),
    )
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(file.getbuffer())
        os.replace(temporary, path)
    except OSError as error:
        _log.warning("prompts are not kept: %s: %s", error.strerror or error, path.parent)


def _read(path: Path) -> list[Tokenized] | None:
    """What `_write` wrote, or None where there is nothing whole, or what it was read from has changed."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            ids, lengths, notes = file["ids"], file["lengths"], json.loads(file["notes"].tobytes())
        if any(Read(*read).identity() != was for read, was in notes["reads"]):
            return None
        pieces = [array("i", piece.tobytes()) for piece in np.split(ids, np.cumsum(lengths)[:-1])]
        kept, at = [], 0
        for sample in map(_sample, notes["samples"]):
            end = at + 5 + len(sample.turns)
            kept.append(Tokenized.of(sample, pieces[at:end]))
            at = end
        return kept
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        return None


def _sample(values: dict[str, Any]) -> Sample:
    """A sample from JSON."""

    def turn(of: dict[str, Any]) -> Turn:
        return Turn(**{**of, "references": tuple(of["references"])})

    lists = {name: tuple(values[name]) for name in ("references", "stop", "choices")}
    then = values["then"] and turn(values["then"])
    return Sample(**{**values, **lists, "turns": tuple(map(turn, values["turns"])), "then": then})
