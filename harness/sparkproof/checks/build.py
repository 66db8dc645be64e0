"""Would a build from source work here? Only where there is a toolkit to build with."""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass

GIB_A_JOB = 6.0  # what one cicc or cudafe++ takes at its peak
CMAKE_FOR_FAMILIES = Version("4.0")  # the first that knows CUDA architectures with a letter, such as 121f
NO_TOOLKIT = NotApplicable("no CUDA toolkit, so nothing is built from source")


@check("build.jobs")
def jobs(facts: Facts) -> Answer:
    """Row 30: as many compilers at once as there is memory for."""
    if facts.cuda.nvcc is None:
        return NO_TOOLKIT
    available, cores = facts.memory.available_gib, facts.cpu.cores
    if available is None or cores is None:
        return NotRead("MemAvailable and the number of cores")
    most = max(1, int(available / GIB_A_JOB))
    sum_ = f"{available:.0f} GiB available / {GIB_A_JOB:.0f} GiB a job = {most} jobs"
    text = facts.env.get("MAX_JOBS", "").strip()
    if not text:
        return Ok(f"{sum_}; MAX_JOBS is not set, so a build would start {cores}: set MAX_JOBS={min(most, 8)} for one")
    if not text.isdigit():
        return Found(f"MAX_JOBS={text} is not a number; {sum_}", fix=f"export MAX_JOBS={min(most, 8)}")
    if int(text) > most:
        return Found(f"MAX_JOBS={text}; {sum_}", fix=f"export MAX_JOBS={min(most, 8)}")
    return Ok(f"MAX_JOBS={text}; {sum_}")


@check("build.headers")
def headers(facts: Facts) -> Answer:
    """Row 30: headers that CUDA 13 moved."""
    if facts.cuda.nvcc is None:
        return NO_TOOLKIT
    there = facts.pins.cuda_headers
    if not there:
        return NotRead("the toolkit's headers")
    gone = [name for name, found in there.items() if not found]
    if gone:
        return Found(f"CUDA {facts.cuda.version or '?'} at {facts.cuda.nvcc} lacks {', '.join(gone)}")
    return Ok(f"{', '.join(there)} are there")


@check("build.cmake")
def cmake(facts: Facts) -> Answer:
    """Row 30: architectures with a letter need CMake 4."""
    if facts.cuda.nvcc is None:
        return NO_TOOLKIT
    if not facts.is_target:
        return NotApplicable("only GB10's own architectures, 121a and 121f, have a letter that older ones do not know")
    version = facts.pins.cmake
    if version is None:
        return Ok("CMake is not installed; whatever builds with it brings or asks for its own")
    if _older(version):
        return Found(f"CMake {version} does not know CUDA architecture 121f")
    return Ok(f"CMake {version}")


@check("build.toolkit")
def toolkit(facts: Facts) -> Answer:
    """Row 60: instructions that say CUDA 12 beside a torch for CUDA 13."""
    if facts.cuda.nvcc is None:
        return NO_TOOLKIT
    if facts.torch.cuda is None:
        return NotApplicable("torch has no CUDA version to match", ReasonClass.SOFTWARE)
    if facts.cuda.version is None:
        return NotRead("the toolkit's version")
    theirs, ours = facts.cuda.version.partition(".")[0], facts.torch.cuda.partition(".")[0]
    seen = f"the toolkit is CUDA {facts.cuda.version} ({facts.cuda.nvcc}), torch {facts.torch.version} is for {facts.torch.cuda}"
    return Ok(seen) if theirs == ours else Found(seen, fix=f"sudo apt install cuda-toolkit-{ours}-0")


def _older(version: str) -> bool:
    try:
        return Version(version) < CMAKE_FOR_FAMILIES
    except InvalidVersion:
        return False
