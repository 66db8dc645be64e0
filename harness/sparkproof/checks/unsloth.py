"""Unsloth on this machine: does it import, and what does it do here that its caller did not ask for?"""

from __future__ import annotations

from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass

NOT_INSTALLED = NotApplicable("Unsloth is not installed")
NOT_UNIFIED = NotApplicable("CPU and GPU do not share one memory pool", ReasonClass.UNIFIED_MEMORY)


@check("unsloth.imports")
def imports(facts: Facts) -> Answer:
    """Row 9, and whatever else stops it."""
    u = facts.unsloth
    if u.version is None:
        return NOT_INSTALLED
    if facts.gpu is None or not facts.gpu.usable_by_torch:
        return NotApplicable("Unsloth imports only beside a GPU that torch can use", ReasonClass.GPU)
    if u.imported is None:
        return NotRead("whether Unsloth imports")
    if u.imported:
        return Ok(f"unsloth {u.version} imported")
    error = u.import_error or "no reason given"
    if "No package metadata was found for vllm" in error:
        return Found(f"unsloth {u.version}: {error}", cause="This version takes vLLM's metadata for granted.")
    return Found(f"unsloth {u.version}: {error}", cause="Its import ended with this error.")


@check("unsloth.fast_inference")
def fast_inference(facts: Facts) -> Answer:
    """Row 10."""
    u = facts.unsloth
    if u.version is None:
        return NOT_INSTALLED
    if not facts.is_target:
        return NotApplicable("the switch is for DGX Spark alone")
    if u.disables_fast_inference is None:
        return NotRead("Unsloth's loader")
    if u.disables_fast_inference:
        return Found(f"unsloth {u.version} has the switch")
    return Ok(f"unsloth {u.version} has no such switch")


@check("unsloth.attention")
def attention(facts: Facts) -> Answer:
    """Row 13."""
    if facts.unsloth.version is None:
        return NOT_INSTALLED
    flash = facts.packages.get("flash-attn")
    if flash is None:
        return Ok("flash-attn is not installed, so the caller's choice stands")
    return Found(f"unsloth {facts.unsloth.version} beside flash-attn {flash}")


@check("unsloth.offload")
def offload(facts: Facts) -> Answer:
    """Row 42."""
    u = facts.unsloth
    if u.zoo_version is None:
        return NOT_INSTALLED
    if not facts.unified:
        return NOT_UNIFIED
    switched_off = facts.env.get("UNSLOTH_DISABLE_DOUBLE_BUFFER") == "1"
    if switched_off:
        return Ok("UNSLOTH_DISABLE_DOUBLE_BUFFER=1")
    if u.knows_unified_memory is None:
        return NotRead("unsloth_zoo's gradient checkpointing")
    if u.knows_unified_memory:
        return Ok(f"unsloth_zoo {u.zoo_version} leaves it off where the GPU is integrated")
    return Found(f"unsloth_zoo {u.zoo_version} does not ask whether the GPU is integrated")


@check("unsloth.load")
def load(facts: Facts) -> Answer:
    """Row 41."""
    if facts.unsloth.version is None:
        return NOT_INSTALLED
    if not facts.unified:
        return NOT_UNIFIED
    value = facts.env.get("UNSLOTH_DISABLE_UMA_CLONE_LOAD", "")
    if value in ("", "0"):
        return Ok("UNSLOTH_DISABLE_UMA_CLONE_LOAD is not set")
    return Found(f"UNSLOTH_DISABLE_UMA_CLONE_LOAD={value}")
