"""What llama.cpp has to know of a tokenizer that its converter does not recognise: the name of its pre-tokenizer.

A GGUF does not carry the pre-tokenizer's rules, only a name that selects rules compiled into llama.cpp. A wrong name
still loads and still answers, with other tokens than the model was trained on: digits, contractions and CJK split
elsewhere. llama.cpp's converter knows the tokenizers of published models by a hash of what they make of a text; one with other
merges has another hash. So the name is told by the rules: `PRE_TOKENIZERS` lists definitions as the `tokenizers` library
serialises them, and one that is not in the list is an error, not a guess.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sparktune.export.files import ExportError

_BYTES_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen's: llama.cpp takes its text as it comes, which is the same for text that is in Unicode's NFC already.
QWEN2 = [
    {
        "type": "Split",
        "pattern": {"Regex": _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")},
        "behavior": "Isolated",
        "invert": False,
    },
    _BYTES_ONLY,
]
# (name in llama.cpp, steps of the pre-tokenizer, whether whole words in the vocabulary skip the merges)
PRE_TOKENIZERS: list[tuple[str, list[dict[str, Any]], bool]] = [
    ("gpt-2", [_BYTES_GPT2], False),
    ("smollm", [{"type": "Digits", "individual_digits": True}, _BYTES_GPT2], False),
    (
        "llama-bpe",
        [
            {"type": "Split", "pattern": {"Regex": _LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
            _BYTES_ONLY,
        ],
        True,
    ),
]


def pre_tokenizer(definition: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a serialised tokenizer. Errors: ExportError when unknown."""
    model = definition.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise ExportError(
            f"The tokenizer is {model.get('type')}, not byte-level BPE.",
            "Only byte-level BPE is exported to GGUF here.",
        )
    steps = [{k: v for k, v in s.items() if k != "trim_offsets"} for s in _steps(definition)]  # offsets are not tokens
    ignore_merges = bool(model.get("ignore_merges"))
    if definition.get("normalizer") == {"type": "NFC"} and steps == QWEN2 and not ignore_merges:
        return "qwen2"
    if definition.get("normalizer"):
        raise ExportError(
            f"The tokenizer normalises its text ({definition['normalizer'].get('type')}), which no known one does.",
            "Export a merged folder instead; llama.cpp would tokenise otherwise.",
        )
    for name, known, ignores in PRE_TOKENIZERS:
        if steps == known and ignores == ignore_merges:
            return name
    raise ExportError(
        f"The tokenizer's pre-tokenizer is not known: {json.dumps(steps)[:300]} with ignore_merges={ignore_merges}.",
        f"Known: {', '.join(name for name, _, _ in PRE_TOKENIZERS)}. A guess would change the tokens silently.",
    )


def byte_level(folder: Path) -> bool:
    """Whether the folder's tokenizer is byte-level BPE, as GPT-2's was."""
    definition = _definition(folder)
    model = definition.get("model") or {}
    in_bytes = any(s.get("type") == "ByteLevel" for s in _steps(definition))
    return model.get("type") == "BPE" and not model.get("byte_fallback") and in_bytes


def _definition(folder: Path) -> dict[str, Any]:
    """What tokenizer.json says; nothing where there is none."""
    file = folder / "tokenizer.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _steps(definition: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizer's steps, of a sequence or alone."""
    step = definition.get("pre_tokenizer") or {}
    return list(step.get("pretokenizers", [step])) if step else []


PHI3 = re.compile("phi-?3", re.IGNORECASE)
PHI3_TOKENS = frozenset({"</s>", "<unk>", "<s>", "<|endoftext|>"})


def name_for(name: str, folder: Path) -> str:
    """The name of a model that makes llama.cpp tokenise as its tokenizer does.

    Where general.name has "phi-3" or "phi3" in it, and nowhere else, llama.cpp drops the white space right of special tokens, as
    Phi-3's tokenizer does, and refuses a vocabulary without Phi-3's tokens, such as Phi-4's
    (https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp). So a fine-tune that is named otherwise gets the word, and a
    model that only is named so loses it.
    """
    added = _definition(folder).get("added_tokens", [])
    has_them = PHI3_TOKENS.issubset(t["content"] for t in added)
    strips = has_them and any(t["special"] and t["rstrip"] for t in added)
    if strips and not PHI3.search(name):
        return f"{name} (Phi-3)"
    return name if strips else PHI3.sub("Phi 3", name)


def adds_ends(folder: Path) -> dict[str, bool]:
    """What llama.cpp has to put before and after a text, as GGUF's keys. Errors: ExportError if a GGUF can't say it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder} has no readable tokenizer ({error}).", "Save it beside the model.") from error
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if full not in (plain, [bos, *plain], [*plain, eos], [bos, *plain, eos]):
        raise ExportError(
            f"The tokenizer adds tokens that a GGUF can't express ('a' becomes {full}, without specials {plain}).",
            "Use a tokenizer that adds nothing but its beginning and end token.",
        )
    return {
        "tokenizer.ggml.add_bos_token": full != plain and full[0] == bos,
        "tokenizer.ggml.add_eos_token": full != plain and full[-1] == eos,
    }
