"""Find a container engine that answers this user, and talk to it: Docker's API, which Podman speaks too.

Podman has no daemon. Where no socket of it is found, its own service is started for as long as it is needed, and ended
with it.
"""

from __future__ import annotations

import contextlib
import grp
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import docker
import docker.errors
import requests.exceptions

from sparkproof.errors import UserError
from sparkproof.results import ReasonClass

Kind = Literal["docker", "podman"]
TITLES: dict[Kind, str] = {"docker": "Docker", "podman": "Podman"}
ANSWER_S = 10  # for the first question: a healthy engine answers in milliseconds
REQUEST_S = 120  # for any later one: `/system/df` counts every file of every volume
SERVICE_S = 10
NO_ENGINE = UserError(
    "Neither Docker nor Podman is installed.",
    "sudo apt install podman (or docker.io); without either: make validate MODE=host",
    skip_class=ReasonClass.CONTAINER,
)


@dataclass
class Engine:
    """An engine that answers."""

    kind: Kind
    address: str
    api: Any = field(repr=False, default=None)
    info: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def title(self) -> str:
        """Its name for people."""
        return TITLES[self.kind]

    @property
    def rootless(self) -> bool:
        """Whether root inside a container is this user outside."""
        options = [str(o) for o in self.info.get("SecurityOptions") or []]
        return any("rootless" in o for o in options)

    @property
    def architecture(self) -> str:
        """As images call it: arm64 or amd64."""
        seen = str(self.info.get("Architecture") or "")
        return {"aarch64": "arm64", "x86_64": "amd64"}.get(seen, seen)

    @property
    def root_dir(self) -> str:
        """Where it keeps images and volumes, as it says itself."""
        return str(self.info.get("DockerRootDir") or "")

    def command(self, *words: str) -> list[str]:
        """Command line of its own client, talking to this same engine. Errors: UserError where it is not installed."""
        path = shutil.which(self.kind)
        if path is None:
            raise UserError(
                f"{self.title} answers at {self.address}, but its command `{self.kind}` is not installed.",
                f"sudo apt install {'podman' if self.kind == 'podman' else 'docker-cli'}",
            )
        at = ["--host", self.address] if self.kind == "docker" else ["--url", self.address]
        return [path, *at, *words]


@contextlib.contextmanager
def connect(kind: str = "auto", env: Mapping[str, str] | None = None) -> Iterator[Engine]:
    """The engine asked for, or of `auto` the first that answers: Docker, then Podman.

    DOCKER_HOST or CONTAINER_HOST names one place only, and then no other is tried. Errors: UserError, one sentence with the
    cure, of the first engine that is installed and does not answer.
    """
    env = os.environ if env is None else env
    if kind not in ("auto", *TITLES):
        raise UserError(f"There is no container engine '{kind}'.", "Known: auto, docker, podman.")
    first: UserError | None = None
    with contextlib.ExitStack() as stack:
        for name in TITLES if kind == "auto" else [kind]:
            engine: Kind = "docker" if name == "docker" else "podman"
            address = find_address(engine, env)
            if not address and engine == "podman" and shutil.which("podman", path=env.get("PATH")):
                try:
                    address = stack.enter_context(_podman_service(env))
                except UserError as e:
                    first = first or e
                    continue
            if not address:
                if is_installed(engine, env):
                    first = first or not_running(engine)
                continue
            try:
                found = _open(engine, address)
            except UserError as e:
                first = first or e
                continue
            stack.callback(found.api.close)
            yield found
            return
    if first is None and kind != "auto":
        title = TITLES["docker" if kind == "docker" else "podman"]
        package = "docker.io" if kind == "docker" else "podman"
        first = UserError(f"{title} is not installed.", f"sudo apt install {package}", skip_class=ReasonClass.CONTAINER)
    raise first or NO_ENGINE


def find_address(kind: Kind, env: Mapping[str, str]) -> str:
    """Where this engine's API is, by its variable or its usual sockets; '' where neither is there."""
    runtime = env.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    named = env.get("DOCKER_HOST" if kind == "docker" else "CONTAINER_HOST")
    sockets = {
        "docker": ["/var/run/docker.sock", f"{runtime}/docker.sock"],
        "podman": [f"{runtime}/podman/podman.sock", "/run/podman/podman.sock"],
    }
    if kind == "podman" and os.getuid():  # root's own socket holds other images than this user's
        sockets["podman"].pop()
    return named or next((f"unix://{p}" for p in sockets[kind] if Path(p).exists()), "")


