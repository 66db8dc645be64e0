"""Short trials on the GPU: `python -m sparkproof.facts.gpu_child canaries|kernels|flex` prints JSON lines.

Nothing is assumed of the device but what it says of itself: sizes follow its shared memory and its free memory, and
results are held against float64 on the CPU. Memory that is asked for is a few hundred MiB at most, and only where that
much more than the watchdog's floor is available.
"""

from __future__ import annotations

import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from sparkproof.facts.nvml_child import REASONS
from sparkproof.measure.memory import available_gib, default_floor_gib

GIB = 2.0**30
LOAD_S = 4.0
COPY_BYTES, GEMV_SHAPE, GEMM_SIZE = 256 * 2**20, (8192, 16384), 4096
NEEDED_GIB = 1.5
HEAD_SIZES = (64, 128, 256)
LENGTH = 128
WORST = 9999.0
DEPTH = 1024  # of the product that fills a block's shared memory; every pipeline that is tried is shorter


def say(**facts: Any) -> None:
    """One line of facts."""
    print(json.dumps(facts), flush=True)


def reason(e: BaseException) -> str:
    """The exception in one line; of several lines the one that says most."""
    lines = [line.strip() for line in str(e).strip().splitlines() if line.strip()]
    telling = next((s for s in lines if "Required" in s or "out of resource" in s), lines[0] if lines else "")
    return f"{type(e).__name__}: {telling[:400]}"


def relative(got: Any, want: Any) -> float:
    """Relative L2 distance in float64, at most WORST: JSON has neither NaN nor infinity."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    error = float((got - want).norm() / want.norm())
    return error if error < WORST else WORST


# --- canaries


def timed_ms(torch: Any, call: Callable[[], Any], repeats: int) -> float:
    """Median of `repeats` calls by CUDA events, after three to warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def canaries(torch: Any) -> None:
    """Copy and matrix-vector bandwidth past the L2 cache, the matrix rate, and the clock under seconds of load."""
    free = torch.cuda.mem_get_info(0)[0] / GIB
    spare = min(free, available_gib() - default_floor_gib())
    if spare < NEEDED_GIB:
        say(canaries={"error": f"only {max(0.0, spare):.1f} GiB are free above the floor; {NEEDED_GIB} are needed"})
        return
    found: dict[str, Any] = {"copy_gb_s": copy_rate(torch), "gemv_gb_s": gemv_rate(torch)}
    say(canaries=found, stage="it loaded the GPU")
    found |= load(torch)
    say(canaries=found)


