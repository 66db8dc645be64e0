"""The memory of a way back: each step is written down before it begins and when it has ended, with fsync.

After a power cut the next run finds the step that began and did not end, and finishes it first: files of a
distribution whose metadata is already gone are known from here alone. The file is locked while in use, and removed
when nothing is left to resume.
"""

# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from sparkproof.errors import UserError
from sparkproof.rollback.model import Snapshot
from sparkproof.rollback.steps import Step


def fingerprint(snapshot: Snapshot) -> str:
    """Ties a journal to its snapshot."""
    return hashlib.sha256(json.dumps(snapshot.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]


class Journal:
    """An open journal. Use `opened`."""

    def __init__(self, file: IO[str], path: Path, snapshot: str) -> None:
        self._file, self._path, self._snapshot = file, path, snapshot
        self._count = 0
        self.unfinished: list[Step] = self._read()

    def _read(self) -> list[Step]:
        """Steps that began and did not end. A torn last line never began anything, since work waits for its fsync."""
        self._file.seek(0)
        begun: dict[int, Step] = {}
        for line in self._file.read().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("snapshot") != self._snapshot:
                raise UserError(
                    f"{self._path} belongs to a way back to another snapshot that was interrupted.",
                    "Finish that one first with its own snapshot, or delete the journal.",
                )
            self._count = max(self._count, entry["id"])
            if entry["event"] == "begin":
                with contextlib.suppress(ValidationError):
                    begun[entry["id"]] = Step.model_validate(entry["step"])
            else:
                begun.pop(entry["id"], None)
        return list(begun.values())

    def _write(self, entry: dict[str, object]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write("\n" if self._torn() else "")
        self._file.write(json.dumps({"snapshot": self._snapshot, **entry}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _torn(self) -> bool:
        size = os.fstat(self._file.fileno()).st_size
        return size > 0 and os.pread(self._file.fileno(), 1, size - 1) != b"\n"

    @contextlib.contextmanager
    def step(self, step: Step) -> Iterator[None]:
        """Around the work of one step; an exception leaves it unfinished."""
        self._count += 1
        number = self._count
        self._write({"id": number, "event": "begin", "step": step.model_dump(mode="json")})
        yield
        self._write({"id": number, "event": "end"})

    def close_unfinished(self) -> None:
        """Everything found unfinished has been dealt with: forget it, keep the file for this run's steps."""
        self._file.seek(0)
        self._file.truncate()
        self.unfinished = []


def kept_path(snapshot_path: Path) -> Path:
    """Where the files are named that a way back left to the user, because the user had changed them."""
    return snapshot_path.with_name(snapshot_path.name + ".kept")


def kept(snapshot_path: Path) -> dict[str, str]:
    """Those files, by path, with the reason. A damaged list is an error: without it a second run would remove them."""
    path = kept_path(snapshot_path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {str(k): str(v) for k, v in data.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(
            f"The list of files that stay, {path}, can't be read: {e}.", "Look at it, then delete it."
        ) from None


def keep(snapshot_path: Path, files: dict[str, str]) -> None:
    """Write them down before anything is removed: their distribution's RECORD, which tells that they changed, goes."""
    if not files:
        return
    path = kept_path(snapshot_path)
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as f:
        json.dump({**kept(snapshot_path), **files}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)


def path_for(snapshot_path: Path) -> Path:
    """Where the journal of a snapshot lies: beside it."""
    return snapshot_path.with_name(snapshot_path.name + ".journal")


@contextlib.contextmanager
def opened(path: Path, snapshot: Snapshot) -> Iterator[Journal]:
    """Lock and open; remove the file when all went to its end. Errors: UserError for a second way back at the same
    time.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed below, and kept open for its lock
    except OSError as e:
        raise UserError(
            f"The journal {path} can't be written: {e.strerror}.", "Copy the snapshot to a folder you can write to."
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("Another uninstall is running.", "Wait for it to end.") from None
        yield Journal(file, path, fingerprint(snapshot))
        path.unlink(missing_ok=True)
