"""Carry out a plan: put versions back, remove what is new, look again, and judge by what the second look shows."""

# ruff: noqa: PTH100, PTH106
# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparkproof.errors import UserError
from sparkproof.rollback import engines, environment, host, journal, manifest, plan, snapshot, tree
from sparkproof.rollback.model import Snapshot
from sparkproof.rollback.parts import Diff
from sparkproof.rollback.plan_python import protected
from sparkproof.rollback.steps import Group, Left, Plan, Step

RESTORE_TIMEOUT_S = 1800


@dataclass
class Outcome:
    """How a way back ended, or, for a dry run, what it would do."""

    plan: Plan
    diff: Diff
    carried_out: bool = False
    resumed: int = 0
    removed_entries: int = 0
    removed_objects: int = 0
    removed_bytes: int = 0
    restored: list[str] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Carried out: 0 if all that was asked for is gone, 1 if something of it refused. Only shown: 0.

        What stays because nobody asked for it, or because a user changed it, is told and no failure; whether the machine
        is as it was is what `verify-rollback` says.
        """
        return int(self.carried_out and any(left.failed for left in self.left))


def check(before: Snapshot, environments: list[str] | None = None, home: str | None = None) -> None:
    """Refuse a snapshot that proves nothing here. Errors: UserError."""
    here = host.machine()
    if (before.machine.id and here.id and before.machine.id != here.id) or (
        not (before.machine.id and here.id) and before.machine.hostname != here.hostname
    ):
        raise UserError(
            f"The snapshot was taken on another machine ({before.machine.hostname}) and proves nothing about this one.",
            "Use a snapshot that was taken here.",
        )
    if before.machine.uid != here.uid or (home and os.path.abspath(home) != before.home):
        raise UserError(
            f"The snapshot was taken by another user (home {before.home}).", "Run this as the user who took it."
        )
    known = {e.root: e for e in before.environments}
    for root in environments or []:
        if os.path.abspath(root) not in known:
            raise UserError(
                f"The snapshot does not cover the environment {root}; it covers {', '.join(known) or 'none'}.",
                "Give one that it covers, or none.",
            )
    for env in known.values():
        if env.present and os.path.realpath(env.root) != env.real:
            raise UserError(f"{env.root} led to {env.real} when the snapshot was taken and leads elsewhere now.")
        if env.identity and (now := environment.identity(env.root)) and now != env.identity:
            raise UserError(
                f"{env.root} is another environment than when the snapshot was taken: it was made again since.",
                f"Remove it whole (rm -r {env.root}), or take a new snapshot.",
            )


def uninstall(
    before: Snapshot,
    snapshot_path: Path,
    *,
    yes: bool = False,
    include: Collection[Group] = (),
    ours: bool = True,
    environments: list[str] | None = None,
    env: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Go back to `before`; without `yes`, only say how. Run it again after an interruption: it goes on where it
    stopped.

    `include`: groups to remove beside what is ours. `ours=False`: only those, for a machine inside this one, such as a test's.
    `environments` narrows it to some of those that the snapshot covers.
    `env`: variables for pip, for finding caches and engines. `snapshot_path`: the journal lies beside it.
    """
    check(before, environments)
    whole = before
    if environments:
        chosen = {os.path.abspath(e) for e in environments}
        before = before.model_copy(update={"environments": [e for e in before.environments if e.root in chosen]})

    def planned() -> tuple[Plan, Diff]:
        progress("comparing with the snapshot" if before.areas else "looking for what is ours")
        after = snapshot.again(before, env)
        if ours and not before.areas:
            after.engines = engines.read_all(os.environ if env is None else env)
        return plan.make(before, after, include=include, ours=ours, env=env, kept=journal.kept(snapshot_path))

    first, difference = planned()
    if not yes:
        return Outcome(first, difference, left=first.left)
    outcome = Outcome(first, difference, carried_out=True)
    with journal.opened(journal.path_for(snapshot_path), whole) as log:
        failed: list[Left] = []
        stuck: set[tuple[str, ...]] = set()

        def carry_out(step: Step, words: str) -> None:
            progress(f"{words} {step.title}")
            with log.step(step):
                refused = _carry_out(step, whole, env, outcome)
            if refused:
                stuck.add(_key(step))
                failed.extend(refused)

        if log.unfinished:
            for step in log.unfinished:
                if step.kind != "restore" and (again := _proven(step, whole)):
                    progress(f"finishing {step.title}")
                    failed += _carry_out(again, whole, env, outcome)
                outcome.resumed += 1
            log.close_unfinished()
            first, _ = planned()
        journal.keep(snapshot_path, first.kept)
        restores = [s for s in first.steps if s.kind == "restore"]
        for step in restores:
            carry_out(step, "putting back")
        final = planned()[0] if restores else first
        journal.keep(snapshot_path, final.kept)
        for step in final.steps:
            if step.kind != "restore":
                carry_out(step, "removing")
        last, outcome.diff = planned()
    if ours:
        _tidy(snapshot_path)
    known = {left.what for left in failed}
    outcome.left = [f.model_copy(update={"failed": True}) for f in failed]
    outcome.left += [left for left in last.left if left.what not in known]
    back = {r.partition(" (")[0] for r in outcome.restored}
    for step in last.steps:
        if step.kind == "restore" and step.title.partition(" (")[0] in back:
            why = "its version is back, but the index gave other files than were there"
            outcome.left.append(Left(what=step.title, why=why, fix="Install it from where it came from.", failed=True))
        elif _key(step) not in stuck:
            why = "it is still there, or came while this ran"
            outcome.left.append(Left(what=step.title, why=why, fix="Run it again.", failed=True))
    outcome.plan = first.model_copy(update={"offered": last.offered})
    return outcome


