"""RULER: official words, prompts that depend on their index only, fitted to the length, with the right answers."""

import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.tasks import Ruler, Sample
from kvbench.tasks import ruler_prompts as prompts
from kvbench.tasks import ruler_texts as texts
from kvbench.tasks.ruler import SUBTASKS, largest_fit
from kvbench.tasks.ruler_drafts import DEPTHS, Cwe, Fwe, Niah, Qa, Setup, Vt

pytest.importorskip("wonderwords", reason="the word list comes with kvbench[bench]")
pytest.importorskip("lm_eval", reason="the prompt templates come with kvbench[lm-eval]")

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
FAMILIES = {
    "niah": "niah",
    "vt": "variable_tracking",
    "cwe": "common_words_extraction",
    "fwe": "freq_words_extraction",
    "qa": "qa",
}
NIAH = [name for name in SUBTASKS if name.startswith("niah_")]
ESSAY = [name for name in NIAH if SUBTASKS[name][1]["haystack"] == "essay"]


def official(file):
    path = DATA / "prompts" / file if file == "ruler.json" else DATA / "ruler_reference" / file
    if not path.exists():
        pytest.skip(f"no {path.name}: the reference data are not beside the repository")
    return path.read_text()


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "kvbench" / "assets" / "proving", model_max_length=10**6)


