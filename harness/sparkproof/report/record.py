"""The record: `<run>/record.jsonl`, one line of JSON for the run, one for each case as it ends, one for the end.

Each line goes out in a single write on a file opened for appending, then fsync: `kill -9` at any moment leaves every
case that ended, and at worst a torn last line that readers leave out and a resume cuts off. When the disk is full the
part of a line that did fit is taken back, so that the record stays valid. Everything is scrubbed of secrets first.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

from sparkproof import __version__
from sparkproof.errors import UserError
from sparkproof.facts.model import Facts
from sparkproof.report.redact import Redactor
from sparkproof.report.rundir import RECORD, find_run, new_run_dir, point_latest, storage_error
from sparkproof.report.runrecord import EndLine, Header, Planned, ResultLine, ResumedLine, RunRecord, load
from sparkproof.results import CaseResult, Strict
from sparkproof.scenario import Profile

__all__ = ["Planned", "Recorder", "RunRecord", "find_run", "load", "new_run_dir", "point_latest"]

VERSIONED = (
    "torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "gguf", "xllamacpp",
    "unsloth", "liger-kernel", "pydantic", "pytest",
)  # fmt: skip


def now() -> str:
    """This moment, ISO 8601, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Recorder:
    """Appends to one run's record; holds it locked, so that two processes can't write the same one."""

    def __init__(self, run_dir: Path, *, create: bool) -> None:
        self.run_dir = run_dir
        self.path = run_dir / RECORD
        self._redactor = Redactor()
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT | os.O_EXCL if create else 0)
        try:
            self._fd = os.open(self.path, flags, 0o644)
        except OSError as e:
            raise storage_error(e, "The record", self.path) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise UserError(f"Another process is writing {self.path}.", "Wait until it has ended.") from None
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # some network file systems have no locks
                os.close(self._fd)
                raise storage_error(e, "The record", self.path) from None

    @classmethod
    def create(
        cls,
        run_dir: Path,
        *,
        profile: Profile | str,
        planned: list[Planned],
        facts: Facts,
        strict: bool = False,
        mode: Literal["profile", "selection"] = "selection",
        command: list[str] | None = None,
    ) -> Recorder:
        """Begin a record. `mode='profile'` only when all that the profile asks for is planned, unaltered.

        Errors: UserError when it can't be written, or when the folder already holds one.
        """
        header = Header(
            schema="sparkproof-record-1",
            run_id=run_dir.resolve().name,
            started=now(),
            profile=Profile(profile),
            planned=planned,
            facts=facts,
            versions=versions(),
            revision=git_revision(),
            command=shlex.join(command if command is not None else sys.argv),
            strict=strict,
            mode=mode,
        )
        recorder = cls(run_dir, create=True)
        recorder._write(header)
        recorder._sync_folder()
        return recorder

    @classmethod
    def resume(cls, run_dir: Path, facts: Facts | None = None) -> tuple[Recorder, RunRecord]:
        """Go on with a run: cut off a torn last line, say so in the record, and give back what there is.

        Errors: UserError when the record is no record, when another process writes it, or when `facts` are those of
        another device: results of two machines never make one run.
        """
        before = load(run_dir)
        if facts is not None and device_key(facts) != device_key(before.facts):
            raise UserError(
                f"The run in {run_dir} was made on another device: {before.facts.device_sentence()}.",
                "Resume it there, or start a new run here.",
            )
        recorder = cls(run_dir, create=False)
        before = load(run_dir)  # again, now that nobody else can write
        try:
            os.ftruncate(recorder._fd, before.valid_bytes)
        except OSError as e:
            raise storage_error(e, "The record", recorder.path) from None
        lost = before.torn_bytes
        note = f"A torn last line of {lost} bytes was cut off; the case it belonged to runs again." if lost else ""
        line = ResumedLine(at=now(), command=shlex.join(sys.argv), revision=git_revision(), lost_bytes=lost, note=note)
        recorder._write(line)
        return recorder, load(run_dir)

    def append(self, result: CaseResult, digest: str = "") -> None:
        """Record a case that ended, and scrub the logs it left. Errors: UserError when it can't be written."""
        self._write(ResultLine(result=result, digest=digest))
        slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in result.name).strip("-")
        folder = self.run_dir / "cases" / slug
        if folder.is_dir():
            with contextlib.suppress(OSError):
                self._redactor.logs(folder)

    def end(self, *, interrupted: bool = False) -> None:
        """Close the record. Errors: UserError when it can't be written; what was written stays valid."""
        record = load(self.run_dir)
        record.end = EndLine(ended=now(), interrupted=interrupted, exit_code=130 if interrupted else 0)
        record.end.exit_code = record.exit_code
        try:
            self._write(record.end)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of the file; safe to call again."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _write(self, line: Strict) -> None:
        document = self._redactor.data(line.model_dump(mode="json", by_alias=True))
        data = _dump(document)
        with self._lock:
            if self._fd < 0:
                raise UserError(f"{self.path} is closed: the run has ended.")
            size = os.fstat(self._fd).st_size
            try:
                if os.write(self._fd, data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a short write to a file: no space
                os.fsync(self._fd)
            except OSError as e:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, size)
                raise storage_error(e, "The record", self.path) from None

    def _sync_folder(self) -> None:
        """Make the new file's name last as well."""
        with contextlib.suppress(OSError):
            fd = os.open(self.run_dir, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _dump(document: Any) -> bytes:
    """One line of strict JSON; lone surrogates, which a log may hold, are escaped."""
    text = json.dumps(spell_non_finite(document), ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", errors="backslashreplace")


def spell_non_finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become 'NaN', 'Infinity', '-Infinity', which pydantic reads as numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {k: spell_non_finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [spell_non_finite(v) for v in value]
    return value


def device_key(facts: Facts) -> tuple[Any, ...]:
    """What must be equal for two sets of facts to be of one device: stable properties, no momentary values."""
    gpus = tuple((g.name, g.uuid, g.compute_capability) for g in facts.gpus)  # a published run has no serials
    return (facts.arch, facts.cpu.model, gpus)


def versions() -> dict[str, str]:
    """Versions of what a result depends on; absent distributions are left out."""
    found = {"sparkproof": __version__, "python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def git_revision() -> str:
    """Commit of the checkout this code runs from, '+' behind it if tracked files were changed; '' if it is in none."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return ""
        return done.stdout.strip()

    # an installed copy may lie inside somebody else's repository, whose commit would say nothing
    if not git("ls-files", "--", str(Path(__file__).resolve())):
        return ""
    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
