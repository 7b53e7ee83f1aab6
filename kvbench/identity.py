"""Of which prompts, model, commit and device a cell's numbers are: cheap to know, so that others do not pass for these.

A cell is named by its configuration, which names data and models; what lies under a name may be replaced. Of a local
model only the ends of each weight file are read: training moves all weights.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kvbench.answer import Prompt
from kvbench.kernels.choice import chosen

_END = 2**20  # bytes of a weight file's beginning and end
_WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class Identity:
    """Fields of `kvbench.results.Provenance`; empty: not known, or does not apply."""

    prompts_sha256: str = ""
    model_sha256: str = ""
    model_revision: str = ""

    def differences(self, noted: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """What was noted and what is now, by field; what was not noted, or is not known now, is no other."""
        return {k: (was, now) for k, now in asdict(self).items() if now and (was := noted.get(k)) and was != now}


def identity(prompts: Sequence[Prompt], source: str, config: PreTrainedConfig) -> Identity:
    """source: what the model is loaded from. config: as loaded from there, so that it knows its commit on the Hub."""
    names = "".join(f"{p.sample.sample_id}:{p.sha256}\n" for p in prompts)
    local = model_sha256(Path(source)) if Path(source).is_dir() else ""
    revision = getattr(config, "_commit_hash", None) or ""
    return Identity(hashlib.sha256(names.encode()).hexdigest(), local, revision)


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """What runs a model here; further fields of `kvbench.results.Provenance`."""
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "commit": commit(),
        "versions": {
            "kvbench": version("kvbench"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        },
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else device,
        "backend": chosen(model.device),
    }


def commit() -> str:
    """The commit of the checkout kvbench runs from, "+" if it has changes; empty when it is installed otherwise."""
    try:
        here = Path(__file__).resolve().parent
        ask = ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def model_sha256(folder: Path) -> str:
    """Of a model's config.json, and of the name, size, beginning and end of each file of weights."""
    total = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(p for p in folder.iterdir() if p.suffix in _WEIGHTS):
        size = path.stat().st_size
        total.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            total.update(file.read(_END))
            file.seek(max(0, size - _END), os.SEEK_SET)
            total.update(file.read())
    return total.hexdigest()
