"""The way back of one Python environment: what came goes, what changed version comes back."""

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

from sparkproof.rollback import tree
from sparkproof.rollback.diff import named, same, strays
from sparkproof.rollback.edited import edited
from sparkproof.rollback.environment import compiled_from, owned_paths
from sparkproof.rollback.model import Distribution, Environment
from sparkproof.rollback.steps import Left, Plan, Step

_OTHERS = {"debian": "apt", "conda": "conda", "rpm": "dnf"}


def protected(before: Environment, after: Environment) -> set[str]:
    """Paths of an environment that must stay: what was there then, and what a distribution that stays owns now."""
    then = named(before.distributions)
    staying = [d for n, d in named(after.distributions).items() if n in then]
    return {*before.unowned, *owned_paths(before.distributions), *owned_paths(staying)}


def plan_environment(
    plan: Plan, old: Environment, new: Environment, env: Mapping[str, str], kept: Mapping[str, str]
) -> None:
    """Add the steps that lead from `new` back to `old`, and what stays.

    `kept`: files (real path -> why) that an earlier way back left to the user. A file whose content is no longer what was
    installed joins them: a user changed it.
    """
    then, now = named(old.distributions), named(new.distributions)
    keep = protected(old, new)
    theirs = {p: why for p, why in kept.items() if p.startswith(new.real + "/") and os.path.lexists(p)}
    for path, why in theirs.items():
        plan.left.append(Left(what=path, why=why, fix=f"rm {shlex.quote(path)}"))
        keep.add(tree.to_text(os.path.relpath(path, new.real)))
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
                group="packages",
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
    for path in sorted(edited(new.real, d) - keep):
        keep.add(path)
        full = os.path.join(new.real, tree.to_path(path))
        plan.kept[full] = f"it was changed since {title} was installed"
        plan.left.append(Left(what=full, why=plan.kept[full], fix=f"rm {shlex.quote(full)}"))
    if shared := sorted((mine & keep) - {tree.to_text(os.path.relpath(p, new.real)) for p in plan.kept}):
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
            group="packages",
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
    plan.steps.append(Step(kind="restore", group="packages", title=title, place=new.real, command=command))


def _url(direct_url: str) -> str:
    """The address of a direct_url.json, without credentials."""
    try:
        url = str(json.loads(direct_url).get("url", ""))
    except (ValueError, AttributeError):
        return "where it came from"
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2] if '@' in rest.split('/')[0] else rest}"
