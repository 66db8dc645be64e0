"""Step-0 agreement with a reference, put together from the gradients that the phases left in files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sparkproof.runners.gradients import compare_files

Gradients = dict[str, dict[str, Any]]  # "fp32" or "bf16" -> loss, file, tensors


def parity(own: Gradients, reference: Gradients, name: str) -> dict[str, Any]:
    """What the gate judges: `reference` (its name), `fp32` and `bf16` (None where not computed).

    Each of the two has the losses, the root mean square difference of the single tokens' losses, and what
    `gradients.compare` gives. The reference of both is the one in fp32; `bf16` also has how far the reference's own bf16
    gradients and token losses lie from it.
    """
    exact = reference["fp32"]
    found: dict[str, Any] = {"reference": name, "fp32": None, "bf16": None}
    for compute in ("fp32", "bf16"):
        if compute in own:
            ours = own[compute]
            found[compute] = {
                "loss": ours["loss"],
                "reference_loss": exact["loss"],
                "token_rms": rms(ours["token_losses"], exact["token_losses"]),
                **compare_files(Path(ours["file"]), Path(exact["file"])),
            }
    if found["bf16"]:
        itself = compare_files(Path(reference["bf16"]["file"]), Path(exact["file"]))
        found["bf16"]["reference_relative"] = itself["relative"]
        found["bf16"]["reference_token_rms"] = rms(reference["bf16"]["token_losses"], exact["token_losses"])
    return found


def rms(ours: list[float], reference: list[float]) -> float:
    """Root mean square difference; infinite when the lengths differ or there is nothing to compare."""
    if not ours or len(ours) != len(reference):
        return math.inf
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(ours, reference, strict=True)) / len(ours))
