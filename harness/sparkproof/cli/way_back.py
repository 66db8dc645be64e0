"""`sparkproof snapshot` and `uninstall`: plain functions that print and return an exit code."""

from __future__ import annotations

import json as _json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from sparkproof.errors import UserError
from sparkproof.rollback import manifest, undo
from sparkproof.rollback import snapshot as snapshots
from sparkproof.rollback.model import Snapshot
from sparkproof.rollback.parts import size
from sparkproof.rollback.steps import ASKED, GROUPS, Group, Left, Plan, Step

ROWS = 40  # of a table; --json gives all


def snapshot(
    out: Path | None = None, environment: list[Path] | None = None, json: bool = False, force: bool = False
) -> int:
    """Record what an installation can change. Returns 0.

    `out`: where to; an existing file stays unless `force`, for replacing the "before" destroys the way back. `json`:
    print the document; then a file is written only if `out` is given. Errors: UserError.
    """
    for path in environment or []:
        if not path.is_dir():
            raise UserError(
                f"There is no environment at {path}.", "Give the folder that holds bin/ and lib/, such as .venv."
            )
    target = out or snapshots.default_path()
    write = out is not None or not json
    if write and target.exists() and not force:
        raise UserError(
            f"There is a snapshot at {target} already, and it is the way back.",
            "Compare with it: sparkproof verify-rollback. To replace it, add --force; to keep both, --out FILE.",
        )
    console = Console(stderr=json)
    manifest.add_own_environment()
    with console.status("reading this machine ..."):
        found = snapshots.take(environment or None)
    if write:
        snapshots.save(found, target)
    if json:
        print(_json.dumps(found.model_dump(mode="json", by_alias=True), indent=1))
        return 0
    _say_snapshot(console, found, target)
    return 0


def _say_snapshot(console: Console, found: Snapshot, target: Path) -> None:
    for e in found.environments:
        state = f"{len(e.distributions)} distributions" if e.present else "not there"
        console.print(f"  {escape(e.root)}: {state}", highlight=False)
    present = [c for c in found.caches if c.present]
    console.print(f"  {len(present)} caches, {size(sum(c.bytes for c in present))}", highlight=False)
    for where, why in not_read(found):
        console.print(f"  [yellow]not read[/yellow] {escape(where)}: {escape(why)}", highlight=False)
    console.print(f"Recorded in {found.took_s:.1f} s: {escape(str(target))}", highlight=False, soft_wrap=True)
    console.print("The way back: make uninstall (shows it, and asks); make verify-rollback proves it.", highlight=False)


def not_read(found: Snapshot) -> list[tuple[str, str]]:
    """What the snapshot could not read, and why: nothing will be concluded about it."""
    rows = [(e.root, e.not_read) for e in found.environments if e.not_read]
    rows += [(c.root, c.not_read) for c in found.caches if c.not_read]
    rows += [(e.name, e.not_read) for e in found.engines if e.not_read]
    rest = (("dpkg", found.dpkg), ("processes", found.processes), ("GPU memory", found.gpu))
    rows += [(name, part.not_read) for name, part in rest if part.not_read]
    return rows + list(found.profiles.not_read.items())


def uninstall(
    snapshot_file: Path | None = None,
    *,
    yes: bool = False,
    dry_run: bool = False,
    include: list[str] | None = None,
    environment: list[Path] | None = None,
    json: bool = False,
    ask: Callable[[str], bool] | None = None,
) -> int:
    """Show what is sparkproof's and what came since the snapshot, ask, and take off what was agreed to.

    `yes`: carry it out without asking, what is ours and the groups of `include`; `dry_run`: only show; neither: ask on a
    terminal by `ask`, elsewhere only show and return 1. Returns 0 if all that was agreed to is gone, 1 if not. Errors:
    UserError (2).
    """
    groups = _groups(include or [])
    if yes and dry_run:
        raise UserError("--yes and --dry-run contradict each other.", "Give one of them.")
    path = snapshot_file or snapshots.default_path()
    if snapshot_file is None and not path.exists():
        before, path = snapshots.nothing(), path.with_name("ours")
        if environment or groups - {"reports"}:
            raise UserError(
                "Without a snapshot nothing proves what is new in environments and caches, so only what is sparkproof's can go.",
                "Leave out --environment and --include, or give the snapshot's file.",
            )
    else:
        before = snapshots.load(path)
    console = Console(stderr=json)
    roots = [str(e) for e in environment] if environment else None

    def run(carry_out: bool) -> undo.Outcome:
        with console.status("comparing with the snapshot ...") as status:
            return undo.uninstall(
                before, path, yes=carry_out, include=groups, environments=roots,
                progress=lambda text: status.update(escape(text)),
            )  # fmt: skip

    manifest.add_own_environment()
    outcome = run(carry_out=yes)
    if json:
        print(_json.dumps(document(outcome), indent=1))
        return outcome.exit_code
    if not yes:
        _show(console, outcome, before)
        if not dry_run and (outcome.plan.steps or outcome.plan.offered):
            if ask is None:
                console.print("Nothing was changed: there is no terminal to ask on. Add --yes to carry it out.")
                return 1
            if not _agreed(outcome.plan, groups, ask):
                console.print("Nothing was changed.")
                return 1
            outcome = run(carry_out=True)
    if outcome.carried_out:
        _left(console, outcome.left)
    for line in ending(outcome, before, path):
        console.print(escape(line), highlight=False, soft_wrap=True)
    return outcome.exit_code


