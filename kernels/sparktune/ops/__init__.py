"""Fused Triton ops, one a file, each with its maths, reference, kernels and contract (`OP`).

`discover()` finds them by scanning this package, so an op is added by adding its file.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparktune.ops.spec import OpSpec


def op_names() -> list[str]:
    """Names of all ops, sorted: the files here that declare an `OP`. Imports none of them, and so not torch."""
    files = (Path(folder) / f"{info.name}.py" for folder in __path__ for info in pkgutil.iter_modules([folder]))
    return sorted(f.stem for f in files if "\nOP = OpSpec(" in f.read_text(encoding="utf-8"))


def load_op(name: str) -> OpSpec:
    """One op's spec; imports its file alone. Errors: KeyError for an unknown op, ValueError where the name is not its file's."""
    if name not in op_names():
        raise KeyError(name)
    spec: OpSpec = importlib.import_module(f"{__name__}.{name}").OP
    if spec.name != name:
        raise ValueError(f"{name}.py declares an op called {spec.name}; name it after its file")
    return spec


def discover() -> dict[str, OpSpec]:
    """Op name -> its spec, for every op. Errors: ValueError on a wrong name."""
    return {name: load_op(name) for name in op_names()}
