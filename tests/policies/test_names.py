"""Policies are found by themselves, and an unknown name lists them."""

import pytest

import kvbench.policies
from kvbench.policies import POLICIES, Policy


def test_unknown_name_lists_the_policies():
    with pytest.raises(ImportError, match="no policy named 'H20'.*H2O, H2OMask"):
        from kvbench.policies import H20  # noqa: F401
    assert not hasattr(kvbench.policies, "__wrapped__")


def test_every_policy_is_exported():
    assert {"Full", "Random", "StreamingLLM", "H2O", "KeyDiff", "SnapKV", "KIVI", "NVFP4", "FP8"} <= set(POLICIES)
    assert all(
        issubclass(policy, Policy) and getattr(kvbench.policies, name) is policy for name, policy in POLICIES.items()
    )
