"""What people do in a container of ours: validate, look around, serve."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sparkproof.containers import attached
from sparkproof.containers.engine import Engine
from sparkproof.containers.image import Image
from sparkproof.containers.launch import WORK, Mount, Spec, has_gpu, owned, user_of
from sparkproof.errors import UserError
from sparkproof.facts.place import VARIABLE, RunsIn
from sparkproof.report.rundir import storage_error
from sparkproof.rollback import manifest
from sparkproof.run import Request

HANDED_IN = (
    "HF_TOKEN",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "NO_COLOR",
    "SPARKPROOF_DEBUG",
)
REPORTS = f"{WORK}/reports"


def surroundings(place: RunsIn | None = None) -> dict[str, str]:
    """Variables for a container: those that a user would expect to reach it, and where it runs."""
    env = {k: os.environ[k] for k in HANDED_IN if os.environ.get(k)}
    if sys.stdout.isatty():
        env |= {"TERM": os.environ.get("TERM", "xterm-256color")}
    elif columns := os.environ.get("COLUMNS"):
        env["COLUMNS"] = columns
    return env | ({VARIABLE: place.model_dump_json()} if place else {})


def validate(engine: Engine, image: Image, place: RunsIn, request: Request, dry_run: bool = False) -> int:
    """The same run in a container; its reports land in the user's folder, as the user's files. Returns its exit code."""
    words, mounts = arguments(request)
    try:
        if not request.reports.exists():
            request.reports.mkdir(parents=True)
            manifest.add(request.reports, "reports")
    except OSError as e:
        raise storage_error(e, "The report", request.reports) from None
    gpu = has_gpu()
    command = ["sparkproof", "validate", *words, *(["--dry-run"] if dry_run else [])]
    reports = Mount(request.reports.resolve(), REPORTS, read_only=False)
    spec = Spec(
        image, command, "validate", [reports, *mounts], surroundings(place), gpu=gpu, terminal=sys.stdout.isatty()
    )
    if gpu:
        attached.gpu_inside(engine, spec)
    with owned(reports.host, user_of(engine, image)):
        return attached.run(engine, spec)


def arguments(request: Request) -> tuple[list[str], list[Mount]]:
    """The words of a request as they read inside, and the folders that they name. Errors: UserError."""
    words, mounts = list(request.names), []
    if request.profile:
        words += ["--profile", request.profile.value]
    for option, values in (("--kind", request.kinds), ("--tag", request.tags)):
        for value in values:
            words += [option, value]
    words += ["--engine", request.engine] if request.engine else []
    words += ["--revision", request.revision] if request.revision else []
    if request.model:
        local = Path(request.model).expanduser()
        if local.is_dir():
            mounts.append(Mount(local.resolve(), "/model"))
        words += ["--model", "/model" if local.is_dir() else request.model]
    for option, folder, inside in (
        ("--model-dir", request.model_dir, "/models"),
        ("--scenarios", request.scenarios, "/scenarios"),
    ):
        if folder is not None:
            if not folder.expanduser().is_dir():
                raise UserError(f"There is no folder {folder}.", f"Give {option} a folder that is there.")
            mounts.append(Mount(folder.expanduser().resolve(), inside))
            words += [option, inside]
    words += ["--steps", str(request.steps)] if request.steps else []
    if request.resume:  # a path outside means nothing inside; a run's name does
        words += ["--resume", Path(request.resume).name]
    words += ["--workers", str(request.workers)] if request.workers is not None else []
    words += ["--memory-floor", str(request.memory_floor_gib)] if request.memory_floor_gib else []
    words += ["--strict"] * request.strict + ["--wait"] * request.wait
    if request.facts:
        raise UserError("--facts judges another machine, for which no container is needed.", "Add --mode host.")
    return words, mounts


def shell(engine: Engine, image: Image, command: list[str], folder: Path) -> int:
    """A shell (or `command`) in a container, in the terminal; `folder` is at /work, writable. Returns its exit code."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if not command and not terminal:
        raise UserError("There is no terminal for a shell.", "Give a command: make shell ARGS='python -V'")
    spec = Spec(
        image, command or ["bash"], "shell", [Mount(folder.resolve(), WORK, read_only=False)], surroundings(), gpu=has_gpu(),
        terminal=terminal, interactive=terminal,
    )  # fmt: skip
    return attached.interactive(engine, spec) if terminal else attached.run(engine, spec)


def serve(engine: Engine, image: Image, model: str, port: int, extra: list[str], folder: Path) -> int:
    """vLLM's OpenAI server for one model, reachable from this machine only, until Ctrl-C. Returns its exit code.

    `model`: a folder, or a hub id. `folder` is at /work, read-only, for adapters that `extra` names.
    """
    mounts, name = [Mount(folder.resolve(), WORK)], model
    local = Path(model).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(
                f"{model} holds no config.json, so it is no whole model.",
                "Serve a merged model, or the base with: -- --enable-lora --lora-modules NAME=/work/ADAPTER",
            )
        mounts.append(Mount(local.resolve(), "/model"))
        model, name = "/model", local.resolve().name
    elif model.startswith((".", "/", "~")):
        raise UserError(f"There is no folder {model}.", "Give a folder that is there, or a hub id such as owner/name.")
    command = ["--model", model, "--served-model-name", name, "--host", "0.0.0.0", "--port", str(port), *extra]
    env = surroundings() | ({"VLLM_API_KEY": os.environ["VLLM_API_KEY"]} if os.environ.get("VLLM_API_KEY") else {})
    spec = Spec(image, command, "serve", mounts, env, gpu=has_gpu(), terminal=sys.stdout.isatty(), port=port)
    if spec.gpu:
        attached.gpu_inside(engine, spec)
    print(f"http://127.0.0.1:{port}/v1 serves {name} once it says so below; Ctrl-C ends it.", flush=True)
    return attached.run(engine, spec)
