"""Classes that take the place of transformers' own, made from a family's class and a forward of ours.

A swapped class is a subclass of what it replaces, made once for each: `isinstance`, weights, saving and PEFT's dispatch see
no difference, and giving the instance its old class back undoes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


def always(module: Any) -> str:
    """A rule's condition that never refuses."""
    return ""


@dataclass(frozen=True)
class Rule:
    """Modules of exactly the class `source` become `target`, which runs `op`, unless `refuse` gives a reason."""

    op: str
    source: type[nn.Module]
    target: type[nn.Module]
    refuse: Callable[[Any], str] = always  # module -> why not, or ""


@functools.cache
def swapped(source: type[nn.Module], mixin: type, **options: Any) -> type[nn.Module]:
    """A subclass of `source` with `mixin` before it and `options` as class attributes.

    It keeps the name: save_pretrained writes a model's class to config.json, Trainer's label smoothing shifts labels only
    under names it knows, and transformers finds what to record of a module by its class's. The module tells them apart.
    """
    body = {"__module__": mixin.__module__, "__doc__": mixin.__doc__, **options}
    return type(source.__name__, (mixin, source), body)


def rule(op: str, source: type[nn.Module], mixin: type, refuse: Callable[[Any], str] = always, **options: Any) -> Rule:
    """The rule that swaps `source` for `mixin` over it; `options` are attributes that the mixin reads."""
    target: type[nn.Module] = swapped(source, mixin, **options)  # type: ignore[arg-type]
    return Rule(op, source, target, refuse)
