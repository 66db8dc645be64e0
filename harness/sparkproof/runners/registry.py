"""Runner of each kind, imported when first needed: torch takes seconds to import and most verbs don't need it."""

from __future__ import annotations

import importlib

from sparkproof.runners.base import Runner

_MODULES = {
    "environment": "sparkproof.runners.environment",
    "kernel": "sparkproof.runners.kernel",
    "train": "sparkproof.runners.train",
    "comparison": "sparkproof.runners.comparison",
    "fit": "sparkproof.runners.fit",
    "export": "sparkproof.runners.export",
    "rollback": "sparkproof.runners.rollback",
}


def runner(kind: str) -> Runner:
    """The `run` function of a kind's module."""
    found: Runner = importlib.import_module(_MODULES[kind]).run
    return found
