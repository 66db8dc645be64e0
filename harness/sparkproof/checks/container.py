"""Can containers be started with the GPU, and is this one (if it is one) set up for training?"""

from __future__ import annotations

from sparkproof.checks.finding import Severity
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import UNLIMITED, Facts
from sparkproof.results import ReasonClass

MIN_SHM_GIB = 1.0
MAX_SHM_USED_GIB = 4.0
MIN_MEMLOCK_BYTES = 2**30
NO_ENGINE = NotApplicable("neither Docker nor Podman is installed", ReasonClass.CONTAINER)


@check("container.access")
def access(facts: Facts) -> Answer:
    """Row 52, first half: an error only where the engine is the usual way to the GPU."""
    c = facts.container
    if c.engine is None:
        return NotRead("the container engine") if "container" in facts.errors else NO_ENGINE
    if c.usable is None:
        return NotRead(f"whether {c.engine} answers")
    if c.usable:
        return Ok(f"{c.engine} answers this user")
    error = c.error or "no reason given"
    seen = f"{c.engine}: {error}"
    severity = Severity.ERROR if facts.has_nvidia_hardware and not facts.os.in_container else Severity.WARNING
    if "permission denied" in error.lower():
        where = "in" if c.in_docker_group else "not in"
        return Found(
            seen, severity, cause=f"The engine's socket is closed to this user, who is {where} the group 'docker'."
        )
    if "cannot connect" in error.lower() or "no such file" in error.lower():
        if facts.os.in_container:
            return Found(
                f"{seen}; this is a container",
                Severity.WARNING,
                cause="There is a client in this container, and no engine behind it.",
                fix="sparkproof doctor  # on the host, where the engine runs",
            )
        return Found(seen, severity, cause="The engine is not running.", fix=f"sudo systemctl enable --now {c.engine}")
    return Found(seen, severity, cause="The engine gave this reason itself.", fix=f"{c.engine} info")


@check("container.gpu_runtime")
def gpu_runtime(facts: Facts) -> Answer:
    """Row 52, second half."""
    c = facts.container
    if not facts.has_nvidia_hardware:
        return NotApplicable("no NVIDIA GPU to hand in", ReasonClass.GPU)
    if c.engine is None:
        return NO_ENGINE
    if not c.usable:
        return NotApplicable("explained by container.access", ReasonClass.CONTAINER)
    if c.nvidia_runtime is None:
        return NotRead("the engine's runtimes")
    if c.nvidia_runtime:
        return Ok(f"{c.engine} can hand the GPU in (runtimes: {', '.join(c.runtimes) or 'by CDI'})")
    toolkit = "" if c.nvidia_ctk else "sudo apt install nvidia-container-toolkit && "
    fix = "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
    if c.engine == "docker":
        fix = "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
    return Found(
        f"{c.engine} has the runtimes {', '.join(c.runtimes) or 'none'}, none of NVIDIA's; "
        f"nvidia-ctk: {c.nvidia_ctk or 'not installed'}",
        fix=toolkit + fix,
    )


@check("container.shm")
def shm(facts: Facts) -> Answer:
    """Row 45: too small for workers, or so full that it takes GPU memory."""
    size, used = facts.shm.size_gib, facts.shm.used_gib
    if size is None:
        return NotRead("/dev/shm")
    seen = f"/dev/shm has {size:.2f} GiB"
    if size < MIN_SHM_GIB:
        if facts.os.in_container:
            return Found(f"{seen}; this is a container")
        return Found(seen, fix="sudo mount -o remount,size=8G /dev/shm")
    if facts.unified and used is not None and used > MAX_SHM_USED_GIB:
        return Found(
            f"{seen}, and {used:.1f} GiB of it are in use",
            cause="Files in /dev/shm lie in the pool that the GPU shares.",
            fix="ls -lahS /dev/shm  # then remove what no process uses",
        )
    return Ok(f"{seen}{f', {used:.2f} GiB in use' if used is not None else ''}")


@check("container.limits")
def limits(facts: Facts) -> Answer:
    """Row 45: locked memory, only where a container engine set the limit."""
    if not facts.os.in_container:
        return NotApplicable("not in a container")
    if not facts.has_nvidia_hardware:
        return NotApplicable("no NVIDIA GPU", ReasonClass.GPU)
    memlock = facts.limits.memlock_bytes
    if memlock is None:
        return NotRead("RLIMIT_MEMLOCK")
    if memlock != UNLIMITED and memlock < MIN_MEMLOCK_BYTES:
        return Found(f"memlock is {memlock // 1024} KiB, stack is {_size(facts.limits.stack_bytes)}")
    return Ok(f"memlock is {_size(memlock)}, stack is {_size(facts.limits.stack_bytes)}")


def _size(value: int | None) -> str:
    if value is None:
        return "unknown"
    return "unlimited" if value == UNLIMITED else f"{value // 1024} KiB"
