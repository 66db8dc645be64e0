"""The way back of what is sparkproof's own: what its manifest lists, and what carries its label in a container engine."""

# ruff: noqa: PTH112
# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from sparkproof.rollback import manifest, tree
from sparkproof.rollback.engines import SORTS
from sparkproof.rollback.manifest import Entry
from sparkproof.rollback.model import Snapshot
from sparkproof.rollback.steps import Group, Left, Plan, Step

WORDS = {"cache": "cache", "venv": "environment", "reports": "reports", "locks": "lock folder", "file": "file"}


def plan_engines(plan: Plan, after: Snapshot) -> None:
    """One step an object, in the order in which they let go of each other."""
    for engine in after.engines:
        for sort in SORTS:
            for key, thing in getattr(engine, sort + "s").items():
                if thing.ours:
                    state = ", which runs" if thing.running else ""
                    title = f"{engine.name} {sort} {thing.label}{state}"
                    step = Step(kind="engine", title=title, place=engine.name, bytes=thing.bytes, sort=sort, key=key)
                    plan.steps.append(step)


def plan_manifest(plan: Plan) -> None:
    """What the manifest lists and still lies there. Folders inside another one listed go with that one."""
    entries = manifest.ours()
    for entry in entries:
        if not any(_inside(entry.path, other.path) for other in entries if other is not entry):
            _entry(plan, entry)


def _inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")


def _entry(plan: Plan, entry: Entry) -> None:
    word = WORDS[entry.kind]
    if os.path.realpath(sys.prefix) == entry.path or _inside(os.path.realpath(Path.home()), entry.path):
        fix = "make uninstall (it does not run from there), or: rm -rf " + shlex.quote(entry.path)
        plan.left.append(Left(what=f"{word} {entry.path}", why="sparkproof runs from it now", fix=fix))
        return
    title = f"sparkproof's {word} {entry.path}"
    group: Group = "reports" if entry.kind == "reports" else "ours"
    if not os.path.isdir(entry.path):
        place, name = os.path.split(entry.path)
        seen = tree.stamp(os.lstat(entry.path))
        if entry.seen and seen != entry.seen:
            plan.left.append(Left(what=f"{word} {entry.path}", why="it was changed since sparkproof wrote it"))
            return
        paths = {tree.to_text(name): seen}
        plan.steps.append(
            Step(kind="own", group=group, title=title, place=place, paths=paths, bytes=tree.stamp_bytes(seen))
        )
        return
    listing = tree.scan(entry.path)
    if listing.why:
        plan.left.append(Left(what=f"{word} {entry.path}", why=f"not read: {listing.why}"))
        return
    # the marks by which an environment is known to be ours and whole go last
    order = sorted(listing.stamps, key=lambda p: (p in ("pyvenv.cfg", "sparkproof-setup.json"), p.count("/") == 0, p))
    paths = {p: listing.stamps[p] for p in order}
    plan.steps.append(
        Step(kind="own", group=group, title=title, place=entry.path, paths=paths, bytes=listing.bytes, made=True)
    )
