"""Settings that break downloads from the hub with a misleading message."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from sparkproof.checks.finding import Severity
from sparkproof.checks.registry import Answer, Found, NotApplicable, Ok, check
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass

TRUE = {"1", "ON", "YES", "TRUE"}
# From 1.0 on huggingface_hub uses Xet alone and ignores the variable.
IGNORES_VARIABLE = Version("1.0")


@check("downloads.hf_transfer")
def hf_transfer(facts: Facts) -> Answer:
    """Row 2."""
    if "huggingface-hub" not in facts.packages:
        return NotApplicable("huggingface_hub is not installed", ReasonClass.SOFTWARE)
    value = facts.env.get("HF_HUB_ENABLE_HF_TRANSFER", "")
    if value.upper() not in TRUE:
        return Ok("HF_HUB_ENABLE_HF_TRANSFER is not set")
    if "hf-transfer" in facts.packages:
        return Ok(f"HF_HUB_ENABLE_HF_TRANSFER={value}, and hf_transfer is installed")
    version = facts.packages["huggingface-hub"]
    seen = f"HF_HUB_ENABLE_HF_TRANSFER={value}, huggingface_hub {version}, no hf_transfer"
    return Found(seen, severity=Severity.INFO if _ignores(version) else None)


def _ignores(version: str) -> bool:
    try:
        return Version(version) >= IGNORES_VARIABLE
    except InvalidVersion:
        return False
