"""A tiny model of each family, made on the spot: transformers' own architecture with random weights, a real tokenizer.

Nothing is downloaded. `tiny:llama` names a LlamaForCausalLM of two layers with what its family is known for (grouped queries,
a window, soft caps, experts, latent attention ...). Weights are seeded and stored in bf16, so that the folder is a 16-bit base
like any other; they are drawn wide enough for LoRA to steer a frozen, random head within some tens of steps.
`tiny:llama@256` is the same with rows of 256 everywhere: what llama.cpp's K-quants, which store 256 weights at a time, need.
`tiny:deepseek_v3@256+head` computes the same and stores its head beside its embedding: vLLM's DeepSeek has a head of its own, and
leaves it at zero without a word where a file has none.

The tokenizer is SmolLM2's, cut to its first 1,024 tokens (those are its special tokens, the 256 bytes and the most frequent
merges): real byte-level BPE with a real chat template, and logits that a CPU makes in no time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from sparkproof.engines.pretrained import Pretrained
from sparkproof.errors import UserError

PREFIX = "tiny:"
LAYOUT = 1  # raise when what is written below changes
VOCABULARY = 1024
SEED = 20
COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2, "tie_word_embeddings": True,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "head_dim": 16, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 32,
}  # fmt: skip
HEAD = "+head"  # after the width: the same model with its tied head stored apart
WIDE = 256  # weights in a super-block of llama.cpp's K-quants
SCALED = ("intermediate_size", "moe_intermediate_size", "kv_lora_rank", "q_lora_rank", "hidden_size")
HEADS = ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "query_pre_attn_scalar")
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# What llama.cpp takes for granted of a family, and a model two layers high need not have.
WIDE_CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},  # its `llama` knows no window
    "gemma3": {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    # Every 4th layer has no RoPE, and no key says otherwise; with twice the layers rounding grows, so weights are narrower.
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "initializer_range": 0.07},
    # It rounds the bounds of YaRN's ramp; on gpt-oss itself, whose bounds lie in a ramp of ten dimensions, that is little.
    "gpt_oss": {"tie_word_embeddings": False, "rope_parameters": {**YARN, "truncate": True}},
}
ALIKE = 0.2  # of a wide model's experts: how far they are from their mean
# family -> (configuration class, what differs from COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 32, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 32, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32, "query_pre_attn_scalar": 16,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 256, "tie_word_embeddings": False}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 2.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**LATENT, "topk_method": "group_limited_greedy", "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **LATENT, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "scoring_func": "sigmoid", "topk_method": "noaux_tc",  # as on the hub: transformers' class does without, vLLM not
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention"], "attention_bias": True,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
}  # fmt: skip


def tiny(name: str, cache_dir: Path) -> Pretrained:
    """The folder of `tiny:<family>`, `tiny:<family>@256` or `tiny:<family>@256+head`, made on first use (seconds).

    Errors: UserError for an unknown family or width.
    """
    headed = name.endswith(HEAD)
    family, _, width = name.removeprefix(PREFIX).removesuffix(HEAD).partition("@")
    if family not in FAMILIES:
        raise UserError(f"There is no tiny model of '{family}'.", f"There is one of: {', '.join(FAMILIES)}.")
    if width not in ("", str(WIDE)) or (headed and not width):
        said = f"There is no tiny model {width}{HEAD * headed} wide."
        raise UserError(said, f"Write tiny:{family}, tiny:{family}@{WIDE}, or tiny:{family}@{WIDE}{HEAD}.")
    import transformers

    recipe = [LAYOUT, VOCABULARY, SEED, FAMILIES[family][0], recipe_of(family, bool(width)), transformers.__version__]
    recipe += [HEAD] * headed
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    models = cache_dir / "models"
    folder = models / f"tiny-{family}{width and f'-{width}'}-{digest[:16]}"
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = Path(f"{folder}.part")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            try:
                make(family, partial, bool(width), headed)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return Pretrained(folder, name, digest, "none: random weights", "tiny")


def recipe_of(family: str, wide: bool) -> dict[str, Any]:
    """The configuration of a family's tiny model; `wide` makes every row of a weight a multiple of 256 long."""
    recipe = {**COMMON, **FAMILIES[family][1]}
    if wide:
        recipe |= {key: WIDE for key in SCALED if key in recipe} | {key: WIDE // 4 for key in HEADS if key in recipe}
        recipe["initializer_range"] *= 0.5  # four times as many terms in each sum: the same spread
        recipe |= WIDE_CHANGES.get(family, {})
    return recipe


def make(family: str, out: Path, wide: bool = False, headed: bool = False) -> None:
    """Write the model and its tokenizer to `out` as `from_pretrained` wants them; `headed`: a tied head is stored apart."""
    import torch
    import transformers

    tokenizer = make_tokenizer()
    kind = FAMILIES[family][0]
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = getattr(transformers, kind)(**{**recipe_of(family, wide), **ids, "vocab_size": len(tokenizer)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():  # norms at 1 and biases at 0 would hide a wrong one
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
        if (
            wide
        ):  # transformers starts the padding's row at zero, and SmolLM2's padding is its stop: a tied head must say it
            row = model.get_input_embeddings().weight.data[tokenizer.pad_token_id]
            row.normal_(std=config.initializer_range)
            for (
                parameter
            ) in model.parameters():  # stacked experts: a near tie in the router, turned by rounding, is no fault
                if parameter.dim() == 3:
                    mean = parameter.data.mean(dim=0, keepdim=True)
                    parameter.data.copy_(mean + ALIKE * (parameter.data - mean))
    if headed:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    if (
        wide
    ):  # Qwen2's class brings a normaliser: what is stored must be what a folder without config.json gives as well
        transformers.AutoTokenizer.from_pretrained(out).save_pretrained(out)


def make_tokenizer() -> Any:
    """SmolLM2's tokenizer with its first tokens only. Errors: UserError when its package is not installed."""
    from gguf import GGUFReader

    from sparkproof.engines.embedded import build_tokenizer, find_gguf

    stored = GGUFReader(find_gguf()).fields
    fields = {key: field.contents() for key, field in stored.items() if key.startswith("tokenizer.")}
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        fields[key] = fields[key][:VOCABULARY]
    known = set(fields["tokenizer.ggml.tokens"])
    merges = [m for m in fields["tokenizer.ggml.merges"] if m.replace(" ", "", 1) in known]
    fields["tokenizer.ggml.merges"] = [m for m in merges if set(m.split(" ", 1)) <= known]
    return build_tokenizer(fields)
