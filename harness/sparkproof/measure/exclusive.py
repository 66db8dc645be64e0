"""Who may use the machine now: one run at a time, and in it the machine to itself for whatever is timed.

Locks are flock(2) on files in a per-user folder, so they vanish with the process that held them, however it ended.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sparkproof.errors import UserError
from sparkproof.rollback import manifest


def lock_dir() -> Path:
    """Folder of the locks; `SPARKPROOF_LOCK_DIR` moves it."""
    explicit = os.environ.get("SPARKPROOF_LOCK_DIR")
    path = Path(explicit) if explicit else Path(tempfile.gettempdir()) / f"sparkproof-{os.getuid()}"
    if not path.exists():
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(OSError):  # a list that can't be written must not stop a run
            manifest.add(path, "locks")
    return path


@contextlib.contextmanager
def only_run(what: str, wait: bool = False) -> Iterator[None]:
    """Hold the machine's run lock; a second run ends with one sentence that names the first, or waits."""
    path = lock_dir() / "run.lock"
    with open(path, "a+", encoding="utf-8") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"Another run is in progress{_holder(f)}, and two would disturb each other's memory and timings.",
                "Wait for it to end, or add --wait.",
            ) from None
        f.seek(0)
        f.truncate()
        json.dump({"pid": os.getpid(), "what": what, "since": time.strftime("%H:%M:%S")}, f)
        f.flush()
        try:
            yield
        finally:
            f.seek(0)
            f.truncate()


def _holder(f: IO[str]) -> str:
    with contextlib.suppress(ValueError, KeyError):
        f.seek(0)
        d = json.load(f)
        return f" (process {d['pid']}, {d['what']}, since {d['since']})"
    return ""


@contextlib.contextmanager
def machine_lock(exclusive: bool) -> Iterator[None]:
    """Hold the machine with its GPU: alone for a timed case, shared for the others.

    Not the GPU alone: beside a busy CPU the launches of a short backward took 0.48 instead of 0.37 ms, on an H100.
    """
    with open(lock_dir() / "machine.lock", "a", encoding="utf-8") as f:
        fcntl.flock(f, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
