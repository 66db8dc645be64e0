"""Liger-Kernel's ops, called as its patched models call them."""

from __future__ import annotations

from importlib import metadata

from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
from liger_kernel.ops.geglu import LigerGELUMulFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from torch import Tensor

from sparkproof.bench.inputs import Builder, Forward, Inputs
from sparkproof.bench.shapes import Case


def version() -> str:
    """The package's."""
    return metadata.version("liger-kernel")


def _norm(case: Case, x: Tensor, weight: Tensor) -> Tensor:
    gemma = case.model.norm == "gemma"
    y: Tensor = LigerRMSNormFunction.apply(x, weight, case.model.eps, float(gemma), case.model.norm, True)
    return y


def _rms_norm(case: Case, t: Inputs) -> Forward:
    return lambda: (_norm(case, t["x"], t["weight"]),)


def _add_rms_norm(case: Case, t: Inputs) -> Forward:
    gemma = float(case.model.norm == "gemma")

    def call() -> tuple[Tensor, ...]:
        y, s = LigerFusedAddRMSNormFunction.apply(
            t["x"], t["residual"], t["weight"], case.model.eps, gemma, case.model.norm, True
        )
        return y, s

    return call


def _turn(q: Tensor, k: Tensor, t: Inputs) -> tuple[Tensor, ...]:
    q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), t["cos"][None], t["sin"][None])
    return q.transpose(1, 2), k.transpose(1, 2)


def _rope(case: Case, t: Inputs) -> Forward:
    return lambda: _turn(t["q"], t["k"], t)


def _qk_norm_rope(case: Case, t: Inputs) -> Forward:
    return lambda: _turn(_norm(case, t["q"], t["q_weight"]), _norm(case, t["k"], t["k_weight"]), t)


def _swiglu(case: Case, t: Inputs) -> Forward:
    return lambda: (LigerSiLUMulFunction.apply(t["gate"], t["up"]),)


def _geglu(case: Case, t: Inputs) -> Forward:
    return lambda: (LigerGELUMulFunction.apply(t["gate"], t["up"]),)


def _cross_entropy(case: Case, t: Inputs) -> Forward:
    return lambda: (LigerCrossEntropyFunction.apply(t["logits"], t["labels"], None)[0],)


def _linear_cross_entropy(case: Case, t: Inputs) -> Forward:
    return lambda: (LigerFusedLinearCrossEntropyFunction.apply(t["x"], t["head"], t["labels"])[0],)


BUILDERS: dict[str, Builder] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rope": _rope,
    "qk_norm_rope": _qk_norm_rope,
    "swiglu": _swiglu,
    "geglu": _geglu,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
}
NOTES = ("Liger-Kernel has no op for QK-norm with RoPE: its two ops follow each other, as in its patched models.",)
ABSENT = dict.fromkeys(
    ("dequantize_4bit", "lora_linear", "lora_qkv", "lora_mlp", "adamw8bit"), "Liger-Kernel has no such op"
)
