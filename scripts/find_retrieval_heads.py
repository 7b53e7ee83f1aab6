"""Find the heads that must keep the whole cache: DuoAttention's gates for one model, written as JSON.

    python scripts/find_retrieval_heads.py                     # the proving model, into kvbench/assets/duo_attention/
    python scripts/find_retrieval_heads.py --model Qwen/Qwen3-0.6B --text book.txt --out qwen.json
    kvbench evict=duo_attention evict.pattern=$PWD/qwen.json ...

Every key-value head gets a gate alpha, and its queries read alpha * full + (1 - alpha) * streaming attention, which
sees sinks and a recent window only. The gates start at 1 and are all that is trained: the final hidden states at
questions about passkeys, spread over a long text, must stay what they are, and gates cost (mean alpha). The recipe is
that of Xiao et al., https://arxiv.org/abs/2410.10819, whose settings are the defaults for models other than ours.

A run that was cut off goes on with --resume; the result is the same.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from calibration import ROOT, load, write_json
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvbench import CompressedCache
from kvbench.corpus import rng_for, words
from kvbench.tasks.sample import (
    ANSWER_PREFIX,
    NOTE,
    QUERY,
    bos,
    draw_keys,
    draw_value,
    encode,
    haystack,
    largest,
    place,
)

NAME = "kvbench_gated"
BLOCK = 512
"""Queries at a time in streaming attention."""
DEPTHS = (0.05, 0.95)
WORDS_PER_PASSKEY = 32
NEEDLE = "\n\nPasskey number {number} of the archive is: {words}.\n\n"
QUESTION = "\n\nWhat is passkey number {number} of the archive? It is: "


# ---------------------------------------------------------------- attention


def streaming_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, sinks: int, recent: int) -> Tensor:
    """Attention [1, Hq, T, D] that sees the first `sinks` tokens and, besides itself, the `recent` newest.

    That is what a decoded token sees of a cache of sinks + recent slots. Work and memory grow with T, not its square.
    """
    out, tokens = [], query.shape[2]
    for start in range(0, tokens, BLOCK):
        stop, first = min(start + BLOCK, tokens), max(start - recent, 0)
        seen = torch.cat([torch.arange(min(sinks, first)), torch.arange(first, stop)]).to(query.device)
        distance = torch.arange(start, stop, device=query.device)[:, None] - seen
        allowed = (distance >= 0) & ((seen < sinks) | (distance <= recent))
        block = query[:, :, start:stop], key[:, :, seen], value[:, :, seen]
        out.append(F.scaled_dot_product_attention(*block, attn_mask=allowed, scale=scaling, enable_gqa=True))
    return torch.cat(out, 2)


class Gates(nn.Module):
    """The gates, alpha [layers, H], and the attention function that reads them while `on`.

    layers: the layers of the model that have gates: those whose cache kvbench compresses.
    """

    def __init__(self, layers: Sequence[int], heads: int, sinks: int, recent: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(len(layers), heads))
        self.row = {layer: row for row, layer in enumerate(layers)}
        self.sinks, self.recent, self.on = sinks, recent, False

    def forward(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if softcap is not None or s_aux is not None:
            raise ValueError("models with softcap or learned sinks are not supported")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        full, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        row = self.row.get(module.layer_idx)
        if not self.on or row is None:
            return full, None
        streaming = streaming_attention(query, key, value, scaling, self.sinks, self.recent).transpose(1, 2)
        alpha = self.alpha[row].repeat_interleave(query.shape[1] // key.shape[1])[:, None]  # [Hq, 1], float32
        return (alpha * full + (1 - alpha) * streaming).to(full.dtype), None


def gated(model: PreTrainedModel, sinks: int, recent: int) -> Gates:
    """Freezes the model and puts gates on it."""
    layers = [layer.index for layer in CompressedCache(model).policy_layers()]
    gates = Gates(layers, model.config.get_text_config(decoder=True).num_key_value_heads, sinks, recent)
    AttentionInterface.register(NAME, gates)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    model.requires_grad_(False)
    return gates.to(model.device)


# ---------------------------------------------------------------- data


def notes(tokenizer: PreTrainedTokenizerBase, rng: random.Random, length: int, count: int) -> tuple[list[int], int]:
    """Codes noted in generated text, then a question for each: token ids, and where the questions begin."""
    text = haystack(rng, length)
    keys = draw_keys(rng, count, rng.random() < 0.25, "".join(text))
    facts = [(key, draw_value(rng)) for key in keys]
    shares = sorted(rng.uniform(*DEPTHS) for _ in facts)
    asked: list[int] = []
    for key, value in rng.sample(facts, count):
        for part in (QUERY.format(key=key), ANSWER_PREFIX.format(key=key), f" {value} ."):
            asked += encode(tokenizer, part)

    def context(sentences: int) -> list[int]:
        spread = [
            (round(share * sentences), NOTE.format(key=k, value=v)) for share, (k, v) in zip(shares, facts, strict=True)
        ]
        return bos(tokenizer) + encode(tokenizer, place(text[:sentences], spread)[0])

    fit = largest(len(text), lambda n: len(context(n)) + len(asked) <= length)
    if fit < 0:
        raise ValueError(f"{length} tokens are too few for {count} notes and their questions; use fewer --passkeys")
    before = context(fit)
    return before + asked, len(before)


def passkeys(
    tokenizer: PreTrainedTokenizerBase, text: list[int], rng: random.Random, length: int, count: int
) -> tuple[list[int], int]:
    """Passkeys of random words in a stretch of `text`, then a question for each: ids, and where the questions begin."""
    needles, asked = [], []
    for number in range(1, count + 1):
        secret = " ".join(rng.choices(words().nouns, k=WORDS_PER_PASSKEY))
        needles.append(encode(tokenizer, NEEDLE.format(number=number, words=secret)))
        asked += encode(tokenizer, QUESTION.format(number=number)) + encode(tokenizer, secret)
    room = length - len(bos(tokenizer)) - sum(map(len, needles)) - len(asked)
    if room < 0:
        raise ValueError(f"{length} tokens are too few for {count} passkeys; use fewer --passkeys or longer texts")
    start = rng.randrange(len(text) - room + 1)
    ids, at = bos(tokenizer), start
    for needle, depth in zip(needles, sorted(rng.uniform(*DEPTHS) for _ in needles), strict=True):
        stop = start + int(depth * room)
        ids, at = ids + text[at:stop] + needle, stop
    ids = ids + text[at : start + room]
    return ids + asked, len(ids)


# ---------------------------------------------------------------- optimising


def rate(step: int, steps: int) -> float:
    """Share of the learning rate: up over the first fifth, down over the last, never below a tenth."""
    return min(1.0, max((step + 1) / (steps / 5), 0.1), max((steps - step) / (steps / 5), 0.1))


def losses(model: PreTrainedModel, gates: Gates, ids: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(mean squared change of the final hidden states of ids [1, T] from token `first` on, mean gate)."""
    gates.on = False
    with torch.no_grad():
        wanted = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, first:]
    gates.on = True
    got = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, first:]
    return (got.float() - wanted.float()).pow(2).mean(), gates.alpha.abs().mean()


