"""sparktune: fused ops, model patches, 4-bit loading and export for fine-tuning on a DGX Spark.

    from sparktune import FastLanguageModel

is what fine-tuning needs; it has the names and meanings of Unsloth's class. Importing `sparktune` alone loads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparktune.interface import FastLanguageModel as FastLanguageModel
    from sparktune.interface import is_bfloat16_supported as is_bfloat16_supported
    from sparktune.models.checkpointing import set_memory_budget as set_memory_budget
    from sparktune.models.graphs import use_cuda_graphs as use_cuda_graphs
    from sparktune.planning import plan as plan

_LAZY = {
    "FastLanguageModel": "sparktune.interface",
    "is_bfloat16_supported": "sparktune.interface",
    "plan": "sparktune.planning",
    "set_memory_budget": "sparktune.models.checkpointing",
    "use_cuda_graphs": "sparktune.models.graphs",
}


def __getattr__(name: str) -> Any:
    """The interface, at its first use: torch and transformers take seconds to import."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sparktune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
