"""`sparkproof snapshot` and `sparkproof rollback`: plain functions that print and return an exit code."""

from __future__ import annotations

import json as _json
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparkproof.errors import UserError
from sparkproof.rollback import manifest, undo
from sparkproof.rollback import snapshot as snapshots
from sparkproof.rollback.diff import size
from sparkproof.rollback.model import Snapshot
from sparkproof.rollback.plan import Left, Step

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
            "Compare with it: sparkproof rollback. To replace it, add --force; to keep both, --out FILE.",
        )
    console = Console(stderr=json)
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
    console.print("The way back: sparkproof rollback (shows it; --yes carries it out)", highlight=False)


def not_read(found: Snapshot) -> list[tuple[str, str]]:
    """What the snapshot could not read, and why: nothing will be concluded about it."""
    rows = [(e.root, e.not_read) for e in found.environments if e.not_read]
    rows += [(c.root, c.not_read) for c in found.caches if c.not_read]
    rows += [(e.name, e.not_read) for e in found.engines if e.not_read]
    rows += [("dpkg", found.dpkg.not_read)] if found.dpkg.not_read else []
    return rows + list(found.profiles.not_read.items())


def rollback(
    snapshot_file: Path | None = None,
    yes: bool = False,
    include_caches: bool = False,
    own: bool = False,
    environment: list[Path] | None = None,
    json: bool = False,
) -> int:
    """Show the way back to a snapshot, or with `yes` go it. Returns 0: nothing is left, 1: leftovers remain. Errors:
    UserError (2).

    `include_caches`: also what is new in caches, where your own models may lie. `own`: also all that sparkproof made
    (its environment, caches and reports, by its manifest).
    """
    path = snapshot_file or snapshots.default_path()
    before = snapshots.load(path)
    console = Console(stderr=json)
    with console.status("comparing with the snapshot ...") as status:
        outcome = undo.rollback(
            before,
            path,
            yes=yes,
            include_caches=include_caches,
            own=own,
            environments=[str(e) for e in environment] if environment else None,
            progress=lambda text: status.update(escape(text)),
        )
    if json:
        print(_json.dumps(document(outcome), indent=1))
        return outcome.exit_code
    if not outcome.carried_out and outcome.plan.steps:
        _steps(console, outcome.plan.steps)
    _left(console, outcome.left)
    for line in ending(outcome, own):
        console.print(escape(line), highlight=False, soft_wrap=True)
    return outcome.exit_code


def document(outcome: undo.Outcome) -> dict[str, object]:
    """The outcome as data; single paths are left out, their number stays."""
    steps = [{**s.model_dump(mode="json", exclude={"paths"}), "entries": len(s.paths)} for s in outcome.plan.steps]
    return {
        "schema": "sparkproof-rollback/1",
        "carried_out": outcome.carried_out,
        "exit_code": outcome.exit_code,
        "steps": steps,
        "bytes": outcome.plan.bytes,
        "removed_entries": outcome.removed_entries,
        "removed_bytes": outcome.removed_bytes,
        "restored": outcome.restored,
        "resumed": outcome.resumed,
        "left": [left.model_dump(mode="json") for left in outcome.left],
        "diff": outcome.diff.model_dump(mode="json", by_alias=True),
    }


def _steps(console: Console, steps: list[Step]) -> None:
    table = Table("would", "what", "size", box=None, pad_edge=False)
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
    table = Table("stays", "why", "what to do", box=None, pad_edge=False)
    for row in sorted(left, key=lambda row: -row.bytes)[:ROWS]:
        amount = f" ({size(row.bytes)})" if row.bytes else ""
        table.add_row(escape(row.what) + amount, escape(row.why), escape(row.fix))
    console.print(table)
    if len(left) > ROWS:
        console.print(f"... and {len(left) - ROWS} more; --json lists all", highlight=False)


def ending(outcome: undo.Outcome, own: bool) -> list[str]:
    """The sentences that matter, last."""
    lines = []
    if outcome.resumed:
        lines.append(
            f"An earlier rollback had been interrupted; {outcome.resumed} unfinished steps were finished first."
        )
    if outcome.carried_out:
        lines.append(
            f"Removed {outcome.removed_entries} files and links, {size(outcome.removed_bytes)}; put back "
            f"{len(outcome.restored)} distributions."
        )
    if not own and (ours := manifest.ours()):
        lines.append(f"{len(ours)} things that sparkproof made for itself stay; --own removes them too.")
    if outcome.exit_code == 0:
        return [*lines, "Nothing is left: everything that was read equals the snapshot."]
    if outcome.carried_out:
        return [*lines, f"Leftovers remain: {len(outcome.left)} things stay, listed above."]
    steps = outcome.plan.steps
    if not steps:
        return [*lines, f"Nothing can be removed, and {len(outcome.left)} things stay."]
    return [
        *lines,
        f"Nothing was changed. With --yes: {len(steps)} steps, {size(outcome.plan.bytes)} removed; "
        f"{len(outcome.left)} things stay.",
    ]
