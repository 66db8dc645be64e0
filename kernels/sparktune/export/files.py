"""Whole or absent: what an export writes appears under its name only when it is complete.

Everything is written beside its destination as `.<name>.<pid>.part` and renamed at the end, after the bytes have
reached the disk. An exception or Ctrl-C removes the part; a killed process leaves a part that the next export of the
same name removes. The space is checked before the first byte.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

MARGIN_BYTES = 16 << 20  # metadata, tokenizer and the file system's own overhead


class ExportError(Exception):
    """An export that can't be done as asked: `message` is one sentence, `fix` says what to do about it."""

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(f"{message} {fix}".strip())
        self.message = message
        self.fix = fix


class NoSpaceError(ExportError):
    """The disk can't hold the export."""


def need_space(out: Path, size: int, arithmetic: str = "") -> None:
    """Raise `NoSpaceError` when the disk of `out` can't take `size` bytes and a margin; `arithmetic` says what makes them."""
    probe = out.absolute().parent
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    need = size + MARGIN_BYTES
    if free < need:
        raise NoSpaceError(
            f"The export needs {need / 1e9:.2f} GB ({f'{arithmetic}, ' if arithmetic else ''}and {MARGIN_BYTES / 1e9:.2f} GB "
            f"for the rest) and the disk of {probe} has {free / 1e9:.2f} GB free.",
            "Free some disk space or export to another disk.",
        )


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `out` at the end. Errors: ExportError when `out` exists and is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists already.", "Remove it or export under another name.")
    part = _part(out)
    try:
        part.mkdir()
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _sync(file)
        if out.exists():
            out.rmdir()
        part.rename(out)
        _sync(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what is made on the way to it, and removed at the end or by the next export of its name."""
    out = out.absolute()
    part = _part(out.with_name(f"{out.name}-work"))
    part.mkdir()
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(out: Path) -> Iterator[Path]:
    """A path to write to, renamed to `out` at the end. Errors: ExportError when `out` exists."""
    if out.exists():
        raise ExportError(f"{out} exists already.", "Remove it or export under another name.")
    part = _part(out)
    try:
        yield part
        _sync(part)
        part.rename(out)
        _sync(out.parent)
    finally:
        part.unlink(missing_ok=True)


def _part(out: Path) -> Path:
    """The name of this process's part; parts of processes that are gone are removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{out.name}.*.part"):
        pid = stale.name.split(".")[-2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)
    return out.parent / f".{out.name}.{os.getpid()}.part"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    """Have the bytes (or a folder's entries) on the disk before a rename makes them count."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
