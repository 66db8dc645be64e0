"""The far side of `torch_probe`: `python -m sparkproof.facts.torch_child` prints JSON lines, the surest facts first."""

from __future__ import annotations

import contextlib
import re
import warnings
from pathlib import Path
from typing import Any

from sparkproof.facts.child import say

GIB = 2.0**30
CUDA_LIBRARY = re.compile(r"/lib(cudart|cudnn|cublas|cublasLt|nvrtc|cuda)[\w-]*\.so")


def main() -> None:
    """Import, ask, compute; every stage says what it is about to do."""
    say(stage="it was imported")
    try:
        import torch
    except Exception as e:
        say(torch={"error": f"import torch: {type(e).__name__}: {e}"}, done=True)
        return
    facts: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda, "file": torch.__file__}
    with contextlib.suppress(Exception):  # a CPU build has no such function
        facts["arch_list"] = (torch._C._cuda_getArchFlags() or "").split()
    try:
        cudnn = torch.backends.cudnn.version()
        facts["cudnn"] = str(cudnn) if cudnn else None
    except Exception as e:  # it compares what it was built with to what the loader found
        facts["cudnn_error"] = f"{type(e).__name__}: {' '.join(str(e).split())[:400]}"
    say(torch=facts, stage="it started CUDA")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
        error = None
        if available or torch.version.cuda:
            try:
                torch.cuda.init()
            except Exception as e:
                available, error = False, f"{type(e).__name__}: {e}"
    say(
        torch={
            "cuda_available": available,
            "error": error,
            "warnings": list(dict.fromkeys(" ".join(str(w.message).split()) for w in caught)),
        }
    )
    if available:
        say(stage="it asked for free memory")
        free, total = torch.cuda.mem_get_info(0)
        say(
            cuda_free_gib=round(free / GIB, 3),
            cuda_total_gib=round(total / GIB, 3),
            stage="it read the device's properties",
        )
        gpus = [describe(torch, i) for i in range(torch.cuda.device_count())]
        say(gpus=gpus, stage="it computed on the GPU")
        problems = []
        for index, gpu in enumerate(gpus):
            problem = compute(torch, f"cuda:{index}")
            gpu["usable_by_torch"] = problem is None
            problems += [f"{gpu['name']}: {problem}"] if problem else []
        say(gpus=gpus, torch={"error": "; ".join(problems)} if problems else {})
    say(loaded=loaded(), done=True)


def loaded() -> list[str]:
    """Paths of the CUDA libraries that this process has mapped: what the loader really chose."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if line.count("/") and len(line.split(maxsplit=5)) == 6}
    return sorted(p for p in paths if CUDA_LIBRARY.search(p))


def describe(torch: Any, index: int) -> dict[str, Any]:
    """Device properties under the names of `model.Gpu`."""
    p = torch.cuda.get_device_properties(index)
    # older builds lack this and the opt-in size; the CUDA driver's own answers complete them
    integrated = getattr(p, "is_integrated", None)
    return {
        "name": p.name,
        "uuid": f"GPU-{p.uuid}" if getattr(p, "uuid", None) else None,
        "compute_capability": f"{p.major}.{p.minor}",
        "sm_count": p.multi_processor_count,
        "shared_memory_per_block_optin": getattr(p, "shared_memory_per_block_optin", None),
        "integrated": None if integrated is None else bool(integrated),
        "memory_total_gib": round(p.total_memory / GIB, 2),
    }


def compute(torch: Any, device: str) -> str | None:
    """A bf16 product and its gradient on `device` against float32 on the CPU; None if they agree, else what is wrong.

    Both are sums of 64 numbers between 0 and 1, so about 16 and 32; bf16 rounds those to steps of 0.125 and 0.25, and
    the bound is one step. A kernel that was not built for this GPU raises or leaves zeros.
    """
    try:
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.rand(64, 64, generator=generator).bfloat16() for _ in range(2))
        x = a.to(device).requires_grad_()
        y = x @ b.to(device)
        y.float().sum().backward()
        want, want_grad = a.float() @ b.float(), b.float().sum(1).expand(64, 64)
        for name, got, right in (("product", y, want), ("gradient", x.grad, want_grad)):
            worst = (got.detach().float().cpu() - right).abs().max().item()
            if not worst <= 0.25:
                return f"the {name} of two bf16 matrices is off by {worst:.3g}"
    except Exception as e:
        return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"
    return None


if __name__ == "__main__":
    main()
