"""What is measured: one file an engine, each with `BUILDERS` (op -> how to build a call), and why an op is missing.

A file has `BUILDERS: dict[str, Builder]`; `WRITES`: ops whose calls write over their inputs, gradients or what they saved,
so that they get copies of their own; `MISSING`: op -> why the engine has none; `refusal()`: why it can't run here, or "".
Builders import what they call themselves, so that an op that is not there breaks its own row alone. A call takes one set of
inputs and gives its outputs as a tuple, heads as [batch, tokens, heads, head_dim] whatever the library's own order is.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

NAMES = ("sparktune", "hf", "compiled", "liger", "unsloth")  # Unsloth last: importing it changes other libraries
WORDS = {
    "sparktune": "sparktune",
    "hf": "transformers, PEFT, bitsandbytes",
    "compiled": "the same under torch.compile",
    "liger": "Liger-Kernel",
    "unsloth": "Unsloth",
}
PACKAGES = {"sparktune": "", "hf": "transformers", "compiled": "torch", "liger": "liger_kernel", "unsloth": "unsloth"}


def load(name: str) -> ModuleType:
    """An engine's file; imports nothing of the library itself."""
    return importlib.import_module(f"{__name__}.{name}")


def refusal(name: str) -> str:
    """Why an engine can't be measured here, or ""."""
    package = PACKAGES[name]
    if package and importlib.util.find_spec(package) is None:
        return f"{WORDS[name]} is not installed (no package {package})"
    return str(load(name).refusal())


def version(name: str) -> str:
    """The version of its package, or ""."""
    package = PACKAGES[name] or "sparkproof"
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return ""
