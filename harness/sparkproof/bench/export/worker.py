"""The processes of `sparkproof bench export`, each the entry of a fresh one: `prepare`, `write`, `read`. None judges but `read`,
which times nothing that did not prove where it ran."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparkproof.errors import UserError
from sparkproof.results import ReasonClass
from sparkproof.runners.child import progress

DISK = "Free some disk space, or point TMPDIR at a larger disk."
SOFTWARE = ("torch", "transformers", "peft", "bitsandbytes", "xllamacpp", "gguf")
SEED = 5
LAZY = (  # what writers import on their way: nine tenths of the time of a tiny model's first export
    "accelerate", "bitsandbytes", "safetensors.torch", "tokenizers", "transformers.generation.utils",
    "transformers.modeling_utils", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
)  # fmt: skip


def prepare(payload: dict[str, Any]) -> dict[str, Any]:
    """The base, the adapter, and where needed the base as GGUF.

    Keys: model, revision, cache_dir, adapter (empty: one is made), adapter_out, base_gguf (empty: not needed).
    """
    return _answered(lambda: _exported(lambda: _prepare(payload), payload["model"].startswith("tiny:")))


def _prepare(payload: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig

    from sparkproof.bench.export import adapter as made
    from sparkproof.engines.pretrained import resolve
    from sparkproof.runners.export_files import inspect

    progress(f"looking for {payload['model']}")
    base = resolve(payload["model"], payload["revision"], Path(payload["cache_dir"]))
    folder = Path(payload["adapter"] or payload["adapter_out"])
    if not payload["adapter"]:
        progress("making an adapter")
        made.write(base.path, folder)
    found: dict[str, Any] = {"without_base_gguf": "", "disk_full": False}
    if payload["base_gguf"]:
        from sparktune.export import ExportError, NoSpaceError, export_gguf

        progress("writing the base as GGUF, for the adapter to lie over")
        try:
            export_gguf(base.path, Path(payload["base_gguf"]), "f16", None)
        except ExportError as error:  # other formats don't need it
            found = {"without_base_gguf": error.message, "disk_full": isinstance(error, NoSpaceError)}
    config = AutoConfig.from_pretrained(base.path).get_text_config()
    stored, trained = inspect(base.path), inspect(folder)
    return {
        **found, "base": base.to_json(), "adapter": str(folder), "software": _versions(SOFTWARE), "vocabulary": config.vocab_size,
        "parameters": stored["parameters"], "bytes": stored["bytes"], "adapter_parameters": trained["parameters"],
        "window": getattr(config, "max_position_embeddings", None), "device": _device(),
    }  # fmt: skip


def write(payload: dict[str, Any]) -> dict[str, Any]:
    """One export. Keys: format, base, name, adapter, out, made (whether the model was made on the spot)."""
    return _answered(lambda: _exported(lambda: _write(payload), payload["made"]))


def _write(payload: dict[str, Any]) -> dict[str, Any]:
    from sparkproof.measure.peak import HostPeak
    from sparkproof.runners import export_write

    format_, out = payload["format"], Path(payload["out"])
    load_writers(format_)
    progress(f"writing {format_}")
    host, start = HostPeak(), time.perf_counter()
    done = export_write.write(format_, Path(payload["base"]), payload["name"], Path(payload["adapter"]), out)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds, "peak_gib": host.gib(), "why_no_peak": host.why_not, "gpu_gib": _gpu_peak(), "bytes": size(out),
        "types": done["type_counts"], "fallbacks": done["fallbacks"],
    }  # fmt: skip


def load_writers(format_: str) -> None:
    """Import what writes the format, so that neither its time nor its memory is the libraries'."""
    importlib.import_module("sparktune.export")
    if format_.startswith("gguf_") or format_ in ("lora_gguf", "ollama"):
        from sparktune.export import llama_cpp

        with llama_cpp.converter():
            pass
    for name in LAZY:
        importlib.import_module(name)


