"""What each export format is: the tensor types it may hold, how exact those are, and who reads it.

K-quants (Q4_K, Q5_K, Q6_K) store 256 weights at a time, the others 32. Where a row is no multiple of 256, llama.cpp falls back
(Q4_K to Q5_0, Q5_K to Q5_1, Q6_K to Q8_0), and where it is none of 32 to F16, without an error: so every tensor's type is
asserted. `q4_k_m` and `q5_k_m` are mixes by design: what matters most takes Q6_K.
"""

from __future__ import annotations

from dataclasses import dataclass, field

SUPER_BLOCK, BLOCK = 256, 32
# Bits a weight, scales included: Q8_0 is 34 bytes for 32 weights, Q4_K 144 for 256, Q6_K 210 for 256 ...
BITS = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_K": 5.5, "Q5_1": 6.0, "Q5_0": 5.5, "Q4_K": 4.5,
    "Q4_1": 5.0, "Q4_0": 4.5, "MXFP4": 4.25, "U8": 8.0, "I8": 8.0, "I32": 32.0,
}  # fmt: skip
# Largest relative L2 error that rounding a matrix to the type makes: twice what a normal distribution of weights gets.
ROUNDING = {
    "F32": 1e-6, "F16": 4e-4, "BF16": 3e-3, "Q8_0": 0.015, "Q6_K": 0.04, "Q5_K": 0.07, "Q5_1": 0.07, "Q5_0": 0.08,
    "Q4_K": 0.14, "Q4_1": 0.14, "Q4_0": 0.16, "MXFP4": 0.25, "U8": 0.16,
}  # fmt: skip
WHOLE = frozenset({"F32", "F16", "BF16"})  # types whose rounding hardly shows
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Format:
    """One format."""

    consumers: tuple[str, ...]
    main: str = ""  # the type that most weights take; empty where the base decides
    mixed: frozenset[str] = field(default_factory=frozenset)  # others that it takes on purpose


LLAMA = ("llama.cpp",)
FORMATS = {
    "adapter": Format(("peft", "vllm")),
    "merged_16bit": Format(("transformers", "vllm")),
    "gguf_f32": Format(LLAMA, "F32"),
    "gguf_f16": Format(LLAMA, "F16"),
    "gguf_bf16": Format(LLAMA, "BF16"),
    "gguf_q8_0": Format(LLAMA, "Q8_0"),
    "gguf_q6_k": Format(LLAMA, "Q6_K"),
    "gguf_q5_k_m": Format(LLAMA, "Q5_K", frozenset({"Q6_K"})),
    "gguf_q4_k_m": Format(LLAMA, "Q4_K", frozenset({"Q6_K", "Q5_K"})),
    "gguf_q4_0": Format(LLAMA, "Q4_0", frozenset({"Q6_K"})),
    "gguf_mxfp4": Format(LLAMA, "MXFP4", frozenset({"Q8_0"})),
    "ollama_q8_0": Format(("ollama",), "Q8_0"),
}


def quantised(format_: str) -> bool:
    """Whether it is a GGUF whose weights lose what can be seen."""
    return format_.startswith("gguf_") and FORMATS[format_].main not in WHOLE


def allowed(format_: str, row: int) -> set[str]:
    """Types that a matrix with rows of `row` weights may have in a GGUF of this format."""
    made = FORMATS[format_]
    found = {_fitting(kind, row) for kind in {made.main, *made.mixed}}
    return found


def _fitting(kind: str, row: int) -> str:
    """The type, or what llama.cpp takes in its place for rows of this length."""
    if kind.startswith("F") or kind == "BF16":
        return kind
    if kind.endswith("_K") and row % SUPER_BLOCK:
        kind = FALLBACK[kind]
    return kind if row % (SUPER_BLOCK if kind.endswith("_K") else BLOCK) == 0 else "F16"


def fits(format_: str, consumer: str) -> bool:
    """Whether the consumer reads the format."""
    return consumer in FORMATS[format_].consumers
