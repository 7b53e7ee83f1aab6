"""The lm-eval adapter: every request goes through the compressed cache, and with the full cache is what stock gives."""

import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import EntryPoint, version
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="the adapter needs kvbench[lm-eval]")
pytest.importorskip("accelerate", reason="the adapter needs kvbench[lm-eval]")
pytest.importorskip("wonderwords", reason="the word list comes with kvbench[bench]")

from lm_eval import simple_evaluate
from lm_eval.api import registry
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from kvbench import CompressedCache
from kvbench.answer import forward
from kvbench.lm_eval import KvbenchLM, main
from kvbench.policies import H2O, KIVI, Stack, StreamingLLM
from kvbench.tasks import Recall

ASSET = Path(__file__).resolve().parents[1] / "kvbench" / "assets" / "proving"
HARSH = StreamingLLM(budget=16)
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's own


@pytest.fixture(scope="module")
def proving():
    # float32: rounding must not hide what the cache does.
    return AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(ASSET)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """lm-eval's report on the machine takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="module")
def make(proving):
    model, tokenizer = proving
    return lambda policy, **options: KvbenchLM(model, policy, tokenizer=tokenizer, **options)


@pytest.fixture(scope="module")
def stock():
    # A model of its own: the adapter sets the attention of the one it gets.
    model = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32).eval()
    return HFLM(model, tokenizer=AutoTokenizer.from_pretrained(ASSET), batch_size=2)


@pytest.fixture(scope="module")
def samples(proving):
    return [s for length in (144, 176) for s in Recall(length=length, needles=2, count=2).samples(proving[1])]


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory):
    """Three local tasks on the same prompts, as lm-eval's YAML files: generation, multiple choice, whole documents."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"prompt": s.prompt, "answer": s.references[0], "choices": [s.references[0], "11 22 33"]} for s in samples]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": "json", "kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder)}}
    shared = {"dataset_path": data["path"], "dataset_kwargs": data["kwargs"], "test_split": "test"}
    tasks = {
        "kvbench_generate": {
            "output_type": "generate_until",
            "doc_to_text": "{{prompt}}",
            "doc_to_target": " {{answer}}",
            "generation_kwargs": {"until": [" ."], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match"}],
        },
        "kvbench_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}],
        },
        "kvbench_document": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{prompt}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **task}))  # JSON is YAML
    return folder


def evaluate(lm, folder, *tasks, **options):
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(lm, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)


def requests(kind, *arguments):
    return [Instance(kind, {}, a, i, metadata=("task", i, 1)) for i, a in enumerate(arguments)]


def likelihood_requests(samples):
    """Continuations of unlike lengths, of one context and of none, and one too long for the context."""
    pairs = [(s.prompt, c) for s in samples for c in (" " + s.references[0], " 11", " 11 22 33 44 55")]
    return requests("loglikelihood", *pairs, ("", samples[0].prompt[:80]), (samples[0].prompt, samples[1].prompt[:200]))


def log_likelihoods(lm, samples):
    return [x for x, _ in lm.loglikelihood(likelihood_requests(samples), disable_tqdm=True)]


def documents(samples, letters=300):
    return requests("loglikelihood_rolling", *((s.prompt[: letters * (i + 1)],) for i, s in enumerate(samples)))


def prompts_of(lm):
    return sorted((row["kind"], row["prompt_sha256"]) for row in lm.rows)


def test_tasks_go_through_the_cache_on_the_same_prompts(make, folder):
    tasks = ["kvbench_generate", "kvbench_choice", "kvbench_document"]
    lms = {"full": make("Full()", batch_size=4), "harsh": make(HARSH, batch_size=4)}
    results = {name: evaluate(lm, folder, *tasks) for name, lm in lms.items()}
    full, harsh = results["full"], results["harsh"]
    assert full["results"]["kvbench_generate"]["exact_match,none"] == 1
    assert full["results"]["kvbench_choice"]["acc,none"] == 1
    assert harsh["results"]["kvbench_generate"]["exact_match,none"] == 0
    bits = [r["results"]["kvbench_document"]["bits_per_byte,none"] for r in (full, harsh)]
    assert bits[1] > bits[0] * 1.05
    assert prompts_of(lms["full"]) == prompts_of(lms["harsh"])
    for task in tasks:
        hashes = [[s["prompt_hash"] for s in r["samples"][task]] for r in (full, harsh)]
        assert hashes[0] == hashes[1]
        responses = [[s["resps"] for s in r["samples"][task]] for r in (full, harsh)]
        assert all(a != b for a, b in zip(*responses, strict=True))
    told = {name: r["config"]["kvbench"] for name, r in results.items()}
    assert told["harsh"]["policy"] == str(HARSH) and told["harsh"]["requests"] == len(lms["harsh"].rows) == 16
    assert told["full"]["kv_bytes_share"] == 2  # float32 against 16 bits
    assert told["harsh"]["kv_bytes_share"] < 0.5 and told["harsh"]["kv_bytes_share_final"] < 0.5


