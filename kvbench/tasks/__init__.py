"""Benchmarks built from generated text: a task draws samples for a tokenizer and scores predictions.

Every task is a frozen dataclass with `name`, `kind` ("generate" or "nll"), `samples(tokenizer)` and, where text is
generated, `score(sample, prediction)` in [0, 1].
"""

from kvbench.tasks.niah import Niah
from kvbench.tasks.ppl import Ppl
from kvbench.tasks.recall import Recall
from kvbench.tasks.sample import Sample, Turn

__all__ = ["Niah", "Ppl", "Recall", "Sample", "Turn"]
