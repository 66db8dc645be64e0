"""What is measured beside each other: one file an engine, each a table of builders.

A builder takes a case and one set of inputs (`bench.inputs`) and gives a call without arguments, whose results are a
tuple of tensors in the layout of the inputs. What an engine has no op for stands in its `ABSENT`, with the reason.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparkproof.bench.inputs import Builder

NAMES = ("sparktune", "hf", "compiled", "liger", "unsloth")  # Unsloth last: its import changes what others imported
TITLES = {
    "sparktune": "sparktune",
    "hf": "transformers, PEFT and bitsandbytes",
    "compiled": "torch.compile of those",
    "liger": "Liger-Kernel",
    "unsloth": "Unsloth",
}


@dataclass(frozen=True)
class Engine:
    """One engine, or why it can't be had here."""

    name: str
    builders: dict[str, Builder] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    missing: str = ""
    version: str = ""
    notes: tuple[str, ...] = ()

    def without(self, op: str) -> str:
        """Why it has no row of this op; empty where it has one."""
        if self.missing:
            return self.missing
        return "" if op in self.builders else self.absent.get(op, "it has no such op")


def load(names: Sequence[str] = NAMES) -> list[Engine]:
    """The named engines in their order; one that fails to import says so."""
    found = []
    for name in NAMES:
        if name not in names:
            continue
        try:
            module = importlib.import_module(f"{__name__}.{name}")
            notes = tuple(getattr(module, "NOTES", ()))
            found.append(Engine(name, module.BUILDERS, getattr(module, "ABSENT", {}), "", module.version(), notes))
        except Exception as e:  # whatever an import of another's package raises, the others are measured
            found.append(Engine(name, missing=f"{type(e).__name__}: {str(e).strip()[:300]}"))
    return found
