"""The contract of an op: what its file declares so that the judge, the compile gate and the report need nothing more.

An op's module ends with `OP = OpSpec(...)`. From it follow the correctness cases, the mutants, the ahead-of-time gate
and the speed case; a new op is this one file and its scenarios. Modules are found by `discover()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from sparktune.ops.device import DeviceProperties

Tensors = dict[str, torch.Tensor]
Outputs = torch.Tensor | Tensors  # one result, or several by name
Role = Literal["activation", "parameter", "constant"]


@dataclass(frozen=True)
class Problem:
    """One size, element type and variant of an op, with the op's scalar arguments."""

    dims: Mapping[str, int]
    dtype: torch.dtype
    variant: str
    scalars: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Input:
    """One tensor argument.

    `activation`: takes the values of the input family under test. `parameter`: always random, around `centre` with
    standard deviation `spread`, whatever the family. `constant`: made by `make` (codes, tables). `positive` takes
    absolute values; `layouts` says whether views with other strides are tried.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role = "activation"
    grad: bool = False
    centre: float = 0.0
    spread: float = 1.0
    positive: bool = False
    layouts: bool = True
    make: Callable[[torch.Generator], torch.Tensor] | None = None


@dataclass(frozen=True)
class Mutant:
    """A planted fault: `old` occurs exactly once in the op's file, above its table of mutants, and becomes `new`.

    `file` names another file of the ops, which the op imports, to plant it in.
    """

    id: str
    description: str
    old: str
    new: str
    file: str = ""

    @classmethod
    def table(cls, text: str) -> tuple[Mutant, ...]:
        """Read a table of entries such as

            no-eps: eps left out
            - / n + eps)
            + / n)

        Several `-` or `+` lines make text over several lines; `no-eps @norms: ...` plants it in norms.py. Errors:
        ValueError on an entry that is not whole.
        """
        found: list[dict[str, Any]] = []
        for line in text.strip("\n").splitlines():
            if line[:2] in ("- ", "+ "):
                found[-1]["old" if line[0] == "-" else "new"].append(line[2:])
            elif line.strip():
                name, _, description = line.partition(": ")
                id_, _, file = name.partition(" @")
                found.append({"id": id_, "file": file, "description": description, "old": [], "new": []})
        for m in found:
            if not (m["description"] and m["old"] and m["new"]):
                raise ValueError(f"mutant {m['id']!r} needs `id: description`, then a `- ` and a `+ ` line")
        return tuple(cls(m["id"], m["description"], "\n".join(m["old"]), "\n".join(m["new"]), m["file"]) for m in found)


@dataclass(frozen=True)
class Launch:
    """One configuration that the heuristics can choose, as the ahead-of-time compiler wants it.

    `signature` has one entry per kernel argument: a Triton type such as "*bf16" or "i32", or "constexpr" for the
    names in `constexprs`. `when` says which call chooses it.
    """

    when: str
    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3
    dtype: str = ""
    variant: str = ""
    fp_fusion: bool = False  # as the op passes it to `dispatch.launch`


@dataclass(frozen=True)
class Law:
    """A metamorphic law: two ways to get the same tensor. `sides` runs both through the op as it is called.

    Holds when the sides differ nowhere by more than `tolerance` relative to the larger; 0 means bit for bit. A law
    that does not apply to a variant returns None.
    """

    name: str
    sides: Callable[
        [Callable[[Tensors, Problem], torch.Tensor], Tensors, Problem], tuple[torch.Tensor, torch.Tensor] | None
    ]
    tolerance: float = 0.0


@dataclass(frozen=True)
class Peer:
    """An independent implementation that the op must equal bit for bit, such as bitsandbytes."""

    name: str
    package: str
    call: Callable[[Tensors, Problem], Outputs]  # of several outputs, those to compare; none where it has no say


@dataclass(frozen=True)
class OpSpec:
    """All that is known of one op."""

    name: str
    summary: str
    variants: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    # Label -> sizes. "typical" takes every input family, the others the normal one; "far" has 3 rows that lie 2**30
    # elements apart; "huge" has over 2**31 elements and runs on a GPU only; "speed" is what is timed.
    sizes: Mapping[str, Mapping[str, int]]
    inputs: Callable[[Problem], dict[str, Input]]
    call: Callable[[Tensors, Problem], Outputs]
    # reference(tensors, problem, compute): plain PyTorch; `compute` is None for the op's own rounding order, or
    # float64 for the oracle, in which nothing is rounded in between.
    reference: Callable[[Tensors, Problem, torch.dtype | None], Outputs]
    launches: Callable[[DeviceProperties], list[Launch]]
    bytes_moved: Callable[[Problem, Literal["forward", "backward"]], int]
    flops: Callable[[Problem, Literal["forward", "backward"]], int]
    mutants: tuple[Mutant, ...]
    laws: tuple[Law, ...] = ()
    # exact(tensors, problem, slack): the lowest and highest result that the promised rounding order allows when what is
    # computed before the first rounding is right to a relative `slack`; one and the same, bit for bit, at slack 0. Two
    # dicts name those of several outputs for which it is promised.
    exact: Callable[[Tensors, Problem, float], tuple[Outputs, Outputs]] | None = None
    exact_slack: float = 0.0  # what a GPU has to meet; the interpreter's exp differs in its last bits
    peer: Peer | None = None
    # tail(tensors, problem): the last few rows of a problem as a problem of its own, to judge a huge case by.
    tail: Callable[[Tensors, Problem], tuple[Tensors, Problem]] | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)
    # Integer outputs (codes) are the reference's; by name, the share of elements that may differ, and how far.
    integer_slack: Mapping[str, float] = field(default_factory=dict)
    zero_of_equals: tuple[
        str, ...
    ] = ()  # outputs that are rightly 0 where all inputs are equal, or a last bit beside it
    integer_distance: int = 1
    bound: Literal["memory", "matrix"] = "memory"  # what limits its speed: bytes over bandwidth, or matrix products
    # Whether Inf must stay Inf. A product with zeros that plain PyTorch does not form may make NaN of it.
    nonfinite_kinds: bool = True
    # Outputs to which no gradient flows, such as a log-sum-exp that is kept for inspection.
    without_gradient: tuple[str, ...] = ()
    compiles: bool = True  # an optimiser, say, is no part of a graph
    inside_ops: tuple[str, ...] = ()  # variants for use inside other ops, which never stand in a graph themselves

    def problem(self, size: str, dtype: torch.dtype, variant: str) -> Problem:
        """The problem of one of `sizes`."""
        return Problem(self.sizes[size], dtype, variant, self.scalars)

    @property
    def has_backward(self) -> bool:
        """Whether any input takes a gradient."""
        p = self.problem("typical", self.dtypes[0], self.variants[0])
        return any(i.grad for i in self.inputs(p).values())


def named(found: Outputs) -> Tensors:
    """Results by name; a single one is called "out"."""
    return {"out": found} if isinstance(found, torch.Tensor) else found


TRITON_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int32: "i32",
    torch.int64: "i64",
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
