"""Laws that every evictor obeys, over every file of conf/evict, and the arithmetic of budgets and selection."""

import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kvbench.policies
from kvbench.kernels.attention import column_sums
from kvbench.policies import (
    H2O,
    KV,
    LAQ,
    POLICIES,
    AdaKV,
    BudgetError,
    CaM,
    DuoAttention,
    Evictor,
    KeyDiff,
    KVzip,
    Policy,
    QHitter,
    Quantizer,
    Random,
    Scissorhands,
    SnapKV,
    Stack,
    Step,
    StreamingLLM,
    select,
)
from kvbench.policies.interface import Budgeted, Moments, Probe, Repeat, Selector
from kvbench.policies.store import Packed, Where

HEADS, GROUP, DIM, SCALING = 2, 2, 8, 0.5
CONF = {
    file.name.removesuffix(".yaml"): yaml.safe_load(file.read_text())
    for file in (importlib.resources.files("kvbench") / "conf" / "evict").iterdir()
    if file.name.endswith(".yaml")
}
TARGETS = {name: getattr(kvbench.policies, conf["_target_"].rpartition(".")[2]) for name, conf in sorted(CONF.items())}
EVICTORS = [name for name, cls in TARGETS.items() if issubclass(cls, Evictor)]
SELECTORS = [name for name, cls in TARGETS.items() if issubclass(cls, Selector)]
# What suits prompts of 60 tokens in the last of one layer.
SHORT: dict[str, dict[str, Any]] = {
    "duo_attention": {"sinks": 2, "recent": 6},
    "duo_attention_proving": {"sinks": 2, "recent": 6},
    "gkv": {"window": 4, "interval": 5},
    "infllm": {"sinks": 2, "local": 8, "block_size": 4, "representatives": 2},
    "infllm_small": {"sinks": 2, "local": 8, "block_size": 4, "representatives": 2},
    "knorm": {"skip_layers": 0},
    "lagkv": {"lag": 8},
    "lazy_eviction": {"window": 5, "alpha": 0.05},
    "quest": {"page": 4, "dense_layers": 0},
    "quest_all": {"page": 4},
    "rkv": {"window": 4, "interval": 5},
    "scissorhands": {"window": 16},
    "sentence_kv": {"sinks": 2, "recent": 4},
    "token_select": {"sinks": 2, "local": 8},
}