def copy_rate(torch: Any) -> float:
    """GB/s of a device copy, bytes read and written."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return round(2 * COPY_BYTES / timed_ms(torch, lambda: target.copy_(source), 15) / 1e6, 1)


def gemv_rate(torch: Any) -> float:
    """GB/s of a bf16 matrix times a vector, bytes of the matrix."""
    matrix = torch.empty(GEMV_SHAPE, dtype=torch.bfloat16, device="cuda").normal_()
    vector = torch.ones(GEMV_SHAPE[1], dtype=torch.bfloat16, device="cuda")
    return round(matrix.numel() * 2 / timed_ms(torch, lambda: torch.mv(matrix, vector), 15) / 1e6, 1)


def load(torch: Any) -> dict[str, Any]:
    """Seconds of bf16 products; clock, power, heat and slowdowns are read while they run."""
    x, y = (torch.empty(GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    out = torch.empty_like(x)
    sensors = Sensors(torch.cuda.get_device_properties(0))
    once = timed_ms(torch, lambda: torch.mm(x, y, out=out), 3)
    batch = max(1, int(100 / max(once, 1e-3)))  # a tenth of a second between readings
    rates, start = [], time.perf_counter()
    while time.perf_counter() - start < LOAD_S:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(batch):
            torch.mm(x, y, out=out)
        last.record()
        if time.perf_counter() - start > LOAD_S / 2:  # clocks rise late
            sensors.read()
        torch.cuda.synchronize()
        rates.append(2.0 * GEMM_SIZE**3 * batch / first.elapsed_time(last) / 1e9)
    return {
        "gemm_tflops": round(statistics.median(rates[len(rates) // 2 :]), 1),
        "load_s": round(time.perf_counter() - start, 1),
        **sensors.summary(),
    }


class Sensors:
    """NVML's readings of the device that torch uses; what the driver does not tell stays out."""

    def __init__(self, properties: Any) -> None:
        self.clocks: list[int] = []
        self.powers: list[float] = []
        self.heats: list[float] = []
        self.reasons: set[str] = set()
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = getattr(properties, "uuid", None)
            self.nvml = pynvml
            self.handle = (
                pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}") if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
            )
        except Exception:
            self.nvml = None

    def read(self) -> None:
        """One reading of each."""
        if self.nvml is None:
            return
        n, h = self.nvml, self.handle
        calls: tuple[tuple[list[Any], Callable[[], Any]], ...] = (
            (self.clocks, lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
            (self.powers, lambda: n.nvmlDeviceGetPowerUsage(h) / 1000),
            (self.heats, lambda: float(n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU))),
        )
        for values, call in calls:
            try:
                values.append(call())
            except Exception:  # NOT_SUPPORTED is common on a shared pool
                continue
        try:
            bits = n.nvmlDeviceGetCurrentClocksThrottleReasons(h)
            self.reasons |= {name for bit, name in REASONS.items() if bits & bit}
        except Exception:
            return

    def summary(self) -> dict[str, Any]:
        """Medians under the names of `tried.Canaries`."""
        found: dict[str, Any] = {"load_throttle_reasons": sorted(self.reasons)}
        if self.clocks:
            found["load_clock_mhz"] = int(statistics.median(self.clocks))
        if self.powers:
            found["load_power_w"] = round(statistics.median(self.powers), 1)
        if self.heats:
            found["load_temperature_c"] = statistics.median(self.heats)
        return found


# --- kernels


