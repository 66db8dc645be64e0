"""Engines by name."""

from __future__ import annotations

import difflib

from sparkproof.engines.base import Engine
from sparkproof.errors import UserError

NAMES = ("hf", "liger", "unsloth", "sparktune")


def engine(name: str) -> Engine:
    """The adapter called `name`. UserError with the nearest name for another; EngineUnavailable where it can't run."""
    match name:
        case "hf":
            from sparkproof.engines.hf import HfEngine

            return HfEngine()
        case "sparktune":
            from sparkproof.engines.sparktune import SparktuneEngine

            return SparktuneEngine()
        case "unsloth":
            from sparkproof.engines.unsloth import UnslothEngine, require_unsloth

            require_unsloth()
            return UnslothEngine()
        case "liger":
            from sparkproof.engines.liger import LigerEngine, require_liger

            require_liger()
            return LigerEngine()
    near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)
    raise UserError(f"There is no engine '{name}'.", f"Did you mean '{near[0]}'? Engines: {', '.join(NAMES)}.")


def import_first(name: str) -> None:
    """Import what wants to come before transformers and PEFT: Unsloth replaces parts of both, and warns when it is late."""
    if name == "unsloth":
        import unsloth  # noqa: F401
