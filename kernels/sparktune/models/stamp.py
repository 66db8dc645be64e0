"""Whether a layer is still what it was when it was read, for a fifth of what reading it costs.

Reading a decoder layer with LoRA on seven projections takes 0.3 ms of Python on a fast core, mostly through PEFT's properties and
`nn.Module.__getattr__`; at 2 x 2048 tokens its kernels take 4.5 ms on an H100, and the host has to stay ahead of them. A
`Stamp` holds all that `LayerParts.of` and `Projection.of` look at: objects, which are compared by identity and kept so that
no other can take their place, and values. Where two stamps of a layer are equal, so is what would be read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Stamp:
    """Objects and values in the order in which they were looked at."""

    def __init__(self) -> None:
        self.objects: list[Any] = []
        self.values: list[Any] = []

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stamp) or self.values != other.values:
            return False
        mine, theirs = self.objects, other.objects
        return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def tensor(self, t: Any) -> None:
        """A parameter: itself, its memory (`p.data = ...` exchanges it), its dtype and whether it is trained."""
        self.objects.append(t)
        if isinstance(t, Tensor):
            state = getattr(t, "quant_state", None)
            self.objects.append(state)
            self.values += (t.data_ptr(), t.dtype, t.requires_grad, t.device)
            if state is not None:
                self.values.append(getattr(state, "packing_format_for_cpu", False))

    def hooks(self, module: Any) -> None:
        """A module itself, and whether `projection.unhooked` would refuse it."""
        d = vars(module)
        self.objects.append(module)
        self.values.append(
            "forward" in d or bool(d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"])
        )

    def linear(self, module: Any) -> None:
        """A projection, with PEFT's layer around it or without."""
        self.hooks(module)
        d = vars(module)
        parts = d["_modules"]
        base = parts.get("base_layer")
        of_base = (vars(base) if base is not None else d)["_parameters"]
        self.objects.append(base)
        self.tensor(of_base.get("weight"))
        self.tensor(of_base.get("bias"))
        if base is None:
            return
        active = d.get("_active_adapter", getattr(type(module), "_active_adapter", None))
        names = tuple(active) if isinstance(active, list) else (active,)
        self.values += (
            names, tuple(d.get("merged_adapters", ())), d.get("_disable_adapters"), d["training"],
            tuple(d.get("use_dora", {}).items()), d.get("fan_in_fan_out", False),
        )  # fmt: skip
        for name in names:
            for kind in ("lora_A", "lora_B"):
                factor = _child(parts, kind, name)
                self.objects.append(factor)
                if factor is not None:
                    of_factor = vars(factor)["_parameters"]
                    weight = of_factor.get("weight")
                    self.objects += (weight, of_factor.get("bias"))
                    self.values.append(getattr(weight, "shape", None))
            dropout = _child(parts, "lora_dropout", name)
            self.objects += (dropout, d.get("lora_variant", {}).get(name))
            self.values += (getattr(dropout, "p", None), d.get("scaling", {}).get(name))


def _child(parts: Any, kind: str, name: str) -> Any:
    found = parts.get(kind)
    if found is None:
        return None
    return vars(found)["_modules"].get(name)
