"""Mixtures of experts: the block of router and experts, with all experts' layers in grouped products and LoRA inside them.

transformers keeps the experts of a layer as two parameters, gate_up_proj [E, 2I, H] and down_proj [E, H, I] (gpt-oss: the other
way round, with biases). PEFT puts LoRA on them by `LoraConfig(target_parameters=...)`, as wrappers around the module that
add B A to the whole stack in every forward; here A and B are read out of the wrappers and go into the grouped product, and
no such sum exists. bitsandbytes keeps a parameter in 4 bits by a parametrisation (`sparktune.quant.experts`); such a stack
is dequantised for its product, and again in backward, so that it never stays.

The router is transformers' own: it is small, and its choice must be the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparktune.models.parts import refuse_mlp
from sparktune.models.projection import Unfit, note_fallback, unhooked
from sparktune.models.swap import Rule, always, rule
from sparktune.ops import dispatch
from sparktune.ops.moe_mlp import ExpertLinear, moe_mlp, peft_factors
from sparktune.ops.weights import Weight
from sparktune.quant.experts import STACKS, is_quantised

_SILU: Callable[[Any], str] = refuse_mlp("silu")


class Experts:
    """The block that routes tokens [B, S, H] to experts, and adds what all tokens share."""

    ROUTER = "gate"  # the router's name
    SHARED = ""  # the name of the MLP that every token goes through, where there is one
    ACTIVATION = "silu"  # or clamped
    EXPERTS: type  # the family's class of them

    def forward(self: Any, hidden_states: Tensor) -> Any:
        """hidden_states [B, S, H] -> the same."""
        routed = self.routed(hidden_states)[0]
        return routed + getattr(self, self.SHARED)(hidden_states) if self.SHARED else routed

    def routed(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(what the chosen experts make of hidden_states [B, S, H], the weights [B S, top_k] of the choice)."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, indices = getattr(self, self.ROUTER)(x)
        return self.mixed(x, indices, weights).view(hidden_states.shape), weights

    def mixed(self: Any, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x [T, H] through the experts indices [T, top_k], weighted by weights [T, top_k] -> [T, H]."""
        with contextlib.ExitStack() as stack:
            try:
                base, layers = expert_layers(self.experts, self.EXPERTS, dispatch.autocast_dtype(x) or x.dtype, stack)
            except Unfit as why:
                note_fallback("the experts", why)
                found: Tensor = self.experts(x, indices, weights)
                return found
            limits = {"limit": base.limit, "alpha": base.alpha} if self.ACTIVATION == "clamped" else {}
            return moe_mlp(x, indices, weights, *layers, activation=self.ACTIVATION, **limits).to(x.dtype)


class PairExperts(Experts):
    """The same for families whose block returns the router's weights too, and clamps."""

    ROUTER = "router"
    ACTIVATION = "clamped"

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [B, S, H] -> (the same, router weights [B S, top_k])."""
        found: tuple[Tensor, Tensor] = self.routed(hidden_states)
        return found


def expert_rule(
    block: type[nn.Module], experts: type[nn.Module], mixin: type = Experts,
    activation: Callable[[Any], str] = _SILU, refuse: Callable[[Any], str] = always, **options: Any,
) -> Rule:  # fmt: skip
    """The rule for a family's block, if its experts are of the class `experts` with the activation that the op computes,
    and unless `refuse` gives a reason that lies in the block."""

    def why_not(module: Any) -> str:
        base = innermost(module.experts)
        if isinstance(base, experts):
            return activation(base) or refuse(module)
        return f"its experts are {type(base).__name__}, not {experts.__name__}{_advice(type(base).__name__)}"

    return rule("moe_mlp", block, mixin, why_not, EXPERTS=experts, **options)


def _advice(name: str) -> str:
    if name.startswith("Mxfp4"):
        return "; load them with quantization_config=Mxfp4Config(dequantize=True)"
    return "; load them unquantised" if name.startswith("FP8") else ""


def refuse_limits(experts: Any) -> str:
    """The condition of gpt-oss's experts: they say where they clamp."""
    return "" if hasattr(experts, "limit") and hasattr(experts, "alpha") else "its experts have no limit and alpha"


