"""Full: the uncompressed cache, the reference every other policy is measured against."""

from dataclasses import dataclass

from kvbench.policies.interface import KV, Policy, Step


@dataclass(frozen=True)
class Full(Policy):
    """Keeps every slot in the model's dtype. `Full() | q` is `q` alone."""

    def __call__(self, kv: KV, step: Step) -> KV:
        return kv
