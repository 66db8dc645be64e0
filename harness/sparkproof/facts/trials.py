"""Starts the trials of the children beside this module, each in a process of its own and bounded in time.

What a child said before it crashed or hung still counts; how it ended is then written into the part it was at.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from sparkproof.facts.host import Host, scratch_caches
from sparkproof.facts.toolchain import Triton
from sparkproof.facts.tried import Attention, Canaries, Compilation, Extension, FourBit, SharedMemory, Tried

COMPILE_TIMEOUT_S = 30
PACKAGES_TIMEOUT_S = 40
CANARIES_TIMEOUT_S = 25
KERNELS_TIMEOUT_S = 30
FLEX_TIMEOUT_S = 30
PTXAS_TIMEOUT_S = 10
# Assembles for the architecture-specific target alone: FP4 conversions are not in plain sm_121.
FP4_PTX = """.version 8.8
.target {target}
.address_size 64
.visible .entry f(.param .u64 p) {{
  .reg .f32 %a, %b; .reg .b8 %c; .reg .b16 %d; .reg .u64 %q;
  ld.param.u64 %q, [p];
  ld.global.f32 %a, [%q];
  ld.global.f32 %b, [%q+4];
  cvt.rn.satfinite.e2m1x2.f32 %c, %a, %b;
  mov.b16 %d, {{%c, %c}};
  st.global.b16 [%q+8], %d;
  ret;
}}
"""


def read_compilation(host: Host) -> Compilation:
    """A cold and a warm compilation in two processes, which must agree; and the variable that is live by trial."""
    with tempfile.TemporaryDirectory() as folder:
        said: dict[str, Any] = {}
        for mode in ("cold", "warm"):
            ran = host.run_python("sparkproof.facts.compile_child", COMPILE_TIMEOUT_S, args=(mode, folder))
            answer = merge(ran.out)
            done = answer.pop("done", False)
            said |= answer
            if not done:
                return Compilation(**said, error=f"the {mode} compilation: {ran.error or 'no answer'}")
    return Compilation(**said)


def read_fp4(host: Host, triton: Triton, target: str | None) -> bool | None:
    """Whether the ptxas that Triton takes assembles an FP4 conversion for the target that Triton names."""
    if triton.live_ptxas is None or target is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fp4.ptx"
        program.write_text(FP4_PTX.format(target=target), encoding="utf-8")
        argv = [triton.live_ptxas, f"--gpu-name={target}", str(program), "-o", str(program.with_suffix(".cubin"))]
        ran = host.run(argv, PTXAS_TIMEOUT_S)
    return None if ran.code is None else not ran.error


def read_packages_tried(host: Host, visible: bool = True) -> Tried:
    """Extensions and the 4-bit round trip, on the GPU if one is `visible` to it."""
    hidden = {} if visible else {"CUDA_VISIBLE_DEVICES": ""}
    with scratch_caches() as caches:
        ran = host.run_python("sparkproof.facts.packages_child", PACKAGES_TIMEOUT_S, caches | hidden)
    said = merge(ran.out)
    found = Tried(
        four_bit=[FourBit(**f) for f in said.get("four_bit", [])],
        extensions=[Extension(**e) for e in said.get("extensions", [])],
    )
    stage = said.get("stage", "")
    if said.get("done"):
        return found
    if stage.startswith("it called ") and " packages" not in stage:
        found.extensions.append(Extension(name=stage.removeprefix("it called "), error=_ended(stage, ran.error)))
    elif "4 bits" in stage:
        found.four_bit.append(FourBit(device="unknown", error=_ended(stage, ran.error)))
    else:
        raise RuntimeError(_ended(stage, ran.error))
    return found


def read_canaries(host: Host) -> Canaries:
    """Alone on the machine: whoever calls this waits for everything else first."""
    with scratch_caches() as caches:
        ran = host.run_python("sparkproof.facts.canaries_child", CANARIES_TIMEOUT_S, caches)
    said = merge(ran.out)
    found = Canaries(**said.get("canaries", {}))
    if not said.get("done"):
        found.error = _ended(said.get("stage", ""), ran.error)
    return found


def read_kernels(host: Host) -> Tried:
    """Shared memory, attention backends and a convolution; a child that died names the one it died in."""
    with scratch_caches() as caches:
        ran = host.run_python("sparkproof.facts.gpu_child", KERNELS_TIMEOUT_S, caches, ("kernels",))
    said = merge(ran.out)
    rows = said.get("attention")
    shared = said.get("shared_memory")
    found = Tried(
        attention=None if rows is None else [Attention(**r) for r in rows],
        shared_memory=SharedMemory(**shared) if shared else None,
        convolution=said.get("convolution"),
        convolution_error=said.get("convolution_error"),
    )
    stage = said.get("stage", "")
    if said.get("done"):
        return found
    ended = _ended(stage, ran.error)
    if shared is None:
        if "convolution" in stage:
            found.convolution, found.convolution_error = False, ended
        found.shared_memory = SharedMemory(limit=0, error=ended)
    elif stage.startswith("it tried "):
        words = stage.split()  # it tried NAME attention in DTYPE with heads of SIZE
        lost = Attention(backend=words[2], dtype=words[5], head_size=int(words[-1]), direction="forward", refused=ended)
        found.attention = [*(found.attention or []), lost]
    return found


def read_flex(host: Host) -> list[Attention]:
    """flex_attention with empty caches, compiled anew."""
    with scratch_caches() as caches:
        ran = host.run_python("sparkproof.facts.gpu_child", FLEX_TIMEOUT_S, caches, ("flex",))
    said = merge(ran.out)
    if said.get("done"):
        return [Attention(**r) for r in said["attention"]]
    ended = _ended(said.get("stage", ""), ran.error)
    return [
        Attention(backend="flex", dtype="bf16", head_size=256, direction=d, refused=ended)
        for d in ("forward", "backward")
    ]


def merge(lines: str) -> dict[str, Any]:
    """Later lines win; a torn line, and whatever a library printed, is dropped."""
    said: dict[str, Any] = {}
    for line in lines.splitlines():
        try:
            update = json.loads(line)
        except ValueError:
            continue
        if isinstance(update, dict):
            said |= update
    return said


def _ended(stage: str, error: str) -> str:
    return f"the trial stopped while {stage or 'it was started'}: {error or 'no answer'}"
