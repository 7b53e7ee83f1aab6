"""Fixtures of the kernel tests."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def compiling() -> ModuleType:
    """compiled.py, which is no module that tests could import."""
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("compiled", Path(__file__).with_name("compiled.py"))
    assert spec is not None and spec.loader is not None
    sys.modules["compiled"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiled(compiling: ModuleType) -> Callable:
    """compiled(kernel, signature, constexprs, capability, num_warps, num_stages) -> Compiled; see compiled.py."""
    return compiling.compiled
