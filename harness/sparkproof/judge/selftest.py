"""Does the judge judge? Kills all planted mutants of every op, and says so in a document with a schema.

Kernels run in a process of their own for each op: on a GPU as they are, else in the interpreter, which is chosen when
Triton is imported and so can't be switched on in a running process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch
from sparktune.ops import discover
from sparktune.ops.spec import OpSpec

from sparkproof.errors import UserError
from sparkproof.judge.correctness import mode_here
from sparkproof.judge.mutants import MutantError, try_mutants

SCHEMA = "sparkproof/selftest-kernels/1"


def chosen(ops: Sequence[str] | None) -> dict[str, OpSpec]:
    """The named ops, or all. Errors: UserError with the known names."""
    known = discover()
    for name in ops or ():
        if name not in known:
            raise UserError(f"There is no op called '{name}'.", f"Known: {', '.join(known)}.")
    return {name: known[name] for name in (ops or known)}


def kernels(ops: Sequence[str] | None = None, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Try every mutant of some or all ops.

    The document: `schema`, `mode`, `passed`, `killed`, `total`, `seconds`, and `ops`, a list of `op`, `killed`,
    `total`, `survivors` (ids), `error` (why the table proves nothing; empty if it does), `seconds`, and `mutants`, a
    row each.
    """
    start = time.perf_counter()
    names = list(chosen(ops))
    gpu = torch.cuda.is_available()
    with ThreadPoolExecutor(1 if gpu else min(2, os.cpu_count() or 1)) as pool:
        rows = list(pool.map(lambda name: _in_process(name, gpu, progress), names))
    return {
        "schema": SCHEMA,
        "mode": "gpu" if gpu else "interpreter",
        "passed": all(r["killed"] == r["total"] and not r["error"] for r in rows),
        "killed": sum(r["killed"] for r in rows),
        "total": sum(r["total"] for r in rows),
        "seconds": round(time.perf_counter() - start, 2),
        "ops": rows,
    }


def one(name: str) -> dict[str, Any]:
    """One op's row, made in this process, which must run kernels: TRITON_INTERPRET=1, or a GPU."""
    mode_here()
    spec, start, error, trials = discover()[name], time.perf_counter(), "", []
    try:
        trials = try_mutants(spec)
    except MutantError as e:
        error = str(e)
    return {
        "op": name,
        "killed": sum(t.killed for t in trials),
        "total": len(spec.mutants),
        "survivors": [t.id for t in trials if not t.killed],
        "error": error,
        "seconds": round(time.perf_counter() - start, 2),
        "mutants": [asdict(t) for t in trials],
    }


def _in_process(name: str, gpu: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    progress(f"mutants of {name}")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if not gpu:
        env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "sparkproof.judge.selftest", name]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the mutants of {name} could not be tried:\n{done.stderr[-4000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    print(json.dumps(one(sys.argv[1])))
