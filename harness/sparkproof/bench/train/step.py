"""One engine's steps: warm-up with losses and gradient norms, then steps timed between CUDA events, then what they took.

Nothing waits for the GPU between timed steps, as in training. What is only nice to know is asked in `optional`, so that it can't
lose a step that was measured.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sparkproof.bench.train import checkpoint, engines
from sparkproof.bench.train.setting import Setting

GIB = 2.0**30
SOFTWARE = (
    "torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "unsloth", "unsloth_zoo", "trl",
    "xformers",
)  # fmt: skip
Batch = tuple[Tensor, Tensor, Tensor | None, list[int] | None]


class Marks:
    """Points in the stream's time (the process's on a CPU), and milliseconds between them."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda

    def now(self) -> Any:
        """A point."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: Any, b: Any) -> float:
        """Milliseconds; on a GPU after it has been waited for."""
        return float(a.elapsed_time(b)) if self.cuda else 1e3 * (b - a)


@contextlib.contextmanager
def optional(what: str, failures: dict[str, str]) -> Iterator[None]:
    """Ask for something a step can do without; what goes wrong is written down."""
    try:
        yield
    except Exception as e:
        failures[what] = f"{type(e).__name__}: {str(e)[:200]}"


def lora_name(parameter: str) -> str:
    """`layers.3.mlp.up_proj.lora_A`, whatever an engine wraps around it. Errors: ValueError for one outside a layer."""
    parts = [p for p in parameter.split(".") if p not in ("default", "weight")]
    if "layers" not in parts:
        raise ValueError(f"a LoRA parameter outside the decoder layers: {parameter}")
    return ".".join(parts[parts.index("layers") :])


def seed_lora(model: Any, s: Setting) -> int:
    """The same values in every engine, B's not zero, so that the first loss sees them; how many there were."""
    count = 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                std = 1 / math.sqrt(p.shape[1]) if "lora_A" in name else 0.01
                p.copy_(checkpoint.normal(lora_name(name), tuple(p.shape), std, "cpu", s.seed).to(p.device, p.dtype))
                count += 1
    return count


