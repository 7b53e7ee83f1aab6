"""Benchmarks built from generated text: a task draws samples for a tokenizer and scores predictions.

Every task is a frozen dataclass with `name`, `kind` ("generate" or "nll"), `samples(tokenizer)` and, where text is
generated, `score(sample, prediction)` in [0, 1].
"""

from kvbench.tasks.fidelity import Fidelity, FidelityOf
from kvbench.tasks.long_decode import Gsm8k, Math, Recite
from kvbench.tasks.longbench import LongBench
from kvbench.tasks.longbench_v2 import LongBenchV2
from kvbench.tasks.multi_query import MultiQuery
from kvbench.tasks.niah import Niah
from kvbench.tasks.niah_sentence import NiahSentence
from kvbench.tasks.ppl import Ppl
from kvbench.tasks.recall import Recall
from kvbench.tasks.ruler import Ruler
from kvbench.tasks.sample import Sample, Turn
from kvbench.tasks.scbench import SCBench

__all__ = [
    "Fidelity",
    "FidelityOf",
    "Gsm8k",
    "LongBench",
    "LongBenchV2",
    "Math",
    "MultiQuery",
    "Niah",
    "NiahSentence",
    "Ppl",
    "Recall",
    "Recite",
    "Ruler",
    "SCBench",
    "Sample",
    "Turn",
]
