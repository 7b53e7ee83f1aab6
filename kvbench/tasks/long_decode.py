"""Long answers: the cache fills while the model writes, and eviction acts on what it has written itself.

Gsm8k   grade-school problems (Cobbe et al., 2021, arXiv:2110.14168, https://github.com/openai/grade-school-math),
        asked as lm-evaluation-harness asks them: prompts, stops and extraction are read from the installed package
Math    competition problems whose answer stands in \\boxed{}: MATH-500 (Hendrycks et al., 2021, arXiv:2103.03874,
        the 500 of Lightman et al.) and AIME, graded as lm-evaluation-harness grades AIME
Recite  random words to be written again and again: what a small model can do for a thousand tokens

Budgets are best given in tokens: a share refers to the prompt, which is short. Every row notes whether the answer was
truncated, and in its details the share of repeated 4-grams (`repetition`: damaged models ramble), the mean of the bytes
held over all steps of decoding (`kv_bytes_mean`), and the bytes after every `trace` tokens (`kv_bytes_trace`); peak
bytes stand in the row. In older results mean and peak, too, are those of every `trace` tokens and of the end.

Deviations from lm-evaluation-harness: `fixed_shots`: gsm8k's examples are the first of the training set, not drawn anew
for each problem, so that all prompts share them (gsm8k_cot has fixed ones anyway). `segments`: the examples are the
context, the problem is the query. `boxed`: MATH-500 is graded as AIME, which looks into \\boxed{}. `chat_stops`: with a
chat template only the end of the reply ends an answer; the stops, words that a base model writes where it would ask the
next question, also stand in the reasoning of a chat model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from typing import TYPE_CHECKING, Any, ClassVar

from kvbench.corpus import rng_for, words
from kvbench.tasks.chat import wants_chat
from kvbench.tasks.official import lm_eval_file, lm_eval_path
from kvbench.tasks.sample import Sample, bos, check, encode
from kvbench.tasks.source import Hub, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GSM8K = "e53f048856ff4f594e959d75785d2c2d37b678ee"
GSM8K = {
    split: Hub("openai/gsm8k", "main", split, _GSM8K, file=f"main/{split}-00000-of-00001.parquet")
    for split in ("train", "test")
}
_MATH500 = "ff5b20257d8185524591543f8ff5993951537bb8"
MATH = {
    "math500": (
        Hub("HuggingFaceH4/MATH-500", revision=_MATH500, file="test.jsonl"),
        "hendrycks_math/hendrycks_math_algebra.yaml",
    ),
    "aime24": (Hub("Maxwell-Jia/AIME_2024", file="aime_2024_problems.parquet"), "aime/aime24.yaml"),
    "aime25": (Hub("math-ai/aime25", file="test.jsonl"), "aime/aime25.yaml"),
}


@dataclass(frozen=True)
class Gsm8k:
    """Score: the last number of the answer is right ("flexible-extract"); details: `strict`, that of the asked form.

    variant: "gsm8k" ("Question: ...", examples from the training set) or "gsm8k_cot" ("Q: ...", its 8 own examples)
    shots: examples; count: the first so many problems (None: all); chat: see `kvbench.tasks.chat`
    thinking: whether a chat model may think first (`kvbench.tasks.chat`): give it more max_new_tokens then
    max_new_tokens: 256 is lm-evaluation-harness's default
    """

    kind: ClassVar[str] = "generate"

    variant: str = "gsm8k"
    shots: int = 5
    count: int | None = None
    max_new_tokens: int = 256
    chat: str = "never"
    thinking: bool = False
    source: str = "auto"
    path: str | None = None
    trace: int = 32
    name: str = ""

    def __post_init__(self) -> None:
        if self.variant not in ("gsm8k", "gsm8k_cot"):
            raise ValueError(f"variant={self.variant!r} is not one of gsm8k, gsm8k_cot")
        check("shots", self.shots, 0, 8)
        _check_run(self.count, self.max_new_tokens, self.trace)
        object.__setattr__(self, "name", self.name or self.variant)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        settings = self._settings
        shown = settings.get("fewshot_config", {}).get("samples")
        if shown is None and self.shots:
            shown = _rows(self, "gsm8k", "train", GSM8K["train"])
        ask = _template(settings["doc_to_text"])
        shots = [f"{ask(row)} {row.get('target') or row['answer']}\n\n" for row in (shown or [])[: self.shots]]
        chat, samples = wants_chat(self.chat, tokenizer), []
        for i, row in enumerate(_rows(self, "gsm8k", "test", GSM8K["test"])[: self.count]):
            question, cue = _cut(ask(row), chat)
            samples.append(
                Sample(
                    sample_id=f"{self.name}-{len(shots)}shot-{i:05d}",
                    task=self.name,
                    context="".join(shots) or question,
                    query=question if shots else "",
                    answer_prefix=cue,
                    references=(row["answer"].split("####")[-1].strip().replace(",", ""),),
                    max_new_tokens=self.max_new_tokens,
                    stop=() if chat else tuple(settings["generation_kwargs"]["until"]),
                    chat=chat,
                    thinking=self.thinking,
                    meta={"index": i, "shots": len(shots)},
                )
            )
        return samples

    def score(self, sample: Sample, prediction: str) -> float:
        return self._matches(sample, prediction, "flexible-extract")

    def details(self, sample: Sample, prediction: str) -> dict[str, Any]:
        return {"strict": self._matches(sample, prediction, "strict-match")}

    def _matches(self, sample: Sample, prediction: str, name: str) -> float:
        settings = self._settings
        (rule,) = (f["filter"][0] for f in settings["filter_list"] if f["name"] == name)
        found = re.findall(rule["regex_pattern"], prediction)
        if not found:
            return 0.0
        chosen = found[rule.get("group_select", 0)]
        said = next((part for part in chosen if part), "") if isinstance(chosen, tuple) else chosen
        texts = [said.strip(), sample.references[0]]
        for ignored in settings["metric_list"][0]["regexes_to_ignore"]:
            texts = [re.sub(ignored, "", text) for text in texts]
        return float(texts[0].lower() == texts[1].lower())

    @property
    def _settings(self) -> dict[str, Any]:
        return _lm_eval_settings(f"gsm8k/{self.variant.replace('_', '-')}.yaml")


@dataclass(frozen=True)
class Math:
    """Score: what stands in the last \\boxed{} (else between the first and last $, else all) equals the right answer.

    Equal: after lm-evaluation-harness's normalisation of LaTeX (`strip_string`: blanks, \\left, units, degrees, per
    cent, \\dfrac and a/b to \\frac, 0.5 to \\frac{1}{2}, "x =" dropped).
    problems: "math500", "aime24" or "aime25"; count: the first so many problems (None: all)
    instruction: what follows the problem, as a model's card asks for it
    thinking: whether a chat model may think first (`kvbench.tasks.chat`). It may, unlike elsewhere: long thoughts are
        what is measured, and max_new_tokens has room for them
    temperature, top_p, draws: answers sampled per problem; avg@k is the score of draws=k. 0: greedy. The dice of an
        answer depend on (seed, problem, draw) alone: they are the same for all policies.
    """

    kind: ClassVar[str] = "generate"

    problems: str = "math500"
    count: int | None = None
    instruction: str = ""
    max_new_tokens: int = 16384
    chat: str = "auto"
    thinking: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    draws: int = 1
    seed: int = 0
    source: str = "auto"
    path: str | None = None
    trace: int = 128
    name: str = ""

    def __post_init__(self) -> None:
        if self.problems not in MATH:
            raise ValueError(f"problems={self.problems!r} is not one of {', '.join(MATH)}")
        _check_run(self.count, self.max_new_tokens, self.trace)
        check_sampling(self.temperature, self.top_p, self.draws)
        object.__setattr__(self, "name", self.name or self.problems)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        remote, file = MATH[self.problems]
        settings = _lm_eval_settings(file)
        ask = _template(settings["doc_to_text"])
        chat, samples = wants_chat(self.chat, tokenizer), []
        for i, row in enumerate(_rows(self, self.problems, "test", remote)[: self.count]):
            question, cue = _cut(ask(row), chat)
            right = next(str(value) for key, value in row.items() if key.lower() == "answer")
            sample = Sample(
                sample_id=f"{self.name}-{i:05d}",
                task=self.name,
                context=question.rstrip("\n") + self.instruction + "\n" * question.endswith("\n"),
                query="",
                answer_prefix=cue,
                references=(right,),
                max_new_tokens=self.max_new_tokens,
                stop=() if chat else tuple(settings["generation_kwargs"]["until"]),
                chat=chat,
                thinking=self.thinking,
                meta={"index": i, "cluster": f"{self.problems}-{i:05d}"},
            )
            for draw in range(self.draws):
                name = sample.sample_id if self.draws == 1 else f"{sample.sample_id}-{draw:03d}"
                samples.append(replace(sample, sample_id=name, meta={**sample.meta, "draw": draw}))
        return samples

    def score(self, sample: Sample, prediction: str) -> float:
        return float(bool(_lm_eval_module("aime/utils.py")["is_equiv"](self.said(prediction), sample.references[0])))

    def details(self, sample: Sample, prediction: str) -> dict[str, Any]:
        return {"boxed": "\\boxed" in prediction}

    def said(self, prediction: str) -> str:
        """The answer that a text gives."""
        grader = _lm_eval_module("aime/utils.py")
        boxed = grader["last_boxed_only_string"](prediction)
        if boxed is not None:
            return str(grader["remove_boxed"](boxed))
        first, last = prediction.find("$"), prediction.rfind("$")
        return prediction[first + 1 : last] if 0 <= first < last else prediction


@dataclass(frozen=True)
class Recite:
    """`period` random words stand in the prompt, and the first 8 again: go on, `rounds` times through.

    With the full cache this is easy even for the proving model; what is evicted before it comes up again is lost, be
    it from the prompt or from the rounds that the model has written itself. Each word but the first that is written
    needs what stood `period` tokens earlier, so it favours policies that keep the last `period` tokens: choose budgets
    below that.
    Score: share of the words before the first wrong one. Details: `right`, share of right words, place by place. With
    two rounds and more, half and more of the 4-grams repeat in a right answer.
    """

    kind: ClassVar[str] = "generate"

    period: int = 192
    rounds: int = 2
    count: int = 16
    seed: int = 0
    trace: int = 32
    name: str = "recite"

    def __post_init__(self) -> None:
        check("period", self.period, 16, None)
        check("rounds", self.rounds, 1, None)
        check("count", self.count, 1, None)
        check("seed", self.seed, 0, None)
        check("trace", self.trace, 1, None)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        return [self._sample(tokenizer, i) for i in range(self.count)]

    def score(self, sample: Sample, prediction: str) -> float:
        expected, said = sample.references[0].split(), prediction.split()
        wrong = (at for at, word in enumerate(expected) if said[at : at + 1] != [word])
        return next(wrong, len(expected)) / len(expected)

    def details(self, sample: Sample, prediction: str) -> dict[str, Any]:
        expected = sample.references[0].split()
        return {"right": sum(a == b for a, b in zip(expected, prediction.split(), strict=False)) / len(expected)}

    def _sample(self, tokenizer: PreTrainedTokenizerBase, i: int) -> Sample:
        rng = rng_for(self.seed, self.name, self.period, i)
        vocabulary = words()
        known = (*vocabulary.nouns, *vocabulary.adjectives, *vocabulary.verbs, *(f"{n:02d}" for n in range(100)))
        pool = rng.sample(known, 200)  # so many that one word nearly tells where one is
        text = [rng.choice(pool) for _ in range(self.period)]
        context, again = (" " + " ".join(part) for part in (text, text[:8]))
        answer = (text * (self.rounds + 1))[8 : 8 + self.period * self.rounds]
        used = len(bos(tokenizer)) + len(encode(tokenizer, context + again))
        return Sample(
            sample_id=f"{self.name}-{self.period}x{self.rounds}-s{self.seed}-{i:05d}",
            task=self.name,
            context=context,
            query=again,
            answer_prefix="",
            references=(" ".join(answer),),
            max_new_tokens=len(encode(tokenizer, " " + " ".join(answer))),
            length=self.period,
            meta={"tokens": used, "seed": self.seed, "index": i},
        )


def check_sampling(temperature: float, top_p: float, draws: int) -> None:
    """Refuse sampling that cannot be, in one line."""
    check("temperature", temperature, 0, None)
    check("top_p", top_p, 0.01, 1)
    check("draws", draws, 1, None)
    if draws > 1 and not temperature:
        raise ValueError(f"draws={draws} are all alike at temperature=0; set task.temperature, or draws=1")


def _check_run(count: int | None, max_new_tokens: int, trace: int) -> None:
    if count is not None:
        check("count", count, 1, None)
    check("max_new_tokens", max_new_tokens, 1, None)
    check("trace", trace, 1, None)


def _cut(asked: str, chat: bool) -> tuple[str, str]:
    """A question and its last line, the cue for the answer; to a chat model all of it is said by the user."""
    question, line, cue = asked.rpartition("\n")
    return (asked, "") if chat else (question + line, cue)


def _rows(task: Gsm8k | Math, benchmark: str, split: str, remote: Hub) -> list[dict[str, Any]]:
    names = [f"{split}.{kind}" for kind in ("jsonl", "json", "parquet")]
    return load(benchmark, names, remote, source=task.source, path=task.path)


# -- what lm-evaluation-harness knows --------------------------------------------------------------------------------


@cache
def _lm_eval_settings(name: str) -> dict[str, Any]:
    """A task's YAML file, without the functions that it names."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    settings: dict[str, Any] = yaml.load(lm_eval_file(name), Loader)
    return settings


@cache
def _lm_eval_module(name: str) -> dict[str, Any]:
    """The functions of a file of a task, without importing the package, which takes long."""
    spec = spec_from_file_location("kvbench_lm_eval_" + re.sub(r"\W", "_", name), lm_eval_path(name))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def _template(text: str) -> Callable[[dict[str, Any]], str]:
    from jinja2 import Environment, StrictUndefined

    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(text)
    return lambda row: template.render(**row)
