"""`sparkproof doctor` and `sparkproof facts`: what this machine is, what is known to be wrong with it, and the next
thing to do.

Plain functions that print and give an exit code; both take facts of this machine or saved ones, so that a Spark's
findings can be had on a laptop.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from sparkproof.checks.finding import Finding, Outcome, Severity
from sparkproof.checks.registry import run_checks, worst_first
from sparkproof.facts.collect import collect, load, save
from sparkproof.facts.model import Facts

DOCTOR_SCHEMA = "sparkproof-doctor-1"
STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}
LABELS = {Severity.ERROR: "ERROR", Severity.WARNING: "WARNING", Severity.INFO: "HARMLESS"}


def doctor(
    facts_file: Path | None = None,
    json_out: bool = False,
    *,
    topic: str = "all",
    network: bool = True,
    console: Console | None = None,
) -> int:
    """Judge this machine, or the facts in a file. 0: no error was found; 1: one was."""
    console = console or Console()
    facts = _facts(facts_file, network, None if json_out else console)
    outcomes = run_checks(facts, topic)
    code = 1 if any(f.severity is Severity.ERROR for f in worst_first(outcomes)) else 0
    if json_out:
        console.out(json.dumps(document(facts, outcomes, code), indent=2), highlight=False)
        return code
    show_facts(facts, console)
    show_findings(outcomes, console)
    show_end(outcomes, console)
    return code


def facts(
    save_file: Path | None = None,
    json_out: bool = False,
    *,
    facts_file: Path | None = None,
    network: bool = True,
    console: Console | None = None,
) -> int:
    """Show what was read of this machine; `save_file` keeps it for `doctor --facts`."""
    console = console or Console()
    read = _facts(facts_file, network, None if json_out else console)
    if save_file is not None:
        save(read, save_file)
    if json_out:
        console.out(read.model_dump_json(indent=2), highlight=False)
        return 0
    show_facts(read, console)
    if save_file is not None:
        console.print(f"Saved to {escape(str(save_file))}. Judge it anywhere:", soft_wrap=True)
        console.out(f"  sparkproof doctor --facts {save_file}", highlight=False)
    return 0


def document(facts: Facts, outcomes: list[Outcome], code: int) -> dict[str, Any]:
    """The JSON form."""
    return {
        "schema": DOCTOR_SCHEMA,
        "machine": facts.device_sentence(),
        "origin": facts.origin,
        "is_target": facts.is_target,
        "exit_code": code,
        "findings": [f.model_dump(mode="json") for f in worst_first(outcomes)],
        "checks": [o.model_dump(mode="json", include={"check", "topic", "state", "seen"}) for o in outcomes],
        "not_read": facts.errors,
    }


def _facts(path: Path | None, network: bool, console: Console | None) -> Facts:
    if path is not None:
        return load(path)
    if console is None or not console.is_terminal:
        return collect(network=network)
    with console.status("Reading this machine") as status:
        return collect(network=network, progress=lambda text: status.update(text.capitalize()))


def show_facts(facts: Facts, console: Console) -> None:
    """One short table."""
    console.print(f"[bold]{escape(facts.device_sentence())}[/bold]")
    console.print(f"[dim]Facts: {escape(facts.origin)}[/dim]", soft_wrap=True)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in summary(facts):
        table.add_row(name, escape(value))
    console.print(Padding(table, (1, 0, 1, 2)))
    for probe, error in facts.errors.items():
        console.print(f"  not read: {escape(probe)}: {escape(error)}", soft_wrap=True)


def summary(facts: Facts) -> list[tuple[str, str]]:
    """What is worth a line, in words; what was not read says so."""
    f, m, gpu = facts, facts.memory, facts.gpu
    place = " (in a container)" if f.os.in_container else ""
    system = ", ".join(
        filter(None, [f.os.version or f.os.name, f"kernel {f.os.kernel}" if f.os.kernel else None, f.arch])
    )
    memory = f"{_gib(m.available_gib)} available of {_gib(m.total_gib)}"
    if m.cuda_free_gib is not None:
        memory += f"; CUDA calls {_gib(m.cuda_free_gib)} free"
    torch = f"{f.torch.version or 'not there'}, {'CUDA ' + f.torch.cuda if f.torch.cuda else 'no CUDA'}"
    live = next((p for p in f.triton.ptxas if p.path == f.triton.live_ptxas), None)
    triton = f.triton.version or "not there"
    if live is not None:
        triton += f", {Path(live.path).name} {live.version}, sm_121a {'known' if live.knows_sm_121a else 'unknown'}"
    rows = [("system", (system or "not read") + place)]
    if gpu is not None:
        use = {True: "torch computes on it", False: "torch cannot use it", None: "not tried"}[gpu.usable_by_torch]
        clock = f"{gpu.sm_clock_mhz} of {gpu.max_sm_clock_mhz} MHz" if gpu.sm_clock_mhz else ""
        heat = f"{gpu.temperature_c:.0f} C" if gpu.temperature_c is not None else ""
        smem = f"{gpu.shared_memory_per_block_optin} B shared a block" if gpu.shared_memory_per_block_optin else ""
        rows.append(("GPU", ", ".join(filter(None, [use, smem, clock, heat]))))
    if f.has_nvidia_hardware:
        driver = f.driver.version or f.driver.kernel_module_version or "not loaded"
        rows.append(("driver", driver + (f", serves CUDA {f.driver.cuda_version}" if f.driver.cuda_version else "")))
    engine = "no engine"
    if f.container.engine:
        engine = f"{f.container.engine} {'answers' if f.container.usable else 'does not answer'}"
        engine += ", can hand the GPU in" if f.container.nvidia_runtime else ""
    hub = {True: "reached", False: f"not reached: {f.network.error}", None: f.network.error or "not asked"}
    rows += [
        ("memory", memory),
        ("torch", torch),
        ("triton", triton),
        ("bitsandbytes", f.bitsandbytes.version or "not there"),
        ("CUDA toolkit", f.cuda.version or "none, which is fine: wheels bring what they need"),
        ("Python", ", ".join(filter(None, [f.python.version, f.python.executable])) or "not read"),
        ("containers", engine),
        ("disk", f"{_gib(f.disk.free_gib)} free under {f.disk.path or 'an unknown folder'}"),
        ("hub", hub[f.network.hub_reachable]),
    ]
    return rows


def show_findings(outcomes: list[Outcome], console: Console) -> None:
    """Worst first; harmless ones are said to be harmless. Fixes are printed unwrapped, to be copied."""
    for finding in worst_first(outcomes):
        _show(finding, console)


def _show(f: Finding, console: Console) -> None:
    rows = f", row {', '.join(map(str, f.rows))}" if f.rows else ""
    style = STYLES[f.severity]
    console.print(
        f"[{style}]{LABELS[f.severity]}[/{style}] {escape(f.title)} [dim]({f.check}{rows})[/dim]", soft_wrap=True
    )
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    table.add_row("seen", escape(f.evidence))
    table.add_row("cause", escape(f.cause))
    table.add_row("source", escape(f.source))
    console.print(Padding(table, (0, 0, 0, 2)))
    if f.fix:
        console.out(f"  fix     {f.fix}", highlight=False)
    else:
        console.print("  [dim]fix[/dim]     nothing to do")
    console.print()


def show_end(outcomes: list[Outcome], console: Console) -> None:
    """The count, what could not be judged, and the one next thing to do."""
    findings = worst_first(outcomes)
    count = {s: sum(f.severity is s for f in findings) for s in Severity}
    quiet = sum(o.state == "ok" for o in outcomes)
    other = [o for o in outcomes if o.state == "not applicable"]
    unread = [o for o in outcomes if o.state == "not read"]
    parts = [
        f"{len(outcomes)} checks: {quiet} found nothing",
        _plural(count[Severity.ERROR], "error"),
        _plural(count[Severity.WARNING], "warning"),
        f"{count[Severity.INFO]} harmless",
        f"{len(other)} not for this machine",
        f"{len(unread)} could not be judged",
    ]
    console.print(f"{', '.join(parts)}.", highlight=False)
    for o in unread:
        console.print(f"  could not be judged: {o.check}: {escape(o.seen)}", soft_wrap=True, highlight=False)
    worst = findings[0] if findings else None
    if worst is not None and worst.severity is not Severity.INFO:
        console.out(f"Next: {worst.fix or worst.title}", highlight=False)
    elif unread:
        console.out("Next: sparkproof facts  # shows why something could not be read", highlight=False)
    else:
        console.out("Next: sparkproof validate", highlight=False)


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _gib(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} GiB"
