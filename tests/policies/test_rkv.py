"""R-KV against loops over heads, queries and pairs of keys, through 300 generated tokens."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import kvbench.policies.rkv
from kvbench.policies import KV, RKV, Random, Step

SCALING = 0.5


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x - max(logits)) for x in logits)
    return [math.exp(x - max(logits)) / total for x in logits]


def pooled(row: list[float], kernel: int) -> list[float]:
    return [max(row[max(0, j - kernel // 2) : j + kernel // 2 + 1]) for j in range(len(row))]


def repeated(keys: Tensor, official: bool = False) -> list[float]:
    """keys [S, D] -> redundancy of each."""
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    total = [0.0] * len(keys)
    for i, row in enumerate((unit @ unit.T).tolist()):
        row[i] = 0.0
        alike = [j for j, x in enumerate(row) if x > 0.5]
        if alike or official:
            row[max(alike, default=0)] = 0.0
        total = [a + b for a, b in zip(total, row, strict=True)]
    return softmax([x / len(keys) for x in total])


def oracle(keys: Tensor, queries: Tensor, policy: RKV, softcap: float | None = None) -> list[float]:
    """keys [S, D] of one head, queries [G, w, D] of its group -> scores of the slots before the window."""
    before = len(keys) - policy.window
    importance = [0.0] * before
    for i in range(queries.shape[1]):
        logits = (SCALING * queries[:, i].double() @ keys[:before].double().T).tolist()
        if softcap is not None:
            logits = [[softcap * math.tanh(x / softcap) for x in row] for row in logits]
        weights = softmax([max(column) for column in zip(*logits, strict=True)])
        importance = [a + b / queries.shape[1] for a, b in zip(importance, weights, strict=True)]
    weight, redundant = policy.mix_lambda, repeated(keys, policy.official)
    importance = pooled(importance, policy.kernel)
    return [weight * a - (1 - weight) * b for a, b in zip(importance, redundant[:before], strict=True)]


def best(scores: list[float], budget: int, window: int) -> list[int]:
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], -j))
    return sorted([*order[: budget - window], *range(len(scores), len(scores) + window)])


def text(batch: int, heads: int, group: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys [B, H, T, 8], of which many are alike, and queries [B, H * G, T, 8]."""
    topics = torch.randn(batch, heads, 12, 8)
    topic = torch.randint(12, (batch, heads, tokens))[..., None].expand(-1, -1, -1, 8)
    keys = topics.gather(2, topic) + 0.6 * torch.randn(batch, heads, tokens, 8)
    return keys, 2 * torch.randn(batch, heads * group, tokens, 8)


class Host:
    """Appends and keeps a rolling window of queries; pads are on the left."""

    def __init__(self, policy: RKV, keys: Tensor, queries: Tensor, pads: list[int]):
        self.policy, self.keys, self.queries, self.pads, self.at = policy, keys, queries, torch.tensor(pads), 0
        self.kv = KV.of(keys[:, :, :0], keys[:, :, :0])
        self.seen = self.prompt = torch.zeros(len(pads), dtype=torch.int64)

    def before(self, amount: int) -> tuple[KV, Step]:
        start, self.at = self.at, self.at + amount
        valid = torch.arange(self.at) >= self.pads[:, None]
        keys = self.keys[:, :, start : self.at]
        kv = self.kv.append(keys, keys, valid[:, start:], self.seen)
        new = valid[:, start:].sum(1)
        self.seen = self.seen + new
        decoding = amount == 1 and start > 0
        self.prompt = self.prompt if decoding else self.seen
        last = slice(max(0, self.at - self.policy.needs["window"]), self.at)
        return kv, Step(
            0, self.prompt, self.seen, decoding, new, scaling=SCALING,
            queries=self.queries[:, :, last], query_valid=valid[:, last],
        )  # fmt: skip

    def forward(self, amount: int) -> KV:
        self.kv = self.policy(*self.before(amount))
        return self.kv


@pytest.mark.parametrize(("group", "official", "mix_lambda"), [(1, False, 0.6), (2, True, 0.6), (2, False, 0.1)])
def test_three_hundred_generated_tokens_equal_the_definition(group, official, mix_lambda):
    keys, queries = text(1, 2, group, 340)
    policy = RKV(30, window=8, kernel=5, interval=20, mix_lambda=mix_lambda, official=official)
    host = Host(policy, keys, queries, [0])
    held: list[list[int]] = [[], []]
    for step in range(301):
        kv = host.forward(40 if step == 0 else 1)
        for h in range(2):
            held[h] += range(host.at - (40 if step == 0 else 1), host.at)
            if step % 20 == 0:
                asking = queries[0, h * group : (h + 1) * group, host.at - 8 : host.at]
                kept = best(oracle(keys[0, h, held[h]], asking, policy), 30, 8)
                held[h] = [held[h][s] for s in kept]
        assert kv.counts.even == 30 + step % 20
        assert kv.position.expand(1, 2, -1)[0].tolist() == held
    assert torch.equal(kv.keys.dense(), keys.gather(2, kv.position.long()[..., None].expand(-1, -1, -1, 8)))


