"""Make a container of ours: hardened, as the user who asked, with the GPU, and with labels by which the way back finds it.

Docker's is made through its API. Podman's is made by its own command and used through the API from then on: Podman's
Docker-compatible API ignores requests for a GPU before 5.4 (podman#25171), and a user namespace that keeps this user's number.
"""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker.errors
import psutil

from sparkproof.containers.engine import Engine
from sparkproof.containers.failures import explain, refused
from sparkproof.containers.image import Image
from sparkproof.containers.names import labels

CACHE = "/cache"
WORK = "/work"
GIB = 2**30
TMP = "exec,mode=1777,size=8g"  # Triton and Inductor load what they compile from temporary folders, hence exec
SHM_GIB = 8  # lies in the memory that a Spark's GPU shares: as much as data loaders need
LIMITS = {
    "memlock": (-1, resource.RLIMIT_MEMLOCK),  # pinned buffers
    "stack": (67_108_864, resource.RLIMIT_STACK),
    "nofile": (65_536, resource.RLIMIT_NOFILE),
}
PROCESSES = 16_384
INIT_PROGRAMS = ("/usr/libexec/podman/catatonit", "/usr/lib/podman/catatonit", "/usr/bin/catatonit")


@dataclass(frozen=True)
class Mount:
    """A folder of this machine in the container."""

    host: Path
    inside: str
    read_only: bool = True


@dataclass
class Spec:
    """A container to be."""

    image: Image
    command: list[str]
    role: str
    mounts: list[Mount] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    gpu: bool = False
    terminal: bool = False
    interactive: bool = False
    port: int = 0
    network: bool = True


def user_of(engine: Engine, image: Image) -> str:
    """As whom to run: this user, so that reports are theirs; where root inside is this user outside, root; for root the
    image's own user, since nothing here should run as root.
    """
    if engine.kind == "docker" and engine.rootless:
        return "0:0"
    return f"{os.getuid()}:{os.getgid()}" if os.getuid() else image.user


def cache_volume(engine: Engine, image: Image) -> str:
    """Name of the labelled volume for caches: one a user, since what one compiled another would run."""
    name = f"sparkproof-cache-{user_of(engine, image).partition(':')[0]}"
    engine.api.create_volume(name, labels=labels("cache"))
    return name


def has_gpu() -> bool:
    """Whether the host has an NVIDIA driver whose GPU a container could be given."""
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()


def limits(engine: Engine) -> dict[str, int]:
    """Resource limits, none above what this process itself may have where the engine can't exceed that."""
    found = {}
    for name, (wanted, which) in LIMITS.items():
        hard = resource.getrlimit(which)[1]
        bound = engine.kind == "podman" and hard != resource.RLIM_INFINITY
        found[name] = hard if bound and (wanted == -1 or wanted > hard) else wanted
    if engine.kind == "podman":  # left out, Podman asks for four million, which a machine with a bound refuses
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        found["nproc"] = PROCESSES if hard == resource.RLIM_INFINITY else min(PROCESSES, hard)
    return found


