"""`python -m sparktune.export FORMAT --base DIR [--adapter DIR] --out PATH`: every export from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparktune.export.bases import find_base
from sparktune.export.files import ExportError
from sparktune.export.gguf_types import QTYPES

FORMATS = {
    "adapter": "the LoRA adapter, for PEFT",
    "merged_16bit": "merged safetensors, for transformers",
    "merged_4bit": "merged, then quantised to NF4, for transformers",
    "gguf": "for llama.cpp",
    "lora_gguf": "the adapter, for llama.cpp",
    "ollama": "GGUF and Modelfile",
    "vllm": "merged safetensors with all end tokens",
    "vllm_adapter": "the adapter, for vLLM",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    formats = "".join(f"\n  {name:<14}{what}" for name, what in FORMATS.items())
    made = argparse.ArgumentParser(
        prog="python -m sparktune.export",
        description=f"Take a fine-tuned model off this machine. FORMAT is one of:{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("format", choices=list(FORMATS), metavar="FORMAT")
    made.add_argument("--base", required=True, help="the 16-bit base: a folder, or a hub id")
    made.add_argument("--revision", help="of the base, where it is a hub id")
    made.add_argument("--adapter", type=Path, help="folder of the LoRA adapter to merge")
    made.add_argument("--out", type=Path, required=True, help="file (gguf, lora_gguf) or folder to make")
    made.add_argument("--type", default=None, help=f"of a GGUF: {', '.join(QTYPES)}")
    made.add_argument("--tensor-types", type=Path, help="JSON file of GGUF tensor name or pattern -> type")
    made.add_argument("--imatrix", type=Path, help="llama.cpp's importance matrix")
    made.add_argument("--system", default=None, help="system prompt of the Modelfile")
    made.add_argument("--parameter", action="append", default=[], metavar="NAME=VALUE", help="of the Modelfile")
    made.add_argument("--stop", action="append", default=[], help="of the Modelfile, besides the model's own")
    made.add_argument("--card", action="store_true", help="write README.md into the folder")
    return made


ONLY_FOR = {
    "type": ("gguf", "lora_gguf", "ollama"),
    "tensor_types": ("gguf", "ollama"),
    "imatrix": ("gguf", "ollama"),
    "system": ("ollama",),
    "parameter": ("ollama",),
    "stop": ("ollama",),
}
NEED_ADAPTER = ("adapter", "lora_gguf", "vllm_adapter")


def main(arguments: Sequence[str] | None = None) -> int:
    """Export; 0, or 2 with one sentence on standard error."""
    asked = parser().parse_args(arguments)
    try:
        _check(asked)
        done = _export(asked)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(done.to_json(), indent=2))
    return 0


def _check(asked: argparse.Namespace) -> None:
    """Errors: ExportError for an option that this format has no use for, or lacks."""
    for name, formats in ONLY_FOR.items():
        if getattr(asked, name) and asked.format not in formats:
            raise ExportError(f"--{name.replace('_', '-')} is not for {asked.format}.", "Leave it out.")
    if asked.format in NEED_ADAPTER and asked.adapter is None:
        raise ExportError(f"{asked.format} needs an adapter.", "Give --adapter FOLDER.")
    if asked.card and asked.format in ("gguf", "lora_gguf"):
        raise ExportError(f"--card is for folders, and {asked.format} is a file.", "Leave it out.")


def _export(asked: argparse.Namespace) -> Any:
    from sparktune import export

    base = find_base(asked.base, asked.revision)
    hub_id = "" if Path(asked.base).is_dir() else asked.base
    with export.terminal_bar(asked.format) as progress:
        gguf: dict[str, Any] = {
            "imatrix": asked.imatrix,
            "progress": progress,
            "tensor_types": _types(asked.tensor_types),
        }
        match asked.format:
            case "adapter":
                done = export.export_adapter(base, asked.adapter, asked.out, hub_id)
            case "merged_16bit":
                done = export.export_merged(base, asked.adapter, asked.out, progress=progress)
            case "merged_4bit":
                done = export.export_merged_4bit(base, asked.adapter, asked.out, progress=progress)
            case "gguf":
                done = export.export_gguf(base, asked.out, asked.type or "q8_0", asked.adapter, **gguf)
            case "lora_gguf":
                done = export.export_lora_gguf(base, asked.adapter, asked.out, asked.type or "f16")
            case "ollama":
                done = export.export_ollama(
                    base, asked.out, asked.type or "q4_k_m", asked.adapter, system=asked.system or "",
                    parameters=_parameters(asked.parameter), stops=asked.stop, **gguf,
                )  # fmt: skip
            case "vllm":
                done = export.export_vllm(base, asked.adapter, asked.out, progress=progress)
            case _:
                done = export.export_vllm_adapter(base, asked.adapter, asked.out, hub_id)
    if asked.card:
        export.write_card(asked.out, asked.base, base=base, adapter=asked.adapter, done=done)
    return done


def _types(path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} can't be read as JSON ({error}).", "Give an object of names and types.") from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ExportError(f"{path} is no object of names and types.", 'Write {"attn_v": "q6_k"}.')
    return found


def _parameters(pairs: Sequence[str]) -> dict[str, float]:
    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError as error:
            raise ExportError(f"--parameter {pair} is no NAME=NUMBER.", "Write --parameter temperature=0.7.") from error
    return found


if __name__ == "__main__":
    sys.exit(main())
