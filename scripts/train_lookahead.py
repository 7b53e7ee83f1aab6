"""Train the soft tokens and adapters of LookaheadKV for a model: `kvbench/assets/lookahead/<name>/`.

    python scripts/train_lookahead.py                                              # the proving model
    python scripts/train_lookahead.py --resume                                     # from the last checkpoint in --work
    python scripts/train_lookahead.py --model FOLDER --data chat.jsonl --out OUT   # a line: {"prompt": "...", ...}

The model answers every prompt greedily, once. The attention that its answer pays to the prompt, a mean over the rows
of the answer, is the teacher; that of the soft tokens, read after the same prompt with the adapters on, the student:

    loss = mean over layers and query heads of KL(teacher || student)   (both normalised over the tokens of the prompt)

The model itself is frozen. Only rows of the answer and of the soft tokens are ever materialised, and gradients flow
through the rows of the soft tokens alone. Without --data, prompts are those of kvbench's own tasks with other seeds:
recall with the question, recall whose question comes only after the prompt, and plain documents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvbench import CompressedCache
from kvbench.cache import PolicyLayer
from kvbench.corpus import rng_for
from kvbench.policies import Full
from kvbench.policies.interface import Probe
from kvbench.probes import SHIPPED, Modules, known_probe, save_modules, soft_probe
from kvbench.tasks import Ppl, Recall
from kvbench.tasks.sample import encode

ROOT = Path(__file__).resolve().parents[1]
PROVING = ROOT / "kvbench" / "assets" / "proving"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCORED = ("q_proj", "k_proj")
"""Linears of the last layer that any score depends on."""
KINDS = ("asked", "unasked", "text")
LENGTHS = (256, 512, 1024, 2048)
TEXT_ANSWER = 32
TRAIN_SEED, MOST_PROMPTS = 1_000_003, 1_000_000
"""Seeds of prompts start here, far from those of the benchmark; each seed of a run has so many of its own."""


# ---------------------------------------------------------------- prompts and answers


def own_prompts(tokenizer: PreTrainedTokenizerBase, count: int, seed: int, lengths: Sequence[int]) -> Iterator[dict]:
    """Records as in --data, but of token ids: prompt, the forced beginning of the response, how it goes on and ends."""
    for i in range(count):
        rng, kind = rng_for(TRAIN_SEED + seed, "lookahead", i), KINDS[i % len(KINDS)]
        length = rng.choice(list(lengths))
        data_seed = TRAIN_SEED + seed * MOST_PROMPTS + i
        if kind == "text":
            task = Ppl(prefix=length, score_tokens=1, count=1, seed=data_seed)
            context, _, _ = task.samples(tokenizer)[0].segments(tokenizer)
            yield {"kind": kind, "prompt": context, "begin": [], "max_new_tokens": TEXT_ANSWER, "stop": []}
            continue
        needles = rng.choice([n for n in (1, 4, 8, 8, 16) if 24 * n < length])
        sample = Recall(length=length, needles=needles, count=1, seed=data_seed).samples(tokenizer)[0]
        context, query, prefix = sample.segments(tokenizer)
        tokens = [*context, *query, *prefix]
        # The benchmark holds the last token back; whoever just calls generate does not.
        cut = len(context) if kind == "unasked" else len(tokens) - rng.randrange(2)
        more = {"max_new_tokens": sample.max_new_tokens, "stop": list(sample.stop)}
        yield {"kind": kind, "prompt": tokens[:cut], "begin": tokens[cut:], **more}


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Iterator[dict]:
    """Lines of {"prompt": text} or {"prompt": text, "response": text}."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        record = json.loads(line)
        if not isinstance(record.get("prompt"), str):
            raise SystemExit(f'{path}, line {number}: expected {{"prompt": "...", "response": "..." if known}}')
        answer = encode(tokenizer, record.get("response", ""))[:max_new_tokens]
        new = 0 if answer else max_new_tokens
        yield {"prompt": list(tokenizer.encode(record["prompt"])), "begin": answer, "max_new_tokens": new, "stop": []}


