"""What must be true of a lock for a Spark: each rule gives the sentences of what is wrong, none if nothing is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sparkproof.facts.wheels import CUDA_LIBRARY, VERSIONED
from sparkproof.locks.lockfile import Pin, environment
from sparkproof.locks.wheel import Wheel

MACHINE = "aarch64"
CUDA_MAJOR = 13
GB10 = 121
# Left unpinned, a resolver goes back months for these rather than say that something else must move.
NAMED = ("torch", "triton", "transformers", "unsloth", "unsloth-zoo", "trl", "peft", "bitsandbytes")
NUMBERED_APART = {"cufft": 12, "cusparse": 12, "cusolver": 12}  # in CUDA 13; the others carry its own number
OTHER_CUDA = re.compile(r"-cu(?:da)?1[0-2](?:\d\d?)?$|\bcu1[12]\d?$")
NUMBERED_AS_CUDA = re.compile(
    r"cuda-(python|bindings|toolkit)|nvidia-(cuda-(runtime|nvrtc|nvcc|cccl|crt|cupti)|cublas|nvvm|nvtx|nvjitlink)"
)
COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl")  # and its headers
RUNTIME = "nvidia-cuda-runtime"
BITSANDBYTES = r"bitsandbytes/libbitsandbytes_cuda13\d\.so"


@dataclass(frozen=True)
class Seen:
    """What a rule found good, for the line that is printed; `problems` are whole sentences."""

    good: str
    problems: list[str]


def exact(wanted: Iterable[Requirement], pins: dict[str, Pin], source: str, named: tuple[str, ...] = NAMED) -> Seen:
    """Every input is an exact pin that the lock kept: nothing was quietly backtracked."""
    problems = []
    listed = list(wanted)
    for name in named:
        if name not in {canonicalize_name(r.name) for r in listed}:
            problems.append(f"{source} does not pin {name}, so a resolver may go back to an old one.")
    for requirement in listed:
        name = canonicalize_name(requirement.name)
        if [s.operator for s in requirement.specifier] != ["=="]:
            problems.append(f"{source}: {requirement} is not an exact pin.")
        elif name not in pins:
            problems.append(f"{source} pins {requirement}, and the lock has no {name}.")
        elif not requirement.specifier.contains(pins[name].version, prereleases=True):
            problems.append(f"{source} pins {requirement}, and the lock has {name} {pins[name].version}.")
    return Seen(f"{len(listed)} pins of {source} are in the lock as they stand there", problems)


def requirements(wheels: dict[str, Wheel], pins: dict[str, Pin], overridden: frozenset[str]) -> Seen:
    """Every package's own requirements hold in the lock, with the extras that something in it asks for."""
    extras: dict[str, set[str]] = {name: set() for name in wheels}
    problems: dict[str, None] = {}
    checked, changed = 0, True
    while changed:  # an extra asked for by one package opens requirements of another
        changed, checked = False, 0
        for name, wheel in wheels.items():
            for text in wheel.requires:
                requirement = Requirement(text)
                if not _active(requirement, extras[name]):
                    continue
                checked += 1
                needed = canonicalize_name(requirement.name)
                if needed in overridden:
                    continue
                if needed in extras and not requirement.extras <= extras[needed]:
                    extras[needed] |= requirement.extras
                    changed = True
                pin = pins.get(needed)
                who = f"{name} {pins[name].version} needs {needed}{requirement.specifier}"
                if pin is None:
                    problems[f"{who}, and the lock has none."] = None
                elif not requirement.specifier.contains(pin.version, prereleases=True):
                    problems[f"{who}, and the lock has {pin.version}."] = None
    return Seen(f"{checked} requirements of {len(wheels)} packages hold", list(problems))


def _active(requirement: Requirement, extras: set[str]) -> bool:
    env = environment(MACHINE)
    return requirement.marker is None or any(requirement.marker.evaluate(env | {"extra": e}) for e in extras | {""})


