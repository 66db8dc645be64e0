"""Does the memory watchdog hold under real pressure? A process fills memory inside a control group, and a run goes on.

The group has a limit, swap is off in it, and everything of the trial runs inside: a parent as a run has one, a case that takes
memory without an end, and the case after it. Without the watchdog the kernel would kill in there at the limit, and on a machine
whose GPU shares the pool the host would freeze. Nothing outside the group feels any pressure.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparkproof.errors import UserError
from sparkproof.measure import memory
from sparkproof.results import ReasonClass

LIMIT_GIB, FLOOR_GIB = 0.75, 0.25
STEP_MIB = 16  # taken at once; more than ten times as much comes between two looks of the watchdog
SKIP = "The watchdog was not tried under real pressure"


def run() -> dict[str, Any]:
    """{"passed", "limit_gib", "floor_gib", "cgroup": version, "greedy": outcome, "after": outcome, "kernel_kills", "sentence"}.

    Errors: UserError (skip class 'platform') where no control group can be made or there is too little memory.
    """
    need = LIMIT_GIB + 0.5
    if memory.available_gib() < need:
        raise UserError(
            f"{SKIP}: it needs {need:g} GiB and {memory.available_gib():.1f} are available.",
            "Free memory, and try again.", skip_class=ReasonClass.MEMORY.value,
        )  # fmt: skip
    with _group() as (folder, version), tempfile.TemporaryDirectory(prefix="sparkproof-pressure-") as work:
        join = folder / "cgroup.procs"
        command = [sys.executable, "-c", _PARENT, str(join), work, str(FLOOR_GIB)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
        kills = _kills(folder, version)
    if done.returncode != 0:
        raise RuntimeError(f"the trial of the watchdog itself ended with {done.returncode}: {done.stderr[-2000:]}")
    seen = json.loads(done.stdout.splitlines()[-1])
    greedy, following = seen["greedy"], seen["after"]
    passed = greedy["status"] == "memory" and following["status"] == "ok" and not kills
    return {
        "schema": "sparkproof/selftest-memory/1", "passed": passed, "limit_gib": LIMIT_GIB, "floor_gib": FLOOR_GIB,
        "cgroup": version, "kernel_kills": kills, **seen, "sentence": _sentence(passed, greedy, following, kills),
    }  # fmt: skip


def _sentence(passed: bool, greedy: dict[str, Any], following: dict[str, Any], kills: int) -> str:
    if passed:
        return (
            f"The watchdog ended a process that filled memory {greedy['duration_s']:.1f} s after its start, at "
            f"{greedy['min_available_gib']:.2f} of {LIMIT_GIB:g} GiB left (floor {FLOOR_GIB:g}); the next one ran."
        )
    if kills:
        return f"The kernel killed {kills} times at the limit: the watchdog came too late."
    if greedy["status"] != "memory":
        return f"The process that filled memory ended as '{greedy['status']}', and not by the watchdog."
    return f"The process after it ended as '{following['status']}': the run did not go on."


# Runs inside the group from its first line, so that all that it imports and starts counts there.
_PARENT = """
import os, sys
with open(sys.argv[1], "w") as f:
    f.write(str(os.getpid()))
import json
from sparkproof.judge.selftest_memory import inside
print(json.dumps(inside(sys.argv[2], float(sys.argv[3]))))
"""


def inside(work: str, floor_gib: float) -> dict[str, Any]:
    """The greedy case and the one after it, under the runner's own watchdog; called inside the group."""
    from sparkproof.runners.process import run_process

    found: dict[str, Any] = {"available_gib": memory.available_gib()}
    for name in ("greedy", "after"):
        outcome = run_process(
            [sys.executable, "-m", "sparkproof.runners.child", f"{__name__}:{name}"], {}, work_dir=Path(work), phase=name,
            timeout_s=60, floor_gib=floor_gib, env=dict(os.environ),
        )  # fmt: skip
        keys = ("status", "duration_s", "min_available_gib", "peak_rss_gib", "returncode")
        found[name] = {k: getattr(outcome, k) for k in keys}
    return found


def greedy(payload: dict[str, Any]) -> dict[str, Any]:
    """Take memory, and touch it, without an end: some 300 MiB a second."""
    held = []
    while True:
        held.append(bytearray(b"x") * (STEP_MIB << 20))
        time.sleep(0.05)


def after(payload: dict[str, Any]) -> dict[str, Any]:
    """The case after it: a little work."""
    return {"held_mib": len(bytearray(8 << 20)) >> 20}


@contextlib.contextmanager
def _group() -> Any:
    """(folder, version) of a new control group with the limit, removed at the end. Errors: UserError where none can be made."""
    errors: list[str] = []
    for base, version, name in _places():
        folder = base / f"sparkproof-pressure-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError as e:
            errors.append(f"{base}: {e.strerror}")
            continue
        try:
            try:
                (folder / name).write_text(str(int(LIMIT_GIB * 2**30)))
                with contextlib.suppress(OSError):  # a kernel may have no account of swap
                    (folder / ("memory.swap.max" if version == 2 else "memory.swappiness")).write_text("0")
            except OSError as e:
                errors.append(f"{folder / name}: {e.strerror}")
                continue
            yield folder, version
            return
        finally:
            _remove(folder)
    why = "; ".join(errors) or "this machine has no memory controller for control groups"
    raise UserError(f"{SKIP}: {why}.", "Run it as root on the host.", skip_class=ReasonClass.PLATFORM.value)


def _places() -> list[tuple[Path, int, str]]:
    """Where a group could be made, the process's own first: (folder, cgroup version, file of its limit)."""
    found = []
    for line in memory.MEMBERSHIP.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            base, version, name = memory.CGROUPS / "memory", 1, "memory.limit_in_bytes"
        elif number == "0" and not controllers and (memory.CGROUPS / "cgroup.controllers").exists():
            base, version, name = memory.CGROUPS, 2, "memory.max"
        else:
            continue
        inner = base / path.lstrip("/")
        # A v2 group that holds processes has no groups with controllers below it: one beside it has.
        found += [(p, version, name) for p in (inner, inner.parent, base) if p.is_dir() and p.is_relative_to(base)]
    return found


def _remove(folder: Path) -> None:
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:  # its last process is being reaped
            time.sleep(0.1)


def _kills(folder: Path, version: int) -> int:
    """How often the kernel killed at the limit."""
    file = folder / ("memory.events" if version == 2 else "memory.oom_control")
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
    return 0
