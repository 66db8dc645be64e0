"""Folders of runs: a new one, the newest one, and the one that was asked for."""

from __future__ import annotations

import contextlib
import datetime
import difflib
import errno
import os
import secrets
from pathlib import Path

from sparkproof.errors import UserError

RECORD = "record.jsonl"
LATEST = "latest"
LATEST_TEXT = "latest.txt"


def storage_error(error: OSError, what: str, path: Path) -> UserError:
    """The sentence for a file system that would not take what we gave it."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            reason, fix = "the disk is full", "Free some space, or give another folder with --reports."
        case errno.EROFS:
            reason, fix = "the file system is read-only", "Give a writable folder with --reports."
        case errno.EACCES | errno.EPERM:
            reason = "this user may not write there"
            fix = "Give a folder of your own with --reports, or change the owner of this one."
        case errno.ENOTDIR | errno.EEXIST:
            reason, fix = "a file is in the way", "Give another folder with --reports."
        case errno.ENAMETOOLONG:
            reason, fix = "the path is too long", "Give a shorter folder with --reports."
        case _:
            reason = error.strerror or type(error).__name__
            fix = "Give another folder with --reports."
    return UserError(f"{what} can't be written to {path}: {reason}.", fix)


def new_run_dir(reports: Path) -> Path:
    """Make `<reports>/<UTC time>-<4 hex digits>`: sorts by time, and never the folder of another run.

    Errors: UserError when the folder can't be made or nothing can be written into it.
    """
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d_%H-%M-%S")
    try:
        reports.mkdir(parents=True, exist_ok=True)
        while True:
            path = reports / f"{stamp}-{secrets.token_hex(2)}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                break
        probe = path / ".probe"  # a full disk often still takes a folder
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as e:
        raise storage_error(e, "The report", reports) from None
    return path


def point_latest(run_dir: Path) -> Path:
    """Make `latest` beside `run_dir` point at it, in one step; where links can't be made, `latest.txt` names it.

    Errors: UserError when neither can be written.
    """
    reports = run_dir.parent
    link, text = reports / LATEST, reports / LATEST_TEXT
    tmp = reports / f".{LATEST}-{secrets.token_hex(4)}"
    try:
        tmp.symlink_to(run_dir.name, target_is_directory=True)
        tmp.replace(link)
        with contextlib.suppress(OSError):
            text.unlink()
        return link
    except OSError:
        with contextlib.suppress(OSError):
            tmp.unlink()
    try:
        tmp.write_text(run_dir.name + "\n", encoding="utf-8")
        tmp.replace(text)
    except OSError as e:
        with contextlib.suppress(OSError):
            tmp.unlink()
        raise storage_error(e, "The pointer to the latest run", text) from None
    if link.is_symlink():  # an old link would contradict the text
        with contextlib.suppress(OSError):
            link.unlink()
    return text


def find_run(which: str, reports: Path) -> Path:
    """The folder of a run: a path, a name or the start of one under `reports`, or 'latest'.

    Errors: UserError that names the runs there are.
    """
    given = Path(which)
    for path in (given, given.parent if given.name == RECORD else given, reports / which):
        if (path / RECORD).is_file():
            return Path(os.path.realpath(path)) if path.name == LATEST else path
    if which == LATEST:
        with contextlib.suppress(OSError):
            path = reports / (reports / LATEST_TEXT).read_text(encoding="utf-8").strip()
            if (path / RECORD).is_file():
                return path
    names = sorted(p.name for p in reports.glob("*") if (p / RECORD).is_file() and not p.is_symlink())
    started = [n for n in names if n.startswith(which)]
    if len(started) == 1:
        return reports / started[0]
    if not names:
        raise UserError(f"There is no run '{which}': {reports} holds none.", "`sparkproof validate` makes one.")
    if len(started) > 1:
        raise UserError(f"'{which}' may mean several runs: {', '.join(started[-5:])}.", "Give more of its name.")
    near = difflib.get_close_matches(which, names, n=1, cutoff=0.4) or names[-1:]
    raise UserError(f"There is no run '{which}' in {reports}.", f"Did you mean '{near[0]}'?")