def write_files(folder, parts, questions):
    """Essays and question files, in the official forms, made up: per article `parts` paragraphs."""
    rng = random.Random(0)
    for name in "ab":
        lines = [f"Line {i} of {name} says {rng.randrange(1000)} and ends here." for i in range(300)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    articles = [
        {"title": t, "paragraphs": [
            {"context": f"In {t} part {i} there is a town {t}{i}.", "qas": [
                {"question": f"Which town is in {t} part {i}?", "is_impossible": False,
                 "answers": [{"text": f"{t}{i}"}, {"text": f"town {t}{i}"}, {"text": f"{t}{i}"}]},
                {"question": "Which lake?", "is_impossible": True, "answers": []},
            ]} for i in range(parts)]}
        for t in ("Ona", "Ubo", "Ila")
    ]  # fmt: skip
    (folder / "dev-v2.0.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    hotpot = [
        {"question": f"Who is {q}?", "answer": f"sage {q}", "supporting_facts": [[f"T{q}1", 0], [f"T{q}3", 1]],
         "context": [[f"T{q}{d}", [f"About {q}{d}.", f" More of sage {q}."]] for d in range(10)]}
        for q in range(questions)
    ]  # fmt: skip
    (folder / "hotpot_dev_distractor_v1.json").write_text(json.dumps(hotpot))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("ruler"), parts=4, questions=3)


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """Enough documents and words for the longest prompts."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "english_words.json").write_text(json.dumps({str(i): f"word{i}" for i in range(9000)}))
    return write_files(folder, parts=1500, questions=500)


def task(subtask, folder, variant="ruler_mini", length=2048, count=3, **options) -> Ruler:
    return Ruler(subtask, length, variant, count=count, path=folder, **options)


def total(tokenizer, sample) -> int:
    return sum(map(len, sample.segments(tokenizer))) + sample.max_new_tokens


# ---------------------------------------------------------------- official words


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_are_the_official_ones(family):
    expected = json.loads(official("ruler.json"))["families"][FAMILIES[family]]
    words = prompts.words(family)
    assert words.before + "{context}" + words.after == expected["template"]
    assert words.answer_prefix == expected["answer_prefix"]
    drawn = {"niah": Niah, "vt": Vt, "cwe": Cwe, "fwe": Fwe, "qa": Qa}[family]
    assert drawn.gen_tokens == expected["tokens_to_generate"]


def test_tasks_are_the_official_ones():
    expected = json.loads(official("ruler.json"))["tasks"]
    assert list(SUBTASKS) == list(expected)
    for name, config in expected.items():
        family, options = SUBTASKS[name]
        if family is Niah:
            types = {"words": "words", "numbers": "numbers", "uuids": "uuids"}
            assert options["haystack"] == config["type_haystack"]
            assert types[options.get("key", "words")] == config["type_needle_k"]
            assert types[options.get("value", "numbers")] == config["type_needle_v"]
            for ours, theirs in (("keys", "k"), ("values", "v"), ("queries", "q")):
                assert options.get(ours, 1) == config[f"num_needle_{theirs}"], name
        elif family is Qa:
            assert options["dataset"] == config["dataset"]
        elif family is Vt:
            assert Vt.hops == config["num_hops"]
        elif family is Cwe:
            cwe = Cwe(Setup("ruler", 4096, "file", None, 42), random.Random(0), 0)
            assert (*cwe.repeats, cwe.common) == (config["freq_cw"], config["freq_ucw"], config["num_cw"])
        else:
            assert Fwe.alpha == config["alpha"]


def test_prompts_have_the_form_of_officially_generated_ones():
    rows = [json.loads(line) for line in official("niah_multikey_3_4096.jsonl").splitlines()]
    for row in rows:
        (key,) = re.findall(r"for (\S+) mentioned in the provided text\?", row["input"])
        lines = [line for line in row["input"].split("\n") if line.startswith("One of")]
        (asked,) = [i for i, line in enumerate(lines) if key in line]
        needle = lines.pop(asked)
        drawn = Niah(Setup("ruler", 4096, "file", None, 42), random.Random(0), 0, "needle", "uuids", "uuids")
        assert needle == drawn._state(key, row["outputs"][0])
        # Write what this row has drawn, with the needle at its place.
        drawn.needles, drawn.asked, drawn.lines, drawn.references = [(needle, key)], [key], lines, tuple(row["outputs"])
        drawn.place = next(p for p in range(9**9) if random.Random(p).sample(range(len(lines)), 1) == [asked])
        assert drawn.draft(len(lines)).prompt == row["input"]


@pytest.mark.parametrize("subtask", NIAH)
def test_one_value_is_asked_for_in_the_singular(subtask, tokenizer, folder):
    sample = task(subtask, folder, count=1).samples(tokenizer)[0]
    kind = "uuid" if subtask in ("niah_single_3", "niah_multikey_3") else "number"
    if len(sample.references) == 1:
        assert sample.context.startswith(f"A special magic {kind} is hidden")
        assert sample.query.startswith(f"\nWhat is the special magic {kind} for ")
        assert sample.answer_prefix.startswith(f" The special magic {kind} for ")
        assert sample.answer_prefix.endswith(" mentioned in the provided text is")
    else:
        assert sample.context.startswith(f"Some special magic {kind}s are hidden")
        assert sample.query.startswith(f"\nWhat are all the special magic {kind}s for ")
        assert sample.answer_prefix.endswith(" mentioned in the provided text are")


# ---------------------------------------------------------------- the same prompts, always


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_a_prompt_depends_on_its_index_only(subtask, tokenizer, folder):
    few = task(subtask, folder, count=1).samples(tokenizer)
    many = task(subtask, folder).samples(tokenizer)
    assert many[:1] == few and task(subtask, folder).samples(tokenizer) == many
    assert len({s.prompt for s in many}) == len({s.sample_id for s in many}) == 3
    other = task(subtask, folder, seed=1).samples(tokenizer)
    assert not {s.prompt for s in other} & {s.prompt for s in many}
    assert not {s.sample_id for s in other} & {s.sample_id for s in many}


@pytest.mark.parametrize("subtask", ["niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe", "qa_1"])
def test_the_probe_of_the_official_fit_is_no_sample(subtask, tokenizer, folder):
    few, many = (task(subtask, folder, "ruler", 8192, count=n).samples(tokenizer) for n in (1, 3))
    assert many[:1] == few


# ---------------------------------------------------------------- fit


@pytest.mark.parametrize("subtask", SUBTASKS)
def test_prompt_and_answer_fit_and_one_unit_more_would_not(subtask, tokenizer, folder):
    ruler = task(subtask, folder)
    setup = ruler._setup(tokenizer)
    for i, sample in enumerate(ruler.samples(tokenizer)):
        assert total(tokenizer, sample) == sample.meta["tokens"] <= sample.length == 2048
        assert sample.meta["fill"] == sample.meta["tokens"] / 2048 > 0.9
        larger = ruler._sample(ruler._family(setup, i), sample.meta["size"] + 1, i, False)
        assert total(tokenizer, larger) > 2048


@pytest.mark.parametrize(
    ("subtask", "length", "step"),
    [("niah_single_1", 4096, 25), ("niah_single_1", 2048, 5), ("niah_multikey_2", 4096, 25),
     ("niah_multivalue", 4096, 500), ("vt", 4096, 10), ("vt", 2048, 5), ("qa_1", 4096, 10),
     ("cwe", 8192, 10), ("fwe", 4096, (4096 - 50) // 32)],
)  # fmt: skip
def test_official_fit_shrinks_by_official_steps(subtask, length, step, tokenizer, folder):
    samples = task(subtask, folder, "ruler", length, count=4).samples(tokenizer)
    sizes = [s.meta["size"] for s in samples]
    assert all(total(tokenizer, s) <= length for s in samples)
    assert len({size % step for size in sizes}) == 1, "all prompts come from one size, less whole steps"


@settings(max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=60, max_size=400), st.integers(20, 6000), st.integers(1, 9))
def test_largest_fit_needs_few_probes(growth, limit, grid):
    costs = [10]
    for more in growth:
        costs.append(costs[-1] + more)
    tried = []

    def tokens(size):
        index = size - 5
        assert index >= 0 and (index % grid) == 0
        tried.append(index)
        return costs[index] if index < len(costs) else costs[-1] + 20 * (index - len(costs) + 1)

    size = largest_fit(tokens, limit, 5, grid)
    assert tokens(size) <= limit < tokens(size + grid)
    assert len(tried) < 40
    assert largest_fit(lambda size: 21, 20, 5) == 0


@pytest.mark.parametrize(
    "subtask",
    [s if s in ("vt", "fwe") else pytest.param(s, marks=pytest.mark.slow) for s in SUBTASKS],
)
def test_the_longest_length(subtask, tokenizer, large_folder):
    ruler = task(subtask, large_folder, "ruler", 131072, count=1)
    (sample,) = ruler.samples(tokenizer)
    assert 0.93 * 131072 < total(tokenizer, sample) == sample.meta["tokens"] <= 131072
    held = str if subtask.startswith(("niah", "vt", "qa")) else str.split  # fwe and cwe ask for whole words
    assert sample.references and all(r in held(sample.context) for r in sample.references)
    assert ruler.samples(tokenizer) == [sample]


def test_too_short_a_length_is_an_error(tokenizer, folder):
    with pytest.raises(ValueError, match=r"length=256: ruler_mini_cwe takes at least \d+ tokens, 120 of them for the"):
        task("cwe", folder, length=256).samples(tokenizer)
    with pytest.raises(ValueError, match="variant=ruler_mini has smaller steps"):
        task("niah_single_2", folder, "ruler", 512).samples(tokenizer)


@pytest.mark.parametrize("subtask", NIAH)
def test_shortest_length_fits_the_proving_model(subtask, tokenizer):
    for sample in Ruler(subtask, 256, "ruler_proving", count=2).samples(tokenizer):
        assert total(tokenizer, sample) <= 256 and sample.meta["fill"] > 0.7


def test_a_chat_template_and_one_bos_are_counted(tokenizer, folder):
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] there are words {{ m.content }} {% endfor %}[reply]"
    )
    (sample,) = task("niah_single_1", folder, count=1).samples(chat)
    ids = sum(sample.segments(chat), [])
    assert sample.chat and len(ids) + 128 == sample.meta["tokens"] <= 2048
    text = chat.decode(ids)
    assert ids.count(chat.bos_token_id) == 1 and text.startswith("<s>[user] there are words A special magic number is")
    assert text.endswith(f"[reply]{sample.answer_prefix}")
    (plain,) = task("niah_single_1", folder, count=1, chat="never").samples(chat)
    assert not plain.chat and plain.references == sample.references


# ---------------------------------------------------------------- what prompts hold


@pytest.mark.parametrize("variant", ["ruler_mini", "ruler_proving"])
@pytest.mark.parametrize("subtask", NIAH)
def test_needles_stand_where_they_are_said_to(subtask, variant, tokenizer, folder):
    given_path = folder if variant == "ruler_mini" else None
    for sample in task(subtask, given_path, variant).samples(tokenizer):
        spans = [sample.context[a:b] for a, b in sample.meta["spans"]]
        asked = [sample.context[a:b] for a, b in sample.meta["needle_spans"]]
        options = SUBTASKS[subtask][1]
        values, queries = options.get("values", 1), options.get("queries", 1)
        assert len(spans) == len(set(spans)) == max(options.get("keys", 1), queries) * values
        assert len(asked) == len(sample.references) == values * queries and set(asked) <= set(spans)
        start = "note : code for " if variant == "ruler_proving" else "One of the special magic "
        assert all(line.startswith(start) and line.endswith(".") for line in spans)
        for value in sample.references:
            assert sum(value in line for line in asked) == 1 and sample.context.count(value) == 1
        for line in asked:
            key = re.search(r"for (\S+) is:|code for (\S+(?: [a-z]+)?) \d", line)
            assert key and (key[1] or key[2]) in sample.query and (key[1] or key[2]) in sample.answer_prefix
        if queries > 1:
            assert sample.query.count(", ") == 3 and ", and " in sample.query


def test_keys_and_values_have_the_official_kinds(tokenizer, folder):
    nouns, adjectives = set(texts.word_lists()["noun"]), set(texts.word_lists()["adjective"])
    assert (len(nouns), len(adjectives), len(texts.all_words())) == (6782, 910, 8166)
    uuid4 = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    kinds = {"words": r"\S+-\S+", "numbers": r"[1-9]\d{6}", "uuids": uuid4}
    for subtask in NIAH:
        options = SUBTASKS[subtask][1]
        (sample,) = task(subtask, folder, count=1).samples(tokenizer)
        found = re.findall(r"magic (\w+) for (\S+) is: (\S+)\.", sample.context)
        assert found
        for unit, key, value in found:
            assert unit == options.get("value", "numbers")
            assert re.fullmatch(kinds[options.get("key", "words")], key)
            assert re.fullmatch(kinds[options.get("value", "numbers")], value)
            if options.get("key", "words") == "words":
                assert any(key[:i] in adjectives and key[i + 1 :] in nouns for i, c in enumerate(key) if c == "-")


def test_haystacks(tokenizer, folder):
    (noise,) = task("niah_single_1", folder, count=1).samples(tokenizer)
    lines = noise.context.split("\n")[1:]
    assert Counter(lines).most_common(1)[0][1] == noise.meta["size"] == len(lines) - 1
    (alike,) = task("niah_multikey_2", folder, count=1).samples(tokenizer)
    assert len(set(alike.context.split("\n")[1:])) == alike.meta["size"] + 1
    (essay,) = task("niah_multivalue", folder, count=1).samples(tokenizer)
    text = essay.context.split("\n", 1)[1]
    for a, b in essay.meta["spans"]:
        text = text.replace(essay.context[a:b], " ", 1)
    words = " ".join((Path(folder) / f"{name}.txt").read_text() for name in "ab").split()
    assert text.split() == words[: essay.meta["size"]]


def test_depths_are_forty_even_ones_and_both_ends_occur(tokenizer):
    assert len(DEPTHS) == len(set(DEPTHS)) == 40 and DEPTHS[0] == 0 and DEPTHS[-1] == 100
    setup = Ruler("niah_single_2", 4096, "ruler_proving")._setup(tokenizer)
    first, last = set(), set()
    for i in range(80):
        draft = Niah(setup, random.Random(i), 0, "essay").draft(100)
        ((begin, end),) = draft.spans
        first.add(begin <= 1)
        last.add(end >= len(draft.context) - 1)
    assert first == last == {True, False}


@given(st.integers(0, 90))
def test_essays_are_cut_after_words_and_repeated(count):
    text = 'One is here. "Two," he said! Three?  Four goes\non (and on.) Five ends it.'
    essays = texts.Essays.of(text, punkt=False)
    words = text.split()
    assert " ".join(essays.cut(count)).split() == (words * 7)[:count]
    assert essays.cut(len(words)) == [
        "One is here.",
        '"Two," he said!',
        "Three?",
        "Four goes on (and on.)",
        "Five ends it.",
    ]
    assert essays.cut(5) == ["One is here.", '"Two," he']


def test_variables_that_hold_the_value_are_the_answer(tokenizer, folder):
    for sample in task("vt", folder, count=4).samples(tokenizer):
        example, main = sample.context.split("\n\nMemorize")
        assert example.count("Memorize and track") == 1
        for text, question, answer in (
            (example.split("Question")[0], example, example.split("they are:")[1].split()),
            (main, sample.query, list(sample.references)),
        ):
            held: dict[str, str] = {}
            for name, value in re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)", text):
                held[name] = held.get(value, value)
            asked = re.search(r"value (\d+) in", question)[1]
            assert [n for n, v in held.items() if v == asked] == answer and len(answer) == 5
        assert f"5 variables are assigned the value {asked}, they are: " in sample.answer_prefix
        assert [len(n) for n in sample.references] == [5] * 5
        statements = [sample.context[a:b] for a, b in sample.meta["needle_spans"]]
        assert [s.split()[1] for s in statements] == list(sample.references)
    assert (sample.max_new_tokens, sample.meta["example_lines"]) == (30, 5)


def test_example_of_variable_tracking_takes_500_tokens_at_most(tiny):
    class Letters:
        """Two tokens a word."""

        def encode(self, text, **_):
            return [0] * (2 * len(text.split()))

    lines = Ruler("vt")._setup(Letters()).example_lines
    words = 2 * len(Vt(Setup("ruler", 4096, "file", None, 42), random.Random(0), 0).example_of(lines).prompt.split())
    assert words <= 500 < words + 2 * 19
    assert Ruler("vt", 1024, "ruler_mini")._setup(Letters()).example_lines < lines


@pytest.mark.parametrize(("variant", "length", "main", "example"), [
    ("ruler_mini", 4096, (6, 1), (3, 1)), ("ruler", 2048, (6, 1), (3, 1)), ("ruler", 8192, (30, 3), (10, 3)),
])  # fmt: skip
def test_common_words_are_the_most_common(variant, length, main, example, tokenizer, folder):
    (sample,) = task("cwe", folder, variant, length, count=1).samples(tokenizer)
    shown, asked = sample.context.split("\nBelow is")
    for text, repeats, answer in (
        (shown.split("\nQuestion")[0], example, re.findall(r"\d+\. (\S+)", shown.split("list are:")[1])),
        (asked, main, list(sample.references)),
    ):
        listed = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", text)
        counts = Counter(word for _, word in listed)
        assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))
        assert {w for w, n in counts.items() if n == repeats[0]} == set(answer) and len(answer) == 10
        assert set(counts.values()) == set(repeats)
    assert len(counts) == sample.meta["size"]


def test_a_larger_word_list_is_taken_where_the_first_is_too_short(tmp_path):
    (tmp_path / "english_words.json").write_text(json.dumps({str(i): f"word{i}" for i in range(9000)}))
    drawn = Cwe(Setup("ruler", 131072, "file", str(tmp_path), 42), random.Random(0), 0)
    before = drawn.draft(8166)
    larger = drawn.draft(8167)
    assert drawn.draft(8166) == before and not set(before.references) & set(larger.references)
    assert re.fullmatch(r"word\d+", larger.references[0]) and larger == drawn.draft(8167)


def test_frequent_words_follow_the_zeta_distribution(tokenizer, folder):
    (sample,) = task("fwe", folder, count=1).samples(tokenizer)
    words = sample.context.split("coded words. ")[1].split(" ")
    counts = [n for _, n in Counter(words).most_common()]
    size = sample.meta["size"]
    assert counts == [c for r in range(1, 99) if (c := math.floor(size / r**2 * 6 / math.pi**2))][: len(counts)]
    assert [w for w, _ in Counter(words).most_common(4)] == ["...", *sample.references]
    assert all(re.fullmatch("[a-z]{6}", w) for w in words if w != "...")
    assert sample.meta["words"] == (2048 - 50) // 50
    assert Ruler("fwe", 300, "ruler_mini")._family(Setup("ruler_mini", 300, "file", None, 42), 0).meta["words"] == 8


def test_questions_have_their_documents(tokenizer, folder):
    samples = task("qa_1", folder, length=1024, count=12).samples(tokenizer)
    assert [s.query.split("Question: ")[1] for s in samples[:2]] == [f"Which town is in Ona part {i}?" for i in (0, 1)]
    for i, sample in enumerate(samples):
        town = "Ona Ubo Ila".split()[i // 4] + str(i % 4)
        assert sample.references == (town, f"town {town}")
        assert all(town in sample.context[begin:end] for begin, end in sample.meta["needle_spans"])
        numbers = [int(n) for n in re.findall(r"^Document (\d+):$", sample.context, re.M)]
        assert numbers == list(range(1, sample.meta["size"] + 1))
    assert len({s.meta["cluster"] for s in samples}) == 12
    with pytest.raises(ValueError, match="squad has 12 questions: use a smaller count"):
        task("qa_1", folder, count=13).samples(tokenizer)

    for i, sample in enumerate(task("qa_2", folder).samples(tokenizer)):
        assert sample.references == (f"sage {i}",)
        assert all(f"T{i}{d}\nAbout {i}{d}. More of sage {i}." in sample.context for d in range(10))
        held = {sample.context[a:b].split("\n")[1] for a, b in sample.meta["needle_spans"]}
        assert held == {f"T{i}1", f"T{i}3"}


def test_documents_of_the_article_come_before_others(tokenizer, folder):
    drawn = Qa(task("qa_1", folder)._setup(tokenizer), random.Random(3), 0, "squad")
    names = lambda size: Counter(re.findall(r"In (\w+) part", drawn.draft(size).context))  # noqa: E731
    assert names(1) == {"Ona": 1} and names(3) == {"Ona": 3} and names(4) == {"Ona": 4}
    assert names(8)["Ona"] == 4 and names(8).total() == 8 and names(12) == {"Ona": 4, "Ubo": 4, "Ila": 4}
    assert names(24) == {"Ona": 8, "Ubo": 8, "Ila": 8}, "the pool is repeated"


@pytest.mark.parametrize(("subtask", "file"), [
    ("qa_1", "squad/dev_slice.json"), ("qa_2", "hotpotqa/dev_distractor_slice.json"), ("niah_multiquery", "books"),
])  # fmt: skip
def test_real_files(subtask, file, tokenizer):
    path = DATA / file
    if not path.exists():
        pytest.skip(f"no {file}: the reference data are not beside the repository")
    for sample in task(subtask, str(path), length=8192).samples(tokenizer):
        assert total(tokenizer, sample) <= 8192
        if subtask == "qa_1":
            assert any(sample.references[0] in sample.context[a:b] for a, b in sample.meta["needle_spans"])


# ---------------------------------------------------------------- scores


def scored(subtask, references, prediction):
    return Ruler(subtask).score(Sample("i", "t", "c", "q", "", references, 1), prediction)


@pytest.mark.parametrize(
    ("subtask", "references", "prediction", "score"),
    [
        ("niah_multivalue", ("11", "22", "33", "44"), " 11, 33 and 44.", 0.75),
        ("niah_single_1", ("1234567",), "12345678", 1.0),  # substrings count, as in the official scorer
        ("niah_single_1", ("1234567",), "123456", 0.0),
        ("vt", ("ABC", "DEF"), "abc", 0.5),
        ("cwe", ("new york",), "New\tYork", 0.0),  # a control character becomes a new line, not a blank
        ("cwe", ("new\nyork",), "New\tYork", 1.0),
        ("qa_1", ("a b", "B"), "It is b.", 1.0),
        ("qa_2", ("sage",), "Passage", 1.0),
        ("qa_1", ("x", "y"), "", 0.0),
        ("fwe", ("x", "y"), "", 0.0),
    ],
)
def test_scores_are_shares_of_references_or_any(subtask, references, prediction, score):
    assert scored(subtask, references, prediction) == score


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subtask": "niah"}, "subtask='niah' is not one of niah_single_1"),
        ({"variant": "mini"}, "variant='mini' is not one of ruler, ruler_mini, ruler_proving"),
        ({"source": "web"}, "source='web' is not one of auto, file, hub"),
        ({"chat": "yes"}, "chat='yes' is not one of auto, always, never"),
        ({"length": 255}, "length=255: must be a number, at least 256"),
        ({"subtask": "vt", "variant": "ruler_proving"}, "has the niah_. tasks only, not vt: use ruler_mini"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Ruler(**options)


@pytest.mark.parametrize(
    ("subtask", "what"),
    [("niah_single_2", "paul_graham_essays"), ("qa_1", "dev-v2.0.json"), ("qa_2", "hotpot_dev_dist")],
)
def test_missing_files_are_named(subtask, what, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("KVBENCH_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=rf"^ruler: no .*{what}.*task.path"):
        Ruler(subtask, count=1, source="file").samples(tokenizer)


def test_without_lm_eval_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("kvbench.tasks.official.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"lm-eval >= 0.4.13: pip install 'kvbench\[lm-eval\]'"):
        prompts._tree("niah_utils")


def test_a_file_for_every_task_of_every_variant():
    from hydra import compose, initialize_config_module
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    tasks = {
        f"{variant}_{subtask}": {"variant": variant, "subtask": subtask}
        for variant in ("ruler", "ruler_mini", "ruler_proving")
        for subtask in (NIAH if variant == "ruler_proving" else SUBTASKS)
    }
    found = {path.stem: OmegaConf.load(path) for path in (ROOT / "conf" / "task").glob("ruler*.yaml")}
    assert set(found) == set(tasks) | {"ruler", "ruler_mini", "ruler_proving"}
    for name, fields in tasks.items():
        assert found[name] == {"defaults": [fields["variant"], "_self_"], "subtask": fields["subtask"]}
        assert found[fields["variant"]].variant == fields["variant"]
    with initialize_config_module("kvbench.conf", version_base="1.3"):
        for name in ("ruler_mini_vt", "ruler_proving_niah_multikey_3", "ruler_qa_2"):
            made = instantiate(compose("config", [f"task={name}"]).task)
            assert made.name == name and made.kind == "generate" and replace(made) == made


def test_the_proving_model_finds_the_needle(tokenizer):
    from transformers import AutoModelForCausalLM

    from kvbench.engine import run_stacks
    from kvbench.policies.full import Full

    model = AutoModelForCausalLM.from_pretrained(ROOT / "kvbench" / "assets" / "proving").eval()
    ruler = Ruler("niah_single_1", 256, "ruler_proving", count=2)
    (run,) = run_stacks(model, tokenizer, ruler, [Full()])
    assert [row["score"] for row in run.rows] == [1.0, 1.0]
