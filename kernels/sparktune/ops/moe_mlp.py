r"""The MLP of a mixture of experts: route, gate and up, activation, down, combine; LoRA inside both products.

    order = route(indices)                                    on the device (moe_routing.py)
    h  = act(gate_up_e(x[order]))                             one grouped product that reads x through the routing
    y  = sum over a token's experts of w down_e(h)            one grouped product, then one pass over its rows

A plain function of ops, each differentiable: gradients reach x, the routing weights, and A and B (or W and biases, where they
ask). Nothing waits for the host, so a CUDA graph can hold it for one T.

Activations: "silu" with gate and up side by side (Qwen3-MoE, Mixtral, DeepSeek), and "clamped" with them interleaved
(gpt-oss). Saved: x, W, gate_up [M, 2I], h [M, I], the rows before they are combined [M, H], and x A^T's two.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparktune.ops.grouped_lora import grouped_lora
from sparktune.ops.moe_combine import moe_combine
from sparktune.ops.moe_routing import moe_route
from sparktune.ops.swiglu import swiglu
from sparktune.ops.swiglu_clamped import ALPHA, LIMIT, swiglu_clamped

ACTIVATIONS = ("silu", "clamped")


@dataclass(frozen=True)
class ExpertLinear:
    """The layers of all experts: W [E, N, K], and A [E, R, K] with B [E, N, R] and bias [E, N], if any."""

    weight: Tensor
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    bias: Tensor | None = None


def peft_factors(lora_a: Tensor, lora_b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A [E, R, K] and B [E, N, R] as views of what PEFT keeps for a parameter with experts.

    PEFT's A [E R, K] has an expert's ranks next to each other, its B [N, R E] a rank's experts. Errors: ValueError where
    E does not divide the ranks.
    """
    if lora_a.shape[0] % experts or lora_b.shape[1] != lora_a.shape[0]:
        raise ValueError(
            f"peft_factors: A [E R, K] and B [N, R E] with E = {experts} don't fit {list(lora_a.shape)} and "
            f"{list(lora_b.shape)}"
        )
    rank = lora_a.shape[0] // experts
    return lora_a.view(experts, rank, -1), lora_b.view(lora_b.shape[0], rank, experts).permute(2, 0, 1)


def moe_mlp(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: ExpertLinear, down: ExpertLinear, *, activation: str = "silu",
    limit: float = LIMIT, alpha: float = ALPHA,
) -> Tensor:  # fmt: skip
    """x [T, H] through the experts indices [T, top_k] of each token, weighted by weights [T, top_k] -> [T, H].

    gate_up's W is [E, 2I, H], down's [E, H, I]; both may be transposed views of a checkpoint that has them the other way
    round. An index outside of [0, E) is an expert that is not here, and adds nothing. Errors: ValueError for an unknown
    activation, and those of the ops.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"moe_mlp: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    offsets, rows, positions = moe_route(indices, gate_up.weight.shape[0])
    both = grouped_lora(
        x, gate_up.weight, offsets, gate_up.a, gate_up.b, scale=gate_up.scale, bias=gate_up.bias, rows=rows,
        positions=positions,
    )  # fmt: skip
    h = swiglu(both) if activation == "silu" else swiglu_clamped(both, limit=limit, alpha=alpha)
    z = grouped_lora(h, down.weight, offsets, down.a, down.b, scale=down.scale, bias=down.bias)
    return moe_combine(z, weights, positions)
