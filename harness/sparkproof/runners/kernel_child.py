"""What a kernel case does in its own process: the far side of `runners/kernel.py`.

TRITON_INTERPRET, or its absence, was set by the parent before this process imported Triton.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from sparkproof.runners.child import progress, under_test


def main(payload: dict[str, Any]) -> dict[str, Any]:
    """Run one task. `payload`: task, op, dtype, variant (empty: all)."""
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")  # NaN and Inf are planted on purpose
    task = payload["task"]
    if os.environ.get("TRITON_INTERPRET") == "1":
        from sparkproof.judge.interpreter import unable

        if why := unable():
            return {"unable": why}
    if task == "mutants":
        from sparkproof.judge import selftest

        return selftest.one(payload["op"])
    with under_test("importing sparktune"):
        from sparktune.ops import dispatch, load_op
        from sparktune.ops.spec import DTYPES

        spec = load_op(payload["op"])
    dtype = DTYPES[payload["dtype"]]
    variants = [payload["variant"]] if payload["variant"] else list(spec.variants)
    if task == "correctness":
        from sparkproof.judge.correctness import judge

        return judge(spec, dtypes=[dtype], variants=variants, progress=progress).document()
    if task == "speed":
        from sparkproof.judge import speed

        dispatch.reset()
        with under_test("timing the kernel"):
            document = speed.measure(spec, dtype, variants[0], progress)
        return document | {"watermarks": dispatch.watermarks()[spec.name], "variant": variants[0]}
    raise ValueError(f"unknown task {task}")
