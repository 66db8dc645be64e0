"""Put sparktune's ops into a loaded transformers model, and say exactly where they went.

A family (one file beside this one) gives rules: a module's class, the subclass whose `forward` calls the op, and when
that subclass computes the same thing. Patching gives each matching *instance* its subclass: nothing is replaced in the
library, another model in the same process stays as it was, `isinstance` and PEFT's dispatch keep working, weights are
not touched, and giving the class back undoes it.

What does not match a rule's condition stays as it was and is listed with the reason: an unpatched module runs
correctly and slowly, so the reader of a speed figure must see it.
"""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparktune.models import attention
from sparktune.models.swap import Rule

# transformers' config.model_type -> the module with its RULES
FAMILIES = {
    name: f"sparktune.models.{file}"
    for name, file in {
        "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
        "gemma3": "gemma3", "gemma3_text": "gemma3", "phi3": "phi3", "smollm3": "smollm3", "granite": "granite",
        "qwen3_moe": "qwen3_moe", "gpt_oss": "gpt_oss", "deepseek_v2": "deepseek_v2", "deepseek_v3": "deepseek_v3",
        "mixtral": "mixtral",
    }.items()
}  # fmt: skip
REPORT_ATTRIBUTE = "_sparktune_patch_report"


class UnknownFamilyError(ValueError):
    """The model's family has no rules here, so no op of sparktune would run in it."""


@dataclass
class PatchReport:
    """What was patched, by op, and what was left and why. Names are those of `model.named_modules()`."""

    family: str
    patched: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    attention_before: str = ""  # what transformers would call for attention

    @property
    def counts(self) -> dict[str, int]:
        """Op -> number of modules that run it."""
        return {op: len(names) for op, names in self.patched.items()}

    def to_json(self) -> dict[str, Any]:
        """Counts by op, and the modules left with their reasons, counted by reason."""
        return {"family": self.family, "patched": self.counts, "left": dict(Counter(self.left.values()))}

    def __str__(self) -> str:
        done = ", ".join(f"{op} in {n} modules" for op, n in self.counts.items()) or "nothing"
        left = "; ".join(f"{n} left: {why}" for why, n in Counter(self.left.values()).items())
        return f"sparktune patched {done} ({self.family}){'; ' + left if left else ''}"


def rules_for(model: nn.Module) -> tuple[str, tuple[Rule, ...]]:
    """The family's name and rules, from `model.config.model_type`. Raises UnknownFamilyError."""
    family = str(getattr(getattr(model, "config", None), "model_type", "unknown"))
    if family not in FAMILIES:
        raise UnknownFamilyError(
            f"sparktune has no rules for the model family '{family}', so none of its ops would run. "
            f"Families it knows: {', '.join(sorted(FAMILIES))}."
        )
    return family, importlib.import_module(FAMILIES[family]).RULES


def patch_model(model: nn.Module) -> PatchReport:
    """Patch every module that a rule fits, in place; return (and keep on the model) the report. Twice is as once.

    Attention goes through `sparktune.ops.attention` by transformers' own interface, in families whose modules stay too.
    """
    family, rules = rules_for(model)
    report = PatchReport(family, {rule.op: [] for rule in rules})
    for name, module in model.named_modules():
        for rule in rules:
            if type(module) is rule.target:
                report.patched[rule.op].append(name)
            elif type(module) is rule.source:
                # A hook on the instance (accelerate's offloading) would win over any class and hide the op.
                hooked = "forward" in vars(module)
                reason = "its forward is already replaced on the instance" if hooked else rule.refuse(module)
                if reason:
                    report.left[name] = f"{rule.op}: {reason}"
                else:
                    module.__class__ = rule.target
                    _keep_outputs(module)
                    report.patched[rule.op].append(name)
    _part_with_tables(model, rules, report)
    before = str(_transformers_model(model).config.get_text_config()._attn_implementation)
    report.attention_before = _report_of(model).attention_before if before == attention.NAME else before
    attention.register()
    _set_attention(model, attention.NAME)
    object.__setattr__(model, REPORT_ATTRIBUTE, report)
    return report


def _part_with_tables(model: nn.Module, rules: tuple[Rule, ...], report: PatchReport) -> None:
    """Rotary embeddings hand tables to attention that only ours reads, so where one of either stays, all of both do."""
    both = ("rope", "lora_qkv")
    if not any(why.startswith(tuple(f"{op}:" for op in both)) for why in report.left.values()):
        return
    patched = {rule.target: rule for rule in rules if rule.op in both}
    for name, module in model.named_modules():
        rule = patched.get(type(module))
        if rule is not None:
            module.__class__ = rule.source
            report.patched[rule.op].remove(name)
            report.left[name] = f"{rule.op}: the rotary embedding, or attention in another layer, stays as it was"


def _keep_outputs(module: nn.Module) -> None:
    """transformers knows by a model's class what `output_hidden_states` and its like can record; else it is None."""
    from transformers.utils import output_capturing

    recorded = getattr(module, "_can_record_outputs", None)
    if recorded is not None:
        output_capturing._CAN_RECORD_REGISTRY[str(type(module))] = recorded


def _transformers_model(model: Any) -> Any:
    """The model itself, out of PEFT's wrapper if it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _set_attention(model: nn.Module, name: str) -> None:
    """Of the text model alone: what encodes images attends both ways."""
    base = _transformers_model(model)
    text = base.config.get_text_config()
    keys = [k for k in base.config.sub_configs if getattr(base.config, k, None) is text]
    base.set_attn_implementation({keys[0]: name} if keys else name)


def _report_of(model: nn.Module) -> PatchReport:
    for module in model.modules():
        found = getattr(module, REPORT_ATTRIBUTE, None)
        if isinstance(found, PatchReport):
            return found
    return PatchReport("unknown", attention_before="sdpa")


def unpatch_model(model: nn.Module) -> int:
    """Give every patched module its own class back; return how many there were."""
    _, rules = rules_for(model)
    originals = {rule.target: rule.source for rule in rules}
    undone = 0
    for module in model.modules():
        source = originals.get(type(module))
        if source is not None:
            module.__class__ = source
            undone += 1
    _set_attention(model, _report_of(model).attention_before or "sdpa")
    for module in model.modules():
        if REPORT_ATTRIBUTE in vars(module):
            object.__delattr__(module, REPORT_ATTRIBUTE)
    return undone