@torch.no_grad()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[dict], path: Path, batch: int
) -> list[dict]:
    """Adds the greedy "response" to every record; those in `path`, a line each, are not made twice."""
    found: dict[str, list[int]] = {}
    if path.exists():
        found = {line["prompt"]: line["response"] for line in map(json.loads, path.read_text().splitlines())}
    weights = checksum(model)
    names = [hashlib.sha256(str([weights, r["prompt"], r["begin"]]).encode()).hexdigest()[:16] for r in records]
    missing = [(r, name) for r, name in zip(records, names, strict=True) if name not in found]
    missing.sort(key=lambda pair: (pair[0]["max_new_tokens"], len(pair[0]["prompt"])))  # little padding, few idle rows
    bar = tqdm(total=len(records), initial=len(records) - len(missing), desc="answers", mininterval=5)
    for part in (missing[at : at + batch] for at in range(0, len(missing), batch)):
        ids, mask = padded([[*r["prompt"], *r["begin"]] for r, _ in part], "left", model.device)
        new, grown = max(r["max_new_tokens"] for r, _ in part), ids
        if new:
            grown = model.generate(
                ids, attention_mask=mask, past_key_values=CompressedCache(model), max_new_tokens=new, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        for (record, name), row in zip(part, grown[:, ids.shape[1] :].tolist(), strict=True):
            response = cut_off(tokenizer, row[: record["max_new_tokens"]], record["stop"])
            found[name] = [*record["begin"], *response]
        unfinished = path.with_suffix(".part")
        unfinished.write_text("".join(json.dumps({"prompt": k, "response": v}) + "\n" for k, v in found.items()))
        os.replace(unfinished, path)
        bar.update(len(part))
    return [{**r, "response": found[name]} for r, name in zip(records, names, strict=True) if found[name]]


def checksum(model: PreTrainedModel) -> str:
    """Of a few numbers of every weight: tells models apart that differ by training alone."""
    parts = [p.flatten()[:64].float().cpu().numpy().tobytes() for p in model.parameters()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def cut_off(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: Sequence[str]) -> list[int]:
    """Up to the first end of sequence, which is left out, or the token that completes a stop string."""
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    ends = (n for n in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stop))
    return ids[: next(ends, len(ids))] if stop else ids


def padded(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, T], pads 0, and which are real [B, T] int64."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64, device=device)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row, device=device), 1
    return ids, mask


# ---------------------------------------------------------------- loss


@torch.no_grad()
def prefilled(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> CompressedCache:
    """An uncompressed cache that has read the prompts."""
    ids, mask = padded(prompts, "left", model.device)
    cache = CompressedCache(model, Full(), needs={"tokens": 1, "queries": 32})
    position = (mask.cumsum(1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=position, past_key_values=cache, logits_to_keep=1)
    return cache


def shares(layer: PolicyLayer, probe: Probe) -> Tensor:
    """How the probe's rows, averaged, spread their attention over the prompt: [B, Hq, S] float32, sums are 1."""
    read = layer.step(False, probe).probe_attention(layer.kv).sum(2)
    return read / read.sum(-1, keepdim=True).clamp(min=1e-20)


def teacher(cache: CompressedCache, responses: Sequence[Sequence[int]]) -> list[Tensor]:
    """Per layer, the shares of the rows of the real responses."""
    with torch.no_grad():
        ids, real = padded(responses, "right", cache.model.device)
        probes = known_probe(cache, ids, real.bool())
        return [shares(layer, probe) for layer, probe in zip(cache.policy_layers(), probes, strict=True)]


def divergence(target: Tensor, guess: Tensor) -> Tensor:
    """KL(target || guess) of rows [..., S], averaged over rows."""
    return (torch.xlogy(target, target) - target * guess.clamp(min=1e-20).log()).sum(-1).mean()


def loss_of(model: PreTrainedModel, modules: Modules, batch: Sequence[dict]) -> Tensor:
    cache = prefilled(model, [r["prompt"] for r in batch])
    targets = teacher(cache, [r["response"] for r in batch])
    probes = soft_probe(cache, modules)
    parts = zip(cache.policy_layers(), targets, probes, strict=True)
    return torch.stack([divergence(target, shares(layer, probe)) for layer, target, probe in parts]).mean()


# ---------------------------------------------------------------- training


def new_modules(model: PreTrainedModel, tokens: int, rank: int, alpha: float, seed: int) -> Modules:
    """Random soft tokens of the size of real ones; adapters that do nothing yet."""
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for name, linear in model.named_modules():
        wanted = SCORED if f".layers.{layers - 1}." in name else LINEARS
        if ".layers." in name and name.rpartition(".")[2] in wanted:
            down = torch.randn(rank, linear.in_features, generator=generator) / math.sqrt(linear.in_features)
            adapters[name] = (down, torch.zeros(linear.out_features, rank))
    if not adapters:
        raise SystemExit(f"{type(model).__name__} has no linear layers named {', '.join(LINEARS)}")
    embedding = model.get_input_embeddings().weight
    soft = torch.randn(tokens, embedding.shape[1], generator=generator) * embedding.float().std().item()
    leaf = lambda x: x.to(model.device).requires_grad_()  # noqa: E731
    return Modules(leaf(soft), {name: (leaf(a), leaf(b)) for name, (a, b) in adapters.items()}, rank, alpha)


def order(samples: Sequence[dict], batch: int, epoch: int, seed: int) -> list[list[dict]]:
    """The batches of one epoch in random order, prompts of like length together."""
    rng = random.Random(f"{seed}-{epoch}")
    mixed = sorted(rng.sample(samples, len(samples)), key=lambda r: len(r["prompt"]) // 64)
    batches = [mixed[i : i + batch] for i in range(0, len(mixed), batch)]
    return rng.sample(batches, len(batches))


def train(model: PreTrainedModel, samples: Sequence[dict], args: argparse.Namespace) -> tuple[Modules, dict]:
    modules = new_modules(model, args.tokens, args.rank, args.alpha, args.seed)
    leaves = [x for pair in modules.adapters.values() for x in pair]
    opt = torch.optim.AdamW([{"params": leaves, "top": args.lr}, {"params": [modules.tokens], "top": args.lr_tokens}])
    state: dict = {"step": 0, "seconds": 0.0, "log": []}
    checkpoint = args.work / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        loaded = torch.load(checkpoint, weights_only=True, map_location=model.device)
        if loaded.pop("model") != checksum(model):
            raise SystemExit(f"{checkpoint} was trained for other weights: start without --resume")
        for leaf, saved in zip([modules.tokens, *leaves], loaded.pop("leaves"), strict=True):
            leaf.data.copy_(saved)
        opt.load_state_dict(loaded.pop("opt"))
        state = loaded
    per_epoch = math.ceil(len(samples) / args.batch)
    steps = args.steps or per_epoch
    bar, recent = tqdm(total=steps, initial=state["step"], desc="train", mininterval=5), []
    begin, epoch, batches = time.time() - state["seconds"], -1, []
    while (step := state["step"]) < steps:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            batches = order(samples, args.batch, epoch, args.seed)
        loss = loss_of(model, modules, batches[step % per_epoch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([modules.tokens, *leaves], 1.0)
        warm = min(1.0, (step + 1) / max(1, steps // 30))
        for group in opt.param_groups:
            group["lr"] = group["top"] * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        opt.step()
        opt.zero_grad()
        recent.append(loss.item())
        state.update(step=step + 1, seconds=time.time() - begin)
        bar.update()
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            state["log"].append([step + 1, round(sum(recent) / len(recent), 4), round(state["seconds"])])
            bar.set_postfix(loss=state["log"][-1][1])
            part = checkpoint.with_suffix(".part")
            saved = [x.detach() for x in (modules.tokens, *leaves)]
            torch.save({"leaves": saved, "opt": opt.state_dict(), "model": checksum(model), **state}, part)
            os.replace(part, checkpoint)
            recent = []
    return modules, state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(PROVING), help="folder or name of the frozen model")
    parser.add_argument("--out", type=Path, help="finished modules; default: kvbench/assets/lookahead/<name of model>")
    parser.add_argument("--work", type=Path, help="answers and checkpoints; default: build/lookahead/<name of model>")
    parser.add_argument("--data", type=Path, help="jsonl of prompts, with or without responses; default: own prompts")
    parser.add_argument("--samples", type=int, default=3000, help="own prompts")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of own prompts")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of answers to --data")
    parser.add_argument("--tokens", type=int, default=32, help="soft tokens")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, help="default: one epoch")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the adapters")
    parser.add_argument("--lr-tokens", type=float, default=1e-3, help="of the soft tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--dtype", default="auto", help="of the frozen model; the proving model: float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    args = parser.parse_args()
    name = Path(args.model).name
    args.out = args.out or SHIPPED / name
    args.work = args.work or Path("build/lookahead") / name
    args.work.mkdir(parents=True, exist_ok=True)
    dtype = "float32" if args.dtype == "auto" and Path(args.model).resolve() == PROVING else args.dtype
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.data:
        records = list(read_prompts(args.data, tokenizer, args.max_new_tokens))
    else:
        own = own_prompts(tokenizer, args.samples, args.seed, args.lengths)
        records = list(tqdm(own, "prompts", args.samples, mininterval=5))
    samples = answers(model, tokenizer, records, args.work / "answers.jsonl", 4 * args.batch)
    modules, state = train(model, samples, args)
    options = ("rank", "alpha", "tokens", "batch", "lr", "lr_tokens", "seed")
    record = {key: getattr(args, key) for key in options} | {
        "model": name if Path(args.model).exists() else args.model,
        "data": args.data.name if args.data else "kvbench",
        "samples": len(samples),
        "steps": state["step"],
        "train_seconds": round(state["seconds"]),
        "log_fields": ["step", "loss", "seconds"],
        "log": state["log"],
    }
    save_modules(args.out, modules, model, record)
    size = (args.out / "modules.safetensors").stat().st_size
    print(f"{args.out}: {size:,} bytes, loss {state['log'][0][1]} -> {state['log'][-1][1]}")


if __name__ == "__main__":
    main()
