"""Rebuild the proving model from nothing: tokenizer, text, training, evaluation, `kvbench/assets/proving/`.

    python scripts/train_proving.py               # about an hour on two CPU cores
    python scripts/train_proving.py --resume      # continue from the last checkpoint in --work

With glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 in the environment keeps freed memory and saves a
sixth of the time or more.

A small Llama learns to look facts up: key-value notes in filler text, asked several at a time, the context growing from
128 to 2,048 tokens whenever recall passes a threshold. Only a quarter to a half of the positions is scored; answers
weigh ten times as much as text. From a random start recall stays at chance for a long time, until heads that look at
the previous token have formed; so two heads of the first layer start out as such (`look_back`), and are trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvbench.corpus import document, rng_for, words

ROOT = Path(__file__).resolve().parents[1]
ASSET = ROOT / "kvbench" / "assets" / "proving"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB, HEAD_DIM, THETA = 1536, 64, 1e5
STAGES = (128, 256, 512, 1024, 2048)
TOKENS_PER_BATCH, BATCHES_PER_STEP = 4096, 2
NUMBERS = tuple(f"{i:02d}" for i in range(100))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FRAME = "note : code for .", "question : which code for ?", "answer : code for ."


# ---------------------------------------------------------------- tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which " word" and " 47" are one token each; any other text falls back to bytes."""
    vocabulary = words()
    whole = [f" {w}" for w in (*vocabulary.nouns, *vocabulary.adjectives, *vocabulary.verbs, *NUMBERS)]
    frame = [word for line in FRAME for word in line.split()]
    text = whole * 50 + [f" {w}" for w in frame] * 50 + ["note", "question", "answer"] * 50
    text += [document(seed, 60, "tokenizer") for seed in range(200)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=20,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    split = [w for w in whole if len(tokenizer.encode(w, add_special_tokens=False).ids) != 1]
    if split:
        raise RuntimeError(f"raise VOCAB above {VOCAB}: {len(split)} words are not one token: {split[:5]}")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------- data


class Lessons:
    """Draws training sequences as token ids; the loss weight of every token comes with it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, documents: int = 1500) -> None:
        vocabulary = words()
        ids = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        one = lambda names: [ids(f" {name}")[0] for name in names]  # noqa: E731
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.nouns, self.adjectives = one(vocabulary.nouns), one(vocabulary.adjectives)
        self.verbs, self.numbers = one(vocabulary.verbs), one(NUMBERS)
        self.stop, self.every = ids(" .")[0], range(3, len(tokenizer))
        self.note, self.opening_note = ids(" note : code for"), ids("note : code for")
        self.ask, self.reply = ids("\nquestion : which code for"), [*ids(" ?\n"), *ids("answer : code for")]
        self.fact_len = len(self.note) + 2 + 3 + 1
        self.query_len = len(self.ask) + 2 + len(self.reply) + 2 + 3 + 1
        texts = [document(seed * 1_000_003 + i, 210, "train") for i in range(documents)]
        self.pool = [encoding.ids for encoding in tokenizer._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def keys(self, rng: random.Random, count: int) -> list[tuple[int, int]]:
        """Distinct (adjective, noun) ids; half of the draws come from a small grid, so that keys share their words."""
        if rng.random() < 0.5:
            return list(zip(rng.sample(self.adjectives, count), rng.sample(self.nouns, count), strict=True))
        side = 2
        while side * side < 1.5 * count:
            side += 1
        rows, columns = rng.sample(self.adjectives, side), rng.sample(self.nouns, side)
        return rng.sample([(a, n) for a in rows for n in columns], count)

    def facts(self, rng: random.Random, count: int) -> list[tuple[list[int], list[int]]]:
        return [(list(key), [rng.choice(self.numbers) for _ in range(3)]) for key in self.keys(rng, count)]

    def text(self, rng: random.Random, count: int) -> list[int]:
        """The first `count` ids of a document, cut after a sentence."""
        ids = rng.choice(self.pool)[:count]
        while ids and ids[-1] != self.stop:
            ids = ids[:-1]
        return ids

    def questions(self, rng: random.Random, length: int, text_weight: float) -> tuple[list[int], list[float]]:
        """Notes in filler, then questions with their answers; at times a run of arbitrary tokens stands in the filler.

        A token that never occurs in training is not neutral: as input it can draw all attention and break recall.
        """
        most = min((length - 1 - self.query_len) // (self.fact_len + 1), 64)
        count = min(most, rng.choice((1, 1, 2, 4, 8, 8, 8, 16, 32, rng.randint(1, most))))
        asked = min(count, 8, max(1, (length - 1 - count * self.fact_len) // self.query_len))
        asked = asked if rng.random() < 0.7 else 1
        room = length - 1 - count * self.fact_len - asked * self.query_len
        filler = self.text(rng, room if rng.random() < 0.85 else rng.randint(0, room))
        if filler and rng.random() < 0.2:
            at = rng.randrange(len(filler))
            filler[at : at + 32] = rng.choices(self.every, k=len(filler[at : at + 32]))
        facts = self.facts(rng, count)
        ends = [0, *(i + 1 for i, token in enumerate(filler) if token == self.stop)]
        places = sorted(rng.choice(ends) for _ in facts)
        ids, begin = [self.bos], 0
        for place, (key, value) in zip(places, facts, strict=True):
            ids += filler[begin:place]
            ids += [*(self.note if len(ids) > 1 else self.opening_note), *key, *value, self.stop]
            begin = place
        ids += filler[begin:]
        weights = [text_weight] * len(ids)
        for key, value in rng.sample(facts, asked):
            ids += [*self.ask, *key, *self.reply, *key, *value, self.stop]
            weights += [0.0] * (self.query_len - 4) + [1.0] * 3 + [0.1]
        return self.fill(rng, ids, weights, length, text_weight)

    def restated(self, rng: random.Random, length: int, text_weight: float) -> tuple[list[int], list[float]]:
        """Notes, then the same notes in another order: every second value is a lookup."""
        count = min((length - 1) // (2 * self.fact_len), 100, rng.choice((6, 8, 16, 32, 100)))
        facts = self.facts(rng, min(count, len(self.adjectives)))
        ids, weights = [self.bos], [0.0]
        for turn in range(2):
            for key, value in rng.sample(facts, len(facts)):
                ids += [*(self.note if len(ids) > 1 else self.opening_note), *key, *value, self.stop]
                weights += [0.0] * (self.fact_len - 4) + [1.0 * turn] * 3 + [0.0]
        return self.fill(rng, ids, weights, length, text_weight)

    def copied(self, rng: random.Random, length: int, text_weight: float) -> tuple[list[int], list[float]]:
        """A random segment over and over, from so few words that one word does not tell the next."""
        known = self.nouns + self.adjectives + self.verbs + self.numbers
        pool = rng.sample(known if rng.random() < 0.5 else self.every, rng.choice((12, 40, 200)))
        period = rng.randint(16, max(17, length // 2 - 1))
        segment = [rng.choice(pool) for _ in range(period)]
        ids = [self.bos, *(segment * (length // period + 1))][:length]
        return ids, ([0.0] * (period + 3) + [0.5] * length)[:length]

    def plain(self, rng: random.Random, length: int, text_weight: float) -> tuple[list[int], list[float]]:
        return self.fill(rng, [self.bos], [0.0], length, text_weight)

    def fill(
        self, rng: random.Random, ids: list[int], weights: list[float], length: int, text_weight: float
    ) -> tuple[list[int], list[float]]:
        while len(ids) < length:
            more = rng.choice(self.pool)
            ids = [*ids, self.eos, *more] if len(ids) > 1 else [*ids, *more]
        return ids[:length], (weights + [text_weight] * length)[:length]

    def batch(self, rng: random.Random, length: int, count: int, kinds: dict[str, float], text_weight: float) -> tuple:
        """ids [count, length] int64 and the weight of predicting each of them [count, length] float32."""
        drawn = rng.choices(list(kinds), list(kinds.values()), k=count)
        rows = [getattr(self, kind)(rng, length, text_weight) for kind in drawn]
        return torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])


def mixture(length: int) -> dict[str, float]:
    if length <= 128:
        return {"copied": 0.25, "restated": 0.30, "questions": 0.35, "plain": 0.10}
    return {"copied": 0.05, "restated": 0.12, "questions": 0.65, "plain": 0.18}


# ---------------------------------------------------------------- model


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    look_back(model)
    return model


@torch.no_grad()
def look_back(model: LlamaForCausalLM, frequencies: int = 10, strength: float = 1.1) -> None:
    """Start heads 0 and 1 of the first layer as readers of the token one and two places back.

    All embeddings share one constant component; the heads turn it into a query and a key whose product after rotation
    is the sum of cos(f * (distance - back)) over the fastest frequencies f, largest at distance = back.
    """
    half = HEAD_DIM // 2
    f = THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)[:frequencies]
    model.model.embed_tokens.weight[:, 0] = 0.16
    attention = model.model.layers[0].self_attn
    attention.k_proj.weight[:HEAD_DIM] *= 0.1
    attention.k_proj.weight[:frequencies, 0] = strength
    for head, back in enumerate((1, 2)):
        q = attention.q_proj.weight[head * HEAD_DIM : (head + 1) * HEAD_DIM]
        q *= 0.1
        q[:frequencies, 0] = strength * (f * back).cos()
        q[half : half + frequencies, 0] = -strength * (f * back).sin()


def final_states(weights: dict[str, Tensor], ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The Llama forward pass without cache, written out so that it compiles to few kernels: [batch, length, width]."""
    batch, length = ids.shape

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weights[name], 1e-6)

    x = F.embedding(ids, weights["model.embed_tokens.weight"])
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    for p in (f"model.layers.{i}." for i in range(layers)):
        h = norm(x, p + "input_layernorm.weight")
        q, k, v = (
            F.linear(h, weights[f"{p}self_attn.{n}_proj.weight"]).view(batch, length, -1, HEAD_DIM).transpose(1, 2)
            for n in "qkv"
        )
        group = q.shape[1] // k.shape[1]
        k, v = turn(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        o = F.scaled_dot_product_attention(turn(q), k, v, is_causal=True)
        x = x + F.linear(o.transpose(1, 2).reshape(batch, length, -1), weights[p + "self_attn.o_proj.weight"])
        h = norm(x, p + "post_attention_layernorm.weight")
        gate, up = F.linear(h, weights[p + "mlp.gate_proj.weight"]), F.linear(h, weights[p + "mlp.up_proj.weight"])
        x = x + F.linear(F.silu(gate) * up, weights[p + "mlp.down_proj.weight"])
    return norm(x, "model.norm.weight")


def rotation(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length)[:, None] * THETA ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def weighted_loss(
    weights: dict[str, Tensor], ids: Tensor, cos: Tensor, sin: Tensor, where: Tensor, target: Tensor, weight: Tensor
) -> Tensor:
    x = final_states(weights, ids, cos, sin).flatten(0, 1)[where]
    logits = F.linear(x, weights["model.embed_tokens.weight"]).float()
    return (F.cross_entropy(logits, target, reduction="none") * weight).sum() / weight.sum()


def scored(ids: Tensor, weight: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """A fixed number of positions to score: all answers first, then text at random. Returns where, target, weight."""
    target, weight = ids.roll(-1, 1).flatten(), weight.roll(-1, 1).clone()
    weight[:, -1] = 0
    weight = weight.flatten()
    order = (weight.ceil() * (weight > 0.45) * 2 + torch.rand(weight.shape) * (weight > 0)).argsort(descending=True)
    where = order[: int(share * len(order))]
    return where, target[where], weight[where]


def weights_in(model: LlamaForCausalLM, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: p.to(dtype) for name, p in model.named_parameters()}


@torch.no_grad()
def probe(model: LlamaForCausalLM, lessons: Lessons, length: int, seed: int, batches: int, dtype: torch.dtype) -> float:
    """Share of values whose three numbers are all predicted, on fresh sequences of this length."""
    rng, weights, right = rng_for(seed, "probe", length), weights_in(model, dtype), []
    cos, sin = rotation(length, dtype)
    for _ in range(batches):
        ids, weight = lessons.batch(rng, length, TOKENS_PER_BATCH // length, {"questions": 1.0}, 0.0)
        x = final_states(weights, ids, cos, sin)[:, :-1][weight[:, 1:] == 1]
        guess = F.linear(x, weights["model.embed_tokens.weight"]).argmax(-1)
        right.append((guess == ids[:, 1:][weight[:, 1:] == 1]).view(-1, 3).all(-1).float())
    return torch.cat(right).mean().item()


# ---------------------------------------------------------------- training


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


def schedule(step: int, progress: float, cooldown: float = 0.35) -> float:
    """Warm up over 50 steps, hold, then fall linearly to a fiftieth over the last `cooldown` share of the run."""
    return min(1.0, (step + 1) / 50, max(0.02, (1 - progress) / cooldown))


def save_checkpoint(path: Path, model: LlamaForCausalLM, opts: list, state: dict) -> None:
    part = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "opts": [o.state_dict() for o in opts], **state}, part)
    os.replace(part, path)


def shared_gradients(model: LlamaForCausalLM, extra: list[float]) -> list[float]:
    """Average the gradients, and a few numbers beside them, over all workers, so that every worker steps alike."""
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([*(g.flatten() for g in grads), torch.tensor(extra)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *parts, extras = flat.split([*(g.numel() for g in grads), len(extra)])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))
    return extras.tolist()


def train(rank: int, args: argparse.Namespace) -> None:
    """One of `args.workers` processes: each computes its share of every step's batches, all take the same steps."""
    torch.set_num_threads(max(1, args.threads // args.workers))
    dist.init_process_group("gloo", init_method=f"file://{args.rendezvous}", rank=rank, world_size=args.workers)
    tokenizer = build_tokenizer()
    torch.manual_seed(args.seed)
    model = build_model(tokenizer)
    opts = optimizers(model, args.lr)
    lessons = Lessons(tokenizer, args.seed)
    checkpoint = args.work / "checkpoint.pt"
    state = {"step": 0, "stage": 0, "seconds": 0.0, "log": []}
    if args.resume and checkpoint.exists():
        loaded = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(loaded.pop("model"))
        for opt, saved in zip(opts, loaded.pop("opts"), strict=True):
            opt.load_state_dict(saved)
        state = loaded
    torch.manual_seed(args.seed + 1000 * rank + state["step"])
    loss_of = torch.compile(weighted_loss, dynamic=False) if args.compile else weighted_loss
    dtype = DTYPES[args.dtype]
    begin, progress = time.time() - state["seconds"], state["step"] / args.steps
    bar = tqdm(total=args.steps, initial=state["step"], disable=rank > 0, mininterval=10)
    while progress < 1:
        step, length, total = state["step"], STAGES[state["stage"]], 0.0
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.lr * schedule(step, progress)
        rng = rng_for(args.seed, "lesson", step)
        row = length if rng.random() < 0.8 else rng.choice([s for s in STAGES if s <= length])
        for part in range(rank, BATCHES_PER_STEP, args.workers):
            rng = rng_for(args.seed, "batch", step, part)
            ids, weight = lessons.batch(rng, row, TOKENS_PER_BATCH // row, mixture(row), args.text_weight)
            where, target, weight = scored(ids, weight, 0.5 if row <= 128 else 0.25)
            loss = loss_of(weights_in(model, dtype), ids, *rotation(row, dtype), where, target, weight)
            (loss * args.workers / BATCHES_PER_STEP).backward()
            total += loss.item() * args.workers / BATCHES_PER_STEP
        seconds = time.time() - begin
        progress = max((step + 1) / args.steps, seconds / (60 * args.minutes))
        progress, total = shared_gradients(model, [progress, total])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        state.update(step=step + 1, seconds=seconds)
        bar.update()
        if (step + 1) % args.probe_every == 0 or progress >= 1:
            recall = torch.tensor(probe(model, lessons, length, args.seed + step + rank, batches=4, dtype=dtype))
            dist.all_reduce(recall)
            recall = recall.item() / args.workers
            state["log"].append([step + 1, length, round(total, 4), round(recall, 4), round(seconds)])
            if recall >= args.threshold and state["stage"] + 1 < len(STAGES):
                state["stage"] += 1
            if rank == 0:
                bar.set_description(f"length {length} loss {total:.3f} recall {recall:.3f}")
                print(time.strftime("%H:%M:%S"), *state["log"][-1], flush=True)
                save_checkpoint(checkpoint, model, opts, state)
    dist.destroy_process_group()


README = """# The proving model

A Llama of {parameters:,} parameters (4 layers, 4 query and 2 key-value heads of 64, trained on up to {length:,} tokens)
that kvbench trained itself, on text from its own generator (`kvbench/corpus.py`). It looks up codes in long contexts
and continues generated documents; it knows nothing else. It is here so that cache policies can be compared for real
without any download, and it loads like any model:

    AutoModelForCausalLM.from_pretrained("kvbench/assets/proving")

Two heads of its first layer were started as readers of the previous tokens and then trained like the rest; all other
weights started at random. The tokenizer has one token for each word of the generator and each number from 00 to 99,
and bytes for any other text.

`python scripts/train_proving.py` rebuilds everything in this folder; `training.json` is the log of the run that did.
How well the model does without compression stands in `results/proving/metrics.json` (`scripts/eval_proving.py`).
"""


def write(checkpoint: Path, folder: Path) -> None:
    """Turn a checkpoint into a folder that `from_pretrained` loads: bf16 weights, tokenizer, README."""
    tokenizer, state = build_tokenizer(), torch.load(checkpoint, weights_only=True)
    model = build_model(tokenizer)
    model.load_state_dict(state["model"])
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    length, parameters = STAGES[state["stage"]], sum(p.numel() for p in model.parameters())
    (folder / "README.md").write_text(README.format(parameters=parameters, length=length))
    record = {"steps": state["step"], "train_seconds": round(state["seconds"]), "trained_length": length}
    record["log_fields"] = ["step", "length", "loss", "recall", "seconds"]
    (folder / "training.json").write_text(json.dumps({**record, "log": state["log"]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSET, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("build/proving"), help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--minutes", type=float, default=1e6, help="finish in this time, even with fewer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--text-weight", type=float, default=0.1, help="loss weight of text against answers")
    parser.add_argument("--threshold", type=float, default=0.9, help="recall at which the context grows")
    parser.add_argument("--probe-every", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2, help="processes that share every step")
    fast = "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"
    parser.add_argument("--dtype", choices=DTYPES, default=fast, help="of the products; bfloat16 if the CPU has AMX")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --work")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--write-only", action="store_true", help="write the checkpoint in --work, without training")
    parser.add_argument("--evaluate", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.write_only:
        with tempfile.TemporaryDirectory() as folder:
            args.rendezvous = Path(folder) / "rendezvous"
            torch.multiprocessing.spawn(train, (args,), nprocs=args.workers)
    write(args.work / "checkpoint.pt", args.out)
    if args.evaluate:
        from eval_proving import evaluate

        evaluate(args.out, ROOT / "results" / "proving" / "metrics.json", seed=args.seed)


if __name__ == "__main__":
    main()
