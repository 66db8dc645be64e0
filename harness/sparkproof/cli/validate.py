"""`sparkproof validate` and `sparkproof report`."""

from __future__ import annotations

from pathlib import Path

import typer

from sparkproof.scenario import Profile


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(validate)
    app.command()(report)


def validate(
    names: list[str] = typer.Argument(
        None,
        help="Cases to run: names, parts of names, or patterns with * and ?. None: the whole profile.",
        show_default=False,
    ),
    profile: Profile = typer.Option(
        None, help="How much to run; smoke without a GPU and quick with one, unless given.", show_default=False
    ),
    kind: list[str] = typer.Option([], help="Only this kind of scenario (may be repeated)."),
    tag: list[str] = typer.Option([], help="Only scenarios with this tag (may be repeated)."),
    engine: str = typer.Option("", help="Only training with this engine."),
    model: str = typer.Option("", help="Train this model instead: a folder, or a Hugging Face hub id."),
    revision: str = typer.Option("", help="Commit of the hub model."),
    model_dir: Path = typer.Option(
        None,
        help="Folder of local models that stand in for the hub's: DIR/owner/name, DIR/name, or DIR itself.",
        show_default=False,
    ),
    steps: int = typer.Option(0, help="Optimiser steps of training cases, instead of the scenarios' own.", min=0),
    resume: str = typer.Option("", help="Finish this run: its folder, its name, or 'latest'."),
    reports: Path = typer.Option(Path("reports"), help="Folder for the run's reports."),
    scenarios: Path = typer.Option(
        None, help="Folder with scenarios, instead of the project's own.", show_default=False
    ),
    workers: int = typer.Option(
        None,
        "-n",
        "--workers",
        help="Run cases in this many processes (default: 4 with a GPU and 8 cores, else 2); a timed one runs alone.",
        min=0,
        show_default=False,
    ),
    memory_floor: float = typer.Option(
        0, help="End a case when available memory falls under this many GiB (default: an eighth, at most 16).", min=0
    ),
    strict: bool = typer.Option(False, help="A skipped case fails the run, and so does a warning of the doctor."),
    dry_run: bool = typer.Option(False, help="Show what would run and what would be skipped, and stop."),
    facts: Path = typer.Option(None, help="With --dry-run: facts of another machine.", show_default=False),
    wait: bool = typer.Option(False, help="Wait for a run in progress instead of stopping."),
    mode: str = typer.Option(
        "auto",
        help="container, host, or auto: a container on a DGX Spark that has an engine and the image, else the host.",
    ),
    container_engine: str = typer.Option("auto", help="auto, docker or podman."),
) -> None:
    """Judge this machine: run scenarios, record every case, and say one verdict."""
    from sparkproof import run
    from sparkproof.cli.container import in_place

    request = run.Request(
        names=list(names or []),
        profile=profile,
        kinds=kind,
        tags=tag,
        engine=engine,
        model=model,
        revision=revision,
        model_dir=model_dir,
        steps=steps,
        resume=resume,
        reports=reports,
        scenarios=scenarios,
        workers=workers,
        memory_floor_gib=memory_floor or None,
        strict=strict,
        facts=facts,
        wait=wait,
    )
    raise typer.Exit(in_place(mode, container_engine, request, dry_run))


def report(
    which: str = typer.Argument("latest", metavar="RUN", help="Folder or name of a run."),
    reports: Path = typer.Option(Path("reports"), help="Folder that holds the runs."),
    json_out: bool = typer.Option(False, "--json", help="Print report.json."),
) -> None:
    """Rebuild a run's report.json, junit.xml, summary.md and report.html from its record."""
    from sparkproof import run

    raise typer.Exit(run.report(which, reports, json_out))
