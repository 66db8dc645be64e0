"""What is measured: each op at each model's sizes, and how many bytes or operations that takes at least."""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from pydantic import Field

from sparkproof.catalog import nearest
from sparkproof.errors import UserError
from sparkproof.results import Strict

Pass = Literal["forward", "backward", "step"]
Shape = tuple[int, int]
BYTES = 2  # an element of the activations: bf16
MATRIX = ("linear_cross_entropy", "lora_linear", "lora_qkv", "lora_mlp")
# A loss's gradient is computed in its forward by some engines and in its backward by others: only both together compare.
STEP = ("cross_entropy", "linear_cross_entropy")
NO_GRADIENT = ("dequantize_4bit", "adamw8bit")
CHUNK = 4096  # rows of logits at a time in the bare product of the head


class Model(Strict):
    """Sizes of one model."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    norm: Literal["llama", "gemma"] = Field(description="Rounding order of its norms.")
    activation: Literal["silu", "gelu_tanh"]
    qk_norm: bool
    eps: float
    source: str

    def linear(self, part: str) -> Shape:
        """[out, in] of a projection."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }[part]


@dataclass(frozen=True)
class Case:
    """One op at one model's sizes; `tokens` is 0 where they don't matter, `part` names a projection."""

    op: str
    model: Model
    tokens: int
    rank: int
    part: str = ""

    @property
    def name(self) -> str:
        """For people, and unique."""
        words = [self.op, self.part, "of", self.model.name, f"{self.tokens} tokens" if self.tokens else ""]
        return " ".join(w for w in words if w)

    @property
    def bound(self) -> Literal["memory", "matrix"]:
        """What limits it."""
        return "matrix" if self.op in MATRIX else "memory"

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What is timed apart."""
        if self.op in STEP:
            return ("step",)
        return ("forward",) if self.op in NO_GRADIENT else ("forward", "backward")

    @property
    def adapters(self) -> list[Shape]:
        """[rows, columns] of all LoRA tensors of the model, all seven projections."""
        shapes = [self.model.linear(p) for p in ("q", "k", "v", "o", "gate", "up", "down")]
        return [s for n, k in shapes for s in ((self.rank, k), (n, self.rank))] * self.model.layers

    def bytes_moved(self, which: Pass) -> int:
        """Bytes read and written at least, of a memory-bound op."""
        m, t = self.model, self.tokens
        row, backward = t * m.hidden * BYTES, which == "backward"
        heads = t * (m.heads + m.kv_heads) * m.head_dim * BYTES
        gate = t * m.intermediate * BYTES
        match self.op:
            case "rms_norm":
                return (3 if backward else 2) * row
            case "add_rms_norm":
                return 4 * row
            case "rope":
                return 2 * heads
            case "qk_norm_rope":
                return (3 if backward else 2) * heads
            case "swiglu" | "geglu":
                return (5 if backward else 3) * gate
            case "cross_entropy":
                return 2 * t * m.vocab * BYTES
            case "dequantize_4bit":
                elements = math.prod(m.linear(self.part))
                return elements * BYTES + elements // 2 + elements // 64
            case "adamw8bit":  # parameter, gradient and two 8-bit moments read; all but the gradient written
                return sum(map(math.prod, self.adapters)) * (4 + 4 + 2 + 4 + 2)
        raise KeyError(self.op)

    def products(self, which: Pass) -> list[tuple[int, int, int]]:
        """[rows, in, out] of the matrix products that no one can avoid: those of the frozen weights."""
        m, t = self.model, self.tokens
        match self.op:
            case "linear_cross_entropy":
                rows = [min(CHUNK, t - first) for first in range(0, t, CHUNK)]
                return [p for r in rows for p in ((r, m.hidden, m.vocab), (r, m.vocab, m.hidden))]
            case "lora_linear":
                shapes = [m.linear(self.part)]
            case "lora_qkv":
                q, kv = m.linear("q"), m.linear("k")
                shapes = [(q[0] + 2 * kv[0], q[1])]
            case "lora_mlp":
                gate = m.linear("gate")
                shapes = [(2 * gate[0], gate[1]), m.linear("down")]
            case _:
                raise KeyError(self.op)
        return [(t, n, k) if which == "backward" else (t, k, n) for n, k in shapes]


class Shapes(Strict):
    """The whole of shapes.toml."""

    tokens: list[int]
    rank: int
    models: dict[str, Model]


@functools.cache
def shapes() -> Shapes:
    """Read once."""
    text = resources.files(__package__).joinpath("shapes.toml").read_text(encoding="utf-8")
    return Shapes.model_validate(tomllib.loads(text))


OPS: dict[str, tuple[str, ...]] = {  # op -> the projections that it is measured on
    "rms_norm": ("",),
    "add_rms_norm": ("",),
    "rope": ("",),
    "qk_norm_rope": ("",),
    "swiglu": ("",),
    "geglu": ("",),
    "cross_entropy": ("",),
    "linear_cross_entropy": ("",),
    "dequantize_4bit": ("q", "gate", "down"),
    "lora_linear": ("q", "down"),
    "lora_qkv": ("",),
    "lora_mlp": ("",),
    "adamw8bit": ("",),
}


def cases(ops: Sequence[str] = (), models: Sequence[str] = (), tokens: Sequence[int] = ()) -> list[Case]:
    """All that apply, in the order in which they are measured. Errors: UserError for an unknown op or model."""
    known = shapes()
    for kind, asked, names in (("op to measure", ops, list(OPS)), ("model", models, list(known.models))):
        for name in asked:
            if name not in names:
                raise UserError(f"There is no {kind} called '{name}'.", nearest(name, names))
    if any(t < 1 for t in tokens):
        raise UserError("--tokens must be 1 or more.")
    found: list[Case] = []
    for index, t in enumerate(tokens or known.tokens):
        for key in models or known.models:
            m = known.models[key]
            for op in OPS:
                if (ops and op not in ops) or not _has(m, op) or (op in NO_GRADIENT and index):
                    continue
                at = 0 if op in NO_GRADIENT else t
                found += [Case(op, m, at, known.rank, part) for part in OPS[op]]
    return found


def _has(m: Model, op: str) -> bool:
    """Whether the model computes this op: each has one kind of gate, and rotates with or without a norm."""
    without = {
        "rope": m.qk_norm,
        "qk_norm_rope": not m.qk_norm,
        "swiglu": m.activation != "silu",
        "geglu": m.activation == "silu",
    }
    return not without.get(op, False)
