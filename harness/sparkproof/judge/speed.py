"""How fast an op is, as a fraction of what this device can copy, measured in the same process.

Every sample times a batch of calls between two CUDA events, with inputs rotated through sets that together exceed the
L2 cache several times; engines take turns sample by sample. A copy canary before and after says whether speed can be
judged: a clock that moved, or a neighbour, shows there first.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from sparktune.ops.device import DeviceProperties
from sparktune.ops.spec import OpSpec, Outputs, Problem, Tensors, named

from sparkproof.judge import stats
from sparkproof.judge.families import generator
from sparkproof.measure.gpu_time import gpu_ms

SAMPLES = 25
TARGET_MS = 4.0  # one sample; launch gaps and event resolution are then small
COPY_BYTES_MIN = 2**28
Pass = Literal["forward", "backward"]


def measure(spec: OpSpec, dtype: torch.dtype, variant: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Forward and, if there is one, backward, against plain PyTorch and torch.compile; needs a CUDA GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    properties = DeviceProperties.of(device)
    p = spec.problem("speed", dtype, variant)
    before = copy_bandwidth(properties)
    matrix = matrix_rate(dtype) if spec.bound == "matrix" else []
    sets = _sets(spec, p, device, properties)
    passes = {}
    for which in ("forward", "backward") if spec.has_backward else ("forward",):
        progress(f"{spec.name} {which}")
        passes[which] = _one_pass(spec, p, sets, which, before, matrix)  # type: ignore[arg-type]
    after = copy_bandwidth(properties)
    drift = statistics.median(after) / statistics.median(before) - 1
    return {
        "device": torch.cuda.get_device_name(device),
        "dims": dict(p.dims),
        "copy": {"before": before, "after": after, "drift": drift, "band": stats.CANARY_BAND, "unit": "GB/s"},
        "trusted": abs(drift) <= stats.CANARY_BAND,
        "input_sets": len(sets),
        "passes": passes,
        "bound": spec.bound,
    }


def matrix_rate(dtype: torch.dtype) -> list[float]:
    """TFLOP/s of a large square matrix product, one value a sample."""
    n = 8192 if dtype.itemsize == 2 else 4096
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls = _calls(lambda i: torch.mm(a, b, out=out))
    return [2 * n**3 / ms / 1e9 for ms in (_time(lambda i: torch.mm(a, b, out=out), calls) for _ in range(SAMPLES))]


def copy_bandwidth(p: DeviceProperties) -> list[float]:
    """GB/s read and written by a device-to-device copy far larger than L2, one value a sample."""
    n = max(COPY_BYTES_MIN, 8 * p.l2_bytes)
    source = torch.empty(n, dtype=torch.uint8, device="cuda").random_(generator=torch.Generator("cuda"))
    target = torch.empty_like(source)
    calls = _calls(lambda i: target.copy_(source))
    return [2 * n / ms / 1e6 for ms in (_time(lambda i: target.copy_(source), calls) for _ in range(SAMPLES))]


def _sets(spec: OpSpec, p: Problem, device: torch.device, properties: DeviceProperties) -> list[Tensors]:
    """Enough sets of inputs that a second use finds nothing of the first in L2: at least three."""
    size = sum(torch.Size(i.shape).numel() * i.dtype.itemsize for i in spec.inputs(p).values())
    count = max(3, -(-4 * properties.l2_bytes // size))
    found = []
    for index in range(count):
        made: Tensors = {}
        for name, i in spec.inputs(p).items():
            if i.make is not None:
                t = i.make(generator(spec.name, "speed", index, name)).to(device)
            else:
                t = torch.empty(i.shape, dtype=i.dtype, device=device).normal_().mul_(i.spread).add_(i.centre)
                t = t.abs_() if i.positive else t
            made[name] = t.requires_grad_(i.grad)
        found.append(made)
    return found


def _one_pass(
    spec: OpSpec, p: Problem, sets: list[Tensors], which: Pass, copy: list[float], matrix: list[float]
) -> dict[str, Any]:
    engines: dict[str, Callable[[Tensors], Outputs]] = {
        "sparktune": lambda t: spec.call(t, p),
        "plain PyTorch": lambda t: spec.reference(t, p, None),
    }
    names = list(spec.inputs(p))

    def flat(*tensors: torch.Tensor) -> Outputs:
        return spec.reference(dict(zip(names, tensors, strict=True)), p, None)

    notes = []
    try:
        compiled = torch.compile(flat, fullgraph=True)
        compiled(*sets[0].values())
        engines["torch.compile"] = lambda t: compiled(*t.values())
    except Exception as e:  # a yardstick that does not build is left out, in writing; the op is judged without it
        notes.append(f"torch.compile of the reference failed: {type(e).__name__}: {str(e)[:300]}")
    samples: dict[str, list[float]] = {}
    with _runs(engines, sets, which) as runs:
        calls = {name: _calls(run) for name, run in runs.items()}
        for _ in range(SAMPLES):
            for name, run in runs.items():
                samples.setdefault(name, []).append(_time(run, calls[name]))
    moved = spec.bytes_moved(p, which)
    ours = stats.median(samples["sparktune"])
    bandwidth = [moved / ms / 1e6 for ms in samples["sparktune"]]
    rates = [spec.flops(p, which) / ms / 1e9 for ms in samples["sparktune"]]
    return {
        "tflop_s": asdict(stats.median(rates)) | {"samples": rates},
        "matrix_fraction": asdict(stats.ratio(rates, matrix)) if matrix else None,
        "bytes": moved,
        "flops": spec.flops(p, which),
        "ms": {name: asdict(stats.median(s)) | {"samples": s} for name, s in samples.items()},
        "gb_s": asdict(stats.median(bandwidth)) | {"samples": bandwidth},
        "copy_fraction": asdict(stats.ratio(bandwidth, copy)),
        "speedup": {n: asdict(stats.ratio(s, samples["sparktune"])) for n, s in samples.items() if n != "sparktune"},
        "sentences": [
            stats.verdict(stats.ratio(s, samples["sparktune"]), n) for n, s in samples.items() if n != "sparktune"
        ],
        "notes": notes,
        "calls_per_sample": calls,
        "median_ms": ours.value,
    }


@contextmanager
def _runs(
    engines: dict[str, Callable[[Tensors], Outputs]], sets: list[Tensors], which: Pass
) -> Iterator[dict[str, Callable[[int], Any]]]:
    """Engine -> what one call does, given its number."""
    if which == "forward":
        with torch.no_grad():
            yield {name: (lambda i, f=f: f(sets[i % len(sets)])) for name, f in engines.items()}  # type: ignore[misc]
        return
    wanted = [[t for t in s.values() if t.requires_grad] for s in sets]
    graphs = {name: [_differentiable(f(s)) for s in sets] for name, f in engines.items()}
    gy = [[torch.empty_like(y).normal_() for y in ys] for ys in graphs["sparktune"]]

    def run(ys: list[list[torch.Tensor]]) -> Callable[[int], Any]:
        def call(i: int) -> Any:
            k = i % len(sets)
            return torch.autograd.grad(ys[k], wanted[k], gy[k], retain_graph=True)

        return call

    yield {name: run(ys) for name, ys in graphs.items()}


def _differentiable(out: Outputs) -> list[torch.Tensor]:
    return [t for t in named(out).values() if t.requires_grad]


def _time(run: Callable[[int], Any], calls: int) -> float:
    """Milliseconds a call, over one batch."""

    def batch() -> None:
        for i in range(calls):
            run(i)

    return gpu_ms(torch, batch) / calls


def _calls(run: Callable[[int], Any]) -> int:
    """Calls a sample, after a warm-up."""
    for i in range(3):
        run(i)
    torch.cuda.synchronize()
    return max(3, int(TARGET_MS / max(1e-3, _time(run, 5))) + 1)
