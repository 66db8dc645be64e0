"""What use of a fine-tuning stack leaves in a home folder, written in a process of its own with HOME pointing there.

Triton's cache is real: a kernel is compiled for sm_121 by the installed Triton. The others cannot be real without a
network, a GPU or the packages themselves, so files are laid out as those libraries lay them out. The result says
which is which.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from sparkproof.runners.child import progress, under_test

MODEL = "models--example--tiny-llama"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(payload: dict[str, Any]) -> dict[str, Any]:
    """Fill the caches.

    `payload`: {'cwd': folder of the training script}. Returns {'ran': [...], 'laid_out': [...], 'why': ''}.
    """
    home, cwd = Path(os.environ["HOME"]), Path(payload["cwd"])
    ran, why = [], ""
    if payload["triton"]:
        progress("compiling a kernel, so that Triton's cache is real")
        with under_test("triton.compile"):
            compile_kernel()
        ran.append("triton")
    else:
        why = "Triton is not installed here, so its cache is laid out too"
        put(home / ".triton/cache/ABCDEFGHIJKLMNOP/kernel.ptx", 4_000)
        put(home / ".triton/cache/ABCDEFGHIJKLMNOP/kernel.cubin", 9_000)
    laid_out = [] if payload["triton"] else ["triton"]
    hub_model(home / ".cache/huggingface/hub" / MODEL)
    put(home / ".cache/huggingface/datasets/json/default-1a2b/0.0.0/json-train.arrow", 50_000)
    tmp = Path(os.environ["TMPDIR"])
    put(tmp / f"torchinductor_{os.environ['USER']}/fxgraph/ab/fabc/def", 7_000)
    put(tmp / f"torchinductor_{os.environ['USER']}/xy/cxyz.py", 2_000)
    put(home / ".nv/ComputeCache/index", 1_000)
    put(home / ".nv/ComputeCache/4/a/4a3b2c1d", 30_000)
    put(cwd / "unsloth_compiled_cache/UnslothSFTTrainer.py", 60_000)
    laid_out += ["huggingface hub and datasets", "inductor", "CUDA compute cache", "unsloth_compiled_cache"]
    return {"ran": ran, "laid_out": laid_out, "why": why}


def put(path: Path, size: int) -> None:
    """A file of `size` bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((path.name.encode() * size)[:size])


def hub_model(folder: Path) -> None:
    """One model as huggingface_hub stores it: blobs by hash, snapshots that link to them, refs, locks."""
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    for name, size in (("config.json", 700), ("model.safetensors", 200_000)):
        blob = hashlib.sha256(name.encode()).hexdigest()
        put(folder / "blobs" / blob, size)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
        put(folder.parent / ".locks" / folder.name / f"{blob}.lock", 0)
    ref = folder / "refs/main"
    ref.parent.mkdir()
    ref.write_text(COMMIT)


def compile_kernel() -> None:
    """Compile one small kernel ahead of time for sm_121; Triton writes it to its cache under HOME."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def scale(x, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(x + at, tl.load(x + at, mask=at < n) * 2.0, mask=at < n)

    kernel = triton.jit(scale)
    source = ASTSource(fn=kernel, signature={"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}, constexprs={"BLOCK": 128})
    triton.compile(source, target=GPUTarget("cuda", 121, 32), options={"num_warps": 4})