def test_bytes_are_those_of_the_prompt_without_its_last_token(make, samples):
    lm = make(HARSH)
    lm.generate_until(requests("generate_until", (samples[0].prompt, {"until": [" ."], "max_gen_toks": 3})), True)
    (row,) = lm.rows
    tokens = len(lm.tok_encode(samples[0].prompt))
    assert row["n_prompt_tokens"] == tokens
    assert row["kv_bytes_full"] == (tokens - 1) * 4 * 2 * 2 * 64 * 2  # layers, keys and values, heads, head size, bytes
    assert row["kv_bytes_full_final"] == (tokens + 2) * 4 * 2 * 2 * 64 * 2  # the last new token is not fed
    assert row["kv_bytes_final"] == 16 * 4 * 2 * (2 * 64 * 4 + 2)  # positions: int32, shared by the two heads


def test_the_first_generated_token_feels_the_policy(make, samples):
    asked = requests("generate_until", *((s.prompt, {"until": [], "max_gen_toks": 1}) for s in samples))
    full, harsh = (make(policy).generate_until(asked, disable_tqdm=True) for policy in ("Full()", HARSH))
    assert [s.references[0].split()[0] for s in samples] == [text.strip() for text in full]
    assert all(a != b for a, b in zip(full, harsh, strict=True))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_full_cache_gives_what_stock_lm_eval_does(make, stock, samples, batch_size):
    lm = make("Full()", batch_size=batch_size)
    asked = requests("generate_until", *((s.prompt, {"until": [" ."], "max_gen_toks": 6}) for s in samples))
    assert lm.generate_until(asked, disable_tqdm=True) == stock.generate_until(asked, disable_tqdm=True)
    asked = likelihood_requests(samples)
    ours, theirs = (x.loglikelihood(asked, disable_tqdm=True) for x in (lm, stock))
    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in ours} == {True, False}
    asked = documents(samples)
    ours, theirs = (x.loglikelihood_rolling(asked, disable_tqdm=True) for x in (lm, stock))
    assert ours == pytest.approx(theirs, abs=1e-3)  # sums over hundreds of tokens


def test_truncation_and_windows_are_those_of_stock(make, samples):
    model = AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32).eval()
    stock = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(ASSET), max_length=100)
    lm = make("Full()", max_length=100)
    assert log_likelihoods(lm, samples) == pytest.approx(log_likelihoods(stock, samples), abs=1e-4)
    ours, theirs = (x.loglikelihood_rolling(documents(samples), disable_tqdm=True) for x in (lm, stock))
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_a_harsh_policy_changes_every_likelihood_that_has_a_context(make, samples):
    full, harsh = (log_likelihoods(make(policy), samples) for policy in ("Full()", HARSH))
    changed = [abs(a - b) > 1e-2 for a, b in zip(full, harsh, strict=True)]
    assert changed == [True] * 12 + [False, True]  # the empty context holds nothing to compress


@pytest.mark.parametrize(
    "policy",
    [
        "H2O(0.3) | KIVI(2, residual=32)",
        "StreamingLLM(0.3, block=64)",
        "AdaKV(base=KeyDiff(0.3))",
        "LAQ(0.3)",  # reads token ids, and drafts from the held-back one on
        "Quest(0.3, dense_layers=0)",  # a selector: one token at a time
    ],
)
def test_batches_change_nothing(make, samples, policy):
    alone, together = make(policy, batch_size=1), make(policy, batch_size=4)
    samples = samples[1:3]  # one of each length
    asked = requests("generate_until", *((s.prompt, {"until": [" ."], "max_gen_toks": 4}) for s in samples))
    assert alone.generate_until(asked, disable_tqdm=True) == together.generate_until(asked, disable_tqdm=True)
    asked = likelihood_requests(samples)[:-2]
    ours, theirs = ([x for x, _ in lm.loglikelihood(asked, disable_tqdm=True)] for lm in (alone, together))
    assert ours == pytest.approx(theirs, abs=1e-3)
    # What a selector keeps to choose by (`KV.side`) is as wide as the batch's longest row needs.
    column = "kv_bytes_full" if policy.startswith("Quest") else "kv_bytes_prefill_end"
    bytes_of = [sorted((row["prompt_sha256"], row[column]) for row in lm.rows) for lm in (alone, together)]
    assert bytes_of[0] == bytes_of[1]
    asked = documents(samples, letters=150)
    ours, theirs = (lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in (alone, together))
    assert ours == pytest.approx(theirs, abs=1e-2)


