"""Does bitsandbytes have code for this machine, and does it keep the weights as they are?"""

from __future__ import annotations

from sparkproof.checks.finding import Severity
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check, unanswered
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass

# NF4 of normal values is 0.09 off, relative L2; exactly right would mean that nothing was quantised.
LOWEST_ERROR, HIGHEST_ERROR = 0.02, 0.15
PRODUCT_ERROR = 0.02  # bf16 sums over 256
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


@check("bitsandbytes.round_trip")
def round_trip(facts: Facts) -> Answer:
    """Rows 4 and 24: a matrix to NF4 and back, and a layer's product and gradient with it."""
    b = facts.bitsandbytes
    if b.version is None:
        return NOT_INSTALLED
    tried = facts.tried.four_bit
    if not tried:
        return NotRead("a 4-bit round trip, which was not tried")
    found = []
    for t in tried:
        if late := unanswered(f"a 4-bit round trip on {t.device}", t.error):
            return late
        where = f"bitsandbytes {b.version} on {t.device}"
        if t.error:
            found.append(Found(f"{where}: {t.error}"))
        elif t.parameter != "Params4bit" or not t.has_statistics:
            lacks = "" if t.has_statistics else " without compress_statistics"
            found.append(
                Found(
                    f"{where}: the weight of a 4-bit layer is a {t.parameter}{lacks}",
                    cause="A version of bitsandbytes, transformers or peft replaced the parameter by a plain one.",
                )
            )
        elif t.relative_error is None or not LOWEST_ERROR < t.relative_error < HIGHEST_ERROR:
            found.append(Found(f"{where}: values come back {t.relative_error} off; NF4 gives about 0.1"))
        elif t.product_error is None or not t.product_error <= PRODUCT_ERROR:
            found.append(Found(f"{where}: a layer's product or gradient is {t.product_error} off its own weights"))
    return found or Ok(
        "; ".join(f"on {t.device}: {t.relative_error:.3f} off, its product {t.product_error:.4f}" for t in tried)
    )
