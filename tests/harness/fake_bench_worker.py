"""Stands in for `sparkproof.bench.train.worker`: answers each task from PLAN, a JSON file named in the environment.

PLAN: engine -> {"ms": milliseconds a step, "loss", "norm", "copy", "notes", "missing", "raise", "from_round"}. ORDER names the
file where each writes that it came.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def answer(task: dict[str, Any]) -> dict[str, Any]:
    setting = task["setting"]
    with open(os.environ["ORDER"], "a", encoding="utf-8") as f:
        f.write((task["engine"] or task["stage"]) + "\n")
    if task["stage"] == "prepare":
        return {
            "bytes": 10,
            "device": "Imaginary GPU",
            "multiprocessors": 4,
            "memory_gib": 8.0,
            "versions": {"torch": "2"},
        }
    if task["stage"] == "calibrate":
        return {"floor_ms": 5.0, "parts": {"o": 2.0, "attention": 3.0}, "attention": {"flash": "no"}}
    plan = json.loads(Path(os.environ["PLAN"]).read_text(encoding="utf-8")).get(task["engine"], {})
    came = Path(os.environ["ORDER"]).read_text(encoding="utf-8").split().count(task["engine"])
    if "missing" in plan:
        return {"missing": plan["missing"]}
    if "raise" in plan and came >= plan.get("from_round", 1):
        raise RuntimeError(plan["raise"])
    return {
        "step_ms": [plan.get("ms", 10.0) * (1 + 0.001 * i) for i in range(setting["steps"])], "forward_ms": 3.0,
        "backward_ms": 6.0, "optimizer_ms": 1.0, "wall_ms": 10.0, "load_s": 1.0, "first_step_s": 2.0 / came,
        "loss": [plan.get("loss", 12.0)], "gradient_norm": [plan.get("norm", 1.0)], "trainable": 1, "versions": {"unsloth": "9"},
        "memory": {"peak_allocated_gib": 69.0 + came, "peak_reserved_gib": 75.3, "host_pinned_peak_gib": 0.5},
        "copy_gb_s": plan.get("copy", 100.0), "notes": plan.get("notes", {}),
    }  # fmt: skip


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        found = {"result": answer(task)}
    except RuntimeError as e:
        found = {"error": {"type": "RuntimeError", "message": str(e), "stage": "", "traceback": ""}}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
