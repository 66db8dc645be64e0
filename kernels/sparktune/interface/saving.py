"""The way out, as methods of the model: adapter, merged 16-bit or 4-bit, GGUF; to a folder or to the hub.

Merging happens in the 16-bit base that the model was loaded from (see `sparktune.export.hf` for why), found again in its
folder or in the hub's cache. A model that was stored in 4 bits on the hub has no such base: `base_model` names it.
Every folder gets a model card, and a GGUF's a Modelfile for Ollama. `sparktune.export` has the formats that need no live model.
"""

from __future__ import annotations

import json
import logging
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sparktune.export import (
    QTYPES,
    ExportError,
    export_gguf,
    export_merged,
    export_merged_4bit,
    find_base,
    modelfile,
    terminal_bar,
    write_card,
)
from sparktune.export.card import README
from sparktune.export.files import atomic_folder, scratch_folder
from sparktune.export.hf import copy_files
from sparktune.export.ollama import MODELFILE
from sparktune.interface import arguments
from sparktune.interface.origin import origin_of, transformers_model

LOG = logging.getLogger("sparktune")
METHODS = {
    "merged_16bit": "merged_16bit",
    "merged_4bit": "merged_4bit",
    "merged_4bit_forced": "merged_4bit",
    "lora": "lora",
}
GGUF_TYPES = {
    **{name: name for name in QTYPES},
    "fast_quantized": "q8_0",
    "not_quantized": "f16",
    "quantized": "q4_k_m",
}


def save_pretrained_merged(
    self: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    push_to_hub: bool = False,
    token: str | bool | None = None,
    *,
    base_model: str | Path | None = None,
    base_revision: str | None = None,
    **kwargs: Any,
) -> Path:
    """Write the model to the folder `save_directory`, whole or not at all; return its path.

    save_method: "merged_16bit" (LoRA merged into the 16-bit base: a folder for transformers and vLLM), "merged_4bit" (that,
        quantised to NF4, which rounds what was trained a second time) or "lora" (the adapter alone, for PEFT).
    tokenizer: saved along; None takes the base's.
    push_to_hub, token: not here; `push_to_hub_merged` uploads.
    base_model, base_revision: folder or hub id of the 16-bit base, where the model was loaded from a 4-bit checkpoint.

    Errors: ExportError, ValueError or TypeError, with the fix.
    """
    _no_push("save_pretrained_merged", push_to_hub, token, "push_to_hub_merged")
    arguments.unknown("save_pretrained_merged", kwargs)
    if save_method not in METHODS:
        raise ValueError(f"save_method={save_method!r} is not supported: use one of {', '.join(METHODS)}.")
    out, lora, method = Path(save_directory), _is_peft(self), METHODS[save_method]
    if method == "lora" and not lora:
        raise ValueError("The model has no LoRA layers: use save_method='merged_16bit'.")
    if method == "lora":
        return _save_lora(self, tokenizer, out)
    if method == "merged_16bit" and not lora:
        return _save_whole(self, tokenizer, out)
    with scratch_folder(out) as part, terminal_bar(out.name) as progress:
        base, adapter = _sources(self, tokenizer, part, base_model, base_revision)
        export = export_merged_4bit if method == "merged_4bit" else export_merged
        done = export(base, adapter, out, _sixteen_bit(self), progress=progress)
        write_card(out, _name(self, base_model), base=base, adapter=adapter, done=done)
    return out


def save_pretrained_gguf(
    self: Any,
    save_directory: str | Path,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    first_conversion: str | None = None,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    *,
    base_model: str | Path | None = None,
    base_revision: str | None = None,
    tensor_types: Mapping[str, str] | None = None,
    imatrix: str | Path | None = None,
    **kwargs: Any,
) -> list[Path]:
    """Write `<save_directory>/<its name>.<TYPE>.gguf` for llama.cpp, one file a method; return their paths.

    quantization_method: a type of `sparktune.export.QTYPES` such as "q4_k_m", "fast_quantized" (q8_0), "quantized" (q4_k_m),
        "not_quantized" (f16), or a list of them.
    tensor_types, imatrix: a mix of one's own, and llama.cpp's importance matrix, as `sparktune.export.export_gguf` takes them.
    The others: as for `save_pretrained_merged`. A Modelfile for Ollama lies beside, where the chat template can be said in its
    language; where it can't, a warning says why. Errors: ExportError, ValueError or TypeError, with the fix.
    """
    _no_push("save_pretrained_gguf", push_to_hub, token, "push_to_hub_gguf")
    arguments.refuse("save_pretrained_gguf", first_conversion=first_conversion)
    arguments.unknown("save_pretrained_gguf", kwargs)
    asked = [quantization_method] if isinstance(quantization_method, str) else list(quantization_method)
    for method in asked:
        if method not in GGUF_TYPES:
            raise ValueError(f"quantization_method={method!r} is not supported: use one of {', '.join(GGUF_TYPES)}.")
    kinds = list(dict.fromkeys(GGUF_TYPES[method] for method in asked))
    out = Path(save_directory)
    files = [out / f"{out.name}.{kind.upper()}.gguf" for kind in kinds]
    options: dict[str, Any] = {"tensor_types": tensor_types, "imatrix": Path(imatrix) if imatrix else None}
    with scratch_folder(out) as part, terminal_bar(out.name) as progress:
        base, adapter = _sources(self, tokenizer, part, base_model, base_revision)
        for kind, file in zip(kinds, files, strict=True):
            done = export_gguf(base, file, kind, adapter, out.name, progress=progress, **options)
        if not (out / MODELFILE).exists():
            write_modelfile(
                out, adapter if adapter is not None and tokenizer is not None else base, files[0].name, base
            )
        if not (out / README).exists():
            write_card(out, _name(self, base_model), base=base, adapter=adapter, done=done)
    return files


