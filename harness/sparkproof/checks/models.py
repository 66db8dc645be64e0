"""The models that lie ready: will the installed software take them, and the fast way?

One that it will not take is no fault of the machine, which may never be asked for it: nothing here is an error.
"""

from __future__ import annotations

from sparkproof.checks.lore import LORE
from sparkproof.checks.registry import Answer, Found, NotApplicable, NotRead, Ok, check
from sparkproof.facts.model import Facts
from sparkproof.results import ReasonClass

# YaRN's and LongRoPE's factors are 1 plus a fraction of a logarithm: 1.2 for a context 32 times longer.
HIGHEST_FACTOR = 4.0
NO_MODELS = NotApplicable("no model lies in the hub's cache")


@check("models.attention_factor")
def attention_factor(facts: Facts) -> Answer:
    """Row 3, by its cause."""
    if facts.hub_cache.path is None:
        return NotRead("the hub's cache")
    if not facts.hub_cache.models:
        return NO_MODELS
    found = [
        Found(f"{m.repository}: rope_scaling.attention_factor is {m.attention_factor:g}", fix=_again(m.repository))
        for m in facts.hub_cache.models
        if m.attention_factor is not None and m.attention_factor > HIGHEST_FACTOR
    ]
    return found or Ok(f"{len(facts.hub_cache.models)} models, none with a factor over {HIGHEST_FACTOR:g}")


@check("models.unknown_type")
def unknown_type(facts: Facts) -> Answer:
    """Row 58, first half."""
    if facts.hub_cache.path is None:
        return NotRead("the hub's cache")
    if not facts.hub_cache.models:
        return NO_MODELS
    version = facts.packages.get("transformers")
    if version is None:
        return NotApplicable("transformers is not installed", ReasonClass.SOFTWARE)
    unknown = [m for m in facts.hub_cache.models if m.known is False]
    if unknown:
        listed = ", ".join(f"{m.repository} ({m.model_type})" for m in unknown)
        return Found(f"transformers {version} does not know {listed}")
    return Ok(f"transformers {version} knows all {len(facts.hub_cache.models)} models in the cache")


@check("models.fast_path")
def fast_path(facts: Facts) -> Answer:
    """Row 27, second half: hybrids fall back to plain PyTorch without a word."""
    if facts.hub_cache.path is None:
        return NotRead("the hub's cache")
    hybrids = [m for m in facts.hub_cache.models if (m.model_type or "").removesuffix("_text") in LORE.fast_path]
    if not hybrids:
        return NotApplicable("no model with linear attention or state spaces lies in the hub's cache")
    if facts.gpu is None:
        return NotApplicable("no NVIDIA GPU", ReasonClass.GPU)
    found = []
    for m in hybrids:
        wanted = LORE.fast_path[(m.model_type or "").removesuffix("_text")]
        absent = [name for name in wanted if name not in facts.packages]
        if absent:
            found.append(
                Found(
                    f"{m.repository} ({m.model_type}) wants {', '.join(absent)}",
                    fix=f"TORCH_CUDA_ARCH_LIST='12.0+PTX' pip install --no-build-isolation {' '.join(absent)}",
                )
            )
    return found or Ok(f"{len(hybrids)} hybrid models have what their fast path needs")


@check("models.kernel_build")
def kernel_build(facts: Facts) -> Answer:
    """Row 11: kernels from the hub, without a build for this machine."""
    if facts.hub_cache.path is None:
        return NotRead("the hub's cache")
    if "kernels" not in facts.packages:
        return NotApplicable("the package 'kernels' is not installed")
    if not facts.hub_cache.kernels:
        return NotApplicable("no compiled kernel lies in the hub's cache")
    if facts.arch is None or facts.torch.version is None:
        return NotRead("the architecture and the version of torch")
    short = "torch" + "".join(facts.torch.version.split("+")[0].split(".")[:2])
    found = [
        Found(f"{name} has {', '.join(builds)}; none is for {short} on {facts.arch}")
        for name, builds in sorted(facts.hub_cache.kernels.items())
        if not any(_suits(b, short, facts.arch) for b in builds)
    ]
    return found or Ok(f"{', '.join(facts.hub_cache.kernels)}: each has a build for {short} on {facts.arch}")


def _suits(build: str, short: str, arch: str) -> bool:
    """'torch210-cxx11-cu130-aarch64-linux', or 'torch-universal', which is Python alone."""
    return "universal" in build or build == "torch-cuda" or (build.startswith(f"{short}-") and arch in build)


def _again(repository: str) -> str:
    original = "microsoft/Phi-3.5-mini-instruct" if "phi-3.5-mini" in repository.lower() else repository
    return f"hf download {original}"
