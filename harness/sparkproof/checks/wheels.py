"""Were the installed binaries built for this machine: its architecture, and torch's CUDA version?"""

from __future__ import annotations

from sparkproof.checks.finding import Severity
from sparkproof.checks.lore import LORE
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.installed import Library
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass

SHOWN = 4


@check("wheels.cuda")
def cuda(facts: Facts) -> Answer:
    """Row 20: libraries of another CUDA version, installed or loaded."""
    built = facts.torch.cuda
    if built is None:
        return NotApplicable("torch has no CUDA version to match", ReasonClass.SOFTWARE)
    wheels = facts.wheels
    if wheels.scanned is None:
        return NotRead("the installed libraries")
    major = int(built.partition(".")[0])
    other = [x for x in wheels.cuda if any(m != major for m in _majors(x))]
    absent = [x for x in other if not set(_majors(x)) <= {*wheels.cuda_majors_present, major}]
    found = []
    if absent:
        found.append(Found(_listed(absent, facts), fix=_reinstall(absent, major)))
    beside = [x for x in other if x not in absent]
    if beside:
        found.append(
            Found(
                _listed(beside, facts),
                severity=Severity.WARNING,
                cause="They load, since that CUDA version is here too, and bring a second runtime beside torch's.",
                fix=_reinstall(beside, major),
            )
        )
    loaded = [p for p in wheels.loaded if _loaded_major(p) not in (None, major)]
    if loaded:
        found.append(
            Found(
                f"torch {facts.torch.version} for CUDA {built} loaded {', '.join(loaded[:SHOWN])}",
                severity=Severity.WARNING,
                cause="The loader found another CUDA version first.",
                fix="unset LD_LIBRARY_PATH",
            )
        )
    return found or Ok(
        f"{wheels.scanned} libraries: those that need CUDA need {major}, as torch does ({len(wheels.cuda)} of them)"
    )


@check("wheels.machine")
def machine(facts: Facts) -> Answer:
    """Row 27, first half: code of another architecture."""
    wheels = facts.wheels
    if wheels.scanned is None:
        return NotRead("the installed libraries")
    if not wheels.scanned:
        return NotApplicable("no native library is installed")
    if not wheels.foreign:
        return Ok(f"{wheels.scanned} libraries, all for {facts.arch}")
    packages = list(dict.fromkeys(x.package for x in wheels.foreign))
    files = "; ".join(f"{x.file} is for {x.machine}" for x in wheels.foreign[:SHOWN])
    more = f"; and {len(wheels.foreign) - SHOWN} more" if len(wheels.foreign) > SHOWN else ""
    return Found(f"{files}{more}; this is {facts.arch}", fix=f"pip install --force-reinstall {' '.join(packages)}")


@check("wheels.missing")
def missing(facts: Facts) -> Answer:
    """Rows 12, 25, 26 and 28: required, and not there because there is no wheel of it for this architecture."""
    if facts.pins.missing is None:
        return NotRead("the installed packages' requirements")
    if not facts.packages:
        return NotApplicable("no Python package is installed", ReasonClass.SOFTWARE)
    if facts.arch != "aarch64":
        return NotApplicable(f"wheels of all of them exist for {facts.arch or 'an unknown architecture'}")
    found = []
    for text in facts.pins.missing:
        name = next((n for n in LORE.no_arm_wheel if text.split(" needs ")[-1].startswith(n)), None)
        if name:
            found.append(Found(f"{text}, which is not installed", fix=LORE.no_arm_wheel[name]))
    return found or Ok(f"nothing that is required is missing for want of an {facts.arch} wheel")


@check("wheels.vllm")
def vllm(facts: Facts) -> Answer:
    """Row 28: vLLM beside a trainer; a build without CUDA is the common form of it."""
    version = facts.packages.get("vllm")
    if version is None:
        return NotApplicable("vLLM is not installed")
    if not facts.has_nvidia_hardware:
        return NotApplicable("no NVIDIA GPU", ReasonClass.GPU)
    if facts.wheels.scanned is None:
        return NotRead("the installed libraries")
    if not any(x.package == "vllm" for x in facts.wheels.cuda):
        return Found(f"vllm {version} has no library that needs CUDA: it is the CPU build")
    if "unsloth" in facts.packages or "trl" in facts.packages:
        beside = ", ".join(n for n in ("unsloth", "trl") if n in facts.packages)
        return Found(
            f"vllm {version} stands in one environment with {beside}",
            severity=Severity.INFO,
            cause="It pins torch and transformers for itself, so that one of the two breaks at the next upgrade.",
        )
    return Ok(f"vllm {version} was built for CUDA")


def _majors(x: Library) -> list[int]:
    return sorted({int(n.rpartition(".")[2]) for n in x.needs if n.startswith(("libcudart", "libnvrtc", "libcublas"))})


def _loaded_major(path: str) -> int | None:
    name = path.rpartition("/")[2]
    tail = name.partition(".so.")[2].partition(".")[0]
    return int(tail) if name.startswith(("libcudart", "libcublas", "libnvrtc")) and tail.isdigit() else None


def _listed(libraries: list[Library], facts: Facts) -> str:
    files = "; ".join(f"{x.file} needs {', '.join(x.needs)}" for x in libraries[:SHOWN])
    more = f"; and {len(libraries) - SHOWN} more packages" if len(libraries) > SHOWN else ""
    return f"{files}{more}; torch {facts.torch.version} is for CUDA {facts.torch.cuda}"


def _reinstall(libraries: list[Library], major: int) -> str:
    """One line: what is known of a package, else its wheel for this CUDA version from PyTorch's index."""
    names = list(dict.fromkeys(x.package for x in libraries))
    known = [LORE.no_arm_wheel[n].partition("  #")[0] for n in names if n in LORE.no_arm_wheel]
    rest = " ".join(n for n in names if n not in LORE.no_arm_wheel)
    index = f"--index-url https://download.pytorch.org/whl/cu{major}0"
    return " && ".join([*known, *([f"pip install --force-reinstall --no-deps {rest} {index}"] if rest else [])])