def innermost(module: Any) -> Any:
    """The experts themselves, out of PEFT's wrappers."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def expert_layers(
    module: Any, source: type, dtype: torch.dtype, stack: contextlib.ExitStack
) -> tuple[Any, tuple[ExpertLinear, ExpertLinear]]:
    """(the experts' own module, its two layers), each with the active adapter's factors if it has one.

    4-bit stacks come dequantised to `dtype`, and `stack` gets what drops them after the forward. Errors: Unfit.
    """
    adapters: dict[str, tuple[Tensor, Tensor, float]] = {}
    quantised = is_quantised(innermost(module))
    try:
        while hasattr(module, "base_layer"):
            found = _adapter(module)
            if found is not None:
                adapters[module.parameter_name] = found
            module = module.base_layer
        kind: type = type(module)
        if not issubclass(kind, source):
            raise Unfit(f"they are {kind.__name__}, not {source.__name__}")
        _unhooked_experts(module, quantised)
        other = sorted(adapters.keys() - set(STACKS))
        if other:
            raise Unfit(f"LoRA is on its {', '.join(other)}")
    except Unfit as why:
        if quantised:
            raise NotImplementedError(
                f"4-bit experts run inside sparktune's product alone, and here they can't: {why}. "
                "Use one LoRA adapter without hooks, or load the experts in 16 bits."
            ) from None
        raise
    layers = []
    for name in STACKS:
        a = b = None
        a_b_scale = adapters.get(name)
        if a_b_scale is not None:
            a, b = peft_factors(a_b_scale[0], a_b_scale[1], module.num_experts)
        weight = _stack(module, name, dtype, stack)
        weight = weight.transpose(1, 2) if module.is_transposed else weight
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        layers.append(ExpertLinear(weight, a, b, 1.0 if a_b_scale is None else a_b_scale[2], bias))
    return module, (layers[0], layers[1])


def _adapter(wrapper: Any) -> tuple[Tensor, Tensor, float] | None:
    """(A [E R, K], B [N, R E], scale) of the adapter that a PEFT wrapper has active, or None. Errors: Unfit."""
    from peft.tuners.lora.layer import ParamWrapper

    known = isinstance(wrapper, ParamWrapper)
    if not known:
        raise Unfit(f"its adapter is a {type(wrapper).__name__}, not LoRA by target_parameters")
    unhooked(wrapper)
    if wrapper.merged and wrapper.disable_adapters:
        raise Unfit("its adapter is merged and must be taken out")
    active = [n for n in wrapper.active_adapters if n in wrapper.lora_A]
    if wrapper.merged or wrapper.disable_adapters or not active:
        return None
    if len(active) > 1:
        raise Unfit(f"{len(active)} adapters are active at once")
    a, b = wrapper.lora_A[active[0]].weight, wrapper.lora_B[active[0]].weight
    return a, b, float(wrapper.scaling[active[0]])


def _unhooked_experts(module: Any, quantised: bool) -> None:
    """Errors: Unfit with hooks, but for those with which bitsandbytes reads its parametrisation once a forward."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if quantised and all(getattr(h, "__module__", "").startswith("bitsandbytes.nn") for h in hooks):
        return
    unhooked(module)


def _stack(module: Any, name: str, dtype: torch.dtype, stack: contextlib.ExitStack) -> Tensor:
    """The weights of all experts as they are stored; dequantised if in 4 bits, and then not kept for backward."""
    if name not in getattr(module, "parametrizations", {}):
        weight: Tensor = getattr(module, name)
        if not weight.is_floating_point() or weight.dim() != 3:
            raise Unfit(f"its {name} is {weight.dtype} {list(weight.shape)}")
        return weight
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization

    parts = module.parametrizations[name]
    if len(parts) != 1 or not isinstance(parts[0], Bnb4bitParametrization):
        raise Unfit(f"its {name} has a parametrisation that is not bitsandbytes' alone")
    state = parts[0].quant_state
    experts, rows, columns = state.shape
    packed = Weight.of_state(parts.original, state, (experts * rows, columns))
    make = functools.partial(_dequantised, packed, dtype, (experts, rows, columns))
    dense = make()
    if not torch.compiler.is_compiling():
        stack.enter_context(_made_again(dense, make))
    return dense


def _dequantised(packed: Weight, dtype: torch.dtype, shape: tuple[int, int, int]) -> Tensor:
    with torch.no_grad():
        return packed.dequantize(dtype).view(shape)


def _made_again(dense: Tensor, make: Callable[[], Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Within, an op that saves `dense` (or all of it under other strides) saves how to make it again instead."""
    memory, count = dense.untyped_storage().data_ptr(), dense.numel()

    def pack(t: Tensor) -> Any:
        if t.numel() == count and t.untyped_storage().data_ptr() == memory:
            return t.shape, t.stride()
        return t

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else make().as_strided(*kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
