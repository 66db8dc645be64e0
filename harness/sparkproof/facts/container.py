"""The container engine: which there is, whether this user may use it, and whether it can hand a GPU in."""

from __future__ import annotations

import grp
import json
import os
import re
from typing import Any

from sparkproof.facts.host import Host, Ran
from sparkproof.facts.installed import Image
from sparkproof.facts.model import Container

TIMEOUT_S = 6
MOST_IMAGES = 60


def read_container(host: Host) -> Container:
    """Docker if it answers, else Podman if that does, else whichever is installed with its error."""
    found = [c for c in (_docker(host), _podman(host)) if c is not None]
    if not found:
        found = [Container(nvidia_ctk=host.which("nvidia-ctk"), in_docker_group=in_docker_group())]
    chosen = next((c for c in found if c.usable), found[0])
    chosen.emulates = emulates(host)
    if chosen.usable and chosen.engine:
        chosen.images = read_images(host, chosen.engine)
    return chosen


def _docker(host: Host) -> Container | None:
    path = host.which("docker")
    if path is None:
        return None
    ran = host.run([path, "info", "--format", "{{json .}}"], TIMEOUT_S)
    info = _document(ran)
    errors = info.get("ServerErrors") or ([ran.error] if ran.error else [])
    runtimes = sorted(info.get("Runtimes") or {})
    devices = [str(d.get("ID", "")) for d in info.get("DiscoveredDevices") or []]
    return Container(
        engine="docker",
        usable=not errors and bool(info.get("ServerVersion")),
        error=_clean("; ".join(str(e) for e in errors)) or None,
        runtimes=runtimes,
        # Docker's --gpus goes through the hook; --runtime=nvidia through a registered runtime; --device through CDI.
        nvidia_runtime="nvidia" in runtimes
        or any(d.startswith("nvidia.com/gpu") for d in devices)
        or host.which("nvidia-container-runtime-hook") is not None,
        nvidia_ctk=host.which("nvidia-ctk"),
        in_docker_group=in_docker_group(),
    )


def _podman(host: Host) -> Container | None:
    path = host.which("podman")
    if path is None:
        return None
    ran = host.run([path, "info", "--format", "json"], TIMEOUT_S)
    info = _document(ran)
    runtime = (info.get("host") or {}).get("ociRuntime", {}).get("name")
    specs = [p.name for folder in ("/etc/cdi", "/var/run/cdi") for p in host.glob(folder, "*nvidia*")]
    return Container(
        engine="podman",
        usable=bool(info) and not ran.error,
        error=_clean(ran.error) or None,
        runtimes=[runtime] if runtime else [],
        nvidia_runtime=bool(specs),
        nvidia_ctk=host.which("nvidia-ctk"),
        in_docker_group=in_docker_group(),
    )


def read_images(host: Host, engine: str) -> list[Image] | None:
    """What `image inspect` says of every image on this machine; None where the engine did not answer."""
    listed = host.run([engine, "image", "ls", "--quiet", "--no-trunc"], TIMEOUT_S)
    if listed.error:
        return None
    names = list(dict.fromkeys(listed.out.split()))[:MOST_IMAGES]
    if not names:
        return []
    try:
        documents = json.loads(host.run([engine, "image", "inspect", *names], TIMEOUT_S).out)
    except ValueError:
        return None
    return [
        Image(
            tags=d.get("RepoTags") or [],
            digest=next(iter(d.get("RepoDigests") or []), "").rpartition("@")[2] or None,
            architecture=d.get("Architecture"),
            created=str(d.get("Created") or "")[:10] or None,
        )
        for d in documents
        if isinstance(d, dict)
    ]


def emulates(host: Host) -> list[str] | None:
    """Architectures whose programs the kernel hands to QEMU; None where that table is not mounted."""
    if not host.exists("/proc/sys/fs/binfmt_misc/status"):
        return None
    return [p.name.removeprefix("qemu-") for p in host.glob("/proc/sys/fs/binfmt_misc", "qemu-*")]


def in_docker_group() -> bool:
    """Whether this user may use Docker's socket by default."""
    if os.geteuid() == 0:
        return True
    try:
        return grp.getgrnam("docker").gr_gid in os.getgroups()
    except KeyError:
        return False


def _document(ran: Ran) -> dict[str, Any]:
    try:
        data = json.loads(ran.out)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _clean(text: str) -> str:
    """One line, without terminal colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())[:500]
