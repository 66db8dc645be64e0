"""`yardstick` with all the memory it can use, so that one run can set both beside the same peers."""

from __future__ import annotations

import os
from typing import Any

from sparkproof.bench import yardstick


def build(model_dir: str, a: Any) -> dict[str, Any]:
    """As `yardstick.build` with a memory budget without limit."""
    os.environ[yardstick.BUDGET] = "inf"
    os.environ.pop(yardstick.OFFLOAD, None)
    return yardstick.build(model_dir, a)
