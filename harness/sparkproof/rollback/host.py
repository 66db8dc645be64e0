"""Read what lies outside Python: containers, Debian packages, shell profiles. Nothing here is ever removed, only
compared.
"""

# ruff: noqa: PTH110, PTH118
# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sparkproof.rollback.model import Dpkg, Engine, Machine, Profiles

PROFILE_FILES = (
    ".bashrc", ".bash_profile", ".bash_login", ".profile", ".zshenv", ".zshrc", ".zprofile", ".config/fish/config.fish",
)  # fmt: skip
ENGINE_TIMEOUT_S = 3


def machine() -> Machine:
    """Which machine this is."""
    try:
        text = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        text = ""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""
    return Machine(id=digest, hostname=socket.gethostname(), uid=os.getuid())


def profiles(home: str) -> Profiles:
    """Digests of the shell profiles and of /etc/environment."""
    found = Profiles()
    for path in [*(os.path.join(home, f) for f in PROFILE_FILES), "/etc/environment"]:
        try:
            found.files[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        except FileNotFoundError:
            found.files[path] = ""
        except OSError as e:
            found.not_read[path] = e.strerror or str(e)
    return found


def dpkg() -> Dpkg:
    """Installed Debian packages."""
    if not shutil.which("dpkg-query"):
        return Dpkg()
    command = ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}\t${Package}:${Architecture}\t${Version}\n"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as e:
        return Dpkg(installed=True, not_read=f"dpkg-query: {e}")
    rows = [line.split("\t") for line in out.splitlines() if line.startswith(("ii", "hi"))]
    packages = {row[1]: row[2] for row in rows if len(row) == 3}
    text = "".join(f"{n} {v}\n" for n, v in sorted(packages.items()))
    return Dpkg(installed=True, packages=packages, digest=hashlib.sha256(text.encode()).hexdigest())


def engines(env: Mapping[str, str]) -> list[Engine]:
    """Docker and Podman, each by its own socket."""
    runtime = env.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    docker_sockets = ["/var/run/docker.sock", f"{runtime}/docker.sock"]
    podman_sockets = [f"{runtime}/podman/podman.sock", "/run/podman/podman.sock"]
    return [
        _engine("docker", env.get("DOCKER_HOST") or _first_socket(docker_sockets)),
        _engine("podman", env.get("CONTAINER_HOST") or _first_socket(podman_sockets)),
    ]


def _first_socket(paths: list[str]) -> str:
    return next((f"unix://{p}" for p in paths if os.path.exists(p)), "")


def _engine(name: Literal["docker", "podman"], address: str) -> Engine:
    engine = Engine(name=name, installed=bool(address or shutil.which(name)))
    if not engine.installed:
        return engine
    if not address:
        start = "sudo systemctl start docker" if name == "docker" else "systemctl --user start podman.socket"
        engine.not_read = f"{name} is installed but no socket of it was found ({start})"
        return engine
    try:
        import docker

        client = docker.DockerClient(base_url=address, timeout=ENGINE_TIMEOUT_S)
        try:
            _read_engine(client, engine)
        finally:
            client.close()
    except Exception as e:  # the SDK raises its own, requests' and urllib3's errors
        engine.not_read = f"{name} at {address}: {' '.join(str(e).split())[:300]}"
    return engine


def _read_engine(client: Any, engine: Engine) -> None:
    """Through the low-level API: one request a list, no inspection of every image."""
    for i in client.api.images(all=False):
        tags = [t for t in i.get("RepoTags") or [] if t != "<none>:<none>"]
        engine.images[i["Id"]] = (", ".join(tags) or "<untagged>", int(i.get("Size") or 0))
    for c in client.api.containers(all=True):
        names = ", ".join(n.lstrip("/") for n in c.get("Names") or [])
        engine.containers[c["Id"]] = (f"{names} ({c.get('Image', '')})", 0)
    for v in client.api.volumes().get("Volumes") or []:
        engine.volumes[v["Name"]] = (v["Name"], 0)
