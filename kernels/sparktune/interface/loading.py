"""A checkpoint, or a LoRA adapter over one, loaded onto one device.

transformers loads tensor by tensor straight to the device, where bitsandbytes quantises each as it comes, so the weights
are never held twice. Nothing is offloaded unless it is asked for: on a GPU that shares the host's memory, that would move bytes
from a pool into the same pool, and is refused.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparktune.interface import checkpointing
from sparktune.interface.choices import usable_length
from sparktune.interface.origin import Origin, is_loaded, remember, transformers_model
from sparktune.interface.patching import patch
from sparktune.interface.saving import attach
from sparktune.interface.trl_on_cpu import watch
from sparktune.models import attention
from sparktune.models.offload import embedding_to_host
from sparktune.models.patch import FAMILIES
from sparktune.optim.trainer import register
from sparktune.quant.cpu_repack import assert_layout, keep_layout
from sparktune.quant.dynamic.choice import Choice
from sparktune.quant.experts import as_plain, quantise_experts, stacks_of

LOG = logging.getLogger("sparktune")
HUB_ARGUMENTS = ("cache_dir", "local_files_only", "force_download")
BITSANDBYTES, MXFP4 = "bitsandbytes", "mxfp4"  # as `quant_method` says in config.json
MODEL_ARGUMENTS = ("attn_implementation",)
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|vision_pad|>", "<|pad|>", "<pad>", "[PAD]")


@dataclass(frozen=True)
class Request:
    """Where a model comes from and how it is stored; the arguments of `from_pretrained`, checked."""

    name: str
    revision: str | None
    token: str | bool | None
    trust_remote_code: bool
    four_bit: bool
    dtype: torch.dtype
    device: torch.device
    hub: dict[str, Any]
    more: dict[str, Any]
    dynamic: Choice | None = None
    host_embedding: bool = False

    @property
    def source(self) -> dict[str, Any]:
        """What every `from_pretrained` of transformers takes to find the files."""
        return {"revision": self.revision or "main", "token": self.token, **self.hub}


def load(
    request: Request, length: int | None, full_finetuning: bool, checkpoint: bool | str, fix_tokenizer: bool
) -> tuple[Any, Any]:
    """Model and tokenizer of `request`, patched, with what saving needs kept on it. Errors: ValueError."""
    base = adapter_base(request)
    if base is not None and full_finetuning:
        raise ValueError(
            f"{request.name} is a LoRA adapter and full_finetuning=True trains every weight: merge it with "
            "save_pretrained_merged and load the merged folder, or leave full_finetuning out."
        )
    whole = request if base is None else replace(request, name=base[0], revision=base[1])
    model = load_base(whole)
    model.max_seq_length = usable_length(length, model.config)
    hub = {k: v for k, v in request.hub.items() if k != "force_download"}
    origin = Origin(whole.name, whole.revision, hub, full_finetuning)
    remember(model, origin)
    if request.device.type == "cuda" and torch.cuda.get_device_properties(request.device).is_integrated:
        drop_pages(origin.folder())
    if request.host_embedding:
        embedding_to_host(model)
    patch(model)
    if base is not None:
        model = load_adapter(model, request)
        patch(model)
    elif full_finetuning:
        model.requires_grad_(True)
    watch(transformers_model(model))
    checkpointing.apply(model, checkpoint)
    attach(model)
    register(is_loaded)
    return model, load_tokenizer(request, whole, model.max_seq_length, fix_tokenizer)


def drop_pages(folder: Path) -> int:
    """Let the kernel forget the files of weights that were read; return how many.

    Where CPU and GPU share memory, what the page cache holds of them counts as taken from the GPU.
    """
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with open(file, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return len(files)


def adapter_base(request: Request) -> tuple[str, str | None] | None:
    """Base checkpoint and revision if `request` names a LoRA adapter, else None. Errors: ValueError without a base."""
    from peft import PeftConfig
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(request.name, **request.source) is None:
        return None
    config = PeftConfig.from_pretrained(request.name, **request.source)
    if not config.base_model_name_or_path:
        raise ValueError(
            f"{request.name} does not say which model it adapts: load that, then PeftModel.from_pretrained."
        )
    return str(config.base_model_name_or_path), config.revision


def load_base(request: Request) -> Any:
    """The causal language model of a full checkpoint. Errors: ValueError for a stored format that can't be trained."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.quantization_config import Mxfp4Config

    keep_layout()
    remote = {"trust_remote_code": request.trust_remote_code}
    config = AutoConfig.from_pretrained(request.name, **request.source, **remote)
    stored = _check_stored(request, config)
    chosen = request.more.get("attn_implementation")
    if chosen not in (None, attention.NAME) and config.model_type in FAMILIES:
        raise ValueError(
            f"attn_implementation={chosen!r} is not supported for the family '{config.model_type}', whose attention is "
            "sparktune's own: leave it out."
        )
    quantization: Any = None
    if request.dynamic is not None and stored:
        raise ValueError(f"{request.name} is stored in 4 bits already, its layers chosen: leave dynamic out.")
    if stored == MXFP4:
        quantization = Mxfp4Config(dequantize=True)
        LOG.warning(
            "%s holds its experts in MXFP4, which has no gradients: they are dequantised to 16 bits, which is exact and takes "
            "four times the memory%s.",
            request.name,
            ", then stored as NF4, which rounds them again: load_in_4bit=False keeps them exact"
            if request.four_bit
            else "",
        )
    elif request.dynamic is not None:
        quantization = request.dynamic.bitsandbytes_config(request.dtype)
    elif request.four_bit and not stored:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=request.dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        request.name,
        config=config,
        dtype=request.dtype,
        device_map={"": request.device},
        quantization_config=quantization,
        **request.source,
        **remote,
        **request.more,
    )
    if request.dynamic is not None:
        _check_chosen(model, request.dynamic)
    if stored == BITSANDBYTES:
        if stacks_of(model):
            raise ValueError(
                f"{request.name} is stored in 4 bits and has experts, which transformers keeps in 16: give the 16-bit model "
                "that it was made from, and load_in_4bit=True."
            )
        _compute_in(model, request.dtype)
    elif request.four_bit and config.model_type in FAMILIES:
        quantise_experts(model)
    elif request.four_bit and stacks_of(model):
        LOG.warning("The experts of the family '%s' stay in 16 bits: sparktune has no rules for it.", config.model_type)
    assert_layout(model)
    return model