def torch_cuda(wheel: Wheel) -> Seen:
    """torch's wheel is a CUDA 13 build: by what it says of itself, and by what its smallest CUDA library needs."""
    try:
        stated = re.search(
            rb"^cuda(?::[^=]*)?\s*=\s*['\"]?([\d.]+|None)", wheel.read(r"torch/version\.py"), re.MULTILINE
        )
    except KeyError:
        stated = None
    version = stated.group(1).decode() if stated else "no CUDA version"
    problems = []
    if version.partition(".")[0] != str(CUDA_MAJOR):
        problems.append(f"{wheel.file.name} is built for {'CUDA ' if stated else ''}{version}, not CUDA {CUDA_MAJOR}.")
    needs: set[str] = set()
    for library in wheel.libraries(deep=False):
        if library.name == "torch/lib/libtorch_global_deps.so":
            needs = {n for n in library.needed or () if n.startswith("libcudart.so")}
    if needs != {f"libcudart.so.{CUDA_MAJOR}"}:
        problems.append(f"{wheel.file.name}: libtorch_global_deps.so needs {sorted(needs) or 'no CUDA runtime'}.")
    return Seen(f"{wheel.file.name} is built for CUDA {version} and needs {', '.join(sorted(needs))}", problems)


def bitsandbytes_code(wheel: Wheel) -> Seen:
    """bitsandbytes' CUDA 13 library carries machine code for GB10."""
    member = wheel.member(BITSANDBYTES)
    if member is None:
        return Seen("", [f"{wheel.file.name} has no library for CUDA {CUDA_MAJOR}."])
    code, _ = wheel.gpu_code(BITSANDBYTES)
    listed = ", ".join(f"sm_{n}" for n in sorted(code)) or "none"
    problem = f"{wheel.file.name}: {member.filename} has machine code for {listed}, and none for sm_{GB10}."
    return Seen(f"{member.filename} has machine code for {listed}", [] if GB10 in code else [problem])


def cuda_release(pins: dict[str, Pin]) -> Seen:
    """Every package that carries CUDA's own number is of CUDA 13."""
    numbered = [p for name, p in pins.items() if NUMBERED_AS_CUDA.fullmatch(name)]
    problems = [
        f"{p.name} {p.version} is of another CUDA than {CUDA_MAJOR}." for p in numbered if p.version.major != CUDA_MAJOR
    ]
    return Seen(f"{len(numbered)} packages numbered as CUDA is are {CUDA_MAJOR}", problems)


def one_compiler(pins: dict[str, Pin]) -> Seen:
    """nvcc and its headers are of the runtime's own release: PTX of a later one is refused by a driver of this one."""
    wanted = pins[RUNTIME].version.release[:2]
    found = [pins[name] for name in COMPILER if name in pins]
    release = ".".join(map(str, wanted))
    problems = [
        f"{p.name} {p.version} is not of CUDA {release}, of which the runtime is: name it among the inputs."
        for p in found if p.version.release[:2] != wanted
    ]  # fmt: skip
    return Seen(f"nvcc and its headers, {len(found)} packages, are of CUDA {release}, as the runtime is", problems)


@dataclass(frozen=True)
class Native:
    """What the libraries of some wheels were built for."""

    libraries: int
    partly: int  # of which only the architecture was read
    problems: list[str]


def native(name: str, wheel: Wheel, deep: bool) -> Native:
    """Every library inside is for aarch64, and none is of, or needs, another CUDA than 13."""
    problems, count, partly = [], 0, 0
    if OTHER_CUDA.search(name):
        problems.append(f"{name} is a library of another CUDA than {CUDA_MAJOR}.")
    for library in wheel.libraries(deep):
        count += 1
        partly += library.needed is None
        if library.machine != MACHINE:
            problems.append(f"{wheel.file.name}: {library.name} is for {library.machine}.")
        problems += _other_cuda(wheel, library.name, library.needed or ())
    return Native(count, partly, problems)


def all_native(parts: list[Native]) -> Seen:
    """The wheels of a lock together."""
    partly = sum(p.partly for p in parts)
    how = f"; of {partly} large ones only the architecture was read" if partly else ""
    good = f"{sum(p.libraries for p in parts)} libraries in {len(parts)} wheels are for {MACHINE} and CUDA {CUDA_MAJOR}{how}"
    return Seen(good, [x for p in parts for x in p.problems])


def _other_cuda(wheel: Wheel, name: str, needed: tuple[str, ...]) -> list[str]:
    base = name.rpartition("/")[2]
    if VERSIONED.search(base):  # one of several, chosen from by torch's CUDA version
        return []
    own = CUDA_LIBRARY.match(base)
    found = [n for n in needed if (m := CUDA_LIBRARY.fullmatch(n)) and _foreign(m.group(1), int(m.group(2)))]
    problems = [f"{wheel.file.name}: {name} needs {n}." for n in found]
    if own and _foreign(own.group(1), int(own.group(2))):
        problems.append(f"{wheel.file.name} brings {base}.")
    return problems


def _foreign(library: str, major: int) -> bool:
    return major != NUMBERED_APART.get(library, CUDA_MAJOR)
