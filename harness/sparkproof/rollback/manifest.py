"""What sparkproof itself makes on a machine, so that it can be taken off again: JSON lines in the user's state folder.

An entry remembers the device and inode of what it names. If something else lies there later, it is not ours and stays.
"""

# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import stat
import sys
from pathlib import Path
from typing import Literal

import platformdirs
from pydantic import Field, ValidationError

from sparkproof.results import Strict
from sparkproof.rollback import tree

SETUP_MARK = "sparkproof-setup.json"  # what scripts/setup_env.py leaves in an environment that it made
Kind = Literal["cache", "venv", "reports", "locks", "file"]


class Entry(Strict):
    """One thing of ours."""

    path: str
    kind: Kind
    added: str = Field(description="When, UTC, ISO 8601.")
    device: int
    inode: int
    seen: str = Field(default="", description="Of a file: what it was then, so that a change by its user is noticed.")

    @property
    def still_ours(self) -> bool:
        """Whether the very same folder or file still lies at the path, itself and not a link to something."""
        try:
            st = os.lstat(self.path)
        except OSError:
            return False
        return (st.st_dev, st.st_ino) == (self.device, self.inode) and os.path.realpath(self.path) == self.path


def manifest_path() -> Path:
    """Where the list is; `SPARKPROOF_MANIFEST` moves it."""
    return Path(
        os.environ.get("SPARKPROOF_MANIFEST") or Path(platformdirs.user_state_dir("sparkproof")) / "manifest.jsonl"
    )


def add(path: str | Path, kind: Kind) -> Entry:
    """Record that sparkproof made `path`: call it right after making it, and only if it was not there before.

    Errors: FileNotFoundError if nothing is there; OSError if the list can't be written.
    """
    real = os.path.realpath(path)
    st = os.lstat(real)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    seen = tree.stamp(st) if stat.S_ISREG(st.st_mode) else ""
    entry = Entry(path=real, kind=kind, added=now, device=st.st_dev, inode=st.st_ino, seen=seen)
    known = {(e.path, e.device, e.inode, e.seen) for e in entries()}
    if (entry.path, entry.device, entry.inode, entry.seen) not in known:
        target = manifest_path()
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a", encoding="utf-8") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            f.write(json.dumps(entry.model_dump(mode="json")) + "\n")
            f.flush()
            os.fsync(f.fileno())
    return entry


def entries() -> list[Entry]:
    """Everything recorded, oldest first; a line torn by a crash is passed over."""
    try:
        lines = manifest_path().read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(Entry.model_validate_json(line))
        except ValidationError:
            continue
    return found


def ours() -> list[Entry]:
    """What is recorded and still lies there, unchanged in identity."""
    return [e for e in {e.path: e for e in entries()}.values() if e.still_ours]


def add_own_environment() -> None:
    """List the environment that `make setup` made: the one that sparkproof runs from, or that SPARKPROOF_VENV names (see
    scripts/way_back.py). A list that can't be written is no error.
    """
    for prefix in {sys.prefix, os.environ.get("SPARKPROOF_VENV") or sys.prefix}:
        with contextlib.suppress(OSError):
            if Path(prefix, "pyvenv.cfg").exists() and Path(prefix, SETUP_MARK).exists():
                add(prefix, "venv")
