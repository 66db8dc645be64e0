"""From a diff to steps: what can be taken off, what can be put back, and what must be left, with the reason and what
to do by hand.

A step holds single paths with what was seen there, never "this folder and all below". A path is only in a step if the
snapshot proves that it is new, and if it lies in a given environment, in a named cache, or in sparkproof's own
manifest.
"""

# ruff: noqa: PTH112, PTH114, PTH118, PTH208
# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import json
import os
import posixpath
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from sparkproof.results import Strict
from sparkproof.rollback import manifest, tree
from sparkproof.rollback.diff import Diff, Part, compare, diff, named, same, strays, why_unknown
from sparkproof.rollback.environment import compiled_from, owned_paths
from sparkproof.rollback.model import Distribution, Environment, Snapshot, Stamps

_OTHERS = {"debian": "apt", "conda": "conda", "rpm": "dnf"}


class Step(Strict):
    """One piece of work, small enough to be repeated after an interruption."""

    kind: Literal["restore", "distribution", "files", "cache", "own"]
    title: str
    place: str = Field(description="Folder, with links resolved, that all paths are relative to.")
    paths: Stamps = Field(default_factory=dict, description="What to remove, in order, and what was seen there.")
    bytes: int = 0
    command: list[str] = Field(default_factory=list, description="restore: what puts the version back.")
    made: bool = Field(default=False, description="The folder itself is new: remove it too once it is empty.")
    above: str = Field(default="", description="made: empty folders between it and this one, which was there, go too.")


class Left(Strict):
    """Something that stays, and why."""

    what: str
    why: str
    fix: str = ""
    bytes: int = 0


