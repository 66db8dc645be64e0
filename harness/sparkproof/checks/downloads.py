"""Settings that break downloads from the hub with a misleading message."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from sparkproof.checks.finding import Severity
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
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


@check("downloads.whole")
def whole(facts: Facts) -> Answer:
    """Row 54, second half: files that are shorter than they say, and downloads that never ended."""
    cache = facts.hub_cache
    if cache.path is None:
        return NotRead("the hub's cache")
    if not cache.models and not cache.incomplete:
        return NotApplicable("nothing lies in the hub's cache")
    found = [
        Found(f"{m.repository}: {', '.join(m.truncated[:4])}", fix=f"hf download {m.repository} --force-download")
        for m in cache.models
        if m.truncated
    ]
    found += [
        Found(
            f"{name}: a download that did not end lies in {cache.path}",
            severity=Severity.WARNING,
            cause="A download was interrupted; what is there of it is not used until it is taken up again.",
            fix=f"hf download {name}",
        )
        for name in cache.incomplete
        if name not in {m.repository for m in cache.models if m.truncated}
    ]
    return found or Ok(f"{len(cache.models)} models, each as long as its own header says")


@check("downloads.token")
def token(facts: Facts) -> Answer:
    """Row 54, first half. No token is no fault: public models need none."""
    if facts.hub_token_present is None:
        return NotRead("whether there is a hub token")
    if not facts.hub_token_present:
        return Ok("no hub token is set: public models download, gated ones answer 401 or 403")
    if facts.hub_cache.token_accepted is False:
        return Found("a hub token is set, and the hub does not know it")
    if facts.hub_cache.token_accepted is None:
        return Ok("a hub token is set; whether the hub knows it was not asked")
    return Ok("the hub knows the token that is set")


def _ignores(version: str) -> bool:
    try:
        return Version(version) >= IGNORES_VARIABLE
    except InvalidVersion:
        return False
