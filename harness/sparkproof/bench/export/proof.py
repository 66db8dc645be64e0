"""Which backend ran a consumer, and whether it is the one that a number would be about.

A CPU build of llama.cpp answers every question rightly on a machine with a GPU, at half the speed or less, and says nothing
(row 55 of docs/failures.md). So a speed counts only beside its consumer's own account of where it ran: llama.cpp's log (layers
offloaded, and the buffers of weights, cache and computation), or the devices of a torch model's parameters and the kernels that
one of its forwards launched. What proves nothing is refused as much as what proves the wrong thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparkproof.bench.export.document import Backend, Device, Proof
from sparkproof.checks.catalogue import CATALOGUE
from sparkproof.runners.export_placement import Placement

ROW = 55
# PyPI's wheel has no other backend than the CPU; the publisher's own index has those with CUDA (its README, "Installation")
WHEEL = "pip install xllamacpp --force-reinstall --no-deps --index-url https://xorbitsai.github.io/xllamacpp/whl/cu132"
GPU_TYPES = ("cuda",)
PRODUCTS = ("addmm", "::mm", "::bmm", "gemm", "gemv", "attention", "mkldnn", "4bit")


@dataclass(frozen=True)
class Refusal:
    """Why a speed does not count, and what would make it."""

    reason: str
    fix: str
    row: int


def of_llama_cpp(p: Placement) -> Proof:
    """From llama.cpp's log. On a GPU: every layer, the whole cache, and computation there; the embedding may stay on the host."""

    def on(buffers: Mapping[str, float]) -> set[bool]:
        return {p.is_gpu(name) for name in buffers}

    weights, cache, compute = on(p.weights), on(p.cache), on(p.compute)
    backend: Backend = "mixed"
    if not weights or not compute:
        backend = "unproven"
    elif True not in weights | cache | compute:
        backend = "cpu"
    elif p.layers and p.offloaded == p.layers and True in weights and True in compute and False not in cache:
        backend = "gpu"
    return Proof(
        backend=backend, devices=[f"{n} ({d})" if d else n for n, d in p.devices.items()], weights_mib=dict(p.weights),
        cache_mib=dict(p.cache), compute_mib=dict(p.compute), layers_offloaded=p.offloaded, layers=p.layers,
        lines=list(p.lines),
    )  # fmt: skip


def of_torch(
    placed: Mapping[str, int], launched: int, names: Sequence[str], modules: Mapping[str, int], devices: Sequence[str]
) -> Proof:
    """From a model in torch: bytes of parameters by device, kernels on the GPU and names of all that a forward ran."""
    kinds = {device.partition(":")[0] in GPU_TYPES for device in placed}
    backend: Backend = "mixed"
    if not placed or (kinds == {True} and not launched):
        backend = "unproven"
    elif kinds == {True}:
        backend = "gpu"
    elif set(placed) == {"cpu"} and not launched:
        backend = "cpu"
    return Proof(
        backend=backend, devices=list(devices), weights_mib={d: n / 2**20 for d, n in placed.items()},
        gpu_kernels=launched, kernels=[n for n in names if any(w in n.lower() for w in PRODUCTS)][:12], modules=dict(modules),
    )  # fmt: skip


def judge(consumer: str, proof: Proof, expected: Device, gpu_present: bool) -> Refusal | None:
    """None: it ran where it was to run. `gpu_present`: this machine has a GPU, usable or not."""
    wanted = "gpu" if expected == "cuda" else "cpu"
    if proof.backend == wanted:
        return None
    if proof.backend == "unproven":
        reason = f"nothing that {consumer} says proves where it ran: {_lacks(proof)}"
    elif wanted == "cpu":
        reason = f"{consumer} ran on a GPU though the CPU was asked for: {_where(proof)}"
    elif proof.backend == "mixed":
        reason = f"{consumer} ran on the GPU only in part: {_where(proof)}"
    else:
        has = " though this machine has a GPU" if gpu_present else ""
        reason = f"{consumer} ran on the CPU{has}: {_where(proof)}"
    return Refusal(f"{reason} (row {ROW} of docs/failures.md)", fix(consumer) if wanted == "gpu" else "", ROW)


def fix(consumer: str) -> str:
    """What brings a consumer back to the GPU."""
    if consumer == "llama.cpp":
        return f"{WHEEL}; a llama.cpp of your own: {CATALOGUE['export.llama_cpp'].fix}"
    if consumer == "vllm":
        return "pip install --force-reinstall vllm  # PyPI's is its CUDA build; in the environment of SPARKPROOF_VLLM_PYTHON"
    return CATALOGUE["torch.cpu_build"].fix


def ran_on(proof: Proof) -> str:
    """In a word or three, for a table."""
    if proof.backend == "gpu":
        names = [d for d in proof.weights_mib if not d.upper().startswith(("CPU", "CUDA_HOST"))]
        return ", ".join(sorted(names))
    return proof.backend


def evidence(proof: Proof) -> str:
    """What proves it, on one line."""
    return f"{proof.backend}: {_where(proof)}"


def _lacks(p: Proof) -> str:
    if p.gpu_kernels is not None:
        return (
            "its parameters lie on a GPU, and a forward launched no kernel there" if p.weights_mib else "no parameters"
        )
    found = {"weights": p.weights_mib, "computation": p.compute_mib}
    return f"its log names no buffer of {' or '.join(name for name, sizes in found.items() if not sizes)}"


def _where(p: Proof) -> str:
    if p.gpu_kernels is not None:
        return f"parameters on {_sizes(p.weights_mib)}; {p.gpu_kernels} kernels on a GPU in one forward"
    layers = "says nothing of layers" if p.layers is None else f"{p.layers_offloaded} of {p.layers} layers offloaded"
    parts = (("weights", p.weights_mib), ("cache", p.cache_mib), ("computation", p.compute_mib))
    sizes = "; ".join(f"{name} in {_sizes(found)}" for name, found in parts if found)
    return f"log: {layers}; {sizes}; its build has {', '.join(p.devices) or 'no device'}"


def _sizes(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {mib:.1f} MiB" for name, mib in found.items())
