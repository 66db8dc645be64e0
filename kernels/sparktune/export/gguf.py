"""GGUF for llama.cpp: Llama-family models in f16 or q8_0, an adapter merged on the way.

What differs from the safetensors folder:

- **Names**: `model.layers.3.self_attn.q_proj.weight` becomes `blk.3.attn_q.weight` (the `gguf` library's table).
- **Q and K rows** are permuted. transformers rotates the two halves of a head, (x_j, x_{j+d/2}); llama.cpp rotates
  neighbours, (x_2j, x_2j+1). A head's rows, seen as (2, d/2), are transposed to (d/2, 2). Left out, the model still
  loads and still answers, worse with every position.
- **Types**: matrices in f16 (2 bytes a weight) or q8_0 (32 weights share an fp16 scale: 34 bytes), where a row is a
  multiple of 32, f16 where not; vectors (norms, biases) stay f32. With an adapter, W + scale * B A is summed in fp32
  and goes to its final type in one rounding.
- **Tied embeddings**: no `output.weight` is written; llama.cpp then uses `token_embd.weight`.
- **Llama 3's RoPE scaling** becomes a tensor of factors, `rope_freqs.weight`: frequency i is divided by factor i.

Only what is known is written: another architecture, activation, RoPE scaling or pre-tokenizer is an error, not a guess.
The file is written tensor by tensor, and is whole or absent.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sparktune.export.checkpoint import Checkpoint
from sparktune.export.files import ExportError, atomic_file, need_space
from sparktune.export.hf import Exported, tokenizer_folder
from sparktune.export.lora import Adapter
from sparktune.export.vocabulary import Vocabulary

QType = Literal["f16", "q8_0"]
ARCHITECTURES = {"LlamaForCausalLM"}
Q8_BLOCK = 32


def export_gguf(base: Path, out: Path, qtype: QType, adapter: Path | None = None, name: str = "") -> Exported:
    """Write the model in `base`, with `adapter` merged if given, to the GGUF file `out`.

    `base` is a folder of 16-bit (or fp32) safetensors; `name` is the model's name in the file.
    Errors: ExportError for what is not known or does not fit, NoSpaceError before the first byte.
    """
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
    from gguf.quants import quant_shape_to_byte_shape, quantize

    start = time.monotonic()
    checkpoint = Checkpoint.open(base)
    shape = _hyperparameters(checkpoint)
    lora = Adapter.read(adapter) if adapter is not None else None
    if lora is not None:
        lora.check_fits(set(checkpoint.shapes), checkpoint.tied)
        lora.check_trained()
    vocabulary = Vocabulary.read(tokenizer_folder(base, adapter), shape["vocab_size"])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, shape["layers"])
    plan: dict[str, tuple[str, Any]] = {}  # HF name -> (GGUF name, type)
    for hf_name, dims in checkpoint.shapes.items():
        if hf_name.endswith("rotary_emb.inv_freq") or (hf_name == "lm_head.weight" and shape["tied"]):
            continue
        gguf_name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ExportError(f"The model's tensor {hf_name} has no place in llama.cpp's Llama.", _ARCHITECTURE_FIX)
        plan[hf_name] = (gguf_name, tensor_type(dims, qtype))
    factors = rope_factors(shape)

    writer = GGUFWriter(None, "llama")
    _metadata(writer, shape, qtype, name or base.name)
    _tokenizer(writer, vocabulary)
    size = 0
    for hf_name, (gguf_name, kind) in plan.items():
        dims = quant_shape_to_byte_shape(checkpoint.shapes[hf_name], kind)
        size += math.prod(dims)
        numpy_type = np.dtype({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))
        elements = checkpoint.shapes[hf_name] if numpy_type != np.uint8 else dims
        writer.add_tensor_info(gguf_name, elements, numpy_type, math.prod(dims), kind)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    need_space(out, size)
    with atomic_file(out) as part:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for hf_name, weight in checkpoint.tensors():
            if hf_name not in plan:
                continue
            merged = (lora.apply(hf_name, weight) if lora else weight).float()
            with np.errstate(over="ignore"):  # told below, by name
                data = quantize(permuted(hf_name, merged, shape).numpy(), plan[hf_name][1])
            if data.dtype == np.float16 and not np.isfinite(data).all():
                raise ExportError(
                    f"{hf_name} has values beyond fp16's 65504.", "Export q8_0, or keep bf16 safetensors."
                )
            writer.write_tensor_data(data)
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.close()
        if lora:
            lora.check_used()
    return Exported(
        out,
        out.stat().st_size,
        len(plan),
        len(lora.used) if lora else 0,
        checkpoint.parameters,
        time.monotonic() - start,
    )


_ARCHITECTURE_FIX = f"GGUF export knows {', '.join(sorted(ARCHITECTURES))}; export merged_16bit for others."


def tensor_type(dims: tuple[int, ...], qtype: QType) -> Any:
    """GGML type of a tensor: vectors f32; matrices `qtype`, or f16 where q8_0's blocks of 32 don't fit the row."""
    from gguf import GGMLQuantizationType as Type

    if len(dims) < 2:
        return Type.F32
    return Type.Q8_0 if qtype == "q8_0" and dims[-1] % Q8_BLOCK == 0 else Type.F16


def permuted(name: str, weight: torch.Tensor, shape: dict[str, Any]) -> torch.Tensor:
    """Rows of q_proj and k_proj (weight or bias) in llama.cpp's RoPE order; anything else as it is."""
    if ".q_proj." in name:
        heads = shape["heads"]
    elif ".k_proj." in name:
        heads = shape["kv_heads"]
    else:
        return weight.contiguous()
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape).contiguous()


def _hyperparameters(checkpoint: Checkpoint) -> dict[str, Any]:
    """What llama.cpp has to know. Errors: ExportError for anything its Llama does not do."""
    config = checkpoint.config
    architecture = (config.get("architectures") or ["unknown"])[0]
    if architecture not in ARCHITECTURES:
        raise ExportError(f"The model's architecture is {architecture}.", _ARCHITECTURE_FIX)
    if config.get("hidden_act", "silu") != "silu":
        raise ExportError(f"The model's activation is {config['hidden_act']}, not SiLU.", _ARCHITECTURE_FIX)
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ExportError(f"The model's RoPE scaling is '{kind}'.", "Known: default, linear, llama3.")
    heads = int(config["num_attention_heads"])
    if not checkpoint.tied and "lm_head.weight" not in checkpoint.shapes:
        raise ExportError("The model stores no lm_head.weight, and its config does not tie it to the embedding.")
    return {
        "context": int(config["max_position_embeddings"]),
        "hidden": int(config["hidden_size"]),
        "layers": int(config["num_hidden_layers"]),
        "feed_forward": int(config["intermediate_size"]),
        "heads": heads,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or config["hidden_size"] // heads),
        "rms_eps": float(config["rms_norm_eps"]),
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        "rope_kind": kind,
        "rope": rope,
        "vocab_size": checkpoint.shapes["model.embed_tokens.weight"][0],
        "tied": checkpoint.tied,
    }


def rope_factors(shape: dict[str, Any]) -> np.ndarray | None:
    """Llama 3's divisor of each RoPE frequency, (head_dim / 2,) f32, or None.

    Wavelengths under context / high_freq_factor keep their frequency (1), those over context / low_freq_factor are
    stretched by `factor`, those between are interpolated; context is the one before the extension.
    """
    if shape["rope_kind"] != "llama3":
        return None
    rope, dim = shape["rope"], shape["head_dim"]
    factor, low, high = float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context = float(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi * shape["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    smooth = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth), dtype=np.float32)


def _metadata(writer: Any, shape: dict[str, Any], qtype: QType, name: str) -> None:
    from gguf import LlamaFileType, RopeScalingType

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if qtype == "f16" else LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(2)
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_context_length(shape["context"])
    writer.add_embedding_length(shape["hidden"])
    writer.add_block_count(shape["layers"])
    writer.add_feed_forward_length(shape["feed_forward"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_eps"])
    if shape["rope_kind"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(shape["rope"]["factor"]))


def _tokenizer(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    for kind, token in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