def is_installed(kind: Kind, env: Mapping[str, str]) -> bool:
    """Whether the engine itself is here. Docker's command alone is no engine: `dockerd` is."""
    path = env.get("PATH", "")
    program = "podman"
    if kind == "docker":
        program, path = "dockerd", f"{path}:/usr/sbin:/usr/local/sbin" if path else ""
    return bool(find_address(kind, env) or shutil.which(program, path=path))


def not_running(kind: Kind) -> UserError:
    """The sentence for an engine that is installed and silent."""
    start = "sudo systemctl enable --now docker" if kind == "docker" else "systemctl --user enable --now podman.socket"
    return UserError(f"{TITLES[kind]} is installed but not running.", start, skip_class=ReasonClass.CONTAINER)


def _open(kind: Kind, address: str) -> Engine:
    """Ask who is there. Errors: UserError."""
    if not address.startswith("unix://"):
        raise UserError(
            f"The {TITLES[kind]} engine at {address} is on another machine, where this one's folders and GPU are not.",
            f"unset {'DOCKER_HOST' if kind == 'docker' else 'CONTAINER_HOST'}",
        )
    try:
        api = docker.APIClient(base_url=address, version="auto", timeout=ANSWER_S)
        version = api.version()
        info = api.info()
    except Exception as e:  # the SDK lets requests', urllib3's and the operating system's errors through
        raise unreachable(kind, address, e) from None
    api.timeout = REQUEST_S
    components = {str(c.get("Name")) for c in version.get("Components") or []}
    return Engine("podman" if "Podman Engine" in components else kind, address, api, info)


def unreachable(kind: Kind, address: str, error: BaseException) -> UserError:
    """Why nobody answers at a socket, in one sentence with its cure."""
    path = address.removeprefix("unix://")
    title = TITLES[kind]
    for cause in _chain(error):
        if isinstance(cause, PermissionError):
            return UserError(
                f"This user may not use {title}'s socket {path}.", _join_group(kind), skip_class=ReasonClass.CONTAINER
            )
        if isinstance(cause, FileNotFoundError | ConnectionRefusedError):
            return not_running(kind)
        if isinstance(cause, TimeoutError | requests.exceptions.Timeout):
            return UserError(
                f"{title} at {path} takes connections but does not answer within {ANSWER_S} s.",
                f"sudo systemctl restart {kind}" if kind == "docker" else "systemctl --user restart podman.socket",
                skip_class=ReasonClass.CONTAINER,
            )
    text = " ".join(str(error).split())[:200]
    return UserError(f"{title} at {path} does not answer as an engine does: {text}", f"{kind} info")


def _join_group(kind: Kind) -> str:
    if kind == "podman":
        return "unset CONTAINER_HOST, and use this user's own podman"
    with contextlib.suppress(KeyError):
        import pwd

        me = pwd.getpwuid(os.getuid()).pw_name
        if me in grp.getgrnam("docker").gr_mem:
            return "This user is in the group 'docker', but this session began before: log in again, or newgrp docker"
    return "sudo usermod -aG docker $USER, then log in again"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error with all that it wraps: causes, contexts, and errors among its arguments."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        e = todo.pop()
        if e is None or any(e is s for s in seen):
            continue
        seen.append(e)
        yield e
        todo += [
            e.__cause__,
            e.__context__,
            getattr(e, "reason", None) if isinstance(getattr(e, "reason", None), BaseException) else None,
        ]
        todo += [a for a in e.args if isinstance(a, BaseException)]


@contextlib.contextmanager
def _podman_service(env: Mapping[str, str]) -> Iterator[str]:
    """Podman's API, served by a process of ours. Errors: UserError with what podman said."""
    with tempfile.TemporaryDirectory(prefix="sparkproof-podman-") as folder:
        socket, log = Path(folder, "api.sock"), Path(folder, "log")
        with open(log, "wb") as out:
            # a group of its own, so that Ctrl-C on the terminal ends the container first and the service after it
            service = subprocess.Popen(
                ["podman", "system", "service", "--time", "0", f"unix://{socket}"],
                env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + SERVICE_S
            while not socket.exists() and service.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if not socket.exists():
                said = log.read_text(errors="replace").strip().splitlines()
                raise UserError(
                    f"Podman's service does not start: {said[-1] if said else 'it said nothing'}", "podman info",
                    skip_class=ReasonClass.CONTAINER,
                )  # fmt: skip
            yield f"unix://{socket}"
        finally:
            service.terminate()
            try:
                service.wait(5)
            except subprocess.TimeoutExpired:
                service.kill()
                service.wait()
