"""Which kernels ran: what an engine claims to be faster by must have been launched, and nothing of another engine's.

On a GPU an engine whose kernels did not run fell back to plain PyTorch: it failed, whatever it learnt. The counts are taken at
the launch (`sparkproof.engines.marks`, `sparktune.ops.dispatch`), never from what is installed or patched.
"""

from __future__ import annotations

from typing import Any

from sparkproof.engines.marks import COMPILED
from sparkproof.results import Assertion
from sparkproof.runners.gate_evidence import Evidence, none_left
from sparkproof.scenario import TrainScenario

NO_KERNEL = ("documents", "dequantize_4bit")  # patched modules that run no op, or another one's
# Where a family's modules run another op than the one they are patched under: (family, or any; patched as) -> op.
MERGED_OR_LATENT = ("phi3", "deepseek_v2", "deepseek_v3")  # one product for q, k and v, or latent attention's chain
RUNS = {("", "moe_mlp"): "grouped_lora"} | {(family, "lora_qkv"): "lora_linear" for family in MERGED_OR_LATENT}
RUNS |= {("phi3", "lora_mlp"): "lora_linear"}

# Part of a model -> what Liger asks for it by, and the files of liger_kernel/ops with its kernels.
LIGER = {
    "norms": (("rms_norm",), ("rms_norm",)),
    "rotations": (("rope",), ("rope",)),
    "activations": (("swiglu", "geglu"), ("swiglu", "geglu")),
    "loss": (("fused_linear_cross_entropy", "cross_entropy"), ("fused_linear_cross_entropy", "cross_entropy")),
}
# Where Unsloth has layers of its own (unsloth.models); other families run what it has torch.compile make.
UNSLOTH_LAYERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
UNSLOTH = {
    "norms": ("rms_layernorm", "qk_norm_rope"),
    "rotations": ("rope_embedding", "qk_norm_rope"),
    "activations": ("swiglu", "geglu"),
}


def kernels(s: TrainScenario, seen: Evidence) -> list[Assertion]:
    """The rules of the scenario's engine."""
    return judge_kernels(s.engine, seen.run["ran"])


def judge_kernels(engine: str, ran: dict[str, Any]) -> list[Assertion]:
    """What `Ran` of an engine must show; see `sparkproof.engines.base`."""
    if engine == "sparktune":
        return _sparktune(ran)
    if ran["mode"] != "gpu":
        return []
    marks = ran["watermarks"]
    if engine == "hf":
        return [none_left("kernels of other engines that hf launched", list(marks))]
    if engine == "liger":
        asked = {name for name, on in ran["patches"]["asked"].items() if on}
        parts = {part: files for part, (names, files) in LIGER.items() if asked & set(names)}
        return [_launched("Liger", part, files, marks) for part, files in parts.items()]
    if ran["patches"]["family"] in UNSLOTH_LAYERS:
        # In a layer that it has compiled whole, torch.compile writes some parts itself (SwiGLU's backward in 2026.10.9).
        whole = (COMPILED,) if ran["patches"].get("compiled whole") else ()
        return [_launched("Unsloth", part, (*files, *whole), marks) for part, files in UNSLOTH.items()]
    return [_launched("Unsloth", "anything", tuple(marks), marks)]


def _launched(who: str, part: str, files: tuple[str, ...], marks: dict[str, dict[str, int]]) -> Assertion:
    count = sum(sum(marks.get(f, {}).values()) for f in files)
    return Assertion(
        name=f"{who}: launches of its kernels for {part}", passed=count > 0, value=count, bound="> 0",
        detail="" if count else "It fell back to plain PyTorch, so this was not a run of that engine.",
    )  # fmt: skip


def _sparktune(ran: dict[str, Any]) -> list[Assertion]:
    """On a GPU sparktune's kernels ran and no reference stood in; on a CPU the counts must admit references."""
    marks = ran["watermarks"]
    wanted = "triton" if ran["mode"] == "gpu" else "reference"
    found = []
    report = ran["patches"]
    patched, family = report.get("patched", {}), report.get("family", "")
    expected = [
        RUNS.get((family, op), RUNS.get(("", op), op))
        for op, modules in patched.items()
        if modules and op not in NO_KERNEL
    ]
    if "rope" in expected and "qk_norm_rope" in marks:  # families with norms on the heads of q and k
        expected[expected.index("rope")] = "qk_norm_rope"
    for op in dict.fromkeys((*expected, *marks)):
        counts = marks.get(op, {})
        other = sum(n for way, n in counts.items() if way != wanted)
        found.append(
            Assertion(
                name=f"{op}: calls that ran as {'a Triton kernel' if wanted == 'triton' else 'the reference'}",
                passed=counts.get(wanted, 0) > 0 and other == 0,
                value=counts.get(wanted, 0),
                bound="> 0, and none otherwise",
                detail=f"{other} calls ran another way: {counts}." if other else "",
            )
        )
    slow = report.get("fallbacks", {})
    found.append(none_left("sparktune: reasons for which calls ran module by module", list(slow)))
    if not expected:
        found.append(Assertion(name="sparktune: modules patched", passed=False, value=0, bound="> 0"))
    return found
