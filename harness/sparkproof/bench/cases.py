"""One row made concrete: its tensors, what gets a gradient, and the bytes or products that no engine can avoid.

Norm weights, base weights and the head are frozen, as in QLoRA; LoRA's A and B are fp32, as PEFT keeps them, and run
under autocast. Bytes count every tensor once, read or written. A bare GEMM of a row is the base weight's alone.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparkproof.bench.shapes import Model, Row, shapes

Inputs = dict[str, Any]
Call = Callable[[Inputs], tuple[Tensor, ...]]
IGNORED = -100
CHUNK = 512  # rows of logits that the reference of a loss works on at once
LR = 0.1  # so large that a wrong step shows beside the parameters themselves


@dataclass
class Case:
    """What engines are built from. `make(index)` gives one set of inputs; `shared` what every call uses."""

    row: Row
    device: torch.device
    make: Callable[[int], Inputs]
    grads: tuple[str, ...] = ()
    shared: dict[str, Any] = field(default_factory=dict)
    parameters: list[Tensor] = field(default_factory=list)
    bytes: dict[str, int] = field(default_factory=dict)
    gemms: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    touched: int = 0  # bytes that one call reads or writes, about: how many sets it takes to get past L2
    dims: dict[str, int] = field(default_factory=dict)
    autocast: bool = False
    reference: Call | None = None

    @property
    def model(self) -> Model:
        """The row's model."""
        return self.row.model

    def flops(self, which: str) -> int:
        """Of the bare GEMMs of a pass."""
        return sum(2 * m * n * k for m, n, k in self.gemms.get(which, []))


def build(row: Row, device: torch.device) -> Case:
    """The row's case, its shared tensors on `device`."""
    case = _CASES[row.kind.op](row, device)
    for both, parts in (("forward+backward", ("forward", "backward")),):
        if both not in case.bytes and all(p in case.bytes for p in parts):
            case.bytes[both] = sum(case.bytes[p] for p in parts)
        if both not in case.gemms and all(p in case.gemms for p in parts):
            case.gemms[both] = [g for p in parts for g in case.gemms[p]]
    case.touched = case.touched or max(case.bytes.values(), default=0)
    return case


def _randn(device: torch.device, seed: int, *shape: int, spread: float = 1.0) -> Tensor:
    g = torch.Generator(device).manual_seed(1234 + seed)
    return torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=g).mul_(spread)


def _leaf(t: Tensor) -> Tensor:
    return t.requires_grad_(True)


def _norm_weight(model: Model, n: int, device: torch.device, seed: int = 77) -> Tensor:
    return _randn(device, seed, n, spread=0.3) + (0.0 if model.norm == "gemma" else 1.0)


def _norm(row: Row, device: torch.device) -> Case:
    m, n, add = row.tokens, row.model.hidden, row.kind.op == "add_rms_norm"
    names = ("x", "residual") if add else ("x",)

    def make(index: int) -> Inputs:
        return {name: _leaf(_randn(device, 10 * index + j, 1, m, n)) for j, name in enumerate(names)}

    each = 2 * m * n
    return Case(
        row, device, make, names, {"weight": _norm_weight(row.model, n, device)},
        bytes={"forward": (4 if add else 2) * each, "backward": (4 if add else 3) * each},
        dims={"rows": m, "columns": n},
    )  # fmt: skip