def optimise(
    model: PreTrainedModel,
    gates: Gates,
    draw: Callable[[random.Random, int], tuple[list[int], int]],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Runs the steps that are still to do; returns the mean distance over the last 100, and the time taken."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    optimizer = torch.optim.AdamW([gates.alpha], lr=args.lr, weight_decay=0)
    state_file, done, seconds, distances = args.out.with_suffix(".state"), 0, 0.0, []
    if args.resume and state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=model.device)
        if changed := [name for name in SETTINGS if state["settings"][name] != settings[name]]:
            raise ValueError(
                f"{state_file} was made with other values of {', '.join(changed)}; use those, or remove it"
            )
        done, seconds, distances = state["step"], state["seconds"], state["distances"]
        gates.load_state_dict(state["gates"])
        optimizer.load_state_dict(state["optimizer"])
    begin = time.time() - seconds
    bar = tqdm(total=args.steps, initial=done, unit="step")
    for step in range(done, args.steps):
        rng = rng_for(args.seed, "retrieval heads", step)
        ids, first = draw(rng, rng.randint(args.min_length, args.max_length))
        distance, size = losses(model, gates, torch.tensor([ids], device=model.device), first)
        optimizer.zero_grad()
        (distance + args.reg * size).backward()
        optimizer.param_groups[0]["lr"] = args.lr * rate(step, args.steps)
        optimizer.step()
        with torch.no_grad():
            gates.alpha.clamp_(0, 1)
        distances = [*distances[-99:], distance.item()]
        bar.set_postfix(distance=f"{distance.item():.4f}", gates=f"{gates.alpha.mean().item():.3f}")
        bar.update()
        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            part = state_file.with_suffix(".part")
            state = {"settings": settings, "step": step + 1, "seconds": time.time() - begin, "distances": distances}
            torch.save({**state, "gates": gates.state_dict(), "optimizer": optimizer.state_dict()}, part)
            os.replace(part, state_file)
    bar.close()
    return {"distance": sum(distances) / len(distances), "seconds": round(time.time() - begin, 1)}


