"""How far one set of gradients lies from another, without loading torch into the process that judges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[np.float32]]


def compare_files(ours: Path, reference: Path) -> dict[str, Any]:
    """`compare` on two safetensors files of fp32."""
    from safetensors.numpy import load_file

    return compare(load_file(ours), load_file(reference))


def compare(ours: Tensors, reference: Tensors) -> dict[str, Any]:
    """Relative L2 distance over all tensors as one vector, the worst tensor's own, and which of ours are all zero.

    Tensors that only one side has, or of unequal shape, make both distances infinite.
    """
    names = ours.keys() | reference.keys()
    differ = sorted(n for n in names if _shape(ours, n) != _shape(reference, n))
    zero = sorted(n for n, g in ours.items() if not g.any())
    if differ or not ours:
        return _result(math.inf, "", math.inf, zero, len(ours), differ)
    squared = {n: float(np.square(ours[n].astype(np.float64) - reference[n]).sum()) for n in reference}
    norms = {n: float(np.square(reference[n].astype(np.float64)).sum()) for n in reference}

    def ratio(error: float, norm: float) -> float:
        return math.sqrt(error / norm) if norm else math.inf

    worst = max(squared, key=lambda n: _nan_first(ratio(squared[n], norms[n])))
    total = ratio(sum(squared.values()), sum(norms.values()))
    return _result(total, worst, ratio(squared[worst], norms[worst]), zero, len(ours), [])


def _shape(tensors: Tensors, name: str) -> tuple[int, ...] | None:
    return tensors[name].shape if name in tensors else None


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _result(
    relative: float, worst: str, worst_relative: float, zero: list[str], tensors: int, differ: list[str]
) -> dict[str, Any]:
    return {
        "relative": relative,
        "worst": worst,
        "worst_relative": worst_relative,
        "zero": zero,
        "tensors": tensors,
        "names_differ": differ,
    }
