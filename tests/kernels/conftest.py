"""Fixtures of the kernel tests."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def compiled() -> Callable:
    """See compiled.py: compiled(kernel, signature, constexprs, capability, num_warps, num_stages) -> Compiled."""
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("compiled", Path(__file__).with_name("compiled.py"))
    assert spec is not None and spec.loader is not None
    sys.modules["compiled"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compiled
