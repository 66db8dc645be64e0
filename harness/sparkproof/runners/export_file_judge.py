"""Judging the exported file itself, whatever reads it: whole, of the right types and size, and the right weights in it."""

from __future__ import annotations

import math
from typing import Any

from sparkproof.results import Assertion
from sparkproof.runners.export_formats import BITS, FORMATS, allowed

OVERHEAD = 32 << 20  # vocabulary, merges and headers
TIMES = 0.05  # how far from once: the rounding of a 4-bit type is not quite orthogonal to the update
ROPE = 1e-5  # factors and bases are stored in fp32
FEW = ("token_embd", "output", "ffn_gate_inp")  # no majority is asked of these
LEFT = ("ffn_gate_inp", "attn_sinks", "exp_probs_b", ".bias")  # routers, vectors, and experts' stacked biases stay F32


def judge(format_: str, seen: dict[str, Any]) -> list[Assertion]:
    """All that the file alone can show; `seen` has `file`, and unless it is broken what it should hold."""
    file = seen["file"]
    found = [whole(file)]
    if file["broken"]:
        return found
    found.append(types(format_, file["tensors"], seen["expected_type"]))
    found += [parameters(file["parameters"], seen["expected_parameters"]), size(file)]
    if seen.get("weights") is not None:
        found += [times(seen["weights"]), distance(seen["weights"])]
    if seen.get("rope") is not None:
        found.append(rope(seen["rope"]))
    return found


def whole(file: dict[str, Any]) -> Assertion:
    """No file ends early or is missing."""
    return Assertion(
        name="files that are not whole", passed=not file["broken"], value=len(file["broken"]), bound="0",
        detail="; ".join(file["broken"][:2]),
    )  # fmt: skip


def types(format_: str, tensors: dict[str, dict[str, Any]], sixteen: str = "BF16") -> Assertion:
    """Each tensor has a type that the format promises, and the format's own type is what most of a GGUF has."""
    wrong = []
    for name, t in tensors.items():
        wanted = expected_types(format_, name, t, sixteen)
        if t["type"] not in wanted:
            wrong.append(f"{name} is {t['type']}, not {' or '.join(sorted(wanted))}")
    counts: dict[str, int] = {}
    for t in tensors.values():
        counts[t["type"]] = counts.get(t["type"], 0) + 1
    main = FORMATS[format_].main
    matrices = [
        t for n, t in tensors.items()
        if main and len(t["shape"]) > 1 and not n.startswith(FEW) and main in expected_types(format_, n, t, sixteen)
    ]  # fmt: skip
    if matrices and format_ != "gguf_mxfp4":
        share = sum(math.prod(t["shape"]) for t in matrices if t["type"] == main) / sum(
            math.prod(t["shape"]) for t in matrices
        )
        if share < 0.4:
            wrong.append(f"{main} holds {share:.0%} of the weights that could have it")
    return Assertion(
        name="tensors of another type than the format's",
        passed=bool(tensors) and not wrong,
        value=len(wrong),
        bound="0",
        detail="; ".join(wrong[:2]) or ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "No tensors.",
    )


def expected_types(format_: str, name: str, tensor: dict[str, Any], sixteen: str) -> set[str]:
    """The types that one tensor may have.

    GGUF: vectors and routers F32; matrices the format's (`export_formats.allowed`). merged_16bit: `sixteen`, the base's 16-bit
    type. adapter: LoRA matrices only, F32 or 16 bits.
    """
    dims = tensor["shape"]
    floats = {"F32", "BF16", "F16"}
    match format_:
        case "merged_16bit":
            return {sixteen}
        case "adapter":
            return floats if ".lora_A." in name or ".lora_B." in name else {"LoRA in F32, BF16 or F16"}
    if len([d for d in dims if d > 1]) < 2 or any(part in name for part in LEFT):
        return {"F32"}
    return allowed(format_, dims[-1])


def parameters(found: int, expected: int) -> Assertion:
    """The file holds as many parameters as what it was made from."""
    return Assertion(
        name="parameters in the file", passed=found == expected > 0, value=found, bound=f"exactly {expected}"
    )


def size(file: dict[str, Any]) -> Assertion:
    """The file is as large as its tensors need, and not much larger."""
    need = sum(math.prod(t["shape"]) * BITS.get(t["type"], 0) / 8 for t in file["tensors"].values())
    return Assertion(
        name="file size",
        passed=0 < need <= file["bytes"] <= 1.05 * need + OVERHEAD,
        value=round(file["bytes"] / 2**20, 2),
        bound=f"{need / 2**20:.2f} to {(1.05 * need + OVERHEAD) / 2**20:.2f}",
        unit="MiB",
    )


def times(weights: dict[str, Any]) -> Assertion:
    """The adapter's update is in the weights once, at its own scale."""
    value = weights["times"]
    return Assertion(
        name="times that the update is in the weights",
        passed=weights["checked"] > 0 and abs(value - 1) <= TIMES,
        value=round(value, 4) if math.isfinite(value) else str(value),
        bound=f"1 within {TIMES:g}",
        detail=f"{weights['checked']} matrices were read. {diagnosis(weights)}".strip(),
    )


def distance(weights: dict[str, Any]) -> Assertion:
    """Weights are the 16-bit base's with the update, but for rounding to their type."""
    ok = weights["checked"] > 0 and weights["ratio"] <= 1
    return Assertion(
        name="distance of the weights from base and update",
        passed=ok,
        value=float(f"{weights['distance']:.3g}") if math.isfinite(weights["distance"]) else str(weights["distance"]),
        bound=f"what rounding to {weights['type'] or 'its type'} makes",
        unit="relative L2",
        detail=f"The largest of {weights['checked']} is {weights['name']}'s. {diagnosis(weights)}".strip(),
    )


def rope(found: dict[str, Any]) -> Assertion:
    """A GGUF's rotary frequencies are the base's."""
    return Assertion(
        name="RoPE of the file, largest distance of a frequency", passed=found["apart"] <= ROPE,
        value=float(f"{found['apart']:.3g}") if math.isfinite(found["apart"]) else str(found["apart"]), bound=f"<= {ROPE:g}",
        unit="relative", detail=f"The file says {found['said']}.",
    )  # fmt: skip


def diagnosis(weights: dict[str, Any]) -> str:
    """What the weights look like instead, if they are wrong."""
    return f"{weights['off']} are off; they look like {weights['nearest']}." if weights["off"] else ""
