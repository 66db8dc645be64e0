"""Carry out a plan: put versions back, remove what is new, look again, and judge by what the second look shows."""

# ruff: noqa: PTH100, PTH106
# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparkproof.errors import UserError
from sparkproof.rollback import environment, host, journal, manifest, plan, snapshot, tree
from sparkproof.rollback.diff import Diff
from sparkproof.rollback.model import Snapshot
from sparkproof.rollback.plan import Left, Plan, Step

RESTORE_TIMEOUT_S = 1800


@dataclass
class Outcome:
    """How a rollback ended, or, for a dry run, what it would do."""

    plan: Plan
    diff: Diff
    carried_out: bool = False
    resumed: int = 0
    removed_entries: int = 0
    removed_bytes: int = 0
    restored: list[str] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0: nothing is left. 1: something differs or is unknown (or would still be removed)."""
        return int(not self.diff.is_empty or (bool(self.plan.steps) and not self.carried_out) or bool(self.left))


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


def rollback(
    before: Snapshot,
    snapshot_path: Path,
    *,
    yes: bool = False,
    include_caches: bool = False,
    own: bool = False,
    environments: list[str] | None = None,
    env: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Go back to `before`; without `yes`, only say how. Run it again after an interruption: it goes on where it
    stopped.

    `environments` narrows it to some of those that the snapshot covers. `env`: variables for pip and for finding
    caches.
    """
    check(before, environments)
    whole = before
    if environments:
        chosen = {os.path.abspath(e) for e in environments}
        before = before.model_copy(update={"environments": [e for e in before.environments if e.root in chosen]})
    options = {"include_caches": include_caches, "own": own, "env": env}

    def planned() -> tuple[Plan, Diff]:
        progress("comparing with the snapshot")
        return plan.make(before, snapshot.again(before, env), **options)  # type: ignore[arg-type]

    first, difference = planned()
    if not yes:
        return Outcome(first, difference, left=first.left)
    outcome = Outcome(first, difference, carried_out=True)
    with journal.opened(journal.path_for(snapshot_path), whole) as log:
        failed: list[Left] = []
        stuck: set[tuple[str, ...]] = set()
        if log.unfinished:
            for step in log.unfinished:
                if step.kind != "restore" and (again := _proven(step, whole, own)):
                    progress(f"finishing {step.title}")
                    failed += _remove(again, whole, outcome)
                outcome.resumed += 1
            log.close_unfinished()
            first, _ = planned()
        restores = [s for s in first.steps if s.kind == "restore"]
        for step in restores:
            progress(f"putting back {step.title}")
            with log.step(step):
                refused = _restore(step, env, outcome)
                stuck |= {_key(step)} if refused else set()
                failed += refused
        final = planned()[0] if restores else first
        for step in final.steps:
            if step.kind == "restore":
                continue
            progress(f"removing {step.title}")
            with log.step(step):
                refused = _remove(step, whole, outcome)
                stuck |= {_key(step)} if refused else set()
                failed += refused
        last, outcome.diff = planned()
    known = {left.what for left in failed}
    outcome.left = failed + [left for left in last.left if left.what not in known]
    for step in last.steps:
        if _key(step) not in stuck:
            outcome.left.append(
                Left(what=step.title, why="it is still there, or came while this ran", fix="Run it again.")
            )
    return outcome


def _key(step: Step) -> tuple[str, ...]:
    """What makes a step of a later plan the same piece of work; the count of files in a title does not."""
    return (step.kind, step.place, step.title if step.kind in ("distribution", "restore") else "")


def _proven(step: Step, before: Snapshot, own: bool) -> Step | None:
    """An unfinished step of the journal, held against the snapshot again: a journal is a reminder, not a proof."""
    for env in before.environments:
        if step.place == env.real and step.kind in ("distribution", "files"):
            now = environment.read(env.root)
            keep = plan.protected(env, now)
            return step.model_copy(update={"paths": {p: s for p, s in step.paths.items() if p not in keep}})
    for cache in before.caches:
        if step.place == cache.real and step.kind == "cache" and not cache.not_read:
            return step.model_copy(update={"paths": {p: s for p, s in step.paths.items() if p not in cache.listing}})
    if step.kind == "own" and own and any(e.path == step.place for e in manifest.ours()):
        return step
    return None


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
