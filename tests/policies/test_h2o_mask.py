"""H2O-mask against a simulation in plain loops: masked softmax rows, sums, and the mask of the next step."""

import math

import pytest
import torch
from torch import Tensor

from kvbench.policies import KV, H2OMask, Random, Step

SCALING = 0.6


def masked_softmax(logits: list[float], read: set[int]) -> list[float]:
    top = max(logits[j] for j in read)
    norm = sum(math.exp(logits[j] - top) for j in read)
    return [math.exp(x - top) / norm if j in read else 0.0 for j, x in enumerate(logits)]


def simulate(keys: Tensor, queries: Tensor, forwards: list[int], heavy: int, recent: int) -> list[tuple[set, list]]:
    """keys [S, D], queries [G, S, D] of one kv head -> per forward: slots its last query read, sums after it."""
    sums: list[float] = []
    hidden: set[int] = set()
    seen, out = 0, []
    for tokens in forwards:
        sums += [0.0] * tokens
        for i in range(seen, seen + tokens):
            read = {j for j in range(i + 1) if j not in hidden}
            for query in queries[:, i]:
                row = masked_softmax([SCALING * float(query @ keys[j]) for j in range(i + 1)], read)
                for j, p in enumerate(row):
                    sums[j] += p
        seen += tokens
        if seen >= heavy + recent:
            older = sorted(range(seen - recent), key=lambda j: (-sums[j], -j))[:heavy]
            hidden = set(range(seen - recent + 1)) - set(older)  # the window of the next step starts one later
            for j in range(seen - recent):
                if j not in older:
                    sums[j] = 0.0
        out.append((read, list(sums)))
    return out


class Host:
    """Attends densely under the selection and accumulates what each slot received."""

    def __init__(self, policy: H2OMask, keys: Tensor, queries: Tensor, valid: Tensor | None = None) -> None:
        self.policy, self.keys, self.queries = policy, keys, queries
        none = keys[:, :, :0]
        self.kv = KV.of(none, none).with_columns(attention=none[..., 0].float())
        self.valid = torch.ones(len(keys), keys.shape[2], dtype=torch.bool) if valid is None else valid
        self.seen = self.prompt = torch.zeros(len(keys), dtype=torch.int64)
        self.at = 0

    def forward(self, tokens: int) -> Tensor:
        """-> [B, H, S] bool: what the last query read."""
        part = slice(self.at, self.at + tokens)
        keys, queries, valid = self.keys[:, :, part], self.queries[:, :, part], self.valid[:, part]
        position = torch.where(valid, self.seen[:, None] + valid.cumsum(1) - 1, -1)
        decoding = tokens == 1 and self.at > 0
        self.kv = self.kv.append(keys, keys, valid, self.seen)
        self.at, self.seen = self.at + tokens, self.seen + valid.sum(1)
        self.prompt = self.prompt if decoding else self.seen
        step = Step(0, self.prompt, self.seen, decoding, scaling=SCALING)
        selection = self.policy.choose(self.kv, queries, position, step)
        slot = self.kv.position[:, :, None]
        heads = keys.shape[1]
        visible = ((slot >= 0) & (slot <= position[:, None, :, None])).expand(-1, heads, -1, -1)
        if selection is not None:
            assert selection.recent == 0
            visible = visible & selection.allowed[:, :, None]
        group = queries.shape[1] // heads
        logits = queries @ self.kv.keys.dense().repeat_interleave(group, 1).transpose(-1, -2) * SCALING
        weights = logits.masked_fill(~visible.repeat_interleave(group, 1), -torch.inf).softmax(-1).nan_to_num(0.0)
        received = weights.unflatten(1, (heads, group)).sum((2, 3))
        self.kv = self.policy(self.kv.with_columns(attention=self.kv.column("attention") + received), step)
        return visible[:, :, -1]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("recent", "window"), [(None, 4), (0, 1), (1, 1), (3, 3), (0.75, 6), (8, 8)])