def _tidy(snapshot_path: Path) -> None:
    """Remove the list of ours once nothing on it is left, and of files that stay once none is; then an empty folder."""
    if not manifest.ours():
        manifest.manifest_path().unlink(missing_ok=True)
    if not any(os.path.lexists(p) for p in journal.kept(snapshot_path)):
        journal.kept_path(snapshot_path).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        manifest.manifest_path().parent.rmdir()


def _key(step: Step) -> tuple[str, ...]:
    """What makes a step of a later plan the same piece of work; the count of files in a title does not."""
    return (step.kind, step.place, step.title if step.kind in ("distribution", "restore") else "")


def _proven(step: Step, before: Snapshot) -> Step | None:
    """An unfinished step of the journal, held against the snapshot again: a journal is a reminder, not a proof."""
    if step.kind == "engine":
        return step  # its label is read again before it is removed
    for env in before.environments:
        if step.place == env.real and step.kind in ("distribution", "files"):
            now = environment.read(env.root)
            keep = protected(env, now)
            return step.model_copy(update={"paths": {p: s for p, s in step.paths.items() if p not in keep}})
    for cache in before.caches:
        if step.place == cache.real and step.kind == "cache" and not cache.not_read:
            return step.model_copy(update={"paths": {p: s for p, s in step.paths.items() if p not in cache.listing}})
    if step.kind == "own" and any(e.path == step.place for e in manifest.ours()):
        return step
    return None


def _carry_out(step: Step, before: Snapshot, env: Mapping[str, str] | None, outcome: Outcome) -> list[Left]:
    if step.kind == "restore":
        return _restore(step, env, outcome)
    return _remove_object(step, env, outcome) if step.kind == "engine" else _remove(step, before, outcome)


def _remove_object(step: Step, env: Mapping[str, str] | None, outcome: Outcome) -> list[Left]:
    assert step.sort and step.place in ("docker", "podman")
    try:
        why = engines.remove(step.place, step.sort, step.key, env)  # type: ignore[arg-type]
        fix = f"{step.place} {'rmi' if step.sort == 'image' else step.sort + ' rm'} {step.key[:19]}"
    except UserError as e:
        why, fix = e.message, e.fix
    if why:
        return [Left(what=step.title, why=why, fix=fix)]
    outcome.removed_objects += 1
    outcome.removed_bytes += step.bytes
    return []


def _restore(step: Step, env: Mapping[str, str] | None, outcome: Outcome) -> list[Left]:
    """Run pip or uv; what it says in the end is the reason if it fails."""
    try:
        done = subprocess.run(
            step.command,
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RESTORE_TIMEOUT_S,
        )
        code, said = done.returncode, (done.stderr or done.stdout).strip()
    except (OSError, subprocess.SubprocessError) as e:
        code, said = 1, str(e)
    if code == 0:
        outcome.restored.append(step.title)
        return []
    reason = said.splitlines()[-1] if said else f"exit code {code}"
    return [Left(what=step.title, why=f"it can't be put back: {reason}", fix=" ".join(step.command))]


def _remove(step: Step, before: Snapshot, outcome: Outcome) -> list[Left]:
    """Remove the step's paths one by one. What refuses is named, and the rest goes on."""
    refused: dict[str, str] = {}
    removed: list[str] = []
    try:
        with tree.opened(step.place) as fd:
            for text, expected in step.paths.items():
                path = tree.to_path(text)
                if why := tree.remove(fd, path, expected):
                    refused[text] = why
                    continue
                removed.append(path)
                outcome.removed_entries += 1
                outcome.removed_bytes += tree.stamp_bytes(expected)
            tree.prune(fd, removed, _keep(step, before))
        if step.made:
            with contextlib.suppress(OSError):
                os.rmdir(step.place)
                for folder in map(str, Path(step.place).parents):
                    if not step.above or not folder.startswith(step.above.rstrip("/") + "/"):
                        break
                    os.rmdir(folder)  # only ever an empty one
    except FileNotFoundError:
        return []
    except OSError as e:
        return [Left(what=step.title, why=e.strerror or str(e))]
    if not refused:
        return []
    path, why = next(iter(refused.items()))
    return [Left(what=step.title, why=f"{len(refused)} of its entries stay; {step.place}/{path}: {why}")]


def _keep(step: Step, before: Snapshot) -> set[str]:
    """Folders that stay even when empty, because they were there."""
    for env in before.environments:
        if env.real == step.place:
            tops = {"bin", "include"} if env.present else set()
            return {*env.sites, *tops, *(p for p, s in env.unowned.items() if s == "d")}
    for cache in before.caches:
        if cache.real == step.place:
            return {p for p, s in cache.listing.items() if s == "d"}
    return set()