def batches(s: Setting, count: int) -> list[Batch]:
    """(ids, labels, positions, lengths) `count` times: the first sixteenth of a row is a prompt without loss."""
    g = torch.Generator().manual_seed(s.seed + 7)
    rows, columns = s.rows()
    found: list[Batch] = []
    for _ in range(count):
        ids = torch.randint(3, s.shape.vocab, (rows, columns), generator=g)
        labels = ids.clone()
        labels[:, : max(1, columns // 16)] = -100
        positions, lengths = None, None
        if s.packed:
            lengths = s.documents()
            positions = torch.cat([torch.arange(n) for n in lengths])[None].to(s.device)
            start = 0
            for n in lengths:
                labels[:, start] = -100  # nothing predicts the first token of the next document
                start += n
        found.append((ids.to(s.device), labels.to(s.device), positions, lengths))
    return found


def labelled_tokens(s: Setting) -> int:
    """Positions of a step whose next token has a loss."""
    return int((batches(s.model_copy(update={"device": "cpu"}), 1)[0][1][:, 1:] != -100).sum())


def optimizer(params: list[Any], s: Setting) -> torch.optim.Optimizer:
    """The same one for every engine."""
    if s.device == "cuda":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(params, lr=s.lr, weight_decay=0.0)  # type: ignore[no-any-return]
    return torch.optim.AdamW(params, lr=s.lr, weight_decay=0.0)


def versions() -> dict[str, str]:
    """Of what was measured, as this process sees it."""
    found = {}
    for name in SOFTWARE:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _collect(cuda: bool) -> None:
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _peaks() -> tuple[float, float]:
    return torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def measure(name: str, folder: str, s: Setting, start: float) -> dict[str, Any]:
    """Build an engine, imported already, and run its steps; one `document.Round`. `start`: `perf_counter` before its import."""
    cuda = s.device == "cuda"
    if cuda:
        torch.cuda.set_device(0)
    built = engines.build(name, folder, s)
    seeded = seed_lora(built.model, s)
    if seeded != 2 * 7 * s.layers:
        raise RuntimeError(f"{seeded} LoRA matrices were given their values, {14 * s.layers} should have been")
    opt = optimizer(built.params, s)
    data = batches(s, s.warmup + s.steps)
    _collect(cuda)
    failures: dict[str, str] = {}
    found: dict[str, Any] = {"failures": failures, "versions": versions()}
    memory: dict[str, float] = {}
    if cuda:
        memory["weights_gib"] = torch.cuda.memory_allocated() / GIB
        with optional("reset of the peaks of loading", failures):
            torch.cuda.reset_peak_memory_stats()
    found["load_s"] = time.perf_counter() - start
    once = _stepper(built, opt, s)
    losses, norms = [], []
    for i in range(s.warmup):
        begin = time.perf_counter()
        loss, norm, _ = once(data[i], True)
        losses.append(float(loss))  # waits for the GPU
        norms.append(norm)
        if i == 0:
            if cuda:
                torch.cuda.synchronize()
            found["first_step_s"] = time.perf_counter() - begin
    if cuda:
        with optional("peaks of warm-up", failures):
            memory["warmup_peak_allocated_gib"], memory["warmup_peak_reserved_gib"] = _peaks()
    _collect(cuda)
    if cuda:
        with optional("reset of peaks", failures):
            torch.cuda.reset_peak_memory_stats()
        with optional("reset of the host's peaks", failures):
            torch.cuda.reset_peak_host_memory_stats()
    begin = time.perf_counter()
    timed = [once(data[s.warmup + i], False)[::2] for i in range(s.steps)]
    if cuda:
        torch.cuda.synchronize()
    found["wall_ms"] = 1e3 * (time.perf_counter() - begin) / s.steps
    marks = Marks(cuda)
    found["step_ms"] = [marks.between(m[0], m[3]) for _, m in timed]
    for i, part in enumerate(("forward_ms", "backward_ms", "optimizer_ms")):
        found[part] = statistics.median(marks.between(m[i], m[i + 1]) for _, m in timed)
    found["loss"] = [_finite(x) for x in [*losses, *(float(loss) for loss, _ in timed)]]
    found["gradient_norm"] = [_finite(x) for x in norms]
    if cuda:
        with optional("peaks", failures):
            memory["peak_allocated_gib"], memory["peak_reserved_gib"] = _peaks()
            if _recorded(built.notes()):
                memory["peak_allocated_gib"] = max(memory["peak_allocated_gib"], memory["warmup_peak_allocated_gib"])
        with optional("pinned host memory", failures):
            memory["host_pinned_peak_gib"] = torch.cuda.host_memory_stats()["allocated_bytes.peak"] / GIB
    found["memory"] = memory
    found["trainable"] = sum(p.numel() for p in built.params)
    with optional("notes", failures):
        found["notes"] = _plain(built.notes())
    if cuda and built.ran is not None:
        refuse_fallback(name, built.ran())
    if cuda:
        _collect(cuda)
        with optional("copy bandwidth", failures):
            found["copy_gb_s"] = copy_canary()
    return found


def _recorded(notes: dict[str, Any]) -> bool:
    """Whether steps were replayed: then what they use lies in a pool that was allocated when they were recorded, in warm-up."""
    return bool(notes.get("graphs", {}).get("graphs"))


def refuse_fallback(name: str, ran: dict[str, Any]) -> None:
    """Errors: RuntimeError where an engine's own kernels did not run: what was timed was another one."""
    from sparkproof.runners.gate_kernels import judge_kernels

    missed = [a for a in judge_kernels(name, ran) if not a.passed]
    if missed:
        raise RuntimeError(
            f"{missed[0].name}: {missed[0].value}, allowed {missed[0].bound}. {missed[0].detail}".strip()
        )


def _stepper(
    built: engines.Built, opt: torch.optim.Optimizer, s: Setting
) -> Callable[[Batch, bool], tuple[Tensor, float | None, list[Any]]]:
    marks = Marks(s.device == "cuda")

    def once(batch: Batch, want_norm: bool) -> tuple[Tensor, float | None, list[Any]]:
        at = [marks.now()]
        # fp32 adapters train under autocast, as Trainer's bf16=True does it.
        with torch.autocast(s.device, torch.bfloat16, enabled=s.lora_dtype == "fp32"):
            loss = built.step(*batch)
        at.append(marks.now())
        loss.backward()
        at.append(marks.now())
        norm = None
        if want_norm:
            norm = float(torch.stack([p.grad.float().norm() for p in built.params if p.grad is not None]).norm())
        opt.step()
        opt.zero_grad(set_to_none=True)
        at.append(marks.now())
        return loss.detach(), norm, at

    return once


def copy_canary() -> float:
    """GB/s of a large copy on the GPU."""
    from sparktune.ops.device import DeviceProperties

    from sparkproof.judge.speed import copy_bandwidth

    properties = DeviceProperties.of(torch.device("cuda", torch.cuda.current_device()))
    return statistics.median(copy_bandwidth(properties))


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def _plain(value: Any) -> Any:
    """What JSON can say."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, str | int | bool | None) else str(value)


def where(s: Setting) -> dict[str, Any]:
    """The device that runs this."""
    if s.device != "cuda":
        return {"device": "CPU", "multiprocessors": 0, "memory_gib": 0.0}
    p = torch.cuda.get_device_properties(0)
    return {"device": p.name, "multiprocessors": p.multi_processor_count, "memory_gib": p.total_memory / GIB}
