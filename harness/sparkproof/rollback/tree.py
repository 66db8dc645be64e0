"""Look at a folder and remove single entries of it, without ever following a link.

Every step down is an `openat(O_NOFOLLOW | O_DIRECTORY)` from a file descriptor of the folder above, so a folder that
is swapped for a link between looking and removing is refused by the kernel, not by a check that came too early.
"""

# ruff: noqa: PTH115, PTH116, PTH118
# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sparkproof.rollback.model import Stamps

MAX_ENTRIES = 400_000
_RAW = "\0"  # no file name contains it, so it can mark a name that is not UTF-8


def to_text(name: str) -> str:
    """A path as text that any JSON carries, reversibly: names that are not UTF-8 become NUL and hex digits."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return _RAW + os.fsencode(name).hex()
    return name


def to_path(text: str) -> str:
    """The inverse of `to_text`."""
    return os.fsdecode(bytes.fromhex(text[1:])) if text.startswith(_RAW) else text


@dataclass
class Listing:
    """What lies under a folder; incomplete if `why` says something."""

    stamps: Stamps = field(default_factory=dict)
    bytes: int = 0
    files: int = 0
    why: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over the sorted listing."""
        h = hashlib.sha256()
        for path in sorted(self.stamps):
            h.update(f"{path}\0{self.stamps[path]}\n".encode())
        return h.hexdigest()


def stamp(st: os.stat_result, target: str = "") -> str:
    """What is at a path, in a form that two looks can compare.

    An empty file's time is left out: lock files are touched by mere use.
    """
    if stat.S_ISLNK(st.st_mode):
        return "l:" + to_text(target)
    if stat.S_ISREG(st.st_mode):
        return f"f:{st.st_size}:{st.st_mtime_ns if st.st_size else 0}"
    return "d" if stat.S_ISDIR(st.st_mode) else "o"


def stamp_bytes(text: str) -> int:
    """Bytes of a regular file's stamp, else 0."""
    return int(text.split(":")[1]) if text.startswith("f:") else 0


def scan(
    root: str,
    deadline: float = float("inf"),
    skip: Callable[[str], bool] = lambda path: False,
    limit: int = MAX_ENTRIES,
) -> Listing:
    """Every file, link and empty folder under `root`, as relative paths. Links and mount points are noted, not entered.

    `skip` names relative paths to leave out. Ends with `why` set when a folder cannot be read, at `deadline` (of
    `time.monotonic`), or past `limit` entries.
    """
    found = Listing()
    try:
        device = os.stat(root).st_dev
    except OSError as e:
        found.why = f"{root}: {e.strerror}"
        return found
    stack = [""]
    while stack:
        folder = stack.pop()
        if time.monotonic() > deadline:
            found.why = "it is too large to list in the time allowed"
            return found
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                names = sorted(entries, key=lambda e: e.name)
        except FileNotFoundError:
            continue  # went away while we looked
        except OSError as e:
            found.why = f"{os.path.join(root, folder)}: {e.strerror}"
            continue
        if not names and folder:
            found.stamps[to_text(folder)] = "d"
        for entry in names:
            path = os.path.join(folder, entry.name)
            if skip(path):
                continue
            with contextlib.suppress(FileNotFoundError):
                st = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(st.st_mode):
                    if st.st_dev == device:
                        stack.append(path)
                    else:
                        found.stamps[to_text(path)] = "m"
                    continue
                link = os.readlink(entry.path) if stat.S_ISLNK(st.st_mode) else ""
                found.stamps[to_text(path)] = stamp(st, link)
                found.files += 1
                found.bytes += st.st_size if stat.S_ISREG(st.st_mode) else 0
        if len(found.stamps) > limit:
            found.why = f"it holds more than {limit} files"
            return found
    return found


@contextlib.contextmanager
def opened(root: str) -> Iterator[int]:
    """A descriptor of `root` itself, which must be a folder and, after resolution, still the one named.

    Errors: OSError.
    """
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.path.realpath(root) != root:
            raise OSError(f"{root} is reached through a link")
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _parent(root_fd: int, relative: str) -> Iterator[tuple[int, str]]:
    parts = relative.split("/")
    if not relative or relative.startswith("/") or any(p in ("", ".", "..") for p in parts):
        raise OSError(f"{relative!r} is not a path inside the folder")
    fd = os.dup(root_fd)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        yield fd, parts[-1]
    finally:
        os.close(fd)


def look(root_fd: int, relative: str) -> str:
    """Stamp of one entry, '' if it is not there. Errors: OSError when the way to it leads through a link."""
    try:
        with _parent(root_fd, relative) as (fd, name):
            st = os.stat(name, dir_fd=fd, follow_symlinks=False)
            return stamp(st, os.readlink(name, dir_fd=fd) if stat.S_ISLNK(st.st_mode) else "")
    except FileNotFoundError:
        return ""


def remove(root_fd: int, relative: str, expected: str = "") -> str:
    """Remove one file, link or empty folder if it still is what `expected` says. Returns '' or why it was left.

    An entry that is already gone counts as removed, so that work can be repeated.
    """
    try:
        seen = look(root_fd, relative)
        if not seen:
            return ""
        if expected and seen != expected:
            return "it changed since the plan was made"
        with _parent(root_fd, relative) as (fd, name):
            if seen == "d":
                os.rmdir(name, dir_fd=fd)
            elif seen == "o":
                return "it is neither a file nor a link"
            else:
                os.unlink(name, dir_fd=fd)
    except FileNotFoundError:
        return ""
    except OSError as e:
        return "it is reached through a link" if e.errno in (errno.ENOTDIR, errno.ELOOP) else (e.strerror or str(e))
    return ""


def prune(root_fd: int, removed: list[str], keep: set[str]) -> None:
    """Remove the folders that removing `removed` left empty, deepest first; never the root or one in `keep`."""
    folders = {str(p) for r in removed for p in Path(r).parents} - {"."} - keep
    for folder in sorted(folders, key=lambda f: -f.count("/")):
        with contextlib.suppress(OSError), _parent(root_fd, folder) as (fd, name):
            os.rmdir(name, dir_fd=fd)
