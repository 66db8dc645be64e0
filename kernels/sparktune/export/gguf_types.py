"""Which GGML type each tensor of a GGUF takes, by llama.cpp's rules, so that a file is what llama-quantize would make of it.

A name such as q4_k_m is a mix: most matrices take 4 bits, a head and some layers' values and down projections 6, vectors,
norms and routers stay f32. A type whose blocks do not divide a tensor's rows falls back to another: K-quants come in blocks
of 256 values, and a hidden size of 576 has none. The rules are those of `llama_tensor_get_type` and
`tensor_allows_quantization` in llama.cpp's src/llama-quant.cpp.

A mix of one's own is a mapping of tensor names or regular expressions to types, the first that fits; what none fits follows
the rules. llama-quantize takes the same as --tensor-type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparktune.export.files import ExportError

# what users ask for -> (llama.cpp's file type, the type of most tensors)
QTYPES: dict[str, tuple[str, str]] = {
    "f32": ("ALL_F32", "F32"),
    "f16": ("MOSTLY_F16", "F16"),
    "bf16": ("MOSTLY_BF16", "BF16"),
    "q8_0": ("MOSTLY_Q8_0", "Q8_0"),
    "q6_k": ("MOSTLY_Q6_K", "Q6_K"),
    "q5_k_m": ("MOSTLY_Q5_K_M", "Q5_K"),
    "q4_k_m": ("MOSTLY_Q4_K_M", "Q4_K"),
    "q4_0": ("MOSTLY_Q4_0", "Q4_0"),
    "mxfp4": ("MOSTLY_MXFP4_MOE", "MXFP4"),
}
# types of single tensors, for mixes
TENSOR_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL",
    "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "MXFP4",
)  # fmt: skip
PLAIN = ("F32", "F16", "BF16")
# type with blocks of 256 -> the one with blocks of 32 that takes its place
SMALLER_BLOCKS = {
    "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
}  # fmt: skip
NEVER = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "per_layer_model_proj",
    "altup",
    "laurel",
    "token_types",
    "position_embd",
)
VALUES = ("attn_v.weight", "attn_qkv.weight", "attn_kv_b.weight")
HEAD, EMBEDDING = "output.weight", "token_embd.weight"


@dataclass(frozen=True)
class Shape:
    """What the rules ask of the model."""

    layers: int
    experts: int = 0
    seventy_billion: bool = False  # a Llama of 80 layers with fewer KV heads than heads


@dataclass(frozen=True)
class Plan:
    """Every tensor's type, and for those whose shape did not allow the chosen one, that."""

    types: dict[str, str]
    fallbacks: dict[str, str]


def plan_types(
    tensors: Mapping[str, Sequence[int]],
    qtype: str,
    shape: Shape,
    blocks: Mapping[str, int],
    chosen: Mapping[str, str] | None = None,
    imatrix: bool = False,
) -> Plan:
    """The types of `tensors` (GGUF name -> dimensions, row length last) in a file of `qtype`.

    blocks: values in a block of each type. chosen: a mix of one's own, over `qtype`. imatrix: whether there is one.
    Errors: ExportError for an unknown type, or an entry of `chosen` that fits no tensor.
    """
    check_qtype(qtype)
    patterns = _compiled(chosen or {}, tensors)
    default = QTYPES[qtype][1]
    rules = _Rules(qtype, shape, tensors, imatrix)
    types: dict[str, str] = {}
    fallbacks: dict[str, str] = {}
    for name in sorted(tensors, key=_order):
        dims = tensors[name]
        if not may_be_quantised(name, dims):
            types[name] = "F32"
            continue
        manual = next((kind for pattern, kind in patterns if pattern.search(name)), None)
        wanted = manual or (default if qtype in ("f32", "f16", "bf16", "q8_0") else rules.choose(name, dims, default))
        types[name] = _that_fits(wanted, dims[-1], blocks)
        if types[name] != wanted:
            fallbacks[name] = wanted
    return Plan(types, fallbacks)


