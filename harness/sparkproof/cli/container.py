"""`sparkproof image`, `shell` and `serve`: the project's image and what runs in it."""

from __future__ import annotations

import os
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from sparkproof.facts.place import VARIABLE

ENGINE = typer.Option("auto", "--container-engine", help="auto, docker or podman.")


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(image)
    app.command()(shell)
    app.command()(serve)


def image(
    target: str = typer.Option("runtime", help="runtime: fine-tuning and its judge; serve: vLLM."),
    build_arg: list[str] = typer.Option([], help="NAME=VALUE for the Dockerfile (may be repeated)."),
    no_cache: bool = typer.Option(False, help="Build every step again."),
    container_engine: str = ENGINE,
) -> None:
    """Build the image for this machine from the lock; the engine's own progress is shown."""
    from sparkproof.containers import image as module
    from sparkproof.containers.engine import connect
    from sparkproof.errors import UserError
    from sparkproof.rollback.parts import size

    chosen = next((t for t in module.TAGS if t == target), None)
    if chosen is None:
        raise UserError(f"The Dockerfile has no target '{target}'.", f"Known: {', '.join(module.TAGS)}.")
    with connect(container_engine) as engine:
        found, seconds = module.build(engine, chosen, build_arg, no_cache)
    say(
        f"{found.tag}: {found.digest}, {found.architecture}, {size(found.bytes)}, lock {found.lock[:12] or 'unknown'}, revision "
        f"{found.revision[:12] or 'unknown'}, built in {seconds / 60:.1f} min with {engine.title}."
    )


def shell(
    command: list[str] = typer.Argument(None, help="Instead of bash.", show_default=False),
    container_engine: str = ENGINE,
) -> None:
    """A shell in the image, as you, with the GPU and this folder at /work; everything else is read-only or goes with it."""
    from sparkproof.containers import work
    from sparkproof.containers.engine import connect
    from sparkproof.containers.image import require

    with connect(container_engine) as engine:
        code = work.shell(engine, require(engine), list(command or []), Path.cwd())
    raise typer.Exit(code)


def serve(
    model: str = typer.Argument(help="A folder with a whole model, or a hub id."),
    extra: list[str] = typer.Argument(None, help="After --: options of vLLM's server.", show_default=False),
    port: int = typer.Option(8000, min=1, max=65535, help="On 127.0.0.1 only."),
    container_engine: str = ENGINE,
) -> None:
    """Serve a model with vLLM from its own image, on this machine only, until Ctrl-C."""
    from sparkproof.containers import work
    from sparkproof.containers.engine import connect
    from sparkproof.containers.image import require

    with connect(container_engine) as engine:
        code = work.serve(engine, require(engine, "serve"), model, port, list(extra or []), Path.cwd())
    raise typer.Exit(code)


def say(text: str) -> None:
    """One line for a person."""
    Console(stderr=True, soft_wrap=True).print(escape(text), highlight=False)


def in_place(mode: str, container_engine: str, request: object, dry_run: bool) -> int:
    """`sparkproof validate` where `mode` says; returns its exit code."""
    from sparkproof import run
    from sparkproof.containers.place import choose

    assert isinstance(request, run.Request)
    with choose(mode, container_engine) as chosen:
        if chosen.engine is None or chosen.image is None:
            if not os.environ.get(VARIABLE):  # a container's own run was told before it began
                request.runs_in = chosen.place
            if chosen.place.where == "host" and mode != "host":
                request.opening = f"Runs on the host: {chosen.place.why}."
        else:
            from sparkproof.containers import image, work

            say(f"Runs {chosen.place.sentence()}.")
            if differs := image.stale(chosen.image, Path.cwd()):
                say(f"Mind: {differs}.")
            return work.validate(chosen.engine, chosen.image, chosen.place, request, dry_run)
    return run.dry_run(request) if dry_run else run.validate(request)
