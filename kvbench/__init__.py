"""kvbench: measure stacks of KV-cache eviction and quantization."""

__version__ = "0.1.0"
