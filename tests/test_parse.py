"""Policies from text: what `str` writes is read back, nothing is evaluated, errors are one line."""

from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from kvbench.baselines import Baseline
from kvbench.parse import PolicyTextError, parse
from kvbench.policies import FP8, H2O, KIVI, POLICIES, AdaKV, Full, Mixed, Quantizer, SnapKV, Stack, StreamingLLM
from kvbench.sweep import make_evictor

CONF = Path(__file__).resolve().parents[1] / "conf"


@pytest.mark.parametrize("path", sorted((CONF / "evict").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_evictor_of_the_configs_is_read_back(path):
    for budget in ({"budget": 0.3}, {"budget": 512}, {"memory": 0.25}):
        evict = make_evictor(OmegaConf.load(path), {} if path.stem == "full" else budget)
        for stack in (evict, evict | KIVI(2, residual=64)):
            assert parse(str(stack)) == Stack(tuple(p for p in Stack((stack,)).policies if not isinstance(p, Full)))


@pytest.mark.parametrize("path", sorted((CONF / "quant").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_quantizer_of_the_configs_is_read_back(path):
    quant = hydra.utils.instantiate(OmegaConf.load(path))
    if isinstance(quant, Baseline):
        with pytest.raises(PolicyTextError, match="no policy named 'Baseline'"):
            parse(str(quant))
    elif not isinstance(quant, Full):
        assert parse(str(quant)) == Stack((quant,))
        if isinstance(quant, Quantizer):
            assert parse(str(quant.keys & FP8().values)) == Stack((quant.keys & FP8().values,))


@pytest.mark.parametrize(
    ("text", "stack"),
    [
        ("H2O(0.25)|KIVI(2)", H2O(0.25) | KIVI(2)),
        (" H2O(0.25, recent=32) | KIVI(bits=2, residual=64) ", H2O(0.25, recent=32) | KIVI(bits=2, residual=64)),
        ("KIVI(2).keys & FP8().values", KIVI(2).keys & FP8().values),
        ("FP8().values & KIVI(2).keys", KIVI(2).keys & FP8().values),
        ("SnapKV(memory=0.5) | KIVI(4).keys & FP8().values", SnapKV(memory=0.5) | (KIVI(4).keys & FP8().values)),
        ("Mixed(k=KIVI(bits=4), v=None)", Mixed(k=KIVI(bits=4), v=None)),
        ("AdaKV(base=SnapKV(0.25), floor=0.1)", AdaKV(base=SnapKV(0.25), floor=0.1)),
        ("(StreamingLLM(64, positions='original'))", StreamingLLM(64, positions="original")),
        ("Full()", Stack(())),
        ("Full() | FP8() | Full()", FP8()),
    ],
)
def test_what_python_would_make_of_it(text, stack):
    assert parse(text) == Stack((stack,))
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("H20(0.25)", "no policy named 'H20' in kvbench.policies; there are: " + ", ".join(POLICIES)),
        ("H2O(0.25) | KIVY(2)", "no policy named 'KIVY'"),
        ("H2O", r"write H2O\(\)"),
        ("H2O(0.25, decay=1)", "H2O has no setting 'decay'; there are: budget, "),
        ("H2O(**{})", "H2O has no setting None"),
        ("H2O(1.5)", "H2O: budget=1.5 as a share must be above 0"),
        ("H2O(0.25, budget=0.5)", "H2O: got multiple values for argument 'budget'"),
        ("KIVI(1, 2, 3, 4, 5, 6, 7)", "KIVI: takes .* positional arguments"),
        ("AdaKV()", "AdaKV: missing 1 required"),
        ("H2O(0.25) + KIVI(2)", "neither a policy nor a literal"),
        ("H2O(0.25) | 4", "4 is not a policy"),
        ("", "cannot read the policy ''"),
        ("H2O(0.25", "cannot read the policy"),
        ("H2O(0.25)\0", "cannot read the policy"),
        ("(" * 1000, "cannot read the policy"),
        ("KIVI(2).keys", r"KIVI\(2\).keys is not a policy"),
        ("KIVI(2).bits", r"KIVI\(2\).bits is not one side"),
        ("H2O(0.25).keys & FP8().values", "is not a quantizer, so it has no .keys"),
        ("KIVI(2).keys & FP8().keys", "& takes one side of keys and one of values"),
        ("KIVI(2) & FP8()", r"KIVI\(2\) is not one side"),
        ("__import__('os').system('false')", "is not the name of a policy"),
        ("Policy()", "no policy named 'Policy'"),
        ("H2O(budget=open('x'))", "no policy named 'open'"),
        ("H2O(budget=[x for x in ()][0])", "neither a policy nor a literal"),
    ],
)
def test_errors_are_one_line(text, message):
    with pytest.raises(PolicyTextError, match=message) as error:
        parse(text)
    assert "\n" not in str(error.value)
