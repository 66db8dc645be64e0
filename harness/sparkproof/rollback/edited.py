"""Whether a file is still what its distribution installed: by RECORD, which has its size and SHA-256.

Hashing the five gigabytes of a fine-tuning stack takes longer than removing it. So a file is hashed only if its size is
another one than RECORD's, or if it was written after RECORD, which an installer writes last. An edit that keeps size and
time is missed.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import posixpath
from pathlib import Path

from sparkproof.rollback import tree
from sparkproof.rollback.model import Distribution

SLACK_NS = 2_000_000_000  # installers write many files within a second, and some file systems keep two-second times


def edited(root: str, d: Distribution) -> set[str]:
    """Of the distribution's files (relative to `root`, a real path), those whose content is not what RECORD says."""
    site = posixpath.dirname(d.folder)
    record = Path(root, d.folder, "RECORD")
    try:
        written = record.stat().st_mtime_ns + SLACK_NS
        rows = list(csv.reader(record.read_text(encoding="utf-8", errors="surrogateescape").splitlines()))
    except OSError:
        return set()
    found = set()
    for row in rows:
        if len(row) < 3 or not row[1].startswith("sha256=") or row[0].endswith(".pyc"):
            continue
        relative = tree.to_text(posixpath.normpath(posixpath.join(site, row[0])))
        path = Path(root, tree.to_path(relative))
        try:
            st = os.lstat(path)
        except OSError:
            continue
        same_size = not row[2].isdigit() or st.st_size == int(row[2])
        if same_size and st.st_mtime_ns <= written:
            continue
        if not same_size or _sha256(path) != row[1].removeprefix("sha256=").rstrip("="):
            found.add(relative)
    return found


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").digest()
    except OSError:
        return ""  # unreadable: nothing proves that it is the installer's
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