def _groups(names: list[str]) -> set[Group]:
    found: set[Group] = set()
    for name in names:
        group = next((g for g in ASKED if g == name), None)
        if group is None:
            raise UserError(f"There is no group '{name}' to include.", f"Known: {', '.join(ASKED)}.")
        found.add(group)
    return found


def _agreed(plan: Plan, groups: set[Group], ask: Callable[[str], bool]) -> bool:
    """Ask once for what would go, then for each group beside it; adds the groups agreed to. False: nothing at all."""
    any_yes = False
    if plan.steps:
        if not ask(f"Remove these {len(plan.steps)} things ({size(plan.bytes)})?"):
            return False
        any_yes = True
    for group in ASKED:
        steps = [s for s in plan.offered if s.group == group]
        if steps and ask(f"Also remove {GROUPS[group]}: {_sum(steps)}?"):
            groups.add(group)
            any_yes = True
    return any_yes


def _sum(steps: list[Step]) -> str:
    """'12 distributions, 340 files, 5.7 GiB; 1 version put back'."""
    back = sum(s.kind == "restore" for s in steps)
    dists = sum(s.kind == "distribution" for s in steps)
    files = sum(len(s.paths) for s in steps if s.kind != "distribution")
    parts = [f"{dists} distributions"] * bool(dists) + [f"{files} files"] * bool(files)
    parts.append(size(sum(s.bytes for s in steps)))
    return ", ".join(parts) + (f"; {back} versions put back" if back else "")


def document(outcome: undo.Outcome) -> dict[str, object]:
    """The outcome as data; single paths are left out, their number stays."""

    def told(steps: list[Step]) -> list[dict[str, object]]:
        return [{**s.model_dump(mode="json", exclude={"paths"}), "entries": len(s.paths)} for s in steps]

    return {
        "schema": "sparkproof-uninstall/1",
        "carried_out": outcome.carried_out,
        "exit_code": outcome.exit_code,
        "steps": told(outcome.plan.steps),
        "offered": told(outcome.plan.offered),
        "bytes": outcome.plan.bytes,
        "removed_entries": outcome.removed_entries,
        "removed_objects": outcome.removed_objects,
        "removed_bytes": outcome.removed_bytes,
        "restored": outcome.restored,
        "resumed": outcome.resumed,
        "left": [left.model_dump(mode="json") for left in outcome.left],
        "diff": outcome.diff.model_dump(mode="json", by_alias=True),
    }


def _show(console: Console, outcome: undo.Outcome, before: Snapshot) -> None:
    plan = outcome.plan
    if plan.steps:
        _steps(console, plan.steps)
    if plan.offered:
        table = table_of("only if asked for", "how much", "with")
        for group in ASKED:
            if steps := [s for s in plan.offered if s.group == group]:
                table.add_row(GROUPS[group], _sum(steps), f"--include {group}")
        console.print(table)
    _left(console, outcome.left)
    if not before.areas:
        console.print(
            "There is no snapshot, so nothing can be said of environments, caches and the rest of this machine.",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def table_of(*titles: str) -> Table:
    """Without borders, and with every path whole: a cut one can't be copied."""
    return Table(*(Column(t, overflow="fold") for t in titles), box=None, pad_edge=False)


def _steps(console: Console, steps: list[Step]) -> None:
    table = table_of("would", "what", "size")
    ordered = sorted(steps, key=lambda s: (s.kind != "restore", -s.bytes))
    for step in ordered[:ROWS]:
        verb = "put back" if step.kind == "restore" else "remove"
        table.add_row(verb, escape(step.title), size(step.bytes) if step.bytes else "")
    console.print(table)
    if len(steps) > ROWS:
        rest = ordered[ROWS:]
        console.print(
            f"... and {len(rest)} more, {size(sum(s.bytes for s in rest))}; --json lists all", highlight=False
        )


def _left(console: Console, left: list[Left]) -> None:
    if not left:
        return
    table = table_of("stays", "why", "what to do")
    for row in sorted(left, key=lambda row: (not row.failed, -row.bytes))[:ROWS]:
        amount = f" ({size(row.bytes)})" if row.bytes else ""
        table.add_row(escape(row.what) + amount, escape(row.why), escape(row.fix))
    console.print(table)
    if len(left) > ROWS:
        console.print(f"... and {len(left) - ROWS} more; --json lists all", highlight=False)


def ending(outcome: undo.Outcome, before: Snapshot, path: Path) -> list[str]:
    """The sentences that matter, last."""
    lines = []
    plan = outcome.plan
    if outcome.resumed:
        lines.append(f"An earlier run had been interrupted; {outcome.resumed} unfinished steps were finished first.")
    if not outcome.carried_out:
        if not plan.steps and not plan.offered:
            return [*lines, "Nothing of sparkproof's is here, and nothing new that could be removed."]
        return [*lines, f"Nothing was changed. {len(plan.steps)} things would go, about {size(plan.bytes)} return."]
    lines.append(
        f"Removed {outcome.removed_entries} files and links and {outcome.removed_objects} things in container engines; "
        f"{size(outcome.removed_bytes)} returned. Put back {len(outcome.restored)} distributions."
    )
    if failed := sum(left.failed for left in outcome.left):
        return [*lines, f"{failed} things refused to go; they are listed first, with what to do."]
    if plan.offered:
        lines.append(f"Not asked for, so it stays: {', '.join(dict.fromkeys(s.group for s in plan.offered))}.")
    if outcome.diff.is_empty:
        lines.append(f"Nothing is left: everything that was read equals the snapshot. Its own file stays: {path}")
    elif before.areas:
        lines.append("The machine is not as the snapshot recorded it; make verify-rollback shows every difference.")
    else:
        lines.append("All that was sparkproof's is gone.")
    return lines
