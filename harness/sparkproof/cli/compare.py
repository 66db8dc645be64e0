"""`sparkproof compare`: two runs, what got worse, and an exit code for CI."""

from __future__ import annotations

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(compare)


def compare(
    before: str = typer.Argument(metavar="A", help="The older run: its folder, its name, or the start of it."),
    after: str = typer.Argument(metavar="B", help="The newer run, or 'latest'."),
    reports: Path = typer.Option(Path("reports"), help="Folder that holds the runs."),
    tolerance: float = typer.Option(0.05, help="Share by which a value may be worse, 0.05 for 5%.", min=0.0, max=10.0),
    json_out: bool = typer.Option(False, "--json", help="One JSON document."),
) -> None:
    """Compare two runs of the same device and scenarios; exit 1 if B is worse, 2 if they are unlike, 3 to measure again."""
    from sparkproof.report import compare as comparing
    from sparkproof.report.record import find_run, load

    found = comparing.compare(load(find_run(before, reports)), load(find_run(after, reports)), tolerance)
    print(found.model_dump_json(by_alias=True, indent=1) if json_out else comparing.text(found))
    raise typer.Exit(found.exit_code)