def size(out: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(f.stat().st_size for f in ([out] if out.is_file() else out.rglob("*")) if f.is_file())


def read(payload: dict[str, Any]) -> dict[str, Any]:
    """One consumer over an export: its proof first, and its speed only if that is right.

    Keys: format, consumer, path, base, base_gguf, device, gpu_present, threads, vocabulary, prompt_tokens, new_tokens, repeats.
    """
    return _answered(lambda: _read(payload))


def _read(payload: dict[str, Any]) -> dict[str, Any]:
    from sparkproof.bench.export import proof as proofs
    from sparkproof.data.filled import random_tokens
    from sparkproof.measure.peak import HostPeak
    from sparkproof.runners.export_child import versions

    consumer, device, tokens = payload["consumer"], payload["device"], payload["new_tokens"]
    for name in READERS[consumer]:
        importlib.import_module(name)
    progress(f"loading {payload['format']} with {consumer}")
    host = HostPeak()
    model = _loaded(payload)
    found = model.proof()
    refusal = proofs.judge(consumer, found, device, payload["gpu_present"])
    if refusal is not None:
        model.close()
        return {"proof": found.model_dump(), "refusal": vars(refusal)}
    count = 1 + payload["repeats"]
    batches = random_tokens(payload["vocabulary"], count=count, batch=1, seq_len=payload["prompt_tokens"], seed=SEED)
    speeds = []
    for number, batch in enumerate(batches):
        progress(f"{consumer} reads {payload['format']}: {number} of {payload['repeats']}")
        speeds.append(model.ask(list(batch.input_ids[0]), tokens))
    peak, gpu = host.gib(), model.gpu_gib() if device == "cuda" else None
    model.close()
    return {
        "load_s": model.load_s, "prefill_tokens_s": [s.prefill for s in speeds[1:]],
        "decode_tokens_s": [s.decode for s in speeds[1:]], "peak_gib": peak, "gpu_gib": gpu, "proof": found.model_dump(),
        "why_no_peak": host.why_not, "copy_gb_s": _copy(consumer) if device == "cuda" else None,
        "versions": versions(consumer),
    }  # fmt: skip


READERS = {
    "peft": ("torch", "transformers", "peft"), "transformers": ("torch", "transformers"), "llama.cpp": ("xllamacpp",),
    "vllm": ("torch", "vllm"),
}  # fmt: skip


def _loaded(payload: dict[str, Any]) -> Any:
    from sparkproof.bench.export.consumers import ROOM, LlamaCpp, Torch, Vllm

    path, base, consumer = Path(payload["path"]), Path(payload["base"]), payload["consumer"]
    if consumer in ("peft", "transformers"):
        return Torch(path, base, with_peft=consumer == "peft")
    asked = payload["prompt_tokens"] + payload["new_tokens"]
    if consumer == "vllm":
        over = payload["format"] == "vllm_adapter"
        return Vllm(base if over else path, path if over else None, asked)
    over, context = payload["format"] == "lora_gguf", asked + ROOM
    return LlamaCpp(
        Path(payload["base_gguf"]) if over else path,
        path if over else None,
        payload["device"],
        context,
        payload["threads"],
    )


def _exported(work: Callable[[], dict[str, Any]], made: bool) -> dict[str, Any]:
    """What `work` gives; what sparktune refuses is a person's to cure. Errors: UserError."""
    from sparktune.export import ExportError, NoSpaceError

    from sparkproof.runners.export_write import unsupported

    try:
        return work()
    except NoSpaceError as error:
        raise UserError(error.message, DISK, skip_class=ReasonClass.DISK.value) from error
    except ExportError as error:
        platform = ReasonClass.PLATFORM.value if unsupported(error, made) else ""
        raise UserError(error.message, error.fix, skip_class=platform) from error


def _answered(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` gives; or as `user_error` what a person can cure, a full disk among it."""
    from sparkproof.engines.pretrained import DiskErrors
    from sparkproof.runners.export_probe import Unloadable

    try:
        with DiskErrors("the export was written or read"):
            return work()
    except Unloadable as error:
        said = UserError(f"the consumer does not know this model: {error}", skip_class=ReasonClass.PLATFORM.value)
    except UserError as error:
        said = error
    return {"user_error": {"message": said.message, "fix": said.fix, "skip_class": said.skip_class}}


def _versions(names: Any) -> dict[str, str]:
    import importlib.metadata as metadata

    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _device() -> str:
    """The GPU's name, or the empty string where torch sees none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _gpu_peak() -> float | None:
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def _copy(consumer: str) -> float | None:
    """GB/s, after everything; None where torch can't, and in vLLM's process, which holds the memory and sees no sparktune."""
    import torch

    if consumer == "vllm" or not torch.cuda.is_available():
        return None
    from sparkproof.bench.train.step import copy_canary

    return copy_canary()
