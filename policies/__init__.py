"""Eviction and quantization policies: small, pure, stackable with `|`.

Every module of this package that defines a policy is found by itself: to add one, add its file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from kvbench.policies.interface import KV, BudgetError, Evictor, Mixed, Policy, Quantizer, Stack, Step, select

_FRAMEWORK = {"checkpoint", "interface", "store"}

POLICIES: dict[str, type[Policy]] = {}
for _module in sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _FRAMEWORK):
    _found = importlib.import_module(f"{__name__}.{_module}")
    for _name, _value in vars(_found).items():
        if isinstance(_value, type) and issubclass(_value, Policy) and _value.__module__ == _found.__name__:
            POLICIES[_name] = _value
globals().update(POLICIES)

__all__ = [
    *POLICIES,
    "KV",
    "POLICIES",
    "BudgetError",
    "Evictor",
    "Mixed",
    "Policy",
    "Quantizer",
    "Stack",
    "Step",
    "select",
]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):  # what Python itself looks for on a module
        raise AttributeError(name)
    # An AttributeError would be replaced by "cannot import name", without the list.
    raise ImportError(f"no policy named {name!r} in kvbench.policies; there are: {', '.join(POLICIES)}")
