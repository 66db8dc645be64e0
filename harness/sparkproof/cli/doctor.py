"""`sparkproof doctor` and `sparkproof facts`: what this machine is, what is known to be wrong with it, and the next
thing to do.

Plain functions that print and give an exit code; both take facts of this machine or saved ones, so that a Spark's
findings can be had on a laptop. Nothing is changed: fixes are printed, never run.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from sparkproof.checks import catalogue as failures
from sparkproof.checks.registry import require_topic, run_checks
from sparkproof.cli import doctor_view as view
from sparkproof.cli.doctor_document import commands, document, exit_code, next_step
from sparkproof.errors import UserError
from sparkproof.facts.collect import collect, load, save
from sparkproof.facts.model import Facts
from sparkproof.report.anonymous import anonymous


def doctor(
    facts_file: Path | None = None,
    json_out: bool = False,
    *,
    topic: str = "all",
    network: bool = True,
    strict: bool = False,
    fix: bool = False,
    console: Console | None = None,
) -> int:
    """Judge this machine, or the facts in a file. 0: no error was found (and, if strict, no warning); 1: one was."""
    console = console or Console()
    require_topic(topic)  # before half a minute of reading
    start = time.monotonic()
    facts = _facts(facts_file, network, None if json_out else console)
    outcomes = run_checks(facts, topic)
    if json_out:
        answer = document(facts, outcomes, strict)
        console.out(answer.model_dump_json(indent=2, by_alias=True), highlight=False)
        return answer.exit_code
    view.show_facts(facts, console)
    if topic in ("all", "memory"):
        view.show_memory(facts, console)
    view.show_findings(outcomes, console)
    if fix:
        view.show_fixes(commands(outcomes), console)
    if facts_file is None:
        console.print(f"[dim]Read and judged in {time.monotonic() - start:.1f} s.[/dim]")
    view.show_end(outcomes, next_step(outcomes), console)
    return exit_code(outcomes, strict)


def catalogue(json_out: bool = False, console: Console | None = None) -> int:
    """Print what became of every row of the list of failures."""
    console = console or Console()
    if json_out:
        console.out(json.dumps(failures.document(), indent=2, ensure_ascii=False), highlight=False)
    else:
        view.show_catalogue(console)
    return 0


def facts(
    save_file: Path | None = None,
    json_out: bool = False,
    *,
    facts_file: Path | None = None,
    network: bool = True,
    redact: bool = False,
    console: Console | None = None,
) -> int:
    """Show what was read of this machine; `save_file` keeps it for `doctor --facts`, `redact` takes out whose it is."""
    console = console or Console()
    read = _facts(facts_file, network, None if json_out else console)
    if redact:
        read = anonymous(read)
    if save_file is not None:
        if facts_file is not None and save_file.resolve() == facts_file.resolve():
            raise UserError(f"{save_file} would be written over what it was read from.", "Give another --save FILE.")
        save(read, save_file)
    if json_out:
        console.out(read.model_dump_json(indent=2), highlight=False)
        return 0
    view.show_facts(read, console)
    view.show_memory(read, console)
    if save_file is not None:
        console.print(f"Saved to {escape(str(save_file))}. Judge it anywhere:", soft_wrap=True)
        console.out(f"  sparkproof doctor --facts {save_file}", highlight=False)
    return 0


def _facts(path: Path | None, network: bool, console: Console | None) -> Facts:
    if path is not None:
        return load(path)
    if console is None or not console.is_terminal:
        return collect(network=network)
    with console.status("Reading this machine") as status:
        return collect(network=network, progress=lambda text: status.update(text.capitalize()))