def test_softcap_is_used_and_sinks_play_no_part():
    keys, queries = text(1, 2, 2, 40)
    policy = RKV(20, kernel=1, mix_lambda=1.0)
    kv, step = Host(policy, keys, queries, [0]).before(40)
    for softcap in (None, 1.5):
        score = policy.score(kv, replace(step, softcap=softcap, sinks=torch.tensor([5.0, 0.0, -1.0, 2.0])))
        for h in range(2):
            expected = torch.tensor(oracle(keys[0, h], queries[0, 2 * h : 2 * h + 2, 32:], policy, softcap))
            torch.testing.assert_close(score[0, h, :32], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pads", [3, 28, 36])
def test_a_padded_row_is_kept_as_alone(pads):
    keys, queries = text(2, 2, 2, 80)
    policy = RKV(16, window=8, interval=10, mix_lambda=0.5)
    both, alone = Host(policy, keys, queries, [0, pads]), Host(policy, keys[1:, :, pads:], queries[1:, :, pads:], [0])
    for amount in (40, *[1] * 40):
        if amount == 40:
            kv, step = both.before(40)
            kv.keys.tail[~kv.counts.live()] = 1e3  # dead columns may hold anything
            both.kv = policy(kv, step)
        else:
            both.forward(1)
        expected = alone.forward(amount - pads if amount > 1 else 1).position.expand(1, 2, -1)[0]
        position = both.kv.position.expand(2, 2, -1)[1]
        assert torch.equal(position[:, : expected.shape[1]], expected)
        assert (position[:, expected.shape[1] :] == -1).all()


def test_of_repeated_text_the_older_copy_goes_first():
    passage, other, newest = torch.eye(64)[:20].split([6, 10, 4])
    keys = torch.cat([passage, other, passage, newest])[None, None]
    kept = RKV(20, window=4, mix_lambda=0.0)(
        KV.of(keys, keys), Step(0, torch.tensor([26]), torch.tensor([26]), queries=torch.randn(1, 1, 4, 64))
    )
    assert kept.position[0, 0].tolist() == list(range(6, 26))


def test_all_equal_keys_keep_the_most_recent():
    keys = torch.randn(8).expand(1, 2, 60, 8)
    policy = RKV(20)
    kv, step = Host(policy, keys, torch.randn(1, 4, 60, 8), [0]).before(60)
    assert policy(kv, step).position.tolist() == [[list(range(40, 60))] * 2]


def test_similarities_are_taken_in_blocks(monkeypatch):
    keys, _ = text(2, 2, 1, 50)
    whole = kvbench.policies.rkv.redundancy(KV.of(keys, keys))
    monkeypatch.setattr(kvbench.policies.rkv, "_BLOCK_ELEMENTS", 2 * 2 * 50 * 7)
    torch.testing.assert_close(kvbench.policies.rkv.redundancy(KV.of(keys, keys)), whole)
    torch.testing.assert_close(whole[1, 1], torch.tensor(repeated(keys[1, 1])), atol=1e-7, rtol=1e-5)


def test_keys_that_nothing_resembles_zero_the_first_column_in_the_official_code_alone():
    keys = torch.randn(1, 1, 12, 16) + 0.4
    plain, official = repeated(keys[0, 0]), repeated(keys[0, 0], official=True)
    assert max(abs(x - y) for x, y in zip(plain, official, strict=True)) > 1e-3
    for zero_unmatched, expected in ((False, plain), (True, official)):
        found = kvbench.policies.rkv.redundancy(KV.of(keys, keys), zero_unmatched=zero_unmatched)
        torch.testing.assert_close(found[0, 0], torch.tensor(expected), atol=1e-7, rtol=1e-5)


def test_it_acts_after_prompts_and_whole_intervals():
    policy, prompt = RKV(20, interval=3), torch.tensor([7, 4])
    assert policy.acts(Step(0, prompt, prompt))
    assert [policy.acts(Step(0, prompt, prompt + n, True)) for n in range(1, 7)] == [False, False, True] * 2


def test_after_another_evictor_and_with_more_queries_than_asked_for():
    keys, queries = text(1, 2, 2, 60)
    policy = RKV(20, kernel=3)
    kv, step = Host(policy, keys, queries, [0]).before(60)
    first = Random(40)(kv, step)
    kept = policy(first, replace(step, queries=queries[:, :, -30:], query_valid=None)).position[0]
    for h, held in enumerate(first.position[0].tolist()):
        scores = oracle(keys[0, h, held], queries[0, 2 * h : 2 * h + 2, 52:], policy)
        assert kept[h].tolist() == [held[s] for s in best(scores, 20, 8)]


def test_defaults():
    policy = RKV(100)
    assert (policy.window, policy.kernel, policy.interval, policy.mix_lambda) == (8, 7, 128, 0.1)
    assert policy.needs == {"window": 8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 7}, r"budget=7 is too small: it must be at least 8 \(what the policy protects\)"),
        ({"budget": 50, "window": 0}, "RKV: window must be an int of at least 1 token, got 0"),
        ({"budget": 50, "interval": 0.5}, "RKV: interval must be an int of at least 1 token, got 0.5"),
        ({"budget": 50, "kernel": 4}, "RKV: kernel must be an odd int of at least 1 slot, got 4"),
        ({"budget": 50, "mix_lambda": 1.5}, "RKV: mix_lambda must be a number from 0 to 1, got 1.5"),
        ({"budget": 50, "official": 1}, "RKV: official must be true or false, got 1"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        RKV(**arguments)


def test_without_queries_it_says_so():
    keys = torch.randn(1, 2, 40, 8)
    with pytest.raises(ValueError, match="needs the last queries"):
        RKV(35)(KV.of(keys, keys), Step(0, torch.tensor([40]), torch.tensor([40])))
