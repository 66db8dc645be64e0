"""Read and remove what Docker and Podman hold. Only what carries this project's label is ever removed, by identifier, and the
label is read again just before.
"""

# ruff: noqa: PTH110, PTH118
# Paths are plain text in this file: Path would fold or reject what must be compared exactly.
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from sparkproof.containers import engine as container_engine
from sparkproof.containers.names import is_ours
from sparkproof.errors import UserError
from sparkproof.rollback.model import Engine, Thing

Sort = Literal["container", "network", "volume", "image"]
SORTS: tuple[Sort, ...] = ("container", "network", "volume", "image")  # in the order in which they let go of each other
BUILT_IN = ("bridge", "host", "none", "podman")  # networks that an engine makes for itself
STOP_S = 10
READ_S = 15  # a busy engine answers late; what it does not tell is unknown, never equal


def read_all(env: Mapping[str, str]) -> list[Engine]:
    """Docker and Podman, each by its own socket. Never raises."""
    return [read("docker", env), read("podman", env)]


def read(name: Literal["docker", "podman"], env: Mapping[str, str]) -> Engine:
    """What one engine holds."""
    installed = container_engine.is_installed(name, env)
    found = Engine(name=name, installed=installed)
    if not installed or _never_used(name, env):
        return found
    try:
        with container_engine.connect(name, env) as engine:
            if engine.kind != name:  # podman-docker: one engine behind both sockets is read once
                return Engine(name=name)
            found.address, engine.api.timeout = engine.address, READ_S
            _read(engine.api, found)
    except UserError as e:
        found.not_read = str(e)
    except Exception as e:  # the SDK raises its own, requests' and urllib3's errors
        found.not_read = f"{name} at {found.address}: {' '.join(str(e).split())[:300]}"
    return found


def _never_used(name: str, env: Mapping[str, str]) -> bool:
    """Whether Podman holds nothing, not even its storage: asking it would make that, and looking must change nothing."""
    if name != "podman" or container_engine.find_address("podman", env):
        return False
    home = env.get("XDG_DATA_HOME") or os.path.join(env.get("HOME", "/"), ".local/share")
    return not os.path.exists("/var/lib/containers/storage" if os.getuid() == 0 else f"{home}/containers/storage")


def _read(api: Any, found: Engine) -> None:
    """Through the low-level API: one request a list, no inspection of every image."""
    sizes = _sizes(api)
    for i in api.images(all=False):
        tags = [t for t in i.get("RepoTags") or [] if t != "<none>:<none>"]
        size = sizes["images"].get(i["Id"], int(i.get("Size") or 0))
        label = ", ".join(tags) or "<untagged>"
        found.images[i["Id"]] = Thing(label=label, bytes=size, ours=is_ours(i.get("Labels")), tags=tags)
    for c in api.containers(all=True):
        names = ", ".join(n.lstrip("/") for n in c.get("Names") or [])
        found.containers[c["Id"]] = Thing(
            label=f"{names} ({c.get('Image', '')})",
            bytes=sizes["containers"].get(c["Id"], 0),
            ours=is_ours(c.get("Labels")),
            running=c.get("State") == "running",
        )
    for v in api.volumes().get("Volumes") or []:
        size = max(0, sizes["volumes"].get(v["Name"], 0))
        found.volumes[v["Name"]] = Thing(label=v["Name"], bytes=size, ours=is_ours(v.get("Labels")))
    for n in api.networks():
        if n["Name"] not in BUILT_IN:
            found.networks[n["Id"]] = Thing(label=n["Name"], ours=is_ours(n.get("Labels")))
    found.build_cache_bytes = sizes["build cache"].get("", 0)


def _sizes(api: Any) -> dict[str, dict[str, int]]:
    """What each object alone holds, by the engine's own account; nothing where it keeps none."""
    found: dict[str, dict[str, int]] = {"images": {}, "containers": {}, "volumes": {}, "build cache": {}}
    try:
        df = api.df()
    except Exception:  # older engines lack it, and a volume on a dead mount makes it fail
        return found
    for i in df.get("Images") or []:
        shared = max(0, int(i.get("SharedSize") or 0))
        found["images"][i["Id"]] = max(0, int(i.get("Size") or 0) - shared)
    for c in df.get("Containers") or []:
        found["containers"][c["Id"]] = int(c.get("SizeRw") or 0)
    for v in df.get("Volumes") or []:
        found["volumes"][v["Name"]] = int((v.get("UsageData") or {}).get("Size") or 0)
    found["build cache"][""] = sum(int(b.get("Size") or 0) for b in df.get("BuildCache") or [] if not b.get("Shared"))
    return found


def remove(name: Literal["docker", "podman"], sort: Sort, key: str, env: Mapping[str, str] | None = None) -> str:
    """Remove one object of ours. Returns '' or why it stays. What is already gone counts as removed.

    A container that runs is stopped first, politely for 10 s. An image that also carries a tag of somebody else's loses
    only ours. Nothing is forced. Errors: UserError if the engine does not answer.
    """
    import docker.errors

    with container_engine.connect(name, env) as engine:
        try:
            return _remove(engine.api, sort, key)
        except docker.errors.NotFound:
            return ""
        except docker.errors.APIError as e:
            return " ".join(str(e.explanation or e).split())[:300]


def _remove(api: Any, sort: Sort, key: str) -> str:
    if sort == "container":
        seen = api.inspect_container(key)
        if not is_ours(seen["Config"].get("Labels")):
            return "it does not carry this project's label"
        if seen["State"].get("Running"):
            api.stop(key, timeout=STOP_S)
        api.remove_container(key, v=True)  # with anonymous volumes that only it has
    elif sort == "network":
        if not is_ours(api.inspect_network(key).get("Labels")):
            return "it does not carry this project's label"
        api.remove_network(key)
    elif sort == "volume":
        if not is_ours(api.inspect_volume(key).get("Labels")):
            return "it does not carry this project's label"
        api.remove_volume(key)
    else:
        return _remove_image(api, key)
    return ""


def _remove_image(api: Any, key: str) -> str:
    seen = api.inspect_image(key)
    if not is_ours((seen.get("Config") or {}).get("Labels")):
        return "it does not carry this project's label"
    tags = [t for t in seen.get("RepoTags") or [] if t != "<none>:<none>"]
    ours = [t for t in tags if t.removeprefix("localhost/").startswith("sparkproof:")]
    others = [t for t in tags if t not in ours]
    for tag in ours:
        api.remove_image(tag)
    if others:
        return f"it also carries a tag that is not ours: {', '.join(others)}"
    if not tags:
        api.remove_image(key)
    return ""