class Plan(Strict):
    """Everything that would be done, in order, and everything that would not."""

    steps: list[Step] = Field(default_factory=list)
    left: list[Left] = Field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes that the steps remove."""
        return sum(s.bytes for s in self.steps)


def make(
    before: Snapshot,
    after: Snapshot,
    *,
    include_caches: bool = False,
    own: bool = False,
    env: Mapping[str, str] | None = None,
) -> tuple[Plan, Diff]:
    """Plan the way from `after` back to `before`. Reads the file system, changes nothing."""
    plan, difference = Plan(), diff(before, after)
    news = {e.root: e for e in after.environments}
    for old in before.environments:
        new = news.get(old.root)
        if new is not None and not old.not_read and not new.not_read:
            _environment(plan, old, new, os.environ if env is None else env)
    _caches(plan, before, after, include_caches)
    for part in difference.parts:
        _only_named(plan, part)
    if own:
        _own(plan)
    plan.steps.sort(key=lambda s: (s.kind != "restore", s.kind == "restore" and s.title.startswith("pip ")))  # pip last
    return plan, difference


def protected(before: Environment, after: Environment) -> set[str]:
    """Paths of an environment that must stay: what was there then, and what a distribution that stays owns now."""
    then = named(before.distributions)
    staying = [d for n, d in named(after.distributions).items() if n in then]
    return {*before.unowned, *owned_paths(before.distributions), *owned_paths(staying)}


def _environment(plan: Plan, old: Environment, new: Environment, env: Mapping[str, str]) -> None:
    then, now = named(old.distributions), named(new.distributions)
    keep = protected(old, new)
    for name in sorted({*then, *now}):
        if name not in now or (name in then and not same(then[name], now[name])):
            _restore(plan, new, then[name], now, env)
        elif name not in then:
            _remove(plan, old, new, now[name], keep)
    added, removed, changed = strays(old, new)
    new_files = {p: s for p, s in sorted(added.items(), reverse=True) if p not in keep and s not in ("m", "o")}
    if new_files:
        plan.steps.append(
            Step(
                kind="files",
                title=f"{len(new_files)} files of no distribution in {new.root}",
                place=new.real,
                paths=new_files,
                bytes=sum(map(tree.stamp_bytes, new_files.values())),
                made=not old.present,
            )
        )
    for path in sorted(changed):
        plan.left.append(Left(what=f"{new.root}/{path}", why="it was changed since; its old content is not kept"))
    if gone := sorted(p for p in removed if removed[p] != "d"):
        plan.left.append(
            Left(what=f"{len(gone)} files in {new.root} ({gone[0]})", why="they are gone and can't be brought back")
        )


def _remove(plan: Plan, old: Environment, new: Environment, d: Distribution, keep: set[str]) -> None:
    title = f"{d.name} {d.version}"
    if d.installer in _OTHERS or d.folder.startswith("lib/python3/"):
        tool = _OTHERS.get(d.installer, "apt")
        plan.left.append(Left(what=title, why=f"it belongs to {tool}", fix=f"Remove it with {tool}.", bytes=d.bytes))
        return
    if d.paths is None:
        fix = f"{shlex.quote(new.root)}/bin/python -m pip uninstall {d.name}"
        plan.left.append(Left(what=title, why="it has no RECORD, so its files are not known", fix=fix))
        return
    if d.name == "sparkproof" and os.path.realpath(sys.prefix) == new.real:
        plan.left.append(
            Left(what=title, why="it is what runs now", fix="Remove its environment once all else is done.")
        )
        return
    if d.outside:
        plan.left.append(
            Left(what=f"{len(d.outside)} files of {title}, such as {d.outside[0]}", why=f"they lie outside {new.root}")
        )
    mine = set(d.paths)
    for folder in {posixpath.dirname(p) + "/__pycache__" for p in mine if p.endswith(".py")}:
        path = os.path.join(new.real, tree.to_path(folder))
        if os.path.isdir(path) and not os.path.islink(path):
            mine |= {f for n in os.listdir(path) if compiled_from(f := f"{folder}/{tree.to_text(n)}") in mine}
    if shared := sorted(mine & keep):
        plan.left.append(
            Left(
                what=f"{len(shared)} files of {title}, such as {shared[0]}",
                why="they were there before, or belong to something that stays",
            )
        )
    try:
        with tree.opened(new.real) as fd:
            paths = {p: s for p in sorted(mine - keep, key=lambda p: _order(p, d.folder)) if (s := _seen(fd, p))}
    except OSError as e:
        plan.left.append(Left(what=title, why=str(e)))
        return
    plan.steps.append(
        Step(
            kind="distribution",
            title=title,
            place=new.real,
            paths=paths,
            bytes=sum(map(tree.stamp_bytes, paths.values())),
            made=not old.present,
        )
    )


def _seen(fd: int, path: str) -> str:
    try:
        return tree.look(fd, tree.to_path(path))
    except OSError:
        return "l:?"  # the way there leads through a link: `tree.remove` refuses it and says so


def _order(path: str, folder: str) -> tuple[int, str]:
    """Metadata last and RECORD at the very end, so that a half removed distribution can still be recognised and
    finished.
    """
    return (
        3 if path == f"{folder}/RECORD" else 2 if path == f"{folder}/METADATA" else int(path.startswith(folder)),
        path,
    )


def _restore(
    plan: Plan, new: Environment, then: Distribution, now: dict[str, Distribution], env: Mapping[str, str]
) -> None:
    seen = now[then.name].version if then.name in now else "gone"
    title = f"{then.name} {then.version} (now {seen})"
    requirement = f"{then.name}=={then.version}"
    python = Path(new.root, "bin", "python")
    why, fix = "", ""
    if then.direct_url:
        why, fix = "it did not come from an index", f"Install it again from {_url(then.direct_url)}."
    elif then.installer in _OTHERS or then.folder.startswith("lib/python3/"):
        why = f"it belongs to {_OTHERS.get(then.installer, 'apt')}"
    elif not new.present or not python.exists():
        why, fix = (
            f"{new.root} has no bin/python that could put it back",
            f"python3 -m pip install --no-deps {requirement}",
        )
    if why:
        plan.left.append(Left(what=title, why=why, fix=fix))
        return
    options = ["--no-deps", "--force-reinstall", "--no-cache-dir"]
    uv = shutil.which("uv", path=env.get("PATH"))
    if "pip" in now:
        command = [
            str(python),
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--no-input",
            "-q",
            *options,
            requirement,
        ]
    elif uv:
        command = [
            uv,
            "pip",
            "install",
            "--python",
            str(python),
            "-q",
            "--no-cache",
            "--no-deps",
            "--reinstall",
            requirement,
        ]
    else:
        plan.left.append(
            Left(what=title, why="there is neither pip in the environment nor uv", fix=f"Install {requirement}.")
        )
        return
    plan.steps.append(Step(kind="restore", title=title, place=new.real, command=command))


def _url(direct_url: str) -> str:
    """The address of a direct_url.json, without credentials."""
    try:
        url = str(json.loads(direct_url).get("url", ""))
    except (ValueError, AttributeError):
        return "where it came from"
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2] if '@' in rest.split('/')[0] else rest}"


def _caches(plan: Plan, before: Snapshot, after: Snapshot, include: bool) -> None:
    news = {c.root: c for c in after.caches}
    for old in before.caches:
        new = news.get(old.root)
        if new is None or why_unknown(old, new):
            continue
        added, removed, changed = compare(old.listing, new.listing)
        added = {p: added[p] for p in sorted(added, reverse=True) if added[p] not in ("m", "o")}
        total = sum(map(tree.stamp_bytes, added.values()))
        if added or (new.present and not old.present):
            if old.own or include:
                title = f"{len(added)} new files of the {new.name} cache {new.root}"
                plan.steps.append(
                    Step(
                        kind="cache",
                        title=title,
                        place=new.real,
                        paths=added,
                        bytes=total,
                        made=not old.present,
                        above=old.above,
                    )
                )
            else:
                plan.left.append(
                    Left(
                        what=f"{len(added)} new files of the {new.name} cache {new.root}",
                        why="they may be yours: models and data that you downloaded lie in caches too",
                        fix="Add --include-caches to remove what is new there.",
                        bytes=total,
                    )
                )
        if changed:
            what = f"{len(changed)} files in {new.root}, such as {min(changed)}"
            plan.left.append(Left(what=what, why="they were changed since; their old content is not kept"))
        if removed:
            what = f"{len(removed)} files in {new.root}, such as {min(removed)}"
            plan.left.append(Left(what=what, why="they are gone and can't be brought back"))


def _only_named(plan: Plan, part: Part) -> None:
    """Parts that are compared but never touched."""
    if part.unknown:
        plan.left.append(Left(what=f"{part.area} {part.place}".strip(), why=f"unknown: {part.unknown}"))
    elif part.area == "containers":
        verb = {"image": "rmi", "container": "rm", "volume": "volume rm"}
        for i in part.added:
            short = i.detail.removeprefix("sha256:")[:12] if i.detail.startswith("sha256:") else i.detail
            fix = f"{part.place} {verb[i.name.split()[0]]} {short}"
            plan.left.append(Left(what=i.name, why="containers are named, not removed", fix=fix, bytes=i.bytes))
        plan.left += [Left(what=i.name, why="it is gone and can't be brought back") for i in part.removed]
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


def _own(plan: Plan) -> None:
    for entry in manifest.ours():
        if os.path.realpath(sys.prefix) == entry.path or os.path.realpath(Path.home()).startswith(
            entry.path.rstrip("/") + "/"
        ):
            fix = f"rm -rf {shlex.quote(entry.path)}"
            plan.left.append(Left(what=f"{entry.kind} {entry.path}", why="sparkproof runs from it now", fix=fix))
            continue
        if os.path.isdir(entry.path):
            listing = tree.scan(entry.path)
            place, paths, total = entry.path, dict(sorted(listing.stamps.items(), reverse=True)), listing.bytes
            if listing.why:
                plan.left.append(Left(what=f"{entry.kind} {entry.path}", why=f"not read: {listing.why}"))
                continue
        else:
            place, name = os.path.split(entry.path)
            seen = tree.stamp(os.lstat(entry.path))
            paths, total = {tree.to_text(name): seen}, tree.stamp_bytes(seen)
        title = f"sparkproof's own {entry.kind} {entry.path}"
        plan.steps.append(
            Step(kind="own", title=title, place=place, paths=paths, bytes=total, made=os.path.isdir(entry.path))
        )
