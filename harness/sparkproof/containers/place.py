"""On the host or in a container: what MODE means here, and why."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from sparkproof.containers.engine import Engine, connect
from sparkproof.containers.image import Image, require
from sparkproof.errors import UserError
from sparkproof.facts import nvidia
from sparkproof.facts.host import Host
from sparkproof.facts.model import TARGET_COMPUTE_CAPABILITY
from sparkproof.facts.place import IN_IMAGE, RunsIn

Mode = Literal["auto", "container", "host"]
MODES: tuple[Mode, ...] = ("auto", "container", "host")


@dataclass
class Chosen:
    """The decision; engine and image where it is a container."""

    place: RunsIn
    engine: Engine | None = None
    image: Image | None = None


def is_spark(host: Host | None = None) -> bool:
    """Whether this machine is GB10-class, by the properties that its driver tells: 12.1, one memory pool, aarch64."""
    if platform.machine() != "aarch64":
        return False
    gpus, _ = nvidia.read_cuda_driver(host or Host())
    return any(g.integrated and g.capability == TARGET_COMPUTE_CAPABILITY for g in gpus)


@contextmanager
def choose(mode: str, engine: str = "auto", host: Host | None = None) -> Iterator[Chosen]:
    """Decide. `container` is an error where it can't be had; `auto` takes one on a Spark that has an engine and the image,
    else the host, and says why. Errors: UserError.
    """
    host = host or Host()
    if mode not in MODES:
        raise UserError(f"There is no mode '{mode}'.", f"Known: {', '.join(MODES)}.")
    if mode == "host":
        yield Chosen(RunsIn(where="host", why="it was asked for"))
        return
    if host.environ.get(IN_IMAGE):
        if mode == "container":
            raise UserError("This is a container already.", "Leave --mode out in here.")
        yield Chosen(RunsIn(where="container", why="started by hand in the image", image="sparkproof"))
        return
    if mode == "auto" and not is_spark(host):
        yield Chosen(RunsIn(where="host", why="this machine is no DGX Spark, where the image belongs"))
        return
    why = "it was asked for" if mode == "container" else "this is a DGX Spark with an engine and the image"
    try:
        manager = connect(engine)
        found = manager.__enter__()
    except UserError as e:
        if mode == "container":
            raise
        yield Chosen(RunsIn(where="host", why=f"no container can be had: {e.message}"))
        return
    try:
        try:
            image = require(found)
        except UserError as e:
            if mode == "container":
                raise
            yield Chosen(RunsIn(where="host", why=f"no container can be had: {e.message} {e.fix}"))
            return
        version = str(found.info.get("ServerVersion") or "")
        place = RunsIn(
            where="container", why=why, engine=f"{found.kind} {version}".strip(), image=image.tag, digest=image.digest,
            lock=image.lock, revision=image.revision,
        )  # fmt: skip
        yield Chosen(place, found, image)
    finally:
        manager.__exit__(None, None, None)
