"""Triton and the assembler (ptxas) that it really calls for a GB10.

Two questions that a version number does not answer are settled by trying: does a ptxas know sm_121a (it assembles an
empty program), and which environment variable redirects Triton (each is pointed at a decoy, and Triton is asked which
path it would take).
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from sparkproof.facts.host import Host
from sparkproof.facts.toolchain import Ptxas, Triton

TIMEOUT_S = 40
PTXAS_TIMEOUT_S = 10
VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")
# An empty program of an old target assembles for any newer one; only the name of the new target is in question.
EMPTY_PTX = ".version 7.0\n.target sm_80\n.address_size 64\n"
UNKNOWN_TARGET = re.compile(r"is not defined for option|unknown|unsupported|invalid", re.IGNORECASE)


def read_triton(host: Host) -> Triton:
    """Ask Triton in a child, then try every ptxas in sight."""
    ran = host.run_python("sparkproof.facts.triton_child", TIMEOUT_S)
    try:
        said = json.loads(ran.out.splitlines()[-1])
    except (ValueError, IndexError):
        return Triton(error=ran.error or "no answer", variables=variables(host))
    places = [(path, "bundled") for path in said["bundled"]]
    places += [(path, name) for name, path in variables(host).items()]
    places.append(("/usr/local/cuda/bin/ptxas", "toolkit"))
    return Triton(
        version=said["version"],
        error=said["error"],
        live_ptxas=said["live"],
        live_variable=said["variable"],
        variables=variables(host),
        ptxas=[read_ptxas(host, path, source) for path, source in places if source in VARIABLES or host.exists(path)],
    )


def variables(host: Host) -> dict[str, str]:
    """The redirecting variables that are set."""
    return {name: host.environ[name] for name in VARIABLES if host.environ.get(name)}


def read_ptxas(host: Host, path: str, source: str) -> Ptxas:
    """Version of one ptxas, and whether it assembles for sm_121a."""
    ran = host.run([path, "--version"], PTXAS_TIMEOUT_S)
    found = re.search(r"release (\d+\.\d+)(?:, V([\d.]+))?", ran.out)
    if not found:
        return Ptxas(path=path, source=source, error=ran.error or "it names no version")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "empty.ptx"
        program.write_text(EMPTY_PTX, encoding="utf-8")
        tried = host.run(
            [path, "--gpu-name=sm_121a", str(program), "-o", str(program.with_suffix(".cubin"))], PTXAS_TIMEOUT_S
        )
    knows = True if not tried.error else False if UNKNOWN_TARGET.search(tried.err + tried.out) else None
    return Ptxas(
        path=path,
        source=source,
        version=found.group(2) or found.group(1),
        knows_sm_121a=knows,
        error=tried.error or None,
    )
