"""Can containers be started with the GPU, and is this one (if it is one) set up for training?"""

from __future__ import annotations

from sparkproof.checks.finding import Severity
from sparkproof.checks.lore import LORE
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.installed import Image
from sparkproof.facts.model import UNLIMITED, Facts
from sparkproof.results import ReasonClass

MIN_SHM_GIB = 1.0
MAX_SHM_USED_GIB = 4.0
MIN_MEMLOCK_BYTES = 2**30
IMAGE_ARCHITECTURES = {"aarch64": "arm64", "x86_64": "amd64"}
QEMU = {"arm64": "aarch64", "amd64": "x86_64"}
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


@check("container.image_architecture")
def image_architecture(facts: Facts) -> Answer:
    """Row 31."""
    images = _images(facts)
    if not isinstance(images, list):
        return images
    own = IMAGE_ARCHITECTURES.get(facts.arch or "")
    if own is None:
        return NotRead("what images call this architecture")
    foreign = [i for i in images if i.architecture not in (None, own)]
    if not foreign:
        return Ok(f"{len(images)} images, all for {own}")
    listed = "; ".join(f"{_image(i)} is for {i.architecture}" for i in foreign[:3])
    emulated = [i for i in foreign if QEMU.get(i.architecture or "") in (facts.container.emulates or [])]
    if len(emulated) == len(foreign):
        return Found(
            f"{listed}; this is {own}, and QEMU runs them",
            severity=Severity.INFO,
            cause="They run in an emulator: many times slower, and without the GPU.",
            fix=f"docker pull --platform linux/{own} {_image(foreign[0])}",
        )
    return Found(f"{listed}; this is {own}", fix=f"docker pull --platform linux/{own} {_image(foreign[0])}")


@check("container.stale_image")
def stale_image(facts: Facts) -> Answer:
    """Row 8."""
    images = _images(facts)
    if not isinstance(images, list):
        return images
    found = [
        Found(f"{tag} of {i.created or 'unknown date'}: {old.says}")
        for i in images
        for tag in i.tags
        for old in LORE.stale_image
        if tag.startswith(old.tag)
    ]
    return found or Ok(f"{len(images)} images, none under a tag that was left behind")


def _images(facts: Facts) -> list[Image] | NotApplicable | NotRead:
    c = facts.container
    if c.engine is None:
        return NO_ENGINE
    if not c.usable:
        return NotApplicable("explained by container.access", ReasonClass.CONTAINER)
    return c.images if c.images is not None else NotRead("the engine's images")


def _image(i: Image) -> str:
    return i.tags[0] if i.tags else i.digest or "an image without a tag"


def _size(value: int | None) -> str:
    if value is None:
        return "unknown"
    return "unlimited" if value == UNLIMITED else f"{value // 1024} KiB"