def shared_memory(torch: Any) -> dict[str, Any]:
    """The deepest pipeline of a tiled product that fits into a block's shared memory, and the first that does not."""
    limit = getattr(torch.cuda.get_device_properties(0), "shared_memory_per_block_optin", None)
    if limit is None:
        return {"limit": 0, "error": "this torch does not tell how much shared memory a block may use"}
    from sparkproof.facts.pipeline_kernel import BLOCK, BUFFER_BYTES, launch, shared_bytes

    found: dict[str, Any] = {"limit": limit}
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, generator=generator).bfloat16().cuda() for n in ((BLOCK, DEPTH), (DEPTH, BLOCK)))
    want = a.double().cpu() @ b.double().cpu()

    def right(stages: int) -> bool:
        return relative(launch(a, b, stages), want) < 0.02

    sizes = {}
    for stages in range(max(1, limit // BUFFER_BYTES - 1), limit // BUFFER_BYTES + 4):
        sizes[stages] = shared_bytes(a, b, stages)
        if sizes[stages] > limit:
            break
    fits = max((s for s in sizes if sizes[s] <= limit), default=None)
    over = next((s for s in sizes if sizes[s] > limit), None)
    if fits is None or over is None:
        return found | {"error": f"no pair of pipelines was found around the limit: {sorted(sizes.values())}"}
    found |= {"fits_bytes": sizes[fits], "over_bytes": sizes[over]}
    try:
        found["fits_ran"] = right(fits)
    except Exception as e:
        found |= {"fits_ran": False, "error": reason(e)}
    try:
        launch(a, b, over)
        torch.cuda.synchronize()
    except Exception as e:
        found["over_raised"] = reason(e)
    try:
        found["alive_after"] = right(1)
    except Exception as e:
        found |= {"alive_after": False, "error": reason(e)}
    return found


def attention(torch: Any) -> list[dict[str, Any]]:
    """Every backend of scaled_dot_product_attention, by dtype, head size and direction, against float64 on the CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    rows: list[dict[str, Any]] = []
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for size, (label, dtype) in itertools.product(HEAD_SIZES, dtypes.items()):
        case = Case(torch, size, dtype)
        for name, backend in backends.items():
            say(stage=f"it tried {name} attention in {label} with heads of {size}")

            def call(q: Any, k: Any, v: Any, backend: Any = backend) -> Any:
                with sdpa_kernel(backend):
                    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

            rows += [{"backend": name, "dtype": label, "head_size": size, **r} for r in case.rows(call)]
        say(attention=rows)
    return rows


class Case:
    """Causal attention of one shape and dtype, with its float64 answers."""

    def __init__(self, torch: Any, size: int, dtype: Any) -> None:
        generator = torch.Generator().manual_seed(size)
        q, k, v, dy = (torch.randn(1, 2, LENGTH, size, generator=generator).to(dtype) for _ in range(4))
        self.torch, self.inputs, self.dy = torch, [q, k, v], dy
        exact = [t.double().requires_grad_() for t in (q, k, v)]
        scores = exact[0] @ exact[1].transpose(-1, -2) / size**0.5
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        self.want = scores.masked_fill(mask, float("-inf")).softmax(-1) @ exact[2]
        self.want_grads = torch.autograd.grad(self.want, exact, dy.double())

    def rows(self, call: Callable[[Any, Any, Any], Any], once: bool = False) -> list[dict[str, Any]]:
        """Forward and backward of one implementation; `once`: forward not without gradients too, which may do more.

        A backend may refuse a forward pass that will be differentiated, and take it otherwise.
        """
        torch = self.torch
        leaves = [t.cuda().requires_grad_() for t in self.inputs]
        try:
            with torch.set_grad_enabled(once):
                y = call(*leaves)
            forward = {"direction": "forward", "error": relative(y, self.want)}
        except Exception as e:
            return [{"direction": d, "refused": reason(e)} for d in ("forward", "backward")]
        try:
            grads = torch.autograd.grad(y if once else call(*leaves), leaves, self.dy.cuda())
            worst = max(relative(g, w) for g, w in zip(grads, self.want_grads, strict=True))
            backward: dict[str, Any] = {"direction": "backward", "error": worst}
        except Exception as e:
            backward = {"direction": "backward", "refused": reason(e)}
        return [forward, backward]


def flex(torch: Any) -> list[dict[str, Any]]:
    """Compiled flex_attention with heads of 256, as Gemma 3 has them; its caches are new and end with the parent's
    folder."""
    module = importlib.import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(module.flex_attention)
    mask = module.create_block_mask(lambda b, h, q, k: q >= k, None, None, LENGTH, LENGTH, device="cuda")
    case = Case(torch, 256, torch.bfloat16)
    rows = case.rows(lambda q, k, v: compiled(q, k, v, block_mask=mask), once=True)  # each compilation takes seconds
    return [{"backend": "flex", "dtype": "bf16", "head_size": 256, **r} for r in rows]


def convolution(torch: Any) -> dict[str, Any]:
    """A small convolution, which goes through cuDNN, against the CPU."""
    try:
        generator = torch.Generator().manual_seed(0)
        x, w = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(8, 4, 3, 3, generator=generator)
        got = torch.nn.functional.conv2d(x.cuda(), w.cuda())
        error = relative(got, torch.nn.functional.conv2d(x.double(), w.double()))
        return {"convolution": error < 0.01, "convolution_error": None if error < 0.01 else f"off by {error:.3g}"}
    except Exception as e:
        return {"convolution": False, "convolution_error": reason(e)}


def main(what: str) -> None:
    """One group of trials; each stage says what it is about to do."""
    say(stage="it imported torch")
    import torch

    if what == "canaries":
        say(stage="it timed copies")
        canaries(torch)
    elif what == "kernels":
        say(stage="it ran a convolution")
        say(**convolution(torch))
        say(stage="it filled a block's shared memory")
        try:
            say(shared_memory=shared_memory(torch))
        except Exception as e:
            say(shared_memory={"limit": 0, "error": reason(e)})
        attention(torch)
    else:
        say(stage="it compiled flex_attention with heads of 256")
        try:
            say(attention=flex(torch))
        except Exception as e:
            refused = {"backend": "flex", "dtype": "bf16", "head_size": 256, "refused": reason(e)}
            say(attention=[{**refused, "direction": d} for d in ("forward", "backward")])
    say(done=True)


if __name__ == "__main__":
    main(sys.argv[1])
