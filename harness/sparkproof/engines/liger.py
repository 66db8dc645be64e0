"""Liger-Kernel as an engine: transformers, PEFT and bitsandbytes with Liger's kernels patched into the model's classes.

Its losses, norms, rotations and activations are Triton kernels; products and LoRA stay bitsandbytes' and PEFT's. What it has
for a kind of model is asked of its own table, MODEL_TYPE_TO_APPLY_LIGER_FN of liger_kernel.transformers.monkey_patch.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from sparkproof.engines.base import EngineUnavailable, LoadSpec, Ran, require_on_gpu
from sparkproof.engines.hf import HfEngine
from sparkproof.results import ReasonClass

WANTED = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "geglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": True,
}


class LigerEngine(HfEngine):
    """Loading, LoRA, saving and generating are those of `hf`; the package does not promise the same bits each time."""

    name = "liger"
    promises_repeat = False

    def load(self, spec: LoadSpec) -> tuple[nn.Module, Any]:
        """Patch the classes of this kind of model, then load. Errors: EngineUnavailable for a kind that Liger lacks."""
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
        from transformers import AutoConfig

        kind = AutoConfig.from_pretrained(spec.folder).model_type
        apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(kind)
        if apply is None:
            raise EngineUnavailable(
                f"Liger-Kernel has no kernels for models of type '{kind}', so nothing was trained with it.",
                "Choose hf or sparktune.",
                ReasonClass.ENGINE,
            )
        known = inspect.signature(apply).parameters
        self.asked = {name: on for name, on in WANTED.items() if name in known}
        apply(**self.asked)
        return super().load(spec)

    def ran(self, model: nn.Module) -> Ran:
        """What was patched, module by module and by function, and how often which of Liger's kernels was launched."""
        modules = [m for m in model.modules() if _ours(type(m)) or _ours(getattr(m.forward, "__func__", None))]
        patched: dict[str, int] = {}
        for m in modules:
            patched[type(m).__name__] = patched.get(type(m).__name__, 0) + 1
        return Ran(
            mode="gpu",
            patches={"asked": self.asked, "patched": patched},
            watermarks=self.launches.of("liger_kernel") if self.launches else {},
        )


def _ours(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("liger_kernel")


def require_liger() -> None:
    """Raise EngineUnavailable with the cure where Liger can't run."""
    require_on_gpu("Liger-Kernel", "liger_kernel", "liger-kernel==0.8.5")