def tables(m: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [m, d / 2] in fp32."""
    inverse = 1.0 / (10000.0 ** (torch.arange(0, d, 2, device=device, dtype=torch.float32) / d))
    angle = torch.outer(torch.arange(m, device=device, dtype=torch.float32), inverse)
    return angle.cos(), angle.sin()


def _rope(row: Row, device: torch.device) -> Case:
    m, model, normed = row.tokens, row.model, row.kind.op == "qk_norm_rope"
    d = model.head_dim
    heads = {"q": model.heads, "k": model.kv_heads}

    def make(index: int) -> Inputs:
        return {name: _leaf(_randn(device, 10 * index + j, 1, m, h, d)) for j, (name, h) in enumerate(heads.items())}

    cos, sin = tables(m, d, device)
    doubled = [torch.cat((t, t), -1).to(torch.bfloat16)[None] for t in (cos, sin)]
    shared: dict[str, Any] = {"cos": cos, "sin": sin, "cos_doubled": doubled[0], "sin_doubled": doubled[1]}
    if normed:
        shared |= {f"{name}_weight": _norm_weight(model, d, device, 70 + j) for j, name in enumerate(heads)}
    each = 2 * m * d * sum(heads.values())
    return Case(
        row, device, make, ("q", "k"), shared,
        bytes={"forward": 2 * each, "backward": (3 if normed else 2) * each},
        dims={"rows": m, "heads": model.heads, "kv_heads": model.kv_heads, "head_dim": d},
    )  # fmt: skip


def _glu(row: Row, device: torch.device) -> Case:
    m, n = row.tokens, row.model.intermediate

    def make(index: int) -> Inputs:
        return {name: _leaf(_randn(device, 10 * index + j, m, n)) for j, name in enumerate(("gate", "up"))}

    each = 2 * m * n
    return Case(
        row, device, make, ("gate", "up"), bytes={"forward": 3 * each, "backward": 5 * each},
        dims={"rows": m, "columns": n},
    )  # fmt: skip


def _labels(device: torch.device, seed: int, m: int, vocab: int) -> Tensor:
    g = torch.Generator(device).manual_seed(4321 + seed)
    labels = torch.randint(0, vocab, (m,), device=device, generator=g)
    labels[torch.rand(m, device=device, generator=g) < 0.1] = IGNORED
    return labels


class _RowByRow(torch.autograd.Function):
    """Cross entropy in fp32, a chunk of rows at a time, so that a reference fits where the op itself does."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, labels: Tensor) -> Tensor:
        """Mean over the labels that count; the gradient is made on the way."""
        count = (labels != IGNORED).sum().clamp(min=1)
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden)
        for at in range(0, hidden.shape[0], CHUNK):
            with torch.enable_grad():
                part = hidden[at : at + CHUNK].detach().requires_grad_(True)
                logits = part if weight is None else nn.functional.linear(part, weight)
                loss = nn.functional.cross_entropy(
                    logits.float(), labels[at : at + CHUNK], ignore_index=IGNORED, reduction="sum"
                )
            gradient[at : at + CHUNK] = torch.autograd.grad(loss, part)[0] / count
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        """The gradient that forward made."""
        return ctx.saved_tensors[0] * g, None, None


def _cross_entropy(row: Row, device: torch.device) -> Case:
    m, v = row.tokens, row.model.vocab

    def make(index: int) -> Inputs:
        return {"logits": _leaf(_randn(device, index, m, v, spread=2.0)), "labels": _labels(device, index, m, v)}

    return Case(
        row, device, make, ("logits",), bytes={"forward+backward": 3 * 2 * m * v}, dims={"rows": m, "vocabulary": v},
        reference=lambda t: (_RowByRow.apply(t["logits"], None, t["labels"]),),
    )  # fmt: skip


def _linear_cross_entropy(row: Row, device: torch.device) -> Case:
    m, h, v = row.tokens, row.model.hidden, row.model.vocab
    weight = _randn(device, 99, v, h, spread=2 / h**0.5)

    def make(index: int) -> Inputs:
        return {"hidden": _leaf(_randn(device, index, m, h)), "labels": _labels(device, index, m, v)}

    return Case(
        row, device, make, ("hidden",), {"weight": weight}, gemms={"forward": [(m, v, h)], "backward": [(m, h, v)]},
        touched=2 * (m * h * 2 + v * h), dims={"rows": m, "columns": h, "vocabulary": v},
        reference=lambda t: (_RowByRow.apply(t["hidden"], weight, t["labels"]),),
    )  # fmt: skip


