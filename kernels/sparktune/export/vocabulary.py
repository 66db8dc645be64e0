"""A byte-level BPE tokenizer as llama.cpp wants it: tokens, types, merges, and the name of a pre-tokenizer.

A GGUF does not carry the pre-tokenizer's rules, only a name that selects rules compiled into llama.cpp. A wrong name
still loads and still answers, with other tokens than the model was trained on: digits, contractions and CJK split
elsewhere. So the name is never guessed from the model's name or its vocabulary. `PRE_TOKENIZERS` lists definitions as
the `tokenizers` library serialises them; one that is not in the list is an error.

Token types (llama.cpp's llama_token_type): 1 normal, 3 control (special: `<|im_end|>`), 4 user defined (added, but
plain text), 5 unused (rows of the embedding that no token has).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparktune.export.files import ExportError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_BYTES_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
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


@dataclass(frozen=True)
class Vocabulary:
    """Everything a GGUF says about the tokenizer."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]  # bos, eos, unk, pad -> id
    add_bos: bool
    add_eos: bool
    chat_template: str

    @classmethod
    def read(cls, folder: Path, rows: int) -> Vocabulary:
        """The tokenizer of `folder` for an embedding of `rows` rows. Errors: ExportError if a GGUF can't hold it."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            definition = json.loads(tokenizer.backend_tokenizer.to_str())
        except (OSError, ValueError, AttributeError) as error:
            raise ExportError(
                f"{folder} has no readable fast tokenizer ({error}).", "Save the tokenizer beside the model."
            ) from error
        pre = pre_tokenizer(definition)
        tokens, types = _tokens(definition, rows)
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if full not in (plain, [bos, *plain], [*plain, eos], [bos, *plain, eos]):
            raise ExportError(
                f"The tokenizer adds tokens that a GGUF can't express ('a' becomes {full}, without specials {plain}).",
                "Use a tokenizer that adds nothing but its beginning and end token.",
            )
        template = tokenizer.chat_template or ""
        if not isinstance(template, str):
            raise ExportError("The tokenizer has several named chat templates.", "Keep one, as a string.")
        special = {"bos": bos, "eos": eos, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
        return cls(
            pre=pre,
            tokens=tokens,
            types=types,
            merges=[m if isinstance(m, str) else " ".join(m) for m in definition["model"]["merges"]],
            special={k: int(v) for k, v in special.items() if v is not None},
            add_bos=bos is not None and full[0] == bos and plain[0] != bos,
            add_eos=eos is not None and full[-1] == eos and plain[-1] != eos,
            chat_template=template,
        )


def pre_tokenizer(definition: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a serialised tokenizer. Errors: ExportError when unknown."""
    model = definition.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise ExportError(
            f"The tokenizer is {model.get('type')}, not byte-level BPE.",
            "Only byte-level BPE is exported to GGUF here.",
        )
    if definition.get("normalizer"):
        raise ExportError(
            f"The tokenizer normalises its text ({definition['normalizer'].get('type')}), which no known one does.",
            "Export a merged folder instead; llama.cpp would tokenise otherwise.",
        )
    step = definition.get("pre_tokenizer") or {}
    steps = [
        {k: v for k, v in s.items() if k != "trim_offsets"}  # offsets are not tokens
        for s in (step.get("pretokenizers", [step]) if step else [])
    ]
    ignore_merges = bool(model.get("ignore_merges"))
    for name, known, ignores in PRE_TOKENIZERS:
        if steps == known and ignores == ignore_merges:
            return name
    raise ExportError(
        f"The tokenizer's pre-tokenizer is not known: {json.dumps(steps)[:300]} with ignore_merges={ignore_merges}.",
        f"Known: {', '.join(name for name, _, _ in PRE_TOKENIZERS)}. A guess would change the tokens silently.",
    )


def _tokens(definition: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Token and type of every embedding row."""
    names: dict[int, tuple[str, int]] = {i: (t, NORMAL) for t, i in definition["model"]["vocab"].items()}
    for added in definition.get("added_tokens", []):
        names[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if max(names) >= rows:
        raise ExportError(
            f"The tokenizer has {max(names) + 1} tokens and the model's embedding {rows} rows.",
            "Export with the tokenizer that belongs to the model.",
        )
    padded = [names.get(i, (f"[PAD{i}]", UNUSED)) for i in range(rows)]
    return [t for t, _ in padded], [kind for _, kind in padded]
