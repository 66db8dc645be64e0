"""Step-0 agreement with a reference, put together from the gradients that the phases left in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparkproof.runners.gradients import compare_files

Gradients = dict[str, dict[str, Any]]  # "fp32" or "bf16" -> loss, file, tensors


def parity(own: Gradients, reference: Gradients, name: str) -> dict[str, Any]:
    """What the gate judges: `reference` (its name), `fp32` and `bf16` (None where not computed).

    Each of the two has the losses and what `gradients.compare` gives. The reference of both is the one in fp32; `bf16`
    also has how far the reference's own bf16 gradients lie from it.
    """
    exact = reference["fp32"]
    found: dict[str, Any] = {"reference": name, "fp32": None, "bf16": None}
    for compute in ("fp32", "bf16"):
        if compute in own:
            ours = own[compute]
            found[compute] = {
                "loss": ours["loss"],
                "reference_loss": exact["loss"],
                **compare_files(Path(ours["file"]), Path(exact["file"])),
            }
    if found["bf16"]:
        itself = compare_files(Path(reference["bf16"]["file"]), Path(exact["file"]))
        found["bf16"]["reference_relative"] = itself["relative"]
    return found
