"""The project's images: which are here, whether one fits this machine and this checkout, and how one is built."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from sparkproof import __version__
from sparkproof.containers.engine import Engine
from sparkproof.containers.failures import explain, free_gib
from sparkproof.containers.names import IMAGE, LOCK_LABEL, REVISION_LABEL, SERVE_IMAGE, is_ours
from sparkproof.errors import UserError
from sparkproof.results import ReasonClass

Target = Literal["runtime", "serve"]
TAGS: dict[Target, str] = {"runtime": IMAGE, "serve": SERVE_IMAGE}
LOCKS: dict[Target, tuple[str, str]] = {"runtime": ("LOCK", "runtime.lock"), "serve": ("SERVE_LOCK", "serve.lock")}
# The stack unpacks to 5.7 GB and is held twice while it is built (cache, layer), beside the base and llama.cpp. An estimate:
# a build from NVIDIA's base was not measured.
NEEDED_GIB = 20.0
TAIL = 40


@dataclass(frozen=True)
class Image:
    """One image, as the engine tells it."""

    tag: str
    id: str
    digest: str
    architecture: str
    lock: str
    revision: str
    user: str
    bytes: int


def find(engine: Engine, tag: str) -> Image | None:
    """The image under a tag, which Podman prefixes with `localhost/`; None if there is none."""
    for listed in engine.api.images():
        tags = listed.get("RepoTags") or []
        if any(t in (tag, f"localhost/{tag}", f"docker.io/library/{tag}") for t in tags):
            return read(engine, listed["Id"], tag)
    return None


def read(engine: Engine, key: str, tag: str) -> Image:
    """One image by its identifier. `digest`: the registry's where it came from one, else the image's own."""
    seen = engine.api.inspect_image(key)
    config = seen.get("Config") or {}
    labels = config.get("Labels") or {}
    pulled = next((d.rpartition("@")[2] for d in seen.get("RepoDigests") or [] if not d.startswith("localhost/")), "")
    identity = str(seen["Id"])
    identity = identity if identity.startswith("sha256:") else f"sha256:{identity}"
    return Image(
        tag, identity, pulled or identity, str(seen.get("Architecture") or ""), labels.get(LOCK_LABEL, ""),
        labels.get(REVISION_LABEL, ""), str(config.get("User") or ""), int(seen.get("Size") or 0),
    )  # fmt: skip


def require(engine: Engine, target: Target = "runtime") -> Image:
    """The image that a container of ours starts from. Errors: UserError where it is missing or for another processor."""
    tag = TAGS[target]
    found = find(engine, tag)
    if found is None:
        make = "make image" if target == "runtime" else "make image ARGS='--target serve'"
        raise UserError(f"{engine.title} has no image {tag}.", make, skip_class=ReasonClass.CONTAINER)
    if found.architecture and engine.architecture and found.architecture != engine.architecture:
        raise UserError(
            f"The image {tag} is for {found.architecture}, and this machine is {engine.architecture}: it would end with "
            "'exec format error', or run in an emulator without the GPU.",
            "make image, which builds for this machine",
            skip_class=ReasonClass.CONTAINER,
        )
    return found


def stale(image: Image, root: Path, target: Target = "runtime") -> str:
    """In what the image differs from this checkout, in one sentence; '' where it does not, or can't be told."""
    lock = root / "docker" / LOCKS[target][1]
    if image.lock and lock.is_file() and image.lock != _sha256(lock):
        return f"{image.tag} was built from another {lock.name} than this checkout's: make image"
    here = revision(root)
    if image.revision not in ("", "unknown") and here and image.revision != here:
        return f"{image.tag} was built from revision {image.revision[:12]}, and this checkout is at {here[:12]}: make image"
    return ""


def revision(root: Path) -> str:
    """Commit of the checkout, with '-dirty' where files differ from it; '' without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit + ("-dirty" if changed else "")


def checkout() -> Path:
    """The checkout that holds the Dockerfile. Errors: UserError where sparkproof was installed without one."""
    for folder in (Path.cwd(), *Path(__file__).resolve().parents):
        if (folder / "docker" / "Dockerfile").is_file() and (folder / "harness").is_dir():
            return folder
    raise UserError("There is no docker/Dockerfile here.", "Run it in a checkout of sparkproof.")


def build_command(engine: Engine, root: Path, target: Target, build_args: list[str], no_cache: bool) -> list[str]:
    """Command line of the build. Errors: UserError where Docker lacks buildx, which the Dockerfile's mounts need."""
    if engine.kind == "docker":
        command = engine.command("buildx", "build", "--load")
        probe = subprocess.run(
            engine.command("buildx", "version"), capture_output=True, text=True, timeout=30, check=False
        )
        if probe.returncode:
            raise UserError(
                "Docker's buildx is not installed, and the older builder can't read this Dockerfile.",
                "sudo apt install docker-buildx (of docker.com's packages: docker-buildx-plugin)",
            )
    else:
        command = engine.command("build", "--format", "docker")  # HEALTHCHECK is lost in the other format
    variable, lock = LOCKS[target]
    digest = _sha256(root / "docker" / lock)
    arguments = {"REVISION": revision(root) or "unknown", "VERSION": __version__, variable: digest}
    command += [
        "--platform",
        f"linux/{engine.architecture}",
        "--file",
        str(root / "docker/Dockerfile"),
        "--target",
        target,
    ]
    command += ["--tag", TAGS[target] if engine.kind == "docker" else f"localhost/{TAGS[target]}"]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    for given in build_args:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*=.*", given):
            raise UserError(f"'{given}' is no build argument.", "Give NAME=VALUE, such as --build-arg LLAMA=cpu.")
        command += ["--build-arg", given]
    return [*command, *(["--no-cache"] if no_cache else []), str(root)]


def build(
    engine: Engine, target: Target, build_args: list[str], no_cache: bool = False, out: IO[str] | None = None
) -> tuple[Image, float]:
    """Build one image and show the engine's own progress. Returns it and the seconds. Errors: UserError, one sentence."""
    root = checkout()
    free = free_gib(engine)
    if free is not None and free < NEEDED_GIB:
        raise UserError(
            f"{engine.title} has {free:.1f} GiB free at {engine.root_dir}, and building takes about {NEEDED_GIB:.0f}.",
            f"{engine.kind} system df shows what can go.",
            skip_class=ReasonClass.CONTAINER,
        )
    command = build_command(engine, root, target, build_args, no_cache)
    out = out or sys.stderr
    start = time.monotonic()
    tail: deque[str] = deque(maxlen=TAIL)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", env={**os.environ, "BUILDKIT_PROGRESS": "plain"})  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            tail.append(line)
            out.write(line)
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    if code:
        raise explain("".join(tail), engine)
    found = find(engine, TAGS[target])
    if found is None or not is_ours(engine.api.inspect_image(found.id)["Config"].get("Labels")):
        raise UserError(
            f"The build ended well, but {TAGS[target]} is not there with this project's label.", f"{engine.kind} images"
        )
    return found, time.monotonic() - start


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise UserError(f"{path} can't be read: {e.strerror}.", "Run it in a whole checkout of sparkproof.") from None