@contextlib.contextmanager
def quantising(device: torch.device) -> Iterator[None]:
    """Within, the device's first stream is current, and no other works.

    bitsandbytes (0.50) quantises there whatever stream is current, unlike it dequantises, and does not wait for the one
    that made the weights or their mean: one run's codes in 40 were of other weights.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.default_stream(device)):
        yield
    torch.cuda.synchronize(device)


def _dequantize(row: Row, device: torch.device) -> Case:
    import bitsandbytes.functional as bnb

    n, k = row.model.linears[row.kind.part]

    @functools.cache  # nobody writes to them, and every engine is to read the very same codes
    def make(index: int) -> Inputs:
        w = _randn(device, index, n, k, spread=k**-0.5)
        with quantising(device):
            packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
        return {"packed": packed, "state": state}

    size = n * k // 2 + n * k // 64 + 4 * (n * k // 64 // 256) + 2 * n * k
    return Case(row, device, make, bytes={"forward": size}, dims={"rows": n, "columns": k})


class Projections(nn.Module):
    """PEFT layers over NF4 weights, under the names that transformers, PEFT and Unsloth look for."""

    def __init__(self, linears: dict[str, tuple[int, int]], activation: str, device: torch.device) -> None:
        import bitsandbytes as bnb
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        self.is_loaded_in_4bit = True  # where PEFT looks before it takes its 4-bit layers
        self.act_fn = nn.SiLU() if activation == "silu" else nn.GELU(approximate="tanh")
        for j, (name, (n, k)) in enumerate(linears.items()):
            layer = bnb.nn.Linear4bit(
                k,
                n,
                bias=False,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            w = _randn(device, 50 + j, n, k, spread=k**-0.5)
            params: Any = bnb.nn.Params4bit(w, requires_grad=False, compress_statistics=True, quant_type="nf4")
            with quantising(device):
                layer.weight = params.to(device)
            setattr(self, f"{name}_proj", layer)
        rank = shapes().rank
        names = [f"{name}_proj" for name in linears]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, lora_dropout=0.0, bias="none")
        inject_adapter_in_model(config, self)
        for j, name in enumerate(names):
            layer = getattr(self, name)
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            k = a.weight.shape[1]
            a.weight = nn.Parameter(_randn(device, 150 + j, rank, k, spread=k**-0.5).float())
            b.weight = nn.Parameter(_randn(device, 250 + j, b.weight.shape[0], rank, spread=rank**-0.5).float())

    def lora(self, name: str) -> tuple[Any, tuple[Tensor, Tensor], float]:
        """(base layer, (A, B), scale) of one projection."""
        layer = getattr(self, f"{name}_proj")
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return layer.base_layer, pair, float(layer.scaling["default"])


def _lora(row: Row, device: torch.device) -> Case:
    m, model, op = row.tokens, row.model, row.kind.op
    names = {"lora_linear": [row.kind.part], "lora_qkv": ["q", "k", "v"], "lora_mlp": ["gate", "up", "down"]}[op]
    linears = {n: model.linears[n] for n in names}
    module = Projections(linears, model.activation, device)
    k = linears[names[0]][1]

    def make(index: int) -> Inputs:
        return {"x": _leaf(_randn(device, index, 1, m, k))}

    if op == "lora_mlp":
        i = linears["gate"][0]
        gemms = {"forward": [(m, 2 * i, k), (m, k, i)], "backward": [(m, i, k), (m, k, 2 * i)]}
    else:
        n = sum(x for x, _ in linears.values())
        gemms = {"forward": [(m, n, k)], "backward": [(m, k, n)]}
    weights = sum(a * b for a, b in linears.values())
    return Case(
        row, device, make, ("x",), {"module": module}, [p for p in module.parameters() if p.requires_grad], gemms=gemms,
        touched=weights * 5 // 2 + sum(2 * x * (a + b) for x, a, b in gemms["forward"]), autocast=True,
        dims={"rows": m, "columns": k, "out": sum(x for x, _ in linears.values()), "rank": shapes().rank},
    )  # fmt: skip


def lora_tensors(model: Model) -> list[tuple[int, int]]:
    """Shapes of all LoRA tensors of a model, a layer's A and B in turn."""
    rank = shapes().rank
    each = [s for n, k in model.linears.values() for s in ((rank, k), (n, rank))]
    return each * model.layers


def _adamw(row: Row, device: torch.device) -> Case:
    wanted = lora_tensors(row.model)
    params = [torch.randn(s, device=device).mul_(0.02) for s in wanted]
    grads = [torch.randn(s, device=device).mul_(1e-3) for s in wanted]
    count = sum(p.numel() for p in params)

    def owned() -> list[nn.Parameter]:
        """The same parameters and gradients for each engine, to step in place."""
        mine = [nn.Parameter(p.clone()) for p in params]
        for p, g in zip(mine, grads, strict=True):
            p.grad = g
        return mine

    moved = count * (4 + 4 + 4 + 2 * 2) + 2 * 2 * 4 * (count // 256)
    return Case(
        row, device, lambda index: {}, shared={"owned": owned}, bytes={"step": moved},
        dims={"tensors": len(wanted), "elements": count},
    )  # fmt: skip


def norm_like(case: Case, weight: Tensor) -> types.SimpleNamespace:
    """What stands for a norm's module where only its weight and epsilon are read."""
    return types.SimpleNamespace(weight=weight, variance_epsilon=case.model.eps, eps=case.model.eps)


_CASES: dict[str, Callable[[Row, torch.device], Case]] = {
    "rms_norm": _norm, "add_rms_norm": _norm, "rope": _rope, "qk_norm_rope": _rope, "swiglu": _glu, "geglu": _glu,
    "cross_entropy": _cross_entropy, "linear_cross_entropy": _linear_cross_entropy, "dequantize_4bit": _dequantize,
    "lora_linear": _lora, "lora_qkv": _lora, "lora_mlp": _lora, "adamw8bit": _adamw,
}  # fmt: skip
