"""Can Triton assemble for GB10, and do the variables that are set do anything?

Compiling for sm_121 ahead of time needs no GB10, so on other machines the same failure is a warning instead of an
error.
"""

from __future__ import annotations

from sparkproof.checks.finding import Severity
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import TARGET_COMPUTE_CAPABILITY, Facts, Ptxas
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
    if triton.live_variable is None:
        return NotRead("which variable redirects this Triton")
    live = _live(facts)
    works = live is not None and live.knows_sm_121a is True
    found = []
    for name, path in triton.variables.items():
        if name == triton.live_variable:
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
            found.append(
                Found(
                    f"{name}={path}, but triton {triton.version} takes {triton.live_ptxas}; only "
                    f"{triton.live_variable} would move it{'. Harmless: what it takes knows sm_121a' if works else ''}",
                    severity=Severity.INFO if works else None,
                    fix=f"unset {name}" if works else f"export {triton.live_variable}={path}",
                )
            )
    return found or Ok(f"{triton.live_variable} is set and takes effect: {triton.live_ptxas}")


def _missing(facts: Facts) -> NotApplicable | NotRead | None:
    if facts.triton.version is not None and not facts.triton.error:
        return None
    if facts.packages and "triton" not in facts.packages and facts.triton.version is None:
        return NotApplicable("Triton is not installed", ReasonClass.SOFTWARE)
    return NotRead(f"Triton's assemblers ({facts.triton.error or 'no version'})")


def _live(facts: Facts) -> Ptxas | None:
    return next((p for p in facts.triton.ptxas if p.path == facts.triton.live_ptxas), None)