def write_modelfile(out: Path, tokenizer: Path, model: str, base: Path) -> None:
    """A Modelfile in `out` for its GGUF `model`, or a warning that says why there is none."""
    try:
        text, _ = modelfile(tokenizer, model, generation=base)
    except ExportError as error:
        LOG.warning("No Modelfile for Ollama: %s", error)
        return
    (out / MODELFILE).write_text(text, encoding="utf-8")


def push_to_hub_merged(
    self: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Trained with sparktune",
    *,
    base_model: str | Path | None = None,
    **kwargs: Any,
) -> str:
    """`save_pretrained_merged` into a temporary folder beside the current one, then up to `repo_id`; returns its URL."""
    arguments.unknown("push_to_hub_merged", kwargs)
    with scratch_folder(Path(repo_id.rpartition("/")[2])) as part:
        folder = save_pretrained_merged(self, part / "model", tokenizer, save_method, base_model=base_model)
        return _upload(folder, repo_id, token, private, commit_message)


def push_to_hub_gguf(
    self: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: str | Sequence[str] = "fast_quantized",
    first_conversion: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    commit_message: str = "Trained with sparktune",
    *,
    base_model: str | Path | None = None,
    **kwargs: Any,
) -> str:
    """`save_pretrained_gguf` into a temporary folder beside the current one, then up to `repo_id`; returns its URL."""
    arguments.unknown("push_to_hub_gguf", kwargs)
    name = repo_id.rpartition("/")[2]
    with scratch_folder(Path(name)) as part:
        save_pretrained_gguf(self, part / name, tokenizer, quantization_method, first_conversion, base_model=base_model)
        return _upload(part / name, repo_id, token, private, commit_message)


def attach(model: Any) -> None:
    """Give `model` the four methods, bound to this instance: its class stays transformers' or PEFT's own."""
    for method in (save_pretrained_merged, save_pretrained_gguf, push_to_hub_merged, push_to_hub_gguf):
        object.__setattr__(model, method.__name__, types.MethodType(method, model))


def _is_peft(model: Any) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _sources(
    model: Any, tokenizer: Any, part: Path, given: str | Path | None, revision: str | None
) -> tuple[Path, Path | None]:
    """(16-bit base, adapter) of `model`, in `part` what is not on the disk yet."""
    if not _is_peft(model):
        return _save_whole(model, tokenizer, part / "model"), None
    origin = origin_of(model)
    base = origin.folder() if given is None else find_base(given, revision, origin.hub.get("cache_dir"))
    return base, _save_lora(model, tokenizer, part / "adapter")


def _name(model: Any, given: str | Path | None) -> str:
    return str(given) if given is not None else origin_of(model).base


def _sixteen_bit(model: Any) -> torch.dtype | None:
    """The 16-bit type that the model computes in, or None (the base's own) where that is fp32."""
    dtype = transformers_model(model).dtype
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


def _save_lora(model: Any, tokenizer: Any, out: Path) -> Path:
    """The adapter as PEFT writes it, and the tokenizer it was trained with."""
    with atomic_folder(out) as part:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    return out


def _save_whole(model: Any, tokenizer: Any, out: Path) -> Path:
    """A model without adapters, its weights rounded to 16 bits where they are fp32."""
    base = transformers_model(model)
    if any(p.dtype == torch.uint8 for p in base.parameters()):
        raise ExportError(
            "The model is stored in 4 bits and has no LoRA layers: there is nothing to merge.",
            "Train LoRA layers, or load it with load_in_4bit=False.",
        )
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(origin_of(model).folder())
    rounded: dict[int, torch.Tensor] = {}  # by address: tied weights stay one
    state = {
        name: rounded.setdefault(t.data_ptr(), t.to(torch.bfloat16)) if t.dtype == torch.float32 else t
        for name, t in base.state_dict().items()
    }
    with atomic_folder(out) as part:
        base.save_pretrained(part, state_dict=state)
        if rounded:
            config = json.loads((part / "config.json").read_text(encoding="utf-8"))
            text = json.dumps({**config, "dtype": "bfloat16"}, indent=2, ensure_ascii=False)
            (part / "config.json").write_text(text + "\n", encoding="utf-8")
        tokenizer.save_pretrained(part)
        copy_files(origin_of(model).folder(), part, ("tokenizer.model",))  # which transformers no longer saves
    return out


def _no_push(function: str, push_to_hub: bool, token: str | bool | None, instead: str) -> None:
    if push_to_hub or token is not None:
        raise ValueError(
            f"{function} writes to a folder: call model.{instead}(repo_id, tokenizer, token=...) to upload."
        )


def _upload(folder: Path, repo_id: str, token: str | bool | None, private: bool | None, message: str) -> str:
    """`folder` as one commit of `repo_id`, made if it does not exist."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    url = str(api.create_repo(repo_id, private=private, exist_ok=True))
    api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return url
