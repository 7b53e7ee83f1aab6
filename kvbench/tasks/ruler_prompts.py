"""The words of RULER's prompts, read from the installed lm-eval package where they are kept, and repaired.

Official strings: https://github.com/NVIDIA/RULER/blob/main/scripts/data/synthetic/constants.py. lm-eval's copies differ
from them in three places, which are put right here: the answer prefixes of NIAH and QA have lost their leading blank
(that of NIAH is also split into a singular and a plural form), and that of variable tracking has two letters swapped.

lm-eval's sources are parsed, not imported: importing them starts downloads.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache

from kvbench.tasks.official import lm_eval_file
from kvbench.tasks.sample import ANSWER_PREFIX, NOTE, QUERY


@dataclass(frozen=True)
class Words:
    """What surrounds the text of one family: `before` and `after` it in the user's message, then the answer prefix."""

    before: str
    after: str
    answer_prefix: str

    def singular(self) -> Words:
        """The form for one value. Only the task's own words are changed, never a chat template around them."""
        parts = (self.before, self.after, self.answer_prefix)
        return Words(*(p.replace("Some", "A").replace("are all", "is").replace("are", "is") for p in parts))


def words(family: str) -> Words:
    """niah, vt, cwe, fwe or qa."""
    if family == "niah":
        template = _strings("niah_utils")["TEMPLATE"]
        prefix = next(p for p in _formats("prepare_niah") if p.endswith(" are") and "{query}" in p)
        prefix = " " + prefix
    elif family == "qa":
        template, prefix = (_strings("qa_utils")[name] for name in ("template", "answer_prefix"))
        prefix = " " + prefix
    else:
        template, prefix = (_strings(f"{family}_utils")[name] for name in ("template", "answer_prefix"))
        prefix = prefix.replace("assgined", "assigned")
    before, _, after = template.partition("{context}")
    return Words(before, after, prefix)


def package_words() -> Words:
    """The question of this package's own tasks, which the proving model was trained on."""
    return Words("", QUERY.replace("{key}", "{query}"), ANSWER_PREFIX.replace("{key}", "{query}"))


def needle(package: bool) -> str:
    """The sentence that states a value; takes type_needle_v, key and value."""
    return NOTE if package else _strings("prepare_niah")["NEEDLE"]


def noise() -> str:
    """The five sentences of the noise haystack."""
    return _strings("vt_utils")["noise"].strip()


def document() -> str:
    """The frame of a numbered document; takes i and document."""
    return _strings("qa_utils")["DOCUMENT_PROMPT"]


def _tree(module: str) -> ast.AST:
    return ast.parse(lm_eval_file("ruler", f"{module}.py"))


@cache
def _strings(module: str) -> dict[str, str]:
    """Every string constant of a module that is assigned to a name or a key."""
    found: dict[str, str] = {}
    for node in ast.walk(_tree(module)):
        pairs: list[tuple[object, ast.expr | None]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target.id, node.value) for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.Dict):
            pairs = [(k.value, v) for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)]
        for name, value in pairs:
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.setdefault(str(name), value.value)
    return found


@cache
def _formats(module: str) -> list[str]:
    """Every f-string of a module, as the text that `str.format` takes."""
    found = []
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.JoinedStr):
            names = [f"{{{ast.unparse(p.value)}}}" if isinstance(p, ast.FormattedValue) else p for p in node.values]
            found.append("".join(str(p.value) if isinstance(p, ast.Constant) else str(p) for p in names))
    return found
