"""A folder that vLLM serves: the merged 16-bit model, or the adapter beside its base, with what makes chats begin and end right.

vLLM renders the chat template with its own Jinja and stops at the end tokens of tokenizer and generation_config.json, which it
also takes its sampling defaults from (https://docs.vllm.ai, "OpenAI-Compatible Server"). A base model that was taught to chat
often names only the end of a text there; then answers run on into the next question. So the token that ends a turn in the
template is added to the merged folder's end tokens.

Nothing here starts vLLM: what is checked is what its documentation says it reads.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparktune.export.chat_form import derive, renderer
from sparktune.export.files import ExportError, atomic_folder
from sparktune.export.hf import Exported, export_adapter, export_merged, exported, opened, write_json
from sparktune.export.ollama import end_of_turn
from sparktune.export.progress import Progress, silent

# vLLM's choices for --max-lora-rank (docs.vllm.ai, "Engine Arguments"); an adapter's rank may be any up to it
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
UNTIED = {"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"}


def export_vllm(
    base: Path,
    adapter: Path | None,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    shard_bytes: int | None = 5_000_000_000,
    progress: Progress = silent,
) -> Exported:
    """A folder for `vllm serve FOLDER`: `export_merged`'s, with its chat template and every end token.

    The first note of the result is the command. Errors: ExportError, also for a tokenizer without a chat template.
    """
    start = time.monotonic()
    checkpoint, _ = opened(base, adapter)
    if checkpoint.tied and set(checkpoint.config.get("architectures") or []) & UNTIED:
        raise ExportError(
            "vLLM's DeepSeek has a head of its own, and leaves it at zero where the embedding is the head.",
            "Untie them in the base: model.lm_head.weight = a copy, and tie_word_embeddings false.",
        )
    with atomic_folder(out) as part:
        done = export_merged(base, adapter, part / "model", dtype, shard_bytes=shard_bytes, progress=progress)
        for file in (part / "model").iterdir():
            file.rename(part / file.name)
        (part / "model").rmdir()
        ends = end_ids(part)
        generation = part / "generation_config.json"
        settings = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
        write_json(generation, {**settings, "eos_token_id": ends if len(ends) > 1 else ends[0]})
    command = f"vllm serve {out}"
    return replace(exported(out, done.tensors, done.merged, done.parameters, start), notes=[command])


def export_vllm_adapter(base: Path, adapter: Path, out: Path, base_name: str = "") -> Exported:
    """A folder for `vllm serve BASE --enable-lora --lora-modules NAME=FOLDER`: the adapter as `export_adapter` writes it.

    The first note of the result is the command. Errors: ExportError for an adapter that vLLM does not load.
    """
    _, lora = opened(base, adapter)
    assert lora is not None
    if lora.whole or lora.embeddings:
        raise ExportError(
            f"vLLM loads no adapter with layers trained whole or LoRA on embeddings ({min([*lora.whole, *lora.embeddings])}).",
            "Export the merged folder.",
        )
    if any(place.experts > 1 for place in lora.places.values()):
        raise ExportError("vLLM does not load PEFT's LoRA on stacks of experts.", "Export the merged folder.")
    rank = max(a.shape[0] for a, _ in lora.pairs.values())
    if rank > RANKS[-1]:
        raise ExportError(f"The adapter's rank {rank} is over vLLM's {RANKS[-1]}.", "Export the merged folder.")
    done = export_adapter(base, adapter, out, base_name)
    room = next(r for r in RANKS if r >= rank)
    serve = f"vllm serve {base_name or base} --enable-lora --max-lora-rank {room} --lora-modules {out.name}={out}"
    return replace(done, notes=[serve])


def end_ids(folder: Path) -> list[int]:
    """Ids that end an answer: generation_config.json's, the tokenizer's, the template's end of a turn."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    form = derive(renderer(tokenizer))
    generation = folder / "generation_config.json"
    known = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
    found = [known] if isinstance(known, int) else list(known or [])
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    found += [vocabulary[token] for token in end_of_turn(form.turn, tokenizer) if token in vocabulary]
    if not found:
        raise ExportError("The tokenizer has no end token, so no answer would end.", "Set tokenizer.eos_token.")
    return list(dict.fromkeys(int(i) for i in found))
