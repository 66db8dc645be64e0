"""The ahead-of-time gate: every configuration an op can choose, compiled for a target without a GPU, and held to its
limits.

Triton itself enforces none: a tile of 147456 bytes of shared memory compiles for sm_121 without complaint and fails
at its first launch. Shared memory comes from the compiled kernel's metadata; registers and spills from the log of the
assembler that Triton bundles for the target and runs. What lies in Triton's cache has no log and is compiled again.

Targets of one family (sm_120 and sm_121) get the same PTX but for its target's name, so a configuration that was compiled for
one of them is only assembled for the other, a fifth of the time; the first of each op is compiled for both, to prove it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import triton
from sparktune.ops import load_op, op_names
from sparktune.ops.spec import Launch, OpSpec

from sparkproof.errors import UserError
from sparkproof.judge.targets import TARGETS, Target

SCHEMA = "sparkproof/compile-kernels/1"
TOGETHER = 4  # ops a process, whose imports cost 4 s of CPU time and 14 configurations of an op on a target 6 s
ALIGNED = [["tt.divisibility", 16]]  # what Triton assumes of a tensor's pointer, and vectorises by
USED = re.compile(r"Used (\d+) registers")
TARGET = re.compile(r"^\.target sm_\w+", re.MULTILINE)
SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Row:
    """One configuration on one target. `spills` and `shared_bytes` are bytes; None where it did not compile."""

    op: str
    arch: str
    kernel: str
    configuration: str
    dtype: str
    variant: str
    num_warps: int
    passed: bool
    reason: str = ""
    registers: int | None = None
    registers_limit: int = 0
    spills: int | None = None
    shared_bytes: int | None = None
    shared_limit: int = 0
    seconds: float = 0.0


def compile_all(
    archs: Sequence[str] = ("sm_121",),
    ops: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
    timeout_s: float = 600,
) -> dict[str, Any]:
    """Compile all configurations of some or all ops: `schema`, `passed`, `seconds`, `configurations` (a `Row` each).

    Up to `TOGETHER` ops are compiled in a process of their own without TRITON_INTERPRET, two processes at a time, for
    `timeout_s` an op. Errors: UserError for an unknown architecture or op.
    """
    start = time.perf_counter()
    for arch in archs:
        if arch not in TARGETS:
            raise UserError(f"Unknown architecture '{arch}'.", f"Known: {', '.join(TARGETS)}.")
    known = op_names()
    for op in ops or ():
        if op not in known:
            raise UserError(f"There is no op called '{op}'.", f"Known: {', '.join(known)}.")
    wanted = list(ops or known)
    # A process imports torch and Triton for seconds before it compiles, so it takes all targets unless it is alone.
    groups = [",".join(archs)] if len(wanted) > 1 else list(archs)
    parts = -(-len(wanted) // TOGETHER)
    jobs = [(wanted[i::parts], group, ",".join(dtypes or ())) for i in range(parts) for group in groups]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        rows = [
            row
            for part in pool.map(lambda job: _in_process(*job, progress=progress, timeout_s=timeout_s), jobs)
            for row in part
        ]
    rows.sort(key=lambda row: wanted.index(row["op"]))
    return {
        "schema": SCHEMA,
        "triton": triton.__version__,
        "passed": bool(rows) and all(r["passed"] for r in rows),
        "seconds": round(time.perf_counter() - start, 2),
        "configurations": rows,
    }


def compile_op(
    spec: OpSpec, target: Target, module: Mapping[str, Any], dtypes: Sequence[str] = (), known: Known | None = None
) -> list[Row]:
    """All configurations `spec` can choose on the target's device, in this process; `module` holds its kernels."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "Triton was imported with TRITON_INTERPRET=1: interpreting and compiling need separate processes."
        )
    launches = [x for x in spec.launches(target.device) if not dtypes or x.dtype in dtypes]
    return [judge(spec.name, launch, module[launch.kernel], target, known) for launch in launches]


@dataclass
class Made:
    """What a family's PTX was for one configuration, and its bytes of shared memory."""

    arch: str
    ptx: str
    shared: int


# (op, family, configuration) -> what was made; (op, family) -> what proved that it serves all of it
Known = dict[Any, Made]


def judge(op: str, launch: Launch, kernel: Any, target: Target, known: Known | None = None) -> Row:
    """Compile one configuration and hold it to the target's limits. A compiler error fails the row with its text.

    `known` is filled with what was made, and read where it was made for another target of the family.
    """
    start = time.perf_counter()
    about: dict[str, Any] = dict(
        op=op, arch=target.name, kernel=launch.kernel, configuration=launch.when, dtype=launch.dtype,
        variant=launch.variant, num_warps=launch.num_warps, registers_limit=target.registers_limit,
        shared_limit=target.shared_limit,
    )  # fmt: skip
    try:
        shared, log = _made(op, launch, kernel, target, {} if known is None else known)
        registers, spills = _used(log, target)
    except Exception as e:  # whatever the compiler raises is the finding
        return Row(**about, passed=False, reason=f"does not compile: {_last_line(e)}", seconds=_since(start))
    reason = excess(registers, spills, shared, launch.num_warps, target)
    return Row(
        **about, passed=not reason, reason=reason, registers=registers, spills=spills, shared_bytes=shared,
        seconds=_since(start),
    )  # fmt: skip


