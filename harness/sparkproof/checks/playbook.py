"""The playbook as it lies in the working folder: is its script a script, does trl take it, and will outputs stay?"""

from __future__ import annotations

from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts

NO_SCRIPT = NotApplicable("there is no test_unsloth.py in the working folder")


@check("playbook.web_page")
def web_page(facts: Facts) -> Answer:
    """Row 1, first half."""
    script = facts.script
    if script.path is None:
        return NO_SCRIPT
    if script.is_web_page is None:
        return NotRead(f"the head of {script.path}")
    return Found(f"{script.path} begins as HTML does") if script.is_web_page else Ok(f"{script.path} is no web page")


@check("playbook.arguments")
def arguments(facts: Facts) -> Answer:
    """Row 5, in the script at hand."""
    script = facts.script
    if script.path is None or script.is_web_page:
        return NO_SCRIPT
    if not script.sft_arguments:
        return NotApplicable(f"{script.path} makes no SFTConfig")
    if script.unknown_arguments is None:
        return NotApplicable("trl is not installed")
    if script.unknown_arguments:
        version = facts.packages.get("trl", "?")
        return Found(f"{script.path} hands {', '.join(script.unknown_arguments)} to SFTConfig of trl {version}")
    return Ok(f"SFTConfig takes all {len(script.sft_arguments)} arguments of {script.path}")


@check("playbook.outputs")
def outputs(facts: Facts) -> Answer:
    """Row 1, second half, and row 34: what lies in the container's own layer ends with it."""
    if not facts.os.in_container:
        return NotApplicable("not in a container")
    if facts.places is None:
        return NotRead("the mounts")
    lost = [p for p in facts.places if p.in_image]
    if not lost:
        kept = [p.name for p in facts.places if p.in_image is False]
        return Ok(f"on mounts of their own: {', '.join(kept) or 'nothing'}")
    return Found("; ".join(f"{p.name} ({p.path})" for p in lost))
