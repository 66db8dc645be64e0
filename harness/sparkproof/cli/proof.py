"""`sparkproof compile` and `sparkproof selftest`: proofs about the project's own kernels and tests that need no GPU."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparkproof.errors import UserError

selftest = typer.Typer(help="Plant known faults and say whether the tests catch them.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("compile")(compile_kernels)
    app.add_typer(selftest, name="selftest")


def _known_ops(ops: list[str]) -> list[str] | None:
    from sparktune.ops import op_names

    from sparkproof.catalog import nearest

    known = op_names()
    for op in ops:
        if op not in known:
            raise UserError(f"There is no op '{op}'.", nearest(op, known))
    return ops or None


def compile_kernels(
    arch: list[str] = typer.Option(["sm_121"], help="Target architecture (may be repeated)."),
    op: list[str] = typer.Option([], help="Only this op (may be repeated)."),
    json_out: bool = typer.Option(False, "--json", help="One JSON document instead of a table."),
) -> None:
    """Compile every kernel configuration ahead of time and hold it to the target's limits; exit 1 if one does not fit."""
    from sparkproof.judge import aot

    ops = _known_ops(op)
    for target in arch:
        if target not in aot.TARGETS:
            raise UserError(f"Unknown architecture '{target}'.", f"Known: {', '.join(aot.TARGETS)}.")
    document = aot.compile_all(arch, ops)
    if json_out:
        print(json.dumps(document, indent=1))
    else:
        _compile_table(document)
    raise typer.Exit(0 if document["passed"] else 1)


def _compile_table(document: dict[str, Any]) -> None:
    console = Console()
    table = Table("op", "arch", "kernel", "configuration", "registers", "spills", "shared bytes", "limit", "", box=None)
    for row in document["configurations"]:
        ok = "[green]fits[/green]" if row["passed"] else f"[red]{escape(row['reason'])}[/red]"
        table.add_row(
            row["op"], row["arch"], row["kernel"], escape(row["configuration"]), str(row["registers"]), str(row["spills"]),
            str(row["shared_bytes"]), str(row["shared_limit"]), ok,
        )  # fmt: skip
    console.print(table)
    bad = sum(not r["passed"] for r in document["configurations"])
    console.print(f"{len(document['configurations'])} configurations, {bad} do not fit.")


@selftest.command("kernels")
def selftest_kernels(
    op: list[str] = typer.Option([], help="Only this op (may be repeated)."),
    json_out: bool = typer.Option(False, "--json", help="One JSON document instead of a table."),
) -> None:
    """Run each op's planted mutants through its own test; exit 1 if one survives."""
    from sparkproof.judge import selftest as kernels

    document = kernels.kernels(_known_ops(op))
    if json_out:
        print(json.dumps(document, indent=1))
    else:
        console = Console()
        peers = document["peers"]
        within = [f"within {p['name']}'s bounds" for p in peers.values()]
        table = Table("op", "killed", "planted", *within, "survivors", "seconds", box=None)
        for row in document["ops"]:
            survivors = ", ".join(row["survivors"]) or "-"
            counts = [row["let_pass"][p]["count"] for p in peers]
            passed = ["no test" if n is None else str(n) for n in counts]
            line = (row["op"], str(row["killed"]), str(row["total"]), *passed, escape(survivors))
            table.add_row(*line, f"{row['seconds']:.1f}")
        console.print(table)
    raise typer.Exit(0 if document["passed"] else 1)
