"""Can Triton assemble for GB10, and do the variables that are set do anything?

Compiling for sm_121 ahead of time needs no GB10, so on other machines the same failure is a warning instead of an
error.
"""

from __future__ import annotations

from sparkproof.checks.finding import Severity
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check, unanswered
from sparkproof.facts.model import TARGET_COMPUTE_CAPABILITY, Facts
from sparkproof.facts.toolchain import Ptxas
from sparkproof.results import ReasonClass


@check("triton.ptxas")
def ptxas(facts: Facts) -> Answer:
    """Row 16, by the assembler that is really used."""
    triton = facts.triton
    missing = _missing(facts)
    if missing:
        return missing
    live = _live(facts)
    if live is None or (live.knows_sm_121a is None and not live.error):
        return NotRead("whether the ptxas that Triton uses knows sm_121a")
    seen = f"triton {triton.version} takes {live.path} (ptxas {live.version or 'of unknown version'})"
    if live.knows_sm_121a:
        return Ok(f"{seen}, which assembles for sm_121a")
    on_target = facts.gpu is not None and facts.gpu.capability == TARGET_COMPUTE_CAPABILITY
    other = next((p for p in triton.ptxas if p.knows_sm_121a), None)
    better = other is not None and triton.live_variable is not None
    return Found(
        f"{seen}: {live.error or 'it does not know sm_121a'}",
        severity=None if on_target else Severity.WARNING,
        fix=f"export {triton.live_variable}={other.path}" if other is not None and better else None,
    )


@check("triton.variable")
def variable(facts: Facts) -> Answer:
    """Row 17: set, and not the one that moves Triton here; or the right one, with a path that does not work."""
    triton = facts.triton
    missing = _missing(facts)
    if missing:
        return missing
    if not triton.variables:
        return Ok("neither TRITON_PTXAS_PATH nor TRITON_PTXAS_BLACKWELL_PATH is set")
    trial = facts.tried.compilation
    proven = trial is not None and trial.live_variables is not None and len(trial.live_variables) == 1
    live_name = trial.live_variables[0] if proven else triton.live_variable  # type: ignore[union-attr, index]
    if live_name is None:
        return NotRead("which variable redirects this Triton")
    live = _live(facts)
    works = live is not None and live.knows_sm_121a is True
    found = []
    for name, path in triton.variables.items():
        if name == live_name:
            named = next((p for p in triton.ptxas if p.source == name), None)
            if named is not None and named.version is None:
                found.append(
                    Found(
                        f"{name}={path}: {named.error or 'no answer'}; Triton fell back to {triton.live_ptxas}",
                        cause="Triton passes over a path that does not work, without a word.",
                        fix=f"unset {name}",
                    )
                )
        else:
            shown = ", as a compilation with a failing assembler shows" if proven else ""
            harmless = ". Harmless: what it takes knows sm_121a" if works else ""
            found.append(
                Found(
                    f"{name}={path}, but triton {triton.version} takes {triton.live_ptxas}; only "
                    f"{live_name} would move it{shown}{harmless}",
                    severity=Severity.INFO if works else None,
                    fix=f"unset {name}" if works else f"export {live_name}={path}",
                )
            )
    return found or Ok(f"{live_name} is set and takes effect: {triton.live_ptxas}")


@check("triton.compile")
def compile_twice(facts: Facts) -> Answer:
    """Row 34 (and what a warm cache hides of rows 16 and 33): cold, from the cache, and anew must be one binary."""
    missing = _missing(facts)
    if missing:
        return missing
    c = facts.tried.compilation
    live = _live(facts)
    if live is not None and live.knows_sm_121a is False:
        return NotApplicable("explained by triton.ptxas", ReasonClass.SOFTWARE)
    if c is None:
        return NotRead("the compilations, which were not tried")
    if late := unanswered("the compilations", c.error):
        return late
    if c.error:
        on_target = facts.gpu is not None and facts.gpu.capability == TARGET_COMPUTE_CAPABILITY
        return Found(c.error, severity=None if on_target else Severity.WARNING)
    if c.cold_binary is None or c.warm_binary is None:
        return NotRead("the compiled code")
    seen = f"cold {c.cold_s:.1f} s, warm {c.warm_s:.1f} s"
    if c.warm_binary != c.cold_binary:
        return Found(f"the cache gave other code than the compiler ({seen})")
    if c.again_binary not in (None, c.cold_binary):
        return Found(
            f"two compilations with empty caches gave different code ({seen})",
            severity=Severity.WARNING,
            cause="The compiler is not deterministic here, so a cache decides what runs.",
        )
    return Ok(f"{c.target}: cold, warm and anew are bit-identical ({seen})")


@check("triton.fp4")
def fp4(facts: Facts) -> Answer:
    """Row 29: conversions to FP4 exist in the target with the letter alone."""
    missing = _missing(facts)
    if missing:
        return missing
    c = facts.tried.compilation
    live = _live(facts)
    if live is not None and live.knows_sm_121a is False:
        return NotApplicable("explained by triton.ptxas", ReasonClass.SOFTWARE)
    if c is None or c.target is None or c.fp4 is None:
        return NotRead("the target that Triton compiles for, or its assembler")
    if c.fp4:
        return Ok(f"an FP4 conversion assembles for {c.target}")
    return Found(
        f"an FP4 conversion does not assemble for {c.target}, which is what triton {facts.triton.version} names"
    )


def _missing(facts: Facts) -> NotApplicable | NotRead | None:
    if facts.triton.version is not None and not facts.triton.error:
        return None
    if facts.packages and "triton" not in facts.packages and facts.triton.version is None:
        return NotApplicable("Triton is not installed", ReasonClass.SOFTWARE)
    return NotRead(f"Triton's assemblers ({facts.triton.error or 'no version'})")


def _live(facts: Facts) -> Ptxas | None:
    return next((p for p in facts.triton.ptxas if p.path == facts.triton.live_ptxas), None)
