"""Prompts that stand only in the code of a benchmark: read from the official file, which is parsed and never run.

The file is looked for like data (`kvbench.tasks.source`), or fetched at a pinned commit, and refused if it is another.
What the installed package lm-eval has of a benchmark is read from its files (`lm_eval_file`).
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvbench.tasks.source import Url, load


@dataclass(frozen=True)
class OfficialFile:
    """A file of a benchmark's repository. digest: the beginning of its SHA-256."""

    benchmark: str
    repo: str
    commit: str
    path: str
    digest: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def parsed(self, source: str) -> ast.Module:
        remote = Url(f"https://raw.githubusercontent.com/{self.repo}/{self.commit}/{self.path}")
        (row,) = load(self.benchmark, (self.name,), remote, source=source)
        if not hashlib.sha256(row["text"].encode()).hexdigest().startswith(self.digest):
            raise ValueError(f"{self.benchmark}: {self.name} is not the official file, which is at {remote}")
        return ast.parse(row["text"])


def lm_eval_file(*parts: str) -> str:
    """The text of a file of lm-eval's tasks."""
    return lm_eval_path(*parts).read_text(encoding="utf-8")


def lm_eval_path(*parts: str) -> Path:
    """Where a file of lm-eval's tasks is; importing the package would take seconds, and start downloads."""
    spec = find_spec("lm_eval")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (file := Path(folder, "tasks", *parts)).is_file():
            return file
    name = "/".join(parts)
    raise ValueError(f"tasks/{name} is read from lm-eval >= 0.4.13: pip install 'kvbench[lm-eval]'")


def value_of(module: ast.Module, name: str) -> Any:
    """The literal that is assigned to a name, or is the default of an argument of this name."""
    return ast.literal_eval(next(node for found, node in _named(module) if found == name))


def template_of(module: ast.Module, name: str) -> str:
    """The f-string that is assigned to a name, as a template; see `template`."""
    return template(next(node for found, node in _named(module) if found == name))


def template(node: ast.expr) -> str:
    """A string, or an f-string, as a template for `str.format`: {self.question} there is {question} here."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value).rpartition(".")[2] + "}"
    return str(ast.literal_eval(node)).replace("{", "{{").replace("}", "}}")


def _named(module: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(module):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            yield node.target.id, node.value
        elif isinstance(node, ast.arguments):
            with_default = node.args[len(node.args) - len(node.defaults) :]
            yield from zip((argument.arg for argument in with_default), node.defaults, strict=True)
