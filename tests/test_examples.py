"""The examples do what they say, and the pages that show them show their code and output."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import anywhere as example
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvbench
from kvbench import CompressedCache
from kvbench.cache import PolicyLayer
from kvbench.corpus import document
from kvbench.policies import H2O, KIVI, KV, TOVA, KeyDiff, SnapKV

ROOT = Path(__file__).parents[1]
SOURCE, PAGE = ((ROOT / name).read_text(encoding="utf-8") for name in ("scripts/anywhere.py", "policies/README.md"))


def test_the_page_shows_the_code_and_its_output(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert all(block in SOURCE for block in blocks)
    shown = {name for block in blocks for name in re.findall(r"^def (\w+)", block, re.M)}
    assert shown == set(re.findall(r"^def (\w+)", SOURCE, re.M)) - {"main"}
    (output,) = re.findall(r"```text\n(.*?)```", PAGE, re.S)
    example.main()
    assert capsys.readouterr().out == output
    assert all((ROOT / "policies" / link).exists() for link in re.findall(r"\]\(([^)#:]+)\)", PAGE))


def test_plain_tensors():
    keys, values, queries = torch.randn(2, 2, 300, 32), torch.randn(2, 2, 300, 32), torch.randn(2, 4, 16, 32)
    snapkv, keydiff, packed = example.score_plain_tensors(keys, values, queries).values()
    assert snapkv.counts.even == 64 and torch.equal(snapkv.position[0, 0, -16:], torch.arange(284, 300).int())
    assert keydiff.counts.even == packed.counts.even == 75
    slot = keydiff.position[1, 1].long()
    assert torch.equal(keydiff.decode()[0][1, 1], keys[1, 1, slot])
    assert torch.equal(keydiff.position, packed.position)
    assert packed.nbytes < keydiff.nbytes < KV.of(keys, values).nbytes


def plain_model(layers: list[list[Tensor]], x: Tensor) -> Tensor:
    for wq, wk, wv, wo in layers:
        q = (x @ wq).unflatten(2, (4, -1)).transpose(1, 2)
        k, v = ((x @ w).unflatten(2, (2, -1)).transpose(1, 2).repeat_interleave(2, 1) for w in (wk, wv))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) @ wo
    return x


def test_own_loop_with_a_budget_for_everything_is_plain_attention():
    layers = [[torch.randn(64, width) / 5 for width in (64, 32, 32, 64)] for _ in range(2)]
    x = torch.randn(2, 50, 64)
    out, cache = example.own_loop(layers, x, prompt=40, policy=H2O(50))
    torch.testing.assert_close(out, plain_model(layers, x), atol=1e-4, rtol=1e-4)
    small, _ = example.own_loop(layers, x, prompt=40, policy=H2O(10))
    torch.testing.assert_close(small[:, :40], out[:, :40])  # the prompt is attended before it is compressed
    assert not torch.allclose(small[:, 40:], out[:, 40:], atol=1e-2)
    received = cache[0].column("attention")  # each query hands out 1 per query head
    torch.testing.assert_close(received.sum(-1), torch.full((2, 2), 50 * 2.0))


@pytest.mark.parametrize(
    "policy",
    [H2O(12) | KIVI(2, 8, 8), H2O(0.4, recent=3), SnapKV(14, window=6), TOVA(9) | KIVI(4, 8, 0), KeyDiff(10)],
    ids=str,
)
@torch.no_grad()
def test_own_loop_is_what_the_cache_does(policy, tiny, monkeypatch):
    """The queries, keys and values that a cache's layers got, fed to the loop's layers: same slots, bytes, outputs."""
    model, _ = tiny
    fed: list[list[Any]] = []
    attend = PolicyLayer.attend

    def noted(layer: PolicyLayer, module: Any, query: Tensor, *args: Any, **geometry: Any) -> Tensor:
        keys, values = layer._pending
        out = attend(layer, module, query, *args, **geometry)
        fed[-1].append((query, keys, values, out))
        return out

    monkeypatch.setattr(PolicyLayer, "attend", noted)
    cache, ids = CompressedCache(model, policy), torch.randint(2, 200, (2, 40))
    none = torch.empty(2, 2, 0, 32)
    columns = {"attention": none[..., 0]} if "attention" in policy.needs else {}
    own = [KV.of(none, none).with_columns(**columns) for _ in range(2)]
    prompt, seen = torch.tensor([31, 31]), 0
    for part in ids.split([31, *[1] * 9], dim=1):
        fed.append([])
        model(part, past_key_values=cache)
        step = partial(example.attend_and_compress, policy=policy, seen=torch.tensor([seen, seen]), prompt=prompt)
        for i, (*new, out) in enumerate(fed[-1]):
            mine, own[i] = step(own[i], tuple(new), layer=i)
            torch.testing.assert_close(mine, out, atol=1e-5, rtol=1e-5)
            held = cache.layers[i].kv
            assert torch.equal(own[i].position.expand(2, 2, -1), held.position.expand(2, 2, -1))
            assert torch.equal(own[i].decode()[0], held.decode()[0]) and own[i].nbytes == held.nbytes
        seen += part.shape[1]


def test_generate():
    prompt = document(3, 10)
    text, cache = example.generate(prompt, None, 20)
    path = Path(kvbench.__file__).parent / "assets" / "proving"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(prompt, return_tensors="pt")
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=20, min_new_tokens=20)
    assert text == tokenizer.decode(plain[0])
    (whole, full), (cut, small) = (example.generate(prompt, H2O(n), 20) for n in (int(cache.layers[0].seen), 12))
    assert whole == text and cut != text
    assert small.kept(0).shape[-1] == 12 and small.nbytes < full.nbytes
