"""kvbench: measure stacks of KV-cache eviction and quantization."""

from kvbench._guard import check_links

check_links()

from kvbench.cache import CompressedCache  # noqa: E402  (a broken checkout must say so first)

__version__ = "0.1.0"
__all__ = ["CompressedCache"]
