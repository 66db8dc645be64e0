"""`sparkproof compile` and `sparkproof selftest`: proofs about the project's own kernels and tests that need no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    with _working("compiling") as progress:
        document = aot.compile_all(arch, ops, progress=progress)
    if json_out:
        print(json.dumps(document, indent=1))
    else:
        _compile_table(document)
    raise typer.Exit(0 if document["passed"] else 1)


def _compile_table(document: dict[str, Any]) -> None:
    """An op a row, its worst configuration in each column; then each configuration that does not fit, in full."""
    console = Console()
    rows = document["configurations"]
    archs = list(dict.fromkeys(r["arch"] for r in rows))
    table = Table("op", "arch", "launches", "registers", "spills", "shared bytes", "limit", "", box=None)
    for arch in archs:
        for op in dict.fromkeys(r["op"] for r in rows):
            mine = [r for r in rows if r["op"] == op and r["arch"] == arch]
            bad = sum(not r["passed"] for r in mine)
            worst = {k: max((r[k] or 0 for r in mine), default=0) for k in ("registers", "spills", "shared_bytes")}
            limit = max((r["shared_limit"] for r in mine), default=0)
            table.add_row(
                op, arch, str(len(mine)), str(worst["registers"]), str(worst["spills"]), str(worst["shared_bytes"]), str(limit),
                f"[red]{bad} do not[/red]" if bad else "[green]fit[/green]",
            )  # fmt: skip
    console.print(table)
    failed = [r for r in rows if not r["passed"]]
    for r in failed:
        what = " ".join(x for x in (r["op"], r["arch"], r["kernel"], r["dtype"], r["variant"]) if x)
        console.print(f"[red]does not fit[/red] {escape(what)}, {escape(r['configuration'])}: {escape(r['reason'])}")
    console.print(
        f"{len(rows)} configurations for {', '.join(archs)} with Triton {document['triton']}, {len(failed)} do not fit; "
        f"{document['seconds']:.0f} s."
    )


@contextmanager
def _working(what: str) -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr that says what is at work; nothing anywhere else."""
    console = Console(stderr=True)
    with console.status(what) as status:
        yield lambda text: status.update(escape(text))


@selftest.command("kernels")
def selftest_kernels(
    op: list[str] = typer.Option([], help="Only this op (may be repeated)."),
    json_out: bool = typer.Option(False, "--json", help="One JSON document instead of a table."),
) -> None:
    """Run each op's planted mutants through its own test; exit 1 if one survives."""
    from sparkproof.judge import selftest as kernels

    ops = _known_ops(op)
    with _working("trying mutants") as progress:
        document = kernels.kernels(ops, progress)
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
        for row in document["ops"]:
            if row["error"]:
                console.print(f"[red]not tried:[/red] {escape(row['error'])}", soft_wrap=True)
            for m in row["mutants"]:
                if not m["killed"]:
                    said = f"{row['op']} {m['id']}: {m['description']}; {m['by']}"
                    console.print(f"[red]survived:[/red] {escape(said)}", soft_wrap=True)
        total, killed = document["total"], document["killed"]
        console.print(f"{killed} of {total} wrong kernels killed; {document['seconds']:.0f} s.")
    raise typer.Exit(0 if document["passed"] else 1)


@selftest.command("train")
def selftest_train(
    engine: str = typer.Option("hf", help="Which engine the faults are planted into: hf or sparktune."),
    json_out: bool = typer.Option(False, "--json", help="One JSON document instead of a table."),
) -> None:
    """Plant faults into a tiny training run on the CPU; exit 1 if the learning gate misses one."""
    from sparkproof.judge import selftest_train as train
    from sparkproof.session import default_cache_dir

    with _working("planting faults") as progress:
        document = train.in_process(engine, default_cache_dir(), progress)
    if json_out:
        print(json.dumps(document, indent=1))
    else:
        console = Console()
        _faults_table(console, document["faults"])
        if document["unplanted"] != "passed":
            console.print(
                f"[red]the run without a fault {document['unplanted']}:[/red] {escape(document['unplanted_reason'])}"
            )
        console.print(
            f"{document['caught']} of {document['total']} faults caught by the assertion that names them, engine {engine}; "
            f"{document['seconds']:.0f} s."
        )
    raise typer.Exit(0 if document["passed"] else 1)


@selftest.command("memory")
def selftest_memory(
    json_out: bool = typer.Option(False, "--json", help="One JSON document instead of a sentence."),
) -> None:
    """Fill memory inside a control group against the watchdog; exit 1 if the case does not die, or the run with it."""
    from sparkproof.judge import selftest_memory as pressure

    with _working("filling memory inside a control group"):
        document = pressure.run()
    print(json.dumps(document, indent=1) if json_out else document["sentence"])
    raise typer.Exit(0 if document["passed"] else 1)


@selftest.command("export")
def selftest_export(
    json_out: bool = typer.Option(False, "--json", help="One JSON document instead of a table."),
) -> None:
    """Plant faults into a tiny model's export on the CPU; exit 1 if the export judge misses one."""
    from sparkproof.judge import selftest_export as export
    from sparkproof.session import default_cache_dir

    with _working("planting faults") as progress:
        document = export.in_process(default_cache_dir(), progress)
    if json_out:
        print(json.dumps(document, indent=1))
    else:
        console = Console()
        _faults_table(console, document["faults"])
        for u in document["unplanted"]:
            if u["verdict"] != "passed":
                console.print(f"[red]{escape(u['format'])} without a fault {u['verdict']}:[/red] {escape(u['reason'])}")
        console.print(
            f"{document['caught']} of {document['total']} faults caught by the assertion that names them; "
            f"{document['seconds']:.0f} s."
        )
    raise typer.Exit(0 if document["passed"] else 1)


def _faults_table(console: Console, faults: list[dict[str, Any]]) -> None:
    table = Table("fault", "caught", "by", "what it said", box=None)
    for t in faults:
        caught = "[green]yes[/green]" if t["caught"] else "[red]no[/red]"
        table.add_row(escape(t["description"]), caught, escape(t["by"] or t["expected"]), escape(t["message"]))
    console.print(table)
