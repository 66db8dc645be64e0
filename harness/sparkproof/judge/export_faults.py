"""Faults planted into an export, and the assertion that must find each.

A fault goes into what is written (the base or adapter that the export reads, or the file that it leaves), never into what
judges. Where several assertions miss, the named one must be among them, and where an assertion tells faults apart, its words must
be this fault's: what is caught only by accident of another is not caught.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Fault:
    """One way to be wrong. `sources` spoils copies of base and adapter before the export, `file` what it wrote."""

    id: str
    description: str
    format: str
    caught_by: str  # how the name of the assertion begins
    words: str = ""  # that its evidence must hold
    sources: Callable[[Path, Path], None] | None = None
    file: Callable[[Path, Path, Path], None] | None = None  # (written, base, adapter)


def _each_shard(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        save_file({n: change(n, t).contiguous() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})


def _json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def _again(written: Path, base: Path, adapter: Path) -> None:
    """The update added to what has it."""
    from sparktune.export import export_merged

    once = written.with_name(f"{written.name}-once")
    written.rename(once)
    export_merged(once, adapter, written)
    shutil.rmtree(once)


def _louder(base: Path, adapter: Path) -> None:
    _json(adapter / "adapter_config.json", lambda c: c.update(lora_alpha=c["lora_alpha"] * 1.25))


def _trained(name: str, weight: Tensor) -> bool:
    return weight.dim() == 2 and "_proj." in name


def _four_bits(base: Path, adapter: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def through(name: str, weight: Tensor) -> Tensor:
        if not _trained(name, weight):
            return weight
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return dequantize_4bit(packed, state)

    _each_shard(base, through)


def _repacked(base: Path, adapter: Path) -> None:
    """What bitsandbytes' repacking for AVX512-BF16 leaves to who dequantises afterwards."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit, quantize_4bit

    def through(name: str, weight: Tensor) -> Tensor:
        if not _trained(name, weight):
            return weight
        packed, state = quantize_4bit(weight, quant_type="nf4")
        moved, _ = _convert_weight_packed_for_cpu(packed.clone(), quantize_4bit(weight, quant_type="nf4")[1])
        return dequantize_4bit(moved.reshape(packed.shape), state)

    _each_shard(base, through)


def _transposed(base: Path, adapter: Path) -> None:
    """(B A)^T = A^T B^T on the square matrices."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [n for n in tensors if ".lora_A." in n]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        if a.shape[1] == b.shape[0]:
            tensors[name], tensors[name.replace("lora_A", "lora_B")] = b.T.contiguous(), a.T.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def _untied(written: Path, base: Path, adapter: Path) -> None:
    _json(written / "config.json", lambda c: c.update(tie_word_embeddings=False))


def _padded(written: Path, base: Path, adapter: Path) -> None:
    """Rows of nothing up to the next multiple of 64 and one more block, as some tools do for speed."""

    def pad(name: str, weight: Tensor) -> Tensor:
        return torch.cat([weight, torch.zeros(64, weight.shape[1]).to(weight)]) if "embed_tokens" in name else weight

    _each_shard(written, pad)
    _json(written / "config.json", lambda c: c.update(vocab_size=c["vocab_size"] + 64))


def _no_rope_factors(written: Path, base: Path, adapter: Path) -> None:
    from gguf import GGUFReader

    for tensor in GGUFReader(written, "r+").tensors:
        if tensor.name == "rope_freqs.weight":
            tensor.data[:] = np.ones_like(tensor.data)


def _other_pre_tokenizer(written: Path, base: Path, adapter: Path) -> None:
    """A name of the same length whose rule is another."""
    from gguf import GGUFReader

    field = GGUFReader(written, "r+").fields["tokenizer.ggml.pre"]
    field.parts[field.data[0]][:] = np.frombuffer(b"falcon", dtype=np.uint8)


def _exchanged(written: Path, base: Path, adapter: Path) -> None:
    """Two tensors of one shape and type, each under the other's name."""
    from gguf import GGUFReader

    found = {t.name: t for t in GGUFReader(written, "r+").tensors}
    gate, up = (found[f"blk.0.ffn_{part}.weight"].data for part in ("gate", "up"))
    gate[:], up[:] = up.copy(), gate.copy()


def _template(change: Callable[[str], str]) -> Callable[[Path, Path, Path], None]:
    def spoil(written: Path, base: Path, adapter: Path) -> None:
        file = written / "chat_template.jinja"
        file.write_text(change(file.read_text(encoding="utf-8")), encoding="utf-8")

    return spoil


def _other_stop(written: Path, base: Path, adapter: Path) -> None:
    for name in ("generation_config.json", "config.json"):
        if (written / name).is_file():
            _json(written / name, lambda c: c.update(eos_token_id=0))


def _cut(written: Path, base: Path, adapter: Path) -> None:
    shard = sorted(written.glob("*.safetensors"))[-1]
    with shard.open("r+b") as f:
        f.truncate(shard.stat().st_size - 4096)


_TIMES, _DISTANCE = "times that the update is in the weights", "distance of the weights from base and update"
_NO_SYSTEM = "{% for message in messages if message['role'] != 'system' %}{{ '<|im_start|>' + message['role'] + '\n' + "
_NO_SYSTEM += (
    "message['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAULTS = (
    Fault("merged-twice", "LoRA is merged twice", "merged_16bit", _TIMES, "added twice", file=_again),
    Fault("wrong-scale", "LoRA is merged with 1.25 times its scale", "merged_16bit", _TIMES, sources=_louder),
    Fault("four-bit-base", "LoRA is merged into the 4-bit base", "merged_16bit", _DISTANCE, "over a 4-bit base", _four_bits),
    Fault("transposed", "the update of square matrices is transposed", "merged_16bit", _DISTANCE, "transposed", _transposed),
    Fault("tied-dropped", "the file has no head and no longer says that it is tied", "merged_16bit",
          "weights that the consumer made up", "lm_head", file=_untied),
    Fault("vocabulary-padded", "the vocabulary is padded with rows of zeros", "merged_16bit", "tokens that the consumer knows",
          file=_padded),
    Fault("rope-scaling", "the GGUF lacks Llama 3's RoPE scaling", "gguf_f16", "RoPE of the file", file=_no_rope_factors),
    Fault("pre-tokenizer", "the GGUF names another pre-tokenizer", "gguf_f16", "hard strings tokenised otherwise",
          file=_other_pre_tokenizer),
    Fault("no-system-prompt", "the chat template leaves the system prompt out", "merged_16bit", "chat template",
          file=_template(lambda text: _NO_SYSTEM)),
    Fault("bos-doubled", "a conversation begins with the beginning of text twice", "merged_16bit", "conversations fed",
          "once too often", file=_template(lambda text: "{{ bos_token }}" + text)),
    Fault("stop-missing", "the stop token is not among the model's stops", "merged_16bit", "generation ends",
          file=_other_stop),
    Fault("repacked", "weights come from a 4-bit layer that bitsandbytes repacked for AVX512-BF16", "merged_16bit", _DISTANCE,
          "repacked", _repacked),
    Fault("wrong-tensor", "two tensors of a quantised GGUF are exchanged", "gguf_q4_0", "mean KL(the file's weights",
          file=_exchanged),
    Fault("truncated", "a shard ends early", "merged_16bit", "files that are not whole", file=_cut),
)  # fmt: skip