def test_sliding_window_layers(tiny):
    config = Qwen2Config(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=16, initializer_range=0.2, bos_token_id=0,
        layer_types=["sliding_attention", "full_attention"], eos_token_id=1, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokenizer = Qwen2ForCausalLM(config).eval(), tiny[1]
    pairs = [("to be or not to be " * n, c) for n in (1, 3, 4) for c in (" that", " that is the question")]
    asked = requests("loglikelihood", *pairs)
    stock = HFLM(model, tokenizer=tokenizer).loglikelihood(asked, disable_tqdm=True)
    lms = [KvbenchLM(model, policy, tokenizer=tokenizer, batch_size=n) for policy in ("Full()", HARSH) for n in (1, 4)]
    full, full_batched, harsh, harsh_batched = ([x for x, _ in lm.loglikelihood(asked, True)] for lm in lms)
    assert full == pytest.approx([x for x, _ in stock], abs=1e-4) == full_batched
    assert harsh == pytest.approx(harsh_batched, abs=1e-4) != full


def test_continuations_of_a_context_share_its_prefill(make, proving, samples):
    model, fed = proving[0], []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    context = len(proving[1].encode(samples[0].prompt)) - 1
    asked = requests("loglikelihood", *((samples[0].prompt, c) for c in (" 11", " 11 22", " 33 44", " 55")))
    for size, expected in ((1, [(1, 1), (1, 2), (1, 2), (1, 1)]), (2, [(2, 2), (2, 2)]), (8, [(4, 2)])):
        fed.clear()
        make("KIVI(2, residual=32)", batch_size=size).loglikelihood(asked, disable_tqdm=True)
        assert fed == [(1, context), *expected]
    hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7])
def test_rolling_likelihood_streams_the_document(make, proving, samples, chunk):
    model, tokenizer = proving
    text, policy = samples[0].prompt[:300], StreamingLLM(budget=12) | KIVI(2, residual=32)
    (got,) = make(policy, stream_chunk=chunk).loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), True)
    tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text)]])
    cache, expected = CompressedCache(model, policy), 0.0
    for start in range(0, tokens.shape[1] - 1, chunk):
        part = tokens[:, start : min(start + chunk, tokens.shape[1] - 1)]
        end = start + part.shape[1]
        likely = forward(model, cache, part, torch.ones(1, end, dtype=torch.int64), logits=part.shape[1]).log_softmax(
            -1
        )
        expected += float(likely.gather(2, tokens[:, start + 1 : end + 1, None]).sum())
    assert got == pytest.approx(expected, abs=1e-3)


def test_argument_strings_keep_their_commas(folder):
    policy = H2O(0.25, recent=8) | KIVI(bits=2, residual=32)
    text = 'pretrained=proving,policy="H2O(0.25, recent=8) | KIVI(bits=2, residual=32)",dtype=float32'
    lm = KvbenchLM.create_from_arg_string(text, {"batch_size": 2, "device": None})
    assert lm.policy == Stack((policy,)) and lm.model.dtype == torch.float32 and lm.batch_size == 2
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for arguments in (text.replace('"', ""), {"pretrained": "proving", "policy": str(policy), "dtype": "float32"}):
        results = simple_evaluate(
            "kvbench", arguments, tasks=["kvbench_choice"], task_manager=manager, bootstrap_iters=0, limit=1
        )
        assert results["config"]["kvbench"]["policy"] == str(policy)
        assert results["config"]["kvbench"]["kv_bytes_share"] < 1


