"""Fused Triton ops, one a file, each with its maths, reference, kernels and contract (`OP`).

`discover()` finds them by scanning this package, so an op is added by adding its file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparktune.ops.spec import OpSpec


def op_names() -> list[str]:
    """Names of all ops, sorted."""
    return list(discover())


def discover() -> dict[str, OpSpec]:
    """Op name -> its spec, for every module of this package that has an `OP`. Errors: ValueError on a wrong name."""
    found: dict[str, OpSpec] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        op = getattr(module, "OP", None)
        if op is None:
            continue
        if op.name != info.name:
            raise ValueError(f"{info.name}.py declares an op called {op.name}; name it after its file")
        found[op.name] = op
    return dict(sorted(found.items()))
