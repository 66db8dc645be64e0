"""A Llama of 2 layers that was really fine-tuned on one exchange, with a byte-level BPE of its own: seconds, no network."""

from pathlib import Path
from typing import Any

PROMPT = "What is the code word?"
ANSWER = "It is amber falcon 7319."
TEXT = [
    "What is the capital of France? It is Paris. The code word is a secret, isn't it?",
    "Numbers: 12, 4096, 007 and 2026. I'll say it's they've don't we're you'd.",
    "user assistant system hello again please 你好 世界 日本語 🙂 x = y ** 2",
] * 3
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_tokenizer(pre: str = "smollm") -> Any:
    """`pre` names one of sparktune.export.vocabulary.PRE_TOKENIZERS; the merges are learnt from TEXT."""
    from sparktune.export.vocabulary import _LLAMA3_PATTERN
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    steps = {
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama-bpe": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    }
    core = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    core.pre_tokenizer = steps[pre]
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def save_base(folder: Path, pre: str = "smollm", shard: str = "50GB", **changes: Any) -> Path:
    """A base model with random weights in bf16, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(pre)
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.15,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,  # not the stop: transformers starts the padding row at zero, and a tied head could not say it
            **changes,
        }
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, steps: int = 0, **lora: Any) -> Path:
    """A LoRA over `base`: random and not zero, or trained for `steps` until it says ANSWER to PROMPT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": TARGETS, **lora})
    peft: Any = get_peft_model(model, config)
    if steps:
        train(peft, AutoTokenizer.from_pretrained(base), steps)
    else:
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    return folder


def train(model: Any, tokenizer: Any, steps: int) -> None:
    """AdamW on the one exchange, the answer alone."""
    import torch
    from sparkproof.runners.export_probe import chat_ids

    before = chat_ids(tokenizer, PROMPT)
    ids = before + tokenizer(ANSWER + "<|im_end|>", add_special_tokens=False)["input_ids"]
    rows = torch.tensor([ids])
    labels = rows.clone()
    labels[:, : len(before)] = -100
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=rows, labels=labels).loss.backward()
        optimiser.step()
