"""From a diff to steps: what can be taken off, what can be put back, and what must be left, with the reason and what
to do by hand.

A step holds single paths with what was seen there, never "this folder and all below". A path is only in a step if the
snapshot proves that it is new, and if it lies in a given environment or in a named cache; or if it is in sparkproof's
own manifest. An object of a container engine is only in one if it carries this project's label.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from sparkproof.rollback import manifest, tree
from sparkproof.rollback.diff import compare, diff, why_unknown
from sparkproof.rollback.model import Snapshot
from sparkproof.rollback.parts import Diff, Part
from sparkproof.rollback.plan_own import plan_engines, plan_manifest
from sparkproof.rollback.plan_python import plan_environment
from sparkproof.rollback.steps import Group, Left, Plan, Step


def make(
    before: Snapshot,
    after: Snapshot,
    *,
    include: Collection[Group] = (),
    ours: bool = True,
    env: Mapping[str, str] | None = None,
    kept: Mapping[str, str] | None = None,
) -> tuple[Plan, Diff]:
    """Plan the way from `after` back to `before`. Reads the file system, changes nothing.

    `include`: groups that were asked for beside what is ours. `ours=False`: the manifest and the engines are left out.
    `kept`: files (real path -> why) that an earlier way back left to the user.
    """
    plan, difference = Plan(), diff(before, after)
    news = {e.root: e for e in after.environments}
    for old in before.environments:
        new = news.get(old.root)
        if new is not None and not old.not_read and not new.not_read:
            plan_environment(plan, old, new, os.environ if env is None else env, kept or {})
    _caches(plan, before, after)
    for part in difference.parts:
        _only_named(plan, part)
    if ours:
        plan_engines(plan, after)
        plan_manifest(plan)
    plan.steps.sort(key=_order)
    chosen = {"ours", *include}
    plan.offered = [s for s in plan.steps if s.group not in chosen]
    plan.steps = [s for s in plan.steps if s.group in chosen]
    return plan, difference


def _order(step: Step) -> tuple[int, bool]:
    """Versions first, pip's own last of them; then what goes; our own environment at the very end."""
    if step.kind == "restore":
        return 0, step.title.startswith("pip ")
    return (2 if step.kind == "own" and "pyvenv.cfg" in step.paths else 1), False


def _caches(plan: Plan, before: Snapshot, after: Snapshot) -> None:
    news = {c.root: c for c in after.caches}
    for old in before.caches:
        new = news.get(old.root)
        if new is None or why_unknown(old, new):
            continue
        if any(e.path == new.real for e in manifest.ours()):
            continue  # it goes as a whole
        added, removed, changed = compare(old.listing, new.listing)
        added = {p: added[p] for p in sorted(added, reverse=True) if added[p] not in ("m", "o")}
        if added or (new.present and not old.present):
            step = Step(
                kind="cache",
                group="ours" if old.own else "caches",
                title=f"{len(added)} new files of the {new.name} cache {new.root}",
                place=new.real,
                paths=added,
                bytes=sum(map(tree.stamp_bytes, added.values())),
                made=not old.present,
                above=old.above,
            )
            plan.steps.append(step)
        if changed and not old.own:
            what = f"{len(changed)} files in {new.root}, such as {min(changed)}"
            plan.left.append(Left(what=what, why="they were changed since; their old content is not kept"))
        if removed and not old.own:
            what = f"{len(removed)} files in {new.root}, such as {min(removed)}"
            plan.left.append(Left(what=what, why="they are gone and can't be brought back"))


def _only_named(plan: Plan, part: Part) -> None:
    """Parts that are compared but never touched."""
    if part.unknown:
        plan.left.append(Left(what=f"{part.area} {part.place}".strip(), why=f"unknown: {part.unknown}"))
    elif part.area == "containers":
        verb = {"image": "rmi", "container": "rm", "volume": "volume rm", "network": "network rm"}
        for i in part.added:
            if not i.ours:
                short = i.detail.removeprefix("sha256:")[:12] if i.detail.startswith("sha256:") else i.detail
                fix = f"{part.place} {verb[i.name.split()[0]]} {short}"
                why = "it carries no label of this project's, so it may be yours"
                plan.left.append(Left(what=f"{part.place} {i.name}", why=why, fix=fix, bytes=i.bytes))
        plan.left += [Left(what=i.name, why="it is gone and can't be brought back") for i in part.removed]
        for i in part.changed:
            fix = "docker builder prune" if part.place == "docker" else "podman system prune --build"
            plan.left.append(Left(what=f"{part.place} {i.name}", why=i.detail, fix=fix, bytes=i.bytes))
    elif part.area == "dpkg" and part.state == "differs":
        if part.added:
            fix = "sudo apt-get remove " + " ".join(i.name for i in part.added)
            plan.left.append(Left(what=f"{len(part.added)} Debian packages came", why="they belong to apt", fix=fix))
        for word, items in (("went", part.removed), ("changed version", part.changed)):
            if items:
                names = ", ".join(i.name for i in items[:5])
                plan.left.append(Left(what=f"{len(items)} Debian packages {word} ({names})", why="they belong to apt"))
    elif part.area == "profiles" and part.state == "differs":
        plan.left.append(
            Left(what=part.place, why="it differs; profiles are yours", fix="Look at it and undo what you don't want.")
        )
    elif part.area == "variables" and part.state == "differs":
        names = ", ".join(i.name for i in [*part.added, *part.removed, *part.changed][:5])
        plan.left.append(
            Left(what=f"variables {names}", why="they belong to your shell", fix="Look from a new login shell.")
        )
    elif part.area in ("processes", "gpu"):
        for i in [*part.added, *part.changed]:
            pid = next((w for w in i.name.split() if w.isdigit()), "")
            what, why = f"{part.area} {i.name}", "only you know whether it may end"
            plan.left.append(Left(what=what, why=why, fix=f"kill {pid}" if pid else "nvidia-smi", bytes=i.bytes))
