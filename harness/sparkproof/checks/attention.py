"""Which implementations of attention work here, and do they compute what they should?

Every backend may refuse a dtype, a head size or a direction, and many do by design. What is wrong is one that runs
and computes something else, or a common case that only the slow mathematical path takes.
"""

from __future__ import annotations

from sparkproof.checks.finding import Severity
from sparkproof.checks.gpu import NO_USABLE_GPU
from sparkproof.checks.registry import LATE, Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts
from sparkproof.facts.tried import Attention

# Relative L2 against float64: bf16 keeps 8 bits, fp16 11, fp32 may go through TF32's 11.
BOUNDS = {"bf16": 0.03, "fp16": 0.006, "fp32": 0.006}
FUSED = ("flash", "efficient", "cudnn")
COMMON_HEADS = (64, 128)


@check("attention.backends")
def backends(facts: Facts) -> Answer:
    """Row 25: by dtype, direction and head size."""
    if not _usable(facts):
        return NO_USABLE_GPU
    rows = [r for r in facts.tried.attention or [] if r.backend in (*FUSED, "math")]
    if not rows:
        return NotRead("the attention backends, which were not tried")
    found = []
    wrong = [r for r in rows if r.error is not None and not r.error <= BOUNDS[r.dtype]]
    for dtype in sorted({r.dtype for r in wrong}):
        which = "; ".join(f"{_name(r)} is off by {r.error:.2g}" for r in wrong if r.dtype == dtype)
        found.append(Found(which, severity=Severity.WARNING if dtype == "fp32" else Severity.ERROR))
    broken = [r for r in rows if r.refused and "the trial stopped" in r.refused]
    found += [Found(f"{_name(r)}: {r.refused}", severity=Severity.ERROR) for r in broken]
    slow = []
    for size in COMMON_HEADS:
        for direction in ("forward", "backward"):
            same = [r for r in rows if (r.dtype, r.head_size, r.direction) == ("bf16", size, direction)]
            if same and not any(_works(r) for r in same if r.backend in FUSED):
                slow.append(f"{direction} with heads of {size}")
    if slow:
        found.append(
            Found(
                f"no fused backend works in bf16: {', '.join(slow)}",
                severity=Severity.WARNING,
                cause="Only the mathematical path is left, which keeps the whole score matrix: slow, and large.",
            )
        )
    working = [f"{b} {sum(_works(r) for r in rows if r.backend == b)}" for b in dict.fromkeys(r.backend for r in rows)]
    return found or Ok(f"right in all that ran, cases a backend: {', '.join(working)}")


@check("attention.flex")
def flex(facts: Facts) -> Answer:
    """Row 33: compiled with an empty cache, since a warm one hides it."""
    if not _usable(facts):
        return NO_USABLE_GPU
    rows = [r for r in facts.tried.attention or [] if r.backend == "flex"]
    if not rows:
        return NotRead("flex_attention, which was not tried")
    late = next((r.refused for r in rows if r.refused and LATE in r.refused), None)
    if late:  # too slow to compile in the time given is no proof of anything
        return NotRead(f"flex_attention: {late}")
    found = [Found(f"{_name(r)}: {r.refused or f'off by {r.error:.2g}'}") for r in rows if not _works(r)]
    return found or Ok("flex_attention with heads of 256 compiled and was right, forward and backward")


@check("attention.extensions")
def extensions(facts: Facts) -> Answer:
    """Rows 25 to 27: a compiled extension that is installed must import and compute."""
    tried = [e for e in facts.tried.extensions if e.name != "torchvision"]
    installed = [n for n in ("flash-attn", "xformers", "causal-conv1d", "mamba-ssm") if n in facts.packages]
    if not installed:
        return NotApplicable("none of flash-attn, xformers, causal-conv1d and mamba-ssm is installed")
    if not _usable(facts):
        return NO_USABLE_GPU
    if not tried:
        return NotRead(f"whether {', '.join(installed)} work")
    found = [
        Found(f"{e.name} {e.version or ''}: {e.error}".replace(" :", ":"), fix=f"pip uninstall {e.name}")
        for e in tried
        if e.error
    ]
    return found or Ok(f"{', '.join(f'{e.name} {e.version}' for e in tried)} computed what they should")


def _usable(facts: Facts) -> bool:
    return facts.gpu is not None and facts.gpu.usable_by_torch is True


def _works(r: Attention) -> bool:
    return r.error is not None and r.error <= BOUNDS[r.dtype]


def _name(r: Attention) -> str:
    return f"{r.backend} {r.direction} in {r.dtype} with heads of {r.head_size}"
