"""`sparkproof bench train`: its options, what they may be, and its exit codes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from sparkproof.errors import UserError

if TYPE_CHECKING:
    from sparkproof.bench.train.document import Document
    from sparkproof.bench.train.setting import Setting

LAYERS = 8  # enough for a step that is mostly layers, few enough for minutes


def train(
    model: list[str] = typer.Option(
        ["llama31-8b"], help="Whose shapes (may be repeated): llama31-8b, qwen3-8b, mistral-7b, llama32-1b, tiny."
    ),
    engine: list[str] = typer.Option(
        [], help="Only this engine (may be repeated): hf, liger, unsloth, sparktune; hf and sparktune are always there."
    ),
    layers: int = typer.Option(
        None, help="Decoder layers, 0 for all of the model's; 8 unless given.", show_default=False
    ),
    batch: int = typer.Option(2, help="Rows a step."),
    seq: int = typer.Option(2048, help="Tokens a row."),
    packed: int = typer.Option(0, help="Documents in one row of batch x seq tokens; 0 packs none."),
    rank: int = typer.Option(16, help="Of the LoRA adapters."),
    steps: int = typer.Option(10, help="Timed steps a round."),
    warmup: int = typer.Option(4, help="Steps before them."),
    rounds: int = typer.Option(3, help="Fresh processes an engine, in turn with the others'."),
    gc: str = typer.Option("on", help="Gradient checkpointing: on or off."),
    memory_budget: str = typer.Option(
        "0", help="GiB of activations that sparktune may keep with checkpointing on, or inf; for sparktune only."
    ),
    offload: bool = typer.Option(
        False, "--offload", help="Let sparktune's activations wait in pinned host memory, as Unsloth's layer inputs do."
    ),
    offload_embedding: bool = typer.Option(
        False,
        "--offload-embedding",
        help="Keep sparktune's embedding table in pinned host memory, its room given to activations.",
    ),
    site: list[str] = typer.Option(
        [], help="ENGINE=DIR: an import root for that engine's processes (may be repeated)."
    ),
    device: str = typer.Option("cuda", help="cuda; or cpu, to try the road with --model tiny."),
    budget: float = typer.Option(None, help="Seconds after which no process starts.", show_default=False),
    out: Path = typer.Option(
        None, help="Folder for bench-train.json, bench-train.html and bench-train.md.", show_default=False
    ),
    json_out: bool = typer.Option(False, "--json", help="One JSON document instead of a table."),
) -> None:
    """Time a QLoRA step on every engine, same checkpoint, adapters and batches; exit 3 if the clock moved meanwhile.

    Weights are random and nothing is downloaded; the checkpoint is written under TMPDIR (6 GB for all of an 8B) and removed.
    """
    from sparkproof.bench.train import views
    from sparkproof.bench.train.run import Bench
    from sparkproof.bench.train.setting import NAMES, OURS, REFERENCE
    from sparkproof.cli.bench import show, write

    for name in engine:
        one_of("engine", name, NAMES)
    at_least(
        ("--batch", batch, 1), ("--seq", seq, 16), ("--rank", rank, 1), ("--steps", steps, 1), ("--rounds", rounds, 1)
    )
    at_least(("--warmup", warmup, 1), ("--packed", packed, 0))
    if budget is not None and not budget > 0:
        raise UserError("--budget must be above 0 seconds.", "For instance --budget 600.")
    if packed * 16 > batch * seq:
        raise UserError(
            f"--packed {packed} leaves fewer than 16 tokens a document.", "Pack fewer documents, or raise --seq."
        )
    kept = memory_budget_gib(memory_budget, gc)
    if offload and (gc == "off" or device == "cpu"):
        raise UserError(
            "--offload moves what checkpointing keeps off the GPU: it needs --gc on and a GPU.", "Leave it out."
        )
    if offload_embedding and device == "cpu":
        raise UserError("--offload-embedding moves a table off the GPU: it needs one.", "Leave it out.")
    names = [n for n in NAMES if not engine or n in engine or n in (REFERENCE, OURS)]
    roots = sites(site, names)
    step = {
        "batch": batch, "seq": seq, "packed": packed, "rank": rank, "gc": gc, "steps": steps, "warmup": warmup,
        "memory_budget_gib": kept, "offload": offload, "offload_embedding": offload_embedding,
    }  # fmt: skip
    wanted = [setting(m, layers, device, step) for m in dict.fromkeys(model)]
    need(device)
    from sparkproof.measure.exclusive import only_run

    err = Console(stderr=True)
    with only_run("bench train"):
        document = Bench(
            wanted, names, roots, rounds, budget or math.inf, lambda line: err.print(escape(line), highlight=False)
        ).run()
    if out is not None:
        write(document, out, views, "bench-train")
    if json_out:
        print(document.model_dump_json(indent=1))
    else:
        show(document, Console(), views)
    raise typer.Exit(exit_code(document))


def exit_code(d: Document) -> int:
    """130 interrupted; 1 if nothing was measured; 3 if the clock moved; 1 if hf or sparktune failed or is wrong."""
    if d.interrupted:
        return 130
    if not any(e.rounds for m in d.models for e in m.engines):
        return 1
    if d.device_type == "cuda" and not d.trusted:
        return 3
    needed = [e for m in d.models for e in m.engines if e.name in ("hf", "sparktune")]
    return 1 if any(m.error for m in d.models) or any(e.status not in ("timed", "not reached") for e in needed) else 0


def one_of(what: str, name: str, known: tuple[str, ...]) -> str:
    """`name`. Errors: UserError with the nearest one there is."""
    from sparkproof.catalog import nearest

    if name not in known:
        raise UserError(f"There is no {what} '{name}'.", nearest(name, list(known)))
    return name


def at_least(*options: tuple[str, int, int]) -> None:
    """Each (name, value, least). Errors: UserError for a value below it."""
    for name, value, least in options:
        if value < least:
            raise UserError(f"{name} must be {least} or more, not {value}.", f"For instance {name} {max(least, 1)}.")


def memory_budget_gib(text: str, gc: str) -> float | Literal["inf"]:
    """GiB, or "inf". Errors: UserError for anything else, and where checkpointing is off and a budget does nothing."""
    one_of("choice for --gc", gc, ("on", "off"))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise UserError(
            f"--memory-budget must be GiB, 0 or more, or inf, not '{text}'.", "For instance --memory-budget 8."
        )
    if value and gc == "off":
        raise UserError(
            "--memory-budget does nothing with --gc off, which keeps all activations.", "Leave out one of the two."
        )
    return "inf" if math.isinf(value) else value


def sites(given: list[str], names: list[str]) -> dict[str, list[str]]:
    """Engine -> absolute import roots. Errors: UserError for an engine that does not run, or a folder that is not there."""
    found: dict[str, list[str]] = {}
    for item in given:
        name, equals, folders = item.partition("=")
        if not equals or not folders:
            raise UserError(f"--site wants ENGINE=DIR, not '{item}'.", "For instance --site unsloth=/opt/unsloth.")
        one_of("engine", name, tuple(names))
        for folder in folders.split(os.pathsep):
            path = Path(folder).absolute()
            if not path.is_dir():
                raise UserError(
                    f"--site {name}: there is no folder {path}.", "Name the folder that holds its packages."
                )
            found.setdefault(name, []).append(str(path))
    return found


def setting(model: str, layers: int | None, device: str, step: dict[str, Any]) -> Setting:
    """A model's setting; `step` has what all models share. Errors: UserError."""
    from sparkproof.bench.train.setting import SHAPES, Setting

    one_of("model", model, tuple(SHAPES))
    one_of("device", device, ("cuda", "cpu"))
    if device == "cpu" and model != "tiny":
        raise UserError(
            f"{model} would take hours on a CPU, for times that say nothing about a GPU.", "Add --model tiny."
        )
    most = SHAPES[model].layers
    if layers is not None and not 0 <= layers <= most:
        raise UserError(f"--layers must be 0 to {most}: {model} has {most}, and 0 means all.", f"--layers {most}")
    chosen = min(LAYERS, most) if layers is None else layers or most
    return Setting.model_validate({"model": model, "layers": chosen, "device": device, **step})


def need(device: str) -> None:
    """Errors: UserError, one sentence, where there is no GPU to measure."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "`sparkproof bench train` times training steps on a GPU, and torch sees none here.",
            "Run it on the machine with the GPU, or try the road with --device cpu --model tiny.",
        )
