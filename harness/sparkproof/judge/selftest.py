"""Does the judge judge? Kills all planted mutants of every op, and says so in a document with a schema.

Mutants run in Triton's interpreter, also where there is a GPU: what is proven is the judge, whose families and bounds are the
same there, and a fault such as a 32-bit offset, which on a device ends the CUDA context and every later trial with it, or
happens to read mapped memory and go unseen, is caught for certain. Each op has a process of its own, since the interpreter is
chosen when Triton is imported.
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

from sparktune.ops import dispatch, load_op, op_names
from sparktune.ops.spec import OpSpec

from sparkproof.errors import UserError
from sparkproof.judge import peers
from sparkproof.judge.interpreter import unable
from sparkproof.judge.mutants import MutantError, Trial, try_mutants

SCHEMA = "sparkproof/selftest-kernels/2"
INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def chosen(ops: Sequence[str] | None) -> dict[str, OpSpec]:
    """The named ops, or all. Errors: UserError with the known names."""
    known = op_names()
    for name in ops or ():
        if name not in known:
            raise UserError(f"There is no op called '{name}'.", f"Known: {', '.join(known)}.")
    return {name: load_op(name) for name in (ops or known)}


def kernels(ops: Sequence[str] | None = None, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Try every mutant of some or all ops.

    The document: `schema`, `mode`, `passed`, `killed`, `total`, `seconds`, and `ops`, a list of `op`, `killed`,
    `total`, `survivors` (ids), `error` (why the table proves nothing; empty if it does), `seconds`, `mutants`, a row
    each, and `let_pass`: for each peer how many of the same mutants stay within the bounds of its own tests, or null
    where it has none that can be used, with `mutants` (ids), `why` (null's reason) and `left_out` (bounds that the right
    kernel fails). `peers` names each with its version.
    """
    start = time.perf_counter()
    names = list(chosen(ops))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        rows = list(pool.map(lambda name: _in_process(name, progress), names))
    return {
        "schema": SCHEMA,
        "mode": "interpreter",
        "passed": all(r["killed"] == r["total"] and not r["error"] for r in rows),
        "killed": sum(r["killed"] for r in rows),
        "total": sum(r["total"] for r in rows),
        "peers": {k: v.model_dump() for k, v in peers.libraries().items()},
        "seconds": round(time.perf_counter() - start, 2),
        "ops": rows,
    }


def one(name: str) -> dict[str, Any]:
    """One op's row, made in this process, which must have begun with TRITON_INTERPRET=1. Errors: RuntimeError otherwise."""
    if not dispatch.INTERPRETED:
        raise RuntimeError("mutants are tried in Triton's interpreter: start the process with TRITON_INTERPRET=1")
    spec, start, error, trials = load_op(name), time.perf_counter(), unable(), []
    bounds = peers.Bounds(spec)
    try:
        trials = [] if error else try_mutants(spec, bounds=bounds)
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
        "let_pass": {peer: _let_pass(bounds, peer, trials, error) for peer in peers.libraries()},
    }


def _let_pass(bounds: peers.Bounds, peer: str, trials: Sequence[Trial], error: str) -> dict[str, Any]:
    why = error or bounds.why_not(peer)
    passed = [t.id for t in trials if peer in t.passes]
    return {
        "count": None if why else len(passed),
        "mutants": passed,
        "why": why,
        "left_out": bounds.left_out.get(peer, []),
    }


def _in_process(name: str, progress: Callable[[str], None]) -> dict[str, Any]:
    progress(f"mutants of {name}")
    env = os.environ | INTERPRETED
    command = [sys.executable, "-W", "ignore", "-m", "sparkproof.judge.selftest", name]
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        ended = f"their process ended with {done.returncode}"
        raise RuntimeError(f"the mutants of {name} could not be tried, {ended}:\n{done.stderr[-4000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    print(json.dumps(one(sys.argv[1])))