def excess(registers: int, spills: int, shared: int, num_warps: int, target: Target) -> str:
    """Which limits are passed, as a sentence; empty if none."""
    found = []
    if shared > target.shared_limit:
        found.append(f"{shared} bytes of shared memory, {target.shared_limit} are allowed a block")
    if registers > target.registers_limit:
        found.append(f"{registers} registers a thread, {target.registers_limit} are allowed")
    if registers * num_warps * 32 > target.registers_block:
        found.append(f"{registers * num_warps * 32} registers a block, {target.registers_block} are allowed")
    if spills > target.spills_limit:
        found.append(f"{spills} bytes spilled, {target.spills_limit} are allowed")
    return "; ".join(found)


def _made(op: str, launch: Launch, kernel: Any, target: Target, known: Known) -> tuple[int, str]:
    """(bytes of shared memory, the assembler's log), of what is known of the family where that is proven to serve."""
    family = target.capability // 10
    key = (op, family, *(str(getattr(launch, f.name)) for f in fields(launch)))
    there = known.get(key)
    if there is None or there.arch == target.name or (op, family) not in known:
        made, log = _compile(launch, kernel, target)
        if there is not None and there.arch != target.name:
            if TARGET.sub("", there.ptx) != TARGET.sub("", made.ptx) or there.shared != made.shared:
                raise RuntimeError(f"Triton makes other code for {target.name} than for {there.arch}")
            known[op, family] = made
        known[key] = made
        return made.shared, log
    name = TARGET.search(known[op, family].ptx)
    assert name is not None
    return there.shared, _assemble(TARGET.sub(name[0], there.ptx), launch, target)


def _options(launch: Launch) -> dict[str, Any]:
    """As `dispatch.launch` launches."""
    return {
        "num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": launch.fp_fusion,
    }  # fmt: skip


@contextlib.contextmanager
def _told() -> Iterator[io.StringIO]:
    """What the assembler says, of kernels from no cache."""
    log = io.StringIO()
    knobs = triton.knobs
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True  # assembling a second time to read it would take a fifth of the gate
        knobs.compilation.always_compile = True
        yield log


def _assemble(ptx: str, launch: Launch, target: Target) -> str:
    """The assembler's log of PTX, by Triton's own last stage."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", target.capability, 32))
    stages: dict[str, Any] = {}
    backend.add_stages(stages, backend.parse_options(_options(launch)), None)
    with _told() as log:
        stages["cubin"](ptx, {})
    return log.getvalue()


def _compile(launch: Launch, kernel: Any, target: Target) -> tuple[Made, str]:
    """(what Triton made, the assembler's log)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    if set(names) != set(launch.signature):
        raise ValueError(f"the launch names arguments {sorted(set(names) ^ set(launch.signature))} differently")
    source = ASTSource(
        fn=kernel,
        signature={n: launch.signature[n] for n in names},
        constexprs={(names.index(n),): v for n, v in launch.constexprs.items()},
        attrs={(i,): ALIGNED for i, n in enumerate(names) if launch.signature[n].startswith("*")},
    )
    with _told() as log:
        compiled = triton.compile(source, target=GPUTarget("cuda", target.capability, 32), options=_options(launch))
    return Made(target.name, compiled.asm["ptx"], int(compiled.metadata.shared)), log.getvalue()


def _used(log: str, target: Target) -> tuple[int, int]:
    """(registers a thread, bytes of spill stores and loads), from the assembler's log."""
    used, spilled = USED.findall(log), SPILLED.findall(log)
    if not used or not spilled:
        raise RuntimeError(f"ptxas for {target.name} says nothing of registers and spills: {log.strip()[-500:]}")
    return max(map(int, used)), sum(int(a) + int(b) for a, b in spilled)


def _last_line(e: Exception) -> str:
    lines = str(e).strip().splitlines()
    return f"{type(e).__name__}: {lines[-1][:300] if lines else ''}"


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 3)


def _in_process(
    ops: Sequence[str], archs: str, dtypes: str, *, progress: Callable[[str], None], timeout_s: float
) -> list[dict[str, Any]]:
    progress(f"compiling {', '.join(ops)} for {archs.replace(',', ', ')}")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "sparkproof.judge.aot", ",".join(ops), archs, dtypes]
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=timeout_s * len(ops),
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"{', '.join(ops)} could not be compiled for {archs}:\n{done.stderr[-4000:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _main(names: str, archs: str, dtypes: str) -> None:
    rows: list[Row] = []
    for name in names.split(","):
        spec = load_op(name)
        module = vars(sys.modules[f"sparktune.ops.{name}"])
        wanted = [d for d in dtypes.split(",") if d]
        known: Known = {}
        rows += [r for arch in archs.split(",") for r in compile_op(spec, TARGETS[arch], module, wanted, known)]
    print(json.dumps([asdict(r) for r in rows]))


if __name__ == "__main__":
    _main(*sys.argv[1:4])
