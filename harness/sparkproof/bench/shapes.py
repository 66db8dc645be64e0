"""The rows of `sparkproof bench ops`: which ops, at the shapes of which models, over how many tokens. Data: shapes.toml."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from pydantic import Field

from sparkproof.catalog import nearest
from sparkproof.errors import UserError
from sparkproof.results import Strict

Pass = Literal["forward", "backward", "forward+backward", "step"]
QUICK_MODEL, QUICK_TOKENS = "llama", 4096


class Model(Strict):
    """The sizes of one model that its ops' shapes follow from."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    eps: float
    norm: Literal["llama", "gemma"] = "llama"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qk_norm: bool = False
    source: str

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Projection -> [out, in]."""
        h, i, q, kv = self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q), "gate": (i, h), "up": (i, h), "down": (h, i)}


class Kind(Strict):
    """One op, or one part of a model that it runs on."""

    op: str
    part: str = ""
    bound: Literal["memory", "matrix"] = "memory"
    passes: list[Pass] = Field(default=["forward", "backward"])
    needs: Literal["", "qk_norm", "silu", "gelu_tanh"] = ""
    once: bool = False

    def suits(self, model: Model) -> bool:
        """Whether the model has such an op."""
        return self.needs in ("", model.activation) or (self.needs == "qk_norm" and model.qk_norm)


class Shapes(Strict):
    """The whole file."""

    tokens: list[int]
    rank: int
    models: dict[str, Model]
    case: list[Kind]


@dataclass(frozen=True)
class Row:
    """One row of the table; `tokens` is 0 where they make no difference."""

    kind: Kind
    model: Model
    tokens: int

    @property
    def title(self) -> str:
        """What a person calls it."""
        part = f" {self.kind.part}" if self.kind.part else ""
        return f"{self.kind.op}{part}, {self.model.name}" + (f", {self.tokens} tokens" if self.tokens else "")


@functools.cache
def shapes() -> Shapes:
    """The data file."""
    return Shapes.model_validate(tomllib.loads(resources.files(__package__).joinpath("shapes.toml").read_text("utf-8")))


def ops() -> list[str]:
    """Names of the ops, in the table's order."""
    return list(dict.fromkeys(k.op for k in shapes().case))


def find_model(name: str) -> str:
    """The key of a model named by key or by full name. Errors: UserError."""
    known = shapes().models
    for key, model in known.items():
        if name.lower() in (key, model.name.lower()):
            return key
    raise UserError(f"There are no shapes of a model '{name}'.", nearest(name, [m.name for m in known.values()]))


def rows(only_ops: list[str], models: list[str], tokens: list[int], quick: bool = False) -> list[Row]:
    """The rows asked for, a model at a time; empty lists mean all. Errors: UserError for a name that is not known."""
    s = shapes()
    for op in only_ops:
        if op not in ops():
            raise UserError(f"No op '{op}' is measured.", nearest(op, ops()))
    if any(t < 1 for t in tokens):
        raise UserError("--tokens must be 1 or more.", "For instance --tokens 4096.")
    keys = [find_model(m) for m in models] or ([QUICK_MODEL] if quick else list(s.models))
    counts = tokens or ([QUICK_TOKENS] if quick else s.tokens)
    found = []
    for model in (s.models[k] for k in dict.fromkeys(keys)):
        for kind in s.case:
            if kind.suits(model) and (not only_ops or kind.op in only_ops):
                found += [Row(kind, model, t) for t in ([0] if kind.once else dict.fromkeys(counts))]
    if not found:
        raise UserError("None of these models has any of these ops.", "Leave --op or --model out.")
    return found
