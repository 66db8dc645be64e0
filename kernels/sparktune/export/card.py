"""A model card: README.md of an exported folder, in the hub's form (https://huggingface.co/docs/hub/model-cards).

It says what was made of what, and how to load it. What nobody measured is not in it.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparktune.export.checkpoint import INDEX, SINGLE
from sparktune.export.files import ExportError
from sparktune.export.hf import Exported
from sparktune.export.lora import CONFIG
from sparktune.export.ollama import MODELFILE

README = "README.md"
_LORA = ("r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "target_parameters", "modules_to_save")


def write_card(
    folder: Path,
    base_name: str,
    *,
    base: Path | None = None,
    adapter: Path | None = None,
    done: Exported | None = None,
    title: str = "",
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write README.md into an exported `folder`, whose files tell its format.

    base_name: hub id or name of the base; base: its folder, whose card's licence and language are taken over. adapter: for LoRA's
    settings. done: the export's account, for tensor types and notes. training: what the user wants said of it, as a table.
    Errors: ExportError where the folder holds no export.
    """
    kind, usage = _kind(folder)
    settings = json.loads((adapter / CONFIG).read_text(encoding="utf-8")) if adapter is not None else {}
    data = _front_matter(base_name, base, kind)
    lines = [f"# {title or folder.name}", "", f"Fine-tuned from {base_name} and exported as {kind} by sparktune.", ""]
    if kind != "a LoRA adapter" and settings:
        lines += ["The LoRA adapter was added to the 16-bit base in fp32, and each weight rounded once.", ""]
    if settings:
        rows = {key: settings[key] for key in _LORA if settings.get(key) not in (None, [], False)}
        lines += ["## Adapter", "", *_table(rows), ""]
    if training:
        lines += ["## Training", "", *_table(training), ""]
    if done is not None and done.types:
        counts = Counter(done.types.values())
        lines += ["## Tensor types", "", *_table({k: f"{n} tensors" for k, n in counts.most_common()}), ""]
    if done is not None and done.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in done.notes), ""]
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft", "torch")}
    lines += ["## Use", "", *usage, "", "## Made with", "", *_table(versions), ""]
    path = folder / README
    path.write_text(f"---\n{data}\n---\n\n" + "\n".join(lines), encoding="utf-8")
    return path


def _kind(folder: Path) -> tuple[str, list[str]]:
    """What the folder holds, and how it is loaded."""
    gguf = sorted(f.name for f in folder.glob("*.gguf"))
    if (folder / MODELFILE).is_file():
        return "GGUF for Ollama", [
            "```",
            f"ollama create {folder.name} -f {MODELFILE}",
            f"ollama run {folder.name}",
            "```",
        ]
    if gguf:
        return "GGUF", ["```", *(f"llama-server -m {name}" for name in gguf), "```"]
    if (folder / CONFIG).is_file():
        code = [
            "from peft import AutoPeftModelForCausalLM",
            f'AutoPeftModelForCausalLM.from_pretrained("{folder.name}")',
        ]
        return "a LoRA adapter", ["```python", *code, "```"]
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        four = "quantization_config" in config
        code = [
            "from transformers import AutoModelForCausalLM",
            f'AutoModelForCausalLM.from_pretrained("{folder.name}")',
        ]
        serve = [] if four else ["", "```", f"vllm serve {folder.name}", "```"]
        return "4-bit safetensors (NF4)" if four else "16-bit safetensors", ["```python", *code, "```", *serve]
    raise ExportError(f"{folder} holds no exported model.", "Export into it first.")


def _front_matter(base_name: str, base: Path | None, kind: str) -> str:
    """YAML between the card's dashes. A path of this machine is nobody else's base."""
    from huggingface_hub import ModelCard, ModelCardData

    inherited: dict[str, Any] = {}
    if base is not None and (base / README).is_file():
        try:
            theirs = ModelCard.load(base / README).data.to_dict()
        except ValueError:  # a README without a card's head
            theirs = {}
        inherited = {k: theirs[k] for k in ("license", "license_name", "license_link", "language") if k in theirs}
    library = {"a LoRA adapter": "peft", "GGUF": "gguf", "GGUF for Ollama": "gguf"}.get(kind, "transformers")
    card = ModelCardData(
        base_model=None if base_name.startswith(("/", ".")) else base_name,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["sparktune", *(["lora"] if library == "peft" else [])],
        **inherited,
    )
    return str(card.to_yaml()).strip()


def _table(rows: Mapping[str, Any]) -> list[str]:
    def cell(value: Any) -> str:
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        return " ".join(text.split()).replace("|", "\\|")

    return ["| | |", "| --- | --- |", *(f"| {cell(key)} | {cell(value)} |" for key, value in rows.items())]