def check_qtype(qtype: str) -> None:
    """Errors: ExportError for a name that is not in QTYPES."""
    if qtype not in QTYPES:
        raise ExportError(f"There is no GGUF type {qtype!r} here.", f"Use one of {', '.join(QTYPES)}.")


def may_be_quantised(name: str, dims: Sequence[int]) -> bool:
    """Whether llama.cpp stores this tensor in anything but f32."""
    return len(dims) > 1 and name.endswith("weight") and not any(part in name for part in NEVER)


def _compiled(chosen: Mapping[str, str], tensors: Mapping[str, Any]) -> list[tuple[re.Pattern[str], str]]:
    """Patterns with types as GGML spells them; a tensor's own name fits that tensor alone."""
    found = []
    for key, kind in chosen.items():
        if kind.upper() not in TENSOR_TYPES:
            raise ExportError(
                f"tensor_types gives {key!r} the type {kind!r}.", f"Use one of {', '.join(TENSOR_TYPES).lower()}."
            )
        try:
            pattern = re.compile(rf"^{re.escape(key)}$" if key in tensors else key)
        except re.error as error:
            raise ExportError(f"tensor_types has {key!r}, which is no regular expression ({error}).") from error
        fits = [name for name in tensors if pattern.search(name)]
        if not any(may_be_quantised(name, tensors[name]) for name in fits):
            raise ExportError(
                f"tensor_types has {key!r}, which fits no tensor of the model{' that is not kept in f32' if fits else ''}.",
                "Use GGUF's names, such as blk.0.attn_v.weight.",
            )
        found.append((pattern, kind.upper()))
    return found


def _that_fits(kind: str, width: int, blocks: Mapping[str, int]) -> str:
    if width % blocks[kind] == 0:
        return kind
    kind = SMALLER_BLOCKS.get(kind, kind)
    return kind if width % blocks[kind] == 0 else "F16"


def _order(name: str) -> tuple[int, str]:
    """llama.cpp goes layer by layer, what is in none first."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)


class _Rules:
    """The choice of one type after the other: some rules count the layers that came before."""

    def __init__(self, qtype: str, shape: Shape, tensors: Mapping[str, Sequence[int]], imatrix: bool) -> None:
        self.qtype, self.shape, self.imatrix = qtype, shape, imatrix
        self.head = HEAD if HEAD in tensors else EMBEDDING
        self.values = sum(any(v in name for v in VALUES) for name in tensors)
        self.value = self.down = 0

    def choose(self, name: str, dims: Sequence[int], default: str) -> str:
        if self.qtype == "mxfp4":
            return self._mxfp4(name, dims)
        if name == self.head:
            return "Q6_K" if dims[-1] % 256 == 0 or (default in ("Q4_0",) and dims[-1] % 32 == 0) else "Q8_0"
        more = self.qtype in ("q4_k_m", "q5_k_m")
        if any(v in name for v in VALUES):
            kind = "Q6_K" if more and _more_bits(self.value, self.values) else default
            if self.shape.seventy_billion and kind == "Q4_K":
                kind = "Q5_K"
            self.value += 1
            return "Q8_0" if self.shape.experts == 8 else kind
        if "attn_k.weight" in name and self.shape.experts == 8:
            return "Q8_0"
        if "ffn_down" in name:
            layer = self.down if self.shape.experts < 2 else _order(name)[0]
            self.down += 1
            if more and _more_bits(layer, self.shape.layers):
                return "Q6_K"
            if self.qtype == "q4_0" and self.imatrix and layer < self.shape.layers // 8:
                return "Q4_1"
            return default
        if "attn_output.weight" in name and self.shape.experts == 8 and self.qtype == "q4_k_m":
            return "Q5_K"
        return default

    def _mxfp4(self, name: str, dims: Sequence[int]) -> str:
        """Experts in MXFP4 and the rest in Q8_0; a model without experts has its layers' matrices in MXFP4."""
        if name in (self.head, EMBEDDING):
            return "Q8_0"
        return "MXFP4" if len(dims) > 2 or self.shape.experts < 2 else "Q8_0"


def _more_bits(layer: int, layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
