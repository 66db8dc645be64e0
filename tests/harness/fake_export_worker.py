"""Stands in for the processes of `sparkproof bench export`: answers each phase from PLAN, a JSON file named in the environment.

PLAN: format -> {"bytes", "write_s", "decode", "proof", "refusal", "write_error", "read_raise", "from_round", "copy"};
"prepare" -> {"window", "user_error", "without_base_gguf"}. ORDER names the file where each writes that it came.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

CPU_PROOF = {"backend": "cpu", "weights_mib": {"cpu": 1.0}, "gpu_kernels": 0}


def answer(phase: str, task: dict[str, Any]) -> dict[str, Any]:
    key = task.get("format", phase)
    order = Path(os.environ["ORDER"])
    with order.open("a", encoding="utf-8") as f:
        f.write(f"{phase}:{key}\n" if key != phase else f"{phase}\n")
    plan = json.loads(Path(os.environ["PLAN"]).read_text(encoding="utf-8")).get(key, {})
    came = order.read_text(encoding="utf-8").split().count(f"{phase}:{key}")
    late = came >= plan.get("from_round", 1)
    if phase == "prepare":
        if "user_error" in plan:
            return {"user_error": plan["user_error"]}
        if task["base_gguf"]:
            Path(task["base_gguf"]).write_text("base")
        return {
            "base": {"path": "/base", "name": "imaginary", "revision": "abc"}, "adapter": "/adapter", "software": {"torch": "2"},
            "vocabulary": 100, "parameters": 1_000_000, "bytes": 2 << 20, "adapter_parameters": 10, "device": "Imaginary GPU",
            "window": plan.get("window", 8192), "without_base_gguf": plan.get("without_base_gguf", ""), "disk_full": False,
        }  # fmt: skip
    if phase == "write":
        if "write_error" in plan and late:
            return {"user_error": plan["write_error"]}
        out = Path(task["out"])
        if out.suffix == ".gguf":
            out.write_text("x")
        else:
            out.mkdir()
        return {
            "seconds": plan.get("write_s", 1.0), "peak_gib": 0.25, "gpu_gib": 0.0, "bytes": plan.get("bytes", 3 << 20),
            "types": {"Q4_K": 3, "Q5_0": 2} if "q4_k" in key else {}, "fallbacks": 2 if "q4_k" in key else 0,
            "why_no_peak": "",
        }  # fmt: skip
    assert Path(task["path"]).exists(), "the export is gone before it was read"
    if "read_raise" in plan and late:
        raise RuntimeError(plan["read_raise"])
    proof = plan.get("proof", CPU_PROOF)
    if "refusal" in plan and late:
        return {"proof": proof, "refusal": plan["refusal"]}
    rate = plan.get("decode", 50.0)
    return {
        "load_s": 2.0, "prefill_tokens_s": [10 * rate, 10.1 * rate], "decode_tokens_s": [rate, rate * 1.01], "peak_gib": 0.5,
        "gpu_gib": plan.get("gpu_gib"), "proof": proof, "why_no_peak": "", "copy_gb_s": plan.get("copy"), "versions": {},
    }  # fmt: skip


def main() -> None:
    entry, payload, result = sys.argv[1:4]
    task = json.loads(Path(payload).read_text(encoding="utf-8"))
    try:
        found = {"result": answer(entry.partition(":")[2], task)}
    except RuntimeError as e:
        found = {"error": {"type": "RuntimeError", "message": str(e), "stage": "", "traceback": ""}}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