@pytest.fixture(scope="module", autouse=True)
def gates(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Gates for DuoAttention in a model of one layer."""
    path = tmp_path_factory.mktemp("gates") / "gates.json"
    path.write_text('{"alpha": [[0.9, 0.2]]}')
    for name in ("duo_attention", "duo_attention_proving"):
        SHORT[name]["pattern"] = str(path)


def build(name: str, budget: Any = 40, **options: Any) -> Policy:
    """The policy of a file; budget: of the evictor a wrapper wraps, if it is one."""
    target, given_options = TARGETS[name], {k: v for k, v in CONF[name].items() if k not in ("_target_", "base")}
    given_options |= SHORT.get(name, {}) | options
    if not issubclass(target, Budgeted):
        return target(**given_options)
    budgets = budget if isinstance(budget, dict) else {"budget": budget}
    if "base" in CONF[name]:
        inner = {k: v for k, v in CONF[name]["base"].items() if k != "_target_"}
        base = getattr(kvbench.policies, CONF[name]["base"]["_target_"].rpartition(".")[2])(**budgets, **inner)
        return target(base=base, **given_options)
    return target(**budgets, **given_options)


@dataclass
class Tokens:
    """Rows of tokens, the pads of short rows on the left; then a few drafted ones."""

    keys: Tensor
    values: Tensor
    queries: Tensor
    lengths: list[int]
    draft: tuple[Tensor, Tensor]

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first = self.keys.shape[2] - torch.tensor(self.lengths)
        valid = torch.arange(start, stop) >= first[:, None]
        return (*(x[:, :, start:stop] for x in (self.keys, self.values, self.queries)), valid)

    def row(self, b: int) -> "Tokens":
        """Row b alone, without its pads."""
        one = (x[b : b + 1, :, -self.lengths[b] :] for x in (self.keys, self.values, self.queries))
        return Tokens(*one, [self.lengths[b]], tuple(x[b : b + 1] for x in self.draft))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Tokens":
        keys, values, queries, *draft = map(change, (self.keys, self.values, self.queries, *self.draft))
        return Tokens(keys, values, queries, self.lengths, tuple(draft))


def tokens(*lengths: int, heads: int = HEADS) -> Tokens:
    """Keys and queries large enough that attention is far from flat."""
    shape = (len(lengths), heads, max(lengths), DIM)
    queries = 2 * torch.randn(shape[0], heads * GROUP, *shape[2:])
    draft = 2 * torch.randn(shape[0], heads * GROUP, 5, DIM), torch.randn(shape[0], heads, 5, DIM)
    keys = torch.randn(shape) + torch.randn(1, heads, 1, DIM)
    return Tokens(keys, torch.randn(shape), queries, list(lengths), draft)


class Host:
    """The smallest host: appends, supplies what the policy needs, applies it."""

    def __init__(self, policy: Policy, data: Tokens) -> None:
        self.policy, self.data, self.at = policy, data, 0
        none = data.keys[:, :, :0]
        columns = {"attention": none[..., 0].float()} if "attention" in policy.needs else {}
        self.kv = KV(KV.of(none, none).keys, KV.of(none, none).values, columns)
        self.seen = self.prompt = torch.zeros(len(data.lengths), dtype=torch.int64)

    def before(self, amount: int) -> tuple[KV, Step]:
        """What the policy is called with after the next `amount` tokens."""
        keys, values, queries, valid = self.data.part(self.at, self.at + amount)
        decoding = amount == 1 and self.at > 0
        self.at += amount
        at = self.seen[:, None] + (valid.cumsum(1) - 1).clamp(min=0)
        kv = self.kv.append(keys, values, valid, self.seen)
        needs = self.policy.needs
        if "attention" in kv.columns:
            new = column_sums(queries, kv.keys.dense(), at, kv.position, scaling=SCALING, query_valid=valid)
            kv = kv.with_columns(attention=kv.columns["attention"] + new)
        if "sentence" in needs:
            kv = kv.with_columns(sentence=kv.position // 7)
        if isinstance(needs.get("probe"), Repeat):
            kv = kv.with_columns(repeat=kv.keys.dense().float().sum(-1).sigmoid())
        self.seen = self.seen + valid.sum(1)
        self.prompt = self.prompt if decoding else self.seen
        step = Step(layer=1, prompt=self.prompt, seen=self.seen, decoding=decoding, new=valid.sum(1), scaling=SCALING)
        if width := needs.get("window"):
            back = max(0, self.at - width)
            *_, queries, valid = self.data.part(back, self.at)
        if width := max(needs.get("queries", 0), needs.get("window", 0)):
            step = replace(step, queries=queries[:, :, -width:], query_valid=valid[:, -width:])
        if "moments" in needs:
            step = replace(step, moments=moments(queries, valid), inverse_frequency=torch.tensor([1.0, 0.1]))
        if "probe" in needs and not isinstance(needs["probe"], Repeat):
            position = self.seen[:, None] + torch.arange(5)
            step = replace(step, probe=Probe(*self.data.draft, position, torch.ones_like(position, dtype=torch.bool)))
        return kv, step

    def forward(self, amount: int) -> KV:
        self.kv = self.policy(*self.before(amount))
        return self.kv


def moments(queries: Tensor, valid: Tensor) -> Moments:
    rows = [queries[b, :, valid[b]].float() for b in range(len(queries))]
    mean = torch.stack([row.mean(1) for row in rows])
    return Moments(mean, torch.stack([torch.stack([head.T.cov(correction=0) for head in row]) for row in rows]))


def prefilled(policy: Policy, *lengths: int) -> tuple[KV, Step]:
    return Host(policy, tokens(*lengths)).before(max(lengths))


def contents(kv: KV) -> dict[str, Tensor]:
    return {"keys": kv.keys.dense(), "values": kv.values.dense(), "position": kv.position, **kv.columns}


def assert_same(a: KV, b: KV) -> None:
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def lists(kv: KV) -> list[list[list[int]]]:
    """Kept positions by row and head."""
    position = kv.position.expand(*kv.counts.shape, -1)
    return [[[p for p in head if p >= 0] for head in row] for row in position.tolist()]


every_policy = pytest.mark.parametrize("name", [name for name in TARGETS if name not in SELECTORS])
every_file = pytest.mark.parametrize("name", list(TARGETS))
every_evictor = pytest.mark.parametrize("name", EVICTORS)
every_selector = pytest.mark.parametrize("name", SELECTORS)


def test_every_policy_has_its_file():
    assert {cls for cls in POLICIES.values() if issubclass(cls, Budgeted)} <= set(TARGETS.values())


def options(cls: type) -> dict[str, Any]:
    return {f.name: f.default for f in fields(cls) if f.init and f.name not in ("budget", "memory", "block", "base")}


@every_file
def test_a_file_lists_every_option_and_one_file_the_defaults(name):
    parts = [CONF[name], CONF[name].get("base")]
    for conf in filter(None, parts):
        cls = getattr(kvbench.policies, conf["_target_"].rpartition(".")[2])
        assert conf["_target_"] == f"kvbench.policies.{cls.__name__}"
        assert set(conf) - {"_target_", "base"} == set(options(cls))
        assert any(
            {k: v for k, v in CONF[other].items() if k not in ("_target_", "base")} == options(cls)
            for other in TARGETS
            if TARGETS[other] is cls
        )


@every_file
def test_a_policy_is_a_value(name):
    policy = build(name)
    assert policy == build(name) and hash(policy) == hash(build(name))
    assert eval(str(policy), dict(POLICIES)) == policy


@every_policy
@pytest.mark.parametrize("budget", [60, 67, 1.0])
def test_a_budget_for_everything_changes_nothing(name, budget):
    host = Host(build(name, budget), tokens(60, 53))
    untouched = Host(replace(host.policy), host.data)
    for amount in (41, 17, 1, 1) if budget != 1.0 else (41, 19):
        kv = host.forward(amount)
        untouched.kv = untouched.before(amount)[0]
        mine, its = contents(kv), contents(untouched.kv)
        for column in its.keys() - {"repeat"}:  # which is read once, then forgotten
            assert torch.equal(mine[column], its[column]), column
        assert "position" not in kv.columns  # an untouched cache pays nothing for it


@every_evictor
def test_budget_subset_order_and_alignment_at_every_step(name):
    data = tokens(64, 57)
    policy = build(name)
    host = Host(policy, data)
    held = [[set() for _ in range(HEADS)] for _ in range(2)]
    seen, grown = [0, 0], 0
    for amount in (50, 8, *[1] * 6):
        valid = data.part(host.at, host.at + amount)[3].sum(1).tolist()
        kv = host.forward(amount)
        grown += amount == 1 and (not policy.evicts_while_decoding or policy.interval > 1)
        assert (kv.counts.per_head.sum(1) <= HEADS * (40 + grown)).all()
        if not (policy.ragged or grown or isinstance(policy, Scissorhands)):
            assert kv.counts.width == 40
        position = kv.position.expand(2, HEADS, -1)
        assert torch.equal(position >= 0, torch.arange(kv.counts.width) < kv.counts.per_head[..., None])
        for b in range(2):
            real = data.row(b)
            for h in range(HEADS):
                kept = position[b, h][position[b, h] >= 0].tolist()
                assert kept == sorted(set(kept))
                assert set(kept) <= held[b][h] | set(range(seen[b], seen[b] + valid[b]))
                assert torch.equal(kv.keys.dense()[b, h, : len(kept)], real.keys[0, h, kept])
                if not isinstance(policy, CaM):  # which merges values
                    assert torch.equal(kv.values.dense()[b, h, : len(kept)], real.values[0, h, kept])
                held[b][h] = set(kept)
            seen[b] += valid[b]


@every_evictor
def test_200_decode_steps_keep_to_the_budget(name):
    policy = build(name)
    host = Host(policy, tokens(260, 253))
    host.forward(60)
    for generated in range(1, 201):
        kv = host.forward(1)
        if isinstance(policy, DuoAttention):  # 40 slots on average stand for one retrieval head, which grows
            assert kv.counts.per_head.tolist() == [[60 + generated, 8], [53 + generated, 8]]
            continue
        most = 40 + (policy.interval - 1 if policy.evicts_while_decoding else generated)
        assert (kv.counts.per_head.sum(1) <= HEADS * most).all()
        assert (kv.counts.per_head >= 1).all()
    assert host.seen.tolist() == [260, 253]


@every_evictor
def test_at_the_budget_nothing_more_happens(name):
    policy = build(name)
    kv, step = prefilled(policy, 60, 57)
    kept = policy(kv, step)
    again = kept.with_columns(repeat=kept.keys.dense().sum(-1)) if isinstance(policy, KVzip) else kept
    assert lists(policy(again, replace(step, new=torch.zeros(2, dtype=torch.int64)))) == lists(kept)


@every_evictor
def test_inputs_are_left_alone_and_bytes_are_real(name):
    policy = build(name)
    kv, step = prefilled(policy, 60, 53)
    copies = {k: v.clone() for k, v in contents(kv).items()}
    kept = policy(kv, step)
    for key, tensor in contents(kv).items():
        assert torch.equal(tensor, copies[key]), key
    # Evicting frees: no storage holds more than its tensor, and none is shared with the input.
    assert kept.nbytes == sum(t.numel() * t.element_size() for _, t in kept.tensors())
    assert not {t.data_ptr() for _, t in kept.tensors() if t.numel()} & {t.data_ptr() for _, t in kv.tensors()}


@every_policy
def test_a_stack_of_one_is_the_policy_and_nesting_does_not_matter(name):
    policy, second, third = build(name), Random(36), StreamingLLM(34)
    kv, step = prefilled(policy, 60, 53)
    assert_same(Stack((policy,))(kv, step), policy(kv, step))
    assert_same(Stack(())(kv, step), kv)
    left, right = Stack((Stack((policy, second)), third)), Stack((policy, Stack((second, third))))
    assert left == right == policy | second | third == policy | (second | third)
    assert_same(left(kv, step), third(second(policy(kv, step), step), step))


@every_policy
def test_after_another_evictor(name):
    policy = Random(50) | build(name)
    kv, step = prefilled(policy, 60, 57)
    kept, first = lists(policy(kv, step)), lists(Random(50)(kv, step))
    for b in range(2):
        for h in range(HEADS):
            assert set(kept[b][h]) <= set(first[b][h])


@every_evictor
def test_before_a_quantizer(name):
    policy = build(name)
    kv, step = prefilled(policy, 60, 57)
    kept, packed = policy(kv, step), (policy | Toy())(kv, step)
    assert packed.keys.body is not None and not packed.keys.is_flat
    if isinstance(policy, QHitter):  # which minds the quantizer's error
        return
    assert lists(packed) == lists(kept)
    live = kept.counts.live()
    torch.testing.assert_close(packed.keys.dense()[live], kept.keys.dense()[live], atol=0.51, rtol=0)


@every_evictor
def test_what_is_needed_and_absent_is_named(name):
    policy = build(name)
    kv, step = prefilled(policy, 60)
    drafting = {"queries"} if isinstance(policy, LAQ) and not policy.window else set()  # for who drafts, not for LAQ
    for need in policy.needs.keys() - {"all_layers"} - drafting:
        bare = KV(kv.keys, kv.values, {k: v for k, v in kv.columns.items() if k not in (need, "repeat")})
        absent = {"queries": None, "query_valid": None, "moments": None, "probe": None}
        kept = {k: v for k, v in absent.items() if k == need or (k == "query_valid" and need in ("queries", "window"))}
        with pytest.raises((KeyError, ValueError), match="need"):
            policy(bare, replace(step, **kept, **({"queries": None} if need == "window" else {})))


@every_evictor
def test_a_padded_row_is_scored_and_kept_as_alone(name):
    policy, data = build(name), tokens(70, 43, 61)
    host, alone = Host(policy, data), [Host(policy, data.row(b)) for b in range(3)]
    kv, step = host.before(70)
    kv = policy.observe(kv, step)
    score = policy.score(kv, step)
    kv.keys.tail[~kv.counts.live()] = 1e3
    kv.values.tail[~kv.counts.live()] = 1e3
    assert torch.equal(
        policy.score(kv, step)[kv.position.expand_as(score) >= 0], score[kv.position.expand_as(score) >= 0]
    )
    kept = lists(policy(kv, replace(step, new=torch.zeros(3, dtype=torch.int64))))
    for b, single in enumerate(alone):
        one, its_step = single.before(data.lengths[b])
        one = policy.observe(one, its_step)
        torch.testing.assert_close(score[b, :, : data.lengths[b]], policy.score(one, its_step)[0], atol=1e-5, rtol=1e-5)
        assert kept[b] == lists(policy(one, replace(its_step, new=torch.zeros(1, dtype=torch.int64))))[0]


@every_evictor
def test_a_padded_row_decodes_as_alone(name):
    policy, data = build(name), tokens(75, 58)
    host, alone = Host(policy, data), [Host(policy, data.row(b)) for b in range(2)]
    for amount in (60, *[1] * 15):
        kept = lists(host.forward(amount))
    for b, single in enumerate(alone):
        for amount in (data.lengths[b] - 15, *[1] * 15):
            one = single.forward(amount)
        assert lists(one)[0] == kept[b]


@every_evictor
def test_half_precision_keeps_what_single_does(name):
    data = tokens(60, 53).map(Tensor.bfloat16)
    policy = build(name)
    assert lists(Host(policy, data).forward(60)) == lists(Host(policy, data.map(Tensor.float)).forward(60))


@every_evictor
def test_a_share_is_taken_of_each_rows_own_prompt(name):
    policy = build(name, 0.75)
    kept = policy(*prefilled(policy, 80, 60)).counts.per_head.sum(1)
    if isinstance(policy, DuoAttention):
        assert kept.tolist() == [80 + 8, 60 + 8]
    else:
        assert kept.tolist() == [60 * HEADS, 45 * HEADS]


@every_evictor
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_bytes_stay_within_a_byte_budget(name, packed):
    for memory in (0.55, 0.8):
        policy = build(name, {"memory": memory})
        stack = policy | Toy() if packed else Stack((policy,))
        data = tokens(150, 131).map(Tensor.bfloat16)
        kept = stack(*Host(stack, data).before(150))
        full = torch.tensor([150, 131]) * (2 * HEADS * DIM * 2)
        assert (kept.row_nbytes() <= memory * full).all()
        if not isinstance(policy, DuoAttention):  # whole heads
            assert (kept.row_nbytes() >= (memory - 0.05) * full).all()


@pytest.mark.parametrize("name", [n for n in EVICTORS if TARGETS[n] not in (AdaKV, DuoAttention, QHitter)])
def test_a_larger_budget_keeps_all_that_a_smaller_one_does(name):
    data, previous = tokens(60), None
    for budget in (33, 40, 47, 54):
        kept = [set(head) for head in lists(Host(build(name, budget), data).forward(60))[0]]
        assert previous is None or all(a <= b for a, b in zip(previous, kept, strict=True))
        previous = kept


@pytest.mark.parametrize("name", [n for n in EVICTORS if TARGETS[n] is not DuoAttention])  # gates belong to heads
def test_heads_do_not_see_each_other(name):
    policy = build(name, per_head=False) if name == "random" else build(name)
    data, order = tokens(60, heads=3), [2, 0, 1]

    def move(x: Tensor) -> Tensor:
        return x[:, order] if x.shape[1] == 3 else x.unflatten(1, (3, GROUP))[:, order].flatten(1, 2)

    kept, moved = (lists(Host(policy, x).forward(60))[0] for x in (data, data.map(move)))
    assert moved == [kept[h] for h in order]


# -- selectors -------------------------------------------------------------------------------------------------------


def chosen(host: Host, amount: int) -> tuple[Tensor | None, KV]:
    """What a selector lets the queries of the next forward read, [B, Hq, S] bool; applies it."""
    kv, step = host.before(amount)
    *_, queries, valid = host.data.part(host.at - amount, host.at)
    position = host.seen[:, None] - valid.sum(1, keepdim=True) + valid.cumsum(1) - 1
    selection = host.policy.choose(kv, queries, position.masked_fill(~valid, -1), step)
    host.kv = host.policy(kv, step)
    if selection is None:
        return None, kv
    recent = torch.as_tensor(selection.recent).view(-1, 1, 1)
    near = (kv.position >= host.seen[:, None, None] - recent) & (kv.position >= 0)
    allowed = (selection.allowed | near) & (kv.position >= 0)
    return allowed.repeat_interleave(HEADS * GROUP // allowed.shape[1], 1), kv


@every_selector
def test_a_selector_reads_everything_that_fits(name):
    host = Host(build(name, 80), tokens(64, 57))
    for amount in (50, 8, *[1] * 6):
        read, kv = chosen(host, amount)
        live = (kv.position >= 0).expand(-1, HEADS * GROUP, -1)
        assert read is None or torch.equal(read, live.expand_as(read))
        assert_same(KV(host.kv.keys, host.kv.values), KV(kv.keys, kv.values))


@every_selector
def test_a_selector_reads_within_its_budget_and_drops_nothing(name):
    host = Host(build(name, 24), tokens(80, 71))
    for amount in (60, *[1] * 20):
        read, kv = chosen(host, amount)
        if amount == 1:
            assert read is not None and (read.sum(-1) <= 24 + 4).all()  # and the page or block being filled
        assert host.kv.counts.per_head.tolist() == [[n] * HEADS for n in host.seen.tolist()]


@every_selector
def test_a_padded_row_selects_as_alone(name):
    policy, data = build(name, 24), tokens(70, 53)
    host, alone = Host(policy, data), [Host(policy, data.row(b)) for b in range(2)]
    for step in range(11):
        read, _ = chosen(host, 60 if step == 0 else 1)
        for b, single in enumerate(alone):
            one, _ = chosen(single, data.lengths[b] - 10 if step == 0 else 1)
            if step:
                assert torch.equal(read[b, :, : one.shape[-1]], one[0]) and not read[b, :, one.shape[-1] :].any()


# -- selection -------------------------------------------------------------------------------------------------------


@st.composite
def selections(draw: Callable) -> tuple[list[list[int]], list[list[bool]], int]:
    """Scores (few values, many ties) and protection of two lists, and slots enough for what is protected."""
    lengths = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    scores = [draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n)) for n in lengths]
    protected = [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    return scores, protected, draw(st.integers(max(1, *(sum(p) for p in protected)), 10))


@given(selections())
def test_selection_is_protected_then_highest_then_newest(case):
    scores, protected, slots = case
    width = max(map(len, scores))
    score, shield = torch.full((2, 1, width), 9.0), torch.ones(2, 1, width, dtype=torch.bool)  # dead columns look best
    position = torch.full((2, 1, width), -1, dtype=torch.int32)
    for b, row in enumerate(scores):
        score[b, 0, : len(row)] = torch.tensor(row)
        shield[b, 0, : len(row)] = torch.tensor(protected[b])
        position[b, 0, : len(row)] = torch.arange(len(row))
    kv = KV(*(KV.of(x, x).keys for x in (torch.zeros(2, 1, width, 2),) * 2), {"position": position})
    indices, counts = select(score, kv, torch.full((2, 1), slots), shield)
    for b, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda s: (not protected[b][s], -row[s], -s))
        expected = sorted(order[:slots])
        assert indices[b, 0].tolist() == expected + [-1] * (indices.shape[-1] - len(expected))
        assert counts.per_head[b, 0] == len(expected)


@pytest.mark.parametrize("shape", [(2, 8), (2, 4, 8), (1, 2, 8), (2, 2, 7)], ids=str)
def test_scores_of_another_shape_are_refused(shape):
    """[B, S] would broadcast: with as many heads as rows, a row's scores would be taken for a head's."""
    x = torch.zeros(2, 2, 8, 4)
    with pytest.raises(ValueError, match=r"a score must be \[batch=2, kv_heads=2 or 1, slots=8\], got "):
        select(torch.zeros(shape), KV.of(x, x), torch.full((2, 1), 3))


def test_keys_and_values_of_unlike_shapes_are_refused():
    x = torch.zeros(1, 2, 8, 4)
    for keys, values in ((x, x[:, :, :6]), (x[0], x[0]), (x, x[0])):
        with pytest.raises(ValueError, match=r"must be \[batch, kv_heads, tokens, head_dim\], got"):
            KV.of(keys, values)


def test_attention_is_scaled_as_models_do_unless_told():
    torch.manual_seed(0)
    keys, values, queries = torch.randn(3, 1, 8, 512, 128)
    seen, kv = torch.tensor([512]), KV.of(keys, values)
    kept = [
        SnapKV(64, window=16)(kv, Step(0, seen, seen, queries=queries[:, :, -16:], scaling=scaling)).position
        for scaling in (None, 128**-0.5, 1.0)
    ]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


# -- budgets ---------------------------------------------------------------------------------------------------------


def at_prompt(*prompt: int, **more: Any) -> Step:
    return Step(0, torch.tensor(prompt), torch.tensor(prompt), **more)


def test_shares_keep_what_one_expects():
    assert Random(0.1).slots(None, at_prompt(100)).tolist() == [[10]]
    assert Random(0.9).slots(None, at_prompt(100)).tolist() == [[90]]
    assert Random(0.5).slots(None, at_prompt(100, 101, 1)).tolist() == [[50], [51], [1]]
    assert Random(7).slots(None, at_prompt(100, 5)).tolist() == [[7], [7]]
    assert KeyDiff(0.1, recent=5, sinks=4).slots(None, at_prompt(100, 20)).tolist() == [[10], [9]]


@given(st.integers(1, 2_000_000), st.integers(1, 100))
def test_a_share_in_percent_is_exact(prompt, percent):
    kept = int(Random(percent / 100).slots(None, at_prompt(prompt)))
    assert kept == max(1, prompt - prompt * (100 - percent) // 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Random: give either budget= .* or memory="),
        ({"budget": 0.5, "memory": 0.5}, "Random: give either budget= .* or memory="),
        ({"budget": 0}, "budget=0 is too small: it must be at least 1 token"),
        ({"budget": -3}, "budget=-3 is too small: it must be at least 1 token"),
        ({"budget": 0.0}, "budget=0.0 as a share must be above 0 and at most 1"),
        ({"budget": 512.0}, "budget=512.0 as a share must be above 0 and at most 1; write tokens as an int"),
        ({"budget": float("nan")}, "budget=nan as a share must be above 0 and at most 1"),
        ({"budget": "half"}, "budget must be a number, got 'half'"),
        ({"budget": True}, "budget must be a number, got True"),
        ({"memory": 2}, "memory=2 as a share must be above 0 and at most 1"),
        ({"memory": 0}, "memory=0 as a share must be above 0 and at most 1"),
    ],
)
def test_bad_budgets(arguments, message):
    with pytest.raises(ValueError, match=message):
        Random(**arguments)


@dataclass(frozen=True)
class ToyCodec:
    """int8 codes, a float16 per row, a float32 per `group` rows."""

    group: int
    first: ClassVar[None] = None

    def encode(self, x: Tensor, where: Where) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        codes = x.round().clamp(-127, 127).to(torch.int8)
        return {"codes": codes, "mean": x.mean(-1).half()}, {"scale": torch.ones(len(x) // self.group)}

    def decode(self, packed: Packed) -> Tensor:
        return packed.rows["codes"].to(packed.dtype)

    def row_nbytes(self, head_dim: int) -> int:
        return head_dim + 2

    def group_nbytes(self, head_dim: int) -> int:
        return 4


@dataclass(frozen=True)
class Toy(Quantizer):
    """Keys packed by fours, the last two of a list left as they are; values packed at once."""

    def codecs(self, step: Step | None = None) -> tuple[ToyCodec, ToyCodec]:
        return ToyCodec(4), ToyCodec(1)

    def flush(self, tail: Tensor) -> tuple[Tensor, Tensor]:
        return (tail - 2).clamp(min=0) // 4 * 4, tail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("evictor", [Random, H2O, StreamingLLM, SnapKV, KeyDiff])
def test_memory_gives_the_most_slots_whose_bytes_fit(evictor, packed, dtype):
    for prompt in (41, 60):
        data = tokens(prompt)
        data.keys, data.values = data.keys.to(dtype), data.values.to(dtype)
        data.queries = data.queries.to(dtype)
        for memory in (0.3, 0.55, 0.9, 1.0):
            options = {"window": 1} if evictor is SnapKV else {}
            policy = evictor(memory=memory, **options)
            stack = policy | Toy() if packed else Stack((policy,))
            kv, step = Host(stack, data).before(prompt)
            full = 2 * prompt * HEADS * DIM * 2
            fits = 0
            for slots in range(1, prompt + 1):
                lists = 1 if policy.shared_over_heads else HEADS
                held = kv if slots == prompt else kv.gather(torch.arange(slots).expand(1, lists, -1))
                held = Toy()(held, step) if packed else held
                fits = slots if held.nbytes <= memory * full else fits
            assert policy.slots(kv, replace(step, stack=stack.policies, at=0)).tolist() == [[fits]]
            result = stack(kv, step)
            assert result.counts.even == fits
            assert result.nbytes <= memory * full


def test_memory_is_counted_for_each_row():
    policy = StreamingLLM(memory=0.5)
    kept = policy(*prefilled(policy, 80, 40)).counts.per_head[:, 0].tolist()
    alone = [policy(*prefilled(policy, n)).counts.even for n in (80, 40)]
    assert kept == alone


def test_a_byte_budget_that_cannot_be_met_says_what_it_is_short_of():
    policy = SnapKV(memory=0.25)
    # Of 40 tokens * 2 heads * 8 dims * 2 sides * 2 bytes a quarter is 640 bytes; a float32 slot takes 128 + 8.
    message = (
        r"SnapKV\(memory=0.25\): 0.25 of the full cache of 40 tokens is 640 bytes per layer, "
        r"room for 4 slots, but 32 are needed; use a larger memory= or fewer bits"
    )
    with pytest.raises(BudgetError, match=message):
        policy(*prefilled(policy, 40))
    with pytest.raises(BudgetError, match="room for 0 slots, but 1 are needed"):
        Random(memory=0.01)(*prefilled(Random(1), 40))
    with pytest.raises(BudgetError, match="needs the evictor before the quantizer"):
        (Toy() | Random(memory=0.5))(*prefilled(Random(1), 40))


def test_a_stack_needs_what_its_members_need():
    stack = SnapKV(20, window=5) | H2O(10) | SnapKV(10, window=9) | KeyDiff(5)
    assert stack.needs == {"queries": 9, "attention": 1}
    assert (Random(4) | StreamingLLM(4)).in_cache_positions
    assert not (Random(4) | StreamingLLM(4, positions="original")).in_cache_positions
