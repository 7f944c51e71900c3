"""How many compiled products oneDNN keeps on a CPU: by default 1,024 twice, which can be a GiB of a training.

It compiles a product anew for every number of rows, and micro-batches have ever other ones.
"""

from __future__ import annotations

import os

KEPT = "256"
"""Products kept; one micro-batch of a Llama with LoRA has about 60, its attention included."""


def limit_kernels() -> None:
    """Have oneDNN and torch's own list of its products keep fewer, unless the environment says how many.

    It has an effect where no product was computed in this process before.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, KEPT)
