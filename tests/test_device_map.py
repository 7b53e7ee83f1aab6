"""Models that accelerate spreads over devices: hooks move weights and inputs, and results are those of one device."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvbench.engine import run_stacks
from kvbench.policies import H2O, KIVI, Full, Quest, SnapKV, StreamingLLM
from kvbench.sweep import load_model
from kvbench.tasks import Recall

pytest.importorskip("accelerate")

STACKS = [
    Full(),
    H2O(memory=0.25) | KIVI(bits=4, residual=32),
    SnapKV(budget=0.25, window=8),
    StreamingLLM(budget=64),
    Quest(budget=64),
]


def predictions(model, tokenizer):
    runs = run_stacks(model, tokenizer, Recall(length=320, needles=2, count=3), STACKS, batch_size=2)
    return [[(row["prediction"], row["kv_bytes_final"]) for row in run.rows] for run in runs]


def placed(first, second):
    """A device map of the tiny model: all but the last layer and the head on `first`."""
    names = ("model.embed_tokens", "model.layers.0", "model.rotary_emb")
    return {**dict.fromkeys(names, first), **dict.fromkeys(("model.layers.1", "model.norm", "lm_head"), second)}


def test_weights_that_stay_on_disk_change_nothing(tiny, tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder, dtype=torch.float32, device_map=placed("cpu", "disk"), offload_folder=tmp_path
    )
    assert "disk" in model.hf_device_map.values()
    assert predictions(model.eval(), tiny[1]) == predictions(*tiny)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_what_one_does(tiny, tiny_folder):
    model, tokenizer = load_model("tiny", str(tiny_folder), "float32", device_map=placed(0, 1))
    assert predictions(model, tokenizer) == predictions(*load_model("tiny", str(tiny_folder), "float32"))
