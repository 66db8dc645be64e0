"""Does bitsandbytes have code for this machine, and does it keep the weights as they are?"""

from __future__ import annotations

from sparkproof.checks.finding import Severity
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass

NOT_INSTALLED = NotApplicable("bitsandbytes is not installed", ReasonClass.SOFTWARE)


@check("bitsandbytes.avx512_repack")
def avx512_repack(facts: Facts) -> Answer:
    """Bites only layers on the CPU: with a usable GPU it is told for information."""
    b = facts.bitsandbytes
    if b.version is None:
        return NOT_INSTALLED
    if facts.arch is not None and facts.arch != "x86_64":
        return NotApplicable(f"AVX512 is a feature of x86_64; this is {facts.arch}")
    if facts.cpu.avx512_bf16 is None or b.repacks_on_avx512_bf16 is None:
        return NotRead("the CPU's features, or the source of bitsandbytes")
    if not facts.cpu.avx512_bf16:
        return Ok(f"{facts.cpu.model or 'the CPU'} has no AVX512-BF16")
    if not b.repacks_on_avx512_bf16:
        return Ok(f"bitsandbytes {b.version} does not repack")
    gpu = facts.gpu is not None and facts.gpu.usable_by_torch
    return Found(
        f"{facts.cpu.model or 'the CPU'} has AVX512-BF16, and bitsandbytes {b.version} repacks for it"
        f"{'; a GPU is there, so only layers that stay on the CPU are meant' if gpu else ''}",
        severity=Severity.INFO if gpu else None,
    )


@check("bitsandbytes.cuda_library")
def cuda_library(facts: Facts) -> Answer:
    """Row 24: it picks a library of torch's CUDA version, or another of the same major version."""
    b, cuda = facts.bitsandbytes, facts.torch.cuda
    if b.version is None:
        return NOT_INSTALLED
    if not facts.has_nvidia_hardware:
        return NotApplicable("no NVIDIA GPU", ReasonClass.GPU)
    if cuda is None:
        return NotApplicable("torch has no CUDA version to match", ReasonClass.SOFTWARE)
    if not b.libraries:
        return NotRead("the libraries of bitsandbytes")
    forced = facts.env.get("BNB_CUDA_VERSION", "")
    wanted = forced or cuda.replace(".", "")
    shipped = sorted(x.removeprefix("cuda") for x in b.libraries if x.startswith("cuda"))
    seen = f"bitsandbytes {b.version} ships CUDA {', '.join(shipped) or 'none'}; torch has {cuda}"
    if forced and forced not in shipped:
        return Found(f"{seen}; BNB_CUDA_VERSION asks for {forced}", fix="unset BNB_CUDA_VERSION")
    if not any(x[:2] == wanted[:2] for x in shipped):
        return Found(seen)
    return Ok(seen)
