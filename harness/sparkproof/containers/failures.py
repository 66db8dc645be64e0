"""What engines say when something is wrong, and what it means: a table of their words, each with one sentence and its cure.

Words as Docker 28 and Podman 4 and 5 give them, and NVIDIA's container toolkit through them (rows 31 and 52 of the known
failures).
"""

from __future__ import annotations

import re
import shutil
from typing import Any

from sparkproof.containers.engine import Engine
from sparkproof.errors import UserError
from sparkproof.results import ReasonClass

TOOLKIT = "sudo apt install nvidia-container-toolkit && sudo nvidia-ctk"
DOCKER_GPU = f"{TOOLKIT} runtime configure --runtime=docker && sudo systemctl restart docker"
CDI = f"{TOOLKIT} cdi generate --output=/etc/cdi/nvidia.yaml"
ON_HOST = "make validate MODE=host runs without a container."

# pattern -> (sentence, cure); {title} is the engine, {kind} its command, {said} its own words, {gpu} the cure for its GPUs
WORDS: list[tuple[str, str, str]] = [
    (
        r'could not select device driver "[^"]*" with capabilities|unknown or invalid runtime name: nvidia',
        "{title} has no way to hand a GPU in: NVIDIA's container toolkit is not registered with it.",
        "{gpu}",
    ),
    (
        r"unresolvable CDI devices|stat nvidia\.com/gpu|failed to inject CDI|could not inject CDI|setting up CDI devices",
        "{title} knows no device nvidia.com/gpu: there is no CDI description of this machine's GPU, or an old one.",
        CDI,
    ),
    (
        r"nvidia-container-cli.*(driver not loaded|nvml error|load library failed|initialization error)",
        "NVIDIA's driver does not answer {title}'s container toolkit: {said}.",
        "nvidia-smi must work on the host first; then: sparkproof doctor",
    ),
    (r"no space left on device|disk quota exceeded", "{title}'s disk is full ({room}).", "{kind} system df, then {prune}"),
    (
        r"exec format error|does not match the (specified|detected|expected) platform|wrong architecture",
        "The image is for another processor than this machine's ({architecture}).",
        "make image, which builds for this machine",
    ),
    (
        r"port is already allocated|address already in use",
        "The port is taken by another program of this machine: {said}.",
        "Give another one: make serve PORT=8001",
    ),
    (
        r"name .* is already in use",
        "Another container of that name is here: {said}.",
        "make uninstall ARGS=--dry-run shows what is ours",
    ),
    (r"no such image|image not known", "The image is gone: {said}.", "make image"),
    (r"no such container|no container with", "The container was removed by somebody else while it ran.", "Run it again."),
    (
        r"toomanyrequests|unauthorized|denied: requested access|no such host|tls handshake|i/o timeout|connection refused|"
        r"temporary failure in name resolution|network is unreachable",
        "A registry could not be reached or refused: {said}.",
        "Look at the network (proxy, login) and run it again; what was built so far is kept.",
    ),
    (
        r"rlimit",
        "This machine does not let {title} set a limit that the container asks for: {said}.",
        "Run rootless, or on the host: " + ON_HOST,
    ),
    (
        r"permission denied",
        "{title} was refused something by the operating system: {said}.",
        "Look at the owner of the folder named there; on SELinux or AppArmor, at the audit log.",
    ),
]  # fmt: skip


def explain(said: str, engine: Engine) -> UserError:
    """The sentence for what an engine said. Its last line of words is kept where no row fits."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = " ".join((lines[-1] if lines else "nothing").split())[:300].rstrip(".")
    gpu = DOCKER_GPU if engine.kind == "docker" else CDI
    prune = "docker builder prune" if engine.kind == "docker" else "podman system prune --build"
    room = room_of(engine)
    for pattern, sentence, cure in WORDS:
        if found := re.search(pattern, said, re.IGNORECASE):
            line = next((x for x in lines if found.group(0).lower() in x.lower()), last)
            words = {"title": engine.title, "kind": engine.kind, "said": line[:300].rstrip("."), "gpu": gpu, "prune": prune,
                     "room": room, "architecture": engine.architecture}  # fmt: skip
            return UserError(sentence.format(**words), cure.format(**words), skip_class=ReasonClass.CONTAINER)
    return UserError(
        f"{engine.title} refused: {last}.", f"{engine.kind} info; " + ON_HOST, skip_class=ReasonClass.CONTAINER
    )


def refused(error: Any, engine: Engine) -> UserError:
    """The sentence for an APIError of the SDK."""
    return explain(str(getattr(error, "explanation", None) or error), engine)


def free_gib(engine: Engine) -> float | None:
    """Free space where the engine keeps its images; None where that folder can't be seen from here."""
    try:
        return shutil.disk_usage(engine.root_dir).free / 2**30 if engine.root_dir else None
    except OSError:
        return None


def room_of(engine: Engine) -> str:
    """The same in words."""
    free = free_gib(engine)
    return f"{free:.1f} GiB free at {engine.root_dir}" if free is not None else "its folder can't be seen from here"