def test_a_response_cache_belongs_to_one_policy(make, stock, folder, tmp_path):
    def run(lm, file="responses"):
        return evaluate(lm, folder, "kvbench_choice", use_cache=str(tmp_path / file))["samples"]["kvbench_choice"]

    first, again = make(HARSH), make(str(HARSH))
    resps = [s["resps"] for s in run(first)]
    assert [s["resps"] for s in run(again)] == resps
    assert len(first.rows) == 8 and not again.rows
    with pytest.raises(ValueError, match=r"holds the answers of StreamingLLM\(budget=16\).*use_cache=PATH-.*Full\(\)"):
        run(make("Full()"))
    assert [s["resps"] for s in run(make("Full()"), "others")] != resps
    run(stock, "stock")
    with pytest.raises(ValueError, match="holds the answers of another model than kvbench"):
        run(make(HARSH), "stock")


def test_a_policy_that_changes_nothing_is_pointed_out(make, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    for policy, warned in (("H2O(512)", True), ("Full()", False), (HARSH, False)):
        caplog.clear()
        lm = make(policy)
        lm.loglikelihood(requests("loglikelihood", ("the code for a " * 8, " 11")), disable_tqdm=True)
        lm.get_model_info()
        assert ("changed nothing" in caplog.text) == warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "H20(0.25)"}, "no policy named 'H20'"),
        ({"policy": 4}, "policy must be a policy or a text"),
        ({"batch_size": "auto"}, "batch_size=auto .*give a number"),
        ({"stream_chunk": 0}, "stream_chunk must be an int of at least 1 token, got 0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KvbenchLM("proving", **options)


# A release of lm-eval with plugins starts by noting their entry points under their names. The index of lm-eval's own
# tasks, and its report on the machine, which take seconds to make, are left out.
COMMAND = """
from functools import partial

import lm_eval.evaluator
import lm_eval.models
import lm_eval.tasks
from importlib.metadata import EntryPoint
from lm_eval.api.registry import model_registry
from kvbench.cli import main

lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
lm_eval.evaluator.add_env_info = lambda results: None
model_registry.register("kvbench", target=EntryPoint("kvbench", "kvbench.lm_eval:KvbenchLM", "lm_eval.models"))
main()
"""


def test_command_line(folder, tmp_path):
    command = [
        sys.executable, "-c", COMMAND, "lm-eval", "--model", "kvbench",
        "--model_args", "pretrained=proving,policy=H2O(0.25, recent=8)|KIVI(2, residual=32),dtype=float32",
        "--tasks", str(folder / "kvbench_choice.yaml"), "--limit", "1", "--output_path", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "kvbench_choice" in done.stdout
    (results,) = tmp_path.rglob("results_*.json")
    told = json.loads(results.read_text())["config"]["kvbench"]
    assert told["policy"] == "H2O(budget=0.25, recent=8) | KIVI(residual=32)" and told["kv_bytes_share"] < 1


def test_command_line_errors_are_one_line(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    task = str(folder / "kvbench_choice.yaml")
    with pytest.raises(SystemExit, match="^kvbench: no policy named 'H20' in kvbench.policies; there are: ") as error:
        main(["--model", "kvbench", "--model_args", "pretrained=proving,policy=H20(0.25)", "--tasks", task])
    assert "\n" not in str(error.value)

    def offline():
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", offline)
    with pytest.raises(
        SystemExit, match=r"^kvbench: Couldn't reach 'openai/gsm8k' on the Hub \(OfflineModeIsEnabled\)$"
    ):
        main(["--model", "kvbench", "--tasks", "gsm8k"])


def test_lm_eval_finds_the_model_by_itself(folder, tmp_path):
    """Literally `lm_eval --model kvbench`, for the releases of lm-eval that look for plugins."""
    if "entry_points" not in Path(registry.__file__).read_text():
        pytest.skip(f"lm-eval {version('lm-eval')} looks for no plugins: its pull request 4013 is not in it")
    command = [
        str(Path(sys.executable).with_name("lm_eval")), "--model", "kvbench",
        "--model_args", 'pretrained=proving,policy="H2O(0.25)|KIVI(2)",dtype=float32',
        "--tasks", str(folder / "kvbench_choice.yaml"), "--limit", "1", "--output_path", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("results_*.json")
    told = json.loads(results.read_text())["config"]["kvbench"]
    assert told["policy"] == "H2O(budget=0.25) | KIVI()" and told["kv_bytes_share"] < 1


def test_the_entry_point_is_the_model():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    (value,) = project["entry-points"]["lm_eval.models"].values()
    assert EntryPoint("kvbench", value, "lm_eval.models").load() is KvbenchLM
