"""Compiles one small Triton kernel ahead of time for compute capability 12.1, on any machine: no GPU is touched.

`python -m sparkproof.facts.compile_child cold FOLDER` compiles with an empty cache in FOLDER, then proves which
variable redirects the assembler: each is pointed at a ptxas that tells its version and fails at everything else, and
the one that makes the compilation fail is live. `... warm FOLDER` compiles with the cache that `cold` left, and once
more with an empty one. JSON lines, as in `torch_child`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import sys
import time
from pathlib import Path

import triton
import triton.language as tl

from sparkproof.facts.child import say

VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
FAILING = """#!/bin/sh
case "$*" in *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.0';; *) echo 'decoy' >&2; exit 9;; esac
"""


@triton.jit
def scale(x_ptr, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """x *= 2, BLOCK elements a program."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    tl.store(x_ptr + at, x * 2.0, mask=at < n)


def build(cache: Path) -> tuple[str, str | None, float]:
    """SHA-256 of the machine code, the .target of the PTX, and the seconds it took, with `cache` as Triton's cache."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    os.environ["TRITON_CACHE_DIR"] = str(cache)
    source = ASTSource(
        fn=scale, signature={"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}, constexprs={"BLOCK": 128}
    )
    start = time.perf_counter()
    made = triton.compile(source, target=GPUTarget("cuda", 121, 32), options={"num_warps": 4})
    seconds = time.perf_counter() - start
    found = re.search(r"\.target\s+(\w+)", made.asm["ptx"])
    return hashlib.sha256(made.asm["cubin"]).hexdigest(), found.group(1) if found else None, round(seconds, 3)


def live_variables(folder: Path) -> list[str]:
    """The variables that make the compilation fail when they name an assembler that fails."""
    decoy = folder / "failing-ptxas"
    decoy.write_text(FAILING, encoding="utf-8")
    decoy.chmod(0o755)
    kept = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    live = []
    try:
        for name in VARIABLES:
            os.environ[name] = str(decoy)
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the program that did not assemble
                    build(folder / f"cache-{name}")
            except Exception:
                live.append(name)
            finally:
                del os.environ[name]
    finally:
        os.environ.update(kept)
    return live


def main(mode: str, folder: Path) -> None:
    """The two halves of the trial."""
    os.environ.pop("TRITON_INTERPRET", None)
    if mode == "cold":
        binary, target, seconds = build(folder / "cache")
        say(cold_binary=binary, target=target, cold_s=seconds)
        say(live_variables=live_variables(folder))
    else:
        binary, _, seconds = build(folder / "cache")
        say(warm_binary=binary, warm_s=seconds)
        again, _, _ = build(folder / "cache-again")
        say(again_binary=again)
    say(done=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
