"""`sparkproof doctor`, `facts`, `snapshot`, `uninstall` and `verify-rollback`: about the machine rather than about a run."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from sparkproof.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(doctor)
    app.command()(facts)
    app.command()(snapshot)
    app.command()(uninstall)
    app.command("verify-rollback")(verify_rollback)


def doctor(
    facts_file: Path = typer.Option(
        None, "--facts", help="Judge these saved facts instead of this machine.", show_default=False
    ),
    topic: str = typer.Option("all", help="Only checks of this topic."),
    fix: bool = typer.Option(False, "--fix", help="Also print all fixes in the order to run them; none is run."),
    strict: bool = typer.Option(False, help="Warnings, and checks that could not be judged, fail too."),
    network: bool = typer.Option(True, "--network/--no-network", help="Ask whether the hub can be reached."),
    catalogue: bool = typer.Option(False, "--catalogue", help="Print every known failure and how it is found."),
    json_out: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Find known failures, worst first, each with its evidence and its fix; exit 1 if one is an error."""
    from sparkproof.cli import doctor as module

    if catalogue:
        if facts_file is not None or fix or strict or topic != "all":
            raise UserError("--catalogue examines nothing.", "Leave out --facts, --topic, --fix and --strict.")
        raise typer.Exit(module.catalogue(json_out))
    if json_out and fix:
        raise UserError("--fix is for people.", "--json has the commands under 'commands' already.")
    raise typer.Exit(module.doctor(facts_file, json_out, topic=topic, network=network, strict=strict, fix=fix))


def facts(
    save: Path = typer.Option(None, help="Keep what was read in this file.", show_default=False),
    facts_file: Path = typer.Option(None, "--facts", help="Show these saved facts instead.", show_default=False),
    redact: bool = typer.Option(
        False, "--redact", help="For a bug report: without names, paths, serials, addresses and tokens."
    ),
    network: bool = typer.Option(True, "--network/--no-network", help="Ask whether the hub can be reached."),
    json_out: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Show what was read of this machine."""
    from sparkproof.cli import doctor as module

    raise typer.Exit(module.facts(save, json_out, facts_file=facts_file, network=network, redact=redact))


def snapshot(
    out: Path = typer.Option(None, help="Where to; by default one place per user.", show_default=False),
    environment: list[Path] = typer.Option([], help="Virtual environment to record (may be repeated)."),
    force: bool = typer.Option(False, help="Replace an earlier snapshot, which is the way back."),
    json_out: bool = typer.Option(False, "--json", help="Print the document."),
) -> None:
    """Record what an installation can change, so that it can be undone and that be proven. Changes nothing."""
    from sparkproof.cli import way_back as module

    raise typer.Exit(module.snapshot(out, environment or None, json_out, force))


def uninstall(
    snapshot_file: Path = typer.Argument(None, help="The snapshot to go back to.", show_default=False),
    yes: bool = typer.Option(False, "--yes", help="Carry it out without asking."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only show."),
    include: list[str] = typer.Option(
        [], help="Also what may be yours (may be repeated): packages and caches, of what is new there, or reports."
    ),
    environment: list[Path] = typer.Option([], help="Only this environment (may be repeated)."),
    json_out: bool = typer.Option(False, "--json", help="As JSON; asks nothing."),
) -> None:
    """Take off what sparkproof made, and, if asked for, what came since the snapshot; shown first."""
    from sparkproof.cli import way_back as module

    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    code = module.uninstall(
        snapshot_file, yes=yes, dry_run=dry_run, include=include, environment=environment or None, json=json_out,
        ask=(lambda question: typer.confirm(question, default=False)) if terminal else None,
    )  # fmt: skip
    raise typer.Exit(code)


def verify_rollback(
    snapshot_file: Path = typer.Argument(None, help="The snapshot to compare with.", show_default=False),
    forget: bool = typer.Option(False, "--forget", help="If nothing differs, remove the snapshot too."),
    json_out: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Prove that this machine is as the snapshot recorded it; exit 1 if anything differs or could not be read."""
    from sparkproof.cli import verify_rollback as module

    raise typer.Exit(module.verify_rollback(snapshot_file, json_out, forget))