SETTINGS = ("model", "text", "sinks", "recent", "min_length", "max_length", "passkeys", "steps", "lr", "reg", "seed")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="proving", help="a Hub name, a folder, or proving")
    parser.add_argument("--text", help="a long text to hide passkeys in (UTF-8); not for proving, which has its own")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--sinks", type=int, help="of streaming attention [128; proving: 4]")
    parser.add_argument("--recent", type=int, help="of streaming attention [256; proving: 28]")
    parser.add_argument("--min-length", type=int, help="tokens of the shortest text [1000; proving: 256]")
    parser.add_argument("--max-length", type=int, help="tokens of the longest text [32000; proving: 1024]")
    parser.add_argument("--passkeys", type=int, help="in each text [10; proving: 8]")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--reg", type=float, default=0.05, help="weight of the mean gate in the loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="[float32 on a CPU, else bfloat16]")
    parser.add_argument("--checkpointing", action="store_true", help="trade time for memory in the backward pass")
    parser.add_argument("--save-every", type=int, default=50, help="steps between saved states")
    parser.add_argument("--resume", action="store_true", help="go on from the saved state beside --out")
    args = parser.parse_args(argv)
    ours = args.model == "proving"
    if ours and args.text is not None:
        parser.error("--text: the proving model reads generated text only")
    if not ours and (args.text is None or args.out is None):
        parser.error("--text and --out are needed for models other than proving")
    values = {"sinks": (128, 4), "recent": (256, 28), "min_length": (1000, 256), "max_length": (32000, 1024)}
    for name, (theirs, mine) in {**values, "passkeys": (10, 8)}.items():
        if getattr(args, name) is None:
            setattr(args, name, mine if ours else theirs)
    args.out = args.out or ROOT / "kvbench" / "assets" / "duo_attention" / "proving.json"
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    tokenizer, model = load(args)
    gates = gated(model, args.sinks, args.recent)
    if args.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # the other kind gives gradients to inputs of a layer only, gates are none
        model.train()  # transformers leaves checkpointing out in eval mode
    if args.text is None:
        draw = lambda rng, length: notes(tokenizer, rng, length, args.passkeys)  # noqa: E731
    else:
        text = encode(tokenizer, Path(args.text).read_text(encoding="utf-8"))
        if len(text) < args.max_length:
            raise ValueError(f"{args.text} has {len(text)} tokens, fewer than --max-length {args.max_length}")
        draw = lambda rng, length: passkeys(tokenizer, text, rng, length, args.passkeys)  # noqa: E731
    args.out.parent.mkdir(parents=True, exist_ok=True)
    ended = optimise(model, gates, draw, args)
    alpha = [[round(x, 6) for x in row] for row in gates.alpha.tolist()]
    found = {name: getattr(args, name) for name in SETTINGS}
    found |= {**ended, "layers": list(gates.row), "alpha": alpha}
    write_json(args.out, found)
    args.out.with_suffix(".state").unlink(missing_ok=True)
    for layer, row in zip(gates.row, alpha, strict=True):
        print(f"layer {layer:3d}  " + "  ".join(f"{x:.3f}" for x in row))


if __name__ == "__main__":
    main()
