"""`sparkproof list`, `describe` and `schemas`: what there is, without running it."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from sparkproof import catalog
from sparkproof.errors import UserError
from sparkproof.profiles import profile_specs
from sparkproof.scenario import SCENARIO_ADAPTER, Case, Profile


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command("list")(list_cases)
    app.command()(describe)
    app.command()(schemas)


def list_cases(
    names: list[str] = typer.Argument(None, help="Names, parts of names or patterns.", show_default=False),
    profile: Profile = typer.Option(Profile.SOAK, help="Cases that run in this profile (default: all)."),
    kind: list[str] = typer.Option([], help="Only this kind (may be repeated)."),
    tag: list[str] = typer.Option([], help="Only this tag (may be repeated)."),
    scenarios: Path = typer.Option(None, help="Folder with scenarios.", show_default=False),
    json_out: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """List cases by name; a wrong scenario file is named with line, key and the nearest valid name."""
    found = catalog.load(catalog.scenarios_root(scenarios))
    cases = found.select(profile=profile, patterns=names or [], kinds=kind, tags=tag)
    if json_out:
        rows = [{"name": c.name, "kind": c.kind, **_brief(c)} for c in cases]
        print(json.dumps({"cases": rows, "problems": [vars(p) for p in found.problems]}, indent=1))
    else:
        console = Console()
        if not console.is_terminal:  # a pipe has no width: names must stay whole for grep
            console.width = 200
        first = Column("case", no_wrap=True, overflow="ignore")
        table = Table(first, "profile", "needs", "what passing proves", box=None, pad_edge=False)
        for c in cases:
            needs = ", ".join(_needs(c)) or "-"
            table.add_row(escape(c.name), c.scenario.profile.value, escape(needs), escape(c.scenario.summary))
        console.print(table)
        by_profile = {s.name: s for s in profile_specs(found.root)}
        console.print(f"\n{len(cases)} cases. Profiles, each inside the next:")
        for name, spec in by_profile.items():
            console.print(f"  {name}: {escape(spec.summary)}")
        for p in found.problems:
            console.print(f"[red]wrong:[/red] {escape(str(p))}")
    raise typer.Exit(2 if found.problems else 0)


def _brief(case: Case) -> dict[str, object]:
    s = case.scenario
    return {
        "profile": s.profile.value,
        "tags": s.tags,
        "file": case.file,
        "summary": s.summary,
        "requires": s.requires.model_dump(exclude_defaults=True),
    }


def _needs(case: Case) -> list[str]:
    wanted = case.scenario.requires.model_dump(exclude_defaults=True)
    return [k if v is True else f"{k}={v}" for k, v in wanted.items()]


def describe(
    name: str = typer.Argument(help="A case or a scenario."),
    scenarios: Path = typer.Option(None, help="Folder with scenarios.", show_default=False),
) -> None:
    """Show one scenario: what it proves, each field with its value and meaning, and how to run it."""
    found = catalog.load(catalog.scenarios_root(scenarios))
    cases = [c for c in found.cases.values() if name in (c.name, c.name.split("[")[0])]
    if not cases:
        wrong = [p for p in found.problems if name.split("[")[0] in p.file]
        if wrong:
            raise UserError(str(wrong[0]), "Correct the file.")
        known = {c.name for c in found.cases.values()} | {c.name.split("[")[0] for c in found.cases.values()}
        raise UserError(f"No scenario is named '{name}'.", catalog.nearest(name, sorted(known)))
    console = Console()
    first = cases[0].scenario
    console.print(f"[bold]{escape(name)}[/bold]  ({first.kind}, profile {first.profile.value}, {cases[0].file})")
    console.print(escape(first.summary) + "\n")
    table = Table("field", "value", "meaning", box=None, pad_edge=False)
    values = first.model_dump(mode="json")
    varied = {k for k in first.matrix} if len(cases) > 1 else set()
    for key, field in type(first).model_fields.items():
        if key in ("kind", "summary", "matrix"):
            continue
        shown = " | ".join(str(v) for v in first.matrix[key]) if key in varied else json.dumps(values[key])
        table.add_row(key, escape(shown), escape(field.description or (type(first).__doc__ or "").split("\n")[0]))
    console.print(table)
    console.print("\nCases:")
    for c in cases:
        console.print(f"  sparkproof validate '{escape(c.name)}'", highlight=False)


def schemas(
    check: bool = typer.Option(False, help="Only say whether the committed files are fresh (exit 1 if not)."),
    root: Path = typer.Option(Path(), help="Checkout whose schema files are written."),
) -> None:
    """Write the JSON Schemas for editors and readers of reports, and the table of known failures."""
    from sparkproof.generated import documents

    stale = []
    for relative, text in documents().items():
        path = root / relative
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(relative)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    for relative in stale:
        print(f"{'stale' if check else 'written'}: {relative}")
    raise typer.Exit(1 if check and stale else 0)


def scenario_schema() -> str:
    """The JSON Schema of a scenario file."""
    schema = SCENARIO_ADAPTER.json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "sparkproof scenario"
    return json.dumps(schema, indent=1) + "\n"
