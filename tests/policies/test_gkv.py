"""G-KV against loops over heads, queries and slots, through 300 generated tokens."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvbench.policies import GKV, KV, Random, Step

SCALING = 0.5


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x - max(logits)) for x in logits)
    return [math.exp(x - max(logits)) / total for x in logits]


def repeated(keys: Tensor) -> list[float]:
    """keys [S, D] -> redundancy of each."""
    unit = keys.double() / keys.double().norm(dim=-1, keepdim=True)
    total = [0.0] * len(keys)
    for i, row in enumerate((unit @ unit.T).tolist()):
        row[i] = 0.0
        alike = [j for j, x in enumerate(row) if x > 0.5]
        if alike:
            row[alike[-1]] = 0.0
        total = [a + b for a, b in zip(total, row, strict=True)]
    return softmax([x / len(keys) for x in total])


def attended(positions: list[int], keys: Tensor, queries: Tensor, at: list[int], window: int) -> list[float]:
    """keys [S, D] of one head at positions, queries [G, w, D] at `at` -> `now` of the slots before the window."""
    before = len(keys) - window
    now = [0.0] * before
    for i, t in enumerate(at):
        seen = sum(p <= t for p in positions)
        rows = [softmax((SCALING * q.double() @ keys[:seen].double().T).tolist())[:before] for q in queries[:, i]]
        now = [a + max(column) for a, column in zip(now, zip(*rows, strict=True), strict=True)]
    return [x / max(now) for x in now]


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

    def __init__(self, policy: GKV, keys: Tensor, queries: Tensor, pads: list[int]):
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


@pytest.mark.parametrize(("group", "alpha", "mix_lambda"), [(1, 0.95, 1.0), (2, 0.8, 0.5), (2, 0.0, 0.5)])
def test_three_hundred_generated_tokens_equal_the_definition(group, alpha, mix_lambda):
    keys, queries = text(1, 2, group, 340)
    host = Host(GKV(30, window=8, interval=20, alpha=alpha, mix_lambda=mix_lambda), keys, queries, [0])
    held: list[dict[int, float]] = [{}, {}]  # position -> F
    for step in range(301):
        kv = host.forward(40 if step == 0 else 1)
        for h in range(2):
            held[h] |= dict.fromkeys(range(host.at - (40 if step == 0 else 1), host.at), 0.0)
            if step % 20 == 0:
                positions = list(held[h])
                asking = queries[0, h * group : (h + 1) * group, host.at - 8 : host.at]
                now = attended(positions, keys[0, h, positions], asking, list(range(host.at - 8, host.at)), 8)
                for p, x in zip(positions, now, strict=False):
                    held[h][p] = max(alpha * held[h][p], x)
                scores = [held[h][p] for p in positions[:-8]]
                if mix_lambda < 1:
                    redundant = repeated(keys[0, h, positions])[:-8]
                    pairs = zip(scores, redundant, strict=True)
                    scores = [mix_lambda * a - (1 - mix_lambda) * b / max(redundant) for a, b in pairs]
                held[h] = {positions[s]: held[h][positions[s]] for s in best(scores, 30, 8)}
        assert kv.counts.even == 30 + step % 20
        assert kv.position.expand(1, 2, -1)[0].tolist() == [list(x) for x in held]
    remembered = torch.tensor([list(x.values()) for x in held])
    torch.testing.assert_close(kv.column("global_score")[0], remembered, atol=1e-5, rtol=1e-4)
    assert kv.column("global_score").dtype == torch.float32


@pytest.mark.parametrize("pads", [3, 28, 36])
def test_a_padded_row_is_kept_as_alone(pads):
    keys, queries = text(2, 2, 2, 80)
    policy = GKV(16, window=8, interval=10)
    both, alone = Host(policy, keys, queries, [0, pads]), Host(policy, keys[1:, :, pads:], queries[1:, :, pads:], [0])
    for amount in (40, *[1] * 40):
        kv, step = both.before(amount)
        if amount == 40:
            kv.keys.tail[~kv.counts.live()] = 1e3  # dead columns may hold anything
        both.kv = policy(kv, step)
        single = alone.forward(amount - pads if amount > 1 else 1)
        expected = single.position.expand(1, 2, -1)[0]
        width = expected.shape[1]
        position = both.kv.position.expand(2, 2, -1)[1]
        assert torch.equal(position[:, :width], expected) and (position[:, width:] == -1).all()
        scores = both.kv.column("global_score")[1, :, :width]
        torch.testing.assert_close(scores, single.column("global_score")[0], atol=1e-5, rtol=1e-4)


def test_what_was_needed_once_is_remembered():
    """An old heavy hitter that the newest queries ignore outlives tokens that they hardly look at."""
    keys = 0.1 * torch.randn(1, 1, 30, 8)
    keys[..., 3, 0], keys[..., 3, 1], keys[..., 5, 1] = 20, -5, 20
    early, late = torch.eye(8)[0].expand(10, 8), torch.eye(8)[1].expand(20, 8)
    queries = torch.cat([early, late])[None, None]
    kept = {}
    for alpha in (0.0, 0.8):
        host = Host(GKV(8, window=4, interval=1, alpha=alpha, mix_lambda=1.0), keys, queries, [0])
        host.forward(10)
        for _ in range(8):
            host.forward(1)
        kept[alpha] = host.kv.position[0, 0].tolist()
    assert 3 in kept[0.8] and 5 in kept[0.8] and 3 not in kept[0.0] and 5 in kept[0.0]


def test_without_new_evidence_the_order_stays():
    keys, queries = text(1, 2, 2, 60)
    policy = GKV(20, mix_lambda=1.0)
    kv, step = Host(policy, keys, queries, [0]).before(60)
    kv = policy.observe(kv, step)
    before = policy.score(kv, step)
    nothing = replace(step, query_valid=torch.zeros(1, 16, dtype=torch.bool))
    for _ in range(3):
        kv = policy.observe(kv, nothing)
    torch.testing.assert_close(policy.score(kv, step), 0.8**3 * before)


def test_the_score_moves_only_when_it_acts():
    keys, queries = text(1, 2, 2, 60)
    host = Host(GKV(20, interval=4), keys, queries, [0])
    kv = host.forward(40)
    for n in range(1, 9):
        column = kv.column("global_score")
        kv = host.forward(1)
        if n % 4:
            assert torch.equal(kv.column("global_score")[..., :-1], column)
            assert not kv.column("global_score")[..., -1].any()
    assert kv.counts.even == 20


def test_all_equal_keys_keep_the_most_recent():
    keys = torch.randn(8).expand(1, 2, 60, 8)
    policy = GKV(20)
    kv, step = Host(policy, keys, torch.randn(1, 8, 1, 8).expand(-1, -1, 60, -1), [0]).before(60)
    assert policy(kv, step).position.tolist() == [[list(range(40, 60))] * 2]


def test_after_another_evictor_and_with_more_queries_than_asked_for():
    keys, queries = text(1, 2, 2, 60)
    policy = GKV(20, window=8, mix_lambda=1.0)
    kv, step = Host(policy, keys, queries, [0]).before(60)
    first = Random(40)(kv, step)
    kept = policy(first, replace(step, queries=queries[:, :, -30:], query_valid=None)).position[0]
    for h, held in enumerate(first.position[0].tolist()):
        scores = attended(held, keys[0, h, held], queries[0, 2 * h : 2 * h + 2, 52:], list(range(52, 60)), 8)
        assert kept[h].tolist() == [held[s] for s in best(scores, 20, 8)]


def test_a_byte_budget_counts_the_column():
    keys, queries = text(1, 2, 2, 60)
    policy = GKV(memory=0.5, window=4)
    kept = Host(policy, keys.bfloat16(), queries.bfloat16(), [0]).forward(60)
    slot = 2 * (2 * 8 * 2 + 4 + 4)  # keys and values, position, score
    assert kept.counts.even == 60 * 2 * 2 * 8 * 2 // 2 // slot
    assert kept.nbytes == kept.counts.even * slot


def test_defaults():
    policy = GKV(100)
    assert (policy.window, policy.interval, policy.alpha, policy.mix_lambda) == (16, 128, 0.8, 0.5)
    assert policy.needs == {"window": 16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 15}, r"budget=15 is too small: it must be at least 16 \(what the policy protects\)"),
        ({"budget": 50, "window": 0}, "GKV: window must be an int of at least 1 token, got 0"),
        ({"budget": 50, "interval": True}, "GKV: interval must be an int of at least 1 token, got True"),
        ({"budget": 50, "alpha": -0.1}, "GKV: alpha must be a number from 0 to 1, got -0.1"),
        ({"budget": 50, "mix_lambda": "1"}, "GKV: mix_lambda must be a number from 0 to 1, got '1'"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        GKV(**arguments)


def test_without_queries_it_says_so():
    keys = torch.randn(1, 2, 40, 8)
    with pytest.raises(ValueError, match="needs the last queries"):
        GKV(35)(KV.of(keys, keys), Step(0, torch.tensor([40]), torch.tensor([40])))