def test_reads_and_sums_equal_the_simulation(group, recent, window):
    keys, queries = 2 * torch.randn(2, 2, 34, 6), 2 * torch.randn(2, 2 * group, 34, 6)
    host, forwards = Host(H2OMask(8, recent=recent), keys, queries), [16, *[1] * 10, 5, *[1] * 3]
    expected = [
        [simulate(keys[b, h], queries[b, h * group : (h + 1) * group], forwards, 8 - window, window) for h in range(2)]
        for b in range(2)
    ]
    for t, tokens in enumerate(forwards):
        read = host.forward(tokens)
        for b in range(2):
            for h in range(2):
                slots, sums = expected[b][h][t]
                assert set(read[b, h].nonzero().flatten().tolist()) == slots
                assert len(slots) == 8 or tokens > 1
                torch.testing.assert_close(host.kv.column("attention")[b, h], torch.tensor(sums), atol=1e-5, rtol=1e-4)
    assert host.kv.counts.even == 34 and torch.equal(host.kv.keys.dense(), keys)  # nothing was dropped


def test_a_prompt_that_does_not_fill_the_budget_is_read_whole_until_it_does():
    keys, queries = 2 * torch.randn(1, 1, 12, 6), 2 * torch.randn(1, 2, 12, 6)
    host = Host(H2OMask(8), keys, queries)
    assert [int(host.forward(n).sum()) for n in (5, 1, 1, 1, 1, 1, 1, 1)] == [5, 6, 7, 8, 8, 8, 8, 8]


def test_a_slot_that_leaves_the_window_is_unread_once_and_may_come_back():
    keys = torch.zeros(1, 1, 12, 1)
    queries = torch.ones(1, 1, 12, 1)
    keys[0, 0, 8] = 30.0  # all attention goes to token 8 as soon as it is there
    host = Host(H2OMask(4, recent=2), keys, queries)
    host.forward(8)
    read = [host.forward(1)[0, 0].nonzero().flatten().tolist() for _ in range(4)]
    assert [8 in slots for slots in read] == [True, True, False, True]


def test_a_padded_row_reads_as_alone_with_a_share_for_each_row():
    keys, queries = 2 * torch.randn(2, 2, 26, 6), 2 * torch.randn(2, 4, 26, 6)
    valid = torch.arange(26) >= torch.tensor([[0], [8]])
    host = Host(H2OMask(0.5), keys, queries, valid)
    alone = Host(H2OMask(0.5), keys[1:, :, 8:], queries[1:, :, 8:])
    for tokens in (20, 1, 1, 1, 1, 1, 1):
        read, single = host.forward(tokens), alone.forward(tokens - 8 * (tokens > 1))
        assert torch.equal(read[1, :, : single.shape[-1]], single[0]) and not read[1, :, single.shape[-1] :].any()
        live = slice(0, single.shape[-1])
        ours, theirs = host.kv.column("attention")[1, :, live], alone.kv.column("attention")[0]
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert read.sum(-1).tolist() == [[10, 10], [6, 6]]


def test_rows_with_room_read_everything_beside_rows_without():
    keys, queries = 2 * torch.randn(2, 1, 24, 6), 2 * torch.randn(2, 1, 24, 6)
    host = Host(H2OMask(10), keys, queries, torch.arange(24) >= torch.tensor([[0], [12]]))
    assert [host.forward(n).sum(-1).tolist() for n in (18, 1, 1, 1, 1, 1, 1)] == [
        [[18], [6]], [[10], [7]], [[10], [8]], [[10], [9]], [[10], [10]], [[10], [10]], [[10], [10]],
    ]  # fmt: skip


def test_room_for_everything_changes_nothing():
    keys, queries = torch.randn(1, 2, 20, 6), torch.randn(1, 2, 20, 6)
    host = Host(H2OMask(21), keys, queries)
    for tokens in (15, 1, 4):
        host.forward(tokens)
        assert set(host.kv.columns) == {"attention"}


def test_on_what_another_evictor_left():
    keys, queries = 2 * torch.randn(1, 2, 30, 6), 2 * torch.randn(1, 4, 30, 6)
    host = Host(H2OMask(6), keys, queries)
    host.forward(20)
    host.kv = Random(12)(host.kv, Step(0, host.prompt, host.seen))
    assert [host.forward(1).sum(-1).max() <= 6 for _ in range(5)] == [True] * 5
    assert host.kv.counts.even == 17


def test_state_and_bad_options():
    assert H2OMask(4).slot_state_nbytes == 5 and H2OMask(4).needs == {"attention": 1}
    with pytest.raises(ValueError, match="H2OMask: budget=5 is too small: it must be at least 6"):
        H2OMask(5, recent=6)
    with pytest.raises(ValueError, match="H2OMask: recent=1.5 as a share must be from 0 to 1"):
        H2OMask(5, recent=1.5)
