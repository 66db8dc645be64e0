"""How many planted faults the published bounds of other libraries' own tests would let pass.

A peer's test is data (peers.toml): the results it compares, the bounds, the inputs. Here it stands in for the judge: the
op's kernels are called with normal inputs of the peer's sizes, parameters at its initial values, and what the peer
compares is compared with plain PyTorch in the same dtype as the peer does. Nothing else is looked at. A fault that no
such comparison notices is one that the bounds let pass. An op's own kernels must pass a bound first: one that they fail
says nothing about faults, and is left out by name.
"""

from __future__ import annotations

import fnmatch
import functools
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import torch
from pydantic import Field
from sparktune.ops.spec import DTYPES, OpSpec, Problem, Tensors, named

from sparkproof.judge.families import NORMAL, generator, make_gradient, make_inputs
from sparkproof.results import Strict

PEERS = ("liger", "unsloth")
Values = Literal["ones", "zeros", "uniform", "normal"]
Call = Callable[[Tensors, Problem], Any]


class PeerLibrary(Strict):
    """A library whose tests were read."""

    name: str
    version: str
    looked: str = Field(description="Where its tests were looked for.")


class PeerTest(Strict):
    """One test of a peer, as facts."""

    peer: Literal["liger", "unsloth"]
    op: str
    variants: list[str] = Field(
        default_factory=list, description="The op's variants that it covers, as patterns; empty: all."
    )
    form: Literal["allclose", "signed", "distance"] = Field(
        default="allclose",
        description="allclose: |plain - tested| <= atol + rtol |plain|, each element. signed: the largest of plain - "
        "tested. distance: the 2-norm of the difference.",
    )
    bounds: dict[str, list[float]] = Field(description="dtype -> [atol, rtol], or the one bound of the form.")
    compares: list[str] = Field(default_factory=list, description="Results it compares; empty: all and all gradients.")
    around: Literal["", "mlp"] = Field(default="", description="What the op is tested inside of.")
    parameters: dict[str, Values] = Field(default_factory=dict, description="Values where not the op's own.")
    gradient: Literal["normal", "ones"] = Field(default="normal", description="The output's gradient.")
    scalars: dict[str, float] = Field(default_factory=dict, description="Scalar arguments where not the op's own.")
    published: str = Field(description="The peer's sizes.")
    sizes: list[dict[str, int]] = Field(min_length=1, description="The sizes run here.")
    scaled: str = Field(default="", description="How these differ from the published ones, and why.")
    source: str = Field(min_length=10)

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes it has bounds for."""
        return [DTYPES[d] for d in self.bounds]


@functools.cache
def _read() -> tuple[dict[str, PeerLibrary], list[PeerTest]]:
    data = tomllib.loads(resources.files(__package__).joinpath("peers.toml").read_text(encoding="utf-8"))
    tests = [PeerTest.model_validate(t) for t in data["test"]]
    return {k: PeerLibrary.model_validate(v) for k, v in data["peers"].items()}, tests


def libraries() -> dict[str, PeerLibrary]:
    """Peer -> what was read."""
    return _read()[0]


def tests(op: str, peer: str = "") -> list[PeerTest]:
    """The tests of one op, of one peer or all."""
    return [t for t in _read()[1] if t.op == op and peer in ("", t.peer)]


@dataclass
class Bounds:
    """The peers' bounds for one op: those of its tests that the op's own kernels pass."""

    spec: OpSpec
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kept: dict[str, list[tuple[PeerTest, Problem]]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def admit(self, control: OpSpec) -> None:
        """Take up all peers' problems that `control` passes: the op's file unchanged, loaded as mutants are."""
        for t in tests(self.spec.name):
            for p in _problems(self.spec, t):
                wrong = noticed(t, self.spec, control, p, self.device)
                if wrong:
                    name = f"{p.variant} {str(p.dtype).removeprefix('torch.')} {_words(p)}".strip()
                    self.left_out.setdefault(t.peer, []).append(f"{name}: the right kernel fails it: {wrong}")
                else:
                    self.kept.setdefault(t.peer, []).append((t, p))

    def let_pass(self, tested: OpSpec) -> list[str]:
        """The peers under whose bounds `tested` passes."""
        return [
            peer for peer, kept in self.kept.items()
            if not any(noticed(t, self.spec, tested, p, self.device) for t, p in kept)
        ]  # fmt: skip

    def why_not(self, peer: str) -> str:
        """Why `peer` has no bounds for this op; empty where it has."""
        if self.kept.get(peer):
            return ""
        library = libraries()[peer]
        if self.left_out.get(peer):
            return f"No bound of {library.name} {library.version} could be used: {self.left_out[peer][0]}"
        return f"{library.name} {library.version} publishes no test of such an op ({library.looked})."


def _words(p: Problem) -> str:
    return ", ".join(f"{k} {v}" for k, v in p.dims.items())


def _problems(spec: OpSpec, t: PeerTest) -> list[Problem]:
    wanted = [v for v in spec.variants if not t.variants or any(fnmatch.fnmatchcase(v, w) for w in t.variants)]
    scalars = {**spec.scalars, **t.scalars}
    return [
        Problem(dims, dtype, variant, scalars)
        for dtype in t.dtypes if dtype in spec.dtypes for variant in wanted for dims in t.sizes
    ]  # fmt: skip


def noticed(t: PeerTest, spec: OpSpec, tested: OpSpec, p: Problem, device: torch.device) -> str:
    """What the peer's test sees wrong with `tested`, or "" when it passes."""
    try:
        found = _results(t, spec, tested.call, p, device)
    except Exception as e:
        return f"{type(e).__name__}: {str(e).strip()[:200]}"
    plain = _results(t, spec, lambda s, q: spec.reference(s, q, None), p, device)
    for name, want in plain.items():
        if t.compares and name not in t.compares:
            continue
        got = found.get(name)
        if got is None or got.shape != want.shape:
            return f"{name} is missing or of another shape"
        if not _within(t, str(p.dtype).removeprefix("torch."), got, want):
            return f"{name} is off by {float((got.float() - want.float()).abs().max()):.1e}"
    return ""


SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _within(t: PeerTest, dtype: str, got: torch.Tensor, want: torch.Tensor) -> bool:
    bound = t.bounds[SHORT[dtype]]
    if not want.is_floating_point():
        return torch.equal(got, want)
    if t.form == "allclose":
        return torch.allclose(want, got.to(want.dtype), atol=bound[0], rtol=bound[1])
    if t.form == "signed":
        return float((want - got).amax()) <= bound[0]
    return float(torch.dist(want, got)) <= bound[0]


def _results(t: PeerTest, spec: OpSpec, call: Call, p: Problem, device: torch.device) -> Tensors:
    """Every result and gradient of one call, from inputs that depend on the problem alone."""
    inputs = make_inputs(spec, p, NORMAL, device)
    for name, values in t.parameters.items():
        if name in inputs:
            _fill(inputs[name], values, generator("peer", spec.name, name))
    whole: Call = call
    if t.around == "mlp":
        inputs, whole = _mlp_inputs(p, device), functools.partial(_mlp, call, list(inputs))
    out = named(whole(inputs, p))
    results = {k: o.detach() for k, o in out.items()}
    wanted = [k for k, v in inputs.items() if v.requires_grad]
    through = [k for k, o in out.items() if o.requires_grad and k not in spec.without_gradient]
    if wanted and through:
        gy = [_gradient(t, spec, p, out[k], k) for k in through]
        found = torch.autograd.grad(
            [out[k] for k in through], [inputs[k] for k in wanted], gy, materialize_grads=True, allow_unused=True
        )
        results |= {f"gradient of {k}": g for k, g in zip(wanted, found, strict=True)}
    return results


def _gradient(t: PeerTest, spec: OpSpec, p: Problem, like: torch.Tensor, name: str) -> torch.Tensor:
    return torch.ones_like(like) if t.gradient == "ones" else make_gradient(spec, p, NORMAL, like, name)


def _fill(t: torch.Tensor, values: Values, g: torch.Generator) -> None:
    with torch.no_grad():
        if values in ("ones", "zeros"):
            t.fill_(1.0 if values == "ones" else 0.0)
        else:
            t.copy_((torch.rand if values == "uniform" else torch.randn)(t.shape, generator=g))


def _mlp_inputs(p: Problem, device: torch.device) -> Tensors:
    """x [rows, hidden] and the weights of gate, up and down, all standard normal."""
    m, n, h = p.dims["rows"], p.dims["columns"], p.dims["hidden"]
    shapes = {"x": (m, h), "gate weight": (n, h), "up weight": (n, h), "down weight": (h, n)}
    made = {k: torch.randn(s, generator=generator("peer mlp", k, s)).to(p.dtype) for k, s in shapes.items()}
    return {k: v.to(device).requires_grad_(True) for k, v in made.items()}


def _mlp(call: Call, names: Sequence[str], t: Tensors, p: Problem) -> torch.Tensor:
    gate, up = (torch.nn.functional.linear(t["x"], t[f"{w} weight"]) for w in ("gate", "up"))
    inner = {"gate": gate, "up": up} if len(names) == 2 else {names[0]: torch.cat((gate, up), -1)}
    return torch.nn.functional.linear(named(call(inner, p))["out"], t["down weight"])
