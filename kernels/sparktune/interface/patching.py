"""sparktune's ops into a model, or a visible notice that its family has none.

A family without rules trains as transformers, PEFT and bitsandbytes do it: right, and not faster. Whoever reads a speed
must know which it was, so the notice goes to the log and to `warnings`, and the report lists every module left alone.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter

from torch import nn

from sparktune.models.patch import REPORT_ATTRIBUTE, PatchReport, UnknownFamilyError, patch_model

LOG = logging.getLogger("sparktune")


def patch(model: nn.Module) -> PatchReport:
    """Patch `model` in place (again, after LoRA layers came) and keep the report on it. Never raises for a family."""
    try:
        return patch_model(model)
    except UnknownFamilyError as error:
        report = _nothing_patched(model, error)
        object.__setattr__(model, REPORT_ATTRIBUTE, report)
        return report


def _nothing_patched(model: nn.Module, error: UnknownFamilyError) -> PatchReport:
    """The report of a model left as it is; said aloud once a model, not again when LoRA layers come."""
    family = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
    own = {name: module for name, module in model.named_modules() if any(True for _ in module.parameters(False))}
    reason = f"no rules for the family '{family}'"
    if not any(hasattr(m, REPORT_ATTRIBUTE) for m in model.modules()):
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(type(m).__name__ for m in own.values()).most_common())
        notice = f"{error} It trains with transformers' own modules. Patched: nothing. Not patched: {kinds}."
        LOG.warning(notice)
        warnings.warn(notice, UserWarning, stacklevel=4)
    return PatchReport(family, {}, dict.fromkeys(own, reason))


def report(model: nn.Module) -> PatchReport:
    """The latest report on `model`. Raises ValueError for a model that sparktune did not load."""
    for module in model.modules():
        found = getattr(module, REPORT_ATTRIBUTE, None)
        if isinstance(found, PatchReport):
            return found
    raise ValueError("This model was not patched by sparktune: use FastLanguageModel.from_pretrained.")
