"""`yardstick_host_embedding` with activations in host memory too, as much of a layer as is copied while the next one runs."""

from __future__ import annotations

import os
from typing import Any

from sparkproof.bench import yardstick, yardstick_host_embedding


def build(model_dir: str, a: Any) -> dict[str, Any]:
    """As `yardstick.build` with the embedding and most activations in pinned host memory."""
    os.environ[yardstick.OFFLOAD] = "1"
    return yardstick_host_embedding.build(model_dir, a)
