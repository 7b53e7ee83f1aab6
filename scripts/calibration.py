"""What the scripts that calibrate share: their options, what the model reads, going on with --resume, the artifact."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvbench.corpus import document, rng_for
from kvbench.tasks.sample import bos, encode

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ("model", "text", "samples", "tokens", "seed", "dtype")
"""What the noted samples depend on."""


# ---------------------------------------------------------------- options


def options(description: str | None, kind: str) -> argparse.ArgumentParser:
    """Those that all have; `kind`: of the artifacts, a folder of kvbench/assets."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="proving", help="a Hub name, a folder, or proving")
    parser.add_argument("--text", type=Path, nargs="+", help="UTF-8 files or hub:NAME[:CONFIG]; default: generated")
    parser.add_argument("--out", type=Path, help=f"folder to write; default: kvbench/assets/{kind}/<name of model>")
    parser.add_argument("--work", type=Path, help=f"what is done so far; default: build/{kind}/<name of model>")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="[float32 on a CPU, else bfloat16]")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --work")
    return parser


def folders(args: argparse.Namespace, kind: str, shipped: Path, suffix: str = "") -> None:
    """Fills in --out and --work."""
    name = Path(args.model).name
    args.out, args.work = args.out or shipped / (name + suffix), args.work or Path("build") / kind / name


def load(args: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Fills in --dtype."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    source = ROOT / "kvbench" / "assets" / "proving" if args.model == "proving" else args.model
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, args.dtype)).to(device).eval()
    return AutoTokenizer.from_pretrained(source), model


# ---------------------------------------------------------------- what the model reads


def samples(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, scheme: str) -> list[list[int]]:
    """--samples lists of --tokens ids: windows of the texts, or the beginnings of generated documents of `scheme`."""
    first, found = bos(tokenizer), []
    if args.text:
        enough = 16 * args.samples * args.tokens  # letters: of data sets that never end
        ids = [i for path in args.text for i in encode(tokenizer, read(str(path), enough))]
        if len(ids) < args.tokens:
            raise ValueError(f"the texts have {len(ids)} tokens, fewer than --tokens {args.tokens}")
    for i in range(args.samples):
        rng = rng_for(args.seed, scheme, i)
        if args.text:
            start = rng.randrange(len(ids) - args.tokens + 1)
            row = first + ids[start : start + args.tokens]
        else:  # a sentence has more than five tokens
            row = first + encode(tokenizer, document(rng.randrange(2**32), args.tokens // 5 + 1, scheme))
        found.append(row[: args.tokens])
    return found


def read(text: str, enough: int) -> str:
    """A file, or, after "hub:", a data set NAME or NAME:CONFIG of the Hub or a folder: its column "text", as far as so
    many letters."""
    if not text.startswith("hub:"):
        return Path(text).read_text(encoding="utf-8")
    from datasets import load_dataset

    name, _, config = text.removeprefix("hub:").partition(":")
    rows = load_dataset(name, config or None, split="train", streaming=True)
    if "text" not in (rows.column_names or ["text"]):
        raise ValueError(f"{text} has no column named text; its columns are: {', '.join(rows.column_names)}")
    found, letters = [], 0
    for row in rows:
        found.append(row["text"])
        letters += len(row["text"])
        if letters >= enough:
            break
    return "\n".join(found)


# ---------------------------------------------------------------- what is noted of it


def same_settings(file: Path, old: dict[str, str], args: argparse.Namespace, names: Sequence[str] = SETTINGS) -> None:
    changed = [name for name in names if old.get(name) != str(getattr(args, name))]
    if changed:
        raise ValueError(f"{file} has other values of {', '.join(changed)}; use those, or start without --resume")


def begin(args: argparse.Namespace, names: Sequence[str] = SETTINGS) -> None:
    """Makes --work ready for one file a sample: empty, or, with --resume, of a run with the same settings."""
    if not args.resume:
        clear(args.work)
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / "settings.json"
    if file.exists():
        same_settings(file, json.loads(file.read_text()), args, names)
    file.write_text(json.dumps({name: str(getattr(args, name)) for name in names}))


def clear(work: Path) -> None:
    for file in (work / "settings.json", *work.glob("*_*.safetensors")):
        file.unlink(missing_ok=True)


def store(target: Path, tensors: dict[str, Tensor]) -> None:
    part = target.with_suffix(".part")
    save_file(tensors, part)
    os.replace(part, target)


def totals(
    args: argparse.Namespace, turns: int, add: Callable[[dict[str, Tensor], int], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `add` makes of what is noted so far, turn after turn; --work holds it after each."""
    file, found, done = args.work / "noted.safetensors", {}, 0
    if args.resume and file.exists():
        with safe_open(file, "pt") as noted:
            old = noted.metadata()
            same_settings(file, old, args)
            found, done = {name: noted.get_tensor(name) for name in noted.keys()}, int(old["done"])  # noqa: SIM118
    args.work.mkdir(parents=True, exist_ok=True)
    for turn in tqdm(range(done, turns), "samples", initial=done, total=turns, mininterval=5):
        found = add(found, turn)
        part = file.with_suffix(".part")
        save_file(found, part, metadata={name: str(getattr(args, name)) for name in SETTINGS} | {"done": str(turn + 1)})
        os.replace(part, file)
    return found


# ---------------------------------------------------------------- what is made of it


def write(
    file: Path, tensors: dict[str, Tensor], about: dict[str, Any], args: argparse.Namespace, names: Sequence[str],
    began: float,
) -> int:  # fmt: skip
    """See `write_artifact`; FILE.json also tells the model, the texts, and the options `names`."""
    calibration = {
        "model": Path(args.model).name if Path(args.model).exists() else args.model,
        "text": [path.name for path in args.text] if args.text else "kvbench.corpus",
        **{name: getattr(args, name) for name in names},
        "seconds": round(time.time() - began),
    }
    return write_artifact(file, tensors, about | {"calibration": calibration})


def write_artifact(file: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> int:
    """Writes FILE.safetensors, and FILE.json, which vouches for it; returns the bytes of the former."""
    data = save({name: x.contiguous() for name, x in tensors.items()})
    about = {"format": 1, **about, "sha256": hashlib.sha256(data).hexdigest()}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_bytes(data)
    os.replace(part, file.with_suffix(".safetensors"))
    write_json(file.with_suffix(".json"), about)
    return len(data)


def resumed(state_file: Path, settings: dict[str, Any], resume: bool, **empty: Any) -> dict[str, Any]:
    """The saved state of a search with these settings, or a new one; `seconds` is what it has taken so far.

    Raises ValueError where the saved one was made with other settings.
    """
    if not (resume and state_file.exists()):
        return {"settings": settings, "seconds": 0.0, **empty}
    state = json.loads(state_file.read_text())
    if changed := [name for name in settings if state["settings"][name] != settings[name]]:
        raise ValueError(f"{state_file} was made with other values of {', '.join(changed)}; use those, or remove it")
    return state


def write_json(path: Path, content: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
