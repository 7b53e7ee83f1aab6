"""After the compression: further turns, sampling, minimal lengths and stops, fidelity, known text in chunks."""

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import cache_utils

from kvbench import CompressedCache
from kvbench.answer import forward, left_pad
from kvbench.baselines import Baseline
from kvbench.engine import run_stacks
from kvbench.policies import FP8, H2O, KIVI, Full, KeyDiff, Quest, SnapKV, Stack, StreamingLLM
from kvbench.tasks import MultiQuery
from kvbench.tasks.sample import Sample, Turn

pytest.importorskip("wonderwords", reason="the word list comes with kvbench[bench]")

STACKS = [
    Stack(()),
    StreamingLLM(budget=0.25),
    H2O(budget=0.25) | KIVI(bits=4, residual=32),
    KeyDiff(budget=64) | FP8(),
]


@dataclass(frozen=True)
class Fixed:
    """Given samples; right is what begins with the reference."""

    given: tuple[Sample, ...]
    history: str = "gold"
    temperature: float = 0.0
    top_p: float = 1.0
    name: str = "fixed"
    kind: str = "generate"

    def samples(self, tokenizer):
        return list(self.given)

    def score(self, sample, prediction):
        return float(bool(sample.references) and prediction.startswith(sample.references[0]))


def sample(i=0, turns=(), **fields):
    context = "".join(chr(97 + (7 * i + 11 * j + j * j) % 26) for j in range(60 + 5 * i))
    return Sample(f"s{i}", "fixed", context, "?", "", ("xy",), 6, turns=turns, **fields)


TURNS = (Turn("again?", "", ("z",), 5), Turn("more?", "", ("ab",), 7), Turn("last?", "", ("q",), 3))


def of(runs):
    return [[(r["sample_id"], r["details"]["turn_predictions"], r["kv_bytes_final"]) for r in run.rows] for run in runs]


@pytest.mark.parametrize("history", ["gold", "own", "none"])
def test_turns_are_the_same_whatever_the_batch(tiny, history):
    """Rows have different numbers of turns and answers of different lengths; alone there are no pads between."""
    model, tokenizer = tiny
    given = (sample(0, TURNS), sample(1, TURNS[:1]), sample(2), sample(3, TURNS[1:], stop=("e",)))
    stacks = [*STACKS, Quest(budget=24, page=8)]
    together = run_stacks(model, tokenizer, Fixed(given, history), stacks, batch_size=4)
    alone = run_stacks(model, tokenizer, Fixed(given, history), stacks, batch_size=1)
    assert of(together) == of(alone)
    assert [len(r["details"]["turn_scores"]) for r in together[0].rows] == [4, 2, 1, 3]


@pytest.mark.parametrize("history", ["gold", "own", "none"])
def test_the_full_cache_answers_each_turn_as_a_fresh_prompt_would(tiny, history):
    model, tokenizer = tiny
    given = sample(0, TURNS, stop=("e",))
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    (run,) = run_stacks(model, tokenizer, Fixed((given,), history), [Full()])
    context = [tokenizer.bos_token_id, *ids(given.context)]
    told, (query, most) = [], ("?", 6)
    for turn, said in enumerate(run.rows[0]["details"]["turn_predictions"]):
        prompt = torch.tensor([context + told + ids(query)])
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=most, do_sample=False)
        new = out[0, prompt.shape[1] :].tolist()
        new = new[: min(new.index(end) if end in new else most for end in (tokenizer.eos_token_id, *ids("e")))]
        assert said == tokenizer.decode(new)
        if history == "own":
            told += [*ids(query), *new]
        elif history == "gold":
            told += [*ids(query), *ids(("xy", "z", "ab", "q")[turn])]
        if turn < 3:
            query, most = TURNS[turn].query, TURNS[turn].max_new_tokens


def test_a_copied_cache_goes_its_own_way(tiny):
    model, _ = tiny
    for stack in (Full(), H2O(budget=64) | KIVI(bits=4, residual=32), StreamingLLM(budget=40), Quest(48)):
        ids, mask = left_pad([list(range(5, 165)), list(range(40, 155))], model.device)
        one, never = CompressedCache(model, stack), CompressedCache(model, stack)
        with torch.inference_mode():
            for cache in (one, never):
                forward(model, cache, ids, mask, 1)
            other = one.copy()
            assert torch.equal(other.row_nbytes(), one.row_nbytes())
            for step in range(1, 12):
                mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
                a = forward(model, one, torch.tensor([[step], [9]]), mask, 1)
                b = forward(model, other, torch.tensor([[200 - step], [7]]), mask, 1)
                c = forward(model, never, torch.tensor([[step], [9]]), mask, 1)
                assert torch.equal(a, c) and not torch.equal(a, b)


def test_multi_request_needs_a_cache_of_the_context(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="history=none asks one cache of the context alone: use query_aware=false"):
        run_stacks(model, tokenizer, Fixed((sample(0, TURNS),), "none"), [Full()], query_aware=True)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no FP8 cache")
@pytest.mark.parametrize("history", ["gold", "own", "none"])
def test_baselines_take_turns(tiny, history):
    model, tokenizer = tiny
    (run,) = run_stacks(model, tokenizer, Fixed((sample(0, TURNS),), history), [Stack((Baseline("hf_fp8"),))])
    assert run.infeasible is None and len(run.rows[0]["details"]["turn_scores"]) == 4


def test_prompt_hash_covers_the_turns(tiny):
    model, tokenizer = tiny
    rows = [
        run_stacks(model, tokenizer, Fixed((sample(0, turns),), history), [Full()])[0].rows[0]["prompt_sha256"]
        for turns, history in (((), "gold"), (TURNS, "gold"), (TURNS[:1], "gold"))
    ]
    assert len(set(rows)) == 3


def test_multi_query_asks_for_distinct_keys(tiny):
    _, tokenizer = tiny
    task = MultiQuery(length=700, needles=5, queries=5, count=3)
    for drawn in task.samples(tokenizer):
        questions = [drawn, *drawn.turns]
        assert len({q.references for q in questions}) == len({q.query for q in questions}) == 5
        for question in questions:
            key = question.answer_prefix.removeprefix("answer : code for ")
            assert f"note : code for {key} {question.references[0]} ." in drawn.context
            assert question.query.endswith(f"\nquestion : which code for {key} ?\n")
    few = replace(task, queries=2).samples(tokenizer)
    assert few[0].turns[0].query == task.samples(tokenizer)[0].turns[0].query
    with pytest.raises(ValueError, match="queries=6: must be a number, 1 to 5"):
        replace(task, queries=6)
    with pytest.raises(ValueError, match="history='silver' is not one of gold, own, none"):
        replace(task, history="silver")


def test_query_aware_eviction_serves_the_first_question_and_not_the_others():
    """The finding of SCBench, in small, on the shipped model."""
    from kvbench.sweep import load_model

    model, tokenizer = load_model("proving", "proving", "float32")
    task = MultiQuery(length=512, needles=8, queries=4, count=8, seed=3)
    full, snap = run_stacks(model, tokenizer, task, [Full(), SnapKV(budget=64, window=8)], query_aware=True)
    by_turn = [torch.tensor([r["details"]["turn_scores"] for r in run.rows]).mean(0) for run in (full, snap)]
    assert by_turn[0].min() >= 0.8
    assert by_turn[1][0] - by_turn[1][1:].mean() >= 0.3
    assert snap.rows[0]["score"] == pytest.approx(sum(snap.rows[0]["details"]["turn_scores"]) / 4)