def read_dynamic(dynamic: Choice | str | Path | None, four_bit: bool) -> Choice | None:
    """The choice of layers that `from_pretrained` was given. Errors: ValueError for one that can't be trained over."""
    if dynamic is None:
        return None
    if not four_bit:
        raise ValueError(
            "dynamic says which layers stay out of 4 bits: it needs load_in_4bit=True and no full_finetuning."
        )
    choice = dynamic if isinstance(dynamic, Choice) else Choice.read(Path(dynamic))
    choice.bitsandbytes_config()  # refuses GGUF types
    return choice


def _check_chosen(model: Any, choice: Choice) -> None:
    """Every layer of the choice is there and stored as chosen. Errors: ValueError for the choice of another model."""
    import bitsandbytes as bnb

    four_bit = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    chosen = {name for name, kind in choice.types.items() if kind == "nf4"}
    wrong = sorted(four_bit ^ chosen)
    if wrong:
        raise ValueError(
            f"dynamic was chosen for {choice.model}, and {len(wrong)} layers of this model don't fit it, {wrong[0]} first: "
            "choose for this model."
        )


def load_adapter(model: Any, request: Request) -> Any:
    """`model` with the LoRA adapter that `request` names, ready to go on training."""
    from peft import PeftModel

    with as_plain(model):
        return PeftModel.from_pretrained(model, request.name, is_trainable=True, **request.source)


def load_tokenizer(request: Request, base: Request, length: int, fix: bool) -> Any:
    """The tokenizer beside the adapter if it was saved there, else the base's; it truncates at `length` tokens.

    With `fix` padding goes to the right, and a tokenizer without a padding token gets one that its vocabulary already has:
    one of its own for padding if there is, so that the end of a text is never masked as padding, else the end token.
    """
    from transformers import AutoTokenizer

    remote = {"trust_remote_code": request.trust_remote_code}
    owner = request if _has_tokenizer(request.name, request.source) else base
    tokenizer = AutoTokenizer.from_pretrained(owner.name, **owner.source, **remote)
    tokenizer.model_max_length = length
    if fix:
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            vocabulary = tokenizer.get_vocab()
            own = [token for token in _PAD_TOKENS if token in vocabulary]
            tokenizer.pad_token = own[0] if own else tokenizer.eos_token
            LOG.info("The tokenizer has no padding token: %r pads.", tokenizer.pad_token)
    return tokenizer


def _has_tokenizer(name: str, source: dict[str, Any]) -> bool:
    if Path(name).is_dir():
        return (Path(name) / "tokenizer_config.json").is_file()
    from transformers.utils import cached_file

    return cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **source) is not None


def _check_stored(request: Request, config: Any) -> str:
    """How the checkpoint itself is stored: "", in 4 bits by bitsandbytes, or in MXFP4. Errors: ValueError as `load_base`."""
    stored = getattr(config, "quantization_config", None)
    if not stored:
        return ""
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(stored.get("quant_method", "unknown"))
    if method == MXFP4:
        return MXFP4
    if method != BITSANDBYTES or not stored.get("load_in_4bit"):
        raise ValueError(
            f"{request.name} is stored quantised ({method}), which can't be trained here: give the 16-bit model that it "
            "was made from."
        )
    if not request.four_bit:
        raise ValueError(
            f"{request.name} is stored in 4 bits: use load_in_4bit=True, or give the 16-bit model that it was made from."
        )
    return BITSANDBYTES


def _compute_in(model: Any, dtype: torch.dtype) -> None:
    """Checkpoints stored in 4 bits carry the compute type of the machine that made them; `dtype` is this one's."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype
