"""A random model, written once as bitsandbytes stores NF4 with double quantisation, with a tokenizer: what every engine loads.

Each tensor is drawn from a generator seeded by its name. Weights ~ N(0, 0.02), norms ~ 1 + N(0, 0.05), so that a norm which
ignores its weight is seen in the loss.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparkproof.bench.train.setting import Setting

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|unk|>")
NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True,
    "_load_in_8bit": False, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": ["lm_head"], "llm_int8_threshold": 6.0,
}  # fmt: skip


def normal(name: str, shape: tuple[int, ...], std: float, device: str, seed: int) -> Tensor:
    """N(0, std) in fp32, the same for a name, seed and kind of device."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    g = torch.Generator(device)
    g.manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.empty(shape, dtype=torch.float32, device=device).normal_(0.0, std, generator=g)


def config(s: Setting) -> dict[str, Any]:
    """config.json."""
    shape = s.shape
    found: dict[str, Any] = {
        "model_type": shape.kind, "architectures": [ARCHITECTURES[shape.kind]], "dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": s.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "vocab_size": shape.vocab, "max_position_embeddings": max(8192, s.rows()[1]), "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.02, "use_cache": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rope_theta": 500000.0, "torch_dtype": "bfloat16",  # as readers of transformers 4 spell them
        "quantization_config": NF4,
    }  # fmt: skip
    if shape.kind == "mistral":
        found["sliding_window"] = None
    return found


def tensors(s: Setting) -> dict[str, Tensor]:
    """Everything in model.safetensors, on the CPU."""
    from bitsandbytes import functional

    shape, out = s.shape, {}

    def dense(name: str, size: tuple[int, ...]) -> Tensor:
        return normal(name, size, 0.02, s.device, s.seed).to(torch.bfloat16)

    def norm(module: str, size: int) -> None:
        out[f"{module}.weight"] = (1 + normal(module, (size,), 0.05, s.device, s.seed)).to(torch.bfloat16).cpu()

    out["model.embed_tokens.weight"] = dense("model.embed_tokens.weight", (shape.vocab, shape.hidden)).cpu()
    for i in range(s.layers):
        layer = f"model.layers.{i}."
        for module, size in shape.linears.items():
            name = f"{layer}{module}.weight"
            packed, state = functional.quantize_4bit(
                dense(name, size), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            out[name] = packed.cpu()
            out |= {f"{name}.{k}": v.cpu() for k, v in state.as_dict(packed=True).items()}
        for which in ("input_layernorm", "post_attention_layernorm"):
            norm(f"{layer}{which}", shape.hidden)
        if shape.kind == "qwen3":
            for which in ("q_norm", "k_norm"):
                norm(f"{layer}self_attn.{which}", shape.head_dim)
    norm("model.norm", shape.hidden)
    out["lm_head.weight"] = dense("lm_head.weight", (shape.vocab, shape.hidden)).cpu()
    return out


def write(s: Setting, folder: Path) -> dict[str, Any]:
    """The whole folder; how many bytes its tensors have."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    made = tensors(s)
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    _json(folder / "config.json", config(s))
    _json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    _tokenizer(folder)
    return {"bytes": sum(t.numel() * t.element_size() for t in made.values())}


def _tokenizer(folder: Path) -> None:
    """Bytes and special tokens: nothing is encoded with it, but loaders insist on one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL[3]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    made.save(str(folder / "tokenizer.json"))
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), SPECIAL, strict=True))
    _json(folder / "special_tokens_map.json", names)
    more = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131072,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    _json(folder / "tokenizer_config.json", names | more)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