def shm_bytes() -> int:
    """Size of /dev/shm: 8 GiB, or a quarter of a smaller machine's memory."""
    return int(min(SHM_GIB * GIB, psutil.virtual_memory().total // 4))


def create(engine: Engine, spec: Spec) -> str:
    """Make it; it does not run yet. Returns its identifier. Errors: UserError, one sentence."""
    try:
        volume = cache_volume(engine, spec.image)
        if engine.kind == "podman":
            return _podman_create(engine, spec, volume)
        made = engine.api.create_container_from_config(docker_config(engine, spec, volume))
    except docker.errors.APIError as e:
        raise refused(e, engine) from None
    return str(made["Id"])


def docker_config(engine: Engine, spec: Spec, volume: str) -> dict[str, Any]:
    """The body of POST /containers/create."""
    binds = [f"{volume}:{CACHE}"] + [f"{m.host}:{m.inside}:{'ro' if m.read_only else 'rw'}" for m in spec.mounts]
    host: dict[str, Any] = {
        "Binds": binds,
        "ReadonlyRootfs": True,
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges:true"],
        "Init": True,
        "Tmpfs": {"/tmp": TMP},
        "ShmSize": shm_bytes(),
        "Ulimits": [{"Name": n, "Soft": v, "Hard": v} for n, v in limits(engine).items()],
        "UsernsMode": "host",  # a daemon that remaps users would write reports that are nobody's
        "NetworkMode": "bridge" if spec.network else "none",
    }
    if spec.gpu:
        host["DeviceRequests"] = [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}]
    if spec.port:
        host["PortBindings"] = {f"{spec.port}/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(spec.port)}]}
    return {
        "Image": spec.image.id,
        "Cmd": spec.command,
        "Env": [f"{k}={v}" for k, v in spec.env.items()],
        "User": user_of(engine, spec.image),
        "Labels": labels(spec.role),
        "WorkingDir": WORK,
        "Tty": spec.terminal,
        "OpenStdin": spec.interactive,
        "AttachStdin": spec.interactive,
        "ExposedPorts": {f"{spec.port}/tcp": {}} if spec.port else {},
        "HostConfig": host,
    }


def podman_arguments(engine: Engine, spec: Spec, volume: str) -> list[str]:
    """The same for `podman create`."""
    words = ["create", "--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges", "--tmpfs", f"/tmp:{TMP}",
             "--shm-size", str(shm_bytes()), "--user", user_of(engine, spec.image), "--workdir", WORK, "--pull", "never",
             "--network", ("slirp4netns" if engine.rootless else "bridge") if spec.network else "none",
             "--volume", f"{volume}:{CACHE}"]  # fmt: skip
    for name, limit in limits(engine).items():
        words += ["--ulimit", f"{name}={limit}:{limit}"]
    if engine.rootless:
        words += ["--userns", "keep-id"]
    if any(Path(p).exists() for p in INIT_PROGRAMS):
        words.append("--init")
    for key, value in labels(spec.role).items():
        words += ["--label", f"{key}={value}"]
    for mount in spec.mounts:
        words += ["--volume", f"{mount.host}:{mount.inside}:{'ro' if mount.read_only else 'rw'}"]
    for key in spec.env:
        words += [
            "--env",
            key,
        ]  # the value comes from the command's own environment: a token has no place in a process list
    words += (
        ["--device", "nvidia.com/gpu=all"] * spec.gpu + ["--tty"] * spec.terminal + ["--interactive"] * spec.interactive
    )
    words += ["--publish", f"127.0.0.1:{spec.port}:{spec.port}"] if spec.port else []
    return [*words, spec.image.id, *spec.command]


def _podman_create(engine: Engine, spec: Spec, volume: str) -> str:
    command = engine.command(*podman_arguments(engine, spec, volume))
    done = subprocess.run(
        command, env={**os.environ, **spec.env}, capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise explain(done.stderr, engine)
    return done.stdout.strip().splitlines()[-1]


@contextmanager
def container(engine: Engine, spec: Spec) -> Iterator[str]:
    """A container that is removed at the end, however that comes."""
    key = create(engine, spec)
    try:
        yield key
    finally:
        try:
            engine.api.remove_container(key, force=True, v=True)
        except docker.errors.NotFound:
            pass
        except docker.errors.APIError as e:
            raise refused(e, engine) from None


@contextmanager
def owned(folder: Path, user: str) -> Iterator[None]:
    """Where root started us: hand `folder` to the image's user while it runs, and everything in it back to root after.

    For any other user, who runs as themselves inside, nothing is done. What an earlier run that was killed left with the
    image's user comes back too.
    """
    inside, _, group = user.partition(":")
    if os.getuid() or not inside.isdigit() or inside == "0":
        yield
        return
    uid, gid = int(inside), int(group or inside)
    st = folder.stat()
    os.chown(folder, uid, gid)
    try:
        yield
    finally:
        for path in [folder, *folder.rglob("*")]:
            if path.lstat().st_uid == uid:
                os.chown(
                    path,
                    st.st_uid if st.st_uid != uid else 0,
                    st.st_gid if st.st_gid != gid else 0,
                    follow_symlinks=False,
                )
