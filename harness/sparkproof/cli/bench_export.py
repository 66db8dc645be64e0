"""`sparkproof bench export`: its options, what they may be, and its exit codes."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

from sparkproof.errors import UserError

if TYPE_CHECKING:
    from sparkproof.bench.export.document import Device, Document

STEM = "bench-export"


def export(
    model: str = typer.Option(
        "embedded:smollm2-135m", help="embedded:smollm2-135m, tiny:<family>, tiny:<family>@256, a folder, or a hub id."
    ),
    revision: str = typer.Option("", help="Commit of a hub id."),
    adapter: Path = typer.Option(
        None, help="Folder of the LoRA adapter to export; one with random values unless given.", show_default=False
    ),
    formats: list[str] = typer.Option(
        [], help="Only these, with commas between (may be repeated): adapter, merged_16bit, gguf, gguf_q4_k_m ..."
    ),
    device: str = typer.Option("auto", help="Where consumers must run: auto (a GPU if there is one), cuda or cpu."),
    prompt: int = typer.Option(None, help="Tokens of a prompt; 512, or half of a smaller window.", show_default=False),
    tokens: int = typer.Option(
        None, help="Tokens after it; 128, or a quarter of a smaller window.", show_default=False
    ),
    repeats: int = typer.Option(3, help="Timed prompts a process."),
    rounds: int = typer.Option(3, help="Times that each format is written and read, in turn with the others."),
    threads: int = typer.Option(None, help="Of the CPU; as many as cores unless given.", show_default=False),
    budget: float = typer.Option(None, help="Seconds after which no process starts.", show_default=False),
    out: Path = typer.Option(
        None, help="Folder for bench-export.json (kept up to date), .html and .md.", show_default=False
    ),
    json_out: bool = typer.Option(False, "--json", help="One JSON document instead of a table."),
) -> None:
    """Write a model in every export format, load each with its consumer, and say what both cost and which backend ran it.

    A consumer that fell back to the CPU, or can't prove where it ran, has no speed: its row fails and names the known failure.
    Exports are written under TMPDIR, one at a time, and removed.
    """
    from sparkproof.bench.export import formats as known
    from sparkproof.bench.export import views
    from sparkproof.bench.export.run import LEAST, Bench
    from sparkproof.cli.bench import show, write
    from sparkproof.cli.bench_train import at_least, one_of
    from sparkproof.engines.pretrained import DiskErrors
    from sparkproof.session import default_cache_dir

    chosen = known.chosen(formats)
    one_of("device", device, ("auto", "cuda", "cpu"))
    at_least(("--repeats", repeats, 1), ("--rounds", rounds, 1))
    for name, value, least in (("--prompt", prompt, LEAST), ("--tokens", tokens, 2), ("--threads", threads, 1)):
        if value is not None:
            at_least((name, value, least))
    if budget is not None and not budget > 0:
        raise UserError("--budget must be above 0 seconds.", "For instance --budget 600.")
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"{adapter} holds no adapter: adapter_config.json is not there.", "Give a folder that PEFT wrote."
        )
    where, name, present = place(device)
    from sparkproof.measure.exclusive import only_run
    from sparkproof.run import terminate

    signal.signal(signal.SIGTERM, terminate)  # as Ctrl-C: with what was measured, and nothing left in TMPDIR
    err = Console(stderr=True)
    with only_run("bench export"):
        document = Bench(
            model=model, formats=chosen, device=where, device_name=name, gpu_present=present, cache_dir=default_cache_dir(),
            threads=threads or cores(), revision=revision, adapter=adapter.absolute() if adapter else None,
            prompt_tokens=prompt, new_tokens=tokens, repeats=repeats, rounds=rounds, budget=budget or math.inf,
            progress=lambda line: err.print(escape(line), highlight=False),
            save=lambda d: keep(d, out) if out is not None else None,
        ).run()  # fmt: skip
    if json_out:
        print(document.model_dump_json(indent=1))
    else:
        show(document, Console(), views)
    if out is not None:
        with DiskErrors(f"the report was written to {out}"):
            write(document, out, views, STEM)
    raise typer.Exit(exit_code(document, asked=bool(formats)))


def exit_code(d: Document, asked: bool) -> int:
    """130 interrupted; 1 if nothing was measured; 3 if the clock moved; 1 if a format failed or ran on the wrong backend.

    `asked`: formats were named one by one, so that one which can't be measured here counts as failed too.
    """
    if d.interrupted:
        return 130
    if not any(r.writes for r in d.rows):
        return 1
    if not d.trusted and any(r.reads for r in d.rows):
        return 3
    bad = {"failed", "wrong backend", *(("missing", "written") if asked else ())}
    return 1 if any(r.status in bad for r in d.rows) else 0


def keep(document: Document, folder: Path) -> None:
    """What is measured so far, whole or as it was before. Errors: OSError of a full disk."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{STEM}.json.part"
    part.write_text(document.model_dump_json(indent=1) + "\n", encoding="utf-8")
    part.replace(folder / f"{STEM}.json")


def place(device: str) -> tuple[Device, str, bool]:
    """(where consumers must run, the processor's name on a CPU, whether this machine has a GPU). Errors: UserError."""
    from sparkproof.facts.host import Host
    from sparkproof.facts.nvidia import read_driver
    from sparkproof.facts.system import read_cpu

    host = Host()
    driver = read_driver(host)
    present = bool(driver.device_files or driver.pci_devices or driver.kernel_module_version or driver.wsl)
    if device == "cuda" and not present:
        raise UserError("There is no NVIDIA GPU in this machine.", "Leave out --device, or write --device cpu.")
    if device == "cpu" or not present:
        return "cpu", read_cpu(host).model or "CPU", present
    return "cuda", "", present


def cores() -> int:
    """Physical cores that this process may use, as llama.cpp and torch choose."""
    import psutil

    allowed = len(os.sched_getaffinity(0))
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
