"""`sparkproof bench`: measurements beside other libraries, which decide nothing about the machine."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from sparkproof.cli.bench_export import export
from sparkproof.cli.bench_train import train
from sparkproof.errors import UserError

bench = typer.Typer(help="Measure this project beside other libraries, in one run on this GPU.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    bench.command("train")(train)
    bench.command("export")(export)
    app.add_typer(bench, name="bench")


@bench.command("ops")
def ops(
    op: list[str] = typer.Option([], help="Only this op (may be repeated)."),
    model: list[str] = typer.Option([], help="Only this model's shapes (may be repeated): llama, qwen, gemma, phi."),
    tokens: list[int] = typer.Option([], help="Only this many tokens (may be repeated)."),
    engine: list[str] = typer.Option([], help="Only this engine (may be repeated); sparktune is always there."),
    out: Path = typer.Option(None, help="Folder for bench.json, bench.html and bench.md.", show_default=False),
    json_out: bool = typer.Option(False, "--json", help="One JSON document instead of a table."),
    quick: bool = typer.Option(False, "--quick", help="One model at 4,096 tokens, within 90 seconds."),
    budget: float = typer.Option(None, help="Seconds after which no row starts.", show_default=False),
) -> None:
    """Time every op against the same op elsewhere, forward and backward; exit 3 if the clock moved meanwhile."""
    from sparkproof.bench import engines, shapes
    from sparkproof.bench import ops as run
    from sparkproof.catalog import nearest

    for name in engine:
        if name not in engines.NAMES:
            raise UserError(f"There is no engine '{name}'.", nearest(name, list(engines.NAMES)))
    if budget is not None and budget <= 0:
        raise UserError("--budget must be above 0 seconds.", "For instance --budget 120.")
    names = [n for n in engines.NAMES if not engine or n in engine or n == run.OURS]
    rows = shapes.rows(op, model, tokens, quick)
    run.need_gpu()
    from sparkproof.measure.exclusive import only_run

    err = Console(stderr=True)
    with only_run("bench ops"):
        limit = budget if budget is not None else (90.0 if quick else float("inf"))
        with contextlib.redirect_stdout(sys.stderr):  # what libraries print is none of the document
            document = run.measure(rows, names, limit, lambda line: err.print(escape(line), highlight=False))
    if out is not None:
        write(document, out)
    if json_out:
        print(document.model_dump_json(indent=1))
    else:
        show(document, Console())
    if not document.trusted:
        raise typer.Exit(3)
    raise typer.Exit(1 if any(r.error for r in document.rows) else 0)


def show(document, console: Console, views=None) -> None:  # type: ignore[no-untyped-def]
    """The table, what was not measured, and the tally last; `views` are those of the document's kind."""
    if views is None:
        from sparkproof.bench import views

    if not console.is_terminal:
        console.width = 200
    console.print(views.table(document))
    for head, lines in (("Not measured", views.problems(document)), ("Remarks", views.remarks(document))):
        if lines:
            console.print(f"\n[bold]{head}[/bold]")
            for line in lines:
                console.print(f"  {escape(line)}", highlight=False)
    console.print()
    for line in views.footer(document):
        console.print(escape(line), highlight=False)


def write(document, folder: Path, views=None, stem: str = "bench") -> None:  # type: ignore[no-untyped-def]
    """bench.json, bench.html and bench.md in a folder, made if need be."""
    if views is None:
        from sparkproof.bench import views

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(document.model_dump_json(indent=1) + "\n", encoding="utf-8")
    (folder / f"{stem}.html").write_text(views.html(document), encoding="utf-8")
    (folder / f"{stem}.md").write_text(views.markdown(document), encoding="utf-8")
