"""The container engine: which there is, whether this user may use it, and whether it can hand a GPU in."""

from __future__ import annotations

import grp
import json
import os
import re
from typing import Any

from sparkproof.facts.host import Host, Ran
from sparkproof.facts.model import Container

TIMEOUT_S = 6


def read_container(host: Host) -> Container:
    """Docker if it answers, else Podman if that does, else whichever is installed with its error."""
    found = [c for c in (_docker(host), _podman(host)) if c is not None]
    if not found:
        return Container(nvidia_ctk=host.which("nvidia-ctk"), in_docker_group=in_docker_group())
    return next((c for c in found if c.usable), found[0])


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
