"""What the doctor prints: the machine in one table, its memory's arithmetic, findings worst first, and the end."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from sparkproof.checks.catalogue import CATALOGUE, ROWS
from sparkproof.checks.finding import Finding, Outcome, Severity
from sparkproof.checks.registry import worst_first
from sparkproof.facts.account import account, lines
from sparkproof.facts.model import Facts

STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}
LABELS = {Severity.ERROR: "ERROR", Severity.WARNING: "WARNING", Severity.INFO: "HARMLESS"}


def show_facts(facts: Facts, console: Console) -> None:
    """One short table, and where memory goes."""
    console.print(f"[bold]{escape(facts.device_sentence())}[/bold]")
    console.print(f"[dim]Facts: {escape(facts.origin)}[/dim]", soft_wrap=True)
    _table(summary(facts), console)
    for probe, error in facts.errors.items():
        console.print(f"  not read: {escape(probe)}: {escape(error)}", soft_wrap=True)


def show_memory(facts: Facts, console: Console) -> None:
    """The account of the pool, in GiB."""
    found = account(facts)
    if found is not None:
        console.print("[bold]Memory[/bold] [dim](GiB)[/dim]")
        _table(lines(found), console)


def _table(rows: list[tuple[str, str]], console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, escape(value))
    console.print(Padding(table, (1, 0, 1, 2)))


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
    torch = _library(f.torch.version, f.torch.error)
    if f.torch.version:
        torch += f", {'CUDA ' + f.torch.cuda if f.torch.cuda else 'no CUDA'}"
    live = next((p for p in f.triton.ptxas if p.path == f.triton.live_ptxas), None)
    triton = _library(f.triton.version, f.triton.error)
    if live is not None:
        triton += f", {Path(live.path).name} {live.version}, sm_121a {'known' if live.knows_sm_121a else 'unknown'}"
    rows = [("system", (system or "not read") + place)]
    if gpu is not None:
        use = {True: "torch computes on it", False: "torch cannot use it", None: "not tried"}[gpu.usable_by_torch]
        clock = f"{gpu.sm_clock_mhz} of {gpu.max_sm_clock_mhz} MHz idle" if gpu.sm_clock_mhz else ""
        heat = f"{gpu.temperature_c:.0f} C" if gpu.temperature_c is not None else ""
        smem = f"{gpu.shared_memory_per_block_optin} B shared a block" if gpu.shared_memory_per_block_optin else ""
        rows.append(("GPU", ", ".join(filter(None, [use, smem, clock, heat]))))
    if f.tried.canaries is not None:
        rows.append(("under load", _load(f)))
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


def _library(version: str | None, error: str | None) -> str:
    """Its version; one that is installed and did not answer is not said to be missing."""
    if version:
        return version
    return f"not read: {error}" if error and "ModuleNotFoundError" not in error else "not there"


def _load(f: Facts) -> str:
    c = f.tried.canaries
    assert c is not None
    if c.error:
        return f"not timed: {c.error}"
    parts = [
        (c.copy_gb_s, "copy {:.0f} GB/s"),
        (c.gemv_gb_s, "GEMV {:.0f} GB/s"),
        (c.gemm_tflops, "GEMM {:.0f} TFLOP/s"),
        (c.load_clock_mhz, "{} MHz"),
        (c.load_power_w, "{:.0f} W"),
    ]
    return ", ".join(words.format(value) for value, words in parts if value is not None)


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


def show_fixes(commands: list[tuple[str, str]], console: Console) -> None:
    """The commands of all findings in the order to give them; none of them was run."""
    if not commands:
        console.print("No command to give: nothing was found that one would cure.\n")
        return
    console.print("[bold]Commands, in this order[/bold] (none of them was run):")
    for check, command in commands:
        console.print(f"  [dim]# {check}[/dim]", soft_wrap=True)
        console.out(f"  {command}", highlight=False)
    console.print()


def show_end(outcomes: list[Outcome], next_step: str, console: Console) -> None:
    """The count, what could not be judged, and the one next thing to do."""
    findings = worst_first(outcomes)
    count = {s: sum(f.severity is s for f in findings) for s in Severity}
    unread = [o for o in outcomes if o.state == "not read"]
    parts = [
        f"{len(outcomes)} checks: {sum(o.state == 'ok' for o in outcomes)} found nothing",
        _plural(count[Severity.ERROR], "error"),
        _plural(count[Severity.WARNING], "warning"),
        f"{count[Severity.INFO]} harmless",
        f"{sum(o.state == 'not applicable' for o in outcomes)} not for this machine",
        f"{len(unread)} could not be judged",
    ]
    console.print(f"{', '.join(parts)}.", highlight=False)
    for o in unread:
        console.print(f"  could not be judged: {o.check}: {escape(o.seen)}", soft_wrap=True, highlight=False)
    console.out(f"Next: {next_step}", highlight=False)


def show_catalogue(console: Console) -> None:
    """Every row of the list of failures, and what became of it."""
    if not console.is_terminal:  # a pipe has no width
        console.width = 200
    table = Table("row", "failure", "found by", box=None, pad_edge=False)
    for r in ROWS.values():
        by = [e.id for e in r.checks] or [f"test: {t}" for t in r.tests] or [f"not detectable: {r.note}"]
        table.add_row(str(r.row), escape(r.failure), escape(", ".join(by)))
    console.print(table)
    kinds = [r.kind for r in ROWS.values()]
    console.print(
        f"\n{len(ROWS)} rows: {kinds.count('check')} have a check, {kinds.count('test')} a test alone, "
        f"{kinds.count('not detectable')} neither. {len(CATALOGUE)} checks in all.",
        highlight=False,
        soft_wrap=True,
    )


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _gib(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1f} GiB"
