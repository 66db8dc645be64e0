"""`sparkproof fit`: the largest batch and context that this machine's memory holds, as a table."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from sparkproof.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(fit)


def fit(
    of: list[str] = typer.Argument(
        None,
        metavar="[MODEL]...",
        help="Train cases (their models), or shapes with random weights: llama31-8b, qwen3-8b, mistral-7b, llama32-1b, tiny. "
        "None: the first four.",
        show_default=False,
    ),
    engine: str = typer.Option("sparktune", help="Which engine steps: hf, liger, unsloth, sparktune."),
    context: list[int] = typer.Option([512, 2048, 8192], help="Tokens a row (may be repeated)."),
    limit_gib: float = typer.Option(
        0.0, help="Memory that a step may take; 0: what is available above the floor.", min=0
    ),
    rank: int = typer.Option(16, help="Of the LoRA adapters.", min=1),
    layers: int = typer.Option(0, help="Decoder layers of a shape, 0 for all.", min=0),
    checkpointing: bool = typer.Option(True, help="Gradient checkpointing."),
    timeout: float = typer.Option(1800.0, help="Seconds for one model.", min=1),
    json_out: bool = typer.Option(False, "--json", help="One JSON document instead of a table."),
) -> None:
    """Find the largest batch that fits at each context, by prediction and then upward with measured peaks; exit 1 if one failed.

    Nothing is tried that is not predicted to fit, and the watchdog ends the search, not the host, at the floor.
    """
    from sparkproof import catalog
    from sparkproof.facts.collect import collect
    from sparkproof.measure.exclusive import only_run
    from sparkproof.measure.memory import default_floor_gib
    from sparkproof.report.closing import fit_table
    from sparkproof.report.engines import fit_rows
    from sparkproof.results import CaseResult, Verdict
    from sparkproof.runners import fit as runner
    from sparkproof.runners.base import Context
    from sparkproof.scenario import Case, EngineName, FitScenario, Shape
    from sparkproof.session import default_cache_dir

    engines, shapes = list(EngineName.__args__), [x for x in Shape.__args__ if x]  # type: ignore[attr-defined]
    if engine not in engines:
        raise UserError(f"Unknown engine '{engine}'.", catalog.nearest(engine, engines))
    if min(context) < 16:
        raise UserError(f"--context must be 16 or more, not {min(context)}.", "For instance --context 2048.")
    found = catalog.load(catalog.scenarios_root(None)).cases
    trains = [n for n, c in found.items() if c.kind == "train"]
    cases = []
    for name in of or shapes[:4]:
        exact = next((n for n in trains if name in (n, n.partition("[")[0])), "")
        if name not in shapes and not exact:
            raise UserError(f"'{name}' is no shape and no train case.", catalog.nearest(name, [*shapes, *trains]))
        body = {
            "kind": "fit", "summary": "asked for on the command line", "engine": engine, "contexts": context,
            "limit_gib": limit_gib, "rank": rank, "checkpointing": checkpointing, "timeout_s": timeout,
            **({"source": exact} if exact else {"shape": name, "layers": layers}),
        }  # fmt: skip
        if exact and layers:
            raise UserError(
                "--layers goes with a shape: a train case's model has the layers that it has.", "Leave it out."
            )
        cases.append(Case(name=f"fit/{name}", file="", scenario=FitScenario.model_validate(body)))
    err, results = Console(stderr=True), []
    with only_run("fit"), tempfile.TemporaryDirectory(prefix="sparkproof-fit-") as work:
        surroundings = Context(
            Path(work), collect(trials=False), default_cache_dir(), default_floor_gib(),
            progress=lambda text: err.print(escape(text), highlight=False), cases=found,
        )  # fmt: skip
        for case in cases:
            try:
                results.append(runner.run(case, surroundings))
            except UserError as e:
                if len(cases) == 1:
                    raise
                results.append(CaseResult(name=case.name, kind="fit", verdict=Verdict.SKIPPED, reason=e.message))
    if json_out:
        print(json.dumps([r.model_dump(mode="json") for r in results], indent=1))
    else:
        console = Console()
        console.print(fit_table(fit_rows(results), console.width, escape), markup=False)
    for r in results:
        if r.verdict is not Verdict.PASSED:
            err.print(f"{r.verdict.value}: {escape(r.name)}: {escape(r.reason)}", highlight=False)
        for notice in r.notices:
            err.print(escape(notice), highlight=False)
    raise typer.Exit(0 if all(r.verdict is Verdict.PASSED for r in results) else 1)
